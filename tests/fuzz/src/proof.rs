//! Who the peer is: strangers at either side's door, sealed records that somebody meddles with, and the file of the secret.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use hypervisor::handshake::proof::{CLAIM, GREETING, VERDICT};
use hypervisor::handshake::{self, Channel, Secret, Stream, Trust};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "proof",
    line: "strangers at the door, sealed records that are meddled with, files of secrets: nobody in, nothing taken that was not said",
    run,
    seeds,
};

fn secret() -> Trust {
    Trust::holders(Secret::from_bytes([0x5e; 32]))
}

fn head(magic: &[u8; 8], kind: u8) -> Vec<u8> {
    let mut head = magic.to_vec();
    head.extend(handshake::VERSION.to_le_bytes());
    head.extend([kind, 0, 0, 0]);
    head
}

/// What a process of this user says, without a secret.
pub(super) fn claim_of_this_user() -> Vec<u8> {
    let mut claim = head(b"doppel-p", 0);
    claim.resize(CLAIM, 0);
    claim
}

fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    match source.u8() % 4 {
        0 => {
            if let Err(words) = Secret::parse(source.rest()) {
                assert!(!words.is_empty());
            }
        }
        1 => stranger(source, |stream| handshake::admit(stream, &secret())),
        2 => stranger(source, |stream| handshake::prove(stream, &secret())),
        _ => records(source),
    }
}

/// Whoever has no secret is not believed, whatever he says.
fn stranger(
    source: Source<'_>,
    meet: impl FnOnce(Stream) -> Result<Channel, handshake::HandshakeError>,
) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    // It fits the socket's buffer, and then the stranger is gone: nobody waits.
    let said = source.rest();
    let said = &said[..said.len().min(32 << 10)];
    theirs.write_all(said).expect("room in the socket");
    theirs.shutdown(Shutdown::Write).expect("an open socket");
    let error = meet(Stream::Unix(ours)).expect_err("nobody guesses a secret");
    assert!(!error.to_string().is_empty());
}

/// One record off the wire.
fn record(mut wire: &UnixStream) -> Vec<u8> {
    let mut head = [0; 2];
    wire.read_exact(&mut head).expect("a record");
    let mut record = head.to_vec();
    record.resize(2 + usize::from(u16::from_le_bytes(head)), 0);
    wire.read_exact(&mut record[2..]).expect("a record");
    record
}

/// Two sides that have met, and the wire between them.
fn pair() -> (Channel, Channel, [UnixStream; 2]) {
    let (ours, at_primary) = UnixStream::pair().expect("sockets");
    let (theirs, at_backup) = UnixStream::pair().expect("sockets");
    let trust = secret();
    std::thread::scope(|scope| {
        let primary = scope.spawn(|| handshake::prove(Stream::Unix(ours), &trust));
        let backup = scope.spawn(|| handshake::admit(Stream::Unix(theirs), &trust));
        let mut legs = [
            (&at_backup, &at_primary, GREETING),
            (&at_primary, &at_backup, CLAIM),
            (&at_backup, &at_primary, VERDICT),
        ];
        for (from, to, length) in &mut legs {
            let mut bytes = vec![0; *length];
            from.read_exact(&mut bytes).expect("a leg");
            to.write_all(&bytes).expect("room in the socket");
        }
        let met = |side: std::thread::ScopedJoinHandle<'_, _>| side.join().expect("no panic");
        let (primary, backup) = (met(primary), met(backup));
        let met = |side: Result<Channel, handshake::HandshakeError>| side.expect("the same secret");
        (met(primary), met(backup), [at_primary, at_backup])
    })
}

/// A program of records: said and passed on, flipped, left out, repeated, or bytes of the meddler's own. What is heard is the
/// beginning of what was said.
fn records(mut source: Source<'_>) {
    let (primary, backup, [at_primary, mut at_backup]) = pair();
    let (mut said, mut passed) = (Vec::new(), 0);
    let mut honest = true;
    while !source.is_over() && passed < 64 << 10 {
        let choice = source.u8();
        let length = 1 + usize::from(source.u16() % 2048);
        let piece = vec![choice; length];
        (&primary).write_all(&piece).expect("room in the socket");
        said.extend_from_slice(&piece);
        let mut record = record(&at_primary);
        honest &= choice & 7 < 3;
        match choice & 7 {
            0..=2 => {}
            3 => {
                let at = usize::from(source.u16()) % record.len();
                record[at] ^= 1 << (source.u8() & 7);
            }
            4 => record.clear(),
            5 => record.extend_from_within(..),
            6 => record.truncate(usize::from(source.u16()) % record.len()),
            _ => record = source.bytes(length).to_vec(),
        }
        passed += record.len();
        at_backup.write_all(&record).expect("room in the socket");
    }
    at_backup.shutdown(Shutdown::Write).expect("an open socket");
    let mut heard = Vec::new();
    let outcome = (&backup).read_to_end(&mut heard);
    assert!(
        said.starts_with(&heard),
        "something was heard that was not said"
    );
    if honest {
        assert!(outcome.is_ok() && heard == said);
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut file = vec![0];
    file.extend(b"# a comment\ndoppel-secret-1:");
    file.extend([b'0'; 64]);
    // The checksum of 32 zero bytes.
    file.extend(b":8a9136aa\n");
    let with = |choice: u8, parts: &[&[u8]]| {
        let mut seed = vec![choice];
        parts.iter().for_each(|part| seed.extend_from_slice(part));
        seed
    };
    let claim = head(b"doppel-p", 1);
    let greeting = head(b"doppel-b", 1);
    let mut seeds = vec![
        file,
        with(1, &[&claim_of_this_user()]),
        with(1, &[&claim, &[9; 48]]),
        with(2, &[&greeting, &[7; 32], &[0; VERDICT]]),
        with(2, &[&greeting, &[7; 32], &[3], &[0; VERDICT - 1]]),
        with(2, &[&head(b"doppel-b", 0), &[7; 32], &[0; VERDICT]]),
        with(3, &[&[0, 100, 0, 1, 200, 7, 2, 1, 0, 0, 0, 4]]),
    ];
    for meddling in 3..8 {
        seeds.push(with(
            3,
            &[&[0, 100, 0, meddling, 50, 0, 30, 0, 3, 0, 1, 0, 0, 1, 0]],
        ));
    }
    seeds
}
