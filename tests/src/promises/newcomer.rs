//! A newcomer's path (issue 8, 5): in a Debian that has what Debian calls essential and nothing else, with the package and the README. It
//! is installed by dpkg, and what the README says to type is typed: the demonstration, a protected guest of one's own, the death of the side
//! that serves under a client's connection, a look at the status, a new backup.
//!
//! The Debian is made of its packages as apt fetches them, once, and kept below `target`; each run has a layer of its own over it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::packaged;
use crate::harness::docs;
use crate::lab::packages;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "newcomer",
    line: "a bare Debian, the package and the README: installed, the demo, a protected guest of one's own whose client outlives its primary",
    short: Duration::from_secs(20),
    full: Duration::from_secs(20),
    show,
};

/// What every Debian has, as far as a program can want it, and `ip`, which the package recommends.
const DEBIAN: [&str; 19] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "libc-bin",
    "libgcc-s1",
    "procps",
    "sed",
    "tar",
    "util-linux",
];

/// Where the README has the package, seen from the source tree.
const PACKAGE: &str = "target/package";

fn show(run: &Run) -> Result<Figures> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let project = project.context("the project's directory")?;
    let debian = debian(&project.join("target/newcomer"))?;
    let work = tempfile::tempdir().context("make a directory")?;
    let home = work.path().join("home");
    fs::create_dir_all(home.join(PACKAGE)).context("make a directory")?;
    packaged::make(&home.join(PACKAGE))?;
    let script = script(project)?;
    fs::write(home.join("typed"), &script).context("write what is typed")?;
    let output = inside(&debian, work.path())?;
    let said = String::from_utf8_lossy(&output).into_owned();
    run.say(format!("{} lines typed", script.lines().count()));
    let mut last = 0;
    // In this order; the client's answers are of one connection, before and after the death.
    for wanted in [
        "Setting up doppel",
        "of these lost                0",
        "TCP connections broken       0 of 8",
        "machine  PROTECTED",
        "+OK",
        "value",
        "machine  PROTECTED",
    ] {
        let at = said[last..].find(wanted);
        let at =
            at.with_context(|| format!("{wanted:?} is not said where it should be: {said}"))?;
        last += at + wanted.len();
    }
    let mut figures = Figures::default();
    figures.add("lines_typed", script.lines().count());
    Ok(figures)
}

/// The README's blocks from the package on. What is done in the source tree, to make it, is done already.
fn script(project: &Path) -> Result<String> {
    let text = fs::read_to_string(project.join("README.md")).context("read the README")?;
    let (blocks, _) = docs::read("README.md", &text)?;
    let mut typed: Vec<_> = blocks
        .iter()
        .map(|block| block.text.as_str())
        .skip_while(|text| !text.contains("dpkg -i"))
        .take_while(|text| !text.contains("scripts/test"))
        .collect();
    ensure!(
        typed.len() > 1,
        "the README does not go on from the package to a guest"
    );
    typed.insert(0, "set -euo pipefail");
    let lines = typed.iter().flat_map(|text| text.lines());
    let lines = lines.filter(|line| !line.starts_with("scripts/"));
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

/// A directory with a Debian, in which dpkg knows what is there.
fn debian(cache: &Path) -> Result<PathBuf> {
    let _alone = packages::lock(cache)?;
    let names: Vec<_> = DEBIAN.iter().map(|&name| name.to_owned()).collect();
    let known = cache.join("chosen");
    // Asking apt takes longer than the rest, and what was fetched is good.
    let names: Vec<String> = match fs::read_to_string(&known) {
        Ok(text) if cache.join("complete").exists() => text.lines().map(str::to_owned).collect(),
        _ => packages::chosen(&names, cache)?,
    };
    let root = packages::unpack(&names, cache)?;
    fs::write(&known, names.join("\n")).context("note what was chosen")?;
    let output = Command::new("apt-cache")
        .args(["show", "--no-all-versions"])
        .args(&names)
        .output()
        .context("run apt-cache")?;
    ensure!(
        output.status.success(),
        "apt-cache does not know what it chose"
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let status = text.split("\n\n").filter(|one| one.contains("Package: "));
    let status: String = status.map(|one| format!("{}\n", installed(one))).collect();
    let place = root.join("var/lib/dpkg");
    for name in ["info", "updates", "triggers"] {
        fs::create_dir_all(place.join(name)).context("make a directory of dpkg's")?;
    }
    fs::write(place.join("status"), status).context("write what dpkg knows")?;
    Ok(root)
}

/// What dpkg notes of a package that is there.
fn installed(described: &str) -> String {
    let kept = [
        "Package",
        "Version",
        "Architecture",
        "Maintainer",
        "Multi-Arch",
        "Provides",
        "Essential",
    ];
    let mut lines = vec!["Status: install ok installed".to_owned()];
    lines.extend(
        described
            .lines()
            .filter(|line| kept.contains(&line.split(':').next().unwrap_or_default()))
            .map(str::to_owned),
    );
    lines.push("Description: of Debian's".to_owned());
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Types it in a shell in there: a host of its own as far as the kernel makes one, with KVM. What it said.
fn inside(debian: &Path, work: &Path) -> Result<Vec<u8>> {
    let set_up = r#"
set -e
mkdir layer root
mount -t tmpfs -o size=512m none layer
mkdir layer/upper layer/work
mount -t overlay -o "lowerdir=$1,upperdir=layer/upper,workdir=layer/work" none root
mkdir -p root/dev/net root/proc root/sys root/tmp root/run root/etc
for device in null zero full random urandom tty kvm net/tun; do
    touch "root/dev/$device" && mount --bind "/dev/$device" "root/dev/$device"
done
ln -s /proc/self/fd root/dev/fd
mount -t proc none root/proc
mount --rbind /sys root/sys
mount -t tmpfs none root/dev/shm 2>/dev/null || { mkdir root/dev/shm && mount -t tmpfs none root/dev/shm; }
mkdir -p root/srv/doppel && mount --bind home root/srv/doppel
ip link set lo up
exec chroot root env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/srv TERM=dumb \
    bash -c 'cd /srv/doppel && exec bash typed'
"#;
    let output = Command::new("timeout")
        .args(["--kill-after", "5", "120", "unshare"])
        .args([
            "--net",
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
        ])
        .args(["bash", "-c", &format!("exec 2>&1\n{set_up}"), "host"])
        .arg(debian)
        .current_dir(work)
        .output()
        .context("start unshare (needs root)")?;
    ensure!(
        output.status.success(),
        "what the README says to type ended by {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn what_is_typed_is_what_the_readme_says() {
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let typed = script(project).unwrap();
        assert!(
            typed.contains("doppel demo") && typed.contains("doppel primary"),
            "{typed}"
        );
        assert!(
            !typed.contains("cargo") && !typed.contains("scripts/"),
            "{typed}"
        );
    }
}
