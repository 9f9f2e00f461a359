//! What goes over a control socket: one JSON object a line, each way, of bounded length.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::status::Status;

/// The version that this program speaks.
pub const VERSION: u32 = 1;

/// The longest request, its newline included.
pub const REQUEST_MAX: usize = 4096;

/// The longest answer that a client takes: many times what a role has to say.
pub const ANSWER_MAX: usize = 1 << 20;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The version.
    pub doppel: u32,
    /// What is asked.
    pub ask: Ask,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// How the role is.
    Status,
    /// That the backup gets the machine.
    Switch,
    /// That another backup, at this address or wherever one listens, takes the place of the one that there is.
    MigrateBackup(Option<SocketAddr>),
    /// That the machine is turned off.
    PowerOff,
    /// That the machine starts anew.
    Reset,
    /// That the guest has so many 1024ths of its time.
    Share(u16),
    /// The guest's console. Behind the answer's line come the bytes that it lets out, as they are, and what the other side sends is typed.
    Console {
        /// The first byte that is wanted, counted from the guest's first; none: the last screen of what is kept.
        from: Option<u64>,
    },
    /// That a backup may listen there, too, from now on.
    Standby(SocketAddr),
    /// That the process leaves its primary. For a backup alone: one that has become the primary meanwhile does not obey.
    Leave,
    /// That the process ends as one that failed, so that its backup takes the machine over: one that serves, and has a backup which is well.
    Fail,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The version.
    pub doppel: u32,
    /// The rest.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// How the role is.
    Status(Box<Status>),
    /// It is ordered, by this number: what comes of it is told by the status.
    Ordered(u64),
    /// The console's bytes follow, from this one on.
    Console(u64),
    /// Why it is not answered.
    Error(String),
}

impl Request {
    /// A line.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        line(self)
    }

    /// Reads a line.
    ///
    /// # Errors
    /// What to answer instead.
    pub fn decode(line: &[u8]) -> Result<Self, String> {
        /// Any version's.
        #[derive(Deserialize)]
        struct Versioned {
            doppel: u32,
        }
        let malformed =
            |error: serde_json::Error| format!("this is no request: {error}; one is {EXAMPLE}");
        let Versioned { doppel } = serde_json::from_slice(line).map_err(malformed)?;
        if doppel != VERSION {
            return Err(format!(
                "this process speaks version {VERSION} of the control protocol, not {doppel}: use its own doppel program"
            ));
        }
        serde_json::from_slice(line).map_err(malformed)
    }
}

const EXAMPLE: &str = "{\"doppel\":1,\"ask\":\"status\"}";

impl Ask {
    /// Whether it changes something.
    #[must_use]
    pub fn is_order(self) -> bool {
        !matches!(self, Self::Status | Self::Console { .. })
    }
}

impl Answer {
    /// An answer of this version.
    #[must_use]
    pub fn new(outcome: Outcome) -> Self {
        Self {
            doppel: VERSION,
            outcome,
        }
    }

    /// A line.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        line(self)
    }
}

fn line(of: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(of).expect("plain fields always encode");
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_survives_the_wire() {
        let request = Request {
            doppel: VERSION,
            ask: Ask::Status,
        };
        let bytes = request.encode();
        assert_eq!(bytes, format!("{EXAMPLE}\n").as_bytes());
        assert_eq!(Request::decode(&bytes).unwrap(), request);
    }

    #[test]
    fn orders_survive_the_wire() {
        let place = "[2001:db8::7]:7700".parse().unwrap();
        for ask in [
            Ask::Switch,
            Ask::MigrateBackup(None),
            Ask::MigrateBackup(Some(place)),
            Ask::PowerOff,
            Ask::Reset,
            Ask::Share(512),
            Ask::Standby(place),
            Ask::Leave,
            Ask::Fail,
        ] {
            let request = Request {
                doppel: VERSION,
                ask,
            };
            assert_eq!(Request::decode(&request.encode()).unwrap(), request);
            assert!(ask.is_order());
        }
        assert!(!Ask::Status.is_order());
    }

    #[test]
    fn a_console_is_asked_for_from_a_byte_on() {
        for from in [None, Some(7)] {
            let ask = Ask::Console { from };
            let request = Request {
                doppel: VERSION,
                ask,
            };
            assert_eq!(Request::decode(&request.encode()).unwrap(), request);
            assert!(!ask.is_order());
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_what_one_is() {
        for bad in [
            "",
            "status",
            "[]",
            "{\"ask\":\"status\"}",
            "{\"doppel\":1}",
            "{\"doppel\":1,\"ask\":\"reboot\"}",
            "{\"doppel\":1,\"ask\":\"status\",\"more\":1}",
        ] {
            let why = Request::decode(bad.as_bytes()).unwrap_err();
            assert!(why.contains(EXAMPLE), "{bad}: {why}");
        }
        let why = Request::decode(b"{\"doppel\":2,\"ask\":\"everything\"}").unwrap_err();
        assert!(why.contains("version 1"), "{why}");
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(&bytes);
        }
    }
}
