//! The placement rule: which host a role is given to. A function of the records and nothing else.
//!
//! **Fit** is a host that has a KVM (for a backup: the CPU model of the primary's host), memory to spare, the machine's port, a network or
//! an RDMA device if the machine needs one, no process of the machine and no role of it (anti-affinity; unless the machine may have both on
//! one host), for a primary with a disk that has run the newest image of it ([`disks`](super::disks)), where no role of it has failed just now, and that is not being drained. **Of those the least loaded**: the smallest sum of the share of memory that is spoken
//! for and of processes that want a CPU, for each CPU; of equal ones the first by name.
#![forbid(unsafe_code)]

use std::fmt;

use super::disks;
use super::record::{Host, Site, Vm};
use crate::config::Transport;
use crate::kvm::CpuModel;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub enum Role<'a> {
    /// A primary, on any host.
    Primary,
    /// A backup, of the primary on this host.
    Backup(&'a Host),
}

/// Why a host is not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// No KVM.
    NoKvm,
    /// Another CPU than the primary's.
    Cpu(CpuModel),
    /// Memory.
    Memory {
        /// What it has left, in MiB.
        free: u64,
        /// What is needed.
        needed: u64,
    },
    /// The machine's port is none of its.
    Port(u16),
    /// Guests have no network there.
    NoNetwork,
    /// No RDMA device.
    NoRdma,
    /// It has a part of the machine already.
    Has,
    /// A role of the machine failed there.
    Failed,
    /// It is to be empty.
    Drained,
    /// Its agent knows no disks.
    NoDisks,
    /// It has no image of the machine's disk, which has run.
    NoImage,
    /// Its image is not the newest, or nobody knows whether it is.
    Image(String),
    /// The machine is to go on with this host's image.
    NotChosen(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKvm => f.write_str("it has no usable KVM"),
            Self::Cpu(cpu) => write!(
                f,
                "its CPU is another ({} {:#x})",
                cpu.vendor, cpu.signature
            ),
            Self::Memory { free, needed } => {
                write!(f, "it has {free} MiB to spare, and {needed} are needed")
            }
            Self::Port(port) => write!(f, "port {port} is not among its agent's ports"),
            Self::NoNetwork => f.write_str("its agent has no bridge for guests"),
            Self::NoRdma => f.write_str("it has no RDMA device"),
            Self::Has => f.write_str("it has a part of this machine already"),
            Self::Failed => f.write_str("a role of this machine failed there just now"),
            Self::Drained => f.write_str("it is being drained"),
            Self::NoDisks => f.write_str("its agent is of a version without disks: upgrade it"),
            Self::NoImage => f.write_str("it has no image of the disk"),
            Self::Image(why) => write!(f, "its image of the disk: {why}"),
            Self::NotChosen(of) => write!(f, "the machine is to go on with the image of {of}"),
        }
    }
}

/// The host for a role of this machine.
///
/// # Errors
/// Why each host is not fit; empty if there is no host.
pub fn choose<'a>(
    site: &'a Site,
    vm: &Vm,
    role: Role<'_>,
    now_ms: u64,
) -> Result<&'a Host, Vec<(String, Unfit)>> {
    let mut unfit = Vec::new();
    let mut best: Option<(f64, &Host)> = None;
    for host in site.hosts.values().map(|host| &host.value) {
        if let Some(why) = judge(site, vm, role, host, now_ms) {
            unfit.push((host.name.clone(), why));
            continue;
        }
        let load = load(site, host);
        // In the order of names: of equals the first stays.
        if best.is_none_or(|(least, _)| load.total_cmp(&least).is_lt()) {
            best = Some((load, host));
        }
    }
    best.map(|(_, host)| host).ok_or(unfit)
}

/// How loaded a host is.
fn load(site: &Site, host: &Host) -> f64 {
    let memory = site.committed_mib(host) as f64 / host.memory_mib.max(1) as f64;
    let wanting = if host.load.is_finite() {
        host.load
    } else {
        0.0
    };
    memory + wanting.max(0.0)
}

fn judge(site: &Site, vm: &Vm, role: Role<'_>, host: &Host, now_ms: u64) -> Option<Unfit> {
    let Some(cpu) = &host.cpu else {
        return Some(Unfit::NoKvm);
    };
    if let Role::Backup(primary) = role
        && primary.cpu.as_ref() != Some(cpu)
    {
        return Some(Unfit::Cpu(cpu.clone()));
    }
    if site.is_drained(&host.name) {
        return Some(Unfit::Drained);
    }
    let has = host.roles_of(&vm.name).count() + vm.assigned().filter(|on| *on == host.name).count();
    let is_primarys = matches!(role, Role::Backup(primary) if primary.name == host.name);
    if (has > 0 || is_primarys) && !(vm.spec.same_host && is_primarys) {
        return Some(Unfit::Has);
    }
    if let Some(why) = disks::unfit(site, vm, host, matches!(role, Role::Primary)) {
        return Some(why);
    }
    let free = host.memory_mib.saturating_sub(site.committed_mib(host));
    let needed = vm.takes_mib();
    if free < needed {
        return Some(Unfit::Memory { free, needed });
    }
    if !host.ports.has(vm.port) {
        return Some(Unfit::Port(vm.port));
    }
    if vm.spec.network && !host.network {
        return Some(Unfit::NoNetwork);
    }
    if vm.spec.transport == Transport::Rdma && host.rdma.is_none() {
        return Some(Unfit::NoRdma);
    }
    vm.avoids(&host.name, now_ms).then_some(Unfit::Failed)
}

/// Why nothing could be placed, for people.
#[must_use]
pub fn explain(unfit: &[(String, Unfit)]) -> String {
    match unfit {
        [] => "no host's agent is there".to_owned(),
        _ => {
            let each: Vec<String> = unfit
                .iter()
                .map(|(host, why)| format!("{host}: {why}"))
                .collect();
            each.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::agent::record::{Kept, Phase, RoleReport};
    use crate::agent::tests::{host, put, role_of, site, vm};
    use crate::control::status::{Role as Kind, Standing};

    #[test]
    fn a_backup_is_never_on_its_primarys_host_unless_told() {
        let mut site = site(&["a"]);
        let mut machine = vm("kv");
        put(&mut site, machine.clone());
        let on = site.hosts["a"].value.clone();
        let unfit = choose(&site, &machine, Role::Backup(&on), 0).unwrap_err();
        assert_eq!(unfit, [("a".to_owned(), Unfit::Has)]);
        machine.spec.same_host = true;
        assert_eq!(
            choose(&site, &machine, Role::Backup(&on), 0).unwrap().name,
            "a"
        );
        // If another host is there, its load decides.
        let mut other = host("b");
        other.load = 9.0;
        site.hosts.insert(
            "b".into(),
            Kept {
                value: other,
                revision: 1,
            },
        );
        assert_eq!(
            choose(&site, &machine, Role::Backup(&on), 0).unwrap().name,
            "a"
        );
    }

    #[test]
    fn each_reason_is_told() {
        let refused = |change: fn(&mut Host, &mut Vm)| {
            let mut site = site(&["a", "b"]);
            let (mut there, mut machine) = (host("b"), vm("kv"));
            change(&mut there, &mut machine);
            site.hosts.insert(
                "b".into(),
                Kept {
                    value: there,
                    revision: 1,
                },
            );
            put(&mut site, machine.clone());
            let on = site.hosts["a"].value.clone();
            let unfit = choose(&site, &machine, Role::Backup(&on), 1000).unwrap_err();
            unfit[1].1.to_string()
        };
        for (change, word) in [
            ((|host, _| host.cpu = None) as fn(&mut Host, &mut Vm), "KVM"),
            (|host, _| host.cpu.as_mut().unwrap().signature = 7, "0x7"),
            (|host, _| host.memory_mib = 100, "100 MiB to spare, and 112"),
            (|_, vm| vm.port = 1, "port 1"),
            (|host, _| host.network = false, "bridge"),
            (|_, vm| vm.spec.transport = Transport::Rdma, "RDMA"),
            (
                |host, _| {
                    host.roles
                        .push(role_of("kv", Kind::Backup, Standing::Ended))
                },
                "already",
            ),
            (|_, vm| vm.failed("b", 900, "it"), "failed"),
        ] {
            let why = refused(change);
            assert!(why.contains(word), "{word}: {why}");
        }
    }

    #[test]
    fn a_host_that_failed_is_given_another_chance_later_each_time() {
        let mut machine = vm("kv");
        machine.failed("b", 1000, "it");
        assert!(
            machine.avoids("b", 1000) && machine.avoids("b", 5999) && !machine.avoids("b", 6000)
        );
        machine.failed("b", 10_000, "it");
        assert!(machine.avoids("b", 19_999) && !machine.avoids("b", 20_000));
        assert!(!machine.avoids("a", 1000));
    }

    /// A host of any kind.
    fn any_host() -> impl Strategy<Value = Host> {
        (
            0..6u8,
            prop::option::weighted(0.9, 1..3u32),
            prop::sample::select(vec![64u64, 128, 256, 4096]),
            any::<bool>(),
            0.0..4.0f64,
            prop::collection::vec((0..4u8, 0..3u8), 0..3),
        )
            .prop_map(|(name, cpu, memory, network, load, roles)| {
                let mut made = host(&format!("h{name}"));
                made.cpu = cpu.map(|signature| CpuModel {
                    signature,
                    ..made.cpu.clone().unwrap()
                });
                made.memory_mib = memory;
                made.network = network;
                made.load = load;
                made.roles = roles
                    .into_iter()
                    .map(|(machine, kind)| match kind {
                        0 => role_of(&format!("m{machine}"), Kind::Primary, Standing::Unprotected),
                        1 => role_of(&format!("m{machine}"), Kind::Backup, Standing::Following),
                        _ => RoleReport {
                            machine: format!("m{machine}"),
                            pid: 1,
                            instance: None,
                            says: None,
                        },
                    })
                    .collect();
                made
            })
    }

    fn any_site() -> impl Strategy<Value = Site> {
        (
            prop::collection::vec(any_host(), 0..6),
            prop::collection::vec((0..4u8, prop::option::of(0..6u8), any::<bool>()), 0..4),
        )
            .prop_map(|(hosts, vms)| {
                let mut site = Site::default();
                for value in hosts {
                    site.hosts
                        .insert(value.name.clone(), Kept { value, revision: 1 });
                }
                for (name, on, same_host) in vms {
                    let mut made = vm(&format!("m{name}"));
                    made.phase = Phase::Running;
                    made.spec.same_host = same_host;
                    made.backup = on.map(|on| made.assign(&format!("h{on}"), 0));
                    put(&mut site, made);
                }
                site
            })
    }

    proptest! {
        /// Whatever the records say: a host that is chosen is fit, no fit one is less loaded, and where none is chosen none is fit.
        #[test]
        fn what_is_chosen_is_fit_and_least_loaded(site in any_site(), backup in any::<bool>(), which in 0..6usize) {
            let primary = site.hosts.values().nth(which).map(|host| host.value.clone());
            for machine in site.vms.values().map(|vm| &vm.value) {
                let role = match &primary {
                    Some(primary) if backup => Role::Backup(primary),
                    _ => Role::Primary,
                };
                let fit = |host: &Host| {
                    let room = host.memory_mib >= site.committed_mib(host) + machine.takes_mib();
                    let alike = match role {
                        Role::Backup(primary) => primary.cpu == host.cpu,
                        Role::Primary => true,
                    };
                    let own = matches!(role, Role::Backup(primary) if primary.name == host.name);
                    let apart = host.roles_of(&machine.name).next().is_none()
                        && machine.assigned().all(|on| on != host.name)
                        && !own;
                    host.cpu.is_some() && alike && room && (!machine.spec.network || host.network)
                        && (apart || own && machine.spec.same_host)
                };
                match choose(&site, machine, role, 0) {
                    Ok(chosen) => {
                        prop_assert!(fit(chosen));
                        for other in site.hosts.values().map(|host| &host.value) {
                            prop_assert!(!fit(other) || load(&site, chosen) <= load(&site, other));
                        }
                    }
                    Err(unfit) => {
                        prop_assert_eq!(unfit.len(), site.hosts.len());
                        prop_assert!(site.hosts.values().all(|host| !fit(&host.value)));
                    }
                }
            }
        }
    }
}
