//! The protocol's own machines, in every order of events that a small configuration permits.
//!
//! Time is abstracted: a machine's clock stands still until the model says that a timeout is over, which it may say at any time.
//! So every silence, true or mistaken, every claim that is too old and every lost patience is one of the orders. An arbiter's answer
//! may be lost, or its request come late; a process may die between any two events; entries, commits, fences and answers come in
//! any order that their carriers permit. What is checked is what the [simulator](crate::simulator) checks, in every state; and in
//! every state from which nothing but a fault leads on, that the machine is served if anybody has a copy that may serve it.
//!
//! `docs/decisions/protocol-proof.md` says what is left out.
#![forbid(unsafe_code)]

mod check;
mod process;
mod replacing;
mod state;
mod steps;

#[cfg(test)]
mod tests;

use stateright::{Checker, Model, Property};

pub use state::State;
pub use steps::Step;

use crate::simulator::Plant;

/// How large a world is looked through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// A third process waits to be taken as the next backup.
    pub joiner: bool,
    /// The machine begins unprotected: the second process waits to be taken, too.
    pub alone: bool,
    /// Copies that are begun at most: one that came to nothing could be tried again for ever.
    pub joins: u8,
    /// Outputs that a guest makes at most.
    pub outputs: u8,
    /// Processes that die at most.
    pub deaths: u8,
    /// Requests of which no answer comes at most.
    pub lost_answers: u8,
    /// Copies that turn out to be of no use at most.
    pub unfit: u8,
    /// Whether the machine may be powered off.
    pub power_off: bool,
    /// Switch-overs that the operator orders at most.
    pub switches: u8,
    /// Replacements of the backup that the operator orders at most; the third process is the new one.
    pub replacements: u8,
    /// Events that are put one after the other at most; none: all.
    pub depth: usize,
}

/// The model of this scope, with a rule broken if one is planted.
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// How large.
    pub scope: Scope,
    /// What is broken.
    pub plant: Option<Plant>,
}

/// The plants that this model can tell. That nobody is left to take over it cannot: any process may die at any time.
pub const PLANTS: [Plant; 12] = [
    Plant::NoFence,
    Plant::DrainBeforeFence,
    Plant::NoArbiter,
    Plant::ClaimFromRecordJustRead,
    Plant::StaleBackup,
    Plant::EarlyRelease,
    Plant::AckBeforeStore,
    Plant::JoinerNotWaitedFor,
    Plant::ReadyBeforeWhole,
    Plant::HandsOverAndRunsOn,
    Plant::NewLogBeforeSwap,
    Plant::ReclaimsUnasked,
];

impl Model for World {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(self)]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        state.steps(self, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        next.take(self, step);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every rule holds", |_, state: &State| {
                state.broken().is_none()
            }),
            Property::always("nobody waits for ever", |world, state: &State| {
                !state.is_stuck(world)
            }),
        ]
    }
}

/// What a search came to.
#[derive(Clone, Debug)]
pub struct Looked {
    /// Different states.
    pub states: usize,
    /// The longest way to one of them that was gone.
    pub depth: usize,
    /// What is broken, and the steps that lead there.
    pub broken: Option<String>,
}

/// Looks through every state, over this many threads.
#[must_use]
pub fn look(world: World, threads: usize) -> Looked {
    let (depth, is_planted) = (world.scope.depth, world.plant.is_some());
    let checker = world.checker().threads(threads);
    if depth == 0 && !is_planted {
        // Depth first a few states are kept whole, and 8 bytes of each other; breadth first whole generations of millions were.
        return looked(&checker.spawn_dfs().join());
    }
    // What is found first has the shortest way; and within a depth every state is met by its shortest.
    let checker = match depth {
        0 => checker,
        depth => checker.target_max_depth(depth),
    };
    looked(&checker.spawn_bfs().join())
}

fn looked(checker: &impl Checker<World>) -> Looked {
    let broken = checker
        .discoveries()
        .into_iter()
        .next()
        .map(|(rule, path)| {
            let what = path.last_state().broken();
            let steps: Vec<String> = path
                .into_actions()
                .iter()
                .map(|step| format!("{step:?}"))
                .collect();
            format!(
                "{}: {}",
                what.unwrap_or_else(|| rule.to_owned()),
                steps.join(", ")
            )
        });
    Looked {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        broken,
    }
}
