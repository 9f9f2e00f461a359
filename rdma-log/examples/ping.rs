//! What an entry's way from one core to another is made of: the bare cost of a cache line that goes to and fro, and the
//! ring's, with what lies between added one at a time.
//!
//! `cargo run -p rdma-log --release --example ping`
//!
//! Nanoseconds of a round trip. Both threads spin, each on a processor of its own. Each kind takes its turn in blocks, a
//! block is timed as a whole (so that neither the clock's cost nor its resolution shows), and the lower quartile of
//! the blocks is printed: on a machine where others run too it is what comes nearest to a quiet one.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use rdma_log::entry::{Header, Keys, Kind, Nonce, Stamp};
use rdma_log::transport::shm;
use rdma_log::{Lane, LaneReader, Marks, RingConfig, RingWriter, Seq};

const BLOCK: u64 = 1000;
const BLOCKS: u64 = 200;
const PAYLOAD: [u8; 32] = [7; 32];

/// Binds the calling thread to one processor, if the system lets it.
fn pin(processor: usize) {
    // SAFETY: all zero is an empty set; CPU_SET checks nothing but its index, which is 0 or 1; the call reads the set.
    let failed = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set) != 0
    };
    if failed {
        eprintln!("not pinned: {}", std::io::Error::last_os_error());
    }
}

/// What is added to the word that goes to and fro, one on top of the other.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Upto {
    Word,
    /// The other seven words of the line, stored before it; copied out by the other side.
    Line,
    /// The checksum, computed and checked.
    Checksum,
    /// A locked exchange on a line of the sender's own, as for the tail.
    Locked,
}

/// One direction: the line, and the sender's own.
#[repr(align(128))]
#[derive(Default)]
struct Lines([AtomicU64; 8], [AtomicU64; 24]);

fn bare(round: u64) -> (Keys, Header) {
    let keys = Keys::new(&Nonce([5; 16]));
    let (lane, lap, kind) = (Lane::Events, 0, Kind::Entry);
    let header = Header {
        len: PAYLOAD.len() as u32,
        crc: 0,
        seq: 1,
        stamp: keys.stamp(Stamp { lane, lap, kind }),
        epoch: round as u32,
        committed_lag: 1,
        released_lag: 1,
    };
    (keys, header)
}

fn sender(lines: &Lines, upto: Upto) -> impl FnMut(u64) + Send {
    let (keys, header) = bare(0);
    move |round| {
        let mut header = Header {
            epoch: round as u32,
            ..header
        };
        if upto >= Upto::Checksum {
            let unsealed = keys.check(&header, black_box(&PAYLOAD));
            header.crc = unsealed.expect_err("it has no checksum yet").expected as u32;
        }
        let bytes = header.to_bytes();
        let (words, _) = bytes.as_chunks::<8>();
        let store = |i: usize, word: &[u8; 8], order| {
            lines.0[i].store(u64::from_le_bytes(*word), order);
        };
        if upto >= Upto::Line {
            let (payload, _) = PAYLOAD.as_chunks::<8>();
            (0..4).for_each(|i| store(4 + i, &payload[i], Ordering::Relaxed));
            [0, 1, 3]
                .into_iter()
                .for_each(|i| store(i, &words[i], Ordering::Relaxed));
        }
        store(2, &words[2], Ordering::Release);
        if upto >= Upto::Locked {
            lines.1[8].fetch_add(1, Ordering::AcqRel);
        }
    }
}

fn receiver(lines: &Lines, upto: Upto) -> impl FnMut(u64) + Send {
    let (keys, header) = bare(0);
    move |round| {
        let wanted = u64::from(header.stamp) | round << 32;
        while lines.0[2].load(Ordering::Acquire) != wanted {
            spin_loop();
        }
        if upto < Upto::Line {
            return;
        }
        let mut copy = [0; 64];
        let (words, _) = copy.as_chunks_mut::<8>();
        for (to, from) in words.iter_mut().zip(&lines.0) {
            *to = from.load(Ordering::Relaxed).to_le_bytes();
        }
        let (header, payload) = black_box(&copy)
            .split_first_chunk()
            .expect("a line has a header");
        if upto >= Upto::Checksum {
            let whole = keys.check(&Header::from_bytes(header), payload);
            whole.expect("it crossed whole");
        }
    }
}

fn put(writer: &mut RingWriter) -> Seq {
    let seq = writer
        .events
        .append(&PAYLOAD, Marks::default())
        .expect("room");
    writer.events.notify().expect("connected");
    seq
}

fn take(lane: &mut LaneReader) -> Seq {
    loop {
        match lane.next() {
            Ok(Some(entry)) => return entry.seq(),
            Ok(None) => spin_loop(),
            Err(error) => panic!("{error}"),
        }
    }
}

/// A round trip: what the one side does, and what the other.
struct Trip<'a> {
    name: &'static str,
    here: Box<dyn FnMut(u64) + 'a>,
    there: Box<dyn FnMut(u64) + Send + 'a>,
}

fn rung<'a>(name: &'static str, [out, back]: &'a [Lines; 2], upto: Upto) -> Trip<'a> {
    let (mut send, mut receive) = (sender(out, upto), receiver(back, upto));
    let (mut take, mut answer) = (receiver(out, upto), sender(back, upto));
    Trip {
        name,
        here: Box::new(move |round| {
            send(round);
            receive(round);
        }),
        there: Box::new(move |round| {
            take(round);
            answer(round);
        }),
    }
}

fn ring() -> Result<[Trip<'static>; 2], shm::ConnectError> {
    let (mut out, mut out_reader) = shm::pair(&RingConfig::default())?;
    let (mut back, mut back_reader) = shm::pair(&RingConfig::default())?;
    let both = Trip {
        name: "ring, an entry each way",
        here: Box::new(move |_| {
            put(&mut out);
            take(&mut back_reader.events);
        }),
        there: Box::new(move |_| {
            take(&mut out_reader.events);
            put(&mut back);
        }),
    };
    let (mut out, mut reader) = shm::pair(&RingConfig::default())?;
    let received = Trip {
        name: "ring, an entry and received",
        here: Box::new(move |_| {
            let seq = put(&mut out);
            while out.progress.poll().expect("good counters")[Lane::Events.index()].received < seq {
                spin_loop();
            }
        }),
        there: Box::new(move |_| {
            let seq = take(&mut reader.events);
            reader.events.set_received(seq).expect("it was read");
        }),
    };
    Ok([both, received])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let lines: [[Lines; 2]; 4] = Default::default();
    let [word, line, checksum, locked] = &lines;
    let mut trips = vec![
        rung("one word", word, Upto::Word),
        rung("the whole line, copied out", line, Upto::Line),
        rung("with its checksum", checksum, Upto::Checksum),
        rung("with a locked exchange", locked, Upto::Locked),
    ];
    trips.extend(ring()?);
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for Trip {
        name,
        here: a,
        there: b,
    } in trips
    {
        here.push((name, a, Vec::new()));
        there.push(b);
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            pin(1);
            for block in 0..BLOCKS {
                for trip in &mut there {
                    (1..=BLOCK).for_each(|round| trip(block * BLOCK + round));
                }
            }
        });
        pin(0);
        for block in 0..BLOCKS {
            for (_, trip, times) in &mut here {
                let begun = Instant::now();
                (1..=BLOCK).for_each(|round| trip(block * BLOCK + round));
                times.push(begun.elapsed().as_nanos() as f64 / BLOCK as f64);
            }
        }
    });
    let mut least = None;
    for (name, _, mut times) in here {
        times.sort_by(f64::total_cmp);
        let nanos = times[times.len() / 4];
        let bare = *least.get_or_insert(nanos);
        println!(
            "{name:<28} {nanos:>7.1} ns   {:>5.2} times one word",
            nanos / bare
        );
    }
    Ok(())
}
