//! Where the program under test is, and how its processes are waited for.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The `doppel` that was built with these tests: beside them, or where `DOPPEL` says.
///
/// # Errors
/// If it is not there.
pub fn doppel() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("DOPPEL") {
        return Ok(PathBuf::from(path));
    }
    beside("doppel")
}

/// A program that was built with these tests.
///
/// # Errors
/// If it is not there.
pub fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own file")?;
    own.ancestors()
        .skip(1)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no {name} beside the tests: run `cargo build --release --workspace` first")
        })
}

/// Waits for a process's end; none if it does not end within this time.
///
/// # Errors
/// If the kernel does not say.
pub fn await_end(child: &mut Child, longest: Duration) -> Result<Option<ExitStatus>> {
    let until = Instant::now() + longest;
    loop {
        let ended = child.try_wait().context("look after a process")?;
        if ended.is_some() || Instant::now() >= until {
            return Ok(ended);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
