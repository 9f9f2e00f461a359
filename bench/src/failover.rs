//! How long a failover takes, and the longest that a client waited: `doppel demo`, over and over.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use hypervisor::demo::report::{FAILOVER_LIMIT_MS, Report, STALL_LIMIT_MS};
use serde_json::json;

use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, round};
use crate::world;

/// Bars of a histogram in the picture.
const BARS: u64 = 16;

/// Measures and makes the sheet: one kill for each demo, the first with this seed, the next with the next.
///
/// # Errors
/// If a demo loses anything.
pub fn measure(kills: u64, seed: u64) -> Result<Sheet> {
    let mut sheet = Sheet::new("failover", "Failover");
    let mut table = Table::new(
        "Milliseconds, over all kills",
        &["", "kills", "p50", "p90", "p99", "max", "limit"],
    );
    let micros = || Histogram::<u64>::new_with_bounds(1, 60_000_000, 3);
    let (mut failovers, mut stalls) = (micros()?, micros()?);
    let mut lost = 0;
    for kill in 0..kills {
        let report = demo(seed + kill).with_context(|| format!("kill {} of {kills}", kill + 1))?;
        lost += report.lost_acknowledged_writes + report.broken_connections + report.divergences;
        failovers.saturating_record(
            (report.failover_ms.context("no failover was measured")? * 1e3) as u64,
        );
        stalls.saturating_record((report.client_stall_ms_max * 1e3) as u64);
    }
    ensure!(
        lost == 0,
        "{lost} writes, connections or replays were lost: these figures are of something else"
    );
    for (key, name, of, limit) in [
        (
            "failover_ms",
            "kill to the first byte served",
            &failovers,
            FAILOVER_LIMIT_MS,
        ),
        (
            "client_stall_ms",
            "longest wait of a client",
            &stalls,
            STALL_LIMIT_MS,
        ),
    ] {
        let at = |quantile: f64| of.value_at_quantile(quantile) as f64 / 1e3;
        let worst = of.max() as f64 / 1e3;
        table.row([
            name.to_owned(),
            of.len().to_string(),
            format!("{:.2}", at(0.5)),
            format!("{:.2}", at(0.9)),
            format!("{:.2}", at(0.99)),
            format!("{worst:.2}"),
            format!("{limit}"),
        ]);
        let all: Vec<f64> = of
            .iter_recorded()
            .flat_map(|value| {
                std::iter::repeat_n(
                    value.value_iterated_to() as f64 / 1e3,
                    value.count_at_value() as usize,
                )
            })
            .collect();
        sheet.figure(
            key,
            json!({"count": of.len(), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(worst), "all": all}),
        );
        let remark = "a kill while the host runs other work than this";
        sheet.aims.push(Aim::at_most(
            &format!("{name}, worst (ms)"),
            limit,
            worst,
            remark,
        ));
        sheet.panels.push(Panel::Bars {
            title: format!("{name}: kills by milliseconds"),
            unit: "kills".into(),
            bars: bins(&all),
        });
    }
    sheet.tables.push(table);
    sheet.figure("seed", seed);
    sheet.note("Each is a whole `doppel demo`: eight connections write and read as fast as they are served, the primary is killed by \
         SIGKILL after one to three seconds, and everything acknowledged is read back.");
    Ok(sheet)
}

fn demo(seed: u64) -> Result<Report> {
    let output = Command::new(world::doppel()?)
        .args(["demo", "--json", "--seed", &seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("read the demo's JSON: {said}"))
}

/// How many values lie in each of some spans of equal length, from 0 to the largest.
fn bins(values: &[f64]) -> Vec<(String, f64)> {
    let largest = values.iter().copied().fold(0.0, f64::max);
    let width = largest / BARS as f64;
    (0..BARS)
        .map(|bin| {
            let (from, to) = (bin as f64 * width, (bin + 1) as f64 * width);
            let last = bin + 1 == BARS;
            let count = values
                .iter()
                .filter(|&&value| value >= from && (value < to || last))
                .count();
            (format!("{from:.1} to {to:.1} ms"), count as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_one_bin() {
        let values = [0.0, 1.0, 1.5, 8.0, 16.0, 16.0];
        let bins = bins(&values);
        assert_eq!(bins.len() as u64, BARS);
        assert_eq!(
            bins.iter().map(|(_, count)| *count).sum::<f64>(),
            values.len() as f64
        );
        assert_eq!(bins[1].1, 2.0);
        assert_eq!(bins[15].1, 2.0);
    }
}
