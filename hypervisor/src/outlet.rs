//! The way out: the gate and the world behind it, shared by the vCPU thread, which makes outputs, and the I/O thread, which
//! lets them out when a commit, or room on the way out, comes later.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rdma_log::Seq;
use rdma_log::locks::lock;

use crate::backends::disk::Disk;
use crate::disk::Request;
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
    /// What is asked of a disk that both sides share: an output like any other, that no stuck network may hold up.
    requests: Gate<Request>,
    shared: Option<Arc<Disk>>,
    power_off: bool,
    /// Bytes of the frames in the gate.
    frame_bytes: usize,
    /// Since when the way out is full.
    full_since: Option<Instant>,
    committed: Committed,
    /// Entries with outputs that have not committed yet, and when those were made.
    made: VecDeque<(Committed, Instant)>,
    /// Entries with outputs of which none waits, as all are asked of a disk of this side's own, until they have committed with what they apply.
    asked: VecDeque<Committed>,
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
        while let Some(needs) = self.asked.front()
            && needs.events <= self.committed.events
            && needs.inputs <= self.committed.inputs
        {
            self.asked.pop_front();
        }
    }

    /// The highest entry whose outputs have all left: none whose staged inputs have not committed, so that a backup that lacks one of those knows it
    /// for damaged.
    fn released(&self) -> Seq {
        let released = self.gate.released(self.committed.events);
        match self.asked.front() {
            Some(needs) => released.min(Seq(needs.events.0.saturating_sub(1))),
            None => released,
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
                requests: if gate.is_shut() {
                    Gate::new_shut()
                } else {
                    Gate::new()
                },
                gate,
                world,
                shared: None,
                power_off: false,
                frame_bytes: 0,
                full_since: None,
                committed: Committed {
                    events: Seq::ZERO,
                    inputs: Seq::ZERO,
                },
                made: VecDeque::with_capacity(256),
                asked: VecDeque::new(),
                samples: None,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, OutletState> {
        lock(&self.inner)
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
            requests,
            shared,
            power_off,
            frame_bytes,
            full_since,
            committed,
            samples,
            ..
        } = state;
        let committed = *committed;
        // The disk first: a machine that is off has asked for all.
        requests.release(committed, |request| {
            if let Some(disk) = shared {
                disk.serve(request.clone());
            }
            Sent::Done
        });
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
        state.released()
    }

    /// A new log begins, and nothing of it has committed.
    pub fn begin_log(&self) {
        let mut state = self.lock();
        state.gate.begin_log();
        state.requests.begin_log();
        state.made.clear();
        state.asked.clear();
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

    /// From now on requests that [wait](Self::hold_request) go to this disk.
    pub fn lead_to(&self, shared: Arc<Disk>) {
        self.lock().shared = Some(shared);
    }

    /// Holds a request to a shared disk for later.
    pub fn hold_request(&self, events: Seq, inputs: Seq, request: Request) {
        self.lock().requests.hold(events, inputs, request);
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

    /// An entry of which nothing waits, as all that came of it was asked of a disk of this side's own, commits with these.
    pub(crate) fn asked(&self, events: Seq, inputs: Seq) {
        let mut state = self.lock();
        state.asked.push_back(Committed { events, inputs });
    }

    /// The highest entry whose outputs have all left, by what is known of commits.
    pub(crate) fn released(&self) -> Seq {
        self.lock().released()
    }

    /// Lets nothing out.
    pub fn shut(&self) {
        let mut state = self.lock();
        state.gate.shut();
        state.requests.shut();
    }

    /// Lets committed outputs out, from the next release on.
    pub fn open(&self) {
        let mut state = self.lock();
        state.gate.open();
        state.requests.open();
    }

    /// Whether an output found the way out full.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.lock().gate.is_blocked()
    }

    /// Outputs that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let state = self.lock();
        state.gate.waiting() + state.requests.waiting()
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

    /// A backup over RDMA that lacks an input asks this number whether the input had committed.
    #[test]
    fn what_a_disk_was_asked_counts_as_left_only_with_the_inputs_that_led_to_it() {
        let outlet = Outlet::new(Gate::new(), Box::new(Count(Arc::default())));
        outlet.asked(Seq(3), Seq(7));
        // The entry has committed, and the frame that it applies has not.
        assert_eq!(outlet.release(committed(5, 6)), Seq(2));
        assert_eq!(outlet.released(), Seq(2));
        assert_eq!(outlet.release(committed(5, 7)), Seq(5));
        outlet.asked(Seq(6), Seq(8));
        outlet.begin_log();
        assert_eq!(outlet.release(committed(1, 0)), Seq(1), "a log of its own");
    }

    /// An image that tells what was written, in order.
    struct Told(std::sync::mpsc::Sender<u64>);

    impl crate::backends::disk::Image for Told {
        fn read(&mut self, _: &mut [u8], _: u64) -> std::io::Result<()> {
            Ok(())
        }

        fn write(&mut self, _: &[u8], at: u64) -> std::io::Result<()> {
            self.0.send(at).map_err(std::io::Error::other)
        }

        fn sync(&mut self) -> std::io::Result<()> {
            Ok(())
        }

        fn mark(&mut self, _: &crate::backends::disk::mark::Mark) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_shared_disk_gets_what_has_committed_and_a_full_network_does_not_hold_it_up() {
        use crate::disk::{Data, Operation, RequestNumber, SECTOR};
        let outlet = Outlet::new(Gate::new(), Box::new(Full));
        let (tell, told) = std::sync::mpsc::channel();
        let off = crate::config::Sandbox {
            enabled: false,
            strict: false,
        };
        let sandbox = crate::sandbox::Sandbox::prepare(&off).unwrap();
        let wake = Arc::new(crate::backends::wait::Wake::new().unwrap());
        let disk = Arc::new(Disk::start(Told(tell), "m", wake, sandbox).unwrap());
        outlet.lead_to(Arc::clone(&disk));
        let ask = |seq: u64, inputs: u64| {
            let request = Request {
                number: RequestNumber(seq),
                operation: Operation::Write {
                    sector: seq,
                    data: Data(vec![0; 512]),
                    durable: false,
                },
            };
            outlet.hold_request(Seq(seq), Seq(inputs), request);
        };
        let written = || {
            disk.settle().unwrap();
            told.try_iter().map(|at| at / SECTOR).collect::<Vec<_>>()
        };
        outlet.hold(Seq(1), Seq::ZERO, Output::Frame(vec![0; 60]));
        for (seq, inputs) in [(1, 0), (2, 0), (3, 5), (4, 5)] {
            ask(seq, inputs);
        }
        outlet.release(committed(0, 4));
        assert_eq!((written(), outlet.waiting()), (vec![], 5));
        // The guest was told of something that the other side has not yet.
        outlet.release(committed(3, 4));
        assert_eq!((written(), outlet.waiting()), (vec![1, 2], 3));
        outlet.shut();
        outlet.release(committed(3, 5));
        assert!(written().is_empty(), "somebody else may have it");
        outlet.open();
        outlet.release(committed(3, 5));
        assert_eq!(written(), [3]);
        // What was made before a log is known to whoever begins it.
        outlet.begin_log();
        outlet.release(committed(0, 0));
        assert_eq!((written(), outlet.waiting()), (vec![4], 1));
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
