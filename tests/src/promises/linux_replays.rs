//! Replay of a prepared Linux kernel from power-on to power-off (issue 7, point 2): equal registers at every exit, equal memory at the end,
//! in a host of the lab, with its CPU busy and its vCPU kicked.
//!
//! What the guest does meanwhile: redis serves this host over the network, fio verifies what it writes to a disk, a compiler makes
//! programs, a program takes all memory. Each life's console must show that the work was done (`proof`). A recording and its replay meet
//! different troubles: which of them is disturbed changes from life to life.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::inside::Inside;
use crate::linux_guest::{Kit, LinuxGuest, Prepared};
use crate::promise::{Figures, Form, Promise, Run};

mod proof;

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-replays",
    line: "Debian's kernel, prepared, replays from power-on to power-off with equal registers at every exit and equal memory, under load and random kicks: redis over the network, fio on ext4, a compiler, memory that runs out; unprepared it does not, and that is noticed",
    short: Duration::from_secs(130),
    full: Duration::from_secs(2400),
    show,
};

/// What a guest does in its life.
struct Work {
    name: &'static str,
    /// Its files' name in the host.
    files: &'static str,
    memory_mib: u32,
    /// Its command line, of what tests understand.
    words: &'static str,
    /// More options of `doppel record`.
    options: &'static str,
    /// What runs the recorder: it is given the command.
    driver: &'static str,
    /// Whether the work was done, from its console and what the driver was told.
    proof: fn(&str, &str) -> Result<Value>,
}

const WORKS: [Work; 4] = [
    Work {
        name: "requests",
        files: "redis",
        memory_mib: 256,
        words: "guest.do=redis guest.ip=10.77.0.2/24",
        options: "--tap guest0",
        driver: "bash /shared/ask",
        proof: proof::requests,
    },
    Work {
        name: "fio",
        files: "fio",
        // The archive is there twice until it is unpacked.
        memory_mib: 384,
        words: "guest.do=fio",
        options: "--disk /tmp/disk",
        driver: "",
        proof: proof::fio,
    },
    Work {
        name: "compile",
        files: "compiler",
        memory_mib: 256,
        words: "guest.do=compile",
        options: "",
        driver: "",
        proof: proof::compile,
    },
    Work {
        name: "exhaust",
        files: "redis",
        memory_mib: 256,
        words: "guest.do=exhaust",
        options: "",
        driver: "",
        proof: proof::exhaust,
    },
];

/// The kernel as Debian has it: it is enough that it boots.
const STOCK: Work = Work {
    name: "unprepared",
    files: "stock",
    memory_mib: 256,
    words: "guest.do=boot",
    options: "",
    driver: "",
    proof: |_, _| Ok(Value::Null),
};

/// Lives of each work in the full form: twenty in all.
const LIVES: u64 = 5;

/// For a guest's life, or its replay: many times what either takes on a busy machine, disturbed.
const LONGEST: Duration = Duration::from_secs(900);

/// For what is made ready before that.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Of the disk, with a file system that has a journal.
const DISK_BYTES: u64 = 32 << 20;

/// Keeps each CPU of the host busy (one, where nobody asks for more), and kicks every thread of the recorder or the replayer out of the
/// guest by stopping and continuing it.
const DISTURB: &str = "for cpu in $(seq $(nproc)); do (while :; do :; done) & busy=\"$busy $!\"; done
\"$@\" & work=$!
while kill -0 $work 2>/dev/null; do kill -STOP $work; kill -CONT $work; usleep $((RANDOM % 20000)); done 2>/dev/null
wait $work; code=$?
kill $busy; exit $code";

/// Records a guest that serves redis while this host asks it, and has it end when all is answered.
const ASK: &str = "\"$@\" >/tmp/said & life=$!
until redis-cli -h 10.77.0.2 ping 2>/dev/null | grep -q PONG; do kill -0 $life || exit 1; usleep 100000; done
redis-benchmark -h 10.77.0.2 -n REQUESTS -c 10 -t KINDS --csv >/tmp/told && redis-cli -h 10.77.0.2 info commandstats >>/tmp/told
redis-cli -h 10.77.0.2 shutdown nosave
wait $life; code=$?
cat /tmp/said; exit $code";

const NETWORK: &str = "ip tuntap add dev guest0 mode tap && ip address add 10.77.0.1/24 dev guest0 && ip link set guest0 up";

/// Which of a recording and its replay are disturbed, in turn: every life of the full form has its share.
const DISTURBED: [[bool; 2]; 3] = [[true, false], [false, true], [true, true]];

/// The same of the short form, one for each work: what is disturbed takes five times as long.
const DISTURBED_SHORT: [[bool; 2]; WORKS.len()] =
    [[false; 2], [false; 2], [false, true], [false; 2]];

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let inside = Inside::boot("promise-linux-replays")?;
    let mut figures = Figures::default();
    for (name, kit) in [
        ("redis", Kit::Redis),
        ("fio", Kit::Fio),
        ("compiler", Kit::Compiler),
    ] {
        let place = directory.path().join(name);
        let guest = LinuxGuest::with(kit, &place)?;
        let prepared = guest.prepare(&place)?;
        share(&inside, &prepared.kernel, name)?;
        share(&inside, &prepared.initrd, &format!("{name}.cpio"))?;
        if kit == Kit::Fio {
            figures.add("fio_rdtsc_rewritten", rewritten(&prepared, "usr/bin/fio")?);
        }
        if kit == Kit::Redis {
            share(&inside, &guest.kernel, "stock")?;
            share(&inside, &guest.initrd, "stock.cpio")?;
        }
    }
    let ask = ASK
        .replace("REQUESTS", &proof::REQUESTS.to_string())
        .replace("KINDS", &proof::KINDS.join(","));
    for (name, text) in [("disturb", DISTURB), ("ask", &ask)] {
        fs::write(inside.shared().join(name), text).context("write a script")?;
    }
    make_file_system(&inside.shared().join("disk"))?;
    let programs = ["redis-cli", "redis-benchmark"].map(|name| Path::new("/usr/bin").join(name));
    inside.bring_with_libraries(&programs)?;
    inside.host().sh(NETWORK, READY_WITHIN)?;

    let (mut equal, mut sync_points) = (0, 0);
    for work in &WORKS {
        let mut lives = Vec::new();
        for number in 0..run.form.count(1, LIVES) {
            let disturbed = match run.form {
                Form::Full => DISTURBED[equal % DISTURBED.len()],
                _ => DISTURBED_SHORT[equal],
            };
            let what = || format!("{}, run {number}, disturbed: {disturbed:?}", work.name);
            let life = life(&inside, work, disturbed).with_context(what)?;
            ensure!(
                life.replay["mismatches"] == 0 && life.code == 0,
                "{} differs in its replay: {}",
                what(),
                life.replay
            );
            run.say(format!("{}: {}", work.name, life.figures()));
            sync_points += life.replay["sync_points"].as_u64().unwrap_or(0);
            equal += 1;
            lives.push(life.figures());
        }
        figures.add(work.name, lives);
    }
    let stock = life(&inside, &STOCK, [false; 2]).context("the unprepared kernel")?;
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

fn share(inside: &Inside, file: &Path, name: &str) -> Result<()> {
    fs::copy(file, inside.shared().join(name))
        .with_context(|| format!("share {}", file.display()))
        .map(drop)
}

/// How many RDTSC of a program were rewritten: all that are in it, and there are some.
fn rewritten(prepared: &Prepared, path: &str) -> Result<usize> {
    let files = prepared.report["report"]["files"].as_array();
    let file = files
        .into_iter()
        .flatten()
        .find(|file| file["path"] == path)
        .with_context(|| format!("the report says nothing of {path}"))?;
    let sites = file["sites"].as_array().context("a file without sites")?;
    let constant = |site: &&Value| site["outcome"]["rewritten"] == "89d0";
    ensure!(
        !sites.is_empty() && sites.iter().all(|site| constant(&site)),
        "{path} was not rewritten as programs are: {sites:?}"
    );
    Ok(sites.len())
}

fn make_file_system(image: &Path) -> Result<()> {
    fs::File::create(image)
        .and_then(|file| file.set_len(DISK_BYTES))
        .context("make a disk's image")?;
    let output = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(image)
        .output()
        .context("start mkfs.ext4 (Debian's package e2fsprogs)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mkfs.ext4: {said}");
    Ok(())
}

/// A guest's life, recorded and replayed.
struct Life {
    recorded: Value,
    replay: Value,
    code: i32,
    took: [Duration; 2],
    disturbed: [bool; 2],
    shown: Value,
}

impl Life {
    fn figures(&self) -> Value {
        let seconds = |took: Duration| (took.as_secs_f64() * 10.0).round() / 10.0;
        json!({
            "sync_points": self.recorded["sync_points"],
            "log_bytes": self.recorded["bytes"],
            "record_s": seconds(self.took[0]),
            "replay_s": seconds(self.took[1]),
            "record_disturbed": self.disturbed[0],
            "replay_disturbed": self.disturbed[1],
            "shown": self.shown,
        })
    }
}

fn life(inside: &Inside, work: &Work, disturbed: [bool; 2]) -> Result<Life> {
    let disturb = |yes| if yes { "bash /shared/disturb" } else { "" };
    let Work {
        files,
        memory_mib,
        words,
        options,
        driver,
        ..
    } = work;
    let record = format!(
        "rm -f /tmp/console /tmp/told /tmp/linux.log; cp /shared/disk /tmp/disk; \
         {driver} {} doppel record {options} --json --on-reset end --kernel /shared/{files} --initrd /shared/{files}.cpio \
         --memory {memory_mib} --console /tmp/console --out /tmp/linux.log --command-line 'quiet {words}'",
        disturb(disturbed[0])
    );
    let replay = format!(
        "{} doppel replay --json /tmp/linux.log",
        disturb(disturbed[1])
    );
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
    let console = inside.host().sh("cat /tmp/console", READY_WITHIN)?;
    let told = inside
        .host()
        .sh("cat /tmp/told 2>/dev/null || true", READY_WITHIN)?;
    let last_words = &console[console.floor_char_boundary(console.len().saturating_sub(2000))..];
    ensure!(
        recorded_code == 0 && console.contains("guest: done"),
        "the guest did not come to its end, code {recorded_code}; its last words:\n{last_words}"
    );
    let shown = (work.proof)(&console, &told).with_context(|| {
        format!("the host was told {told:?}; the guest's last words:\n{last_words}")
    })?;
    Ok(Life {
        recorded,
        replay,
        code,
        took,
        disturbed,
        shown,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
