//! A backup that takes the old one's place while the machine is protected: what the primary's session does about it.
#![forbid(unsafe_code)]

use hypervisor::protocol::Record;
use hypervisor::protocol::primary::{Event as PrimarySees, Phase};

use super::Plant;
use super::faults::Point;
use super::joining::Step;
use super::process::{Input, Role};
use super::world::{What, World};

impl World {
    /// The operator wants another backup: one that listens is given a copy.
    pub(super) fn recruit_another(&mut self, who: usize) {
        let process = &self.processes[who];
        if process.phase() != Some(Phase::Protected) || process.looking {
            return;
        }
        if let Some(backup) = self.who_listens(who) {
            self.processes[who].looking = true;
            self.count("replacements begun");
            self.begin_copy(who, backup, true);
        }
    }

    /// Most of the copy is there.
    pub(super) fn nearly_whole(&mut self, who: usize, number: usize) -> Result<(), String> {
        if self.attempts[number].over {
            return Ok(());
        }
        match self.processes[who].phase() {
            Some(Phase::Protected) => {
                self.processes[who].newcomer = Some(number);
                self.primary(who, PrimarySees::Replace)
            }
            // The old one was lost meanwhile: this one joins as any other.
            Some(Phase::Unprotected) => {
                self.attempts[number].replaces = false;
                self.attempts[number].cut_wanted = true;
                Ok(())
            }
            _ => {
                self.attempt_fails(number);
                Ok(())
            }
        }
    }

    /// The protocol wants the guest to stand. The recruiter may have given up meanwhile.
    pub(super) fn stand(&mut self, who: usize) -> Result<(), String> {
        match self.processes[who].newcomer {
            Some(number) if !self.attempts[number].over => {
                self.processes[who].stand_wanted = true;
                Ok(())
            }
            _ => self.primary(who, PrimarySees::NewcomerLost),
        }
    }

    /// On the primary's vCPU thread, between two steps of its guest.
    pub(super) fn stand_if_wanted(&mut self, who: usize) {
        let process = &mut self.processes[who];
        let (true, true, Some(number)) = (process.stand_wanted, process.runs, process.newcomer)
        else {
            return;
        };
        if !process.held.is_empty() || self.attempts[number].over {
            return;
        }
        (process.stand_wanted, process.runs) = (false, false);
        let base = process.guest;
        let backup = self.attempts[number].backup;
        let log = self.new_log(who, backup, base);
        self.attempts[number].log = Some(log);
        self.note(|world| {
            format!(
                "{}'s guest stands for a newcomer",
                world.processes[who].name
            )
        });
        let when = self.stream(self.host(who), self.host(backup), 0) + self.random.below(10_000);
        self.at(when, What::Join(number, Step::Whole));
        if self.plant == Some(Plant::OldLetGoBeforeSwap) {
            let newcomer = self.processes[backup].identity;
            let record = self.ballot.record.map(|record| record.entitling(newcomer));
            if let (Some(old), Some(record)) = (self.processes[who].connection, record) {
                self.send_over(old, who, Input::Word(old, record));
            }
        }
        self.point(Point::Standing);
    }

    /// A copy that is to take the old one's place is whole.
    pub(super) fn newcomer_is_ready(&mut self, who: usize, number: usize) -> Result<(), String> {
        let standing = self.processes[who].phase() == Some(Phase::Standing)
            && self.processes[who].newcomer == Some(number);
        if !standing {
            // It goes the way of one that was lost.
            self.recruit_is_ready(who, number);
            return Ok(());
        }
        self.attempts[number].over = true;
        self.processes[who].looking = false;
        let backup = self.attempts[number].backup;
        let pair = self.processes[who].pair(self.processes[backup].identity);
        self.primary(who, PrimarySees::Joined(pair))?;
        if self.processes[who].phase() != Some(Phase::Replacing) {
            return Ok(());
        }
        if self.plant == Some(Plant::NewLogBeforeSwap) {
            let process = &mut self.processes[who];
            (process.log, process.runs) = (self.attempts[number].log, true);
        }
        Ok(())
    }

    /// The new backup is entitled: the guest runs on with its log, and the old one is told.
    pub(super) fn replace(&mut self, who: usize, record: Record) {
        let Some(number) = self.processes[who].newcomer.take() else {
            return;
        };
        if let Some(old) = self.processes[who].connection.take() {
            self.send_over(old, who, Input::Word(old, record));
            self.hang_up(old, who);
        }
        let (backup, connection, log) = {
            let attempt = &self.attempts[number];
            (attempt.backup, attempt.connection, attempt.log)
        };
        let process = &mut self.processes[who];
        (process.log, process.peer) = (log, Some(backup));
        process.connection = Some(connection);
        (process.runs, process.shut, process.stand_wanted) = (true, false, false);
        self.tell(who, record);
        if !self.connections[connection].open {
            // It ended while the arbiter was asked.
            self.deliver(who, Input::Eof(connection));
        }
        self.point(Point::Replaced);
    }

    /// Nothing comes of a newcomer, if there is one.
    pub(super) fn drop_newcomer(&mut self, who: usize) {
        self.processes[who].stand_wanted = false;
        let Some(number) = self.processes[who].newcomer.take() else {
            return;
        };
        let attempt = &mut self.attempts[number];
        let connection = attempt.connection;
        if !std::mem::replace(&mut attempt.over, true) {
            self.processes[who].looking = false;
        }
        self.hang_up(connection, who);
    }

    /// A newcomer is taking the backup's place. Where nothing else has happened, the loss of one side is survived.
    pub(super) fn is_being_replaced(&self) -> bool {
        let owner = self.ballot.record.map(|record| record.owner);
        self.processes.iter().any(|process| {
            process.alive
                && self.now >= process.frozen_until
                && Some(process.identity) == owner
                && matches!(&process.role, Role::Primary(machine)
                    if matches!(machine.phase(), Phase::Sounding | Phase::Standing | Phase::Replacing)
                        && !machine.is_about_to_switch())
        })
    }
}
