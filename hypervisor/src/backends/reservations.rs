//! Who writes a disk that both sides of a pair have, as the disk itself keeps it: a process's part in its persistent reservations.
//!
//! ```text
//!  a start:  hold ── by an heir's key of whoever the mark names ──▶ Holds ── the mark names this process: settle ──▶ by its own key
//!  a backup: follow ── an heir's key of its primary ──▶ Registered ── take: the primary's own key is preempted ──▶ Holds
//!                                                                     ── the mark names this process: settle ──▶ by its own key
//!  a holder: preempted ──▶ its writes fail, what it had under way is aborted;   release ──▶ nobody holds
//! ```
//! The disk is reserved *write exclusive*: only its holder writes, everybody reads, and whoever is no more than registered does neither more nor less than
//! a stranger. A registration is of a host's way to the disk, a key of a process.
//!
//! A take-over is a compare-and-swap: it succeeds only against the very primary that was followed, so that one which comes too late takes nothing from
//! whoever has the disk by then. And whoever holds the disk, at each point at which processes can die, has a key that follows from
//! what the mark says there, so that the machine's next start finds it: the own key of the process that the mark names, or a key of that one's heirs.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::block::{Registry, ReservationError};
use crate::protocol::Identity;

/// Keys of an heir. Two, so that one which starts can take the disk from another that died as it started.
const HEIRS: [u64; 2] = [1, 2];

/// A process's part in a disk's reservations; the drawing above.
#[derive(Debug)]
pub struct Reservations<R> {
    registry: R,
    own: u64,
    /// That by which this way is registered.
    key: u64,
}

/// A process's own key, which is never none.
fn own_key(identity: Identity) -> u64 {
    key(identity, 0)
}

fn key(identity: Identity, which: u64) -> u64 {
    xxh3_64_with_seed(&identity.to_bytes(), which).max(1)
}

impl<R: Registry> Reservations<R> {
    /// Of this process; nothing is done yet.
    #[must_use]
    pub fn new(registry: R, me: Identity) -> Self {
        let own = own_key(me);
        Self {
            registry,
            own,
            key: own,
        }
    }

    /// Whether the disk has any; nothing changes.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn usable(&mut self) -> Result<(), ReservationError> {
        self.registry.usable()
    }

    fn register(&mut self, key: u64) -> Result<(), ReservationError> {
        self.registry.register(key)?;
        self.key = key;
        Ok(())
    }

    /// A machine is started: nobody else writes from now on. Whoever the mark and the arbiter name is known to be gone: `before`, whom the mark names now first.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if somebody has it who is none of these.
    pub fn hold(&mut self, before: &[Identity]) -> Result<(), ReservationError> {
        let nobody = Identity::from_bytes([0; 16]);
        let named = before.first().copied().unwrap_or(nobody);
        for heir in HEIRS {
            self.register(key(named, heir))?;
            if self.holds()? {
                return Ok(());
            }
            let gone = before.iter().chain([&named]);
            let keys = gone.flat_map(|gone| [0, HEIRS[0], HEIRS[1]].map(|which| key(*gone, which)));
            for victim in keys {
                if victim != self.key && self.preempts(victim)? {
                    return Ok(());
                }
            }
        }
        Err(ReservationError::Conflict)
    }

    /// This process can take it from its primary from now on.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn follow(&mut self, primary: Identity) -> Result<(), ReservationError> {
        self.register(key(primary, HEIRS[0]))
    }

    /// The primary that was followed writes no more, and this process may.
    ///
    /// # Errors
    /// [`ReservationError`]: nothing is known of the old one then.
    pub fn take(&mut self, from: Identity) -> Result<(), ReservationError> {
        match self.preempts(own_key(from))? {
            true => Ok(()),
            false => Err(ReservationError::Conflict),
        }
    }

    /// Whether the disk is this way's now, and was the victim's: one that was only registered has nothing to be taken.
    fn preempts(&mut self, victim: u64) -> Result<bool, ReservationError> {
        match self.registry.preempt(self.key, victim) {
            Ok(()) => self.holds(),
            Err(ReservationError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The mark names this process now, which has the disk: by its own key from now on.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn settle(&mut self) -> Result<(), ReservationError> {
        self.register(self.own)
    }

    /// Whether nobody else writes. If nobody at all has it, and this way is registered, it is this one's by that.
    ///
    /// # Errors
    /// [`ReservationError`], if the disk does not say.
    pub fn holds(&mut self) -> Result<bool, ReservationError> {
        match self.registry.reserve(self.key) {
            Ok(()) => Ok(true),
            Err(ReservationError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Nothing of this process is left.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn release(&mut self) -> Result<(), ReservationError> {
        match self.registry.release(self.key) {
            // It is another's by now.
            Ok(()) | Err(ReservationError::Conflict) => self.registry.register(0),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
