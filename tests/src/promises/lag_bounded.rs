//! The backup is never far behind (issue 6, point 5): with its process stopped half of the time, and four fifths of it, the lag stays
//! under the bound, the primary is seen to slow down, and with that gone its speed is back within a second.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;
use serde_json::json;

use crate::harness::linear_clients::LinearClients;
use crate::harness::operator::Operator;
use crate::harness::random::Random;
use crate::harness::signal::{Signal, send};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "lag-bounded",
    line: "with the backup slowed to half speed the lag stays under 100 ms, the primary slows down with it, and is back within a second",
    short: Duration::from_secs(40),
    full: Duration::from_secs(200),
    show,
};

/// The paper's bound.
const BOUND: Duration = Duration::from_millis(100);

/// The backup's process runs for so long at once, while it is slowed, and stands for so many times that.
const TURN: Duration = Duration::from_millis(1);
const SLOWED: [(&str, u32); 2] = [("half", 1), ("crawling", 4)];

/// Within which the speed is back.
const BACK_WITHIN: Duration = Duration::from_secs(1);

/// Between two looks at the lag.
const LOOK: Duration = Duration::from_millis(20);

const PATIENCE: Duration = Duration::from_secs(20);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let span = Duration::from_secs(run.form.pick(2, 30));
    alone(|| {
        let stage = Stage::enter()?;
        // One that computes between two exits keeps its core busy, so that a backup at half speed cannot keep up.
        for (guest, words, saturates) in [("compute", "rounds=1", true), ("kv", "", false)] {
            let directory = stage.directory().join(guest);
            std::fs::create_dir(&directory).context("make a directory")?;
            let spec = PairSpec {
                directory,
                memory_check_ms: 0,
                ..stage.spec(guest, words)?
            };
            let seen = slowed(&stage, &spec, guest, span, &mut random)
                .with_context(|| guest.to_owned())?;
            run.say(format!("{guest}: {seen}"));
            let judged = match run.form {
                _ if !saturates => &[][..],
                // On a busy host a primary that gets half a core is no faster than half a backup.
                Form::Brief | Form::Short => &["crawling"],
                Form::Full => &["half", "crawling"],
            };
            judge(&seen, judged).with_context(|| format!("{guest}: {seen}"))?;
            figures.0.insert(guest.to_owned(), seen);
        }
        Ok(())
    })?;
    for policy in ["throttle", "drop"] {
        let seen = alone(|| at_its_floor(policy, run.form.pick(2, 10))).context(policy)?;
        run.say(format!("policy {policy}: {seen}"));
        figures.0.insert(format!("policy_{policy}"), seen);
    }
    figures.add("seconds_each", span.as_secs());
    Ok(figures)
}

/// The backup stands for so many turns of its own while it cannot keep up at all: still for less than what it is given up after.
const HOPELESS: u32 = 60;

/// A backup that hardly runs: by the policy the guest stays as slow and protected, or goes on at its own speed, unprotected.
fn at_its_floor(policy: &str, seconds: u64) -> Result<serde_json::Value> {
    let stage = Stage::enter()?;
    let mut spec = stage.spec("compute", "rounds=1")?;
    spec.memory_check_ms = 0;
    let after = Duration::from_secs(seconds).as_millis().to_string();
    let words = ["--lag-policy", policy, "--lag-after-ms", &after];
    spec.more = words.map(str::to_owned).to_vec();
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let work = Work::Console(spec.directory.join("primary.console"));
    let pace = |span: Duration| -> Result<f64> {
        let (since, begun) = (Instant::now(), work.done()?);
        std::thread::sleep(span);
        Ok((work.done()? - begun) / since.elapsed().as_secs_f64())
    };
    std::thread::sleep(Duration::from_secs(1));
    let before = pace(Duration::from_secs(1))?;
    let slow = Slowed::start(pair.backup.pid(), HOPELESS);
    let (since, mut told) = (Instant::now(), Vec::new());
    let word = match policy {
        "drop" => "UNPROTECTED",
        _ => "does not keep up",
    };
    let said =
        |event: &Event| matches!(event, Event::Notice { text, loud: true } if text.contains(word));
    let heard = pair.primary.wait_for(PATIENCE, said, |event| {
        if let Event::Notice { text, .. } = event {
            told.push(text);
        }
    });
    let took = since.elapsed();
    ensure!(heard.is_some(), "nothing was said of it, only {told:?}");
    let during = pace(Duration::from_secs(1))?;
    let status = operator(&spec).status(pair.primary.pid())?;
    slow.end()?;
    let arbiter = status.configuration;
    match policy {
        "drop" => {
            let why = told.iter().any(|text| text.contains("lag.policy is drop"));
            ensure!(why, "it was let go for another reason: {told:?}");
            ensure!(
                !status.protected && arbiter == 2,
                "it stands so: {status:?}"
            );
            ensure!(
                during > before / 2.0,
                "the guest did {during:.0} of {before:.0} a second"
            );
        }
        _ => {
            ensure!(status.protected && arbiter == 1, "it stands so: {status:?}");
            ensure!(
                during < before / 2.0,
                "the guest did {during:.0} of {before:.0} a second"
            );
            let back = |event: &Event| matches!(event, Event::Notice { text, .. } if text.contains("keeps up again"));
            let heard = pair.primary.wait_for(PATIENCE, back, drop);
            ensure!(
                heard.is_some(),
                "it was not told that the backup keeps up again"
            );
        }
    }
    pair.primary.stop(PATIENCE);
    pair.backup.stop(PATIENCE);
    Ok(json!({"after_ms": took.as_millis() as u64, "pace": (during / before * 1e3).round() / 1e3}))
}

fn judge(seen: &serde_json::Value, saturated: &[&str]) -> Result<()> {
    let number = |name: &str| seen[name].as_f64().with_context(|| name.to_owned());
    let bound = BOUND.as_secs_f64() * 1e3;
    for phase in ["before", "half", "crawling", "after"] {
        let worst = number(&format!("lag_ms_worst_{phase}"))?;
        ensure!(
            worst < bound,
            "{phase}: the backup was {worst:.1} ms behind"
        );
    }
    for phase in saturated {
        let slowed = number(&format!("pace_{phase}"))?;
        ensure!(
            (0.02..0.8).contains(&slowed),
            "{phase}: the guest ran at {slowed:.2} of its pace"
        );
    }
    let after = number("pace_after")?;
    ensure!(
        after > 0.8,
        "a second after, the guest ran at {after:.2} of its pace"
    );
    Ok(())
}

/// Stops a process again and again.
struct Slowed {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Slowed {
    fn start(process: u32, stands: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                send(process, Signal::Stop)?;
                std::thread::sleep(TURN * stands);
                send(process, Signal::Continue)?;
                std::thread::sleep(TURN);
            }
            Ok(())
        });
        Self { over, thread }
    }

    fn end(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

/// What the guest has done so far.
enum Work {
    /// Bytes that it has written to its console.
    Console(PathBuf),
    /// Requests that it has answered.
    Clients(LinearClients),
}

impl Work {
    fn done(&self) -> Result<f64> {
        Ok(match self {
            Self::Console(path) => std::fs::metadata(path)
                .context("look at the console")?
                .len() as f64,
            Self::Clients(clients) => clients.answered() as f64,
        })
    }
}

/// Lags seen over some time, and the guest's work in it.
#[derive(Debug, Default)]
struct Phase {
    lags_ms: Vec<f64>,
    worst_ms: f64,
    a_second: f64,
}

impl Phase {
    fn watch(spec: &PairSpec, pair: &Pair, work: &Work, span: Duration) -> Result<Self> {
        let mut phase = Self::default();
        let (since, begun) = (Instant::now(), work.done()?);
        while since.elapsed() < span {
            std::thread::sleep(LOOK);
            let status = operator(spec).status(pair.primary.pid())?;
            ensure!(status.protected, "it is not protected: {status:?}");
            let lag = status.lag_us.context("no lag is told")? / 1e3;
            phase.lags_ms.push(lag);
            // Between two looks, too.
            let longest = status.lag_max_us.unwrap_or_default() / 1e3;
            phase.worst_ms = phase.worst_ms.max(lag).max(longest);
        }
        phase.a_second = (work.done()? - begun) / since.elapsed().as_secs_f64();
        phase.lags_ms.sort_by(f64::total_cmp);
        Ok(phase)
    }

    fn median(&self) -> f64 {
        self.lags_ms[self.lags_ms.len() / 2]
    }
}

fn operator(spec: &PairSpec) -> Operator {
    Operator::of(spec.run_directory(), "machine")
}

fn slowed(
    stage: &Stage,
    spec: &PairSpec,
    guest: &str,
    span: Duration,
    random: &mut Random,
) -> Result<serde_json::Value> {
    let mut pair = Pair::start(spec, Some(stage.port()))?;
    let mut work = match guest {
        "kv" => Work::Clients(LinearClients::start(GUEST, 8, random.next())?),
        _ => Work::Console(spec.directory.join("primary.console")),
    };
    if let Work::Clients(clients) = &mut work {
        clients.await_answers(500)?;
    }
    // A start is no part of it: status remembers the longest lag of the last seconds.
    std::thread::sleep(Duration::from_secs(6));
    let before = Phase::watch(spec, &pair, &work, span)?;
    let mut seen = json!({"work_a_second_before": before.a_second.round()});
    let mut tell = |name: &str, phase: &Phase| {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        seen[format!("lag_ms_median_{name}")] = round(phase.median()).into();
        seen[format!("lag_ms_worst_{name}")] = round(phase.worst_ms).into();
        seen[format!("pace_{name}")] = round(phase.a_second / before.a_second).into();
    };
    tell("before", &before);
    for (name, stands) in SLOWED {
        let slow = Slowed::start(pair.backup.pid(), stands);
        let during = Phase::watch(spec, &pair, &work, span);
        slow.end()?;
        tell(name, &during?);
    }
    std::thread::sleep(BACK_WITHIN);
    tell("after", &Phase::watch(spec, &pair, &work, span)?);
    for event in pair
        .primary
        .events()
        .into_iter()
        .chain(pair.backup.events())
    {
        ensure!(
            !matches!(event, Event::Diverged { .. } | Event::Live { .. }),
            "{event:?}"
        );
    }
    if let Work::Clients(clients) = work {
        clients.end()?;
    }
    pair.primary.stop(PATIENCE);
    pair.backup.stop(PATIENCE);
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_lag_beyond_the_bound_and_a_speed_that_does_not_come_back_are_judged_so() {
        let seen = |worst: f64, slowed: f64, after: f64| {
            json!({
                "lag_ms_worst_before": 5.0, "lag_ms_worst_half": worst, "lag_ms_worst_crawling": 9.0,
                "lag_ms_worst_after": 5.0, "pace_half": slowed, "pace_after": after,
            })
        };
        judge(&seen(20.0, 0.5, 1.0), &["half"]).unwrap();
        judge(&seen(100.0, 0.5, 1.0), &["half"]).unwrap_err();
        judge(&seen(20.0, 1.0, 1.0), &["half"]).unwrap_err();
        judge(&seen(20.0, 1.0, 1.0), &[]).unwrap();
        judge(&seen(20.0, 0.5, 0.5), &["half"]).unwrap_err();
    }
}
