//! Machines to measure: alone, recorded, or as a pair, with a network between them and the demo's client.
//!
//! Unsafe code lives here for one call in the child before it becomes `doppel` (the kernel is asked to end it with this
//! program) and for sending it a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::NetPort;
use hypervisor::backends::link;
use hypervisor::backends::tap::{Ipv4Network, TapConfig};
use hypervisor::config::Transport;
use hypervisor::control::find::ask_process;
use hypervisor::demo::client::{self, Client, Outcome};
use hypervisor::demo::gateway::{self, Gateway, LinkHost};
use hypervisor::demo::namespace::{self, Namespace};
use hypervisor::demo::pair::{Pair, PairSpec, Placement};
use hypervisor::intervals::Ends;
use hypervisor::session::host::MTU;
use tempfile::TempDir;

const HOST: Ipv4Network = Ipv4Network {
    address: Ipv4Addr::new(10, 77, 0, 1),
    prefix: 24,
};
const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379);
/// Guest memory in MiB: the demo's default.
const MEMORY_MIB: u32 = 64;
/// A machine's name where none is given.
const MACHINE: &str = "machine";
/// How long a machine may take to end once it was asked to.
const END_WITHIN: Duration = Duration::from_secs(10);

/// The `doppel` beside this program, or where `DOPPEL` says.
///
/// # Errors
/// If it is not there.
pub fn doppel() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("DOPPEL") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("find this program's own file")?;
    own.ancestors()
        .skip(1)
        .map(|directory| directory.join("doppel"))
        .find(|path| path.is_file())
        .context("no doppel beside this program: run `cargo build --release --workspace` first")
}

/// The cable: a TAP in a namespace of its own, or the Unix-socket link where the host allows none.
#[derive(Debug)]
pub struct Network {
    port: NetPort,
    address: SocketAddrV4,
    /// `tap` or `link`.
    pub kind: &'static str,
    _keep: (Option<Namespace>, Option<Gateway>),
}

impl Network {
    /// Must be called while the process has one thread: see [`namespace::enter`].
    ///
    /// # Errors
    /// If there is neither.
    pub fn set_up() -> Result<Self> {
        let tap = TapConfig {
            name: "doppel0".into(),
            address: Some(HOST),
            mtu: MTU,
        };
        match namespace::enter(&tap) {
            Ok(entered) => Ok(Self {
                port: entered.tap.into_port(),
                address: GUEST,
                kind: "tap",
                _keep: (Some(entered.namespace), None),
            }),
            Err(refused) => {
                eprintln!("bench: no TAP here ({refused}); using the Unix-socket link");
                Self::over_link()
            }
        }
    }

    fn over_link() -> Result<Self> {
        let (ours, guests) = link::pair()?;
        let host = LinkHost {
            address: HOST,
            mac: [0x02, 0xd0, 0x99, 0xe1, 0, 2],
            mtu: MTU,
        };
        let gateway = Gateway::over_link(gateway::bind(0)?, ours, host, GUEST)?;
        Ok(Self {
            port: guests,
            address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, gateway.address().port()),
            kind: "link",
            _keep: (None, Some(gateway)),
        })
    }

    /// The guest's end of it.
    #[must_use]
    pub fn port(&self) -> &NetPort {
        &self.port
    }

    /// Where the guest serves.
    #[must_use]
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// A client of the machine that is on the cable now; a seed must not be used twice on one machine.
    ///
    /// # Errors
    /// If the guest does not serve.
    pub fn client(&self, connections: usize, rate: Option<f64>, seed: u64) -> Result<Client> {
        let config = client::Config {
            connections,
            rate,
            ..client::Config::new(self.address, seed)
        };
        Ok(client::start(config)?)
    }

    /// Runs a client for a while.
    ///
    /// # Errors
    /// If the guest does not serve, or serves wrongly: a figure of such a run would say nothing.
    pub fn load(
        &self,
        connections: usize,
        rate: Option<f64>,
        seed: u64,
        time: Duration,
    ) -> Result<Outcome> {
        let client = self.client(connections, rate, seed)?;
        std::thread::sleep(time);
        let outcome = client.stop()?;
        ensure!(
            outcome.wrong_replies == 0 && outcome.broken_connections == 0 && outcome.refused == 0,
            "the guest served wrongly: {}",
            outcome.problems.join("; ")
        );
        Ok(outcome)
    }
}

/// How a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `doppel run`: nobody protects it.
    Run,
    /// `doppel record` into memory: the ring is filled and drained, and nobody replays.
    Record,
    /// `doppel record` to nowhere: as above, and what is drained and found right is not kept. Memory that the host has not touched lately
    /// costs several microseconds a page here, which is no part of protecting: a backup's ring is used again and again.
    Drain,
    /// A primary and a backup, the log in memory that they share.
    Pair,
    /// A primary and a backup, the log over TCP.
    PairTcp,
    /// A primary and a backup that gets checkpoints, over this, whose intervals end like this.
    Checkpoint(Transport, Ends),
}

impl Mode {
    /// Its name in figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Record | Self::Drain => "record",
            Self::Pair => "pair",
            Self::PairTcp => "pair-tcp",
            Self::Checkpoint(..) => "checkpoint",
        }
    }
}

/// A running machine; ended when dropped.
#[derive(Debug)]
pub struct Guest {
    directory: TempDir,
    running: Running,
    mode: Mode,
}

#[derive(Debug)]
enum Running {
    Alone(Alone),
    Pair(Box<Pair>),
}

impl Guest {
    /// Starts one, on the cable if there is one. All modes give the vCPU and the I/O thread of the machine that serves the
    /// same cores.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(mode: Mode, guest: &str, words: &str, network: Option<&Network>) -> Result<Self> {
        Self::start_with(mode, guest, words, network, None)
    }

    /// The same, with a disk of so many bytes, an image for each side.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_with(
        mode: Mode,
        guest: &str,
        words: &str,
        network: Option<&Network>,
        disk: Option<u64>,
    ) -> Result<Self> {
        let directory = in_memory()?;
        let image = |side: &str| directory.path().join(format!("{side}.disk"));
        let mut more = Vec::new();
        if let Some(bytes) = disk {
            for side in ["primary", "backup", "alone"] {
                let file = File::create(image(side)).context("make a disk's image")?;
                file.set_len(bytes).context("make a disk's image")?;
            }
            more = vec![
                "--disk".to_owned(),
                image("{side}").to_string_lossy().into_owned(),
            ];
        }
        let mut command_line = words.to_owned();
        if network.is_some() {
            command_line = format!(
                "ip={}/{} gw={} {words}",
                GUEST.ip(),
                HOST.prefix,
                HOST.address
            );
        }
        let port = network.map(|network| &network.port);
        let running = match mode {
            Mode::Pair | Mode::PairTcp | Mode::Checkpoint(..) => {
                if let Mode::Checkpoint(_, ends) = mode {
                    let interval = match ends {
                        Ends::Output => "output",
                        Ends::Fixed => "fixed",
                    };
                    let words = ["--replicate", "checkpoint", "--interval", interval];
                    more.extend(words.map(str::to_owned));
                }
                let spec = PairSpec {
                    transport: match mode {
                        Mode::PairTcp => Transport::Tcp,
                        Mode::Checkpoint(transport, _) => transport,
                        _ => Transport::Shm,
                    },
                    arbiter: None,
                    doppel: doppel()?,
                    directory: directory.path().to_owned(),
                    guest: guest.to_owned(),
                    memory_mib: MEMORY_MIB,
                    command_line,
                    // Comparing whole memories is a check of the demo's, not a part of protecting.
                    memory_check_ms: 0,
                    kvm: None,
                    more,
                };
                Running::Pair(Box::new(Pair::start(&spec, port)?))
            }
            Mode::Run | Mode::Record | Mode::Drain => Running::Alone(Alone::start(
                mode,
                directory.path(),
                guest,
                &command_line,
                port,
                &more,
            )?),
        };
        Ok(Self {
            directory,
            running,
            mode,
        })
    }

    /// What the guest has written to its console.
    #[must_use]
    pub fn console(&self) -> String {
        let name = match self.mode {
            Mode::Pair | Mode::PairTcp | Mode::Checkpoint(..) => "primary.console",
            Mode::Run | Mode::Record | Mode::Drain => "console",
        };
        // Not there yet is as good as empty.
        let bytes = std::fs::read(self.directory.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Time on a processor that the process which serves has had, all its threads together.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn cpu_time(&self) -> Result<Duration> {
        let pid = match &self.running {
            Running::Alone(alone) => alone.child.id(),
            Running::Pair(pair) => pair.primary.pid(),
        };
        Ok(threads(pid)?.values().sum())
    }

    /// Time on a processor that each thread has had, by process and name.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn cpu_times(&self) -> Result<BTreeMap<String, Duration>> {
        let processes = match &self.running {
            Running::Alone(alone) => vec![(self.mode.name(), alone.child.id())],
            Running::Pair(pair) => vec![
                ("primary", pair.primary.pid()),
                ("backup", pair.backup.pid()),
            ],
        };
        let mut all = BTreeMap::new();
        for (process, pid) in processes {
            for (name, time) in threads(pid)? {
                *all.entry(format!("{process}: {name}")).or_default() += time;
            }
        }
        Ok(all)
    }

    /// Bytes that were posted to both lanes of a pair's log so far, with every entry's header.
    ///
    /// # Errors
    /// If the primary does not answer.
    pub fn logged(&self) -> Result<Option<f64>> {
        let Running::Pair(pair) = &self.running else {
            return Ok(None);
        };
        let run = self.directory.path().join("run");
        let status = ask_process(&run, MACHINE, pair.primary.pid()).context("ask the primary")?;
        let totals = status.totals;
        // Frames for the guest are entries of the other lane.
        let headers = (totals.entries + totals.frames) * rdma_log::entry::HEADER_LEN as f64;
        Ok(Some(totals.entry_bytes + totals.frame_bytes + headers))
    }

    /// SIGKILL for the process that serves, and reaped.
    pub fn kill_serving(&mut self) {
        match &mut self.running {
            Running::Alone(alone) => alone.kill(),
            Running::Pair(pair) => pair.primary.kill(),
        }
    }

    /// The pair, if it is one.
    #[must_use]
    pub fn pair(&self) -> Option<&Pair> {
        match &self.running {
            Running::Pair(pair) => Some(pair),
            Running::Alone(_) => None,
        }
    }

    /// Where a recording is written.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// Ends it in good order; the directory lives as long as what is returned.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(self) -> Result<TempDir> {
        match self.running {
            Running::Alone(mut alone) => alone.end()?,
            Running::Pair(mut pair) => {
                // The primary first: a backup that went first would be reported as a loss.
                pair.primary.stop(END_WITHIN);
                pair.backup.stop(END_WITHIN);
            }
        }
        Ok(self.directory)
    }
}

/// Time on a processor of each thread of a process, by name; the first is the one that does the I/O.
fn threads(pid: u32) -> Result<BTreeMap<String, Duration>> {
    let tasks =
        std::fs::read_dir(format!("/proc/{pid}/task")).context("list a machine's threads")?;
    let mut all = BTreeMap::new();
    for task in tasks {
        let task = task?.path();
        let read = |name: &str| {
            let path = task.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let text = read("schedstat")?;
        let first = text.split(' ').next().unwrap_or_default();
        let nanos = first
            .parse::<u64>()
            .with_context(|| format!("understand {text:?} of {}", task.display()))?;
        let name = match task.ends_with(pid.to_string()) {
            true => "I/O".to_owned(),
            false => read("comm")?.trim().to_owned(),
        };
        *all.entry(name).or_default() += Duration::from_nanos(nanos);
    }
    Ok(all)
}

/// Has the kernel end a child with the thread that starts it.
pub fn end_with_us(command: &mut Command) {
    // SAFETY: prctl with PR_SET_PDEATHSIG touches no memory and is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

/// A directory on a file system in memory where there is one, so that a disk's pace is not measured.
///
/// # Errors
/// If there is no room for one.
pub fn in_memory() -> Result<TempDir> {
    let shared_memory = Path::new("/dev/shm");
    let builder = &mut tempfile::Builder::new();
    builder.prefix("doppel-bench-");
    let made = if shared_memory.is_dir() {
        builder.tempdir_in(shared_memory)
    } else {
        builder.tempdir()
    };
    made.context("make a directory")
}

/// A machine of one process.
#[derive(Debug)]
struct Alone {
    child: Child,
    errors: PathBuf,
}

impl Alone {
    fn start(
        mode: Mode,
        directory: &Path,
        guest: &str,
        command_line: &str,
        port: Option<&NetPort>,
        more: &[String],
    ) -> Result<Self> {
        let [vcpu, io] = Placement::of_this_machine().primary;
        let errors = directory.join("stderr");
        let mut command = Command::new(doppel()?);
        command
            .args([
                mode.name(),
                "--json",
                "--guest",
                guest,
                "--command-line",
                command_line,
            ])
            .args(["--memory", &MEMORY_MIB.to_string()])
            .args([
                "--vcpu-cpus",
                &vcpu.to_string(),
                "--io-cpus",
                &io.to_string(),
            ])
            .arg("--console")
            .arg(directory.join("console"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).context("create a file for messages")?);
        command.args(more.iter().map(|word| word.replace("{side}", "alone")));
        match mode {
            Mode::Record => command.arg("--out").arg(directory.join("log")),
            Mode::Drain => command.arg("--out").arg("/dev/null"),
            _ => &mut command,
        };
        // Kept until the child has its own.
        let inheritable: Option<OwnedFd> = port
            .map(NetPort::inheritable)
            .transpose()
            .context("share the network port")?;
        if let Some(fd) = &inheritable {
            command.args(["--net-fd", &fd.as_raw_fd().to_string()]);
        }
        end_with_us(&mut command);
        let child = command.spawn().context("start doppel")?;
        Ok(Self { child, errors })
    }

    fn end(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the machine ended by itself: {status}: {}", self.messages());
        }
        let pid = libc::pid_t::try_from(self.child.id()).context("a process id")?;
        // SAFETY: kill touches no memory. The child is ours and not yet reaped, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let until = Instant::now() + END_WITHIN;
        while self.child.try_wait()?.is_none() {
            ensure!(
                Instant::now() < until,
                "the machine did not end: {}",
                self.messages()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn kill(&mut self) {
        // Both fail only for a child that was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn messages(&self) -> String {
        let mut text = String::new();
        // A message that cannot be read is left out of a message.
        let _ = File::open(&self.errors).and_then(|mut file| file.read_to_string(&mut text));
        text
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.kill();
    }
}
