//! What must hold.
#![forbid(unsafe_code)]

use hypervisor::protocol::backup::Phase as BackupPhase;
use hypervisor::protocol::primary::Phase;
use hypervisor::protocol::{Record, State};

use super::history::Node;
use super::process::Role;
use super::world::World;
use super::{MS, Micros};

/// After a single fault at a protected machine its clients wait for no longer than this: the detector's ceiling (300 ms) by a clock
/// that is 1 % off, a late look (10 ms), and four ways to the arbiter of 8 ms each, fence and drain (3 ms each), a step of the guest
/// (6 ms), with some microseconds of delay each. A joiner's time to get ready, up to 400 ms, takes the place of the detector's.
const LONGEST_GAP: Micros = 480 * MS;

impl World {
    /// An output leaves.
    pub(super) fn release(&mut self, who: usize, node: Node) -> Result<(), String> {
        let name = || self.processes[who].name.clone();
        let (life, step) = (self.history.life(node), self.history.depth(node));
        let Some(seen) = self.seen else {
            self.seen = Some(node);
            self.seen_at = Some(self.now);
            self.lives += 1;
            self.tally.outputs += 1;
            return Ok(());
        };
        if self.history.holds(seen, node) {
            return Ok(());
        }
        if life < self.history.life(seen) {
            // A repeat of an earlier life is harmless; something new would mean that a machine serves that was given up.
            return Err(format!(
                "{} released output {step} of a life that was given up",
                name()
            ));
        }
        if life == self.history.life(seen) && !self.history.holds(node, seen) {
            return Err(format!(
                "{} released output {step}, which does not continue what the world has seen (output {})",
                name(),
                self.history.depth(seen)
            ));
        }
        if life == self.history.life(seen) {
            let gap = self.now - self.seen_at.unwrap_or(self.now);
            if self.bounded {
                self.tally.longest_gap = self.tally.longest_gap.max(gap);
            }
        } else {
            self.lives += 1;
        }
        self.seen = Some(node);
        self.seen_at = Some(self.now);
        self.tally.outputs += 1;
        Ok(())
    }

    /// Whether a process could send the world something new, if it were scheduled now.
    fn can_release(&self, who: usize) -> bool {
        let process = &self.processes[who];
        let open = process.alive && process.runs && !process.shut;
        open && process.log.is_none_or(|log| !self.logs[log].fenced)
    }

    /// What its copy would go on from, if it went live or on.
    fn holds(&self, who: usize) -> Option<Node> {
        let process = &self.processes[who];
        match &process.role {
            Role::Primary(_) | Role::Backup { drained: true, .. } => Some(process.guest),
            Role::Candidate(_) | Role::Backup { .. } => {
                process.source.map(|log| self.logs[log].stored.1)
            }
            Role::Starting(_) | Role::Listening | Role::Copying => None,
        }
    }

    /// Whether the record lets this process go live, or on.
    fn may_serve(&self, who: usize, record: &Record) -> bool {
        let process = &self.processes[who];
        match record.state {
            State::Live => {
                record.owner == process.identity || record.entitled == Some(process.identity)
            }
            State::Claimed | State::Abandoned => {
                let loser = match &process.role {
                    Role::Primary(machine) => record.is_unfinished_claim_on(machine.record()),
                    _ => false,
                };
                loser || (record.owner == process.identity && record.state == State::Claimed)
            }
            State::Ended => false,
        }
    }

    /// After every event.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut releases = None;
        for who in 0..self.processes.len() {
            if !self.processes[who].alive {
                let entitled = self.ballot.record.and_then(|record| record.entitled);
                if !self.struck && entitled == Some(self.processes[who].identity) {
                    return Err(format!(
                        "nothing has happened, and {}, which alone could take over, has ended",
                        self.processes[who].name
                    ));
                }
                continue;
            }
            if self.can_release(who)
                && let Some(other) = releases.replace(who)
            {
                return Err(format!(
                    "two machines can release output: {} and {}",
                    self.processes[other].name, self.processes[who].name
                ));
            }
            let (Some(record), Some(seen)) = (self.ballot.record, self.seen) else {
                continue;
            };
            if record.entitled == Some(self.processes[who].identity)
                && matches!(self.processes[who].role, Role::Copying)
            {
                return Err(format!(
                    "{} is entitled before its copy is whole",
                    self.processes[who].name
                ));
            }
            if self.may_serve(who, &record)
                && let Some(held) = self.holds(who)
                && self.history.life(held) == self.history.life(seen)
                && !self.history.holds(held, seen)
            {
                return Err(format!(
                    "{} may serve by {record}, and lacks output {} that the world has seen (it has {})",
                    self.processes[who].name,
                    self.history.depth(seen),
                    self.history.depth(held)
                ));
            }
        }
        self.check_bounds()
    }

    /// One fault at a protected machine.
    fn check_bounds(&self) -> Result<(), String> {
        if !self.bounded || self.has_ended() {
            return Ok(());
        }
        let waits = self.now - self.seen_at.unwrap_or(self.now);
        if waits > LONGEST_GAP + self.allowance {
            return Err(format!(
                "a single fault, and nothing has left for {} ms",
                waits / MS
            ));
        }
        if self.lives > 1 {
            return Err("the machine was lost by a single fault".to_owned());
        }
        Ok(())
    }

    fn has_ended(&self) -> bool {
        self.ballot
            .record
            .is_some_and(|record| record.state == State::Ended)
            || self.tally.said.contains_key("ended")
    }

    /// A primary serves, and an entitled backup follows it, as both know.
    pub(super) fn is_protected(&self) -> bool {
        let Some(record) = self.ballot.record else {
            return false;
        };
        let mut sides = (false, false);
        for process in self.processes.iter().filter(|process| process.alive) {
            match &process.role {
                Role::Primary(machine) => {
                    sides.0 |= machine.phase() == Phase::Protected
                        && *machine.record() == record
                        && process.runs
                        && !process.shut
                        && self.now >= process.frozen_until;
                }
                Role::Backup { machine, .. } => {
                    sides.1 |= machine.phase() == BackupPhase::Following
                        && machine.record() == record
                        && self.now >= process.frozen_until;
                }
                _ => {}
            }
        }
        sides.0 && sides.1
    }

    /// What is not as it should be, when all faults are over.
    pub(super) fn trouble(&self) -> Option<String> {
        if !self.is_protected() {
            return Some(format!(
                "faults are over, and the machine is not protected again: {}",
                self.standing()
            ));
        }
        let pair = |role: &Role| matches!(role, Role::Primary(_) | Role::Backup { .. });
        let alive = || self.processes.iter().filter(|process| process.alive);
        let stuck = alive().filter(|process| pair(&process.role)).count() != 2
            || alive().any(|process| matches!(process.role, Role::Candidate(_)));
        stuck.then(|| {
            format!(
                "faults are over, and a process waits for ever: {}",
                self.standing()
            )
        })
    }

    fn standing(&self) -> String {
        let record = self
            .ballot
            .record
            .map_or_else(|| "no record".to_owned(), |record| record.to_string());
        let mut parts = vec![record];
        for process in self.processes.iter().filter(|process| process.alive) {
            let role = match &process.role {
                Role::Starting(_) => "starting".to_owned(),
                Role::Primary(machine) => format!("primary, {:?}", machine.phase()),
                Role::Listening => "listening".to_owned(),
                Role::Copying => "copying".to_owned(),
                Role::Candidate(_) => "candidate".to_owned(),
                Role::Backup { machine, .. } => format!("backup, {:?}", machine.phase()),
            };
            parts.push(format!("{} ({}) {role}", process.name, process.identity));
        }
        parts.join("; ")
    }
}
