//! The world outside the guest, as the gate sees it.
#![forbid(unsafe_code)]

use crate::event::Output;
use crate::gate::Sent;

/// Where released outputs go.
pub trait World: Send {
    /// Sends one output. It must not block.
    fn send(&mut self, output: &Output) -> Sent;
}
