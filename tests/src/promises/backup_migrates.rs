//! Another backup takes the old one's place while the machine is protected, under load (issue 6, re-protection: make before break).
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::operator::Operator;
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "backup-migrates",
    line: "doppel migrate-backup: a new backup takes the old one's place under load, which protects until then; the new one then survives the primary",
    short: Duration::from_secs(20),
    full: Duration::from_secs(180),
    show,
};

const CLIENTS: u32 = 8;

/// How long clients are at work before an order.
const BEFORE: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];

/// Answers between two events: the machine serves.
const ANSWERS: u64 = 100;

/// Past that something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// What every machine here is called.
const NAME: &str = "machine";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let lives = run.form.pick(2, 20);
    for transport in [Transport::Shm, Transport::Tcp] {
        alone(|| {
            let stage = Stage::enter()?;
            let spec = PairSpec {
                transport,
                ..stage.spec("kv", "")?
            };
            under_load(run, &stage, &spec, lives, &mut random, &mut figures)
        })
        .with_context(|| transport.name())?;
    }
    Ok(figures)
}

fn under_load(
    run: &Run,
    stage: &Stage,
    spec: &PairSpec,
    lives: u32,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let mut pair = Pair::start(spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    clients.await_answers(ANSWERS)?;
    // Nobody else listens.
    let operator = Operator::of(spec.run_directory(), NAME);
    let why = operator.refusal(&["migrate-backup"])?;
    ensure!(why.contains("nobody listens"), "{why}");
    let mut stood = Vec::new();
    for life in 1..=lives {
        for _ in 0..2 {
            clients.await_answers(ANSWERS)?;
            std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
            let order = |to: Option<SocketAddr>| -> Result<()> {
                let to = to.map(|address| address.to_string());
                let mut words = vec!["migrate-backup"];
                words.extend(to.iter().flat_map(|address| ["--to", address]));
                operator.ordered(&words).map(drop)
            };
            let (mut old, join) = pair.migrate_backup(spec, Some(stage.port()), order, drop)?;
            stood.push(Duration::from_micros(join.stopped_us));
            relieved(&mut old)?;
        }
        clients.await_answers(ANSWERS)?;
        // The new one holds all that was told to anybody.
        pair.primary.kill();
        let live = |event: &Event| matches!(event, Event::Live { .. });
        let Some(Event::Live { epoch, .. }) = pair.backup.wait_for(PATIENCE, live, drop) else {
            bail!(
                "life {life}: the new backup did not go live: {}",
                pair.backup.messages()
            );
        };
        ensure!(
            epoch == u64::from(life) + 1,
            "life {life} led to epoch {epoch}"
        );
        clients.await_answers(ANSWERS)?;
        let mut diverged = None;
        pair.replace_primary(spec, Some(stage.port()), |event| {
            if let Event::Diverged { what } = event {
                diverged = Some(what);
            }
        })?;
        ensure!(diverged.is_none(), "a backup diverged: {diverged:?}");
    }
    clients.await_answers(ANSWERS)?;
    let histories = clients.end()?;
    let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
    stood.sort_unstable();
    let name = spec.transport.name();
    let millis = |span: Duration| span.as_micros() as f64 / 1e3;
    let (middle, worst) = (stood[stood.len() / 2], stood[stood.len() - 1]);
    let longest = longest_wait(&histories);
    run.say(format!(
        "{name}: {} migrations, the guest stood {middle:.1?} (median), {worst:.1?} (worst); {checked:?}, longest wait {longest:.1?}",
        stood.len()
    ));
    figures.add(&format!("{name}_migrations"), stood.len());
    figures.add(&format!("{name}_guest_stood_ms_median"), millis(middle));
    figures.add(&format!("{name}_guest_stood_ms_worst"), millis(worst));
    figures.add(&format!("{name}_operations"), checked.operations);
    figures.add(&format!("{name}_violations"), 0);
    Ok(())
}

/// The old backup ends well, by itself, and has not taken anything over.
fn relieved(old: &mut hypervisor::demo::pair::Side) -> Result<()> {
    let status = old.wait(PATIENCE);
    let events = old.events();
    let why = events.iter().find_map(|event| match event {
        Event::Notice { text, .. } if text.starts_with("relieved") => Some(text.clone()),
        _ => None,
    });
    ensure!(
        status.code() == Some(0) && why.is_some(),
        "the old backup ended by {status}, {why:?}: {}",
        old.messages()
    );
    let live = events
        .iter()
        .any(|event| matches!(event, Event::Live { .. }));
    ensure!(!live, "the old backup went live");
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
