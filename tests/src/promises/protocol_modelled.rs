//! Who lives (issue 6, point 2): the protocol's own code in every order of events of small configurations, exhaustively.
#![forbid(unsafe_code)]

use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::promise::{Figures, Form, Promise, Run};
use crate::protocol_model::{PLANTS, Scope, World, look};
use crate::simulator::Plant;

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "protocol-modelled",
    line: "in every order of events of small configurations at most one machine releases output, and nothing released is lost",
    short: Duration::from_secs(45),
    full: Duration::from_secs(180),
    show,
};

/// A pair, without any fault but mistaken silences.
const PAIR: Scope = Scope {
    joiner: false,
    alone: false,
    joins: 0,
    outputs: 2,
    deaths: 0,
    lost_answers: 0,
    unfit: 0,
    power_off: false,
    switches: 0,
    replacements: 0,
    depth: 0,
};

/// A pair whose backup is replaced: three processes, too many for every order of all that can happen to them. A replacement without
/// anything beside it takes nine events until the new backup has heard that it is one.
const REPLACE: Scope = Scope {
    joiner: true,
    replacements: 1,
    ..PAIR
};

/// What is looked through in either form.
const SMALL: &[(&str, Scope)] = &[
    (
        "pair",
        Scope {
            deaths: 1,
            lost_answers: 1,
            ..PAIR
        },
    ),
    (
        "pair_unfit",
        Scope {
            unfit: 1,
            deaths: 1,
            ..PAIR
        },
    ),
    (
        "switch",
        Scope {
            switches: 1,
            deaths: 1,
            lost_answers: 1,
            ..PAIR
        },
    ),
    (
        "replace",
        Scope {
            outputs: 1,
            deaths: 1,
            depth: 14,
            ..REPLACE
        },
    ),
    (
        "join",
        Scope {
            alone: true,
            joins: 1,
            outputs: 1,
            deaths: 1,
            lost_answers: 1,
            ..PAIR
        },
    ),
];

/// And in the full form.
const LARGE: &[(&str, Scope)] = &[
    (
        "replace_longer",
        Scope {
            deaths: 1,
            lost_answers: 1,
            depth: 16,
            ..REPLACE
        },
    ),
    (
        "pair_all",
        Scope {
            deaths: 1,
            lost_answers: 1,
            unfit: 1,
            power_off: true,
            ..PAIR
        },
    ),
    (
        "switch_all",
        Scope {
            switches: 2,
            deaths: 1,
            lost_answers: 1,
            unfit: 1,
            power_off: true,
            outputs: 1,
            ..PAIR
        },
    ),
    // Three processes again. All orders of this were not come to the end of: the search was stopped after twenty minutes.
    (
        "switch_and_join",
        Scope {
            joiner: true,
            joins: 1,
            switches: 1,
            deaths: 1,
            outputs: 1,
            depth: 22,
            ..PAIR
        },
    ),
    (
        "join_longer",
        Scope {
            alone: true,
            joins: 1,
            deaths: 1,
            lost_answers: 1,
            ..PAIR
        },
    ),
    (
        "join_twice",
        Scope {
            alone: true,
            joins: 2,
            outputs: 1,
            deaths: 1,
            lost_answers: 1,
            ..PAIR
        },
    ),
];

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let threads = available_parallelism().map_or(1, usize::from);
    let large = if run.form == Form::Full { LARGE } else { &[] };
    for (name, scope) in SMALL.iter().chain(large) {
        let started = Instant::now();
        let looked = look(
            World {
                scope: *scope,
                plant: None,
            },
            threads,
        );
        if let Some(broken) = looked.broken {
            bail!("{name}: {broken}");
        }
        figures.add(&format!("{name}_states"), looked.states);
        figures.add(&format!("{name}_depth"), looked.depth);
        run.say(format!(
            "{name}: {} states, depth {}, {:.1} s",
            looked.states,
            looked.depth,
            started.elapsed().as_secs_f64()
        ));
    }
    for plant in PLANTS {
        let looked = look(
            World {
                scope: scope_of(plant),
                plant: Some(plant),
            },
            threads,
        );
        ensure!(
            looked.broken.is_some(),
            "{plant:?} was planted and not found in {} states: the model is wrong",
            looked.states
        );
        let broken = looked.broken.unwrap_or_default();
        run.say(format!("{plant:?} is found: {broken}"));
        figures.add(&format!("found_{plant:?}_after_states"), looked.states);
    }
    Ok(figures)
}

/// The smallest world in which a plant can be told.
fn scope_of(plant: Plant) -> Scope {
    match plant {
        Plant::NoFence
        | Plant::DrainBeforeFence
        | Plant::NoArbiter
        | Plant::ClaimFromRecordJustRead
        | Plant::StaleBackup
        | Plant::EarlyRelease
        | Plant::AckBeforeStore
        | Plant::ReclaimsUnasked
        | Plant::OldLetGoBeforeSwap => PAIR,
        Plant::NewLogBeforeSwap => Scope {
            depth: 11,
            ..REPLACE
        },
        Plant::HandsOverAndRunsOn => Scope {
            switches: 1,
            ..PAIR
        },
        Plant::JoinerNotWaitedFor | Plant::ReadyBeforeWhole => Scope {
            alone: true,
            joins: 1,
            ..PAIR
        },
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
