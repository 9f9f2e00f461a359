//! A file system on a Linux guest's disk (issue 7, point 3), on either arrangement of it: the primary is killed at random, again and again, then
//! both sides; after a reboot of the guest the file system is clean and every file is whole of which the world was told that it was synced.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use crate::harness::inside::Inside;
use crate::harness::random::Random;
use crate::lab_pair::PATIENCE;
use crate::lab_pair::side::{End, Side};
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-disk",
    line: "ext4 on a Linux guest's disk, one image on each side or one for both: after its primary is killed at random and the guest reboots, e2fsck finds nothing and every fsynced byte is there",
    short: Duration::from_secs(300),
    full: Duration::from_secs(3000),
    show,
};

/// Bytes of an image: room for some thousand files, and little to bring into a host.
const IMAGE: u64 = 32 << 20;

/// As in the lab's pairs: a virtual CPU stands still for tenths of a second.
const TIMES: &str = "[timing]\nheartbeat_ms = 50\nsilence_ms = 2000\nlag_ms = 100\n";

/// For a guest's boot, in a host that is emulated on a busy machine: many times what it takes on a quiet one.
const BOOT: Duration = Duration::from_secs(600);

/// Synced files between two losses.
const FILES: usize = 5;

/// Both arrangements, and how the machine is replicated.
const CASES: [(Arrangement, &str); 4] = [
    (Arrangement::Shared, "checkpoint"),
    (Arrangement::Replicated, "checkpoint"),
    (Arrangement::Shared, "replay"),
    (Arrangement::Replicated, "replay"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrangement {
    Replicated,
    Shared,
}

impl Arrangement {
    /// What `--disk` says of an image of this name in the host.
    fn disk(self, image: &str) -> String {
        match self {
            Self::Replicated => format!("/tmp/{image}"),
            Self::Shared => "/tmp/a,shared".to_owned(),
        }
    }
}

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let cases = &CASES[..run.form.pick(2, CASES.len())];
    let inside = Inside::boot("promise-linux-disk")?;
    let shared = inside.shared();
    let mut files = vec![
        ("stock", guest.kernel.clone()),
        ("stock.cpio", guest.initrd.clone()),
    ];
    if cases.iter().any(|case| case.1 == "replay") {
        let prepared = guest.prepare(directory.path())?;
        files.extend([
            ("prepared", prepared.kernel),
            ("prepared.cpio", prepared.initrd),
        ]);
    }
    for (name, file) in files {
        fs::copy(&file, shared.join(name)).with_context(|| format!("share {}", file.display()))?;
    }
    fs::write(shared.join("times.toml"), TIMES).context("write a configuration")?;
    make_file_system(&shared.join("image"))?;
    for &(arrangement, replicate) in cases {
        let machine = Machine {
            run,
            inside: &inside,
            arrangement,
            replicate,
            started: 0,
        };
        let outcome = machine
            .outlive(run.form.count(2, 20), &mut random)
            .with_context(|| format!("a {arrangement:?} disk, replicated by {replicate}"))?;
        let name = format!("{arrangement:?}_{replicate}").to_lowercase();
        figures.add(&name, outcome);
    }
    Ok(figures)
}

fn make_file_system(image: &Path) -> Result<()> {
    fs::File::create(image)?.set_len(IMAGE)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(image)
        .output()
        .context("start mkfs.ext4 (Debian's package e2fsprogs)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mkfs.ext4: {said}");
    Ok(())
}

/// A machine in a host of the lab, both of whose sides are processes there.
struct Machine<'a> {
    run: &'a Run,
    inside: &'a Inside,
    arrangement: Arrangement,
    replicate: &'static str,
    started: u32,
}

/// A process, its image, and the file of its guest's console.
struct Role {
    side: Side,
    image: &'static str,
    console: String,
}

impl Machine<'_> {
    fn outlive(mut self, kills: u64, random: &mut Random) -> Result<Value> {
        let fresh = "rm -rf /tmp/arbiter /tmp/*.console /tmp/*.doppel /tmp/a /tmp/b /tmp/pair.sock && mkdir /tmp/arbiter && \
                     cp /shared/image /tmp/a && truncate -s 32M /tmp/b";
        self.inside.host().sh(fresh, PATIENCE)?;
        // A boot takes an emulated host longer where it is protected, and shows nothing.
        let mut primary = self.primary("a", &["--alone"])?;
        self.await_files(&primary, BOOT)?;
        let mut backup = self.join(&mut primary, "b")?;
        self.run.say("Linux is up, and protected");
        let mut spans = Vec::new();
        for kill in 0..kills {
            self.await_files(&primary, PATIENCE)?;
            std::thread::sleep(random.between(Duration::ZERO, Duration::from_secs(2)));
            let struck = Instant::now();
            self.kill(&mut primary)?;
            let live = |event: &Event| matches!(event, Event::Live { .. });
            let waited = backup.side.wait_for("is live", PATIENCE, live, drop);
            waited
                .with_context(|| format!("the old primary said:\n{}", primary.side.messages()))?;
            spans.push((struck.elapsed().as_secs_f64() * 1e3).round());
            let gone = std::mem::replace(&mut primary, backup);
            self.await_files(&primary, PATIENCE)?;
            if kill + 1 == kills {
                break;
            }
            // Over the stale image of the dead, where each has its own.
            backup = self.join(&mut primary, gone.image)?;
            self.run
                .say(format!("loss {kill}: a new backup has joined"));
        }
        // Nobody is left: the guest starts again from what is on the image.
        self.kill(&mut primary)?;
        let told = self.files("synced")?;
        let mut again = self.primary(primary.image, &["--alone", "--cold-start"])?;
        let end = again.side.await_end(BOOT, drop)?;
        ensure!(
            end == End::Code(0),
            "the guest that was started again ended by {end:?}: {}",
            again.side.messages()
        );
        let console = self.console(&again)?;
        ensure!(
            console.contains("files: unmounted"),
            "it did not come to its end: {console}"
        );
        let found = files_in(&console, "found");
        for (name, sum) in &told {
            ensure!(
                found.get(name) == Some(sum),
                "{name} was synced with {sum}, and is {:?} after the reboot",
                found.get(name)
            );
        }
        self.file_system_is_clean(primary.image)?;
        self.run.say(format!(
            "{:?}, {}: {} synced files are there, the file system is clean; kill to live {spans:?} ms",
            self.arrangement,
            self.replicate,
            told.len()
        ));
        Ok(json!({
            "primaries_killed": kills,
            "synced_files": told.len(),
            "found_files": found.len(),
            "kill_to_live_ms": spans,
        }))
    }

    fn role(&mut self, role: &str, image: &'static str, more: &[&str]) -> Result<Role> {
        self.started += 1;
        let console = format!("/tmp/{}.console", self.started);
        let disk = self.arrangement.disk(image);
        let mut words = vec!["doppel", role, "--json", "--config", "/shared/times.toml"];
        words.extend(["--name", "files", "--arbiter", "/tmp/arbiter"]);
        words.extend(["--socket", "/tmp/pair.sock", "--run-dir", "/tmp/run"]);
        words.extend(["--replicate", self.replicate, "--disk", &disk]);
        words.extend(["--console", &console]);
        words.extend(more);
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        Ok(Role {
            side: Side::start(&self.inside.host(), &words, PATIENCE)?,
            image,
            console,
        })
    }

    fn backup(&mut self, image: &'static str) -> Result<Role> {
        let mut backup = self.role("backup", image, &[])?;
        let listens = |event: &Event| matches!(event, Event::Ready { .. });
        backup.side.wait_for("listens", PATIENCE, listens, drop)?;
        Ok(backup)
    }

    /// A new backup, which gets a copy of the machine while that writes on.
    fn join(&mut self, primary: &mut Role, image: &'static str) -> Result<Role> {
        let mut backup = self.backup(image)?;
        let joined = |event: &Event| matches!(event, Event::Joined { .. });
        let joining = primary
            .side
            .wait_for("is joined", 3 * PATIENCE, joined, drop);
        joining.with_context(|| format!("the backup said:\n{}", backup.side.messages()))?;
        let paired = |event: &Event| matches!(event, Event::Paired { .. });
        backup.side.wait_for("is paired", PATIENCE, paired, drop)?;
        Ok(backup)
    }

    fn primary(&mut self, image: &'static str, more: &[&str]) -> Result<Role> {
        let (files, by) = match self.replicate {
            "replay" => ("prepared", &[][..]),
            _ => ("stock", &["--vcpus", "1", "--interval-ms", "100"][..]),
        };
        let (kernel, initrd) = (format!("/shared/{files}"), format!("/shared/{files}.cpio"));
        let mut words = vec!["--kernel", &kernel, "--initrd", &initrd, "--memory", "192"];
        words.extend(["--on-reset", "end"]);
        words.extend(["--command-line", "quiet guest.do=files"]);
        words.extend(by);
        words.extend(more);
        self.role("primary", image, &words)
    }

    fn kill(&self, role: &mut Role) -> Result<()> {
        let pid = role.side.pid().to_string();
        let killed = self.inside.host().run(&["kill", "-9", &pid], PATIENCE)?;
        ensure!(killed.code == 0, "it was not there to be killed");
        role.side.await_end(PATIENCE, drop).map(drop)
    }

    fn console(&self, role: &Role) -> Result<String> {
        let line = format!("cat {} 2>/dev/null || true", role.console);
        self.inside.host().sh(&line, PATIENCE)
    }

    /// Of all that any console said so far.
    fn files(&self, word: &str) -> Result<BTreeMap<String, String>> {
        // Each by itself: one that was cut off says nothing with the next one's begin.
        let mut all = BTreeMap::new();
        for number in 1..=self.started {
            let line = format!("cat /tmp/{number}.console 2>/dev/null || true");
            let text = self.inside.host().sh(&line, PATIENCE)?;
            all.extend(files_in(&text, word));
        }
        Ok(all)
    }

    /// Waits until some more files were synced by this one's guest.
    fn await_files(&self, role: &Role, longest: Duration) -> Result<()> {
        let until = Instant::now() + longest;
        let mut before = None;
        loop {
            let console = self.console(role)?;
            let now = files_in(&console, "synced").len();
            if now >= *before.get_or_insert(now) + FILES {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "the guest synced {now} files in {longest:?}, and says: {}; its side: {}",
                &console[console.floor_char_boundary(console.len().saturating_sub(2000))..],
                role.side.messages()
            );
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// As the guest's own e2fsck would find it, were it run now.
    fn file_system_is_clean(&self, image: &str) -> Result<()> {
        let image = match self.arrangement {
            Arrangement::Replicated => image,
            Arrangement::Shared => "a",
        };
        let line = format!("cp /tmp/{image} /shared/checked");
        self.inside.host().sh(&line, PATIENCE)?;
        let output = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(self.inside.shared().join("checked"))
            .output()
            .context("start e2fsck (Debian's package e2fsprogs)")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.code() == Some(0), "e2fsck -f -n: {said}");
        Ok(())
    }
}

/// Names and checksums in whole lines of this kind.
fn files_in(console: &str, word: &str) -> BTreeMap<String, String> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let begin = format!("files: {word} ");
    let lines = whole.lines().filter_map(|line| {
        let mut words = line.split_once(&begin)?.1.split_whitespace();
        let (name, sum) = (words.next()?, words.next()?);
        (sum.len() == 64).then(|| (name.to_owned(), sum.to_owned()))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_line_that_was_cut_off_says_nothing() {
        let sum = "a".repeat(64);
        let text = format!("files: synced file1 {sum}  -\r\nfiles: synced file2 {sum}  -");
        let files = files_in(&text, "synced");
        assert_eq!(files.len(), 1);
        assert_eq!(files["file1"], sum);
        assert!(files_in(&text, "found").is_empty());
        assert!(files_in("files: synced file3 abc\n", "synced").is_empty());
    }
}
