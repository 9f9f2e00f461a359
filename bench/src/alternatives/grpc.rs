//! etcd's own protocol, as much of it as a put and a get need: gRPC over HTTP/2 in clear (RFC 9113), one request at a time.
//!
//! No header that the server sends is read: a call of one answer has failed if its stream ended without a message.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::client::{Failed, Line};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_millis(500);
/// A call's deadline. A put that a dying leader swallowed gets no answer for seven seconds; a client that sets no deadline waits for it.
const ANSWER: Duration = Duration::from_secs(2);
/// The largest frame that may come without our having asked for larger ones.
const FRAME: usize = 1 << 14;
/// What the server takes before it has said anything.
const WINDOW: i64 = 65_535;

/// Kinds of frames that mean something to us.
mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RESET: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GO_AWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
}

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// A connection to one member.
#[derive(Debug)]
pub struct Grpc {
    stream: BufReader<TcpStream>,
    next: u32,
    /// Bytes that the server takes on this connection.
    window: i64,
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// A header without compression or index: HPACK's literals (RFC 7541, section 6.2.2); all of ours are shorter than 127 bytes.
fn literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.push(value.len() as u8);
    out.extend_from_slice(value);
}

/// A field of a protobuf message that is bytes.
fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    let mut length = bytes.len();
    while length > 0x7f {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
}

/// Reads a varint.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The first field of this number that is bytes.
fn find(mut message: &[u8], wanted: u64) -> Option<&[u8]> {
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        match tag & 7 {
            0 => drop(varint(&mut message)?),
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                let (bytes, rest) = message.split_at_checked(length)?;
                message = rest;
                if tag >> 3 == wanted {
                    return Some(bytes);
                }
            }
            _ => return None,
        }
    }
    None
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Grpc {
    /// Connects.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let mut stream = TcpStream::connect_timeout(&address, CONNECT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut out = PREFACE.to_vec();
        frame(&mut out, kind::SETTINGS, 0, 0, &[]);
        stream.write_all(&out)?;
        Ok(Self {
            stream: BufReader::new(stream),
            next: 1,
            window: WINDOW,
        })
    }

    fn receive(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        if length > FRAME {
            return Err(bad("a frame that is too large"));
        }
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload)?;
        Ok(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff,
            payload,
        })
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(9 + payload.len());
        frame(&mut out, kind, flags, stream, payload);
        self.stream.get_mut().write_all(&out)
    }

    /// Does what every frame asks for that is no call's.
    fn housekeeping(&mut self, frame: &Frame) -> io::Result<()> {
        match (frame.kind, frame.flags & ACK) {
            (kind::SETTINGS, 0) => self.send(kind::SETTINGS, ACK, 0, &[]),
            (kind::PING, 0) => self.send(kind::PING, ACK, 0, &frame.payload),
            (kind::GO_AWAY, _) => Err(bad("the server goes away")),
            (kind::WINDOW_UPDATE, _) if frame.stream == 0 => {
                let more = frame.payload[..].try_into().map_err(|_| bad("no window"))?;
                self.window += i64::from(u32::from_be_bytes(more));
                Ok(())
            }
            (kind::DATA, _) if !frame.payload.is_empty() => {
                let read = (frame.payload.len() as u32).to_be_bytes();
                self.send(kind::WINDOW_UPDATE, 0, 0, &read)
            }
            _ => Ok(()),
        }
    }

    /// One call: its answer.
    fn call(&mut self, path: &str, message: &[u8]) -> Result<Vec<u8>, Failed> {
        let stream = self.next;
        self.next += 2;
        // :method POST, :scheme http, :path, :authority, content-type, te
        let mut headers = vec![0x83, 0x86];
        literal(&mut headers, &[0x04], path.as_bytes());
        literal(&mut headers, &[0x01], b"etcd");
        literal(&mut headers, &[0x0f, 0x10], b"application/grpc");
        literal(&mut headers, b"\x00\x02te", b"trailers");
        let mut body = vec![0];
        body.extend_from_slice(&(message.len() as u32).to_be_bytes());
        body.extend_from_slice(message);
        while self.window < body.len() as i64 {
            let frame = self.receive()?;
            self.housekeeping(&frame)?;
        }
        self.window -= body.len() as i64;
        let mut out = Vec::new();
        frame(&mut out, kind::HEADERS, END_HEADERS, stream, &headers);
        frame(&mut out, kind::DATA, END_STREAM, stream, &body);
        self.stream.get_mut().write_all(&out)?;
        self.answer(stream)
    }

    fn answer(&mut self, stream: u32) -> Result<Vec<u8>, Failed> {
        let mut answer = Vec::new();
        loop {
            let frame = match self.receive() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Failed::Refused(format!("no answer within {ANSWER:?}")));
                }
                other => other?,
            };
            self.housekeeping(&frame)?;
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                kind::RESET => return Err(Failed::Refused("the call was reset".into())),
                kind::DATA if frame.flags & PADDED != 0 => return Err(bad("padding").into()),
                kind::DATA => answer.extend_from_slice(&frame.payload),
                _ => {}
            }
            if matches!(frame.kind, kind::DATA | kind::HEADERS) && frame.flags & END_STREAM != 0 {
                // Whether it is compressed, which we have not offered, and its length come first.
                return match answer.split_at_checked(5) {
                    Some((_, message)) => Ok(message.to_owned()),
                    None => Err(Failed::Refused("the call failed".into())),
                };
            }
        }
    }
}

impl Line for Grpc {
    fn write(&mut self, key: &str, value: &[u8]) -> Result<(), Failed> {
        let mut put = Vec::with_capacity(key.len() + value.len() + 8);
        field(&mut put, 1, key.as_bytes());
        field(&mut put, 2, value);
        self.call("/etcdserverpb.KV/Put", &put).map(drop)
    }

    fn read(&mut self, key: &str) -> Result<Option<Vec<u8>>, Failed> {
        let mut range = Vec::new();
        field(&mut range, 1, key.as_bytes());
        let answer = self.call("/etcdserverpb.KV/Range", &range)?;
        // A response's second field has keys with their values, a key's fifth is its value.
        Ok(find(&answer, 2).map(|found| find(found, 5).unwrap_or_default().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_again() {
        let mut inner = Vec::new();
        field(&mut inner, 1, b"key");
        // A number between: field 4, value 300.
        inner.extend_from_slice(&[4 << 3, 0xac, 0x02]);
        field(&mut inner, 5, &[7; 300]);
        let mut outer = Vec::new();
        field(&mut outer, 1, b"header");
        field(&mut outer, 2, &inner);
        assert_eq!(
            find(&outer, 2).and_then(|inner| find(inner, 5)),
            Some(&[7_u8; 300][..])
        );
        assert_eq!(find(&outer, 3), None);
        assert_eq!(find(&outer[..outer.len() - 1], 2), None);
    }
}
