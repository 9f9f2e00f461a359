//! A role's figures as Prometheus reads them (text exposition format 0.0.4), over just enough HTTP.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::status::{Role, Standing, Status};
use super::view::CHANGES;
use crate::meter::Latencies;

/// What is answered to a request.
pub(super) fn respond(request: &[u8], metrics: impl FnOnce() -> String) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or(b"");
    let mut words = line.split(|&byte| byte == b' ');
    let (method, target) = (words.next().unwrap_or(b""), words.next().unwrap_or(b""));
    let is_http = words
        .next()
        .is_some_and(|word| word.starts_with(b"HTTP/1."));
    let path = target.split(|&byte| byte == b'?').next().unwrap_or(b"");
    let (status, body) = match (is_http, method, path) {
        (false, ..) => (
            "400 Bad Request",
            "this is no HTTP/1 request, or one that is too long\n".to_owned(),
        ),
        (_, b"GET", b"/metrics") => ("200 OK", metrics()),
        (_, b"GET", _) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "ask by GET\n".to_owned()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The histogram's bounds are powers of two of nanoseconds, because its buckets end there exactly: 256 ns to 8.6 s.
const POWERS: std::ops::RangeInclusive<u32> = 8..=33;

struct Page<'a> {
    text: String,
    name: &'a str,
}

impl Page<'_> {
    fn head(&mut self, metric: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {metric} {help}\n# TYPE {metric} {kind}");
    }

    fn value(&mut self, metric: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.text, "{metric}{{name=\"{}\"", self.name);
        for (label, word) in labels {
            let word = word
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.text, ",{label}=\"{word}\"");
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    fn one(&mut self, metric: &str, kind: &str, help: &str, value: f64) {
        self.head(metric, kind, help);
        self.value(metric, &[], value);
    }
}

/// All metrics; `docs/metrics.md` lists them.
pub(super) fn page(status: &Status, commits: &Latencies, stops: &Latencies) -> String {
    let mut page = Page {
        text: String::with_capacity(8192),
        name: &status.name,
    };
    page.head("doppel_info", "gauge", "This process; always 1.");
    let pid = status.pid.to_string();
    let about = [
        ("role", status.role.word()),
        ("version", status.program.as_str()),
        ("pid", pid.as_str()),
        ("transport", status.transport.as_deref().unwrap_or("none")),
    ];
    page.value("doppel_info", &about, 1.0);
    let help = "1 if the machine survives the loss of either side, else 0.";
    page.one(
        "doppel_protected",
        "gauge",
        help,
        f64::from(u8::from(status.protected)),
    );
    page.head(
        "doppel_standing",
        "gauge",
        "1 for how this role stands, 0 for how it does not.",
    );
    for standing in Standing::ALL {
        let is = f64::from(u8::from(standing == status.standing));
        page.value("doppel_standing", &[("standing", standing.word())], is);
    }
    let alone = status.standing.is_unprotected() && status.role != Role::Solo;
    let unprotected = if alone {
        status.standing_ms as f64 / 1e3
    } else {
        0.0
    };
    let gauges = [
        (
            "doppel_unprotected_seconds",
            "How long the machine has stood unprotected; 0 when it is not.",
            unprotected,
        ),
        ("doppel_epoch", "The reign.", status.epoch as f64),
        (
            "doppel_configuration",
            "Changes of the entitled backup.",
            status.configuration as f64,
        ),
        (
            "doppel_uptime_seconds",
            "Since this process started.",
            status.uptime_ms as f64 / 1e3,
        ),
    ];
    for (metric, help, value) in gauges {
        page.one(metric, "gauge", help, value);
    }
    let totals = &status.totals;
    let counters = [
        (
            "doppel_exits_total",
            "Sync points of the guest since it started.",
            totals.exits,
        ),
        (
            "doppel_log_entries_total",
            "Entries posted to the log, or received by a backup.",
            totals.entries,
        ),
        (
            "doppel_log_bytes_total",
            "Bytes of their payloads.",
            totals.entry_bytes,
        ),
        ("doppel_outputs_total", "Outputs let out.", totals.outputs),
        (
            "doppel_output_bytes_total",
            "Bytes of them.",
            totals.output_bytes,
        ),
        (
            "doppel_frames_total",
            "Frames read for the guest.",
            totals.frames,
        ),
        (
            "doppel_frame_bytes_total",
            "Bytes of them.",
            totals.frame_bytes,
        ),
        (
            "doppel_interval_pages_total",
            "Pages that were written before the ends of intervals and before preemptions.",
            status.stopped_for[0] as f64,
        ),
        (
            "doppel_interval_bytes_total",
            "Bytes of their checkpoints.",
            status.stopped_for[1] as f64,
        ),
        (
            "doppel_arbiter_questions_total",
            "Questions to the arbiter.",
            status.arbiter.questions[0] as f64,
        ),
        (
            "doppel_arbiter_failures_total",
            "Questions that it did not answer.",
            status.arbiter.questions[1] as f64,
        ),
        (
            "doppel_hook_runs_total",
            "Times that the hook was run.",
            status.hook.runs as f64,
        ),
        (
            "doppel_hook_failures_total",
            "Times that it failed.",
            status.hook.failures as f64,
        ),
    ];
    for (metric, help, value) in counters {
        page.one(metric, "counter", help, value);
    }
    page.head(
        "doppel_role_changes_total",
        "counter",
        "Changes of role, by event.",
    );
    // Those that have not happened, too: a counter that is born with 1 has never grown, for Prometheus.
    for event in CHANGES {
        let count = status.changes.get(event).copied().unwrap_or(0);
        page.value(
            "doppel_role_changes_total",
            &[("event", event)],
            count as f64,
        );
    }
    if let Some(lag) = status.lag_us {
        let help = "Age of the first entry that the backup had not replayed at its last heartbeat.";
        page.one("doppel_lag_seconds", "gauge", help, lag / 1e6);
    }
    if let Some(lag) = status.lag_max_us {
        let help = "The longest lag of the last ten seconds.";
        page.one("doppel_lag_recent_max_seconds", "gauge", help, lag / 1e6);
    }
    if let Some(answered) = status.arbiter.answered {
        let help = "1 if the arbiter answered the last question, else 0.";
        page.one(
            "doppel_arbiter_reachable",
            "gauge",
            help,
            f64::from(u8::from(answered)),
        );
    }
    histogram(
        &mut page,
        "doppel_commit_latency_seconds",
        "From an output's making to its commit.",
        commits,
    );
    histogram(
        &mut page,
        "doppel_interval_stop_seconds",
        "How long the guest stood at the end of an interval, or preempted by a checkpoint.",
        stops,
    );
    page.text
}

fn histogram(page: &mut Page<'_>, metric: &str, help: &str, times: &Latencies) {
    page.head(metric, "histogram", help);
    let bucket = format!("{metric}_bucket");
    for power in POWERS {
        // Latencies are whole nanoseconds: less than the power of two is at most one less than it.
        let bound = (((1_u64 << power) - 1) as f64 / 1e9).to_string();
        let below = times.below_power(power) as f64;
        page.value(&bucket, &[("le", bound.as_str())], below);
    }
    let count = times.count() as f64;
    page.value(&bucket, &[("le", "+Inf")], count);
    page.value(&format!("{metric}_sum"), &[], times.sum() as f64 / 1e9);
    page.value(&format!("{metric}_count"), &[], count);
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Instant;

    use super::super::view::tests::at_work;
    use super::*;

    fn served() -> String {
        let mut view = at_work();
        view.second();
        view.hook_ran(false);
        view.take(super::super::board::Update::Arbiter(None), Instant::now());
        page(
            &view.status(Instant::now()),
            &view.latencies(),
            &view.stops(),
        )
    }

    /// Reads the format as its specification has it: families by name with their type, and every sample by its name and labels.
    fn parse(text: &str) -> (BTreeMap<String, String>, BTreeMap<String, f64>) {
        let (mut families, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let mut helped = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.is_empty());
                assert!(helped.insert(name.to_owned()), "{name} is told twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
                assert!(helped.contains(name), "{name} has no help");
                families.insert(name.to_owned(), kind.to_owned());
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap();
                let labels = labels.strip_suffix('}').unwrap();
                for label in labels.split(',') {
                    let (key, word) = label.split_once('=').unwrap();
                    assert!(key.bytes().all(|byte| byte.is_ascii_lowercase()), "{line}");
                    assert!(word.starts_with('"') && word.ends_with('"'), "{line}");
                }
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|end| {
                        name.strip_suffix(end)
                            .filter(|name| families.contains_key(*name))
                    })
                    .unwrap_or(name);
                assert!(families.contains_key(family), "{line} belongs to no family");
                let value: f64 = value.parse().unwrap();
                assert!(
                    samples.insert(series.to_owned(), value).is_none(),
                    "{series} twice"
                );
            }
        }
        (families, samples)
    }

    #[test]
    fn what_is_served_can_be_parsed_and_is_what_was_measured() {
        let (families, samples) = parse(&served());
        let of = |series: &str| samples[&series.replace("{", "{name=\"kv\",").replace(",}", "}")];
        assert_eq!(of("doppel_protected{}"), 1.0);
        assert_eq!(of("doppel_standing{standing=\"protected\"}"), 1.0);
        assert_eq!(of("doppel_standing{standing=\"unprotected\"}"), 0.0);
        assert_eq!(of("doppel_exits_total{}"), 1000.0);
        assert_eq!(of("doppel_role_changes_total{event=\"protected\"}"), 1.0);
        assert_eq!(of("doppel_role_changes_total{event=\"live\"}"), 0.0);
        assert_eq!(of("doppel_arbiter_reachable{}"), 1.0);
        assert_eq!(of("doppel_hook_failures_total{}"), 1.0);
        assert_eq!(of("doppel_commit_latency_seconds_count{}"), 4.0);
        assert_eq!(
            of("doppel_commit_latency_seconds_bucket{le=\"0.000001023\"}"),
            2.0
        );
        assert_eq!(of("doppel_commit_latency_seconds_bucket{le=\"+Inf\"}"), 4.0);
        assert!((of("doppel_commit_latency_seconds_sum{}") - 53e-6).abs() < 1e-9);
        assert_eq!(families["doppel_commit_latency_seconds"], "histogram");
        let buckets: Vec<f64> = served()
            .lines()
            .filter(|line| line.contains("doppel_commit_latency_seconds_bucket"))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert!(buckets.is_sorted(), "{buckets:?}");
    }

    /// The page of the documentation has a row for each: `| name | type | unit | meaning |`.
    #[test]
    fn every_metric_is_documented_with_its_type() {
        let (families, _) = parse(&served());
        let documented: BTreeMap<String, String> = include_str!("../../../docs/metrics.md")
            .lines()
            .filter_map(|line| {
                let mut cells = line.split('|').map(str::trim).skip(1);
                let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
                let name = name.split('{').next()?;
                name.starts_with("doppel_")
                    .then_some((name.to_owned(), cells.next()?.to_owned()))
            })
            .collect();
        assert_eq!(families, documented);
    }

    #[test]
    fn only_a_get_of_the_metrics_is_answered_with_them() {
        let answer = |request: &str| {
            let bytes = respond(request.as_bytes(), || "the metrics\n".to_owned());
            String::from_utf8(bytes).unwrap()
        };
        let good = answer("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n"), "{good}");
        assert!(good.contains("Content-Length: 12\r\n") && good.ends_with("\r\n\r\nthe metrics\n"));
        assert!(answer("GET /metrics?x=1 HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 "));
        assert!(answer("GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(answer("POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        for bad in [
            "",
            "GET",
            "GET /metrics",
            "\u{0}\u{1}\u{2}",
            "GET /metrics SPDY/9\r\n\r\n",
        ] {
            let said = answer(bad);
            assert!(said.starts_with("HTTP/1.1 400 "), "{bad:?}: {said}");
        }
    }
}
