//! The log over a ring: the recorder's sink and the replayer's source.
#![forbid(unsafe_code)]

mod proof;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdma_log::transport::network::Watch;
use rdma_log::{
    Epoch, Fenced, LaneReader, LaneWriter, Marks, Missing, Progress, ReadError, Seq, WriteError,
};

use crate::devices::DISK_DEPTH;
use crate::disk::{Assembler, Done};
use crate::flight::Tape;
use crate::gate::Committed;
use crate::orders::Samples;
use crate::replay::{Arrived, Inputs, LogError, LogSource};
use crate::sink::{Sink, SinkError};
use crate::version::Version;
pub use proof::Proof;

/// An input's kind is the first byte of its payload.
pub const INPUT_FRAME: u8 = 1;
/// A piece of the machine's copy, before the log begins (`session/freight.rs`).
pub const INPUT_COPY: u8 = 2;
/// A part of what came of a request to the disk.
pub const INPUT_DONE: u8 = 3;

/// What of a slot for a frame must be zero before one is read into it: the kind and the longest headers that say how long the frame is
/// (Ethernet with a VLAN tag, IPv6).
pub const FRAME_HEAD: usize = 1 + 18 + 40;

/// The events lane, as the recorder writes it.
pub struct RingSink {
    lane: Option<LaneWriter>,
    marks: Marks,
    last: Seq,
    /// Bytes of the entry that found no room: what to wait for.
    refused: usize,
    /// How far the inputs lane has committed; the I/O thread, which writes it, keeps it current.
    inputs: Arc<AtomicU64>,
    window: Option<Window>,
    /// Where the log is a stream: what tells how far either lane has committed.
    watch: Option<Watch>,
    /// When the oldest entry that was not pushed was posted.
    gathering: Option<Instant>,
    /// Of a stream: since when something is posted and no more of it has committed.
    open_since: Option<Instant>,
    /// The reader is a backup, which can be given up.
    to_backup: bool,
    version: Version,
}

/// No network answers sooner, with a thread to be woken at its other end. The thread that waits at the descriptor may stand in line for
/// the CPU of the vCPU thread, which therefore asks too, but not right after each entry that it posts.
const ROUND_TRIP: Duration = Duration::from_micros(20);

/// How long entries that nothing waits for may gather before they are sent over a stream: a send costs the vCPU thread about
/// as much as a cheap exit, so this bounds it to a few in a hundred of its time, and is short against the window.
const GATHER: Duration = Duration::from_micros(200);

impl RingSink {
    /// A sink for this reign.
    #[must_use]
    pub fn new(lane: LaneWriter, epoch: Epoch, inputs: Arc<AtomicU64>) -> Self {
        Self {
            lane: Some(lane),
            marks: Marks {
                epoch,
                ..Marks::default()
            },
            inputs,
            ..Self::detached()
        }
    }

    /// No log yet: everything counts as committed. A new one takes its place when a backup joins.
    #[must_use]
    pub fn detached() -> Self {
        Self {
            lane: None,
            marks: Marks::default(),
            last: Seq::ZERO,
            refused: 0,
            inputs: Arc::default(),
            window: None,
            watch: None,
            gathering: None,
            open_since: None,
            to_backup: false,
            version: Version::NEWEST,
        }
    }

    /// For a reader with whom this version was agreed on.
    #[must_use]
    pub fn speaking(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// For a log to a backup: where that breaks the rules the machine goes on without it.
    #[must_use]
    pub fn to_backup(mut self) -> Self {
        self.to_backup = true;
        self
    }

    /// For a log over a stream, whose commits come later than the posts.
    #[must_use]
    pub fn with_watch(mut self, watch: Watch) -> Self {
        self.watch = Some(watch);
        self
    }

    fn error(&self, error: WriteError) -> SinkError {
        match error {
            WriteError::Full { .. } => SinkError::Full,
            WriteError::Fenced => SinkError::Fenced,
            WriteError::Closed | WriteError::Counter { .. } | WriteError::Transport { .. }
                if self.watch.is_some() =>
            {
                SinkError::Closed
            }
            other if self.to_backup => SinkError::Unusable(other.to_string()),
            other => SinkError::Broken(other.to_string()),
        }
    }

    /// Bounds how long an entry may wait to be replayed.
    #[must_use]
    pub fn with_window(mut self, window: Window) -> Self {
        self.window = Some(window);
        self
    }
}

/// The window of time within which the backup must have replayed an entry; beyond it the primary waits.
///
/// It notes when entries were posted, a few in each window, and asks the reader's counters only when the oldest note is
/// older than the window: in the steady state some thousand times a second, never for each entry.
#[derive(Debug)]
pub struct Window {
    length: Duration,
    progress: Progress,
    noted: VecDeque<(Seq, Instant)>,
    /// What the backup has replayed, for whoever listens for signs of life.
    replayed: Arc<AtomicU64>,
    /// A backup that joins does not replay before its copy is whole: until then nobody waits for it.
    in_step: Arc<AtomicBool>,
    /// What the reader says of itself cannot be, and the next entry is not to be posted.
    broken: Option<WriteError>,
}

/// Notes in one window. More of them find the end of a delay sooner, by a sixteenth of the window.
const NOTES: u32 = 16;

impl Window {
    /// A window of this length; `replayed` is kept current. It counts once `in_step` is set.
    #[must_use]
    pub fn new(
        length: Duration,
        progress: Progress,
        replayed: Arc<AtomicU64>,
        in_step: Arc<AtomicBool>,
    ) -> Self {
        Self {
            in_step,
            length,
            progress,
            noted: VecDeque::with_capacity(2 * NOTES as usize),
            replayed,
            broken: None,
        }
    }

    fn posted(&mut self, seq: Seq) {
        let now = Instant::now();
        let due = |&(_, last): &(Seq, Instant)| now - last >= self.length / NOTES;
        if self.noted.back().is_none_or(due) {
            self.noted.push_back((seq, now));
        }
    }

    fn is_behind(&mut self) -> bool {
        if !self.in_step.load(Ordering::Relaxed) {
            return false;
        }
        while let Some(&(seq, at)) = self.noted.front() {
            if at.elapsed() < self.length {
                return false;
            }
            // Nobody replays a log that is fenced or that lies about itself: the next entry is refused and says why.
            let replayed = match self.progress.poll() {
                Ok([events, _]) if !events.fenced => events.replayed,
                Ok(_) => return false,
                Err(error) => {
                    self.broken = Some(error);
                    return false;
                }
            };
            self.replayed.fetch_max(replayed.0, Ordering::Relaxed);
            if replayed < seq {
                return true;
            }
            self.noted.pop_front();
        }
        false
    }
}

impl Sink for RingSink {
    fn post(&mut self, payload: &[u8]) -> Result<Seq, SinkError> {
        self.post_pieces(&[payload])
    }

    fn post_pieces(&mut self, pieces: &[&[u8]]) -> Result<Seq, SinkError> {
        if let Some(error) = self
            .window
            .as_ref()
            .and_then(|window| window.broken.clone())
        {
            return Err(self.error(error));
        }
        self.refused = pieces.iter().map(|piece| piece.len()).sum();
        self.last = match &mut self.lane {
            Some(lane) => match lane.append_gather(pieces, self.marks) {
                Ok(seq) => seq,
                Err(error) => return Err(self.error(error)),
            },
            None => self.last.next(),
        };
        if self.watch.is_some() {
            let now = Instant::now();
            self.gathering.get_or_insert(now);
            self.open_since.get_or_insert(now);
        }
        if let Some(window) = &mut self.window {
            window.posted(self.last);
        }
        Ok(self.last)
    }

    fn committed(&mut self) -> Committed {
        let Some(lane) = &mut self.lane else {
            return Committed::EVERYTHING;
        };
        // Where to ask is a system call, it is not made while no answer can have come. A lane that cannot say commits nothing more; the
        // next post gives the reason.
        let asks = match &self.watch {
            Some(watch) if !watch.is_memory() => self
                .open_since
                .is_some_and(|since| since.elapsed() >= ROUND_TRIP),
            _ => true,
        };
        let before = self.marks.committed;
        if asks && let Ok(events) = lane.committed() {
            self.marks.committed = self.marks.committed.max(events);
        }
        if let Some(watch) = &self.watch {
            let [events, inputs] = watch.committed();
            self.marks.committed = self.marks.committed.max(events);
            let events = self.marks.committed;
            if events >= self.last {
                self.open_since = None;
            } else if events > before {
                self.open_since = Some(Instant::now());
            }
            return Committed { events, inputs };
        }
        Committed {
            events: self.marks.committed,
            inputs: Seq(self.inputs.load(Ordering::Acquire)),
        }
    }

    fn released(&mut self, released: Seq) {
        self.marks.released = self.marks.released.max(released);
    }

    fn notify(&mut self, urgent: bool) {
        let gathers = self.gathering.is_some_and(|since| since.elapsed() < GATHER);
        if gathers && !urgent {
            return;
        }
        self.gathering = None;
        if let Some(lane) = &mut self.lane {
            // The next post reports what is wrong.
            let _ = lane.notify();
        }
    }

    fn wait_for_room(&mut self, longest: Duration) {
        if let Some(lane) = &mut self.lane {
            let room = self.refused.max(4096).min(lane.max_payload());
            let _ = lane.wait_for_room(room, longest);
        }
    }

    fn is_behind(&mut self) -> bool {
        let behind = self.window.as_mut().is_some_and(Window::is_behind);
        if behind {
            // What was not sent is not replayed.
            self.notify(true);
        }
        behind
    }

    fn keeps(&self) -> bool {
        self.lane.is_some()
    }

    fn version(&self) -> Version {
        self.version
    }

    fn max_payload(&self) -> usize {
        self.lane
            .as_ref()
            .map_or(rdma_log::MIN_LANE / 8, LaneWriter::max_payload)
    }

    fn detach(&mut self) {
        self.lane = None;
        self.window = None;
        self.watch = None;
        self.gathering = None;
        self.open_since = None;
    }
}

/// Both lanes, as the replayer reads them.
pub struct RingSource {
    events: LaneReader,
    inputs: LaneReader,
    /// Left by the thread that fences, when the fence has returned.
    fenced: Proof,
    arrived: Arc<AtomicU64>,
    /// Where what comes is counted.
    samples: Option<Arc<Samples>>,
    staged: Staged,
    /// Frames that a checkpoint covers and that have not come yet: over a network the lanes are not in step.
    covered: u64,
}

/// Frames of a ring that are kept while an input of the other kind is looked for: no primary has more that it has read and not applied than
/// fit its stage, and a copy brings a thousand at most.
const KEPT_FRAMES: usize = 4096;

/// The same of answers of the disk: as many as a guest can have under way, twice over.
const KEPT_DONE: usize = 2 * DISK_DEPTH;

/// Inputs that were read and that no entry has applied yet, by kind: an entry applies them in the order of their kind.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    frames: VecDeque<Vec<u8>>,
    done: VecDeque<Done>,
    parts: Assembler,
}

impl Staged {
    /// Takes the next input of the lane.
    pub(crate) fn take_in(&mut self, payload: &[u8]) -> Result<(), LogError> {
        match payload.split_first() {
            Some((&INPUT_FRAME, frame)) => self.frames.push_back(frame.to_vec()),
            Some((&INPUT_DONE, part)) => {
                let done = self.parts.part(part);
                self.done
                    .extend(done.map_err(|error| LogError(error.to_string()))?);
            }
            Some((kind, _)) => {
                return Err(LogError(format!("a staged input of unknown kind {kind}")));
            }
            None => return Err(LogError("an empty staged input".into())),
        }
        Ok(())
    }

    /// Nobody who keeps the rules leaves so many unapplied; whoever does not would fill this side's memory with them.
    fn bounded(&self) -> Result<(), LogError> {
        for (what, found, most) in [
            ("frames", self.frames.len(), KEPT_FRAMES),
            ("answers of the disk", self.done.len(), KEPT_DONE),
        ] {
            if found > most {
                return Err(LogError(format!(
                    "more than {most} {what} are staged that no entry applies"
                )));
            }
        }
        Ok(())
    }

    /// Whether there are fewer of either kind.
    fn lacks(&self, frames: u32, dones: u32) -> bool {
        self.frames.len() < frames as usize || self.done.len() < dones as usize
    }

    /// So many of either kind, the next ones, without taking them.
    fn show(&self, frames: u32, dones: u32, to: &Tape) {
        for frame in self.frames.iter().take(frames as usize) {
            to.frame(frame);
        }
        for done in self.done.iter().take(dones as usize) {
            to.done(done);
        }
    }

    pub(crate) fn frame(&mut self) -> Option<Vec<u8>> {
        self.frames.pop_front()
    }

    pub(crate) fn done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }
}

fn log_error(error: ReadError) -> LogError {
    LogError(error.to_string())
}

impl RingSource {
    /// A source that is over once the proof was left in `fenced` and everything committed was read.
    #[must_use]
    pub fn new(events: LaneReader, inputs: LaneReader, fenced: Proof) -> Self {
        Self {
            events,
            inputs,
            fenced,
            arrived: Arc::default(),
            samples: None,
            staged: Staged::default(),
            covered: 0,
        }
    }

    /// What comes is counted there.
    #[must_use]
    pub fn counted(mut self, samples: Arc<Samples>) -> Self {
        self.samples = Some(samples);
        self
    }

    /// These frames come before those of the lane.
    #[must_use]
    pub fn carrying(mut self, frames: Vec<Vec<u8>>) -> Self {
        self.staged.frames = frames.into();
        self
    }

    /// The number of the last entry that came, for whoever listens for signs of life.
    #[must_use]
    pub fn arrivals(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.arrived)
    }

    /// The proof of the fence, if there was one.
    #[must_use]
    pub fn into_proof(self) -> Option<Fenced> {
        self.fenced.take()
    }

    /// The next of what `take` takes out, if it has come: what came with a copy first.
    fn staged<T>(
        &mut self,
        take: impl Fn(&mut Staged) -> Option<T>,
    ) -> Result<Option<T>, LogError> {
        loop {
            if let Some(staged) = take(&mut self.staged) {
                return Ok(Some(staged));
            }
            match self.inputs.next().map_err(log_error)? {
                Some(entry) => self.staged.take_in(entry.payload())?,
                None => return Ok(None),
            }
            self.staged.bounded()?;
        }
    }

    /// The next of what `take` takes out. It was there before the entry that applies it.
    fn applied<T>(&mut self, take: impl Fn(&mut Staged) -> Option<T>) -> Result<T, LogError> {
        if let Some(staged) = self.staged(&take)? {
            return Ok(staged);
        }
        // The tail says whether it is damaged.
        self.inputs.wait(Duration::ZERO).map_err(log_error)?;
        self.staged(&take)?
            .ok_or_else(|| LogError("an entry applies a staged input that is not there".into()))
    }

    /// Takes in what has come of the inputs lane, as far as so many of either kind want it; whether that is enough.
    fn gather(&mut self, frames: u32, dones: u32) -> Result<bool, LogError> {
        while self.staged.lacks(frames, dones) {
            match self.inputs.next().map_err(log_error)? {
                Some(entry) => self.staged.take_in(entry.payload())?,
                None => return Ok(false),
            }
            self.staged.bounded()?;
        }
        Ok(true)
    }

    fn drop_covered(&mut self) -> Result<(), LogError> {
        while self.covered > 0 && self.staged(Staged::frame)?.is_some() {
            self.covered -= 1;
        }
        Ok(())
    }

    /// Frames that were staged and not applied, and last the one that the dead primary may have been reading: its bytes
    /// are unverified, as those of any frame on a wire.
    ///
    /// # Errors
    /// [`LogError`] before the fence, or for a corrupt lane.
    pub fn leftover_frames(&mut self) -> Result<Vec<Vec<u8>>, LogError> {
        self.drop_covered()?;
        let mut frames = Vec::new();
        // What came of requests to the disk is of no use any more: they are made again, of this side's image.
        while let Some(frame) = self.staged(Staged::frame)? {
            frames.push(frame);
        }
        let inputs = &mut self.inputs;
        let salvaged = self
            .fenced
            .with(|fenced| inputs.salvage(fenced))
            .ok_or_else(|| LogError("the log is not fenced".into()))?;
        if let Some(bytes) = salvaged.map_err(log_error)? {
            frames.extend(salvaged_frame(&bytes));
        }
        Ok(frames)
    }
}

/// The frame in a slot whose length was lost with its writer, by what its headers say. The kernel fills a slot in one go, so where they
/// are, the rest is, too; behind the frame lies what an earlier lap left. Of a protocol that does not tell its length nothing is
/// taken: lost, as on a wire.
fn salvaged_frame(slot: &[u8]) -> Option<Vec<u8>> {
    /// The shortest Ethernet frame. What it pads with says nothing.
    const SHORTEST: usize = 60;
    const VLAN: [u16; 2] = [0x8100, 0x88a8];
    let frame = match slot.split_first() {
        Some((&INPUT_FRAME, frame)) => frame,
        _ => return None,
    };
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let begins = if VLAN.contains(&word(12)?) { 18 } else { 14 };
    let length = match word(begins - 2)? {
        0x0800 => begins + usize::from(word(begins + 2)?),
        0x86dd => begins + 40 + usize::from(word(begins + 4)?),
        0x0806 => SHORTEST,
        // Not a protocol but a length; nothing at all where nothing was read.
        length @ 1..=1500 => begins + usize::from(length),
        _ => return None,
    };
    let length = length.max(SHORTEST).min(frame.len());
    Some(frame[..length].to_vec())
}

impl LogSource for RingSource {
    fn next(&mut self) -> Result<Option<Arrived<'_>>, LogError> {
        match self.events.next().map_err(log_error)? {
            Some(entry) => {
                self.arrived.store(entry.seq().0, Ordering::Relaxed);
                if let Some(samples) = &self.samples {
                    samples.meter().came(entry.payload().len());
                }
                Ok(Some(Arrived {
                    seq: entry.seq(),
                    marks: entry.marks(),
                    payload: entry.payload(),
                }))
            }
            None => Ok(None),
        }
    }

    fn inputs(&mut self, frames: u32, dones: u32) -> Result<Inputs, LogError> {
        if self.gather(frames, dones)? {
            return Ok(Inputs::Here);
        }
        // Asked before the last look: what comes between the two is then found.
        let missing = self.inputs.missing().map_err(log_error)?;
        if self.gather(frames, dones)? {
            return Ok(Inputs::Here);
        }
        Ok(match missing {
            Missing::Damaged => Inputs::Here,
            // Whoever goes live needs the proof, which is left a moment after the fence.
            Missing::Lost if self.fenced.is_there() => Inputs::Lost,
            Missing::Coming | Missing::Lost => Inputs::Coming,
        })
    }

    fn frame(&mut self) -> Result<Vec<u8>, LogError> {
        self.applied(Staged::frame)
    }

    fn done(&mut self) -> Result<Done, LogError> {
        self.applied(Staged::done)
    }

    fn show(&mut self, frames: u32, dones: u32, to: &Tape) -> Result<(), LogError> {
        self.gather(frames, dones)?;
        self.staged.show(frames, dones, to);
        Ok(())
    }

    fn cover(&mut self, frames: u32) -> Result<(), LogError> {
        self.covered += u64::from(frames);
        self.drop_covered()
    }

    fn replayed(&mut self, seq: Seq) {
        // Both can only fail for a number that was not read, or on a connection that the next read reports.
        let _ = self.events.set_received(seq);
        let _ = self.events.set_replayed(seq);
        let _ = self.events.notify();
    }

    fn is_over(&mut self) -> Result<bool, LogError> {
        let events = &mut self.events;
        let ended = self.fenced.with(|proof| events.at_end(proof));
        ended.unwrap_or(Ok(false)).map_err(log_error)
    }

    fn wait(&mut self, longest: Duration) {
        // An error shows at the next read.
        let _ = self.events.wait(longest);
    }

    fn wait_for_inputs(&mut self, longest: Duration) {
        let _ = self.inputs.wait(longest);
    }
}

#[cfg(test)]
mod tests {
    use rdma_log::transport::{shm, sim};
    use rdma_log::{Lane, MIN_LANE, Nonce, RingConfig};

    use super::*;

    const SMALL: RingConfig = RingConfig {
        events: MIN_LANE,
        inputs: MIN_LANE,
    };

    #[test]
    fn an_input_that_is_late_is_waited_for_and_one_that_is_lost_is_known_to_be() {
        let (mut writer, ring, card) = sim::pair(&SMALL, Nonce([7; 16]), 1).unwrap();
        let (proof, mut fencer) = (Proof::default(), ring.fencer);
        let mut source = RingSource::new(ring.events, ring.inputs, proof.clone());
        let mut applies = |source: &mut RingSource| {
            writer.events.append(b"applies", Marks::default()).unwrap();
            card.deliver_all();
            assert!(source.next().unwrap().is_some());
            assert_eq!(source.inputs(1, 0).unwrap(), Inputs::Coming);
            assert_eq!(source.inputs(0, 0).unwrap(), Inputs::Here);
            let frame = [INPUT_FRAME, 9];
            writer.inputs.append(&frame, Marks::default()).unwrap();
        };
        applies(&mut source);
        card.deliver_all();
        assert_eq!(source.inputs(1, 0).unwrap(), Inputs::Here);
        assert_eq!(source.inputs(2, 0).unwrap(), Inputs::Coming);
        assert_eq!(source.frame().unwrap(), [9]);
        applies(&mut source);
        // It is lost on its way.
        let fenced = fencer.fence().unwrap();
        assert_eq!(source.inputs(1, 0).unwrap(), Inputs::Coming);
        proof.leave(fenced);
        assert_eq!(source.inputs(1, 0).unwrap(), Inputs::Lost);
    }

    #[test]
    fn where_the_lanes_are_in_step_an_input_that_is_not_there_is_a_fault() {
        let (mut writer, ring) = shm::pair(&SMALL).unwrap();
        let mut source = RingSource::new(ring.events, ring.inputs, Proof::default());
        writer.events.append(b"applies", Marks::default()).unwrap();
        assert!(source.next().unwrap().is_some());
        assert_eq!(source.inputs(1, 0).unwrap(), Inputs::Here);
        let error = source.frame().unwrap_err().to_string();
        assert!(error.contains("not there"), "{error}");
    }

    /// In shared memory nobody looks at these numbers but the window.
    #[test]
    fn a_reader_that_says_to_have_replayed_what_was_not_posted_is_of_no_use() {
        let (writer, ring) = shm::pair(&SMALL).unwrap();
        let (replayed, in_step) = (Arc::default(), Arc::new(AtomicBool::new(true)));
        let window = Window::new(Duration::ZERO, writer.progress, replayed, in_step);
        let sink = RingSink::new(writer.events, Epoch(1), Arc::default());
        let mut sink = sink.to_backup().with_window(window);
        sink.post(b"one").unwrap();
        assert!(sink.is_behind());
        ring.acks.replayed(Lane::Events, Seq(1));
        assert!(!sink.is_behind());
        sink.post(b"two").unwrap();
        ring.acks.replayed(Lane::Events, Seq(1000));
        assert!(!sink.is_behind(), "nobody replays it");
        let error = sink.post(b"three").unwrap_err();
        assert!(
            matches!(&error, SinkError::Unusable(why) if why.contains("replayed")),
            "{error}"
        );
        sink.detach();
        sink.post(b"alone").unwrap();
    }

    /// The thread that fences may be kept from its CPU at the very moment at which it has left the proof.
    #[test]
    fn the_proof_is_had_though_whoever_left_it_still_knows_the_place() {
        let (_writer, ring) = shm::pair(&SMALL).unwrap();
        let (proof, mut fencer) = (Proof::default(), ring.fencer);
        let mut source = RingSource::new(ring.events, ring.inputs, proof.clone());
        assert!(!source.is_over().unwrap());
        proof.leave(fencer.fence().unwrap());
        assert!(source.is_over().unwrap());
        assert_eq!(source.leftover_frames().unwrap(), [] as [Vec<u8>; 0]);
        assert!(source.into_proof().is_some());
        assert!(!proof.is_there());
    }

    /// A primary that sends one kind for ever, while the other is waited for, is refused before it has filled this side's memory.
    #[test]
    fn what_no_entry_applies_is_bounded() {
        let done = [vec![INPUT_DONE, 1], vec![0; 9]].concat();
        for (input, most) in [(vec![INPUT_FRAME, 7], KEPT_FRAMES), (done, KEPT_DONE)] {
            let mut staged = Staged::default();
            for _ in 0..most {
                staged.take_in(&input).unwrap();
            }
            staged.bounded().unwrap();
            staged.take_in(&input).unwrap();
            assert!(staged.bounded().unwrap_err().0.contains("no entry applies"));
        }
    }

    /// Bytes of a slot that an earlier lap left are never taken for a part of what was read.
    #[test]
    fn a_salvaged_frame_keeps_what_its_header_says() {
        let mut slot = vec![0xee; 1600];
        slot[..FRAME_HEAD].fill(0);
        slot[0] = INPUT_FRAME;
        assert_eq!(salvaged_frame(&slot), None, "nothing was read into it");
        let length = |headers: &[(usize, &[u8])]| {
            let mut slot = slot.clone();
            slot[1..13].fill(7);
            for (at, bytes) in headers {
                slot[1 + at..1 + at + bytes.len()].copy_from_slice(bytes);
            }
            salvaged_frame(&slot).map(|frame| {
                assert_eq!(frame, slot[1..=frame.len()]);
                frame.len()
            })
        };
        let ipv4: &[u8] = &[8, 0, 0x45, 0, 0, 100];
        assert_eq!(length(&[(12, ipv4)]), Some(114));
        assert_eq!(length(&[(12, &[0x81, 0, 0, 5]), (16, ipv4)]), Some(118));
        assert_eq!(length(&[(12, &[8, 0, 0x45, 0, 0, 40])]), Some(60));
        assert_eq!(length(&[(12, &[8, 0, 0x45, 0, 0xff, 0xff])]), Some(1599));
        assert_eq!(
            length(&[(12, &[0x86, 0xdd]), (18, &[2, 0])]),
            Some(54 + 512)
        );
        assert_eq!(length(&[(12, &[8, 6])]), Some(60));
        assert_eq!(length(&[(12, &[0, 200])]), Some(214));
        assert_eq!(length(&[(12, &[0x88, 0xcc])]), None);
        assert_eq!(length(&[]), None);
        assert_eq!(salvaged_frame(&slot[..10]), None);
    }
}
