//! How long the machine is gone (issue 6, point 3): from a primary's death to the first reply that a client gets, over one host
//! and over two; and from the silent loss of a host, its cables cut and its process killed at once.
//!
//! Clients share keys all the while, and everything they were told is checked: a fast failover that lost a write would be none.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use hypervisor::backends::wait::Moment;
use hypervisor::config::Transport;
use hypervisor::demo::pair::Pair;
use hypervisor::session::report::{Event, Timeline};
use serde_json::json;

use crate::harness::linear;
use crate::harness::linear_clients::{Histories, LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::harness::two_hosts::{TwoHosts, Which};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "failover-fast",
    line: "from a primary's death to a client's next reply under 10 ms, from a host's silent loss under 60 (medians); nothing is lost",
    short: Duration::from_secs(40),
    full: Duration::from_secs(1000),
    show,
};

/// What the median may be, in milliseconds.
const DEATH_LIMIT_MS: f64 = 10.0;
const LOSS_LIMIT_MS: f64 = 60.0;

const CLIENTS: u32 = 8;

/// How long clients are at work before a loss.
const BEFORE: [Duration; 2] = [Duration::from_millis(300), Duration::from_millis(900)];

/// Past that something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers before each loss.
const ANSWERS: u64 = 200;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let losses = run.form.pick(5, 200);
    let death = alone(|| one_host(losses, &mut random))?;
    death.add_to(run, "death_one_host", &mut figures);
    let death = alone(|| two_hosts(losses, false, &mut random))?;
    death.add_to(run, "death_two_hosts", &mut figures);
    let loss = alone(|| two_hosts(losses, true, &mut random))?;
    loss.add_to(run, "silent_loss", &mut figures);
    death_limit(&figures, "death_one_host", DEATH_LIMIT_MS)?;
    death_limit(&figures, "death_two_hosts", DEATH_LIMIT_MS)?;
    death_limit(&figures, "silent_loss", LOSS_LIMIT_MS)?;
    Ok(figures)
}

fn death_limit(figures: &Figures, name: &str, limit: f64) -> Result<()> {
    let p50 = figures.0[name]["p50_ms"].as_f64();
    let p50 = p50.context("a figure is missing")?;
    ensure!(
        p50 < limit,
        "{name}: a client's next reply came after {p50:.1} ms (median), {limit} are allowed: {}",
        figures.0[name]
    );
    Ok(())
}

/// When the primary was lost, and how its heir took over.
#[derive(Clone, Copy, Debug)]
struct Loss {
    at: Moment,
    live: Timeline,
}

/// What came of many losses.
#[derive(Debug, Default)]
struct Outages {
    /// Milliseconds from the loss to the first reply of the heir, one for each.
    to_reply: Vec<f64>,
    to_suspicion: Vec<f64>,
    to_live: Vec<f64>,
    operations: usize,
    longest_wait: Duration,
}

impl Outages {
    /// Checks what the clients were told, and finds the first reply after each loss.
    fn of(losses: &[Loss], histories: &Histories) -> Result<Self> {
        let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
        let mut answered: Vec<Moment> = histories
            .iter()
            .flatten()
            .map(|done| done.answered)
            .collect();
        answered.sort_unstable();
        let mut outages = Self {
            operations: checked.operations,
            longest_wait: longest_wait(histories),
            ..Self::default()
        };
        for loss in losses {
            let since = |at: Moment| at.since(loss.at).as_secs_f64() * 1e3;
            // Nothing of the dead primary's comes after the fence, and nothing of the heir's before the gate is open.
            let open = Moment::from_nanos(loss.live.open);
            let first = answered.partition_point(|&at| at < open);
            let first = answered.get(first).context("no client had a reply")?;
            outages.to_reply.push(since(*first));
            outages.to_live.push(since(open));
            let suspected = Moment::from_nanos(loss.live.suspected);
            outages.to_suspicion.push(since(suspected));
        }
        Ok(outages)
    }

    fn add_to(&self, run: &Run, name: &str, figures: &mut Figures) {
        let quantiles = |values: &[f64]| {
            let mut all =
                Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("legal bounds");
            for value in values {
                all.saturating_record((value * 1e3) as u64);
            }
            let at = |quantile: f64| all.value_at_quantile(quantile) as f64 / 1e3;
            (at(0.5), at(0.9), at(0.99), all.max() as f64 / 1e3)
        };
        let (p50, p90, p99, max) = quantiles(&self.to_reply);
        let mut sorted = self.to_reply.clone();
        sorted.sort_by(f64::total_cmp);
        let value = json!({
            "losses": self.to_reply.len(),
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "max_ms": max,
            "suspected_p50_ms": quantiles(&self.to_suspicion).0,
            "live_p50_ms": quantiles(&self.to_live).0,
            "longest_wait_of_a_client_ms": self.longest_wait.as_secs_f64() * 1e3,
            "operations": self.operations,
            "all_ms": sorted.iter().map(|value| (value * 10.0).round() / 10.0).collect::<Vec<_>>(),
        });
        run.say(format!("{name}: {value}"));
        figures.0.insert(name.to_owned(), value);
    }
}

/// A pair on one host, the log in shared memory.
fn one_host(losses: u32, random: &mut Random) -> Result<Outages> {
    let stage = Stage::enter()?;
    let spec = stage.spec("kv", "")?;
    ensure!(spec.transport == Transport::Shm, "another transport");
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    let mut seen = Vec::new();
    for _ in 0..losses {
        clients.await_answers(ANSWERS)?;
        std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
        let at = Moment::now();
        pair.primary.kill();
        let live = |event: &Event| matches!(event, Event::Live { .. });
        let Some(Event::Live { at: live, .. }) = pair.backup.wait_for(PATIENCE, live, drop) else {
            bail!("the backup did not go live: {}", pair.backup.messages());
        };
        seen.push(Loss { at, live });
        clients.await_answers(ANSWERS)?;
        pair.replace_primary(&spec, Some(stage.port()), drop)?;
    }
    clients.await_answers(ANSWERS)?;
    Outages::of(&seen, &clients.end()?)
}

/// A pair on two hosts, the log over TCP. `silent`: the host is lost, and not only the process.
fn two_hosts(losses: u32, silent: bool, random: &mut Random) -> Result<Outages> {
    let hosts = TwoHosts::enter()?;
    let mut backup = hosts.backup(Which::B, "backup-0")?;
    backup.until("\"address\"", PATIENCE)?;
    let connect = Which::B.listens().to_string();
    let mut primary = hosts.start(
        Which::A,
        "primary",
        "primary",
        &[
            "--connect",
            &connect,
            "--cold-start",
            "--guest",
            "kv",
            "--memory",
            "64",
            "--command-line",
            "ip=10.77.0.2/24",
        ],
    )?;
    primary.until("\"paired\"", PATIENCE)?;
    let mut on = Which::A;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    let mut seen = Vec::new();
    for number in 1..=losses {
        clients.await_answers(ANSWERS)?;
        std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
        let at = Moment::now();
        if silent {
            hosts.lose(on, &primary)?;
        } else {
            send(primary.pid(), Signal::Kill)?;
        }
        backup.until("\"live\"", PATIENCE)?;
        seen.push(Loss {
            at,
            live: live_of(&backup)?,
        });
        primary.end(PATIENCE)?;
        clients.await_answers(ANSWERS)?;
        if silent {
            hosts.mend(on)?;
        }
        let next = hosts.backup(on, &format!("backup-{number}"))?;
        primary = std::mem::replace(&mut backup, next);
        backup.until("\"paired\"", PATIENCE)?;
        on = on.other();
    }
    clients.await_answers(ANSWERS)?;
    let outages = Outages::of(&seen, &clients.end()?)?;
    primary.stop(PATIENCE)?;
    Ok(outages)
}

/// How this role went live, as it said.
fn live_of(role: &Role) -> Result<Timeline> {
    let said = role.said();
    let live = said
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find_map(|event| match event {
            Event::Live { at, .. } => Some(at),
            _ => None,
        });
    live.with_context(|| format!("it did not say how it went live: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
