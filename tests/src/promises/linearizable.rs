//! Killed, protected anew, the other killed, over and over (issue 6, point 6): clients that share keys note what they were told
//! and when, and everything they were told is linearizable, across all the machine's lives.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "stays-linearizable",
    line: "killed, protected anew, the other killed, over and over: all that clients were told of shared keys is linearizable",
    short: Duration::from_secs(10),
    full: Duration::from_secs(150),
    show,
};

/// Connections: as many operations can be under way at once.
const CLIENTS: u32 = 8;

/// How long clients are at work before a kill.
const BEFORE: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(800)];

/// A hundred times what a take-over should take: past that something is broken.
const LIVE_WITHIN: Duration = Duration::from_secs(5);

/// Answers between a take-over and the next backup: the survivor serves.
const ANSWERS: u64 = 200;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let kills = run.form.pick(3, 50);
    alone(|| {
        let stage = Stage::enter()?;
        for transport in [Transport::Shm, Transport::Tcp] {
            let name = transport.name();
            let directory = stage.directory().join(name);
            std::fs::create_dir(&directory).context("make a directory")?;
            let spec = PairSpec {
                directory,
                transport,
                ..stage.spec("kv", "")?
            };
            lives(run, &stage, &spec, kills, &mut random, &mut figures)
                .with_context(|| name.to_owned())?;
        }
        Ok(())
    })?;
    figures.add("kills_each", kills);
    Ok(figures)
}

fn lives(
    run: &Run,
    stage: &Stage,
    spec: &PairSpec,
    kills: u32,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let mut pair = Pair::start(spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    for kill in 1..=kills {
        clients.await_answers(ANSWERS)?;
        std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
        pair.primary.kill();
        let (mut diverged, mut notices) = (None, Vec::new());
        let mut hear = |event| match event {
            Event::Diverged { what } => diverged = Some(what),
            Event::Notice { text, .. } => notices.push(text),
            _ => {}
        };
        let live = pair.backup.wait_for(
            LIVE_WITHIN,
            |event| matches!(event, Event::Live { .. }),
            &mut hear,
        );
        let Some(Event::Live { epoch, .. }) = live else {
            bail!(
                "kill {kill}: the backup did not go live: {}",
                pair.backup.messages()
            );
        };
        ensure!(
            epoch == u64::from(kill) + 1,
            "kill {kill} led to epoch {epoch}"
        );
        clients.await_answers(ANSWERS)?;
        let replaced = pair.replace_primary(spec, Some(stage.port()), hear);
        replaced.with_context(|| format!("kill {kill}; it said {notices:#?}"))?;
        if let Some(what) = diverged {
            bail!("kill {kill}: a backup diverged: {what}");
        }
    }
    clients.await_answers(ANSWERS)?;
    let histories = clients.end()?;
    let longest = longest_wait(&histories);
    let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
    run.say(format!(
        "{}: {kills} kills, {checked:?}, longest wait {longest:.1?}",
        spec.transport.name()
    ));
    let name = spec.transport.name();
    figures.add(&format!("{name}_operations"), checked.operations);
    figures.add(&format!("{name}_under_way_at_once"), checked.under_way);
    figures.add(&format!("{name}_states_of_a_key"), checked.states);
    figures.add(
        &format!("{name}_longest_wait_ms"),
        longest.as_micros() as f64 / 1000.0,
    );
    figures.add(&format!("{name}_violations"), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
