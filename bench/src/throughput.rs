//! What protection leaves of a guest's own pace: as many requests as it can serve, and computing without an exit.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, median, round};
use crate::world::{Guest, Mode, Network};

/// The aim for the cost of recording and of the pair, as a ratio to `run`.
pub const AIM: f64 = 0.98;
const MODES: [Mode; 3] = [Mode::Run, Mode::Record, Mode::Pair];
/// The demo's client at its fastest.
const CONNECTIONS: usize = 16;
/// Load before the measurement, for caches and tables.
const WARM: Duration = Duration::from_millis(300);
/// Rounds of `compute` between two reports: tens of milliseconds without an exit, several reports in the shortest form.
const COMPUTE_WORDS: &str = "rounds=10";
/// How long the guest may take for its first report.
const FIRST_REPORT: Duration = Duration::from_secs(10);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// For each machine.
    pub time: Duration,
    /// Sets of machines; the median counts.
    pub rounds: usize,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not serve.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("throughput", "A guest's own pace");
    let mut table = Table::new(
        "Pace, and as a ratio to `run`",
        &[
            "guest",
            "unit",
            "run",
            "record",
            "pair",
            "record / run",
            "pair / run",
        ],
    );
    let mut bars = Vec::new();
    for (guest, unit) in [("kv", "requests/s"), ("compute", "reports/s")] {
        let mut found: Vec<[f64; MODES.len()]> = Vec::new();
        for number in 0..extent.rounds {
            let mut paces = [0.0; MODES.len()];
            for (pace, mode) in paces.iter_mut().zip(MODES) {
                *pace = match guest {
                    "kv" => serve(mode, &network, number as u64, extent.time)?,
                    _ => compute(mode, extent.time)?,
                };
            }
            found.push(paces);
        }
        let middle = |of: &dyn Fn(&[f64; 3]) -> f64| round(median(found.iter().map(of).collect()));
        let paces = [
            middle(&|paces| paces[0]),
            middle(&|paces| paces[1]),
            middle(&|paces| paces[2]),
        ];
        // Of each round by itself, so that what the machine did meanwhile falls upon all.
        let ratios = [
            middle(&|paces| paces[1] / paces[0]),
            middle(&|paces| paces[2] / paces[0]),
        ];
        table.row([
            guest.to_owned(),
            unit.to_owned(),
            format!("{:.1}", paces[0]),
            format!("{:.1}", paces[1]),
            format!("{:.1}", paces[2]),
            format!("{:.3}", ratios[0]),
            format!("{:.3}", ratios[1]),
        ]);
        bars.push((format!("{guest}: record / run"), ratios[0]));
        bars.push((format!("{guest}: pair / run"), ratios[1]));
        let rows: Vec<Value> = found.iter().map(|paces| json!(paces.map(round))).collect();
        sheet.figure(
            guest,
            json!({
                "unit": unit, "run": paces[0], "record": paces[1], "pair": paces[2],
                "record_to_run": ratios[0], "pair_to_run": ratios[1], "rounds_run_record_pair": rows,
            }),
        );
        sheet.aims.push(Aim::at_least(
            &format!("{guest}: record / run"),
            AIM,
            ratios[0],
            "the cost of recording; the thread that drains the ring into the file competes with the client for the second core",
        ));
        sheet.aims.push(Aim::at_least(
            &format!("{guest}: pair / run"),
            AIM,
            ratios[1],
            "with two cores the backup's replay takes the core on which the client would run; with four or more each has its own",
        ));
    }
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "Pace as a ratio to an unprotected machine".into(),
        unit: "".into(),
        bars,
    });
    sheet.figure("network", network.kind);
    sheet.note(format!(
        "`kv`: {CONNECTIONS} connections, each sending as soon as it has its reply, every reply checked. `compute`: reports of \
         {COMPUTE_WORDS}, no exit between two. `record` fills the ring, and a thread drains it into a file in memory: the \
         cost of recording. `pair` is a primary and a backup on this machine."
    ));
    sheet.note(format!(
        "Median of {} rounds; in each the three ran one after the other, the vCPU and the I/O thread of the serving machine on \
         the same cores. On two cores the two sides of the pair share them with the client.",
        extent.rounds
    ));
    Ok(sheet)
}

/// Requests a second.
fn serve(mode: Mode, network: &Network, round: u64, time: Duration) -> Result<f64> {
    let guest = Guest::start(mode, "kv", "", Some(network))?;
    network.load(CONNECTIONS, None, round * 2, WARM)?;
    let client = network.client(CONNECTIONS, None, round * 2 + 1)?;
    let (begun, before) = (Instant::now(), client.progress().completed);
    std::thread::sleep(time);
    let done = client.progress().completed - before;
    let pace = done as f64 / begun.elapsed().as_secs_f64();
    let outcome = client.stop()?;
    ensure!(
        outcome.wrong_replies == 0 && outcome.broken_connections == 0,
        "the guest served wrongly: {}",
        outcome.problems.join("; ")
    );
    guest.end()?;
    Ok(pace)
}

/// Reports a second, from one report to another.
fn compute(mode: Mode, time: Duration) -> Result<f64> {
    let guest = Guest::start(mode, "compute", COMPUTE_WORDS, None)?;
    let reports = || {
        guest
            .console()
            .lines()
            .filter(|line| line.starts_with("compute "))
            .count()
    };
    let first_by = Instant::now() + FIRST_REPORT;
    // Starts and ends at reports, so that no part of one is counted.
    let next_report = |after: usize, by: Instant| -> Option<(usize, Instant)> {
        while Instant::now() < by {
            let count = reports();
            if count > after {
                return Some((count, Instant::now()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    };
    let first = next_report(1, first_by);
    let Some((from, begun)) = first else {
        anyhow::bail!(
            "compute made no report within {} s: {}",
            FIRST_REPORT.as_secs(),
            guest.console()
        );
    };
    let mut last = (from, begun);
    while let Some(report) = next_report(last.0, begun + time) {
        last = report;
    }
    ensure!(
        last.0 > from,
        "compute made one report in {} ms",
        time.as_millis()
    );
    ensure!(
        !guest.console().contains("WRONG"),
        "compute computed wrongly: {}",
        guest.console()
    );
    let pace = (last.0 - from) as f64 / (last.1 - begun).as_secs_f64();
    guest.end()?;
    Ok(pace)
}
