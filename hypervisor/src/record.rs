//! The recorder: exit → event → log → guest, on the vCPU's thread.
//!
//! At every sync point it gathers the inputs, applies them, and posts one entry that says so; an exit without inputs and
//! outputs is folded into the next entry. Outputs go to the gate with the number of their entry. A guest that halts posts its
//! outputs before it waits.
#![forbid(unsafe_code)]

mod copying;
mod crew;
mod deeds;
mod disk;
mod ending;
mod giving;
mod intervals;
mod obeying;
mod pacing;
mod preempting;
mod resetting;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_log::Seq;

use crate::backends::disk::Disk;
use crate::checkpoint::{CheckpointError, Remembered};
use crate::clock::GuestClock;
use crate::desk::Desk;
use crate::entry::{Base, Body, Encoder, Entry, LoggedInput, OutputsDigest, Step, Wish};
use crate::event::{GuestTime, Input, Need, Output};
use crate::machine::{Machine, MachineError, Phase, Stepped};
use crate::memory::PageNumber;
use crate::orders::{Order, Orders, Pace, Samples};
pub use crate::outlet::Outlet;
use crate::sink::{Sink, SinkError};
use crate::stage::Stage;
pub use ending::Finished;
pub use intervals::Intervals;
use resetting::Resets;

/// Frames applied at one sync point: a quarter of the guest's ring, so that replies to the first need not wait for the last.
const FRAMES_AT_ONCE: u32 = 64;

/// A shown time of this age is renewed at an exit that has no input: at most a thousand more entries a second, of one cache line, and
/// a clock as fine as what programs sleep by.
const SHOWN_TIME_STALE_NS: u64 = 1_000_000;

/// Longest sleep of a halted guest's thread; only a safety net, every reason to wake rings the bell.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// How long a tick is held back for another interrupt. Several times what a slow host takes from one place where a guest can be interrupted to the next; a guest
/// that takes none, and looks whether its timer asks, is not to wait for good, and one of which another line always asks is to have its ticks.
const TIMER_GIVES_WAY_NS: u64 = 100_000_000;

/// Between two looks at a backup that is behind: short against the window, long against a look.
const CATCH_UP: Duration = Duration::from_micros(100);

/// Why recording stopped.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The log, for another reason than the fence.
    #[error("the log: {0}")]
    Log(SinkError),
    /// Ordered to stop while an entry could not be posted.
    #[error("stopped while the log could not take an entry")]
    Stopped,
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The host's random source.
    #[error("cannot read random bytes from the host: {0}")]
    Random(std::io::Error),
}

/// How recording ended, when nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest turned itself off; its power-off has left the gate.
    PoweredOff(u8),
    /// Triple fault or a halt that nothing can end.
    Crashed,
    /// Somebody ordered it.
    Stopped,
}

/// Choices of a recording.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecordOptions {
    /// An entry for every exit, with all its registers.
    pub every_exit: bool,
    /// How often the whole memory's hash goes into the log.
    pub memory_check: Option<Duration>,
    /// How long a halted guest's thread looks for work before it sleeps. Worth it only where the thread has its core for
    /// itself: elsewhere it keeps the I/O thread from running.
    pub spin: Duration,
    /// Whether a guest that does not exit is stopped by a checkpoint when something is due for it.
    pub preempt: bool,
}

/// Runs a machine as its primary.
pub struct Recorder<S> {
    machine: Machine,
    sink: S,
    encoder: Encoder,
    outlet: Outlet,
    stage: Arc<Stage>,
    orders: Arc<Orders>,
    samples: Arc<Samples>,
    clock: GuestClock,
    random: File,
    options: RecordOptions,
    next_memory_check: Option<Instant>,
    /// The latest staged input that was applied: outputs depend on it.
    applied: Seq,
    /// The latest entry.
    posted: Seq,
    step: Step,
    /// What the log's checkpoints have told of pages, and which of the last one's need not have been written.
    told: Option<Remembered>,
    unwritten: Option<Vec<PageNumber>>,
    taken: Vec<Output>,
    /// The guest has run on from its sync point and was kicked: its state is no state that a replay could stop at.
    mid_run: bool,
    /// Where the thread asks that copies this machine.
    desk: Option<Arc<Desk<S>>>,
    /// How long the guest has run since it last stood for its pace.
    ran: Duration,
    /// Where the machine is replicated by checkpoints: the sink is then nowhere, and the courier has the log.
    intervals: Option<Intervals<S>>,
    /// The log that is to begin at the next place.
    cut: Option<copying::Cutting<S>>,
    /// It is to begin where the guest stands.
    begins: bool,
    /// What is to be done at the next sync point.
    deeds: VecDeque<Order>,
    /// This side's disk image.
    disk: Option<Arc<Disk>>,
    /// When the machine last started anew.
    resets: Resets,
}

/// Everything a recorder is made of.
pub struct Parts<S> {
    /// The machine, new or taken over from a replayer.
    pub machine: Machine,
    /// Where entries go.
    pub sink: S,
    /// Where the log stands.
    pub base: Base,
    /// Where outputs go.
    pub outlet: Outlet,
    /// Where inputs come from.
    pub stage: Arc<Stage>,
    /// Orders of the I/O thread.
    pub orders: Arc<Orders>,
    /// Commit latencies.
    pub samples: Arc<Samples>,
    /// The guest's clock.
    pub clock: GuestClock,
    /// Choices.
    pub options: RecordOptions,
    /// The host's random source, open.
    pub random: File,
    /// Where the thread asks that copies this machine to a new backup, if there is one.
    pub desk: Option<Arc<Desk<S>>>,
    /// Where the machine is replicated by checkpoints; the sink is then nowhere.
    pub intervals: Option<Intervals<S>>,
}

/// Opens the host's random source.
///
/// # Errors
/// [`RecordError::Random`].
pub fn random_source() -> Result<File, RecordError> {
    File::open("/dev/urandom").map_err(RecordError::Random)
}

impl<S: Sink> Recorder<S> {
    /// A recorder that goes on where its parts stand. Nothing here can fail: a backup that goes live has no way back.
    #[must_use]
    pub fn new(parts: Parts<S>) -> Self {
        parts.outlet.measure(Arc::clone(&parts.samples));
        let keeps = parts.sink.keeps();
        let encoder = Encoder::from_base(parts.base).speaking(parts.sink.version());
        Self {
            machine: parts.machine,
            sink: parts.sink,
            encoder,
            outlet: parts.outlet,
            stage: parts.stage,
            orders: parts.orders,
            samples: parts.samples,
            clock: parts.clock,
            random: parts.random,
            options: parts.options,
            next_memory_check: parts
                .options
                .memory_check
                .filter(|_| keeps)
                .map(|every| Instant::now() + every),
            applied: Seq::ZERO,
            posted: Seq::ZERO,
            step: Step::default(),
            told: None,
            unwritten: None,
            taken: Vec::new(),
            mid_run: false,
            desk: parts.desk,
            intervals: parts.intervals,
            ran: Duration::ZERO,
            cut: None,
            begins: false,
            deeds: VecDeque::new(),
            disk: None,
            resets: Resets::default(),
        }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where the entries go.
    pub fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Runs until the guest is gone or an order ends it.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn run(&mut self) -> Result<Ended, RecordError> {
        self.stage.bell().attach();
        self.orders.attach(self.machine.kick_handle());
        self.prepare_to_preempt()?;
        if self.machine.has_crew() {
            return self.run_crew();
        }
        // A machine that was taken over may stand in the middle of a sync point.
        if self.machine.position().0 > 0
            && let Some(ended) = self.sync_point()?
        {
            return Ok(ended);
        }
        loop {
            // Before the orders are looked at: completing an instruction swallows the kick that came with one.
            if let Some(ended) = self.keep_intervals()? {
                return Ok(ended);
            }
            let place = (!self.mid_run).then(|| self.encoder.base());
            self.sink.attend(&mut self.machine, place);
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(ended);
            }
            if let Some(ended) = self.cut_if_wanted()? {
                return Ok(ended);
            }
            if self.wants_place() {
                if let Some(ended) = self.make_place()? {
                    return Ok(ended);
                }
                continue;
            }
            if let Some(ended) = self.do_deeds()? {
                return Ok(ended);
            }
            if self.is_paused() {
                if let Some(ended) = self.stand_paused()? {
                    return Ok(ended);
                }
                continue;
            }
            if let Some(ended) = self.stand_after_resets()? {
                return Ok(ended);
            }
            self.orders.resting();
            if self.orders.pace() < Pace::FULL
                && let Some(ended) = self.keep_pace()?
            {
                return Ok(ended);
            }
            self.entering();
            self.mid_run = self.step_at_pace()? != Stepped::SyncPoint;
            self.left();
            self.orders.working(self.machine.position());
            if !self.mid_run
                && let Some(ended) = self.sync_point()?
            {
                return Ok(ended);
            }
        }
    }

    fn sync_point(&mut self) -> Result<Option<Ended>, RecordError> {
        if let Some(due) = self.next_memory_check
            && Instant::now() >= due
        {
            self.post_step()?;
            self.post_memory_hash()?;
        }
        match self.machine.phase() {
            Phase::Crashed => {
                self.post_step()?;
                return Ok(Some(self.see_off()?.unwrap_or(Ended::Crashed)));
            }
            Phase::Off(status) => {
                self.post_step()?;
                return self.wait_for_power_off(status).map(Some);
            }
            Phase::Reset => {
                self.post_step()?;
                self.reset(Wish::Guest)?;
                return self.let_reader_catch_up();
            }
            Phase::Needs(need) => self.give(need)?,
            Phase::Ready | Phase::Halted | Phase::HltInstruction => {}
        }
        self.give_random()?;
        self.gather()?;
        if matches!(self.machine.phase(), Phase::Halted | Phase::HltInstruction) {
            if let Some(ended) = self.wait_awake()? {
                return Ok(Some(ended));
            }
            if self.machine.phase() == Phase::Halted {
                self.give(Need::Clock)?;
            }
        }
        if !self.step.inputs.is_empty() || self.machine.has_outputs() || self.options.every_exit {
            self.post_step()?;
        }
        self.let_reader_catch_up()
    }

    /// Keeps the guest from running on while the backup is too far behind: a failover would have to replay all that first.
    fn let_reader_catch_up(&mut self) -> Result<Option<Ended>, RecordError> {
        while self.sink.is_behind() {
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            self.orders.resting();
            let (orders, since) = (&self.orders, Instant::now());
            self.stage.bell().wait(CATCH_UP, || orders.waiting());
            orders.add_stood(since.elapsed());
        }
        Ok(None)
    }

    /// Sleeps until the halted guest has something to do. Its outputs leave first.
    fn wait_awake(&mut self) -> Result<Option<Ended>, RecordError> {
        if self.machine.awake() {
            return Ok(None);
        }
        if self.machine.has_outputs() || !self.step.inputs.is_empty() {
            self.post_step()?;
        }
        let mut spin_until = Some(Instant::now() + self.options.spin);
        loop {
            self.sink.attend(&mut self.machine, None);
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.do_deeds()? {
                return Ok(Some(ended));
            }
            if self.is_paused() {
                if self.cut.is_some() && self.machine.phase() == Phase::Halted {
                    return Ok(None);
                }
                if let Some(ended) = self.cut_if_wanted()? {
                    return Ok(Some(ended));
                }
                self.rest_while_paused();
                continue;
            }
            self.gather()?;
            if self.machine.awake() {
                return Ok(None);
            }
            if self.cut.is_some() && self.machine.phase() == Phase::Halted {
                // It is given the time, so that there is a place for the cut.
                return Ok(None);
            }
            if !self.step.inputs.is_empty() {
                // It changed the machine but did not wake it: the log must say so before the next round.
                self.post_step()?;
            }
            if let Some(ended) = self.keep_intervals()? {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.cut_if_wanted()? {
                return Ok(Some(ended));
            }
            if spin_until.is_some_and(|until| Instant::now() < until) {
                if self.outlet.waiting() > 0 {
                    self.release();
                }
                std::hint::spin_loop();
                continue;
            }
            spin_until = None;
            let longest = self.longest_sleep();
            // What gathered must not wait as long as the guest does.
            self.sink.notify(true);
            let (stage, orders) = (&self.stage, &self.orders);
            let (room, console) = (self.machine.can_receive(), self.machine.console_room() > 0);
            let intervals = self.intervals.as_ref();
            orders.resting();
            stage.bell().wait(longest, || {
                (room && stage.has_frames())
                    || (console && stage.has_typed())
                    || stage.has_done()
                    || orders.waiting()
                    || intervals.is_some_and(Intervals::calls)
            });
            orders.working(self.machine.position());
        }
    }

    fn longest_sleep(&self) -> Duration {
        let tick = self.machine.next_tick().map(|tick| self.clock.until(tick));
        let interval = self.intervals.as_ref().and_then(Intervals::ends);
        let interval = interval.map(|ends| ends.saturating_duration_since(Instant::now()));
        let first = [tick, interval].into_iter().flatten().min();
        first.map_or(SLEEP_MAX, |first| first.min(SLEEP_MAX))
    }

    /// Supplies what has come by itself: ticks, frames, typed bytes.
    fn gather(&mut self) -> Result<(), RecordError> {
        if !self.machine.injectable() {
            return Ok(());
        }
        let now = self.clock.now();
        let ticks = self.ticks_to_give(now).is_some();
        self.renew_shown_time(now, ticks)?;
        let (mut count, mut checksum) = (0, 0);
        while count < FRAMES_AT_ONCE && self.stage.has_frames() && self.machine.can_receive() {
            let Some(frame) = self.stage.pop() else { break };
            checksum = rdma_log::crc32c_append(checksum, &frame.bytes);
            count += 1;
            self.applied = self.applied.max(frame.seq);
            self.sink.frame(&frame.bytes);
            let input = Input::Frame(frame.bytes);
            // One that is lost was taken off the stage as well.
            self.hand_in(&input)?;
            if let Input::Frame(bytes) = input {
                self.stage.recycle(bytes);
            }
        }
        if count > 0 {
            self.step
                .inputs
                .push(LoggedInput::Frames { count, checksum });
        }
        self.gather_done()?;
        if self.stage.has_typed() {
            let room = self.machine.console_room();
            let typed: Vec<u8> = std::iter::from_fn(|| self.stage.typed())
                .take(room)
                .collect();
            if !typed.is_empty() {
                let input = Input::Console(typed);
                if self.hand_in(&input)?
                    && let Input::Console(bytes) = input
                {
                    self.step.inputs.push(LoggedInput::Console(bytes));
                }
            }
        }
        // Of what was given here since, more may ask, and none less: the time that comes with a tick is shown.
        if ticks && let Some((due, late)) = self.ticks_to_give(now) {
            self.samples.late_tick(Duration::from_nanos(late));
            self.machine.supply(&Input::Tick(due))?;
            self.step.inputs.push(LoggedInput::Tick(due));
        }
        Ok(())
    }

    /// How many ticks are due and to be given here, behind all else, and by how much the first is late. The timer is first in the line of interrupts, and a guest that can be interrupted more seldom than
    /// it ticks has a tick due wherever it can: every other line would wait for seconds, or for good. So a tick waits while another line asks, and where the guest would not take it.
    fn ticks_to_give(&mut self, now: GuestTime) -> Option<(u32, u64)> {
        let due = self.machine.ticks_due(now);
        if due == 0 {
            return None;
        }
        let first = self.machine.next_tick()?;
        let late = now.0.saturating_sub(first.0);
        let waits = late < TIMER_GIVES_WAY_NS && self.machine.tick_is_in_the_way();
        (!waits).then_some((due, late))
    }

    /// A guest that reads the time from memory reads the one of its last input; at an exit without one it is renewed, so that it
    /// does not stand still where no timer ticks.
    fn renew_shown_time(&mut self, now: GuestTime, ticks: bool) -> Result<(), RecordError> {
        let Some(shown) = self.machine.shown_time() else {
            return Ok(());
        };
        let frames = self.stage.has_frames() && self.machine.can_receive();
        let stale = self.machine.phase() == Phase::Ready
            && now.0.saturating_sub(shown.0) >= SHOWN_TIME_STALE_NS;
        if ticks || frames || self.stage.has_typed() || stale {
            self.machine.supply(&Input::Clock(now))?;
            self.step.inputs.push(LoggedInput::Clock(now));
        }
        Ok(())
    }

    /// Posts what has gathered at this sync point, and sends the outputs as soon as that has committed.
    fn post_step(&mut self) -> Result<(), RecordError> {
        if self.intervals.is_some() {
            self.note_step();
            return Ok(());
        }
        let made = Instant::now();
        self.taken.extend(self.machine.outputs());
        if !self.taken.is_empty() {
            let mut digest = OutputsDigest::default();
            for output in &self.taken {
                digest.add(output);
            }
            self.step.outputs = Some(digest);
        }
        self.step.digest = self.machine.digest();
        if self.options.every_exit {
            self.step.exit = self.machine.history().at(self.machine.position()).copied();
        }
        let step = std::mem::take(&mut self.step);
        let entry = Entry {
            position: self.machine.position(),
            body: Body::Step(step),
        };
        // The I/O thread may have let outputs out since the last entry.
        self.sink.released(self.outlet.released());
        let seq = self.post(&entry, made)?;
        if let Body::Step(mut step) = entry.body {
            step.inputs.clear();
            self.step.inputs = step.inputs;
        }
        let any = !self.taken.is_empty();
        let had_outputs = self.hand_out(seq);
        if had_outputs {
            self.outlet.made(seq, self.applied, made);
        } else if any {
            self.outlet.asked(seq, self.applied);
        }
        self.release();
        let halted = matches!(self.machine.phase(), Phase::Halted | Phase::HltInstruction);
        self.sink.notify(had_outputs || halted);
        Ok(())
    }

    /// Lets out what has committed.
    fn release(&mut self) {
        if self.intervals.is_some() {
            // The courier does, or nothing waits.
            return;
        }
        let committed = self.sink.committed();
        let released = self.outlet.release(committed);
        self.sink.released(released);
    }

    fn post_memory_hash(&mut self) -> Result<(), RecordError> {
        let started = Instant::now();
        let hash = self.machine.memory_hash()?;
        let entry = Entry {
            position: self.machine.position(),
            body: Body::MemoryHash(hash),
        };
        self.post(&entry, started)?;
        self.sink.notify(true);
        if let Some(every) = self.options.memory_check {
            self.next_memory_check = Some(started + every);
        }
        Ok(())
    }

    /// Posts an entry, waiting for room if the backup is behind. A fence ends this machine's reign: it freezes here until the
    /// protocol knows what became of the claim.
    fn post(&mut self, entry: &Entry, made: Instant) -> Result<Seq, RecordError> {
        self.encoder.encode(entry);
        loop {
            match self.sink.post(self.encoder.bytes()) {
                Ok(seq) => {
                    self.posted = seq;
                    if self.sink.keeps() {
                        let bytes = self.encoder.bytes().len();
                        let position = entry.position.0;
                        self.samples.meter().posted(position, bytes, made);
                    }
                    return Ok(seq);
                }
                Err(SinkError::Full) => {
                    let since = Instant::now();
                    self.sink.wait_for_room(Duration::from_millis(1));
                    self.orders.add_stood(since.elapsed());
                    self.release();
                    while let Some(order) =
                        self.orders.take_if(|order| order != Order::StopAtSyncPoint)
                    {
                        if !self.obey_one(order) {
                            return Err(RecordError::Stopped);
                        }
                    }
                }
                Err(SinkError::Fenced) => {
                    self.orders.leave_exits(self.machine.history().iter());
                    self.orders.report_fenced();
                    if !self.obey_one(Order::Freeze) {
                        return Err(RecordError::Stopped);
                    }
                }
                // The I/O thread has told the protocol, which gives the order that ends this.
                Err(SinkError::Closed) => {
                    if !self.obey_one(Order::Freeze) {
                        return Err(RecordError::Stopped);
                    }
                }
                // Whatever the other side has done to its memory, this is the copy that serves.
                Err(SinkError::Unusable(why)) => {
                    self.orders.report_unusable(why);
                    if !self.obey_one(Order::Freeze) {
                        return Err(RecordError::Stopped);
                    }
                }
                Err(error) => return Err(RecordError::Log(error)),
            }
        }
    }
}
