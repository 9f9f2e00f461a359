//! A real etcd server on loopback, and a proxy before it that delays, cuts and swallows.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::arbiter::{Arbiter, EtcdArbiter, Place};
use rdma_log::locks::lock;

use super::certificates::{Authority, Issued};
use super::random::Random;
use super::signal::{Signal, send};

/// How long etcd may take to start on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// One etcd server, a cluster by itself, with its data in a directory. Killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    directory: PathBuf,
    client: SocketAddr,
    peer: SocketAddr,
    tls: Option<Tls>,
    child: Option<Child>,
}

/// What a server of TLS has, and what its clients show it.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The authority that both believe.
    pub ca: PathBuf,
    /// The server's own.
    pub server: Issued,
    /// A client's.
    pub client: Issued,
    /// One with a common name, which not every etcd takes.
    pub named: Issued,
}

impl Tls {
    /// All of it anew, in this directory.
    ///
    /// # Errors
    /// If `openssl` is not there.
    pub fn new(directory: &Path) -> Result<Self> {
        let authority = Authority::new(directory, "ca")?;
        Ok(Self {
            ca: authority.certificate().to_owned(),
            server: authority.server("server")?,
            client: authority.client("client")?,
            named: authority.client_by_name("named")?,
        })
    }
}

/// A port of this address that was free a moment ago.
fn free(at: IpAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((at, 0)).context("find a free port")?;
    listener.local_addr().context("read a port")
}

impl Etcd {
    /// Starts one with its data in `directory`, and waits until it serves.
    ///
    /// # Errors
    /// If it is not installed, or does not serve.
    pub fn start(directory: &Path) -> Result<Self> {
        Self::start_with(directory, Ipv4Addr::LOCALHOST.into(), None)
    }

    /// The same, at this address of the calling thread's network; over TLS, for clients with a certificate alone.
    ///
    /// # Errors
    /// As [`Etcd::start`].
    pub fn start_with(directory: &Path, at: IpAddr, tls: Option<Tls>) -> Result<Self> {
        std::fs::create_dir_all(directory).context("make a directory for etcd")?;
        let mut etcd = Self {
            directory: directory.to_owned(),
            client: free(at)?,
            peer: free(at)?,
            tls,
            child: None,
        };
        etcd.run()?;
        Ok(etcd)
    }

    /// Starts it again after [`Etcd::kill`], with the data that it had, and waits until it serves.
    ///
    /// # Errors
    /// If it does not.
    pub fn run(&mut self) -> Result<()> {
        let url = |address: SocketAddr| format!("http://{address}");
        let (client, secured) = match &self.tls {
            None => (url(self.client), Vec::new()),
            Some(tls) => {
                let file = |option: &str, path: &Path| format!("--{option}={}", path.display());
                let secured = vec![
                    "--client-cert-auth".to_owned(),
                    file("trusted-ca-file", &tls.ca),
                    file("cert-file", &tls.server.cert),
                    file("key-file", &tls.server.key),
                ];
                (format!("https://{}", self.client), secured)
            }
        };
        let log = || {
            File::options()
                .create(true)
                .append(true)
                .open(self.directory.join("log"))
        };
        let child = Command::new("etcd")
            .args(["--name", "one", "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.directory.join("data"))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(secured)
            .args(["--listen-peer-urls", &url(self.peer)])
            .args(["--initial-advertise-peer-urls", &url(self.peer)])
            .args(["--initial-cluster", &format!("one={}", url(self.peer))])
            .stdin(Stdio::null())
            .stdout(log().context("make etcd's log")?)
            .stderr(log().context("make etcd's log")?)
            .spawn()
            .context("start etcd: run scripts/install-test-tools first")?;
        self.child = Some(child);
        let until = Instant::now() + PATIENCE;
        let arbiter = self.arbiter("etcd-is-up")?;
        while let Err(error) = arbiter.read() {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok()?) {
                bail!("etcd ended by {status}: {}", self.log());
            }
            ensure!(
                Instant::now() < until,
                "etcd does not serve ({error}): {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Where it serves clients.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.client
    }

    /// As `--arbiter` takes it.
    #[must_use]
    pub fn place(&self) -> String {
        let Some(Tls { ca, client, .. }) = &self.tls else {
            return format!("etcd://{}", self.client);
        };
        format!(
            "etcds://{}?ca={}&cert={}&key={}",
            self.client,
            ca.display(),
            client.cert.display(),
            client.key.display()
        )
    }

    /// A client of it, as a pair has one.
    ///
    /// # Errors
    /// If the machine's name is none.
    pub fn arbiter(&self, machine: &str) -> Result<EtcdArbiter> {
        arbiter_at(&self.place(), machine)
    }

    /// SIGKILL, and reaped.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only for a process that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// It stands still: connections are taken by the kernel, and nothing answers.
    ///
    /// # Errors
    /// If it does not run.
    pub fn freeze(&self) -> Result<()> {
        send(self.pid()?, Signal::Stop)
    }

    /// It goes on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn thaw(&self) -> Result<()> {
        send(self.pid()?, Signal::Continue)
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.child.as_ref().context("etcd does not run")?.id())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A client of the etcd at this place.
///
/// # Errors
/// If the place or the machine's name is none.
pub fn arbiter_at(place: &str, machine: &str) -> Result<EtcdArbiter> {
    match place.parse()? {
        Place::Etcd(cluster) => Ok(EtcdArbiter::open(&cluster, machine)?),
        Place::Directory(path) => bail!("{} is no etcd", path.display()),
    }
}

/// What the proxy does to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    /// Nothing.
    None,
    /// Every answer comes so many milliseconds late.
    Delay(u64),
    /// The request is handed on, and the connection is cut before its answer comes back, so many times in a hundred.
    LoseAnswers(u64),
    /// The connection is cut when the request comes, or the answer is lost, or it is late: at random, mostly none of them.
    Anything,
}

/// A proxy before an etcd.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<ProxyShared>,
    thread: Option<JoinHandle<()>>,
}

struct ProxyShared {
    to: SocketAddr,
    mischief: Mutex<Mischief>,
    random: Mutex<Random>,
    lost: AtomicU64,
    over: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// Starts one before `to`.
    ///
    /// # Errors
    /// If the host gives no port or thread.
    pub fn start(to: SocketAddr, mischief: Mischief, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("bind a proxy")?;
        let address = listener.local_addr().context("read a port")?;
        let shared = Arc::new(ProxyShared {
            to,
            mischief: Mutex::new(mischief),
            random: Mutex::new(Random::new(seed)),
            lost: AtomicU64::new(0),
            over: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("etcd-proxy".into())
            .spawn(move || theirs.accept(&listener))
            .context("start a proxy")?;
        Ok(Self {
            address,
            shared,
            thread: Some(thread),
        })
    }

    /// As `--arbiter` takes it.
    #[must_use]
    pub fn place(&self) -> String {
        format!("etcd://{}", self.address)
    }

    /// From now on this.
    pub fn set(&self, mischief: Mischief) {
        *lock(&self.shared.mischief) = mischief;
    }

    /// Answers that were lost after their request had been handed on.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts; whether it is taken does not matter.
        let _ = TcpStream::connect(self.address);
        for stream in lock(&self.shared.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the proxy does not panic");
        }
    }
}

impl ProxyShared {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        let mut threads = Vec::new();
        for client in listener.incoming().map_while(Result::ok) {
            if self.over.load(Ordering::SeqCst) {
                break;
            }
            // An etcd that is not there is a connection that ends.
            let Ok(server) = TcpStream::connect(self.to) else {
                continue;
            };
            let mut streams = lock(&self.streams);
            streams.extend(
                [client.try_clone(), server.try_clone()]
                    .into_iter()
                    .flatten(),
            );
            drop(streams);
            let shared = Arc::clone(&self);
            threads.push(std::thread::spawn(move || shared.carry(client, server)));
        }
        for thread in threads {
            thread.join().expect("the proxy does not panic");
        }
    }

    /// Carries one request after the other. Our client asks the next one only after the answer to the last.
    fn carry(&self, mut client: TcpStream, mut server: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = client.read(&mut buffer) {
            let (chance, mischief) = (lock(&self.random).below(100), *lock(&self.mischief));
            if mischief == Mischief::Anything && chance < 10 {
                break;
            }
            if server.write_all(&buffer[..length]).is_err() {
                break;
            }
            let Ok(length @ 1..) = server.read(&mut buffer) else {
                break;
            };
            let lose = match mischief {
                Mischief::LoseAnswers(percent) => chance < percent,
                Mischief::Anything => (10..25).contains(&chance),
                _ => false,
            };
            if lose {
                self.lost.fetch_add(1, Ordering::Relaxed);
                break;
            }
            let late = match mischief {
                Mischief::Delay(ms) => ms,
                Mischief::Anything if chance >= 90 => 20,
                _ => 0,
            };
            // A slow network is what this is.
            std::thread::sleep(Duration::from_millis(late));
            if client.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}
