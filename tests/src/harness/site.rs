//! A site: an etcd that speaks TLS, three hosts with an agent each, and the world, as four network namespaces joined by cables that can be cut.
//!
//! ```text
//!   the world: clients 10.77.0.1, etcd 10.78.0.254
//!        guests ┬────────┬────────┐        log ┬────────┬────────┐
//!             to-a     to-b     to-c         log-a    log-b    log-c
//!  ─────────────│────────│────────│────────────│────────│────────│──────
//!   host a:   world, bridged with its guests' TAPs         log, 10.78.0.1
//! ```
//! The processes run on this machine; a host that is lost has its cables cut and all its processes killed. Needs root and `ip`.
#![forbid(unsafe_code)]

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::tap::set_link;
use hypervisor::demo::namespace::{Namespace, enter_bare};
use hypervisor::handshake::Secret;
use tempfile::TempDir;

use super::etcd::{Etcd, Tls};
use super::program;
use super::role::Role;
use super::signal::{Signal, send};
use super::stage::alone;
use super::two_hosts::{CABLES, host_between, inside, two_networks};

pub mod ground;

pub use ground::{ALL, ANSWERS, HOSTS, MACHINES, NAMES, SiteGround};

/// How long a host is taken for a member after its agent's last word, in seconds.
const LEASE: Duration = Duration::from_secs(3);

/// A bound for what takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a client may wait for an answer, far longer than any failover takes.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// One host.
#[derive(Debug)]
struct Host {
    name: &'static str,
    namespace: Namespace,
    directory: PathBuf,
    agent: Option<Role>,
    /// Agents that it has had.
    agents: u32,
}

/// All of it. The calling thread is in the world.
#[derive(Debug)]
pub struct Site {
    hosts: Vec<Host>,
    etcd: Etcd,
    directory: TempDir,
    _world: Namespace,
}

/// Does this with a site of three hosts; where it fails, all that was said on them is told.
///
/// # Errors
/// As [`Site::enter`], and whatever fails.
pub fn with_site<T: Send>(does: impl FnOnce(&mut Site) -> Result<T> + Send) -> Result<T> {
    alone(|| {
        let mut site = Site::enter()?;
        let shown = does(&mut site);
        shown.with_context(|| format!("what was said:\n{}", site.said()))
    })
}

impl Site {
    /// Moves the calling thread into a new world with three hosts, whose agents run.
    ///
    /// # Errors
    /// If this machine does not let us, or something is not installed.
    pub fn enter() -> Result<Self> {
        let world = enter_bare().context("make a network namespace")?;
        let directory = tempfile::Builder::new()
            .prefix("doppel-site-")
            .tempdir()
            .context("make a directory")?;
        two_networks()?;
        let mut hosts = Vec::new();
        for (number, name) in (1..).zip(NAMES) {
            hosts.push(host(number, name, directory.path())?);
        }
        // Whoever comes without a certificate is nobody to it: agents, `doppel vm` and every pair's arbiter have one.
        let tls = Tls::new(&directory.path().join("certificates"))?;
        let etcd = Etcd::start_with(
            &directory.path().join("etcd"),
            Ipv4Addr::new(10, 78, 0, 254).into(),
            Some(tls),
        )?;
        Secret::create(&directory.path().join("site.secret"))?;
        let mut site = Self {
            hosts,
            etcd,
            directory,
            _world: world,
        };
        for at in 0..HOSTS {
            site.write_config(at)?;
            site.start_agent(at)?;
        }
        Ok(site)
    }

    fn write_config(&self, at: usize) -> Result<()> {
        let host = &self.hosts[at];
        let directory = host.directory.display();
        // Three hosts share this machine's cores with whatever else it does: a side that is late is not to count as lost. (How soon a
        // lost one is noticed is another promise's.)
        fs::write(
            host.directory.join("role.toml"),
            "[timing]\nsilence_ms = 300\n[sandbox]\nstrict = true\n",
        )
        .context("write a configuration of roles")?;
        let text = format!(
            "name = \"{}\"\netcd = \"{}\"\nsecret = \"{}\"\naddress = \"{}\"\nmemory_mib = 1024\nbridge = \"guests\"\n\
             run_dir = \"{directory}/run\"\nlog_dir = \"{directory}/log\"\nimages = \"{}\"\ndisks = \"{directory}/disks\"\nroles = \"{directory}/role.toml\"\nlease_s = {}\npoll_ms = 200\n",
            host.name,
            self.etcd.place(),
            self.directory.path().join("site.secret").display(),
            address(at),
            self.directory.path().display(),
            LEASE.as_secs(),
        );
        fs::write(self.config(at), text).context("write an agent's configuration")
    }

    /// A directory that all hosts see, below which their guests' files lie.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What lies in a host's directory of disks.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn disks(&self, at: usize) -> Result<Vec<PathBuf>> {
        match fs::read_dir(self.hosts[at].directory.join("disks")) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed
                .and_then(|files| files.map(|file| Ok(file?.path())).collect())
                .context("list disks"),
        }
    }

    /// The processes of a host: its agent, and the roles that this or an earlier one started. They name the host's directory.
    ///
    /// # Errors
    /// If the kernel does not list them.
    pub fn processes(&self, at: usize) -> Result<Vec<u32>> {
        let own = format!("{}/", self.hosts[at].directory.display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("list processes")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            // An operator's command names it, too.
            let is_command = line.split('\0').nth(1) == Some("vm");
            if !is_command && line.contains(&own) {
                found.push(pid);
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}

impl SiteGround for Site {
    fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    fn lease(&self) -> Duration {
        LEASE
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }

    fn answer_within(&self) -> Duration {
        ANSWER_WITHIN
    }

    fn config(&self, at: usize) -> PathBuf {
        self.hosts[at].directory.join("agent.toml")
    }

    fn start_agent(&mut self, at: usize) -> Result<()> {
        let config = self.config(at);
        let config = config.to_str().context("a path of this machine")?;
        let host = &mut self.hosts[at];
        host.agents += 1;
        let name = format!("agent-{}", host.agents);
        let directory = host.directory.clone();
        let program = directory.join("doppel");
        let fresh = directory.join("doppel.new");
        fs::copy(program::doppel()?, &fresh).context("install doppel")?;
        fs::rename(&fresh, &program).context("replace doppel")?;
        let started = inside(&host.namespace, || {
            Role::start_program(&program, &directory, &name, &["agent", "--config", config])
        })?;
        host.agent = Some(started);
        Ok(())
    }

    fn kill_agent(&mut self, at: usize) -> Result<()> {
        // Killed and reaped when it is dropped.
        self.hosts[at].agent = None;
        Ok(())
    }

    fn stop_agent(&mut self, at: usize) -> Result<()> {
        match self.hosts[at].agent.take() {
            Some(mut agent) => agent.stop(PATIENCE),
            None => Ok(()),
        }
    }

    fn agent_says(&mut self, at: usize, word: &str) -> Result<()> {
        let agent = self.hosts[at].agent.as_mut();
        agent
            .context("its agent does not run")?
            .until(word, PATIENCE)
    }

    fn running(&self, at: usize) -> Result<usize> {
        Ok(self.processes(at)?.len())
    }

    fn lose(&mut self, at: usize) -> Result<()> {
        let processes = self.processes(at)?;
        inside(&self.hosts[at].namespace, || {
            CABLES
                .iter()
                .try_for_each(|cable| Ok(set_link(cable, false)?))
        })?;
        for pid in processes {
            // One that has ended meanwhile needs no signal.
            let _ = send(pid, Signal::Kill);
        }
        self.kill_agent(at)?;
        let until = Instant::now() + PATIENCE;
        while !self.processes(at)?.is_empty() {
            ensure!(Instant::now() < until, "processes of a dead host stay");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn mend(&mut self, at: usize) -> Result<()> {
        inside(&self.hosts[at].namespace, || {
            CABLES
                .iter()
                .try_for_each(|cable| Ok(set_link(cable, true)?))
        })?;
        self.start_agent(at)
    }

    fn said(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let logs = [host.directory.clone(), host.directory.join("log")];
            for path in logs
                .iter()
                .flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten())
            {
                let path = path.path();
                let wanted = path
                    .extension()
                    .is_some_and(|end| end == "stderr" || end == "log");
                if wanted && let Ok(said) = fs::read_to_string(&path) {
                    text.push_str(&format!("== {}\n{said}\n", path.display()));
                }
            }
        }
        text
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for at in 0..HOSTS {
            // Agents go with their `Role`; what they started is nobody's child any more.
            self.hosts[at].agent = None;
            for pid in self.processes(at).unwrap_or_default() {
                let _ = send(pid, Signal::Kill);
            }
        }
    }
}

fn address(at: usize) -> IpAddr {
    Ipv4Addr::new(10, 78, 0, at as u8 + 1).into()
}

/// A host with its cables, as this number of the world's.
fn host(number: u8, name: &'static str, directory: &Path) -> Result<Host> {
    let directory = directory.join(name);
    fs::create_dir(&directory).context("make a directory")?;
    let namespace = host_between(name, "guests", address(usize::from(number) - 1))?;
    Ok(Host {
        name,
        namespace,
        directory,
        agent: None,
        agents: 0,
    })
}
