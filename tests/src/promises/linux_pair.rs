//! A Linux guest across two hosts (issue 7, point 1): Debian's kernel with redis under real clients, its primary's host killed, a new backup
//! in that host, and the other host killed; each time in the midst of a `redis-benchmark`, which comes to its end as if nothing had been. Prepared and replayed; and as it comes, replicated by checkpoints, with the host's CPU, KVM's own
//! interrupt controller and one and two vCPUs, in full also with the CPU that can be replayed.
#![forbid(unsafe_code)]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::backends::wait::Moment;
use hypervisor::config::Transport;
use hypervisor::intervals::Replication;
use serde_json::{Value, json};

use crate::harness::random::Random;
use crate::harness::redis::{Benchmark, Load};
use crate::lab_pair::{Choice, Guest, LabPair, PATIENCE, Site, await_answers};
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-pair",
    line: "Debian's kernel with redis in it, on one vCPU or two, outlives the loss of its host, and of the next one: redis-benchmark goes on, no connection breaks, no acknowledged write is lost",
    short: Duration::from_secs(600),
    full: Duration::from_secs(3600),
    show,
};

/// Connections of the clients: as many as a guest in an emulated host answers in time.
const CONNECTIONS: usize = 4;

/// What a benchmark does besides, over each loss: several times what it gets done before.
const LOAD: Load = Load {
    tests: "set,get",
    requests: 600,
    clients: 4,
    pipeline: 1,
};

/// Of a host: a guest of 256 MiB, its description of 90 MiB, and what a copy takes.
const HOST_MIB: u32 = 1536;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let prepared = guest.prepare(directory.path())?;
    let site = Site::set_up("promise-linux-pair", HOST_MIB)?;
    for (name, file) in [
        ("prepared", &prepared.kernel),
        ("prepared.cpio", &prepared.initrd),
        ("stock", &guest.kernel),
        ("stock.cpio", &guest.initrd),
    ] {
        fs::copy(file, site.lab().shared().join(name))
            .with_context(|| format!("share {}", file.display()))?;
    }
    let cases: [(&str, Replication, &[&str]); 4] = [
        (
            "checkpoint-2",
            Replication::Checkpoint,
            &["--vcpus", "2", "--interval-ms", "100"],
        ),
        (
            "checkpoint-1",
            Replication::Checkpoint,
            &["--vcpus", "1", "--interval-ms", "100"],
        ),
        ("replay", Replication::Replay, &[]),
        (
            "checkpoint-replayable",
            Replication::Checkpoint,
            &["--cpu", "replayable"],
        ),
    ];
    for &(name, replicate, options) in &cases[..run.form.pick(3, 4)] {
        let kernel = match replicate {
            Replication::Replay => "prepared",
            Replication::Checkpoint => "stock",
        };
        let choice = Choice {
            transport: Transport::Tcp,
            name: &format!("promise-linux-{name}"),
            guest: Guest::Linux {
                kernel,
                initrd: &format!("{kernel}.cpio"),
                task: "redis",
                options,
                of_sides: &[],
            },
            memory_mib: 256,
            replicate,
        };
        let outcome = outlive(run, &site, &choice, &mut random)
            .with_context(|| format!("replicated by {name}"))?;
        figures.add(name, outcome);
    }
    Ok(figures)
}

fn outlive(run: &Run, site: &Site, choice: &Choice<'_>, random: &mut Random) -> Result<Value> {
    let mut pair = LabPair::start(site, choice)?;
    run.say(format!("{}: paired; Linux boots", choice.name));
    let client = site.clients(random.next(), CONNECTIONS)?;
    run.say("clients at work");
    let directory = tempfile::tempdir().context("make a directory")?;
    let (mut spans, mut rates, mut longest) = (Vec::new(), Vec::new(), 0_f64);
    let losses = run.form.count(2, 10);
    for loss in 0..losses {
        let mut benchmark = Benchmark::start(directory.path(), site.address(), LOAD)?;
        await_answers(&client, 50 + random.below(200), PATIENCE)?;
        pair.ensure_paired()?;
        ensure!(
            benchmark.running()?,
            "redis-benchmark was done before the host was lost"
        );
        let host = pair.primary_host();
        let struck = Moment::now();
        client.mark_kill(struck);
        host.kill()?;
        let (live_at, live) = pair.await_live()?;
        client.mark_live(live_at);
        let served = await_answers(&client, 50, PATIENCE).context("after the take-over")?;
        let span = served.max(live_at).since(struck).as_secs_f64() * 1e3;
        run.say(format!(
            "loss {loss}: a client was answered after {span:.0} ms, {live:?}"
        ));
        spans.push(span.round());
        let measured = benchmark.finish(PATIENCE)?;
        ensure!(
            measured.len() == LOAD.tests.split(',').count(),
            "redis-benchmark did not do all of its tests: {measured:?}"
        );
        for of in &measured {
            rates.push(of.rps.round());
            longest = longest.max(of.max_ms);
        }
        pair.primary.await_end(PATIENCE, drop)?;
        if loss + 1 < losses {
            site.start(pair.primary.host())?;
            let joined = pair.rejoin()?;
            run.say(format!("a new backup: {joined:?}"));
        }
    }
    await_answers(&client, 20, PATIENCE)?;
    let (outcome, verified) = site.judge(client, choice.name)?;
    pair.ensure_none_diverged()?;
    // The next pair finds both hosts up, and none of this one in them.
    pair.end_survivor()?;
    site.start(pair.primary.host())?;
    Ok(json!({
        "hosts_killed": losses,
        "to_service_ms": spans,
        "benchmark_a_second": rates,
        "benchmark_longest_ms": longest.round(),
        "acknowledged_writes": outcome.acknowledged_writes,
        "keys_read_back": verified.keys,
        "longest_wait_ms": (outcome.stall_max.as_secs_f64() * 1e3).round(),
    }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
