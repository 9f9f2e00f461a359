//! Directories: a root file system that becomes an initramfs, and a kernel's modules.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::cpio::{Facts, S_IFMT, S_IFREG, Writer};
use super::error::PrepareError;
use super::initramfs::file;
use super::report::Report;
use super::{Limits, Prepared};

/// Sockets, which an archive cannot hold.
const S_IFSOCK: u32 = 0o140_000;

/// Makes an initramfs of the directory `root`, its programs and modules prepared. Owners and modes are as they are there, times are
/// not taken.
///
/// # Errors
/// [`PrepareError::Io`], [`PrepareError::File`].
pub fn root(root: &Path, limits: Limits) -> Result<Prepared, PrepareError> {
    let mut writer = Writer::default();
    let mut report = Report::default();
    // Of one file an archive can say no more in any case.
    let most = (limits.unpacked as u64).min(u32::MAX.into());
    walk(root, &mut |path, facts| {
        let name = below(root, path);
        let length = if facts.is_file() { facts.len() } else { 0 };
        if writer.length() as u64 + length > most {
            let why = format!(
                "with it the initramfs would have more than {most} bytes, which no guest can take; leave it out"
            );
            return Err(file_error(path, why));
        }
        let entry = Facts {
            mode: facts.mode(),
            owner: facts.uid(),
            group: facts.gid(),
            device: (libc::major(facts.rdev()), libc::minor(facts.rdev())),
        };
        match facts.mode() & S_IFMT {
            S_IFREG => {
                let bytes = read(path)?;
                match file(&bytes, &name) {
                    Some((bytes, found)) => {
                        report.add(found);
                        if let Some(why) = report.flood() {
                            return Err(file_error(path, why));
                        }
                        writer.add(path_bytes(root, path), entry, &bytes);
                    }
                    None => writer.add(path_bytes(root, path), entry, &bytes),
                }
            }
            S_IFSOCK => {}
            _ if facts.is_symlink() => {
                let target = fs::read_link(path).map_err(|source| io(path, "read", source))?;
                writer.add(path_bytes(root, path), entry, target.as_os_str().as_bytes());
            }
            _ => writer.add(path_bytes(root, path), entry, b""),
        }
        Ok(())
    })?;
    writer.end();
    Ok(Prepared {
        bytes: writer.finish(),
        report,
    })
}

/// Copies a directory of modules to `to`, prepared; other files of it are copied as they are, links are made anew. What an earlier copy left there is
/// replaced, and not followed: a link of it may lead anywhere.
///
/// # Errors
/// [`PrepareError::Io`], [`PrepareError::File`].
pub fn modules(from: &Path, to: &Path, limits: Limits) -> Result<Report, PrepareError> {
    let mut report = Report::default();
    if from != to {
        apart(to, from)?;
    }
    make(to)?;
    walk(from, &mut |path, facts| {
        let target = to.join(path.strip_prefix(from).unwrap_or(path));
        if facts.is_dir() {
            if fs::symlink_metadata(&target).is_ok_and(|there| !there.is_dir()) {
                remove(&target)?;
            }
            return make(&target);
        }
        if facts.is_symlink() {
            let link = fs::read_link(path).map_err(|source| io(path, "read", source))?;
            remove(&target)?;
            return std::os::unix::fs::symlink(link, &target)
                .map_err(|source| io(&target, "make", source));
        }
        if facts.is_file() {
            if facts.len() > limits.unpacked as u64 {
                let why = format!(
                    "it has more than {} bytes, and is no module",
                    limits.unpacked
                );
                return Err(file_error(path, why));
            }
            let bytes = read(path)?;
            let bytes = match file(&bytes, &below(from, path)) {
                Some((bytes, found)) => {
                    report.add(found);
                    if let Some(why) = report.flood() {
                        return Err(file_error(path, why));
                    }
                    bytes
                }
                None => bytes,
            };
            put(&target, &bytes)?;
        }
        Ok(())
    })?;
    Ok(report)
}

/// Whether what is written to `out` does not come to lie in the directory `from`, of which it is made: it would be taken for a part of it,
/// at once or the next time.
///
/// # Errors
/// [`PrepareError::File`] if it does, [`PrepareError::Io`].
pub fn apart(out: &Path, from: &Path) -> Result<(), PrepareError> {
    let whole = fs::canonicalize(from).map_err(|source| io(from, "look into", source))?;
    let out = std::path::absolute(out).map_err(|source| io(out, "find", source))?;
    // The nearest that there is: it may not have been made yet.
    let mut there = out.ancestors().map(fs::canonicalize);
    match there.find_map(Result::ok) {
        Some(there) if there.starts_with(&whole) => {
            let why = format!(
                "it lies in {}, of which it is to be made; choose a directory elsewhere",
                from.display()
            );
            Err(file_error(&out, why))
        }
        _ => Ok(()),
    }
}

/// Visits everything below a directory, in the order of names, directories before what is in them.
fn walk(
    directory: &Path,
    visit: &mut impl FnMut(&Path, &Metadata) -> Result<(), PrepareError>,
) -> Result<(), PrepareError> {
    let look = |source| io(directory, "look into", source);
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(directory).map_err(look)? {
        paths.push(entry.map_err(look)?.path());
    }
    paths.sort();
    for path in paths {
        let facts = fs::symlink_metadata(&path).map_err(|source| io(&path, "look at", source))?;
        visit(&path, &facts)?;
        if facts.is_dir() {
            walk(&path, visit)?;
        }
    }
    Ok(())
}

fn path_bytes<'a>(root: &Path, path: &'a Path) -> &'a [u8] {
    path.strip_prefix(root)
        .unwrap_or(path)
        .as_os_str()
        .as_bytes()
}

fn below(root: &Path, path: &Path) -> String {
    String::from_utf8_lossy(path_bytes(root, path)).into_owned()
}

fn read(path: &Path) -> Result<Vec<u8>, PrepareError> {
    fs::read(path).map_err(|source| io(path, "read", source))
}

/// Writes a file whole or not at all, in place of what is there.
fn put(path: &Path, bytes: &[u8]) -> Result<(), PrepareError> {
    let mut fresh = OsString::from(".");
    fresh.push(path.file_name().unwrap_or_default());
    fresh.push(".doppel-new");
    let fresh = path.with_file_name(fresh);
    remove(&fresh)?;
    fs::write(&fresh, bytes)
        .and_then(|()| fs::rename(&fresh, path))
        .map_err(|source| io(path, "write", source))
}

/// What is there is there no more; a directory is refused.
fn remove(path: &Path) -> Result<(), PrepareError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io(path, "replace", error))
        }
        _ => Ok(()),
    }
}

fn file_error(path: &Path, why: String) -> PrepareError {
    let path = path.to_owned();
    PrepareError::File { path, why }
}

fn make(directory: &Path) -> Result<(), PrepareError> {
    fs::create_dir_all(directory).map_err(|source| io(directory, "make", source))
}

fn io(path: &Path, doing: &'static str, source: std::io::Error) -> PrepareError {
    PrepareError::Io {
        path: path.to_owned(),
        doing,
        source,
    }
}
