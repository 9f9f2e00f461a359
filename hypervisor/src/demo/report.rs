//! What a demo run found, for a program (JSON) and for a person (a table).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::intervals::Replication;

use super::client::{Latency, Outcome, Requests, Verification};

/// The longest a client may wait around a failover, in milliseconds.
pub const STALL_LIMIT_MS: f64 = 50.0;
/// The longest a failover may take, in milliseconds.
pub const FAILOVER_LIMIT_MS: f64 = 20.0;

/// Where a report says that the hosts were emulated.
const EMULATED: &str = "hosts_emulated";

/// The one object that `doppel demo --json` prints. Times are in the unit their name ends in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What carried the log: `shm`, `tcp`, `rdma`.
    pub transport: String,
    /// How the machine was replicated: `replay`, `checkpoint`.
    #[serde(default)]
    pub replication: String,
    /// What carried the guest's frames: `tap` or `link`.
    pub network: String,
    /// The guest that ran.
    pub guest: String,
    /// When the primary was killed, from the start of the load.
    pub kill_at_ms: f64,
    /// Answered requests, by when.
    pub requests: Requests,
    /// Acknowledged writes that were missing or changed after the failover. Nought, or the demo has failed.
    pub lost_acknowledged_writes: u64,
    /// Connections that did not survive, or had a request unanswered at the end.
    pub broken_connections: u64,
    /// Differences that the backup found while it replayed.
    pub divergences: u64,
    /// Whether the guest's memory was the same on both sides at the last position they have in common;
    /// `null` if it could not be compared.
    pub memory_hash_equal: Option<bool>,
    /// Sync points of the guest up to the end.
    pub sync_points: u64,
    /// The reign at the end; 1 before any failover.
    pub epoch: u64,
    /// From the kill to the first byte served after it; `null` if none was.
    pub failover_ms: Option<f64>,
    /// The longest that a request waited which was answered, or still unanswered, after the kill.
    pub client_stall_ms_max: f64,
    /// From an output's sync point to its commit, while the first primary lived.
    pub commit_us: Latency,
    /// How long the guest stood at the end of each interval, while the first primary lived; nothing under replay.
    #[serde(default)]
    pub stop_us: Latency,
    /// Pages that were written in those intervals together.
    #[serde(default)]
    pub interval_pages: u64,
    /// Bytes of their checkpoints.
    #[serde(default)]
    pub interval_bytes: u64,
    /// From a request to its reply, as the client saw it, in microseconds.
    pub request_us: Latency,
    /// TCP connections of the client.
    pub connections: u64,
    /// Writes that the guest acknowledged.
    pub acknowledged_writes: u64,
    /// Keys that were read back at the end.
    pub keys_verified: u64,
    /// Replies that were not what the acknowledged writes before them make them.
    pub wrong_replies: u64,
    /// Requests that the guest answered with an error.
    pub refused: u64,
    /// Requests that were never answered.
    pub unanswered: u64,
    /// The first problems, in words.
    pub problems: Vec<String>,
    /// Anything else worth telling.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl Report {
    /// Takes over what the client found.
    pub fn take_client(&mut self, connections: usize, outcome: &Outcome, read_back: &Verification) {
        self.connections = connections as u64;
        self.requests = outcome.requests;
        self.request_us = outcome.latency;
        self.acknowledged_writes = outcome.acknowledged_writes;
        self.wrong_replies = outcome.wrong_replies;
        self.refused = outcome.refused;
        self.unanswered = outcome.unanswered;
        self.failover_ms = outcome.failover.map(millis);
        self.client_stall_ms_max = millis(outcome.stall_max);
        if let Some(kill) = outcome.series.kill {
            self.kill_at_ms = millis(kill.since(outcome.series.start));
        }
        self.keys_verified = read_back.keys;
        self.lost_acknowledged_writes = read_back.lost_acknowledged_writes;
        self.broken_connections = read_back.broken_connections;
        self.problems.extend(read_back.problems.iter().cloned());
    }

    /// What was lost or wrong, in words; with any of it the demo exits non-zero.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut fail = |failed: bool, words: String| {
            if failed {
                failures.push(words);
            }
        };
        let count = |count: u64, what: &str| format!("{count} {what}");
        fail(
            self.lost_acknowledged_writes > 0,
            count(self.lost_acknowledged_writes, "acknowledged writes lost"),
        );
        fail(
            self.wrong_replies > 0,
            count(self.wrong_replies, "wrong replies"),
        );
        fail(
            self.broken_connections > 0,
            count(self.broken_connections, "connections broken"),
        );
        fail(
            self.divergences > 0,
            count(self.divergences, "divergences of the backup"),
        );
        fail(
            self.memory_hash_equal == Some(false),
            "the guest's memory differed between the two sides".to_owned(),
        );
        fail(
            self.failover_ms.is_none(),
            "no reply came after the primary was killed".to_owned(),
        );
        fail(
            self.connections > 0 && self.keys_verified == 0,
            "no key could be read back".to_owned(),
        );
        failures
    }

    /// What the kills before the last one took, each followed by a new backup.
    pub fn earlier(&self) -> impl Iterator<Item = &serde_json::Value> {
        self.extra
            .get("earlier")
            .and_then(serde_json::Value::as_array)
            .into_iter()
            .flatten()
    }

    /// Whether the hosts were emulated: then times are the emulator's, and nothing is said of them.
    pub fn is_emulated(&self) -> bool {
        self.extra.get(EMULATED) == Some(&true.into())
    }

    /// Says that the hosts were emulated.
    pub fn set_emulated(&mut self) {
        self.extra.insert(EMULATED.to_owned(), true.into());
    }

    /// What held, but slower than it should; it does not make the demo fail.
    pub fn shortfalls(&self) -> Vec<String> {
        let mut shortfalls = Vec::new();
        if self.is_emulated() {
            return shortfalls;
        }
        if let Some(failover) = self.failover_ms
            && failover > FAILOVER_LIMIT_MS
        {
            shortfalls.push(format!(
                "the failover took {failover:.1} ms; {FAILOVER_LIMIT_MS} ms were allowed"
            ));
        }
        if self.client_stall_ms_max > STALL_LIMIT_MS {
            shortfalls.push(format!(
                "a client waited {:.1} ms; {STALL_LIMIT_MS} ms were allowed",
                self.client_stall_ms_max
            ));
        }
        shortfalls
    }

    /// The object as one line of JSON.
    ///
    /// # Errors
    /// Only if `extra` holds a name of a field.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// The table for a person; `colour` on a terminal only.
    pub fn table(&self, colour: bool) -> Table<'_> {
        Table {
            report: self,
            paint: Paint(colour),
        }
    }
}

/// Milliseconds with their fraction.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A report, laid out for a person.
#[derive(Debug)]
pub struct Table<'a> {
    report: &'a Report,
    paint: Paint,
}

#[derive(Clone, Copy, Debug)]
struct Paint(bool);

impl Paint {
    fn colour(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn good(self, text: &str) -> String {
        self.colour("32", text)
    }

    fn bad(self, text: &str) -> String {
        self.colour("1;31", text)
    }

    fn slow(self, text: &str) -> String {
        self.colour("33", text)
    }

    fn title(self, text: &str) -> String {
        self.colour("1", text)
    }

    fn none_is_good(self, count: u64) -> String {
        let text = thousands(count);
        if count == 0 {
            self.good(&text)
        } else {
            self.bad(&text)
        }
    }

    fn limited(self, value: f64, limit: f64) -> String {
        let text = format!("{value:.1} ms");
        if value > limit {
            self.slow(&text)
        } else {
            self.good(&text)
        }
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { report, paint } = *self;
        let title = |f: &mut fmt::Formatter<'_>, text| writeln!(f, "{}", paint.title(text));

        title(f, "What the clients saw")?;
        let requests = &report.requests;
        row(f, "requests before the kill", &thousands(requests.before))?;
        row(
            f,
            "waiting during the failover",
            &thousands(requests.during),
        )?;
        row(f, "sent after it", &thousands(requests.after))?;
        let limit = |limit| match report.is_emulated() {
            true => f64::INFINITY,
            false => limit,
        };
        let failover = report.failover_ms.map_or_else(
            || paint.bad("no service after the kill"),
            |failover| paint.limited(failover, limit(FAILOVER_LIMIT_MS)),
        );
        row(f, "kill to first byte served", &failover)?;
        let stall = paint.limited(report.client_stall_ms_max, limit(STALL_LIMIT_MS));
        row(f, "longest wait of a request", &stall)?;
        row(f, "request to reply", &latency(&report.request_us))?;

        title(f, "What was promised and kept")?;
        let written = thousands(report.acknowledged_writes);
        row(f, "acknowledged writes", &written)?;
        let lost = paint.none_is_good(report.lost_acknowledged_writes);
        row(f, "of these lost", &lost)?;
        row(
            f,
            "keys read back at the end",
            &thousands(report.keys_verified),
        )?;
        row(
            f,
            "wrong replies",
            &paint.none_is_good(report.wrong_replies),
        )?;
        let broken = paint.none_is_good(report.broken_connections);
        let broken = format!("{broken} of {}", report.connections);
        row(f, "TCP connections broken", &broken)?;

        title(f, "The pair")?;
        let carried = format!(
            "{} for the log, {} for frames",
            report.transport, report.network
        );
        row(f, "carried by", &carried)?;
        row(f, "sync points", &thousands(report.sync_points))?;
        row(f, "output to commit", &latency(&report.commit_us))?;
        if report.replication == Replication::Checkpoint.name() {
            row(f, "stop at an interval's end", &latency(&report.stop_us))?;
            let intervals = report.stop_us.count.max(1);
            let written = format!(
                "{} pages, {} KiB on average",
                thousands(report.interval_pages / intervals),
                thousands((report.interval_bytes / intervals) >> 10),
            );
            row(f, "written in an interval", &written)?;
            row(f, "epoch", &report.epoch.to_string())?;
            return self.rounds_and_verdict(f);
        }
        row(f, "divergences", &paint.none_is_good(report.divergences))?;
        let memory = match report.memory_hash_equal {
            Some(true) => paint.good("equal on both sides"),
            Some(false) => paint.bad("different on the two sides"),
            None => paint.slow("not compared"),
        };
        row(f, "guest memory", &memory)?;
        row(f, "epoch", &report.epoch.to_string())?;
        self.rounds_and_verdict(f)
    }
}

impl Table<'_> {
    fn rounds_and_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { report, paint } = *self;
        for (number, round) in report.earlier().enumerate() {
            let figure = |name: &str| round[name].as_f64().unwrap_or_default();
            let text = format!(
                "live after {:.1} ms; a new backup joined in {:.1} ms, {:.1} MiB, the guest stood {:.2} ms",
                figure("failover_ms"),
                figure("joined_ms"),
                figure("bytes") / f64::from(1 << 20),
                figure("stopped_ms"),
            );
            let name = format!("kill {}", number + 1);
            writeln!(f, "  {name:<29}{text}")?;
        }

        if report.is_emulated() {
            let text = "emulated in software: times say nothing of real ones";
            row(f, "hosts", text)?;
        }

        for failure in report.failures() {
            writeln!(f, "{} {failure}", paint.bad("FAILED"))?;
        }
        for shortfall in report.shortfalls() {
            writeln!(f, "{} {shortfall}", paint.slow("SLOW"))?;
        }
        for problem in &report.problems {
            writeln!(f, "  {problem}")?;
        }
        if report.failures().is_empty() {
            writeln!(f, "{}", paint.good("Nothing was lost."))?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<29}{value}")
}

fn latency(latency: &Latency) -> String {
    if latency.count == 0 {
        return "none measured".to_owned();
    }
    let mut text = String::new();
    for (name, value) in [
        ("p50", latency.p50),
        ("p99", latency.p99),
        ("p99.9", latency.p999),
        ("max", latency.max),
    ] {
        // Writing to a String cannot fail.
        let _ = write!(text, "{name} {}  ", time(value));
    }
    let _ = write!(text, "({} measured)", thousands(latency.count));
    text
}

/// Microseconds in the unit that suits.
fn time(micros: f64) -> String {
    match micros {
        micros if micros < 9_999.5 => format!("{micros:.0} µs"),
        micros if micros < 999_950.0 => format!("{:.1} ms", micros / 1e3),
        micros => format!("{:.1} s", micros / 1e6),
    }
}

fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        Report {
            transport: "shm".to_owned(),
            network: "tap".to_owned(),
            guest: "kv".to_owned(),
            kill_at_ms: 4210.5,
            requests: Requests {
                before: 123_456,
                during: 8,
                after: 7_001,
            },
            memory_hash_equal: Some(true),
            sync_points: 1_000_000,
            epoch: 2,
            failover_ms: Some(7.25),
            client_stall_ms_max: 8.5,
            commit_us: Latency {
                count: 999,
                p50: 3.2,
                p99: 40.0,
                p999: 400.0,
                max: 12_345.0,
            },
            connections: 8,
            acknowledged_writes: 60_000,
            keys_verified: 192,
            ..Report::default()
        }
    }

    #[test]
    fn the_json_has_the_promised_fields() {
        let mut report = good();
        report.extra.insert("seed".to_owned(), 7.into());
        let text = report.to_json().unwrap();
        assert!(!text.contains('\n'));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        for path in [
            "/transport",
            "/kill_at_ms",
            "/requests/before",
            "/requests/during",
            "/requests/after",
            "/lost_acknowledged_writes",
            "/broken_connections",
            "/divergences",
            "/memory_hash_equal",
            "/sync_points",
            "/epoch",
            "/failover_ms",
            "/client_stall_ms_max",
            "/commit_us/count",
            "/commit_us/p50",
            "/commit_us/p99",
            "/commit_us/p999",
            "/commit_us/max",
            "/seed",
        ] {
            assert!(json.pointer(path).is_some(), "{path} is missing in {text}");
        }
        let back: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(back, report);
    }

    #[test]
    fn every_loss_is_a_failure_and_slowness_is_not() {
        assert_eq!(good().failures(), Vec::<String>::new());
        let spoil: [fn(&mut Report); 7] = [
            |report| report.lost_acknowledged_writes = 1,
            |report| report.wrong_replies = 1,
            |report| report.broken_connections = 1,
            |report| report.divergences = 1,
            |report| report.memory_hash_equal = Some(false),
            |report| report.failover_ms = None,
            |report| report.keys_verified = 0,
        ];
        for spoil in spoil {
            let mut report = good();
            spoil(&mut report);
            assert_eq!(report.failures().len(), 1, "{report:?}");
            let table = report.table(false).to_string();
            assert!(table.contains("FAILED") && !table.contains("Nothing was lost"));
        }
        let mut slow = good();
        slow.failover_ms = Some(20.1);
        slow.client_stall_ms_max = 50.1;
        assert_eq!(slow.shortfalls().len(), 2);
        assert!(slow.failures().is_empty());
        slow.set_emulated();
        assert!(slow.shortfalls().is_empty());
        assert!(slow.table(false).to_string().contains("emulated"));
    }

    #[test]
    fn the_table_is_coloured_on_request_only() {
        let report = good();
        let plain = report.table(false).to_string();
        assert!(!plain.contains('\x1b'), "{plain}");
        assert!(
            plain.contains("123,456") && plain.contains("7.2 ms"),
            "{plain}"
        );
        assert!(plain.contains("max 12.3 ms"), "{plain}");
        assert!(report.table(true).to_string().contains("\x1b[32m"));
        eprintln!("{plain}");
    }
}
