//! The promises, one file each.

use crate::promise::Promise;

/// All of them, in the order in which `scripts/prove` lists them.
pub const ALL: &[Promise] = &[];
