//! A site that looks after itself: a real etcd, three agents on three hosts (namespaces whose cables are cut), two guests with clients that
//! share keys. Hosts are lost at random and come back, agents are killed and start again, etcd stands still for a while.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::site::{ALL, ANSWERS, HOSTS, MACHINES, NAMES, SiteGround, with_site};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "agents-keep",
    line: "three agents over etcd: hosts are lost and come back, agents die, etcd stands still; two guests serve on, protected again by themselves",
    short: Duration::from_secs(50),
    full: Duration::from_secs(600),
    show,
};

/// What is done to a site.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course {
    /// Hosts that are lost.
    pub(super) losses: u64,
    /// How long etcd stands still; longer if a lease is.
    pub(super) outage: Duration,
    /// From one loss to the next, at least.
    pub(super) every: Duration,
}

fn show(run: &Run) -> Result<Figures> {
    let course = Course {
        losses: run.form.pick(2, 20),
        outage: Duration::from_secs(run.form.pick(4, 60)),
        every: Duration::ZERO,
    };
    with_site(|site| keep(run, site, &course))
}

/// Two machines with clients outlive all of it.
pub(super) fn keep<G: SiteGround>(run: &Run, site: &mut G, course: &Course) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let losses = course.losses;
    let mut clients = site.create_machines(&mut random)?;
    run.say("two machines run, protected");
    outage(run, site, &mut clients, course.outage)?;
    let mut again = Vec::new();
    for loss in 1..=losses {
        let at = random.below(HOSTS as u64) as usize;
        let began = Instant::now();
        let took = lose(site, at, &mut clients, &mut random)
            .with_context(|| format!("loss {loss}, of host {}", NAMES[at]))?;
        run.say(format!(
            "host {} lost: both protected again after {took:.1?}",
            NAMES[at]
        ));
        again.push(took);
        while loss < losses && began.elapsed() < course.every {
            for clients in &mut clients {
                clients.await_answers(ANSWERS)?;
            }
        }
    }
    verbs(site, &mut clients)?;
    run.say("unprotected, protected, switched, by command");

    for clients in &mut clients {
        clients.await_answers(ANSWERS)?;
    }
    let (mut operations, mut longest) = (0, Duration::ZERO);
    for ((name, _), clients) in MACHINES.iter().zip(clients) {
        let histories = clients.end()?;
        longest = longest.max(longest_wait(&histories));
        let checked = linear::check_all(histories.iter().map(Vec::as_slice))
            .with_context(|| format!("machine {name}"))?;
        operations += checked.operations;
    }
    site.turn_off()?;
    again.sort();
    let seconds = |took: Duration| took.as_millis() as f64 / 1000.0;
    figures.add("losses", losses);
    figures.add("operations", operations);
    figures.add("violations", 0);
    figures.add("longest_wait_ms", longest.as_millis() as u64);
    figures.add("protected_again_s_median", seconds(again[again.len() / 2]));
    figures.add("protected_again_s_worst", seconds(again[again.len() - 1]));
    Ok(figures)
}

/// The processes of all roles, which nothing here may have replaced.
fn roles(site: &impl SiteGround) -> Result<Vec<Value>> {
    let of = |name: &str| -> Result<Vec<Value>> {
        let shown = site.show(name)?;
        let roles = shown["roles"].as_array().context("no roles")?;
        Ok(roles
            .iter()
            .map(|role| serde_json::json!([role["host"], role["pid"], role["says"]["epoch"]]))
            .collect())
    };
    let mut all = Vec::new();
    for (name, _) in MACHINES {
        all.extend(of(name)?);
    }
    Ok(all)
}

/// etcd stands still, for longer than any lease: machines run on, nobody changes role, agents say so, and go on when it is back.
fn outage<G: SiteGround>(
    run: &Run,
    site: &mut G,
    clients: &mut [LinearClients],
    length: Duration,
) -> Result<()> {
    let length = length.max(site.lease() + Duration::from_secs(1));
    let before = roles(site)?;
    site.etcd().freeze()?;
    let since = Instant::now();
    let answered: u64 = clients.iter().map(LinearClients::answered).sum();
    for at in ALL {
        site.agent_says(at, "etcd is away")?;
    }
    while since.elapsed() < length {
        for clients in &mut *clients {
            clients
                .await_answers(ANSWERS)
                .context("machines need no etcd while they are well")?;
        }
    }
    let served = clients.iter().map(LinearClients::answered).sum::<u64>() - answered;
    site.etcd().thaw()?;
    for at in ALL {
        site.agent_says(at, "etcd is back")?;
    }
    for (name, _) in MACHINES {
        site.until_protected(name, &ALL)?;
    }
    let after = roles(site)?;
    ensure!(
        before == after,
        "an outage of etcd changed {before:?} to {after:?}"
    );
    run.say(format!(
        "etcd stood still for {:.1?}: {served} answers, nobody changed role",
        since.elapsed()
    ));
    Ok(())
}

/// A host is lost, an agent of another one besides; both machines serve on, and are protected on the two others by themselves; it comes back.
/// How long that took.
fn lose<G: SiteGround>(
    site: &mut G,
    at: usize,
    clients: &mut [LinearClients],
    random: &mut Random,
) -> Result<Duration> {
    for clients in &mut *clients {
        clients.await_answers(ANSWERS)?;
    }
    let others: Vec<usize> = ALL.into_iter().filter(|other| *other != at).collect();
    let bereft = others[random.below(others.len() as u64) as usize];
    let before = site.running(bereft)?;
    site.kill_agent(bereft)?;
    ensure!(
        site.running(bereft)? + 1 == before,
        "an agent took roles with it"
    );
    site.lose(at)?;
    let lost = Instant::now();
    for clients in &mut *clients {
        clients
            .await_answers(ANSWERS)
            .context("served after the loss")?;
    }
    site.start_agent(bereft)?;
    for (name, _) in MACHINES {
        site.until_protected(name, &others)?;
    }
    let took = lost.elapsed();
    site.mend(at)?;
    site.until_member(at)?;
    Ok(took)
}

/// What `doppel vm` can do to a machine that serves.
fn verbs<G: SiteGround>(site: &mut G, clients: &mut [LinearClients]) -> Result<()> {
    let (name, _) = MACHINES[0];
    let before = site.until_protected(name, &ALL)?;
    let said = site.vm(0, &["unprotect", name])?;
    ensure!(said == format!("{name}: unprotected\n"), "{said:?}");
    clients[0].await_answers(ANSWERS)?;
    let alone = site.show(name)?;
    ensure!(alone["served_by"] == before["served_by"], "{alone:#}");
    let said = site.vm(1, &["protect", name])?;
    ensure!(said == format!("{name}: protected\n"), "{said:?}");

    let before = site.until_protected(name, &ALL)?;
    let heir = before["followed_by"].as_str().context("no heir")?;
    let said = switched(site, name)?;
    ensure!(
        said.starts_with(&format!("{name}: {heir} serves it in epoch ")),
        "{said:?}"
    );
    clients[0].await_answers(ANSWERS)?;
    let after = site.until_protected(name, &ALL)?;
    ensure!(after["served_by"] == before["followed_by"], "{after:#}");

    let list = site.vm(0, &["list"])?;
    for (name, _) in MACHINES {
        ensure!(
            list.lines()
                .any(|line| line.starts_with(name) && line.contains("protected")),
            "{list}"
        );
    }
    Ok(())
}

/// Has a machine switched over. On a busy host its backup may be too far behind just then, or too slow to take it, and is told to be so: an
/// operator tries again.
fn switched(site: &impl SiteGround, name: &str) -> Result<String> {
    let until = Instant::now() + site.patience();
    loop {
        match site.vm(2, &["switch", name]) {
            Err(error)
                if ["ms behind", "did not take"]
                    .iter()
                    .any(|why| error.to_string().contains(why))
                    && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(200));
            }
            told => return told,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    /// systemd takes the units as they are, but for the place of the program, which is not installed here.
    #[test]
    fn the_units_are_some() {
        let agent = include_str!("../../../hypervisor/package/doppel-agent.service");
        let drain = include_str!("../../../hypervisor/package/doppel-drain.service");
        assert!(
            agent.contains("\nKillMode=process\n"),
            "machines outlive their agent"
        );
        let program = crate::harness::program::doppel().unwrap();
        let directory = tempfile::tempdir().unwrap();
        for (name, unit, word) in [
            ("doppel-agent.service", agent, "ExecStart="),
            ("doppel-drain.service", drain, "ExecStop="),
        ] {
            let installed = format!("{word}/usr/bin/doppel ");
            assert!(unit.contains(&installed));
            let unit = unit.replace(&installed, &format!("{word}{} ", program.display()));
            std::fs::write(directory.path().join(name), unit).unwrap();
        }
        for name in ["doppel-agent.service", "doppel-drain.service"] {
            let verified = std::process::Command::new("systemd-analyze")
                .arg("verify")
                .arg(directory.path().join(name))
                .output();
            match verified {
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    let ours: Vec<&str> = said.lines().filter(|line| line.contains(name)).collect();
                    assert!(output.status.success() && ours.is_empty(), "{said}");
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    eprintln!("no systemd here to look at the units");
                }
                Err(error) => panic!("systemd-analyze: {error}"),
            }
        }
    }
}
