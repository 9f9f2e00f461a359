//! What client, supervisor and agent say to each other: frames on numbered channels over one byte stream.
//!
//! ```text
//!  client ──Unix socket──▶ supervisor ──virtio-serial──▶ agent in the host ──▶ the command
//! ```
//! A channel is one command. Its data is bounded end to end: whoever sends bytes has at most [`WINDOW`] of them on the way
//! that the receiver has not [credited](Kind::Credit), so a command whose output nobody reads waits and stops no other.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::sync::{Condvar, Mutex, PoisonError};

use rdma_log::locks::lock;

/// The most bytes in one frame. A header that says more is refused: the stream is out of step.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// The most bytes of data of one channel and direction that may be on the way.
pub const WINDOW: usize = 256 * 1024;

/// The channel on which the agent speaks for itself.
pub const AGENT: u32 = 0;

/// Bytes of a header: channel, kind, length.
const HEADER: usize = 9;

/// What a frame means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the agent: start the command described in JSON ([`Start`]).
    Start = 1,
    /// To the agent: bytes of its standard input; an empty frame ends it.
    Input = 2,
    /// To the agent: end it and what it started in its process group.
    Kill = 3,
    /// Either way: so many more bytes may be sent (four bytes, little-endian).
    Credit = 4,
    /// From the agent: bytes of standard output.
    Output = 5,
    /// From the agent: bytes of standard error.
    Error = 6,
    /// From the agent: it ended, with this code (four bytes, little-endian); 128 + N for signal N.
    Ended = 7,
    /// From the agent: it could not be started, and why. From the supervisor: the host is gone, and why.
    Failed = 8,
    /// From the agent on [`AGENT`]: the host is up.
    Ready = 9,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Start,
            2 => Self::Input,
            3 => Self::Kill,
            4 => Self::Credit,
            5 => Self::Output,
            6 => Self::Error,
            7 => Self::Ended,
            8 => Self::Failed,
            9 => Self::Ready,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which command.
    pub channel: u32,
    /// What about it.
    pub kind: Kind,
    /// The rest.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame with these bytes.
    #[must_use]
    pub fn new(channel: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            channel,
            kind,
            payload: payload.into(),
        }
    }

    /// A frame that carries a number.
    #[must_use]
    pub fn number(channel: u32, kind: Kind, number: i32) -> Self {
        Self::new(channel, kind, number.to_le_bytes())
    }

    /// The number that it carries.
    ///
    /// # Errors
    /// If it carries something else.
    pub fn as_number(&self) -> io::Result<i32> {
        let bytes: [u8; 4] = self
            .payload
            .as_slice()
            .try_into()
            .map_err(|_| broken(format!("{:?} has no number", self.kind)))?;
        Ok(i32::from_le_bytes(bytes))
    }

    /// What it carries, as words for people.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// Writes it, in one call: frames of several threads do not mix.
    ///
    /// # Errors
    /// What the stream says.
    pub fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        assert!(self.payload.len() <= MAX_PAYLOAD, "a frame is bounded");
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend(self.channel.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        bytes.extend(&self.payload);
        stream.write_all(&bytes)
    }

    /// Reads one; `None` at the end of the stream.
    ///
    /// # Errors
    /// What the stream says, or that what it holds is no frame.
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        let mut have = 0;
        while have < HEADER {
            match stream.read(&mut header[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => have += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let [c0, c1, c2, c3, kind, l0, l1, l2, l3] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let kind = Kind::from_byte(kind)
            .ok_or_else(|| broken(format!("a frame of the unknown kind {kind}")))?;
        if length > MAX_PAYLOAD {
            return Err(broken(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        Ok(Some(Self {
            channel: u32::from_le_bytes([c0, c1, c2, c3]),
            kind,
            payload,
        }))
    }
}

fn broken(what: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what}: the stream is out of step"),
    )
}

/// How many bytes of a channel's data may still be sent in one direction.
#[derive(Debug)]
pub struct Credit {
    left: Mutex<usize>,
    more: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            left: Mutex::new(WINDOW),
            more: Condvar::new(),
        }
    }
}

impl Credit {
    /// Takes up to `wanted`, and waits while there is none.
    pub fn take(&self, wanted: usize) -> usize {
        let left = lock(&self.left);
        let mut left = self
            .more
            .wait_while(left, |left| *left == 0)
            .unwrap_or_else(PoisonError::into_inner);
        let taken = wanted.min(*left);
        *left -= taken;
        taken
    }

    /// The receiver has taken so many.
    pub fn give(&self, bytes: usize) {
        let mut left = lock(&self.left);
        *left = left.saturating_add(bytes);
        self.more.notify_all();
    }

    /// Nobody needs to wait any more: what is sent has no reader.
    pub fn lift(&self) {
        self.give(usize::MAX);
    }
}

/// A command to start.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Start {
    /// The program and its words.
    pub command: Vec<String>,
    /// Variables besides the host's own.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Where its output goes instead of to the client, who then hears its process id on standard output and goes.
    #[serde(default)]
    pub detached_to: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        let mut stream = Vec::new();
        let first = Frame::new(7, Kind::Output, vec![3; MAX_PAYLOAD]);
        let second = Frame::number(8, Kind::Ended, -3);
        first.write(&mut stream).expect("write");
        second.write(&mut stream).expect("write");
        let mut stream = stream.as_slice();
        assert_eq!(Frame::read(&mut stream).expect("read"), Some(first));
        let back = Frame::read(&mut stream).expect("read").expect("a frame");
        assert_eq!(back.as_number().expect("a number"), -3);
        assert_eq!(Frame::read(&mut stream).expect("read"), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut stream = Vec::new();
        Frame::new(1, Kind::Start, b"x".to_vec())
            .write(&mut stream)
            .expect("write");
        for (at, byte) in [(4, 0), (4, 200), (8, 1)] {
            let mut bad = stream.clone();
            bad[at] = byte;
            assert!(Frame::read(&mut bad.as_slice()).is_err(), "byte {at}");
        }
        assert!(
            Frame::read(&mut &stream[..stream.len() - 1]).is_err(),
            "a torn frame"
        );
        assert!(
            Frame::new(1, Kind::Ended, b"12345".to_vec())
                .as_number()
                .is_err()
        );
    }
}
