//! What becomes of a backup that does not keep up.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Deserialize;

/// What becomes of a backup that does not keep up at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lag {
    /// `throttle` or `drop`.
    pub policy: LagPolicy,
    /// For how long the guest must have had less than a quarter of its time because of the backup. Shorter takes a busy moment of
    /// its host for more than that.
    pub after_ms: u64,
}

/// The same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LagPolicy {
    /// The guest stays as slow as its backup, and protected.
    #[default]
    Throttle,
    /// The backup is let go: the guest runs at its own speed, unprotected, until another one joins.
    Drop,
}

impl Default for Lag {
    fn default() -> Self {
        Self {
            policy: LagPolicy::default(),
            after_ms: 5000,
        }
    }
}

impl Lag {
    /// As a duration.
    #[must_use]
    pub fn after(&self) -> Duration {
        Duration::from_millis(self.after_ms)
    }
}
