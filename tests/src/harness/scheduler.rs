//! What the host's scheduler does to a thread at this moment: by so much a time limit means more on a busy host.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Waits and computes as the two threads of a side do, and notes how long it stood in line for a CPU each time.
pub struct Delays {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<u64>>>,
}

impl Delays {
    /// Starts: waits for `wait`, computes for `compute`, and so on.
    pub fn start(wait: Duration, compute: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut delays = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let (computed, stood) = times()?;
                std::thread::sleep(wait);
                while times()?.0 < computed + compute.as_nanos() as u64 {
                    std::hint::spin_loop();
                }
                delays.push((times()?.1 - stood) / 1000);
            }
            Ok(delays)
        });
        Self { over, thread }
    }

    /// The delay, in microseconds, below which so many of a hundred rounds were.
    ///
    /// # Errors
    /// If the kernel does not say how long a thread stands in line.
    ///
    /// # Panics
    /// If the thread panicked.
    pub fn finish(self, percent: usize) -> Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        let mut delays = self.thread.join().expect("the thread does not panic")?;
        ensure!(!delays.is_empty(), "not one round was measured");
        delays.sort_unstable();
        Ok(delays[(delays.len() * percent / 100).min(delays.len() - 1)])
    }
}

/// Nanoseconds that this thread was on a CPU, and that it stood in line for one.
fn times() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")
        .context("read the scheduler's figures")?;
    let mut words = text.split_whitespace().map(str::parse);
    match (words.next(), words.next()) {
        (Some(Ok(computed)), Some(Ok(stood))) => Ok((computed, stood)),
        _ => anyhow::bail!("the scheduler's figures are {text:?}"),
    }
}
