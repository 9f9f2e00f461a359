//! An image: a file or a block device, locked, and its mark.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rdma_log::locks::lock;
use xxhash_rust::xxh3::Xxh3;

use super::copy::{BLOCK, Incoming, blocks_of};
use super::mark::{BadMark, MARK_BYTES, Mark, Marks, Stamp, Use, WhyNot};
use crate::backends::block::{self, ReservationError};
use crate::devices::DiskConfig;
use crate::disk::SECTOR;
use crate::protocol::{Identity, Record};

/// Read at once for a hash.
const HASHED_AT_ONCE: usize = 1 << 20;

/// Behind an image's name: the file of its mark.
const SUFFIX: &str = ".doppel";

/// What the thread that serves an image does to it.
pub trait Image: Send {
    /// Fills `data` from this offset in bytes.
    ///
    /// # Errors
    /// The disk's.
    fn read(&mut self, data: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes `data` there.
    ///
    /// # Errors
    /// The disk's.
    fn write(&mut self, data: &[u8], at: u64) -> io::Result<()>;
    /// Returns when all that was written survives the loss of power.
    ///
    /// # Errors
    /// The disk's.
    fn sync(&mut self) -> io::Result<()>;
    /// Writes its mark, and returns when that survives the loss of power.
    ///
    /// # Errors
    /// The disk's.
    fn mark(&mut self, mark: &Mark) -> io::Result<()>;
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open the disk image {path}: {source}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("the disk image {path} is neither a regular file nor a block device")]
    Kind {
        /// Its path.
        path: PathBuf,
    },
    /// A size that no disk has.
    #[error(
        "the disk image {path} has {bytes} bytes: a disk is whole sectors of 512 bytes, one or more (truncate -s 1G makes a file of a good size)"
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Somebody else has it.
    #[error(
        "another process uses the disk image {path}: an image serves one machine at a time, unless it is shared each side of a pair needs one \
         of its own, and with reservations the sides that share one are on two hosts"
    )]
    Busy {
        /// Its path.
        path: PathBuf,
    },
    /// Its mark.
    #[error("the mark of the disk image {path}: {source}")]
    Mark {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: BadMark,
    },
    /// It does not belong to this machine's present.
    #[error(
        "the disk image {path} cannot be used: {why}; or, if you know that it is the right one, remove its mark ({mark})"
    )]
    Refused {
        /// Its path.
        path: PathBuf,
        /// Why.
        why: WhyNot,
        /// How its mark is removed.
        mark: String,
    },
    /// A pair's, for a machine alone.
    #[error(
        "the disk image {path} belongs to the machine {machine:?} ({stamp}), whose other image would not know of what is written here: run it by doppel primary, or remove its mark ({mark})"
    )]
    OfAPair {
        /// Its path.
        path: PathBuf,
        /// The machine's name.
        machine: String,
        /// Of when.
        stamp: Stamp,
        /// How its mark is removed.
        mark: String,
    },
    /// Reading or writing it.
    #[error("the disk image {path} fails: {source}")]
    Failed {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A shared one that somebody still has.
    #[error(
        "another process still has the shared disk image {path} locked, {} ms after the old primary should be gone: fuser -v {path} names it",
        within.as_millis()
    )]
    Held {
        /// Its path.
        path: PathBuf,
        /// How long it was tried.
        within: Duration,
    },
    /// A shared one that is not the primary's.
    #[error(
        "the disk image {path} is not the one that the primary has: its mark names another process; give both sides the same file or device"
    )]
    Another {
        /// Its path.
        path: PathBuf,
    },
    /// Persistent reservations.
    #[error("the disk image {path}: {source}")]
    Reservation {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        source: ReservationError,
    },
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// For this process alone.
    Own,
    /// With others that only read.
    Read,
    /// One that both sides of a pair have.
    Shared {
        /// It is locked from now on; one that follows does so when it takes over, or, on a host of its own, at once.
        leads: bool,
        /// What was written is on it before the write is done: it may be another host that reads it next.
        through: bool,
    },
}

/// An image that is open and locked. Its clones are the same image.
#[derive(Clone, Debug)]
pub struct OpenImage {
    pub(super) path: Arc<Path>,
    pub(super) file: Arc<File>,
    /// None for an image that is only read.
    pub(super) marks: Option<Arc<Mutex<Marks>>>,
    mark: Option<Mark>,
    config: DiskConfig,
    on_device: bool,
    /// The machine whose mark it was given since.
    given_to: Arc<OnceLock<String>>,
    /// Whether the guest would read nothing but zeros; known once it was read.
    empty: Arc<OnceLock<bool>>,
}

impl OpenImage {
    /// Opens an image and locks it until the last clone is gone.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn open(path: &Path, opening: Opening) -> Result<Self, DiskError> {
        let read_only = opening == Opening::Read;
        let (shared, locks, through) = match opening {
            Opening::Own | Opening::Read => (false, true, false),
            Opening::Shared { leads, through } => (true, leads, through),
        };
        let opened = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(if through { libc::O_DSYNC } else { 0 })
            .open(path)
            .map_err(opened)?;
        let kind = file.metadata().map_err(opened)?.file_type();
        let on_device = kind.is_block_device();
        if !on_device && !kind.is_file() {
            return Err(DiskError::Kind {
                path: path.to_owned(),
            });
        }
        let locked = match opening {
            Opening::Read => file.try_lock_shared(),
            _ if locks => file.try_lock(),
            _ => Ok(()),
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DiskError::Busy {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(opened(source)),
        }
        if through {
            // What a process that is gone has left of it in this host's memory is written now, or refused where another host has the disk reserved; later,
            // when this host had it again, it would overwrite what is newer. That it is refused, or was lost, is nothing of this process's.
            let _ = file.sync_all();
            block::forget_cached(&file).map_err(opened)?;
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(opened)?;
        let ours = if on_device { MARK_BYTES } else { 0 };
        let usable = bytes.saturating_sub(ours);
        if usable < SECTOR || !usable.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        let (marks, mark) = if read_only {
            (None, None)
        } else {
            let (marks, mark) =
                marks(path, &file, on_device.then_some(usable)).map_err(|source| {
                    DiskError::Mark {
                        path: path.to_owned(),
                        source,
                    }
                })?;
            (Some(Arc::new(Mutex::new(marks))), mark)
        };
        Ok(Self {
            path: path.into(),
            file: Arc::new(file),
            marks,
            mark,
            config: DiskConfig::new(usable / SECTOR, read_only, shared),
            on_device,
            given_to: Arc::default(),
            empty: Arc::default(),
        })
    }

    /// The disk as the guest sees it.
    #[must_use]
    pub fn config(&self) -> DiskConfig {
        self.config
    }

    /// Whether its path still leads to what was opened.
    pub(super) fn is_at_its_path(&self) -> io::Result<bool> {
        let (here, there) = (self.file.metadata()?, std::fs::metadata(&self.path)?);
        Ok((here.dev(), here.ino()) == (there.dev(), there.ino()))
    }

    /// The image's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a machine may be started on it, the arbiter's record of it being `found`: the stamp that says so. An image without
    /// a mark is a new one.
    ///
    /// # Errors
    /// [`DiskError::Refused`].
    pub fn judge(&self, machine: &str, found: Option<&Record>) -> Result<Option<Stamp>, DiskError> {
        let judged = self.mark.as_ref().map(|mark| mark.judge(machine, found));
        let judged = judged.transpose().map(Option::flatten);
        judged.map_err(|why| DiskError::Refused {
            path: self.path.to_path_buf(),
            why,
            mark: self.how_to_unmark(),
        })
    }

    /// Whether a machine without a pair may use it.
    ///
    /// # Errors
    /// [`DiskError::OfAPair`].
    pub fn judge_alone(&self) -> Result<(), DiskError> {
        match &self.mark {
            None => Ok(()),
            Some(mark) => Err(DiskError::OfAPair {
                path: self.path.to_path_buf(),
                machine: mark.machine.clone(),
                stamp: mark.stamp,
                mark: self.how_to_unmark(),
            }),
        }
    }

    fn how_to_unmark(&self) -> String {
        let path = self.path.display();
        if self.on_device {
            format!("zero the last {MARK_BYTES} bytes of {path}")
        } else {
            format!("rm {path}{SUFFIX}")
        }
    }

    /// Before the arbiter is asked to make this record live: from then on the image is its owner's, and until then as good as
    /// it was by `before`.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn will_lead(
        &self,
        machine: &str,
        record: &Record,
        before: Option<Stamp>,
    ) -> Result<(), DiskError> {
        self.write_mark(&Mark {
            machine: machine.to_owned(),
            stamp: Stamp::of(record),
            in_use: Use::Leads,
            sure: false,
            before,
        })
    }

    /// The arbiter has made this record live, and no guest has run on the image yet.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn leads(&self, machine: &str, record: &Record) -> Result<(), DiskError> {
        self.write_mark(&Mark {
            machine: machine.to_owned(),
            stamp: Stamp::of(record),
            in_use: Use::Leads,
            sure: true,
            before: None,
        })
    }

    /// The arbiter certainly has not; a new image is one again.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn does_not_lead(&self, before: Option<Stamp>) -> Result<(), DiskError> {
        match (&self.marks, before) {
            (Some(marks), None) => lock(marks).clear().map_err(|source| self.failed(source)),
            _ => Ok(()),
        }
    }

    /// The arbiter was not asked at all: the image carries the mark again that it was found with, or none.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn will_not_lead(&self) -> Result<(), DiskError> {
        match &self.mark {
            Some(found) => self.write_mark(found),
            None => self.does_not_lead(None),
        }
    }

    /// From now on it is changed after its primary's, and worth nothing by itself.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn follows(&self, machine: &str, me: Identity) -> Result<(), DiskError> {
        self.write_mark(&Mark {
            machine: machine.to_owned(),
            stamp: Stamp {
                epoch: 0,
                configuration: 0,
                owner: me,
            },
            in_use: Use::Follows,
            sure: true,
            before: None,
        })
    }

    pub(super) fn write_mark(&self, mark: &Mark) -> Result<(), DiskError> {
        let _ = self.given_to.set(mark.machine.clone());
        self.clone()
            .mark(mark)
            .map_err(|source| self.failed(source))
    }

    pub(super) fn failed(&self, source: io::Error) -> DiskError {
        DiskError::Failed {
            path: self.path.to_path_buf(),
            source,
        }
    }

    /// Whose it is, by its mark: a machine's name.
    #[must_use]
    pub fn machine(&self) -> Option<&str> {
        let found = self.mark.as_ref().map(|mark| &mark.machine);
        self.given_to.get().or(found).map(String::as_str)
    }

    /// Whether the guest would have read nothing but zeros when the image was last [hashed](Self::hash).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.empty.get().copied().unwrap_or(false)
    }

    /// Returns when all that was put into it survives the loss of power.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn settle(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|source| self.failed(source))
    }

    /// Hash of all that the guest can read.
    ///
    /// # Errors
    /// [`DiskError::Failed`].
    pub fn hash(&self) -> Result<u64, DiskError> {
        let mut hash = Xxh3::new();
        let mut empty = true;
        let mut block = vec![0; HASHED_AT_ONCE];
        let bytes = self.config.sectors * SECTOR;
        let mut at = 0;
        while at < bytes {
            let length = HASHED_AT_ONCE.min((bytes - at) as usize);
            self.file
                .read_exact_at(&mut block[..length], at)
                .map_err(|source| self.failed(source))?;
            hash.update(&block[..length]);
            empty &= block[..length].iter().all(|&byte| byte == 0);
            at += length as u64;
        }
        // The first time; what is put into it later is marked.
        let _ = self.empty.set(empty);
        Ok(hash.digest())
    }
}

/// Where the mark of an image is that is a file.
#[must_use]
pub fn mark_file(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// The mark of an image that is a file, which another process may have: as it is now.
///
/// # Errors
/// See [`BadMark`].
pub fn mark_beside(image: &Path) -> Result<Option<Mark>, BadMark> {
    match File::open(mark_file(image)) {
        Ok(file) => Ok(Marks::open(file, 0)?.1),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn marks(path: &Path, image: &File, behind: Option<u64>) -> Result<(Marks, Option<Mark>), BadMark> {
    if let Some(at) = behind {
        return Marks::open(image.try_clone()?, at);
    }
    let beside = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(mark_file(path))?;
    // The mark is of no use if its file's name is lost.
    let directory = path.canonicalize()?;
    if let Some(directory) = directory.parent() {
        File::open(directory)?.sync_all()?;
    }
    Marks::open(beside, 0)
}

impl Incoming for OpenImage {
    fn blocks(&self) -> u64 {
        blocks_of(self.config.sectors)
    }

    fn put(&mut self, block: u64, content: &[u8; BLOCK]) -> io::Result<()> {
        let at = block * BLOCK as u64;
        let left = (self.config.sectors * SECTOR).saturating_sub(at);
        let content = &content[..left.min(BLOCK as u64) as usize];
        if content.iter().all(|&byte| byte == 0) {
            // A hole stays one.
            let mut before = [0; BLOCK];
            let before = &mut before[..content.len()];
            self.file.read_exact_at(before, at)?;
            if before == content {
                return Ok(());
            }
        }
        self.file.write_all_at(content, at)
    }
}

impl Image for OpenImage {
    fn read(&mut self, data: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(data, at)
    }

    fn write(&mut self, data: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn mark(&mut self, mark: &Mark) -> io::Result<()> {
        match &self.marks {
            Some(marks) => lock(marks).write(mark),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Configuration, Epoch, State};

    fn record(epoch: u64, owner: u8) -> Record {
        Record {
            epoch: Epoch(epoch),
            configuration: Configuration(1),
            state: State::Live,
            owner: Identity::from_bytes([owner; 16]),
            entitled: None,
        }
    }

    #[test]
    fn an_image_is_used_by_one_and_read_by_many() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![7; 3 * 512]).unwrap();
        let image = OpenImage::open(&path, Opening::Own).unwrap();
        assert_eq!(image.config().sectors, 3);
        for opening in [Opening::Own, Opening::Read] {
            let again = OpenImage::open(&path, opening);
            assert!(matches!(again.unwrap_err(), DiskError::Busy { .. }));
        }
        let clone = image.clone();
        drop(image);
        assert!(
            OpenImage::open(&path, Opening::Own).is_err(),
            "a clone has it"
        );
        drop(clone);
        let reader = OpenImage::open(&path, Opening::Read).unwrap();
        let other = OpenImage::open(&path, Opening::Read).unwrap();
        assert_eq!(reader.hash().unwrap(), other.hash().unwrap());
        assert!(OpenImage::open(&path, Opening::Own).is_err(), "it is read");
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = |bytes: usize| {
            let path = directory.path().join("disk");
            std::fs::write(&path, vec![0; bytes]).unwrap();
            OpenImage::open(&path, Opening::Own)
        };
        for bytes in [0, 1, 511, 513] {
            assert!(matches!(open(bytes).unwrap_err(), DiskError::Size { .. }));
        }
        open(512).unwrap();
        let kind = OpenImage::open(directory.path(), Opening::Read).unwrap_err();
        assert!(matches!(kind, DiskError::Kind { .. }), "{kind}");
        let missing = OpenImage::open(&directory.path().join("none"), Opening::Own).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
    }

    #[test]
    fn a_mark_outlives_the_process_and_decides() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![0; 512]).unwrap();
        let open = || OpenImage::open(&path, Opening::Own).unwrap();
        let new = open();
        assert_eq!(new.judge("m", Some(&record(9, 9))).unwrap(), None);
        new.judge_alone().unwrap();
        // A swap that was lost leaves it new.
        new.will_lead("m", &record(1, 1), None).unwrap();
        new.does_not_lead(None).unwrap();
        drop(new);
        let image = open();
        image.judge_alone().unwrap();
        image.will_lead("m", &record(1, 1), None).unwrap();
        image.leads("m", &record(1, 1)).unwrap();
        drop(image);
        let image = open();
        let before = image.judge("m", Some(&record(1, 1))).unwrap();
        assert_eq!(before, Some(Stamp::of(&record(1, 1))));
        let alone = image.judge_alone().unwrap_err();
        assert!(alone.to_string().contains("disk.doppel"), "{alone}");
        let stale = image.judge("m", Some(&record(2, 2))).unwrap_err();
        assert!(stale.to_string().contains("stale"), "{stale}");
        // One that was about to lead and was not let is what it was.
        image.will_lead("m", &record(2, 3), before).unwrap();
        image.does_not_lead(before).unwrap();
        drop(image);
        let image = open();
        assert_eq!(image.judge("m", Some(&record(1, 1))).unwrap(), before);
        image.leads("m", &record(1, 1)).unwrap();
        drop(image);
        let image = open();
        image.will_lead("m", &record(2, 3), before).unwrap();
        image.will_not_lead().unwrap();
        drop(image);
        let image = open();
        // Also known to have led: another's claim, in whose reign nothing was served, does not make it stale.
        let claimed = Record {
            state: State::Claimed,
            ..record(2, 7)
        };
        assert_eq!(image.judge("m", Some(&claimed)).unwrap(), before);
        image.follows("m", Identity::from_bytes([4; 16])).unwrap();
        drop(image);
        assert!(open().judge("m", Some(&record(1, 1))).is_err());
    }

    #[test]
    fn a_hash_is_of_the_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let mut bytes = vec![0u8; (2 << 20) + 512];
        let hash = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            OpenImage::open(&path, Opening::Read)
                .unwrap()
                .hash()
                .unwrap()
        };
        let zeros = hash(&bytes);
        *bytes.last_mut().unwrap() = 1;
        assert_ne!(hash(&bytes), zeros);
    }
}
