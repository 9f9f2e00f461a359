//! Two hosts and the world, as three network namespaces joined by cables that can be cut.
//!
//! ```text
//!        the world: clients, 10.77.0.1
//!            bridge ┬──────────┐
//!                 to-a        to-b
//!  ─────────────────│──────────│──────────────────
//!   host a        world      world         host b
//!            bridge ┤          ├ bridge
//!                  TAP        TAP
//!                 guest      guest
//!                  log ──────── log
//!               10.78.0.1   10.78.0.2
//! ```
//! The processes of both sides run on this machine; what is cut is only what a dead host would cut. Needs root and `ip`.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hypervisor::backends::NetPort;
use hypervisor::backends::tap::{Tap, TapConfig, set_link};
use hypervisor::demo::namespace::{Namespace, enter_bare};
use hypervisor::handshake::Secret;
use tempfile::TempDir;

use super::role::Role;
use super::signal::{Signal, send};
use super::stage::{INTERFACE, alone};

/// Where a backup listens, on either host.
const PORT: u16 = 7700;

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Host a.
    A,
    /// Host b.
    B,
}

impl Which {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, if self == Self::A { 1 } else { 2 })
    }

    fn letter(self) -> &'static str {
        if self == Self::A { "a" } else { "b" }
    }

    /// Where a backup on it listens.
    #[must_use]
    pub fn listens(self) -> SocketAddr {
        (self.address(), PORT).into()
    }
}

/// A host's network, and the guest's port in it.
#[derive(Debug)]
struct Host {
    namespace: Namespace,
    port: NetPort,
}

impl Host {
    fn new() -> Result<Self> {
        // A thread of its own: the caller stays in the world.
        alone(|| {
            let namespace = enter_bare().context("make a network namespace")?;
            let tap = Tap::open(&TapConfig {
                name: INTERFACE.into(),
                address: None,
                mtu: 1500,
            })?;
            ip(&["link", "add", "name", "bridge0", "type", "bridge"])?;
            ip(&["link", "set", "dev", INTERFACE, "master", "bridge0"])?;
            for link in [INTERFACE, "bridge0"] {
                set_link(link, true)?;
            }
            Ok(Self {
                namespace,
                port: tap.into_port(),
            })
        })
    }
}

/// The hosts, and the world around the calling thread.
#[derive(Debug)]
pub struct TwoHosts {
    hosts: [Host; 2],
    directory: TempDir,
    // The world lives as long as its namespace is kept.
    _world: Namespace,
}

/// The secret of the pairs on them, in the directory.
const SECRET: &str = "pair.secret";

/// The cables of a host, by their names in it.
pub(super) const CABLES: [&str; 2] = ["world", "log"];

impl TwoHosts {
    /// Moves the calling thread into a new world with two hosts.
    ///
    /// # Errors
    /// If this machine does not let us, or has no bridges.
    pub fn enter() -> Result<Self> {
        let world = enter_bare().context("make a network namespace")?;
        let hosts = [Host::new()?, Host::new()?];
        ip(&["link", "add", "name", "bridge0", "type", "bridge"])?;
        for (host, which) in hosts.iter().zip([Which::A, Which::B]) {
            let ours = format!("to-{}", which.letter());
            let there = host.namespace.path();
            let there = there.to_str().context("a path of this machine")?;
            let cable = ["type", "veth", "peer", "name", "world", "netns", there];
            let mut words = vec!["link", "add", "name", &ours];
            words.extend(cable);
            ip(&words)?;
            ip(&["link", "set", "dev", &ours, "master", "bridge0"])?;
            set_link(&ours, true)?;
        }
        ip(&["address", "add", "10.77.0.1/24", "dev", "bridge0"])?;
        set_link("bridge0", true)?;
        let [a, b] = &hosts;
        let there = b.namespace.path();
        let there = there.to_str().context("a path of this machine")?;
        inside(&a.namespace, || {
            let cable = ["type", "veth", "peer", "name", "log", "netns", there];
            let mut words = vec!["link", "add", "name", "log"];
            words.extend(cable);
            ip(&words)
        })?;
        for (host, which) in hosts.iter().zip([Which::A, Which::B]) {
            let own = format!("{}/24", which.address());
            inside(&host.namespace, || {
                ip(&["address", "add", &own, "dev", "log"])?;
                ip(&["link", "set", "dev", "world", "master", "bridge0"])?;
                CABLES
                    .iter()
                    .try_for_each(|cable| Ok(set_link(cable, true)?))
            })?;
        }
        let directory = tempfile::Builder::new()
            .prefix("doppel-test-")
            .tempdir()
            .context("make a directory")?;
        std::fs::create_dir(directory.path().join("arbiter")).context("make a directory")?;
        Secret::create(&directory.path().join(SECRET))?;
        Ok(Self {
            hosts,
            directory,
            _world: world,
        })
    }

    fn host(&self, which: Which) -> &Host {
        &self.hosts[usize::from(which == Which::B)]
    }

    /// A directory that both hosts see.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a role of a pair over TCP on this host, with these arguments besides.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, which: Which, name: &str, role: &str, more: &[&str]) -> Result<Role> {
        let host = self.host(which);
        let port = host.port.inheritable().context("share the network port")?;
        let port = port.as_raw_fd().to_string();
        let standby = which.other().listens().to_string();
        let mut arguments = vec![role, "--json", "--transport", "tcp", "--arbiter", "arbiter"];
        arguments.extend(["--net-fd", &port, "--standby", &standby, "--run-dir", "run"]);
        arguments.extend(["--secret", SECRET]);
        arguments.extend(more);
        inside(&host.namespace, || {
            Role::start(self.directory(), name, &arguments)
        })
    }

    /// Starts a backup there.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn backup(&self, which: Which, name: &str) -> Result<Role> {
        self.start(
            which,
            name,
            "backup",
            &["--listen", &which.listens().to_string()],
        )
    }

    /// Starts a backup there that listens at another port, so that it can be told from one that listens already.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn backup_at(
        &self,
        which: Which,
        name: &str,
        port: u16,
        more: &[&str],
    ) -> Result<(Role, SocketAddr)> {
        let address = SocketAddr::new(which.address().into(), port);
        let listen = address.to_string();
        let mut arguments = vec!["--listen", &listen];
        arguments.extend(more);
        Ok((self.start(which, name, "backup", &arguments)?, address))
    }

    /// The log's cable is cut, or joined again: the hosts do not reach each other, and clients reach both.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn join_log(&self, joined: bool) -> Result<()> {
        inside(&self.host(Which::A).namespace, || {
            Ok(set_link("log", joined)?)
        })
    }

    /// Nothing of what the other host sends arrives at this one, or all of it again: there its address leads to a card that is none.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn deafen(&self, which: Which, deaf: bool) -> Result<()> {
        let address = which.address().to_string();
        inside(&self.host(which.other()).namespace, || match deaf {
            true => lead_astray(&address),
            false => ip(&["neighbour", "delete", &address, "dev", "log"]),
        })
    }

    /// Another address of this host, to which nothing comes that the other host sends.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn deaf_address(&self, which: Which) -> Result<Ipv4Addr> {
        let [_, _, _, host] = which.address().octets();
        let address = Ipv4Addr::new(10, 79, 0, host);
        let words = address.to_string();
        inside(&self.host(which).namespace, || {
            ip(&["address", "add", &words, "dev", "log"])
        })?;
        inside(&self.host(which.other()).namespace, || {
            ip(&["route", "add", &words, "dev", "log"])?;
            lead_astray(&words)
        })?;
        Ok(address)
    }

    /// The log's cable takes no more than some megabits a second from this host, and queues what is more; or all of it again.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn slow(&self, which: Which, slow: bool) -> Result<()> {
        let words = match slow {
            true => "qdisc add dev log root tbf rate 6mbit burst 8kb latency 100ms",
            false => "qdisc delete dev log root",
        };
        let words: Vec<&str> = words.split(' ').collect();
        inside(&self.host(which).namespace, || run("tc", &words))
    }

    /// The host is lost, silently: its cables are cut and the process is killed, at once.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn lose(&self, which: Which, role: &Role) -> Result<()> {
        inside(&self.host(which).namespace, || {
            CABLES.iter().try_for_each(|cable| set_link(cable, false))?;
            send(role.pid(), Signal::Kill)
        })
    }

    /// It comes back, with nothing running.
    ///
    /// # Errors
    /// If the kernel does not do it.
    pub fn mend(&self, which: Which) -> Result<()> {
        inside(&self.host(which).namespace, || {
            CABLES
                .iter()
                .try_for_each(|cable| Ok(set_link(cable, true)?))
        })
    }
}

/// Does this on a thread in the host of this network.
pub(super) fn inside<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    namespace.run(work).context("enter a host")?
}

/// In the calling thread's host this address leads to a card that is none.
fn lead_astray(address: &str) -> Result<()> {
    const NOBODY: &str = "02:00:00:00:00:99";
    let to = ["lladdr", NOBODY, "dev", "log", "nud", "permanent"];
    ip(&[&["neighbour", "replace", address][..], &to].concat())
}

/// The networks of a world with several hosts, in the calling thread's namespace: of the guests, and of the logs.
pub(super) fn two_networks() -> Result<()> {
    for (bridge, address) in [("guests", "10.77.0.1/24"), ("logs", "10.78.0.254/24")] {
        ip(&["link", "add", "name", bridge, "type", "bridge"])?;
        ip(&["address", "add", address, "dev", bridge])?;
        set_link(bridge, true)?;
    }
    Ok(())
}

/// A host in such a world: a network of its own with a cable to each, of which the guests' ends in this bridge, and with this address
/// on the logs'.
pub(super) fn host_between(name: &str, bridge: &str, address: impl Display) -> Result<Namespace> {
    let namespace = alone(|| {
        let namespace = enter_bare().context("make a network namespace")?;
        ip(&["link", "add", "name", bridge, "type", "bridge"])?;
        set_link(bridge, true)?;
        Ok(namespace)
    })?;
    let there = namespace.path();
    let there = there.to_str().context("a path of this machine")?;
    for (cable, network) in CABLES.iter().zip(["guests", "logs"]) {
        let ours = format!("{cable}-{name}");
        ip(&[
            "link", "add", "name", &ours, "type", "veth", "peer", "name", cable, "netns", there,
        ])?;
        ip(&["link", "set", "dev", &ours, "master", network])?;
        set_link(&ours, true)?;
    }
    let own = format!("{address}/24");
    inside(&namespace, || {
        ip(&["address", "add", &own, "dev", "log"])?;
        ip(&["link", "set", "dev", "world", "master", bridge])?;
        CABLES
            .iter()
            .try_for_each(|cable| Ok(set_link(cable, true)?))
    })?;
    Ok(namespace)
}

/// iproute2's `ip`, in the calling thread's network.
pub(super) fn ip(words: &[&str]) -> Result<()> {
    run("ip", words)
}

fn run(program: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("start {program} (Debian's package iproute2)"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
