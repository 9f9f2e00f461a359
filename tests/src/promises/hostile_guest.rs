//! A guest that means harm (issue 4, point 4), under real KVM: wild, looping and endless virtqueues, wild ports and windows.
//! The host's process goes on or ends in words, uses bounded memory, replays all of it exactly, and a pair stays a pair.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::{NetPort, link};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, Side, console};
use hypervisor::session::report::Event;
use tempfile::TempDir;

use crate::harness::random::Random;
use crate::harness::recording::{Recording, Take, replay};
use crate::harness::role::Role;
use crate::harness::stage::{Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "hostile-guest",
    line: "A guest that abuses virtqueues, windows and ports harms no host: bounded memory, exact replay, a pair that lasts",
    short: Duration::from_secs(60),
    full: Duration::from_secs(900),
    show,
};

/// A bound on anything that must end, on a loaded host.
const LONGEST: Duration = Duration::from_secs(120);

/// Kinds of attack; `attack.rs` of the guest has them.
const KINDS: u64 = 9;
const NETWORK_FLOOD: u64 = 3;

const MEMORY_MIB: u32 = 16;

/// The most resident memory of a process beyond its guest's RAM, in MiB. What it may hold by design: 32 of frames that wait to
/// leave, twice the 16 that one exit makes (in the device and on their way), 12 of lanes, 16 of a log file's entry and buffers, and some ten
/// of program and heap. A flood that is not bounded makes a thousand within a second.
const MOST_MIB: u64 = 160;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    alone_with_it(run, &mut random, &mut figures).context("a machine of its own")?;
    replays(run, &mut random, &mut figures).context("recorded and replayed")?;
    crash(run, &mut figures).context("a guest that destroys itself")?;
    pairs(run, &mut random, &mut figures).context("a pair")?;
    Ok(figures)
}

fn directory() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("doppel-test-")
        .tempdir()
        .context("make a directory")
}

/// The most memory that a process ever had resident, in MiB. While it runs, or not yet reaped, it is there.
fn peak(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? >> 10)
}

/// `doppel run` with every kind of attack, at a network port whose other end reads nothing.
fn alone_with_it(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let rounds = run.form.pick(40, 1500);
    let mut most = 0;
    for kind in 0..KINDS {
        let floods = kind == NETWORK_FLOOD;
        let rounds = if floods { rounds / 2 } else { rounds };
        let words = format!("seed={} rounds={rounds} only={kind}", random.below(1 << 32));
        let peak = solo(&words, 0).with_context(|| words.clone())?;
        run.say(format!("{words}: {peak} MiB at most"));
        most = most.max(peak);
    }
    figures.add("peak_mib", most);
    Ok(())
}

/// Runs it to its end, which must come with this code; the most memory that the process had.
fn solo(words: &str, code: i32) -> Result<u64> {
    let work = directory()?;
    let (ours, _unread): (NetPort, NetPort) = link::pair()?;
    let inheritable = ours.inheritable().context("share the network port")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&inheritable).to_string();
    let memory = MEMORY_MIB.to_string();
    let arguments = ["run", "--guest", "hostile", "--memory", &memory];
    let more = ["--command-line", words, "--net-fd", &fd];
    let mut role = Role::start(work.path(), "hostile", &[&arguments[..], &more].concat())?;
    drop(inheritable);
    let (mut most, until) = (0, Instant::now() + LONGEST);
    while role.runs()? {
        most = most.max(peak(role.pid()).unwrap_or(0));
        ensure!(Instant::now() < until, "it has no end: {}", role.said());
        std::thread::sleep(Duration::from_millis(2));
    }
    let (status, said) = (role.end(LONGEST)?, role.said());
    ensure!(!said.contains("panicked"), "a panic: {said}");
    ensure!(status.code() == Some(code), "it ended by {status}: {said}");
    let bound = MOST_MIB + u64::from(MEMORY_MIB);
    ensure!(most <= bound, "{most} MiB were resident, more than {bound}");
    Ok(most)
}

/// Every access again, with frames and random bytes, kicks and ticks.
fn replays(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let (recordings, rounds) = run.form.pick((2, 300), (12, 3000));
    let mut sync_points = 0;
    for number in 0..recordings {
        let work = directory()?;
        let words = format!("seed={} rounds={rounds}", random.below(1 << 32));
        let take = Take {
            memory_check_ms: 100,
            preempt: if number % 2 == 0 {
                "exit"
            } else {
                "checkpoint"
            },
            ..Take::new("hostile", MEMORY_MIB, &words, LONGEST)
        };
        let kicks = Some(random.next());
        let recorded = Recording::start(work.path(), "hostile", &take, None, kicks)?
            .finish()
            .with_context(|| words.clone())?;
        replay(&recorded.log, LONGEST, Some(random.next()))?
            .ensure_equal(&recorded)
            .with_context(|| words.clone())?;
        sync_points += recorded.sync_points;
    }
    // All the random bytes that one exit can ask for, in one go.
    let work = directory()?;
    let take = Take::new("hostile", MEMORY_MIB, "rounds=20 only=4", LONGEST);
    let recorded = Recording::start(work.path(), "entropy", &take, None, None)?.finish()?;
    replay(&recorded.log, LONGEST, None)?.ensure_equal(&recorded)?;
    run.say(format!("{sync_points} sync points replayed"));
    figures.add("replayed_sync_points", sync_points);
    Ok(())
}

/// It has a device write over its own code: its end, in words, and the end of nothing else.
fn crash(run: &Run, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let memory = MEMORY_MIB.to_string();
    for round in 0..run.form.pick(2, 20) {
        let words = format!("seed={round} rounds=3 end=crash");
        let arguments = ["run", "--guest", "hostile", "--memory", &memory];
        let more = ["--command-line", &words];
        let mut role = Role::start(work.path(), "crash", &[&arguments[..], &more].concat())?;
        // What random bytes do when they are run is anybody's guess: most often they fault; they may compute for ever.
        let until = Instant::now() + Duration::from_secs(3);
        while role.runs()? && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if role.runs()? {
            crate::harness::signal::send(role.pid(), crate::harness::signal::Signal::Terminate)?;
            let status = role.end(LONGEST)?;
            ensure!(
                status.code().is_some(),
                "it ended by {status}: {}",
                role.said()
            );
            ensure!(!role.said().contains("panicked"), "{}", role.said());
        } else if role.end(LONGEST)?.code() != Some(0) {
            role.clear_error(LONGEST, &[1, 5])?;
        }
    }
    figures.add("crashed", run.form.pick(2, 20));
    Ok(())
}

fn pairs(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let (pairs, rounds) = run.form.pick((1, 400), (6, 6000));
    let mut killed = 0;
    for number in 0..pairs {
        for transport in [Transport::Shm, Transport::Tcp] {
            for kill in [false, true] {
                let seed = random.below(1 << 32);
                let at = random.below(rounds * 3 / 400) * 100;
                alone(|| pair(seed, rounds, transport, kill.then_some(at)))
                    .with_context(|| format!("seed={seed}, {}, kill: {kill}", transport.name()))?;
                killed += u64::from(kill);
                run.say(format!(
                    "pair {number} over {}, kill: {kill}",
                    transport.name()
                ));
            }
        }
    }
    figures.add("pairs", pairs * 4);
    figures.add("pairs_killed", killed);
    Ok(())
}

/// A pair runs the guest to its end; its primary is killed, if it is, once the guest has printed so many rounds.
fn pair(seed: u64, rounds: u64, transport: Transport, kill_after: Option<u64>) -> Result<()> {
    let stage = Stage::enter()?;
    let mut spec = stage.spec("hostile", &format!("seed={seed} rounds={rounds}"))?;
    spec.memory_mib = MEMORY_MIB;
    spec.transport = transport;
    // One exit of a flood may take a loaded host longer than a side may be silent by default: what is judged here is harm.
    let patient = stage.directory().join("patient.toml");
    fs::write(&patient, "[timing]\nsilence_ms = 5000\n").context("write a configuration")?;
    spec.more = vec!["--config".into(), patient.display().to_string()];
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    if let Some(round) = kill_after {
        let until = Instant::now() + LONGEST;
        let word = match round {
            0 => "hostile: seed".to_owned(),
            round => format!("hostile: {round}"),
        };
        while !console(stage.directory(), "primary").contains(&word) {
            ensure!(
                pair.primary.ended().is_none() && Instant::now() < until,
                "the guest does not get to {word:?}: {}",
                pair.primary.messages()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        within_bounds(&pair.primary)?;
        pair.primary.kill();
        pair.backup
            .wait_for(LONGEST, |event| matches!(event, Event::Live { .. }), drop)
            .with_context(|| format!("the backup did not go live: {}", pair.backup.messages()))?;
        finish(&mut pair.backup, stage.directory(), "backup")
    } else {
        finish(&mut pair.primary, stage.directory(), "primary")?;
        let status = pair.backup.wait(LONGEST);
        let messages = pair.backup.messages();
        ensure!(status.success(), "the backup ended by {status}: {messages}");
        ensure!(!messages.contains("panicked"), "{messages}");
        Ok(())
    }
}

fn within_bounds(side: &Side) -> Result<()> {
    if let Some(resident) = peak(side.pid()) {
        // A pair's side has its lanes and copies of the guest's pages besides.
        let bound = MOST_MIB + 2 * u64::from(MEMORY_MIB);
        ensure!(
            resident <= bound,
            "{resident} MiB resident, more than {bound}"
        );
    }
    Ok(())
}

/// The guest gets to its end on this side.
fn finish(side: &mut Side, directory: &Path, role: &str) -> Result<()> {
    let until = Instant::now() + LONGEST;
    let status = loop {
        if let Some(status) = side.ended() {
            break status;
        }
        within_bounds(side)?;
        ensure!(
            Instant::now() < until,
            "the guest has no end on the {role}: {}",
            side.messages()
        );
        std::thread::sleep(Duration::from_millis(5));
    };
    let (said, messages) = (console(directory, role), side.messages());
    ensure!(status.success(), "the {role} ended by {status}: {messages}");
    ensure!(!messages.contains("panicked"), "{messages}");
    ensure!(
        said.contains("hostile: done"),
        "the guest said only {said:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
