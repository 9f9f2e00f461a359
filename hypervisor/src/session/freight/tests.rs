//! Copies over each transport, one of them by a card that exists in this process only.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rdma_log::transport::{rdma, shm, tcp};
use rdma_log::verbs::{Choice, fake};
use rdma_log::{Epoch, LaneWriter, RingConfig, RingReader, RingWriter};

use super::*;
use crate::handshake::secret::Secret;
use crate::handshake::{self, HandshakeError, Stream, Trust};
use crate::record::random_source;
use crate::ring_log::INPUT_FRAME;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Shm,
    Tcp,
    Rdma(rdma::Mode),
}

const EACH: [Over; 4] = [
    Over::Shm,
    Over::Tcp,
    Over::Rdma(rdma::Mode::Nic),
    Over::Rdma(rdma::Mode::Ack),
];

/// Small, so that credits come back many times.
const LANES: RingConfig = RingConfig {
    events: 1 << 16,
    inputs: 1 << 18,
};

/// Both ends of a ring, and of the control connection beside it.
struct Pair {
    ring: RingWriter,
    watch: Option<Watch>,
    there: RingReader,
    link: Option<Link>,
    control: [Channel; 2],
}

fn streams() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

/// The control connection's ends, the primary's first.
fn control(sealed: bool) -> [Channel; 2] {
    let trust = move || match sealed {
        true => Trust::holders(Secret::from_bytes([5; 32])),
        false => Trust::same_user(),
    };
    let (one, other) = UnixStream::pair().unwrap();
    let admitting = thread::spawn(move || handshake::admit(Stream::Unix(other), &trust()).unwrap());
    let proved = handshake::prove(Stream::Unix(one), &trust()).unwrap();
    assert_eq!(proved.is_sealed(), sealed);
    [proved, admitting.join().unwrap()]
}

fn over_rdma(mode: rdma::Mode) -> (RingWriter, Option<Watch>, RingReader, Option<Link>) {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let config = move |side: &str| rdma::Config {
        choice: Choice {
            device: Some(format!(
                "fake-{side}-{}",
                NAMES.fetch_add(1, Ordering::SeqCst)
            )),
            ..Choice::default()
        },
        mode,
        ..rdma::Config::default()
    };
    let (mut here, mut there) = UnixStream::pair().unwrap();
    let accepting = thread::spawn(move || {
        let config = config("reader");
        rdma::accept(&fake::verbs(), &mut there, &LANES, &config, Duration::ZERO).unwrap()
    });
    let config = config("writer");
    let (ring, watch) = rdma::connect_watched(&fake::verbs(), &mut here, &config).unwrap();
    let (there, link) = accepting.join().unwrap();
    (
        ring,
        Some(Watch::Rdma(watch)),
        there,
        Some(Link::Rdma(link)),
    )
}

fn pair(over: Over, sealed: bool) -> Pair {
    let (ring, watch, there, link) = match over {
        Over::Shm => {
            let (ring, there) = shm::pair(&LANES).unwrap();
            (ring, None, there, None)
        }
        Over::Tcp => {
            let (one, other) = streams();
            let accepting = thread::spawn(move || tcp::accept(other, &LANES, Duration::ZERO));
            let (ring, watch) = tcp::connect_watched(one).unwrap();
            let (there, link) = accepting.join().unwrap().unwrap();
            (ring, Some(Watch::Tcp(watch)), there, Some(Link::Tcp(link)))
        }
        Over::Rdma(mode) => over_rdma(mode),
    };
    Pair {
        ring,
        watch,
        there,
        link,
        control: control(sealed),
    }
}

/// Bytes that are no two times the same.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        bytes.extend_from_slice(&next());
    }
    bytes.truncate(count);
    bytes
}

fn consignor(
    lane: LaneWriter,
    watch: Option<Watch>,
    control: &Channel,
) -> Result<Consignor<'_>, HandshakeError> {
    let seal = Parcels::give(control, &random_source().unwrap())?;
    Ok(Consignor::new((lane, Epoch(1), None), watch, control, seal))
}

/// Sends all of it in strides, flushed now and then as a copier does.
fn send(consignor: &mut Consignor<'_>, mut bytes: &[u8]) -> io::Result<()> {
    let strides = [9, 70_000, 4105, 1, 262_144];
    for (turn, &stride) in strides.iter().cycle().enumerate() {
        let (now, rest) = bytes.split_at(stride.min(bytes.len()));
        consignor.write_all(now)?;
        bytes = rest;
        if turn % 3 == 2 || bytes.is_empty() {
            consignor.flush()?;
        }
        if bytes.is_empty() {
            return Ok(());
        }
    }
    unreachable!("the strides have no end")
}

/// What arrives until an error; and whether something of the last piece is left. Never ends by itself.
fn receive(
    lane: &mut LaneReader,
    link: Option<&Link>,
    control: &Channel,
    most: usize,
) -> (Vec<u8>, Option<io::Error>) {
    let seal = match Parcels::take(control) {
        Ok(seal) => seal,
        Err(error) => return (Vec::new(), Some(io::Error::other(error))),
    };
    let mut consignee = Consignee::new(lane, link, control, &|| false, seal);
    let (mut came, mut piece) = (Vec::new(), vec![0; 10_000]);
    while came.len() < most {
        let room = piece.len().min(most - came.len());
        match consignee.read(&mut piece[..room]) {
            Ok(count) => came.extend_from_slice(&piece[..count]),
            Err(error) => return (came, Some(error)),
        }
    }
    assert!(consignee.is_at_end(), "more came than was sent");
    (came, None)
}

#[test]
fn all_of_it_arrives_and_the_lane_goes_on() {
    let sent = bytes(3 << 20);
    for over in EACH {
        for sealed in [false, true] {
            let pair = pair(over, sealed);
            let [here, there] = pair.control;
            let mut inputs = pair.there.inputs;
            let link = pair.link;
            let length = sent.len();
            let receiving = thread::spawn(move || {
                let (came, error) = receive(&mut inputs, link.as_ref(), &there, length);
                (came, error, inputs, there)
            });
            let mut consignor = consignor(pair.ring.inputs, pair.watch.clone(), &here).unwrap();
            send(&mut consignor, &sent).unwrap();
            let (mut lane, ..) = consignor.into_lane();
            lane.append(&[INPUT_FRAME, 7, 7], Marks::default()).unwrap();
            lane.notify().unwrap();
            // What has no room in the kernel goes when somebody turns the ring's watch, as the I/O thread does.
            while let Some(watch) = pair.watch.as_ref().filter(|_| !receiving.is_finished()) {
                watch.turn().unwrap();
                thread::sleep(Duration::from_millis(1));
            }
            let (came, error, mut inputs, _there) = receiving.join().unwrap();
            assert!(error.is_none(), "{over:?}: {error:?}");
            assert!(came == sent, "{over:?}: other bytes arrived");
            let until = Instant::now() + PATIENCE;
            let frame = loop {
                if let Some(entry) = inputs.next().unwrap() {
                    break entry;
                }
                assert!(Instant::now() < until, "{over:?}: no frame follows");
                inputs.wait(LOOK).unwrap();
            };
            assert_eq!(frame.payload(), [INPUT_FRAME, 7, 7]);
        }
    }
}

#[test]
fn a_sender_that_dies_is_noticed_and_nothing_else_arrives() {
    let sent = bytes(600_000);
    for over in EACH {
        for died in [0, 1, 4000, 70_000, 300_001, 599_999] {
            let pair = pair(over, true);
            let [here, there] = pair.control;
            let (mut inputs, link) = (pair.there.inputs, pair.link);
            let began = Instant::now();
            let receiving =
                thread::spawn(move || receive(&mut inputs, link.as_ref(), &there, 600_000));
            let mut consignor = consignor(pair.ring.inputs, pair.watch, &here).unwrap();
            send(&mut consignor, &sent[..died]).unwrap();
            drop((consignor, pair.ring.events));
            drop(here);
            let (came, error) = receiving.join().unwrap();
            assert!(came.len() <= died && sent.starts_with(&came), "{over:?}");
            assert!(error.is_some(), "{over:?}: whole after {died} bytes");
            assert!(began.elapsed() < PATIENCE / 2, "{over:?}: it took so long");
        }
    }
}

#[test]
fn a_receiver_that_dies_is_noticed() {
    let sent = bytes(2 << 20);
    for over in EACH {
        let pair = pair(over, true);
        let [here, there] = pair.control;
        let (mut reader, link) = (pair.there, pair.link);
        let began = Instant::now();
        let receiving = thread::spawn(move || {
            let (came, _) = receive(&mut reader.inputs, link.as_ref(), &there, 100_009);
            drop((reader, there));
            came
        });
        let mut consignor = consignor(pair.ring.inputs, pair.watch, &here).unwrap();
        // A piece's end, for what the receiver asks.
        consignor.write_all(&sent[..100_009]).unwrap();
        consignor.flush().unwrap();
        let error = send(&mut consignor, &sent[100_009..]).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::TimedOut, "{over:?}");
        assert!(began.elapsed() < PATIENCE / 2, "{over:?}: it took so long");
        assert_eq!(receiving.join().unwrap(), sent[..100_009], "{over:?}");
    }
}

/// What the entries of a copy look like on their way, and a lane to a receiver, into which any may be put.
fn intercepted(sealed: bool) -> (Vec<Vec<u8>>, Vec<u8>, Pair) {
    let pair = pair(Over::Shm, sealed);
    let (ring, mut there) = shm::pair(&LANES).unwrap();
    let sent = bytes(40_000);
    let mut consignor = consignor(ring.inputs, None, &pair.control[0]).unwrap();
    send(&mut consignor, &sent).unwrap();
    let mut pieces = Vec::new();
    while let Some(entry) = there.inputs.next().unwrap() {
        pieces.push(entry.payload().to_vec());
    }
    assert!(pieces.len() > 2, "{} pieces", pieces.len());
    (pieces, sent, pair)
}

fn hear(pair: Pair, pieces: &[Vec<u8>], most: usize) -> (Vec<u8>, Option<io::Error>) {
    let Pair {
        mut ring,
        mut there,
        control: [here, other],
        ..
    } = pair;
    for piece in pieces {
        ring.inputs.append(piece, Marks::default()).unwrap();
    }
    // Whoever sent it is gone then.
    drop(here);
    receive(&mut there.inputs, None, &other, most)
}

#[test]
fn who_is_between_learns_nothing_and_changes_nothing() {
    let contains = |pieces: &[Vec<u8>], what: &[u8]| {
        let within = |piece: &Vec<u8>| piece.windows(what.len()).any(|found| found == what);
        pieces.iter().any(within)
    };
    let (pieces, sent, pair) = intercepted(false);
    assert!(contains(&pieces, &sent[..64]), "it can be read on one host");
    assert_eq!(hear(pair, &pieces, sent.len()).0, sent);

    let (pieces, sent, pair) = intercepted(true);
    assert!(!contains(&pieces, &sent[..8]), "it was sent in clear");
    assert_eq!(hear(pair, &pieces, sent.len()).0, sent);

    type Meddle = fn(&mut Vec<Vec<u8>>);
    let meddlings: [(&str, Meddle); 7] = [
        ("changed", |pieces| pieces[1][100] ^= 1),
        ("left out", |pieces| drop(pieces.remove(1))),
        ("repeated", |pieces| pieces.insert(1, pieces[0].clone())),
        ("swapped", |pieces| pieces.swap(1, 2)),
        ("cut", |pieces| pieces[1].truncate(50)),
        ("a frame", |pieces| pieces.insert(1, vec![INPUT_FRAME; 60])),
        ("nothing", |pieces| pieces.insert(1, Vec::new())),
    ];
    for (name, meddle) in meddlings {
        let (mut pieces, sent, pair) = intercepted(true);
        let first = pieces[0].len() - KIND - PARCEL_TAG;
        meddle(&mut pieces);
        let (came, error) = hear(pair, &pieces, sent.len());
        assert_eq!(came, sent[..first], "{name}");
        let error = error.unwrap_or_else(|| panic!("{name}: no error"));
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{name}: {error}");
    }
}

#[test]
fn a_receiver_that_is_told_to_end_ends() {
    let mut pair = pair(Over::Shm, false);
    let mut consignee = Consignee::new(
        &mut pair.there.inputs,
        None,
        &pair.control[1],
        &|| true,
        None,
    );
    let error = consignee.read(&mut [0; 10]).unwrap_err();
    assert!(error.to_string().contains("told to end"), "{error}");
}
