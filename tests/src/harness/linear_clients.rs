//! Clients that share a few keys of a key-value machine and note when they asked for what, and when they were told what.
#![forbid(unsafe_code)]

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hypervisor::backends::wait::Moment;

use super::hostile_clients::{Line, PATIENCE, Reply, await_more};
use super::linear::{Done, Operation};
use super::random::Random;

/// Keys that all clients share: few, so that they meet.
pub const KEYS: usize = 12;

/// Histories by key.
pub type Histories = Vec<Vec<Done>>;

/// Clients at work, each with a connection of its own.
#[derive(Debug)]
pub struct LinearClients {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    patience: Duration,
    threads: Vec<JoinHandle<Result<Histories>>>,
}

impl LinearClients {
    /// Connects so many, and starts them.
    ///
    /// # Errors
    /// If the guest does not serve.
    pub fn start(address: SocketAddrV4, clients: u32, seed: u64) -> Result<Self> {
        Self::start_patient(address, clients, seed, PATIENCE)
    }

    /// The same; an answer may take so long.
    ///
    /// # Errors
    /// If the guest does not serve.
    pub fn start_patient(
        address: SocketAddrV4,
        clients: u32,
        seed: u64,
        patience: Duration,
    ) -> Result<Self> {
        let mut random = Random::new(seed);
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let threads = (0..clients)
            .map(|client| {
                let line = Line::open_within(address, patience)?;
                let seed = random.next();
                let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
                Ok(std::thread::spawn(move || {
                    converse(client, line, seed, &stop, &answered)
                        .with_context(|| format!("client {client}"))
                }))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            stop,
            answered,
            patience,
            threads,
        })
    }

    /// Waits until so many more requests are answered.
    ///
    /// # Errors
    /// If they are not in time; or a client's own words, if one has given up.
    pub fn await_answers(&mut self, more: u64) -> Result<()> {
        await_more(&self.answered, &mut self.threads, more, self.patience)
    }

    /// Requests that were answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends the clients: what they were told, by key.
    ///
    /// # Errors
    /// If a connection broke, or an answer is none.
    pub fn end(self) -> Result<Histories> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all: Histories = vec![Vec::new(); KEYS];
        for thread in self.threads {
            let histories = thread.join().expect("a client does not panic")?;
            for (all, one) in all.iter_mut().zip(histories) {
                all.extend(one);
            }
        }
        Ok(all)
    }
}

fn converse(
    client: u32,
    mut line: Line,
    seed: u64,
    stop: &AtomicBool,
    answered: &AtomicU64,
) -> Result<Histories> {
    let mut random = Random::new(seed);
    let mut histories: Histories = vec![Vec::new(); KEYS];
    let mut last = Moment::default();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let key = random.below(KEYS as u64) as usize;
        let name = format!("shared:{key}");
        // Nobody else's, and far from those that others count up.
        let value = u64::from(client + 1) << 48 | number << 20;
        let digits = value.to_string();
        let (name, digits) = (name.as_bytes(), digits.as_bytes());
        let choice = random.below(10);
        match choice {
            0..2 => line.add(&[b"SET", name, digits]),
            2 => line.add(&[b"SET", name, digits, b"NX"]),
            3..6 => line.add(&[b"GET", name]),
            6..9 => line.add(&[b"INCR", name]),
            _ => line.add(&[b"DEL", name]),
        }
        // A clock that stood still between the last answer and this request would make them overlap.
        let asked = Moment::now().max(Moment::from_nanos(last.as_nanos() + 1));
        line.send()?;
        let reply = line.reply()?;
        last = Moment::now().max(asked);
        let operation = match (choice, reply) {
            (0..2, Reply::Okay) => Operation::Set(value),
            (2, Reply::Okay) => Operation::SetIfNone(value, true),
            (2, Reply::Nothing) => Operation::SetIfNone(value, false),
            (3..6, Reply::Nothing) => Operation::Get(None),
            (3..6, Reply::Value(bytes)) => {
                let text = String::from_utf8_lossy(&bytes);
                let found = text.parse().with_context(|| format!("the value {text}"))?;
                Operation::Get(Some(found))
            }
            (6..9, Reply::Number(after)) => Operation::Increment(after),
            (9, Reply::Number(count @ 0..=1)) => Operation::Delete(count == 1),
            (_, reply) => bail!("request {number} was answered {reply:?}"),
        };
        histories[key].push(Done {
            client,
            operation,
            asked,
            answered: last,
        });
        answered.fetch_add(1, Ordering::Relaxed);
    }
    Ok(histories)
}

/// The longest that a client waited for an answer.
#[must_use]
pub fn longest_wait(histories: &Histories) -> Duration {
    let waits = histories
        .iter()
        .flatten()
        .map(|done| done.answered.as_nanos() - done.asked.as_nanos());
    Duration::from_nanos(waits.max().unwrap_or(0))
}
