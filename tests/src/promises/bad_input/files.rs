//! Files that are cut, foreign or not there: a guest's image, a kernel, its initial RAM disk, a disk's image; and a disk that is full
//! (issue 7, point 8).
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hypervisor::boot::Image;
use serde_json::Value;

use super::{LONGEST, directory};
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::promise::{Figures, Run};

/// Bytes of the file system that fills up: room for the machine's description and some of its log.
const LITTLE: u64 = 1 << 20;

/// A guest that ends by itself, after a log of more than that: some 200 bytes an exit.
const GUEST: [&str; 8] = [
    "--json",
    "--every-exit",
    "--guest",
    "irq",
    "--memory",
    "8",
    "--command-line",
    "exits=6000 hz=1000",
];

pub(super) fn show(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let work = work.path();
    let cut = images(run, work, random).context("a guest's image")?;
    kernels(work).context("a kernel")?;
    disks(work).context("a disk's image")?;
    figures.add("images_cut", cut);
    full_log(work).context("a log on a full disk")?;
    let kept = full_recorder(work).context("a flight recorder on a full disk")?;
    figures.add("recorded_before_the_disk_was_full", kept);
    Ok(())
}

/// Runs it: an end with a clear error, in which this stands.
fn refused(work: &Path, words: &[&str], expected: &str) -> Result<()> {
    let mut role = Role::start(work, "refused", words)?;
    let said = role.clear_error(LONGEST, &[1, 2])?;
    ensure!(
        said.contains(expected),
        "{words:?}: no {expected:?} in {said}"
    );
    Ok(())
}

/// What is loaded is refused where it is cut; what only tools look at may be missing.
fn images(run: &Run, work: &Path, random: &mut Random) -> Result<u64> {
    let bytes = Image::find("compute")?.bytes().to_vec();
    let cases = run.form.pick(20, 200);
    let mut refused_cases = 0;
    for _ in 0..cases {
        let cut = random.below(bytes.len() as u64) as usize;
        fs::write(work.join("cut.elf"), &bytes[..cut])?;
        let words = [
            "run",
            "--guest",
            "./cut.elf",
            "--memory",
            "4",
            "--command-line",
            "reports=1 rounds=1",
        ];
        let mut role = Role::start(work, "cut", &words)?;
        let status = role.end(LONGEST)?;
        let said = role.said();
        ensure!(!said.contains("panicked"), "cut at byte {cut}: {said}");
        match status.code() {
            Some(0) => ensure!(
                cut > bytes.len() / 4,
                "an image cut at byte {cut} of {} ran",
                bytes.len()
            ),
            Some(1 | 2) => {
                ensure!(said.contains("cut.elf"), "cut at byte {cut}: {said}");
                refused_cases += 1;
            }
            _ => anyhow::bail!("cut at byte {cut}: ended by {status}: {said}"),
        }
    }
    ensure!(refused_cases > 0, "no cut image of {cases} was refused");
    fs::write(
        work.join("text.elf"),
        "this is no program at all, and rather long for a text",
    )?;
    refused(work, &["run", "--guest", "./text.elf"], "text.elf")?;
    refused(work, &["run", "--guest", "./missing.elf"], "missing.elf")?;
    Ok(refused_cases)
}

fn kernels(work: &Path) -> Result<()> {
    let mut packed = vec![0; 64 << 10];
    // The marks of a bzImage, and nothing behind them.
    packed[0x1f1] = 4;
    packed[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    packed[0x202..0x206].copy_from_slice(b"HdrS");
    packed[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    let mut elf = Image::find("compute")?.bytes().to_vec();
    elf.truncate(100);
    let files: [(&str, Vec<u8>); 6] = [
        ("empty", Vec::new()),
        (
            "text",
            b"this is a text, and rather a long one for a kernel".to_vec(),
        ),
        ("zeros", vec![0; 100_000]),
        ("headless", packed[..0x210].to_vec()),
        ("hollow", packed),
        ("cut", elf),
    ];
    for (name, bytes) in &files {
        fs::write(work.join(name), bytes)?;
        let path = format!("./{name}");
        refused(work, &["run", "--kernel", &path, "--memory", "128"], name)
            .with_context(|| format!("kernel {name}"))?;
    }
    refused(
        work,
        &["run", "--kernel", "./none", "--memory", "128"],
        "none",
    )?;
    refused(
        work,
        &[
            "run",
            "--kernel",
            "./zeros",
            "--initrd",
            "./no-disk",
            "--memory",
            "128",
        ],
        "no-disk",
    )?;
    // Larger than any may be, and than the guest's memory.
    File::create(work.join("large"))?.set_len(200 << 20)?;
    refused(
        work,
        &[
            "run", "--kernel", "./zeros", "--initrd", "./large", "--memory", "128",
        ],
        "large",
    )?;
    refused(
        work,
        &["run", "--kernel", "./large", "--memory", "128"],
        "large",
    )
}

fn disks(work: &Path) -> Result<()> {
    fs::write(work.join("odd"), [7; 1000])?;
    fs::write(work.join("nothing"), [])?;
    fs::create_dir(work.join("folder"))?;
    for name in ["odd", "nothing", "folder", "absent"] {
        let path = format!("./{name}");
        refused(work, &["run", "--guest", "disk", "--disk", &path], name)
            .with_context(|| format!("disk {name}"))?;
    }
    Ok(())
}

/// `record --out`: it ends, and says that the disk is full.
fn full_log(work: &Path) -> Result<()> {
    let place = work.join("full-log");
    fs::create_dir(&place)?;
    let log = place.join("log").display().to_string();
    let words = [&["record", "--out", &log], &GUEST[..]].concat();
    let (code, said) = with_little_space(work, &place, &words)?;
    ensure!(
        code == 1 && said.contains("No space left") && said.contains("doppel: "),
        "code {code}: {said}"
    );
    Ok(())
}

/// `record --recorder`: the recording ends and says so, the machine goes on to its end, and what was recorded replays.
fn full_recorder(work: &Path) -> Result<u64> {
    let place = work.join("full-recorder");
    fs::create_dir(&place)?;
    let recorder = place.join("recording").display().to_string();
    let words = [&["record", "--recorder", &recorder], &GUEST[..]].concat();
    let (code, said) = with_little_space(work, &place, &words)?;
    ensure!(
        code == 0 && said.contains("No space left") && said.contains("the machine goes on"),
        "code {code}: {said}"
    );
    let recorded = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|event| event["event"] == "recorded")
        .with_context(|| format!("the guest did not come to its end: {said}"))?;
    let output = Command::new(doppel()?)
        .args(["replay", "--json", "saved/recording"])
        .current_dir(work)
        .output()
        .context("start doppel")?;
    let replayed: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        format!("replay what was kept: {messages}")
    })?;
    let kept = replayed["sync_points"].as_u64().unwrap_or(0);
    ensure!(
        output.status.success() && replayed["mismatches"] == 0 && kept > 100,
        "what was kept does not replay: {replayed}"
    );
    ensure!(
        Some(kept) < recorded["sync_points"].as_u64(),
        "the disk did not fill up: {replayed}"
    );
    Ok(kept)
}

/// Runs `doppel` where a small file system is mounted at `place`, for it alone; what is there at its end is copied to `saved`. Its
/// code, and what it said.
fn with_little_space(work: &Path, place: &Path, words: &[&str]) -> Result<(i32, String)> {
    let script = format!(
        "mount -t tmpfs -o size={LITTLE} none '{0}' || exit 99; timeout {1} \"$@\"; code=$?; rm -rf saved; cp -r '{0}' saved; exit $code",
        place.display(),
        // A bound only: an exit takes a millisecond and more where the host is busy.
        4 * LONGEST.as_secs()
    );
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
            "sh",
        ])
        .arg(doppel()?)
        .args(words)
        .current_dir(work)
        .output()
        .context("start doppel in a namespace of its own")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(!said.contains("panicked"), "{said}");
    let code = output.status.code().context("an exit code")?;
    ensure!(code != 124 && code != 99, "code {code}: {said}");
    Ok((code, said))
}
