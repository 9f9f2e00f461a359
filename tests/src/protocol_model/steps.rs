//! What can happen next.
#![forbid(unsafe_code)]

use hypervisor::protocol::primary::Phase;

use super::World;
use super::process::{Role, Work};
use super::state::State;

/// One event; numbers name processes, logs by their reader, and requests in the order in which they were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The guest makes a step.
    Guest(usize),
    /// The next entry reaches the reader's memory, or meets its fence.
    Arrives(usize),
    /// The writer hears that all that is stored has committed.
    Commits(usize),
    /// The writer hears that an entry was refused.
    Refused(usize),
    /// A fence takes effect.
    FenceTakes(usize),
    /// Its machine hears of it.
    FenceReturns(usize),
    /// The log is replayed to its end.
    Drains(usize),
    /// Its machine hears of it.
    Drained(usize),
    /// The arbiter carries a request out.
    Decides(usize),
    /// No answer will come; the request may still be carried out.
    AnswerLost(usize),
    /// The request never left.
    NotSent(usize),
    /// An answer is heard.
    Answer(usize),
    /// The same, long after.
    AnswerLate(usize),
    /// A moment passes.
    Tick(usize),
    /// All of this process's timeouts are over.
    Late(usize),
    /// It reads that its connection is at its end.
    Eof(usize),
    /// The primary's guest begins to log to this process.
    Cut(usize, usize),
    /// Its copy is whole.
    Whole(usize),
    /// Its primary hears so.
    Ready(usize),
    /// It hears that it is entitled.
    Word(usize),
    /// It dies.
    Dies(usize),
    /// Its copy turns out to be of no use.
    Unfit(usize),
    /// The machine is powered off.
    PowerOff(usize),
    /// The operator wants the backup to have the machine.
    Switch(usize),
    /// All outputs have left: the log's last entry hands the machine over.
    HandsOver(usize),
    /// The backup's machine hears of that entry.
    HandedOver(usize),
    /// Another process has most of a copy, and is to take the backup's place.
    Replace(usize, usize),
    /// All outputs have left: the guest stands, and the newcomer gets the rest.
    Stands(usize),
    /// The primary notices that the newcomer is gone.
    NewcomerGone(usize),
}

impl Step {
    /// Whether it brings something on its way: what is no fault, no choice of the guest's, and no stray of the arbiter's network.
    pub(super) fn leads_on(self, state: &State) -> bool {
        match self {
            Self::Guest(_)
            | Self::AnswerLost(_)
            | Self::NotSent(_)
            | Self::Dies(_)
            | Self::Unfit(_)
            | Self::PowerOff(_)
            | Self::Switch(_)
            | Self::Replace(..) => false,
            Self::Decides(number) => state.requests[number].heard,
            _ => true,
        }
    }
}

impl State {
    /// Every step that is possible here.
    pub(super) fn steps(&self, world: &World, steps: &mut Vec<Step>) {
        let scope = &world.scope;
        for number in 0..self.requests.len() {
            steps.push(Step::Decides(number));
            if self.requests[number].heard && self.lost_answers < scope.lost_answers {
                steps.push(Step::AnswerLost(number));
                steps.push(Step::NotSent(number));
            }
        }
        for (reader, log) in self.logs.iter().enumerate() {
            let Some(log) = log else { continue };
            if !log.sent.is_empty() && self.processes[reader].is_alive() {
                steps.push(Step::Arrives(reader));
            }
            let writer = &self.processes[log.writer];
            if log.committed < log.stored.0 && writer.is_alive() && writer.log == Some(reader) {
                steps.push(Step::Commits(reader));
            }
        }
        for (who, process) in self.processes.iter().enumerate() {
            if process.is_alive() {
                self.steps_of(world, who, steps);
            }
        }
    }

    fn steps_of(&self, world: &World, who: usize, steps: &mut Vec<Step>) {
        let scope = &world.scope;
        let process = &self.processes[who];
        if process.runs && process.guest.len() < usize::from(scope.outputs) {
            steps.push(Step::Guest(who));
        }
        if process.refused {
            steps.push(Step::Refused(who));
        }
        match process.fence {
            Work::Asked => steps.push(Step::FenceTakes(who)),
            Work::Done => steps.push(Step::FenceReturns(who)),
            Work::None => {}
        }
        match process.drain {
            Work::Asked => steps.push(Step::Drains(who)),
            Work::Done => steps.push(Step::Drained(who)),
            Work::None => {}
        }
        if process.answer.is_some() {
            steps.push(Step::Answer(who));
            if matches!(process.role, Role::Candidate(_)) {
                steps.push(Step::AnswerLate(who));
            }
        }
        if process.eof {
            steps.push(Step::Eof(who));
        }
        if process.word.is_some() {
            steps.push(Step::Word(who));
        }
        if process.ready {
            steps.push(Step::Ready(who));
        }
        if process.handing && process.runs && process.held.is_empty() {
            steps.push(Step::HandsOver(who));
        }
        if process.stands && process.runs && process.held.is_empty() {
            steps.push(Step::Stands(who));
        }
        if let Some(newcomer) = process.newcomer
            && self.processes[newcomer].peer != Some(who)
        {
            steps.push(Step::NewcomerGone(who));
        }
        if process.handed && matches!(process.role, Role::Backup(_)) {
            steps.push(Step::HandedOver(who));
        }
        match &process.role {
            Role::Primary(machine) => {
                steps.extend([Step::Tick(who), Step::Late(who)]);
                if scope.power_off && !self.powered_off && process.runs {
                    steps.push(Step::PowerOff(who));
                }
                if self.switches < scope.switches && machine.phase() == Phase::Protected {
                    steps.push(Step::Switch(who));
                }
                if self.replacements < scope.replacements && machine.phase() == Phase::Protected {
                    let listens = |other: &usize| self.is_free_to_join(*other);
                    let newcomer = (0..self.processes.len()).find(listens);
                    steps.extend(newcomer.map(|newcomer| Step::Replace(who, newcomer)));
                }
                let free = self.joins < scope.joins
                    && machine.phase() == Phase::Unprotected
                    && process.runs
                    && process.log.is_none();
                if free {
                    let listens = |other: &usize| self.is_free_to_join(*other);
                    let joiner = (0..self.processes.len()).find(listens);
                    steps.extend(joiner.map(|joiner| Step::Cut(who, joiner)));
                }
            }
            Role::Candidate(_) => steps.extend([Step::Tick(who), Step::Late(who)]),
            Role::Backup(_) => {
                steps.extend([Step::Tick(who), Step::Late(who)]);
                if self.unfit < scope.unfit && !process.drained {
                    steps.push(Step::Unfit(who));
                }
            }
            Role::Copying => steps.push(Step::Whole(who)),
            Role::Listening | Role::Dead => {}
        }
        if self.deaths < scope.deaths {
            steps.push(Step::Dies(who));
        }
    }
}
