//! `doppel agent`, one to a host: a site's machines look after themselves. All that is shared lies in etcd.
//!
//! ```text
//!   doppel vm … ──orders, specifications──▶ etcd ◀──leases, reports, swaps── agent of each host ──starts, tells, ends──▶ roles
//!                                            ▲                                    │ looks: control sockets, locks          │
//!                                            └────────── the arbiter's records ───┼────────────────────────────────────────┘
//!                                                                                 ▼
//!                  membership   placement, disks (pure)   plan (pure)   orders   hands, images (this host)
//! ```
//! No consensus and no scheduler of our own: etcd orders the writes, a plain rule places, and whoever loses a swap looks again. Who lives is
//! decided by the pair and its arbiter, with agents or without: an agent only brings processes to where they are needed.
//!
//! `docs/cluster.md` has the site's side of it.
#![deny(unsafe_code)]

pub mod config;
pub mod consoles;
pub mod disks;
#[allow(unsafe_code)]
mod hands;
mod images;
mod membership;
mod orders;
pub mod placement;
pub mod plan;
pub mod record;
mod run;
mod seal;
pub mod site;
pub mod spec;
pub mod store;
#[cfg(test)]
mod tests;

pub use run::{now_ms as unix_ms, run};

use std::io;

use crate::arbiter::EtcdError;
use crate::config::ConfigError;
use crate::control::ControlError;
use crate::handshake::SecretError;
use crate::session::SessionError;

use config::AgentConfigError;
use hands::HandsError;

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] AgentConfigError),
    /// The configuration of its roles.
    #[error("the configuration of roles (`roles`): {0}")]
    Roles(#[from] ConfigError),
    /// The site's secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The run directory.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// This host.
    #[error(transparent)]
    Hands(#[from] HandsError),
    /// Signals.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl AgentError {
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
