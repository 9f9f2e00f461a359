//! What a role says of itself: the answer to `doppel status`, and what `doppel top` draws.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::entry::Control;
use crate::meter::Latencies;
use crate::protocol::{backup, primary};

/// What a process is to its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It serves the machine, or did until somebody else does.
    Primary,
    /// It follows a primary.
    Backup,
    /// It runs a machine that is never protected: `doppel run`, `doppel record`.
    Solo,
}

impl Role {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
            Self::Solo => "solo",
        }
    }
}

/// How it stands with the machine, as this process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The process is being set up.
    Starting,
    /// A backup waits for a primary.
    Waiting,
    /// A backup follows and can take over.
    Following,
    /// A backup asks for the machine, or is taking it over.
    TakingOver,
    /// A backup can take over.
    Protected,
    /// A backup can take over, and is told to: the operator wants it to have the machine.
    SwitchingOver,
    /// It serves with nobody to take over.
    Unprotected,
    /// It serves with nobody to take over yet: a new backup is being given a copy.
    Joining,
    /// The guest stands while the arbiter decides who goes on.
    Deciding,
    /// The guest stands: the backup has claimed the machine.
    Frozen,
    /// It is over.
    Ended,
}

impl Standing {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Starting,
        Self::Waiting,
        Self::Following,
        Self::TakingOver,
        Self::Protected,
        Self::SwitchingOver,
        Self::Unprotected,
        Self::Joining,
        Self::Deciding,
        Self::Frozen,
        Self::Ended,
    ];

    /// The word for it, as in JSON.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Waiting => "waiting",
            Self::Following => "following",
            Self::TakingOver => "taking_over",
            Self::Protected => "protected",
            Self::SwitchingOver => "switching_over",
            Self::Unprotected => "unprotected",
            Self::Joining => "joining",
            Self::Deciding => "deciding",
            Self::Frozen => "frozen",
            Self::Ended => "ended",
        }
    }

    /// Whether the machine survives the loss of either side.
    #[must_use]
    pub fn is_protected(self) -> bool {
        matches!(
            self,
            Self::Protected | Self::SwitchingOver | Self::Following
        )
    }

    /// Whether this process serves the machine with nobody to take over.
    #[must_use]
    pub fn is_unprotected(self) -> bool {
        matches!(self, Self::Unprotected | Self::Joining)
    }
}

impl From<primary::Phase> for Standing {
    fn from(phase: primary::Phase) -> Self {
        match phase {
            // The old backup can take over until the new one can.
            primary::Phase::Protected
            | primary::Phase::Sounding
            | primary::Phase::Standing
            | primary::Phase::Replacing => Self::Protected,
            primary::Phase::HandingOver => Self::SwitchingOver,
            primary::Phase::Unprotected => Self::Unprotected,
            primary::Phase::Joining | primary::Phase::Entitling => Self::Joining,
            primary::Phase::Detaching | primary::Phase::Reclaiming => Self::Deciding,
            primary::Phase::Frozen => Self::Frozen,
            primary::Phase::Ending | primary::Phase::Dead => Self::Ended,
        }
    }
}

impl From<backup::Phase> for Standing {
    fn from(phase: backup::Phase) -> Self {
        match phase {
            backup::Phase::Following | backup::Phase::Suspecting => Self::Following,
            backup::Phase::Claiming
            | backup::Phase::Draining
            | backup::Phase::GoingLive
            | backup::Phase::Live
            | backup::Phase::Abandoning => Self::TakingOver,
            backup::Phase::Stopping | backup::Phase::Stopped => Self::Ended,
        }
    }
}

/// Latencies, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Half of them took no longer.
    pub p50_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl From<&Latencies> for Latency {
    fn from(latencies: &Latencies) -> Self {
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        Self {
            count: latencies.count(),
            p50_us: micros(latencies.quantile(0.5)),
            p99_us: micros(latencies.quantile(0.99)),
            max_us: micros(latencies.most()),
        }
    }
}

/// What a process has done since it started, or how much of it a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Sync points of the guest.
    pub exits: f64,
    /// Entries of the log posted, or received by a backup.
    pub entries: f64,
    /// Bytes of their payloads.
    pub entry_bytes: f64,
    /// Outputs let out.
    pub outputs: f64,
    /// Bytes of them.
    pub output_bytes: f64,
    /// Frames read for the guest.
    pub frames: f64,
    /// Bytes of them.
    pub frame_bytes: f64,
}

/// The other side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its identity, which it drew when it started.
    pub identity: String,
    /// Where its heartbeats come from.
    pub address: Option<String>,
    /// Its position, by its last heartbeat.
    pub position: u64,
}

/// What this process knows of the arbiter. It asks only when something is to be decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arbiter {
    /// Where it is; none for a machine that needs none.
    pub place: Option<String>,
    /// Whether it answered the last question; none if it was never asked.
    pub answered: Option<bool>,
    /// How long ago that was, in milliseconds.
    pub asked_ms_ago: Option<u64>,
    /// What it said instead of an answer.
    pub error: Option<String>,
    /// Questions, and those that it did not answer.
    pub questions: [u64; 2],
}

/// A line of the role's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The reign then.
    pub epoch: u64,
    /// Where the guest was.
    pub position: u64,
    /// Whether protection or service was affected.
    pub loud: bool,
    /// The line.
    pub text: String,
}

/// What has become of the hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Whether there is one.
    pub configured: bool,
    /// How often it was run.
    pub runs: u64,
    /// How often that failed.
    pub failures: u64,
}

/// What an operator ordered last, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ordered {
    /// Its number, from 1.
    pub number: u64,
    /// What.
    pub what: String,
    /// What came of it; none while it is under way.
    pub outcome: Option<Result<String, String>>,
}

fn whole() -> u16 {
    Control::WHOLE
}

/// Everything about a role.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The machine.
    pub name: String,
    /// Which machine of that name, if the process was told.
    #[serde(default)]
    pub instance: Option<String>,
    /// What this process is to it.
    pub role: Role,
    /// How it stands.
    pub standing: Standing,
    /// Whether the machine survives the loss of either side.
    pub protected: bool,
    /// For how long it has stood so, in milliseconds.
    pub standing_ms: u64,
    /// Process id.
    pub pid: u32,
    /// The program's version.
    pub program: String,
    /// Since the process started, in milliseconds.
    pub uptime_ms: u64,
    /// The reign; 0 before there is one.
    pub epoch: u64,
    /// Changes of the entitled backup.
    pub configuration: u64,
    /// Sync points of the guest.
    pub position: u64,
    /// How old the first entry was that the backup had not replayed at its last heartbeat, in microseconds; none without a backup.
    pub lag_us: Option<f64>,
    /// The longest lag of the last seconds, in microseconds.
    pub lag_max_us: Option<f64>,
    /// From an output's making to its commit, since the start.
    pub commit: Latency,
    /// The same, of the last ten seconds.
    pub commit_recent: Latency,
    /// How long the guest stood at the end of each interval; under replay, where it was preempted by a checkpoint.
    #[serde(default)]
    pub stop: Latency,
    /// Pages that were written before these stops, and bytes of their checkpoints.
    #[serde(default)]
    pub stopped_for: [u64; 2],
    /// What was done since the start.
    pub totals: Totals,
    /// A second, over the last five.
    pub rates: Totals,
    /// What carries the log.
    pub transport: Option<String>,
    /// The other side, if there is one.
    pub peer: Option<Peer>,
    /// The arbiter.
    pub arbiter: Arbiter,
    /// Changes of role so far, by event.
    pub changes: BTreeMap<String, u64>,
    /// The hook.
    pub hook: Hook,
    /// What of its time the operator leaves the guest, in 1024ths; at 0 it is paused.
    #[serde(default = "whole")]
    pub share: u16,
    /// What was ordered last.
    #[serde(default)]
    pub ordered: Option<Ordered>,
    /// The last orders, the oldest first.
    #[serde(default)]
    pub orders: Vec<Ordered>,
    /// Where metrics are served.
    pub metrics: Option<String>,
    /// Exits in each of the last seconds, the oldest first.
    pub history: Vec<u64>,
    /// The last events, the oldest first.
    pub events: Vec<Happened>,
}

impl Status {
    /// What has come of the order of this number, if anything has. Who asks may not be the only one who gives orders.
    #[must_use]
    pub fn outcome_of(&self, number: u64) -> Option<&Result<String, String>> {
        // A release before tells of the last one alone.
        let mut all = self.orders.iter().chain(&self.ordered);
        all.find(|ordered| ordered.number == number)?
            .outcome
            .as_ref()
    }
}
