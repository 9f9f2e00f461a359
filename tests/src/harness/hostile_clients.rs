//! Clients of a key-value machine that hold it to everything it has told them.
//!
//! Each has a TCP connection of its own and asks again only when it has its answers: nothing is repeated by us, so whatever
//! is answered twice, lost or taken back was so by the machine.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Moment;

use super::random::Random;

/// Far longer than any failover may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Requests in one go at most.
const BATCH: u64 = 4;

/// Longest value, in bytes.
const LONGEST: u64 = 3000;

/// Keys of each client; further values overwrite the oldest, and memory stays bounded.
const KEYS: u64 = 1500;

/// Waits that are kept apart: far above a request's usual time here, below everything that is judged.
const LONG_WAIT: Duration = Duration::from_millis(10);

/// The counter that all clients count up.
const COUNTER: &str = "counter";

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Okay,
    Number(u64),
    Value(Vec<u8>),
    Nothing,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Line {
    stream: BufReader<TcpStream>,
    out: Vec<u8>,
}

impl Line {
    /// Connects, trying for as long as the guest may need to start.
    pub(super) fn open(address: SocketAddrV4) -> Result<Self> {
        Self::open_within(address, PATIENCE)
    }

    /// The same; for so long an answer may take as well.
    pub(super) fn open_within(address: SocketAddrV4, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        loop {
            match TcpStream::connect_timeout(&address.into(), Duration::from_secs(1)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(patience))?;
                    return Ok(Self {
                        stream: BufReader::new(stream),
                        out: Vec::new(),
                    });
                }
                Err(error) if Instant::now() >= until => {
                    return Err(error).context("connect to the guest");
                }
                // Refused: it boots. There is nothing to wait on but time.
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    pub(super) fn add(&mut self, words: &[&[u8]]) {
        self.out
            .extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.out
                .extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            self.out.extend_from_slice(word);
            self.out.extend_from_slice(b"\r\n");
        }
    }

    pub(super) fn send(&mut self) -> Result<()> {
        self.stream
            .get_mut()
            .write_all(&self.out)
            .context("send requests")?;
        self.out.clear();
        Ok(())
    }

    pub(super) fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .context("wait for an answer")?;
        let line = line.trim_end();
        ensure!(!line.is_empty(), "the connection was closed");
        let (kind, rest) = line.split_at(1);
        Ok(match kind {
            "+" => Reply::Okay,
            ":" => Reply::Number(rest.parse()?),
            "$" if rest == "-1" => Reply::Nothing,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream
                    .read_exact(&mut bytes)
                    .context("wait for a value")?;
                bytes.truncate(bytes.len() - 2);
                Reply::Value(bytes)
            }
            _ => bail!("the guest says {line:?}"),
        })
    }
}

/// What a client writes the n-th time: unique, and of many lengths.
fn value(client: u64, number: u64) -> Vec<u8> {
    let length = Random::new(client << 32 | number).below(LONGEST) as usize;
    let mut bytes = format!("{client}/{number}/").into_bytes();
    bytes.resize(bytes.len() + length, b'a' + (number % 26) as u8);
    bytes
}

/// Where it writes it.
fn key(client: u64, number: u64) -> String {
    format!("key:{client}:{}", number % KEYS)
}

/// Writes that nothing has overwritten, when so many were made.
fn standing(writes: u64) -> Range<u64> {
    writes.saturating_sub(KEYS)..writes
}

/// A batch that waited long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When it was sent.
    pub sent: Moment,
    /// When its last answer came.
    pub answered: Moment,
}

impl Wait {
    /// How long.
    #[must_use]
    pub fn length(&self) -> Duration {
        Duration::from_nanos(
            self.answered
                .as_nanos()
                .saturating_sub(self.sent.as_nanos()),
        )
    }
}

/// What one client was told.
#[derive(Debug, Default)]
struct Promised {
    client: u64,
    /// Writes 0 to this were acknowledged.
    writes: u64,
    counts: Vec<u64>,
    waits: Vec<Wait>,
    requests: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Set,
    Count,
    /// What it wrote, of what still stands.
    Get(u64),
}

fn serve_on(
    client: u64,
    seed: u64,
    address: SocketAddrV4,
    stop: &AtomicBool,
    answered: &AtomicU64,
) -> Result<Promised> {
    let mut random = Random::new(seed);
    let mut line = Line::open(address)?;
    let mut promised = Promised {
        client,
        ..Promised::default()
    };
    while !stop.load(Ordering::Relaxed) {
        let mut requests = Vec::new();
        let mut writes = promised.writes;
        for _ in 0..=random.below(BATCH) {
            let request = match random.below(8) {
                0..3 => Request::Set,
                3..6 => Request::Count,
                _ if writes > 0 => {
                    let still = standing(writes);
                    Request::Get(still.start + random.below(still.end - still.start))
                }
                _ => Request::Set,
            };
            match request {
                Request::Set => {
                    line.add(&[
                        b"SET",
                        key(client, writes).as_bytes(),
                        &value(client, writes),
                    ]);
                    writes += 1;
                }
                Request::Count => line.add(&[b"INCR", COUNTER.as_bytes()]),
                Request::Get(number) => line.add(&[b"GET", key(client, number).as_bytes()]),
            }
            requests.push(request);
        }
        let sent = Moment::now();
        line.send()?;
        for request in &requests {
            match (request, line.reply()?) {
                (Request::Set, Reply::Okay) => promised.writes += 1,
                (Request::Count, Reply::Number(count)) => {
                    if let Some(last) = promised.counts.last() {
                        ensure!(
                            count > *last,
                            "client {client}: INCR answered {count} after {last}"
                        );
                    }
                    promised.counts.push(count);
                }
                (Request::Get(number), Reply::Value(found)) => {
                    ensure!(
                        found == value(client, *number),
                        "client {client}: the key of write {number} holds another value"
                    );
                }
                (request, reply) => bail!("client {client}: {request:?} was answered {reply:?}"),
            }
        }
        let wait = Wait {
            sent,
            answered: Moment::now(),
        };
        if wait.length() >= LONG_WAIT {
            promised.waits.push(wait);
        }
        promised.requests += requests.len() as u64;
        answered.fetch_add(requests.len() as u64, Ordering::Relaxed);
    }
    Ok(promised)
}

/// Waits until these clients have so many more answers.
///
/// # Errors
/// If they do not get them, for long; or a client's own words, if one has given up.
pub(super) fn await_more<T>(
    answered: &AtomicU64,
    threads: &mut Vec<JoinHandle<Result<T>>>,
    more: u64,
    patience: Duration,
) -> Result<()> {
    let now = || answered.load(Ordering::Relaxed);
    let (until, enough) = (Instant::now() + patience, now() + more);
    while now() < enough {
        ensure!(
            Instant::now() < until,
            "no answers for {} s",
            patience.as_secs()
        );
        if let Some(at) = threads.iter().position(JoinHandle::is_finished) {
            let one = threads.swap_remove(at);
            one.join().expect("a client does not panic")?;
            bail!("a client ended before it was told to");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Clients at work.
#[derive(Debug)]
pub struct Clients {
    address: SocketAddrV4,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<Promised>>>,
}

/// What all of them saw.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests answered.
    pub requests: u64,
    /// Writes acknowledged; those that nothing has overwritten were found again at the end.
    pub writes: u64,
    /// Batches that waited long.
    pub waits: Vec<Wait>,
}

impl Outcome {
    /// The longest wait that was not over at `since`; zero for none worth noting.
    #[must_use]
    pub fn longest_since(&self, since: Moment) -> Duration {
        let later = self.waits.iter().filter(|wait| wait.answered >= since);
        later.map(Wait::length).max().unwrap_or_default()
    }
}

impl Clients {
    /// Starts so many.
    ///
    /// # Errors
    /// If the host gives no threads.
    pub fn start(address: SocketAddrV4, count: u64, seed: u64) -> Result<Self> {
        let mut clients = Self {
            address,
            stop: Arc::default(),
            answered: Arc::default(),
            threads: Vec::new(),
        };
        let mut random = Random::new(seed);
        for client in 0..count {
            let (stop, answered) = (Arc::clone(&clients.stop), Arc::clone(&clients.answered));
            let seed = random.next();
            let thread = std::thread::Builder::new()
                .name(format!("client-{client}"))
                .spawn(move || serve_on(client, seed, address, &stop, &answered))
                .context("start a client")?;
            clients.threads.push(thread);
        }
        Ok(clients)
    }

    /// Requests answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests were answered.
    ///
    /// # Errors
    /// If they are not, for long; or a client's own words, if one has given up.
    pub fn await_answers(&mut self, more: u64) -> Result<()> {
        await_more(&self.answered, &mut self.threads, more, PATIENCE)
    }

    /// Lets them finish what they asked, then asks the machine for all that it has promised.
    ///
    /// # Errors
    /// A connection that broke, an answer that was wrong, or a promise that was not kept.
    pub fn stop_and_verify(mut self) -> Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let mut promised = Vec::new();
        for thread in std::mem::take(&mut self.threads) {
            promised.push(thread.join().expect("a client does not panic")?);
        }
        let mut line = Line::open(self.address)?;
        for one in &promised {
            verify_keys(&mut line, one)?;
        }
        verify_counts(&mut line, &promised)?;
        Ok(Outcome {
            requests: promised.iter().map(|one| one.requests).sum(),
            writes: promised
                .iter()
                .map(|one| one.writes + one.counts.len() as u64)
                .sum(),
            waits: promised.into_iter().flat_map(|one| one.waits).collect(),
        })
    }
}

fn verify_keys(line: &mut Line, promised: &Promised) -> Result<()> {
    /// Keys asked for in one go: their answers fit the connection's buffers.
    const AT_ONCE: usize = 16;
    let client = promised.client;
    let numbers: Vec<u64> = standing(promised.writes).collect();
    for numbers in numbers.chunks(AT_ONCE) {
        for &number in numbers {
            line.add(&[b"GET", key(client, number).as_bytes()]);
        }
        line.send()?;
        for &number in numbers {
            match line.reply()? {
                Reply::Value(found) if found == value(client, number) => {}
                Reply::Nothing => {
                    bail!("client {client}: write {number} was acknowledged and is lost")
                }
                other => {
                    bail!(
                        "client {client}: write {number} was acknowledged, its key holds {other:?}"
                    )
                }
            }
        }
    }
    Ok(())
}

/// Every count was given to one client, once, and the counter stands where they ended.
fn verify_counts(line: &mut Line, promised: &[Promised]) -> Result<()> {
    let mut counts = BTreeSet::new();
    for &count in promised.iter().flat_map(|one| &one.counts) {
        ensure!(counts.insert(count), "INCR answered {count} twice");
    }
    line.add(&[b"GET", COUNTER.as_bytes()]);
    line.send()?;
    let stands = match line.reply()? {
        Reply::Value(bytes) => String::from_utf8_lossy(&bytes).parse::<u64>()?,
        Reply::Nothing => 0,
        other => bail!("the counter is {other:?}"),
    };
    ensure!(
        stands == counts.len() as u64 && counts.last().is_none_or(|last| *last == stands),
        "{} times INCR was answered, up to {}; the counter is {stands}",
        counts.len(),
        counts.last().copied().unwrap_or(0)
    );
    Ok(())
}
