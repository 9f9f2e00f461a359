//! Who stands at a backup's door: connections that have not said yet what they are, all heard at once.
//!
//! One that says nothing, or little at a time, keeps its own place and nobody's turn; one that is too late goes. There are so
//! many places, and whoever comes when all are taken has that of the one who has waited longest: a primary needs its place
//! for two ways across the network, and those who want to keep it out have to come faster than that.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::backends::wait::Waiter;
use crate::handshake::proof::Caller;
use crate::handshake::{self, SHOWN, gather};

/// Places. Each costs a descriptor and some bytes; more would help a flood as much as it helps a primary.
const PLACES: usize = 64;

/// How long a connection may take to show its ticket; the one that has it does so at once.
const TICKET_WITHIN: Duration = Duration::from_millis(500);

/// Somebody who waits.
pub(super) trait Waiting {
    /// Takes in what has come, without waiting. Whether it is all that is wanted.
    fn listen(&mut self) -> io::Result<bool>;

    /// When it is too late.
    fn until(&self) -> Instant;

    /// What it is waited for at.
    fn source(&self) -> &impl AsFd;
}

impl Waiting for Caller {
    fn listen(&mut self) -> io::Result<bool> {
        Caller::listen(self)
    }

    fn until(&self) -> Instant {
        Caller::until(self)
    }

    fn source(&self) -> &impl AsFd {
        self.stream()
    }
}

/// Who may have come with a ring's ticket.
pub(super) struct Bearer {
    stream: TcpStream,
    shown: [u8; SHOWN],
    got: usize,
    since: Instant,
}

impl Bearer {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            shown: [0; SHOWN],
            got: 0,
            since: Instant::now(),
        })
    }

    /// The stream, if the ticket is this one.
    pub(super) fn admit(self, ticket: &handshake::Ticket) -> io::Result<Option<TcpStream>> {
        if !handshake::is_ring(&self.shown, ticket) {
            return Ok(None);
        }
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(handshake::PATIENCE))?;
        Ok(Some(self.stream))
    }
}

impl Waiting for Bearer {
    fn listen(&mut self) -> io::Result<bool> {
        let until = self.until();
        gather(&self.stream, &mut self.shown, &mut self.got, until)
    }

    fn until(&self) -> Instant {
        self.since + TICKET_WITHIN
    }

    fn source(&self) -> &impl AsFd {
        &self.stream
    }
}

/// The porch.
pub(super) struct Porch<W> {
    waiting: VecDeque<W>,
}

impl<W: Waiting> Porch<W> {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
        }
    }

    /// Takes somebody in.
    pub(super) fn take_in(&mut self, who: W) {
        if self.waiting.len() == PLACES {
            self.waiting.pop_front();
        }
        self.waiting.push_back(who);
    }

    /// Adds them all to what is waited for.
    pub(super) fn watch(&self, waiter: &mut Waiter) {
        for who in &self.waiting {
            waiter.add(who.source(), true, false);
        }
    }

    /// When the first of them will be too late.
    pub(super) fn until(&self) -> Option<Instant> {
        self.waiting.iter().map(Waiting::until).min()
    }

    /// Listens to all of them; the first that has said all, or why one is sent away.
    pub(super) fn turn(&mut self) -> Option<Result<W, io::Error>> {
        for at in 0..self.waiting.len() {
            let outcome = match self.waiting[at].listen() {
                Ok(false) => continue,
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            };
            let who = self.waiting.remove(at).expect("it was just listened to");
            return Some(outcome.map(|()| who));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;

    use super::*;

    const TICKET: handshake::Ticket = [7; 16];

    struct Door(TcpListener);

    impl Door {
        fn new() -> Self {
            Self(TcpListener::bind("127.0.0.1:0").unwrap())
        }

        fn knock(&self, porch: &mut Porch<Bearer>) -> TcpStream {
            let ours = TcpStream::connect(self.0.local_addr().unwrap()).unwrap();
            let (theirs, _) = self.0.accept().unwrap();
            porch.take_in(Bearer::new(theirs).unwrap());
            ours
        }
    }

    fn first(porch: &mut Porch<Bearer>) -> Result<Bearer, io::Error> {
        let mut waiter = Waiter::new();
        loop {
            if let Some(outcome) = porch.turn() {
                return outcome;
            }
            waiter.clear();
            porch.watch(&mut waiter);
            waiter.wait(Some(Duration::from_millis(10))).unwrap();
        }
    }

    fn shown() -> Vec<u8> {
        [&b"doppel-r"[..], &TICKET].concat()
    }

    #[test]
    fn those_who_say_nothing_keep_nobody_from_his_turn() {
        let (door, mut porch) = (Door::new(), Porch::new());
        let silent: Vec<_> = (0..PLACES - 2).map(|_| door.knock(&mut porch)).collect();
        let mut dripping = door.knock(&mut porch);
        dripping.write_all(&shown()[..5]).unwrap();
        let mut real = door.knock(&mut porch);
        real.write_all(&shown()).unwrap();
        let bearer = first(&mut porch).unwrap();
        assert!(bearer.admit(&TICKET).unwrap().is_some());
        drop(silent);
    }

    #[test]
    fn who_has_waited_longest_makes_room_and_who_is_too_late_goes() {
        let (door, mut porch) = (Door::new(), Porch::new());
        let mut oldest = door.knock(&mut porch);
        let others: Vec<_> = (0..PLACES).map(|_| door.knock(&mut porch)).collect();
        assert_eq!(porch.waiting.len(), PLACES);
        // Its place is gone, and its connection closed.
        let _ = oldest.write_all(&shown());
        assert!(matches!(oldest.read(&mut [0]), Ok(0) | Err(_)));
        for _ in &others {
            assert_eq!(first(&mut porch).err().unwrap().kind(), ErrorKind::TimedOut);
        }
        assert!(porch.until().is_none());
    }

    #[test]
    fn a_wrong_ticket_is_none() {
        let (door, mut porch) = (Door::new(), Porch::new());
        for at in 0..SHOWN {
            let mut wrong = shown();
            wrong[at] ^= 1;
            let mut caller = door.knock(&mut porch);
            caller.write_all(&wrong).unwrap();
            let bearer = first(&mut porch).unwrap();
            assert!(bearer.admit(&TICKET).unwrap().is_none());
        }
    }
}
