//! Deaths at random bytes of a copy: the sender or the receiver of a running machine's copy is killed, and the survivor goes on, holds
//! nothing of it, and takes a new peer.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::handshake::Secret;
use serde_json::Value;

use super::random::Random;
use super::relay::Relay;
use super::role::Role;
use crate::promise::{Figures, Run};

/// Over what the pairs run, and how much time things take there.
#[derive(Clone, Copy, Debug)]
pub struct Ground {
    transport: &'static str,
    /// What the sides are told of their times, in TOML.
    times: &'static str,
    /// What runs in the machines, in turn.
    guests: [&'static str; 2],
    /// MiB of their memory.
    memory: &'static str,
    /// For each step of a role: as long as the slowest of its own time limits, twice over.
    patience: Duration,
    /// Deaths for each guest that the host's emulator may lose (docs/lab.md, "What the emulator cannot do"); none may be lost where nothing
    /// is emulated.
    deaths_for_a_lost_guest: Option<usize>,
}

/// What a primary says at its end whose guest met a triple fault.
const CRASHED: &str = "the guest crashed";

impl Ground {
    /// Over TCP, on this machine.
    #[must_use]
    pub fn tcp() -> Self {
        Self {
            transport: "tcp",
            times: "",
            // One whose copy is small and always the same, and one that writes faster than it is copied.
            guests: ["irq", "memory"],
            memory: "16",
            patience: Duration::from_secs(20),
            deaths_for_a_lost_guest: None,
        }
    }

    /// Over RDMA, in a host that may be emulated: it stands still for tenths of a second where the machine below it is busy.
    #[must_use]
    pub fn emulated_rdma() -> Self {
        Self {
            transport: "rdma",
            times: "[timing]\nheartbeat_ms = 50\nsilence_ms = 2000\nlag_ms = 100\n",
            guests: ["irq", "irq"],
            memory: "16",
            patience: Duration::from_secs(90),
            deaths_for_a_lost_guest: is_emulated().then_some(20),
        }
    }
}

/// Who dies in the middle of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
}

/// Deaths at random bytes of everything that a primary says to a backup that joins.
///
/// # Errors
/// What does not hold of the survivor.
pub fn torn(
    run: &Run,
    ground: &Ground,
    deaths: usize,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let mut whole = Vec::new();
    for guest in ground.guests {
        whole.push(ground.whole_copy(guest)?);
    }
    for (guest, bytes) in ground.guests.iter().zip(&whole) {
        figures.add(&format!("bytes_of_a_join_{guest}"), *bytes);
    }
    let alone = ground.held_by_a_primary_alone()?;
    figures.add("held_by_a_primary_alone", alone.told());
    let mut came_to = BTreeMap::<String, u32>::new();
    let may_be_lost = ground
        .deaths_for_a_lost_guest
        .map_or(0, |each| deaths.div_ceil(each));
    let mut lost = 0;
    for death in 0..deaths {
        let victim = if death % 2 == 0 {
            Victim::Receiver
        } else {
            Victim::Sender
        };
        let guest = ground.guests[death / 2 % 2];
        let whole = whole[death / 2 % 2];
        let after = random.below(whole);
        let outcome = loop {
            let outcome = match victim {
                Victim::Receiver => ground.receiver_dies(guest, &alone, after),
                Victim::Sender => ground.sender_dies(guest, after),
            };
            let outcome = outcome.with_context(|| {
                format!("{guest}, {victim:?} killed after {after} of {whole} bytes")
            });
            match outcome {
                Ok(outcome) => break outcome,
                Err(error) if lost < may_be_lost && format!("{error:#}").contains(CRASHED) => {
                    lost += 1;
                    run.say(format!(
                        "a guest lost to the emulator, {lost} of {may_be_lost}: {error:#}"
                    ));
                }
                Err(error) => return Err(error),
            }
        };
        run.say(format!(
            "{guest}, {victim:?} killed after {after} of {whole} bytes: {outcome}"
        ));
        *came_to.entry(outcome.to_owned()).or_default() += 1;
    }
    figures.add("deaths_in_the_copy", deaths);
    figures.add("deaths_came_to", serde_json::to_value(came_to)?);
    if may_be_lost > 0 {
        figures.add("guests_lost_to_the_emulator", lost);
    }
    Ok(())
}

/// A place for one pair.
#[derive(Debug)]
pub struct Place {
    ground: Ground,
    directory: tempfile::TempDir,
}

impl Place {
    /// A new one.
    ///
    /// # Errors
    /// If the host gives no directory.
    pub fn new(ground: &Ground) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory")?;
        fs::create_dir(directory.path().join("arbiter")).context("make a directory")?;
        fs::write(directory.path().join("times.toml"), ground.times).context("write times")?;
        Secret::create(&directory.path().join("pair.secret"))?;
        Ok(Self {
            ground: *ground,
            directory,
        })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A backup that listens, and where.
    ///
    /// # Errors
    /// If it does not come so far.
    pub fn backup(&self, name: &str, listen: &str) -> Result<(Role, SocketAddr)> {
        let mut role = self.start(name, "backup", &["--listen", listen])?;
        role.until("\"address\"", self.ground.patience)?;
        let said = role.said();
        let line = said.lines().find(|line| line.contains("\"address\""));
        let event: serde_json::Value = serde_json::from_str(line.context("no address")?)?;
        let address = event["address"].as_str().context("no address")?.parse()?;
        Ok((role, address))
    }

    /// A primary that starts alone and looks for a backup at `connect`, when it is ready.
    fn primary(&self, name: &str, guest: &str, connect: SocketAddr) -> Result<Role> {
        let mut role = self.start_primary(name, guest, connect)?;
        role.until("\"ready\"", self.ground.patience)?;
        Ok(role)
    }

    /// The same, which may die before it is ready.
    fn start_primary(&self, name: &str, guest: &str, connect: SocketAddr) -> Result<Role> {
        let memory = self.ground.memory;
        self.start_alone(name, connect, &["--guest", guest, "--memory", memory])
    }

    /// A primary that starts alone, with these arguments besides.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_alone(&self, name: &str, connect: SocketAddr, more: &[&str]) -> Result<Role> {
        let connect = connect.to_string();
        let alone = ["--connect", &connect, "--alone", "--cold-start"];
        self.start(name, "primary", &[&alone[..], more].concat())
    }

    /// A role of this pair, with these arguments besides.
    fn start(&self, name: &str, role: &str, more: &[&str]) -> Result<Role> {
        let pair = [
            role,
            "--json",
            "--config",
            "times.toml",
            "--transport",
            self.ground.transport,
            "--secret",
            "pair.secret",
            "--arbiter",
            "arbiter",
        ];
        Role::start(self.path(), name, &[&pair[..], more].concat())
    }
}

impl Ground {
    /// What counts, and kills, on the way of a copy.
    fn relay(&self, backup: SocketAddr) -> Result<Relay> {
        let relay = Relay::start(backup)?;
        match self.transport {
            "rdma" => relay.and_rdma(),
            _ => Ok(relay),
        }
    }

    /// Bytes that a primary says to a backup until that is paired.
    fn whole_copy(&self, guest: &str) -> Result<u64> {
        let place = Place::new(self)?;
        let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
        let relay = self.relay(address)?;
        let mut primary = place.primary("primary", guest, relay.address())?;
        primary.until("\"joined\"", self.patience)?;
        let passed = relay.passed();
        backup.until("\"paired\"", self.patience)?;
        primary.stop(self.patience)?;
        backup.end(self.patience)?;
        Ok(passed)
    }

    /// What a primary holds that runs alone and finds nobody who listens.
    fn held_by_a_primary_alone(&self) -> Result<Holdings> {
        let place = Place::new(self)?;
        // Bound, and given up: nobody listens there.
        let nobody = std::net::TcpListener::bind(("127.0.0.1", 0)).context("find a port")?;
        let address = nobody.local_addr().context("find a port")?;
        drop(nobody);
        let mut primary = place.primary("alone", self.guests[0], address)?;
        // Said once a second by a guest that runs: all threads are there then, with what they hold.
        primary.until_one_of(&["\"commits\"", "\"preempted\""], self.patience)?;
        let mut held = Holdings::of(primary.pid())?;
        // Between two calls it has one descriptor less than during one.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            let now = Holdings::of(primary.pid())?;
            if now.descriptors < held.descriptors {
                held = now;
            }
        }
        primary.stop(self.patience)?;
        Ok(held)
    }

    /// The backup that joins is killed: the primary goes on, holds nothing of it, and takes another.
    fn receiver_dies(&self, guest: &str, alone: &Holdings, after: u64) -> Result<&'static str> {
        let place = Place::new(self)?;
        let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
        let relay = self.relay(address)?;
        relay.arm(after);
        relay.kill(backup.pid());
        let mut primary = place.primary("primary", guest, relay.address())?;
        struck(&relay, &mut backup, &mut primary, self.patience)?;
        let words = [
            "a backup that wanted to join is not taken",
            "UNPROTECTED: the machine runs",
        ];
        primary.until_one_of(&words, self.patience)?;
        alone
            .restored(primary.pid(), self.patience)
            .with_context(|| primary.said())?;
        let (mut next, _) = place.backup("next", &address.to_string())?;
        primary.until("\"paired\"", self.patience)?;
        next.until("\"paired\"", self.patience)?;
        primary.stop(self.patience)?;
        next.end(self.patience)?;
        Ok("the primary took another backup")
    }

    /// The primary, which alone has the machine, is killed: the backup waits for another. If it was entitled by then it goes live.
    fn sender_dies(&self, guest: &str, after: u64) -> Result<&'static str> {
        let place = Place::new(self)?;
        let (mut backup, address) = place.backup("backup", "127.0.0.1:0")?;
        let before = Holdings::of(backup.pid())?;
        let relay = self.relay(address)?;
        relay.arm(after);
        let mut primary = place.start_primary("primary", guest, relay.address())?;
        relay.kill(primary.pid());
        struck(&relay, &mut primary, &mut backup, self.patience)?;
        let words = ["a primary was refused", "\"live\""];
        if backup.until_one_of(&words, self.patience)? == 1 {
            // The last bytes are of the log: it was entitled by then.
            backup.stop(self.patience)?;
            return Ok("the backup was entitled, and went live");
        }
        before.restored(backup.pid(), self.patience)?;
        let mut next = place.primary("next", guest, relay.address())?;
        next.until("\"paired\"", self.patience)?;
        backup.until("\"paired\"", self.patience)?;
        next.stop(self.patience)?;
        backup.end(self.patience)?;
        Ok("the backup took another primary")
    }
}

/// Whether QEMU emulates this host's processors.
fn is_emulated() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|processors| processors.contains("QEMU TCG"))
}

/// What the descriptors of a process lead to.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
    let targets = entries.flatten().filter_map(target);
    targets.map(|target| target.display().to_string()).collect()
}

/// What of a process can leak: descriptors, threads, mappings of memory.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    shared_mappings: usize,
    /// RDMA's objects, by what they are: queue pairs, memory regions and their like.
    rdma: BTreeMap<&'static str, usize>,
}

impl Holdings {
    fn of(pid: u32) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{pid}/{what}"))
                .context("look at a process")?
                .count())
        };
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("look at a process")?;
        let shared = |line: &&str| {
            line.split(' ')
                .nth(1)
                .is_some_and(|flags| flags.ends_with('s'))
        };
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            shared_mappings: maps.lines().filter(shared).count(),
            rdma: rdma_objects(pid)?,
        })
    }

    /// Waits until the process holds what it held before.
    fn restored(&self, pid: u32, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        loop {
            let now = Self::of(pid)?;
            if now == *self {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!(
                    "it held {self:?} before, {now:?} after the copy that failed: {:?}",
                    descriptors(pid)
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// For the figures.
    fn told(&self) -> Value {
        serde_json::json!({
            "descriptors": self.descriptors,
            "threads": self.threads,
            "shared_mappings": self.shared_mappings,
            "rdma": self.rdma,
        })
    }
}

/// What there is of RDMA's objects of this process; nothing where there is no RDMA.
fn rdma_objects(pid: u32) -> Result<BTreeMap<&'static str, usize>> {
    const KINDS: [&str; 4] = ["pd", "cq", "qp", "mr"];
    let mut objects = BTreeMap::new();
    if !Path::new("/sys/class/infiniband").exists() {
        return Ok(objects);
    }
    for kind in KINDS {
        let output = Command::new("rdma")
            .args(["-j", "resource", "show", kind])
            .output()
            .context("run rdma (iproute2)")?;
        let all: Vec<Value> = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("read what rdma says of {kind}: {output:?}"))?;
        let ours = all.iter().filter(|one| one["pid"] == pid).count();
        objects.insert(kind, ours);
    }
    Ok(objects)
}

/// Waits for the victim's death. A guest that writes all the time makes some copies shorter than others: where one is over before so
/// many bytes have gone by, the victim is killed at its end.
fn struck(relay: &Relay, victim: &mut Role, other: &mut Role, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    while victim.runs()? {
        ensure!(other.runs()?, "the other side ended: {}", other.said());
        if victim.said().contains("\"paired\"") {
            relay.strike();
        }
        ensure!(
            Instant::now() < until,
            "it was not killed: {}",
            victim.said()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(relay.has_struck(), "it ended by itself: {}", victim.said());
    Ok(())
}
