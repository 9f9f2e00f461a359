//! The two machines step by step ([`roles`]). Together they are simulated and model-checked in the crate of the promises.

mod candidate;
mod replace;
mod roles;
mod stale;
mod switch;

use super::heartbeat::MachineId;
use super::*;

const A: Identity = Identity::from_bytes([0xa; 16]);
const B: Identity = Identity::from_bytes([0xb; 16]);

fn pair(me: Identity, peer: Identity) -> Pair {
    Pair {
        machine: MachineId::of("sim"),
        me,
        peer,
    }
}

/// The record a pair begins with.
fn first_record() -> Record {
    Record::cold_start(None, A, Some(B))
}
