//! The lab: real Linux hosts as QEMU virtual machines in software emulation, joined by cables that can be cut.
//!
//! ```text
//!  scripts/lab, a promise          the supervisor's process                     a host
//!  ──────────────────────          ────────────────────────                     ──────
//!  Lab, Host, Session ──control──▶ supervisor ──virtio-serial───────────────▶ agent ─▶ commands
//!                                  cables: switch ◀──frames of eth0, eth1──▶ the stock kernel, rxe0 on eth0, kvm_amd
//!                                  shared/ ◀──────────9p────────────────────▶ /shared
//! ```
//! `docs/lab.md` says how it is used, what is in a host, and what it measures.
//! Unsafe code lives in [`process`], [`cables`] and [`tsc`] only, for a few calls that the standard library does not have.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::control::{Reply, Request, Status};
use self::qemu::HostSpec;
use self::session::Session;
use self::supervisor::Plan;
use self::switch::Trouble;

pub mod agent;
pub mod cables;
pub mod control;
pub mod cpio;
pub mod image;
pub mod modules;
pub mod packages;
pub mod ping;
pub mod plug;
pub mod process;
pub mod qemu;
pub mod session;
pub mod supervisor;
pub mod switch;
pub mod tsc;
pub mod wire;

/// Networks that join the hosts: `eth0` and `eth1` of each.
pub const NETWORKS: u8 = 2;

/// The most hosts of one lab.
pub const MOST_HOSTS: u8 = 9;

/// The supervisor's socket, in the lab's directory.
pub const CONTROL: &str = "control.sock";

/// What the supervisor runs, in the lab's directory.
pub const PLAN: &str = "plan.json";

/// How long anything else than a boot or a command may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(40);

/// A lab to bring up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its name: labs of different names do not meet.
    pub name: String,
    /// How many hosts it has: `h1` and so on.
    pub hosts: u8,
    /// MiB of memory of each.
    pub memory_mib: u32,
    /// Virtual CPUs of each. The emulator is not to be trusted with more than one that run at the same time (`docs/lab.md`).
    pub cpus: u8,
    /// The largest packet on the cables, in bytes.
    pub mtu: u16,
    /// How long a host may take to boot.
    pub boot_within: Duration,
    /// Packages of Debian's: with any, a host is a whole Debian with them, under systemd.
    pub packages: Vec<String>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            name: "lab".into(),
            hosts: 2,
            memory_mib: 1536,
            cpus: 1,
            mtu: 1500,
            // A boot takes 8 s on an idle machine; hosts boot together, and the machine may be busy.
            boot_within: Duration::from_secs(180),
            packages: Vec::new(),
        }
    }
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
    /// The supervisor, if the lab ends with this value.
    owned: Option<(Child, Option<ChildStdin>)>,
}

impl Lab {
    /// Brings one up that stays until [`Lab::down`], whoever ends.
    ///
    /// # Errors
    /// If it cannot be made, or a host does not come up; nothing stays then but logs.
    pub fn up(spec: &Spec) -> Result<Self> {
        let (mut lab, child, _) = Self::start(spec, false)?;
        lab.settle(spec, child)?;
        lab.owned = None;
        Ok(lab)
    }

    /// Brings one up that ends with the value, or with this process.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn own(spec: &Spec) -> Result<Self> {
        let (mut lab, mut child, _) = Self::start(spec, true)?;
        let stdin = child.stdin.take();
        lab.settle(spec, child)?;
        if let Some((_, kept)) = &mut lab.owned {
            *kept = stdin;
        }
        Ok(lab)
    }

    /// The lab of this name, if it is up.
    ///
    /// # Errors
    /// If it is not.
    pub fn find(name: &str) -> Result<Self> {
        let lab = Self {
            directory: directory(name)?,
            owned: None,
        };
        lab.connect().with_context(|| {
            format!("there is no lab {name:?}: scripts/lab --name {name} up makes it")
        })?;
        Ok(lab)
    }

    fn start(spec: &Spec, owned: bool) -> Result<(Self, Child, Instant)> {
        ensure!(
            (1..=MOST_HOSTS).contains(&spec.hosts),
            "a lab has 1 to {MOST_HOSTS} hosts"
        );
        let program = program()?;
        let directory = directory(&spec.name)?;
        ensure!(
            Self::find(&spec.name).is_err(),
            "the lab {:?} is up already: scripts/lab --name {} down ends it",
            spec.name,
            spec.name
        );
        enough_memory(spec)?;
        let image = made_image(&spec.packages)?;
        // Logs of an earlier lab of this name would be taken for its.
        let gone = fs::remove_dir_all(&directory);
        if let Err(error) = gone
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("remove {}", directory.display()));
        }
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let plan = Plan {
            hosts: (1..=spec.hosts)
                .map(|number| HostSpec {
                    number,
                    memory_mib: spec.memory_mib,
                    cpus: spec.cpus,
                    mtu: spec.mtu,
                })
                .collect(),
            kernel: image.kernel,
            initramfs: image.initramfs,
            boot_within: spec.boot_within.as_secs(),
        };
        let text = serde_json::to_string(&plan).context("write the plan")?;
        fs::write(directory.join(PLAN), text).context("write the plan")?;
        let log = File::create(directory.join("supervisor.log")).context("make the log")?;
        let mut command = Command::new(program);
        command
            .arg("supervise")
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log);
        if owned {
            command.arg("--owned").stdin(Stdio::piped());
        }
        let child = process::in_own_session(&mut command)
            .spawn()
            .context("start the lab's supervisor")?;
        let lab = Self {
            directory,
            owned: None,
        };
        Ok((lab, child, Instant::now()))
    }

    /// Waits until all hosts are up. From here on a failure takes the supervisor along.
    fn settle(&mut self, spec: &Spec, child: Child) -> Result<()> {
        self.owned = Some((child, None));
        let started = Instant::now();
        while self.connect().is_err() {
            let ended = match &mut self.owned {
                Some((child, _)) => child.try_wait().context("look at the supervisor")?,
                None => None,
            };
            if ended.is_some() || started.elapsed() > ANSWER_WITHIN {
                let log = fs::read_to_string(self.directory.join("supervisor.log"));
                bail!(
                    "the lab's supervisor did not start: {}",
                    log.unwrap_or_default().trim()
                );
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        for number in 1..=spec.hosts {
            self.ask(
                &Request::AwaitUp {
                    host: format!("h{number}"),
                },
                spec.boot_within + ANSWER_WITHIN,
            )?;
        }
        Ok(())
    }

    /// The lab's directory, with its logs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory that all hosts see as `/shared`.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.directory.join("shared")
    }

    /// Puts a program or library into `/shared/bin`, without what only debuggers want of it: a host that was just booted copies it
    /// from there faster than it can be put.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn share_program(&self, program: &Path) -> Result<()> {
        let what = || format!("share {}", program.display());
        let bytes = image::loaded(fs::read(program).with_context(what)?);
        let directory = self.shared().join("bin");
        fs::create_dir_all(&directory).with_context(what)?;
        let to = directory.join(program.file_name().with_context(what)?);
        fs::write(&to, bytes).with_context(what)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).with_context(what)
    }

    /// One of its hosts.
    #[must_use]
    pub fn host<'a>(&'a self, name: &str) -> Host<'a> {
        Host {
            lab: self,
            name: name.to_owned(),
        }
    }

    /// How things are.
    ///
    /// # Errors
    /// If the supervisor does not answer.
    pub fn status(&self) -> Result<Status> {
        match self.ask(&Request::Status, ANSWER_WITHIN)? {
            Reply::Status(status) => Ok(status),
            other => bail!("the supervisor answers {other:?}"),
        }
    }

    /// Makes something wrong with the cable from one host to another, in that direction, or right again.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn cable(&self, network: Option<u8>, from: &str, to: &str, trouble: Trouble) -> Result<()> {
        self.order(&Request::Cable {
            network,
            from: from.into(),
            to: to.into(),
            trouble,
        })
    }

    /// Cuts all cables between two hosts, both ways.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn partition(&self, one: &str, other: &str) -> Result<()> {
        let cut = Trouble {
            cut: true,
            ..Trouble::default()
        };
        self.cable(None, one, other, cut)?;
        self.cable(None, other, one, cut)
    }

    /// Plugs this machine into a network of the lab, as another card.
    ///
    /// # Errors
    /// If there is no such network.
    pub fn plug(&self, network: u8) -> Result<plug::Plug> {
        self.plug_in(network, None)
    }

    /// Shows every frame that a host sends on a network from now on.
    ///
    /// # Errors
    /// If there is no such host or network.
    pub fn watch(&self, host: &str, network: u8) -> Result<plug::Plug> {
        self.plug_in(network, Some(host.to_owned()))
    }

    fn plug_in(&self, network: u8, shown: Option<String>) -> Result<plug::Plug> {
        let request = Request::Plug { network, shown };
        let (_, reader) = self.open(&request, ANSWER_WITHIN)?;
        plug::Plug::new(reader)
    }

    /// Makes all cables sound.
    ///
    /// # Errors
    /// If the supervisor does not answer.
    pub fn heal(&self) -> Result<()> {
        self.order(&Request::Heal)
    }

    /// Ends it: no process of it is left when this returns, and no file but logs.
    ///
    /// # Errors
    /// If the supervisor does not end.
    pub fn down(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let mut stream = self.connect()?;
        say(&mut stream, &Request::Down)?;
        stream
            .set_read_timeout(Some(ANSWER_WITHIN))
            .context("limit the wait")?;
        let mut rest = Vec::new();
        // The supervisor closes it when all emulators have ended and their files are gone.
        std::io::Read::read_to_end(&mut stream, &mut rest)
            .context("the supervisor does not end; scripts/lab logs shows what it says")?;
        if let Some((mut child, _)) = self.owned.take() {
            child.wait().context("wait for the supervisor")?;
        }
        Ok(())
    }

    fn order(&self, request: &Request) -> Result<()> {
        self.ask(request, ANSWER_WITHIN).map(drop)
    }

    fn ask(&self, request: &Request, within: Duration) -> Result<Reply> {
        self.open(request, within).map(|(reply, _)| reply)
    }

    /// Asks, and keeps the connection.
    fn open(&self, request: &Request, within: Duration) -> Result<(Reply, BufReader<UnixStream>)> {
        let mut stream = self
            .connect()
            .context("the lab is not up: scripts/lab up makes it")?;
        say(&mut stream, request)?;
        stream
            .set_read_timeout(Some(within))
            .context("limit the wait")?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        let read = reader
            .read_line(&mut line)
            .with_context(|| format!("the lab's supervisor does not answer within {within:?}"))?;
        ensure!(read > 0, "the lab's supervisor has ended");
        match serde_json::from_str(&line).context("read the supervisor's answer")? {
            Reply::Refused(why) => bail!("{why}"),
            reply => Ok((reply, reader)),
        }
    }

    fn connect(&self) -> Result<UnixStream> {
        // A socket's path has at most 107 bytes, which the lab's own may well exceed; the way by the descriptor does not.
        let directory = File::open(&self.directory)
            .with_context(|| format!("open {}", self.directory.display()))?;
        let path = format!("/proc/self/fd/{}/{CONTROL}", directory.as_raw_fd());
        UnixStream::connect(path).context("reach the lab's supervisor")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned.is_some()
            && self.end().is_err()
            && let Some((mut child, _)) = self.owned.take()
        {
            // Its emulators die with it.
            let _ = child.kill();
            let _ = child.wait();
            let _ = remove_remains(&self.directory);
        }
    }
}

/// Removes what a supervisor that was killed has left in its lab's directory; nothing if it ended well.
///
/// # Errors
/// If something cannot be removed.
pub fn remove_remains(directory: &Path) -> Result<()> {
    let Ok(plan) = fs::read_to_string(directory.join(PLAN)) else {
        return Ok(());
    };
    let plan: Plan = serde_json::from_str(&plan).context("read the plan")?;
    supervisor::tidy(&plan, directory)
}

fn say(stream: &mut UnixStream, request: &Request) -> Result<()> {
    let mut line = serde_json::to_string(request).context("write a request")?;
    line.push('\n');
    stream
        .write_all(line.as_bytes())
        .context("ask the lab's supervisor")
}

/// A host of a lab.
#[derive(Clone, Debug)]
pub struct Host<'a> {
    lab: &'a Lab,
    name: String,
}

impl Host<'_> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host vanishes at once, as if its power had failed.
    ///
    /// # Errors
    /// If it is off.
    pub fn kill(&self) -> Result<()> {
        self.lab.order(&Request::Kill {
            host: self.name.clone(),
        })
    }

    /// Boots it again, and returns when it is up.
    ///
    /// # Errors
    /// If it is not off, or does not come up; the supervisor limits the time.
    pub fn start(&self) -> Result<()> {
        let request = Request::Start {
            host: self.name.clone(),
        };
        // The supervisor knows how long a boot may take, and answers by then.
        self.lab.ask(&request, Duration::from_secs(3600)).map(drop)
    }

    /// It stands still. Its clock goes on, as when a real machine stalls: when thawed it notices that time has passed.
    ///
    /// # Errors
    /// If it is not up.
    pub fn freeze(&self) -> Result<()> {
        self.lab.order(&Request::Freeze {
            host: self.name.clone(),
            clock_too: false,
        })
    }

    /// It stands still with its clock, as a virtual machine that is suspended: when thawed it does not notice.
    ///
    /// # Errors
    /// If it is not up.
    pub fn freeze_with_clock(&self) -> Result<()> {
        self.lab.order(&Request::Freeze {
            host: self.name.clone(),
            clock_too: true,
        })
    }

    /// It goes on.
    ///
    /// # Errors
    /// If it is not frozen.
    pub fn thaw(&self) -> Result<()> {
        self.lab.order(&Request::Thaw {
            host: self.name.clone(),
        })
    }

    /// Starts a command.
    ///
    /// # Errors
    /// If the host is not up, or the command cannot be started.
    pub fn session(&self, start: &wire::Start) -> Result<Session> {
        let request = Request::Run {
            host: self.name.clone(),
        };
        let (_, reader) = self.lab.open(&request, ANSWER_WITHIN)?;
        Session::begin(&self.name, reader, start)
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// If it cannot be run, the host vanishes, or the time is up. A code other than 0 is no error.
    pub fn run(&self, words: &[&str], limit: Duration) -> Result<session::Finished> {
        self.session(&wire::Start::new(words))?.finish(limit)
    }

    /// Runs a line of shell, and returns what it says.
    ///
    /// # Errors
    /// As [`Host::run`], and if its code is not 0, with what it says.
    pub fn sh(&self, line: &str, limit: Duration) -> Result<String> {
        let finished = self.run(&["sh", "-c", line], limit)?;
        ensure!(
            finished.code == 0,
            "{}: {line:?} ended with code {}: {}{}",
            self.name,
            finished.code,
            String::from_utf8_lossy(&finished.stdout),
            String::from_utf8_lossy(&finished.stderr)
        );
        Ok(String::from_utf8_lossy(&finished.stdout).into_owned())
    }

    /// Copies a file into the host, with its permissions; a name that ends in `/` is a directory.
    ///
    /// # Errors
    /// If it cannot be read here, or written there in time.
    pub fn put(&self, from: &Path, to: &str, limit: Duration) -> Result<()> {
        session::put(self, from, to, limit)
    }

    /// Copies a file out of the host, with its permissions.
    ///
    /// # Errors
    /// If it cannot be read there, or written here.
    pub fn get(&self, from: &str, to: &Path, limit: Duration) -> Result<()> {
        session::get(self, from, to, limit)
    }
}

/// Where build products go.
fn target() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().context("the workspace's directory")?;
    Ok(workspace.join("target"))
}

/// A directory for what was fetched, which is used again.
///
/// # Errors
/// If nobody knows where build products go.
pub fn cache(name: &str) -> Result<PathBuf> {
    Ok(target()?.join(name))
}

/// The directory of the lab of this name.
///
/// # Errors
/// If it is no name.
pub fn directory(name: &str) -> Result<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    ensure!(
        !name.is_empty() && name.bytes().all(plain),
        "{name:?} is no name of a lab: letters, digits, - and _ make one"
    );
    Ok(target()?.join("lab").join(name))
}

/// What hosts boot, made if it is not there.
///
/// # Errors
/// If a package cannot be had, or the archive not be written.
pub fn made_image(packages: &[String]) -> Result<image::Image> {
    let mut cache = "lab-cache".to_owned();
    for name in packages {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
        ensure!(
            !name.is_empty() && name.bytes().all(plain) && !name.starts_with('-'),
            "{name:?} is no name of a package"
        );
        cache = format!("{cache}+{name}");
    }
    image::image(&target()?.join(cache), &program()?, packages)
}

/// The program that supervises, and that is the agent in every host.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own file")?;
    if own.file_name().is_some_and(|name| name == "lab") {
        return Ok(own);
    }
    crate::harness::program::beside("lab")
}

fn enough_memory(spec: &Spec) -> Result<()> {
    let facts = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let available = facts
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().split(' ').next())
        .and_then(|kib| kib.parse::<u64>().ok())
        .context("read /proc/meminfo")?
        / 1024;
    // What the emulator itself needs, its translated code above all.
    const EMULATOR_MIB: u64 = 300;
    let needed = u64::from(spec.hosts) * (u64::from(spec.memory_mib) + EMULATOR_MIB);
    ensure!(
        needed <= available,
        "{} hosts of {} MiB need {needed} MiB with their emulators, and {available} MiB are available: take fewer or \
         smaller ones (--hosts, --memory)",
        spec.hosts,
        spec.memory_mib
    );
    Ok(())
}
