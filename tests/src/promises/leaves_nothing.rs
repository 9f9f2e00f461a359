//! Every role, ended by SIGTERM or Ctrl-C at any stage, and a backup by the order to leave: it ends with code 0 and leaves nothing behind. A
//! backup that is told to leave when its primary has just died stays.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::control::find;
use hypervisor::control::status::Role as Now;
use hypervisor::control::wire::Ask;
use tempfile::TempDir;

use crate::harness::operator::Operator;
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "leaves-nothing",
    line: "SIGTERM and Ctrl-C end every role cleanly: no process, socket, directory or interface stays behind",
    short: Duration::from_secs(15),
    full: Duration::from_secs(60),
    show,
};

/// A role must end within this time of a signal: twice what a guest that does not exit may take to be stopped.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

fn show(run: &Run) -> Result<Figures> {
    let rounds = run.form.pick(1, 5);
    let mut random = Random::new(run.seed);
    let mut slowest = Duration::ZERO;
    let mut ended = 0;
    let before = traces()?;
    for _ in 0..rounds {
        for told in [
            Told::By(Signal::Terminate),
            Told::By(Signal::Interrupt),
            Told::ToLeave,
        ] {
            for role in ROLES.into_iter().filter(|role| told.is_for(*role)) {
                let work = tempfile::tempdir().context("make a directory")?;
                let patience = random.between(Duration::ZERO, Duration::from_millis(600));
                let took = end(role, &work, told, patience).with_context(|| {
                    format!("{role:?}, {told:?} {patience:?} after it was ready")
                })?;
                run.say(format!("{role:?} ended {took:?} after {told:?}"));
                slowest = slowest.max(took);
                ended += 1;
                left_behind(&work)?;
            }
        }
        let work = tempfile::tempdir().context("make a directory")?;
        orphan(&work).context("a backup that is told to leave when its primary has died")?;
        left_behind(&work)?;
    }
    let after = traces()?;
    let new: Vec<_> = after.difference(&before).collect();
    ensure!(new.is_empty(), "left behind: {new:?}");
    let mut figures = Figures::default();
    figures.add("roles_ended", ended);
    figures.add("slowest_ms", slowest.as_millis() as u64);
    Ok(figures)
}

#[derive(Clone, Copy, Debug)]
enum Role {
    Solo,
    Recording,
    BackupWaiting,
    Primary,
    Backup,
    Serving,
}

const ROLES: [Role; 6] = [
    Role::Solo,
    Role::Recording,
    Role::BackupWaiting,
    Role::Primary,
    Role::Backup,
    Role::Serving,
];

/// How a role is told to end.
#[derive(Clone, Copy, Debug)]
enum Told {
    By(Signal),
    /// By an order, as an agent gives it.
    ToLeave,
}

impl Told {
    fn is_for(self, role: Role) -> bool {
        matches!(self, Self::By(_)) || matches!(role, Role::BackupWaiting | Role::Backup)
    }
}

/// The machine's name, if none was chosen.
const MACHINE: &str = "machine";

fn tell_to_leave(work: &TempDir, pid: u32) -> std::io::Result<u64> {
    find::order(&work.path().join("run"), MACHINE, pid, Ask::Leave)
}

struct Started {
    child: Child,
}

impl Started {
    fn new(work: &TempDir, arguments: &[&str]) -> Result<Self> {
        let child = Command::new(doppel()?)
            .args(arguments)
            .current_dir(work.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start doppel")?;
        Ok(Self { child })
    }

    /// Reads its lines until one has this word. The rest of its output goes nowhere, but its pipe stays open.
    fn until(&mut self, word: &str) -> Result<()> {
        let stdout = self
            .child
            .stdout
            .take()
            .context("its output was read before")?;
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        loop {
            line.clear();
            if lines.read_line(&mut line).context("read its output")? == 0 {
                bail!("it ended before it said {word:?}");
            }
            if line.contains(word) {
                break;
            }
        }
        std::thread::spawn(move || lines.lines().map_while(Result::ok).for_each(drop));
        Ok(())
    }

    fn end(&mut self, work: &TempDir, told: Told) -> Result<Duration> {
        let asked = Instant::now();
        match told {
            Told::By(signal) => send(self.child.id(), signal)?,
            Told::ToLeave => {
                tell_to_leave(work, self.child.id()).context("order it to leave")?;
            }
        }
        loop {
            if let Some(status) = self.child.try_wait().context("look at it")? {
                ensure!(status.code() == Some(0), "it ended with {status}");
                return Ok(asked.elapsed());
            }
            ensure!(
                asked.elapsed() < ENDS_WITHIN,
                "it did not end within {ENDS_WITHIN:?}"
            );
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It has ended already unless something failed, and then nothing of it may stay.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A side of the pair in this directory.
fn side(work: &TempDir, role: &str, more: &[&str]) -> Result<Started> {
    let mut arguments = vec![role];
    arguments.extend([
        "--json",
        "--arbiter",
        "arbiter",
        "--socket",
        "pair.sock",
        "--console",
        "console",
        "--run-dir",
        "run",
    ]);
    arguments.extend(more);
    Started::new(work, &arguments)
}

/// A primary and its backup.
fn paired(work: &TempDir) -> Result<(Started, Started)> {
    let mut backup = side(work, "backup", &[])?;
    backup.until("ready")?;
    let mut primary = side(work, "primary", &["--guest", "irq"])?;
    primary.until("paired")?;
    Ok((primary, backup))
}

/// The backup has not learned of its primary's end when it is told to leave: it is all that there is of the machine.
fn orphan(work: &TempDir) -> Result<()> {
    fs::create_dir(work.path().join("arbiter")).context("make the arbiter's directory")?;
    let (mut primary, mut backup) = paired(work)?;
    let pid = backup.child.id();
    // It cannot learn it before it is told: both wait for it when it goes on.
    send(pid, Signal::Stop)?;
    primary.child.kill().context("kill the primary")?;
    primary.child.wait().context("see the primary's end")?;
    let told = tell_to_leave(work, pid);
    ensure!(told.is_err(), "a stopped process answered");
    send(pid, Signal::Continue)?;
    let operator = Operator::of(work.path().join("run"), MACHINE);
    operator
        .until(pid, ENDS_WITHIN, |status| status.role == Now::Primary)
        .context("the machine went with its backup")?;
    let refused = tell_to_leave(work, pid);
    ensure!(
        refused.is_err_and(|why| why.to_string().contains("only a backup")),
        "who serves was told to leave"
    );
    backup.end(work, Told::By(Signal::Terminate))?;
    // Who is killed takes nothing away: its socket is there, and all that may be.
    let socket = format!("{MACHINE}.{}.sock", primary.child.id());
    fs::remove_file(work.path().join("run").join(socket)).context("remove the killed one's socket")
}

fn end(role: Role, work: &TempDir, told: Told, patience: Duration) -> Result<Duration> {
    fs::create_dir(work.path().join("arbiter")).context("make the arbiter's directory")?;
    let mut one = match role {
        Role::Solo => {
            let mut solo = Started::new(
                work,
                &["run", "--json", "--guest", "irq", "--run-dir", "run"],
            )?;
            solo.until("ready")?;
            solo
        }
        Role::Recording => {
            let mut recording = Started::new(
                work,
                &[
                    "record",
                    "--json",
                    "--guest",
                    "clock",
                    "--out",
                    "clock.log",
                    "--run-dir",
                    "run",
                ],
            )?;
            recording.until("ready")?;
            recording
        }
        Role::BackupWaiting => {
            let mut backup = side(work, "backup", &[])?;
            backup.until("ready")?;
            backup
        }
        Role::Primary | Role::Backup => {
            let (primary, backup) = paired(work)?;
            std::thread::park_timeout(patience);
            let (mut first, mut second) = match role {
                Role::Primary => (primary, backup),
                _ => (backup, primary),
            };
            let took = first.end(work, told)?;
            // The other side outlives its peer: a primary goes on alone, a backup learns that the reign has ended.
            if matches!(role, Role::Backup) {
                let end = match told {
                    Told::By(_) => told,
                    Told::ToLeave => Told::By(Signal::Terminate),
                };
                return Ok(took.max(second.end(work, end)?));
            }
            let asked = Instant::now();
            while second.child.try_wait().context("look at it")?.is_none() {
                ensure!(
                    asked.elapsed() < ENDS_WITHIN,
                    "the backup did not hear that the machine was ended"
                );
                std::thread::park_timeout(Duration::from_millis(2));
            }
            return Ok(took);
        }
        Role::Serving => {
            let mut demo = Started::new(work, &["demo", "--json", "--serve"])?;
            demo.until("primary_pid")?;
            demo
        }
    };
    std::thread::park_timeout(patience);
    one.end(work, told)
}

/// What a role may leave in its own directory: the arbiter's records, a console, the log that was asked for, and its run directory
/// without a socket in it.
fn left_behind(work: &TempDir) -> Result<()> {
    if let Ok(sockets) = fs::read_dir(work.path().join("run")) {
        ensure!(sockets.count() == 0, "a control socket was left");
    }
    for entry in fs::read_dir(work.path()).context("look into the directory")? {
        let name = entry.context("look into the directory")?.file_name();
        let name = name.to_string_lossy();
        ensure!(
            ["arbiter", "console", "clock.log", "run"].contains(&&*name),
            "{name} was left in its directory"
        );
    }
    Ok(())
}

/// What a demo would leave elsewhere: its directories, its interfaces, its processes.
fn traces() -> Result<BTreeSet<String>> {
    let mut traces = BTreeSet::new();
    let mut look = |directory: &Path, prefix: &str| -> Result<()> {
        for entry in
            fs::read_dir(directory).with_context(|| format!("look into {}", directory.display()))?
        {
            let Ok(entry) = entry else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) {
                traces.insert(directory.join(name).display().to_string());
            }
        }
        Ok(())
    };
    look(&std::env::temp_dir(), "doppel-demo-")?;
    look(Path::new("/sys/class/net"), "doppel")?;
    Ok(traces)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
