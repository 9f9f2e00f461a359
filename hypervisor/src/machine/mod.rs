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

mod crew;
mod error;
mod reset;
mod spec;
mod state;
mod stops;
mod tally;

pub use crew::{Company, MOST as VCPUS_MOST};
pub use error::MachineError;
pub use spec::{
    BootProtocol, ClockSource, ENCODED_MAX, MachineSpec, OnReset, SpecError, exact_line,
};
pub use state::{BadProcessors, Processors, Swept};
pub(crate) use stops::StopAt;
pub use tally::{Exits, Tally};

use crate::devices::pvclock::Keeping;
use crate::devices::{Bus, Devices};
use crate::digest::{Digest, ExitRecord, History};
use crate::disk::{Extent, Request};
use crate::event::{Effect, GuestTime, Input, Need, Output};
use crate::kvm::{Cpu, CpuModel, Exit, Kick, KvmSource, Told, Vcpu, Vm};
use crate::memory::{DirtyLedger, DirtyPages, GuestRam, MemoryHash, PageNumber};
use crate::position::Position;

use reset::Reset;

use std::sync::{Arc, Mutex};

use rdma_log::locks::lock;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crew::Crew;

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
    /// Triple fault that starts nothing anew, or HLT with interrupts off: the guest is beyond help.
    Crashed,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// At a sync point; the devices have had the access.
    SyncPoint,
    /// Somebody kicked the vCPU; nothing happened.
    Kicked,
    /// It stands where a debugger wanted it; nothing happened either.
    Debugged,
}

/// What runs the guest.
enum Cpus {
    /// One vCPU, run by whoever owns the machine, from exit to exit.
    One(Vcpu),
    /// One or several with threads of their own.
    Crew(Crew),
}

impl Cpus {
    /// The vCPU of a machine that goes from sync point to sync point.
    fn one(&mut self) -> &mut Vcpu {
        match self {
            Self::One(vcpu) => vcpu,
            Self::Crew(_) => panic!("vCPUs with threads of their own have no sync points"),
        }
    }

    fn crew(&self) -> Option<&Crew> {
        match self {
            Self::One(_) => None,
            Self::Crew(crew) => Some(crew),
        }
    }
}

/// One virtual machine.
pub struct Machine {
    // Dropped in this order: the vCPU and the VM before the memory they point into.
    cpus: Cpus,
    vm: Arc<Vm>,
    ram: Arc<GuestRam>,
    /// Shared with the vCPUs where they run by themselves; nobody else ever waits for it.
    devices: Arc<Mutex<Devices>>,
    cpu: Cpu,
    position: Position,
    digest: Digest,
    history: History,
    tally: Arc<Tally>,
    phase: Phase,
    /// A triple fault, or a halt that no interrupt can end, is how this guest resets or turns itself off: Linux knows such ways.
    halts_for_good: bool,
    /// How it keeps the guest's clock page.
    clock_keeping: Keeping,
    /// What it takes to start anew; none where vCPUs have threads of their own.
    again: Option<Reset>,
    /// Of the guest's disk; 0 without one.
    disk_sectors: u64,
    /// Inputs and interrupts may be handed in at the current exit.
    injectable: bool,
    memory_hash: Option<MemoryHash>,
    /// KVM notes the pages that the guest writes.
    watched: bool,
    written: DirtyLedger,
    /// Pages that the next harvest for checkpoints closes, and leaves others open; none if it closes all.
    closing: Option<DirtyPages>,
    /// Pages of the last such harvest, but for those that it closed.
    last_written: DirtyPages,
    /// Breakpoints that are in memory while the guest runs.
    stops: Vec<StopAt>,
    /// Of a round of a copy: what was dirty when it began, and up to where that was told.
    sweep: Option<(DirtyPages, PageNumber)>,
}

impl Machine {
    /// Builds the machine and loads its guest, ready for the first step.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn new(source: &KvmSource, spec: &MachineSpec) -> Result<Self, MachineError> {
        Self::as_told(source, spec, &Told::default())
    }

    /// The same, its guest being told of its CPU what it is told elsewhere, where this host can tell that as well; [`Machine::told`] says whether it is.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn as_told(
        source: &KvmSource,
        spec: &MachineSpec,
        told: &Told,
    ) -> Result<Self, MachineError> {
        let ram = Arc::new(GuestRam::new(spec.memory_mib)?);
        let kvm = source.open()?;
        let devices = Arc::new(Mutex::new(Devices::new(&spec.devices())));
        let tally = Arc::<Tally>::default();
        let (vm, cpus, cpu) = if let Some(count) = spec.vcpus {
            let vm = Arc::new(Vm::with_controllers(kvm, &ram)?);
            let (vcpus, shape, cpu) = vm.create_crew(count, told)?;
            reset::load(spec, spec.seed, &ram, &vcpus[0])?;
            let crew = Crew::new(vcpus, shape, &devices, &ram, &vm, &tally);
            (vm, Cpus::Crew(crew), cpu)
        } else {
            let vm = Arc::new(Vm::new(kvm, &ram)?);
            let (vcpu, cpu) = vm.create_vcpu(spec.kvm_features(), told)?;
            reset::load(spec, spec.seed, &ram, &vcpu)?;
            (vm, Cpus::One(vcpu), cpu)
        };
        let again = match &cpus {
            Cpus::One(vcpu) => Some(Reset::of(spec, vcpu)?),
            Cpus::Crew(_) => None,
        };
        Ok(Self {
            injectable: cpus.crew().is_some(),
            cpus,
            vm,
            ram,
            devices,
            cpu,
            position: Position(0),
            digest: Digest(0),
            history: History::default(),
            tally,
            phase: Phase::Ready,
            again,
            disk_sectors: spec.disk.map_or(0, |disk| disk.sectors),
            halts_for_good: spec.boot == BootProtocol::Linux,
            clock_keeping: spec.clock_keeping(),
            memory_hash: None,
            watched: false,
            written: DirtyLedger::default(),
            closing: None,
            last_written: DirtyPages::default(),
            stops: Vec::new(),
            sweep: None,
        })
    }

    /// The host CPU's model.
    #[must_use]
    pub fn cpu_model(&self) -> &CpuModel {
        &self.cpu.model
    }

    /// What its guest is told of it.
    #[must_use]
    pub fn told(&self) -> &Told {
        &self.cpu.told
    }

    /// The sync point the machine stands at.
    #[must_use]
    pub fn position(&self) -> Position {
        match &self.cpus {
            Cpus::One(_) => self.position,
            // Exits of all: that they go on is all it means.
            Cpus::Crew(crew) => Position(crew.exits()),
        }
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

    /// What its exits are for, counted on while it runs.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// What the machine waits for.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.cpus.crew().and_then(Crew::gone).unwrap_or(self.phase)
    }

    /// Whether inputs that nobody asked for may be handed in here.
    #[must_use]
    pub fn injectable(&self) -> bool {
        self.injectable
    }

    /// Whether a tick that is given here would be in another interrupt's way: the timer's comes first where both ask, and one that the guest
    /// does not take here comes first where it does.
    #[must_use]
    pub fn tick_is_in_the_way(&mut self) -> bool {
        lock(&self.devices).asks_besides_timer()
            || self.phase == Phase::Ready && !self.cpus.one().ready_for_interrupt()
    }

    /// Random bytes that the entropy device waits for.
    #[must_use]
    pub fn pending(&self) -> Option<Need> {
        lock(&self.devices).pending()
    }

    /// Whether the network device has room for one more frame.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        lock(&self.devices).can_receive(&self.ram)
    }

    /// Whether the guest's network driver runs; a frame that comes before is lost, as on a real wire.
    #[must_use]
    pub fn network_is_up(&self) -> bool {
        lock(&self.devices).network_is_up()
    }

    /// How many console bytes can be handed in.
    #[must_use]
    pub fn console_room(&self) -> usize {
        lock(&self.devices).console_room()
    }

    /// How many bytes the guest has printed on its console.
    #[must_use]
    pub fn printed(&self) -> u64 {
        lock(&self.devices).printed()
    }

    /// The time that the guest reads from memory, if it does: it is renewed by each clock value that is handed in.
    #[must_use]
    pub fn shown_time(&self) -> Option<GuestTime> {
        let shows = lock(&self.devices).shows_time();
        shows.then(|| lock(&self.devices).shown_time())
    }

    /// When the next tick of the timer is due. Never where the guest has KVM's timer, and does not know of this one.
    #[must_use]
    pub fn next_tick(&self) -> Option<GuestTime> {
        match self.cpus {
            Cpus::One(_) => lock(&self.devices).next_tick(),
            Cpus::Crew(_) => None,
        }
    }

    /// Ticks due at `now` that were not supplied yet.
    #[must_use]
    pub fn ticks_due(&self, now: GuestTime) -> u32 {
        match self.cpus {
            Cpus::One(_) => lock(&self.devices).ticks_due(now),
            Cpus::Crew(_) => 0,
        }
    }

    /// Whether a halted guest may go on: something has happened, or an interrupt can be delivered.
    pub fn awake(&mut self) -> bool {
        match self.phase {
            Phase::Halted => {
                let happened = lock(&self.devices).something_happened();
                happened || self.deliverable()
            }
            Phase::HltInstruction => self.deliverable(),
            _ => true,
        }
    }

    fn deliverable(&mut self) -> bool {
        self.injectable
            && lock(&self.devices).interrupt_pending()
            && self.cpus.one().ready_for_interrupt()
    }

    /// Requests to the disk of which it is not known what came of them, oldest first.
    pub fn disk_requests(&self) -> impl Iterator<Item = Request> + use<> {
        let requests: Vec<_> = lock(&self.devices).disk_requests().cloned().collect();
        requests.into_iter()
    }

    /// Whether the guest's disk has all of this.
    #[must_use]
    pub fn disk_holds(&self, extent: Extent) -> bool {
        extent.is_within(self.disk_sectors)
    }

    /// Whether outputs wait to be taken.
    #[must_use]
    pub fn has_outputs(&self) -> bool {
        lock(&self.devices).has_outputs()
    }

    /// Takes the outputs made at this sync point.
    pub fn outputs(&mut self) -> impl Iterator<Item = Output> + use<> {
        // Empty it is no allocation, and that it mostly is.
        let outputs: Vec<_> = lock(&self.devices).outputs().collect();
        outputs.into_iter()
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
        let planted = self.plant()?;
        let exit = self.cpus.one().run();
        self.lift(&planted)?;
        let exit = match exit? {
            Exit::Hlt if self.met_stop()? => Exit::Debug,
            exit => exit,
        };
        if !exit.is_sync_point() {
            // The guest may have run on: what waits for it now waits for its next exit, or a kick would decide where it
            // is interrupted.
            self.injectable = false;
            return Ok(match exit {
                Exit::Debug => Stepped::Debugged,
                _ => Stepped::Kicked,
            });
        }
        self.position = self.position.next();
        self.tally.count(exit);
        self.injectable = exit.may_inject();
        let regs = self.cpus.one().regs();
        let written: &[u8] = match exit {
            Exit::Port { write: true, .. } | Exit::Mmio { write: true, .. } => {
                self.cpus.one().data()
            }
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
            let mut devices = lock(&self.devices);
            let vector = devices.acknowledge_interrupt();
            drop(devices);
            self.cpus.one().inject(vector)?;
            self.injectable = false;
        }
        Ok(())
    }

    fn access(&mut self, exit: Exit) -> Phase {
        let effect = match exit {
            Exit::Port { .. } | Exit::Mmio { .. } => {
                let data = self.cpus.one().data();
                touch(&mut lock(&self.devices), &self.ram, exit, data)
            }
            Exit::Hlt => {
                if self.deliverable() {
                    return Phase::Ready;
                }
                if self.cpus.one().ready_for_interrupt() {
                    return Phase::HltInstruction;
                }
                self.end_of_guest("a halt with interrupts off")
            }
            // A guest that asks for time this way is told 0.
            Exit::ReadMsr { .. } => {
                self.cpus.one().answer_msr(0, false);
                Effect::Done
            }
            Exit::WriteMsr { index, value } => {
                self.cpus.one().answer_msr(value, false);
                lock(&self.devices).write_msr(&self.ram, index, value)
            }
            // How Linux resets a machine that knows no other way. Where a reset ends the machine it is told as what it mostly is: the board
            // has two ways to ask for one.
            Exit::Shutdown if self.halts_for_good && self.starts_anew() => Effect::Reset,
            Exit::Shutdown => self.crashed("a triple fault"),
            Exit::Interrupted | Exit::Debug => Effect::Done,
        };
        match effect {
            Effect::Done => Phase::Ready,
            Effect::Needs(need) => Phase::Needs(need),
            Effect::Halt => Phase::Halted,
            Effect::PowerOff(status) => Phase::Off(status),
            Effect::Reset if self.starts_anew() => Phase::Reset,
            Effect::Reset => {
                lock(&self.devices).turn_off(0);
                Phase::Off(0)
            }
            Effect::Crash => Phase::Crashed,
        }
    }

    /// Whether a guest that resets the machine starts anew.
    fn starts_anew(&self) -> bool {
        self.again.as_ref().is_some_and(Reset::wanted)
    }

    /// What it means that the guest can never run again.
    fn end_of_guest(&mut self, why: &str) -> Effect {
        if self.halts_for_good {
            lock(&self.devices).turn_off(0)
        } else {
            self.crashed(why)
        }
    }

    fn crashed(&mut self, why: &str) -> Effect {
        // After a triple fault they are a reset CPU's.
        let regs = self.cpus.one().regs();
        tracing::error!(
            position = self.position.0,
            rip = format_args!("{:#x}", regs.rip),
            rsp = format_args!("{:#x}", regs.rsp),
            rflags = format_args!("{:#x}", regs.rflags),
            "the guest crashed: {why}"
        );
        Effect::Crash
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
            if let Some(rdx) = lock(&self.devices).answer(input, self.cpus.one().data())? {
                self.cpus.one().set_rdx(rdx);
            }
            if let Input::Clock(now) = input {
                lock(&self.devices).show_time(&self.ram, *now, self.clock_keeping);
            }
            self.phase = Phase::Ready;
            return Ok(());
        }
        let fits = match input {
            Input::Clock(_) => self.injectable && lock(&self.devices).shows_time(),
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
            lock(&self.devices).show_time(&self.ram, *now, self.clock_keeping);
            return Ok(());
        }
        let mut devices = lock(&self.devices);
        devices.apply(&self.ram, input)?;
        if let Some(crew) = self.cpus.crew() {
            crew.interrupt(&mut devices)?;
        }
        drop(devices);
        if self.phase == Phase::HltInstruction && self.deliverable() {
            self.phase = Phase::Ready;
        }
        Ok(())
    }

    /// Turns the machine off where it stands, with this status: the same as if its guest had done it, and an output as then.
    pub fn turn_off(&mut self, status: u8) {
        lock(&self.devices).turn_off(status);
        self.phase = Phase::Off(status);
        if let Some(crew) = self.cpus.crew() {
            crew.set_off(Some(status));
        }
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
        let cpu = if let Some(crew) = self.cpus.crew() {
            format!("{:?}", crew.state()?)
        } else {
            if self.phase == Phase::Ready && self.position != Position(0) {
                self.deliver()?;
                self.cpus.one().finish()?;
            }
            format!("{:?}", self.cpus.one().state()?)
        };
        Ok(xxh3_64_with_seed(
            cpu.as_bytes(),
            lock(&self.devices).digest(),
        ))
    }
}

/// Hands an access to the devices.
fn touch(devices: &mut Devices, ram: &GuestRam, exit: Exit, data: &mut [u8]) -> Effect {
    let (bus, address, size, write) = match exit {
        Exit::Port {
            port, size, write, ..
        } => (Bus::Port, u64::from(port), usize::from(size), write),
        Exit::Mmio { address, write, .. } => (Bus::Mmio, address, data.len(), write),
        _ => return Effect::Done,
    };
    let mut effect = Effect::Done;
    let mut elements = data.chunks_exact_mut(size.max(1));
    for element in &mut elements {
        effect = if write {
            devices.write(ram, bus, address, element)
        } else {
            devices.read(ram, bus, address, element)
        };
        // A string instruction on a register that needs an input would need several: answer one.
        if effect != Effect::Done {
            break;
        }
    }
    if !write {
        // The rest of them read 0, and not what an older KVM left there from another exit, which two machines need not have had.
        elements.for_each(|element| element.fill(0));
    }
    effect
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
