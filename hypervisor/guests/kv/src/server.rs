//! The server: all connections, and what is done at each wake.

use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use kv_engine::{Now, Store};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use crate::connection::{Connection, Pace};
use crate::flows::{Flow, Flows};
use crate::segment::Segment;

/// How often timers are looked at and keys are expired.
const TICK: Duration = Duration::from_millis(10);
/// Keys expired in one tick at most: a hundred thousand a second, and under a millisecond at a time.
const EXPIRE_BUDGET: usize = 1000;

/// Connections beyond the limit that are told so at the same time. A client that comes when all of these are taken is refused.
const TURNED_AWAY: u16 = 64;
/// Places for each client: its own, and one for a connection that has ended and waits for the other end's last segment.
const PLACES: u16 = 2;

/// Where the server listens, and for how many.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The network device's address.
    pub mac: [u8; 6],
    /// The server's address.
    pub address: [u8; 4],
    /// The length of the network's prefix, in bits.
    pub prefix: u8,
    /// The way to other networks.
    pub gateway: Option<[u8; 4]>,
    /// The TCP port.
    pub port: u16,
    /// How many clients can be connected at once, at most 10,000. A further one is told so and its connection closed.
    pub clients: u16,
    /// Seeds TCP's sequence numbers.
    pub seed: u64,
    /// Unix time in nanoseconds at which the guest clock read 0.
    pub wall_clock: u64,
}

/// What is left after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing: halt.
    Done,
    /// Clients that sent many commands: send what there is, and take another turn.
    More,
}

/// The server.
pub struct Server {
    interface: Interface,
    store: Store,
    address: Ipv4Address,
    port: u16,
    wall_clock: u64,
    clients: usize,
    /// How many of `connections` are clients: neither turned away nor ended.
    served: usize,
    /// How many of them are being turned away.
    turned_away: u16,
    connections: Vec<Option<Box<Connection>>>,
    /// Indices of `connections` that are free.
    free: Vec<u16>,
    flows: Flows,
    /// Connections to be served, each at most once.
    work: Vec<u16>,
    /// The list that `work` is swapped with while it is worked off.
    spare: Vec<u16>,
    /// An empty set, for frames that belong to no connection.
    nobody: SocketSet<'static>,
    next_tick: Instant,
}

impl Server {
    /// A server of `store` on `device`.
    ///
    /// # Errors
    /// There is no memory for the tables of so many clients.
    pub fn new(
        settings: &Settings,
        store: Store,
        device: &mut impl Device,
    ) -> Result<Self, TryReserveError> {
        let mut config = Config::new(EthernetAddress(settings.mac).into());
        config.random_seed = settings.seed;
        let mut interface = Interface::new(config, device, Instant::ZERO);
        let address = Ipv4Address::from(settings.address);
        interface.update_ip_addrs(|addresses| {
            // The list is empty, so there is room.
            let _ = addresses.push(IpCidr::new(address.into(), settings.prefix));
        });
        if let Some(gateway) = settings.gateway {
            // The table is empty, so there is room.
            let _ = interface
                .routes_mut()
                .add_default_ipv4_route(gateway.into());
        }
        let slots = settings.clients * PLACES + TURNED_AWAY;
        let indices = || {
            let mut list = Vec::<u16>::new();
            list.try_reserve_exact(slots.into()).map(|()| list)
        };
        let mut connections = Vec::new();
        connections.try_reserve_exact(slots.into())?;
        connections.resize_with(slots.into(), || None);
        let mut free = indices()?;
        free.extend((0..slots).rev());
        Ok(Self {
            interface,
            store,
            address,
            port: settings.port,
            wall_clock: settings.wall_clock,
            clients: settings.clients.into(),
            served: 0,
            turned_away: 0,
            connections,
            free,
            flows: Flows::with_capacity(slots.into())?,
            work: indices()?,
            spare: indices()?,
            nobody: SocketSet::new(Vec::new()),
            next_tick: Instant::ZERO,
        })
    }

    /// Does all there is to do at guest time `time` (nanoseconds): takes in the received frames, executes commands,
    /// sends. `peek` shows the frame that `device` would give next.
    pub fn turn<D: Device>(
        &mut self,
        time: u64,
        device: &mut D,
        peek: fn(&D) -> Option<&[u8]>,
    ) -> Turn {
        let now = Instant::from_micros((time / 1000) as i64);
        let wall = Now::from_micros((self.wall_clock + time) / 1000);
        while let Some(segment) =
            peek(device).map(|frame| Segment::parse(frame, self.address, self.port))
        {
            // Who has left makes room for who comes behind him, in one wake as in two.
            if segment.is_some_and(|segment| segment.opens) && self.served >= self.clients {
                self.work_off(now, wall, device);
            }
            if !self.receive(segment, now, device) {
                break;
            }
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.tick(now, wall);
        }
        self.work_off(now, wall, device)
    }

    /// How many connections there are, in any state.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    /// Gives the next frame to whom it belongs; whether there was one.
    fn receive<D: Device>(
        &mut self,
        segment: Option<Segment>,
        now: Instant,
        device: &mut D,
    ) -> bool {
        let index = segment.and_then(|segment| self.connection_for(segment));
        let connection = index.and_then(|index| self.connections[usize::from(index)].as_mut());
        let sockets = match connection {
            Some(connection) => &mut connection.sockets,
            None => &mut self.nobody,
        };
        let result = self.interface.poll_ingress_single(now, device, sockets);
        if let Some(index) = index {
            self.queue(index);
        }
        result != PollIngressSingleResult::None
    }

    /// The connection that a segment belongs to; for one that opens, a new one if there is room.
    fn connection_for(&mut self, segment: Segment) -> Option<u16> {
        let known = self.flows.find(segment.flow);
        if !segment.opens {
            return known;
        }
        if let Some(index) = known {
            // A client may use its port again while the server's end still waits for stray segments.
            let state = self.connections[usize::from(index)].as_ref()?.state();
            if !matches!(state, tcp::State::TimeWait | tcp::State::Closed) {
                return known;
            }
            self.remove(index);
        }
        self.accept(segment.flow)
    }

    fn accept(&mut self, flow: Flow) -> Option<u16> {
        let index = self.free.last().copied()?;
        let connection = if self.served < self.clients {
            Connection::listen(flow, self.port)?
        } else if self.turned_away < TURNED_AWAY {
            Connection::turn_away(flow, self.port)?
        } else {
            return None;
        };
        self.served += usize::from(connection.serves());
        self.turned_away += u16::from(connection.turned_away);
        self.free.pop();
        self.connections[usize::from(index)] = Some(Box::new(connection));
        self.flows.insert(flow, index);
        Some(index)
    }

    fn queue(&mut self, index: u16) {
        if let Some(connection) = &mut self.connections[usize::from(index)]
            && !connection.queued
        {
            connection.queued = true;
            self.work.push(index);
        }
    }

    fn tick(&mut self, now: Instant, wall: Now) {
        self.interface.poll_maintenance(now);
        self.store.expire_cycle(wall, EXPIRE_BUDGET);
        for index in 0..self.connections.len() as u16 {
            let connection = self.connections[usize::from(index)].as_ref();
            if connection.is_some_and(|connection| connection.due.is_some_and(|due| due <= now)) {
                self.queue(index);
            }
        }
    }

    fn work_off<D: Device>(&mut self, now: Instant, wall: Now, device: &mut D) -> Turn {
        core::mem::swap(&mut self.work, &mut self.spare);
        while let Some(index) = self.spare.pop() {
            let Some(connection) = &mut self.connections[usize::from(index)] else {
                continue;
            };
            connection.queued = false;
            let pace = connection.serve(&mut self.store, wall);
            // One segment a call.
            while self
                .interface
                .poll_egress(now, device, &mut connection.sockets)
                != PollResult::None
            {}
            connection.due = self.interface.poll_at(now, &connection.sockets);
            if connection.has_ended() {
                self.served -= usize::from(connection.leave(&mut self.store));
            }
            match connection.state() {
                // A connection that still listens had a SYN that smoltcp refused.
                tcp::State::Closed | tcp::State::Listen => self.remove(index),
                // Stray segments can do no harm to a client that was never served, and its place is wanted.
                tcp::State::TimeWait if connection.turned_away => self.remove(index),
                _ if pace == Pace::More => self.queue(index),
                _ => {}
            }
        }
        if self.work.is_empty() {
            Turn::Done
        } else {
            Turn::More
        }
    }

    fn remove(&mut self, index: u16) {
        if let Some(mut connection) = self.connections[usize::from(index)].take() {
            self.flows.remove(connection.flow);
            self.turned_away -= u16::from(connection.turned_away);
            self.served -= usize::from(connection.leave(&mut self.store));
            self.free.push(index);
        }
    }
}
