//! Hostile memory, fences, bells, salvage, and the set-up over a socket.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64 as Plain, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::control::PAGE;
use crate::entry::Keys;
use crate::entry::{Epoch, Field, HEADER_LEN, Head, Header, Kind, LINE, Marks, Stamp, encode};
use crate::fdpass::send_with_fds;
use crate::lane::LaneWriter;
use crate::lane::{Counter, MIN_LANE};
use crate::region::memfd;

const SMALL: RingConfig = RingConfig {
    events: MIN_LANE,
    inputs: MIN_LANE,
};
const NONCE: Nonce = Nonce(*b"a nonce of tests");
/// Far longer than anything waited for here takes; if it passes, a wake-up was lost.
const LONG: Duration = Duration::from_secs(20);

mod common {
    use crate::transport::shm;

    ring_suite!(|config| shm::pair(&config).unwrap(), 2.0,
        both_lanes_carry_every_size_through_many_laps
        what_is_written_is_read
        sleepers_are_woken
        a_writer_that_waits_for_room_is_woken
        waiting_ends_with_its_time
        progress_from_another_thread_is_never_ahead_of_what_is_posted
    );
}

fn marks() -> Marks {
    Marks::default()
}

/// A reader, and the memory in the hands of a peer that does with it what it likes.
struct Hostile {
    reader: RingReader,
    words: Shared,
    events: WriteView,
    _inputs: WriteView,
    keys: Keys,
}

impl Hostile {
    fn new() -> Hostile {
        let region = Region::heap(2 * MIN_LANE);
        let sizes = [MIN_LANE; 2];
        let words = Shared {
            log: Words::heap(),
            back: Words::heap(),
        };
        let views = region.read_views(0, sizes);
        let [events, inputs] = region.write_views(0, sizes);
        Hostile {
            reader: reader(NONCE, SMALL.geometries().unwrap(), words.clone(), views),
            words,
            events,
            _inputs: inputs,
            keys: Keys::new(&NONCE),
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        let room = MIN_LANE - at.min(MIN_LANE);
        let bytes = &bytes[..bytes.len().min(room)];
        self.events
            .bytes_mut(at, bytes.len())
            .copy_from_slice(bytes);
    }

    fn tail(&self, value: u64) {
        self.words
            .log
            .lane(Lane::Events)
            .tail
            .0
            .store(value, Ordering::Release);
    }

    /// Reads until nothing or an error comes; the payloads, and the error. When there seems to be nothing it asks for
    /// the tail, as a reader does before it sleeps.
    fn read(&mut self) -> (Vec<Vec<u8>>, Option<ReadError>) {
        let mut got = Vec::new();
        let mut asked = false;
        for _ in 0..=MIN_LANE / LINE + 1 {
            match self.reader.events.next() {
                Ok(Some(entry)) => got.push(entry.payload().to_vec()),
                Ok(None) if asked => return (got, None),
                Ok(None) => match self.reader.events.wait(Duration::ZERO) {
                    Ok(true) => asked = true,
                    Ok(false) => return (got, None),
                    Err(error) => return (got, Some(error)),
                },
                Err(error) => return (got, Some(error)),
            }
        }
        panic!("more entries than the lane has lines");
    }
}

/// Entries laid one after the other from the start of the lane; their bytes and the tail.
fn laid(keys: &Keys, payloads: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, payload) in payloads.iter().enumerate() {
        let head = Head {
            lane: Lane::Events,
            lap: 0,
            seq: Seq(i as u64 + 1),
            marks: marks(),
        };
        bytes.extend(encode(keys, &head, payload));
        bytes.resize(bytes.len().next_multiple_of(LINE), 0);
    }
    bytes
}

/// A header with a good stamp and checksum, as a peer can make that knows the nonce.
fn forged() -> impl Strategy<Value = (Header, u32, Kind)> {
    let len = prop_oneof![
        0..64u32,
        0..MIN_LANE as u32 + 64,
        any::<u32>(),
        Just(MIN_LANE as u32 - 32)
    ];
    let lag = || prop_oneof![0..3u32, Just(u32::MAX), any::<u32>()];
    let seq = prop_oneof![0..4u64, any::<u64>()];
    (len, seq, lag(), lag(), 0..2u32, any::<bool>()).prop_map(
        |(len, seq, committed_lag, released_lag, lap, pad)| {
            let header = Header {
                len,
                crc: 0,
                seq,
                stamp: 0,
                epoch: 1,
                committed_lag,
                released_lag,
            };
            (header, lap, if pad { Kind::Pad } else { Kind::Entry })
        },
    )
}

proptest! {
    #[test]
    fn damaged_memory_gives_only_what_was_written(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..12),
        hits in prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..6),
    ) {
        let mut peer = Hostile::new();
        let good = laid(&peer.keys, &payloads);
        let mut bad = good.clone();
        for (at, flip) in hits {
            bad[at.index(good.len())] ^= flip;
        }
        peer.put(0, &bad);
        peer.tail(good.len() as u64);
        let (got, error) = peer.read();
        prop_assert_eq!(&got[..], &payloads[..got.len()]);
        // What is missing is missing with an error, and the same one when asked again.
        prop_assert_eq!(got.len() == payloads.len(), error.is_none());
        prop_assert_eq!(peer.reader.events.next().map(drop).err(), error);
    }

    #[test]
    fn random_memory_never_panics(seed: u64, tail: u64, aligned: bool, open in any::<[u64; 2]>()) {
        let mut peer = Hostile::new();
        let mut state = seed | 1;
        let noise: Vec<u8> = (0..MIN_LANE).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        }).collect();
        peer.put(0, &noise);
        peer.tail(if aligned { tail % (2 * MIN_LANE as u64) / 64 * 64 } else { tail });
        let slot = &peer.words.log.lane(Lane::Events).open.0;
        slot.at.store(open[0], Ordering::Relaxed);
        slot.len.store(open[1], Ordering::Relaxed);
        prop_assert_eq!(peer.read().0.len(), 0);
        let proof = peer.reader.fencer.fence().unwrap();
        let _ = peer.reader.events.at_end(&proof);
        let _ = peer.reader.events.salvage(&proof);
    }

    /// The peer knows the nonce, so checksums are no hurdle for it: every field is checked by itself.
    #[test]
    fn forged_headers_never_panic_or_read_outside(
        headers in prop::collection::vec((0..MIN_LANE / LINE, forged()), 1..20),
        first in forged(), tail in 0..=2 * MIN_LANE as u64 / 64,
    ) {
        let mut peer = Hostile::new();
        for (line, (mut header, lap, kind)) in headers.into_iter().chain([(0, first)]) {
            let lane = Lane::Events;
            header.stamp = peer.keys.stamp(Stamp { lane, lap, kind });
            let at = line * LINE;
            // Seal over whatever follows, when that much can follow.
            let len = header.len as usize;
            let fits = kind == Kind::Entry && len <= MIN_LANE - at - HEADER_LEN;
            let payload = if fits { peer.events.bytes(at + HEADER_LEN, len).to_vec() } else { Vec::new() };
            header.crc = match peer.keys.check(&header, &payload) {
                Err(fault) => fault.expected as u32,
                Ok(()) => 0,
            };
            peer.put(at, &header.to_bytes());
        }
        peer.tail(tail * 64);
        let before = peer.reader.events.last();
        let (got, error) = peer.read();
        prop_assert_eq!(peer.reader.events.last().0 - before.0, got.len() as u64);
        let consumed = peer.words.back.lane(Lane::Events).consumed.0.load(Ordering::Relaxed);
        // What was taken before its commit is one range, with a pad at most, unless it was refused in the end.
        let most = tail * 64 + MIN_LANE as u64 / 2;
        prop_assert!(consumed.is_multiple_of(64) && (error.is_some() || consumed <= most));
    }
}

#[test]
fn every_flipped_bit_of_an_entry_is_named() {
    let payloads = [b"twenty bytes of load".to_vec(), vec![]];
    let good = laid(&Keys::new(&NONCE), &payloads);
    for bit in 0..(HEADER_LEN + payloads[0].len()) * 8 {
        let mut peer = Hostile::new();
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        peer.put(0, &bad);
        peer.tail(good.len() as u64);
        let (got, error) = peer.read();
        let Some(ReadError::Corrupt {
            lane: Lane::Events,
            seq: Seq(1),
            offset: 0,
            field,
            expected,
            found,
        }) = error
        else {
            panic!("bit {bit}: {error:?}");
        };
        assert!(got.is_empty() && expected != found);
        match bit / 8 {
            16..20 => assert_eq!(field, Field::Stamp),
            0..4 => assert!(matches!(field, Field::Length | Field::Checksum)),
            _ => assert_eq!(field, Field::Checksum),
        }
    }
}

#[test]
fn a_tail_that_cannot_be_is_corrupt() {
    for tail in [1, 63, 65, MIN_LANE as u64 + 64, 1 << 62, (1 << 63) - 1] {
        let mut peer = Hostile::new();
        peer.tail(tail);
        let (_, error) = peer.read();
        assert!(
            matches!(error, Some(ReadError::Corrupt { field: Field::Tail, found, .. }) if found == tail),
            "{error:?}"
        );
    }
    let mut peer = Hostile::new();
    let good = laid(&peer.keys, &[vec![1], vec![2]]);
    peer.put(0, &good);
    peer.tail(128);
    assert_eq!(peer.read().0.len(), 2);
    peer.tail(64);
    assert!(matches!(
        peer.read().1,
        Some(ReadError::Corrupt {
            field: Field::Tail,
            expected: 128,
            found: 64,
            ..
        })
    ));
}

#[test]
fn a_length_beyond_the_tail_or_the_lap_is_corrupt() {
    let lines = (MIN_LANE / LINE) as u64;
    // Where the forged entry stands, in lines, the tail, and the longest payload that could be there.
    for (line, tail, most) in [
        (0, 1, 32),
        (0, 3, 160),
        (lines - 1, lines, 32),
        (lines - 2, lines, 96),
    ] {
        for len in [most + 1, most + 64, MIN_LANE as u64 / 4 - 32] {
            let mut peer = Hostile::new();
            let mut bytes = laid(&peer.keys, &vec![vec![]; line as usize + 1]);
            let at = bytes.len() - LINE;
            bytes[at..at + 4].copy_from_slice(&(len as u32).to_le_bytes());
            peer.put(0, &bytes);
            peer.tail(tail * LINE as u64);
            let (got, error) = peer.read();
            assert_eq!(got.len() as u64, line);
            let expected = ReadError::Corrupt {
                lane: Lane::Events,
                seq: Seq(line + 1),
                offset: at as u64,
                field: Field::Length,
                expected: most,
                found: len,
            };
            assert_eq!(error, Some(expected));
        }
    }
}

#[test]
fn a_noted_slot_that_cannot_be_is_not_salvaged() {
    let most = MIN_LANE as u64 / 4 - 32;
    let slots = [
        (0, most, true),
        (0, most + 1, false),
        (0, MIN_LANE as u64, false),
    ];
    let more = [
        (0, u64::MAX, false),
        (64, 8, false),
        (u64::MAX - 1, 8, false),
    ];
    for (at, len, found) in slots.into_iter().chain(more) {
        let mut peer = Hostile::new();
        let slot = &peer.words.log.lane(Lane::Events).open.0;
        slot.at.store(at + 1, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        let proof = peer.reader.fencer.fence().unwrap();
        let salvaged = peer.reader.events.salvage(&proof).unwrap();
        assert_eq!(
            salvaged.map(|bytes| bytes.len() as u64),
            found.then_some(len),
            "{at} {len}"
        );
    }
}

#[test]
fn a_writer_that_clears_the_fence_bit_gets_nothing_in() {
    let mut peer = Hostile::new();
    let good = laid(&peer.keys, &[vec![1], vec![2]]);
    peer.put(0, &good);
    peer.tail(64);
    let proof = peer.reader.fencer.fence().unwrap();
    peer.tail(128);
    assert_eq!(peer.read().0, [vec![1]]);
    assert_eq!(peer.reader.events.at_end(&proof), Ok(true));
}

/// A peer that has written a whole entry, behind a pad or not, and not committed it; its tail, and where the entry starts.
fn uncommitted(padded: bool) -> (Hostile, u64, u64) {
    let mut peer = Hostile::new();
    // With all lines of the lap in use but one, an entry of two needs a pad.
    let before = if padded { MIN_LANE / LINE - 1 } else { 1 };
    let (tail, seq) = (before * LINE, Seq(before as u64 + 1));
    let bytes = laid(&peer.keys, &vec![vec![]; before]);
    peer.put(0, &bytes);
    peer.tail(tail as u64);
    assert_eq!(peer.read().0.len(), before);

    let at = if padded { MIN_LANE } else { tail };
    let (lane, lap, marks) = (Lane::Events, u32::from(padded), marks());
    let head = Head {
        lane,
        lap,
        seq,
        marks,
    };
    let bytes = encode(&peer.keys, &head, &[2; 40]);
    peer.put(at % MIN_LANE, &bytes);
    if padded {
        let pad = peer.keys.pad(lane, 0, seq, (LINE - HEADER_LEN) as u32);
        peer.put(tail, &pad.to_bytes());
    }
    (peer, tail as u64, at as u64)
}

/// The writer died, or met the fence, between an entry's last byte and its commit, and the reader had been quicker.
#[test]
fn an_entry_may_be_taken_before_it_commits_and_is_then_the_last() {
    for padded in [false, true] {
        let (mut peer, tail, at) = uncommitted(padded);
        let slot = &peer.words.log.lane(Lane::Events).open.0;
        slot.len.store(64, Ordering::Relaxed);
        slot.at.store(at + 1, Ordering::Relaxed);

        assert_eq!(peer.read(), (vec![vec![2; 40]], None));
        let proof = peer.reader.fencer.fence().unwrap();
        assert_eq!(proof.end(Lane::Events), Some(tail));
        assert_eq!(peer.read(), (vec![], None));
        assert_eq!(peer.reader.events.at_end(&proof), Ok(true));
        // It was taken, so it is not salvaged as well.
        assert_eq!(peer.reader.events.salvage(&proof), Ok(None));
    }
}

#[test]
fn an_entry_that_had_not_committed_is_not_taken_after_the_fence() {
    for padded in [false, true] {
        let (mut peer, tail, _) = uncommitted(padded);
        let proof = peer.reader.fencer.fence().unwrap();
        assert_eq!(proof.end(Lane::Events), Some(tail));
        assert_eq!(peer.read(), (vec![], None));
        assert_eq!(peer.reader.events.at_end(&proof), Ok(true));
    }
}

#[test]
fn a_writer_that_never_commits_is_found_out_at_its_second_entry() {
    let mut peer = Hostile::new();
    let bytes = laid(&peer.keys, &[vec![1], vec![2], vec![3]]);
    let tail_is = |error: Option<ReadError>, expected_tail| matches!(error, Some(ReadError::Corrupt { field: Field::Tail, expected, found: 0, .. }) if expected == expected_tail);
    peer.put(0, &bytes[..LINE]);
    assert_eq!(peer.read(), (vec![vec![1]], None));
    peer.put(0, &bytes);
    let (got, error) = peer.read();
    assert_eq!(got, [vec![2], vec![3]]);
    assert!(tail_is(error, bytes.len() as u64));
    let proof = peer.reader.fencer.fence().unwrap();
    assert!(peer.reader.events.at_end(&proof).is_err());
}

/// A reader that spins and never asks for the tail is told in the end.
#[test]
fn what_has_committed_and_is_not_whole_is_found_by_spinning() {
    let mut peer = Hostile::new();
    let mut bytes = laid(&peer.keys, &[vec![1], vec![2]]);
    bytes[LINE + HEADER_LEN] ^= 1;
    peer.put(0, &bytes);
    peer.tail(bytes.len() as u64);
    assert!(peer.reader.events.next().unwrap().is_some());
    let error = (0..64).find_map(|_| peer.reader.events.next().err());
    assert!(matches!(
        error,
        Some(ReadError::Corrupt {
            seq: Seq(2),
            field: Field::Checksum,
            ..
        })
    ));
}

#[test]
fn acknowledgements_from_many_threads_never_go_back() {
    const LAST: u64 = 30_000;
    let peer = Hostile::new();
    let acks = &peer.reader.acks;
    let received = &peer.words.back.lane(Lane::Inputs).acks.0.others.received;
    thread::scope(|scope| {
        for of in 0..3 {
            scope.spawn(move || {
                for n in (1..=LAST).filter(|n| n % 3 == of) {
                    acks.received(Lane::Inputs, Seq(n));
                }
            });
        }
        let mut seen = 0;
        while seen < LAST {
            let now = received.load(Ordering::Acquire);
            assert!(now >= seen, "{now} after {seen}");
            seen = now;
        }
    });
}

#[test]
fn counters_that_cannot_be_break_the_writer() {
    let words = Shared {
        log: Words::heap(),
        back: Words::heap(),
    };
    let views = Region::heap(2 * MIN_LANE).write_views(0, [MIN_LANE; 2]);
    let mut ring = writer(NONCE, SMALL.geometries().unwrap(), words.clone(), views);
    let back = words.back.lane(Lane::Events);
    let Acked { received, replayed } = &back.acks.0.lane;
    ring.events.append(b"one", marks()).unwrap();
    received.store(1, Ordering::Relaxed);
    assert_eq!(ring.progress.poll().unwrap()[0].received, Seq(1));
    let wrong = |counter, least, most, found| WriteError::Counter {
        lane: Lane::Events,
        counter,
        least,
        most,
        found,
    };
    received.store(0, Ordering::Relaxed);
    assert_eq!(ring.progress.poll(), Err(wrong(Counter::Received, 1, 1, 0)));
    received.store(1, Ordering::Relaxed);
    replayed.store(2, Ordering::Relaxed);
    assert_eq!(ring.progress.poll(), Err(wrong(Counter::Replayed, 0, 1, 2)));

    // Credit for one entry was used; then the counter goes back.
    while ring.events.append(&[0; 32], marks()).is_ok() {}
    back.consumed.0.store(64, Ordering::Relaxed);
    ring.events.append(&[0; 32], marks()).unwrap();
    back.consumed.0.store(0, Ordering::Relaxed);
    let posted = MIN_LANE as u64;
    let gone_back = Err(wrong(Counter::Consumed, 64, posted + 64, 0));
    assert_eq!(ring.events.append(&[], marks()), gone_back);

    for (found, least) in [(posted + 64, 0), (63, 0)] {
        back.consumed.0.store(found, Ordering::Relaxed);
        let mut fresh = writer(NONCE, SMALL.geometries().unwrap(), words.clone(), {
            words
                .log
                .lane(Lane::Events)
                .tail
                .0
                .store(0, Ordering::Relaxed);
            Region::heap(2 * MIN_LANE).write_views(0, [MIN_LANE; 2])
        });
        let broken = loop {
            if let Err(error) = fresh.events.append(&[0; 32], marks()) {
                break error;
            }
        };
        assert_eq!(broken, wrong(Counter::Consumed, least, posted, found));
        assert_eq!(
            fresh.events.append(&[], marks()),
            Err(broken),
            "it stays broken"
        );
    }
}

#[test]
fn a_tail_that_somebody_else_moved_breaks_the_writer() {
    let words = Shared {
        log: Words::heap(),
        back: Words::heap(),
    };
    let views = Region::heap(2 * MIN_LANE).write_views(0, [MIN_LANE; 2]);
    let mut ring = writer(NONCE, SMALL.geometries().unwrap(), words.clone(), views);
    words
        .log
        .lane(Lane::Events)
        .tail
        .0
        .store(640, Ordering::Relaxed);
    assert_eq!(
        ring.events.append(b"", marks()),
        Err(WriteError::Tail {
            lane: Lane::Events,
            expected: 0,
            found: 640
        })
    );
    assert_eq!(ring.inputs.append(b"", marks()), Ok(Seq(1)));
}

/// Publishes until fenced; the highest number that was said to be published.
fn hammer(mut half: LaneWriter, go: &AtomicBool) -> u64 {
    while !go.load(SeqCst) {
        std::hint::spin_loop();
    }
    loop {
        let seq = half.last().next().0;
        match half.append(&seq.to_le_bytes(), marks()) {
            Ok(_) => {}
            Err(WriteError::Full { .. }) => std::hint::spin_loop(),
            Err(WriteError::Fenced) => return half.last().0,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_was_published_before_the_fence_is_drained_and_nothing_else() {
    for round in 0..300u64 {
        let (writer, mut reader) = pair(&SMALL).unwrap();
        let go = AtomicBool::new(false);
        thread::scope(|scope| {
            let events = scope.spawn(|| hammer(writer.events, &go));
            let inputs = scope.spawn(|| hammer(writer.inputs, &go));
            go.store(true, SeqCst);
            // Somewhere in the middle, another place each round.
            for _ in 0..round * 3 {
                reader.events.next().unwrap();
                reader.inputs.next().unwrap();
            }
            let proof = reader.fencer.fence().unwrap();
            for (half, hammer) in [(&mut reader.events, events), (&mut reader.inputs, inputs)] {
                while let Some(entry) = half.next().unwrap() {
                    assert_eq!(entry.payload(), entry.seq().0.to_le_bytes());
                }
                assert_eq!(half.at_end(&proof), Ok(true));
                // One entry may have been taken before it met the fence.
                let published = hammer.join().unwrap();
                assert!((published..=published + 1).contains(&half.last().0));
            }
            assert_eq!(reader.fencer.fence(), Err(FenceError::Already));
        });
    }
}

#[test]
fn the_fence_wakes_who_sleeps() {
    let (mut writer, mut reader) = pair(&SMALL).unwrap();
    while writer.inputs.append(&[0; 32], marks()).is_ok() {}
    let mut events = reader.events;
    thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            assert!(events.wait(LONG).unwrap());
            events
        });
        let stuck = scope.spawn(move || {
            loop {
                match writer.inputs.wait_for_room(32, LONG) {
                    Ok(room) => assert!(!room),
                    Err(error) => return error,
                }
            }
        });
        let proof = reader.fencer.fence().unwrap();
        assert_eq!(sleeper.join().unwrap().at_end(&proof), Ok(true));
        assert_eq!(stuck.join().unwrap(), WriteError::Fenced);
    });
}

#[test]
fn a_filled_slot_is_salvaged_wherever_it_lay() {
    for lines in 0..=MIN_LANE / LINE {
        let (mut writer, mut reader) = pair(&SMALL).unwrap();
        for _ in 0..lines {
            writer.inputs.append(&[0xff; 32], marks()).unwrap();
            reader.inputs.next().unwrap().unwrap();
        }
        writer.inputs.append(b"before", marks()).unwrap();
        let mut slot = writer.inputs.reserve_for_salvage(200, 200).unwrap();
        assert_eq!(slot.payload(), [0; 200], "nothing of an earlier lap");
        slot.payload()[..5].copy_from_slice(b"frame");
        std::mem::forget(slot);
        let proof = reader.fencer.fence().unwrap();
        let early = reader.inputs.salvage(&proof);
        assert!(matches!(
            early,
            Err(ReadError::NotDrained {
                lane: Lane::Inputs,
                ..
            })
        ));
        reader.inputs.next().unwrap().unwrap();
        let bytes = reader.inputs.salvage(&proof).unwrap().unwrap();
        assert_eq!((bytes.len(), &bytes[..5]), (200, &b"frame"[..]));
        assert!(bytes[5..].iter().all(|b| *b == 0));
        assert_eq!(
            reader.events.salvage(&proof),
            Ok(None),
            "the other lane had none"
        );
    }
}

#[test]
fn only_an_open_slot_is_salvaged() {
    type Case = fn(&mut LaneWriter);
    let cases: [(&str, Case, bool); 5] = [
        (
            "published",
            |half| drop(half.reserve_for_salvage(9, 9).unwrap().publish(9, marks())),
            false,
        ),
        (
            "dropped",
            |half| drop(half.reserve_for_salvage(9, 9).unwrap()),
            false,
        ),
        (
            "not for salvage",
            |half| std::mem::forget(half.reserve(9).unwrap()),
            false,
        ),
        (
            "published, then another",
            |half| {
                half.reserve_for_salvage(9, 9)
                    .unwrap()
                    .publish(3, marks())
                    .unwrap();
                half.append(b"next", marks()).unwrap();
            },
            false,
        ),
        (
            "a second one open",
            |half| {
                half.reserve_for_salvage(9, 9)
                    .unwrap()
                    .publish(3, marks())
                    .unwrap();
                std::mem::forget(half.reserve_for_salvage(9, 9).unwrap());
            },
            true,
        ),
    ];
    for (name, case, found) in cases {
        let (mut writer, mut reader) = pair(&SMALL).unwrap();
        case(&mut writer.inputs);
        let proof = reader.fencer.fence().unwrap();
        while reader.inputs.next().unwrap().is_some() {}
        assert_eq!(
            reader.inputs.salvage(&proof).unwrap().is_some(),
            found,
            "{name}"
        );
    }
}

#[test]
fn a_frame_that_meets_the_fence_is_salvaged() {
    let (mut writer, mut reader) = pair(&SMALL).unwrap();
    let mut slot = writer.inputs.reserve_for_salvage(64, 64).unwrap();
    slot.payload()[..5].copy_from_slice(b"frame");
    let proof = reader.fencer.fence().unwrap();
    assert_eq!(slot.publish(5, marks()), Err(WriteError::Fenced));
    let bytes = reader.inputs.salvage(&proof).unwrap().unwrap();
    assert_eq!(&bytes[..5], b"frame");
}

#[test]
fn a_proof_is_for_one_connection() {
    let (_writer, mut reader) = pair(&SMALL).unwrap();
    let (_other_writer, mut other) = pair(&SMALL).unwrap();
    let proof = other.fencer.fence().unwrap();
    assert_eq!(reader.events.at_end(&proof), Err(ReadError::ForeignProof));
    assert_eq!(reader.inputs.salvage(&proof), Err(ReadError::ForeignProof));
}

/// Both ends of a socket with a ring over it, the sides set up in two threads.
fn connected() -> (RingWriter, RingReader) {
    let (a, b) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(move || accept(&a, &SMALL).unwrap());
        (connect(&b).unwrap(), reader.join().unwrap())
    })
}

#[test]
fn mapped_rings_carry_fence_and_wake_like_those_on_the_heap() {
    let (mut writer, mut reader) = connected();
    assert_eq!(writer.nonce, reader.nonce);
    for lap in 0..1000u32 {
        let marks = Marks {
            epoch: Epoch(lap),
            ..marks()
        };
        writer.inputs.append(&lap.to_le_bytes(), marks).unwrap();
        let entry = reader.inputs.next().unwrap().unwrap();
        assert_eq!(
            (entry.payload(), entry.marks()),
            (&lap.to_le_bytes()[..], marks)
        );
    }
    while writer.inputs.append(&[0; 32], marks()).is_ok() {}
    // The writer sleeps on a word that it has mapped read-only.
    thread::scope(|scope| {
        scope.spawn(|| {
            while !writer
                .inputs
                .wait_for_room(MIN_LANE / 4 - 32, LONG)
                .unwrap()
            {}
        });
        while reader.inputs.next().unwrap().is_some() {}
        reader.inputs.notify().unwrap();
    });
    let proof = reader.fencer.fence().unwrap();
    assert_eq!(writer.inputs.append(b"", marks()), Err(WriteError::Fenced));
    assert_eq!(reader.inputs.at_end(&proof), Ok(true));
}

/// What `connect` says to an offer of `bytes` with this memory.
fn offered(bytes: &[u8], len: usize) -> ConnectError {
    let (a, b) = UnixStream::pair().unwrap();
    let fd = memfd(c"offer", len).unwrap();
    send_with_fds(&a, bytes, &[fd.as_fd()]).unwrap();
    drop(a);
    connect(&b).unwrap_err()
}

fn offer(version: u32, sizes: [u64; 2]) -> Vec<u8> {
    let mut bytes = b"rdmalogO".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend([0; 20]);
    bytes.extend(sizes[0].to_le_bytes());
    bytes.extend(sizes[1].to_le_bytes());
    bytes
}

#[test]
fn bad_offers_are_refused() {
    let lane = MIN_LANE as u64;
    let whole = PAGE + 2 * MIN_LANE;
    let good = offer(3, [lane; 2]);
    assert!(matches!(
        offered(&offer(1, [lane; 2]), whole),
        ConnectError::Protocol { .. }
    ));
    assert!(matches!(
        offered(&offer(3, [lane, 100]), whole),
        ConnectError::Size(_)
    ));
    assert!(matches!(
        offered(&offer(3, [u64::MAX; 2]), whole),
        ConnectError::Size(_)
    ));
    assert!(
        matches!(offered(&good, whole - PAGE), ConnectError::Memory { .. }),
        "too short"
    );
    assert!(
        matches!(offered(&good, whole + PAGE), ConnectError::Memory { .. }),
        "too long"
    );
    let mut other = good.clone();
    other[0] ^= 1;
    assert!(matches!(
        offered(&other, whole),
        ConnectError::Protocol { .. }
    ));
    assert!(matches!(
        offered(&good[..40], whole),
        ConnectError::Pass(FdPassError::Closed { .. })
    ));

    let (a, b) = UnixStream::pair().unwrap();
    send_with_fds(&a, &good, &[]).unwrap();
    assert!(
        matches!(connect(&b), Err(ConnectError::Protocol { .. })),
        "no descriptor"
    );
    let file = tempfile::tempfile().unwrap();
    file.set_len(whole as u64).unwrap();
    let (a, b) = UnixStream::pair().unwrap();
    send_with_fds(&a, &good, &[file.as_fd()]).unwrap();
    assert!(
        matches!(connect(&b), Err(ConnectError::Memory { .. })),
        "it could be truncated"
    );
}

#[test]
fn bad_answers_are_refused() {
    for (cut, len) in [(48, PAGE + 1), (48, 100), (20, PAGE)] {
        let (a, b) = UnixStream::pair().unwrap();
        let fd = memfd(c"answer", len).unwrap();
        let error = thread::scope(|scope| {
            let reader = scope.spawn(move || accept(&a, &SMALL).unwrap_err());
            let mut bytes = [0; 48];
            let log = crate::fdpass::recv_with_fds(&b, &mut bytes, 1).unwrap();
            assert_eq!(log.len(), 1);
            bytes[7] = b'A';
            send_with_fds(&b, &bytes[..cut], &[fd.as_fd()]).unwrap();
            drop(b);
            reader.join().unwrap()
        });
        assert!(
            matches!(error, ConnectError::Memory { .. } | ConnectError::Pass(_)),
            "{error}"
        );
    }
}

/// The reader never sees bytes that change under its check: a peer that rewrites an entry all the time gets either
/// version through whole, or an error.
#[test]
fn an_entry_that_changes_while_it_is_read_is_whole_or_refused() {
    let keys = Keys::new(&NONCE);
    let versions = [vec![0x55; 600], vec![0xaa; 600]].map(|payload| laid(&keys, &[payload]));
    let stop = AtomicBool::new(false);
    let flips = Plain::new(0);
    let mut good = 0;
    let words = Shared {
        log: Words::heap(),
        back: Words::heap(),
    };
    let tail = &words.log.lane(Lane::Events).tail.0;
    tail.store(versions[0].len() as u64, Ordering::Release);
    let geometries = SMALL.geometries().unwrap();
    let region = Region::heap(2 * MIN_LANE);
    let views: Vec<_> = (0..2000)
        .map(|_| region.read_views(0, [MIN_LANE; 2]))
        .collect();
    let [mut events, _inputs] = region.write_views(0, [MIN_LANE; 2]);
    events.store_words(0, &versions[0]);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                for version in &versions {
                    events.store_words(0, version);
                    flips.fetch_add(1, SeqCst);
                    // Leaves it whole for a while, so that both outcomes are seen.
                    (0..300).for_each(|_| std::hint::spin_loop());
                }
            }
        });
        for views in views {
            let mut reader = super::reader(NONCE, geometries, words.clone(), views);
            // It knows the tail, so that what is not whole is corrupt.
            assert_eq!(reader.events.wait(Duration::ZERO), Ok(true));
            match reader.events.next() {
                Ok(entry) => {
                    let payload = entry.unwrap().payload().to_vec();
                    assert!(payload == [0x55; 600] || payload == [0xaa; 600]);
                    good += 1;
                }
                Err(ReadError::Corrupt {
                    field: Field::Checksum,
                    ..
                }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        while flips.load(SeqCst) < 2 {
            thread::yield_now();
        }
        stop.store(true, SeqCst);
    });
    assert!(good > 0);
}
