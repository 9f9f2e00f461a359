//! What a machine's exits were for: how many of each kind.
#![forbid(unsafe_code)]

use crate::devices::{Bus, Purpose};
use crate::kvm::Exit;
use crate::meter::Count;

const KINDS: usize = Purpose::ALL.len();

/// Counts as the machine runs. Whoever adds is alone: the thread of the one vCPU, or the holder of the devices' lock.
#[derive(Debug, Default)]
pub struct Tally([Count; KINDS]);

impl Tally {
    pub(super) fn count(&self, exit: Exit) {
        let purpose = match exit {
            Exit::Port { port, size, .. } => {
                Purpose::of(Bus::Port, u64::from(port), usize::from(size))
            }
            Exit::Mmio { address, size, .. } => Purpose::of(Bus::Mmio, address, usize::from(size)),
            Exit::Hlt => Purpose::Halt,
            Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => Purpose::Register,
            Exit::Shutdown => Purpose::Board,
            Exit::Interrupted | Exit::Debug => return,
        };
        self.0[purpose as usize].add(1);
    }

    /// What it amounts to now.
    #[must_use]
    pub fn read(&self) -> Exits {
        Exits(std::array::from_fn(|kind| self.0[kind].get()))
    }
}

/// Exits by what they were for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits([u64; KINDS]);

impl Exits {
    /// Those of each kind that there were, most first.
    pub fn kinds(&self) -> impl Iterator<Item = (Purpose, u64)> + use<> {
        let mut kinds: Vec<_> = Purpose::ALL.into_iter().zip(self.0).collect();
        kinds.retain(|(_, count)| *count > 0);
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        kinds.into_iter()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_by_what_they_were_for() {
        let tally = Tally::default();
        let read = |port, size| Exit::Port {
            port,
            size,
            count: 1,
            write: false,
        };
        for _ in 0..3 {
            tally.count(read(0x608, 4));
        }
        tally.count(Exit::Hlt);
        tally.count(Exit::Interrupted);
        let exits = tally.read();
        let kinds: Vec<_> = exits.kinds().collect();
        assert_eq!(kinds, [(Purpose::Time, 3), (Purpose::Halt, 1)]);
        assert_eq!(exits.all(), 4);
    }
}
