//! Starting the real program, and doing things to it.

pub mod program;
pub mod random;
pub mod stage;
