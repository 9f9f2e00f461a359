//! A Linux guest that computes without end, prepared and protected by replay (issue 7, point 4): what [`linux_busy`] shows of one by checkpoints.
#![forbid(unsafe_code)]

use std::time::Duration;

use hypervisor::intervals::Replication;

use super::linux_busy::{self, Way};
use crate::promise::Promise;

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-busy-replay",
    line: "a prepared Linux guest that computes without end, protected by replay, answers pings within 50 ms of what it does unprotected (medians); its clock keeps pace and never runs backwards, over the loss of its host too (full: for an hour)",
    short: Duration::from_secs(180),
    full: Duration::from_secs(4500),
    show: |run| linux_busy::by(&PREPARED, run),
};

const PREPARED: Way = Way {
    name: "replay",
    replicate: Replication::Replay,
    prepared: true,
    // Who takes over goes on with it.
    options: &["--preempt", "checkpoint"],
    of_sides: &[],
};

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
