//! Ways out by which nobody may be kept: standard output, standard error, a console that is no file.
//!
//! ```text
//!  any thread ── a piece ──▶ waiting, up to 1 MiB ──▶ a thread of its own ── write, as long as it takes ──▶ pipe, terminal, socket
//!                              └ full: the oldest go, and are counted
//! ```
//! A pipe that nobody reads, and a terminal that Ctrl-S has stopped, keep whoever writes to them for as long. A machine's threads are never
//! that: they leave a piece (a line, bytes of a console) and go on. What finds no room pushes out the oldest, because whoever comes back wants to see the
//! newest; to hold the guest back instead would make of everybody who looks at it a part of the machine. What was lost is told once something is read
//! again, and `doppel console` has the console's last bytes in any case.
//!
//! To write without waiting is no way: that mode belongs to the open file, which the shell that started us shares; and a look whether there is room tells
//! nothing where two sides of a pair have the same pipe.
//!
//! **A regular file** has no reader who could stay away. It is written at once: what has left is in it even if the process is killed the moment after, which
//! is not so of what waits here.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rdma_log::locks::lock;

/// Bytes that may wait: half a minute of a role's figures, a few thousand lines of a log or a console.
pub const MOST: usize = 1 << 20;

/// How long the end of a process is put off for what still waits. Whoever reads takes it within milliseconds.
pub const LAST_WORDS: Duration = Duration::from_secs(1);

/// What did not get out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Pieces: lines, where lines are left.
    pub pieces: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// What befalls a way out.
#[derive(Debug)]
pub enum Trouble {
    /// It was full.
    Lost(Lost),
    /// It takes nothing at all; told once, until it takes something again.
    Failed(io::Error),
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    lost: Lost,
    /// The thread has taken something, and is not done with it.
    writing: bool,
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// For the thread: there is something to write, or it is over.
    left: Condvar,
    /// For those who wait for the thread.
    written: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The next pieces, as one, and what was lost before them. None: it is over.
    fn take(&self) -> Option<(Vec<u8>, Lost)> {
        let mut state = self.lock();
        state.writing = false;
        self.written.notify_all();
        while state.waiting.is_empty() {
            if state.over {
                return None;
            }
            state = self
                .left
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        state.bytes = 0;
        let pieces = std::mem::take(&mut state.waiting);
        let lost = std::mem::take(&mut state.lost);
        drop(state);
        Some((pieces.into_iter().flatten().collect(), lost))
    }

    fn work(&self, mut to: impl Write, mut tell: impl FnMut(Trouble)) {
        let mut fails = false;
        while let Some((bytes, lost)) = self.take() {
            if lost != Lost::default() {
                tell(Trouble::Lost(lost));
            }
            match to.write_all(&bytes).and_then(|()| to.flush()) {
                Ok(()) => fails = false,
                Err(error) => {
                    if !std::mem::replace(&mut fails, true) {
                        tell(Trouble::Failed(error));
                    }
                }
            }
        }
    }

    /// Waits until all is written, at most until then.
    fn settle(&self, until: Instant) {
        let mut state = self.lock();
        while !state.waiting.is_empty() || state.writing {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return;
            };
            let waited = self.written.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Every way out of this process, for its end.
static ALL: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

/// A way out. Dropped, its thread ends once it has written what waits.
#[derive(Debug)]
pub struct Outflow(Arc<Shared>);

impl Outflow {
    /// Starts the thread, which begins with `confine`, and tells what befalls it.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(
        to: impl Write + Send + 'static,
        confine: impl FnOnce() + Send + 'static,
        tell: impl FnMut(Trouble) + Send + 'static,
    ) -> io::Result<Self> {
        let shared: Arc<Shared> = Arc::default();
        let work = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("outflow".into())
            .spawn(move || {
                confine();
                work.work(to, tell);
            })?;
        let mut all = lock(&ALL);
        all.retain(|shared| shared.strong_count() > 0);
        all.push(Arc::downgrade(&shared));
        Ok(Self(shared))
    }

    /// Leaves a piece, without waiting. It goes out whole or not at all.
    pub fn leave(&self, piece: &[u8]) {
        let piece = piece.to_vec();
        let mut state = self.0.lock();
        state.bytes += piece.len();
        state.waiting.push_back(piece);
        while state.bytes > MOST {
            let Some(oldest) = state.waiting.pop_front() else {
                break;
            };
            state.bytes -= oldest.len();
            state.lost.pieces += 1;
            state.lost.bytes += oldest.len() as u64;
        }
        drop(state);
        self.0.left.notify_one();
    }
}

impl Drop for Outflow {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.left.notify_one();
    }
}

/// Waits until everything that was left is written, but no longer than [`LAST_WORDS`]: at the end of a role, or of the process.
pub fn settle() {
    let all: Vec<_> = {
        let all = lock(&ALL);
        all.iter().filter_map(Weak::upgrade).collect()
    };
    let until = Instant::now() + LAST_WORDS;
    for shared in all {
        shared.settle(until);
    }
}

/// Whether it is a regular file, which nobody reads.
pub(super) fn is_file(of: &impl AsFd) -> io::Result<bool> {
    Ok(File::from(of.as_fd().try_clone_to_owned()?)
        .metadata()?
        .is_file())
}

/// A process's own ways out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standard {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

static OUTPUT: OnceLock<Outflow> = OnceLock::new();
static ERROR: OnceLock<Outflow> = OnceLock::new();

/// From now on nobody in this process is kept by its standard output and standard error, where they are no files. Their threads begin with
/// `confine`; `tell` is handed a line for people where something was lost. Once in a process's life: later calls change nothing.
///
/// # Errors
/// If there is no thread to be had.
pub fn begin(
    confine: impl Fn() + Clone + Send + 'static,
    tell: impl Fn(String) + Clone + Send + 'static,
) -> io::Result<()> {
    let start = |flow: &OnceLock<Outflow>, name: &'static str, to: io::Result<File>| {
        // One that is closed takes nothing, and keeps nobody.
        let Some(to) = to.ok().filter(|_| flow.get().is_none()) else {
            return Ok(());
        };
        if is_file(&to).unwrap_or(true) {
            return Ok(());
        }
        let tell = tell.clone();
        let started = Outflow::start(to, confine.clone(), move |trouble| match trouble {
            Trouble::Lost(lost) => tell(format!(
                "nobody has read {name} for a while: {} lines of it, {} bytes, are lost",
                lost.pieces, lost.bytes
            )),
            // Whoever read it is gone: that is no reason to say more than before.
            Trouble::Failed(_) => {}
        })?;
        // Whoever comes second finds the first.
        let _ = flow.set(started);
        Ok(())
    };
    let output = io::stdout().as_fd().try_clone_to_owned();
    start(&OUTPUT, "standard output", output.map(File::from))?;
    let error = io::stderr().as_fd().try_clone_to_owned();
    start(&ERROR, "standard error", error.map(File::from))
}

impl Standard {
    /// Says this, all of it and at once, or when it is read.
    ///
    /// # Errors
    /// What the kernel says, where nobody else writes it for us.
    pub fn say(self, bytes: &[u8]) -> io::Result<()> {
        let flow = match self {
            Self::Output => &OUTPUT,
            Self::Error => &ERROR,
        };
        if let Some(flow) = flow.get() {
            flow.leave(bytes);
            return Ok(());
        }
        match self {
            Self::Output => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Self::Error => io::stderr().write_all(bytes),
        }
    }
}

impl Write for Standard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.say(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::sync::mpsc::channel;

    use super::*;

    /// Longer than anything here takes on a host that is busy.
    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn nobody_waits_for_a_reader_and_who_comes_back_finds_the_newest_and_a_count() {
        let (reading, writing) = io::pipe().unwrap();
        let (tell, told) = channel();
        let flow = Outflow::start(
            writing,
            || {},
            move |trouble| {
                let Trouble::Lost(lost) = trouble else {
                    panic!("{trouble:?}")
                };
                tell.send(lost).unwrap();
            },
        )
        .unwrap();
        let line = |number: u32| format!("{number:01023}\n");
        // Three times what may wait, what is being written and what the pipe holds.
        const LINES: u32 = 3 * 2048 + 64;
        for number in 0..LINES {
            flow.leave(line(number).as_bytes());
        }
        drop(flow);
        let mut numbers = Vec::new();
        for line in BufReader::new(reading).lines() {
            let line = line.unwrap();
            assert_eq!(line.len(), 1023, "a line was torn");
            numbers.push(line.parse::<u32>().unwrap());
        }
        assert!(numbers.is_sorted());
        assert_eq!(numbers.last(), Some(&(LINES - 1)));
        let lost = told.recv_timeout(SOON).unwrap();
        assert_eq!(lost.bytes, lost.pieces * 1024);
        let lost = lost.pieces + told.iter().map(|lost| lost.pieces).sum::<u64>();
        assert_eq!(lost + numbers.len() as u64, u64::from(LINES));
        assert!(lost > 0);
    }

    #[test]
    fn what_was_left_is_written_before_the_end_and_a_stuck_reader_puts_it_off_a_little() {
        let (mut reading, writing) = io::pipe().unwrap();
        let flow = Outflow::start(writing, || {}, |_| {}).unwrap();
        flow.leave(b"last words");
        flow.0.settle(Instant::now() + SOON);
        let mut words = [0; 10];
        reading.read_exact(&mut words).unwrap();
        assert_eq!(&words, b"last words");
        // More than a pipe holds.
        flow.leave(&[0; MOST / 2]);
        let asked = Instant::now();
        flow.0.settle(asked + Duration::from_millis(50));
        assert!(asked.elapsed() < SOON);
        let state = flow.0.lock();
        assert!(state.writing || !state.waiting.is_empty());
    }

    #[test]
    fn a_reader_that_is_gone_is_told_of_once() {
        let (reading, writing) = io::pipe().unwrap();
        drop(reading);
        let (tell, told) = channel();
        let flow = Outflow::start(
            writing,
            || {},
            move |trouble| tell.send(format!("{trouble:?}")).unwrap(),
        )
        .unwrap();
        for _ in 0..3 {
            flow.leave(b"anybody?");
            flow.0.settle(Instant::now() + SOON);
        }
        drop(flow);
        assert_eq!(told.iter().count(), 1);
    }
}
