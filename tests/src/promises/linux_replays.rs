//! Replay of a prepared Linux kernel from power-on to power-off (issue 7, point 2): equal registers at every exit, equal memory at the end,
//! in a host of the lab, with its CPUs busy and its vCPU kicked.
#![forbid(unsafe_code)]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::inside::Inside;
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-replays",
    line: "Debian's kernel, prepared, replays from power-on to power-off with equal registers at every exit and equal memory; unprepared it does not, and that is noticed",
    short: Duration::from_secs(150),
    full: Duration::from_secs(2400),
    show,
};

/// For a guest's life, or its replay: many times what either takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(300);

/// Keeps both CPUs of the host busy, and kicks every thread of the recorder or the replayer out of the guest by stopping and continuing it.
const DISTURB: &str = "for cpu in 0 1; do (while :; do :; done) & busy=\"$busy $!\"; done
\"$@\" & work=$!
while kill -0 $work 2>/dev/null; do kill -STOP $work; kill -CONT $work; usleep $((RANDOM % 20000)); done 2>/dev/null
wait $work; code=$?
kill $busy; exit $code";

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let prepared = guest.prepare(directory.path())?;
    let inside = Inside::boot("promise-linux-replays")?;
    for (name, file) in [
        ("prepared", &prepared.kernel),
        ("prepared.cpio", &prepared.initrd),
        ("stock", &guest.kernel),
        ("stock.cpio", &guest.initrd),
        ("disturb", &directory.path().join("disturb")),
    ] {
        if name == "disturb" {
            fs::write(file, DISTURB).context("write a script")?;
        }
        fs::copy(file, inside.shared().join(name))
            .with_context(|| format!("share {}", file.display()))?;
    }
    let mut figures = Figures::default();
    let (mut equal, mut sync_points) = (0u64, 0);
    for task in ["boot", "load", "disk"] {
        let mut lives = Vec::new();
        for number in 0..run.form.count(1, 10) {
            let life = life(&inside, "prepared", task, number % 2 == 1)
                .with_context(|| format!("{task}, run {number}"))?;
            ensure!(
                life.replay["mismatches"] == 0 && life.code == 0,
                "{task}, run {number}, differs in its replay: {}",
                life.replay
            );
            run.say(format!("{task}: {}", life.figures()));
            sync_points += life.replay["sync_points"].as_u64().unwrap_or(0);
            equal += 1;
            lives.push(life.figures());
        }
        figures.add(task, lives);
    }
    let stock = life(&inside, "stock", "boot", false).context("the unprepared kernel")?;
    ensure!(
        stock.code != 0 && stock.replay["mismatches"] == 1,
        "an unprepared kernel's replay did not differ, or nobody noticed: {}",
        stock.replay
    );
    figures.add("replays_equal", equal);
    figures.add("sync_points_replayed", sync_points);
    figures.add("unprepared", stock.replay["error"].clone());
    Ok(figures)
}

/// A guest's life, recorded and replayed.
struct Life {
    recorded: Value,
    replay: Value,
    code: i32,
    took: [Duration; 2],
}

impl Life {
    fn figures(&self) -> Value {
        json!({
            "sync_points": self.recorded["sync_points"],
            "log_bytes": self.recorded["bytes"],
            "record_s": (self.took[0].as_secs_f64() * 10.0).round() / 10.0,
            "replay_s": (self.took[1].as_secs_f64() * 10.0).round() / 10.0,
        })
    }
}

fn life(inside: &Inside, files: &str, task: &str, disturbed: bool) -> Result<Life> {
    let before = if disturbed {
        "bash /shared/disturb "
    } else {
        ""
    };
    let (make, disk) = match task {
        "disk" => (
            "rm -f /tmp/disk*; truncate -s 16M /tmp/disk; ",
            "--disk /tmp/disk ",
        ),
        _ => ("", ""),
    };
    let record = format!(
        "rm -f /tmp/console; {make}{before}doppel record {disk}--json --on-reset end --kernel /shared/{files} --initrd /shared/{files}.cpio --memory 256 \
         --console /tmp/console --out /tmp/linux.log --command-line 'quiet guest.do={task}'"
    );
    let replay = format!("{before}doppel replay --json /tmp/linux.log");
    let mut took = [Duration::ZERO; 2];
    let mut ends = Vec::new();
    for (command, took) in [record, replay].iter().zip(&mut took) {
        let started = Instant::now();
        let ended = inside.host().run(&["bash", "-c", command], LONGEST)?;
        *took = started.elapsed();
        let said = String::from_utf8_lossy(&ended.stdout);
        let last = said
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Value>(line).ok())
            .with_context(|| {
                let errors = String::from_utf8_lossy(&ended.stderr);
                format!("{command} said nothing, code {}: {errors}", ended.code)
            })?;
        ends.push((ended.code, last));
    }
    let (code, replay) = ends.pop().context("it was replayed")?;
    let (recorded_code, recorded) = ends.pop().context("it was recorded")?;
    let console = inside.host().sh("cat /tmp/console", LONGEST)?;
    if task == "disk" {
        // Read from the disk, and once more after it was mounted anew.
        let whole = console.lines().filter(|line| line.trim() == "20").count();
        ensure!(whole == 2, "files on the disk are not whole:\n{console}");
    }
    ensure!(
        recorded_code == 0 && console.contains("guest: done"),
        "the guest did not come to its end, code {recorded_code}; its last words:\n{}",
        &console[console.len().saturating_sub(2000)..]
    );
    Ok(Life {
        recorded,
        replay,
        code,
        took,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
