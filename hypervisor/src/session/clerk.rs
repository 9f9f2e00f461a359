//! The arbiter thread: asks what the protocol wants asked, so that nothing else waits for a disk or a network.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
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
        self.requests.send(request).expect(GONE);
    }

    /// An answer that has come.
    ///
    /// # Panics
    /// If the thread is gone: whoever waits for its answer would wait for ever.
    pub(super) fn answer(&self) -> Option<(Answer, Option<Claim>)> {
        match self.answers.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("{GONE}"),
        }
    }
}

/// A process that cannot ask the arbiter any more is better off dead: the other side notices that.
const GONE: &str = "the arbiter thread lives as long as its clerk";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "the arbiter thread lives as long as its clerk")]
    fn a_thread_that_is_gone_with_a_question_is_noticed() {
        let (requests, asked) = channel();
        let (tell, answers) = channel();
        let clerk = Clerk { requests, answers };
        clerk.ask(Request::Read);
        assert!(clerk.answer().is_none());
        drop((asked, tell));
        clerk.answer();
    }
}
