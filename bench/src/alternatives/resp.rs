//! A server that speaks the Redis protocol: our guest, `redis-server` and its Sentinel.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::client::{Failed, Line};

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_millis(500);
/// How long an answer may take before the connection is given up: longer than a lost frame costs, and its repetition.
const ANSWER: Duration = Duration::from_secs(5);

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+` or `$`; nothing is a null.
    Text(Option<Vec<u8>>),
    /// `:`
    Number(i64),
    /// `-`
    Error(String),
    /// `*`
    List(Vec<Self>),
}

impl Reply {
    /// As text.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(Some(text)) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Resp {
    stream: BufReader<TcpStream>,
    /// Replicas that must have a write before it counts, by `WAIT`.
    replicas: u32,
    out: Vec<u8>,
}

impl Resp {
    /// Connects; a write counts once so many replicas have it.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(address: SocketAddr, replicas: u32) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, CONNECT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Self {
            stream: BufReader::new(stream),
            replicas,
            out: Vec::new(),
        })
    }

    /// One command and its reply.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn ask(&mut self, words: &[&[u8]]) -> io::Result<Reply> {
        self.put(words);
        self.flush()?;
        self.reply()
    }

    fn put(&mut self, words: &[&[u8]]) {
        self.out
            .extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.out
                .extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            self.out.extend_from_slice(word);
            self.out.extend_from_slice(b"\r\n");
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.get_mut().write_all(&self.out);
        self.out.clear();
        sent
    }

    fn reply(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("no reply: {line:?}"));
        let (kind, rest) = line.split_at_checked(1).ok_or_else(bad)?;
        let number = || rest.parse::<i64>().map_err(|_| bad());
        Ok(match kind {
            "+" => Reply::Text(Some(rest.as_bytes().to_owned())),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Number(number()?),
            "$" => match usize::try_from(number()?) {
                Err(_) => Reply::Text(None),
                Ok(length) => {
                    let mut text = vec![0; length + 2];
                    self.stream.read_exact(&mut text)?;
                    text.truncate(length);
                    Reply::Text(Some(text))
                }
            },
            "*" => {
                let count = usize::try_from(number()?).unwrap_or(0);
                Reply::List(
                    (0..count)
                        .map(|_| self.reply())
                        .collect::<io::Result<_>>()?,
                )
            }
            _ => return Err(bad()),
        })
    }
}

/// What `WAIT` is given, in milliseconds: less than the time after which the connection is given up.
const WAIT_MS: &[u8] = b"2000";

impl Line for Resp {
    fn write(&mut self, key: &str, value: &[u8]) -> Result<(), Failed> {
        self.put(&[b"SET", key.as_bytes(), value]);
        let replicas = self.replicas.to_string();
        if self.replicas > 0 {
            self.put(&[b"WAIT", replicas.as_bytes(), WAIT_MS]);
        }
        self.flush()?;
        let set = self.reply()?;
        let waited = match self.replicas {
            0 => None,
            _ => Some(self.reply()?),
        };
        match (set, waited) {
            (Reply::Text(Some(_)), None) => Ok(()),
            (Reply::Text(Some(_)), Some(Reply::Number(have))) if have >= self.replicas.into() => {
                Ok(())
            }
            (set, waited) => Err(Failed::Refused(format!("{set:?} {waited:?}"))),
        }
    }

    fn read(&mut self, key: &str) -> Result<Option<Vec<u8>>, Failed> {
        match self.ask(&[b"GET", key.as_bytes()])? {
            Reply::Text(value) => Ok(value),
            other => Err(Failed::Refused(format!("{other:?}"))),
        }
    }
}
