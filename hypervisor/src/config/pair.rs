//! The pair: where its sides meet, and what carries the log.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rdma_log::transport::rdma;
use serde::{Deserialize, Serialize};

use crate::arbiter::Place;
use crate::version::Versions;

/// The pair.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pair {
    /// What carries the log.
    pub transport: Transport,
    /// Unix socket at which the backup listens and to which the primary connects (transport `shm`).
    pub socket: PathBuf,
    /// Address at which the backup listens (transports `tcp` and `rdma`); port 0 takes a free one.
    pub listen: Option<SocketAddr>,
    /// Address of the backup, to which the primary connects (transports `tcp` and `rdma`).
    pub connect: Option<SocketAddr>,
    /// Addresses at which a machine that runs without a backup looks for a new one, beside `connect` (transports
    /// `tcp` and `rdma`).
    pub standbys: Vec<SocketAddr>,
    /// Where the arbiter is: a directory that both sides see, or `etcd://HOST:PORT,…`.
    pub arbiter: Place,
    /// Address to which this side binds its UDP heartbeats; port 0 takes a free one. By default they go where the control
    /// connection goes.
    pub heartbeat: Option<SocketAddr>,
    /// File of the pair's secret, which both sides prove to hold. Transports `tcp` and `rdma` need one.
    pub secret: Option<PathBuf>,
    /// What this side speaks with its peer. Nobody configures it: a program of another release has another range.
    #[serde(skip)]
    pub versions: Versions,
}

/// What carries the log from the primary to its backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Memory shared by two processes of one host.
    #[default]
    Shm,
    /// A TCP connection, between two hosts.
    Tcp,
    /// RDMA, between two hosts; the set-up goes over TCP.
    Rdma,
}

impl Transport {
    /// Its name in configuration and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self {
            transport: Transport::default(),
            listen: None,
            connect: None,
            standbys: Vec::new(),
            socket: PathBuf::from("doppel.sock"),
            arbiter: Place::Directory(PathBuf::from("doppel.arbiter")),
            heartbeat: None,
            secret: None,
            versions: Versions::OURS,
        }
    }
}

/// How RDMA is used.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rdma {
    /// The device's name, as `ibv_devices` shows it; none takes the first with an active port.
    pub device: Option<String>,
    /// The port's number; none takes the first that is active.
    pub port: Option<u8>,
    /// Index of the GID; none takes a RoCE v2 one, of an IPv4 address where there is one.
    pub gid_index: Option<u8>,
    /// When an entry counts as committed. The same on both sides.
    pub mode: CommitMode,
}

/// When an entry of a log over RDMA counts as committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommitMode {
    /// When the device says that it was written.
    #[default]
    Nic,
    /// When the backup says that it received it.
    Ack,
}

impl Rdma {
    /// As the ring takes it, between sides that give each other up after `silence`: a connection that has given up cannot change
    /// its mind, so it waits longer.
    #[must_use]
    pub fn ring(&self, silence: Duration) -> rdma::Config {
        rdma::Config {
            choice: rdma_log::verbs::Choice {
                device: self.device.clone(),
                port: self.port,
                gid_index: self.gid_index,
            },
            mode: match self.mode {
                CommitMode::Nic => rdma::Mode::Nic,
                CommitMode::Ack => rdma::Mode::Ack,
            },
            patience: silence * 2,
        }
    }
}
