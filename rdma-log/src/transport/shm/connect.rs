//! Setting up a ring between two processes: one message each way over a Unix socket.
//!
//! ```text
//! reader (accept)                                       writer (connect)
//!   offer: version, nonce, sizes of the lanes  + log ───▶  checks the memfd, maps it
//!   checks the memfd, maps it  ◀─── answer: version, nonce + return page
//! ```
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::{ConnectError, Shared, reader, writer};
use crate::control::PAGE;
use crate::entry::Nonce;
use crate::fdpass::{recv_with_fds, send_with_fds};
use crate::region::{Access, Region, Words, check_memfd, memfd};
use crate::ring::{RingConfig, RingReader, RingWriter};
use crate::robust::{DeathWatch, RobustKey};

/// Version of the messages, of the layout of the memory and of the order in which it is written. Since 2 the header that
/// a reader looks at is stored last, and there are two pairs of acknowledgements; since 3 the writer's death is marked.
const VERSION: u32 = 3;
const OFFER: [u8; 8] = *b"rdmalogO";
const ANSWER: [u8; 8] = *b"rdmalogA";
/// Either message: magic, version, reserved, nonce, the two sizes.
const MESSAGE: usize = 48;

struct Message {
    nonce: Nonce,
    sizes: [u64; 2],
}

impl Message {
    fn to_bytes(&self, magic: [u8; 8]) -> [u8; MESSAGE] {
        let mut b = [0; MESSAGE];
        b[0..8].copy_from_slice(&magic);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[16..32].copy_from_slice(&self.nonce.0);
        b[32..40].copy_from_slice(&self.sizes[0].to_le_bytes());
        b[40..48].copy_from_slice(&self.sizes[1].to_le_bytes());
        b
    }

    fn from_bytes(b: &[u8; MESSAGE], magic: [u8; 8]) -> Result<Message, ConnectError> {
        let other = |what| ConnectError::Protocol {
            expected: VERSION,
            what,
        };
        let (head, rest) = b.split_at(16);
        if head[..8] != magic {
            return Err(other("the magic number"));
        }
        if head[8..12] != VERSION.to_le_bytes() || head[12..] != [0; 4] {
            return Err(other("the version number"));
        }
        let mut nonce = Nonce([0; 16]);
        nonce.0.copy_from_slice(&rest[..16]);
        let size = |i: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&rest[i..i + 8]);
            u64::from_le_bytes(le)
        };
        let sizes = [size(16), size(24)];
        Ok(Message { nonce, sizes })
    }
}

fn memory(what: &'static str) -> impl FnOnce(io::Error) -> ConnectError {
    move |error| ConnectError::Memory { what, error }
}

fn receive(stream: &UnixStream, magic: [u8; 8]) -> Result<(Message, OwnedFd), ConnectError> {
    let mut bytes = [0; MESSAGE];
    let mut fds = recv_with_fds(stream, &mut bytes, 1)?;
    let message = Message::from_bytes(&bytes, magic)?;
    let fd = fds.pop().ok_or(ConnectError::Protocol {
        expected: VERSION,
        what: "a message without its descriptor",
    })?;
    Ok((message, fd))
}

/// The reader's side: makes the log's memory, zeroed, and offers it to the writer at the other end of `stream`.
///
/// It waits for the answer, as long as the stream's read time limit says. Who the peer is must be settled before.
///
/// # Errors
/// Bad sizes, memory that cannot be had, a peer that is gone, too slow, or speaks another version.
pub fn accept(stream: &UnixStream, config: &RingConfig) -> Result<RingReader, ConnectError> {
    let geometries = config.geometries()?;
    let nonce = Nonce::random().map_err(memory("draw a random nonce"))?;
    let sizes = [config.events, config.inputs];
    let len = config.events + config.inputs;
    let log = memfd(c"rdma-log", PAGE + len).map_err(memory("make the log's memory"))?;
    let map = |start, len, access| {
        Region::map(log.as_fd(), start, len, access).map_err(memory("map the log's memory"))
    };
    let page = map(0, PAGE, Access::ReadWrite)?;
    let views = map(PAGE, len, Access::ReadOnly)?.read_views(0, sizes);
    let offer = Message {
        nonce,
        sizes: sizes.map(|size| size as u64),
    };
    send_with_fds(stream, &offer.to_bytes(OFFER), &[log.as_fd()])?;

    let (answer, back) = receive(stream, ANSWER)?;
    if answer.nonce != nonce || answer.sizes != offer.sizes {
        return Err(ConnectError::Protocol {
            expected: VERSION,
            what: "an answer to another offer",
        });
    }
    check_memfd(back.as_fd(), PAGE).map_err(memory("use the return page of the peer"))?;
    let back = Region::map(back.as_fd(), 0, PAGE, Access::ReadWrite)
        .map_err(memory("map the return page"))?;
    let words = Shared {
        log: Words::of(&page),
        back: Words::of(&back),
    };
    let mut ring = reader(nonce, geometries, words.clone(), views);
    ring.robust = Some(DeathWatch::new(words.log));
    Ok(ring)
}

/// The writer's side: takes the memory that the reader offers, and gives it the return page.
///
/// It waits for the offer, as long as the stream's read time limit says. Who the peer is must be settled before.
///
/// # Errors
/// Memory that is not what was announced, cannot be mapped or had, a peer that is gone, too slow, or speaks another
/// version.
pub fn connect(stream: &UnixStream) -> Result<RingWriter, ConnectError> {
    let (offer, log) = receive(stream, OFFER)?;
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let config = RingConfig {
        events: size(offer.sizes[0]),
        inputs: size(offer.sizes[1]),
    };
    let geometries = config.geometries()?;
    let len = PAGE + config.events + config.inputs;
    check_memfd(log.as_fd(), len).map_err(memory("use the log's memory of the peer"))?;
    let log = Region::map(log.as_fd(), 0, len, Access::ReadWrite)
        .map_err(memory("map the log's memory"))?;
    let page = memfd(c"rdma-log-return", PAGE).map_err(memory("make the return page"))?;
    let back = Region::map(page.as_fd(), 0, PAGE, Access::ReadOnly)
        .map_err(memory("map the return page"))?;
    send_with_fds(stream, &offer.to_bytes(ANSWER), &[page.as_fd()])?;
    let words = Shared {
        log: Words::of(&log),
        back: Words::of(&back),
    };
    let views = log.write_views(PAGE, [config.events, config.inputs]);
    let mut ring = writer(offer.nonce, geometries, words.clone(), views);
    ring.robust = Some(RobustKey::new(words.log));
    Ok(ring)
}
