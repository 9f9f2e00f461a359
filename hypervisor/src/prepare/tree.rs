//! Directories: a root file system that becomes an initramfs, and a kernel's modules.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Prepared;
use super::cpio::{Facts, S_IFMT, S_IFREG, Writer};
use super::error::PrepareError;
use super::initramfs::file;
use super::report::Report;

/// Sockets, which an archive cannot hold.
const S_IFSOCK: u32 = 0o140_000;

/// Makes an initramfs of the directory `root`, its programs and modules prepared. Owners and modes are as they are there, times are
/// not taken.
///
/// # Errors
/// [`PrepareError::Io`], [`PrepareError::File`].
pub fn root(root: &Path) -> Result<Prepared, PrepareError> {
    let mut writer = Writer::default();
    let mut report = Report::default();
    walk(root, &mut |path, facts| {
        let name = below(root, path);
        let entry = Facts {
            mode: facts.mode(),
            owner: facts.uid(),
            group: facts.gid(),
            device: (libc::major(facts.rdev()), libc::minor(facts.rdev())),
        };
        match facts.mode() & S_IFMT {
            S_IFREG => {
                let bytes = read(path)?;
                if u32::try_from(bytes.len()).is_err() {
                    let why = "an archive takes no file of 4 GiB or more; leave it out".into();
                    return Err(PrepareError::File {
                        path: path.to_owned(),
                        why,
                    });
                }
                match file(&bytes, &name) {
                    Some((bytes, found)) => {
                        report.add(found);
                        writer.add(name.as_bytes(), entry, &bytes);
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

/// Copies a directory of modules to `to`, prepared; other files of it are copied as they are, links are made anew.
///
/// # Errors
/// [`PrepareError::Io`].
pub fn modules(from: &Path, to: &Path) -> Result<Report, PrepareError> {
    let mut report = Report::default();
    make(to)?;
    walk(from, &mut |path, facts| {
        let target = to.join(path.strip_prefix(from).unwrap_or(path));
        if facts.is_dir() {
            return make(&target);
        }
        if facts.is_symlink() {
            let link = fs::read_link(path).map_err(|source| io(path, "read", source))?;
            match fs::remove_file(&target) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io(&target, "replace", error));
                }
                _ => {}
            }
            return std::os::unix::fs::symlink(link, &target)
                .map_err(|source| io(&target, "make", source));
        }
        if facts.is_file() {
            let bytes = read(path)?;
            let bytes = match file(&bytes, &below(from, path)) {
                Some((bytes, found)) => {
                    report.add(found);
                    bytes
                }
                None => bytes,
            };
            fs::write(&target, bytes).map_err(|source| io(&target, "write", source))?;
        }
        Ok(())
    })?;
    Ok(report)
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
