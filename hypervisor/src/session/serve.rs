//! The I/O thread's loop of a process that serves the machine: a primary, or a backup after its go-live.
#![forbid(unsafe_code)]

use std::thread::JoinHandle;

use super::SessionError;
use super::clerk::Clerk;
use super::io::Io;
use super::report::{Event as Said, Timeline};
use crate::orders::Order;
use crate::protocol::primary::{Action, Event};
use crate::protocol::{Moment, Primary, Reason};
use crate::record::{Ended, RecordError};

/// The thread that runs the guest.
pub(super) type Vcpu = JoinHandle<Result<Ended, RecordError>>;

/// Now, for the protocol.
pub(super) fn now() -> Moment {
    Moment(Timeline::now())
}

/// How a served machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Why the process ends.
    pub reason: Reason,
    /// How the guest ended, if it did by itself.
    pub guest: Option<Ended>,
}

/// Serves until the protocol ends this process.
pub(super) fn serve(
    io: &mut Io,
    clerk: &Clerk,
    mut protocol: Primary,
    vcpu: Vcpu,
) -> Result<Served, SessionError> {
    let mut vcpu = Some(vcpu);
    let mut guest = None;
    let mut fence_told = false;
    let mut actions = Vec::new();
    loop {
        let longest = protocol.deadline().map(|deadline| deadline.since(now()));
        let found = io.round(longest, true)?;
        let now = now();
        if let Some(beats) = &io.beats {
            while let Some(beat) = beats.receive() {
                protocol.handle(now, Event::Heartbeat(beat), &mut actions);
            }
        }
        if found.log_traffic {
            protocol.handle(now, Event::LogTraffic, &mut actions);
        }
        if found.peer_gone {
            protocol.handle(now, Event::PeerDied, &mut actions);
        }
        io.answer_exits();
        if io.orders.fenced() && !fence_told {
            fence_told = true;
            protocol.handle(now, Event::LogFenced, &mut actions);
        }
        while let Some((answer, _)) = clerk.answer() {
            protocol.handle(now, Event::Arbiter(answer), &mut actions);
        }
        if vcpu.as_ref().is_some_and(JoinHandle::is_finished) {
            guest = end_of(vcpu.take())?;
            protocol.handle(now, Event::End, &mut actions);
        }
        if found.signalled {
            protocol.handle(now, Event::End, &mut actions);
        }
        protocol.handle(now, Event::Tick(io.orders.progress()), &mut actions);
        io.reporter.watched(|| protocol.take_watched());
        for action in actions.drain(..) {
            match action {
                Action::SendHeartbeat(beat) => {
                    if let Some(beats) = &io.beats {
                        beats.send(&beat);
                    }
                }
                Action::Ask(request) => clerk.ask(request),
                Action::Freeze => {
                    io.outlet.shut();
                    io.order(Order::Freeze);
                }
                Action::RunUnprotected(_) => {
                    io.stager.detach();
                    io.beats = None;
                    io.control = None;
                    io.watch = None;
                    io.order(Order::RunUnprotected);
                    if vcpu.is_none() {
                        io.release_everything();
                    }
                }
                Action::Say(notice) => io.reporter.say(&Said::Notice {
                    text: notice.to_string(),
                    loud: notice.is_loud(),
                }),
                Action::Die(reason) => {
                    io.order(Order::Stop);
                    // A recorder that stops in the middle of a post says so; that is how it was told to end.
                    let _ = end_of(vcpu.take());
                    io.last_words();
                    return Ok(Served { reason, guest });
                }
            }
        }
    }
}

fn end_of(vcpu: Option<Vcpu>) -> Result<Option<Ended>, SessionError> {
    match vcpu {
        Some(vcpu) => Ok(Some(vcpu.join().map_err(|_| SessionError::Panicked)??)),
        None => Ok(None),
    }
}
