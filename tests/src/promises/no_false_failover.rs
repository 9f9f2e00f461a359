//! Nobody is given up in health (issue 6, point 3): a pair serves clients while busy processes keep every core occupied, and
//! neither side claims or detaches. Afterwards the primary is killed, and its backup takes over: it had been a backup all the time.
//!
//! For comparison a pair without urgent threads goes through the same for some seconds, not judged.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::scheduling::{Urgency, permitted_urgency};
use hypervisor::session::report::Event;

use crate::harness::busy::Busy;
use crate::harness::hostile_clients::Clients;
use crate::harness::hostile_zombie::is_protected;
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "no-false-failover",
    line: "busy processes on every core beside a pair make neither side give the other up, over either transport",
    short: Duration::from_secs(30),
    full: Duration::from_secs(1230),
    show,
};

/// Busy processes for each core.
const BUSY_PER_CORE: usize = 2;

/// Looks at the pair between two of these.
const LOOK: Duration = Duration::from_millis(200);

/// For the failover at the end, and the start of the clients, on a host this busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a pair's sides said while nothing was done to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// The longest that either side did not hear the other, in microseconds.
    silence_us: u64,
    /// The longest gap between two looks of either side, in microseconds.
    own_gap_us: u64,
    doubts: u64,
    naps: u64,
    looks: u64,
    /// What must not be.
    given_up: Vec<String>,
}

impl Seen {
    fn hear(&mut self, side: &str, event: &Event) {
        match event {
            Event::Watched {
                silence_us,
                own_gap_us,
            } => {
                self.looks += 1;
                self.silence_us = self.silence_us.max(*silence_us);
                self.own_gap_us = self.own_gap_us.max(*own_gap_us);
            }
            Event::Notice { text, loud: false } => {
                self.doubts += u64::from(text.contains("has been silent"));
                self.naps += u64::from(text.contains("was not scheduled"));
            }
            // Protection or service is affected, whatever it is.
            Event::Notice { text, loud: true } | Event::Ended { why: text } => {
                self.given_up.push(format!("the {side} says: {text}"));
            }
            Event::Live { .. } | Event::SwitchedOver { .. } => {
                self.given_up.push(format!("the {side} went live"))
            }
            Event::Joined { .. } => {
                self.given_up
                    .push(format!("a new backup joined the {side}"));
            }
            Event::Diverged { what } => self.given_up.push(format!("the {side} diverged: {what}")),
            Event::Ready { .. }
            | Event::Paired { .. }
            | Event::Commits { .. }
            | Event::Preempted { .. }
            | Event::Intervals { .. }
            | Event::Checkpointed { .. }
            | Event::Progress { .. } => {}
        }
    }

    fn hear_pair(&mut self, pair: &Pair) {
        for (side, events) in [
            ("primary", pair.primary.events()),
            ("backup", pair.backup.events()),
        ] {
            for event in events {
                self.hear(side, &event);
            }
        }
    }

    fn judge(&self) -> Result<()> {
        if let Some(first) = self.given_up.first() {
            bail!(
                "a healthy side was given up: {first} ({} such messages; the longest silence was {} ms)",
                self.given_up.len(),
                self.silence_us / 1000
            );
        }
        ensure!(self.looks > 0, "neither side said what it saw");
        Ok(())
    }

    fn add_to(&self, figures: &mut Figures, name: &str) {
        figures.add(
            &format!("{name}_longest_silence_ms"),
            self.silence_us as f64 / 1000.0,
        );
        figures.add(
            &format!("{name}_longest_own_gap_ms"),
            self.own_gap_us as f64 / 1000.0,
        );
        figures.add(&format!("{name}_doubts"), self.doubts);
        figures.add(&format!("{name}_naps"), self.naps);
    }
}

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let permitted = permitted_urgency();
    figures.add("urgency", format!("{permitted:?}"));
    if permitted != Urgency::RealTime {
        run.say("no real-time priority is permitted here: what follows shows what is left without");
    }
    let mut random = Random::new(run.seed);
    let length = Duration::from_secs(run.form.pick(8, 600));
    alone(|| {
        let stage = Stage::enter()?;
        let cores = std::thread::available_parallelism().context("count the cores")?;
        let count = BUSY_PER_CORE * cores.get();
        figures.add("busy_processes", count);
        for (transport, urgent, length) in [
            (Transport::Shm, true, length),
            (Transport::Tcp, true, length),
            (Transport::Shm, false, length.min(Duration::from_secs(5))),
        ] {
            let name = match urgent {
                true => transport.name().to_owned(),
                false => "not_urgent".to_owned(),
            };
            let directory = stage.directory().join(&name);
            std::fs::create_dir(&directory).context("make a directory")?;
            let spec = spec(&stage, &directory, transport, urgent)?;
            let (seen, requests) = endure(&stage, &spec, count, length, urgent, &mut random)
                .with_context(|| name.clone())?;
            run.say(format!("{name}: {requests} requests, {seen:?}"));
            seen.add_to(&mut figures, &name);
            figures.add(&format!("{name}_requests"), requests);
            if !urgent {
                figures.add(&format!("{name}_given_up"), !seen.given_up.is_empty());
            }
        }
        Ok(())
    })?;
    figures.add("seconds_each", length.as_secs());
    Ok(figures)
}

fn spec(stage: &Stage, directory: &Path, transport: Transport, urgent: bool) -> Result<PairSpec> {
    let mut spec = PairSpec {
        directory: directory.to_owned(),
        transport,
        ..stage.spec("kv", "")?
    };
    if !urgent {
        let config = directory.join("usual.toml");
        std::fs::write(&config, "[cpus]\nurgent = false\n").context("write a configuration")?;
        spec.more = vec!["--config".into(), config.display().to_string()];
    }
    Ok(spec)
}

/// A pair under load, for so long. A judged one fails over at the end.
fn endure(
    stage: &Stage,
    spec: &PairSpec,
    busy: usize,
    length: Duration,
    judged: bool,
    random: &mut Random,
) -> Result<(Seen, u64)> {
    let mut pair = Pair::start(spec, Some(stage.port()))?;
    let mut clients = Clients::start(GUEST, 4, random.next())?;
    clients.await_answers(100)?;
    let mut load = Busy::start(busy, length + 3 * PATIENCE)?;
    let mut seen = Seen::default();
    // What was seen before the load began is not of it.
    seen.hear_pair(&pair);
    seen = Seen {
        given_up: seen.given_up,
        ..Seen::default()
    };
    let until = Instant::now() + length;
    while Instant::now() < until && (seen.given_up.is_empty() || !judged) {
        std::thread::sleep(LOOK);
        load.is_on()?;
        seen.hear_pair(&pair);
    }
    if !judged {
        return Ok((seen, clients.answered()));
    }
    seen.judge()?;
    ensure!(
        is_protected(&spec.directory)?,
        "the arbiter's record has moved"
    );
    clients.await_answers(1)?;
    pair.primary.kill();
    let live = pair.backup.wait_for(
        PATIENCE,
        |event| matches!(event, Event::Live { .. }),
        |event| seen.hear("backup after the kill", &event),
    );
    ensure!(
        live.is_some(),
        "the backup did not go live after the kill: {:?} {}",
        seen.given_up,
        pair.backup.messages()
    );
    clients.await_answers(100)?;
    let outcome = clients.stop_and_verify()?;
    Ok((seen, outcome.requests))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn what_must_not_be_is_judged_bad() {
        let watched = Event::Watched {
            silence_us: 5100,
            own_gap_us: 5000,
        };
        let notice = |text: &str, loud| Event::Notice {
            text: text.into(),
            loud,
        };
        let mut good = Seen::default();
        good.judge()
            .expect_err("nothing was seen, so nothing was shown");
        for event in [
            watched,
            notice("the peer has been silent for 80 ms", false),
            notice("the peer is heard again", false),
        ] {
            good.hear("primary", &event);
        }
        good.judge().unwrap();
        assert_eq!((good.doubts, good.silence_us), (1, 5100));
        for event in [
            notice("the backup is lost (nothing heard for 151 ms)", true),
            Event::Ended {
                why: "replaced".into(),
            },
        ] {
            let mut bad = good.clone();
            bad.hear("primary", &event);
            bad.judge().unwrap_err();
        }
    }
}
