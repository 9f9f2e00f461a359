//! The server against clients made of smoltcp, over a wire in memory, with time as the tests say.

use crate::{Server, Settings, Turn};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use kv_engine::{Config, Now, Store};
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

type Frames = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of the wire. `next` is the frame that it will receive next.
struct End {
    next: Option<Vec<u8>>,
    from: Frames,
    to: Frames,
    sent: usize,
}

impl End {
    fn pair() -> (Self, Self) {
        let (a, b) = (Frames::default(), Frames::default());
        let end = |from: &Frames, to: &Frames| Self {
            next: None,
            from: from.clone(),
            to: to.clone(),
            sent: 0,
        };
        (end(&a, &b), end(&b, &a))
    }

    /// As a virtio device: frames come in at an exit.
    fn fetch(&mut self) {
        if self.next.is_none() {
            self.next = self.from.borrow_mut().pop_front();
        }
    }

    fn peek(&self) -> Option<&[u8]> {
        self.next.as_deref()
    }
}

struct Received(Vec<u8>);
impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sending<'a>(&'a Frames, &'a mut usize);
impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.borrow_mut().push_back(frame);
        *self.1 += 1;
        result
    }
}

impl Device for End {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        self.fetch();
        let frame = self.next.take()?;
        self.fetch();
        Some((Received(frame), Sending(&self.to, &mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&self.to, &mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

const SERVER: [u8; 4] = [10, 0, 0, 2];
const PORT: u16 = 6379;
const BUFFER: usize = 64 << 10;

/// A server and a host full of clients.
struct World {
    server: Server,
    server_end: End,
    host: Interface,
    host_end: End,
    sockets: SocketSet<'static>,
    time: u64,
    next_port: u16,
    /// Of the frames to the server, drop every n-th.
    lose: Option<usize>,
    carried: usize,
}

impl World {
    fn new(clients: u16) -> Self {
        let (mut server_end, mut host_end) = End::pair();
        let settings = Settings {
            mac: [2, 0, 0, 0, 0, 1],
            address: SERVER,
            prefix: 24,
            gateway: None,
            port: PORT,
            clients,
            seed: 7,
            wall_clock: 1_700_000_000_000_000_000,
        };
        let store = Store::new(Config::default(), Now::from_micros(1_700_000_000_000_000));
        let server = Server::new(&settings, store, &mut server_end).expect("memory");
        let config = smoltcp::iface::Config::new(EthernetAddress([2, 0, 0, 0, 0, 2]).into());
        let mut host = Interface::new(config, &mut host_end, Instant::ZERO);
        host.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(IpAddress::v4(10, 0, 0, 1), 24))
                .expect("room");
        });
        Self {
            server,
            server_end,
            host,
            host_end,
            sockets: SocketSet::new(Vec::new()),
            time: 0,
            next_port: 40_000,
            lose: None,
            carried: 0,
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        self.next_port += 1;
        socket
            .connect(
                self.host.context(),
                (IpAddress::v4(10, 0, 0, 2), PORT),
                self.next_port,
            )
            .expect("a fresh socket");
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// One exchange: the host sends, the server takes a turn, the host receives. Time goes on by a millisecond.
    fn step(&mut self) {
        self.time += 1_000_000;
        let now = Instant::from_micros((self.time / 1000) as i64);
        self.host.poll(now, &mut self.host_end, &mut self.sockets);
        if let Some(every) = self.lose {
            let carried = &mut self.carried;
            self.host_end.to.borrow_mut().retain(|_| {
                *carried += 1;
                !carried.is_multiple_of(every)
            });
        }
        self.server_end.fetch();
        while self.server.turn(self.time, &mut self.server_end, End::peek) == Turn::More {
            self.server_end.fetch();
        }
        self.host.poll(now, &mut self.host_end, &mut self.sockets);
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    /// Sends a request and gives the reply, once it has `length` bytes.
    fn ask(&mut self, handle: SocketHandle, request: &[u8], length: usize) -> Vec<u8> {
        let (mut sent, mut reply) = (0, Vec::new());
        for _ in 0..100_000 {
            let socket = self.socket(handle);
            if socket.can_send() {
                sent += socket.send_slice(&request[sent..]).expect("open");
            }
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        reply.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .expect("open");
            }
            if sent == request.len() && reply.len() >= length {
                return reply;
            }
            self.step();
        }
        panic!("{} of {length} bytes came", reply.len());
    }
}

fn set(key: &str, value: &[u8]) -> Vec<u8> {
    let mut request = format!(
        "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n",
        key.len(),
        value.len()
    )
    .into_bytes();
    request.extend_from_slice(value);
    request.extend_from_slice(b"\r\n");
    request
}

#[test]
fn a_client_sets_and_gets() {
    let mut world = World::new(4);
    let client = world.connect();
    assert_eq!(world.ask(client, b"PING\r\n", 7), b"+PONG\r\n");
    assert_eq!(world.ask(client, &set("a", b"xyz"), 5), b"+OK\r\n");
    assert_eq!(world.ask(client, b"GET a\r\n", 9), b"$3\r\nxyz\r\n");
}

#[test]
fn a_request_costs_one_frame_each_way() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, b"PING\r\n", 7);
    world.steps(3);
    let before = world.server_end.sent;
    for n in 1..=20 {
        let reply = format!(":{n}\r\n").into_bytes();
        assert_eq!(world.ask(client, b"INCR n\r\n", reply.len()), reply);
    }
    assert_eq!(
        world.server_end.sent - before,
        20,
        "the acknowledgement rides on the reply"
    );
}

#[test]
fn opening_a_connection_costs_one_frame() {
    let mut world = World::new(4);
    let first = world.connect();
    world.ask(first, b"PING\r\n", 7);
    let before = world.server_end.sent;
    let second = world.connect();
    world.steps(100);
    assert_eq!(world.socket(second).state(), tcp::State::Established);
    assert_eq!(world.server_end.sent - before, 1, "SYN and ACK");
    world.steps(70_000);
    let asked = world.server_end.sent - before - 1;
    assert!(
        asked >= 2,
        "after a minute both clients are asked for a sign of life"
    );
}

#[test]
fn many_requests_of_a_batch_share_frames() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, b"PING\r\n", 7);
    world.steps(3);
    let before = world.server_end.sent;
    // One hundred requests fit into one frame, and their replies too.
    world.ask(client, &b"PING\r\n".repeat(100), 700);
    assert_eq!(world.server_end.sent - before, 1);
}

#[test]
fn a_value_of_a_megabyte_goes_in_and_comes_out() {
    let mut world = World::new(4);
    let client = world.connect();
    let value: Vec<u8> = (0..1 << 20)
        .map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    assert_eq!(world.ask(client, &set("big", &value), 5), b"+OK\r\n");
    let head = format!("${}\r\n", value.len()).into_bytes();
    let reply = world.ask(client, b"GET big\r\n", head.len() + value.len() + 2);
    assert!(reply == [&head, &value[..], b"\r\n"].concat());
}

#[test]
fn deep_pipelines_are_answered_in_order() {
    let mut world = World::new(4);
    let client = world.connect();
    let requests: Vec<u8> = (0..20_000)
        .flat_map(|n| format!("ECHO {n}\r\n").into_bytes())
        .collect();
    let expected: Vec<u8> = (0..20_000)
        .map(|n| format!("{n}"))
        .flat_map(|text| format!("${}\r\n{text}\r\n", text.len()).into_bytes())
        .collect();
    assert!(world.ask(client, &requests, expected.len()) == expected);
}

#[test]
fn a_client_that_does_not_read_is_held_back_and_loses_nothing() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, &set("v", &[b'x'; 10_000]), 5);
    // 400 replies of 10,000 bytes, while the client's window takes 64 KiB and nobody reads.
    let request = b"GET v\r\n".repeat(400);
    let sent = world.socket(client).send_slice(&request).expect("open");
    assert_eq!(sent, request.len());
    world.steps(50);
    let other = world.connect();
    assert_eq!(
        world.ask(other, b"PING\r\n", 7),
        b"+PONG\r\n",
        "others are served meanwhile"
    );
    let reply = world.ask(client, b"", 400 * 10_010);
    assert_eq!(reply.len(), 400 * 10_010);
    assert!(
        reply
            .chunks(10_010)
            .all(|one| one.starts_with(b"$10000\r\nxx") && one.ends_with(b"x\r\n"))
    );
}

#[test]
fn clients_beyond_the_limit_are_turned_away_until_one_leaves() {
    let mut world = World::new(40);
    let clients: Vec<_> = (0..40).map(|_| world.connect()).collect();
    for client in &clients {
        assert_eq!(world.ask(*client, b"PING\r\n", 7), b"+PONG\r\n");
    }
    // As many are told why as there is room to tell; one more is refused without a word.
    let told: Vec<_> = (0..64).map(|_| world.connect()).collect();
    let refused = world.connect();
    let words = b"-ERR max number of clients reached\r\n";
    for client in &told {
        assert_eq!(world.ask(*client, b"PING\r\n", words.len()), words);
    }
    world.steps(5);
    assert_eq!(world.socket(refused).state(), tcp::State::Closed);
    for client in &told {
        assert_eq!(world.socket(*client).state(), tcp::State::CloseWait);
    }
    assert_eq!(world.server.connections(), 104);
    for client in told {
        world.socket(client).close();
    }
    world.steps(5);
    assert_eq!(world.server.connections(), 40);
    world.socket(clients[17]).close();
    world.steps(5);
    assert_eq!(world.server.connections(), 39);
    let accepted = world.connect();
    assert_eq!(world.ask(accepted, b"PING\r\n", 7), b"+PONG\r\n");
}

#[test]
fn clients_that_leave_make_room_at_once() {
    let mut world = World::new(40);
    let mut clients: Vec<_> = (0..40).map(|_| world.connect()).collect();
    for round in 0..3 {
        for client in &clients {
            assert_eq!(world.ask(*client, b"PING\r\n", 7), b"+PONG\r\n", "{round}");
        }
        // They end and others open in one wake of the server, with a command still to be read.
        for client in clients {
            let count = world
                .socket(client)
                .send_slice(b"INCR n\r\n")
                .expect("open");
            assert_eq!(count, 8);
            world.socket(client).close();
        }
        clients = (0..40).map(|_| world.connect()).collect();
    }
    let number = world.ask(clients[0], b"GET n\r\n", 9);
    assert_eq!(number, b"$3\r\n120\r\n"[..9]);
    let told = world.ask(clients[0], b"INFO clients\r\n", 100);
    let told = core::str::from_utf8(&told).expect("text");
    assert!(told.contains("connected_clients:40\r\n"), "{told}");
}

#[test]
fn quit_and_protocol_errors_close_after_the_reply() {
    for (request, reply) in [
        (&b"PING\r\nQUIT\r\nPING\r\n"[..], &b"+PONG\r\n+OK\r\n"[..]),
        (
            b"*1\r\nx\r\n",
            b"-ERR Protocol error: expected '$', got 'x'\r\n",
        ),
    ] {
        let mut world = World::new(4);
        let client = world.connect();
        assert_eq!(world.ask(client, request, reply.len()), reply);
        world.steps(5);
        assert_eq!(world.socket(client).state(), tcp::State::CloseWait);
        world.socket(client).close();
        world.steps(20_000);
        assert_eq!(world.server.connections(), 0);
    }
}

#[test]
fn a_client_that_shuts_its_side_still_gets_its_replies() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, &set("v", &[b'x'; 100_000]), 5);
    let request = b"GET v\r\nGET v\r\n";
    world.socket(client).send_slice(request).expect("open");
    world.socket(client).close();
    let reply = world.ask(client, b"", 2 * 100_011);
    assert_eq!(reply.len(), 2 * 100_011);
    world.steps(5);
    assert_eq!(world.server.connections(), 0);
}

#[test]
fn a_reset_frees_the_connection_at_once() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, b"PING\r\n", 7);
    assert_eq!(world.server.connections(), 1);
    world.socket(client).abort();
    world.steps(2);
    assert_eq!(world.server.connections(), 0);
}

#[test]
fn a_client_that_opens_and_vanishes_is_forgotten() {
    let mut world = World::new(4);
    let client = world.connect();
    // The SYN is carried, everything after it is lost.
    world.step();
    world.sockets.remove(client);
    world.host.update_ip_addrs(|addresses| addresses.clear());
    world.steps(11_000);
    assert_eq!(world.server.connections(), 0);
}

#[test]
fn lost_frames_are_sent_again() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, b"PING\r\n", 7);
    world.lose = Some(7);
    let value = vec![b'y'; 200_000];
    assert_eq!(world.ask(client, &set("v", &value), 5), b"+OK\r\n");
    assert_eq!(world.ask(client, b"STRLEN v\r\n", 9), b":200000\r\n");
}

#[test]
fn keys_expire_by_the_guests_clock() {
    let mut world = World::new(4);
    let client = world.connect();
    assert_eq!(world.ask(client, b"SET k v PX 500\r\n", 5), b"+OK\r\n");
    world.steps(300);
    assert_eq!(world.ask(client, b"GET k\r\n", 7), b"$1\r\nv\r\n");
    world.steps(300);
    assert_eq!(
        world.ask(client, b"DBSIZE\r\n", 4),
        b":0\r\n",
        "expired without being asked for"
    );
}

#[test]
fn frames_that_are_nobodys_do_no_harm() {
    let mut world = World::new(4);
    let client = world.connect();
    world.ask(client, b"PING\r\n", 7);
    for length in 0..80 {
        for fill in [0x00, 0x45, 0xff] {
            let mut frame = vec![fill; length];
            if length > 14 {
                frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                frame[12..14].copy_from_slice(&[8, 0]);
                frame[14] = 0x45;
            }
            world.host_end.to.borrow_mut().push_back(frame);
        }
        world.step();
    }
    assert_eq!(world.ask(client, b"PING\r\n", 7), b"+PONG\r\n");
}
