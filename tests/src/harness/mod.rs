//! Starting the real program, and doing things to it.

pub mod hostile;
pub mod hostile_backup;
pub mod hostile_clients;
pub mod hostile_frames;
pub mod hostile_gate;
pub mod hostile_run;
pub mod program;
pub mod random;
pub mod stage;
