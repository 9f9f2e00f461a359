//! A network cable made of a Unix socket: one Ethernet frame per message. It needs no privilege.
//!
//! The socket is `SOCK_SEQPACKET`: it keeps message boundaries, tells when the other end has gone, and (unlike
//! `SOCK_DGRAM`, which holds ten messages) is bounded by bytes only. A full queue makes the sender wait; nothing
//! is dropped. As with a TAP, the queue outlives each process that holds an end.
//!
//! Unsafe code lives here because the standard library does not know this kind of socket.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{NetPort, PortKind};

/// Bytes that may wait in one direction. About 1,800 full frames with the kernel's bookkeeping, of which the
/// kernel grants what `net.core.wmem_max` allows unless we are root. Too small shows as writes that return
/// `false` at bulk loads; larger costs nothing until it is used.
const QUEUE_BYTES: libc::c_int = 4 << 20;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The path is longer than a socket address holds.
    #[error("{} is too long for a socket path: use one of at most {limit} bytes", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Bytes that fit.
        limit: usize,
    },
    /// A process listens there already.
    #[error("{} is in use: end the process that listens there, or choose another path", path.display())]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens there.
    #[error("nobody listens on {}: start the other end of the link first", path.display())]
    NobodyThere {
        /// The path.
        path: PathBuf,
    },
    /// Anything else the kernel said.
    #[error("cannot {what} a network link: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Two ends of a new cable.
pub fn pair() -> Result<(NetPort, NetPort), LinkError> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors into the array.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, SOCKET_KIND, 0, fds.as_mut_ptr()) };
    if made < 0 {
        return Err(failed("make"));
    }
    let [one, other] = fds.map(own);
    Ok((port(one), port(other)))
}

/// Plugs into the link that a [`LinkListener`] offers under this path.
pub fn connect(path: &Path) -> Result<NetPort, LinkError> {
    let socket = socket()?;
    let (address, length) = address(path)?;
    // SAFETY: the kernel reads `length` bytes of the address, which is at least that long.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if done < 0 {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::ENOENT | libc::ECONNREFUSED) => LinkError::NobodyThere {
                path: path.to_owned(),
            },
            _ => LinkError::Socket {
                what: "connect to",
                source,
            },
        });
    }
    Ok(port(socket))
}

/// Offers a link under a path. The path is removed when this is dropped.
#[derive(Debug)]
pub struct LinkListener {
    socket: OwnedFd,
    path: PathBuf,
}

impl LinkListener {
    /// Listens on the path. A socket that a dead process left there is replaced.
    pub fn bind(path: &Path) -> Result<Self, LinkError> {
        let socket = socket()?;
        let (address, length) = address(path)?;
        let bind = || {
            // SAFETY: the kernel reads `length` bytes of the address, which is at least that long.
            let done =
                unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
            (done < 0).then(io::Error::last_os_error)
        };
        let mut failure = bind();
        if failure.as_ref().and_then(io::Error::raw_os_error) == Some(libc::EADDRINUSE) {
            if !matches!(connect(path), Err(LinkError::NobodyThere { .. })) {
                return Err(LinkError::Busy {
                    path: path.to_owned(),
                });
            }
            fs::remove_file(path).map_err(|source| LinkError::Socket {
                what: "remove the old socket of",
                source,
            })?;
            failure = bind();
        }
        if let Some(source) = failure {
            return Err(LinkError::Socket {
                what: "bind",
                source,
            });
        }
        let listener = Self {
            socket,
            path: path.to_owned(),
        };
        // SAFETY: listen passes no memory.
        if unsafe { libc::listen(listener.socket.as_raw_fd(), 1) } < 0 {
            return Err(failed("listen on"));
        }
        Ok(listener)
    }

    /// The next end to plug in, or `None` if none waits. Never blocks; wait for the descriptor to be readable.
    pub fn accept(&self) -> Result<Option<NetPort>, LinkError> {
        // SAFETY: null pointers ask for no address.
        let fd = unsafe {
            libc::accept4(
                self.socket.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return match source.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(LinkError::Socket {
                    what: "accept",
                    source,
                }),
            };
        }
        Ok(Some(port(own(fd))))
    }
}

impl AsFd for LinkListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for LinkListener {
    fn drop(&mut self) {
        // Nothing to do about it if it has gone already.
        let _ = fs::remove_file(&self.path);
    }
}

const SOCKET_KIND: libc::c_int = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;

fn socket() -> Result<OwnedFd, LinkError> {
    // SAFETY: no memory is passed; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_UNIX, SOCKET_KIND, 0) };
    if fd < 0 {
        return Err(failed("make"));
    }
    Ok(own(fd))
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a descriptor that the kernel has just made and that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn failed(what: &'static str) -> LinkError {
    LinkError::Socket {
        what,
        source: io::Error::last_os_error(),
    }
}

/// Makes a port of one end, with as much room as the kernel grants.
fn port(socket: OwnedFd) -> NetPort {
    let room = QUEUE_BYTES;
    for option in [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF] {
        // SAFETY: the kernel reads one integer.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const room).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        // Refused (forcing needs CAP_NET_ADMIN): ask politely, and then take the default.
        if done == 0 {
            break;
        }
    }
    NetPort::new(socket, PortKind::Link)
}

fn address(path: &Path) -> Result<(libc::sockaddr_un, libc::socklen_t), LinkError> {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    let bytes = path.as_os_str().as_bytes();
    let limit = address.sun_path.len() - 1;
    if bytes.len() > limit {
        return Err(LinkError::PathTooLong {
            path: path.to_owned(),
            limit,
        });
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    Ok((address, length as libc::socklen_t))
}
