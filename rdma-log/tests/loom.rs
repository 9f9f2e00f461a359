//! Models of a lane over `shm`: loom runs every interleaving (up to three preemptions) and every outcome that the
//! memory orderings allow, and reports any access to the ring's bytes that races, any deadlock (a lost wake-up) and
//! any failed assertion.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p rdma-log --release --test loom`
#![cfg(loom)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use loom::thread;
use rdma_log::transport::shm;
use rdma_log::{
    Lane, LaneReader, LaneWriter, MIN_LANE, Marks, RingConfig, RingReader, RingWriter, Seq,
    WriteError,
};

/// Four lines: the smallest lane, so that it wraps and fills soon.
const SMALL: RingConfig = RingConfig {
    events: MIN_LANE,
    inputs: MIN_LANE,
};

/// Ignored under loom: a wait without its wake-up is a deadlock, which loom reports.
const FOREVER: Duration = Duration::MAX;

fn model(f: impl Fn(RingWriter, RingReader) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let (writer, reader) = shm::pair(&SMALL).expect("the sizes are good");
        f(writer, reader);
    });
}

fn append(writer: &mut LaneWriter) -> Result<Seq, WriteError> {
    let next = writer.last().next();
    writer.append(&next.0.to_le_bytes(), Marks::default())
}

/// Reads what is there; every entry is the next one and holds its own number.
fn drain(reader: &mut LaneReader) -> Seq {
    while let Some(entry) = reader.next().expect("whole entries") {
        assert_eq!(entry.payload(), entry.seq().0.to_le_bytes());
    }
    reader.last()
}

#[test]
fn entries_cross_whole_and_credits_come_back() {
    model(|mut writer, mut reader| {
        // Three of four lines in use and returned, so that the lane wraps and runs out of credit in the model.
        for _ in 0..3 {
            append(&mut writer.events).expect("there is room");
        }
        let writing = thread::spawn(move || {
            let mut done = 0;
            for _ in 0..3 {
                match append(&mut writer.events) {
                    Ok(_) => done += 1,
                    Err(WriteError::Full { .. }) => thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
            done
        });
        drain(&mut reader.events);
        drain(&mut reader.events);
        let done = writing.join().expect("no panic");
        assert_eq!(drain(&mut reader.events), Seq(3 + done));
    });
}

#[test]
fn an_entry_is_before_the_fence_or_refused() {
    model(|mut writer, mut reader| {
        let writing = thread::spawn(move || {
            for _ in 0..2 {
                match append(&mut writer.events) {
                    Ok(_) => {}
                    Err(WriteError::Fenced) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            writer.events.last()
        });
        let proof = reader.fencer.fence().expect("the first time");
        let last = drain(&mut reader.events);
        assert_eq!(reader.events.at_end(&proof), Ok(true));
        assert_eq!(writing.join().expect("no panic"), last);
        assert_eq!(drain(&mut reader.events), last);
    });
}

#[test]
fn a_reader_that_reads_while_another_thread_fences_loses_nothing() {
    static EARLY: AtomicBool = AtomicBool::new(false);
    model(|mut writer, mut reader| {
        let mut fencer = reader.fencer;
        let writing = thread::spawn(move || append(&mut writer.events).is_ok());
        let reading = thread::spawn(move || {
            drain(&mut reader.events);
            reader.events
        });
        let proof = fencer.fence().expect("the first time");
        let mut events = reading.join().expect("no panic");
        let last = drain(&mut events);
        assert_eq!(events.at_end(&proof), Ok(true));
        assert_eq!(events.salvage(&proof), Ok(None));
        match (writing.join().expect("no panic"), last) {
            (true, Seq(1)) => {}
            (false, Seq(0)) => {}
            // Taken before the writer came to commit it, and then it met the fence.
            (false, Seq(1)) => EARLY.store(true, Ordering::Relaxed),
            other => panic!("{other:?}"),
        }
    });
    assert!(
        EARLY.load(Ordering::Relaxed),
        "the race was not among the interleavings"
    );
}

#[test]
fn a_reader_that_waits_is_woken_by_an_entry() {
    model(|mut writer, mut reader| {
        let writing = thread::spawn(move || {
            for _ in 0..2 {
                append(&mut writer.events).expect("there is room");
                writer.events.notify().expect("connected");
            }
        });
        while drain(&mut reader.events) < Seq(2) {
            reader.events.wait(FOREVER).expect("connected");
        }
        writing.join().expect("no panic");
    });
}

#[test]
fn a_writer_that_waits_is_woken_by_room() {
    model(|mut writer, mut reader| {
        for _ in 0..4 {
            append(&mut writer.inputs).expect("there is room");
        }
        let reading = thread::spawn(move || {
            while reader.inputs.next().expect("whole entries").is_some() {
                reader.inputs.notify().expect("connected");
            }
        });
        while !writer.inputs.wait_for_room(0, FOREVER).expect("connected") {}
        append(&mut writer.inputs).expect("there is room");
        reading.join().expect("no panic");
    });
}

#[test]
fn a_reader_that_waits_is_woken_by_the_fence() {
    model(|_writer, mut reader| {
        let mut events = reader.events;
        let waiting = thread::spawn(move || {
            events.wait(FOREVER).expect("connected");
            events
        });
        let proof = reader.fencer.fence().expect("the first time");
        let mut events = waiting.join().expect("no panic");
        assert_eq!(events.at_end(&proof), Ok(true));
    });
}

#[test]
fn a_writer_that_waits_is_woken_by_the_fence() {
    model(|mut writer, mut reader| {
        for _ in 0..4 {
            append(&mut writer.events).expect("there is room");
        }
        let waiting = thread::spawn(move || {
            loop {
                match writer.events.wait_for_room(0, FOREVER) {
                    Ok(room) => assert!(!room),
                    Err(error) => return error,
                }
            }
        });
        let _proof = reader.fencer.fence().expect("the first time");
        assert_eq!(waiting.join().expect("no panic"), WriteError::Fenced);
    });
}

#[test]
fn the_progress_seen_elsewhere_is_never_ahead_of_what_was_posted() {
    model(|mut writer, mut reader| {
        let mut progress = writer.progress;
        let writing = thread::spawn(move || {
            append(&mut writer.events).expect("there is room");
        });
        let reading = thread::spawn(move || {
            let last = drain(&mut reader.events);
            reader.acks.received(Lane::Events, last);
            last
        });
        let [early, _] = progress.poll().expect("counters that can be");
        assert!(early.committed <= Seq(1));
        writing.join().expect("no panic");
        let last = reading.join().expect("no panic");
        let [late, _] = progress.poll().expect("counters that can be");
        assert_eq!((late.committed, late.received), (Seq(1), last));
    });
}

#[test]
fn what_was_replayed_is_never_seen_ahead_of_what_was_received() {
    model(|mut writer, mut reader| {
        let mut progress = writer.progress;
        append(&mut writer.events).expect("there is room");
        let reading = thread::spawn(move || {
            let last = drain(&mut reader.events);
            // Each by another way: by the lane's own reader, and by any thread.
            reader.events.set_received(last).expect("read that far");
            reader.acks.replayed(Lane::Events, last);
        });
        let [seen, _] = progress.poll().expect("counters that can be");
        assert!(seen.replayed <= seen.received, "{seen:?}");
        reading.join().expect("no panic");
    });
}
