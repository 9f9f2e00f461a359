//! Heartbeats over UDP.
#![forbid(unsafe_code)]

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use super::SessionError;
use crate::protocol::heartbeat::{Heartbeat, PairKey, SIZE};

/// Datagrams of no use that are read at once: more may come than can be read, and the thread has other things to do.
const STRAYS: usize = 64;

/// The socket of one pair.
#[derive(Debug)]
pub(super) struct Beats {
    socket: UdpSocket,
    key: PairKey,
}

impl Beats {
    /// Binds the socket; [`Beats::connect`] names the peer.
    pub(super) fn bind(address: SocketAddr) -> Result<UdpSocket, SessionError> {
        let bind = || {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        bind().map_err(SessionError::host(
            "bind the heartbeat socket (pair.heartbeat)",
        ))
    }

    /// From now on only the peer is heard and spoken to.
    pub(super) fn connect(
        socket: UdpSocket,
        peer: SocketAddr,
        key: PairKey,
    ) -> Result<Self, SessionError> {
        socket
            .connect(peer)
            .map_err(SessionError::host("reach the peer's heartbeat address"))?;
        Ok(Self { socket, key })
    }

    /// Sends one heartbeat if the network takes it now. A lost one is what detectors are for.
    pub(super) fn send(&self, beat: &Heartbeat) {
        let _ = self.socket.send(&beat.encode(self.key));
    }

    /// The next heartbeat of this pair that has come. Behind many strays it comes with a later call.
    pub(super) fn receive(&self) -> Option<Heartbeat> {
        let mut datagram = [0; SIZE + 1];
        for _ in 0..STRAYS {
            // An error is either "nothing there" or the peer's port being closed, which is no news of ours to act on.
            let length = self.socket.recv(&mut datagram).ok()?;
            if let Ok(beat) = Heartbeat::decode(&datagram[..length], self.key) {
                return Some(beat);
            }
        }
        None
    }
}

impl AsFd for Beats {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
