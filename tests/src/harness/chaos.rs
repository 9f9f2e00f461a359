//! A pair on two hosts, under load, to which one thing after the other happens; after each the machine is served and protected again.
#![forbid(unsafe_code)]

mod ground;
pub mod namespaces;

pub use ground::{Clock, Ground, Member, Patience, Said};

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::arbiter::{Arbiter, Durability, FileArbiter};
use hypervisor::control::status::{Role as Is, Standing, Status};
use hypervisor::protocol::{Record, State};
use hypervisor::session::report::Event;

use super::linear_clients::LinearClients;
use super::random::Random;
use super::two_hosts::Which;

/// Answers between two happenings: the machine serves.
const ANSWERS: u64 = 50;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    /// The process dies.
    KillPrimary,
    /// The process dies.
    KillBackup,
    /// The host is lost: cables and process.
    LosePrimary,
    /// The host is lost: cables and process.
    LoseBackup,
    /// The process stands still.
    FreezePrimary,
    /// The process stands still.
    FreezeBackup,
    /// The host stands still.
    SuspendPrimary,
    /// The host stands still.
    SuspendBackup,
    /// The hosts do not reach each other.
    CutLog,
    /// What the backup's host sends does not arrive.
    DeafenPrimary,
    /// What the primary's host sends does not arrive.
    DeafenBackup,
    /// The log's cable is slow.
    SlowLog,
    /// Nobody reaches the arbiter.
    NoArbiter,
    /// Bytes of the log are changed in the backup's memory.
    CorruptLog,
    /// The operator moves the machine.
    Switch,
    /// The operator moves the backup.
    MigrateBackup,
    /// The operator moves the backup, and the primary dies meanwhile.
    MigrateAndKillPrimary,
    /// The operator moves the backup, and that dies meanwhile.
    MigrateAndKillBackup,
}

/// A process of the machine.
#[derive(Debug)]
struct Side<M> {
    member: M,
    name: String,
    on: Which,
    /// We have killed it.
    killed: bool,
}

/// What a pair went through.
#[derive(Debug)]
pub struct Lived {
    /// Reigns that began with a take-over.
    pub take_overs: usize,
    /// How processes ended that nobody killed.
    pub ends: BTreeMap<String, u32>,
    /// Migrations at which nobody was killed, and that were called off all the same.
    pub called_off: u32,
}

/// The pair, and the ground on which it stands.
#[derive(Debug)]
pub struct Chaos<G: Ground> {
    ground: G,
    sides: Vec<Side<G::Member>>,
    started: u32,
    /// Reigns that began with a take-over, and the process that said so.
    reigns: BTreeMap<u64, String>,
    /// How processes ended that nobody killed.
    ends: BTreeMap<String, u32>,
    /// Migrations at which nobody was killed, and that were called off all the same.
    called_off: u32,
}

impl<G: Ground> Chaos<G> {
    /// A pair on this ground.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(ground: G) -> Result<Self> {
        let mut chaos = Self {
            ground,
            sides: Vec::new(),
            started: 0,
            reigns: BTreeMap::new(),
            ends: BTreeMap::new(),
            called_off: 0,
        };
        chaos.start_backup(Which::B)?;
        let name = chaos.name("primary");
        let member = chaos.ground.start_primary(&name)?;
        chaos.admit(member, name, Which::A);
        chaos.settle()?;
        Ok(chaos)
    }

    fn name(&mut self, role: &str) -> String {
        self.started += 1;
        format!("{}-{role}", self.started)
    }

    fn admit(&mut self, member: G::Member, name: String, on: Which) {
        self.sides.push(Side {
            member,
            name,
            on,
            killed: false,
        });
    }

    fn start_backup(&mut self, on: Which) -> Result<()> {
        let name = self.name("backup");
        let (member, _) = self.ground.start_backup(on, &name, None)?;
        self.admit(member, name, on);
        Ok(())
    }

    fn status(&self, side: &Side<G::Member>) -> Option<Status> {
        self.ground.status(side.on, &side.member)
    }

    /// The primary's place among the sides, and the backup's. Both are well when this is asked.
    fn pair(&self) -> Result<(usize, usize)> {
        let is = |wanted: Is| {
            let all = || self.sides.iter().enumerate();
            all()
                .find(|(_, side)| {
                    self.status(side)
                        .is_some_and(|status| status.role == wanted)
                })
                .map(|(at, _)| at)
        };
        Ok((
            is(Is::Primary).context("no primary answers")?,
            is(Is::Backup).context("no backup answers")?,
        ))
    }

    /// The same. On a host where much else goes on, something may have happened since they were well last.
    fn settled_pair(&mut self) -> Result<(usize, usize)> {
        let until = Instant::now() + self.ground.patience().settle;
        loop {
            self.settle()?;
            match self.pair() {
                Err(_) if Instant::now() < until => {}
                outcome => return outcome,
            }
        }
    }

    /// Makes it happen, for as long as it lasts.
    ///
    /// # Errors
    /// If the test cannot do it, or an operator's order comes to what it must not.
    pub fn happen(&mut self, what: Happening, random: &mut Random) -> Result<()> {
        let (primary, backup) = self.settled_pair()?;
        let span = match random.below(3) {
            // Nobody should notice, somebody may, and somebody will.
            0 => random.between(Duration::from_millis(10), Duration::from_millis(60)),
            1 => random.between(Duration::from_millis(60), Duration::from_millis(400)),
            _ => random.between(Duration::from_millis(400), Duration::from_millis(1500)),
        };
        let span = span * self.ground.patience().spans;
        let (primary_on, backup_on) = (self.sides[primary].on, self.sides[backup].on);
        match what {
            Happening::KillPrimary => self.kill(primary),
            Happening::KillBackup => self.kill(backup),
            Happening::LosePrimary => self.lose(primary, span),
            Happening::LoseBackup => self.lose(backup, span),
            Happening::FreezePrimary => self.freeze(primary, span),
            Happening::FreezeBackup => self.freeze(backup, span),
            Happening::SuspendPrimary => self.suspend(primary_on, span, random),
            Happening::SuspendBackup => self.suspend(backup_on, span, random),
            Happening::CutLog => {
                self.ground.join_log(false)?;
                std::thread::sleep(span);
                self.ground.join_log(true)
            }
            Happening::DeafenPrimary | Happening::DeafenBackup => {
                let which = match what {
                    Happening::DeafenPrimary => primary_on,
                    _ => backup_on,
                };
                self.ground.deafen(which, true)?;
                std::thread::sleep(span);
                self.ground.deafen(which, false)
            }
            Happening::SlowLog => {
                self.ground.slow(primary_on, true)?;
                std::thread::sleep(span);
                self.ground.slow(primary_on, false)
            }
            Happening::NoArbiter => {
                let here = self.ground.arbiter();
                let away = here.with_extension("away");
                fs::rename(&here, &away).context("take the arbiter away")?;
                // With somebody dead, nobody can decide anything; or all is well.
                let dies = match random.below(3) {
                    0 => None,
                    1 => Some(primary),
                    _ => Some(backup),
                };
                if let Some(dies) = dies {
                    self.kill(dies)?;
                }
                std::thread::sleep(span);
                fs::rename(&away, &here).context("bring the arbiter back")
            }
            Happening::CorruptLog => {
                let member = &mut self.sides[backup].member;
                self.ground.corrupt(member, random)
            }
            Happening::Switch => self.ground.order(primary_on, &["switch"]).map(drop),
            Happening::MigrateBackup
            | Happening::MigrateAndKillPrimary
            | Happening::MigrateAndKillBackup => {
                let dies = match what {
                    Happening::MigrateAndKillPrimary => Some(primary),
                    Happening::MigrateAndKillBackup => Some(backup),
                    _ => None,
                };
                self.migrate([primary_on, backup_on], dies, random)
            }
        }
    }

    fn kill(&mut self, which: usize) -> Result<()> {
        let side = &mut self.sides[which];
        side.killed = true;
        self.ground.kill(side.on, &side.member)
    }

    fn lose(&mut self, which: usize, span: Duration) -> Result<()> {
        let side = &mut self.sides[which];
        side.killed = true;
        self.ground.lose(side.on, &side.member)?;
        std::thread::sleep(span);
        self.ground.mend(side.on)
    }

    fn freeze(&self, which: usize, span: Duration) -> Result<()> {
        let side = &self.sides[which];
        self.ground.freeze(side.on, &side.member, true)?;
        std::thread::sleep(span);
        self.ground.freeze(side.on, &side.member, false)
    }

    fn suspend(&self, on: Which, span: Duration, random: &mut Random) -> Result<()> {
        let clock = match random.below(2) {
            0 => Clock::GoesOn,
            _ => Clock::Stands,
        };
        self.ground.suspend(on, Some(clock))?;
        std::thread::sleep(span);
        self.ground.suspend(on, None)
    }

    /// Another backup on the same host is to take the old one's place; one of the others may die at it.
    fn migrate(
        &mut self,
        [served, on]: [Which; 2],
        dies: Option<usize>,
        random: &mut Random,
    ) -> Result<()> {
        let name = self.name("newcomer");
        let port = 7700 + (1 + self.started % 200) as u16;
        let (member, address) = self.ground.start_backup(on, &name, Some(port))?;
        self.admit(member, name, on);
        let newcomer = self.sides.len() - 1;
        let address = address.to_string();
        let words = ["migrate-backup", "--to", &address];
        match dies {
            // On a busy host it may be called off; it says so, and the old one goes on.
            None => match self.ground.order(served, &words)? {
                Ok(said) => ensure!(said.contains("protects it now"), "it said {said}"),
                Err(why) => {
                    self.called_off += 1;
                    ensure!(why.contains("doppel: "), "it said {why}");
                }
            },
            Some(dies) => {
                let longest = Duration::from_millis(80) * self.ground.patience().spans;
                let side = &mut self.sides[dies];
                side.killed = true;
                self.ground.order_and(served, &words, &mut || {
                    std::thread::sleep(random.between(Duration::ZERO, longest));
                    self.ground.kill(side.on, &side.member)
                })?;
            }
        }
        // One that is not entitled, and listens where nobody looks, is of no more use.
        let until = Instant::now() + self.ground.patience().settle;
        loop {
            if !self.sides[newcomer].member.runs()? {
                return Ok(());
            }
            match self
                .status(&self.sides[newcomer])
                .map(|status| (status.role, status.standing))
            {
                Some((Is::Backup, Standing::Waiting)) => {
                    let side = &mut self.sides[newcomer];
                    side.killed = true;
                    return self.ground.dismiss(side.on, &mut side.member);
                }
                Some((Is::Backup, Standing::Following) | (Is::Primary, _)) => return Ok(()),
                _ => {}
            }
            ensure!(
                Instant::now() < until,
                "the newcomer stays what it is: {}",
                self.sides[newcomer].member.said()
            );
            std::thread::sleep(2 * self.ground.patience().look);
        }
    }

    /// Waits until the machine is served and protected; a backup is started where none is any more.
    ///
    /// # Errors
    /// If that does not come about, or a process has ended as none should.
    pub fn settle(&mut self) -> Result<()> {
        let until = Instant::now() + self.ground.patience().settle;
        loop {
            self.bury()?;
            let stand: Vec<Option<Status>> =
                self.sides.iter().map(|side| self.status(side)).collect();
            let serves = |status: &Option<Status>| {
                status.as_ref().is_some_and(|it| {
                    it.role == Is::Primary
                        && (it.standing.is_protected() || it.standing.is_unprotected())
                })
            };
            let serving: Vec<usize> = (0..stand.len()).filter(|&at| serves(&stand[at])).collect();
            if let [one] = serving[..]
                && let Some(status) = &stand[one]
            {
                let follows = stand
                    .iter()
                    .flatten()
                    .any(|it| it.role == Is::Backup && it.standing == Standing::Following);
                // A backup may be given up between the status and the record: then both change once more.
                if status.standing == Standing::Protected
                    && follows
                    && stand.len() == 2
                    && self.is_as_the_arbiter_says(status)?
                {
                    return Ok(());
                }
                let there = self.sides[one].on.other();
                let somebody = self.sides.iter().any(|side| side.on == there);
                if status.standing.is_unprotected() && !somebody {
                    self.start_backup(there)?;
                }
            }
            if Instant::now() >= until {
                let said: Vec<String> = self.sides.iter().map(|side| side.member.said()).collect();
                bail!(
                    "the machine is not served and protected again in time: {stand:?}; the arbiter says {}; they said {}",
                    self.record()?,
                    said.join("\n---\n")
                );
            }
            std::thread::sleep(self.ground.patience().look);
        }
    }

    /// Whether whoever serves has the machine, and a backup, by the arbiter's record too.
    fn is_as_the_arbiter_says(&self, status: &Status) -> Result<bool> {
        let record = self.record()?;
        Ok(record.state == State::Live
            && record.epoch.0 == status.epoch
            && record.entitled.is_some())
    }

    fn record(&self) -> Result<Record> {
        let place = self.ground.arbiter();
        let arbiter = FileArbiter::open(&place, self.ground.name(), Durability::ProcessDeath)?;
        arbiter.read()?.context("the arbiter has no record")
    }

    /// Looks after processes that have ended: one that nobody killed ends with a code of its own, in words.
    fn bury(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.sides.len() {
            if self.sides[at].member.runs()? {
                at += 1;
                continue;
            }
            let mut side = self.sides.remove(at);
            let code = side.member.end(self.ground.patience().step)?;
            let said = side.member.said();
            ensure!(!said.contains("panicked"), "a side panicked: {said}");
            self.note_reigns(&side.name, &said)?;
            if side.killed {
                continue;
            }
            ensure!(
                code.is_some(),
                "a side that nobody killed was killed: {said}"
            );
            let why = last_words(&said)
                .with_context(|| format!("a side ended with {code:?} without a word: {said}"))?;
            // Who, when and where is of no interest here.
            let words = why
                .split([':', '(', ';'])
                .next()
                .unwrap_or_default()
                .split(' ');
            let words: Vec<&str> = words.filter(|word| word.len() < 32).take(9).collect();
            let kind = words.join(" ").trim().to_owned();
            *self.ends.entry(kind).or_default() += 1;
        }
        Ok(())
    }

    fn note_reigns(&mut self, name: &str, said: &str) -> Result<()> {
        for event in events(said) {
            if let Event::Live { epoch, .. } = event
                && let Some(other) = self.reigns.insert(epoch, name.to_owned())
            {
                ensure!(
                    other == name,
                    "processes {other} and {name} both went live in epoch {epoch}"
                );
            }
        }
        Ok(())
    }

    /// The machine serves.
    ///
    /// # Errors
    /// If clients do not get their answers.
    pub fn serves(&self, clients: &mut LinearClients) -> Result<()> {
        clients.await_answers(ANSWERS)
    }

    /// Turns the machine off; both sides end well.
    ///
    /// # Errors
    /// If one does not.
    pub fn end(mut self) -> Result<Lived> {
        let (primary, _) = self.settled_pair()?;
        let on = self.sides[primary].on;
        let off = self.ground.order(on, &["power-off"])?;
        off.map_err(|why| anyhow::anyhow!("the machine was not turned off: {why}"))?;
        for side in &mut self.sides {
            let code = side.member.end(self.ground.patience().step)?;
            ensure!(
                code == Some(0),
                "a side of a machine that was turned off ended with {code:?}: {}",
                side.member.said()
            );
        }
        for side in std::mem::take(&mut self.sides) {
            self.note_reigns(&side.name, &side.member.said())?;
        }
        Ok(Lived {
            take_overs: self.reigns.len(),
            ends: self.ends,
            called_off: self.called_off,
        })
    }
}

fn events(said: &str) -> impl Iterator<Item = Event> + '_ {
    said.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
}

/// Why a process ended, as it said: an error is told last, to people; what was meant to come is a notice.
fn last_words(said: &str) -> Option<String> {
    let error = said.lines().find_map(|line| line.strip_prefix("doppel: "));
    error.map(str::to_owned).or_else(|| {
        let last = events(said).filter_map(|event| match event {
            Event::Notice { text, .. } => Some(text),
            Event::Ended { why } => Some(why),
            _ => None,
        });
        last.last()
    })
}
