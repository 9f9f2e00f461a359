//! Bad input (issue 4, point 4; issue 7, point 8): a clear error, and never a panic, a hang or a lost commit.
#![forbid(unsafe_code)]

mod files;

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::harness::meddler;
use crate::harness::random::Random;
use crate::harness::recording::{Log, Recording, Take};
use crate::harness::role::Role;
use crate::harness::strangers::{IMPOSTORS, QUICK, Stranger};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "bad-input",
    line: "Bad configurations, files, logs, peers, ring bytes and a full disk give a clear error: no panic, no hang, no lost commit",
    short: Duration::from_secs(60),
    full: Duration::from_secs(900),
    show,
};

/// A bound on anything that must end: the handshake's patience, twice, and a loaded host.
const LONGEST: Duration = Duration::from_secs(30);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    configurations(&mut figures).context("configurations")?;
    logs(run, &mut random, &mut figures).context("log files")?;
    files::show(run, &mut random, &mut figures).context("files")?;
    strangers(run, &mut random, &mut figures).context("a backup and its strangers")?;
    impostors(run, &mut random, &mut figures).context("a primary and its impostors")?;
    ring(run, &mut random, &mut figures).context("ring bytes")?;
    Ok(figures)
}

fn directory() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("doppel-test-")
        .tempdir()
        .context("make a directory")
}

/// Changes a few bytes: flips, cuts, repeats, insertions.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        match random.below(6) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = random.next() as u8,
            3 => {
                let piece = bytes[at..].iter().copied().take(40).collect::<Vec<_>>();
                bytes.splice(at..at, piece);
            }
            4 if at < bytes.len() => drop(bytes.drain(at..bytes.len().min(at + 9))),
            _ => bytes.insert(at, random.next() as u8),
        }
    }
    bytes
}

/// Bad configurations, and what the message must mention.
const CONFIGURATIONS: [(&str, &str); 5] = [
    ("memory_mib = \"much\"\n", "line 1"),
    ("\n\ncolour = 1\n", "line 3"),
    ("[timing]\nheartbeat_ms = 0\n", "timing.heartbeat_ms"),
    ("[ring]\nevents_kib = 4\n", "ring.events_kib"),
    ("name = [", "line 1"),
];

/// What the program says of a bad configuration. That none makes it panic is fuzzed (`scripts/fuzz config`).
fn configurations(figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    for (text, words) in CONFIGURATIONS {
        fs::write(work.path().join("bad.toml"), text)?;
        let mut role = Role::start(work.path(), "configured", &["run", "--config", "bad.toml"])?;
        let said = role.clear_error(LONGEST, &[2])?;
        ensure!(said.contains(words), "{text:?} gave {said}");
    }
    figures.add("configurations", CONFIGURATIONS.len());
    Ok(())
}

/// Damaged logs through the real program and a real machine: what a fuzz target, which has none, cannot judge is whether the replay
/// notices.
fn logs(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let cases = run.form.pick(30, 500);
    let (mut cases_run, mut diverged, mut unusable, mut equal) = (0u64, 0u64, 0u64, 0u64);
    // One guest lives on clock readings and random numbers, the other on interrupts.
    for (guest, words) in [("clock", "reads=300"), ("irq", "exits=1500 hz=2000")] {
        let take = Take {
            memory_check_ms: 50,
            ..Take::new(guest, 4, words, LONGEST)
        };
        let recorded = Recording::start(work.path(), guest, &take, None, None)?.finish()?;
        let bytes = fs::read(&recorded.log).context("read a log")?;
        let log = Log::read(&recorded.log)?;
        for case in 0..cases {
            let path = work.path().join("bad.log");
            // Half of them with every checksum made anew, so that the damage gets as far as it can.
            let repaired = case % 2 == 0;
            if repaired {
                let mut log = log.clone();
                if random.below(8) == 0 {
                    log.description = mutate(&log.description, random);
                } else {
                    let victim = random.below(log.items.len() as u64) as usize;
                    log.items[victim].payload = mutate(&log.items[victim].payload, random);
                }
                log.write(&path)?;
            } else {
                fs::write(&path, mutate(&bytes, random)).context("write a log")?;
            }
            let mut role = Role::start(work.path(), "replay", &["replay", "bad.log"])?;
            let status = role
                .end(LONGEST)
                .with_context(|| format!("case {case} of {guest}"))?;
            let said = role.said();
            ensure!(!said.contains("panicked"), "case {case} of {guest}: {said}");
            match status.code() {
                // A changed watermark or name changes nothing that is compared.
                Some(0) => equal += 1,
                Some(4) if said.contains("diverged") || said.contains("divergence") => {
                    diverged += 1
                }
                Some(1 | 4) => {
                    ensure!(
                        said.contains("doppel: "),
                        "case {case} of {guest} gave no reason: {said}"
                    );
                    unusable += 1;
                }
                _ => bail!("case {case} of {guest} ended by {status}: {said}"),
            }
            cases_run += 1;
        }
    }
    ensure!(
        equal * 2 < cases_run,
        "{equal} of {cases_run} damaged logs replayed as if nothing were wrong"
    );
    for (name, bytes) in foreign_logs() {
        fs::write(work.path().join(name), bytes)?;
        let mut role = Role::start(work.path(), "replay", &["replay", name])?;
        let said = role.clear_error(LONGEST, &[1, 4])?;
        ensure!(
            said.contains(name),
            "{name}: the message does not name the file: {said}"
        );
    }
    run.say(format!(
        "{cases_run} damaged logs: {diverged} diverged, {unusable} unusable, {equal} equal"
    ));
    figures.add("logs", cases_run);
    figures.add("logs_diverged", diverged);
    figures.add("logs_unusable", unusable);
    figures.add("logs_equal", equal);
    Ok(())
}

fn foreign_logs() -> Vec<(&'static str, Vec<u8>)> {
    let mut other_version = b"rdmalogF".to_vec();
    other_version.extend_from_slice(&9u32.to_le_bytes());
    other_version.resize(64, 0);
    vec![
        ("empty.log", Vec::new()),
        (
            "text.log",
            b"this is a text, and rather a long one for a log file".to_vec(),
        ),
        ("version.log", other_version),
        ("zeros.log", vec![0; 10_000]),
        ("magic.log", b"rdmalogF".to_vec()),
    ]
}

/// Every stranger is refused, and afterwards a real primary is not.
fn strangers(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let rounds = run.form.pick(1, 10);
    let work = directory()?;
    let socket = work.path().join("pair.sock");
    fs::create_dir(work.path().join("arbiter"))?;
    let common = ["--arbiter", "arbiter", "--socket", "pair.sock", "--json"];
    let mut backup = Role::start(work.path(), "backup", &[&["backup"], &common[..]].concat())?;
    backup.until("\"ready\"", LONGEST)?;
    let descriptors = open_descriptors(backup.pid())?;
    let mut visits = 0;
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        for stranger in QUICK.into_iter().chain([Stranger::Silent]) {
            let started = Instant::now();
            let answer = stranger.visit(&socket, "machine", random)?;
            slowest = slowest.max(started.elapsed());
            if let Some(reason) = stranger.reason() {
                let answer = answer.with_context(|| format!("{stranger:?} got no answer"))?;
                ensure!(answer.contains(reason), "{stranger:?} was told {answer:?}");
            }
            ensure!(
                backup.runs()?,
                "{stranger:?} ended the backup: {}",
                backup.said()
            );
            visits += 1;
        }
    }
    let held = open_descriptors(backup.pid())?;
    ensure!(
        held <= descriptors,
        "the backup holds {held} descriptors, {descriptors} before its visitors"
    );
    let primary = [
        "primary",
        "--guest",
        "irq",
        "--memory",
        "8",
        "--command-line",
        "exits=2000",
    ];
    let mut primary = Role::start(
        work.path(),
        "primary",
        &[&primary[..], &common[..]].concat(),
    )?;
    primary.until("\"paired\"", LONGEST)?;
    for role in [&mut primary, &mut backup] {
        let status = role.end(LONGEST)?;
        ensure!(
            status.code() == Some(0),
            "ended by {status}: {}",
            role.said()
        );
        ensure!(!role.said().contains("panicked"), "{}", role.said());
    }
    ensure!(!socket.exists(), "the socket file stays behind");
    run.say(format!(
        "{visits} strangers, the slowest gone after {slowest:?}"
    ));
    figures.add("strangers", visits);
    figures.add("slowest_stranger_ms", slowest.as_millis() as u64);
    Ok(())
}

fn open_descriptors(process: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{process}/fd"))
        .context("list descriptors")?
        .count())
}

/// A primary that meets a false backup ends with a clear error, soon.
fn impostors(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    for impostor in IMPOSTORS {
        let work = directory()?;
        fs::create_dir(work.path().join("arbiter"))?;
        let listener = UnixListener::bind(work.path().join("pair.sock"))?;
        let arguments = [
            "primary",
            "--guest",
            "irq",
            "--memory",
            "8",
            "--arbiter",
            "arbiter",
            "--socket",
            "pair.sock",
        ];
        let mut primary = Role::start(work.path(), "primary", &arguments)?;
        impostor.receive(&listener, random)?;
        let said = primary
            .clear_error(LONGEST, &[1])
            .with_context(|| format!("{impostor:?}"))?;
        run.say(format!(
            "{impostor:?}: {}",
            said.lines().last().unwrap_or_default()
        ));
    }
    figures.add("impostors", IMPOSTORS.len());
    Ok(())
}

/// What is written over the log of a running pair.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Garbage,
    Replayed,
    Foreign,
}

/// Bytes of the events lane that are damaged: a quarter of it, which the writer passes in any case.
const DAMAGED: usize = 256 << 10;

fn ring(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let mut foreign = vec![0; DAMAGED];
    let mut damaged = 0;
    for _ in 0..run.form.pick(1, 10) {
        for damage in [Damage::Garbage, Damage::Replayed, Damage::Foreign] {
            let work = directory()?;
            damaged_pair(work.path(), damage, random, &mut foreign, run)
                .with_context(|| format!("{damage:?}"))?;
            damaged += 1;
        }
    }
    figures.add("rings_damaged", damaged);
    Ok(())
}

/// A pair whose log is damaged while it runs: the backup says so and never goes live, the primary goes on.
fn damaged_pair(
    work: &Path,
    damage: Damage,
    random: &mut Random,
    foreign: &mut Vec<u8>,
    run: &Run,
) -> Result<()> {
    fs::create_dir(work.join("arbiter"))?;
    let common = ["--arbiter", "arbiter", "--json"];
    let backup = ["backup", "--socket", "back.sock"];
    let mut backup = Role::start(work, "backup", &[&backup[..], &common[..]].concat())?;
    backup.until("\"ready\"", LONGEST)?;
    let memory = meddler::between(&work.join("front.sock"), &work.join("back.sock"))?;
    let primary = [
        "primary",
        "--socket",
        "front.sock",
        "--guest",
        "irq",
        "--memory",
        "8",
        "--command-line",
        "hz=2000",
    ];
    let mut primary = Role::start(work, "primary", &[&primary[..], &common[..]].concat())?;
    primary.until("\"paired\"", LONGEST)?;
    backup.until("\"paired\"", LONGEST)?;
    let memory = memory.recv_timeout(LONGEST).context("the ring passed by")?;
    let until = Instant::now() + LONGEST;
    while memory.committed()? < 32 << 10 {
        ensure!(
            Instant::now() < until,
            "the pair logs nothing: {}",
            primary.said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let now = memory.events(DAMAGED)?;
    let bytes = match damage {
        Damage::Garbage => (0..DAMAGED).map(|_| random.next() as u8).collect(),
        Damage::Replayed => {
            // What stands at the lane's start, again and again: whole entries, long replayed.
            let early = &now[..16 << 10];
            early.iter().copied().cycle().take(DAMAGED).collect()
        }
        Damage::Foreign => foreign.clone(),
    };
    *foreign = now;
    // The writer overwrites damage with good entries; what counts is damage between its write and the other's read.
    while backup.runs()? {
        ensure!(
            Instant::now() < until,
            "the backup takes damaged bytes for good ones: {}",
            backup.said()
        );
        memory.overwrite(&bytes)?;
    }
    let said = backup.clear_error(LONGEST, &[3])?;
    ensure!(
        !said.contains("\"live\""),
        "a backup with a damaged log went live: {said}"
    );
    primary.until("UNPROTECTED", LONGEST)?;
    ensure!(
        primary.runs()?,
        "the primary did not survive its backup: {}",
        primary.said()
    );
    primary.stop(LONGEST)?;
    ensure!(!primary.said().contains("panicked"), "{}", primary.said());
    run.say(format!(
        "{damage:?}: {}",
        said.lines().last().unwrap_or_default()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
