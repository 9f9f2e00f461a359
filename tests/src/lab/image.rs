//! What a host boots: the stock kernel, and an archive that holds its whole root file system.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cpio::Cpio;
use super::modules::{self, Modules};
use super::packages::{self, listing};

/// What a host boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The archive of its root file system.
    pub initramfs: PathBuf,
}

/// The first process of a host.
const INIT: &str = include_str!("host/init");

/// What makes a booted kernel a host, whatever its first process is.
const HOST_UP: &str = include_str!("host/host-up");

/// The agent as a service of systemd.
const SERVICE: &str = include_str!("host/lab.service");

/// What a whole Debian has and no host needs.
const LEFT_OUT: &[&str] = &[
    "boot",
    "lib/modules",
    "usr/lib/modules",
    "usr/lib/udev/hwdb.d",
    "lib/udev/hwdb.d",
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
];

/// The directories of Debian whose contents a host gets, whole.
const WHOLE: &[&str] = &["usr/bin", "usr/sbin", "bin", "sbin", "etc"];

/// Where programs that are looked up by name at run time find their plug-ins.
const PLUGINS: &str = "usr/lib/x86_64-linux-gnu/libibverbs";

/// Libraries that programs built by Rust or C need, whether or not a packaged program does.
pub const LIBRARIES: &[&str] = &[
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libdl.so.2",
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/lib/x86_64-linux-gnu/libm.so.6",
    "/lib/x86_64-linux-gnu/libpthread.so.0",
    "/lib/x86_64-linux-gnu/librt.so.1",
    "/lib64/ld-linux-x86-64.so.2",
];

const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Makes the image below `cache`, or finds it there: it is made anew when what it is made of has changed. With packages
/// besides the base's the host is a whole Debian with them, unpacked (no package's scripts have run), under systemd.
///
/// # Errors
/// If a package cannot be had, or the archive not be written.
pub fn image(cache: &Path, agent: &Path, more: &[String]) -> Result<Image> {
    let _alone = packages::lock(cache)?;
    let mut names: Vec<String> = packages::BASE.iter().map(|&name| name.to_owned()).collect();
    let complete = cache.join("complete");
    // apt is asked for the name of today's kernel, and for what depends on what, only when nothing is there: what is there
    // does for offline use too.
    let had = fs::read_to_string(&complete).unwrap_or_default();
    let had: Vec<String> = had.lines().map(str::to_owned).collect();
    let is_kernel = |name: &&String| name.starts_with("linux-image-");
    let kernel = match had.iter().find(is_kernel) {
        Some(name) => name.clone(),
        None => packages::kernel()?,
    };
    names.push(kernel);
    if !more.is_empty() {
        if names.iter().chain(more).all(|name| had.contains(name)) {
            names = had;
        } else {
            names.extend(packages::closure(more, cache)?);
            names.sort();
            names.dedup();
        }
    }
    let full = !more.is_empty();
    let root = packages::unpack(&names, cache)?;
    let kernel = packed_kernel(&root)?;

    let made_of = made_of(&names, agent)?;
    let initramfs = cache.join("initramfs.cpio");
    let note = cache.join("initramfs.made-of");
    if !(initramfs.exists() && fs::read_to_string(&note).is_ok_and(|have| have == made_of)) {
        let _ = fs::remove_file(&note);
        let fresh = cache.join("initramfs.new");
        write(&root, agent, full, &fresh)?;
        fs::rename(&fresh, &initramfs).context("put the archive in place")?;
        fs::write(&note, made_of).context("note what the archive is made of")?;
    }
    Ok(Image {
        kernel: unpacked_kernel(&root, &kernel, cache)?,
        initramfs,
    })
}

/// The kernel as its package has it, a bzImage.
///
/// # Errors
/// If there is none.
pub fn packed_kernel(root: &Path) -> Result<PathBuf> {
    listing(&root.join("boot"))?
        .into_iter()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .context("the kernel's package has no vmlinuz")
}

/// The kernel as the ELF file that is packed in its image, which QEMU boots as well (it has a PVH entry point): the emulated
/// machine would take about 4 s to unpack it, at every boot.
fn unpacked_kernel(root: &Path, image: &Path, cache: &Path) -> Result<PathBuf> {
    let name = image
        .file_name()
        .context("a kernel's name")?
        .to_string_lossy();
    let kernel = cache.join(name.replace("vmlinuz", "vmlinux"));
    if kernel.exists() {
        return Ok(kernel);
    }
    let bytes = read(image)?;
    let payload = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
    ensure!(
        payload.starts_with(b"\xfd7zXZ\0"),
        "{} is not packed by xz, as Debian's are",
        image.display()
    );
    let fresh = cache.join("vmlinux.new");
    let packed = cache.join("vmlinux.xz");
    fs::write(&packed, payload).context("write the packed kernel")?;
    let output = File::create(&fresh).context("make the kernel's file")?;
    let unpacked = Command::new(root.join("usr/bin/xz"))
        .args(["--decompress", "--stdout", "--format=xz"])
        .arg(&packed)
        .stdout(output)
        .status()
        .context("run xz")?;
    ensure!(unpacked.success(), "xz could not unpack the kernel");
    fs::remove_file(&packed).context("remove the packed kernel")?;
    fs::rename(&fresh, &kernel).context("put the kernel in place")?;
    Ok(kernel)
}

/// The packed kernel in a bzImage, without the four bytes of its unpacked size that follow it
/// (Documentation/x86/boot.rst: setup_sects, payload_offset, payload_length).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let from = ((sectors + 1) * 512).checked_add(number(0x248)?)?;
    let to = from.checked_add(number(0x24c)?)?.checked_sub(4)?;
    image.get(from..to)
}

/// What must be the same for an archive to be used again.
fn made_of(names: &[String], agent: &Path) -> Result<String> {
    let mut hash = DefaultHasher::new();
    names.hash(&mut hash);
    (INIT, HOST_UP, SERVICE, LEFT_OUT, WHOLE, LIBRARIES).hash(&mut hash);
    (modules::LOADED, modules::AT_HAND).hash(&mut hash);
    fs::read(agent)
        .with_context(|| format!("read {}", agent.display()))?
        .hash(&mut hash);
    for library in LIBRARIES {
        let facts = fs::metadata(library).with_context(|| {
            format!("look at {library}: the lab needs this machine to be Debian's amd64")
        })?;
        (facts.len(), facts.modified().ok()).hash(&mut hash);
    }
    Ok(format!("{:016x}", hash.finish()))
}

fn write(root: &Path, agent: &Path, full: bool, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("make {}", to.display()))?;
    let mut archive = Cpio::new(BufWriter::new(file));
    for directory in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64"] {
        archive.directory(directory)?;
        let short = &directory["usr/".len()..];
        archive.link(short, directory)?;
    }
    for directory in ["dev", "proc", "sys", "run", "tmp", "root", "var/log"] {
        archive.directory(directory)?;
    }
    // The console must be there before /dev is.
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("usr/lib/lab/host-up", 0o755, HOST_UP.as_bytes())?;
    archive.link("etc/mtab", "/proc/self/mounts")?;
    let accounts = if full {
        // What the script of Debian's base-passwd copies; systemd adds what its packages ask for.
        ["passwd.master", "group.master"]
            .map(|name| fs::read_to_string(root.join("usr/share/base-passwd").join(name)))
    } else {
        [Ok(PASSWD.to_owned()), Ok(GROUP.to_owned())]
    };
    for (name, text) in ["etc/passwd", "etc/group"].into_iter().zip(accounts) {
        archive.file(
            name,
            0o644,
            text.context("read Debian's accounts")?.as_bytes(),
        )?;
    }
    archive.file("etc/hosts", 0o644, hosts().as_bytes())?;

    let mut programs = vec![agent.to_owned()];
    archive.file("usr/sbin/lab", 0o755, &loaded(read(agent)?))?;
    if full {
        service(&mut archive)?;
        tree(&mut archive, root, "", &mut programs)?;
        // All libraries are there already, but what the agent needs may be this machine's.
        programs.truncate(1);
    } else {
        for directory in WHOLE {
            tree(&mut archive, root, directory, &mut programs)?;
        }
        tree(&mut archive, root, PLUGINS, &mut programs)?;
    }
    for library in LIBRARIES
        .iter()
        .map(PathBuf::from)
        .chain(needed(root, &programs)?)
    {
        let name = merged(library.strip_prefix(root).unwrap_or(&library));
        if !archive.has(&name) {
            archive.file(&name, 0o755, &read(&library)?)?;
        }
    }
    busybox(&mut archive, root)?;
    kernel_modules(&mut archive, root)?;
    archive.finish().context("end the archive")?;
    Ok(())
}

/// What systemd is told of the lab.
fn service<W: std::io::Write>(archive: &mut Cpio<W>) -> Result<()> {
    archive.file("etc/systemd/system/lab.service", 0o644, SERVICE.as_bytes())?;
    archive.link(
        "etc/systemd/system/multi-user.target.wants/lab.service",
        "/etc/systemd/system/lab.service",
    )?;
    archive.link(
        "etc/systemd/system/default.target",
        "/usr/lib/systemd/system/multi-user.target",
    )?;
    // Empty: made at each boot, and nobody is asked on the console how the host is to be set up.
    archive.file("etc/machine-id", 0o444, b"")?;
    archive.file("etc/fstab", 0o644, b"")?;
    Ok(())
}

/// Every host knows the others by name.
fn hosts() -> String {
    let mut text = String::from("127.0.0.1 localhost\n");
    for number in 1..=super::MOST_HOSTS {
        text += &format!("10.88.0.{number} h{number}\n10.88.1.{number} h{number}-1\n");
    }
    text
}

/// A path of the packages as it is in a host, where /bin and its like are links into /usr.
fn merged(path: &Path) -> String {
    let name = path.display().to_string();
    let name = name.trim_start_matches('/');
    match name.split('/').next() {
        Some("bin" | "sbin" | "lib" | "lib64") => format!("usr/{name}"),
        _ => name.to_owned(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// Puts a directory of the packages into the archive, and notes which programs were in it.
fn tree<W: std::io::Write>(
    archive: &mut Cpio<W>,
    root: &Path,
    directory: &str,
    programs: &mut Vec<PathBuf>,
) -> Result<()> {
    let from = root.join(directory);
    if !from.exists() {
        return Ok(());
    }
    for path in listing(&from)? {
        let below = path.strip_prefix(root).context("a path of the packages")?;
        let name = merged(below);
        let facts =
            fs::symlink_metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        // libibverbs complains of each driver that it is told of and that finds no device, or is not there.
        let stranger = name.contains("libibverbs.d/") && path.is_file() && !name.contains("rxe");
        let left_out = LEFT_OUT.iter().any(|each| below == Path::new(each));
        if stranger || left_out || (archive.has(&name) && !facts.is_dir()) {
            continue;
        }
        if facts.is_symlink() {
            let target = fs::read_link(&path).context("read a link")?;
            archive.link(&name, &target.display().to_string())?;
        } else if facts.is_dir() {
            // /bin and its like are links in a host.
            if merged(below).contains('/') || !archive.has(&name) {
                archive.directory(&name)?;
            }
            tree(archive, root, &below.display().to_string(), programs)?;
        } else {
            archive.file(&name, facts.permissions().mode(), &read(&path)?)?;
            if is_elf(&path) {
                programs.push(path);
            }
        }
    }
    Ok(())
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok())
        && magic == *b"\x7fELF"
}

/// A program without what is never loaded of it: symbols and what debuggers want lie behind its last segment.
#[must_use]
pub fn loaded(mut program: Vec<u8>) -> Vec<u8> {
    // Offsets in the header of a 64-bit ELF file and in its program headers (System V gABI, chapter 4 and 5).
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(program.get(at..at + bytes)?);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let end = || -> Option<usize> {
        let (headers, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut end = headers.checked_add(size * count)?;
        for at in (0..count).map(|index| headers + index * size) {
            end = end.max(number(at + 8, 8)?.checked_add(number(at + 32, 8)?)?);
        }
        Some(end)
    };
    if let Some(end) = end()
        && end < program.len()
    {
        program.truncate(end);
        // There are no sections any more: their table's offset, the size and number of its entries, and of their names.
        program[40..48].fill(0);
        program[58..64].fill(0);
    }
    program
}

/// The libraries that these programs need: the packages' own before this machine's.
///
/// # Errors
/// If one is not to be found.
pub fn needed(root: &Path, programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    // Ceph's libraries name where they keep what they share by its absolute path.
    let path = [
        "usr/lib/x86_64-linux-gnu",
        "lib/x86_64-linux-gnu",
        "usr/lib/x86_64-linux-gnu/ceph",
    ]
    .map(|directory| root.join(directory).display().to_string())
    .join(":");
    let output = Command::new("ldd")
        .args(programs)
        .env("LD_LIBRARY_PATH", path)
        .output()
        .context("run ldd")?;
    let mut libraries = BTreeSet::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some((name, found)) = line.trim().split_once(" => ") else {
            continue;
        };
        ensure!(
            found != "not found",
            "the lab's programs need {name}, which neither its packages nor this machine have"
        );
        if let Some(path) = found.split(" (").next() {
            libraries.insert(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

/// What this busybox can be.
///
/// # Errors
/// If it does not say.
pub fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox)
        .arg("--list")
        .output()
        .context("ask busybox what it can be")?;
    let list = String::from_utf8_lossy(&output.stdout);
    ensure!(list.contains("insmod"), "busybox cannot be insmod");
    Ok(list.lines().map(str::to_owned).collect())
}

/// A link for everything that busybox can be and no package is.
fn busybox<W: std::io::Write>(archive: &mut Cpio<W>, root: &Path) -> Result<()> {
    for applet in applets(&root.join("bin/busybox"))? {
        let places = ["usr/bin", "usr/sbin"].map(|place| format!("{place}/{applet}"));
        if !places.iter().any(|place| archive.has(place)) {
            archive.link(&places[0], "/usr/bin/busybox")?;
        }
    }
    // The kernel asks for modules by this path.
    if !archive.has("usr/sbin/modprobe") {
        archive.link("usr/sbin/modprobe", "/usr/bin/busybox")?;
    }
    Ok(())
}

fn kernel_modules<W: std::io::Write>(archive: &mut Cpio<W>, root: &Path) -> Result<()> {
    let trees = listing(&root.join("lib/modules"))?;
    let tree = trees
        .first()
        .context("the kernel's package has no modules")?;
    let version = tree
        .file_name()
        .context("a directory of modules")?
        .to_string_lossy();
    let place = format!("usr/lib/modules/{version}");
    let all = Modules::below(tree)?;
    let loaded = all.in_order(modules::LOADED)?;
    let names = [modules::LOADED, modules::AT_HAND].concat();
    let modules = all.in_order(&names)?;
    for module in &modules {
        archive.file(&format!("{place}/{}", module.path), 0o644, &module.bytes)?;
    }
    let dependencies = modules::dependencies(&modules);
    archive.file(
        &format!("{place}/modules.dep"),
        0o644,
        dependencies.as_bytes(),
    )?;
    let aliases = modules::aliases(&modules);
    archive.file(&format!("{place}/modules.alias"), 0o644, aliases.as_bytes())?;
    let order: String = loaded
        .iter()
        .map(|module| format!("/{place}/{}\n", module.path))
        .collect();
    archive.file("etc/lab/modules", 0o644, order.as_bytes())?;
    Ok(())
}
