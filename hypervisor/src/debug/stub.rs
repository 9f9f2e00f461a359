//! The conversation with gdb, as far as it goes while the guest stands.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, SingleThreadStopReason};

use super::DebugError;
use super::view::{Resume, View};
use crate::backends::wait::Waiter;
use crate::kvm::Kick;
use crate::machine::Machine;
use crate::replay::{Debugger, Go, Stop};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};

/// A packet of gdb's: its memory reads are answered in ones of this size.
const PACKET: usize = 16 << 10;

/// Between two looks whether gdb says something while the guest runs: an interrupt of a person's.
const LOOK: Duration = Duration::from_millis(20);

/// The connection, as gdbstub writes to it; what is for one packet goes out at once.
struct Wire {
    to: File,
    waiting: Vec<u8>,
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.waiting.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.write_all(&self.waiting)?;
        self.waiting.clear();
        Ok(())
    }
}

type Machinery = GdbStubStateMachine<'static, View, Wire>;

/// gdb, connected.
pub struct Gdb {
    from: File,
    view: View,
    /// None only after it has gone.
    stub: Option<Machinery>,
    /// The guest runs: what gdb says has to interrupt it.
    running: Arc<AtomicBool>,
}

impl Gdb {
    /// gdb behind this connection, about this machine, whose vCPU the calling thread runs. Starts a thread that listens to gdb while
    /// the guest runs.
    ///
    /// # Errors
    /// [`DebugError`].
    pub fn new(
        connection: File,
        machine: &mut Machine,
        sandbox: &Sandbox,
    ) -> Result<Self, DebugError> {
        let broke = DebugError::Connection;
        let mut view = View::of(machine)?;
        let wire = Wire {
            to: connection.try_clone().map_err(broke)?,
            waiting: Vec::new(),
        };
        let stub = GdbStub::builder(wire)
            .packet_buffer_size(PACKET)
            .build()
            .map_err(|error| DebugError::Protocol(error.to_string()))?;
        let stub = stub.run_state_machine(&mut view).map_err(failed)?;
        let running = Arc::new(AtomicBool::new(false));
        listen(
            connection.try_clone().map_err(broke)?,
            Arc::downgrade(&running),
            machine.kick_handle(),
            sandbox.clone(),
        )
        .map_err(broke)?;
        Ok(Self {
            from: connection,
            view,
            stub: Some(stub),
            running,
        })
    }

    fn byte(&mut self) -> Result<Option<u8>, DebugError> {
        let mut byte = [0];
        match self.from.read(&mut byte) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(byte[0])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.byte(),
            Err(error) => Err(DebugError::Connection(error)),
        }
    }

    /// Speaks with gdb until it lets the guest go on.
    fn converse(&mut self, why: &Stop) -> Result<Go, DebugError> {
        let Some(mut stub) = self.stub.take() else {
            return Ok(Go::Alone);
        };
        if let GdbStubStateMachine::Running(inner) = stub {
            stub = match why {
                // A byte of gdb's says which of its two ways to interrupt it is.
                Stop::Wanted => {
                    let Some(byte) = self.byte()? else {
                        return Ok(Go::Alone);
                    };
                    inner.incoming_data(&mut self.view, byte).map_err(failed)?
                }
                why => {
                    let reason = self.reason(why);
                    inner.report_stop(&mut self.view, reason).map_err(failed)?
                }
            };
        }
        loop {
            stub = match stub {
                GdbStubStateMachine::Idle(inner) => {
                    let Some(byte) = self.byte()? else {
                        return Ok(Go::Alone);
                    };
                    inner.incoming_data(&mut self.view, byte).map_err(failed)?
                }
                GdbStubStateMachine::CtrlCInterrupt(inner) => inner
                    .interrupt_handled(
                        &mut self.view,
                        Some(SingleThreadStopReason::Signal(Signal::SIGINT)),
                    )
                    .map_err(failed)?,
                GdbStubStateMachine::Running(inner) if matches!(why, Stop::Over(_)) => {
                    // There is nothing to go on to.
                    inner
                        .report_stop(&mut self.view, SingleThreadStopReason::Exited(0))
                        .map_err(failed)?
                }
                GdbStubStateMachine::Running(_) => {
                    self.stub = Some(stub);
                    return Ok(Go::On);
                }
                GdbStubStateMachine::Disconnected(inner) => {
                    return Ok(match inner.get_reason() {
                        DisconnectReason::Kill => Go::End,
                        _ => Go::Alone,
                    });
                }
            };
        }
    }

    fn reason(&self, why: &Stop) -> SingleThreadStopReason<u64> {
        let at = self.view.instruction();
        match why {
            Stop::Debugged if self.view.stops.contains(&at) => SingleThreadStopReason::HwBreak(()),
            Stop::Debugged => SingleThreadStopReason::DoneStep,
            _ => SingleThreadStopReason::Signal(Signal::SIGTRAP),
        }
    }
}

impl Debugger for Gdb {
    fn stopped(&mut self, machine: &mut Machine, why: &Stop) -> Result<Go, DebugError> {
        self.running.store(false, Ordering::SeqCst);
        self.view.look(machine)?;
        let go = match self.converse(why) {
            // gdb was killed, or its machine is gone: the replay is of use without it.
            Err(DebugError::Connection(_)) => Go::Alone,
            other => other?,
        };
        match go {
            Go::On => {
                machine.debug(self.view.resume == Resume::Step, &self.view.places())?;
                self.running.store(true, Ordering::SeqCst);
            }
            Go::Alone | Go::End => machine.debug(false, &[])?,
        }
        Ok(go)
    }

    fn wants_to_speak(&mut self) -> bool {
        readable(&self.from, Duration::ZERO)
    }
}

/// Kicks the vCPU when gdb says something while the guest runs.
fn listen(
    connection: File,
    running: std::sync::Weak<AtomicBool>,
    kick: Kick,
    sandbox: Sandbox,
) -> io::Result<()> {
    let listen = move || {
        sandbox.confine(Thread::Replay).expect(NOT_CONFINED);
        while let Some(running) = running.upgrade() {
            if running.load(Ordering::SeqCst) && readable(&connection, LOOK) {
                kick.kick();
            }
            drop(running);
            // The vCPU thread takes what was said; a guest that just leaves KVM anyhow must not be kicked for ever.
            thread::sleep(LOOK);
        }
    };
    thread::Builder::new().name("gdb".into()).spawn(listen)?;
    Ok(())
}

/// Whether something has come, or comes in time.
fn readable(from: &File, longest: Duration) -> bool {
    let mut waiter = Waiter::new();
    let at = waiter.add(from, true, false);
    // An error shows when it is read.
    waiter.wait(Some(longest)).is_err() || waiter.ready(at).read
}

fn failed<T: std::fmt::Display>(error: GdbStubError<T, io::Error>) -> DebugError {
    if error.is_connection_error() {
        let source = error.into_connection_error().map(|(error, _)| error);
        return DebugError::Connection(source.unwrap_or_else(|| io::ErrorKind::Other.into()));
    }
    DebugError::Protocol(error.to_string())
}
