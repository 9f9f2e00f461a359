//! A stream that is open and passes nothing on.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// How long entries may be under way with no answer to any of them. The reader's landing thread answers what it lands at once, so
/// this is the network's: three retransmissions in a row of one segment (0.2 + 0.4 + 0.8 s) pass within it. Shorter, and a bad
/// network costs the backup; longer, and whoever waits for an output waits longer for somebody to act. Whoever stands between the
/// two sides can hold the stream open and pass nothing on, while heartbeats, which go another way, say that all is well.
const STALLED: Duration = Duration::from_secs(2);

/// A look that comes later than this after the one before is no witness: its own thread did not run.
pub(super) const ABSENT: Duration = Duration::from_millis(500);

/// Since when what is under way has not moved.
#[derive(Debug)]
pub(super) struct Still {
    received: [u64; 2],
    since: Instant,
    looked: Instant,
}

impl Still {
    pub(super) fn new(now: Instant) -> Still {
        Still {
            received: [0; 2],
            since: now,
            looked: now,
        }
    }

    /// Whether nothing has moved for too long.
    pub(super) fn look(&mut self, now: Instant, received: [u64; 2], under_way: bool) -> bool {
        let absent = now - self.looked > ABSENT;
        self.looked = now;
        if absent || !under_way || received != self.received {
            self.received = received;
            self.since = now;
        }
        now - self.since > STALLED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_still_before_somebodys_eyes_is_stalled() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut still = Still::new(start);
        let mut look = |ms, received, under_way| still.look(at(ms), [received, 0], under_way);
        for ms in (0..5000).step_by(100) {
            assert!(!look(ms, 0, false), "nothing is under way");
        }
        for ms in (5000..9000).step_by(100) {
            assert!(!look(ms, ms / 1900, true), "it moves, though slowly");
        }
        assert!(!look(20_000, 4, true), "nobody looked");
        let stalled = (20_000..30_000).step_by(100).find(|&ms| look(ms, 4, true));
        assert_eq!(stalled, Some(22_100));
    }
}
