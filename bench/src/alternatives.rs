//! Protected guests beside what people use instead: one client, the same values, one machine, one run.
//!
//! Each contender gets a fixed rate, then as much as it can take, and then the process that serves is killed under that load; in the
//! end every acknowledged value is read back. What is compared is a service's way through the loss of the process that serves, as
//! its clients see it.
#![forbid(unsafe_code)]

mod client;
mod grpc;
pub mod resp;
mod rivals;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use hypervisor::demo::client::Latency;
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use self::client::{Client, Pace, Service, Stretch, Verdict};
use self::rivals::{At, Etcd, Redis, Sentinel};
use crate::draw::Panel;
use crate::sheet::{Sheet, Table, median, round};
use crate::world::{self, Guest, Mode, Network};

/// As many as the demo's.
const CONNECTIONS: usize = 8;
/// Requests offered a second: well below what the slowest contender serves on two cores, so that the figure is its path's, not its queue's.
const RATE: f64 = 500.0;
/// Load before the measurement, for caches and tables.
const WARM: Duration = Duration::from_millis(300);
/// How long a service may take to be there.
const UP: Duration = Duration::from_secs(30);
/// Writes after the kill that show that there is service again: more than were on their way.
const AGAIN: u64 = 10 * CONNECTIONS as u64;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Of load at a fixed rate, and again as fast as answers come.
    pub time: Duration,
    /// How long after the kill somebody is awaited who serves.
    pub patience: Duration,
    /// Keys of each connection, all of which are read back.
    pub keys: usize,
    /// Kills of each contender.
    pub rounds: usize,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Guest(Mode),
    Redis,
    Sentinel { replicas: u32 },
    Etcd,
}

#[derive(Clone, Copy, Debug)]
struct Contender {
    key: &'static str,
    name: &'static str,
    /// What an acknowledged write is.
    promise: &'static str,
    /// Whether it is a protected guest of ours, whose losses are our fault.
    ours: bool,
    kind: Kind,
}

const CONTENDERS: [Contender; 7] = [
    Contender {
        key: "guest",
        name: "guest, unprotected",
        promise: "it is in the guest's memory",
        ours: false,
        kind: Kind::Guest(Mode::Run),
    },
    Contender {
        key: "pair_shm",
        name: "guest, protected, log in shared memory",
        promise: "it is in the guest's memory, and the backup has the log of it",
        ours: true,
        kind: Kind::Guest(Mode::Pair),
    },
    Contender {
        key: "pair_tcp",
        name: "guest, protected, log over TCP",
        promise: "it is in the guest's memory, and the backup has the log of it",
        ours: true,
        kind: Kind::Guest(Mode::PairTcp),
    },
    Contender {
        key: "redis_wait",
        name: "redis-server, a replica, WAIT 1",
        promise: "the replica has it; nobody takes over by himself",
        ours: false,
        kind: Kind::Redis,
    },
    Contender {
        key: "sentinel",
        name: "Redis with Sentinel",
        promise: "the master has it",
        ours: false,
        kind: Kind::Sentinel { replicas: 0 },
    },
    Contender {
        key: "sentinel_wait",
        name: "Redis with Sentinel, WAIT 1",
        promise: "the master and one of two replicas have it",
        ours: false,
        kind: Kind::Sentinel { replicas: 1 },
    },
    Contender {
        key: "etcd",
        name: "etcd, three members",
        promise: "two of three members have it in their files",
        ours: false,
        kind: Kind::Etcd,
    },
];

/// A contender that runs.
enum Running {
    Guest(Guest, At),
    Redis(Redis),
    Sentinel(Sentinel, u32),
    Etcd(Etcd),
}

impl Running {
    fn start(kind: Kind, directory: &Path, network: &Network) -> Result<Self> {
        Ok(match kind {
            Kind::Guest(mode) => {
                let at = At {
                    address: network.address().into(),
                    replicas: 0,
                };
                Self::Guest(Guest::start(mode, "kv", "", Some(network))?, at)
            }
            Kind::Redis => Self::Redis(Redis::start(directory, 1)?),
            Kind::Sentinel { replicas } => Self::Sentinel(Sentinel::start(directory)?, replicas),
            Kind::Etcd => Self::Etcd(Etcd::start(directory)?),
        })
    }

    fn service(&self) -> Box<dyn Service> {
        match self {
            Self::Guest(_, at) => Box::new(*at),
            Self::Redis(redis) => Box::new(redis.service(1)),
            Self::Sentinel(sentinel, replicas) => Box::new(sentinel.service(*replicas)),
            Self::Etcd(etcd) => Box::new(etcd.service()),
        }
    }

    /// SIGKILL for the process that serves.
    fn kill(&mut self) -> Result<()> {
        match self {
            Self::Guest(guest, _) => guest.kill_serving(),
            Self::Redis(redis) => redis.master.kill(),
            Self::Sentinel(sentinel, _) => sentinel.redis.master.kill(),
            Self::Etcd(etcd) => etcd.kill_leader()?,
        }
        Ok(())
    }

    /// Where what was acknowledged is to be found after the kill.
    fn heir(&self) -> Result<Box<dyn Service>> {
        Ok(match self {
            Self::Redis(redis) => Box::new(redis.promote()?),
            _ => self.service(),
        })
    }

    /// How long somebody is awaited who serves after the kill: where nobody is to be expected, a part of it shows that.
    fn patience(&self, extent: Extent) -> Duration {
        match self {
            Self::Redis(_) => extent.patience / 4,
            Self::Guest(guest, _) if guest.pair().is_none() => extent.patience / 4,
            _ => extent.patience,
        }
    }

    /// Adds the commits that a primary has told of.
    fn commits(&self, to: &mut Histogram<u64>) {
        let Self::Guest(guest, _) = self else { return };
        let events = guest.pair().map(|pair| pair.primary.events());
        for event in events.into_iter().flatten() {
            if let Event::Commits { buckets } = event {
                for (nanos, count) in buckets {
                    to.saturating_record_n(nanos, count);
                }
            }
        }
    }
}

/// What one round of a contender came to.
struct Round {
    fixed: Latency,
    closed: Latency,
    writes_per_s: f64,
    without_service: Option<Duration>,
    broken: u64,
    refused: u64,
    problems: Vec<String>,
    verdict: Verdict,
}

fn nanos() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

fn contend(
    contender: Contender,
    network: &Network,
    extent: Extent,
    commits: &mut Histogram<u64>,
) -> Result<Round> {
    let directory = world::in_memory()?;
    let mut running = Running::start(contender.kind, directory.path(), network)?;
    let service = running.service();
    let patience = running.patience(extent);
    let mut client = Client::new(&*service, CONNECTIONS, extent.keys, UP)?;
    let fast = Pace { rate: None };
    let wait = |time: Duration| {
        move |_: &client::Watch| {
            std::thread::sleep(time);
            Ok(())
        }
    };
    client.load(fast, wait(WARM))?;
    // The warm-up's are not the measurement's.
    running.commits(&mut nanos()?);
    let (fixed, ()) = client.load(Pace { rate: Some(RATE) }, wait(extent.time))?;
    let (closed, ()) = client.load(fast, wait(extent.time))?;
    running.commits(commits);
    let (killed, at) = client.load(fast, |watch| {
        std::thread::sleep(WARM);
        let at = Instant::now();
        running.kill()?;
        let until = at + patience;
        std::thread::sleep(client::OLD_REPLIES);
        let before = watch.acknowledged();
        while watch.acknowledged() < before + AGAIN && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(at)
    })?;
    // Only a guest that is gone is not read from; all others get the time that many keys take.
    let reading = match contender.kind {
        Kind::Guest(Mode::Run) => patience,
        _ => extent.patience * 3,
    };
    let verdict = client.verify(&*running.heir()?, reading);
    let all = [&fixed, &closed, &killed];
    let sum = |of: fn(&Stretch) -> u64| all.iter().map(|stretch| of(stretch)).sum();
    Ok(Round {
        writes_per_s: closed.writes() as f64 / closed.took.as_secs_f64(),
        without_service: killed.without_service(at),
        broken: sum(|stretch| stretch.broken),
        refused: sum(|stretch| stretch.refused),
        problems: all
            .iter()
            .flat_map(|stretch| stretch.problems.clone())
            .collect(),
        verdict,
        fixed: Latency::of_nanos(&fixed.latency),
        closed: Latency::of_nanos(&closed.latency),
    })
}

/// A contender's figures, over all rounds.
struct Row {
    contender: Contender,
    fixed: [f64; 3],
    closed: [f64; 2],
    writes_per_s: f64,
    /// Half of the kills, and the worst, in milliseconds; nothing if one was not survived.
    without_service_ms: Option<[f64; 2]>,
    broken: u64,
    refused: u64,
    problems: BTreeSet<String>,
    verdict: Verdict,
    commit: Option<Latency>,
}

impl Row {
    fn of(contender: Contender, rounds: &[Round], commits: &Histogram<u64>) -> Self {
        let middle = |of: fn(&Round) -> f64| round(median(rounds.iter().map(of).collect()));
        let without: Option<Vec<f64>> = rounds
            .iter()
            .map(|round| Some(round.without_service?.as_secs_f64() * 1e3))
            .collect();
        Self {
            contender,
            fixed: [
                middle(|round| round.fixed.p50),
                middle(|round| round.fixed.p99),
                middle(|round| round.fixed.p999),
            ],
            closed: [
                middle(|round| round.closed.p50),
                middle(|round| round.closed.p99),
            ],
            writes_per_s: middle(|round| round.writes_per_s),
            without_service_ms: without.map(|all| {
                let worst = all.iter().copied().fold(0.0, f64::max);
                [round(median(all)), round(worst)]
            }),
            broken: rounds.iter().map(|round| round.broken).sum(),
            refused: rounds.iter().map(|round| round.refused).sum(),
            problems: rounds
                .iter()
                .flat_map(|round| round.problems.clone())
                .collect(),
            verdict: Verdict {
                keys: rounds.iter().map(|round| round.verdict.keys).sum(),
                lost: rounds.iter().map(|round| round.verdict.lost).sum(),
            },
            commit: (!commits.is_empty()).then(|| Latency::of_nanos(commits)),
        }
    }

    fn json(&self) -> Value {
        let mut json = json!({
            "name": self.contender.name, "ours": self.contender.ours, "promise": self.contender.promise,
            "fixed": {"rate": RATE, "p50_us": self.fixed[0], "p99_us": self.fixed[1], "p999_us": self.fixed[2]},
            "closed": {"p50_us": self.closed[0], "p99_us": self.closed[1], "writes_per_s": self.writes_per_s},
            "served_again": self.without_service_ms.is_some(),
            "keys_checked": self.verdict.keys, "lost": self.verdict.lost,
            "broken_connections": self.broken, "refused": self.refused, "problems": self.problems,
        });
        if let Some([middle, worst]) = self.without_service_ms {
            json["without_service_ms"] = json!({"p50": middle, "max": worst});
        }
        if let Some(commit) = self.commit {
            json["commit_us"] = json!({"p50": commit.p50, "p99": commit.p99, "max": commit.max});
        }
        json
    }
}

/// What it is, its unit, and where it stands.
type Metric = (&'static str, &'static str, fn(&Row) -> Option<f64>);

/// What is better the smaller it is.
const METRICS: [Metric; 4] = [
    ("request, p50", "µs", |row| Some(row.fixed[0])),
    ("request, p99", "µs", |row| Some(row.fixed[1])),
    (
        "a write, as fast as answers come",
        "µs of the service's time",
        |row| Some(round(1e6 / row.writes_per_s)),
    ),
    ("without service, p50", "ms", |row| {
        Some(row.without_service_ms?[0])
    }),
];

/// Who beats a protected guest of ours at what.
fn losses(rows: &[Row]) -> Table {
    let mut table = Table::new(
        "Where a protected guest loses",
        &["", "at", "by", "against", "factor"],
    );
    for ours in rows.iter().filter(|row| row.contender.ours) {
        for (what, unit, of) in METRICS {
            let Some(own) = of(ours) else { continue };
            for rival in rows.iter().filter(|row| !row.contender.ours) {
                if let Some(other) = of(rival).filter(|other| *other < own) {
                    table.row([
                        ours.contender.name.to_owned(),
                        what.to_owned(),
                        format!("{own:.1} {unit}"),
                        format!("{other:.1} of {}", rival.contender.name),
                        format!("{:.2}", own / other),
                    ]);
                }
            }
        }
    }
    table
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a contender does not come up.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new("alternatives", "Alternatives, side by side");
    let mut rows = Vec::new();
    for contender in CONTENDERS {
        let mut commits = nanos()?;
        let rounds: Vec<Round> = (0..extent.rounds)
            .map(|_| contend(contender, &network, extent, &mut commits))
            .collect::<Result<_>>()
            .with_context(|| contender.name)?;
        rows.push(Row::of(contender, &rounds, &commits));
    }
    let mut table = Table::new(
        "One client, the same values, one machine",
        &[
            "",
            "request p50 (µs)",
            "p99 (µs)",
            "p99.9 (µs)",
            "writes/s",
            "without service, p50 (ms)",
            "worst (ms)",
            "acknowledged values lost",
            "connections broken",
        ],
    );
    for row in &rows {
        let never = || "nobody took over".to_owned();
        let [middle, worst] = match row.without_service_ms {
            Some(both) => both.map(|ms| format!("{ms:.1}")),
            None => [never(), "–".to_owned()],
        };
        table.row([
            row.contender.name.to_owned(),
            format!("{:.0}", row.fixed[0]),
            format!("{:.0}", row.fixed[1]),
            format!("{:.0}", row.fixed[2]),
            format!("{:.0}", row.writes_per_s),
            middle,
            worst,
            format!("{} of {}", row.verdict.lost, row.verdict.keys),
            row.broken.to_string(),
        ]);
    }
    sheet.tables.push(table);
    sheet.tables.push(losses(&rows));
    let mut promises = Table::new("What an acknowledged write is", &["", ""]);
    for row in &rows {
        promises.row([
            row.contender.name.to_owned(),
            row.contender.promise.to_owned(),
        ]);
    }
    sheet.tables.push(promises);
    let mut commits = Table::new(
        "An output's making to its commit, by transport (µs)",
        &["", "p50", "p99", "max"],
    );
    for row in &rows {
        if let Some(commit) = row.commit {
            commits.row([
                row.contender.name.to_owned(),
                format!("{:.1}", commit.p50),
                format!("{:.1}", commit.p99),
                format!("{:.1}", commit.max),
            ]);
        }
    }
    sheet.tables.push(commits);
    let panels: [Metric; 5] = [
        ("Request, p50, at a fixed rate", "µs", |row| {
            Some(row.fixed[0])
        }),
        ("Request, p99, at a fixed rate", "µs", |row| {
            Some(row.fixed[1])
        }),
        ("Writes a second, as fast as answers come", "", |row| {
            Some(row.writes_per_s)
        }),
        (
            "Without service after SIGKILL (those where somebody took over)",
            "ms",
            |row| Some(row.without_service_ms?[0]),
        ),
        ("Acknowledged values lost", "", |row| {
            Some(row.verdict.lost as f64)
        }),
    ];
    for (title, unit, of) in panels {
        let bars = rows
            .iter()
            .filter_map(|row| Some((row.contender.name.to_owned(), of(row)?)))
            .collect();
        sheet.panels.push(Panel::Bars {
            title: title.into(),
            unit: unit.into(),
            bars,
        });
    }
    let contenders: serde_json::Map<String, Value> = rows
        .iter()
        .map(|row| (row.contender.key.to_owned(), row.json()))
        .collect();
    sheet.figure("contenders", contenders);
    sheet.figure("connections", CONNECTIONS);
    sheet.figure("rounds", extent.rounds);
    sheet.figure("network", network.kind);
    sheet.figure(
        "versions",
        json!({"redis": rivals::version("redis-server"), "etcd": rivals::version("etcd")}),
    );
    notes(&mut sheet, extent);
    Ok(sheet)
}

fn notes(sheet: &mut Sheet, extent: Extent) {
    sheet.note(format!(
        "{CONNECTIONS} connections write values of 16 to 512 bytes: {RATE} a second together, latency counted from when a write was due \
         (no coordinated omission); then as fast as answers come; then the process that serves is killed by SIGKILL under that load \
         (etcd's leader). {} kills of each. A write that fails is tried again until it is acknowledged, over a new connection to \
         whoever serves then, as Sentinel names it, or etcd's next member.",
        extent.rounds
    ));
    sheet.note(format!(
        "In the end the last acknowledged value of each key is read back ({} keys a connection): from the survivor, or, of \
         `redis-server` with a replica, from that replica, which somebody has to promote. An unprotected guest's memory is gone with it.",
        extent.keys
    ));
    sheet.note(format!(
        "The rivals are on loopback with their files in memory; guests are behind an emulated network card. Sentinel thinks its master \
         down after {} ms (its own default is 30 s), the rest is as it comes. etcd is spoken to by gRPC, as by its own client. Redis \
         writes no files. All processes and the client share this machine's cores.",
        rivals::DOWN_AFTER_MS
    ));
    sheet.note(
        "They do not do the same: etcd and Redis are services that were written to be replicated and outlive the loss of a whole \
         cluster's minority or of a host under new addresses; a protected guest is any program, unchanged, whose clients keep their connections.",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: bool, p50: f64, without: Option<f64>) -> Row {
        let contender = CONTENDERS[usize::from(ours)];
        let mut row = Row::of(contender, &[], &nanos().unwrap());
        row.fixed = [p50, 100.0, 100.0];
        row.writes_per_s = 1000.0;
        row.without_service_ms = without.map(|ms| [ms, ms]);
        row
    }

    #[test]
    fn it_says_where_we_lose_and_only_there() {
        let table = losses(&[row(true, 200.0, Some(5.0)), row(false, 100.0, None)]);
        assert_eq!(table.rows.len(), 1, "{:?}", table.rows);
        assert_eq!(table.rows[0][1], "request, p50");
        assert_eq!(table.rows[0][4], "2.00");
        let table = losses(&[row(true, 50.0, Some(5.0)), row(false, 100.0, Some(1.0))]);
        assert_eq!(table.rows.len(), 1, "{:?}", table.rows);
        assert_eq!(table.rows[0][1], "without service, p50");
    }

    #[test]
    fn one_kill_that_was_not_survived_is_no_failover_time() {
        let round = |without_service| Round {
            fixed: Latency::default(),
            closed: Latency::default(),
            writes_per_s: 1.0,
            without_service,
            broken: 1,
            refused: 0,
            problems: vec!["broken: pipe".into()],
            verdict: Verdict { keys: 3, lost: 1 },
        };
        let ms = |ms| Some(Duration::from_millis(ms));
        let of = |rounds: &[Round]| Row::of(CONTENDERS[0], rounds, &nanos().unwrap());
        let all = of(&[round(ms(5)), round(ms(9)), round(ms(7))]);
        assert_eq!(all.without_service_ms, Some([7.0, 9.0]));
        assert_eq!((all.broken, all.verdict.lost), (3, 3));
        assert_eq!(of(&[round(ms(5)), round(None)]).without_service_ms, None);
    }
}
