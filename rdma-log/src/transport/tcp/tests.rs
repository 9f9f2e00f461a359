//! Streams that are cut, damaged, fenced and full; both sides are real sockets, the hostile one is made by hand.

use std::net::{Shutdown, TcpListener};
use std::thread;
use std::time::Instant;

use proptest::prelude::*;

use super::frame::{ANSWER, Answer, Frame, HEADER, LaneAnswer, MAX_PIECE};
use super::*;
use crate::entry::Lane;
use crate::entry::{Head, Keys, LINE, Marks, Seq, encode};
use crate::lane::{Counter, MIN_LANE, WriteError};
use crate::transport::suite::{LONG, SMALL, await_committed, publish, read};

ring_suite!(pair, 1.0);

fn streams() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (reader, _) = listener.accept().unwrap();
    for stream in [&writer, &reader] {
        stream.set_read_timeout(Some(LONG)).unwrap();
    }
    (writer, reader)
}

fn over(
    writer: TcpStream,
    reader: TcpStream,
    config: RingConfig,
) -> (RingWriter, RingReader, Link) {
    let accepting = thread::spawn(move || accept(reader, &config, Duration::ZERO).unwrap());
    let writer = connect(writer).unwrap();
    let (reader, link) = accepting.join().unwrap();
    (writer, reader, link)
}

fn pair(config: RingConfig) -> (RingWriter, RingReader) {
    let (writer, reader) = streams();
    let (writer, reader, _) = over(writer, reader, config);
    (writer, reader)
}

#[test]
fn an_entry_commits_without_its_reader_and_not_before_it_was_pushed() {
    let (mut writer, mut reader) = pair(SMALL);
    let seq = writer.events.append(b"one", Marks::default()).unwrap();
    assert_eq!(writer.events.committed(), Ok(Seq::ZERO));
    writer.events.notify().unwrap();
    await_committed(&mut writer.events, 1);
    assert_eq!(writer.progress.poll().unwrap()[0].replayed, Seq::ZERO);
    assert_eq!(reader.events.next().unwrap().unwrap().seq(), seq);
    reader.events.set_replayed(seq).unwrap();
    reader.events.notify().unwrap();
    let until = Instant::now() + LONG;
    while writer.progress.poll().unwrap()[0].replayed != seq {
        assert!(Instant::now() < until, "what was replayed is not told");
        thread::yield_now();
    }
}

/// An entry that applies an input must not overtake it, whoever pushes.
#[test]
fn a_push_of_one_lane_sends_what_the_other_posted_before() {
    let (mut writer, mut reader) = pair(SMALL);
    for round in 1..200 {
        writer.inputs.append(b"input", Marks::default()).unwrap();
        writer
            .events
            .append(b"applies it", Marks::default())
            .unwrap();
        writer.events.notify().unwrap();
        while reader.events.next().unwrap().is_none() {
            assert!(reader.events.wait(LONG).unwrap());
        }
        assert_eq!(reader.inputs.next().unwrap().unwrap().seq(), Seq(round));
        await_committed(&mut writer.events, round);
        assert_eq!(writer.inputs.committed(), Ok(Seq(round)));
    }
}

/// Whoever watches gets every answer at the descriptor, and no thread of the connection's own takes it away.
#[test]
fn a_watch_is_told_of_commits_by_its_descriptor() {
    let (writer, reader) = streams();
    let accepting = thread::spawn(move || accept(reader, &SMALL, Duration::ZERO).unwrap());
    let (mut writer, watch) = connect_watched(writer).unwrap();
    let _reader = accepting.join().unwrap();
    for seq in 1..50 {
        writer.events.append(b"event", Marks::default()).unwrap();
        writer.events.notify().unwrap();
        while watch.committed()[0] < Seq(seq) {
            let [socket] = crate::poll::wait([(watch.as_fd(), false)], Some(LONG)).unwrap();
            assert!(socket.read, "no answer came");
            watch.turn().unwrap();
        }
    }
}

/// Passes on `limit` bytes of what the writer sends, then ends both connections, abruptly or not.
fn cut_after(limit: usize) -> (TcpStream, TcpStream, thread::JoinHandle<()>) {
    let (writer, here) = streams();
    let (there, reader) = streams();
    let back = (here.try_clone().unwrap(), there.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut &back.1, &mut &back.0);
    });
    let cutter = thread::spawn(move || {
        let _ = io::copy(&mut (&here).take(limit as u64), &mut &there);
        for stream in [&here, &there] {
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
    (writer, reader, cutter)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]
    /// The connection dies after any byte: what the writer saw commit is read, and nothing that was not written.
    #[test]
    fn cut_at_any_byte(limit in 0..20_000usize, push in 1..6u64, most in 0..900usize) {
        let (writer, reader, cutter) = cut_after(MESSAGE + limit);
        let (mut writer, mut reader, link) = over(writer, reader, SMALL);
        let committed = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut committed = 0;
                let ended = loop {
                    let goal = writer.events.last().0 + 3;
                    if let Err(error) = publish(&mut writer.events, goal, most, push) {
                        break error;
                    }
                    committed = committed.max(writer.events.committed().unwrap_or_default().0);
                };
                // What came in before the end counts as well.
                (committed.max(writer.events.committed().unwrap_or_default().0), ended)
            });
            while link.broken().is_none() {
                read(&mut reader.events, most);
                reader.events.notify().unwrap();
                let _ = reader.events.wait(Duration::from_millis(5)).unwrap();
            }
            writing.join().unwrap()
        });
        cutter.join().unwrap();
        let (committed, ended) = committed;
        prop_assert_eq!(ended, WriteError::Closed);
        prop_assert_eq!(link.broken(), Some(StreamError::Closed));
        let proof = reader.fencer.fence().unwrap();
        let last = read(&mut reader.events, most);
        prop_assert_eq!(reader.events.at_end(&proof), Ok(true));
        prop_assert!(committed <= last, "{} committed, {} read", committed, last);
    }
}

// ------------------------------------------------------------------------------------------- hostile peers

/// A reader, and the stream to it in the hands of a peer that sends what it likes.
struct Hostile {
    reader: RingReader,
    link: Link,
    stream: TcpStream,
    nonce: Nonce,
}

impl Hostile {
    fn new() -> Hostile {
        let (stream, reader) = streams();
        let accepting = thread::spawn(move || accept(reader, &SMALL, Duration::ZERO).unwrap());
        let offer = Message::receive(&stream, OFFER).unwrap();
        offer.send(&stream, ACCEPT).unwrap();
        let (reader, link) = accepting.join().unwrap();
        Hostile {
            reader,
            link,
            stream,
            nonce: offer.nonce,
        }
    }

    /// A good frame with these entries of the events lane.
    fn frame(&self, from: u64, first: u64, payloads: &[&[u8]]) -> Vec<u8> {
        let keys = Keys::new(&self.nonce);
        let mut piece = Vec::new();
        for (i, payload) in payloads.iter().enumerate() {
            let head = Head {
                lane: Lane::Events,
                lap: 0,
                seq: Seq(first + i as u64),
                marks: Marks::default(),
            };
            piece.extend(encode(&keys, &head, payload));
            piece.resize(piece.len().next_multiple_of(LINE), 0);
        }
        let seq = Seq(first + payloads.len() as u64 - 1);
        self.framed(Lane::Events, from, seq, &piece)
    }

    fn framed(&self, lane: Lane, from: u64, seq: Seq, piece: &[u8]) -> Vec<u8> {
        let frame = Frame {
            lane,
            from,
            seq,
            len: piece.len(),
            crc: 0,
        };
        let mut bytes = frame.to_bytes(&self.nonce, crc32c::crc32c(piece)).to_vec();
        bytes.extend_from_slice(piece);
        bytes
    }

    fn send(&self, bytes: &[u8]) {
        // The reader may have hung up in the middle.
        let _ = (&self.stream).write_all(bytes);
    }

    /// Waits for the reader to have hung up; why.
    fn refused(&self) -> StreamError {
        let until = Instant::now() + LONG;
        loop {
            if let Some(error) = self.link.broken() {
                return error;
            }
            assert!(Instant::now() < until, "it was not refused");
            thread::yield_now();
        }
    }
}

fn part(error: &StreamError) -> Part {
    match error {
        StreamError::Refused { part, .. } => *part,
        other => panic!("{other}"),
    }
}

#[test]
fn every_flipped_byte_of_a_frame_is_refused_and_what_came_before_stays() {
    let len = HEADER + LINE;
    for at in 0..len {
        let mut peer = Hostile::new();
        let good = peer.frame(0, 1, &[b"good"]);
        let mut bad = peer.frame(64, 2, &[b"bad"]);
        assert_eq!(bad.len(), len);
        bad[at] ^= 0x41;
        peer.send(&good);
        peer.send(&bad);
        // A length that became larger asks for more, which ends with the stream.
        let _ = peer.stream.shutdown(Shutdown::Write);
        let error = peer.refused();
        match at {
            0..16 => assert_eq!(part(&error), Part::Nonce),
            32..36 => assert_ne!(error, StreamError::Socket(String::new())),
            40 => assert_eq!(part(&error), Part::Lane),
            41..48 => assert_eq!(part(&error), Part::Reserved),
            _ => assert_eq!(part(&error), Part::Checksum),
        }
        let proof = peer.reader.fencer.fence().unwrap();
        assert_eq!(
            peer.reader.events.next().unwrap().unwrap().payload(),
            b"good"
        );
        assert_eq!(peer.reader.events.next(), Ok(None), "byte {at}");
        assert_eq!(peer.reader.events.at_end(&proof), Ok(true));
    }
}

#[test]
fn frames_that_cannot_be_are_refused() {
    let line = [0; LINE];
    let events = Lane::Events;
    type Make = fn(&Hostile, &[u8; LINE]) -> Vec<u8>;
    let cases: [(Make, Part); 7] = [
        (|p, l| p.framed(Lane::Events, 64, Seq(1), l), Part::Position),
        (
            |p, l| p.framed(Lane::Events, u64::MAX - 63, Seq(1), l),
            Part::Position,
        ),
        (|p, l| p.framed(Lane::Events, 0, Seq(2), l), Part::Sequence),
        (
            |p, l| p.framed(Lane::Events, 0, Seq(u64::MAX), l),
            Part::Sequence,
        ),
        (
            |p, l| p.framed(Lane::Events, 0, Seq(1), &l[..63]),
            Part::Length,
        ),
        (|p, _| p.framed(Lane::Events, 0, Seq(1), &[]), Part::Length),
        (
            |p, _| p.framed(Lane::Events, 0, Seq(1), &[0; MIN_LANE + LINE]),
            Part::Credit,
        ),
    ];
    for (make, wrong) in cases {
        let mut peer = Hostile::new();
        peer.send(&make(&peer, &line));
        assert_eq!(part(&peer.refused()), wrong);
        assert_eq!(peer.reader.events.next(), Ok(None));
    }
    let mut peer = Hostile::new();
    let mut huge = peer.framed(events, 0, Seq(1), &line);
    huge[32..36].copy_from_slice(&(MAX_PIECE as u32 + 64).to_le_bytes());
    peer.send(&huge);
    assert_eq!(
        part(&peer.refused()),
        Part::Length,
        "before its bytes are waited for"
    );
    assert_eq!(peer.reader.events.next(), Ok(None));
}

#[test]
fn a_replayed_or_foreign_frame_is_refused() {
    let mut peer = Hostile::new();
    let frame = peer.frame(0, 1, &[b"once"]);
    peer.send(&frame);
    peer.send(&frame);
    assert_eq!(part(&peer.refused()), Part::Position);
    assert_eq!(
        peer.reader.events.next().unwrap().unwrap().payload(),
        b"once"
    );
    assert_eq!(peer.reader.events.next(), Ok(None));

    let other = Hostile::new();
    other.send(&frame);
    assert_eq!(part(&other.refused()), Part::Nonce);
}

/// A frame in order, with a good checksum, whose bytes are no entry: it landed, and the reader of the lane says what it is.
#[test]
fn landed_nonsense_is_corruption() {
    let mut peer = Hostile::new();
    peer.send(&peer.framed(Lane::Events, 0, Seq(1), &[7; LINE]));
    let until = Instant::now() + LONG;
    let error = loop {
        match peer.reader.events.next() {
            Ok(entry) => assert!(entry.is_none()),
            Err(error) => break error,
        }
        assert!(Instant::now() < until);
    };
    assert!(matches!(error, crate::ReadError::Corrupt { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 1..4000), good: bool) {
        let mut peer = Hostile::new();
        if good {
            peer.send(&peer.frame(0, 1, &[b"good"]));
        }
        peer.send(&noise);
        let _ = peer.stream.shutdown(Shutdown::Write);
        peer.refused();
        let proof = peer.reader.fencer.fence().unwrap();
        prop_assert_eq!(peer.reader.events.next().unwrap().is_some(), good);
        prop_assert_eq!(peer.reader.events.next().unwrap().is_some(), false);
        prop_assert_eq!(peer.reader.events.at_end(&proof), Ok(true));
    }
}

/// A writer with three entries posted and sent, and the stream in the hands of a hostile reader.
fn hostile_reader() -> (RingWriter, TcpStream, Nonce) {
    let (writer, stream) = streams();
    let connecting = thread::spawn(move || connect(writer).unwrap());
    let offer = Message {
        nonce: Nonce(*b"a nonce of tests"),
        sizes: [MIN_LANE as u64; 2],
    };
    offer.send(&stream, OFFER).unwrap();
    assert!(Message::receive(&stream, ACCEPT).unwrap() == offer);
    let mut writer = connecting.join().unwrap();
    for _ in 0..3 {
        writer.events.append(b"entry", Marks::default()).unwrap();
    }
    writer.events.notify().unwrap();
    (writer, stream, offer.nonce)
}

fn ended(writer: &mut RingWriter) -> WriteError {
    let until = Instant::now() + LONG;
    loop {
        if let Err(error) = writer.events.notify() {
            return error;
        }
        assert!(Instant::now() < until, "it was believed");
        thread::yield_now();
    }
}

fn events(consumed: u64, received: u64, replayed: u64) -> Answer {
    let mut answer = Answer::default();
    answer.lanes[0] = LaneAnswer {
        consumed,
        received,
        replayed,
    };
    answer
}

#[test]
fn answers_that_cannot_be_break_the_writer() {
    let cases = [
        (events(64, 4, 1), Counter::Received),
        (events(64, 0, 0), Counter::Received),
        (events(0, 2, 1), Counter::Consumed),
        (events(65, 2, 1), Counter::Consumed),
        (events(4 * 64, 2, 1), Counter::Consumed),
        (events(64, 2, 3), Counter::Replayed),
        (events(64, 2, 0), Counter::Replayed),
        (events(64, u64::MAX, 1), Counter::Received),
    ];
    for (answer, wrong) in cases {
        let (mut writer, mut stream, nonce) = hostile_reader();
        stream
            .write_all(&events(64, 1, 1).to_bytes(&nonce))
            .unwrap();
        await_committed(&mut writer.events, 1);
        stream.write_all(&answer.to_bytes(&nonce)).unwrap();
        match ended(&mut writer) {
            WriteError::Counter { counter, .. } => assert_eq!(counter, wrong),
            other => panic!("{other}"),
        }
        assert!(writer.events.append(b"more", Marks::default()).is_err());
        assert!(writer.progress.poll().is_err());
    }
}

/// Nobody holds the watch, so that the connection's own thread has to see it.
#[test]
fn a_reader_that_answers_nothing_is_given_up_though_the_stream_is_open() {
    let (mut writer, _stream, _) = hostile_reader();
    let until = Instant::now() + LONG;
    let error = loop {
        match writer.events.notify() {
            Ok(()) => thread::sleep(Duration::from_millis(50)),
            Err(error) => break error.to_string(),
        }
        assert!(Instant::now() < until, "it is not given up");
    };
    assert!(error.contains("has not answered"), "{error}");
}

#[test]
fn every_flipped_byte_of_an_answer_breaks_the_writer() {
    for at in 0..ANSWER {
        let (mut writer, mut stream, nonce) = hostile_reader();
        let mut answer = events(64, 3, 2).to_bytes(&nonce);
        answer[at] ^= 0x10;
        stream.write_all(&answer).unwrap();
        let error = ended(&mut writer);
        assert!(
            matches!(error, WriteError::Transport { .. }),
            "byte {at}: {error}"
        );
        assert!(
            writer.events.committed().is_err(),
            "nothing of it was believed"
        );
    }
}

#[test]
fn bad_offers_and_answers_to_them_are_refused() {
    let good = Message {
        nonce: Nonce([3; 16]),
        sizes: [MIN_LANE as u64; 2],
    };
    let offered = |message: Message, magic: [u8; 8]| {
        let (writer, stream) = streams();
        message.send(&stream, magic).unwrap();
        connect(writer).map(drop)
    };
    assert!(matches!(
        offered(good, ACCEPT),
        Err(ConnectError::Protocol { .. })
    ));
    for size in [0, 100, u64::MAX] {
        let bad = Message {
            sizes: [MIN_LANE as u64, size],
            ..good
        };
        assert!(matches!(offered(bad, OFFER), Err(ConnectError::Size(_))));
    }
    let (writer, stream) = streams();
    drop(stream);
    assert!(matches!(connect(writer), Err(ConnectError::Stream(_))));
    let (stream, reader) = streams();
    let accepting = thread::spawn(move || accept(reader, &SMALL, Duration::ZERO).map(drop));
    good.send(&stream, ACCEPT).unwrap();
    let refused = accepting.join().unwrap();
    assert!(matches!(refused, Err(ConnectError::Protocol { .. })));
}
