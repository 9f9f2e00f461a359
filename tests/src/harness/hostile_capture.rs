//! Watches a network interface: every frame that the guest sends to the host's side of its TAP.
//!
//! Unsafe code lives here for packet sockets (packet(7)), which the standard library does not have; each call passes memory it
//! owns and checks the result.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

/// A capture of one interface.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    slot: Vec<u8>,
}

/// See packet(7); the libc crate does not have it.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// Room for what comes between two looks. As root the kernel grants it whole.
const QUEUE_BYTES: libc::c_int = 64 << 20;

impl Capture {
    /// Captures from now on, in the calling thread's namespace.
    ///
    /// # Errors
    /// If the host does not let us.
    pub fn start(interface: &str) -> Result<Self> {
        let socket = packet_socket(interface).context("capture frames")?;
        Ok(Self {
            socket,
            slot: vec![0; 64 << 10],
        })
    }

    /// Hands over what the guest has sent since the last look, oldest first.
    ///
    /// # Errors
    /// If frames were lost, so that nothing can be said of them.
    pub fn look(&mut self, mut frame: impl FnMut(&[u8])) -> Result<()> {
        while let Some(length) = self.receive().context("read a captured frame")? {
            frame(&self.slot[..length]);
        }
        let lost = self.lost().context("ask for lost frames")?;
        ensure!(lost == 0, "{lost} frames were not captured");
        Ok(())
    }

    fn receive(&mut self) -> io::Result<Option<usize>> {
        loop {
            // SAFETY: the kernel writes at most `slot.len()` bytes into the slot.
            let got = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    self.slot.as_mut_ptr().cast(),
                    self.slot.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            if got >= 0 {
                return Ok(Some(got as usize));
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error => return Err(error),
            }
        }
    }

    /// Frames that found the queue full, since the last call.
    fn lost(&self) -> io::Result<u32> {
        // struct tpacket_stats: frames, drops.
        let mut counts = [0_u32; 2];
        let mut size = size_of_val(&counts) as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes into the array.
        let done = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                counts.as_mut_ptr().cast(),
                &mut size,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(counts[1])
    }
}

fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name is a zero-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    // Made deaf, with protocol 0; binding names the interface and the protocols, so that no other frame ever gets in.
    // SAFETY: socket passes no memory; the descriptor is new and nobody else's.
    let socket = unsafe {
        OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            0,
        ))?)
    };
    // SAFETY: all zero is a valid value of this plain struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every_protocol;
    address.sll_ifindex = index as libc::c_int;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES)?;
    // What the host's own network stack sends out is not wanted; all the rest came out of the TAP.
    set(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
    // SAFETY: the kernel reads the address, of the size that is given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

fn set(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads the integer, of the size that is given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    })?;
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
