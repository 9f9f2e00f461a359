//! The gate: holds every output until the entry that produced it has committed, and until we are the live side.
//!
//! ```text
//!  hold(seq, output) ──▶ [ oldest … newest ] ──release(committed)──▶ the world, in order
//!                              ▲ stays shut while `shut`: a backup that is not live yet, a frozen primary
//! ```
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use rdma_log::Seq;

/// How far the log has committed, by lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Highest committed entry of the events lane.
    pub events: Seq,
    /// Highest committed entry of the inputs lane.
    pub inputs: Seq,
}

impl Committed {
    /// Nobody else holds the log, so nothing waits for it: an unprotected machine.
    pub const EVERYTHING: Self = Self {
        events: Seq(u64::MAX),
        inputs: Seq(u64::MAX),
    };
}

/// What became of an output offered to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It left, or was lost as a wire may lose it.
    Done,
    /// The way out is full: offer it again later.
    Busy,
}

#[derive(Debug)]
struct Held<T> {
    events: Seq,
    inputs: Seq,
    output: T,
}

/// Outputs that have not left yet.
#[derive(Debug)]
pub struct Gate<T> {
    held: VecDeque<Held<T>>,
    shut: bool,
    blocked: bool,
    released: Seq,
}

impl<T> Gate<T> {
    /// A gate of a live machine.
    #[must_use]
    pub fn new() -> Self {
        Self {
            held: VecDeque::with_capacity(256),
            shut: false,
            blocked: false,
            released: Seq::ZERO,
        }
    }

    /// A gate that lets nothing out until it is opened.
    #[must_use]
    pub fn new_shut() -> Self {
        Self {
            shut: true,
            ..Self::new()
        }
    }

    /// Whether it lets nothing out.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.shut
    }

    /// Lets nothing out from now on.
    pub fn shut(&mut self) {
        self.shut = true;
    }

    /// Lets committed outputs out again, from the next `release` on.
    pub fn open(&mut self) {
        self.shut = false;
    }

    /// Takes an output that belongs to entry `events` and depends on staged input `inputs`.
    pub fn hold(&mut self, events: Seq, inputs: Seq, output: T) {
        debug_assert!(self.held.back().is_none_or(|last| last.events <= events));
        self.held.push_back(Held {
            events,
            inputs,
            output,
        });
    }

    /// A new log begins. What waits here was made before it and needs no entry of its own.
    pub fn begin_log(&mut self) {
        for held in &mut self.held {
            held.events = Seq::ZERO;
            held.inputs = Seq::ZERO;
        }
        self.released = Seq::ZERO;
    }

    /// How many outputs wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.held.len()
    }

    /// Whether the way out was full when last tried.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Hands every output whose entry has committed to `send`, oldest first; stops at the first that is not committed or that
    /// finds the way out full.
    pub fn release(&mut self, committed: Committed, mut send: impl FnMut(&T) -> Sent) {
        self.blocked = false;
        if self.shut {
            return;
        }
        while let Some(first) = self.held.front() {
            if first.events > committed.events || first.inputs > committed.inputs {
                return;
            }
            if send(&first.output) == Sent::Busy {
                self.blocked = true;
                return;
            }
            let sent = self.held.pop_front().expect("it was there");
            // An entry is released when its last output is.
            if self
                .held
                .front()
                .is_none_or(|next| next.events > sent.events)
            {
                self.released = sent.events;
            }
        }
    }

    /// The highest entry all of whose outputs have left. An entry without outputs is released as it commits.
    #[must_use]
    pub fn released(&self, committed: Seq) -> Seq {
        match self.held.front() {
            Some(first) => Seq(self
                .released
                .0
                .max(committed.0.min(first.events.0.saturating_sub(1)))),
            None => Seq(self.released.0.max(committed.0)),
        }
    }
}

impl<T> Default for Gate<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(events: u64, inputs: u64) -> Committed {
        Committed {
            events: Seq(events),
            inputs: Seq(inputs),
        }
    }

    fn release(gate: &mut Gate<u32>, to: Committed) -> Vec<u32> {
        let mut out = Vec::new();
        gate.release(to, |&output| {
            out.push(output);
            Sent::Done
        });
        out
    }

    #[test]
    fn nothing_leaves_before_its_entry_and_its_inputs_have_committed() {
        let mut gate = Gate::new();
        gate.hold(Seq(1), Seq(0), 10);
        gate.hold(Seq(2), Seq(5), 20);
        gate.hold(Seq(3), Seq(5), 30);
        assert_eq!(release(&mut gate, committed(0, 9)), [0; 0]);
        assert_eq!(release(&mut gate, committed(2, 4)), [10]);
        assert_eq!(gate.released(Seq(2)), Seq(1));
        assert_eq!(release(&mut gate, committed(2, 5)), [20]);
        assert_eq!(release(&mut gate, committed(7, 5)), [30]);
        assert_eq!(gate.released(Seq(7)), Seq(7));
    }

    #[test]
    fn an_entry_counts_as_released_only_with_its_last_output() {
        let mut gate = Gate::new();
        gate.hold(Seq(4), Seq(0), 1);
        gate.hold(Seq(4), Seq(0), 2);
        let mut room = 1;
        gate.release(committed(9, 9), |_| {
            if room == 0 {
                return Sent::Busy;
            }
            room -= 1;
            Sent::Done
        });
        assert!(gate.is_blocked());
        assert_eq!(gate.released(Seq(9)), Seq(3));
        assert_eq!(release(&mut gate, committed(9, 9)), [2]);
        assert_eq!(gate.released(Seq(9)), Seq(9));
    }

    #[test]
    fn a_new_log_starts_from_nothing() {
        let mut gate = Gate::new();
        gate.hold(Seq(70), Seq(9), 1);
        gate.hold(Seq(71), Seq(9), 2);
        let busy = |_: &u32| Sent::Busy;
        gate.release(committed(70, 9), busy);
        gate.begin_log();
        gate.hold(Seq(1), Seq(1), 3);
        assert_eq!(gate.released(Seq(0)), Seq(0));
        assert_eq!(release(&mut gate, committed(0, 0)), [1, 2]);
        assert_eq!(gate.released(Seq(1)), Seq(0));
        assert_eq!(release(&mut gate, committed(1, 1)), [3]);
        assert_eq!(gate.released(Seq(1)), Seq(1));
    }

    #[test]
    fn a_shut_gate_keeps_everything_in_order() {
        let mut gate = Gate::new_shut();
        gate.hold(Seq(1), Seq(0), 1);
        gate.hold(Seq(2), Seq(0), 2);
        assert_eq!(release(&mut gate, Committed::EVERYTHING), [0; 0]);
        gate.open();
        assert_eq!(release(&mut gate, Committed::EVERYTHING), [1, 2]);
    }
}
