//! A process that has a whole copy and waits to be entitled.

use super::super::candidate;
use super::roles::{at, base, beat, claim, failed};
use super::*;

/// A candidate whose primary is A, ready since 0 ms.
struct C {
    machine: Candidate,
}

impl C {
    fn ready() -> Self {
        Self {
            machine: Candidate::new(pair(B, A), Timing::default(), at(0)),
        }
    }

    fn on(&mut self, ms: u64, event: candidate::Event) -> Vec<candidate::Action> {
        let mut actions = Vec::new();
        self.machine.handle(at(ms), event, &mut actions);
        actions
    }

    fn tick(&mut self, ms: u64) -> Vec<candidate::Action> {
        self.on(ms, candidate::Event::Tick)
    }

    fn on_moment(&mut self, now: Moment) -> Vec<candidate::Action> {
        let mut actions = Vec::new();
        let tick = candidate::Event::Tick;
        self.machine.handle(now, tick, &mut actions);
        actions
    }

    fn reads(&mut self, ms: u64, record: Option<Record>) -> Vec<candidate::Action> {
        self.on(ms, candidate::Event::Arbiter(Answer::Read(record)))
    }
}

const READ: candidate::Action = candidate::Action::Ask(Request::Read);

#[test]
fn a_candidate_follows_its_primarys_word_once_the_arbiter_says_the_same() {
    let mut c = C::ready();
    assert_eq!(c.tick(10), []);
    assert_eq!(c.on(11, candidate::Event::Word(base())), [READ]);
    assert_eq!(c.tick(12), [], "one question at a time");
    let follow = [candidate::Action::Follow(base())];
    assert_eq!(c.reads(13, Some(base())), follow);
    assert_eq!((c.tick(5000), c.machine.deadline()), (vec![], None));
}

#[test]
fn a_candidate_takes_no_word_and_no_record_of_another() {
    let other = Record::cold_start(None, Identity::from_bytes([9; 16]), Some(B));
    let refused = candidate::Refusal::NotEntitled(other);
    let mut c = C::ready();
    assert_eq!(
        c.on(1, candidate::Event::Word(other)),
        [candidate::Action::GiveUp(refused)]
    );
    // It is entitled by it, but is no copy of that machine.
    let mut c = C::ready();
    assert_eq!(c.on(1, candidate::Event::PeerDied), [READ]);
    assert_eq!(c.reads(2, Some(other)), []);
}

#[test]
fn a_candidate_that_was_told_sees_whether_the_machine_went_on_or_the_arbiters_differ() {
    for found in [base().detached(), base().ended(), claim()] {
        let mut c = C::ready();
        c.on(1, candidate::Event::Word(base()));
        let refusal = candidate::Refusal::NotEntitled(found);
        assert_eq!(
            c.reads(2, Some(found)),
            [candidate::Action::GiveUp(refusal)]
        );
    }
    // As new as what it was told, and something else: no view of one arbiter is that.
    let mut c = C::ready();
    let told = base().detached();
    let told = Record {
        entitled: Some(B),
        ..told
    };
    c.on(1, candidate::Event::Word(told));
    let found = Some(base().detached());
    let other = candidate::Refusal::OtherArbiter { told, found };
    assert_eq!(c.reads(2, found), [candidate::Action::GiveUp(other)]);
}

/// The primary has swapped, and said so; what this side sees of the arbiter is older than that.
#[test]
fn a_view_of_the_arbiter_that_is_late_is_looked_at_again_and_one_that_stays_so_is_another_s() {
    let told = Record {
        entitled: Some(B),
        ..base().detached()
    };
    for old in [Some(base()), None] {
        let mut c = C::ready();
        assert_eq!(c.on(1, candidate::Event::Word(told)), [READ]);
        assert_eq!(c.reads(2, old), []);
        let again = c.machine.deadline().unwrap();
        assert_eq!(c.on_moment(again), [READ]);
        assert_eq!(
            c.reads(60, Some(told)),
            [candidate::Action::Follow(told)],
            "{old:?}"
        );

        let mut c = C::ready();
        assert_eq!(c.on(1, candidate::Event::Word(told)), [READ]);
        assert_eq!(c.reads(2, old), []);
        let ended = (3..9000).find_map(|ms| {
            let mut actions = c.tick(ms);
            if actions == [READ] {
                actions = c.reads(ms, old);
            }
            (!actions.is_empty()).then_some((ms, actions))
        });
        let (ms, last) = ended.expect("it asks for ever");
        let other = candidate::Refusal::OtherArbiter { told, found: old };
        assert_eq!(last, [candidate::Action::GiveUp(other)]);
        assert!((2000..2100).contains(&ms), "{ms}");
    }
}

#[test]
fn what_was_read_before_the_word_came_is_compared_with_nothing() {
    let mut c = C::ready();
    assert_eq!(c.tick(2000), [READ]);
    assert_eq!(c.on(2001, candidate::Event::Word(base())), []);
    assert_eq!(c.reads(2002, None), [READ]);
    assert_eq!(
        c.reads(2003, Some(base())),
        [candidate::Action::Follow(base())]
    );
}

#[test]
fn a_candidate_whose_word_does_not_come_asks_by_itself() {
    for gone in [true, false] {
        let mut c = C::ready();
        let from = if gone { 1 } else { 2000 };
        if gone {
            assert_eq!(c.on(1, candidate::Event::PeerDied), [READ]);
        } else {
            assert_eq!(c.tick(1999), []);
            assert_eq!(c.tick(2000), [READ]);
        }
        assert_eq!(c.reads(from + 1, None), []);
        assert_eq!(c.tick(from + 50), []);
        assert_eq!(c.tick(from + 51), [READ]);
        let follow = [candidate::Action::Follow(base())];
        assert_eq!(c.reads(from + 52, Some(base())), follow);
    }
}

#[test]
fn a_candidate_gives_its_copy_up_some_time_after_its_primarys_last_sign_of_life() {
    let dropped = [candidate::Action::GiveUp(candidate::Refusal::Dropped)];
    let alone = Record::cold_start(None, A, None);
    let found = Some(alone);
    for gone in [true, false] {
        let mut c = C::ready();
        if gone {
            c.on(0, candidate::Event::PeerDied);
            c.reads(1, found);
        }
        // It lives as long as it beats, whatever the arbiter says; what comes after the connection's end was under way before.
        let mut ms = 2;
        let (mut beats, mut over) = (1, None);
        while over.is_none() && ms < 9000 {
            if ms <= 4000 && ms % 100 == 0 {
                beats += 1;
                let beat = beat(A, alone, beats);
                let actions = c.on(ms, candidate::Event::Heartbeat(beat));
                if actions == [READ] && c.reads(ms, found) == dropped {
                    over = Some(ms);
                }
            }
            for action in c.tick(ms) {
                assert_eq!(action, READ);
                let actions = c.reads(ms, found);
                if actions == dropped {
                    over = Some(ms);
                }
            }
            ms += 1;
        }
        let over = over.expect("it never gave up");
        let expected = if gone { 2001..2060 } else { 6000..6110 };
        assert!(expected.contains(&over), "{gone}: {over}");
    }
}

#[test]
fn an_arbiter_that_cannot_be_read_tells_a_candidate_nothing_and_is_spoken_of_once() {
    let mut c = C::ready();
    let fails = candidate::Event::Arbiter(failed(false));
    assert_eq!(c.on(0, candidate::Event::PeerDied), [READ]);
    let mut said = c.on(0, fails).len();
    for ms in 1..20_000 {
        let actions = c.tick(ms);
        if actions == [READ] {
            let actions = c.on(ms, candidate::Event::Arbiter(failed(false)));
            said += actions.len();
        }
    }
    assert_eq!(said, 1);
    let mut last = Vec::new();
    while last.is_empty() {
        last = c.tick(20_100);
    }
    assert_eq!(
        c.reads(20_101, Some(base())),
        [candidate::Action::Follow(base())]
    );
}
