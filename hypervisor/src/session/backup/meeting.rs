//! How a backup comes to be: it meets a primary, becomes a copy of its machine, and is entitled.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::Following;
use super::follower::{Follower, Told};
use crate::arbiter::{self, Arbiter};
use crate::backends::NetPort;
use crate::backends::wait::Waiter;
use crate::checkpoint::clone;
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
use crate::session::recruit::Recruiter;
use crate::session::report::{Event as Said, Timeline};
use crate::session::serve::{Staff, now};
use crate::session::{SessionError, protocol_timing};

/// How often a backup that is ready asks the arbiter whether it is entitled, in case its primary cannot tell it any more.
const ASK_EVERY: Duration = Duration::from_millis(50);

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
        let (hello, spec, mut machine) = heard
            .and_then(|(hello, spec)| {
                let machine = self.build(&spec)?;
                Ok((hello, spec, machine))
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
        let mut copied = None;
        if hello.running {
            let reader = Attentive::new(&control, &common);
            match clone::receive(reader, &mut machine) {
                Ok((restored, _)) => copied = Some(restored),
                Err(_) if common.is_told_to_stop() => return Err(SessionError::Interrupted),
                Err(error) => return Err(HandshakeError::Copy(error).into()),
            }
        }

        let introduction = Introduction::new(config, self.me, &machine, &spec, port.as_ref())?;
        let mut io = Io::new(common, config, self.json, port, Gate::new_shut())?;
        io.listen_to(Some(Beats::connect(
            socket,
            hello.heartbeat,
            handshake::key_of(&hello),
        )?));
        io.link = link;
        let recruiter = Recruiter::start_if_useful(config, &io, introduction, &machine)?;
        let fenced = Arc::new(OnceLock::new());
        let mut log = RingSource::new(ring.events, ring.inputs, Arc::clone(&fenced));
        let mut base = None;
        if let Some(restored) = copied {
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
        let record = match self.entitled(&io, &control, &follower) {
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
            peer: handshake::identity_of(&hello)?,
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
    fn entitled(
        &self,
        io: &Io,
        control: &Channel,
        follower: &Follower,
    ) -> Result<Record, SessionError> {
        let arbiter = self.arbiter()?;
        handshake::ready(control)?;
        loop {
            let told = io.await_word(control, ASK_EVERY)?;
            if let Ok(Told::Failed(error)) = follower.told.try_recv() {
                return Err(HandshakeError::Unfit(error.to_string()).into());
            }
            let word = match told {
                Word::None => None,
                Word::Signal => return Err(SessionError::Interrupted),
                Word::Some => Some(handshake::hear_record(control, self.me)),
            };
            let found = arbiter.read()?;
            let ours = found
                .filter(|record| record.entitled == Some(self.me) && record.state == State::Live);
            match (word, ours) {
                (Some(Ok(told)), _) => {
                    check_arbiter(found, &told)?;
                    return Ok(told);
                }
                // Its primary swapped, and then could not say so.
                (_, Some(record)) => return Ok(record),
                (Some(Err(error)), None) => return Err(error.into()),
                (None, None) => {}
            }
        }
    }
}

/// Reads a copy, and stops when the process is told to end.
struct Attentive<'a> {
    from: &'a Channel,
    common: &'a Common,
    waiter: Waiter,
}

impl<'a> Attentive<'a> {
    fn new(from: &'a Channel, common: &'a Common) -> Self {
        Self {
            from,
            common,
            waiter: Waiter::new(),
        }
    }
}

impl Read for Attentive<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.waiter.clear();
        let signals = self.waiter.add(&self.common.signals, true, false);
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
        found => Err(SessionError::NotOurs(format!(
            "the primary says {told}, this side's arbiter says {}: give both the same pair.arbiter",
            found.map_or_else(|| "nothing".to_owned(), |record| record.to_string())
        ))),
    }
}
