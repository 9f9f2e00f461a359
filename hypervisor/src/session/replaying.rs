//! A replay: of a log file or of a flight recorder's directory, to its end or to a position, with gdb if somebody wants it.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::SessionError;
use crate::backends::wait::Wake;
use crate::config;
use crate::debug::{Gdb, Listener, Place};
use crate::digest::Digest;
use crate::entry::Base;
use crate::file_log::FileSource;
use crate::flight::{FlightSource, Recording, is_recording};
use crate::kvm::{CpuModel, KvmSource};
use crate::machine::{Machine, MachineError, MachineSpec};
use crate::orders::Orders;
use crate::position::Position;
use crate::replay::{LogSource, ReplayEnd, ReplayError, Replayer};
use crate::sandbox::{Sandbox, SandboxError, Thread};

/// How far a replay is, for another thread.
#[derive(Clone, Debug)]
pub struct Watch {
    orders: Arc<Orders>,
    bytes: u64,
    read: Arc<AtomicU64>,
    sandbox: Sandbox,
}

impl Watch {
    /// Confines the calling thread as the replay's own.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub fn confine(&self) -> Result<(), SandboxError> {
        self.sandbox.confine(Thread::Replay)
    }

    /// The last sync point.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.orders.position().0
    }

    /// How much of the log was read, from 0 to 1.
    #[must_use]
    pub fn part(&self) -> f64 {
        let read = self.read.load(Ordering::Relaxed);
        (read as f64 / self.bytes.max(1) as f64).min(1.0)
    }
}

/// What is to be replayed.
pub struct Replay<'a> {
    /// A log file, or a flight recorder's directory.
    pub from: &'a Path,
    /// Where it ends, if the log does not end before.
    pub to: Option<u64>,
    /// Where gdb connects, which is waited for.
    pub gdb: Option<&'a Place>,
    /// Told what to give to gdb's `target remote`, once it can connect.
    pub waits: &'a dyn Fn(&str),
    /// Where KVM is.
    pub kvm: &'a KvmSource,
    /// Confines the calling thread, for good.
    pub sandbox: &'a config::Sandbox,
    /// Told when it begins.
    pub begun: &'a dyn Fn(Watch),
}

/// How a replay ended that met no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The recording's own end, with the same memory and state.
    End,
    /// The end of what was recorded.
    LogOver,
    /// The position that was asked for.
    Position,
    /// The end of gdb's patience.
    Stopped,
}

/// What came of a replay.
#[derive(Debug)]
pub struct Replayed {
    /// The sync point at which it began: 0 at power-on, otherwise the checkpoint's.
    pub began: u64,
    /// The last sync point.
    pub sync_points: u64,
    /// The rolling hash over all exits up to there.
    pub digest: Digest,
    /// Hash of the CPU's and the devices' whole state; none where the machine is of no further use.
    pub state: Option<u64>,
    /// The memory's hash at the recording's end, if the log got that far.
    pub recorded: Option<u64>,
    /// The memory's hash now.
    pub replayed: Option<u64>,
    /// How many whole memories were compared on the way, and were equal.
    pub memory_checks: u64,
    /// How many bytes of the log were read and good.
    pub log_bytes: u64,
    /// What was cut off at the end of a recording, in words.
    pub torn: Option<String>,
    /// How it ended: the first difference, or what is wrong with the log, is an error.
    pub outcome: Result<Reached, ReplayError>,
}

/// A log that is read from a file or several.
trait Recorded: LogSource {
    fn progress(&self) -> (u64, Arc<AtomicU64>);
    fn torn(&self) -> Option<String>;
}

impl Recorded for FileSource {
    fn progress(&self) -> (u64, Arc<AtomicU64>) {
        self.progress()
    }

    fn torn(&self) -> Option<String> {
        None
    }
}

impl Recorded for FlightSource {
    fn progress(&self) -> (u64, Arc<AtomicU64>) {
        self.progress()
    }

    fn torn(&self) -> Option<String> {
        self.torn().map(str::to_owned)
    }
}

/// Replays. The calling thread is confined by it, for good.
///
/// # Errors
/// If there is nothing to replay or no machine to replay it in. A divergence is no such error; it stands in the result.
pub fn replay(what: &Replay<'_>) -> Result<Replayed, SessionError> {
    if is_recording(what.from) {
        let mut recording = Recording::open(what.from)?;
        fits(what.kvm, &recording.spec)?;
        let began = recording.machine(what.kvm)?;
        return run(what, began, recording.source());
    }
    let (source, spec) = FileSource::open(what.from)?;
    fits(what.kvm, &spec)?;
    let machine = Machine::new(what.kvm, &spec)?;
    run(what, (machine, None), source)
}

/// Whether this host's CPU is of the model that it was recorded on.
fn fits(kvm: &KvmSource, spec: &MachineSpec) -> Result<(), SessionError> {
    let Some(recorded) = &spec.cpu else {
        // Of before the model was noted.
        return Ok(());
    };
    let here = CpuModel::of_host(kvm).map_err(MachineError::from)?;
    if *recorded == here {
        return Ok(());
    }
    Err(SessionError::OtherCpu {
        recorded: recorded.clone(),
        here,
    })
}

fn run<L: Recorded>(
    what: &Replay<'_>,
    (mut machine, base): (Machine, Option<Base>),
    source: L,
) -> Result<Replayed, SessionError> {
    let wake = Arc::new(Wake::new().map_err(SessionError::host("make an event descriptor"))?);
    let orders = Arc::new(Orders::new(wake));
    let (bytes, read) = source.progress();
    let began = machine.position().0;
    if let Some(to) = what.to
        && to < began
    {
        return Err(SessionError::Setting {
            field: "--to",
            needed: "a position that is not before the recording's checkpoint (replay it without --to to see where it begins)",
        });
    }
    let sandbox = Sandbox::prepare(what.sandbox)?;
    // Before this thread is confined, which could not accept a connection; not before it can answer at once, as gdb has little patience.
    let gdb = what
        .gdb
        .map(|place| {
            let listener = Listener::bind(place)?;
            (what.waits)(&listener.target()?);
            Gdb::new(listener.accept()?, &mut machine, &sandbox)
        })
        .transpose()?;
    let mut replayer = Replayer::new(machine, source, Arc::clone(&orders), Duration::ZERO)
        .to(what.to.map(Position))
        .for_show();
    if let Some(base) = base {
        replayer = replayer.from_copy(base);
    }
    (what.begun)(Watch {
        orders,
        bytes,
        read,
        sandbox: sandbox.clone(),
    });
    sandbox.confine(Thread::Replay)?;
    let ended = match gdb {
        Some(gdb) => match replayer.debugged(Box::new(gdb)) {
            Ok(true) => replayer.run(),
            Ok(false) => Ok(ReplayEnd::Stopped),
            Err(error) => Err(error),
        },
        None => replayer.run(),
    };
    let position = replayer.machine().position();
    let (recorded, outcome) = match ended {
        Ok(ReplayEnd::Finished { memory_hash }) => (Some(memory_hash), Ok(Reached::End)),
        Ok(ReplayEnd::LogOver) => (None, Ok(Reached::LogOver)),
        Ok(ReplayEnd::There) => (None, Ok(Reached::Position)),
        Ok(ReplayEnd::Stopped) => (None, Ok(Reached::Stopped)),
        Err(error) => (None, Err(error)),
    };
    if !matches!(outcome, Ok(Reached::Stopped)) {
        let why = match &outcome {
            Ok(_) => format!("the replay is over, at position {position}"),
            Err(error) => error.to_string(),
        };
        replayer.show_end(why)?;
    }
    // After an error of KVM's nothing can be asked of it.
    let state = match &outcome {
        Ok(_) => Some(replayer.machine_mut().final_state()?),
        Err(_) => None,
    };
    Ok(Replayed {
        began,
        sync_points: position.0,
        digest: replayer.machine().digest(),
        state,
        recorded,
        replayed: Some(replayer.machine().memory_hash_full()?),
        memory_checks: replayer.memory_checks().0,
        log_bytes: read_so_far(&mut replayer),
        torn: replayer.source().torn(),
        outcome,
    })
}

fn read_so_far<L: Recorded>(replayer: &mut Replayer<L>) -> u64 {
    replayer.source().progress().1.load(Ordering::Relaxed)
}
