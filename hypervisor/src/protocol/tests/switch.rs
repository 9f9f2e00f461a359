//! A planned switch-over, step by step.

use super::super::backup::{self, Phase as B_};
use super::super::primary::{self, Phase as P_};
use super::roles::{at, base, beat, claim, failed};
use super::*;

fn primary() -> Primary {
    Primary::protected(pair(A, B), first_record(), Timing::default(), at(0))
}

fn backup() -> Backup {
    Backup::new(pair(B, A), first_record(), Timing::default(), at(0)).unwrap()
}

/// What a primary does at an event, heartbeats and notices apart.
fn p_does(machine: &mut Primary, ms: u64, event: primary::Event) -> Vec<primary::Action> {
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

/// The same of a backup.
fn b_does(machine: &mut Backup, ms: u64, event: backup::Event) -> Vec<backup::Action> {
    let mut actions = Vec::new();
    machine.handle(at(ms), event, &mut actions);
    actions.retain(|action| {
        !matches!(
            action,
            backup::Action::Say(_) | backup::Action::SendHeartbeat(_)
        )
    });
    actions
}

fn p_tick(machine: &mut Primary, ms: u64) -> Vec<primary::Action> {
    p_does(machine, ms, primary::Event::Tick(Progress::default()))
}

/// One that was told to switch at 0 ms.
fn handing_over() -> Primary {
    let mut p = primary();
    switches(&mut p, 0);
    p
}

/// The arbiter is sounded, and then the guest is told to stop.
fn switches(p: &mut Primary, ms: u64) {
    let actions = p_does(p, ms, primary::Event::Switch);
    assert_eq!(actions, [primary::Action::Ask(Request::Read)]);
    assert!(p.is_about_to_switch());
    let is_well = primary::Event::Arbiter(Answer::Read(Some(base())));
    assert_eq!(p_does(p, ms, is_well), [primary::Action::HandOver]);
    assert_eq!(p.phase(), P_::HandingOver);
}

#[test]
fn a_backup_that_is_told_to_claims_and_fences_only_once_the_claim_is_won() {
    let mut b = backup();
    let swap = Request::Swap {
        from: base(),
        to: claim(),
    };
    let actions = b_does(&mut b, 1, backup::Event::HandedOver);
    assert_eq!(actions, [backup::Action::Ask(swap)]);
    assert!(b.is_switch_over());
    // Told twice, it has asked already.
    assert_eq!(b_does(&mut b, 1, backup::Event::HandedOver), []);
    let won = backup::Event::Arbiter(Answer::Swapped);
    assert_eq!(b_does(&mut b, 2, won), [backup::Action::Fence]);
    let fenced = b_does(&mut b, 3, backup::Event::Fenced);
    assert_eq!(fenced, [backup::Action::Drain]);
}

#[test]
fn a_backup_that_cannot_ask_the_arbiter_goes_on_following_a_primary_that_still_beats() {
    let mut b = backup();
    b_does(&mut b, 1, backup::Event::HandedOver);
    let lost = backup::Event::Arbiter(failed(false));
    assert_eq!(b_does(&mut b, 2, lost), []);
    let heard = backup::Event::Heartbeat(beat(A, base(), 1));
    b_does(&mut b, 3, heard);
    b_does(&mut b, 4, backup::Event::Tick(Progress::default()));
    assert_eq!(b.phase(), B_::Following);
    assert!(!b.is_switch_over());
}

#[test]
fn a_primary_that_handed_its_machine_over_ends_well_once_the_backup_is_live() {
    let mut p = handing_over();
    let actions = p_does(&mut p, 5, primary::Event::PeerDied);
    let swap = Request::Swap {
        from: base(),
        to: base().detached(),
    };
    assert_eq!(
        actions,
        [primary::Action::Freeze, primary::Action::Ask(swap)]
    );
    let live = claim().gone_live();
    let lost = primary::Event::Arbiter(Answer::Lost(Some(live)));
    let reason = Reason::HandedOver {
        epoch: live.epoch,
        to: B,
    };
    assert!(reason.is_clean());
    assert_eq!(p_does(&mut p, 6, lost), [primary::Action::Die(reason)]);
}

#[test]
fn a_backup_that_claims_and_comes_to_nothing_is_waited_for_and_then_gone_on_without() {
    let mut p = handing_over();
    p_does(&mut p, 5, primary::Event::LogFenced);
    let found = primary::Event::Arbiter(Answer::Lost(Some(claim())));
    assert_eq!(p_does(&mut p, 6, found), []);
    assert_eq!(p.phase(), P_::Frozen);
    // Its own time is not over here: a claim is waited for as after any loss.
    assert_eq!(
        p_tick(&mut p, 600),
        [primary::Action::Ask(Request::Read)],
        "no resumption"
    );
    let abandoned = claim().abandoned();
    let read = primary::Event::Arbiter(Answer::Read(Some(abandoned)));
    let actions = p_does(&mut p, 601, read);
    let back = abandoned.reclaimed_by(A);
    let swap = Request::Swap {
        from: abandoned,
        to: back,
    };
    assert_eq!(actions, [primary::Action::Ask(swap)]);
    let won = primary::Event::Arbiter(Answer::Swapped);
    assert_eq!(
        p_does(&mut p, 602, won),
        [primary::Action::RunUnprotected(back)]
    );
}

/// One that is frozen by its backup's claim.
fn frozen() -> Primary {
    let mut p = handing_over();
    p_does(&mut p, 5, primary::Event::LogFenced);
    let found = primary::Event::Arbiter(Answer::Lost(Some(claim())));
    assert_eq!(p_does(&mut p, 6, found), []);
    assert_eq!(p.phase(), P_::Frozen);
    p
}

fn takes_back() -> primary::Action {
    primary::Action::Ask(Request::Swap {
        from: claim(),
        to: claim().reclaimed_by(A),
    })
}

#[test]
fn a_claim_whose_process_is_gone_is_taken_back_at_once() {
    let mut p = frozen();
    assert_eq!(
        p_does(&mut p, 7, primary::Event::PeerDied),
        [takes_back()],
        "it was known who claimed"
    );
    // It had gone live before it died, or lives after all: then the swap says so.
    let live = claim().gone_live();
    let lost = primary::Event::Arbiter(Answer::Lost(Some(live)));
    let reason = Reason::HandedOver {
        epoch: live.epoch,
        to: B,
    };
    assert_eq!(p_does(&mut p, 8, lost), [primary::Action::Die(reason)]);

    let mut p = handing_over();
    p_does(&mut p, 5, primary::Event::PeerDied);
    let found = primary::Event::Arbiter(Answer::Lost(Some(claim())));
    assert_eq!(
        p_does(&mut p, 6, found),
        [takes_back()],
        "it was known who is gone"
    );

    // One question at a time.
    let mut p = frozen();
    assert_eq!(p_tick(&mut p, 40), [primary::Action::Ask(Request::Read)]);
    assert_eq!(p_does(&mut p, 41, primary::Event::PeerDied), []);
    let read = primary::Event::Arbiter(Answer::Read(Some(claim())));
    assert_eq!(p_does(&mut p, 42, read), [takes_back()]);
}

#[test]
fn a_log_that_is_over_says_nothing_of_whoever_claimed() {
    let mut p = frozen();
    assert_eq!(p_does(&mut p, 7, primary::Event::LogOver), []);
    assert_eq!(p.phase(), P_::Frozen);
    let mut p = handing_over();
    p_does(&mut p, 5, primary::Event::LogOver);
    let found = primary::Event::Arbiter(Answer::Lost(Some(claim())));
    assert_eq!(p_does(&mut p, 6, found), []);
    assert_eq!(p.phase(), P_::Frozen);
}

#[test]
fn a_guest_is_not_stopped_for_a_switch_over_of_which_the_arbiter_would_not_hear() {
    let mut p = primary();
    p_does(&mut p, 0, primary::Event::Switch);
    let away = primary::Event::Arbiter(failed(false));
    assert_eq!(p_does(&mut p, 1, away), []);
    let mut actions = Vec::new();
    p.handle(
        at(1),
        primary::Event::Tick(Progress::default()),
        &mut actions,
    );
    let said = primary::Action::Say(Notice::NotSwitched(Evidence::NoArbiter));
    assert!(actions.contains(&said), "{actions:?}");
    assert!(actions.contains(&primary::Action::Resume), "{actions:?}");
    assert_eq!(p.phase(), P_::Protected);
    switches(&mut p, 2);

    // One that is lost meanwhile is given up once the answer is there.
    let mut p = primary();
    p_does(&mut p, 0, primary::Event::Switch);
    let lost = p_does(&mut p, 1, primary::Event::PeerDied);
    assert_eq!(lost, [primary::Action::Freeze]);
    let read = primary::Event::Arbiter(Answer::Read(Some(base())));
    let swap = Request::Swap {
        from: base(),
        to: base().detached(),
    };
    let given_up = [primary::Action::Freeze, primary::Action::Ask(swap)];
    assert_eq!(p_does(&mut p, 2, read), given_up);
}

#[test]
fn a_machine_that_nobody_takes_runs_on_protected_and_can_be_switched_again() {
    let mut p = handing_over();
    let mut resumed = None;
    for ms in 1..700 {
        let heard = primary::Event::Heartbeat(beat(B, base(), ms));
        assert_eq!(p_does(&mut p, ms, heard), []);
        match &p_tick(&mut p, ms)[..] {
            [] => {}
            [primary::Action::Resume] => {
                resumed = Some(ms);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        resumed,
        Some(Timing::default().switch_within.as_millis() as u64)
    );
    assert_eq!(p.phase(), P_::Protected);
    switches(&mut p, 701);
    // One that is silent meanwhile is not waited for as long.
    let mut p = handing_over();
    for ms in 1..500 {
        p_tick(&mut p, ms);
    }
    assert_eq!(p.phase(), P_::Detaching);
}

#[test]
fn nothing_is_switched_that_has_no_backup_or_is_ending() {
    let record = Record::cold_start(None, A, None);
    let mut alone = Primary::unprotected(A, record, Timing::default(), at(0));
    assert_eq!(p_does(&mut alone, 1, primary::Event::Switch), []);
    let mut p = handing_over();
    assert_eq!(
        p_does(&mut p, 1, primary::Event::Switch),
        [],
        "it does already"
    );
    let swap = Request::Swap {
        from: base(),
        to: base().ended(),
    };
    let ending = [primary::Action::Freeze, primary::Action::Ask(swap)];
    assert_eq!(p_does(&mut p, 2, primary::Event::End), ending);
    assert_eq!(p_does(&mut p, 3, primary::Event::Switch), []);
}

#[test]
fn a_backup_that_does_not_keep_up_is_given_up_by_the_arbiter_s_word() {
    let mut p = primary();
    let behind = primary::Event::Lagging(Duration::from_secs(2));
    let swap = Request::Swap {
        from: base(),
        to: base().detached(),
    };
    assert_eq!(
        p_does(&mut p, 1, behind.clone()),
        [primary::Action::Freeze, primary::Action::Ask(swap)]
    );
    let won = primary::Event::Arbiter(Answer::Swapped);
    assert_eq!(
        p_does(&mut p, 2, won),
        [primary::Action::RunUnprotected(base().detached())]
    );
    assert_eq!(p_does(&mut p, 3, behind), [], "nobody is left");
}
