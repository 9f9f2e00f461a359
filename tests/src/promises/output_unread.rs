//! Output that nobody reads: the console, events and the log go into pipes that are full, and to a terminal that Ctrl-S has stopped. The guest
//! runs, its sides beat, the backup takes over, and all of them end.
#![forbid(unsafe_code)]

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::wait::Waiter;
use hypervisor::control::status::{Role as Now, Standing, Status};

use crate::harness::console::Viewer;
use crate::harness::operator::Operator;
use crate::harness::program::{await_end, doppel};
use crate::harness::pty::AtTerminal;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "output-unread",
    line: "a console, events and a log that nobody reads (full pipes, a terminal stopped by Ctrl-S) stop neither guest nor heartbeats nor a go-live",
    short: Duration::from_secs(15),
    full: Duration::from_secs(40),
    show,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The machine's name, if none was chosen.
const MACHINE: &str = "machine";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut slowest = Duration::ZERO;
    let rounds = run.form.pick(1, 4);
    for _ in 0..rounds {
        // Each in the role that it has at first: one says what it has to say in objects, the other prints the console.
        for json in [[true, false], [false, true]] {
            let took =
                pair(json).with_context(|| format!("--json of primary and backup: {json:?}"))?;
            run.say(format!(
                "two sides with full pipes: the backup served {took:?} after the kill"
            ));
            slowest = slowest.max(took);
        }
    }
    at_a_terminal()?;
    run.say("a machine at a terminal that is stopped: it runs, and ends");
    figures.add("failovers", 2 * rounds as u64);
    figures.add("slowest_ms", slowest.as_millis() as u64);
    Ok(figures)
}

/// A pipe that takes nothing more.
fn full_pipe() -> Result<(PipeReader, PipeWriter)> {
    let (reading, mut writing) = std::io::pipe().context("make a pipe")?;
    loop {
        let mut waiter = Waiter::new();
        let room = waiter.add(&writing, false, true);
        waiter
            .wait(Some(Duration::ZERO))
            .context("look at a pipe")?;
        if !waiter.ready(room).write {
            return Ok((reading, writing));
        }
        // There is room for a page at least.
        writing.write_all(&[0; 4096]).context("fill a pipe")?;
    }
}

/// A process whose output nobody reads.
struct Unread {
    child: Child,
    output: PipeReader,
    /// Held open.
    _messages: PipeReader,
}

impl Unread {
    fn start(work: &Path, role: &str, json: bool, more: &[&str]) -> Result<Self> {
        let ((output, stdout), (messages, stderr)) = (full_pipe()?, full_pipe()?);
        let mut command = Command::new(doppel()?);
        command
            .args([role, "--arbiter", "arbiter", "--socket", "pair.sock"])
            .args(["--run-dir", "run"])
            .args(json.then_some("--json"))
            .args(more)
            .current_dir(work)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        let child = command.spawn().context("start doppel")?;
        Ok(Self {
            child,
            output,
            _messages: messages,
        })
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        // It has ended already unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pair([primary, backup]: [bool; 2]) -> Result<Duration> {
    let work = tempfile::tempdir().context("make a directory")?;
    let run = work.path().join("run");
    std::fs::create_dir(work.path().join("arbiter")).context("make the arbiter's directory")?;
    let operator = Operator::of(&run, MACHINE);
    let stands = |child: &Child, standing| {
        operator.until(child.id(), PATIENCE, |status: &Status| {
            status.standing == standing
        })
    };
    let mut backup = Unread::start(work.path(), "backup", backup, &[])?;
    stands(&backup.child, Standing::Waiting)?;
    let guest = ["--guest", "console", "--memory", "16"];
    let mut primary = Unread::start(work.path(), "primary", primary, &guest)?;
    stands(&primary.child, Standing::Protected)?;
    let mut viewer = Viewer::start(&run, MACHINE)?;
    viewer.until("console: start", PATIENCE)?;
    // Some console bytes, and time for heartbeats to be missed and for events that are due by the clock.
    viewer.type_in("say 50\nhello\n")?;
    viewer.until("heard: hello", PATIENCE)?;
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        let status = operator.status(primary.child.id())?;
        ensure!(
            status.standing == Standing::Protected,
            "a healthy side was given up: {:?}",
            status.standing
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    primary.child.kill().context("kill the primary")?;
    let killed = Instant::now();
    operator.until(backup.child.id(), PATIENCE, |status| {
        status.role == Now::Primary && status.standing == Standing::Unprotected
    })?;
    let took = killed.elapsed();
    // What is typed before the viewer has gone over to the survivor may go to the killed process, and is lost with it.
    viewer.ask("still there", "heard: still there", PATIENCE)?;
    drop(viewer);
    send(backup.child.id(), Signal::Terminate)?;
    let ended = await_end(&mut backup.child, PATIENCE)?;
    let ended = ended.context("a process whose output nobody reads does not end")?;
    ensure!(ended.success(), "it ended by {ended}");
    // What was not read is still what it was.
    let mut output = Vec::new();
    backup
        .output
        .read_to_end(&mut output)
        .context("read what nobody has read")?;
    ensure!(
        output.iter().all(|&byte| byte == 0),
        "a full pipe took more"
    );
    Ok(took)
}

fn at_a_terminal() -> Result<()> {
    let work = tempfile::tempdir().context("make a directory")?;
    let run = work.path().join("run");
    let arguments = [
        "run",
        "--guest",
        "console",
        "--memory",
        "16",
        "--run-dir",
        "run",
    ];
    let mut terminal = AtTerminal::start(work.path(), &arguments)?;
    terminal.until("console: start", PATIENCE)?;
    // Ctrl-S: the terminal's own, as this command takes no keys.
    terminal.press(b"\x13")?;
    let mut viewer = Viewer::start(&run, MACHINE)?;
    viewer.type_in("say 50\nhello\n")?;
    viewer.until("heard: hello", PATIENCE)?;
    ensure!(
        !terminal.has_shown("heard: hello"),
        "the terminal was not stopped"
    );
    // Ctrl-Q.
    terminal.press(b"\x11")?;
    terminal.until("heard: hello", PATIENCE)?;
    terminal.press(b"\x13")?;
    viewer.type_in("goodbye\n")?;
    viewer.until("heard: goodbye", PATIENCE)?;
    send(terminal.pid(), Signal::Terminate)?;
    let ended = terminal.end(PATIENCE)?;
    ensure!(ended.success(), "it ended by {ended}");
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
