//! Everything of the vCPU that a guest can see, and its bytes in a checkpoint.
//!
//! Unsafe is here because KVM's structures are copied as the bytes they are: each is `repr(C)` without padding, and any
//! bit pattern is a value of it. What a pattern means KVM checks itself when it is set.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use super::KvmError;

/// Model-specific registers that a guest can change and read back, or that change what its instructions do. Those that tell
/// time are not here: no guest can reach them (see the filter). EFER and the segment bases travel with the system
/// registers. Which of them a KVM has is asked when the vCPU is made.
const MSRS: &[u32] = &[
    0x174,
    0x175,
    0x176, // SYSENTER_CS, _ESP, _EIP
    0x1a0, // MISC_ENABLE
    0x1d9, // DEBUGCTL
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f, // variable MTRRs
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f, // fixed MTRRs
    0x277, // PAT
    0x2ff, // MTRR_DEF_TYPE
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084, // STAR, LSTAR, CSTAR, SYSCALL_MASK
    0xc000_0102, // KERNEL_GS_BASE
];

/// Further ones, that hold nothing but what a guest has written there, which few ever do. Only those that are not 0 are in a checkpoint, and one that is
/// in none is 0: so nobody's checkpoint grows by them, and a KVM that lacks one takes the state of every guest that has not used it.
///
/// Of KVM_GET_MSR_INDEX_LIST (Linux 6.1 and 6.12) these are what is left when those are taken away that the CPU template or the filter keep from a guest,
/// that it can only read, or that tell time. The banks of machine checks are in no such list: nothing is ever reported there, as nobody injects a
/// machine check, and what a guest has written into their masks changes nothing.
pub(super) const QUIET: &[u32] = &[
    0x3a,        // FEAT_CTL: its lock
    0x48,        // SPEC_CTRL
    0x122,       // TSX_CTRL
    0x140,       // MISC_FEATURES_ENABLES: CPUID faults in ring 3
    0x17a,       // MCG_STATUS
    0x17b,       // MCG_CTL
    0x1fc,       // POWER_CTL
    0xc001_0015, // HWCR
    0xc001_0114, // VM_CR
    0xc001_0117, // VM_HSAVE_PA
    0xc001_011f, // VIRT_SPEC_CTRL
];

/// Everything of the vCPU that a guest can see.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers, without the interrupt bitmap.
    pub sregs: kvm_sregs,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// x87 and SSE: all there is, as the CPU template hides XSAVE and what needs it.
    pub fpu: kvm_fpu,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Model-specific registers: number and value. Of the quiet ones those that are not 0.
    pub msrs: Vec<(u32, u64)>,
}

/// Why bytes are no CPU state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{found} bytes are no CPU state: {expected} were expected")]
pub struct BadCpuState {
    /// Bytes there are.
    pub found: usize,
    /// Bytes there should be.
    pub expected: usize,
}

/// A structure that is the same thing as its bytes.
///
/// # Safety
/// `repr(C)`, no padding, and every bit pattern is a value.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: integers and arrays of them only; the sizes below are the sums of the fields' sizes.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_fpu {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}

const _: () = assert!(size_of::<kvm_regs>() == 18 * 8);
const _: () = assert!(size_of::<kvm_sregs>() == 8 * 24 + 2 * 16 + 7 * 8 + 32);
const _: () = assert!(size_of::<kvm_vcpu_events>() == 64);
const _: () = assert!(size_of::<kvm_fpu>() == 416);
const _: () = assert!(size_of::<kvm_debugregs>() == 128);

/// Bytes of the structures; the list of MSRs follows.
const FIXED: usize = size_of::<kvm_regs>()
    + size_of::<kvm_sregs>()
    + size_of::<kvm_vcpu_events>()
    + size_of::<kvm_fpu>()
    + size_of::<kvm_debugregs>();
/// Bytes of one MSR.
pub(super) const MSR: usize = 12;

pub(super) fn put<T: Plain>(bytes: &mut Vec<u8>, value: &T) {
    // SAFETY: `Plain` says that these are initialised bytes, and the borrow keeps them in place.
    bytes.extend_from_slice(unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    });
}

pub(super) fn take<T: Plain>(bytes: &mut &[u8]) -> T {
    let (head, rest) = bytes.split_at(size_of::<T>());
    *bytes = rest;
    // SAFETY: `head` is exactly as long as `T`, and `Plain` says that any bytes are a value; they may be unaligned.
    unsafe { head.as_ptr().cast::<T>().read_unaligned() }
}

impl CpuState {
    /// KVM's structures one after the other (registers, system registers, events, FPU, debug registers), then number (u32)
    /// and value (u64) of each MSR, all little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.msrs.len() * MSR);
        put(&mut bytes, &self.regs);
        put(&mut bytes, &self.sregs);
        put(&mut bytes, &self.events);
        put(&mut bytes, &self.fpu);
        put(&mut bytes, &self.debug);
        for (index, value) in &self.msrs {
            bytes.extend_from_slice(&index.to_le_bytes());
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`CpuState::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`BadCpuState`] for another number of bytes than such a state has.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadCpuState> {
        let msrs = bytes.len().saturating_sub(FIXED);
        if bytes.len() < FIXED || !msrs.is_multiple_of(MSR) || msrs / MSR > MSRS.len() + QUIET.len()
        {
            return Err(BadCpuState {
                found: bytes.len(),
                expected: FIXED + MSRS.len() * MSR,
            });
        }
        let mut rest = bytes;
        Ok(Self {
            regs: take(&mut rest),
            sregs: take(&mut rest),
            events: take(&mut rest),
            fpu: take(&mut rest),
            debug: take(&mut rest),
            msrs: msrs_of(rest).collect(),
        })
    }
}

/// The MSRs in these bytes: number (u32) and value (u64) of each.
pub(super) fn msrs_of(bytes: &[u8]) -> impl Iterator<Item = (u32, u64)> + '_ {
    bytes.chunks_exact(MSR).map(|msr| {
        let (index, value) = msr.split_at(4);
        let index = u32::from_le_bytes(index.try_into().expect("four bytes"));
        (
            index,
            u64::from_le_bytes(value.try_into().expect("eight bytes")),
        )
    })
}

pub(super) fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

pub(super) fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Missing {
        what: "room for a list of MSRs",
    })
}

/// Which of [`MSRS`] and of `more` this vCPU has.
pub(super) fn supported_msrs(fd: &VcpuFd, more: &[u32]) -> Result<Vec<u32>, KvmError> {
    let mut found = Vec::with_capacity(MSRS.len() + more.len());
    for &index in MSRS.iter().chain(more) {
        // A register that this KVM does not have is not read: the count is then 0.
        if matches!(fd.get_msrs(&mut list(&[entry(index, 0)])?), Ok(1)) {
            found.push(index);
        }
    }
    Ok(found)
}

/// Which of [`QUIET`] this vCPU has, without those that `others` has already. Before the first run: they are 0.
pub(super) fn quiet_msrs(fd: &VcpuFd, others: &[u32]) -> Result<Vec<u32>, KvmError> {
    let mut found = Vec::new();
    for &index in QUIET.iter().filter(|index| !others.contains(index)) {
        // One that does not begin at 0, or that can be read and not be set back, is none of them.
        let mut value = list(&[entry(index, 0)])?;
        let begins_at_0 = matches!(fd.get_msrs(&mut value), Ok(1)) && value.as_slice()[0].data == 0;
        if begins_at_0 && matches!(fd.set_msrs(&value), Ok(1)) {
            found.push(index);
        }
    }
    Ok(found)
}

/// The values of both kinds: all of the first, and those of the second that are not 0.
pub(super) fn read_both(
    fd: &VcpuFd,
    msrs: &[u32],
    quiet: &[u32],
) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = read_msrs(fd, &[msrs, quiet].concat())?;
    let mut number = 0;
    values.retain(|(_, value)| {
        number += 1;
        number <= msrs.len() || *value != 0
    });
    Ok(values)
}

/// Sets these values, and those of `quiet` that are not among them to 0.
pub(super) fn write_both(
    fd: &VcpuFd,
    values: impl Iterator<Item = (u32, u64)>,
    quiet: &[u32],
) -> Result<(), KvmError> {
    let mut entries: Vec<_> = quiet.iter().map(|&index| entry(index, 0)).collect();
    // One of them that is 0 by now is set a second time.
    entries.extend(values.map(|(index, value)| entry(index, value)));
    write_msrs(fd, &entries)
}

/// Where SYSENTER goes, and its stack.
const SYSENTER: [u32; 2] = [0x175, 0x176];

/// Whether KVM keeps only the lower half of [`SYSENTER`], as it does for a guest whose CPU is AMD's: there nothing uses the upper.
/// The CPU itself may keep what the guest writes, so one that was restored would differ in it. To be asked before the first run.
pub(super) fn halves_sysenter(fd: &VcpuFd, msrs: &[u32]) -> Result<bool, KvmError> {
    const WHOLE: u64 = 1 << 40;
    let probed = SYSENTER[0];
    if !msrs.contains(&probed) {
        return Ok(false);
    }
    write_msrs(fd, &[entry(probed, WHOLE)])?;
    let kept = read_msrs(fd, &[probed])?;
    write_msrs(fd, &[entry(probed, 0)])?;
    Ok(kept != [(probed, WHOLE)])
}

impl CpuState {
    /// Without the halves that a restored CPU has not.
    pub(super) fn halve_sysenter(&mut self) {
        for (index, value) in &mut self.msrs {
            if SYSENTER.contains(index) {
                *value &= u64::from(u32::MAX);
            }
        }
    }
}

/// Reads everything; the instruction of the last exit must be complete.
pub(super) fn read(fd: &VcpuFd, msrs: &[u32], quiet: &[u32]) -> Result<CpuState, KvmError> {
    Ok(CpuState {
        regs: fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?,
        sregs: system_registers(fd)?,
        events: pending_only(
            fd.get_vcpu_events()
                .map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?,
        ),
        fpu: get_fpu(fd)?,
        debug: fd
            .get_debug_regs()
            .map_err(KvmError::call("KVM_GET_DEBUGREGS"))?,
        msrs: read_both(fd, msrs, quiet)?,
    })
}

/// Without what KVM remembers of an exception or an interrupt that is over. That is no state of the guest, and two that do the same
/// differ in it: a page that the host has yet to provide, and that is touched as an exception is delivered, makes KVM take note of it.
fn pending_only(mut events: kvm_vcpu_events) -> kvm_vcpu_events {
    if events.exception.injected == 0 && events.exception.pending == 0 {
        events.exception.nr = 0;
        events.exception.has_error_code = 0;
        events.exception.error_code = 0;
        events.exception_has_payload = 0;
        events.exception_payload = 0;
    }
    if events.interrupt.injected == 0 {
        events.interrupt.nr = 0;
        events.interrupt.soft = 0;
    }
    events
}

pub(super) fn system_registers(fd: &VcpuFd) -> Result<kvm_sregs, KvmError> {
    let mut sregs = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    // The same interrupt stands among the events.
    sregs.interrupt_bitmap = [0; 4];
    Ok(sregs)
}

pub(super) fn read_msrs(fd: &VcpuFd, msrs: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = list(
        &msrs
            .iter()
            .map(|&index| entry(index, 0))
            .collect::<Vec<_>>(),
    )?;
    let read = fd
        .get_msrs(&mut values)
        .map_err(KvmError::call("KVM_GET_MSRS"))?;
    if read != msrs.len() {
        return Err(KvmError::Msr {
            what: "read",
            index: msrs[read],
        });
    }
    Ok(values
        .as_slice()
        .iter()
        .map(|msr| (msr.index, msr.data))
        .collect())
}

pub(super) fn write_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let written = fd
        .set_msrs(&list(msrs)?)
        .map_err(KvmError::call("KVM_SET_MSRS"))?;
    if written != msrs.len() {
        return Err(KvmError::Msr {
            what: "set",
            index: msrs[written].index,
        });
    }
    Ok(())
}

// x87 and SSE go by way of the XSAVE area: a software KVM was met whose KVM_GET_FPU knows no MXCSR and whose KVM_SET_FPU
// succeeds and has no effect once the vCPU has run. The area's first 512 bytes are laid out as FXSAVE lays them out (Intel
// SDM volume 1, section 10.5.1), then comes the header (section 13.4.2).

/// Byte offset of the header's XSTATE_BV: which parts are not in their initial state.
const IN_USE: usize = 512;
const X87: u32 = 1;
const SSE: u32 = 2;

fn get_fpu(fd: &VcpuFd) -> Result<kvm_fpu, KvmError> {
    let area = fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
    let bytes = |at: usize, into: &mut [u8]| {
        for (word, into) in area.region[at / 4..].iter().zip(into.chunks_exact_mut(4)) {
            into.copy_from_slice(&word.to_le_bytes());
        }
    };
    let pair =
        |at: usize| u64::from(area.region[at / 4]) | u64::from(area.region[at / 4 + 1]) << 32;
    let in_use = area.region[IN_USE / 4];
    let mut fpu = kvm_fpu {
        // After FNINIT.
        fcw: 0x37f,
        mxcsr: area.region[24 / 4],
        ..Default::default()
    };
    // A part that is not in use may be left as it was found: only the flag counts.
    if in_use & X87 != 0 {
        let [control, tags] = [area.region[0], area.region[1]];
        (fpu.fcw, fpu.fsw) = (control as u16, (control >> 16) as u16);
        (fpu.ftwx, fpu.last_opcode) = (tags as u8, (tags >> 16) as u16);
        (fpu.last_ip, fpu.last_dp) = (pair(8), pair(16));
        bytes(32, fpu.fpr.as_flattened_mut());
    }
    if in_use & SSE != 0 {
        bytes(160, fpu.xmm.as_flattened_mut());
    }
    Ok(fpu)
}

fn set_fpu(fd: &VcpuFd, fpu: &kvm_fpu) -> Result<(), KvmError> {
    let mut area = fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
    let mut put = |at: usize, bytes: &[u8]| {
        for (word, bytes) in area.region[at / 4..].iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
    };
    let [fcw, fsw] = [fpu.fcw, fpu.fsw].map(u16::to_le_bytes);
    put(0, &[fcw, fsw].concat());
    let opcode = fpu.last_opcode.to_le_bytes();
    put(4, &[fpu.ftwx, 0, opcode[0], opcode[1]]);
    put(8, &fpu.last_ip.to_le_bytes());
    put(16, &fpu.last_dp.to_le_bytes());
    put(24, &fpu.mxcsr.to_le_bytes());
    put(32, fpu.fpr.as_flattened());
    put(160, fpu.xmm.as_flattened());
    area.region[IN_USE / 4] |= X87 | SSE;
    // SAFETY: the area has the 4096 bytes that KVM_SET_XSAVE reads; larger ones need features that no guest is given.
    unsafe { fd.set_xsave(&area) }.map_err(KvmError::call("KVM_SET_XSAVE"))
}

/// Sets the system registers.
///
/// A task segment that is in use is *busy*, and KVM always reports it so. QEMU's software emulation honours a task's I/O
/// permissions only where it is *available* (`check_io` in its `target/i386/tcg`), and would answer every port access from
/// ring 3 with #GP. VMRUN takes either, so on that processor, and only there, it is set as available.
pub(super) fn set_sregs(fd: &VcpuFd, sregs: &kvm_sregs) -> Result<(), KvmError> {
    const BUSY: u8 = 11;
    const AVAILABLE: u8 = 9;
    let mut sregs = *sregs;
    if sregs.tr.type_ == BUSY && is_emulated() {
        sregs.tr.type_ = AVAILABLE;
    }
    fd.set_sregs(&sregs)
        .map_err(KvmError::call("KVM_SET_SREGS"))
}

/// Whether this host's processor is QEMU's software emulation: it says so in the leaf that is kept for hypervisors.
pub(super) fn is_emulated() -> bool {
    let said = std::arch::x86_64::__cpuid(0x4000_0000);
    let name = [said.ebx, said.ecx, said.edx].map(u32::to_le_bytes);
    name.as_flattened() == b"TCGTCGTCGTCG"
}

/// Sets everything. Events come last: setting registers forgets pending exceptions.
pub(super) fn write(fd: &VcpuFd, state: &CpuState, quiet: &[u32]) -> Result<(), KvmError> {
    set_sregs(fd, &state.sregs)?;
    fd.set_regs(&state.regs)
        .map_err(KvmError::call("KVM_SET_REGS"))?;
    set_fpu(fd, &state.fpu)?;
    fd.set_debug_regs(&state.debug)
        .map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    write_both(fd, state.msrs.iter().copied(), quiet)?;
    fd.set_vcpu_events(&state.events)
        .map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_is_no_state() {
        let mut over = kvm_vcpu_events::default();
        (over.exception.nr, over.exception.has_error_code) = (14, 1);
        over.exception.error_code = 2;
        over.interrupt.nr = 48;
        over.interrupt.shadow = 1;
        let mut expected = kvm_vcpu_events::default();
        expected.interrupt.shadow = 1;
        assert_eq!(pending_only(over), expected);
        over.exception.pending = 1;
        over.interrupt.injected = 1;
        assert_eq!(pending_only(over), over);
    }

    /// What a guest has written into a register that few write goes with it, and is gone where there is nothing of it.
    #[test]
    fn quiet_registers_go_along_where_they_are_used() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: no KVM");
            return;
        };
        let vm = [kvm.create_vm().unwrap(), kvm.create_vm().unwrap()];
        let [one, other] = vm.each_ref().map(|vm| vm.create_vcpu(0).unwrap());
        let msrs = supported_msrs(&one, &[]).unwrap();
        let quiet = quiet_msrs(&one, &[]).unwrap();
        println!("{quiet:x?}");
        let state = || read(&one, &msrs, &quiet).unwrap();
        let untouched = state();
        assert_eq!(untouched.msrs.len(), msrs.len(), "nobody has used one");
        // One that takes 1, as a guest would write it.
        let used = quiet.iter().copied().find(|&index| {
            let set = one.set_msrs(&list(&[entry(index, 1)]).unwrap());
            matches!(set, Ok(1)) && read_msrs(&one, &[index]).unwrap() == [(index, 1)]
        });
        let Some(used) = used else {
            eprintln!("skipped: this KVM has no such register");
            return;
        };
        let touched = CpuState::from_bytes(&state().to_bytes()).unwrap();
        assert_eq!(touched.msrs.last(), Some(&(used, 1)));
        write(&other, &touched, &quiet).unwrap();
        assert_eq!(read_msrs(&other, &[used]).unwrap(), [(used, 1)]);
        write(&other, &untouched, &quiet).unwrap();
        assert_eq!(read_msrs(&other, &[used]).unwrap(), [(used, 0)]);
    }

    #[test]
    fn bytes_are_the_state() {
        let mut state = CpuState {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
            fpu: kvm_fpu::default(),
            debug: kvm_debugregs::default(),
            msrs: vec![(0x277, 7), (0xc000_0102, u64::MAX)],
        };
        state.regs.rip = 0x1234;
        state.sregs.cr3 = 0x10000;
        state.events.interrupt.nr = 32;
        state.fpu.mxcsr = 0x1f80;
        state.debug.dr7 = 0x400;
        let bytes = state.to_bytes();
        assert_eq!(CpuState::from_bytes(&bytes).unwrap(), state);
        for cut in [0, 1, FIXED - 1, bytes.len() - 1] {
            assert!(CpuState::from_bytes(&bytes[..cut]).is_err(), "{cut}");
        }
        assert!(
            CpuState::from_bytes(&vec![0; FIXED + (MSRS.len() + QUIET.len() + 1) * MSR]).is_err()
        );
    }
}
