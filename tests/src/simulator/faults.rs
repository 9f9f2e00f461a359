//! What goes wrong, and when: all of it drawn from the seed.
#![forbid(unsafe_code)]

use super::{MS, Micros};
use crate::harness::random::Random;

/// Hosts, each with room for one process of the machine.
pub(super) const HOSTS: usize = 3;

/// The arbiter's place in the network.
pub(super) const ARBITER: usize = HOSTS;

/// Whom a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The owner of the arbiter's record.
    Owner,
    /// The other side of the pair: the entitled backup, or one that joins or waits.
    Other,
    /// A backup that is to take that one's place.
    Newcomer,
    /// Whoever is there.
    Host(usize),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process dies; its peers' kernels hear of it.
    Kill(Target),
    /// The host vanishes; nobody hears of it.
    Lose(Target),
    /// The process stands still.
    Freeze(Target, Micros),
    /// What it sends does not get through.
    Mute(Target, Micros),
    /// What is sent to it does not get through.
    Deafen(Target, Micros),
    /// It is cut off, from the arbiter as well.
    Isolate(Target, Micros),
    /// Owner and other side do not reach each other.
    Part(Micros),
    /// A control connection breaks, though both ends live.
    Reset,
    /// It does not reach the arbiter.
    NoArbiter(Target, Micros),
    /// Nobody does.
    ArbiterDown(Micros),
    /// The arbiter takes twenty times as long.
    ArbiterSlow(Micros),
    /// The backup's copy turns out to be of no use.
    Unfit,
    /// The operator ends the machine.
    PowerOff,
    /// The operator wants the backup to have the machine: no fault, but the middle of it is a good time for one.
    Switch,
    /// The operator wants another backup; the same.
    Replace,
}

impl Fault {
    /// How long it lasts.
    pub(super) fn span(&self) -> Micros {
        match *self {
            Self::Freeze(_, span)
            | Self::Mute(_, span)
            | Self::Deafen(_, span)
            | Self::Isolate(_, span)
            | Self::Part(span)
            | Self::NoArbiter(_, span)
            | Self::ArbiterDown(span)
            | Self::ArbiterSlow(span) => span,
            Self::Kill(_)
            | Self::Lose(_)
            | Self::Reset
            | Self::Unfit
            | Self::PowerOff
            | Self::Switch
            | Self::Replace => 0,
        }
    }

    /// The same, at somebody else, where it strikes somebody.
    fn at(self, target: Target) -> Self {
        match self {
            Self::Kill(_) => Self::Kill(target),
            Self::Lose(_) => Self::Lose(target),
            Self::Freeze(_, span) => Self::Freeze(target, span),
            Self::Mute(_, span) => Self::Mute(target, span),
            Self::Deafen(_, span) => Self::Deafen(target, span),
            Self::Isolate(_, span) => Self::Isolate(target, span),
            Self::NoArbiter(_, span) => Self::NoArbiter(target, span),
            other => other,
        }
    }

    /// Whether somebody does not reach the arbiter by it, or not soon.
    pub(super) fn is_of_the_arbiter(self) -> bool {
        matches!(
            self,
            Self::Isolate(..) | Self::NoArbiter(..) | Self::ArbiterDown(_) | Self::ArbiterSlow(_)
        )
    }

    /// Whether it needs a network between the two sides.
    fn needs_network(&self) -> bool {
        matches!(
            self,
            Self::Lose(_) | Self::Mute(..) | Self::Deafen(..) | Self::Isolate(..) | Self::Part(_)
        )
    }
}

/// A moment worth striking at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// A guest begins to log to a backup that joins.
    Cut,
    /// The backup has the whole copy.
    CopyWhole,
    /// The primary hears so, and asks the arbiter.
    Entitling,
    /// The arbiter's record has changed to `live` with somebody entitled.
    Entitled,
    /// To `claimed`.
    Claimed,
    /// To `live` after a claim.
    Live,
    /// To `live` with nobody entitled.
    Detached,
    /// A backup asks for the machine.
    Claiming,
    /// A primary asks to go on alone.
    Detaching,
    /// A fence has taken effect.
    Fenced,
    /// The entry that hands the machine over was posted.
    HandedOver,
    /// A guest stands for a newcomer.
    Standing,
    /// The newcomer has taken the old backup's place, as its primary knows.
    Replaced,
}

const POINTS: [Point; 10] = [
    Point::Cut,
    Point::CopyWhole,
    Point::Entitling,
    Point::Entitled,
    Point::Claimed,
    Point::Live,
    Point::Detached,
    Point::Claiming,
    Point::Detaching,
    Point::Fenced,
];

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At this time.
    At(Micros),
    /// So long after this next happens, once this time has come.
    After(Point, Micros, Micros),
}

/// Everything that will go wrong.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) faults: Vec<(When, Fault)>,
    /// When the last of them begins at the latest.
    pub(super) until: Micros,
}

impl Plan {
    /// Whether one thing goes wrong at most. A replacement is no fault.
    pub(super) fn is_single(&self) -> bool {
        let faults = self.faults.iter();
        faults.filter(|(_, it)| *it != Fault::Replace).count() <= 1
    }
}

fn target(random: &mut Random) -> Target {
    match random.below(7) {
        0..3 => Target::Owner,
        3..6 => Target::Other,
        _ => Target::Host(random.below(HOSTS as u64) as usize),
    }
}

fn fault(random: &mut Random) -> Fault {
    let span = (1 + random.below(600)) * MS;
    let target = target(random);
    match random.below(22) {
        0..4 => Fault::Kill(target),
        4..6 => Fault::Lose(target),
        6..9 => Fault::Freeze(target, span),
        9 | 10 => Fault::Mute(target, span),
        11 => Fault::Deafen(target, span),
        12 => Fault::Isolate(target, span),
        13 | 14 => Fault::Part(span),
        15 => Fault::Reset,
        16 => Fault::NoArbiter(target, span),
        17 => Fault::ArbiterDown(span),
        18 => Fault::ArbiterSlow(span),
        19 | 20 => Fault::Unfit,
        _ => Fault::PowerOff,
    }
}

/// Draws a plan. On one host (`networked` is false) there is no network between the two sides.
pub(super) fn plan(random: &mut Random, networked: bool) -> Plan {
    let count = if random.below(10) < 3 {
        1
    } else {
        2 + random.below(9)
    };
    let mut faults = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let fault = loop {
            let fault = fault(random);
            if networked || !fault.needs_network() {
                break fault;
            }
        };
        // Half of them strike while the one before is still being dealt with.
        at += match random.below(2) {
            0 => random.below(40 * MS),
            _ => 150 * MS + random.below(450 * MS),
        };
        let when = if random.below(2) == 0 {
            When::At(at + 60 * MS)
        } else {
            let point = POINTS[random.below(POINTS.len() as u64) as usize];
            When::After(point, random.below(8 * MS), at)
        };
        faults.push((when, fault));
    }
    Plan {
        faults,
        until: at + 700 * MS,
    }
}

/// Adds switch-overs to the plans of a third of all seeds, drawn apart: the other seeds' plans are what they were before there were
/// switch-overs, those that once failed among them.
pub(super) fn add_switches(plan: &mut Plan, seed: u64) {
    if seed % 3 != 1 {
        return;
    }
    let mut random = Random::new(!seed);
    if plan.faults.len() == 1 && random.below(2) == 0 {
        // Nothing else happens.
        let at = 60 * MS + random.below(200 * MS);
        plan.faults = vec![(When::At(at), Fault::Switch)];
        return;
    }
    for number in 0..plan.faults.len() {
        if random.below(2) == 0 {
            continue;
        }
        let before = match plan.faults[number].0 {
            When::At(at) | When::After(_, _, at) => at.saturating_sub(random.below(20 * MS)),
        };
        plan.faults.push((When::At(before), Fault::Switch));
        let point = [
            Point::HandedOver,
            Point::Claiming,
            Point::Claimed,
            Point::Fenced,
            Point::Live,
        ][random.below(5) as usize];
        if random.below(2) == 0 {
            // In the middle of it.
            plan.faults[number].0 = When::After(point, random.below(8 * MS), before);
        }
    }
}

/// Adds replacements of the backup to the plans of some seeds, drawn apart as well; to some of those that have switch-overs, too.
pub(super) fn add_replacements(plan: &mut Plan, seed: u64) {
    if seed % 3 != 2 && seed % 12 != 1 {
        return;
    }
    let mut random = Random::new(seed.rotate_left(32) ^ 0x7265_706c);
    for number in 0..plan.faults.len() {
        if random.below(4) == 0 {
            continue;
        }
        let (when, fault) = plan.faults[number];
        let before = match when {
            // The copy takes up to 41 ms.
            When::At(at) | When::After(_, _, at) => at.max(60 * MS) - random.below(50 * MS),
        };
        plan.faults.push((When::At(before), Fault::Replace));
        if random.below(4) > 0 {
            // In the middle of it.
            let point = [
                Point::CopyWhole,
                Point::Standing,
                Point::Entitling,
                Point::Entitled,
                Point::Replaced,
            ][random.below(5) as usize];
            plan.faults[number].0 = When::After(point, random.below(8 * MS), before);
        }
        if random.below(3) == 0 {
            plan.faults[number].1 = fault.at(Target::Newcomer);
        }
    }
    if plan.faults.len() == 2 && random.below(4) == 0 {
        // Nothing else happens.
        plan.faults.remove(0);
    }
}
