//! The operator's hand on a machine of this host, and what its processes say of themselves.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::control::find;
use hypervisor::control::status::Status;

use super::program::doppel;

/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(5);

/// Who looks after one machine.
#[derive(Clone, Debug)]
pub struct Operator {
    run: PathBuf,
    machine: String,
}

impl Operator {
    /// Of this machine, whose processes have their control sockets in this directory.
    #[must_use]
    pub fn of(run: impl Into<PathBuf>, machine: &str) -> Self {
        Self {
            run: run.into(),
            machine: machine.to_owned(),
        }
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(doppel()?);
        command.args(&words[..1]).arg(&self.machine);
        command.args(&words[1..]).arg("--run-dir").arg(&self.run);
        Ok(command)
    }

    /// `doppel` with these words about the machine, the first of which says what to do.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn order(&self, words: &[&str]) -> Result<Output> {
        self.command(words)?.output().context("start doppel")
    }

    /// The same, while the caller does something else; nobody hears what it says.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin(&self, words: &[&str]) -> Result<Child> {
        let mut command = self.command(words)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().context("start doppel")
    }

    /// What is printed of an order that is done.
    ///
    /// # Errors
    /// If it is not done: what it says.
    pub fn ordered(&self, words: &[&str]) -> Result<String> {
        let output = self.order(words)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{words:?}: {}: {said}",
            output.status
        );
        String::from_utf8(output.stdout).context("what doppel printed")
    }

    /// What is said of an order that must not be done.
    ///
    /// # Errors
    /// If it is done, or fails otherwise than by being refused.
    pub fn refusal(&self, words: &[&str]) -> Result<String> {
        let output = self.order(words)?;
        ensure!(
            output.status.code() == Some(1),
            "{words:?}: {}",
            output.status
        );
        String::from_utf8(output.stderr).context("what doppel said")
    }

    /// What this process of the machine says of itself.
    ///
    /// # Errors
    /// If it does not answer: one that is being set up, or that ends, does not.
    pub fn status(&self, pid: u32) -> Result<Status> {
        let status = find::ask_process(&self.run, &self.machine, pid);
        status.with_context(|| format!("process {pid} does not answer"))
    }

    /// Waits until this process stands so, whether it answers by now or later.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn until(
        &self,
        pid: u32,
        longest: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let until = Instant::now() + longest;
        loop {
            let status = self.status(pid);
            match status {
                Ok(status) if wanted(&status) => return Ok(status),
                status => ensure!(
                    Instant::now() < until,
                    "after {longest:?} it stands so: {status:?}"
                ),
            }
            std::thread::sleep(LOOK);
        }
    }
}
