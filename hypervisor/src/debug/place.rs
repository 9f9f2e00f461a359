//! Where gdb connects: an address of this host's own, or a Unix socket. Whoever connects reads all of the guest's memory.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;

use super::DebugError;

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

    /// Waits for gdb, for one. The connection is used as a file: a confined thread may read and write what is open.
    ///
    /// # Errors
    /// [`DebugError::Connection`].
    pub fn accept(&self) -> Result<File, DebugError> {
        let accepted: std::io::Result<OwnedFd> = match self {
            Self::Address(listener) => listener.accept().and_then(|(stream, _)| {
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
}
