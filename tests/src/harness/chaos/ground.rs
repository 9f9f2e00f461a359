//! The ground on which a pair stands: two hosts, real ones or as good as real, and what can be done to them.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use hypervisor::control::status::Status;

use crate::harness::random::Random;
use crate::harness::two_hosts::Which;

/// How long things take somewhere.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long the machine may take to be served and protected again: a copy that is begun and fails, a candidate that gives up after two
    /// seconds, and a start, on a busy machine.
    pub settle: Duration,
    /// For a step of a start.
    pub step: Duration,
    /// Between two looks at the processes.
    pub look: Duration,
    /// What happens lasts so many times as long as where a silent side is given up after 40 ms.
    pub spans: u32,
}

/// What an order printed; or why it was refused.
pub type Said = std::result::Result<String, String>;

/// A process of the machine.
pub trait Member {
    /// Whether it still runs.
    ///
    /// # Errors
    /// If that cannot be told.
    fn runs(&mut self) -> Result<bool>;

    /// Waits for its end: its exit code, if it was not killed.
    ///
    /// # Errors
    /// If it does not end in time.
    fn end(&mut self, longest: Duration) -> Result<Option<i32>>;

    /// All that it has said, events and messages.
    fn said(&self) -> String;
}

/// Two hosts with what a pair needs, and what can be done to them. All of it fails if the test cannot do it.
#[allow(clippy::missing_errors_doc, reason = "said of all of them")]
pub trait Ground {
    /// A process here.
    type Member: Member;

    /// What the machine is called.
    fn name(&self) -> &str;

    /// How long things take here.
    fn patience(&self) -> Patience;

    /// The arbiter's directory, as this machine sees it.
    fn arbiter(&self) -> PathBuf;

    /// Starts the machine's first primary on host a; a backup listens on host b.
    fn start_primary(&self, name: &str) -> Result<Self::Member>;

    /// Starts a backup, and waits until it listens: where primaries look, or at this port.
    fn start_backup(
        &self,
        on: Which,
        name: &str,
        port: Option<u16>,
    ) -> Result<(Self::Member, SocketAddr)>;

    /// What it says of itself. One that is being set up, or that ends, does not answer.
    fn status(&self, on: Which, member: &Self::Member) -> Option<Status>;

    /// `doppel` with these words about the machine, on the host where it is served.
    fn order(&self, on: Which, words: &[&str]) -> Result<Said>;

    /// The same, and something else while it is under way; whatever comes of it.
    fn order_and(
        &self,
        on: Which,
        words: &[&str],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()>;

    /// SIGKILL.
    fn kill(&self, on: Which, member: &Self::Member) -> Result<()>;

    /// The host is lost at once, and this process with it.
    fn lose(&self, on: Which, member: &Self::Member) -> Result<()>;

    /// The host comes back, with nothing running.
    fn mend(&self, on: Which) -> Result<()>;

    /// The process stands still, or goes on.
    fn freeze(&self, on: Which, member: &Self::Member, still: bool) -> Result<()>;

    /// The host stands still, with its clock or without, or goes on.
    fn suspend(&self, on: Which, still: Option<Clock>) -> Result<()> {
        bail!("host {on:?} cannot be suspended: {still:?}")
    }

    /// Ends a backup that has followed nobody.
    fn dismiss(&self, on: Which, member: &mut Self::Member) -> Result<()>;

    /// The hosts do not reach each other on the log's network, or do again.
    fn join_log(&self, joined: bool) -> Result<()>;

    /// What the other host sends on the log's network does not arrive at this one, or does again.
    fn deafen(&self, which: Which, deaf: bool) -> Result<()>;

    /// What this host sends on the log's network is slow to arrive, or is not any more.
    fn slow(&self, which: Which, slow: bool) -> Result<()>;

    /// Bytes of the log are changed in its memory.
    fn corrupt(&self, member: &mut Self::Member, random: &mut Random) -> Result<()>;
}

/// What becomes of the clock of a host that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// It goes on: once it is thawed the host notices.
    GoesOn,
    /// It stands, too: the host notices nothing.
    Stands,
}
