//! The control connection: a Unix socket on one host, TCP between two; and what is said over it once the peer is known.
//!
//! A [`Stream`] leads to anybody. A [`Channel`] leads to a peer that proved who it is, and only the proof (`proof.rs`) makes
//! one: nothing of worth can be said to a stranger by mistake. Where the proof was a secret, all that is said over the channel
//! is *sealed*: encrypted, and refused if it was changed, repeated, left out or said by somebody else. A record is
//!
//! ```text
//!  length of what follows (u16, little-endian) │ ciphertext, with a tag of 16 bytes
//! ```
//! Records have numbers, which both sides count and nobody says. A record is read as a whole and no byte beyond it, so that a
//! descriptor which is passed between two of them, and a wait for the socket, find what they would find without a seal.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snow::TransportState;

use crate::version::{Spoken, Version};

/// A connection to somebody.
#[derive(Debug)]
pub enum Stream {
    /// To a process of this host: descriptors can be passed along.
    Unix(UnixStream),
    /// To any host.
    Tcp(TcpStream),
}

impl Stream {
    /// How long a read, and a write, may take.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)
            }
        }
    }

    /// Whether calls return at once when there is nothing to do.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(nonblocking),
            Self::Tcp(stream) => stream.set_nonblocking(nonblocking),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).read(to),
            Stream::Tcp(stream) => (&mut &*stream).read(to),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).write(from),
            Stream::Tcp(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// The tag at a record's end.
const TAG: usize = 16;
/// The length before it.
const HEAD: usize = 2;
/// Longest ciphertext: Noise allows no more.
const SEALED_MAX: usize = 65_535;
/// What one record says at most.
const SAID_MAX: usize = SEALED_MAX - TAG;

/// What is said of a record that does not open.
const FORGED: &str = "what came was not said by this peer, or was changed on its way";

pub(super) fn forged() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, FORGED)
}

/// One connection's keys and half-read records.
struct Seal {
    noise: TransportState,
    /// The record that is coming in, as far as it is there.
    coming: Vec<u8>,
    got: usize,
    /// What the last record said, and how much of that was taken.
    said: Vec<u8>,
    length: usize,
    taken: usize,
    going: Vec<u8>,
    /// A record came in that did not open: nothing more is heard, and nothing more said.
    deaf: bool,
    /// A record went out in part: nothing that followed would fit. What the peer still says (why it does not listen) is heard.
    dumb: bool,
}

impl Seal {
    fn new(noise: TransportState) -> Self {
        Self {
            noise,
            coming: vec![0; HEAD + SEALED_MAX],
            got: 0,
            said: vec![0; SEALED_MAX],
            length: 0,
            taken: 0,
            going: vec![0; HEAD + SEALED_MAX],
            deaf: false,
            dumb: false,
        }
    }

    /// Reads the next record as a whole; false at the end of the connection. A wait that is over too early can be gone on with.
    fn next(&mut self, mut from: &Stream, patience: Option<Duration>) -> io::Result<bool> {
        if self.deaf {
            return Err(forged());
        }
        let started = Instant::now();
        loop {
            let sealed = usize::from(u16::from_le_bytes([self.coming[0], self.coming[1]]));
            let needed = match self.got {
                0..HEAD => HEAD,
                _ if sealed <= TAG => {
                    self.deaf = true;
                    return Err(forged());
                }
                _ => HEAD + sealed,
            };
            if needed > HEAD && self.got == needed {
                break;
            }
            // The socket's own limit is for each piece that arrives.
            if patience.is_some_and(|patience| started.elapsed() > patience) {
                return Err(ErrorKind::TimedOut.into());
            }
            match from.read(&mut self.coming[self.got..needed]) {
                Ok(0) if self.got == 0 => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(more) => self.got += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let record = &self.coming[HEAD..self.got];
        match self.noise.read_message(record, &mut self.said) {
            Ok(length) => (self.length, self.taken, self.got) = (length, 0, 0),
            Err(_) => {
                self.deaf = true;
                return Err(forged());
            }
        }
        Ok(true)
    }

    fn read(
        &mut self,
        from: &Stream,
        to: &mut [u8],
        patience: Option<Duration>,
    ) -> io::Result<usize> {
        if to.is_empty() || self.taken == self.length && !self.next(from, patience)? {
            return Ok(0);
        }
        let rest = &self.said[self.taken..self.length];
        let count = rest.len().min(to.len());
        to[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }

    fn write(
        &mut self,
        mut to: &Stream,
        from: &[u8],
        patience: Option<Duration>,
    ) -> io::Result<usize> {
        if self.deaf || self.dumb {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let piece = &from[..from.len().min(SAID_MAX)];
        if piece.is_empty() {
            return Ok(0);
        }
        let sealed = self
            .noise
            .write_message(piece, &mut self.going[HEAD..])
            .map_err(io::Error::other)?;
        self.going[..HEAD].copy_from_slice(&(sealed as u16).to_le_bytes());
        let started = Instant::now();
        let mut rest = &self.going[..HEAD + sealed];
        // Until all of it has gone.
        self.dumb = true;
        while !rest.is_empty() {
            if patience.is_some_and(|patience| started.elapsed() > patience) {
                return Err(ErrorKind::TimedOut.into());
            }
            match to.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(gone) => rest = &rest[gone..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.dumb = false;
        Ok(piece.len())
    }
}

/// A connection to a peer that proved who it is.
pub struct Channel {
    stream: Stream,
    seal: Option<RefCell<Box<Seal>>>,
    patience: Cell<Option<Duration>>,
    spoken: Spoken,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("stream", &self.stream)
            .field("sealed", &self.is_sealed())
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// To a process that the kernel says is this user's.
    pub(super) fn open(stream: Stream, spoken: Spoken) -> Self {
        Self {
            stream,
            seal: None,
            patience: Cell::new(None),
            spoken,
        }
    }

    /// To a peer that holds the secret.
    pub(super) fn sealed(stream: Stream, noise: TransportState, spoken: Spoken) -> Self {
        Self {
            seal: Some(RefCell::new(Box::new(Seal::new(noise)))),
            ..Self::open(stream, spoken)
        }
    }

    /// Whether what is said is encrypted.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// What is spoken over it, and could have been.
    #[must_use]
    pub fn spoken(&self) -> &Spoken {
        &self.spoken
    }

    /// The version that is spoken over it.
    #[must_use]
    pub fn version(&self) -> Version {
        self.spoken.version
    }

    /// How long a read, and a write, may take; of a sealed one, a whole record.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.patience.set(patience);
        self.stream.set_patience(patience)
    }

    /// Whether calls return at once when there is nothing to do.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.stream.set_nonblocking(nonblocking)
    }

    /// The Unix socket, if it is one.
    #[must_use]
    pub fn unix(&self) -> Option<&UnixStream> {
        match &self.stream {
            Stream::Unix(stream) => Some(stream),
            Stream::Tcp(_) => None,
        }
    }

    /// The TCP connection, if it is one.
    #[must_use]
    pub fn tcp(&self) -> Option<&TcpStream> {
        match &self.stream {
            Stream::Unix(_) => None,
            Stream::Tcp(stream) => Some(stream),
        }
    }

    /// Whether something can be read that the socket does not tell of any more.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.seal.as_ref().is_some_and(|seal| {
            let seal = seal.borrow();
            seal.taken < seal.length
        })
    }
}

impl Read for &Channel {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match &self.seal {
            Some(seal) => seal
                .borrow_mut()
                .read(&self.stream, to, self.patience.get()),
            None => (&self.stream).read(to),
        }
    }
}

impl Write for &Channel {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match &self.seal {
            Some(seal) => seal
                .borrow_mut()
                .write(&self.stream, from, self.patience.get()),
            None => (&self.stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
