//! A backup: listens for its primary, follows it, and takes the machine over when the primary is gone.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rdma_log::{Fenced, Fencer};

use super::beats::Beats;
use super::clerk::{Clerk, NOT_CONFINED};
use super::host::{self, Inherited};
use super::io::{Common, Io};
use super::meet::Listener;
use super::report::{Event as Said, Timeline};
use super::serve::{self, Served, now};
use super::{SessionError, protocol_timing};
use crate::arbiter::{self, Arbiter, Claim, random_identity};
use crate::backends::NetPort;
use crate::backends::wait::Wake;
use crate::clock::GuestClock;
use crate::config::Config;
use crate::divergence::Divergence;
use crate::gate::{Committed, Gate};
use crate::handshake::{self, HandshakeError};
use crate::kvm::CpuModel;
use crate::machine::Machine;
use crate::orders::Order;
use crate::protocol::backup::{Action, Event, Phase};
use crate::protocol::heartbeat::MachineId;
use crate::protocol::{Backup, Pair, Record, Unfit};
use crate::record::{Ended, Outlet, Parts, RecordError, RecordOptions, Recorder, random_source};
use crate::replay::{MemoryCheck, Remains, ReplayEnd, ReplayError, Replayer};
use crate::ring_log::RingSource;
use crate::sandbox::Thread;
use crate::sink::NoLog;
use crate::stage::Stage;

/// Runs a backup until the protocol ends it, as a backup or later as the primary.
///
/// # Errors
/// See [`SessionError`].
pub fn run(config: &Config, inherited: &Inherited, json: bool) -> Result<Served, SessionError> {
    let common = Common::new(json)?;
    let me = random_identity().map_err(SessionError::host("draw an identity"))?;
    let arbiter = arbiter::open(&config.pair.arbiter, &config.name)?;
    // One that cannot be asked is better known now than when the primary is gone.
    arbiter.read()?;
    let source = inherited.kvm_source(config);
    let cpu = CpuModel::of_host(&source).map_err(crate::machine::MachineError::from)?;

    let listener = Listener::bind(&config.pair)?;
    common.reporter.say(&Said::Ready {
        role: "backup".into(),
        pid: std::process::id(),
        address: listener.address(),
    });
    let (stream, hello, machine) = loop {
        let stream = listener.accept(&common)?;
        let heard = handshake::listen_to(&stream, &cpu, &config.name).and_then(|(hello, spec)| {
            let machine = Machine::new(&source, &spec).and_then(|mut machine| {
                machine.watch_memory()?;
                Ok(machine)
            });
            Ok((
                hello,
                machine.map_err(|error| HandshakeError::Machine(error.to_string()))?,
            ))
        });
        match heard {
            Ok((hello, machine)) => break (stream, hello, machine),
            Err(error) => {
                handshake::refuse(&stream, &error);
                common.reporter.say(&Said::Notice {
                    text: format!("a primary was refused: {error}"),
                    loud: true,
                });
            }
        }
    };
    let socket = Beats::bind(config.pair.heartbeat)?;
    let address = socket
        .local_addr()
        .map_err(SessionError::host("read the heartbeat socket's address"))?;
    let (record, port) = handshake::welcome(&stream, me, address)?;
    check_arbiter(&*arbiter, &record)?;
    let port = match port {
        Some(port) => Some(NetPort::inherited(port.as_raw_fd())?),
        None if stream.unix().is_some() => None,
        // Over TCP nothing is shared: this side has a port of its own.
        None => Io::port(config, inherited)?,
    };
    let (ring, link) = listener.accept_ring(&common, &stream, config)?;
    drop(listener);
    handshake::await_go(&stream)?;
    stream
        .set_nonblocking(true)
        .map_err(SessionError::host("set up the control connection"))?;

    let mut io = Io::new(common, config, json, port, None, Gate::new_shut())?;
    io.beats = Some(Beats::connect(
        socket,
        hello.heartbeat,
        handshake::key_of(&hello),
    )?);
    io.control = Some(stream);
    io.link = link;
    let clerk = Clerk::start(
        arbiter,
        Arc::clone(&io.wake),
        io.sandbox.clone(),
        config.cpus.urgent,
    )?;
    let pair = Pair {
        machine: MachineId::of(&config.name),
        me,
        peer: handshake::identity_of(&hello)?,
    };
    let protocol = Backup::new(pair, record, protocol_timing(config), now())
        .ok_or_else(|| HandshakeError::NotEntitled(record.to_string()))?;
    let fenced = Arc::new(OnceLock::new());
    let log = RingSource::new(ring.events, ring.inputs, Arc::clone(&fenced));
    let replayer = Replayer::new(machine, log, Arc::clone(&io.orders), config.timing.spin());
    let follower = Follower::start(config, &io, replayer)?;
    io.reporter.say(&Said::Paired {
        epoch: record.epoch.0,
        peer: pair.peer.to_string(),
    });
    io.settle()?;
    Following {
        io,
        clerk,
        protocol,
        follower,
        fencer: Some((ring.fencer, fenced)),
        claim: None,
        drained: None,
        arrived: 0,
        at: Timeline::default(),
    }
    .follow()
}

/// Two sides with different arbiters could both win: what the primary says must be what this side reads.
fn check_arbiter(arbiter: &dyn Arbiter, told: &Record) -> Result<(), SessionError> {
    match arbiter.read()? {
        Some(record) if record == *told => Ok(()),
        found => Err(SessionError::NotOurs(format!(
            "the primary says {told}, this side's arbiter says {}: give both the same pair.arbiter",
            found.map_or_else(|| "nothing".to_owned(), |record| record.to_string())
        ))),
    }
}

/// What the vCPU thread says.
enum Told {
    /// The log was replayed to its end after the fence.
    Drained(Drained),
    /// This copy is of no use.
    Failed(ReplayError),
}

/// Facts about a drained log.
#[derive(Clone, Copy, Debug)]
struct Drained {
    position: u64,
    memory_checks: u64,
    last_memory_check: Option<MemoryCheck>,
    resent: usize,
    inherited_frames: usize,
}

/// The vCPU thread of a backup: replays, and goes live when it is handed the claim.
struct Follower {
    thread: JoinHandle<Result<Ended, RecordError>>,
    told: Receiver<Told>,
    claims: Sender<Claim>,
    /// The number of the last entry that came.
    arrived: Arc<AtomicU64>,
}

/// What going live needs besides the proofs.
struct Live {
    outlet: Outlet,
    stage: Arc<Stage>,
    orders: Arc<crate::orders::Orders>,
    samples: Arc<crate::orders::Samples>,
    options: RecordOptions,
    random: File,
}

impl Follower {
    fn start(
        config: &Config,
        io: &Io,
        mut replayer: Replayer<RingSource>,
    ) -> Result<Self, SessionError> {
        let arrived = replayer.source().arrivals();
        let (tell, told) = channel();
        let (claims, claim) = channel();
        let live = Live {
            outlet: io.outlet.clone(),
            stage: Arc::clone(&io.stage),
            orders: Arc::clone(&io.orders),
            samples: Arc::clone(&io.samples),
            options: RecordOptions {
                spin: config.timing.spin(),
                preempt: config.preempt.by_checkpoint(),
                ..RecordOptions::default()
            },
            random: random_source()?,
        };
        let (cpus, wake) = (config.cpus.vcpu.clone(), Arc::clone(&io.wake));
        let sandbox = io.sandbox.clone();
        let thread = std::thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || {
                host::pin(&cpus, "vCPU");
                live.orders.watch_this_thread();
                sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
                let outcome = follow(replayer, live, &tell, &claim, &wake);
                wake.ring();
                outcome
            })
            .map_err(SessionError::host("start the vCPU thread"))?;
        Ok(Self {
            thread,
            told,
            claims,
            arrived,
        })
    }
}

fn follow(
    mut replayer: Replayer<RingSource>,
    live: Live,
    tell: &Sender<Told>,
    claim: &Receiver<Claim>,
    wake: &Wake,
) -> Result<Ended, RecordError> {
    let say = |told| {
        // If nobody listens the process is ending.
        let _ = tell.send(told);
        wake.ring();
    };
    match replayer.run() {
        Ok(ReplayEnd::LogOver) => {}
        Ok(ReplayEnd::Stopped | ReplayEnd::Finished { .. }) => return Ok(Ended::Stopped),
        Err(error) => {
            say(Told::Failed(error));
            return Ok(Ended::Stopped);
        }
    }
    let (memory_checks, last_memory_check) = replayer.memory_checks();
    let (remains, mut log) = replayer.into_remains();
    let frames = match log.leftover_frames() {
        Ok(frames) => frames,
        Err(error) => {
            say(Told::Failed(error.into()));
            return Ok(Ended::Stopped);
        }
    };
    for frame in &frames {
        // The stage is as large as the primary's was, so they fit.
        let _ = live.stage.push(rdma_log::Seq::ZERO, frame);
    }
    let drained = Drained {
        position: remains.machine.position().0,
        memory_checks,
        last_memory_check,
        resent: remains.unreleased.len(),
        inherited_frames: frames.len(),
    };
    let Some(fenced) = log.into_proof() else {
        say(Told::Failed(ReplayError::Log(crate::replay::LogError(
            "the log ended without a fence".into(),
        ))));
        return Ok(Ended::Stopped);
    };
    say(Told::Drained(drained));
    let Ok(claim) = claim.recv() else {
        return Ok(Ended::Stopped);
    };
    go_live(remains, claim, fenced, live).run()
}

/// Makes the backup the primary. It takes the proof that the claim was won and the proof that nothing more can commit to the
/// old log; without both there is no way to call it.
fn go_live(remains: Remains, _claim: Claim, _fenced: Fenced, live: Live) -> Recorder<NoLog> {
    for output in remains.unreleased {
        live.outlet
            .hold(rdma_log::Seq::ZERO, rdma_log::Seq::ZERO, output);
    }
    // Nothing leaves if the gate is still shut. If it was opened already, nobody else comes by for these until the guest has
    // something to log.
    live.outlet.release(Committed::EVERYTHING);
    Recorder::new(Parts {
        machine: remains.machine,
        sink: NoLog::default(),
        base: remains.base,
        outlet: live.outlet,
        stage: live.stage,
        orders: live.orders,
        samples: live.samples,
        clock: GuestClock::starting(remains.clock, remains.clock_came),
        options: live.options,
        random: live.random,
    })
}

/// The I/O thread's loop of a backup.
struct Following {
    io: Io,
    clerk: Clerk,
    protocol: Backup,
    follower: Follower,
    fencer: Option<(Fencer, Arc<OnceLock<Fenced>>)>,
    claim: Option<Claim>,
    drained: Option<Drained>,
    arrived: u64,
    at: Timeline,
}

impl Following {
    fn follow(mut self) -> Result<Served, SessionError> {
        let mut actions = Vec::new();
        loop {
            let longest = self
                .protocol
                .deadline()
                .map(|deadline| deadline.since(now()));
            // Frames are read from the shared port as soon as the guest runs here, before its outputs may leave.
            let running = matches!(self.protocol.phase(), Phase::GoingLive | Phase::Live);
            let found = self.io.round(longest, running)?;
            let now = now();
            if let Some(beats) = &self.io.beats {
                while let Some(beat) = beats.receive() {
                    self.protocol
                        .handle(now, Event::Heartbeat(beat), &mut actions);
                }
            }
            if found.peer_gone {
                self.protocol.handle(now, Event::PeerDied, &mut actions);
            }
            if found.signalled {
                return self.leave();
            }
            while let Some((answer, claim)) = self.clerk.answer() {
                if claim.is_some() {
                    self.at.claimed = Timeline::now();
                    self.claim = claim;
                }
                self.protocol
                    .handle(now, Event::Arbiter(answer), &mut actions);
            }
            while let Ok(told) = self.follower.told.try_recv() {
                let event = self.hear(told);
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
                        self.clerk.ask(request);
                    }
                    Action::Fence => {
                        let event = self.fence();
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
                        self.io.order(Order::Stop);
                        drop(self.follower.claims);
                        let _ = self.follower.thread.join();
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

    fn say(&self, text: String, loud: bool) {
        self.io.reporter.say(&Said::Notice { text, loud });
    }

    fn hear(&mut self, told: Told) -> Event {
        match told {
            Told::Drained(drained) => {
                self.at.drained = Timeline::now();
                self.drained = Some(drained);
                Event::Drained
            }
            Told::Failed(ReplayError::Diverged(divergence)) => {
                let what = self.name(*divergence).to_string();
                self.io.reporter.say(&Said::Diverged { what: what.clone() });
                Event::Unfit(Unfit::Diverged(what))
            }
            Told::Failed(ReplayError::Machine(error)) => {
                Event::Unfit(Unfit::Failed(error.to_string()))
            }
            Told::Failed(error) => Event::Unfit(Unfit::Corrupt(error.to_string())),
        }
    }

    /// Fences at once, so that the primary freezes with its recent exits at hand, and compares them with ours.
    fn name(&mut self, divergence: Divergence) -> Divergence {
        let fenced = self.fence();
        match (&self.io.control, fenced) {
            (Some(control), Event::Fenced) => match handshake::ask_exits(control) {
                Ok(recorded) => divergence.narrowed(&recorded),
                Err(_) => divergence,
            },
            _ => divergence,
        }
    }

    fn fence(&mut self) -> Event {
        if self.at.fenced != 0 {
            return Event::Fenced;
        }
        let Some((mut fencer, proof)) = self.fencer.take() else {
            return Event::Unfit(Unfit::Failed("the log could not be fenced".into()));
        };
        match fencer.fence() {
            Ok(fenced) => {
                self.at.fenced = Timeline::now();
                // The replayer takes the last reference with it, so this one goes now.
                let _ = proof.set(fenced);
                Event::Fenced
            }
            Err(error) => Event::Unfit(Unfit::Failed(format!(
                "the log could not be fenced: {error}"
            ))),
        }
    }

    /// SIGTERM at a backup: it leaves, and its primary goes on without it.
    fn leave(self) -> Result<Served, SessionError> {
        self.io.order(Order::Stop);
        drop(self.follower.claims);
        let _ = self.follower.thread.join();
        Err(SessionError::Interrupted)
    }

    fn open_gate(mut self) -> Result<Served, SessionError> {
        self.io.release_everything();
        self.at.open = Timeline::now();
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
            at: self.at,
        });
        self.io.beats = None;
        self.io.control = None;
        self.io.link = None;
        let protocol = self
            .protocol
            .into_primary(now())
            .expect("the gate opens only in phase live");
        serve::serve(&mut self.io, &self.clerk, protocol, self.follower.thread)
    }
}
