//! UDP datagrams whose sender's address is somebody else's.
//!
//! Unsafe code lives here for a raw socket (raw(7)), which the standard library does not have. Needs root.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

/// Sends datagrams in anybody's name, in the namespace of the thread that made it.
#[derive(Debug)]
pub struct Forger {
    socket: OwnedFd,
}

impl Forger {
    /// A forger.
    ///
    /// # Errors
    /// If the host does not let us.
    pub fn new() -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: the call takes numbers and returns one.
        let fd = unsafe { libc::socket(libc::AF_INET, kind, libc::IPPROTO_RAW) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("make a raw socket");
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { socket })
    }

    /// Sends one. A queue that is full loses it, as a network does.
    ///
    /// # Errors
    /// What else the kernel says.
    pub fn send(&self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Result<()> {
        let udp_length = UDP_HEADER + payload.len();
        let mut packet = vec![0; IP_HEADER];
        // The kernel fills in length, identification and checksum.
        packet[0] = 0x45;
        packet[8] = 64;
        packet[9] = libc::IPPROTO_UDP as u8;
        packet[12..16].copy_from_slice(&from.ip().octets());
        packet[16..20].copy_from_slice(&to.ip().octets());
        packet.extend_from_slice(&from.port().to_be_bytes());
        packet.extend_from_slice(&to.port().to_be_bytes());
        packet.extend_from_slice(&(udp_length as u16).to_be_bytes());
        // No checksum: IPv4 allows it.
        packet.extend_from_slice(&[0, 0]);
        packet.extend_from_slice(payload);
        // SAFETY: a sockaddr_in is plain data for which all zeroes is a value.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        address.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
        // SAFETY: packet and address outlive the call, and their lengths are theirs.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_DONTWAIT,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if sent >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => Ok(()),
            error => Err(error).context("send a forged datagram"),
        }
    }
}
