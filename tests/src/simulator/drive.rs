//! Drives the protocol's machines as the session does: hand over what has come, tick, carry out the actions in their order.
#![forbid(unsafe_code)]

use hypervisor::protocol::backup::{Action as BackupDoes, Event as BackupSees};
use hypervisor::protocol::candidate::{Action as CandidateDoes, Event as CandidateSees};
use hypervisor::protocol::heartbeat::{Heartbeat, Progress};
use hypervisor::protocol::primary::{Action as PrimaryDoes, Event as PrimarySees, Phase};
use hypervisor::protocol::{
    Answer, Backup, Candidate, Cold, Evidence, Notice, Primary, Reason, Record, Request, State,
};

use super::arbiter::{Asked, Asker};
use super::process::{Input, Role};
use super::world::{KEY, World};
use super::{MS, Micros, Plant};

/// Whether a primary wants to go on after somebody's claim.
pub(crate) fn takes_back(request: &Request) -> bool {
    matches!(request, Request::Swap { from, to }
        if matches!(from.state, State::Claimed | State::Abandoned) && to.owner != from.owner)
}

/// A process looks again after so long at the latest, as the program's I/O thread does.
const ROUND: Micros = 10 * MS;

impl World {
    /// A process takes in what has come, and acts.
    pub(super) fn round(&mut self, who: usize) -> Result<(), String> {
        let process = &mut self.processes[who];
        if !process.alive || process.round_at != Some(self.now) {
            return Ok(());
        }
        if self.now < process.frozen_until {
            process.round_at = None;
            let thaw = process.frozen_until;
            self.wake(who, thaw);
            return Ok(());
        }
        process.round_at = None;
        let inputs = std::mem::take(&mut process.inbox);
        for input in inputs {
            if self.processes[who].alive {
                self.take_in(who, input)?;
            }
        }
        self.tick(who)?;
        let process = &self.processes[who];
        if !process.alive || matches!(process.role, Role::Listening | Role::Copying) {
            return Ok(());
        }
        let until = process.deadline().map_or(ROUND, |deadline| {
            process.clock.until(self.now, deadline).clamp(1, ROUND)
        });
        let late = self.random.below(300);
        self.wake(who, self.now + until + late);
        Ok(())
    }

    fn take_in(&mut self, who: usize, input: Input) -> Result<(), String> {
        match input {
            Input::Datagram(bytes) => self.datagram_comes(who, &bytes),
            Input::Eof(connection) => self.eof(who, connection),
            Input::Word(connection, record) => {
                if self.processes[who].connection != Some(connection) {
                    return Ok(());
                }
                match self.processes[who].role {
                    Role::Backup { .. } => self.backup(who, BackupSees::Word(record)),
                    _ => self.candidate(who, CandidateSees::Word(record)),
                }
            }
            Input::LogTraffic(log) => self.log_traffic(who, log),
            Input::LogFenced(log) => {
                if self.processes[who].log == Some(log) {
                    return self.primary(who, PrimarySees::LogFenced);
                }
                Ok(())
            }
            Input::Fenced => self.backup(who, BackupSees::Fenced),
            Input::Drained => self.backup(who, BackupSees::Drained),
            Input::Unfit(unfit) => self.backup(who, BackupSees::Unfit(unfit)),
            Input::End => self.primary(who, PrimarySees::End),
            Input::Switch => self.primary(who, PrimarySees::Switch),
            Input::HandedOver(log) => {
                self.processes[who].handed = self.processes[who].source == Some(log);
                self.hears_handed_over(who)
            }
            Input::Answer(asker, answer) => self.answered(asker, answer),
            Input::Taken(number) => {
                if self.processes[who].log == self.attempts[number].log {
                    return self.primary(who, PrimarySees::Joining);
                }
                Ok(())
            }
            Input::Ready(number) if self.attempts[number].replaces => {
                self.newcomer_is_ready(who, number)
            }
            Input::Ready(number) => self.welcome(who, number),
            Input::Replace => {
                self.recruit_another(who);
                Ok(())
            }
            Input::NearlyWhole(number) => self.nearly_whole(who, number),
            Input::Failed(number) if self.attempts[number].replaces => {
                if self.processes[who].newcomer == Some(number) {
                    return self.primary(who, PrimarySees::NewcomerLost);
                }
                Ok(())
            }
            Input::Failed(_) => {
                if self.processes[who].phase() == Some(Phase::Joining) {
                    return self.primary(who, PrimarySees::PeerDied);
                }
                Ok(())
            }
        }
    }

    /// A backup hears it at once, a candidate when it is entitled.
    fn hears_handed_over(&mut self, who: usize) -> Result<(), String> {
        let process = &mut self.processes[who];
        if process.handed && matches!(process.role, Role::Backup { .. }) {
            process.handed = false;
            return self.backup(who, BackupSees::HandedOver);
        }
        Ok(())
    }

    fn tick(&mut self, who: usize) -> Result<(), String> {
        let process = &self.processes[who];
        let progress = Progress {
            turns: self.now,
            owes: process.runs,
            ..Progress::default()
        };
        match process.role {
            Role::Primary(_) => self.primary(who, PrimarySees::Tick(progress)),
            Role::Candidate(_) => self.candidate(who, CandidateSees::Tick),
            Role::Backup { .. } => self.backup(who, BackupSees::Tick(progress)),
            Role::Starting(_) | Role::Listening | Role::Copying => Ok(()),
        }
    }

    fn datagram_comes(&mut self, who: usize, bytes: &[u8]) -> Result<(), String> {
        let beat = Heartbeat::decode(bytes, KEY).map_err(|stray| stray.to_string())?;
        match self.processes[who].role {
            Role::Primary(_) => self.primary(who, PrimarySees::Heartbeat(beat)),
            Role::Candidate(_) => self.candidate(who, CandidateSees::Heartbeat(beat)),
            Role::Backup { .. } => self.backup(who, BackupSees::Heartbeat(beat)),
            Role::Starting(_) | Role::Listening | Role::Copying => Ok(()),
        }
    }

    fn log_traffic(&mut self, who: usize, log: usize) -> Result<(), String> {
        let process = &self.processes[who];
        match process.role {
            Role::Primary(_) if process.log == Some(log) => {
                self.primary(who, PrimarySees::LogTraffic)
            }
            Role::Candidate(_) if process.source == Some(log) => {
                self.candidate(who, CandidateSees::LogTraffic)
            }
            Role::Backup { .. } if process.source == Some(log) => {
                self.backup(who, BackupSees::LogTraffic)
            }
            _ => Ok(()),
        }
    }

    /// A connection is at its end.
    fn eof(&mut self, who: usize, connection: usize) -> Result<(), String> {
        let copying = self.attempts.iter().position(|attempt| {
            attempt.primary == who && attempt.connection == connection && !attempt.over
        });
        if let Some(number) = copying {
            self.attempt_fails(number);
        }
        if self.processes[who].connection != Some(connection) {
            return Ok(());
        }
        self.processes[who].connection = None;
        match self.processes[who].role {
            Role::Primary(_) => self.primary(who, PrimarySees::PeerDied),
            Role::Candidate(_) => self.candidate(who, CandidateSees::PeerDied),
            Role::Backup { .. } => self.backup(who, BackupSees::PeerDied),
            Role::Copying => {
                self.listens_again(who);
                Ok(())
            }
            Role::Starting(_) => {
                self.end_process(who);
                Ok(())
            }
            Role::Listening => Ok(()),
        }
    }

    /// A backup that joins says that its copy is whole.
    fn welcome(&mut self, who: usize, number: usize) -> Result<(), String> {
        if !self.recruit_is_ready(who, number) {
            return Ok(());
        }
        let (backup, connection) = {
            let attempt = &self.attempts[number];
            (attempt.backup, attempt.connection)
        };
        self.processes[who].connection = Some(connection);
        self.processes[who].peer = Some(backup);
        let pair = self.processes[who].pair(self.processes[backup].identity);
        self.primary(who, PrimarySees::Joined(pair))
    }

    pub(super) fn become_candidate(&mut self, who: usize, primary: usize, log: Option<usize>) {
        let identity = self.processes[primary].identity;
        let timing = self.timing;
        let now = self.processes[who].clock.read(self.now);
        let base = log.map(|log| self.logs[log].stored.1);
        let process = &mut self.processes[who];
        let pair = process.pair(identity);
        process.role = Role::Candidate(Candidate::new(pair, timing, now));
        process.source = log;
        process.peer = Some(primary);
        if let Some(base) = base {
            process.guest = base;
        }
        self.note(|world| format!("{} has a whole copy", world.processes[who].name));
        let now = self.now;
        self.wake(who, now);
    }

    fn answered(&mut self, asker: Asker, answer: Answer) -> Result<(), String> {
        let who = asker.who;
        if asker != self.asker(who) {
            self.count("answers that came too late");
            return Ok(());
        }
        self.processes[who].asked = false;
        self.note(|world| format!("{} is answered: {answer:?}", world.processes[who].name));
        match self.processes[who].role {
            Role::Primary(_) => self.primary(who, PrimarySees::Arbiter(answer)),
            Role::Candidate(_) => self.candidate(who, CandidateSees::Arbiter(answer)),
            Role::Backup { .. } => self.backup(who, BackupSees::Arbiter(answer)),
            Role::Starting(_) => self.begins(who, answer),
            // A candidate that gave up.
            Role::Listening | Role::Copying => Ok(()),
        }
    }

    pub(super) fn primary(&mut self, who: usize, event: PrimarySees) -> Result<(), String> {
        let mut actions = Vec::new();
        let process = &mut self.processes[who];
        let now = process.clock.read(self.now);
        let Role::Primary(machine) = &mut process.role else {
            return Ok(());
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                PrimaryDoes::SendHeartbeat(beat) => self.beat(who, &beat),
                PrimaryDoes::Ask(request) => {
                    self.ask(who, Asked::Protocol(request))?;
                    if self.plant == Some(Plant::ReclaimsUnasked) && takes_back(&request) {
                        self.processes[who].log = None;
                        self.serve(who)?;
                    }
                }
                PrimaryDoes::Freeze => {
                    let process = &mut self.processes[who];
                    (process.runs, process.shut, process.handing) = (false, true, false);
                    process.stand_wanted = false;
                }
                PrimaryDoes::Stand => self.stand(who)?,
                PrimaryDoes::Replace(record) => self.replace(who, record),
                PrimaryDoes::HandOver => self.processes[who].handing = true,
                PrimaryDoes::Resume => {
                    self.drop_newcomer(who);
                    self.resume(who)?;
                }
                PrimaryDoes::RunUnprotected(_) => {
                    self.drop_newcomer(who);
                    let process = &mut self.processes[who];
                    process.log = None;
                    process.peer = None;
                    process.handing = false;
                    if let Some(connection) = process.connection.take() {
                        self.hang_up(connection, who);
                    }
                    self.serve(who)?;
                    self.look_again(who);
                }
                PrimaryDoes::Protect(record) => self.tell(who, record),
                PrimaryDoes::Say(notice) => self.say(who, &notice),
                PrimaryDoes::Die(reason) => {
                    if matches!(reason, Reason::HandedOver { .. }) {
                        self.count("switched over");
                    }
                    self.note(|world| format!("{} ends: {reason}", world.processes[who].name));
                    self.end_process(who);
                }
            }
        }
        Ok(())
    }

    fn candidate(&mut self, who: usize, event: CandidateSees) -> Result<(), String> {
        let mut actions = Vec::new();
        let process = &mut self.processes[who];
        let now = process.clock.read(self.now);
        let Role::Candidate(machine) = &mut process.role else {
            return Ok(());
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                CandidateDoes::Ask(request) => self.ask(who, Asked::Protocol(request))?,
                CandidateDoes::Follow(record) => self.follow(who, record)?,
                CandidateDoes::Say(notice) => self.say(who, &notice),
                CandidateDoes::GiveUp(why) => {
                    self.note(|world| {
                        format!("{} gives its copy up: {why:?}", world.processes[who].name)
                    });
                    self.count("copies given up");
                    self.listens_again(who);
                }
            }
        }
        Ok(())
    }

    /// A candidate is entitled.
    fn follow(&mut self, who: usize, record: Record) -> Result<(), String> {
        let timing = self.timing;
        let process = &mut self.processes[who];
        let now = process.clock.read(self.now);
        let pair = process.pair(record.owner);
        let machine = Backup::new(pair, record, timing, now).ok_or_else(|| {
            format!("a candidate follows a record that does not entitle it: {record}")
        })?;
        process.role = Role::Backup {
            machine,
            drained: false,
        };
        self.note(|world| format!("{} is the backup by {record}", world.processes[who].name));
        self.hears_handed_over(who)?;
        if self.processes[who].connection.is_none() {
            return self.backup(who, BackupSees::PeerDied);
        }
        Ok(())
    }

    fn backup(&mut self, who: usize, event: BackupSees) -> Result<(), String> {
        let mut actions = Vec::new();
        let process = &mut self.processes[who];
        let now = process.clock.read(self.now);
        let Role::Backup { machine, .. } = &mut process.role else {
            return Ok(());
        };
        machine.handle(now, event, &mut actions);
        // As the program does: nothing waits longer than a fence.
        actions.sort_by_key(|action| !matches!(action, BackupDoes::Fence));
        for action in actions {
            match action {
                BackupDoes::SendHeartbeat(beat) => self.beat(who, &beat),
                BackupDoes::Ask(request) => self.ask(who, Asked::Protocol(request))?,
                BackupDoes::Fence => self.begin_fence(who),
                BackupDoes::Drain => self.begin_drain(who),
                BackupDoes::GoLive => {
                    self.note(|world| format!("{}'s guest runs", world.processes[who].name));
                    let process = &mut self.processes[who];
                    (process.runs, process.shut) = (true, true);
                    if self.plant == Some(Plant::EarlyRelease) {
                        self.serve(who)?;
                    }
                }
                BackupDoes::OpenGate => self.open_gate(who)?,
                BackupDoes::Say(notice) => self.say(who, &notice),
                BackupDoes::Die(reason) => {
                    if matches!(reason, Reason::Relieved { .. }) {
                        self.count("relieved");
                    }
                    self.note(|world| format!("{} ends: {reason}", world.processes[who].name));
                    self.end_process(who);
                }
            }
        }
        Ok(())
    }

    fn open_gate(&mut self, who: usize) -> Result<(), String> {
        let process = &mut self.processes[who];
        let now = process.clock.read(self.now);
        let Role::Backup { machine, .. } = std::mem::replace(&mut process.role, Role::Listening)
        else {
            return Err("a gate was opened twice".to_owned());
        };
        let primary = machine
            .into_primary(now)
            .ok_or("the gate opened, but not for a primary")?;
        process.role = Role::Primary(primary);
        process.source = None;
        process.peer = None;
        process.connection = None;
        self.serve(who)?;
        self.look_again(who);
        Ok(())
    }

    /// The guest runs on as before it was to be handed over; what has committed meanwhile leaves.
    fn resume(&mut self, who: usize) -> Result<(), String> {
        let process = &mut self.processes[who];
        (process.runs, process.shut, process.handing) = (true, false, false);
        match process.log {
            Some(log) => self.let_out_committed(who, log),
            None => Ok(()),
        }
    }

    /// The process serves with nobody behind it: what it held leaves.
    fn serve(&mut self, who: usize) -> Result<(), String> {
        self.note(|world| format!("{} serves alone", world.processes[who].name));
        let process = &mut self.processes[who];
        (process.runs, process.shut) = (true, false);
        while let Some((_, node)) = self.processes[who].held.pop_front() {
            self.release(who, node)?;
        }
        Ok(())
    }

    /// Tells the backup that it is entitled.
    pub(super) fn tell(&mut self, who: usize, record: Record) {
        if let Some(connection) = self.processes[who].connection {
            self.send_over(connection, who, Input::Word(connection, record));
        }
    }

    fn beat(&mut self, who: usize, beat: &Heartbeat) {
        if let Some(peer) = self.processes[who].peer {
            self.datagram(who, peer, &beat.encode(KEY));
        }
    }

    fn say(&mut self, who: usize, notice: &Notice) {
        self.count(match notice {
            Notice::Live(_) => "went live",
            Notice::Abandoned(_) => "said abandoned",
            Notice::Unprotected(_) => "went on alone",
            Notice::Protected(_) => "protected again",
            Notice::JoinFailed(_) => "joins that failed",
            Notice::Frozen(_) => "frozen by a claim",
            Notice::Reclaiming(_) => "asked to go on after a claim",
            Notice::HeardAgain => "heard again",
            Notice::BackupLost(_) => "backup lost",
            Notice::Claiming {
                because: Evidence::HandedOver,
                ..
            } => "claimed as told",
            Notice::Claiming { .. } => "primary given up",
            Notice::NotTaken(_) => "switch-over called off",
            Notice::NotSwitched(_) => "switch-over not begun",
            Notice::Replaced(_) => "replaced",
            Notice::NotReplaced(_) => "not replaced",
            _ => "other notices",
        });
        self.note(|world| format!("{} says: {notice}", world.processes[who].name));
    }

    /// `doppel primary`, on its way to the machine.
    fn begins(&mut self, who: usize, answer: Answer) -> Result<(), String> {
        let Role::Starting(mut starting) = self.processes[who].role else {
            return Ok(());
        };
        let cold = match starting.cold {
            true => Cold::Whatever,
            false => Cold::No,
        };
        match (starting.begins, answer) {
            (None, Answer::Read(found)) if Record::lets_start(found.as_ref(), cold) => {
                starting.found = found;
                let listens = self.who_listens(who);
                starting.backup = listens.filter(|_| !starting.alone);
                let root = self.history.begin();
                self.processes[who].guest = root;
                let backup = starting.backup;
                if let Some(backup) = backup {
                    let connection = self.connect([who, backup]);
                    let log = self.new_log(who, backup, root);
                    self.processes[who].log = Some(log);
                    self.processes[who].connection = Some(connection);
                    self.processes[who].peer = Some(backup);
                    self.processes[backup].connection = Some(connection);
                    self.become_candidate(backup, who, Some(log));
                }
                let me = self.processes[who].identity;
                let entitled = backup.map(|backup| self.processes[backup].identity);
                let record = Record::cold_start(starting.found.as_ref(), me, entitled);
                starting.begins = Some(record);
                self.processes[who].role = Role::Starting(starting);
                self.ask(who, Asked::Begin(starting.found, record))
            }
            (Some(record), Answer::Swapped) => {
                self.note(|world| format!("{} begins: {record}", world.processes[who].name));
                let timing = self.timing;
                let process = &mut self.processes[who];
                let now = process.clock.read(self.now);
                process.runs = true;
                let machine = match starting.backup {
                    Some(backup) => {
                        let peer = self.processes[backup].identity;
                        let pair = self.processes[who].pair(peer);
                        self.tell(who, record);
                        Primary::protected(pair, record, timing, now)
                    }
                    None => {
                        self.look_again(who);
                        Primary::unprotected(record.owner, record, timing, now)
                    }
                };
                self.processes[who].role = Role::Primary(machine);
                Ok(())
            }
            // `doppel primary` ends with an error: its operator starts it again.
            _ => {
                self.end_process(who);
                Ok(())
            }
        }
    }

    /// What a primary that starts asks first.
    pub(super) fn ask_what_is(&mut self, who: usize) -> Result<(), String> {
        self.ask(who, Asked::Protocol(Request::Read))
    }
}
