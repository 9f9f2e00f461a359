//! How a backup comes to be: it meets a primary, becomes a copy of its machine, and is entitled.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_log::LaneReader;

use super::Following;
use super::follower::{Follower, GONE, Told};
use crate::arbiter::{self, Arbiter};
use crate::backends::NetPort;
use crate::backends::disk::OpenImage;
use crate::backends::disk::copy::Incoming;
use crate::backends::disk::mark::{Stamp, Use};
use crate::checkpoint::{Restored, clone};
use crate::config::Config;
use crate::control::hook::Helper;
use crate::credentials::Process;
use crate::gate::Gate;
use crate::handshake::parcel::Parcels;
use crate::handshake::{self, Channel, DiskMisfit, HandshakeError, Ours, Trust};
use crate::intervals::Replication;
use crate::kvm::{CpuModel, KvmSource, Told as ToldOfCpu};
use crate::machine::{Machine, MachineError, MachineSpec};
use crate::orders::Order;
use crate::protocol::candidate::{Action, Event, Refusal};
use crate::protocol::heartbeat::MachineId;
use crate::protocol::{Backup, Candidate, Identity, Pair, Record};
use crate::replay::Replayer;
use crate::ring_log::{Proof, RingSource};
use crate::session::bailiff::{self, Bailiff, Means};
use crate::session::beats::Beats;
use crate::session::clerk::Clerk;
use crate::session::disk;
use crate::session::flight;
use crate::session::freight::Consignee;
use crate::session::host::Inherited;
use crate::session::io::{Common, Io, Word};
use crate::session::meet::{Introduction, Listener};
use crate::session::mourner::Mourner;
use crate::session::recruit::Recruiter;
use crate::session::report::{Event as Said, Timeline};
use crate::session::serve::{Staff, now};
use crate::session::warden::Warden;
use crate::session::{SessionError, open_arbiter, protocol_timing};

/// What it takes to meet a primary.
pub(super) struct Meeting<'a> {
    pub(super) config: &'a Config,
    pub(super) inherited: &'a Inherited,
    pub(super) json: bool,
    pub(super) me: Identity,
    pub(super) source: KvmSource,
    pub(super) cpu: CpuModel,
    /// Whom to believe.
    pub(super) trust: Trust,
    pub(super) listener: Listener,
    /// The host's random source, open.
    pub(super) random: File,
    /// The disk's image.
    pub(super) image: Option<OpenImage>,
    /// Hash of what is on it; none when a primary has been followed since.
    pub(super) content: Cell<Option<u64>>,
    /// The process that runs the fence command, until the thread has it that tells it to.
    pub(super) fence: Cell<Option<Helper>>,
    /// Who reserves the disk, where it keeps the old primary's host out by itself.
    pub(super) warden: Option<Warden>,
}

impl Meeting<'_> {
    /// Waits for a primary, and becomes its backup: built as the machine is described, or copied from it if it runs.
    pub(super) fn meet(&self, common: Common) -> Result<Following, SessionError> {
        let config = self.config;
        let image = self.image.as_ref();
        if self.content.get().is_none() {
            self.content.set(disk::content(image)?);
        }
        let content = self.content.get();
        let control = self.listener.accept(&common, &self.trust, &self.random)?;
        // Before the hello: whoever answers from now on is alive, so that number is nobody else's.
        let shared = image.filter(|_| config.disk.is_shared());
        let process = shared
            .and_then(|_| control.unix().map(Process::of_peer))
            .transpose()
            .map_err(|error| HandshakeError::from(DiskMisfit::NoProcess(error.to_string())))
            .inspect_err(|error| handshake::refuse(&control, error))?;
        let ours = Ours {
            cpu: &self.cpu,
            name: &config.name,
            instance: config.instance.as_deref(),
            transport: config.pair.transport,
            replication: config.replicate.mode,
        };
        let heard = handshake::listen_to(&control, &ours);
        let (hello, peer, spec, mut machine) = heard
            .and_then(|(hello, spec)| {
                let peer = handshake::identity_of(&hello)?;
                let ours = (&*config.name, content);
                disk::fits(&spec, (&hello, peer), image, ours)?;
                let machine = self.build(&spec, &hello.told)?;
                handshake::compare_cpus(&hello, machine.told())?;
                Ok((hello, peer, spec, machine))
            })
            .inspect_err(|error| handshake::refuse(&control, error))?;
        let mut config = config.clone();
        config.preempt.go_on(spec.preempted);
        let config = &config;
        let socket = Beats::bind(config.pair.heartbeat, &control)?;
        let address = socket
            .local_addr()
            .map_err(SessionError::host("read the heartbeat socket's address"))?;
        let port = match handshake::welcome(&control, self.me, address)? {
            Some(port) => Some(NetPort::inherited(port.as_raw_fd()).map_err(HandshakeError::from)?),
            None if control.unix().is_some() => None,
            // Over TCP nothing is shared: this side has a port of its own.
            None => Io::port(config, self.inherited)?,
        };
        let (mut ring, link) = self.listener.accept_ring(&common, &control, config)?;

        // Everything that takes its time is done before the copy: at its end a guest's clients wait for this side.
        let introduction = Introduction::new(
            config,
            self.me,
            &machine,
            (&spec, content),
            port.as_ref(),
            self.trust.clone(),
        )?;
        let mut io = Io::new(common, config, self.json, port, Gate::new_shut())?;
        let beats = Beats::connect(socket, hello.heartbeat, handshake::key_of(&hello));
        io.listen_to(Some(beats.map_err(|error| HandshakeError::Malformed {
            expected: "hello",
            why: error.to_string(),
        })?));
        io.link = link;
        io.death = ring
            .robust
            .map(|watch| Mourner::start(watch, &io.wake, &io.sandbox, config.cpus.urgent))
            .transpose()?;
        let recruiter = Recruiter::start_if_useful(config, &io, introduction, &machine)?;
        let fenced = Proof::default();
        let written = spec.disk.is_some_and(|disk| !disk.read_only);
        let own = disk::own(image);
        let mut overwritten = own.filter(|_| hello.running && written).cloned();
        if let Some(image) = &overwritten {
            // From the first block on it is nothing but what its primary's is, until it is that as a whole.
            image.follows(&config.name, self.me)?;
            self.content.set(None);
        }
        let restored = hello
            .running
            .then(|| {
                let lane = &mut ring.inputs;
                copied(&control, &io, lane, &mut machine, overwritten.as_mut())
            })
            .transpose()?;
        if let Some(image) = &overwritten {
            image.settle()?;
        }
        let mut log = RingSource::new(ring.events, ring.inputs, fenced.clone())
            .counted(Arc::clone(&io.samples));
        let mut base = None;
        if let Some(restored) = restored {
            log = log.carrying(restored.staged);
            base = Some(restored.base);
        }
        if let Some(image) = own {
            image.follows(&config.name, self.me)?;
            self.content.set(None);
        }
        let disk = disk::start(image, config, &io)?;
        disk::copy_with(recruiter.as_ref(), disk.as_ref(), &spec);
        io.stager.serve_disk(disk.clone());
        let spin = config.timing.spin();
        // The replayer, which has the tape, goes before it.
        let (flight, tape) = flight::start(config, &io, self.json, &spec, &machine, false)?;
        io.tell_versions(&control);
        let mut replayer = Replayer::new(machine, log, Arc::clone(&io.orders), spin)
            .speaking(control.version())
            .sure_of_disks(hello.sure_of_disks)
            .with_disk(disk.clone().filter(|disk| !disk.is_shared()))
            .with_spool(Arc::clone(io.reporter.board().spool()))
            .taped(tape);
        if let Some(base) = base {
            replayer = replayer.from_copy(base);
        }
        if config.replicate.mode == Replication::Checkpoint {
            replayer = replayer.of_intervals();
        }
        let desk = recruiter.as_ref().map(|r| Arc::clone(&r.desk));
        let mut follower = Follower::start(config, &io, replayer, desk)?;
        let pair = Pair {
            machine: MachineId::of(&config.name),
            me: self.me,
            peer,
        };
        let record = match self.entitled(&io, &control, pair, &mut follower) {
            Ok(record) => record,
            Err(error) => {
                io.order(Order::Stop);
                follower.end();
                return Err(error);
            }
        };
        if let Some(disk) = disk.as_ref().filter(|disk| !disk.is_shared()) {
            disk.mark(Use::Follows, Stamp::in_reign(&record, self.me));
            disk.may_lead(record.claimed_by(self.me).as_ref().map(Stamp::of));
        }
        if let Some(warden) = &self.warden {
            warden.follow(peer)?;
        }
        let bailiff = shared
            .map(|image| {
                let means = Means {
                    image: image.clone(),
                    machine: config.name.clone(),
                    primary: peer,
                    address: control.tcp().and_then(|stream| stream.peer_addr().ok()),
                    process,
                    command: match self.fence.take() {
                        Some(helper) => Some(helper),
                        // The last one went with a primary that was not followed after all.
                        None => bailiff::helper(config)?,
                    },
                    within: config.disk.fence_timeout(),
                    warden: self.warden.clone(),
                };
                Bailiff::start(means, &io, config.cpus.urgent)
            })
            .transpose()?;
        control
            .set_nonblocking(true)
            .map_err(SessionError::host("set up the control connection"))?;
        io.control = Some(control);
        let protocol = Backup::new(pair, record, protocol_timing(config), now())
            .ok_or_else(|| HandshakeError::NotEntitled(record.to_string()))?;
        let clerk = Clerk::start(
            self.arbiter()?,
            Arc::clone(&io.wake),
            io.sandbox.clone(),
            config.cpus.urgent,
            Arc::clone(io.reporter.board()),
        )?;
        Ok(Following {
            io,
            staff: Staff {
                clerk,
                recruiter,
                lag: config.lag,
                replication: config.replicate.mode,
                transport: config.pair.transport,
                starts_anew: spec.vcpus.is_none(),
                machine: pair.machine,
                me: pair.me,
                warden: self.warden.clone(),
            },
            paired: Said::Paired {
                epoch: record.epoch.0,
                peer: pair.peer.to_string(),
            },
            protocol,
            follower,
            flight,
            fencer: (ring.fencer, fenced),
            claim: None,
            drained: None,
            bailiff,
            arrived: 0,
            at: Timeline::default(),
            handed: None,
            mac: spec.mac,
            told_to_leave: false,
        })
    }

    fn build(&self, spec: &MachineSpec, told: &ToldOfCpu) -> Result<Machine, HandshakeError> {
        let build = || {
            let mut machine = Machine::as_told(&self.source, spec, told)?;
            machine.watch_memory()?;
            Ok(machine)
        };
        build().map_err(|error: MachineError| HandshakeError::Machine(error.to_string()))
    }

    fn arbiter(&self) -> Result<Box<dyn Arbiter>, SessionError> {
        Ok(open_arbiter(self.config)?)
    }

    /// Says that the copy is whole, and waits until it is entitled. Meanwhile the log is followed.
    fn entitled(
        &self,
        io: &Io,
        control: &Channel,
        pair: Pair,
        follower: &mut Follower,
    ) -> Result<Record, SessionError> {
        let arbiter = self.arbiter()?;
        handshake::ready(control)?;
        let mut protocol = Candidate::new(pair, protocol_timing(self.config), now());
        let mut actions = VecDeque::new();
        // Why nothing more will be said over the connection.
        let mut ended: Option<HandshakeError> = None;
        let mut arrived = 0;
        loop {
            let longest = protocol.deadline().map(|deadline| deadline.since(now()));
            let listening = ended.is_none().then_some(control);
            let word = io.await_word(listening, longest)?;
            match follower.hear() {
                Some(Told::Failed(error)) => {
                    return Err(HandshakeError::Unfit(error.to_string()).into());
                }
                Some(Told::Gone) => return Err(HandshakeError::Unfit(GONE.into()).into()),
                // Not before the fence, which is not asked for yet.
                Some(Told::Drained(_)) | None => {}
            }
            let mut handle = |event| {
                let mut new = Vec::new();
                protocol.handle(now(), event, &mut new);
                new
            };
            match word {
                Word::Signal => return Err(SessionError::Interrupted),
                Word::None => {}
                Word::Some => match handshake::hear_record(control, self.me) {
                    Ok(record) => actions.extend(handle(Event::Word(record))),
                    Err(error) => {
                        ended = Some(error);
                        actions.extend(handle(Event::PeerDied));
                    }
                },
            }
            for beat in io.beats.iter().flat_map(Beats::come) {
                actions.extend(handle(Event::Heartbeat(beat)));
            }
            let now_arrived = follower.arrived.load(Ordering::Relaxed);
            if std::mem::replace(&mut arrived, now_arrived) != now_arrived {
                actions.extend(handle(Event::LogTraffic));
            }
            actions.extend(handle(Event::Tick));
            while let Some(action) = actions.pop_front() {
                match action {
                    Action::Ask(request) => {
                        let (answer, _) = arbiter::ask(&*arbiter, &request);
                        actions.extend(handle(Event::Arbiter(answer)));
                    }
                    Action::Follow(record) => return Ok(record),
                    Action::Say(notice) => io.reporter.say(&Said::Notice {
                        text: notice.to_string(),
                        loud: notice.is_loud(),
                    }),
                    Action::GiveUp(refusal) => return Err(given_up(refusal, ended)),
                }
            }
        }
    }
}

/// Why a copy is given up, for people.
fn given_up(refusal: Refusal, ended: Option<HandshakeError>) -> SessionError {
    match refusal {
        Refusal::Dropped => ended
            .unwrap_or_else(|| io::Error::from(ErrorKind::ConnectionAborted).into())
            .into(),
        Refusal::NotEntitled(record) => HandshakeError::NotEntitled(record.to_string()).into(),
        // Two sides with different arbiters could both win.
        Refusal::OtherArbiter { told, found } => SessionError::NotOurs(format!(
            "the primary says {told}, this side's arbiter says {}: give both the same pair.arbiter",
            found.map_or_else(|| "nothing".to_owned(), |record| record.to_string())
        )),
    }
}

/// Makes of the machine the one that its primary copies here.
fn copied(
    control: &Channel,
    io: &Io,
    lane: &mut LaneReader,
    machine: &mut Machine,
    image: Option<&mut OpenImage>,
) -> Result<Restored, SessionError> {
    let seal = Parcels::take(control)?;
    let is_told = || io.is_told_to_stop().is_some();
    let mut from = Consignee::new(lane, io.link.as_ref(), control, &is_told, seal);
    let image = image.map(|image| image as &mut dyn Incoming);
    match clone::receive(&mut from, machine, image) {
        // What stands behind the end in the same piece, nobody who copies a machine says.
        Ok(_) if !from.is_at_end() => Err(HandshakeError::Malformed {
            expected: "end of the copy",
            why: "more bytes follow it".into(),
        }
        .into()),
        Ok((restored, _)) => Ok(restored),
        Err(error) => Err(io
            .is_told_to_stop()
            .unwrap_or_else(|| HandshakeError::Copy(error).into())),
    }
}
