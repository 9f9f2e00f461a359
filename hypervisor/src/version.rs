//! The version of what the two sides of a pair say to each other: the handshake, a machine's copy, heartbeats, and the entries of
//! the log. A program speaks a range of them, and a pair the newest that both sides speak. `docs/formats.md` has the rules.
#![forbid(unsafe_code)]

use std::fmt;

/// A version of the pair's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl Version {
    /// The oldest that this program speaks: the one that the release before spoke. It is the first whose greeting offers a range.
    pub const OLDEST: Self = Self(7);
    /// The newest. Since 8 a reset's entry says whose wish it was, and an interval's checkpoint can tell pages by what has changed in them.
    pub const NEWEST: Self = Self(8);

    /// Whether an entry of a reset says whose wish it was.
    #[must_use]
    pub fn resets_say_whose(self) -> bool {
        self >= Self(8)
    }

    /// Whether an interval's checkpoint can tell pages by what has changed in them.
    #[must_use]
    pub fn patches_pages(self) -> bool {
        self >= Self(8)
    }
}

impl Default for Version {
    /// What a log is written in that no other program is to follow.
    fn default() -> Self {
        Self::NEWEST
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The versions that a program speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    oldest: Version,
    newest: Version,
}

impl Versions {
    /// This program's.
    pub const OURS: Self = Self {
        oldest: Version::OLDEST,
        newest: Version::NEWEST,
    };

    /// From one to the other; none if they stand the wrong way round, or are more than a greeting can offer.
    #[must_use]
    pub fn new(oldest: Version, newest: Version) -> Option<Self> {
        let older = newest.0.checked_sub(oldest.0)?;
        (older <= u32::from(u8::MAX)).then_some(Self { oldest, newest })
    }

    /// The newest.
    #[must_use]
    pub fn newest(self) -> Version {
        self.newest
    }

    /// The oldest.
    #[must_use]
    pub fn oldest(self) -> Version {
        self.oldest
    }

    /// How many there are besides the newest, as a greeting says it.
    pub(crate) fn older(self) -> u8 {
        // `new` has seen to it.
        (self.newest.0 - self.oldest.0) as u8
    }

    /// What a pair of these two speaks.
    #[must_use]
    pub fn common(self, theirs: Self) -> Option<Version> {
        let newest = self.newest.min(theirs.newest);
        (newest >= self.oldest.max(theirs.oldest)).then_some(newest)
    }
}

impl Default for Versions {
    fn default() -> Self {
        Self::OURS
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.oldest == self.newest {
            write!(f, "version {}", self.newest)
        } else {
            write!(f, "versions {} to {}", self.oldest, self.newest)
        }
    }
}

/// What two sides agreed on, and out of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spoken {
    /// What the pair speaks.
    pub version: Version,
    /// What this side could.
    pub ours: Versions,
    /// What the other side could.
    pub theirs: Versions,
}

impl Spoken {
    /// What two sides speak, if there is anything.
    #[must_use]
    pub fn between(ours: Versions, theirs: Versions) -> Option<Self> {
        let version = ours.common(theirs)?;
        Some(Self {
            version,
            ours,
            theirs,
        })
    }

    /// For people, where one side is older: an upgrade is half done.
    #[must_use]
    pub fn uneven(&self) -> Option<String> {
        let Self {
            version,
            ours,
            theirs,
        } = self;
        let older = if theirs.newest < ours.newest {
            "the other side"
        } else if ours.newest < theirs.newest {
            "this side"
        } else {
            return None;
        };
        Some(format!(
            "the pair speaks version {version}: this side speaks {ours}, the other {theirs}; {older} is to be upgraded next"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(oldest: u32, newest: u32) -> Versions {
        Versions::new(Version(oldest), Version(newest)).unwrap()
    }

    #[test]
    fn a_pair_speaks_the_newest_that_both_do() {
        for (one, other, common) in [
            ((7, 8), (7, 8), Some(8)),
            ((7, 8), (7, 7), Some(7)),
            ((7, 8), (8, 9), Some(8)),
            ((7, 8), (6, 7), Some(7)),
            ((7, 8), (9, 10), None),
            ((7, 8), (6, 6), None),
            ((5, 9), (6, 7), Some(7)),
        ] {
            let (one, other) = (versions(one.0, one.1), versions(other.0, other.1));
            let common = common.map(Version);
            assert_eq!(one.common(other), common, "{one}, {other}");
            assert_eq!(other.common(one), common, "{other}, {one}");
        }
        assert_eq!(Versions::new(Version(8), Version(7)), None);
        assert_eq!(Versions::new(Version(0), Version(256)), None);
    }

    #[test]
    fn an_upgrade_that_is_half_done_is_told_on_both_sides() {
        let (old, new) = (versions(7, 7), versions(7, 8));
        let said = |ours, theirs| Spoken::between(ours, theirs).unwrap().uneven();
        assert_eq!(said(new, new), None);
        assert!(said(new, old).unwrap().contains("the other side is to be"));
        assert!(said(old, new).unwrap().contains("this side is to be"));
    }
}
