//! How long requests took, when, and what that says about a failover. Bounded memory, however long the run.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::backends::wait::Moment;

/// How long after the kill a reply of the old primary may still arrive: the time in which a killed process
/// certainly stops running and the kernel delivers what it had sent. Too short would take an old reply for a
/// new one and the failover for shorter than it was; too long could take a later pause for the failover.
pub const OLD_REPLIES: Duration = Duration::from_millis(100);

/// Single requests kept on each side of the kill. A second of eight busy connections is about as many.
const NEAR: usize = 16_384;

/// Slices kept; when they are full, neighbours are merged and slices are twice as long.
const SLICES: usize = 16_384;

/// The longest time that the histogram tells apart from longer ones. The true maximum is kept beside it.
const LONGEST: Duration = Duration::from_secs(100);

/// One answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When it was sent, or due at a fixed rate.
    pub sent: Moment,
    /// When its reply had arrived.
    pub done: Moment,
}

impl Sample {
    /// How long it took.
    pub const fn latency(self) -> Duration {
        self.done.since(self.sent)
    }
}

/// Answered requests, by when (see [`super`] for what the words mean).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Requests {
    /// Answered before the kill; all of them, without one.
    pub before: u64,
    /// Waiting at some moment between the kill and the new primary's first reply.
    pub during: u64,
    /// Sent after that.
    pub after: u64,
}

/// A distribution of times, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Half are no longer than this.
    pub p50: f64,
    /// 99 in 100 are no longer than this.
    pub p99: f64,
    /// 999 in 1000 are no longer than this.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    /// Reads a histogram of nanoseconds.
    pub fn of_nanos(histogram: &Histogram<u64>) -> Self {
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        Self {
            count: histogram.len(),
            p50: micros(histogram.value_at_quantile(0.5)),
            p99: micros(histogram.value_at_quantile(0.99)),
            p999: micros(histogram.value_at_quantile(0.999)),
            max: micros(histogram.max()),
        }
    }
}

/// The requests sent within a slice of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// How many; with none, the rest means nothing.
    pub count: u64,
    /// The shortest time one of them took.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

impl Slice {
    fn merge(&mut self, other: Self) {
        if other.count == 0 {
            return;
        }
        *self = if self.count == 0 {
            other
        } else {
            Self {
                count: self.count + other.count,
                min: self.min.min(other.min),
                max: self.max.max(other.max),
            }
        };
    }
}

/// Latency over time.
#[derive(Clone, Debug)]
pub struct Series {
    /// When the client began.
    pub start: Moment,
    /// When the primary was killed.
    pub kill: Option<Moment>,
    /// When the new primary's first reply arrived.
    pub served_again: Option<Moment>,
    /// How long a slice is.
    pub slice: Duration,
    /// The whole run in slices, from `start` on, by when requests were sent.
    pub slices: Vec<Slice>,
    /// The single requests answered around the kill (or at the end, without one), by when they were answered.
    pub near: Vec<Sample>,
}

/// What a recorder has found out.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) requests: Requests,
    pub(super) failover: Option<Duration>,
    pub(super) stall_max: Duration,
    pub(super) latency: Latency,
    pub(super) series: Series,
}

/// Takes every answered request, in the order of their replies.
#[derive(Debug)]
pub(super) struct Recorder {
    start: Moment,
    histogram: Histogram<u64>,
    slice: Duration,
    slices: Vec<Slice>,
    kill: Option<Moment>,
    /// The last ones answered by the time of the kill.
    recent: VecDeque<Sample>,
    /// The first ones answered after it.
    after: Vec<Sample>,
    /// How many were answered after those.
    beyond: u64,
    /// The longest latency of all, and of those answered after the kill.
    max: Duration,
    max_after: Duration,
}

impl Recorder {
    pub(super) fn new(start: Moment) -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 3)
            .expect("bounds and digits that a histogram takes");
        Self {
            start,
            histogram,
            slice: Duration::from_millis(1),
            slices: Vec::new(),
            kill: None,
            recent: VecDeque::new(),
            after: Vec::new(),
            beyond: 0,
            max: Duration::ZERO,
            max_after: Duration::ZERO,
        }
    }

    /// Takes one; `kill` is when the primary was killed, as far as is known.
    pub(super) fn record(&mut self, sample: Sample, kill: Option<Moment>) {
        let latency = sample.latency();
        self.histogram.saturating_record(latency.as_nanos() as u64);
        self.max = self.max.max(latency);
        self.add_to_slice(sample.sent, latency);
        if self.kill.is_none()
            && let Some(kill) = kill
        {
            self.kill = Some(kill);
            // The mark may have been noticed late.
            let late = self.recent.partition_point(|sample| sample.done <= kill);
            for sample in self.recent.split_off(late) {
                self.record_after(sample);
            }
        }
        match self.kill {
            Some(kill) if sample.done > kill => self.record_after(sample),
            _ => {
                if self.recent.len() == NEAR {
                    self.recent.pop_front();
                }
                self.recent.push_back(sample);
            }
        }
    }

    fn record_after(&mut self, sample: Sample) {
        self.max_after = self.max_after.max(sample.latency());
        if self.after.len() < NEAR {
            self.after.push(sample);
        } else {
            self.beyond += 1;
        }
    }

    fn add_to_slice(&mut self, sent: Moment, latency: Duration) {
        let at = sent.since(self.start).as_nanos();
        let mut index = (at / self.slice.as_nanos()) as usize;
        while index >= SLICES {
            self.slice *= 2;
            index /= 2;
            for to in 0..self.slices.len().div_ceil(2) {
                let mut merged = self.slices[2 * to];
                merged.merge(self.slices.get(2 * to + 1).copied().unwrap_or_default());
                self.slices[to] = merged;
            }
            self.slices.truncate(self.slices.len().div_ceil(2));
        }
        if self.slices.len() <= index {
            self.slices.resize(index + 1, Slice::default());
        }
        self.slices[index].merge(Slice {
            count: 1,
            min: latency,
            max: latency,
        });
    }

    /// The end of the run: `live` is when the new primary went live, if that was told; `unanswered` are the
    /// times at which requests were sent that have no reply at `end`.
    pub(super) fn finish(
        self,
        live: Option<Moment>,
        unanswered: impl Iterator<Item = Moment>,
        end: Moment,
    ) -> Findings {
        let served_again = self.kill.and_then(|kill| match live {
            Some(live) => self
                .after
                .iter()
                .map(|sample| sample.done)
                .find(|done| *done >= live),
            None => end_of_silence(kill, &self.after, end),
        });
        let total = self.histogram.len();
        let answered_after = self.after.len() as u64 + self.beyond;
        let waited = self
            .after
            .iter()
            .filter(|sample| served_again.is_none_or(|again| sample.sent < again))
            .count() as u64;
        let requests = Requests {
            before: total - answered_after,
            during: waited,
            after: answered_after - waited,
        };
        let answered_max = if self.kill.is_some() {
            self.max_after
        } else {
            self.max
        };
        let unanswered_max = unanswered.map(|sent| end.since(sent)).max();
        let mut near: Vec<_> = self.recent.into();
        near.extend_from_slice(&self.after);
        Findings {
            requests,
            failover: self
                .kill
                .zip(served_again)
                .map(|(kill, again)| again.since(kill)),
            stall_max: answered_max.max(unanswered_max.unwrap_or_default()),
            latency: Latency::of_nanos(&self.histogram),
            series: Series {
                start: self.start,
                kill: self.kill,
                served_again,
                slice: self.slice,
                slices: self.slices,
                near,
            },
        }
    }
}

/// The reply that ends the longest silence among those that began soon after the kill; `None` if that silence
/// lasts to the end of the run.
fn end_of_silence(kill: Moment, after: &[Sample], end: Moment) -> Option<Moment> {
    let latest = kill.plus(OLD_REPLIES);
    let replies = || after.iter().map(|sample| sample.done);
    let starts = std::iter::once(kill).chain(replies());
    let ends = replies().map(Some).chain(std::iter::once(None));
    starts
        .zip(ends)
        .take_while(|(start, _)| *start <= latest)
        .max_by_key(|(start, reply)| reply.unwrap_or(end).since(*start))
        .and_then(|(_, reply)| reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Moment = Moment::from_nanos(1_000_000_000);

    fn at(micros: u64) -> Moment {
        START.plus(Duration::from_micros(micros))
    }

    fn sample(sent: u64, done: u64) -> Sample {
        Sample {
            sent: at(sent),
            done: at(done),
        }
    }

    /// Answered before, an old reply right after the kill at 10 ms, silence until 25 ms, then service.
    fn failover(live: Option<Moment>) -> Findings {
        let mut recorder = Recorder::new(START);
        for sent in 0..100 {
            recorder.record(sample(sent * 100, sent * 100 + 90), None);
        }
        let kill = Some(at(10_000));
        recorder.record(sample(9_950, 10_020), kill);
        recorder.record(sample(9_960, 25_000), kill);
        recorder.record(sample(9_970, 25_300), kill);
        recorder.record(sample(25_010, 25_400), kill);
        recorder.record(sample(25_310, 26_000), kill);
        recorder.finish(live, std::iter::empty(), at(30_000))
    }

    #[test]
    fn before_during_and_after_are_told_apart() {
        let told = failover(Some(at(24_000)));
        let guessed = failover(None);
        for found in [told, guessed] {
            assert_eq!(found.failover, Some(Duration::from_micros(15_000)));
            assert_eq!(
                found.requests,
                Requests {
                    before: 100,
                    during: 3,
                    after: 2
                }
            );
            assert_eq!(found.stall_max, Duration::from_micros(15_330));
            assert_eq!(found.latency.count, 105);
            assert!(
                (89.0..91.0).contains(&found.latency.p50),
                "{:?}",
                found.latency
            );
            assert!((15_000.0..15_400.0).contains(&found.latency.max));
            assert_eq!(found.series.near.len(), 105);
            assert_eq!(found.series.served_again, Some(at(25_000)));
        }
        // A reply before the new primary was live is the old one's, however late.
        let late = failover(Some(at(25_100)));
        assert_eq!(late.failover, Some(Duration::from_micros(15_300)));
    }

    #[test]
    fn a_kill_noticed_late_moves_what_was_answered_since() {
        let mut recorder = Recorder::new(START);
        for sent in 0..10 {
            recorder.record(sample(sent * 100, sent * 100 + 90), None);
        }
        recorder.record(sample(950, 1200), Some(at(500)));
        let found = recorder.finish(None, std::iter::empty(), at(2000));
        assert_eq!(found.requests.before, 5);
        assert_eq!(found.requests.during + found.requests.after, 6);
    }

    #[test]
    fn a_server_that_never_comes_back_has_no_failover_and_a_growing_stall() {
        let mut recorder = Recorder::new(START);
        recorder.record(sample(0, 100), None);
        recorder.record(sample(100, 600), Some(at(500)));
        let found = recorder.finish(Some(at(700)), [at(550)].into_iter(), at(90_550));
        assert_eq!(found.failover, None);
        assert_eq!(found.stall_max, Duration::from_millis(90));
        assert_eq!(found.requests.during, 1);
    }

    #[test]
    fn old_replies_alone_are_no_failover() {
        let mut recorder = Recorder::new(START);
        recorder.record(sample(0, 100), None);
        let kill = Some(at(150));
        recorder.record(sample(110, 200), kill);
        recorder.record(sample(120, 900), kill);
        let found = recorder.finish(None, std::iter::empty(), at(5_000));
        assert_eq!(found.failover, None);
        assert_eq!(found.requests.during, 2);
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_forgotten() {
        let mut recorder = Recorder::new(START);
        let many = 200_000;
        for number in 0..many {
            let kill = (number > 100_000).then(|| at(1_000_000_000));
            recorder.record(sample(number * 10_000, number * 10_000 + number), kill);
        }
        assert!(recorder.slices.len() <= SLICES);
        let count: u64 = recorder.slices.iter().map(|slice| slice.count).sum();
        assert_eq!(count, many);
        let max = recorder.slices.iter().map(|slice| slice.max).max();
        assert_eq!(max, Some(Duration::from_micros(many - 1)));
        let found = recorder.finish(None, std::iter::empty(), at(many * 10_000));
        assert!(found.series.near.len() <= 2 * NEAR);
        let requests = found.requests;
        assert_eq!(requests.before + requests.during + requests.after, many);
        assert_eq!(found.stall_max, Duration::from_micros(many - 1));
    }
}
