//! A backup that joins: what a recruiter's thread and the two sides do until the copy is whole. It can be cut off at any step.
#![forbid(unsafe_code)]

use hypervisor::protocol::primary::Phase;

use super::faults::Point;
use super::process::{Input, Role};
use super::world::{What, World};
use super::{MS, Plant};

/// How long a recruiter waits for a backup that says nothing more.
const PATIENCE: u64 = 500 * MS;

/// A copy that was begun.
pub(super) struct Attempt {
    pub(super) primary: usize,
    pub(super) backup: usize,
    pub(super) connection: usize,
    pub(super) log: Option<usize>,
    /// The vCPU thread is to cut.
    pub(super) cut_wanted: bool,
    /// It is to take the place of the backup that there is.
    pub(super) replaces: bool,
    /// Nothing more comes of it: it has ended well or badly.
    pub(super) over: bool,
}

/// What happens next to it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// The rounds are done: the guest is to be cut.
    Cut,
    /// The last pages and the checkpoint are in place.
    Whole,
    /// Both sides have lost their patience.
    Late,
}

impl World {
    /// A recruiter looks for a backup that listens.
    pub(super) fn look_around(&mut self, who: usize) {
        if !self.processes[who].looking {
            return;
        }
        let Some(backup) = self.who_listens(who) else {
            return self.after(10 * MS, What::Looks(who));
        };
        self.begin_copy(who, backup, false);
    }

    /// A backup that listens, and that this process reaches.
    pub(super) fn who_listens(&self, who: usize) -> Option<usize> {
        let here = self.host(who);
        (0..self.processes.len()).find(|&other| {
            let process = &self.processes[other];
            process.alive
                && self.now >= process.frozen_until
                && matches!(process.role, Role::Listening)
                && !self.is_cut(here, process.host)
                && !self.is_cut(process.host, here)
        })
    }

    pub(super) fn begin_copy(&mut self, who: usize, backup: usize, replaces: bool) {
        let connection = self.connect([who, backup]);
        self.note(|world| {
            let name = |who: usize| &world.processes[who].name;
            format!("{} copies itself to {}", name(who), name(backup))
        });
        let joiner = &mut self.processes[backup];
        joiner.role = Role::Copying;
        joiner.connection = Some(connection);
        joiner.peer = Some(who);
        joiner.source = None;
        let attempt = self.attempts.len();
        self.attempts.push(Attempt {
            primary: who,
            backup,
            connection,
            log: None,
            cut_wanted: false,
            replaces,
            over: false,
        });
        self.count("copies begun");
        let rounds = MS + self.random.below(40 * MS);
        self.after(rounds, What::Join(attempt, Step::Cut));
        self.after(PATIENCE, What::Join(attempt, Step::Late));
    }

    pub(super) fn join(&mut self, number: usize, step: Step) {
        let Attempt {
            primary,
            backup,
            over,
            ..
        } = self.attempts[number];
        if let Step::Late = step {
            self.loses_patience(number, backup);
        }
        if over || !self.processes[primary].alive {
            return;
        }
        match step {
            Step::Late => self.attempt_fails(number),
            Step::Cut if self.attempts[number].replaces => {
                self.deliver(primary, Input::NearlyWhole(number));
            }
            Step::Cut => self.attempts[number].cut_wanted = true,
            Step::Whole => self.copy_is_whole(number, backup),
        }
    }

    /// A backup whose primary says nothing more waits for another.
    fn loses_patience(&mut self, number: usize, who: usize) {
        let connection = self.attempts[number].connection;
        let process = &self.processes[who];
        let copying =
            matches!(process.role, Role::Copying) && process.connection == Some(connection);
        if process.alive && copying {
            self.listens_again(who);
        }
    }

    /// On the primary's vCPU thread, between two steps of its guest.
    pub(super) fn cut_if_wanted(&mut self, who: usize) {
        let wanted = self
            .attempts
            .iter()
            .position(|attempt| attempt.primary == who && attempt.cut_wanted);
        let Some(number) = wanted.filter(|_| self.processes[who].runs) else {
            return;
        };
        self.attempts[number].cut_wanted = false;
        let backup = self.attempts[number].backup;
        let base = self.processes[who].guest;
        let log = self.new_log(who, backup, base);
        self.attempts[number].log = Some(log);
        self.note(|world| format!("{}'s guest logs to the joiner", world.processes[who].name));
        let process = &mut self.processes[who];
        process.log = Some(log);
        for held in &mut process.held {
            held.0 = 0;
        }
        self.deliver(who, Input::Taken(number));
        let when = self.stream(self.host(who), self.host(backup), 0) + self.random.below(10 * MS);
        self.at(when, What::Join(number, Step::Whole));
        if self.plant == Some(Plant::ReadyBeforeWhole) {
            self.deliver(who, Input::Ready(number));
        }
        self.point(Point::Cut);
    }

    fn copy_is_whole(&mut self, number: usize, backup: usize) {
        let Attempt {
            primary,
            connection,
            log,
            ..
        } = self.attempts[number];
        let joiner = &self.processes[backup];
        if !joiner.alive {
            return;
        }
        if self.now < joiner.frozen_until {
            let thaw = joiner.frozen_until;
            return self.at(thaw, What::Join(number, Step::Whole));
        }
        if joiner.connection != Some(connection) || !matches!(joiner.role, Role::Copying) {
            return;
        }
        self.become_candidate(backup, primary, log);
        if self.plant != Some(Plant::ReadyBeforeWhole) {
            self.send_over(connection, backup, Input::Ready(number));
        }
        self.point(Point::CopyWhole);
    }

    /// The recruiter gives up; it looks again later.
    pub(super) fn attempt_fails(&mut self, number: usize) {
        let attempt = &mut self.attempts[number];
        if std::mem::replace(&mut attempt.over, true) {
            return;
        }
        attempt.cut_wanted = false;
        let Attempt {
            primary,
            connection,
            replaces,
            ..
        } = *attempt;
        self.note(|world| format!("{}'s copy comes to nothing", world.processes[primary].name));
        self.count("copies that failed");
        self.hang_up(connection, primary);
        self.deliver(primary, Input::Failed(number));
        if replaces {
            self.processes[primary].looking = false;
            if self.processes[primary].phase() == Some(Phase::Unprotected) {
                self.look_again(primary);
            }
        } else {
            self.after(20 * MS, What::Looks(primary));
        }
    }

    /// News of the recruiter reaches the primary's I/O thread. The phase in which it is heard decides what it means.
    pub(super) fn recruit_is_ready(&mut self, who: usize, number: usize) -> bool {
        if std::mem::replace(&mut self.attempts[number].over, true) {
            return false;
        }
        self.processes[who].looking = false;
        if self.processes[who].phase() == Some(Phase::Joining) && !self.attempts[number].replaces {
            return true;
        }
        // It was lost again before its word came.
        self.hang_up(self.attempts[number].connection, who);
        if self.processes[who].phase() == Some(Phase::Unprotected)
            || !self.attempts[number].replaces
        {
            self.look_again(who);
        }
        false
    }

    pub(super) fn look_again(&mut self, who: usize) {
        if !std::mem::replace(&mut self.processes[who].looking, true) {
            self.after(MS, What::Looks(who));
        }
    }
}
