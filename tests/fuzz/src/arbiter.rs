//! The arbiter's directory: what a damaged file system, another program or a hand may have left there.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use hypervisor::arbiter::{Arbiter, Durability, FileArbiter};
use hypervisor::protocol::record::{Identity, Record, State};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "arbiter",
    line: "files in the arbiter's directory, their checksum made good or not: read as the record that they are, or refused",
    run,
    seeds,
};

const MACHINE: &str = "kv";

fn owner() -> Identity {
    Identity::from_bytes([1; 16])
}

/// A byte: bit 0 makes the checksum good, bit 1 gives the file an odd number; then the text.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let choice = source.u8();
    let mut text = source.rest().to_vec();
    if choice & 1 != 0
        && let Some(at) = text.windows(9).rposition(|piece| piece == b"checksum ")
    {
        let checksum = crc32c::crc32c(&text[..at]);
        text.truncate(at);
        text.extend_from_slice(format!("checksum = \"crc32c:{checksum:08x}\"\n").as_bytes());
    }
    let directory = tempfile::Builder::new()
        .prefix("doppel-fuzz-")
        .tempdir_in(memory())
        .expect("a directory");
    let home = directory.path().join(MACHINE);
    fs::create_dir(&home).expect("a directory");
    let number = if choice & 2 != 0 { u64::MAX } else { 1 };
    fs::write(home.join(format!("{number:020}.record")), &text).expect("a file");
    let arbiter = FileArbiter::open(directory.path(), MACHINE, Durability::ProcessDeath)
        .expect("the directory is there");
    let read = arbiter.read();
    // What is read can be swapped, as any record can; and what cannot be read is not swapped away.
    let to = Record::cold_start(None, owner(), None);
    match read {
        Ok(Some(record)) => {
            assert!(text.starts_with(b"doppel arbiter record 1\n"));
            // The next steps from any record that can be read can be counted.
            let _ = record.entitled.and_then(|backup| record.claimed_by(backup));
            if record.state == State::Live {
                let _ = (record.detached(), record.ended());
            }
            let _ = Record::cold_start(Some(&record), owner(), None);
            drop(arbiter.swap(Some(&record), &to));
        }
        Ok(None) => unreachable!("there is a file"),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(
                arbiter.swap(None, &to).is_err(),
                "a bad record was replaced"
            );
            assert_eq!(
                fs::read(home.join(format!("{number:020}.record"))).ok(),
                Some(text)
            );
        }
    }
}

/// A directory in memory, if there is one: a disk would be the slowest part.
fn memory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        memory
    } else {
        Path::new("/tmp")
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let directory = tempfile::tempdir().expect("a directory");
    let arbiter = FileArbiter::open(directory.path(), MACHINE, Durability::ProcessDeath)
        .expect("the directory is there");
    let backup = Identity::from_bytes([2; 16]);
    let first = Record::cold_start(None, owner(), Some(backup));
    arbiter.swap(None, &first).expect("a swap");
    let claimed = first.claimed_by(backup).expect("it is entitled");
    arbiter.swap(Some(&first), &claimed).expect("a swap");
    let files = fs::read_dir(directory.path().join(MACHINE)).expect("a directory");
    let mut seeds = Vec::new();
    for file in files.flatten() {
        for choice in [1, 3] {
            let mut seed = vec![choice];
            seed.extend(fs::read(file.path()).expect("a file"));
            seeds.push(seed);
        }
    }
    seeds
}
