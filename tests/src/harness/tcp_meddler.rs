//! A man in the middle of a pair's TCP connections: he passes everything on, until he is told to do harm to the log's stream.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use rdma_log::locks::lock;

/// What is done to the log's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// To the backup: bytes that are no frame.
    Junk,
    /// To the backup: the first half of a frame, and then nothing more, with the connection open.
    HalfFrame,
    /// To the backup: the first half of a frame, and then the end.
    CutFrame,
    /// To the backup: the last frame, again.
    Replayed,
    /// To the backup: a frame of another connection.
    Foreign,
    /// To the backup: a frame, well sealed, that lies beyond what the lane can hold.
    Overrun,
    /// To the backup: a frame, well sealed, that counts entries which it does not hold.
    Counted,
    /// To the backup: one byte after the other, slowly; nothing is changed.
    Drip,
    /// To the primary: bytes that are no answer.
    JunkAnswer,
    /// To the primary: an answer, well sealed, for entries that were never sent.
    Ahead,
    /// To the primary: an answer, well sealed, whose numbers went back to nothing.
    Back,
    /// To the primary: an answer of another connection.
    ForeignAnswer,
    /// To the primary: an answer, well sealed, that says it was fenced. The backup knows nothing of it.
    FalseFence,
}

/// Every kind.
pub const HARMS: [Harm; 13] = [
    Harm::Junk,
    Harm::HalfFrame,
    Harm::CutFrame,
    Harm::Replayed,
    Harm::Foreign,
    Harm::Overrun,
    Harm::Counted,
    Harm::Drip,
    Harm::JunkAnswer,
    Harm::Ahead,
    Harm::Back,
    Harm::ForeignAnswer,
    Harm::FalseFence,
];

impl Harm {
    fn to_primary(self) -> bool {
        matches!(
            self,
            Self::JunkAnswer | Self::Ahead | Self::Back | Self::ForeignAnswer | Self::FalseFence
        )
    }

    /// Whether a pair goes on with it.
    #[must_use]
    pub fn is_harmless(self) -> bool {
        self == Self::Drip
    }
}

/// Bytes that open the log's stream: a ticket, which the backup answers, and an acceptance before the first frame; and an offer before
/// the first answer.
const BEFORE_FRAMES: [usize; 2] = [24, 48];
const BEFORE_ANSWERS: usize = 48;
const FRAME_HEADER: usize = 48;
const ANSWER: usize = 72;

/// The man in the middle.
#[derive(Debug)]
pub struct TcpMeddler {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    harm: Mutex<Option<Harm>>,
    done: AtomicBool,
    frames: AtomicUsize,
}

impl TcpMeddler {
    /// Stands before the backup at this address. The second connection that comes is the log's.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn before(backup: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen for the primary")?;
        let address = listener.local_addr().context("an address")?;
        let state = Arc::new(State {
            harm: Mutex::new(None),
            done: AtomicBool::new(false),
            frames: AtomicUsize::new(0),
        });
        let of_thread = Arc::clone(&state);
        std::thread::Builder::new()
            .name("tcp-meddler".into())
            .spawn(move || {
                // When either side is gone there is nothing left to meddle with.
                let _ = relay(&listener, backup, &of_thread);
            })
            .context("start a thread")?;
        Ok(Self { address, state })
    }

    /// Where the primary finds it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Frames that have passed.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.state.frames.load(Ordering::Relaxed)
    }

    /// Does harm, once, at the next frame or answer.
    pub fn harm(&self, harm: Harm) {
        let mut told = self.state.lock();
        *told = Some(harm);
    }

    /// Whether it was done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state.done.load(Ordering::Relaxed)
    }
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Harm>> {
        lock(&self.harm)
    }

    /// The harm that is to be done in this direction. `Drip` stays.
    fn due(&self, to_primary: bool) -> Option<Harm> {
        let mut told = self.lock();
        let harm = told.filter(|harm| harm.to_primary() == to_primary)?;
        if harm != Harm::Drip {
            *told = None;
        }
        self.done.store(true, Ordering::Relaxed);
        Some(harm)
    }
}

fn relay(listener: &TcpListener, backup: SocketAddr, state: &Arc<State>) -> Result<()> {
    for log in [false, true] {
        let (primary, _) = listener.accept().context("await the primary")?;
        let backup = TcpStream::connect(backup).context("connect to the backup")?;
        for stream in [&primary, &backup] {
            stream.set_nodelay(true)?;
        }
        let (up, down) = (primary.try_clone()?, backup.try_clone()?);
        let (there, back) = (Arc::clone(state), Arc::clone(state));
        std::thread::spawn(move || {
            let _ = match log {
                true => frames(&primary, &backup, &there),
                false => plain(&primary, &backup),
            };
            close(&primary, &backup);
        });
        std::thread::spawn(move || {
            let _ = match log {
                true => answers(&down, &up, &back),
                false => plain(&down, &up),
            };
            close(&down, &up);
        });
    }
    Ok(())
}

fn close(one: &TcpStream, other: &TcpStream) {
    // A connection that is gone needs no end.
    let _ = one.shutdown(Shutdown::Both);
    let _ = other.shutdown(Shutdown::Both);
}

fn plain(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let got = from.read(&mut buffer)?;
        if got == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..got])?;
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, count: usize) -> Result<()> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes)?;
    Ok(to.write_all(&bytes)?)
}

fn seal(bytes: &mut [u8], at: usize, piece: &[u8]) {
    bytes[at..at + 4].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(piece), bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn add(bytes: &mut [u8], at: usize, more: u64) {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    let sum = u64::from_le_bytes(word).wrapping_add(more);
    bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
}

/// Frame by frame, primary to backup.
fn frames(mut from: &TcpStream, mut to: &TcpStream, state: &State) -> Result<()> {
    for count in BEFORE_FRAMES {
        pass(from, to, count)?;
    }
    loop {
        let mut header = [0; FRAME_HEADER];
        from.read_exact(&mut header)?;
        let length = u32::from_le_bytes([header[32], header[33], header[34], header[35]]) as usize;
        let mut piece = vec![0; length];
        from.read_exact(&mut piece)?;
        let whole = [&header[..], &piece].concat();
        let half = &whole[..whole.len() / 2];
        state.frames.fetch_add(1, Ordering::Relaxed);
        match state.due(false) {
            None => to.write_all(&whole)?,
            Some(Harm::Drip) => {
                for byte in whole {
                    to.write_all(&[byte])?;
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            Some(Harm::HalfFrame) => {
                to.write_all(half)?;
                // The primary goes on sending; nobody hears it.
                let mut buffer = [0; 4096];
                while from.read(&mut buffer)? > 0 {}
            }
            Some(Harm::CutFrame) => {
                to.write_all(half)?;
                return Ok(());
            }
            Some(harm) => {
                to.write_all(&whole)?;
                let mut bad = header;
                match harm {
                    Harm::Replayed => {}
                    Harm::Foreign => bad[..16].fill(0x5a),
                    Harm::Overrun => {
                        add(&mut bad, 16, 1 << 32);
                        add(&mut bad, 24, 1);
                    }
                    Harm::Counted => {
                        add(&mut bad, 16, length as u64);
                        add(&mut bad, 24, 1_000_000);
                    }
                    _ => bad.fill(0xa5),
                }
                seal(&mut bad, 36, &piece);
                to.write_all(&[&bad[..], &piece].concat())?;
            }
        }
    }
}

/// Answer by answer, backup to primary.
fn answers(mut from: &TcpStream, mut to: &TcpStream, state: &State) -> Result<()> {
    pass(from, to, BEFORE_ANSWERS)?;
    loop {
        let mut answer = [0; ANSWER];
        from.read_exact(&mut answer)?;
        let mut bad = answer;
        match state.due(true) {
            None => {
                to.write_all(&answer)?;
                continue;
            }
            Some(Harm::Ahead) => add(&mut bad, 32, 1_000_000),
            Some(Harm::Back) => bad[24..].fill(0),
            Some(Harm::ForeignAnswer) => bad[..16].fill(0x5a),
            Some(Harm::FalseFence) => bad[16] = 1,
            Some(_) => bad.fill(0xa5),
        }
        seal(&mut bad, 20, &[]);
        // What went back is only seen behind what went forth.
        to.write_all(&answer)?;
        to.write_all(&bad)?;
    }
}
