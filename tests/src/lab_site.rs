//! A site in the lab: three hosts that are emulated, with an agent each; and the world, a network namespace of this machine that has a card on
//! each of the lab's networks.
//!
//! ```text
//!  the world: etcd 10.88.0.254 ── TAP ── plug ── network 0 ─┬──────────┬──────────┐   logs, heartbeats, agents
//!                                                           eth0       eth0       eth0
//!                                                           h1 (a)     h2 (b)     h3 (c)
//!                                                           eth1, bridged with guests' TAPs
//!             clients 10.77.0.1 ── TAP ── plug ── network 1 ─┴──────────┴──────────┘
//! ```
//! A host that was killed and started again has nothing of its earlier life. etcd is in the world and not in a host, since it is what outlives
//! hosts, and a fourth emulator would take two cores' time from the three that are looked at. Needs root, for the world's TAPs.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::tap::{Tap, TapConfig};
use hypervisor::demo::namespace::{Namespace, enter_bare};
use hypervisor::handshake::Secret;
use tempfile::TempDir;

use crate::harness::etcd::Etcd;
use crate::harness::program;
use crate::harness::site::{ALL, HOSTS, NAMES, SiteGround};
use crate::lab::plug::Carrier;
use crate::lab::wire::Start;
use crate::lab::{Host, Lab, Spec};
use crate::lab_pair::{EQUIPPED, PATIENCE, SECRET, TIMES};

/// How long a host is taken for a member: an emulated one may stand still for seconds.
const LEASE: Duration = Duration::from_secs(15);

/// What the world has on the lab's networks: a card's name, the network, the address.
const CARDS: [(&str, u8, &str); 2] = [("logs", 0, "10.88.0.254/24"), ("guests", 1, "10.77.0.1/24")];

/// Processes of ours, by the programs that they run: also one that was replaced since.
const COUNT: &str =
    "for process in /proc/[0-9]*; do readlink $process/exe; done | grep -c ^/usr/bin/doppel; true";

/// This machine's part in a lab: a network namespace with a card on each of its networks.
#[derive(Debug)]
pub(crate) struct World {
    _carriers: Vec<Carrier>,
    _namespace: Namespace,
}

impl World {
    /// Moves the calling thread into a new one.
    pub(crate) fn around(lab: &Lab) -> Result<Self> {
        let namespace = enter_bare().context("make a network namespace")?;
        let mut carriers = Vec::new();
        for (name, network, address) in CARDS {
            let tap = Tap::open(&TapConfig {
                name: name.into(),
                address: Some(address.parse().context("an address")?),
                mtu: 1500,
            })?;
            carriers.push(lab.plug(network)?.carry(tap.into_port())?);
        }
        Ok(Self {
            _carriers: carriers,
            _namespace: namespace,
        })
    }
}

/// An agent in a host.
#[derive(Clone, Debug)]
struct Agent {
    pid: String,
    /// Where it says what it has to say.
    log: String,
}

/// All of it. The calling thread is in the world.
#[derive(Debug)]
pub struct LabSite<'a> {
    lab: &'a Lab,
    etcd: Etcd,
    agents: [Option<Agent>; HOSTS],
    /// Agents so far.
    started: u32,
    directory: TempDir,
    _world: World,
}

/// Boots the hosts.
///
/// # Errors
/// If there is no lab, or something for it cannot be built.
pub fn boot(name: &str) -> Result<Lab> {
    let doppel = program::doppel()?;
    let lab = Lab::own(&Spec {
        name: name.into(),
        hosts: HOSTS as u8,
        memory_mib: 1024,
        ..Spec::default()
    })?;
    lab.share_program(&doppel)?;
    fs::write(lab.shared().join("times.toml"), TIMES).context("write a configuration")?;
    Secret::create(&lab.shared().join("pair.secret"))?;
    Ok(lab)
}

impl<'a> LabSite<'a> {
    /// Moves the calling thread into a new world around the lab's hosts, whose agents run.
    ///
    /// # Errors
    /// If this machine does not let us, or something is not installed.
    pub fn enter(lab: &'a Lab) -> Result<Self> {
        let world = World::around(lab)?;
        let directory = tempfile::Builder::new()
            .prefix("doppel-lab-site-")
            .tempdir()
            .context("make a directory")?;
        let etcd = Etcd::start_with(
            &directory.path().join("etcd"),
            [10, 88, 0, 254].into(),
            None,
        )?;
        let mut site = Self {
            lab,
            etcd,
            agents: [const { None }; HOSTS],
            started: 0,
            directory,
            _world: world,
        };
        let ours = lab.shared().join("pair.secret");
        let ours = ours.to_str().context("a path of this machine")?;
        for at in ALL {
            let theirs = site.configuration(at, "/etc/pair.secret");
            let file = lab.shared().join(format!("{}.toml", NAMES[at]));
            fs::write(file, theirs).context("write an agent's configuration")?;
            fs::write(site.config(at), site.configuration(at, ours))
                .context("write a configuration")?;
            site.equip(at)?;
            site.start_agent(at)?;
        }
        Ok(site)
    }

    fn configuration(&self, at: usize, secret: &str) -> String {
        format!(
            "name = \"{}\"\netcd = \"{}\"\nsecret = \"{secret}\"\naddress = \"10.88.0.{}\"\nmemory_mib = 256\nbridge = \"br0\"\n\
             run_dir = \"/run/doppel\"\nlog_dir = \"/run/said\"\nimages = \"/shared\"\ndisks = \"/run/disks\"\nroles = \"/shared/times.toml\"\nlease_s = {}\n",
            NAMES[at],
            self.etcd.place(),
            at + 1,
            LEASE.as_secs(),
        )
    }

    fn host(&self, at: usize) -> Host<'a> {
        self.lab.host(&format!("h{}", at + 1))
    }

    fn equip(&self, at: usize) -> Result<()> {
        let line = format!("{EQUIPPED}{SECRET}\nmkdir -p /run/said");
        self.host(at).sh(&line, PATIENCE).map(drop)
    }

    /// Sends its agent a signal, and waits until it has ended.
    fn end_agent(&mut self, at: usize, signal: &str) -> Result<()> {
        let Some(Agent { pid, .. }) = self.agents[at].take() else {
            return Ok(());
        };
        let host = self.host(at);
        let sent = host.run(&["kill", signal, &pid], PATIENCE)?;
        ensure!(
            sent.code == 0,
            "the agent of {} has ended before",
            NAMES[at]
        );
        let until = Instant::now() + PATIENCE;
        // What has ended and was not fetched yet runs no program.
        while host
            .run(&["readlink", &format!("/proc/{pid}/exe")], PATIENCE)?
            .code
            == 0
        {
            ensure!(
                Instant::now() < until,
                "the agent of {} does not end",
                NAMES[at]
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl SiteGround for LabSite<'_> {
    fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    fn patience(&self) -> Duration {
        // Three hosts share two cores, and a machine is copied from one to the other.
        2 * PATIENCE
    }

    fn answer_within(&self) -> Duration {
        PATIENCE
    }

    fn config(&self, at: usize) -> PathBuf {
        self.directory.path().join(format!("{}.toml", NAMES[at]))
    }

    fn start_agent(&mut self, at: usize) -> Result<()> {
        self.started += 1;
        let host = self.host(at);
        host.sh(
            "cp /usr/bin/doppel /usr/bin/doppel.new && mv -f /usr/bin/doppel.new /usr/bin/doppel",
            PATIENCE,
        )?;
        let log = format!("/run/said/agent-{}.log", self.started);
        let config = format!("/shared/{}.toml", NAMES[at]);
        let start = Start {
            detached_to: Some(log.clone()),
            ..Start::new(&["doppel", "agent", "--config", &config])
        };
        let told = host.session(&start)?.finish(PATIENCE)?;
        let pid = String::from_utf8_lossy(&told.stdout).trim().to_owned();
        ensure!(
            pid.parse::<u32>().is_ok(),
            "the agent of {} was not started: {told:?}",
            NAMES[at]
        );
        self.agents[at] = Some(Agent { pid, log });
        Ok(())
    }

    fn kill_agent(&mut self, at: usize) -> Result<()> {
        self.end_agent(at, "-9")
    }

    fn stop_agent(&mut self, at: usize) -> Result<()> {
        self.end_agent(at, "-TERM")
    }

    fn agent_says(&mut self, at: usize, word: &str) -> Result<()> {
        let agent = self.agents[at].as_ref().context("its agent does not run")?;
        let until = Instant::now() + self.patience();
        while self
            .host(at)
            .run(&["grep", "-q", word, &agent.log], PATIENCE)?
            .code
            != 0
        {
            ensure!(
                Instant::now() < until,
                "the agent of {} does not say {word:?}",
                NAMES[at]
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn running(&self, at: usize) -> Result<usize> {
        let told = self.host(at).sh(COUNT, PATIENCE)?;
        told.trim()
            .parse()
            .with_context(|| format!("count in {told:?}"))
    }

    fn lose(&mut self, at: usize) -> Result<()> {
        self.agents[at] = None;
        self.host(at).kill()
    }

    fn mend(&mut self, at: usize) -> Result<()> {
        self.host(at).start()?;
        self.equip(at)?;
        self.start_agent(at)
    }

    fn said(&self) -> String {
        let mut text = String::new();
        for at in ALL {
            // A host that is off has nothing to say.
            if let Ok(said) = self.host(at).sh("tail -n 60 /run/said/*", PATIENCE) {
                text.push_str(&format!("== host {}\n{said}\n", NAMES[at]));
            }
        }
        text
    }
}
