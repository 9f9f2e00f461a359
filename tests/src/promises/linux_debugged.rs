//! Offline replay of Linux (issue 7, point 7): a recorded boot reaches the recorded memory hash, and gdb stops at a kernel function
//! in it, in a host of the lab.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::inside::Inside;
use crate::lab::{self, image, packages};
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-debugged",
    line: "A recorded boot of Debian's kernel replays from its last checkpoint to the recorded memory, and gdb stops at a kernel function in it",
    short: Duration::from_secs(150),
    full: Duration::from_secs(600),
    show,
};

/// For a guest's life, or its replay: many times what either takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(300);

/// Called once, as the guest turns itself off: behind every checkpoint.
const FUNCTION: &str = "kernel_power_off";

/// Runs gdb's commands, which are in `/shared/commands`, on a replay; then says what the replay printed.
const DEBUG: &str = "cd /tmp; rm -f gdb.sock; doppel replay --json recording --gdb ./gdb.sock >replay.out 2>replay.err & replay=$!
for try in $(seq 600); do [ -S gdb.sock ] && break; sleep 0.1; done
LD_LIBRARY_PATH=/shared/lib timeout 250 /shared/gdb --nx --quiet --batch -x /shared/commands 2>&1 || echo gdb failed
wait $replay; echo replay ended with $?; cat replay.err replay.out";

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let prepared = guest.prepare(directory.path())?;
    let map = directory.path().join("System.map");
    let map = fs::read_to_string(&map).context("read the kernel's System.map")?;
    let address = address(&map, FUNCTION)?;
    let inside = Inside::boot("promise-linux-debugged")?;
    for (name, file) in [
        ("prepared", &prepared.kernel),
        ("prepared.cpio", &prepared.initrd),
    ] {
        fs::copy(file, inside.shared().join(name))
            .with_context(|| format!("share {}", file.display()))?;
    }
    bring_gdb(&inside.shared())?;
    let mut figures = Figures::default();
    for number in 0..run.form.count(1, 5) {
        once(&inside, address, &mut figures).with_context(|| format!("boot {number}"))?;
    }
    Ok(figures)
}

fn once(inside: &Inside, address: u64, figures: &mut Figures) -> Result<()> {
    let record = "rm -rf /tmp/recording; doppel record --json --kernel /shared/prepared --initrd /shared/prepared.cpio --memory 256 \
         --console /tmp/console --recorder /tmp/recording,every=2s --command-line 'quiet guest.do=load'";
    let said = inside.host().sh(record, LONGEST)?;
    let recorded = event(&said, "recorded").with_context(|| said.clone())?;
    let hash = recorded["memory_hash"]
        .as_str()
        .context("the recording has no end")?;
    let ended = inside
        .host()
        .run(&["doppel", "replay", "--json", "/tmp/recording"], LONGEST)?;
    let replayed: Value = serde_json::from_slice(&ended.stdout)
        .with_context(|| String::from_utf8_lossy(&ended.stderr).into_owned())?;
    ensure!(
        ended.code == 0 && replayed["reached"] == "end" && replayed["memory_hash_replayed"] == hash,
        "the memory's hash was {hash}: {replayed}"
    );
    ensure!(
        replayed["began"].as_u64() > Some(0),
        "it does not begin at a checkpoint: {replayed}"
    );
    let commands = format!(
        "set confirm off\nset pagination off\nset architecture i386:x86-64\ntarget remote /tmp/gdb.sock\nhbreak *{address:#x}\ncontinue\n\
         printf \"stopped: %d\\n\", $rip == {address:#x}\nx/3i $rip\ninfo registers rip rsp\nx/2gx $rsp\nmonitor position\nstepi\n\
         printf \"stepped: %d\\n\", $rip != {address:#x}\ndelete\ncontinue\ncontinue\n"
    );
    fs::write(inside.shared().join("commands"), commands).context("share gdb's commands")?;
    let said = inside.host().sh(DEBUG, LONGEST)?;
    for expected in [
        "stopped: 1",
        "stepped: 1",
        "after sync point",
        "replay ended with 0",
    ] {
        ensure!(said.contains(expected), "no {expected:?} in: {said}");
    }
    let debugged = said
        .lines()
        .find_map(|line| serde_json::from_str::<Value>(line).ok())
        .with_context(|| said.clone())?;
    ensure!(
        debugged["memory_hash_replayed"] == hash,
        "breakpoints show in the guest's memory, whose hash was {hash}: {debugged}"
    );
    figures.add("sync_points", replayed["sync_points"].clone());
    figures.add("began", replayed["began"].clone());
    figures.add("function", FUNCTION);
    Ok(())
}

fn event(said: &str, name: &str) -> Option<Value> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .rfind(|event| event["event"] == name)
}

fn address(map: &str, function: &str) -> Result<u64> {
    let line = map
        .lines()
        .find(|line| line.split_ascii_whitespace().nth(2) == Some(function))
        .with_context(|| format!("the kernel has no {function}"))?;
    let address = line.split_ascii_whitespace().next().unwrap_or_default();
    u64::from_str_radix(address, 16).context("an address in a System.map")
}

/// Debian's gdb without Python, and the libraries of this machine's that it needs.
fn bring_gdb(shared: &Path) -> Result<()> {
    let cache = lab::cache("lab-gdb")?;
    fs::create_dir_all(&cache).context("make a directory for gdb")?;
    let root = {
        let _alone = packages::lock(&cache)?;
        packages::unpack(&["gdb-minimal".to_owned()], &cache)?
    };
    let gdb: PathBuf = root.join("usr/bin/gdb");
    fs::copy(&gdb, shared.join("gdb")).context("share gdb")?;
    let libraries = shared.join("lib");
    fs::create_dir_all(&libraries).context("make a directory for libraries")?;
    for library in image::needed(Path::new("/"), std::slice::from_ref(&gdb))? {
        let name = library.file_name().context("a library has a name")?;
        fs::copy(&library, libraries.join(name)).with_context(|| {
            format!(
                "share {}: run scripts/install-test-tools",
                library.display()
            )
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
