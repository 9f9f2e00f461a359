//! The log in a file: the very bytes of the wire, written behind a recorder and read by a replay.
//!
//! Both lanes are in one stream, an input always before the entry that applies it: the writer takes the events lane first
//! and then, before it writes the entry, all of the inputs lane, which was committed earlier.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rdma_log::{
    Lane, LogFileError, LogFileReader, LogFileWriter, Marks, ReadError, RingReader, Seq,
};

use crate::disk::Done;
use crate::machine::{MachineSpec, SpecError};
use crate::replay::{Arrived, LogError, LogSource};
use crate::ring_log::Staged;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};

/// Why a log file cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileLogError {
    /// The file.
    #[error("log file {path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        source: LogFileError,
    },
    /// The file cannot be made.
    #[error("cannot create the log file {path}: {source}")]
    Create {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The description at its head.
    #[error("log file {path}: {source}")]
    Spec {
        /// Its path.
        path: String,
        /// Why.
        source: SpecError,
    },
    /// The ring that is written to the file.
    #[error("the ring in front of the log file: {0}")]
    Ring(#[from] ReadError),
    /// The thread that writes could not be started.
    #[error("cannot start the thread that writes the log file: {0}")]
    Thread(std::io::Error),
}

/// Writes a ring to a file, in a thread of its own.
pub struct FileRecorder {
    done: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64, FileLogError>>,
}

impl FileRecorder {
    /// Starts to write what comes through `reader` to a new file, in a thread that confines itself.
    ///
    /// # Errors
    /// [`FileLogError::Create`], [`FileLogError::File`].
    pub fn start(
        path: &Path,
        spec: &MachineSpec,
        reader: RingReader,
        sandbox: Sandbox,
    ) -> Result<Self, FileLogError> {
        let shown = path.display().to_string();
        let file = File::create(path).map_err(|source| FileLogError::Create {
            path: shown.clone(),
            source,
        })?;
        let wrap = move |source| FileLogError::File {
            path: shown.clone(),
            source,
        };
        let writer = LogFileWriter::create(
            BufWriter::with_capacity(1 << 20, file),
            reader.nonce,
            &spec.encode(),
        )
        .map_err(&wrap)?;
        let done = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&done);
        let thread = std::thread::Builder::new()
            .name("log-file".into())
            .spawn(move || {
                sandbox.confine(Thread::LogFile).expect(NOT_CONFINED);
                copy(reader, writer, &over, &wrap)
            })
            .map_err(FileLogError::Thread)?;
        Ok(Self { done, thread })
    }

    /// Whether it writes no more, because it could not: nobody makes room in the ring.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until everything posted so far is in the file; returns the file's length in bytes.
    ///
    /// # Errors
    /// What kept the thread from writing.
    ///
    /// # Panics
    /// If the thread panicked.
    pub fn finish(self) -> Result<u64, FileLogError> {
        self.done.store(true, Ordering::SeqCst);
        self.thread
            .join()
            .expect("the log file's thread does not panic")
    }
}

/// Between two looks at the ring: short against the time in which a fast guest fills it, long against what a look costs a core that
/// the guest computes on.
const NAP: Duration = Duration::from_millis(5);

fn copy<W: Write>(
    mut reader: RingReader,
    mut writer: LogFileWriter<W>,
    over: &AtomicBool,
    wrap: &impl Fn(LogFileError) -> FileLogError,
) -> Result<u64, FileLogError> {
    loop {
        // Asked before the lanes are looked at: what was posted before it was set is then seen.
        let last_round = over.load(Ordering::SeqCst);
        let mut idle = true;
        while let Some(event) = reader.events.next()? {
            idle = false;
            let seq = event.seq();
            while let Some(input) = reader.inputs.next()? {
                writer.write(&input).map_err(wrap)?;
            }
            writer.write(&event).map_err(wrap)?;
            reader.events.set_received(seq)?;
        }
        reader.events.notify()?;
        reader.inputs.notify()?;
        if last_round && idle {
            break;
        }
        if idle {
            // Nobody waits for the file. A wait on the ring would have the vCPU thread wake this one for each request, and be
            // pushed off its core by it: a fifth of that thread's time, where the two share one.
            std::thread::sleep(NAP);
        }
    }
    let bytes = writer.bytes();
    writer.finish().map_err(wrap)?;
    Ok(bytes)
}

/// Reads a log file for a replayer.
pub struct FileSource {
    reader: LogFileReader<BufReader<File>>,
    path: String,
    staged: Staged,
    payload: Vec<u8>,
    over: bool,
    bytes: u64,
    read: Arc<AtomicU64>,
}

impl FileSource {
    /// Opens a file and reads the machine's description at its head.
    ///
    /// # Errors
    /// [`FileLogError::File`], [`FileLogError::Spec`].
    pub fn open(path: &Path) -> Result<(Self, MachineSpec), FileLogError> {
        let shown = path.display().to_string();
        let reader = LogFileReader::open(path).map_err(|source| FileLogError::File {
            path: shown.clone(),
            source,
        })?;
        let spec =
            MachineSpec::decode(reader.description()).map_err(|source| FileLogError::Spec {
                path: shown.clone(),
                source,
            })?;
        let source = Self {
            reader,
            path: shown,
            staged: Staged::default(),
            payload: Vec::new(),
            over: false,
            bytes: std::fs::metadata(path).map_or(0, |file| file.len()),
            read: Arc::default(),
        };
        Ok((source, spec))
    }

    fn missing(&self, what: &str) -> LogError {
        LogError(format!(
            "{}: an entry applies {what} that is not in the file before it",
            self.path
        ))
    }

    /// Bytes of the file, and how many of them have been read and are good.
    #[must_use]
    pub fn progress(&self) -> (u64, Arc<AtomicU64>) {
        (self.bytes, Arc::clone(&self.read))
    }
}

impl LogSource for FileSource {
    fn next(&mut self) -> Result<Option<Arrived<'_>>, LogError> {
        loop {
            self.read.store(self.reader.offset(), Ordering::Relaxed);
            let found = self
                .reader
                .next()
                .map_err(|error| LogError(format!("{}: {error}", self.path)))?;
            let Some(found) = found else {
                self.over = true;
                return Ok(None);
            };
            let entry = found.entry;
            if entry.lane() == Lane::Inputs {
                self.staged.take_in(entry.payload())?;
                continue;
            }
            let (seq, marks): (Seq, Marks) = (entry.seq(), entry.marks());
            self.payload.clear();
            self.payload.extend_from_slice(entry.payload());
            return Ok(Some(Arrived {
                seq,
                marks,
                payload: &self.payload,
            }));
        }
    }

    fn frame(&mut self) -> Result<Vec<u8>, LogError> {
        let frame = self.staged.frame();
        frame.ok_or_else(|| self.missing("a frame"))
    }

    fn done(&mut self) -> Result<Done, LogError> {
        let done = self.staged.done();
        done.ok_or_else(|| self.missing("an answer of the disk"))
    }

    fn replayed(&mut self, _: Seq) {}

    fn is_over(&mut self) -> Result<bool, LogError> {
        Ok(self.over)
    }

    fn wait(&mut self, _: Duration) {}
}
