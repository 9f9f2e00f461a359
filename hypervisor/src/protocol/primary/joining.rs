//! A primary that takes a new backup, when it has none or in place of the one that it has.

use super::{Action, Evidence, Notice, Peer, Phase, Primary, Request};
use crate::protocol::Pair;
use crate::protocol::detector::Detector;
use crate::protocol::errand::Errand;
use crate::protocol::record::Record;
use crate::protocol::time::Moment;

impl Primary {
    /// A backup that joined is lost before it could be entitled.
    pub(super) fn goes_on_alone(
        &mut self,
        now: Moment,
        evidence: Evidence,
        actions: &mut Vec<Action>,
    ) {
        self.phase = Phase::Unprotected;
        if self.end_wanted {
            self.end(now, actions);
        } else {
            actions.push(Action::RunUnprotected(self.own));
        }
        actions.push(Action::Say(Notice::JoinFailed(evidence)));
    }

    pub(super) fn joined(&mut self, now: Moment, pair: Pair, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Joining => {
                self.phase = Phase::Entitling;
                // It may be one that was cut off before.
                self.gone = None;
                self.backup = Some(Peer::new(pair, &self.timing, now));
            }
            Phase::Standing => {
                self.phase = Phase::Replacing;
                self.newcomer = Some(pair);
            }
            _ => return,
        }
        self.lost = None;
        self.swap(now, self.own, self.own.entitling(pair.peer), actions);
    }

    /// The arbiter could not be asked. A backup that was lost while it was is entitled to nothing, if that is certain.
    pub(super) fn lost_meanwhile(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.phase == Phase::Entitling
            && let Some(evidence) = self.lost
            && self.errand.as_ref().is_some_and(Errand::can_be_dropped)
        {
            self.lost = None;
            self.errand = None;
            self.backup = None;
            self.goes_on_alone(now, evidence, actions);
        }
    }

    /// The new backup may claim from now on.
    pub(super) fn entitled(&mut self, now: Moment, record: Record, actions: &mut Vec<Action>) {
        self.own = record;
        self.phase = Phase::Protected;
        if let Some(peer) = &mut self.backup {
            // It begins to beat when it hears of this.
            peer.detector = Detector::new(now, self.timing.detector);
        }
        if let Some(evidence) = self.lost.take() {
            self.backup_lost(now, evidence, actions);
        } else if self.end_wanted {
            self.end(now, actions);
        } else {
            actions.push(Action::Protect(record));
            actions.push(Action::Say(Notice::Protected(record)));
        }
    }

    /// The backup, which is entitled, is beaten to and judged.
    pub(super) fn watches(&self) -> bool {
        match self.phase {
            Phase::Protected | Phase::HandingOver | Phase::Standing => true,
            Phase::Sounding => self.lost.is_none(),
            Phase::Replacing => !self.quiet && self.lost.is_none(),
            _ => false,
        }
    }

    /// A guest that stood for an arbiter that is out of reach would stand for long.
    pub(super) fn sound(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.phase == Phase::Protected {
            self.phase = Phase::Sounding;
            self.sounds_for_switch = false;
            self.lost = None;
            self.ask(now, Request::Read, actions);
        }
    }

    pub(super) fn sounded(&mut self, now: Moment, found: Record, actions: &mut Vec<Action>) {
        if self.lost.is_some() || self.end_wanted {
            return self.keep_backup(now, Evidence::Newer, actions);
        }
        if found.rank() < self.own.rank() {
            // What it says is out of date, and so would be its answer to a swap.
            return self.keep_backup(now, Evidence::NoArbiter, actions);
        }
        if found != self.own {
            self.phase = Phase::Protected;
            return self.backup_lost(now, Evidence::Newer, actions);
        }
        if self.sounds_for_switch {
            return self.hand_over(now, actions);
        }
        self.phase = Phase::Standing;
        self.joining_since = now;
        self.quiet = false;
        actions.push(Action::Stand);
    }

    /// When a guest that stands for a new backup has stood for too long, if it has not yet.
    pub(super) fn stands_until(&self) -> Option<Moment> {
        let stands = matches!(self.phase, Phase::Standing | Phase::Replacing) && !self.quiet;
        stands.then(|| self.joining_since + self.timing.switch_within)
    }

    /// Whether it is time to keep the old backup, or to fall silent.
    pub(super) fn look_at_newcomer(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let (asks, idle, droppable) = self.errand.as_ref().map_or((false, true, true), |errand| {
            (true, errand.is_idle(), errand.can_be_dropped())
        });
        let stood = now.since(self.joining_since);
        match self.phase {
            Phase::Sounding if idle => self.keep_backup(now, Evidence::NoArbiter, actions),
            Phase::Standing | Phase::Replacing if stood < self.timing.switch_within => {}
            Phase::Replacing if asks && !droppable => {
                // The swap may have landed, and may not: whoever is entitled may claim.
                self.quiet = true;
            }
            Phase::Standing | Phase::Replacing => {
                self.keep_backup(now, Evidence::NotReady(stood), actions);
            }
            _ => {}
        }
    }

    pub(super) fn newcomer_lost(&mut self, now: Moment, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Standing => {}
            Phase::Replacing if self.errand.as_ref().is_some_and(Errand::can_be_dropped) => {}
            // If it is entitled by now, it is given up by the next swap.
            _ => return,
        }
        self.keep_backup(now, Evidence::Death, actions);
    }

    /// The old backup stays what it is: the arbiter has not heard of another one.
    fn keep_backup(&mut self, now: Moment, because: Evidence, actions: &mut Vec<Action>) {
        let switching = self.is_about_to_switch();
        self.phase = Phase::Protected;
        self.errand = None;
        self.newcomer = None;
        if let Some(lost) = self.lost.take() {
            return self.backup_lost(now, lost, actions);
        }
        if self.end_wanted {
            return self.end(now, actions);
        }
        if switching {
            return self.not_switched(because, actions);
        }
        actions.push(Action::Resume);
        actions.push(Action::Say(Notice::NotReplaced(because)));
    }

    /// The new backup may claim from now on, and the old one no more.
    pub(super) fn replaced(&mut self, now: Moment, record: Record, actions: &mut Vec<Action>) {
        self.own = record;
        self.phase = Phase::Protected;
        self.lost = None;
        self.gone = None;
        self.backup = self
            .newcomer
            .take()
            .map(|pair| Peer::new(pair, &self.timing, now));
        if self.end_wanted {
            return self.end(now, actions);
        }
        actions.push(Action::Replace(record));
        actions.push(Action::Say(Notice::Replaced(record)));
    }
}
