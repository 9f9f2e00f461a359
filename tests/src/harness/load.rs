//! Making it hard for a replay to be exact: a host that is busy on every core, and a vCPU that is kicked at random.
//!
//! Unsafe code lives here for the one call that sends a signal to a thread of another process.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::random::Random;

/// One busy thread for every core. It ends by itself when its time is over, and at the latest when it is dropped.
#[derive(Debug)]
pub struct HostLoad {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl HostLoad {
    /// Starts it, for at most `longest`.
    ///
    /// # Errors
    /// If the host gives no threads.
    pub fn start(longest: Duration) -> Result<Self> {
        let cores = std::thread::available_parallelism().context("count the cores")?;
        let until = Instant::now() + longest;
        let over = Arc::new(AtomicBool::new(false));
        let mut load = Self {
            over: Arc::clone(&over),
            threads: Vec::new(),
        };
        for core in 0..cores.get() {
            let over = Arc::clone(&over);
            let thread = std::thread::Builder::new()
                .name(format!("load-{core}"))
                .spawn(move || be_busy(until, &over))
                .context("start a load thread")?;
            load.threads.push(thread);
        }
        Ok(load)
    }

    /// How many threads work.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Whether all of them are still at work.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.threads.iter().all(|thread| !thread.is_finished())
    }
}

impl Drop for HostLoad {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It computes and cannot panic; if it did, it loads nothing any more.
            let _ = thread.join();
        }
    }
}

/// Computes, and walks through more memory than the caches hold, so that the guest is slowed in both.
fn be_busy(until: Instant, over: &AtomicBool) -> u64 {
    const WORDS: usize = 4 << 20;
    const TURN: usize = 1 << 16;
    let mut memory = vec![1_u64; WORDS];
    let mut at = 0;
    let mut value = 1_u64;
    while !over.load(Ordering::Relaxed) && Instant::now() < until {
        for _ in 0..TURN {
            value = (value ^ value >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ memory[at];
            memory[at] = value;
            at = (at + 4099) % WORDS;
        }
    }
    std::hint::black_box(value)
}

/// Kicks one thread of a process at random moments, as the process's own threads kick it (SIGRTMIN).
#[derive(Debug)]
pub struct Kicker {
    over: Arc<AtomicBool>,
    kicks: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Between two bursts of kicks at most. A vCPU makes some tens of exits in that time, so most kicks hit the guest at work.
const GAP: Duration = Duration::from_micros(700);

/// Kicks in one burst at most: the second one finds the vCPU on its way out or back in.
const BURST: u64 = 3;

impl Kicker {
    /// Starts to kick a thread of process `pid`, a child that the caller does not reap before this one has stopped. Nothing is
    /// kicked before the process catches the signal and has such a thread.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(pid: u32, target: Target, seed: u64) -> Result<Self> {
        let (over, kicks) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let target = Process { pid, target };
        let (stop, count) = (Arc::clone(&over), Arc::clone(&kicks));
        let thread = std::thread::Builder::new()
            .name("kicker".into())
            .spawn(move || kick(&target, seed, &stop, &count))
            .context("start the kicker")?;
        Ok(Self {
            over,
            kicks,
            thread: Some(thread),
        })
    }

    /// Stops kicking: how many kicks were delivered.
    ///
    /// # Errors
    /// If there were none.
    pub fn stop(mut self) -> Result<u64> {
        self.end();
        let kicks = self.kicks.load(Ordering::Relaxed);
        ensure!(kicks > 0, "the vCPU was never kicked");
        Ok(kicks)
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the kicker does not panic");
        }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.end();
    }
}

/// Which thread is kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The one of this name.
    Named(&'static str),
    /// The process's first.
    First,
}

struct Process {
    pid: u32,
    target: Target,
}

impl Process {
    fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.pid))
    }

    /// Whether the process has a handler: before that, the signal would end it.
    fn is_ready(&self) -> bool {
        let status = std::fs::read_to_string(self.directory().join("status")).unwrap_or_default();
        let caught = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        caught.is_some_and(|mask| mask >> (libc::SIGRTMIN() - 1) & 1 == 1)
    }

    /// The thread, once it has started.
    fn thread(&self) -> Option<u32> {
        let Target::Named(wanted) = self.target else {
            return Some(self.pid);
        };
        let tasks = std::fs::read_dir(self.directory().join("task")).ok()?;
        tasks.filter_map(Result::ok).find_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            (name.trim_end() == wanted).then_some(task.file_name().to_str()?.parse().ok()?)
        })
    }
}

fn kick(process: &Process, seed: u64, over: &AtomicBool, kicks: &AtomicU64) {
    let mut random = Random::new(seed);
    let thread = loop {
        if over.load(Ordering::Relaxed) {
            return;
        }
        // In this order: a thread that starts before there is a handler is no vCPU's.
        if process.is_ready()
            && let Some(thread) = process.thread()
        {
            break thread;
        }
        std::thread::yield_now();
    };
    while !over.load(Ordering::Relaxed) {
        for _ in 0..=random.below(BURST) {
            if signal(process.pid, thread) {
                kicks.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Not to wait for anything: the gap is what is random about the kicks.
        std::thread::sleep(random.between(Duration::ZERO, GAP));
    }
}

/// Whether the signal was sent: not to a thread that has ended.
fn signal(pid: u32, thread: u32) -> bool {
    // SAFETY: tgkill passes no memory. The process is a child that is not reaped while its kicker lives, so the id is its own;
    // it catches the signal in every thread.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, libc::SIGRTMIN()) == 0 }
}
