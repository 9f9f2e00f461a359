//! The model itself: what it reaches, and that it can tell.

use super::*;

const PAIR: Scope = Scope {
    joiner: false,
    alone: false,
    joins: 0,
    outputs: 2,
    deaths: 1,
    lost_answers: 0,
    unfit: 0,
    power_off: false,
    switches: 0,
    replacements: 0,
    depth: 0,
};

/// Whether some state of this scope has it.
fn reaches(scope: Scope, what: fn(&State) -> bool) -> bool {
    let mut seen = std::collections::HashSet::new();
    let world = World { scope, plant: None };
    let mut next = world.init_states();
    while let Some(state) = next.pop() {
        if what(&state) {
            return true;
        }
        if seen.insert(state.clone()) {
            next.extend(world.next_states(&state));
        }
    }
    false
}

#[test]
fn a_pair_is_clean_and_is_looked_through_far_enough() {
    let looked = look(
        World {
            scope: PAIR,
            plant: None,
        },
        2,
    );
    assert_eq!(looked.broken, None);
    assert!(looked.states > 10_000, "{looked:?}");
}

#[test]
fn the_model_comes_to_what_it_is_about() {
    assert!(reaches(PAIR, State::was_taken_over), "a take-over");
    assert!(reaches(PAIR, State::was_reclaimed), "a claim taken back");
    let joining = Scope {
        alone: true,
        joins: 1,
        ..PAIR
    };
    let switching = Scope {
        deaths: 0,
        switches: 1,
        ..PAIR
    };
    assert!(reaches(switching, State::was_handed_over), "a switch-over");
    let replacing = Scope {
        deaths: 0,
        outputs: 1,
        joiner: true,
        replacements: 1,
        ..PAIR
    };
    assert!(reaches(replacing, State::was_replaced), "a replacement");
    assert!(
        reaches(joining, State::is_protected),
        "a backup that joined"
    );
    assert!(reaches(joining, State::was_taken_over), "its take-over");
}
