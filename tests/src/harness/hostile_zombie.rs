//! What can be known of a frozen process from outside: that it stands still, how far its log has committed, and how it
//! stands with the arbiter; and how busy the host is.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::arbiter::{Arbiter, Durability, FileArbiter};
use hypervisor::config::Config;
use hypervisor::demo::pair::Side;
use hypervisor::protocol::{Epoch, State};

/// A bound for things that take milliseconds, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(10);

/// SIGSTOP; every thread stands still when this returns.
///
/// # Errors
/// If the process does not stop, or is gone.
pub fn freeze(side: &Side) -> Result<()> {
    side.signal(libc::SIGSTOP);
    let until = Instant::now() + PATIENCE;
    while !stands_still(side.pid())? {
        ensure!(
            Instant::now() < until,
            "process {} does not stop",
            side.pid()
        );
        std::thread::yield_now();
    }
    Ok(())
}

/// SIGCONT.
pub fn thaw(side: &Side) {
    side.signal(libc::SIGCONT);
}

fn stands_still(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("look at a frozen process")? {
        let stat = fs::read_to_string(thread?.path().join("stat"))?;
        // After the name, which ends with the last parenthesis, comes the state.
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim_start().chars().next());
        match state {
            Some('T') => {}
            Some('Z' | 'X') => bail!("process {pid} has ended"),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// Whether the pair in this directory stands as it started, by the arbiter's record: the primary serves, and the backup is
/// entitled to replace it.
///
/// # Errors
/// If there is no record.
pub fn is_protected(directory: &Path) -> Result<bool> {
    let name = Config::default().name;
    let arbiter = FileArbiter::open(&directory.join("arbiter"), &name, Durability::ProcessDeath)?;
    let record = arbiter
        .read()?
        .context("the arbiter has no record of the pair")?;
    Ok(record.epoch == Epoch(1) && record.state == State::Live && record.entitled.is_some())
}

/// Feels how long threads wait for a CPU on this host.
#[derive(Debug)]
pub struct Pulse {
    shared: Arc<PulseShared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct PulseShared {
    worst: AtomicU64,
    over: AtomicBool,
}

impl Pulse {
    /// Starts to feel.
    ///
    /// # Errors
    /// If the host gives no threads.
    pub fn start() -> Result<Self> {
        /// One for each CPU of the smallest host that runs this.
        const THREADS: usize = 2;
        const EVERY: Duration = Duration::from_millis(1);
        let mut pulse = Self {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let shared = Arc::clone(&pulse.shared);
            let beat = move || {
                while !shared.over.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    std::thread::sleep(EVERY);
                    let late = started.elapsed().saturating_sub(EVERY);
                    shared
                        .worst
                        .fetch_max(late.as_nanos() as u64, Ordering::Relaxed);
                }
            };
            let thread = std::thread::Builder::new().name("pulse".into());
            pulse
                .threads
                .push(thread.spawn(beat).context("start a thread")?);
        }
        Ok(pulse)
    }

    /// The longest that a thread waited since the last call.
    #[must_use]
    pub fn worst(&self) -> Duration {
        Duration::from_nanos(self.shared.worst.swap(0, Ordering::Relaxed))
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// The log that a process writes to: the memory itself, which stays readable when the process is gone.
#[derive(Debug)]
pub struct LogMemory(File);

/// Where the lanes' tail words lie in the ring's first page (`LogWords` in rdma-log), in bytes.
const TAILS: [u64; 2] = [0, 384];

/// Set in a tail: the lane is fenced.
const FENCE: u64 = 1 << 63;

impl LogMemory {
    /// Of this process, which has the ring mapped.
    ///
    /// # Errors
    /// If it has none, or we may not look.
    pub fn of(pid: u32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
            .context("look at a process's memory")?;
        let line = maps
            .lines()
            .find(|line| line.contains("/memfd:rdma-log ") || line.ends_with("/memfd:rdma-log"))
            .context("the process has no ring mapped")?;
        let range = line.split(' ').next().context("a line of maps")?;
        let path = format!("/proc/{pid}/map_files/{range}");
        Ok(Self(File::open(path).context("open the ring's memory")?))
    }

    /// How many bytes of each lane have committed.
    ///
    /// # Errors
    /// If a lane is not fenced, or the memory cannot be read.
    pub fn fenced_at(&self) -> Result<[u64; 2]> {
        let mut ends = [0; 2];
        for (end, at) in ends.iter_mut().zip(TAILS) {
            let mut bytes = [0; 8];
            self.0
                .read_exact_at(&mut bytes, at)
                .context("read a tail word")?;
            let tail = u64::from_le_bytes(bytes);
            ensure!(
                tail & FENCE != 0,
                "a lane of the old log is not fenced: {tail:#x}"
            );
            *end = tail & !FENCE;
        }
        Ok(ends)
    }
}
