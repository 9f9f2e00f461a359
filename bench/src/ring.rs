//! The ring between two cores: how long until an entry is seen, and how many go through.
//!
//! Latencies are of round trips, measured on one clock by the side that begins them; the cost of reading the clock, measured
//! in the same run, is taken off. The bare cache line, the ring to and fro, and the ring with *received* take turns in
//! short blocks, so that whatever else the machine does falls upon all three.
#![forbid(unsafe_code)]

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use core_affinity::CoreId;
use crossbeam::channel::{TryRecvError, TrySendError, bounded};
use hdrhistogram::Histogram;
use rdma_log::entry::LINE;
use rdma_log::transport::shm;
use rdma_log::{Lane, LaneReader, Marks, RingConfig, RingReader, RingWriter, Seq};
use serde_json::{Value, json};

use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, median, round};

/// Payload of the entries whose latency is measured: with its header it fills one cache line, as most of a guest's do.
const PAYLOAD: usize = 32;
/// Round trips of one kind before the next one's turn.
const BLOCK: usize = 1000;
/// Blocks that only warm up.
const WARM: usize = 3;
/// Entry sizes of the throughput, in bytes of payload.
const SIZES: [usize; 7] = [16, 64, 256, 1024, 4096, 16_384, 65_536];
/// Entries that a crossbeam channel holds: as many as the events lane holds of the smallest kind would be more memory than a
/// cache; this is what its users choose.
const CHANNEL: usize = 1024;

/// The aim for latencies, as a ratio to the bare cache line's.
pub const AIM: f64 = 1.5;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Blocks of each kind.
    pub blocks: usize,
    /// Bytes that go through at each size, at the most.
    pub bytes: usize,
    /// Entries that go through at each size, at the most.
    pub entries: usize,
    /// Repetitions at each size; the median counts.
    pub rounds: usize,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If there are no two cores to measure between, or no memory.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let mut sheet = Sheet::new("ring", "The ring over shared memory");
    let cores = two_cores()?;
    let trips = latencies(cores, extent.blocks)?;
    trips.tell(&mut sheet);
    throughput(&mut sheet, cores, extent)?;
    sheet.note(format!(
        "Both threads spin, one on core {}, one on core {}. Entries have {PAYLOAD} bytes of payload, so one cache line.",
        cores[0].id, cores[1].id
    ));
    Ok(sheet)
}

fn two_cores() -> Result<[CoreId; 2]> {
    let ids = core_affinity::get_core_ids().unwrap_or_default();
    match ids[..] {
        [a, b, ..] => Ok([a, b]),
        _ => anyhow::bail!(
            "the ring is measured between two cores, and this process may use {}: give it two (taskset, cpuset)",
            ids.len()
        ),
    }
}

/// Round trips in nanoseconds.
struct Trips {
    clock: f64,
    bare: Histogram<u64>,
    ring: Histogram<u64>,
    received: Histogram<u64>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("legal bounds")
}

#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

impl Line {
    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    fn wait(&self, value: u64) {
        while self.0.load(Ordering::Acquire) != value {
            spin_loop();
        }
    }
}

fn latencies([here, there]: [CoreId; 2], blocks: usize) -> Result<Trips> {
    let lines = [Line::default(), Line::default()];
    let (mut out, mut out_reader) = shm::pair(&RingConfig::default())?;
    let (mut back, mut back_reader) = shm::pair(&RingConfig::default())?;
    thread::scope(|scope| {
        let answers = scope.spawn(|| -> Result<()> {
            core_affinity::set_for_current(there);
            for block in 0..blocks + WARM {
                for round in block_rounds(block) {
                    lines[0].wait(round);
                    lines[1].set(round);
                }
                for _ in 0..BLOCK {
                    take(&mut out_reader.events)?;
                    put(&mut back)?;
                }
                for _ in 0..BLOCK {
                    let seq = take(&mut out_reader.events)?;
                    out_reader.events.set_received(seq)?;
                }
            }
            Ok(())
        });
        core_affinity::set_for_current(here);
        let clock = clock_cost();
        let mut trips = Trips {
            clock,
            bare: histogram(),
            ring: histogram(),
            received: histogram(),
        };
        for block in 0..blocks + WARM {
            let warm = block < WARM;
            let note = |to: &mut Histogram<u64>, begun: Instant| {
                let nanos = begun.elapsed().as_nanos() as u64;
                if !warm {
                    to.saturating_record(nanos.saturating_sub(clock as u64).max(1));
                }
            };
            for round in block_rounds(block) {
                let begun = Instant::now();
                lines[0].set(round);
                lines[1].wait(round);
                note(&mut trips.bare, begun);
            }
            for _ in 0..BLOCK {
                let begun = Instant::now();
                put(&mut out)?;
                take(&mut back_reader.events)?;
                note(&mut trips.ring, begun);
            }
            for _ in 0..BLOCK {
                let begun = Instant::now();
                let seq = put(&mut out)?;
                while out.progress.poll()?[Lane::Events.index()].received < seq {
                    spin_loop();
                }
                note(&mut trips.received, begun);
            }
        }
        answers
            .join()
            .expect("the answering thread does not panic")?;
        Ok(trips)
    })
}

/// Numbers of a block's rounds, never 0, never the same in two blocks.
fn block_rounds(block: usize) -> std::ops::Range<u64> {
    let first = (block * BLOCK) as u64 + 1;
    first..first + BLOCK as u64
}

fn put(writer: &mut RingWriter) -> Result<Seq> {
    let seq = writer.events.append(&[7; PAYLOAD], Marks::default())?;
    writer.events.notify()?;
    Ok(seq)
}

fn take(reader: &mut LaneReader) -> Result<Seq> {
    loop {
        if let Some(entry) = reader.next()? {
            return Ok(entry.seq());
        }
        spin_loop();
    }
}

/// What two readings of the clock in a row differ by, half of the time.
fn clock_cost() -> f64 {
    let mut costs = histogram();
    for _ in 0..10_000 {
        let begun = Instant::now();
        costs.saturating_record(begun.elapsed().as_nanos() as u64);
    }
    costs.value_at_quantile(0.5) as f64
}

impl Trips {
    fn tell(&self, sheet: &mut Sheet) {
        let mut table = Table::new(
            "Latency (ns)",
            &[
                "from written to",
                "p50",
                "p99",
                "p99.9",
                "bare p50",
                "ratio of p50",
            ],
        );
        let mut bars = Vec::new();
        // One way is half of a round trip; *received* is a round trip by itself.
        let bare_way = self.bare.value_at_quantile(0.5) as f64 / 2.0;
        let mut tell = |name: &str, key: &str, of: &Histogram<u64>, part: f64, bare: f64| {
            let at = |quantile: f64| of.value_at_quantile(quantile) as f64 * part;
            let ratio = at(0.5) / bare;
            table.row([
                name.to_owned(),
                format!("{:.0}", at(0.5)),
                format!("{:.0}", at(0.99)),
                format!("{:.0}", at(0.999)),
                format!("{bare:.0}"),
                format!("{ratio:.2}"),
            ]);
            bars.push((format!("{name}, p50"), at(0.5)));
            sheet.figures.insert(
                key.to_owned(),
                json!({"p50_ns": at(0.5), "p99_ns": at(0.99), "p999_ns": at(0.999), "ratio_p50": round(ratio), "count": of.len()}),
            );
            ratio
        };
        tell(
            "bare cache line, one way",
            "bare_one_way",
            &self.bare,
            0.5,
            bare_way,
        );
        let visible = tell(
            "visible at the reader",
            "visible",
            &self.ring,
            0.5,
            bare_way,
        );
        tell(
            "bare cache line, round trip",
            "bare_round_trip",
            &self.bare,
            1.0,
            bare_way * 2.0,
        );
        let received = tell(
            "received seen by the writer",
            "received",
            &self.received,
            1.0,
            bare_way * 2.0,
        );
        sheet.figure("clock_ns", self.clock);
        sheet.tables.push(table);
        sheet.panels.push(Panel::Bars {
            title: "Latency between two cores".into(),
            unit: "ns".into(),
            bars,
        });
        let why = "both move one cache line each way; an entry's checksum is computed and checked as well \
                   (docs/decisions/ring-latency.md)";
        sheet.aims.push(Aim::at_most(
            "written to visible / bare one way, p50",
            AIM,
            visible,
            why,
        ));
        sheet.aims.push(Aim::at_most(
            "written to received / bare round trip, p50",
            AIM,
            received,
            why,
        ));
    }
}

fn throughput(sheet: &mut Sheet, cores: [CoreId; 2], extent: Extent) -> Result<()> {
    let mut table = Table::new(
        "Throughput",
        &[
            "payload (B)",
            "ring (M entries/s)",
            "ring (GB/s)",
            "crossbeam (GB/s)",
            "memcpy (GB/s)",
            "ring / crossbeam",
            "ring / memcpy",
        ],
    );
    let mut lines: Vec<(String, Vec<(f64, f64)>)> =
        ["ring", "crossbeam bounded channel", "memcpy, one core"]
            .map(|name| (name.to_owned(), Vec::new()))
            .into();
    let mut rows: Vec<Value> = Vec::new();
    for size in SIZES {
        let count = (extent.bytes / size).clamp(1, extent.entries);
        let rounds = (0..extent.rounds)
            .map(|_| {
                Ok([
                    ring(cores, size, count)?,
                    channel(cores, size, count)?,
                    copies(cores[0], size, count),
                ])
            })
            .collect::<Result<Vec<_>>>()?;
        // Gigabytes a second are bytes a nanosecond.
        let rate = |time: Duration| (size * count) as f64 / time.as_nanos().max(1) as f64;
        let middle = |of: fn(&[Duration; 3], &dyn Fn(Duration) -> f64) -> f64| {
            median(rounds.iter().map(|round| of(round, &rate)).collect())
        };
        let rates = [
            middle(|times, rate| rate(times[0])),
            middle(|times, rate| rate(times[1])),
            middle(|times, rate| rate(times[2])),
        ];
        let against = [
            middle(|times, rate| rate(times[0]) / rate(times[1])),
            middle(|times, rate| rate(times[0]) / rate(times[2])),
        ];
        let entries = rates[0] * 1e3 / size as f64;
        table.row([
            size.to_string(),
            format!("{entries:.2}"),
            format!("{:.3}", rates[0]),
            format!("{:.3}", rates[1]),
            format!("{:.3}", rates[2]),
            format!("{:.2}", against[0]),
            format!("{:.2}", against[1]),
        ]);
        for (line, rate) in lines.iter_mut().zip(rates) {
            line.1.push((size as f64, rate));
        }
        rows.push(json!({
            "payload": size,
            "ring_entries_per_s": (entries * 1e6).round(),
            "ring_gb_per_s": round(rates[0]),
            "crossbeam_gb_per_s": round(rates[1]),
            "memcpy_gb_per_s": round(rates[2]),
            "ring_to_crossbeam": round(against[0]),
            "ring_to_memcpy": round(against[1]),
        }));
    }
    sheet.figure("throughput", rows);
    sheet.tables.push(table);
    sheet.panels.push(Panel::Lines {
        title: "Throughput by size of the payload".into(),
        x: "bytes of payload".into(),
        y: "GB/s".into(),
        lines,
    });
    sheet.note(
        "Throughput counts payload alone. The ring writes, checksums, copies out and checks every byte; crossbeam's bounded \
         channel moves the pointer of a vector into which the sender copied; memcpy copies within one core, without a reader.",
    );
    Ok(())
}

/// Runs a sender here and a receiver there; the time from the first entry's start to the last one's arrival.
fn between<S: Send>(
    [here, there]: [CoreId; 2],
    send: impl FnOnce() -> Result<S>,
    receive: impl FnOnce() -> Result<()> + Send,
) -> Result<Duration> {
    let ready = Line::default();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| -> Result<Instant> {
            core_affinity::set_for_current(there);
            ready.set(1);
            receive()?;
            Ok(Instant::now())
        });
        core_affinity::set_for_current(here);
        ready.wait(1);
        let begun = Instant::now();
        // What the receiver still reads from lives until it has finished.
        let _sender = send()?;
        let ended = receiver
            .join()
            .expect("the receiving thread does not panic")?;
        Ok(ended - begun)
    })
}

fn ring(cores: [CoreId; 2], size: usize, count: usize) -> Result<Duration> {
    let (mut writer, reader) = shm::pair(&RingConfig::default())?;
    let RingReader { mut events, .. } = reader;
    ensure!(
        size <= writer.events.max_payload(),
        "{size} bytes do not fit into one entry"
    );
    let payload = vec![7; size];
    // A lap, so that no page of the ring is touched for the first time while the clock runs.
    for _ in 0..=rdma_log::EVENTS_LANE / size.next_multiple_of(LINE) {
        writer.events.append(&payload, Marks::default())?;
        take(&mut events)?;
    }
    between(
        cores,
        move || {
            for _ in 0..count {
                loop {
                    match writer.events.append(&payload, Marks::default()) {
                        Ok(_) => break,
                        Err(rdma_log::WriteError::Full { .. }) => spin_loop(),
                        Err(error) => return Err(error).context("write to the ring"),
                    }
                }
            }
            Ok(writer)
        },
        move || {
            for _ in 0..count {
                take(&mut events)?;
            }
            Ok(())
        },
    )
}

fn channel(cores: [CoreId; 2], size: usize, count: usize) -> Result<Duration> {
    let (sender, receiver) = bounded::<Vec<u8>>(CHANNEL);
    let payload = vec![7; size];
    between(
        cores,
        move || {
            for _ in 0..count {
                let mut item = payload.clone();
                while let Err(TrySendError::Full(back)) = sender.try_send(item) {
                    item = back;
                    spin_loop();
                }
            }
            Ok(sender)
        },
        move || {
            for _ in 0..count {
                loop {
                    match receiver.try_recv() {
                        Ok(item) => {
                            black_box(item.first());
                            break;
                        }
                        Err(TryRecvError::Empty) => spin_loop(),
                        Err(TryRecvError::Disconnected) => anyhow::bail!("the sender is gone"),
                    }
                }
            }
            Ok(())
        },
    )
}

/// The same bytes into a buffer as large as the events lane, lap by lap.
fn copies(core: CoreId, size: usize, count: usize) -> Duration {
    core_affinity::set_for_current(core);
    let payload = vec![7_u8; size];
    let mut lane = vec![1_u8; rdma_log::EVENTS_LANE];
    let laps = lane.len() / size;
    let begun = Instant::now();
    for number in 0..count {
        let at = number % laps * size;
        black_box(&mut lane[at..at + size]).copy_from_slice(black_box(&payload));
    }
    begun.elapsed()
}
