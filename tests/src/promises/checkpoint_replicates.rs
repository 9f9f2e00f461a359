//! Replication by checkpoints: any guest, protected by intervals, each ended by a checkpoint (issue 7).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::client::Latency;
use hypervisor::demo::pair::{Pair, PairSpec, console};
use hypervisor::demo::report::Report;
use hypervisor::handshake::Secret;
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::relay::Relay;
use crate::harness::role::Role;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "checkpoint-replicates",
    line: "Replicated by checkpoints any guest survives, killed anywhere in one: nothing sent is lost, no torn one is seen",
    short: Duration::from_secs(55),
    full: Duration::from_secs(420),
    show,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's words: a tick every 10 ms, a report now and then, and not one exit between two.
const WORDS: &str = "hz=100 rounds=20";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let kills = run.form.pick(2, 20);
    for transport in ["shm", "tcp"] {
        demo_loses_nothing(transport, kills, run, &mut random, &mut figures)
            .with_context(|| format!("the demo over {transport}"))?;
    }
    lengths(&mut random, &mut figures).context("output-triggered against fixed intervals")?;
    let directory = tempfile::Builder::new()
        .prefix("doppel-intervals-")
        .tempdir()
        .context("make a directory")?;
    let reference = reference(directory.path()).context("the guest alone")?;
    let mut stops = Stops::default();
    let deaths = run.form.pick(4, 40);
    let (mut torn, mut bytes) = (0, Vec::new());
    for death in 1..=deaths {
        let place = directory.path().join(format!("torn-{death}"));
        let died = dies_at_a_byte(&place, &reference, &mut random, &mut stops)
            .with_context(|| format!("death {death} of {deaths}"))?;
        run.say(format!(
            "{death}/{deaths}: killed {} bytes after both were paired{}",
            died.after,
            if died.torn { ", in a checkpoint" } else { "" }
        ));
        torn += u64::from(died.torn);
        bytes.push(died.after);
    }
    figures.add("deaths_at_a_byte", deaths);
    figures.add("of_these_in_a_checkpoint", torn);
    // An interval of this guest's is a head of some KiB and what has changed in its pages, which is about as much: of a few deaths none may meet the middle of one.
    let must_meet = run.form.pick(false, true);
    ensure!(
        torn > 0 || !must_meet,
        "no death was in the middle of a checkpoint"
    );
    others_die(&directory.path().join("others"), &reference, &mut stops)?;
    for rate in [2, 20] {
        let place = directory.path().join(format!("rate-{rate}"));
        writes(&place, rate, &mut stops).with_context(|| format!("{rate} MiB a second"))?;
    }
    stops.tell(&mut figures)?;
    Ok(figures)
}

fn demo(random: &mut Random, arguments: &[&str]) -> Result<Report> {
    let output = Command::new(doppel()?)
        .args(["demo", "--json", "--replicate", "checkpoint"])
        .args(["--seed", &random.next().to_string()])
        .args(arguments)
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}: {said} {}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    serde_json::from_slice(&output.stdout).context("read the demo's JSON")
}

/// Whoever serves is killed, and the one after it, each survivor with a new backup.
fn demo_loses_nothing(
    transport: &str,
    kills: u64,
    run: &Run,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let count = kills.to_string();
    let report = demo(random, &["--transport", transport, "--kills", &count])?;
    judge(&report).with_context(|| report.to_json().unwrap_or_default())?;
    ensure!(
        report.epoch == kills + 1,
        "epoch {} after {kills} kills",
        report.epoch
    );
    run.say(format!(
        "{transport}: {kills} kills, {} requests, commit {:.0} µs, stop {:.0} µs, of {} intervals",
        report.requests.before, report.commit_us.p50, report.stop_us.p50, report.stop_us.count
    ));
    let mut add = |name: &str, value: Value| figures.add(&format!("{transport}_{name}"), value);
    add("kills", kills.into());
    add("acknowledged_writes", report.acknowledged_writes.into());
    add("intervals", report.stop_us.count.into());
    add("stop_us", told(&report.stop_us));
    add("commit_us", told(&report.commit_us));
    let pages = report.interval_pages / report.stop_us.count.max(1);
    add("pages_in_an_interval", pages.into());
    Ok(())
}

fn told(latency: &Latency) -> Value {
    json!({"p50": latency.p50, "p99": latency.p99, "max": latency.max})
}

fn judge(report: &Report) -> Result<()> {
    ensure!(
        report.lost_acknowledged_writes == 0,
        "acknowledged writes were lost"
    );
    ensure!(report.wrong_replies == 0, "replies were wrong");
    ensure!(report.broken_connections == 0, "connections broke");
    ensure!(report.replication == "checkpoint", "it was replayed");
    ensure!(
        report.requests.before > 0 && report.requests.after > 0,
        "the client did not work"
    );
    ensure!(report.stop_us.count > 0, "no interval ended");
    ensure!(report.commit_us.count > 0, "no commit was measured");
    Ok(())
}

/// What a lone client's reply waits for: an output that ends its interval, and intervals of one length.
fn lengths(random: &mut Random, figures: &mut Figures) -> Result<()> {
    let mut medians = Vec::new();
    for ends in ["output", "fixed"] {
        let report = demo(random, &["--connections", "1", "--interval", ends])?;
        judge(&report)?;
        figures.add(&format!("commit_us_{ends}"), told(&report.commit_us));
        medians.push(report.commit_us.p50);
    }
    ensure!(
        medians[0] < medians[1] / 2.0,
        "a reply that ends its interval commits after {:.0} µs, in fixed intervals of 25 ms after {:.0}",
        medians[0],
        medians[1]
    );
    Ok(())
}

/// What the guest printed: number of the report and its checksum, in the order of the lines.
fn reports(console: &str) -> Vec<(u64, String)> {
    let report = |line: &str| {
        let mut words = line
            .strip_prefix("compute ")?
            .strip_suffix(" ticks")?
            .split(' ');
        let number = words.next()?.parse().ok()?;
        let checksum = words.next()?.strip_suffix(',')?.to_owned();
        (checksum.len() == 16).then_some((number, checksum))
    };
    console.lines().filter_map(report).collect()
}

/// The reports of a guest that nobody protects.
fn reference(directory: &Path) -> Result<BTreeMap<u64, String>> {
    let told = directory.join("reference.console");
    let output = Command::new(doppel()?)
        .args(["run", "--json", "--guest", "compute", "--memory", "16"])
        .args(["--command-line", "rounds=20 hz=100 reports=60"])
        .arg("--console")
        .arg(&told)
        .output()
        .context("start doppel run")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let reports = reports(&fs::read_to_string(&told).context("read the console")?);
    ensure!(reports.len() == 60, "it reported {} times", reports.len());
    Ok(reports.into_iter().collect())
}

/// What both consoles say together is what a guest left alone says: every report is right, and none is missing. The survivor may
/// begin in the middle of a line, and with what the other has said already.
fn compare(reference: &BTreeMap<u64, String>, before: &str, after: &str) -> Result<()> {
    let longest = before.len().min(after.len());
    let mut verdict = Ok(());
    for again in (0..=longest).filter(|&again| before.ends_with(&after[..again])) {
        verdict = in_order(reference, &format!("{before}{}", &after[again..]));
        if verdict.is_ok() {
            break;
        }
    }
    verdict.with_context(|| format!("{before:?}, and then {after:?}"))
}

fn in_order(reference: &BTreeMap<u64, String>, console: &str) -> Result<()> {
    let all = reports(console);
    ensure!(!all.is_empty(), "nothing was reported");
    for ((number, checksum), expected) in all.iter().zip(1..) {
        ensure!(
            *number == expected,
            "report {number} stands where report {expected} should"
        );
        if let Some(expected) = reference.get(number) {
            ensure!(
                checksum == expected,
                "report {number} is {checksum}, a guest left alone says {expected}"
            );
        }
    }
    Ok(())
}

struct Died {
    after: u64,
    torn: bool,
}

/// A guest that never exits, over TCP: its primary's host is lost when the log has come so far, at a random byte of it.
fn dies_at_a_byte(
    place: &Path,
    reference: &BTreeMap<u64, String>,
    random: &mut Random,
    stops: &mut Stops,
) -> Result<Died> {
    fs::create_dir_all(place.join("arbiter")).context("make a directory")?;
    Secret::create(&place.join("pair.secret"))?;
    let pair = |role| {
        [
            role,
            "--json",
            "--transport",
            "tcp",
            "--replicate",
            "checkpoint",
            "--secret",
            "pair.secret",
            "--arbiter",
            "arbiter",
            "--run-dir",
            "run",
        ]
    };
    let listens = ["--listen", "127.0.0.1:0", "--console", "backup.console"];
    let mut backup = Role::start(place, "backup", &[&pair("backup")[..], &listens].concat())?;
    backup.until("\"address\"", PATIENCE)?;
    let said = backup.said();
    let line = said.lines().find(|line| line.contains("\"address\""));
    let event: Value = serde_json::from_str(line.context("no address")?)?;
    let relay = Relay::start(event["address"].as_str().context("no address")?.parse()?)?;
    let connect = relay.address().to_string();
    let guest = [
        "--connect",
        &connect,
        "--guest",
        "compute",
        "--memory",
        "16",
        "--command-line",
        WORDS,
        "--console",
        "primary.console",
    ];
    let mut primary = Role::start(place, "primary", &[&pair("primary")[..], &guest].concat())?;
    relay.kill(primary.pid());
    primary.until("\"paired\"", PATIENCE)?;
    backup.until("\"paired\"", PATIENCE)?;
    // Some seconds' worth of what has changed in each 25 ms.
    let after = random.below(2 << 20);
    relay.arm_to_cut(relay.passed() + after);
    let until = Instant::now() + PATIENCE;
    while primary.runs()? {
        ensure!(
            Instant::now() < until,
            "it was not killed: {}",
            primary.said()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(relay.has_struck(), "it ended by itself: {}", primary.said());
    backup.until("\"live\"", PATIENCE)?;
    let before = console(place, "primary");
    let after_it = await_reports(|| console(place, "backup"), &before, || backup.said())?;
    compare(reference, &before, &after_it)?;
    stops.take(primary.said().lines().chain(backup.said().lines()));
    let said = backup.said();
    let live = said
        .lines()
        .find(|line| line.contains("\"event\":\"live\""));
    let live: Value = serde_json::from_str(live.context("it did not say that it is live")?)?;
    backup.stop(PATIENCE)?;
    Ok(Died {
        after,
        torn: live["torn"] == true,
    })
}

/// Waits until the survivor has reported twice what the other had not.
fn await_reports(
    read: impl Fn() -> String,
    before: &str,
    said: impl Fn() -> String,
) -> Result<String> {
    let last = reports(before).last().map_or(0, |(number, _)| *number);
    let until = Instant::now() + PATIENCE;
    loop {
        let after = read();
        let new = |(number, _): &&(u64, String)| *number > last;
        if reports(&after).iter().filter(new).count() >= 2 {
            return Ok(after);
        }
        ensure!(
            Instant::now() < until,
            "the guest reports no more: {}",
            said()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn spec(directory: &Path, guest: &str, words: &str) -> Result<PairSpec> {
    fs::create_dir_all(directory).context("make a directory")?;
    Ok(PairSpec {
        doppel: doppel()?,
        directory: directory.to_owned(),
        transport: Transport::Shm,
        arbiter: None,
        guest: guest.into(),
        memory_mib: 16,
        command_line: words.into(),
        memory_check_ms: 0,
        kvm: None,
        more: vec!["--replicate".into(), "checkpoint".into()],
    })
}

/// On one host: the backup is killed, or frozen, and the primary goes on; the primary is frozen, and the backup goes on alone; the guest turns
/// itself off, and both are done.
fn others_die(
    directory: &Path,
    reference: &BTreeMap<u64, String>,
    stops: &mut Stops,
) -> Result<()> {
    let place = directory.join("backup-dies");
    let mut pair = Pair::start(&spec(&place, "compute", WORDS)?, None)?;
    std::thread::sleep(Duration::from_millis(400));
    pair.backup.kill();
    let before = console(&place, "primary");
    let read = || console(&place, "primary");
    let after = await_reports(read, &before, || pair.primary.messages())
        .context("the backup was killed")?;
    compare(reference, "", &after)?;
    stops.hear(pair.primary.events());
    let _ = pair.primary.stop(PATIENCE);

    let place = directory.join("backup-freezes");
    let mut pair = Pair::start(&spec(&place, "compute", WORDS)?, None)?;
    std::thread::sleep(Duration::from_millis(400));
    pair.backup.signal(libc::SIGSTOP);
    let before = console(&place, "primary");
    let read = || console(&place, "primary");
    let after = await_reports(read, &before, || pair.primary.messages())
        .context("the backup was frozen")?;
    compare(reference, "", &after)?;
    pair.backup.signal(libc::SIGCONT);
    let ended = pair.backup.wait(PATIENCE);
    ensure!(
        ended.code().is_some() && console(&place, "backup").is_empty(),
        "the old backup did not end by itself, or let something out: {ended}"
    );
    let _ = pair.primary.stop(PATIENCE);

    let place = directory.join("primary-freezes");
    let mut pair = Pair::start(&spec(&place, "compute", WORDS)?, None)?;
    std::thread::sleep(Duration::from_millis(400));
    pair.primary.signal(libc::SIGSTOP);
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let went_live = pair.backup.wait_for(PATIENCE, live, drop).is_some();
    ensure!(went_live, "no failover: {}", pair.backup.messages());
    let before = console(&place, "primary");
    pair.primary.signal(libc::SIGCONT);
    let ended = pair.primary.wait(PATIENCE);
    ensure!(
        ended.code().is_some(),
        "the old primary did not end by itself: {ended}"
    );
    let read = || console(&place, "backup");
    let after = await_reports(read, &before, || pair.backup.messages())
        .context("the primary was frozen")?;
    compare(reference, &before, &after)?;
    // What had committed may leave once more; nothing new may.
    let thawed = console(&place, "primary");
    ensure!(
        format!("{before}{after}").contains(thawed.trim_start_matches(before.as_str())),
        "the old primary said something new after it was thawed: {thawed:?}"
    );
    let _ = pair.backup.stop(PATIENCE);

    let place = directory.join("guest-ends");
    let words = format!("{WORDS} reports=3");
    let mut pair = Pair::start(&spec(&place, "compute", &words)?, None)?;
    for (side, name) in [(&mut pair.primary, "primary"), (&mut pair.backup, "backup")] {
        let ended = side.wait(PATIENCE);
        ensure!(
            ended.success(),
            "the {name} ended with {ended}: {}",
            side.messages()
        );
    }
    let all = reports(&console(&place, "primary"));
    ensure!(
        all.len() == 3 && reports(&console(&place, "backup")).is_empty(),
        "the guest turned itself off, and its last reports are not there: {all:?}"
    );
    Ok(())
}

/// A guest that writes so many MiB a second, for the stops that it has.
fn writes(directory: &Path, rate: u64, stops: &mut Stops) -> Result<()> {
    let words = format!("rate={rate}");
    let mut pair = Pair::start(&spec(directory, "memory", &words)?, None)?;
    std::thread::sleep(Duration::from_millis(1500));
    stops.hear(pair.primary.events());
    pair.primary.kill();
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let went_live = pair.backup.wait_for(PATIENCE, live, drop).is_some();
    ensure!(went_live, "no failover: {}", pair.backup.messages());
    // It ends with an error if a word of its memory is not as it was written.
    std::thread::sleep(Duration::from_millis(700));
    ensure!(
        pair.backup.ended().is_none(),
        "the guest found its memory changed: {}",
        pair.backup.messages()
    );
    let _ = pair.backup.stop(PATIENCE);
    Ok(())
}

/// Stops at the ends of intervals: pages, microseconds.
#[derive(Default)]
struct Stops(Vec<(u64, u64)>);

impl Stops {
    fn hear(&mut self, events: Vec<Event>) {
        for event in events {
            if let Event::Intervals {
                stops_us, pages, ..
            } = event
            {
                self.0.extend(pages.into_iter().zip(stops_us));
            }
        }
    }

    fn take<'a>(&mut self, lines: impl Iterator<Item = &'a str>) {
        self.hear(
            lines
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        );
    }

    /// Medians by how many pages were written: the longer the stop, the more there were.
    fn tell(mut self, figures: &mut Figures) -> Result<()> {
        self.0.sort_unstable();
        let mut told = serde_json::Map::new();
        let mut medians = Vec::new();
        for (least, most) in [(0, 63), (64, 255), (256, 1023), (1024, u64::MAX)] {
            let mut stops: Vec<(u64, u64)> = self
                .0
                .iter()
                .filter(|(pages, _)| (least..=most).contains(pages))
                .map(|&(pages, micros)| (micros, pages))
                .collect();
            if stops.len() < 5 {
                continue;
            }
            stops.sort_unstable();
            let (micros, _) = stops[stops.len() / 2];
            let pages = stops.iter().map(|(_, pages)| pages).sum::<u64>() / stops.len() as u64;
            medians.push((pages, micros));
            told.insert(
                format!("{pages}_pages"),
                json!({"stops": stops.len(), "median_us": micros, "p99_us": stops[stops.len() * 99 / 100].0}),
            );
        }
        figures.add("stops_by_pages", Value::Object(told));
        let [(few, short), .., (many, long)] = medians[..] else {
            anyhow::bail!("too few stops to compare: {medians:?}");
        };
        figures.add(
            "stop_us_a_page",
            ((long as f64 - short as f64) / (many - few) as f64 * 100.0).round() / 100.0,
        );
        ensure!(
            long > short,
            "{many} pages stop the guest {long} µs, {few} pages {short}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    fn said(numbers: &[u64]) -> String {
        let line = |n: &u64| format!("compute {n} {n:016x}, 7 ticks\n");
        numbers.iter().map(line).collect()
    }

    #[test]
    fn lost_and_wrong_reports_are_noticed() {
        let reference: BTreeMap<_, _> = reports(&said(&[1, 2, 3, 4, 5])).into_iter().collect();
        let compared = |before: &str, after: &str| compare(&reference, before, after).is_ok();
        let (two, three) = (said(&[1, 2]), said(&[3]));
        assert!(compared(&two, &said(&[3, 4])));
        assert!(compared(&two, &said(&[2, 3])), "one may be sent again");
        for cut in 0..three.len() {
            let (head, tail) = three.split_at(cut);
            let before = format!("{two}{head}");
            assert!(compared(&before, &format!("{tail}{}", said(&[4]))));
            let again = format!("{}{tail}{}", &head[cut / 2..], said(&[4]));
            assert!(compared(&before, &again), "half a line may be sent again");
        }
        assert!(
            !compared(&two, &said(&[4, 5])),
            "one is lost between the two"
        );
        assert!(!compared(&said(&[1, 3]), &said(&[4])), "one is lost before");
        assert!(!compared(&two, &said(&[3, 5])), "one is lost after");
        assert!(!compared("", ""));
        assert!(!compared(&two, "compute 3 00000000000000ff, 7 ticks\n"));
    }

    #[test]
    fn whole_reports_are_read() {
        let read = reports("compute 3 00000000000000ff, 7 ticks\nte 4 0, 8 ticks\ncompute 5 00");
        assert_eq!(read, [(3, "00000000000000ff".to_owned())]);
    }
}
