//! The promises, one file each.
pub mod output_rule;
pub mod zombie;

use crate::promise::Promise;

pub mod bad_input;
pub mod confined;
pub mod demo_loses_nothing;
pub mod demo_without_root;
pub mod leaves_nothing;
pub mod redis_clients;
pub mod replay_exact;

/// All of them, in the order in which `scripts/prove` lists them.
pub const ALL: &[Promise] = &[
    output_rule::PROMISE,
    zombie::PROMISE,
    demo_loses_nothing::PROMISE,
    demo_without_root::PROMISE,
    leaves_nothing::PROMISE,
    redis_clients::PROMISE,
    replay_exact::PROMISE,
    bad_input::PROMISE,
    confined::PROMISE,
];
