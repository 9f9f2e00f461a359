//! What an agent does next, as a function of what it sees: the site's records, and its own host.
//!
//! ```text
//!   create, start ──▶ Starting ──an agent chooses a host──▶ Starting on H ──H's agent starts a primary──▶ Running
//!                        ▲  └────────── nobody is fit: it waits ──────────┘│ it ended: another host, or, if cold, Failed
//!                        │                                                 ▼
//!                     Stopped ◀── the record says ended, nobody has a part of it ── Stopping ◀── stop
//!
//!   Running, served by H without a backup ──H's agent chooses another host B──▶ B's agent starts a backup ──▶ H's recruiter finds it
//! ```
//! **Facts are what roles say, and come first**; what is written is what should be. Who serves a machine is what its roles and the arbiter
//! have made of it: nothing here gives or takes that. A lease that has run out lets a role be placed elsewhere; if the host lives all the same,
//! it is the arbiter that lets one primary start, and one backup at a time is entitled.
//!
//! **A host that is drained** is left by what is there: a machine that it serves has a backup elsewhere (for as long as that takes, one that
//! is not to be protected, too) and is switched over to it; a backup on it is replaced by another one while it protects. Replication by
//! checkpoints knows neither: such a machine is taken over by its backup, and such a backup ends once another host can have one.
//!
//! Only the agent of the host that serves a machine places its backup, since it alone sees at first hand that there is none.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::disks;
use super::placement::{self, Role as Wanted};
use super::record::{Host, Kept, Phase, RoleReport, Site, Vm};
use crate::control::status::{Role, Standing};
use crate::intervals::Replication;
use crate::protocol::{Cold, Record, State};

/// How long a backup may wait for its primary before another host is tried, in milliseconds. A primary looks every 50 ms, and a second for
/// each host that does not answer.
const JOINS_WITHIN_MS: u64 = 60_000;

/// How many hosts are tried for a start.
const STARTS: usize = 5;

/// A role that this agent started, and that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Of which assignment it was.
    pub number: u64,
    /// How it ended.
    pub why: String,
}

/// What an agent sees of its own host.
#[derive(Clone, Debug, Default)]
pub struct Local {
    /// The host's name.
    pub me: String,
    /// Milliseconds since 1970.
    pub now_ms: u64,
    /// Whether it has seen the site for long enough: who is not there now is away.
    pub settled: bool,
    /// Processes here, by machine: those that say something, and those that do not.
    pub held: BTreeMap<String, usize>,
    /// Roles that are over, by machine.
    pub ended: BTreeMap<String, Ended>,
    /// What the processes that serve here were told of places where a backup may listen.
    pub told: BTreeSet<(u32, SocketAddr)>,
}

/// What is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A primary without a backup.
    Primary {
        /// What its operator has said of the arbiter's record.
        cold: Cold,
    },
    /// A backup.
    Backup,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Swap a machine's record from the revision that was seen.
    Write {
        /// The new one.
        vm: Box<Vm>,
        /// The old one's.
        revision: i64,
        /// It places a role: only if nothing else was placed since.
        places: bool,
    },
    /// Start a role here.
    Start {
        /// Of this machine.
        machine: String,
        /// What.
        what: Start,
        /// For this assignment.
        number: u64,
    },
    /// End a backup here that nobody needs.
    EndBackup {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
    },
    /// Turn a machine off that is served here.
    PowerOff {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
    },
    /// Have a machine that is served here go on with its backup.
    Switch {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
    },
    /// Have it taken over by its backup, as if this host were lost: it is replicated by checkpoints, which know no switch-over.
    Fail {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
    },
    /// Have a machine that is served here take another backup in its backup's place.
    Migrate {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
        /// Where the new one listens.
        place: SocketAddr,
    },
    /// Tell a process that serves here where a backup may listen.
    Tell {
        /// The machine.
        machine: String,
        /// The process.
        pid: u32,
        /// Where.
        place: SocketAddr,
    },
}

/// Everything to do now.
#[must_use]
pub fn plan(site: &Site, local: &Local) -> Vec<Act> {
    let mut acts = Vec::new();
    for vm in site.vms.values() {
        Planner {
            site,
            local,
            vm,
            acts: &mut acts,
        }
        .machine();
    }
    acts
}

/// One machine.
struct Planner<'a> {
    site: &'a Site,
    local: &'a Local,
    vm: &'a Kept<Vm>,
    acts: &'a mut Vec<Act>,
}

impl Planner<'_> {
    fn machine(&mut self) {
        self.end_useless_backups();
        self.make_room();
        match &self.vm.value.phase {
            Phase::Stopped | Phase::Failed { .. } => {}
            Phase::Stopping => self.stop(),
            Phase::Starting { on: None, .. } => self.place_primary(),
            Phase::Starting { on: Some(on), cold } => {
                let (host, number, cold) = (on.host.clone(), on.number, *cold);
                self.start(&host, number, cold);
            }
            Phase::Running => self.run(),
        }
    }

    fn me(&self) -> Option<&Host> {
        self.site.hosts.get(&self.local.me).map(|host| &host.value)
    }

    fn roles_here(&self) -> Vec<RoleReport> {
        let name = self.vm.value.name.clone();
        let here = self.me().into_iter().flat_map(|host| host.roles_of(&name));
        here.cloned().collect()
    }

    fn processes_here(&self) -> usize {
        let held = self.local.held.get(&self.vm.value.name).copied();
        held.unwrap_or(0).max(self.roles_here().len())
    }

    /// A host whose agent is away for longer than a moment.
    fn is_away(&self, host: &str) -> bool {
        self.local.settled && !self.site.hosts.contains_key(host)
    }

    /// Whether it is to have a backup: so that it can leave a host, for a while, even if it is not to be protected.
    fn is_to_be_followed(&self) -> bool {
        let serving = self.site.serving(&self.vm.value.name);
        self.vm.value.protect || serving.is_some_and(|(host, _)| self.site.is_drained(&host.name))
    }

    /// A host that is not to be waited for.
    fn is_gone(&self, host: &str) -> bool {
        self.is_away(host) || self.site.is_drained(host)
    }

    fn is_assigned_backup_here(&self) -> bool {
        let vm = &self.vm.value;
        let backup = vm.backup.as_ref();
        vm.phase == Phase::Running
            && self.is_to_be_followed()
            && backup.is_some_and(|backup| backup.host == self.local.me)
            && !self.site.is_drained(&self.local.me)
    }

    /// Those that wait though no primary is to come, and one that follows a machine that is to have none.
    fn end_useless_backups(&mut self) {
        let vm = &self.vm.value;
        let unwanted = vm.phase == Phase::Running && !self.is_to_be_followed();
        for role in self.roles_here() {
            let ours = self.site.is_of(&role);
            let waits =
                role.is_backup(Standing::Waiting) && !(ours && self.is_assigned_backup_here());
            if waits || unwanted && ours && role.is_backup(Standing::Following) {
                self.acts.push(Act::EndBackup {
                    machine: self.vm.value.name.clone(),
                    pid: role.pid,
                });
            }
        }
    }

    /// A backup on a host that is drained and that no other can replace while it follows, as the machine is replicated by checkpoints: it
    /// ends as soon as another host can have one.
    fn make_room(&mut self) {
        let (site, vm) = (self.site, &self.vm.value);
        if !site.is_drained(&self.local.me) || vm.spec.replicate != Replication::Checkpoint {
            return;
        }
        let Some((primary, _)) = site.serving(&vm.name) else {
            return;
        };
        let mut free = vm.clone();
        free.backup = None;
        let wanted = Wanted::Backup(primary);
        if placement::choose(site, &free, wanted, self.local.now_ms).is_err() {
            return;
        }
        for role in self.roles_here() {
            if role.is_backup(Standing::Following) && site.is_of(&role) {
                self.acts.push(Act::EndBackup {
                    machine: vm.name.clone(),
                    pid: role.pid,
                });
            }
        }
    }

    fn write(&mut self, places: bool, change: impl FnOnce(&mut Vm)) {
        let mut vm = Box::new(self.vm.value.clone());
        change(&mut vm);
        if *vm != self.vm.value {
            self.acts.push(Act::Write {
                vm,
                revision: self.vm.revision,
                places,
            });
        }
    }

    /// Writes why nothing can be placed, once.
    fn note(&mut self, note: String) {
        self.write(false, |vm| vm.note = Some(note));
    }

    fn stop(&mut self) {
        let (site, name) = (self.site, &self.vm.value.name);
        if let Some((host, role)) = site.serving(name) {
            if host.name == self.local.me {
                self.acts.push(Act::PowerOff {
                    machine: name.clone(),
                    pid: role.pid,
                });
            }
        } else if self.local.settled
            && !site.is_anywhere(name)
            && self.processes_here() == 0
            && site.is_ended(name)
        {
            self.write(false, |vm| {
                vm.phase = Phase::Stopped;
                vm.backup = None;
                vm.note = None;
            });
        } else if let Some(host) = site.stranger(name) {
            self.note(format!(
                "host {host} has a process of a machine of this name that was deleted: end it there (doppel status {name}, doppel power-off {name})"
            ));
        }
    }

    fn place_primary(&mut self) {
        if !self.local.settled {
            return;
        }
        let (vm, now) = (&self.vm.value, self.local.now_ms);
        match placement::choose(self.site, vm, Wanted::Primary, now) {
            Ok(host) => {
                let host = host.name.clone();
                self.write(true, |vm| {
                    let on = Some(vm.assign(&host, now));
                    if let Phase::Starting { on: to, .. } = &mut vm.phase {
                        *to = on;
                    }
                    vm.note = None;
                });
            }
            Err(unfit) => self.note(format!(
                "no host can run it: {}{}",
                placement::explain(&unfit),
                disks::advice(self.site, vm, &unfit)
            )),
        }
    }

    fn start(&mut self, host: &str, number: u64, cold: bool) {
        let name = &self.vm.value.name;
        if let Some((serving, _)) = self.site.serving(name) {
            // A host that was given up lives, and has started it.
            if serving.name == self.local.me {
                self.write(false, |vm| {
                    vm.phase = Phase::Running;
                    vm.note = None;
                    if let Some(disk) = &mut vm.disk {
                        disk.of = None;
                    }
                });
            }
            return;
        }
        if host != self.local.me {
            // A cold start is no arbiter's to decide: two could succeed. It waits for its host.
            if !cold && self.is_away(host) {
                self.write(false, |vm| {
                    vm.phase = Phase::Starting {
                        on: None,
                        cold: false,
                    };
                });
            }
            return;
        }
        match self.local.ended.get(name) {
            Some(ended) if ended.number == number => {
                let why = ended.why.clone();
                if cold {
                    self.write(false, |vm| vm.phase = Phase::Failed { why });
                } else {
                    self.give_up_start(host, &why);
                }
            }
            _ if self.processes_here() > 0 => {}
            // Whoever ordered it knew of no process. One that is seen after all may be about to serve, and a cold start would not be stopped by that.
            _ if cold && self.site.is_anywhere(name) => self.note(
                "a process of it was found: it is not started anew, doppel vm show names the host"
                    .to_owned(),
            ),
            _ => {
                let machine = name.clone();
                let cold = self.cold_from(cold);
                self.acts.push(Act::Start {
                    machine,
                    what: Start::Primary { cold },
                    number,
                });
            }
        }
    }

    /// The record that a cold start is from: that which its operator knew of, or the one that is seen now, if a program that named none has ordered it.
    /// Whatever comes between this look and the start, it is from that one or none.
    fn cold_from(&self, cold: bool) -> Cold {
        let vm = &self.vm.value;
        let record = self.site.records.get(&vm.name);
        let seen = record.filter(|record| record.state != State::Ended);
        match vm.cold_from.or(seen.map(Record::reign)) {
            Some(reign) if cold => Cold::From(reign),
            None if cold && self.site.unreadable.contains(&vm.name) => Cold::Whatever,
            _ => Cold::No,
        }
    }

    /// Another host may start it.
    fn give_up_start(&mut self, host: &str, why: &str) {
        let now = self.local.now_ms;
        self.write(false, |vm| {
            vm.failed(host, now, why);
            vm.phase = if vm.failures.len() >= STARTS {
                let why = why.to_owned();
                Phase::Failed { why }
            } else {
                Phase::Starting {
                    on: None,
                    cold: false,
                }
            };
            vm.note = Some(format!("on {host}: {why}"));
        });
    }

    fn run(&mut self) {
        let (site, name) = (self.site, &self.vm.value.name);
        let Some((host, role)) = site.serving(name) else {
            // Nobody serves it. A guest that turned itself off is over; anything else is an operator's to judge.
            if self.local.settled
                && site.was_turned_off(name)
                && !site.is_anywhere(name)
                && self.processes_here() == 0
            {
                self.write(false, |vm| {
                    vm.phase = Phase::Stopped;
                    vm.backup = None;
                    vm.note = Some("the guest has turned itself off".to_owned());
                });
            }
            return;
        };
        if host.name == self.local.me {
            self.tell_places(role.pid);
            self.keep_protected(host, role);
        }
        if self.is_assigned_backup_here() {
            self.have_backup_here();
        }
    }

    /// Where backups of it may listen: on every host but this one.
    fn tell_places(&mut self, pid: u32) {
        let vm = &self.vm.value;
        for host in self.site.hosts.values().map(|host| &host.value) {
            let place = host.place(vm.port);
            let apart = host.name != self.local.me || vm.spec.same_host;
            if apart && host.ports.has(vm.port) && !self.local.told.contains(&(pid, place)) {
                self.acts.push(Act::Tell {
                    machine: vm.name.clone(),
                    pid,
                    place,
                });
            }
        }
    }

    /// At the host that serves it: a backup is somewhere, or is to be.
    fn keep_protected(&mut self, host: &Host, role: &RoleReport) {
        let (vm, now) = (&self.vm.value, self.local.now_ms);
        if !self.is_to_be_followed() {
            self.write(false, |vm| vm.backup = None);
            return;
        }
        if !role
            .says
            .is_some_and(|says| says.standing == Standing::Unprotected)
        {
            self.keep_followed(host, role);
            return;
        }
        let stays = vm.backup.as_ref().is_some_and(|on| {
            let here = on.host == host.name && !vm.spec.same_host;
            let late = now.saturating_sub(on.since_ms) > JOINS_WITHIN_MS;
            !here && !late && !self.is_gone(&on.host)
        });
        if stays || !self.local.settled {
            return;
        }
        // The host that it is taken from is not to be chosen for having it.
        let mut free = vm.clone();
        if let Some(late) = free.backup.take()
            && late.host != host.name
            && !self.is_gone(&late.host)
        {
            free.failed(&late.host, now, "its backup did not join");
        }
        match placement::choose(self.site, &free, Wanted::Backup(host), now) {
            Ok(chosen) => {
                let chosen = chosen.name.clone();
                self.write(true, |vm| {
                    vm.failures = free.failures;
                    vm.backup = Some(vm.assign(&chosen, now));
                    vm.note = None;
                });
            }
            Err(unfit) => self.note(format!(
                "no host can take its backup: {}",
                placement::explain(&unfit)
            )),
        }
    }

    /// At the host that serves it: it has a backup, or is taking one in.
    fn keep_followed(&mut self, host: &Host, role: &RoleReport) {
        let (site, vm, now) = (self.site, &self.vm.value, self.local.now_ms);
        let Some(there) = site.following(&vm.name).map(|host| host.name.clone()) else {
            return;
        };
        let can_be_moved = role
            .says
            .is_some_and(|says| says.standing == Standing::Protected);
        if site.is_drained(&there) {
            if can_be_moved && vm.spec.replicate != Replication::Checkpoint {
                self.replace_backup(host, role, &there);
            }
        } else if vm.backup.as_ref().is_none_or(|on| on.host != there) {
            // Whoever follows has the assignment.
            self.write(false, |vm| vm.backup = Some(vm.assign(&there, now)));
        } else if site.is_drained(&host.name) && can_be_moved {
            let (machine, pid) = (vm.name.clone(), role.pid);
            self.acts.push(match vm.spec.replicate {
                Replication::Replay => Act::Switch { machine, pid },
                Replication::Checkpoint => Act::Fail { machine, pid },
            });
        }
    }

    /// Its backup is on a host that is drained: another host gets one, which takes its place.
    fn replace_backup(&mut self, host: &Host, role: &RoleReport, from: &str) {
        let (site, vm, now) = (self.site, &self.vm.value, self.local.now_ms);
        let next = vm
            .backup
            .as_ref()
            .filter(|on| on.host != from && !self.is_gone(&on.host));
        let there = next.and_then(|on| Some((on, &site.hosts.get(&on.host)?.value)));
        if let Some((on, there)) = there {
            let waits = there
                .roles_of(&vm.name)
                .any(|role| role.is_backup(Standing::Waiting) && site.is_of(role));
            let is_copied = !waits
                && there
                    .roles_of(&vm.name)
                    .any(|role| role.says.is_some_and(|says| says.role == Role::Backup));
            let late = now.saturating_sub(on.since_ms) > JOINS_WITHIN_MS;
            if waits && !late {
                self.acts.push(Act::Migrate {
                    machine: vm.name.clone(),
                    pid: role.pid,
                    place: there.place(vm.port),
                });
            }
            if is_copied || !late {
                return;
            }
        }
        if !self.local.settled {
            return;
        }
        let mut free = vm.clone();
        free.backup = None;
        if let Some(late) = next {
            free.failed(&late.host, now, "its backup did not take the other's place");
        }
        match placement::choose(site, &free, Wanted::Backup(host), now) {
            Ok(chosen) => {
                let chosen = chosen.name.clone();
                self.write(true, |vm| {
                    vm.failures = free.failures;
                    vm.backup = Some(vm.assign(&chosen, now));
                    vm.note = None;
                });
            }
            Err(unfit) => {
                let why = placement::explain(&unfit);
                let from = from.to_owned();
                self.write(false, |vm| {
                    if vm.backup.as_ref().is_none_or(|on| on.host != from) {
                        vm.backup = Some(vm.assign(&from, now));
                        vm.failures = free.failures;
                    }
                    vm.note = Some(format!(
                        "its backup stays on {from}, which is being drained: {why}"
                    ));
                });
            }
        }
    }

    /// At the host that is to have its backup.
    fn have_backup_here(&mut self) {
        let Some(on) = self.vm.value.backup.clone() else {
            return;
        };
        let (name, now) = (self.vm.value.name.clone(), self.local.now_ms);
        if let Some(ended) = self.local.ended.get(&name)
            && ended.number == on.number
        {
            let why = ended.why.clone();
            self.write(false, |vm| {
                vm.failed(&on.host, now, &why);
                vm.backup = None;
            });
            return;
        }
        let mut roles = self.roles_here();
        roles.retain(|role| self.site.is_of(role));
        let serves = roles.iter().filter(|role| role.serves()).count();
        let has_backup = roles
            .iter()
            .any(|role| role.says.is_some_and(|says| says.role == Role::Backup));
        let may = serves == 0 || self.vm.value.spec.same_host;
        if may && !has_backup && self.processes_here() == serves {
            self.acts.push(Act::Start {
                machine: name,
                what: Start::Backup,
                number: on.number,
            });
        }
    }
}

#[cfg(test)]
mod tests;
