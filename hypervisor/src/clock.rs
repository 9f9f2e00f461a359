//! The guest's clock on the host side: it is read here, logged, and handed to the guest as an input.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

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

    /// Guest time now.
    #[must_use]
    pub fn now(&self) -> GuestTime {
        GuestTime(self.reads.0 + self.at.elapsed().as_nanos() as u64)
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
