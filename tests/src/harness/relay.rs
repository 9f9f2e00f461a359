//! A relay between a primary and the backup that it joins over TCP: it kills one of them when so many bytes have gone by.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use super::signal::{Signal, send};

/// What the relay shares with its threads.
#[derive(Debug)]
struct State {
    backup: SocketAddr,
    /// Bytes that have gone from the primary to the backup, over all connections.
    passed: AtomicU64,
    /// After so many the victim is killed.
    fuse: AtomicU64,
    victim: AtomicU32,
    struck: AtomicBool,
    /// Nothing of what comes after the fuse goes on.
    cuts: AtomicBool,
}

/// A relay. Its threads end with the connections; the one that listens ends with the process.
#[derive(Debug)]
pub struct Relay {
    state: Arc<State>,
    address: SocketAddr,
}

impl Relay {
    /// Listens for the primary, in front of a backup that listens at `backup`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(backup: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
        let address = listener.local_addr().context("read the relay's address")?;
        let state = Arc::new(State {
            backup,
            passed: AtomicU64::new(0),
            fuse: AtomicU64::new(u64::MAX),
            victim: AtomicU32::new(0),
            struck: AtomicBool::new(false),
            cuts: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                for primary in listener.incoming().map_while(Result::ok) {
                    // Nobody listens behind it: the primary finds its connection closed.
                    if let Ok(backup) = TcpStream::connect(shared.backup) {
                        join(primary, backup, &shared);
                    }
                }
            })
            .context("start a thread")?;
        Ok(Self { state, address })
    }

    /// Where the primary connects.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// After so many bytes the victim is killed. It may be named later: the bytes beyond wait for it.
    pub fn arm(&self, after: u64) {
        self.state.fuse.store(after, Ordering::SeqCst);
    }

    /// The same, as if the victim's host were lost: what its kernel still sends does not arrive, on any connection.
    pub fn arm_to_cut(&self, after: u64) {
        self.state.cuts.store(true, Ordering::SeqCst);
        self.arm(after);
    }

    /// Whom to kill.
    pub fn kill(&self, victim: u32) {
        self.state.victim.store(victim, Ordering::SeqCst);
    }

    /// Kills the victim now, if it was not killed yet.
    pub fn strike(&self) {
        if !self.has_struck() {
            strike(&self.state);
        }
    }

    /// Bytes that have gone from the primary to the backup.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.state.passed.load(Ordering::SeqCst)
    }

    /// Whether the fuse has burnt down.
    #[must_use]
    pub fn has_struck(&self) -> bool {
        self.state.struck.load(Ordering::SeqCst)
    }
}

impl State {
    fn is_cut(&self) -> bool {
        self.cuts.load(Ordering::SeqCst) && self.struck.load(Ordering::SeqCst)
    }
}

fn join(primary: TcpStream, backup: TcpStream, state: &Arc<State>) {
    let _ = primary.set_nodelay(true);
    let _ = backup.set_nodelay(true);
    let pairs = [
        (
            primary.try_clone(),
            backup.try_clone(),
            Some(Arc::clone(state)),
        ),
        (Ok(backup), Ok(primary), None),
    ];
    for (from, to, counted) in pairs {
        if let (Ok(from), Ok(to)) = (from, to) {
            std::thread::spawn(move || pass(from, to, counted.as_deref()));
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, counted: Option<&State>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        let mut rest = &bytes[..length];
        if let Some(state) = counted {
            if state.is_cut() {
                break;
            }
            let before = state.passed.load(Ordering::SeqCst);
            let left = state.fuse.load(Ordering::SeqCst).saturating_sub(before);
            if left < length as u64 {
                // Exactly so many arrive.
                let (last, beyond) = rest.split_at(left as usize);
                let _ = to.write_all(last);
                rest = beyond;
                state.passed.fetch_add(left, Ordering::SeqCst);
                strike(state);
                if state.is_cut() {
                    break;
                }
            }
            state.passed.fetch_add(rest.len() as u64, Ordering::SeqCst);
        }
        if to.write_all(rest).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

fn strike(state: &State) {
    state.fuse.store(u64::MAX, Ordering::SeqCst);
    let victim = loop {
        match state.victim.load(Ordering::SeqCst) {
            0 => std::thread::sleep(Duration::from_millis(1)),
            victim => break victim,
        }
    };
    state.struck.store(true, Ordering::SeqCst);
    // It is ours and was not reaped; that it ended by itself is found out by whoever awaits it.
    let _ = send(victim, Signal::Kill);
}
