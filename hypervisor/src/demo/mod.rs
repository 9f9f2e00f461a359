//! `doppel demo`: a pair on this machine, a client, a kill, and what came of it.

pub mod gateway;
pub mod namespace;
pub mod pair;
