//! Both gateways against a small TCP/IP peer in the guest's place, over a link and over a TAP in a namespace.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::{Socket, tcp};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use super::over_link::{Device, now};
use super::*;
use crate::backends::link;
use crate::backends::tap::{TapConfig, TapError};
use crate::backends::wait::{Moment, Waiter};
use crate::demo::namespace::{self, Entered, Refused};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Sends back what it gets, and ends when the caller has ended.
const ECHO: u16 = 6379;
/// Greets, ends its own side, and counts what it gets until the caller ends.
const GREETER: u16 = 6380;
/// Resets the connection at the first byte.
const RESETTER: u16 = 6381;
/// Nobody listens.
const CLOSED: u16 = 6382;
/// Takes nothing and says nothing.
const DEAF: u16 = 6383;

/// A guest's TCP/IP without a guest.
struct Peer {
    shared: Arc<(Wake, AtomicBool, AtomicU64)>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn start(port: NetPort, service: u16) -> Self {
        let shared = Arc::new((
            Wake::new().unwrap(),
            AtomicBool::new(false),
            AtomicU64::new(0),
        ));
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || serve(port, service, &theirs));
        Self {
            shared,
            thread: Some(thread),
        }
    }

    fn received(&self) -> u64 {
        self.shared.2.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.1.store(true, Ordering::SeqCst);
        self.shared.0.ring();
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

fn serve(port: NetPort, service: u16, (wake, stop, received): &(Wake, AtomicBool, AtomicU64)) {
    let mut device = Device::new(port, 1500);
    let config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 2]).into());
    let mut interface = Interface::new(config, &mut device, now());
    interface.update_ip_addrs(|addresses| {
        addresses
            .push(IpCidr::new(IpAddress::Ipv4(GUEST), 24))
            .unwrap();
    });
    let mut sockets = SocketSet::new(Vec::new());
    for _ in 0..if service == CLOSED {
        0
    } else {
        MAX_CONNECTIONS
    } {
        let buffer = || tcp::SocketBuffer::new(vec![0; 16 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.listen(service).unwrap();
        sockets.add(socket);
    }
    let mut greeted = vec![false; MAX_CONNECTIONS];
    let mut waiter = Waiter::new();
    while !stop.load(Ordering::SeqCst) {
        wake.clear();
        loop {
            device.cable.flush();
            interface.poll(now(), &mut device, &mut sockets);
            let mut progress = false;
            for ((_, socket), greeted) in sockets.iter_mut().zip(&mut greeted) {
                let Socket::Tcp(socket) = socket;
                progress |= attend(socket, service, greeted, received);
            }
            if !progress {
                break;
            }
        }
        waiter.clear();
        waiter.add(wake, true, false);
        device.cable.watch(&mut waiter);
        let delay = interface.poll_delay(now(), &sockets);
        waiter.wait(delay.map(Into::into)).unwrap();
    }
}

fn attend(
    socket: &mut tcp::Socket<'_>,
    service: u16,
    greeted: &mut bool,
    received: &AtomicU64,
) -> bool {
    if socket.state() == tcp::State::Closed || !(socket.is_open() || socket.can_recv()) {
        // The next caller.
        *greeted = false;
        socket.abort();
        return socket.listen(service).is_ok();
    }
    let mut progress = false;
    match service {
        ECHO => {
            while socket.can_recv() && socket.can_send() {
                let room = socket.send_capacity() - socket.send_queue();
                let data = socket
                    .recv(|data| {
                        let data = data[..data.len().min(room)].to_vec();
                        (data.len(), data)
                    })
                    .unwrap();
                assert_eq!(socket.send_slice(&data).unwrap(), data.len());
                progress = true;
            }
        }
        GREETER => {
            if socket.may_send() && !*greeted {
                *greeted = true;
                socket.send_slice(b"hello").unwrap();
                socket.close();
                progress = true;
            }
            while socket.can_recv() {
                let count = socket.recv(|data| (data.len(), data.len())).unwrap();
                received.fetch_add(count as u64, Ordering::SeqCst);
                progress = true;
            }
        }
        RESETTER if socket.can_recv() => {
            socket.abort();
            progress = true;
        }
        _ => {}
    }
    if service != DEAF && socket.state() == tcp::State::CloseWait && !socket.can_recv() {
        socket.close();
        progress = true;
    }
    progress
}

const HOST: LinkHost = LinkHost {
    address: Ipv4Network {
        address: Ipv4Addr::new(10, 77, 0, 1),
        prefix: 24,
    },
    mac: [2, 0, 0, 0, 0, 1],
    mtu: 1500,
};

fn linked(service: u16) -> (Gateway, Peer) {
    let (ours, theirs) = link::pair().unwrap();
    let peer = Peer::start(theirs, service);
    let guest = SocketAddrV4::new(GUEST, service);
    let gateway = Gateway::over_link(bind(0).unwrap(), ours, HOST, guest).unwrap();
    (gateway, peer)
}

/// `None`, with a word, where this process may not make a TAP.
fn spliced(service: u16) -> Option<(Gateway, Peer)> {
    let listener = bind(0).unwrap();
    // A thread of its own: it moves into the namespace, and the gateway's thread is born there.
    std::thread::spawn(move || {
        let config = TapConfig {
            name: "doppel0".to_owned(),
            address: Some(HOST.address),
            mtu: 1500,
        };
        match namespace::enter(&config) {
            Ok(Entered { tap, .. }) => {
                let peer = Peer::start(tap.into_port(), service);
                let guest = SocketAddrV4::new(GUEST, service);
                Some((Gateway::spliced(listener, guest).unwrap(), peer))
            }
            Err(
                refused @ (Refused::Tap(TapError::NoDevice | TapError::DeviceDenied)
                | Refused::Threads { .. }),
            ) => {
                eprintln!("skipped over a TAP: {refused}");
                None
            }
            Err(refused) => panic!("{refused}"),
        }
    })
    .join()
    .unwrap()
}

/// Runs a test over both.
fn both(service: u16, test: impl Fn(&Gateway, &Peer)) {
    let over_link = linked(service);
    let over_tap = spliced(service);
    for (gateway, peer) in std::iter::once(over_link).chain(over_tap) {
        test(&gateway, &peer);
        gateway.stop().unwrap();
    }
}

fn call(gateway: &Gateway) -> TcpStream {
    let stream = TcpStream::connect(gateway.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(length)
    .collect()
}

#[test]
fn as_many_connections_as_it_carries_keep_their_bytes_apart() {
    both(ECHO, |gateway, _| {
        let mut callers: Vec<_> = (0..MAX_CONNECTIONS).map(|_| call(gateway)).collect();
        for round in 0..3 {
            for (number, caller) in callers.iter_mut().enumerate() {
                caller
                    .write_all(&bytes((number * 3 + round) as u64, 100))
                    .unwrap();
            }
            for (number, caller) in callers.iter_mut().enumerate() {
                let mut echo = vec![0; 100];
                caller.read_exact(&mut echo).unwrap();
                assert_eq!(echo, bytes((number * 3 + round) as u64, 100));
            }
        }
        let traffic = gateway.traffic();
        assert_eq!(traffic.accepted, MAX_CONNECTIONS as u64);
        assert_eq!(traffic.open, MAX_CONNECTIONS as u64);
        assert_eq!(traffic.broken_by_guest, 0);
    });
}

#[test]
fn a_large_value_goes_both_ways_and_its_end_is_carried() {
    both(ECHO, |gateway, _| {
        let caller = call(gateway);
        let value = bytes(7, 3 << 20);
        let echo = std::thread::scope(|scope| {
            let mut half = caller.try_clone().unwrap();
            let value = &value;
            scope.spawn(move || {
                half.write_all(value).unwrap();
                half.shutdown(Shutdown::Write).unwrap();
            });
            let mut echo = Vec::new();
            (&caller).read_to_end(&mut echo).unwrap();
            echo
        });
        assert!(echo == value, "{} bytes came back", echo.len());
    });
}

#[test]
fn the_guest_may_end_first() {
    both(GREETER, |gateway, peer| {
        let mut caller = call(gateway);
        let mut greeting = String::new();
        caller.read_to_string(&mut greeting).unwrap();
        assert_eq!(greeting, "hello");
        let before = peer.received();
        caller.write_all(&bytes(1, 200_000)).unwrap();
        drop(caller);
        let limit = Moment::now().plus(Duration::from_secs(20));
        while peer.received() < before + 200_000 {
            assert!(Moment::now() < limit, "{} came", peer.received() - before);
            std::thread::yield_now();
        }
    });
}

#[test]
fn what_the_guest_refuses_or_resets_ends_for_the_caller_and_is_counted() {
    for service in [CLOSED, RESETTER] {
        both(service, |gateway, _| {
            let mut caller = call(gateway);
            // Refused, the connection may be gone before this; then the read tells.
            let _ = caller.write_all(b"x");
            let mut byte = [0];
            assert!(matches!(caller.read(&mut byte), Ok(0) | Err(_)));
            assert_eq!(gateway.traffic().broken_by_guest, 1);
        });
    }
}

#[test]
fn a_guest_that_takes_nothing_makes_the_caller_wait() {
    both(DEAF, |gateway, _| {
        let mut caller = call(gateway);
        caller.set_nonblocking(true).unwrap();
        let chunk = bytes(1, 64 << 10);
        let mut waiter = Waiter::new();
        waiter.add(&caller, false, true);
        let mut written = 0;
        // Full for a while is full: everything between is bounded.
        while waiter.wait(Some(Duration::from_millis(500))).unwrap() == 1 {
            written += caller.write(&chunk).unwrap();
            assert!(written < 64 << 20, "nothing holds the caller back");
        }
        assert!(gateway.traffic().bytes_in < written as u64);
    });
}

#[test]
fn round_trips_wait_for_no_clock() {
    both(ECHO, |gateway, _| {
        let mut caller = call(gateway);
        let mut byte = [0];
        caller.write_all(b"x").unwrap();
        caller.read_exact(&mut byte).unwrap();
        let mut times: Vec<_> = (0..200)
            .map(|_| {
                let before = Moment::now();
                caller.write_all(b"x").unwrap();
                caller.read_exact(&mut byte).unwrap();
                Moment::now().since(before)
            })
            .collect();
        times.sort();
        eprintln!("round trip p50 {:?} p90 {:?}", times[100], times[180]);
        // A loaded machine makes some slow; a sleep or a delayed acknowledgement would make most.
        assert!(times[100] < Duration::from_millis(5), "{:?}", times[100]);
    });
}

#[test]
fn stopping_frees_the_port_and_ends_callers() {
    for (gateway, peer) in std::iter::once(linked(ECHO)).chain(spliced(ECHO)) {
        let address = gateway.address();
        let mut caller = call(&gateway);
        caller.write_all(b"x").unwrap();
        caller.read_exact(&mut [0]).unwrap();
        let traffic = gateway.stop().unwrap();
        assert_eq!((traffic.accepted, traffic.open), (1, 0));
        assert_eq!((traffic.bytes_in, traffic.bytes_out), (1, 1));
        assert!(matches!(caller.read(&mut [0]), Ok(0) | Err(_)));
        assert!(TcpStream::connect(address).is_err());
        drop(peer);
    }
}

#[test]
fn the_end_of_the_guest_ends_the_gateway() {
    let (gateway, peer) = linked(ECHO);
    let mut caller = call(&gateway);
    caller.write_all(b"x").unwrap();
    caller.read_exact(&mut [0]).unwrap();
    drop(peer);
    assert!(matches!(caller.read(&mut [0]), Ok(0) | Err(_)));
    gateway.stop().unwrap();
}

#[test]
fn a_port_in_use_is_told() {
    let first = bind(0).unwrap();
    let port = first.local_addr().unwrap().port();
    let error = bind(port).unwrap_err();
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")));
}
