//! What a client asks the supervisor, and what it hears: one line of JSON each way on the control socket.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::switch::Trouble;

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// How things are.
    Status,
    /// Wait until a host that boots is up.
    AwaitUp {
        /// Its name.
        host: String,
    },
    /// Start a command: once this is granted, frames follow both ways.
    Run {
        /// Where.
        host: String,
    },
    /// Plug this connection into a network: frames follow, each behind its length in four bytes, big-endian.
    Plug {
        /// Which network.
        network: u8,
        /// Not as a card: to be shown what this host sends.
        shown: Option<String>,
    },
    /// A host vanishes.
    Kill {
        /// Its name.
        host: String,
    },
    /// A host that is off boots; answered when it is up.
    Start {
        /// Its name.
        host: String,
    },
    /// A host stands still.
    Freeze {
        /// Its name.
        host: String,
        /// Whether its clock stands still with it.
        clock_too: bool,
    },
    /// A host that stands still goes on.
    Thaw {
        /// Its name.
        host: String,
    },
    /// Something is wrong with a cable, or no more.
    Cable {
        /// Which network; all if not given.
        network: Option<u8>,
        /// The sender.
        from: String,
        /// The receiver.
        to: String,
        /// What.
        trouble: Trouble,
    },
    /// All cables are sound again.
    Heal,
    /// The lab ends; the connection is closed when it has.
    Down,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// It cannot be done, and why.
    Refused(String),
    /// How things are.
    Status(Status),
}

/// How a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// There is no emulator.
    Off,
    /// Its agent has not spoken yet.
    Booting,
    /// It serves.
    Up,
    /// It stands still.
    Frozen {
        /// And so does its clock.
        clock_too: bool,
    },
    /// It ended without being asked to.
    Lost(String),
}

impl fmt::Display for Power {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => out.write_str("off"),
            Self::Booting => out.write_str("booting"),
            Self::Up => out.write_str("up"),
            Self::Frozen { clock_too: false } => out.write_str("frozen"),
            Self::Frozen { clock_too: true } => out.write_str("frozen with its clock"),
            Self::Lost(why) => write!(out, "lost ({why})"),
        }
    }
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// Its name.
    pub name: String,
    /// How it is.
    pub power: Power,
    /// The process id of its emulator.
    pub process: Option<u32>,
    /// How often it came up.
    pub boots: u32,
}

/// A cable with which something is wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CableState {
    /// Of which network.
    pub network: u8,
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// What is wrong.
    pub trouble: Trouble,
}

/// A lab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The supervisor's process id.
    pub supervisor: u32,
    /// Its hosts.
    pub hosts: Vec<HostState>,
    /// What is wrong with cables.
    pub cables: Vec<CableState>,
    /// Frames that were delivered.
    pub frames_passed: u64,
    /// Frames that were cut or lost as ordered.
    pub frames_dropped: u64,
    /// Frames that were lost because their receiver was slow, or frozen.
    pub frames_overflowed: u64,
}
