//! A Slurm cluster in the lab: a controller with its accounting, and three nodes, each a whole Debian under systemd that is emulated; and the world,
//! a network namespace of this machine from which clients come.
//!
//! ```text
//!   h1 "ctl": munged, mariadbd, slurmdbd, slurmctld; sbatch, scancel, sacct
//!      │ eth0, network 0: Slurm, logs, heartbeats
//!   ───┴────┬───────────────┬───────────────┬──
//!         h2 "a"          h3 "b"          h4 "c":  munged, slurmd, what jobs start
//!   ────────┴───────────────┴───────────────┴──── network 1: eth1, bridged with doppel0, the guest's TAP
//!      │ plug ── TAP 10.77.0.1: clients
//! ```
//! The packages' scripts have not run (docs/lab.md), so what those would do is done here: users, alternatives, munge's key. Needs root, for the world's
//! TAPs.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::program;
use crate::harness::slurm::{NODES, SCRIPT, SlurmGround, new_key};
use crate::lab::{Host, Lab, Spec};
use crate::lab_pair::{EQUIPPED, PATIENCE, PLUGGED, TIMES};
use crate::lab_site::World;

/// Slurm as Debian has it, and what its accounting needs.
const PACKAGES: [&str; 6] = [
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "slurm-client",
    "munge",
    "mariadb-server-core",
];

/// The directory that all hosts see, in a host.
const SHARED: &str = "/shared/slurm";

/// What a host of the cluster has: a name, Slurm's programs under their names, munge with the cluster's key.
const MEMBER: &str = "
cat /shared/slurm/hosts >>/etc/hosts
for program in slurmctld slurmd slurmstepd; do ln -sf $program-wlm /usr/sbin/$program; done
useradd --system --no-create-home --home-dir /nonexistent munge
install -d -o munge -g munge -m 700 /etc/munge /var/log/munge
install -d -o munge -g munge -m 711 /var/lib/munge
install -o munge -g munge -m 400 /shared/slurm/munge.key /etc/munge/munge.key
mkdir -p /var/lib/slurm/slurmd /var/lib/slurm/slurmctld /var/log/slurm
cp /shared/slurm/slurm.conf /shared/slurm/cgroup.conf /etc/slurm/
systemctl start munge";

/// The controller, once its accounting is there. A database of a cluster that lives for minutes asks nobody who he is: it has no port but its
/// socket, and that host no user but root.
const CONTROLLER: &str = "
runs() { systemctl is-active --quiet $1 || { journalctl --unit=$1 --no-pager >&2; exit 1; }; }
install -m 600 /shared/slurm/slurmdbd.conf /etc/slurm/slurmdbd.conf
mkdir -p /run/mysqld /var/lib/mysql
systemd-run --quiet --unit=mariadb mariadbd --user=root --datadir=/var/lib/mysql --skip-grant-tables --skip-networking --socket=/run/mysqld/mysqld.sock
until [ -S /run/mysqld/mysqld.sock ]; do runs mariadb; sleep 0.2; done
systemctl start slurmdbd
until sacctmgr --immediate add cluster doppel >/run/added 2>&1; do runs slurmdbd; sleep 0.5; done
systemctl start slurmctld";

/// What a job has started on a node. The keeper of slurmd's own scope is no job's.
const OF_JOBS: &str = "pgrep --full --list-full '^slurmstepd: \\[|^([^ ]*/)?doppel '; true";

/// How long a client may wait for an answer, and Slurm for a node: an emulated one may stand still for seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// All of it. The calling thread is in the world.
#[derive(Debug)]
pub struct LabCluster<'a> {
    lab: &'a Lab,
    directory: PathBuf,
    _world: World,
}

/// Boots the hosts.
///
/// # Errors
/// If there is no lab, or something for it cannot be had.
pub fn boot(name: &str) -> Result<Lab> {
    let doppel = program::doppel()?;
    let lab = Lab::own(&Spec {
        name: name.into(),
        hosts: 1 + NODES.len() as u8,
        // The archive of a whole Debian, and what is unpacked of it, are in memory together for a moment.
        memory_mib: 1280,
        packages: PACKAGES.map(str::to_owned).to_vec(),
        boot_within: Duration::from_secs(400),
        ..Spec::default()
    })?;
    lab.share_program(&doppel)?;
    Ok(lab)
}

impl<'a> LabCluster<'a> {
    /// Moves the calling thread into a new world around the lab's hosts, which become a controller and three nodes that are idle.
    ///
    /// # Errors
    /// If this machine does not let us, or a daemon does not start.
    pub fn enter(lab: &'a Lab) -> Result<Self> {
        let directory = lab.shared().join("slurm");
        fs::create_dir(&directory).context("make a directory")?;
        configure(&directory)?;
        let cluster = Self {
            lab,
            directory,
            _world: World::around(lab)?,
        };
        let up = cluster.bring_up();
        up.with_context(|| cluster.said())?;
        Ok(cluster)
    }

    fn bring_up(&self) -> Result<()> {
        let controller = format!("set -e\nhostname ctl{MEMBER}{CONTROLLER}");
        self.controller().sh(&controller, 2 * PATIENCE)?;
        for (at, name) in NODES.iter().enumerate() {
            let node =
                format!("{EQUIPPED}{PLUGGED}\nhostname {name}{MEMBER}\nsystemctl start slurmd");
            self.host(at).sh(&node, PATIENCE)?;
        }
        let until = Instant::now() + PATIENCE;
        loop {
            let idle = self.are_idle();
            if matches!(idle, Ok(true)) {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "the nodes are not idle: {idle:?}, {:?}",
                self.run("sinfo", &["--Node", "--long"])
            );
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn controller(&self) -> Host<'a> {
        self.lab.host("h1")
    }

    fn host(&self, at: usize) -> Host<'a> {
        self.lab.host(&format!("h{}", number(at)))
    }
}

/// The number of a node's host.
fn number(at: usize) -> usize {
    at + 2
}

impl SlurmGround for LabCluster<'_> {
    fn directory(&self) -> &Path {
        &self.directory
    }

    fn script(&self) -> Result<String> {
        Ok(format!("{SHARED}/doppel.sbatch"))
    }

    fn program(&self) -> Result<String> {
        Ok("doppel".to_owned())
    }

    fn temporary(&self) -> String {
        "/tmp".to_owned()
    }

    fn times(&self) -> &'static str {
        TIMES
    }

    fn accounting(&self) -> &'static [&'static str] {
        &[]
    }

    fn patience(&self) -> Duration {
        2 * PATIENCE
    }

    fn slurm_within(&self) -> Duration {
        2 * PATIENCE
    }

    fn answer_within(&self) -> Duration {
        ANSWER_WITHIN
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        let line = format!("cd {SHARED} && exec \"$@\"");
        let all = [&["sh", "-c", &line, "sh", program][..], words].concat();
        let told = self.controller().run(&all, PATIENCE)?;
        ensure!(
            told.code == 0,
            "{program} {}: code {}: {}",
            words.join(" "),
            told.code,
            String::from_utf8_lossy(&told.stderr)
        );
        Ok(String::from_utf8_lossy(&told.stdout).into_owned())
    }

    fn lose(&mut self, at: usize) -> Result<()> {
        self.host(at).kill()
    }

    fn until_nothing_runs(&self, at: usize) -> Result<()> {
        let until = Instant::now() + self.patience();
        loop {
            let left = self.host(at).sh(OF_JOBS, PATIENCE)?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!("processes stay on node {}: {left}", NODES[at]);
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

/// Everything that the hosts read. A lost node is noticed within half a minute, where a site would have it minutes.
fn configure(directory: &Path) -> Result<()> {
    let mut text = format!(
        "ClusterName=doppel\n\
         SlurmctldHost=ctl(10.88.0.1)\n\
         SlurmUser=root\n\
         SlurmdUser=root\n\
         AuthType=auth/munge\n\
         StateSaveLocation=/var/lib/slurm/slurmctld\n\
         SlurmctldPidFile=/run/slurmctld.pid\n\
         SlurmctldLogFile={SHARED}/slurmctld.log\n\
         SlurmdSpoolDir=/var/lib/slurm/slurmd\n\
         SlurmdPidFile=/run/slurmd.pid\n\
         SlurmdLogFile={SHARED}/slurmd-%n.log\n\
         SlurmdParameters=config_overrides\n\
         SlurmdTimeout=30\n\
         MessageTimeout=30\n\
         ReturnToService=2\n\
         MpiDefault=none\n\
         ProctrackType=proctrack/cgroup\n\
         TaskPlugin=task/cgroup\n\
         SelectType=select/cons_tres\n\
         SelectTypeParameters=CR_CPU\n\
         JobAcctGatherType=jobacct_gather/none\n\
         AccountingStorageType=accounting_storage/slurmdbd\n\
         AccountingStorageHost=ctl\n"
    );
    let mut hosts = String::from("10.88.0.1 ctl\n");
    for (at, name) in NODES.iter().enumerate() {
        let address = format!("10.88.0.{}", number(at));
        text.push_str(&format!(
            "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1024\n"
        ));
        hosts.push_str(&format!("{address} {name}\n"));
    }
    text.push_str(&format!(
        "PartitionName=all Nodes={} Default=YES State=UP\n",
        NODES.join(",")
    ));
    let accounting = format!(
        "AuthType=auth/munge\n\
         DbdHost=ctl\n\
         SlurmUser=root\n\
         StorageType=accounting_storage/mysql\n\
         StorageHost=localhost\n\
         StorageUser=root\n\
         StorageLoc=slurm\n\
         LogFile={SHARED}/slurmdbd.log\n\
         PidFile=/run/slurmdbd.pid\n"
    );
    for (name, text) in [
        ("slurm.conf", text),
        ("slurmdbd.conf", accounting),
        ("cgroup.conf", "CgroupPlugin=cgroup/v2\n".to_owned()),
        ("hosts", hosts),
    ] {
        fs::write(directory.join(name), text).with_context(|| format!("write {name}"))?;
    }
    new_key(&directory.join("munge.key"))?;
    fs::copy(SCRIPT, directory.join("doppel.sbatch")).context("copy the batch script")?;
    Ok(())
}
