//! Hosts that are drained before they are serviced: what they serve is switched over, their backups are replaced, and then they can be switched
//! off without anybody's noticing. What cannot leave is said. Somebody looks at a console all along, from wherever he is.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::console::{Viewer, check_lines};
use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::random::Random;
use crate::harness::site::{ALL, ANSWERS, HOSTS, MACHINES, NAMES, Site, SiteGround, with_site};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "host-drained",
    line: "doppel vm drain: machines and backups leave a host under load, which can then be switched off unnoticed; what cannot leave is said",
    short: Duration::from_secs(50),
    full: Duration::from_secs(250),
    show,
};

/// A machine at whose console somebody is.
const TALKER: &str = "talker";

/// One that is replicated by checkpoints, which know no switch-over.
const FAILS_OVER: &str = "checkpointed";

/// A bound for what takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

fn show(run: &Run) -> Result<Figures> {
    with_site(|site| drains(run, site))
}

fn drains(run: &Run, site: &mut Site) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let mut clients = site.create_machines(&mut random)?;
    let mut viewer = talker(site)?;
    let mut took = Vec::new();
    let rounds = run.form.pick(1, 20);
    for round in 1..=rounds {
        // Whoever serves the first machine, and then anybody.
        let at = match round {
            1 => site.serves(MACHINES[0].0)?,
            _ => random.below(HOSTS as u64) as usize,
        };
        let span = serviced(site, at, &mut clients)
            .with_context(|| format!("round {round}, host {}", NAMES[at]))?;
        viewer.ask("say 5", "line 5\n", PATIENCE)?;
        run.say(format!(
            "host {} drained in {span:.1?}, switched off and back: nobody noticed",
            NAMES[at]
        ));
        took.push(span);
    }
    let span = fails_over(site).context("a machine that is replicated by checkpoints")?;
    run.say(format!(
        "one that is replicated by checkpoints left in {span:.1?}, by a failover"
    ));
    one_is_left(site, &mut clients).context("one host after the other is drained")?;
    run.say("with one host left nothing leaves it, and that is said");
    figures.add(
        "console_lines",
        console_lost(site, &mut viewer).context("a console")?,
    );

    let (mut operations, mut longest) = (0, Duration::ZERO);
    for ((name, _), mut clients) in MACHINES.iter().zip(clients) {
        clients.await_answers(ANSWERS)?;
        let histories = clients.end()?;
        longest = longest.max(longest_wait(&histories));
        let checked = linear::check_all(histories.iter().map(Vec::as_slice))
            .with_context(|| format!("machine {name}"))?;
        operations += checked.operations;
    }
    site.turn_off()?;
    took.sort();
    let seconds = |took: Duration| took.as_millis() as f64 / 1000.0;
    figures.add("drains", took.len());
    figures.add("operations", operations);
    figures.add("violations", 0);
    figures.add("longest_wait_ms", longest.as_millis() as u64);
    figures.add("drained_s_median", seconds(took[took.len() / 2]));
    figures.add("drained_s_worst", seconds(took[took.len() - 1]));
    Ok(figures)
}

/// A machine that talks, and somebody at its console, who is on none of the hosts.
fn talker(site: &Site) -> Result<Viewer> {
    let create = [
        "create",
        TALKER,
        "--guest",
        "console",
        "--memory",
        "16",
        "--no-network",
    ];
    site.vm(0, &create)?;
    site.until_protected(TALKER, &ALL)?;
    let mut viewer = Viewer::start_at_site(&site.config(0), TALKER)?;
    viewer.ask("say 40", "line 40\n", PATIENCE)?;
    Ok(viewer)
}

/// Its host is lost while it talks: whoever looks is shown each byte once all the same, and told where it goes on. How many lines there were.
fn console_lost(site: &mut Site, viewer: &mut Viewer) -> Result<u64> {
    site.until_protected(TALKER, &ALL)?;
    let at = site.serves(TALKER)?;
    let before = viewer.shown().len();
    viewer.type_in("say 400\n")?;
    viewer.until_behind(before, "line 3\n", PATIENCE)?;
    site.lose(at)?;
    viewer.until_behind(before, "line 400\n", PATIENCE)?;
    viewer.ask("say 7", "line 7\n", PATIENCE)?;
    ensure!(
        viewer.said().contains("serves the machine now"),
        "{}",
        viewer.said()
    );
    let lines = check_lines(&viewer.shown()).with_context(|| viewer.shown())?;
    site.mend(at)?;
    site.until_member(at)?;
    site.vm(at, &["stop", TALKER])?;
    site.vm(at, &["delete", TALKER])?;
    let status = viewer.end(PATIENCE)?;
    ensure!(
        status.success(),
        "the viewer ended by {status}: {}",
        viewer.said()
    );
    for (name, _) in MACHINES {
        site.until_protected(name, &ALL)?;
    }
    Ok(lines)
}

/// The sides of a machine on other hosts than this one: host and process of each.
fn sides(site: &Site, name: &str, but: usize) -> Result<Vec<(Value, Value)>> {
    let shown = site.show(name)?;
    let roles = shown["roles"].as_array().context("no roles")?;
    Ok(roles
        .iter()
        .filter(|role| role["host"] != NAMES[but])
        .map(|role| (role["host"].clone(), role["pid"].clone()))
        .collect())
}

/// A host is drained, lost, mended and undrained, under load; how long the drain took. That it is lost changes no process anywhere.
fn serviced(site: &mut Site, at: usize, clients: &mut [LinearClients]) -> Result<Duration> {
    let (host, from) = (NAMES[at], (at + 1) % HOSTS);
    let others: Vec<usize> = ALL.into_iter().filter(|other| *other != at).collect();
    for clients in &mut *clients {
        clients.await_answers(ANSWERS)?;
    }
    let since = Instant::now();
    let said = site.vm(from, &["drain", host])?;
    let took = since.elapsed();
    ensure!(said == format!("host {host}: drained\n"), "{said:?}");
    let until = Instant::now() + PATIENCE;
    while site.processes(at)?.len() > 1 {
        ensure!(
            Instant::now() < until,
            "more than its agent runs on a host that is drained"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut before = Vec::new();
    for (name, _) in MACHINES {
        site.until_protected(name, &others)?;
        before.push(sides(site, name, at)?);
    }
    site.lose(at)?;
    for clients in &mut *clients {
        clients
            .await_answers(ANSWERS)
            .context("after the host was switched off")?;
    }
    for ((name, _), before) in MACHINES.iter().zip(&before) {
        site.until_protected(name, &others)?;
        let after = sides(site, name, at)?;
        ensure!(*before == after, "{before:?} became {after:?}");
    }
    site.mend(at)?;
    site.until_member(at)?;
    let said = site.vm(from, &["undrain", host])?;
    ensure!(said == format!("host {host}: not drained\n"), "{said:?}");
    Ok(took)
}

/// It leaves a drained host by its primary's end, once it is protected, and has what its guest knew. How long the drain took.
fn fails_over(site: &Site) -> Result<Duration> {
    let create = ["create", FAILS_OVER, "--replicate", "checkpoint"];
    let guest = ["--guest", "console", "--memory", "16", "--no-network"];
    site.vm(0, &[&create[..], &guest].concat())?;
    site.until_protected(FAILS_OVER, &ALL)?;
    let mut viewer = Viewer::start_at_site(&site.config(0), FAILS_OVER)?;
    viewer.ask("say 2", "line 2\n", PATIENCE)?;
    viewer.type_in("number 4711\n")?;
    viewer.ask("say 3", "line 3\n", PATIENCE)?;
    let before = site.until_protected(FAILS_OVER, &ALL)?;
    let at = site.serves(FAILS_OVER)?;
    let others: Vec<usize> = ALL.into_iter().filter(|other| *other != at).collect();
    let since = Instant::now();
    let said = site.vm(others[0], &["drain", NAMES[at]])?;
    let took = since.elapsed();
    ensure!(said == format!("host {}: drained\n", NAMES[at]), "{said:?}");
    let after = site.until_protected(FAILS_OVER, &others)?;
    ensure!(
        after["epoch"].as_u64() == before["epoch"].as_u64().map(|epoch| epoch + 1),
        "not one failover, but from {before:#} to {after:#}"
    );
    viewer.ask("number", "number 4711\n", PATIENCE)?;
    site.vm(0, &["undrain", NAMES[at]])?;
    site.vm(0, &["stop", FAILS_OVER])?;
    viewer.end(PATIENCE)?;
    site.vm(0, &["delete", FAILS_OVER])?;
    for (name, _) in MACHINES {
        site.until_protected(name, &ALL)?;
    }
    Ok(took)
}

/// The host that serves the second machine, which is not to be protected then, is drained, and the next one; the last one says that it cannot.
fn one_is_left(site: &mut Site, clients: &mut [LinearClients]) -> Result<()> {
    let (first, second) = (MACHINES[0].0, MACHINES[1].0);
    site.vm(0, &["unprotect", second])?;
    let mut left: Vec<usize> = ALL.to_vec();
    for _ in 0..2 {
        let at = site.serves(second)?;
        let said = site.vm(at, &["drain"])?;
        ensure!(
            said.ends_with(&format!("host {}: drained\n", NAMES[at])),
            "{said:?}"
        );
        left.retain(|other| *other != at);
        for name in [first, second] {
            let to = site.serves(name)?;
            ensure!(left.contains(&to), "host {} serves {name}", NAMES[to]);
        }
        for clients in &mut *clients {
            clients.await_answers(ANSWERS)?;
        }
    }
    let last = left[0];
    let alone = site.vm(last, &["drain"]);
    let why = alone
        .err()
        .context("the last host was drained")?
        .to_string();
    ensure!(why.contains("no other host that takes machines"), "{why}");
    for name in [first, second] {
        ensure!(site.serves(name)? == last, "{name} has left the last host");
    }
    for at in ALL {
        site.vm(last, &["undrain", NAMES[at]])?;
    }
    let said = site.vm(0, &["protect", second])?;
    ensure!(said == format!("{second}: protected\n"), "{said:?}");
    site.until_protected(first, &ALL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
