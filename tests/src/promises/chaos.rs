//! Anything may happen to a pair under load, one thing after the other (issue 6, the proof's part c): it is served by one machine at most,
//! protected again each time, and its clients were told nothing but the truth.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::chaos::namespaces::{HAPPENINGS, Namespaces};
use crate::harness::chaos::{Chaos, Ground, Happening, Lived};
use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "chaos",
    line: "sides killed, frozen, cut off, corrupted and moved at random, under load: never two live machines, no lost write, protected again",
    short: Duration::from_secs(30),
    full: Duration::from_secs(240),
    show,
};

const CLIENTS: u32 = 6;

/// How long clients are at work before something happens.
const BEFORE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(400)];

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let happenings = run.form.pick(2 * HAPPENINGS.len(), 200);
    let deck = deck(&HAPPENINGS, happenings, &mut random);
    let mut figures = Figures::default();
    alone(|| {
        let chaos = Chaos::start(Namespaces::enter()?)?;
        let clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
        let endured = endure(run, chaos, clients, &deck, &mut random)?;
        endured.add_to("", &mut figures);
        Ok(())
    })?;
    Ok(figures)
}

/// What became of a pair and its clients to which everything of a deck has happened.
#[derive(Debug)]
pub(super) struct Endured {
    counted: BTreeMap<String, u32>,
    lived: Lived,
    operations: usize,
    longest: Duration,
}

impl Endured {
    /// Adds it, by names that begin so.
    pub(super) fn add_to(self, name: &str, figures: &mut Figures) {
        let mut add = |what: &str, value: Value| figures.add(&format!("{name}{what}"), value);
        add("happenings", json!(self.counted));
        add("take_overs", json!(self.lived.take_overs));
        add("migrations_called_off", json!(self.lived.called_off));
        add("ends", json!(self.lived.ends));
        add("operations", json!(self.operations));
        add("violations", json!(0));
        add("longest_wait_ms", json!(self.longest.as_millis() as u64));
    }
}

/// Everything of the deck happens, one thing after the other, and the machine is turned off.
pub(super) fn endure<G: Ground>(
    run: &Run,
    mut chaos: Chaos<G>,
    mut clients: LinearClients,
    deck: &[Happening],
    random: &mut Random,
) -> Result<Endured> {
    let mut counted: BTreeMap<String, u32> = BTreeMap::new();
    for (number, what) in deck.iter().enumerate() {
        let which = || format!("happening {} of {}, {what:?}", number + 1, deck.len());
        chaos.serves(&mut clients).with_context(which)?;
        std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
        run.say(which());
        chaos.happen(*what, random).with_context(which)?;
        chaos.settle().with_context(which)?;
        *counted.entry(format!("{what:?}")).or_default() += 1;
    }
    chaos.serves(&mut clients)?;
    let histories = clients.end()?;
    let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
    let lived = chaos.end()?;
    let longest = longest_wait(&histories);
    run.say(format!(
        "{lived:#?}, {checked:?}, longest wait {longest:.1?}"
    ));
    Ok(Endured {
        counted,
        lived,
        operations: checked.operations,
        longest,
    })
}

/// So many of these happenings, all of them equally often, or all but some of the last round, in an order that is drawn.
pub(super) fn deck(of: &[Happening], count: usize, random: &mut Random) -> Vec<Happening> {
    let mut deck = Vec::new();
    while deck.len() < count {
        let mut round = of.to_vec();
        for at in (1..round.len()).rev() {
            round.swap(at, random.below(at as u64 + 1) as usize);
        }
        deck.extend(round);
    }
    deck.truncate(count);
    deck
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn every_happening_is_in_the_short_form() {
        let mut deck = deck(&HAPPENINGS, HAPPENINGS.len(), &mut Random::new(1));
        deck.sort_unstable();
        assert_eq!(deck, HAPPENINGS);
    }
}
