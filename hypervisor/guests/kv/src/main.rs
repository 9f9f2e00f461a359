//! The key-value guest: a server that speaks RESP (Redis) over TCP.
//!
//! Words: `ip=A.B.C.D/N` (needed), `gw=A.B.C.D`, `port=` (6379), `maxclients=` (256), `maxmemory=` bytes for keys and
//! values, with `k`, `m` or `g` (half of the free memory).
//!
//! The main loop makes one exit for each wake: the halt sends the frames of the last turn, waits, and reads the clock.
#![no_std]
#![no_main]

use guest_runtime::boot::WordError;
use guest_runtime::platform::{self, GuestTime, random};
use guest_runtime::virtio::Network;
use guest_runtime::{Boot, Outcome, console_line, interrupts, timer};
use kv_engine::{Config, Now, Store};
use kv_server::{Server, Settings, Turn};

guest_runtime::entry!(main);

/// The heartbeat of TCP's timers and of expiry.
const HEARTBEAT_HZ: u32 = 100;
const MOST_CLIENTS: u64 = 10_000;
/// Frames in each queue, where memory is plentiful and where it is not.
const FRAMES: u16 = 256;
const FEW_FRAMES: u16 = 32;
const SMALL_RAM: usize = 16 << 20;

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let (address, prefix) = words.network("ip")?.ok_or(WordError::new(
        "ip",
        "A.B.C.D/N, the address of this server",
    ))?;
    let port = u16::try_from(words.number_or("port", 6379)?).unwrap_or(0);
    let clients = words.number_or("maxclients", 256)?;
    if port == 0 {
        return Err(WordError::new("port", "1 to 65535").into());
    }
    if !(1..=MOST_CLIENTS).contains(&clients) {
        return Err(WordError::new("maxclients", "1 to 10000").into());
    }
    let small = boot.ram_bytes < SMALL_RAM;
    let mut network = Network::open(if small { FEW_FRAMES } else { FRAMES })?;
    let free = (boot.ram_bytes - boot.image_end) as u64;
    let store = Store::new(
        Config {
            seed: [random(), random()],
            maxmemory: words.number_or("maxmemory", free / 2)?,
            maxclients: clients as u16,
            ..Config::default()
        },
        Now::from_micros(boot.wall_clock / 1000),
    );
    let settings = Settings {
        mac: network.mac(),
        address,
        prefix,
        gateway: words.address("gw")?,
        port,
        clients: clients as u16,
        seed: random(),
        wall_clock: boot.wall_clock,
    };
    let mut server = Server::new(&settings, store, &mut network)?;
    let [a, b, c, d] = address;
    console_line!("kv: {a}.{b}.{c}.{d}:{port}");
    interrupts::open(1 << timer::LINE);
    timer::start(HEARTBEAT_HZ);
    loop {
        let mut time = platform::halt();
        while server.turn(nanoseconds(time), &mut network, Network::peek) == Turn::More {
            network.flush();
            time = platform::clock();
        }
    }
}

fn nanoseconds(GuestTime(nanoseconds): GuestTime) -> u64 {
    nanoseconds
}
