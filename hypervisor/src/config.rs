//! Configuration: a TOML file, overridden by command-line options.
#![forbid(unsafe_code)]

mod lag;

pub use lag::{Lag, LagPolicy};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rdma_log::transport::rdma;
use serde::{Deserialize, Serialize};

mod disk;
mod net;
mod pair;
mod recorder;

pub use disk::{Arrangement, Disk};
pub use net::{Mac, Net, NetBackend};
pub use pair::{CommitMode, Pair, Rdma, Transport};
pub use recorder::{FlightRecorder, duration};

use crate::intervals::{Ends, Lengths, Replication};
use crate::machine::{ClockSource, OnReset, VCPUS_MOST};
use crate::preempt::Strategy;

/// A Linux guest's CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestCpu {
    /// The deterministic template, with a user-space interrupt controller: one vCPU.
    Replayable,
    /// The host's, with its time-stamp counter and KVM's own interrupt controller.
    Host,
}

/// Everything that can be configured. Every field has a default, so an empty file is a good one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The machine's name: which record of the arbiter is its own.
    pub name: String,
    /// Which machine of this name it is, where names are given again: two sides that say another one are no pair.
    pub instance: Option<String>,
    /// `kv`, `compute`, `irq`, `clock`, `memory`, or the path of an ELF file.
    pub guest: String,
    /// A Linux kernel, a vmlinux or a bzImage, that is booted in place of `guest`.
    pub kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Where a Linux guest reads the time: `timer` or `page`; see [`Config::clock_source`] if none.
    pub clock: Option<ClockSource>,
    /// The CPU of a Linux guest: `replayable` or `host`; see [`Config::crew`] if none.
    pub cpu: Option<GuestCpu>,
    /// How many vCPUs it has.
    pub vcpus: u8,
    /// What becomes of the machine when its guest resets it.
    pub on_reset: OnReset,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The guest's command line.
    pub command_line: String,
    /// Where `/dev/kvm` is.
    pub kvm: PathBuf,
    /// The network.
    pub net: Net,
    /// The disk.
    pub disk: Disk,
    /// The other side.
    pub pair: Pair,
    /// The RDMA device (transport `rdma`).
    pub rdma: Rdma,
    /// Which CPUs the threads run on.
    pub cpus: Cpus,
    /// Times.
    pub timing: Timing,
    /// A backup that does not keep up.
    pub lag: Lag,
    /// Guests that do not exit.
    pub preempt: Preempt,
    /// How the machine is replicated.
    pub replicate: Replicate,
    /// The ring.
    pub ring: Ring,
    /// Where a backup, or `record`, keeps the last checkpoint and the log since; nowhere if none.
    pub recorder: Option<FlightRecorder>,
    /// What the threads may still do once all is set up.
    pub sandbox: Sandbox,
    /// File for the guest's console; standard output if none.
    pub console: Option<PathBuf>,
    /// Directory of the roles' control sockets; see [`crate::control::default_run_dir`] if none.
    pub run_dir: Option<PathBuf>,
    /// Where metrics are served; nowhere if none.
    pub metrics: Option<MetricsAddress>,
    /// Command that is run at each change of role, by `sh -c`.
    pub hook: Option<String>,
}

/// Where metrics are served: an address with a port, or a port of the loopback address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct MetricsAddress(pub SocketAddr);

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse() {
            return Ok(Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        let address = text.parse().map(Self);
        address.map_err(|_| {
            format!("{text:?} is no address for metrics: write ADDRESS:PORT, or a port alone for this host only")
        })
    }
}

impl TryFrom<String> for MetricsAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// CPU lists; an empty one leaves the thread to the scheduler.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cpus {
    /// Where the vCPU thread may run.
    pub vcpu: Vec<usize>,
    /// Where the I/O thread may run.
    pub io: Vec<usize>,
    /// Real-time priority, or the nearest that the host permits, for the threads that repeat late heartbeats and ask the arbiter.
    /// They sleep nearly always; without it a busy host makes heartbeats late, and a healthy side may be given up.
    pub urgent: bool,
}

impl Default for Cpus {
    fn default() -> Self {
        Self {
            vcpu: Vec::new(),
            io: Vec::new(),
            urgent: true,
        }
    }
}

/// Times, in the units that their names say.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat_ms: u64,
    /// How long the other side must be silent, at the least, before it is given up; none chooses by the transport, see
    /// [`Config::silence_ms`].
    pub silence_ms: Option<u64>,
    /// How long a thread without work looks for some before it sleeps. Only worth it on a core of its own.
    pub spin_us: u64,
    /// How often whole memories are compared; 0 is never.
    pub memory_check_ms: u64,
    /// How far behind the backup may be before the primary waits for it. A failover replays that much first; a shorter window
    /// lets every hiccup of the backup's host slow the guest.
    pub lag_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_ms: 5,
            silence_ms: None,
            spin_us: 0,
            memory_check_ms: 0,
            lag_ms: 5,
        }
    }
}

impl Timing {
    /// As a duration.
    #[must_use]
    pub fn spin(&self) -> Duration {
        Duration::from_micros(self.spin_us)
    }

    /// As a duration.
    #[must_use]
    pub fn lag(&self) -> Duration {
        Duration::from_millis(self.lag_ms)
    }

    /// As a duration; none if it is 0.
    #[must_use]
    pub fn memory_check(&self) -> Option<Duration> {
        (self.memory_check_ms > 0).then(|| Duration::from_millis(self.memory_check_ms))
    }
}

/// What the threads may still do once all is set up.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sandbox {
    /// Confine them.
    pub enabled: bool,
    /// End the process at any system call that is not listed, instead of refusing the call. For tests.
    pub strict: bool,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            enabled: true,
            strict: false,
        }
    }
}

/// What happens when something is due for a guest that does not exit.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preempt {
    /// `exit` or `checkpoint`.
    pub strategy: Strategy,
    /// How long it may compute on before it is stopped. Shorter brings interrupts earlier and costs more checkpoints.
    pub deferral_ms: u64,
}

impl Default for Preempt {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            deferral_ms: 5,
        }
    }
}

impl Preempt {
    /// As a duration.
    #[must_use]
    pub fn deferral(&self) -> Duration {
        Duration::from_millis(self.deferral_ms)
    }

    /// Whether it is stopped by a checkpoint.
    #[must_use]
    pub fn by_checkpoint(&self) -> bool {
        self.strategy == Strategy::Checkpoint
    }

    /// Goes on with a machine that has been stopped so, whatever was chosen here.
    pub fn go_on(&mut self, preempted: bool) {
        if preempted {
            self.strategy = Strategy::Checkpoint;
        }
    }
}

/// How the machine is replicated.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replicate {
    /// `replay` or `checkpoint`. The same on both sides.
    pub mode: Replication,
    /// How long an interval is at the most, or where that is fixed (mode `checkpoint`). Shorter loses less time in a failover,
    /// and costs the guest a stop more often.
    pub interval_ms: u64,
    /// What ends an interval: `output` that waits, or its length alone: `fixed`.
    pub interval: Ends,
}

impl Default for Replicate {
    fn default() -> Self {
        Self {
            mode: Replication::default(),
            interval_ms: 25,
            interval: Ends::default(),
        }
    }
}

impl Replicate {
    /// How long intervals are; none where the machine is replicated by replay.
    #[must_use]
    pub fn lengths(&self) -> Option<Lengths> {
        (self.mode == Replication::Checkpoint).then(|| Lengths {
            length: Duration::from_millis(self.interval_ms),
            ends: self.interval,
        })
    }
}

/// The smallest lane: an entry, which is at most a quarter of its lane, must have room for a frame and for what one exit needs.
pub const LANE_KIB_MIN: usize = 64;

/// Sizes of the ring's lanes; powers of two.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ring {
    /// The events lane, in KiB.
    pub events_kib: usize,
    /// The inputs lane, in KiB.
    pub inputs_kib: usize,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            events_kib: rdma_log::EVENTS_LANE >> 10,
            inputs_kib: rdma_log::INPUTS_LANE >> 10,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "machine".into(),
            instance: None,
            guest: "kv".into(),
            kernel: None,
            initrd: None,
            clock: None,
            cpu: None,
            vcpus: 1,
            // A guest that says reboot means it, and one that panics is worth a second try: the machine is to be there.
            on_reset: OnReset::Reboot,
            memory_mib: 64,
            command_line: String::new(),
            kvm: PathBuf::from("/dev/kvm"),
            net: Net::default(),
            disk: Disk::default(),
            pair: Pair::default(),
            rdma: Rdma::default(),
            cpus: Cpus::default(),
            timing: Timing::default(),
            lag: Lag::default(),
            preempt: Preempt::default(),
            replicate: Replicate::default(),
            ring: Ring::default(),
            recorder: None,
            sandbox: Sandbox::default(),
            console: None,
            run_dir: None,
            metrics: None,
            hook: None,
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what is expected. The text has the line and what was expected there.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, column, what was found and what was expected.
        what: String,
    },
    /// A value out of bounds.
    #[error("{field} is {found}: {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// Of a kernel that was prepared, with the host's CPU.
const PREPARED_FOR_REPLAY: &str = "give the kernel as its distribution has it, or choose cpu replayable (--cpu replayable): this one was prepared for replay, \
                                   and with the host's CPU, the default under replication by checkpoints and with several vCPUs, its clock would stand still";

const STANDING_CLOCK: &str = "prepare the kernel with this release (doppel prepare), or choose preemption or replication by checkpoint with it (--preempt, \
                              --replicate): a guest that makes no exit to read the time would see it stand still";

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|error| ConfigError::Malformed {
            path: path.to_owned(),
            what: error.to_string(),
        })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// TOML's own error, with line, column and what was expected.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// How long the other side must be silent, at the least, before it is given up, in milliseconds.
    ///
    /// Between two processes of one host (`shm`) a death is told by the control connection at once, and the host cannot be lost
    /// without both; silence means that a process is frozen or starved, and giving it up for nothing costs the protection.
    /// So this is long against what a busy host does to a process. Between hosts (`tcp`, `rdma`) silence is all that tells of a lost one:
    /// eight heartbeats, so that the loss is noticed and taken over within 60 ms. Too short shows as sides that are given up in
    /// health; the remedy is to set it.
    #[must_use]
    pub fn silence_ms(&self) -> u64 {
        let by_transport = match self.pair.transport {
            Transport::Shm => 150,
            Transport::Tcp | Transport::Rdma => 40,
        };
        let least = 4 * self.timing.heartbeat_ms;
        self.timing.silence_ms.unwrap_or(by_transport.max(least))
    }

    /// Where a Linux guest reads the time. A page costs it least, if it sees time go on: its kernel counts its reads (`counts`), or the guest is stopped
    /// by checkpoints. Else each read is an exit, and so a place for what is due.
    ///
    /// # Errors
    /// [`ConfigError::Value`] if a page is wanted that would stand still, or if that kernel is to have the host's CPU, whose page it does not read
    /// right: it takes the time in it as it stands, and KVM renews that hardly ever.
    pub fn clock_source(&self, counts: bool) -> Result<ClockSource, ConfigError> {
        let by_checkpoints = self.replicate.mode == Replication::Checkpoint;
        if counts && self.crew().is_some() {
            return Err(ConfigError::Value {
                field: "cpu",
                found: "host".into(),
                expected: PREPARED_FOR_REPLAY,
            });
        }
        let goes_on =
            counts || by_checkpoints || self.preempt.by_checkpoint() || self.crew().is_some();
        match self.clock {
            Some(ClockSource::Page) if !goes_on => Err(ConfigError::Value {
                field: "clock",
                found: "page".into(),
                expected: STANDING_CLOCK,
            }),
            Some(clock) => Ok(clock),
            None if counts || by_checkpoints => Ok(ClockSource::Page),
            None => Ok(ClockSource::Timer),
        }
    }

    /// How many vCPUs the guest has with the host's CPU and KVM's own interrupt controller; none: it has one that can be replayed.
    /// Unless something else is said, that is so where it is replicated by replay or not at all, and for guests of our own.
    #[must_use]
    pub fn crew(&self) -> Option<u8> {
        let checkpoints = self.replicate.mode == Replication::Checkpoint;
        let host = match self.cpu {
            Some(cpu) => cpu == GuestCpu::Host,
            None => self.vcpus != 1 || checkpoints && self.kernel.is_some(),
        };
        host.then_some(self.vcpus)
    }

    /// How the ring uses RDMA.
    #[must_use]
    pub fn rdma_ring(&self) -> rdma::Config {
        self.rdma.ring(Duration::from_millis(self.silence_ms()))
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad = |field, found: String, expected| {
            Err(ConfigError::Value {
                field,
                found,
                expected,
            })
        };
        if !crate::control::is_name(&self.name) {
            return bad(
                "name",
                format!("{:?}", self.name),
                "use 1 to 63 of a-z, 0-9 and -, not beginning with -",
            );
        }
        if !(2..=3072).contains(&self.memory_mib) {
            return bad(
                "memory_mib",
                self.memory_mib.to_string(),
                "choose 2 to 3072",
            );
        }
        if !(1..=VCPUS_MOST).contains(&self.vcpus) {
            return bad("vcpus", self.vcpus.to_string(), "choose 1 to 8");
        }
        if self.cpu == Some(GuestCpu::Replayable) && self.vcpus > 1 {
            return bad(
                "vcpus",
                self.vcpus.to_string(),
                "choose 1 with --cpu replayable: several vCPUs meet in no order that a log could give",
            );
        }
        if self.crew().is_some() && self.kernel.is_none() {
            return bad(
                "vcpus",
                self.vcpus.to_string(),
                "choose several vCPUs or --cpu host for a Linux guest only (--kernel): guests of ours have one, which can be replayed",
            );
        }
        if !(1..=1000).contains(&self.timing.heartbeat_ms) {
            return bad(
                "timing.heartbeat_ms",
                self.timing.heartbeat_ms.to_string(),
                "choose 1 to 1000",
            );
        }
        if let Some(silence) = self.timing.silence_ms
            && (silence < 4 * self.timing.heartbeat_ms || silence > 10_000)
        {
            return bad(
                "timing.silence_ms",
                silence.to_string(),
                "choose four heartbeats or more, up to 10000",
            );
        }
        if !(1..=100).contains(&self.timing.lag_ms) {
            return bad(
                "timing.lag_ms",
                self.timing.lag_ms.to_string(),
                "choose 1 to 100",
            );
        }
        if !(100..=600_000).contains(&self.lag.after_ms) {
            return bad(
                "lag.after_ms",
                self.lag.after_ms.to_string(),
                "choose 100 to 600000",
            );
        }
        if !(1..=1000).contains(&self.preempt.deferral_ms) {
            return bad(
                "preempt.deferral_ms",
                self.preempt.deferral_ms.to_string(),
                "choose 1 to 1000",
            );
        }
        if self.replicate.mode == Replication::Checkpoint && self.recorder.is_some() {
            return bad("recorder", recorder::BY_CHECKPOINT.into(), recorder::NEEDED);
        }
        if !(1..=1000).contains(&self.replicate.interval_ms) {
            return bad(
                "replicate.interval_ms",
                self.replicate.interval_ms.to_string(),
                "choose 1 to 1000",
            );
        }
        // A kernel is looked at when it is loaded.
        if self.kernel.is_none() {
            self.clock_source(false)?;
        }
        for (field, kib) in [
            ("ring.events_kib", self.ring.events_kib),
            ("ring.inputs_kib", self.ring.inputs_kib),
        ] {
            if !kib.is_power_of_two() || !(LANE_KIB_MIN..=rdma_log::MAX_LANE >> 10).contains(&kib) {
                return bad(
                    field,
                    kib.to_string(),
                    "choose a power of two from 64 to 1048576",
                );
            }
        }
        if self.net.backend == NetBackend::Tap && self.net.tap.is_none() {
            return bad(
                "net.tap",
                "missing".into(),
                "backend tap needs the interface's name",
            );
        }
        if self.net.backend == NetBackend::Link && self.net.link.is_none() {
            return bad(
                "net.link",
                "missing".into(),
                "backend link needs the socket's path",
            );
        }
        if let Err((field, found, expected)) = self.disk.check(self.pair.transport) {
            return bad(field, found, expected);
        }
        let cpus = core_affinity::get_core_ids().map_or(0, |ids| ids.len());
        for (field, list) in [("cpus.vcpu", &self.cpus.vcpu), ("cpus.io", &self.cpus.io)] {
            if let Some(&cpu) = list.iter().find(|&&cpu| cpu >= cpus.max(1)) {
                return bad(field, cpu.to_string(), "this machine has no such CPU");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_a_good_one() {
        Config::parse("").unwrap().check().unwrap();
    }

    #[test]
    fn errors_name_the_line_and_what_was_expected() {
        let error = Config::parse("name = \"x\"\nmemory_mib = \"much\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("expected u32"),
            "{error}"
        );
        let error = Config::parse("[net]\nbackend = \"token-ring\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("`tap`"),
            "{error}"
        );
        let error = Config::parse("\n\ncolour = 1\n").unwrap_err().to_string();
        assert!(
            error.contains("line 3") && error.contains("unknown field"),
            "{error}"
        );
    }

    #[test]
    fn an_arbiter_is_a_directory_or_an_etcd() {
        let arbiter = |text: &str| Config::parse(text).map(|config| config.pair.arbiter);
        let directory = arbiter("[pair]\narbiter = \"/srv/arbiter\"").unwrap();
        assert_eq!(
            directory,
            crate::arbiter::Place::Directory("/srv/arbiter".into())
        );
        let etcd = arbiter("[pair]\narbiter = \"etcd://a:1,b\"").unwrap();
        assert_eq!(etcd.to_string(), "etcd://a:1,b:2379");
        let error = arbiter("\n[pair]\narbiter = \"etcd://a:x\"").unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("line 3") && error.contains("65535"),
            "{error}"
        );
    }

    #[test]
    fn metrics_are_for_this_host_alone_unless_an_address_is_given() {
        let metrics = |text: &str| Config::parse(text).map(|config| config.metrics.unwrap().0);
        let loopback = metrics("metrics = \"9464\"").unwrap();
        assert_eq!(loopback.to_string(), "127.0.0.1:9464");
        let given = metrics("metrics = \"[::]:1\"").unwrap();
        assert_eq!(given.to_string(), "[::]:1");
        let error = metrics("metrics = \"here\"").unwrap_err().to_string();
        assert!(error.contains("ADDRESS:PORT"), "{error}");
    }

    #[test]
    fn values_out_of_bounds_are_refused() {
        for (text, field) in [
            ("name = \"a b\"", "name"),
            ("memory_mib = 1", "memory_mib"),
            ("[timing]\nheartbeat_ms = 0", "timing.heartbeat_ms"),
            ("[net]\nbackend = \"tap\"", "net.tap"),
            ("[preempt]\ndeferral_ms = 0", "preempt.deferral_ms"),
            ("[replicate]\ninterval_ms = 0", "replicate.interval_ms"),
            ("clock = \"page\"", "clock"),
            ("[cpus]\nvcpu = [100000]", "cpus.vcpu"),
            ("[timing]\nsilence_ms = 19", "timing.silence_ms"),
            ("[ring]\nevents_kib = 32", "ring.events_kib"),
            ("[ring]\ninputs_kib = 8191", "ring.inputs_kib"),
        ] {
            match Config::parse(text).unwrap().check() {
                Err(ConfigError::Value { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{text}: {other:?}"),
            }
        }
        for text in [
            "clock = \"page\"\n[preempt]\nstrategy = \"checkpoint\"",
            "[replicate]\nmode = \"checkpoint\"\n[disk]\nimage = \"x\"",
            "clock = \"page\"\n[replicate]\nmode = \"checkpoint\"",
        ] {
            Config::parse(text).unwrap().check().unwrap();
        }
    }

    #[test]
    fn a_clock_page_is_chosen_where_it_goes_on() {
        let of = |text: &str, counts| {
            let config = Config::parse(&format!("kernel = \"vmlinux\"\n{text}")).unwrap();
            config.check().unwrap();
            config.clock_source(counts).ok()
        };
        let (page, timer) = (Some(ClockSource::Page), Some(ClockSource::Timer));
        assert_eq!((of("", true), of("", false)), (page, timer));
        let wanted = "clock = \"page\"\n";
        assert_eq!((of(wanted, true), of(wanted, false)), (page, None));
        let preempted = "[preempt]\nstrategy = \"checkpoint\"";
        assert_eq!(of(preempted, false), timer);
        assert_eq!(of(&format!("{wanted}{preempted}"), false), page);
        assert_eq!(of("[replicate]\nmode = \"checkpoint\"", false), page);
        assert_eq!(of("clock = \"timer\"", true), timer);
    }

    /// Its reader takes what the page says, and KVM's page says what time it was when KVM last looked.
    #[test]
    fn a_prepared_kernel_does_not_get_the_hosts_cpu() {
        let of = |text: &str, counts| {
            let config = Config::parse(&format!("kernel = \"vmlinux\"\n{text}")).unwrap();
            config.clock_source(counts).map_err(|e| e.to_string())
        };
        let by_checkpoints = "[replicate]\nmode = \"checkpoint\"";
        for host in ["cpu = \"host\"", "vcpus = 2", by_checkpoints] {
            let said = of(host, true).unwrap_err();
            assert!(said.contains("--cpu replayable"), "{host}: {said}");
            assert!(of(host, false).is_ok(), "{host}");
        }
        let replayable = format!("cpu = \"replayable\"\n{by_checkpoints}");
        assert_eq!(of(&replayable, true), Ok(ClockSource::Page));
    }

    #[test]
    fn several_vcpus_need_a_kernel_and_no_replay() {
        let crew = |text: &str| {
            let config = Config::parse(text).unwrap();
            config
                .check()
                .map(|()| config.crew())
                .map_err(|error| error.to_string())
        };
        let kernel = "kernel = \"vmlinuz\"\n";
        let checkpoint = "[replicate]\nmode = \"checkpoint\"";
        for (text, expected) in [
            (String::new(), None),
            (kernel.into(), None),
            (format!("{kernel}cpu = \"host\""), Some(1)),
            (format!("{kernel}vcpus = 2"), Some(2)),
            (format!("{kernel}{checkpoint}"), Some(1)),
            (format!("{kernel}vcpus = 8\n{checkpoint}"), Some(8)),
            (format!("{kernel}cpu = \"replayable\"\n{checkpoint}"), None),
            (checkpoint.into(), None),
        ] {
            assert_eq!(crew(&text), Ok(expected), "{text}");
        }
        for text in [
            "vcpus = 2".into(),
            "cpu = \"host\"".into(),
            format!("{kernel}vcpus = 0"),
            format!("{kernel}vcpus = 9"),
            format!("{kernel}vcpus = 2\ncpu = \"replayable\""),
        ] {
            let error = crew(&text).unwrap_err();
            assert!(error.contains("vcpus"), "{text}: {error}");
        }
    }
}
