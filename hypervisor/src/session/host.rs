//! What every role needs of its host: signals, pinned threads, the network port, the console.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use core_affinity::CoreId;

use crate::backends::NetPort;
use crate::backends::console::ConsoleOutput;
use crate::backends::link;
use crate::backends::tap::{Tap, TapConfig};
use crate::config::{Config, NetBackend};
use crate::kvm::KvmSource;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::session::SessionError;

/// MTU of the guest's network.
pub const MTU: u16 = 1500;

/// Descriptors that a parent process left open for this one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inherited {
    /// The network port, shared with the other side.
    pub net: Option<RawFd>,
    /// KVM, opened before privileges were dropped.
    pub kvm: Option<RawFd>,
}

impl Inherited {
    /// Where KVM comes from.
    #[must_use]
    pub fn kvm_source(&self, config: &Config) -> KvmSource {
        match self.kvm {
            Some(fd) => KvmSource::Inherited(fd),
            None => KvmSource::Path(config.kvm.clone()),
        }
    }
}

/// A socket that becomes readable when SIGTERM or SIGINT comes.
///
/// # Errors
/// [`SessionError::Host`].
pub fn stop_signals() -> Result<UnixStream, SessionError> {
    let setup = || {
        let (reading, writing) = UnixStream::pair()?;
        reading.set_nonblocking(true)?;
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::low_level::pipe::register(signal, writing.try_clone()?)?;
        }
        Ok(reading)
    };
    setup().map_err(SessionError::host("catch signals"))
}

/// Pins the calling thread to the first CPU of the list; an empty list leaves it where it is.
pub fn pin(cpus: &[usize], thread: &str) {
    if let Some(&id) = cpus.first()
        && !core_affinity::set_for_current(CoreId { id })
    {
        tracing::warn!(
            "the {thread} thread cannot be pinned to CPU {id}; latencies will vary more"
        );
    }
}

/// Opens the guest's network port.
///
/// # Errors
/// [`SessionError::Host`] with the backend's own words.
pub fn open_port(config: &Config, inherited: &Inherited) -> Result<Option<NetPort>, SessionError> {
    if let Some(fd) = inherited.net {
        return Ok(Some(NetPort::inherited(fd)?));
    }
    Ok(match config.net.backend {
        NetBackend::None => None,
        NetBackend::Tap => {
            let name = config.net.tap.clone().unwrap_or_default();
            let address = match &config.net.address {
                Some(text) => Some(text.parse().map_err(SessionError::Address)?),
                None => None,
            };
            let mtu = MTU;
            Some(Tap::open(&TapConfig { name, address, mtu })?.into_port())
        }
        NetBackend::Link => {
            let path = config.net.link.clone().unwrap_or_default();
            Some(link::connect(&path)?)
        }
    })
}

/// Opens the guest's console.
///
/// # Errors
/// [`SessionError::Console`], [`SessionError::Sandbox`].
pub fn open_console(
    config: &Config,
    standard_output_is_taken: bool,
) -> Result<ConsoleOutput, SessionError> {
    Ok(match &config.console {
        Some(path) => {
            let sandbox = Sandbox::prepare(&config.sandbox)?;
            let confine = move || sandbox.confine(Thread::Outflow).expect(NOT_CONFINED);
            ConsoleOutput::file(path, confine)?
        }
        None if standard_output_is_taken => ConsoleOutput::Discard,
        None => ConsoleOutput::Stdout,
    })
}
