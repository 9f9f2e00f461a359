//! The way out: the gate and the world behind it, shared by the vCPU thread, which makes outputs, and the I/O thread, which
//! lets them out when a commit, or room on the way out, comes later.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rdma_log::Seq;

use crate::event::Output;
use crate::gate::{Committed, Gate, Sent};
use crate::orders::Samples;
use crate::world::World;

/// Bytes of frames that may wait to leave. Beyond it a new frame is lost, as in a network card whose queue is full: a guest that
/// sends more than the way out takes must not use up the host's memory. It is two exits' worth of the most that a guest can send
/// at one, and far more than a way out that works ever holds.
pub(crate) const FRAMES_WAITING: usize = 32 << 20;

/// How long the way out may be full before what waits for it is lost, as in a network card whose cable is stuck. It must not hold up
/// the console and the power switch, which wait behind the frames, for ever; a peer that only pauses is no slower than this.
const STUCK: Duration = Duration::from_secs(1);

/// The gate, shared with the I/O thread, which opens it when a commit or a way out comes later.
#[derive(Clone)]
pub struct Outlet {
    inner: Arc<Mutex<OutletState>>,
}

struct OutletState {
    gate: Gate<Output>,
    world: Box<dyn World>,
    power_off: bool,
    /// Bytes of the frames in the gate.
    frame_bytes: usize,
    /// Since when the way out is full.
    full_since: Option<Instant>,
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

/// Bytes of a frame; 0 for what is none, which is never lost.
pub(crate) fn frame_length(output: &Output) -> usize {
    match output {
        Output::Frame(bytes) => bytes.len(),
        Output::Console(_) | Output::PowerOff(_) | Output::Disk(_) => 0,
    }
}

/// Bytes of an output, whatever it is.
fn length(output: &Output) -> usize {
    match output {
        Output::Frame(bytes) | Output::Console(bytes) => bytes.len(),
        Output::PowerOff(_) | Output::Disk(_) => 0,
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
                frame_bytes: 0,
                full_since: None,
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
        Self::release_from(&mut self.lock(), committed)
    }

    fn release_from(state: &mut OutletState, committed: Committed) -> Seq {
        state.note(committed);
        let OutletState {
            gate,
            world,
            power_off,
            frame_bytes,
            full_since,
            committed,
            samples,
            ..
        } = state;
        let committed = *committed;
        gate.release(committed, |output| {
            *power_off |= matches!(output, Output::PowerOff(_));
            match world.send(output) {
                // The console's way out is another.
                Sent::Done if frame_length(output) > 0 => *full_since = None,
                Sent::Done => {}
                Sent::Busy => {
                    if full_since.get_or_insert_with(Instant::now).elapsed() < STUCK {
                        return Sent::Busy;
                    }
                }
            }
            *frame_bytes -= frame_length(output);
            if let Some(samples) = samples {
                samples.meter().left(length(output));
            }
            Sent::Done
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
        // Under one lock: a new log may begin, of which nothing has committed.
        let mut state = self.lock();
        let committed = state.committed;
        Self::release_from(&mut state, committed);
    }

    /// Holds an output for later; a frame beyond [`FRAMES_WAITING`] is lost.
    pub fn hold(&self, events: Seq, inputs: Seq, output: Output) {
        let mut state = self.lock();
        let bytes = frame_length(&output);
        if bytes > 0 && state.frame_bytes + bytes > FRAMES_WAITING {
            return;
        }
        state.frame_bytes += bytes;
        state.gate.hold(events, inputs, output);
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

    /// Takes nothing.
    struct Full;

    impl World for Full {
        fn send(&mut self, output: &Output) -> Sent {
            match output {
                Output::Frame(_) => Sent::Busy,
                _ => Sent::Done,
            }
        }
    }

    #[test]
    fn frames_that_nobody_takes_use_bounded_memory_and_console_bytes_are_kept() {
        let outlet = Outlet::new(Gate::new(), Box::new(Full));
        let frame = || Output::Frame(vec![0; 1 << 20]);
        for seq in 1..=100 {
            outlet.hold(Seq(seq), Seq::ZERO, frame());
            outlet.hold(Seq(seq), Seq::ZERO, Output::Console(vec![1]));
            outlet.release(Committed::EVERYTHING);
        }
        assert_eq!(outlet.waiting(), 100 + (FRAMES_WAITING >> 20));
        assert!(outlet.is_blocked());
        // A way out that stays full loses frames, so that what stands behind them leaves.
        outlet.lock().full_since = Instant::now().checked_sub(STUCK);
        outlet.release(Committed::EVERYTHING);
        assert_eq!(outlet.waiting(), 0);
        outlet.hold(Seq(101), Seq::ZERO, frame());
        // What has left makes room again.
        outlet.lock().world = Box::new(Count(Arc::default()));
        outlet.release(Committed::EVERYTHING);
        outlet.hold(Seq(102), Seq::ZERO, frame());
        assert_eq!((outlet.waiting(), outlet.lock().full_since), (1, None));
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
