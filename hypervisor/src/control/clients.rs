//! Those who ask: each with a bounded request, a bounded time and one answer at a time.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::wire::REQUEST_MAX;
use crate::backends::wait::Waiter;

/// What somebody speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Lines of JSON over the control socket.
    Control,
    /// HTTP, to which metrics are the answer.
    Scrape,
}

/// Clients of a kind at once. A person has a window or two open, a site one or two scrapers.
const MOST: usize = 8;

impl Kind {
    /// How long a client may take from one request to the end of the next; a scraper, for its only one.
    fn patience(self) -> Duration {
        match self {
            Self::Control => Duration::from_secs(10),
            Self::Scrape => Duration::from_secs(3),
        }
    }

    /// Between two answers to the same client, and between two scrapers. So a client that asks without a break costs the machine
    /// no more than one that asks at this rate.
    pub(super) fn pace(self) -> Duration {
        match self {
            Self::Control => Duration::from_millis(20),
            Self::Scrape => Duration::from_millis(50),
        }
    }

    /// Where the first request in these bytes ends, if it has come.
    fn end_of(self, inbox: &[u8]) -> Option<usize> {
        match self {
            Self::Control => inbox
                .iter()
                .position(|&byte| byte == b'\n')
                .map(|at| at + 1),
            Self::Scrape => inbox
                .windows(4)
                .position(|four| four == b"\r\n\r\n")
                .map(|at| at + 4),
        }
    }
}

/// Its connection.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(to),
            Self::Tcp(stream) => stream.read(to),
        }
    }

    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(from),
            Self::Tcp(stream) => stream.write(from),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// What is said to a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// These bytes.
    Bytes(Vec<u8>),
    /// These, and then the console from this byte on: the client is a viewer from here on.
    Console(Vec<u8>, u64),
}

impl From<Vec<u8>> for Reply {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

/// A client that became a viewer.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) stream: UnixStream,
    pub(super) hello: Vec<u8>,
    pub(super) from: u64,
    pub(super) typed: Vec<u8>,
}

#[derive(Debug)]
struct Client {
    socket: Socket,
    kind: Kind,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    sent: usize,
    /// When it is dropped.
    until: Instant,
    /// Until when it is not listened to.
    quiet: Instant,
    /// It is dropped once the outbox is sent.
    last: bool,
    /// It is to look at the console, from this byte on.
    looks: Option<u64>,
}

impl Client {
    fn owes(&self) -> bool {
        self.sent < self.outbox.len()
    }

    /// A request is here that came with the one before it.
    fn has_whole(&self) -> bool {
        !self.owes() && self.kind.end_of(&self.inbox).is_some()
    }

    /// Reads or sends what there is. False: it is to be dropped.
    fn turn<R: Into<Reply>>(
        &mut self,
        now: Instant,
        answer: &mut impl FnMut(Kind, &[u8]) -> R,
    ) -> bool {
        if self.owes() {
            return self.send(now);
        }
        let mut bytes = [0; REQUEST_MAX];
        match self.socket.read(&mut bytes) {
            Ok(0) => return false,
            Ok(length) => self.inbox.extend_from_slice(&bytes[..length]),
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        self.consider(now, answer)
    }

    /// Answers the first request that is whole.
    fn consider<R: Into<Reply>>(
        &mut self,
        now: Instant,
        answer: &mut impl FnMut(Kind, &[u8]) -> R,
    ) -> bool {
        let reply = match self.kind.end_of(&self.inbox) {
            Some(end) if end <= REQUEST_MAX => {
                let reply = answer(self.kind, &self.inbox[..end]);
                self.inbox.drain(..end);
                self.last = self.kind == Kind::Scrape;
                reply
            }
            None if self.inbox.len() < REQUEST_MAX => return true,
            _ => {
                // What would have been a request has no end, or one too far.
                self.last = true;
                answer(self.kind, b"")
            }
        };
        match reply.into() {
            Reply::Bytes(bytes) => self.outbox = bytes,
            Reply::Console(hello, from) => {
                (self.outbox, self.looks) = (hello, Some(from));
                return true;
            }
        }
        self.sent = 0;
        self.send(now)
    }

    fn send(&mut self, now: Instant) -> bool {
        match self.socket.write(&self.outbox[self.sent..]) {
            Ok(length) => self.sent += length,
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        if !self.owes() {
            self.outbox.clear();
            self.sent = 0;
            self.quiet = now + self.kind.pace();
            self.until = now + self.kind.patience();
            return !self.last;
        }
        true
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Clients {
    list: Vec<Client>,
    /// Where each stands in the waiter, in the last wait.
    waits: Vec<Option<usize>>,
}

impl Clients {
    /// Takes one in. Where there are too many of its kind the oldest is dropped: it may be one that never asks.
    pub(super) fn admit(&mut self, socket: Socket, kind: Kind, now: Instant) {
        if self
            .list
            .iter()
            .filter(|client| client.kind == kind)
            .count()
            >= MOST
            && let Some(oldest) = self.list.iter().position(|client| client.kind == kind)
        {
            self.list.remove(oldest);
        }
        self.list.push(Client {
            socket,
            kind,
            inbox: Vec::new(),
            outbox: Vec::new(),
            sent: 0,
            until: now + kind.patience(),
            quiet: now,
            last: false,
            looks: None,
        });
    }

    /// Adds to a wait those who may be listened to or are owed something; when to look again at the latest.
    pub(super) fn wait(&mut self, waiter: &mut Waiter, now: Instant) -> Option<Instant> {
        let mut again: Option<Instant> = None;
        self.waits.clear();
        for client in &self.list {
            let listened = now >= client.quiet;
            let next = if client.owes() || (listened && !client.has_whole()) {
                client.until
            } else {
                client.quiet
            };
            again = Some(again.map_or(next, |again| again.min(next)));
            self.waits.push(if client.owes() {
                Some(waiter.add(&client.socket, false, true))
            } else {
                listened.then(|| waiter.add(&client.socket, true, false))
            });
        }
        again
    }

    /// Turns to each that is ready, after a wait; drops who has gone, who is done, and whose time is over.
    pub(super) fn turn<R: Into<Reply>>(
        &mut self,
        waiter: &Waiter,
        now: Instant,
        mut answer: impl FnMut(Kind, &[u8]) -> R,
    ) {
        let mut waits = std::mem::take(&mut self.waits).into_iter();
        self.list.retain_mut(|client| {
            let Some(index) = waits.next().flatten() else {
                return now < client.until;
            };
            let ready = waiter.ready(index);
            let kept = if client.has_whole() {
                client.consider(now, &mut answer)
            } else if ready.read || ready.write || ready.hung_up || ready.failed {
                client.turn(now, &mut answer)
            } else {
                true
            };
            kept && now < client.until
        });
    }

    /// Those who became viewers.
    pub(super) fn leaving(&mut self) -> impl Iterator<Item = Leaving> + '_ {
        self.list
            .extract_if(.., |client| client.looks.is_some())
            .filter_map(|client| match (client.socket, client.looks) {
                (Socket::Unix(stream), Some(from)) => Some(Leaving {
                    stream,
                    hello: client.outbox,
                    from,
                    typed: client.inbox,
                }),
                _ => None,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The clients, and the time as the test has it.
    struct Host {
        clients: Clients,
        now: Instant,
    }

    impl Host {
        fn new() -> Self {
            Self {
                clients: Clients::default(),
                now: Instant::now(),
            }
        }

        fn connect(&mut self, kind: Kind) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            self.clients.admit(Socket::Unix(ours), kind, self.now);
            theirs
        }

        /// One round, so much later.
        fn round(&mut self, later: Duration, answer: &[u8]) {
            self.now += later;
            let mut waiter = Waiter::new();
            self.clients.wait(&mut waiter, self.now);
            waiter.wait(Some(Duration::ZERO)).unwrap();
            self.clients.turn(&waiter, self.now, |_, request| {
                if request.is_empty() {
                    b"too long\n".to_vec()
                } else {
                    answer.to_vec()
                }
            });
        }
    }

    const PACE: Duration = Duration::from_millis(60);

    fn read(stream: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }

    #[test]
    fn a_request_in_pieces_is_answered_once_and_the_next_one_too() {
        let mut host = Host::new();
        let mut client = host.connect(Kind::Control);
        for piece in ["{\"a\"", ":1}"] {
            client.write_all(piece.as_bytes()).unwrap();
            host.round(PACE, b"yes\n");
            assert_eq!(read(&mut client), b"");
        }
        client.write_all(b"\n").unwrap();
        host.round(PACE, b"yes\n");
        assert_eq!(read(&mut client), b"yes\n");
        client.write_all(b"again\n").unwrap();
        host.round(PACE, b"yes\n");
        assert_eq!(read(&mut client), b"yes\n");
        assert_eq!(host.clients.list.len(), 1);
    }

    #[test]
    fn one_that_asks_without_a_break_is_answered_at_the_pace() {
        let mut host = Host::new();
        let mut client = host.connect(Kind::Control);
        let mut answers = 0;
        for _ in 0..100 {
            client.write_all(b"now\n").unwrap();
            host.round(Duration::from_millis(1), b"x");
            answers += read(&mut client).len();
        }
        assert!((4..=6).contains(&answers), "{answers} in 100 ms");
        // The rest of what it asked is not lost.
        for _ in 0..100 {
            client.write_all(b"more\n").unwrap();
            host.round(PACE, b"x");
        }
        assert!(read(&mut client).len() >= 90);
    }

    #[test]
    fn one_that_says_too_much_is_told_so_and_dropped() {
        let mut host = Host::new();
        let mut client = host.connect(Kind::Control);
        client.write_all(&vec![b'x'; 2 * REQUEST_MAX]).unwrap();
        host.round(PACE, b"yes\n");
        assert_eq!(host.clients.list.len(), 0);
        assert_eq!(read(&mut client), b"too long\n");
    }

    #[test]
    fn one_that_says_nothing_or_takes_nothing_is_dropped_in_time() {
        let mut host = Host::new();
        let _silent = host.connect(Kind::Control);
        let mut deaf = host.connect(Kind::Scrape);
        deaf.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // More than the kernel holds for it.
        let much = vec![b'y'; 8 << 20];
        for _ in 0..20 {
            host.round(PACE, &much);
        }
        assert_eq!(host.clients.list.len(), 2);
        host.round(Kind::Scrape.patience(), &much);
        assert_eq!(host.clients.list.len(), 1);
        host.round(Kind::Control.patience(), &much);
        assert_eq!(host.clients.list.len(), 0);
    }

    #[test]
    fn the_oldest_gives_way_where_there_are_too_many() {
        let mut host = Host::new();
        let mut all: Vec<UnixStream> = (0..MOST).map(|_| host.connect(Kind::Control)).collect();
        let _scraper = host.connect(Kind::Scrape);
        let mut late = host.connect(Kind::Control);
        assert_eq!(host.clients.list.len(), MOST + 1);
        late.write_all(b"status\n").unwrap();
        host.round(PACE, b"yes\n");
        assert_eq!(read(&mut late), b"yes\n");
        assert_eq!(
            all[0].read(&mut [0]).unwrap(),
            0,
            "the oldest is hung up on"
        );
        assert_eq!(
            all[1].read(&mut [0]).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
    }
}
