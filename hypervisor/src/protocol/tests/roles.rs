//! Each machine alone, step by step.

use super::super::backup::{self, Phase as B_};
use super::super::primary::{self, Phase as P_};
use super::*;

const MS: Duration = Duration::from_millis(1);

pub(super) fn at(ms: u64) -> Moment {
    Moment(0) + Duration::from_millis(ms)
}

pub(super) fn failed(may_have_landed: bool) -> Answer {
    Answer::Failed {
        may_have_landed,
        why: "down".to_owned(),
    }
}

fn swap(from: Record, to: Record) -> Request {
    Request::Swap { from, to }
}

/// A primary under test, and what it did at the last event (notices apart).
struct P {
    machine: Primary,
    notices: Vec<Notice>,
}

impl P {
    fn protected() -> Self {
        let machine = Primary::protected(pair(A, B), first_record(), Timing::default(), at(0));
        Self {
            machine,
            notices: Vec::new(),
        }
    }

    fn on(&mut self, ms: u64, event: primary::Event) -> Vec<primary::Action> {
        let mut actions = Vec::new();
        self.machine.handle(at(ms), event, &mut actions);
        self.notices.clear();
        actions.retain(|action| match action {
            primary::Action::Say(notice) => {
                self.notices.push(notice.clone());
                false
            }
            primary::Action::SendHeartbeat(_) => false,
            _ => true,
        });
        actions
    }

    fn tick(&mut self, ms: u64) -> Vec<primary::Action> {
        self.on(ms, primary::Event::Tick(Progress::default()))
    }

    fn answer(&mut self, ms: u64, answer: Answer) -> Vec<primary::Action> {
        self.on(ms, primary::Event::Arbiter(answer))
    }

    /// Frozen by the backup's claim, at 1 ms.
    fn frozen() -> (Self, Record) {
        let mut p = Self::protected();
        let claim = first_record().claimed_by(B).unwrap();
        p.on(0, primary::Event::LogFenced);
        assert_eq!(p.answer(1, Answer::Lost(Some(claim))), []);
        assert_eq!(p.machine.phase(), P_::Frozen);
        assert_eq!(p.notices, [Notice::Frozen(claim)]);
        (p, claim)
    }
}

/// A backup under test.
struct K {
    machine: Backup,
    notices: Vec<Notice>,
}

impl K {
    fn following() -> Self {
        let machine = Backup::new(pair(B, A), first_record(), Timing::default(), at(0)).unwrap();
        Self {
            machine,
            notices: Vec::new(),
        }
    }

    fn on(&mut self, ms: u64, event: backup::Event) -> Vec<backup::Action> {
        let mut actions = Vec::new();
        self.machine.handle(at(ms), event, &mut actions);
        self.notices.clear();
        actions.retain(|action| match action {
            backup::Action::Say(notice) => {
                self.notices.push(notice.clone());
                false
            }
            backup::Action::SendHeartbeat(_) => false,
            _ => true,
        });
        actions
    }

    fn tick(&mut self, ms: u64) -> Vec<backup::Action> {
        self.on(ms, backup::Event::Tick(Progress::default()))
    }

    fn answer(&mut self, ms: u64, answer: Answer) -> Vec<backup::Action> {
        self.on(ms, backup::Event::Arbiter(answer))
    }

    /// Ticks every millisecond until the primary's silence has led to a claim, at the time returned.
    fn claiming_by_silence() -> (Self, u64) {
        let mut k = Self::following();
        for ms in 1..1000 {
            let actions = k.tick(ms);
            if k.machine.phase() == B_::Claiming {
                assert_eq!(actions, [backup::Action::Ask(swap(base(), claim()))]);
                return (k, ms);
            }
            assert_eq!(actions, []);
        }
        panic!("the silence was never noticed")
    }
}

pub(super) fn base() -> Record {
    first_record()
}

pub(super) fn claim() -> Record {
    first_record().claimed_by(B).unwrap()
}

pub(super) fn beat(sender: Identity, record: Record, sequence: u64) -> Heartbeat {
    Heartbeat {
        machine: MachineId::of("sim"),
        epoch: record.epoch,
        configuration: record.configuration,
        sender,
        sequence,
        clock: at(0),
        progress: Progress::default(),
    }
}

#[test]
fn death_of_the_primary_claims_fences_and_drains_side_by_side() {
    let mut k = K::following();
    let actions = k.on(1, backup::Event::PeerDied);
    assert_eq!(
        actions,
        [
            backup::Action::Ask(swap(base(), claim())),
            backup::Action::Fence
        ]
    );
    assert_eq!(k.on(2, backup::Event::Fenced), [backup::Action::Drain]);
    assert_eq!(k.on(3, backup::Event::Drained), []);
    let live = claim().gone_live();
    let actions = k.answer(4, Answer::Swapped);
    assert_eq!(
        actions,
        [
            backup::Action::Ask(swap(claim(), live)),
            backup::Action::GoLive
        ]
    );
    assert_eq!(k.machine.record(), claim());
    assert_eq!(k.answer(5, Answer::Swapped), [backup::Action::OpenGate]);
    assert_eq!(k.notices, [Notice::Live(Epoch(2))]);
    let primary = k.machine.into_primary(at(6)).unwrap();
    assert_eq!(
        (primary.phase(), *primary.record()),
        (P_::Unprotected, live)
    );
}

#[test]
fn silence_fences_only_once_the_claim_is_won_and_drains_only_once_fenced() {
    let (mut k, ms) = K::claiming_by_silence();
    assert_eq!(k.answer(ms + 1, Answer::Swapped), [backup::Action::Fence]);
    assert_eq!(k.machine.phase(), B_::Draining);
    assert_eq!(k.tick(ms + 2), []);
    assert_eq!(k.on(ms + 3, backup::Event::Fenced), [backup::Action::Drain]);
    let actions = k.on(ms + 4, backup::Event::Drained);
    assert_eq!(actions[1], backup::Action::GoLive);
}

#[test]
fn a_backup_that_is_not_entitled_cannot_even_be_made() {
    let timing = Timing::default();
    assert!(Backup::new(pair(A, B), base(), timing, at(0)).is_none());
    assert!(Backup::new(pair(B, A), base().detached(), timing, at(0)).is_none());
    assert!(Backup::new(pair(B, A), base().ended(), timing, at(0)).is_none());
}

#[test]
fn a_lost_claim_ends_the_backup_and_a_powered_off_machine_ends_it_well() {
    for (found, clean) in [(base().detached(), false), (base().ended(), true)] {
        let mut k = K::following();
        k.on(1, backup::Event::PeerDied);
        let actions = k.answer(2, Answer::Lost(Some(found)));
        let [backup::Action::Die(reason)] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!(reason.is_clean(), clean);
        assert_eq!(k.on(3, backup::Event::Fenced), []);
        assert_eq!(k.on(4, backup::Event::Drained), []);
        assert!(k.machine.into_primary(at(5)).is_none());
    }
}

#[test]
fn an_unreachable_arbiter_changes_no_role_and_is_asked_with_growing_waits() {
    let mut k = K::following();
    k.on(0, backup::Event::PeerDied);
    let (mut now, mut waits) = (1, Vec::new());
    while waits.len() < 10 {
        k.answer(now, failed(true));
        let asked = now;
        while k.tick(now) != [backup::Action::Ask(swap(base(), claim()))] {
            now += 1;
            assert!(now < 5000, "never asked again");
        }
        assert_eq!(k.machine.phase(), B_::Claiming);
        waits.push(now - asked);
    }
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 500, 500, 500]);
    let actions = k.answer(now, Answer::Swapped);
    assert_eq!(actions, []);
    assert!(k.notices.contains(&Notice::ArbiterBack));
    assert_eq!(k.machine.phase(), B_::Draining);
}

#[test]
fn an_unreachable_or_silent_arbiter_is_spoken_of() {
    let mut k = K::following();
    k.on(0, backup::Event::PeerDied);
    k.answer(1, failed(true));
    let why = "down".to_owned();
    assert_eq!(k.notices, [Notice::ArbiterUnreachable { attempts: 1, why }]);
    let mut said = 0;
    for ms in 2..5000 {
        k.tick(ms);
        said += k.notices.len();
    }
    assert_eq!(said, 1, "once for one silent request");
}

#[test]
fn a_claim_that_never_left_is_dropped_when_the_primary_is_heard_again() {
    let (mut k, ms) = K::claiming_by_silence();
    k.answer(ms, failed(false));
    k.on(ms + 1, backup::Event::Heartbeat(beat(A, base(), 1)));
    assert_eq!(k.tick(ms + 1), []);
    assert_eq!(
        (k.machine.phase(), &k.notices[..]),
        (B_::Following, &[Notice::HeardAgain][..])
    );
    assert_eq!(k.tick(ms + 20), []);
}

#[test]
fn a_claim_that_may_have_landed_is_asked_for_until_it_is_known() {
    let (mut k, ms) = K::claiming_by_silence();
    // Heard again while the answer is still out, and again after it told nothing.
    k.on(ms, backup::Event::Heartbeat(beat(A, base(), 1)));
    assert_eq!(k.tick(ms), []);
    assert_eq!(k.machine.phase(), B_::Claiming);
    k.answer(ms, failed(true));
    k.on(ms + 1, backup::Event::Heartbeat(beat(A, base(), 2)));
    assert_eq!(k.tick(ms + 1), []);
    assert_eq!(k.tick(ms + 6), [backup::Action::Ask(swap(base(), claim()))]);
    assert_eq!(k.machine.phase(), B_::Claiming);
}

#[test]
fn a_diverged_backup_fences_first_then_reports_and_never_claims() {
    let mut k = K::following();
    let unfit = Unfit::Diverged("position 7, rip: expected 1, found 2".to_owned());
    assert_eq!(
        k.on(1, backup::Event::Unfit(unfit.clone())),
        [backup::Action::Fence]
    );
    assert_eq!(k.notices, []);
    assert_eq!(k.on(2, backup::Event::PeerDied), []);
    let actions = k.on(3, backup::Event::Fenced);
    assert_eq!(actions, [backup::Action::Die(Reason::Unfit(unfit.clone()))]);
    assert_eq!(k.notices, [Notice::Unfit(unfit)]);
}

#[test]
fn a_backup_that_diverges_while_it_drains_gives_its_claim_back() {
    let unfit = Unfit::Corrupt("entry 9".to_owned());
    // In every order of the fence, the claim and the discovery that is possible.
    for order in [
        ["won", "fenced", "unfit"],
        ["fenced", "unfit", "won"],
        ["unfit", "won", "fenced"],
    ] {
        let mut k = K::following();
        k.on(0, backup::Event::PeerDied);
        let mut last = Vec::new();
        for (step, ms) in order.into_iter().zip(1..) {
            last = match step {
                "won" => k.answer(ms, Answer::Swapped),
                "fenced" => k.on(ms, backup::Event::Fenced),
                _ => k.on(ms, backup::Event::Unfit(unfit.clone())),
            };
        }
        assert_eq!(
            last,
            [backup::Action::Ask(swap(claim(), claim().abandoned()))],
            "{order:?}"
        );
        assert_eq!(k.on(8, backup::Event::Drained), [], "{order:?}");
        let actions = k.answer(9, Answer::Swapped);
        assert_eq!(actions, [backup::Action::Die(Reason::Unfit(unfit.clone()))]);
    }
}

#[test]
fn a_slow_winner_whose_primary_went_on_never_opens_its_gate() {
    let mut k = K::following();
    k.on(0, backup::Event::PeerDied);
    k.on(1, backup::Event::Fenced);
    k.on(2, backup::Event::Drained);
    k.answer(3, Answer::Swapped);
    assert_eq!(k.machine.phase(), B_::GoingLive);
    let found = claim().reclaimed_by(A);
    let actions = k.answer(4, Answer::Lost(Some(found)));
    assert_eq!(
        actions,
        [backup::Action::Die(Reason::Replaced {
            epoch: Epoch(3),
            by: A
        })]
    );
}

#[test]
fn a_backup_told_by_its_primary_that_it_was_dropped_ends() {
    let mut k = K::following();
    let stray = beat(B, base().detached(), 1);
    assert_eq!(k.on(1, backup::Event::Heartbeat(stray)), []);
    let actions = k.on(2, backup::Event::Heartbeat(beat(A, base().detached(), 1)));
    assert_eq!(
        actions,
        [backup::Action::Die(Reason::NotEntitled { found: None })]
    );
}

#[test]
fn a_backup_that_is_dismissed_leaves_a_primary_that_lives_and_no_other() {
    let heard = |sequence| backup::Event::Heartbeat(beat(A, base(), sequence));
    let mut k = K::following();
    assert_eq!(k.on(1, backup::Event::Dismissed), []);
    assert_eq!(k.tick(2), []);
    let actions = k.on(3, heard(1));
    assert_eq!(actions, [backup::Action::Die(Reason::Dismissed)]);

    // Nobody knew yet that it was dead.
    let mut k = K::following();
    assert_eq!(k.on(1, backup::Event::Dismissed), []);
    let actions = k.on(2, backup::Event::PeerDied);
    assert_eq!(actions[0], backup::Action::Ask(swap(base(), claim())));
    assert!(k.notices.contains(&Notice::NotDismissed), "{:?}", k.notices);
    // What was under way when it died is heard, and changes nothing.
    assert_eq!(k.on(3, heard(1)), []);
    for ms in [4, 5] {
        assert_eq!(k.on(ms, backup::Event::Dismissed), []);
        assert_eq!(k.notices, [Notice::NotDismissed]);
    }
    k.answer(6, Answer::Swapped);
    k.on(7, backup::Event::Fenced);
    k.on(8, backup::Event::Drained);
    assert_eq!(k.on(9, backup::Event::Dismissed), []);
    assert_eq!(k.answer(10, Answer::Swapped), [backup::Action::OpenGate]);
}

#[test]
fn repeated_and_overtaken_heartbeats_are_no_sign_of_life() {
    let (mut k, mut p) = (K::following(), P::protected());
    let mut sequence = 0;
    let mut feed = |k: &mut K, p: &mut P, ms: u64, fresh: bool| {
        sequence += u64::from(fresh);
        let old = [1, sequence];
        for number in old {
            k.on(ms, backup::Event::Heartbeat(beat(A, base(), number)));
            p.on(ms, primary::Event::Heartbeat(beat(B, base(), number)));
        }
        k.tick(ms);
        p.tick(ms);
    };
    for ms in 1..=1000 {
        feed(&mut k, &mut p, ms, ms % 5 == 0);
    }
    assert_eq!(
        (k.machine.phase(), p.machine.phase()),
        (B_::Following, P_::Protected)
    );
    for ms in 1001..=1100 {
        feed(&mut k, &mut p, ms, false);
    }
    assert_eq!(
        (k.machine.phase(), p.machine.phase()),
        (B_::Claiming, P_::Detaching)
    );
}

#[test]
fn both_beat_on_time_with_their_own_progress_and_number_their_beats() {
    let progress = Progress {
        turns: 9,
        ..Progress::default()
    };
    let mut machine = P::protected().machine;
    let mut beats = Vec::new();
    for ms in 0..=20 {
        let mut actions = Vec::new();
        machine.handle(at(ms), primary::Event::Tick(progress), &mut actions);
        beats.extend(actions.into_iter().filter_map(|action| match action {
            primary::Action::SendHeartbeat(beat) => Some(beat),
            _ => None,
        }));
    }
    assert_eq!(
        beats.iter().map(|b| b.sequence).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    assert_eq!(beats[4].clock, at(20));
    assert!(
        beats
            .iter()
            .all(|b| b.progress == progress && b.sender == A && b.epoch == Epoch(1))
    );
    assert_eq!(machine.deadline(), Some(at(25)));
}

#[test]
fn a_primary_that_loses_its_backup_waits_for_the_arbiter_and_then_runs_alone() {
    for event in [
        primary::Event::PeerDied,
        primary::Event::LogFenced,
        primary::Event::LogUnusable,
    ] {
        let mut p = P::protected();
        let detached = base().detached();
        let actions = p.on(1, event);
        let ask = primary::Action::Ask(swap(base(), detached));
        assert_eq!(actions, [primary::Action::Freeze, ask]);
        assert_eq!(p.tick(2), []);
        assert_eq!(
            p.answer(3, Answer::Swapped),
            [primary::Action::RunUnprotected(detached)]
        );
        assert_eq!(p.notices, [Notice::Unprotected(detached)]);
        // What else is heard of that backup does not matter any more.
        assert_eq!(p.on(4, primary::Event::PeerDied), []);
        assert_eq!(p.on(5, primary::Event::LogFenced), []);
        assert_eq!(p.machine.deadline(), None);
    }
}

#[test]
fn a_frozen_primary_sends_no_heartbeats() {
    let (P { mut machine, .. }, _) = P::frozen();
    for ms in 2..500 {
        let mut actions = Vec::new();
        machine.handle(
            at(ms),
            primary::Event::Tick(Progress::default()),
            &mut actions,
        );
        let beats = |action: &primary::Action| matches!(action, primary::Action::SendHeartbeat(_));
        assert!(!actions.iter().any(beats), "{actions:?}");
    }
}

#[test]
fn a_frozen_primary_dies_when_another_is_live() {
    let (mut p, claim) = P::frozen();
    assert_eq!(p.tick(21), [primary::Action::Ask(Request::Read)]);
    assert_eq!(p.answer(22, Answer::Read(Some(claim))), []);
    assert_eq!(p.tick(41), []);
    assert_eq!(p.tick(42), [primary::Action::Ask(Request::Read)]);
    let actions = p.answer(43, Answer::Read(Some(claim.gone_live())));
    assert_eq!(
        actions,
        [primary::Action::Die(Reason::Replaced {
            epoch: Epoch(2),
            by: B
        })]
    );
}

#[test]
fn a_frozen_primary_goes_on_after_an_abandoned_claim() {
    let (mut p, claim) = P::frozen();
    p.tick(21);
    let (abandoned, mine) = (claim.abandoned(), claim.abandoned().reclaimed_by(A));
    let actions = p.answer(22, Answer::Read(Some(abandoned)));
    assert_eq!(actions, [primary::Action::Ask(swap(abandoned, mine))]);
    assert_eq!(
        p.answer(23, Answer::Swapped),
        [primary::Action::RunUnprotected(mine)]
    );
    assert_eq!(
        (p.machine.phase(), *p.machine.record()),
        (P_::Unprotected, mine)
    );
}

#[test]
fn a_claim_that_is_too_old_is_taken_back_and_one_that_went_live_meanwhile_is_not() {
    for went_live in [false, true] {
        let (mut p, claim) = P::frozen();
        let mine = claim.reclaimed_by(A);
        let take_back = [primary::Action::Ask(swap(claim, mine))];
        let taken_back = (2..3000).find(|&ms| match &p.tick(ms)[..] {
            [] => false,
            [primary::Action::Ask(Request::Read)] => {
                assert_eq!(p.answer(ms, Answer::Read(Some(claim))), []);
                false
            }
            actions => {
                assert_eq!(actions, take_back);
                true
            }
        });
        let ms = taken_back.expect("the claim was never taken back");
        let waited = at(ms).since(at(1));
        let stale = Timing::default().stale_claim;
        assert!(waited >= stale && waited < stale + 50 * MS, "{waited:?}");
        if went_live {
            let actions = p.answer(ms, Answer::Lost(Some(claim.gone_live())));
            let reason = Reason::Replaced {
                epoch: Epoch(2),
                by: B,
            };
            assert_eq!(actions, [primary::Action::Die(reason)]);
        } else {
            assert_eq!(
                p.answer(ms, Answer::Swapped),
                [primary::Action::RunUnprotected(mine)]
            );
        }
    }
}

#[test]
fn a_claim_of_a_later_reign_is_never_taken_back() {
    let (mut p, first) = P::frozen();
    p.tick(21);
    let heir = Identity::from_bytes([0xc; 16]);
    let later = Record {
        entitled: Some(heir),
        ..first.gone_live()
    };
    let abandoned = later.claimed_by(heir).unwrap().abandoned();
    let actions = p.answer(22, Answer::Read(Some(abandoned)));
    assert_eq!(
        actions,
        [primary::Action::Die(Reason::Replaced {
            epoch: Epoch(3),
            by: heir
        })]
    );
}

#[test]
fn a_stale_or_vanished_record_leads_to_no_conclusion() {
    let (mut p, claim) = P::frozen();
    p.tick(21);
    assert_eq!(p.answer(22, Answer::Read(Some(base()))), []);
    assert_eq!(p.machine.phase(), P_::Frozen);
    assert_eq!(p.tick(42), [primary::Action::Ask(Request::Read)]);
    assert_eq!(p.answer(43, Answer::Read(None)), []);
    assert!(
        matches!(&p.notices[..], [Notice::ArbiterUnreachable { .. }]),
        "{:?}",
        p.notices
    );
    assert_eq!(p.tick(48), [primary::Action::Ask(Request::Read)]);
    assert_eq!(p.answer(49, Answer::Read(Some(claim))), []);
    assert_eq!(p.machine.phase(), P_::Frozen);

    let mut k = K::following();
    k.on(0, backup::Event::PeerDied);
    for wrong in [
        Answer::Lost(None),
        Answer::Lost(Some(base())),
        Answer::Read(Some(base())),
    ] {
        assert_eq!(k.answer(1, wrong), []);
        assert_eq!(k.machine.phase(), B_::Claiming);
        assert_eq!(k.tick(1000), [backup::Action::Ask(swap(base(), claim))]);
    }
}

#[test]
fn an_end_waits_for_whatever_is_being_decided() {
    let ended = |p: &mut P, ms, from: Record| {
        let ask = primary::Action::Ask(swap(from, from.ended()));
        assert_eq!(p.machine.phase(), P_::Ending);
        let actions = p.answer(ms, Answer::Swapped);
        assert_eq!(actions, [primary::Action::Die(Reason::PoweredOff)]);
        ask
    };
    let mut p = P::protected();
    let actions = p.on(1, primary::Event::End);
    let ask = ended(&mut p, 2, base());
    assert_eq!(actions, [primary::Action::Freeze, ask]);

    let mut p = P::protected();
    p.on(1, primary::Event::PeerDied);
    assert_eq!(p.on(2, primary::Event::End), []);
    let actions = p.answer(3, Answer::Swapped);
    let ask = ended(&mut p, 4, base().detached());
    assert_eq!(actions, [primary::Action::Freeze, ask]);

    // The backup was faster; it abandons; this process goes on, only to end.
    let mut p = P::protected();
    p.on(1, primary::Event::End);
    let abandoned = claim().abandoned();
    let mine = abandoned.reclaimed_by(A);
    let actions = p.answer(2, Answer::Lost(Some(abandoned)));
    assert_eq!(actions, [primary::Action::Ask(swap(abandoned, mine))]);
    let actions = p.answer(3, Answer::Swapped);
    let ask = ended(&mut p, 4, mine);
    assert_eq!(actions, [primary::Action::Freeze, ask]);
}

#[test]
fn a_primary_that_hears_of_a_newer_reign_asks_the_arbiter() {
    let mut p = P::protected();
    let actions = p.on(
        1,
        primary::Event::Heartbeat(beat(B, claim().gone_live(), 1)),
    );
    assert_eq!(actions[0], primary::Action::Freeze);
    assert_eq!(p.notices, [Notice::BackupLost(Evidence::Newer)]);
}

#[test]
fn messages_say_what_to_do() {
    let found = Some(base().detached());
    for reason in [
        Reason::Replaced {
            epoch: Epoch(2),
            by: B,
        },
        Reason::NotEntitled { found },
        Reason::Unfit(Unfit::Failed("disk".to_owned())),
    ] {
        assert!(reason.to_string().contains("Start it again"), "{reason}");
        assert!(!reason.is_clean());
    }
    assert!(
        Notice::Unprotected(base().detached())
            .to_string()
            .contains("UNPROTECTED")
    );
}

const C: Identity = Identity::from_bytes([0xc; 16]);

/// An unprotected primary whose new backup has a copy, with the record that would entitle it: being asked for at 3 ms.
fn entitling() -> (P, Record, Record) {
    let own = Record::cold_start(None, A, None);
    let machine = Primary::unprotected(A, own, Timing::default(), at(0));
    let mut p = P {
        machine,
        notices: Vec::new(),
    };
    assert_eq!(
        p.on(1, primary::Event::Joined(pair(A, C))),
        [],
        "nobody has joined"
    );
    assert_eq!(p.on(2, primary::Event::Joining), []);
    assert_eq!(p.machine.phase(), P_::Joining);
    let to = own.entitling(C);
    assert_eq!(
        p.on(3, primary::Event::Joined(pair(A, C))),
        [primary::Action::Ask(swap(own, to))]
    );
    assert_eq!(p.machine.phase(), P_::Entitling);
    (p, own, to)
}

#[test]
fn a_backup_that_joins_is_entitled_and_then_watched() {
    let (mut p, _, to) = entitling();
    assert_eq!((to.entitled, to.configuration), (Some(C), Configuration(2)));
    // It may know before the primary does.
    let early = primary::Event::Heartbeat(beat(C, to, 1));
    assert_eq!(p.on(4, early), []);
    // The arbiter is slow; nobody is suspected before its word.
    assert_eq!(p.tick(900), []);
    assert_eq!(
        p.answer(901, Answer::Swapped),
        [primary::Action::Protect(to)]
    );
    assert_eq!(p.notices, [Notice::Protected(to)]);
    assert_eq!(
        (p.machine.phase(), *p.machine.record()),
        (P_::Protected, to)
    );
    p.on(902, primary::Event::Heartbeat(beat(C, to, 2)));
    // Its loss is an ordinary one from now on.
    let lost = p.on(903, primary::Event::PeerDied);
    assert_eq!(
        lost,
        [
            primary::Action::Freeze,
            primary::Action::Ask(swap(to, to.detached()))
        ]
    );
}

#[test]
fn a_backup_that_is_lost_while_it_joins_costs_nothing() {
    let own = Record::cold_start(None, A, None);
    let machine = Primary::unprotected(A, own, Timing::default(), at(0));
    let mut p = P {
        machine,
        notices: Vec::new(),
    };
    p.on(1, primary::Event::Joining);
    assert_eq!(
        p.on(2, primary::Event::PeerDied),
        [primary::Action::RunUnprotected(own)]
    );
    assert_eq!(p.notices, [Notice::JoinFailed(Evidence::Death)]);
    assert_eq!(p.machine.phase(), P_::Unprotected);
}

#[test]
fn a_backup_that_is_lost_while_it_is_entitled_is_given_up_by_the_next_swap() {
    for (first, again, is_gone) in [
        (primary::Event::PeerDied, primary::Event::PeerDied, true),
        (primary::Event::PeerDied, primary::Event::LogFenced, true),
        (primary::Event::LogOver, primary::Event::LogFenced, false),
    ] {
        let (mut p, _, to) = entitling();
        assert_eq!(p.on(4, first), [primary::Action::Freeze]);
        assert_eq!(p.on(5, again), [], "told once");
        // It was entitled in between, and may have claimed.
        assert_eq!(
            p.answer(6, Answer::Swapped),
            [
                primary::Action::Freeze,
                primary::Action::Ask(swap(to, to.detached()))
            ]
        );
        let claim = to.claimed_by(C).unwrap();
        let found = p.answer(7, Answer::Lost(Some(claim)));
        let live = claim.gone_live();
        let end = if is_gone {
            let back = claim.reclaimed_by(A);
            assert_eq!(found, [primary::Action::Ask(swap(claim, back))]);
            p.answer(8, Answer::Lost(Some(live)))
        } else {
            assert_eq!(found, []);
            assert_eq!(p.machine.phase(), P_::Frozen);
            p.tick(40);
            p.answer(41, Answer::Read(Some(live)))
        };
        assert!(matches!(
            end[..],
            [primary::Action::Die(Reason::Replaced { .. })]
        ));
    }
}

#[test]
fn a_machine_that_ends_while_a_backup_joins_ends() {
    let (mut p, _, to) = entitling();
    assert_eq!(p.on(4, primary::Event::End), [primary::Action::Freeze]);
    assert_eq!(
        p.answer(5, Answer::Swapped),
        [
            primary::Action::Freeze,
            primary::Action::Ask(swap(to, to.ended()))
        ]
    );
    assert_eq!(
        p.answer(6, Answer::Swapped),
        [primary::Action::Die(Reason::PoweredOff)]
    );
    // And one whose record another has taken meanwhile is replaced.
    let (mut p, own, _) = entitling();
    let other = Record::cold_start(Some(&own), B, None);
    assert!(matches!(
        p.answer(5, Answer::Lost(Some(other)))[..],
        [
            primary::Action::Freeze,
            primary::Action::Die(Reason::Replaced { .. })
        ]
    ));
}

#[test]
fn a_claim_on_a_record_whose_swap_was_not_answered_freezes_and_does_not_kill() {
    let (mut p, _, to) = entitling();
    assert_eq!(p.answer(4, failed(true)), []);
    let claim = to.claimed_by(C).unwrap();
    p.tick(40);
    assert_eq!(
        p.answer(41, Answer::Lost(Some(claim))),
        [primary::Action::Freeze]
    );
    assert_eq!(p.machine.phase(), P_::Frozen);
    p.tick(80);
    // The claim comes to nothing: this side still has all that the world has seen.
    let gone = claim.abandoned();
    assert_eq!(
        p.answer(81, Answer::Read(Some(gone))),
        [primary::Action::Ask(swap(gone, gone.reclaimed_by(A)))]
    );
}

#[test]
fn a_backup_that_is_lost_while_the_arbiter_is_out_of_reach_costs_nothing() {
    let (mut p, own, _) = entitling();
    assert_eq!(p.answer(4, failed(false)), []);
    assert_eq!(
        p.on(5, primary::Event::PeerDied),
        [primary::Action::RunUnprotected(own)]
    );
    assert_eq!(p.machine.phase(), P_::Unprotected);
    assert_eq!(p.tick(60), [], "it is not asked again");
}

/// The same, the other way round: it is lost first.
#[test]
fn a_backup_that_was_lost_before_the_arbiter_proved_out_of_reach_costs_nothing_either() {
    for may_have_landed in [false, true] {
        let (mut p, own, _) = entitling();
        assert_eq!(p.on(4, primary::Event::PeerDied), [primary::Action::Freeze]);
        let actions = p.answer(5, failed(may_have_landed));
        if may_have_landed {
            assert_eq!(actions, [], "it may be entitled");
            assert_eq!(p.machine.phase(), P_::Entitling);
        } else {
            assert_eq!(actions, [primary::Action::RunUnprotected(own)]);
            assert_eq!(p.machine.phase(), P_::Unprotected);
            assert_eq!(p.tick(60), [], "it is not asked again");
        }
    }
}

/// A connection's end is taken for its process's. The process may join again, and what it claims then is waited with as ever.
#[test]
fn a_backup_that_was_cut_off_and_joins_again_is_not_one_that_is_gone() {
    let (mut p, own, to) = entitling();
    p.answer(4, failed(false));
    p.on(5, primary::Event::PeerDied);
    assert_eq!(p.machine.phase(), P_::Unprotected);
    p.on(6, primary::Event::Joining);
    p.on(7, primary::Event::Joined(pair(A, C)));
    assert_eq!(p.answer(8, Answer::Swapped), [primary::Action::Protect(to)]);
    p.on(9, primary::Event::LogFenced);
    let claim = to.claimed_by(C).unwrap();
    assert_eq!(p.answer(10, Answer::Lost(Some(claim))), []);
    assert_eq!(p.machine.phase(), P_::Frozen);
    assert_eq!(own.epoch.next(), claim.epoch);
}

#[test]
fn an_end_that_waited_for_a_backup_which_is_lost_comes_all_the_same() {
    let (mut p, own, _) = entitling();
    assert_eq!(p.answer(4, failed(false)), []);
    assert_eq!(p.on(5, primary::Event::End), [primary::Action::Freeze]);
    assert_eq!(
        p.on(6, primary::Event::PeerDied),
        [
            primary::Action::Freeze,
            primary::Action::Ask(swap(own, own.ended()))
        ]
    );
    assert_eq!(p.machine.phase(), P_::Ending);
}

#[test]
fn a_backup_that_joins_and_is_not_ready_in_time_is_given_up() {
    let own = Record::cold_start(None, A, None);
    let machine = Primary::unprotected(A, own, Timing::default(), at(0));
    let mut p = P {
        machine,
        notices: Vec::new(),
    };
    p.on(1, primary::Event::Joining);
    assert_eq!(p.machine.deadline(), Some(at(5001)));
    assert_eq!(p.tick(5000), []);
    assert_eq!(p.tick(5001), [primary::Action::RunUnprotected(own)]);
    let span = Duration::from_secs(5);
    assert_eq!(p.notices, [Notice::JoinFailed(Evidence::NotReady(span))]);
}

#[test]
fn a_primary_beats_while_the_arbiter_is_asked_for_its_new_backup() {
    let (P { mut machine, .. }, own, _) = entitling();
    let mut beats = 0;
    for ms in 4..=103 {
        let mut actions = Vec::new();
        let tick = primary::Event::Tick(Progress::default());
        machine.handle(at(ms), tick, &mut actions);
        for action in actions {
            if let primary::Action::SendHeartbeat(beat) = action {
                assert_eq!(
                    (beat.sender, beat.configuration),
                    (A, own.configuration),
                    "nobody is entitled yet"
                );
                beats += 1;
            }
        }
        assert!(machine.deadline().is_some_and(|due| due <= at(ms + 5)));
    }
    assert_eq!(beats, 20);
}
