//! Pings a guest from a card of its own on the lab's network.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::plug::Plug;
use crate::harness::requests::Asker;

/// Bytes of a ping's data.
const DATA: usize = 56;

/// After so long a ping is sent again: whoever died may have had it, or its answer.
const AGAIN: Duration = Duration::from_secs(1);

/// A card that pings.
#[derive(Debug)]
pub struct Pinger {
    plug: Plug,
    asker: Asker,
    sent: u64,
}

impl Pinger {
    /// By this plug, in the network of the guest.
    #[must_use]
    pub fn new(plug: Plug, asker: Asker) -> Self {
        Self {
            plug,
            asker,
            sent: 0,
        }
    }

    /// Pings the guest: how long it took to answer, from when it was asked first.
    ///
    /// # Errors
    /// If it does not, within `patience`.
    pub fn ping(&mut self, patience: Duration) -> Result<Duration> {
        let asked = Instant::now();
        // The guest need not ask where the answer goes.
        if self.sent == 0 {
            self.plug.send(&self.asker.arp_request())?;
        }
        let first = self.sent + 1;
        while asked.elapsed() < patience {
            self.sent += 1;
            self.plug.send(&self.asker.ping(self.sent, DATA, 0))?;
            let until = Instant::now() + AGAIN;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                let Some(frame) = self.plug.next_within(left)? else {
                    break;
                };
                if let Some(reply) = self.asker.arp_reply_to(&frame) {
                    self.plug.send(&reply)?;
                }
                if self.asker.answered(&frame) >= Some(first) {
                    return Ok(asked.elapsed());
                }
            }
        }
        bail!("the guest has answered no ping for {patience:?}")
    }
}
