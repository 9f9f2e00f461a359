//! The machine: vCPU, memory and devices, moved from sync point to sync point.
//!
//! ```text
//!            step()                     supply(input)…
//!  Ready ───────────▶ at an exit: the devices have had the access
//!    ▲                  ├─ Ready   nothing is missing
//!    │                  ├─ Needs   a read waits for an input
//!    │                  ├─ Halted  waits until something happens
//!    ├── reset() ◀──────┼─ Reset   the guest wants to start anew
//!    └── step() ◀───────┴─ Off     the guest is gone (power-off, triple fault)
//! ```
//! Nothing here knows whether it is recorded or replayed: both call `step`, hand in the same inputs at the same
//! positions, and get the same outputs.
#![forbid(unsafe_code)]

mod reset;
mod spec;
mod state;

pub use spec::{BootProtocol, ClockSource, ENCODED_MAX, MachineSpec, OnReset, SpecError};
pub use state::Swept;

use crate::boot::BootError;
use crate::devices::{Bus, DeviceError, Devices};
use crate::digest::{Digest, ExitRecord, History};
use crate::disk::{Extent, Request};
use crate::event::{Effect, GuestTime, Input, Need, Output};
use crate::kvm::{CpuModel, Exit, Kick, KvmError, KvmSource, Vcpu, Vm};
use crate::memory::{DirtyLedger, DirtyPages, GuestRam, MemoryError, MemoryHash, PageNumber};
use crate::position::Position;

use reset::Reset;

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What the machine waits for at a sync point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It can run on.
    Ready,
    /// A read waits for this input.
    Needs(Need),
    /// The guest waits in HALT; the clock answers it once something has happened.
    Halted,
    /// The guest waits in HLT for an interrupt.
    HltInstruction,
    /// The guest resets the machine: [`Machine::reset`].
    Reset,
    /// The guest turned itself off with this status.
    Off(u8),
    /// Triple fault, or HLT with interrupts off: the guest is beyond help.
    Crashed,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// At a sync point; the devices have had the access.
    SyncPoint,
    /// Somebody kicked the vCPU; nothing happened.
    Kicked,
}

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Loading the guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An input that nothing waits for here.
    #[error(
        "an input of {input} does not fit here: the guest is {phase:?}, injectable {injectable}"
    )]
    Unfit {
        /// The input's kind.
        input: &'static str,
        /// What the machine waits for.
        phase: Phase,
        /// Whether inputs nobody asked for may be handed in.
        injectable: bool,
    },
    /// A device refused an input.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// One virtual machine.
pub struct Machine {
    // Dropped in this order: the vCPU and the VM before the memory they point into.
    vcpu: Vcpu,
    vm: Vm,
    ram: Arc<GuestRam>,
    devices: Devices,
    cpu_model: CpuModel,
    position: Position,
    digest: Digest,
    history: History,
    phase: Phase,
    /// A triple fault, or a halt that no interrupt can end, is how this guest resets or turns itself off: Linux knows such ways.
    halts_for_good: bool,
    /// What it takes to start anew.
    again: Reset,
    /// Inputs and interrupts may be handed in at the current exit.
    injectable: bool,
    memory_hash: Option<MemoryHash>,
    /// KVM notes the pages that the guest writes.
    watched: bool,
    written: DirtyLedger,
    /// Of a round of a copy: what was dirty when it began, and up to where that was told.
    sweep: Option<(DirtyPages, PageNumber)>,
}

impl Machine {
    /// Builds the machine and loads its guest, ready for the first step.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn new(source: &KvmSource, spec: &MachineSpec) -> Result<Self, MachineError> {
        let ram = Arc::new(GuestRam::new(spec.memory_mib)?);
        let vm = Vm::new(source.open()?, &ram)?;
        let (vcpu, cpu_model) = vm.create_vcpu(spec.clock == ClockSource::Page)?;
        reset::load(spec, spec.seed, &ram, &vcpu)?;
        let again = Reset::of(spec, &vcpu)?;
        Ok(Self {
            vcpu,
            vm,
            ram,
            devices: Devices::new(&spec.devices()),
            cpu_model,
            position: Position(0),
            digest: Digest(0),
            history: History::default(),
            phase: Phase::Ready,
            again,
            halts_for_good: spec.boot == BootProtocol::Linux,
            injectable: false,
            memory_hash: None,
            watched: false,
            written: DirtyLedger::default(),
            sweep: None,
        })
    }

    /// The host CPU's model.
    #[must_use]
    pub fn cpu_model(&self) -> &CpuModel {
        &self.cpu_model
    }

    /// The sync point the machine stands at.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// The rolling hash over all exits so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Recent exits.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// What the machine waits for.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether inputs that nobody asked for may be handed in here.
    #[must_use]
    pub fn injectable(&self) -> bool {
        self.injectable
    }

    /// Random bytes that the entropy device waits for.
    #[must_use]
    pub fn pending(&self) -> Option<Need> {
        self.devices.pending()
    }

    /// Whether the network device has room for one more frame.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.devices.can_receive(&self.ram)
    }

    /// Whether the guest's network driver runs; a frame that comes before is lost, as on a real wire.
    #[must_use]
    pub fn network_is_up(&self) -> bool {
        self.devices.network_is_up()
    }

    /// How many console bytes can be handed in.
    #[must_use]
    pub fn console_room(&self) -> usize {
        self.devices.console_room()
    }

    /// How many bytes the guest has printed on its console.
    #[must_use]
    pub fn printed(&self) -> u64 {
        self.devices.printed()
    }

    /// The time that the guest reads from memory, if it does: it is renewed by each clock value that is handed in.
    #[must_use]
    pub fn shown_time(&self) -> Option<GuestTime> {
        let shows = self.devices.shows_time();
        shows.then(|| self.devices.shown_time())
    }

    /// When the next tick of the timer is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<GuestTime> {
        self.devices.next_tick()
    }

    /// Ticks due at `now` that were not supplied yet.
    #[must_use]
    pub fn ticks_due(&self, now: GuestTime) -> u32 {
        self.devices.ticks_due(now)
    }

    /// Whether a halted guest may go on: something has happened, or an interrupt can be delivered.
    pub fn awake(&mut self) -> bool {
        match self.phase {
            Phase::Halted => self.devices.something_happened() || self.deliverable(),
            Phase::HltInstruction => self.deliverable(),
            _ => true,
        }
    }

    fn deliverable(&mut self) -> bool {
        self.injectable && self.devices.interrupt_pending() && self.vcpu.ready_for_interrupt()
    }

    /// Requests to the disk of which it is not known what came of them, oldest first.
    pub fn disk_requests(&self) -> impl Iterator<Item = &Request> {
        self.devices.disk_requests()
    }

    /// Whether the guest's disk has all of this.
    #[must_use]
    pub fn disk_holds(&self, extent: Extent) -> bool {
        let disk = self.again.disk();
        disk.is_some_and(|disk| extent.is_within(disk.sectors))
    }

    /// Whether outputs wait to be taken.
    #[must_use]
    pub fn has_outputs(&self) -> bool {
        self.devices.has_outputs()
    }

    /// Takes the outputs made at this sync point.
    pub fn outputs(&mut self) -> impl Iterator<Item = Output> + '_ {
        self.devices.outputs()
    }

    /// Runs to the next sync point and hands the access to the devices. Only when [`Phase::Ready`].
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    ///
    /// # Panics
    /// If the machine waits for an input: the caller lost one.
    pub fn step(&mut self) -> Result<Stepped, MachineError> {
        assert_eq!(self.phase, Phase::Ready, "a step while the guest waits");
        self.deliver()?;
        let exit = self.vcpu.run()?;
        if !exit.is_sync_point() {
            // The guest may have run on: what waits for it now waits for its next exit, or a kick would decide where it
            // is interrupted.
            self.injectable = false;
            return Ok(Stepped::Kicked);
        }
        self.position = self.position.next();
        self.injectable = exit.may_inject();
        let regs = self.vcpu.regs();
        let written: &[u8] = match exit {
            Exit::Port { write: true, .. } | Exit::Mmio { write: true, .. } => self.vcpu.data(),
            _ => &[],
        };
        let record = ExitRecord::new(self.position, exit, written, &regs);
        self.digest = record.fold(self.digest);
        self.history.push(record);
        self.phase = self.access(exit);
        Ok(Stepped::SyncPoint)
    }

    /// Injects an interrupt if one is pending and the guest would take it. A second call at the same exit does nothing: there
    /// KVM holds one already, or was found not to take one.
    fn deliver(&mut self) -> Result<(), MachineError> {
        if self.deliverable() {
            let vector = self.devices.acknowledge_interrupt();
            self.vcpu.inject(vector)?;
            self.injectable = false;
        }
        Ok(())
    }

    fn access(&mut self, exit: Exit) -> Phase {
        let effect = match exit {
            Exit::Port {
                port, size, write, ..
            } => {
                let mut effect = Effect::Done;
                for element in self.vcpu.data().chunks_exact_mut(usize::from(size.max(1))) {
                    effect = if write {
                        self.devices
                            .write(&self.ram, Bus::Port, u64::from(port), element)
                    } else {
                        self.devices
                            .read(&self.ram, Bus::Port, u64::from(port), element)
                    };
                    // A string instruction on a register that needs an input would need several: answer one.
                    if effect != Effect::Done {
                        break;
                    }
                }
                effect
            }
            Exit::Mmio { address, write, .. } => {
                let data = self.vcpu.data();
                if write {
                    self.devices.write(&self.ram, Bus::Mmio, address, data)
                } else {
                    self.devices.read(&self.ram, Bus::Mmio, address, data)
                }
            }
            Exit::Hlt => {
                if self.deliverable() {
                    return Phase::Ready;
                }
                if self.vcpu.ready_for_interrupt() {
                    return Phase::HltInstruction;
                }
                self.end_of_guest()
            }
            // A guest that asks for time this way is told 0.
            Exit::ReadMsr { .. } => {
                self.vcpu.answer_msr(0, false);
                Effect::Done
            }
            Exit::WriteMsr { index, value } => {
                self.vcpu.answer_msr(value, false);
                self.devices.write_msr(&self.ram, index, value)
            }
            // How Linux resets a machine that knows no other way.
            Exit::Shutdown if self.halts_for_good => Effect::Reset,
            Exit::Shutdown => self.end_of_guest(),
            Exit::Interrupted => Effect::Done,
        };
        match effect {
            Effect::Done => Phase::Ready,
            Effect::Needs(need) => Phase::Needs(need),
            Effect::Halt => Phase::Halted,
            Effect::PowerOff(status) => Phase::Off(status),
            Effect::Reset if self.again.wanted() => Phase::Reset,
            Effect::Reset => {
                self.devices.turn_off(0);
                Phase::Off(0)
            }
            Effect::Crash => Phase::Crashed,
        }
    }

    /// What it means that the guest can never run again.
    fn end_of_guest(&mut self) -> Effect {
        if self.halts_for_good {
            self.devices.turn_off(0)
        } else {
            Effect::Crash
        }
    }

    /// Hands one input to the machine at its sync point.
    ///
    /// # Errors
    /// [`MachineError::Unfit`] if nothing here takes such an input, which a log that fits never causes.
    pub fn supply(&mut self, input: &Input) -> Result<(), MachineError> {
        let answers = match (self.phase, input) {
            (Phase::Halted | Phase::Needs(Need::Clock), Input::Clock(_)) => true,
            (Phase::Needs(Need::Random(count)), Input::Random(bytes)) => bytes.len() == count,
            _ => false,
        };
        if answers {
            if self.phase == Phase::Halted {
                // An interrupt delivered now is what ended the wait: before the answer, which clears the latch.
                self.deliver()?;
            }
            if let Some(rdx) = self.devices.answer(input, self.vcpu.data())? {
                self.vcpu.set_rdx(rdx);
            }
            if let Input::Clock(now) = input {
                self.devices.show_time(&self.ram, *now);
            }
            self.phase = Phase::Ready;
            return Ok(());
        }
        let fits = match input {
            Input::Clock(_) => self.injectable && self.devices.shows_time(),
            Input::Random(_) => true,
            Input::Tick(_) | Input::Frame(_) | Input::Console(_) | Input::Disk(_) => {
                self.injectable
            }
        };
        if !fits {
            return Err(MachineError::Unfit {
                input: kind(input),
                phase: self.phase,
                injectable: self.injectable,
            });
        }
        if let Input::Clock(now) = input {
            self.devices.show_time(&self.ram, *now);
            return Ok(());
        }
        self.devices.apply(&self.ram, input)?;
        if self.phase == Phase::HltInstruction && self.deliverable() {
            self.phase = Phase::Ready;
        }
        Ok(())
    }

    /// Turns the machine off where it stands, with this status: the same as if its guest had done it, and an output as then.
    pub fn turn_off(&mut self, status: u8) {
        self.devices.turn_off(status);
        self.phase = Phase::Off(status);
    }

    /// Makes the calling thread's KVM_RUN end early when kicked.
    #[must_use]
    pub fn kick_handle(&self) -> Kick {
        Kick::this_thread()
    }

    /// One digest over the CPU's whole state and the devices', for a final comparison. Where the guest could run on, the
    /// instruction of the current exit is completed first.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn final_state(&mut self) -> Result<u64, MachineError> {
        if self.phase == Phase::Ready && self.position != Position(0) {
            self.deliver()?;
            self.vcpu.finish()?;
        }
        let cpu = format!("{:?}", self.vcpu.state()?);
        Ok(xxh3_64_with_seed(cpu.as_bytes(), self.devices.digest()))
    }
}

fn kind(input: &Input) -> &'static str {
    match input {
        Input::Clock(_) => "clock",
        Input::Random(_) => "random bytes",
        Input::Tick(_) => "tick",
        Input::Frame(_) => "frame",
        Input::Console(_) => "console bytes",
        Input::Disk(_) => "what came of a disk request",
    }
}

#[cfg(test)]
mod tests;
