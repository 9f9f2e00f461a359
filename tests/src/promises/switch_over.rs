//! The operator's hand on a machine (issue 6): a switch-over loses nothing and sends nothing twice, and its clients hardly notice; a backup
//! that dies in the middle of one, or cannot take the machine, costs a pause; and what was ordered of one side holds on the other.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use hypervisor::backends::wait::Moment;
use hypervisor::config::Transport;
use hypervisor::control::find;
use hypervisor::control::status::Standing;
use hypervisor::control::wire::Ask;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;
use serde_json::json;

use crate::harness::hostile_zombie;
use crate::harness::linear;
use crate::harness::linear_clients::{Histories, LinearClients, longest_wait};
use crate::harness::operator::Operator;
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "switch-over",
    line: "doppel switch moves a machine under load, nothing lost or sent twice; a backup that dies at it costs a pause; orders outlive a failover",
    short: Duration::from_secs(45),
    full: Duration::from_secs(400),
    show,
};

const CLIENTS: u32 = 8;

/// How long clients are at work before an order.
const BEFORE: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];

/// Answers between two events: the machine serves.
const ANSWERS: u64 = 100;

/// Past that something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// A client whose frame was lost waits longer than this: the smallest timeout by which Linux sends again. Nothing was lost in a switch-over
/// that kept every client for less.
const LOST_FRAME: Duration = Duration::from_millis(200);

/// What every machine here is called.
const NAME: &str = "machine";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let switches = run.form.pick(5, 100);
    alone(|| {
        let stage = Stage::enter()?;
        for transport in [Transport::Shm, Transport::Tcp] {
            let spec = spec_in(&stage, transport.name(), transport)?;
            let switched = under_load(&stage, &spec, switches, &mut random)
                .with_context(|| transport.name())?;
            switched.add_to(run, transport.name(), &mut figures);
        }
        Ok(())
    })?;
    for transport in [Transport::Shm, Transport::Tcp] {
        let kills = run.form.pick(4, 40);
        let died = alone(|| backup_dies(kills, transport, &mut random))
            .with_context(|| format!("a backup that dies, {}", transport.name()))?;
        run.say(format!("{}: {died}", transport.name()));
        figures
            .0
            .insert(format!("backup_killed_{}", transport.name()), died);
    }
    let pause = alone(|| not_taken(&mut random)).context("a switch-over that is called off")?;
    figures.add("called_off_longest_wait_ms", millis(pause));
    alone(|| refused(&mut random)).context("switch-overs that are refused")?;
    alone(|| orders_outlive_a_failover(&mut random)).context("orders and a failover")?;
    Ok(figures)
}

fn millis(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e5).round() / 1e2
}

fn spec_in(stage: &Stage, directory: &str, transport: Transport) -> Result<PairSpec> {
    let directory = stage.directory().join(directory);
    std::fs::create_dir(&directory).context("make a directory")?;
    Ok(PairSpec {
        directory,
        transport,
        ..stage.spec("kv", "")?
    })
}

fn operator(spec: &PairSpec) -> Operator {
    Operator::of(spec.run_directory(), NAME)
}

/// Has the machine switched over. On a busy host its backup may be too far behind just then, and says so: an operator tries again.
fn switched_over(operator: &Operator) -> Result<(Moment, String)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let at = Moment::now();
        match operator.ordered(&["switch"]) {
            Err(error) if error.to_string().contains("ms behind") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            told => return Ok((at, told?)),
        }
    }
}

/// One switch-over.
#[derive(Clone, Copy, Debug)]
struct Switched {
    /// When it was ordered, and when the new side was live.
    ordered: Moment,
    live: Moment,
    /// For how long its guest stood, by its own account.
    stood: Duration,
    resent: usize,
}

/// Many of them.
#[derive(Debug, Default)]
struct Outcome {
    switches: Vec<Switched>,
    /// The longest time without an answer to any client, for each.
    gaps: Vec<Duration>,
    operations: usize,
    longest_wait: Duration,
}

impl Outcome {
    fn of(switches: Vec<Switched>, histories: &Histories) -> Result<Self> {
        let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
        let mut answered: Vec<Moment> = histories
            .iter()
            .flatten()
            .map(|done| done.answered)
            .collect();
        answered.sort_unstable();
        let gaps = switches
            .iter()
            .map(|switched| {
                let from = answered.partition_point(|&at| at < switched.ordered);
                let to = answered.partition_point(|&at| at < switched.live) + 1;
                let around = answered.get(from.saturating_sub(1)..=to);
                let around = around.context("no client had an answer after a switch-over")?;
                let gaps = around.windows(2).map(|two| two[1].since(two[0]));
                gaps.max().context("too few answers around a switch-over")
            })
            .collect::<Result<_>>()?;
        let resent: usize = switches.iter().map(|switched| switched.resent).sum();
        ensure!(resent == 0, "{resent} outputs were sent again");
        Ok(Self {
            switches,
            gaps,
            operations: checked.operations,
            longest_wait: longest_wait(histories),
        })
    }

    fn add_to(&self, run: &Run, name: &str, figures: &mut Figures) {
        let quantiles = |spans: &[Duration]| {
            let mut all =
                Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("legal bounds");
            for span in spans {
                all.saturating_record(span.as_micros() as u64);
            }
            let at = |quantile: f64| all.value_at_quantile(quantile) as f64 / 1e3;
            let mut sorted: Vec<f64> = spans.iter().map(|span| millis(*span)).collect();
            sorted.sort_by(f64::total_cmp);
            json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": all.max() as f64 / 1e3, "all": sorted})
        };
        let stood: Vec<Duration> = self.switches.iter().map(|one| one.stood).collect();
        let value = json!({
            "switches": self.switches.len(),
            "guest_stood_ms": quantiles(&stood),
            "longest_gap_of_answers_ms": quantiles(&self.gaps),
            "longest_wait_of_a_client_ms": millis(self.longest_wait),
            "operations": self.operations,
            "outputs_sent_again": 0,
        });
        run.say(format!("{name}: {value}"));
        figures.0.insert(name.to_owned(), value);
    }
}

/// Hears how the backup took the machine over.
fn live(pair: &Pair, ordered: Moment) -> Result<Switched> {
    let mut at = None;
    let said = |event: &Event| matches!(event, Event::SwitchedOver { .. });
    let event = pair.backup.wait_for(PATIENCE, said, |event| {
        if let Event::Live { at: steps, .. } = event {
            at = Some(Moment::from_nanos(steps.open));
        }
    });
    let Some(Event::SwitchedOver {
        stood_us, resent, ..
    }) = event
    else {
        bail!(
            "the backup did not take the machine: {}",
            pair.backup.messages()
        );
    };
    Ok(Switched {
        ordered,
        live: at.context("it did not say how it went live")?,
        stood: Duration::from_micros(stood_us),
        resent,
    })
}

fn under_load(
    stage: &Stage,
    spec: &PairSpec,
    switches: u32,
    random: &mut Random,
) -> Result<Outcome> {
    let mut pair = Pair::start(spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    let mut seen = Vec::new();
    for number in 1..=switches {
        clients.await_answers(ANSWERS)?;
        std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
        let (at, told) = switched_over(&operator(spec))?;
        seen.push(live(&pair, at)?);
        ensure!(told.contains("switched over"), "doppel switch said {told}");
        let ended = pair.primary.wait(PATIENCE);
        ensure!(
            ended.code() == Some(0),
            "the old primary ended by {ended}: {}",
            pair.primary.messages()
        );
        let status = operator(spec).status(pair.backup.pid())?;
        ensure!(
            status.epoch == u64::from(number) + 1,
            "switch-over {number} led to epoch {}",
            status.epoch
        );
        clients.await_answers(ANSWERS)?;
        let mut diverged = None;
        pair.replace_primary(spec, Some(stage.port()), |event| {
            if let Event::Diverged { what } = event {
                diverged = Some(what);
            }
        })?;
        if let Some(what) = diverged {
            bail!("switch-over {number}: {what}");
        }
    }
    clients.await_answers(ANSWERS)?;
    let outcome = Outcome::of(seen, &clients.end()?)?;
    ensure!(
        outcome.longest_wait < LOST_FRAME,
        "a client waited {:?} for an answer: {:?}",
        outcome.longest_wait,
        outcome.switches
    );
    pair.primary.stop(PATIENCE);
    Ok(outcome)
}

/// The backup is killed so long after the order, over as much time as a switch-over takes: each of its steps is met. The first one stands
/// still from before the order, so that it surely never takes the machine.
fn backup_dies(kills: u32, transport: Transport, random: &mut Random) -> Result<serde_json::Value> {
    let stage = Stage::enter()?;
    let (mut survived, mut had_it) = (0, 0);
    let mut worst = Duration::ZERO;
    for number in 0..kills {
        let spec = spec_in(&stage, &number.to_string(), transport)?;
        let mut pair = Pair::start(&spec, Some(stage.port()))?;
        let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
        clients.await_answers(ANSWERS)?;
        let after = Duration::from_micros(u64::from(number) * 4000 / u64::from(kills));
        let (directory, pid) = (spec.run_directory(), pair.primary.pid());
        if number == 0 {
            hostile_zombie::freeze(&pair.backup)?;
        }
        find::order(&directory, NAME, pid, Ask::Switch)?;
        // Not to wait for anything: the moment of the kill is what is tried.
        std::thread::sleep(after);
        pair.backup.kill();
        if !goes_on(&mut pair, &spec)
            .with_context(|| format!("killed {after:?} after the order"))?
        {
            // The backup was the machine's only side by then, and nobody survives that.
            had_it += 1;
            continue;
        }
        clients.await_answers(ANSWERS)?;
        let histories = clients.end()?;
        linear::check_all(histories.iter().map(Vec::as_slice))?;
        worst = worst.max(longest_wait(&histories));
        survived += 1;
        pair.primary.stop(PATIENCE);
    }
    ensure!(survived > 0, "no kill met a switch-over");
    Ok(
        json!({"went_on": survived, "died_live": had_it, "longest_wait_of_a_client_ms": millis(worst)}),
    )
}

/// Whether the primary serves on without its backup; or else has given the machine away and ended. The backup may have been killed before it
/// could say that it was live.
fn goes_on(pair: &mut Pair, spec: &PairSpec) -> Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The answer may be its last, or be cut off by its end.
        let status = operator(spec).status(pair.primary.pid());
        if let Some(ended) = pair.primary.ended() {
            ensure!(
                ended.code() == Some(0),
                "the primary ended by {ended}: {}",
                pair.primary.messages()
            );
            return Ok(false);
        }
        if status.is_ok_and(|status| status.standing == Standing::Unprotected) {
            return Ok(true);
        }
        ensure!(
            Instant::now() < deadline,
            "no end: {}",
            pair.primary.messages()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The arbiter is away: the backup cannot claim, and the machine runs on, protected. Then it is back, and the machine is switched over.
fn not_taken(random: &mut Random) -> Result<Duration> {
    let stage = Stage::enter()?;
    let spec = spec_in(&stage, "pair", Transport::Shm)?;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    clients.await_answers(ANSWERS)?;
    let (arbiter, away) = (spec.directory.join("arbiter"), spec.directory.join("away"));
    std::fs::rename(&arbiter, &away).context("take the arbiter away")?;
    let why = operator(&spec).refusal(&["switch"])?;
    ensure!(why.contains("did not take"), "{why}");
    clients.await_answers(ANSWERS)?;
    operator(&spec).until(pair.primary.pid(), PATIENCE, |status| {
        status.standing == Standing::Protected
    })?;
    std::fs::rename(&away, &arbiter).context("bring the arbiter back")?;
    clients.await_answers(ANSWERS)?;
    let (at, _) = switched_over(&operator(&spec))?;
    live(&pair, at)?;
    clients.await_answers(ANSWERS)?;
    let histories = clients.end()?;
    linear::check_all(histories.iter().map(Vec::as_slice))?;
    pair.backup.stop(PATIENCE);
    Ok(longest_wait(&histories))
}

/// Where there is nobody to take the machine, or it is not this process's to give.
fn refused(random: &mut Random) -> Result<()> {
    let stage = Stage::enter()?;
    let spec = spec_in(&stage, "pair", Transport::Shm)?;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let backup = find::order(&spec.run_directory(), NAME, pair.backup.pid(), Ask::Switch);
    let why = backup.err().context("a backup took an order")?.to_string();
    ensure!(why.contains("is the backup of machine"), "{why}");
    pair.backup.kill();
    operator(&spec).until(pair.primary.pid(), PATIENCE, |status| {
        status.standing == Standing::Unprotected
    })?;
    let why = operator(&spec).refusal(&["switch"])?;
    ensure!(why.contains("has no backup"), "{why}");
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    clients.await_answers(ANSWERS)?;
    clients.end()?;
    pair.primary.stop(PATIENCE);
    let why = operator(&spec).refusal(&["switch"])?;
    ensure!(why.contains("no process of machine"), "{why}");
    Ok(())
}

/// How long a guest that is paused is watched.
const PAUSED: Duration = Duration::from_millis(300);

fn orders_outlive_a_failover(random: &mut Random) -> Result<()> {
    let stage = Stage::enter()?;
    let spec = spec_in(&stage, "pair", Transport::Shm)?;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    clients.await_answers(ANSWERS)?;
    operator(&spec).ordered(&["pause"])?;
    let stands = |pair: &Pair, clients: &LinearClients| -> Result<()> {
        operator(&spec).until(pair.primary.pid(), PATIENCE, |status| status.share == 0)?;
        let before = clients.answered();
        std::thread::sleep(PAUSED);
        let more = clients.answered() - before;
        // One a client may have been on its way.
        ensure!(
            more <= u64::from(CLIENTS),
            "a paused guest gave {more} answers"
        );
        Ok(())
    };
    stands(&pair, &clients)?;
    pair.primary.kill();
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let heard = pair.backup.wait_for(PATIENCE, live, drop);
    heard.with_context(|| pair.backup.messages())?;
    // A backup that joins a machine that stands learns that it does, and it is switched over so.
    pair.replace_primary(&spec, Some(stage.port()), drop)?;
    stands(&pair, &clients).context("after a failover")?;
    switched_over(&operator(&spec))?;
    pair.primary.wait(PATIENCE);
    pair.replace_primary(&spec, Some(stage.port()), drop)?;
    stands(&pair, &clients).context("after a switch-over")?;
    operator(&spec).ordered(&["resume"])?;
    clients.await_answers(ANSWERS)?;

    operator(&spec).ordered(&["share", "50"])?;
    operator(&spec).until(pair.primary.pid(), PATIENCE, |status| status.share == 512)?;
    clients.await_answers(ANSWERS)?;
    pair.primary.kill();
    let heard = pair.backup.wait_for(PATIENCE, live, drop);
    heard.with_context(|| pair.backup.messages())?;
    let status = operator(&spec).status(pair.backup.pid())?;
    ensure!(status.share == 512, "its share is {}", status.share);
    pair.replace_primary(&spec, Some(stage.port()), drop)?;
    clients.await_answers(ANSWERS)?;
    let histories = clients.end()?;
    linear::check_all(histories.iter().map(Vec::as_slice))?;

    operator(&spec).ordered(&["power-off"])?;
    for side in [&mut pair.primary, &mut pair.backup] {
        let ended = side.wait(PATIENCE);
        ensure!(
            ended.code() == Some(0),
            "a side ended by {ended}: {}",
            side.messages()
        );
        ensure!(
            !side.events().iter().any(live),
            "a machine that was powered off was taken over"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
