//! Every non-deterministic input a guest can receive, and every output it can make.
//!
//! An [`Input`] is the only way anything the guest could not have computed reaches it. The recorder applies
//! inputs at sync points and logs them there; the replayer applies the same ones at the same points.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::disk;

/// A value on the guest's clock: nanoseconds since the guest started.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct GuestTime(pub u64);

/// One non-deterministic input, applied at a sync point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The clock's value: answers a read of CLOCK, of HALT, or of a device register that shows time.
    Clock(GuestTime),
    /// Random bytes: answer RANDOM (8 bytes) or a request of the entropy device.
    Random(Vec<u8>),
    /// Channel 0 of the 8254 expired this many times since the last tick.
    Tick(u32),
    /// A received Ethernet frame, put into the network device's receive queue. The log carries only its
    /// number and checksum; the bytes were staged ahead.
    Frame(Vec<u8>),
    /// Bytes typed at the console.
    Console(Vec<u8>),
    /// What came of a request to the disk. The log carries a number and a checksum; the bytes were staged ahead.
    Disk(disk::Done),
}

/// An input that the devices cannot go on without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The clock ([`Input::Clock`]).
    Clock,
    /// So many random bytes ([`Input::Random`]).
    Random(usize),
}

/// What the machine does after an access was handed to the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The access is complete; for a read, its data are filled in.
    Done,
    /// A read whose data come from an input, handed to `Devices::answer`.
    Needs(Need),
    /// A read that waits until something happens; then it is answered with the clock.
    Halt,
    /// The guest turned itself off, with this status (0 is well).
    PowerOff(u8),
    /// The guest resets the machine.
    Reset,
    /// The guest can never run again.
    Crash,
}

/// Something the guest sends to the world. It leaves only through the gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame, without the virtio header.
    Frame(Vec<u8>),
    /// Bytes for the console.
    Console(Vec<u8>),
    /// The guest turned itself off.
    PowerOff(u8),
    /// A request to the disk. Where each side has an image of its own it goes to it at once (docs/disks.md).
    Disk(disk::Request),
}
