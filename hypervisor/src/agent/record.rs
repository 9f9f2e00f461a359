//! What the agents of a site keep in etcd, as types: hosts, machines, orders and their answers, and all of it at one moment.
//!
//! ```text
//!  doppel/site/hosts/HOST       Host     under its agent's lease
//!  doppel/site/vms/NAME         Vm       changed by compare-and-swap alone
//!  doppel/site/ports/PORT       the name of the machine that has it
//!  doppel/site/drains/HOST      Drain    while the host is to be empty
//!  doppel/site/orders/NAME      Order    under the lease of whoever gave it
//!  doppel/site/answers/ID       Answer   under a lease of the agent that took the order
//!  doppel/site/deleted/INSTANCE Deleted  until the last host has removed its image of the machine's disk
//!  doppel/site/placements       a word that every placement rewrites, so that no two are made from one picture
//!  doppel/machines/NAME         the arbiter's record: read here, written by the pair alone
//! ```
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::disks::{Deleted, DiskLife, ImageReport};
use super::spec::Spec;
use crate::control::find::Found;
use crate::control::status::{Role, Standing};
use crate::kvm::CpuModel;
use crate::protocol::record::{Record, Reign, State};

/// What a role takes besides its guest's memory: its ring, and the program itself, in MiB.
pub const OVERHEAD_MIB: u64 = 48;

/// Failures that are remembered of a machine.
const FAILURES: usize = 8;

/// How long a host is left out after a failure there, in milliseconds; twice as long for two, and so on.
const BACK_OFF_MS: u64 = 5000;

/// The ports that a host has for backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl Ports {
    /// Whether it is one of them.
    #[must_use]
    pub fn has(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

/// A host, as its agent tells of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Which installation of the agent this is: 128 random bits, kept in its state directory.
    pub instance: String,
    /// The address at which its backups listen.
    pub address: IpAddr,
    /// Its CPU, which both sides of a pair must have alike; none if it has no KVM that can be used.
    pub cpu: Option<CpuModel>,
    /// For machines, in MiB.
    pub memory_mib: u64,
    /// For backups.
    pub ports: Ports,
    /// Whether guests get a network here.
    pub network: bool,
    /// An RDMA device.
    pub rdma: Option<String>,
    /// Processes that wanted a CPU in the last minute, for each CPU.
    pub load: f64,
    /// The agent's version.
    pub version: String,
    /// When this was written, in milliseconds since 1970, by its own clock.
    pub written_ms: u64,
    /// Where its agent shows consoles, if it does.
    #[serde(default)]
    pub console: Option<u16>,
    /// Which of its boots this is, as its kernel says.
    #[serde(default)]
    pub boot: String,
    /// What runs here.
    pub roles: Vec<RoleReport>,
    /// Images of machines' disks; none if its agent knows none.
    #[serde(default)]
    pub images: Option<Vec<ImageReport>>,
}

/// A host that is to be empty: machines that it serves are switched over, their backups are moved, and it is given nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The host.
    pub host: String,
    /// When that was said, in milliseconds since 1970.
    pub since_ms: u64,
    /// It ends by itself once the host has booted anew, which is then not in this boot any more; none: by `doppel vm undrain` alone.
    pub boot: Option<String>,
}

impl Drain {
    /// Whether the host, in this boot now, has come back from the shutdown that it was drained for.
    #[must_use]
    pub fn is_over(&self, boot: &str) -> bool {
        self.boot.as_ref().is_some_and(|before| before != boot)
    }
}

impl Host {
    /// Where a backup listens here.
    #[must_use]
    pub fn place(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }

    /// Its roles of this machine.
    pub fn roles_of(&self, machine: &str) -> impl Iterator<Item = &RoleReport> {
        self.roles
            .iter()
            .filter(move |role| role.machine == machine)
    }
}

/// A role's process, as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleReport {
    /// The machine.
    pub machine: String,
    /// The process.
    pub pid: u32,
    /// Which machine of that name, as it says; none if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// What it says of itself; none if it says nothing: it is frozen, or being set up.
    pub says: Option<Says>,
}

/// What a role says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Says {
    /// What it is.
    pub role: Role,
    /// How it stands.
    pub standing: Standing,
    /// Its reign.
    pub epoch: u64,
    /// Sync points of its guest.
    pub position: u64,
}

impl RoleReport {
    /// What was found.
    #[must_use]
    pub fn of(found: &Found) -> Self {
        Self {
            machine: found.name.clone(),
            pid: found.pid,
            instance: found
                .outcome
                .as_ref()
                .ok()
                .and_then(|status| status.instance.clone()),
            says: found.outcome.as_ref().ok().map(|status| Says {
                role: status.role,
                standing: status.standing,
                epoch: status.epoch,
                position: status.position,
            }),
        }
    }

    /// Whether it serves the machine.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.says.is_some_and(|says| {
            says.role == Role::Primary
                && matches!(
                    says.standing,
                    Standing::Protected
                        | Standing::SwitchingOver
                        | Standing::Unprotected
                        | Standing::Joining
                )
        })
    }

    /// Whether it is a backup that stands so.
    #[must_use]
    pub fn is_backup(&self, standing: Standing) -> bool {
        self.says
            .is_some_and(|says| says.role == Role::Backup && says.standing == standing)
    }

    /// Its reign; 0 if it does not say.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.says.map_or(0, |says| says.epoch)
    }

    /// The same, whatever its guest has done meanwhile.
    #[must_use]
    pub fn stands_as(&self, other: &Self) -> bool {
        let rid = |report: &Self| {
            let says = report.says.map(|says| Says {
                position: 0,
                ..says
            });
            (report.machine.clone(), report.pid, says)
        };
        rid(self) == rid(other)
    }
}

/// A role that a host was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// The host.
    pub host: String,
    /// Which of the machine's assignments this is: each is carried out once.
    pub number: u64,
    /// When it was written, in milliseconds since 1970.
    pub since_ms: u64,
}

/// What becomes of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// It is to run.
    Starting {
        /// Where; none until a host was chosen.
        on: Option<Assigned>,
        /// Whatever the arbiter's record says: an operator knows that no process of it runs.
        cold: bool,
    },
    /// It runs, or did when it was last seen.
    Running,
    /// It is to be turned off.
    Stopping,
    /// It is off.
    Stopped,
    /// It could not be started.
    Failed {
        /// Why.
        why: String,
    },
}

impl Phase {
    /// The word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Starting { .. } => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed { .. } => "failed",
        }
    }

    /// Whether nothing of it is meant to run.
    #[must_use]
    pub fn is_off(&self) -> bool {
        matches!(self, Self::Stopped | Self::Failed { .. })
    }
}

/// A role that ended before it was of use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Where.
    pub host: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Why.
    pub why: String,
}

/// A machine of the site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Its name, which is the arbiter's, too.
    pub name: String,
    /// Drawn when it was created: one of the same name that is created later is another.
    pub instance: String,
    /// What it is.
    pub spec: Spec,
    /// Where its backups listen, on whichever host.
    pub port: u16,
    /// Whether it is to have a backup.
    pub protect: bool,
    /// What becomes of it.
    #[serde(flatten)]
    pub phase: Phase,
    /// The host that is to run its backup.
    pub backup: Option<Assigned>,
    /// Assignments so far.
    pub number: u64,
    /// The last failures, the oldest first.
    pub failures: Vec<Failure>,
    /// What there is to say about it.
    pub note: Option<String>,
    /// The arbiter's record that whoever ordered a cold start knew of: it is from that one or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_from: Option<Reign>,
    /// Its disk, if hosts have images of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskLife>,
}

impl Vm {
    /// The next assignment, to this host.
    pub fn assign(&mut self, host: &str, now_ms: u64) -> Assigned {
        self.number += 1;
        if let Some(disk) = &mut self.disk {
            disk.hosts.insert(host.to_owned());
        }
        Assigned {
            host: host.to_owned(),
            number: self.number,
            since_ms: now_ms,
        }
    }

    /// Remembers a failure.
    pub fn failed(&mut self, host: &str, now_ms: u64, why: &str) {
        if self.failures.len() >= FAILURES {
            self.failures.remove(0);
        }
        self.failures.push(Failure {
            host: host.to_owned(),
            at_ms: now_ms,
            why: why.to_owned(),
        });
    }

    /// Whether a host is left out for its failures.
    #[must_use]
    pub fn avoids(&self, host: &str, now_ms: u64) -> bool {
        let of = self.failures.iter().filter(|failure| failure.host == host);
        let (count, last) = of.fold((0, 0), |(count, last), failure| {
            (count + 1, failure.at_ms.max(last))
        });
        count > 0 && now_ms < last + BACK_OFF_MS * count
    }

    /// What a role of it takes of its host's memory, in MiB.
    #[must_use]
    pub fn takes_mib(&self) -> u64 {
        u64::from(self.spec.memory_mib) + OVERHEAD_MIB
    }

    /// The hosts that were given a role of it.
    pub fn assigned(&self) -> impl Iterator<Item = &str> {
        let starting = match &self.phase {
            Phase::Starting { on, .. } => on.as_ref(),
            _ => None,
        };
        let both = [starting, self.backup.as_ref()];
        both.into_iter().flatten().map(|on| on.host.as_str())
    }
}

/// What can be ordered of whoever serves a machine. (What is to be is not ordered but written into its record.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Its backup gets the machine.
    Switch,
}

/// An order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Drawn by whoever gave it; the answer is found by it.
    pub id: String,
    /// The machine.
    pub machine: String,
    /// What.
    pub verb: Verb,
}

/// What has become of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "text")]
pub enum Answer {
    /// An agent has taken it: nobody else will.
    Taken(String),
    /// It is done.
    Done(String),
    /// It was not.
    Failed(String),
}

/// A value and the revision at which it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept<T> {
    /// The value.
    pub value: T,
    /// etcd's revision: a write that compares it finds out whether it was the next.
    pub revision: i64,
}

/// Everything, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Site {
    /// The hosts whose leases run.
    pub hosts: BTreeMap<String, Kept<Host>>,
    /// The machines.
    pub vms: BTreeMap<String, Kept<Vm>>,
    /// Ports that are taken.
    pub ports: BTreeMap<u16, String>,
    /// Hosts that are to be empty.
    pub drains: BTreeMap<String, Kept<Drain>>,
    /// Orders that nobody has taken, by machine.
    pub orders: BTreeMap<String, Kept<Order>>,
    /// Answers, by order.
    pub answers: BTreeMap<String, Answer>,
    /// Machines that are deleted, and whose images are not all removed, by instance.
    pub deleted: BTreeMap<String, Kept<Deleted>>,
    /// The arbiter's records.
    pub records: BTreeMap<String, Record>,
    /// Machines whose record this version cannot read: nobody knows whether they may run.
    pub unreadable: BTreeSet<String>,
    /// The revision of the last placement; 0 if there was none.
    pub placements: i64,
    /// Keys whose values nobody who knows the site's secret has written.
    pub foreign: Vec<String>,
}

impl Site {
    /// Whether a process is of the machine that has its name now. One that was out of sight when that was deleted, and the name given again, is not; one that
    /// does not say is taken for one.
    #[must_use]
    pub fn is_of(&self, role: &RoleReport) -> bool {
        let vm = self.vms.get(&role.machine);
        let same = |instance: &String| vm.is_some_and(|vm| vm.value.instance == *instance);
        role.instance.as_ref().is_none_or(same)
    }

    /// A host that has a process of another machine of this name.
    #[must_use]
    pub fn stranger(&self, machine: &str) -> Option<&str> {
        let mut hosts = self.hosts.values().map(|host| &host.value);
        let has = |host: &&Host| host.roles_of(machine).any(|role| !self.is_of(role));
        hosts.find(has).map(|host| host.name.as_str())
    }

    /// Who serves a machine: of several that say so, the one of the latest reign.
    #[must_use]
    pub fn serving(&self, machine: &str) -> Option<(&Host, &RoleReport)> {
        let all = self.hosts.values().flat_map(|host| {
            let roles = host.value.roles_of(machine);
            roles.map(move |role| (&host.value, role))
        });
        all.filter(|(_, role)| role.serves() && self.is_of(role))
            .max_by_key(|(_, role)| role.epoch())
    }

    /// The host whose backup of this machine follows.
    #[must_use]
    pub fn following(&self, machine: &str) -> Option<&Host> {
        let mut hosts = self.hosts.values().map(|host| &host.value);
        hosts.find(|host| {
            host.roles_of(machine)
                .any(|role| role.is_backup(Standing::Following) && self.is_of(role))
        })
    }

    /// Whether a host is to be empty.
    #[must_use]
    pub fn is_drained(&self, host: &str) -> bool {
        self.drains.contains_key(host)
    }

    /// Whether any host has a process of this machine, or of another one that had its name.
    #[must_use]
    pub fn is_anywhere(&self, machine: &str) -> bool {
        let mut hosts = self.hosts.values();
        hosts.any(|host| host.value.roles_of(machine).next().is_some())
    }

    /// Whether nobody can claim this machine: it never ran, or it was turned off.
    #[must_use]
    pub fn is_ended(&self, machine: &str) -> bool {
        match self.records.get(machine) {
            Some(record) => record.state == State::Ended,
            None => !self.unreadable.contains(machine),
        }
    }

    /// Whether it ran and was turned off. One that is known to have run, and has no record, is not: the record was lost, not the machine.
    #[must_use]
    pub fn was_turned_off(&self, machine: &str) -> bool {
        self.records.contains_key(machine) && self.is_ended(machine)
    }

    /// Memory of a host that is spoken for, in MiB: by what runs there, and by what is to.
    #[must_use]
    pub fn committed_mib(&self, host: &Host) -> u64 {
        let of = |vm: &Vm| {
            let running = host.roles_of(&vm.name).count();
            let meant = vm.assigned().filter(|on| *on == host.name).count();
            vm.takes_mib() * running.max(meant) as u64
        };
        self.vms.values().map(|vm| of(&vm.value)).sum()
    }
}
