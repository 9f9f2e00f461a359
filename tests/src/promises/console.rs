//! `doppel console`: a machine's console wherever it is served, each byte once, and a terminal that is given back as it was (issue 7).
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::control::find;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;

use crate::harness::console::{Viewer, check_lines};
use crate::harness::program::doppel;
use crate::harness::pty::AtTerminal;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "console",
    line: "doppel console shows each byte once and types, across failovers; its terminal is given back; a viewer that does not read harms nobody",
    short: Duration::from_secs(30),
    full: Duration::from_secs(200),
    show,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// What every machine here is called.
const NAME: &str = "machine";

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let work = directory()?;
    at_a_terminal(work.path()).context("at a terminal")?;
    from_a_pipe(work.path(), &mut figures).context("from a pipe")?;
    let kills = run.form.pick(2, 12);
    for (name, transport, replicate) in [
        ("replay_shm", Transport::Shm, "replay"),
        ("replay_tcp", Transport::Tcp, "replay"),
        ("checkpoint_shm", Transport::Shm, "checkpoint"),
    ] {
        let spec = spec_in(work.path(), name, transport, replicate)?;
        let lines = failovers(&spec, kills, &mut random).with_context(|| name)?;
        run.say(format!(
            "{name}: {kills} failovers, {lines} lines, each once"
        ));
        figures.add(&format!("{name}_lines"), lines);
    }
    figures.add("kills_each", kills);
    let moved = frozen(&spec_in(work.path(), "frozen", Transport::Shm, "replay")?)?;
    figures.add("frozen_primary_left_after_ms", moved.as_millis() as u64);
    Ok(figures)
}

fn directory() -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("doppel-console-")
        .tempdir()
        .context("make a directory")
}

/// A pair of the guest that answers at its console.
pub(super) fn spec_in(
    work: &Path,
    name: &str,
    transport: Transport,
    replicate: &str,
) -> Result<PairSpec> {
    let directory = work.join(name);
    std::fs::create_dir(&directory).context("make a directory")?;
    Ok(PairSpec {
        doppel: doppel()?,
        directory,
        guest: "console".to_owned(),
        memory_mib: 16,
        command_line: String::new(),
        memory_check_ms: if replicate == "replay" { 50 } else { 0 },
        kvm: None,
        transport,
        arbiter: None,
        more: vec!["--replicate".to_owned(), replicate.to_owned()],
    })
}

/// A machine alone, in this directory.
pub(super) fn alone(work: &Path, name: &str, more: &[&str]) -> Result<Role> {
    let console = format!("{name}.console");
    let mut arguments = vec![
        "run",
        "--json",
        "--guest",
        "console",
        "--memory",
        "8",
        "--name",
        name,
        "--run-dir",
        "run",
        "--console",
        &console,
    ];
    arguments.extend(more);
    let mut role = Role::start(work, name, &arguments)?;
    role.until("\"ready\"", PATIENCE)?;
    Ok(role)
}

fn at_a_terminal(work: &Path) -> Result<()> {
    let mut machine = alone(work, "alone", &[])?;
    let arguments = ["console", "alone", "--run-dir", "run"];
    let mut person = AtTerminal::start(work, &arguments)?;
    person.until("Ctrl-] leaves it", PATIENCE)?;
    person.until("console: start", PATIENCE)?;
    ensure!(person.settings()?.are_raw(), "the terminal is not raw");
    person.press(b"hello\r")?;
    person.until("heard: hello", PATIENCE)?;
    // Keys that would end or stop any other program are the guest's.
    person.press(b"\x03\x1a\x1c!\r")?;
    person.until("heard: \x03\x1a\x1c!", PATIENCE)?;
    // The settings before it came are those that a new terminal has.
    let fresh = AtTerminal::start(work, &["--version"])?.settings()?;
    ensure!(!fresh.are_raw(), "a new terminal is raw");
    person.press(b"x")?;
    person.press(&[ESCAPE])?;
    let status = person.end(PATIENCE)?;
    ensure!(status.success(), "the escape key: {status}");
    ensure!(
        person.settings()? == fresh,
        "after the escape key the terminal is {:?}, it was {fresh:?}",
        person.settings()?
    );
    for signal in [Signal::Terminate, Signal::Interrupt] {
        let mut person = AtTerminal::start(work, &arguments)?;
        person.until("console: start", PATIENCE)?;
        ensure!(person.settings()?.are_raw(), "the terminal is not raw");
        send(person.pid(), signal)?;
        let status = person.end(PATIENCE)?;
        ensure!(status.success(), "{signal:?}: {status}");
        ensure!(person.settings()? == fresh, "{signal:?} left it raw");
    }
    // The machine's end is one, too.
    let mut person = AtTerminal::start(work, &arguments)?;
    person.until("console: start", PATIENCE)?;
    person.press(b"\roff 0\r")?;
    let status = person.end(PATIENCE)?;
    ensure!(status.success(), "the machine's end: {status}");
    ensure!(person.settings()? == fresh, "the machine's end left it raw");
    let status = machine.end(PATIENCE)?;
    ensure!(status.success(), "the machine ended by {status}");
    let mut nobody = AtTerminal::start(work, &arguments)?;
    let status = nobody.end(PATIENCE)?;
    ensure!(status.code() == Some(1), "without a machine: {status}");
    let said = nobody.screen();
    ensure!(said.contains("no process of machine"), "{said}");
    ensure!(nobody.settings()? == fresh, "a refusal left it raw");
    Ok(())
}

/// A program types more than there is room for, and is shown all, while others look on that do not read.
fn from_a_pipe(work: &Path, figures: &mut Figures) -> Result<()> {
    let mut machine = alone(work, "piped", &[])?;
    let run_directory = work.join("run");
    let deaf: Vec<_> = (0..7)
        .map(|_| find::console(&run_directory, "piped", machine.pid(), Some(0)))
        .collect::<std::io::Result<_>>()
        .context("look at a console")?;
    let mut viewer = Viewer::start(&run_directory, "piped")?;
    viewer.until("console: start", PATIENCE)?;
    let full = find::console(&run_directory, "piped", machine.pid(), None);
    let why = full.err().context("a ninth viewer was taken")?.to_string();
    ensure!(why.contains("look at this console already"), "{why}");
    let began = Instant::now();
    let mut typed = String::new();
    for count in [150, 300, 1] {
        typed.push_str(&format!("say {count}\n"));
    }
    for _ in 0..40 {
        typed.push_str("a line that is said again\n");
    }
    viewer.type_in(&typed)?;
    viewer.type_in("off 0\n")?;
    viewer.hang_up();
    let status = viewer.end(PATIENCE)?;
    ensure!(
        status.success(),
        "the viewer ended by {status}: {}",
        viewer.said()
    );
    let status = machine.end(PATIENCE)?;
    ensure!(status.success(), "the machine ended by {status}");
    drop(deaf);
    let file = std::fs::read_to_string(work.join("piped.console")).context("read the console")?;
    ensure!(
        viewer.shown() == file,
        "the viewer was shown {:?}, the guest printed {file:?}",
        viewer.shown()
    );
    let heard = file.matches("heard: a line that is said again\n").count();
    ensure!(heard == 40, "{heard} lines of 40 were heard");
    figures.add("bytes_from_a_pipe", file.len());
    figures.add("bytes_from_a_pipe_ms", began.elapsed().as_millis() as u64);
    Ok(())
}

/// The primary is killed again and again, at a random moment of what its guest says; how many lines came.
fn failovers(spec: &PairSpec, kills: u64, random: &mut Random) -> Result<u64> {
    let mut pair = Pair::start(spec, None)?;
    let mut viewer = Viewer::start(&spec.run_directory(), NAME)?;
    viewer.until("console: start", PATIENCE)?;
    let live = |event: &Event| matches!(event, Event::Live { .. });
    for kill in 1..=kills {
        viewer.ask("say 40", "line 40\n", PATIENCE)?;
        // Takes longer than the wait before the kill.
        viewer.type_in("say 400\n")?;
        let before = viewer.shown().len();
        viewer.until_behind(before, "line 3\n", PATIENCE)?;
        std::thread::sleep(Duration::from_micros(random.below(150_000)));
        pair.primary.kill();
        let heard = pair.backup.wait_for(PATIENCE, live, drop);
        heard.with_context(|| format!("kill {kill}: {}", pair.backup.messages()))?;
        viewer.until_behind(before, "line 400\n", PATIENCE)?;
        pair.replace_primary(spec, None, drop)?;
    }
    viewer.ask("say 40", "line 40\n", PATIENCE)?;
    // One that comes now is shown what was before: it is the survivor's memory of what the dead have said.
    let late = Viewer::start(&spec.run_directory(), NAME)?;
    late.until("line 40\n", PATIENCE)?;
    viewer.type_in("off 0\n")?;
    for side in [&mut pair.primary, &mut pair.backup] {
        let status = side.wait(PATIENCE);
        ensure!(
            status.success(),
            "a side ended by {status}: {}",
            side.messages()
        );
    }
    let status = viewer.end(PATIENCE)?;
    ensure!(status.success(), "the viewer ended by {status}");
    let shown = viewer.shown();
    let shown = shown.replace("off 0\n", "");
    let said = viewer.said();
    ensure!(
        said.matches("serves the machine now").count() as u64 == kills,
        "it does not tell of {kills} failovers: {said}"
    );
    check_lines(&shown).with_context(|| format!("{shown:?}"))
}

/// A primary that is frozen and not dead: nobody closes its connections. How long it took the viewer to leave it.
fn frozen(spec: &PairSpec) -> Result<Duration> {
    let pair = Pair::start(spec, None)?;
    let mut viewer = Viewer::start(&spec.run_directory(), NAME)?;
    viewer.ask("say 3", "line 3\n", PATIENCE)?;
    pair.primary.signal(libc::SIGSTOP);
    let since = Instant::now();
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let heard = pair.backup.wait_for(PATIENCE, live, drop);
    heard.with_context(|| pair.backup.messages())?;
    viewer.ask("say 5", "line 5\n", PATIENCE)?;
    let took = since.elapsed();
    pair.primary.signal(libc::SIGCONT);
    viewer.ask("say 7", "line 7\n", PATIENCE)?;
    check_lines(&viewer.shown())?;
    Ok(took)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
