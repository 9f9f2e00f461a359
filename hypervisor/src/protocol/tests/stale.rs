//! An arbiter whose view is out of date, as a network file system's may be: nobody is lost to what was before.

use super::roles::at;
use super::*;
use crate::protocol::{backup, primary};

/// The machine's record, and one from before it.
fn records() -> (Record, Record) {
    let before = Record::cold_start(None, A, None);
    (before.entitling(B), before)
}

fn asks(swap: [Record; 2]) -> Request {
    let [from, to] = swap;
    Request::Swap { from, to }
}

#[test]
fn a_primary_that_detaches_is_not_ended_by_what_was_before() {
    let (own, before) = records();
    let mut primary = Primary::protected(pair(A, B), own, Timing::default(), at(0));
    let mut on = |ms, event| {
        let mut actions = Vec::new();
        primary.handle(at(ms), event, &mut actions);
        actions.retain(|action| !matches!(action, primary::Action::Say(_)));
        (actions, primary.phase())
    };
    let ask = primary::Action::Ask(asks([own, own.detached()]));
    let (actions, _) = on(0, primary::Event::LogFenced);
    assert_eq!(actions, [primary::Action::Freeze, ask.clone()]);
    let lost = |found| primary::Event::Arbiter(Answer::Lost(Some(found)));
    assert_eq!(on(1, lost(before)), (vec![], primary::Phase::Detaching));
    let tick = || primary::Event::Tick(Progress::default());
    assert_eq!(on(10, tick()), (vec![ask], primary::Phase::Detaching));
    // What came after it is another matter.
    let claim = own.claimed_by(B).unwrap();
    assert_eq!(on(11, lost(claim)), (vec![], primary::Phase::Frozen));
    let (actions, _) = on(40, tick());
    assert_eq!(actions, [primary::Action::Ask(Request::Read)]);
    let read = |found| primary::Event::Arbiter(Answer::Read(Some(found)));
    assert_eq!(on(41, read(before)), (vec![], primary::Phase::Frozen));
    let (actions, _) = on(80, tick());
    assert_eq!(actions, [primary::Action::Ask(Request::Read)]);
    let (_, phase) = on(81, read(claim.gone_live()));
    assert_eq!(phase, primary::Phase::Dead);
}

#[test]
fn a_backup_that_takes_over_is_not_ended_by_what_was_before() {
    let (base, before) = records();
    let mut backup = Backup::new(pair(B, A), base, Timing::default(), at(0)).unwrap();
    let mut on = |ms, event| {
        let mut actions = Vec::new();
        backup.handle(at(ms), event, &mut actions);
        actions.retain(|action| !matches!(action, backup::Action::Say(_)));
        (actions, backup.phase())
    };
    let claim = base.claimed_by(B).unwrap();
    let lost = |found| backup::Event::Arbiter(Answer::Lost(Some(found)));
    let tick = || backup::Event::Tick(Progress::default());
    on(0, backup::Event::PeerDied);
    assert_eq!(on(1, lost(before)), (vec![], backup::Phase::Claiming));
    let again = vec![backup::Action::Ask(asks([base, claim]))];
    assert_eq!(on(10, tick()), (again, backup::Phase::Claiming));
    on(11, backup::Event::Arbiter(Answer::Swapped));
    on(12, backup::Event::Fenced);
    let (_, phase) = on(13, backup::Event::Drained);
    assert_eq!(phase, backup::Phase::GoingLive);
    // Its own claim is not there yet, by that view.
    assert_eq!(on(14, lost(base)), (vec![], backup::Phase::GoingLive));
    let again = vec![backup::Action::Ask(asks([claim, claim.gone_live()]))];
    assert_eq!(on(30, tick()), (again, backup::Phase::GoingLive));
    let (actions, _) = on(31, backup::Event::Arbiter(Answer::Swapped));
    assert_eq!(actions, [backup::Action::OpenGate]);
}
