//! The recorder's thread: writes what is on the tape, takes a checkpoint when the log has grown, and keeps within its bound.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdma_log::{Lane, LogFileWriter, Marks, Nonce};

use super::FlightError;
use super::directory::Directory;
use super::files::{Head, Kind, LogHead};
use super::tape::{self, Answer, Ask, CUT, ENTRY, INPUT, Items, Spool, Tape};
use crate::checkpoint::clone::{CloneError, Sender};
use crate::config::FlightRecorder;
use crate::machine::Swept;
use crate::memory::GuestRam;
use crate::position::Position;
use crate::record::random_source;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling;

/// Between two looks at the tape: what a kill of this very process may lose, and long against what a look costs.
const NAP: Duration = Duration::from_millis(5);

/// How long the process waits at its end for what is still to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Pages that the guest wrote in a round of a copy, below which it may as well stop for them: a millisecond's worth.
const FEW_PAGES: usize = 512;

/// Rounds of a copy: a guest that writes faster than they shrink stops for what is left.
const ROUNDS_MAX: u32 = 8;

/// Pages that are copied before the tape is looked at again.
const PAGES_AT_ONCE: u64 = 2048;

/// The least room for a log between two checkpoints.
const LOG_LEAST: u64 = 4 << 20;

/// How many bytes a recording may take, and what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// All its files.
    pub size: u64,
    /// Of the log, when a new checkpoint is begun.
    pub log: u64,
}

impl Budget {
    /// For a machine whose description has so many bytes, with so much memory; of this size, or a fitting one.
    ///
    /// Two checkpoints and two logs are there at once while one takes the place of the other, and a checkpoint of a busy guest
    /// has some of its pages twice. So the least is four times the memory, and without a word it is six times.
    ///
    /// # Errors
    /// [`FlightError::Small`].
    pub fn new(size: Option<u64>, description: u64, memory: u64) -> Result<Self, FlightError> {
        let least = description + 4 * memory + 4 * LOG_LEAST;
        let size = size.unwrap_or(description + 6 * memory + 16 * LOG_LEAST);
        if size < least {
            return Err(FlightError::Small { size, least });
        }
        // The log goes on while a checkpoint is taken, and then once more.
        let log = (size - description - 4 * memory) / 4;
        Ok(Self { size, log })
    }
}

/// What a recorder says, for people and figures.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A line; whether something is lost.
    Line(String, bool),
    /// A checkpoint is durable.
    Checkpoint {
        /// Its segment.
        segment: u64,
        /// Where it was taken.
        position: u64,
        /// How long the guest stood for it.
        stopped: Duration,
        /// From the first page until it was durable.
        took: Duration,
        /// Its bytes.
        bytes: u64,
        /// Rounds in which pages were copied.
        rounds: u32,
    },
}

/// What a recording begins with.
pub struct Start<'a> {
    /// Where to, and how much.
    pub config: &'a FlightRecorder,
    /// The machine's description, encoded.
    pub machine: Vec<u8>,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// The machine is at power-on: the log needs no checkpoint.
    pub at_power_on: bool,
    /// Confines the thread.
    pub sandbox: Sandbox,
    /// Whether it is waited for until the directory was opened.
    pub waits: bool,
    /// Takes what it says, on its thread.
    pub say: Box<dyn Fn(Said) + Send>,
}

/// A recording that goes on.
#[derive(Debug)]
pub struct Flight {
    thread: Option<JoinHandle<()>>,
}

impl Flight {
    /// Begins a recording, in a thread that confines itself. What goes onto the tape is recorded, until it is dropped.
    ///
    /// # Errors
    /// [`FlightError`]: there can be no thread, or, where it is waited for, the directory cannot be used. Otherwise the thread says so.
    pub fn start(start: Start<'_>) -> Result<(Self, Tape), FlightError> {
        let path = start.config.directory.clone();
        let (tape, spool) = tape::tape();
        let config = start.config.clone();
        let waits = start.waits;
        let (tell, begun) = channel();
        let begin = move || {
            scheduling::make_this_thread_patient();
            let sandbox = start.sandbox;
            let beginning = Beginning {
                config,
                machine: start.machine,
                ram: start.ram,
                at_power_on: start.at_power_on,
            };
            let writer = match beginning.open(spool) {
                Ok(writer) => writer,
                Err(error) if waits => return drop(tell.send(error)),
                Err(error) => {
                    let line = format!(
                        "flight recorder: nothing is recorded, and the machine goes on: {error}"
                    );
                    return (start.say)(Said::Line(line, true));
                }
            };
            drop(tell);
            sandbox.confine(Thread::Flight).expect(NOT_CONFINED);
            writer.run(&*start.say);
        };
        let thread = thread::Builder::new()
            .name("flight".into())
            .spawn(begin)
            .map_err(FlightError::io("start the recorder's thread for", path))?;
        if waits && let Ok(error) = begun.recv() {
            return Err(error);
        }
        let flight = Self {
            thread: Some(thread),
        };
        Ok((flight, tape))
    }

    /// Does not wait for its end, which comes when its tape is dropped.
    pub fn let_go(mut self) {
        self.thread = None;
    }
}

impl Drop for Flight {
    /// Waits until everything is written, for a while.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let until = Instant::now() + LAST_WORDS;
        while !thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            // It has said what went wrong.
            let _ = thread.join();
        }
    }
}

/// What a recording begins with, on its thread.
struct Beginning {
    config: FlightRecorder,
    machine: Vec<u8>,
    ram: Arc<GuestRam>,
    at_power_on: bool,
}

impl Beginning {
    fn open(self, spool: Spool) -> Result<Writer, FlightError> {
        let budget = Budget::new(self.config.size, self.machine.len() as u64, self.ram.size())?;
        let directory = Directory::to_write(&self.config.directory)?;
        let mut recording = [0; 8];
        random_source()
            .map_err(|error| io::Error::other(error.to_string()))
            .and_then(|mut source| source.read_exact(&mut recording))
            .map_err(FlightError::io("draw a number for", directory.path()))?;
        let recording = u64::from_le_bytes(recording);
        let machine = write_machine(&directory, recording, &self.machine)?;
        let mut writer = Writer {
            directory,
            recording,
            spool,
            ram: self.ram,
            budget,
            every: self.config.every,
            segment: 0,
            log: None,
            machine,
            older: machine,
            checkpointed: Instant::now(),
            taken: Vec::new(),
        };
        if self.at_power_on {
            writer.open_log(Position(0), true, 0)?;
        }
        Ok(writer)
    }
}

/// Writes the machine's description; how many bytes the file has.
fn write_machine(
    directory: &Directory,
    recording: u64,
    machine: &[u8],
) -> Result<u64, FlightError> {
    let path = directory.machine();
    let unfinished = Directory::unfinished(&path);
    let head = Head {
        recording,
        segment: 0,
        length: machine.len() as u64,
        checksum: rdma_log::crc32c(machine),
    };
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(&head.encode(Kind::Machine))?;
        file.write_all(machine)?;
        file.sync_all()
    };
    write().map_err(FlightError::io("write", &unfinished))?;
    directory.finish(&path)?;
    Ok((super::files::HEAD + machine.len()) as u64)
}

/// A segment's log.
struct Log {
    writer: LogFileWriter<BufWriter<File>>,
    path: PathBuf,
}

struct Writer {
    directory: Directory,
    recording: u64,
    spool: Spool,
    ram: Arc<GuestRam>,
    budget: Budget,
    every: Option<Duration>,
    /// Of the log.
    segment: u64,
    /// None before the first segment.
    log: Option<Log>,
    /// Bytes of the machine's description.
    machine: u64,
    /// Bytes of all other files that are there.
    older: u64,
    checkpointed: Instant,
    taken: Vec<u8>,
}

impl Writer {
    fn run(mut self, say: &dyn Fn(Said)) {
        let path = self.directory.path().display().to_string();
        let size = self.budget.size >> 20;
        let line = format!("flight recorder: records into {path}, at most {size} MiB");
        say(Said::Line(line, false));
        let outcome = self.record(say);
        // The directory is free once that is said.
        drop(self);
        match outcome {
            Ok(()) => say(Said::Line(
                format!("flight recorder: the recording is whole; doppel replay {path} replays it"),
                false,
            )),
            Err(error) => say(Said::Line(
                format!(
                    "flight recorder: the recording ends here and the machine goes on: {error}; what was recorded is in {path}"
                ),
                true,
            )),
        }
    }

    fn record(&mut self, say: &dyn Fn(Said)) -> Result<(), FlightError> {
        loop {
            // Asked before the tape is looked at: what was put there before it was closed is then seen.
            let closed = self.spool.is_closed();
            let idle = self.drain()?;
            if closed && idle {
                break;
            }
            if !closed && self.wants_checkpoint() {
                self.checkpoint(say)?;
            } else if idle {
                // A wait would have the vCPU thread wake this one for each entry, and be pushed off its core by it.
                thread::sleep(NAP);
            }
        }
        self.end_log()
    }

    fn wants_checkpoint(&self) -> bool {
        let Some(log) = &self.log else {
            return true;
        };
        let grown = log.writer.last(Lane::Events).0 > 0;
        let due = self
            .every
            .is_some_and(|every| self.checkpointed.elapsed() >= every);
        log.writer.bytes() >= self.budget.log || grown && due
    }

    /// Writes what is on the tape. Whether there was nothing.
    fn drain(&mut self) -> Result<bool, FlightError> {
        let mut taken = std::mem::take(&mut self.taken);
        self.spool.take(&mut taken);
        for (tag, item) in Items(&taken) {
            match (tag, &mut self.log) {
                (CUT, _) => {
                    let position = item.try_into().map_or(0, u64::from_le_bytes);
                    let before = self.events();
                    self.end_log()?;
                    self.open_log(Position(position), false, before)?;
                }
                // A machine that was running: nothing of it can be replayed before the first checkpoint.
                (_, None) => {}
                (INPUT, Some(log)) => log.append(Lane::Inputs, item)?,
                (ENTRY, Some(log)) => log.append(Lane::Events, item)?,
                _ => {}
            }
        }
        let idle = taken.is_empty();
        self.taken = taken;
        if !idle && let Some(log) = &mut self.log {
            log.writer.flush().map_err(FlightError::log(&log.path))?;
        }
        if let Some(waited) = self.spool.overrun() {
            return Err(FlightError::Slow(waited));
        }
        let written = self.log.as_ref().map_or(0, |log| log.writer.bytes());
        if self.older + written > self.budget.size {
            return Err(FlightError::Full {
                size: self.budget.size,
            });
        }
        Ok(idle)
    }

    fn events(&self) -> u64 {
        let log = self.log.as_ref();
        log.map_or(0, |log| log.writer.last(Lane::Events).0)
    }

    /// Has the log survive the loss of power: the next one may rely on it.
    fn end_log(&mut self) -> Result<(), FlightError> {
        let Some(Log { writer, path }) = self.log.take() else {
            return Ok(());
        };
        self.older += writer.bytes();
        let file = writer.finish().map_err(FlightError::log(&path))?;
        let file = file
            .into_inner()
            .map_err(|error| FlightError::io("write", &path)(error.into_error()))?;
        file.sync_data().map_err(FlightError::io("sync", path))
    }

    fn open_log(
        &mut self,
        position: Position,
        at_power_on: bool,
        before: u64,
    ) -> Result<(), FlightError> {
        self.segment += 1;
        let path = self.directory.log(self.segment);
        let head = LogHead {
            recording: self.recording,
            segment: self.segment,
            position: position.0,
            at_power_on,
            before,
        };
        let nonce = Nonce::random().map_err(FlightError::io("draw a number for", &path))?;
        let file = File::create(&path).map_err(FlightError::io("make", &path))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let mut writer =
            LogFileWriter::create(file, nonce, &head.encode()).map_err(FlightError::log(&path))?;
        writer.flush().map_err(FlightError::log(&path))?;
        self.directory.sync()?;
        self.log = Some(Log { writer, path });
        Ok(())
    }

    /// Takes a checkpoint, and removes what is older once it is durable.
    fn checkpoint(&mut self, say: &dyn Fn(Said)) -> Result<(), FlightError> {
        let path = self.directory.checkpoint(self.segment + 1);
        let unfinished = Directory::unfinished(&path);
        let outcome = self.write_checkpoint(&unfinished);
        let (bytes, position, stopped, rounds, began) = match outcome {
            Ok(Some(taken)) => taken,
            // The machine is gone: no loss, as the log before goes on.
            Ok(None) => {
                return fs::remove_file(&unfinished).map_err(FlightError::io("remove", unfinished));
            }
            Err(error) => {
                self.spool.ask(Ask::Forget);
                // The room is of more use than half a checkpoint; that it cannot be removed is no news beside the error.
                let _ = fs::remove_file(&unfinished);
                return Err(error);
            }
        };
        self.directory.finish(&path)?;
        self.directory.remove_before(self.segment)?;
        self.older = self.machine + bytes;
        self.checkpointed = Instant::now();
        say(Said::Checkpoint {
            segment: self.segment,
            position: position.0,
            stopped,
            took: began.elapsed(),
            bytes,
            rounds,
        });
        Ok(())
    }

    /// Writes one and makes it durable; none if the machine ended meanwhile.
    fn write_checkpoint(&mut self, path: &Path) -> Result<Option<Taken>, FlightError> {
        let began = Instant::now();
        let wrap = |source| FlightError::Checkpoint {
            path: path.to_owned(),
            source,
        };
        let file = File::create(path).map_err(FlightError::io("make", path))?;
        let mut to = BufWriter::with_capacity(1 << 20, file);
        let head = Head {
            recording: self.recording,
            segment: self.segment + 1,
            length: 0,
            checksum: 0,
        };
        to.write_all(&head.encode(Kind::Checkpoint))
            .map_err(FlightError::io("write", path))?;
        let mut copy = Sender::new(to, Arc::clone(&self.ram));
        let Some(Answer::Watching) = self.ask(Ask::Watch)? else {
            return Ok(None);
        };
        let everything = self.ram.pages();
        let (mut before, mut rounds) = (usize::MAX, 0);
        loop {
            let (mut from, mut pages) = (0, 0);
            loop {
                let Some(Answer::Swept(swept)) = self.ask(Ask::Sweep)? else {
                    return Ok(None);
                };
                let upto = swept.next.map_or(everything, |next| next.0);
                pages += self.round(&mut copy, rounds == 0, from..upto, &swept, &wrap)?;
                match swept.next {
                    Some(_) => from = upto,
                    None => break,
                }
            }
            rounds += 1;
            let large = copy.bytes() > self.ram.size() / 4 * 5;
            let shrinks = rounds == 1 || pages < before;
            if rounds > 1 && (pages <= FEW_PAGES || !shrinks || large || rounds >= ROUNDS_MAX) {
                break;
            }
            before = pages;
        }
        let Some(Answer::Cut(checkpoint, position, stopped)) = self.ask(Ask::Cut)? else {
            return Ok(None);
        };
        // The mark of the cut is on the tape: what follows it belongs to this segment.
        self.drain()?;
        copy.checkpoint(&checkpoint).map_err(&wrap)?;
        let bytes = super::files::HEAD as u64 + copy.bytes();
        let file = copy.into_inner().into_inner();
        let file = file.map_err(|error| FlightError::io("write", path)(error.into_error()))?;
        file.sync_all().map_err(FlightError::io("sync", path))?;
        Ok(Some((bytes, position, stopped, rounds, began)))
    }

    /// Copies what a part of a sweep came to: in the first round everything that there is up to where it came.
    fn round(
        &mut self,
        copy: &mut Sender<BufWriter<File>>,
        first: bool,
        pages: std::ops::Range<u64>,
        swept: &Swept,
        wrap: &impl Fn(CloneError) -> FlightError,
    ) -> Result<usize, FlightError> {
        if !first {
            let sent = copy.pages(&swept.pages).map_err(wrap)?;
            self.drain()?;
            return Ok(sent as usize);
        }
        // What somebody else cleared behind the sweep is in it as well.
        let passed = swept.pages.iter().filter(|page| page.0 < pages.start);
        let mut sent = copy.pages(&passed.collect()).map_err(wrap)?;
        let mut from = pages.start;
        while from < pages.end {
            let to = (from + PAGES_AT_ONCE).min(pages.end);
            sent += copy.touched(from..to).map_err(wrap)?;
            from = to;
            self.drain()?;
            if self.older + copy.bytes() > self.budget.size {
                return Err(FlightError::Full {
                    size: self.budget.size,
                });
            }
        }
        Ok(sent as usize)
    }

    /// Asks the vCPU thread, and goes on to write meanwhile; none if it ended.
    fn ask(&mut self, ask: Ask) -> Result<Option<Answer>, FlightError> {
        self.spool.ask(ask);
        loop {
            match self.spool.answer(NAP) {
                Some(Answer::Failed(why)) => return Err(FlightError::NoCheckpoint(why)),
                Some(answer) => return Ok(Some(answer)),
                None => {
                    let closed = self.spool.is_closed();
                    self.drain()?;
                    if closed {
                        // It may have answered last.
                        return Ok(self.spool.answer(Duration::ZERO));
                    }
                }
            }
        }
    }
}

/// Bytes, where, how long the guest stood, rounds, and when it began.
type Taken = (u64, Position, Duration, u32, Instant);

impl Log {
    fn append(&mut self, lane: Lane, payload: &[u8]) -> Result<(), FlightError> {
        self.writer
            .append(lane, payload, Marks::default())
            .map(drop)
            .map_err(FlightError::log(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_has_room_for_two_checkpoints_and_their_logs() {
        let memory = 64 << 20;
        let budget = Budget::new(None, 1000, memory).unwrap();
        assert!(budget.size >= 1000 + 4 * memory + 4 * budget.log);
        assert!(budget.log >= LOG_LEAST);
        let Err(FlightError::Small { size: 5, least }) = Budget::new(Some(5), 1000, memory) else {
            panic!("five bytes are no room");
        };
        assert!(Budget::new(Some(least), 1000, memory).unwrap().log >= LOG_LEAST);
    }
}
