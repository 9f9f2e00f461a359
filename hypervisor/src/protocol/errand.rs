//! One question to the arbiter, repeated until it is answered.
//!
//! ```text
//!            ask                 Failed                back-off over
//!   (none) ──────▶ InFlight ───────────────▶ Waiting ────────────────▶ InFlight
//!                     │ Swapped, Lost, Read
//!                     ▼
//!                  settled
//! ```
//!
//! A swap whose answer got lost may have landed. It is simply asked again: the arbiter says `Swapped` when the
//! record already is what the swap would write, since nobody else could have written that, and `Lost` with
//! what it found otherwise. An attempt that is still under way somewhere can do no harm later, since the record it
//! starts from never comes back.

use std::time::Duration;

use super::Timing;
use super::notice::Notice;
use super::record::Record;
use super::time::Moment;

/// What the session asks the arbiter for a machine of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Read the record.
    Read,
    /// Replace `from`, if that is what the record is, by `to`.
    Swap {
        /// The record it must be.
        from: Record,
        /// The record it becomes; its owner is the asking process.
        to: Record,
    },
}

/// The arbiter's answer to a [`Request`]. Each request gets exactly one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The record is `to` now (by this attempt or an earlier one).
    Swapped,
    /// The record is not `to`: it was not `from`, but this.
    Lost(Option<Record>),
    /// The record, `None` if there is none.
    Read(Option<Record>),
    /// No answer that tells.
    Failed {
        /// A swap may have taken effect all the same. `false` only when that is certainly not so.
        may_have_landed: bool,
        /// What went wrong, for people.
        why: String,
    },
}

/// How an errand came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Swapped(Record),
    Lost(Record),
    Read(Record),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    InFlight { since: Moment, reported: bool },
    Waiting { until: Moment },
}

/// One request under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Errand {
    request: Request,
    phase: Phase,
    failures: u32,
    may_have_landed: bool,
}

impl Errand {
    /// A request that the caller sends now.
    pub(super) fn new(now: Moment, request: Request) -> Self {
        Self {
            request,
            phase: Phase::InFlight {
                since: now,
                reported: false,
            },
            failures: 0,
            may_have_landed: false,
        }
    }

    /// Takes the answer. An outcome ends the errand; without one it will be asked again.
    pub(super) fn answer(
        &mut self,
        now: Moment,
        answer: Answer,
        timing: &Timing,
    ) -> (Option<Outcome>, Option<Notice>) {
        let back = (self.failures > 0).then_some(Notice::ArbiterBack);
        let failure = match (self.request, answer) {
            (Request::Swap { to, .. }, Answer::Swapped) => {
                return (Some(Outcome::Swapped(to)), back);
            }
            // A record that is still `from` was not lost to anybody, nor is one from before it: the arbiter's view was out of date.
            (Request::Swap { from, .. }, Answer::Lost(Some(found)))
                if found != from && found.rank() >= from.rank() =>
            {
                return (Some(Outcome::Lost(found)), back);
            }
            (Request::Swap { from, .. }, Answer::Lost(Some(found))) => {
                format!(
                    "it answers with what was before ({found}), and {from} was the machine's record"
                )
            }
            (Request::Read, Answer::Read(Some(found))) => {
                return (Some(Outcome::Read(found)), back);
            }
            (
                _,
                Answer::Failed {
                    may_have_landed,
                    why,
                },
            ) => {
                self.may_have_landed |= may_have_landed;
                why
            }
            // A record cannot vanish. This arbiter is not the one we began with: conclude nothing from it.
            (_, Answer::Lost(None) | Answer::Read(None)) => {
                "the machine's record is gone: restore the arbiter's data".to_owned()
            }
            (_, other) => format!("an answer that does not fit the request: {other:?}"),
        };
        self.failures = self.failures.saturating_add(1);
        let doublings = (self.failures - 1).min(20);
        let wait = timing
            .retry_min
            .saturating_mul(1 << doublings)
            .min(timing.retry_max);
        self.phase = Phase::Waiting { until: now + wait };
        // Said at the 1st, 2nd, 4th, 8th… failure: at once, and never in a flood.
        let notice = self
            .failures
            .is_power_of_two()
            .then_some(Notice::ArbiterUnreachable {
                attempts: self.failures,
                why: failure,
            });
        (None, notice)
    }

    /// The request to send again now, if its time has come, and what to say about a slow arbiter.
    pub(super) fn tick(
        &mut self,
        now: Moment,
        timing: &Timing,
    ) -> (Option<Request>, Option<Notice>) {
        match &mut self.phase {
            Phase::Waiting { until } if now >= *until => {
                self.phase = Phase::InFlight {
                    since: now,
                    reported: false,
                };
                (Some(self.request), None)
            }
            Phase::InFlight { since, reported } if !*reported => {
                let span: Duration = now.since(*since);
                *reported = span >= timing.arbiter_slow;
                (None, reported.then_some(Notice::ArbiterSlow(span)))
            }
            _ => (None, None),
        }
    }

    /// Whether nothing is under way: the last attempt failed, and the next one is not due yet.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    /// Whether the errand can be dropped without a trace: nothing is under way, and nothing can have landed.
    pub(super) fn can_be_dropped(&self) -> bool {
        self.is_idle() && !self.may_have_landed
    }

    /// When [`Errand::tick`] has something to do next.
    pub(super) fn deadline(&self, timing: &Timing) -> Option<Moment> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            Phase::InFlight { since, reported } => (!reported).then(|| since + timing.arbiter_slow),
        }
    }
}
