//! A site that looks after itself: a real etcd, three agents on three hosts (namespaces whose cables are cut), two guests with clients that
//! share keys. Hosts are lost at random and come back, agents are killed and start again, etcd stands still for a while.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::site::{HOSTS, LEASE, NAMES, Site};
use crate::harness::stage::alone;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "agents-keep",
    line: "three agents over etcd: hosts are lost and come back, agents die, etcd stands still; two guests serve on, protected again by themselves",
    short: Duration::from_secs(50),
    full: Duration::from_secs(600),
    show,
};

/// The machines, and where their guests answer.
const MACHINES: [(&str, SocketAddrV4); 2] = [
    ("one", SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379)),
    ("two", SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 3), 6379)),
];

/// Connections to each: as many operations can be under way at once.
const CLIENTS: u32 = 4;

/// Answers that show that a machine serves.
const ANSWERS: u64 = 100;

/// Every host.
const ALL: [usize; HOSTS] = [0, 1, 2];

fn show(run: &Run) -> Result<Figures> {
    alone(|| {
        let mut site = Site::enter()?;
        let shown = keep(run, &mut site);
        shown.with_context(|| format!("what was said:\n{}", site.said()))
    })
}

fn keep(run: &Run, site: &mut Site) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let losses = run.form.pick(2, 20);
    let mut clients = create(site, &mut random)?;
    run.say("two machines run, protected");
    outage(run, site, &mut clients, run.form.pick(4, 60))?;
    let mut again = Vec::new();
    for loss in 1..=losses {
        let at = random.below(HOSTS as u64) as usize;
        let took = lose(site, at, &mut clients, &mut random)
            .with_context(|| format!("loss {loss}, of host {}", NAMES[at]))?;
        run.say(format!(
            "host {} lost: both protected again after {took:.1?}",
            NAMES[at]
        ));
        again.push(took);
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
    turn_off(site)?;
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

/// Makes both machines, from different hosts, and has clients talk to them.
fn create(site: &Site, random: &mut Random) -> Result<Vec<LinearClients>> {
    for (from, (name, address)) in MACHINES.iter().enumerate() {
        let words = format!("ip={}/24", address.ip());
        let create = [
            "create",
            name,
            "--guest",
            "kv",
            "--memory",
            "32",
            "--command-line",
            &words,
        ];
        let said = site.vm(from, &create)?;
        ensure!(
            said == format!("{name}: protected\n"),
            "create said {said:?}"
        );
        site.until_protected(name, &ALL)?;
    }
    let refused = site.vm(2, &["create", "one", "--guest", "kv"]);
    ensure!(refused.is_err(), "one name was given twice");
    MACHINES
        .iter()
        .map(|(_, address)| LinearClients::start(*address, CLIENTS, random.next()))
        .collect()
}

/// The processes of all roles, which nothing here may have replaced.
fn roles(site: &Site) -> Result<Vec<Value>> {
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
fn outage(run: &Run, site: &mut Site, clients: &mut [LinearClients], seconds: u64) -> Result<()> {
    let length = Duration::from_secs(seconds).max(LEASE + Duration::from_secs(1));
    let before = roles(site)?;
    site.etcd.freeze()?;
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
    site.etcd.thaw()?;
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
fn lose(
    site: &mut Site,
    at: usize,
    clients: &mut [LinearClients],
    random: &mut Random,
) -> Result<Duration> {
    for clients in &mut *clients {
        clients.await_answers(ANSWERS)?;
    }
    let others: Vec<usize> = ALL.into_iter().filter(|other| *other != at).collect();
    let bereft = others[random.below(others.len() as u64) as usize];
    let running = |site: &Site| -> Result<usize> { Ok(site.processes(bereft)?.len()) };
    let before = running(site)?;
    site.kill_agent(bereft);
    ensure!(running(site)? + 1 == before, "an agent took roles with it");
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
    let until = Instant::now() + Duration::from_secs(30);
    let is_back = |site: &Site| -> Result<bool> {
        let hosts: Value = serde_json::from_str(&site.vm(0, &["hosts", "--json"])?)?;
        let hosts = hosts.as_array().context("no hosts")?;
        Ok(hosts.len() == HOSTS)
    };
    while !is_back(site)? {
        ensure!(
            Instant::now() < until,
            "host {} is no member again",
            NAMES[at]
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(took)
}

/// What `doppel vm` can do to a machine that serves.
fn verbs(site: &mut Site, clients: &mut [LinearClients]) -> Result<()> {
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
fn switched(site: &Site, name: &str) -> Result<String> {
    let until = Instant::now() + Duration::from_secs(60);
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

/// Everything ends by command, and nothing is left.
fn turn_off(site: &mut Site) -> Result<()> {
    for (name, _) in MACHINES {
        ensure!(
            site.vm(1, &["delete", name]).is_err(),
            "a machine that runs was deleted"
        );
        let said = site.vm(1, &["stop", name])?;
        ensure!(said == format!("{name}: off\n"), "{said:?}");
        ensure!(
            site.show(name)?["state"] == "stopped",
            "{:#}",
            site.show(name)?
        );
        site.vm(0, &["delete", name])?;
    }
    for at in ALL {
        site.stop_agent(at)?;
        let left = site.processes(at)?;
        ensure!(
            left.is_empty(),
            "host {} still has processes {left:?}",
            NAMES[at]
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    /// systemd takes the unit as it is, but for the place of the program, which is not installed here.
    #[test]
    fn the_unit_is_one() {
        let unit = include_str!("../../../hypervisor/package/doppel-agent.service");
        assert!(
            unit.contains("\nKillMode=process\n"),
            "machines outlive their agent"
        );
        let program = crate::harness::program::doppel().unwrap();
        let installed = "ExecStart=/usr/bin/doppel ";
        assert!(unit.contains(installed));
        let unit = unit.replace(installed, &format!("ExecStart={} ", program.display()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("doppel-agent.service");
        std::fs::write(&path, unit).unwrap();
        let verified = std::process::Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output();
        match verified {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let ours: Vec<&str> = said
                    .lines()
                    .filter(|line| line.contains("doppel-agent"))
                    .collect();
                assert!(output.status.success() && ours.is_empty(), "{said}");
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("no systemd here to look at the unit");
            }
            Err(error) => panic!("systemd-analyze: {error}"),
        }
    }
}
