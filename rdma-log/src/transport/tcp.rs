//! Transport `tcp`: a socket, for two hosts without RDMA.
//!
//! The writer builds its entries in a copy of the ring and sends ranges of it; a thread on the reader's side lands them at
//! the same offsets of the ring in its own memory, and answers on the same stream (`frame.rs` has the bytes).
//!
//! An entry is committed when an answer that covers it has come back: then it is in the reader's memory, checked to be
//! what was sent. The fence ends the landing thread and closes the stream: what was acknowledged has landed and will be
//! read; what comes later finds nobody.
//!
//! Nothing here hides what is sent or proves who sent it: entries, and so frames, disk contents and console bytes of the
//! guest, and the connection's nonce, travel in clear. The frames' checks are against damage and against a peer gone
//! mad, not against somebody who can write into the stream.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::entry::Nonce;
use crate::region::{Access, Region, memfd};
use crate::ring::{Acks, BadSize, RingConfig, RingReader, RingWriter};
use crate::transport::{ReadPort, WritePort};

mod frame;
mod reader;
mod stall;
mod writer;

pub use frame::Part;
pub use reader::Link;
pub use writer::Watch;

use reader::{TcpAcks, TcpReader};
use writer::{TcpProgress, TcpWriter, Writer};

/// Version of the set-up's messages, the frames and the answers.
const VERSION: u32 = 1;
const OFFER: [u8; 8] = *b"rdmalogT";
const ACCEPT: [u8; 8] = *b"rdmalogt";
/// Either message: magic, version, reserved, nonce, the two sizes.
const MESSAGE: usize = 48;

/// Why a stream is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The peer's process or host is gone, or it closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent what cannot be. Nothing of it was taken.
    #[error(
        "what the peer sent is refused: {part}: expected {expected:#x}, found {found:#x}; this connection is dropped"
    )]
    Refused {
        /// The first field that is wrong.
        part: Part,
        /// The value, or the bound, that it should have.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// What was sent is not answered, though the connection is open.
    #[error(
        "the peer has not answered what was sent for too long: something between us holds the stream up"
    )]
    Stalled,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(String),
}

impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof => StreamError::Closed,
            _ => StreamError::Socket(error.to_string()),
        }
    }
}

/// Why a ring could not be set up over a stream.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The lanes' sizes.
    #[error(transparent)]
    Size(#[from] BadSize),
    /// The peer says something else than this version of the protocol.
    #[error(
        "the peer does not speak rdma-log over TCP, version {VERSION} ({what}); run the same build on both sides"
    )]
    Protocol {
        /// What was not understood.
        what: &'static str,
    },
    /// The stream broke, or the peer was too slow: a time limit set on the stream comes as `WouldBlock`.
    #[error("cannot set up the ring with the peer: {0}")]
    Stream(#[from] io::Error),
    /// Memory could not be had or mapped.
    #[error("cannot {what}: {error}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

fn memory(what: &'static str) -> impl FnOnce(io::Error) -> ConnectError {
    move |error| ConnectError::Memory { what, error }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Message {
    nonce: Nonce,
    sizes: [u64; 2],
}

impl Message {
    fn send(&self, mut stream: &TcpStream, magic: [u8; 8]) -> io::Result<()> {
        let mut b = [0; MESSAGE];
        b[0..8].copy_from_slice(&magic);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[16..32].copy_from_slice(&self.nonce.0);
        b[32..40].copy_from_slice(&self.sizes[0].to_le_bytes());
        b[40..48].copy_from_slice(&self.sizes[1].to_le_bytes());
        stream.write_all(&b)
    }

    fn receive(stream: &TcpStream, magic: [u8; 8]) -> Result<Message, ConnectError> {
        let mut b = [0; MESSAGE];
        read_in_time(stream, &mut b)?;
        let other = |what| ConnectError::Protocol { what };
        if b[..8] != magic {
            return Err(other("the magic number"));
        }
        if b[8..12] != VERSION.to_le_bytes() || b[12..16] != [0; 4] {
            return Err(other("the version number"));
        }
        let mut nonce = Nonce([0; 16]);
        nonce.0.copy_from_slice(&b[16..32]);
        let size = |at: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(le)
        };
        let sizes = [size(32), size(40)];
        Ok(Message { nonce, sizes })
    }
}

/// Reads all of it within the stream's read time limit, which by itself is one for each piece that arrives: a peer that drips
/// would hold us for as long as it likes.
fn read_in_time(mut stream: &TcpStream, mut to: &mut [u8]) -> io::Result<()> {
    let limit = stream.read_timeout()?;
    let started = Instant::now();
    while !to.is_empty() {
        if limit.is_some_and(|limit| started.elapsed() >= limit) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match stream.read(to) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => to = &mut to[got..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Memory for both lanes, zeroed and left out of core dumps.
fn lanes(config: &RingConfig) -> Result<Region, ConnectError> {
    let len = config.events + config.inputs;
    let file = memfd(c"rdma-log-tcp", len).map_err(memory("make the ring's memory"))?;
    Region::map(file.as_fd(), 0, len, Access::ReadWrite).map_err(memory("map the ring's memory"))
}

/// The reader's side: says how large the lanes are and starts to land what the writer at the other end sends.
/// See [`accept_with`].
///
/// # Errors
/// As for [`accept_with`].
pub fn accept(
    stream: TcpStream,
    config: &RingConfig,
    spin: Duration,
) -> Result<(RingReader, Link), ConnectError> {
    accept_with(stream, config, spin, || {})
}

/// The reader's side, with something that the landing thread does before anything else: confine itself, for instance. If that
/// panics nothing lands.
///
/// It waits for the answer, as long as the stream's read time limit says. Who the peer is must be settled before. The
/// landing thread has the CPUs of the caller; it looks for more for `spin` after something came before it sleeps, which is
/// worth it only on a core of its own.
///
/// # Errors
/// Bad sizes, memory that cannot be had, a peer that is gone, too slow, or speaks another version.
pub fn accept_with(
    stream: TcpStream,
    config: &RingConfig,
    spin: Duration,
    at_start: impl FnOnce() + Send + 'static,
) -> Result<(RingReader, Link), ConnectError> {
    let geometries = config.geometries()?;
    let nonce = Nonce::random().map_err(memory("draw a random nonce"))?;
    let sizes = [config.events, config.inputs];
    let region = lanes(config)?;
    stream.set_nodelay(true)?;
    let offer = Message {
        nonce,
        sizes: sizes.map(|size| size as u64),
    };
    offer.send(&stream, OFFER)?;
    if Message::receive(&stream, ACCEPT)? != offer {
        return Err(ConnectError::Protocol {
            what: "an answer to another offer",
        });
    }
    let read = region.read_views(0, sizes);
    let views = region.write_views(0, sizes);
    let (landing, fence) = reader::start(stream, nonce, views, spin, at_start)?;
    let acks = Acks::new(Arc::new(TcpAcks(landing.clone())));
    let port = |lane, view| -> (Box<dyn ReadPort>, Acks) {
        let landing = landing.clone();
        let reader = TcpReader {
            lane,
            end: landing,
            view,
        };
        (Box::new(reader), acks.clone())
    };
    let reader = RingReader::assemble(nonce, geometries, read, port, acks.clone(), Box::new(fence));
    Ok((reader, reader::Link::of(&landing)))
}

/// The writer's side, with a thread of its own that takes in what the reader answers.
///
/// It waits for the offer, as long as the stream's read time limit says. Who the peer is must be settled before.
///
/// # Errors
/// Sizes that cannot be, memory that cannot be had, a peer that is gone, too slow, or speaks another version.
pub fn connect(stream: TcpStream) -> Result<RingWriter, ConnectError> {
    Ok(connect_with(stream, false)?.0)
}

/// The writer's side, for a caller with a thread that waits for many things: that thread takes in the answers, by the
/// [`Watch`]. It saves a wake-up between the reader's answer and whoever it is for.
///
/// # Errors
/// As for [`connect`].
pub fn connect_watched(stream: TcpStream) -> Result<(RingWriter, Watch), ConnectError> {
    connect_with(stream, true)
}

fn connect_with(stream: TcpStream, driven: bool) -> Result<(RingWriter, Watch), ConnectError> {
    stream.set_nodelay(true)?;
    let offer = Message::receive(&stream, OFFER)?;
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let config = RingConfig {
        events: size(offer.sizes[0]),
        inputs: size(offer.sizes[1]),
    };
    let geometries = config.geometries()?;
    let views = lanes(&config)?.write_views(0, [config.events, config.inputs]);
    offer.send(&stream, ACCEPT)?;
    let writer = Arc::new(Writer::new(stream, offer.nonce, driven)?);
    let watch = writer.watch();
    let port = |lane| -> Box<dyn WritePort> { Box::new(TcpWriter::new(lane, writer.clone())) };
    let progress = Box::new(TcpProgress(writer.clone()));
    let ring = RingWriter::assemble(offer.nonce, geometries, views, port, progress);
    Ok((ring, watch))
}

#[cfg(test)]
mod tests;
