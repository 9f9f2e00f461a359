//! The courier: carries the checkpoint that ended an interval to the backup, while the guest runs on in the next one.
//!
//! ```text
//!  vCPU thread   │ interval 1 │stop│ interval 2        │stop│ interval 3 …
//!                             └─ parcel 1 ─┐           └─ parcel 2 ─┐
//!  courier                        checksum, parts to the log │          checksum, parts …
//!                                  outputs of interval 1 into the gate, out when the last part has committed
//! ```
//! It tells pages by what has changed in them since they were sent last (`checkpoint/patch.rs`), and says which have not changed: those were left open to
//! the guest for nothing ([`Machine::leave_open`](crate::machine::Machine::leave_open)).
//!
//! It is a thread of its own and owns the log. One parcel is on its way while the next interval's runs: an interval that ends
//! before the one before it has been carried waits. Whatever is wrong with the log it tells the protocol, as the recorder does
//! where there are no intervals, and stands still with what it holds until the vCPU thread, which is told to look
//! ([`Courier::has_failed`]), leaves the log.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdma_log::Seq;
use rdma_log::locks::lock;

use crate::checkpoint::{Capture, PART_BYTES, Remembered, Seal, interval};
use crate::disk::Request;
use crate::entry::{Base, Encoder};
use crate::event::Output;
use crate::memory::PageNumber;
use crate::orders::{Orders, Samples};
use crate::outlet::Outlet;
use crate::position::Position;
use crate::sink::{Sink, SinkError};
use crate::stage::Stage;

/// Longest wait for room in the log, or for a backup that is behind, before the courier looks whether it is called back.
const LOOK: Duration = Duration::from_millis(1);

/// Between two looks at a backup that is behind.
const CATCH_UP: Duration = Duration::from_micros(100);

/// An entry's bytes beside the part that it carries: kind, distance, number, and the mark of the last.
pub(crate) const AROUND_A_PART: usize = 32;

/// The number of outputs that wait for no log: they leave where everything counts as committed.
pub(crate) const AT_ONCE: Seq = Seq(u64::MAX);

/// What an interval came to.
#[derive(Debug)]
pub struct Parcel {
    /// The last sync point.
    pub position: Position,
    /// What the guest has sent in it, in order.
    pub outputs: Vec<Output>,
    /// What it has asked of its disk, in order: done on this side, and to be done on the other.
    pub asked: Vec<Request>,
    /// What it has asked of a shared disk, but for reads: outputs as well.
    pub requests: Vec<Request>,
    /// When it did, once for each exit.
    pub made: Vec<Instant>,
    /// Staged frames that it was given.
    pub frames: u32,
    /// Where it ended. None once it is on its way.
    pub capture: Option<Box<Capture>>,
}

enum Job<S> {
    /// This is the log from now on, in which positions are counted from there.
    Begin(Box<S>, Base),
    Carry(Parcel),
    Leave,
    End,
}

struct Shared<S> {
    jobs: Mutex<VecDeque<Job<S>>>,
    changed: Condvar,
    /// A parcel is on its way.
    busy: AtomicBool,
    /// The log takes nothing more.
    failed: AtomicBool,
    /// Its thread is gone.
    gone: AtomicBool,
    /// The vCPU thread waits for the courier to leave the log.
    recalled: AtomicBool,
    /// The vCPU thread is inside the guest, and wants to know when the courier is free.
    awaited: AtomicBool,
    /// A buffer that a checkpoint was carried in: memory that the kernel need not find anew.
    spare: Mutex<Vec<u8>>,
    /// Pages of the last parcel that need not have been written.
    unwritten: Mutex<Option<Vec<PageNumber>>>,
    stage: Arc<Stage>,
    orders: Arc<Orders>,
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Job<S>>> {
        lock(&self.jobs)
    }

    fn leave_job(&self, job: Job<S>) {
        self.lock().push_back(job);
        self.changed.notify_all();
    }

    /// Makes the vCPU thread look, wherever it is.
    fn call(&self) {
        if self.awaited.swap(false, Ordering::SeqCst) {
            self.orders.kick();
        }
        self.stage.bell().ring();
    }
}

/// The vCPU thread's end.
pub struct Courier<S>(Arc<Shared<S>>);

impl<S> Courier<S> {
    /// A courier without a log yet, and the work that its thread is to do.
    pub fn new(
        stage: &Arc<Stage>,
        orders: &Arc<Orders>,
        outlet: &Outlet,
        samples: &Arc<Samples>,
    ) -> (Self, Work<S>) {
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            changed: Condvar::new(),
            busy: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            recalled: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            spare: Mutex::default(),
            unwritten: Mutex::default(),
            stage: Arc::clone(stage),
            orders: Arc::clone(orders),
        });
        let work = Work {
            shared: Arc::clone(&shared),
            outlet: outlet.clone(),
            samples: Arc::clone(samples),
        };
        (Self(shared), work)
    }

    /// From now on parcels go to this log, in which positions are counted from there. Only when it is free.
    pub fn begin(&self, log: S, base: Base) {
        self.0.leave_job(Job::Begin(Box::new(log), base));
    }

    /// Whether a parcel can be handed over.
    #[must_use]
    pub fn is_free(&self) -> bool {
        !self.0.busy.load(Ordering::Acquire)
    }

    /// A buffer for the next checkpoint.
    #[must_use]
    pub fn spare(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.0.spare))
    }

    /// Pages of the last parcel that need not have been written since they were sent last; none where that is not looked for.
    #[must_use]
    pub fn unwritten(&self) -> Option<Vec<PageNumber>> {
        lock(&self.0.unwritten).take()
    }

    /// Whether the log has come to an end: the protocol was told, and decides.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }

    /// The vCPU thread is about to run the guest, and is to be kicked once the courier is free.
    pub fn await_in_guest(&self) {
        self.0.awaited.store(true, Ordering::SeqCst);
        if self.is_free() || self.has_failed() {
            self.0.call();
        }
    }

    /// Hands over a parcel. Only when it is free.
    pub fn carry(&self, parcel: Parcel) {
        self.0.busy.store(true, Ordering::Release);
        self.0.awaited.store(false, Ordering::SeqCst);
        self.0.leave_job(Job::Carry(parcel));
    }

    /// Leaves the log. The outputs of a parcel that was not carried are in the gate when this returns, and wait for nothing.
    ///
    /// # Panics
    /// If the courier's thread has: with it went the outputs of its parcel.
    pub fn leave(&self) {
        self.0.recalled.store(true, Ordering::SeqCst);
        self.0.leave_job(Job::Leave);
        let mut jobs = self.0.lock();
        while self.0.recalled.load(Ordering::SeqCst) {
            assert!(!self.0.gone.load(Ordering::SeqCst), "the courier is gone");
            jobs = self
                .0
                .changed
                .wait(jobs)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<S> Drop for Courier<S> {
    fn drop(&mut self) {
        self.0.recalled.store(true, Ordering::SeqCst);
        self.0.leave_job(Job::End);
    }
}

/// What the courier's thread does.
pub struct Work<S> {
    shared: Arc<Shared<S>>,
    outlet: Outlet,
    samples: Arc<Samples>,
}

/// Its thread ends, however it does.
struct Last<S>(Arc<Shared<S>>);

impl<S> Drop for Last<S> {
    fn drop(&mut self) {
        self.0.failed.store(true, Ordering::Release);
        // Under the lock, or the one who waits could miss it.
        let jobs = self.0.lock();
        self.0.gone.store(true, Ordering::SeqCst);
        drop(jobs);
        self.0.changed.notify_all();
        self.0.call();
    }
}

/// Why a parcel stays where it is.
enum Undelivered {
    /// The vCPU thread wants the log to be left.
    Recalled,
    /// The log is over.
    Over,
}

struct Log<S> {
    sink: S,
    encoder: Encoder,
    /// What its reader has of pages, where it is told by what has changed in them.
    other: Option<Remembered>,
    /// Carries what is told that way.
    patched: Vec<u8>,
}

impl<S: Sink> Work<S> {
    /// Carries parcels until the vCPU thread's end is gone.
    pub fn run(self) {
        let _last = Last(Arc::clone(&self.shared));
        let mut log: Option<Log<S>> = None;
        let mut held: Option<Parcel> = None;
        loop {
            match self.next_job() {
                Job::Begin(sink, base) => {
                    *lock(&self.shared.unwritten) = None;
                    let encoder = Encoder::from_base(base).speaking(sink.version());
                    log = Some(Log {
                        sink: *sink,
                        encoder,
                        other: None,
                        patched: Vec::new(),
                    });
                }
                Job::Carry(parcel) => held = self.deliver(&mut log, parcel),
                Job::Leave => {
                    log = None;
                    if let Some(parcel) = held.take() {
                        for request in parcel.requests {
                            self.outlet.hold_request(AT_ONCE, Seq::ZERO, request);
                        }
                        for output in parcel.outputs {
                            self.outlet.hold(AT_ONCE, Seq::ZERO, output);
                        }
                    }
                    self.shared.failed.store(false, Ordering::SeqCst);
                    self.shared.busy.store(false, Ordering::SeqCst);
                    // Under the lock, or the one who waits could miss it.
                    let jobs = self.shared.lock();
                    self.shared.recalled.store(false, Ordering::SeqCst);
                    drop(jobs);
                    self.shared.changed.notify_all();
                }
                Job::End => return,
            }
        }
    }

    fn next_job(&self) -> Job<S> {
        let mut jobs = self.shared.lock();
        loop {
            if let Some(job) = jobs.pop_front() {
                return job;
            }
            jobs = self
                .shared
                .changed
                .wait(jobs)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Carries a parcel; what could not be delivered stays here.
    fn deliver(&self, log: &mut Option<Log<S>>, mut parcel: Parcel) -> Option<Parcel> {
        let outcome = match log {
            Some(log) => self.carry(log, &mut parcel),
            None => Err(Undelivered::Over),
        };
        match outcome {
            Ok(()) => {
                self.shared.busy.store(false, Ordering::Release);
                self.shared.call();
                None
            }
            Err(Undelivered::Recalled) => Some(parcel),
            Err(Undelivered::Over) => {
                // Nothing that was made since may leave before it is known who goes on.
                self.outlet.shut();
                self.shared.failed.store(true, Ordering::Release);
                self.shared.awaited.store(true, Ordering::SeqCst);
                self.shared.call();
                Some(parcel)
            }
        }
    }

    fn carry(&self, log: &mut Log<S>, parcel: &mut Parcel) -> Result<(), Undelivered> {
        let Some(mut capture) = parcel.capture.take() else {
            return Err(Undelivered::Over);
        };
        if log.sink.version().patches_pages() {
            let fresh = || Remembered::new(capture.ram_pages());
            let other = log.other.get_or_insert_with(fresh);
            let unwritten = capture.patch(other, &mut log.patched, false);
            *lock(&self.shared.unwritten) = Some(unwritten);
        }
        let [head, contents] = capture.pieces();
        let mut seal = Seal::begin(&head);
        let mut before = interval::head(
            parcel.frames,
            &parcel.outputs,
            &parcel.asked,
            head.len() + contents.len() + Seal::BYTES,
        );
        before.extend_from_slice(&head);
        let most = PART_BYTES.min(log.sink.max_payload() - AROUND_A_PART) - Seal::BYTES;
        let (heads, parts) = (before.chunks(most), contents.chunks(most));
        let (first, last) = (heads.len(), heads.len() + parts.len() - 1);
        let mut seq = Seq::ZERO;
        for (number, part) in heads.chain(parts).enumerate() {
            // Part by part: so it is in the processor's cache for what follows, and the backup has begun.
            if number >= first {
                seal.add(part);
            }
            let seal = seal.bytes();
            let end = if number == last { &seal[..] } else { &[] };
            log.encoder
                .encode_part_head(parcel.position, number as u32, number == last);
            seq = self.post(log, parcel.position, [part, end])?;
            // The backup takes this part while the next is written.
            log.sink.notify(true);
        }
        for request in parcel.requests.drain(..) {
            self.outlet.hold_request(seq, Seq::ZERO, request);
        }
        for output in parcel.outputs.drain(..) {
            self.outlet.hold(seq, Seq::ZERO, output);
        }
        for &at in &parcel.made {
            self.outlet.made(seq, Seq::ZERO, at);
        }
        self.release(&mut log.sink);
        *lock(&self.shared.spare) = contents;
        while log.sink.is_behind() {
            if self.is_recalled() {
                return Err(Undelivered::Recalled);
            }
            std::thread::sleep(CATCH_UP);
        }
        Ok(())
    }

    fn is_recalled(&self) -> bool {
        self.shared.recalled.load(Ordering::Relaxed)
    }

    fn release(&self, sink: &mut S) {
        let released = self.outlet.release(sink.committed());
        sink.released(released);
    }

    /// Posts the part whose head was encoded last, waiting for room if the backup is behind.
    fn post(
        &self,
        log: &mut Log<S>,
        position: Position,
        [part, end]: [&[u8]; 2],
    ) -> Result<Seq, Undelivered> {
        let made = Instant::now();
        log.sink.released(self.outlet.released());
        loop {
            let pieces = [log.encoder.bytes(), part, end];
            match log.sink.post_pieces(&pieces) {
                Ok(seq) => {
                    let bytes = pieces.iter().map(|piece| piece.len()).sum();
                    self.samples.meter().posted(position.0, bytes, made);
                    return Ok(seq);
                }
                Err(SinkError::Full) => {
                    log.sink.wait_for_room(LOOK);
                    self.release(&mut log.sink);
                }
                Err(SinkError::Fenced) => {
                    self.shared.orders.report_fenced();
                    return Err(Undelivered::Over);
                }
                // The I/O thread has told the protocol.
                Err(SinkError::Closed) => return Err(Undelivered::Over),
                Err(SinkError::Unusable(why) | SinkError::Broken(why)) => {
                    self.shared.orders.report_unusable(why);
                    return Err(Undelivered::Over);
                }
            }
            if self.is_recalled() {
                return Err(Undelivered::Recalled);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::wait::Wake;
    use crate::gate::{Committed, Gate, Sent};
    use crate::version::Version;
    use crate::world::World;

    /// A log that a bug has.
    struct Buggy;

    impl Sink for Buggy {
        fn post(&mut self, _: &[u8]) -> Result<Seq, SinkError> {
            Err(SinkError::Closed)
        }

        fn committed(&mut self) -> Committed {
            Committed::EVERYTHING
        }

        fn released(&mut self, _: Seq) {}

        fn notify(&mut self, _: bool) {}

        fn is_behind(&mut self) -> bool {
            false
        }

        fn wait_for_room(&mut self, _: Duration) {}

        fn version(&self) -> Version {
            panic!("a bug")
        }

        fn detach(&mut self) {}
    }

    struct Nowhere;

    impl World for Nowhere {
        fn send(&mut self, _: &Output) -> Sent {
            Sent::Done
        }
    }

    /// Whoever waits for a courier that is gone waits no longer, whether he began before or after.
    #[test]
    fn nobody_waits_for_a_courier_that_a_bug_has_ended() {
        let wake = Arc::new(Wake::new().unwrap());
        let stage = Arc::new(Stage::new(Arc::clone(&wake)));
        let orders = Arc::new(Orders::new(wake));
        let outlet = Outlet::new(Gate::new(), Box::new(Nowhere));
        let (courier, work) = Courier::<Buggy>::new(&stage, &orders, &outlet, &Arc::default());
        courier.begin(Buggy, Base::default());
        let (tell, told) = std::sync::mpsc::channel();
        let leaving = std::thread::spawn(move || {
            for _ in 0..2 {
                let leaves = std::panic::AssertUnwindSafe(|| courier.leave());
                tell.send(std::panic::catch_unwind(leaves).is_err())
                    .unwrap();
            }
            courier.has_failed()
        });
        assert!(std::thread::spawn(move || work.run()).join().is_err());
        for _ in 0..2 {
            let failed = told.recv_timeout(Duration::from_secs(30));
            assert_eq!(failed, Ok(true), "its outputs are not in the gate");
        }
        assert!(leaving.join().unwrap());
    }
}
