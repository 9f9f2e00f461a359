//! The arbiter's record: who lives, who may claim, and every lawful step from one record to the next.
//!
//! Two rules make compare-and-swap enough. **The owner of a record is the process that wrote it**, and owners are
//! random, so a record found to equal what one meant to write *is* one's own, even if the answer got lost.
//! And **no record ever comes back**: each step raises (epoch, configuration, state), so an attempt
//! that was delayed cannot succeed later.
//!
//! ```text
//!                   ┌─ detached, entitling ─┐
//!                   ▼                       │
//!  (none) ─cold start─▶ live ───────────────┘ claimed_by ─▶ claimed ── gone_live ──▶ live
//!                       │ ended                             │  │
//!                       ▼                            reclaimed └── abandoned ──▶ abandoned
//!                     ended                              ▼                          │ reclaimed
//!                                                      live ◀───────────────────────┘
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One reign: the number of claims won so far, 1 for the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The next reign.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 reigns"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which backup is entitled to claim; the number moves each time the entitled one changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Configuration(pub u64);

impl Configuration {
    /// The next configuration.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 configurations"))
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A process, named by 128 random bits that it drew when it started. Never a host name: a process that was
/// restarted is another one. `arbiter::random_identity` makes them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity([u8; 16]);

impl Identity {
    /// The identity with these bits.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bits.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Reads what [`fmt::Display`] writes: exactly 32 lower-case hexadecimal digits. `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let lower = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        if text.len() != 32 || !text.as_bytes().iter().all(lower) {
            return None;
        }
        Some(Self(u128::from_str_radix(text, 16).ok()?.to_be_bytes()))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What the owner of a record is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The owner won the claim and is taking over; its outputs are still held.
    Claimed,
    /// The owner serves the world.
    Live,
    /// The owner won the claim but could not go live; its predecessor may go on.
    Abandoned,
    /// The machine was powered off. Nobody can claim it.
    Ended,
}

impl State {
    /// The word for it in record files and messages.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Live => "live",
            Self::Abandoned => "abandoned",
            Self::Ended => "ended",
        }
    }

    /// The state of this word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Claimed, Self::Live, Self::Abandoned, Self::Ended]
            .into_iter()
            .find(|state| state.word() == word)
    }
}

/// A record by what it has alone of all that its machine ever has: as `3.4.live`, epoch, configuration and state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reign {
    epoch: Epoch,
    configuration: Configuration,
    state: State,
}

impl fmt::Display for Reign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (epoch, configuration, state) = (self.epoch, self.configuration, self.state.word());
        write!(f, "{epoch}.{configuration}.{state}")
    }
}

impl FromStr for Reign {
    type Err = String;

    /// Reads exactly what [`fmt::Display`] writes.
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let mut words = text.split('.');
            let reign = Self {
                epoch: Epoch(words.next()?.parse().ok()?),
                configuration: Configuration(words.next()?.parse().ok()?),
                state: State::parse(words.next()?)?,
            };
            (reign.to_string() == text).then_some(reign)
        };
        parsed().ok_or_else(|| {
            format!(
                "{text:?} is no reign: write EPOCH.CONFIGURATION.STATE of the arbiter's record, such as 3.4.live"
            )
        })
    }
}

impl TryFrom<String> for Reign {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Reign> for String {
    fn from(reign: Reign) -> Self {
        reign.to_string()
    }
}

/// What whoever starts a machine knows of it besides its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cold {
    /// Nothing: the record decides.
    #[default]
    No,
    /// No process of it runs any more, whatever the record says.
    Whatever,
    /// No process of it ran any more when the record was this one. If it is another by now, one did.
    From(Reign),
}

impl Cold {
    /// Whether the record is not left to decide alone.
    #[must_use]
    pub fn is_cold(self) -> bool {
        self != Self::No
    }
}

/// One machine's record at the arbiter. Compared and swapped as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// The reign.
    pub epoch: Epoch,
    /// Counts changes of `entitled`.
    pub configuration: Configuration,
    /// What the owner is doing.
    pub state: State,
    /// The process that wrote this record.
    pub owner: Identity,
    /// The backup that may claim, if there is one.
    pub entitled: Option<Identity>,
}

impl Record {
    /// The record of a machine that starts anew, after `found` (`None`: the machine never ran).
    ///
    /// It takes the reign from whoever has it, so for a `found` that is not `ended` an operator must have said
    /// that both sides are down.
    #[must_use]
    pub fn cold_start(found: Option<&Record>, owner: Identity, entitled: Option<Identity>) -> Self {
        let (epoch, configuration) =
            found.map_or_else(Default::default, |r| (r.epoch, r.configuration));
        Self {
            epoch: epoch.next(),
            configuration: configuration.next(),
            state: State::Live,
            owner,
            entitled,
        }
    }

    /// Whether a machine may start, its record being `found`: from nothing, from the end of an earlier reign, or because its
    /// operator says (`cold`) that no process of it runs any more.
    #[must_use]
    pub fn lets_start(found: Option<&Record>, cold: Cold) -> bool {
        match cold {
            Cold::No => found.is_none_or(|record| record.state == State::Ended),
            Cold::Whatever => true,
            // Whoever turned it off since was not the one who orders this.
            Cold::From(reign) => found.is_some_and(|record| record.reign() == reign),
        }
    }

    /// Which of its machine's records this is.
    #[must_use]
    pub fn reign(&self) -> Reign {
        Reign {
            epoch: self.epoch,
            configuration: self.configuration,
            state: self.state,
        }
    }

    /// What every step raises: of two records of a machine the later one has more.
    #[must_use]
    pub fn rank(&self) -> (Epoch, Configuration, State) {
        (self.epoch, self.configuration, self.state)
    }

    /// The first step of a take-over: the next reign, claimed by the entitled backup. `None` when `claimant` is
    /// not entitled or the record is not `live`.
    #[must_use]
    pub fn claimed_by(&self, claimant: Identity) -> Option<Self> {
        (self.state == State::Live && self.entitled == Some(claimant)).then(|| Self {
            epoch: self.epoch.next(),
            configuration: self.configuration.next(),
            state: State::Claimed,
            owner: claimant,
            entitled: None,
        })
    }

    /// The second step of a take-over: the claimant serves. Only for a `claimed` record.
    #[must_use]
    pub fn gone_live(&self) -> Self {
        debug_assert_eq!(self.state, State::Claimed);
        Self {
            state: State::Live,
            ..*self
        }
    }

    /// The claimant cannot go live. Only for a `claimed` record.
    #[must_use]
    pub fn abandoned(&self) -> Self {
        debug_assert_eq!(self.state, State::Claimed);
        Self {
            state: State::Abandoned,
            ..*self
        }
    }

    /// The primary lost its backup: nobody is entitled any more. Only for a `live` record.
    #[must_use]
    pub fn detached(&self) -> Self {
        debug_assert_eq!(self.state, State::Live);
        Self {
            configuration: self.configuration.next(),
            entitled: None,
            ..*self
        }
    }

    /// The primary has a backup again, or another one in place of the one that it had: its copy is complete, and it alone may claim. Only
    /// for a `live` record.
    #[must_use]
    pub fn entitling(&self, backup: Identity) -> Self {
        debug_assert!(self.state == State::Live && self.entitled != Some(backup));
        Self {
            configuration: self.configuration.next(),
            entitled: Some(backup),
            ..*self
        }
    }

    /// The machine was powered off. Only for a `live` record.
    #[must_use]
    pub fn ended(&self) -> Self {
        debug_assert_eq!(self.state, State::Live);
        Self {
            state: State::Ended,
            ..*self
        }
    }

    /// The backup that `self` entitles in place of `me`, which `before` entitled: the primary goes on in its reign, with another backup.
    #[must_use]
    pub fn relieves(&self, me: Identity, before: &Record) -> Option<Identity> {
        let later = self.configuration > before.configuration;
        let same =
            (self.owner, self.epoch, self.state) == (before.owner, before.epoch, State::Live);
        self.entitled.filter(|&other| same && later && other != me)
    }

    /// Whether `self` is the take-over of `own` by its entitled backup, not (or not yet) completed.
    ///
    /// Only then does the state kept by `own`'s owner still hold everything the world has seen: nobody has been
    /// live since. A claim of any later reign does not count.
    #[must_use]
    pub fn is_unfinished_claim_on(&self, own: &Record) -> bool {
        let claim = own.entitled.and_then(|backup| own.claimed_by(backup));
        claim.is_some_and(|claim| *self == claim || *self == claim.abandoned())
    }

    /// The loser of `self`, a claim that was abandoned or is too old, goes on in the next reign.
    #[must_use]
    pub fn reclaimed_by(&self, loser: Identity) -> Self {
        debug_assert!(matches!(self.state, State::Claimed | State::Abandoned));
        Self {
            epoch: self.epoch.next(),
            state: State::Live,
            owner: loser,
            entitled: None,
            ..*self
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (epoch, configuration, state) = (self.epoch, self.configuration, self.state.word());
        write!(
            f,
            "epoch {epoch}, configuration {configuration}, {state}, owner {}",
            self.owner
        )?;
        match self.entitled {
            Some(backup) => write!(f, ", entitled {backup}"),
            None => write!(f, ", nobody entitled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(n: u8) -> Identity {
        Identity::from_bytes([n; 16])
    }

    /// Whoever stalls between his last look and his start may find that the machine was started since: by somebody else, who serves.
    #[test]
    fn a_cold_start_from_a_reign_is_none_from_any_other() {
        let live = Record::cold_start(None, who(1), Some(who(2)));
        let from = Cold::From(live.reign());
        assert!(Record::lets_start(Some(&live), from));
        assert!(!Record::lets_start(Some(&live), Cold::No));
        let claimed = live.claimed_by(who(2)).unwrap();
        for later in [
            Record::cold_start(Some(&live), who(3), None),
            live.detached(),
            live.entitling(who(4)),
            live.ended(),
            claimed,
            claimed.gone_live(),
            claimed.abandoned(),
        ] {
            assert!(!Record::lets_start(Some(&later), from), "{later}");
            assert!(Record::lets_start(Some(&later), Cold::From(later.reign())));
            assert!(Record::lets_start(Some(&later), Cold::Whatever));
        }
        assert!(!Record::lets_start(None, from), "the record was lost");
    }

    #[test]
    fn a_reign_reads_as_it_is_written() {
        let reign = Record::cold_start(None, who(1), None).reign();
        assert_eq!(reign.to_string(), "1.1.live");
        assert_eq!("1.1.live".parse(), Ok(reign));
        for bad in [
            "",
            "1.1",
            "1.1.alive",
            "1.1.live.",
            "+1.1.live",
            "01.1.live",
            "1.1.live ",
        ] {
            assert!(bad.parse::<Reign>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn identities_parse_what_they_print_and_nothing_else() {
        let id = Identity::from_bytes([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xab, 0xcd, 0xef, 0, 0, 1]);
        assert_eq!(Identity::parse(&id.to_string()), Some(id));
        for bad in [
            "",
            "0",
            &"g".repeat(32),
            &"A".repeat(32),
            &"0".repeat(33),
            "+0000000000000000000000000000001",
        ] {
            assert_eq!(Identity::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn only_the_entitled_backup_of_a_live_record_may_claim() {
        let live = Record::cold_start(None, who(1), Some(who(2)));
        let claimed = live.claimed_by(who(2)).unwrap();
        assert_eq!(
            (claimed.epoch, claimed.state, claimed.owner),
            (Epoch(2), State::Claimed, who(2))
        );
        assert_eq!(
            (claimed.configuration, claimed.entitled),
            (Configuration(2), None)
        );
        assert_eq!(live.claimed_by(who(3)), None);
        assert_eq!(live.claimed_by(who(1)), None);
        assert_eq!(live.detached().claimed_by(who(2)), None);
        assert_eq!(live.entitling(who(3)).claimed_by(who(2)), None);
        assert_eq!(live.ended().claimed_by(who(2)), None);
        assert_eq!(claimed.claimed_by(who(2)), None);
    }

    #[test]
    fn only_the_direct_claim_may_be_reclaimed() {
        let own = Record::cold_start(None, who(1), Some(who(2)));
        let claim = own.claimed_by(who(2)).unwrap();
        assert!(claim.is_unfinished_claim_on(&own));
        assert!(claim.abandoned().is_unfinished_claim_on(&own));
        assert!(!claim.gone_live().is_unfinished_claim_on(&own));
        assert!(!own.is_unfinished_claim_on(&own));
        // The winner served, took a new backup, and that one's claim was abandoned: too late for the first owner.
        let later = Record {
            configuration: Configuration(3),
            entitled: Some(who(3)),
            ..claim.gone_live()
        };
        assert!(
            !later
                .claimed_by(who(3))
                .unwrap()
                .abandoned()
                .is_unfinished_claim_on(&own)
        );
    }

    #[test]
    fn a_backup_is_relieved_by_another_one_of_the_same_reign_and_by_nothing_else() {
        let own = Record::cold_start(None, who(1), Some(who(2)));
        assert_eq!(own.entitling(who(3)).relieves(who(2), &own), Some(who(3)));
        let claimed = own.claimed_by(who(2)).unwrap();
        for other in [
            own,
            own.detached(),
            own.detached().entitling(who(2)),
            own.entitling(who(3)).ended(),
            claimed.gone_live().entitling(who(3)),
            Record::cold_start(Some(&own), who(1), Some(who(3))),
        ] {
            assert_eq!(other.relieves(who(2), &own), None, "{other}");
        }
    }

    #[test]
    fn every_step_raises_the_record() {
        let live = Record::cold_start(None, who(1), Some(who(2)));
        let claimed = live.claimed_by(who(2)).unwrap();
        let steps = [
            (live, claimed),
            (live, live.detached()),
            (live, live.entitling(who(3))),
            (live.detached(), live.detached().entitling(who(3))),
            (live, live.ended()),
            (claimed, claimed.gone_live()),
            (claimed, claimed.abandoned()),
            (claimed, claimed.reclaimed_by(who(1))),
            (
                claimed.abandoned(),
                claimed.abandoned().reclaimed_by(who(1)),
            ),
            (live, Record::cold_start(Some(&live), who(4), None)),
            (
                live.ended(),
                Record::cold_start(Some(&live.ended()), who(4), None),
            ),
        ];
        for (from, to) in steps {
            assert!(from.rank() < to.rank(), "{from} -> {to}");
        }
    }
}
