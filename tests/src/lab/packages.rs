//! Debian packages by name, fetched by apt and unpacked, never installed: no root is needed.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// What a host is made of besides the libraries of this machine. The kernel is added by [`kernel`].
pub const BASE: &[&str] = &[
    "bash",
    "busybox-static",
    // The shell: busybox's own prefers its own applets to the programs that are there.
    "dash",
    "ethtool",
    "ibverbs-providers",
    "ibverbs-utils",
    "iproute2",
    "iputils-ping",
    "libbpf1",
    "libbsd0",
    "libcap2",
    "libelf1",
    "libibumad3",
    "libibverbs1",
    "libisns0",
    "libkmod2",
    "libmd0",
    "libmnl0",
    "libnl-3-200",
    "libnl-route-3-200",
    "libopeniscsiusr",
    "libpci3",
    "librdmacm1",
    "libssl3",
    "libtinfo6",
    "libudev1",
    "libxtables12",
    "open-iscsi",
    "perftest",
    "rdmacm-utils",
    "util-linux",
    // Unpacks the kernel, and is in the hosts for whoever wants it.
    "xz-utils",
];

/// What makes a host a whole Debian, whose first process is systemd.
const FULL: &[&str] = &[
    "base-files",
    "base-passwd",
    "coreutils",
    "dbus",
    "findutils",
    "grep",
    "hostname",
    "login",
    "passwd",
    "procps",
    "sed",
    "systemd-sysv",
    "udev",
    "util-linux",
];

/// The names of all packages that a whole Debian with these needs, as apt chooses them for an empty machine.
///
/// # Errors
/// If apt knows one of them not.
pub fn closure(names: &[String], cache: &Path) -> Result<Vec<String>> {
    let full = FULL.iter().map(|&name| name.to_owned());
    chosen(
        &full.chain(names.iter().cloned()).collect::<Vec<_>>(),
        cache,
    )
}

/// The names of these packages and of all that they need, as apt chooses them for an empty machine.
///
/// # Errors
/// If apt knows one of them not.
pub fn chosen(names: &[String], cache: &Path) -> Result<Vec<String>> {
    let empty = cache.join("empty.status");
    fs::write(&empty, "").with_context(|| format!("make {}", empty.display()))?;
    let chosen = Command::new("apt-get")
        .args([
            "install",
            "--simulate",
            "--no-install-recommends",
            "--option",
        ])
        .arg(format!("Dir::State::status={}", empty.display()))
        .args(names)
        .output()
        .context("run apt-get")?;
    ensure!(
        chosen.status.success(),
        "apt does not know how to install {}: {}",
        names.join(" "),
        String::from_utf8_lossy(&chosen.stderr).trim()
    );
    let said = String::from_utf8_lossy(&chosen.stdout);
    Ok(said
        .lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|rest| rest.split(' ').next())
        .map(str::to_owned)
        .collect())
}

/// The package that names Debian's stock kernel.
const KERNEL: &str = "linux-image-amd64";

/// The name of the package that holds the stock kernel of today.
///
/// # Errors
/// If apt knows of none.
pub fn kernel() -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", KERNEL])
        .output()
        .context("run apt-cache: the lab's hosts are made of Debian's packages, so it needs apt")?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .with_context(|| {
            format!("apt knows no {KERNEL}; as root: apt-get update (the lab needs Debian's own archive)")
        })
}

/// Unpacks these packages into `cache/root`, and returns that directory. What was unpacked before is used again.
///
/// # Errors
/// If apt has no such package or cannot fetch it, with its words.
pub fn unpack(names: &[String], cache: &Path) -> Result<PathBuf> {
    let root = cache.join("root");
    let complete = cache.join("complete");
    let wanted = names.join("\n");
    if fs::read_to_string(&complete).is_ok_and(|have| have == wanted) {
        return Ok(root);
    }
    remove(&root)?;
    let archives = cache.join("archives");
    remove(&archives)?;
    // What was made of other packages is not what is made of these.
    for old in listing(cache)? {
        if old.extension().is_none_or(|kind| kind != "lock") && old.is_file() {
            fs::remove_file(&old).with_context(|| format!("remove {}", old.display()))?;
        }
    }
    fs::create_dir_all(&archives).with_context(|| format!("make {}", archives.display()))?;
    fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
    eprintln!("lab: fetching {} packages by apt", names.len());
    if let Err(error) = download(names, &archives) {
        // A list that is older than the archive names files that are not there any more. Root can renew it.
        eprintln!("lab: {error:#}\nlab: renewing apt's lists, and once more");
        let renewed = Command::new("apt-get")
            .args(["update", "--quiet"])
            .output()
            .context("run apt-get")?;
        if !renewed.status.success() {
            bail!(
                "apt-get could not fetch the lab's packages, nor renew its lists: run apt-get update as root. It says:\n{}",
                String::from_utf8_lossy(&renewed.stderr).trim()
            );
        }
        download(names, &archives)?;
    }
    for archive in listing(&archives)? {
        let unpacked = Command::new("dpkg-deb")
            .arg("--extract")
            .args([&archive, &root])
            .output()
            .context("run dpkg-deb")?;
        ensure!(
            unpacked.status.success(),
            "dpkg-deb could not unpack {}: {}",
            archive.display(),
            String::from_utf8_lossy(&unpacked.stderr).trim()
        );
    }
    remove(&archives)?;
    fs::write(&complete, wanted).with_context(|| format!("write {}", complete.display()))?;
    Ok(root)
}

fn download(names: &[String], to: &Path) -> Result<()> {
    let fetched = Command::new("apt-get")
        .args(["download", "--quiet", "--option", "APT::Sandbox::User=root"])
        .args(names)
        .current_dir(to)
        .output()
        .context("run apt-get")?;
    ensure!(
        fetched.status.success(),
        "apt-get could not fetch the lab's packages. It says:\n{}",
        String::from_utf8_lossy(&fetched.stderr).trim()
    );
    Ok(())
}

/// Keeps others from changing the cache at the same time, until the file is closed.
///
/// # Errors
/// If the directory cannot be made or written to.
pub fn lock(cache: &Path) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("make {}", cache.display()))?;
    let path = cache.join("cache.lock");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    file.lock()
        .with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

/// The paths in a directory, sorted.
///
/// # Errors
/// If it cannot be read.
pub fn listing(directory: &Path) -> Result<Vec<PathBuf>> {
    let look = || format!("look into {}", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).with_context(look)? {
        paths.push(entry.with_context(look)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}
