//! What promises do to a site of three hosts, wherever those are: in namespaces of this machine, or emulated.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::etcd::Etcd;
use crate::harness::linear_clients::LinearClients;
use crate::harness::program;
use crate::harness::random::Random;

/// How many hosts there are.
pub const HOSTS: usize = 3;

/// Their names.
pub const NAMES: [&str; HOSTS] = ["a", "b", "c"];

/// Every host.
pub const ALL: [usize; HOSTS] = [0, 1, 2];

/// The machines that promises have, and where their guests answer.
pub const MACHINES: [(&str, SocketAddrV4); 2] = [
    ("one", SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379)),
    ("two", SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 3), 6379)),
];

/// Connections to each: as many operations can be under way at once.
const CLIENTS: u32 = 4;

/// Answers that show that a machine serves.
pub const ANSWERS: u64 = 100;

/// Hosts with an agent each, an etcd, and the calling thread in the world around them.
pub trait SiteGround {
    /// The records' place, and the arbiter.
    fn etcd(&self) -> &Etcd;

    /// How long a host is taken for a member after its agent's last word.
    fn lease(&self) -> Duration;

    /// A bound for what takes seconds on an idle machine.
    fn patience(&self) -> Duration;

    /// How long a client may wait for an answer.
    fn answer_within(&self) -> Duration;

    /// A configuration for `doppel vm` in the world, as if it were said on this host.
    fn config(&self, at: usize) -> PathBuf;

    /// Starts a host's agent, of a program that was installed in the place of the one before: roles of that run on.
    ///
    /// # Errors
    /// If it does not start.
    fn start_agent(&mut self, at: usize) -> Result<()>;

    /// SIGKILL to a host's agent, if it runs: what it has started runs on.
    ///
    /// # Errors
    /// If it cannot be sent.
    fn kill_agent(&mut self, at: usize) -> Result<()>;

    /// Ends an agent well.
    ///
    /// # Errors
    /// If it does not end, or not well.
    fn stop_agent(&mut self, at: usize) -> Result<()>;

    /// Waits until a host's agent, the one that runs now, has said this.
    ///
    /// # Errors
    /// If it does not.
    fn agent_says(&mut self, at: usize, word: &str) -> Result<()>;

    /// How many processes of ours a host has: its agent, and roles.
    ///
    /// # Errors
    /// If it does not tell.
    fn running(&self, at: usize) -> Result<usize>;

    /// The host is lost, silently.
    ///
    /// # Errors
    /// If that cannot be done to it.
    fn lose(&mut self, at: usize) -> Result<()>;

    /// It comes back, as a host that has booted: its agent runs, and nothing else.
    ///
    /// # Errors
    /// If it does not.
    fn mend(&mut self, at: usize) -> Result<()>;

    /// What everybody has said: for a failure's report.
    fn said(&self) -> String;

    /// `doppel vm` with these words, as if said on this host; what it printed.
    ///
    /// # Errors
    /// If it does not end well.
    fn vm(&self, at: usize, words: &[&str]) -> Result<String> {
        let mut command = Command::new(program::doppel()?);
        command.arg("vm").args(words);
        if !words.contains(&"--within") {
            let within = self.patience().as_secs().to_string();
            command.args(["--within", &within]);
        }
        let output = command.arg("--config").arg(self.config(at)).output();
        let output = output.context("start doppel vm")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "doppel vm {}: {}: {said}",
            words.join(" "),
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A machine, as `doppel vm show --json` has it.
    ///
    /// # Errors
    /// If there is none.
    fn show(&self, machine: &str) -> Result<Value> {
        let text = self.vm(0, &["show", machine, "--json"])?;
        serde_json::from_str(&text).context("read a machine's JSON")
    }

    /// The host that serves a machine.
    ///
    /// # Errors
    /// If none does.
    fn serves(&self, machine: &str) -> Result<usize> {
        let shown = self.show(machine)?;
        let at = NAMES.iter().position(|host| shown["served_by"] == *host);
        at.with_context(|| format!("nobody serves {machine}: {shown:#}"))
    }

    /// Waits until a machine is protected, with its sides on two hosts that are no others than these; what it is then.
    ///
    /// # Errors
    /// If it is not in time.
    fn until_protected(&self, machine: &str, on: &[usize]) -> Result<Value> {
        let until = Instant::now() + self.patience();
        loop {
            let now = self.show(machine)?;
            let place = |side: &str| on.iter().copied().find(|at| now[side] == NAMES[*at]);
            if now["protected"] == true
                && let (Some(serves), Some(follows)) = (place("served_by"), place("followed_by"))
            {
                ensure!(serves != follows, "both sides of {machine} are on one host");
                return Ok(now);
            }
            if Instant::now() >= until {
                bail!("{machine} is not protected: {now:#}\n{}", self.said());
            }
            std::thread::sleep(Duration::from_millis(150));
        }
    }

    /// Waits until a host is a member again.
    ///
    /// # Errors
    /// If it is not in time.
    fn until_member(&self, at: usize) -> Result<()> {
        let until = Instant::now() + self.patience();
        loop {
            let hosts: Value = serde_json::from_str(&self.vm(0, &["hosts", "--json"])?)?;
            let hosts = hosts.as_array().context("no hosts")?;
            if hosts.iter().any(|host| host["name"] == NAMES[at]) {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "host {} is no member again",
                NAMES[at]
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Makes both machines, from different hosts, and has clients talk to them.
    ///
    /// # Errors
    /// If they are not protected in time.
    fn create_machines(&self, random: &mut Random) -> Result<Vec<LinearClients>> {
        for (from, (name, address)) in MACHINES.iter().enumerate() {
            let words = format!("--command-line=ip={}/24", address.ip());
            let create = ["create", name, "--guest", "kv", "--memory", "32", &words];
            let said = self.vm(from, &create)?;
            ensure!(
                said == format!("{name}: protected\n"),
                "create said {said:?}"
            );
            self.until_protected(name, &ALL)?;
        }
        let refused = self.vm(2, &["create", "one", "--guest", "kv"]);
        ensure!(refused.is_err(), "one name was given twice");
        let start = |address| {
            LinearClients::start_patient(address, CLIENTS, random.next(), self.answer_within())
        };
        MACHINES
            .map(|(_, address)| address)
            .map(start)
            .into_iter()
            .collect()
    }

    /// Everything ends by command, and nothing is left.
    ///
    /// # Errors
    /// If something is.
    fn turn_off(&mut self) -> Result<()> {
        for (name, _) in MACHINES {
            ensure!(
                self.vm(1, &["delete", name]).is_err(),
                "a machine that runs was deleted"
            );
            let said = self.vm(1, &["stop", name])?;
            ensure!(said == format!("{name}: off\n"), "{said:?}");
            let off = self.show(name)?;
            ensure!(off["state"] == "stopped", "{off:#}");
            self.vm(0, &["delete", name])?;
        }
        for at in ALL {
            self.stop_agent(at)?;
            let left = self.running(at)?;
            ensure!(left == 0, "host {} still has {left} processes", NAMES[at]);
        }
        Ok(())
    }
}
