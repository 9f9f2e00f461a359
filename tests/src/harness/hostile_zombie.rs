//! What can be known of a frozen process from outside: that it stands still, and how far its log has committed.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::demo::pair::Side;

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
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
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
