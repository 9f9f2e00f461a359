//! Who lives: failure detection, claims, take-over. Pure state machines: events and a clock reading in, actions
//! out. Nothing here reads a clock, a socket, a file or a random source; the session does, and so does the
//! seeded simulator in the tests.
//!
//! ```text
//!        heartbeats, log traffic, EOF           answers                 Fenced, Drained
//!                    │                             ▲ │                        ▲ │
//!                    ▼                             │ ▼                        │ ▼
//!   session ── handle(now, event) ──▶ Primary | Candidate | Backup ──▶ actions ──▶ arbiter, ring, vCPU, gate
//! ```
//!
//! A pair begins with a record that both know: the primary swaps it in (`Record::cold_start`, or `Record::entitling` when it
//! runs already) with the backup's identity entitled, and says so; until then the backup is a candidate. The machines are drawn
//! in [`primary`], [`candidate`] and [`backup`], the record's own steps in [`record`].
//!
//! The machines can be cloned and compared: a seeded simulator and a model checker (`docs/decisions/protocol-proof.md`) drive
//! this very code.
//!
//! What holds, whatever the network, the schedulers and the arbiter do:
//! - Nobody changes role without an answer from the arbiter. A request that failed is asked again, with a bounded
//!   back-off, until there is one; because no record comes back and owners are unique, the repeated swap tells
//!   whether an earlier attempt landed (`errand.rs`).
//! - A claim swaps from the record that the claimant's own state belongs to, never from one just read.
//! - The ring is drained only after its fence has returned, and outputs leave only after `live` was confirmed.
//! - The tokens that let the session go live (`Claim`, `Fenced`) are not made here: the machine only says when.
//!
//! The session's side of the contract: hand over what has arrived (datagrams, EOF, answers) *before* a tick, tick
//! at least at every [`Primary::deadline`](primary::Primary::deadline), run the actions in their order
//! (a fence may come before the rest), and answer each [`Request`] exactly once.
#![forbid(unsafe_code)]

pub mod backup;
pub mod candidate;
pub mod detector;
mod errand;
pub mod heartbeat;
mod notice;
pub mod primary;
pub mod record;
mod time;

#[cfg(test)]
mod tests;

pub use backup::Backup;
pub use candidate::Candidate;
pub use errand::{Answer, Request};
pub use notice::{Evidence, Notice, Reason, Unfit};
pub use primary::Primary;
pub use record::{Cold, Configuration, Epoch, Identity, Record, Reign, State};
pub use time::Moment;

use std::time::Duration;

use heartbeat::{Heartbeat, MachineId, Progress};

/// Every span the protocol waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Between two heartbeats. 5 ms: a loss is noticed within a client's patience, at 200 packets a second.
    pub heartbeat: Duration,
    /// When a silent peer, or one whose vCPU thread makes no progress, is given up.
    pub detector: detector::Limits,
    /// A `claimed` record of this age is taken back by the frozen primary. It must exceed the time to fence and to
    /// drain (lag is bounded by 100 ms), or a take-over that was going well is undone; longer only
    /// lengthens the outage when the backup dies while it takes over.
    pub stale_claim: Duration,
    /// How often a frozen primary looks at the record.
    pub reread: Duration,
    /// The first wait before a failed request is repeated; it doubles up to `retry_max`.
    pub retry_min: Duration,
    /// The longest wait before a failed request is repeated.
    pub retry_max: Duration,
    /// An arbiter that has not answered for so long is reported.
    pub arbiter_slow: Duration,
    /// How long a backup that joins may take from the cut until it is ready: to take in the last pages, and to put them in place.
    /// Until then nobody judges it, and outputs wait for it to receive; if it does not, the guest's clients wait so long.
    pub ready_within: Duration,
    /// How long a candidate waits for its primary's word before it asks the arbiter by itself: an arbiter's answer, many times over.
    /// One that knew before its primary would miss heartbeats that are not sent yet.
    pub word_within: Duration,
    /// How long a guest that was stopped for a switch-over waits for the backup to take the machine. Many times what that takes (two answers
    /// of the arbiter, a fence); longer only lengthens the pause of a switch-over that comes to nothing.
    pub switch_within: Duration,
    /// Between two questions of a candidate whether it is entitled.
    pub ask_every: Duration,
    /// How long after its primary's end a swap that was under way may still land, and a candidate goes on asking.
    pub late_swap: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(5),
            detector: detector::Limits::default(),
            stale_claim: Duration::from_secs(1),
            reread: Duration::from_millis(20),
            retry_min: Duration::from_millis(5),
            retry_max: Duration::from_millis(500),
            arbiter_slow: Duration::from_secs(1),
            ready_within: Duration::from_secs(5),
            word_within: Duration::from_secs(2),
            switch_within: Duration::from_millis(500),
            ask_every: Duration::from_millis(50),
            late_swap: Duration::from_secs(2),
        }
    }
}

/// Who is paired with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The machine.
    pub machine: MachineId,
    /// This process.
    pub me: Identity,
    /// The other process.
    pub peer: Identity,
}

/// Makes this side's heartbeats.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Beater {
    every: Duration,
    due: Moment,
    sequence: u64,
}

impl Beater {
    fn new(now: Moment, every: Duration) -> Self {
        Self {
            every,
            due: now,
            sequence: 0,
        }
    }

    /// The heartbeat to send now, if one is due.
    fn tick(
        &mut self,
        now: Moment,
        pair: &Pair,
        own: &Record,
        progress: Progress,
    ) -> Option<Heartbeat> {
        if now < self.due {
            return None;
        }
        self.due = now + self.every;
        self.sequence += 1;
        Some(Heartbeat {
            machine: pair.machine,
            epoch: own.epoch,
            configuration: own.configuration,
            sender: pair.me,
            sequence: self.sequence,
            clock: now,
            progress,
        })
    }
}

/// What a heartbeat that reached us is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// From another machine, process or reign, or one that came before: ignored.
    Stray,
    /// The peer, alive in our reign.
    Alive,
    /// The peer, in a newer reign or configuration: it has gone on without us.
    Newer,
}

/// Sorts the peer's heartbeats from the rest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Ear {
    last: u64,
}

impl Ear {
    fn new() -> Self {
        Self { last: 0 }
    }

    fn hear(&mut self, pair: &Pair, own: &Record, beat: &Heartbeat) -> Heard {
        // A repeated or overtaken packet is no sign of life: it was sent before one that we know.
        if beat.machine != pair.machine || beat.sender != pair.peer || beat.sequence <= self.last {
            return Heard::Stray;
        }
        self.last = beat.sequence;
        match (beat.epoch, beat.configuration).cmp(&(own.epoch, own.configuration)) {
            std::cmp::Ordering::Less => Heard::Stray,
            std::cmp::Ordering::Equal => Heard::Alive,
            std::cmp::Ordering::Greater => Heard::Newer,
        }
    }
}
