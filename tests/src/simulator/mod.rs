//! Three hosts, a network, logs and an arbiter, all in one seeded event queue, driven by the very protocol code that the
//! program runs ([`hypervisor::protocol`]).
//!
//! ```text
//!   plan (seed) ──▶ faults ─┐
//!                           ▼
//!   processes: Primary | Candidate | Backup ──actions──▶ datagrams, connections, logs, arbiter, gates ──events──▶ processes
//!                           │                                                                        (delayed, lost, twice)
//!                           ▼ after every event
//!                        check: one machine releases · what was released is covered · the record only rises
//! ```
//!
//! A guest is a chain of steps, each with an output. A copy that goes another way than the world saw is told apart from one
//! that is merely behind ([`history`]). What is checked:
//!
//! - at every step at most one process could send the world something new;
//! - what leaves continues what has left before, or repeats it;
//! - every process that the arbiter's record lets go live, or go on, holds all that has left;
//! - as long as nothing has gone wrong, whoever is entitled lives, also while the operator moves the machine or its backup;
//! - after a single fault at a protected machine nobody waits for longer than [`Tally::longest_gap`]'s bound, and the machine is
//!   never lost;
//! - once faults stop, the machine is served and protected again.
//!
//! [`Plant`]s break the *surroundings* of the protocol code, each in one way, and must be found. `docs/decisions/protocol-proof.md`
//! says what is modelled and how a seed is replayed.
#![forbid(unsafe_code)]

mod agents;
mod arbiter;
mod check;
mod drive;
mod faults;
mod history;
mod joining;
mod log;
mod process;
mod replacing;
mod world;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rdma_log::locks::lock;

pub(crate) use drive::takes_back;
use world::World;

/// Microseconds since the simulation began.
pub type Micros = u64;

const MS: Micros = 1000;

/// A rule that is broken on purpose, to show that its breach is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plant {
    /// The fence reports success and does nothing.
    NoFence,
    /// The fence reports success before it takes effect, so the drain begins too early.
    DrainBeforeFence,
    /// The arbiter says yes to everybody.
    NoArbiter,
    /// A backup's claim starts from whatever the record is just then.
    ClaimFromRecordJustRead,
    /// The arbiter does not compare configurations: a backup that was given up can claim.
    StaleBackup,
    /// The gate opens when the guest runs, not when `live` is confirmed.
    EarlyRelease,
    /// The log says that an entry has committed before the backup has it.
    AckBeforeStore,
    /// Outputs do not wait for a backup that joins.
    JoinerNotWaitedFor,
    /// A backup that joins says that it is ready before its copy is whole.
    ReadyBeforeWhole,
    /// A primary that has handed the machine over lets its guest run on, and its outputs out.
    HandsOverAndRunsOn,
    /// The backup that is to be replaced is let go before the arbiter's swap.
    OldLetGoBeforeSwap,
    /// The guest runs on with the new backup's log before the arbiter's swap.
    NewLogBeforeSwap,
    /// A frozen primary that takes a claim back, because it is old or whoever made it is gone, serves before the arbiter has answered.
    ReclaimsUnasked,
}

impl Plant {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::NoFence,
        Self::DrainBeforeFence,
        Self::NoArbiter,
        Self::ClaimFromRecordJustRead,
        Self::StaleBackup,
        Self::EarlyRelease,
        Self::AckBeforeStore,
        Self::JoinerNotWaitedFor,
        Self::ReadyBeforeWhole,
        Self::HandsOverAndRunsOn,
        Self::OldLetGoBeforeSwap,
        Self::NewLogBeforeSwap,
        Self::ReclaimsUnasked,
    ];
}

/// What was broken, and how it came to that.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The seed that shows it.
    pub seed: u64,
    /// The rule.
    pub what: String,
    /// The events that led to it, for people.
    pub story: Vec<String>,
}

/// So many of a story's last lines say how it ended.
const LAST_LINES: usize = 80;

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.what)?;
        let tail = self.story.len().saturating_sub(LAST_LINES);
        f.write_str(&self.story[tail..].join("\n"))
    }
}

/// What simulations went through.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Simulations.
    pub seeds: u64,
    /// Events handled.
    pub events: u64,
    /// Outputs that the world saw.
    pub outputs: u64,
    /// Most outputs' worst wait after a single fault, in microseconds.
    pub longest_gap: Micros,
    /// What happened, and how often.
    pub said: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.outputs += other.outputs;
        self.longest_gap = self.longest_gap.max(other.longest_gap);
        for (what, times) in &other.said {
            *self.said.entry(what).or_default() += times;
        }
    }
}

/// Runs one seed.
///
/// # Errors
/// The rule that does not hold, with the events that led there.
pub fn run(seed: u64, plant: Option<Plant>) -> Result<Tally, Box<Violation>> {
    let mut world = World::new(seed, plant, false);
    let Err(what) = world.run() else {
        return Ok(world.into_tally());
    };
    let (again, story) = story(seed, plant);
    let again = again.err();
    assert_eq!(
        again.as_ref(),
        Some(&what),
        "seed {seed} does not repeat itself"
    );
    Err(Box::new(Violation { seed, what, story }))
}

/// Runs one seed and tells everything that happened.
pub fn story(seed: u64, plant: Option<Plant>) -> (Result<(), String>, Vec<String>) {
    let mut world = World::new(seed, plant, true);
    let result = world.run();
    (result, world.into_story())
}

/// Runs `count` seeds from `first` on over this many threads, until one fails.
///
/// # Errors
/// The first violation that was met.
pub fn run_many(first: u64, count: u64, threads: usize) -> Result<Tally, Box<Violation>> {
    let next = AtomicU64::new(0);
    let outcome = Mutex::new((Tally::default(), None));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let result = run(first.wrapping_add(number), None);
                    let mut outcome = lock(&outcome);
                    match result {
                        Ok(tally) => outcome.0.add(&tally),
                        Err(violation) => {
                            next.store(count, Ordering::Relaxed);
                            outcome.1.get_or_insert(violation);
                        }
                    }
                }
            });
        }
    });
    let (tally, violation) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    match violation {
        None => Ok(tally),
        Some(violation) => Err(violation),
    }
}

/// The first of `count` seeds from `first` on that notices the plant.
#[must_use]
pub fn find(plant: Plant, first: u64, count: u64) -> Option<Box<Violation>> {
    (first..first.saturating_add(count)).find_map(|seed| run(seed, Some(plant)).err())
}
