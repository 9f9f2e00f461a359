//! A pair in the lab, for what is done to pairs on any two hosts.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::control::status::Status;
use hypervisor::session::report::Event;

use super::choice::words_of_sides;
use super::side::{End, Side};
use super::{Guest, PATIENCE, PORT, Site, address, status_of};
use crate::harness::chaos::{Clock, Ground, Happening, Member, Patience, Said};
use crate::harness::random::Random;
use crate::harness::two_hosts::Which;
use crate::lab::Host;
use crate::lab::switch::Trouble;
use crate::lab::wire::Start;

/// The network of the lab that the pair's own traffic is on.
const LOG_NETWORK: u8 = 0;

/// What can happen here. Nobody reaches into a process's memory in another machine.
pub const HAPPENINGS: [Happening; 17] = [
    Happening::KillPrimary,
    Happening::KillBackup,
    Happening::LosePrimary,
    Happening::LoseBackup,
    Happening::FreezePrimary,
    Happening::FreezeBackup,
    Happening::SuspendPrimary,
    Happening::SuspendBackup,
    Happening::CutLog,
    Happening::DeafenPrimary,
    Happening::DeafenBackup,
    Happening::SlowLog,
    Happening::NoArbiter,
    Happening::Switch,
    Happening::MigrateBackup,
    Happening::MigrateAndKillPrimary,
    Happening::MigrateAndKillBackup,
];

/// A process in a host, and all that it has said.
#[derive(Debug)]
pub struct Remote {
    side: Side,
    events: RefCell<String>,
}

impl Remote {
    fn start(host: &Host<'_>, words: &[String]) -> Result<Self> {
        Ok(Self {
            side: Side::start(host, words, PATIENCE)?,
            events: RefCell::default(),
        })
    }

    fn wait_for(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<()> {
        let events = self.events.get_mut();
        let waited = self
            .side
            .wait_for(what, PATIENCE, wanted, |event| note(events, &event));
        let (_, event) = waited?;
        note(events, &event);
        Ok(())
    }
}

/// As it came: one JSON object a line.
fn note(events: &mut String, event: &Event) {
    let line = serde_json::to_string(event).expect("an event is JSON");
    events.push_str(&line);
    events.push('\n');
}

impl Member for Remote {
    fn runs(&mut self) -> Result<bool> {
        let events = self.events.get_mut();
        self.side.events(|event| note(events, &event));
        Ok(self.side.end().is_none())
    }

    fn end(&mut self, longest: Duration) -> Result<Option<i32>> {
        let events = self.events.get_mut();
        let end = self.side.await_end(longest, |event| note(events, &event))?;
        Ok(match end {
            // Ended by a signal, as a shell tells it.
            End::Code(code) => (code < 128).then_some(code),
            End::Gone(_) => None,
        })
    }

    fn said(&self) -> String {
        self.events.borrow().clone() + &self.side.messages()
    }
}

/// The site, and what the machine is called and its log goes by there.
#[derive(Debug)]
pub struct LabGround<'a> {
    /// The hosts.
    pub site: &'a Site,
    /// What carries the log.
    pub transport: Transport,
    /// The machine's name.
    pub name: String,
}

fn host_name(which: Which) -> &'static str {
    match which {
        Which::A => "h1",
        Which::B => "h2",
    }
}

impl LabGround<'_> {
    fn host(&self, which: Which) -> Host<'_> {
        self.site.lab.host(host_name(which))
    }

    /// Starts a role of the pair there, on a port of the guest's network of its own, so that two may be in one host.
    fn start(&self, on: Which, name: &str, role: &str, more: &[String]) -> Result<Remote> {
        let host = self.host(on);
        let number = name.split('-').next().unwrap_or_default();
        let tap = format!("tap{}{number}", self.transport.name());
        let plugged =
            format!("ip tuntap add dev {tap} mode tap && ip link set {tap} master br0 up");
        host.sh(&plugged, PATIENCE)?;
        let standby = format!("{}:{PORT}", address(host_name(on.other())));
        let mut words = vec!["doppel".to_owned(), role.to_owned()];
        words.extend(words_of_sides(self.transport, &self.name, &tap));
        words.extend(["--standby".into(), standby]);
        words.extend(more.iter().cloned());
        Remote::start(&host, &words)
    }

    fn signal(&self, on: Which, member: &Remote, name: &str) -> Result<()> {
        let pid = member.side.pid().to_string();
        let sent = self.host(on).run(&["kill", name, &pid], PATIENCE)?;
        ensure!(sent.code == 0, "process {pid} took no signal {name}");
        Ok(())
    }

    /// What is wrong with the log's network in the direction from this host to the other.
    fn trouble(&self, from: Which, trouble: Trouble) -> Result<()> {
        let (from, to) = (host_name(from), host_name(from.other()));
        self.site.lab.cable(Some(LOG_NETWORK), from, to, trouble)
    }
}

/// Nothing comes through, or everything.
fn cut(cut: bool) -> Trouble {
    Trouble {
        cut,
        ..Trouble::default()
    }
}

impl Ground for LabGround<'_> {
    type Member = Remote;

    fn name(&self) -> &str {
        &self.name
    }

    fn patience(&self) -> Patience {
        Patience {
            // A host is booted, and a machine copied to it, in an emulator that shares two cores.
            settle: 2 * PATIENCE,
            step: PATIENCE,
            look: Duration::from_millis(200),
            // Nobody is given up before two seconds here.
            spans: 5,
        }
    }

    fn arbiter(&self) -> PathBuf {
        self.site.lab.shared().join("arbiter")
    }

    fn start_primary(&self, name: &str) -> Result<Remote> {
        let mut words = vec![
            "--connect".to_owned(),
            format!("{}:{PORT}", address(host_name(Which::B))),
            "--memory".to_owned(),
            "32".to_owned(),
        ];
        words.extend(Guest::Bare("kv").options());
        self.start(Which::A, name, "primary", &words)
    }

    fn start_backup(
        &self,
        on: Which,
        name: &str,
        port: Option<u16>,
    ) -> Result<(Remote, SocketAddr)> {
        let listen = format!("{}:{}", address(host_name(on)), port.unwrap_or(PORT));
        let words = ["--listen".to_owned(), listen.clone()];
        let mut remote = self.start(on, name, "backup", &words)?;
        remote.wait_for("listens", |event| matches!(event, Event::Ready { .. }))?;
        Ok((remote, listen.parse().context("an address of the lab")?))
    }

    fn status(&self, on: Which, member: &Remote) -> Option<Status> {
        status_of(&self.host(on), member.side.pid())
    }

    fn order(&self, on: Which, words: &[&str]) -> Result<Said> {
        let done = self.host(on).run(&self.words(words), PATIENCE)?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(match done.code {
            0 => Ok(said(&done.stdout)),
            1 => Err(said(&done.stderr)),
            code => bail!("{words:?}: {code}: {}", said(&done.stderr)),
        })
    }

    fn order_and(
        &self,
        on: Which,
        words: &[&str],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let session = self.host(on).session(&Start::new(&self.words(words)))?;
        session.no_input();
        meanwhile()?;
        session.finish(PATIENCE).map(drop)
    }

    fn kill(&self, on: Which, member: &Remote) -> Result<()> {
        self.signal(on, member, "-9")
    }

    fn lose(&self, on: Which, _: &Remote) -> Result<()> {
        self.host(on).kill()
    }

    fn mend(&self, on: Which) -> Result<()> {
        self.site.start(host_name(on))
    }

    fn freeze(&self, on: Which, member: &Remote, still: bool) -> Result<()> {
        self.signal(on, member, if still { "-STOP" } else { "-CONT" })
    }

    fn suspend(&self, on: Which, still: Option<Clock>) -> Result<()> {
        let host = self.host(on);
        match still {
            Some(Clock::GoesOn) => host.freeze(),
            Some(Clock::Stands) => host.freeze_with_clock(),
            None => host.thaw(),
        }
    }

    fn dismiss(&self, on: Which, member: &mut Remote) -> Result<()> {
        self.signal(on, member, "-TERM")?;
        let code = member.end(PATIENCE)?;
        ensure!(code == Some(0), "it ended with {code:?}: {}", member.said());
        Ok(())
    }

    fn join_log(&self, joined: bool) -> Result<()> {
        [Which::A, Which::B]
            .into_iter()
            .try_for_each(|from| self.trouble(from, cut(!joined)))
    }

    fn deafen(&self, which: Which, deaf: bool) -> Result<()> {
        self.trouble(which.other(), cut(deaf))
    }

    fn slow(&self, which: Which, slow: bool) -> Result<()> {
        let trouble = Trouble {
            delay: Duration::from_millis(if slow { 50 } else { 0 }),
            ..Trouble::default()
        };
        self.trouble(which, trouble)
    }

    fn corrupt(&self, _: &mut Remote, _: &mut Random) -> Result<()> {
        bail!("nobody reaches into a process's memory in another machine")
    }
}

impl LabGround<'_> {
    fn words<'w>(&'w self, words: &[&'w str]) -> Vec<&'w str> {
        let mut all = vec!["doppel", words[0], &self.name];
        all.extend(&words[1..]);
        all
    }
}
