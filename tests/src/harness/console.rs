//! A program at a machine's console: `doppel console` with pipes, and what the guest `console` says to it.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdma_log::locks::lock;

use super::program;

/// Between two tries of a line of which something was lost.
const AGAIN: Duration = Duration::from_secs(2);

/// `doppel console`, from a pipe.
#[derive(Debug)]
pub struct Viewer {
    child: Child,
    keys: Option<ChildStdin>,
    shown: Arc<Mutex<Vec<u8>>>,
    said: Arc<Mutex<Vec<u8>>>,
}

fn gather(mut from: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let all: Arc<Mutex<Vec<u8>>> = Arc::default();
    let to = Arc::clone(&all);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count) = from.read(&mut bytes) {
            if count == 0 {
                return;
            }
            let mut to = lock(&to);
            to.extend_from_slice(&bytes[..count]);
        }
    });
    all
}

fn text(of: &Mutex<Vec<u8>>) -> String {
    let bytes = lock(of);
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Viewer {
    /// Looks at all that is kept of the console of the machine `name`, and at what follows.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(run_directory: &Path, name: &str) -> Result<Self> {
        let mut command = Command::new(program::doppel()?);
        command
            .args(["console", name, "--all", "--run-dir"])
            .arg(run_directory);
        Self::begin(command)
    }

    /// The same of a machine of a site, with an agent's configuration.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_at_site(config: &Path, name: &str) -> Result<Self> {
        let mut command = Command::new(program::doppel()?);
        command
            .args(["vm", "console", name, "--all", "--config"])
            .arg(config);
        Self::begin(command)
    }

    fn begin(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start doppel console")?;
        let shown = gather(child.stdout.take().context("its output")?);
        let said = gather(child.stderr.take().context("its messages")?);
        Ok(Self {
            keys: child.stdin.take(),
            child,
            shown,
            said,
        })
    }

    /// Types this.
    ///
    /// # Errors
    /// If it has ended.
    pub fn type_in(&mut self, keys: &str) -> Result<()> {
        let to = self.keys.as_mut().context("nothing more is typed")?;
        to.write_all(keys.as_bytes()).context("type")
    }

    /// Types no more.
    pub fn hang_up(&mut self) {
        self.keys = None;
    }

    /// All that the console has shown.
    #[must_use]
    pub fn shown(&self) -> String {
        text(&self.shown)
    }

    /// All that `doppel` has said about it.
    #[must_use]
    pub fn said(&self) -> String {
        text(&self.said)
    }

    /// Waits until the console has shown so much behind its first `from` bytes.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn until_behind(&self, from: usize, word: &str, longest: Duration) -> Result<()> {
        let until = Instant::now() + longest;
        while !self
            .shown()
            .get(from..)
            .is_some_and(|shown| shown.contains(word))
        {
            ensure!(
                Instant::now() < until,
                "the console did not show {word:?} within {longest:?}: {:?}, {:?}",
                self.shown(),
                self.said()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until the console has shown this.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn until(&self, word: &str, longest: Duration) -> Result<()> {
        self.until_behind(0, word, longest)
    }

    /// Types a line, again if something of it was lost in a failover, until the guest has answered by `word`.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn ask(&mut self, line: &str, word: &str, longest: Duration) -> Result<()> {
        let until = Instant::now() + longest;
        loop {
            let from = self.shown().len();
            // Ends what was typed of a line whose rest was lost.
            self.type_in("\n")?;
            self.type_in(&format!("{line}\n"))?;
            if self.until_behind(from, word, AGAIN.min(longest)).is_ok() {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!(
                    "{line:?} was not answered by {word:?} within {longest:?}: {:?}, {:?}",
                    self.shown(),
                    self.said()
                );
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(&mut self, longest: Duration) -> Result<ExitStatus> {
        let ended = program::await_end(&mut self.child, longest)?;
        ended.with_context(|| format!("it has not ended within {longest:?}: {:?}", self.said()))
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        // It fails only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks what a viewer was shown of a guest that was told nothing but `say N`: every line whole, in order, and once, wherever the machine
/// was served; how many there are. Of what was typed some may have been lost.
///
/// # Errors
/// The first line that is wrong.
pub fn check_lines(shown: &str) -> Result<u64> {
    let (mut lines, mut next) = (0, 1);
    let whole = shown.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        if let Some(number) = line.strip_prefix("line ") {
            let number: u64 = number.parse().with_context(|| format!("{line:?}"))?;
            // A new one begins where the one before was at its end.
            ensure!(
                number == next || number == 1,
                "line {number} stands where line {next} should"
            );
            (lines, next) = (lines + 1, number + 1);
            continue;
        }
        let typed = line.strip_prefix("heard: ").unwrap_or(line);
        ensure!(
            typed == "console: start" || "say 1000000".starts_with(typed) || is_say(typed),
            "{line:?} is nothing that the guest said"
        );
    }
    Ok(lines)
}

fn is_say(typed: &str) -> bool {
    typed
        .strip_prefix("say ")
        .is_some_and(|count| count.bytes().all(|byte| byte.is_ascii_digit()))
}
