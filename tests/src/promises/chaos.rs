//! Anything may happen to a pair under load, one thing after the other (issue 6, the proof's part c): it is served by one machine at most,
//! protected again each time, and its clients were told nothing but the truth.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::harness::chaos::{Chaos, HAPPENINGS, Happening};
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
    let deck = deck(happenings, &mut random);
    let mut figures = Figures::default();
    alone(|| {
        let mut chaos = Chaos::start()?;
        let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
        let mut counted: BTreeMap<String, u32> = BTreeMap::new();
        for (number, what) in deck.iter().enumerate() {
            let which = || format!("happening {} of {happenings}, {what:?}", number + 1);
            chaos.serves(&mut clients).with_context(which)?;
            std::thread::sleep(random.between(BEFORE[0], BEFORE[1]));
            run.say(which());
            chaos.happen(*what, &mut random).with_context(which)?;
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
        figures.add("happenings", json!(counted));
        figures.add("take_overs", lived.take_overs);
        figures.add("migrations_called_off", lived.called_off);
        figures.add("ends", json!(lived.ends));
        figures.add("operations", checked.operations);
        figures.add("violations", 0);
        figures.add("longest_wait_ms", longest.as_millis() as u64);
        Ok(())
    })?;
    Ok(figures)
}

/// So many happenings, in an order that is drawn; all of them come about equally often.
fn deck(count: usize, random: &mut Random) -> Vec<Happening> {
    let mut deck: Vec<Happening> = HAPPENINGS.iter().copied().cycle().take(count).collect();
    for at in (1..deck.len()).rev() {
        deck.swap(at, random.below(at as u64 + 1) as usize);
    }
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
        let mut deck = deck(HAPPENINGS.len(), &mut Random::new(1));
        deck.sort_unstable();
        assert_eq!(deck, HAPPENINGS);
    }
}
