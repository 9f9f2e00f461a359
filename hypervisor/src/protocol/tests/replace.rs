//! A backup is replaced by a new one while the machine is protected, step by step.

use super::super::backup::{self, Phase as B_};
use super::super::primary::{self, Phase as P_};
use super::roles::{at, base, beat, claim, failed};
use super::*;

const C: Identity = Identity::from_bytes([0xc; 16]);

fn swap(from: Record, to: Record) -> Request {
    Request::Swap { from, to }
}

/// What a primary does at an event, heartbeats and notices apart.
fn does(machine: &mut Primary, ms: u64, event: primary::Event) -> Vec<primary::Action> {
    let mut actions = Vec::new();
    machine.handle(at(ms), event, &mut actions);
    actions.retain(|action| {
        !matches!(
            action,
            primary::Action::Say(_) | primary::Action::SendHeartbeat(_)
        )
    });
    actions
}

fn tick(machine: &mut Primary, ms: u64) -> Vec<primary::Action> {
    does(machine, ms, primary::Event::Tick(Progress::default()))
}

fn answer(machine: &mut Primary, ms: u64, answer: Answer) -> Vec<primary::Action> {
    does(machine, ms, primary::Event::Arbiter(answer))
}

/// The old backup is heard until then; nothing follows from that.
fn hear(machine: &mut Primary, from: u64, until: u64) {
    for ms in from..until {
        let heard = primary::Event::Heartbeat(beat(B, base(), ms));
        assert_eq!(does(machine, ms, heard), []);
        assert_eq!(tick(machine, ms), []);
    }
}

/// One whose arbiter is being asked whether it answers.
fn sounding() -> Primary {
    let mut p = Primary::protected(pair(A, B), first_record(), Timing::default(), at(0));
    let actions = does(&mut p, 1, primary::Event::Replace);
    assert_eq!(actions, [primary::Action::Ask(Request::Read)]);
    p
}

/// One whose guest stands since 2 ms.
fn standing() -> Primary {
    let mut p = sounding();
    let actions = answer(&mut p, 2, Answer::Read(Some(base())));
    assert_eq!(actions, [primary::Action::Stand]);
    assert_eq!(p.phase(), P_::Standing);
    p
}

/// One that has asked for the swap at 3 ms.
fn replacing() -> Primary {
    let mut p = standing();
    let actions = does(&mut p, 3, primary::Event::Joined(pair(A, C)));
    let request = swap(base(), base().entitling(C));
    assert_eq!(actions, [primary::Action::Ask(request)]);
    p
}

#[test]
fn the_guest_runs_on_with_the_new_log_once_the_swap_is_known_and_the_new_backup_is_judged() {
    let mut p = replacing();
    let record = base().entitling(C);
    let actions = answer(&mut p, 4, Answer::Swapped);
    assert_eq!(actions, [primary::Action::Replace(record)]);
    assert_eq!((p.phase(), *p.record()), (P_::Protected, record));
    // The old one is nobody any more; the new one is missed.
    let old = primary::Event::Heartbeat(beat(B, base(), 1));
    assert_eq!(does(&mut p, 5, old), []);
    let lost = does(&mut p, 6, primary::Event::PeerDied);
    let detach = swap(record, record.detached());
    assert_eq!(
        lost,
        [primary::Action::Freeze, primary::Action::Ask(detach)]
    );
}

#[test]
fn an_arbiter_that_does_not_answer_costs_the_guest_nothing() {
    let mut p = sounding();
    assert_eq!(answer(&mut p, 2, failed(true)), []);
    assert_eq!(tick(&mut p, 2), [primary::Action::Resume]);
    assert_eq!(p.phase(), P_::Protected);
    let mut p = sounding();
    let older = Record {
        configuration: Configuration(0),
        ..base()
    };
    let actions = answer(&mut p, 2, Answer::Read(Some(older)));
    assert_eq!(actions, [primary::Action::Resume]);
}

#[test]
fn a_backup_lost_while_the_arbiter_is_sounded_is_given_up_once_it_has_answered() {
    for end in [Answer::Read(Some(base())), failed(false)] {
        let mut p = sounding();
        let lost = does(&mut p, 2, primary::Event::LogFenced);
        assert_eq!(lost, [primary::Action::Freeze]);
        let mut actions = answer(&mut p, 3, end);
        actions.extend(tick(&mut p, 3));
        let request = swap(base(), base().detached());
        assert_eq!(
            actions,
            [primary::Action::Freeze, primary::Action::Ask(request)]
        );
    }
}

#[test]
fn a_newcomer_that_is_lost_or_late_leaves_the_old_backup_what_it_was() {
    let mut p = standing();
    let lost = does(&mut p, 3, primary::Event::NewcomerLost);
    assert_eq!(lost, [primary::Action::Resume]);
    assert_eq!((p.phase(), *p.record()), (P_::Protected, base()));
    // Whoever is late finds nothing to join.
    assert_eq!(does(&mut p, 4, primary::Event::Joined(pair(A, C))), []);

    let mut p = standing();
    hear(&mut p, 3, 502);
    let heard = primary::Event::Heartbeat(beat(B, base(), 502));
    assert_eq!(does(&mut p, 502, heard), []);
    assert_eq!(tick(&mut p, 502), [primary::Action::Resume]);
    let again = does(&mut p, 503, primary::Event::Replace);
    assert_eq!(again, [primary::Action::Ask(Request::Read)]);
}

#[test]
fn the_old_backup_is_lost_while_the_guest_stands() {
    let mut p = standing();
    let lost = does(&mut p, 3, primary::Event::PeerDied);
    let detach = swap(base(), base().detached());
    assert_eq!(
        lost,
        [primary::Action::Freeze, primary::Action::Ask(detach)]
    );
    // Once the swap may have landed it decides, and the loss costs nothing.
    let mut p = replacing();
    assert_eq!(does(&mut p, 4, primary::Event::PeerDied), []);
    let actions = answer(&mut p, 5, Answer::Swapped);
    assert_eq!(actions, [primary::Action::Replace(base().entitling(C))]);
    // The old one has claimed before it landed.
    let mut p = replacing();
    assert_eq!(does(&mut p, 4, primary::Event::LogFenced), []);
    let actions = answer(&mut p, 5, Answer::Lost(Some(claim())));
    assert_eq!(actions, [primary::Action::Freeze]);
    assert_eq!(p.phase(), P_::Frozen);
}

#[test]
fn a_new_backup_that_claimed_before_the_answer_came_is_waited_for() {
    let mut p = replacing();
    let claimed = base().entitling(C).claimed_by(C).unwrap();
    let actions = answer(&mut p, 5, Answer::Lost(Some(claimed)));
    assert_eq!(actions, [primary::Action::Freeze]);
    let abandoned = claimed.abandoned();
    tick(&mut p, 30);
    let actions = answer(&mut p, 31, Answer::Read(Some(abandoned)));
    let back = swap(abandoned, abandoned.reclaimed_by(A));
    assert_eq!(actions, [primary::Action::Ask(back)]);
}

#[test]
fn an_unanswered_swap_silences_the_primary_and_one_that_was_never_sent_does_not() {
    let mut p = replacing();
    hear(&mut p, 4, 502);
    let mut actions = Vec::new();
    for ms in 502..1200 {
        p.handle(
            at(ms),
            primary::Event::Tick(Progress::default()),
            &mut actions,
        );
    }
    let beats = |action: &primary::Action| matches!(action, primary::Action::SendHeartbeat(_));
    assert_eq!(actions.iter().filter(|action| beats(action)).count(), 0);
    assert_eq!(p.phase(), P_::Replacing);
    let actions = answer(&mut p, 1200, Answer::Swapped);
    assert_eq!(actions, [primary::Action::Replace(base().entitling(C))]);

    let mut p = replacing();
    hear(&mut p, 4, 500);
    assert_eq!(answer(&mut p, 501, failed(false)), []);
    let heard = primary::Event::Heartbeat(beat(B, base(), 501));
    assert_eq!(does(&mut p, 501, heard), []);
    assert_eq!(tick(&mut p, 502), [primary::Action::Resume]);
    assert_eq!(p.phase(), P_::Protected);
}

#[test]
fn an_end_waits_for_the_swap_and_then_ends_the_reign_that_came_of_it() {
    let mut p = replacing();
    assert_eq!(does(&mut p, 4, primary::Event::End), []);
    let record = base().entitling(C);
    assert_eq!(
        answer(&mut p, 5, Answer::Swapped),
        [
            primary::Action::Freeze,
            primary::Action::Ask(swap(record, record.ended()))
        ]
    );
    let mut p = standing();
    assert_eq!(
        does(&mut p, 4, primary::Event::End),
        [
            primary::Action::Freeze,
            primary::Action::Ask(swap(base(), base().ended()))
        ]
    );
}

#[test]
fn the_old_backup_ends_well_by_the_word_or_by_losing_its_claim() {
    let relieved = [backup::Action::Die(Reason::Relieved { by: C })];
    let follow = || Backup::new(pair(B, A), first_record(), Timing::default(), at(0)).unwrap();
    let on = |machine: &mut Backup, ms, event| {
        let mut actions = Vec::new();
        machine.handle(at(ms), event, &mut actions);
        actions.retain(|action| !matches!(action, backup::Action::Say(_)));
        actions
    };
    let mut b = follow();
    // Of its own entitlement it has heard before.
    assert_eq!(on(&mut b, 1, backup::Event::Word(base())), []);
    let word = backup::Event::Word(base().entitling(C));
    assert_eq!(on(&mut b, 2, word), relieved);
    assert_eq!(b.phase(), B_::Stopped);
    let mut b = follow();
    on(&mut b, 1, backup::Event::PeerDied);
    let lost = Answer::Lost(Some(base().entitling(C)));
    assert_eq!(on(&mut b, 2, backup::Event::Arbiter(lost)), relieved);
    assert!(Reason::Relieved { by: C }.is_clean());
}
