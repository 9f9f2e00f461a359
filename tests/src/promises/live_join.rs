//! A backup joins a machine that runs under load, and the machine survives on it; and whoever dies in the middle of the copy,
//! the other goes on and takes a new peer.
#![forbid(unsafe_code)]

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::demo::report::Report;

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::torn_copy::{self, Ground};
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

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let mut figures = Figures::default();
    for transport in ["shm", "tcp"] {
        let seconds = run.form.pick(2, 60);
        let kills = run.form.pick(3, 8);
        under_load(run, transport, seconds, kills, random.next(), &mut figures)?;
    }
    let deaths = run.form.pick(4, 50);
    torn_copy::torn(run, &Ground::tcp(), deaths, &mut random, &mut figures)?;
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
