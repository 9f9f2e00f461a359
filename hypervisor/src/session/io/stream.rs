//! The I/O thread's part in a log that is a stream: commits come in, and its end.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdma_log::WriteError;
use rdma_log::transport::network::Link;

use super::{Io, Said};
use crate::gate::Committed;

/// The longest between two turns of the log's stream that has nothing to read. It sends what gathers while the guest computes on, which
/// may be as old as this then; shorter, and it goes in as many pieces as there are rounds.
const TURN: Duration = Duration::from_millis(1);

impl Io {
    /// Takes in what the backup answered, and lets out what has committed by it. True when the stream is at its end and nobody
    /// knows why: a fence is told by name.
    ///
    /// What is a system call is done where the descriptor is `ready`, and else now and then ([`TURN`]).
    pub(super) fn turn_log(&mut self, ready: bool) -> bool {
        let Some(watch) = &self.watch else {
            return false;
        };
        let turned = if ready || watch.is_memory() || self.turned_at.elapsed() >= TURN {
            self.turned_at = Instant::now();
            watch.turn()
        } else {
            Ok(())
        };
        let [events, inputs] = watch.counters();
        self.replayed
            .fetch_max(events.replayed.0, Ordering::Relaxed);
        if self.outlet.waiting() > 0 {
            self.outlet.release(Committed {
                events: events.committed,
                inputs: inputs.committed,
            });
        }
        let Err(error) = turned else { return false };
        self.watch = None;
        self.stager.stop();
        if error == WriteError::Fenced {
            self.orders.report_fenced();
            return false;
        }
        self.log_ended(&error, error == WriteError::Closed);
        true
    }

    /// Whether nothing more of the log comes; told once.
    pub(super) fn link_is_broken(&mut self) -> bool {
        let Some(broken) = self.link.as_ref().and_then(Link::broken) else {
            return false;
        };
        self.link = None;
        self.log_ended(&broken.reason, broken.gone);
        true
    }

    fn log_ended(&self, error: &dyn std::fmt::Display, closed: bool) {
        self.reporter.say(&Said::Notice {
            text: format!("the log's connection is over: {error}"),
            loud: !closed,
        });
    }
}
