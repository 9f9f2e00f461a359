//! What can be found out about a host, without judging it.
#![forbid(unsafe_code)]

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rdma_log::verbs::{RdmaError, Verbs};
use serde::Serialize;

use super::pmu;
use super::probe::{self, Probe};
use crate::backends::tap::{Ipv4Network, TapConfig};
use crate::demo::namespace;
use crate::kvm::{Capabilities, CpuModel, KvmError, KvmSource};
use crate::scheduling::{Urgency, permitted_urgency};

/// CAP_IPC_LOCK: memory may be locked without a limit.
const CAP_IPC_LOCK: u64 = 1 << 14;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Host {
    /// In front of `/proc`, `/sys` and `/dev`.
    pub root: PathBuf,
    /// Where KVM is.
    pub kvm: KvmSource,
    /// Whether to try things that only the real machine has: a counter, a namespace, a TAP.
    pub try_things: bool,
}

impl Host {
    /// The machine that this process runs on.
    #[must_use]
    pub fn real(kvm: KvmSource) -> Self {
        Self {
            root: PathBuf::from("/"),
            kvm,
            try_things: true,
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file's text without white space around it; none if it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// The value after `key` and a colon, in a file of such lines.
    fn field(&self, path: &str, key: &str) -> Option<String> {
        field(&self.text(path)?, key)
    }
}

fn field(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    })
}

/// KVM.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmFacts {
    /// It cannot be used.
    Unusable {
        /// Why, and what to do.
        why: String,
        /// Whether the CPU says that it could: its flags have svm or vmx.
        cpu_could: bool,
    },
    /// It can be opened.
    Open {
        /// What it offers.
        capabilities: Capabilities,
        /// The CPU as both sides of a pair compare it.
        cpu: Option<CpuModel>,
        /// What the probe guest measured; none if something that it needs is missing.
        probe: Option<Box<Probe>>,
    },
}

/// Whether a network namespace with a TAP can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageFacts {
    /// It was made and removed.
    Works {
        /// Only in a user namespace.
        user_namespace: bool,
    },
    /// It cannot.
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// It was not tried.
    NotTried,
}

/// Performance counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PmuFacts {
    /// A counter of branches can be opened.
    Works,
    /// The CPU, as this system shows it, has none.
    Absent,
    /// The kernel forbids it.
    Denied,
    /// It was not tried.
    NotTried,
}

/// An RDMA device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RdmaDevice {
    /// Its name.
    pub name: String,
    /// Its first port's state, such as `4: ACTIVE`.
    pub state: String,
    /// What its link is: `Ethernet` or `InfiniBand`.
    pub link: String,
}

/// The library by which RDMA is spoken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VerbsFacts {
    /// It is loaded, and sees these devices.
    Works {
        /// Their names.
        devices: Vec<String>,
    },
    /// It cannot be loaded, or cannot look.
    Missing {
        /// Why, and what to do.
        why: String,
    },
    /// It was not tried.
    NotTried,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// KVM.
    pub kvm: KvmFacts,
    /// The CPU's name.
    pub cpu_name: Option<String>,
    /// Whether this machine is itself virtual.
    pub virtual_machine: bool,
    /// CPUs that this process may use.
    pub cpus: Vec<usize>,
    /// Distinct cores among them (two threads of one core count once).
    pub cores: usize,
    /// CPUs that the kernel keeps free of other work.
    pub isolated: Vec<usize>,
    /// Whether the kernel shares CPUs out by session first, and by process within; none if it cannot.
    pub autogroups: Option<bool>,
    /// How much memory may be locked, in bytes; none is without limit.
    pub lock_limit: Option<u64>,
    /// Memory that is free to use, in bytes.
    pub memory_available: Option<u64>,
    /// Free huge pages.
    pub huge_pages_free: u64,
    /// The setting of transparent huge pages for shared memory, which guest memory is.
    pub shared_huge_pages: Option<String>,
    /// A namespace with a TAP.
    pub stage: StageFacts,
    /// RDMA devices.
    pub rdma: Vec<RdmaDevice>,
    /// The library that uses them.
    pub verbs: VerbsFacts,
    /// Performance counters.
    pub pmu: PmuFacts,
    /// The kernel's clock source.
    pub clock_source: Option<String>,
    /// What a reading of the clock costs, in nanoseconds.
    pub clock_read_ns: u64,
    /// How urgent the threads that send heartbeats may be; none if it was not tried.
    pub urgency: Option<Urgency>,
}

impl Facts {
    /// Finds it all out.
    #[must_use]
    pub fn gather(host: &Host) -> Self {
        let flags = host.field("proc/cpuinfo", "flags").unwrap_or_default();
        let has = |flag| flags.split_whitespace().any(|found| found == flag);
        let cpus = cpus(host);
        // First, while there is one thread.
        let stage = stage(host);
        Self {
            stage,
            kvm: kvm(host, has("svm") || has("vmx")),
            cpu_name: host.field("proc/cpuinfo", "model name"),
            virtual_machine: has("hypervisor"),
            cores: cores(host, &cpus),
            isolated: host
                .text("sys/devices/system/cpu/isolated")
                .map_or_else(Vec::new, |text| cpu_list(&text)),
            cpus,
            autogroups: host
                .text("proc/sys/kernel/sched_autogroup_enabled")
                .map(|text| text.trim() != "0"),
            lock_limit: lock_limit(host),
            memory_available: kib(host.field("proc/meminfo", "MemAvailable")),
            huge_pages_free: host
                .field("proc/meminfo", "HugePages_Free")
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
            shared_huge_pages: host
                .text("sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .and_then(|text| chosen(&text)),
            rdma: rdma(&host.path("sys/class/infiniband")),
            verbs: verbs(host),
            pmu: pmu(host),
            clock_source: host
                .text("sys/devices/system/clocksource/clocksource0/current_clocksource"),
            clock_read_ns: clock_read(),
            urgency: host.try_things.then(permitted_urgency),
        }
    }
}

fn kvm(host: &Host, cpu_could: bool) -> KvmFacts {
    let unusable = |error: KvmError| KvmFacts::Unusable {
        why: error.to_string(),
        cpu_could,
    };
    let kvm = match host.kvm.open() {
        Ok(kvm) => kvm,
        Err(error) => return unusable(error),
    };
    let capabilities = Capabilities::of(&kvm);
    let probe = capabilities
        .missing
        .is_empty()
        .then(|| Box::new(probe::measure(&host.kvm)));
    KvmFacts::Open {
        capabilities,
        cpu: CpuModel::of_host(&host.kvm).ok(),
        probe,
    }
}

/// What the scheduler lets us use, if this is the real machine; otherwise what the system says is there.
fn cpus(host: &Host) -> Vec<usize> {
    let allowed = host
        .field("proc/self/status", "Cpus_allowed_list")
        .or_else(|| host.text("sys/devices/system/cpu/online"));
    allowed.map_or_else(Vec::new, |text| cpu_list(&text))
}

fn cores(host: &Host, cpus: &[usize]) -> usize {
    let mut firsts: Vec<usize> = cpus
        .iter()
        .map(|cpu| {
            host.text(&format!(
                "sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            ))
            .and_then(|text| cpu_list(&text).first().copied())
            .unwrap_or(*cpu)
        })
        .collect();
    firsts.sort_unstable();
    firsts.dedup();
    firsts.len()
}

/// Reads `0-3,8`. What is no number is left out.
fn cpu_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        {
            // No Linux has more; a file that says so must not cost us our memory.
            cpus.extend((first..=last).take(8192));
        }
    }
    cpus
}

fn kib(text: Option<String>) -> Option<u64> {
    let number: u64 = text?.trim_end_matches("kB").trim().parse().ok()?;
    number.checked_mul(1024)
}

/// The word in brackets of `always [never] advise`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn lock_limit(host: &Host) -> Option<u64> {
    let capabilities = host
        .field("proc/self/status", "CapEff")
        .and_then(|mask| u64::from_str_radix(&mask, 16).ok())
        .unwrap_or(0);
    if capabilities & CAP_IPC_LOCK != 0 {
        return None;
    }
    let limits = host.text("proc/self/limits")?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"))?;
    // Soft limit, hard limit, unit; "unlimited" is no number and so none.
    line.split_whitespace().nth(3)?.parse().ok()
}

fn rdma(class: &Path) -> Vec<RdmaDevice> {
    let mut devices: Vec<RdmaDevice> = fs::read_dir(class)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let port = |file: &str| {
                let path = entry.path().join("ports/1").join(file);
                fs::read_to_string(path)
                    .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
            };
            RdmaDevice {
                name: entry.file_name().to_string_lossy().into_owned(),
                state: port("state"),
                link: port("link_layer"),
            }
        })
        .collect();
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}

fn verbs(host: &Host) -> VerbsFacts {
    if !host.try_things {
        return VerbsFacts::NotTried;
    }
    match Verbs::load().and_then(|verbs| verbs.devices()) {
        Ok(devices) => VerbsFacts::Works { devices },
        // The library is there, and the kernel knows no RDMA.
        Err(RdmaError::NoDevice) => VerbsFacts::Works {
            devices: Vec::new(),
        },
        Err(error) => VerbsFacts::Missing {
            why: error.to_string(),
        },
    }
}

fn stage(host: &Host) -> StageFacts {
    if !host.try_things {
        return StageFacts::NotTried;
    }
    let trial = namespace::trial(&TapConfig {
        name: "doppel0".into(),
        address: Some(Ipv4Network {
            address: Ipv4Addr::new(10, 77, 0, 1),
            prefix: 24,
        }),
        mtu: 1500,
    });
    match trial {
        Ok(user_namespace) => StageFacts::Works { user_namespace },
        Err(namespace::Refused::Threads { .. }) => StageFacts::NotTried,
        Err(refused) => StageFacts::Refused {
            why: refused.to_string(),
        },
    }
}

fn pmu(host: &Host) -> PmuFacts {
    if !host.try_things {
        return PmuFacts::NotTried;
    }
    match pmu::try_counter() {
        Ok(()) => PmuFacts::Works,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => PmuFacts::Denied,
        Err(_) => PmuFacts::Absent,
    }
}

fn clock_read() -> u64 {
    const READINGS: u32 = 1000;
    let started = Instant::now();
    let mut last = started;
    for _ in 0..READINGS {
        last = Instant::now();
    }
    last.saturating_duration_since(started).as_nanos() as u64 / u64::from(READINGS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpu_list("0-2,8"), [0, 1, 2, 8]);
        assert_eq!(cpu_list("3"), [3]);
        assert!(cpu_list("").is_empty());
        assert!(cpu_list("a-b,,-").is_empty());
        assert!(cpu_list("0-99999999999").len() <= 8192);
    }

    #[test]
    fn small_files() {
        assert_eq!(
            chosen("always within_size [never] deny"),
            Some("never".into())
        );
        assert_eq!(chosen("x"), None);
        assert_eq!(kib(Some("12 kB".into())), Some(12 << 10));
        assert_eq!(kib(Some("many".into())), None);
        assert_eq!(field("a : b\nc:d", "c"), Some("d".into()));
    }
}
