//! The alternatives: Debian's `redis-server`, its Sentinel and `etcd`, on loopback, with their data in memory.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::client::{Line, Service};
use super::grpc::Grpc;
use super::resp::{Reply, Resp};
use crate::world::end_with_us;

/// How long a rival may take to come up on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// After how long without an answer a Sentinel thinks its master down. Its own default is 30 seconds, its documentation's example
/// a minute; half a second is below what its makers call sensible, and in its favour here.
pub const DOWN_AFTER_MS: u32 = 500;
const FAILOVER_TIMEOUT_MS: u32 = 5000;
/// The name Sentinel knows the service by.
const MASTER: &str = "side";

/// An address on loopback that was free a moment ago.
fn free() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    listener.local_addr().context("read a port")
}

/// Waits until `ready` says so.
fn until(what: &str, log: &Path, mut ready: impl FnMut() -> bool) -> Result<()> {
    let by = Instant::now() + PATIENCE;
    while !ready() {
        ensure!(
            Instant::now() < by,
            "{what} is not up within {PATIENCE:?}: {}",
            std::fs::read_to_string(log).unwrap_or_default()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A process of a rival's; killed when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    child: Child,
}

impl Server {
    fn start(mut command: Command, address: SocketAddr, log: &Path) -> Result<Self> {
        let log = || File::options().create(true).append(true).open(log);
        command
            .stdin(Stdio::null())
            .stdout(log().context("make a log")?)
            .stderr(log().context("make a log")?);
        end_with_us(&mut command);
        let name = command.get_program().to_owned();
        let child = command
            .spawn()
            .with_context(|| format!("start {name:?}: run scripts/install-test-tools first"))?;
        Ok(Self { address, child })
    }

    /// SIGKILL, and reaped.
    pub fn kill(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a program says of itself, in one line.
pub fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    text.lines().next().unwrap_or("not installed").to_owned()
}

/// A server that is always at the same place.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Where.
    pub address: SocketAddr,
    /// Replicas that must have a write.
    pub replicas: u32,
}

impl Service for At {
    fn connect(&self) -> io::Result<Box<dyn Line>> {
        Ok(Box::new(Resp::connect(self.address, self.replicas)?))
    }
}

fn redis(directory: &Path, name: &str, of: Option<SocketAddr>) -> Result<Server> {
    let address = free()?;
    let own = directory.join(name);
    std::fs::create_dir_all(&own).context("make a directory for redis")?;
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--port", &address.port().to_string()])
        .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
        // A replica gets its copy at once, and no disk is in the way.
        .args(["--repl-diskless-sync-delay", "0"])
        .arg("--dir")
        .arg(&own);
    if let Some(of) = of {
        command.args(["--replicaof", "127.0.0.1", &of.port().to_string()]);
    }
    let log = own.join("log");
    let server = Server::start(command, address, &log)?;
    let pong = Reply::Text(Some(b"PONG".to_vec()));
    until("redis-server", &log, || {
        Resp::connect(address, 0)
            .is_ok_and(|mut one| one.ask(&[b"PING"]).is_ok_and(|said| said == pong))
    })?;
    Ok(server)
}

/// `redis-server` with replicas.
#[derive(Debug)]
pub struct Redis {
    /// Serves.
    pub master: Server,
    replicas: Vec<Server>,
}

impl Redis {
    /// Starts it with so many replicas, and waits until they follow.
    ///
    /// # Errors
    /// If it is not installed or does not come up.
    pub fn start(directory: &Path, replicas: u32) -> Result<Self> {
        let master = redis(directory, "master", None)?;
        let replicas: Vec<Server> = (0..replicas)
            .map(|number| {
                redis(
                    directory,
                    &format!("replica-{number}"),
                    Some(master.address),
                )
            })
            .collect::<Result<_>>()?;
        for replica in &replicas {
            until("a replica", &directory.join("replica-0/log"), || {
                let said = Resp::connect(replica.address, 0)
                    .and_then(|mut one| one.ask(&[b"INFO", b"replication"]));
                said.is_ok_and(|said| {
                    said.text()
                        .is_some_and(|text| text.contains("master_link_status:up"))
                })
            })?;
        }
        Ok(Self { master, replicas })
    }

    /// Where it serves; a write counts once so many replicas have it.
    #[must_use]
    pub fn service(&self, replicas: u32) -> At {
        At {
            address: self.master.address,
            replicas,
        }
    }

    /// What an operator does by hand: the first replica becomes the master.
    ///
    /// # Errors
    /// If it refuses.
    pub fn promote(&self) -> Result<At> {
        let heir = self.replicas.first().context("there is no replica")?;
        let said = Resp::connect(heir.address, 0)?.ask(&[b"REPLICAOF", b"NO", b"ONE"])?;
        ensure!(matches!(said, Reply::Text(_)), "REPLICAOF NO ONE: {said:?}");
        Ok(At {
            address: heir.address,
            replicas: 0,
        })
    }
}

/// `redis-server` with two replicas, and three Sentinels that watch it.
#[derive(Debug)]
pub struct Sentinel {
    /// The servers.
    pub redis: Redis,
    watchers: Vec<Server>,
}

impl Sentinel {
    /// Starts it, and waits until the Sentinels know each other and every replica.
    ///
    /// # Errors
    /// If it is not installed or does not come up.
    pub fn start(directory: &Path) -> Result<Self> {
        let redis = Redis::start(directory, 2)?;
        let watchers: Vec<Server> = (0..3)
            .map(|number| sentinel(directory, number, redis.master.address))
            .collect::<Result<_>>()?;
        let all = Self { redis, watchers };
        for watcher in &all.watchers {
            until("Sentinel", &directory.join("sentinel-0/log"), || {
                let said = Resp::connect(watcher.address, 0)
                    .and_then(|mut one| one.ask(&[b"SENTINEL", b"MASTER", MASTER.as_bytes()]));
                said.is_ok_and(|said| {
                    knows(&said, "num-other-sentinels", "2") && knows(&said, "num-slaves", "2")
                })
            })?;
        }
        Ok(all)
    }

    /// The way to whoever is the master; a write counts once so many replicas have it.
    #[must_use]
    pub fn service(&self, replicas: u32) -> Watched {
        Watched {
            watchers: self
                .watchers
                .iter()
                .map(|watcher| watcher.address)
                .collect(),
            replicas,
            turn: AtomicUsize::new(0),
        }
    }
}

/// A master that Sentinels name.
#[derive(Debug)]
pub struct Watched {
    watchers: Vec<SocketAddr>,
    replicas: u32,
    turn: AtomicUsize,
}

/// Whether a list of names and values has this one.
fn knows(said: &Reply, name: &str, value: &str) -> bool {
    let Reply::List(words) = said else {
        return false;
    };
    words
        .chunks_exact(2)
        .any(|pair| pair[0].text() == Some(name) && pair[1].text() == Some(value))
}

fn sentinel(directory: &Path, number: usize, master: SocketAddr) -> Result<Server> {
    let own = directory.join(format!("sentinel-{number}"));
    std::fs::create_dir_all(&own).context("make a directory for Sentinel")?;
    let address = free()?;
    let file = own.join("sentinel.conf");
    let text = format!(
        "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor {MASTER} 127.0.0.1 {} 2\n\
         sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}\n\
         sentinel failover-timeout {MASTER} {FAILOVER_TIMEOUT_MS}\nsentinel parallel-syncs {MASTER} 1\n",
        address.port(),
        own.display(),
        master.port()
    );
    std::fs::write(&file, text).context("write Sentinel's configuration")?;
    let mut command = Command::new("redis-server");
    command.arg(&file).arg("--sentinel");
    Server::start(command, address, &own.join("log"))
}

impl Service for Watched {
    fn connect(&self) -> io::Result<Box<dyn Line>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let watcher = self.watchers[turn % self.watchers.len()];
        let mut ask = Resp::connect(watcher, 0)?;
        let said = ask.ask(&[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", MASTER.as_bytes()])?;
        let port = match &said {
            Reply::List(words) => words
                .get(1)
                .and_then(Reply::text)
                .and_then(|port| port.parse().ok()),
            _ => None,
        };
        let nobody = || io::Error::new(io::ErrorKind::NotFound, format!("Sentinel says {said:?}"));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.ok_or_else(nobody)?));
        let mut line = Resp::connect(address, self.replicas)?;
        // As Sentinel's rules for clients have it: whoever was named is asked whether it is one.
        match line.ask(&[b"ROLE"])? {
            Reply::List(words) if words.first().and_then(Reply::text) == Some("master") => {
                Ok(Box::new(line))
            }
            other => Err(io::Error::other(format!("no master yet: {other:?}"))),
        }
    }
}

/// Three members of etcd.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Server>,
}

impl Etcd {
    /// Starts three, and waits until one leads.
    ///
    /// # Errors
    /// If it is not installed or does not come up.
    pub fn start(directory: &Path) -> Result<Self> {
        let places: Vec<(SocketAddr, SocketAddr)> = (0..3)
            .map(|_| Ok((free()?, free()?)))
            .collect::<Result<_>>()?;
        let cluster: Vec<String> = places
            .iter()
            .zip(0..)
            .map(|((_, peer), number)| format!("m{number}=http://{peer}"))
            .collect();
        let cluster = cluster.join(",");
        let log = directory.join("log");
        let members = places
            .iter()
            .zip(0..)
            .map(|((client, peer), number)| {
                let name = format!("m{number}");
                let (client_url, peer_url) = (format!("http://{client}"), format!("http://{peer}"));
                let mut command = Command::new("etcd");
                command
                    .args(["--name", &name, "--logger", "zap", "--log-level", "error"])
                    .arg("--data-dir")
                    .arg(directory.join(&name))
                    .args([
                        "--listen-client-urls",
                        &client_url,
                        "--advertise-client-urls",
                        &client_url,
                    ])
                    .args([
                        "--listen-peer-urls",
                        &peer_url,
                        "--initial-advertise-peer-urls",
                        &peer_url,
                    ])
                    .args([
                        "--initial-cluster",
                        &cluster,
                        "--initial-cluster-state",
                        "new",
                    ]);
                Server::start(command, *client, &log)
            })
            .collect::<Result<_>>()?;
        let all = Self { members };
        until("etcd", &log, || all.leader().is_ok())?;
        Ok(all)
    }

    /// The way to its members.
    #[must_use]
    pub fn service(&self) -> Members {
        Members {
            addresses: self.members.iter().map(|member| member.address).collect(),
            turn: AtomicUsize::new(0),
        }
    }

    fn leader(&self) -> Result<usize> {
        for (number, member) in self.members.iter().enumerate() {
            if leads(member.address).unwrap_or(false) {
                return Ok(number);
            }
        }
        bail!("no member of etcd leads")
    }

    /// Kills the member that leads.
    ///
    /// # Errors
    /// If none does.
    pub fn kill_leader(&mut self) -> Result<()> {
        let leader = self.leader()?;
        self.members[leader].kill();
        Ok(())
    }
}

/// Whether a member says in its metrics that it leads.
fn leads(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.lines().any(|line| line == "etcd_server_is_leader 1"))
}

/// Any member of etcd: each takes writes, and hands them to the leader.
#[derive(Debug)]
pub struct Members {
    addresses: Vec<SocketAddr>,
    turn: AtomicUsize,
}

impl Service for Members {
    fn connect(&self) -> io::Result<Box<dyn Line>> {
        // As etcd's own client does it: each connection to the next member.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let member = self.addresses[turn % self.addresses.len()];
        Ok(Box::new(Grpc::connect(member)?))
    }
}
