//! What a role counts while it serves: plain stores by the one thread that owns each figure, read at any time by whoever shows them.
//!
//! ```text
//!  vCPU thread ── entries, when each was made, ─┐
//!                 stops at the ends of intervals │
//!  the holder of the outlet ── commits, outputs ├──▶ Meter ◀── the operator's thread, which alone takes its time
//!  I/O thread ── frames in, the backup's place ─┘
//! ```
//! Nothing here is allocated, locked or waited for after [`Meter::new`], and no store is atomic in more than its own word: a
//! reader may see one figure a moment before another. Every figure has one writer at a time, so adding needs no atomic addition.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A figure with one writer that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds, by its one writer.
    pub(crate) fn add(&self, more: u64) {
        // One writer at a time: a plain addition, which costs no locked instruction.
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(more), Ordering::Relaxed);
    }

    /// Its value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a power of two: a latency is known to a thirty-second part of itself.
const PARTS: usize = 1 << PART_BITS;
const PART_BITS: u32 = 5;
/// Latencies from here on, over a minute, count as this much.
const LONGEST: u64 = (1 << 36) - 1;
const BUCKETS: usize = (36 - PART_BITS as usize + 1) * PARTS;

fn bucket_of(nanos: u64) -> usize {
    let nanos = nanos.min(LONGEST);
    let Some(shift) = (63 - (nanos | 1).leading_zeros()).checked_sub(PART_BITS) else {
        return nanos as usize;
    };
    ((shift as usize + 1) << PART_BITS) + ((nanos >> shift) as usize - PARTS)
}

/// The largest latency that falls into a bucket.
fn upper_bound(bucket: usize) -> u64 {
    match (bucket >> PART_BITS).checked_sub(1) {
        None => bucket as u64,
        Some(shift) => (((bucket % PARTS + PARTS + 1) as u64) << shift) - 1,
    }
}

/// Latencies, in nanoseconds.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Count; BUCKETS]>,
    sum: Count,
    most: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: Box::new(std::array::from_fn(|_| Count::default())),
            sum: Count::default(),
            most: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    fn record(&self, nanos: u64) {
        self.buckets[bucket_of(nanos)].add(1);
        self.sum.add(nanos);
        if nanos > self.most.load(Ordering::Relaxed) {
            self.most.store(nanos, Ordering::Relaxed);
        }
    }

    /// What it holds now.
    #[must_use]
    pub fn read(&self) -> Latencies {
        Latencies {
            buckets: self.buckets.iter().map(Count::get).collect(),
            sum: self.sum.get(),
            most: self.most.load(Ordering::Relaxed),
        }
    }
}

/// A histogram as it was at one time, or what came between two times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latencies {
    buckets: Vec<u64>,
    sum: u64,
    most: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            sum: 0,
            most: 0,
        }
    }
}

impl Latencies {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together, in nanoseconds.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The largest, in nanoseconds.
    #[must_use]
    pub fn most(&self) -> u64 {
        self.most
    }

    /// The latency that this share of all does not exceed, in nanoseconds; 0 if there is none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> u64 {
        let count = self.count();
        let rank = ((count as f64 * share).ceil() as u64).max(1);
        let mut below = 0;
        for (bucket, &here) in self.buckets.iter().enumerate() {
            below += here;
            if below >= rank {
                return upper_bound(bucket).min(self.most);
            }
        }
        0
    }

    /// How many are less than 2^`power` nanoseconds. Exact: no bucket lies across a power of two.
    #[must_use]
    pub fn below_power(&self, power: u32) -> u64 {
        let end = 1_u64 << power;
        let below = |&(bucket, _): &(usize, &u64)| upper_bound(bucket) < end;
        let buckets = self.buckets.iter().enumerate();
        buckets.take_while(below).map(|(_, here)| here).sum()
    }

    /// What came since `earlier`, a reading of the same histogram. The largest of it is known as a bucket's bound only.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let buckets: Vec<u64> = self
            .buckets
            .iter()
            .zip(&earlier.buckets)
            .map(|(now, then)| now.saturating_sub(*then))
            .collect();
        let highest = buckets.iter().rposition(|&here| here > 0);
        Self {
            most: highest.map_or(0, |bucket| upper_bound(bucket).min(self.most)),
            buckets,
            sum: self.sum.wrapping_sub(earlier.sum),
        }
    }
}

/// Between two notes of when an entry was made, at the least: the resolution of a lag, and far below the window (5 ms).
const GRAIN: u64 = 250_000;
/// A quarter of a second of notes. Older ones are not known any more: the lag is then at least so long.
const NOTES: usize = 1024;
/// Notes that a reader leaves alone because the writer may be at them: 16 ms of its time.
const MARGIN: u64 = 64;

/// When the guest was where: a few thousand notes a second at the most.
#[derive(Debug)]
struct Notes {
    slots: Box<[Note; NOTES]>,
    /// Notes made.
    made: AtomicU64,
    /// The position of the last entry.
    last: AtomicU64,
}

#[derive(Debug, Default)]
struct Note {
    at: AtomicU64,
    position: AtomicU64,
    /// The position of the entry before it.
    before: AtomicU64,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            slots: Box::new(std::array::from_fn(|_| Note::default())),
            made: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }
    }
}

impl Notes {
    fn slot(&self, number: u64) -> &Note {
        &self.slots[number as usize % NOTES]
    }

    fn entry(&self, position: u64, at: u64) {
        let before = self.last.load(Ordering::Relaxed);
        let made = self.made.load(Ordering::Relaxed);
        let due =
            made == 0 || at.saturating_sub(self.slot(made - 1).at.load(Ordering::Relaxed)) >= GRAIN;
        if due {
            let note = self.slot(made);
            note.at.store(at, Ordering::Relaxed);
            note.position.store(position, Ordering::Relaxed);
            note.before.store(before, Ordering::Relaxed);
            self.made.store(made + 1, Ordering::Release);
        }
        self.last.store(position, Ordering::Release);
    }

    /// For how long the first entry beyond `place` has existed.
    fn behind(&self, place: u64, now: u64) -> u64 {
        if place >= self.last.load(Ordering::Acquire) {
            return 0;
        }
        let made = self.made.load(Ordering::Acquire);
        let oldest = made.saturating_sub(NOTES as u64 - MARGIN);
        let mut first = None;
        for number in (oldest..made).rev() {
            let note = self.slot(number);
            let at = note.at.load(Ordering::Relaxed);
            if note.position.load(Ordering::Relaxed) > place {
                first = Some((at, note.before.load(Ordering::Relaxed)));
                continue;
            }
            // An entry without a note came within a grain of the note before it.
            return match first {
                Some((later, before)) if before <= place => now.saturating_sub(later),
                _ => now.saturating_sub(at),
            };
        }
        first.map_or(0, |(at, _)| now.saturating_sub(at))
    }
}

/// No lag is known.
const UNKNOWN: u64 = u64::MAX;

/// The figures of one role.
#[derive(Debug)]
pub struct Meter {
    started: Instant,
    commits: Histogram,
    stops: Histogram,
    stop_pages: Count,
    stop_bytes: Count,
    entries: Count,
    entry_bytes: Count,
    outputs: Count,
    output_bytes: Count,
    frames: Count,
    frame_bytes: Count,
    notes: Notes,
    lag: AtomicU64,
    /// The longest lag since it was last taken.
    lag_most: AtomicU64,
    peer: AtomicU64,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            commits: Histogram::default(),
            stops: Histogram::default(),
            stop_pages: Count::default(),
            stop_bytes: Count::default(),
            entries: Count::default(),
            entry_bytes: Count::default(),
            outputs: Count::default(),
            output_bytes: Count::default(),
            frames: Count::default(),
            frame_bytes: Count::default(),
            notes: Notes::default(),
            lag: AtomicU64::new(UNKNOWN),
            lag_most: AtomicU64::new(0),
            peer: AtomicU64::new(0),
        }
    }
}

impl Meter {
    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.started).as_nanos() as u64
    }

    /// An output's entry has committed, so long after it was made. By the holder of the outlet.
    pub(crate) fn commit(&self, took: Duration) {
        self.commits.record(took.as_nanos() as u64);
    }

    /// The guest stood so long at the end of an interval, or where it was preempted, for so many pages and bytes. By the vCPU thread.
    pub(crate) fn stood(&self, took: Duration, pages: usize, bytes: usize) {
        self.stops.record(took.as_nanos() as u64);
        self.stop_pages.add(pages as u64);
        self.stop_bytes.add(bytes as u64);
    }

    /// An entry was posted. By the vCPU thread, or the courier.
    pub(crate) fn posted(&self, position: u64, bytes: usize, made: Instant) {
        self.entries.add(1);
        self.entry_bytes.add(bytes as u64);
        self.notes.entry(position, self.nanos(made));
    }

    /// An entry came, on a backup. By its vCPU thread.
    pub(crate) fn came(&self, bytes: usize) {
        self.entries.add(1);
        self.entry_bytes.add(bytes as u64);
    }

    /// An output has left. By the holder of the outlet.
    pub(crate) fn left(&self, bytes: usize) {
        self.outputs.add(1);
        self.output_bytes.add(bytes as u64);
    }

    /// A frame was read from the port. By the I/O thread.
    pub(crate) fn frame(&self, bytes: usize) {
        self.frames.add(1);
        self.frame_bytes.add(bytes as u64);
    }

    /// The peer says that it is at this position. By the I/O thread; `is_backup` if it follows this side's log.
    pub(crate) fn peer_is_at(&self, position: u64, is_backup: bool) {
        self.peer.store(position, Ordering::Relaxed);
        if !is_backup {
            return;
        }
        let lag = self.notes.behind(position, self.nanos(Instant::now()));
        self.lag.store(lag, Ordering::Relaxed);
        self.lag_most.fetch_max(lag, Ordering::Relaxed);
    }

    /// There is no peer any more.
    pub(crate) fn no_peer(&self) {
        self.peer.store(0, Ordering::Relaxed);
        self.lag.store(UNKNOWN, Ordering::Relaxed);
    }

    /// Commit latencies since the start.
    #[must_use]
    pub fn commits(&self) -> Latencies {
        self.commits.read()
    }

    /// Stops of the guest at the ends of intervals and where it was preempted, since the start.
    #[must_use]
    pub fn stops(&self) -> Latencies {
        self.stops.read()
    }

    /// Pages that were written before these stops, and the bytes of their checkpoints.
    #[must_use]
    pub fn stopped_for(&self) -> [u64; 2] {
        [self.stop_pages.get(), self.stop_bytes.get()]
    }

    /// Entries of the events lane posted, or on a backup received; and the bytes of their payloads.
    #[must_use]
    pub fn entries(&self) -> [u64; 2] {
        [self.entries.get(), self.entry_bytes.get()]
    }

    /// Outputs that have left the gate, and the bytes of the frames and console texts among them.
    #[must_use]
    pub fn outputs(&self) -> [u64; 2] {
        [self.outputs.get(), self.output_bytes.get()]
    }

    /// Frames read for the guest, and their bytes.
    #[must_use]
    pub fn frames(&self) -> [u64; 2] {
        [self.frames.get(), self.frame_bytes.get()]
    }

    /// How old the first entry was that the backup had not replayed when it sent its last heartbeat, that heartbeat's way included.
    #[must_use]
    pub fn lag(&self) -> Option<Duration> {
        match self.lag.load(Ordering::Relaxed) {
            UNKNOWN => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// The longest lag since the last call.
    pub fn take_longest_lag(&self) -> Duration {
        Duration::from_nanos(self.lag_most.swap(0, Ordering::Relaxed))
    }

    /// The peer's position, by its last heartbeat.
    #[must_use]
    pub fn peer(&self) -> u64 {
        self.peer.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_what_falls_into_it(nanos in 0..=LONGEST) {
            let bucket = bucket_of(nanos);
            prop_assert!(bucket < BUCKETS);
            prop_assert!(nanos <= upper_bound(bucket));
            prop_assert!(bucket == 0 || nanos > upper_bound(bucket - 1));
            prop_assert!(upper_bound(bucket) - nanos <= nanos / PARTS as u64);
        }

        #[test]
        fn quantiles_agree_with_a_sorted_list(mut all in prop::collection::vec(0..5_000_000_u64, 1..300), share in 0.0..=1.0_f64) {
            let histogram = Histogram::default();
            all.iter().for_each(|&nanos| histogram.record(nanos));
            all.sort_unstable();
            let read = histogram.read();
            let rank = ((all.len() as f64 * share).ceil() as usize).max(1);
            let (found, exact) = (read.quantile(share), all[rank - 1]);
            prop_assert!(found >= exact && found - exact <= exact / PARTS as u64, "{found} for {exact}");
            prop_assert_eq!(read.most(), *all.last().unwrap());
            prop_assert_eq!(read.count(), all.len() as u64);
            prop_assert_eq!(read.sum(), all.iter().sum::<u64>());
            for power in [8, 12, 20] {
                let below = all.iter().filter(|&&nanos| nanos < 1 << power).count();
                prop_assert_eq!(read.below_power(power), below as u64);
            }
        }

        /// Whatever the load was, the lag is that of the first entry beyond the backup's place, within a grain.
        #[test]
        fn the_lag_is_the_age_of_the_first_entry_that_is_not_replayed(
            steps in prop::collection::vec((1..4_u64, 0..1_000_000_u64), 2..400), at in 0..400_usize,
        ) {
            let notes = Notes::default();
            let (mut position, mut now) = (0, 1_000_000);
            let mut entries = Vec::new();
            for (further, later) in steps {
                position += further;
                now += later;
                notes.entry(position, now);
                entries.push((position, now));
            }
            let place = entries[at % entries.len()].0;
            let first = entries.iter().find(|(position, _)| *position > place);
            let lag = notes.behind(place, now);
            match first {
                None => prop_assert_eq!(lag, 0),
                Some((_, made)) => {
                    let exact = now - made;
                    prop_assert!(lag >= exact && lag < exact + GRAIN, "{lag} for {exact}");
                }
            }
        }
    }

    #[test]
    fn the_largest_latency_has_a_bucket_too() {
        let histogram = Histogram::default();
        histogram.record(u64::MAX);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(histogram.read().quantile(0.5), LONGEST);
        assert_eq!(Latencies::default().quantile(0.5), 0);
    }

    #[test]
    fn what_came_between_two_readings() {
        let histogram = Histogram::default();
        histogram.record(900_000);
        let before = histogram.read();
        for nanos in [1000, 1000, 2000] {
            histogram.record(nanos);
        }
        let since = histogram.read().since(&before);
        assert_eq!((since.count(), since.sum()), (3, 4000));
        assert!(
            (2000..2100).contains(&since.most()),
            "what came before does not count"
        );
    }

    #[test]
    fn a_backup_that_is_further_behind_than_the_notes_go_is_that_far_behind_at_least() {
        let notes = Notes::default();
        for number in 1..3000 {
            notes.entry(number, number * GRAIN);
        }
        let lag = notes.behind(1, 3000 * GRAIN);
        assert!(lag >= (NOTES as u64 - MARGIN) * GRAIN, "{lag}");
    }
}
