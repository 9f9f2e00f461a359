//! Reading back everything that was promised.

use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use super::model::{KEYS, Keys, Wrong, brief};
use super::resp::{self, Reply};
use super::worker::Line;
use super::{Outcome, PROBLEMS_KEPT};
use crate::backends::wait::Moment;

/// What reading everything back has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Keys read back.
    pub keys: u64,
    /// Of these, how many held something that no right server could.
    pub wrong_keys: u64,
    /// Keys that could not be read. Their acknowledged writes count as lost.
    pub unreadable_keys: u64,
    /// Acknowledged writes that are missing or changed, those found while running included.
    pub lost_acknowledged_writes: u64,
    /// Connections that broke in the whole run and while reading back.
    pub broken_connections: u64,
    /// The first problems in words, those of the run first.
    pub problems: Vec<String>,
}

/// A connection for reading back.
struct Reader {
    stream: TcpStream,
    deadline: Moment,
    input: Vec<u8>,
    filled: usize,
}

impl Outcome {
    /// Reads back every key: over the connection that wrote it if that survived, otherwise over another that did,
    /// otherwise over a new one to `address` (from the calling thread's network namespace). Takes at most
    /// about `within`; what was not read by then is unreadable.
    pub fn verify_all(&mut self, address: SocketAddrV4, within: Duration) -> Verification {
        let deadline = Moment::now().plus(within);
        let mut found = Verification {
            lost_acknowledged_writes: self.lost_while_running,
            broken_connections: self.broken_connections,
            problems: self.problems.clone(),
            ..Verification::default()
        };
        // Last come those without a connection, for which a survivor stands in.
        self.lines.sort_by_key(|line| line.stream.is_none());
        let mut stand_in = None;
        for line in &mut self.lines {
            let own = line.stream.take();
            let mut reader = own
                .and_then(|stream| Reader::new(stream, deadline).ok())
                .or_else(|| stand_in.take());
            found.read_line(line, &mut reader, address, deadline);
            stand_in = reader.or(stand_in);
        }
        found
    }
}

impl Verification {
    /// Reads back one connection's keys; leaves in `reader` a connection that still works, if there is one.
    fn read_line(
        &mut self,
        line: &Line,
        reader: &mut Option<Reader>,
        address: SocketAddrV4,
        deadline: Moment,
    ) {
        let mut next = 0;
        if let Some(open) = reader {
            let outcome = open.read_keys(&line.keys, &mut next, &mut |key, value| {
                self.take(line, key, value);
            });
            let Err(error) = outcome else { return };
            self.broken_connections += 1;
            self.note(format!("a connection broke while reading back: {error}"));
            *reader = None;
        }
        let outcome = TcpStream::connect_timeout(&address.into(), left(deadline))
            .and_then(|stream| Reader::new(stream, deadline))
            .and_then(|mut new| {
                new.read_keys(&line.keys, &mut next, &mut |key, value| {
                    self.take(line, key, value);
                })?;
                Ok(new)
            });
        match outcome {
            Ok(new) => *reader = Some(new),
            Err(error) => {
                self.note(format!("keys cannot be read back: {error}"));
                self.give_up(line, next);
            }
        }
    }

    /// The keys from `next` on cannot be read: what they should hold is lost.
    fn give_up(&mut self, line: &Line, next: usize) {
        for key in next..KEYS {
            self.unreadable_keys += 1;
            let allowed = line.keys.allowed(key, std::iter::empty());
            if let Some(wrong) = line.keys.compare(key, &allowed, None) {
                self.lost_acknowledged_writes += wrong.lost;
            }
        }
    }

    fn take(&mut self, line: &Line, key: usize, value: Option<&[u8]>) {
        self.keys += 1;
        let outstanding = line.waiting.iter().map(|(operation, _)| *operation);
        let allowed = line.keys.allowed(key, outstanding);
        if let Some(Wrong { lost, words }) = line.keys.compare(key, &allowed, value) {
            self.wrong_keys += 1;
            self.lost_acknowledged_writes += lost;
            self.note(words);
        }
    }

    fn note(&mut self, words: String) {
        if self.problems.len() < PROBLEMS_KEPT {
            self.problems.push(words);
        }
    }
}

fn left(deadline: Moment) -> Duration {
    // Zero would mean "for ever" to a socket.
    deadline.since(Moment::now()).max(Duration::from_millis(1))
}

impl Reader {
    fn new(stream: TcpStream, deadline: Moment) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            deadline,
            input: vec![0; 64 << 10],
            filled: 0,
        })
    }

    /// Reads the keys from `next` on, which moves on with each that was read.
    fn read_keys(
        &mut self,
        keys: &Keys,
        next: &mut usize,
        take: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let mut request = Vec::new();
        while *next < KEYS {
            request.clear();
            resp::command(&mut request, &[b"GET", keys.name(*next).as_bytes()]);
            self.stream.set_write_timeout(Some(left(self.deadline)))?;
            self.stream.write_all(&request)?;
            self.read_value(*next, take)?;
            *next += 1;
        }
        Ok(())
    }

    fn read_value(
        &mut self,
        key: usize,
        take: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        let invalid = |words: String| io::Error::new(io::ErrorKind::InvalidData, words);
        loop {
            let reply =
                resp::parse(&self.input[..self.filled]).map_err(|bad| invalid(bad.to_string()))?;
            if let Some((reply, used)) = reply {
                match reply {
                    Reply::Null => take(key, None),
                    // An error stands where the value should be, and compares as one that is wrong.
                    Reply::Bulk(value) | Reply::Error(value) => take(key, Some(value)),
                    Reply::Status(_) | Reply::Integer(_) => {
                        return Err(invalid(format!("GET was answered {}", brief(reply))));
                    }
                }
                self.input.copy_within(used..self.filled, 0);
                self.filled -= used;
                return Ok(());
            }
            if self.filled == self.input.len() {
                self.input.resize(self.filled * 2, 0);
            }
            self.stream.set_read_timeout(Some(left(self.deadline)))?;
            match self.stream.read(&mut self.input[self.filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.filled += count,
            }
        }
    }
}
