//! The ring over verbs: a card that exists in this process only, or, where `DOPPEL_VERBS` names the library, the machine's own.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64 as Count, Ordering::SeqCst};
use std::thread;
use std::time::Instant;

use super::block::{Block, LaneWords};
use super::*;
use crate::entry::Lane;
use crate::entry::{Marks, Seq};
use crate::fence::FenceError;
use crate::lane::WriteError;
use crate::ring::RingWriter;
use crate::transport::suite::{LONG, SMALL, await_committed, payload, publish, read, read_until};
use crate::verbs::fake;

/// Whether the machine's own device carries the ring.
fn real() -> bool {
    std::env::var_os("DOPPEL_VERBS").is_some()
}

fn verbs() -> Verbs {
    if real() {
        Verbs::load().unwrap()
    } else {
        fake::verbs()
    }
}

/// Of the suite's counts: a soft-RoCE under emulation is a thousand times slower.
fn part() -> f64 {
    if real() { 0.05 } else { 1.0 }
}

/// A name for a fake device that no other test has.
fn name(side: &str) -> String {
    static NAMES: Count = Count::new(0);
    format!("fake-{side}-{}", NAMES.fetch_add(1, SeqCst))
}

fn config(mode: Mode, device: Option<&str>) -> Config {
    let device = device.filter(|_| !real()).map(str::to_owned);
    Config {
        choice: Choice {
            device,
            ..Choice::default()
        },
        mode,
        ..Config::default()
    }
}

/// The same under a name that a binding does not hide.
fn config_of(mode: Mode, device: &str) -> Config {
    config(mode, Some(device))
}

fn streams() -> (UnixStream, UnixStream) {
    let (writer, reader) = UnixStream::pair().unwrap();
    for stream in [&writer, &reader] {
        stream.set_read_timeout(Some(LONG)).unwrap();
    }
    (writer, reader)
}

/// Both sides, over devices of these names.
fn over(
    ring: RingConfig,
    mode: Mode,
    [writer, reader]: [&str; 2],
) -> (RingWriter, RingReader, Link) {
    let (mut there, mut here) = streams();
    let (writer, reader) = (config(mode, Some(writer)), config(mode, Some(reader)));
    thread::scope(|scope| {
        let accepting =
            scope.spawn(move || accept(&verbs(), &mut here, &ring, &reader, Duration::ZERO));
        let writer = connect(&verbs(), &mut there, &writer).unwrap();
        let (reader, link) = accepting.join().unwrap().unwrap();
        (writer, reader, link)
    })
}

fn pair(mode: Mode) -> impl Fn(RingConfig) -> (RingWriter, RingReader) {
    move |ring| {
        let (writer, reader, _) = over(ring, mode, [&name("writer"), &name("reader")]);
        (writer, reader)
    }
}

mod nic {
    use super::*;
    ring_suite!(pair(Mode::Nic), part());
}

mod ack {
    use super::*;
    ring_suite!(pair(Mode::Ack), part());
}

#[test]
fn an_entry_commits_without_its_reader() {
    for mode in [Mode::Nic, Mode::Ack] {
        let (mut writer, mut reader) = pair(mode)(SMALL);
        let seq = writer.events.append(b"one", Marks::default()).unwrap();
        assert_eq!(writer.events.committed(), Ok(Seq::ZERO), "not pushed");
        writer.events.notify().unwrap();
        await_committed(&mut writer.events, 1);
        let progress = writer.progress.poll().unwrap()[0];
        assert_eq!((progress.committed, progress.replayed), (seq, Seq::ZERO));
        assert_eq!(reader.events.next().unwrap().unwrap().seq(), seq);
        reader.events.set_replayed(seq).unwrap();
        reader.events.notify().unwrap();
        let until = Instant::now() + LONG;
        while writer.progress.poll().unwrap()[0].replayed != seq {
            assert!(Instant::now() < until, "what was replayed is not told");
            thread::yield_now();
        }
    }
}

#[test]
fn a_push_of_one_lane_sends_what_the_other_posted_before() {
    let (mut writer, mut reader) = pair(Mode::Nic)(SMALL);
    for round in 1..20 {
        writer.inputs.append(b"input", Marks::default()).unwrap();
        writer.events.append(b"event", Marks::default()).unwrap();
        writer.events.notify().unwrap();
        await_committed(&mut writer.inputs, round);
        while reader.inputs.next().unwrap().is_some() || reader.events.next().unwrap().is_some() {}
    }
}

/// Whoever watches is told of every commit at the descriptor, and no thread of the connection's own takes it away.
#[test]
fn a_watch_is_told_of_commits_by_its_descriptor() {
    for mode in [Mode::Nic, Mode::Ack] {
        let (mut there, mut here) = streams();
        let names = [name("writer"), name("reader")];
        let there_config = config(mode, Some(&names[1]));
        let accepting = thread::spawn(move || {
            let config = there_config;
            accept(&verbs(), &mut here, &SMALL, &config, Duration::ZERO).unwrap()
        });
        let config = config(mode, Some(&names[0]));
        let (mut writer, watch) = connect_watched(&verbs(), &mut there, &config).unwrap();
        let _reader = accepting.join().unwrap();
        for seq in 1..50 {
            writer.events.append(b"event", Marks::default()).unwrap();
            writer.events.notify().unwrap();
            watch.turn().unwrap();
            while watch.committed()[0] < Seq(seq) {
                let [socket] = crate::poll::wait([(watch.as_fd(), false)], Some(LONG)).unwrap();
                assert!(socket.read, "entry {seq}: nothing came");
                watch.turn().unwrap();
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- the fence

/// What the device has taken over and not carried out when the fence comes, fails, and its writer says so. A fake device
/// stands still for that; a real one is fenced somewhere in the middle of a stream.
#[test]
fn writes_in_flight_when_the_fence_comes_do_not_commit() {
    for round in 0..20_u64 {
        let names = [name("writer"), name("reader")];
        let (mut writer, mut reader, _) = over(SMALL, Mode::Nic, [&names[0], &names[1]]);
        publish(&mut writer.events, round, 100, 1).unwrap();
        await_committed(&mut writer.events, round);
        fake::stop(&names[0], true);
        for _ in 0..5 {
            writer
                .events
                .append(b"in flight", Marks::default())
                .unwrap();
            writer.events.notify().unwrap();
        }
        let proof = reader.fencer.fence().unwrap();
        while reader.events.next().unwrap().is_some() {}
        let drained = reader.events.last();
        assert_eq!(reader.events.at_end(&proof), Ok(true));
        assert!(real() || drained == Seq(round));
        fake::stop(&names[0], false);
        let until = Instant::now() + LONG;
        while writer.events.notify().is_ok() {
            assert!(Instant::now() < until, "the writer is not told");
            thread::yield_now();
        }
        assert_eq!(writer.events.notify(), Err(WriteError::Fenced));
        let committed = writer.events.committed().unwrap_or_default();
        assert!(committed <= drained, "{committed} {drained}");
        assert_eq!(reader.events.next(), Ok(None), "nothing came afterwards");
        assert_eq!(reader.fencer.fence(), Err(FenceError::Already));
    }
}

/// A device that takes nothing back proves nothing, however often it is asked.
#[test]
fn a_fence_that_was_refused_is_refused_again_until_it_is_made() {
    if real() {
        return;
    }
    let names = [name("writer"), name("reader")];
    let (_writer, mut reader, _link) = over(SMALL, Mode::Nic, [&names[0], &names[1]]);
    fake::keep(&names[1], true);
    for _ in 0..3 {
        let refused = reader.fencer.fence().unwrap_err();
        assert!(matches!(refused, FenceError::Transport { .. }), "{refused}");
    }
    fake::keep(&names[1], false);
    let proof = reader.fencer.fence().unwrap();
    assert!(reader.events.at_end(&proof).unwrap());
}

/// A writer with nothing to say learns of the fence as well.
#[test]
fn an_idle_writer_notices_the_fence() {
    let names = [name("writer"), name("reader")];
    let (mut writer, mut reader, _) = over(SMALL, Mode::Nic, [&names[0], &names[1]]);
    // The reader's last word does not come through, if the device can be kept from it.
    fake::stop(&names[1], true);
    let _proof = reader.fencer.fence().unwrap();
    let until = Instant::now() + LONG;
    while !writer.progress.poll().unwrap()[0].fenced {
        assert!(Instant::now() < until, "the writer is not told");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(
        writer.events.append(b"late", Marks::default()),
        Err(WriteError::Fenced)
    );
    fake::stop(&names[1], false);
}

// ----------------------------------------------------------------------------------------------- death

/// The other host is gone, in the middle of a stream or with nobody having anything to say: both sides notice.
#[test]
fn a_host_that_is_gone_is_noticed_by_both_sides() {
    if real() {
        return; // The lab kills real processes and hosts: tests/processes.rs, and the hypervisor's tests.
    }
    for busy in [true, false] {
        let names = [name("writer"), name("reader")];
        let (mut writer, mut reader, link) = over(SMALL, Mode::Nic, [&names[0], &names[1]]);
        let sizes = writer.events.max_payload();
        thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut goal = 10;
                loop {
                    if let Err(error) = publish(&mut writer.events, goal, sizes, 1) {
                        return error;
                    }
                    goal += u64::from(busy);
                }
            });
            read_until(&mut reader.events, 10, sizes);
            fake::cut(&names[0]);
            let until = Instant::now() + LONG;
            while link.broken().is_none() {
                assert!(Instant::now() < until, "the reader does not notice");
                read(&mut reader.events, sizes);
                reader.events.notify().unwrap();
                let _ = reader.events.wait(Duration::from_millis(5)).unwrap();
            }
            assert!(matches!(link.broken(), Some(RdmaError::PeerGone { .. })));
            assert_eq!(writing.join().unwrap(), WriteError::Closed);
        });
        let proof = reader.fencer.fence().unwrap();
        let last = read(&mut reader.events, sizes);
        assert_eq!(reader.events.at_end(&proof), Ok(true));
        assert!(writer.events.committed().unwrap_or_default() <= Seq(last));
        let error = writer.events.append(b"late", Marks::default());
        assert_eq!(error, Err(WriteError::Closed));
    }
}

#[test]
fn what_was_posted_before_the_writer_was_dropped_arrives() {
    for mode in [Mode::Nic, Mode::Ack] {
        let (mut writer, mut reader) = pair(mode)(SMALL);
        for seq in 1..=20 {
            writer
                .inputs
                .append(&payload(seq, 300), Marks::default())
                .unwrap();
        }
        drop(writer);
        read_until(&mut reader.inputs, 20, 300);
    }
}

// ----------------------------------------------------------------------------------------------- hostile peers

/// A writer, and the other side in the hands of somebody who writes into its page what he likes.
struct HostileReader {
    writer: RingWriter,
    local: Local<()>,
    slots: Slots,
    posted: u64,
    _ring: Registered,
}

impl HostileReader {
    fn new(mode: Mode) -> HostileReader {
        let (mut there, mut here) = streams();
        let config = config(mode, Some(&name("hostile")));
        let names = name("writer");
        let there_config = config_of(mode, &names);
        let connecting = thread::spawn(move || {
            let config = there_config;
            connect(&verbs(), &mut there, &config).unwrap()
        });
        let mut local = Local::open(&verbs(), &config).unwrap();
        let nonce = Nonce(*b"a nonce of tests");
        let region = memory(PAGE + SMALL.events + SMALL.inputs).unwrap();
        let ring = Registered::new(&local.device, &region, Writes::Peer).unwrap();
        let sizes = [SMALL.events as u64, SMALL.inputs as u64];
        let own = local.hello(mode, nonce, sizes, ring.remote());
        here.write_all(&own.to_bytes(Side::Reader)).unwrap();
        let there = receive(&mut here, Side::Writer).unwrap();
        let slots = Slots::new(&local.device, there.memory, nonce, From::Reader).unwrap();
        local.connect(&own, &there).unwrap();
        here.write_all(&READY).unwrap();
        let mut writer = connecting.join().unwrap();
        for _ in 0..3 {
            writer.events.append(b"entry", Marks::default()).unwrap();
        }
        writer.events.notify().unwrap();
        HostileReader {
            writer,
            local,
            slots,
            posted: 0,
            _ring: ring,
        }
    }

    fn say(&mut self, [consumed, received, replayed]: [u64; 3]) {
        let mut block = Block::default();
        block.lanes[0] = LaneWords {
            consumed,
            received,
            replayed,
        };
        let pipe = &mut self.local.pipes[0];
        let posted = self
            .slots
            .post(pipe, block, false, (), self.posted)
            .unwrap();
        assert!(posted);
        let until = Instant::now() + LONG;
        let before = self.posted;
        while self.posted == before {
            pipe.take(|()| self.posted += 1).unwrap();
            assert!(Instant::now() < until);
        }
    }
}

#[test]
fn counters_that_cannot_be_break_the_writer() {
    use crate::lane::Counter;
    let cases = [
        ([64, 4, 1], Counter::Received),
        ([64, 0, 0], Counter::Received),
        ([0, 2, 1], Counter::Consumed),
        ([65, 2, 1], Counter::Consumed),
        ([4 * 64, 2, 1], Counter::Consumed),
        ([64, 2, 4], Counter::Replayed),
        ([64, 2, 0], Counter::Replayed),
        ([64, u64::MAX, 1], Counter::Received),
    ];
    for (words, wrong) in cases {
        let mut peer = HostileReader::new(Mode::Ack);
        peer.say([64, 1, 1]);
        await_committed(&mut peer.writer.events, 1);
        peer.say(words);
        let until = Instant::now() + LONG;
        let error = loop {
            if let Err(error) = peer.writer.events.notify() {
                break error;
            }
            assert!(Instant::now() < until, "it was believed");
            thread::yield_now();
        };
        match error {
            WriteError::Counter { counter, .. } => assert_eq!(counter, wrong),
            other => panic!("{other}"),
        }
        assert!(
            peer.writer
                .events
                .append(b"more", Marks::default())
                .is_err()
        );
        assert!(peer.writer.progress.poll().is_err());
        assert_eq!(peer.writer.events.committed().unwrap_or(Seq(1)), Seq(1));
    }
}

/// In mode `nic` what the reader says it received commits nothing, and credit is given only for what has arrived.
#[test]
fn in_mode_nic_a_reader_cannot_commit_what_was_not_written() {
    if real() {
        return; // A real device cannot be stopped in the middle.
    }
    let names = [name("writer"), name("reader")];
    let (mut writer, _reader, _) = over(SMALL, Mode::Nic, [&names[0], &names[1]]);
    fake::stop(&names[0], true);
    writer.events.append(b"stuck", Marks::default()).unwrap();
    writer.events.notify().unwrap();
    _reader.acks.received(Lane::Events, Seq(1));
    let until = Instant::now() + LONG;
    while writer.progress.poll().unwrap()[0].received != Seq(1) {
        assert!(Instant::now() < until);
        thread::yield_now();
    }
    assert_eq!(writer.progress.poll().unwrap()[0].committed, Seq::ZERO);
    assert_eq!(writer.events.committed(), Ok(Seq::ZERO));
    fake::stop(&names[0], false);
    await_committed(&mut writer.events, 1);
}

// ----------------------------------------------------------------------------------------------- set-up

fn refused(
    ring: RingConfig,
    [here, there]: [Config; 2],
) -> (Result<(), ConnectError>, Result<(), ConnectError>) {
    let (mut writer, mut reader) = streams();
    thread::scope(|scope| {
        let accepting = scope.spawn(move || {
            accept(&fake::verbs(), &mut reader, &ring, &here, Duration::ZERO).map(drop)
        });
        let connected = connect(&fake::verbs(), &mut writer, &there).map(drop);
        drop(writer);
        (accepting.join().unwrap(), connected)
    })
}

fn fake_config(mode: Mode, device: &str) -> Config {
    Config {
        choice: Choice {
            device: Some(device.to_owned()),
            ..Choice::default()
        },
        mode,
        ..Config::default()
    }
}

#[test]
fn sides_that_do_not_fit_say_in_what() {
    let nic = fake_config(Mode::Nic, "fake");
    let ack = fake_config(Mode::Ack, "fake");
    let (_, refusal) = refused(SMALL, [nic.clone(), ack]);
    let text = refusal.unwrap_err().to_string();
    assert!(text.contains("mode here is ack, there nic"), "{text}");
    let infiniband = fake_config(Mode::Nic, "fake-infiniband");
    let (_, refusal) = refused(SMALL, [nic.clone(), infiniband.clone()]);
    let text = refusal.unwrap_err().to_string();
    assert!(text.contains("link layer here is InfiniBand"), "{text}");
    let (accepted, connected) = refused(SMALL, [infiniband.clone(), infiniband]);
    accepted.unwrap();
    connected.unwrap();
    let bad = RingConfig {
        events: 100,
        ..SMALL
    };
    let (refusal, _) = refused(bad, [nic.clone(), nic]);
    assert!(matches!(refusal, Err(ConnectError::Size(_))));
}

#[test]
fn entries_longer_than_a_message_are_refused_on_either_side() {
    let (fits, short) = (
        fake_config(Mode::Nic, "fake"),
        fake_config(Mode::Nic, "fake-short"),
    );
    let ring = RingConfig {
        inputs: 1 << 20,
        ..SMALL
    };
    let (here, _) = refused(ring, [short.clone(), fits.clone()]);
    let (_, there) = refused(ring, [fits, short]);
    for refusal in [here, there] {
        let Err(ConnectError::Rdma(RdmaError::Message { needed, most, .. })) = refusal else {
            panic!("{refusal:?}");
        };
        assert_eq!((needed, most), (1 << 18, 1 << 10));
    }
}

#[test]
fn offers_that_cannot_be_are_refused() {
    let good = Hello {
        mode: Mode::Nic,
        ethernet: true,
        mtu: 3,
        nonce: Nonce([3; 16]),
        sizes: [SMALL.events as u64, SMALL.inputs as u64],
        gid: [7; 16],
        queues: [1, 2],
        psns: [0, 0],
        memory: Remote {
            address: 4096,
            key: 1,
            len: (PAGE + SMALL.events + SMALL.inputs) as u64,
        },
        lid: 0,
    };
    let offered = |bytes: &[u8]| {
        let (mut writer, mut stream) = streams();
        stream.write_all(bytes).unwrap();
        drop(stream);
        let config = fake_config(Mode::Nic, "fake");
        connect(&fake::verbs(), &mut writer, &config).map(drop)
    };
    let bytes = good.to_bytes(Side::Reader);
    for len in 0..=HELLO {
        let refusal = offered(&bytes[..len]);
        assert!(matches!(refusal, Err(ConnectError::Stream(_))), "{len}");
    }
    let mut short = good;
    short.memory.len -= 1;
    let refusal = offered(&short.to_bytes(Side::Reader));
    assert!(matches!(refusal, Err(ConnectError::Protocol { .. })));
    for size in [0, 100, u64::MAX] {
        let sizes = [4096, size];
        let bad = Hello { sizes, ..good };
        let refusal = offered(&bad.to_bytes(Side::Reader));
        assert!(matches!(refusal, Err(ConnectError::Size(_))), "{size}");
    }
    let (stream, mut reader) = streams();
    let accepting = thread::spawn(move || {
        let config = fake_config(Mode::Nic, "fake");
        accept(&fake::verbs(), &mut reader, &SMALL, &config, Duration::ZERO).map(drop)
    });
    // An answer with another nonce.
    (&stream).write_all(&good.to_bytes(Side::Writer)).unwrap();
    let refusal = accepting.join().unwrap();
    assert!(matches!(refusal, Err(ConnectError::Protocol { .. })));
}

#[test]
fn a_peer_is_given_up_after_half_a_second_or_as_late_as_is_asked_for() {
    assert_eq!(timeout(Duration::ZERO), TIMEOUT);
    assert_eq!(timeout(Duration::from_millis(469)), TIMEOUT);
    assert_eq!(timeout(Duration::from_millis(470)), TIMEOUT + 1);
    assert_eq!(timeout(Duration::from_secs(4)), 18);
    assert_eq!(timeout(Duration::MAX), LONGEST_TIMEOUT);
}
