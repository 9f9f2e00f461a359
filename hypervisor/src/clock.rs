//! The guest's clock on the host side: it is read here, logged, and handed to the guest as an input.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::event::GuestTime;

/// Guest time as a line through one point: local monotonic time from a guest time on.
#[derive(Clone, Copy, Debug)]
pub struct GuestClock {
    at: Instant,
    reads: GuestTime,
}

impl GuestClock {
    /// A clock that reads `reads` at the instant `at`. After a go-live that is the last logged value and the instant its
    /// entry came, so that guest time goes on and never back.
    #[must_use]
    pub fn starting(reads: GuestTime, at: Instant) -> Self {
        Self { at, reads }
    }

    /// The clock of a machine that begins, by whose description it reads 0 when the wall clock reads `wall_clock_ns`. A start
    /// takes its time (a primary waits for its backup), and the guest takes the sum of both for the time of day.
    #[must_use]
    pub fn since(wall_clock_ns: u64) -> Self {
        let age = SystemTime::now()
            .duration_since(UNIX_EPOCH + Duration::from_nanos(wall_clock_ns))
            // The wall clock was set back meanwhile.
            .unwrap_or_default();
        Self::starting(GuestTime(age.as_nanos() as u64), Instant::now())
    }

    /// Guest time now.
    #[must_use]
    pub fn now(&self) -> GuestTime {
        let since = self.at.elapsed().as_nanos() as u64;
        GuestTime(self.reads.0.saturating_add(since))
    }

    /// The instant at which guest time reads `then`; a time before the clock began is when it began.
    #[must_use]
    pub fn when(&self, then: GuestTime) -> Instant {
        self.at + Duration::from_nanos(then.0.saturating_sub(self.reads.0))
    }

    /// How long until guest time reads `then`; zero if it does already.
    #[must_use]
    pub fn until(&self, then: GuestTime) -> Duration {
        Duration::from_nanos(then.0.saturating_sub(self.now().0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_start_does_not_make_the_guest_late() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let since = |wall: Duration| {
            Duration::from_nanos(GuestClock::since(wall.as_nanos() as u64).now().0)
        };
        let waited = Duration::from_secs(5);
        assert!(since(now - waited) >= waited);
        assert!(
            since(now + waited) < waited,
            "a clock that was set back begins at 0"
        );
    }
}
