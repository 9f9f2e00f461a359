//! Forwards a TCP port of the host's 127.0.0.1 to the guest, in two ways behind one handle.
//!
//! ```text
//!  Gateway::over_link    kernel's TCP ── listener ─▶ TCP/IP of our own (smoltcp) ── link ── guest
//!  Gateway::spliced      kernel's TCP ── listener ─▶ kernel's TCP ── TAP ── guest
//! ```
//! Each accepted connection gets one connection to the guest; bytes are carried both ways, each direction with
//! its own end of stream and with back-pressure (what one side does not take is not read from the other). One
//! thread waits with `poll(2)` for everything at once: there is no sleep and no tick anywhere.
//!
//! A listener belongs to the network namespace in which it was bound and a connection to the one of the thread
//! that makes it. So: [`bind`] in the host's namespace, then [`super::namespace::enter`], then start a gateway.
#![forbid(unsafe_code)]

mod over_link;
mod splice;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::backends::tap::Ipv4Network;
use crate::backends::wait::{Waiter, Wake};
use crate::backends::{NetPort, PortKind};

/// Connections carried at once. Beyond that, callers wait in the listener's queue.
pub const MAX_CONNECTIONS: usize = 256;

/// Why a gateway cannot start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The host's port is taken or not allowed.
    #[error(
        "cannot listen on 127.0.0.1:{port}: {source}; choose another port, or 0 for any that is free"
    )]
    Listen {
        /// The port that was asked for.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The port is a TAP's, whose other end is the kernel's.
    #[error(
        "a gateway of its own TCP/IP needs a Unix-socket link, not a TAP: use the spliced one with a TAP"
    )]
    NotALink,
    /// A step of setting up or waiting failed.
    #[error("the gateway cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The gateway's thread panicked.
    #[error("the gateway's thread panicked; its message is on standard error")]
    Panicked,
}

/// The host's side of a Unix-socket link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkHost {
    /// The gateway's own address and network on the link.
    pub address: Ipv4Network,
    /// The gateway's own Ethernet address.
    pub mac: [u8; 6],
    /// Longest payload of a frame, in bytes; at least 576.
    pub mtu: u16,
}

/// Counts of a gateway, so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections accepted on the host's side.
    pub accepted: u64,
    /// Of these, how many the guest refused or reset, or could not be reached for.
    pub broken_by_guest: u64,
    /// Of these, how many are open.
    pub open: u64,
    /// Bytes carried to the guest.
    pub bytes_in: u64,
    /// Bytes carried from the guest.
    pub bytes_out: u64,
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    broken_by_guest: AtomicU64,
    open: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(amount as u64, Ordering::Relaxed);
    }

    fn read(&self) -> Traffic {
        Traffic {
            accepted: self.accepted.load(Ordering::Relaxed),
            broken_by_guest: self.broken_by_guest.load(Ordering::Relaxed),
            open: self.open.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
        }
    }
}

/// What a gateway's thread shares with its handle.
#[derive(Debug)]
struct Shared {
    wake: Wake,
    stop: AtomicBool,
    counters: Counters,
}

/// A running gateway. Dropping it stops it.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), GatewayError>>>,
}

/// Listens on a port of 127.0.0.1 in the calling thread's network namespace; 0 takes any free one.
pub fn bind(port: u16) -> Result<TcpListener, GatewayError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .map_err(|source| GatewayError::Listen { port, source })
}

impl Gateway {
    /// Forwards over the other end of a Unix-socket link, with a TCP/IP of its own.
    pub fn over_link(
        listener: TcpListener,
        port: NetPort,
        host: LinkHost,
        guest: SocketAddrV4,
    ) -> Result<Self, GatewayError> {
        if port.kind() != PortKind::Link {
            return Err(GatewayError::NotALink);
        }
        Self::start("gateway-link", listener, move |listener, shared| {
            over_link::run(listener, port, host, guest, shared)
        })
    }

    /// Forwards to an address that the kernel can reach from the calling thread's network namespace.
    pub fn spliced(listener: TcpListener, guest: SocketAddrV4) -> Result<Self, GatewayError> {
        Self::start("gateway-splice", listener, move |listener, shared| {
            splice::run(listener, guest, shared)
        })
    }

    fn start(
        name: &str,
        listener: TcpListener,
        run: impl FnOnce(TcpListener, &Shared) -> Result<(), GatewayError> + Send + 'static,
    ) -> Result<Self, GatewayError> {
        let failed = |what| move |source| GatewayError::Io { what, source };
        listener
            .set_nonblocking(true)
            .map_err(failed("set up its listener"))?;
        let address = listener
            .local_addr()
            .map_err(failed("learn its own address"))?;
        let shared = Arc::new(Shared {
            wake: Wake::new().map_err(failed("make an event descriptor"))?,
            stop: AtomicBool::new(false),
            counters: Counters::default(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(listener, &theirs))
            .map_err(failed("start its thread"))?;
        Ok(Self {
            address,
            shared,
            thread: Some(thread),
        })
    }

    /// The host's address that is forwarded.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has done so far.
    pub fn traffic(&self) -> Traffic {
        self.shared.counters.read()
    }

    /// Stops: closes the listener and every connection, and waits for the thread.
    ///
    /// # Errors
    /// What ended the thread before it was asked to.
    pub fn stop(mut self) -> Result<Traffic, GatewayError> {
        self.end()?;
        Ok(self.traffic())
    }

    fn end(&mut self) -> Result<(), GatewayError> {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.ring();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(GatewayError::Panicked),
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("{error}");
        }
    }
}

/// How long to leave the listener alone after it failed for a reason that only time mends, as when the process
/// has no descriptor left. Without it the loop would spin on a listener that stays readable.
const REST: Duration = Duration::from_millis(100);

/// The listener.
struct Door {
    listener: TcpListener,
    resting: bool,
}

impl Door {
    fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            resting: false,
        }
    }

    /// Has the wait end when a caller comes.
    fn watch(&self, waiter: &mut Waiter) {
        if !self.resting {
            waiter.add(&self.listener, true, false);
        }
    }

    /// The longest that a wait may take.
    fn limit(&self, timeout: Option<Duration>) -> Option<Duration> {
        if self.resting {
            Some(timeout.map_or(REST, |timeout| timeout.min(REST)))
        } else {
            timeout
        }
    }

    /// The next caller, or `None` if there is none for now.
    fn accept(&mut self) -> Option<TcpStream> {
        self.resting = false;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(true).is_ok() {
                        send_at_once(&stream);
                        return Some(stream);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // The caller hung up before we came.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => {
                    tracing::warn!("cannot accept a connection for the guest: {error}");
                    self.resting = true;
                    return None;
                }
            }
        }
    }
}

/// Requests and replies are small and awaited.
fn send_at_once(stream: &TcpStream) {
    // No more than a hint, so a refusal does not matter.
    let _ = stream.set_nodelay(true);
}

fn wait(waiter: &mut Waiter, timeout: Option<Duration>) -> Result<(), GatewayError> {
    waiter
        .wait(timeout)
        .map(drop)
        .map_err(|source| GatewayError::Io {
            what: "wait for its connections",
            source,
        })
}

fn not_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
