//! The demo's client: writes and reads keys through real TCP connections, and remembers what it was promised.
//!
//! One thread serves all connections by `poll(2)`, so that the client leaves the processors to the machines it
//! tests. Each connection has keys of its own and sends one request after the other's reply (or a small pipeline):
//! SET, INCR and APPEND of values that are never written twice, each followed by a GET of the same key. Replies
//! on a connection come in order, so each is compared at once with what the acknowledged writes before it make
//! it. A write without a reply may have happened or not: both are right. A broken connection is counted and never
//! made anew.
//!
//! ```text
//!  start ─▶ running ── mark_kill ──▶ running ── stop ──▶ Outcome ── verify_all ──▶ Verification
//! ```
//! # Before, during, after
//! With *K* the moment given to [`Client::mark_kill`], and *F* the arrival of the first reply that the new
//! primary sent:
//! - **before**: requests whose reply arrived at or before *K*;
//! - **after**: requests sent at or after *F*;
//! - **during**: all others that were answered. They were waiting at some moment between *K* and *F*.
//!
//! A reply that arrives right after *K* may still be the old primary's. *F* is therefore the first reply to arrive
//! at or after the moment given to [`Client::mark_live`]; without that, the reply that ends the longest silence of
//! all connections among those that began within [`record::OLD_REPLIES`] after *K*. The failover lasts *F* − *K*.
//!
//! All times are of `CLOCK_MONOTONIC`.
#![forbid(unsafe_code)]

mod model;
pub mod record;
mod resp;
mod verify;
mod worker;

use std::fmt;
use std::io;
use std::net::SocketAddrV4;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

pub use self::record::{Latency, Requests, Sample, Series, Slice};
pub use self::verify::Verification;
use self::worker::{Line, Worker};
use crate::backends::wait::{Moment, Wake};

/// Problems kept in words; the rest is only counted.
pub const PROBLEMS_KEPT: usize = 16;

/// Why the client cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration makes no sense.
    #[error("the client cannot run with {what}")]
    BadConfig {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The hook that runs first on the client's thread failed.
    #[error("the client cannot enter the demo's network namespace: {0}")]
    Hook(io::Error),
    /// A connection could not be made, or the server did not answer PING, in time.
    #[error("connection {number} to {address} did not come up within {within:?}: {source}")]
    Connect {
        /// Which connection, counted from 1.
        number: usize,
        /// The server.
        address: SocketAddrV4,
        /// The time allowed.
        within: Duration,
        /// The last attempt's error.
        source: io::Error,
    },
    /// A system call of the client's own failed.
    #[error("the client cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The client's thread panicked.
    #[error("the client's thread panicked; its message is on standard error")]
    Panicked,
}

/// Runs first on the client's thread, to bring it into a network namespace for example.
pub type Hook = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Every so many values, one of another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Large {
    /// One value in so many; at least 1.
    pub every: u32,
    /// Its length in bytes.
    pub length: usize,
}

/// What the client does.
pub struct Config {
    /// The server.
    pub address: SocketAddrV4,
    /// TCP connections.
    pub connections: usize,
    /// Requests a connection may have outstanding.
    pub pipeline: usize,
    /// Requests offered per second over all connections; `None` sends as fast as replies come. At a fixed rate
    /// latency counts from when a request was due, not from when it could be sent, so that a stall is
    /// charged to every request it delayed (no coordinated omission).
    pub rate: Option<f64>,
    /// Length of a value in bytes.
    pub value_length: RangeInclusive<usize>,
    /// Some values of another size.
    pub large: Option<Large>,
    /// Makes the choice of requests and values repeatable. Key names contain it.
    pub seed: u64,
    /// Time for all connections to come up and answer PING, for a server that is still starting.
    pub connect_within: Duration,
    /// Time for outstanding replies to come in after [`Client::stop`].
    pub drain_within: Duration,
    /// Runs first on the client's thread.
    pub hook: Option<Hook>,
}

impl Config {
    /// Eight connections, one request at a time on each, as fast as replies come, values of 16 to 512 bytes.
    pub fn new(address: SocketAddrV4, seed: u64) -> Self {
        Self {
            address,
            connections: 8,
            pipeline: 1,
            rate: None,
            value_length: 16..=512,
            large: None,
            seed,
            connect_within: Duration::from_secs(15),
            drain_within: Duration::from_secs(5),
            hook: None,
        }
    }

    fn check(&self) -> Result<(), ClientError> {
        let bad = |what| Err(ClientError::BadConfig { what });
        if self.connections == 0 || self.pipeline == 0 {
            return bad("no connections or no requests on them");
        }
        if self.value_length.is_empty() {
            return bad("an empty range of value lengths");
        }
        if self.large.is_some_and(|large| large.every == 0) {
            return bad("a large value every 0 values");
        }
        if self.rate.is_some_and(|rate| !(0.001..=1e9).contains(&rate)) {
            return bad("a rate outside 0.001 to 1e9 requests a second");
        }
        Ok(())
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("address", &self.address)
            .field("connections", &self.connections)
            .field("pipeline", &self.pipeline)
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

/// How the client is doing, for a progress display.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests answered.
    pub completed: u64,
    /// Writes among them that the server acknowledged.
    pub acknowledged_writes: u64,
    /// Replies that were not what the acknowledged writes before them make them.
    pub wrong_replies: u64,
    /// Connections that broke.
    pub broken_connections: u64,
    /// When the last reply arrived; zero if none has.
    pub last_reply: Moment,
}

/// What the client's thread shares with its handle. A moment of 0 means "not yet".
#[derive(Debug)]
struct Shared {
    wake: Wake,
    stop: AtomicBool,
    kill_at: AtomicU64,
    live_at: AtomicU64,
    completed: AtomicU64,
    acknowledged_writes: AtomicU64,
    wrong_replies: AtomicU64,
    broken_connections: AtomicU64,
    last_reply: AtomicU64,
}

impl Shared {
    fn new() -> io::Result<Self> {
        Ok(Self {
            wake: Wake::new()?,
            stop: AtomicBool::new(false),
            kill_at: AtomicU64::new(0),
            live_at: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            acknowledged_writes: AtomicU64::new(0),
            wrong_replies: AtomicU64::new(0),
            broken_connections: AtomicU64::new(0),
            last_reply: AtomicU64::new(0),
        })
    }

    fn marked(mark: &AtomicU64) -> Option<Moment> {
        let nanos = mark.load(Ordering::Acquire);
        (nanos != 0).then(|| Moment::from_nanos(nanos))
    }
}

/// A running client. Dropping it stops it without an outcome.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Outcome>>,
}

/// Connects, checks with PING that somebody serves, and starts the load.
pub fn start(mut config: Config) -> Result<Client, ClientError> {
    config.check()?;
    let shared = Arc::new(Shared::new().map_err(|source| ClientError::Io {
        what: "make an event descriptor",
        source,
    })?);
    let theirs = Arc::clone(&shared);
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("client".to_owned())
        .spawn(move || {
            let hook = config.hook.take().map_or(Ok(()), |hook| hook());
            let lines = hook
                .map_err(ClientError::Hook)
                .and_then(|()| worker::connect_all(&config));
            let (lines, result) = match lines {
                Ok(lines) => (lines, Ok(())),
                Err(error) => (Vec::new(), Err(error)),
            };
            let idle = result.is_err();
            // The receiver waits for exactly this.
            let _ = tell.send(result);
            let mut worker = Worker::new(&config, &theirs, lines);
            if !idle {
                worker.run();
            }
            worker.outcome()
        })
        .map_err(|source| ClientError::Io {
            what: "start its thread",
            source,
        })?;
    let client = Client {
        shared,
        thread: Some(thread),
    };
    match told.recv() {
        Ok(Ok(())) => Ok(client),
        Ok(Err(error)) => Err(error),
        Err(mpsc::RecvError) => Err(ClientError::Panicked),
    }
}

impl Client {
    /// Says that the primary is being killed. Call it with the clock read right before the kill.
    pub fn mark_kill(&self, at: Moment) {
        self.shared.kill_at.store(at.as_nanos(), Ordering::Release);
    }

    /// Says when the new primary went live, on the same clock; any time before [`Client::stop`] will do.
    pub fn mark_live(&self, at: Moment) {
        self.shared.live_at.store(at.as_nanos(), Ordering::Release);
    }

    /// How it is doing.
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        Progress {
            completed: shared.completed.load(Ordering::Relaxed),
            acknowledged_writes: shared.acknowledged_writes.load(Ordering::Relaxed),
            wrong_replies: shared.wrong_replies.load(Ordering::Relaxed),
            broken_connections: shared.broken_connections.load(Ordering::Relaxed),
            last_reply: Moment::from_nanos(shared.last_reply.load(Ordering::Relaxed)),
        }
    }

    /// Sends no more, waits for the outstanding replies, and returns what happened.
    pub fn stop(mut self) -> Result<Outcome, ClientError> {
        self.end().unwrap_or(Err(ClientError::Panicked))
    }

    fn end(&mut self) -> Option<Result<Outcome, ClientError>> {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.ring();
        let thread = self.thread.take()?;
        Some(thread.join().map_err(|_| ClientError::Panicked))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
    }
}

/// What happened, and what was promised. The connections stay open for [`Outcome::verify_all`].
#[derive(Debug)]
pub struct Outcome {
    /// Answered requests, by when.
    pub requests: Requests,
    /// Writes that the server acknowledged.
    pub acknowledged_writes: u64,
    /// Requests that the server answered with an error; a refused write is not promised.
    pub refused: u64,
    /// Requests that were never answered.
    pub unanswered: u64,
    /// Replies that were not what the acknowledged writes before them make them.
    pub wrong_replies: u64,
    /// Acknowledged writes whose loss such a reply has shown already.
    pub lost_while_running: u64,
    /// Connections that broke, or had a request unanswered at the end.
    pub broken_connections: u64,
    /// From the kill to the first reply of the new primary; `None` without a kill or without such a reply.
    pub failover: Option<Duration>,
    /// The longest that a request waited which arrived or was still unanswered after the kill; without a kill, of
    /// all requests.
    pub stall_max: Duration,
    /// Latency of all answered requests.
    pub latency: Latency,
    /// Latency over time, for a picture.
    pub series: Series,
    /// The first problems, in words.
    pub problems: Vec<String>,
    lines: Vec<Line>,
}

#[cfg(test)]
mod tests;
