//! One `doppel` process, its output and its messages.
#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::program;
use super::signal::{Signal, send};

/// A process of ours, killed when it is dropped.
#[derive(Debug)]
pub struct Role {
    name: String,
    child: Child,
    output: PathBuf,
    messages: PathBuf,
}

impl Role {
    /// Starts `doppel` with these arguments in `directory`; `name` is for its files.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(directory: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        Self::spawn(
            directory,
            name,
            Command::new(program::doppel()?).args(arguments),
        )
    }

    /// Starts another program than this `doppel` in its place.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_program(
        directory: &Path,
        name: &str,
        program: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::spawn(directory, name, Command::new(program).args(arguments))
    }

    /// Starts `doppel` with these arguments where a file system of so many bytes is mounted at `place`, for this process alone.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_with_little_space(
        directory: &Path,
        name: &str,
        (place, bytes): (&Path, u64),
        arguments: &[&str],
    ) -> Result<Self> {
        let mount = format!(
            "mount -t tmpfs -o size={bytes} none '{0}' && truncate -s 4M '{0}/disk' && exec \"$@\"",
            place.display()
        );
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                &mount,
                "sh",
            ])
            .arg(program::doppel()?)
            .args(arguments);
        Self::spawn(directory, name, &mut command)
    }

    fn spawn(directory: &Path, name: &str, command: &mut Command) -> Result<Self> {
        let output = directory.join(format!("{name}.stdout"));
        let messages = directory.join(format!("{name}.stderr"));
        let child = command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(File::create(&output).context("create a file for output")?)
            .stderr(File::create(&messages).context("create a file for messages")?)
            .spawn()
            .context("start doppel")?;
        Ok(Self {
            name: name.to_owned(),
            child,
            output,
            messages,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has said, output and messages.
    #[must_use]
    pub fn said(&self) -> String {
        [&self.output, &self.messages]
            .map(|path| {
                let bytes = std::fs::read(path).unwrap_or_default();
                String::from_utf8_lossy(&bytes).into_owned()
            })
            .concat()
    }

    /// Waits until it has said `word`.
    ///
    /// # Errors
    /// If it ends before, or does not say it in time.
    pub fn until(&mut self, word: &str, longest: Duration) -> Result<()> {
        self.until_one_of(&[word], longest).map(|_| ())
    }

    /// Waits until it has said one of these words; which one.
    ///
    /// # Errors
    /// If it ends before, or says none in time.
    pub fn until_one_of(&mut self, words: &[&str], longest: Duration) -> Result<usize> {
        let until = Instant::now() + longest;
        loop {
            let ended = self.child.try_wait().context("look after a process")?;
            // After the look: what it said last may have come between the two.
            let said = self.said();
            if let Some(which) = words.iter().position(|word| said.contains(word)) {
                return Ok(which);
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended by {status} before it said {words:?}: {said}",
                    self.name
                );
            }
            if Instant::now() >= until {
                bail!(
                    "{} did not say {words:?} within {longest:?}: {said}",
                    self.name
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self
            .child
            .try_wait()
            .context("look after a process")?
            .is_none())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(&mut self, longest: Duration) -> Result<ExitStatus> {
        let ended = program::await_end(&mut self.child, longest)?;
        ended.with_context(|| {
            let (name, said) = (&self.name, self.said());
            format!("{name} has not ended within {longest:?}: {said}")
        })
    }

    /// Waits for an end with a clear error: an exit code of its own, some words, and no panic.
    ///
    /// # Errors
    /// What it was instead.
    pub fn clear_error(&mut self, longest: Duration, codes: &[i32]) -> Result<String> {
        let status = self.end(longest)?;
        let said = self.said();
        ensure!(!said.contains("panicked"), "{} panicked: {said}", self.name);
        ensure!(
            status.code().is_some_and(|code| codes.contains(&code)),
            "{} ended by {status}, not with one of {codes:?}: {said}",
            self.name
        );
        ensure!(
            said.contains("doppel: "),
            "{} gave no reason: {said}",
            self.name
        );
        Ok(said)
    }

    /// SIGTERM, and a good end.
    ///
    /// # Errors
    /// If it does not end well, or not in time.
    pub fn stop(&mut self, longest: Duration) -> Result<()> {
        send(self.pid(), Signal::Terminate)?;
        let status = self.end(longest)?;
        ensure!(
            status.code() == Some(0),
            "{} ended by {status}: {}",
            self.name,
            self.said()
        );
        Ok(())
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It fails only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
