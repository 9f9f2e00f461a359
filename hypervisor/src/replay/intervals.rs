//! The replayer's part of replication by checkpoints: it runs nothing. What comes are intervals, part by part; each that has come
//! whole is put in place at once, and all others never.
//!
//! ```text
//!  log ──parts──▶ shadow area ── the last one ──▶ checked ──▶ pages, devices │ the CPU's state is kept
//!                  a torn one stays here                      outputs are kept until released
//!                                                             staged frames that it covers are dropped
//!  end of the log ──▶ KVM takes the CPU's state of the last one; the frames that are left are given to the guest first
//! ```
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{LogError, LogSource, ReplayError, Replayer, unusable};
use crate::checkpoint::{CheckpointError, Interval, Shadow};
use crate::entry::{Base, Body, Entry};
use crate::machine::Processors;

/// What is kept of the last interval.
#[derive(Debug, Default)]
pub(super) struct Adopting {
    /// The state of the CPUs, and where the log stood. None before the first.
    last: Option<(Processors, Base)>,
}

impl<L: LogSource> Replayer<L> {
    /// Of a log that carries intervals.
    #[must_use]
    pub fn of_intervals(mut self) -> Self {
        self.shadow = Shadow::of_intervals(self.machine.pages());
        self.adopts = Some(Adopting::default());
        self
    }

    pub(super) fn interval(&mut self, entry: Entry) -> Result<(), ReplayError> {
        let Body::Part(part) = entry.body else {
            return Err(LogError(
                "it carries what a guest was given, where intervals are expected: give both sides the same --replicate"
                    .into(),
            )
            .into());
        };
        self.shadow
            .add(part.number, &part.bytes)
            .map_err(|error| unusable(error.into()))?;
        if !part.last {
            return Ok(());
        }
        let bytes = self.shadow.take();
        let came = Instant::now();
        let interval = Interval::parse(&bytes, self.machine.pages())
            .map_err(|error| unusable(CheckpointError::from(error)))?;
        let adopted = self.machine.adopt(interval.checkpoint).map_err(unusable)?;
        if let Some(disk) = &self.disk {
            for request in interval.asked {
                let extent = request.extent();
                if extent.is_some_and(|extent| !self.machine.disk_holds(extent)) {
                    return Err(LogError("a write beyond the end of the disk".into()).into());
                }
                disk.follow(request)?;
            }
        }
        for output in interval.outputs {
            self.keep_output(output)?;
        }
        self.source.cover(interval.frames)?;
        self.clock_came = came;
        if let Some(adopts) = &mut self.adopts {
            adopts.last = Some((adopted.cpus, adopted.base));
        }
        self.shadow.give_back(bytes);
        Ok(())
    }

    /// Whether an interval has begun to come and is not whole.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.adopts.is_some() && !self.shadow.is_empty()
    }

    /// Makes the machine one that can run, after the log is over: the vCPU takes the state of the last interval. Does nothing where
    /// the machine was run all the time.
    ///
    /// # Errors
    /// [`ReplayError::Machine`]; this machine can then never go live.
    pub fn settle(&mut self) -> Result<(), ReplayError> {
        if let Some((cpus, _)) = self.adopts.as_ref().and_then(|adopts| adopts.last.as_ref()) {
            let passed = self.clock_came.elapsed();
            self.machine
                .settle(cpus, passed)
                .map_err(ReplayError::Machine)?;
        }
        Ok(())
    }

    /// Where the log stands for whoever goes on from here.
    pub(super) fn base(&self) -> Base {
        let Some(adopts) = &self.adopts else {
            return self.decoder.base();
        };
        match adopts.last {
            Some((_, base)) => base,
            // What began to come and is torn does not count.
            None => Base::new(self.machine.position(), self.decoder.base().clock()),
        }
    }
}
