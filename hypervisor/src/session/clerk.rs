//! The arbiter thread: asks what the protocol wants asked, so that nothing else waits for a disk or a network.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::SessionError;
use crate::arbiter::{self, Arbiter, Claim};
use crate::backends::wait::Wake;
use crate::control::board::Board;
use crate::protocol::{Answer, Request};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::make_this_thread_urgent;

/// Carries requests to the arbiter and answers back. Dropped, it ends its thread after the request under way.
pub(super) struct Clerk {
    requests: Sender<Request>,
    answers: Receiver<(Answer, Option<Claim>)>,
}

impl Clerk {
    /// Starts the thread, which confines itself; `wake` is rung for every answer. `urgent`: while it is asked, nobody serves the
    /// machine, so it should not stand in line for a CPU.
    pub(super) fn start(
        arbiter: Box<dyn Arbiter>,
        wake: Arc<Wake>,
        sandbox: Sandbox,
        urgent: bool,
        board: Arc<Board>,
    ) -> Result<Self, SessionError> {
        let (requests, incoming) = channel::<Request>();
        let (outgoing, answers) = channel();
        thread::Builder::new()
            .name("arbiter".into())
            .spawn(move || {
                if urgent {
                    make_this_thread_urgent();
                }
                let confined = sandbox.confine(match arbiter.needs_network() {
                    true => Thread::RemoteArbiter,
                    false => Thread::Arbiter,
                });
                confined.expect(NOT_CONFINED);
                for request in incoming {
                    let (answer, claim) = arbiter::ask(&*arbiter, &request);
                    let told = answer.clone();
                    if outgoing.send((answer, claim)).is_err() {
                        return;
                    }
                    wake.ring();
                    // After those who wait for it.
                    board.asked(&told);
                }
            })
            .map_err(SessionError::host("start the arbiter thread"))?;
        Ok(Self { requests, answers })
    }

    /// Asks; the answer comes by [`Clerk::answer`].
    pub(super) fn ask(&self, request: Request) {
        // If its thread is gone by a panic, that is noticed as such, and decides what becomes of this process (`panics.rs`).
        let _ = self.requests.send(request);
    }

    /// An answer that has come.
    pub(super) fn answer(&self) -> Option<(Answer, Option<Claim>)> {
        self.answers.try_recv().ok()
    }
}
