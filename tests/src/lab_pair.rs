//! A pair across two hosts of the lab, and its clients on this machine.
//!
//! ```text
//!  client ── 127.0.0.1 ── gateway's TCP/IP ── link ── plug ── network 1 ─┬─ h1: eth1 ── bridge ── TAP ── guest
//!                                                                        └─ h2: eth1 ── bridge ── TAP ── guest
//!  log (RDMA over eth0, or TCP), control, heartbeats: network 0                     arbiter: /shared
//! ```
//! A host that was killed and started again has nothing of its earlier life, so it is [equipped](Site::equip) anew.
#![forbid(unsafe_code)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::link;
use hypervisor::backends::tap::Ipv4Network;
use hypervisor::backends::wait::Moment;
use hypervisor::control::status::Status;
use hypervisor::demo::client::{self, Client, Outcome, Verification};
use hypervisor::demo::gateway::{self, Gateway, LinkHost};
use hypervisor::demo::heard::{Heard, Live};
use hypervisor::handshake::Secret;
use hypervisor::session::report::Event;

pub use self::choice::{Choice, Guest};
use self::side::{End, Side};
use crate::harness::requests::Asker;
use crate::harness::{built, program};
use crate::lab::ping::Pinger;
use crate::lab::plug::{Carrier, Kept};
use crate::lab::{Host, Lab, Spec};

pub mod choice;
pub mod demo;
pub mod ground;
pub mod side;
pub mod storage;

/// The guest's address.
pub const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379);

/// The guest's Ethernet address, as every machine has it.
const GUEST_MAC: [u8; 6] = [0x02, 0xd0, 0x99, 0xe1, 0, 1];

const GATEWAY: LinkHost = LinkHost {
    address: Ipv4Network {
        address: Ipv4Addr::new(10, 77, 0, 1),
        prefix: 24,
    },
    mac: [0x02, 0xd0, 0x99, 0xe1, 0, 2],
    mtu: 1500,
};

/// The network of the lab that the guest is on.
const GUEST_NETWORK: u8 = 1;

/// The port that a backup listens at.
const PORT: u16 = 7700;

/// For each step of a side: many times what it takes in a host that is emulated on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What sides are told of their times. A virtual CPU of an emulated host stands still whenever this machine has something else to
/// do, for tenths of a second where it is busy, so nobody is given up before two seconds; and the primary does not wait
/// for a backup that is late within what the design allows.
pub(crate) const TIMES: &str =
    "[timing]\nheartbeat_ms = 50\nsilence_ms = 2000\nlag_ms = 100\nmemory_check_ms = 500\n";

/// How often sides compare their memory: `memory_check_ms` of [`TIMES`].
pub const MEMORY_CHECK: Duration = Duration::from_millis(500);

/// Two hosts with what a pair needs, and the way from this machine to its guest.
#[derive(Debug)]
pub struct Site {
    lab: Lab,
    gateway: Gateway,
    _carrier: Carrier,
}

/// What a host has: the programs, and a bridge to the guests' network.
pub(crate) const EQUIPPED: &str = "set -e
cp /shared/bin/* /usr/bin/
modprobe bridge
ip link add br0 type bridge forward_delay 0
ip address flush dev eth1
ip link set eth1 master br0
ip link set br0 up";

/// What the sides of a pair, and a site's agents, have in common.
pub(crate) const SECRET: &str = "
cp /shared/pair.secret /etc/pair.secret
chmod 600 /etc/pair.secret";

/// A host's part of the guest's network: a TAP of the same name as on every host, which outlives its process as a network card does.
pub(crate) const PLUGGED: &str = "
ip tuntap add dev doppel0 mode tap
ip link set doppel0 master br0 up";

impl Site {
    /// Boots it, with hosts of so much memory.
    ///
    /// # Errors
    /// If there is no lab, or something for it cannot be built.
    pub fn set_up(name: &str, memory_mib: u32) -> Result<Self> {
        Self::of(&Spec {
            name: name.into(),
            memory_mib,
            ..Spec::default()
        })
    }

    /// The same, of a lab of two hosts.
    ///
    /// # Errors
    /// As above.
    pub fn of(spec: &Spec) -> Result<Self> {
        let made = [program::doppel()?, built::verbs()?];
        let lab = Lab::own(spec)?;
        for path in &made {
            lab.share_program(path)?;
        }
        fs::write(lab.shared().join("times.toml"), TIMES).context("write a configuration")?;
        fs::create_dir_all(lab.shared().join("arbiter")).context("make a directory")?;
        Secret::create(&lab.shared().join("pair.secret"))?;
        let (ours, theirs) = link::pair()?;
        let carrier = lab.plug(GUEST_NETWORK)?.carry(theirs)?;
        let gateway = Gateway::over_link(gateway::bind(0)?, ours, GATEWAY, GUEST)?;
        let site = Self {
            lab,
            gateway,
            _carrier: carrier,
        };
        for host in HOSTS {
            site.equip(host)?;
        }
        Ok(site)
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Where clients on this machine reach the guest.
    #[must_use]
    pub fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.gateway.address().port())
    }

    /// Gives a host that was just booted the programs, and the guest's network its bridge.
    ///
    /// # Errors
    /// What the host says.
    pub fn equip(&self, host: &str) -> Result<()> {
        let line = [EQUIPPED, SECRET, PLUGGED].concat();
        self.lab.host(host).sh(&line, PATIENCE).map(drop)
    }

    /// Boots a host that was killed, and equips it.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(&self, host: &str) -> Result<()> {
        self.lab.host(host).start()?;
        self.equip(host)
    }

    /// Shows what the guest sends from this host from now on.
    ///
    /// # Errors
    /// If the lab does not.
    pub fn frames_of(&self, host: &str) -> Result<Kept> {
        self.lab.watch(host, GUEST_NETWORK)?.keep(GUEST_MAC)
    }

    /// A card of its own on the guests' network, which pings the guest.
    ///
    /// # Errors
    /// If the lab has no room for it.
    pub fn pinger(&self) -> Result<Pinger> {
        let asker = Asker {
            mac: [0x02, 0xd0, 0x99, 0xe1, 0, 3],
            address: [10, 77, 0, 3],
        };
        Ok(Pinger::new(self.lab.plug(GUEST_NETWORK)?, asker))
    }

    /// Clients of the guest, at work.
    ///
    /// # Errors
    /// If the guest does not serve.
    pub fn clients(&self, seed: u64, connections: usize) -> Result<Client> {
        let config = client::Config {
            connections,
            // A Linux guest boots first, and is protected while it does.
            connect_within: 3 * PATIENCE,
            drain_within: PATIENCE,
            ..client::Config::new(self.address(), seed)
        };
        Ok(client::start(config)?)
    }

    /// Ends the clients, reads back all that they were promised, and says what they saw: an error, with `what` was done, if an
    /// acknowledged write is lost, a reply was wrong or a connection broke.
    ///
    /// # Errors
    /// What does not hold.
    pub fn judge(&self, client: Client, what: &str) -> Result<(Outcome, Verification)> {
        let mut outcome = client.stop()?;
        let verified = outcome.verify_all(self.address(), PATIENCE);
        let what = format!("{what}: {verified:?}");
        ensure!(
            verified.lost_acknowledged_writes == 0 && verified.wrong_keys == 0,
            "acknowledged writes were lost, {what}"
        );
        ensure!(outcome.wrong_replies == 0, "replies were wrong, {what}");
        ensure!(
            verified.broken_connections == 0,
            "connections broke, {what}"
        );
        ensure!(verified.keys > 0, "nothing could be read back, {what}");
        Ok((outcome, verified))
    }
}

/// The two hosts.
const HOSTS: [&str; 2] = ["h1", "h2"];

/// The other one.
#[must_use]
pub fn other(host: &str) -> &'static str {
    if host == HOSTS[0] { HOSTS[1] } else { HOSTS[0] }
}

/// The address of a host on the pair's network.
fn address(host: &str) -> String {
    format!("10.88.0.{}", host.trim_start_matches('h'))
}

/// A pair: a primary in one host, its backup in the other.
#[derive(Debug)]
pub struct LabPair<'a> {
    site: &'a Site,
    options: Vec<String>,
    /// The side that serves.
    pub primary: Side,
    /// The side that follows.
    pub backup: Side,
    /// What all sides have said.
    pub heard: Heard,
}

impl<'a> LabPair<'a> {
    /// Starts the primary in `h1` and the backup in `h2`, and waits until they are paired.
    ///
    /// # Errors
    /// What the sides say.
    pub fn start(site: &'a Site, choice: &Choice<'_>) -> Result<Self> {
        let options = choice.of_sides();
        let [first, second] = HOSTS.map(|host| site.lab.host(host));
        let mut backup = start_backup(&second, &options)?;
        let standby = format!("{}:{PORT}", address(HOSTS[1]));
        let mut primary = choice.start_primary(&first, &["--connect", &standby])?;
        let mut heard = Heard::default();
        for side in [&mut primary, &mut backup] {
            side.wait_for("is paired", PATIENCE, is_paired, |event| heard.hear(event))?;
        }
        Ok(Self {
            site,
            options,
            primary,
            backup,
            heard,
        })
    }

    fn host_of(&self, side: &Side) -> Host<'a> {
        self.site.lab.host(side.host())
    }

    /// The host of the primary.
    #[must_use]
    pub fn primary_host(&self) -> Host<'a> {
        self.host_of(&self.primary)
    }

    /// What the primary says of itself.
    ///
    /// # Errors
    /// If it says nothing.
    pub fn primary_status(&self) -> Result<Status> {
        let status = status_of(&self.primary_host(), self.primary.pid());
        status.context("the primary does not say how it is")
    }

    /// Sends a signal to a side's process: whether it was there.
    fn signal(&self, side: &Side, name: &str) -> Result<bool> {
        let pid = side.pid().to_string();
        let sent = self.host_of(side).run(&["kill", name, &pid], PATIENCE)?;
        Ok(sent.code == 0)
    }

    /// SIGKILL to the primary's process; its host lives on.
    ///
    /// # Errors
    /// If it cannot be sent.
    pub fn kill_process(&self) -> Result<()> {
        let killed = self.signal(&self.primary, "-9")?;
        ensure!(killed, "the primary was not there to be killed");
        Ok(())
    }

    /// SIGKILL to both, the backup first, which would serve otherwise; and their ends.
    ///
    /// # Errors
    /// If one was not there.
    pub fn kill_both(&mut self) -> Result<()> {
        let killed = self.signal(&self.backup, "-9")?;
        ensure!(killed, "the backup was not there to be killed");
        self.backup.await_end(PATIENCE, drop)?;
        self.kill_process()?;
        self.primary.await_end(PATIENCE, drop).map(drop)
    }

    /// Takes in what both sides have said.
    pub fn listen(&mut self) {
        for side in [&mut self.primary, &mut self.backup] {
            side.events(|event| self.heard.hear(event));
        }
    }

    /// An error if the pair is not what it was: a side has ended, or said that it serves alone.
    ///
    /// # Errors
    /// What they said.
    pub fn ensure_paired(&mut self) -> Result<()> {
        let before = self.heard.notices.len();
        self.listen();
        let alone = self.heard.notices[before..]
            .iter()
            .find(|notice| notice.contains("UNPROTECTED"));
        if self.primary.end().is_some() || self.backup.end().is_some() || alone.is_some() {
            bail!(
                "the pair has parted before anything was done to it: {:#?}\nthe primary said:\n{}\nthe backup said:\n{}",
                self.heard.notices,
                self.primary.messages(),
                self.backup.messages()
            );
        }
        Ok(())
    }

    /// Waits until the backup has taken over: when its word came, and what it says.
    ///
    /// # Errors
    /// If it does not.
    pub fn await_live(&mut self) -> Result<(Moment, Live)> {
        let live = |event: &Event| matches!(event, Event::Live { .. });
        let heard = &mut self.heard;
        let waited = self
            .backup
            .wait_for("is live", PATIENCE, live, |event| heard.hear(event));
        let (at, event) = waited
            .with_context(|| format!("the old primary said:\n{}", self.primary.messages()))?;
        self.heard.hear(event);
        let live = self.heard.live.context("it was heard")?;
        ensure!(
            self.heard.divergences == 0,
            "a backup diverged: {:?}",
            self.heard.problems
        );
        Ok((at, live))
    }

    /// The old primary is gone and its backup serves: a new backup in the old primary's host joins it, and the sides have new names.
    /// What the new backup cost, as its primary says.
    ///
    /// # Errors
    /// What the sides say.
    pub fn rejoin(&mut self) -> Result<Event> {
        let host = self.primary_host();
        let backup = start_backup(&host, &self.options)?;
        let survivor = std::mem::replace(&mut self.backup, backup);
        let mut gone = std::mem::replace(&mut self.primary, survivor);
        gone.events(|event| self.heard.hear(event));
        let heard = &mut self.heard;
        let joined = |event: &Event| matches!(event, Event::Joined { .. });
        let joining = self
            .primary
            // Its description, and memory that clients write meanwhile.
            .wait_for("is joined by a backup", 3 * PATIENCE, joined, |event| {
                heard.hear(event)
            });
        let (_, joined) =
            joining.with_context(|| format!("the new backup said:\n{}", self.backup.messages()))?;
        for side in [&mut self.primary, &mut self.backup] {
            side.wait_for("is paired", PATIENCE, is_paired, |event| heard.hear(event))?;
        }
        Ok(joined)
    }

    /// An error if any backup has diverged, by all that was said.
    ///
    /// # Errors
    /// What was said of it.
    pub fn ensure_none_diverged(&mut self) -> Result<()> {
        self.listen();
        ensure!(
            self.heard.divergences == 0,
            "a backup diverged: {:?}",
            self.heard.problems
        );
        Ok(())
    }

    /// Ends the survivor, which has no backup.
    ///
    /// # Errors
    /// If it does not end.
    pub fn end_survivor(&mut self) -> Result<()> {
        self.signal(&self.backup, "-TERM")?;
        self.backup.await_end(PATIENCE, drop).map(drop)
    }

    /// Ends both sides, and says with what codes.
    ///
    /// # Errors
    /// If one does not end.
    pub fn stop(mut self) -> Result<[End; 2]> {
        self.signal(&self.primary, "-TERM")?;
        let primary = self.primary.await_end(PATIENCE, drop)?;
        // It has ended by itself when its primary was told to end.
        self.signal(&self.backup, "-TERM")?;
        Ok([primary, self.backup.await_end(PATIENCE, drop)?])
    }
}

/// What a process of a host says of itself.
fn status_of(host: &Host<'_>, pid: u32) -> Option<Status> {
    let told = host.run(&["doppel", "status", "--json"], PATIENCE).ok()?;
    let all: Vec<serde_json::Value> = serde_json::from_slice(&told.stdout).ok()?;
    let mut all = all.into_iter().flat_map(serde_json::from_value::<Status>);
    all.find(|status| status.pid == pid)
}

fn is_paired(event: &Event) -> bool {
    matches!(event, Event::Paired { .. })
}

/// A backup that listens, and that will look in the other host when it is the primary.
fn start_backup(host: &Host<'_>, options: &[String]) -> Result<Side> {
    let name = host.name();
    let mut words = vec!["doppel".to_owned(), "backup".to_owned()];
    words.extend(options.iter().cloned());
    words.extend(["--listen".into(), format!("{}:{PORT}", address(name))]);
    words.extend([
        "--standby".into(),
        format!("{}:{PORT}", address(other(name))),
    ]);
    let mut side = Side::start(host, &words, PATIENCE)?;
    let listens = |event: &Event| matches!(event, Event::Ready { .. });
    side.wait_for("listens", PATIENCE, listens, drop)?;
    Ok(side)
}

/// Waits until clients have had so many more answers. When the first of them came, at the latest.
///
/// # Errors
/// If they do not come.
pub fn await_answers(client: &Client, more: u64, longest: Duration) -> Result<Moment> {
    let until = Instant::now() + longest;
    let before = client.progress().completed;
    let mut first = None;
    loop {
        let progress = client.progress();
        if progress.completed > before {
            first.get_or_insert(progress.last_reply);
        }
        if let Some(first) = first
            && progress.completed >= before + more
        {
            return Ok(first);
        }
        ensure!(
            Instant::now() < until,
            "clients had {} answers in {longest:?}, not {more}; {} of their connections are broken",
            progress.completed - before,
            progress.broken_connections
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_how_often_they_compare_their_memory() {
        let told = format!("memory_check_ms = {}\n", MEMORY_CHECK.as_millis());
        assert!(TIMES.contains(&told), "{TIMES}");
    }
}
