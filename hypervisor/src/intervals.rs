//! Replication by checkpoints: what is chosen for it, and when a guest that runs is stopped for the end of its interval.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::preempt::Verdict;

/// How a machine is replicated. Both sides must say the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replication {
    /// The log carries what the guest could not have computed, and the backup runs the same guest.
    #[default]
    Replay,
    /// The log carries what the guest has changed, interval by interval, and the backup does not run before it goes live.
    Checkpoint,
}

impl Replication {
    /// Its name in configuration and handshake.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// What ends an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ends {
    /// An output that waits, and at the latest its length.
    #[default]
    Output,
    /// Its length alone.
    Fixed,
}

/// How long intervals are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The longest, or the length of all.
    pub length: Duration,
    /// What ends them.
    pub ends: Ends,
}

/// After a kick that did not end the interval: the courier was not free, or the kick came as the guest left by itself.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// Decides when a guest that runs is kicked because its interval is as long as it may be.
#[derive(Debug, Default)]
pub struct Bound {
    kicked: Option<Instant>,
}

impl Bound {
    /// Looks at a guest that runs, if it does, and whose interval ends then.
    pub fn look(&mut self, now: Instant, ends: Option<Instant>) -> Option<Verdict> {
        let ends = ends?;
        let at = match self.kicked {
            Some(kicked) => ends.max(kicked + KICK_AGAIN),
            None => ends,
        };
        if now < at {
            return Some(Verdict {
                kick: false,
                again: at,
            });
        }
        self.kicked = Some(now);
        Some(Verdict {
            kick: true,
            again: now + KICK_AGAIN,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_kicked_at_its_intervals_end_and_not_all_the_time() {
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        let mut bound = Bound::default();
        assert_eq!(bound.look(at(0), None), None);
        let mut looks = |now, ends| {
            let verdict = bound.look(at(now), Some(at(ends))).unwrap();
            (verdict.kick, (verdict.again - start).as_micros())
        };
        assert_eq!(looks(0, 25_000), (false, 25_000));
        assert_eq!(looks(25_000, 25_000), (true, 26_000));
        assert_eq!(looks(25_010, 25_000), (false, 26_000));
        assert_eq!(looks(26_000, 25_000), (true, 27_000));
        assert_eq!(looks(26_010, 51_000), (false, 51_000));
    }
}
