//! The virtual machine: memory slot, MSR filter, what the host must offer.

use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_clear_dirty_log, kvm_enable_cap,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::crew::{self, CrewState, Shape};
use super::{CpuModel, KvmError, Told, Vcpu, deterministic_cpuid, host_cpu, msr, state};
use crate::memory::{DirtyPages, GuestRam, PAGE_SIZE, PageNumber};

const RAM_SLOT: u32 = 0;
/// Where KVM may put its three scratch pages on Intel; above every window of ours and below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Where the KVM descriptor comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmSource {
    /// Open this path, normally `/dev/kvm`.
    Path(PathBuf),
    /// A descriptor that was opened before privileges were dropped.
    Inherited(RawFd),
}

impl Default for KvmSource {
    fn default() -> Self {
        Self::Path(PathBuf::from("/dev/kvm"))
    }
}

impl KvmSource {
    /// Opens KVM and checks that it is one we can use.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn open(&self) -> Result<Kvm, KvmError> {
        let kvm = match self {
            Self::Path(path) => {
                let shown = path.display().to_string();
                let c_path =
                    std::ffi::CString::new(shown.clone()).map_err(|_| KvmError::NoDevice {
                        path: shown.clone(),
                    })?;
                Kvm::new_with_path(&c_path).map_err(|error| match error.errno() {
                    libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::NoDevice { path: shown },
                    libc::EACCES | libc::EPERM => KvmError::NoPermission { path: shown },
                    errno => KvmError::Call {
                        call: "open",
                        source: std::io::Error::from_raw_os_error(errno),
                    },
                })?
            }
            Self::Inherited(fd) => {
                // SAFETY: fcntl only inspects the descriptor; a bad one gives an error.
                let copy = unsafe { libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 3) };
                if copy < 0 {
                    return Err(KvmError::Call {
                        call: "the inherited descriptor",
                        source: std::io::Error::last_os_error(),
                    });
                }
                // SAFETY: `copy` is a fresh descriptor that nothing else owns.
                unsafe { Kvm::from_raw_fd(copy) }
            }
        };
        if kvm.get_api_version() != 12 {
            return Err(KvmError::Missing {
                what: "API version 12",
            });
        }
        Ok(kvm)
    }
}

/// The CPU of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The host's.
    pub model: CpuModel,
    /// What its guest is told of it.
    pub told: Told,
}

/// What this KVM offers beyond what [`Vm::new`] needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Capabilities {
    /// What we cannot do without and this KVM has not.
    pub missing: Vec<&'static str>,
    /// Ring of dirty pages (KVM_CAP_DIRTY_LOG_RING): entries, 0 if there is none.
    pub dirty_ring: u32,
    /// Debugging by hardware or single steps (KVM_CAP_SET_GUEST_DEBUG).
    pub guest_debug: bool,
    /// Scaling of the guest's time-stamp counter (KVM_CAP_TSC_CONTROL), for guests that use it.
    pub tsc_scaling: bool,
    /// vCPUs that it recommends at most.
    pub vcpus: usize,
    /// What a guest with KVM's own interrupt controller (`--cpu host`) needs and this KVM has not.
    pub no_crew: Vec<&'static str>,
    /// A guest's time-stamp counter is really moved where a host takes over that is behind the one before.
    pub moves_time_stamps: bool,
}

/// What a machine with KVM's own interrupt controller takes.
const FOR_CREWS: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::PitState2, "a timer (KVM_CAP_PIT_STATE2)"),
    (
        Cap::AdjustClock,
        "a clock that can be set (KVM_CAP_ADJUST_CLOCK)",
    ),
    (Cap::MpState, "states of several vCPUs (KVM_CAP_MP_STATE)"),
    (Cap::Xsave, "extended states (KVM_CAP_XSAVE)"),
    (Cap::Xcrs, "extended control registers (KVM_CAP_XCRS)"),
];

impl Capabilities {
    /// Asks.
    #[must_use]
    pub fn of(kvm: &Kvm) -> Self {
        let missing = [
            (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
            (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
        ]
        .into_iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, what)| what)
        .collect();
        Self {
            missing,
            dirty_ring: u32::try_from(kvm.check_extension_int(Cap::DirtyLogRing)).unwrap_or(0),
            guest_debug: kvm.check_extension(Cap::SetGuestDebug),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            vcpus: kvm.get_nr_vcpus(),
            no_crew: FOR_CREWS
                .into_iter()
                .filter(|(cap, _)| !kvm.check_extension(*cap))
                .map(|(_, what)| what)
                .collect(),
            moves_time_stamps: made(|| kvm.create_vm())
                .and_then(|vm| vm.create_vcpu(0))
                .is_ok_and(|vcpu| crew::moves_time_stamps(&vcpu)),
        }
    }
}

/// Makes a virtual machine, whatever signals come: KVM takes all locks of this process's memory for it, and gives up where one is pending. To be stopped
/// and let go on is enough for that, and when the call returns it is over.
fn made<T>(
    mut create: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match create() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made,
        }
    }
}

/// One virtual machine with its memory in slot 0.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    kvm: Kvm,
    ram_size: usize,
    /// KVM begins to note a page anew when it is told to, not when the log is read.
    cleared_by_hand: bool,
}

/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
const MANUAL_PROTECT: u64 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;

impl Vm {
    /// Creates a machine whose memory is `ram`, without any in-kernel interrupt controller or timer.
    ///
    /// The memory must outlive the machine; `Machine` owns both and drops the machine first.
    ///
    /// # Errors
    /// [`KvmError::Missing`] for a capability this KVM has not, [`KvmError::Call`] otherwise.
    pub fn new(kvm: Kvm, ram: &GuestRam) -> Result<Self, KvmError> {
        let vm = Self::bare(kvm, ram)?;
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        cap.args[0] = u64::from(KVM_MSR_EXIT_REASON_FILTER);
        vm.fd.enable_cap(&cap).map_err(|_| KvmError::Missing {
            what: "KVM_CAP_X86_USER_SPACE_MSR",
        })?;
        msr::with_filter(|default, ranges| vm.fd.set_msr_filter(default, ranges))
            .map_err(KvmError::call("KVM_X86_SET_MSR_FILTER"))?;
        Ok(vm)
    }

    /// The same with KVM's own interrupt controllers and timer, for a guest that has the host's CPU.
    ///
    /// # Errors
    /// As for [`Vm::new`].
    pub fn with_controllers(kvm: Kvm, ram: &GuestRam) -> Result<Self, KvmError> {
        if let Some((_, what)) = FOR_CREWS.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::NoControllers { what });
        }
        let vm = Self::bare(kvm, ram)?;
        // Before there is a vCPU: its counters are no part of a checkpoint. A KVM that cannot take them away hides them at least.
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        cap.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
        let _ = vm.fd.enable_cap(&cap);
        vm.fd
            .create_irq_chip()
            .map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;
        // The port of the speaker is the timer's, too.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.fd
            .create_pit2(pit)
            .map_err(KvmError::call("KVM_CREATE_PIT2"))?;
        Ok(vm)
    }

    fn bare(kvm: Kvm, ram: &GuestRam) -> Result<Self, KvmError> {
        for (cap, what) in [
            (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing { what });
            }
        }
        let fd = made(|| kvm.create_vm()).map_err(KvmError::call("KVM_CREATE_VM"))?;
        // AMD needs no TSS page and some KVMs refuse the call: only Intel's real mode depends on it, which we never enter.
        let _ = fd.set_tss_address(TSS_ADDRESS);
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        cap.args[0] = MANUAL_PROTECT;
        let vm = Self {
            cleared_by_hand: fd.enable_cap(&cap).is_ok(),
            fd,
            kvm,
            ram_size: ram.size() as usize,
        };
        vm.set_memory(ram, false)?;
        Ok(vm)
    }

    fn set_memory(&self, ram: &GuestRam, log_dirty: bool) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: RAM_SLOT,
            flags: if log_dirty {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
            guest_phys_addr: 0,
            memory_size: ram.size(),
            userspace_addr: ram.host_address(),
        };
        // SAFETY: the region is one mapping of exactly this size, which outlives the machine (see `new`).
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Starts or stops the log of pages the guest writes.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn track_dirty(&self, ram: &GuestRam, on: bool) -> Result<(), KvmError> {
        self.set_memory(ram, on)
    }

    /// Takes the log of dirty pages since the last call. The guest stands for about a microsecond a page meanwhile.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn take_dirty(&self) -> Result<DirtyPages, KvmError> {
        let dirty = self.dirty()?;
        if self.cleared_by_hand {
            self.clear_dirty(&dirty, PageNumber(0))?;
        }
        Ok(dirty)
    }

    /// Whether reading the log leaves it as it is, until [`Vm::clear_dirty`].
    #[must_use]
    pub fn is_cleared_by_hand(&self) -> bool {
        self.cleared_by_hand
    }

    /// The log of dirty pages: those written since they were cleared; where that is not done by hand, since the last call.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn dirty(&self) -> Result<DirtyPages, KvmError> {
        self.fd
            .get_dirty_log(RAM_SLOT, self.ram_size)
            .map(DirtyPages::from_bitmap)
            .map_err(KvmError::call("KVM_GET_DIRTY_LOG"))
    }

    /// These pages, all at or after `from`, a multiple of 64, are noted again when they are next written.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn clear_dirty(&self, pages: &DirtyPages, from: PageNumber) -> Result<(), KvmError> {
        let bitmap = pages.bitmap_from(from);
        let most = (self.ram_size / PAGE_SIZE) as u64 - from.0;
        let count = (bitmap.len() as u64 * 64).min(most);
        if count == 0 {
            return Ok(());
        }
        let mut log = kvm_clear_dirty_log {
            slot: RAM_SLOT,
            num_pages: count as u32,
            first_page: from.0,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
        // SAFETY: the descriptor is a VM, the structure what the call takes; the kernel reads the bitmap, which covers so many
        // pages.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const log) };
        if done != 0 {
            return Err(KvmError::Call {
                call: "KVM_CLEAR_DIRTY_LOG",
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(())
    }

    /// Creates the one vCPU with the deterministic CPU template, which is told of these features of KVM's. It is told what `as_told` says
    /// where this host can tell that as well.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn create_vcpu(&self, features: u32, as_told: &Told) -> Result<(Vcpu, Cpu), KvmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
        let (own, model) = deterministic_cpuid(&supported, features)?;
        let theirs = as_told.in_place_of(own.as_slice());
        let cpuid = match theirs {
            Some(theirs) => CpuId::from_entries(&theirs).unwrap_or(own),
            None => own,
        };
        let fd = self
            .fd
            .create_vcpu(0)
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&cpuid)
            .map_err(KvmError::call("KVM_SET_CPUID2"))?;
        let told = Told::of(cpuid.as_slice());
        Ok((Vcpu::new(fd)?, Cpu { model, told }))
    }

    /// Creates so many vCPUs with the host's CPU, of a machine [with KVM's own controllers](Vm::with_controllers); as it is told elsewhere by `as_told`,
    /// where this host can tell that as well.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn create_crew(
        &self,
        count: u8,
        as_told: &Told,
    ) -> Result<(Vec<Vcpu>, Shape, Cpu), KvmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let (own, model) = host_cpu::ordinary(&supported, deadline, !state::is_emulated())?;
        let entries = as_told.in_place_of(&own).unwrap_or(own);
        let mut vcpus = Vec::with_capacity(count.into());
        for number in 0..count {
            let fd = self
                .fd
                .create_vcpu(number.into())
                .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(&host_cpu::of_vcpu(&entries, number)?)
                .map_err(KvmError::call("KVM_SET_CPUID2"))?;
            vcpus.push(Vcpu::of_crew(fd)?);
        }
        let shape = Shape {
            vcpus: count.into(),
            msrs: vcpus
                .first()
                .map_or(0, |vcpu| vcpu.parts().msrs.len() as u32),
            cpuid: host_cpu::hash(&entries),
        };
        let told = Told::of(&entries);
        Ok((vcpus, shape, Cpu { model, told }))
    }

    /// A fresh edge on this line of the interrupt controllers.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn pulse(&self, line: u8) -> Result<(), KvmError> {
        for level in [true, false] {
            self.fd
                .set_irq_line(line.into(), level)
                .map_err(KvmError::call("KVM_IRQ_LINE"))?;
        }
        Ok(())
    }

    /// The state of all vCPUs, which stand, and of what they share.
    ///
    /// # Errors
    /// [`KvmError::Call`], [`KvmError::Msr`].
    pub fn crew_state(&self, vcpus: &[&Vcpu], shape: Shape) -> Result<CrewState, KvmError> {
        let parts: Vec<_> = vcpus.iter().map(|vcpu| vcpu.parts()).collect();
        crew::read(&self.fd, &parts, shape)
    }

    /// Sets it, as it would be if so much time had passed.
    ///
    /// # Errors
    /// As for [`Vm::crew_state`]; the machine is then of no further use.
    pub fn set_crew_state(
        &self,
        vcpus: &[&Vcpu],
        state: &CrewState,
        passed: Duration,
    ) -> Result<(), KvmError> {
        let parts: Vec<_> = vcpus.iter().map(|vcpu| vcpu.parts()).collect();
        let scales = self.kvm.check_extension(Cap::TscControl);
        crew::write(&self.fd, &parts, state, passed, scales)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_no_reason_to_have_no_machine() {
        let interrupted = || Err(kvm_ioctls::Error::new(libc::EINTR));
        let mut answers = vec![Ok(7), interrupted(), interrupted()];
        assert_eq!(made(|| answers.pop().unwrap()), Ok(7));
        let mut answers = vec![
            Ok(7),
            Err(kvm_ioctls::Error::new(libc::ENOMEM)),
            interrupted(),
        ];
        let refused = made(|| answers.pop().unwrap()).unwrap_err();
        assert_eq!(refused.errno(), libc::ENOMEM);
    }
}
