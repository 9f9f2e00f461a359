//! What this host can do for a pair, and what to do about each lack.
//!
//! ```text
//!  Host ──gather──▶ Facts ──judge──▶ Report (findings in plain words, the ways in which a pair can run)
//!         reads /proc, /sys, /dev      pure
//!         and tries things
//! ```
//! Gathering never fails: what cannot be found out is a fact as well. It needs neither root nor KVM.

mod facts;
mod judge;
mod pmu;
mod probe;

pub use facts::{Facts, Host, KvmFacts, PmuFacts, RdmaDevice, StageFacts, VerbsFacts};
pub use judge::judge;
pub use probe::{KickTime, Measured, Probe, Rings};

use std::time::Instant;

use serde::Serialize;

use crate::arbiter::{self, Place};
use crate::config::{Config, Transport};
use crate::handshake::Trust;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Good,
    /// It works, with less speed or fewer choices.
    Limited,
    /// It is not there; something does not work without it.
    Missing,
}

/// One thing about this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: &'static str,
    /// How good it is.
    pub level: Level,
    /// What was found, in plain words.
    pub found: String,
    /// What to do about a lack.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether a pair can run here.
    pub can_run_a_pair: bool,
    /// In which ways: transport and network.
    pub ways: Vec<&'static str>,
    /// The findings, by area.
    pub findings: Vec<Finding>,
    /// What they were made from.
    pub facts: Facts,
}

/// Examines a host.
///
/// Call it while the process has one thread: only then can a user namespace be tried.
#[must_use]
pub fn examine(host: &Host) -> Report {
    let facts = Facts::gather(host);
    let (ways, findings) = judge(&facts);
    Report {
        can_run_a_pair: !ways.is_empty(),
        ways,
        findings,
        facts,
    }
}

/// What this configuration of a pair needs besides: its secret, and the library of its transport.
#[must_use]
pub fn look_at(config: &Config, facts: &Facts) -> Vec<Finding> {
    let finding = |area, level, found: String| Finding {
        area,
        level,
        found,
        advice: None,
    };
    let mut findings = vec![match Trust::of(&config.pair) {
        Ok(trust) if trust.has_secret() => {
            let path = config.pair.secret.as_deref().unwrap_or("".as_ref());
            let found = format!(
                "the secret {} is whole and its owner's alone; the other side needs the same",
                path.display()
            );
            finding("secret", Level::Good, found)
        }
        Ok(_) => {
            let found =
                "none, and none is needed: both sides are processes of one user on this host";
            finding("secret", Level::Good, found.to_owned())
        }
        Err(error) => finding("secret", Level::Missing, error.to_string()),
    }];
    if config.pair.transport == Transport::Rdma
        && let VerbsFacts::Missing { why } = &facts.verbs
    {
        findings.push(finding("RDMA", Level::Missing, why.clone()));
    }
    findings
}

/// Asks an arbiter for the record of a machine that nobody has.
#[must_use]
pub fn ask_arbiter(place: &Place) -> Finding {
    const AREA: &str = "arbiter";
    let start = Instant::now();
    let asked = arbiter::open(place, "doctor").and_then(|arbiter| arbiter.read());
    match asked {
        Ok(_) => Finding {
            area: AREA,
            level: Level::Good,
            found: format!(
                "{place} answers in {:.1} ms",
                start.elapsed().as_secs_f64() * 1e3
            ),
            advice: None,
        },
        Err(error) => Finding {
            area: AREA,
            level: Level::Missing,
            found: error.to_string(),
            advice: Some(
                "while it does not answer no machine starts, and none changes role".into(),
            ),
        },
    }
}

#[cfg(test)]
mod tests;
