//! A process of the model: a machine of the protocol, and what surrounds it.
#![forbid(unsafe_code)]

use std::time::Duration;

use hypervisor::protocol::detector::Limits;
use hypervisor::protocol::heartbeat::MachineId;
use hypervisor::protocol::{
    Answer, Backup, Candidate, Identity, Moment, Pair, Primary, Record, Timing,
};

/// When everything happens that is no timeout.
pub(super) const NOW: Moment = Moment(0);

/// When every timeout is over.
pub(super) const LATE: Moment = Moment(1 << 50);

/// Spans that are over at [`LATE`] and not before.
const SPAN: Duration = Duration::from_secs(1);

/// The guest's state: who made each of its steps.
pub(super) type Guest = Vec<u8>;

/// Whether a copy in state `have` has been through `what`.
pub(super) fn holds(have: &[u8], what: &[u8]) -> bool {
    have.starts_with(what)
}

/// Times that never come, that are over at once, or that are over when the model says so.
pub(super) fn timing() -> Timing {
    Timing {
        heartbeat: Duration::MAX,
        detector: Limits {
            floor: SPAN,
            ceiling: SPAN,
            nap: Duration::MAX,
            wedged: Duration::MAX,
            starved: Duration::MAX,
        },
        stale_claim: SPAN,
        reread: Duration::ZERO,
        retry_min: Duration::ZERO,
        retry_max: Duration::ZERO,
        arbiter_slow: Duration::MAX,
        ready_within: SPAN,
        switch_within: SPAN,
        word_within: SPAN,
        ask_every: Duration::ZERO,
        late_swap: SPAN,
    }
}

pub(super) fn identity(who: usize) -> Identity {
    Identity::from_bytes([who as u8 + 1; 16])
}

pub(super) fn pair(me: usize, peer: usize) -> Pair {
    Pair {
        machine: MachineId::of("model"),
        me: identity(me),
        peer: identity(peer),
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Primary(Primary),
    /// Waits to be taken.
    Listening,
    /// Gets a copy.
    Copying,
    Candidate(Candidate),
    Backup(Backup),
    Dead,
}

/// A fence or a drain that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Work {
    None,
    Asked,
    /// It has taken effect; the machine has not heard of it.
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) role: Role,
    pub(super) guest: Guest,
    pub(super) runs: bool,
    pub(super) shut: bool,
    /// Outputs that wait, with the number of their entry.
    pub(super) held: Vec<(u8, Guest)>,
    /// The log that it writes.
    pub(super) log: Option<usize>,
    /// The log that it follows.
    pub(super) source: Option<usize>,
    /// The other end of its control connection.
    pub(super) peer: Option<usize>,
    /// That connection is at its end, and it has not read so yet.
    pub(super) eof: bool,
    /// Its entry was refused, and the I/O thread has not heard so yet.
    pub(super) refused: bool,
    pub(super) fence: Work,
    pub(super) drain: Work,
    /// Replayed to the end.
    pub(super) drained: bool,
    /// It is to hand the machine over, and still lets outputs out.
    pub(super) handing: bool,
    /// Who is to take its backup's place, and whether its guest is to stand for that.
    pub(super) newcomer: Option<usize>,
    pub(super) stands: bool,
    /// The entry by which its primary hands the machine over was replayed, and its I/O thread has not heard so yet.
    pub(super) handed: bool,
    /// The word of its primary is on its way: the record that entitles it.
    pub(super) word: Option<Record>,
    /// It is on its way to its primary that it is ready.
    pub(super) ready: bool,
    /// A question is at the arbiter.
    pub(super) asks: bool,
    /// The arbiter's answer is on its way.
    pub(super) answer: Option<Answer>,
}

impl Process {
    pub(super) fn new(role: Role) -> Self {
        Self {
            role,
            guest: Vec::new(),
            runs: false,
            shut: false,
            held: Vec::new(),
            log: None,
            source: None,
            peer: None,
            eof: false,
            refused: false,
            fence: Work::None,
            drain: Work::None,
            drained: false,
            handing: false,
            newcomer: None,
            stands: false,
            handed: false,
            word: None,
            ready: false,
            asks: false,
            answer: None,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.role != Role::Dead
    }
}

/// A log into a backup's memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Log {
    pub(super) writer: usize,
    /// What is in the memory: how many entries, and the state that they lead to.
    pub(super) stored: (u8, Guest),
    /// On its way there, in order.
    pub(super) sent: Vec<Guest>,
    /// Commits on their way back: up to which entry.
    pub(super) committed: u8,
    /// The entry that hands the machine over, if it is on its way.
    pub(super) hands_over: Option<u8>,
    pub(super) fenced: bool,
}
