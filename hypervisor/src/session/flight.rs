//! A role's flight recorder: what it is started with, and how what it says is told.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::SessionError;
use super::io::Io;
use super::report::{Event, Reporter};
use crate::config::Config;
use crate::flight::{Flight, Said, Start, Tape};
use crate::machine::{Machine, MachineSpec};

/// Starts one, if it is configured, for this machine as it is now: at power-on, or a copy of one that runs. Where the recording is
/// all that is wanted it is waited for until its directory was opened; a backup follows whatever becomes of its recorder.
pub(super) fn start(
    config: &Config,
    io: &Io,
    json: bool,
    spec: &MachineSpec,
    machine: &Machine,
    waits: bool,
) -> Result<(Option<Flight>, Option<Tape>), SessionError> {
    let Some(recorder) = &config.recorder else {
        return Ok((None, None));
    };
    let spec = spec.recorded_on(machine.cpu_model());
    let reporter = Reporter::new(json, Arc::clone(io.reporter.board()));
    let (flight, tape) = Flight::start(Start {
        config: recorder,
        machine: spec.encode(),
        ram: machine.shared_ram(),
        at_power_on: machine.position().0 == 0,
        sandbox: io.sandbox.clone(),
        waits,
        say: Box::new(move |said| reporter.say(&event(said))),
    })?;
    Ok((Some(flight), Some(tape)))
}

fn event(said: Said) -> Event {
    match said {
        Said::Line(text, loud) => Event::Notice { text, loud },
        Said::Checkpoint {
            position,
            stopped,
            took,
            bytes,
            rounds,
            ..
        } => Event::Checkpointed {
            position,
            stopped_us: stopped.as_micros() as u64,
            took_us: took.as_micros() as u64,
            bytes,
            rounds,
        },
    }
}
