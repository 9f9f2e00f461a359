//! A process of the machine, and what can reach it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::Duration;

use hypervisor::protocol::primary::Phase;
use hypervisor::protocol::{
    Answer, Backup, Candidate, Identity, Moment, Pair, Primary, Record, Unfit,
};

use super::Micros;
use super::arbiter::Asker;
use super::history::Node;

/// A clock that runs too fast or too slow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    pub(super) offset: u64,
    /// Millionths that it is too fast.
    pub(super) drift: i64,
}

impl Clock {
    pub(super) fn read(self, now: Micros) -> Moment {
        let drifted = now as i64 * 1000 + now as i64 * self.drift / 1000;
        Moment(self.offset + drifted as u64)
    }

    /// How long it is until this moment, at the least a microsecond.
    pub(super) fn until(self, now: Micros, moment: Moment) -> Micros {
        let span = moment.since(self.read(now));
        // A slow clock needs longer: twice as much as it can be wrong.
        let slack = span / 16 + Duration::from_micros(1);
        (span + slack).as_micros() as Micros
    }
}

/// What a process is doing.
pub(super) enum Role {
    /// `doppel primary`, before it has the machine.
    Starting(Starting),
    /// Serves, or has served.
    Primary(Primary),
    /// `doppel backup`, without a primary.
    Listening,
    /// Gets a copy, or meets its primary.
    Copying,
    /// Has a copy and waits to be entitled.
    Candidate(Candidate),
    /// Entitled.
    Backup {
        machine: Backup,
        /// The log was replayed to its end: the copy is a machine of its own from here on.
        drained: bool,
    },
}

/// What a primary needs to begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Starting {
    pub(super) cold: bool,
    pub(super) alone: bool,
    pub(super) found: Option<Record>,
    pub(super) backup: Option<usize>,
    pub(super) begins: Option<Record>,
}

/// What reaches a process, and waits there until it looks.
#[derive(Clone, Debug)]
pub(super) enum Input {
    Datagram(Vec<u8>),
    /// The connection of this number is at its end.
    Eof(usize),
    /// Over the connection: the record that entitles the receiver.
    Word(usize, Record),
    /// The log moved.
    LogTraffic(usize),
    /// An entry was refused.
    LogFenced(usize),
    Fenced,
    Drained,
    Unfit(Unfit),
    End,
    /// The operator wants the backup to have the machine.
    Switch,
    /// The log's entry that hands the machine over was replayed.
    HandedOver(usize),
    Answer(Asker, Answer),
    /// News of the recruiter: most of the copy is there of a backup that is to take the old one's place.
    NearlyWhole(usize),
    /// The operator wants another backup.
    Replace,
    /// News of the recruiter: the guest logs to the joiner of this attempt.
    Taken(usize),
    /// The joiner's copy is whole.
    Ready(usize),
    /// The attempt failed.
    Failed(usize),
}

pub(super) struct Process {
    pub(super) name: String,
    pub(super) host: usize,
    pub(super) identity: Identity,
    /// How often it has listened again.
    pub(super) again: u64,
    pub(super) clock: Clock,
    pub(super) role: Role,
    pub(super) alive: bool,
    pub(super) frozen_until: Micros,
    pub(super) inbox: VecDeque<Input>,
    /// When it looks next.
    pub(super) round_at: Option<Micros>,
    /// The state of its copy.
    pub(super) guest: Node,
    pub(super) runs: bool,
    pub(super) shut: bool,
    /// Outputs that wait, with the number of their entry.
    pub(super) held: VecDeque<(u64, Node)>,
    /// It is to hand the machine over once all that its guest made has left.
    pub(super) handing: bool,
    /// It is to hear that the machine was handed over to it, when it is entitled.
    pub(super) handed: bool,
    /// What it logs to.
    pub(super) log: Option<usize>,
    /// What it follows.
    pub(super) source: Option<usize>,
    pub(super) connection: Option<usize>,
    pub(super) peer: Option<usize>,
    /// A question is under way at the arbiter.
    pub(super) asked: bool,
    /// The recruiter is at work.
    pub(super) looking: bool,
    /// The attempt whose backup is to take the old one's place.
    pub(super) newcomer: Option<usize>,
    /// The guest is to stand for it once all that it made has left.
    pub(super) stand_wanted: bool,
}

impl Process {
    /// When it next wants to be looked at, by its own clock.
    pub(super) fn deadline(&self) -> Option<Moment> {
        match &self.role {
            Role::Primary(machine) => machine.deadline(),
            Role::Candidate(machine) => machine.deadline(),
            Role::Backup { machine, .. } => machine.deadline(),
            Role::Starting(_) | Role::Listening | Role::Copying => None,
        }
    }

    pub(super) fn phase(&self) -> Option<Phase> {
        match &self.role {
            Role::Primary(machine) => Some(machine.phase()),
            _ => None,
        }
    }

    /// Whether it has, or is about to have, a copy that could be the machine's.
    pub(super) fn has_a_stake(&self) -> bool {
        self.alive && !matches!(self.role, Role::Listening)
    }

    pub(super) fn pair(&self, peer: Identity) -> Pair {
        Pair {
            machine: super::world::machine(),
            me: self.identity,
            peer,
        }
    }
}
