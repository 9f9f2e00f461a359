//! The tables of *The Design of a Practical System for Fault-Tolerant Virtual Machines* (Scales and others, 2010), as ratios of one run:
//! Table 1, the guest's work with and without protection and the log's bandwidth; Table 2, what goes in and out by the network.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::alternatives::resp::{Reply, Resp};
use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, median, round};
use crate::throughput::{Pace, Stretch};
use crate::world::{Guest, Mode, Network};

/// What of its pace a guest is to keep that computes, and one that sends and receives.
const AIM_COMPUTE: f64 = 0.98;
const AIM_NETWORK: f64 = 0.95;
/// The most log of an idle guest, in Mb/s.
const AIM_IDLE: f64 = 0.1;
/// How long a guest may take until its work begins.
const BEGIN_WITHIN: Duration = Duration::from_secs(20);
/// Of the disk, in bytes: it fits into the host's memory, as its file system's cache would hold it.
const DISK: u64 = 32 << 20;
/// The demo's client at its fastest.
const CONNECTIONS: usize = 16;
/// What goes over the network at a time, and over how many connections.
const CHUNK: usize = 64 << 10;
const STREAMS: usize = 4;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Extent {
    /// For each machine.
    pub time: Duration,
    /// Sets of machines; the median counts.
    pub rounds: usize,
    /// Only this work, and no idle guest; all if there is none.
    pub only: Vec<Job>,
    /// What carries the pair's log.
    pub pair: Mode,
}

/// Work of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Job {
    /// Computes, without an exit.
    Compute,
    /// Writes blocks, flushes, reads them back.
    Disk,
    /// Key-value requests.
    Database,
    /// Large values come in.
    Receive,
    /// Large values go out.
    Transmit,
}

impl Job {
    /// Key, what it is, what is counted, and the row of the paper that it stands for.
    fn words(self) -> [&'static str; 4] {
        match self {
            Self::Compute => [
                "compute",
                "compute, without an exit",
                "reports/s",
                "none: all others have exits",
            ],
            Self::Disk => [
                "disk",
                "blocks written, flushed and read back",
                "flushes/s",
                "Kernel Compile: files",
            ],
            Self::Database => [
                "database",
                "key-value requests, half of them writes",
                "requests/s",
                "Oracle Swingbench, MS-SQL DVD Store",
            ],
            Self::Receive => ["receive", "SET of 64 KiB", "Mb/s", "Receive"],
            Self::Transmit => ["transmit", "GET of 64 KiB", "Mb/s", "Transmit"],
        }
    }

    fn guest(self) -> (&'static str, &'static str) {
        match self {
            Self::Compute => ("compute", "rounds=10"),
            Self::Disk => ("disk", "blocks=4096 batch=32 every=4"),
            Self::Database | Self::Receive | Self::Transmit => ("kv", ""),
        }
    }
}

/// What a guest did, and what was logged of it.
#[derive(Clone, Debug, Default)]
struct Done {
    pace: Pace,
    /// Of a pair's log with its headers, in Mb/s.
    log: Option<f64>,
    /// Time on a processor for each unit, in µs, by process and thread.
    threads: BTreeMap<String, f64>,
}

/// Work that is going on outside of the guest, if any, and how much was done.
enum Load {
    Console(Job),
    Client(hypervisor::demo::client::Client),
    Streams(Streams),
}

impl Load {
    fn start(job: Job, network: &Network, seed: u64) -> Result<Self> {
        Ok(match job {
            Job::Compute | Job::Disk => Self::Console(job),
            Job::Database => Self::Client(network.client(CONNECTIONS, None, seed)?),
            Job::Receive | Job::Transmit => Self::Streams(Streams::start(network, job)?),
        })
    }

    fn done(&self, guest: &Guest) -> u64 {
        match self {
            Self::Client(client) => client.progress().completed,
            Self::Streams(streams) => streams.chunks.load(Ordering::Relaxed),
            Self::Console(job) => {
                let text = guest.console();
                match job {
                    Job::Disk => last_flush(&text),
                    _ => text
                        .lines()
                        .filter(|line| line.starts_with("compute "))
                        .count() as u64,
                }
            }
        }
    }

    /// Ends it: was everything right?
    fn stop(self, guest: &Guest) -> Result<()> {
        match self {
            Self::Client(client) => {
                let outcome = client.stop()?;
                ensure!(
                    outcome.wrong_replies == 0 && outcome.broken_connections == 0,
                    "the guest served wrongly: {}",
                    outcome.problems.join("; ")
                );
            }
            Self::Streams(streams) => streams.stop()?,
            Self::Console(_) => {
                let console = guest.console();
                ensure!(
                    !console.contains("WRONG"),
                    "the guest worked wrongly: {console}"
                );
            }
        }
        Ok(())
    }
}

/// The number of the last flush that the disk's guest has told whole.
fn last_flush(console: &str) -> u64 {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str| line.strip_prefix("disk: flushed ")?.trim().parse().ok();
    whole.lines().rev().find_map(number).unwrap_or(0)
}

/// Connections that move one chunk after the other.
struct Streams {
    over: Arc<AtomicBool>,
    chunks: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Streams {
    fn start(network: &Network, job: Job) -> Result<Self> {
        let (over, chunks) = (Arc::default(), Arc::default());
        let mut all = Self {
            over,
            chunks,
            threads: Vec::new(),
        };
        let until = Instant::now() + BEGIN_WITHIN;
        for number in 0..STREAMS {
            let mut line = loop {
                match Resp::connect(network.address().into(), 0) {
                    Ok(line) => break line,
                    Err(error) if Instant::now() > until => {
                        return Err(error).context("connect to the guest");
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            };
            let (over, chunks) = (all.over.clone(), all.chunks.clone());
            all.threads.push(std::thread::spawn(move || {
                let (key, value) = (format!("chunk:{number}"), vec![b'x'; CHUNK]);
                let set: [&[u8]; 3] = [b"SET", key.as_bytes(), &value];
                let stored = Reply::Text(Some(b"OK".to_vec()));
                ensure!(line.ask(&set)? == stored, "a SET was not answered OK");
                while !over.load(Ordering::Relaxed) {
                    let well = match job {
                        Job::Receive => line.ask(&set)? == stored,
                        _ => {
                            line.ask(&[b"GET", key.as_bytes()])? == Reply::Text(Some(value.clone()))
                        }
                    };
                    ensure!(well, "a chunk was not answered as it had to be");
                    chunks.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        Ok(all)
    }

    fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            match thread.join() {
                Ok(outcome) => outcome?,
                Err(_) => bail!("a stream panicked"),
            }
        }
        Ok(())
    }
}

/// The next moment at which more is done than `after`, and how much; guests tell of their work in steps.
fn next_step(load: &Load, guest: &Guest, after: u64) -> Result<u64> {
    let until = Instant::now() + BEGIN_WITHIN;
    loop {
        let done = load.done(guest);
        if done > after {
            return Ok(done);
        }
        ensure!(
            Instant::now() < until,
            "nothing was done for {BEGIN_WITHIN:?}: {}",
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn work(job: Job, mode: Mode, network: &Network, seed: u64, time: Duration) -> Result<Done> {
    let (name, words) = job.guest();
    let cable = !matches!(job, Job::Compute | Job::Disk);
    let disk = (job == Job::Disk).then_some(DISK);
    let guest = Guest::start_with(mode, name, words, cable.then_some(network), disk)?;
    let load = Load::start(job, network, seed)?;
    let first = next_step(&load, &guest, 1)?;
    let (logged, stretch, begun) = (guest.logged()?, Stretch::begin(&guest)?, Instant::now());
    let before = guest.cpu_times()?;
    std::thread::sleep(time);
    let last = next_step(&load, &guest, load.done(&guest))?;
    let pace = stretch.pace(&guest, (last - first) as usize)?;
    let threads = guest
        .cpu_times()?
        .into_iter()
        .map(|(name, after)| {
            let took = after.saturating_sub(before.get(&name).copied().unwrap_or_default());
            (
                name,
                took.as_secs_f64() * 1e6 / (last - first).max(1) as f64,
            )
        })
        .collect();
    let seconds = begun.elapsed().as_secs_f64();
    let log = match (logged, guest.logged()?) {
        (Some(before), Some(after)) => Some((after - before) * 8.0 / 1e6 / seconds),
        _ => None,
    };
    load.stop(&guest)?;
    guest.end()?;
    let scale = match job {
        Job::Receive | Job::Transmit => CHUNK as f64 * 8.0 / 1e6,
        _ => 1.0,
    };
    Ok(Done {
        pace: Pace {
            wall: pace.wall * scale,
            processor: pace.processor * scale,
        },
        log,
        threads,
    })
}

/// The log of a pair whose guest has nothing to do, in Mb/s.
fn idle(pair: Mode, network: &Network, time: Duration) -> Result<f64> {
    let guest = Guest::start(pair, "kv", "", Some(network))?;
    // It boots and announces itself.
    network.load(1, Some(50.0), 0, Duration::from_millis(300))?;
    let logged = || -> Result<f64> { guest.logged()?.context("a pair has a log") };
    let (before, begun) = (logged()?, Instant::now());
    std::thread::sleep(time);
    let bytes = logged()? - before;
    let seconds = begun.elapsed().as_secs_f64();
    guest.end()?;
    Ok(bytes * 8.0 / 1e6 / seconds)
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not work.
pub fn measure(extent: &Extent) -> Result<Sheet> {
    let only = &extent.only;
    let modes = [Mode::Run, Mode::Drain, extent.pair];
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("paper", "The paper's tables");
    let mut bars = Vec::new();
    let mut by_thread = Table::new(
        "Time on a processor by thread (µs for each 64 KiB, each request)",
        &["", "process: thread", "µs"],
    );
    let tables = [
        (
            "Table 1: the guest's work",
            &[Job::Compute, Job::Disk, Job::Database][..],
        ),
        ("Table 2: network", &[Job::Receive, Job::Transmit][..]),
    ];
    for (title, jobs) in tables {
        let mut table = Table::new(
            title,
            &[
                "",
                "counted",
                "unprotected",
                "recorded",
                "protected",
                "recorded / unprotected",
                "protected / unprotected",
                "log (Mb/s)",
                "in the paper",
            ],
        );
        for &job in jobs {
            if !only.is_empty() && !only.contains(&job) {
                continue;
            }
            let rounds = (0..extent.rounds as u64)
                .map(|number| {
                    let mut all: [Done; 3] = Default::default();
                    for (done, mode) in all.iter_mut().zip(modes) {
                        *done = work(job, mode, &network, number, extent.time)
                            .with_context(|| format!("{job:?} as {}", mode.name()))?;
                    }
                    Ok(all)
                })
                .collect::<Result<Vec<_>>>()?;
            row(&mut sheet, &mut table, &mut bars, job, &rounds);
            if !matches!(job, Job::Compute | Job::Disk) {
                threads(&mut sheet, &mut by_thread, job, &rounds);
            }
        }
        sheet.tables.push(table);
    }
    sheet.tables.push(by_thread);
    if only.is_empty() {
        let idle = round(idle(extent.pair, &network, extent.time)?);
        sheet.figure("idle_megabits_per_s", idle);
        sheet.aims.push(Aim::at_most(
            "log of an idle guest (Mb/s)",
            AIM_IDLE,
            idle,
            "with headers, without padding",
        ));
    }
    sheet.panels.push(Panel::Bars {
        title: "Pace as a ratio to an unprotected machine".into(),
        unit: String::new(),
        bars,
    });
    sheet.figure("network", network.kind);
    sheet.note(format!(
        "Median of {} rounds; in each an unprotected machine, a recorded one and a pair worked one after the other. Ratios are of each round. \
         The paper's were measured on two hosts of their own; here both sides, the client and the log share the cores, so *recorded* is what \
         protecting costs the serving side, and *protected* holds the backup's work as well.",
        extent.rounds
    ));
    sheet.note(
        "*Recorded* is `doppel record` whose ring is drained and checked by a thread and not kept: to fill memory that the host had not \
         touched lately would measure that.",
    );
    sheet.note("Disk images are files in memory. The log's bandwidth is of the pair: payloads and headers. An idle guest logs its clock.");
    Ok(sheet)
}

/// Threads that take less than this for a unit are left out, in µs.
const LITTLE: f64 = 0.1;

/// Who had a processor for how long, for each unit; the median of the rounds.
fn threads(sheet: &mut Sheet, table: &mut Table, job: Job, rounds: &[[Done; 3]]) {
    let mut all: BTreeMap<(usize, &str), Vec<f64>> = BTreeMap::new();
    for round in rounds {
        for (mode, done) in round.iter().enumerate() {
            for (name, &micros) in &done.threads {
                all.entry((mode, name)).or_default().push(micros);
            }
        }
    }
    let [key, what, ..] = job.words();
    let mut figures = serde_json::Map::new();
    for ((_, name), values) in all {
        let micros = round(median(values));
        if micros >= LITTLE {
            table.row([what.to_owned(), name.to_owned(), format!("{micros:.1}")]);
            figures.insert(name.to_owned(), json!(micros));
        }
    }
    sheet.figure(&format!("{key}_us_by_thread"), figures);
}

/// A way to look at a pace, and its name among the figures.
type View = (&'static str, fn(&Done) -> f64);

fn row(
    sheet: &mut Sheet,
    table: &mut Table,
    bars: &mut Vec<(String, f64)>,
    job: Job,
    rounds: &[[Done; 3]],
) {
    let [key, what, unit, paper] = job.words();
    let middle = |of: &dyn Fn(&[Done; 3]) -> f64| round(median(rounds.iter().map(of).collect()));
    let views: [View; 2] = [
        ("wall", |done| done.pace.wall),
        ("processor", |done| done.pace.processor),
    ];
    let log = middle(&|all| all[2].log.unwrap_or_default());
    let mut figures = json!({"unit": unit, "log_megabits_per_s": log});
    for (view, of) in views {
        let paces = [0, 1, 2].map(|mode| middle(&|all| of(&all[mode])));
        let ratios = [1, 2].map(|mode| middle(&|all| of(&all[mode]) / of(&all[0])));
        let rounds: Vec<Value> = rounds
            .iter()
            .map(|all| json!(all.each_ref().map(|done| round(of(done)))))
            .collect();
        figures[view] = json!({
            "run": paces[0], "record": paces[1], "pair": paces[2],
            "record_to_run": ratios[0], "pair_to_run": ratios[1], "rounds_run_record_pair": rounds,
        });
        let counted = match view {
            "wall" => unit.to_owned(),
            _ => format!("{unit} of the serving process's processor time"),
        };
        table.row([
            what.to_owned(),
            counted,
            format!("{:.1}", paces[0]),
            format!("{:.1}", paces[1]),
            format!("{:.1}", paces[2]),
            format!("{:.3}", ratios[0]),
            format!("{:.3}", ratios[1]),
            if view == "wall" {
                format!("{log:.2}")
            } else {
                String::new()
            },
            if view == "wall" {
                paper.to_owned()
            } else {
                String::new()
            },
        ]);
        if view == "wall" {
            bars.push((format!("{key}: recorded / unprotected"), ratios[0]));
            bars.push((format!("{key}: protected / unprotected"), ratios[1]));
            let (aim, remark) = match job {
                Job::Compute => (
                    AIM_COMPUTE,
                    "the two sides share the cores: recording alone is judged",
                ),
                Job::Receive | Job::Transmit => (
                    AIM_NETWORK,
                    "the two sides share the cores: recording alone is judged",
                ),
                Job::Disk | Job::Database => continue,
            };
            sheet.aims.push(Aim::at_least(
                &format!("{key}: recorded / unprotected"),
                aim,
                ratios[0],
                remark,
            ));
        }
    }
    sheet.figure(key, figures);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_that_is_told_in_part_does_not_count() {
        assert_eq!(
            last_flush("disk: 9 blocks, 9 used\ndisk: flushed 4\ndisk: flushed 8\ndisk: flushed 1"),
            8
        );
        assert_eq!(last_flush("disk: 9 blocks, 9 used\n"), 0);
        assert_eq!(last_flush(""), 0);
    }

    #[test]
    fn a_ratio_is_of_its_own_round() {
        let done = |wall: f64, log| Done {
            pace: Pace {
                wall,
                processor: wall,
            },
            log,
            ..Done::default()
        };
        let of = |run: f64, record: f64, pair: f64| {
            [done(run, None), done(record, None), done(pair, Some(2.0))]
        };
        let mut sheet = Sheet::new("paper", "");
        let mut table = Table::new("", &[""]);
        let rounds = [
            of(100.0, 90.0, 50.0),
            of(10.0, 10.0, 5.0),
            of(1.0, 0.5, 0.5),
        ];
        row(
            &mut sheet,
            &mut table,
            &mut Vec::new(),
            Job::Compute,
            &rounds,
        );
        let found = &sheet.figures["compute"];
        assert_eq!(found["wall"]["record_to_run"], 0.9);
        assert_eq!(found["wall"]["pair_to_run"], 0.5);
        assert_eq!(found["log_megabits_per_s"], 2.0);
        assert!(sheet.aims.len() == 1 && !sheet.aims[0].reached);
    }
}
