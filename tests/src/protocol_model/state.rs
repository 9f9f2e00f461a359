//! A state of the whole: processes, logs, the arbiter, and what the world has seen.
#![forbid(unsafe_code)]

use hypervisor::protocol::backup::{Action as BackupDoes, Event as BackupSees};
use hypervisor::protocol::candidate::{Action as CandidateDoes, Event as CandidateSees};
use hypervisor::protocol::heartbeat::Progress;
use hypervisor::protocol::primary::{Action as PrimaryDoes, Event as PrimarySees, Phase};
use hypervisor::protocol::{
    Answer, Backup, Candidate, Moment, Primary, Record, Request, State as Standing, Unfit,
};

use super::World;
use super::process::{Guest, LATE, Log, NOW, Process, Role, Work, holds, identity, pair, timing};
use super::steps::Step;
use crate::simulator::{Plant, takes_back};

/// A request on its way to the arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    pub(super) who: usize,
    request: Request,
    /// Whether anybody will hear the answer.
    pub(super) heard: bool,
}

/// A state of the whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub(super) processes: Vec<Process>,
    /// By their readers.
    pub(super) logs: Vec<Option<Log>>,
    pub(super) record: Record,
    pub(super) requests: Vec<Asked>,
    pub(super) seen: Guest,
    pub(super) broken: Option<String>,
    pub(super) deaths: u8,
    pub(super) lost_answers: u8,
    pub(super) unfit: u8,
    pub(super) powered_off: bool,
    pub(super) joins: u8,
    pub(super) switches: u8,
    pub(super) replacements: u8,
}

const PROGRESS: Progress = Progress {
    position: hypervisor::position::Position(0),
    turns: 0,
    owes: false,
    stood: std::time::Duration::ZERO,
};

impl State {
    pub(super) fn first(world: &World) -> Self {
        let scope = world.scope;
        let mut processes = Vec::new();
        let record = Record::cold_start(None, identity(0), (!scope.alone).then(|| identity(1)));
        let primary = if scope.alone {
            Primary::unprotected(identity(0), record, timing(), NOW)
        } else {
            Primary::protected(pair(0, 1), record, timing(), NOW)
        };
        processes.push(Process {
            runs: true,
            ..Process::new(Role::Primary(primary))
        });
        processes.push(Process::new(Role::Listening));
        if scope.joiner {
            processes.push(Process::new(Role::Listening));
        }
        let mut logs = vec![None; processes.len()];
        if !scope.alone
            && let Some(backup) = Backup::new(pair(1, 0), record, timing(), NOW)
        {
            logs[1] = Some(Log::new(0, Guest::new()));
            processes[0].log = Some(1);
            processes[0].peer = Some(1);
            processes[1].role = Role::Backup(backup);
            processes[1].source = Some(1);
            processes[1].peer = Some(0);
        }
        Self {
            processes,
            logs,
            record,
            requests: Vec::new(),
            seen: Guest::new(),
            broken: None,
            deaths: 0,
            lost_answers: 0,
            unfit: 0,
            powered_off: false,
            joins: 0,
            switches: 0,
            replacements: 0,
        }
    }

    /// Whether it listens, and nobody still writes to its memory.
    pub(super) fn is_free_to_join(&self, who: usize) -> bool {
        self.processes[who].role == Role::Listening
            && self.processes.iter().all(|other| other.log != Some(who))
    }

    pub(super) fn take(&mut self, world: &World, step: Step) {
        match step {
            Step::Guest(who) => self.guest(world, who),
            Step::Arrives(log) => self.arrives(world, log),
            Step::Commits(log) => self.commits(log),
            Step::Refused(who) => {
                self.processes[who].refused = false;
                self.primary(world, who, NOW, PrimarySees::LogFenced);
            }
            Step::FenceTakes(who) => {
                self.processes[who].fence = Work::Done;
                let fences = world.plant != Some(Plant::NoFence);
                if let Some(log) = self.source(who) {
                    log.fenced = fences;
                }
            }
            Step::FenceReturns(who) => {
                self.processes[who].fence = Work::None;
                self.backup(world, who, NOW, BackupSees::Fenced);
            }
            Step::Drains(who) => {
                let stored = self.source(who).map(|log| log.stored.1.clone());
                let process = &mut self.processes[who];
                process.drain = Work::Done;
                process.drained = true;
                process.guest = stored.unwrap_or_default();
            }
            Step::Drained(who) => {
                self.processes[who].drain = Work::None;
                self.backup(world, who, NOW, BackupSees::Drained);
            }
            Step::Decides(number) => self.decides(world, number),
            Step::AnswerLost(number) => {
                self.lost_answers += 1;
                self.requests[number].heard = false;
                self.fails(number, true);
            }
            Step::NotSent(number) => {
                self.lost_answers += 1;
                self.fails(number, false);
                self.requests.remove(number);
            }
            Step::Answer(who) => self.answered(world, who, NOW),
            Step::AnswerLate(who) => self.answered(world, who, LATE),
            Step::Tick(who) => self.tick(world, who, NOW),
            Step::Late(who) => self.tick(world, who, LATE),
            Step::Eof(who) => self.eof(world, who),
            Step::Cut(who, joiner) => self.cut(world, who, joiner),
            Step::Whole(who) => self.whole(world, who),
            Step::Ready(who) => self.ready(world, who),
            Step::Word(who) => {
                if let Some(record) = self.processes[who].word.take() {
                    self.candidate(world, who, NOW, CandidateSees::Word(record));
                    self.backup(world, who, NOW, BackupSees::Word(record));
                }
            }
            Step::Replace(who, newcomer) => self.begin_replacement(world, who, newcomer),
            Step::Stands(who) => self.stands(who),
            Step::NewcomerGone(who) => self.primary(world, who, NOW, PrimarySees::NewcomerLost),
            Step::Dies(who) => {
                self.deaths += 1;
                self.dies(who);
            }
            Step::Unfit(who) => {
                self.unfit += 1;
                let unfit = Unfit::Corrupt(String::new());
                self.backup(world, who, NOW, BackupSees::Unfit(unfit));
            }
            Step::PowerOff(who) => {
                self.powered_off = true;
                self.primary(world, who, NOW, PrimarySees::End);
            }
            Step::Switch(who) => {
                self.switches += 1;
                self.primary(world, who, NOW, PrimarySees::Switch);
            }
            Step::HandsOver(who) => self.hands_over(world, who),
            Step::HandedOver(who) => {
                self.processes[who].handed = false;
                self.backup(world, who, NOW, BackupSees::HandedOver);
            }
        }
        self.check();
    }

    fn source(&mut self, who: usize) -> Option<&mut Log> {
        let log = self.processes[who].source?;
        self.logs[log].as_mut()
    }

    fn guest(&mut self, world: &World, who: usize) {
        let process = &mut self.processes[who];
        process.guest.push(who as u8);
        let output = process.guest.clone();
        match process.log {
            Some(log) => {
                let not_waited_for = world.plant == Some(Plant::JoinerNotWaitedFor)
                    && matches!(&process.role, Role::Primary(p) if matches!(p.phase(), Phase::Joining | Phase::Entitling));
                let Some(log) = &mut self.logs[log] else {
                    return;
                };
                log.sent.push(output.clone());
                let number = log.stored.0 + log.sent.len() as u8;
                if not_waited_for {
                    self.release(&output);
                } else {
                    process.held.push((number, output));
                }
            }
            None if process.shut => process.held.push((0, output)),
            None => self.release(&output),
        }
    }

    fn arrives(&mut self, world: &World, number: usize) {
        let Some(log) = &mut self.logs[number] else {
            return;
        };
        let entry = log.sent.remove(0);
        let writer = log.writer;
        if log.fenced {
            log.sent.clear();
            let writer = &mut self.processes[writer];
            if writer.is_alive() && writer.log == Some(number) {
                (writer.runs, writer.refused) = (false, true);
            }
            return;
        }
        if world.plant == Some(Plant::AckBeforeStore) {
            // It is said to have committed, and is stored when the next one comes.
            log.committed = log.committed.max(log.stored.0 + 1);
            let upto = log.committed;
            log.sent.insert(0, entry);
            return self.let_out(writer, upto);
        }
        log.stored = (log.stored.0 + 1, entry);
        if log.hands_over == Some(log.stored.0) {
            log.hands_over = None;
            self.processes[number].handed = true;
        }
    }

    /// The guest stands, and the log's last entry says so. It makes no output.
    fn hands_over(&mut self, world: &World, who: usize) {
        let process = &mut self.processes[who];
        (process.handing, process.runs, process.shut) = (false, false, true);
        let guest = process.guest.clone();
        let Some(log) = process.log.and_then(|log| self.logs[log].as_mut()) else {
            return;
        };
        log.sent.push(guest);
        log.hands_over = Some(log.stored.0 + log.sent.len() as u8);
        if world.plant == Some(Plant::HandsOverAndRunsOn) {
            // It lets out what it makes from here on, and logs none of it.
            let process = &mut self.processes[who];
            (process.runs, process.shut, process.log) = (true, false, None);
        }
    }

    fn commits(&mut self, number: usize) {
        let Some(log) = &mut self.logs[number] else {
            return;
        };
        log.committed = log.stored.0;
        let (writer, upto) = (log.writer, log.committed);
        if !self.processes[writer].shut {
            self.let_out(writer, upto);
        }
    }

    fn let_out(&mut self, who: usize, upto: u8) {
        while let Some((number, _)) = self.processes[who].held.first()
            && *number <= upto
        {
            let (_, output) = self.processes[who].held.remove(0);
            self.release(&output);
        }
    }

    /// The world sees an output.
    fn release(&mut self, output: &[u8]) {
        if holds(&self.seen, output) {
            return;
        }
        if !holds(output, &self.seen) {
            self.broken = Some(format!(
                "{output:?} left, which does not continue {:?}",
                self.seen
            ));
        }
        self.seen = output.to_vec();
    }

    fn decides(&mut self, world: &World, number: usize) {
        let Asked {
            who,
            request,
            heard,
        } = self.requests.remove(number);
        let answer = match request {
            Request::Read => Answer::Read(Some(self.record)),
            Request::Swap { to, .. } if to == self.record => Answer::Swapped,
            Request::Swap { from, to } => {
                let equal = match world.plant {
                    Some(Plant::NoArbiter) => true,
                    Some(Plant::ClaimFromRecordJustRead) if to.state == Standing::Claimed => true,
                    Some(Plant::StaleBackup) => {
                        let key = |r: Record| (r.epoch, r.state, r.owner);
                        key(from) == key(self.record)
                    }
                    _ => from == self.record,
                };
                if equal {
                    if to.rank() <= self.record.rank() && world.plant.is_none() {
                        self.broken = Some(format!("the record fell to {to}"));
                    }
                    self.record = to;
                    Answer::Swapped
                } else {
                    Answer::Lost(Some(self.record))
                }
            }
        };
        if heard {
            self.processes[who].answer = Some(answer);
        }
    }

    fn fails(&mut self, number: usize, may_have_landed: bool) {
        let who = self.requests[number].who;
        self.processes[who].answer = Some(Answer::Failed {
            may_have_landed,
            why: String::new(),
        });
    }

    fn ask(&mut self, who: usize, request: Request) {
        if std::mem::replace(&mut self.processes[who].asks, true) {
            self.broken = Some(format!(
                "{who} asks a second question before the first is answered"
            ));
        }
        self.requests.push(Asked {
            who,
            request,
            heard: true,
        });
    }

    fn answered(&mut self, world: &World, who: usize, now: Moment) {
        let process = &mut self.processes[who];
        process.asks = false;
        let Some(answer) = process.answer.take() else {
            return;
        };
        match process.role {
            Role::Primary(_) => self.primary(world, who, now, PrimarySees::Arbiter(answer)),
            Role::Candidate(_) => self.candidate(world, who, now, CandidateSees::Arbiter(answer)),
            Role::Backup(_) => self.backup(world, who, now, BackupSees::Arbiter(answer)),
            Role::Listening | Role::Copying | Role::Dead => {}
        }
    }

    fn tick(&mut self, world: &World, who: usize, now: Moment) {
        match self.processes[who].role {
            Role::Primary(_) => self.primary(world, who, now, PrimarySees::Tick(PROGRESS)),
            Role::Candidate(_) => self.candidate(world, who, now, CandidateSees::Tick),
            Role::Backup(_) => self.backup(world, who, now, BackupSees::Tick(PROGRESS)),
            Role::Listening | Role::Copying | Role::Dead => {}
        }
    }

    fn eof(&mut self, world: &World, who: usize) {
        let process = &mut self.processes[who];
        (process.eof, process.word, process.peer) = (false, None, None);
        match process.role {
            Role::Primary(_) => self.primary(world, who, NOW, PrimarySees::PeerDied),
            Role::Candidate(_) => self.candidate(world, who, NOW, CandidateSees::PeerDied),
            Role::Backup(_) => self.backup(world, who, NOW, BackupSees::PeerDied),
            Role::Copying => self.listens(who),
            Role::Listening | Role::Dead => {}
        }
    }

    fn listens(&mut self, who: usize) {
        let process = &mut self.processes[who];
        process.role = Role::Listening;
        process.source = None;
        process.ready = false;
        process.handed = false;
        process.guest.clear();
        self.hang_up(who);
        self.forget_unused();
    }

    /// Memory that nobody writes to and nobody follows.
    pub(super) fn forget_unused(&mut self) {
        for number in 0..self.logs.len() {
            let used = self.processes.iter().any(|process| {
                process.is_alive()
                    && (process.log == Some(number) || process.source == Some(number))
            });
            if !used {
                self.logs[number] = None;
            }
        }
    }

    pub(super) fn hang_up(&mut self, who: usize) {
        let Some(peer) = self.processes[who].peer.take() else {
            return;
        };
        let other = &mut self.processes[peer];
        if other.is_alive() && other.peer == Some(who) {
            other.eof = true;
        }
    }

    fn dies(&mut self, who: usize) {
        self.drop_newcomer(who);
        self.hang_up(who);
        self.processes[who] = Process::new(Role::Dead);
        self.forget_unused();
    }

    fn cut(&mut self, world: &World, who: usize, joiner: usize) {
        self.joins += 1;
        let guest = self.processes[who].guest.clone();
        self.logs[joiner] = Some(Log::new(who, guest));
        let process = &mut self.processes[who];
        process.log = Some(joiner);
        process.peer = Some(joiner);
        process.eof = false;
        process.held.iter_mut().for_each(|held| held.0 = 0);
        let other = &mut self.processes[joiner];
        other.role = Role::Copying;
        other.source = Some(joiner);
        other.peer = Some(who);
        other.eof = false;
        other.ready = world.plant == Some(Plant::ReadyBeforeWhole);
        self.primary(world, who, NOW, PrimarySees::Joining);
    }

    fn whole(&mut self, world: &World, who: usize) {
        let Some(log) = &self.logs[who] else { return };
        let primary = log.writer;
        let process = &mut self.processes[who];
        process.role = Role::Candidate(Candidate::new(pair(who, primary), timing(), NOW));
        process.ready |= world.plant != Some(Plant::ReadyBeforeWhole);
    }

    fn ready(&mut self, world: &World, joiner: usize) {
        self.processes[joiner].ready = false;
        let Some(who) = self.processes[joiner].peer else {
            return;
        };
        let joining = match &self.processes[who].role {
            Role::Primary(machine) => machine.phase() == Phase::Joining,
            _ => false,
        };
        if joining && self.processes[who].log == Some(joiner) {
            self.primary(world, who, NOW, PrimarySees::Joined(pair(who, joiner)));
        }
        if self.processes[who].newcomer == Some(joiner) {
            self.newcomer_is_ready(world, who, joiner);
        }
    }

    pub(super) fn primary(&mut self, world: &World, who: usize, now: Moment, event: PrimarySees) {
        let mut actions = Vec::new();
        let Role::Primary(machine) = &mut self.processes[who].role else {
            return;
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                PrimaryDoes::Ask(request) => {
                    self.ask(who, request);
                    if world.plant == Some(Plant::ReclaimsUnasked) && takes_back(&request) {
                        self.processes[who].log = None;
                        self.serve(who);
                    }
                }
                PrimaryDoes::Freeze => {
                    let process = &mut self.processes[who];
                    (process.runs, process.shut, process.handing) = (false, true, false);
                    process.stands = false;
                }
                PrimaryDoes::Stand => self.processes[who].stands = true,
                PrimaryDoes::Replace(record) => self.replace(who, record),
                PrimaryDoes::HandOver => self.processes[who].handing = true,
                PrimaryDoes::Resume => {
                    self.drop_newcomer(who);
                    let process = &mut self.processes[who];
                    (process.runs, process.shut, process.handing) = (true, false, false);
                    let log = process.log.and_then(|log| self.logs[log].as_ref());
                    if let Some(upto) = log.map(|log| log.committed) {
                        self.let_out(who, upto);
                    }
                }
                PrimaryDoes::RunUnprotected(_) => {
                    self.drop_newcomer(who);
                    self.processes[who].log = None;
                    self.processes[who].handing = false;
                    self.processes[who].refused = false;
                    self.processes[who].eof = false;
                    self.hang_up(who);
                    self.serve(who);
                    self.forget_unused();
                }
                PrimaryDoes::Protect(record) => {
                    if let Some(peer) = self.processes[who].peer {
                        self.processes[peer].word = Some(record);
                    }
                }
                PrimaryDoes::Die(_) => self.dies(who),
                PrimaryDoes::SendHeartbeat(_) | PrimaryDoes::Say(_) => {}
            }
        }
    }

    fn candidate(&mut self, world: &World, who: usize, now: Moment, event: CandidateSees) {
        let mut actions = Vec::new();
        let Role::Candidate(machine) = &mut self.processes[who].role else {
            return;
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                CandidateDoes::Ask(request) => self.ask(who, request),
                CandidateDoes::Follow(record) => self.follow(world, who, record),
                CandidateDoes::GiveUp(_) => self.listens(who),
                CandidateDoes::Say(_) => {}
            }
        }
    }

    fn follow(&mut self, world: &World, who: usize, record: Record) {
        let owner = (0..self.processes.len()).find(|&other| identity(other) == record.owner);
        let machine = owner.and_then(|owner| Backup::new(pair(who, owner), record, timing(), NOW));
        let Some(machine) = machine else {
            self.broken = Some(format!("{who} follows a record that does not entitle it"));
            return;
        };
        self.processes[who].role = Role::Backup(machine);
        if self.processes[who].peer.is_none() {
            self.backup(world, who, NOW, BackupSees::PeerDied);
        }
    }

    fn backup(&mut self, world: &World, who: usize, now: Moment, event: BackupSees) {
        let mut actions = Vec::new();
        let Role::Backup(machine) = &mut self.processes[who].role else {
            return;
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                BackupDoes::Ask(request) => self.ask(who, request),
                BackupDoes::Fence => {
                    if world.plant == Some(Plant::DrainBeforeFence) {
                        // Reported at once; it takes effect when everything else has been done.
                        self.processes[who].fence = Work::Done;
                    } else {
                        self.processes[who].fence = Work::Asked;
                    }
                }
                BackupDoes::Drain => self.processes[who].drain = Work::Asked,
                BackupDoes::GoLive => {
                    let process = &mut self.processes[who];
                    (process.runs, process.shut) = (true, true);
                    if world.plant == Some(Plant::EarlyRelease) {
                        self.serve(who);
                    }
                }
                BackupDoes::OpenGate => {
                    let role = std::mem::replace(&mut self.processes[who].role, Role::Listening);
                    if let Role::Backup(machine) = role
                        && let Some(primary) = machine.into_primary(now)
                    {
                        if world.plant == Some(Plant::DrainBeforeFence)
                            && let Some(log) = self.source(who)
                        {
                            log.fenced = true;
                        }
                        self.processes[who].role = Role::Primary(primary);
                        self.processes[who].source = None;
                        self.hang_up(who);
                        self.processes[who].eof = false;
                        self.serve(who);
                    }
                }
                BackupDoes::Die(_) => self.dies(who),
                BackupDoes::SendHeartbeat(_) | BackupDoes::Say(_) => {}
            }
        }
    }

    fn serve(&mut self, who: usize) {
        let process = &mut self.processes[who];
        (process.runs, process.shut) = (true, false);
        for (_, output) in std::mem::take(&mut process.held) {
            self.release(&output);
        }
    }
}

impl Log {
    pub(super) fn new(writer: usize, base: Guest) -> Self {
        Self {
            writer,
            stored: (0, base),
            sent: Vec::new(),
            committed: 0,
            hands_over: None,
            fenced: false,
        }
    }
}
