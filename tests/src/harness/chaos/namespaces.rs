//! A pair on two hosts of this machine: network namespaces joined by cables.
#![forbid(unsafe_code)]

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypervisor::control::status::Status;

use super::{Ground, Happening, Member, Patience, Said};
use crate::harness::operator::Operator;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::harness::two_hosts::{TwoHosts, Which};

/// What the machine is called.
const NAME: &str = "machine";

const PATIENCE: Patience = Patience {
    settle: Duration::from_secs(30),
    step: Duration::from_secs(20),
    look: Duration::from_millis(10),
    spans: 1,
};

/// What can happen here.
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

/// The hosts, and the machine's operator.
#[derive(Debug)]
pub struct Namespaces {
    hosts: TwoHosts,
    operator: Operator,
}

impl Namespaces {
    /// New hosts. The calling thread is in their world from now on.
    ///
    /// # Errors
    /// As [`TwoHosts::enter`].
    pub fn enter() -> Result<Self> {
        let hosts = TwoHosts::enter()?;
        let operator = Operator::of(hosts.directory().join("run"), NAME);
        Ok(Self { hosts, operator })
    }
}

impl Member for Role {
    fn runs(&mut self) -> Result<bool> {
        Self::runs(self)
    }

    fn end(&mut self, longest: Duration) -> Result<Option<i32>> {
        Ok(Self::end(self, longest)?.code())
    }

    fn said(&self) -> String {
        Self::said(self)
    }
}

impl Ground for Namespaces {
    type Member = Role;

    fn name(&self) -> &str {
        NAME
    }

    fn patience(&self) -> Patience {
        PATIENCE
    }

    fn arbiter(&self) -> PathBuf {
        self.hosts.directory().join("arbiter")
    }

    fn start_primary(&self, name: &str) -> Result<Role> {
        let connect = Which::B.listens().to_string();
        let guest = ["--guest", "kv", "--memory", "64"];
        let words = ["--connect", &connect, "--cold-start"];
        let address = ["--command-line", "ip=10.77.0.2/24"];
        let words = [&words[..], &guest, &address].concat();
        self.hosts.start(Which::A, name, "primary", &words)
    }

    fn start_backup(&self, on: Which, name: &str, port: Option<u16>) -> Result<(Role, SocketAddr)> {
        let (mut role, address) = match port {
            Some(port) => self.hosts.backup_at(on, name, port, &[])?,
            None => (self.hosts.backup(on, name)?, on.listens()),
        };
        role.until("\"address\"", PATIENCE.step)?;
        Ok((role, address))
    }

    fn status(&self, _: Which, role: &Role) -> Option<Status> {
        self.operator.status(role.pid()).ok()
    }

    fn order(&self, _: Which, words: &[&str]) -> Result<Said> {
        let output = self.operator.order(words)?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(match output.status.code() {
            Some(0) => Ok(said(&output.stdout)),
            Some(1) => Err(said(&output.stderr)),
            _ => bail!("{words:?}: {}: {}", output.status, said(&output.stderr)),
        })
    }

    fn order_and(
        &self,
        _: Which,
        words: &[&str],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut order = self.operator.begin(words)?;
        meanwhile()?;
        order.wait().context("wait for doppel").map(drop)
    }

    fn kill(&self, _: Which, role: &Role) -> Result<()> {
        send(role.pid(), Signal::Kill)
    }

    fn lose(&self, on: Which, role: &Role) -> Result<()> {
        self.hosts.lose(on, role)
    }

    fn mend(&self, on: Which) -> Result<()> {
        self.hosts.mend(on)
    }

    fn freeze(&self, _: Which, role: &Role, still: bool) -> Result<()> {
        let signal = if still {
            Signal::Stop
        } else {
            Signal::Continue
        };
        send(role.pid(), signal)
    }

    fn dismiss(&self, _: Which, role: &mut Role) -> Result<()> {
        role.stop(PATIENCE.step)
    }

    fn join_log(&self, joined: bool) -> Result<()> {
        self.hosts.join_log(joined)
    }

    fn deafen(&self, which: Which, deaf: bool) -> Result<()> {
        self.hosts.deafen(which, deaf)
    }

    fn slow(&self, which: Which, slow: bool) -> Result<()> {
        self.hosts.slow(which, slow)
    }

    fn corrupt(&self, role: &mut Role, random: &mut Random) -> Result<()> {
        corrupt(role, random)
    }
}

/// What the ring's memory is called, as the kernel shows it.
const RING: &str = "memfd:rdma-log-tcp";

/// How long the log's bytes are being changed: entries are in memory for less than a millisecond before they are replayed, so most of what
/// is changed is of no more use or not there yet.
const CORRUPTED_FOR: Duration = Duration::from_millis(400);

/// Places that are changed at once.
const SPOTS: u32 = 1000;

/// Changes bytes of the events lane in a backup's memory, for some time or until that has ended by it.
fn corrupt(role: &mut Role, random: &mut Random) -> Result<()> {
    let pid = role.pid();
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
                return role.end(PATIENCE.step).map(drop);
            }
        }
    }
    Ok(())
}
