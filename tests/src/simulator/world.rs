//! The event queue, the network, and the faults.
#![forbid(unsafe_code)]

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

use hypervisor::protocol::heartbeat::{MachineId, PairKey};
use hypervisor::protocol::{Identity, Record, Timing, Unfit};

use super::arbiter::{Asked, Asker, Ballot};
use super::faults::{self, ARBITER, Fault, HOSTS, Plan, Point, Target, When};
use super::history::{History, Node};
use super::joining::{Attempt, Step};
use super::log::{Carrier, Log};
use super::process::{Input, Process, Role};
use super::{MS, Micros, Plant, Tally};
use crate::harness::random::Random;

/// The key of every pair: who is meant is told by identities, too.
pub(super) const KEY: PairKey = PairKey::from_bytes([5; 16]);

/// After the last fault's end the machine has so long to be served and protected again. What may lie in between, one after the other:
/// a claim that is too old (0.4 s), the longest waits for an arbiter (0.5 s, twice), a candidate that gives up (0.6 s), an operator's
/// look at it (0.4 s), a start, and a join that fails and is tried again (1 s).
const SETTLE: Micros = 5000 * MS;

/// Between two looks whether all is well again.
const LOOK: Micros = 20 * MS;

pub(super) fn machine() -> MachineId {
    MachineId::of("sim")
}

/// Something that will happen.
pub(super) enum What {
    /// A process looks at what has come.
    Round(usize),
    /// Its guest makes a step.
    Guest(usize),
    /// Something reaches it.
    Told(usize, Input),
    Arrives(usize, u64, Node),
    Stored(usize, u64, Node),
    Committed(usize, u64),
    Refused(usize),
    FenceTakes(usize, usize),
    Drains(usize),
    /// The arbiter carries out what a process asked; false: nobody hears the answer.
    Decides(Asker, Asked, bool),
    /// A step of a join.
    Join(usize, Step),
    /// A primary's recruiter looks around.
    Looks(usize),
    /// The host's agent starts a backup.
    Restarts(usize),
    /// The operator looks.
    Operator,
    Strikes(usize),
    /// Whether all is well.
    Look,
}

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

/// A control connection. Closed at one end, the other hears of it.
pub(super) struct Connection {
    pub(super) ends: [usize; 2],
    pub(super) open: bool,
    /// When the newest that was sent to either end arrives there.
    newest: [Micros; 2],
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) plant: Option<Plant>,
    pub(super) timing: Timing,
    pub(super) carrier: Carrier,
    pub(super) plan: Plan,
    armed: Vec<bool>,
    pub(super) now: Micros,
    queue: BinaryHeap<Due>,
    serial: u64,
    pub(super) processes: Vec<Process>,
    pub(super) logs: Vec<Log>,
    pub(super) connections: Vec<Connection>,
    pub(super) attempts: Vec<Attempt>,
    pub(super) history: History,
    pub(super) ballot: Ballot,
    /// Until when nothing gets from one place to another.
    cuts: [[Micros; HOSTS + 1]; HOSTS + 1],
    /// A datagram in a hundred that gets lost.
    loss: u64,
    /// Since when nobody has a stake in the machine.
    pub(super) abandoned_since: Option<Micros>,
    /// What the world has seen of the present life, and when something new came last.
    pub(super) seen: Option<Node>,
    pub(super) seen_at: Option<Micros>,
    /// The only fault struck a machine that was protected.
    pub(super) bounded: bool,
    /// Something has gone wrong.
    pub(super) struck: bool,
    /// It struck while a newcomer was taking the backup's place: how much longer that may take.
    pub(super) allowance: Micros,
    /// How often the machine was started from nothing.
    pub(super) lives: u32,
    pub(super) tally: Tally,
    over: bool,
    trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(seed: u64, plant: Option<Plant>, tracing: bool) -> Self {
        let mut random = Random::new(seed);
        let ms = Duration::from_millis;
        let mut some = |least: u64, most: u64| ms(least + random.below(most - least + 1));
        let timing = Timing {
            stale_claim: some(10, 400),
            retry_max: some(50, 500),
            ready_within: some(150, 400),
            word_within: some(40, 200),
            ask_every: some(5, 50),
            // Longer than the arbiter can take: an answer that is 60 ms late, twenty times slower than usual.
            late_swap: some(250, 400),
            // Shorter than a switch-over takes, and longer.
            switch_within: ms(10 + seed % 191),
            ..Timing::default()
        };
        let carrier = match random.below(3) {
            0 => Carrier::Shm,
            1 => Carrier::Nic,
            _ => Carrier::Ack,
        };
        let mut plan = faults::plan(&mut random, carrier != Carrier::Shm);
        faults::add_switches(&mut plan, seed);
        faults::add_replacements(&mut plan, seed);
        // Lost datagrams make mistakes likelier, which together with a fault are more than one.
        let loss = match random.below(2) {
            1 if !plan.is_single() => random.below(15),
            _ => 0,
        };
        let mut world = Self {
            plant,
            timing,
            carrier,
            armed: vec![false; plan.faults.len()],
            plan,
            now: 0,
            queue: BinaryHeap::new(),
            serial: 0,
            processes: Vec::new(),
            logs: Vec::new(),
            connections: Vec::new(),
            attempts: Vec::new(),
            history: History::default(),
            ballot: Ballot::default(),
            cuts: Default::default(),
            loss,
            abandoned_since: None,
            seen: None,
            seen_at: None,
            bounded: false,
            struck: false,
            allowance: 0,
            lives: 0,
            tally: Tally {
                seeds: 1,
                ..Tally::default()
            },
            over: false,
            trace: tracing.then(Vec::new),
            random,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.note(|world| {
            format!(
                "log by {:?}, {} in 100 datagrams lost, {:?}",
                world.carrier, world.loss, world.plan.faults
            )
        });
        for number in 0..self.plan.faults.len() {
            match self.plan.faults[number].0 {
                When::At(when) => self.at(when, What::Strikes(number)),
                When::After(..) => {
                    self.armed[number] = true;
                    // If its moment does not come.
                    self.at(self.plan.until, What::Strikes(number));
                }
            }
        }
        let alone = self.random.below(3) == 0;
        self.start_primary(0, false, alone);
        for host in 1..HOSTS {
            self.start_backup(host);
        }
        self.after(100 * MS, What::Operator);
        self.at(self.plan.until, What::Look);
    }

    pub(super) fn into_tally(self) -> Tally {
        self.tally
    }

    pub(super) fn into_story(self) -> Vec<String> {
        self.trace.unwrap_or_default()
    }

    pub(super) fn note(&mut self, text: impl FnOnce(&Self) -> String) {
        if self.trace.is_none() {
            return;
        }
        let line = format!("{:>8.3} ms  {}", self.now as f64 / 1000.0, text(self));
        if let Some(trace) = &mut self.trace {
            trace.push(line);
        }
    }

    /// Counts something that happened.
    pub(super) fn count(&mut self, what: &'static str) {
        *self.tally.said.entry(what).or_default() += 1;
    }

    pub(super) fn after(&mut self, span: Micros, what: What) {
        self.at(self.now + span, what);
    }

    pub(super) fn at(&mut self, when: Micros, what: What) {
        self.serial += 1;
        self.queue.push(Due {
            when: when.max(self.now),
            serial: self.serial,
            what,
        });
    }

    /// Runs to the end. The error names what was violated.
    pub(super) fn run(&mut self) -> Result<(), String> {
        while let Some(Due { when, what, .. }) = self.queue.pop() {
            self.now = when;
            if self.over {
                break;
            }
            let actor = match &what {
                What::Guest(who)
                | What::Looks(who)
                | What::Drains(who)
                | What::FenceTakes(who, _) => Some(*who),
                What::Told(who, Input::Fenced | Input::Drained) => Some(*who),
                _ => None,
            };
            if let Some(who) = actor {
                let process = &self.processes[who];
                if !process.alive {
                    continue;
                }
                if when < process.frozen_until {
                    let thaw = process.frozen_until;
                    self.at(thaw, what);
                    continue;
                }
            }
            self.tally.events += 1;
            self.happens(what)?;
            self.check()?;
        }
        Ok(())
    }

    fn happens(&mut self, what: What) -> Result<(), String> {
        match what {
            What::Round(who) => return self.round(who),
            What::Guest(who) => return self.guest_step(who),
            What::Told(who, input) => self.deliver(who, input),
            What::Arrives(log, seq, node) => self.arrives(log, seq, node),
            What::Stored(log, seq, node) => {
                if self.processes[self.logs[log].reader].alive {
                    self.store(log, seq, node);
                }
            }
            What::Committed(log, seq) => return self.committed(log, seq),
            What::Refused(log) => self.refused(self.logs[log].writer, log),
            What::FenceTakes(who, log) => self.fence_takes(who, log),
            What::Drains(who) => self.drains(who),
            What::Decides(asker, asked, answered) => return self.decide(asker, asked, answered),
            What::Join(attempt, step) => self.join(attempt, step),
            What::Looks(who) => self.look_around(who),
            What::Restarts(host) => self.start_backup(host),
            What::Operator => self.operate(),
            What::Strikes(number) => self.strike(number),
            What::Look => return self.look(),
        }
        Ok(())
    }

    /// Is all well? Then it is over; otherwise there is some time left, or none.
    fn look(&mut self) -> Result<(), String> {
        match self.trouble() {
            _ if !self.is_calm() => self.at(self.plan.until, What::Look),
            None => self.over = true,
            Some(trouble) if self.now > self.plan.until + SETTLE => return Err(trouble),
            Some(_) => self.after(LOOK, What::Look),
        }
        Ok(())
    }

    /// Whether faults still last.
    pub(super) fn is_calm(&self) -> bool {
        self.now >= self.plan.until
    }

    pub(super) fn is_single(&self) -> bool {
        self.plan.is_single()
    }

    pub(super) fn host(&self, who: usize) -> usize {
        self.processes[who].host
    }

    fn cut(&self, from: usize, to: usize) -> Micros {
        self.cuts[from][to]
    }

    pub(super) fn is_cut(&self, from: usize, to: usize) -> bool {
        self.now < self.cut(from, to)
    }

    /// When something sent over a stream arrives: after a cut, and never before what was sent earlier.
    pub(super) fn stream(&mut self, from: usize, to: usize, before: Micros) -> Micros {
        let span = match self.carrier {
            Carrier::Shm => 10 + self.random.below(100),
            _ => 50 + self.random.below(1500),
        };
        (self.now.max(self.cut(from, to)) + span).max(before)
    }

    /// Something on its way that may get lost, come late, come twice.
    pub(super) fn datagram(&mut self, from: usize, to: usize, bytes: &[u8]) {
        let (here, there) = (self.host(from), self.host(to));
        if self.is_cut(here, there) || self.random.below(100) < self.loss {
            return;
        }
        let delay = 50 + self.random.below(3 * MS);
        let mut send = |delay| {
            let input = Input::Datagram(bytes.to_vec());
            self.after(delay, What::Told(to, input));
        };
        send(delay);
        if delay.is_multiple_of(50) {
            send(delay * 4);
        }
    }

    /// Something has come; the process looks at it soon, if it is not frozen.
    pub(super) fn deliver(&mut self, who: usize, input: Input) {
        if !self.processes[who].alive {
            return;
        }
        self.processes[who].inbox.push_back(input);
        let late = match self.random.below(50) {
            0 => self.random.below(4 * MS),
            _ => self.random.below(100),
        };
        self.wake(who, self.now + late);
    }

    /// A round at this time, unless one comes earlier.
    pub(super) fn wake(&mut self, who: usize, when: Micros) {
        let process = &mut self.processes[who];
        let when = when.max(process.frozen_until);
        if process.round_at.is_none_or(|at| when < at) {
            process.round_at = Some(when);
            self.at(when, What::Round(who));
        }
    }

    /// Opens a connection.
    pub(super) fn connect(&mut self, ends: [usize; 2]) -> usize {
        self.connections.push(Connection {
            ends,
            open: true,
            newest: [0; 2],
        });
        self.connections.len() - 1
    }

    /// One end closes it, or its process is gone. A host that vanished says nothing.
    pub(super) fn hang_up(&mut self, connection: usize, by: usize) {
        self.send_over(connection, by, Input::Eof(connection));
        self.connections[connection].open = false;
    }

    /// Sends something over a connection, if it is open.
    pub(super) fn send_over(&mut self, connection: usize, by: usize, input: Input) {
        let Connection { ends, open, newest } = &self.connections[connection];
        if !open {
            return;
        }
        let end = usize::from(ends[0] == by);
        let (other, newest) = (ends[end], newest[end]);
        let when = self.stream(self.host(by), self.host(other), newest);
        self.connections[connection].newest[end] = when;
        self.at(when, What::Told(other, input));
    }

    /// Something happens at which a fault may have been waiting to strike.
    pub(super) fn point(&mut self, point: Point) {
        for number in 0..self.plan.faults.len() {
            let When::After(wanted, delay, from) = self.plan.faults[number].0 else {
                continue;
            };
            if self.armed[number] && wanted == point && self.now >= from {
                self.armed[number] = false;
                self.after(delay, What::Strikes(number));
                return;
            }
        }
    }

    /// A fault strikes, if there is somebody to be struck.
    fn strike(&mut self, number: usize) {
        let (when, fault) = self.plan.faults[number];
        if matches!(when, When::After(..)) && self.now >= self.plan.until {
            // Its moment did not come, or too late.
            self.armed[number] = false;
            return;
        }
        self.struck |= !matches!(fault, Fault::Replace | Fault::Switch);
        let replacing = self.is_being_replaced();
        let copying = self.attempts.iter().any(|it| it.replaces && !it.over);
        if fault != Fault::Replace {
            // A swap that cannot be answered keeps the guest standing: that takes an arbiter that was there a moment before.
            let bounded = match replacing || copying {
                true => !fault.is_of_the_arbiter(),
                false => true,
            };
            self.bounded = self.is_single() && bounded && (self.is_protected() || replacing);
            // The guest has stood, and a new backup of a silent primary asks by itself after some time.
            self.allowance = match replacing || copying {
                true => (self.timing.switch_within + self.timing.word_within).as_micros() as Micros,
                false => 0,
            };
        } else if self.plan.faults.len() == 1 {
            self.bounded = self.is_protected();
        }
        self.note(|_| format!("FAULT {fault:?}"));
        self.count("faults");
        let until = self.now + fault.span();
        self.plan.until = self.plan.until.max(until);
        match fault {
            Fault::Kill(target) => self.each(target, Self::end_process),
            Fault::Lose(target) => self.each(target, |world, who| world.vanish(who)),
            Fault::Freeze(target, _) => self.each(target, |world, who| {
                world.processes[who].frozen_until = until;
                world.note(|world| format!("{} is frozen", world.processes[who].name));
            }),
            Fault::Mute(target, _) => self.each(target, |world, who| world.silence(who, until, 0)),
            Fault::Deafen(target, _) => {
                self.each(target, |world, who| world.silence(who, until, 1));
            }
            Fault::Isolate(target, _) => self.each(target, |world, who| {
                world.silence(who, until, 0);
                world.silence(who, until, 1);
                world.part(world.host(who), ARBITER, until);
            }),
            Fault::Part(_) => {
                let pair = [self.struck(Target::Owner), self.struck(Target::Other)];
                if let [Some(one), Some(other)] = pair {
                    self.part(self.host(one), self.host(other), until);
                }
            }
            Fault::Reset => {
                let open = |world: &Self, who: usize| {
                    world.processes[who]
                        .connection
                        .filter(|&number| world.connections[number].open)
                };
                let found = (0..self.processes.len())
                    .filter(|&who| self.processes[who].alive)
                    .find_map(|who| open(self, who));
                if let Some(connection) = found {
                    self.connections[connection].open = false;
                    for end in self.connections[connection].ends {
                        let delay = self.random.below(5 * MS);
                        self.after(delay, What::Told(end, Input::Eof(connection)));
                    }
                }
            }
            Fault::NoArbiter(target, _) => {
                self.each(target, |world, who| {
                    world.part(world.host(who), ARBITER, until);
                });
            }
            Fault::ArbiterDown(_) => (0..HOSTS).for_each(|host| self.part(host, ARBITER, until)),
            Fault::ArbiterSlow(_) => self.ballot.slow_until = until,
            Fault::Unfit => {
                let backup = (0..self.processes.len()).find(|&who| {
                    let process = &self.processes[who];
                    process.alive && matches!(process.role, Role::Backup { .. })
                });
                if let Some(who) = backup {
                    let unfit = Unfit::Diverged("simulated".to_owned());
                    self.deliver(who, Input::Unfit(unfit));
                }
            }
            Fault::PowerOff | Fault::Switch | Fault::Replace => {
                let serves = |process: &Process| {
                    process.alive && process.runs && matches!(process.role, Role::Primary(_))
                };
                if let Some(who) = self.processes.iter().position(serves) {
                    let input = match fault {
                        Fault::Switch => Input::Switch,
                        Fault::Replace => Input::Replace,
                        _ => Input::End,
                    };
                    self.deliver(who, input);
                }
            }
        }
    }

    fn each(&mut self, target: Target, strike: impl FnOnce(&mut Self, usize)) {
        if let Some(who) = self.struck(target) {
            strike(self, who);
        }
    }

    /// Who is meant.
    fn struck(&self, target: Target) -> Option<usize> {
        let alive = |who: &usize| self.processes[*who].alive;
        let all = || (0..self.processes.len()).filter(alive);
        let is =
            |who: usize, identity: Option<Identity>| identity == Some(self.processes[who].identity);
        let record = self.ballot.record;
        let owner = record.map(|record: Record| record.owner);
        let entitled = record.and_then(|record| record.entitled);
        match target {
            Target::Owner => all().find(|&who| is(who, owner)),
            Target::Other => all().find(|&who| is(who, entitled)).or_else(|| {
                all().find(|&who| {
                    !is(who, owner) && !matches!(self.processes[who].role, Role::Listening)
                })
            }),
            Target::Newcomer => all().find(|&who| {
                let joins = matches!(self.processes[who].role, Role::Copying | Role::Candidate(_));
                joins || is(who, entitled)
            }),
            Target::Host(host) => all().find(|&who| self.host(who) == host),
        }
    }

    fn part(&mut self, one: usize, other: usize, until: Micros) {
        for (from, to) in [(one, other), (other, one)] {
            self.cuts[from][to] = self.cuts[from][to].max(until);
        }
    }

    /// What it sends (0) or what is sent to it (1) does not get through to other hosts.
    fn silence(&mut self, who: usize, until: Micros, direction: usize) {
        let host = self.host(who);
        for other in (0..HOSTS).filter(|&other| other != host) {
            let (from, to) = [(host, other), (other, host)][direction];
            self.cuts[from][to] = self.cuts[from][to].max(until);
        }
    }
}
