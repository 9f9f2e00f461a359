//! A man in the middle of a pair's connections: he hears all of them, and does harm to one message of the control connection, or to
//! one frame of the log's.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use hypervisor::handshake::SHOWN;
use hypervisor::handshake::proof::{CLAIM, GREETING, VERDICT};
use rdma_log::locks::lock;

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the primary.
    ToBackup,
    /// From the backup.
    ToPrimary,
    /// From the primary, over the log's connection.
    Log,
}

/// What is done to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// A bit of it is flipped, in its middle.
    Flip,
    /// Its first half, and then the end of the connection.
    Cut,
    /// Its first half, and then nothing more, with the connection open.
    Stall,
    /// It comes twice.
    Repeat,
    /// It does not come.
    LeaveOut,
    /// It comes after the one behind it.
    Swap,
}

/// Which message is harmed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meddling {
    /// Its way.
    pub way: Way,
    /// Its number on that way, from 0. The first to the backup is the claim; the first two to the primary are greeting and verdict. Of the
    /// log's it is the frame in which this byte of the inputs lane comes: what is written together goes in one frame, so that frames
    /// have no numbers of their own.
    pub number: usize,
    /// What is done.
    pub harm: Harm,
}

/// The man in the middle.
#[derive(Debug)]
pub struct Eavesdropper {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    meddling: Mutex<Option<Meddling>>,
    heard: Mutex<[Vec<u8>; 3]>,
}

impl Eavesdropper {
    /// Stands before the backup at this address. What is to be harmed is harmed once, in the connection in which it comes first.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn before(backup: SocketAddr, meddling: Option<Meddling>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen for the primary")?;
        let address = listener.local_addr().context("an address")?;
        let state = Arc::new(State {
            meddling: Mutex::new(meddling),
            heard: Mutex::default(),
        });
        let of_thread = Arc::clone(&state);
        std::thread::Builder::new()
            .name("eavesdropper".into())
            .spawn(move || {
                for primary in listener.incoming().map_while(Result::ok) {
                    // Nobody listens behind it: the primary finds its connection closed.
                    if let Ok(backup) = TcpStream::connect(backup) {
                        join(&primary, &backup, &of_thread);
                    }
                }
            })
            .context("start a thread")?;
        Ok(Self { address, state })
    }

    /// Where the primary finds it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the harm was done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        lock(&self.state.meddling).is_none()
    }

    /// All that went this way.
    #[must_use]
    pub fn heard(&self, way: Way) -> Vec<u8> {
        lock(&self.state.heard)[way as usize].clone()
    }
}

fn join(primary: &TcpStream, backup: &TcpStream, state: &Arc<State>) {
    for stream in [primary, backup] {
        let _ = stream.set_nodelay(true);
    }
    for way in [Way::ToBackup, Way::ToPrimary] {
        let ends = match way {
            Way::ToBackup | Way::Log => (primary.try_clone(), backup.try_clone()),
            Way::ToPrimary => (backup.try_clone(), primary.try_clone()),
        };
        let (Ok(from), Ok(to)) = ends else { return };
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            // Either side may be gone at any time.
            let _ = pass(&from, &to, way, &state);
            for stream in [&from, &to] {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
    }
}

/// Reads one message of this way.
fn message(mut from: &TcpStream, way: Way, number: usize) -> Result<Vec<u8>> {
    let fixed = match (way, number) {
        (Way::ToBackup, 0) => Some(CLAIM),
        (Way::ToPrimary, 0) => Some(GREETING),
        (Way::ToPrimary, 1) => Some(VERDICT),
        (Way::Log, 0) => Some(SHOWN),
        (Way::Log, 1) => Some(ACCEPTANCE),
        _ => None,
    };
    if let Some(length) = fixed {
        let mut bytes = vec![0; length];
        from.read_exact(&mut bytes)?;
        return Ok(bytes);
    }
    let head = if way == Way::Log { FRAME } else { 2 };
    let mut bytes = vec![0; head];
    from.read_exact(&mut bytes)?;
    let length = match way {
        Way::Log => u32::from_le_bytes(bytes[FRAME_LENGTH..][..4].try_into()?) as usize,
        _ => usize::from(u16::from_le_bytes([bytes[0], bytes[1]])),
    };
    bytes.resize(head + length, 0);
    from.read_exact(&mut bytes[head..])?;
    Ok(bytes)
}

/// Bytes of the acceptance that follows the ticket, of a frame's header, and where in it the length stands.
const ACCEPTANCE: usize = 48;
const FRAME: usize = 48;
const FRAME_LENGTH: usize = 32;
const FRAME_LANE: usize = 40;
const INPUTS: u8 = 1;

/// What a message of this way and number is known by, in [`Meddling::number`]; `inputs` counts the bytes of the inputs lane so far.
fn known_by(way: Way, number: usize, bytes: &[u8], inputs: &mut usize) -> Range<usize> {
    if way != Way::Log {
        return number..number + 1;
    }
    let from = *inputs;
    // Before the frames come a ticket and an acceptance.
    if number >= 2 && bytes[FRAME_LANE] == INPUTS {
        *inputs += bytes.len() - FRAME;
    }
    from..*inputs
}

/// A connection of the log's: it begins with a ticket.
fn is_log(from: &TcpStream) -> bool {
    let mut word = [0; 8];
    matches!(from.peek(&mut word), Ok(8..)) && word == *b"doppel-r"
}

fn plain(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    std::io::copy(&mut from, &mut to)?;
    Ok(())
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, mut way: Way, state: &State) -> Result<()> {
    if way == Way::ToBackup && is_log(from) {
        way = Way::Log;
    }
    // Over the log's connection the backup speaks only when it has been spoken to, and then it does not greet: no matter of ours.
    let mut first = [0; 8];
    if way == Way::ToPrimary && from.peek(&mut first)? > 0 && first != *b"doppel-b" {
        return plain(from, to);
    }
    let mut inputs = 0;
    for number in 0.. {
        let bytes = message(from, way, number)?;
        lock(&state.heard)[way as usize].extend_from_slice(&bytes);
        let known_by = known_by(way, number, &bytes, &mut inputs);
        let due = {
            let mut meddling = lock(&state.meddling);
            meddling.take_if(|due| due.way == way && known_by.contains(&due.number))
        };
        let half = &bytes[..bytes.len() / 2];
        match due.map(|due| due.harm) {
            None => to.write_all(&bytes)?,
            Some(Harm::Flip) => {
                let mut bad = bytes.clone();
                bad[bytes.len() / 2] ^= 0x10;
                to.write_all(&bad)?;
            }
            Some(Harm::Cut) => {
                to.write_all(half)?;
                return Ok(());
            }
            Some(Harm::Stall) => {
                to.write_all(half)?;
                // It goes on talking; nobody hears it.
                let mut buffer = [0; 4096];
                while from.read(&mut buffer)? > 0 {}
                return Ok(());
            }
            Some(Harm::Repeat) => to.write_all(&[&bytes[..], &bytes].concat())?,
            Some(Harm::LeaveOut) => {}
            Some(Harm::Swap) => {
                let next = message(from, way, number + 1)?;
                to.write_all(&[&next[..], &bytes].concat())?;
            }
        }
    }
    Ok(())
}
