use super::*;
use crate::{Config, Expired};
use alloc::vec;
use proptest::prelude::*;
use std::format;
use std::string::String;

const NOW: Now = Now::from_micros(1_700_000_000_123_456);

/// A client and its server.
struct Fixture {
    store: Store,
    session: Session,
    out: Output,
}

impl Fixture {
    fn new(config: Config) -> Self {
        let mut store = Store::new(config, NOW);
        Self {
            session: store.connect(None, NOW),
            store,
            out: Output::new(),
        }
    }

    /// Sends bytes and takes the replies.
    fn send(&mut self, input: &[u8]) -> (Vec<u8>, State) {
        let progress = self.session.run(
            &mut self.store,
            NOW,
            input,
            &mut self.out,
            Limits {
                output: usize::MAX,
                commands: usize::MAX,
            },
        );
        let replies = self.out.pending().to_vec();
        self.out.consume(replies.len());
        (replies, progress.state)
    }

    /// Sends an inline command and takes the reply as text.
    fn ask(&mut self, command: &str) -> String {
        let (replies, _) = self.send(format!("{command}\r\n").as_bytes());
        String::from_utf8(replies).unwrap()
    }
}

fn encode(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// Sends the stream in pieces of these lengths over and over; everything that came back.
fn in_pieces(stream: &[u8], lengths: &[usize], limits: Limits) -> (Vec<u8>, bool) {
    let mut fixture = Fixture::new(Config::default());
    let mut replies = Vec::new();
    let mut rest = stream;
    for &length in lengths.iter().cycle() {
        let (piece, after) = rest.split_at(length.min(rest.len()));
        rest = after;
        let mut input = piece;
        loop {
            let progress =
                fixture
                    .session
                    .run(&mut fixture.store, NOW, input, &mut fixture.out, limits);
            replies.extend_from_slice(fixture.out.pending());
            fixture.out.consume(fixture.out.len());
            input = &input[progress.consumed..];
            match progress.state {
                State::NeedInput => {
                    assert!(input.is_empty());
                    break;
                }
                State::Close => return (replies, true),
                State::OutputFull | State::Paused => {}
            }
        }
        if rest.is_empty() {
            return (replies, false);
        }
    }
    unreachable!("there is at least one length")
}

const FREE: Limits = Limits {
    output: usize::MAX,
    commands: usize::MAX,
};

fn word() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => prop::sample::select(vec![
            "set", "GET", "incr", "append", "mget", "mset", "del", "expire", "keys", "getset", "nonsense", "multi", "exec",
            "hello", "3", "k", "l", "10", "-1", "*", "nx", "ex", "get", "",
        ]).prop_map(|word| word.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..300),
        1 => (0usize..100_000).prop_map(|length| vec![b'v'; length]),
    ]
}

/// A request as it should be, or as it should not.
fn request() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        12 => prop::collection::vec(word(), 1..5).prop_map(|words| {
            encode(&words.iter().map(Vec::as_slice).collect::<Vec<_>>())
        }),
        3 => prop::collection::vec(prop::sample::select(vec![
            "ping", "get", "set", "k", "\"a\\x20b\"", "'c d'", "\"", "'", "\\", "\0",
        ]), 0..5).prop_map(|words| format!("{}\r\n", words.join(" ")).into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..50),
        1 => prop::collection::vec(prop::sample::select(b"*$123\r\n -x\0".to_vec()), 0..30),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_cut_of_the_stream_gives_the_same_replies(
        requests in prop::collection::vec(request(), 1..12),
        lengths in prop::collection::vec(prop_oneof![1usize..20, 1usize..5000], 1..8),
        output in 1usize..2000,
        commands in 1usize..5,
    ) {
        let stream = requests.concat();
        let whole = in_pieces(&stream, &[stream.len().max(1)], FREE);
        prop_assert_eq!(&whole, &in_pieces(&stream, &lengths, FREE));
        prop_assert_eq!(&whole, &in_pieces(&stream, &lengths, Limits { output, commands }));
    }

    #[test]
    fn random_bytes_do_no_harm(stream in prop::collection::vec(any::<u8>(), 0..2000), length in 1usize..100) {
        in_pieces(&stream, &[length], FREE);
    }

    #[test]
    fn protocol_characters_do_no_harm(
        stream in prop::collection::vec(prop::sample::select(b"*$0123456789\r\n\"' -PINGx\0".to_vec()), 0..500),
        length in 1usize..50,
    ) {
        let whole = in_pieces(&stream, &[stream.len().max(1)], FREE);
        prop_assert_eq!(whole, in_pieces(&stream, &[length], FREE));
    }
}

#[test]
fn waiting_output_holds_commands_back() {
    let mut fixture = Fixture::new(Config::default());
    fixture.send(&encode(&[b"SET", b"k", &[b'v'; 10_000]]));
    let input = encode(&[b"GET", b"k"]).repeat(100);
    let limits = Limits {
        output: 50_000,
        commands: 1000,
    };
    let mut left = &input[..];
    let mut replies = 0;
    loop {
        let Fixture {
            store,
            session,
            out,
        } = &mut fixture;
        let progress = session.run(store, NOW, left, out, limits);
        left = &left[progress.consumed..];
        // One reply may go beyond the limit, no more.
        assert!(out.len() < 50_000 + 10_020);
        replies += out.len();
        if progress.state == State::NeedInput {
            break;
        }
        assert_eq!(progress.state, State::OutputFull);
        // Nothing happens until there is room.
        let again = session.run(store, NOW, left, out, limits);
        assert_eq!((again.consumed, again.commands), (0, 0));
        out.consume(out.len());
    }
    assert_eq!(replies, 100 * (10_000 + 10));
}

#[test]
fn the_limit_of_the_output_is_exact() {
    for (output, commands) in [(1, 1), (7, 1), (8, 2), (14, 2), (15, 3)] {
        let mut fixture = Fixture::new(Config::default());
        let Fixture {
            store,
            session,
            out,
        } = &mut fixture;
        let limits = Limits {
            output,
            commands: 10,
        };
        let progress = session.run(store, NOW, &b"PING\r\n".repeat(5), out, limits);
        assert_eq!(progress.commands, commands, "limit {output}");
    }
}

#[test]
fn the_number_of_commands_is_limited() {
    let mut fixture = Fixture::new(Config::default());
    let input = b"INCR n\r\n".repeat(10);
    let limits = Limits {
        output: 1000,
        commands: 4,
    };
    let Fixture {
        store,
        session,
        out,
    } = &mut fixture;
    let progress = session.run(store, NOW, &input, out, limits);
    assert_eq!(
        (progress.commands, progress.consumed, progress.state),
        (4, 32, State::Paused)
    );
    assert_eq!(out.pending(), b":1\r\n:2\r\n:3\r\n:4\r\n");
}

#[test]
fn nothing_is_executed_after_the_end() {
    for (request, reply) in [
        ("PING\r\nQUIT\r\nPING\r\n", "+PONG\r\n+OK\r\n"),
        (
            "*x\r\nPING\r\n",
            "-ERR Protocol error: invalid multibulk length\r\n",
        ),
        (
            "*1\r\n!\r\nPING\r\n",
            "-ERR Protocol error: expected '$', got '!'\r\n",
        ),
        ("PING\r\nPOST / HTTP/1.1\r\nPING\r\n", ""),
    ] {
        let mut fixture = Fixture::new(Config::default());
        let (replies, state) = fixture.send(request.as_bytes());
        assert_eq!((replies, state), (reply.as_bytes().to_vec(), State::Close));
        assert!(fixture.session.should_close());
        assert_eq!(fixture.send(b"PING\r\n"), (vec![], State::Close));
    }
}

#[test]
fn too_much_is_refused_and_the_connection_goes_on() {
    let mut fixture = Fixture::new(Config {
        maxmemory: 300_000,
        ..Config::default()
    });
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.\r\n";
    let empty = fixture.store.used_memory();
    let large = encode(&[b"SET", b"k", &[b'v'; 400_000]]);
    // In one piece the bytes belong to the caller, in many they would be held.
    for length in [large.len(), 1000] {
        let mut replies = Vec::new();
        for piece in large.chunks(length) {
            replies.extend(fixture.send(piece).0);
            assert!(fixture.store.used_memory() <= 300_000 + 50_000);
        }
        assert_eq!(String::from_utf8(replies).unwrap(), oom);
        assert_eq!(fixture.ask("GET k"), "$-1\r\n");
    }
    assert!(fixture.store.used_memory() < empty + 50_000);
    // A full store can still be read and emptied.
    let mut stored = 0;
    while fixture
        .send(&encode(&[
            b"SET",
            format!("k{stored}").as_bytes(),
            &[b'v'; 10_000],
        ]))
        .0
        == b"+OK\r\n"
    {
        stored += 1;
    }
    assert!((15..30).contains(&stored), "{stored}");
    assert_eq!(fixture.ask("STRLEN k0"), ":10000\r\n");
    let append = encode(&[b"APPEND", b"k0", &[b'v'; 10_000]]);
    assert_eq!(fixture.send(&append).0, oom.as_bytes());
    assert_eq!(fixture.ask("DEL k0 k1"), ":2\r\n");
    assert_eq!(fixture.ask("SET k0 x"), "+OK\r\n");
}

#[test]
fn a_value_that_cannot_be_sent_is_not_lost() {
    let mut fixture = Fixture::new(Config::default());
    fixture.out = Output::bounded(5000);
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.\r\n";
    fixture.send(&encode(&[b"SET", b"k", &[b'v'; 6000]]));
    for command in [
        "GET k",
        "GETDEL k",
        "SET k x GET",
        "GETSET k x",
        "GETEX k PERSIST",
        "MGET a k",
    ] {
        assert_eq!(fixture.ask(command), oom, "{command}");
    }
    assert_eq!(fixture.ask("STRLEN k"), ":6000\r\n");
    // In a transaction only the one command fails.
    let replies = fixture.ask("MULTI\r\nINCR n\r\nGET k\r\nINCR n\r\nEXEC");
    assert!(
        replies.ends_with(&format!("*3\r\n:1\r\n{oom}:2\r\n")),
        "{replies}"
    );
}

#[test]
fn clients_cannot_lift_the_ceiling() {
    let mut fixture = Fixture::new(Config {
        memory_ceiling: 300_000,
        ..Config::default()
    });
    assert_eq!(fixture.ask("CONFIG SET maxmemory 0"), "+OK\r\n");
    let (reply, _) = fixture.send(&encode(&[b"SET", b"k", &[b'v'; 400_000]]));
    assert!(reply.starts_with(b"-OOM "));
}

#[test]
fn memory_of_a_session_is_given_back() {
    let mut fixture = Fixture::new(Config::default());
    let before = fixture.store.used_memory();
    fixture.send(b"MULTI\r\nSET key value\r\n*2\r\n$4\r\nECHO\r\n$100000\r\nxxx");
    assert!(fixture.store.used_memory() > before + 100_000);
    fixture.session.close(&mut fixture.store);
    assert_eq!(fixture.store.used_memory(), before);
}

#[test]
fn watches_end_with_the_session() {
    let mut fixture = Fixture::new(Config::default());
    fixture.send(b"WATCH k\r\n");
    let mut other = fixture.store.connect(None, NOW);
    fixture.session.close(&mut fixture.store);
    fixture.session = other;
    assert_eq!(fixture.ask("SET k v"), "+OK\r\n");
    other = fixture.store.connect(None, NOW);
    other.close(&mut fixture.store);
    assert_eq!(fixture.ask("GET k"), "$1\r\nv\r\n");
    assert!(
        fixture
            .ask("INFO clients")
            .contains("connected_clients:1\r\n")
    );
}

#[test]
fn time_is_what_the_caller_says() {
    let mut fixture = Fixture::new(Config::default());
    assert_eq!(
        fixture.ask("TIME"),
        "*2\r\n$10\r\n1700000000\r\n$6\r\n123456\r\n"
    );
    assert_eq!(fixture.ask("SET k v PX 1000"), "+OK\r\n");
    assert_eq!(fixture.ask("PEXPIRETIME k"), ":1700000001123\r\n");
    let Fixture {
        store,
        session,
        out,
    } = &mut fixture;
    // At the very millisecond the key is still there.
    for (millis, reply) in [(1_700_000_001_123, ":1\r\n"), (1_700_000_001_124, ":0\r\n")] {
        let now = Now::from_micros(millis * 1000);
        session.run(store, now, b"EXISTS k\r\n", out, FREE);
        assert_eq!(out.pending(), reply.as_bytes());
        out.consume(out.len());
    }
    let cycle = store.expire_cycle(Now::from_micros(1_700_000_002_000_000), 10);
    assert_eq!(
        cycle,
        Expired {
            removed: 0,
            more: false
        }
    );
}

#[test]
fn resp3_says_the_same_in_other_words() {
    let mut fixture = Fixture::new(Config::default());
    assert!(fixture.ask("HELLO 3").starts_with("%7\r\n$6\r\nserver\r\n"));
    assert_eq!(fixture.ask("GET k"), "_\r\n");
    assert_eq!(
        fixture.ask("CONFIG GET databases"),
        "%1\r\n$9\r\ndatabases\r\n$2\r\n16\r\n"
    );
    assert!(fixture.ask("INFO").starts_with('='));
    assert!(fixture.ask("HELLO 2").starts_with("*14\r\n"));
    assert_eq!(fixture.ask("GET k"), "$-1\r\n");
}
