//! The gateway over a Unix-socket link: a TCP/IP end in user space (smoltcp) on the host's side.
//!
//! ```text
//!  Flow:  stream (kernel) ── read ──▶ socket's send buffer ── frames ──▶ link
//!                         ◀─ write ── socket's receive buffer ◀─ frames ──
//! ```
//! A direction ends when its source has: the stream's end of file closes the socket's sending half, the guest's
//! FIN shuts the stream's sending half down. A flow ends when both have, or when either side broke.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::Ordering;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use super::{Counters, Door, GatewayError, LinkHost, MAX_CONNECTIONS, Shared, not_now, wait};
use crate::backends::wait::{Moment, Waiter};
use crate::backends::{ETHERNET_HEADER, NetPort, longest_frame};

/// Bytes of each of a flow's two socket buffers. The guest's window is the narrower one in practice; 64 KiB
/// keeps the link full at the 100 µs and more that a round trip through a guest takes. Too small shows as
/// slow 1 MiB values, too large as memory (twice this for each connection, once used).
const BUFFER: usize = 64 << 10;

/// Frames kept while the link's queue is full; the TCP/IP makes no more until they have gone. Answers to
/// received frames still are made, hence more than one.
const MAX_PENDING: usize = 512;

/// First of the ports the gateway's own end uses, and how many there are.
const LOCAL_PORTS: (u16, u16) = (49_152, 16_384);

/// Serves until asked to stop or until the guest's end of the link is closed by everybody.
pub(super) fn run(
    listener: TcpListener,
    port: NetPort,
    host: LinkHost,
    guest: SocketAddrV4,
    shared: &Shared,
) -> Result<(), GatewayError> {
    let mut end = End::new(listener, port, host, guest, shared);
    let mut waiter = Waiter::new();
    loop {
        end.wait(&mut waiter)?;
        shared.wake.clear();
        if shared.stop.load(Ordering::Acquire) {
            end.abort_all();
            return Ok(());
        }
        end.accept_waiting();
        end.turn();
        if end.device.cable.closed {
            end.abort_all();
            return Ok(());
        }
    }
}

/// One connection carried.
struct Flow {
    stream: TcpStream,
    handle: SocketHandle,
    /// The stream has said all it will.
    stream_ended: bool,
    /// The stream has been told that the guest said all it will.
    guest_ended: bool,
    /// Either side broke, or both have ended: to be removed once the last frame is out.
    over: bool,
    /// The wait found the stream failed.
    failed: bool,
}

struct End<'a> {
    door: Door,
    guest: SocketAddrV4,
    device: Device,
    interface: Interface,
    sockets: SocketSet<'static>,
    flows: Vec<Flow>,
    next_port: u16,
    shared: &'a Shared,
}

pub(super) fn now() -> Instant {
    Instant::from_micros((Moment::now().as_nanos() / 1000) as i64)
}

impl<'a> End<'a> {
    fn new(
        listener: TcpListener,
        port: NetPort,
        host: LinkHost,
        guest: SocketAddrV4,
        shared: &'a Shared,
    ) -> Self {
        let mut device = Device::new(port, host.mtu);
        let mut config = Config::new(EthernetAddress(host.mac).into());
        // Sequence numbers and ports that an earlier gateway's connections, which the guest may still
        // remember, are unlikely to have had.
        config.random_seed = RandomState::new().hash_one("gateway");
        let next_port = (config.random_seed >> 32) as u16 % LOCAL_PORTS.1;
        let mut interface = Interface::new(config, &mut device, now());
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::Ipv4(Ipv4Cidr::new(host.address.address, host.address.prefix));
            // A new interface has no address and room for two.
            let _ = addresses.push(own);
        });
        Self {
            door: Door::new(listener),
            guest,
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            flows: Vec::new(),
            next_port,
            shared,
        }
    }

    /// Waits until something can be done.
    fn wait(&mut self, waiter: &mut Waiter) -> Result<(), GatewayError> {
        waiter.clear();
        waiter.add(&self.shared.wake, true, false);
        self.device.cable.watch(waiter);
        if self.flows.len() < MAX_CONNECTIONS {
            self.door.watch(waiter);
        }
        let mut indices = Vec::with_capacity(self.flows.len());
        for flow in &self.flows {
            let socket = self.sockets.get::<tcp::Socket>(flow.handle);
            let read = !flow.stream_ended && socket.can_send();
            let write = socket.can_recv();
            // With nothing to do, watch for a reset only; not once a direction has ended, because a stream
            // whose both directions have is reported for ever.
            let idle = !flow.stream_ended && !flow.guest_ended;
            let watch = !flow.over && (read || write || idle);
            indices.push(watch.then(|| waiter.add(&flow.stream, read, write)));
        }
        // While the link is full the TCP/IP can do nothing, whatever its timers say.
        let timeout = if self.device.cable.is_blocked() {
            None
        } else {
            self.interface.poll_delay(now(), &self.sockets)
        };
        wait(waiter, self.door.limit(timeout.map(Into::into)))?;
        for (flow, index) in self.flows.iter_mut().zip(indices) {
            flow.failed = index.is_some_and(|index| waiter.ready(index).failed);
        }
        Ok(())
    }

    fn accept_waiting(&mut self) {
        while self.flows.len() < MAX_CONNECTIONS
            && let Some(stream) = self.door.accept()
        {
            Counters::add(&self.shared.counters.accepted, 1);
            let mut socket = tcp::Socket::new(
                tcp::SocketBuffer::new(vec![0; BUFFER]),
                tcp::SocketBuffer::new(vec![0; BUFFER]),
            );
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(None);
            let local = self.free_port();
            if let Err(error) = socket.connect(self.interface.context(), self.guest, local) {
                tracing::warn!("no connection to the guest at {}: {error}", self.guest);
                Counters::add(&self.shared.counters.broken_by_guest, 1);
                continue;
            }
            self.flows.push(Flow {
                stream,
                handle: self.sockets.add(socket),
                stream_ended: false,
                guest_ended: false,
                over: false,
                failed: false,
            });
        }
        self.count_open();
    }

    /// The next local port that no flow uses: there are many more ports than flows.
    fn free_port(&mut self) -> u16 {
        loop {
            let port = LOCAL_PORTS.0 + self.next_port;
            self.next_port = (self.next_port + 1) % LOCAL_PORTS.1;
            let used = self.sockets.iter().any(|(_, socket)| {
                let smoltcp::socket::Socket::Tcp(socket) = socket;
                socket
                    .local_endpoint()
                    .is_some_and(|local| local.port == port)
            });
            if !used {
                return port;
            }
        }
    }

    /// Does everything that can be done without waiting.
    fn turn(&mut self) {
        self.device.cable.flush();
        loop {
            self.interface
                .poll(now(), &mut self.device, &mut self.sockets);
            self.reap();
            let mut progress = false;
            for flow in self.flows.iter_mut().filter(|flow| !flow.over) {
                let socket = self.sockets.get_mut::<tcp::Socket>(flow.handle);
                progress |= flow.carry(socket, &self.shared.counters);
            }
            if !progress {
                return;
            }
        }
    }

    /// Removes the flows that are over, once the TCP/IP has had its chance to say so to the guest.
    fn reap(&mut self) {
        if self.device.cable.is_blocked() {
            return;
        }
        let sockets = &mut self.sockets;
        self.flows.retain(|flow| {
            if flow.over {
                sockets.remove(flow.handle);
            }
            !flow.over
        });
        self.count_open();
    }

    fn abort_all(&mut self) {
        for (_, socket) in self.sockets.iter_mut() {
            let smoltcp::socket::Socket::Tcp(socket) = socket;
            socket.abort();
        }
        self.interface
            .poll(now(), &mut self.device, &mut self.sockets);
        self.flows.clear();
        self.count_open();
    }

    fn count_open(&self) {
        let open = self.flows.iter().filter(|flow| !flow.over).count();
        let counter = &self.shared.counters.open;
        counter.store(open as u64, Ordering::Relaxed);
    }
}

impl Flow {
    /// Carries what can be carried, both ways. Says whether anything changed.
    fn carry(&mut self, socket: &mut tcp::Socket<'_>, counters: &Counters) -> bool {
        let mut progress = self.carry_in(socket, counters);
        progress |= self.carry_out(socket, counters);
        if self.over {
            return true;
        }
        let guest_done = match socket.state() {
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait => true,
            State::Closed => {
                // Only a reset (or a refusal) leads here before we have seen both ends.
                if !(self.stream_ended && self.guest_ended) {
                    Counters::add(&counters.broken_by_guest, 1);
                }
                self.over = true;
                return true;
            }
            _ => false,
        };
        if guest_done && !socket.can_recv() && !self.guest_ended {
            self.guest_ended = true;
            progress = true;
            // It fails only if the stream is gone, which its next read tells.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.stream_ended && self.guest_ended && socket.state() == State::TimeWait {
            self.over = true;
            return true;
        }
        if self.failed && !self.stream_ended {
            // Nothing was left to read, or reading would have told.
            self.break_off(socket);
            return true;
        }
        progress
    }

    fn carry_in(&mut self, socket: &mut tcp::Socket<'_>, counters: &Counters) -> bool {
        let mut progress = false;
        while !self.stream_ended && !self.over && socket.can_send() {
            let mut got = Ok(0);
            let sent = socket.send(|room| {
                got = self.stream.read(room);
                (*got.as_ref().unwrap_or(&0), ())
            });
            match (sent, got) {
                (Ok(()), Ok(0)) => {
                    self.stream_ended = true;
                    socket.close();
                    progress = true;
                }
                (Ok(()), Ok(count)) => {
                    Counters::add(&counters.bytes_in, count);
                    progress = true;
                }
                (Ok(()), Err(error)) if not_now(&error) => break,
                _ => {
                    self.break_off(socket);
                    progress = true;
                }
            }
        }
        progress
    }

    fn carry_out(&mut self, socket: &mut tcp::Socket<'_>, counters: &Counters) -> bool {
        let mut progress = false;
        while !self.over && socket.can_recv() {
            let mut put = Ok(0);
            let received = socket.recv(|data| {
                put = self.stream.write(data);
                (*put.as_ref().unwrap_or(&0), ())
            });
            match (received, put) {
                (Ok(()), Ok(count)) if count > 0 => {
                    Counters::add(&counters.bytes_out, count);
                    progress = true;
                }
                (Ok(()), Err(error)) if not_now(&error) => break,
                _ => {
                    self.break_off(socket);
                    progress = true;
                }
            }
        }
        progress
    }

    /// The stream is gone: tell the guest by a reset.
    fn break_off(&mut self, socket: &mut tcp::Socket<'_>) {
        socket.abort();
        self.over = true;
    }
}

/// The link as smoltcp sees it.
pub(super) struct Device {
    mtu: usize,
    /// The frame being received.
    slot: Vec<u8>,
    pub(super) cable: Cable,
}

/// The sending side, apart from the slot: an answer is sent while a received frame is looked at.
pub(super) struct Cable {
    port: NetPort,
    /// Frames the link had no room for, in order.
    pending: VecDeque<Vec<u8>>,
    /// Nobody holds the link's other end any more.
    closed: bool,
}

impl Device {
    pub(super) fn new(port: NetPort, mtu: u16) -> Self {
        let mtu = usize::from(mtu);
        Self {
            mtu,
            slot: vec![0; longest_frame(mtu)],
            cable: Cable {
                port,
                pending: VecDeque::new(),
                closed: false,
            },
        }
    }
}

impl Cable {
    /// Adds the link to what is waited for.
    pub(super) fn watch(&self, waiter: &mut Waiter) {
        waiter.add(&self.port, self.may_receive(), self.is_blocked());
    }

    /// Whether frames wait for room in the link.
    fn is_blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    pub(super) fn flush(&mut self) {
        while let Some(frame) = self.pending.pop_front() {
            if !self.offer(&frame) {
                self.pending.push_front(frame);
                return;
            }
        }
    }

    /// Whether the frame is off our hands.
    fn offer(&mut self, frame: &[u8]) -> bool {
        self.port.write(frame).unwrap_or_else(|error| {
            self.end(&error);
            true
        })
    }

    fn send(&mut self, frame: Vec<u8>) {
        if self.is_blocked() || !self.offer(&frame) {
            self.pending.push_back(frame);
        }
    }

    fn end(&mut self, error: &io::Error) {
        tracing::debug!("the guest's link: {error}");
        self.closed = true;
    }

    fn may_receive(&self) -> bool {
        !self.closed && self.pending.len() < MAX_PENDING
    }
}

impl phy::Device for Device {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        if !self.cable.may_receive() {
            return None;
        }
        match self.cable.port.read_into(&mut self.slot) {
            Ok(length) => Some((Received(&self.slot[..length?]), Sending(&mut self.cable))),
            Err(error) => {
                self.cable.end(&error);
                None
            }
        }
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        let free = !self.cable.is_blocked() && !self.cable.closed;
        free.then_some(Sending(&mut self.cable))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_HEADER + self.mtu;
        capabilities
    }
}

pub(super) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, look: F) -> R {
        look(self.0)
    }
}

pub(super) struct Sending<'a>(&'a mut Cable);

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let result = fill(&mut frame);
        self.0.send(frame);
        result
    }
}
