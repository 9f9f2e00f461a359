//! A role's process, from which SIGTERM is kept; and an `srun` that is not needed any more.
//!
//! Slurm sends SIGTERM to every process of a job that is cancelled. A role takes that as its own end: a backup would leave its primary, so
//! that the machine's last entry is not replicated. Here it is the keeper's to say when, by SIGINT or by an order.
//!
//! An `srun` that has started its task goes without a trace, or not at all: it hands signals on to the task, and a process that it has forked
//! kills the task's step when it ends without a word. So both get SIGKILL at once, as a group of their own.
//!
//! Unsafe: signals between fork and exec, and `kill`, which the standard library does not have.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

/// A role.
#[derive(Debug)]
pub(super) struct Role {
    child: Child,
}

impl Role {
    /// Starts one; it says what it has to say where this process does.
    pub(super) fn start(program: &Path, words: &[impl AsRef<OsStr>]) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::null());
        // SAFETY: signal, sigemptyset, sigaddset and sigprocmask are async-signal-safe, and the last three touch this set alone, which lives on the stack.
        unsafe {
            command.pre_exec(|| {
                // Ignored where a shell has started us beside what it went on with, and inherited.
                if libc::signal(libc::SIGINT, libc::SIG_DFL) == libc::SIG_ERR {
                    return Err(io::Error::last_os_error());
                }
                let mut set = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGTERM);
                match libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        command.spawn().map(|child| Self { child })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// SIGINT: a primary turns its machine off, a backup leaves.
    pub(super) fn interrupt(&self) -> io::Result<()> {
        let process = libc::pid_t::try_from(self.child.id())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: kill touches no memory. The process is a child that was not waited for, so its number is its own.
        match unsafe { libc::kill(process, libc::SIGINT) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// An `srun`, the leader of a group of processes.
#[derive(Debug)]
pub(super) struct Srun {
    child: Child,
}

impl Srun {
    /// Starts one.
    pub(super) fn start(command: &mut Command) -> io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        Ok(Self { child })
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Ends it; its task runs on.
    pub(super) fn dismiss(&mut self) -> io::Result<()> {
        let group = libc::pid_t::try_from(self.child.id())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: kill touches no memory. The group's leader is a child that was not waited for, so its number is the group's own.
        if unsafe { libc::kill(-group, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.child.wait().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn await_end(role: &mut Role) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = role.ended().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn sigterm_is_kept_from_a_role_and_sigint_is_not() {
        let script = "kill -TERM $$; exit 7";
        let mut role = Role::start(Path::new("/bin/sh"), &["-c", script]).unwrap();
        assert_eq!(await_end(&mut role).code(), Some(7));
        let mut role = Role::start(Path::new("/bin/sleep"), &["60"]).unwrap();
        role.interrupt().unwrap();
        assert_eq!(await_end(&mut role).code(), None);
    }

    #[test]
    fn an_srun_goes_with_what_it_has_forked() {
        let directory = tempfile::tempdir().unwrap();
        let (mut reading, writing) = io::pipe().unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "sleep 60 & echo >up; wait"])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(writing);
        let mut srun = Srun::start(&mut command).unwrap();
        drop(command);
        let until = Instant::now() + Duration::from_secs(30);
        while !directory.path().join("up").exists() {
            assert!(Instant::now() < until, "it does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(srun.ended().unwrap().is_none());
        srun.dismiss().unwrap();
        // Whoever is left of the group has the pipe.
        io::Read::read_to_end(&mut reading, &mut Vec::new()).unwrap();
        assert!(Instant::now() < until, "a process of the group went on");
    }
}
