//! A fixed few thousand seeds, every planted bug, and the seeds that once failed.

use super::*;

/// Seeds that showed a fault of the protocol, and what it was.
const ONCE_FAILED: &[(u64, &str)] = &[(
    114,
    "a candidate whose primary's host had vanished kept its copy, and so did not listen, for ever",
)];

/// What seeds must have met, or they show less than they seem to.
const SITUATIONS: &[&str] = &[
    "taken over",
    "abandoned",
    "reclaimed",
    "went on alone",
    "frozen by a claim",
    "heard again",
    "protected again",
    "joins that failed",
    "copies given up",
    "copies that failed",
    "started anew",
    "ended",
    "handed over",
    "switched over",
    "switch-over called off",
    "switch-over not begun",
    "claimed as told",
    "replacements begun",
    "replaced",
    "not replaced",
    "relieved",
    "questions that failed",
];

#[test]
fn thousands_of_seeds_hold_every_promise_and_meet_every_situation() {
    let tally = run_many(0, 3000, 2).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{tally:?}");
    assert!(tally.outputs > 500_000, "{}", tally.outputs);
    for what in SITUATIONS {
        let times = tally.said.get(what).copied().unwrap_or(0);
        assert!(times >= 20, "{what}: {times} times");
    }
}

#[test]
fn every_planted_bug_is_found() {
    for plant in Plant::ALL {
        let found = find(plant, 0, 1000);
        let violation =
            found.unwrap_or_else(|| panic!("{plant:?} was not found: the harness is wrong"));
        println!("{plant:?}: seed {}: {}", violation.seed, violation.what);
    }
}

#[test]
fn what_once_failed_holds() {
    for (seed, what) in ONCE_FAILED {
        if let Err(violation) = run(*seed, None) {
            panic!("{what}: {violation}");
        }
    }
}

#[test]
fn a_seed_repeats_itself() {
    for seed in 0..20 {
        assert_eq!(story(seed, None), story(seed, None));
    }
}
