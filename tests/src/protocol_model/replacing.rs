//! A newcomer that takes the backup's place.
#![forbid(unsafe_code)]

use hypervisor::protocol::Record;
use hypervisor::protocol::primary::{Event as PrimarySees, Phase};

use super::World;
use super::process::{Log, NOW, Role, pair};
use super::state::State;
use crate::simulator::Plant;

impl State {
    pub(super) fn begin_replacement(&mut self, world: &World, who: usize, newcomer: usize) {
        self.replacements += 1;
        self.processes[who].newcomer = Some(newcomer);
        let other = &mut self.processes[newcomer];
        other.role = Role::Copying;
        (other.source, other.peer, other.eof) = (None, Some(who), false);
        self.primary(world, who, NOW, PrimarySees::Replace);
    }

    pub(super) fn stands(&mut self, who: usize) {
        let process = &mut self.processes[who];
        (process.stands, process.runs) = (false, false);
        let (guest, newcomer) = (process.guest.clone(), process.newcomer);
        // One that is gone gets nothing, and its primary hears that it is.
        if let Some(newcomer) = newcomer.filter(|&it| self.processes[it].peer == Some(who)) {
            self.logs[newcomer] = Some(Log::new(who, guest));
            self.processes[newcomer].source = Some(newcomer);
        }
    }

    pub(super) fn newcomer_is_ready(&mut self, world: &World, who: usize, newcomer: usize) {
        let phase = |state: &Self| match &state.processes[who].role {
            Role::Primary(machine) => Some(machine.phase()),
            _ => None,
        };
        self.primary(world, who, NOW, PrimarySees::Joined(pair(who, newcomer)));
        if world.plant == Some(Plant::NewLogBeforeSwap) && phase(self) == Some(Phase::Replacing) {
            let process = &mut self.processes[who];
            (process.log, process.runs) = (Some(newcomer), true);
        }
    }

    /// The newcomer is entitled.
    pub(super) fn replace(&mut self, who: usize, record: Record) {
        let Some(newcomer) = self.processes[who].newcomer.take() else {
            return;
        };
        if let Some(old) = self.processes[who].peer {
            self.processes[old].word = Some(record);
        }
        self.hang_up(who);
        let follows = self.processes[newcomer].peer == Some(who);
        let process = &mut self.processes[who];
        (process.log, process.peer) = (Some(newcomer), follows.then_some(newcomer));
        (process.runs, process.shut, process.stands) = (true, false, false);
        // It has gone while the arbiter was asked.
        process.eof = !follows;
        process.refused = false;
        if follows {
            self.processes[newcomer].word = Some(record);
        }
        self.forget_unused();
    }

    /// Nothing comes of a newcomer, if there is one.
    pub(super) fn drop_newcomer(&mut self, who: usize) {
        self.processes[who].stands = false;
        if let Some(newcomer) = self.processes[who].newcomer.take()
            && self.processes[newcomer].peer == Some(who)
        {
            self.processes[newcomer].eof = true;
        }
    }

    /// The third process protects the machine that the first one has served all the time.
    #[cfg(test)]
    pub(super) fn was_replaced(&self) -> bool {
        let serves = matches!(&self.processes[0].role, Role::Primary(machine) if machine.phase() == Phase::Protected);
        let third = self.processes.get(2).map(|process| &process.role);
        serves && self.record.epoch.0 == 1 && matches!(third, Some(Role::Backup(_)))
    }
}
