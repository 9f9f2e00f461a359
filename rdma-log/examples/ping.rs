//! How long from a publish in one thread until another has read the entry, beside the bare cost of a cache line that
//! goes to and fro between the same two processors.
//!
//! `cargo run -p rdma-log --release --example ping`
//!
//! Half a round trip, in nanoseconds, of 64-byte entries (32 bytes of payload). Both threads spin, each on a processor
//! of its own; on a machine where the two share one, or somebody else runs there, the figures mean little.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use rdma_log::transport::shm;
use rdma_log::{LaneReader, Marks, RingConfig};

const ROUNDS: usize = 200_000;
/// The first ones warm up caches and page tables.
const WARM: usize = 10_000;

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

/// Times round trips that `ping` begins and ends, with `pong` answering in another thread.
fn measure(mut ping: impl FnMut(u64), mut pong: impl FnMut(u64) + Send) -> Vec<u64> {
    thread::scope(|scope| {
        scope.spawn(move || {
            pin(1);
            (1..=(WARM + ROUNDS) as u64).for_each(&mut pong);
        });
        pin(0);
        let mut halves: Vec<u64> = (1..=(WARM + ROUNDS) as u64)
            .map(|round| {
                let begun = Instant::now();
                ping(round);
                begun.elapsed().as_nanos() as u64 / 2
            })
            .skip(WARM)
            .collect();
        halves.sort_unstable();
        halves
    })
}

fn report(name: &str, halves: &[u64]) {
    let at = |part: f64| halves[((halves.len() - 1) as f64 * part) as usize];
    println!("{name:<28} p50 {:>6} ns   p99 {:>6} ns", at(0.5), at(0.99));
}

fn take(lane: &mut LaneReader) {
    loop {
        match lane.next() {
            Ok(Some(_)) => return,
            Ok(None) => std::hint::spin_loop(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    #[repr(align(128))]
    struct Line(AtomicU64);
    let lines = [Line(AtomicU64::new(0)), Line(AtomicU64::new(0))];
    let wait = |line: &Line, round| {
        while line.0.load(Ordering::Acquire) != round {
            std::hint::spin_loop();
        }
    };
    let bare = measure(
        |round| {
            lines[0].0.store(round, Ordering::Release);
            wait(&lines[1], round);
        },
        |round| {
            wait(&lines[0], round);
            lines[1].0.store(round, Ordering::Release);
        },
    );
    report("cache line", &bare);

    let (mut there, mut there_reader) = shm::pair(&RingConfig::default())?;
    let (mut back, mut back_reader) = shm::pair(&RingConfig::default())?;
    let ring = measure(
        |_| {
            there
                .events
                .append(&[7; 32], Marks::default())
                .expect("room");
            there.events.notify().expect("connected");
            take(&mut back_reader.events);
        },
        |_| {
            take(&mut there_reader.events);
            back.events
                .append(&[7; 32], Marks::default())
                .expect("room");
            back.events.notify().expect("connected");
        },
    );
    report("ring, write to read", &ring);

    let begun = Instant::now();
    for _ in 0..ROUNDS {
        there.events.append(&[7; 32], Marks::default())?;
        there_reader.events.next()?;
    }
    let each = begun.elapsed().as_nanos() / ROUNDS as u128;
    println!("write and read in one thread {each:>10} ns");
    Ok(())
}
