//! Linux is prepared for replay (issue 7): every site of Debian's kernel is found, by the judgement of another decoder, and nothing
//! else is touched.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::prepare::{Limits, TSC_PORT, vmlinux};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::program::doppel;
use crate::lab::{cache, packages};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "prepare-exact",
    line: "doppel prepare rewrites every RDTSC of Debian's kernel, modules and C library, as objdump finds them, the one reader of KVM's clock page, and no other byte",
    short: Duration::from_secs(40),
    full: Duration::from_secs(600),
    show,
};

/// What is not the kernel's, and comes from Debian too: a library, its loader, and a program that is one file.
const PROGRAMS: [&str; 2] = ["libc6", "busybox-static"];
const RDTSC: [u8; 2] = [0x0f, 0x31];
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARY: &str = "lib/x86_64-linux-gnu/libc.so.6";
const BUSYBOX: &str = "bin/busybox";

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let debian = debian()?;
    let work = TempDir::with_prefix("doppel-test-").context("make a directory")?;
    let root = work.path().join("root");
    for file in [LOADER, LIBRARY, BUSYBOX] {
        let to = root.join(file);
        fs::create_dir_all(to.parent().context("a path")?)?;
        fs::copy(debian.root.join(file), to).with_context(|| format!("copy {file}"))?;
    }
    let (from, names) = chosen(run, &debian, work.path())?;
    let once = prepare(&debian.kernel, &from, &root, &work.path().join("once"))?;
    let again = prepare(&debian.kernel, &from, &root, &work.path().join("again"))?;
    equal(&once.out, &again.out).context("prepared twice from the same files")?;

    kernel(&debian.kernel, &once, &mut figures).context("the kernel")?;
    modules(run, &from, &names, &once, &mut figures).context("the modules")?;
    programs(work.path(), &root, &once, &mut figures).context("programs")?;

    // What is prepared is prepared again: the port reads are known, and nothing changes.
    let twice = prepare(
        &once.out.join("vmlinux"),
        &once.out.join("modules"),
        &root,
        &work.path().join("twice"),
    )?;
    for part in ["vmlinux", "modules"] {
        equal(&once.out.join(part), &twice.out.join(part)).context("prepared once and twice")?;
    }
    let known = twice
        .files
        .iter()
        .find(|file| file["kind"] == "kernel")
        .context("the kernel's report")?;
    // RDTSC in what reads KVM's clock page is rewritten as it is in programs; its new body reads the port once.
    let port = format!("e5{TSC_PORT:02x}");
    let reads = once
        .sites("kernel")
        .filter(|site| site["outcome"]["rewritten"] == *port)
        .count()
        + once.changes().count() / 2;
    ensure!(
        known["prepared"] == reads as u64,
        "{} port reads, {reads} were made",
        known["prepared"]
    );
    figures.add("kernel_port_reads", reads);
    bad_input(work.path(), &debian.kernel, &mut figures).context("bad input")?;
    Ok(figures)
}

/// Debian's packages, unpacked.
struct Debian {
    root: PathBuf,
    kernel: PathBuf,
    modules: PathBuf,
}

fn debian() -> Result<Debian> {
    let cache = cache("prepare-cache")?;
    let _alone = packages::lock(&cache)?;
    let complete = fs::read_to_string(cache.join("complete")).unwrap_or_default();
    let had = complete
        .lines()
        .find(|name| name.starts_with("linux-image-"));
    let mut names = vec![had.map_or_else(packages::kernel, |name| Ok(name.to_owned()))?];
    names.extend(PROGRAMS.map(str::to_owned));
    let root = packages::unpack(&names, &cache)?;
    let kernel = packages::listing(&root.join("boot"))?
        .into_iter()
        .find(|path| path.display().to_string().contains("/vmlinuz-"))
        .context("the kernel's package has no vmlinuz")?;
    Ok(Debian {
        kernel,
        modules: root.join("lib/modules"),
        root,
    })
}

/// What `doppel prepare` made and said.
struct Made {
    out: PathBuf,
    files: Vec<Value>,
}

impl Made {
    fn sites(&self, kind: &'static str) -> impl Iterator<Item = &Value> {
        let files = self.files.iter().filter(move |file| file["kind"] == kind);
        files.flat_map(|file| file["sites"].as_array().into_iter().flatten())
    }

    /// What was put in place of the reader of the clock page: a jump, and what it jumps to.
    fn changes(&self) -> impl Iterator<Item = &Value> {
        let files = self.files.iter();
        files.flat_map(|file| file["changes"].as_array().into_iter().flatten())
    }

    fn file(&self, path: &str) -> Option<&Value> {
        self.files.iter().find(|file| file["path"] == path)
    }
}

fn prepare(kernel: &Path, modules: &Path, root: &Path, out: &Path) -> Result<Made> {
    let output = Command::new(doppel()?)
        .arg("prepare")
        .arg("--json")
        .arg("--kernel")
        .arg(kernel)
        .arg("--modules")
        .arg(modules)
        .arg("--root")
        .arg(root)
        .arg("--out")
        .arg(out)
        .output()
        .context("run doppel prepare")?;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let said: Value = serde_json::from_slice(&output.stdout).context("read its JSON")?;
    let files = said["report"]["files"]
        .as_array()
        .context("a list of files")?
        .clone();
    for file in &files {
        ensure!(
            file["skipped"].is_null(),
            "{} was not looked into: {}",
            file["path"],
            file["skipped"]
        );
        let gaps = file["suspicious"].as_array().map_or(0, Vec::len);
        ensure!(
            gaps == 0,
            "{} has {gaps} stretches that may hold a site",
            file["path"]
        );
    }
    Ok(Made {
        out: out.to_owned(),
        files,
    })
}

fn is_rewritten(site: &Value) -> bool {
    site["outcome"]["rewritten"].is_string()
}

/// Every file below one directory is below the other, byte by byte; or two files are equal.
fn equal(one: &Path, other: &Path) -> Result<()> {
    if one.is_dir() {
        for path in packages::listing(one)? {
            let name = path.file_name().context("a name")?;
            equal(&path, &other.join(name))?;
        }
        return Ok(());
    }
    if one.is_symlink() {
        return Ok(());
    }
    ensure!(
        fs::read(one)? == fs::read(other)?,
        "{} and {} differ",
        one.display(),
        other.display()
    );
    Ok(())
}

/// The RDTSC that objdump finds, by section.
fn judged(file: &Path) -> Result<BTreeMap<String, BTreeSet<u64>>> {
    let output = Command::new("objdump")
        .args(["--disassemble", "--no-show-raw-insn"])
        .arg(file)
        .output()
        .context("run objdump (scripts/install-test-tools)")?;
    ensure!(
        output.status.success(),
        "objdump: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut found: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let mut section = String::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(name) = line.strip_prefix("Disassembly of section ") {
            section = name.trim_end_matches(':').to_owned();
        } else if let Some((address, instruction)) = line.split_once(':')
            && instruction.trim() == "rdtsc"
        {
            let address =
                u64::from_str_radix(address.trim(), 16).context("an address of objdump's")?;
            found.entry(section.clone()).or_default().insert(address);
        }
    }
    Ok(found)
}

fn rewritten_of<'a>(sites: impl Iterator<Item = &'a Value>) -> BTreeMap<String, BTreeSet<u64>> {
    let mut found: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for site in sites.filter(|site| is_rewritten(site)) {
        let section = site["section"].as_str().unwrap_or_default().to_owned();
        found
            .entry(section)
            .or_default()
            .insert(site["address"].as_u64().unwrap_or_default());
    }
    found
}

/// The new file is the old one, but for its rewritten sites; `cut` of its end may be gone.
fn only_sites(old: &[u8], new: &[u8], sites: &[&Value], cut: bool) -> Result<()> {
    ensure!(
        if cut {
            new.len() < old.len()
        } else {
            new.len() == old.len()
        },
        "{} bytes became {}",
        old.len(),
        new.len()
    );
    let mut expected = old[..new.len()].to_vec();
    for site in sites.iter().filter(|site| is_rewritten(site)) {
        let at = site["offset"].as_u64().context("an offset")? as usize;
        let bytes = expected
            .get_mut(at..at + 2)
            .context("an offset in the file")?;
        ensure!(bytes == RDTSC, "{bytes:x?} at byte {at} is no RDTSC");
        bytes.copy_from_slice(&new[at..at + 2]);
        let kernel = [0xe5, TSC_PORT];
        ensure!(
            new[at..at + 2] == kernel || new[at..at + 2] == [0x89, 0xd0],
            "byte {at} became {:x?}",
            &new[at..at + 2]
        );
    }
    ensure!(expected == new, "something else changed");
    Ok(())
}

fn kernel(packed: &Path, once: &Made, figures: &mut Figures) -> Result<()> {
    let new = once.out.join("vmlinux");
    let ours = rewritten_of(once.sites("kernel"));
    let left = judged(&new)?;
    ensure!(left.is_empty(), "objdump still finds RDTSC: {left:x?}");
    // The same file with the sites as they were, which the report has.
    let bytes = fs::read(&new)?;
    let mut old = bytes.clone();
    let sites: Vec<&Value> = once.sites("kernel").chain(once.sites("vdso")).collect();
    for site in sites.iter().filter(|site| is_rewritten(site)) {
        let at = site["offset"].as_u64().context("an offset")? as usize;
        old[at..at + 2].copy_from_slice(&RDTSC);
    }
    let changes: Vec<&Value> = once.changes().collect();
    ensure!(
        changes.len() == 2,
        "the reader of the clock page is not one: {changes:?}"
    );
    for change in &changes {
        let at = change["offset"].as_u64().context("an offset")? as usize;
        let bytes = |which: &str| unhex(change[which].as_str().unwrap_or_default());
        let (before, now) = (bytes("old")?, bytes("new")?);
        ensure!(
            old.get(at..at + now.len()) == Some(&now[..]) && before.len() == now.len(),
            "what the report says of {change} is not what is there"
        );
        old[at..at + now.len()].copy_from_slice(&before);
    }
    let packed = fs::read(packed)?;
    ensure!(
        old == vmlinux(packed, Limits::default())?,
        "something else changed"
    );
    let path = once.out.join("vmlinux.old");
    fs::write(&path, &old)?;
    let theirs = judged(&path)?;
    fs::remove_file(&path)?;
    ensure!(ours == theirs, "ours {ours:x?}, objdump's {theirs:x?}");
    for (section, sites) in &ours {
        figures.add(&format!("kernel{section}"), sites.len());
    }
    let of = |kind, instruction: &str| {
        once.sites(kind)
            .filter(|site| site["instruction"] == instruction)
            .count()
    };
    figures.add("kernel_rdtscp_left", of("kernel", "rdtscp"));
    figures.add("vdso_rdtsc", of("vdso", "rdtsc"));
    ensure!(
        of("kernel", "rdtscp") > 0 && of("vdso", "rdtsc") > 0,
        "no alternative and no vDSO was seen"
    );
    Ok(())
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits: Vec<char> = text.chars().collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
    let bytes: Result<Vec<u8>, _> = digits.chunks(2).map(byte).collect();
    bytes.with_context(|| format!("{text:?} is no hexadecimal"))
}

/// The modules that are prepared: in the short form those that hold the bytes of RDTSC anywhere, in the full form all.
fn chosen(run: &Run, debian: &Debian, work: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let to = work.join("modules");
    let full = run.form.pick(false, true);
    let mut names = Vec::new();
    let mut directories = vec![debian.modules.clone()];
    while let Some(directory) = directories.pop() {
        for path in packages::listing(&directory)? {
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else if path.extension().is_some_and(|kind| kind == "ko")
                && fs::read(&path)?.windows(2).any(|bytes| bytes == RDTSC)
            {
                let name = path.strip_prefix(&debian.modules)?.to_owned();
                if !full {
                    let to = to.join(&name);
                    fs::create_dir_all(to.parent().context("a path")?)?;
                    fs::copy(&path, to)?;
                }
                names.push(name);
            }
        }
    }
    names.sort();
    Ok((if full { debian.modules.clone() } else { to }, names))
}

fn modules(
    run: &Run,
    from: &Path,
    names: &[PathBuf],
    once: &Made,
    figures: &mut Figures,
) -> Result<()> {
    let with_sites = once
        .files
        .iter()
        .filter(|file| file["kind"] == "module")
        .count();
    let (mut sites, mut judged_files) = (0, 0);
    let step = run.form.pick(40, 1);
    for (number, name) in names.iter().enumerate() {
        let path = from.join(name);
        let name = name.display().to_string();
        let file = once.file(&name);
        if file.is_none() && number % step != 0 {
            continue;
        }
        let reported: Vec<&Value> = file
            .into_iter()
            .flat_map(|file| file["sites"].as_array().into_iter().flatten())
            .collect();
        let (ours, theirs) = (rewritten_of(reported.iter().copied()), judged(&path)?);
        ensure!(
            ours == theirs,
            "{name}: ours {ours:x?}, objdump's {theirs:x?}"
        );
        let (old, new) = (
            fs::read(&path)?,
            fs::read(once.out.join("modules").join(&name))?,
        );
        let signed = |bytes: &[u8]| bytes.ends_with(b"~Module signature appended~\n");
        ensure!(
            signed(&new) == (signed(&old) && ours.is_empty()),
            "{name}: its signature"
        );
        only_sites(&old, &new, &reported, signed(&old) && !ours.is_empty())
            .with_context(|| name.clone())?;
        sites += ours.values().map(BTreeSet::len).sum::<usize>();
        judged_files += 1;
    }
    ensure!(
        sites > 0,
        "no module of Debian's reads the counter any more"
    );
    figures.add("modules_with_the_bytes", names.len());
    figures.add("modules_that_objdump_judged", judged_files);
    figures.add("modules_with_sites", with_sites);
    figures.add("module_rdtsc", sites);
    Ok(())
}

fn programs(work: &Path, root: &Path, once: &Made, figures: &mut Figures) -> Result<()> {
    let archive = fs::read(once.out.join("initramfs.cpio"))?;
    let run = work.join("run");
    fs::create_dir_all(&run)?;
    for name in [LOADER, LIBRARY, BUSYBOX] {
        let file = once
            .file(name)
            .with_context(|| format!("no report of {name}"))?;
        let sites: Vec<&Value> = file["sites"].as_array().context("sites")?.iter().collect();
        let path = root.join(name);
        let (ours, theirs) = (rewritten_of(sites.iter().copied()), judged(&path)?);
        ensure!(
            ours == theirs,
            "{name}: ours {ours:x?}, objdump's {theirs:x?}"
        );
        let old = fs::read(&path)?;
        let needle = [name.as_bytes(), b"\0"].concat();
        let header = archive
            .windows(needle.len())
            .position(|bytes| bytes == needle)
            .with_context(|| format!("{name} is not in the archive"))?;
        let from = (header + needle.len()).next_multiple_of(4);
        let new = &archive[from..from + old.len()];
        only_sites(&old, new, &sites, false).with_context(|| name.to_owned())?;
        let key = Path::new(name)
            .file_name()
            .context("a name")?
            .to_string_lossy()
            .into_owned();
        figures.add(&format!("rdtsc_{key}"), sites.len());
        fs::write(run.join(key), new)?;
    }
    // They are still what they were: a program by the prepared loader, with the prepared library.
    let loader = run.join("ld-linux-x86-64.so.2");
    let allowed = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&loader, allowed)?;
    let output = Command::new(&loader)
        .arg("--library-path")
        .arg(&run)
        .args(["/usr/bin/env", "-i", "A=prepared"])
        .output()
        .context("run the prepared loader")?;
    ensure!(
        output.status.success() && output.stdout == b"A=prepared\n",
        "{output:?}"
    );
    Ok(())
}

/// What is no kernel gives a clear error.
fn bad_input(work: &Path, kernel: &Path, figures: &mut Figures) -> Result<()> {
    let whole = fs::read(kernel)?;
    let foreign: [(&str, Vec<u8>, &str); 5] = [
        ("empty", Vec::new(), "neither a bzImage nor an ELF"),
        (
            "text",
            b"this is a text".repeat(100),
            "neither a bzImage nor an ELF",
        ),
        ("cut", whole[..whole.len() / 2].to_vec(), "cut off"),
        ("damaged", damaged(&whole), "cut off or damaged"),
        ("program", fs::read("/proc/self/exe")?, "it is a program"),
    ];
    for (name, bytes, words) in &foreign {
        let path = work.join(name);
        fs::write(&path, bytes)?;
        let output = Command::new(doppel()?)
            .args(["prepare", "--kernel"])
            .arg(&path)
            .arg("--out")
            .arg(work.join("never"))
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1) && said.starts_with("doppel: ") && said.contains(words),
            "{name}: {said}"
        );
    }
    figures.add("foreign_kernels", foreign.len());
    Ok(())
}

fn damaged(image: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    let middle = image.len() / 2;
    for byte in &mut image[middle..middle + 64] {
        *byte ^= 0x5a;
    }
    image
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
