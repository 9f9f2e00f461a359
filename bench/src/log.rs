//! How much log a guest makes: for each request, and while nothing happens.
//!
//! Each figure is the difference of two recordings, a short and a long one, so that starting up and connecting, which both
//! contain, fall out.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use rdma_log::LogFileReader;
use serde_json::{Value, json};

use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, round};
use crate::world::{Guest, Mode, Network};

/// The aim for an idle guest, in Mb/s.
pub const AIM_IDLE: f64 = 0.1;
/// Connections, and requests offered a second; none is as fast as replies come.
const LOADS: [(usize, Option<f64>); 3] = [(1, Some(200.0)), (16, Some(1000.0)), (16, None)];
/// Bytes of a cache line, to which a ring rounds every entry up.
const LINE: u64 = rdma_log::entry::LINE as u64;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// The difference between the idle recordings.
    pub idle: Duration,
    /// The difference between the recordings under load.
    pub load: Duration,
}

/// How long the shorter recordings last.
const SHORTER: Duration = Duration::from_millis(500);

/// What a recording came to.
#[derive(Clone, Copy, Debug, Default)]
struct Volume {
    entries: u64,
    /// Headers and payloads.
    bytes: u64,
    /// As they lie in the ring and cross a wire: in whole cache lines.
    ring: u64,
    requests: u64,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not serve, or a log cannot be read.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("log", "How much log a guest makes");
    let idle = |time: Duration| {
        record(&network, || {
            std::thread::sleep(time);
            Ok(0)
        })
    };
    let (short, long) = (idle(SHORTER)?, idle(SHORTER + extent.idle)?);
    let seconds = extent.idle.as_secs_f64();
    let each_second =
        |of: fn(&Volume) -> u64| of(&long).saturating_sub(of(&short)) as f64 / seconds;
    let megabits = each_second(|volume| volume.ring) * 8.0 / 1e6;
    sheet.figure(
        "idle",
        json!({
            "seconds": seconds,
            "entries_per_s": round(each_second(|volume| volume.entries)),
            "bytes_per_s": round(each_second(|volume| volume.bytes)),
            "ring_bytes_per_s": round(each_second(|volume| volume.ring)),
            "ring_megabits_per_s": round(megabits),
        }),
    );
    let mut idle_table = Table::new(
        "An idle second of `kv`",
        &["entries", "bytes", "bytes in the ring", "Mb/s"],
    );
    idle_table.row([
        format!("{:.1}", each_second(|volume| volume.entries)),
        format!("{:.0}", each_second(|volume| volume.bytes)),
        format!("{:.0}", each_second(|volume| volume.ring)),
        format!("{megabits:.4}"),
    ]);
    sheet.tables.push(idle_table);
    sheet.aims.push(Aim::at_most(
        "log of an idle guest (Mb/s)",
        AIM_IDLE,
        megabits,
        "every entry in whole cache lines",
    ));

    let mut table = Table::new(
        "A request of `kv`",
        &[
            "connections",
            "requests/s offered",
            "requests",
            "entries",
            "bytes",
            "bytes in the ring",
        ],
    );
    let mut bars = Vec::new();
    let mut rows: Vec<Value> = Vec::new();
    for (number, (connections, rate)) in LOADS.into_iter().enumerate() {
        let under = |time: Duration| {
            record(&network, || {
                Ok(network
                    .load(connections, rate, number as u64, time)?
                    .requests
                    .before)
            })
        };
        let (short, long) = (under(SHORTER)?, under(SHORTER + extent.load)?);
        ensure!(
            long.requests > short.requests,
            "the longer load made fewer requests: the machine is too busy to measure"
        );
        let requests = long.requests - short.requests;
        let each =
            |of: fn(&Volume) -> u64| of(&long).saturating_sub(of(&short)) as f64 / requests as f64;
        let offered = rate.map_or("as served".to_owned(), |rate| rate.to_string());
        let (entries, bytes, ring) = (
            each(|volume| volume.entries),
            each(|volume| volume.bytes),
            each(|volume| volume.ring),
        );
        table.row([
            connections.to_string(),
            offered.clone(),
            requests.to_string(),
            format!("{entries:.2}"),
            format!("{bytes:.0}"),
            format!("{ring:.0}"),
        ]);
        bars.push((format!("{connections} connections, {offered}"), ring));
        rows.push(json!({
            "connections": connections, "rate": rate, "requests": requests,
            "entries_per_request": round(entries), "bytes_per_request": round(bytes), "ring_bytes_per_request": round(ring),
        }));
    }
    sheet.figure("requests", rows);
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "Bytes in the ring for each request".into(),
        unit: "bytes".into(),
        bars,
    });
    sheet.figure("network", network.kind);
    sheet.note("The log of `doppel record`: the very entries that a primary sends. Heartbeats (UDP) and what the reader returns are \
         not in it. Requests are SET, INCR, APPEND and GET of values of 16 to 512 bytes; their frames are most of it.");
    Ok(sheet)
}

fn record(network: &Network, load: impl FnOnce() -> Result<u64>) -> Result<Volume> {
    let guest = Guest::start(Mode::Record, "kv", "", Some(network))?;
    let requests = load()?;
    let log = guest.log();
    let directory = guest.end()?;
    let mut volume = Volume {
        requests,
        ..volume(&log)?
    };
    drop(directory);
    volume.requests = requests;
    Ok(volume)
}

fn volume(log: &Path) -> Result<Volume> {
    let mut reader = LogFileReader::open(log)?;
    let mut volume = Volume::default();
    while let Some(found) = reader.next()? {
        let length = found.entry.raw().len() as u64;
        volume.entries += 1;
        volume.bytes += length;
        volume.ring += length.next_multiple_of(LINE);
    }
    Ok(volume)
}
