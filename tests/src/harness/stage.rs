//! A pair on a stage of its own: a network namespace with a TAP, a directory, both sides.
//!
//! The namespace belongs to the thread that makes it, and to what that thread starts: so a run happens on a thread of its own
//! ([`alone`]), and the machine's own network is never touched. Needs root, as making a TAP does here.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context, Result};
use hypervisor::backends::NetPort;
use hypervisor::backends::tap::{Ipv4Network, TapConfig};
use hypervisor::config::Transport;
use hypervisor::demo::namespace::{self, Namespace};
use hypervisor::demo::pair::{Pair, PairSpec};
use tempfile::TempDir;

use super::program;

/// The guest's address on every stage.
pub const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379);

/// The TAP on every stage.
pub const INTERFACE: &str = "doppel0";

/// A namespace with a TAP, and a directory.
#[derive(Debug)]
pub struct Stage {
    namespace: Namespace,
    port: NetPort,
    directory: TempDir,
}

impl Stage {
    /// Moves the calling thread into a new namespace with a TAP.
    ///
    /// # Errors
    /// If the host does not let us.
    pub fn enter() -> Result<Self> {
        let entered = namespace::enter(&TapConfig {
            name: INTERFACE.into(),
            address: Some(Ipv4Network {
                address: Ipv4Addr::new(10, 77, 0, 1),
                prefix: 24,
            }),
            mtu: 1500,
        })
        .context("enter a network namespace of its own")?;
        Ok(Self {
            namespace: entered.namespace,
            port: entered.tap.into_port(),
            directory: tempfile::Builder::new()
                .prefix("doppel-test-")
                .tempdir()
                .context("make a directory")?,
        })
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The guest's network port, which every pair on this stage shares.
    #[must_use]
    pub fn port(&self) -> &NetPort {
        &self.port
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What to run: `guest` with these words, and the stage's address.
    ///
    /// # Errors
    /// If the program was not built.
    pub fn spec(&self, guest: &str, words: &str) -> Result<PairSpec> {
        Ok(PairSpec {
            doppel: program::doppel()?,
            directory: self.directory().to_owned(),
            guest: guest.to_owned(),
            memory_mib: 64,
            command_line: format!("ip=10.77.0.2/24 {words}"),
            memory_check_ms: 100,
            kvm: None,
            transport: Transport::Shm,
            arbiter: None,
            more: Vec::new(),
        })
    }

    /// Starts a pair in a directory of its own: the machine of an earlier pair is no business of its.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn pair_in(&self, directory: &Path, guest: &str, words: &str) -> Result<Pair> {
        let spec = PairSpec {
            directory: directory.to_owned(),
            ..self.spec(guest, words)?
        };
        Ok(Pair::start(&spec, Some(&self.port))?)
    }

    /// Starts a pair.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn pair(&self, guest: &str, words: &str) -> Result<Pair> {
        Ok(Pair::start(&self.spec(guest, words)?, Some(&self.port))?)
    }
}

/// Runs `work` on a thread of its own, which may enter a namespace without moving the caller.
///
/// # Errors
/// What `work` says; a panic goes on in the caller.
pub fn alone<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
