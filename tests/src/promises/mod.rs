//! The promises, one file each.

use crate::promise::Promise;

pub mod demo_loses_nothing;

/// All of them, in the order in which `scripts/prove` lists them.
pub const ALL: &[Promise] = &[
    demo_loses_nothing::PROMISE,
];
