//! `doppel demo`: a pair on this machine, a client, a kill, and what came of it.

pub mod client;
pub mod gateway;
pub mod heard;
pub mod namespace;
pub mod pair;
pub mod plot;
pub mod report;
pub mod run;
