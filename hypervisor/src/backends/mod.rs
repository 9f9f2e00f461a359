//! Where the guest's frames, console bytes and disk meet the world: a TAP, a Unix-socket link, the console, an image.
//!
//! ```text
//!   kernel's TCP/IP ── TAP ──┐
//!                            ├── NetPort ── one Ethernet frame per read and per write
//!   gateway, harness ─ link ─┘
//! ```
//! Primary and backup share one [`NetPort`]: each holds a descriptor of the same kernel queue, so the queue and
//! the frames in it outlive either process. Nothing here knows about gates or logs: what is written here leaves.
//!
//! Unsafe code lives in this module and its children because they are made of system calls that the standard
//! library has no words for; each call passes memory it owns and checks the result.

pub mod announce;
pub mod block;
pub mod console;
pub mod disk;
pub mod link;
pub mod outflow;
pub mod reservations;
pub mod tap;
pub mod wait;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of an Ethernet header without a VLAN tag. A shorter frame is none.
pub const ETHERNET_HEADER: usize = 14;

/// The longest frame that belongs to an MTU: header, VLAN tag, payload.
pub const fn longest_frame(mtu: usize) -> usize {
    ETHERNET_HEADER + 4 + mtu
}

/// Why an inherited descriptor cannot be a port.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The number is not an open descriptor.
    #[error(
        "descriptor {fd} is not open: it must be inherited from the process that made the port ({source})"
    )]
    NotOpen {
        /// The number that was given.
        fd: RawFd,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptor is open but is neither a TAP nor a message socket.
    #[error(
        "descriptor {fd} is neither a TAP nor a Unix socket that keeps message boundaries: pass the one that \
         `doppel demo` or your launcher opened"
    )]
    NotAPort {
        /// The number that was given.
        fd: RawFd,
    },
    /// It could not be made non-blocking.
    #[error("cannot make descriptor {fd} non-blocking: {source}")]
    NonBlocking {
        /// The number that was given.
        fd: RawFd,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What carries the frames of a [`NetPort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A TAP interface of the kernel.
    Tap,
    /// One end of a Unix-socket link.
    Link,
}

/// The guest's network cable: one Ethernet frame per read and per write, never blocking.
#[derive(Debug)]
pub struct NetPort {
    fd: OwnedFd,
    kind: PortKind,
    dropped: AtomicU64,
}

impl NetPort {
    fn new(fd: OwnedFd, kind: PortKind) -> Self {
        Self {
            fd,
            kind,
            dropped: AtomicU64::new(0),
        }
    }

    /// Takes the port that a parent process left open under this number.
    ///
    /// The number itself is marked close-on-exec and stays open; the port holds a duplicate, so that no other
    /// owner of the number can pull it from under us. Finds out by itself whether it is a TAP or a link.
    pub fn inherited(fd: RawFd) -> Result<Self, PortError> {
        // SAFETY: fcntl with these commands passes no memory; a number that is no descriptor is an error.
        let own = unsafe {
            let own = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            own
        };
        if own < 0 {
            return Err(PortError::NotOpen {
                fd,
                source: io::Error::last_os_error(),
            });
        }
        // SAFETY: the kernel has just given us this duplicate and nobody else owns it.
        let own = unsafe { OwnedFd::from_raw_fd(own) };
        let kind = kind_of(own.as_fd()).ok_or(PortError::NotAPort { fd })?;
        set_nonblocking(own.as_fd()).map_err(|source| PortError::NonBlocking { fd, source })?;
        Ok(Self::new(own, kind))
    }

    /// A duplicate that a child process inherits: it is not closed by exec. Pass its number to the child (see
    /// [`NetPort::inherited`]) and drop it after the spawn, or later children inherit it too.
    pub fn inheritable(&self) -> io::Result<OwnedFd> {
        // SAFETY: fcntl with F_DUPFD passes no memory; the descriptor is open for as long as `self` lives.
        let fd = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_DUPFD, 3) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this duplicate and nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Another handle on the same queue, in this process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.fd.try_clone()?, self.kind))
    }

    /// What carries the frames.
    pub fn kind(&self) -> PortKind {
        self.kind
    }

    /// Frames that were no frames: too short, or too long for the reader's slot.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Reads the next frame into `slot` and returns its length, or `None` if none waits.
    ///
    /// `slot` should hold [`longest_frame`] of the interface's MTU. A frame that does not fit is dropped and
    /// counted on a link; a TAP cuts it off, so there the slot's size matters.
    ///
    /// # Errors
    /// `UnexpectedEof` when the other end of a link has been closed by everybody, so that no frame will ever
    /// come; otherwise what the kernel says.
    pub fn read_into(&self, slot: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            // SAFETY: the kernel writes at most `slot.len()` bytes into `slot`, which we may write. With
            // MSG_TRUNC it returns the message's own length but still writes no more than that.
            let got = unsafe {
                match self.kind {
                    PortKind::Tap => {
                        libc::read(self.fd.as_raw_fd(), slot.as_mut_ptr().cast(), slot.len())
                    }
                    PortKind::Link => libc::recv(
                        self.fd.as_raw_fd(),
                        slot.as_mut_ptr().cast(),
                        slot.len(),
                        libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                    ),
                }
            };
            if got < 0 {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    error => return Err(error),
                }
            }
            let got = got as usize;
            if got == 0 && self.kind == PortKind::Link {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the other end of the network link is closed",
                ));
            }
            if (ETHERNET_HEADER..=slot.len()).contains(&got) {
                return Ok(Some(got));
            }
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends one frame. `false`: the queue is full; keep the frame and try again when the port is writable.
    /// Something too short to be a frame is dropped and counted.
    ///
    /// # Errors
    /// `BrokenPipe` when the other end of a link is closed; otherwise what the kernel says (`EIO` from a TAP
    /// whose interface is down).
    pub fn write(&self, frame: &[u8]) -> io::Result<bool> {
        if frame.len() < ETHERNET_HEADER {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(true);
        }
        loop {
            // SAFETY: the kernel reads `frame.len()` bytes of `frame`.
            let sent = unsafe {
                match self.kind {
                    PortKind::Tap => {
                        libc::write(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len())
                    }
                    PortKind::Link => libc::send(
                        self.fd.as_raw_fd(),
                        frame.as_ptr().cast(),
                        frame.len(),
                        libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                    ),
                }
            };
            if sent >= 0 {
                return Ok(true);
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                error => return Err(error),
            }
        }
    }
}

impl AsFd for NetPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A TAP is the only character device that answers TUNGETIFF; a link is a socket that keeps messages apart.
fn kind_of(fd: BorrowedFd<'_>) -> Option<PortKind> {
    let mut socket_type: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the integer, and the length actually written.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut socket_type).cast(),
            &mut length,
        )
    };
    if answer == 0 {
        let keeps_messages = [libc::SOCK_SEQPACKET, libc::SOCK_DGRAM].contains(&socket_type);
        return keeps_messages.then_some(PortKind::Link);
    }
    tap::is_tap(fd).then_some(PortKind::Tap)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: fcntl with these commands passes no memory; the descriptor is borrowed, so it is open.
    let done = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if done {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests;
