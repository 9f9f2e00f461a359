//! `doppel demo` over each transport, many times, with the kill at another moment each time.
#![forbid(unsafe_code)]

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::demo::report::{FAILOVER_LIMIT_MS, Report, STALL_LIMIT_MS};

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "demo-loses-nothing",
    line: "a killed primary costs no acknowledged write, no connection, under 20 ms of failover, and over shm no client over 50 ms",
    short: Duration::from_secs(35),
    full: Duration::from_secs(300),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let mut figures = Figures::default();
    for transport in ["shm", "tcp"] {
        show_over(transport, run, &mut random, &mut figures)?;
    }
    Ok(figures)
}

fn show_over(transport: &str, run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let times = run.form.pick(2, 20);
    let mut failovers = Vec::new();
    let mut stalls = Vec::new();
    let mut before = 0;
    let mut commits = Vec::new();
    for time in 1..=times {
        let report = demo(transport, random.next())?;
        run.say(format!(
            "{transport} {time}/{times}: {} requests, failover {:.1} ms, longest wait {:.1} ms",
            report.requests.before,
            report.failover_ms.unwrap_or_default(),
            report.client_stall_ms_max
        ));
        ensure!(
            report.transport == transport,
            "it ran over {}",
            report.transport
        );
        judge(&report).with_context(|| {
            format!(
                "{transport}, run {time} of {times}: {}",
                report.to_json().unwrap_or_default()
            )
        })?;
        failovers.push(report.failover_ms.context("no failover was measured")?);
        stalls.push(report.client_stall_ms_max);
        commits.push(report.commit_us.p50);
        before += report.requests.before;
    }
    figures.add(&format!("{transport}_runs"), times);
    figures.add(&format!("{transport}_requests_before_the_kills"), before);
    for (name, values) in [
        ("failover_ms", &mut failovers),
        ("longest_wait_ms", &mut stalls),
        ("commit_us_p50", &mut commits),
    ] {
        values.sort_by(f64::total_cmp);
        figures.add(
            &format!("{transport}_{name}_median"),
            round(values[values.len() / 2]),
        );
        figures.add(
            &format!("{transport}_{name}_worst"),
            round(*values.last().context("no run")?),
        );
    }
    Ok(())
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn demo(transport: &str, seed: u64) -> Result<Report> {
    let output = Command::new(doppel()?)
        .args(["demo", "--json", "--transport", transport])
        .args(["--seed", &seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    if text.lines().count() != 1 {
        bail!("standard output is not one JSON object: {text:?}; standard error: {said}");
    }
    ensure!(output.status.success(), "{}: {said} {text}", output.status);
    serde_json::from_str(&text).context("read the demo's JSON")
}

fn judge(report: &Report) -> Result<()> {
    ensure!(
        report.lost_acknowledged_writes == 0,
        "acknowledged writes were lost"
    );
    ensure!(report.broken_connections == 0, "connections broke");
    ensure!(report.divergences == 0, "the backup diverged");
    ensure!(
        report.memory_hash_equal == Some(true),
        "memory was not equal, or not compared"
    );
    ensure!(
        report.requests.before > 0 && report.requests.after > 0,
        "the client did not work"
    );
    ensure!(report.epoch == 2, "the epoch is {}", report.epoch);
    ensure!(report.commit_us.count > 0, "no commit was measured");
    let failover = report.failover_ms.unwrap_or(f64::INFINITY);
    ensure!(
        failover < FAILOVER_LIMIT_MS,
        "the failover took {failover:.1} ms"
    );
    // Over tcp a frame that the primary had read and not sent dies with it, and its sender waits for its own timeout
    // (docs/transports.md): how long is reported, not judged.
    ensure!(
        report.transport == "tcp" || report.client_stall_ms_max < STALL_LIMIT_MS,
        "a client waited {:.1} ms",
        report.client_stall_ms_max
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_bad_report_is_judged_bad() {
        let good = Report {
            memory_hash_equal: Some(true),
            epoch: 2,
            failover_ms: Some(3.0),
            client_stall_ms_max: 4.0,
            ..Report::default()
        };
        let mut good = good;
        good.requests.before = 1;
        good.requests.after = 1;
        good.commit_us.count = 1;
        judge(&good).unwrap();
        let spoil: [fn(&mut Report); 6] = [
            |report| report.lost_acknowledged_writes = 1,
            |report| report.broken_connections = 1,
            |report| report.memory_hash_equal = None,
            |report| report.failover_ms = Some(20.0),
            |report| report.client_stall_ms_max = 51.0,
            |report| report.divergences = 1,
        ];
        for spoil in spoil {
            let mut bad = good.clone();
            spoil(&mut bad);
            judge(&bad).unwrap_err();
        }
    }
}
