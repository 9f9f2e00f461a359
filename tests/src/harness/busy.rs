//! Busy loops in processes of their own, as other people's work beside a pair.
#![forbid(unsafe_code)]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// So many busy processes of usual priority. Each ends by itself when its time is over, and at the latest when this is dropped.
#[derive(Debug)]
pub struct Busy {
    processes: Vec<Child>,
}

impl Busy {
    /// Starts them, for at most `longest`.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn start(count: usize, longest: Duration) -> Result<Self> {
        let mut busy = Self {
            processes: Vec::new(),
        };
        for _ in 0..count {
            // One process each, whose end by signal is the end of it all.
            let process = Command::new("bash")
                .args(["-c", "while ((SECONDS < $0)); do :; done"])
                .arg(longest.as_secs().max(1).to_string())
                .stdin(Stdio::null())
                .spawn()
                .context("start a busy process")?;
            busy.processes.push(process);
        }
        Ok(busy)
    }

    /// That all of them are still at work.
    ///
    /// # Errors
    /// If one has ended: what was shown beside it was not shown under load.
    pub fn is_on(&mut self) -> Result<()> {
        for process in &mut self.processes {
            let ended = process.try_wait().context("look after a busy process")?;
            ensure!(ended.is_none(), "a busy process ended before its time");
        }
        Ok(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // Both fail only for a process that has ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
