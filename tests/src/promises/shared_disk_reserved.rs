//! One disk for both hosts that itself keeps the old one out (issue 7): Linux's own SCSI target, by iSCSI, with persistent reservations. Whatever becomes
//! of a primary or of its host, the disk takes nothing of it from the moment at which its heir has it, and what was flushed is there.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::intervals::Replication;
use serde_json::{Value, json};

use crate::harness::disk_guest::flushed_in;
use crate::harness::random::Random;
use crate::lab::{Host, Spec};
use crate::lab_pair::side::{End, Side};
use crate::lab_pair::storage::{DEVICE, Storage};
use crate::lab_pair::{Choice, Guest, LabPair, PATIENCE, Site};
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "shared-disk-reserved",
    line: "One disk for two hosts, with persistent reservations: a primary that is killed, frozen or lost with its host is kept out by the disk itself from the moment its heir has it, and what was flushed is there",
    short: Duration::from_secs(150),
    full: Duration::from_secs(1200),
    show,
};

/// Bytes of the disk: more than the guest uses, and the mark.
const DISK: u64 = 4 << 20;

/// Where a side's console goes, in its host.
const CONSOLE: &str = "/tmp/console";

/// What a machine flushes anew after it was started again.
const ROUNDS_AGAIN: u64 = 8;

/// How many writes of old primaries that ran on the disk has refused.
const REFUSED: &str = "writes_of_the_old_refused";

/// What becomes of a primary.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// Its process is killed.
    Killed,
    /// It stands still, and runs on when its heir has the disk.
    Frozen,
    /// Its host stands still, clock and all, and runs on when its heir has the disk.
    Suspended,
    /// Its host has lost its power.
    Lost,
}

const BLOWS: [Blow; 4] = [Blow::Killed, Blow::Frozen, Blow::Suspended, Blow::Lost];

/// How a machine ends whose disk is to be found again.
#[derive(Clone, Copy, Debug)]
enum Ending {
    PoweredOff,
    BothKilled,
}

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let mut refused = 0;
    let site = Site::of(&Spec {
        name: "promise-disk-reserved".into(),
        hosts: 3,
        memory_mib: 1024,
        ..Spec::default()
    })?;
    let disk = Storage::serve(site.lab(), "h3", DISK, &["h1", "h2"])?;
    run.say("three hosts are up, and two have the third one's disk");
    // Over RDMA in full: the disk's fence is the same.
    let cases = [
        (Transport::Tcp, Replication::Replay, Ending::BothKilled),
        (Transport::Tcp, Replication::Checkpoint, Ending::PoweredOff),
        (Transport::Rdma, Replication::Replay, Ending::PoweredOff),
        (Transport::Rdma, Replication::Checkpoint, Ending::BothKilled),
    ];
    for (transport, replicate, ending) in &cases[..run.form.pick(2, 4)] {
        let name = format!("{}-{}", replicate.name(), transport.name());
        let machine = Machine {
            run,
            site: &site,
            disk: &disk,
            name: format!("promise-{name}"),
            transport: *transport,
            replicate: *replicate,
            known: 0,
            refused: 0,
        };
        // Nothing is left of the machine before.
        disk.wipe("h1")?;
        for host in ["h1", "h2"] {
            forget_console(&site.lab().host(host))?;
        }
        let outcome = machine
            .outlive(run.form.count(1, 5), *ending, &mut random)
            .with_context(|| name.clone())?;
        refused += outcome[REFUSED].as_u64().unwrap_or_default();
        figures.add(&name, outcome);
    }
    // Of a few that ran on all may have had nothing under way.
    ensure!(
        refused > 0 || run.form != Form::Full,
        "no old primary that ran on wrote anything: nothing is shown of what the disk does then"
    );
    Ok(figures)
}

struct Machine<'a> {
    run: &'a Run,
    site: &'a Site,
    disk: &'a Storage<'a>,
    name: String,
    transport: Transport,
    replicate: Replication,
    /// The last round of which the world was told that it was flushed.
    known: u64,
    /// [`REFUSED`].
    refused: u64,
}

impl Machine<'_> {
    fn choice<'c>(&'c self, line: &'c str, of_sides: &'c [&'c str]) -> Choice<'c> {
        Choice {
            transport: self.transport,
            name: &self.name,
            guest: Guest::Writer { line, of_sides },
            memory_mib: 16,
            replicate: self.replicate,
        }
    }

    /// So many times each blow; then the machine ends, and is started again where it did not run last.
    fn outlive(mut self, times: u64, ending: Ending, random: &mut Random) -> Result<Value> {
        let disk = format!("{DEVICE},shared,reservations");
        let of_sides = ["--disk", &disk, "--console", CONSOLE];
        let site = self.site;
        let mut pair = LabPair::start(site, &self.choice("every=4", &of_sides))?;
        self.beyond(&pair.primary_host())?;
        self.is_kept_out(&pair.backup)?;
        let blows = BLOWS.repeat(usize::try_from(times)?);
        let mut spans = Vec::new();
        for blow in &blows {
            self.beyond(&pair.primary_host())?;
            std::thread::sleep(random.between(Duration::ZERO, Duration::from_secs(1)));
            let span = self
                .strike(&mut pair, *blow)
                .with_context(|| format!("{blow:?}"))?;
            spans.push((span.as_secs_f64() * 1e3).round());
            // What comes next in this host begins within a line, and is no end of the one that was cut off here.
            forget_console(&pair.primary_host())?;
            pair.rejoin()?;
            self.run.say(format!(
                "{}, {blow:?}: live after {:.1} s, {} rounds flushed; a new backup has joined",
                self.name,
                span.as_secs_f64(),
                self.known
            ));
        }
        self.beyond(&pair.primary_host())?;
        let elsewhere = site.lab().host(pair.backup.host());
        match ending {
            Ending::PoweredOff => {
                let order = ["doppel", "power-off", &self.name];
                let done = pair.primary_host().run(&order, PATIENCE)?;
                let said = String::from_utf8_lossy(&done.stderr);
                ensure!(done.code == 0, "power-off: {said}");
                for side in [&mut pair.primary, &mut pair.backup] {
                    let end = side.await_end(PATIENCE, drop)?;
                    ensure!(end == End::Code(0), "{end:?}: {}", side.messages());
                }
            }
            Ending::BothKilled => pair.kill_both()?,
        }
        let last = site.lab().host(pair.primary.host());
        self.known = self.flushed(&last)?.max(self.known);
        if let Ending::BothKilled = ending {
            let (taken, _) = self.disk.takes_writes_of(&elsewhere)?;
            ensure!(!taken, "the disk is anybody's, as the machine has died");
        }
        let line = format!("rounds={ROUNDS_AGAIN} every=4 acked={}", self.known);
        let mut again = self.choice(&line, &of_sides).start_again(&elsewhere)?;
        let end = again.await_end(PATIENCE, drop)?;
        let console = console(&elsewhere)?;
        ensure!(
            end == End::Code(0),
            "started again it ended by {end:?}: {} {console}",
            again.messages()
        );
        for line in [
            format!("disk: found {}\n", self.known),
            format!("disk: verified {}\n", self.known + ROUNDS_AGAIN),
        ] {
            ensure!(console.contains(&line), "no {line:?} in {console}");
        }
        // A machine that was turned off leaves the disk to anybody.
        let (taken, said) = self.disk.takes_writes_of(&last)?;
        ensure!(taken, "nobody has the disk, and it takes nothing: {said}");
        Ok(json!({
            "blows": blows.len(),
            "rounds_verified": self.known + ROUNDS_AGAIN,
            REFUSED: self.refused,
            "blow_to_live_ms": spans,
        }))
    }

    fn strike(&mut self, pair: &mut LabPair<'_>, blow: Blow) -> Result<Duration> {
        pair.ensure_paired()?;
        let host = pair.primary_host();
        self.known = self.flushed(&host)?.max(self.known);
        let refused_before = self.disk.refusals_of(&host)?;
        let struck = Instant::now();
        let pid = pair.primary.pid().to_string();
        match blow {
            Blow::Killed => pair.kill_process()?,
            Blow::Frozen => host.sh(&format!("kill -STOP {pid}"), PATIENCE).map(drop)?,
            Blow::Suspended => host.freeze_with_clock()?,
            Blow::Lost => host.kill()?,
        }
        pair.await_live()?;
        let span = struck.elapsed();
        self.beyond(&self.site.lab().host(pair.backup.host()))?;
        match blow {
            Blow::Killed | Blow::Lost => {
                pair.primary.await_end(PATIENCE, drop)?;
            }
            Blow::Frozen => {
                self.is_kept_out(&pair.primary)?;
                let before = self.disk.refusals_of(&host)?;
                host.sh(&format!("kill -CONT {pid}"), PATIENCE)?;
                self.ends(pair)?;
                self.refused += self.disk.refusals_of(&host)? - before;
            }
            Blow::Suspended => {
                host.thaw()?;
                self.ends(pair)?;
                self.refused += self.disk.refusals_of(&host)? - refused_before;
            }
        }
        if let Blow::Lost = blow {
            self.site.start(host.name())?;
            self.disk.reach(host.name())?;
        }
        self.is_kept_out(&pair.primary)?;
        // Whatever the old host had under way, the heir reads what it wrote.
        self.beyond(&self.site.lab().host(pair.backup.host()))?;
        Ok(span)
    }

    /// An old primary that runs on ends, and does not by turning its guest off.
    fn ends(&self, pair: &mut LabPair<'_>) -> Result<()> {
        let end = pair.primary.await_end(PATIENCE, drop)?;
        let said = pair.primary.messages();
        ensure!(
            matches!(end, End::Code(1..128)),
            "the old primary ended by {end:?}: {said}"
        );
        Ok(())
    }

    /// The host of a side that is not to write the disk tries to.
    fn is_kept_out(&self, side: &Side) -> Result<()> {
        let host = self.site.lab().host(side.host());
        let (taken, said) = self.disk.takes_writes_of(&host)?;
        ensure!(!taken, "the disk took what {} wrote", side.host());
        ensure!(
            said.contains("Invalid exchange"),
            "{} could not write for another reason: {said}",
            side.host()
        );
        Ok(())
    }

    /// Of the guest that runs in this host.
    fn flushed(&self, host: &Host<'_>) -> Result<u64> {
        let text = console(host)?;
        ensure!(!text.contains("WRONG"), "{text}");
        Ok(flushed_in(&text))
    }

    /// Waits until the guest in this host has flushed more than is known.
    fn beyond(&mut self, host: &Host<'_>) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let now = self.flushed(host)?;
            if now > self.known {
                self.known = now;
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "the guest in {} flushed no more than {now}, and {} before",
                host.name(),
                self.known
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What is in the host's file.
fn console(host: &Host<'_>) -> Result<String> {
    host.sh(&format!("cat {CONSOLE} 2>/dev/null || true"), PATIENCE)
}

fn forget_console(host: &Host<'_>) -> Result<()> {
    host.sh(&format!("rm -f {CONSOLE}"), PATIENCE).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
