//! The arbiter of a shared directory.
//!
//! `DIRECTORY/MACHINE/` holds numbered records; the highest number is the record. A swap writes the new one aside
//! under a name of its own, syncs it, and `link`s it to the next number: the file system lets exactly one process do
//! that. A file never changes once it has its number.
//!
//! ```text
//!   read newest: N ──is `from`?──▶ write aside, sync ──▶ link N+1 ──▶ sync directory ──▶ still newest? ──▶ done
//!        │ no                                              │ exists                           │ no
//!        └──▶ lost (or done before)  ◀──── read again ─────┴──────────────────────────────────┘
//! ```
//!
//! **Durability.** A record that is in place outlives any process, since the kernel has it. [`Durability::PowerLoss`]
//! syncs file and directory before a swap is reported, so that it outlives the host, too: a record that a host took with it would
//! name the one that served before as the machine's owner, and its memory or image as the newer one.
//!
//! **Pruning** removes the oldest numbers and keeps the newest [`KEPT`]. A process that was frozen between reading
//! and linking may then find its number free though it was taken long ago; therefore a swap looks again after its
//! link, and one that is not the newest has lost. (The newest number is never removed, so it cannot be missed.)
//!
//! **Network file systems.** Link and sync must reach the server, and names must not be answered from a cache: mount
//! NFS with `sync,lookupcache=none,noac`. A stale view cannot make two winners, but it costs retries.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Arbiter, ArbiterError, Swap, check_name, sealed, text};
use crate::protocol::record::Record;

/// How many numbers are kept: a history for people, and a reader that lists slowly always meets one that is there.
const KEPT: u64 = 16;

/// A file aside that is older than this (by the file system's own clock) belongs to a process that died with it.
/// Should that process only have been frozen, its link fails and it tries again.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// How often a read begins again because the directory changed under it.
const TRIES: u32 = 16;

const SUFFIX: &str = ".record";
const ASIDE: &str = ".aside-";

/// What a swap outlives once it is reported. It outlives the death of every process in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A crash of the host or its power: file and directory are synced. For two hosts, and for machines with a disk.
    PowerLoss,
    /// Only processes. For a pair on one host, of which nothing outlives a loss of power: a swap then takes no longer than a file does.
    ProcessDeath,
}

/// An arbiter in a directory that both hosts see, for one machine.
#[derive(Debug)]
pub struct FileArbiter {
    /// The machine's own directory.
    home: PathBuf,
    /// The shared directory, which must be there already.
    shared: PathBuf,
    machine: String,
    durability: Durability,
}

impl FileArbiter {
    /// The arbiter of `machine` in the existing directory `shared`.
    ///
    /// # Errors
    /// If the name is none, or the directory is not there. It is never created here: where a mount is missing, a
    /// second arbiter would come into being, and with it a second live machine.
    pub fn open(
        shared: &Path,
        machine: &str,
        durability: Durability,
    ) -> Result<Self, ArbiterError> {
        check_name(machine)?;
        if !shared.is_dir() {
            return Err(ArbiterError::Missing {
                path: shared.to_owned(),
            });
        }
        Ok(Self {
            home: shared.join(machine),
            shared: shared.to_owned(),
            machine: machine.to_owned(),
            durability,
        })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.home.join(format!("{number:020}{SUFFIX}"))
    }

    /// The numbers in place, lowest first. A home that is not there yet has none.
    fn numbers(&self) -> Result<Vec<u64>, ArbiterError> {
        let mut numbers = Vec::new();
        let entries = match fs::read_dir(&self.home) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound && self.shared.is_dir() => {
                return Ok(numbers);
            }
            Err(error) => return Err(self.failure("read the directory", &self.home, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| self.failure("read the directory", &self.home, e))?;
            numbers.extend(entry.file_name().to_str().and_then(parse_number));
        }
        numbers.sort_unstable();
        // Nobody counts so far: it is a stray file, and the next number might not exist.
        if let Some(&number) = numbers.last()
            && number > text::MAX_NUMBER
        {
            return Err(ArbiterError::Corrupt {
                path: self.path(number),
                problem: "no record ever has this number".into(),
            });
        }
        Ok(numbers)
    }

    /// The newest record and its number.
    fn newest(&self) -> Result<Option<(u64, Record)>, ArbiterError> {
        for _ in 0..TRIES {
            let Some(&listed) = self.numbers()?.last() else {
                return Ok(None);
            };
            let mut newest = None;
            // A number that came while the directory was listed may be missing from the list: look above it, too.
            let mut number = listed;
            while let Some(record) = self.load(number)? {
                newest = Some((number, record));
                number += 1;
            }
            // Pruned between the list and the look: the list is out of date.
            if newest.is_some() {
                return Ok(newest);
            }
        }
        Err(ArbiterError::Unsettled {
            path: self.home.clone(),
        })
    }

    /// The record with this number, if it is there.
    fn load(&self, number: u64) -> Result<Option<Record>, ArbiterError> {
        let path = self.path(number);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failure("open", &path, error)),
        };
        let mut bytes = Vec::with_capacity(text::MAX_SIZE);
        file.take(text::MAX_SIZE as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.failure("read", &path, error))?;
        match text::read(&self.machine, &bytes) {
            Ok(record) => Ok(Some(record)),
            Err(problem) => Err(ArbiterError::Corrupt { path, problem }),
        }
    }

    /// The file aside of `record`'s owner.
    fn aside(&self, record: &Record) -> PathBuf {
        self.home.join(format!("{ASIDE}{}", record.owner))
    }

    fn write_aside(&self, aside: &Path, record: &Record) -> Result<(), ArbiterError> {
        // One left by an earlier call of this process may be linked to a number by now: never write into it.
        self.remove(aside)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(aside)
            .map_err(|error| self.failure("create", aside, error))?;
        file.write_all(text::write(&self.machine, record).as_bytes())
            .map_err(|error| self.failure("write", aside, error))?;
        self.sync(&file, aside)
    }

    fn make_home(&self) -> Result<(), ArbiterError> {
        match DirBuilder::new().mode(0o700).create(&self.home) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(self.failure("create", &self.home, error));
            }
            _ => {}
        }
        self.sync_directory(&self.shared)
    }

    fn sync_directory(&self, path: &Path) -> Result<(), ArbiterError> {
        let directory = File::open(path).map_err(|error| self.failure("open", path, error))?;
        self.sync(&directory, path)
    }

    fn sync(&self, file: &File, path: &Path) -> Result<(), ArbiterError> {
        match self.durability {
            Durability::PowerLoss => file
                .sync_all()
                .map_err(|error| self.failure("sync", path, error)),
            Durability::ProcessDeath => Ok(()),
        }
    }

    fn remove(&self, path: &Path) -> Result<(), ArbiterError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(self.failure("remove", path, error))
            }
            _ => Ok(()),
        }
    }

    /// Gives the file aside its number. This is the moment of the swap.
    fn place(
        &self,
        aside: &Path,
        number: u64,
        from: Option<&Record>,
        to: &Record,
    ) -> Result<Swap, ArbiterError> {
        let path = self.path(number);
        let taken = match fs::hard_link(aside, &path) {
            Ok(()) => false,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => true,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
                return Err(ArbiterError::NoLinks {
                    path: self.home.clone(),
                });
            }
            // On a network file system the link may have been made and only its answer lost.
            Err(error) => return Err(self.unsure(number, self.failure("link", &path, error))),
        };
        if !taken {
            return self
                .confirm(number, to)
                .map_err(|error| self.unsure(number, error));
        }
        // Taken by another process, or by our own link whose answer a network file system lost.
        let unsettled = || ArbiterError::Unsettled {
            path: self.home.clone(),
        };
        match self.newest().map_err(|error| self.unsure(number, error))? {
            Some((newest, record)) if record == *to => self
                .confirm(newest, to)
                .map_err(|error| self.unsure(newest, error)),
            now => {
                let now = now.map(|(_, record)| record);
                if now.as_ref() == from {
                    return Err(self.unsure(number, unsettled()));
                }
                Ok(Swap::Lost(now))
            }
        }
    }

    /// After the link: `to` has the number `number`. Is it the record?
    fn confirm(&self, number: u64, to: &Record) -> Result<Swap, ArbiterError> {
        self.sync_directory(&self.home)?;
        match self.newest()? {
            Some((newest, record)) if newest == number && record == *to => Ok(Swap::Done),
            // Replaced meanwhile, or never the record: the number was free only because it had been pruned.
            found => Ok(Swap::Lost(found.map(|(_, record)| record))),
        }
    }

    /// Removes what nobody needs any more. It may fail, and is then done after another swap.
    fn prune(&self, newest: u64) -> Result<(), ArbiterError> {
        if newest <= KEPT {
            return Ok(());
        }
        // Lowest first: what is left after a crash is a history without holes.
        for number in self.numbers()?.into_iter().filter(|n| n + KEPT <= newest) {
            self.remove(&self.path(number))?;
        }
        let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
        let Ok(now) = modified(&self.path(newest)) else {
            return Ok(());
        };
        let entries = fs::read_dir(&self.home)
            .map_err(|error| self.failure("read the directory", &self.home, error))?;
        for entry in entries.flatten() {
            let forgotten = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(ASIDE))
                && modified(&entry.path())
                    .is_ok_and(|then| now.duration_since(then).is_ok_and(|age| age > FORGOTTEN));
            if forgotten {
                self.remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn unsure(&self, number: u64, source: ArbiterError) -> ArbiterError {
        ArbiterError::Unsure {
            path: self.path(number),
            source: Box::new(source),
        }
    }

    fn failure(&self, what: &'static str, path: &Path, source: io::Error) -> ArbiterError {
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::PermissionDenied => ArbiterError::Permission { what, path },
            ErrorKind::NotFound if !self.shared.is_dir() => ArbiterError::Missing {
                path: self.shared.clone(),
            },
            _ => ArbiterError::Io { what, path, source },
        }
    }
}

impl sealed::Sealed for FileArbiter {}

impl Arbiter for FileArbiter {
    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        Ok(self.newest()?.map(|(_, record)| record))
    }

    fn swap(&self, from: Option<&Record>, to: &Record) -> Result<Swap, ArbiterError> {
        let newest = self.newest()?;
        let found = newest.map(|(_, record)| record);
        if let Some((number, record)) = newest
            && record == *to
        {
            // An earlier call of this process landed but could not be sure of it.
            return self
                .confirm(number, to)
                .map_err(|error| self.unsure(number, error));
        }
        if found.as_ref() != from {
            return Ok(Swap::Lost(found));
        }
        if from.is_none() {
            self.make_home()?;
        }
        let aside = self.aside(to);
        self.write_aside(&aside, to)?;
        let number = newest.map_or(1, |(number, _)| number + 1);
        let outcome = self.place(&aside, number, from, to);
        // Leftovers are harmless: neither failure changes the outcome.
        let _ = self.remove(&aside);
        if matches!(outcome, Ok(Swap::Done)) {
            let _ = self.prune(number);
        }
        outcome
    }
}

fn parse_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let exact = digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit());
    if exact { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests;
