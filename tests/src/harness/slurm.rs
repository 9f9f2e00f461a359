//! A Slurm cluster: a real slurmctld and munged, three nodes with a slurmd each, and the world, as four network namespaces joined by
//! cables that can be cut.
//!
//! ```text
//!   the world: clients 10.77.0.1, slurmctld 10.78.0.254, sbatch, scancel
//!        guests ┬────────┬────────┐        logs ┬────────┬────────┐
//!  ─────────────│────────│────────│─────────────│────────│────────│──────
//!   node a:   world, bridged with its guests' TAP          log, 10.78.0.1
//! ```
//! A node's processes are in a PID namespace of their own with a name of their own: a node that is lost has its cables cut and that
//! namespace ended, which takes everything in it at once. Every file is in one directory. Needs root, `ip` and Debian's slurmctld, slurmd,
//! slurm-client and munge.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::tap::set_link;
use hypervisor::demo::namespace::{Namespace, enter_bare};
use tempfile::TempDir;

use super::program;
use super::stage::INTERFACE;
use super::two_hosts::{CABLES, host_between, inside, ip, two_networks};

/// The nodes, in Slurm's order: an allocation's first one is the first of them.
pub const NODES: [&str; 3] = ["a", "b", "c"];

/// A bound for what takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// Programs of a node that no job has started.
const OF_THE_NODE: [&str; 3] = ["unshare", "sh", "slurmd"];

/// A daemon in namespaces of its own, which end with it.
#[derive(Debug)]
struct Daemon(Child);

impl Daemon {
    /// Starts a shell's command under this host name.
    fn start(host: &str, command: &str, log: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log);
        let log = log.context("make a daemon's log")?;
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--uts"])
            // The shell stays, so that somebody waits for what others have left.
            .args(["sh", "-c", &format!("hostname {host} && {command}; true")])
            .env("PATH", path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share a log")?)
            .stderr(log)
            .spawn()
            .context("start unshare (Debian's package util-linux)")?;
        Ok(Self(child))
    }

    fn runs(&mut self) -> Result<bool> {
        let ended = self.0.try_wait().context("look after a daemon")?;
        Ok(ended.is_none())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Daemons are not on everybody's path.
fn path() -> String {
    let own = std::env::var("PATH").unwrap_or_default();
    format!("{own}:/usr/sbin:/sbin")
}

/// One node.
#[derive(Debug)]
struct Node {
    namespace: Namespace,
    slurmd: Option<Daemon>,
}

/// All of it. The calling thread is in the world.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    slurmctld: Daemon,
    _munged: Daemon,
    directory: TempDir,
    _world: Namespace,
}

/// A job, as `scontrol` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its state, such as RUNNING.
    pub state: String,
    /// Its nodes, as Slurm writes a list of them.
    pub nodes: String,
    /// How it came out: the code, and the signal.
    pub exit_code: String,
}

impl Cluster {
    /// Moves the calling thread into a new world with a controller and three nodes that are idle.
    ///
    /// # Errors
    /// If this machine does not let us, or something is not installed.
    pub fn enter() -> Result<Self> {
        let world = enter_bare().context("make a network namespace")?;
        let directory = tempfile::Builder::new()
            .prefix("doppel-slurm-")
            .tempdir()
            .context("make a directory")?;
        two_networks()?;
        let at = directory.path();
        for name in ["state", "tmp", "munge"] {
            fs::create_dir(at.join(name)).context("make a directory")?;
        }
        configure(at)?;
        let munged = munged(at)?;
        let config = at.join("slurm.conf");
        let config = config.display();
        let slurmctld = Daemon::start(
            "ctl",
            &format!("slurmctld -D -f {config}"),
            &at.join("slurmctld.out"),
        )?;
        let mut nodes = Vec::new();
        for (number, name) in (1..).zip(NODES) {
            let namespace = node(number, name)?;
            let own = at.join(name);
            fs::create_dir_all(own.join("spool")).context("make a directory")?;
            let slurmd = inside(&namespace, || {
                let command = format!("slurmd -D -N {name} -f {config}");
                Daemon::start(name, &command, &own.join("slurmd.out"))
            })?;
            nodes.push(Node {
                namespace,
                slurmd: Some(slurmd),
            });
        }
        let mut cluster = Self {
            nodes,
            slurmctld,
            _munged: munged,
            directory,
            _world: world,
        };
        let idle = cluster.await_idle();
        idle.with_context(|| cluster.said())?;
        Ok(cluster)
    }

    fn await_idle(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            ensure!(
                self.slurmctld.runs()?,
                "slurmctld has ended: run scripts/install-test-tools first"
            );
            let states = self.run("sinfo", &["--noheader", "--Node", "--format=%t"]);
            if let Ok(states) = &states {
                let idle = states.split_whitespace().filter(|state| *state == "idle");
                if idle.count() == NODES.len() {
                    return Ok(());
                }
            }
            ensure!(
                Instant::now() < until,
                "the nodes are not idle, but {states:?}"
            );
            std::thread::sleep(LOOK);
        }
    }

    /// A directory that all nodes see.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, program: &str, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(program);
        command
            .args(words)
            .current_dir(self.directory())
            .env("PATH", path())
            .env("SLURM_CONF", self.directory().join("slurm.conf"))
            .env("TMPDIR", self.directory().join("tmp"))
            .env("DOPPEL", program::doppel()?)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// What a command of Slurm's printed, said from outside the nodes.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        let output = self
            .command(program, words)?
            .output()
            .with_context(|| format!("start {program}: run scripts/install-test-tools first"))?;
        ensure!(
            output.status.success(),
            "{program} {}: {}: {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Submits a batch script with these options and words; the job's number.
    ///
    /// # Errors
    /// If Slurm does not take it.
    pub fn submit(&self, options: &[&str], script: &Path, words: &[&str]) -> Result<String> {
        let script = script.to_str().context("a path of this machine")?;
        let mut all = vec!["--parsable"];
        all.extend(options);
        all.push(script);
        all.extend(words);
        Ok(self.run("sbatch", &all)?.trim().to_owned())
    }

    /// How a job is.
    ///
    /// # Errors
    /// If Slurm does not know it.
    pub fn job(&self, id: &str) -> Result<Job> {
        let line = self.run("scontrol", &["--oneliner", "show", "job", id])?;
        let field = |name: &str| {
            let found = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            let found = found.with_context(|| format!("no {name} in {line}"));
            found.map(str::to_owned)
        };
        Ok(Job {
            state: field("JobState")?,
            nodes: field("NodeList")?,
            exit_code: field("ExitCode")?,
        })
    }

    /// Waits until a job is so.
    ///
    /// # Errors
    /// If it is not in time.
    pub fn until(&self, id: &str, longest: Duration, is_so: impl Fn(&Job) -> bool) -> Result<Job> {
        let until = Instant::now() + longest;
        loop {
            let job = self.job(id)?;
            if is_so(&job) {
                return Ok(job);
            }
            ensure!(Instant::now() < until, "the job is {job:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Where a job's node says what happens to it.
    #[must_use]
    pub fn log_of(&self, job: &str, at: usize) -> PathBuf {
        let directory = self.directory().join(format!("doppel-{job}"));
        directory.join(format!("{}.log", NODES[at]))
    }

    /// What a job's node has said.
    #[must_use]
    pub fn log(&self, job: &str, at: usize) -> String {
        fs::read_to_string(self.log_of(job, at)).unwrap_or_default()
    }

    /// Waits until a job's node has said this so many times.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn until_said(&self, job: &str, at: usize, word: &str, times: usize) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.log(job, at).matches(word).count() < times {
            if Instant::now() >= until {
                bail!("node {} does not say {word:?}", NODES[at]);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The node is lost, silently: its cables are cut and its processes are ended.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn lose(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at];
        inside(&node.namespace, || {
            CABLES
                .iter()
                .try_for_each(|cable| Ok(set_link(cable, false)?))
        })?;
        node.slurmd = None;
        self.until_no_process(at, &[])
    }

    /// Waits until nothing that a job has started runs on a node.
    ///
    /// # Errors
    /// If something stays.
    pub fn until_nothing_runs(&self, at: usize) -> Result<()> {
        self.until_no_process(at, &OF_THE_NODE)
    }

    fn until_no_process(&self, at: usize, but: &[&str]) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = self.processes(at, but)?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "processes stay on node {}: {left:?}",
                NODES[at]
            );
            std::thread::sleep(LOOK);
        }
    }

    /// The programs that run in a node's network, but these.
    fn processes(&self, at: usize, but: &[&str]) -> Result<Vec<String>> {
        let own = fs::read_link(self.nodes[at].namespace.path()).context("read a namespace")?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("list processes")?.flatten() {
            let there = fs::read_link(entry.path().join("ns/net"));
            if there.is_ok_and(|there| there == own) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                let name = name.trim();
                if !but.contains(&name) {
                    found.push(format!("{name} {}", entry.file_name().to_string_lossy()));
                }
            }
        }
        Ok(found)
    }

    /// What everybody has said: for a failure's report.
    #[must_use]
    pub fn said(&self) -> String {
        let mut directories = vec![self.directory().to_owned()];
        let mut text = String::new();
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let ends = path.extension().and_then(|end| end.to_str());
                if path.is_dir() {
                    directories.push(path);
                } else if matches!(ends, Some("out" | "log"))
                    && let Ok(said) = fs::read_to_string(&path)
                {
                    text.push_str(&format!("== {}\n{said}\n", path.display()));
                }
            }
        }
        text
    }
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, number)
}

/// A node's network, as this number of the world's.
fn node(number: u8, name: &str) -> Result<Namespace> {
    let namespace = host_between(name, "bridge0", address(number))?;
    inside(&namespace, || {
        // As a site's prolog would leave it for the job's user.
        ip(&["tuntap", "add", "dev", INTERFACE, "mode", "tap"])?;
        ip(&["link", "set", "dev", INTERFACE, "master", "bridge0"])?;
        Ok(set_link(INTERFACE, true)?)
    })?;
    Ok(namespace)
}

fn munged(directory: &Path) -> Result<Daemon> {
    let munge = directory.join("munge");
    let key = munge.join("key");
    let mut random = vec![0; 128];
    use std::io::{Read, Write};
    File::open("/dev/urandom")
        .and_then(|mut from| from.read_exact(&mut random))
        .and_then(|()| {
            let new = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&key);
            new?.write_all(&random)
        })
        .context("make munge's key")?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))
        .context("let munge's clients in")?;
    let at = munge.display();
    let command = format!(
        "munged --foreground --force --key-file={at}/key --socket={at}/socket --pid-file={at}/pid --log-file={at}/munged.log --seed-file={at}/seed"
    );
    let mut daemon = Daemon::start("munge", &command, &munge.join("munged.out"))?;
    let until = Instant::now() + PATIENCE;
    while !munge.join("socket").exists() {
        let said = || fs::read_to_string(munge.join("munged.out")).unwrap_or_default();
        ensure!(daemon.runs()?, "munged has ended: {}", said());
        ensure!(Instant::now() < until, "munged does not listen: {}", said());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(daemon)
}

/// A configuration in which everything is in this directory. A lost node is noticed within seconds, where a site would have it minutes.
fn configure(directory: &Path) -> Result<()> {
    let at = directory.display();
    let mut text = format!(
        "ClusterName=doppel\n\
         SlurmctldHost=ctl(10.78.0.254)\n\
         SlurmUser=root\n\
         SlurmdUser=root\n\
         AuthType=auth/munge\n\
         AuthInfo=socket={at}/munge/socket\n\
         StateSaveLocation={at}/state\n\
         SlurmctldPidFile={at}/slurmctld.pid\n\
         SlurmctldLogFile={at}/slurmctld.log\n\
         SlurmdSpoolDir={at}/%n/spool\n\
         SlurmdPidFile={at}/%n/slurmd.pid\n\
         SlurmdLogFile={at}/%n/slurmd.log\n\
         SlurmdParameters=config_overrides\n\
         SlurmdTimeout=5\n\
         MessageTimeout=5\n\
         ReturnToService=2\n\
         MpiDefault=none\n\
         ProctrackType=proctrack/linuxproc\n\
         TaskPlugin=task/none\n\
         SelectType=select/cons_tres\n\
         SelectTypeParameters=CR_CPU\n\
         JobAcctGatherType=jobacct_gather/none\n\
         AccountingStorageType=accounting_storage/none\n\
         JobCompType=jobcomp/filetxt\n\
         JobCompLoc={at}/jobcomp.txt\n"
    );
    for (number, name) in (1..).zip(NODES) {
        text.push_str(&format!(
            "NodeName={name} NodeAddr={} CPUs=2 RealMemory=1024\n",
            address(number)
        ));
    }
    text.push_str(&format!(
        "PartitionName=all Nodes={} Default=YES State=UP\n",
        NODES.join(",")
    ));
    fs::write(directory.join("slurm.conf"), text).context("write slurm.conf")
}
