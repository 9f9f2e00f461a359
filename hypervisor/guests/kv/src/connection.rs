//! One client's connection: its socket, its session with the engine, and the replies on their way.
//!
//! ```text
//! handshake ──established──▶ serving ──QUIT, error, client's FIN──▶ ending ──▶ gone
//! ```

use alloc::vec::Vec;
use core::net::SocketAddr;
use kv_engine::{Limits, Now, Output, Peer, Session, State, Store};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::IpEndpoint;

use crate::flows::Flow;

/// What a connection's socket can hold, each way. It bounds what can be under way in one round trip: with less,
/// values of a megabyte come in at a crawl; with more, a hundred clients take a small guest's memory.
const BUFFER: usize = 64 << 10;
/// Memory that must be left after the buffers of a new connection, for what cannot fail: smoltcp's own and the
/// connection's. Measured need: under 4 KiB.
const HEADROOM: usize = 32 << 10;
/// The buffers of a connection that only says why it is closed, each way.
const SMALL_BUFFER: usize = 512;
/// A client that opens, or is told goodbye, must answer within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// A silent client is asked for a sign of life this often, and given up after `SILENCE`.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_secs(300);
/// The engine pauses when so much waits to be sent, or after so many commands, so that others get their turn.
const LIMITS: Limits = Limits {
    output: BUFFER,
    commands: 1024,
};

/// Where a connection stands after it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// It waits for the client.
    Waits,
    /// It has more commands to execute, but others should have a turn.
    More,
}

/// One client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) flow: Flow,
    /// A set with one socket.
    pub(crate) sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// There once the connection is established.
    session: Option<Session>,
    /// There is no room for this client: it is told so, and the connection closed.
    pub(crate) turned_away: bool,
    /// It counts as a client: from its opening until nothing more can be said to it.
    serves: bool,
    output: Output,
    /// Nothing more is read from the client.
    ending: bool,
    /// Whether it stands in the server's list of work.
    pub(crate) queued: bool,
    /// When smoltcp wants to look at the socket again.
    pub(crate) due: Option<Instant>,
}

impl Connection {
    /// A connection that waits for its SYN, or `None` if there is no memory for one.
    pub(crate) fn listen(flow: Flow, port: u16) -> Option<Self> {
        Self::new(flow, port, BUFFER, false)
    }

    /// The same for a client that will be turned away.
    pub(crate) fn turn_away(flow: Flow, port: u16) -> Option<Self> {
        Self::new(flow, port, SMALL_BUFFER, true)
    }

    fn new(flow: Flow, port: u16, bytes: usize, turned_away: bool) -> Option<Self> {
        let receive = buffer(bytes)?;
        let send = buffer(bytes)?;
        let mut headroom = Vec::<u8>::new();
        headroom.try_reserve_exact(HEADROOM).ok()?;
        drop(headroom);
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(receive),
            tcp::SocketBuffer::new(send),
        );
        socket.set_nagle_enabled(false);
        // All frames of a wake are taken in before anything is sent, so an acknowledgement that is not delayed still
        // covers all of them, and rides on the reply where there is one.
        socket.set_ack_delay(None);
        socket.set_timeout(Some(PATIENCE));
        if !turned_away {
            // Before anything is sent: set on an idle connection, it asks for a sign of life at once.
            socket.set_keep_alive(Some(KEEP_ALIVE));
        }
        socket.listen(port).ok()?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Some(Self {
            flow,
            sockets,
            handle,
            session: None,
            turned_away,
            serves: !turned_away,
            output: Output::new(),
            ending: false,
            queued: false,
            due: None,
        })
    }

    pub(crate) fn state(&self) -> tcp::State {
        self.sockets.get::<tcp::Socket>(self.handle).state()
    }

    /// Executes what the client sent and hands replies to the socket, as far as its buffers go.
    pub(crate) fn serve(&mut self, store: &mut Store, now: Now) -> Pace {
        let socket = self.sockets.get_mut::<tcp::Socket>(self.handle);
        let opened = matches!(
            socket.state(),
            tcp::State::Established | tcp::State::CloseWait
        );
        if opened && self.turned_away && !self.ending {
            // The buffer is empty and larger than this.
            let _ = socket.send_slice(store.turn_away());
            self.ending = true;
        } else if opened && !self.turned_away && self.session.is_none() {
            socket.set_timeout(Some(SILENCE));
            self.session = Some(store.connect(peer(socket), now));
        }
        let output = &mut self.output;
        let pace = loop {
            send(socket, output);
            if self.ending {
                discard_input(socket);
                break Pace::Waits;
            }
            let Some(session) = self.session.as_mut() else {
                return Pace::Waits;
            };
            let progress = socket.recv(|input| {
                let progress = session.run(store, now, input, output, LIMITS);
                (progress.consumed, progress)
            });
            // An error means that the socket is not open for data: there will be no input.
            let Ok(progress) = progress else {
                break Pace::Waits;
            };
            match progress.state {
                State::NeedInput if progress.consumed == 0 => break Pace::Waits,
                State::NeedInput => {}
                State::OutputFull if send(socket, output) == 0 => break Pace::Waits,
                State::OutputFull => {}
                State::Paused => break Pace::More,
                State::Close => self.ending = true,
            }
        };
        let finished =
            self.ending || (socket.state() == tcp::State::CloseWait && !socket.can_recv());
        if finished && output.is_empty() && socket.may_send() {
            self.ending = true;
            socket.close();
            socket.set_keep_alive(None);
            socket.set_timeout(Some(PATIENCE));
        }
        pace
    }

    /// Whether it counts as a client.
    pub(crate) fn serves(&self) -> bool {
        self.serves
    }

    /// Whether this end has closed the connection, or the other has broken it. What was said before may still be on its way.
    pub(crate) fn has_ended(&self) -> bool {
        use tcp::State::{CloseWait, Established, Listen, SynReceived};
        !matches!(self.state(), Listen | SynReceived | Established | CloseWait)
    }

    /// It is no client any more; whether it was one.
    pub(crate) fn leave(&mut self, store: &mut Store) -> bool {
        if let Some(session) = self.session.take() {
            session.close(store);
        }
        core::mem::replace(&mut self.serves, false)
    }
}

/// A buffer for a socket, all zero.
fn buffer(bytes: usize) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).ok()?;
    buffer.resize(bytes, 0);
    Some(buffer)
}

/// Moves replies to the socket; gives how many bytes it took.
fn send(socket: &mut tcp::Socket<'_>, output: &mut Output) -> usize {
    let mut sent = 0;
    // Twice, where the free part of the socket's ring buffer wraps.
    while !output.is_empty() {
        // An error means that the socket no longer sends: what waits for it is lost with it.
        let Ok(taken) = socket.send_slice(output.pending()) else {
            output.consume(output.len());
            break;
        };
        if taken == 0 {
            break;
        }
        output.consume(taken);
        sent += taken;
    }
    sent
}

/// Input after the end is of no interest, but must not close the window: the client's FIN comes behind it.
fn discard_input(socket: &mut tcp::Socket<'_>) {
    while socket.can_recv() {
        if socket.recv(|input| (input.len(), ())).is_err() {
            break;
        }
    }
}

fn peer(socket: &tcp::Socket<'_>) -> Option<Peer> {
    let address = |endpoint: IpEndpoint| SocketAddr::new(endpoint.addr.into(), endpoint.port);
    Some(Peer {
        remote: address(socket.remote_endpoint()?),
        local: address(socket.local_endpoint()?),
    })
}
