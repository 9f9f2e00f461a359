//! A backup: listens for its primary, follows it, and takes the machine over when the primary is gone.
#![forbid(unsafe_code)]

mod follower;
mod meeting;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdma_log::Fencer;

use super::bailiff::Bailiff;
use super::host::Inherited;
use super::io::{Common, Io};
use super::meet::Listener;
use super::report::{Event as Said, Timeline};
use super::serve::{self, Served, Staff, now};
use super::{SessionError, why_it_ended};
use crate::arbiter::{self, Claim, random_identity};
use crate::backends::disk::mark::{Stamp, Use};
use crate::config::Config;
use crate::control::Operator;
use crate::control::board::{Board, Command, State};
use crate::control::status::{Role, Standing};
use crate::divergence::Divergence;
use crate::flight::Flight;
use crate::handshake::{self, Trust};
use crate::kvm::CpuModel;
use crate::orders::Order;
use crate::panics::{self, Need};
use crate::protocol::backup::{Action, Event, Phase};
use crate::protocol::{Backup, Reason, Unfit};
use crate::record::random_source;
use crate::replay::ReplayError;
use crate::ring_log::Proof;
use follower::{Drained, Follower, Told};
use meeting::Meeting;

/// How long a backup whose primary was powered off may take to replay what it holds of the log.
const TO_THE_END: Duration = Duration::from_secs(5);

/// A replay that finds nothing for so long has come to the end of what it holds.
const NO_MORE: Duration = Duration::from_millis(200);

/// Runs a backup until the protocol ends it, as a backup or later as the primary.
///
/// # Errors
/// See [`SessionError`].
pub fn run(config: &Config, inherited: &Inherited, json: bool) -> Result<Served, SessionError> {
    let operator = Operator::start(config, Role::Backup, json)?;
    let outcome = wait_and_follow(config, inherited, json, operator.board());
    operator.end(&why_it_ended(&outcome));
    outcome
}

fn wait_and_follow(
    config: &Config,
    inherited: &Inherited,
    json: bool,
    board: Arc<Board>,
) -> Result<Served, SessionError> {
    let trust = Trust::of(&config.pair)?;
    let common = Common::new(json, Arc::clone(&board))?;
    let me = random_identity().map_err(SessionError::host("draw an identity"))?;
    let source = inherited.kvm_source(config);
    let cpu = CpuModel::of_host(&source).map_err(crate::machine::MachineError::from)?;
    // One that cannot be asked is better known now than when the primary is gone.
    arbiter::open(&config.pair.arbiter, &config.name)?.read()?;
    if let Some(recorder) = &config.recorder {
        crate::flight::usable(&recorder.directory)?;
    }
    let image = super::disk::open(config, false)?;
    let content = Cell::new(super::disk::content(image.as_ref())?);
    let warden = super::warden::start(image.as_ref(), config, me)?;
    let fence = super::bailiff::helper(config)?;
    // Everything that it holds while it waits is there before it says that it does.
    let random = random_source()?;
    let mut next = common.again(json)?;
    let listener = Listener::bind(&config.pair)?;
    common.reporter.say(&Said::Ready {
        role: "backup".into(),
        pid: std::process::id(),
        address: listener.address(),
    });
    board.stands_as(Standing::Waiting);
    let meeting = Meeting {
        config,
        inherited,
        json,
        me,
        source,
        cpu,
        trust,
        listener,
        random,
        image,
        content,
        fence: Cell::new(fence),
        warden,
    };
    loop {
        let error = match meeting.meet(next) {
            Ok(mut following) => {
                // It takes its socket file with it, which a confined thread could not.
                drop(meeting);
                following.io.settle()?;
                following.stands();
                common.reporter.say(&following.paired);
                let warden = following.staff.warden.clone();
                let outcome = following.follow();
                if let Some(warden) = warden {
                    warden.end(&outcome);
                }
                return outcome;
            }
            // This primary will not be followed; another may come.
            Err(SessionError::Handshake(error)) => error,
            Err(error) => return Err(error),
        };
        board.detach();
        common.reporter.say(&Said::Notice {
            text: format!("a primary was refused: {error}"),
            loud: true,
        });
        next = common.again(json)?;
    }
}

/// The I/O thread's loop of a backup.
struct Following {
    io: Io,
    staff: Staff,
    /// What is said once this thread is confined.
    paired: Said,
    protocol: Backup,
    follower: Follower,
    flight: Option<Flight>,
    fencer: (Fencer, Proof),
    claim: Option<Claim>,
    drained: Option<Drained>,
    /// Who keeps the old primary off a shared disk.
    bailiff: Option<Bailiff>,
    arrived: u64,
    at: Timeline,
    /// Since when the guest stands, if its primary handed it over: for how long by then, and when that came.
    handed: Option<(Duration, Instant)>,
    /// The guest's address on its link.
    mac: [u8; 6],
    /// A signal to leave came while it took the machine over.
    told_to_leave: bool,
}

/// Whether a backup in this phase leaves because of a signal, and not only of a second one. Whoever sent it meant a backup, without which its
/// primary goes on; one that has won its claim may be all that there is of the machine.
fn leaves(phase: Phase, told_before: bool) -> bool {
    told_before || !matches!(phase, Phase::Draining | Phase::GoingLive)
}

/// What is said of one that does not.
const STAYS: &str = "a signal to leave came while this side takes the machine over, and is not obeyed: nobody else may have the machine. Once \
    it serves here a signal ends the machine";

impl Following {
    /// For those who watch.
    fn stands(&self) {
        self.io.reporter.board().stands(State {
            role: Role::Backup,
            standing: self.protocol.phase().into(),
            record: Some(self.protocol.record()),
        });
    }

    fn follow(mut self) -> Result<Served, SessionError> {
        let mut actions = Vec::new();
        loop {
            self.stands();
            let longest = self
                .protocol
                .deadline()
                .map(|deadline| deadline.since(now()));
            // Frames are read from the shared port as soon as the guest runs here, before its outputs may leave.
            let running = matches!(self.protocol.phase(), Phase::GoingLive | Phase::Live);
            let found = self.io.round(longest, running)?;
            let now = now();
            for beat in self.io.new_beats(false) {
                self.protocol
                    .handle(now, Event::Heartbeat(beat), &mut actions);
            }
            // What it said comes before its end.
            if let Some(record) = self.io.take_word() {
                self.protocol.handle(now, Event::Word(record), &mut actions);
            }
            // Of a primary whose log is over nothing more can be taken in: it is fenced as one that is dead.
            if found.peer_gone || found.log_gone {
                self.protocol.handle(now, Event::PeerDied, &mut actions);
            }
            if found.signalled {
                if leaves(self.protocol.phase(), self.told_to_leave) {
                    return self.leave();
                }
                self.told_to_leave = true;
                self.say(STAYS.to_owned(), true);
            }
            while let Some((answer, claim)) = self.staff.clerk.answer() {
                if claim.is_some() {
                    self.at.claimed = Timeline::now();
                    self.claim = claim;
                }
                self.protocol
                    .handle(now, Event::Arbiter(answer), &mut actions);
            }
            while let Some(told) = self.follower.hear() {
                if let Some(event) = self.hear(told)? {
                    self.protocol.handle(now, event, &mut actions);
                }
            }
            while let Some(thread) = panics::take() {
                let event = match Need::of(&thread) {
                    Need::Nothing => {
                        self.say(panics::goes_on_without(&thread), true);
                        continue;
                    }
                    Need::Guest => {
                        Event::Unfit(Unfit::Failed(format!("its thread {thread} panicked")))
                    }
                    // Nothing can be asked, or taken in, any more.
                    Need::Pair | Need::Log => {
                        self.io.control = None;
                        self.io.order(Order::Stop);
                        return Err(SessionError::Fell { thread });
                    }
                };
                self.protocol.handle(now, event, &mut actions);
            }
            while let Some((number, command)) = self.io.reporter.board().take_command() {
                let event = self.dismissed(number, command);
                self.protocol.handle(now, event, &mut actions);
            }
            if let Some(event) = self.fence_disk() {
                self.protocol.handle(now, event, &mut actions);
            }
            if let Some(handed) = self.io.orders.take_handed_over() {
                self.handed = Some(handed);
                self.protocol.handle(now, Event::HandedOver, &mut actions);
            }
            if let Some(failure) = self.io.stager.disk().and_then(|disk| disk.failure()) {
                let event = Event::Unfit(Unfit::Failed(failure.to_string()));
                self.protocol.handle(now, event, &mut actions);
            }
            let arrived = self.follower.arrived.load(Ordering::Relaxed);
            if arrived != self.arrived {
                self.arrived = arrived;
                self.protocol.handle(now, Event::LogTraffic, &mut actions);
            }
            let progress = self.io.orders.progress();
            self.protocol
                .handle(now, Event::Tick(progress), &mut actions);
            self.io.reporter.watched(|| self.protocol.take_watched());
            // The fence first: from then on the log is drained, beside the question to the arbiter, whose thread may take this one's
            // core. People can wait, except for the last words.
            actions.sort_by_key(|action| match action {
                Action::Fence => 0,
                Action::Say(_) => 2,
                Action::Die(_) => 3,
                _ => 1,
            });
            let mut at = 0;
            while at < actions.len() {
                let action = actions[at].clone();
                at += 1;
                match action {
                    Action::SendHeartbeat(beat) => {
                        if let Some(beats) = &self.io.beats {
                            beats.send(&beat);
                        }
                    }
                    Action::Ask(request) => {
                        if self.at.suspected == 0 {
                            self.at.suspected = Timeline::now();
                        }
                        self.staff.clerk.ask(request);
                    }
                    Action::Fence => {
                        let event = self.fence()?;
                        self.protocol.handle(now, event, &mut actions);
                    }
                    // The replayer goes on to the end by itself once the proof of the fence is there.
                    Action::Drain => {}
                    Action::GoLive => {
                        let claim = self
                            .claim
                            .take()
                            .expect("the protocol goes live only on a claim that was won");
                        self.at.running = Timeline::now();
                        // A thread that is gone has said why, and that comes as an event.
                        let _ = self.follower.claims.send(claim);
                    }
                    Action::OpenGate => {
                        for action in &actions[at..] {
                            if let Action::Say(notice) = action {
                                self.say(notice.to_string(), notice.is_loud());
                            }
                        }
                        return self.open_gate();
                    }
                    Action::Say(notice) => self.say(notice.to_string(), notice.is_loud()),
                    Action::Die(reason) => {
                        let off = reason == Reason::PoweredOff;
                        let complete = off && self.follows_to_the_end();
                        if let Reason::Relieved { .. } | Reason::Dismissed = reason {
                            self.say(reason.to_string(), false);
                        }
                        // First of all, as in leaving: a dismissed one's primary is well.
                        self.io.control = None;
                        self.io.order(Order::Stop);
                        self.follower.end();
                        if complete {
                            // Not of a reign that it may have begun to claim.
                            let record = self.protocol.record();
                            self.io.end_disk(Stamp::in_reign(&record, self.staff.me));
                        }
                        return Ok(Served {
                            reason,
                            guest: None,
                        });
                    }
                }
            }
            actions.clear();
        }
    }

    /// Whether this copy came to the guest's power-off. What is left of the log is there: the power-off left the primary's gate
    /// after it.
    fn follows_to_the_end(&self) -> bool {
        // A shared image is its primary's.
        if self.io.stager.disk().is_none_or(|disk| disk.is_shared()) {
            return false;
        }
        let until = Instant::now() + TO_THE_END;
        let (mut arrived, mut since) = (0, Instant::now());
        while !self.follower.off.load(Ordering::Acquire) && Instant::now() < until {
            let now_arrived = self.follower.arrived.load(Ordering::Relaxed);
            let busy = self.io.orders.progress().owes || now_arrived != arrived;
            arrived = now_arrived;
            if busy {
                since = Instant::now();
            } else if since.elapsed() > NO_MORE {
                // The primary was ended by its operator, without a power-off.
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.follower.off.load(Ordering::Acquire)
    }

    fn say(&self, text: String, loud: bool) {
        self.io.reporter.say(&Said::Notice { text, loud });
    }

    /// What came of keeping the old primary off a shared disk. It is begun when the claim is won, as a primary that lives on must not
    /// lose its disk to a claim that is lost; and when all is replayed, so that nothing else can fail.
    fn fence_disk(&mut self) -> Option<Event> {
        let bailiff = self.bailiff.as_mut()?;
        if self.claim.is_some()
            && self.drained.is_some()
            && self.protocol.phase() == Phase::Draining
        {
            bailiff.begin(&self.protocol.record());
        }
        match bailiff.outcome()? {
            Ok(()) => Some(Event::Drained),
            Err(why) => Some(Event::Unfit(Unfit::Failed(format!(
                "the old primary could not be kept off the shared disk: {why}"
            )))),
        }
    }

    /// What the vCPU thread says; nothing that is still to be waited for.
    fn hear(&mut self, told: Told) -> Result<Option<Event>, SessionError> {
        Ok(Some(match told {
            Told::Drained(drained) => {
                self.at.drained = Timeline::now();
                self.drained = Some(drained);
                if self.bailiff.is_some() {
                    return Ok(None);
                }
                Event::Drained
            }
            Told::Gone => Event::Unfit(Unfit::Failed(follower::GONE.into())),
            Told::Failed(ReplayError::Diverged(divergence)) => {
                let what = self.name(*divergence)?.to_string();
                self.io.reporter.say(&Said::Diverged { what: what.clone() });
                Event::Unfit(Unfit::Diverged(what))
            }
            Told::Failed(ReplayError::Machine(error)) => {
                Event::Unfit(Unfit::Failed(error.to_string()))
            }
            Told::Failed(ReplayError::Disk(error)) => {
                Event::Unfit(Unfit::Failed(error.to_string()))
            }
            Told::Failed(error) => Event::Unfit(Unfit::Corrupt(error.to_string())),
        }))
    }

    /// Fences at once, so that the primary freezes with its recent exits at hand, and compares them with ours.
    fn name(&mut self, divergence: Divergence) -> Result<Divergence, SessionError> {
        self.fence()?;
        let recorded = self.io.control.as_ref().map(handshake::ask_exits);
        Ok(match recorded {
            Some(Ok(recorded)) => divergence.narrowed(&recorded),
            _ => divergence,
        })
    }

    /// Fences, once. A log that cannot be fenced can be written to for as long as this process lives, so it ends by the error: its primary
    /// goes on alone, and a claim that it has made is taken back.
    fn fence(&mut self) -> Result<Event, SessionError> {
        if self.at.fenced == 0 {
            let (fencer, proof) = &mut self.fencer;
            let fenced = fencer.fence()?;
            self.at.fenced = Timeline::now();
            proof.leave(fenced);
        }
        Ok(Event::Fenced)
    }

    /// It is told to leave: by an order, which unlike a signal is no end of the machine if this process serves it by the time it is taken. The
    /// heartbeats that had come by then have been read: the next one is of a primary that has outlived the order.
    fn dismissed(&self, number: u64, command: Command) -> Event {
        let outcome = match self.protocol.phase() {
            Phase::Following | Phase::Suspecting => {
                Ok("as soon as its primary is heard again".to_owned())
            }
            _ => Err("it takes the machine over, and nobody else may have it".to_owned()),
        };
        let board = self.io.reporter.board();
        board.ordered(number, command, Some(outcome));
        Event::Dismissed
    }

    /// SIGTERM at a backup: it leaves, and its primary goes on without it.
    fn leave(mut self) -> Result<Served, SessionError> {
        // First of all: giving a large memory back takes its time, and the primary waits for a backup that does not replay.
        self.io.control = None;
        self.io.order(Order::Stop);
        self.follower.end();
        Err(SessionError::Interrupted)
    }

    fn open_gate(mut self) -> Result<Served, SessionError> {
        self.io.release_everything();
        if let Some(flight) = self.flight.take() {
            // It ends by itself; nobody waits for a disk now.
            flight.let_go();
        }
        self.at.open = Timeline::now();
        let stood = self
            .handed
            .filter(|_| self.protocol.is_switch_over())
            .map(|(before, since)| before + since.elapsed());
        self.io.announce(self.mac);
        let drained = self
            .drained
            .expect("the protocol goes live only from a drained log");
        let record = self.protocol.record();
        self.io.reporter.say(&Said::Live {
            epoch: record.epoch.0,
            position: drained.position,
            memory_checks: drained.memory_checks,
            checked_at: drained
                .last_memory_check
                .map_or(0, |check| check.position.0),
            resent: drained.resent,
            inherited_frames: drained.inherited_frames,
            torn: drained.torn,
            at: self.at,
        });
        if let Some(stood) = stood {
            self.io.reporter.say(&Said::SwitchedOver {
                epoch: record.epoch.0,
                stood_us: stood.as_micros() as u64,
                resent: drained.resent,
            });
        }
        if let Some(disk) = self.io.stager.disk() {
            disk.mark(Use::Leads, Stamp::of(&record));
        }
        self.io.listen_to(None);
        self.io.control = None;
        self.io.link = None;
        self.io.death = None;
        // With the old ring's memory; it may wait for a thread that says good-bye.
        drop(self.fencer);
        let protocol = self
            .protocol
            .into_primary(now())
            .expect("the gate opens only in phase live");
        serve::serve(self.io, self.staff, protocol, self.follower.thread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_that_takes_over_is_not_ended_by_whoever_took_it_for_a_backup() {
        for phase in [Phase::Following, Phase::Suspecting, Phase::Claiming] {
            assert!(leaves(phase, false), "{phase:?}");
        }
        for phase in [Phase::Draining, Phase::GoingLive] {
            assert!(!leaves(phase, false), "{phase:?}");
            assert!(leaves(phase, true), "somebody insists");
        }
    }
}
