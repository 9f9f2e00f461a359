//! A pair on two hosts, under load, to which one thing after the other happens; after each the machine is served and protected again.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::arbiter::{Arbiter, Durability, FileArbiter};
use hypervisor::control::find;
use hypervisor::control::status::{Role as Is, Standing, Status};
use hypervisor::protocol::State;
use hypervisor::session::report::Event;

use super::linear_clients::LinearClients;
use super::program::doppel;
use super::random::Random;
use super::role::Role;
use super::signal::{Signal, send};
use super::two_hosts::{TwoHosts, Which};

/// What every machine here is called.
const NAME: &str = "machine";

/// How long the machine may take to be served and protected again: a copy that is begun and fails, a candidate that gives up after two
/// seconds, and a start, on a busy machine.
const SETTLE: Duration = Duration::from_secs(30);

/// For a step of a start.
const PATIENCE: Duration = Duration::from_secs(20);

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

/// All of them.
pub const HAPPENINGS: [Happening; 16] = [
    Happening::KillPrimary,
    Happening::KillBackup,
    Happening::LosePrimary,
    Happening::LoseBackup,
    Happening::FreezePrimary,
    Happening::FreezeBackup,
    Happening::CutLog,
    Happening::DeafenPrimary,
    Happening::DeafenBackup,
    Happening::SlowLog,
    Happening::NoArbiter,
    Happening::CorruptLog,
    Happening::Switch,
    Happening::MigrateBackup,
    Happening::MigrateAndKillPrimary,
    Happening::MigrateAndKillBackup,
];

/// A process of the machine.
#[derive(Debug)]
struct Side {
    role: Role,
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
pub struct Chaos {
    hosts: TwoHosts,
    sides: Vec<Side>,
    started: u32,
    /// Reigns that began with a take-over, and the process that said so.
    reigns: BTreeMap<u64, u32>,
    /// How processes ended that nobody killed.
    ends: BTreeMap<String, u32>,
    /// Migrations at which nobody was killed, and that were called off all the same.
    called_off: u32,
}

impl Chaos {
    /// A pair on new hosts. The calling thread is in their world from now on.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start() -> Result<Self> {
        let mut chaos = Self {
            hosts: TwoHosts::enter()?,
            sides: Vec::new(),
            started: 0,
            reigns: BTreeMap::new(),
            ends: BTreeMap::new(),
            called_off: 0,
        };
        chaos.start_backup(Which::B)?;
        let connect = Which::B.listens().to_string();
        let name = chaos.name("primary");
        let role = chaos.hosts.start(
            Which::A,
            &name,
            "primary",
            &[
                "--connect",
                &connect,
                "--cold-start",
                "--guest",
                "kv",
                "--memory",
                "64",
                "--command-line",
                "ip=10.77.0.2/24",
            ],
        )?;
        chaos.sides.push(Side {
            role,
            on: Which::A,
            killed: false,
        });
        chaos.settle()?;
        Ok(chaos)
    }

    fn name(&mut self, role: &str) -> String {
        self.started += 1;
        format!("{}-{role}", self.started)
    }

    fn start_backup(&mut self, on: Which) -> Result<()> {
        let name = self.name("backup");
        let mut role = self.hosts.backup(on, &name)?;
        role.until("\"address\"", PATIENCE)?;
        self.sides.push(Side {
            role,
            on,
            killed: false,
        });
        Ok(())
    }

    fn status(&self, pid: u32) -> Option<Status> {
        // One that is being set up, or that ends, does not answer.
        find::ask_process(&self.hosts.directory().join("run"), NAME, pid).ok()
    }

    /// The primary's place among the sides, and the backup's. Both are well when this is asked.
    fn pair(&self) -> Result<(usize, usize)> {
        let is = |wanted: Is| {
            let all = || self.sides.iter().enumerate();
            all()
                .find(|(_, side)| {
                    self.status(side.role.pid())
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
        let until = Instant::now() + SETTLE;
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
        let (primary_on, backup_on) = (self.sides[primary].on, self.sides[backup].on);
        match what {
            Happening::KillPrimary => self.kill(primary),
            Happening::KillBackup => self.kill(backup),
            Happening::LosePrimary => self.lose(primary, span),
            Happening::LoseBackup => self.lose(backup, span),
            Happening::FreezePrimary => self.freeze(primary, span),
            Happening::FreezeBackup => self.freeze(backup, span),
            Happening::CutLog => {
                self.hosts.join_log(false)?;
                std::thread::sleep(span);
                self.hosts.join_log(true)
            }
            Happening::DeafenPrimary | Happening::DeafenBackup => {
                let which = match what {
                    Happening::DeafenPrimary => primary_on,
                    _ => backup_on,
                };
                self.hosts.deafen(which, true)?;
                std::thread::sleep(span);
                self.hosts.deafen(which, false)
            }
            Happening::SlowLog => {
                self.hosts.slow(primary_on, true)?;
                std::thread::sleep(span);
                self.hosts.slow(primary_on, false)
            }
            Happening::NoArbiter => {
                let (here, away) = ("arbiter", "arbiter.away");
                let place = |name: &str| self.hosts.directory().join(name);
                fs::rename(place(here), place(away)).context("take the arbiter away")?;
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
                let place = |name: &str| self.hosts.directory().join(name);
                fs::rename(place(away), place(here)).context("bring the arbiter back")
            }
            Happening::CorruptLog => corrupt(&mut self.sides[backup], random),
            Happening::Switch => self.order(&["switch", NAME]).map(drop),
            Happening::MigrateBackup
            | Happening::MigrateAndKillPrimary
            | Happening::MigrateAndKillBackup => {
                let dies = match what {
                    Happening::MigrateAndKillPrimary => Some(primary),
                    Happening::MigrateAndKillBackup => Some(backup),
                    _ => None,
                };
                self.migrate(backup_on, dies, random)
            }
        }
    }

    fn kill(&mut self, which: usize) -> Result<()> {
        let side = &mut self.sides[which];
        side.killed = true;
        send(side.role.pid(), Signal::Kill)
    }

    fn lose(&mut self, which: usize, span: Duration) -> Result<()> {
        let side = &mut self.sides[which];
        side.killed = true;
        self.hosts.lose(side.on, &side.role)?;
        std::thread::sleep(span);
        self.hosts.mend(side.on)
    }

    fn freeze(&self, which: usize, span: Duration) -> Result<()> {
        let pid = self.sides[which].role.pid();
        send(pid, Signal::Stop)?;
        std::thread::sleep(span);
        send(pid, Signal::Continue)
    }

    fn order(&self, words: &[&str]) -> Result<Result<String, String>> {
        let output = Command::new(doppel()?)
            .args(words)
            .args(["--run-dir", "run"])
            .current_dir(self.hosts.directory())
            .output()
            .context("start doppel")?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(match output.status.code() {
            Some(0) => Ok(said(&output.stdout)),
            Some(1) => Err(said(&output.stderr)),
            _ => bail!("{words:?}: {}: {}", output.status, said(&output.stderr)),
        })
    }

    /// Another backup on the same host is to take the old one's place; one of the others may die at it.
    fn migrate(&mut self, on: Which, dies: Option<usize>, random: &mut Random) -> Result<()> {
        let name = self.name("newcomer");
        let port = 7700 + (1 + self.started % 200) as u16;
        let (mut role, address) = self.hosts.backup_at(on, &name, port, &[])?;
        role.until("\"address\"", PATIENCE)?;
        self.sides.push(Side {
            role,
            on,
            killed: false,
        });
        let newcomer = self.sides.len() - 1;
        let address = address.to_string();
        let words = ["migrate-backup", NAME, "--to", &address];
        match dies {
            // On a busy host it may be called off; it says so, and the old one goes on.
            None => match self.order(&words)? {
                Ok(said) => ensure!(said.contains("protects it now"), "it said {said}"),
                Err(why) => {
                    self.called_off += 1;
                    ensure!(why.contains("doppel: "), "it said {why}");
                }
            },
            Some(dies) => {
                let mut order = Command::new(doppel()?)
                    .args(words)
                    .args(["--run-dir", "run"])
                    .current_dir(self.hosts.directory())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .context("start doppel")?;
                std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(80)));
                self.kill(dies)?;
                // Whatever came of it.
                order.wait().context("wait for doppel")?;
            }
        }
        // One that is not entitled, and listens where nobody looks, is of no more use.
        let until = Instant::now() + SETTLE;
        loop {
            if !self.sides[newcomer].role.runs()? {
                return Ok(());
            }
            let pid = self.sides[newcomer].role.pid();
            match self
                .status(pid)
                .map(|status| (status.role, status.standing))
            {
                Some((Is::Backup, Standing::Waiting)) => {
                    self.sides[newcomer].killed = true;
                    return self.sides[newcomer].role.stop(PATIENCE);
                }
                Some((Is::Backup, Standing::Following) | (Is::Primary, _)) => return Ok(()),
                _ => {}
            }
            ensure!(
                Instant::now() < until,
                "the newcomer stays what it is: {}",
                self.sides[newcomer].role.said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the machine is served and protected; a backup is started where none is any more.
    ///
    /// # Errors
    /// If that does not come about, or a process has ended as none should.
    pub fn settle(&mut self) -> Result<()> {
        let until = Instant::now() + SETTLE;
        loop {
            self.bury()?;
            let stand: Vec<Option<Status>> = self
                .sides
                .iter()
                .map(|side| self.status(side.role.pid()))
                .collect();
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
                if status.standing == Standing::Protected && follows && stand.len() == 2 {
                    return self.as_the_arbiter_says(status);
                }
                let there = self.sides[one].on.other();
                let somebody = self.sides.iter().any(|side| side.on == there);
                if status.standing.is_unprotected() && !somebody {
                    self.start_backup(there)?;
                }
            }
            if Instant::now() >= until {
                let said: Vec<String> = self.sides.iter().map(|side| side.role.said()).collect();
                bail!(
                    "the machine is not served and protected again within {SETTLE:?}: {stand:?}; they said {}",
                    said.join("\n---\n")
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whoever serves has the machine by the arbiter's record.
    fn as_the_arbiter_says(&self, status: &Status) -> Result<()> {
        let place = self.hosts.directory().join("arbiter");
        let arbiter = FileArbiter::open(&place, NAME, Durability::ProcessDeath)?;
        let record = arbiter.read()?.context("the arbiter has no record")?;
        ensure!(
            record.state == State::Live
                && record.epoch.0 == status.epoch
                && record.entitled.is_some(),
            "a machine is served in epoch {}, and the arbiter says {record}",
            status.epoch
        );
        Ok(())
    }

    /// Looks after processes that have ended: one that nobody killed ends with a code of its own, in words.
    fn bury(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.sides.len() {
            if self.sides[at].role.runs()? {
                at += 1;
                continue;
            }
            let mut side = self.sides.remove(at);
            let status = side.role.end(PATIENCE)?;
            let said = side.role.said();
            ensure!(!said.contains("panicked"), "a side panicked: {said}");
            self.note_reigns(side.role.pid(), &said)?;
            if side.killed {
                continue;
            }
            ensure!(
                status.code().is_some(),
                "a side that nobody killed ended by {status}: {said}"
            );
            let why = last_words(&said)
                .with_context(|| format!("a side ended by {status} without a word: {said}"))?;
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

    fn note_reigns(&mut self, pid: u32, said: &str) -> Result<()> {
        for event in events(said) {
            if let Event::Live { epoch, .. } = event
                && let Some(other) = self.reigns.insert(epoch, pid)
            {
                ensure!(
                    other == pid,
                    "processes {other} and {pid} both went live in epoch {epoch}"
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
        let off = self.order(&["power-off", NAME])?;
        off.map_err(|why| anyhow::anyhow!("the machine was not turned off: {why}"))?;
        for side in &mut self.sides {
            let status = side.role.end(PATIENCE)?;
            ensure!(
                status.code() == Some(0),
                "a side of a machine that was turned off ended by {status}: {}",
                side.role.said()
            );
        }
        for side in std::mem::take(&mut self.sides) {
            self.note_reigns(side.role.pid(), &side.role.said())?;
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

/// What the ring's memory is called, as the kernel shows it.
const RING: &str = "memfd:rdma-log-tcp";

/// How long the log's bytes are being changed: entries are in memory for less than a millisecond before they are replayed, so most of what
/// is changed is of no more use or not there yet.
const CORRUPTED_FOR: Duration = Duration::from_millis(400);

/// Places that are changed at once.
const SPOTS: u32 = 1000;

/// Changes bytes of the events lane in a backup's memory, for some time or until that has ended by it.
fn corrupt(side: &mut Side, random: &mut Random) -> Result<()> {
    let pid = side.role.pid();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("look at a process")?;
    let ring = maps
        .lines()
        .find(|line| line.contains(RING))
        .context("no ring in the backup's memory")?;
    // It begins with the events lane.
    let from = ring.split('-').next().unwrap_or_default();
    let from = u64::from_str_radix(from, 16).context("a range of memory")?;
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .context("open a process's memory")?;
    let until = Instant::now() + CORRUPTED_FOR;
    while Instant::now() < until {
        for _ in 0..SPOTS {
            let at = from + random.below(rdma_log::EVENTS_LANE as u64 - 8);
            if memory
                .write_all_at(&random.next().to_le_bytes(), at)
                .is_err()
            {
                // It ends by that, and its memory is gone first.
                return side.role.end(PATIENCE).map(drop);
            }
        }
    }
    Ok(())
}
