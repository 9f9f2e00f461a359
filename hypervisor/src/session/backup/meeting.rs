//! How a backup comes to be: it meets a primary, becomes a copy of its machine, and is entitled.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::Following;
use super::follower::{Follower, Told};
use crate::arbiter::{self, Arbiter};
use crate::backends::NetPort;
use crate::backends::wait::Waiter;
use crate::checkpoint::{Restored, clone};
use crate::config::Config;
use crate::gate::Gate;
use crate::handshake::{self, Channel, HandshakeError};
use crate::kvm::{CpuModel, KvmSource};
use crate::machine::{Machine, MachineError, MachineSpec};
use crate::orders::Order;
use crate::protocol::heartbeat::MachineId;
use crate::protocol::{Backup, Identity, Pair, Record, State};
use crate::replay::Replayer;
use crate::ring_log::RingSource;
use crate::session::beats::Beats;
use crate::session::clerk::Clerk;
use crate::session::host::Inherited;
use crate::session::io::{Common, Io, Word};
use crate::session::meet::{Introduction, Listener};
use crate::session::mourner::Mourner;
use crate::session::recruit::Recruiter;
use crate::session::report::{Event as Said, Timeline};
use crate::session::serve::{Staff, now};
use crate::session::{SessionError, protocol_timing};

/// How often a backup that is ready asks the arbiter whether it is entitled, in case its primary cannot tell it any more.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// How long its primary may take to say so itself, while it lives: an arbiter's answer, many times over. A backup that knew before its
/// primary would miss its heartbeats.
const WORD_WITHIN: Duration = Duration::from_secs(2);

/// How long after its primary's end a swap that was under way may still land.
const LATE_SWAP: Duration = Duration::from_secs(2);

/// What it takes to meet a primary.
pub(super) struct Meeting<'a> {
    pub(super) config: &'a Config,
    pub(super) inherited: &'a Inherited,
    pub(super) json: bool,
    pub(super) me: Identity,
    pub(super) source: KvmSource,
    pub(super) cpu: CpuModel,
    pub(super) listener: Listener,
}

impl Meeting<'_> {
    /// Waits for a primary, and becomes its backup: built as the machine is described, or copied from it if it runs.
    pub(super) fn meet(&self, common: Common) -> Result<Following, SessionError> {
        let config = self.config;
        let control = self.listener.accept(&common)?;
        let heard = handshake::listen_to(&control, &self.cpu, &config.name);
        let (hello, peer, spec, mut machine) = heard
            .and_then(|(hello, spec)| {
                let peer = handshake::identity_of(&hello)?;
                let machine = self.build(&spec)?;
                Ok((hello, peer, spec, machine))
            })
            .inspect_err(|error| handshake::refuse(&control, error))?;
        let socket = Beats::bind(config.pair.heartbeat)?;
        let address = socket
            .local_addr()
            .map_err(SessionError::host("read the heartbeat socket's address"))?;
        let port = match handshake::welcome(&control, self.me, address)? {
            Some(port) => Some(NetPort::inherited(port.as_raw_fd())?),
            None if control.unix().is_some() => None,
            // Over TCP nothing is shared: this side has a port of its own.
            None => Io::port(config, self.inherited)?,
        };
        let (ring, link) = self.listener.accept_ring(&common, &control, config)?;

        // Everything that takes its time is done before the copy: at its end a guest's clients wait for this side.
        let introduction = Introduction::new(config, self.me, &machine, &spec, port.as_ref())?;
        let mut io = Io::new(common, config, self.json, port, Gate::new_shut())?;
        let beats = Beats::connect(socket, hello.heartbeat, handshake::key_of(&hello));
        io.listen_to(Some(beats.map_err(|error| HandshakeError::Malformed {
            expected: "hello",
            why: error.to_string(),
        })?));
        io.link = link;
        if control.unix().is_none() {
            io.prepare_announcer(spec.mac)?;
        }
        io.death = ring
            .robust
            .map(|watch| Mourner::start(watch, &io.wake, &io.sandbox, config.cpus.urgent))
            .transpose()?;
        let recruiter = Recruiter::start_if_useful(config, &io, introduction, &machine)?;
        let fenced = Arc::new(OnceLock::new());
        let mut log = RingSource::new(ring.events, ring.inputs, Arc::clone(&fenced));
        let mut base = None;
        if hello.running {
            let restored = copied(&control, &io, &mut machine)?;
            log = log.carrying(restored.staged);
            base = Some(restored.base);
        }
        let spin = config.timing.spin();
        let mut replayer = Replayer::new(machine, log, Arc::clone(&io.orders), spin);
        if let Some(base) = base {
            replayer = replayer.from_copy(base);
        }
        let desk = recruiter.as_ref().map(|r| Arc::clone(&r.desk));
        let follower = Follower::start(config, &io, replayer, desk)?;
        let record = match self.entitled(&io, &control, peer, &follower) {
            Ok(record) => record,
            Err(error) => {
                io.order(Order::Stop);
                follower.end();
                return Err(error);
            }
        };
        control
            .set_nonblocking(true)
            .map_err(SessionError::host("set up the control connection"))?;
        io.control = Some(control);
        let pair = Pair {
            machine: MachineId::of(&config.name),
            me: self.me,
            peer,
        };
        let protocol = Backup::new(pair, record, protocol_timing(config), now())
            .ok_or_else(|| HandshakeError::NotEntitled(record.to_string()))?;
        let clerk = Clerk::start(
            self.arbiter()?,
            Arc::clone(&io.wake),
            io.sandbox.clone(),
            config.cpus.urgent,
        )?;
        Ok(Following {
            io,
            staff: Staff {
                clerk,
                recruiter,
                machine: pair.machine,
                me: pair.me,
            },
            paired: Said::Paired {
                epoch: record.epoch.0,
                peer: pair.peer.to_string(),
            },
            protocol,
            follower,
            fencer: Some((ring.fencer, fenced)),
            claim: None,
            drained: None,
            arrived: 0,
            at: Timeline::default(),
        })
    }

    fn build(&self, spec: &MachineSpec) -> Result<Machine, HandshakeError> {
        let build = || {
            let mut machine = Machine::new(&self.source, spec)?;
            machine.watch_memory()?;
            Ok(machine)
        };
        build().map_err(|error: MachineError| HandshakeError::Machine(error.to_string()))
    }

    fn arbiter(&self) -> Result<Box<dyn Arbiter>, SessionError> {
        Ok(arbiter::open(&self.config.pair.arbiter, &self.config.name)?)
    }

    /// Says that the copy is whole, and waits until it is entitled. Meanwhile the log is followed.
    ///
    /// `peer` alone can entitle it: this copy is of its machine, and of no other's.
    fn entitled(
        &self,
        io: &Io,
        control: &Channel,
        peer: Identity,
        follower: &Follower,
    ) -> Result<Record, SessionError> {
        let arbiter = self.arbiter()?;
        let ours = |record: &Record| {
            record.owner == peer && record.entitled == Some(self.me) && record.state == State::Live
        };
        handshake::ready(control)?;
        let ready = Instant::now();
        let mut said = false;
        // Once the connection is at its end: why, and since when the arbiter has answered.
        let mut gone: Option<(HandshakeError, Option<Instant>)> = None;
        loop {
            let listening = gone.is_none().then_some(control);
            let word = io.await_word(listening, ASK_EVERY)?;
            if let Ok(Told::Failed(error)) = follower.told.try_recv() {
                return Err(HandshakeError::Unfit(error.to_string()).into());
            }
            let told = match word {
                Word::Signal => return Err(SessionError::Interrupted),
                Word::None => None,
                Word::Some => match handshake::hear_record(control, self.me) {
                    Ok(record) => Some(record),
                    Err(error) => {
                        gone = Some((error, None));
                        None
                    }
                },
            };
            // A primary that lives says it itself: its heartbeats begin with its word.
            if told.is_none() && gone.is_none() && ready.elapsed() < WORD_WITHIN {
                continue;
            }
            let found = match arbiter.read() {
                Ok(found) => found,
                // Nobody changes role while it is out of reach, and this copy may be entitled.
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        io.reporter.say(&Said::Notice {
                            text: format!("whether this backup is entitled is not known: {error}"),
                            loud: true,
                        });
                    }
                    continue;
                }
            };
            if let Some(told) = told {
                if !ours(&told) {
                    return Err(HandshakeError::NotEntitled(told.to_string()).into());
                }
                check_arbiter(found, &told)?;
                return Ok(told);
            }
            if let Some(record) = found.filter(ours) {
                // Its primary swapped, and then could not say so.
                return Ok(record);
            }
            if let Some((error, since)) = gone.take() {
                let since = since.unwrap_or_else(Instant::now);
                if since.elapsed() >= LATE_SWAP {
                    return Err(error.into());
                }
                gone = Some((error, Some(since)));
            }
        }
    }
}

/// Makes of the machine the one that its primary copies here.
fn copied(control: &Channel, io: &Io, machine: &mut Machine) -> Result<Restored, SessionError> {
    let reader = Attentive {
        from: control,
        io,
        waiter: Waiter::new(),
    };
    match clone::receive(reader, machine) {
        Ok((restored, _)) => Ok(restored),
        Err(_) if io.is_told_to_stop() => Err(SessionError::Interrupted),
        Err(error) => Err(HandshakeError::Copy(error).into()),
    }
}

/// Reads a copy, and stops when the process is told to end.
struct Attentive<'a> {
    from: &'a Channel,
    io: &'a Io,
    waiter: Waiter,
}

impl Read for Attentive<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.waiter.clear();
        let signals = self.waiter.add(&self.io.signals, true, false);
        let stream = self.waiter.add(self.from, true, false);
        self.waiter.wait(Some(handshake::PATIENCE))?;
        if self.waiter.ready(signals).read {
            return Err(io::Error::other("this process is told to end"));
        }
        if !self.waiter.ready(stream).read {
            return Err(ErrorKind::TimedOut.into());
        }
        let mut from = self.from;
        from.read(to)
    }
}

/// Two sides with different arbiters could both win: what the primary says must be what this side reads.
fn check_arbiter(found: Option<Record>, told: &Record) -> Result<(), SessionError> {
    match found {
        Some(record) if record == *told => Ok(()),
        // Its primary has gone on without this backup meanwhile.
        Some(record)
            if record.owner == told.owner
                && (record.epoch, record.configuration) > (told.epoch, told.configuration) =>
        {
            Err(HandshakeError::NotEntitled(record.to_string()).into())
        }
        found => Err(SessionError::NotOurs(format!(
            "the primary says {told}, this side's arbiter says {}: give both the same pair.arbiter",
            found.map_or_else(|| "nothing".to_owned(), |record| record.to_string())
        ))),
    }
}
