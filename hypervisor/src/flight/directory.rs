//! The directory of a recording: what is in it, who writes there, and where an older recording goes.
#![forbid(unsafe_code)]

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::FlightError;

/// The machine's description.
pub(super) const MACHINE: &str = "machine";
/// Where a recording that was there goes when a new one begins.
const PREVIOUS: &str = "previous";
const CHECKPOINT: &str = "checkpoint";
const LOG: &str = "log";
/// What is not finished.
const NEW: &str = "new";

/// Whether `doppel replay` is to take this path for a recording.
#[must_use]
pub fn is_recording(path: &Path) -> bool {
    path.is_dir()
}

/// Whether a recorder could write there now, so that its operator learns it when it is started.
///
/// # Errors
/// [`FlightError::Io`], [`FlightError::InUse`].
pub fn usable(path: &Path) -> Result<(), FlightError> {
    fs::create_dir_all(path).map_err(FlightError::io("make the directory", path))?;
    Directory::lock(path, File::try_lock).map(drop)
}

/// A directory that is locked: by one who writes, or by some who read.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    lock: File,
}

/// A file of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// Its checkpoint.
    Checkpoint(u64),
    /// Its log.
    Log(u64),
    /// Something that was not finished.
    Unfinished,
    /// The machine's description.
    Machine,
}

impl Name {
    fn parse(name: &str) -> Option<Self> {
        if name == MACHINE {
            return Some(Self::Machine);
        }
        let (stem, kind) = name.split_once('.')?;
        if stem == MACHINE && kind == NEW {
            return Some(Self::Unfinished);
        }
        if stem.len() != 8 {
            return None;
        }
        let number = stem.parse().ok()?;
        match kind {
            CHECKPOINT => Some(Self::Checkpoint(number)),
            LOG => Some(Self::Log(number)),
            "checkpoint.new" => Some(Self::Unfinished),
            _ => None,
        }
    }
}

impl Directory {
    /// For a new recording: makes it if it is not there, and moves what is recorded there aside.
    pub(super) fn to_write(path: &Path) -> Result<Self, FlightError> {
        fs::create_dir_all(path).map_err(FlightError::io("make the directory", path))?;
        let directory = Self::lock(path, File::try_lock)?;
        let found = directory.names()?;
        if is_whole(&found) {
            directory.move_aside(found)?;
        } else {
            // Of one that ended before it began.
            for (_, file) in found {
                directory.remove(&file)?;
            }
        }
        directory.sync()?;
        Ok(directory)
    }

    /// Moves a recording to `previous`, in place of the one there. A description is the last file of a recording to be removed and to be moved, so
    /// whoever dies in between, or loses power, leaves either a whole one in `previous`, which has to go, or the part of this one that was moved.
    fn move_aside(&self, found: Vec<(Name, String)>) -> Result<(), FlightError> {
        let previous = self.path.join(PREVIOUS);
        fs::create_dir_all(&previous).map_err(FlightError::io("make the directory", &previous))?;
        let older = Self::open(&previous)?;
        let there = older.names()?;
        if is_whole(&there) {
            older.each(there, |file| older.remove(file))?;
        }
        self.each(found, |file| {
            fs::rename(self.path.join(file), previous.join(file))
                .map_err(FlightError::io("move aside", self.path.join(file)))?;
            older.sync()
        })
    }

    /// Does this to files of it, to the older ones first, and to the description when it is sure of all others.
    fn each(
        &self,
        mut files: Vec<(Name, String)>,
        mut does: impl FnMut(&str) -> Result<(), FlightError>,
    ) -> Result<(), FlightError> {
        files.sort_by_key(|(name, _)| match name {
            Name::Unfinished => (0, 0),
            Name::Checkpoint(number) | Name::Log(number) => (1, *number),
            Name::Machine => (2, 0),
        });
        for (name, file) in &files {
            if *name == Name::Machine {
                self.sync()?;
            }
            does(file)?;
        }
        self.sync()
    }

    /// For a replay.
    pub(super) fn to_read(path: &Path) -> Result<Self, FlightError> {
        Self::lock(path, File::try_lock_shared)
    }

    fn lock(
        path: &Path,
        lock: impl Fn(&File) -> Result<(), TryLockError>,
    ) -> Result<Self, FlightError> {
        let directory = Self::open(path)?;
        match lock(&directory.lock) {
            Ok(()) => Ok(directory),
            Err(TryLockError::WouldBlock) => Err(FlightError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(FlightError::io("lock", path)(error)),
        }
    }

    fn open(path: &Path) -> Result<Self, FlightError> {
        Ok(Self {
            path: path.to_owned(),
            lock: File::open(path).map_err(FlightError::io("open", path))?,
        })
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The files of a recording in it, in no order. Others are nobody's business.
    pub(super) fn names(&self) -> Result<Vec<(Name, String)>, FlightError> {
        let listed = |error: io::Error| FlightError::io("list", &self.path)(error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(listed)? {
            let entry = entry.map_err(|error| FlightError::io("list", &self.path)(error))?;
            let file = entry.file_name().to_string_lossy().into_owned();
            if let Some(name) = Name::parse(&file) {
                names.push((name, file));
            }
        }
        Ok(names)
    }

    pub(super) fn machine(&self) -> PathBuf {
        self.path.join(MACHINE)
    }

    pub(super) fn log(&self, segment: u64) -> PathBuf {
        self.path.join(format!("{segment:08}.{LOG}"))
    }

    pub(super) fn checkpoint(&self, segment: u64) -> PathBuf {
        self.path.join(format!("{segment:08}.{CHECKPOINT}"))
    }

    /// Where a file is written before it has its name.
    pub(super) fn unfinished(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(NEW);
        name.into()
    }

    /// Gives a file, which is durable, its name, durably.
    pub(super) fn finish(&self, path: &Path) -> Result<(), FlightError> {
        fs::rename(Self::unfinished(path), path).map_err(FlightError::io("name", path))?;
        self.sync()
    }

    /// What was made, named and removed here survives the loss of power.
    pub(super) fn sync(&self) -> Result<(), FlightError> {
        self.lock
            .sync_all()
            .map_err(FlightError::io("sync", &self.path))
    }

    fn remove(&self, file: &str) -> Result<(), FlightError> {
        let path = self.path.join(file);
        fs::remove_file(&path).map_err(FlightError::io("remove", path))
    }

    /// Removes the segments before this one; returns how many files.
    pub(super) fn remove_before(&self, segment: u64) -> Result<usize, FlightError> {
        let mut removed = 0;
        for (name, file) in self.names()? {
            if let Name::Checkpoint(number) | Name::Log(number) = name
                && number < segment
            {
                self.remove(&file)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Whether these are the files of a recording: what has not come to a machine's description is none.
fn is_whole(files: &[(Name, String)]) -> bool {
    files.iter().any(|(name, _)| *name == Name::Machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_other_files() {
        assert_eq!(Name::parse("machine"), Some(Name::Machine));
        assert_eq!(Name::parse("machine.new"), Some(Name::Unfinished));
        assert_eq!(Name::parse("00000012.log"), Some(Name::Log(12)));
        assert_eq!(
            Name::parse("00000012.checkpoint"),
            Some(Name::Checkpoint(12))
        );
        assert_eq!(
            Name::parse("00000012.checkpoint.new"),
            Some(Name::Unfinished)
        );
        for other in [
            "",
            "notes",
            "12.log",
            "00000012.txt",
            "previous",
            "+0000012.logs",
        ] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn one_writes_and_an_older_recording_is_kept_once() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("deep/recording");
        let first = Directory::to_write(&path).unwrap();
        assert!(matches!(
            Directory::to_write(&path),
            Err(FlightError::InUse(_))
        ));
        assert!(matches!(
            Directory::to_read(&path),
            Err(FlightError::InUse(_))
        ));
        for (number, text) in [(1, "a"), (2, "b")] {
            fs::write(first.log(number), text).unwrap();
        }
        fs::write(first.machine(), "m").unwrap();
        fs::write(path.join("notes"), "mine").unwrap();
        drop(first);
        let second = Directory::to_write(&path).unwrap();
        assert!(second.names().unwrap().is_empty());
        assert_eq!(fs::read(path.join("previous/00000002.log")).unwrap(), b"b");
        assert_eq!(fs::read(path.join("notes")).unwrap(), b"mine");
        // One that has not come to a machine's description is none.
        fs::write(second.log(1), "c").unwrap();
        drop(second);
        let third = Directory::to_write(&path).unwrap();
        assert!(third.names().unwrap().is_empty());
        assert_eq!(fs::read(path.join("previous/machine")).unwrap(), b"m");
    }

    const FILES: [&str; 5] = [
        "00000007.checkpoint",
        "00000007.log",
        "00000008.checkpoint",
        "00000008.log",
        MACHINE,
    ];

    fn recorded(path: &Path, files: &[&str], text: &str) {
        fs::create_dir_all(path).unwrap();
        for file in files {
            fs::write(path.join(file), text).unwrap();
        }
    }

    /// The process that moves them dies after any of its steps.
    #[test]
    fn nothing_of_a_recording_is_lost_by_whoever_dies_as_it_moves() {
        for moved in 0..=FILES.len() {
            let place = tempfile::tempdir().unwrap();
            let previous = place.path().join(PREVIOUS);
            recorded(&previous, &FILES[..moved], "old");
            recorded(place.path(), &FILES[moved..], "old");
            drop(Directory::to_write(place.path()).unwrap());
            for file in FILES {
                let text = fs::read_to_string(previous.join(file));
                assert_eq!(text.ok().as_deref(), Some("old"), "{file}, {moved} moved");
                assert!(!place.path().join(file).exists(), "{file}, {moved} moved");
            }
        }
    }

    /// Or as it removes the one before that, whose other segments are never taken for this one's.
    #[test]
    fn nothing_of_the_one_before_is_left_by_whoever_dies_as_it_is_removed() {
        const BEFORE: [&str; 4] = [
            "00000001.checkpoint",
            "00000001.log",
            "00000009.log",
            MACHINE,
        ];
        for removed in 0..=BEFORE.len() {
            let place = tempfile::tempdir().unwrap();
            let previous = place.path().join(PREVIOUS);
            recorded(&previous, &BEFORE[removed..], "older");
            recorded(place.path(), &FILES, "old");
            drop(Directory::to_write(place.path()).unwrap());
            let mut left: Vec<_> = fs::read_dir(&previous).unwrap().flatten().collect();
            left.sort_by_key(fs::DirEntry::file_name);
            let names: Vec<_> = left.iter().map(fs::DirEntry::file_name).collect();
            assert_eq!(names, FILES, "{removed} removed");
            assert!(
                left.iter()
                    .all(|file| fs::read(file.path()).unwrap() == b"old")
            );
        }
    }

    /// The order that the two above rely on.
    #[test]
    fn the_description_is_the_last_to_go() {
        let place = tempfile::tempdir().unwrap();
        recorded(place.path(), &FILES, "old");
        let directory = Directory::open(place.path()).unwrap();
        let mut went = Vec::new();
        let names = directory.names().unwrap();
        directory
            .each(names, |file| {
                went.push(file.to_owned());
                Ok(())
            })
            .unwrap();
        let numbers: Vec<_> = went.iter().map(|file| &file[..8.min(file.len())]).collect();
        assert_eq!(
            numbers,
            ["00000007", "00000007", "00000008", "00000008", MACHINE]
        );
    }
}
