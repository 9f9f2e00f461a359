//! A primary that gives the machine to its backup, by its operator's will.

use super::{Action, Evidence, Notice, Phase, Primary, Request};
use crate::protocol::time::Moment;

impl Primary {
    /// The backup has to ask the arbiter twice while the guest stands: one that is out of reach is found out before.
    pub(super) fn sound_for_switch(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.phase == Phase::Protected {
            self.phase = Phase::Sounding;
            self.sounds_for_switch = true;
            self.lost = None;
            self.ask(now, Request::Read, actions);
        }
    }

    /// The arbiter answers, and all is as it was.
    pub(super) fn hand_over(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let Some(peer) = self.backup.as_ref().map(|peer| peer.pair.peer) else {
            return;
        };
        self.phase = Phase::HandingOver;
        self.handed = Some((peer, now));
        actions.push(Action::HandOver);
        actions.push(Action::Say(Notice::HandingOver(self.own.epoch.next())));
    }

    /// Whether the guest has stood for long enough.
    pub(super) fn look_at_switch(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let Some((_, since)) = self.handed else {
            return;
        };
        let stood = now.since(since);
        if self.phase == Phase::HandingOver && stood >= self.timing.switch_within {
            self.phase = Phase::Protected;
            self.handed = None;
            actions.push(Action::Resume);
            actions.push(Action::Say(Notice::NotTaken(stood)));
        }
    }

    /// The guest has not been stopped yet, and is not.
    pub(super) fn not_switched(&mut self, because: Evidence, actions: &mut Vec<Action>) {
        actions.push(Action::Resume);
        actions.push(Action::Say(Notice::NotSwitched(because)));
    }
}
