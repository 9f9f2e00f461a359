//! `doppel status`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use hypervisor::arbiter::{self, Place};
use hypervisor::control::find::{self, Found};
use hypervisor::control::status::{Role, Status};
use hypervisor::control::{ControlError, default_run_dir};
use hypervisor::entry::Control;
use hypervisor::orders::Pace;
use serde_json::{Value, json};

use super::Failure;
use super::figures::{bytes, count, micros, span, time_of_day};

/// Which roles.
#[derive(Debug, Args)]
pub struct FindArgs {
    /// The machine; without it, every machine of this host that this user may see
    name: Option<String>,
    /// Directory of the roles' control sockets [default: $XDG_RUNTIME_DIR/doppel, or /run/doppel]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl FindArgs {
    /// The directory that is looked into.
    fn directory(&self) -> PathBuf {
        self.run_dir.clone().unwrap_or_else(default_run_dir)
    }

    /// All that are found now.
    pub fn find(&self) -> Result<Vec<Found>, Failure> {
        find::roles(&self.directory(), self.name.as_deref()).map_err(|error| {
            let code = match error {
                ControlError::Name { .. } => Failure::USAGE,
                _ => Failure::ERROR,
            };
            Failure::new(code, error)
        })
    }

    /// What is said where there are none.
    pub fn nobody(&self) -> Failure {
        let what = match &self.name {
            Some(name) => format!("no process of machine {name:?} runs on this host"),
            None => "no machine runs on this host".to_owned(),
        };
        Failure::new(
            Failure::ERROR,
            format!(
                "{what}, or none that leaves its socket in {} (--run-dir names another place)",
                self.directory().display()
            ),
        )
    }
}

/// Say how the machines of this host are: roles, protection, epoch, lag, commit latency, events
#[derive(Debug, Args)]
#[command(
    after_help = "Ends 0 if a machine was found, 1 if not. With several machines and no name: one line for each role.\n\
                  Examples:\n  doppel status\n  doppel status kv --json | jq '.[].protected'"
)]
pub struct StatusArgs {
    #[command(flatten)]
    which: FindArgs,
    /// Print one JSON array, with an object for each role
    #[arg(long)]
    json: bool,
    /// Do not ask the arbiter; only say what the roles know of it
    #[arg(long)]
    no_arbiter: bool,
}

/// What an arbiter says now, to this command.
#[derive(Clone, Debug)]
struct Asked(Result<String, String>);

type Arbiters = BTreeMap<(String, String), Asked>;

pub fn status(args: &StatusArgs) -> Result<(), Failure> {
    let found = args.which.find()?;
    if found.is_empty() {
        return Err(args.which.nobody());
    }
    let names = {
        let mut names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        names.dedup();
        names.len()
    };
    let details = args.json || names == 1;
    let arbiters = match args.no_arbiter || !details {
        true => Arbiters::new(),
        false => ask_arbiters(&found),
    };
    if args.json {
        let all: Vec<Value> = found
            .iter()
            .map(|found| to_json(found, &arbiters))
            .collect();
        println!("{}", Value::Array(all));
        return Ok(());
    }
    let paint = Paint(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    print!(
        "{}",
        match details {
            true => details_of(&found, &arbiters, paint),
            false => list(&found, paint),
        }
    );
    Ok(())
}

/// Asked here and not by the roles: they would have to wait for it, and must not.
fn ask_arbiters(found: &[Found]) -> Arbiters {
    let mut arbiters = Arbiters::new();
    for status in found.iter().filter_map(|found| found.outcome.as_ref().ok()) {
        if let Some(place) = &status.arbiter.place {
            arbiters
                .entry((place.clone(), status.name.clone()))
                .or_insert_with(|| Asked(ask(place, &status.name)));
        }
    }
    arbiters
}

fn ask(place: &str, name: &str) -> Result<String, String> {
    let place: Place = place.parse().map_err(|error| format!("{error}"))?;
    let arbiter = arbiter::open(&place, name).map_err(|error| error.to_string())?;
    match arbiter.read() {
        Ok(Some(record)) => Ok(record.to_string()),
        Ok(None) => Ok("no record".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn asked<'a>(status: &Status, arbiters: &'a Arbiters) -> Option<&'a Asked> {
    let place = status.arbiter.place.clone()?;
    arbiters.get(&(place, status.name.clone()))
}

fn to_json(found: &Found, arbiters: &Arbiters) -> Value {
    match &found.outcome {
        Ok(status) => {
            let mut value = serde_json::to_value(status).expect("plain fields always encode");
            if let Some(Asked(answer)) = asked(status, arbiters) {
                value["arbiter"]["now"] = match answer {
                    Ok(record) => json!({"answers": true, "record": record}),
                    Err(error) => json!({"answers": false, "error": error}),
                };
            }
            value
        }
        Err(why) => json!({"name": found.name, "pid": found.pid, "error": why}),
    }
}

/// Colours, or none.
#[derive(Clone, Copy)]
pub struct Paint(pub bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        match self.0 {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    pub fn alarm(self, text: &str) -> String {
        self.with("1;97;41", text)
    }

    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub fn faint(self, text: &str) -> String {
        self.with("2", text)
    }
}

/// Whether a machine is protected, by what its roles say; none if no role says anything. Whoever serves it knows best.
pub fn is_protected<'a>(of: impl Iterator<Item = &'a Found> + Clone) -> Option<bool> {
    let said = of.filter_map(|found| found.outcome.as_ref().ok());
    let serves = |status: &&Status| status.role != Role::Backup;
    let by_server = said.clone().filter(serves).map(|status| status.protected);
    by_server
        .reduce(|one, other| one && other)
        .or_else(|| said.map(|status| status.protected).next())
}

/// The word for it.
pub fn protection(protected: Option<bool>) -> &'static str {
    match protected {
        Some(true) => "PROTECTED",
        Some(false) => "UNPROTECTED",
        None => "SILENT",
    }
}

fn headline(protected: Option<bool>, paint: Paint) -> String {
    let word = protection(protected);
    match protected {
        Some(true) => paint.good(word),
        _ => paint.alarm(&format!(" {word} ")),
    }
}

fn details_of(found: &[Found], arbiters: &Arbiters, paint: Paint) -> String {
    let name = found.first().map_or("", |found| found.name.as_str());
    let epoch = found
        .iter()
        .filter_map(|found| found.outcome.as_ref().ok())
        .map(|status| status.epoch)
        .max();
    let mut text = format!(
        "{}  {}",
        paint.bold(name),
        headline(is_protected(found.iter()), paint)
    );
    if let Some(epoch) = epoch {
        text.push_str(&format!("  epoch {epoch}"));
    }
    text.push('\n');
    for found in found {
        text.push('\n');
        match &found.outcome {
            Ok(status) => text.push_str(&role(status, asked(status, arbiters), paint)),
            Err(why) => text.push_str(&format!(
                "{}  process {}\n",
                paint.alarm(&format!(" {why} ")),
                found.pid
            )),
        }
    }
    text
}

fn role(status: &Status, asked: Option<&Asked>, paint: Paint) -> String {
    let standing = status.standing.word().replace('_', " ");
    let standing = if status.protected {
        paint.good(&standing)
    } else if status.standing.is_unprotected() {
        paint.alarm(&format!(" {} ", standing.to_uppercase()))
    } else {
        paint.bold(&standing)
    };
    let mut text = format!(
        "{}  {standing} for {}, process {}, up {}\n",
        paint.bold(status.role.word()),
        span(status.standing_ms),
        status.pid,
        span(status.uptime_ms)
    );
    let mut row = |name: &str, value: String| {
        text.push_str(&format!(
            "  {} {value}\n",
            paint.faint(&format!("{name:10}"))
        ));
    };
    let (totals, rates) = (&status.totals, &status.rates);
    row(
        "position",
        format!(
            "{} exits, {}/s",
            count(status.position as f64),
            count(rates.exits)
        ),
    );
    match status.share {
        0 => row("share", paint.alarm(" PAUSED ")),
        Control::WHOLE => {}
        share => row(
            "share",
            format!("{} % of its time", Pace::of(share).percent()),
        ),
    }
    if let Some(transport) = &status.transport
        && !status.standing.is_unprotected()
    {
        row(
            "log",
            format!(
                "{} entries, {}/s, {}/s over {transport}",
                count(totals.entries),
                count(rates.entries),
                bytes(rates.entry_bytes)
            ),
        );
    }
    if let (Some(lag), Some(longest)) = (status.lag_us, status.lag_max_us) {
        row(
            "lag",
            format!("{}, at most {} in 10 s", micros(lag), micros(longest)),
        );
    }
    if status.role != Role::Backup {
        row(
            "outputs",
            format!(
                "{}, {}/s, {}/s",
                count(totals.outputs),
                count(rates.outputs),
                bytes(rates.output_bytes)
            ),
        );
        let latencies = [
            ("commit", &status.commit),
            ("  in 10 s", &status.commit_recent),
        ];
        // Without a log outputs leave at once: what was measured then says nothing.
        for (name, latency) in latencies.into_iter().filter(|_| status.protected) {
            let figures = match latency.count {
                0 => "none".to_owned(),
                number => format!(
                    "p50 {}  p99 {}  max {}  ({})",
                    micros(latency.p50_us),
                    micros(latency.p99_us),
                    micros(latency.max_us),
                    count(number as f64)
                ),
            };
            row(name, figures);
        }
        let stop = &status.stop;
        if let Some(pages) = status.stopped_for[0].checked_div(stop.count) {
            row(
                "stops",
                format!(
                    "p50 {}  p99 {}  max {}  ({}, of {pages} pages on average)",
                    micros(stop.p50_us),
                    micros(stop.p99_us),
                    micros(stop.max_us),
                    count(stop.count as f64)
                ),
            );
        }
    }
    if let Some(peer) = &status.peer {
        let address = peer.address.as_deref().unwrap_or("an unknown address");
        row(
            "peer",
            format!(
                "{address}, at position {}  {}",
                count(peer.position as f64),
                paint.faint(&peer.identity)
            ),
        );
    }
    if let Some(place) = &status.arbiter.place {
        let said = match (asked, status.arbiter.answered) {
            (Some(Asked(Ok(record))), _) => format!("{}: {record}", paint.good("answers")),
            (Some(Asked(Err(error))), _) => {
                format!("{} {error}", paint.alarm(" OUT OF REACH "))
            }
            (None, Some(true)) => format!(
                "answered {} ago",
                span(status.arbiter.asked_ms_ago.unwrap_or(0))
            ),
            (None, Some(false)) => format!(
                "{} {}",
                paint.alarm(" GAVE NO ANSWER "),
                status.arbiter.error.as_deref().unwrap_or("")
            ),
            (None, None) => "not asked by this role yet".to_owned(),
        };
        row("arbiter", format!("{place} {said}"));
    }
    if let Some(metrics) = &status.metrics {
        row("metrics", format!("http://{metrics}/metrics"));
    }
    if status.hook.configured {
        let failed = match status.hook.failures {
            0 => String::new(),
            failures => format!(", {}", paint.alarm(&format!(" {failures} FAILED "))),
        };
        row("hook", format!("run {} times{failed}", status.hook.runs));
    }
    for (number, event) in status.events.iter().rev().take(EVENTS).rev().enumerate() {
        let line = if event.loud {
            paint.bold(&event.text)
        } else {
            event.text.clone()
        };
        let when = format!(
            "{} epoch {} position {}",
            time_of_day(event.unix_ms),
            event.epoch,
            event.position
        );
        row(
            if number == 0 { "events" } else { "" },
            format!("{}  {line}", paint.faint(&when)),
        );
    }
    text
}

/// Events of a role that are shown.
const EVENTS: usize = 6;

/// One line for each role.
fn list(found: &[Found], paint: Paint) -> String {
    let head = [
        "MACHINE", "ROLE", "STANDING", "EPOCH", "POSITION", "LAG", "PROCESS",
    ];
    let rows: Vec<[String; 7]> = found.iter().map(line).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|at| {
            let cells = rows.iter().map(|row| row[at].chars().count());
            cells.max().unwrap_or(0).max(head[at].len())
        })
        .collect();
    let put = |cells: &[String]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut text = paint.faint(&put(&head.map(str::to_owned)));
    text.push('\n');
    for (row, found) in rows.iter().zip(found) {
        let line = put(row);
        let alarm = match &found.outcome {
            Ok(status) => status.standing.is_unprotected(),
            Err(_) => true,
        };
        text.push_str(&if alarm { paint.alarm(&line) } else { line });
        text.push('\n');
    }
    text.push_str(&format!(
        "\n{}\n",
        paint.faint("doppel status NAME says more of one")
    ));
    text
}

fn line(found: &Found) -> [String; 7] {
    let name = found.name.clone();
    let pid = found.pid.to_string();
    let none = || "-".to_owned();
    match &found.outcome {
        Ok(status) => {
            let standing = status.standing.word().replace('_', " ");
            [
                name,
                status.role.word().to_owned(),
                match status.standing.is_unprotected() {
                    true => standing.to_uppercase(),
                    false => standing,
                },
                status.epoch.to_string(),
                count(status.position as f64),
                status.lag_us.map_or_else(none, micros),
                pid,
            ]
        }
        Err(_) => [
            name,
            none(),
            "SILENT".to_owned(),
            none(),
            none(),
            none(),
            pid,
        ],
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use hypervisor::control::status::{Arbiter, Happened, Latency, Standing, Totals};

    /// A role that was found.
    pub fn found(name: &str, role: Role, standing: Standing) -> Found {
        let figures = Totals {
            exits: 12_345.0,
            entries: 2000.0,
            entry_bytes: 4096.0,
            outputs: 77.0,
            ..Totals::default()
        };
        Found {
            name: name.to_owned(),
            pid: 4242,
            outcome: Ok(Status {
                name: name.to_owned(),
                instance: None,
                role,
                standing,
                protected: standing.is_protected(),
                standing_ms: 65_000,
                pid: 4242,
                program: "0.1.0".into(),
                uptime_ms: 3_700_000,
                epoch: 3,
                configuration: 5,
                position: 12_345,
                lag_us: standing.is_protected().then_some(210.0),
                lag_max_us: standing.is_protected().then_some(840.0),
                commit: Latency {
                    count: 77,
                    p50_us: 1.2,
                    p99_us: 3.4,
                    max_us: 120.0,
                },
                commit_recent: Latency::default(),
                stop: Latency::default(),
                stopped_for: [0; 2],
                totals: figures,
                rates: figures,
                transport: Some("shm".into()),
                peer: None,
                arbiter: Arbiter {
                    place: Some("/srv/arbiter".into()),
                    answered: Some(true),
                    asked_ms_ago: Some(1000),
                    ..Arbiter::default()
                },
                changes: BTreeMap::new(),
                hook: Default::default(),
                share: Control::WHOLE,
                ordered: None,
                orders: Vec::new(),
                metrics: None,
                history: (0..60).collect(),
                events: vec![Happened {
                    unix_ms: 1000,
                    epoch: 2,
                    position: 99,
                    loud: true,
                    text: "live in epoch 3".into(),
                }],
            }),
        }
    }

    fn silent() -> Found {
        Found {
            name: "other".into(),
            pid: 7,
            outcome: Err("it has not answered".into()),
        }
    }

    #[test]
    fn a_guest_that_is_held_back_is_told_of() {
        let shown = |share| {
            let mut found = found("kv", Role::Primary, Standing::Protected);
            if let Ok(status) = &mut found.outcome {
                status.share = share;
            }
            details_of(&[found], &Arbiters::new(), Paint(false))
        };
        assert!(shown(0).contains("PAUSED"));
        assert!(shown(205).contains("20 % of its time"));
        assert!(!shown(Control::WHOLE).contains("share"));
    }

    #[test]
    fn an_unprotected_machine_says_so_first() {
        let alone = [found("kv", Role::Primary, Standing::Unprotected)];
        let text = details_of(&alone, &Arbiters::new(), Paint(false));
        assert!(text.starts_with("kv   UNPROTECTED   epoch 3\n"), "{text}");
        assert!(text.contains("primary   UNPROTECTED  for 1 min 5 s, process 4242"));
        assert!(!text.contains("p50"), "{text}");
        assert!(text.contains("00:00:01.000 epoch 2 position 99  live in epoch 3"));
        assert!(!text.contains('\x1b'));
        let coloured = details_of(&alone, &Arbiters::new(), Paint(true));
        assert!(coloured.contains("\x1b[1;97;41m UNPROTECTED \x1b[0m"));
    }

    #[test]
    fn whoever_serves_knows_whether_it_is_protected() {
        let pair = [
            found("kv", Role::Backup, Standing::Following),
            found("kv", Role::Primary, Standing::Unprotected),
        ];
        assert_eq!(is_protected(pair.iter()), Some(false));
        assert_eq!(is_protected(pair[..1].iter()), Some(true));
        assert_eq!(is_protected([silent()].iter()), None);
        let well = [
            found("kv", Role::Backup, Standing::Following),
            found("kv", Role::Primary, Standing::Protected),
        ];
        let text = details_of(&well, &Arbiters::new(), Paint(false));
        assert!(text.starts_with("kv  PROTECTED  epoch 3\n"), "{text}");
        assert!(
            text.contains("lag        210.0 µs, at most 840.0 µs in 10 s"),
            "{text}"
        );
        assert!(
            text.contains("p50 1.20 µs  p99 3.40 µs  max 120.0 µs"),
            "{text}"
        );
    }

    #[test]
    fn several_machines_have_a_line_for_each_role_and_a_silent_one_too() {
        let all = [
            found("kv", Role::Primary, Standing::Unprotected),
            found("web", Role::Backup, Standing::Following),
            silent(),
        ];
        let text = list(&all, Paint(false));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("MACHINE  ROLE     STANDING"), "{text}");
        assert!(
            lines[1].starts_with("kv       primary  UNPROTECTED  3"),
            "{text}"
        );
        assert!(lines[2].contains("following"), "{text}");
        assert!(lines[3].contains("SILENT"), "{text}");
        assert!(list(&all, Paint(true)).contains("\x1b[1;97;41mother"));
    }

    #[test]
    fn json_has_the_silent_ones_and_what_the_arbiter_says_now() {
        let arbiters = Arbiters::from([(
            ("/srv/arbiter".to_owned(), "kv".to_owned()),
            Asked(Err("gone".into())),
        )]);
        let value = to_json(&found("kv", Role::Primary, Standing::Protected), &arbiters);
        assert_eq!(value["arbiter"]["now"]["answers"], false);
        assert_eq!(value["protected"], true);
        assert_eq!(
            to_json(&silent(), &arbiters)["error"],
            "it has not answered"
        );
    }
}
