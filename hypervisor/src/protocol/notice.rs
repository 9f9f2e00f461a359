//! What the machines say to people, and why they end.

use std::fmt;
use std::time::Duration;

use super::record::{Epoch, Identity, Record};

/// Why the peer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// Nothing was heard for this long.
    Silence(Duration),
    /// Its heartbeats come, but its vCPU thread has work in hand and has made no progress for this long. Time in line for a CPU
    /// does not count, up to a bound.
    Wedged(Duration),
    /// The control connection closed: its process is gone.
    Death,
    /// The log's connection is over.
    LogOver,
    /// The ring refused our entry: the backup has fenced us.
    Fenced,
    /// Its end of the log breaks the rules.
    Unusable,
    /// Its heartbeats show a newer reign or configuration than ours.
    Newer,
    /// It does not keep up: for so long the guest stood for it nearly all of its time.
    Lagging(Duration),
    /// It hands the machine over, by its operator's will.
    HandedOver,
    /// It was joining, and did not say within this time that its copy is whole.
    NotReady(Duration),
    /// The arbiter could not be asked, without which no backup takes another one's place.
    NoArbiter,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silence(span) => write!(f, "nothing heard for {} ms", span.as_millis()),
            Self::Wedged(span) => {
                write!(
                    f,
                    "heartbeats come, but its vCPU has made no progress for {} ms",
                    span.as_millis()
                )
            }
            Self::Death => f.write_str("its control connection closed"),
            Self::LogOver => f.write_str("the log's connection is over"),
            Self::Fenced => f.write_str("it has fenced the log"),
            Self::Unusable => f.write_str("its end of the log breaks the rules"),
            Self::Newer => f.write_str("it is in a newer reign"),
            Self::Lagging(span) => write!(
                f,
                "it has not kept up for {} ms, and lag.policy is drop",
                span.as_millis()
            ),
            Self::HandedOver => f.write_str("it hands the machine over"),
            Self::NoArbiter => f.write_str("the arbiter is out of reach"),
            Self::NotReady(span) => write!(
                f,
                "its copy was not ready {} ms after the log began",
                span.as_millis()
            ),
        }
    }
}

/// Why a backup must never go live with what it has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Unfit {
    /// Replay differed from the log; the report names position, field, expected and found.
    Diverged(String),
    /// An entry at or below the committed watermark cannot be read.
    Corrupt(String),
    /// This side failed by itself: a device, its own disk, memory.
    Failed(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Diverged(report) => write!(f, "replay diverged: {report}"),
            Self::Corrupt(report) => write!(f, "the log is corrupt: {report}"),
            Self::Failed(report) => write!(f, "this backup failed: {report}"),
        }
    }
}

/// Why a process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The machine was powered off.
    PoweredOff,
    /// The backup has the machine now, as the operator wanted.
    HandedOver {
        /// Its reign.
        epoch: Epoch,
        /// The process.
        to: Identity,
    },
    /// Another process has the machine now.
    Replaced {
        /// Its reign.
        epoch: Epoch,
        /// The process.
        by: Identity,
    },
    /// The primary (or its heir) goes on without this backup, whose copy is out of date.
    NotEntitled {
        /// What the arbiter holds, when it was asked.
        found: Option<Record>,
    },
    /// Another backup protects the machine instead of this one, as the operator wanted.
    Relieved {
        /// The other one's process.
        by: Identity,
    },
    /// Nobody needs this backup, whose primary is well.
    Dismissed,
    /// This backup cannot go live.
    Unfit(Unfit),
}

impl Reason {
    /// Whether the process ended as it should: exit code 0.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        matches!(
            self,
            Self::PoweredOff | Self::HandedOver { .. } | Self::Relieved { .. } | Self::Dismissed
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the machine was powered off"),
            Self::HandedOver { epoch, to } => write!(
                f,
                "handed over: process {to} serves the machine (epoch {epoch}), and this one ends. Start it again as a \
                 backup to protect the machine"
            ),
            Self::Replaced { epoch, by } => write!(
                f,
                "process {by} has taken the machine over (epoch {epoch}); this copy is out of date and ends. \
                 Start it again as a backup to protect the machine"
            ),
            Self::NotEntitled { found } => {
                f.write_str(
                    "this backup is not entitled any more: the machine goes on without it",
                )?;
                if let Some(record) = found {
                    write!(f, " (the arbiter says: {record})")?;
                }
                f.write_str(". Start it again to protect the machine")
            }
            Self::Relieved { by } => write!(
                f,
                "relieved: process {by} protects the machine now, and this backup ends"
            ),
            Self::Dismissed => f.write_str(
                "dismissed: whoever looks after this host needs no backup here, and this one leaves its primary",
            ),
            Self::Unfit(unfit) => write!(
                f,
                "{unfit}. Start it again as a backup to protect the machine"
            ),
        }
    }
}

/// Something worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The peer has been quiet for longer than it should, not yet for long enough to act.
    Doubted(Duration),
    /// A doubted peer was heard again.
    HeardAgain,
    /// This process was not scheduled for so long; it counts the peer's silence afresh.
    Slept(Duration),
    /// The operator wants the backup to have the machine: the guest stops, and the backup is to claim this reign.
    HandingOver(Epoch),
    /// The backup that was told to take the machine has, or is lost: the arbiter is asked which.
    AskingWho(Evidence),
    /// The backup did not take the machine within this time; the guest runs on here.
    NotTaken(Duration),
    /// The backup was not told to take the machine: the guest runs on.
    NotSwitched(Evidence),
    /// The backup asks for the machine.
    Claiming {
        /// The reign it asks for.
        epoch: Epoch,
        /// Why.
        because: Evidence,
    },
    /// The arbiter gave the machine to this backup, whose outputs are still held.
    ClaimWon(Epoch),
    /// The backup is unfit; its fence has returned, so nothing more commits to it.
    Unfit(Unfit),
    /// The order to leave that this backup had got is not obeyed.
    NotDismissed,
    /// The backup serves the world now.
    Live(Epoch),
    /// The backup gives its claim back.
    Abandoned(Epoch),
    /// The primary lost its backup and asks the arbiter to go on alone. The guest waits for the answer.
    BackupLost(Evidence),
    /// The machine runs with nobody to take over.
    Unprotected(Record),
    /// A backup that joined is entitled now.
    Protected(Record),
    /// A new backup is entitled instead of the old one.
    Replaced(Record),
    /// The new backup that was to take the old one's place has not, and is given up.
    NotReplaced(Evidence),
    /// A backup that was joining is lost; the machine goes on without.
    JoinFailed(Evidence),
    /// The backup has claimed the machine; this primary keeps its state and waits for the outcome.
    Frozen(Record),
    /// The claim came to nothing; this primary asks to go on.
    Reclaiming(Record),
    /// The arbiter could not be asked. Nobody changes role; it is asked again.
    ArbiterUnreachable {
        /// How often in a row.
        attempts: u32,
        /// What it said.
        why: String,
    },
    /// The arbiter has been silent for so long.
    ArbiterSlow(Duration),
    /// The arbiter answers again.
    ArbiterBack,
    /// A candidate cannot ask the arbiter whether it is entitled; it keeps its copy and asks again.
    EntitlementUnknown {
        /// What the arbiter said.
        why: String,
    },
}

impl Notice {
    /// Whether an operator should see it at once: protection or service is affected.
    #[must_use]
    pub fn is_loud(&self) -> bool {
        !matches!(
            self,
            Self::Doubted(_)
                | Self::HeardAgain
                | Self::Slept(_)
                | Self::AskingWho(_)
                | Self::ArbiterBack
        )
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Doubted(span) => {
                write!(f, "the peer has been silent for {} ms", span.as_millis())
            }
            Self::HeardAgain => f.write_str("the peer is heard again"),
            Self::Slept(span) => write!(
                f,
                "this process was not scheduled for {} ms; it gives the peer a fresh chance",
                span.as_millis()
            ),
            Self::HandingOver(epoch) => {
                write!(
                    f,
                    "switch-over: the guest stops, and the backup is told to claim epoch {epoch}"
                )
            }
            Self::AskingWho(evidence) => write!(
                f,
                "the backup that is to take the machine has, or is lost ({evidence}): asking the arbiter"
            ),
            Self::NotTaken(span) => write!(
                f,
                "switch-over called off: the backup has not taken the machine within {} ms; it runs on here, protected as before",
                span.as_millis()
            ),
            Self::NotSwitched(evidence) => write!(
                f,
                "switch-over called off before the guest stood ({evidence}); it runs on here, protected as before"
            ),
            Self::Claiming {
                epoch,
                because: Evidence::HandedOver,
            } => write!(
                f,
                "the primary hands the machine over: claiming epoch {epoch}"
            ),
            Self::Claiming { epoch, because } => {
                write!(
                    f,
                    "the primary is given up ({because}): claiming epoch {epoch}"
                )
            }
            Self::ClaimWon(epoch) => write!(f, "claim won: taking over as epoch {epoch}"),
            Self::Unfit(unfit) => write!(
                f,
                "{unfit}; the log is fenced and this backup cannot go live"
            ),
            Self::NotDismissed => f.write_str(
                "this backup was told to leave, and does not: it takes the machine over, and nobody else may have it",
            ),
            Self::Live(epoch) => write!(
                f,
                "live: this process serves the machine in epoch {epoch}, UNPROTECTED"
            ),
            Self::Abandoned(epoch) => write!(
                f,
                "the claim of epoch {epoch} is given back: the primary may go on"
            ),
            Self::BackupLost(evidence) => write!(
                f,
                "the backup is lost ({evidence}); the guest waits while the arbiter is asked to go on without it"
            ),
            Self::Unprotected(record) => {
                write!(
                    f,
                    "UNPROTECTED: the machine runs without a backup ({record})"
                )
            }
            Self::Protected(record) => write!(f, "protected again: {record}"),
            Self::Replaced(record) => {
                write!(
                    f,
                    "a new backup protects the machine, and the old one is let go: {record}"
                )
            }
            Self::NotReplaced(evidence) => write!(
                f,
                "the new backup has not taken the old one's place ({evidence}); the machine runs on, protected as before"
            ),
            Self::JoinFailed(evidence) => write!(
                f,
                "UNPROTECTED still: the backup that was joining is lost ({evidence})"
            ),
            Self::Frozen(record) => {
                write!(
                    f,
                    "the backup has claimed the machine ({record}); frozen until the outcome is known"
                )
            }
            Self::Reclaiming(record) => {
                write!(
                    f,
                    "the backup's claim came to nothing ({record}); asking to go on"
                )
            }
            Self::ArbiterUnreachable { attempts, why } => write!(
                f,
                "the arbiter is out of reach (attempt {attempts}: {why}); no role changes until it answers"
            ),
            Self::ArbiterSlow(span) => {
                write!(
                    f,
                    "the arbiter has not answered for {} ms; no role changes until it does",
                    span.as_millis()
                )
            }
            Self::ArbiterBack => f.write_str("the arbiter answers again"),
            Self::EntitlementUnknown { why } => {
                write!(f, "whether this backup is entitled is not known: {why}")
            }
        }
    }
}
