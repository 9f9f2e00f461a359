//! Against a server of the test's own, which answers as it is told: what cannot be had from a real etcd on demand. The real one
//! is asked in the project's `tests` crate.

use super::*;
use crate::arbiter::Endpoint;
use crate::protocol::record::Identity;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

fn who(n: u8) -> Identity {
    Identity::from_bytes([n; 16])
}

fn live() -> Record {
    Record::cold_start(None, who(1), Some(who(2)))
}

/// What the server does with one request.
#[derive(Clone, Debug)]
enum Do {
    /// Answers with this status and body.
    Say(u16, String),
    /// Closes the connection without an answer.
    Hang,
    /// Never answers.
    Sleep,
}

/// A server that does these things in turn, then hangs up on everybody. Every request's body is kept.
struct Server {
    endpoint: Endpoint,
    bodies: Arc<Mutex<Vec<Value>>>,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
    over: Arc<AtomicBool>,
    /// Every connection, to end it.
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Server {
    fn start(script: Vec<Do>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let streams = Arc::new(Mutex::new(Vec::new()));
        let (kept, ended, open) = (Arc::clone(&bodies), Arc::clone(&over), Arc::clone(&streams));
        let thread = std::thread::spawn(move || {
            let mut script = script.into_iter();
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let mut stream = stream.unwrap();
                open.lock().unwrap().push(stream.try_clone().unwrap());
                while let Some(body) = request(&mut stream) {
                    kept.lock().unwrap().push(body);
                    match script.next() {
                        Some(Do::Say(status, body)) => {
                            let text = format!(
                                "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}",
                                body.len()
                            );
                            stream.write_all(text.as_bytes()).unwrap();
                        }
                        Some(Do::Sleep) => break,
                        Some(Do::Hang) | None => {
                            let _ = stream.shutdown(Shutdown::Both);
                            break;
                        }
                    }
                }
            }
        });
        Self {
            endpoint: Endpoint {
                host: "127.0.0.1".into(),
                port: address.port(),
            },
            bodies,
            thread: Some(thread),
            address,
            over,
            streams,
        }
    }

    fn bodies(&self) -> Vec<Value> {
        self.bodies.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The body of the next request; `None` when there is none.
fn request(stream: &mut TcpStream) -> Option<Value> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n")
            && let Ok(value) = serde_json::from_slice(&bytes[at + 4..])
        {
            return Some(value);
        }
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(length) if length > 0 => bytes.extend_from_slice(&buffer[..length]),
            _ => return None,
        }
    }
}

fn open(servers: &[&Server]) -> EtcdArbiter {
    let endpoints: Vec<Endpoint> = servers
        .iter()
        .map(|server| server.endpoint.clone())
        .collect();
    EtcdArbiter::open(&Cluster::in_clear(endpoints), "kv")
        .unwrap()
        .with_attempt(Duration::from_millis(200))
}

fn value(record: &Record) -> String {
    base64::encode(text::write("kv", record).as_bytes())
}

fn done() -> Do {
    Do::Say(
        200,
        r#"{"header":{"cluster_id":"7"},"succeeded":true,"responses":[{"response_put":{}}]}"#
            .into(),
    )
}

fn holds(record: &Record) -> Do {
    let text = format!(
        r#"{{"header":{{"cluster_id":"7"}},"responses":[{{"response_range":{{"kvs":[{{"value":"{}"}}]}}}}]}}"#,
        value(record)
    );
    Do::Say(200, text)
}

#[test]
fn a_swap_is_one_transaction_that_compares_the_whole_record() {
    let (from, to) = (live(), live().detached());
    let server = Server::start(vec![done(), done()]);
    let arbiter = open(&[&server]);
    assert_eq!(arbiter.swap(Some(&from), &to).unwrap(), Swap::Done);
    assert_eq!(arbiter.swap(None, &to).unwrap(), Swap::Done);
    let bodies = server.bodies();
    let key = base64::encode(b"doppel/machines/kv");
    assert_eq!(
        bodies[0]["compare"],
        json!([{ "key": key, "target": "VALUE", "result": "EQUAL", "value": value(&from) }])
    );
    assert_eq!(
        bodies[0]["success"],
        json!([{ "request_put": { "key": key, "value": value(&to) } }])
    );
    assert_eq!(
        bodies[1]["compare"],
        json!([{ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" }])
    );
}

#[test]
fn reads_are_never_serializable() {
    let server = Server::start(vec![Do::Say(
        200,
        r#"{"header":{"cluster_id":"7"}}"#.into(),
    )]);
    assert_eq!(open(&[&server]).read().unwrap(), None);
    assert_eq!(server.bodies()[0]["serializable"], json!(false));
}

#[test]
fn a_lost_answer_is_asked_for_again_of_the_next_member() {
    let (from, to) = (live(), live().detached());
    for first in [Do::Hang, Do::Sleep, Do::Say(503, "{}".into())] {
        // It had landed: the next member has it already.
        let (one, two) = (
            Server::start(vec![first.clone()]),
            Server::start(vec![holds(&to)]),
        );
        let swap = open(&[&one, &two]).swap(Some(&from), &to);
        assert_eq!(swap.unwrap(), Swap::Done, "{first:?}");
        // It had not, and another process was first.
        let other = from.claimed_by(who(2)).unwrap();
        let (one, two) = (
            Server::start(vec![first.clone()]),
            Server::start(vec![holds(&other)]),
        );
        let swap = open(&[&one, &two]).swap(Some(&from), &to);
        assert_eq!(swap.unwrap(), Swap::Lost(Some(other)), "{first:?}");
    }
}

#[test]
fn the_member_that_answered_is_asked_first_over_the_same_connection() {
    let (from, to) = (live(), live().detached());
    let one = Server::start(vec![Do::Hang]);
    let two = Server::start(vec![done(), done(), done()]);
    let arbiter = open(&[&one, &two]);
    for _ in 0..3 {
        assert_eq!(arbiter.swap(Some(&from), &to).unwrap(), Swap::Done);
    }
    assert_eq!((one.bodies().len(), two.bodies().len()), (1, 3));
}

#[test]
fn a_connection_that_was_closed_between_two_requests_is_made_anew() {
    let (from, to) = (live(), live().detached());
    // The second request meets a server that hangs up, and is sent again.
    let server = Server::start(vec![done(), Do::Hang, holds(&to)]);
    let arbiter = open(&[&server]);
    for _ in 0..2 {
        assert_eq!(arbiter.swap(Some(&from), &to).unwrap(), Swap::Done);
    }
    assert_eq!(server.bodies().len(), 3);
}

#[test]
fn whether_a_failed_swap_may_have_landed_is_told_truthfully() {
    let (from, to) = (live(), live().detached());
    let junk = |text: &str| Do::Say(200, text.into());
    let unsure = [
        Do::Hang,
        Do::Sleep,
        Do::Say(500, "oops".into()),
        Do::Say(
            503,
            r#"{"error":"etcdserver: request timed out","code":14}"#.into(),
        ),
        junk("{}"),
        junk("[1]"),
        junk("no json"),
        junk(r#"{"header":{"cluster_id":"7"}}"#),
        junk(r#"{"header":{},"succeeded":true}"#),
        junk(r#"{"header":{"cluster_id":"seven"},"succeeded":true}"#),
        junk(r#"{"header":{"cluster_id":"7"},"succeeded":"perhaps"}"#),
    ];
    for what in unsure {
        let server = Server::start(vec![what.clone()]);
        let error = open(&[&server]).swap(Some(&from), &to).unwrap_err();
        assert!(error.may_have_landed(), "{what:?}: {error}");
    }
    let certain = [
        Do::Say(
            401,
            r#"{"error":"etcdserver: invalid auth token","code":16}"#.into(),
        ),
        Do::Say(
            400,
            r#"{"error":"etcdserver: user name is empty","code":3}"#.into(),
        ),
        Do::Say(404, "404 page not found".into()),
    ];
    for what in certain {
        let server = Server::start(vec![what.clone()]);
        let error = open(&[&server]).swap(Some(&from), &to).unwrap_err();
        assert!(!error.may_have_landed(), "{what:?}: {error}");
    }
    // Nobody listens: nothing was sent.
    let gone = Server::start(Vec::new());
    let arbiter = open(&[&gone]);
    drop(gone);
    let error = arbiter.swap(Some(&from), &to).unwrap_err();
    assert!(!error.may_have_landed(), "{error}");
    // One was asked and has not answered; that the next is out of reach changes nothing.
    let (asked, gone) = (Server::start(vec![Do::Hang]), Server::start(Vec::new()));
    let arbiter = open(&[&asked, &gone]);
    drop(gone);
    assert!(
        arbiter
            .swap(Some(&from), &to)
            .unwrap_err()
            .may_have_landed()
    );
}

#[test]
fn a_silent_member_costs_its_time_limit_and_no_more() {
    let (one, two) = (Server::start(vec![Do::Sleep]), Server::start(vec![done()]));
    let start = Instant::now();
    let swap = open(&[&one, &two]).swap(Some(&live()), &live().detached());
    assert_eq!(swap.unwrap(), Swap::Done);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(200), "{took:?}");
}

#[test]
fn a_member_of_another_cluster_is_not_believed() {
    let (from, to) = (live(), live().detached());
    let other = Do::Say(
        200,
        r#"{"header":{"cluster_id":"8"},"succeeded":true}"#.into(),
    );
    let (one, two) = (Server::start(vec![done()]), Server::start(vec![other]));
    let arbiter = open(&[&one, &two]);
    assert_eq!(arbiter.swap(Some(&from), &to).unwrap(), Swap::Done);
    drop(one);
    let error = arbiter.swap(Some(&from), &to).unwrap_err();
    assert!(
        error.may_have_landed() && error.to_string().contains("cluster 8"),
        "{error}"
    );
}

#[test]
fn what_is_no_record_is_named_and_nothing_is_concluded_from_it() {
    let foreign = base64::encode(b"hello");
    for stored in ["", "!!", &foreign] {
        let text = format!(r#"{{"header":{{"cluster_id":"7"}},"kvs":[{{"value":"{stored}"}}]}}"#);
        let server = Server::start(vec![Do::Say(200, text)]);
        let error = open(&[&server]).read().unwrap_err().to_string();
        assert!(
            error.contains("doppel/machines/kv") && error.contains("delete the key"),
            "{error}"
        );
    }
}

#[test]
fn names_are_checked_and_resolved_when_it_is_opened() {
    let cluster = |hosts: &[&str]| {
        let endpoint = |host: &&str| Endpoint {
            host: (*host).into(),
            port: 1,
        };
        Cluster::in_clear(hosts.iter().map(endpoint).collect())
    };
    assert!(matches!(
        EtcdArbiter::open(&cluster(&["127.0.0.1"]), "../x"),
        Err(ArbiterError::Name { .. })
    ));
    let error = EtcdArbiter::open(&cluster(&["no-such-name.invalid"]), "kv").unwrap_err();
    assert!(error.to_string().contains("pair.arbiter"), "{error}");
    EtcdArbiter::open(&cluster(&["no-such-name.invalid", "127.0.0.1"]), "kv").unwrap();
}
