//! A primary: pairs with the backup that listens, then records and serves.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::clerk::Clerk;
use super::disk;
use super::host::{self, Inherited};
use super::io::{Common, Io};
use super::meet::{self, Introduction};
use super::recruit::{Recruiter, log_to};
use super::report::Event as Said;
use super::serve::{self, Served, Staff, Vcpu};
use super::warden::{self, Warden};
use super::{SessionError, protocol_timing, record_options, why_it_ended};
use crate::arbiter::{Arbiter, Swap, random_identity};
use crate::clock::GuestClock;
use crate::config::{Config, Transport};
use crate::control::Operator;
use crate::control::board::{Board, State as Standing};
use crate::control::status::Role;
use crate::desk::Desk;
use crate::entry::Base;
use crate::gate::Gate;
use crate::handshake::{self, Trust};
use crate::machine::{Machine, MachineSpec};
use crate::protocol::heartbeat::MachineId;
use crate::protocol::{Cold, Notice, Pair, Primary, Record};
use crate::record::{Parts, Recorder, random_source};
use crate::ring_log::RingSink;
use crate::sandbox::{self, NOT_CONFINED, Thread};
use crate::sink::Sink;

/// How a primary starts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Start {
    /// What is known of its processes besides the arbiter's record.
    pub cold: Cold,
    /// Without a backup; one that listens later is taken.
    pub alone: bool,
}

/// Runs a primary until the protocol ends it.
///
/// # Errors
/// See [`SessionError`].
pub fn run(
    config: &Config,
    inherited: &Inherited,
    spec: &MachineSpec,
    json: bool,
    start: Start,
) -> Result<Served, SessionError> {
    let operator = Operator::start(config, Role::Primary, json)?;
    let outcome = lead(config, inherited, spec, json, start, operator.board());
    operator.end(&why_it_ended(&outcome));
    outcome
}

fn lead(
    config: &Config,
    inherited: &Inherited,
    spec: &MachineSpec,
    json: bool,
    start: Start,
    board: Arc<Board>,
) -> Result<Served, SessionError> {
    let trust = Trust::of(&config.pair)?;
    let common = Common::new(json, Arc::clone(&board))?;
    super::ensure_replicable(config, spec)?;
    let image = disk::open(config, true)?;
    let spec = &disk::described(spec, image.as_ref());
    let me = random_identity().map_err(SessionError::host("draw an identity"))?;
    let warden = warden::start(image.as_ref(), config, me)?;
    let arbiter = super::open_arbiter(config)?;
    let found = arbiter.read()?;
    if !Record::lets_start(found.as_ref(), start.cold) {
        return Err(SessionError::NotOurs(not_to_start(
            found.as_ref(),
            start.cold,
        )));
    }
    let before = match &image {
        Some(image) => image.judge(&config.name, found.as_ref())?,
        None => None,
    };
    let content = disk::content(image.as_ref())?;
    let mut machine = Machine::new(&inherited.kvm_source(config), spec)?;
    machine.watch_memory()?;
    let port = Io::port(config, inherited)?;
    let described = (spec, content);
    let introduction = Introduction::new(config, me, &machine, described, port.as_ref(), trust)?;

    let shown = Record::cold_start(found.as_ref(), me, None);
    if let Some(warden) = &warden {
        warden.hold(found.as_ref().map(|record| record.owner))?;
    }
    disk::show(image.as_ref(), &config.name, before, &shown)?;
    if let Some(warden) = &warden {
        warden.settle()?;
    }
    // Before its mark says that this start came to nothing.
    let free = || warden.as_ref().map(Warden::release).transpose();
    let meet = || -> Result<_, SessionError> {
        let stream = meet::find_backup(&config.pair, &common)?;
        if config.pair.transport == Transport::Rdma {
            sandbox::shed(&config.sandbox)?;
        }
        let met = meet::introduce(stream, config, &introduction, false)?;
        handshake::await_ready(&met.control)?;
        Ok(met)
    };
    let met = match (!start.alone).then(meet).transpose() {
        Ok(met) => met,
        Err(error) => {
            free()?;
            disk::call_off(image.as_ref())?;
            return Err(error);
        }
    };
    let peer = met.as_ref().map(|met| met.identity);
    let record = Record::cold_start(found.as_ref(), me, peer);
    disk::begin(image.as_ref(), &config.name, before, &record, || {
        let begun = begin(&*arbiter, found.as_ref(), &record);
        if begun.is_err() {
            free()?;
        }
        begun
    })?;
    if let Some(met) = &met {
        handshake::agree(&met.control, &record)?;
        let control = met.control.set_nonblocking(true);
        control.map_err(SessionError::host("set up the control connection"))?;
    }

    let mut io = Io::new(common, config, json, port, Gate::new())?;
    let clerk = Clerk::start(
        arbiter,
        Arc::clone(&io.wake),
        io.sandbox.clone(),
        config.cpus.urgent,
        Arc::clone(&board),
    )?;
    let disk = disk::start(image.as_ref(), config, &io)?;
    io.stager.serve_disk(disk);
    let recruiter = Recruiter::start_if_useful(config, &io, introduction, &machine)?;
    disk::copy_with(recruiter.as_ref(), io.stager.disk(), spec);
    let staff = Staff {
        clerk,
        recruiter,
        lag: config.lag,
        replication: config.replicate.mode,
        transport: config.pair.transport,
        starts_anew: config.crew().is_none(),
        machine: MachineId::of(&config.name),
        me,
        warden: warden.clone(),
    };
    let timing = protocol_timing(config);
    let (sink, protocol) = match met {
        Some(met) => {
            let (sink, taken, lane) = log_to(
                config,
                super::ring_epoch(record.epoch),
                met.ring,
                met.watch,
                met.control.version(),
                true,
            );
            io.join_log(taken);
            io.stager.attach(lane);
            io.listen_to(Some(met.beats));
            io.tell_versions(&met.control);
            io.control = Some(met.control);
            let pair = Pair {
                machine: staff.machine,
                me,
                peer: met.identity,
            };
            let protocol = Primary::protected(pair, record, timing, serve::now());
            (sink, protocol)
        }
        None => {
            let protocol = Primary::unprotected(me, record, timing, serve::now());
            (RingSink::detached(), protocol)
        }
    };
    let clock = GuestClock::since(spec.wall_clock_ns);
    let desk = staff.recruiter.as_ref().map(|r| Arc::clone(&r.desk));
    let vcpu = start_vcpu(config, &io, machine, clock, sink, desk)?;
    if config.pair.transport != Transport::Shm {
        // A machine of this address may have been elsewhere on the network before.
        io.announce(spec.mac);
    }
    io.settle()?;
    board.stands(Standing {
        role: Role::Primary,
        standing: protocol.phase().into(),
        record: Some(record),
    });
    match peer {
        Some(peer) => io.reporter.say(&Said::Paired {
            epoch: record.epoch.0,
            peer: peer.to_string(),
        }),
        None => {
            io.reporter.say(&Said::Ready {
                role: "primary".into(),
                pid: std::process::id(),
                address: None,
            });
            let notice = Notice::Unprotected(record);
            io.reporter.say(&Said::Notice {
                text: notice.to_string(),
                loud: notice.is_loud(),
            });
        }
    }
    let outcome = serve::serve(io, staff, protocol, vcpu);
    if let Some(warden) = warden {
        warden.end(&outcome);
    }
    outcome
}

/// Why a machine with this record is not started.
fn not_to_start(found: Option<&Record>, cold: Cold) -> String {
    let found = found.map_or_else(|| "there is none".to_owned(), Record::to_string);
    match cold {
        Cold::From(reign) => format!(
            "{found}. The cold start was ordered from {reign}, so a process of this machine has lived since, and may serve. If none runs any more, \
             order it again"
        ),
        _ => format!("{found}. If no process of this machine runs any more, say --cold-start"),
    }
}

/// Begins the reign.
fn begin(
    arbiter: &dyn Arbiter,
    found: Option<&Record>,
    record: &Record,
) -> Result<(), SessionError> {
    match arbiter.swap(found, record)? {
        Swap::Done => Ok(()),
        Swap::Lost(now) => Err(SessionError::NotOurs(match now {
            Some(record) => format!("another process was first: {record}"),
            None => "it disappeared".into(),
        })),
    }
}

fn start_vcpu(
    config: &Config,
    io: &Io,
    mut machine: Machine,
    clock: GuestClock,
    mut sink: RingSink,
    desk: Option<Arc<Desk<RingSink>>>,
) -> Result<Vcpu, SessionError> {
    let mut intervals = super::intervals(config, io)?;
    if let Some(intervals) = &mut intervals
        && sink.keeps()
    {
        let log = std::mem::replace(&mut sink, RingSink::detached());
        intervals.begin_log(log, Base::default());
    }
    machine.man(super::confined(&io.sandbox))?;
    let parts = Parts {
        machine,
        sink,
        base: Base::default(),
        outlet: io.outlet.clone(),
        stage: Arc::clone(&io.stage),
        orders: Arc::clone(&io.orders),
        samples: Arc::clone(&io.samples),
        clock,
        options: record_options(config),
        random: random_source()?,
        desk,
        intervals,
    };
    let (cpus, wake) = (config.cpus.vcpu.clone(), Arc::clone(&io.wake));
    let (sandbox, disk) = (io.sandbox.clone(), io.stager.disk().cloned());
    std::thread::Builder::new()
        .name("vcpu".into())
        .spawn(move || {
            host::pin(&cpus, "vCPU");
            parts.orders.watch_this_thread();
            sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
            let outcome = Recorder::new(parts).with_disk(disk).run();
            wake.ring();
            outcome
        })
        .map_err(SessionError::host("start the vCPU thread"))
}
