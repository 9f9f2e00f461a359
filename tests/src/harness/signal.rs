//! Signals to processes that a test started.
//!
//! Unsafe code lives here for `kill(2)`, which the standard library has only as SIGKILL.

use anyhow::{Context, Result, ensure};

/// A signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGINT, as Ctrl-C sends it.
    Interrupt,
    /// SIGSTOP.
    Stop,
    /// SIGCONT.
    Continue,
    /// SIGKILL.
    Kill,
}

/// Sends it to a process that is a child of this one and was not waited for.
///
/// # Errors
/// If there is no such process.
pub fn send(process: u32, signal: Signal) -> Result<()> {
    let number = match signal {
        Signal::Terminate => libc::SIGTERM,
        Signal::Interrupt => libc::SIGINT,
        Signal::Stop => libc::SIGSTOP,
        Signal::Continue => libc::SIGCONT,
        Signal::Kill => libc::SIGKILL,
    };
    let process = libc::pid_t::try_from(process).context("a process id")?;
    ensure!(process > 1, "process {process} is none of ours");
    // SAFETY: kill touches no memory.
    let sent = unsafe { libc::kill(process, number) };
    if sent != 0 {
        return Err(std::io::Error::last_os_error()).context("send a signal");
    }
    Ok(())
}
