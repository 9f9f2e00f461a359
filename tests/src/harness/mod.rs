//! Starting the real program, and doing things to it.

pub mod busy;
pub mod flips;
pub mod hostile;
pub mod hostile_backup;
pub mod hostile_capture;
pub mod hostile_clients;
pub mod hostile_frames;
pub mod hostile_gate;
pub mod hostile_run;
pub mod hostile_zombie;
pub mod kv_load;
pub mod late_guest;
pub mod load;
pub mod meddler;
pub mod oracle;
pub mod program;
pub mod random;
pub mod recording;
pub mod redis;
pub mod relay;
pub mod role;
pub mod scheduler;
pub mod signal;
pub mod stage;
pub mod strangers;
pub mod unprivileged;
