//! A machine that is reset, by its guest or its operator, starts anew on both sides at one position, and a failover in the middle does not
//! matter (issues 6 and 7).
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;

use super::console::{alone, spec_in};
use crate::harness::console::Viewer;
use crate::harness::operator::Operator;
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "resets",
    line: "A guest that resets itself, or is reset, starts anew on both sides, exactly; killed in the middle of it, the machine still does",
    short: Duration::from_secs(40),
    full: Duration::from_secs(240),
    show,
};

const PATIENCE: Duration = Duration::from_secs(20);

const NAME: &str = "machine";

/// What the guest says when it starts and has found its memory as it must be.
const START: &str = "console: start\n";

/// Between two resets a guest in a loop is made to wait about so long.
const APART: Duration = Duration::from_secs(1);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let work = tempfile::Builder::new()
        .prefix("doppel-resets-")
        .tempdir()
        .context("make a directory")?;
    guests_alone(work.path(), &mut figures).context("a machine alone")?;
    recorded(work.path()).context("a recording")?;
    let kills = run.form.pick(2, 15);
    for (name, transport, replicate) in [
        ("replay_shm", Transport::Shm, "replay"),
        ("replay_tcp", Transport::Tcp, "replay"),
        ("checkpoint_shm", Transport::Shm, "checkpoint"),
    ] {
        let spec = spec_in(work.path(), name, transport, replicate)?;
        let (resets, checks) = of_a_pair(&spec, kills, &mut random).with_context(|| name)?;
        run.say(format!("{name}: {resets} resets, {kills} kills right after one, memories compared {checks} times"));
        figures.add(&format!("{name}_resets"), resets);
        figures.add(&format!("{name}_memory_checks"), checks);
    }
    figures.add("kills_each", kills);
    Ok(figures)
}

fn starts(viewer: &Viewer) -> usize {
    viewer.shown().matches(START).count()
}

/// Waits until the guest has started so often, by what the viewer was shown.
fn until_started(viewer: &Viewer, times: usize) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while starts(viewer) < times {
        ensure!(
            Instant::now() < until,
            "it started {} times, not {times}: {:?}, {}",
            starts(viewer),
            viewer.shown(),
            viewer.said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn guests_alone(work: &Path, figures: &mut Figures) -> Result<()> {
    let mut machine = alone(work, "alone", &[])?;
    let mut viewer = Viewer::start(&work.join("run"), "alone")?;
    until_started(&viewer, 1)?;
    viewer.ask("number 7", "number 7\n", PATIENCE)?;
    let began = Instant::now();
    for (count, word) in [(2, "reset\n"), (3, "kbc\n"), (4, "reset\n")] {
        viewer.type_in(word)?;
        until_started(&viewer, count)?;
    }
    // The first one is at once, and each of the others waits until the one before is a second ago.
    let took = began.elapsed();
    ensure!(took > APART, "three resets took {took:?}");
    figures.add("three_resets_ms", took.as_millis() as u64);
    viewer.ask("number", "number 0\n", PATIENCE)?;
    // Time goes on.
    viewer.ask("time", "time ", PATIENCE)?;
    Operator::of(work.join("run"), "alone").ordered(&["reset"])?;
    until_started(&viewer, 5)?;
    viewer.type_in("off 3\n")?;
    let status = machine.end(PATIENCE)?;
    ensure!(status.code() == Some(5), "the machine ended by {status}");
    let mut machine = alone(work, "ends", &["--on-reset", "end"])?;
    let mut viewer = Viewer::start(&work.join("run"), "ends")?;
    until_started(&viewer, 1)?;
    viewer.type_in("reset\n")?;
    let status = machine.end(PATIENCE)?;
    ensure!(status.success(), "--on-reset end: {status}");
    ensure!(starts(&viewer) == 1, "it started anew");
    Ok(())
}

/// What was recorded across resets replays exactly, to the memory's last byte.
fn recorded(work: &Path) -> Result<()> {
    let arguments = [
        "record",
        "--json",
        "--guest",
        "console",
        "--memory",
        "8",
        "--name",
        "recorded",
        "--run-dir",
        "run",
        "--console",
        "recorded.console",
        "--out",
        "resets.log",
    ];
    let mut recording = Role::start(work, "recorded", &arguments)?;
    recording.until("\"ready\"", PATIENCE)?;
    let mut viewer = Viewer::start(&work.join("run"), "recorded")?;
    until_started(&viewer, 1)?;
    viewer.ask("number 9", "number 9\n", PATIENCE)?;
    viewer.type_in("reset\n")?;
    until_started(&viewer, 2)?;
    Operator::of(work.join("run"), "recorded").ordered(&["reset"])?;
    until_started(&viewer, 3)?;
    viewer.ask("number", "number 0\n", PATIENCE)?;
    viewer.type_in("off 0\n")?;
    let status = recording.end(PATIENCE)?;
    ensure!(
        status.success(),
        "the recording ended by {status}: {}",
        recording.said()
    );
    let output = Command::new(doppel()?)
        .args(["replay", "resets.log"])
        .current_dir(work)
        .output()
        .context("start doppel replay")?;
    ensure!(
        output.status.success(),
        "the replay: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Resets of a protected machine, and kills right behind some; how many resets, and how often the memories were compared.
fn of_a_pair(spec: &PairSpec, kills: u64, random: &mut Random) -> Result<(usize, u64)> {
    let mut pair = Pair::start(spec, None)?;
    let mut viewer = Viewer::start(&spec.run_directory(), NAME)?;
    until_started(&viewer, 1)?;
    let mut checks = 0;
    for kill in 1..=kills {
        let number = random.below(1_000_000) + 1;
        viewer.ask(
            &format!("number {number}"),
            &format!("number {number}\n"),
            PATIENCE,
        )?;
        let before = starts(&viewer);
        if kill.is_multiple_of(2) {
            Operator::of(spec.run_directory(), NAME).ordered(&["reset"])?;
        } else {
            viewer.type_in("reset\n")?;
        }
        until_started(&viewer, before + 1)?;
        viewer.ask("number", "number 0\n", PATIENCE)?;
        viewer.ask(
            &format!("number {number}"),
            &format!("number {number}\n"),
            PATIENCE,
        )?;
        // And once more, with a kill before anybody knows how far it came.
        let before = starts(&viewer);
        viewer.type_in("reset\n")?;
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        pair.primary.kill();
        let mut seen = 0;
        let live = |event: &Event| matches!(event, Event::Live { .. });
        let heard = pair.backup.wait_for(PATIENCE, live, drop);
        let heard = heard.with_context(|| format!("kill {kill}: {}", pair.backup.messages()))?;
        if let Event::Live { memory_checks, .. } = heard {
            seen = memory_checks;
        }
        checks += seen;
        // It was reset or it was not; whichever, it is a machine that works.
        viewer.ask("number", "number ", PATIENCE)?;
        let reset = starts(&viewer) > before;
        let expected = if reset { 0 } else { number };
        viewer.ask("number", &format!("number {expected}\n"), PATIENCE)?;
        pair.replace_primary(spec, None, drop)?;
    }
    // Of a machine whose backup joined while it ran.
    let before = starts(&viewer);
    viewer.type_in("kbc\n")?;
    until_started(&viewer, before + 1)?;
    viewer.ask("number", "number 0\n", PATIENCE)?;
    let resets = starts(&viewer) - 1;
    viewer.type_in("off 0\n")?;
    for side in [&mut pair.primary, &mut pair.backup] {
        let status = side.wait(PATIENCE);
        ensure!(
            status.success(),
            "a side ended by {status}: {}",
            side.messages()
        );
        let diverged = side
            .events()
            .iter()
            .any(|event| matches!(event, Event::Diverged { .. }));
        ensure!(!diverged, "a backup diverged");
    }
    Ok((resets, checks))
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
