//! What every command that has a machine takes, and `doppel run`.

use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use hypervisor::boot::linux::SEED_BYTES;
use hypervisor::config::{Config, Disk, GuestCpu, Mac, MetricsAddress, NetBackend};
use hypervisor::machine::{ClockSource, MachineSpec, OnReset, exact_line};
use hypervisor::preempt::Strategy;
use hypervisor::prepare::counts_clock_reads;
use hypervisor::record::{RecordError, random_source};
use hypervisor::session::host::Inherited;
use hypervisor::session::solo;

use super::{Failure, figures};

/// The machine.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Configuration file; options override it
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// kv, compute, irq, clock, memory, disk, or an ELF file (docs/guest-abi.md says what it must be)
    #[arg(long, value_name = "GUEST")]
    guest: Option<String>,
    /// Boot this Linux kernel, a vmlinux or a bzImage (docs/linux.md says how to prepare one for replay)
    #[arg(long, value_name = "FILE", conflicts_with = "guest")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Where a Linux guest reads the time: at a port, each read an exit, or in a page of its memory, which needs a kernel that
    /// this release has prepared, --preempt checkpoint or --replicate checkpoint [default: page with the first and the last]
    #[arg(long, value_name = "timer|page", value_parser = clock)]
    clock: Option<ClockSource>,
    /// A Linux guest's CPU: one that can be replayed, or the host's with KVM's own interrupt controller [default: host with
    /// --replicate checkpoint or more than one vCPU]
    #[arg(long, value_name = "replayable|host", value_parser = cpu)]
    cpu: Option<GuestCpu>,
    /// vCPUs of a Linux guest, 1 to 8; several only without replay (run, or --replicate checkpoint)
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u8>,
    /// When the guest resets the machine it starts anew (the default), or ends as by a power-off
    #[arg(long, value_name = "reboot|end", value_parser = on_reset)]
    on_reset: Option<OnReset>,
    /// Guest memory in MiB, 2 to 3072
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// The guest's command line, such as "ip=10.77.0.2/24 maxmemory=32m"; a Linux kernel gets it after words of ours
    #[arg(long, alias = "cmdline", value_name = "WORDS")]
    command_line: Option<String>,
    /// The machine's name, by which the arbiter knows it
    #[arg(long)]
    name: Option<String>,
    /// Which machine of this name it is, where names are given again: two sides that say another one are no pair
    #[arg(long, value_name = "TEXT")]
    instance: Option<String>,
    /// Use this TAP interface for the guest's network
    #[arg(long, value_name = "NAME", conflicts_with = "link")]
    tap: Option<String>,
    /// Use this Unix socket for the guest's network, one message a frame
    #[arg(long, value_name = "SOCKET")]
    link: Option<PathBuf>,
    /// The guest's address on its link, such as 02:d0:99:e1:00:02: machines of one network need one each
    #[arg(long, value_name = "MAC")]
    mac: Option<Mac>,
    /// Give the guest a disk with this image, a file or a block device; of a pair each side has an image of its own, or both have one
    /// (shared, docs/disks.md)
    #[arg(
        long,
        value_name = "FILE[,replicated|,shared][,reservations][,read-only]"
    )]
    disk: Option<Disk>,
    /// Write the guest's console to this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// What happens when something is due for a guest that does not exit: it waits for an exit, or a checkpoint stops it
    /// (the primary's choice is the machine's: who takes over goes on with it)
    #[arg(long, value_name = "exit|checkpoint", value_parser = strategy)]
    preempt: Option<Strategy>,
    /// CPUs for the vCPU thread, such as 0 or 0,1
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    vcpu_cpus: Option<Vec<usize>>,
    /// CPUs for the I/O thread
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    io_cpus: Option<Vec<usize>>,
    /// Directory for this role's control socket, by which doppel status and doppel top find it [default:
    /// $XDG_RUNTIME_DIR/doppel, or /run/doppel]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Serve metrics for Prometheus there; a port alone is for this host only
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    metrics: Option<MetricsAddress>,
    /// Run this at each change of role, by sh -c, with DOPPEL_EVENT, DOPPEL_ROLE, DOPPEL_EPOCH... in its environment
    #[arg(long, value_name = "COMMAND")]
    hook: Option<String>,
    /// Report as JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// An open descriptor for the guest's network, left by the parent process
    #[arg(long, hide = true, value_name = "FD")]
    net_fd: Option<RawFd>,
    /// An open descriptor of /dev/kvm, left by the parent process
    #[arg(long, hide = true, value_name = "FD")]
    kvm_fd: Option<RawFd>,
}

pub fn clock(text: &str) -> Result<ClockSource, String> {
    match text {
        "timer" => Ok(ClockSource::Timer),
        "page" => Ok(ClockSource::Page),
        _ => Err("choose timer or page".into()),
    }
}

pub fn cpu(text: &str) -> Result<GuestCpu, String> {
    match text {
        "replayable" => Ok(GuestCpu::Replayable),
        "host" => Ok(GuestCpu::Host),
        _ => Err("choose replayable or host".into()),
    }
}

fn on_reset(text: &str) -> Result<OnReset, String> {
    match text {
        "reboot" => Ok(OnReset::Reboot),
        "end" => Ok(OnReset::End),
        _ => Err("choose reboot or end".into()),
    }
}

pub fn strategy(text: &str) -> Result<Strategy, String> {
    match text {
        "exit" => Ok(Strategy::Exit),
        "checkpoint" => Ok(Strategy::Checkpoint),
        _ => Err("choose exit or checkpoint".into()),
    }
}

impl MachineArgs {
    /// The configuration: defaults, then the file, then the options, these and the command's own; checked as a whole.
    pub fn config(&self, own: impl FnOnce(&mut Config)) -> Result<Config, Failure> {
        let usage = |error| Failure::new(Failure::USAGE, error);
        let mut config = match &self.config {
            Some(path) => Config::read(path).map_err(usage)?,
            None => Config::default(),
        };
        let set = |to: &mut String, from: &Option<String>| {
            if let Some(from) = from {
                to.clone_from(from);
            }
        };
        set(&mut config.guest, &self.guest);
        set(&mut config.command_line, &self.command_line);
        set(&mut config.name, &self.name);
        if self.instance.is_some() {
            config.instance.clone_from(&self.instance);
        }
        if self.kernel.is_some() {
            config.kernel.clone_from(&self.kernel);
        }
        config.clock = self.clock.or(config.clock);
        config.cpu = self.cpu.or(config.cpu);
        config.vcpus = self.vcpus.unwrap_or(config.vcpus);
        config.on_reset = self.on_reset.unwrap_or(config.on_reset);
        if self.initrd.is_some() {
            config.initrd.clone_from(&self.initrd);
        }
        if let Some(memory) = self.memory {
            config.memory_mib = memory;
        }
        if let Some(tap) = &self.tap {
            config.net.backend = NetBackend::Tap;
            config.net.tap = Some(tap.clone());
        }
        if let Some(link) = &self.link {
            config.net.backend = NetBackend::Link;
            config.net.link = Some(link.clone());
        }
        config.net.mac = self.mac.or(config.net.mac);
        if let Some(disk) = &self.disk {
            config.disk = std::mem::take(&mut config.disk).with_image_of(disk);
        }
        if self.console.is_some() {
            config.console.clone_from(&self.console);
        }
        if self.run_dir.is_some() {
            config.run_dir.clone_from(&self.run_dir);
        }
        config.metrics = self.metrics.or(config.metrics);
        if self.hook.is_some() {
            config.hook.clone_from(&self.hook);
        }
        if let Some(strategy) = self.preempt {
            config.preempt.strategy = strategy;
        }
        if let Some(cpus) = &self.vcpu_cpus {
            config.cpus.vcpu.clone_from(cpus);
        }
        if let Some(cpus) = &self.io_cpus {
            config.cpus.io.clone_from(cpus);
        }
        own(&mut config);
        config.check().map_err(usage)?;
        Ok(config)
    }

    /// Descriptors from the parent process.
    pub fn inherited(&self) -> Inherited {
        Inherited {
            net: self.net_fd,
            kvm: self.kvm_fd,
        }
    }
}

/// The machine that a configuration describes, starting now.
pub fn spec(config: &Config) -> Result<MachineSpec, Failure> {
    let mut spec = without_address(config)?;
    if let Some(Mac(mac)) = config.net.mac {
        spec.mac = mac;
    }
    Ok(spec)
}

fn without_address(config: &Config) -> Result<MachineSpec, Failure> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let usage = |error| Failure::new(Failure::USAGE, error);
    let (on_reset, preempted) = (config.on_reset, config.preempt.by_checkpoint());
    let Some(kernel) = &config.kernel else {
        let spec = MachineSpec::new(&config.guest, config.memory_mib, &config.command_line, now);
        let spec = spec.map_err(usage)?;
        return Ok(spec.on_reset(on_reset).preempted(preempted));
    };
    let mut seed = [0; SEED_BYTES];
    random_source()
        .and_then(|mut source| source.read_exact(&mut seed).map_err(RecordError::Random))
        .map_err(|error| Failure::new(Failure::ERROR, error))?;
    let mut spec = MachineSpec::linux(
        kernel,
        config.initrd.as_deref(),
        config.memory_mib,
        &config.command_line,
        now,
        seed,
    )
    .map_err(usage)?;
    let clock = config
        .clock_source(counts_clock_reads(&spec.image))
        .map_err(|error| Failure::new(Failure::USAGE, error))?;
    spec.command_line = exact_line(&spec.command_line, clock, config.crew());
    Ok(spec
        .with_clock(clock)
        .with_vcpus(config.crew())
        .on_reset(on_reset)
        .preempted(preempted))
}

/// Run a machine unprotected, for comparison
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  doppel run --guest compute --command-line reports=3\n  doppel run --guest my.elf --memory 16\n  doppel run --kernel vmlinuz --initrd initrd.img --memory 256"
)]
pub struct RunArgs {
    #[command(flatten)]
    machine: MachineArgs,
}

pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let config = args.machine.config(|_| ())?;
    let (ended, exits) = solo::run(
        &config,
        &args.machine.inherited(),
        &spec(&config)?,
        args.machine.json,
    )?;
    if args.machine.json {
        println!(
            "{}",
            serde_json::json!({"event": "exits", "exits": figures::exits(&exits)})
        );
    }
    super::guest_ended(ended)
}
