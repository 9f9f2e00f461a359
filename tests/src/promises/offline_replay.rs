//! Offline replay (issue 7, point 7): what a flight recorder leaves behind replays, to its end or to a position, whatever ended it;
//! and gdb stops in it.
#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::boot::Image;
use hypervisor::entry::Body;
use serde_json::Value;

use crate::harness::gdb::gdb;
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::recording::{Log, Recording, Take};
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "offline-replay",
    line: "What a flight recorder kept replays to the recorded memory, or to any position, however it ended, and gdb stops in it",
    short: Duration::from_secs(45),
    full: Duration::from_secs(600),
    show,
};

/// A bound on anything that must end.
const LONGEST: Duration = Duration::from_secs(120);

/// A guest that lives on interrupts, and never ends by itself.
const ENDLESS: [&str; 6] = [
    "--guest",
    "irq",
    "--memory",
    "8",
    "--command-line",
    "hz=500",
];

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let work = tempfile::Builder::new()
        .prefix("doppel-offline-")
        .tempdir()
        .context("make a directory")?;
    let work = work.path();
    positions(run, work, &mut random, &mut figures).context("to a position")?;
    let whole = rotated(work, &mut figures).context("a recording that was rotated")?;
    debugged(work, &whole, &mut figures).context("with gdb")?;
    backups_killed(run, work, &mut random, &mut figures).context("backups that are killed")?;
    primary_killed(work, &mut figures).context("a backup that takes over")?;
    torn(run, work, &mut random, &mut figures).context("torn files")?;
    foreign(work, &whole.directory).context("foreign files")?;
    Ok(figures)
}

/// Runs `doppel replay --json` with these words: its code, the object that it printed, if any, and its messages.
fn replay(work: &Path, words: &[&str]) -> Result<(i32, Value, String)> {
    let started = Instant::now();
    let output = Command::new("timeout")
        .arg(LONGEST.as_secs().to_string())
        .arg(doppel()?)
        .args(["replay", "--json"])
        .args(words)
        .current_dir(work)
        .output()
        .context("start doppel")?;
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().context("an exit code")?;
    ensure!(
        code != 124,
        "{words:?} took {:?}: {messages}",
        started.elapsed()
    );
    ensure!(!messages.contains("panicked"), "{words:?}: {messages}");
    let object = String::from_utf8_lossy(&output.stdout);
    let object = object
        .lines()
        .last()
        .map_or(Ok(Value::Null), serde_json::from_str);
    Ok((code, object.context("read what it printed")?, messages))
}

/// A replay that meets no difference.
fn equal(work: &Path, words: &[&str]) -> Result<Value> {
    let (code, object, messages) = replay(work, words)?;
    ensure!(
        code == 0 && object["mismatches"] == 0 && object["error"].is_null(),
        "{words:?} ended with code {code}: {object} {messages}"
    );
    Ok(object)
}

/// At each position that is asked for, the digest is the one that was recorded there.
fn positions(run: &Run, work: &Path, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let take = Take::new("irq", 4, "exits=3000 hz=2000", LONGEST);
    let recorded = Recording::start(work, "whole", &take, None, None)?.finish()?;
    let entries = Log::read(&recorded.log)?.entries()?;
    let digests: Vec<(u64, String)> = entries
        .iter()
        .filter_map(|(_, entry)| match &entry.body {
            Body::Step(step) => Some((entry.position.0, step.digest.to_string())),
            _ => None,
        })
        .collect();
    ensure!(digests.len() > 100, "only {} digests", digests.len());
    let count = run.form.pick(4, 40);
    for _ in 0..count {
        let (position, digest) = &digests[random.below(digests.len() as u64) as usize];
        let there = equal(work, &["whole.log", "--to", &position.to_string()])?;
        ensure!(
            there["sync_points"] == *position
                && there["digest"] == **digest
                && there["reached"] == "position",
            "position {position} had digest {digest}: {there}"
        );
    }
    let end = equal(work, &["whole.log"])?;
    ensure!(
        end["memory_hash_replayed"] == *recorded.memory_hash && end["reached"] == "end",
        "{end}"
    );
    let beyond = (recorded.sync_points + 1).to_string();
    let (code, _, messages) = replay(work, &["whole.log", "--to", &beyond])?;
    ensure!(
        code == 1 && messages.contains("not reached"),
        "code {code}: {messages}"
    );
    figures.add("positions_equal", count);
    Ok(())
}

/// A recording that ended on purpose.
struct Whole {
    directory: PathBuf,
    memory_hash: String,
}

/// `record` into a directory whose checkpoints take each other's place: what is left replays to the recorded memory.
fn rotated(work: &Path, figures: &mut Figures) -> Result<Whole> {
    let words = [
        "record",
        "--json",
        "--guest",
        "irq",
        "--memory",
        "8",
        "--command-line",
        "exits=20000 hz=1000",
        "--recorder",
        "rotated,every=100ms",
    ];
    let mut role = Role::start(work, "record", &words)?;
    let status = role.end(LONGEST)?;
    let said = role.said();
    ensure!(status.code() == Some(0), "ended by {status}: {said}");
    let recorded = last(&said, "recorded")?;
    let checkpoints = events(&said, "checkpointed");
    ensure!(
        checkpoints.len() >= 2,
        "no checkpoint took another's place: {said}"
    );
    let directory = work.join("rotated");
    let files = fs::read_dir(&directory)?.count();
    ensure!(
        files <= 5,
        "{files} files are left: older segments were not removed"
    );
    let memory_hash = recorded["memory_hash"]
        .as_str()
        .context("the recording has no end")?
        .to_owned();
    let end = equal(work, &["rotated"])?;
    ensure!(
        end["reached"] == "end" && end["memory_hash_replayed"] == *memory_hash,
        "the memory's hash was {memory_hash}: {end}"
    );
    let began = end["began"].as_u64().unwrap_or(0);
    ensure!(began > 0, "it does not begin at a checkpoint: {end}");
    let (code, _, messages) = replay(work, &["rotated", "--to", "1"])?;
    ensure!(
        code == 1 && messages.contains("not before the recording's checkpoint"),
        "code {code}: {messages}"
    );
    let mut stops: Vec<u64> = checkpoints
        .iter()
        .filter_map(|event| event["stopped_us"].as_u64())
        .collect();
    stops.sort_unstable();
    figures.add("checkpoints", stops.len());
    figures.add("stop_us_p50", stops[stops.len() / 2]);
    figures.add("stop_us_max", *stops.last().context("there are some")?);
    Ok(Whole {
        directory,
        memory_hash,
    })
}

fn events(said: &str, name: &str) -> Vec<Value> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|event| event["event"] == name)
        .collect()
}

fn last(said: &str, name: &str) -> Result<Value> {
    let last = events(said, name).pop();
    last.with_context(|| format!("it did not say {name}: {said}"))
}

/// gdb stops at the guest's interrupt handler, reads what is there, and goes on to the end: the memory is as recorded.
fn debugged(work: &Path, whole: &Whole, figures: &mut Figures) -> Result<()> {
    let symbols = work.join("irq.elf");
    fs::write(&symbols, Image::find("irq")?.bytes())?;
    let words = ["replay", "--json", "rotated", "--gdb", "./gdb.sock"];
    let mut role = Role::start(work, "debugged", &words)?;
    role.until("gdb is waited for", LONGEST)?;
    // The stub of the timer's line, behind those of 32 exceptions, 16 bytes each.
    let stub = "(char *) &guest_stubs + 512";
    let said = gdb(
        &work.join("gdb.sock"),
        Some(&symbols),
        &[
            "printf \"begins at %p\\n\", $pc",
            "p *(int *) 0x1000000000",
            "set var $rax = 1",
            &format!("break *({stub})"),
            "continue",
            &format!("printf \"stopped: %d\\n\", $pc == ({stub})"),
            "x/2i $pc",
            "monitor position",
            "stepi",
            "printf \"stepped: %d\\n\", $pc != 0",
            "continue",
            &format!("printf \"again: %d\\n\", $pc == ({stub})"),
            "delete",
            "continue",
            "monitor position",
            "continue",
        ],
        LONGEST,
    )?;
    for expected in [
        "Cannot access memory",
        "stopped: 1",
        "inc",
        "iret",
        "after sync point",
        "stepped: 1",
        "again: 1",
        "exited normally",
    ] {
        ensure!(
            said.contains(expected),
            "gdb did not say {expected:?}: {said}"
        );
    }
    let status = role.end(LONGEST)?;
    let replayed = role.said();
    ensure!(
        status.code() == Some(0),
        "ended by {status}: {replayed} {said}"
    );
    let end = replayed
        .lines()
        .find_map(|line| serde_json::from_str::<Value>(line).ok())
        .with_context(|| format!("it printed nothing: {replayed}"))?;
    ensure!(
        end["mismatches"] == 0 && end["memory_hash_replayed"] == *whole.memory_hash,
        "breakpoints show in the guest's memory: {end}"
    );
    // One that goes away leaves a replay that goes on.
    let mut role = Role::start(work, "left", &words)?;
    role.until("gdb is waited for", LONGEST)?;
    gdb(&work.join("gdb.sock"), None, &["detach"], LONGEST)?;
    let status = role.end(LONGEST)?;
    ensure!(
        status.code() == Some(0),
        "ended by {status}: {}",
        role.said()
    );
    for place in ["0.0.0.0:1234", "192.0.2.1:99", "nowhere"] {
        let mut role = Role::start(work, "elsewhere", &["replay", "rotated", "--gdb", place])?;
        let status = role.end(LONGEST)?;
        ensure!(
            status.code() == Some(2),
            "{place}: ended by {status}: {}",
            role.said()
        );
    }
    figures.add("gdb_stops", 2);
    Ok(())
}

/// A pair whose backup records into `recording`.
struct Pair {
    primary: Role,
    backup: Role,
}

fn pair(work: &Path, words: &str) -> Result<Pair> {
    fs::create_dir_all(work.join("arbiter"))?;
    let common = ["--arbiter", "arbiter", "--socket", "pair.sock", "--json"];
    let recorder = ["backup", "--recorder", words];
    let mut backup = Role::start(work, "backup", &[&recorder[..], &common[..]].concat())?;
    backup.until("\"ready\"", LONGEST)?;
    let primary = [
        &["primary", "--memory-check-ms", "50"],
        &ENDLESS[..],
        &common[..],
    ]
    .concat();
    let mut primary = Role::start(work, "primary", &primary)?;
    primary.until("\"paired\"", LONGEST)?;
    backup.until("\"paired\"", LONGEST)?;
    Ok(Pair { primary, backup })
}

/// SIGKILL at any moment leaves a directory that replays.
fn backups_killed(
    run: &Run,
    work: &Path,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let (mut sync_points, mut checks, mut torn, mut began) = (0, 0, 0, 0);
    let count = run.form.pick(4, 40);
    for number in 0..count {
        let work = work.join(format!("killed-{number}"));
        fs::create_dir(&work)?;
        let mut pair = pair(&work, "recording,every=60ms")?;
        // Before there is anything, and in the middle of checkpoints.
        let word = if number % 2 == 0 {
            "records into"
        } else {
            "\"checkpointed\""
        };
        pair.backup.until(word, LONGEST)?;
        std::thread::sleep(Duration::from_millis(random.below(400)));
        send(pair.backup.pid(), Signal::Kill)?;
        pair.backup.end(LONGEST)?;
        pair.primary.until("UNPROTECTED", LONGEST)?;
        pair.primary.stop(LONGEST)?;
        let end = equal(&work, &["recording"])
            .with_context(|| format!("kill {number}: {}", pair.backup.said()))?;
        ensure!(end["reached"] == "log_over", "{end}");
        let number = |name: &str| end[name].as_u64().unwrap_or(0);
        sync_points += number("sync_points");
        checks += number("memory_checks");
        torn += u64::from(!end["torn"].is_null());
        began += u64::from(number("began") > 0);
    }
    ensure!(sync_points > 0, "nothing was recorded of {count} backups");
    ensure!(
        began >= count / 2,
        "{began} recordings of {count} begin at a checkpoint"
    );
    run.say(format!(
        "{count} backups killed: {began} recordings begin at a checkpoint, {torn} end in a torn entry, {checks} whole memories were equal"
    ));
    figures.add("backups_killed", count);
    figures.add("torn_ends", torn);
    figures.add("memories_equal", checks);
    Ok(())
}

/// The primary dies, its backup takes over: its recording ends with the last word of the primary, and says so.
fn primary_killed(work: &Path, figures: &mut Figures) -> Result<()> {
    let work = work.join("taken-over");
    fs::create_dir(&work)?;
    let mut pair = pair(&work, "recording,every=60ms")?;
    std::thread::sleep(Duration::from_millis(400));
    send(pair.primary.pid(), Signal::Kill)?;
    pair.primary.end(LONGEST)?;
    pair.backup.until("\"live\"", LONGEST)?;
    pair.backup.until("the recording is whole", LONGEST)?;
    let end = equal(&work, &["recording"])?;
    let live = last(&pair.backup.said(), "live")?;
    ensure!(
        end["sync_points"] == live["position"],
        "the backup took over at {}, its recording ends at {end}",
        live["position"]
    );
    ensure!(
        pair.backup.runs()?,
        "the backup ended: {}",
        pair.backup.said()
    );
    pair.backup.stop(LONGEST)?;
    figures.add("recorded_up_to_the_take_over", live["position"].clone());
    Ok(())
}

/// The newest log, cut at any byte, replays up to there; a checkpoint that is cut is refused in words.
fn torn(run: &Run, work: &Path, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let place = work.join("torn");
    let count = run.form.pick(6, 100);
    let mut shorter = 0;
    let whole = equal(work, &["rotated"])?;
    for number in 0..count {
        copy(&work.join("rotated"), &place)?;
        let log = newest(&place, ".log")?;
        let bytes = fs::metadata(&log)?.len();
        let cut = random.below(bytes);
        OpenOptions::new().write(true).open(&log)?.set_len(cut)?;
        let end = equal(work, &["torn"])
            .with_context(|| format!("cut {number}, at byte {cut} of {bytes}"))?;
        ensure!(end["reached"] == "log_over", "{end}");
        shorter += u64::from(end["sync_points"].as_u64() < whole["sync_points"].as_u64());
    }
    ensure!(shorter > 0, "no cut left anything out");
    for number in 0..count {
        copy(&work.join("rotated"), &place)?;
        let checkpoint = newest(&place, ".checkpoint")?;
        let bytes = fs::metadata(&checkpoint)?.len();
        let cut = random.below(bytes);
        let what = if number % 2 == 0 {
            let file = OpenOptions::new().write(true).open(&checkpoint)?;
            file.set_len(cut)?;
            format!("cut at byte {cut} of {bytes}")
        } else {
            let mut content = fs::read(&checkpoint)?;
            content[cut as usize] ^= 1 << random.below(8);
            fs::write(&checkpoint, content)?;
            format!("a flipped bit at byte {cut} of {bytes}")
        };
        refused(work, "torn", ".checkpoint").context(what)?;
    }
    figures.add("logs_cut", count);
    figures.add("checkpoints_damaged", count);
    Ok(())
}

/// Refused with code 1, in words in which this stands.
fn refused(work: &Path, directory: &str, expected: &str) -> Result<()> {
    let (code, object, messages) = replay(work, &[directory])?;
    ensure!(
        code == 1 && messages.contains("doppel: ") && messages.contains(expected),
        "not refused with {expected:?}, code {code}: {object} {messages}"
    );
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn newest(directory: &Path, ending: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.display().to_string().ends_with(ending) {
            found.push(path);
        }
    }
    found.into_iter().max().context("a file of a recording")
}

/// Files of other recordings, of other programs, and another CPU.
fn foreign(work: &Path, whole: &Path) -> Result<()> {
    let other = work.join("taken-over/recording");
    let place = work.join("foreign");
    let change = |file: &str, bytes: Option<Vec<u8>>, expected: &str| -> Result<()> {
        copy(whole, &place)?;
        let path = match file {
            "machine" => place.join(file),
            ending => newest(&place, ending)?,
        };
        match bytes {
            Some(bytes) => fs::write(&path, bytes)?,
            None => fs::remove_file(&path)?,
        }
        refused(work, "foreign", expected).with_context(|| format!("{file} changed"))
    };
    let text = b"this is a text, and rather a long one for a file of a recording".to_vec();
    let of_other = fs::read(newest(&other, ".log")?)?;
    change(".log", Some(of_other), "another recording")?;
    change(".log", Some(text.clone()), "not a log file")?;
    change(
        ".checkpoint",
        Some(text.clone()),
        "no checkpoint of a recording",
    )?;
    change(
        "machine",
        Some(text),
        "no description of a recorded machine",
    )?;
    change("machine", None, "nothing is recorded there")?;
    let machine = fs::read(whole.join("machine"))?;
    let mut cut = machine.clone();
    cut.truncate(machine.len() - 1);
    change("machine", Some(cut), "bytes, where it says")?;
    let mut newer = machine;
    newer[8] = 9;
    change("machine", Some(newer), "version 9")?;
    fs::create_dir(work.join("empty"))?;
    refused(work, "empty", "nothing is recorded there")?;
    refused(work, "missing", "missing")?;
    other_cpu(work)
}

/// A log of another CPU model is refused, and the message says which.
fn other_cpu(work: &Path) -> Result<()> {
    let mut log = Log::read(&work.join("whole.log"))?;
    let text = String::from_utf8_lossy(&log.description).into_owned();
    let at = text
        .find("\"signature\":")
        .context("the CPU's model is in the log")?;
    let digit = at + "\"signature\":".len();
    // The last digit of the stepping and what follows stays a number.
    let byte = &mut log.description[digit];
    *byte = if *byte == b'1' { b'2' } else { b'1' };
    log.write(&work.join("other-cpu.log"))?;
    let (code, _, messages) = replay(work, &["other-cpu.log"])?;
    ensure!(
        code == 1 && messages.contains("it was recorded on a CPU of"),
        "code {code}: {messages}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
