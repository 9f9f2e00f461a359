//! What protection adds to a request: the same load on a machine alone and on a pair.
//!
//! The client offers a fixed rate, and a request's time counts from when it was due: a pause is charged to every request
//! that it delayed (no coordinated omission).
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use hypervisor::demo::client::Latency;
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use crate::draw::Panel;
use crate::sheet::{Sheet, Table, median, round};
use crate::world::{Guest, Mode, Network};

/// Connections, and requests offered a second over all of them: well below what an unprotected guest can serve here, so
/// that requests do not queue behind each other and the figure is the path's, not the queue's.
const LOADS: [(usize, f64); 2] = [(1, 200.0), (16, 1000.0)];
/// Load before each measurement, for caches and tables.
const WARM: Duration = Duration::from_millis(300);

/// A quantile's name in the table and among the figures, and where it stands.
type Quantile = (&'static str, &'static str, fn(&Latency) -> f64);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// For each load on each machine.
    pub time: Duration,
    /// Pairs of machines; the median counts.
    pub rounds: usize,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not serve.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("request", "What protection adds to a request");
    let mut commits = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
    // Of each round and load: alone and protected.
    let mut found: [Vec<[Latency; 2]>; LOADS.len()] = Default::default();
    for round in 0..extent.rounds {
        let alone = one(Mode::Run, &network, extent, round, &mut commits)?;
        let protected = one(Mode::Pair, &network, extent, round, &mut commits)?;
        for (load, to) in found.iter_mut().enumerate() {
            to.push([alone[load], protected[load]]);
        }
    }
    let mut table = Table::new(
        "Request to reply (µs)",
        &[
            "connections",
            "requests/s offered",
            "quantile",
            "alone",
            "protected",
            "added",
        ],
    );
    let mut bars = Vec::new();
    let mut rows: Vec<Value> = Vec::new();
    for ((connections, rate), rounds) in LOADS.iter().zip(&found) {
        let mut row = json!({"connections": connections, "rate": rate, "rounds": rounds.len()});
        row["requests"] = rounds
            .iter()
            .flatten()
            .map(|latency| latency.count)
            .sum::<u64>()
            .into();
        let quantiles: [Quantile; 2] = [
            ("p50", "p50_us", |latency| latency.p50),
            ("p99", "p99_us", |latency| latency.p99),
        ];
        for (name, key, of) in quantiles {
            let middle = |what: &dyn Fn(&[Latency; 2]) -> f64| {
                round(median(rounds.iter().map(what).collect()))
            };
            let alone = middle(&|both| of(&both[0]));
            let protected = middle(&|both| of(&both[1]));
            // Of each round by itself, so that what the machine did meanwhile falls upon both.
            let added = middle(&|both| of(&both[1]) - of(&both[0]));
            table.row([
                connections.to_string(),
                rate.to_string(),
                name.to_owned(),
                format!("{alone:.1}"),
                format!("{protected:.1}"),
                format!("{added:.1}"),
            ]);
            bars.push((format!("{connections} connections, {name}, alone"), alone));
            bars.push((
                format!("{connections} connections, {name}, protected"),
                protected,
            ));
            row[key] = json!({"alone": alone, "protected": protected, "added": added});
        }
        rows.push(row);
    }
    sheet.figure("requests", rows);
    let commit = Latency::of_nanos(&commits);
    sheet.figure(
        "commit_us",
        json!({"count": commit.count, "p50": commit.p50, "p99": commit.p99, "p999": commit.p999, "max": commit.max}),
    );
    sheet.tables.push(table);
    let mut table = Table::new(
        "An output's sync point to its commit (µs)",
        &["outputs", "p50", "p99", "p99.9", "max"],
    );
    table.row([
        commit.count.to_string(),
        format!("{:.2}", commit.p50),
        format!("{:.2}", commit.p99),
        format!("{:.2}", commit.p999),
        format!("{:.2}", commit.max),
    ]);
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "From when a request was due to its reply".into(),
        unit: "µs".into(),
        bars,
    });
    sheet.figure("network", network.kind);
    sheet.note(format!(
        "Network: {}. SET, INCR, APPEND and GET of values of 16 to 512 bytes, every reply checked. Latency counts from when a \
         request was due. Each figure is the median of {} rounds, `added` of each round's own difference.",
        network.kind, extent.rounds
    ));
    sheet.note("On two cores the primary has one and the backup the other, and the client runs on whichever is free: what is \
         added holds the backup's competition with the client. `commit_us` is the log's own part of it.");
    Ok(sheet)
}

fn one(
    mode: Mode,
    network: &Network,
    extent: Extent,
    round: usize,
    commits: &mut Histogram<u64>,
) -> Result<[Latency; LOADS.len()]> {
    let guest = Guest::start(mode, "kv", "", Some(network))?;
    let seed = |number: usize| (round * 10 + number) as u64;
    network.load(16, None, seed(0), WARM)?;
    if let Some(pair) = guest.pair() {
        // Commits of the warm-up are not the measurement's.
        drop(pair.primary.events());
    }
    let mut latencies = [Latency::default(); LOADS.len()];
    for (number, (connections, rate)) in LOADS.into_iter().enumerate() {
        latencies[number] = network
            .load(connections, Some(rate), seed(number + 1), extent.time)?
            .latency;
    }
    if let Some(pair) = guest.pair() {
        for event in pair.primary.events() {
            if let Event::Commits { buckets } = event {
                for (nanos, count) in buckets {
                    commits.saturating_record_n(nanos, count);
                }
            }
        }
    }
    guest.end()?;
    Ok(latencies)
}
