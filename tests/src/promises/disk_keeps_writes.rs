//! What a guest flushed to its disk is there after any loss: the survivor's guest reads it back, the image that lacks some of it is
//! refused, and a side whose disk fails does not take the machine with it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::harness::disk_guest::{flushed, verified};
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "disk-keeps-writes",
    line: "with an image on each side, whatever a guest flushed is read back after the loss of either side or both; a stale image is refused, and a disk that fails costs nothing",
    short: Duration::from_secs(40),
    full: Duration::from_secs(300),
    show,
};

/// Longer than anything here takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);

/// Bytes of an image: more than the guest uses.
const IMAGE: u64 = 4 << 20;

/// Rounds of a guest in one life: seconds of work.
const ROUNDS: u64 = 96;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let mut ground = Ground::new()?;
    recorded_and_replayed(&ground).context("record and replay")?;
    clean_end(&mut ground).context("a clean end")?;
    let kills = run.form.count(3, 20);
    for kill in 0..kills {
        let took = primary_killed(&mut ground, &mut random)
            .with_context(|| format!("kill {kill} of the primary"))?;
        run.say(format!(
            "kill {kill}: verified up to round {}, {took:.1?}",
            ground.acked
        ));
    }
    let doubles = run.form.count(2, 20);
    for double in 0..doubles {
        both_killed(&mut ground, &mut random)
            .with_context(|| format!("loss {double} of both sides"))?;
    }
    different_images_are_refused().context("images that differ")?;
    full_disks().context("a full disk")?;
    figures.add("primaries_killed", kills);
    figures.add("losses_of_both", doubles);
    figures.add("rounds_verified", ground.acked);
    Ok(figures)
}

/// A machine's two images, its arbiter, and what its guest is known to have flushed.
struct Ground {
    work: TempDir,
    /// The side whose image is the newest.
    newest: Side,
    acked: u64,
    lives: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    A,
    B,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn image(self) -> &'static str {
        match self {
            Self::A => "a.img",
            Self::B => "b.img",
        }
    }
}

/// A pair that runs.
struct Pair {
    primary: Role,
    backup: Role,
    consoles: [PathBuf; 2],
}

impl Pair {
    /// The last round of which either side's console said that it was flushed.
    fn flushed(&self) -> u64 {
        let flushed = self.consoles.iter().map(|path| flushed(path));
        flushed.max().unwrap_or(0)
    }
}

impl Ground {
    fn new() -> Result<Self> {
        let work = tempfile::Builder::new()
            .prefix("doppel-test-")
            .tempdir()
            .context("make a directory")?;
        std::fs::create_dir(work.path().join("arbiter"))?;
        std::fs::create_dir(work.path().join("small"))?;
        for side in [Side::A, Side::B] {
            let image = std::fs::File::create(work.path().join(side.image()))?;
            image.set_len(IMAGE)?;
        }
        Ok(Self {
            work,
            newest: Side::A,
            acked: 0,
            lives: 0,
        })
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn image(&self, side: Side) -> PathBuf {
        self.path().join(side.image())
    }

    fn words(&self, more: &str) -> String {
        format!("rounds={ROUNDS} every=4 acked={} {more}", self.acked)
    }

    /// Arguments of a role of this machine; `--console` is `name`.console.
    fn arguments<'a>(role: &'a str, image: &'a str, name: &'a str) -> Vec<&'a str> {
        vec![
            role,
            "--json",
            "--name",
            "disk",
            "--arbiter",
            "arbiter",
            "--socket",
            "pair.sock",
            "--run-dir",
            "run",
            "--disk",
            image,
            "--console",
            name,
        ]
    }

    fn backup(&mut self, image: &str) -> Result<(Role, PathBuf)> {
        self.lives += 1;
        let console = format!("backup-{}.console", self.lives);
        let arguments = Self::arguments("backup", image, &console);
        let name = format!("backup-{}", self.lives);
        let mut backup = Role::start(self.path(), &name, &arguments)?;
        backup.until("\"ready\"", LONGEST)?;
        Ok((backup, self.path().join(console)))
    }

    fn primary(&self, image: &str, words: &str, more: &[&str]) -> Result<(Role, PathBuf)> {
        let console = format!("primary-{}.console", self.lives);
        let mut arguments = Self::arguments("primary", image, &console);
        arguments.extend(["--guest", "disk", "--memory", "16", "--command-line", words]);
        arguments.extend(more);
        let name = format!("primary-{}", self.lives);
        let primary = Role::start(self.path(), &name, &arguments)?;
        Ok((primary, self.path().join(console)))
    }

    /// A pair whose primary has the newest image.
    fn pair(&mut self, words: &str, more: &[&str]) -> Result<Pair> {
        let (backup, backups) = self.backup(self.newest.other().image())?;
        let (mut primary, primarys) = self.primary(self.newest.image(), words, more)?;
        primary.until("\"paired\"", LONGEST)?;
        Ok(Pair {
            primary,
            backup,
            consoles: [primarys, backups],
        })
    }

    /// The image alone, as an operator is told to.
    fn copy_newest(&self) -> Result<()> {
        std::fs::copy(self.image(self.newest), self.image(self.newest.other()))
            .map(drop)
            .context("copy the image")
    }

    fn equal(&self) -> Result<bool> {
        Ok(std::fs::read(self.image(Side::A))? == std::fs::read(self.image(Side::B))?)
    }

    /// A stale image is refused for what it is.
    fn stale(&self, more: &[&str]) -> Result<()> {
        let words = self.words("");
        let more = [&["--alone"], more].concat();
        let (mut primary, _) = self.primary(self.newest.other().image(), &words, &more)?;
        let said = primary.clear_error(LONGEST, &[1])?;
        ensure!(said.contains("stale"), "it was refused otherwise: {said}");
        Ok(())
    }
}

fn well(role: &mut Role, what: &str) -> Result<()> {
    let status = role.end(LONGEST)?;
    ensure!(
        status.code() == Some(0),
        "{what} ended by {status}: {}",
        role.said()
    );
    Ok(())
}

fn recorded_and_replayed(ground: &Ground) -> Result<()> {
    let image = ground.path().join("recorded.img");
    std::fs::File::create(&image)?.set_len(IMAGE)?;
    let words = format!("rounds={ROUNDS}");
    let arguments = [
        "record",
        "--out",
        "disk.log",
        "--guest",
        "disk",
        "--memory",
        "16",
        "--disk",
        "recorded.img",
        "--command-line",
        &words,
        "--console",
        "recorded.console",
        "--run-dir",
        "run",
    ];
    let mut role = Role::start(ground.path(), "record", &arguments)?;
    well(&mut role, "the recording")?;
    verified(&[ground.path().join("recorded.console")], ROUNDS)?;
    // The log has all that was read.
    std::fs::remove_file(&image)?;
    let mut role = Role::start(ground.path(), "replay", &["replay", "disk.log"])?;
    well(&mut role, "the replay")
}

/// Nobody dies: both images are complete and equal, and either can be the next primary's.
fn clean_end(ground: &mut Ground) -> Result<()> {
    for _ in 0..2 {
        let words = ground.words("");
        let mut pair = ground.pair(&words, &[])?;
        well(&mut pair.primary, "the primary")?;
        well(&mut pair.backup, "the backup")?;
        ground.acked += ROUNDS;
        verified(&pair.consoles[..1], ground.acked)?;
        ensure!(ground.equal()?, "the images differ after a clean end");
        ground.newest = ground.newest.other();
    }
    Ok(())
}

/// The survivor's guest verifies all, the other image is refused, and takes part again once it was copied.
fn primary_killed(ground: &mut Ground, random: &mut Random) -> Result<Duration> {
    let words = ground.words("");
    let before = ground.acked;
    let mut pair = ground.pair(&words, &[])?;
    wait_for(&pair, before, random)?;
    let killed = Instant::now();
    send(pair.primary.pid(), Signal::Kill)?;
    pair.primary.end(LONGEST)?;
    well(&mut pair.backup, "the survivor")?;
    let took = killed.elapsed();
    ground.acked += ROUNDS;
    verified(&pair.consoles[1..], ground.acked)?;
    ground.newest = ground.newest.other();
    ground.stale(&[])?;
    ground.copy_newest()?;
    Ok(took)
}

/// Waits until the guest has flushed something, and then for a random time, in which it goes on.
fn wait_for(pair: &Pair, before: u64, random: &mut Random) -> Result<()> {
    let until = Instant::now() + LONGEST;
    while pair.flushed() <= before {
        ensure!(
            Instant::now() < until,
            "the guest flushed nothing: {}",
            pair.primary.said()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(60)));
    Ok(())
}

/// Both sides die, at once or in the middle of the take-over. The machine starts again from an image that has all that was said to
/// be flushed.
fn both_killed(ground: &mut Ground, random: &mut Random) -> Result<()> {
    // It goes on until it is killed.
    let words = format!("rounds=0 every=4 acked={}", ground.acked);
    let start: &[&str] = &["--cold-start"];
    let mut pair = ground.pair(&words, start)?;
    wait_for(&pair, ground.acked, random)?;
    send(pair.primary.pid(), Signal::Kill)?;
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(25)));
    send(pair.backup.pid(), Signal::Kill)?;
    pair.primary.end(LONGEST)?;
    pair.backup.end(LONGEST)?;
    let flushed = pair.flushed();
    ground.acked = flushed;
    // Whoever the arbiter's record names has it; and if neither was served by its heir yet, the one before.
    let mut started = None;
    for side in [Side::A, Side::B] {
        ground.lives += 1;
        let words = ground.words("");
        let more = ["--alone", "--cold-start"];
        let (mut primary, console) = ground.primary(side.image(), &words, &more)?;
        let status = primary.end(LONGEST)?;
        if status.code() == Some(0) {
            verified(&[console], flushed + ROUNDS)?;
            started = Some(side);
            break;
        }
        let said = primary.said();
        ensure!(said.contains("stale"), "{side:?} was not started: {said}");
    }
    ground.newest = started.context("both images were refused")?;
    ground.acked = flushed + ROUNDS;
    ground.stale(&["--cold-start"])?;
    ground.copy_newest()
}

fn different_images_are_refused() -> Result<()> {
    let mut ground = Ground::new()?;
    let mut bytes = std::fs::read(ground.image(Side::B))?;
    bytes[12_345] = 1;
    std::fs::write(ground.image(Side::B), &bytes)?;
    let (_backup, _) = ground.backup(Side::B.image())?;
    let (mut primary, _) = ground.primary(Side::A.image(), "rounds=1", &[])?;
    let said = primary.clear_error(LONGEST, &[1])?;
    ensure!(said.contains("differ"), "refused otherwise: {said}");
    // It was never used: it is as good as new.
    std::fs::write(ground.image(Side::A), &bytes)?;
    let (mut primary, console) = ground.primary(Side::A.image(), "rounds=1", &[])?;
    well(&mut primary, "the primary with an equal image")?;
    verified(&[console], 1)
}

/// A file system that fills up under the image of a machine alone, of a primary, of a backup.
fn full_disks() -> Result<()> {
    let words = format!("rounds={ROUNDS} blocks=1024");
    for (case, full) in ["alone", "primary", "backup"].into_iter().enumerate() {
        let mut own = Ground {
            work: Ground::new()?.work,
            newest: Side::A,
            acked: 0,
            lives: 100 + case as u32,
        };
        let place = own.path().join("small");
        let space = (place.as_path(), 1 << 20);
        let path = own.path().to_owned();
        let machine = [
            "--guest",
            "disk",
            "--memory",
            "16",
            "--command-line",
            &words,
        ];
        if full == "alone" {
            let mut arguments = vec!["run", "--disk", "small/disk", "--console", "alone.console"];
            arguments.extend(["--run-dir", "run"]);
            arguments.extend(machine);
            let mut role = Role::start_with_little_space(&path, "alone", space, &arguments)?;
            role.end(LONGEST)?;
            let said = std::fs::read_to_string(path.join("alone.console"))?;
            ensure!(
                said.contains("the disk failed"),
                "the guest was not told: {said}"
            );
            let said = role.said();
            ensure!(
                said.contains("the guest is told"),
                "nobody else was: {said}"
            );
            continue;
        }
        let (mut backup, backups, mut primary, primarys) = if full == "primary" {
            let (backup, backups) = own.backup(Side::B.image())?;
            let mut arguments = Ground::arguments("primary", "small/disk", "primary.console");
            arguments.extend(machine);
            let primary = Role::start_with_little_space(&path, "primary", space, &arguments)?;
            (backup, backups, primary, path.join("primary.console"))
        } else {
            let arguments = Ground::arguments("backup", "small/disk", "backup.console");
            let mut backup = Role::start_with_little_space(&path, "backup", space, &arguments)?;
            backup.until("\"ready\"", LONGEST)?;
            let (primary, primarys) = own.primary(Side::A.image(), &words, &[])?;
            (backup, path.join("backup.console"), primary, primarys)
        };
        let (failing, healthy) = match full {
            "primary" => (&mut primary, &mut backup),
            "backup" => (&mut backup, &mut primary),
            other => bail!("{other}"),
        };
        let status = failing.end(LONGEST)?;
        let said = failing.said();
        ensure!(
            status.code() != Some(0),
            "the full {full} ended well: {said}"
        );
        ensure!(
            said.contains("disk image fails"),
            "the full {full} said: {said}"
        );
        well(healthy, "the other side")?;
        verified(&[primarys, backups], ROUNDS)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
