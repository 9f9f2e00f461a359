//! The gateway with a TAP: the kernel's TCP on both sides, bytes carried between.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::Ordering;

use super::{Counters, Door, GatewayError, MAX_CONNECTIONS, Shared, not_now, send_at_once, wait};
use crate::backends::wait::{Waiter, start_connect};

/// Bytes in hand for each direction of a flow. The kernel's own buffers do the real work.
const BUFFER: usize = 64 << 10;

/// Serves until asked to stop.
pub(super) fn run(
    listener: TcpListener,
    guest: SocketAddrV4,
    shared: &Shared,
) -> Result<(), GatewayError> {
    let mut door = Door::new(listener);
    let mut flows: Vec<Flow> = Vec::new();
    let mut waiter = Waiter::new();
    let mut indices = Vec::new();
    loop {
        waiter.clear();
        waiter.add(&shared.wake, true, false);
        if flows.len() < MAX_CONNECTIONS {
            door.watch(&mut waiter);
        }
        indices.clear();
        indices.extend(flows.iter().map(|flow| flow.watch(&mut waiter)));
        wait(&mut waiter, door.limit(None))?;
        shared.wake.clear();
        if shared.stop.load(Ordering::Acquire) {
            shared.counters.open.store(0, Ordering::Relaxed);
            return Ok(());
        }

        for (flow, index) in flows.iter_mut().zip(&indices) {
            flow.turn(&waiter, *index, &shared.counters);
        }
        flows.retain(|flow| !flow.over);
        while flows.len() < MAX_CONNECTIONS
            && let Some(client) = door.accept()
        {
            Counters::add(&shared.counters.accepted, 1);
            match start_connect(guest) {
                Ok(guest) => flows.push(Flow::new(client, guest)),
                Err(error) => {
                    tracing::warn!("no connection to the guest at {guest}: {error}");
                    Counters::add(&shared.counters.broken_by_guest, 1);
                }
            }
        }
        let open = &shared.counters.open;
        open.store(flows.len() as u64, Ordering::Relaxed);
    }
}

/// One direction of a flow.
struct Pipe {
    buffer: Box<[u8]>,
    /// What is in hand: `buffer[start..end]`.
    start: usize,
    end: usize,
    /// The source has said all it will.
    ended: bool,
    /// The sink has been told so.
    told: bool,
}

/// Which side of a flow failed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Guest,
}

struct Flow {
    client: TcpStream,
    guest: TcpStream,
    connected: bool,
    to_guest: Pipe,
    to_client: Pipe,
    over: bool,
}

impl Flow {
    fn new(client: TcpStream, guest: TcpStream) -> Self {
        send_at_once(&guest);
        Self {
            client,
            guest,
            connected: false,
            to_guest: Pipe::new(),
            to_client: Pipe::new(),
            over: false,
        }
    }

    /// Adds what the flow waits for, and returns the two indices, client's first.
    fn watch(&self, waiter: &mut Waiter) -> (Option<usize>, Option<usize>) {
        if !self.connected {
            return (None, Some(waiter.add(&self.guest, false, true)));
        }
        let mut add = |stream: &TcpStream, from: &Pipe, to: &Pipe| {
            let (read, write) = (from.wants(), to.has());
            // With nothing to do, watch for a reset only; not once a direction has ended, because a stream
            // whose both directions have is reported for ever.
            let idle = !from.ended && !to.told;
            (read || write || idle).then(|| waiter.add(stream, read, write))
        };
        (
            add(&self.client, &self.to_guest, &self.to_client),
            add(&self.guest, &self.to_client, &self.to_guest),
        )
    }

    /// Does what the wait has made possible.
    fn turn(
        &mut self,
        waiter: &Waiter,
        (client, guest): (Option<usize>, Option<usize>),
        counters: &Counters,
    ) {
        let ready =
            |index: Option<usize>| index.map(|index| waiter.ready(index)).unwrap_or_default();
        let (client, guest) = (ready(client), ready(guest));
        if !self.connected {
            if !(guest.write || guest.failed) {
                return;
            }
            if !matches!(self.guest.take_error(), Ok(None)) {
                Counters::add(&counters.broken_by_guest, 1);
                self.over = true;
                return;
            }
            self.connected = true;
        }
        let carried = self
            .to_guest
            .carry(&self.client, Side::Client, &self.guest, &counters.bytes_in)
            .and_then(|()| {
                self.to_client
                    .carry(&self.guest, Side::Guest, &self.client, &counters.bytes_out)
            });
        // A stream that failed while there was nothing to carry.
        let failed = match carried {
            Err(side) => Some(side),
            Ok(()) if guest.failed => Some(Side::Guest),
            Ok(()) if client.failed => Some(Side::Client),
            Ok(()) => None,
        };
        if failed == Some(Side::Guest) {
            Counters::add(&counters.broken_by_guest, 1);
        }
        self.over = failed.is_some() || (self.to_guest.told && self.to_client.told);
    }
}

impl Pipe {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
            told: false,
        }
    }

    fn has(&self) -> bool {
        self.start < self.end
    }

    fn wants(&self) -> bool {
        !self.ended && !self.has()
    }

    /// Carries all that can be, from `source` (which is on side `from`) to `sink`; says which side failed.
    fn carry(
        &mut self,
        mut source: &TcpStream,
        from: Side,
        mut sink: &TcpStream,
        carried: &std::sync::atomic::AtomicU64,
    ) -> Result<(), Side> {
        let to = match from {
            Side::Client => Side::Guest,
            Side::Guest => Side::Client,
        };
        loop {
            while self.has() {
                match sink.write(&self.buffer[self.start..self.end]) {
                    Ok(count) if count > 0 => {
                        self.start += count;
                        Counters::add(carried, count);
                    }
                    Err(error) if not_now(&error) => return Ok(()),
                    _ => return Err(to),
                }
            }
            if self.ended {
                if !self.told {
                    self.told = true;
                    // It fails only if the sink is gone, which its own reading tells.
                    let _ = sink.shutdown(Shutdown::Write);
                }
                return Ok(());
            }
            match source.read(&mut self.buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => (self.start, self.end) = (0, count),
                Err(error) if not_now(&error) => return Ok(()),
                Err(_) => return Err(from),
            }
        }
    }
}
