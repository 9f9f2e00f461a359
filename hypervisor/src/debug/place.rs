//! Where gdb connects: an address of this host's own, or a Unix socket. Whoever connects reads all of the guest's memory.
//!
//! Any user of the host can connect to such an address, so the kernel is asked whose the other end is: its table of connections says so
//! (proc(5), `/proc/net/tcp`). A Unix socket is its owner's alone.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;

use super::DebugError;
use crate::credentials::{is_believed, own_user};

/// Where gdb connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A loopback address; port 0 takes a free one.
    Address(SocketAddr),
    /// A Unix socket.
    Socket(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    /// `[ADDRESS:]PORT` of a loopback address, or a path with a `/` in it.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Socket(text.into()));
        }
        let address = match text.parse() {
            Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
            Err(_) => text.parse::<SocketAddr>().map_err(|_| {
                format!(
                    "{text:?} is no place for gdb: write [127.0.0.1:]PORT, or the path of a Unix socket, such as ./gdb.sock"
                )
            })?,
        };
        if !address.ip().is_loopback() {
            return Err(format!(
                "{text:?} is not an address of this host's own (127.0.0.1, ::1): whoever connects reads all of the guest's memory; from \
                 elsewhere use a tunnel, such as ssh -L"
            ));
        }
        Ok(Self::Address(address))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// Listens for gdb.
#[derive(Debug)]
pub enum Listener {
    /// At an address.
    Address(TcpListener),
    /// At a socket, whose file goes when it is dropped.
    Socket(UnixListener, PathBuf),
}

impl Listener {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`DebugError::Listen`].
    pub fn bind(place: &Place) -> Result<Self, DebugError> {
        let listen = |source| DebugError::Listen {
            place: place.to_string(),
            source,
        };
        match place {
            Place::Address(address) => TcpListener::bind(address)
                .map(Self::Address)
                .map_err(listen),
            Place::Socket(path) => UnixListener::bind(path)
                .map(|listener| Self::Socket(listener, path.clone()))
                .map_err(listen),
        }
    }

    /// What gdb is told: `target remote` this.
    ///
    /// # Errors
    /// [`DebugError::Connection`].
    pub fn target(&self) -> Result<String, DebugError> {
        match self {
            Self::Address(listener) => {
                let address = listener.local_addr().map_err(DebugError::Connection)?;
                Ok(address.to_string())
            }
            Self::Socket(_, path) => Ok(path.display().to_string()),
        }
    }

    /// Waits for gdb, for one of this user's. The connection is used as a file: a confined thread may read and write what is open.
    ///
    /// # Errors
    /// [`DebugError::Connection`].
    pub fn accept(&self) -> Result<File, DebugError> {
        let accepted: std::io::Result<OwnedFd> = match self {
            Self::Address(listener) => of_this_user(listener).and_then(|stream| {
                stream.set_nodelay(true)?;
                Ok(stream.into())
            }),
            Self::Socket(listener, path) => listener.accept().map(|(stream, _)| {
                // Nobody else is listened to, and a confined thread cannot remove it later.
                let _ = std::fs::remove_file(path);
                stream.into()
            }),
        };
        accepted.map(File::from).map_err(DebugError::Connection)
    }
}

/// The first caller that is this user's, or root's. Others are hung up on.
fn of_this_user(listener: &TcpListener) -> std::io::Result<TcpStream> {
    let ours = own_user();
    loop {
        let (stream, from) = listener.accept()?;
        match user_of(from, stream.local_addr()?)? {
            Some(theirs) if is_believed(theirs, ours) => return Ok(stream),
            Some(theirs) => tracing::warn!(
                "user {theirs} connected as if it were gdb, and is turned away: what is debugged is another user's"
            ),
            // It has hung up already.
            None => tracing::debug!("somebody connected from {from} and was gone"),
        }
    }
}

/// Whose the other end is of a connection between two sockets of this host; none if it is no connection any more.
fn user_of(theirs: SocketAddr, ours: SocketAddr) -> std::io::Result<Option<u32>> {
    let table = match theirs {
        SocketAddr::V4(_) => "/proc/thread-self/net/tcp",
        SocketAddr::V6(_) => "/proc/thread-self/net/tcp6",
    };
    let table = fs::read_to_string(table)?;
    Ok(table.lines().find_map(|line| user_in(line, theirs, ours)))
}

/// The user in this line of the kernel's table, if it is the one of the socket that is connected so.
fn user_in(line: &str, own: SocketAddr, other: SocketAddr) -> Option<u32> {
    /// Both ends are there. A socket that was closed is nobody's, which reads as root's.
    const ESTABLISHED: &str = "01";
    let mut words = line.split_whitespace().skip(1);
    let (from, to, state) = (words.next()?, words.next()?, words.next()?);
    let is_it = (from, to, state) == (&*entry(own), &*entry(other), ESTABLISHED);
    is_it.then(|| words.nth(3)?.parse().ok()).flatten()
}

/// An address as that table has it: words as this CPU reads them where they lie as the network has them.
fn entry(address: SocketAddr) -> String {
    let word = |bytes: &[u8]| match bytes {
        &[a, b, c, d] => format!("{:08X}", u32::from_ne_bytes([a, b, c, d])),
        _ => String::new(),
    };
    let words: String = match address.ip() {
        IpAddr::V4(ip) => word(&ip.octets()),
        IpAddr::V6(ip) => ip.octets().chunks(4).map(word).collect(),
    };
    format!("{words}:{:04X}", address.port())
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Socket(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_listened_to() {
        let address = |text: &str| Place::Address(text.parse().unwrap());
        assert_eq!("1234".parse(), Ok(address("127.0.0.1:1234")));
        assert_eq!("127.0.0.1:0".parse(), Ok(address("127.0.0.1:0")));
        assert_eq!("[::1]:9".parse(), Ok(address("[::1]:9")));
        assert_eq!("./g".parse(), Ok(Place::Socket("./g".into())));
        for bad in ["", "gdb", "0.0.0.0:1234", "192.0.2.1:1", "[::]:1", "99999"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_connections_other_end_has_a_user() {
        let [own, other] = ["127.0.0.1:34567", "127.0.0.1:1234"].map(|text| text.parse().unwrap());
        // As an x86 has it, with the fields behind that nobody asks for.
        let line = |state: &str| {
            format!(
                "   3: 0100007F:8707 0100007F:04D2 {state} 00000000:00000000 00:00000000 00000000  1001        0 36023 1 0000 20 4 30 10 -1"
            )
        };
        assert_eq!(user_in(&line("01"), own, other), Some(1001));
        assert_eq!(user_in(&line("06"), own, other), None, "it was closed");
        assert_eq!(user_in(&line("01"), other, own), None, "the other one");
        assert_eq!(user_in("", own, other), None);
        let v6 = "[::1]:9".parse().unwrap();
        assert_eq!(entry(v6), "00000000000000000000000001000000:0009");
    }

    /// Of somebody else only the kernel can make one, so the other side of the decision is in the test above.
    #[test]
    fn a_caller_of_this_users_is_taken_in() {
        for place in ["127.0.0.1:0", "[::1]:0"] {
            let listener = match Listener::bind(&place.parse().unwrap()) {
                Ok(listener) => listener,
                Err(error) => {
                    assert!(place.starts_with('['), "{error}");
                    eprintln!("no IPv6 here: {error}");
                    continue;
                }
            };
            let target: SocketAddr = listener.target().unwrap().parse().unwrap();
            let near = TcpStream::connect(target).unwrap();
            let (own, other) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
            assert_eq!(user_of(own, other).unwrap(), Some(own_user()));
            listener.accept().unwrap();
            drop(near);
            assert_eq!(user_of(own, other).unwrap(), None, "it has hung up");
        }
    }
}
