//! `doppel primary` and `doppel backup`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use hypervisor::arbiter::Place;
use hypervisor::config::{CommitMode, Config, FlightRecorder, LagPolicy, Transport};
use hypervisor::intervals::{Ends, Replication};
use hypervisor::protocol::{Cold, Reign};
use hypervisor::session::{backup as backup_session, primary as primary_session};
use hypervisor::version::Versions;

use super::Failure;
use super::machine::{MachineArgs, spec};

/// What carries the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Carrier {
    /// Shared memory, between two processes of one host
    Shm,
    /// A TCP connection
    Tcp,
    /// RDMA, set up over TCP
    Rdma,
}

impl From<Carrier> for Transport {
    fn from(carrier: Carrier) -> Self {
        match carrier {
            Carrier::Shm => Self::Shm,
            Carrier::Tcp => Self::Tcp,
            Carrier::Rdma => Self::Rdma,
        }
    }
}

/// The pair.
#[derive(Debug, Args)]
struct PairArgs {
    /// What carries the log
    #[arg(long, value_enum)]
    transport: Option<Carrier>,
    /// Address at which a backup listens (transports tcp and rdma); port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Address of the backup, to which a primary connects (transports tcp and rdma)
    #[arg(long, value_name = "ADDRESS:PORT")]
    connect: Option<SocketAddr>,
    /// Address at which a machine that runs without a backup looks for a new one (transports tcp and rdma); can be repeated
    #[arg(long = "standby", value_name = "ADDRESS:PORT")]
    standbys: Vec<SocketAddr>,
    /// Unix socket at which the backup listens and to which the primary connects
    #[arg(long, value_name = "SOCKET")]
    socket: Option<PathBuf>,
    /// Where the arbiter is: a directory that both sides see, or an etcd cluster
    #[arg(long, value_name = "DIR|etcd://HOST:PORT,...")]
    arbiter: Option<Place>,
    /// Address for this side's UDP heartbeats, port 0 takes a free one [default: that of the control connection]
    #[arg(long, value_name = "ADDRESS:PORT")]
    heartbeat: Option<SocketAddr>,
    /// The pair's secret, which `doppel secret` makes; both sides need a copy (transports tcp and rdma: always)
    #[arg(long, value_name = "FILE")]
    secret: Option<PathBuf>,
    #[command(flatten)]
    rdma: RdmaArgs,
    /// What becomes of a backup because of which the guest gets next to none of its time
    #[arg(long, value_enum, value_name = "throttle|drop")]
    lag_policy: Option<Lagging>,
    /// For how long that must be so, in milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(100..))]
    lag_after_ms: Option<u64>,
    #[command(flatten)]
    replicate: ReplicateArgs,
    /// Of a shared disk, across hosts: run this, by sh -c, before a backup that takes over writes it, with DOPPEL_NAME, DOPPEL_EPOCH,
    /// DOPPEL_PEER and DOPPEL_PEER_ADDRESS in its environment; it is to return 0 only when that peer can write it no more
    #[arg(long, value_name = "COMMAND")]
    fence_command: Option<String>,
    /// How long it may take, in milliseconds; longer is a take-over that is given up
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(100..=600_000))]
    fence_timeout_ms: Option<u64>,
    /// Compare whole memories every so many milliseconds; 0 is never
    #[arg(long, value_name = "MS")]
    memory_check_ms: Option<u64>,
}

/// What becomes of a backup that does not keep up.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Lagging {
    /// The guest stays as slow, and protected
    Throttle,
    /// It is let go: the guest runs on unprotected
    Drop,
}

/// When an entry of a log over RDMA counts as committed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// When the device says that it was written
    Nic,
    /// When the backup says that it received it
    Ack,
}

/// The RDMA device.
#[derive(Debug, Args)]
struct RdmaArgs {
    /// RDMA device, as ibv_devices shows it; the first with an active port if not given
    #[arg(long, value_name = "NAME")]
    rdma_device: Option<String>,
    /// Its port; the first active one if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    rdma_port: Option<u8>,
    /// Index of its GID; a RoCE v2 one if not given
    #[arg(long, value_name = "N")]
    rdma_gid_index: Option<u8>,
    /// When an entry counts as committed (transport rdma); both sides alike
    #[arg(long, value_enum, value_name = "nic|ack")]
    rdma_mode: Option<Mode>,
}

impl RdmaArgs {
    fn apply(&self, config: &mut Config) {
        let rdma = &mut config.rdma;
        if self.rdma_device.is_some() {
            rdma.device.clone_from(&self.rdma_device);
        }
        rdma.port = self.rdma_port.or(rdma.port);
        rdma.gid_index = self.rdma_gid_index.or(rdma.gid_index);
        if let Some(mode) = self.rdma_mode {
            rdma.mode = match mode {
                Mode::Nic => CommitMode::Nic,
                Mode::Ack => CommitMode::Ack,
            };
        }
    }
}

/// How the machine is replicated.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum By {
    /// The backup runs the same guest, from a log of what it could not have computed
    Replay,
    /// The log carries what the guest has changed, interval by interval: for any guest
    Checkpoint,
}

impl From<By> for Replication {
    fn from(by: By) -> Self {
        match by {
            By::Replay => Self::Replay,
            By::Checkpoint => Self::Checkpoint,
        }
    }
}

/// What ends an interval.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum IntervalEnds {
    /// An output that waits, at the latest its length
    Output,
    /// Its length alone
    Fixed,
}

impl From<IntervalEnds> for Ends {
    fn from(ends: IntervalEnds) -> Self {
        match ends {
            IntervalEnds::Output => Self::Output,
            IntervalEnds::Fixed => Self::Fixed,
        }
    }
}

/// How the machine is replicated; also an option of the demo.
#[derive(Clone, Copy, Debug, Args)]
pub struct ReplicateArgs {
    /// How the machine is replicated; both sides alike
    #[arg(long, value_enum)]
    pub replicate: Option<By>,
    /// Length of an interval in milliseconds (--replicate checkpoint), 1 to 1000
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub interval_ms: Option<u64>,
    /// What ends an interval (--replicate checkpoint)
    #[arg(long, value_enum)]
    pub interval: Option<IntervalEnds>,
}

impl ReplicateArgs {
    fn apply(&self, config: &mut Config) {
        let replicate = &mut config.replicate;
        replicate.mode = self.replicate.map_or(replicate.mode, Into::into);
        replicate.interval_ms = self.interval_ms.unwrap_or(replicate.interval_ms);
        replicate.interval = self.interval.map_or(replicate.interval, Into::into);
    }

    /// The options that say the same, for a process that is started.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut say = |option: &str, value: String| words.extend([option.to_owned(), value]);
        if let Some(by) = self.replicate {
            say("--replicate", Replication::from(by).name().to_owned());
        }
        if let Some(length) = self.interval_ms {
            say("--interval-ms", length.to_string());
        }
        if let Some(ends) = self.interval {
            let ends = match ends {
                IntervalEnds::Output => "output",
                IntervalEnds::Fixed => "fixed",
            };
            say("--interval", ends.to_owned());
        }
        words
    }
}

impl PairArgs {
    fn apply(&self, config: &mut Config) {
        if let Some(transport) = self.transport {
            config.pair.transport = transport.into();
        }
        config.pair.listen = self.listen.or(config.pair.listen);
        config.pair.connect = self.connect.or(config.pair.connect);
        config.pair.standbys.extend(&self.standbys);
        if let Some(socket) = &self.socket {
            config.pair.socket.clone_from(socket);
        }
        if let Some(arbiter) = &self.arbiter {
            config.pair.arbiter.clone_from(arbiter);
        }
        if let Some(heartbeat) = self.heartbeat {
            config.pair.heartbeat = Some(heartbeat);
        }
        if self.secret.is_some() {
            config.pair.secret.clone_from(&self.secret);
        }
        self.rdma.apply(config);
        if let Some(policy) = self.lag_policy {
            config.lag.policy = match policy {
                Lagging::Throttle => LagPolicy::Throttle,
                Lagging::Drop => LagPolicy::Drop,
            };
        }
        config.lag.after_ms = self.lag_after_ms.unwrap_or(config.lag.after_ms);
        self.replicate.apply(config);
        if self.fence_command.is_some() {
            config.disk.fence_command.clone_from(&self.fence_command);
        }
        config.disk.fence_timeout_ms = self
            .fence_timeout_ms
            .unwrap_or(config.disk.fence_timeout_ms);
        if let Some(every) = self.memory_check_ms {
            config.timing.memory_check_ms = every;
        }
    }
}

/// Run a machine as its primary: it serves the world, and its backup follows
#[derive(Debug, Args)]
#[command(
    after_help = "Example, in two terminals:\n  mkdir arbiter\n  doppel backup  --arbiter arbiter --socket pair.sock\n  \
                  doppel primary --arbiter arbiter --socket pair.sock --guest irq\n\n\
                  Between two hosts, with an arbiter that both see and one secret, made once and copied to the other:\n  \
                  doppel secret pair.secret\n  \
                  doppel backup  --transport tcp --listen 192.0.2.2:7700 --secret pair.secret --arbiter …\n  \
                  doppel primary --transport tcp --connect 192.0.2.2:7700 --secret pair.secret --arbiter …"
)]
pub struct PrimaryArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pair: PairArgs,
    /// Start although the arbiter's record says that the machine may run elsewhere: you know that it does not. With EPOCH.CONFIGURATION.STATE
    /// of the record that you know of, such as 3.4.live, only if it is that one still
    #[arg(long, value_name = "REIGN", num_args = 0..=1, require_equals = true)]
    cold_start: Option<Option<Reign>>,
    /// Start without a backup; one that listens later is taken, while the guest runs
    #[arg(long)]
    alone: bool,
}

/// Run a machine's backup: it listens for its primary, follows it, and takes over when it is gone
#[derive(Debug, Args)]
#[command(
    after_help = "The machine itself (guest, memory, command line) comes from the primary. Example: see doppel primary --help"
)]
pub struct BackupArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pair: PairArgs,
    /// Keep the last checkpoint and the log since in this directory, of bounded size, so that what the machine died of was recorded
    /// (docs/flight-recorder.md)
    #[arg(long, value_name = "DIR[,size=BYTES][,every=TIME]", value_parser = FlightRecorder::from_str)]
    recorder: Option<FlightRecorder>,
}

pub fn primary(args: &PrimaryArgs, versions: Versions) -> Result<(), Failure> {
    let config = args.machine.config(|config| {
        config.pair.versions = versions;
        args.pair.apply(config);
    })?;
    let served = primary_session::run(
        &config,
        &args.machine.inherited(),
        &spec(&config)?,
        args.machine.json,
        primary_session::Start {
            cold: match args.cold_start {
                None => Cold::No,
                Some(None) => Cold::Whatever,
                Some(Some(reign)) => Cold::From(reign),
            },
            alone: args.alone,
        },
    )?;
    super::served(&served)
}

pub fn backup(args: &BackupArgs, versions: Versions) -> Result<(), Failure> {
    let config = args.machine.config(|config| {
        config.pair.versions = versions;
        args.pair.apply(config);
        if args.recorder.is_some() {
            config.recorder.clone_from(&args.recorder);
        }
    })?;
    let served = backup_session::run(&config, &args.machine.inherited(), args.machine.json)?;
    super::served(&served)
}
