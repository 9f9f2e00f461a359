//! The role of the process that follows.
//!
//! ```text
//!            quiet              silent, wedged               claim won
//!  Following ────▶ Suspecting ──────────────▶ Claiming ─────────────────▶ Draining
//!    │   ▲            │  ▲                     │  │ │  fence, if not yet      │ drained: go live,
//!    │   └─ heard ────┘  │                     │  │ │  asked; drain once       │ outputs held
//!    │   ▲               │                     │  │ │  it has returned         ▼
//!    │   └ heard, and the claim never left ────┘  │ │                     GoingLive
//!    │                                            │ │ unfit                    │ swapped: open the gate
//!    │ EOF ─────▶ Claiming, with fence and drain  │ ▼                          ▼
//!    │            at once                         │ Abandoning               Live
//!    │ unfit                                      │   │ swapped
//!    ▼                                       lost ▼   ▼
//!  Stopping ────────── fenced ─────────────────▶ Stopped ◀── lost (from anywhere)
//! ```
//!
//! Fence and drain run beside the claim: the end of the primary's process leaves nothing that could be cut off too
//! early, so they start at once then. Silence alone may be a mistake, and with the arbiter out of reach nobody may
//! change role: there the fence waits for the claim, and the backup goes on following meanwhile.
//!
//! A primary that hands the machine over beats on while it waits, and is only claimed from: fence and drain wait for the claim, so that
//! an arbiter out of reach costs its guest a pause and nothing else. The claim is dropped, as above, if the arbiter has not heard of it.
//!
//! Dismissed, it leaves when it hears its primary next, and not at once: whoever dismissed it had seen the two of them a while ago, and if the
//! primary has died since, this copy is the machine. From its claim on it stays.
//!
//! Unfit (diverged, corrupt, broken) at any time before going live: first the fence, so that nothing more commits
//! to a copy that cannot serve; then the report; then, if the machine was claimed, `abandoned`.

use super::detector::{Detector, Trust, Watched};
use super::errand::{Answer, Errand, Outcome, Request};
use super::heartbeat::{Heartbeat, Progress};
use super::notice::{Evidence, Notice, Reason, Unfit};
use super::primary::Primary;
use super::record::{Record, State};
use super::time::Moment;
use super::{Beater, Ear, Heard, Pair, Timing};

/// What happens to a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed; this is how far replay is.
    Tick(Progress),
    /// A heartbeat of this pair arrived.
    Heartbeat(Heartbeat),
    /// New log entries arrived.
    LogTraffic,
    /// The control connection closed: the primary's process is gone.
    PeerDied,
    /// The primary says that this record is its machine's: it entitles another backup.
    Word(Record),
    /// The log's last entry so far was replayed, by which the primary hands the machine over.
    HandedOver,
    /// Whoever looks after this host wants a backup that nobody needs to leave, and has taken this process for one.
    Dismissed,
    /// The fence has returned: nothing can commit any more.
    Fenced,
    /// The log was replayed to its end after the fence, and everything that could fail in going live is done.
    Drained,
    /// This copy cannot go live. After [`Action::GoLive`]: going live failed.
    Unfit(Unfit),
    /// The arbiter answered.
    Arbiter(Answer),
}

/// What the session does for a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the primary, unless the network is busy: never wait for it.
    SendHeartbeat(Heartbeat),
    /// Ask the arbiter, and hand back its answer as [`Event::Arbiter`]. A swap to `claimed` that was won yields the
    /// `Claim` for [`Action::GoLive`].
    Ask(Request),
    /// Fence the log; [`Event::Fenced`] when the fence has returned.
    Fence,
    /// Replay the log to its end; [`Event::Drained`] at the end, [`Event::Unfit`] if that fails.
    Drain,
    /// Let the guest run as the machine's own, every output held: repeats of what was not released, and new ones.
    GoLive,
    /// Release the outputs, those held so far first. The next state machine is [`Backup::into_primary`].
    OpenGate,
    /// Tell people.
    Say(Notice),
    /// End the process, with this message.
    Die(Reason),
}

/// Where a backup stands; the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Replaying a primary that is well.
    Following,
    /// The primary is quiet.
    Suspecting,
    /// Asking the arbiter for the machine.
    Claiming,
    /// The claim is won; fencing, draining.
    Draining,
    /// The guest runs with its outputs held; asking the arbiter for `live`.
    GoingLive,
    /// Serving the world.
    Live,
    /// The claim is won but of no use; asking the arbiter for `abandoned`.
    Abandoning,
    /// Unfit, and fencing before it says so.
    Stopping,
    /// Over.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Work {
    NotAsked,
    UnderWay,
    Done,
}

/// A backup's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    pair: Pair,
    timing: Timing,
    /// The record that this copy belongs to. A claim swaps from it and from no other.
    base: Record,
    claim: Record,
    phase: Phase,
    fence: Work,
    drain: Work,
    unfit: Option<Unfit>,
    /// The claim is made because the primary hands the machine over.
    handed: bool,
    /// It leaves as soon as its primary is heard.
    dismissed: bool,
    errand: Option<Errand>,
    detector: Detector,
    beater: Beater,
    ear: Ear,
}

impl Backup {
    /// A backup whose copy belongs to `base`, the arbiter's record, which entitles `pair.me`. `None` if it does not.
    #[must_use]
    pub fn new(pair: Pair, base: Record, timing: Timing, now: Moment) -> Option<Self> {
        Some(Self {
            pair,
            timing,
            base,
            claim: base.claimed_by(pair.me)?,
            phase: Phase::Following,
            fence: Work::NotAsked,
            drain: Work::NotAsked,
            unfit: None,
            handed: false,
            dismissed: false,
            errand: None,
            detector: Detector::new(now, timing.detector),
            beater: Beater::new(now, timing.heartbeat),
            ear: Ear::new(),
        })
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The record that this copy belongs to: the primary's until the claim is won, then the claim, then `live`.
    #[must_use]
    pub fn record(&self) -> Record {
        match self.phase {
            Phase::Draining | Phase::GoingLive | Phase::Abandoning => self.claim,
            Phase::Live => self.claim.gone_live(),
            _ => self.base,
        }
    }

    /// The machine that goes on from [`Action::OpenGate`]: a primary without a backup. `None` before that.
    #[must_use]
    pub fn into_primary(self, now: Moment) -> Option<Primary> {
        (self.phase == Phase::Live)
            .then(|| Primary::unprotected(self.pair.me, self.claim.gone_live(), self.timing, now))
    }

    /// Whether it takes the machine over because its primary wants it to.
    #[must_use]
    pub fn is_switch_over(&self) -> bool {
        self.handed
    }

    /// What was seen of the primary since the last call, while it is followed.
    pub fn take_watched(&mut self) -> Option<Watched> {
        self.is_following().then(|| self.detector.take_watched())
    }

    /// When the next tick is due at the latest. `None`: nothing is awaited.
    #[must_use]
    pub fn deadline(&self) -> Option<Moment> {
        let beat = self.is_following().then(|| match self.phase {
            // Given up already: its deadline is over, and to wait for that would be no wait at all.
            Phase::Claiming => self.beater.due,
            _ => self.beater.due.min(self.detector.deadline()),
        });
        let errand = self
            .errand
            .as_ref()
            .and_then(|errand| errand.deadline(&self.timing));
        [beat, errand].into_iter().flatten().min()
    }

    /// Takes one event; appends what is to be done to `actions`.
    pub fn handle(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return;
        }
        match event {
            Event::Tick(progress) => self.tick(now, progress, actions),
            Event::Heartbeat(beat) => self.heartbeat(now, &beat, actions),
            Event::LogTraffic => self.detector.heard_log(now),
            Event::PeerDied => self.peer_died(now, actions),
            Event::HandedOver => {
                if matches!(self.phase, Phase::Following | Phase::Suspecting) {
                    self.claim(now, Evidence::HandedOver, actions);
                }
            }
            Event::Dismissed if matches!(self.phase, Phase::Following | Phase::Suspecting) => {
                self.dismissed = true;
            }
            Event::Dismissed => actions.push(Action::Say(Notice::NotDismissed)),
            Event::Word(record) => self.heard(&record, actions),
            Event::Fenced => self.fenced(now, actions),
            Event::Drained => {
                self.drain = Work::Done;
                self.go_live_if_ready(now, actions);
            }
            Event::Unfit(unfit) => self.became_unfit(now, unfit, actions),
            Event::Arbiter(answer) => self.answered(now, answer, actions),
        }
    }

    /// The copy still follows a primary that may be well: it beats, and listens.
    fn is_following(&self) -> bool {
        let phase = matches!(
            self.phase,
            Phase::Following | Phase::Suspecting | Phase::Claiming
        );
        phase && self.fence == Work::NotAsked
    }

    fn tick(&mut self, now: Moment, progress: Progress, actions: &mut Vec<Action>) {
        if self.is_following() {
            let beat = self.beater.tick(now, &self.pair, &self.base, progress);
            actions.extend(beat.map(Action::SendHeartbeat));
            self.watch(now, actions);
        }
        if let Some(errand) = &mut self.errand {
            let (request, notice) = errand.tick(now, &self.timing);
            actions.extend(notice.map(Action::Say));
            actions.extend(request.map(Action::Ask));
        }
    }

    fn watch(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let (trust, nap) = self.detector.poll(now);
        actions.extend(nap.map(|span| Action::Say(Notice::Slept(span))));
        match (self.phase, trust) {
            (Phase::Following, Trust::Doubted(span)) => {
                self.phase = Phase::Suspecting;
                actions.push(Action::Say(Notice::Doubted(span)));
            }
            (Phase::Suspecting, Trust::Trusted) => self.trust_again(actions),
            (Phase::Following | Phase::Suspecting, Trust::Suspected(evidence)) => {
                self.claim(now, evidence, actions);
            }
            // The arbiter has not heard of the claim, and the primary is well after all.
            (Phase::Claiming, Trust::Trusted)
                if self.errand.as_ref().is_some_and(Errand::can_be_dropped) =>
            {
                self.errand = None;
                self.trust_again(actions);
            }
            _ => {}
        }
    }

    fn trust_again(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Following;
        self.handed = false;
        actions.push(Action::Say(Notice::HeardAgain));
    }

    fn heartbeat(&mut self, now: Moment, beat: &Heartbeat, actions: &mut Vec<Action>) {
        match self.ear.hear(&self.pair, &self.base, beat) {
            Heard::Stray => {}
            // It lives, and has the machine: this copy is not all that there is of it.
            Heard::Alive
                if self.dismissed && matches!(self.phase, Phase::Following | Phase::Suspecting) =>
            {
                self.die(Reason::Dismissed, actions);
            }
            Heard::Alive => {
                self.detector.heard_beat(now, beat.progress);
            }
            // The primary itself says that it goes on without this copy; a claim could only be lost. One that is
            // under way is left to its answer.
            Heard::Newer if matches!(self.phase, Phase::Following | Phase::Suspecting) => {
                self.die(Reason::NotEntitled { found: None }, actions);
            }
            Heard::Newer => {}
        }
    }

    /// A claim that is under way is left to its answer.
    fn heard(&mut self, record: &Record, actions: &mut Vec<Action>) {
        if let Some(by) = record.relieves(self.pair.me, &self.base)
            && matches!(self.phase, Phase::Following | Phase::Suspecting)
        {
            self.die(Reason::Relieved { by }, actions);
        }
    }

    fn peer_died(&mut self, now: Moment, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Following | Phase::Suspecting => self.claim(now, Evidence::Death, actions),
            Phase::Claiming => {}
            _ => return,
        }
        self.ask_fence(actions);
    }

    fn claim(&mut self, now: Moment, because: Evidence, actions: &mut Vec<Action>) {
        self.phase = Phase::Claiming;
        self.handed = because == Evidence::HandedOver;
        // The request first: people can wait.
        self.swap(now, self.base, self.claim, actions);
        actions.push(Action::Say(Notice::Claiming {
            epoch: self.claim.epoch,
            because,
        }));
        if std::mem::take(&mut self.dismissed) {
            actions.push(Action::Say(Notice::NotDismissed));
        }
    }

    fn ask_fence(&mut self, actions: &mut Vec<Action>) {
        if self.fence == Work::NotAsked {
            self.fence = Work::UnderWay;
            actions.push(Action::Fence);
        }
    }

    fn fenced(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.fence != Work::UnderWay {
            return;
        }
        self.fence = Work::Done;
        match (&self.unfit, self.phase) {
            (None, _) => {
                self.drain = Work::UnderWay;
                actions.push(Action::Drain);
            }
            (Some(unfit), Phase::Stopping) => {
                let unfit = unfit.clone();
                actions.push(Action::Say(Notice::Unfit(unfit.clone())));
                self.die(Reason::Unfit(unfit), actions);
            }
            (Some(unfit), _) => {
                actions.push(Action::Say(Notice::Unfit(unfit.clone())));
                self.abandon_if_due(now, actions);
            }
        }
    }

    fn became_unfit(&mut self, now: Moment, unfit: Unfit, actions: &mut Vec<Action>) {
        if self.unfit.is_some() {
            return;
        }
        self.unfit = Some(unfit.clone());
        match self.phase {
            Phase::Following | Phase::Suspecting => {
                self.phase = Phase::Stopping;
                self.ask_fence(actions);
            }
            Phase::Claiming | Phase::Draining => {
                self.ask_fence(actions);
                if self.fence == Work::Done {
                    actions.push(Action::Say(Notice::Unfit(unfit)));
                    self.abandon_if_due(now, actions);
                }
            }
            // `live` is being asked for or was given: nobody else may go on from here. Say so and end.
            Phase::GoingLive | Phase::Live => self.die(Reason::Unfit(unfit), actions),
            Phase::Abandoning | Phase::Stopping | Phase::Stopped => {}
        }
    }

    /// Gives the claim back, once it is won and the fence has returned.
    fn abandon_if_due(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.phase == Phase::Draining && self.fence == Work::Done {
            self.phase = Phase::Abandoning;
            self.swap(now, self.claim, self.claim.abandoned(), actions);
        }
    }

    fn go_live_if_ready(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let ready = self.phase == Phase::Draining && self.drain == Work::Done;
        if ready && self.unfit.is_none() {
            self.phase = Phase::GoingLive;
            self.swap(now, self.claim, self.claim.gone_live(), actions);
            actions.push(Action::GoLive);
        }
    }

    fn answered(&mut self, now: Moment, answer: Answer, actions: &mut Vec<Action>) {
        let Some(errand) = &mut self.errand else {
            return;
        };
        let (outcome, notice) = errand.answer(now, answer, &self.timing);
        actions.extend(notice.map(Action::Say));
        let Some(outcome) = outcome else { return };
        self.errand = None;
        match outcome {
            Outcome::Swapped(_) => self.won(now, actions),
            Outcome::Lost(found) | Outcome::Read(found) => self.lost(found, actions),
        }
    }

    fn won(&mut self, now: Moment, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Claiming => {
                self.phase = Phase::Draining;
                self.ask_fence(actions);
                actions.push(Action::Say(Notice::ClaimWon(self.claim.epoch)));
                if self.unfit.is_some() {
                    self.abandon_if_due(now, actions);
                } else {
                    self.go_live_if_ready(now, actions);
                }
            }
            Phase::GoingLive => {
                self.phase = Phase::Live;
                actions.push(Action::OpenGate);
                actions.push(Action::Say(Notice::Live(self.claim.epoch)));
            }
            Phase::Abandoning => {
                actions.push(Action::Say(Notice::Abandoned(self.claim.epoch)));
                if let Some(unfit) = self.unfit.take() {
                    self.die(Reason::Unfit(unfit), actions);
                }
            }
            _ => {}
        }
    }

    fn lost(&mut self, found: Record, actions: &mut Vec<Action>) {
        // An unfit copy whose claim was lost, or whose primary did not wait for `abandoned`: as good.
        let reason = if let Some(unfit) = self.unfit.take() {
            Reason::Unfit(unfit)
        } else if found.state == State::Ended {
            Reason::PoweredOff
        } else if let Some(by) = found.relieves(self.pair.me, &self.base) {
            Reason::Relieved { by }
        } else if self.phase == Phase::GoingLive {
            Reason::Replaced {
                epoch: found.epoch,
                by: found.owner,
            }
        } else {
            Reason::NotEntitled { found: Some(found) }
        };
        self.die(reason, actions);
    }

    fn swap(&mut self, now: Moment, from: Record, to: Record, actions: &mut Vec<Action>) {
        debug_assert!(self.errand.is_none(), "one question at a time");
        let request = Request::Swap { from, to };
        self.errand = Some(Errand::new(now, request));
        actions.push(Action::Ask(request));
    }

    fn die(&mut self, reason: Reason, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopped;
        self.errand = None;
        actions.push(Action::Die(reason));
    }
}
