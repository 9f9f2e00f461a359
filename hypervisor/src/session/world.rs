//! The real world: the network port and the console.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::backends::NetPort;
use crate::backends::console::ConsoleOutput;
use crate::event::Output;
use crate::gate::Sent;
use crate::spool::Spool;
use crate::world::World;

/// Sends frames to a port and console bytes to a file or to standard output.
pub struct HostWorld {
    port: Option<NetPort>,
    console: ConsoleOutput,
    /// Those who look at the console.
    spool: Arc<Spool>,
    /// The port failed; it is said once, and frames are then lost as on a broken wire.
    broken: bool,
}

impl HostWorld {
    /// A world of these.
    #[must_use]
    pub fn new(port: Option<NetPort>, console: ConsoleOutput, spool: Arc<Spool>) -> Self {
        Self {
            port,
            console,
            spool,
            broken: false,
        }
    }
}

impl World for HostWorld {
    fn send(&mut self, output: &Output) -> Sent {
        match output {
            Output::Frame(frame) => {
                let Some(port) = &self.port else {
                    return Sent::Done;
                };
                match port.write(frame) {
                    Ok(true) => Sent::Done,
                    Ok(false) => Sent::Busy,
                    Err(error) => {
                        if !self.broken {
                            tracing::warn!(
                                "the guest's network port fails: {error}; frames are lost"
                            );
                            self.broken = true;
                        }
                        Sent::Done
                    }
                }
            }
            Output::Console(bytes) => {
                if let Err(error) = self.console.write(bytes) {
                    tracing::warn!("the guest's console cannot be written: {error}");
                }
                self.spool.feed(bytes);
                Sent::Done
            }
            // A disk's requests do not come this way.
            Output::PowerOff(_) | Output::Disk(_) => Sent::Done,
        }
    }
}
