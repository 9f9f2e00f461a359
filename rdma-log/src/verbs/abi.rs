//! What the loaded library and this crate say to each other: a table of C functions and the structs they take.
//!
//! The library `doppel_verbs` links libibverbs and exports [`ENTRY`]; it is the only code that knows that library's
//! types. A table made for another version, or of another size, is refused before any function of it is called.
#![forbid(unsafe_code)]

use std::ffi::{CStr, c_void};

/// Version of everything in this file.
pub const ABI: u32 = 1;

/// The exported function, of type [`Entry`].
pub const ENTRY: &CStr = c"doppel_verbs_table";

/// Gives the table, which lives as long as the process.
pub type Entry = unsafe extern "C" fn() -> *const Table;

/// An open device with its protection domain and the descriptor that tells of completions.
pub type Device = c_void;
/// Registered memory.
pub type Memory = c_void;
/// A reliable-connected queue pair with a completion queue of its own.
pub type Queue = c_void;

/// Longest name of a device, with its terminating zero.
pub const NAME: usize = 64;

/// Requests that one [`Table::post`] takes.
pub const BATCH: usize = 64;

/// The functions. Every one of them may be called from any thread; one [`Queue`] or [`Memory`] at a time by one thread.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// [`ABI`].
    pub abi: u32,
    /// `size_of::<Table>()`.
    pub size: u32,
    /// Opens the device that is wished for, or the first with an active port.
    pub open: unsafe extern "C" fn(*const Wish, *mut *mut Device, *mut Port) -> Failure,
    /// Closes it. Nothing else of it may be left.
    pub close: unsafe extern "C" fn(*mut Device),
    /// Registers `len` bytes; with the last argument 1 the peer may write there, with 0 nobody but the device reads.
    pub register: unsafe extern "C" fn(
        *mut Device,
        *mut u8,
        u64,
        u32,
        *mut *mut Memory,
        *mut Keys,
    ) -> Failure,
    /// Takes the registration back. When it has returned without a failure the device touches the memory no more.
    pub deregister: unsafe extern "C" fn(*mut Memory) -> Failure,
    /// Makes a queue pair.
    pub create: unsafe extern "C" fn(*mut Device, *mut Limits, *mut *mut Queue) -> Failure,
    /// Connects it to the peer's.
    pub connect: unsafe extern "C" fn(*mut Queue, *const Path) -> Failure,
    /// Posts up to [`BATCH`] requests with one doorbell.
    pub post: unsafe extern "C" fn(*mut Queue, *const Request, u32) -> Failure,
    /// Posts so many receives without memory, for requests with [`BELL`].
    pub expect: unsafe extern "C" fn(*mut Queue, u32) -> Failure,
    /// Takes up to so many completions; says how many by the last argument.
    pub poll: unsafe extern "C" fn(*mut Queue, *mut Completion, u32, *mut u32) -> Failure,
    /// The next completion makes the device's descriptor readable.
    pub arm: unsafe extern "C" fn(*mut Queue) -> Failure,
    /// The descriptor, which belongs to the device.
    pub descriptor: unsafe extern "C" fn(*mut Device) -> i32,
    /// Takes in what made the descriptor readable, without waiting; says by the last argument how much that was.
    pub quiet: unsafe extern "C" fn(*mut Device, *mut u32) -> Failure,
    /// Destroys a queue pair. When it has returned without a failure nothing comes or goes by it any more.
    pub destroy: unsafe extern "C" fn(*mut Queue) -> Failure,
    /// Writes the names of the devices there are, up to so many; says how many there are by the last argument.
    pub devices: unsafe extern "C" fn(*mut [u8; NAME], u32, *mut u32) -> Failure,
}

/// What failed, and what the system said. All zero: nothing failed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// A [`Step`], or 0.
    pub step: u32,
    /// The error number, or 0.
    pub errno: i32,
}

/// What was being done when something failed.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// List the devices.
    List = 1,
    /// There are none.
    NoDevice,
    /// None of them has the name that is wished for.
    UnknownDevice,
    /// None of the ports is active, or not the one that is wished for.
    NoPort,
    /// The port has no such GID, or none that reaches a peer.
    NoGid,
    /// Open the device.
    Open,
    /// Ask what the device can do.
    QueryDevice,
    /// Ask the port for its state.
    QueryPort,
    /// Make a protection domain.
    Domain,
    /// Make the descriptor that tells of completions.
    Channel,
    /// Register memory.
    Register,
    /// Take a registration back.
    Deregister,
    /// Make a completion queue.
    CompletionQueue,
    /// Make a queue pair.
    QueuePair,
    /// Bring a queue pair up, first step: to INIT.
    Init,
    /// Second step, with the peer's address: to RTR.
    Receive,
    /// Third step: to RTS.
    Send,
    /// Post requests.
    Post,
    /// Post receives.
    Expect,
    /// Take completions.
    Poll,
    /// Ask to be told of completions.
    Arm,
    /// Take in that completions were told of.
    Quiet,
    /// Destroy a queue pair.
    Destroy,
}

impl Step {
    /// All of them, in the order of their numbers.
    pub const ALL: [Step; 23] = [
        Step::List,
        Step::NoDevice,
        Step::UnknownDevice,
        Step::NoPort,
        Step::NoGid,
        Step::Open,
        Step::QueryDevice,
        Step::QueryPort,
        Step::Domain,
        Step::Channel,
        Step::Register,
        Step::Deregister,
        Step::CompletionQueue,
        Step::QueuePair,
        Step::Init,
        Step::Receive,
        Step::Send,
        Step::Post,
        Step::Expect,
        Step::Poll,
        Step::Arm,
        Step::Quiet,
        Step::Destroy,
    ];
}

impl Failure {
    /// Nothing failed.
    pub const NONE: Failure = Failure { step: 0, errno: 0 };

    /// This step failed.
    pub fn of(step: Step, errno: i32) -> Failure {
        let step = step as u32;
        Failure { step, errno }
    }
}

/// Which device, port and GID.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The device's name, terminated by zero; empty for whichever has an active port.
    pub name: [u8; NAME],
    /// The port; 0 for whichever is active.
    pub port: u8,
    /// Bytes that must be zero.
    pub reserved: [u8; 3],
    /// Index of the GID; -1 to look for one.
    pub gid_index: i32,
}

/// The port that was opened.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The device's name, terminated by zero.
    pub name: [u8; NAME],
    /// Its GID.
    pub gid: [u8; 16],
    /// The longest message in bytes.
    pub max_message: u32,
    /// The most requests in a queue.
    pub max_requests: u32,
    /// Index of the GID.
    pub gid_index: u32,
    /// Its LID; 0 on Ethernet.
    pub lid: u16,
    /// Its number.
    pub port: u8,
    /// 1 to 5, for 256 to 4096 bytes.
    pub mtu: u8,
    /// 1 on Ethernet (RoCE), 0 on InfiniBand.
    pub ethernet: u8,
    /// Bytes that must be zero.
    pub reserved: [u8; 3],
}

/// Keys of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// For this side's requests.
    pub local: u32,
    /// For the peer's.
    pub remote: u32,
}

/// How large a queue pair is: what is wished for, then what it became.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may be in flight.
    pub requests: u32,
    /// Receives that may be posted.
    pub receives: u32,
    /// Bytes that go with the request itself. The library tries less when the device refuses.
    pub inline: u32,
    /// The queue pair's number.
    pub number: u32,
}

/// The way to the peer's queue pair.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The peer's GID.
    pub gid: [u8; 16],
    /// Its queue pair's number.
    pub number: u32,
    /// The first packet number that it sends.
    pub psn: u32,
    /// The first packet number that this side sends.
    pub own_psn: u32,
    /// The peer's LID.
    pub lid: u16,
    /// 1 to 5, for 256 to 4096 bytes.
    pub mtu: u8,
    /// A packet that is not answered is sent again after 4.096 µs times two to the power of this.
    pub timeout: u8,
    /// As often as this, at the most.
    pub retries: u8,
    /// Bytes that must be zero.
    pub reserved: [u8; 3],
}

/// A completion for this request.
pub const SIGNALLED: u32 = 1;
/// The bytes are copied when the request is posted.
pub const INLINE: u32 = 2;
/// The peer's completion queue hears of it; the peer must have posted a receive.
pub const BELL: u32 = 4;

/// An RDMA WRITE.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What its completion carries.
    pub id: u64,
    /// Where the bytes are.
    pub local: u64,
    /// Where they go.
    pub remote: u64,
    /// How many.
    pub len: u32,
    /// The local memory's key.
    pub local_key: u32,
    /// The remote memory's key.
    pub remote_key: u32,
    /// [`SIGNALLED`], [`INLINE`], [`BELL`].
    pub flags: u32,
}

/// A completion of a write.
pub const WRITTEN: u32 = 0;
/// A completion of a receive: the peer rang.
pub const RUNG: u32 = 1;

/// A request that is done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The request's.
    pub id: u64,
    /// 0, or how it failed: `ibv_wc_status`.
    pub status: u32,
    /// What the device's maker knows of the failure.
    pub vendor: u32,
    /// [`WRITTEN`] or [`RUNG`]; means nothing if it failed.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<Failure>() == 8);
    assert!(size_of::<Wish>() == NAME + 8 && offset_of!(Wish, gid_index) == NAME + 4);
    assert!(size_of::<Port>() == NAME + 36 && offset_of!(Port, lid) == NAME + 28);
    assert!(size_of::<Limits>() == 16);
    assert!(size_of::<Path>() == 36 && offset_of!(Path, lid) == 28);
    assert!(size_of::<Request>() == 40 && offset_of!(Request, len) == 24);
    assert!(size_of::<Completion>() == 24);
    assert!(size_of::<Table>() == 8 + 14 * size_of::<usize>());
    assert!(Step::ALL.len() == Step::Destroy as usize);
};
