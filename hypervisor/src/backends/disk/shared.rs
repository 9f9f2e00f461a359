//! An image that both sides of a pair have: who writes it holds its lock, and its mark says who that is.
//!
//! ```text
//!  primary:  open, lock ─▶ mark "will lead" ─▶ meets its backup ─▶ swap ─▶ mark "leads" ─▶ the guest runs
//!  backup:   open ─▶ does its mark name the primary? ─▶ follows, and leaves it alone … ─▶ claim won, log drained
//!            ─▶ the primary is fenced ─▶ lock ─▶ does its mark still name that one? ─▶ mark "will lead" ─▶ live ─▶ writes
//! ```
//! The lock (`flock`) belongs to the open file. The kernel gives it to another process only when the last descriptor of it is closed, which
//! a process that ends does after its last write. So whoever has the lock knows, on one host, that nobody else writes.
#![forbid(unsafe_code)]

use std::fs::TryLockError;
use std::thread;
use std::time::{Duration, Instant};

use rdma_log::locks::lock;

use super::image::{DiskError, OpenImage};
use super::mark::{Mark, Stamp, Use};
use crate::backends::block::{self, ReservationError};
use crate::backends::reservations::Reservations;
use crate::protocol::{Identity, Record};

/// Between two looks whether the lock is free: short against a take-over.
const LOOK: Duration = Duration::from_millis(1);

impl OpenImage {
    /// Whether it is the very image that this process of the machine has, by what its mark says now.
    ///
    /// # Errors
    /// [`DiskError::Another`] if not; what it takes to know.
    pub fn is_had_by(&self, machine: &str, owner: Identity) -> Result<(), DiskError> {
        let same = self.is_at_its_path().map_err(|error| self.failed(error))?;
        match self.mark_now()? {
            Some(mark) if same && mark.machine == machine && mark.stamp.owner == owner => Ok(()),
            _ => Err(self.another()),
        }
    }

    /// Takes the image of a primary that is fenced, in the name of a claim that was won: returns when nobody else can have it locked, and its mark says so. Nothing
    /// was written to it before.
    ///
    /// # Errors
    /// [`DiskError::Held`], [`DiskError::Another`], [`DiskError::Failed`]: this side must not write.
    pub fn take_from(
        &self,
        machine: &str,
        owner: Identity,
        claim: &Record,
        within: Duration,
    ) -> Result<(), DiskError> {
        self.lock(within)?;
        // What was read before, of it or for others, may not be what is there now.
        block::forget_cached(&self.file).map_err(|error| self.failed(error))?;
        let before = match self.mark_now()? {
            Some(mark) if mark.machine == machine && mark.stamp.owner == owner => mark.stamp,
            _ => return Err(self.another()),
        };
        self.write_mark(&Mark {
            machine: machine.to_owned(),
            stamp: Stamp::of(claim),
            in_use: Use::Leads,
            sure: false,
            // Until the guest runs here it is what that one left.
            before: Some(before),
        })
    }

    /// The device's reservations, as of this process.
    #[must_use]
    pub fn reservations(&self, me: Identity) -> Reservations<block::Disk> {
        Reservations::new(block::Disk::of(&self.file), me)
    }

    /// Whom its mark names now: who has it, then who had it before, as long as it is as that one left it.
    ///
    /// # Errors
    /// What it takes to know.
    pub fn names(&self) -> Result<Vec<Identity>, DiskError> {
        let mark = self.mark_now()?;
        let named = mark.map(|mark| [Some(mark.stamp.owner), mark.before.map(|had| had.owner)]);
        Ok(named.into_iter().flatten().flatten().collect())
    }

    /// An error of its reservations.
    #[must_use]
    pub fn not_reserved(&self, source: ReservationError) -> DiskError {
        DiskError::Reservation {
            path: self.path.to_path_buf(),
            source,
        }
    }

    fn another(&self) -> DiskError {
        DiskError::Another {
            path: self.path.to_path_buf(),
        }
    }

    fn lock(&self, within: Duration) -> Result<(), DiskError> {
        let until = Instant::now() + within;
        loop {
            match self.file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(source)) => return Err(self.failed(source)),
                Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOOK),
                Err(TryLockError::WouldBlock) => {
                    return Err(DiskError::Held {
                        path: self.path.to_path_buf(),
                        within,
                    });
                }
            }
        }
    }

    fn mark_now(&self) -> Result<Option<Mark>, DiskError> {
        let Some(marks) = &self.marks else {
            return Ok(None);
        };
        let mut marks = lock(marks);
        block::forget_cached(marks.file()).map_err(|error| self.failed(error))?;
        marks.reread().map_err(|source| DiskError::Mark {
            path: self.path.to_path_buf(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backends::disk::{Image, Opening};
    use crate::protocol::{Configuration, Epoch, State};

    const SOON: Duration = Duration::from_millis(20);

    fn record(epoch: u64, owner: u8, state: State) -> Record {
        Record {
            epoch: Epoch(epoch),
            configuration: Configuration(epoch),
            state,
            owner: identity(owner),
            entitled: None,
        }
    }

    fn identity(of: u8) -> Identity {
        Identity::from_bytes([of; 16])
    }

    fn open(path: &Path, leads: bool) -> OpenImage {
        let through = true;
        OpenImage::open(path, Opening::Shared { leads, through }).unwrap()
    }

    fn image() -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        (directory, path)
    }

    #[test]
    fn one_leads_and_the_other_takes_it_when_that_one_is_gone() {
        let (_directory, path) = image();
        let mut leader = open(&path, true);
        let again = OpenImage::open(
            &path,
            Opening::Shared {
                leads: true,
                through: true,
            },
        );
        assert!(matches!(again.unwrap_err(), DiskError::Busy { .. }));
        let mut heir = open(&path, false);
        assert!(heir.config().is_shared());
        assert!(heir.is_had_by("m", identity(1)).is_err(), "it has no mark");
        leader
            .will_lead("m", &record(1, 1, State::Live), None)
            .unwrap();
        heir.is_had_by("m", identity(1)).unwrap();
        assert!(heir.is_had_by("m", identity(2)).is_err());
        assert!(heir.is_had_by("other", identity(1)).is_err());
        leader.leads("m", &record(1, 1, State::Live)).unwrap();
        leader.write(&[7; 512], 512).unwrap();
        let claim = record(2, 2, State::Claimed);
        let held = heir.take_from("m", identity(1), &claim, SOON).unwrap_err();
        assert!(matches!(held, DiskError::Held { .. }), "{held}");
        // Whoever has a descriptor of it left can still write.
        let clone = leader.clone();
        drop(leader);
        heir.take_from("m", identity(1), &claim, SOON).unwrap_err();
        drop(clone);
        heir.take_from("m", identity(1), &claim, SOON).unwrap();
        let mut found = [0; 512];
        heir.read(&mut found, 512).unwrap();
        assert_eq!(found, [7; 512]);
        drop(heir);
        // Neither side has it any more, and no guest ran on it: it is good for whoever the record names.
        for found in [record(1, 1, State::Live), claim, record(2, 2, State::Live)] {
            let image = open(&path, true);
            image.judge("m", Some(&found)).unwrap();
        }
        let other = record(3, 3, State::Live);
        open(&path, true).judge("m", Some(&other)).unwrap_err();
    }

    #[test]
    fn what_is_not_the_primarys_image_is_not_taken() {
        let (_directory, path) = image();
        let leader = open(&path, true);
        leader
            .will_lead("m", &record(1, 1, State::Live), None)
            .unwrap();
        let heir = open(&path, false);
        heir.is_had_by("m", identity(1)).unwrap();
        // Another file under its name.
        std::fs::rename(&path, path.with_extension("old")).unwrap();
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let error = heir.is_had_by("m", identity(1)).unwrap_err();
        assert!(matches!(error, DiskError::Another { .. }), "{error}");
        // Somebody else's since.
        drop(leader);
        let claim = record(2, 2, State::Claimed);
        let error = heir.take_from("m", identity(9), &claim, SOON).unwrap_err();
        assert!(matches!(error, DiskError::Another { .. }), "{error}");
    }
}
