//! Processes that the lab started: signals, waiting, and that they die with who started them.
//!
//! Unsafe code lives here for `kill(2)`, `waitid(2)`, `prctl(2)` and `setsid(2)`, which the standard library does not have.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What can be done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Stop,
    /// SIGCONT.
    Continue,
}

impl Signal {
    fn number(self) -> libc::c_int {
        match self {
            Self::Kill => libc::SIGKILL,
            Self::Stop => libc::SIGSTOP,
            Self::Continue => libc::SIGCONT,
        }
    }
}

/// Sends a signal to a child that has not been waited for.
///
/// # Errors
/// What the kernel says.
pub fn signal(process: u32, signal: Signal) -> io::Result<()> {
    send(process, 1, signal)
}

/// Sends a signal to the process group that a child leads which has not been waited for.
///
/// # Errors
/// What the kernel says.
pub fn signal_group(process: u32, signal: Signal) -> io::Result<()> {
    send(process, -1, signal)
}

fn send(process: u32, sign: libc::pid_t, signal: Signal) -> io::Result<()> {
    let process = libc::pid_t::try_from(process)
        .ok()
        .filter(|&process| process > 1)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: kill touches no memory.
    match unsafe { libc::kill(sign * process, signal.number()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until a child has ended, and leaves its process id taken: a signal meant for it cannot reach another.
pub fn await_end(child: u32) {
    loop {
        // SAFETY: zero is a valid siginfo_t, and the kernel writes into this one only.
        let ended = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(
                libc::P_PID,
                child,
                &raw mut info,
                libc::WEXITED | libc::WNOWAIT,
            )
        };
        if ended == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// Makes what `command` starts die when the *thread* that starts it ends.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is async-signal-safe, and the closure touches nothing else.
    unsafe {
        command.pre_exec(|| {
            match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }
}

/// Makes what `command` starts independent of the terminal from which it was started.
pub fn in_own_session(command: &mut Command) -> &mut Command {
    // SAFETY: setsid is async-signal-safe, and the closure touches nothing else.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    }
}
