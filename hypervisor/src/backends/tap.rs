//! A TAP interface: the host kernel's TCP/IP at the other end of the guest's cable.
//!
//! One queue, no packet information, no virtio header and so no offloads: a frame is what the wire would carry.
//! The interface exists for as long as any process holds a descriptor of its queue, so nothing is left behind
//! when the last one ends, however it ends.
//!
//! Unsafe code lives here for the ioctls that make and set up the interface.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use super::{NetPort, PortKind};

/// Where the kernel offers TAP interfaces.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// Frames the kernel holds for us while nobody reads, as during a failover. Beyond that it drops, which costs
/// clients a retransmission timeout (200 ms and more). The kernel's default of 1000 is less than 256
/// connections with a 64 KiB window each can have in flight (11,000 full frames).
pub const QUEUE_FRAMES: u32 = 16_384;

/// Adds an interface to a bridge: linux/sockios.h, which the libc crate has only in part.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// An IPv4 address and the length of its network's prefix, as in `10.77.0.1/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Network {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits that the addresses of the network have in common, 0 to 32.
    pub prefix: u8,
}

impl Ipv4Network {
    /// The network's mask, as in `255.255.255.0`.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(
            u32::MAX
                .checked_shl(32 - u32::from(self.prefix))
                .unwrap_or(0),
        )
    }
}

impl fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// A text that is no network address.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not an IPv4 address with a prefix length: write it as 10.77.0.1/24")]
pub struct BadNetwork(String);

impl FromStr for Ipv4Network {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let bad = || BadNetwork(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let network = Self {
            address: address.parse().map_err(|_| bad())?,
            prefix: prefix.parse().map_err(|_| bad())?,
        };
        if network.prefix > 32 {
            return Err(bad());
        }
        Ok(network)
    }
}

/// How a TAP is to be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapConfig {
    /// Interface name, 1 to 15 bytes. An existing persistent TAP of this name is used as it is found.
    pub name: String,
    /// The host's address on it; `None` leaves addresses, MTU and state to whoever made the interface.
    pub address: Option<Ipv4Network>,
    /// Longest payload of a frame, in bytes.
    pub mtu: u16,
}

/// Why there is no TAP.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no TUN/TAP driver, or its device node is missing.
    #[error(
        "{TUN_DEVICE} does not exist: load the driver (`modprobe tun`), or use the Unix-socket link, which \
         needs no TAP"
    )]
    NoDevice,
    /// We may not open the device.
    #[error(
        "no permission to open {TUN_DEVICE}: ask for read and write access to it, run as root, or use the \
         Unix-socket link"
    )]
    DeviceDenied,
    /// We may open the device but not make an interface in this network namespace.
    #[error(
        "not allowed to make the TAP `{name}` in this network namespace (CAP_NET_ADMIN is missing): run as root, \
         or have root make it for you (`ip tuntap add {name} mode tap user $USER`), or use the Unix-socket link"
    )]
    Denied {
        /// The interface that was asked for.
        name: String,
    },
    /// Another process has the interface's queue.
    #[error(
        "the interface `{name}` is in use: end the process that has it, or choose another name"
    )]
    Busy {
        /// The interface that was asked for.
        name: String,
    },
    /// The name is empty, too long, or has a character that the kernel refuses.
    #[error("`{name}` is no interface name: use 1 to 15 letters, digits, `-`, `_` or `.`")]
    BadName {
        /// The name that was asked for.
        name: String,
    },
    /// The interface was made but could not be set up.
    #[error("cannot set the {what} of the interface `{name}`: {source}")]
    Configure {
        /// The setting that was refused.
        what: &'static str,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else the kernel said.
    #[error("cannot open the TAP `{name}`: {source}")]
    Open {
        /// The interface that was asked for.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A TAP interface, open.
#[derive(Debug)]
pub struct Tap {
    name: String,
    port: NetPort,
}

impl Tap {
    /// Makes (or attaches to) the interface in the calling thread's network namespace, and sets it up.
    pub fn open(config: &TapConfig) -> Result<Self, TapError> {
        let name = &config.name;
        let mut request = named(name)?;
        let file = open_device(name)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        if made < 0 {
            let source = io::Error::last_os_error();
            let name = name.clone();
            return Err(match source.raw_os_error() {
                Some(libc::EPERM) => TapError::Denied { name },
                Some(libc::EBUSY) => TapError::Busy { name },
                // The name belongs to something that is no TAP, or the queue to a TAP of other flags.
                Some(libc::EINVAL) => TapError::Busy { name },
                _ => TapError::Open { name, source },
            });
        }
        if let Some(address) = config.address {
            Interface::new(name)?.set_up(address, config.mtu)?;
        }
        Ok(Self {
            name: name.clone(),
            port: NetPort::new(file.into(), PortKind::Tap),
        })
    }

    /// Cables the interface to a bridge of the calling thread's network namespace, and brings it up.
    ///
    /// # Errors
    /// If there is no such bridge, or we may not.
    pub fn join_bridge(&self, bridge: &str, mtu: u16) -> Result<(), TapError> {
        let own = Interface::new(&self.name)?;
        own.quieten();
        let mut request = named(&self.name)?;
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
        own.set("MTU", libc::SIOCSIFMTU, &mut request)?;
        own.set_queue_length(QUEUE_FRAMES)?;
        own.set("bridge", libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the kernel has just filled in the index.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mut joining = named(bridge)?;
        joining.ifr_ifru.ifru_ifindex = index;
        Interface::new(bridge)?.set("ports", SIOCBRADDIF, &mut joining)?;
        own.set_state(true)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The port, borrowed.
    pub fn port(&self) -> &NetPort {
        &self.port
    }

    /// The port, for good. The interface lives as long as it.
    pub fn into_port(self) -> NetPort {
        self.port
    }
}

/// Says whether a TAP could be opened as far as the device node is concerned, without making one.
pub fn device_permits() -> Result<(), TapError> {
    open_device("").map(drop)
}

/// Brings the loopback interface of the calling thread's network namespace up.
pub fn loopback_up() -> Result<(), TapError> {
    set_link("lo", true)
}

/// Brings an interface of the calling thread's network namespace up, or down as if its cable were cut.
///
/// # Errors
/// If there is none of that name, or we may not.
pub fn set_link(name: &str, up: bool) -> Result<(), TapError> {
    Interface::new(name)?.set_state(up)
}

/// Whether the descriptor is an attached TAP.
pub(super) fn is_tap(fd: BorrowedFd<'_>) -> bool {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one ifreq. A descriptor that is no TUN or TAP refuses the ioctl: its number
    // carries the size and the type 'T' with a value no other driver of that type uses.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) };
    // SAFETY: the kernel filled in the flags, and any bytes make a valid short.
    answer == 0 && unsafe { request.ifr_ifru.ifru_flags } & libc::IFF_TAP as libc::c_short != 0
}

fn open_device(name: &str) -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(Path::new(TUN_DEVICE))
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDevice,
            Some(libc::EACCES | libc::EPERM) => TapError::DeviceDenied,
            _ => TapError::Open {
                name: name.to_owned(),
                source,
            },
        })
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is plain data for which all zeroes is a value.
    unsafe { std::mem::zeroed() }
}

fn named(name: &str) -> Result<libc::ifreq, TapError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let mut request = empty_request();
    if name.is_empty()
        || name.len() >= request.ifr_name.len()
        || matches!(name, "." | "..")
        || !name.bytes().all(good)
    {
        return Err(TapError::BadName {
            name: name.to_owned(),
        });
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// An interface of this network namespace, and the socket its ioctls go through.
struct Interface {
    name: String,
    socket: OwnedFd,
}

impl Interface {
    fn new(name: &str) -> Result<Self, TapError> {
        // SAFETY: no memory is passed; the result is checked before use.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(TapError::Open {
                name: name.to_owned(),
                source: io::Error::last_os_error(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
            socket: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    /// No router solicitations and multicast reports of the host's. Where it cannot be written (no IPv6 in the kernel) there is
    /// nothing to silence.
    fn quieten(&self) {
        let quiet = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name);
        let _ = fs::write(quiet, "1");
    }

    fn set_up(&self, network: Ipv4Network, mtu: u16) -> Result<(), TapError> {
        self.quieten();
        let mut request = named(&self.name)?;
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
        self.set("MTU", libc::SIOCSIFMTU, &mut request)?;
        self.set_queue_length(QUEUE_FRAMES)?;
        request.ifr_ifru.ifru_addr = socket_address(network.address);
        self.set("address", libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(network.mask());
        self.set("network mask", libc::SIOCSIFNETMASK, &mut request)?;
        self.set_state(true)
    }

    /// By netlink: the ioctl for it needs privilege over the whole host, which a user namespace does not give.
    fn set_queue_length(&self, frames: u32) -> Result<(), TapError> {
        let mut request = named(&self.name)?;
        self.set("queue length", libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the kernel has just filled in the index.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        netlink(&set_queue_length_message(index, frames))
            .map_err(|source| self.failed("queue length", source))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Configure {
            what,
            name: self.name.clone(),
            source,
        }
    }

    fn set_state(&self, up: bool) -> Result<(), TapError> {
        let mut request = named(&self.name)?;
        self.set("state", libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let running = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        request.ifr_ifru.ifru_flags = if up {
            flags | running
        } else {
            flags & !running
        };
        self.set("state", libc::SIOCSIFFLAGS, &mut request)
    }

    fn set(
        &self,
        what: &'static str,
        command: libc::Ioctl,
        request: &mut libc::ifreq,
    ) -> Result<(), TapError> {
        // SAFETY: the interface ioctls read and write one ifreq, which outlives the call.
        let done = unsafe { libc::ioctl(self.socket.as_raw_fd(), command, request) };
        if done < 0 {
            return Err(self.failed(what, io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// RTM_NEWLINK with one attribute, in rtnetlink(7)'s layout: message header, interface header, attribute.
fn set_queue_length_message(index: libc::c_int, frames: u32) -> [u8; 40] {
    const LENGTH: u32 = 40;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = [0; LENGTH as usize];
    message[0..4].copy_from_slice(&LENGTH.to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    // Sequence and sender are 0; so are the interface's family, type and flags.
    message[20..24].copy_from_slice(&index.to_ne_bytes());
    message[32..34].copy_from_slice(&8_u16.to_ne_bytes());
    message[34..36].copy_from_slice(&libc::IFLA_TXQLEN.to_ne_bytes());
    message[36..40].copy_from_slice(&frames.to_ne_bytes());
    message
}

/// Sends one rtnetlink request and takes the kernel's acknowledgement.
fn netlink(message: &[u8]) -> io::Result<()> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else owns it. A netlink socket without
    // an address sends to the kernel, by write, and gets its answers by read.
    let mut socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    socket.write_all(message)?;
    // The answer to a request is NLMSG_ERROR: message header, error number (0 is well), the request.
    let mut answer = [0; 256];
    let length = socket.read(&mut answer)?;
    let number = |at: usize| {
        let bytes = answer[..length].get(at..at + 4)?;
        Some(i32::from_ne_bytes(bytes.try_into().ok()?))
    };
    match number(16) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut generic = libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // sockaddr_in: two bytes of port, then the address in network order.
    for (to, from) in generic.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    generic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_masked() {
        let network: Ipv4Network = "10.77.0.1/24".parse().unwrap();
        assert_eq!(network.to_string(), "10.77.0.1/24");
        assert_eq!(network.mask(), Ipv4Addr::new(255, 255, 255, 0));
        let whole: Ipv4Network = "1.2.3.4/0".parse().unwrap();
        assert_eq!(whole.mask(), Ipv4Addr::UNSPECIFIED);
        for bad in ["10.77.0.1", "10.77.0.1/33", "10.77.0/24", "x/8", ""] {
            assert!(bad.parse::<Ipv4Network>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn impossible_names_are_refused_before_the_kernel_sees_them() {
        for bad in ["", "a/b", "sixteen-bytes-xx", "with space", "..", "nul\0"] {
            let config = TapConfig {
                name: bad.to_owned(),
                address: None,
                mtu: 1500,
            };
            assert!(
                matches!(Tap::open(&config), Err(TapError::BadName { .. })),
                "{bad:?} was taken"
            );
        }
    }
}
