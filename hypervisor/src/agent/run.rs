//! The agent's loop: look at the host, read the site, keep the membership, do what is to be done.
//!
//! One thread, which may wait for etcd or for a role that is frozen: nothing waits for it. (Consoles have threads of their own.) While etcd is away it does nothing at all; roles
//! run on, and the arbiter lets nobody change role.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::config::AgentConfig;
use super::consoles;
use super::hands::Hands;
use super::membership::{self, Membership, Standing};
use super::orders::Desk;
use super::plan::{Act, Local, Start, plan};
use super::record::{Host, Kept, Phase, RoleReport, Site, Vm};
use super::store::{Change, Key, Store};
use super::{AgentError, unix_ms};
use crate::arbiter::EtcdError;
use crate::backends::wait::Waiter;
use crate::config::Config;
use crate::control::wire::Ask;
use crate::handshake::Secret;
use crate::kvm::{CpuModel, KvmSource};
use crate::session::host::stop_signals;

/// Between two equal orders to one process: what is under way is not to be asked for at every look.
const AGAIN: Duration = Duration::from_secs(3);

/// How long an agent that has just come, or has come back to etcd, sees who is there before it judges who is not: the others look as often
/// as it does, and may have been waiting for an answer from a member that was away.
const SETTLE: Duration = Duration::from_secs(2);

/// Runs the agent until SIGTERM or SIGINT. The roles that it has started run on.
///
/// # Errors
/// See [`AgentError`].
pub fn run(config: &AgentConfig) -> Result<(), AgentError> {
    let signals = stop_signals()?;
    let hands = Hands::new(config)?;
    let secret = Secret::read(&config.secret)?;
    if config.console_port != 0 {
        let place = (config.address, config.console_port);
        TcpListener::bind(place)
            .and_then(|listener| consoles::show(listener, &config.run_dir, &secret))
            .map_err(AgentError::host("show consoles at console_port"))?;
    }
    let store = Store::open(config.cluster()?, secret)?;
    let roles = match &config.roles {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    let cpu = CpuModel::of_host(&KvmSource::Path(roles.kvm));
    if let Err(error) = &cpu {
        tracing::warn!("no machine is placed here: {error}");
    }
    let host = Host {
        name: config.name.clone(),
        instance: hands.instance()?,
        address: config.address,
        cpu: cpu.ok(),
        memory_mib: config.memory_mib,
        ports: config.ports()?,
        network: config.bridge.is_some(),
        rdma: None,
        load: 0.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        written_ms: 0,
        console: (config.console_port != 0).then_some(config.console_port),
        boot: membership::boot(),
        roles: Vec::new(),
        images: None,
    };
    tracing::info!("agent of host {}, etcd at {}", host.name, config.etcd);
    let mut agent = Agent {
        poll: Duration::from_millis(config.poll_ms),
        membership: Membership::new(Duration::from_secs(config.lease_s)),
        desk: Desk::default(),
        seen_since: None,
        away: false,
        taken: false,
        foreign: BTreeSet::new(),
        strangers: BTreeSet::new(),
        unremoved: BTreeSet::new(),
        ordered_at: Vec::new(),
        hands,
        store,
        host,
    };
    agent.work(&signals)
}

struct Agent {
    poll: Duration,
    hands: Hands,
    store: Store,
    membership: Membership,
    desk: Desk,
    /// The host's record, as it was told last.
    host: Host,
    /// Since when etcd has answered without a break.
    seen_since: Option<Instant>,
    /// Whether it was said that etcd is away.
    away: bool,
    /// Whether it was said that the name is taken.
    taken: bool,
    /// Keys of which it was said that nobody of the site wrote them.
    foreign: BTreeSet<String>,
    /// Processes of which it was said that their machine is none of the site's.
    strangers: BTreeSet<u32>,
    /// Deleted machines of which it was said that an image cannot be removed, by instance.
    unremoved: BTreeSet<String>,
    /// Processes that were ordered something, and when.
    ordered_at: Vec<(u32, Ask, Instant)>,
}

impl Agent {
    fn work(&mut self, signals: &UnixStream) -> Result<(), AgentError> {
        let mut waiter = Waiter::new();
        loop {
            match self.round() {
                Ok(()) => self.etcd_is_there(),
                Err(AgentError::Etcd(error)) => self.etcd_is_away(&error),
                Err(error) => return Err(error),
            }
            waiter.clear();
            let signal = waiter.add(signals, true, false);
            let waited = waiter.wait(Some(self.poll));
            waited.map_err(AgentError::host("wait for signals"))?;
            if waiter.ready(signal).read {
                tracing::info!("the agent ends; what it has started runs on");
                return Ok(());
            }
        }
    }

    fn etcd_is_away(&mut self, error: &EtcdError) {
        self.seen_since = None;
        if !self.away {
            self.away = true;
            tracing::warn!(
                "etcd is away: machines run on, none is started or placed, and none changes role until it is back ({error})"
            );
        }
    }

    fn etcd_is_there(&mut self) {
        if self.away {
            self.away = false;
            tracing::info!("etcd is back");
        }
    }

    fn round(&mut self) -> Result<(), AgentError> {
        let roles = self.hands.look()?;
        let mut site = self.store.read()?;
        let now = Instant::now();
        let since = *self.seen_since.get_or_insert(now);
        self.tell_of_foreign(&site);
        self.describe(roles);
        let standing = self.membership.keep(&self.store, &site, &self.host, now)?;
        if standing == Standing::Taken {
            if !self.taken {
                self.taken = true;
                tracing::warn!(
                    "another agent is host {:?}: if that is an earlier life of this one, its lease runs out soon; if not, give this one another `name`",
                    self.host.name
                );
            }
            return Ok(());
        }
        self.taken = false;
        // What is seen at first hand is newer than what was written.
        let revision = site
            .hosts
            .get(&self.host.name)
            .map_or(0, |kept| kept.revision);
        let value = self.host.clone();
        site.hosts
            .insert(self.host.name.clone(), Kept { value, revision });
        self.tell_of_strangers(&site);
        let now_ms = unix_ms();
        let local = Local {
            me: self.host.name.clone(),
            now_ms,
            settled: now - since >= SETTLE + 2 * self.poll,
            held: self.hands.held(site.vms.keys()),
            ended: self.hands.ended().clone(),
            told: self.hands.told().clone(),
        };
        self.end_drain(&site)?;
        self.remove_images(&site)?;
        for act in plan(&site, &local) {
            self.act(&site, act)?;
        }
        let (desk, hands) = (&mut self.desk, &self.hands);
        desk.turn(&self.store, &site, hands, &self.host.name, now_ms)?;
        Ok(())
    }

    /// The host has booted since it was drained for that: it is given roles again.
    fn end_drain(&self, site: &Site) -> Result<(), AgentError> {
        let Some(drain) = site.drains.get(&self.host.name) else {
            return Ok(());
        };
        if drain.value.is_over(&self.host.boot) {
            let key = Key::Drain(&self.host.name);
            let change = Change::new().only_if(&key, drain.revision).delete(&key);
            if self.store.change(&change)? {
                tracing::info!("the host is back from its shutdown: it is not drained any more");
            }
        }
        Ok(())
    }

    /// Images of machines that were deleted go, and with the last of them the record that says so.
    fn remove_images(&mut self, site: &Site) -> Result<(), AgentError> {
        for kept in site.deleted.values() {
            let deleted = &kept.value;
            // One that is there all the same was put back from an older copy of the records.
            let is_there = |vm: &Kept<Vm>| vm.value.instance == deleted.instance;
            if !deleted.hosts.contains(&self.host.name) || site.vms.values().any(is_there) {
                continue;
            }
            match self.hands.remove_image(&deleted.machine, &deleted.instance) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    if self.unremoved.insert(deleted.instance.clone()) {
                        tracing::warn!("machine {} was deleted: {error}", deleted.machine);
                    }
                    continue;
                }
            }
            let mut left = deleted.clone();
            left.hosts.remove(&self.host.name);
            let key = Key::Deleted(&deleted.instance);
            let change = Change::new().only_if(&key, kept.revision);
            let change = match left.hosts.is_empty() {
                true => change.delete(&key),
                false => change.put(&self.store, &key, &left, None),
            };
            // Another host's may have come between: the next look tells.
            if self.store.change(&change)? {
                tracing::info!(
                    "machine {} was deleted: its disk is not here any more",
                    deleted.machine
                );
            }
        }
        Ok(())
    }

    fn describe(&mut self, roles: Vec<RoleReport>) {
        self.host.roles = roles;
        self.host.images = Some(self.hands.images());
        self.host.load = membership::load();
        self.host.rdma = membership::rdma(std::path::Path::new("/sys/class/infiniband"));
        self.host.written_ms = unix_ms();
    }

    fn tell_of_foreign(&mut self, site: &Site) {
        for key in &site.foreign {
            if self.foreign.insert(key.clone()) {
                tracing::warn!(
                    "etcd's key {key} is not believed: nobody with this site's secret wrote it, or another version did"
                );
            }
        }
    }

    /// Processes here of machines that were deleted while this host was out of sight: nobody looks after them, and nobody ends them, as they may serve.
    fn tell_of_strangers(&mut self, site: &Site) {
        // A record that is not believed, or of another version, is one all the same.
        let is_known = |machine: &str| {
            let key = format!("/{machine}");
            site.foreign.iter().any(|found| found.ends_with(&key))
        };
        let strange = |role: &&RoleReport| !site.is_of(role) && !is_known(&role.machine);
        let found: Vec<_> = self.host.roles.iter().filter(strange).collect();
        for role in &found {
            if self.strangers.insert(role.pid) {
                tracing::warn!(
                    "process {} is of a machine {:?} that this site has not any more: nobody looks after it; doppel power-off {} here turns it off",
                    role.pid,
                    role.machine,
                    role.machine
                );
            }
        }
        let pids: BTreeSet<u32> = found.iter().map(|role| role.pid).collect();
        self.strangers.retain(|pid| pids.contains(pid));
    }

    fn act(&mut self, site: &Site, act: Act) -> Result<(), AgentError> {
        match act {
            Act::Write {
                vm,
                revision,
                places,
            } => {
                let mut change = Change::new()
                    .only_if(&Key::Vm(&vm.name), revision)
                    .put_vm(&self.store, &vm);
                if places {
                    // Not from a picture that is older than somebody else's placement: memory is given once.
                    change = change.only_if(&Key::Placements, site.placements).put(
                        &self.store,
                        &Key::Placements,
                        &self.host.name,
                        None,
                    );
                }
                if self.store.change(&change)? {
                    let backup = vm.backup.as_ref().map_or("none", |on| &on.host);
                    let note = vm.note.as_deref().unwrap_or("");
                    tracing::info!(
                        "machine {}: {}, backup on {backup} {note}",
                        vm.name,
                        vm.phase.word()
                    );
                }
            }
            Act::Start {
                machine,
                what,
                number,
            } => {
                let Some(vm) = site.vms.get(&machine) else {
                    return Ok(());
                };
                let role = match what {
                    Start::Primary { .. } if !self.is_still_to_start(&machine, vm)? => {
                        return Ok(());
                    }
                    Start::Primary { .. } => "primary",
                    Start::Backup => "backup",
                };
                match self.hands.start(site, &self.host, &vm.value, what, number) {
                    Ok(Some(pid)) => {
                        tracing::info!("machine {machine}: {role} started, process {pid}");
                    }
                    Ok(None) => tracing::debug!("machine {machine}: its disk is being made"),
                    Err(error) => {
                        tracing::warn!("machine {machine}: no {role} was started: {error}")
                    }
                }
            }
            Act::EndBackup { machine, pid } => {
                let what = format!("needs no backup here, and process {pid} leaves");
                self.order(&machine, pid, Ask::Leave, &what);
            }
            Act::PowerOff { machine, pid } => {
                self.order(&machine, pid, Ask::PowerOff, "is turned off")
            }
            Act::Switch { machine, pid } => {
                self.order(&machine, pid, Ask::Switch, "leaves: it is switched over");
            }
            Act::Fail { machine, pid } => {
                self.order(&machine, pid, Ask::Fail, "leaves: its backup takes it over");
            }
            Act::Migrate {
                machine,
                pid,
                place,
            } => {
                let what = format!("gets another backup, at {place}");
                self.order(&machine, pid, Ask::MigrateBackup(Some(place)), &what);
            }
            Act::Tell {
                machine,
                pid,
                place,
            } => {
                // One that does not take it now is told again.
                if let Err(error) = self.hands.tell(&machine, pid, place) {
                    tracing::debug!("machine {machine}: {error}");
                }
            }
        }
        Ok(())
    }

    /// Whether a machine is to be started for all that is known now: what was seen may be as old as etcd's answers to what was done since, and
    /// an operator may have thought better of it. (What is done between this look and the start, a cold start's record tells: see [`Cold`](crate::protocol::Cold).)
    fn is_still_to_start(&self, machine: &str, seen: &Kept<Vm>) -> Result<bool, AgentError> {
        let cold = matches!(seen.value.phase, Phase::Starting { cold: true, .. });
        let site = self.store.read()?;
        let vm = site.vms.get(machine);
        Ok(vm.is_some_and(|vm| vm.revision == seen.revision)
            && !(cold && site.is_anywhere(machine)))
    }

    /// Gives an order to a role here, unless it was given just now.
    fn order(&mut self, machine: &str, pid: u32, what: Ask, said: &str) {
        let now = Instant::now();
        self.ordered_at.retain(|(_, _, at)| now - *at < AGAIN);
        if self
            .ordered_at
            .iter()
            .any(|(of, ask, _)| (*of, *ask) == (pid, what))
        {
            return;
        }
        self.ordered_at.push((pid, what, now));
        match self.hands.order(machine, pid, what) {
            Ok(_) => tracing::info!("machine {machine} {said}"),
            Err(error) => tracing::warn!("machine {machine}: not yet, that it {said}: {error}"),
        }
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
