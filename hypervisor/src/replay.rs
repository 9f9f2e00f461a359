//! The replayer: log → run to the entry's position → compare → apply its inputs.
//!
//! It runs only as far as the log it holds has decided: after an entry the guest stands still at that sync point until the
//! next entry has come. Every exit is folded into the digest that the next entry carries; the first difference ends the
//! replay, and nothing of this machine can ever go live.
#![forbid(unsafe_code)]

mod debugging;
mod ending;
mod intervals;
mod late;
mod source;
mod taping;
mod unreleased;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdma_log::Seq;

use crate::backends::disk::{Disk, DiskFailure};
use crate::checkpoint::{CheckpointError, Image, Remembered, Shadow};
use crate::digest::Digest;
use crate::divergence::Divergence;
use crate::entry::{
    Base, Body, Control, Decoder, Entry, EntryError, LoggedInput, OutputsDigest, Part, Step,
};
use crate::event::{Input, Output};
use crate::machine::{Machine, MachineError, Phase, Stepped};
use crate::orders::{Order, Orders, Pace};
use crate::position::Position;
use crate::spool::Spool;
use crate::version::Version;
pub use debugging::{Debugger, Go, Stop};
pub use ending::Remains;
use intervals::Adopting;
pub use source::{Arrived, Inputs, LogError, LogSource};
use taping::Taping;
use unreleased::Unreleased;

/// Why a replay stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// This execution is not the recorded one.
    #[error(transparent)]
    Diverged(Box<Divergence>),
    /// The log.
    #[error("the log is unusable: {0}")]
    Log(#[from] LogError),
    /// An entry.
    #[error("entry {seq} of the log is unusable: {source}")]
    Entry {
        /// Its number.
        seq: u64,
        /// Why.
        source: EntryError,
    },
    /// The machine.
    #[error(transparent)]
    Machine(MachineError),
    /// This side's disk image.
    #[error(transparent)]
    Disk(#[from] DiskFailure),
    /// The debugger that watches it.
    #[error(transparent)]
    Debug(#[from] crate::debug::DebugError),
}

impl From<Divergence> for ReplayError {
    fn from(divergence: Divergence) -> Self {
        Self::Diverged(Box::new(divergence))
    }
}

/// How a replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayEnd {
    /// The log is over: its last entry was replayed.
    LogOver,
    /// The recorder ended on purpose, and everything was equal.
    Finished {
        /// Hash of the whole memory, on both sides.
        memory_hash: u64,
    },
    /// It has come to the position that was asked for, which is not the log's end.
    There,
    /// An order ended it.
    Stopped,
}

/// The last comparison of whole memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryCheck {
    /// Where.
    pub position: Position,
    /// The hash that both sides had.
    pub hash: u64,
}

/// Runs a machine from a log.
pub struct Replayer<L> {
    machine: Machine,
    source: L,
    decoder: Decoder,
    orders: Arc<Orders>,
    /// Outputs that the primary may not have released yet: sent again if this side goes live.
    unreleased: Unreleased,
    /// Whether outputs are kept: this side may go live.
    may_serve: bool,
    released: Seq,
    last_seq: Seq,
    last_digest_at: Position,
    clock_came: Instant,
    memory_checks: u64,
    last_memory_check: Option<MemoryCheck>,
    spin: Duration,
    /// What the guest may have of its time, once it is live here.
    share: Pace,
    /// A checkpoint, or an interval, of which not all parts have come: nothing of it counts.
    shadow: Shadow,
    /// This side's image, to which is done what the log says was asked of the primary's.
    disk: Option<Arc<Disk>>,
    /// Where those look who want to see the console after a take-over.
    spool: Option<Arc<Spool>>,
    /// Set when the guest has turned itself off.
    off: Arc<AtomicBool>,
    /// The log carries intervals.
    adopts: Option<Adopting>,
    /// A flight recorder keeps what comes.
    taping: Option<Taping>,
    /// What checkpoints have told of pages.
    told: Option<Remembered>,
    /// Where it ends, if the log does not end before.
    to: Option<Position>,
    debugger: Option<Box<dyn Debugger + Send>>,
    /// What its primary says has left had committed with all that led to it, also where it was asked of a disk.
    sure_of_disks: bool,
}

impl<L: LogSource> Replayer<L> {
    /// A replayer of a fresh machine.
    #[must_use]
    pub fn new(machine: Machine, source: L, orders: Arc<Orders>, spin: Duration) -> Self {
        let shadow = Shadow::new(machine.pages());
        Self {
            machine,
            source,
            decoder: Decoder::default(),
            orders,
            unreleased: Unreleased::default(),
            may_serve: true,
            released: Seq::ZERO,
            last_seq: Seq::ZERO,
            last_digest_at: Position(0),
            clock_came: Instant::now(),
            memory_checks: 0,
            last_memory_check: None,
            spin,
            share: Pace::FULL,
            shadow,
            disk: None,
            spool: None,
            off: Arc::default(),
            adopts: None,
            taping: None,
            told: None,
            to: None,
            debugger: None,
            sure_of_disks: false,
        }
    }

    /// Of a log in this version.
    #[must_use]
    pub fn speaking(mut self, version: Version) -> Self {
        self.decoder = std::mem::take(&mut self.decoder).speaking(version);
        self
    }

    /// Of a primary that counts what it asks of its own disk as left only once all has committed that led to it.
    #[must_use]
    pub fn sure_of_disks(mut self, sure: bool) -> Self {
        self.sure_of_disks = sure;
        self
    }

    /// Nobody goes live from it, so that no output is kept: a recording says of none that it has left.
    #[must_use]
    pub fn for_show(mut self) -> Self {
        self.may_serve = false;
        self
    }

    /// With an image of this side's.
    #[must_use]
    pub fn with_disk(mut self, disk: Option<Arc<Disk>>) -> Self {
        self.disk = disk;
        self
    }

    /// What the primary's console has let out is kept there, from where this machine stands.
    #[must_use]
    pub fn with_spool(mut self, spool: Arc<Spool>) -> Self {
        spool.begin_at(self.machine.printed());
        self.spool = Some(spool);
        self
    }

    /// Whether the guest has turned itself off, for another thread.
    #[must_use]
    pub fn off(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.off)
    }

    /// Goes on from where a copy of a running machine was made: what the log's next entry counts from.
    #[must_use]
    pub fn from_copy(mut self, base: Base) -> Self {
        self.decoder.rebase(base);
        self.last_digest_at = self.machine.position();
        self
    }

    /// Starts the threads of the machine's vCPUs, if they have any; see [`Machine::man`].
    ///
    /// # Errors
    /// [`MachineError::Threads`].
    pub fn man(&mut self, first: impl Fn() + Clone + Send + 'static) -> Result<(), MachineError> {
        self.machine.man(first)
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The source.
    pub fn source(&mut self) -> &mut L {
        &mut self.source
    }

    /// How many times whole memories were compared, and the last time.
    #[must_use]
    pub fn memory_checks(&self) -> (u64, Option<MemoryCheck>) {
        (self.memory_checks, self.last_memory_check)
    }

    /// Replays until the log is over or an order ends it.
    ///
    /// # Errors
    /// See [`ReplayError`]; after one this machine can never go live.
    pub fn run(&mut self) -> Result<ReplayEnd, ReplayError> {
        self.orders.attach(self.machine.kick_handle());
        // A copy begins where it was taken, and is behind nobody before the first entry comes.
        self.orders.working(self.machine.position());
        self.orders.resting();
        let mut idle_since: Option<Instant> = None;
        loop {
            if self.orders.waiting() && self.orders.take_if(|order| order == Order::Stop).is_some()
            {
                return Ok(ReplayEnd::Stopped);
            }
            self.attend();
            let Some(arrived) = self.source.next()? else {
                if self.source.is_over()? {
                    return Ok(ReplayEnd::LogOver);
                }
                let since = *idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() < self.spin {
                    std::hint::spin_loop();
                } else {
                    self.source.wait(Duration::from_millis(10));
                }
                continue;
            };
            idle_since = None;
            self.orders.working(self.machine.position());
            let (seq, marks) = (arrived.seq, arrived.marks);
            let base = self.decoder.base();
            let entry = self
                .decoder
                .decode(arrived.payload)
                .map_err(|source| ReplayError::Entry { seq: seq.0, source })?;
            if let Some(taping) = &mut self.taping {
                taping.keep(arrived.payload);
            }
            self.has_left(marks.released);
            if let Some(end) = self.await_inputs(seq, &entry)? {
                self.decoder.rebase(base);
                return Ok(end);
            }
            self.last_seq = seq;
            if let Some(end) = self.ends_before(entry.position)? {
                return Ok(end);
            }
            self.tape(&entry, base)?;
            let end = match self.entry(entry) {
                Ok(end) => end,
                Err(error) => {
                    if let Some(taping) = &mut self.taping {
                        taping.torn();
                    }
                    return Err(error);
                }
            };
            self.source.replayed(seq);
            if matches!(self.machine.phase(), Phase::Off(_)) {
                self.off.store(true, Ordering::Release);
            }
            self.orders.resting();
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// The primary says that what came of its entries up to this one has left.
    fn has_left(&mut self, released: Seq) {
        self.released = self.released.max(released);
        let released = self.released;
        while let Some(output) = self.unreleased.next_of(released) {
            if let (Some(spool), Output::Console(bytes)) = (&self.spool, &output) {
                spool.feed(bytes);
            }
        }
    }

    fn entry(&mut self, entry: Entry) -> Result<Option<ReplayEnd>, ReplayError> {
        if self.adopts.is_some() {
            return self.interval(entry).map(|()| None);
        }
        if !self.run_to(entry.position)? {
            return Ok(Some(ReplayEnd::Stopped));
        }
        if !self.shadow.is_empty() && !matches!(entry.body, Body::Part(_)) {
            return Err(LogError("another entry came in the middle of a checkpoint".into()).into());
        }
        match entry.body {
            Body::Part(part) => self.part(&part).map(|()| None),
            Body::Step(step) => self.step(step),
            Body::MemoryHash(expected) => {
                let found = self.machine.memory_hash().map_err(ReplayError::Machine)?;
                if found != expected {
                    return Err(self.divergence(
                        "memory hash",
                        format!("{expected:016x}"),
                        format!("{found:016x}"),
                    ));
                }
                self.memory_checks += 1;
                self.last_memory_check = Some(MemoryCheck {
                    position: entry.position,
                    hash: found,
                });
                Ok(None)
            }
            Body::Control { digest, what } => self.control(digest, what).map(|()| None),
            Body::End {
                digest,
                memory,
                state,
            } => {
                self.compare_digest(digest)?;
                let found = self
                    .machine
                    .memory_hash_full()
                    .map_err(ReplayError::Machine)?;
                if found != memory {
                    return Err(self.divergence(
                        "memory hash",
                        format!("{memory:016x}"),
                        format!("{found:016x}"),
                    ));
                }
                let found_state = self.machine.final_state().map_err(ReplayError::Machine)?;
                if found_state != state {
                    return Err(self.divergence(
                        "state",
                        format!("{state:016x}"),
                        format!("{found_state:016x}"),
                    ));
                }
                Ok(Some(ReplayEnd::Finished { memory_hash: found }))
            }
        }
    }

    /// Runs on to the position: every exit on the way is one without inputs and outputs. False if ordered to stop.
    fn run_to(&mut self, position: Position) -> Result<bool, ReplayError> {
        if position < self.machine.position() {
            return Err(LogError(format!(
                "an entry for position {position} after one for {}",
                self.machine.position()
            ))
            .into());
        }
        while self.machine.position() < position {
            if self.machine.phase() != Phase::Ready {
                let expected = "none (the log goes on without one)".to_owned();
                let found = format!("the guest waits: {:?}", self.machine.phase());
                return Err(self.divergence("input", expected, found));
            }
            if self.machine.has_outputs() {
                let count = self.machine.outputs().count();
                return Err(self.divergence("outputs", "none".into(), count.to_string()));
            }
            loop {
                self.orders.resting();
                let stepped = self.machine.step().map_err(ReplayError::Machine)?;
                self.orders.working(self.machine.position());
                if stepped == Stepped::SyncPoint {
                    break;
                }
                if !self.consult(stepped)? {
                    return Ok(false);
                }
                if self.orders.waiting()
                    && self.orders.take_if(|order| order == Order::Stop).is_some()
                {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Gathers a checkpoint and, when it is whole, becomes the machine that was saved: so far did the recorded one run
    /// after its last sync point.
    fn part(&mut self, part: &Part) -> Result<(), ReplayError> {
        self.shadow
            .add(part.number, &part.bytes)
            .map_err(|error| unusable(error.into()))?;
        if !part.last {
            return Ok(());
        }
        if self.machine.has_outputs() {
            let count = self.machine.outputs().count();
            return Err(self.divergence("outputs", "none".into(), count.to_string()));
        }
        let (position, digest) = (self.machine.position(), self.machine.digest());
        let bytes = self.shadow.take();
        let image = self.checkpoint(&bytes)?;
        self.machine.restore_image(image).map_err(unusable)?;
        if self.machine.position() != position {
            let other = self.machine.position();
            return Err(LogError(format!(
                "a checkpoint of position {other} stands at position {position}"
            ))
            .into());
        }
        if self.machine.digest() != digest {
            let expected = self.machine.digest().to_string();
            return Err(self.divergence("digest", expected, digest.to_string()));
        }
        self.last_digest_at = position;
        Ok(())
    }

    /// The checkpoint that has come, with all pages whole; and it is on the tape.
    fn checkpoint<'a>(&mut self, bytes: &'a [u8]) -> Result<Image<'a>, ReplayError> {
        let version = self.decoder.version();
        let pages = self.machine.pages();
        let image = if version.patches_pages() {
            let told = self.told.get_or_insert_with(|| Remembered::new(pages));
            told.complete(bytes, pages)
        } else {
            Image::parse(bytes, pages)
        };
        let image = image.map_err(|error| unusable(error.into()))?;
        if let Some(taping) = &mut self.taping {
            let whole = version.patches_pages().then(|| image.sealed(pages));
            let whole = whole.as_deref().unwrap_or(bytes);
            taping.checkpoint(self.machine.position(), whole, version);
        }
        Ok(image)
    }

    /// What was done to the recorded machine on purpose is done to this one.
    fn control(&mut self, digest: Digest, what: Control) -> Result<(), ReplayError> {
        self.compare_digest(digest)?;
        if self.machine.has_outputs() {
            let count = self.machine.outputs().count();
            return Err(self.divergence("outputs", "none".into(), count.to_string()));
        }
        match what {
            Control::HandOver { stood } => {
                self.orders.report_handed_over(Duration::from_nanos(stood))
            }
            Control::PowerOff(status) => self.machine.turn_off(status),
            Control::Reset(wish) => {
                let (orders, position) = (&self.orders, self.machine.position());
                let turn = || {
                    orders.resting();
                    orders.working(position);
                };
                self.machine.reset(turn).map_err(ReplayError::Machine)?;
                self.orders.report_reset(wish);
            }
            // A replay has no reason to be slow; whoever goes live from it has.
            Control::Share(share) => self.share = Pace::of(share),
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<Option<ReplayEnd>, ReplayError> {
        if let Some(expected) = &step.exit
            && let Some(found) = self.machine.history().at(self.machine.position())
            && let Some(difference) = expected.first_difference(found)
        {
            return Err(self.divergence(difference.field, difference.expected, difference.found));
        }
        self.compare_digest(step.digest)?;
        let mut outputs = OutputsDigest::default();
        let mut asked = Vec::new();
        let made: Vec<Output> = self.machine.outputs().collect();
        for output in made {
            outputs.add(&output);
            if let Output::Disk(request) = output {
                asked.push(request);
                continue;
            }
            self.keep_output(output)?;
        }
        let expected = step.outputs.unwrap_or_default();
        if outputs != expected {
            return Err(self.divergence("outputs", show_outputs(expected), show_outputs(outputs)));
        }
        if let Some(disk) = &self.disk {
            // Nothing of an execution that differs.
            for request in asked {
                disk.follow(request)?;
            }
        }
        for input in step.inputs {
            self.supply(input)?;
        }
        Ok(None)
    }

    /// Keeps an output of the last entry until it is known to have left.
    fn keep_output(&mut self, output: Output) -> Result<(), LogError> {
        match self.may_serve {
            true => self.unreleased.keep(self.last_seq, output),
            false => Ok(()),
        }
    }

    fn supply(&mut self, input: LoggedInput) -> Result<(), ReplayError> {
        match input {
            LoggedInput::Clock(time) => {
                self.clock_came = Instant::now();
                self.give(&Input::Clock(time))
            }
            LoggedInput::Random(bytes) => self.give(&Input::Random(bytes)),
            LoggedInput::Tick(count) => self.give(&Input::Tick(count)),
            LoggedInput::Console(bytes) => self.give(&Input::Console(bytes)),
            LoggedInput::Disk { count, checksum } => {
                let mut found = 0;
                for _ in 0..count {
                    let done = self.source.done()?;
                    found = rdma_log::crc32c_append(found, &done.encode());
                    self.give(&Input::Disk(done))?;
                }
                self.staged_as_said("answers of the disk", found, checksum)
            }
            LoggedInput::Frames { count, checksum } => {
                let mut found = 0;
                for _ in 0..count {
                    let frame = self.source.frame()?;
                    found = rdma_log::crc32c_append(found, &frame);
                    self.give(&Input::Frame(frame))?;
                }
                self.staged_as_said("frames", found, checksum)
            }
        }
    }

    fn staged_as_said(&self, what: &str, found: u32, expected: u32) -> Result<(), ReplayError> {
        if found == expected {
            return Ok(());
        }
        Err(LogError(format!(
            "the staged {what} of position {} have checksum {found:08x}, their entry says {expected:08x}",
            self.machine.position()
        ))
        .into())
    }

    /// An input that the machine refuses here is one that the recorded machine took: the two differ.
    fn give(&mut self, input: &Input) -> Result<(), ReplayError> {
        match self.machine.supply(input) {
            Ok(()) => Ok(()),
            Err(error @ (MachineError::Unfit { .. } | MachineError::Device(_))) => {
                Err(self.divergence("input", "taken".into(), error.to_string()))
            }
            Err(error) => Err(ReplayError::Machine(error)),
        }
    }

    fn compare_digest(&mut self, expected: Digest) -> Result<(), ReplayError> {
        let found = self.machine.digest();
        if found != expected {
            return Err(self.divergence("digest", expected.to_string(), found.to_string()));
        }
        self.last_digest_at = self.machine.position();
        Ok(())
    }

    fn divergence(&self, field: &'static str, expected: String, found: String) -> ReplayError {
        Divergence::new(&self.machine, self.last_digest_at, field, expected, found).into()
    }
}

fn unusable(error: CheckpointError) -> ReplayError {
    match error {
        CheckpointError::Machine(error) => ReplayError::Machine(error),
        error => LogError(format!("a checkpoint in it: {error}")).into(),
    }
}

fn show_outputs(outputs: OutputsDigest) -> String {
    format!("{} with checksum {:08x}", outputs.count, outputs.checksum)
}
