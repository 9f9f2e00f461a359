//! What `doppel vm` does: it reads the site's records, changes what a machine is to be, and gives orders. From any host that has the
//! agent's configuration and the site's secret.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::config::{AgentConfig, AgentConfigError};
use super::disks::{self, Deleted, DiskLife};
use super::placement::{self, Role as Wanted};
use super::record::{Answer, Drain, Host, Order, Phase, Ports, RoleReport, Site, Verb, Vm};
use super::spec::{Spec, SpecError};
use super::store::{Change, Key, Store};
use crate::arbiter::{EtcdError, random_identity};
use crate::control::status::{Role, Standing};
use crate::handshake::{Secret, SecretError};
use crate::protocol::record::{Record, State};

/// How often a change is tried that others keep overtaking.
const TRIES: usize = 16;

/// Between two looks for what has come of something.
const LOOK: Duration = Duration::from_millis(100);

/// What keeps a verb from being done.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The agent's configuration.
    #[error(transparent)]
    Config(#[from] AgentConfigError),
    /// The site's secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A machine of this name.
    #[error("there is a machine {0:?} already: doppel vm show {0}")]
    Exists(String),
    /// No machine of this name.
    #[error("there is no machine {0:?} at this site: doppel vm list shows them all")]
    Unknown(String),
    /// No host of this name.
    #[error(
        "there is no host {0:?} at this site, or its agent is away: doppel vm hosts shows them all"
    )]
    UnknownHost(String),
    /// Nobody to go to.
    #[error(
        "host {0} is drained, and there is no other host that takes machines: what it serves stays there, and is turned off with it"
    )]
    Alone(String),
    /// No port for it.
    #[error(
        "no port is free for another machine: give the agents more (`ports`), or delete a machine"
    )]
    NoPort,
    /// It cannot be done to a machine that is as this one is.
    #[error("machine {name} is {phase}: {advice}")]
    Phase {
        /// The machine.
        name: String,
        /// How it is.
        phase: &'static str,
        /// What to do first.
        advice: String,
    },
    /// A machine that has no image to go on with.
    #[error("machine {0} has no disk with an image on each host: leave out --disk-of")]
    NoDisk(String),
    /// A host that has no image of it.
    #[error(
        "host {host} tells of no image of machine {name}'s disk, or its agent is away: doppel vm show {name} names those that do"
    )]
    NoImage {
        /// The machine.
        name: String,
        /// The host.
        host: String,
    },
    /// Others kept changing the record.
    #[error("the record of machine {0} kept changing: try again")]
    Busy(String),
    /// Another order is under way.
    #[error("another order for machine {0} is under way: try again when it is done")]
    Ordered(String),
    /// Nobody took the order.
    #[error("nobody has taken the order within {} s, and it is withdrawn: no agent serves machine {name} (doppel vm show {name})", within.as_secs())]
    NotTaken {
        /// The machine.
        name: String,
        /// How long that was waited for.
        within: Duration,
    },
    /// It was taken and not answered.
    #[error("the order for machine {name} was taken ({by}), and has no answer within {} s: see doppel vm show {name}", within.as_secs())]
    NoAnswer {
        /// The machine.
        name: String,
        /// By whom.
        by: String,
        /// How long that was waited for.
        within: Duration,
    },
    /// It was not done.
    #[error("{0}")]
    Refused(String),
    /// The host's random source.
    #[error("cannot draw an identity: {0}")]
    Random(std::io::Error),
}

/// A way to the site.
#[derive(Debug)]
pub struct Access {
    store: Store,
}

impl Access {
    /// By this configuration's etcd and secret.
    ///
    /// # Errors
    /// If either is none.
    pub fn open(config: &AgentConfig) -> Result<Self, SiteError> {
        let secret = Secret::read(&config.secret)?;
        let store = Store::open(config.cluster()?, secret)?;
        Ok(Self { store })
    }

    /// The records, for those who only read on.
    #[must_use]
    pub fn into_store(self) -> Store {
        self.store
    }

    /// Everything.
    ///
    /// # Errors
    /// If etcd is away.
    pub fn read(&self) -> Result<Site, SiteError> {
        Ok(self.store.read()?)
    }

    /// Writes a new machine's record, and takes a port for it.
    ///
    /// # Errors
    /// If the specification is refused, the name is taken, or no port is free.
    pub fn create(
        &self,
        name: &str,
        spec: &Spec,
        protect: bool,
        start: bool,
    ) -> Result<Vm, SiteError> {
        spec.check(name)?;
        let instance = random_identity().map_err(SiteError::Random)?.to_string();
        for _ in 0..TRIES {
            let site = self.read()?;
            if let Some(found) = site.vms.get(name) {
                // This very attempt, whose answer got lost.
                return match found.value.instance == instance {
                    true => Ok(found.value.clone()),
                    false => Err(SiteError::Exists(name.to_owned())),
                };
            }
            let port = free_port(&site).ok_or(SiteError::NoPort)?;
            let born = site.records.get(name).map_or(0, |found| found.epoch.0);
            let has_images = spec.disk.as_ref().is_some_and(|disk| disk.has_images());
            let vm = Vm {
                name: name.to_owned(),
                instance: instance.clone(),
                spec: spec.clone(),
                port,
                protect,
                phase: match start {
                    true => Phase::Starting {
                        on: None,
                        cold: false,
                    },
                    false => Phase::Stopped,
                },
                backup: None,
                number: 0,
                failures: Vec::new(),
                note: None,
                cold_from: None,
                disk: has_images.then(|| DiskLife {
                    born,
                    ..DiskLife::default()
                }),
            };
            let (key, taken) = (Key::Vm(name), Key::Port(port));
            let change = Change::new()
                .only_if(&key, 0)
                .only_if(&taken, 0)
                .put_vm(&self.store, &vm)
                .put(&self.store, &taken, &name, None);
            if self.store.change(&change)? {
                return Ok(vm);
            }
        }
        Err(SiteError::Busy(name.to_owned()))
    }

    /// Changes what a machine is to be.
    ///
    /// # Errors
    /// If there is none of this name, or `change` refuses.
    pub fn change(
        &self,
        name: &str,
        change: impl Fn(&Site, &mut Vm) -> Result<(), SiteError>,
    ) -> Result<Vm, SiteError> {
        for _ in 0..TRIES {
            let site = self.read()?;
            let found = site.vms.get(name);
            let found = found.ok_or_else(|| SiteError::Unknown(name.to_owned()))?;
            let mut vm = found.value.clone();
            change(&site, &mut vm)?;
            if vm == found.value {
                return Ok(vm);
            }
            let write = Change::new()
                .only_if(&Key::Vm(name), found.revision)
                .put_vm(&self.store, &vm);
            if self.store.change(&write)? {
                return Ok(vm);
            }
        }
        Err(SiteError::Busy(name.to_owned()))
    }

    /// Takes a machine's record away, gives its port back, and has its hosts remove their images of its disk: which machine it was, if any
    /// may have one.
    ///
    /// # Errors
    /// If it is not off.
    pub fn delete(&self, name: &str) -> Result<Option<Deleted>, SiteError> {
        for _ in 0..TRIES {
            let site = self.read()?;
            let found = site.vms.get(name);
            let found = found.ok_or_else(|| SiteError::Unknown(name.to_owned()))?;
            deletable(&site, &found.value)?;
            let key = Key::Vm(name);
            let mut change = Change::new()
                .only_if(&key, found.revision)
                .delete(&key)
                .delete(&Key::Port(found.value.port));
            let deleted = deleted(&found.value);
            if let Some(deleted) = &deleted {
                let key = Key::Deleted(&deleted.instance);
                change = change.put(&self.store, &key, deleted, None);
            }
            if self.store.change(&change)? {
                return Ok(deleted);
            }
        }
        Err(SiteError::Busy(name.to_owned()))
    }

    /// Has a host emptied, and given nothing; until it has booted anew, or else until [`Access::undrain`].
    ///
    /// # Errors
    /// If it is no member.
    pub fn drain(&self, name: &str, until_boot: bool) -> Result<(), SiteError> {
        for _ in 0..TRIES {
            let site = self.read()?;
            let host = site.hosts.get(name);
            let host = &host
                .ok_or_else(|| SiteError::UnknownHost(name.to_owned()))?
                .value;
            let before = site.drains.get(name);
            let boot = until_boot.then(|| host.boot.clone());
            // One that an operator wants outlives a shutdown.
            if before.is_some_and(|kept| kept.value.boot == boot || kept.value.boot.is_none()) {
                return Ok(());
            }
            let drain = Drain {
                host: name.to_owned(),
                since_ms: super::unix_ms(),
                boot,
            };
            let key = Key::Drain(name);
            let change = Change::new()
                .only_if(&key, before.map_or(0, |kept| kept.revision))
                .put(&self.store, &key, &drain, None);
            if self.store.change(&change)? {
                return Ok(());
            }
        }
        Err(SiteError::Busy(name.to_owned()))
    }

    /// Lets a host have machines again.
    ///
    /// # Errors
    /// If there is no host of this name.
    pub fn undrain(&self, name: &str) -> Result<(), SiteError> {
        let site = self.read()?;
        if !site.is_drained(name) && !site.hosts.contains_key(name) {
            return Err(SiteError::UnknownHost(name.to_owned()));
        }
        self.store
            .change(&Change::new().delete(&Key::Drain(name)))?;
        Ok(())
    }

    /// Gives an order to whoever serves a machine, and waits for what comes of it.
    ///
    /// # Errors
    /// Why it was not done, or that nobody knows within this time.
    pub fn order(&self, name: &str, verb: Verb, within: Duration) -> Result<String, SiteError> {
        let site = self.read()?;
        if !site.vms.contains_key(name) {
            return Err(SiteError::Unknown(name.to_owned()));
        }
        let id = random_identity().map_err(SiteError::Random)?.to_string();
        let order = Order {
            id: id.clone(),
            machine: name.to_owned(),
            verb,
        };
        // It goes with its lease if this process dies.
        let lease = self.store.lease(within + Duration::from_secs(5))?;
        let key = Key::Order(name);
        let change = Change::new()
            .only_if(&key, 0)
            .put(&self.store, &key, &order, Some(lease));
        if !self.store.change(&change)? && !is_given(&self.read()?, name, &id) {
            return Err(SiteError::Ordered(name.to_owned()));
        }
        let until = Instant::now() + within;
        loop {
            let site = self.read()?;
            let taken = match site.answers.get(&id) {
                Some(Answer::Done(text)) => return Ok(text.clone()),
                Some(Answer::Failed(text)) => return Err(SiteError::Refused(text.clone())),
                Some(Answer::Taken(by)) => Some(by.clone()),
                None => None,
            };
            if Instant::now() < until {
                std::thread::sleep(LOOK);
                continue;
            }
            let name = name.to_owned();
            if let Some(by) = taken {
                return Err(SiteError::NoAnswer { name, by, within });
            }
            // If somebody takes it just now, the answer is looked for once more.
            let order = site.orders.get(&name).filter(|order| order.value.id == id);
            let Some(order) = order else { continue };
            let key = Key::Order(&name);
            let withdraw = Change::new().only_if(&key, order.revision).delete(&key);
            if self.store.change(&withdraw)? {
                return Err(SiteError::NotTaken { name, within });
            }
        }
    }

    /// Looks until the site is as it should be; false if it is not within this time.
    ///
    /// # Errors
    /// If etcd is away, or what `is_there` says instead.
    pub fn until(
        &self,
        within: Duration,
        mut is_there: impl FnMut(&Site) -> Result<bool, SiteError>,
    ) -> Result<bool, SiteError> {
        let until = Instant::now() + within;
        loop {
            if is_there(&self.read()?)? {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Whether this order is there all the same, or was taken already: an attempt to give it whose answer got lost.
fn is_given(site: &Site, name: &str, id: &str) -> bool {
    let waits = site
        .orders
        .get(name)
        .is_some_and(|order| order.value.id == id);
    waits || site.answers.contains_key(id)
}

/// The first port that every host has and no machine; if no host is there, of the usual ones.
fn free_port(site: &Site) -> Option<u16> {
    let usual = Ports {
        first: 7700,
        last: 7799,
    };
    let all = site.hosts.values().map(|host| host.value.ports);
    let common = all
        .reduce(|one, other| Ports {
            first: one.first.max(other.first),
            last: one.last.min(other.last),
        })
        .unwrap_or(usual);
    (common.first..=common.last).find(|port| !site.ports.contains_key(port))
}

fn in_phase(vm: &Vm, advice: String) -> SiteError {
    SiteError::Phase {
        name: vm.name.clone(),
        phase: vm.phase.word(),
        advice,
    }
}

/// Has a machine started.
///
/// # Errors
/// If it runs, or may run for all that is known and `cold` does not say that it does not; if it is to go on with the image of a host, `of`, that
/// has none.
pub fn start(site: &Site, vm: &mut Vm, cold: bool, of: Option<&str>) -> Result<(), SiteError> {
    let name = &vm.name;
    if let Some(of) = of {
        if vm.disk.is_none() {
            return Err(SiteError::NoDisk(name.clone()));
        }
        if disks::images(site, vm).all(|(host, _)| host.name != of) {
            return Err(SiteError::NoImage {
                name: name.clone(),
                host: of.to_owned(),
            });
        }
    }
    if site.is_anywhere(name) {
        return Err(in_phase(
            vm,
            format!("a host has a process of it (doppel vm show {name})"),
        ));
    }
    if let Phase::Starting {
        on: Some(on),
        cold: before,
    } = &vm.phase
    {
        let again = !cold && !before && of.is_none();
        if again {
            return Ok(());
        }
        // Its process may be there and not be told of yet: a second cold start would take the machine from under it, and both would serve.
        let host = on.host.clone();
        return Err(in_phase(
            vm,
            format!(
                "host {host} is just starting it: wait for that (doppel vm show {name}), or take it back first (doppel vm stop {name}; with --lost, if \
                 you know that no process of it runs there)"
            ),
        ));
    }
    // One that ran and has no record: that was lost, and says nothing.
    let unknown = vm.phase == Phase::Running && !site.was_turned_off(name);
    if !cold && (unknown || !site.is_ended(name)) {
        return Err(in_phase(
            vm,
            "for all that the arbiter's record says a process of it may serve the world, and no agent sees one. If you know that none does (its hosts \
             are off, or came back without it), say --cold-start: what was in its memory is gone"
                .to_owned(),
        ));
    }
    let record = site.records.get(name).filter(|_| cold);
    let may_run = record.filter(|record| record.state != State::Ended);
    vm.cold_from = may_run.map(Record::reign);
    // Where the record lets anybody start it, that decides: it may be another one by then.
    let cold = cold && (may_run.is_some() || site.unreadable.contains(name));
    vm.phase = Phase::Starting { on: None, cold };
    if let Some(disk) = &mut vm.disk {
        disk.of = of.map(str::to_owned);
    }
    vm.backup = None;
    vm.failures.clear();
    vm.note = None;
    Ok(())
}

/// Has a machine turned off; one that is off stays off. One that was only noted to be off, and of which a process has turned up, is turned off as any
/// that runs.
pub fn stop(site: &Site, vm: &mut Vm) {
    let is_anywhere = site.is_anywhere(&vm.name);
    let never_ran = matches!(vm.phase, Phase::Starting { on: None, .. })
        && site.is_ended(&vm.name)
        && !is_anywhere;
    if never_ran {
        vm.phase = Phase::Stopped;
    } else if !vm.phase.is_off() || is_anywhere {
        vm.phase = Phase::Stopping;
    }
}

/// What is left on a host that is drained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Machines that it serves.
    pub served: Vec<String>,
    /// Machines whose backup it has, and which another host can have.
    pub followed: Vec<String>,
    /// Machines whose backup stays, and why no other host can have it.
    pub stays: Vec<(String, String)>,
}

impl Left {
    /// Whether nothing more is to leave.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.served.is_empty() && self.followed.is_empty()
    }
}

/// Whether a process may be the one that serves its machine: whoever turns its host off turns that off, too. One that says nothing (its host is
/// too busy to answer, or it is frozen) is that as long as nobody else is.
fn may_serve(site: &Site, role: &RoleReport) -> bool {
    match role.says {
        Some(says) => match says.role {
            Role::Primary => says.standing != Standing::Ended,
            Role::Backup => says.standing == Standing::TakingOver,
            Role::Solo => false,
        },
        None => site.serving(&role.machine).is_none(),
    }
}

/// What is left on a host that is drained.
///
/// # Errors
/// [`SiteError::Alone`] if it serves a machine, and no other host takes any.
pub fn left(site: &Site, host: &Host, now_ms: u64) -> Result<Left, SiteError> {
    let mut left = Left::default();
    for vm in site.vms.values().map(|vm| &vm.value) {
        // Its primary is not there yet, and will be.
        if let Phase::Starting { on: Some(on), .. } = &vm.phase
            && on.host == host.name
        {
            left.served.push(vm.name.clone());
        }
    }
    for role in &host.roles {
        let (machine, vm) = (&role.machine, site.vms.get(&role.machine));
        if may_serve(site, role) {
            if !left.served.contains(machine) {
                left.served.push(machine.clone());
            }
            continue;
        }
        let (Some(vm), Some((primary, _)), true) = (
            vm,
            site.serving(machine),
            role.is_backup(Standing::Following),
        ) else {
            continue;
        };
        let mut free = vm.value.clone();
        free.backup = None;
        match placement::choose(site, &free, Wanted::Backup(primary), now_ms) {
            Ok(_) => left.followed.push(machine.clone()),
            // The one that is to take its place is there, or is coming.
            Err(_)
                if vm
                    .value
                    .assigned()
                    .any(|on| on != host.name && !site.is_drained(on)) =>
            {
                left.followed.push(machine.clone());
            }
            Err(unfit) => left
                .stays
                .push((machine.clone(), placement::explain(&unfit))),
        }
    }
    let mut others = site.hosts.keys().filter(|name| !site.is_drained(name));
    if !left.served.is_empty() && others.next().is_none() {
        return Err(SiteError::Alone(host.name.clone()));
    }
    Ok(left)
}

/// What is left of a machine when its record is gone.
fn deleted(vm: &Vm) -> Option<Deleted> {
    let life = vm.disk.as_ref().filter(|life| !life.hosts.is_empty())?;
    Some(Deleted {
        machine: vm.name.clone(),
        instance: vm.instance.clone(),
        hosts: life.hosts.clone(),
    })
}

fn deletable(site: &Site, vm: &Vm) -> Result<(), SiteError> {
    if !vm.phase.is_off() {
        let advice = format!("turn it off first (doppel vm stop {})", vm.name);
        return Err(in_phase(vm, advice));
    }
    if site.is_anywhere(&vm.name) {
        let advice = "a host has a process of it still".to_owned();
        return Err(in_phase(vm, advice));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::disks::ImageReport;
    use crate::agent::record::Assigned;
    use crate::agent::record::Kept;
    use crate::agent::tests::{order_a_switch, put, role_of, site, vm};
    use crate::protocol::record::Identity;

    #[test]
    fn ports_are_those_that_every_host_has() {
        let mut site = site(&["a", "b"]);
        assert_eq!(free_port(&site), Some(7700));
        site.ports.insert(7700, "kv".into());
        site.hosts.get_mut("b").unwrap().value.ports = Ports {
            first: 7690,
            last: 7701,
        };
        assert_eq!(free_port(&site), Some(7701));
        site.ports.insert(7701, "db".into());
        assert_eq!(free_port(&site), None);
    }

    #[test]
    fn a_machine_that_may_run_is_not_started_unless_told() {
        let mut site = site(&["a"]);
        let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
        site.records.insert("kv".into(), live);
        let mut lost = Vm {
            phase: Phase::Running,
            ..vm("kv")
        };
        let why = start(&site, &mut lost, false, None)
            .unwrap_err()
            .to_string();
        assert!(why.contains("--cold-start"), "{why}");
        start(&site, &mut lost, true, None).unwrap();
        assert!(matches!(
            lost.phase,
            Phase::Starting {
                cold: true,
                on: None
            }
        ));
        assert_eq!(lost.cold_from, Some(live.reign()));
        let role = role_of("kv", Role::Primary, Standing::Unprotected);
        site.hosts.get_mut("a").unwrap().value.roles.push(role);
        let why = start(&site, &mut lost, true, None).unwrap_err().to_string();
        assert!(why.contains("has a process"), "{why}");
    }

    /// A process that was just started is not told of at once. Who tries again then would start a second one, and a cold start heeds no record.
    #[test]
    fn a_machine_that_is_being_started_is_not_started_again() {
        let mut site = site(&["a", "b"]);
        let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
        site.records.insert("kv".into(), live);
        let starting = |cold| {
            let on = Some(Assigned {
                host: "a".into(),
                number: 1,
                since_ms: 0,
            });
            let phase = Phase::Starting { on, cold };
            Vm { phase, ..vm("kv") }
        };
        for (before, cold) in [(true, true), (true, false), (false, true)] {
            let mut vm = starting(before);
            let why = start(&site, &mut vm, cold, None).unwrap_err().to_string();
            assert!(why.contains("host a is just starting it"), "{why}");
            assert_eq!(vm, starting(before));
        }
        // Nothing is lost by saying it twice where the arbiter decides.
        let mut vm = starting(false);
        start(&site, &mut vm, false, None).unwrap();
        assert_eq!(vm, starting(false));
        // Its way out.
        let mut vm = starting(true);
        stop(&site, &mut vm);
        assert_eq!(vm.phase, Phase::Stopping);
        start(&site, &mut vm, true, None).unwrap();
    }

    #[test]
    fn a_record_that_is_lost_or_cannot_be_read_lets_nobody_start_what_may_run() {
        let mut site = site(&["a"]);
        let running = Vm {
            phase: Phase::Running,
            ..vm("kv")
        };
        let start_it = |site: &Site, vm: &Vm, cold| start(site, &mut vm.clone(), cold, None);
        let why = start_it(&site, &running, false).unwrap_err().to_string();
        assert!(why.contains("--cold-start"), "{why}");
        start_it(&site, &running, true).unwrap();
        start_it(&site, &vm("kv"), false).unwrap();
        // Nothing has to be overruled, and if something has by then, somebody lives.
        let mut lost = running.clone();
        start(&site, &mut lost, true, None).unwrap();
        assert!(matches!(lost.phase, Phase::Starting { cold: false, .. }));
        site.unreadable.insert("kv".into());
        start_it(&site, &vm("kv"), false).unwrap_err();
        start(&site, &mut lost, true, None).unwrap();
        assert!(matches!(lost.phase, Phase::Starting { cold: true, .. }));
        let mut ended = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
        ended.state = State::Ended;
        site.records.insert("kv".into(), ended);
        start_it(&site, &running, false).unwrap();
    }

    /// It was out of sight, and somebody noted that it is off.
    #[test]
    fn a_machine_that_was_noted_to_be_off_and_turns_up_is_turned_off() {
        let mut site = site(&["a"]);
        let mut noted = Vm {
            phase: Phase::Stopped,
            ..vm("kv")
        };
        stop(&site, &mut noted);
        assert_eq!(noted.phase, Phase::Stopped);
        let role = role_of("kv", Role::Primary, Standing::Unprotected);
        site.hosts.get_mut("a").unwrap().value.roles.push(role);
        stop(&site, &mut noted);
        assert_eq!(noted.phase, Phase::Stopping);
    }

    #[test]
    fn an_order_whose_first_attempt_was_not_answered_is_no_other_one() {
        let mut site = site(&["a"]);
        assert!(!is_given(&site, "kv", "1"));
        order_a_switch(&mut site);
        assert!(is_given(&site, "kv", "1") && !is_given(&site, "kv", "2"));
        site.orders.clear();
        site.answers.insert("1".into(), Answer::Taken("a".into()));
        assert!(is_given(&site, "kv", "1"));
    }

    #[test]
    fn a_machine_goes_on_with_an_image_that_is_there() {
        let mut site = site(&["a", "b"]);
        let mut db = Vm {
            phase: Phase::Stopped,
            ..vm("db")
        };
        let refused = |site: &Site, db: &Vm, of| {
            let said = start(site, &mut db.clone(), false, Some(of));
            said.unwrap_err().to_string()
        };
        assert!(refused(&site, &db, "a").contains("leave out --disk-of"));
        db.disk = Some(DiskLife::default());
        assert_eq!(deleted(&db), None, "it was never placed");
        db.assign("a", 0);
        db.assign("b", 0);
        db.assign("a", 0);
        assert!(refused(&site, &db, "a").contains("tells of no image"));
        let image = ImageReport {
            machine: "db".into(),
            instance: db.instance.clone(),
            bytes: 512,
            mark: None,
        };
        site.hosts.get_mut("a").unwrap().value.images = Some(vec![image]);
        assert!(refused(&site, &db, "b").contains("tells of no image"));
        start(&site, &mut db, false, Some("a")).unwrap();
        assert_eq!(db.disk.as_ref().unwrap().of.as_deref(), Some("a"));
        // The next one is without.
        start(&site, &mut db, false, None).unwrap();
        assert_eq!(db.disk.as_ref().unwrap().of, None);
        assert!(deleted(&db).unwrap().hosts.iter().eq(["a", "b"]));
    }

    #[test]
    fn only_what_is_off_is_deleted() {
        let mut site = site(&["a"]);
        let running = Vm {
            phase: Phase::Running,
            ..vm("kv")
        };
        put(&mut site, running.clone());
        let why = deletable(&site, &running).unwrap_err().to_string();
        assert!(why.contains("vm stop"), "{why}");
        let off = Vm {
            phase: Phase::Stopped,
            ..running
        };
        deletable(&site, &off).unwrap();
    }

    #[test]
    fn a_drained_host_is_done_when_nothing_can_leave_it_any_more() {
        let mut site = site(&["a", "b"]);
        let value = Drain {
            host: "a".into(),
            since_ms: 0,
            boot: None,
        };
        site.drains.insert("a".into(), Kept { value, revision: 1 });
        let mut machine = vm("kv");
        machine.phase = Phase::Running;
        put(&mut site, machine);
        let add = |site: &mut Site, host: &str, role| {
            let host = site.hosts.get_mut(host).unwrap();
            host.value.roles = vec![role_of("kv", role, Standing::Following)];
            if role == Role::Primary {
                host.value.roles = vec![role_of("kv", role, Standing::Protected)];
            }
        };
        let of = |site: &Site| left(site, &site.hosts["a"].value, 0);
        assert!(of(&site).unwrap().is_done());
        add(&mut site, "a", Role::Primary);
        assert_eq!(of(&site).unwrap().served, ["kv"]);
        let b = site.hosts.remove("b").unwrap();
        assert!(matches!(of(&site), Err(SiteError::Alone(_))));
        site.hosts.insert("b".into(), b);
        add(&mut site, "a", Role::Backup);
        add(&mut site, "b", Role::Primary);
        let stays = of(&site).unwrap();
        assert!(stays.is_done() && stays.stays.len() == 1, "{stays:?}");
        let value = crate::agent::tests::host("c");
        site.hosts.insert("c".into(), Kept { value, revision: 1 });
        assert_eq!(of(&site).unwrap().followed, ["kv"]);
    }

    /// Whoever turns a host off turns off what serves there, be it silent or undecided, and what is about to.
    #[test]
    fn a_drained_host_is_not_done_while_something_may_serve_there() {
        let mut site = site(&["a", "b"]);
        let mut machine = vm("kv");
        machine.phase = Phase::Running;
        put(&mut site, machine.clone());
        let here = |site: &mut Site, role: RoleReport| {
            site.hosts.get_mut("a").unwrap().value.roles = vec![role];
        };
        let done = |site: &Site| left(site, &site.hosts["a"].value, 0).unwrap().is_done();
        let silent = RoleReport {
            says: None,
            ..role_of("kv", Role::Primary, Standing::Protected)
        };
        here(&mut site, silent.clone());
        assert!(!done(&site), "a process that says nothing");
        for standing in [Standing::Starting, Standing::Deciding, Standing::Frozen] {
            here(&mut site, role_of("kv", Role::Primary, standing));
            assert!(!done(&site), "{standing:?}");
        }
        here(&mut site, role_of("kv", Role::Backup, Standing::TakingOver));
        assert!(!done(&site), "one that takes it over");
        here(&mut site, role_of("kv", Role::Primary, Standing::Ended));
        assert!(done(&site));
        // Somebody else serves: a silent one is what is left of before.
        here(&mut site, silent);
        let serves = role_of("kv", Role::Primary, Standing::Unprotected);
        site.hosts.get_mut("b").unwrap().value.roles = vec![serves];
        assert!(done(&site));
        site.hosts.get_mut("a").unwrap().value.roles.clear();
        machine.phase = Phase::Starting {
            on: Some(machine.assign("a", 0)),
            cold: false,
        };
        put(&mut site, machine);
        assert!(!done(&site), "one that is just being started");
    }

    #[test]
    fn what_has_not_been_placed_is_stopped_at_once() {
        let site = site(&["a"]);
        let mut young = vm("kv");
        stop(&site, &mut young);
        assert_eq!(young.phase, Phase::Stopped);
        let mut running = Vm {
            phase: Phase::Running,
            ..vm("kv")
        };
        stop(&site, &mut running);
        assert_eq!(running.phase, Phase::Stopping);
    }
}
