//! Waits for the death of the primary's process, where the kernel tells it in shared memory.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rdma_log::robust::DeathWatch;

use super::SessionError;
use crate::backends::wait::Wake;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::make_this_thread_urgent;

/// How long the thread outlives whoever wants to know.
const LOOK: Duration = Duration::from_millis(500);

/// A thread that sleeps until the primary's I/O thread is dead, and then wakes ours.
#[derive(Debug)]
pub(super) struct Mourner {
    died: Arc<AtomicBool>,
}

impl Mourner {
    /// Starts the thread, which confines itself. Dropped, it ends a little later. `urgent`: from the death on nobody serves.
    pub(super) fn start(
        watch: DeathWatch,
        wake: &Arc<Wake>,
        sandbox: &Sandbox,
        urgent: bool,
    ) -> Result<Self, SessionError> {
        let died = Arc::new(AtomicBool::new(false));
        let (tell, wake, sandbox) = (Arc::downgrade(&died), Arc::clone(wake), sandbox.clone());
        thread::Builder::new()
            .name("mourner".into())
            .spawn(move || {
                if urgent {
                    make_this_thread_urgent();
                }
                sandbox.confine(Thread::Mourner).expect(NOT_CONFINED);
                while tell.strong_count() > 0 {
                    if watch.wait(LOOK) {
                        if let Some(died) = tell.upgrade() {
                            died.store(true, Ordering::Release);
                            wake.ring();
                        }
                        return;
                    }
                }
            })
            .map_err(SessionError::host(
                "start the thread that waits for the primary's death",
            ))?;
        Ok(Self { died })
    }

    /// Whether the primary's process is gone, or about to be.
    pub(super) fn knows(&self) -> bool {
        self.died.load(Ordering::Acquire)
    }
}
