//! What holds of a ring whatever carries it: tests that every transport runs, by [`ring_suite`].

use std::sync::atomic::{AtomicU64 as Plain, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::entry::{Lane, Marks, Seq};
use crate::lane::{LaneReader, LaneWriter, MIN_LANE, WriteError, tests as lane};
use crate::ring::{RingConfig, RingReader, RingWriter};

pub(super) const SMALL: RingConfig = RingConfig {
    events: MIN_LANE,
    inputs: 2 * MIN_LANE,
};
const LARGE: RingConfig = RingConfig {
    events: MIN_LANE,
    inputs: 1 << 20,
};
/// Far longer than anything waited for here takes; if it passes, something was lost.
pub(super) const LONG: Duration = Duration::from_secs(20);

/// Makes a ring over the transport under test.
pub(super) trait Make: Fn(RingConfig) -> (RingWriter, RingReader) {}
impl<F: Fn(RingConfig) -> (RingWriter, RingReader)> Make for F {}

/// The tests for one transport: how a ring is made, and the part of the usual counts to run, for carriers that are slow.
macro_rules! ring_suite {
    ($make:expr, $part:expr) => {
        ring_suite!($make, $part,
            both_lanes_carry_every_size_through_many_laps
            what_is_written_is_read
            the_fence_leaves_what_committed_and_takes_nothing_more
            a_writer_that_meets_the_fence_is_told_so
            sleepers_are_woken
            a_writer_that_waits_for_room_is_woken
            the_fence_wakes_who_sleeps
            a_reader_that_goes_away_ends_the_wait_for_room
            waiting_ends_with_its_time
            progress_from_another_thread_is_never_ahead_of_what_is_posted
        );
    };
    ($make:expr, $part:expr, $($name:ident)+) => {
        $(
            #[test]
            fn $name() {
                $crate::transport::suite::$name(&$make, $part);
            }
        )+
    };
}

/// How many of `usual` to run.
fn some(usual: u64, part: f64) -> u64 {
    ((usual as f64 * part) as u64).max(2)
}

/// A payload that follows from its number.
pub(super) fn payload(seq: u64, most: usize) -> Vec<u8> {
    let len = (seq as usize).wrapping_mul(2_654_435_761) % (most + 1);
    (0..len)
        .map(|i| (seq as u8).wrapping_mul(31).wrapping_add(i as u8) ^ (i >> 8) as u8)
        .collect()
}

/// Publishes entries until there are so many, pushing after every `push`th; the error that ended it early.
pub(super) fn publish(
    lane: &mut LaneWriter,
    count: u64,
    most: usize,
    push: u64,
) -> Result<(), WriteError> {
    while lane.last().0 < count {
        let bytes = payload(lane.last().next().0, most);
        let until = Instant::now() + LONG;
        while !lane.wait_for_room(bytes.len(), LONG)? {
            assert!(Instant::now() < until, "room was not told of");
        }
        let seq = lane.append(&bytes, Marks::default())?;
        if seq.0 % push == 0 {
            lane.notify()?;
        }
    }
    lane.notify()
}

/// Reads what is there; each entry is the next one, and whole.
pub(super) fn read(lane: &mut LaneReader, most: usize) -> u64 {
    while let Some(entry) = lane.next().unwrap() {
        assert_eq!(entry.payload(), payload(entry.seq().0, most));
    }
    lane.last().0
}

pub(super) fn read_until(lane: &mut LaneReader, count: u64, most: usize) {
    while read(lane, most) < count {
        lane.notify().unwrap();
        assert!(lane.wait(LONG).unwrap(), "a wake-up was lost");
    }
    lane.notify().unwrap();
}

pub(super) fn await_committed(lane: &mut LaneWriter, seq: u64) {
    let until = Instant::now() + LONG;
    while lane.committed().unwrap().0 < seq {
        assert!(Instant::now() < until, "entry {seq} does not commit");
        thread::yield_now();
    }
}

pub(super) fn both_lanes_carry_every_size_through_many_laps(make: &impl Make, part: f64) {
    for (config, count) in [(SMALL, some(3000, part)), (LARGE, some(600, part))] {
        let (mut writer, mut reader) = make(config);
        let sizes = [writer.events.max_payload(), writer.inputs.max_payload()];
        thread::scope(|scope| {
            scope.spawn(|| read_until(&mut reader.events, count, sizes[0]));
            scope.spawn(|| read_until(&mut reader.inputs, count, sizes[1]));
            scope.spawn(|| publish(&mut writer.inputs, count, sizes[1], 3).unwrap());
            publish(&mut writer.events, count, sizes[0], 1).unwrap();
        });
        // Only now, so that a mode that commits by the reader's answers gets them while nobody reads.
        await_received(&mut writer, &mut reader, count);
    }
}

fn await_received(writer: &mut RingWriter, reader: &mut RingReader, count: u64) {
    for (lane, half) in [
        (&mut writer.events, &mut reader.events),
        (&mut writer.inputs, &mut reader.inputs),
    ] {
        half.set_received(Seq(count)).unwrap();
        half.notify().unwrap();
        await_committed(lane, count);
    }
}

/// Random appends, slots, drops and reads, compared with a model.
pub(super) fn what_is_written_is_read(make: &impl Make, part: f64) {
    let cases = some(60, part) as u32;
    let mut runner = TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    });
    let ops = prop::collection::vec(lane::op(), 0..200);
    let tried = runner.run(&ops, |ops| {
        let (mut writer, mut reader) = make(SMALL);
        let mut model = lane::run(&mut writer, &mut reader, None, &ops);
        for (from, to) in [
            (&mut writer.events, &mut reader.events),
            (&mut writer.inputs, &mut reader.inputs),
        ] {
            from.notify().unwrap();
            lane::read(to, &mut model, usize::MAX);
            while to.last() < from.last() {
                assert!(to.wait(LONG).unwrap(), "a wake-up was lost");
                lane::read(to, &mut model, usize::MAX);
            }
            prop_assert!(model[to.lane().index()].is_empty());
        }
        Ok(())
    });
    tried.unwrap();
}

pub(super) fn the_fence_leaves_what_committed_and_takes_nothing_more(make: &impl Make, part: f64) {
    for round in 0..some(60, part) {
        let (mut writer, mut reader) = make(SMALL);
        let sizes = [writer.events.max_payload(), writer.inputs.max_payload()];
        let seen = [Plain::new(0), Plain::new(0)];
        let hammer = |lane: &mut LaneWriter, most, seen: &Plain| {
            let ended = loop {
                if let Err(error) = publish(lane, lane.last().0 + 5, most, 2) {
                    break error;
                }
                if let Ok(committed) = lane.committed() {
                    seen.fetch_max(committed.0, SeqCst);
                }
            };
            let fenced = matches!(ended, WriteError::Fenced | WriteError::Closed);
            assert!(fenced, "{ended}");
            assert!(lane.append(b"late", Marks::default()).is_err());
            seen.fetch_max(lane.committed().unwrap_or_default().0, SeqCst);
        };
        thread::scope(|scope| {
            let (events, inputs) = (&mut writer.events, &mut writer.inputs);
            scope.spawn(|| hammer(events, sizes[0], &seen[0]));
            scope.spawn(|| hammer(inputs, sizes[1], &seen[1]));
            read_until(&mut reader.events, 20 + round, sizes[0]);
            let proof = reader.fencer.fence().unwrap();
            for (lane, most) in [
                (&mut reader.events, sizes[0]),
                (&mut reader.inputs, sizes[1]),
            ] {
                read(lane, most);
                assert_eq!(lane.at_end(&proof), Ok(true));
                assert_eq!(lane.salvage(&proof), Ok(None));
            }
        });
        // The writers ended after the fence, and whatever they saw commit, then or before, was there to be drained.
        let last = [reader.events.last().0, reader.inputs.last().0];
        for (seen, last) in seen.iter().zip(last) {
            assert!(seen.load(SeqCst) <= last, "{} {last}", seen.load(SeqCst));
        }
        assert_eq!(reader.events.next(), Ok(None));
    }
}

pub(super) fn a_writer_that_meets_the_fence_is_told_so(make: &impl Make, _: f64) {
    let (mut writer, mut reader) = make(SMALL);
    let _proof = reader.fencer.fence().unwrap();
    let until = Instant::now() + LONG;
    let error = loop {
        match writer.events.append(b"late", Marks::default()) {
            Ok(_) => {}
            Err(WriteError::Full { .. }) => drop(writer.events.wait_for_room(4, LONG)),
            Err(error) => break error,
        }
        let _ = writer.events.notify();
        assert!(Instant::now() < until);
    };
    assert_eq!(error, WriteError::Fenced);
    assert!(writer.progress.poll().unwrap()[0].fenced);
    assert!(reader.events.wait(LONG).unwrap(), "fenced is something");
}

/// Both sides sleep whenever they have nothing to do; a lost wake-up shows as a wait that ran out of time.
pub(super) fn sleepers_are_woken(make: &impl Make, part: f64) {
    let turns = some(1000, part);
    let (mut there, mut there_reader) = make(SMALL);
    let (mut back, mut back_reader) = make(SMALL);
    let next = |half: &mut LaneReader| {
        loop {
            if let Some(entry) = half.next().unwrap() {
                return entry.seq().0;
            }
            assert!(half.wait(LONG).unwrap(), "a wake-up was lost");
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 1..=turns {
                assert_eq!(next(&mut there_reader.events), turn);
                while !back.events.wait_for_room(4, LONG).unwrap() {}
                back.events.append(b"pong", Marks::default()).unwrap();
                back.events.notify().unwrap();
            }
        });
        for turn in 1..=turns {
            while !there.events.wait_for_room(4, LONG).unwrap() {}
            there.events.append(b"ping", Marks::default()).unwrap();
            there.events.notify().unwrap();
            assert_eq!(next(&mut back_reader.events), turn);
        }
    });
}

pub(super) fn a_writer_that_waits_for_room_is_woken(make: &impl Make, part: f64) {
    let last = some(10_000, part);
    let (mut writer, mut reader) = make(SMALL);
    thread::scope(|scope| {
        scope.spawn(move || {
            while reader.inputs.last().0 < last {
                let n = reader.inputs.last().0;
                while reader.inputs.next().unwrap().is_some() {}
                if reader.inputs.last().0 == n {
                    assert!(reader.inputs.wait(LONG).unwrap(), "a wake-up was lost");
                }
                reader.inputs.notify().unwrap();
            }
        });
        while writer.inputs.last().0 < last {
            match writer.inputs.append(&[0; 300], Marks::default()) {
                Ok(_) => {}
                Err(WriteError::Full { .. }) => {
                    // True may come late: the reader can have rung for an earlier wait.
                    let begun = Instant::now();
                    while !writer.inputs.wait_for_room(300, LONG).unwrap() {
                        assert!(begun.elapsed() < LONG, "a wake-up was lost");
                    }
                }
                Err(error) => panic!("{error}"),
            }
            writer.inputs.notify().unwrap();
        }
    });
}

fn ends(writer: &mut LaneWriter) -> WriteError {
    loop {
        match writer.wait_for_room(900, LONG) {
            Ok(room) => assert!(!room),
            Err(error) => return error,
        }
    }
}

pub(super) fn the_fence_wakes_who_sleeps(make: &impl Make, _: f64) {
    let (mut writer, mut reader) = make(SMALL);
    while writer.inputs.append(&[0; 900], Marks::default()).is_ok() {}
    let mut events = reader.events;
    thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            assert!(events.wait(LONG).unwrap());
            events
        });
        let stuck = scope.spawn(move || ends(&mut writer.inputs));
        let proof = reader.fencer.fence().unwrap();
        assert_eq!(sleeper.join().unwrap().at_end(&proof), Ok(true));
        let error = stuck.join().unwrap();
        let told = matches!(error, WriteError::Fenced | WriteError::Closed);
        assert!(told, "{error}");
    });
}

pub(super) fn a_reader_that_goes_away_ends_the_wait_for_room(make: &impl Make, _: f64) {
    let (mut writer, reader) = make(SMALL);
    while writer.events.append(&[0; 900], Marks::default()).is_ok() {}
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ends(&mut writer.events));
        drop(reader);
        let error = waiting.join().unwrap();
        let told = matches!(error, WriteError::Closed | WriteError::Fenced);
        assert!(told, "{error}");
    });
}

pub(super) fn waiting_ends_with_its_time(make: &impl Make, _: f64) {
    let (mut writer, mut reader) = make(SMALL);
    let short = Duration::from_millis(5);
    assert_eq!(reader.events.wait(short), Ok(false));
    while writer.events.append(&[0; 900], Marks::default()).is_ok() {}
    assert_eq!(writer.events.wait_for_room(900, short), Ok(false));
}

pub(super) fn progress_from_another_thread_is_never_ahead_of_what_is_posted(
    make: &impl Make,
    part: f64,
) {
    let (writer, mut reader) = make(SMALL);
    let last = Seq(some(10_000, part));
    let (mut progress, mut events) = (writer.progress, writer.events);
    let _inputs = writer.inputs;
    thread::scope(|scope| {
        let writing = scope.spawn(move || {
            while events.last() < last {
                match events.append(b"x", Marks::default()) {
                    Ok(_) => events.notify().unwrap(),
                    // Early or not, it tries again.
                    Err(WriteError::Full { .. }) => drop(events.wait_for_room(1, LONG).unwrap()),
                    Err(error) => panic!("{error}"),
                }
            }
            events
        });
        let reading = scope.spawn(move || {
            while reader.events.last() < last {
                if let Some(entry) = reader.events.next().unwrap() {
                    let seq = entry.seq();
                    reader.events.set_received(seq).unwrap();
                    reader.acks.replayed(Lane::Events, seq);
                    reader.events.notify().unwrap();
                } else {
                    reader.events.wait(LONG).unwrap();
                }
            }
            reader.events.notify().unwrap();
            reader
        });
        let until = Instant::now() + 3 * LONG;
        loop {
            let [seen, _] = progress.poll().unwrap();
            assert!(!seen.fenced);
            assert!(
                seen.committed <= last && seen.replayed <= seen.received,
                "{seen:?}"
            );
            if seen.replayed == last {
                assert_eq!(seen.received, last);
                // Where the device's word commits, the reader's may come before it.
                if seen.committed == last {
                    break;
                }
            }
            assert!(Instant::now() < until, "{seen:?}");
            thread::yield_now();
        }
        let _both = (writing.join().unwrap(), reading.join().unwrap());
    });
}
