//! `doppel vm`: the machines of a site, from any of its hosts.

mod shown;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use hypervisor::agent::config::{AgentConfig, DEFAULT};
use hypervisor::agent::consoles::AtSite;
use hypervisor::agent::disks::DiskSpec;
use hypervisor::agent::record::{Phase, Site, Verb};
use hypervisor::agent::site::{self, Access, Left, SiteError};
use hypervisor::agent::spec::{Spec, SpecError};
use hypervisor::config::{GuestCpu, Transport};
use hypervisor::control::status::Standing;
use hypervisor::handshake::Secret;
use hypervisor::machine::ClockSource;
use hypervisor::preempt::Strategy;
use serde_json::Value;

use super::Failure;
use super::console::{LookArgs, look};
use super::machine::{clock, cpu, strategy};
use super::pair::By;

/// The machines of a site: made, seen, protected, moved, turned off, from any of its hosts
#[derive(Debug, Args)]
#[command(
    after_help = "The agents of the site do what is said here (doppel agent --help). Each command waits for it to be done, up to --within seconds;\n\
                  what is not done by then is done when it can be, except a switch-over, which is withdrawn.\n\n\
                  Ends 0 if it was done, 1 if not (the message says why), 2 if it was said wrongly.\n\n\
                  Examples:\n  \
                  doppel vm create kv --guest kv --memory 64 --command-line \"ip=192.0.2.77/24\"\n  \
                  doppel vm create db --guest disk --disk 10G --no-network\n  \
                  doppel vm list\n  \
                  doppel vm switch kv\n  \
                  doppel vm drain host-a                # before it is serviced; doppel vm undrain host-a after\n  \
                  doppel vm stop kv && doppel vm delete kv"
)]
pub struct VmArgs {
    #[command(subcommand)]
    verb: VmVerb,
    /// The agent's configuration: where etcd is, and the site's secret
    #[arg(long, global = true, value_name = "FILE.toml", default_value = DEFAULT)]
    config: PathBuf,
    /// How long to wait for it to be done, in seconds; 0 does not wait
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60)]
    within: u64,
}

#[derive(Debug, Subcommand)]
enum VmVerb {
    Create(Box<CreateArgs>),
    /// List them: state, hosts, epoch
    List(ListArgs),
    Show(ShowArgs),
    /// List the site's hosts: CPU, memory, load
    Hosts(ListArgs),
    /// Have a machine get a backup, on another host
    Protect(NameArgs),
    /// Have a machine run without a backup
    Unprotect(NameArgs),
    /// Move a machine to its backup, without a failure; it gets a new backup then
    Switch(NameArgs),
    Console(ConsoleArgs),
    Drain(DrainArgs),
    /// Let a host have machines again
    Undrain(HostArgs),
    Start(StartArgs),
    Stop(StopArgs),
    /// Forget a machine that is off, remove its disk from all hosts, and free its port
    Delete(NameArgs),
}

/// Write a machine's specification, and have it run
#[derive(Debug, Args)]
#[command(
    after_help = "Files are named by absolute paths below the agents' `images`, and are the same on every host that may start the machine.\n\
                  A disk has an image on each host that has a role of the machine, in the agents' `disks`: made by --disk 10G, or as a copy of the\n\
                  file that --disk names, when the machine is started for the first time; kept until doppel vm delete. With read-only the file\n\
                  itself is the disk, on every host.\n\
                  Examples:\n  doppel vm create web --kernel /var/lib/doppel/vmlinux --initrd /var/lib/doppel/web.img --memory 512\n  \
                  doppel vm create db --kernel /var/lib/doppel/vmlinux --initrd /var/lib/doppel/db.img --memory 512 --disk 10G\n  \
                  doppel vm create db2 --guest disk --no-network --disk /var/lib/doppel/base.img"
)]
struct CreateArgs {
    /// Its name at the site, and at the arbiter
    name: String,
    /// kv, compute, irq, clock, memory, or an ELF file (docs/guest-abi.md)
    #[arg(long, value_name = "GUEST", conflicts_with = "kernel")]
    guest: Option<String>,
    /// Boot this Linux kernel
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Guest memory in MiB, 2 to 3072
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u32,
    /// vCPUs of a Linux guest, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u8,
    /// The CPU of a Linux guest: one that can be replayed, or the host's
    #[arg(long, value_name = "replayable|host", value_parser = cpu)]
    cpu: Option<GuestCpu>,
    /// The guest's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    command_line: String,
    /// Without a network
    #[arg(long)]
    no_network: bool,
    /// Its disk: a size, such as 10G or 512M, or a file whose copy it is at first
    #[arg(long, value_name = "SIZE|FILE[,replicated][,read-only]")]
    disk: Option<DiskSpec>,
    /// What carries its log: tcp or rdma
    #[arg(long, value_name = "tcp|rdma", value_parser = carrier, default_value = "tcp")]
    transport: Transport,
    /// How it is replicated
    #[arg(long, value_enum, default_value = "replay")]
    replicate: By,
    /// What happens when something is due while it does not exit
    #[arg(long, value_name = "exit|checkpoint", value_parser = strategy, default_value = "exit")]
    preempt: Strategy,
    /// Where a Linux guest reads the time
    #[arg(long, value_name = "timer|page", value_parser = clock)]
    clock: Option<ClockSource>,
    /// Its backup may be on the host of its primary, where the loss of that host is the loss of both
    #[arg(long)]
    same_host: bool,
    /// Run it without a backup, until doppel vm protect
    #[arg(long)]
    unprotected: bool,
    /// Do not start it: doppel vm start does
    #[arg(long)]
    stopped: bool,
}

pub(super) fn carrier(text: &str) -> Result<Transport, String> {
    match text {
        "tcp" => Ok(Transport::Tcp),
        "rdma" => Ok(Transport::Rdma),
        _ => Err("choose tcp or rdma: the sides are on two hosts".into()),
    }
}

// What is listed is said at the verb.
#[derive(Debug, Args)]
struct ListArgs {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Say everything about a machine
#[derive(Debug, Args)]
struct ShowArgs {
    /// The machine
    name: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

// What is done is said at the verb.
#[derive(Debug, Args)]
struct NameArgs {
    /// The machine
    name: String,
}

/// Look at a machine's console, and type at it, wherever it is served; after a failover it goes on with the survivor
#[derive(Debug, Args)]
#[command(
    after_help = "As doppel console on its host (doppel console --help). Between the hosts all of it is sealed.\nExample:\n  doppel vm console kv"
)]
struct ConsoleArgs {
    /// The machine
    name: String,
    #[command(flatten)]
    look: LookArgs,
}

/// Empty a host: what it serves is switched over to other hosts, its backups are moved, and it is given nothing more
#[derive(Debug, Args)]
#[command(
    after_help = "Ends 0 once nothing is served there and no backup is there that another host can have; it can be shut down then. A backup that no \
                  other host can have stays, and protects until then.\n\
                  Examples:\n  doppel vm drain host-a --within 300\n  doppel vm drain && systemctl reboot"
)]
struct DrainArgs {
    #[command(flatten)]
    of: HostArgs,
    /// Until it has booted anew, and not until doppel vm undrain
    #[arg(long)]
    until_boot: bool,
}

// What is done is said at the verb.
#[derive(Debug, Args)]
struct HostArgs {
    /// The host [default: this one]
    host: Option<String>,
}

/// Start a machine that is off: one with a disk where the newest image of that is
#[derive(Debug, Args)]
struct StartArgs {
    /// The machine
    name: String,
    /// Although the arbiter's record says that it may run: you know that no process of it does. What was in its memory is gone
    #[arg(long)]
    cold_start: bool,
    /// On this host, with what it has of the disk: you know that no newer image will come back. What was written since is gone
    #[arg(long, value_name = "HOST")]
    disk_of: Option<String>,
}

/// Turn a machine off, on both sides
#[derive(Debug, Args)]
struct StopArgs {
    /// The machine
    name: String,
    /// No process of it runs any more, you know that: only its record is to say so
    #[arg(long)]
    lost: bool,
}

impl From<SiteError> for Failure {
    fn from(error: SiteError) -> Self {
        let code = match &error {
            SiteError::Config(_) | SiteError::Spec(_) => Self::USAGE,
            _ => Self::ERROR,
        };
        Self::new(code, error)
    }
}

pub fn vm(args: &VmArgs) -> Result<(), Failure> {
    let config = AgentConfig::read(&args.config).map_err(SiteError::from)?;
    let site = At {
        access: Access::open(&config)?,
        within: Duration::from_secs(args.within),
    };
    let host = |of: &HostArgs| of.host.clone().unwrap_or_else(|| config.name.clone());
    match &args.verb {
        VmVerb::Create(create) => site.create(create),
        VmVerb::List(list) => site.list(list.json),
        VmVerb::Show(show) => site.show(&show.name, show.json),
        VmVerb::Hosts(list) => site.hosts(list.json),
        VmVerb::Protect(of) => site.protect(&of.name, true),
        VmVerb::Unprotect(of) => site.protect(&of.name, false),
        VmVerb::Switch(of) => site.switch(&of.name),
        VmVerb::Console(console) => {
            let secret = Secret::read(&config.secret).map_err(SiteError::from)?;
            // Once, so that an etcd that is away is told of and not waited for.
            site.access.read()?;
            let way = AtSite::new(site.access.into_store(), &secret);
            look(&console.name, &console.look, Arc::new(way), "at this site")
        }
        VmVerb::Drain(drain) => site.drain(&host(&drain.of), drain.until_boot),
        VmVerb::Undrain(of) => {
            let host = host(of);
            site.access.undrain(&host)?;
            println!("host {host}: not drained");
            Ok(())
        }
        VmVerb::Start(start) => site.start(start),
        VmVerb::Stop(stop) => site.stop(&stop.name, stop.lost),
        VmVerb::Delete(of) => site.delete(&of.name),
    }
}

/// The site, and patience.
struct At {
    access: Access,
    within: Duration,
}

impl At {
    fn create(&self, args: &CreateArgs) -> Result<(), Failure> {
        let guest = match (&args.guest, &args.kernel) {
            (None, None) => return Err(SiteError::Spec(SpecError::Guest).into()),
            (guest, _) => guest.clone(),
        };
        let spec = Spec {
            guest,
            kernel: args.kernel.clone(),
            initrd: args.initrd.clone(),
            memory_mib: args.memory,
            vcpus: args.vcpus,
            cpu: args.cpu,
            command_line: args.command_line.clone(),
            network: !args.no_network,
            transport: args.transport,
            replicate: args.replicate.into(),
            preempt: args.preempt,
            clock: args.clock,
            same_host: args.same_host,
            disk: args.disk.clone(),
        };
        let name = &args.name;
        self.access
            .create(name, &spec, !args.unprotected, !args.stopped)?;
        if args.stopped {
            println!("{name}: created, and off");
            return Ok(());
        }
        self.until_it_runs(name)
    }

    fn list(&self, json: bool) -> Result<(), Failure> {
        let site = self.access.read()?;
        match json {
            true => println!("{}", shown::machines_json(&site)),
            false => print!("{}", shown::machines(&site, shown::paint())),
        }
        Ok(())
    }

    fn show(&self, name: &str, json: bool) -> Result<(), Failure> {
        let site = self.access.read()?;
        let vm = site.vms.get(name);
        let vm = vm.ok_or_else(|| SiteError::Unknown(name.to_owned()))?;
        match json {
            true => println!("{}", shown::machine_json(&site, &vm.value)),
            false => print!("{}", shown::machine(&site, &vm.value, shown::paint())),
        }
        Ok(())
    }

    fn hosts(&self, json: bool) -> Result<(), Failure> {
        let site = self.access.read()?;
        match json {
            true => {
                let all = site
                    .hosts
                    .values()
                    .map(|host| shown::host_json(&site, &host.value));
                println!("{}", Value::Array(all.collect()));
            }
            false => print!("{}", shown::hosts(&site, shown::paint())),
        }
        Ok(())
    }

    fn protect(&self, name: &str, protect: bool) -> Result<(), Failure> {
        self.access.change(name, |_, vm| {
            vm.protect = protect;
            vm.failures.clear();
            Ok(())
        })?;
        let runs = |site: &Site| {
            let vm = site.vms.get(name);
            vm.is_some_and(|vm| vm.value.phase == Phase::Running)
        };
        if !runs(&self.access.read()?) {
            println!("{name}: noted, for when it runs");
            return Ok(());
        }
        match protect {
            true => self.until_it_runs(name),
            false => self.until(name, "unprotected", |site| {
                Ok(stands(site, name) == Some(Standing::Unprotected))
            }),
        }
    }

    fn switch(&self, name: &str) -> Result<(), Failure> {
        let within = self.within.max(Duration::from_secs(1));
        let said = self.access.order(name, Verb::Switch, within)?;
        println!("{name}: {said}");
        Ok(())
    }

    fn drain(&self, name: &str, until_boot: bool) -> Result<(), Failure> {
        self.access.drain(name, until_boot)?;
        let mut last = Left::default();
        let done = self.access.until(self.within, |site| {
            let host = site.hosts.get(name);
            let host = host.ok_or_else(|| SiteError::UnknownHost(name.to_owned()))?;
            last = site::left(site, &host.value, hypervisor::agent::unix_ms())?;
            Ok(last.is_done())
        })?;
        for (machine, why) in &last.stays {
            println!("{machine}: its backup stays until host {name} is off ({why})");
        }
        if done {
            println!("host {name}: drained");
            return Ok(());
        }
        let (served, followed) = (last.served.join(", "), last.followed.join(", "));
        let none = |names: String| match names.is_empty() {
            true => "none".to_owned(),
            false => names,
        };
        Err(Failure::new(
            Failure::ERROR,
            format!(
                "host {name} is not empty within {} s: it serves {}, and has a backup of {}; they leave when they can (doppel vm show NAME says what \
                 is missing), and it is given nothing more until doppel vm undrain {name}",
                self.within.as_secs(),
                none(served),
                none(followed)
            ),
        ))
    }

    fn start(&self, args: &StartArgs) -> Result<(), Failure> {
        let of = args.disk_of.as_deref();
        self.access.change(&args.name, |site, vm| {
            site::start(site, vm, args.cold_start, of)
        })?;
        self.until_it_runs(&args.name)
    }

    fn stop(&self, name: &str, lost: bool) -> Result<(), Failure> {
        self.access.change(name, |site, vm| {
            if lost && !site.is_anywhere(name) {
                vm.phase = Phase::Stopped;
                vm.backup = None;
                return Ok(());
            }
            site::stop(site, vm);
            Ok(())
        })?;
        self.until(name, "off", |site| {
            Ok(site.vms.get(name).is_none_or(|vm| vm.value.phase.is_off()))
        })
    }

    fn delete(&self, name: &str) -> Result<(), Failure> {
        let deleted = self.access.delete(name)?;
        let Some(deleted) = deleted.filter(|_| !self.within.is_zero()) else {
            println!("{name}: deleted");
            return Ok(());
        };
        let (mut there, mut away) = (Vec::new(), Vec::new());
        self.access.until(self.within, |site| {
            let left = site.deleted.get(&deleted.instance);
            let hosts = left.into_iter().flat_map(|left| left.value.hosts.clone());
            (there, away) = hosts.partition(|host| site.hosts.contains_key(host));
            Ok(there.is_empty())
        })?;
        if !there.is_empty() {
            let hosts = there.join(", ");
            return Err(Failure::new(
                Failure::ERROR,
                format!(
                    "machine {name} is deleted, and its disk is not yet removed on {hosts}: the agents there say why"
                ),
            ));
        }
        match &*away {
            [] => println!("{name}: deleted"),
            away => println!(
                "{name}: deleted; its disk on {} is removed when that is back",
                away.join(", ")
            ),
        }
        Ok(())
    }

    /// Until it is served, and protected if it is to be.
    fn until_it_runs(&self, name: &str) -> Result<(), Failure> {
        let protect = |site: &Site| site.vms.get(name).is_some_and(|vm| vm.value.protect);
        let to_be = match protect(&self.access.read()?) {
            true => "protected",
            false => "running",
        };
        self.until(name, to_be, |site| {
            let Some(vm) = site.vms.get(name) else {
                return Err(SiteError::Unknown(name.to_owned()));
            };
            if let Phase::Failed { why } = &vm.value.phase {
                return Err(SiteError::Refused(format!(
                    "machine {name} cannot be started: {why}"
                )));
            }
            Ok(match stands(site, name) {
                Some(Standing::Protected) => true,
                Some(_) => !vm.value.protect,
                None => false,
            })
        })
    }

    /// Says what has become of it, once it has.
    fn until(
        &self,
        name: &str,
        to_be: &str,
        is_there: impl FnMut(&Site) -> Result<bool, SiteError>,
    ) -> Result<(), Failure> {
        if self.within.is_zero() {
            println!("{name}: to be {to_be}");
            return Ok(());
        }
        if self.access.until(self.within, is_there)? {
            println!("{name}: {to_be}");
            return Ok(());
        }
        let site = self.access.read()?;
        let note = site.vms.get(name).and_then(|vm| vm.value.note.clone());
        let note = note.map_or_else(String::new, |note| format!(" ({note})"));
        Err(Failure::new(
            Failure::ERROR,
            format!(
                "machine {name} is not {to_be} within {} s{note}; it will be when it can: doppel vm show {name}",
                self.within.as_secs()
            ),
        ))
    }
}

/// How whoever serves a machine stands.
fn stands(site: &Site, name: &str) -> Option<Standing> {
    let (_, role) = site.serving(name)?;
    role.says.map(|says| says.standing)
}
