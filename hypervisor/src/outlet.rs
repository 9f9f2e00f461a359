//! The way out: the gate and the world behind it, shared by the vCPU thread, which makes outputs, and the I/O thread, which
//! lets them out when a commit, or room on the way out, comes later.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use rdma_log::Seq;

use crate::event::Output;
use crate::gate::{Committed, Gate};
use crate::orders::Samples;
use crate::world::World;

/// The gate, shared with the I/O thread, which opens it when a commit or a way out comes later.
#[derive(Clone)]
pub struct Outlet {
    inner: Arc<Mutex<OutletState>>,
}

struct OutletState {
    gate: Gate<Output>,
    world: Box<dyn World>,
    power_off: bool,
    committed: Committed,
    /// Entries with outputs that have not committed yet, and when those were made.
    made: VecDeque<(Committed, Instant)>,
    samples: Option<Arc<Samples>>,
}

impl OutletState {
    fn note(&mut self, committed: Committed) {
        self.committed.events = self.committed.events.max(committed.events);
        self.committed.inputs = self.committed.inputs.max(committed.inputs);
        while let Some((needs, made)) = self.made.front()
            && needs.events <= self.committed.events
            && needs.inputs <= self.committed.inputs
        {
            if let Some(samples) = &self.samples {
                samples.commit(made.elapsed());
            }
            self.made.pop_front();
        }
    }
}

impl Outlet {
    /// An outlet to this world, through this gate.
    #[must_use]
    pub fn new(gate: Gate<Output>, world: Box<dyn World>) -> Self {
        Self {
            inner: Arc::new(Mutex::new(OutletState {
                gate,
                world,
                power_off: false,
                committed: Committed {
                    events: Seq::ZERO,
                    inputs: Seq::ZERO,
                },
                made: VecDeque::with_capacity(256),
                samples: None,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, OutletState> {
        // A holder that panicked ends the process; there is nothing half-done that a reader could trust less.
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Releases what has committed; returns the highest entry whose outputs have all left.
    pub fn release(&self, committed: Committed) -> Seq {
        let mut state = self.lock();
        state.note(committed);
        let OutletState {
            gate,
            world,
            power_off,
            committed,
            ..
        } = &mut *state;
        let committed = *committed;
        gate.release(committed, |output| {
            *power_off |= matches!(output, Output::PowerOff(_));
            world.send(output)
        });
        gate.released(committed.events)
    }

    /// A new log begins, and nothing of it has committed.
    pub fn begin_log(&self) {
        let mut state = self.lock();
        state.gate.begin_log();
        state.made.clear();
        state.committed = Committed {
            events: Seq::ZERO,
            inputs: Seq::ZERO,
        };
    }

    /// Tries again what had committed at the last release and found the way out full.
    pub fn release_again(&self) {
        let committed = self.lock().committed;
        self.release(committed);
    }

    /// Holds an output for later.
    pub fn hold(&self, events: Seq, inputs: Seq, output: Output) {
        self.lock().gate.hold(events, inputs, output);
    }

    /// From now on every entry's time from its making to its commit is taken.
    pub(crate) fn measure(&self, samples: Arc<Samples>) {
        self.lock().samples = Some(samples);
    }

    /// An entry with outputs was made then, and commits with these.
    pub(crate) fn made(&self, events: Seq, inputs: Seq, at: Instant) {
        let needs = Committed { events, inputs };
        self.lock().made.push_back((needs, at));
    }

    /// The highest entry whose outputs have all left, by what is known of commits.
    pub(crate) fn released(&self) -> Seq {
        let state = self.lock();
        state.gate.released(state.committed.events)
    }

    /// Lets nothing out.
    pub fn shut(&self) {
        self.lock().gate.shut();
    }

    /// Lets committed outputs out, from the next release on.
    pub fn open(&self) {
        self.lock().gate.open();
    }

    /// Whether an output found the way out full.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.lock().gate.is_blocked()
    }

    /// Outputs that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().gate.waiting()
    }

    /// Whether the guest's power-off has left.
    #[must_use]
    pub fn powered_off(&self) -> bool {
        self.lock().power_off
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Sent;

    /// Takes everything and counts it.
    struct Count(Arc<Mutex<u32>>);

    impl World for Count {
        fn send(&mut self, _: &Output) -> Sent {
            *self.0.lock().unwrap() += 1;
            Sent::Done
        }
    }

    fn committed(events: u64, inputs: u64) -> Committed {
        Committed {
            events: Seq(events),
            inputs: Seq(inputs),
        }
    }

    /// What commits later leaves later and is measured then; an older view of the commits takes nothing back.
    #[test]
    fn a_late_commit_lets_out_and_is_measured_once_its_inputs_have_committed_too() {
        let sent = Arc::new(Mutex::new(0));
        let samples = Arc::new(Samples::default());
        let outlet = Outlet::new(Gate::new(), Box::new(Count(Arc::clone(&sent))));
        outlet.measure(Arc::clone(&samples));
        for seq in [3, 5] {
            outlet.hold(Seq(seq), Seq(7), Output::PowerOff(0));
            outlet.made(Seq(seq), Seq(7), Instant::now());
        }
        assert_eq!(outlet.release(committed(3, 6)), Seq(2));
        assert!(samples.take().is_none() && *sent.lock().unwrap() == 0);
        assert_eq!(outlet.release(committed(4, 7)), Seq(4));
        assert!(samples.take().is_some() && samples.take().is_none());
        assert_eq!((*sent.lock().unwrap(), outlet.waiting()), (1, 1));
        assert_eq!(
            outlet.release(committed(1, 1)),
            Seq(4),
            "nothing is taken back"
        );
        assert_eq!(outlet.released(), Seq(4));
        assert_eq!(outlet.release(committed(5, 7)), Seq(5));
        assert!(samples.take().is_some() && outlet.waiting() == 0);
    }
}
