//! The images of machines' disks on this host: a directory of the agent's with a file for each machine, and its mark beside it.
//!
//! ```text
//!   DISKS/NAME.INSTANCE.img          the image
//!   DISKS/NAME.INSTANCE.img.doppel   its mark (backends/disk/mark.rs), which the roles write
//!   DISKS/NAME.INSTANCE.img.new      one that is being made: it gets its name when it is whole, and on the disk
//! ```
//! **None is removed or made empty but for a record that says that its machine was deleted.** A machine that is missing in etcd may be missing because
//! etcd is another one.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::disks::{DiskSpec, ImageReport, file_name, named};
use super::record::Vm;
use crate::arbiter::random_identity;
use crate::backends::disk::{DiskError, Image, OpenImage, Opening, mark_beside, mark_file};
use crate::disk::SECTOR;

/// Behind the name of an image that is being made.
const NEW: &str = ".new";

/// Bytes that are copied at once.
const AT_ONCE: usize = 1 << 20;

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The image, or the one that it is to be a copy of.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A record with a name that is none.
    #[error("its record has a name or an instance that is none, so it has no image")]
    Name,
    /// The machine was deleted meanwhile.
    #[error("its machine was deleted while it was made")]
    Abandoned,
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let what = format!("{what} {}", path.display());
    move |source| ImageError::Io { what, source }
}

/// The directory, and what is under way there.
#[derive(Debug)]
pub struct Images {
    directory: PathBuf,
    making: BTreeMap<PathBuf, Making>,
}

/// An image that a thread makes a copy: an agent that did it by itself would be taken for one that is away.
#[derive(Debug)]
struct Making {
    thread: JoinHandle<Result<(), ImageError>>,
    abandoned: Arc<AtomicBool>,
}

impl Images {
    /// Those in this directory, which is made when it is needed. What an earlier agent has begun and not ended is swept away.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let images = Self {
            directory: directory.to_owned(),
            making: BTreeMap::new(),
        };
        for file in images.files() {
            let rest = file.strip_suffix(".doppel").unwrap_or(&file);
            if rest.strip_suffix(NEW).and_then(named).is_some() {
                // The next one that is made in its place says what is wrong with it.
                let _ = fs::remove_file(images.directory.join(&file));
            }
        }
        images
    }

    fn files(&self) -> Vec<String> {
        let all = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        all.filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// All that there are, in the order of their names.
    #[must_use]
    pub fn look(&self) -> Vec<ImageReport> {
        let mut files = self.files();
        files.sort_unstable();
        let reports = files.iter().filter_map(|file| {
            let (machine, instance) = named(file)?;
            let path = self.directory.join(file);
            Some(ImageReport {
                machine: machine.to_owned(),
                instance: instance.to_owned(),
                bytes: fs::metadata(&path).ok()?.len(),
                mark: match mark_beside(&path) {
                    Ok(mark) => mark.map(|mark| mark.text()),
                    Err(error) => {
                        tracing::debug!("the mark of {}: {error}", path.display());
                        Some(String::new())
                    }
                },
            })
        });
        reports.collect()
    }

    fn path(&self, machine: &str, instance: &str) -> Result<PathBuf, ImageError> {
        let name = file_name(machine, instance).ok_or(ImageError::Name)?;
        Ok(self.directory.join(name))
    }

    /// The image of a machine's disk, if it is here, and known to be whole.
    ///
    /// # Errors
    /// [`ImageError::Name`].
    pub fn of(&self, vm: &Vm) -> Result<Option<PathBuf>, ImageError> {
        let path = self.path(&vm.name, &vm.instance)?;
        let is_there = path.is_file() && !self.making.contains_key(&path);
        Ok(is_there.then_some(path))
    }

    /// Makes the first image of a machine that never ran. None: a thread copies it, and this is to be asked again.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn make(&mut self, vm: &Vm, disk: &DiskSpec) -> Result<Option<PathBuf>, ImageError> {
        let path = self.path(&vm.name, &vm.instance)?;
        if let Some(making) = self.making.get(&path) {
            if !making.thread.is_finished() {
                return Ok(None);
            }
            let making = self.making.remove(&path).expect("it was just there");
            making.thread.join().expect("a copy does not panic")?;
            return Ok(Some(path));
        }
        self.make_directory()?;
        let abandoned = Arc::<AtomicBool>::default();
        match disk {
            DiskSpec::Empty { bytes } => {
                fresh(&path, *bytes)?;
                self.name(&path)?;
                Ok(Some(path))
            }
            DiskSpec::CopyOf { file } | DiskSpec::ReadOnly { file } => {
                tracing::info!(
                    "machine {}: its disk is made a copy of {}",
                    vm.name,
                    file.display()
                );
                let (from, to, over) = (file.clone(), path.clone(), Arc::clone(&abandoned));
                let directory = self.directory.clone();
                let thread = thread::Builder::new()
                    .name("image".to_owned())
                    .spawn(move || make_copy(&from, &to, &directory, &over))
                    .map_err(failed("start a thread that makes", &path))?;
                self.making.insert(path, Making { thread, abandoned });
                Ok(None)
            }
        }
    }

    /// The image for a backup of a machine that is served elsewhere with a disk of so many bytes. It is made a copy of that one's, whatever it holds.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn to_follow(&self, vm: &Vm, bytes: u64) -> Result<PathBuf, ImageError> {
        let path = self.path(&vm.name, &vm.instance)?;
        if !path.is_file() {
            self.make_directory()?;
            // With its mark from the first moment on: one that has none is taken for new.
            let making = fresh(&path, bytes)?;
            follows(&making, vm)?;
            let (from, to) = (mark_file(&making), mark_file(&path));
            fs::rename(&from, &to).map_err(failed("name", &to))?;
            self.name(&path)?;
            return Ok(path);
        }
        let file = OpenOptions::new().write(true).open(&path);
        let file = file.map_err(failed("open", &path))?;
        let had = file.metadata().map_err(failed("read", &path))?.len();
        if had != bytes {
            file.set_len(bytes).map_err(failed("resize", &path))?;
        }
        drop(file);
        if !matches!(mark_beside(&path), Ok(Some(_))) {
            follows(&path, vm)?;
        }
        Ok(path)
    }

    /// Takes the mark of an image away: somebody wants its machine to go on with it, whatever it is.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn unmark(&self, path: &Path) -> Result<(), ImageError> {
        remove(&mark_file(path))?;
        self.sync()
    }

    /// Removes the image of a machine that was deleted. False: not yet, as something has it.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn remove(&mut self, machine: &str, instance: &str) -> Result<bool, ImageError> {
        let path = self.path(machine, instance)?;
        if let Some(making) = self.making.get(&path) {
            making.abandoned.store(true, Ordering::Relaxed);
            if !making.thread.is_finished() {
                return Ok(false);
            }
            let making = self.making.remove(&path).expect("it was just there");
            // That it was abandoned, or whatever else became of it.
            let _ = making.thread.join();
        }
        // Nobody else has it until it is gone.
        let _locked = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("open", &path)(error)),
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(file),
                Err(TryLockError::WouldBlock) => return Ok(false),
                Err(TryLockError::Error(error)) => return Err(failed("lock", &path)(error)),
            },
        };
        let new = making_of(&path);
        for path in [&path, &mark_file(&path), &new, &mark_file(&new)] {
            remove(path)?;
        }
        self.sync()?;
        Ok(true)
    }

    fn make_directory(&self) -> Result<(), ImageError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(failed("make", &self.directory))
    }

    fn name(&self, path: &Path) -> Result<(), ImageError> {
        name_in(&self.directory, path)
    }

    fn sync(&self) -> Result<(), ImageError> {
        match File::open(&self.directory) {
            Ok(directory) => directory
                .sync_all()
                .map_err(failed("sync", &self.directory)),
            // Nothing was ever made here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("open", &self.directory)(error)),
        }
    }
}

/// Where an image is while it is made.
fn making_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    name.into()
}

/// A file of so many zeros, on the disk, that has not its name yet.
fn fresh(path: &Path, bytes: u64) -> Result<PathBuf, ImageError> {
    let new = making_of(path);
    // The mark of an image that is not there says nothing of this one.
    for old in [&new, &mark_file(&new), &mark_file(path)] {
        remove(old)?;
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .map_err(failed("make", &new))?;
    file.set_len(bytes)
        .and_then(|()| file.sync_all())
        .map_err(failed("make", &new))?;
    Ok(new)
}

/// A copy under its name; or nothing at all: what is left of one for which there was no room would leave none to the images of others.
fn make_copy(
    from: &Path,
    to: &Path,
    directory: &Path,
    abandoned: &AtomicBool,
) -> Result<(), ImageError> {
    let made = copy(from, to, abandoned).and_then(|()| name_in(directory, to));
    if made.is_err() {
        // Why there is no copy is what matters.
        let _ = remove(&making_of(to));
    }
    made
}

fn copy(from: &Path, to: &Path, abandoned: &AtomicBool) -> Result<(), ImageError> {
    // Locked as one that is read: not while a machine writes it.
    let mut base = OpenImage::open(from, Opening::Read)?;
    let bytes = base.config().sectors * SECTOR;
    let new = fresh(to, bytes)?;
    let file = OpenOptions::new().write(true).open(&new);
    let file = file.map_err(failed("open", &new))?;
    let mut part = vec![0; AT_ONCE];
    let mut at = 0;
    while at < bytes {
        if abandoned.load(Ordering::Relaxed) {
            return Err(ImageError::Abandoned);
        }
        let part = &mut part[..AT_ONCE.min((bytes - at) as usize)];
        base.read(part, at).map_err(failed("read", from))?;
        // What is zero there is a hole here.
        if part.iter().any(|&byte| byte != 0) {
            file.write_all_at(part, at).map_err(failed("write", &new))?;
        }
        at += part.len() as u64;
    }
    file.sync_all().map_err(failed("sync", &new))
}

/// Marks an image as one that only follows.
fn follows(path: &Path, vm: &Vm) -> Result<(), ImageError> {
    let nobody = random_identity().map_err(failed("draw an identity for", path))?;
    let image = OpenImage::open(path, Opening::Own)?;
    Ok(image.follows(&vm.name, nobody)?)
}

/// An image that is whole gets its name, for good.
fn name_in(directory: &Path, path: &Path) -> Result<(), ImageError> {
    fs::rename(making_of(path), path).map_err(failed("name", path))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync", directory))
}

fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::agent::tests::vm;
    use crate::backends::disk::mark::{Mark, Use};

    fn machine() -> Vm {
        let mut db = vm("db");
        db.instance = "0123456789abcdef0123456789abcdef".into();
        db
    }

    fn mark(path: &Path) -> Option<Mark> {
        mark_beside(path).unwrap()
    }

    #[test]
    fn one_that_is_made_empty_has_no_mark_and_one_that_follows_has_one() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("disks");
        let mut images = Images::new(&place);
        assert!(images.look().is_empty());
        assert_eq!(images.of(&machine()).unwrap(), None);
        let empty = DiskSpec::Empty { bytes: 8192 };
        let path = images.make(&machine(), &empty).unwrap().unwrap();
        assert_eq!(images.of(&machine()).unwrap().as_ref(), Some(&path));
        assert_eq!(
            (fs::read(&path).unwrap(), mark(&path)),
            (vec![0; 8192], None)
        );

        // Of one that follows the size is its primary's, and what an earlier one held stays for its copy to be written over.
        fs::write(&path, [7; 512]).unwrap();
        assert_eq!(images.to_follow(&machine(), 1024).unwrap(), path);
        assert_eq!(fs::metadata(&path).unwrap().len(), 1024);
        assert_eq!(mark(&path).unwrap().in_use, Use::Follows);
        fs::remove_file(&path).unwrap();
        fs::remove_file(mark_file(&path)).unwrap();
        images.to_follow(&machine(), 4096).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![0; 4096]);
        let before = mark(&path).unwrap();
        assert_eq!(
            (before.machine.as_str(), before.in_use),
            ("db", Use::Follows)
        );
        images.to_follow(&machine(), 4096).unwrap();
        assert_eq!(mark(&path), Some(before.clone()));

        let seen = images.look();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].is_of(&machine()));
        assert_eq!(
            (seen[0].bytes, seen[0].mark.clone()),
            (4096, Some(before.text()))
        );
        images.unmark(&path).unwrap();
        assert_eq!(images.look()[0].mark, None);
    }

    #[test]
    fn a_copy_is_made_beside_the_agents_work_and_ends_when_nobody_wants_it() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("disks");
        let base = directory.path().join("base");
        let mut content = vec![0; 3 << 20];
        content[(2 << 20) + 9] = 5;
        fs::write(&base, &content).unwrap();
        let disk = DiskSpec::CopyOf { file: base.clone() };
        let mut images = Images::new(&place);
        let until = Instant::now() + Duration::from_secs(60);
        let path = loop {
            if let Some(path) = images.make(&machine(), &disk).unwrap() {
                break path;
            }
            assert!(Instant::now() < until, "it is never whole");
            thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(mark(&path), None);
        while !images.remove(&machine().name, &machine().instance).unwrap() {
            assert!(Instant::now() < until, "it is never removed");
        }
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);

        // What is no disk is said, and nothing stays.
        fs::write(&base, [1; 3]).unwrap();
        let why = loop {
            match images.make(&machine(), &disk) {
                Ok(None) => assert!(Instant::now() < until, "it never fails"),
                Ok(Some(path)) => panic!("{} was made of nothing", path.display()),
                Err(error) => break error.to_string(),
            }
        };
        assert!(why.contains("whole sectors"), "{why}");
        assert!(images.of(&machine()).unwrap().is_none());

        // One that is deleted while it is made.
        fs::write(&base, &content).unwrap();
        assert!(images.make(&machine(), &disk).unwrap().is_none());
        while !images.remove(&machine().name, &machine().instance).unwrap() {
            assert!(Instant::now() < until, "it is never removed");
        }
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    }

    /// A file system that is full ends the machines whose images are on it.
    #[test]
    fn a_copy_that_fails_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let images = Images::new(directory.path());
        let base = directory.path().join("base");
        fs::write(&base, vec![7; 4096]).unwrap();
        let path = images.path(&machine().name, &machine().instance).unwrap();
        let copied = |stopped| {
            let stopped = AtomicBool::new(stopped);
            make_copy(&base, &path, directory.path(), &stopped)
        };
        assert!(matches!(copied(true), Err(ImageError::Abandoned)));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        copied(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![7; 4096]);
    }

    #[test]
    fn one_that_is_in_use_is_not_removed_and_what_was_not_ended_is_swept_away() {
        let directory = tempfile::tempdir().unwrap();
        let mut images = Images::new(directory.path());
        let path = images.to_follow(&machine(), 4096).unwrap();
        let used = OpenImage::open(&path, Opening::Own).unwrap();
        let (name, instance) = (machine().name, machine().instance);
        assert!(!images.remove(&name, &instance).unwrap());
        drop(used);
        fs::write(making_of(&path), [1]).unwrap();
        fs::write(mark_file(&making_of(&path)), [1]).unwrap();
        let strange = directory.path().join("notes.new");
        fs::write(&strange, [1]).unwrap();
        let mut images = Images::new(directory.path());
        assert!(path.is_file() && mark_file(&path).is_file() && strange.is_file());
        assert!(!making_of(&path).exists() && !mark_file(&making_of(&path)).exists());
        assert!(images.remove(&name, &instance).unwrap());
        assert!(!path.exists() && !mark_file(&path).exists());
        assert!(
            images.remove(&name, &instance).unwrap(),
            "nothing is gone already"
        );
        assert!(matches!(
            images.remove("../db", &instance),
            Err(ImageError::Name)
        ));
    }
}
