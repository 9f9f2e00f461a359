//! A role that is set up can open and start nothing more (issue 4), and its lists of system calls are whole: with `strict` any
//! call that is not listed would end it, through load, kill and go-live.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::session::report::Event;

use crate::harness::kv_load;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};
use hypervisor::demo::pair::Pair;

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "confined",
    line: "Every thread of a pair, a recording and a replay is confined: no capability, only the system calls it needs; its files and memory are its own",
    short: Duration::from_secs(25),
    full: Duration::from_secs(120),
    show,
};

/// A bound on what must happen on a loaded host.
const LONGEST: Duration = Duration::from_secs(60);

/// CAP_DAC_OVERRIDE, the one that the arbiter's thread keeps.
const DAC_OVERRIDE: u64 = 1 << 1;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let (rounds, requests) = (run.form.pick(1, 5), run.form.pick(1000, 20_000));
    let mut threads = 0;
    for _ in 0..rounds {
        for transport in [Transport::Shm, Transport::Tcp] {
            threads = alone(|| one(requests, transport, &mut random))
                .with_context(|| format!("a pair over {}", transport.name()))?;
        }
        recording_and_replay().context("a recording and its replay")?;
    }
    figures.add("rounds", rounds);
    figures.add("confined_threads", threads);
    Ok(figures)
}

/// `doppel record` with every thread, the one that writes the file among them; then `doppel replay`, which has one.
fn recording_and_replay() -> Result<()> {
    let work = tempfile::Builder::new()
        .prefix("doppel-test-")
        .tempdir()
        .context("make a directory")?;
    fs::write(work.path().join("strict.toml"), STRICT).context("write a configuration")?;
    let record = ["record", "--config", "strict.toml", "--out", "irq.log"];
    let guest = [
        "--guest",
        "irq",
        "--memory",
        "8",
        "--command-line",
        "exits=1500",
    ];
    let mut role = Role::start(work.path(), "record", &[&record[..], &guest].concat())?;
    until_confined(&mut role, 3)?;
    let status = role.end(LONGEST)?;
    let said = role.said();
    ensure!(status.success(), "the recording ended by {status}: {said}");
    nobody_elses(&work.path().join("irq.log"))?;
    let mut role = Role::start(work.path(), "replay", &["replay", "irq.log"])?;
    until_confined(&mut role, 1)?;
    let status = role.end(LONGEST)?;
    let said = role.said();
    ensure!(status.success(), "the replay ended by {status}: {said}");
    Ok(())
}

/// A file that its owner alone can get at.
fn nobody_elses(path: &Path) -> Result<()> {
    let mode = fs::metadata(path).context("look at a file")?.mode() & 0o777;
    ensure!(mode & 0o077 == 0, "{} has mode {mode:04o}", path.display());
    Ok(())
}

/// A process whose memory is in no file that has a name, and goes into no core dump.
fn keeps_its_memory(process: u32) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).context("list mappings")?;
    let shared = maps.lines().filter(|line| {
        line.split(' ')
            .nth(1)
            .is_some_and(|rights| rights == "rw-s")
    });
    let mut guests = 0;
    for line in shared {
        let named = line.split_once('/').map(|(_, name)| name);
        guests += u32::from(named.is_some_and(|name| name.starts_with("memfd:doppel-guest-ram")));
        ensure!(
            named.is_none_or(|name| name.starts_with("memfd:")),
            "memory of {process} is in a file: {line}"
        );
    }
    ensure!(guests > 0, "no guest's memory among {maps}");
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).context("read limits")?;
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let core = core.context("no limit of core dumps")?;
    ensure!(core.split_whitespace().nth(4) == Some("0"), "{core}");
    Ok(())
}

/// Looks until so many threads are there and all of them are confined, while it runs.
fn until_confined(role: &mut Role, threads: usize) -> Result<()> {
    let until = Instant::now() + LONGEST;
    loop {
        let why = match confined(role.pid(), threads) {
            Ok(_) => return Ok(()),
            Err(why) => why,
        };
        // At its start it is not confined yet, at its end it is gone.
        if !role.runs()? || Instant::now() >= until {
            return Err(why.context("it was not confined before it ended"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Patient besides: on a loaded host a side that is only late must not be given up, as a thread that ended has no filter.
const STRICT: &str = "[sandbox]\nstrict = true\n[timing]\nsilence_ms = 2000\n";

fn one(requests: u64, transport: Transport, random: &mut Random) -> Result<usize> {
    let stage = Stage::enter()?;
    let strict = stage.directory().join("strict.toml");
    fs::write(&strict, STRICT).context("write a configuration")?;
    let mut spec = stage.spec("kv", "")?;
    spec.more = vec!["--config".into(), strict.display().to_string()];
    spec.transport = transport;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    kv_load::run(GUEST, 4, requests, random.next()).context("load before the kill")?;
    let threads = confined(pair.primary.pid(), 3)? + confined(pair.backup.pid(), 3)?;
    for side in [&pair.primary, &pair.backup] {
        keeps_its_memory(side.pid())?;
    }
    pair.primary.kill();
    pair.backup
        .wait_for(LONGEST, |event| matches!(event, Event::Live { .. }), drop)
        .with_context(|| format!("the backup did not go live: {}", pair.backup.messages()))?;
    kv_load::run(GUEST, 4, requests, random.next()).context("load after the kill")?;
    confined(pair.backup.pid(), 3)?;
    let status = pair.backup.stop(LONGEST);
    ensure!(
        status.success(),
        "the backup ended by {status}: {}",
        pair.backup.messages()
    );
    Ok(threads)
}

/// Whether every thread of the process is confined; how many there are, which is `least` or more.
fn confined(process: u32, least: usize) -> Result<usize> {
    let mut threads = 0;
    for entry in fs::read_dir(format!("/proc/{process}/task")).context("list threads")? {
        let path = entry.context("list threads")?.path();
        let name = fs::read_to_string(path.join("comm")).context("a thread's name")?;
        let status = fs::read_to_string(path.join("status")).context("a thread's status")?;
        let field = |key: &str| -> Result<&str> {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            Ok(line.with_context(|| format!("{key} of a thread"))?.trim())
        };
        let name = name.trim();
        ensure!(
            field("Seccomp")? == "2",
            "thread {name} of {process} has no filter"
        );
        ensure!(
            field("NoNewPrivs")? == "1",
            "thread {name} of {process} may gain privileges"
        );
        let kept = u64::from_str_radix(field("CapPrm")?, 16).context("capabilities")?;
        let allowed = if name == "arbiter" { DAC_OVERRIDE } else { 0 };
        ensure!(
            kept & !allowed == 0,
            "thread {name} of {process} keeps capabilities {kept:x}"
        );
        threads += 1;
    }
    ensure!(threads >= least, "process {process} has {threads} threads");
    Ok(threads)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
