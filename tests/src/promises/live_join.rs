//! A backup joins a machine that runs under load, and the machine survives on it; and whoever dies in the middle of the copy,
//! the other goes on and takes a new peer.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::demo::report::Report;

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::relay::Relay;
use crate::harness::role::Role;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "live-join",
    line: "a backup joins a machine that runs under load, which then survives on it; a death at any byte of the copy costs the other side nothing",
    short: Duration::from_secs(30),
    full: Duration::from_secs(420),
    show,
};

/// The guest may stand so long for a backup that joins, in milliseconds: what a failover may cost a client is five times that.
const STOP_LIMIT_MS: f64 = 10.0;

/// For each step of a role: as long as the slowest of its own time limits, twice over.
const PATIENCE: Duration = Duration::from_secs(20);

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let mut figures = Figures::default();
    for transport in ["shm", "tcp"] {
        let seconds = run.form.pick(2, 60);
        let kills = run.form.pick(3, 8);
        under_load(run, transport, seconds, kills, random.next(), &mut figures)?;
    }
    torn(run, &mut random, &mut figures)?;
    Ok(figures)
}

/// Kills, each survived by the backup that joined after the one before.
fn under_load(
    run: &Run,
    transport: &str,
    seconds: u64,
    kills: u32,
    seed: u64,
    figures: &mut Figures,
) -> Result<()> {
    let output = Command::new(doppel()?)
        .args(["demo", "--json", "--transport", transport])
        .args(["--load", &seconds.to_string()])
        .args(["--kills", &kills.to_string(), "--seed", &seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{transport}, seed {seed}: {}: {said} {text}",
        output.status
    );
    let report: Report = serde_json::from_str(&text).context("read the demo's JSON")?;
    judge(&report, kills).with_context(|| format!("{transport}, seed {seed}: {text}"))?;
    let figure = |name: &str| {
        let mut values: Vec<f64> = report
            .earlier()
            .filter_map(|round| round[name].as_f64())
            .collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (stopped, joined) = (figure("stopped_ms"), figure("joined_ms"));
    let bytes = figure("bytes");
    run.say(format!(
        "{transport}: {kills} kills, {} requests, guest stood {stopped:.2?} ms, joined in {joined:.1?} ms",
        report.requests.before
    ));
    let middle = |values: &[f64]| values[values.len() / 2];
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    for (name, values) in [("stop_ms", &stopped), ("join_ms", &joined)] {
        let worst = *values.last().context("no backup joined")?;
        figures.add(&format!("{transport}_{name}_median"), round(middle(values)));
        figures.add(&format!("{transport}_{name}_worst"), round(worst));
    }
    figures.add(
        &format!("{transport}_mib_copied_median"),
        round(middle(&bytes) / f64::from(1 << 20)),
    );
    figures.add(
        &format!("{transport}_requests"),
        report.requests.before + report.requests.after,
    );
    figures.add(&format!("{transport}_kills"), kills);
    Ok(())
}

fn judge(report: &Report, kills: u32) -> Result<()> {
    ensure!(report.lost_acknowledged_writes == 0, "writes were lost");
    ensure!(report.broken_connections == 0, "connections broke");
    ensure!(report.divergences == 0, "a backup diverged");
    ensure!(
        report.memory_hash_equal == Some(true),
        "memory was not equal, or not compared with the last backup"
    );
    ensure!(
        report.epoch == u64::from(kills) + 1,
        "epoch {}",
        report.epoch
    );
    let rounds: Vec<_> = report.earlier().collect();
    ensure!(
        rounds.len() as u32 == kills - 1,
        "{} backups joined",
        rounds.len()
    );
    let mut stops: Vec<f64> = rounds
        .iter()
        .filter_map(|round| round["stopped_ms"].as_f64())
        .collect();
    stops.sort_by(f64::total_cmp);
    let median = stops.get(stops.len() / 2).context("no stop was measured")?;
    ensure!(
        *median < STOP_LIMIT_MS,
        "the guest stood {median:.2} ms for a backup"
    );
    Ok(())
}

/// One whose copy is small and always the same, and one that writes faster than it is copied.
const GUESTS: [&str; 2] = ["irq", "memory"];

/// Who dies in the middle of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
}

/// Deaths at random bytes of everything that a primary says to a backup that joins.
fn torn(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let deaths = run.form.pick(4, 50);
    let whole = [whole_copy(GUESTS[0])?, whole_copy(GUESTS[1])?];
    for (guest, bytes) in GUESTS.iter().zip(whole) {
        figures.add(&format!("bytes_of_a_join_{guest}"), bytes);
    }
    let alone = Holdings::of_a_primary_alone()?;
    let mut came_to = BTreeMap::<String, u32>::new();
    for death in 0..deaths {
        let victim = if death % 2 == 0 {
            Victim::Receiver
        } else {
            Victim::Sender
        };
        let guest = GUESTS[death / 2 % 2];
        let whole = whole[death / 2 % 2];
        let after = random.below(whole);
        let outcome = match victim {
            Victim::Receiver => receiver_dies(guest, &alone, after),
            Victim::Sender => sender_dies(guest, after),
        };
        let outcome = outcome.with_context(|| {
            format!("{guest}, {victim:?} killed after {after} of {whole} bytes")
        })?;
        run.say(format!(
            "{guest}, {victim:?} killed after {after} of {whole} bytes: {outcome}"
        ));
        *came_to.entry(outcome.to_owned()).or_default() += 1;
    }
    figures.add("deaths_in_the_copy", deaths);
    figures.add("deaths_came_to", serde_json::to_value(came_to)?);
    Ok(())
}

/// A place for one pair over TCP.
pub(super) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(super) fn new() -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory")?;
        fs::create_dir(directory.path().join("arbiter")).context("make a directory")?;
        Ok(Self { directory })
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A backup that listens, and where.
    pub(super) fn backup(&self, name: &str, listen: &str) -> Result<(Role, SocketAddr)> {
        let mut role = Role::start(
            self.path(),
            name,
            &[
                "backup",
                "--json",
                "--transport",
                "tcp",
                "--arbiter",
                "arbiter",
                "--listen",
                listen,
            ],
        )?;
        role.until("\"address\"", PATIENCE)?;
        let said = role.said();
        let line = said.lines().find(|line| line.contains("\"address\""));
        let event: serde_json::Value = serde_json::from_str(line.context("no address")?)?;
        let address = event["address"].as_str().context("no address")?.parse()?;
        Ok((role, address))
    }

    /// A primary that starts alone and looks for a backup at `connect`, when it is ready.
    fn primary(&self, name: &str, guest: &str, connect: SocketAddr) -> Result<Role> {
        let mut role = self.start_primary(name, guest, connect)?;
        role.until("\"ready\"", PATIENCE)?;
        Ok(role)
    }

    /// The same, which may die before it is ready.
    fn start_primary(&self, name: &str, guest: &str, connect: SocketAddr) -> Result<Role> {
        self.start_alone(name, connect, &["--guest", guest, "--memory", "16"])
    }

    /// A primary that starts alone, with these arguments besides.
    pub(super) fn start_alone(
        &self,
        name: &str,
        connect: SocketAddr,
        more: &[&str],
    ) -> Result<Role> {
        let connect = connect.to_string();
        let mut arguments = vec![
            "primary",
            "--json",
            "--transport",
            "tcp",
            "--arbiter",
            "arbiter",
            "--connect",
            &connect,
            "--alone",
            "--cold-start",
        ];
        arguments.extend(more);
        Role::start(self.path(), name, &arguments)
    }
}

/// Bytes that a primary says to a backup until that is paired.
fn whole_copy(guest: &str) -> Result<u64> {
    let place = Place::new()?;
    let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
    let relay = Relay::start(address)?;
    let mut primary = place.primary("primary", guest, relay.address())?;
    primary.until("\"joined\"", PATIENCE)?;
    let passed = relay.passed();
    backup.until("\"paired\"", PATIENCE)?;
    primary.stop(PATIENCE)?;
    backup.end(PATIENCE)?;
    Ok(passed)
}

/// What of a process can leak: descriptors, threads, mappings of memory.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    shared_mappings: usize,
}

impl Holdings {
    fn of(pid: u32) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{pid}/{what}"))
                .context("look at a process")?
                .count())
        };
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("look at a process")?;
        let shared = |line: &&str| {
            line.split(' ')
                .nth(1)
                .is_some_and(|flags| flags.ends_with('s'))
        };
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            shared_mappings: maps.lines().filter(shared).count(),
        })
    }

    /// What a primary holds that runs alone and finds nobody who listens.
    fn of_a_primary_alone() -> Result<Self> {
        let place = Place::new()?;
        // Bound, and given up: nobody listens there.
        let nobody = std::net::TcpListener::bind(("127.0.0.1", 0)).context("find a port")?;
        let address = nobody.local_addr().context("find a port")?;
        drop(nobody);
        let mut primary = place.primary("alone", GUESTS[0], address)?;
        let mut held = Self::of(primary.pid())?;
        // Between two calls it has one descriptor less than during one.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            let now = Self::of(primary.pid())?;
            if now.descriptors < held.descriptors {
                held = now;
            }
        }
        primary.stop(PATIENCE)?;
        Ok(held)
    }

    /// Waits until the process holds what it held before.
    fn restored(&self, pid: u32) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let now = Self::of(pid)?;
            if now == *self {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!("it held {self:?} before, {now:?} after the copy that failed");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Waits for the victim's death. A guest that writes all the time makes some copies shorter than others: where one is over before so
/// many bytes have gone by, the victim is killed at its end.
fn struck(relay: &Relay, victim: &mut Role) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while victim.runs()? {
        if victim.said().contains("\"paired\"") {
            relay.strike();
        }
        ensure!(
            Instant::now() < until,
            "it was not killed: {}",
            victim.said()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(relay.has_struck(), "it ended by itself: {}", victim.said());
    Ok(())
}

/// The backup that joins is killed: the primary goes on, holds nothing of it, and takes another.
fn receiver_dies(guest: &str, alone: &Holdings, after: u64) -> Result<&'static str> {
    let place = Place::new()?;
    let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
    let relay = Relay::start(address)?;
    relay.arm(after);
    relay.kill(backup.pid());
    let mut primary = place.primary("primary", guest, relay.address())?;
    struck(&relay, &mut backup)?;
    let words = [
        "a backup that wanted to join is not taken",
        "UNPROTECTED: the machine runs",
    ];
    primary.until_one_of(&words, PATIENCE)?;
    alone.restored(primary.pid())?;
    let (mut next, _) = place.backup("next", &address.to_string())?;
    primary.until("\"paired\"", PATIENCE)?;
    next.until("\"paired\"", PATIENCE)?;
    primary.stop(PATIENCE)?;
    next.end(PATIENCE)?;
    Ok("the primary took another backup")
}

/// The primary, which alone has the machine, is killed: the backup waits for another. If it was entitled by then it goes live.
fn sender_dies(guest: &str, after: u64) -> Result<&'static str> {
    let place = Place::new()?;
    let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
    let before = Holdings::of(backup.pid())?;
    let relay = Relay::start(address)?;
    relay.arm(after);
    let mut primary = place.start_primary("primary", guest, relay.address())?;
    relay.kill(primary.pid());
    struck(&relay, &mut primary)?;
    let words = ["a primary was refused", "\"live\""];
    if backup.until_one_of(&words, PATIENCE)? == 1 {
        // The last bytes are of the log: it was entitled by then.
        backup.stop(PATIENCE)?;
        return Ok("the backup was entitled, and went live");
    }
    before.restored(backup.pid())?;
    let mut next = place.primary("next", guest, relay.address())?;
    next.until("\"paired\"", PATIENCE)?;
    backup.until("\"paired\"", PATIENCE)?;
    next.stop(PATIENCE)?;
    backup.end(PATIENCE)?;
    Ok("the backup took another primary")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_report_of_a_loss_is_judged_so() {
        let mut report = Report {
            memory_hash_equal: Some(true),
            epoch: 3,
            ..Report::default()
        };
        let earlier = serde_json::json!([{"stopped_ms": 0.2}]);
        report.extra.insert("earlier".into(), earlier);
        judge(&report, 2).unwrap();
        judge(&report, 3).unwrap_err();
        for spoil in [
            |report: &mut Report| report.lost_acknowledged_writes = 1,
            |report: &mut Report| report.broken_connections = 1,
            |report: &mut Report| report.divergences = 1,
            |report: &mut Report| report.memory_hash_equal = None,
            |report: &mut Report| {
                let long = serde_json::json!([{"stopped_ms": 11.0}]);
                report.extra.insert("earlier".into(), long);
            },
        ] {
            let mut bad = report.clone();
            spoil(&mut bad);
            judge(&bad, 2).unwrap_err();
        }
    }
}
