//! The thread of an image.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rdma_log::locks::lock;

use super::copy::{AT_ONCE, Blocks, Owed};
use super::image::Image;
use super::mark::{Mark, Stamp, Use};
use crate::backends::wait::Wake;
use crate::disk::{Data, Done, Operation, Request, SECTOR, Status};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};

/// Bytes that a side that follows may be behind with. A failover waits until they are written, and a disk's hiccup costs the primary
/// nothing as long as they suffice: a good part of a second of a fast guest's writes, a fraction of a second of a slow disk's.
pub const FOLLOW_BYTES: usize = 8 << 20;

/// What a request is counted with beside its data, so that flushes are bounded as well.
const AROUND: usize = 1 << 10;

/// A side's disk failed, and this side is of no use as a copy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this side's disk image fails: {0}")]
pub struct DiskFailure(pub String);

/// What came of a request of a side that leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What the guest is told, if it is told.
    pub done: Done,
    /// What the disk said, if it failed.
    pub failure: Option<String>,
}

/// Something to do.
#[derive(Debug)]
enum Job {
    /// A request, and what came of it is told.
    Serve(Request),
    /// A request that only the image needs to know.
    Follow(Request),
    /// From now on the image carries this mark; all that came before is durable first.
    Mark(Mark),
    /// A step of a copy for another side.
    Copy(Step),
}

/// What was read for a copy, or what the disk said.
pub type CopyRead = Result<Blocks, String>;

#[derive(Debug)]
enum Step {
    /// All of an image of so many sectors is owed.
    Begin(u64),
    /// Some of what is owed, from this block on.
    Some(u64, Sender<CopyRead>),
    /// All that is owed; what is written from here on is not.
    Rest(Sender<CopyRead>),
    /// Nothing is owed any more.
    End,
}

impl Job {
    fn weight(&self) -> usize {
        match self {
            Self::Serve(request) | Self::Follow(request) => AROUND + request.length(),
            Self::Mark(_) | Self::Copy(_) => AROUND,
        }
    }

    fn is_flush_that_follows(&self) -> bool {
        matches!(
            self,
            Self::Follow(Request {
                operation: Operation::Flush,
                ..
            })
        )
    }
}

/// Works on an image: no thread, no queue.
pub(super) struct Engine<I> {
    image: I,
    /// Something was written that may not survive the loss of power.
    unsynced: bool,
    /// A sync failed. The kernel says that once and forgets it, and what it could not write is lost: no later sync is true.
    lost: Option<String>,
    /// The first failure of what no guest is told of.
    failed: Option<String>,
    /// What a copy lacks that is being made.
    owed: Option<Owed>,
}

impl<I: Image> Engine<I> {
    pub(super) fn new(image: I) -> Self {
        Self {
            image,
            // Whoever had it before may have ended before it was: what is read from it now is then promised to nobody yet.
            unsynced: true,
            lost: None,
            failed: None,
            owed: None,
        }
    }

    fn request(&mut self, request: &Request) -> io::Result<Data> {
        match &request.operation {
            Operation::Read { sector, length } => {
                let mut data = vec![0; *length as usize];
                self.image.read(&mut data, sector * SECTOR)?;
                Ok(Data(data))
            }
            Operation::Write {
                sector,
                data,
                durable,
            } => {
                self.unsynced = true;
                if let Some(owed) = &mut self.owed {
                    owed.note(sector * SECTOR, data.0.len());
                }
                self.image.write(&data.0, sector * SECTOR)?;
                if *durable {
                    self.sync()?;
                }
                Ok(Data::default())
            }
            Operation::Flush => self.sync().map(|()| Data::default()),
        }
    }

    fn copy(&mut self, step: &Step) {
        let (from, most, tell) = match step {
            Step::Begin(sectors) => return self.owed = Some(Owed::all(*sectors)),
            Step::End => return self.owed = None,
            Step::Some(from, tell) => (*from, AT_ONCE, tell),
            Step::Rest(tell) => (0, usize::MAX, tell),
        };
        let Some(owed) = &mut self.owed else {
            let _ = tell.send(Err("no copy is being made".to_owned()));
            return;
        };
        let read = owed.read(&mut self.image, from, most);
        // Whoever asked may have given up.
        let _ = tell.send(read.map_err(|error| error.to_string()));
        if matches!(step, Step::Rest(_)) {
            self.owed = None;
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(why) = &self.lost {
            return Err(io::Error::other(why.clone()));
        }
        if self.unsynced {
            self.image.sync().inspect_err(|error| {
                self.lost = Some(format!("what was written before is lost: {error}"));
            })?;
            self.unsynced = false;
        }
        Ok(())
    }

    pub(super) fn serve(&mut self, request: &Request) -> Outcome {
        let (status, data, failure) = match self.request(request) {
            Ok(data) => (Status::Good, data, None),
            Err(error) => (Status::Error, Data::default(), Some(error.to_string())),
        };
        let number = request.number;
        Outcome {
            done: Done {
                number,
                status,
                data,
            },
            failure,
        }
    }

    /// Nothing is done to an image once it has failed: what it lacks cannot be made up for by what comes later.
    fn unless_failed(&mut self, what: impl FnOnce(&mut Self) -> io::Result<()>) {
        if self.failed.is_none()
            && let Err(error) = what(self)
        {
            self.failed = Some(error.to_string());
        }
    }

    pub(super) fn follow(&mut self, request: &Request) {
        self.unless_failed(|engine| match request.operation {
            // What was read is in the log.
            Operation::Read { .. } => Ok(()),
            Operation::Write { .. } | Operation::Flush => engine.request(request).map(drop),
        });
    }

    pub(super) fn mark(&mut self, mark: &Mark) {
        self.unless_failed(|engine| {
            engine.sync()?;
            engine.image.mark(mark)
        });
    }
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// What the jobs weigh, the one under way included.
    weight: usize,
    /// Jobs that were given, and that are done.
    given: u64,
    finished: u64,
    failed: Option<String>,
    closed: bool,
    /// The thread has ended.
    gone: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn give(&self, mut state: MutexGuard<'_, State>, job: Job) -> u64 {
        state.given += 1;
        let number = state.given;
        if state.gone {
            state.finished = number;
            return number;
        }
        state.weight += job.weight();
        state.jobs.push_back(job);
        self.changed.notify_all();
        number
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_while(self.lock(), condition)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, once there is one; none when the disk is closed and everything is done. A flush that follows is left
    /// out when a later one is there: nobody waits for the first.
    fn take(&self) -> Option<Job> {
        loop {
            let mut state = self.wait_while(|state| state.jobs.is_empty() && !state.closed);
            let job = state.jobs.pop_front()?;
            let later = state.jobs.iter().any(Job::is_flush_that_follows);
            if !job.is_flush_that_follows() || !later {
                return Some(job);
            }
            self.finish(state, &job, None);
        }
    }

    fn finish(&self, mut state: MutexGuard<'_, State>, job: &Job, failed: Option<String>) {
        state.weight -= job.weight();
        state.finished += 1;
        state.failed = failed.or(state.failed.take());
        self.changed.notify_all();
    }
}

/// The thread's handle. Whoever drops it waits until all that was given is done.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    outcomes: Mutex<Receiver<Outcome>>,
    thread: Option<JoinHandle<()>>,
    machine: String,
    /// What the image is marked with when this side, which follows, takes over.
    claim: Mutex<Option<Stamp>>,
    /// Where the rest of a copy is told that is being made.
    rest: Mutex<Option<Sender<CopyRead>>>,
    /// Both sides have the image: it is written by the one that leads, and by nobody before the other is fenced.
    of_both: bool,
}

impl Disk {
    /// Starts the thread, which confines itself; `wake` is rung when something came of a request.
    ///
    /// # Errors
    /// The host's, if it starts no thread.
    pub fn start(
        image: impl Image + 'static,
        machine: &str,
        wake: Arc<Wake>,
        sandbox: Sandbox,
    ) -> io::Result<Self> {
        let shared: Arc<Shared> = Arc::default();
        let (tell, outcomes) = channel();
        let work = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || {
                sandbox.confine(Thread::Disk).expect(NOT_CONFINED);
                run(&work, Engine::new(image), &tell, &wake);
            })?;
        Ok(Self {
            shared,
            outcomes: Mutex::new(outcomes),
            thread: Some(thread),
            machine: machine.to_owned(),
            claim: Mutex::default(),
            rest: Mutex::default(),
            of_both: false,
        })
    }

    /// Of an image that both sides have, or one of this side's own.
    #[must_use]
    pub fn shared(mut self, shared: bool) -> Self {
        self.of_both = shared;
        self
    }

    /// Whether both sides have the image.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.of_both
    }

    /// Has a request done; what comes of it is told by [`outcome`](Self::outcome). The guest's device bounds how many there are.
    pub fn serve(&self, request: Request) {
        self.shared.give(self.shared.lock(), Job::Serve(request));
    }

    /// Has a request of the log done. Waits while too much is behind.
    ///
    /// # Errors
    /// [`DiskFailure`], also of an earlier one.
    pub fn follow(&self, request: Request) -> Result<(), DiskFailure> {
        let job = Job::Follow(request);
        let state = self.shared.wait_while(|state| {
            state.failed.is_none() && state.weight > 0 && state.weight + job.weight() > FOLLOW_BYTES
        });
        match &state.failed {
            Some(failed) => Err(DiskFailure(failed.clone())),
            None => {
                self.shared.give(state, job);
                Ok(())
            }
        }
    }

    /// Begins to copy the image, of so many sectors, for another side. The rest is told there.
    pub fn begin_copy(&self, sectors: u64) -> Receiver<CopyRead> {
        let (tell, rest) = channel();
        *lock(&self.rest) = Some(tell);
        self.give_step(Step::Begin(sectors));
        rest
    }

    /// Reads what the copy lacks, from this block on.
    ///
    /// # Errors
    /// The disk's, or that it did not answer in time.
    pub fn copy_some(&self, from: u64, longest: Duration) -> CopyRead {
        let (tell, read) = channel();
        self.give_step(Step::Some(from, tell));
        match read.recv_timeout(longest) {
            Ok(read) => read,
            Err(RecvTimeoutError::Timeout) => Err("it hangs".to_owned()),
            Err(RecvTimeoutError::Disconnected) => Err("its thread is gone".to_owned()),
        }
    }

    /// The copy ends here: it has all that was asked of the disk before, and nothing of what is asked from now on. By the thread that
    /// asks.
    pub fn copy_rest(&self) {
        let mut rest = lock(&self.rest);
        if let Some(tell) = rest.take() {
            self.give_step(Step::Rest(tell));
        }
    }

    /// No copy is made any more.
    pub fn end_copy(&self) {
        *lock(&self.rest) = None;
        self.give_step(Step::End);
    }

    fn give_step(&self, step: Step) {
        self.shared.give(self.shared.lock(), Job::Copy(step));
    }

    /// What came of a request, if there is something new.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        let outcomes = self.outcomes.lock();
        outcomes
            .unwrap_or_else(PoisonError::into_inner)
            .try_recv()
            .ok()
    }

    /// Why this image is of no use as a copy.
    #[must_use]
    pub fn failure(&self) -> Option<DiskFailure> {
        self.shared.lock().failed.clone().map(DiskFailure)
    }

    /// Has the image marked as the arbiter's record says, after all that was given before and once that is durable.
    pub fn mark(&self, in_use: Use, stamp: Stamp) {
        self.give_mark(in_use, stamp, true);
    }

    fn give_mark(&self, in_use: Use, stamp: Stamp, sure: bool) {
        let mark = Mark {
            machine: self.machine.clone(),
            stamp,
            in_use,
            sure,
            before: None,
        };
        self.shared.give(self.shared.lock(), Job::Mark(mark));
    }

    /// This side follows, and would take over with this stamp.
    pub fn may_lead(&self, claim: Option<Stamp>) {
        *lock(&self.claim) = claim;
    }

    /// This side takes over, if its claim is won: returns when the image has all that was given, durably, and says so. A shared one has
    /// been given nothing, and is taken when the other side is fenced.
    ///
    /// # Errors
    /// [`DiskFailure`] if it has not.
    pub fn take_over(&self) -> Result<(), DiskFailure> {
        let claim = *lock(&self.claim);
        if let Some(stamp) = claim.filter(|_| !self.of_both) {
            // A claim may still be lost: the mark is not one of a side that is known to have led.
            self.give_mark(Use::Leads, stamp, false);
        }
        self.settle()
    }

    /// Waits until all that was given is done.
    ///
    /// # Errors
    /// [`DiskFailure`] if the image has not all that it should.
    pub fn settle(&self) -> Result<(), DiskFailure> {
        let given = self.shared.lock().given;
        let state = self.shared.wait_while(|state| state.finished < given);
        match &state.failed {
            Some(failed) => Err(DiskFailure(failed.clone())),
            None => Ok(()),
        }
    }

    /// The machine was powered off in this reign, and all that it wrote was given: the image is marked as complete.
    ///
    /// # Errors
    /// [`DiskFailure`] if it is not.
    pub fn end(&self, stamp: Stamp) -> Result<(), DiskFailure> {
        self.give_mark(Use::Ended, stamp, true);
        self.settle()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It panics only by a bug, which has been reported.
            let _ = thread.join();
        }
    }
}

/// The thread ends, however it does: nobody waits for what it had to do.
struct Last<'a>(&'a Shared);

impl Drop for Last<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.gone = true;
        if state.finished < state.given {
            state.failed = Some("its thread is gone; this is a bug".to_owned());
        }
        (state.finished, state.weight) = (state.given, 0);
        self.0.changed.notify_all();
    }
}

fn run<I: Image>(shared: &Shared, mut engine: Engine<I>, tell: &Sender<Outcome>, wake: &Wake) {
    let _last = Last(shared);
    while let Some(job) = shared.take() {
        match &job {
            Job::Serve(request) => {
                let outcome = engine.serve(request);
                // If nobody listens the process is ending.
                let _ = tell.send(outcome);
                wake.ring();
            }
            Job::Follow(request) => engine.follow(request),
            Job::Mark(mark) => engine.mark(mark),
            Job::Copy(step) => engine.copy(step),
        }
        let newly = engine.failed.is_some() && shared.lock().failed.is_none();
        shared.finish(shared.lock(), &job, engine.failed.clone());
        if newly {
            wake.ring();
        }
    }
}

#[cfg(test)]
mod tests;
