//! The client against a real redis-server, and against a server that misbehaves in every way it must notice.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use super::*;

/// What the server does wrong, once its so-manyth command of the kind comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Acknowledges a SET and does not do it.
    ForgetsSet(u32),
    /// Counts INCR twice.
    CountsTwice(u32),
    /// Closes the connection instead of answering.
    HangsUp(u32),
    /// Does not answer anybody for this long.
    Stalls(u32, Duration),
    /// Never answers anybody again.
    FallsSilent(u32),
    /// Answers with an error, and does nothing.
    Refuses(u32),
    /// Answers with bytes that are no reply.
    Babbles(u32),
}

#[derive(Debug)]
struct Store {
    values: HashMap<Vec<u8>, Vec<u8>>,
    commands: u32,
    fault: Fault,
}

/// A server of as many commands as the client uses.
struct Fake {
    address: SocketAddrV4,
    store: Arc<Mutex<Store>>,
}

impl Fake {
    fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
            panic!("not IPv4")
        };
        let store = Arc::new(Mutex::new(Store {
            values: HashMap::new(),
            commands: 0,
            fault,
        }));
        let theirs = Arc::clone(&store);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let store = Arc::clone(&theirs);
                std::thread::spawn(move || serve(stream.unwrap(), &store));
            }
        });
        Self { address, store }
    }

    /// Changes what is stored under the first key, in order of names, that `change` has something to say about.
    fn tamper(&self, change: impl Fn(&str, &mut Vec<u8>) -> bool) {
        let mut store = self.store.lock().unwrap();
        let mut keys: Vec<_> = store.values.keys().cloned().collect();
        keys.sort();
        let changed = keys.iter().any(|key| {
            let name = String::from_utf8(key.clone()).unwrap();
            change(&name, store.values.get_mut(key).unwrap())
        });
        assert!(changed, "nothing to change among {} keys", keys.len());
    }
}

fn serve(mut stream: TcpStream, store: &Mutex<Store>) {
    let mut input = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        while let Some((words, used)) = parse(&input) {
            input.drain(..used);
            let Some(reply) = answer(&words, &mut store.lock().unwrap()) else {
                return;
            };
            if stream.write_all(&reply).is_err() {
                return;
            }
        }
        match stream.read(&mut chunk) {
            Ok(count) if count > 0 => input.extend_from_slice(&chunk[..count]),
            _ => return,
        }
    }
}

fn parse(input: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut at = 0;
    let mut line = |input: &[u8]| {
        let end = input[at..].windows(2).position(|pair| pair == b"\r\n")?;
        let text = std::str::from_utf8(&input[at + 1..at + end]).unwrap();
        at += end + 2;
        Some((text.parse::<usize>().unwrap(), at))
    };
    let (count, mut start) = line(input)?;
    let mut words = Vec::new();
    for _ in 0..count {
        let rest = &input[start..];
        let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
        let length: usize = std::str::from_utf8(&rest[1..end]).unwrap().parse().unwrap();
        let value = start + end + 2;
        words.push(input.get(value..value + length)?.to_vec());
        start = value + length + 2;
        if start > input.len() {
            return None;
        }
    }
    Some((words, start))
}

/// `None` hangs up.
fn answer(words: &[Vec<u8>], store: &mut Store) -> Option<Vec<u8>> {
    store.commands += 1;
    let count = store.commands;
    let mut forgets = false;
    let mut step = 1;
    match store.fault {
        Fault::ForgetsSet(at) => forgets = count >= at && words[0] == b"SET",
        Fault::CountsTwice(at) if count >= at && words[0] == b"INCR" => step = 2,
        Fault::HangsUp(at) if count == at => return None,
        Fault::Stalls(at, time) if count == at => std::thread::sleep(time),
        Fault::FallsSilent(at) if count >= at => return Some(Vec::new()),
        Fault::Refuses(at) if count >= at && words[0] == b"SET" => {
            return Some(b"-OOM command not allowed\r\n".to_vec());
        }
        Fault::Babbles(at) if count == at => return Some(b"what?\r\n".to_vec()),
        _ => {}
    }
    if forgets || step == 2 {
        store.fault = Fault::None;
    }
    let key = words.get(1).cloned().unwrap_or_default();
    let reply = match &words[0][..] {
        b"PING" => "+PONG\r\n".to_owned().into_bytes(),
        b"SET" => {
            if !forgets {
                store.values.insert(key, words[2].clone());
            }
            b"+OK\r\n".to_vec()
        }
        b"GET" => match store.values.get(&key) {
            None => b"$-1\r\n".to_vec(),
            Some(value) => {
                let mut reply = format!("${}\r\n", value.len()).into_bytes();
                reply.extend_from_slice(value);
                reply.extend_from_slice(b"\r\n");
                reply
            }
        },
        b"INCR" => {
            let value = store.values.entry(key).or_insert_with(|| b"0".to_vec());
            let number: i64 = std::str::from_utf8(value).unwrap().parse().unwrap();
            *value = (number + step).to_string().into_bytes();
            format!(":{}\r\n", number + step).into_bytes()
        }
        b"APPEND" => {
            let value = store.values.entry(key).or_default();
            value.extend_from_slice(&words[2]);
            format!(":{}\r\n", value.len()).into_bytes()
        }
        other => panic!("the client sent {}", other.escape_ascii()),
    };
    Some(reply)
}

const ENOUGH: Duration = Duration::from_secs(20);

fn config(address: SocketAddrV4) -> Config {
    Config {
        drain_within: Duration::from_millis(300),
        ..Config::new(address, 0xd0bbe1)
    }
}

/// Waits for the client to get somewhere.
fn until(client: &Client, reached: impl Fn(Progress) -> bool) {
    let limit = Moment::now().plus(ENOUGH);
    while !reached(client.progress()) {
        assert!(Moment::now() < limit, "stuck at {:?}", client.progress());
        std::thread::yield_now();
    }
}

/// Runs a thousand requests against a server with a fault, and reads back.
fn run(fault: Fault) -> (Fake, Outcome, Verification) {
    let fake = Fake::start(fault);
    let client = start(config(fake.address)).unwrap();
    until(&client, |progress| {
        progress.completed >= 1000 || progress.wrong_replies + progress.broken_connections > 0
    });
    let mut outcome = client.stop().unwrap();
    let verification = outcome.verify_all(fake.address, ENOUGH);
    (fake, outcome, verification)
}

#[test]
fn a_server_that_is_right_is_found_right() {
    let (fake, outcome, verification) = run(Fault::None);
    assert!(outcome.requests.before >= 1000);
    assert_eq!(outcome.requests.during + outcome.requests.after, 0);
    assert_eq!(outcome.latency.count, outcome.requests.before);
    assert!(outcome.acknowledged_writes > 300);
    assert_eq!((outcome.refused, outcome.unanswered), (0, 0));
    assert_eq!(outcome.failover, None);
    assert_eq!(verification.problems, Vec::<String>::new());
    assert_eq!(
        verification,
        Verification {
            keys: (8 * model::KEYS) as u64,
            ..Verification::default()
        }
    );
    assert!(fake.store.lock().unwrap().values.len() > 100);
}

#[test]
fn a_lost_write_is_noticed_by_the_read_after_it() {
    let (_, outcome, verification) = run(Fault::ForgetsSet(300));
    assert_eq!(outcome.wrong_replies, 1);
    assert_eq!(outcome.lost_while_running, 1);
    assert_eq!(verification.lost_acknowledged_writes, 1);
    assert!(
        verification.problems[0].contains("expected"),
        "{verification:?}"
    );
}

#[test]
fn a_counter_that_jumps_is_noticed() {
    let (_, outcome, verification) = run(Fault::CountsTwice(300));
    assert_eq!(outcome.wrong_replies, 1);
    assert_eq!(verification.lost_acknowledged_writes, 1);
    assert!(
        verification.problems[0].contains("INCR"),
        "{verification:?}"
    );
}

/// What can be wrong with a key at the end, and how many acknowledged writes that is.
#[test]
fn what_is_lost_or_changed_later_is_found_by_reading_back() {
    type Change = fn(&str, &mut Vec<u8>) -> bool;
    let one_bit: Change = |name, value| {
        let here = name.contains("value");
        if here {
            *value.last_mut().unwrap() ^= 1;
        }
        here
    };
    let gone: Change = |name, value| {
        let here = name.contains("value");
        if here {
            value.clear();
        }
        here
    };
    let uncounted: Change = |name, value| {
        let Ok(number) = std::str::from_utf8(value).unwrap().parse::<i64>() else {
            return false;
        };
        if number >= 2 {
            *value = (number - 2).to_string().into_bytes();
        }
        name.contains("counter") && number >= 2
    };
    let cut: Change = |name, value| {
        let last = value.iter().rposition(|byte| *byte == b'<');
        match last {
            Some(last) if last > 0 && name.contains("log") => {
                value.truncate(last);
                true
            }
            _ => false,
        }
    };
    for (change, lost) in [(one_bit, 1), (gone, 1), (uncounted, 2), (cut, 1)] {
        let fake = Fake::start(Fault::None);
        let client = start(config(fake.address)).unwrap();
        until(&client, |progress| progress.completed >= 2000);
        let mut outcome = client.stop().unwrap();
        assert_eq!(outcome.wrong_replies, 0);
        fake.tamper(change);
        let verification = outcome.verify_all(fake.address, ENOUGH);
        assert_eq!(verification.wrong_keys, 1, "{verification:?}");
        assert_eq!(
            verification.lost_acknowledged_writes, lost,
            "{verification:?}"
        );
    }
}

#[test]
fn a_broken_connection_is_counted_and_its_keys_are_read_over_another() {
    for fault in [Fault::HangsUp(500), Fault::Babbles(500)] {
        let (_, outcome, verification) = run(fault);
        assert_eq!(outcome.broken_connections, 1, "{fault:?}");
        // What babbled did answer the request, if that is the word.
        assert_eq!(outcome.unanswered, 1, "{fault:?}");
        assert_eq!(verification.broken_connections, 1);
        assert_eq!(verification.keys, (8 * model::KEYS) as u64);
        assert_eq!(verification.lost_acknowledged_writes, 0);
        assert!(
            verification.problems[0].contains("broke"),
            "{verification:?}"
        );
    }
}

#[test]
fn a_refused_write_is_not_promised() {
    let (_, outcome, verification) = run(Fault::Refuses(200));
    assert!(outcome.refused > 0);
    assert_eq!(outcome.wrong_replies, 0);
    assert_eq!(verification.lost_acknowledged_writes, 0);
    assert!(verification.problems[0].contains("OOM"), "{verification:?}");
}

#[test]
fn a_server_that_is_gone_loses_everything() {
    let fake = Fake::start(Fault::FallsSilent(500));
    let client = start(config(fake.address)).unwrap();
    // Eight of the first 499 commands were PING; the rest were answered.
    until(&client, |progress| progress.completed == 499 - 8);
    client.mark_kill(Moment::now());
    let mut outcome = client.stop().unwrap();
    assert_eq!(outcome.broken_connections, 8);
    assert_eq!(outcome.unanswered, 8);
    assert!(outcome.stall_max >= Duration::from_millis(300));
    let verification = outcome.verify_all(fake.address, Duration::from_millis(200));
    assert_eq!(verification.keys, 0);
    assert_eq!(verification.unreadable_keys, (8 * model::KEYS) as u64);
    // Each acknowledged write that was not overwritten.
    assert!(
        verification.lost_acknowledged_writes > 50,
        "{verification:?}"
    );
}

#[test]
fn a_stall_after_the_kill_is_measured() {
    const STALL: Duration = Duration::from_millis(150);
    let fake = Fake::start(Fault::Stalls(1000, STALL));
    let client = start(config(fake.address)).unwrap();
    // The server's thread holds everybody up at its thousandth command; the mark is set before that.
    until(&client, |progress| progress.completed >= 500);
    let kill = Moment::now();
    client.mark_kill(kill);
    until(&client, |progress| progress.completed >= 2000);
    let mut outcome = client.stop().unwrap();
    assert!(outcome.stall_max >= STALL, "{:?}", outcome.stall_max);
    assert!(outcome.requests.before >= 500);
    assert!(outcome.requests.during >= 8, "{:?}", outcome.requests);
    assert!(outcome.requests.after > 0, "{:?}", outcome.requests);
    assert!(outcome.failover.unwrap() >= STALL);
    let verification = outcome.verify_all(fake.address, ENOUGH);
    assert_eq!(verification.broken_connections, 0);
    assert_eq!(verification.lost_acknowledged_writes, 0);
}

#[test]
fn at_a_fixed_rate_a_stall_is_charged_to_every_request_it_delayed() {
    const STALL: Duration = Duration::from_millis(200);
    let fake = Fake::start(Fault::Stalls(200, STALL));
    let client = start(Config {
        rate: Some(1000.0),
        ..config(fake.address)
    })
    .unwrap();
    until(&client, |progress| progress.completed >= 800);
    let outcome = client.stop().unwrap();
    assert_eq!(outcome.wrong_replies, 0);
    // About 200 were due during the stall; each but the last few waited for more than a tenth of it.
    let delayed = outcome
        .series
        .near
        .iter()
        .filter(|sample| sample.latency() >= STALL / 10)
        .count();
    assert!(delayed >= 100, "only {delayed} were charged");
}

#[test]
fn pipelines_and_large_values_are_checked_too() {
    let fake = Fake::start(Fault::None);
    let client = start(Config {
        pipeline: 8,
        large: Some(Large {
            every: 20,
            length: 1 << 20,
        }),
        ..config(fake.address)
    })
    .unwrap();
    until(&client, |progress| progress.completed >= 2000);
    let mut outcome = client.stop().unwrap();
    let verification = outcome.verify_all(fake.address, ENOUGH);
    assert_eq!(verification.problems, Vec::<String>::new());
    assert_eq!(verification.lost_acknowledged_writes, 0);
    let store = fake.store.lock().unwrap();
    assert!(store.values.values().any(|value| value.len() == 1 << 20));
}

#[test]
fn nobody_there_and_nonsense_configurations_are_told() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
        panic!("not IPv4")
    };
    drop(listener);
    let error = start(Config {
        connect_within: Duration::from_millis(50),
        ..config(address)
    })
    .unwrap_err();
    assert!(
        matches!(error, ClientError::Connect { number: 1, .. }),
        "{error}"
    );

    let error = start(Config {
        hook: Some(Box::new(|| Err(io::Error::other("no namespace")))),
        ..config(address)
    })
    .unwrap_err();
    assert!(error.to_string().contains("no namespace"), "{error}");

    for nonsense in [
        Config {
            connections: 0,
            ..config(address)
        },
        Config {
            rate: Some(0.0),
            ..config(address)
        },
        Config {
            value_length: RangeInclusive::new(9, 8),
            ..config(address)
        },
    ] {
        assert!(matches!(
            start(nonsense).unwrap_err(),
            ClientError::BadConfig { .. }
        ));
    }
}

/// A redis-server of our own, ended by its process id.
struct Redis {
    child: Child,
    address: SocketAddrV4,
    _directory: tempfile::TempDir,
}

impl Redis {
    /// `None`, with a word, where none is installed.
    fn start() -> Option<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let directory = tempfile::tempdir().unwrap();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(directory.path())
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self {
                child,
                address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
                _directory: directory,
            }),
            Err(error) => {
                eprintln!("skipped: redis-server: {error}");
                None
            }
        }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_real_server_frozen_for_a_while_is_a_failover_without_loss() {
    const FROZEN: Duration = Duration::from_millis(120);
    let Some(redis) = Redis::start() else { return };
    let client = start(config(redis.address)).unwrap();
    until(&client, |progress| progress.completed >= 3000);
    let kill = Moment::now();
    client.mark_kill(kill);
    redis.signal("-STOP");
    std::thread::sleep(FROZEN);
    client.mark_live(Moment::now());
    redis.signal("-CONT");
    let before = client.progress().completed;
    until(&client, |progress| progress.completed >= before + 3000);
    let mut outcome = client.stop().unwrap();
    let verification = outcome.verify_all(redis.address, ENOUGH);

    assert_eq!(verification.problems, Vec::<String>::new());
    assert_eq!(verification.keys, (8 * model::KEYS) as u64);
    assert_eq!(verification.lost_acknowledged_writes, 0);
    assert_eq!(verification.broken_connections, 0);
    let failover = outcome.failover.unwrap();
    assert!(failover >= FROZEN, "{failover:?}");
    assert!(outcome.stall_max >= FROZEN, "{:?}", outcome.stall_max);
    let requests = outcome.requests;
    assert!(
        requests.before >= 3000 && requests.after >= 1000,
        "{requests:?}"
    );
    // One was waiting on each connection; the signal takes a moment, in which more are answered.
    assert!(requests.during >= 8, "{requests:?}");
    eprintln!(
        "{requests:?}, failover {failover:?}, p50 {} µs, p99 {} µs",
        outcome.latency.p50, outcome.latency.p99
    );
}

#[test]
fn a_real_server_that_dies_loses_all_its_memory_and_that_is_seen() {
    let Some(mut redis) = Redis::start() else {
        return;
    };
    let client = start(config(redis.address)).unwrap();
    until(&client, |progress| progress.completed >= 1000);
    client.mark_kill(Moment::now());
    redis.child.kill().unwrap();
    redis.child.wait().unwrap();
    until(&client, |progress| progress.broken_connections == 8);
    let mut outcome = client.stop().unwrap();
    let verification = outcome.verify_all(redis.address, Duration::from_secs(1));
    assert_eq!(verification.broken_connections, 8);
    assert_eq!(verification.keys, 0);
    assert!(verification.lost_acknowledged_writes > 100);
}
