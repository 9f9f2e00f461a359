//! A primary: pairs with the backup that listens, then records and serves.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::beats::Beats;
use super::clerk::{Clerk, NOT_CONFINED};
use super::host::{self, Inherited};
use super::io::{Common, Io};
use super::meet;
use super::report::Event as Said;
use super::serve::{self, Served, Vcpu};
use super::{SessionError, protocol_timing};
use crate::arbiter::{self, Arbiter, Swap, random_bytes, random_identity};
use crate::clock::GuestClock;
use crate::config::Config;
use crate::entry::Base;
use crate::gate::Gate;
use crate::handshake::{self, Channel, Hello, Welcomed};
use crate::machine::{Machine, MachineSpec};
use crate::protocol::heartbeat::MachineId;
use crate::protocol::{Identity, Pair, Primary, Record, State};
use crate::record::{Parts, RecordOptions, Recorder, random_source};
use crate::ring_log::{RingSink, Window};
use crate::sandbox::Thread;

/// Runs a primary until the protocol ends it.
///
/// `cold_start` says that no process of this machine runs any more, whatever the arbiter's record says.
///
/// # Errors
/// See [`SessionError`].
pub fn run(
    config: &Config,
    inherited: &Inherited,
    spec: &MachineSpec,
    json: bool,
    cold_start: bool,
) -> Result<Served, SessionError> {
    let common = Common::new(json)?;
    let me = random_identity().map_err(SessionError::host("draw an identity"))?;
    let arbiter = arbiter::open(&config.pair.arbiter, &config.name)?;
    let found = arbiter.read()?;
    may_start(found.as_ref(), cold_start)?;
    let mut machine = Machine::new(&inherited.kvm_source(config), spec)?;
    machine.watch_memory()?;
    let port = Io::port(config, inherited)?;

    let stream = meet::find_backup(&config.pair, &common)?;
    let socket = Beats::bind(config.pair.heartbeat)?;
    let key = random_bytes().map_err(SessionError::host("draw a key"))?;
    let spec_bytes = spec.encode();
    let hello = Hello {
        version: handshake::VERSION,
        cpu: machine.cpu_model().clone(),
        name: config.name.clone(),
        identity: me.to_string(),
        heartbeat: socket
            .local_addr()
            .map_err(SessionError::host("read the heartbeat socket's address"))?,
        key,
        spec_bytes: spec_bytes.len() as u32,
    };
    let welcomed = handshake::introduce(&stream, &hello, &spec_bytes)?;
    let record = entitle(&*arbiter, found.as_ref(), me, &welcomed)?;
    // On one host both sides share the port, so that the frames in its queue outlive either.
    let shared = match &stream {
        Channel::Unix(_) => handshake::port_fd(port.as_ref()),
        Channel::Tcp(_) => None,
    };
    handshake::agree(&stream, &record, shared)?;
    let (ring, watch) = meet::connect_ring(&stream)?;

    let committed = Arc::new(AtomicU64::new(0));
    let epoch = super::ring_epoch(record.epoch);
    let told = watch.is_none().then(|| Arc::clone(&committed));
    let lane = Some((ring.inputs, epoch, told));
    let mut io = Io::new(common, config, json, port, lane, Gate::new())?;
    io.beats = Some(Beats::connect(
        socket,
        welcomed.heartbeat,
        handshake::key_of(&hello),
    )?);
    let clerk = Clerk::start(
        arbiter,
        Arc::clone(&io.wake),
        io.sandbox.clone(),
        config.cpus.urgent,
    )?;
    let window = Window::new(config.timing.lag(), ring.progress, Arc::clone(&io.replayed));
    let mut sink = RingSink::new(ring.events, epoch, committed).with_window(window);
    if let Some(watch) = &watch {
        sink = sink.with_watch(watch.clone());
    }
    io.watch = watch;
    handshake::go(&stream)?;
    stream
        .set_nonblocking(true)
        .map_err(SessionError::host("set up the control connection"))?;
    io.control = Some(stream);
    let pair = Pair {
        machine: MachineId::of(&config.name),
        me,
        peer: welcomed.identity,
    };
    let protocol = Primary::protected(pair, record, protocol_timing(config), serve::now());
    let clock = GuestClock::since(spec.wall_clock_ns);
    let vcpu = start(config, &io, machine, clock, sink)?;
    io.reporter.say(&Said::Paired {
        epoch: record.epoch.0,
        peer: welcomed.identity.to_string(),
    });
    io.settle()?;
    serve::serve(&mut io, &clerk, protocol, vcpu)
}

/// A machine may start from nothing, from the end of an earlier reign, or because its operator says so.
fn may_start(found: Option<&Record>, cold_start: bool) -> Result<(), SessionError> {
    match found {
        Some(record) if record.state != State::Ended && !cold_start => Err(SessionError::NotOurs(
            format!("{record}. If no process of this machine runs any more, say --cold-start"),
        )),
        _ => Ok(()),
    }
}

fn entitle(
    arbiter: &dyn Arbiter,
    found: Option<&Record>,
    me: Identity,
    welcomed: &Welcomed,
) -> Result<Record, SessionError> {
    let record = Record::cold_start(found, me, Some(welcomed.identity));
    match arbiter.swap(found, &record)? {
        Swap::Done => Ok(record),
        Swap::Lost(now) => Err(SessionError::NotOurs(match now {
            Some(record) => format!("another process was first: {record}"),
            None => "it disappeared".into(),
        })),
    }
}

fn start(
    config: &Config,
    io: &Io,
    machine: Machine,
    clock: GuestClock,
    sink: RingSink,
) -> Result<Vcpu, SessionError> {
    let parts = Parts {
        machine,
        sink,
        base: Base::default(),
        outlet: io.outlet.clone(),
        stage: Arc::clone(&io.stage),
        orders: Arc::clone(&io.orders),
        samples: Arc::clone(&io.samples),
        clock,
        options: RecordOptions {
            every_exit: false,
            memory_check: config.timing.memory_check(),
            spin: config.timing.spin(),
            preempt: config.preempt.by_checkpoint(),
        },
        random: random_source()?,
    };
    let (cpus, wake) = (config.cpus.vcpu.clone(), Arc::clone(&io.wake));
    let sandbox = io.sandbox.clone();
    std::thread::Builder::new()
        .name("vcpu".into())
        .spawn(move || {
            host::pin(&cpus, "vCPU");
            parts.orders.watch_this_thread();
            sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
            let outcome = Recorder::new(parts).run();
            wake.ring();
            outcome
        })
        .map_err(SessionError::host("start the vCPU thread"))
}
