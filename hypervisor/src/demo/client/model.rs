//! What a connection's keys must hold, given the replies it got; and what it asks for next.
//!
//! Values are never stored: each is a function of the run, the connection and its number, so the model stays
//! small whatever the values' size.

use std::collections::VecDeque;
use std::io::Write;
use std::ops::RangeInclusive;

use super::resp::{self, Reply};
use super::{Config, Large};

/// Keys of a connection that SET writes, that INCR counts, and that APPEND grows.
const VALUES: usize = 16;
const COUNTERS: usize = 4;
const LOGS: usize = 4;
pub(super) const KEYS: usize = VALUES + COUNTERS + LOGS;

/// A log longer than this is set anew.
const LONGEST_LOG: usize = 4096;

/// A written value: unlike any other of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    number: u64,
    length: usize,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Set(usize, Piece),
    Get(usize),
    Increment(usize),
    Append(usize, Piece),
}

/// What a key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    Text(Vec<Piece>),
    Number(i64),
    /// It was found wrong, which has been counted; what it holds now is anybody's guess.
    Unknown,
}

/// A reply or a value that contradicts the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    /// Acknowledged writes that it shows to be lost or changed.
    pub(super) lost: u64,
    /// Key, expected and found.
    pub(super) words: String,
}

/// What a reply meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A read, and right.
    Read,
    /// A write, and acknowledged.
    Written,
    /// The server said no; nothing changed.
    Refused(String),
    /// Not what it had to be. A write is acknowledged all the same.
    Wrong(Wrong),
    /// A reply of a kind that no right server gives to the request.
    Nonsense(String),
}

/// The keys of one connection.
#[derive(Debug)]
pub(super) struct Keys {
    seed: u64,
    connection: usize,
    states: Vec<State>,
    /// Room to make values in.
    scratch: Vec<u8>,
}

impl Keys {
    pub(super) fn new(seed: u64, connection: usize) -> Self {
        Self {
            seed,
            connection,
            states: vec![State::Absent; KEYS],
            scratch: Vec::new(),
        }
    }

    /// A key's name.
    pub(super) fn name(&self, key: usize) -> String {
        let (kind, number) = match key {
            key if key < VALUES => ("value", key),
            key if key < VALUES + COUNTERS => ("counter", key - VALUES),
            key => ("log", key - VALUES - COUNTERS),
        };
        format!("doppel:{:x}:{}:{kind}:{number}", self.seed, self.connection)
    }

    /// Appends a piece's bytes: where it comes from, then letters that depend on it.
    fn write_piece(&self, piece: Piece, out: &mut Vec<u8>) {
        let end = out.len() + piece.length;
        // Writing to a Vec cannot fail.
        let _ = write!(
            out,
            "<{:x}:{}:{}>",
            self.seed, self.connection, piece.number
        );
        let mut random = Random::new(self.seed ^ piece.number << 16 ^ self.connection as u64);
        while out.len() < end {
            let letters = random.next().to_le_bytes().map(|byte| b'a' + byte % 26);
            out.extend_from_slice(&letters[..letters.len().min(end - out.len())]);
        }
    }

    /// The least length at which a piece says where it comes from.
    fn label(&self, number: u64) -> usize {
        format!("<{:x}:{}:{number}>", self.seed, self.connection).len()
    }

    /// Appends the request's bytes.
    pub(super) fn encode(&mut self, operation: Operation, out: &mut Vec<u8>) {
        let mut value = std::mem::take(&mut self.scratch);
        value.clear();
        match operation {
            Operation::Get(key) => resp::command(out, &[b"GET", self.name(key).as_bytes()]),
            Operation::Increment(key) => {
                resp::command(out, &[b"INCR", self.name(key).as_bytes()]);
            }
            Operation::Set(key, piece) => {
                self.write_piece(piece, &mut value);
                resp::command(out, &[b"SET", self.name(key).as_bytes(), &value]);
            }
            Operation::Append(key, piece) => {
                self.write_piece(piece, &mut value);
                resp::command(out, &[b"APPEND", self.name(key).as_bytes(), &value]);
            }
        }
        self.scratch = value;
    }

    /// Takes the reply to the oldest outstanding request.
    pub(super) fn settle(&mut self, operation: Operation, reply: Reply<'_>) -> Verdict {
        if let Reply::Error(words) = reply {
            return Verdict::Refused(String::from_utf8_lossy(words).into_owned());
        }
        let nonsense = || Verdict::Nonsense(format!("{operation:?} was answered {}", brief(reply)));
        match (operation, reply) {
            (Operation::Set(..), Reply::Status(b"OK")) => {
                self.apply(operation);
                Verdict::Written
            }
            (Operation::Get(key), Reply::Bulk(_) | Reply::Null) => {
                let found = match reply {
                    Reply::Bulk(value) => Some(value),
                    _ => None,
                };
                let expected = std::slice::from_ref(&self.states[key]);
                match self.compare(key, expected, found) {
                    None => Verdict::Read,
                    Some(wrong) => {
                        self.states[key] = State::Unknown;
                        Verdict::Wrong(wrong)
                    }
                }
            }
            (Operation::Increment(key), Reply::Integer(found)) => {
                let before = match self.states[key] {
                    State::Number(before) => Some(before),
                    State::Absent => Some(0),
                    _ => None,
                };
                self.states[key] = State::Number(found);
                match before {
                    Some(before) if found != before + 1 => Verdict::Wrong(Wrong {
                        lost: missing(before + 1, found),
                        words: format!(
                            "INCR {}: expected {}, found {found}",
                            self.name(key),
                            before + 1
                        ),
                    }),
                    _ => Verdict::Written,
                }
            }
            (Operation::Append(key, _), Reply::Integer(found)) => {
                self.apply(operation);
                let State::Text(pieces) = &self.states[key] else {
                    return Verdict::Written;
                };
                let expected: usize = pieces.iter().map(|piece| piece.length).sum();
                if usize::try_from(found) == Ok(expected) {
                    return Verdict::Written;
                }
                let wrong = Wrong {
                    lost: 1,
                    words: format!(
                        "APPEND {}: expected length {expected}, found {found}",
                        self.name(key)
                    ),
                };
                self.states[key] = State::Unknown;
                Verdict::Wrong(wrong)
            }
            _ => nonsense(),
        }
    }

    /// Does to the model what a successful write does to the server.
    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Get(_) => {}
            Operation::Set(key, piece) => self.states[key] = State::Text(vec![piece]),
            Operation::Append(key, piece) => match &mut self.states[key] {
                State::Text(pieces) => pieces.push(piece),
                State::Absent => self.states[key] = State::Text(vec![piece]),
                State::Number(_) | State::Unknown => self.states[key] = State::Unknown,
            },
            Operation::Increment(key) => match &mut self.states[key] {
                State::Number(number) => *number += 1,
                State::Absent => self.states[key] = State::Number(1),
                State::Text(_) | State::Unknown => self.states[key] = State::Unknown,
            },
        }
    }

    /// What a key may hold if the first so many of the outstanding requests happened, for each so many.
    /// What was acknowledged stands first.
    pub(super) fn allowed(
        &self,
        key: usize,
        outstanding: impl Iterator<Item = Operation>,
    ) -> Vec<State> {
        let mut trial = Self {
            seed: self.seed,
            connection: self.connection,
            states: self.states.clone(),
            scratch: Vec::new(),
        };
        let mut allowed = vec![self.states[key].clone()];
        for operation in outstanding {
            trial.apply(operation);
            if allowed.last() != Some(&trial.states[key]) {
                allowed.push(trial.states[key].clone());
            }
        }
        allowed
    }

    /// Compares what the server has with what it may have; the first of `allowed` is what it acknowledged.
    pub(super) fn compare(
        &self,
        key: usize,
        allowed: &[State],
        found: Option<&[u8]>,
    ) -> Option<Wrong> {
        if allowed.iter().any(|state| self.holds(state, found)) {
            return None;
        }
        let acknowledged = &allowed[0];
        let expected = match acknowledged {
            State::Number(number) => number.to_string(),
            State::Text(pieces) => {
                let mut text = Vec::new();
                for piece in pieces {
                    self.write_piece(*piece, &mut text);
                }
                brief(Reply::Bulk(&text))
            }
            State::Absent | State::Unknown => "nothing".to_owned(),
        };
        Some(Wrong {
            lost: self.lost(acknowledged, found),
            words: format!(
                "{}: expected {expected}, found {}",
                self.name(key),
                brief(found.map_or(Reply::Null, Reply::Bulk))
            ),
        })
    }

    fn holds(&self, state: &State, found: Option<&[u8]>) -> bool {
        match (state, found) {
            (State::Unknown, _) | (State::Absent, None) => true,
            (State::Number(number), Some(found)) => found == number.to_string().as_bytes(),
            (State::Text(pieces), Some(found)) => {
                self.leading(pieces, found) == pieces.len()
                    && found.len() == pieces.iter().map(|piece| piece.length).sum::<usize>()
            }
            _ => false,
        }
    }

    /// How many of the pieces stand at the value's beginning.
    fn leading(&self, pieces: &[Piece], found: &[u8]) -> usize {
        let mut start = 0;
        let mut expected = Vec::new();
        pieces
            .iter()
            .take_while(|piece| {
                expected.clear();
                self.write_piece(**piece, &mut expected);
                let end = start + expected.len();
                let equal = found.get(start..end) == Some(&expected[..]);
                start = end;
                equal
            })
            .count()
    }

    /// Acknowledged writes that are not there. At least one: the value is wrong.
    fn lost(&self, acknowledged: &State, found: Option<&[u8]>) -> u64 {
        match acknowledged {
            State::Number(number) => {
                let found = found
                    .and_then(|found| std::str::from_utf8(found).ok())
                    .and_then(|found| found.parse().ok());
                missing(*number, found.unwrap_or(0))
            }
            State::Text(pieces) => {
                let there = self.leading(pieces, found.unwrap_or_default());
                (pieces.len() - there).max(1) as u64
            }
            State::Absent | State::Unknown => 1,
        }
    }
}

/// Increments that are missing; one if there are too many, for then it is another's.
fn missing(expected: i64, found: i64) -> u64 {
    u64::try_from(expected - found).unwrap_or(1).max(1)
}

/// A reply in few words.
pub(super) fn brief(reply: Reply<'_>) -> String {
    const SHOWN: usize = 40;
    let quote = |bytes: &[u8]| {
        let start = &bytes[..bytes.len().min(SHOWN)];
        let more = if bytes.len() > SHOWN { "…" } else { "" };
        format!("\"{}\"{more} ({} bytes)", start.escape_ascii(), bytes.len())
    };
    match reply {
        Reply::Null => "nothing".to_owned(),
        Reply::Integer(number) => number.to_string(),
        Reply::Bulk(bytes) | Reply::Status(bytes) | Reply::Error(bytes) => quote(bytes),
    }
}

/// What a connection asks for next: a repeatable mixture.
#[derive(Debug)]
pub(super) struct Script {
    random: Random,
    next_piece: u64,
    lengths: RangeInclusive<usize>,
    large: Option<Large>,
    /// Reads that check the writes before them.
    checks: VecDeque<usize>,
}

impl Script {
    pub(super) fn new(config: &Config, connection: usize) -> Self {
        Self {
            random: Random::new(config.seed ^ (connection as u64) << 32),
            next_piece: 1,
            lengths: config.value_length.clone(),
            large: config.large,
            checks: VecDeque::new(),
        }
    }

    /// Out of 100 choices 40 set a value, 20 count, 20 append and 20 read any key; each write is then read.
    pub(super) fn next(&mut self, keys: &Keys) -> Operation {
        if let Some(key) = self.checks.pop_front() {
            return Operation::Get(key);
        }
        let operation = match self.random.below(100) {
            0..40 => {
                let key = self.random.below(VALUES);
                Operation::Set(key, self.piece(keys, true))
            }
            40..60 => Operation::Increment(VALUES + self.random.below(COUNTERS)),
            60..80 => {
                let key = VALUES + COUNTERS + self.random.below(LOGS);
                let piece = self.piece(keys, false);
                match &keys.states[key] {
                    State::Text(pieces)
                        if pieces.iter().map(|piece| piece.length).sum::<usize>() > LONGEST_LOG =>
                    {
                        Operation::Set(key, piece)
                    }
                    _ => Operation::Append(key, piece),
                }
            }
            _ => return Operation::Get(self.random.below(KEYS)),
        };
        match operation {
            Operation::Set(key, _) | Operation::Increment(key) | Operation::Append(key, _) => {
                self.checks.push_back(key);
            }
            Operation::Get(_) => {}
        }
        operation
    }

    fn piece(&mut self, keys: &Keys, may_be_large: bool) -> Piece {
        let number = self.next_piece;
        self.next_piece += 1;
        let span = self.lengths.end() - self.lengths.start() + 1;
        let drawn = self.lengths.start() + self.random.below(span);
        let length = match self.large {
            Some(large) if may_be_large && number.is_multiple_of(large.every.into()) => {
                large.length
            }
            _ => drawn,
        };
        Piece {
            number,
            length: length.max(keys.label(number)),
        }
    }
}

/// Marsaglia's xorshift64: repeatable and plenty for choosing requests.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Spread the seed, so that neighbours differ at once; the state must not be zero.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(number: u64, length: usize) -> Piece {
        Piece { number, length }
    }

    fn text(keys: &Keys, pieces: &[Piece]) -> Vec<u8> {
        let mut text = Vec::new();
        for piece in pieces {
            keys.write_piece(*piece, &mut text);
        }
        text
    }

    #[test]
    fn pieces_are_as_long_as_said_and_all_different() {
        let keys = Keys::new(7, 3);
        let one = text(&keys, &[piece(1, 64)]);
        assert_eq!(one.len(), 64);
        assert!(one.starts_with(b"<7:3:1>"));
        assert_ne!(one, text(&keys, &[piece(2, 64)]));
        assert_ne!(one, text(&Keys::new(7, 4), &[piece(1, 64)]));
        assert_eq!(keys.label(1), 7);
    }

    #[test]
    fn reads_are_checked_against_acknowledged_writes() {
        let mut keys = Keys::new(1, 0);
        assert_eq!(keys.settle(Operation::Get(0), Reply::Null), Verdict::Read);
        let set = Operation::Set(0, piece(1, 50));
        assert_eq!(keys.settle(set, Reply::Status(b"OK")), Verdict::Written);
        let right = text(&keys, &[piece(1, 50)]);
        assert_eq!(
            keys.settle(Operation::Get(0), Reply::Bulk(&right)),
            Verdict::Read
        );

        let mut changed = right.clone();
        changed[49] ^= 1;
        for found in [
            Reply::Bulk(&changed),
            Reply::Bulk(&right[..49]),
            Reply::Null,
        ] {
            let mut keys = Keys::new(1, 0);
            keys.settle(set, Reply::Status(b"OK"));
            let Verdict::Wrong(wrong) = keys.settle(Operation::Get(0), found) else {
                panic!("{found:?} was taken");
            };
            assert_eq!(wrong.lost, 1);
            assert!(wrong.words.contains("doppel:1:0:value:0"), "{wrong:?}");
            // It is counted once.
            assert_eq!(keys.settle(Operation::Get(0), Reply::Null), Verdict::Read);
        }
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let mut keys = Keys::new(1, 0);
        let verdict = keys.settle(Operation::Set(0, piece(1, 50)), Reply::Error(b"OOM no"));
        assert_eq!(verdict, Verdict::Refused("OOM no".to_owned()));
        assert_eq!(keys.settle(Operation::Get(0), Reply::Null), Verdict::Read);
        assert!(matches!(
            keys.settle(Operation::Get(0), Reply::Integer(1)),
            Verdict::Nonsense(_)
        ));
    }

    #[test]
    fn counters_and_logs_say_how_much_is_missing() {
        let mut keys = Keys::new(1, 0);
        let (counter, log) = (VALUES, VALUES + COUNTERS);
        for number in 1..=5 {
            let verdict = keys.settle(Operation::Increment(counter), Reply::Integer(number));
            assert_eq!(verdict, Verdict::Written);
        }
        let verdict = keys.settle(Operation::Increment(counter), Reply::Integer(3));
        assert!(matches!(verdict, Verdict::Wrong(Wrong { lost: 3, .. })));
        let verdict = keys.settle(Operation::Increment(counter), Reply::Integer(9));
        assert!(matches!(verdict, Verdict::Wrong(Wrong { lost: 1, .. })));

        let pieces = [piece(1, 20), piece(2, 30), piece(3, 40)];
        let mut length = 0;
        for piece in pieces {
            length += piece.length as i64;
            let verdict = keys.settle(Operation::Append(log, piece), Reply::Integer(length));
            assert_eq!(verdict, Verdict::Written);
        }
        let short = text(&keys, &pieces[..1]);
        let allowed = keys.allowed(log, std::iter::empty());
        let wrong = keys.compare(log, &allowed, Some(&short)).unwrap();
        assert_eq!(wrong.lost, 2);
        let verdict = keys.settle(Operation::Append(log, piece(4, 20)), Reply::Integer(50));
        assert!(matches!(verdict, Verdict::Wrong(Wrong { lost: 1, .. })));
    }

    #[test]
    fn outstanding_writes_may_have_happened_or_not_but_in_order() {
        let mut keys = Keys::new(1, 0);
        let log = VALUES + COUNTERS;
        let [first, second, third] = [piece(1, 20), piece(2, 20), piece(3, 20)];
        keys.settle(Operation::Append(log, first), Reply::Integer(20));
        let outstanding = [
            Operation::Append(log, second),
            Operation::Get(log),
            Operation::Append(log, third),
        ];
        let allowed = keys.allowed(log, outstanding.into_iter());
        for right in [&[first][..], &[first, second], &[first, second, third]] {
            let found = text(&keys, right);
            assert_eq!(keys.compare(log, &allowed, Some(&found)), None);
        }
        for wrong in [&[second][..], &[first, third], &[]] {
            let found = text(&keys, wrong);
            assert!(keys.compare(log, &allowed, Some(&found)).is_some());
        }
    }

    #[test]
    fn the_script_repeats_itself_and_reads_what_it_wrote() {
        let config = Config::new("127.0.0.1:1".parse().unwrap(), 5);
        let run = || {
            let mut script = Script::new(&config, 2);
            let keys = Keys::new(5, 2);
            (0..1000).map(|_| script.next(&keys)).collect::<Vec<_>>()
        };
        let operations = run();
        assert_eq!(operations, run());
        for pair in operations.windows(2) {
            if let Operation::Set(key, _) | Operation::Increment(key) | Operation::Append(key, _) =
                pair[0]
            {
                assert_eq!(pair[1], Operation::Get(key));
            }
        }
        let count = |kind: fn(&Operation) -> bool| operations.iter().filter(|o| kind(o)).count();
        assert!(count(|o| matches!(o, Operation::Set(..))) > 150);
        assert!(count(|o| matches!(o, Operation::Increment(_))) > 50);
        assert!(count(|o| matches!(o, Operation::Append(..))) > 50);
    }
}
