//! As much of HTTP/1.1 as one JSON request needs: one POST with a body, one answer with a length or in chunks. Over plain TCP, or sealed
//! by TLS (`tls.rs`).
//!
//! Every step counts against one deadline, so that an answer that drips in does not take for ever, and nothing is believed
//! beyond a bound. A failure says whether anything of the request may have arrived.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::tls::{Credentials, Sealed};

/// An answer's head is never longer; etcd's are a few hundred bytes.
const HEAD_MAX: usize = 16 << 10;

/// What the bytes go over.
#[derive(Debug)]
enum Carrier {
    Plain(TcpStream),
    Sealed(Sealed),
}

/// Where a member is called.
#[derive(Clone, Copy, Debug)]
pub(super) struct Callee<'a> {
    pub(super) address: SocketAddr,
    /// The name or address in its certificate.
    pub(super) host: &'a str,
    /// As it stands in a request.
    pub(super) endpoint: &'a str,
    pub(super) credentials: Option<&'a Credentials>,
}

/// A connection, which outlives a request if the server lets it.
#[derive(Debug)]
pub(super) struct Connection {
    carrier: Carrier,
    host: String,
    /// The longest body that is read, in bytes.
    longest: usize,
    /// Bytes that came after the last answer: none, or the server does not speak HTTP as we do.
    left: Vec<u8>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// The connection may be used again.
    pub(super) keep: bool,
}

/// A failure.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    /// The connection.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ended in the middle of an answer, or before it.
    #[error("the connection ended before the answer did")]
    Ended,
    /// It was closed without a word.
    #[error(
        "it closed the connection without an answer (if this etcd serves TLS, its place is etcds://HOST:PORT?ca=FILE)"
    )]
    Silent,
    /// TLS, before any request was sent over it.
    #[error("{0}")]
    Tls(String),
    /// TLS: the server does not take whoever calls, and has read no request.
    #[error("{0}")]
    Refused(String),
    /// The time is over.
    #[error("no answer within {} ms", .0.as_millis())]
    TooLate(Duration),
    /// Not HTTP as etcd speaks it.
    #[error("it does not answer as etcd does: {0}")]
    Junk(&'static str),
}

/// When an exchange must be over, and how long it had.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Instant,
    span: Duration,
}

impl Deadline {
    pub(super) fn after(span: Duration) -> Self {
        Self {
            at: Instant::now() + span,
            span,
        }
    }

    pub(super) fn left(self) -> Result<Duration, HttpError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HttpError::TooLate(self.span));
        }
        Ok(left)
    }

    /// A time limit of a socket's shows as one of two errors.
    pub(super) fn named(self, error: io::Error) -> HttpError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => HttpError::TooLate(self.span),
            _ => HttpError::Io(error),
        }
    }
}

impl Connection {
    pub(super) fn open(
        to: Callee<'_>,
        longest: usize,
        deadline: Deadline,
    ) -> Result<Self, HttpError> {
        let stream = TcpStream::connect_timeout(&to.address, deadline.left()?)
            .map_err(|error| deadline.named(error))?;
        stream.set_nodelay(true)?;
        let carrier = match to.credentials {
            None => Carrier::Plain(stream),
            Some(own) => Carrier::Sealed(Sealed::open(stream, own, to.host, deadline)?),
        };
        Ok(Self {
            carrier,
            host: to.endpoint.to_owned(),
            longest,
            left: Vec::new(),
        })
    }

    /// Sends one request. An error here means that it did not leave as a whole, though a part of it may have.
    pub(super) fn send(
        &mut self,
        path: &str,
        token: Option<&str>,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<(), HttpError> {
        let authorization = token.map(|token| format!("Authorization: {token}\r\n"));
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nAccept: application/json\r\n\
             {}Content-Length: {}\r\n\r\n",
            self.host,
            authorization.unwrap_or_default(),
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        let mut rest = &request[..];
        while !rest.is_empty() {
            match self.write(rest, deadline)? {
                0 => return Err(HttpError::Ended),
                length => rest = &rest[length..],
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], deadline: Deadline) -> Result<usize, HttpError> {
        let stream = match &mut self.carrier {
            Carrier::Plain(stream) => stream,
            Carrier::Sealed(sealed) => return sealed.write(bytes, deadline),
        };
        loop {
            stream.set_write_timeout(Some(deadline.left()?))?;
            match stream.write(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other.map_err(|error| deadline.named(error)),
            }
        }
    }

    fn read(&mut self, to: &mut [u8], deadline: Deadline) -> Result<usize, HttpError> {
        let stream = match &mut self.carrier {
            Carrier::Plain(stream) => stream,
            Carrier::Sealed(sealed) => return sealed.read(to, deadline),
        };
        loop {
            stream.set_read_timeout(Some(deadline.left()?))?;
            match stream.read(to) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other.map_err(|error| deadline.named(error)),
            }
        }
    }

    /// Reads the answer.
    pub(super) fn receive(&mut self, deadline: Deadline) -> Result<Answer, HttpError> {
        let mut bytes = std::mem::take(&mut self.left);
        if !bytes.is_empty() {
            return Err(HttpError::Junk("it spoke before it was asked"));
        }
        let head_end = loop {
            if let Some(at) = find(&bytes, b"\r\n\r\n") {
                break at + 4;
            }
            if bytes.len() > HEAD_MAX {
                return Err(HttpError::Junk("a head without an end"));
            }
            if let Err(error) = self.more(&mut bytes, deadline) {
                return Err(self.ended(error, &bytes));
            }
        };
        let head = Head::parse(&bytes[..head_end], self.longest)?;
        let mut rest = bytes.split_off(head_end);
        let (body, used) = match head.length {
            Length::Exactly(length) => {
                while rest.len() < length {
                    self.more(&mut rest, deadline)?;
                }
                (rest[..length].to_vec(), length)
            }
            Length::Chunked => loop {
                if let Some(done) = chunks(&rest, self.longest)? {
                    break done;
                }
                if rest.len() > 2 * self.longest {
                    return Err(HttpError::Junk("a body that is too long"));
                }
                self.more(&mut rest, deadline)?;
            },
        };
        self.left = rest.split_off(used);
        Ok(Answer {
            status: head.status,
            body,
            keep: head.keep && self.left.is_empty(),
        })
    }

    fn more(&mut self, bytes: &mut Vec<u8>, deadline: Deadline) -> Result<(), HttpError> {
        let mut buffer = [0; 4096];
        let length = self.read(&mut buffer, deadline)?;
        bytes.extend_from_slice(&buffer[..length]);
        match length {
            0 => Err(HttpError::Ended),
            _ => Ok(()),
        }
    }

    /// What it means that a connection ended, with this much of an answer.
    fn ended(&self, error: HttpError, bytes: &[u8]) -> HttpError {
        match (error, &self.carrier) {
            // A server of TLS closes so on who speaks in clear.
            (HttpError::Ended, Carrier::Plain(_)) if bytes.is_empty() => HttpError::Silent,
            (HttpError::Io(error), Carrier::Plain(_))
                if bytes.is_empty() && error.kind() == ErrorKind::ConnectionReset =>
            {
                HttpError::Silent
            }
            (error, _) => error,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Length {
    Exactly(usize),
    Chunked,
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    length: Length,
    keep: bool,
}

impl Head {
    fn parse(bytes: &[u8], longest: usize) -> Result<Self, HttpError> {
        let text =
            std::str::from_utf8(bytes).map_err(|_| HttpError::Junk("a head that is no text"))?;
        let mut lines = text.split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status = first
            .strip_prefix("HTTP/1.1 ")
            .or_else(|| first.strip_prefix("HTTP/1.0 "))
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or(HttpError::Junk("its first line is not HTTP/1.1's"))?;
        let mut keep = first.starts_with("HTTP/1.1");
        let (mut length, mut chunked) = (None, false);
        for line in lines.filter(|line| !line.is_empty()) {
            let (name, value) = line
                .split_once(':')
                .ok_or(HttpError::Junk("a header line without a colon"))?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                let found: usize = value
                    .parse()
                    .map_err(|_| HttpError::Junk("a length that is no number"))?;
                if length.is_some_and(|before| before != found) {
                    return Err(HttpError::Junk("two lengths"));
                }
                if found > longest {
                    return Err(HttpError::Junk("a body that is too long"));
                }
                length = Some(found);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if !value.eq_ignore_ascii_case("chunked") {
                    return Err(HttpError::Junk("an encoding other than chunked"));
                }
                chunked = true;
            } else if name.eq_ignore_ascii_case("connection") {
                keep &= !value.eq_ignore_ascii_case("close");
            }
        }
        let length = match (length, chunked) {
            (_, true) => Length::Chunked,
            (Some(length), false) => Length::Exactly(length),
            (None, false) => return Err(HttpError::Junk("an answer without a length")),
        };
        Ok(Self {
            status,
            length,
            keep,
        })
    }
}

/// The body of whole chunks and the bytes that they took; `None` if more must come.
fn chunks(bytes: &[u8], longest: usize) -> Result<Option<(Vec<u8>, usize)>, HttpError> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(line) = find(&bytes[at..], b"\r\n") else {
            if bytes.len() - at > 64 {
                return Err(HttpError::Junk("a chunk without a length"));
            }
            return Ok(None);
        };
        let text = std::str::from_utf8(&bytes[at..at + line]).unwrap_or_default();
        let digits = text.split(';').next().unwrap_or_default().trim();
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let length = match usize::from_str_radix(digits, 16) {
            Ok(length) if plain && length <= longest - body.len() => length,
            _ => {
                return Err(HttpError::Junk(
                    "a chunk's length that is none, or too much",
                ));
            }
        };
        let start = at + line + 2;
        if length == 0 {
            return after_trailers(&bytes[start..])
                .map(|after| after.map(|after| (body, start + after)));
        }
        let end = start + length;
        if bytes.len() < end + 2 {
            return Ok(None);
        }
        if &bytes[end..end + 2] != b"\r\n" {
            return Err(HttpError::Junk("a chunk that does not end where it says"));
        }
        body.extend_from_slice(&bytes[start..end]);
        at = end + 2;
    }
}

/// How many bytes the trailers take behind the last chunk, their closing empty line included: etcd's answers have some where they are errors.
/// None if more must come.
fn after_trailers(bytes: &[u8]) -> Result<Option<usize>, HttpError> {
    if bytes.starts_with(b"\r\n") {
        return Ok(Some(2));
    }
    match find(bytes, b"\r\n\r\n") {
        Some(at) => Ok(Some(at + 4)),
        None if bytes.len() > HEAD_MAX => Err(HttpError::Junk("trailers without an end")),
        None => Ok(None),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn answer_to(script: Vec<Vec<u8>>, pause: Duration) -> Result<Answer, HttpError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap();
            for piece in script {
                if stream.write_all(&piece).is_err() {
                    break;
                }
                std::thread::sleep(pause);
            }
            request[..length].to_vec()
        });
        let deadline = Deadline::after(Duration::from_millis(300));
        let to = Callee {
            address,
            host: "etcd",
            endpoint: "etcd:2379",
            credentials: None,
        };
        let mut connection = Connection::open(to, 64 << 10, deadline).unwrap();
        let sent = connection.send("/v3/kv/range", None, b"{}", deadline);
        sent.unwrap();
        let answer = connection.receive(deadline);
        drop(connection);
        let request = server.join().unwrap();
        assert!(
            request.starts_with(b"POST /v3/kv/range HTTP/1.1\r\nHost: etcd:2379\r\n")
                && request.ends_with(b"\r\nContent-Length: 2\r\n\r\n{}"),
            "{}",
            String::from_utf8_lossy(&request)
        );
        answer
    }

    fn whole(text: &str) -> Result<Answer, HttpError> {
        answer_to(vec![text.as_bytes().to_vec()], Duration::ZERO)
    }

    #[test]
    fn answers_by_length_and_in_chunks_are_read_however_they_are_cut() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nGrpc-Trailer-X: y\r\n\r\n",
        ] {
            let expected = Answer {
                status: 200,
                body: b"hello".to_vec(),
                keep: true,
            };
            assert_eq!(whole(text).unwrap(), expected);
            let bytes = text.as_bytes().chunks(1).map(<[u8]>::to_vec).collect();
            assert_eq!(answer_to(bytes, Duration::ZERO).unwrap(), expected);
        }
        let closed = whole("HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(
            closed.unwrap(),
            Answer {
                status: 503,
                body: Vec::new(),
                keep: false
            }
        );
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for text in [
            "SSH-2.0-OpenSSH\r\n\r\n",
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 2x0 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n",
        ] {
            let error = whole(text).unwrap_err();
            assert!(matches!(error, HttpError::Junk(_)), "{text:?}: {error}");
        }
        let endless = whole(&format!(
            "HTTP/1.1 200 OK\r\nX: {}",
            "y".repeat(HEAD_MAX + 9)
        ));
        assert!(matches!(endless, Err(HttpError::Junk(_))));
    }

    #[test]
    fn an_answer_that_ends_early_or_drips_is_an_error_in_time() {
        let cut = whole("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel");
        assert!(matches!(cut, Err(HttpError::Ended)), "{cut:?}");
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n".repeat(2);
        let drip = text.chunks(1).map(<[u8]>::to_vec).collect();
        let start = Instant::now();
        let late = answer_to(drip, Duration::from_millis(20));
        assert!(matches!(late, Err(HttpError::TooLate(_))), "{late:?}");
        // The server goes on writing until it meets the closed connection; the client gave up in time.
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn whatever_comes_no_parser_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Head::parse(&bytes, 64 << 10);
            if let Ok(Some((body, used))) = chunks(&bytes, 64 << 10) {
                prop_assert!(used <= bytes.len() && body.len() <= used);
            }
        }
    }
}
