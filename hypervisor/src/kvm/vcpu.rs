//! The vCPU: run to an exit, answer it, inject, read and set its state.

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::sync::Once;
use std::sync::atomic::{Ordering, compiler_fence};

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, kvm_fpu, kvm_guest_debug, kvm_interrupt, kvm_regs, kvm_run, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::state::{self, CpuState};
use super::{Exit, KvmError, crew};

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`: `kvm-ioctls` has no wrapper for it.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;

/// Bytes KVM can hand over in one port exit: a page, as `KVM_PIO_PAGE_OFFSET` says.
const PORT_DATA_MAX: usize = 4096;

/// Addresses that an x86 can watch at once: DR0 to DR3.
pub const STOPS_MAX: usize = 4;

/// How a guest is stopped at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stops {
    /// By the CPU's debug registers.
    InRegisters,
    /// By an HLT in memory.
    InMemory,
}

thread_local! {
    /// The run page of the vCPU that this thread runs, for the signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
    /// This thread was kicked while it ran no vCPU: its next run ends at once.
    static KICKED: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn on_kick(_: libc::c_int) {
    RUN_PAGE.with(|page| {
        let run = page.get();
        if run.is_null() {
            KICKED.with(|kicked| kicked.set(true));
        } else {
            // SAFETY: the pointer is set only while this thread is inside `Vcpu::run`, whose vCPU keeps the page mapped.
            unsafe { std::ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
        }
    });
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only touches a thread-local cell and the run page; `action` is fully initialised.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut());
        }
    });
}

/// Makes a vCPU thread leave the guest. Cheap to copy to any thread.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Kick {
    /// Kicks the calling thread's vCPU.
    #[must_use]
    pub fn this_thread() -> Self {
        install_kick_handler();
        // SAFETY: getpid and gettid always succeed.
        unsafe {
            Self {
                process: libc::getpid(),
                thread: libc::gettid(),
            }
        }
    }

    /// Ends the thread's current or next KVM_RUN with [`Exit::Interrupted`]. Does nothing once the thread has ended.
    pub fn kick(self) {
        // SAFETY: tgkill with a thread of this process; a thread that has ended gives ESRCH.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, kick_signal()) };
    }
}

/// What a read exit waits for.
#[derive(Clone, Copy, Debug)]
enum DataAt {
    Nothing,
    Port { offset: usize, len: usize },
    Mmio { len: usize },
}

/// What the state of several is read from and written to.
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuParts<'a> {
    pub(super) fd: &'a VcpuFd,
    pub(super) msrs: &'a [u32],
    pub(super) quiet: &'a [u32],
}

/// A vCPU of a machine.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    data_at: DataAt,
    /// The last run ended in an exit whose instruction KVM completes at the next run.
    unfinished: bool,
    /// The exit that completing the one before led to: the next run ends in it.
    ahead: Option<Exit>,
    /// The MSRs of the state, and those that are in it where they are not 0.
    msrs: Vec<u32>,
    quiet: Vec<u32>,
    /// Of two of them only the lower half.
    halves_sysenter: bool,
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd) -> Result<Self, KvmError> {
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        let mut vcpu = Self::with(fd, &[])?;
        vcpu.halves_sysenter = state::halves_sysenter(&vcpu.fd, &vcpu.msrs)?;
        Ok(vcpu)
    }

    /// One of several. Nobody looks at its registers at an exit.
    pub(super) fn of_crew(fd: VcpuFd) -> Result<Self, KvmError> {
        Self::with(fd, crew::MSRS)
    }

    fn with(fd: VcpuFd, more: &[u32]) -> Result<Self, KvmError> {
        install_kick_handler();
        let msrs = state::supported_msrs(&fd, more)?;
        let quiet = state::quiet_msrs(&fd, &msrs)?;
        Ok(Self {
            fd,
            data_at: DataAt::Nothing,
            unfinished: false,
            ahead: None,
            msrs,
            quiet,
            halves_sysenter: false,
        })
    }

    /// Runs the guest to its next exit.
    ///
    /// # Errors
    /// [`KvmError::Stopped`] when KVM cannot run this guest any further, [`KvmError::Call`] when the call failed.
    pub fn run(&mut self) -> Result<Exit, KvmError> {
        if let Some(exit) = self.ahead.take() {
            return Ok(exit);
        }
        let run: *mut kvm_run = self.fd.get_kvm_run();
        RUN_PAGE.with(|page| page.set(run));
        // A kick so far is noted, one from here on goes to the run page.
        compiler_fence(Ordering::SeqCst);
        if KICKED.with(|kicked| kicked.replace(false)) {
            self.fd.set_kvm_immediate_exit(1);
        }
        let outcome = self.fd.run().map(|_| ());
        RUN_PAGE.with(|page| page.set(std::ptr::null_mut()));
        self.data_at = DataAt::Nothing;
        self.unfinished = outcome.is_ok();
        let run = self.fd.get_kvm_run();
        if let Err(error) = outcome {
            return match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    run.immediate_exit = 0;
                    Ok(Exit::Interrupted)
                }
                errno => Err(KvmError::Call {
                    call: "KVM_RUN",
                    source: std::io::Error::from_raw_os_error(errno),
                }),
            };
        }
        // SAFETY (all union reads below): the exit reason says which member the kernel filled in.
        let exit = match run.exit_reason {
            KVM_EXIT_IO => {
                // SAFETY: see above.
                let io = unsafe { run.__bindgen_anon_1.io };
                let len = usize::from(io.size) * io.count as usize;
                if len > PORT_DATA_MAX {
                    return Err(KvmError::Stopped {
                        why: format!("a port exit with {len} bytes"),
                    });
                }
                self.data_at = DataAt::Port {
                    offset: io.data_offset as usize,
                    len,
                };
                Exit::Port {
                    port: io.port,
                    size: io.size,
                    count: io.count,
                    write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                }
            }
            KVM_EXIT_MMIO => {
                // SAFETY: see above.
                let mmio = unsafe { run.__bindgen_anon_1.mmio };
                let len = (mmio.len as usize).min(8);
                self.data_at = DataAt::Mmio { len };
                Exit::Mmio {
                    address: mmio.phys_addr,
                    size: len as u8,
                    write: mmio.is_write != 0,
                }
            }
            KVM_EXIT_HLT => Exit::Hlt,
            KVM_EXIT_X86_RDMSR => Exit::ReadMsr {
                // SAFETY: see above.
                index: unsafe { run.__bindgen_anon_1.msr.index },
            },
            KVM_EXIT_X86_WRMSR => {
                // SAFETY: see above.
                let msr = unsafe { run.__bindgen_anon_1.msr };
                Exit::WriteMsr {
                    index: msr.index,
                    value: msr.data,
                }
            }
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            // Of a guest that lowered CR8, if it asks KVM and not the processor: the instruction is complete, and there is no interrupt controller here
            // that looks at priorities. Not every KVM makes one, so it is no sync point.
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => Exit::Interrupted,
            KVM_EXIT_DEBUG => Exit::Debug,
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: see above.
                let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
                let rip = self.regs().rip;
                return Err(KvmError::Stopped {
                    why: format!(
                        "KVM could not emulate the instruction at {rip:#x} (suberror {suberror}); \
                         in ring 0 some KVMs emulate integer instructions only"
                    ),
                });
            }
            reason => {
                return Err(KvmError::Stopped {
                    why: format!("exit reason {reason}, which no guest of ours should cause"),
                });
            }
        };
        Ok(exit)
    }

    /// The bytes of the current port or MMIO exit: what the guest wrote, or where its answer goes.
    pub fn data(&mut self) -> &mut [u8] {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        match self.data_at {
            DataAt::Nothing => &mut [],
            // SAFETY: the kernel placed `len` bytes (bounded in `run`) at this offset of the mapping; `&mut self` keeps
            // the slice alone.
            DataAt::Port { offset, len } => unsafe {
                std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), len)
            },
            // SAFETY: the last exit was an MMIO exit, so this member is the one in use.
            DataAt::Mmio { len } => unsafe { &mut (&mut (*run).__bindgen_anon_1.mmio.data)[..len] },
        }
    }

    /// Answers a filtered MSR access: a read with `value`, or a write; `fault` makes it a general protection fault.
    pub fn answer_msr(&mut self, value: u64, fault: bool) {
        let run = self.fd.get_kvm_run();
        // SAFETY: called at an MSR exit, where this member is the one in use; every bit pattern is valid for it.
        let msr = unsafe { &mut run.__bindgen_anon_1.msr };
        msr.data = value;
        msr.error = u8::from(fault);
    }

    /// General registers at the last exit.
    #[must_use]
    pub fn regs(&mut self) -> kvm_regs {
        self.fd.sync_regs_mut().regs
    }

    /// Changes RDX before the guest goes on: of a read of a time stamp, whose other half KVM puts into EAX when it completes the
    /// read. KVM takes the registers over before that.
    pub fn set_rdx(&mut self, value: u64) {
        self.fd.sync_regs_mut().regs.rdx = value;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Whether the guest would take an interrupt at this exit.
    pub fn ready_for_interrupt(&mut self) -> bool {
        let run = self.fd.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// Injects a vector; the guest takes it when it runs next.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn inject(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt {
            irq: u32::from(vector),
        };
        // SAFETY: the descriptor is a vCPU and the structure is what KVM_INTERRUPT takes.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) };
        if result != 0 {
            return Err(KvmError::Call {
                call: "KVM_INTERRUPT",
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(())
    }

    /// Runs one instruction. False if the guest went on instead: not every KVM can do this.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub fn single_step(&mut self) -> Result<bool, KvmError> {
        let set = |control| kvm_guest_debug {
            control,
            ..Default::default()
        };
        let on = set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
        let refused = KvmError::call("KVM_SET_GUEST_DEBUG");
        self.fd.set_guest_debug(&on).map_err(refused)?;
        let ran = self.fd.run().map(drop);
        let refused = KvmError::call("KVM_SET_GUEST_DEBUG");
        self.fd.set_guest_debug(&set(0)).map_err(refused)?;
        ran.map_err(KvmError::call("KVM_RUN"))?;
        Ok(self.fd.get_kvm_run().exit_reason == KVM_EXIT_DEBUG)
    }

    /// Has the guest stop after its next instruction, or before those at these addresses, at most four; with neither, not at all. The
    /// guest's own debug registers are not touched. Whether whoever asks has to put HLT at these addresses.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn debug(&self, step: bool, stops: &[u64]) -> Result<Stops, KvmError> {
        /// Of DR7: the bit that is always set, and for each address that it is on (exact, for all tasks), of one byte, executed.
        const ALWAYS: u64 = 1 << 10;
        let by = if state::is_emulated() {
            Stops::InMemory
        } else {
            Stops::InRegisters
        };
        let mut debug = kvm_guest_debug::default();
        if step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        if by == Stops::InRegisters {
            for (number, address) in stops.iter().take(STOPS_MAX).enumerate() {
                debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[number] = *address;
                debug.arch.debugreg[7] |= ALWAYS | 2 << (2 * number);
            }
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))?;
        Ok(by)
    }

    /// Has the guest go on at this instruction.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn set_instruction(&mut self, address: u64) -> Result<(), KvmError> {
        let regs = self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
        let regs = kvm_regs {
            rip: address,
            ..regs
        };
        self.fd
            .set_regs(&regs)
            .map_err(KvmError::call("KVM_SET_REGS"))
    }

    /// Lets KVM complete the instruction of the last exit without running another: [`Exit::Interrupted`], or what that instruction
    /// needs next, as one that crosses the end of a page does.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub fn go_no_further(&mut self) -> Result<Exit, KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let outcome = self.run();
        self.fd.set_kvm_immediate_exit(0);
        outcome
    }

    /// Whether the last run ended in an exit whose instruction is not complete.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// For the state of all.
    pub(super) fn parts(&self) -> VcpuParts<'_> {
        VcpuParts {
            fd: &self.fd,
            msrs: &self.msrs,
            quiet: &self.quiet,
        }
    }

    /// Lets KVM complete the instruction of the last exit without running another, so that the state is whole. Does nothing if that was
    /// done.
    ///
    /// # Errors
    /// As [`Vcpu::run`]; [`KvmError::MidInstruction`] if it takes another exit, in which the next run ends as if nobody had asked.
    pub fn finish(&mut self) -> Result<(), KvmError> {
        if self.unfinished && self.ahead.is_none() {
            match self.go_no_further()? {
                Exit::Interrupted => {}
                exit => self.ahead = Some(exit),
            }
        }
        match self.ahead {
            None => Ok(()),
            Some(_) => Err(KvmError::MidInstruction),
        }
    }

    /// The same where nothing of this state is of use any more: whatever the instruction still asks for is answered by what lies there.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub fn abandon(&mut self) -> Result<(), KvmError> {
        self.ahead = None;
        while self.unfinished {
            self.go_no_further()?;
        }
        Ok(())
    }

    /// The whole state: complete the last exit first.
    ///
    /// # Errors
    /// [`KvmError::Call`], [`KvmError::Msr`].
    pub fn state(&self) -> Result<CpuState, KvmError> {
        let mut state = state::read(&self.fd, &self.msrs, &self.quiet)?;
        if self.halves_sysenter {
            state.halve_sysenter();
        }
        Ok(state)
    }

    /// Makes this vCPU go on where the state was taken. What it was doing is forgotten: an exit whose instruction is not
    /// complete is completed first, or KVM would do that on top of the new state.
    ///
    /// # Errors
    /// [`KvmError::Call`], [`KvmError::Msr`]; the vCPU is then of no further use.
    pub fn restore(&mut self, state: &CpuState) -> Result<(), KvmError> {
        self.abandon()?;
        state::write(&self.fd, state, &self.quiet)?;
        // KVM takes it from here at each run.
        self.fd.get_kvm_run().cr8 = state.sregs.cr8;
        // Brings what KVM says of the state in the run page (registers, whether an interrupt fits) up to date.
        match self.go_no_further()? {
            Exit::Interrupted => Ok(()),
            other => Err(KvmError::Stopped {
                why: format!("putting a state in place made an exit: {other:?}"),
            }),
        }
    }

    /// System registers, to change and set before the first run.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))
    }

    /// Sets registers before the first run.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn set(&self, regs: &kvm_regs, sregs: &kvm_sregs, fpu: &kvm_fpu) -> Result<(), KvmError> {
        state::set_sregs(&self.fd, sregs)?;
        self.fd
            .set_regs(regs)
            .map_err(KvmError::call("KVM_SET_REGS"))?;
        self.fd.set_fpu(fpu).map_err(KvmError::call("KVM_SET_FPU"))
    }
}
