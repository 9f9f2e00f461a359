//! The one place that wires everything: a solo machine, a primary, a backup.
//!
//! ```text
//!  I/O thread (the process's first)                          vCPU thread
//!  ┌────────────────────────────────────────────┐            ┌──────────────────────────────┐
//!  │ network port ──▶ stager ──▶ inputs lane     │── stage ──▶│ recorder or replayer         │
//!  │ heartbeats, control socket, signals         │── orders ─▶│   owns the machine and the   │
//!  │   └──▶ protocol ──▶ actions                 │◀─ reports ─│   events lane                │
//!  │ gate, when a commit or a way out comes late │◀─ outlet ─▶│ gate, when it has committed  │
//!  └────────────────────────────────────────────┘            └──────────────────────────────┘
//!        ▲ answers │ requests
//!        └─ arbiter thread: the only one that may block on a disk
//! ```
#![forbid(unsafe_code)]

pub mod backup;
mod bailiff;
mod beats;
mod clerk;
mod disk;
mod flight;
mod freight;
pub mod host;
mod io;
mod lagging;
mod meet;
mod mourner;
mod porch;
pub mod primary;
mod recruit;
pub mod replaying;
pub mod report;
pub mod serve;
pub mod solo;
mod stager;
mod warden;
mod world;

use crate::arbiter::{self, Arbiter, ArbiterError, Durability};
use crate::backends::PortError;
use crate::backends::console::ConsoleError;
use crate::backends::disk::DiskError;
use crate::backends::link::LinkError;
use crate::backends::tap::{BadNetwork, TapError};
use crate::config::{Config, Transport};
use crate::courier::Courier;
use crate::debug::DebugError;
use crate::file_log::FileLogError;
use crate::flight::FlightError;
use crate::handshake::{HandshakeError, TrustError};
use crate::intervals::Replication;
use crate::kvm::CpuModel;
use crate::machine::{MachineError, MachineSpec, SpecError};
use crate::protocol::detector::Limits;
use crate::protocol::{Epoch, Timing};
use crate::record::{Intervals, RecordError, RecordOptions};
use crate::replay::ReplayError;
use crate::ring_log::RingSink;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use io::Io;

/// Why a role ended badly.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its description.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Recording.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Replaying.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// A log file.
    #[error(transparent)]
    FileLog(#[from] FileLogError),
    /// The flight recorder.
    #[error("flight recorder: {0}")]
    Flight(#[from] FlightError),
    /// The debugger.
    #[error(transparent)]
    Debug(#[from] DebugError),
    /// A recording of another CPU.
    #[error(
        "it was recorded on a CPU of {recorded}, this host has {here}: a replay is exact on the same model only; replay it on a host of that model"
    )]
    OtherCpu {
        /// Of the recording.
        recorded: CpuModel,
        /// Of this host.
        here: CpuModel,
    },
    /// The TAP.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The Unix-socket link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// An inherited port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The disk's image.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A guest that cannot be replayed is to be.
    #[error(
        "a guest with the host's CPU and {vcpus} vCPU{} cannot be replayed, as its vCPUs meet in no order that a log could give: protect it \
         by checkpoints (--replicate checkpoint), or give it one vCPU that can be replayed (--cpu replayable --vcpus 1)",
        if *vcpus == 1 { "" } else { "s" }
    )]
    NotReplayable {
        /// How many it has.
        vcpus: u8,
    },
    /// The image fails while a backup follows whose own is well.
    #[error(
        "this side's disk image fails: {0}; this side ends without telling the guest, so that its backup takes over with its own image"
    )]
    DiskFails(String),
    /// The image fails, because the disk is another host's.
    #[error(
        "another host has taken the disk that this machine shares, by its reservation: {0}; the guest is not told of it, and this process ends. If no process of \
         this machine runs elsewhere, start it again (--cold-start)"
    )]
    DiskTaken(String),
    /// An address in the configuration.
    #[error("net.address: {0}")]
    Address(BadNetwork),
    /// The other side.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// Whom to believe.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The arbiter.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The machine's record says that it runs elsewhere, or ended.
    #[error("the arbiter's record of this machine does not let it start: {0}")]
    NotOurs(String),
    /// The configuration lacks what this role needs.
    #[error("{field} is missing: {needed}")]
    Setting {
        /// The field.
        field: &'static str,
        /// What for.
        needed: &'static str,
    },
    /// No backup came.
    #[error(
        "no backup listens at {place}: after {seconds} s this primary gives up; start `doppel backup` there first"
    )]
    NoBackup {
        /// The socket or address.
        place: String,
        /// How long it was tried.
        seconds: u64,
    },
    /// The machine that runs could not be copied to a new backup.
    #[error("no copy of the running machine could be made: {0}")]
    NoCopy(String),
    /// The log cannot be kept from being written.
    #[error("the log cannot be fenced, so this side cannot take the machine over and ends: {0}")]
    Fence(#[from] rdma_log::FenceError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] crate::sandbox::SandboxError),
    /// The control socket, the metrics or the hook.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
    /// SIGTERM or SIGINT.
    #[error("interrupted")]
    Interrupted,
    /// An order to leave came to a backup that followed nobody yet.
    #[error("told to leave before there was a primary to follow")]
    Dismissed,
    /// An order to end as one that failed.
    #[error("ends as it was told, and the backup takes the machine over")]
    Failed,
    /// The vCPU thread panicked.
    #[error("the vCPU thread panicked; this is a bug")]
    Panicked,
    /// Another thread did, without which this side is of no use.
    #[error(
        "the thread {thread} panicked, and this side ends: whoever has the machine besides goes on with it. This is a bug"
    )]
    Fell {
        /// Which one.
        thread: String,
    },
    /// The host refused something.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl SessionError {
    pub(crate) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// The protocol's times, as configured.
fn protocol_timing(config: &Config) -> Timing {
    use std::time::Duration;
    let floor = Duration::from_millis(config.silence_ms());
    let limits = Limits::default();
    let timing = Timing::default();
    Timing {
        heartbeat: Duration::from_millis(config.timing.heartbeat_ms),
        detector: Limits {
            floor,
            ceiling: limits.ceiling.max(floor),
            nap: floor / 2,
            ..limits
        },
        stale_claim: match config.disk.is_shared() && config.disk.fence_command.is_some() {
            // An heir that has the old primary cut off is not to be overtaken by it meanwhile.
            true => timing.stale_claim + config.disk.fence_timeout(),
            false => timing.stale_claim,
        },
        ..timing
    }
}

/// What a swap of the pair's record has to outlive: the record says which host has the machine, and which image is the newer one. Where
/// one host has both sides, and nothing on a disk, its loss of power leaves nobody who would ask.
fn durability(config: &Config) -> Durability {
    match config.pair.transport {
        Transport::Shm if config.disk.image.is_none() => Durability::ProcessDeath,
        _ => Durability::PowerLoss,
    }
}

/// The pair's arbiter.
fn open_arbiter(config: &Config) -> Result<Box<dyn Arbiter>, ArbiterError> {
    arbiter::open_for(&config.pair.arbiter, &config.name, durability(config))
}

/// How a machine of a pair is recorded, from its start or from its go-live.
fn record_options(config: &Config) -> RecordOptions {
    let by_checkpoints = config.replicate.lengths().is_some();
    RecordOptions {
        every_exit: false,
        // A backup that does not run has nothing to compare.
        memory_check: config.timing.memory_check().filter(|_| !by_checkpoints),
        spin: config.timing.spin(),
        // Where nobody follows step by step a guest can be given what is due wherever it stands.
        preempt: config.preempt.by_checkpoint() || by_checkpoints,
    }
}

/// The intervals of a machine that is replicated by checkpoints, which have no log yet. Their courier's thread starts here.
fn intervals(config: &Config, io: &Io) -> Result<Option<Intervals<RingSink>>, SessionError> {
    let Some(lengths) = config.replicate.lengths() else {
        return Ok(None);
    };
    let (courier, work) = Courier::new(&io.stage, &io.orders, &io.outlet, &io.samples);
    let (cpus, sandbox) = (config.cpus.io.clone(), io.sandbox.clone());
    std::thread::Builder::new()
        .name("courier".into())
        .spawn(move || {
            host::pin(&cpus, "courier");
            // It does what the vCPU thread does with the log where there are no intervals.
            sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
            work.run();
        })
        .map_err(SessionError::host("start the courier's thread"))?;
    Ok(Some(Intervals::new(courier, lengths)))
}

/// What a vCPU's own thread begins with.
fn confined(sandbox: &Sandbox) -> impl Fn() + Clone + Send + 'static {
    let sandbox = sandbox.clone();
    move || sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED)
}

/// A guest with the host's CPU does nothing twice in the same way.
fn ensure_replayable(spec: &MachineSpec) -> Result<(), SessionError> {
    match spec.vcpus {
        None => Ok(()),
        Some(vcpus) => Err(SessionError::NotReplayable { vcpus }),
    }
}

fn ensure_replicable(config: &Config, spec: &MachineSpec) -> Result<(), SessionError> {
    match config.replicate.mode {
        Replication::Replay => ensure_replayable(spec),
        Replication::Checkpoint => Ok(()),
    }
}

/// What the last line of a role's history says.
fn why_it_ended(outcome: &Result<serve::Served, SessionError>) -> String {
    match outcome {
        Ok(served) => served.reason.to_string(),
        Err(error) => error.to_string(),
    }
}

/// A reign as the ring's entries carry it.
fn ring_epoch(epoch: Epoch) -> rdma_log::Epoch {
    rdma_log::Epoch(u32::try_from(epoch.0).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_somebody_asks_for_after_a_loss_of_power_outlives_it() {
        let durability = |text: &str| durability(&Config::parse(text).unwrap());
        assert_eq!(durability(""), Durability::ProcessDeath);
        let tcp = "[pair]\ntransport = \"tcp\"\n";
        assert_eq!(durability(tcp), Durability::PowerLoss);
        let disk = "[disk]\nimage = \"a.img\"\n";
        assert_eq!(durability(disk), Durability::PowerLoss);
    }
}
