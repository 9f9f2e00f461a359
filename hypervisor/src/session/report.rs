//! What a role says of itself while it runs: one JSON object a line on standard output, or lines for people on standard error.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backends::outflow::Standard;
use crate::backends::wait::Moment;
use crate::control::board::Board;
use crate::orders::Samples;
use crate::protocol::detector::Watched;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The role is set up; for a backup: it listens.
    Ready {
        /// `primary`, `backup` or `solo`.
        role: String,
        /// Process id.
        pid: u32,
        /// The TCP address that a backup listens at, if it does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<SocketAddr>,
    },
    /// Both sides are paired and the guest runs.
    Paired {
        /// The reign.
        epoch: u64,
        /// The other process's identity.
        peer: String,
    },
    /// A new backup holds a copy of the running machine and follows its log.
    Joined {
        /// Its identity.
        peer: String,
        /// How long the guest stood for it, in microseconds.
        stopped_us: u64,
        /// From the first page to its word that the copy is whole, in microseconds.
        took_us: u64,
        /// Bytes that went over.
        bytes: u64,
        /// Rounds, the first one with everything.
        rounds: u32,
    },
    /// Commit latencies since the last such event: (upper bound of the bucket in ns, count).
    Commits {
        /// The buckets.
        buckets: Vec<(u64, u64)>,
    },
    /// Ticks given to the guest and checkpoints that stopped it, since the last such event.
    Preempted {
        /// By how much each tick came too late, in microseconds.
        ticks_late_us: Vec<u64>,
        /// How long the guest stood for each checkpoint, in microseconds.
        checkpoints_us: Vec<u64>,
        /// Bytes of these checkpoints together.
        checkpoint_bytes: u64,
    },
    /// Ends of intervals since the last such event: of a machine that is replicated by checkpoints.
    Intervals {
        /// How long the guest stood for each, in microseconds.
        stops_us: Vec<u64>,
        /// Pages that were written in each.
        pages: Vec<u64>,
        /// Bytes of their checkpoints together.
        bytes: u64,
    },
    /// The flight recorder's newest checkpoint is durable.
    Checkpointed {
        /// Where it was taken.
        position: u64,
        /// How long the guest stood for it, in microseconds.
        stopped_us: u64,
        /// From the first page until it was durable, in microseconds.
        took_us: u64,
        /// Its bytes.
        bytes: u64,
        /// Rounds in which pages were copied.
        rounds: u32,
    },
    /// What this side saw of the other's signs of life, since the last such event.
    Watched {
        /// The longest time in which nothing was heard, in microseconds.
        silence_us: u64,
        /// The longest gap between two looks of its own, in microseconds.
        own_gap_us: u64,
    },
    /// How far this side is.
    Progress {
        /// Sync points.
        position: u64,
        /// Whole memories compared and found equal.
        memory_checks: u64,
        /// Where they were compared last.
        checked_at: u64,
    },
    /// This backup serves the machine now.
    Live {
        /// The new reign.
        epoch: u64,
        /// The last position of the old primary.
        position: u64,
        /// Whole memories that had been compared and found equal.
        memory_checks: u64,
        /// Where they were compared last.
        checked_at: u64,
        /// Outputs sent again.
        resent: usize,
        /// Frames taken over that the old primary had read and not applied.
        inherited_frames: usize,
        /// An interval had begun to come and was not whole: nothing of it counts.
        #[serde(default)]
        torn: bool,
        /// CLOCK_MONOTONIC, nanoseconds: suspicion, claim won, fence returned, drained, gate open.
        at: Timeline,
    },
    /// The machine was handed over to this process by its operator's will.
    SwitchedOver {
        /// The new reign.
        epoch: u64,
        /// How long the guest stood: on its old side until it said so, and here from when that came; the way between is not known.
        stood_us: u64,
        /// Outputs sent again: none, or the old side could not let all of them out.
        resent: usize,
    },
    /// The replayed machine is not the recorded one.
    Diverged {
        /// Position, field, expected, found.
        what: String,
    },
    /// A line for people.
    Notice {
        /// The line.
        text: String,
        /// Whether protection or service is affected.
        loud: bool,
    },
    /// The role is over.
    Ended {
        /// Why.
        why: String,
    },
}

impl Event {
    /// A line for people, and whether protection or service is affected; none for figures.
    fn line(&self) -> Option<(String, bool)> {
        Some(match self {
            Self::Notice { text, loud } => (text.clone(), *loud),
            Self::Ready { role, pid, .. } => (format!("{role} is ready, process {pid}"), false),
            Self::Paired { epoch, .. } => {
                (format!("protected: both sides run, epoch {epoch}"), false)
            }
            Self::Joined {
                stopped_us,
                took_us,
                bytes,
                rounds,
                ..
            } => (
                format!(
                    "a new backup has a copy: {:.1} MiB in {rounds} rounds, {:.1} ms; the guest stood {:.2} ms",
                    *bytes as f64 / f64::from(1 << 20),
                    *took_us as f64 / 1e3,
                    *stopped_us as f64 / 1e3
                ),
                false,
            ),
            Self::Live {
                epoch,
                position,
                at,
                ..
            } => (
                format!(
                    "live in epoch {epoch} from position {position}, {:.1} ms after the first suspicion",
                    at.open.saturating_sub(at.suspected) as f64 / 1e6
                ),
                true,
            ),
            Self::SwitchedOver {
                epoch, stood_us, ..
            } => (
                format!(
                    "switched over: this process serves the machine in epoch {epoch}; the guest stood {:.2} ms",
                    *stood_us as f64 / 1e3
                ),
                true,
            ),
            Self::Diverged { what } => (what.clone(), true),
            Self::Ended { why } => (why.clone(), false),
            Self::Commits { .. }
            | Self::Preempted { .. }
            | Self::Intervals { .. }
            | Self::Checkpointed { .. }
            | Self::Watched { .. }
            | Self::Progress { .. } => return None,
        })
    }
}

/// Steps of a take-over, CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The primary was suspected.
    pub suspected: u64,
    /// The fence had returned.
    pub fenced: u64,
    /// The log was replayed to its end.
    pub drained: u64,
    /// The claim was won.
    pub claimed: u64,
    /// The guest ran, its outputs held.
    pub running: u64,
    /// The record was `live` and the gate opened.
    pub open: u64,
}

impl Timeline {
    /// The clock it is told by.
    #[must_use]
    pub fn now() -> u64 {
        Moment::now().as_nanos()
    }
}

/// Says what happens.
#[derive(Debug)]
pub struct Reporter {
    json: bool,
    /// Where the operator's thread finds it, too.
    board: Arc<Board>,
    commits_due: Instant,
    watched_due: Instant,
}

/// Often enough that little is lost with a process that is killed, rare enough to cost nothing.
const COMMITS_EVERY: Duration = Duration::from_millis(50);

/// As often as somebody would look.
const WATCHED_EVERY: Duration = Duration::from_secs(1);

impl Reporter {
    /// A reporter; `json` writes every event to standard output.
    #[must_use]
    pub fn new(json: bool, board: Arc<Board>) -> Self {
        Self {
            json,
            board,
            commits_due: Instant::now() + COMMITS_EVERY,
            watched_due: Instant::now() + WATCHED_EVERY,
        }
    }

    /// The board of its role.
    #[must_use]
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Says one event.
    pub fn say(&self, event: &Event) {
        if let Some((text, loud)) = event.line() {
            self.board.said(&text, loud);
        }
        self.repeat(event);
    }

    /// Says it without adding to the role's history.
    pub fn repeat(&self, event: &Event) {
        if self.json {
            let mut line = serde_json::to_vec(event).expect("plain fields always encode");
            line.push(b'\n');
            // Whoever read it is gone: that is no reason to stop a machine.
            let _ = Standard::Output.say(&line);
            return;
        }
        match (event.line(), event) {
            (Some((text, _)), Event::Diverged { .. }) => tracing::error!("{text}"),
            (Some((text, true)), _) => tracing::warn!("{text}"),
            (Some((text, false)), _) => tracing::info!("{text}"),
            (None, _) => {}
        }
    }

    /// Whether commit latencies are due.
    #[must_use]
    pub fn commits_due(&self) -> bool {
        self.json && Instant::now() >= self.commits_due
    }

    /// Hands on what was seen of the other side's signs of life, when it is due.
    pub fn watched(&mut self, take: impl FnOnce() -> Option<Watched>) {
        if !self.json || Instant::now() < self.watched_due {
            return;
        }
        self.watched_due = Instant::now() + WATCHED_EVERY;
        if let Some(watched) = take() {
            self.say(&Event::Watched {
                silence_us: watched.silence.as_micros() as u64,
                own_gap_us: watched.own_gap.as_micros() as u64,
            });
        }
    }

    /// Hands on the commit latencies that have gathered.
    pub fn commits(&mut self, samples: &Samples) {
        self.commits_due = Instant::now() + COMMITS_EVERY;
        let mut buckets: Vec<(u64, u64)> = Vec::new();
        let mut taken: Vec<u64> = std::iter::from_fn(|| samples.take()).collect();
        taken.sort_unstable();
        for nanos in taken {
            // 16 ns wide: below what a clock reading resolves here, and few enough to write.
            let bucket = nanos | 15;
            match buckets.last_mut() {
                Some((last, count)) if *last == bucket => *count += 1,
                _ => buckets.push((bucket, 1)),
            }
        }
        if !buckets.is_empty() {
            self.say(&Event::Commits { buckets });
        }
        let ticks_late_us: Vec<u64> = std::iter::from_fn(|| samples.take_late_tick())
            .map(|nanos| nanos / 1000)
            .collect();
        let ends: Vec<_> = std::iter::from_fn(|| samples.take_interval()).collect();
        if !ends.is_empty() {
            self.say(&Event::Intervals {
                stops_us: ends.iter().map(|end| end.took.as_micros() as u64).collect(),
                pages: ends.iter().map(|end| end.pages as u64).collect(),
                bytes: ends.iter().map(|end| end.bytes as u64).sum(),
            });
        }
        let checkpoints: Vec<_> = std::iter::from_fn(|| samples.take_checkpoint()).collect();
        if !ticks_late_us.is_empty() || !checkpoints.is_empty() {
            self.say(&Event::Preempted {
                ticks_late_us,
                checkpoints_us: checkpoints
                    .iter()
                    .map(|stop| stop.took.as_micros() as u64)
                    .collect(),
                checkpoint_bytes: checkpoints.iter().map(|stop| stop.bytes as u64).sum(),
            });
        }
    }
}
