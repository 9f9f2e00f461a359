//! Who lives (issue 6, point 1): the protocol's own code, three hosts, and everything that can go wrong, simulated from seeds.
//!
//! `--seed N` tells the story of that one seed; `--full --seed N` begins there.
#![forbid(unsafe_code)]

use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::harness::random::Random;
use crate::promise::{Figures, Form, Promise, Run};
use crate::simulator::{self, Plant};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "protocol-simulated",
    line: "at most one machine releases output, and what was released is never lost: simulated crashes, freezes, partitions and lost answers",
    short: Duration::from_secs(10),
    full: Duration::from_secs(900),
    show,
};

/// Within so many seeds a planted bug must be found.
const PLANTED: u64 = 1000;

fn show(run: &Run) -> Result<Figures> {
    if run.chosen && run.form == Form::Short {
        return tell(run);
    }
    let mut figures = Figures::default();
    // Fresh seeds each day; one that is asked for by name is the first.
    let first = if run.chosen {
        run.seed
    } else {
        Random::new(run.seed).next() >> 1
    };
    let count = run.form.pick(3000, 100_000);
    let threads = available_parallelism().map_or(1, usize::from);
    let started = Instant::now();
    let tally = match simulator::run_many(first, count, threads) {
        Ok(tally) => tally,
        Err(violation) => bail!("{violation}"),
    };
    figures.add("first_seed", first);
    figures.add("seeds", tally.seeds);
    figures.add("events", tally.events);
    figures.add("outputs", tally.outputs);
    figures.add("longest_wait_after_one_fault_ms", tally.longest_gap / 1000);
    let seconds = started.elapsed().as_secs_f64();
    figures.add("seeds_a_second", (tally.seeds as f64 / seconds) as u64);
    for (what, times) in &tally.said {
        figures.add(&what.replace(' ', "_"), *times);
    }
    run.say(format!("{} seeds are clean", tally.seeds));
    for plant in Plant::ALL {
        let found = simulator::find(plant, first, PLANTED);
        ensure!(
            found.is_some(),
            "{plant:?} was planted and not found in {PLANTED} seeds from {first} on: the simulator is wrong"
        );
        let at = found.map_or(0, |violation| violation.seed - first + 1);
        run.say(format!("{plant:?} is found by seed number {at}"));
        figures.add(&format!("found_{plant:?}"), at);
    }
    Ok(figures)
}

/// What happened in one seed, line by line.
fn tell(run: &Run) -> Result<Figures> {
    let (result, story) = simulator::story(run.seed, None);
    let mut figures = Figures::default();
    figures.add("lines", story.len());
    for line in story {
        run.say(line);
    }
    match result {
        Ok(()) => Ok(figures),
        Err(what) => bail!("{what}"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
