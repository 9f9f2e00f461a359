//! One Linux guest side by side (issue 7, point 6): alone, protected both ways, under QEMU over the same KVM, and recorded by Doppel and by
//! QEMU. Measured by `bench linux` in a host of the lab, all of it in one boot; judged here.
//!
//! `DOPPEL_RESULTS=DIRECTORY scripts/prove linux-side-by-side --full` leaves what `bench` wrote there.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::inside::Inside;
use crate::harness::program;
use crate::lab::image;
use crate::lab::wire::Start;
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-side-by-side",
    line: "one Linux guest and its work come to their end under doppel alone, protected by checkpoints and by replay, and under QEMU's KVM; how long each takes is a table",
    short: Duration::from_secs(420),
    full: Duration::from_secs(3600),
    show,
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Its emulation of a processor, which Debian has in a module.
const MODULES: [&str; 1] = ["/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"];

/// Firmware that a PC without a screen needs, and the loader of an ELF kernel.
const FIRMWARE: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// Those whose work must come to its end, by the keys that `bench` gives them.
const WORKS: [&str; 6] = ["alone", "checkpoint", "page", "timer", "replay", "qemu"];

/// Those that only boot, and must come to their end, too.
const BOOTS: [&str; 2] = ["record", "again"];

/// The same of QEMU's. An emulation within an emulation takes minutes for a boot: only the full form has them.
const LONG_BOOTS: [&str; 2] = ["qemu-record", "qemu-again"];

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let prepared = guest.prepare(directory.path())?;
    let inside = Inside::boot("promise-linux-side-by-side")?;
    inside.bring(&[program::beside("bench")?, PathBuf::from(QEMU)])?;
    let share = |below: &str, file: &Path, name: &str| -> Result<()> {
        let to = inside.shared().join(below);
        fs::create_dir_all(&to).context("make a directory")?;
        fs::copy(file, to.join(name))
            .with_context(|| format!("share {}", file.display()))
            .map(drop)
    };
    for (name, file) in [
        ("prepared", &prepared.kernel),
        ("prepared.cpio", &prepared.initrd),
        ("stock", &guest.kernel),
        ("stock.cpio", &guest.initrd),
    ] {
        share("guest", file, name)?;
    }
    for file in FIRMWARE {
        share("firmware", Path::new(file), name_of(Path::new(file))?)?;
    }
    for module in MODULES {
        share("modules", Path::new(module), name_of(Path::new(module))?)?;
    }
    let programs: Vec<PathBuf> = [QEMU].iter().chain(&MODULES).map(PathBuf::from).collect();
    for library in image::needed(Path::new("/"), &programs)? {
        share("lib", &library, name_of(&library)?)?;
    }
    // Those that the host has are this machine's, too. The guest's files in the host's memory: what is measured is no shared directory.
    let put = "for file in /shared/lib/*; do name=${file##*/}
[ -e /usr/lib/x86_64-linux-gnu/$name ] || [ -e /lib/x86_64-linux-gnu/$name ] || cp $file /usr/lib/x86_64-linux-gnu/; done
mkdir -p /guest && cp /shared/guest/* /guest/";
    inside.host().sh(put, PUT_WITHIN)?;
    let (form, limit, requests) = run.form.pick(
        ("--short", "150", SHORT_REQUESTS),
        ("--full", "900", FULL_REQUESTS),
    );
    let boots = run.form.pick(BOOTS.to_vec(), [BOOTS, LONG_BOOTS].concat());
    let hosts: Vec<&str> = WORKS.iter().chain(&boots).copied().collect();
    let only = hosts.join(",");
    let words = [
        "bench",
        "linux",
        form,
        "--kernel",
        "/guest/stock",
        "--initrd",
        "/guest/stock.cpio",
        "--prepared",
        "/guest/prepared",
        "--prepared-initrd",
        "/guest/prepared.cpio",
        "--firmware",
        "/shared/firmware",
        "--modules",
        "/shared/modules",
        "--limit",
        limit,
        "--requests",
        requests,
        "--only",
        &only,
        "--out",
        "/shared/results",
    ];
    let longest = run.form.pick(SHORT_LONGEST, FULL_LONGEST);
    let start = Start {
        environment: vec![("DOPPEL_COMMIT".into(), commit())],
        ..Start::new(&words)
    };
    let ended = inside.host().session(&start)?.finish(longest)?;
    let (said, errors) = (
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr),
    );
    ensure!(
        ended.code == 0,
        "bench linux ended with code {}: {said}{errors}",
        ended.code
    );
    run.say(&said);
    let written = inside.shared().join("results");
    let bytes = fs::read(written.join("linux.json")).context("read what bench wrote")?;
    let result: Value = serde_json::from_slice(&bytes).context("read what bench wrote")?;
    if let Some(to) = std::env::var_os("DOPPEL_RESULTS") {
        fs::create_dir_all(&to).context("make the directory of DOPPEL_RESULTS")?;
        for ending in ["json", "md", "svg"] {
            let name = format!("linux.{ending}");
            fs::copy(written.join(&name), Path::new(&to).join(&name))
                .with_context(|| format!("keep {name}"))?;
        }
    }
    let mut figures = Figures::default();
    judge(&result["figures"], &boots, &mut figures).with_context(|| errors.into_owned())?;
    Ok(figures)
}

const PUT_WITHIN: Duration = Duration::from_secs(120);
/// For all lives: many times what they take.
const SHORT_LONGEST: Duration = Duration::from_secs(1200);
const FULL_LONGEST: Duration = Duration::from_secs(9000);

/// Requests of redis-benchmark: the slowest host is done with them well within its limit.
const SHORT_REQUESTS: &str = "300";
const FULL_REQUESTS: &str = "2000";

/// Of what is measured; with `+` if something was changed since. A host of the lab cannot know it.
fn commit() -> String {
    let git = |words: &[&str]| {
        Command::new("git")
            .args(words)
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            // No figure depends on it.
            .unwrap_or_default()
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    format!("{commit}{}", if changed { "+" } else { "" })
}

fn name_of(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|name| name.to_str())
        .context("a file's name")
}

/// Each came to its end once at least, those that work with every part of it; how often is said.
fn judge(found: &Value, boots: &[&str], figures: &mut Figures) -> Result<()> {
    let hosts = found["hosts"].as_array().context("bench wrote no hosts")?;
    for host in hosts {
        let name = host["key"].as_str().context("a host without a key")?;
        figures.add(name, host.clone());
    }
    for name in WORKS.iter().chain(boots) {
        let host = hosts.iter().find(|host| host["key"] == *name);
        let host = host.with_context(|| format!("{name}: not measured"))?;
        ensure!(
            host["whole"].as_u64() > Some(0),
            "{name}: no guest came to its end: {}",
            host["failed"]
        );
        let parts = host["seconds"].as_object().context("no seconds")?;
        let all = !parts.is_empty() && parts.values().all(Value::is_f64);
        ensure!(
            all || boots.contains(name),
            "{name}: a part of the work was not done: {}",
            host["seconds"]
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_host_that_fails_or_leaves_a_part_out_is_noticed() {
        let all = |change: &dyn Fn(&mut Value)| {
            let host = |name: &&str| json!({"key": name, "runs": 2, "whole": 1, "seconds": {"boot": 9.5, "redis": 3.0}});
            let mut found =
                json!({"hosts": WORKS.iter().chain(&BOOTS).map(host).collect::<Vec<_>>()});
            change(&mut found);
            judge(&found, &BOOTS, &mut Figures::default())
        };
        all(&|_| {}).unwrap();
        all(&|found| found["hosts"][2]["whole"] = json!(0)).unwrap_err();
        all(&|found| found["hosts"][4]["seconds"]["redis"] = Value::Null).unwrap_err();
        all(&|found| found["hosts"][0]["key"] = json!("another")).unwrap_err();
        // Who only boots does no work, and has to come to its end all the same.
        all(&|found| found["hosts"][6]["seconds"]["redis"] = Value::Null).unwrap();
        all(&|found| found["hosts"][7]["whole"] = json!(0)).unwrap_err();
        all(&|found| *found = json!({})).unwrap_err();
    }
}
