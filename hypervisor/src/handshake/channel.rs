//! The control connection: a Unix socket on one host, TCP between two.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A control connection.
#[derive(Debug)]
pub enum Channel {
    /// To a process of this host: descriptors can be passed along.
    Unix(UnixStream),
    /// To any host.
    Tcp(TcpStream),
}

impl Channel {
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

    /// The Unix socket, if it is one.
    #[must_use]
    pub fn unix(&self) -> Option<&UnixStream> {
        match self {
            Self::Unix(stream) => Some(stream),
            Self::Tcp(_) => None,
        }
    }
}

impl Read for &Channel {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Channel::Unix(stream) => (&mut &*stream).read(to),
            Channel::Tcp(stream) => (&mut &*stream).read(to),
        }
    }
}

impl Write for &Channel {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Channel::Unix(stream) => (&mut &*stream).write(from),
            Channel::Tcp(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}
