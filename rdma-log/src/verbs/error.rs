//! What can go wrong with RDMA, each with what to do.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;

use thiserror::Error;

use super::abi::{Failure, Step};

/// How a request that was posted failed: `ibv_wc_status`, the ones that tell something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 1, 2, 4: the device finds this side's request wrong: its length, its queue pair, its memory.
    Local(u32),
    /// 5: it was in the queue behind one that failed, or the queue pair was taken down.
    Flushed,
    /// 7: the peer's answer made no sense.
    BadResponse,
    /// 9: the peer's queue pair refuses such requests.
    RemoteRequest,
    /// 10: the peer's memory is not registered, or not that far.
    RemoteAccess,
    /// 11: the peer's device failed while it did what was asked.
    RemoteOperation,
    /// 12: nothing at the other end answers.
    RetryExceeded,
    /// 13: the peer has no receive posted.
    NoReceive,
    /// 19, 21: the device, or its port, failed as a whole.
    Fatal(u32),
    /// Any other.
    Other(u32),
}

impl Status {
    pub(crate) fn of(number: u32) -> Status {
        match number {
            local @ (1 | 2 | 4) => Status::Local(local),
            5 => Status::Flushed,
            7 => Status::BadResponse,
            9 => Status::RemoteRequest,
            10 => Status::RemoteAccess,
            11 => Status::RemoteOperation,
            12 => Status::RetryExceeded,
            13 => Status::NoReceive,
            fatal @ (19 | 21) => Status::Fatal(fatal),
            other => Status::Other(other),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Local(number) => write!(
                f,
                "this side's request was wrong ({number}): length, queue pair or memory; this is a bug, or two builds"
            ),
            Status::BadResponse => f.write_str(
                "the peer's answer made no sense (7): is it the same device and driver?",
            ),
            Status::RemoteOperation => {
                f.write_str("the peer's device failed (11): its host's dmesg says more")
            }
            Status::Fatal(number) => write!(
                f,
                "the device failed as a whole ({number}): see dmesg, reset it or take another"
            ),
            Status::Flushed => f.write_str("flushed (5): the queue pair had been taken down"),
            Status::RemoteRequest => f.write_str("remote invalid request (9)"),
            Status::RemoteAccess => f.write_str("remote access (10)"),
            Status::RetryExceeded => f.write_str("retry exceeded (12)"),
            Status::NoReceive => f.write_str("receiver not ready (13)"),
            Status::Other(number) => write!(f, "status {number} (see ibv_wc_status)"),
        }
    }
}

/// Why RDMA cannot be used, or no longer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RdmaError {
    /// The library that speaks verbs is not there, or something that it needs is not.
    #[error(
        "RDMA needs libdoppel_verbs.so, which cannot be loaded ({reason}): install libibverbs1 and ibverbs-providers \
         (Debian's names), build it with `cargo build --release -p doppel-verbs`, and put it beside the program or name \
         it in DOPPEL_VERBS; without RDMA use the transport tcp"
    )]
    Library {
        /// What was tried, and what the loader said.
        reason: String,
    },
    /// The library is of another build.
    #[error(
        "{path} has version {found} of the table of verbs, this program needs {expected}: build both from the same sources"
    )]
    Version {
        /// The library.
        path: String,
        /// The version needed.
        expected: u32,
        /// Its version.
        found: u32,
    },
    /// There is no RDMA device, or no library of its maker's.
    #[error(
        "this machine has no RDMA device: `ibv_devices` must show one. For soft-RoCE: `modprobe rdma_rxe` and `rdma link \
         add rxe0 type rxe netdev eth0`; install ibverbs-providers, without which devices are silently not seen"
    )]
    NoDevice,
    /// No device has that name.
    #[error("there is no RDMA device {name:?} here; there are: {}; set rdma.device", .have.join(", "))]
    UnknownDevice {
        /// The name that was asked for.
        name: String,
        /// Those there are.
        have: Vec<String>,
    },
    /// No port is active.
    #[error(
        "no active port {port} on {device}: bring its link up (`rdma link`, `ip link set … up`), or set rdma.device and rdma.port"
    )]
    NoPort {
        /// The device that was asked for, or "any device".
        device: String,
        /// The port that was asked for, or "of any number".
        port: String,
    },
    /// The port has no GID to be reached by.
    #[error(
        "{device} has no usable RoCE v2 GID: give its network interface an address, or set rdma.gid_index (`rdma link`, \
         /sys/class/infiniband/*/ports/*/gids)"
    )]
    NoGid {
        /// The device that was asked for, or "any device".
        device: String,
    },
    /// The device may not be used.
    #[error(
        "no permission to {what} ({}): this user must be able to read and write /dev/infiniband/uverbs* (a group in a udev \
         rule, or the device passed into the container)", os(*.errno)
    )]
    Permission {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        errno: i32,
    },
    /// More memory than may be locked.
    #[error(
        "cannot register {bytes} bytes with the RDMA device ({}): raise the limit of locked memory (`ulimit -l`, \
         LimitMEMLOCK= in systemd, memlock in limits.conf), or make the lanes smaller", os(*.errno)
    )]
    LockedMemory {
        /// How many bytes.
        bytes: u64,
        /// What the system said.
        errno: i32,
    },
    /// The device has no room, or none of the memory that may be locked is left.
    #[error(
        "cannot {what} ({}): the device has no more of them, or the limit of locked memory is reached: end other programs that \
         use it (`rdma resource` counts), raise the limit (`ulimit -l`, LimitMEMLOCK=)", os(*.errno)
    )]
    NoRoom {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        errno: i32,
    },
    /// The device is not there any more.
    #[error(
        "the RDMA device is gone, it cannot {what} ({}): it was removed, reset, or its driver or network interface taken away; \
         see dmesg and `rdma link`", os(*.errno)
    )]
    DeviceGone {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        errno: i32,
    },
    /// The peer's address, or the MTU, is none that this device can use.
    #[error(
        "this side's RDMA device cannot reach the peer's ({}): its GID is {gid}, the path MTU {mtu}. Both ports must be in one network \
         and have GIDs of the same kind (set rdma.gid_index on both; /sys/class/infiniband/*/ports/*/gids), and \
         the peer's address must be reachable through the device's own interface (`ip route get`)", os(*.errno)
    )]
    NoPath {
        /// The peer's GID, as an IPv6 address.
        gid: String,
        /// The smaller of the two ports' active MTUs, in bytes.
        mtu: u32,
        /// What the system said.
        errno: i32,
    },
    /// Any other call that failed.
    #[error("cannot {what}: {}; the kernel's log (dmesg) may say more", os(*.errno))]
    Verb {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        errno: i32,
    },
    /// Entries of a lane can be longer than one message of the device.
    #[error(
        "an entry of this ring can have {needed} bytes, {device} sends {most} in one message: make the lanes smaller"
    )]
    Message {
        /// The device.
        device: String,
        /// The longest entry.
        needed: u64,
        /// The longest message.
        most: u64,
    },
    /// Nothing at the other end answers.
    #[error(
        "the peer does not answer any more (retry exceeded, {what}): its process or host is gone, or the path drops packets \
         (a path MTU smaller than the port's does that to large ones: compare `ibv_devinfo` on both sides)"
    )]
    PeerGone {
        /// Of which request.
        what: &'static str,
    },
    /// The peer does not let this side write any more.
    #[error(
        "the peer takes no more writes ({status}): it fenced this connection; ask the arbiter who lives"
    )]
    Refused {
        /// How it said so.
        status: Status,
    },
    /// A request failed for another reason.
    #[error(
        "the RDMA connection failed: {status}, vendor error {vendor:#x}; drop this connection and make a new one"
    )]
    Request {
        /// How.
        status: Status,
        /// What the device's maker knows.
        vendor: u32,
    },
    /// A completion that belongs to no request.
    #[error("the device completed request {found}, {expected} is the next: drop this connection")]
    Completion {
        /// The next request.
        expected: u64,
        /// The one that came.
        found: u64,
    },
}

fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl RdmaError {
    /// Whether it says only that the other side is not there any more: its queue pair does not answer, or was in the middle
    /// of being taken down.
    pub fn is_peer_gone(&self) -> bool {
        matches!(
            self,
            RdmaError::PeerGone { .. }
                | RdmaError::Request {
                    status: Status::Flushed,
                    ..
                }
        )
    }

    /// What a request's failure means.
    pub(crate) fn of_status(number: u32, vendor: u32) -> RdmaError {
        match Status::of(number) {
            Status::RetryExceeded => RdmaError::PeerGone { what: "a write" },
            status @ (Status::RemoteAccess | Status::RemoteRequest) => {
                RdmaError::Refused { status }
            }
            status => RdmaError::Request { status, vendor },
        }
    }

    /// A failure of the table's, with what was being done.
    pub(crate) fn of(failure: Failure, context: &Context) -> RdmaError {
        let index = (failure.step as usize).wrapping_sub(1);
        let errno = failure.errno;
        let device = || match &*context.device {
            "" => "any device".to_owned(),
            name => name.to_owned(),
        };
        let Some(step) = Step::ALL.get(index) else {
            let what = "do what libdoppel_verbs.so does not name";
            return RdmaError::Verb { what, errno };
        };
        match step {
            // The kernel has no RDMA at all.
            Step::List if errno == libc::ENOSYS => RdmaError::NoDevice,
            Step::NoDevice => RdmaError::NoDevice,
            Step::UnknownDevice => RdmaError::UnknownDevice {
                name: context.device.clone(),
                have: context.have.clone(),
            },
            Step::NoPort => RdmaError::NoPort {
                device: device(),
                port: match context.port {
                    0 => "of any number".to_owned(),
                    port => port.to_string(),
                },
            },
            Step::NoGid => RdmaError::NoGid { device: device() },
            Step::Register if matches!(errno, libc::ENOMEM | libc::EAGAIN) => {
                let bytes = context.bytes;
                RdmaError::LockedMemory { bytes, errno }
            }
            step @ (Step::CompletionQueue | Step::QueuePair | Step::Domain | Step::Channel)
                if matches!(
                    errno,
                    libc::ENOMEM | libc::EAGAIN | libc::ENOSPC | libc::EMFILE
                ) =>
            {
                let what = what(*step);
                RdmaError::NoRoom { what, errno }
            }
            step if matches!(errno, libc::ENODEV | libc::ENXIO) => {
                let what = what(*step);
                RdmaError::DeviceGone { what, errno }
            }
            Step::Receive
                if matches!(
                    errno,
                    libc::EINVAL
                        | libc::ENETUNREACH
                        | libc::EHOSTUNREACH
                        | libc::EADDRNOTAVAIL
                        | libc::EPROTONOSUPPORT
                ) =>
            {
                RdmaError::NoPath {
                    gid: std::net::Ipv6Addr::from(context.gid).to_string(),
                    mtu: 128_u32.checked_shl(u32::from(context.mtu)).unwrap_or(0),
                    errno,
                }
            }
            step if matches!(errno, libc::EACCES | libc::EPERM) => {
                let what = what(*step);
                RdmaError::Permission { what, errno }
            }
            Step::Receive | Step::Send if errno == libc::ETIMEDOUT => RdmaError::PeerGone {
                what: "looking up its address",
            },
            step => {
                let what = what(*step);
                RdmaError::Verb { what, errno }
            }
        }
    }
}

/// What a failure's message needs to know.
#[derive(Clone, Debug, Default)]
pub(crate) struct Context {
    pub(super) device: String,
    pub(super) have: Vec<String>,
    pub(super) port: u8,
    pub(super) bytes: u64,
    /// The peer's, of a queue pair that is connected.
    pub(super) gid: [u8; 16],
    /// 1 to 5, for 256 to 4096 bytes.
    pub(super) mtu: u8,
}

fn what(step: Step) -> &'static str {
    match step {
        Step::List => "list the RDMA devices",
        Step::NoDevice | Step::UnknownDevice => "find the RDMA device",
        Step::NoPort => "find an active port",
        Step::NoGid => "find a GID",
        Step::Open => "open the RDMA device",
        Step::QueryDevice => "ask the RDMA device what it can do",
        Step::QueryPort => "ask the RDMA port for its state",
        Step::Domain => "make a protection domain",
        Step::Channel => "make a completion channel",
        Step::Register => "register memory with the RDMA device",
        Step::Deregister => "take a memory registration back",
        Step::CompletionQueue => "make a completion queue",
        Step::QueuePair => "make a queue pair",
        Step::Init => "bring a queue pair up (to INIT)",
        Step::Receive => "connect a queue pair (to RTR; do the GIDs and MTUs of both sides fit?)",
        Step::Send => "connect a queue pair (to RTS)",
        Step::Post => "post writes",
        Step::Expect => "post receives",
        Step::Poll => "take completions",
        Step::Arm => "ask to be told of completions",
        Step::Quiet => "take in that completions were told of",
        Step::Destroy => "destroy a queue pair",
    }
}
