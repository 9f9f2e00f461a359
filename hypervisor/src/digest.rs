//! What is compared at every exit: the exit itself and the registers, folded into one rolling hash.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;

use kvm_bindings::kvm_regs;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::kvm::Exit;
use crate::position::Position;

/// The rolling hash over all exits since the guest started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

const REGISTERS: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
];
const WORDS: usize = 4 + REGISTERS.len();

/// One exit as both sides must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    words: [u64; WORDS],
}

impl ExitRecord {
    /// Bytes of the encoded form.
    pub const SIZE: usize = WORDS * 8;

    /// The record of an exit; `data` are the bytes a guest wrote (empty for a read).
    #[must_use]
    pub fn new(position: Position, exit: Exit, data: &[u8], regs: &kvm_regs) -> Self {
        let (kind, address) = match exit {
            Exit::Port {
                port,
                size,
                count,
                write,
            } => (
                1 | u64::from(write) << 8 | u64::from(size) << 16 | u64::from(count) << 32,
                u64::from(port),
            ),
            Exit::Mmio {
                address,
                size,
                write,
            } => (2 | u64::from(write) << 8 | u64::from(size) << 16, address),
            Exit::Hlt => (3, 0),
            Exit::ReadMsr { index } => (4, u64::from(index)),
            Exit::WriteMsr { index, .. } => (5, u64::from(index)),
            Exit::Shutdown => (6, 0),
            Exit::Interrupted | Exit::Debug => (0, 0),
        };
        let written = match exit {
            Exit::WriteMsr { value, .. } => value,
            _ if data.len() <= 8 => {
                let mut bytes = [0; 8];
                bytes[..data.len()].copy_from_slice(data);
                u64::from_le_bytes(bytes)
            }
            _ => xxh3_64_with_seed(data, 0),
        };
        let r = regs;
        Self {
            words: [
                position.0, kind, address, written, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi,
                r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rip,
                r.rflags,
            ],
        }
    }

    /// Where it happened.
    #[must_use]
    pub fn position(&self) -> Position {
        Position(self.words[0])
    }

    /// Little-endian bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The record of these bytes, if there are exactly enough.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::SIZE {
            return None;
        }
        let mut words = [0; WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        Some(Self { words })
    }

    /// The digest after this exit.
    #[must_use]
    pub fn fold(&self, before: Digest) -> Digest {
        Digest(xxh3_64_with_seed(&self.to_bytes(), before.0))
    }

    /// The first field in which two records differ: its name, what `self` (expected) and `found` have there.
    #[must_use]
    pub fn first_difference(&self, found: &Self) -> Option<Difference> {
        let at = (0..WORDS).find(|&i| self.words[i] != found.words[i])?;
        let field = match at {
            0 => "position",
            1 => "exit kind",
            2 => "address",
            3 => "data",
            register => REGISTERS[register - 4],
        };
        let show = |record: &Self| match at {
            1 => record.kind(),
            0 => record.words[0].to_string(),
            _ => format!("{:#x}", record.words[at]),
        };
        Some(Difference {
            field,
            expected: show(self),
            found: show(found),
        })
    }

    fn kind(&self) -> String {
        let (kind, write, size) = (
            self.words[1] & 0xff,
            self.words[1] >> 8 & 1,
            self.words[1] >> 16 & 0xff,
        );
        let way = if write == 1 { "write" } else { "read" };
        match kind {
            1 => format!("port {way} of {size} x {}", self.words[1] >> 32),
            2 => format!("MMIO {way} of {size}"),
            3 => "HLT".into(),
            4 => "RDMSR".into(),
            5 => "WRMSR".into(),
            6 => "shutdown".into(),
            other => format!("kind {other}"),
        }
    }
}

impl fmt::Display for ExitRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exit {}: {} at {:#x}, data {:#x}",
            self.words[0],
            self.kind(),
            self.words[2],
            self.words[3]
        )?;
        for (name, value) in REGISTERS.iter().zip(&self.words[4..]) {
            write!(f, " {name}={value:#x}")?;
        }
        Ok(())
    }
}

/// One differing field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The field's name.
    pub field: &'static str,
    /// What the log says.
    pub expected: String,
    /// What this execution did.
    pub found: String,
}

/// The most recent exits, so that a mismatch can be named exactly.
#[derive(Debug, Default)]
pub struct History {
    recent: VecDeque<ExitRecord>,
}

impl History {
    /// Exits that are kept: enough to reach back over the longest folding seen (a guest's start-up makes some hundred
    /// exits without an input), at 176 bytes each.
    const KEPT: usize = 1024;

    /// Adds an exit and forgets the oldest beyond what is kept.
    pub fn push(&mut self, record: ExitRecord) {
        if self.recent.len() == Self::KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(record);
    }

    /// Oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &ExitRecord> {
        self.recent.iter()
    }

    /// The exit at a position, if it is still kept.
    #[must_use]
    pub fn at(&self, position: Position) -> Option<&ExitRecord> {
        let first = self.recent.front()?.position().0;
        self.recent
            .get(usize::try_from(position.0.checked_sub(first)?).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(position: u64, rcx: u64) -> ExitRecord {
        let regs = kvm_regs {
            rcx,
            ..Default::default()
        };
        let exit = Exit::Port {
            port: 0x3f8,
            size: 1,
            count: 1,
            write: true,
        };
        ExitRecord::new(Position(position), exit, b"x", &regs)
    }

    #[test]
    fn names_the_first_field_that_differs() {
        assert_eq!(record(7, 1).first_difference(&record(7, 1)), None);
        let difference = record(7, 1).first_difference(&record(7, 3)).unwrap();
        assert_eq!(
            (difference.field, &*difference.expected, &*difference.found),
            ("rcx", "0x1", "0x3")
        );
    }

    #[test]
    fn every_word_counts_in_the_digest() {
        let base = record(1, 2);
        let before = Digest(9);
        for bit in 0..ExitRecord::SIZE * 8 {
            let mut bytes = base.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let changed = ExitRecord::from_bytes(&bytes).unwrap();
            assert_ne!(base.fold(before), changed.fold(before), "bit {bit}");
        }
    }

    #[test]
    fn history_finds_by_position_and_forgets_the_oldest() {
        let mut history = History::default();
        for position in 1..=2000 {
            history.push(record(position, 0));
        }
        assert_eq!(
            history.at(Position(2000)).unwrap().position(),
            Position(2000)
        );
        assert_eq!(history.at(Position(977)).unwrap().position(), Position(977));
        assert!(history.at(Position(976)).is_none());
        assert!(history.at(Position(2001)).is_none());
    }
}
