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

/// How fast a guest was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Units for each second of the clock.
    pub wall: f64,
    /// Units for each second that the process which serves had a processor: what other processes take does not show in it,
    /// nor does waiting for them.
    pub processor: f64,
}

/// A stretch that is being measured.
pub struct Stretch {
    begun: Instant,
    processor: Duration,
}

impl Stretch {
    /// Begins now.
    ///
    /// # Errors
    /// If the kernel does not say what the guest has used.
    pub fn begin(guest: &Guest) -> Result<Self> {
        Ok(Self {
            processor: guest.cpu_time()?,
            begun: Instant::now(),
        })
    }

    /// What so many units come to.
    ///
    /// # Errors
    /// If the kernel does not say what the guest has used.
    pub fn pace(&self, guest: &Guest, units: usize) -> Result<Pace> {
        let (wall, processor) = (self.begun.elapsed(), guest.cpu_time()? - self.processor);
        let pace = |time: Duration| units as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        Ok(Pace {
            wall: pace(wall),
            processor: pace(processor),
        })
    }
}

/// One of two ways to look at a pace.
#[derive(Clone, Copy)]
struct View {
    key: &'static str,
    name: &'static str,
    of: fn(&Pace) -> f64,
}

const VIEWS: [View; 2] = [
    View {
        key: "wall",
        name: "second",
        of: |pace| pace.wall,
    },
    View {
        key: "processor",
        name: "processor second of the serving process",
        of: |pace| pace.processor,
    },
];

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not serve.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("throughput", "A guest's own pace");
    let columns = [
        "guest",
        "for each",
        "run",
        "record",
        "pair",
        "record / run",
        "pair / run",
    ];
    let mut table = Table::new("Pace, and as a ratio to `run`", &columns);
    let mut bars = Vec::new();
    for (guest, unit) in [("kv", "requests"), ("compute", "reports")] {
        let mut found: Vec<[Pace; MODES.len()]> = Vec::new();
        for number in 0..extent.rounds {
            let mut paces = [Pace::default(); MODES.len()];
            for (pace, mode) in paces.iter_mut().zip(MODES) {
                *pace = match guest {
                    "kv" => serve(mode, &network, number as u64, extent.time)?,
                    _ => compute(mode, extent.time)?,
                };
            }
            found.push(paces);
        }
        let mut figures = json!({"unit": unit});
        for View { key, name, of } in VIEWS {
            let middle = |what: &dyn Fn(&[f64; 3]) -> f64| {
                round(median(
                    found
                        .iter()
                        .map(|paces| what(&[of(&paces[0]), of(&paces[1]), of(&paces[2])]))
                        .collect(),
                ))
            };
            let paces = [
                middle(&|paces| paces[0]),
                middle(&|paces| paces[1]),
                middle(&|paces| paces[2]),
            ];
            // Of each round by itself, so that what the machine did meanwhile falls upon all.
            let recording = middle(&|paces| paces[1] / paces[0]);
            let pair = middle(&|paces| paces[2] / paces[0]);
            table.row([
                guest.to_owned(),
                format!("{unit} / {name}"),
                format!("{:.1}", paces[0]),
                format!("{:.1}", paces[1]),
                format!("{:.1}", paces[2]),
                format!("{recording:.3}"),
                format!("{pair:.3}"),
            ]);
            bars.push((format!("{guest}, {key}: record / run"), recording));
            bars.push((format!("{guest}, {key}: pair / run"), pair));
            let rounds: Vec<Value> = found
                .iter()
                .map(|paces| json!(paces.map(|pace| round(of(&pace)))))
                .collect();
            figures[key] = json!({
                "run": paces[0], "record": paces[1], "pair": paces[2],
                "record_to_run": recording, "pair_to_run": pair, "rounds_run_record_pair": rounds,
            });
        }
        for (view, ratio) in [
            ("wall", "record_to_run"),
            ("wall", "pair_to_run"),
            ("processor", "record_to_run"),
            ("processor", "pair_to_run"),
        ] {
            let found = figures[view][ratio].as_f64().unwrap_or_default();
            let what = format!("{guest}, {view}: {}", ratio.replace("_to_", " / "));
            sheet
                .aims
                .push(Aim::at_least(&what, AIM, found, remark(guest, view, ratio)));
        }
        sheet.figure(guest, figures);
    }
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "Pace as a ratio to an unprotected machine".into(),
        unit: String::new(),
        bars,
    });
    sheet.figure("network", network.kind);
    sheet.note(format!(
        "`kv`: {CONNECTIONS} connections, each sending as soon as it has its reply, every reply checked. `compute`: reports of \
         {COMPUTE_WORDS}, no exit between two. `record` fills the ring, and a thread drains it into a file in memory: the \
         cost of recording. `pair` is a primary and a backup on this machine."
    ));
    sheet.note(
        "A ratio well above 1, and two views that differ much, mean that other processes took the cores while one of the three \
         ran: measure again on a quiet machine.",
    );
    sheet.note(format!(
        "Median of {} rounds; in each the three ran one after the other, the vCPU and the I/O thread of the serving machine on \
         the same cores. On two cores the two sides of the pair share them with the client.",
        extent.rounds
    ));
    Ok(sheet)
}

/// What a ratio contains besides the cost of protecting.
fn remark(guest: &str, view: &str, ratio: &str) -> &'static str {
    match (guest, view, ratio) {
        (_, "processor", "record_to_run") => {
            "holds the thread that drains the ring into the file, which a primary does not have"
        }
        (_, "processor", _) => "the primary alone; the backup's work is not in it",
        ("kv", _, "record_to_run") => {
            "on two cores the thread that drains the ring competes with client and guest"
        }
        ("kv", ..) => "on two cores the backup replays on the core on which the client would run",
        (_, _, "record_to_run") => {
            "there is no exit between two reports: a lower figure is the machine's other load"
        }
        _ => {
            "a primary waits for a backup that is too far behind: on shared cores the slower of both counts"
        }
    }
}

/// Requests.
fn serve(mode: Mode, network: &Network, round: u64, time: Duration) -> Result<Pace> {
    let guest = Guest::start(mode, "kv", "", Some(network))?;
    network.load(CONNECTIONS, None, round * 2, WARM)?;
    let client = network.client(CONNECTIONS, None, round * 2 + 1)?;
    let stretch = Stretch::begin(&guest)?;
    let before = client.progress().completed;
    std::thread::sleep(time);
    let done = client.progress().completed - before;
    let pace = stretch.pace(&guest, done as usize)?;
    let outcome = client.stop()?;
    ensure!(
        outcome.wrong_replies == 0 && outcome.broken_connections == 0,
        "the guest served wrongly: {}",
        outcome.problems.join("; ")
    );
    guest.end()?;
    Ok(pace)
}

/// Reports, from one to another: no part of one is counted.
fn compute(mode: Mode, time: Duration) -> Result<Pace> {
    let guest = Guest::start(mode, "compute", COMPUTE_WORDS, None)?;
    let reports = || {
        guest
            .console()
            .lines()
            .filter(|line| line.starts_with("compute "))
            .count()
    };
    let next_report = |after: usize, by: Instant| -> Option<usize> {
        while Instant::now() < by {
            let count = reports();
            if count > after {
                return Some(count);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    };
    let Some(from) = next_report(1, Instant::now() + FIRST_REPORT) else {
        anyhow::bail!(
            "compute made no report within {} s: {}",
            FIRST_REPORT.as_secs(),
            guest.console()
        );
    };
    let stretch = Stretch::begin(&guest)?;
    let (mut last, mut pace) = (from, Pace::default());
    while let Some(report) = next_report(last, stretch.begun + time) {
        last = report;
        pace = stretch.pace(&guest, last - from)?;
    }
    ensure!(
        last > from,
        "compute made one report in {} ms",
        time.as_millis()
    );
    ensure!(
        !guest.console().contains("WRONG"),
        "compute computed wrongly: {}",
        guest.console()
    );
    guest.end()?;
    Ok(pace)
}
