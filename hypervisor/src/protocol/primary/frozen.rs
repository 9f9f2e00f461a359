//! A primary that somebody else may replace: it stands, and looks what became of that.

use super::{Action, Evidence, Notice, Phase, Primary, Reason, Record, Request, State};
use crate::protocol::time::Moment;

impl Primary {
    /// The record is not what this process wanted it to be, but `found`.
    pub(super) fn found(&mut self, now: Moment, found: Record, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Entitling | Phase::Replacing) {
            actions.push(Action::Freeze);
            // An answer may have been lost: then the record was ours, and this is a claim on it.
            let joined = match self.phase {
                Phase::Replacing => self.newcomer.take(),
                _ => self.backup.as_ref().map(|peer| peer.pair),
            };
            let entitled = joined.map(|pair| self.own.entitling(pair.peer));
            if let Some(entitled) = entitled.filter(|record| found.is_unfinished_claim_on(record)) {
                self.own = entitled;
            }
        }
        if found == self.own || found.rank() < self.own.rank() {
            // It has been replaced, or we would not be here: the arbiter's view is out of date. Look again.
            self.phase = Phase::Frozen;
            self.reread_at = now + self.timing.reread;
            return;
        }
        if !found.is_unfinished_claim_on(&self.own) {
            let reason = match found.state {
                State::Ended => Reason::PoweredOff,
                State::Live
                    if self.handed.is_some_and(|(to, _)| to == found.owner)
                        && found.epoch == self.own.epoch.next() =>
                {
                    Reason::HandedOver {
                        epoch: found.epoch,
                        to: found.owner,
                    }
                }
                _ => Reason::Replaced {
                    epoch: found.epoch,
                    by: found.owner,
                },
            };
            self.die(reason, actions);
            return;
        }
        self.phase = Phase::Frozen;
        let since = match self.claim {
            Some((_, since)) => since,
            None => {
                actions.push(Action::Say(Notice::Frozen(found)));
                now
            }
        };
        self.claim = Some((found, since));
        self.reread_at = now + self.timing.reread;
        if found.state == State::Abandoned || self.gone == Some(found.owner) {
            self.reclaim(now, found, actions);
        }
    }

    /// The backup's process is gone, and with it whatever claim it may have made.
    pub(super) fn peer_died(&mut self, now: Moment, actions: &mut Vec<Action>) {
        self.gone = self.backup.as_ref().map(|peer| peer.pair.peer);
        match self.claim {
            // A question that is under way comes first; its answer leads to the same.
            Some((claim, _))
                if self.phase == Phase::Frozen
                    && self.errand.is_none()
                    && self.gone == Some(claim.owner) =>
            {
                self.reclaim(now, claim, actions);
            }
            _ => self.backup_lost(now, Evidence::Death, actions),
        }
    }

    /// Frozen, and it is time to look how the claim is doing.
    pub(super) fn look_at_claim(&mut self, now: Moment, actions: &mut Vec<Action>) {
        match self.claim {
            Some((claim, since)) if now.since(since) >= self.timing.stale_claim => {
                self.reclaim(now, claim, actions);
            }
            _ => self.ask(now, Request::Read, actions),
        }
    }

    fn reclaim(&mut self, now: Moment, claim: Record, actions: &mut Vec<Action>) {
        actions.push(Action::Say(Notice::Reclaiming(claim)));
        self.phase = Phase::Reclaiming;
        self.swap(now, claim, claim.reclaimed_by(self.me), actions);
    }
}
