//! The role of a process that holds a whole copy and waits to be entitled.
//!
//! ```text
//!              word                        the arbiter says the same
//!   Waiting ─────────▶ Told ──────────────────────────────────────────▶ Backup
//!     │                  │ the arbiter says something else                ▲
//!     │                  └──────────────▶ Over                           │ entitled
//!     │ connection over, or no word for long                             │
//!     └──────────────────────────────▶ asks the arbiter by itself ───────┤
//!                                        ▲          │ not entitled       │
//!                                        └──────────┴─▶ Over, some time after the primary's last sign of life
//! ```
//!
//! A host that vanished closes no connection: a primary that neither beats nor logs for as long counts as gone, too.
//!
//! A view of the arbiter that is older than the primary's word may be a late one, and is looked at again for a while; after that it is another arbiter's.
//!
//! The primary's word is only a hint: its swap may have landed and the primary be dead before it could say so, and then
//! nobody but this process can serve. Only a record whose owner is the very primary that it is a copy of counts. An arbiter
//! that cannot be read tells nothing, and the copy is kept for as long as it does not answer.

use super::errand::{Answer, Request};
use super::heartbeat::Heartbeat;
use super::notice::Notice;
use super::record::{Record, State};
use super::time::Moment;
use super::{Pair, Timing};

/// What happens to a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// A heartbeat of this pair arrived: the primary lives, and still asks the arbiter.
    Heartbeat(Heartbeat),
    /// New log entries arrived.
    LogTraffic,
    /// The primary says that this record entitles it.
    Word(Record),
    /// The control connection is at its end: no word will come any more.
    PeerDied,
    /// The arbiter answered.
    Arbiter(Answer),
}

/// What the session does for a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the arbiter, and hand back its answer as [`Event::Arbiter`].
    Ask(Request),
    /// It is entitled by this record: go on as a [`Backup`](super::Backup).
    Follow(Record),
    /// Tell people.
    Say(Notice),
    /// The copy is of no use any more.
    GiveUp(Refusal),
}

/// Why a copy is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The primary is gone or has let go of this copy, and nobody entitled it.
    Dropped,
    /// This record is the machine's, or what the primary said; it does not entitle this copy.
    NotEntitled(Record),
    /// The primary's arbiter is not this side's: together they could make two winners.
    OtherArbiter {
        /// What the primary says.
        told: Record,
        /// What this side's arbiter says.
        found: Option<Record>,
    },
}

/// A candidate's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Candidate {
    pair: Pair,
    timing: Timing,
    ready: Moment,
    told: Option<Record>,
    gone: bool,
    /// The first answer that did not entitle it, since the primary gave its last sign of life.
    refused_since: Option<Moment>,
    /// The first answer that was older than what the primary had said.
    behind_since: Option<Moment>,
    /// A question is under way, asked when this was what it had been told.
    asked: Option<Option<Record>>,
    ask_at: Moment,
    said: bool,
    over: bool,
}

impl Candidate {
    /// A candidate that has just told `pair.peer`, whose copy it is, that it is ready.
    #[must_use]
    pub fn new(pair: Pair, timing: Timing, now: Moment) -> Self {
        Self {
            pair,
            timing,
            ready: now,
            told: None,
            gone: false,
            refused_since: None,
            behind_since: None,
            asked: None,
            ask_at: now,
            said: false,
            over: false,
        }
    }

    /// When the next tick is due at the latest. `None`: nothing is awaited but an answer.
    #[must_use]
    pub fn deadline(&self) -> Option<Moment> {
        if self.over || self.asked.is_some() {
            return None;
        }
        Some(if self.told.is_some() || self.gone {
            self.ask_at
        } else {
            self.ask_at.max(self.ready + self.timing.word_within)
        })
    }

    /// Takes one event; appends what is to be done to `actions`.
    pub fn handle(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        if self.over {
            return;
        }
        match event {
            Event::Tick => {}
            Event::Heartbeat(beat) if beat.sender != self.pair.peer => {}
            Event::Heartbeat(_) | Event::LogTraffic => {
                if !self.gone {
                    self.refused_since = None;
                }
            }
            Event::Word(record) if self.is_ours(&record) => {
                self.told = Some(record);
                self.ask_at = now;
            }
            Event::Word(record) => self.end(Action::GiveUp(Refusal::NotEntitled(record)), actions),
            Event::PeerDied => {
                if !std::mem::replace(&mut self.gone, true) {
                    self.ask_at = now;
                }
            }
            Event::Arbiter(answer) => self.answered(now, answer, actions),
        }
        if self.deadline().is_some_and(|due| now >= due) {
            self.asked = Some(self.told);
            actions.push(Action::Ask(Request::Read));
        }
    }

    /// `pair.peer` alone can entitle it: this copy is of its machine, and of no other's.
    fn is_ours(&self, record: &Record) -> bool {
        record.owner == self.pair.peer
            && record.entitled == Some(self.pair.me)
            && record.state == State::Live
    }

    fn answered(&mut self, now: Moment, answer: Answer, actions: &mut Vec<Action>) {
        let Some(knew) = self.asked.take() else {
            return;
        };
        self.ask_at = now + self.timing.ask_every;
        match answer {
            // The word came while this was under way: it was read before, and is compared with nothing.
            Answer::Read(_) if knew != self.told => self.ask_at = now,
            Answer::Read(found) => self.judge(now, found, actions),
            Answer::Failed { why, .. } => self.unknown(why, actions),
            other => self.unknown(
                format!("an answer that does not fit the request: {other:?}"),
                actions,
            ),
        }
    }

    fn unknown(&mut self, why: String, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.said, true) {
            actions.push(Action::Say(Notice::EntitlementUnknown { why }));
        }
    }

    fn judge(&mut self, now: Moment, found: Option<Record>, actions: &mut Vec<Action>) {
        if let Some(told) = self.told {
            let how = match found {
                Some(record) if record == told => Action::Follow(record),
                // The machine has gone on without this copy meanwhile.
                Some(record) if record.rank() > told.rank() => {
                    Action::GiveUp(Refusal::NotEntitled(record))
                }
                // A view of the arbiter that has not come to the primary's swap yet: of a directory that another host shows late. Until it has, it says
                // nothing of what this side may do; one that never does is another arbiter's.
                found => {
                    let since = *self.behind_since.get_or_insert(now);
                    let behind = found.is_none_or(|record| record.rank() < told.rank());
                    if behind && now.since(since) < self.timing.late_swap {
                        return;
                    }
                    Action::GiveUp(Refusal::OtherArbiter { told, found })
                }
            };
            self.end(how, actions);
        } else if let Some(record) = found.filter(|record| self.is_ours(record)) {
            // Its primary swapped, and then could not say so.
            self.end(Action::Follow(record), actions);
        } else {
            let since = *self.refused_since.get_or_insert(now);
            if now.since(since) >= self.timing.late_swap {
                self.end(Action::GiveUp(Refusal::Dropped), actions);
            }
        }
    }

    fn end(&mut self, how: Action, actions: &mut Vec<Action>) {
        self.over = true;
        actions.push(how);
    }
}
