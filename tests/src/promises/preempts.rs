//! A guest that computes and does not exit: it gets its interrupts, is protected, and fails over exactly (issue 4, point 1).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec, console};
use hypervisor::session::report::Event;
use serde_json::Value;

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::scheduler::Delays;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "preempts",
    line: "A guest that does not exit gets its ticks within 10 ms of the deferral bound, replays and fails over exactly",
    short: Duration::from_secs(15),
    full: Duration::from_secs(150),
    show,
};

/// The guest's words: a tick every 10 ms, a report every half a second or so, and not one exit between two.
const WORDS: &str = "hz=100 rounds=100";
/// The default deferral, and what may come on top of it.
const BOUND_US: u64 = 5_000 + 10_000;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let directory = tempfile::Builder::new()
        .prefix("doppel-preempts-")
        .tempdir()
        .context("make a directory")?;
    let seconds = run.form.pick(4, 20);
    let reference = recorded(directory.path(), seconds, &mut figures).context("recording")?;
    replayed(directory.path(), run.form.pick(5, 40), &mut random).context("replaying")?;
    let kills = run.form.pick(2, 20);
    let mut compared = 0;
    for kill in 1..=kills {
        let failed_over = fail_over(
            &directory.path().join(kill.to_string()),
            &reference,
            &mut random,
        )
        .with_context(|| format!("failover {kill} of {kills}"))?;
        run.say(format!(
            "{kill}/{kills}: {} checkpoints, {} memories compared, {} reports after the kill",
            failed_over.checkpoints, failed_over.memory_checks, failed_over.reports_after
        ));
        compared += failed_over.memory_checks;
    }
    figures.add("failovers", kills);
    figures.add("memories_compared_before_them", compared);
    Ok(figures)
}

/// What the guest printed: number of the report, its checksum, the ticks so far.
fn reports(console: &str) -> BTreeMap<u64, (String, u64)> {
    let report = |line: &str| {
        let mut words = line
            .strip_prefix("compute ")?
            .strip_suffix(" ticks")?
            .split(' ');
        let number = words.next()?.parse().ok()?;
        let checksum = words.next()?.strip_suffix(',')?.to_owned();
        let ticks = words.next()?.parse().ok()?;
        (words.next().is_none() && checksum.len() == 16).then_some((number, (checksum, ticks)))
    };
    console.lines().filter_map(report).collect()
}

fn run_doppel(arguments: &[&str]) -> Result<Output> {
    Command::new(doppel()?)
        .args(arguments)
        .output()
        .context("start doppel")
}

fn recorded(
    directory: &Path,
    seconds: u64,
    figures: &mut Figures,
) -> Result<BTreeMap<u64, (String, u64)>> {
    let (log, told) = (directory.join("log"), directory.join("reference.console"));
    let [log, told] = [&log, &told].map(|path| path.to_string_lossy());
    // On a busy host a thread stands in line before it can be in time; as long as this one does is not ours.
    let delays = Delays::start(Duration::from_millis(5), Duration::from_millis(10));
    let length = format!("{seconds}s");
    let output = run_doppel(&[
        "record",
        "--json",
        "--guest",
        "compute",
        "--memory",
        "16",
        "--command-line",
        WORDS,
        "--preempt",
        "checkpoint",
        "--out",
        &log,
        "--for",
        &length,
        "--console",
        &told,
    ])?;
    let host = delays.finish(99)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let (mut late, mut took, mut bytes) = (Vec::new(), Vec::new(), 0);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Ok(Event::Preempted {
            ticks_late_us,
            checkpoints_us,
            checkpoint_bytes,
        }) = serde_json::from_str(line)
        {
            late.extend(ticks_late_us);
            took.extend(checkpoints_us);
            bytes += checkpoint_bytes;
        }
    }
    late.sort_unstable();
    took.sort_unstable();
    ensure!(
        !took.is_empty(),
        "no checkpoint was taken of a guest that does not exit"
    );
    let at = |sorted: &[u64], percent: usize| {
        sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
    };
    ensure!(!late.is_empty(), "the guest got no tick");
    figures.add("ticks", late.len());
    figures.add("tick_late_us_p50", at(&late, 50));
    figures.add("tick_late_us_p99", at(&late, 99));
    figures.add("tick_late_us_max", at(&late, 100));
    figures.add("checkpoints", took.len());
    figures.add("checkpoint_us_p50", at(&took, 50));
    figures.add("checkpoint_us_p99", at(&took, 99));
    figures.add("checkpoint_kib_mean", bytes / took.len() as u64 / 1024);
    figures.add("host_scheduler_us_p99", host);
    ensure!(
        // Two threads must come on, one after the other: the one that kicks, and the guest's.
        at(&late, 99) <= BOUND_US + 2 * host,
        "1 of 100 ticks came {} µs late or more; the bound is {BOUND_US}, and the host's own scheduler took {host} for each of two threads",
        at(&late, 99)
    );
    let reference = reports(&std::fs::read_to_string(&*told).context("read the console")?);
    let (_, ticks) = reference
        .values()
        .last()
        .context("the guest reported nothing")?;
    ensure!(*ticks > 0, "the guest saw no tick");
    Ok(reference)
}

/// What `doppel replay --json` says, and whether it ended well.
fn replay(log: &Path) -> Result<(Value, bool)> {
    let output = run_doppel(&["replay", &log.to_string_lossy(), "--json"])?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((said, output.status.success()))
}

fn replayed(directory: &Path, cuts: u64, random: &mut Random) -> Result<()> {
    let log = directory.join("log");
    let (said, well) = replay(&log)?;
    ensure!(well && said["mismatches"] == 0, "{said}");
    ensure!(
        said["memory_hash_recorded"].is_string(),
        "the recording's end was not compared: {said}"
    );
    ensure!(
        said["memory_hash_recorded"] == said["memory_hash_replayed"],
        "{said}"
    );
    // Nearly all of the log are checkpoints, so nearly every cut is in the middle of one: nothing of it may be seen.
    let bytes = std::fs::read(&log).context("read the log")?;
    std::fs::remove_file(&log).context("remove the log")?;
    let cut = directory.join("cut");
    for _ in 0..cuts {
        let length = bytes.len() / 4 + (random.next() % (bytes.len() as u64 / 8)) as usize;
        std::fs::write(&cut, &bytes[..length]).context("write a log")?;
        let (said, well) = replay(&cut)?;
        let cut_off = said["error"]
            .as_str()
            .is_some_and(|error| error.contains("ends at byte"));
        ensure!(!well && cut_off, "cut at byte {length}: {said}");
    }
    std::fs::remove_file(&cut).context("remove the log")
}

struct FailedOver {
    checkpoints: usize,
    memory_checks: u64,
    reports_after: usize,
}

fn fail_over(
    directory: &Path,
    reference: &BTreeMap<u64, (String, u64)>,
    random: &mut Random,
) -> Result<FailedOver> {
    const PATIENCE: Duration = Duration::from_secs(10);
    std::fs::create_dir(directory).context("make a directory")?;
    // What is shown here is preemption. Whether a side that gets no processor for a while is given up is shown elsewhere.
    let config = directory.join("patient.toml");
    std::fs::write(&config, "[timing]\nsilence_ms = 2000\n").context("write a configuration")?;
    let spec = PairSpec {
        doppel: doppel()?,
        directory: directory.to_owned(),
        transport: Transport::Shm,
        arbiter: None,
        guest: "compute".into(),
        memory_mib: 16,
        command_line: WORDS.into(),
        memory_check_ms: 50,
        kvm: None,
        more: vec![
            "--preempt".into(),
            "checkpoint".into(),
            "--config".into(),
            config.display().to_string(),
        ],
    };
    let mut pair = Pair::start(&spec, None)?;
    std::thread::sleep(Duration::from_micros(500_000 + random.next() % 700_000));
    pair.primary.kill();
    let mut diverged = None;
    let live = pair.backup.wait_for(
        PATIENCE,
        |event| matches!(event, Event::Live { .. } | Event::Diverged { .. }),
        |_| {},
    );
    let memory_checks = match live {
        Some(Event::Live { memory_checks, .. }) => memory_checks,
        Some(Event::Diverged { what }) => {
            diverged = Some(what);
            0
        }
        _ => 0,
    };
    ensure!(diverged.is_none(), "{}", diverged.unwrap_or_default());
    ensure!(
        memory_checks > 0,
        "no memories were compared, or no failover: {}",
        pair.backup.messages()
    );
    let checkpoints = pair.primary.events().iter().map(checkpoints_in).sum();
    ensure!(checkpoints > 0, "the primary took no checkpoint");
    let before = reports(&console(directory, "primary"));
    // Until it has reported twice by itself: the second report is about what it did here alone.
    let until = std::time::Instant::now() + PATIENCE;
    let after = loop {
        let after = reports(&console(directory, "backup"));
        if after
            .keys()
            .filter(|number| !before.contains_key(number))
            .count()
            >= 2
        {
            break after;
        }
        ensure!(
            std::time::Instant::now() < until,
            "the guest reports no more: {}",
            pair.backup.messages()
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    let _ = pair.backup.stop(PATIENCE);
    let mut ticks_before = 0;
    for (number, (checksum, ticks)) in before.iter().chain(&after) {
        if let Some((expected, _)) = reference.get(number) {
            ensure!(
                checksum == expected,
                "report {number} is {checksum}, a guest left alone says {expected}"
            );
        }
        ensure!(
            *ticks >= ticks_before,
            "report {number}: {ticks} ticks after {ticks_before}"
        );
        ticks_before = *ticks;
    }
    let new: Vec<_> = after
        .iter()
        .filter(|(number, _)| !before.contains_key(number))
        .collect();
    let [(_, (_, first)), .., (_, (_, last))] = new[..] else {
        anyhow::bail!("fewer than two reports after the failover");
    };
    ensure!(last > first, "no tick came after the failover");
    Ok(FailedOver {
        checkpoints,
        memory_checks,
        reports_after: new.len(),
    })
}

fn checkpoints_in(event: &Event) -> usize {
    match event {
        Event::Preempted { checkpoints_us, .. } => checkpoints_us.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn whole_reports_are_read() {
        let read = reports(
            "compute: 100 rounds a report\ncompute 3 00000000000000ff, 7 ticks\nte 4 0, 8 ticks\ncompute 5 00",
        );
        assert_eq!(
            read,
            BTreeMap::from([(3, ("00000000000000ff".to_owned(), 7))])
        );
    }
}
