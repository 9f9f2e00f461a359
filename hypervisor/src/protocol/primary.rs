//! The role of the process that serves the machine.
//!
//! ```text
//!   Protected ── backup lost, log fenced ──▶ Detaching ── swapped ──▶ Unprotected
//!       │                                        │ lost                  ▲     │
//!       │                                        ▼                       │     │
//!       │    still claimed: look again ┌───▶  Frozen ◀─── lost ──┐    swapped  │
//!       │                              └─────── │ │              │       │     │
//!       │                       another is live │ └─ abandoned, ─▶ Reclaiming  │
//!       │                                       ▼    or too old                │
//!       │                                     Dead                             │
//!       │                                       ▲                              │
//!       └── End ──▶ Ending ────── swapped ──────┘       (lost: to Frozen)      │
//!                     ▲                                                        │
//!                     └────────────────────── End ─────────────────────────────┘
//!
//!   Protected ── Switch ──▶ Sounding ── read ──▶ HandingOver ── backup lost, log fenced ──▶ Detaching, as from Protected: there it
//!       ▲                      │ no answer            │                                        shows who has it
//!       └──────────────────────┴── not taken in time ─┘
//!
//!   Unprotected ── Joining ──▶ Joining ── Joined ──▶ Entitling ── swapped ──▶ Protected
//!        ▲                       │                       │ backup lost: swapped, then as from Protected
//!        └────── backup lost ────┘                       ▼
//!                                                   (lost: to Frozen)
//! ```
//!
//!   Protected ── Replace ──▶ Sounding ── read ──▶ Standing ── Joined ──▶ Replacing ── swapped ──▶ Protected, by the new backup
//!       ▲                       │ no answer          │                       │ (lost: to Frozen)
//!       └───────────────────────┴────────────────────┴───────────────────────┘ the newcomer is lost or late; the swap could not be sent
//!
//! A backup that joins gets a copy of the running machine; from *Joining* on the log goes to it as well, and outputs wait for
//! it. Nobody is entitled yet, so losing it costs nothing. Once it says that its copy is whole the arbiter is asked to
//! entitle it; while that is under way the swap may have landed, so a backup that is lost then is only given up by the next
//! swap.
//!
//! A backup is replaced without a gap: while the copy is made the old one protects as ever. For the last of it the guest stands, with
//! all that it made let out, so both copies hold whatever left; the arbiter's swap decides between them, and only then the guest runs on, with
//! the new one's log. An arbiter that does not answer would keep the guest standing, so it is sounded before. Until the swap is asked for
//! everything can be taken back; from then on, if no answer comes, this side falls silent after `switch_within`, and whoever the record
//! entitles may claim. The old backup ends by the primary's word, or by losing its claim.
//!
//! A switch-over makes the backup claim without a failure. The arbiter is sounded first here, too: a backup that cannot ask it would keep
//! the guest standing for nothing. Then the guest stops where nothing is under way, all that it made leaves, and
//! the log's last entry tells the backup to claim in its two ordinary steps. This side goes on beating, so that the backup does
//! not fence before its claim is won, and knows that it was taken at its word by the ordinary signs: silence, the fence, the end of the
//! connection. If none comes within `switch_within` the guest runs on; that is safe whenever it happens, since nothing leaves that a
//! backup that has claimed meanwhile did not get.
//!
//! From Detaching on, the guest is frozen and this process sends no heartbeats: a machine that does not serve
//! must not keep its backup waiting. Whoever reaches the arbiter first has the machine. An End that comes while
//! this is being decided waits for Unprotected.
//!
//! A frozen primary keeps its state until another is *live*. A claim that was abandoned, or that stays unfinished
//! for too long, it takes back: its own state still holds all that the world has seen. It does so only from the direct
//! claim on its own record; a claim of a later reign means that somebody was live in between. Whoever claimed may be known to be gone, by
//! the end of its control connection: then there is nothing to wait for. The swap is what makes that safe, as it makes the wait: a claimant
//! that is live by then, or lives after all, is found so or loses the machine, and has let nothing out.

mod frozen;
mod joining;
mod switching;

use std::time::Duration;

use super::detector::{Detector, Trust, Watched};
use super::errand::{Answer, Errand, Outcome, Request};
use super::heartbeat::{Heartbeat, Progress};
use super::notice::{Evidence, Notice, Reason};
use super::record::{Identity, Record, State};
use super::time::Moment;
use super::{Beater, Ear, Heard, Pair, Timing};

/// What happens to a primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed; this is how far the vCPU thread is.
    Tick(Progress),
    /// A heartbeat of this pair arrived.
    Heartbeat(Heartbeat),
    /// The backup acknowledged log entries.
    LogTraffic,
    /// The control connection closed: the backup's process is gone.
    PeerDied,
    /// The log's connection is over, which says nothing of the backup's process: a cable may be cut.
    LogOver,
    /// The ring refused an entry: the backup has fenced this process.
    LogFenced,
    /// The backup's end of the log breaks the rules: it is broken or hostile.
    LogUnusable,
    /// The log goes to a new backup from here on, whose copy is not whole yet.
    Joining,
    /// The copy is whole and follows the log; the pair names the new backup.
    Joined(Pair),
    /// A new backup has most of its copy, and is to take the old one's place. Ignored unless it is [`Phase::Protected`].
    Replace,
    /// The new backup that was to take the old one's place is lost.
    NewcomerLost,
    /// The guest has had next to none of its time for so long because the backup does not keep up, and a machine that serves is worth more
    /// than one that is protected.
    Lagging(Duration),
    /// The operator wants the backup to have the machine. Ignored unless it is [`Phase::Protected`].
    Switch,
    /// The guest's power-off has committed, or the operator ends the machine: the reign ends with it.
    End,
    /// The arbiter answered.
    Arbiter(Answer),
}

/// What the session does for a primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the backup, unless the network is busy: never wait for it.
    SendHeartbeat(Heartbeat),
    /// Ask the arbiter, and hand back its answer as [`Event::Arbiter`].
    Ask(Request),
    /// Stop the vCPU and keep its state. Release no more outputs.
    Freeze,
    /// Let the vCPU run, without a log; all outputs held so far and all later ones go out at once. Close what leads to
    /// the backup.
    RunUnprotected(Record),
    /// The backup that joined is entitled by this record: tell it.
    Protect(Record),
    /// Let out all that the guest made, and let it stand; the new backup gets the last of its copy. If another order comes before that is
    /// done, it is not done.
    Stand,
    /// The new backup is entitled by this record, and nobody else: let the guest run on, with its log; tell it, and let the old one go.
    Replace(Record),
    /// Stop the guest at a sync point, let out all that it made, and tell the backup by the log's last entry to claim. If another order
    /// comes before that is done, it is not done.
    HandOver,
    /// The backup did not take the machine, or the new one not the old one's place: let the guest run on as before, or go on as if it had
    /// never been asked to stop.
    Resume,
    /// Tell people.
    Say(Notice),
    /// End the process, with this message. Nothing held may leave.
    Die(Reason),
}

/// Where a primary stands; the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A backup follows.
    Protected,
    /// The guest stops, and the backup is told to claim.
    HandingOver,
    /// Frozen; asking the arbiter to go on without the backup.
    Detaching,
    /// Frozen; the backup has claimed the machine.
    Frozen,
    /// Frozen; asking the arbiter to go on after a claim that came to nothing.
    Reclaiming,
    /// Serving alone.
    Unprotected,
    /// Serving; a new backup is being given a copy and the log.
    Joining,
    /// Serving; asking the arbiter to entitle the new backup.
    Entitling,
    /// A backup follows, which is to be replaced, or to have the machine: whether the arbiter answers is tried.
    Sounding,
    /// The guest stands, while a new backup gets the last of its copy; the old one follows.
    Standing,
    /// The guest stands; asking the arbiter to entitle the new backup in the old one's place.
    Replacing,
    /// Asking the arbiter to end the reign.
    Ending,
    /// Over.
    Dead,
}

impl Phase {
    /// The guest runs here, and goes on here unless something is lost.
    #[must_use]
    pub fn is_settled(self) -> bool {
        matches!(
            self,
            Self::Protected | Self::Sounding | Self::Unprotected | Self::Joining | Self::Entitling
        )
    }
}

/// A primary's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    me: Identity,
    timing: Timing,
    /// The record that this process's own state belongs to.
    own: Record,
    phase: Phase,
    /// The reign is to end as soon as this process has it for sure.
    end_wanted: bool,
    errand: Option<Errand>,
    backup: Option<Peer>,
    /// Since when the log goes to a backup that joins.
    joining_since: Moment,
    /// The new backup was lost while the arbiter was asked to entitle it.
    lost: Option<Evidence>,
    /// The arbiter is sounded for a switch-over, and not for another backup.
    sounds_for_switch: bool,
    /// The backup that was told to claim, and when the guest was told to stop for it.
    handed: Option<(Identity, Moment)>,
    /// The backup whose process is gone.
    gone: Option<Identity>,
    /// Who is to take the backup's place.
    newcomer: Option<Pair>,
    /// The arbiter was asked to replace the backup, and has not answered for so long that this side says nothing any more.
    quiet: bool,
    /// The claim that froze us, and when it was first seen.
    claim: Option<(Record, Moment)>,
    reread_at: Moment,
}

/// What is known of the backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Peer {
    pair: Pair,
    detector: Detector,
    beater: Beater,
    ear: Ear,
    doubted: bool,
}

impl Peer {
    fn new(pair: Pair, timing: &Timing, now: Moment) -> Self {
        Self {
            pair,
            detector: Detector::new(now, timing.detector),
            beater: Beater::new(now, timing.heartbeat),
            ear: Ear::new(),
            doubted: false,
        }
    }
}

impl Primary {
    /// A primary whose backup, `pair.peer`, is entitled in `own`, the arbiter's record.
    ///
    /// # Panics
    /// If `own` is not a live record of `pair.me` that entitles `pair.peer`: the handshake settles that before.
    #[must_use]
    pub fn protected(pair: Pair, own: Record, timing: Timing, now: Moment) -> Self {
        assert_eq!(
            own.entitled,
            Some(pair.peer),
            "the record entitles another backup: {own}"
        );
        Self {
            backup: Some(Peer::new(pair, &timing, now)),
            phase: Phase::Protected,
            ..Self::unprotected(pair.me, own, timing, now)
        }
    }

    /// A primary without a backup: one that went live, or that runs alone.
    ///
    /// # Panics
    /// If `own` is not a live record of `me`.
    #[must_use]
    pub fn unprotected(me: Identity, own: Record, timing: Timing, now: Moment) -> Self {
        assert!(
            own.state == State::Live && own.owner == me,
            "not a live record of {me}: {own}"
        );
        Self {
            me,
            timing,
            own,
            phase: Phase::Unprotected,
            end_wanted: false,
            errand: None,
            backup: None,
            joining_since: now,
            lost: None,
            newcomer: None,
            quiet: false,
            sounds_for_switch: false,
            handed: None,
            gone: None,
            claim: None,
            reread_at: now,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The record that this process's state belongs to.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.own
    }

    /// Whether a switch-over has been ordered, and the guest has not been told to stop for it yet.
    #[must_use]
    pub fn is_about_to_switch(&self) -> bool {
        self.phase == Phase::Sounding && self.sounds_for_switch
    }

    /// What was seen of the backup since the last call, while there is one.
    pub fn take_watched(&mut self) -> Option<Watched> {
        self.backup
            .as_mut()
            .map(|peer| peer.detector.take_watched())
    }

    /// When the next tick is due at the latest. `None`: nothing is awaited.
    #[must_use]
    pub fn deadline(&self) -> Option<Moment> {
        let beat = match (&self.backup, self.phase) {
            (Some(peer), _) if self.watches() => {
                Some(peer.beater.due.min(peer.detector.deadline()))
            }
            (Some(peer), Phase::Entitling) if self.lost.is_none() => Some(peer.beater.due),
            _ => None,
        };
        let errand = self
            .errand
            .as_ref()
            .and_then(|errand| errand.deadline(&self.timing));
        let reread =
            (self.phase == Phase::Frozen && self.errand.is_none()).then_some(self.reread_at);
        let ready =
            (self.phase == Phase::Joining).then(|| self.joining_since + self.timing.ready_within);
        let taken = self.handed.filter(|_| self.phase == Phase::HandingOver);
        let taken = taken.map(|(_, since)| since + self.timing.switch_within);
        [beat, errand, reread, ready, taken, self.stands_until()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes one event; appends what is to be done to `actions`.
    pub fn handle(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick(progress) => self.tick(now, progress, actions),
            Event::Heartbeat(beat) => self.heartbeat(now, &beat, actions),
            Event::LogTraffic => {
                if let Some(peer) = &mut self.backup {
                    peer.detector.heard_log(now);
                }
            }
            Event::PeerDied => self.peer_died(now, actions),
            Event::LogOver => self.backup_lost(now, Evidence::LogOver, actions),
            Event::LogFenced => self.backup_lost(now, Evidence::Fenced, actions),
            Event::LogUnusable => self.backup_lost(now, Evidence::Unusable, actions),
            Event::Lagging(span) => self.backup_lost(now, Evidence::Lagging(span), actions),
            Event::Joining => {
                if self.phase == Phase::Unprotected {
                    self.phase = Phase::Joining;
                    self.joining_since = now;
                }
            }
            Event::Joined(pair) => self.joined(now, pair, actions),
            Event::Replace => self.sound(now, actions),
            Event::NewcomerLost => self.newcomer_lost(now, actions),
            Event::Switch => self.sound_for_switch(now, actions),
            Event::End => self.end(now, actions),
            Event::Arbiter(answer) => self.answered(now, answer, actions),
        }
    }

    fn tick(&mut self, now: Moment, progress: Progress, actions: &mut Vec<Action>) {
        match self.phase {
            _ if self.watches() => self.watch(now, progress, actions),
            // It is not judged before the arbiter's word, but it should know that this side is there.
            Phase::Entitling if self.lost.is_none() => self.beat(now, progress, actions),
            _ => {}
        }
        self.look_at_newcomer(now, actions);
        let joining = now.since(self.joining_since);
        if self.phase == Phase::Joining && joining >= self.timing.ready_within {
            self.backup_lost(now, Evidence::NotReady(joining), actions);
        }
        self.look_at_switch(now, actions);
        if let Some(errand) = &mut self.errand {
            let (request, notice) = errand.tick(now, &self.timing);
            actions.extend(notice.map(Action::Say));
            actions.extend(request.map(Action::Ask));
        } else if self.phase == Phase::Frozen && now >= self.reread_at {
            self.look_at_claim(now, actions);
        }
    }

    fn beat(&mut self, now: Moment, progress: Progress, actions: &mut Vec<Action>) {
        if let Some(peer) = &mut self.backup {
            let beat = peer.beater.tick(now, &peer.pair, &self.own, progress);
            actions.extend(beat.map(Action::SendHeartbeat));
        }
    }

    /// Beats, and judges the backup.
    fn watch(&mut self, now: Moment, progress: Progress, actions: &mut Vec<Action>) {
        self.beat(now, progress, actions);
        let Some(peer) = &mut self.backup else { return };
        let (trust, nap) = peer.detector.poll(now);
        actions.extend(nap.map(|span| Action::Say(Notice::Slept(span))));
        match trust {
            Trust::Trusted if peer.doubted => {
                peer.doubted = false;
                actions.push(Action::Say(Notice::HeardAgain));
            }
            Trust::Doubted(span) if !peer.doubted => {
                peer.doubted = true;
                actions.push(Action::Say(Notice::Doubted(span)));
            }
            Trust::Trusted | Trust::Doubted(_) => {}
            Trust::Suspected(evidence) => self.backup_lost(now, evidence, actions),
        }
    }

    fn heartbeat(&mut self, now: Moment, beat: &Heartbeat, actions: &mut Vec<Action>) {
        // A new backup may know that it is entitled before we do; its beats count once we know it too.
        if !self.watches() {
            return;
        }
        let Some(peer) = &mut self.backup else { return };
        match peer.ear.hear(&peer.pair, &self.own, beat) {
            Heard::Stray => {}
            Heard::Alive => peer.detector.heard_beat(now, beat.progress),
            Heard::Newer => self.backup_lost(now, Evidence::Newer, actions),
        }
    }

    /// Only the arbiter can tell whether it is the backup or this process that goes on.
    fn backup_lost(&mut self, now: Moment, evidence: Evidence, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Protected | Phase::HandingOver | Phase::Standing => {}
            // Nobody else is entitled, and nobody will be.
            Phase::Replacing if self.errand.as_ref().is_some_and(Errand::can_be_dropped) => {
                self.errand = None;
            }
            // The arbiter is asked one question at a time.
            Phase::Sounding => {
                self.lost.get_or_insert(evidence);
                actions.push(Action::Freeze);
                return;
            }
            // Another one may be entitled by now, or it may have claimed: the arbiter's answer tells. The guest stands.
            Phase::Replacing => {
                self.lost.get_or_insert(evidence);
                return;
            }
            // It was entitled to nothing.
            Phase::Joining => return self.goes_on_alone(now, evidence, actions),
            // The arbiter has not heard of it.
            Phase::Entitling if self.errand.as_ref().is_some_and(Errand::can_be_dropped) => {
                self.errand = None;
                self.backup = None;
                return self.goes_on_alone(now, evidence, actions);
            }
            // It may be entitled by now: nothing leaves that it has not got.
            Phase::Entitling if self.lost.is_none() => {
                self.lost = Some(evidence);
                actions.push(Action::Freeze);
                return;
            }
            _ => return,
        }
        actions.push(Action::Freeze);
        actions.push(Action::Say(match self.phase {
            Phase::HandingOver => Notice::AskingWho(evidence),
            _ => Notice::BackupLost(evidence),
        }));
        self.newcomer = None;
        self.phase = Phase::Detaching;
        self.swap(now, self.own, self.own.detached(), actions);
    }

    fn end(&mut self, now: Moment, actions: &mut Vec<Action>) {
        self.end_wanted = true;
        match self.phase {
            Phase::Protected
            | Phase::HandingOver
            | Phase::Standing
            | Phase::Unprotected
            | Phase::Joining => {
                actions.push(Action::Freeze);
                self.phase = Phase::Ending;
                self.swap(now, self.own, self.own.ended(), actions);
            }
            Phase::Entitling => actions.push(Action::Freeze),
            _ => {}
        }
    }

    fn answered(&mut self, now: Moment, answer: Answer, actions: &mut Vec<Action>) {
        let Some(errand) = &mut self.errand else {
            return;
        };
        let (outcome, notice) = errand.answer(now, answer, &self.timing);
        actions.extend(notice.map(Action::Say));
        let Some(outcome) = outcome else {
            return self.lost_meanwhile(now, actions);
        };
        self.errand = None;
        match outcome {
            Outcome::Read(found) if self.phase == Phase::Sounding => {
                self.sounded(now, found, actions);
            }
            Outcome::Swapped(record) => self.won(now, record, actions),
            Outcome::Lost(found) | Outcome::Read(found) => self.found(now, found, actions),
        }
    }

    /// The machine is this process's, by `record`.
    fn won(&mut self, now: Moment, record: Record, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Entitling => return self.entitled(now, record, actions),
            Phase::Replacing => return self.replaced(now, record, actions),
            _ => {}
        }
        self.own = record;
        self.claim = None;
        self.backup = None;
        self.handed = None;
        self.gone = None;
        if self.phase == Phase::Ending {
            self.die(Reason::PoweredOff, actions);
            return;
        }
        self.phase = Phase::Unprotected;
        if self.end_wanted {
            self.end(now, actions);
        } else {
            actions.push(Action::RunUnprotected(record));
            actions.push(Action::Say(Notice::Unprotected(record)));
        }
    }

    fn swap(&mut self, now: Moment, from: Record, to: Record, actions: &mut Vec<Action>) {
        self.ask(now, Request::Swap { from, to }, actions);
    }

    fn ask(&mut self, now: Moment, request: Request, actions: &mut Vec<Action>) {
        debug_assert!(self.errand.is_none(), "one question at a time");
        self.errand = Some(Errand::new(now, request));
        actions.push(Action::Ask(request));
    }

    fn die(&mut self, reason: Reason, actions: &mut Vec<Action>) {
        self.phase = Phase::Dead;
        self.errand = None;
        self.backup = None;
        actions.push(Action::Die(reason));
    }
}
