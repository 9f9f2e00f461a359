//! What must hold, in every state.
#![forbid(unsafe_code)]

use hypervisor::protocol::State as Standing;
#[cfg(test)]
use hypervisor::protocol::primary::Phase;

use super::World;
#[cfg(test)]
use super::process::Process;
use super::process::{Guest, Role, holds, identity};
use super::state::State;

impl State {
    /// Whether a process could send the world something new.
    fn can_release(&self, who: usize) -> bool {
        let process = &self.processes[who];
        let committing = process
            .log
            .is_none_or(|log| self.logs[log].as_ref().is_some_and(|log| !log.fenced));
        process.is_alive() && process.runs && !process.shut && committing
    }

    /// What its copy would go on from.
    fn held_by(&self, who: usize) -> Option<&Guest> {
        let process = &self.processes[who];
        match process.role {
            Role::Primary(_) => Some(&process.guest),
            Role::Backup(_) if process.drained => Some(&process.guest),
            Role::Candidate(_) | Role::Backup(_) => {
                let log = self.logs[process.source?].as_ref()?;
                Some(&log.stored.1)
            }
            Role::Listening | Role::Copying | Role::Dead => None,
        }
    }

    fn may_serve(&self, who: usize) -> bool {
        let (me, record) = (identity(who), &self.record);
        match record.state {
            Standing::Live => record.owner == me || record.entitled == Some(me),
            Standing::Claimed | Standing::Abandoned => {
                let loser = match &self.processes[who].role {
                    Role::Primary(machine) => record.is_unfinished_claim_on(machine.record()),
                    _ => false,
                };
                loser || (record.state == Standing::Claimed && record.owner == me)
            }
            Standing::Ended => false,
        }
    }

    /// After every step.
    pub(super) fn check(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let releasing = (0..self.processes.len()).filter(|&who| self.can_release(who));
        if releasing.count() > 1 {
            self.broken = Some("two machines can release output".to_owned());
        }
        for who in 0..self.processes.len() {
            let entitled = self.record.entitled == Some(identity(who));
            if entitled && self.processes[who].role == Role::Copying {
                self.broken = Some(format!("{who} is entitled before its copy is whole"));
            }
            if self.may_serve(who)
                && let Some(held) = self.held_by(who)
                && !holds(held, &self.seen)
            {
                self.broken = Some(format!(
                    "{who} may serve by {}, and lacks {:?} (it has {held:?})",
                    self.record, self.seen
                ));
            }
        }
    }

    /// A backup serves.
    #[cfg(test)]
    pub(super) fn was_taken_over(&self) -> bool {
        self.record.owner != identity(0)
            && self.record.state == Standing::Live
            && self.processes[1..].iter().any(|process| process.runs)
    }

    /// A backup serves, its primary is alive or has ended well, and nobody has died.
    #[cfg(test)]
    pub(super) fn was_handed_over(&self) -> bool {
        self.was_taken_over() && self.switches > 0 && self.processes[0].role == Role::Dead
    }

    /// The first primary serves again after a claim.
    #[cfg(test)]
    pub(super) fn was_reclaimed(&self) -> bool {
        self.record.owner == identity(0) && self.record.epoch.0 > 1 && self.can_release(0)
    }

    /// Somebody is entitled, and its primary knows.
    #[cfg(test)]
    pub(super) fn is_protected(&self) -> bool {
        let protected = |process: &Process| matches!(&process.role, Role::Primary(machine) if machine.phase() == Phase::Protected);
        self.record.entitled.is_some() && self.processes.iter().any(protected)
    }

    /// The rule that does not hold here.
    pub(super) fn broken(&self) -> Option<String> {
        self.broken.clone()
    }

    /// Whether nothing but a fault leads on, and nobody serves though somebody may.
    pub(super) fn is_stuck(&self, world: &World) -> bool {
        let serves = |who: usize| {
            let process = &self.processes[who];
            process.is_alive() && process.runs && !process.shut
        };
        let mut all = 0..self.processes.len();
        if all.clone().any(serves)
            || !all.any(|who| self.may_serve(who) && self.held_by(who).is_some())
        {
            return false;
        }
        let mut steps = Vec::new();
        self.steps(world, &mut steps);
        !steps.into_iter().any(|step| {
            step.leads_on(self) && {
                let mut next = self.clone();
                next.take(world, step);
                next != *self
            }
        })
    }
}
