//! The tape between the vCPU thread, which must not wait, and the recorder's thread: what goes into the log, in order, and the
//! questions that make a checkpoint.
//!
//! An item is a tag (u8), a length (u32) and as many bytes. An input comes before the entry that applies it, so that a log that is
//! cut between any two items is one that can be replayed up to there.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rdma_log::Seq;
use rdma_log::locks::lock;

use crate::checkpoint::{CheckpointError, Pages};
use crate::disk::Done;
use crate::entry::{Base, part_number};
use crate::gate::Committed;
use crate::machine::{Machine, Phase, Swept};
use crate::position::Position;
use crate::ring_log::{INPUT_DONE, INPUT_FRAME};
use crate::sink::{Sink, SinkError};

pub(super) const INPUT: u8 = 1;
pub(super) const ENTRY: u8 = 2;
/// From here on it is another segment; the position, eight bytes.
pub(super) const CUT: u8 = 3;

const HEAD: usize = 5;

/// Bytes that may wait to be written besides one checkpoint: seconds of a busy guest's log. More is a disk that does not keep up, and memory that a
/// machine needs for itself. A checkpoint is of what the guest wrote since the last one, so one of a guest that was not stopped for long is as large as its memory, however quick the disk is.
const WAITING_MAX: usize = 64 << 20;

/// Pages for which the guest stands while KVM begins to note them anew: half a millisecond's worth.
const SWEPT_AT_ONCE: usize = 512;

const NOTHING: u8 = 0;
const WATCH: u8 = 1;
const SWEEP: u8 = 2;
const CUT_HERE: u8 = 3;
const FORGET: u8 = 4;

/// What the recorder's thread asks of the vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Note from now on what is written.
    Watch,
    /// Go on to say what was.
    Sweep,
    /// Take a checkpoint of what was written since, at the next place, and begin another segment there.
    Cut,
    /// There will be no checkpoint after all.
    Forget,
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Answer {
    Watching,
    Swept(Swept),
    /// The checkpoint's bytes, where it was taken and how long the guest stood.
    Cut(Vec<u8>, Position, Duration),
    Failed(String),
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    ask: AtomicU8,
    /// The recorder's thread takes nothing more.
    over: AtomicBool,
    /// The vCPU thread gives nothing more.
    closed: AtomicBool,
    /// More waited than may.
    overrun: AtomicBool,
}

/// What waits to be written.
#[derive(Debug, Default)]
struct Waiting {
    items: Vec<u8>,
    /// Bytes of the checkpoint whose parts come, and of the largest.
    checkpoint: usize,
    largest: usize,
}

impl Waiting {
    /// Whether so many bytes more may wait. Of a checkpoint its first part is asked for, and the others follow it.
    fn has_room(&self, bytes: usize, part: Option<u32>) -> bool {
        part.is_some_and(|number| number > 0)
            || self.items.len() - self.largest + bytes <= WAITING_MAX
    }

    fn put(&mut self, tag: u8, length: usize, parts: &[&[u8]], part: Option<u32>) {
        let before = self.items.len();
        self.items.push(tag);
        self.items.extend_from_slice(&(length as u32).to_le_bytes());
        for bytes in parts {
            self.items.extend_from_slice(bytes);
        }
        match part {
            Some(0) => self.checkpoint = self.items.len() - before,
            Some(_) => self.checkpoint += self.items.len() - before,
            None => self.checkpoint = 0,
        }
        self.largest = self.largest.max(self.checkpoint);
    }
}

/// The vCPU thread's end.
#[derive(Debug)]
pub struct Tape {
    shared: Arc<Shared>,
    answers: Sender<Answer>,
    watching: bool,
}

/// The end of the recorder's thread.
#[derive(Debug)]
pub(super) struct Spool {
    shared: Arc<Shared>,
    answers: Receiver<Answer>,
}

/// Both ends of a new tape.
pub(super) fn tape() -> (Tape, Spool) {
    let shared = Arc::new(Shared {
        waiting: Mutex::default(),
        ask: AtomicU8::new(NOTHING),
        over: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        overrun: AtomicBool::new(false),
    });
    let (tell, answers) = channel();
    let tape = Tape {
        shared: Arc::clone(&shared),
        answers: tell,
        watching: false,
    };
    (tape, Spool { shared, answers })
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }
}

impl Tape {
    /// A frame that the next entry applies.
    pub fn frame(&self, bytes: &[u8]) {
        self.item(INPUT, &[&[INPUT_FRAME], bytes], None);
    }

    /// What came of a request to the disk, which the next entry applies.
    pub fn done(&self, done: &Done) {
        self.item(INPUT, &[&[INPUT_DONE, 1], &done.encode()], None);
    }

    /// An entry of the events lane.
    pub fn entry(&self, payload: &[u8]) {
        self.item(ENTRY, &[payload], part_number(payload));
    }

    fn item(&self, tag: u8, parts: &[&[u8]], part: Option<u32>) {
        if self.shared.over.load(Ordering::Relaxed) {
            return;
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let mut waiting = self.shared.waiting();
        if waiting.has_room(HEAD + length, part) {
            waiting.put(tag, length, parts, part);
        } else {
            self.shared.overrun.store(true, Ordering::Relaxed);
            // Nothing behind a gap.
            self.shared.over.store(true, Ordering::Relaxed);
        }
    }

    /// Answers what can be answered anywhere between two steps of the guest. Costs one look where nothing is asked.
    pub fn attend(&mut self, machine: &mut Machine) {
        let answer = match self.shared.ask.load(Ordering::Acquire) {
            WATCH => {
                self.watching = true;
                machine.track_for_copy().map(|()| Answer::Watching)
            }
            SWEEP => machine.sweep_uncopied(SWEPT_AT_ONCE).map(Answer::Swept),
            FORGET => {
                self.shared.ask.store(NOTHING, Ordering::Relaxed);
                self.forget(machine);
                return;
            }
            _ => {
                if self.watching && self.shared.over.load(Ordering::Relaxed) {
                    self.forget(machine);
                }
                return;
            }
        };
        self.answer(answer.unwrap_or_else(|error| Answer::Failed(error.to_string())));
    }

    /// No page is noted for a checkpoint any more.
    pub fn forget(&mut self, machine: &mut Machine) {
        if std::mem::take(&mut self.watching) {
            machine.end_copy();
        }
    }

    /// Takes a checkpoint if one is wanted here, where the guest is about to run on from a sync point and everything that was given
    /// to it and came from it there is on the tape. `base` is what the next entry counts from. Whether one was taken: it may have
    /// swallowed a kick.
    pub fn cut(&mut self, machine: &mut Machine, base: Base) -> bool {
        let wanted = self.shared.ask.load(Ordering::Acquire) == CUT_HERE;
        let place = machine.phase() == Phase::Ready && !machine.has_outputs();
        if !wanted || !place {
            return false;
        }
        let started = Instant::now();
        let taken = checkpoint(machine, base);
        let position = machine.position();
        let answer = match taken {
            // The next exit will do.
            Err(error) if error.is_mid_instruction() => return true,
            Ok(bytes) => {
                self.item(CUT, &[&position.0.to_le_bytes()], None);
                Answer::Cut(bytes, position, started.elapsed())
            }
            Err(error) => Answer::Failed(error.to_string()),
        };
        self.forget(machine);
        self.answer(answer);
        true
    }

    fn answer(&self, answer: Answer) {
        self.shared.ask.store(NOTHING, Ordering::Relaxed);
        // Whoever asked is gone only with the recording.
        let _ = self.answers.send(answer);
    }
}

fn checkpoint(machine: &mut Machine, base: Base) -> Result<Vec<u8>, CheckpointError> {
    machine.stand_to_run()?;
    machine.save(Pages::Uncopied, base, Vec::new())
}

impl Drop for Tape {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}

impl Spool {
    /// Takes what has gathered; the buffer is given back for what follows, if a checkpoint has not made it larger than it is to stay.
    pub(super) fn take(&self, into: &mut Vec<u8>) {
        into.clear();
        into.shrink_to(WAITING_MAX);
        let mut waiting = self.shared.waiting();
        std::mem::swap(&mut waiting.items, into);
        (waiting.checkpoint, waiting.largest) = (0, 0);
    }

    /// Whether nothing more comes than what is there.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// How much waited when it was too much.
    pub(super) fn overrun(&self) -> Option<usize> {
        let overrun = self.shared.overrun.load(Ordering::Relaxed);
        overrun.then_some(WAITING_MAX)
    }

    /// Leaves a question, which the vCPU thread finds by itself.
    pub(super) fn ask(&self, ask: Ask) {
        let code = match ask {
            Ask::Watch => WATCH,
            Ask::Sweep => SWEEP,
            Ask::Cut => CUT_HERE,
            Ask::Forget => FORGET,
        };
        self.shared.ask.store(code, Ordering::Release);
    }

    /// Its answer, if it comes in time.
    pub(super) fn answer(&self, longest: Duration) -> Option<Answer> {
        self.answers.recv_timeout(longest).ok()
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        // What waits is nobody's any more.
        *self.shared.waiting() = Waiting::default();
    }
}

/// Items of a piece of tape.
pub(super) struct Items<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Items<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&tag, rest) = self.0.split_first()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (item, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        self.0 = rest;
        Some((tag, item))
    }
}

/// Entries go onto a tape, and nowhere else: `record` with a flight recorder.
#[derive(Debug)]
pub struct TapeSink {
    tape: Tape,
    posted: Seq,
}

impl TapeSink {
    /// A sink onto this tape.
    #[must_use]
    pub fn new(tape: Tape) -> Self {
        Self {
            tape,
            posted: Seq::ZERO,
        }
    }
}

impl Sink for TapeSink {
    fn post(&mut self, payload: &[u8]) -> Result<Seq, SinkError> {
        self.tape.entry(payload);
        self.posted = self.posted.next();
        Ok(self.posted)
    }

    fn is_read_whole(&self) -> bool {
        false
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

    fn detach(&mut self) {}

    fn frame(&mut self, bytes: &[u8]) {
        self.tape.frame(bytes);
    }

    fn done(&mut self, done: &Done) {
        self.tape.done(done);
    }

    fn attend(&mut self, machine: &mut Machine, place: Option<Base>) {
        self.tape.attend(machine);
        if let Some(base) = place {
            self.tape.cut(machine, base);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Encoder, Entry, Part};

    #[test]
    fn items_come_out_as_they_went_in() {
        let (tape, spool) = tape();
        tape.frame(b"abc");
        tape.entry(b"first");
        tape.entry(b"");
        let mut taken = Vec::new();
        spool.take(&mut taken);
        let items: Vec<_> = Items(&taken).collect();
        let frame = [&[INPUT_FRAME][..], b"abc"].concat();
        assert_eq!(
            items,
            [(INPUT, &frame[..]), (ENTRY, b"first"), (ENTRY, b"")]
        );
        spool.take(&mut taken);
        assert!(taken.is_empty() && !spool.is_closed());
        tape.entry(b"last");
        drop(tape);
        assert!(spool.is_closed());
        spool.take(&mut taken);
        assert_eq!(Items(&taken).count(), 1);
    }

    #[test]
    fn a_tape_that_nobody_empties_ends_and_holds_no_more_than_it_may() {
        let (tape, spool) = tape();
        let frame = vec![7; 1 << 20];
        for _ in 0..100 {
            tape.frame(&frame);
        }
        assert_eq!(spool.overrun(), Some(WAITING_MAX));
        let mut taken = Vec::new();
        spool.take(&mut taken);
        assert!(taken.len() <= WAITING_MAX);
        // Nothing follows the gap.
        tape.entry(b"x");
        spool.take(&mut taken);
        assert!(taken.is_empty());
    }

    #[test]
    fn a_checkpoint_waits_whole_however_large_it_is_and_one_more_does_not() {
        let (tape, spool) = tape();
        let checkpoint = || {
            let mut encoder = Encoder::from_base(Base::default());
            for part in Part::all_of(&vec![7; WAITING_MAX + 1], 1 << 20) {
                let (position, body) = (Position(0), Body::Part(part));
                tape.entry(encoder.encode(&Entry { position, body }));
            }
        };
        let mut taken = Vec::new();
        for _ in 0..2 {
            tape.entry(b"before");
            checkpoint();
            tape.entry(b"behind");
            assert_eq!(spool.overrun(), None);
            spool.take(&mut taken);
            assert!(taken.len() > WAITING_MAX);
            assert_eq!(Items(&taken).last(), Some((ENTRY, &b"behind"[..])));
        }
        checkpoint();
        tape.entry(b"more");
        assert_eq!(spool.overrun(), None);
        checkpoint();
        assert_eq!(spool.overrun(), None, "the first part of another has room");
        tape.frame(&vec![7; WAITING_MAX]);
        assert_eq!(spool.overrun(), Some(WAITING_MAX));
    }

    #[test]
    fn a_recorder_that_ended_costs_nothing_more() {
        let (tape, spool) = tape();
        drop(spool);
        tape.entry(b"x");
        assert!(tape.shared.waiting().items.is_empty());
    }
}
