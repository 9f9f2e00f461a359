//! The machine's parts as a checkpoint takes and puts them, and the log of the pages that were written.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use super::crew::{Company, Crew};
use super::{Cpus, Machine, MachineError, Phase, lock};
use crate::devices::{BadDevices, Devices};
use crate::digest::Digest;
use crate::kvm::{BadCpuState, BadCrewState, CpuState, CrewState};
use crate::memory::{Consumer, DirtyPages, GuestRam, MemoryHash, PageNumber};
use crate::position::Position;

/// A part of a sweep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Pages that were written.
    pub pages: DirtyPages,
    /// The sweep has come to this page. None: to the end.
    pub next: Option<PageNumber>,
}

/// The state of all CPUs, of this machine's kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Processors {
    /// Of the one that goes from sync point to sync point.
    One(Box<CpuState>),
    /// Of those with threads of their own.
    Crew(CrewState),
}

/// Why bytes are no state of this machine's CPUs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadProcessors {
    /// Of one.
    #[error(transparent)]
    One(#[from] BadCpuState),
    /// Of several.
    #[error(transparent)]
    Crew(#[from] BadCrewState),
}

impl Machine {
    /// Guest memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Guest memory, for a thread that reads it while the guest runs: what it reads may be torn, and the dirty log says so.
    #[must_use]
    pub fn shared_ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    /// Pages of guest memory.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ram.pages()
    }

    /// Whether its vCPUs have threads of their own and KVM's interrupt controller; then it has no sync points, and inputs may be handed
    /// in at any time.
    #[must_use]
    pub fn has_crew(&self) -> bool {
        self.cpus.crew().is_some()
    }

    /// Makes of a sync point, from which the guest is about to run on, a place between two instructions: an interrupt that is due is
    /// delivered, as the next step would do it, no more inputs are taken here, and the exit's instruction is completed. In this
    /// order: where the instruction is complete the guest may take an interrupt that it would not have taken before, and a machine
    /// that was not stopped here would differ.
    pub(crate) fn stand_to_run(&mut self) -> Result<(), MachineError> {
        self.deliver()?;
        self.injectable = false;
        Ok(self.cpus.one().finish()?)
    }

    /// The state of the one vCPU as it is now, for a debugger.
    pub(crate) fn cpu(&mut self) -> Result<CpuState, MachineError> {
        Ok(self.cpus.one().state()?)
    }

    /// Starts the threads of such vCPUs, which stand; each begins with `first`. Does nothing where there are none.
    ///
    /// # Errors
    /// [`MachineError::Threads`].
    pub fn man(&mut self, first: impl Fn() + Clone + Send + 'static) -> Result<(), MachineError> {
        match &mut self.cpus {
            Cpus::One(_) => Ok(()),
            Cpus::Crew(crew) => crew.man(first).map_err(MachineError::Threads),
        }
    }

    /// Whom vCPUs with threads of their own turn to for the time, and when there is something to take. Before they first run.
    pub fn accompany(&self, company: Arc<dyn Company>) {
        if let Some(crew) = self.cpus.crew() {
            crew.accompany(company);
        }
    }

    /// vCPUs with threads of their own run, unless the guest is off.
    pub fn go(&mut self) {
        if let Cpus::Crew(crew) = &mut self.cpus {
            crew.go();
        }
    }

    /// They stand when this returns, each between two instructions.
    ///
    /// # Errors
    /// [`MachineError::Runaway`].
    pub fn stand(&mut self) -> Result<(), MachineError> {
        match &mut self.cpus {
            Cpus::One(_) => Ok(()),
            Cpus::Crew(crew) => crew.stand(),
        }
    }

    /// How long it took them to stand, the last time; nothing where there are none.
    #[must_use]
    pub fn stand_took(&self) -> Duration {
        self.cpus.crew().map_or(Duration::ZERO, Crew::stand_took)
    }

    /// Whether nothing of the guest runs now.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.cpus.crew().is_none_or(Crew::stands)
    }

    /// Whether vCPUs with threads of their own have ended, one way or another.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.cpus.crew().is_some_and(Crew::is_over)
    }

    /// Whether a vCPU with a thread of its own cannot go on; told once.
    ///
    /// # Errors
    /// [`MachineError::Kvm`]: why.
    pub fn check_crew(&self) -> Result<(), MachineError> {
        match self.cpus.crew().and_then(Crew::failure) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// The state of all CPUs between two instructions: one that an exit left unfinished is completed.
    pub(crate) fn settled_cpus(&mut self) -> Result<Vec<u8>, MachineError> {
        match &mut self.cpus {
            Cpus::One(vcpu) => {
                vcpu.finish()?;
                Ok(vcpu.state()?.to_bytes())
            }
            Cpus::Crew(crew) => {
                crew.stand()?;
                Ok(crew.state()?.to_bytes())
            }
        }
    }

    /// Their state at the exit where the guest waits. The instruction is not complete, and the registers are those before
    /// it: KVM hands a read's value to its register when it completes the read.
    pub(crate) fn cpus_at_exit(&mut self) -> Result<Vec<u8>, MachineError> {
        match &self.cpus {
            Cpus::One(vcpu) => Ok(vcpu.state()?.to_bytes()),
            Cpus::Crew(_) => self.settled_cpus(),
        }
    }

    /// Their state out of a checkpoint's bytes.
    pub(crate) fn processors(&self, bytes: &[u8]) -> Result<Processors, BadProcessors> {
        Ok(match &self.cpus {
            Cpus::One(_) => Processors::One(Box::new(CpuState::from_bytes(bytes)?)),
            Cpus::Crew(crew) => Processors::Crew(CrewState::from_bytes(bytes, crew.shape())?),
        })
    }

    /// Gives it to KVM. Several go on as if so much time had passed since it was taken; one is told the time by its devices.
    pub(crate) fn restore_cpus(
        &mut self,
        cpus: &Processors,
        passed: Duration,
    ) -> Result<(), MachineError> {
        match (&mut self.cpus, cpus) {
            (Cpus::One(vcpu), Processors::One(state)) => Ok(vcpu.restore(state)?),
            (Cpus::Crew(crew), Processors::Crew(state)) => Ok(crew.restore(state, passed)?),
            _ => unreachable!("a state is made by the machine that takes it"),
        }
    }

    pub(crate) fn save_devices(&self) -> Vec<u8> {
        lock(&self.devices).save()
    }

    /// The devices as they are if the access that waits for its answer has not been made.
    pub(crate) fn save_devices_before_access(&self) -> Vec<u8> {
        lock(&self.devices).before_access().save()
    }

    pub(crate) fn restored_devices(&self, bytes: &[u8]) -> Result<Devices, BadDevices> {
        lock(&self.devices).restored(bytes)
    }

    pub(crate) fn restore_rest(
        &mut self,
        position: Position,
        digest: Digest,
        injectable: bool,
        phase: Phase,
        devices: Devices,
    ) {
        self.position = position;
        self.digest = digest;
        self.phase = phase;
        self.injectable = injectable;
        *lock(&self.devices) = devices;
        if let Some(crew) = self.cpus.crew() {
            crew.set_exits(position.0);
            crew.set_off(match phase {
                Phase::Off(status) => Some(status),
                _ => None,
            });
        }
    }

    /// Whether a guest that was kicked where it is now would take an interrupt here.
    pub fn preemptible(&mut self) -> bool {
        self.phase == Phase::Ready && self.cpus.one().ready_for_interrupt()
    }

    /// Whether an interrupt is pending that the next step does not deliver.
    pub fn owes_interrupt(&mut self) -> bool {
        let pending = lock(&self.devices).interrupt_pending();
        pending && !self.deliverable()
    }

    /// A checkpoint is taken here, between two sync points: from now on inputs may be handed in as at one.
    pub fn stop_between(&mut self) {
        self.injectable = true;
    }

    /// Has KVM note the pages that the guest writes; whoever needs them first would do it too. A machine that is replicated
    /// does it before it runs: KVM waits for every CPU of the host to pass a quiet moment, which was seen to take more than
    /// two seconds on a busy one, and meanwhile a guest stands still and a backup looks wedged.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn watch_memory(&mut self) -> Result<(), MachineError> {
        if !self.watched {
            self.vm.track_dirty(&self.ram, true)?;
            self.watched = true;
        }
        Ok(())
    }

    /// Begins to note the pages that are written, for checkpoints: what is written from now on is in the next
    /// [`Machine::take_changed`]. Does nothing if it has begun.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn track_changes(&mut self) -> Result<(), MachineError> {
        if !self.written.has(Consumer::Checkpoint) {
            self.track(Consumer::Checkpoint)?;
        }
        Ok(())
    }

    /// The pages written since it was last asked or [`Machine::track_changes`] began; and, once pages are left open, those, written or not.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn take_changed(&mut self) -> Result<DirtyPages, MachineError> {
        match self.closing.take() {
            Some(closing) if self.vm.is_cleared_by_hand() => self.harvest_but_open(&closing)?,
            _ => self.harvest()?,
        }
        Ok(self.written.take(Consumer::Checkpoint))
    }

    /// In the next [`Machine::take_changed`] pages are *left open* that were in the one before as well: KVM does not note their next write, which would
    /// be a fault, and takes them for written until they are closed. So a guest pays for the pages that it writes all the time once and not in each interval.
    /// These pages are closed: who compares them has found that they were not written after all.
    pub fn leave_open(&mut self, but: impl IntoIterator<Item = PageNumber>) {
        self.closing = Some(but.into_iter().collect());
    }

    /// Begins to note the pages that are written, for a copy of the running machine. The first sweep begins with all that was
    /// ever written.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn track_for_copy(&mut self) -> Result<(), MachineError> {
        self.watch_memory()?;
        self.sweep = None;
        self.written.open(Consumer::Copy);
        Ok(())
    }

    /// Goes on with a sweep over the pages that were written before it began, or begins one: so many pages at once, as the guest
    /// stands for about a microsecond for each.
    ///
    /// A page is whole in the copy if it is read after it was swept and is not swept again.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn sweep_uncopied(&mut self, pages: usize) -> Result<Swept, MachineError> {
        let (dirty, from) = match self.sweep.take() {
            Some(sweep) => sweep,
            None => {
                self.written.note(&self.ram.take_dirty());
                (self.vm.dirty()?, PageNumber(0))
            }
        };
        if !self.vm.is_cleared_by_hand() {
            // They were cleared as they were read.
            self.written.note(&dirty);
            return Ok(Swept {
                pages: self.written.take(Consumer::Copy),
                next: None,
            });
        }
        let (part, next) = dirty.part(from, pages);
        self.vm.clear_dirty(&part, from)?;
        // After they were cleared: one that another consumer has cleared and read meanwhile may have been written again.
        self.written.note(&part);
        self.sweep = next.map(|next| (dirty, next));
        Ok(Swept {
            pages: self.written.take(Consumer::Copy),
            next,
        })
    }

    /// The pages written since they were last swept, all at once.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn take_uncopied(&mut self) -> Result<DirtyPages, MachineError> {
        self.sweep = None;
        self.harvest()?;
        Ok(self.written.take(Consumer::Copy))
    }

    /// No copy is being made any more.
    pub fn end_copy(&mut self) {
        self.sweep = None;
        self.written.close(Consumer::Copy);
    }

    /// Tells this consumer what is written from now on.
    fn track(&mut self, consumer: Consumer) -> Result<(), MachineError> {
        self.watch_memory()?;
        // What was written before belongs to the consumers before.
        self.harvest()?;
        self.written.open(consumer);
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), MachineError> {
        let mut dirty = self.vm.take_dirty()?;
        dirty.merge(&self.ram.take_dirty());
        self.written.note(&dirty);
        Ok(())
    }

    /// The same, and pages that were in the last one as well are not cleared in KVM's log: so they are in all that come, for every consumer, until they are.
    fn harvest_but_open(&mut self, closing: &DirtyPages) -> Result<(), MachineError> {
        let mut dirty = self.vm.dirty()?;
        let written = dirty.clone().without(closing);
        let open = written.and(&self.last_written);
        self.vm
            .clear_dirty(&dirty.clone().without(&open), PageNumber(0))?;
        self.last_written = written;
        dirty.merge(&self.ram.take_dirty());
        self.written.note(&dirty);
        Ok(())
    }

    /// Hash of the whole memory now. The first call reads all of it, later ones read what changed since.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn memory_hash(&mut self) -> Result<u64, MachineError> {
        if let Some(mut hash) = self.memory_hash.take() {
            self.harvest()?;
            let dirty = self.written.take(Consumer::Hash);
            hash.update(&self.ram, &dirty)?;
            return Ok(self.memory_hash.insert(hash).value());
        }
        self.track(Consumer::Hash)?;
        let hash = MemoryHash::full(&self.ram)?;
        Ok(self.memory_hash.insert(hash).value())
    }

    /// Hash of the whole memory, read in full.
    ///
    /// # Errors
    /// [`MachineError::Memory`].
    pub fn memory_hash_full(&self) -> Result<u64, MachineError> {
        Ok(MemoryHash::full(&self.ram)?.value())
    }
}
