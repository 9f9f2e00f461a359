//! A machine as a Slurm job: a real slurmctld with three nodes (namespaces whose cables are cut). The primary's node is lost, which is also the
//! batch script's; clients lose nothing, the job runs on, protected again on the third node; scancel turns the guest off on both sides.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::slurm::{Cluster, Job, SlurmGround};
use crate::harness::stage::{GUEST, INTERFACE, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "slurm-job",
    line: "a machine as a Slurm job outlives the node of its primary and of the batch script, is protected again, and is turned off by scancel",
    short: Duration::from_secs(40),
    full: Duration::from_secs(150),
    show,
};

/// Connections.
const CLIENTS: u32 = 4;

/// Answers that show that the machine serves.
const ANSWERS: u64 = 100;

/// What a serving side says when it has a backup, again or for the first time.
const PROTECTED: &str = "protected: both sides run";

/// What the serving side says when it is ordered to turn the machine off, which it logs.
const ORDERED: &str = "the operator orders: power-off";

/// What a node says when its role has come to the machine's end.
const OFF: &str = "the machine is off";

/// What a backup says that takes over.
const TAKES_OVER: &str = "claim won";

fn show(run: &Run) -> Result<Figures> {
    alone(|| {
        let mut cluster = Cluster::enter()?;
        let shown = prove(run, &mut cluster);
        shown.with_context(|| format!("what was said:\n{}", cluster.said()))
    })
}

/// A job's machine outlives all of it.
pub(super) fn prove(run: &Run, cluster: &mut impl SlurmGround) -> Result<Figures> {
    let mut figures = Figures::default();
    run.say("slurmctld has three nodes that are idle");
    if run.form.pick(false, true) {
        cancelled_whole(cluster)?;
        run.say("cancelled while all nodes lived: off on both sides");
        out_of_time(cluster)?;
        run.say("at its time limit: off on both sides");
        turned_off(cluster)?;
        run.say("turned off by command: the job is completed");
        told_by_its_script(cluster)?;
        run.say("SIGTERM to the batch script alone: off, the job is completed");
        refused(cluster)?;
        run.say("a guest that is none: the job fails");
    }
    lost(run, cluster, &mut figures)?;
    Ok(figures)
}

fn is_over(job: &Job) -> bool {
    !["PENDING", "RUNNING", "COMPLETING"].contains(&job.state.as_str())
}

/// Submits it; the job, protected.
fn submit(cluster: &impl SlurmGround, more: &[&str]) -> Result<String> {
    let words = format!("ip={}/24", GUEST.ip());
    let machine = [
        "--guest",
        "kv",
        "--memory",
        "32",
        "--tap",
        INTERFACE,
        "--command-line",
        &words,
        "--config",
        "role.toml",
    ];
    std::fs::write(cluster.directory().join("role.toml"), cluster.times())
        .context("write a file")?;
    let job = cluster.submit(more, &machine)?;
    cluster.until_said(&job, 0, PROTECTED, 1)?;
    Ok(job)
}

fn lost(run: &Run, cluster: &mut impl SlurmGround, figures: &mut Figures) -> Result<()> {
    let job = submit(cluster, &[])?;
    let patience = cluster.answer_within();
    let mut clients = LinearClients::start_patient(GUEST, CLIENTS, run.seed, patience)?;
    clients.await_answers(ANSWERS)?;
    let before = cluster.job(&job)?;
    ensure!(before.state == "RUNNING", "{before:?}");
    run.say(format!("job {job} serves, protected"));

    cluster.lose(0)?;
    let since = Instant::now();
    clients
        .await_answers(ANSWERS)
        .context("served after the loss of the primary's node")?;
    cluster.until_said(&job, 1, PROTECTED, 2)?;
    let again = since.elapsed();
    run.say(format!("node a is lost: protected again after {again:.1?}"));
    let is_without_it = |job: &Job| job.state != "RUNNING" || !job.nodes.contains('a');
    let after = cluster.until(&job, cluster.slurm_within(), is_without_it)?;
    ensure!(
        after.state == "RUNNING" && after.nodes == "b,c",
        "without node a the job is {after:?}"
    );
    let noticed = since.elapsed();
    run.say(format!("after {noticed:.1?} the job runs on b and c"));
    clients.await_answers(ANSWERS)?;

    let histories = clients.end()?;
    let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
    cluster.run("scancel", &[&job])?;
    let ended = cancelled(cluster, &job, &[1, 2], "CANCELLED")?;
    run.say(format!(
        "scancel: off on both sides, over after {ended:.1?}"
    ));

    figures.add("operations", checked.operations);
    figures.add("violations", 0);
    figures.add(
        "longest_wait_ms",
        longest_wait(&histories).as_millis() as u64,
    );
    figures.add("protected_again_ms", again.as_millis() as u64);
    figures.add("slurm_noticed_ms", noticed.as_millis() as u64);
    figures.add("ended_after_scancel_ms", ended.as_millis() as u64);
    Ok(())
}

/// A job that is being ended: the guest is turned off by the log on both sides (the first two of these nodes), nothing is left on any node,
/// and Slurm's accounting says how it came out. How long it took.
fn cancelled(
    cluster: &impl SlurmGround,
    job: &str,
    nodes: &[usize],
    state: &str,
) -> Result<Duration> {
    let since = Instant::now();
    let over = cluster.until(job, cluster.slurm_within(), is_over)?;
    ensure!(over.state == state, "the job is {over:?}");
    for &at in nodes {
        cluster.until_nothing_runs(at)?;
    }
    let took = since.elapsed();
    let (serves, follows) = (nodes[0], nodes[1]);
    ensure!(
        cluster.log(job, serves).contains(ORDERED),
        "nobody ordered the machine off"
    );
    ensure!(
        !cluster.log(job, follows).contains(TAKES_OVER),
        "the backup took over a machine that was turned off"
    );
    for at in [serves, follows] {
        let said = cluster.log(job, at);
        ensure!(said.contains(OFF), "node {at} does not say that it is off");
    }
    cluster.until_accounted(job, state)?;
    Ok(took)
}

/// Without a loss: the batch step is there, and shows what the nodes say.
fn cancelled_whole(cluster: &impl SlurmGround) -> Result<()> {
    let job = submit(cluster, &[])?;
    cluster.run("scancel", &[&job])?;
    cancelled(cluster, &job, &[0, 1, 2], "CANCELLED")?;
    let log = cluster.directory().join(format!("doppel-{job}.log"));
    let said = std::fs::read_to_string(log).context("read the job's log")?;
    for line in ["a: ", "b: ", "c: ", "is off"] {
        ensure!(said.contains(line), "the job's log has no {line:?}: {said}");
    }
    Ok(())
}

/// A job whose time is over.
fn out_of_time(cluster: &impl SlurmGround) -> Result<()> {
    // Slurm counts in minutes.
    let job = submit(cluster, &["--time=1"])?;
    cluster.until(&job, 2 * cluster.slurm_within(), |job| {
        job.state != "RUNNING"
    })?;
    cancelled(cluster, &job, &[0, 1, 2], "TIMEOUT")?;
    Ok(())
}

/// A machine that is turned off by an operator: the job ends by itself, well.
fn turned_off(cluster: &impl SlurmGround) -> Result<()> {
    let job = submit(cluster, &[])?;
    let run_dir = format!("{}/doppel-{job}-a", cluster.temporary());
    let doppel = cluster.program()?;
    let name = format!("job-{job}");
    let id = format!("--jobid={job}");
    let on_first = [&id, "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=a"];
    let order = [&doppel, "power-off", &name, "--run-dir", &run_dir];
    let words: Vec<&str> = on_first.into_iter().chain(order).collect();
    cluster.run("srun", &words)?;
    ended_by_itself(cluster, &job, "COMPLETED", "0:0")
}

/// Of a job's processes the batch script alone is told.
fn told_by_its_script(cluster: &impl SlurmGround) -> Result<()> {
    let job = submit(cluster, &[])?;
    cluster.run("scancel", &["--batch", "--signal=TERM", &job])?;
    ended_by_itself(cluster, &job, "COMPLETED", "0:0")
}

/// A machine that cannot run.
fn refused(cluster: &impl SlurmGround) -> Result<()> {
    let job = cluster.submit(&[], &["--guest", "nowhere.elf"])?;
    ended_by_itself(cluster, &job, "FAILED", "2:0")
}

fn ended_by_itself(cluster: &impl SlurmGround, job: &str, state: &str, code: &str) -> Result<()> {
    let over = cluster.until(job, cluster.slurm_within(), is_over)?;
    ensure!(
        over.state == state && over.exit_code == code,
        "the job is {over:?}"
    );
    (0..3).try_for_each(|at| cluster.until_nothing_runs(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
