//! A record as text: eight lines that a person can read and a program checks.
//!
//! ```text
//! doppel arbiter record 1
//! machine = "kv"
//! epoch = 2
//! configuration = 2
//! state = "claimed"
//! owner = "5f1d…"
//! entitled = "none"
//! checksum = "crc32c:0a1b2c3d"
//! ```
//!
//! Reading is strict: exactly what writing gives, byte for byte, and nothing longer than [`MAX_SIZE`].

use crate::protocol::record::{Configuration, Epoch, Identity, Record, State};

/// No record is longer, in bytes. (The longest possible one has 302.)
pub(super) const MAX_SIZE: usize = 512;

const HEADER: &str = "doppel arbiter record 1";
const NONE: &str = "none";

/// The record's text.
pub(super) fn write(machine: &str, record: &Record) -> String {
    let entitled = record
        .entitled
        .map_or_else(|| NONE.to_owned(), |id| id.to_string());
    let body = format!(
        "{HEADER}\nmachine = \"{machine}\"\nepoch = {}\nconfiguration = {}\nstate = \"{}\"\nowner = \"{}\"\n\
         entitled = \"{entitled}\"\n",
        record.epoch,
        record.configuration,
        record.state.word(),
        record.owner,
    );
    let checksum = rdma_log::crc32c(body.as_bytes());
    format!("{body}checksum = \"crc32c:{checksum:08x}\"\n")
}

/// Reads a record of `machine`.
///
/// # Errors
/// What is wrong with the text, for people.
pub(super) fn read(machine: &str, bytes: &[u8]) -> Result<Record, String> {
    if bytes.len() > MAX_SIZE {
        return Err(format!("longer than {MAX_SIZE} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "not text".to_owned())?;
    let mut lines = text.lines();
    match lines.next() {
        Some(HEADER) => {}
        Some(line) => return Err(format!("begins with {line:?}, expected {HEADER:?}")),
        None => return Err("empty".to_owned()),
    }
    let named = quoted(value(lines.next(), "machine")?, "machine")?;
    if named != machine {
        return Err(format!(
            "it is about machine {named:?}, expected {machine:?}"
        ));
    }
    let record = Record {
        epoch: Epoch(number(value(lines.next(), "epoch")?, "epoch")?),
        configuration: Configuration(number(
            value(lines.next(), "configuration")?,
            "configuration",
        )?),
        state: State::parse(quoted(value(lines.next(), "state")?, "state")?)
            .ok_or("state is none of live, claimed, abandoned, ended")?,
        owner: identity(quoted(value(lines.next(), "owner")?, "owner")?, "owner")?,
        entitled: match quoted(value(lines.next(), "entitled")?, "entitled")? {
            NONE => None,
            id => Some(identity(id, "entitled")?),
        },
    };
    // Anything but the very text that writing gives, the checksum above all, is not ours.
    if write(machine, &record) != text {
        return Err("the checksum is wrong, or the text was changed".to_owned());
    }
    Ok(record)
}

fn value<'a>(line: Option<&'a str>, key: &str) -> Result<&'a str, String> {
    line.and_then(|line| line.strip_prefix(key)?.strip_prefix(" = "))
        .ok_or_else(|| format!("no line \"{key} = …\" where it should be"))
}

fn quoted<'a>(value: &'a str, key: &str) -> Result<&'a str, String> {
    value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .ok_or_else(|| format!("{key} is not in quotes"))
}

/// No machine lives so long; and whoever counts on from a number below it stays far from the end of 64 bits.
pub(super) const MAX_NUMBER: u64 = u64::MAX / 2;

fn number(value: &str, key: &str) -> Result<u64, String> {
    let number = value
        .parse()
        .map_err(|_| format!("{key} is not a number"))?;
    if number > MAX_NUMBER {
        return Err(format!("{key} is {number}, which no machine reaches"));
    }
    Ok(number)
}

fn identity(value: &str, key: &str) -> Result<Identity, String> {
    Identity::parse(value).ok_or_else(|| format!("{key} is not 32 hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> [Record; 3] {
        let who = |n| Identity::from_bytes([n; 16]);
        let live = Record::cold_start(None, who(1), Some(who(2)));
        let claimed = live.claimed_by(who(2)).unwrap();
        [live, claimed, claimed.abandoned()]
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        for record in records() {
            assert_eq!(read("kv", write("kv", &record).as_bytes()), Ok(record));
        }
    }

    #[test]
    fn the_longest_record_fits() {
        let who = Identity::from_bytes([0xff; 16]);
        let record = Record {
            epoch: Epoch(MAX_NUMBER),
            configuration: Configuration(MAX_NUMBER),
            state: State::Abandoned,
            owner: who,
            entitled: Some(who),
        };
        let name = "m".repeat(63);
        let text = write(&name, &record);
        assert_eq!(text.len(), 302, "the doc comment of MAX_SIZE");
        assert_eq!(read(&name, text.as_bytes()), Ok(record));
    }

    #[test]
    fn every_flipped_bit_every_cut_and_every_addition_is_refused() {
        let good = write("kv", &records()[0]).into_bytes();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read("kv", &bad).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(read("kv", &good[..length]).is_err(), "cut to {length}");
        }
        for more in ["\n", " ", "x = 1\n"] {
            let mut bad = good.clone();
            bad.extend_from_slice(more.as_bytes());
            assert!(read("kv", &bad).is_err(), "with {more:?}");
        }
        assert!(
            read("kv", &vec![b'a'; MAX_SIZE + 1])
                .unwrap_err()
                .contains("longer")
        );
    }

    #[test]
    fn another_spelling_of_the_same_record_is_refused() {
        let body = write("kv", &records()[0]).replace("epoch = 1", "epoch = 01");
        let body = &body[..body.find("checksum").unwrap()];
        let crc = rdma_log::crc32c(body.as_bytes());
        let text = format!("{body}checksum = \"crc32c:{crc:08x}\"\n");
        assert!(read("kv", text.as_bytes()).is_err());
    }

    #[test]
    fn another_machines_record_is_refused_and_named() {
        let problem = read("kv", write("db", &records()[0]).as_bytes()).unwrap_err();
        assert!(
            problem.contains("\"db\"") && problem.contains("\"kv\""),
            "{problem}"
        );
    }
}
