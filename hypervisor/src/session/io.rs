//! The I/O thread's round: wait, take in frames, say what else has come.
#![forbid(unsafe_code)]

mod stream;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdma_log::robust::RobustHolder;
use rdma_log::transport::network::{Link, Watch};

use super::SessionError;
use super::beats::{Beats, Repeater};
use super::host::{self, Inherited};
use super::mourner::Mourner;
use super::recruit::Taken;
use super::report::{Event as Said, Reporter};
use super::stager::Stager;
use super::world::HostWorld;
use crate::backends::NetPort;
use crate::backends::announce::Announcer;
use crate::backends::disk::mark::Stamp;
use crate::backends::wait::{Waiter, Wake};
use crate::config::{Config, Transport};
use crate::control::board::Board;
use crate::entry::Wish;
use crate::event::Output;
use crate::gate::{Committed, Gate};
use crate::handshake::{self, Channel};
use crate::intervals::Bound;
use crate::orders::{Order, Orders, Pace, Samples};
use crate::preempt;
use crate::protocol::Record;
use crate::protocol::heartbeat::Heartbeat;
use crate::record::Outlet;
use crate::sandbox::{Sandbox, Thread};
use crate::scheduling::Urgency;
use crate::stage::Stage;

/// The longest round, so that what no descriptor tells (a full lane that has room again) is seen.
const ROUND: Duration = Duration::from_millis(10);

/// The longest that a peer says once a pair runs: a record.
const WORD_MAX: usize = 512;

/// What a role's two threads share, and what its I/O thread watches.
pub(super) struct Io {
    pub(super) wake: Arc<Wake>,
    pub(super) stage: Arc<Stage>,
    pub(super) orders: Arc<Orders>,
    pub(super) samples: Arc<Samples>,
    pub(super) reporter: Reporter,
    pub(super) outlet: Outlet,
    pub(super) stager: Stager,
    pub(super) beats: Option<Beats>,
    /// Repeats our heartbeats when this thread is late with them.
    repeater: Option<Repeater>,
    /// Tells the guest's link that the guest is here now.
    announcer: Option<Announcer>,
    /// For the threads that are still to be confined.
    pub(super) sandbox: Sandbox,
    pub(super) control: Option<Channel>,
    /// The log's stream, on a primary whose log goes over one.
    pub(super) watch: Option<Watch>,
    turned_at: Instant,
    /// The log's stream, on a backup.
    pub(super) link: Option<Link>,
    /// How far the backup has come, on the primary.
    pub(super) replayed: Arc<AtomicU64>,
    replayed_before: u64,
    /// How often the machine had started anew when that was last told.
    resets_told: u64,
    /// The backup asked for our recent exits.
    exits_wanted: bool,
    /// What the peer has said over the control connection.
    said: Vec<u8>,
    /// How often heartbeats are due, if an urgent thread is to repeat those that this one is late with.
    repeat_beats: Option<Duration>,
    pub(super) signals: UnixStream,
    waiter: Waiter,
    /// This thread, as the one whose death a backup on this host learns at once.
    holder: Option<RobustHolder>,
    /// On a backup: of its primary.
    pub(super) death: Option<Mourner>,
    /// Over a guest that does not exit, with the time of the next look.
    guest_watch: Option<(preempt::Watch, Instant)>,
    /// Over a guest whose intervals have a length, with that.
    interval_bound: Option<(Bound, Duration)>,
}

/// What a round found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// SIGTERM or SIGINT came.
    pub(super) signalled: bool,
    /// The control connection is closed: the peer's process is gone.
    pub(super) peer_gone: bool,
    /// The log's connection is over, and nobody knows why.
    pub(super) log_gone: bool,
    /// The backup has replayed more of the log.
    pub(super) log_traffic: bool,
}

/// What is made before there is a port or a lane.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) wake: Arc<Wake>,
    pub(super) signals: UnixStream,
    pub(super) reporter: Reporter,
}

impl Common {
    /// The same once more, for a role that may have to start over.
    pub(super) fn again(&self, json: bool) -> Result<Self, SessionError> {
        let signals = self.signals.try_clone();
        Ok(Self {
            wake: Arc::clone(&self.wake),
            signals: signals.map_err(SessionError::host("share a socket"))?,
            reporter: Reporter::new(json, Arc::clone(self.reporter.board())),
        })
    }

    pub(super) fn new(json: bool, board: Arc<Board>) -> Result<Self, SessionError> {
        Ok(Self {
            wake: Arc::new(Wake::new().map_err(SessionError::host("make an event descriptor"))?),
            signals: host::stop_signals()?,
            reporter: Reporter::new(json, board),
        })
    }
}

/// What came while a backup waits to be entitled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Nothing.
    None,
    /// SIGTERM or SIGINT.
    Signal,
    /// The control connection has something to read, or is at its end.
    Some,
}

/// The lane and reign that a stager writes to.
pub(super) type InputLane = (
    rdma_log::LaneWriter,
    rdma_log::Epoch,
    Option<Arc<AtomicU64>>,
);

impl Io {
    /// Everything around this port. `shut` starts with a gate that lets nothing out.
    pub(super) fn new(
        common: Common,
        config: &Config,
        json: bool,
        port: Option<NetPort>,
        gate: Gate<Output>,
    ) -> Result<Self, SessionError> {
        let out = match &port {
            Some(port) => Some(
                port.try_clone()
                    .map_err(SessionError::host("share the network port"))?,
            ),
            None => None,
        };
        let stage = Arc::new(Stage::new(Arc::clone(&common.wake)));
        let samples: Arc<Samples> = Arc::default();
        let orders = Arc::new(Orders::new(Arc::clone(&common.wake)));
        let board = common.reporter.board();
        board.attach(&samples, &orders, &stage);
        let spool = Arc::clone(board.spool());
        host::pin(&config.cpus.io, "I/O");
        let lengths = config.replicate.lengths();
        let mut stager = Stager::new(port, Arc::clone(&stage), Arc::clone(&samples));
        if lengths.is_some() {
            stager.keep_done();
        }
        Ok(Self {
            orders,
            outlet: Outlet::new(
                gate,
                Box::new(HostWorld::new(
                    out,
                    host::open_console(config, json)?,
                    spool,
                )),
            ),
            stager,
            samples,
            announcer: None,
            reporter: common.reporter,
            stage,
            wake: common.wake,
            signals: common.signals,
            beats: None,
            repeater: None,
            control: None,
            sandbox: Sandbox::prepare(&config.sandbox)?
                .with_device(config.pair.transport == Transport::Rdma),
            watch: None,
            turned_at: Instant::now(),
            link: None,
            replayed: Arc::default(),
            replayed_before: 0,
            resets_told: 0,
            exits_wanted: false,
            said: Vec::new(),
            repeat_beats: config
                .cpus
                .urgent
                .then(|| Duration::from_millis(config.timing.heartbeat_ms)),
            waiter: Waiter::new(),
            // Without it a backup learns it from the control connection, milliseconds later.
            holder: RobustHolder::of_this_thread().ok(),
            death: None,
            interval_bound: lengths.map(|lengths| (Bound::default(), lengths.length)),
            guest_watch: (config.preempt.by_checkpoint() || lengths.is_some()).then(|| {
                (
                    preempt::Watch::new(config.preempt.deferral()),
                    Instant::now(),
                )
            }),
        })
    }

    /// By what this process is told to end that holds no machine yet: SIGTERM or SIGINT, or the order to leave.
    pub(super) fn is_told_to_stop(&self) -> Option<SessionError> {
        let mut waiter = Waiter::new();
        let signals = waiter.add(&self.signals, true, false);
        if waiter.wait(Some(Duration::ZERO)).is_ok() && waiter.ready(signals).read {
            return Some(SessionError::Interrupted);
        }
        let dismissed = self.reporter.board().is_dismissed();
        dismissed.then_some(SessionError::Dismissed)
    }

    /// Waits for a word on a control connection, if there is one to listen to, at most `longest`.
    pub(super) fn await_word(
        &self,
        control: Option<&Channel>,
        longest: Option<Duration>,
    ) -> Result<Word, SessionError> {
        let mut waiter = Waiter::new();
        let wake = waiter.add(&*self.wake, true, false);
        let signals = waiter.add(&self.signals, true, false);
        let control = control.map(|control| waiter.add(control, true, false));
        waiter
            .wait(longest)
            .map_err(SessionError::host("wait for events"))?;
        if waiter.ready(wake).read {
            self.wake.clear();
        }
        Ok(if waiter.ready(signals).read {
            Word::Signal
        } else if control.is_some_and(|control| waiter.ready(control).read) {
            Word::Some
        } else {
            Word::None
        })
    }

    /// The guest logs to a new ring from here on. Its inputs lane may still carry the copy: frames wait until they are
    /// given it ([`Stager::attach`]).
    pub(super) fn join_log(&mut self, taken: Taken) {
        self.exits_wanted = false;
        self.said.clear();
        self.watch = taken.watch;
        if let (Some(holder), Some(key)) = (&mut self.holder, taken.robust) {
            holder.hold(key);
        }
        self.replayed = taken.replayed;
        self.replayed_before = 0;
    }

    /// There is no backup any more: what led to it is closed.
    pub(super) fn leave_log(&mut self) {
        self.stager.detach();
        self.listen_to(None);
        self.control = None;
        self.watch = None;
        if let Some(holder) = &mut self.holder {
            holder.let_go();
        }
    }

    /// Opens the port that the configuration names.
    pub(super) fn port(
        config: &Config,
        inherited: &Inherited,
    ) -> Result<Option<NetPort>, SessionError> {
        host::open_port(config, inherited)
    }

    /// The last step before the rounds begin, on their thread: heartbeats get their urgent thread, and this one is confined.
    pub(super) fn settle(&mut self) -> Result<(), SessionError> {
        if let Some(every) = self.repeat_beats {
            let (repeater, urgency) = Repeater::start(every, &self.orders, &self.sandbox)?;
            repeater.repeat(self.beats.as_ref());
            self.repeater = Some(repeater);
            let text = match urgency {
                Urgency::RealTime => None,
                Urgency::Nice => {
                    Some("heartbeats have no real-time priority here, only a nice value")
                }
                Urgency::Usual => Some("heartbeats have no priority over other work here"),
            };
            if let Some(text) = text {
                self.reporter.say(&Said::Notice {
                    text: format!("{text}: on a busy host they may be late; doppel doctor says how to allow it"),
                    loud: false,
                });
            }
        }
        self.sandbox.confine(Thread::Io)?;
        Ok(())
    }

    /// Says that one side of the pair is older than the other, if it is.
    pub(super) fn tell_versions(&self, control: &Channel) {
        if let Some(text) = control.spoken().uneven() {
            self.reporter.say(&Said::Notice { text, loud: false });
        }
    }

    /// From now on this peer's heartbeats are heard, and ours go to it; or nobody's.
    pub(super) fn listen_to(&mut self, beats: Option<Beats>) {
        if let Some(repeater) = &self.repeater {
            repeater.repeat(beats.as_ref());
        }
        if beats.is_none() {
            self.samples.meter().no_peer();
        }
        let peer = beats.as_ref().and_then(Beats::peer);
        self.reporter.board().peer(peer);
        self.beats = beats;
    }

    /// The heartbeats of the peer, which is the backup or the primary, that have come.
    pub(super) fn new_beats(&self, peer_is_backup: bool) -> Vec<Heartbeat> {
        let beats: Vec<_> = self.beats.iter().flat_map(Beats::come).collect();
        if let Some(last) = beats.last() {
            let position = last.progress.position.0;
            self.samples.meter().peer_is_at(position, peer_is_backup);
        }
        beats
    }

    /// From now on the guest is here: its link is told, a few times.
    pub(super) fn announce(&mut self, mac: [u8; 6]) {
        self.announcer = Some(Announcer::new(mac, Instant::now()));
    }

    /// Announces what is due.
    fn turn_announcer(&mut self) {
        if let (Some(announcer), Some(port)) = (&mut self.announcer, self.stager.port())
            && announcer.turn(port, Instant::now())
        {
            return;
        }
        self.announcer = None;
    }

    /// Gives the vCPU thread an order, wherever it is.
    pub(super) fn order(&self, order: Order) {
        self.orders.give(order);
        self.stage.bell().ring();
    }

    /// Waits for something to happen, at most `longest`. `read_frames` is off while another process reads the port.
    pub(super) fn round(
        &mut self,
        longest: Option<Duration>,
        read_frames: bool,
    ) -> Result<Found, SessionError> {
        self.waiter.clear();
        let wake = self.waiter.add(&*self.wake, true, false);
        let signals = self.waiter.add(&self.signals, true, false);
        let control = self
            .control
            .as_ref()
            .map(|control| self.waiter.add(control, true, false));
        if let Some(beats) = &self.beats {
            self.waiter.add(beats, true, false);
        }
        let stream = self
            .watch
            .as_ref()
            .map(|watch| self.waiter.add(watch, true, watch.wants_write()));
        let blocked = self.outlet.is_blocked();
        let port = match (self.stager.wants(), self.stager.port()) {
            (Some(port), _) if read_frames => Some(self.waiter.add(port, true, blocked)),
            (_, Some(port)) if blocked => Some(self.waiter.add(port, false, true)),
            _ => None,
        };
        let mut longest = longest.unwrap_or(ROUND).min(ROUND);
        if let Some(announcer) = &self.announcer {
            longest = longest.min(announcer.due().saturating_duration_since(Instant::now()));
        }
        if let Some((_, again)) = &self.guest_watch {
            longest = longest.min(again.saturating_duration_since(Instant::now()));
        }
        if let Some((bound, length)) = &mut self.interval_bound {
            // One that begins while nobody looks ends no later than twice its length.
            let running = self.orders.running().and(self.orders.interval_end());
            let verdict = bound.look(Instant::now(), running);
            if verdict.is_some_and(|verdict| verdict.kick) {
                self.orders.kick();
            }
            let again = verdict.map_or(*length, |verdict| {
                verdict.again.saturating_duration_since(Instant::now())
            });
            longest = longest.min(again);
        }
        let slowed = self.orders.pace().is_slowed();
        if slowed {
            longest = longest.min(Pace::SLICE);
        }
        self.waiter
            .wait(Some(longest))
            .map_err(SessionError::host("wait for events"))?;
        if self.waiter.ready(wake).read {
            self.wake.clear();
        }
        // A full lane is tried again in the next round, not in this one: a thread that kept trying would take the core from
        // the one that makes room.
        self.stager.retry();
        // Outputs that have committed first; and after a fence no frame is to be read.
        let ready = stream.is_some_and(|stream| self.waiter.ready(stream).any());
        let mut log_gone = self.turn_log(ready) || self.link_is_broken();
        if port.is_some_and(|port| self.waiter.ready(port).read)
            && let Err(error) = self.stager.pump()
        {
            tracing::warn!("the guest's network port is closed: {error}");
        }
        self.stager.pump_done();
        if let Some(why) = self.stager.take_unusable() {
            self.orders.report_unusable(why);
        }
        // To look whether there is a fence may have taken answers in, which the descriptor then tells no more.
        log_gone |= self.turn_log(false);
        self.watch_the_guest();
        if self.announcer.is_some() {
            self.turn_announcer();
        }
        if slowed {
            // A guest without exits would run on.
            self.orders.kick();
        }
        if blocked {
            // Only what had committed was tried before; whatever is behind it waits for its own release.
            self.outlet.release_again();
        }
        let (resets, wish) = self.orders.resets();
        if std::mem::replace(&mut self.resets_told, resets) != resets {
            let by = match wish {
                Wish::Unsaid => "",
                Wish::Guest => " by its guest",
                Wish::Operator => " by its operator",
            };
            self.reporter.say(&Said::Notice {
                text: format!(
                    "the machine was reset{by} and starts anew ({resets} since this process started)"
                ),
                loud: false,
            });
        }
        if self.reporter.commits_due() {
            self.reporter.commits(&self.samples);
        }
        let mut found = Found {
            log_traffic: self.backup_moved(),
            log_gone,
            ..Found::default()
        };
        if self.waiter.ready(signals).read {
            let mut bytes = [0; 16];
            found.signalled = (&self.signals).read(&mut bytes).is_ok();
        }
        if let Some(control) = control
            && self.waiter.ready(control).read
        {
            found.peer_gone |= self.peer_is_gone();
        }
        if self.death.as_ref().is_some_and(Mourner::knows) {
            self.death = None;
            found.peer_gone = true;
        }
        Ok(found)
    }

    fn watch_the_guest(&mut self) {
        if let Some((watch, again)) = &mut self.guest_watch {
            let waiting =
                self.stage.has_frames() || self.stage.has_typed() || self.stage.has_done();
            let verdict = watch.look(Instant::now(), self.orders.running(), waiting);
            *again = verdict.again;
            if verdict.kick {
                self.orders.kick();
            }
        }
    }

    fn backup_moved(&mut self) -> bool {
        let replayed = self.replayed.load(Ordering::Relaxed);
        let moved = replayed != self.replayed_before;
        self.replayed_before = replayed;
        moved
    }

    /// Once a pair runs, all that can be read from the control connection is its end, a backup's question, or a primary's word that another
    /// backup protects the machine.
    fn peer_is_gone(&mut self) -> bool {
        let Some(control) = &self.control else {
            return false;
        };
        let mut bytes = [0; WORD_MAX];
        let gone = match (&mut &*control).read(&mut bytes) {
            Ok(length) => {
                self.exits_wanted |= bytes[..length].contains(&handshake::ASK_EXITS);
                let room = WORD_MAX.saturating_sub(self.said.len());
                self.said.extend_from_slice(&bytes[..length.min(room)]);
                length == 0
            }
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        };
        if gone {
            self.control = None;
        }
        gone
    }

    /// The record that the primary has said, if it has; told once.
    pub(super) fn take_word(&mut self) -> Option<Record> {
        let record = handshake::record_in(&self.said)?;
        self.said.clear();
        Some(record)
    }

    /// Answers a backup that wants to name its divergence, once the vCPU thread has met the fence.
    pub(super) fn answer_exits(&mut self) {
        if !self.exits_wanted || !self.orders.fenced() {
            return;
        }
        self.exits_wanted = false;
        if let Some(control) = &self.control {
            // It diverged and is about to end: if it does not hear us, nothing is lost but a name.
            let _ = handshake::tell_exits(control, &self.orders.take_exits());
        }
    }

    /// The guest has turned itself off in this reign: its image is complete, and is marked so.
    pub(super) fn end_disk(&self, stamp: Stamp) {
        if let Some(Err(error)) = self.stager.disk().map(|disk| disk.end(stamp)) {
            self.reporter.say(&Said::Notice {
                text: format!("{error}; it is not marked as complete"),
                loud: true,
            });
        }
    }

    /// This side's image fails and nobody else has the machine: the guest is told, as of any disk that fails.
    pub(super) fn tell_disk_failure(&mut self) {
        if let Some(why) = self.stager.disk_failure() {
            let text = format!("the disk image fails: {why}; the guest is told");
            self.reporter.say(&Said::Notice { text, loud: true });
            self.stager.tell_failure();
        }
    }

    /// Hands on what has not been said yet.
    pub(super) fn last_words(&mut self) {
        self.reporter.commits(&self.samples);
    }

    /// Everything in the gate may leave.
    pub(super) fn release_everything(&self) {
        self.outlet.open();
        self.outlet.release(Committed::EVERYTHING);
    }
}
