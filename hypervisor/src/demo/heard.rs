//! What the sides of a pair say while clients are at work, gathered for the report.
#![forbid(unsafe_code)]

use hdrhistogram::Histogram;

use super::client::Latency;
use super::report::Report;
use crate::session::report::{Event, Timeline};

/// Longest commit that the histogram tells apart: a minute, in nanoseconds.
const COMMIT_MAX_NS: u64 = 60_000_000_000;

/// What was said so far.
#[derive(Clone, Debug)]
pub struct Heard {
    /// From an output's sync point to its commit, in nanoseconds.
    pub commits: Histogram<u64>,
    /// How long the guest stood at the ends of its intervals, in nanoseconds.
    pub stops: Histogram<u64>,
    /// Pages that were written in these intervals, and bytes of their checkpoints.
    pub written: [u64; 2],
    /// Differences that a backup found.
    pub divergences: u64,
    /// These, in words.
    pub problems: Vec<String>,
    /// Notices that concern protection or service.
    pub notices: Vec<String>,
    /// The last go-live.
    pub live: Option<Live>,
}

/// A go-live, as the new primary tells it.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// The new reign.
    pub epoch: u64,
    /// The last position of the old primary.
    pub position: u64,
    /// Whole memories that had been compared and found equal.
    pub memory_checks: u64,
    /// Where they were compared last.
    pub checked_at: u64,
    /// Outputs sent again.
    pub resent: usize,
    /// Frames taken over that the old primary had read and not applied.
    pub inherited_frames: usize,
    /// Whether an interval had begun to come and was not whole.
    pub torn: bool,
    /// When what was done, by the clock of the host that says so.
    pub at: Timeline,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            commits: Histogram::new_with_bounds(1, COMMIT_MAX_NS, 3).expect("legal bounds"),
            stops: Histogram::new_with_bounds(1, COMMIT_MAX_NS, 3).expect("legal bounds"),
            written: [0; 2],
            divergences: 0,
            problems: Vec::new(),
            notices: Vec::new(),
            live: None,
        }
    }
}

impl Heard {
    /// Takes in an event of either side.
    pub fn hear(&mut self, event: Event) {
        match event {
            Event::Commits { buckets } => {
                for (nanos, count) in buckets {
                    self.commits.saturating_record_n(nanos, count);
                }
            }
            Event::Intervals {
                stops_us,
                pages,
                bytes,
            } => {
                for micros in stops_us {
                    self.stops.saturating_record(micros * 1000);
                }
                self.written[0] += pages.iter().sum::<u64>();
                self.written[1] += bytes;
            }
            Event::Diverged { what } => {
                self.divergences += 1;
                self.problems.push(what);
            }
            Event::Live {
                epoch,
                position,
                memory_checks,
                checked_at,
                resent,
                inherited_frames,
                torn,
                at,
            } => {
                self.live = Some(Live {
                    epoch,
                    position,
                    memory_checks,
                    checked_at,
                    resent,
                    inherited_frames,
                    torn,
                    at,
                });
            }
            Event::Notice { text, loud: true } => self.notices.push(text),
            Event::Ready { .. }
            | Event::Paired { .. }
            | Event::Joined { .. }
            | Event::Preempted { .. }
            | Event::Watched { .. }
            | Event::Progress { .. }
            | Event::Notice { .. }
            | Event::SwitchedOver { .. }
            | Event::Checkpointed { .. }
            | Event::Ended { .. } => {}
        }
    }

    /// The pair's part of the report, whose last go-live was this.
    pub fn describe(&self, live: &Live, report: &mut Report) {
        report.memory_hash_equal =
            (live.memory_checks > 0 || self.divergences > 0).then_some(self.divergences == 0);
        report.sync_points = live.position;
        report.epoch = live.epoch;
        report.commit_us = Latency::of_nanos(&self.commits);
        report.stop_us = Latency::of_nanos(&self.stops);
        [report.interval_pages, report.interval_bytes] = self.written;
        report.divergences = self.divergences;
        report.problems.extend(self.problems.iter().cloned());
    }
}
