//! A machine without a backup: `run`, and `record` with a log file behind it.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdma_log::{Epoch, RingConfig, transport::shm};

use super::SessionError;
use super::disk;
use super::flight;
use super::host::{self, Inherited};
use super::io::{Common, InputLane, Io};
use super::report::Event;
use super::serve::NO_RESET;
use crate::backends::disk::OpenImage;
use crate::clock::GuestClock;
use crate::config::Config;
use crate::control::Operator;
use crate::control::board::{Board, Command};
use crate::control::status::{Role, Standing};
use crate::entry::Base;
use crate::file_log::FileRecorder;
use crate::flight::TapeSink;
use crate::gate::Gate;
use crate::machine::{Machine, MachineSpec};
use crate::orders::Order;
use crate::panics::{self, Need};
use crate::record::{Ended, Finished, Parts, RecordError, RecordOptions, Recorder, random_source};
use crate::ring_log::RingSink;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::sink::{NoLog, Sink};

/// How long a guest that does not exit may take to reach a sync point once its recording is to end.
const LAST_SYNC_POINT: Duration = Duration::from_secs(10);

/// Choices of a recording.
#[derive(Clone, Copy, Debug)]
pub struct RecordFor<'a> {
    /// The log file; none where a flight recorder is configured.
    pub out: Option<&'a Path>,
    /// When to end it; the guest's power-off or a signal ends it too.
    pub length: Option<Duration>,
    /// An entry for every exit.
    pub every_exit: bool,
}

/// What came of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// How the guest ended.
    pub ended: Ended,
    /// Sync points and memory hash; none if the guest was stopped between two sync points.
    pub finished: Option<Finished>,
    /// Length of the log in bytes; none for a flight recorder, which keeps its end only.
    pub bytes: Option<u64>,
}

/// Runs a machine unprotected, until its guest is gone or a signal comes.
///
/// # Errors
/// See [`SessionError`].
pub fn run(
    config: &Config,
    inherited: &Inherited,
    spec: &MachineSpec,
    json: bool,
) -> Result<Ended, SessionError> {
    let operator = Operator::start(config, Role::Solo, json)?;
    let image = disk::open_alone(config)?;
    let spec = &disk::described(spec, image.as_ref());
    let mut solo = Solo::new(config, inherited, json, None, operator.board())?;
    solo.serve_disk(config, image.as_ref())?;
    let machine = Machine::new(&inherited.kvm_source(config), spec)?;
    let options = RecordOptions {
        preempt: config.preempt.by_checkpoint(),
        ..RecordOptions::default()
    };
    let clock = GuestClock::since(spec.wall_clock_ns);
    let vcpu = solo.start(config, machine, clock, NoLog::default(), options)?;
    let (ended, _) = solo.serve(vcpu, None, None)?;
    Ok(ended)
}

/// Records a machine into a log file.
///
/// # Errors
/// See [`SessionError`].
pub fn record(
    config: &Config,
    inherited: &Inherited,
    spec: &MachineSpec,
    json: bool,
    what: RecordFor<'_>,
) -> Result<Recorded, SessionError> {
    let operator = Operator::start(config, Role::Solo, json)?;
    super::ensure_replayable(spec)?;
    let image = disk::open_alone(config)?;
    let spec = &disk::described(spec, image.as_ref());
    let options = RecordOptions {
        every_exit: what.every_exit,
        memory_check: config.timing.memory_check(),
        spin: config.timing.spin(),
        preempt: config.preempt.by_checkpoint(),
    };
    let Some(out) = what.out else {
        let mut solo = Solo::new(config, inherited, json, None, operator.board())?;
        solo.serve_disk(config, image.as_ref())?;
        return solo.record_flight(config, inherited, spec, json, options, what.length);
    };
    // Its model is the recording's.
    let machine = Machine::new(&inherited.kvm_source(config), spec)?;
    let spec = &spec.recorded_on(machine.cpu_model());
    let ring = RingConfig {
        events: config.ring.events_kib << 10,
        inputs: config.ring.inputs_kib << 10,
    };
    let (writer, reader) = shm::pair(&ring).map_err(crate::handshake::HandshakeError::from)?;
    let sandbox = Sandbox::prepare(&config.sandbox)?;
    let file = FileRecorder::start(out, spec, reader, sandbox)?;
    let committed = Arc::new(AtomicU64::new(0));
    let epoch = Epoch(1);
    let lane = Some((writer.inputs, epoch, Some(Arc::clone(&committed))));
    let mut solo = Solo::new(config, inherited, json, lane, operator.board())?;
    solo.serve_disk(config, image.as_ref())?;
    let vcpu = solo.start(
        config,
        machine,
        GuestClock::since(spec.wall_clock_ns),
        RingSink::new(writer.events, epoch, committed),
        options,
    )?;
    let served = solo.serve(vcpu, what.length, Some(&file));
    // Why it could not be written is what matters.
    let bytes = file.finish()?;
    let (ended, finished) = served?;
    Ok(Recorded {
        ended,
        finished,
        bytes: Some(bytes),
    })
}

type Vcpu = JoinHandle<Result<(Ended, Option<Finished>), RecordError>>;

struct Solo {
    io: Io,
    /// Whether the machine can be reset.
    starts_anew: bool,
}

impl Solo {
    fn new(
        config: &Config,
        inherited: &Inherited,
        json: bool,
        lane: Option<InputLane>,
        board: Arc<Board>,
    ) -> Result<Self, SessionError> {
        let port = host::open_port(config, inherited)?;
        let common = Common::new(json, board)?;
        let mut io = Io::new(common, config, json, port, Gate::new())?;
        if let Some(lane) = lane {
            io.stager.attach(lane);
        }
        Ok(Self {
            io,
            starts_anew: config.crew().is_none(),
        })
    }

    /// Records into the configured directory, in which the last checkpoint and the log since stay.
    fn record_flight(
        mut self,
        config: &Config,
        inherited: &Inherited,
        spec: &MachineSpec,
        json: bool,
        options: RecordOptions,
        length: Option<Duration>,
    ) -> Result<Recorded, SessionError> {
        let mut machine = Machine::new(&inherited.kvm_source(config), spec)?;
        // Later it would hold the guest up.
        machine.watch_memory()?;
        let (recording, tape) = flight::start(config, &self.io, json, spec, &machine, true)?;
        let sink = TapeSink::new(tape.ok_or(SessionError::Setting {
            field: "recorder",
            needed: "recording without a log file",
        })?);
        let clock = GuestClock::since(spec.wall_clock_ns);
        let vcpu = self.start(config, machine, clock, sink, options)?;
        let served = self.serve(vcpu, length, None);
        // Waits for what is still to be written.
        drop(recording);
        let (ended, finished) = served?;
        Ok(Recorded {
            ended,
            finished,
            bytes: None,
        })
    }

    fn serve_disk(
        &mut self,
        config: &Config,
        image: Option<&OpenImage>,
    ) -> Result<(), SessionError> {
        let disk = disk::start(image, config, &self.io)?;
        self.io.stager.serve_disk(disk);
        Ok(())
    }

    fn start<S: Sink + Send + 'static>(
        &self,
        config: &Config,
        mut machine: Machine,
        clock: GuestClock,
        sink: S,
        options: RecordOptions,
    ) -> Result<Vcpu, SessionError> {
        machine.man(super::confined(&self.io.sandbox))?;
        let parts = Parts {
            machine,
            sink,
            base: Base::default(),
            outlet: self.io.outlet.clone(),
            stage: Arc::clone(&self.io.stage),
            orders: Arc::clone(&self.io.orders),
            samples: Arc::clone(&self.io.samples),
            clock,
            options,
            random: random_source()?,
            desk: None,
            intervals: None,
        };
        let (cpus, wake) = (config.cpus.vcpu.clone(), Arc::clone(&self.io.wake));
        let (sandbox, disk) = (self.io.sandbox.clone(), self.io.stager.disk().cloned());
        self.io.reporter.say(&Event::Ready {
            role: "solo".into(),
            pid: std::process::id(),
            address: None,
        });
        self.io.reporter.board().stands_as(Standing::Unprotected);
        std::thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || {
                host::pin(&cpus, "vCPU");
                sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
                let mut recorder = Recorder::new(parts).with_disk(disk);
                let outcome = recorder
                    .run()
                    .and_then(|ended| Ok((ended, recorder.finish()?)));
                wake.ring();
                outcome
            })
            .map_err(SessionError::host("start the vCPU thread"))
    }

    /// The I/O thread's loop, until the vCPU thread has ended: by itself, after so long, or as the log cannot be written.
    fn serve(
        &mut self,
        vcpu: Vcpu,
        length: Option<Duration>,
        log: Option<&FileRecorder>,
    ) -> Result<(Ended, Option<Finished>), SessionError> {
        self.io.settle()?;
        let mut end_at = length.map(|length| Instant::now() + length);
        let mut give_up_at: Option<Instant> = None;
        while !vcpu.is_finished() {
            let next = [end_at, give_up_at].into_iter().flatten().min();
            let longest = next.map(|at| at.saturating_duration_since(Instant::now()));
            let found = self.io.round(longest, true)?;
            self.io.tell_disk_failure();
            while let Some((number, command)) = self.io.reporter.board().take_command() {
                // Nothing else is ordered of a machine alone.
                let done = if command == Command::Reset && !self.starts_anew {
                    Err(NO_RESET.to_owned())
                } else {
                    if command == Command::Reset {
                        self.io.order(Order::Reset);
                    }
                    Ok("from the guest's next exit on".to_owned())
                };
                let board = self.io.reporter.board();
                board.ordered(number, command, Some(done));
            }
            while let Some(thread) = panics::take() {
                if Need::of(&thread) == Need::Guest {
                    self.io.order(Order::Stop);
                    return Err(SessionError::Fell { thread });
                }
                let text = panics::goes_on_without(&thread);
                self.io.reporter.say(&Event::Notice { text, loud: true });
            }
            let now = Instant::now();
            if log.is_some_and(FileRecorder::has_ended) && give_up_at.is_none() {
                end_at = None;
                give_up_at = Some(now + LAST_SYNC_POINT);
                self.io.order(Order::Stop);
            }
            if (found.signalled || end_at.is_some_and(|at| now >= at)) && give_up_at.is_none() {
                end_at = None;
                give_up_at = Some(now + LAST_SYNC_POINT);
                self.io.order(Order::StopAtSyncPoint);
            } else if found.signalled || give_up_at.is_some_and(|at| now >= at) {
                give_up_at = Some(now + LAST_SYNC_POINT);
                self.io.order(Order::Stop);
            }
        }
        self.io.last_words();
        vcpu.join()
            .map_err(|_| SessionError::Panicked)?
            .map_err(Into::into)
    }
}
