//! What gdb sees of a machine: its registers when it stopped, its memory, and where it wants it to stop next.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::sync::Arc;

use gdbstub::common::Signal;
use gdbstub::outputln;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
    SingleThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::pages::Paging;
use crate::kvm::STOPS_MAX;
use crate::machine::{Machine, MachineError, StopAt};
use crate::memory::GuestRam;

/// How the guest goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Resume {
    /// To the next breakpoint.
    #[default]
    Continue,
    /// For one instruction.
    Step,
}

/// A machine as it was when it stopped.
#[derive(Debug)]
pub(super) struct View {
    ram: Arc<GuestRam>,
    registers: X86_64CoreRegs,
    paging: Paging,
    /// Of the sync point before.
    position: u64,
    digest: String,
    /// Where it is to stop.
    pub(super) stops: Vec<u64>,
    pub(super) resume: Resume,
}

impl View {
    pub(super) fn of(machine: &mut Machine) -> Result<Self, MachineError> {
        let mut view = Self {
            ram: machine.shared_ram(),
            registers: X86_64CoreRegs::default(),
            paging: Paging::default(),
            position: 0,
            digest: String::new(),
            stops: Vec::new(),
            resume: Resume::default(),
        };
        view.look(machine)?;
        Ok(view)
    }

    /// Takes in what the machine is now.
    pub(super) fn look(&mut self, machine: &mut Machine) -> Result<(), MachineError> {
        let cpu = machine.cpu()?;
        let (r, s, f) = (&cpu.regs, &cpu.sregs, &cpu.fpu);
        let to = &mut self.registers;
        to.regs = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        to.rip = r.rip;
        to.eflags = r.rflags as u32;
        to.segments.cs = s.cs.selector.into();
        to.segments.ss = s.ss.selector.into();
        to.segments.ds = s.ds.selector.into();
        to.segments.es = s.es.selector.into();
        to.segments.fs = s.fs.selector.into();
        to.segments.gs = s.gs.selector.into();
        for (st, from) in to.st.iter_mut().zip(&f.fpr) {
            st.copy_from_slice(&from[..10]);
        }
        to.fpu.fctrl = f.fcw.into();
        to.fpu.fstat = f.fsw.into();
        to.fpu.ftag = f.ftwx.into();
        to.fpu.fop = f.last_opcode.into();
        to.fpu.fioff = f.last_ip as u32;
        to.fpu.fooff = f.last_dp as u32;
        for (xmm, from) in to.xmm.iter_mut().zip(&f.xmm) {
            *xmm = u128::from_le_bytes(*from);
        }
        to.mxcsr = f.mxcsr;
        self.paging = Paging {
            cr0: s.cr0,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
        };
        self.position = machine.position().0;
        self.digest = machine.digest().to_string();
        Ok(())
    }

    /// Where it stands.
    pub(super) fn instruction(&self) -> u64 {
        self.registers.rip
    }

    fn physical(&self, address: u64) -> Option<u64> {
        self.paging
            .physical(address, |at| self.ram.read_obj(at).ok())
    }

    /// Where it is to stop, as the guest's memory is mapped now.
    pub(super) fn places(&self) -> Vec<StopAt> {
        let place = |&address: &u64| StopAt {
            address,
            physical: self.physical(address),
        };
        self.stops.iter().map(place).collect()
    }

    fn add_stop(&mut self, address: u64) -> bool {
        if !self.stops.contains(&address) {
            if self.stops.len() == STOPS_MAX {
                return false;
            }
            self.stops.push(address);
        }
        true
    }

    fn remove_stop(&mut self, address: u64) -> bool {
        let before = self.stops.len();
        self.stops.retain(|stop| *stop != address);
        self.stops.len() < before
    }
}

impl Target for View {
    type Arch = X86_64_SSE;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for View {
    fn read_registers(&mut self, registers: &mut X86_64CoreRegs) -> TargetResult<(), Self> {
        *registers = self.registers.clone();
        Ok(())
    }

    /// What happened is not changed.
    fn write_registers(&mut self, _: &X86_64CoreRegs) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        let mut read = 0;
        while read < data.len() {
            let address = start.wrapping_add(read as u64);
            let page_left = 0x1000 - (address & 0xfff) as usize;
            let end = data.len().min(read + page_left);
            let Some(physical) = self.physical(address) else {
                break;
            };
            if self.ram.read(physical, &mut data[read..end]).is_err() {
                break;
            }
            read = end;
        }
        if read == 0 && !data.is_empty() {
            return Err(TargetError::NonFatal);
        }
        Ok(read)
    }

    /// What happened is not changed.
    fn write_addrs(&mut self, _: u64, _: &[u8]) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadResume for View {
    fn resume(&mut self, _: Option<Signal>) -> Result<(), Self::Error> {
        self.resume = Resume::Continue;
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for View {
    fn step(&mut self, _: Option<Signal>) -> Result<(), Self::Error> {
        self.resume = Resume::Step;
        Ok(())
    }
}

impl Breakpoints for View {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

/// Of the same kind as the others.
impl SwBreakpoint for View {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add_stop(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_stop(address))
    }
}

impl HwBreakpoint for View {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add_stop(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_stop(address))
    }
}

impl MonitorCmd for View {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Self::Error> {
        match command {
            b"position" => outputln!(
                out,
                "after sync point {}, digest {}",
                self.position,
                self.digest
            ),
            b"paging" => outputln!(
                out,
                "cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                self.paging.cr0,
                self.paging.cr3,
                self.paging.cr4,
                self.paging.efer
            ),
            _ => outputln!(
                out,
                "monitor position: the last sync point and the digest over all exits up to there\n\
                 monitor paging: what the guest finds its memory by"
            ),
        }
        Ok(())
    }
}
