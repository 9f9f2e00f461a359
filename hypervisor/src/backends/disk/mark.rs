//! What an image carries besides the disk's bytes: whose it is, and of which reign.
//!
//! ```text
//!  two places of 4096 bytes, written in turn: behind a block device's last sector, or in FILE.doppel beside a file
//!  magic "DOPLMARK" (8) | length of the text (4) | CRC-32C of number and text (4) | number (8) | text (JSON)
//! ```
//! The place with the higher number counts; one that was torn does not check out, and the other still does.
//!
//! **Which image is the newer one** is decided by the arbiter's record and the process that it names. A process draws its identity
//! once and opens an image once, so an image that carries the identity of the record's owner has all that this machine ever
//! acknowledged. A mark is written *before* the swap that makes it true, with the one that was true before beside it: between
//! the two no guest runs on the image, so it is good for either.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::protocol::{Identity, Record, State};

/// Bytes of a place.
const PLACE: usize = 4096;
/// Bytes of both places.
pub const MARK_BYTES: u64 = 2 * PLACE as u64;

const MAGIC: [u8; 8] = *b"DOPLMARK";
const HEADER: usize = 24;
/// Grows with every change of the fields.
const VERSION: u32 = 1;
/// Bytes of a machine's name.
const NAME_MAX: usize = 63;

/// A process that had the image, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The reign; 0 if it is not known yet.
    pub epoch: u64,
    /// The pair's configuration.
    pub configuration: u64,
    /// The process.
    pub owner: Identity,
}

impl Stamp {
    /// That of a record's owner.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        Self::in_reign(record, record.owner)
    }

    /// That of another process in the same reign.
    #[must_use]
    pub fn in_reign(record: &Record, owner: Identity) -> Self {
        Self {
            epoch: record.epoch.0,
            configuration: record.configuration.0,
            owner,
        }
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "reign {}, configuration {}",
            self.epoch, self.configuration
        )
    }
}

/// What the process does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// It serves the machine, or is about to.
    Leads,
    /// It does to it what its primary does to its own.
    Follows,
    /// The machine was powered off, and the image has everything.
    Ended,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The machine's name.
    pub machine: String,
    /// Who has it.
    pub stamp: Stamp,
    /// What for.
    pub in_use: Use,
    /// The arbiter's record is known to have said so.
    pub sure: bool,
    /// Who had it before, as long as the image is as that one left it.
    pub before: Option<Stamp>,
}

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    machine: String,
    epoch: u64,
    configuration: u64,
    owner: String,
    #[serde(rename = "use")]
    in_use: Use,
    sure: bool,
    before: Option<(u64, u64, String)>,
}

impl Mark {
    /// Whether a machine may be started on an image with this mark, the arbiter's record of it being `found`; with the stamp that
    /// makes it good, or none if it is as good as one without a mark.
    ///
    /// # Errors
    /// Why not.
    pub fn judge(&self, machine: &str, found: Option<&Record>) -> Result<Option<Stamp>, WhyNot> {
        if self.machine != machine {
            return Err(WhyNot::Foreign {
                machine: self.machine.clone(),
            });
        }
        // It was new, and marked for a swap that has not come about: no guest has run on it, nor anywhere in that reign or a later one.
        let reign = found.map_or(0, |found| found.epoch.0);
        let untried = !self.sure && self.before.is_none() && self.in_use == Use::Leads;
        if untried && reign < self.stamp.epoch {
            return Ok(None);
        }
        let Some(found) = found else {
            return Err(WhyNot::Unknown { stamp: self.stamp });
        };
        let stale = WhyNot::Stale {
            stamp: self.stamp,
            epoch: found.epoch.0,
        };
        let stamps = [Some(self.stamp), self.before];
        let mut stamps = stamps.into_iter().flatten();
        // The record names one that follows before its image is complete.
        let led = |stamp: &Stamp| self.in_use != Use::Follows && stamp.owner == found.owner;
        let good = match found.state {
            // A copy that followed to the end has everything, too.
            State::Ended
                if self.in_use == Use::Ended
                    && (self.stamp.epoch, self.stamp.configuration)
                        == (found.epoch.0, found.configuration.0) =>
            {
                Ok(self.stamp)
            }
            State::Live | State::Ended => stamps.find(led).ok_or(stale),
            // Nothing was served in this reign: the image of the one before is as good, if it is known to have led.
            State::Claimed | State::Abandoned => {
                let before = self.in_use == Use::Leads
                    && self.sure
                    && self.stamp.epoch.checked_add(1) == Some(found.epoch.0);
                let own = stamps.find(led);
                own.or(before.then_some(self.stamp)).ok_or(stale)
            }
        };
        good.map(Some)
    }

    /// As text, with its version: what a place has, and what others are told of it.
    #[must_use]
    pub fn text(&self) -> String {
        let stamp = |stamp: Stamp| (stamp.epoch, stamp.configuration, stamp.owner.to_string());
        let (epoch, configuration, owner) = stamp(self.stamp);
        let written = Written {
            version: VERSION,
            machine: self.machine.clone(),
            epoch,
            configuration,
            owner,
            in_use: self.in_use,
            sure: self.sure,
            before: self.before.map(stamp),
        };
        serde_json::to_string(&written).expect("plain fields always encode")
    }

    /// Reads what [`Mark::text`] writes.
    ///
    /// # Errors
    /// [`BadMark::Version`], [`BadMark::Malformed`].
    pub fn parse(text: &str) -> Result<Self, BadMark> {
        let malformed = |why: String| BadMark::Malformed { why };
        let written: Written =
            serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        if written.version != VERSION {
            return Err(BadMark::Version {
                found: written.version,
            });
        }
        if written.machine.len() > NAME_MAX {
            return Err(malformed("no machine has so long a name".to_owned()));
        }
        let stamp = |(epoch, configuration, owner): (u64, u64, String)| {
            let owner = Identity::parse(&owner)
                .ok_or_else(|| malformed(format!("{owner:?} is no identity")))?;
            Ok::<_, BadMark>(Stamp {
                epoch,
                configuration,
                owner,
            })
        };
        Ok(Self {
            machine: written.machine,
            stamp: stamp((written.epoch, written.configuration, written.owner))?,
            in_use: written.in_use,
            sure: written.sure,
            before: written.before.map(stamp).transpose()?,
        })
    }

    fn encode(&self, number: u64) -> Vec<u8> {
        let text = self.text();
        let mut place = vec![0; PLACE];
        // A machine's name has so few bytes that a text has a few hundred.
        place[HEADER..HEADER + text.len()].copy_from_slice(text.as_bytes());
        place[16..24].copy_from_slice(&number.to_le_bytes());
        let checksum = rdma_log::crc32c(&place[16..HEADER + text.len()]);
        place[..8].copy_from_slice(&MAGIC);
        place[8..12].copy_from_slice(&(text.len() as u32).to_le_bytes());
        place[12..16].copy_from_slice(&checksum.to_le_bytes());
        place
    }

    /// What a place says; nothing if it was never written, or torn.
    fn decode(place: &[u8]) -> Result<Option<(u64, Self)>, BadMark> {
        let word = |at: usize| {
            let bytes = place.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let text = word(8).and_then(|length| {
            let end = HEADER.checked_add(length as usize)?;
            let sound = place.starts_with(&MAGIC)
                && word(12) == Some(rdma_log::crc32c(place.get(16..end)?));
            sound.then(|| &place[HEADER..end])
        });
        let Some(text) = text else { return Ok(None) };
        let number = u64::from_le_bytes(place[16..24].try_into().expect("eight bytes"));
        let malformed = |why: String| BadMark::Malformed { why };
        let text = std::str::from_utf8(text).map_err(|error| malformed(error.to_string()))?;
        if number == u64::MAX {
            return Err(malformed("none was written so often".to_owned()));
        }
        Ok(Some((number, Self::parse(text)?)))
    }
}

/// Why a machine is not started on an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    /// Another machine's.
    #[error("it belongs to the machine {machine:?}")]
    Foreign {
        /// Its name.
        machine: String,
    },
    /// The arbiter knows nothing of this machine.
    #[error(
        "it is of {stamp} of this machine, of which the arbiter has no record: give this role the arbiter that the machine had"
    )]
    Unknown {
        /// The image's.
        stamp: Stamp,
    },
    /// The machine has lived on elsewhere since.
    #[error(
        "it is stale: it is of {stamp}, and the machine has since lived on another image, last in reign {epoch}: start it where that one is, and copy that one here"
    )]
    Stale {
        /// The image's.
        stamp: Stamp,
        /// The machine's last reign.
        epoch: u64,
    },
}

/// Why a mark cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadMark {
    /// Another version.
    #[error(
        "a mark of version {found}, this program writes {VERSION}: use the same version of doppel"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// It checks out and makes no sense.
    #[error("no mark: {why}")]
    Malformed {
        /// What is wrong.
        why: String,
    },
    /// Neither place checks out, and they are not empty.
    #[error("both places of its mark are damaged")]
    Damaged,
    /// The file.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// Where an image's mark is.
#[derive(Debug)]
pub struct Marks {
    file: File,
    at: u64,
    number: u64,
}

impl Marks {
    /// Those at this offset of a file, and what is there.
    ///
    /// # Errors
    /// See [`BadMark`].
    pub fn open(file: File, at: u64) -> Result<(Self, Option<Mark>), BadMark> {
        let mut places = vec![0; 2 * PLACE];
        let mut have = 0;
        while have < places.len() {
            match file.read_at(&mut places[have..], at + have as u64)? {
                0 => break,
                read => have += read,
            }
        }
        let mut newest: Option<(u64, Mark)> = None;
        for place in places.chunks(PLACE) {
            if let Some((number, mark)) = Mark::decode(place)?
                && newest.as_ref().is_none_or(|(best, _)| number > *best)
            {
                newest = Some((number, mark));
            }
        }
        // The first one ever may have been torn, and then there was none before.
        let virgin = places[PLACE..].iter().all(|&byte| byte == 0);
        if newest.is_none() && !virgin {
            return Err(BadMark::Damaged);
        }
        let (number, mark) = newest.map_or((0, None), |(number, mark)| (number, Some(mark)));
        Ok((Self { file, at, number }, mark))
    }

    /// Reads again what is there, which another process may have written meanwhile, and goes on from it.
    ///
    /// # Errors
    /// See [`BadMark`].
    pub fn reread(&mut self) -> Result<Option<Mark>, BadMark> {
        let (marks, mark) = Self::open(self.file.try_clone()?, self.at)?;
        *self = marks;
        Ok(mark)
    }

    /// The file that they are in.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes a mark, and returns when it survives the loss of power.
    ///
    /// # Errors
    /// The file's. The mark before still counts, unless the new one got there after all.
    pub fn write(&mut self, mark: &Mark) -> io::Result<()> {
        let number = self.number + 1;
        // The first goes to the first place: a second place without a first is one that was damaged.
        let place = (number - 1) % 2 * PLACE as u64;
        self.file
            .write_all_at(&mark.encode(number), self.at + place)?;
        self.number = number;
        self.file.sync_data()
    }

    /// Takes every mark away: the image is as it was before it had any.
    ///
    /// # Errors
    /// The file's.
    pub fn clear(&mut self) -> io::Result<()> {
        self.file.write_all_at(&[0; 2 * PLACE], self.at)?;
        self.number = 0;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Configuration, Epoch};

    fn identity(n: u8) -> Identity {
        Identity::from_bytes([n; 16])
    }

    fn record(epoch: u64, state: State, owner: u8) -> Record {
        Record {
            epoch: Epoch(epoch),
            configuration: Configuration(epoch + 4),
            state,
            owner: identity(owner),
            entitled: None,
        }
    }

    fn stamp(epoch: u64, owner: u8) -> Stamp {
        Stamp {
            epoch,
            configuration: epoch + 4,
            owner: identity(owner),
        }
    }

    fn mark(in_use: Use, stamp: Stamp, before: Option<Stamp>) -> Mark {
        Mark {
            machine: "m".into(),
            stamp,
            in_use,
            sure: before.is_none(),
            before,
        }
    }

    #[test]
    fn the_owners_image_is_the_one() {
        use State::{Abandoned, Claimed, Ended, Live};
        let judge = |mark: &Mark, record: Record| mark.judge("m", Some(&record)).ok().flatten();
        let led = mark(Use::Leads, stamp(3, 1), None);
        assert_eq!(judge(&led, record(3, Live, 1)), Some(stamp(3, 1)));
        // Reclaimed by the same process before it was marked again.
        assert_eq!(judge(&led, record(5, Live, 1)), Some(stamp(3, 1)));
        assert_eq!(judge(&led, record(3, Ended, 1)), Some(stamp(3, 1)));
        // Taken over by another: live there, or not yet.
        assert_eq!(judge(&led, record(4, Live, 2)), None);
        assert_eq!(judge(&led, record(4, Ended, 2)), None);
        for state in [Claimed, Abandoned] {
            assert_eq!(judge(&led, record(4, state, 2)), Some(stamp(3, 1)));
            assert_eq!(judge(&led, record(5, state, 2)), None);
        }
        // One that only followed has not all that was acknowledged.
        let followed = mark(Use::Follows, stamp(3, 2), None);
        for state in [Live, Ended] {
            assert_eq!(judge(&followed, record(3, state, 1)), None);
        }
        assert_eq!(judge(&followed, record(4, Claimed, 3)), None);
        // Nor has one that died as it took over, before it said that it has.
        assert_eq!(judge(&followed, record(4, Claimed, 2)), None);
        // Marked before the swap: good if that came about, and by the one before if it did not.
        let claiming = mark(Use::Leads, stamp(4, 2), Some(stamp(3, 5)));
        assert_eq!(judge(&claiming, record(4, Live, 2)), Some(stamp(4, 2)));
        assert_eq!(judge(&claiming, record(4, Claimed, 2)), Some(stamp(4, 2)));
        assert_eq!(judge(&claiming, record(3, Live, 5)), Some(stamp(3, 5)));
        assert_eq!(judge(&claiming, record(4, Live, 1)), None);
        // A mark whose claim may have been lost is no proof that it led.
        assert_eq!(judge(&claiming, record(5, Claimed, 7)), None);
        // Followed to the end of this configuration, and of no other.
        let ended = mark(Use::Ended, stamp(3, 2), None);
        assert_eq!(judge(&ended, record(3, Ended, 1)), Some(stamp(3, 2)));
        assert_eq!(judge(&ended, record(4, Ended, 1)), None);
        assert_eq!(judge(&ended, record(3, Live, 1)), None);
    }

    /// A first start whose swap was not answered, or that died before it: the mark stays, and the record tells what it is worth.
    #[test]
    fn one_that_was_new_is_new_until_its_swap_has_come_about() {
        let begun = Mark {
            sure: false,
            ..mark(Use::Leads, stamp(3, 1), None)
        };
        let judge = |found: Option<Record>| begun.judge("m", found.as_ref());
        assert_eq!(judge(None), Ok(None));
        assert_eq!(judge(Some(record(2, State::Ended, 9))), Ok(None));
        let landed = judge(Some(record(3, State::Live, 1)));
        assert_eq!(landed, Ok(Some(stamp(3, 1))));
        // Somebody else's swap was first, and the machine lived on its image.
        for state in [State::Live, State::Ended] {
            judge(Some(record(3, state, 9))).unwrap_err();
            judge(Some(record(4, state, 9))).unwrap_err();
        }
        // One that was not new, and one on which a guest may have run.
        for other in [
            mark(Use::Leads, stamp(3, 1), Some(stamp(1, 1))),
            mark(Use::Leads, stamp(3, 1), None),
            mark(Use::Follows, stamp(3, 1), None),
        ] {
            other.judge("m", None).unwrap_err();
            let before = record(2, State::Ended, 9);
            other.judge("m", Some(&before)).unwrap_err();
        }
    }

    #[test]
    fn another_machines_image_and_an_unknown_one_are_refused() {
        let mark = mark(Use::Leads, stamp(3, 1), None);
        let found = record(3, State::Live, 1);
        let foreign = mark.judge("other", Some(&found)).unwrap_err();
        assert!(matches!(foreign, WhyNot::Foreign { .. }));
        let unknown = mark.judge("m", None).unwrap_err();
        assert!(matches!(unknown, WhyNot::Unknown { .. }));
    }

    #[test]
    fn the_last_whole_mark_counts() {
        let file = tempfile::tempfile().unwrap();
        let open = || Marks::open(file.try_clone().unwrap(), 512);
        let (mut marks, found) = open().unwrap();
        assert_eq!(found, None);
        for n in 1..6 {
            let written = mark(Use::Leads, stamp(n, 1), Some(stamp(n - 1, 9)));
            marks.write(&written).unwrap();
            let (again, found) = open().unwrap();
            assert_eq!(found.as_ref(), Some(&written));
            assert_eq!(again.number, n);
        }
        // The sixth is torn anywhere.
        let next = mark(Use::Follows, stamp(6, 2), None).encode(6);
        let end = HEADER + u32::from_le_bytes(next[8..12].try_into().unwrap()) as usize;
        for cut in 0..end {
            file.write_all_at(&next[..cut], 512 + 4096).unwrap();
            let (_, found) = open().unwrap();
            assert_eq!(found.unwrap().stamp, stamp(5, 1), "{cut}");
        }
        file.write_all_at(&next[..end], 512 + 4096).unwrap();
        assert_eq!(open().unwrap().1.unwrap().stamp, stamp(6, 2));
        file.write_all_at(&[0xff; 8192], 512).unwrap();
        assert!(matches!(open().unwrap_err(), BadMark::Damaged));
        marks.clear().unwrap();
        assert_eq!(open().unwrap().1, None);
    }

    #[test]
    fn a_first_mark_that_was_torn_is_none() {
        let file = tempfile::tempfile().unwrap();
        let first = mark(Use::Leads, stamp(1, 1), None).encode(1);
        for cut in 0..100 {
            file.write_all_at(&first[..cut], 0).unwrap();
            assert_eq!(Marks::open(file.try_clone().unwrap(), 0).unwrap().1, None);
        }
    }

    /// Whoever wrote it: the next one is written behind it all the same.
    #[test]
    fn a_mark_that_nobody_writes_is_refused() {
        let last = Stamp {
            epoch: u64::MAX,
            ..stamp(1, 1)
        };
        let good = mark(Use::Leads, last, None);
        let claimed = record(0, State::Claimed, 2);
        assert!(good.judge("m", Some(&claimed)).is_err());
        let long = Mark {
            machine: "m".repeat(NAME_MAX + 1),
            ..good.clone()
        };
        for place in [good.encode(u64::MAX), long.encode(1)] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&place, 0).unwrap();
            let refused = Marks::open(file, 0).unwrap_err();
            assert!(matches!(refused, BadMark::Malformed { .. }), "{refused}");
        }
    }

    #[test]
    fn a_mark_of_another_version_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let mut place = mark(Use::Leads, stamp(1, 1), None).encode(1);
        let at = place
            .windows(11)
            .position(|w| w == b"\"version\":1")
            .unwrap();
        place[at + 10] = b'2';
        let end = HEADER + u32::from_le_bytes(place[8..12].try_into().unwrap()) as usize;
        let checksum = rdma_log::crc32c(&place[16..end]);
        place[12..16].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&place, 0).unwrap();
        let error = Marks::open(file.try_clone().unwrap(), 0).unwrap_err();
        assert!(matches!(error, BadMark::Version { found: 2 }));
    }
}
