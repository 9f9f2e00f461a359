//! A Linux guest for the tests: Debian's stock kernel, and an initial RAM disk with busybox, a [`Kit`], and the modules of its devices.
//!
//! What it does is a word of its command line, `guest.do=NAME`, a script below `linux_guest/tasks`; `guest.ip=ADDRESS/PREFIX` gives it
//! the network. It turns itself off when that is done.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::program;
use crate::lab::{self, cpio::Cpio, image, modules::Modules, packages};

pub use self::kit::Kit;

mod kit;

const INIT: &str = include_str!("linux_guest/init");

const TASKS: [(&str, &str); 10] = [
    ("boot", include_str!("linux_guest/tasks/boot")),
    ("busy", include_str!("linux_guest/tasks/busy")),
    ("compile", include_str!("linux_guest/tasks/compile")),
    ("exhaust", include_str!("linux_guest/tasks/exhaust")),
    ("files", include_str!("linux_guest/tasks/files")),
    ("fio", include_str!("linux_guest/tasks/fio")),
    ("load", include_str!("linux_guest/tasks/load")),
    ("measure", include_str!("linux_guest/tasks/measure")),
    ("redis", include_str!("linux_guest/tasks/redis")),
    ("shell", include_str!("linux_guest/tasks/shell")),
];

/// The modules of what Doppel's board has, in the order in which they can be loaded. The first bring the others along.
const MODULES: [&str; 7] = [
    "virtio_mmio",
    // Where QEMU runs it.
    "virtio_pci",
    "virtio_net",
    "virtio_rng",
    "virtio_blk",
    // ext4 asks for this checksum by name.
    "crc32c_generic",
    "ext4",
];

/// A guest's files.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// The stock kernel as Debian packs it (a bzImage).
    pub packed: PathBuf,
    /// The same, unpacked (an ELF file).
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
}

impl LinuxGuest {
    /// Makes the files of a guest with redis in `directory`, from the packages of which the lab's hosts are made.
    ///
    /// # Errors
    /// If the packages cannot be had, or redis is not on this machine.
    pub fn make(directory: &Path) -> Result<Self> {
        Self::with(Kit::Redis, directory)
    }

    /// The same with another kit.
    ///
    /// # Errors
    /// If the packages cannot be had.
    pub fn with(kit: Kit, directory: &Path) -> Result<Self> {
        let kernel = lab::made_image(&[])?.kernel;
        let root = kernel
            .parent()
            .context("the kernel lies in the lab's cache")?
            .join("root");
        fs::create_dir_all(directory).context("make a directory")?;
        let initrd = directory.join("guest.cpio");
        write(&root, kit, &initrd)?;
        Ok(Self {
            packed: image::packed_kernel(&root)?,
            kernel,
            initrd,
        })
    }
}

/// A guest's files after `doppel prepare`, for exact replay.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The kernel (an ELF file).
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// What was found and done, as the program reports it.
    pub report: Value,
}

impl LinuxGuest {
    /// Prepares it into `directory`.
    ///
    /// # Errors
    /// What the program says.
    pub fn prepare(&self, directory: &Path) -> Result<Prepared> {
        let output = Command::new(program::doppel()?)
            .args(["prepare", "--json", "--kernel"])
            .arg(&self.packed)
            .arg("--initrd")
            .arg(&self.initrd)
            .arg("--out")
            .arg(directory)
            .output()
            .context("run doppel prepare")?;
        ensure!(
            output.status.success(),
            "doppel prepare: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Prepared {
            kernel: directory.join("vmlinux"),
            initrd: directory.join("initramfs.cpio"),
            report: serde_json::from_slice(&output.stdout).context("read its report")?,
        })
    }
}

fn write(root: &Path, kit: Kit, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("make {}", to.display()))?;
    let mut archive = Cpio::new(BufWriter::new(file));
    for directory in [
        "dev", "proc", "sys", "tmp", "root", "bin", "sbin", "usr/bin",
    ] {
        archive.directory(directory)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    for (name, text) in TASKS {
        archive.file(&format!("tasks/{name}"), 0o755, text.as_bytes())?;
    }
    let busybox = root.join("bin/busybox");
    archive.file("bin/busybox", 0o755, &image::loaded(read(&busybox)?))?;
    for applet in image::applets(&busybox)? {
        let name = format!("bin/{applet}");
        if !archive.has(&name) {
            archive.link(&name, "/bin/busybox")?;
        }
    }
    kit.put(&mut archive)?;
    let trees = packages::listing(&root.join("lib/modules"))?;
    let all = Modules::below(trees.first().context("the kernel has no modules")?)?;
    let mut order = String::new();
    for module in all.in_order(&MODULES)? {
        let name = format!("modules/{}.ko", module.name);
        archive.file(&name, 0o644, &module.bytes)?;
        order += &format!("/{name}\n");
    }
    archive.file("etc/modules", 0o644, order.as_bytes())?;
    archive.finish().context("end the archive")?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
