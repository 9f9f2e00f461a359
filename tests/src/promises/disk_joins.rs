//! A new backup gets its machine's disk while the guest writes it, under either replication: what was flushed outlives one loss after the
//! other, each survivor with a new image. Whoever dies in the middle of a copy leaves one good image and a torn one that is refused.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::harness::disk_guest::{beyond, flushed};
use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "disk-joins",
    line: "A new backup gets the disk while its guest writes it, under either replication; a copy that is torn is refused, and costs nothing",
    short: Duration::from_secs(50),
    full: Duration::from_secs(400),
    show,
};

/// Longer than anything here takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);

/// Bytes of an image: enough that a copy of it has a middle.
const IMAGE: u64 = 48 << 20;

/// Blocks of 4 KiB that the guest writes, again and again.
const BLOCKS: u64 = 1024;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let kills = run.form.pick(2, 15);
    let torn: u64 = run.form.pick(2, 15);
    for replicate in ["replay", "checkpoint"] {
        let flushed = one_after_the_other(replicate, kills, &mut random)
            .with_context(|| format!("losses under {replicate}"))?;
        run.say(format!("{replicate}: {kills} losses, {flushed} rounds"));
        figures.add(&format!("{replicate}_rounds_verified"), flushed);
        for death in 0..torn {
            let receiver = death.is_multiple_of(2);
            died_in_a_copy(replicate, receiver, &mut random).with_context(|| {
                let who = if receiver { "receiver" } else { "sender" };
                format!("the {who} dies in a copy under {replicate}")
            })?;
        }
    }
    strange_images_are_refused().context("an image that is not this machine's")?;
    figures.add("losses_each", kills);
    figures.add("copies_torn_each", torn);
    Ok(figures)
}

/// A machine's images, its arbiter, and its processes so far.
struct Ground {
    work: TempDir,
    replicate: &'static str,
    started: u32,
}

/// A process, its image, and what its guest's console said there.
struct Side {
    role: Role,
    image: String,
    console: PathBuf,
}

impl Ground {
    /// With two equal images, `first.img` and `second.img`, that are full of something.
    fn new(replicate: &str, random: &mut Random) -> Result<Self> {
        let work = tempfile::Builder::new()
            .prefix("doppel-joins-")
            .tempdir()
            .context("make a directory")?;
        fs::create_dir(work.path().join("arbiter"))?;
        let mut content = Vec::with_capacity(IMAGE as usize);
        while content.len() < IMAGE as usize {
            // Half of it is holes, as in many images.
            let word = if content.len() / 65_536 % 2 == 0 {
                random.next()
            } else {
                0
            };
            content.extend_from_slice(&word.to_le_bytes());
        }
        for name in ["first.img", "second.img"] {
            fs::write(work.path().join(name), &content).context("make an image")?;
        }
        Ok(Self {
            work,
            replicate: if replicate == "replay" {
                "replay"
            } else {
                "checkpoint"
            },
            started: 0,
        })
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn empty_image(&self, name: &str) -> Result<()> {
        File::create(self.path().join(name))?.set_len(IMAGE)?;
        Ok(())
    }

    fn side(&mut self, role: &str, image: &str, more: &[&str]) -> Result<Side> {
        self.started += 1;
        let name = format!("{role}-{}", self.started);
        let console = format!("{name}.console");
        let mut arguments = vec![
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
            "--replicate",
            self.replicate,
            "--disk",
            image,
            "--console",
            &console,
        ];
        arguments.extend(more);
        Ok(Side {
            role: Role::start(self.path(), &name, &arguments)?,
            image: image.to_owned(),
            console: self.path().join(&console),
        })
    }

    fn backup(&mut self, image: &str) -> Result<Side> {
        let mut side = self.side("backup", image, &[])?;
        side.role.until("\"ready\"", LONGEST)?;
        Ok(side)
    }

    fn primary(&mut self, image: &str, words: &str, more: &[&str]) -> Result<Side> {
        let guest = ["--guest", "disk", "--memory", "16", "--command-line", words];
        self.side("primary", image, &[&guest, more].concat())
    }

    /// Both sides, from the two images that are equal.
    fn pair(&mut self) -> Result<(Side, Side)> {
        let backup = self.backup("second.img")?;
        let mut primary = self.primary("first.img", &endless(0), &[])?;
        primary.role.until("\"paired\"", LONGEST)?;
        Ok((primary, backup))
    }

    /// Waits until a copy over this image has begun, by its mark.
    fn copying_to(&self, image: &str) -> Result<()> {
        let mark = self.path().join(format!("{image}.doppel"));
        let until = Instant::now() + LONGEST;
        loop {
            let text = fs::read(&mark).unwrap_or_default();
            if String::from_utf8_lossy(&text).contains("\"use\":\"follows\"") {
                return Ok(());
            }
            ensure!(Instant::now() < until, "no copy over {image} has begun");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has the operator order this.
    fn order(&self, what: &str) -> Result<()> {
        let output = Command::new(doppel()?)
            .args([what, "disk", "--run-dir", "run"])
            .current_dir(self.path())
            .output()
            .with_context(|| format!("start doppel {what}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{what}: {said}");
        Ok(())
    }

    /// A machine that starts again, alone, on this image, and finds all that was flushed.
    fn finds(&mut self, image: &str, flushed: u64) -> Result<()> {
        let words = format!("rounds=8 every=4 blocks={BLOCKS} acked={flushed}");
        let mut side = self.primary(image, &words, &["--alone", "--cold-start"])?;
        let status = side.role.end(LONGEST)?;
        let console = fs::read_to_string(&side.console).unwrap_or_default();
        ensure!(
            status.success() && console.contains(&format!("disk: found {flushed}\n")),
            "{image}: {status}, {console}, {}",
            side.role.said()
        );
        Ok(())
    }

    /// A machine that is not to start on this image.
    fn is_refused(&mut self, image: &str) -> Result<()> {
        let words = endless(0);
        let mut side = self.primary(image, &words, &["--alone", "--cold-start"])?;
        let said = side.role.clear_error(LONGEST, &[1])?;
        ensure!(
            said.contains("stale"),
            "{image} was refused otherwise: {said}"
        );
        Ok(())
    }
}

fn endless(acked: u64) -> String {
    format!("every=4 blocks={BLOCKS} acked={acked}")
}

impl Side {
    /// The last round that its guest said to be flushed.
    fn flushed(&self) -> u64 {
        flushed(&self.console)
    }

    /// Waits until its guest has flushed more than this.
    fn beyond(&mut self, round: u64) -> Result<()> {
        beyond(&mut self.role, &self.console, round, LONGEST)
    }

    fn kill(&mut self) -> Result<()> {
        send(self.role.pid(), Signal::Kill)?;
        self.role.end(LONGEST).map(drop)
    }
}

/// The primary is killed, the survivor gets a new backup, and so on; then the machine is powered off, and its images are compared.
fn one_after_the_other(replicate: &str, kills: u64, random: &mut Random) -> Result<u64> {
    let mut ground = Ground::new(replicate, random)?;
    let (mut primary, mut backup) = ground.pair()?;
    let mut flushed = 0;
    for kill in 0..kills {
        primary.beyond(flushed)?;
        std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(150)));
        primary.kill()?;
        flushed = primary.flushed().max(flushed);
        backup.role.until("\"live\"", LONGEST)?;
        // The image of the dead, which is stale, or an empty one.
        let image = if kill.is_multiple_of(2) {
            primary.image.clone()
        } else {
            let image = format!("new-{kill}.img");
            ground.empty_image(&image)?;
            image
        };
        primary = backup;
        backup = ground.backup(&image)?;
        let joined = primary.role.until("\"joined\"", LONGEST);
        joined.with_context(|| backup.role.said())?;
        backup.role.until("\"paired\"", LONGEST)?;
        primary.beyond(flushed)?;
    }
    if replicate == "replay" {
        // Another one takes the backup's place, with an image of its own, while that one protects.
        ground.empty_image("another.img")?;
        let another = ground.backup("another.img")?;
        ground.order("migrate-backup")?;
        let mut relieved = std::mem::replace(&mut backup, another);
        let status = relieved.role.end(LONGEST)?;
        let said = relieved.role.said();
        ensure!(
            status.success() && said.contains("relieved"),
            "{status}: {said}"
        );
        primary.beyond(primary.flushed())?;
    }
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(150)));
    ground.order("power-off")?;
    for side in [&mut primary, &mut backup] {
        let status = side.role.end(LONGEST)?;
        ensure!(status.success(), "{status}: {}", side.role.said());
    }
    flushed = primary.flushed();
    let images = [&primary, &backup].map(|side| ground.path().join(&side.image));
    let [one, other] = images.map(fs::read);
    let (one, other) = (one.context("read")?, other.context("read")?);
    let differs = one.iter().zip(&other).position(|(one, other)| one != other);
    // Under checkpoints a backup has what the last interval had, which a power-off ends.
    ensure!(differs.is_none(), "the images differ at byte {differs:?}");
    ground.finds(&backup.image, flushed)?;
    Ok(flushed)
}

/// A survivor's new backup, or the survivor itself, dies at a random moment of the copy.
fn died_in_a_copy(replicate: &str, receiver: bool, random: &mut Random) -> Result<()> {
    let mut ground = Ground::new(replicate, random)?;
    let (mut primary, mut survivor) = ground.pair()?;
    primary.beyond(0)?;
    primary.kill()?;
    let mut flushed = primary.flushed();
    survivor.role.until("\"live\"", LONGEST)?;
    let mut joining = ground.backup("first.img")?;
    ground.copying_to("first.img")?;
    std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(150)));
    if receiver {
        joining.kill()?;
        // It goes on, and gives the next one a copy that is whole.
        survivor.beyond(survivor.flushed())?;
        let mut next = ground.backup("first.img")?;
        next.role.until("\"paired\"", LONGEST)?;
        next.kill()?;
        survivor.beyond(survivor.flushed())?;
        survivor.kill()?;
        flushed = flushed.max(survivor.flushed());
        ground.is_refused("first.img")?;
        return ground.finds(&survivor.image.clone(), flushed);
    }
    survivor.kill()?;
    flushed = flushed.max(survivor.flushed());
    if joining
        .role
        .until_one_of(&["\"live\"", "a primary was refused"], LONGEST)?
        == 0
    {
        // It was whole by then, and has the machine.
        joining.beyond(flushed)?;
        joining.kill()?;
        flushed = flushed.max(joining.flushed());
        ground.is_refused(&survivor.image.clone())?;
        return ground.finds("first.img", flushed);
    }
    joining.kill()?;
    ground.is_refused("first.img")?;
    ground.finds(&survivor.image.clone(), flushed)
}

/// What nobody knows, or what is another machine's, is not written over.
fn strange_images_are_refused() -> Result<()> {
    let mut random = Random::new(1);
    let mut ground = Ground::new("replay", &mut random)?;
    let (mut primary, mut survivor) = ground.pair()?;
    primary.kill()?;
    survivor.role.until("\"live\"", LONGEST)?;
    let precious = vec![7; IMAGE as usize];
    fs::write(ground.path().join("precious.img"), &precious)?;
    let mut stranger = ground.backup("precious.img")?;
    stranger.role.until("is not empty", LONGEST)?;
    stranger.kill()?;
    ensure!(
        fs::read(ground.path().join("precious.img"))? == precious,
        "an image that nobody knows was written over"
    );
    survivor.beyond(survivor.flushed())?;
    survivor.kill()
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
