//! How the proof of a fence gets from the thread that fences to the one that drains the log and goes live.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard};

use rdma_log::Fenced;
use rdma_log::locks::lock;

/// Where the proof is left. Clones are the same place; whoever goes live takes the proof out, whoever else still knows the place.
#[derive(Clone, Debug, Default)]
pub struct Proof(Arc<Mutex<Option<Fenced>>>);

impl Proof {
    fn lock(&self) -> MutexGuard<'_, Option<Fenced>> {
        lock(&self.0)
    }

    /// The fence has returned: from now on the log is to be drained.
    pub fn leave(&self, fenced: Fenced) {
        *self.lock() = Some(fenced);
    }

    /// Whether it was left here, and not taken.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.lock().is_some()
    }

    /// Takes it out.
    #[must_use]
    pub fn take(&self) -> Option<Fenced> {
        self.lock().take()
    }

    /// What becomes of it, if it is there.
    pub(super) fn with<T>(&self, then: impl FnOnce(&Fenced) -> T) -> Option<T> {
        self.lock().as_ref().map(then)
    }
}
