//! Serves the engine on a loopback TCP port, for tests with real clients: `serve [PORT [MAXMEMORY]]`.
//!
//! Port 0, the default, lets the system choose. The port is printed on the first line.
use std::env;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kv_engine::{Config, Limits, Now, Output, Peer, State, Store};

/// How many keys one expiry cycle looks at: some 100 µs of work.
const EXPIRE_BUDGET: usize = 1000;
/// How much is read from a connection at once.
const CHUNK: usize = 64 << 10;

fn now() -> Now {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Now::from_micros(since.as_micros() as u64)
}

fn serve(mut stream: TcpStream, store: &Mutex<Store>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = Peer {
        remote: stream.peer_addr()?,
        local: stream.local_addr()?,
    };
    let lock = || store.lock().unwrap_or_else(PoisonError::into_inner);
    let mut session = lock().connect(Some(peer), now());
    let mut out = Output::new();
    let mut chunk = vec![0; CHUNK];
    let outcome = 'connection: loop {
        let mut input = match stream.read(&mut chunk) {
            Ok(0) => break Ok(()),
            Ok(length) => &chunk[..length],
            Err(error) => break Err(error),
        };
        loop {
            let progress = session.run(&mut lock(), now(), input, &mut out, Limits::default());
            input = &input[progress.consumed..];
            if let Err(error) = stream.write_all(out.pending()) {
                break 'connection Err(error);
            }
            out.consume(out.len());
            match progress.state {
                State::NeedInput => break,
                State::OutputFull | State::Paused => {}
                State::Close => break 'connection Ok(()),
            }
        }
    };
    session.close(&mut lock());
    outcome
}

fn main() -> io::Result<()> {
    let mut args = env::args().skip(1).map(|text| text.parse::<u64>());
    let mut number = || args.next().unwrap_or(Ok(0)).map_err(io::Error::other);
    let (port, maxmemory) = (number()?, number()?);
    let port = u16::try_from(port).map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    println!("{}", listener.local_addr()?.port());
    let config = Config {
        maxmemory,
        ..Config::default()
    };
    let store = Arc::new(Mutex::new(Store::new(config, now())));
    let keys = Arc::clone(&store);
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(100));
            let mut keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
            while keys.expire_cycle(now(), EXPIRE_BUDGET).more {}
        }
    });
    for stream in listener.incoming() {
        let (stream, store) = (stream?, Arc::clone(&store));
        thread::spawn(move || {
            // A connection that breaks is of no interest to the others.
            drop(serve(stream, &store));
        });
    }
    Ok(())
}
