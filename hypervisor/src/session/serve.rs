//! The I/O thread's loop of a process that serves the machine: a primary, or a backup after its go-live.
#![forbid(unsafe_code)]

mod replacing;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use super::SessionError;
use super::clerk::Clerk;
use super::io::Io;
use super::lagging::{self, Found};
use super::recruit::{News, Recruit, Recruiter};
use super::report::{Event as Said, Timeline};
use super::warden::{Look, Warden};
use crate::backends::disk::mark::{Stamp, Use};
use crate::config::{Lag, Transport};
use crate::control::board::{Command, State};
use crate::control::status::Role;
use crate::desk::Ask;
use crate::handshake;
use crate::intervals::Replication;
use crate::orders::Order;
use crate::panics::{self, Need};
use crate::protocol::heartbeat::MachineId;
use crate::protocol::primary::{Action, Event, Phase};
use crate::protocol::{Identity, Moment, Pair, Primary, Reason, Record};
use crate::record::{Ended, RecordError};
use replacing::Replacement;

/// The thread that runs the guest.
pub(super) type Vcpu = JoinHandle<Result<Ended, RecordError>>;

/// Why an order that is an entry of the log is not done.
const NO_ENTRIES: &str = "this machine is replicated by checkpoints, and their log has no such entries yet: only a machine that is \
    replicated by replay is switched over, paused, or left a share of its time";

/// Why a machine with a shared disk is not switched over.
const SHARED: &str = "its disk is shared, and whoever takes that over has this process killed or cut off first, which is no orderly hand-over: end \
    this process instead (SIGKILL), and the backup takes over";

/// Why a process that serves does not leave.
const SERVES: &str = "this process has become the primary, and serves the machine";

/// Why a machine is not reset.
pub(super) const NO_RESET: &str = "a machine with the host's CPU cannot be started anew where it stands: power it off, and start it again";

/// Now, for the protocol.
pub(super) fn now() -> Moment {
    Moment(Timeline::now())
}

/// How a served machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Why the process ends.
    pub reason: Reason,
    /// How the guest ended, if it did by itself.
    pub guest: Option<Ended>,
}

/// The threads that wait for others in place of the I/O thread, and in whose name.
pub(super) struct Staff {
    pub(super) clerk: Clerk,
    /// None where there is no place to look for a backup.
    pub(super) recruiter: Option<Recruiter>,
    /// What becomes of a backup that does not keep up.
    pub(super) lag: Lag,
    /// How the machine is replicated.
    pub(super) replication: Replication,
    /// What carries its log.
    pub(super) transport: Transport,
    /// Whether it can be reset.
    pub(super) starts_anew: bool,
    pub(super) machine: MachineId,
    pub(super) me: Identity,
    /// Who knows whether the disk is still this side's, where the disk itself keeps that.
    pub(super) warden: Option<Warden>,
}

impl Staff {
    /// Looks for a new backup from now on.
    pub(super) fn look(&self, record: &Record) {
        if let Some(recruiter) = &self.recruiter {
            recruiter.look(super::ring_epoch(record.epoch));
        }
    }
}

/// Serves until the protocol ends this process.
pub(super) fn serve(
    io: Io,
    staff: Staff,
    protocol: Primary,
    vcpu: Vcpu,
) -> Result<Served, SessionError> {
    if protocol.phase() == Phase::Unprotected {
        staff.look(protocol.record());
    }
    Serving {
        looking: protocol.phase() == Phase::Unprotected,
        lagging: lagging::Watch::new(staff.lag),
        io,
        staff,
        protocol,
        vcpu: Some(vcpu),
        guest: None,
        fence_told: false,
        in_step: None,
        switch: None,
        replacement: None,
        fails: false,
        alone_without: None,
        look: None,
    }
    .serve()
}

struct Serving {
    io: Io,
    staff: Staff,
    protocol: Primary,
    vcpu: Option<Vcpu>,
    guest: Option<Ended>,
    fence_told: bool,
    lagging: lagging::Watch,
    /// The recruiter is at work.
    looking: bool,
    /// Told that this backup replays.
    in_step: Option<Arc<AtomicBool>>,
    /// The number of the order by which the machine is being handed over.
    switch: Option<u64>,
    /// The backup that is to take the old one's place.
    replacement: Option<Replacement>,
    /// It is told to end as one that failed, once its backup is heard.
    fails: bool,
    /// The thread whose loss keeps this machine from ever being one of a pair again.
    alone_without: Option<String>,
    /// Whether the disk is still this side's is being asked.
    look: Option<Look>,
}

impl Serving {
    /// For those who watch.
    fn stands(&self) {
        self.io.reporter.board().stands(State {
            role: Role::Primary,
            standing: self.protocol.phase().into(),
            record: Some(*self.protocol.record()),
        });
    }

    fn serve(mut self) -> Result<Served, SessionError> {
        let mut actions = Vec::new();
        loop {
            self.stands();
            let longest = self
                .protocol
                .deadline()
                .map(|deadline| deadline.since(now()));
            let found = self.io.round(longest, true)?;
            let now = now();
            self.judge_disk()?;
            while let Some(thread) = panics::take() {
                self.judge_panic(thread, now, &mut actions)?;
            }
            if let Some(thread) = self.alone_without.take_if(|_| {
                // Its end would be the arbiter's to hear.
                found.signalled || self.vcpu.as_ref().is_none_or(JoinHandle::is_finished)
            }) {
                self.io.order(Order::Stop);
                return Err(SessionError::Fell { thread });
            }
            if self.stands_for_nobody() {
                self.protocol.handle(now, Event::NewcomerLost, &mut actions);
            }
            let beats = self.io.new_beats(true);
            if self.fails && !beats.is_empty() && self.protocol.phase() == Phase::Protected {
                // Its backup has outlived the order, and takes the machine as from a process that is killed.
                self.io.order(Order::Stop);
                return Err(SessionError::Failed);
            }
            let mut handle = |event| self.protocol.handle(now, event, &mut actions);
            for beat in beats {
                handle(Event::Heartbeat(beat));
            }
            if found.log_traffic {
                handle(Event::LogTraffic);
            }
            // What is known of the process before what its log shows.
            if found.peer_gone {
                handle(Event::PeerDied);
            }
            if found.log_gone {
                handle(Event::LogOver);
            }
            self.io.answer_exits();
            if self.io.orders.fenced() && !self.fence_told {
                self.fence_told = true;
                handle(Event::LogFenced);
            }
            while let Some((answer, _)) = self.staff.clerk.answer() {
                handle(Event::Arbiter(answer));
            }
            while let Some(news) = self.staff.recruiter.as_ref().and_then(Recruiter::news) {
                // What the news before it led to comes first: it may end the log that this one would replace.
                if let Some(served) = self.perform(&mut actions) {
                    return Ok(served);
                }
                self.hear(news, now, &mut actions);
            }
            // Before it is known that the guest logs to a backup that joins, there is none to give up.
            if self.protocol.phase() != Phase::Unprotected
                && let Some(why) = self.io.orders.take_unusable()
            {
                self.io.reporter.say(&Said::Notice {
                    text: format!("the backup's end of the log is of no use: {why}"),
                    loud: true,
                });
                self.protocol.handle(now, Event::LogUnusable, &mut actions);
            }
            while let Some((number, command)) = self.io.reporter.board().take_command() {
                self.command(number, command, now, &mut actions);
            }
            let mut handle = |event| self.protocol.handle(now, event, &mut actions);
            if self.vcpu.as_ref().is_some_and(JoinHandle::is_finished) {
                self.guest = end_of(self.vcpu.take())?;
                handle(Event::End);
            }
            if found.signalled {
                handle(Event::End);
            }
            handle(Event::Tick(self.io.orders.progress()));
            self.watch_lag(now, &mut actions);
            self.io.reporter.watched(|| self.protocol.take_watched());
            if let Some(served) = self.perform(&mut actions) {
                return Ok(served);
            }
        }
    }

    /// Whether the backup keeps up, and what follows if it does not.
    fn watch_lag(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.protocol.phase() != Phase::Protected {
            return self.lagging.forget();
        }
        let text = match self.lagging.look(Instant::now(), self.io.orders.stood()) {
            None => return,
            Some(Found::Drop(span)) => {
                return self.protocol.handle(now, Event::Lagging(span), actions);
            }
            Some(Found::Slowed(span)) => format!(
                "the backup does not keep up: for {} ms the guest has stood for it most of the time. It stays as slow, and \
                 protected (lag.policy is throttle)",
                span.as_millis()
            ),
            Some(Found::KeepsUp) => "the backup keeps up again".to_owned(),
        };
        self.io.reporter.say(&Said::Notice { text, loud: true });
    }

    /// Does what an operator orders, or says why not.
    fn command(&mut self, number: u64, command: Command, now: Moment, actions: &mut Vec<Action>) {
        let order = match command {
            Command::Switch if self.staff.replication == Replication::Checkpoint => {
                self.tell_ordered(number, command, Some(Err(NO_ENTRIES.to_owned())));
                return;
            }
            Command::Switch if self.io.stager.disk().is_some_and(|disk| disk.is_shared()) => {
                self.tell_ordered(number, command, Some(Err(SHARED.to_owned())));
                return;
            }
            Command::Switch if self.protocol.phase() == Phase::Protected => {
                self.switch = Some(number);
                self.tell_ordered(number, command, None);
                self.protocol.handle(now, Event::Switch, actions);
                return;
            }
            Command::MigrateBackup(to) => {
                return match self.begin_replacement(number, to) {
                    Ok(()) => self.tell_ordered(number, command, None),
                    Err(why) => self.tell_ordered(number, command, Some(Err(why))),
                };
            }
            Command::Switch if self.protocol.is_about_to_switch() => {
                let why = "the machine is just being switched over";
                return self.tell_ordered(number, command, Some(Err(why.to_owned())));
            }
            Command::Switch if self.is_replacing() => {
                let why = "another backup is just taking the old one's place: order it again";
                return self.tell_ordered(number, command, Some(Err(why.to_owned())));
            }
            Command::Switch => {
                let why = "there is no backup any more that could take the machine".to_owned();
                return self.tell_ordered(number, command, Some(Err(why)));
            }
            Command::Fail if self.protocol.phase() == Phase::Protected => {
                self.fails = true;
                let done = Some(Ok("as soon as the backup is heard again".to_owned()));
                return self.tell_ordered(number, command, done);
            }
            Command::Fail => {
                let why = "there is no backup that could take the machine".to_owned();
                return self.tell_ordered(number, command, Some(Err(why)));
            }
            Command::Share(_) if self.staff.replication == Replication::Checkpoint => {
                return self.tell_ordered(number, command, Some(Err(NO_ENTRIES.to_owned())));
            }
            Command::Reset if !self.staff.starts_anew => {
                return self.tell_ordered(number, command, Some(Err(NO_RESET.to_owned())));
            }
            // It was a backup when that was ordered.
            Command::Leave => {
                return self.tell_ordered(number, command, Some(Err(SERVES.to_owned())));
            }
            // One that comes between the guest's last exit here and its first one there would be lost.
            _ if !self.protocol.phase().is_settled() => {
                let why = "who serves the machine is just being decided: order it again".to_owned();
                return self.tell_ordered(number, command, Some(Err(why)));
            }
            Command::PowerOff => Order::PowerOff(0),
            Command::Reset => Order::Reset,
            Command::Share(share) => Order::Share(share),
        };
        self.io.order(order);
        self.io.reporter.say(&Said::Notice {
            text: format!("the operator orders: {}", command.words()),
            loud: true,
        });
        let done = "from the guest's next exit on".to_owned();
        self.tell_ordered(number, command, Some(Ok(done)));
    }

    fn tell_ordered(&self, number: u64, command: Command, outcome: Option<Result<String, String>>) {
        let board = self.io.reporter.board();
        board.ordered(number, command, outcome);
    }

    /// A switch-over came to nothing.
    fn switch_failed(&mut self, why: &str) {
        if let Some(number) = self.switch.take() {
            self.tell_ordered(number, Command::Switch, Some(Err(why.to_owned())));
        }
    }

    /// What follows from a thread's panic. An error: this process ends by it, as one that failed; a backup takes the machine over.
    fn judge_panic(
        &mut self,
        thread: String,
        now: Moment,
        actions: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        let text = match (Need::of(&thread), self.protocol.phase()) {
            (Need::Nothing, _) | (Need::Log, Phase::Unprotected) => {
                panics::goes_on_without(&thread)
            }
            (Need::Log, _) => {
                self.protocol.handle(now, Event::LogUnusable, actions);
                format!(
                    "the backup is given up: the thread {thread}, by which its log went, is gone by a bug"
                )
            }
            (Need::Pair, phase @ (Phase::Unprotected | Phase::Joining)) => {
                // Nobody else could have it. Who was about to join is no backup yet.
                self.staff.recruiter = None;
                self.looking = true;
                if phase == Phase::Joining {
                    self.protocol.handle(now, Event::PeerDied, actions);
                }
                let text = format!(
                    "the thread {thread} is gone by a bug, which the log names: the machine serves on here, and CANNOT BE PROTECTED any more; when it is to \
                     end, end this process by a signal, and start the machine with --cold-start"
                );
                self.alone_without = Some(thread);
                text
            }
            _ => {
                self.io.order(Order::Stop);
                return Err(SessionError::Fell { thread });
            }
        };
        self.io.reporter.say(&Said::Notice { text, loud: true });
        Ok(())
    }

    /// What becomes of a request that this side's image could not do.
    fn judge_disk(&mut self) -> Result<(), SessionError> {
        let Some(why) = self.io.stager.disk_failure() else {
            return Ok(());
        };
        match self.protocol.phase() {
            // Its image has all that this one lacks, and the guest need not know.
            Phase::Protected => {
                let why = why.to_owned();
                self.io.order(Order::Stop);
                return Err(SessionError::DiskFails(why));
            }
            Phase::Unprotected | Phase::Joining => {
                let why = why.to_owned();
                match self.has_the_disk() {
                    Some(true) => self.io.tell_disk_failure(),
                    // A guest that is told of an error does something about it, and this is none of its disk's.
                    Some(false) => {
                        self.io.order(Order::Stop);
                        return Err(SessionError::DiskTaken(why));
                    }
                    // The answer wakes this thread.
                    None => {}
                }
            }
            // Who has the machine is being decided.
            _ => {}
        }
        Ok(())
    }

    /// Whether the disk is still this side's, once that is known.
    fn has_the_disk(&mut self) -> Option<bool> {
        let Some(warden) = &self.staff.warden else {
            return Some(true);
        };
        let look = self.look.get_or_insert_with(|| warden.look(&self.io.wake));
        let has_it = look.has_it()?;
        self.look = None;
        Some(has_it)
    }

    /// Does what the protocol wants. Some: the process ends by it.
    fn perform(&mut self, actions: &mut Vec<Action>) -> Option<Served> {
        actions.drain(..).find_map(|action| self.act(action))
    }

    fn hear(&mut self, news: News, now: Moment, actions: &mut Vec<Action>) {
        let news = match self.hear_of_newcomer(news, now, actions) {
            Some(news) => news,
            None => return,
        };
        match news {
            News::Cut(number, sink) => {
                self.io.stager.pause();
                if let Some(recruiter) = &self.staff.recruiter {
                    recruiter.desk.leave(number, Ask::Cut(sink));
                }
                self.io.order(Order::Attend);
            }
            News::Taken(taken) => {
                self.fence_told = false;
                self.in_step = Some(Arc::clone(&taken.in_step));
                self.io.join_log(*taken);
                self.protocol.handle(now, Event::Joining, actions);
            }
            News::Copied(lane) => {
                // A backup that was lost meanwhile took the log with it.
                if self.protocol.phase() == Phase::Joining {
                    self.io.stager.attach(*lane);
                }
            }
            News::Ready(recruit) => self.welcome(*recruit, now, actions),
            News::Failed { why, say, looks_on } => {
                self.looking &= looks_on;
                if say {
                    self.io.reporter.say(&Said::Notice {
                        text: format!("a backup that wanted to join is not taken: {why}"),
                        loud: true,
                    });
                }
                match self.protocol.phase() {
                    Phase::Joining => self.protocol.handle(now, Event::PeerDied, actions),
                    // The cut did not come about.
                    phase => {
                        self.io.stager.detach();
                        if phase == Phase::Unprotected {
                            self.look_again();
                        }
                    }
                }
            }
        }
    }

    /// A backup holds a copy and follows.
    fn welcome(&mut self, recruit: Recruit, now: Moment, actions: &mut Vec<Action>) {
        self.looking = false;
        if self.protocol.phase() != Phase::Joining {
            // It was lost again before its word came.
            self.look_again();
            return;
        }
        let figures = recruit.figures;
        self.io.reporter.say(&Said::Joined {
            peer: recruit.identity.to_string(),
            stopped_us: figures.stopped.as_micros() as u64,
            took_us: figures.took.as_micros() as u64,
            bytes: figures.bytes,
            rounds: figures.rounds,
        });
        let pair = Pair {
            machine: self.staff.machine,
            me: self.staff.me,
            peer: recruit.identity,
        };
        if let Some(in_step) = &self.in_step {
            in_step.store(true, Ordering::Relaxed);
        }
        self.io.listen_to(Some(recruit.beats));
        self.io.tell_versions(&recruit.control);
        // What is said over it is short; nobody waits for a peer that does not read.
        let _ = recruit.control.set_nonblocking(true);
        self.io.control = Some(recruit.control);
        self.protocol.handle(now, Event::Joined(pair), actions);
    }

    fn look_again(&mut self) {
        if !self.looking {
            self.looking = true;
            self.staff.look(self.protocol.record());
        }
    }

    fn act(&mut self, action: Action) -> Option<Served> {
        let io = &mut self.io;
        match action {
            Action::SendHeartbeat(beat) => {
                if let Some(beats) = &io.beats {
                    beats.send(&beat);
                }
            }
            Action::Ask(request) => self.staff.clerk.ask(request),
            Action::Freeze => {
                io.outlet.shut();
                io.order(Order::Freeze);
            }
            Action::HandOver => {
                // What comes from now on is for the heir, in the kernel's queue; what was read has to be with it first.
                io.stager.pause();
                io.order(Order::HandOver(io.stager.published()));
            }
            Action::Stand => self.stand(),
            Action::Replace(record) => self.replace(&record),
            Action::Resume => {
                self.call_off("the machine runs on, protected by the old backup");
                let io = &mut self.io;
                io.stager.resume();
                io.order(Order::Resume);
                self.switch_failed(
                    "the backup did not take the machine in time, or the arbiter did not answer; it runs on here, protected as before",
                );
            }
            Action::RunUnprotected(record) => {
                // The next backup is another one.
                self.fails = false;
                let joins = self.newcomer_joins();
                self.switch_failed(
                    "the backup was lost meanwhile; the machine runs on here, UNPROTECTED",
                );
                let io = &mut self.io;
                mark(io, &record);
                io.leave_log();
                io.order(Order::RunUnprotected);
                if self.vcpu.is_none() {
                    io.release_everything();
                }
                if joins {
                    self.looking = true;
                } else {
                    self.look_again();
                }
            }
            Action::Protect(record) => {
                mark(io, &record);
                if let Some(control) = &io.control {
                    // A backup that does not hear it asks the arbiter; one that is gone shows as that.
                    let _ = handshake::agree(control, &record);
                }
                io.reporter.say(&Said::Paired {
                    epoch: record.epoch.0,
                    peer: record
                        .entitled
                        .map(|peer| peer.to_string())
                        .unwrap_or_default(),
                });
            }
            Action::Say(notice) => io.reporter.say(&Said::Notice {
                text: notice.to_string(),
                loud: notice.is_loud(),
            }),
            Action::Die(reason) => {
                if let Reason::HandedOver { .. } = reason {
                    io.reporter.say(&Said::Notice {
                        text: reason.to_string(),
                        loud: false,
                    });
                    if let Some(number) = self.switch.take() {
                        let done = Some(Ok(reason.to_string()));
                        io.reporter.board().ordered(number, Command::Switch, done);
                    }
                }
                io.order(Order::Stop);
                // A recorder that stops in the middle of a post says so; that is how it was told to end.
                let _ = end_of(self.vcpu.take());
                io.last_words();
                if matches!(self.guest, Some(Ended::PoweredOff(_))) {
                    io.end_disk(Stamp::of(self.protocol.record()));
                }
                return Some(Served {
                    reason,
                    guest: self.guest,
                });
            }
        }
        None
    }
}

/// The image is of this reign now.
fn mark(io: &Io, record: &Record) {
    if let Some(disk) = io.stager.disk() {
        disk.mark(Use::Leads, Stamp::of(record));
    }
}

fn end_of(vcpu: Option<Vcpu>) -> Result<Option<Ended>, SessionError> {
    match vcpu {
        Some(vcpu) => Ok(Some(vcpu.join().map_err(|_| SessionError::Panicked)??)),
        None => Ok(None),
    }
}
