//! One image that both sides have (issue 7): what a guest flushed is there after any loss, a primary that is given up writes no more before
//! its heir writes, and where nothing can be known of it nobody takes over.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::handshake::Secret;
use tempfile::TempDir;

use crate::harness::disk_guest::{beyond, flushed, verified};
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "shared-disk",
    line: "One image for both sides: a primary that is killed or frozen is fenced before its heir writes, what was flushed is there, and a fence that fails stops the take-over",
    short: Duration::from_secs(30),
    full: Duration::from_secs(300),
    show,
};

/// Longer than anything here takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);

/// Bytes of the image: more than the guest uses.
const IMAGE: u64 = 4 << 20;

/// Rounds of a guest that comes to its end: several times what it does in the 60 ms within which it is stopped.
const ROUNDS: u64 = 1024;

/// The exit code of a copy that is of no use.
const UNFIT: i32 = 3;

/// A busy host must not give anybody up before it is frozen; and a frozen one is given up within half a second.
const TIMES: &str = "[timing]\nsilence_ms = 400\n";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let kills = run.form.count(2, 20);
    for replicate in ["replay", "checkpoint"] {
        let rounds = killed_one_after_the_other(replicate, kills, &mut random)
            .with_context(|| format!("primaries killed under {replicate}"))?;
        run.say(format!("{replicate}: {kills} killed, {rounds} rounds"));
        figures.add(&format!("{replicate}_rounds_verified"), rounds);
    }
    let freezes = run.form.count(2, 20);
    for freeze in 0..freezes {
        let early = !freeze.is_multiple_of(2);
        let replicate = if freeze % 4 < 2 {
            "replay"
        } else {
            "checkpoint"
        };
        frozen(replicate, early, &mut random)
            .with_context(|| format!("freeze {freeze}, thawed early: {early}"))?;
    }
    run.say("frozen and thawed");
    commanded(&mut random).context("a fence command")?;
    for (command, timeout, why) in [
        ("exit 3", 5_000, "exit status: 3"),
        ("sleep 60", 300, "longer than 0.3 s"),
        // It says that the primary is cut off, and that is not so: the image is locked.
        ("true", 5_000, "locked"),
    ] {
        not_fenced(command, timeout, why)
            .with_context(|| format!("the fence command {command:?}"))?;
    }
    run.say("fences that fail");
    refused().context("what is refused")?;
    figures.add("primaries_killed_each", kills);
    figures.add("primaries_frozen", freezes);
    figures.add("fences_that_failed", 3);
    Ok(figures)
}

/// A machine's image, its arbiter, and its processes so far.
struct Ground {
    work: TempDir,
    replicate: &'static str,
    started: u32,
    /// Where its roles have their control sockets.
    run: &'static str,
}

/// A process, and what its guest's console said there.
struct Side {
    role: Role,
    console: PathBuf,
}

impl Side {
    fn flushed(&self) -> u64 {
        flushed(&self.console)
    }

    /// Waits until its guest has flushed more than this.
    fn beyond(&mut self, round: u64) -> Result<()> {
        beyond(&mut self.role, &self.console, round, LONGEST)
    }

    fn end_well(&mut self) -> Result<()> {
        let status = self.role.end(LONGEST)?;
        ensure!(status.success(), "{status}: {}", self.role.said());
        Ok(())
    }
}

impl Ground {
    fn new(replicate: &'static str) -> Result<Self> {
        let work = tempfile::Builder::new()
            .prefix("doppel-shared-")
            .tempdir()
            .context("make a directory")?;
        fs::create_dir(work.path().join("arbiter"))?;
        fs::File::create(work.path().join("disk.img"))?.set_len(IMAGE)?;
        fs::write(work.path().join("times.toml"), TIMES)?;
        Secret::create(&work.path().join("pair.secret"))?;
        Ok(Self {
            work,
            replicate,
            started: 0,
            run: "run",
        })
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn side(&mut self, role: &str, disk: &str, more: &[&str]) -> Result<Side> {
        self.started += 1;
        let name = format!("{role}-{}", self.started);
        let console = format!("{name}.console");
        let mut arguments = vec![role, "--json", "--name", "disk", "--arbiter", "arbiter"];
        arguments.extend(["--config", "times.toml", "--socket", "pair.sock"]);
        arguments.extend(["--run-dir", self.run, "--replicate", self.replicate]);
        arguments.extend(["--disk", disk, "--console", &console]);
        arguments.extend(more);
        Ok(Side {
            role: Role::start(self.path(), &name, &arguments)?,
            console: self.path().join(&console),
        })
    }

    fn backup(&mut self, more: &[&str]) -> Result<Side> {
        let mut side = self.side("backup", "disk.img,shared", more)?;
        side.role.until("\"ready\"", LONGEST)?;
        Ok(side)
    }

    fn primary(&mut self, words: &str, more: &[&str]) -> Result<Side> {
        let guest = ["--guest", "disk", "--memory", "16", "--command-line", words];
        self.side("primary", "disk.img,shared", &[&guest, more].concat())
    }

    fn pair(&mut self, words: &str) -> Result<(Side, Side)> {
        let backup = self.backup(&[])?;
        let mut primary = self.primary(words, &[])?;
        primary.role.until("\"paired\"", LONGEST)?;
        Ok((primary, backup))
    }

    /// A pair over TCP, whose backup has this fence command.
    fn pair_over_tcp(&mut self, words: &str, command: &str, timeout: u32) -> Result<(Side, Side)> {
        let timeout = timeout.to_string();
        let fence = ["--transport", "tcp", "--secret", "pair.secret"];
        let fence = [&fence[..], &["--fence-command", command]].concat();
        let fence = [&fence[..], &["--fence-timeout-ms", &timeout]].concat();
        let listen = [&fence[..], &["--listen", "127.0.0.1:0"]].concat();
        let backup = self.backup(&listen)?;
        let said = backup.role.said();
        let address = said
            .split_once("\"address\":\"")
            .and_then(|(_, rest)| rest.split_once('"'))
            .context("a backup says where it listens")?
            .0;
        let connect = [&fence[..], &["--connect", address]].concat();
        let mut primary = self.primary(words, &connect)?;
        primary.role.until("\"paired\"", LONGEST)?;
        Ok((primary, backup))
    }

    fn image(&self) -> Result<[Vec<u8>; 2]> {
        let read = |name| fs::read(self.path().join(name)).context("read the image");
        Ok([read("disk.img")?, read("disk.img.doppel")?])
    }

    /// A machine that starts again, alone, and finds all that was flushed.
    fn finds(&mut self, flushed: u64) -> Result<()> {
        let words = format!("rounds=8 every=4 acked={flushed}");
        let mut side = self.primary(&words, &["--alone", "--cold-start"])?;
        side.end_well()?;
        let console = fs::read_to_string(&side.console).unwrap_or_default();
        let line = format!("disk: found {flushed}\n");
        ensure!(flushed == 0 || console.contains(&line), "{console}");
        verified(&[side.console], flushed + 8)
    }

    fn order(&self, words: &[&str]) -> Result<(ExitStatus, String)> {
        let output = Command::new(doppel()?)
            .args(words)
            .args(["--run-dir", self.run])
            .current_dir(self.path())
            .output()
            .context("start doppel")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status, said))
    }
}

/// The primary is killed at a random moment, its heir gets a new backup, and so on; then the machine is powered off, and starts again.
fn killed_one_after_the_other(
    replicate: &'static str,
    kills: u64,
    random: &mut Random,
) -> Result<u64> {
    let mut ground = Ground::new(replicate)?;
    let (mut primary, mut backup) = ground.pair("every=4")?;
    let mut known = 0;
    for _ in 0..kills {
        primary.beyond(known)?;
        std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(100)));
        send(primary.role.pid(), Signal::Kill)?;
        primary.role.end(LONGEST)?;
        known = primary.flushed().max(known);
        backup.role.until("\"live\"", LONGEST)?;
        primary = backup;
        primary.beyond(known)?;
        backup = ground.backup(&[])?;
        primary.role.until("\"joined\"", LONGEST)?;
        backup.role.until("\"paired\"", LONGEST)?;
    }
    let known = primary.flushed();
    primary.beyond(known)?;
    let (status, said) = ground.order(&["power-off", "disk"])?;
    ensure!(status.success(), "power-off: {said}");
    primary.end_well()?;
    backup.end_well()?;
    let known = primary.flushed();
    ground.finds(known)?;
    Ok(known)
}

/// The primary stands still, with whatever its disk's thread was about to write. Its heir ends it first; also if it runs on just then.
fn frozen(replicate: &'static str, thawed_early: bool, random: &mut Random) -> Result<()> {
    let mut ground = Ground::new(replicate)?;
    let words = format!("rounds={ROUNDS} every=4");
    let (mut primary, mut backup) = ground.pair(&words)?;
    primary.beyond(0)?;
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(60)));
    send(primary.role.pid(), Signal::Stop)?;
    if thawed_early {
        // At about the time at which it is given up.
        std::thread::sleep(random.between(Duration::from_millis(350), Duration::from_millis(480)));
        send(primary.role.pid(), Signal::Continue)?;
    }
    let ends = backup.role.end(LONGEST)?;
    if thawed_early && !ends.success() {
        // It came back in time, or the claim was lost: the machine is its own.
        let said = backup.role.said();
        ensure!(ends.code() == Some(UNFIT), "{ends}: {said}");
        primary.end_well()?;
        return verified(&[primary.console], ROUNDS);
    }
    ensure!(ends.success(), "{ends}: {}", backup.role.said());
    if backup.role.said().contains("\"live\"") {
        // It is a process of the test's, so it is still there to be thawed, were it alive.
        send(primary.role.pid(), Signal::Continue)?;
        let status = primary.role.end(LONGEST)?;
        ensure!(
            status.signal() == Some(libc::SIGKILL),
            "the zombie ended by {status}: {}",
            primary.role.said()
        );
        // The guest wrote all of it since, and read it back after its last write.
        verified(&[backup.console], ROUNDS)?;
    } else {
        // Thawed in time, it served on to the end.
        ensure!(thawed_early, "{}", backup.role.said());
        primary.end_well()?;
        verified(&[primary.console], ROUNDS)?;
    }
    ground.finds(ROUNDS)
}

/// Over TCP, where nobody knows a process: the command ends it, and is told what it is to know.
fn commanded(random: &mut Random) -> Result<()> {
    let mut ground = Ground::new("replay")?;
    let words = format!("rounds={ROUNDS} every=4");
    let command = "echo \"$DOPPEL_EVENT $DOPPEL_NAME $DOPPEL_EPOCH $DOPPEL_PEER_ADDRESS $DOPPEL_PEER\" > told; kill -9 $(cat pid)";
    let (mut primary, mut backup) = ground.pair_over_tcp(&words, command, 10_000)?;
    fs::write(ground.path().join("pid"), primary.role.pid().to_string())?;
    primary.beyond(0)?;
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(60)));
    send(primary.role.pid(), Signal::Stop)?;
    backup.end_well()?;
    let status = primary.role.end(LONGEST)?;
    ensure!(status.signal() == Some(libc::SIGKILL), "{status}");
    verified(&[backup.console], ROUNDS)?;
    let told = fs::read_to_string(ground.path().join("told"))?;
    ensure!(
        told.starts_with("fence disk 2 127.0.0.1 ") && told.trim().len() == 55,
        "the command was told {told:?}"
    );
    ground.finds(ROUNDS)
}

/// Nobody knows that a frozen primary writes no more: its backup gives the machine back, loudly, and touches nothing.
fn not_fenced(command: &str, timeout: u32, why: &str) -> Result<()> {
    let mut ground = Ground::new("replay")?;
    let words = format!("rounds={ROUNDS} every=4");
    let (mut primary, mut backup) = ground.pair_over_tcp(&words, command, timeout)?;
    primary.beyond(0)?;
    send(primary.role.pid(), Signal::Stop)?;
    // Its threads stand when its backup has heard nothing of them for so long; until then one may be at its last write.
    std::thread::sleep(Duration::from_millis(100));
    let before = ground.image()?;
    let status = backup.role.end(LONGEST)?;
    let said = backup.role.said();
    ensure!(
        status.code() == Some(UNFIT)
            && said.contains("could not be kept off the shared disk")
            && said.contains(why),
        "{status}: {said}"
    );
    ensure!(!said.contains("\"live\""), "it went live: {said}");
    ensure!(ground.image()? == before, "somebody wrote to the image");
    send(primary.role.pid(), Signal::Continue)?;
    primary.end_well()?;
    verified(&[primary.console], ROUNDS)?;
    ground.finds(ROUNDS)
}

/// What could lose something is refused in words.
fn refused() -> Result<()> {
    let mut ground = Ground::new("replay")?;
    let tcp = ["--transport", "tcp", "--secret", "pair.secret"];
    let tcp = [&tcp[..], &["--listen", "127.0.0.1:0"]].concat();
    for (disk, more, word) in [
        ("disk.img,shared", &tcp[..], "--fence-command"),
        ("disk.img,shared,read-only", &[], "nobody writes"),
        ("disk.img,reservations", &[], "say shared"),
    ] {
        let mut side = ground.side("backup", disk, more)?;
        let said = side.role.clear_error(LONGEST, &[2])?;
        ensure!(said.contains(word), "{disk}: {said}");
    }
    let (mut primary, mut backup) = ground.pair("every=4")?;
    primary.beyond(0)?;
    let (status, said) = ground.order(&["switch", "disk"])?;
    ensure!(
        !status.success() && said.contains("its disk is shared"),
        "switch: {status}: {said}"
    );
    // A second machine on the same image.
    ground.run = "another";
    let mut second = ground.primary("every=4", &["--alone", "--cold-start"])?;
    let said = second.role.clear_error(LONGEST, &[1])?;
    ground.run = "run";
    ensure!(said.contains("another process uses"), "{said}");
    // The backup first, or it would serve, and write what nobody here hears of.
    for side in [&mut backup, &mut primary] {
        send(side.role.pid(), Signal::Kill)?;
        side.role.end(LONGEST)?;
    }
    // A backup with another image, and one with the other arrangement.
    fs::copy(
        ground.path().join("disk.img"),
        ground.path().join("other.img"),
    )?;
    for (disk, word) in [
        ("other.img,shared", "not the one that the primary has"),
        ("other.img", "give both the same arrangement"),
    ] {
        let mut stranger = ground.side("backup", disk, &[])?;
        stranger.role.until("\"ready\"", LONGEST)?;
        let mut primary = ground.primary("every=4", &["--cold-start"])?;
        let said = primary.role.clear_error(LONGEST, &[1])?;
        ensure!(said.contains(word), "{disk}: {said}");
        send(stranger.role.pid(), Signal::Kill)?;
        stranger.role.end(LONGEST)?;
    }
    // Nobody served since, so the image is as the primary left it.
    let known = primary.flushed();
    ground.finds(known)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
