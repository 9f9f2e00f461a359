//! The output rule (issue 3, point 3): nothing reaches the world before the entry of the exit that produced it has committed.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use hypervisor::backends::link;
use hypervisor::backends::wait::Moment;
use hypervisor::orders::Order;
use hypervisor::record::Ended;
use hypervisor::ring_log::RingSink;
use hypervisor::session::report::Event;
use rdma_log::transport::shm;
use rdma_log::{LaneReader, RingConfig};

use crate::harness::hostile::{EPOCH, Feeder, Saboteur, Step, Surroundings, machine};
use crate::harness::hostile_backup::Verdict;
use crate::harness::hostile_clients::Clients;
use crate::harness::hostile_gate::{Book, JudgedWorld, WithheldSink};
use crate::harness::hostile_run::{Death, Scaffold};
use crate::harness::hostile_zombie::is_protected;
use crate::harness::random::Random;
use crate::harness::requests::Requests;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "output-rule",
    line: "No output leaves before its entry has committed; a client never sees what the backup lacks",
    short: Duration::from_secs(30),
    full: Duration::from_secs(600),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    withheld(run, &mut figures).context("with commits withheld")?;
    withheld_power_off(run, &mut figures).context("with a power-off's commit withheld")?;
    killed_at_every_step(run, &mut figures)?;
    killed_under_clients(run, &mut figures)?;
    Ok(figures)
}

/// A bound for things that take milliseconds, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(20);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(
            Instant::now() < until,
            "not within {} s: {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A recorder whose commits the book withholds, its feeder, and a reader that makes room in the ring: all at work while
/// `judge` runs. How the recording ended, if it did by itself.
fn with_hostile_log(
    guest: &str,
    words: &str,
    book: &Book,
    judge: impl FnOnce(&Surroundings, &hypervisor::backends::NetPort) -> Result<()>,
) -> Result<Ended> {
    let surroundings = Surroundings::new(Box::new(JudgedWorld(book.clone())))?;
    let (writer, reader) = shm::pair(&RingConfig::default())?;
    let (cable, far_cable) = link::pair()?;
    let committed = Arc::new(AtomicU64::new(0));
    let ring = RingSink::new(writer.events, EPOCH, Arc::clone(&committed));
    let mut recorder = surroundings.recorder(
        &machine(guest, words)?,
        WithheldSink::new(ring, book.clone()),
    )?;
    let stage = Arc::clone(&surroundings.stage);
    let mut feeder = Feeder::new(
        far_cable,
        writer.inputs,
        committed,
        stage,
        Arc::new(Saboteur::new(None)),
    );
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let recording = scope.spawn(|| recorder.run());
        let feeding = scope.spawn(|| feeder.run(&over));
        let reading = scope.spawn(|| read_on(reader.events, reader.inputs, &over));
        let judged = judge(&surroundings, &cable);
        surroundings.orders.give(Order::Stop);
        surroundings.stage.bell().ring();
        let ended = recording.join().expect("the recorder does not panic");
        over.store(true, Ordering::Relaxed);
        feeding.join().expect("the feeder does not panic")?;
        reading.join().expect("the reader does not panic")?;
        judged?;
        Ok(ended?)
    })
}

fn read_on(mut events: LaneReader, mut inputs: LaneReader, over: &AtomicBool) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        while events.next()?.is_some() {}
        while inputs.next()?.is_some() {}
        events.notify()?;
        inputs.notify()?;
        events.wait(Duration::from_millis(1))?;
    }
    Ok(())
}

fn no_wrong(book: &Book) -> Result<()> {
    let wrong = book.wrong();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Nothing leaves while nothing is admitted; then what is admitted leaves, and nothing else, in order, and in the end all of it.
fn withheld(run: &Run, figures: &mut Figures) -> Result<()> {
    let asked = run.form.pick(150, 400);
    let rounds = run.form.count(100, 4000);
    let book = Book::new(run.seed);
    let mut random = Random::new(run.seed ^ 1);
    let mut while_withheld = 0;
    with_hostile_log("kv", "", &book, |surroundings, cable| {
        let outlet = &surroundings.outlet;
        let mut requests = Requests::new(run.seed);
        for request in requests.by_ref().take(asked) {
            ensure!(cable.write(&request)?, "the cable is full");
        }
        wait_until("every request is answered into the gate", || {
            let standing = book.standing();
            standing.applied >= asked as u64 && standing.made > asked as u64
        })?;
        let before = book.standing();
        // The guest never waits for a commit: it goes on, tick by tick.
        wait_until("the guest goes on while its outputs wait", || {
            book.standing().entries >= before.entries + 20
        })?;
        // Whoever asks again gets nothing either.
        outlet.release(book.admitted());
        outlet.release_again();
        let standing = book.standing();
        no_wrong(&book)?;
        ensure!(
            standing.left == 0,
            "{} outputs left with nothing committed",
            standing.left
        );
        ensure!(
            outlet.waiting() as u64 == standing.made,
            "not all outputs wait in the gate"
        );
        while_withheld = standing.made;
        run.say(format!("{while_withheld} outputs waited for a commit"));

        for round in 0..rounds {
            admit_oddly(&book, &mut random);
            if random.below(4) == 0 {
                // The cable holds far more than the guest leaves in it.
                let burst = random.below(6) as usize;
                for request in requests.by_ref().take(burst) {
                    ensure!(cable.write(&request)?, "the cable is full");
                }
            }
            book.be_busy([0, 0, 2, 5][random.below(4) as usize]);
            outlet.release(book.admitted());
            if random.below(2) == 0 {
                outlet.release_again();
            }
            book.be_busy(0);
            // A way out that is free again must not be left unused. An entry may be in the log a moment before its outputs are
            // in the gate.
            let (must, _) = book.bounds();
            wait_until("what is admitted leaves", || {
                outlet.release(book.admitted());
                book.standing().left >= must
            })?;
            let left = book.standing().left;
            let (_, may) = book.bounds();
            ensure!(
                left <= may,
                "round {round}: {may} outputs were free to leave, {left} did"
            );
            no_wrong(&book)?;
        }
        book.admit(u64::MAX, u64::MAX);
        let made = requests.made();
        wait_until("the last requests are answered", || {
            book.standing().applied >= made
        })?;
        wait_until("everything leaves in the end", || {
            outlet.release(book.admitted());
            let standing = book.standing();
            standing.left == standing.made && outlet.waiting() == 0
        })
    })?;
    no_wrong(&book)?;
    let standing = book.standing();
    ensure!(
        standing.left == standing.made,
        "{} of {} outputs left",
        standing.left,
        standing.made
    );
    figures.add("withheld_outputs", while_withheld);
    figures.add("withheld_rounds", rounds);
    figures.add("withheld_left_in_the_end", standing.left);
    Ok(())
}

/// Each lane by itself, mostly a little, sometimes nothing or a lot: the one that lags takes turns.
fn admit_oddly(book: &Book, random: &mut Random) {
    let mut amount = || match random.below(8) {
        0..3 => 0,
        3..7 => 1 + random.below(5),
        _ => random.below(60),
    };
    let (events, inputs) = (amount(), amount());
    book.admit(events, inputs);
}

/// The guest's end is an output: the recorder does not call it off before it has committed.
fn withheld_power_off(run: &Run, figures: &mut Figures) -> Result<()> {
    let book = Book::new(run.seed);
    let words = "reads=200 entropy=0";
    let ended = with_hostile_log("clock", words, &book, |surroundings, _| {
        let outlet = &surroundings.outlet;
        wait_until("the guest has something to say", || {
            book.standing().entries > 200
        })?;
        // By single entries, so that each output, the end among them, has its moment of being next.
        let until = Instant::now() + PATIENCE;
        while !book.powered_off() {
            ensure!(Instant::now() < until, "the power-off does not leave");
            let (_, may) = book.bounds();
            outlet.release(book.admitted());
            ensure!(book.standing().left <= may, "more left than was admitted");
            if book.admitted().events < book.last_with_outputs() {
                book.admit(1, 0);
            }
        }
        Ok(())
    })?;
    no_wrong(&book)?;
    // The order to stop may come first; both are an end.
    ensure!(
        matches!(ended, Ended::PoweredOff(0) | Ended::Stopped),
        "the guest ended otherwise: {ended:?}"
    );
    figures.add("withheld_power_off", true);
    Ok(())
}

/// Every step between record and release, several times each, and at no step in particular.
fn killed_at_every_step(run: &Run, figures: &mut Figures) -> Result<()> {
    let scaffold = Scaffold::new()?;
    let mut random = Random::new(run.seed ^ 2);
    let mut sum = Verdict::default();
    let (mut deaths, mut held, mut repeated, mut leftover) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut die = |death: Death, seed: u64| -> Result<()> {
        let verdict = scaffold
            .run(death, seed)
            .with_context(|| format!("killed {death:?}, seed {seed}"))?;
        deaths += 1;
        sum.entries += verdict.entries;
        sum.left += verdict.left;
        held += u64::from(verdict.held > 0);
        repeated += u64::from(verdict.repeats > 0);
        leftover += u64::from(verdict.leftover > 0);
        Ok(())
    };
    for step in Step::value_variants() {
        for round in 0..run.form.count(2, 20) {
            // The first ones while the guest boots, the others under way.
            let at = match round {
                0 => 1 + random.below(3),
                _ => 1 + random.below(run.form.pick(150, 600)),
            };
            die(Death::AtStep(*step, at), random.next())?;
        }
    }
    run.say(format!(
        "{} deaths at a step judged",
        Step::value_variants().len()
    ));
    for _ in 0..run.form.count(6, 100) {
        let after = random.between(
            Duration::ZERO,
            Duration::from_millis(run.form.pick(60, 400)),
        );
        die(Death::After(after), random.next())?;
    }
    // A harness in which nothing was ever inside at the moment of death would show nothing.
    let told = match run.form {
        // Of so few not every kind need be there.
        Form::Brief => held + repeated + leftover > 0,
        _ => held > 0 && repeated > 0 && leftover > 0,
    };
    ensure!(
        told,
        "of {deaths} deaths {held} held outputs back, {repeated} left some to repeat, {leftover} left frames: too few to tell"
    );
    figures.add("steps", Step::value_variants().len());
    figures.add("deaths", deaths);
    figures.add("deaths_with_outputs_held", held);
    figures.add("deaths_with_repeats", repeated);
    figures.add("deaths_with_frames_left_over", leftover);
    figures.add("deaths_entries", sum.entries);
    figures.add("deaths_outputs_left", sum.left);
    Ok(())
}

/// Clients of real pairs: what they were told is true on the survivor.
fn killed_under_clients(run: &Run, figures: &mut Figures) -> Result<()> {
    let wanted = run.form.count(10, 200) as usize;
    let mut kills = Vec::new();
    let mut unprotected = 0;
    alone(|| {
        let stage = Stage::enter()?;
        let mut random = Random::new(run.seed ^ 3);
        for attempt in 0.. {
            match one_kill(&stage, attempt, &mut random)
                .with_context(|| format!("kill {attempt}"))?
            {
                Some(killed) => kills.push(killed),
                // It served alone before we came: such a death is nobody's promise.
                None => unprotected += 1,
            }
            ensure!(
                unprotected <= wanted,
                "{unprotected} of {} pairs had lost their protection before the kill: is this host too busy?",
                attempt + 1
            );
            if kills.len() == wanted {
                return Ok(());
            }
            if kills.len() % 20 == 19 {
                run.say(format!("{} pairs failed over", kills.len()));
            }
        }
        Ok(())
    })?;
    let mut stalls: Vec<Duration> = kills.iter().map(|killed| killed.stall).collect();
    stalls.sort_unstable();
    let sum = |of: fn(&Killed) -> u64| kills.iter().map(of).sum::<u64>();
    figures.add("kills", wanted);
    figures.add("kills_requests", sum(|killed| killed.requests));
    figures.add("kills_acknowledged_writes", sum(|killed| killed.writes));
    figures.add("kills_outputs_sent_again", sum(|killed| killed.resent));
    figures.add("kills_frames_inherited", sum(|killed| killed.inherited));
    figures.add(
        "kills_client_stall_ms_p50",
        milliseconds(stalls[stalls.len() / 2]),
    );
    figures.add(
        "kills_client_stall_ms_max",
        milliseconds(stalls[stalls.len() - 1]),
    );
    figures.add("pairs_unprotected_before_the_kill", unprotected);
    Ok(())
}

fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e4).round() / 10.0
}

struct Killed {
    requests: u64,
    writes: u64,
    resent: u64,
    inherited: u64,
    stall: Duration,
}

/// One pair, killed under its clients. `None` if its primary had lost its backup before and said so.
fn one_kill(stage: &Stage, number: u64, random: &mut Random) -> Result<Option<Killed>> {
    let directory = stage.directory().join(format!("kill-{number}"));
    let mut pair = stage.pair_in(&directory, "kv", "")?;
    let mut clients = Clients::start(GUEST, 3, random.next())?;
    clients.await_answers(1 + random.below(300))?;
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(20)));
    let killed_at = Moment::now();
    pair.primary.kill();
    let is_live = |event: &Event| matches!(event, Event::Live { .. });
    let live = pair.backup.wait_for(PATIENCE, is_live, drop);
    let Some(Event::Live {
        resent,
        inherited_frames,
        ..
    }) = live
    else {
        if !is_protected(&directory)? {
            return Ok(None);
        }
        bail!(
            "the backup did not go live; it said: {}",
            pair.backup.messages()
        );
    };
    clients.await_answers(50)?;
    let outcome = clients.stop_and_verify()?;
    Ok(Some(Killed {
        requests: outcome.requests,
        writes: outcome.writes,
        resent: resent as u64,
        inherited: inherited_frames as u64,
        stall: outcome.longest_since(killed_at),
    }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
