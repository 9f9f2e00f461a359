//! A real etcd server as the arbiter: its rules, alone and through a network that loses answers; races; a server that is killed and
//! restarted in the middle of swaps, or stands still; and pairs that have it.
#![forbid(unsafe_code)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::arbiter::{Arbiter, Swap};
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::demo::report::Report;
use hypervisor::protocol::{Identity, Record, State};
use hypervisor::session::report::Event;

use crate::harness::arbiter_rules;
use crate::harness::etcd::{Etcd, Mischief, Proxy, arbiter_at};
use crate::harness::hostile_clients::Clients;
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "etcd-arbiter",
    line: "etcd as the arbiter: one winner each time, whatever becomes of answers and of the server; without it nobody changes role",
    short: Duration::from_secs(40),
    full: Duration::from_secs(240),
    show,
};

/// A bound for things that take seconds, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(30);

/// The machine of every pair here.
const MACHINE: &str = "machine";

fn who(n: u64) -> Identity {
    let mut bytes = [7; 16];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Identity::from_bytes(bytes)
}

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let directory = tempfile::Builder::new()
        .prefix("doppel-etcd-")
        .tempdir()
        .context("make a directory")?;
    let mut etcd = Etcd::start(&directory.path().join("rules"))?;

    let rounds = run.form.pick(30, 300);
    let direct =
        |machine: &str| -> Result<Box<dyn Arbiter>> { Ok(Box::new(etcd.arbiter(machine)?)) };
    let swaps = arbiter_rules::check(&direct, 8, rounds).context("etcd itself")?;
    run.say(format!("the rules hold; {swaps} swaps raced"));
    figures.add("raced_swaps", swaps);
    figures.add(
        "swap_us_median",
        median_swap(&etcd, run.form.pick(50, 500))?,
    );

    // The same over a network that delays and cuts, with a server of its own.
    let other = Etcd::start(&directory.path().join("network"))?;
    let proxy = Proxy::start(other.address(), Mischief::Anything, random.next())?;
    let through = |machine: &str| -> Result<Box<dyn Arbiter>> {
        Ok(Box::new(arbiter_at(&proxy.place(), machine)?))
    };
    let swaps = arbiter_rules::check(&through, 4, rounds).context("through a bad network")?;
    ensure!(proxy.lost() > 0, "not one answer was lost");
    run.say(format!(
        "and through a bad network: {swaps} swaps, {} answers lost",
        proxy.lost()
    ));
    figures.add("answers_lost", proxy.lost());
    drop((proxy, other));

    let (swaps, unsure) = killed_in_the_middle(&mut etcd, run.form.pick(3, 20), &mut random)?;
    run.say(format!(
        "killed in the middle: {swaps} swaps, {unsure} of unknown outcome, none twice"
    ));
    figures.add("swaps_around_kills", swaps);
    figures.add("swaps_unsure", unsure);
    drop(etcd);

    alone(|| {
        let stage = Stage::enter()?;
        let seen = without_arbiter(&stage, &mut random)?;
        run.say(format!(
            "without an arbiter nobody changed role for {} ms",
            seen.as_millis()
        ));
        figures.add("outage_ms", seen.as_millis() as u64);
        Ok(())
    })?;

    let mut failovers = Vec::new();
    let etcd = Etcd::start(&directory.path().join("demo"))?;
    for _ in 0..run.form.pick(1, 10) {
        failovers.push(demo(&etcd, random.next())?);
    }
    failovers.sort_by(f64::total_cmp);
    run.say(format!("demo: failover in {failovers:.1?} ms"));
    figures.add("demo_failover_ms_median", failovers[failovers.len() / 2]);
    Ok(figures)
}

fn median_swap(etcd: &Etcd, count: u64) -> Result<u64> {
    let arbiter = etcd.arbiter("timed")?;
    let mut from: Option<Record> = None;
    let mut took = Vec::new();
    for n in 0..count {
        let to = Record::cold_start(from.as_ref(), who(n), None);
        let start = Instant::now();
        ensure!(arbiter.swap(from.as_ref(), &to)? == Swap::Done, "swap {n}");
        took.push(start.elapsed().as_micros() as u64);
        from = Some(to);
    }
    took.sort_unstable();
    Ok(took[took.len() / 2])
}

/// The server is killed while one client swaps as fast as it can, and started again, so many times. A swap without an answer is
/// asked again until there is one; the history must then be one line without a gap. How many swaps, and how many were unsure.
fn killed_in_the_middle(etcd: &mut Etcd, kills: u64, random: &mut Random) -> Result<(u64, u64)> {
    let arbiter = etcd.arbiter("killed")?;
    let over = std::sync::atomic::AtomicBool::new(false);
    let (swaps, unsure, last) = std::thread::scope(|scope| {
        let over = &over;
        let swapping = scope.spawn(move || -> Result<(u64, u64, Option<Record>)> {
            let (mut from, mut unsure, mut n): (Option<Record>, u64, u64) = (None, 0, 0);
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let to = Record::cold_start(from.as_ref(), who(n), None);
                let until = Instant::now() + PATIENCE;
                loop {
                    match arbiter.swap(from.as_ref(), &to) {
                        Ok(Swap::Done) => break,
                        Ok(Swap::Lost(found)) => {
                            anyhow::bail!("swap {n} was lost to {found:?}, and there is no rival")
                        }
                        Err(error) => {
                            unsure += u64::from(error.may_have_landed());
                            ensure!(Instant::now() < until, "no answer any more: {error}");
                            std::thread::sleep(Duration::from_millis(5));
                        }
                    }
                }
                from = Some(to);
                n += 1;
            }
            Ok((n, unsure, from))
        });
        for _ in 0..kills {
            std::thread::sleep(
                random.between(Duration::from_millis(100), Duration::from_millis(400)),
            );
            etcd.kill();
            etcd.run()?;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        swapping.join().expect("it does not panic")
    })?;
    let found = etcd.arbiter("killed")?.read()?;
    ensure!(
        found == last,
        "the record is {found:?}, the last that was swapped in {last:?}"
    );
    let epoch = last.map_or(0, |record| record.epoch.0);
    ensure!(epoch == swaps, "{swaps} swaps made {epoch} epochs");
    Ok((swaps, unsure))
}

/// A pair whose etcd stands still: it serves on; its primary dies: the backup says that it may not take over, and does not; etcd
/// goes on: the backup takes over, and nothing is lost. How long nobody changed role.
fn without_arbiter(stage: &Stage, random: &mut Random) -> Result<Duration> {
    let etcd = Etcd::start(&stage.directory().join("etcd"))?;
    let spec = PairSpec {
        arbiter: Some(etcd.place()),
        ..stage.spec("kv", "")?
    };
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let mut clients = Clients::start(GUEST, 4, random.next())?;
    clients.await_answers(200)?;
    etcd.freeze()?;
    clients
        .await_answers(2000)
        .context("a pair needs no arbiter while it is well")?;
    pair.primary.kill();
    let killed = Instant::now();
    let mut said = Vec::new();
    let told = pair.backup.wait_for(
        PATIENCE,
        |event| matches!(event, Event::Notice { text, loud: true } if text.contains("no role changes until")),
        |event| said.push(event),
    );
    ensure!(
        told.is_some(),
        "the backup did not say that the arbiter is out of reach: {said:?}"
    );
    // Long enough for several attempts; none may be taken for an answer.
    let early = pair.backup.wait_for(
        Duration::from_secs(5),
        |event| matches!(event, Event::Live { .. }),
        |event| said.push(event),
    );
    ensure!(early.is_none(), "the backup went live without an arbiter");
    let outage = killed.elapsed();
    etcd.thaw()?;
    let live = pair.backup.wait_for(
        PATIENCE,
        |event| matches!(event, Event::Live { .. }),
        |event| said.push(event),
    );
    ensure!(
        live.is_some(),
        "the backup did not go live once the arbiter answered again: {said:?} {}",
        pair.backup.messages()
    );
    let record = etcd.arbiter(MACHINE)?.read()?.context("no record")?;
    ensure!(
        record.epoch.0 == 2 && record.state == State::Live,
        "the record is {record}"
    );
    clients.await_answers(200)?;
    clients.stop_and_verify()?;
    pair.backup.stop(PATIENCE);
    let record = etcd.arbiter(MACHINE)?.read()?.context("no record")?;
    ensure!(record.state == State::Ended, "the record is {record}");
    Ok(outage)
}

/// The demo with etcd: the time of its failover, in milliseconds.
fn demo(etcd: &Etcd, seed: u64) -> Result<f64> {
    let output = Command::new(doppel()?)
        .args(["demo", "--json", "--arbiter", &etcd.place()])
        .args(["--seed", &seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {said} {text}", output.status);
    let report: Report = serde_json::from_str(&text).context("read the demo's JSON")?;
    ensure!(
        report.lost_acknowledged_writes == 0
            && report.broken_connections == 0
            && report.divergences == 0
            && report.epoch == 2,
        "{text}"
    );
    report.failover_ms.context("no failover was measured")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
