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
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::tap::set_link;
use hypervisor::demo::namespace::{Namespace, enter_bare};
use tempfile::TempDir;

use super::program;
use super::stage::INTERFACE;
use super::two_hosts::{CABLES, host_between, inside, ip, two_networks};

mod ground;

pub use ground::{Job, NODES, SCRIPT, SlurmGround};

use ground::LOOK;

/// A bound for what takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A bound for what Slurm does of itself.
const SLURM_WITHIN: Duration = Duration::from_secs(90);

/// How long a client may wait for an answer, far longer than any failover takes.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

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
            let idle = self.are_idle();
            if matches!(idle, Ok(true)) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "the nodes are not idle: {idle:?}");
            std::thread::sleep(LOOK);
        }
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
}

impl SlurmGround for Cluster {
    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn script(&self) -> Result<String> {
        Ok(SCRIPT.to_owned())
    }

    fn program(&self) -> Result<String> {
        let doppel = program::doppel()?;
        Ok(doppel
            .to_str()
            .context("a path of this machine")?
            .to_owned())
    }

    fn temporary(&self) -> String {
        self.directory().join("tmp").display().to_string()
    }

    fn times(&self) -> &'static str {
        // Three nodes share this machine's cores with whatever else it does: a side that is late is not to count as lost.
        "[timing]\nsilence_ms = 300\n"
    }

    fn accounting(&self) -> &'static [&'static str] {
        &["--completion"]
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }

    fn slurm_within(&self) -> Duration {
        SLURM_WITHIN
    }

    fn answer_within(&self) -> Duration {
        ANSWER_WITHIN
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<String> {
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

    fn lose(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at];
        inside(&node.namespace, || {
            CABLES
                .iter()
                .try_for_each(|cable| Ok(set_link(cable, false)?))
        })?;
        node.slurmd = None;
        self.until_no_process(at, &[])
    }

    fn until_nothing_runs(&self, at: usize) -> Result<()> {
        self.until_no_process(at, &OF_THE_NODE)
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

/// Makes a key of munge's, by which a cluster knows its own.
///
/// # Errors
/// If there is a file of this name, or none can be made.
pub fn new_key(path: &Path) -> Result<()> {
    let mut random = [0; 128];
    File::open("/dev/urandom")
        .and_then(|mut from| from.read_exact(&mut random))
        .and_then(|()| {
            let new = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path);
            new?.write_all(&random)
        })
        .context("make munge's key")
}

fn munged(directory: &Path) -> Result<Daemon> {
    let munge = directory.join("munge");
    new_key(&munge.join("key"))?;
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
