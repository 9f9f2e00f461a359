//! Machines' disks at a site: what one is made of, which host has which image of it, and where its machine may start. Functions of the records
//! and of nothing else.
//!
//! ```text
//!  never ran:   a host ──makes──▶ an image without a mark ──its primary──▶ one that is marked
//!  a backup:    its host ──makes──▶ an image that is marked as one that follows ──the machine's copy──▶ one that is whole
//!  ran before:  only where an image fits the arbiter's record (backends/disk/mark.rs)
//! ```
//! **An image without a mark is good only for a machine that never ran.** Nothing else tells it from one that was made and not filled, so whoever
//! wants to go on with such a one, or with a stale one, has to say so.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::placement::Unfit;
use super::record::{Host, Site, Vm};
use crate::backends::disk::mark::{Mark, Use, WhyNot};
use crate::control::is_name;
use crate::disk::SECTOR;
use crate::protocol::{Identity, Record};

/// Behind an image's name.
const ENDING: &str = ".img";

/// How a disk is said.
const WORDS: &str = "SIZE|FILE[,replicated][,read-only]";

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSpec {
    /// So many bytes, of which each is 0 at first. Each host that has a role of the machine has an image of it.
    Empty {
        /// How many.
        bytes: u64,
    },
    /// The same, with what this file holds when the machine is started for the first time.
    CopyOf {
        /// The file.
        file: PathBuf,
    },
    /// This file itself, on every host; the guest cannot write it.
    ReadOnly {
        /// The file.
        file: PathBuf,
    },
}

impl DiskSpec {
    /// Whether hosts have images that are made for it.
    #[must_use]
    pub fn has_images(&self) -> bool {
        !matches!(self, Self::ReadOnly { .. })
    }

    /// The file that it names.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Empty { .. } => None,
            Self::CopyOf { file } | Self::ReadOnly { file } => Some(file),
        }
    }

    /// Whether it can be one.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Empty { bytes } if *bytes == 0 || !bytes.is_multiple_of(SECTOR) => Err(format!(
                "a disk of {bytes} bytes: it has whole sectors of {SECTOR} bytes, one or more"
            )),
            // It goes into an option that has words behind commas.
            _ if self
                .file()
                .is_some_and(|file| file.to_string_lossy().contains(',')) =>
            {
                Err("the name of a disk's file has a comma".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Bytes as people say them: `512M`, `10G`.
fn size(text: &str) -> Option<u64> {
    let shift = match text.as_bytes().last()? {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => 0,
    };
    let digits = text.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(text);
    // A sign is none of ours.
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    let count: u64 = digits.parse().ok().filter(|_| plain)?;
    count.checked_mul(1 << shift)
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        let mut read_only = false;
        for word in words {
            match word {
                "replicated" => {}
                "read-only" => read_only = true,
                "shared" | "reservations" => {
                    return Err(format!(
                        "{word}: a machine of a site has an image of its own on each of its hosts. One disk for both sides needs what keeps a lost \
                         host off it, which agents do not have: such a pair is started by hand (docs/disks.md)"
                    ));
                }
                other => return Err(format!("{other:?} is no word for a disk: write {WORDS}")),
            }
        }
        let file = || PathBuf::from(first);
        let disk = match size(first) {
            _ if first.starts_with('/') && read_only => Self::ReadOnly { file: file() },
            _ if first.starts_with('/') => Self::CopyOf { file: file() },
            Some(_) if read_only => {
                return Err(
                    "an empty disk that nobody writes holds nothing: name a file".to_owned(),
                );
            }
            Some(bytes) => Self::Empty { bytes },
            None => {
                return Err(format!(
                    "{first:?} is neither a size, such as 10G or 512M, nor the absolute path of a file: write {WORDS}"
                ));
            }
        };
        disk.check().map(|()| disk)
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty { bytes } => write!(f, "{}, empty at first", Bytes(*bytes)),
            Self::CopyOf { file } => write!(f, "a copy of {} at first", file.display()),
            Self::ReadOnly { file } => write!(f, "{}, read-only", file.display()),
        }
    }
}

/// A size for people.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units.into_iter().find(|(shift, _)| self.0 >> shift > 0);
        match unit {
            Some((shift, name)) => {
                write!(f, "{:.1} {name}", self.0 as f64 / (1_u64 << shift) as f64)
            }
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// What is known of the disk of a machine whose hosts have images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLife {
    /// The reign of the arbiter's record when the machine was created, 0 without one: as long as it is that, the machine never ran.
    pub born: u64,
    /// Hosts that were given a role of it: no other has an image.
    pub hosts: BTreeSet<String>,
    /// The host with whose image it is to start, whatever that is worth: somebody said so.
    pub of: Option<String>,
}

/// A machine that was deleted, and hosts that may still have images of its disk. It goes with the last of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// Its name.
    pub machine: String,
    /// Which machine of that name.
    pub instance: String,
    /// The hosts.
    pub hosts: BTreeSet<String>,
}

/// An image, as its host tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReport {
    /// The machine's name.
    pub machine: String,
    /// Which machine of that name.
    pub instance: String,
    /// Its size.
    pub bytes: u64,
    /// The text of its mark, which has a version of its own; none without one, and an empty one if it cannot be read.
    pub mark: Option<String>,
}

impl ImageReport {
    /// Whether it is this machine's.
    #[must_use]
    pub fn is_of(&self, vm: &Vm) -> bool {
        self.machine == vm.name && self.instance == vm.instance
    }

    /// Whether no guest has ever run on it.
    #[must_use]
    pub fn is_unused(&self, record: Option<&Record>) -> bool {
        let Some(text) = &self.mark else { return true };
        let mark = Mark::parse(text).ok();
        mark.is_some_and(|mark| mark.judge(&self.machine, record) == Ok(None))
    }

    /// Why a machine that has run cannot go on with it, the arbiter's record being `record`; none if it can.
    #[must_use]
    pub fn fault(&self, record: Option<&Record>) -> Option<String> {
        let Some(text) = &self.mark else {
            return Some("it has no mark, so that nobody knows of when it is".to_owned());
        };
        let mark = match Mark::parse(text) {
            Ok(mark) => mark,
            Err(error) => return Some(error.to_string()),
        };
        match mark.judge(&self.machine, record) {
            Ok(Some(_)) => None,
            Ok(None) => Some("no guest has run on it".to_owned()),
            Err(WhyNot::Stale { epoch, .. }) if mark.in_use == Use::Follows => Some(format!(
                "it followed another one, with which the machine last lived in reign {epoch}"
            )),
            Err(WhyNot::Stale { stamp, epoch }) => Some(format!(
                "it is stale: of reign {}, and the machine last lived in reign {epoch} with another one",
                stamp.epoch
            )),
            Err(other) => Some(other.to_string()),
        }
    }
}

/// The name of an image's file in a host's directory; none for names that are none. No such name leaves that directory.
#[must_use]
pub fn file_name(machine: &str, instance: &str) -> Option<String> {
    let sound = is_name(machine) && Identity::parse(instance).is_some();
    sound.then(|| format!("{machine}.{instance}{ENDING}"))
}

/// Machine and instance of such a name.
#[must_use]
pub fn named(file: &str) -> Option<(&str, &str)> {
    let (machine, instance) = file.strip_suffix(ENDING)?.split_once('.')?;
    file_name(machine, instance).map(|_| (machine, instance))
}

/// Hosts that have an image of this machine's disk, and the image.
pub fn images<'a>(site: &'a Site, vm: &'a Vm) -> impl Iterator<Item = (&'a Host, &'a ImageReport)> {
    site.hosts.values().flat_map(move |host| {
        let all = host.value.images.iter().flatten();
        all.filter(move |image| image.is_of(vm))
            .map(move |image| (&host.value, image))
    })
}

/// Whether a machine has never run: the arbiter's record is as it was when it was created, and no image tells otherwise.
#[must_use]
pub fn is_new(site: &Site, vm: &Vm, life: &DiskLife) -> bool {
    let record = site.records.get(&vm.name);
    let epoch = record.map_or(0, |found| found.epoch.0);
    epoch == life.born && images(site, vm).all(|(_, image)| image.is_unused(record))
}

/// Why a host cannot have a role of this machine for its disk's sake; none if it can. A backup's image is made a copy, whatever it is.
#[must_use]
pub fn unfit(site: &Site, vm: &Vm, host: &Host, leads: bool) -> Option<Unfit> {
    vm.spec.disk.as_ref()?;
    let Some(images) = &host.images else {
        return Some(Unfit::NoDisks);
    };
    let life = vm.disk.as_ref().filter(|_| leads)?;
    let own = images.iter().find(|image| image.is_of(vm));
    match (&life.of, own) {
        (Some(of), _) if *of != host.name => Some(Unfit::NotChosen(of.clone())),
        (Some(_), own) => own.is_none().then_some(Unfit::NoImage),
        (None, _) if is_new(site, vm, life) => None,
        (None, None) => Some(Unfit::NoImage),
        (None, Some(own)) => own.fault(site.records.get(&vm.name)).map(Unfit::Image),
    }
}

/// What to do if no host can start a machine for its disk's sake; empty if that is not the reason.
#[must_use]
pub fn advice(site: &Site, vm: &Vm, unfit: &[(String, Unfit)]) -> String {
    let of_disk = |why: &Unfit| matches!(why, Unfit::NoImage | Unfit::Image(_));
    let Some(life) = vm.disk.as_ref().filter(|life| life.of.is_none()) else {
        return String::new();
    };
    if !unfit.iter().any(|(_, why)| of_disk(why)) {
        return String::new();
    }
    let away = life
        .hosts
        .iter()
        .filter(|host| !site.hosts.contains_key(*host));
    let away: Vec<&str> = away.map(String::as_str).collect();
    let wait = match &*away {
        [] => String::new(),
        away => format!(
            " The newest image may be on {}, whose agent is away: the machine starts when that is back.",
            away.join(" or ")
        ),
    };
    format!(
        ".{wait} If the newest image is lost, doppel vm start {} --disk-of HOST goes on with that host's; what was written since is gone then",
        vm.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::record::Kept;
    use crate::agent::tests::{put, site, vm};
    use crate::backends::disk::mark::Stamp;
    use crate::protocol::State;

    const INSTANCE: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn a_disk_is_a_size_or_a_file_and_words() {
        let disk = |text: &str| text.parse::<DiskSpec>();
        for (text, bytes) in [
            ("512", 512),
            ("4K", 4096),
            ("16M,replicated", 16 << 20),
            ("10G", 10 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(disk(text).unwrap(), DiskSpec::Empty { bytes }, "{text}");
        }
        let file = PathBuf::from("/a/b.img");
        assert_eq!(
            disk("/a/b.img").unwrap(),
            DiskSpec::CopyOf { file: file.clone() }
        );
        assert_eq!(
            disk("/a/b.img,read-only").unwrap(),
            DiskSpec::ReadOnly { file }
        );
        for (text, word) in [
            ("", "size"),
            ("b.img", "absolute path"),
            ("-1G", "absolute path"),
            ("+1G", "absolute path"),
            ("1GG", "absolute path"),
            ("99999999999999T", "absolute path"),
            ("0", "whole sectors"),
            ("513", "whole sectors"),
            ("1G,read-only", "holds nothing"),
            ("/a,fast", "fast"),
            ("/a,shared", "by hand"),
            ("/a,reservations", "by hand"),
        ] {
            let why = disk(text).unwrap_err();
            assert!(why.contains(word), "{text}: {why}");
        }
        let comma = DiskSpec::ReadOnly {
            file: "/a,b".into(),
        };
        assert!(comma.check().unwrap_err().contains("comma"));
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    }

    #[test]
    fn no_name_of_a_record_leaves_the_directory() {
        let name = file_name("db", INSTANCE).unwrap();
        assert_eq!(named(&name), Some(("db", INSTANCE)));
        for (machine, instance) in [
            ("../db", INSTANCE),
            ("a/b", INSTANCE),
            ("", INSTANCE),
            (".", INSTANCE),
            ("db", "../../etc/passwd"),
            ("db", ""),
            ("db", "0123456789ABCDEF0123456789ABCDEF"),
        ] {
            assert_eq!(file_name(machine, instance), None, "{machine} {instance}");
        }
        for file in ["db.img", "db.0.img", "agent.lock", "..img", ".img"] {
            assert_eq!(named(file), None, "{file}");
        }
        assert_eq!(named(&format!("db.{INSTANCE}.img.doppel")), None);
    }

    fn record(epoch: u64, state: State, owner: u8) -> Record {
        let mut record = Record::cold_start(None, Identity::from_bytes([owner; 16]), None);
        record.epoch.0 = epoch;
        record.configuration.0 = epoch;
        record.state = state;
        record
    }

    fn image(mark: Option<(Use, u64, u8)>) -> ImageReport {
        let mark = mark.map(|(in_use, epoch, owner)| {
            let stamp = Stamp {
                epoch,
                configuration: epoch,
                owner: Identity::from_bytes([owner; 16]),
            };
            let mark = Mark {
                machine: "db".into(),
                stamp,
                in_use,
                sure: true,
                before: None,
            };
            mark.text()
        });
        ImageReport {
            machine: "db".into(),
            instance: INSTANCE.into(),
            bytes: 512,
            mark,
        }
    }

    /// A machine with a disk that was born in this reign, and a site of three hosts.
    fn machine(born: u64) -> (Site, Vm) {
        let mut site = site(&["a", "b", "c"]);
        let mut db = vm("db");
        db.instance = INSTANCE.into();
        db.spec.disk = Some(DiskSpec::Empty { bytes: 512 });
        db.disk = Some(DiskLife {
            born,
            hosts: BTreeSet::from(["a".into(), "b".into()]),
            of: None,
        });
        put(&mut site, db.clone());
        (site, db)
    }

    fn has(site: &mut Site, host: &str, image: ImageReport) {
        let host = site.hosts.get_mut(host).unwrap();
        host.value.images.as_mut().unwrap().push(image);
    }

    fn leads(site: &Site, vm: &Vm, host: &str) -> Option<Unfit> {
        unfit(site, vm, &site.hosts[host].value, true)
    }

    #[test]
    fn a_machine_that_never_ran_starts_anywhere_and_one_that_ran_where_its_newest_image_is() {
        let (mut site, db) = machine(0);
        assert_eq!(leads(&site, &db, "a"), None);
        // Made, and its primary has not come to the arbiter.
        has(&mut site, "a", image(None));
        assert_eq!(leads(&site, &db, "a"), None);
        assert_eq!(leads(&site, &db, "c"), None);

        site.records.insert("db".into(), record(1, State::Live, 1));
        assert!(
            matches!(leads(&site, &db, "a"), Some(Unfit::Image(why)) if why.contains("no mark"))
        );
        assert_eq!(leads(&site, &db, "c"), Some(Unfit::NoImage));

        // a led, b took over and led.
        let (mut site, db) = machine(0);
        has(&mut site, "a", image(Some((Use::Leads, 1, 1))));
        has(&mut site, "b", image(Some((Use::Leads, 2, 2))));
        site.records.insert("db".into(), record(2, State::Live, 2));
        assert_eq!(leads(&site, &db, "b"), None);
        assert!(
            matches!(leads(&site, &db, "a"), Some(Unfit::Image(why)) if why.contains("stale: of reign 1"))
        );
        // A copy that was not known to be whole.
        has(&mut site, "c", image(Some((Use::Follows, 0, 3))));
        assert!(
            matches!(leads(&site, &db, "c"), Some(Unfit::Image(why)) if why.contains("followed"))
        );
        // Turned off: the one that followed to the end has everything, too.
        site.records.insert("db".into(), record(2, State::Ended, 2));
        has(&mut site, "c", image(Some((Use::Ended, 2, 4))));
        let c = site.hosts.get_mut("c").unwrap();
        c.value.images.as_mut().unwrap().remove(0);
        assert_eq!(leads(&site, &db, "b"), None);
        assert_eq!(leads(&site, &db, "c"), None);
        assert!(leads(&site, &db, "a").is_some());
    }

    /// The swap of its first start was not answered.
    #[test]
    fn a_machine_whose_first_start_is_uncertain_needs_nobody_to_say_which_image() {
        let (mut site, db) = machine(0);
        let begun = Mark {
            machine: "db".into(),
            stamp: Stamp::of(&record(1, State::Live, 1)),
            in_use: Use::Leads,
            sure: false,
            before: None,
        };
        let mark = Some(begun.text());
        has(
            &mut site,
            "a",
            ImageReport {
                mark,
                ..image(None)
            },
        );
        // It did not land: the machine never ran.
        for host in ["a", "c"] {
            assert_eq!(leads(&site, &db, host), None, "{host}");
        }
        // It did: there is one image that may hold anything.
        site.records.insert("db".into(), record(1, State::Live, 1));
        assert_eq!(leads(&site, &db, "a"), None);
        assert_eq!(leads(&site, &db, "c"), Some(Unfit::NoImage));
        // It did not, and the machine had run elsewhere: it holds nothing of that.
        site.records.insert("db".into(), record(2, State::Ended, 7));
        let late = Mark {
            stamp: Stamp::of(&record(3, State::Live, 1)),
            ..begun
        };
        let a = site.hosts.get_mut("a").unwrap();
        a.value.images.as_mut().unwrap()[0].mark = Some(late.text());
        assert!(
            matches!(leads(&site, &db, "a"), Some(Unfit::Image(why)) if why.contains("no guest"))
        );
    }

    #[test]
    fn a_record_that_is_lost_makes_no_machine_new() {
        let (mut site, db) = machine(0);
        has(&mut site, "a", image(Some((Use::Leads, 4, 1))));
        let life = db.disk.as_ref().unwrap();
        assert!(!is_new(&site, &db, life));
        assert!(leads(&site, &db, "a").is_some());
        assert_eq!(leads(&site, &db, "c"), Some(Unfit::NoImage));
        // One whose name had an earlier life is as new as any.
        let (mut site, db) = machine(7);
        site.records.insert("db".into(), record(7, State::Ended, 9));
        assert_eq!(leads(&site, &db, "c"), None);
        // That one's images are not this one's.
        let mut earlier = image(Some((Use::Leads, 7, 9)));
        earlier.instance = INSTANCE.replace('0', "f");
        has(&mut site, "c", earlier);
        assert_eq!(leads(&site, &db, "c"), None);
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let (mut site, mut db) = machine(0);
        site.hosts.remove("b");
        site.records.insert("db".into(), record(2, State::Ended, 2));
        has(&mut site, "a", image(Some((Use::Leads, 1, 1))));
        let why =
            super::super::placement::choose(&site, &db, super::super::placement::Role::Primary, 0);
        let unfit = why.unwrap_err();
        let told = advice(&site, &db, &unfit);
        assert!(told.contains("may be on b, whose agent is away"), "{told}");
        assert!(told.contains("vm start db --disk-of HOST"), "{told}");
        // An operator's word decides.
        db.disk.as_mut().unwrap().of = Some("a".into());
        assert_eq!(leads(&site, &db, "a"), None);
        assert_eq!(leads(&site, &db, "c"), Some(Unfit::NotChosen("a".into())));
        assert_eq!(advice(&site, &db, &unfit), "");
    }

    #[test]
    fn an_agent_that_knows_no_disks_gets_none() {
        let (mut site, db) = machine(0);
        let mut old = site.hosts["c"].value.clone();
        old.images = None;
        site.hosts.insert(
            "c".into(),
            Kept {
                value: old,
                revision: 1,
            },
        );
        let c = &site.hosts["c"].value;
        assert_eq!(unfit(&site, &db, c, false), Some(Unfit::NoDisks));
        assert_eq!(unfit(&site, &db, &site.hosts["b"].value, false), None);
        assert_eq!(unfit(&site, &vm("kv"), c, true), None);
        // A file on every host is one all the same, and any of them can have it.
        let mut tools = vm("tools");
        let file = "/tools".into();
        tools.spec.disk = Some(DiskSpec::ReadOnly { file });
        assert_eq!(unfit(&site, &tools, c, true), Some(Unfit::NoDisks));
        assert_eq!(unfit(&site, &tools, &site.hosts["a"].value, true), None);
    }

    #[test]
    fn a_damaged_mark_is_no_good_one() {
        let mut bad = image(None);
        bad.mark = Some(String::new());
        assert!(bad.fault(Some(&record(1, State::Live, 1))).is_some());
    }
}
