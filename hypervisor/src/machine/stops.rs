//! Where a debugger has the guest stop: by the CPU's own debug registers, or by HLT in the guest's memory while it runs.
//!
//! QEMU's software emulation of a CPU does not look at what VMRUN loads into DR7 (`helper_vmrun` in its `target/i386/tcg`), and lets no
//! hypervisor have the exception of an INT3 (`raise_interrupt2` there): a guest in an emulated host meets neither kind of
//! breakpoint. HLT always ends its run, in ring 0. It is in memory only while the vCPU runs: at every exit, and to whoever copies
//! memory or takes its hash, memory is as the guest has it.
#![forbid(unsafe_code)]

use super::{Machine, MachineError};
use crate::kvm::Stops;

/// HLT.
const BREAK: u8 = 0xf4;

/// One such place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StopAt {
    /// The guest's virtual address.
    pub(crate) address: u64,
    /// The physical one, if anything is mapped there now.
    pub(crate) physical: Option<u64>,
}

impl Machine {
    /// Has the guest stop after its next instruction, or before those at these places, at most four; with neither, not at all.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub(crate) fn debug(&mut self, step: bool, stops: &[StopAt]) -> Result<(), MachineError> {
        let addresses: Vec<_> = stops.iter().map(|stop| stop.address).collect();
        let by = self.cpus.one().debug(step, &addresses)?;
        self.stops.clear();
        // One step goes over the breakpoint that the guest stands at.
        if by == Stops::InMemory && !step {
            self.stops.extend_from_slice(stops);
        }
        Ok(())
    }

    /// Puts the breakpoints into memory; what was there, for [`Machine::lift`].
    pub(super) fn plant(&self) -> Result<Vec<(u64, u8)>, MachineError> {
        let mut planted = Vec::new();
        for at in self.stops.iter().filter_map(|stop| stop.physical) {
            let mut there = [0];
            self.ram.read(at, &mut there)?;
            self.ram.write(at, &[BREAK])?;
            planted.push((at, there[0]));
        }
        Ok(planted)
    }

    /// Memory as the guest has it.
    pub(super) fn lift(&self, planted: &[(u64, u8)]) -> Result<(), MachineError> {
        for &(at, byte) in planted.iter().rev() {
            self.ram.write(at, &[byte])?;
        }
        Ok(())
    }

    /// Whether the HLT that the guest has just met is such a breakpoint; then it stands before it.
    pub(super) fn met_stop(&mut self) -> Result<bool, MachineError> {
        let before = self.cpus.one().regs().rip.wrapping_sub(1);
        let met = self.stops.iter().any(|stop| stop.address == before);
        if met {
            self.cpus.one().set_instruction(before)?;
        }
        Ok(met)
    }
}
