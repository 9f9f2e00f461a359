//! Two machines, a ring, a network and an arbiter, all in one seeded event queue.
//!
//! The guest is a counter: output *n* may be released once the world may know that the guest has reached *n*. What is
//! checked after every event: at most one machine could release a new output; whoever begins to serve holds all
//! that the world has seen; a machine that was replaced releases nothing its heir lacks; the record only
//! ever rises. At the end: after at most one fault, somebody serves.
//!
//! Faults are drawn from the seed, as is all timing. The planted [`Bug`]s are broken *surroundings* of the same
//! protocol code, and must be found.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

use super::super::backup::{self, Action as BackupDoes, Event as BackupSees};
use super::super::heartbeat::PairKey;
use super::super::primary::{self, Action as PrimaryDoes, Event as PrimarySees};
use super::*;

/// How a planted bug breaks the surroundings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// The fence reports success and does nothing.
    NoFence,
    /// The fence reports success before it takes effect, so the drain begins too early.
    DrainBeforeFence,
    /// The arbiter says yes to everybody.
    NoArbiter,
    /// A backup's swaps start from whatever the record is just then.
    ClaimFromRecordJustRead,
    /// The gate opens with go-live, not with `live`.
    EarlyRelease,
}

/// Microseconds since the simulation began.
type Micros = u64;

const MS: Micros = 1000;
const KEY: PairKey = PairKey::from_bytes([5; 16]);
const FAULTS_FROM: Micros = 20 * MS;
const FAULTS_UNTIL: Micros = 700 * MS;
const END: Micros = 2600 * MS;

/// splitmix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.next() % 100 < chance
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill(usize),
    Pause(usize, Micros),
    /// Datagrams from this side do not arrive.
    Mute(usize, Micros),
    /// The control connection breaks though both live.
    Reset,
    /// This side does not reach the arbiter.
    ArbiterCut(usize, Micros),
    Unfit,
    PowerOff,
}

#[derive(Clone, Debug)]
enum What {
    Tick(usize),
    GuestStep(usize),
    Release(usize, u64),
    Datagram(usize, Vec<u8>),
    LogTraffic(usize),
    PeerDied(usize),
    LogFenced,
    FenceTakes,
    Fenced,
    Drained,
    /// The arbiter carries out a request of this side. The flag: the answer was given already.
    Arbiter(usize, Request, bool),
    Answer(usize, Answer),
    Fault(Fault),
}

impl What {
    /// The side that must be scheduled for this to happen.
    fn needs(&self) -> Option<usize> {
        match *self {
            Self::Tick(side)
            | Self::GuestStep(side)
            | Self::Release(side, _)
            | Self::Datagram(side, _)
            | Self::LogTraffic(side)
            | Self::PeerDied(side)
            | Self::Answer(side, _) => Some(side),
            Self::LogFenced => Some(0),
            Self::FenceTakes | Self::Fenced | Self::Drained => Some(1),
            Self::Arbiter(..) | Self::Fault(_) => None,
        }
    }
}

/// Something in the queue: the earliest comes first, and of those the one put in first.
struct Due {
    when: Micros,
    serial: u64,
    what: What,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.when, other.serial).cmp(&(self.when, self.serial))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

enum Role {
    Primary(Primary),
    Backup(Backup),
}

struct Side {
    role: Role,
    alive: bool,
    paused_until: Micros,
    muted_until: Micros,
    cut_until: Micros,
    /// How far the guest is.
    guest: u64,
    /// The vCPU runs.
    runs: bool,
    /// Nothing leaves, committed or not.
    shut: bool,
    /// Outputs need no commit and no `live` any more.
    open: bool,
    held: Vec<u64>,
    in_flight: bool,
}

struct World {
    random: Random,
    bug: Bug,
    now: Micros,
    queue: BinaryHeap<Due>,
    serial: u64,
    sides: [Side; 2],
    record: Record,
    /// The newest entry in the backup's memory.
    ring: u64,
    fenced: bool,
    /// The newest output that left.
    seen: u64,
    loss: u64,
    /// How often the arbiter failed to answer.
    failures: u32,
    /// What was said, and how often.
    said: BTreeMap<&'static str, u32>,
    faults: Vec<Fault>,
    killed_at: Option<Micros>,
    served_at: Option<Micros>,
    trace: Option<Vec<String>>,
}

impl World {
    fn new(seed: u64, bug: Bug, tracing: bool) -> Self {
        let mut random = Random(seed);
        let ms = Duration::from_millis;
        let timing = Timing {
            stale_claim: ms(random.between(10, 400)),
            ..Timing::default()
        };
        let record = first_record();
        let side = |role, runs| Side {
            role,
            alive: true,
            paused_until: 0,
            muted_until: 0,
            cut_until: 0,
            guest: 0,
            runs,
            shut: false,
            open: false,
            held: Vec::new(),
            in_flight: false,
        };
        let primary = Primary::protected(pair(A, B), record, timing, Moment(0));
        let backup = Backup::new(pair(B, A), record, timing, Moment(0)).unwrap();
        let loss = if random.percent(50) {
            random.between(0, 20)
        } else {
            0
        };
        let mut world = Self {
            bug,
            now: 0,
            queue: BinaryHeap::new(),
            serial: 0,
            sides: [
                side(Role::Primary(primary), true),
                side(Role::Backup(backup), false),
            ],
            record,
            ring: 0,
            fenced: false,
            seen: 0,
            loss,
            failures: 0,
            said: BTreeMap::new(),
            faults: Vec::new(),
            killed_at: None,
            served_at: None,
            trace: tracing.then(Vec::new),
            random,
        };
        world.plan();
        world
    }

    fn plan(&mut self) {
        for side in 0..2 {
            self.after(0, What::Tick(side));
            self.after(0, What::GuestStep(side));
        }
        let mut when = 0;
        for _ in 0..self.random.between(1, 4) {
            let side = (self.random.next() % 2) as usize;
            let span = self.random.between(1, 600) * MS;
            let fault = match self.random.between(0, 10) {
                0 | 1 => Fault::Kill(side),
                2 | 3 => Fault::Pause(side, span),
                4 | 5 => Fault::Mute(side, span),
                6 => Fault::Reset,
                7 | 8 => Fault::ArbiterCut(side, span),
                9 => Fault::Unfit,
                _ => Fault::PowerOff,
            };
            self.faults.push(fault);
            // Half of them strike while the one before is still being dealt with.
            when = if when > 0 && self.random.percent(50) {
                when + self.random.between(0, 40 * MS)
            } else {
                self.random.between(FAULTS_FROM, FAULTS_UNTIL)
            };
            self.after(when, What::Fault(fault));
        }
    }

    fn after(&mut self, span: Micros, what: What) {
        self.at(self.now + span, what);
    }

    fn at(&mut self, when: Micros, what: What) {
        self.serial += 1;
        self.queue.push(Due {
            when,
            serial: self.serial,
            what,
        });
    }

    fn moment(&self) -> Moment {
        Moment(self.now * 1000)
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>8} us  {}", text()));
        }
    }

    /// Runs to the end. The error names what was violated.
    fn run(&mut self) -> Result<(), String> {
        while let Some(Due { when, what, .. }) = self.queue.pop() {
            self.now = when;
            if when > END {
                break;
            }
            if let Some(side) = what.needs() {
                let side = &self.sides[side];
                if !side.alive {
                    continue;
                }
                // It lies in a socket buffer, or on the stack of a stopped thread, until the thaw.
                if when < side.paused_until {
                    let thaw = side.paused_until;
                    self.at(thaw, what);
                    continue;
                }
            }
            self.happen(what)?;
            self.check()?;
        }
        self.check_end()
    }

    fn happen(&mut self, what: What) -> Result<(), String> {
        match what {
            What::Tick(side) => {
                let next = self.random.between(500, 3 * MS);
                self.after(next, What::Tick(side));
                let progress = Progress {
                    turns: self.sides[side].guest,
                    owes: self.sides[side].runs,
                    ..Progress::default()
                };
                self.both(
                    side,
                    PrimarySees::Tick(progress),
                    BackupSees::Tick(progress),
                )
            }
            What::GuestStep(side) => self.guest_step(side),
            What::Release(side, output) => {
                // Held in the gate when the machine froze; `RunUnprotected` or nothing lets it out.
                if !self.sides[side].shut {
                    return self.release(side, output);
                }
                self.sides[side].held.push(output);
                Ok(())
            }
            What::Datagram(side, bytes) => {
                let beat = Heartbeat::decode(&bytes, KEY).map_err(|stray| stray.to_string())?;
                self.both(
                    side,
                    PrimarySees::Heartbeat(beat),
                    BackupSees::Heartbeat(beat),
                )
            }
            What::LogTraffic(side) => {
                self.both(side, PrimarySees::LogTraffic, BackupSees::LogTraffic)
            }
            What::PeerDied(side) => self.both(side, PrimarySees::PeerDied, BackupSees::PeerDied),
            What::LogFenced => self.primary(0, PrimarySees::LogFenced),
            What::FenceTakes => {
                self.note(|| "the fence takes effect".to_owned());
                self.fenced = self.bug != Bug::NoFence;
                Ok(())
            }
            What::Fenced => self.backup(BackupSees::Fenced),
            What::Drained => {
                self.sides[1].guest = self.ring;
                // Not where a single fault must be survived: this would be a second one.
                if self.faults.len() > 1 && self.random.percent(10) {
                    let unfit = Unfit::Corrupt("simulated".to_owned());
                    return self.backup(BackupSees::Unfit(unfit));
                }
                self.backup(BackupSees::Drained)
            }
            What::Arbiter(side, request, answered) => self.arbiter(side, request, answered),
            What::Answer(side, answer) => {
                self.sides[side].in_flight = false;
                self.note(|| format!("{side} is answered {answer:?}"));
                let answers = (
                    PrimarySees::Arbiter(answer.clone()),
                    BackupSees::Arbiter(answer),
                );
                self.both(side, answers.0, answers.1)
            }
            What::Fault(fault) => self.fault(fault),
        }
    }

    fn guest_step(&mut self, index: usize) -> Result<(), String> {
        let next = self.random.between(500, 4 * MS);
        self.after(next, What::GuestStep(index));
        let side = &mut self.sides[index];
        if !side.runs {
            return Ok(());
        }
        let protected = matches!(&side.role, Role::Primary(_)) && !side.open;
        if protected && self.fenced {
            // The vCPU thread meets the fence, and waits.
            side.runs = false;
            side.guest += 1;
            side.held.push(side.guest);
            let delay = self.random.between(0, MS);
            self.after(delay, What::LogFenced);
            return Ok(());
        }
        side.guest += 1;
        let output = side.guest;
        if protected {
            self.ring = output;
            self.send(1, What::LogTraffic(1));
            self.send(0, What::LogTraffic(0));
            let delay = self.random.between(0, 2 * MS);
            self.after(delay, What::Release(index, output));
            Ok(())
        } else if side.open {
            self.release(index, output)
        } else {
            side.held.push(output);
            Ok(())
        }
    }

    fn release(&mut self, index: usize, output: u64) -> Result<(), String> {
        let other = &self.sides[1 - index];
        if other.alive && other.open && output > other.guest {
            return Err(format!(
                "{index} released {output}; the other serves and lacks it"
            ));
        }
        self.seen = self.seen.max(output);
        Ok(())
    }

    /// Something on its way to `to`, unless the network loses it.
    fn send(&mut self, to: usize, what: What) {
        if self.now < self.sides[1 - to].muted_until || self.random.percent(self.loss) {
            return;
        }
        let delay = self.random.between(50, 3 * MS);
        if self.random.percent(2) {
            self.after(delay * 3, what.clone());
        }
        self.after(delay, what);
    }

    fn ask(&mut self, side: usize, request: Request) -> Result<(), String> {
        self.note(|| format!("{side} asks {request:?}"));
        if std::mem::replace(&mut self.sides[side].in_flight, true) {
            return Err(format!(
                "{side} asks a second question before the first is answered"
            ));
        }
        let there = self.random.between(100, 8 * MS);
        let down = self.now < self.sides[side].cut_until;
        if !down && !self.random.percent(5) {
            self.after(there, What::Arbiter(side, request, false));
            return Ok(());
        }
        // It fails: never sent, or carried out and the answer lost, or carried out only later.
        self.failures += 1;
        let sent = self.random.percent(if down { 20 } else { 70 });
        if sent {
            let late = if self.random.percent(50) { 60 * MS } else { 0 };
            self.after(there + late, What::Arbiter(side, request, true));
        }
        let may_have_landed = sent || self.random.percent(50);
        let wait = there + self.random.between(0, 20 * MS);
        let answer = Answer::Failed {
            may_have_landed,
            why: "simulated".to_owned(),
        };
        self.after(wait, What::Answer(side, answer));
        Ok(())
    }

    fn arbiter(&mut self, side: usize, request: Request, answered: bool) -> Result<(), String> {
        let answer = match request {
            Request::Read => Answer::Read(Some(self.record)),
            Request::Swap { to, .. } if self.bug == Bug::NoArbiter => {
                self.record = to;
                Answer::Swapped
            }
            Request::Swap { to, .. } if self.record == to => Answer::Swapped,
            Request::Swap { from, to } => {
                let fresh = self.bug == Bug::ClaimFromRecordJustRead && side == 1;
                if self.record == from || fresh {
                    self.swap(to, fresh)?;
                    Answer::Swapped
                } else {
                    Answer::Lost(Some(self.record))
                }
            }
        };
        if !answered {
            let back = self.random.between(100, 8 * MS);
            self.after(back, What::Answer(side, answer));
        }
        Ok(())
    }

    fn swap(&mut self, to: Record, fresh: bool) -> Result<(), String> {
        let rank = |r: &Record| (r.epoch, r.configuration, r.state);
        if rank(&to) <= rank(&self.record) && !fresh {
            return Err(format!("the record fell from {} to {to}", self.record));
        }
        self.note(|| format!("the record is {to}"));
        self.record = to;
        Ok(())
    }

    fn fault(&mut self, fault: Fault) -> Result<(), String> {
        self.note(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::Kill(side) => {
                if side == 0 && self.sides[0].alive {
                    self.killed_at = Some(self.now);
                }
                self.end(side);
            }
            Fault::Pause(side, span) => self.sides[side].paused_until = self.now + span,
            Fault::Mute(side, span) => self.sides[side].muted_until = self.now + span,
            Fault::Reset => (0..2).for_each(|side| self.hang_up(side)),
            Fault::ArbiterCut(side, span) => self.sides[side].cut_until = self.now + span,
            Fault::Unfit => {
                let paused = self.now < self.sides[1].paused_until;
                if self.sides[1].alive && !paused && matches!(self.sides[1].role, Role::Backup(_)) {
                    let unfit = Unfit::Diverged("simulated".to_owned());
                    return self.backup(BackupSees::Unfit(unfit));
                }
            }
            Fault::PowerOff => {
                let serves =
                    |side: &Side| side.alive && side.runs && matches!(side.role, Role::Primary(_));
                if let Some(side) = self.sides.iter().position(serves) {
                    return self.primary(side, PrimarySees::End);
                }
            }
        }
        Ok(())
    }

    /// The process is no more; the other side's kernel hears of it.
    fn end(&mut self, side: usize) {
        if std::mem::replace(&mut self.sides[side].alive, false) {
            self.hang_up(1 - side);
        }
    }

    fn hang_up(&mut self, to: usize) {
        let delay = self.random.between(0, 5 * MS);
        self.after(delay, What::PeerDied(to));
    }

    fn both(&mut self, side: usize, p: PrimarySees, b: BackupSees) -> Result<(), String> {
        match self.sides[side].role {
            Role::Primary(_) => self.primary(side, p),
            Role::Backup(_) => self.backup(b),
        }
    }

    fn primary(&mut self, index: usize, event: primary::Event) -> Result<(), String> {
        let (now, mut actions) = (self.moment(), Vec::new());
        let Role::Primary(machine) = &mut self.sides[index].role else {
            return Ok(());
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                PrimaryDoes::SendHeartbeat(beat) => {
                    self.send(
                        1 - index,
                        What::Datagram(1 - index, beat.encode(KEY).to_vec()),
                    );
                }
                PrimaryDoes::Ask(request) => self.ask(index, request)?,
                PrimaryDoes::Freeze => {
                    let side = &mut self.sides[index];
                    (side.runs, side.open, side.shut) = (false, false, true);
                }
                // Nobody joins in this world.
                PrimaryDoes::Protect(_) => return Err("protected out of nothing".to_owned()),
                PrimaryDoes::RunUnprotected(_) => {
                    self.hang_up(1 - index);
                    self.serve(index)?;
                }
                PrimaryDoes::Say(notice) => self.say(index, &notice),
                PrimaryDoes::Die(reason) => {
                    self.note(|| format!("{index} dies: {reason}"));
                    self.end(index);
                }
            }
        }
        Ok(())
    }

    fn backup(&mut self, event: backup::Event) -> Result<(), String> {
        let (now, mut actions) = (self.moment(), Vec::new());
        let Role::Backup(machine) = &mut self.sides[1].role else {
            return Ok(());
        };
        machine.handle(now, event, &mut actions);
        for action in actions {
            match action {
                BackupDoes::SendHeartbeat(beat) => {
                    self.send(0, What::Datagram(0, beat.encode(KEY).to_vec()));
                }
                BackupDoes::Ask(request) => self.ask(1, request)?,
                BackupDoes::Fence => {
                    let slow = self.faults.len() > 1 && self.random.percent(30);
                    let takes = self.random.between(0, if slow { 40 * MS } else { 3 * MS });
                    self.after(takes, What::FenceTakes);
                    let lies = self.bug == Bug::DrainBeforeFence;
                    let returns = if lies {
                        0
                    } else {
                        takes + self.random.between(0, MS)
                    };
                    self.after(returns, What::Fenced);
                }
                BackupDoes::Drain => {
                    let slow = self.faults.len() > 1 && self.random.percent(20);
                    let span = self.random.between(0, if slow { 100 * MS } else { 2 * MS });
                    self.after(span, What::Drained);
                }
                BackupDoes::GoLive => {
                    self.sides[1].runs = true;
                    if self.bug == Bug::EarlyRelease {
                        self.serve(1)?;
                    }
                }
                BackupDoes::OpenGate => self.open_gate()?,
                BackupDoes::Say(notice) => self.say(1, &notice),
                BackupDoes::Die(reason) => {
                    self.note(|| format!("1 dies: {reason}"));
                    self.end(1);
                }
            }
        }
        Ok(())
    }

    fn say(&mut self, side: usize, notice: &Notice) {
        let kind = match notice {
            Notice::Live(_) => "live",
            Notice::Abandoned(_) => "abandoned",
            Notice::Unprotected(_) => "unprotected",
            Notice::Frozen(_) => "frozen",
            Notice::Reclaiming(_) => "reclaiming",
            Notice::HeardAgain => "heard again",
            _ => "other",
        };
        *self.said.entry(kind).or_default() += 1;
        self.note(|| format!("{side} says: {notice}"));
    }

    fn open_gate(&mut self) -> Result<(), String> {
        let now = self.moment();
        self.serve(1)?;
        let placeholder = Role::Primary(Primary::unprotected(
            A,
            Record::cold_start(None, A, None),
            Timing::default(),
            now,
        ));
        let Role::Backup(machine) = std::mem::replace(&mut self.sides[1].role, placeholder) else {
            return Err("a gate was opened twice".to_owned());
        };
        let primary = machine
            .into_primary(now)
            .ok_or("the gate opened, but not for a primary")?;
        self.sides[1].role = Role::Primary(primary);
        Ok(())
    }

    /// The side serves the world from here, with nobody behind it.
    fn serve(&mut self, index: usize) -> Result<(), String> {
        self.note(|| format!("{index} serves"));
        let side = &mut self.sides[index];
        if side.guest < self.seen {
            return Err(format!(
                "{index} serves from output {}; the world has seen {}",
                side.guest, self.seen
            ));
        }
        (side.runs, side.open, side.shut) = (true, true, false);
        self.served_at = Some(self.now);
        for output in std::mem::take(&mut side.held) {
            self.release(index, output)?;
        }
        Ok(())
    }

    /// Whether the side could send the world something new, if it were scheduled now.
    fn can_release(&self, index: usize) -> bool {
        let side = &self.sides[index];
        let commits = index == 0 && !self.fenced;
        side.alive && side.runs && (side.open || commits)
    }

    fn check(&self) -> Result<(), String> {
        if self.can_release(0) && self.can_release(1) && self.sides[1].open {
            return Err("two machines can release output".to_owned());
        }
        Ok(())
    }

    /// What must have come of it, when the last fault is long over.
    fn check_end(&self) -> Result<(), String> {
        let serving = (0..2).filter(|&side| self.can_release(side)).count();
        let off = self.record.state == State::Ended;
        let idle = self.sides.iter().all(|side| !side.alive);
        if off && !idle {
            return Err("the machine was powered off, and a process is left".to_owned());
        }
        if self.faults.len() == 1 && !off && serving != 1 {
            return Err(format!("{serving} machines serve after a single fault"));
        }
        // Killed with the control connection telling: claim, fence, drain and `live`, at the spans drawn above.
        if self.faults == [Fault::Kill(0)] {
            let bound = if self.failures > 0 { 300 * MS } else { 45 * MS };
            let took = match (self.killed_at, self.served_at) {
                (Some(killed), Some(served)) => served.saturating_sub(killed),
                _ => return Err("the primary was killed and nobody took over".to_owned()),
            };
            if took > bound {
                return Err(format!("the take-over took {took} us"));
            }
        }
        Ok(())
    }
}

/// Runs one seed; on a violation, runs it again to tell the story.
fn run(seed: u64, bug: Bug) -> Result<World, String> {
    let mut world = World::new(seed, bug, false);
    let Err(violation) = world.run() else {
        return Ok(world);
    };
    let mut again = World::new(seed, bug, true);
    let repeated = again.run();
    assert_eq!(
        repeated,
        Err(violation.clone()),
        "seed {seed} does not repeat itself"
    );
    let trace = again.trace.unwrap_or_default();
    let tail = &trace[trace.len().saturating_sub(60)..];
    Err(format!(
        "seed {seed}, {bug:?}: {violation}\n{}",
        tail.join("\n")
    ))
}

#[test]
fn thousands_of_seeds_hold_every_promise_and_meet_every_situation() {
    let mut said = BTreeMap::<&str, u32>::new();
    let (mut outputs, mut ended) = (0, 0);
    for seed in 0..3000 {
        let world = run(seed, Bug::None).unwrap_or_else(|violation| panic!("{violation}"));
        world
            .said
            .iter()
            .for_each(|(kind, times)| *said.entry(kind).or_default() += times);
        outputs += world.seen;
        ended += u32::from(world.record.state == State::Ended);
    }
    println!("{outputs} outputs, {ended} powered off, {said:?}");
    assert!(outputs > 1_000_000, "{outputs}");
    assert!(ended > 100, "{ended}");
    for kind in [
        "live",
        "abandoned",
        "unprotected",
        "frozen",
        "reclaiming",
        "heard again",
    ] {
        assert!(
            said.get(kind).is_some_and(|times| *times >= 20),
            "{kind}: {said:?}"
        );
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in [
        Bug::NoFence,
        Bug::DrainBeforeFence,
        Bug::NoArbiter,
        Bug::ClaimFromRecordJustRead,
        Bug::EarlyRelease,
    ] {
        let found = (0..1000).find_map(|seed| run(seed, bug).err());
        let story = found.unwrap_or_else(|| panic!("{bug:?} was not found: the harness is wrong"));
        println!("{}", story.lines().next().unwrap_or_default());
    }
}
