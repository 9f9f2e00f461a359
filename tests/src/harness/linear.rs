//! Whether a history of a key-value store is linearizable: whether each operation can have happened at one moment between its
//! request and its answer, so that all the answers are true.
//!
//! Keys are independent of each other, so each is checked alone. The check walks along the history and keeps every state in
//! which the key can be: its value, and which of the operations under way have happened. An operation must have happened when
//! its answer comes. (Wing and Gong's search in the order of Lowe, *Testing for linearizability*, 2017.) It is exact: states
//! are as many as values times sets of operations under way, and each connection has one at most.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use hypervisor::backends::wait::Moment;

/// What was asked of a key, and the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// SET.
    Set(u64),
    /// SET NX: whether there was no value.
    SetIfNone(u64, bool),
    /// GET.
    Get(Option<u64>),
    /// INCR: the value afterwards.
    Increment(u64),
    /// DEL: whether there was a value.
    Delete(bool),
}

impl Operation {
    /// The value afterwards, if from this value the answer is true.
    fn apply(self, value: Option<u64>) -> Option<Option<u64>> {
        match self {
            Self::Set(new) => Some(Some(new)),
            Self::SetIfNone(new, done) => {
                (done == value.is_none()).then_some(if done { Some(new) } else { value })
            }
            Self::Get(found) => (found == value).then_some(value),
            Self::Increment(after) => (value.unwrap_or(0) + 1 == after).then_some(Some(after)),
            Self::Delete(done) => (done == value.is_some()).then_some(None),
        }
    }
}

/// An operation, when it was asked for and when answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Whose it is: a connection has one under way at most.
    pub client: u32,
    /// What and what came of it.
    pub operation: Operation,
    /// Before the request was sent.
    pub asked: Moment,
    /// After the answer was read.
    pub answered: Moment,
}

/// What a check has looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Operations.
    pub operations: usize,
    /// The most states in which the key could be at once.
    pub states: usize,
    /// The most operations under way at once.
    pub under_way: usize,
}

/// A state in which a key can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    value: Option<u64>,
    /// Bit by client: the operation that it has under way has happened.
    happened: u64,
}

/// Checks the history of one key, which had no value before.
///
/// # Errors
/// The first answer that cannot be true, and what was under way.
pub fn check(history: &[Done]) -> Result<Checked> {
    let mut moments: Vec<(Moment, bool, usize)> = Vec::with_capacity(2 * history.len());
    for (at, done) in history.iter().enumerate() {
        ensure!(done.client < 64, "more than 64 clients");
        ensure!(done.asked <= done.answered, "answered before it was asked");
        moments.push((done.asked, false, at));
        moments.push((done.answered, true, at));
    }
    // Of two at the same moment the request goes first: then they overlap, which forbids less.
    moments.sort_unstable();
    let mut under_way: Vec<Option<usize>> = vec![None; 64];
    let mut states = HashSet::from([State {
        value: None,
        happened: 0,
    }]);
    let mut checked = Checked {
        operations: history.len(),
        states: 1,
        under_way: 0,
    };
    for (_, answered, at) in moments {
        let client = history[at].client as usize;
        if !answered {
            let before = under_way[client].replace(at);
            ensure!(before.is_none(), "client {client} has two under way");
            let count = under_way.iter().flatten().count();
            checked.under_way = checked.under_way.max(count);
            continue;
        }
        let next = after_the_answer(client, &under_way, history, &states);
        if next.is_empty() {
            return Err(false_answer(at, &under_way, history, &states));
        }
        under_way[client] = None;
        checked.states = checked.states.max(next.len());
        states = next;
    }
    Ok(checked)
}

/// The states that are left when this client's operation must have happened.
fn after_the_answer(
    client: usize,
    under_way: &[Option<usize>],
    history: &[Done],
    states: &HashSet<State>,
) -> HashSet<State> {
    let bit = 1u64 << client;
    let mut seen = states.clone();
    let mut left: Vec<State> = states.iter().copied().collect();
    let mut next = HashSet::new();
    while let Some(state) = left.pop() {
        if state.happened & bit != 0 {
            let happened = state.happened & !bit;
            next.insert(State { happened, ..state });
            continue;
        }
        for (other, at) in under_way.iter().enumerate() {
            let Some(at) = *at else { continue };
            if state.happened & 1 << other != 0 {
                continue;
            }
            let Some(value) = history[at].operation.apply(state.value) else {
                continue;
            };
            let then = State {
                value,
                happened: state.happened | 1 << other,
            };
            if seen.insert(then) {
                left.push(then);
            }
        }
    }
    next
}

fn false_answer(
    at: usize,
    under_way: &[Option<usize>],
    history: &[Done],
    states: &HashSet<State>,
) -> anyhow::Error {
    let mut values: Vec<_> = states.iter().map(|state| state.value).collect();
    values.sort_unstable();
    values.dedup();
    let others: Vec<_> = under_way
        .iter()
        .flatten()
        .filter(|&&other| other != at)
        .map(|&other| history[other].operation)
        .collect();
    anyhow::anyhow!(
        "the answer to operation {at}, {:?}, cannot be true: the key could hold {values:?}, and under way were {others:?}",
        history[at]
    )
}

/// Checks the histories of many keys.
///
/// # Errors
/// The first answer that cannot be true.
pub fn check_all<'a>(histories: impl IntoIterator<Item = &'a [Done]>) -> Result<Checked> {
    let mut all = Checked::default();
    for (key, history) in histories.into_iter().enumerate() {
        let checked = check(history).with_context(|| format!("key {key}"))?;
        all.operations += checked.operations;
        all.states = all.states.max(checked.states);
        all.under_way = all.under_way.max(checked.under_way);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::random::Random;

    fn done(client: u32, operation: Operation, asked: u64, answered: u64) -> Done {
        Done {
            client,
            operation,
            asked: Moment::from_nanos(asked),
            answered: Moment::from_nanos(answered),
        }
    }

    use Operation::{Delete, Get, Increment, Set, SetIfNone};

    #[test]
    fn what_overlaps_may_have_happened_in_either_order() {
        let both = [
            done(0, Set(1), 0, 10),
            done(1, Set(2), 5, 15),
            done(2, Get(Some(1)), 12, 14),
            done(2, Get(Some(2)), 16, 18),
        ];
        assert_eq!(check(&both).unwrap().under_way, 2);
        let other = [
            done(0, Set(1), 0, 10),
            done(1, Set(2), 5, 15),
            done(2, Get(Some(1)), 16, 18),
        ];
        check(&other).unwrap();
    }

    #[test]
    fn what_cannot_be_is_found() {
        for history in [
            // A write that was acknowledged and lost.
            vec![done(0, Set(1), 0, 1), done(1, Get(None), 2, 3)],
            // A value that was seen and then taken back.
            vec![
                done(0, Set(1), 0, 1),
                done(0, Set(2), 2, 9),
                done(1, Get(Some(2)), 3, 4),
                done(2, Get(Some(1)), 5, 6),
            ],
            // One that nobody wrote, and one counted twice.
            vec![done(0, Get(Some(7)), 0, 1)],
            vec![done(0, Increment(1), 0, 1), done(1, Increment(1), 0, 3)],
            vec![
                done(0, SetIfNone(1, true), 0, 5),
                done(1, SetIfNone(2, true), 1, 4),
            ],
            vec![
                done(0, Set(3), 0, 1),
                done(0, Delete(true), 2, 9),
                done(1, Delete(true), 2, 9),
            ],
        ] {
            check(&history).unwrap_err();
        }
    }

    #[test]
    fn a_request_in_hand_may_come_into_effect_late() {
        // The INCR is asked for first and answered last, and its effect seen in between.
        let history = [
            done(0, Increment(6), 0, 100),
            done(1, Set(5), 10, 20),
            done(1, Get(Some(5)), 30, 40),
            done(1, Get(Some(6)), 50, 60),
        ];
        check(&history).unwrap();
        let mut torn = history;
        torn[2].operation = Get(Some(6));
        torn[3].operation = Get(Some(5));
        check(&torn).unwrap_err();
    }

    /// Operations with the moments at which they happen, in that order; spans around them, which do not overlap for one client.
    fn history(random: &mut Random, clients: u64, count: u64) -> Vec<Done> {
        let mut free = vec![0u64; clients as usize];
        let (mut value, mut now) = (None, 0);
        let mut history = Vec::new();
        for number in 0..count {
            let client = random.below(clients) as usize;
            now = free[client].max(now) + 1 + random.below(5);
            let operation = match random.below(5) {
                0 => Set(1000 * (number + 1)),
                1 => SetIfNone(1000 * (number + 1), value.is_none()),
                2 => Get(value),
                3 => Increment(value.unwrap_or(0) + 1),
                _ => Delete(value.is_some()),
            };
            value = operation.apply(value).expect("it is true");
            let asked = now - random.below(now - free[client]);
            let answered = now + random.below(20);
            free[client] = answered + 1;
            history.push(done(client as u32, operation, asked, answered));
        }
        history
    }

    /// Tries every order.
    fn has_an_order(value: Option<u64>, left: &[Done]) -> bool {
        left.is_empty()
            || left.iter().enumerate().any(|(at, first)| {
                let mut rest = left.to_vec();
                rest.remove(at);
                let waits = rest.iter().any(|other| other.answered < first.asked);
                !waits
                    && first
                        .operation
                        .apply(value)
                        .is_some_and(|value| has_an_order(value, &rest))
            })
    }

    #[test]
    fn it_agrees_with_trying_every_order() {
        let mut random = Random::new(1);
        let mut verdicts = [0; 2];
        for _ in 0..3000 {
            let mut history = history(&mut random, 3, 6);
            // Often a false answer, or one at another time.
            if random.below(3) > 0 {
                let (at, other) = (random.below(6) as usize, random.below(6) as usize);
                history[at].operation = match random.below(3) {
                    0 => Get(None),
                    1 => history[other].operation,
                    _ => Increment(1),
                };
            }
            let expected = has_an_order(None, &history);
            assert_eq!(check(&history).is_ok(), expected, "{history:?}");
            verdicts[usize::from(expected)] += 1;
        }
        assert!(verdicts.iter().all(|&count| count > 300), "{verdicts:?}");
    }

    #[test]
    fn long_true_histories_pass_and_one_stale_answer_in_them_does_not() {
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let mut history = history(&mut random, 8, 2000);
            let checked = check(&history).unwrap();
            assert!(checked.under_way > 3, "{checked:?}");
            // A value of long ago.
            let at = 1000 + random.below(1000) as usize;
            history[at].operation = Get(Some(1000));
            check(&history).unwrap_err();
        }
    }
}
