//! The state of a machine whose vCPUs have KVM's own interrupt controller: every vCPU with its local APIC, the chips and the timer
//! that they share, and the time. All numbers are little-endian; KVM's structures are the bytes they are.
//!
//! ```text
//!   0 magic "DOPLCREW"    16 hash of what CPUID says        32 KVM's clock (u64, ns)
//!   8 version (u32)       24 kHz of the time stamp (u32)    40 time stamp of the first vCPU (u64)
//!  12 vCPUs (u32)         28 MSRs of a vCPU (u32)           48 one vCPU after the other │ 8259, 8259, I/O APIC │ 8254
//!     a vCPU: distance of its time stamp from the first's (u64), MP state, registers, system registers, XSAVE area, XCRs, debug
//!     registers, local APIC, MSRs: number (u32), value (u64), events
//! ```
//! Of the quiet MSRs (`state.rs`) those are in it, behind the others, that are not 0 in some vCPU.
//!
//! *Time.* A guest that is taken over goes on with the clock and the time stamp of its last state, and what has passed since that came:
//! neither ever goes back. All time stamps are moved alike, so that those of two vCPUs stay as far from each other as they were.
//!
//! Unsafe is here for KVM's structures as bytes (see `state.rs`), and for the attribute that moves a time stamp without the guess
//! that KVM makes of a write to its register.

use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data, kvm_debugregs, kvm_device_attr,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::KvmError;
use super::state::{self, MSR, Plain, entry, list, put, take};
use super::vcpu::VcpuParts;

const MAGIC: [u8; 8] = *b"DOPLCREW";
/// Grows with every change of the layout.
const VERSION: u32 = 1;
const HEADER: usize = 48;

/// MSRs of a guest with the host's CPU, besides those of the deterministic one. The time stamp is not here: it is moved, not set. The
/// deadline comes last, behind all that it counts by.
pub(super) const MSRS: &[u32] = &[
    0x3b,        // TSC_ADJUST
    0x48,        // SPEC_CTRL
    0xc000_0103, // TSC_AUX
    0xc001_011f, // VIRT_SPEC_CTRL
    0x4b56_4d01, // where KVM's clock is (where the wall clock was asked for is no state: setting it writes it again)
    0x6e0,       // TSC_DEADLINE
];
const TIME_STAMP: u32 = 0x10;

/// An XSAVE area as KVM_GET_XSAVE gives it.
type Area = [u32; 1024];

// SAFETY: integers and arrays of them only, `repr(C)`; the sizes below are the sums of the fields' sizes.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}
// SAFETY: as above.
unsafe impl Plain for Area {}
// SAFETY: as above.
unsafe impl Plain for [u8; 8] {}
// SAFETY: as above.
unsafe impl Plain for [u8; 4] {}
// SAFETY: as above; the union's members are all of integers, and the largest fills it.
unsafe impl Plain for kvm_irqchip {}

const _: () = assert!(size_of::<kvm_mp_state>() == 4);
const _: () = assert!(size_of::<kvm_xcrs>() == 8 + 16 * 16 + 16 * 8);
const _: () = assert!(size_of::<kvm_lapic_state>() == 1024);
const _: () = assert!(size_of::<kvm_pit_state2>() == 3 * 24 + 40);
const _: () = assert!(size_of::<kvm_irqchip>() == 8 + 512);

/// Bytes of a vCPU, without its MSRs.
const VCPU: usize = 8
    + size_of::<kvm_mp_state>()
    + size_of::<kvm_regs>()
    + size_of::<kvm_sregs>()
    + size_of::<Area>()
    + size_of::<kvm_xcrs>()
    + size_of::<kvm_debugregs>()
    + size_of::<kvm_lapic_state>()
    + size_of::<kvm_vcpu_events>();
/// The chips that all share, by KVM's numbers: two 8259s and the I/O APIC.
const CHIPS: u32 = 3;
const SHARED: usize = CHIPS as usize * size_of::<kvm_irqchip>() + size_of::<kvm_pit_state2>();

/// What a state must fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// MSRs that each has.
    pub msrs: u32,
    /// Hash of what CPUID tells the guest.
    pub cpuid: u64,
}

impl Shape {
    /// Whether a state of this shape is one of a machine of that: it may have quiet registers besides.
    fn fits(self, machine: Self) -> bool {
        let most = machine.msrs + state::QUIET.len() as u32;
        let as_many = Self {
            msrs: machine.msrs,
            ..self
        };
        as_many == machine && (machine.msrs..=most).contains(&self.msrs)
    }

    fn bytes(self) -> usize {
        HEADER + self.vcpus as usize * (VCPU + self.msrs as usize * MSR) + SHARED
    }
}

/// Why bytes are no state of this machine's vCPUs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadCrewState {
    /// Not the beginning of one.
    #[error("this is no state of several vCPUs: it does not begin as one")]
    Foreign,
    /// Another version.
    #[error(
        "a state of vCPUs of version {found}, this program reads {VERSION}: run the same version on both hosts"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Another machine, or another host.
    #[error(
        "a state of {found:?}, where this side has {expected:?}: both sides need the same --vcpus, CPU and kernel"
    )]
    Shape {
        /// This side's.
        expected: Shape,
        /// That of the state.
        found: Shape,
    },
    /// Fewer or more bytes than that.
    #[error("{found} bytes are no state of these vCPUs: {expected} were expected")]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
}

/// A state that was taken or checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrewState {
    bytes: Vec<u8>,
    shape: Shape,
}

impl CrewState {
    /// Its bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Takes in what [`CrewState::to_bytes`] gave, of a machine of this shape. What the structures say KVM checks when they are set.
    ///
    /// # Errors
    /// See [`BadCrewState`].
    pub fn from_bytes(bytes: &[u8], expected: Shape) -> Result<Self, BadCrewState> {
        let length = |expected| BadCrewState::Length {
            found: bytes.len(),
            expected,
        };
        if bytes.len() < HEADER {
            return Err(length(expected.bytes()));
        }
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        if bytes[..8] != MAGIC {
            return Err(BadCrewState::Foreign);
        }
        if word(8) != VERSION {
            return Err(BadCrewState::Version { found: word(8) });
        }
        let found = Shape {
            vcpus: word(12),
            msrs: word(28),
            cpuid: u64::from_le_bytes(bytes[16..24].try_into().expect("eight")),
        };
        if !found.fits(expected) {
            return Err(BadCrewState::Shape { expected, found });
        }
        if bytes.len() != found.bytes() {
            return Err(length(found.bytes()));
        }
        Ok(Self {
            bytes: bytes.to_vec(),
            shape: found,
        })
    }
}

/// How this KVM's time stamps are moved.
fn offset_of(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    attribute(fd, GET_ATTRIBUTE, &mut offset).then_some(offset)
}

/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`, and 0xe2: on a vCPU `kvm-ioctls` has no wrapper for the second.
const SET_ATTRIBUTE: libc::c_ulong = 0x4018_aee1;
const GET_ATTRIBUTE: libc::c_ulong = 0x4018_aee2;

fn attribute(fd: &VcpuFd, call: libc::c_ulong, offset: &mut u64) -> bool {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset) as u64,
    };
    // SAFETY: the descriptor is a vCPU, the structure what both calls take; the kernel reads or writes the eight bytes at its address,
    // which are borrowed for the call.
    unsafe { libc::ioctl(fd.as_raw_fd(), call, &raw const attribute) == 0 }
}

fn time_stamp(fd: &VcpuFd) -> Result<u64, KvmError> {
    let mut values = list(&[entry(TIME_STAMP, 0)])?;
    match fd.get_msrs(&mut values) {
        Ok(1) => Ok(values.as_slice()[0].data),
        Ok(_) => Err(KvmError::Msr {
            what: "read",
            index: TIME_STAMP,
        }),
        Err(error) => Err(KvmError::call("KVM_GET_MSRS")(error)),
    }
}

/// Reads everything; all vCPUs stand, and the instructions of their last exits are complete.
pub(super) fn read(
    vm: &VmFd,
    vcpus: &[VcpuParts<'_>],
    mut shape: Shape,
) -> Result<CrewState, KvmError> {
    let first = vcpus[0].fd;
    let used = used_of(vcpus)?;
    shape.msrs += used.len() as u32;
    let mut bytes = Vec::with_capacity(shape.bytes());
    let khz = first
        .get_tsc_khz()
        .map_err(KvmError::call("KVM_GET_TSC_KHZ"))?;
    let clock = vm.get_clock().map_err(KvmError::call("KVM_GET_CLOCK"))?;
    let stamp = time_stamp(first)?;
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&shape.vcpus.to_le_bytes());
    bytes.extend_from_slice(&shape.cpuid.to_le_bytes());
    bytes.extend_from_slice(&khz.to_le_bytes());
    bytes.extend_from_slice(&shape.msrs.to_le_bytes());
    bytes.extend_from_slice(&clock.clock.to_le_bytes());
    bytes.extend_from_slice(&stamp.to_le_bytes());
    let offset = offset_of(first);
    for VcpuParts { fd, msrs, .. } in vcpus {
        let distance = match (offset_of(fd), offset) {
            (Some(own), Some(first)) => own.wrapping_sub(first),
            _ => 0,
        };
        bytes.extend_from_slice(&distance.to_le_bytes());
        read_vcpu(&mut bytes, fd, &[msrs, &used[..]].concat())?;
    }
    for chip_id in 0..CHIPS {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
        put(&mut bytes, &chip);
    }
    let pit = vm.get_pit2().map_err(KvmError::call("KVM_GET_PIT2"))?;
    put(&mut bytes, &pit);
    debug_assert_eq!(bytes.len(), shape.bytes());
    Ok(CrewState { bytes, shape })
}

/// The quiet registers that some vCPU uses.
fn used_of(vcpus: &[VcpuParts<'_>]) -> Result<Vec<u32>, KvmError> {
    let mut used = Vec::new();
    for VcpuParts { fd, quiet, .. } in vcpus {
        for (index, _) in state::read_both(fd, &[], quiet)? {
            if !used.contains(&index) {
                used.push(index);
            }
        }
    }
    Ok(used)
}

fn read_vcpu(bytes: &mut Vec<u8>, fd: &VcpuFd, msrs: &[u32]) -> Result<(), KvmError> {
    // First of all: KVM takes in what other vCPUs have sent this one, a start among it, when it is asked for this.
    let mp = fd
        .get_mp_state()
        .map_err(KvmError::call("KVM_GET_MP_STATE"))?;
    put(bytes, &mp);
    put(
        bytes,
        &fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?,
    );
    put(bytes, &state::system_registers(fd)?);
    let area = fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
    put(bytes, &area.region);
    put(
        bytes,
        &fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?,
    );
    let debug = fd
        .get_debug_regs()
        .map_err(KvmError::call("KVM_GET_DEBUGREGS"))?;
    put(bytes, &debug);
    put(
        bytes,
        &fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?,
    );
    for (index, value) in state::read_msrs(fd, msrs)? {
        bytes.extend_from_slice(&index.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    let events = fd
        .get_vcpu_events()
        .map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
    put(bytes, &events);
    Ok(())
}

/// One vCPU's part of a state.
struct One<'a> {
    distance: u64,
    mp: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    area: Area,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: &'a [u8],
    events: kvm_vcpu_events,
}

impl<'a> One<'a> {
    /// The next one; that there are enough bytes was checked.
    fn take(rest: &mut &'a [u8], msrs: u32) -> Self {
        let distance = u64::from_le_bytes(take(rest));
        let (mp, regs, sregs, area) = (take(rest), take(rest), take(rest), take(rest));
        let (xcrs, debug, lapic) = (take(rest), take(rest), take(rest));
        let (msrs, after) = rest.split_at(msrs as usize * MSR);
        *rest = after;
        Self {
            distance,
            mp,
            regs,
            sregs,
            area,
            xcrs,
            debug,
            lapic,
            msrs,
            events: take(rest),
        }
    }

    fn write(&self, VcpuParts { fd, quiet, .. }: VcpuParts<'_>) -> Result<(), KvmError> {
        fd.set_mp_state(self.mp)
            .map_err(KvmError::call("KVM_SET_MP_STATE"))?;
        state::set_sregs(fd, &self.sregs)?;
        fd.set_regs(&self.regs)
            .map_err(KvmError::call("KVM_SET_REGS"))?;
        // Which parts of the area there may be.
        fd.set_xcrs(&self.xcrs)
            .map_err(KvmError::call("KVM_SET_XCRS"))?;
        let area = kvm_xsave {
            region: self.area,
            ..Default::default()
        };
        // SAFETY: the area has the 4096 bytes that KVM_SET_XSAVE reads; no guest is given features that need a larger one.
        unsafe { fd.set_xsave(&area) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic)
            .map_err(KvmError::call("KVM_SET_LAPIC"))?;
        state::write_both(fd, state::msrs_of(self.msrs), quiet)?;
        // Last: setting registers forgets pending exceptions.
        fd.set_vcpu_events(&self.events)
            .map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))
    }
}

/// Sets everything, as it would be if so much time had passed since it was read. Time stamps are scaled to the guest's rate where
/// this hardware `scales`. Where it does not and the hosts' rates differ, the guest's deadlines are as wrong as that; its clock is
/// KVM's, which knows the rate.
pub(super) fn write(
    vm: &VmFd,
    vcpus: &[VcpuParts<'_>],
    state: &CrewState,
    passed: Duration,
    scales: bool,
) -> Result<(), KvmError> {
    let mut rest = &state.bytes[24..];
    let khz = u32::from_le_bytes(take(&mut rest));
    let _msrs: [u8; 4] = take(&mut rest);
    let clock = u64::from_le_bytes(take(&mut rest));
    let stamp = u64::from_le_bytes(take(&mut rest));
    let parts: Vec<One<'_>> = vcpus
        .iter()
        .map(|_| One::take(&mut rest, state.shape.msrs))
        .collect();
    for VcpuParts { fd, .. } in vcpus.iter().filter(|_| scales) {
        fd.set_tsc_khz(khz)
            .map_err(KvmError::call("KVM_SET_TSC_KHZ"))?;
    }
    // Before the deadlines, which count by them.
    let since = (u128::from(khz) * passed.as_nanos() / 1_000_000) as u64;
    let distances: Vec<u64> = parts.iter().map(|part| part.distance).collect();
    let fds: Vec<_> = vcpus.iter().map(|vcpu| vcpu.fd).collect();
    set_time_stamps(&fds, stamp.wrapping_add(since), &distances)?;
    for (vcpu, part) in vcpus.iter().zip(&parts) {
        part.write(*vcpu)?;
    }
    for _ in 0..CHIPS {
        vm.set_irqchip(&take(&mut rest))
            .map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
    }
    vm.set_pit2(&take(&mut rest))
        .map_err(KvmError::call("KVM_SET_PIT2"))?;
    let clock = kvm_clock_data {
        clock: clock.saturating_add(passed.as_nanos() as u64),
        ..Default::default()
    };
    vm.set_clock(&clock)
        .map_err(KvmError::call("KVM_SET_CLOCK"))
}

/// Whether this KVM really moves a vCPU's time stamp. A software KVM was met that takes the order, and whose guests go on reading the
/// host's.
pub(super) fn moves_time_stamps(fd: &VcpuFd) -> bool {
    const FAR: u64 = 1 << 50;
    let moved = || {
        let ahead = time_stamp(fd)?.wrapping_add(FAR);
        set_time_stamps(&[fd], ahead, &[0])?;
        Ok::<_, KvmError>(time_stamp(fd)? >= ahead)
    };
    moved().unwrap_or(false)
}

/// Moves all time stamps so that the first reads this, and each other one that far from it.
fn set_time_stamps(vcpus: &[&VcpuFd], first: u64, distances: &[u64]) -> Result<(), KvmError> {
    if let Some(offset) = offset_of(vcpus[0]) {
        let moved = offset.wrapping_add(first.wrapping_sub(time_stamp(vcpus[0])?));
        let set = vcpus
            .iter()
            .zip(distances)
            .all(|(fd, distance)| attribute(fd, SET_ATTRIBUTE, &mut moved.wrapping_add(*distance)));
        if set {
            return Ok(());
        }
    }
    for fd in vcpus {
        state::write_msrs(fd, &[entry(TIME_STAMP, first)])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            vcpus: 2,
            msrs: 3,
            cpuid: 0x1234_5678_9abc_def0,
        }
    }

    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; shape().bytes()];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&2u32.to_le_bytes());
        bytes[16..24].copy_from_slice(&shape().cpuid.to_le_bytes());
        bytes[28..32].copy_from_slice(&3u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_state_of_another_machine_or_host_is_refused_with_what_to_do() {
        let good = bytes();
        let state = CrewState::from_bytes(&good, shape()).unwrap();
        assert_eq!(state.to_bytes(), good);
        for cut in [0, 1, HEADER - 1, HEADER, good.len() - 1] {
            CrewState::from_bytes(&good[..cut], shape()).unwrap_err();
        }
        let mut long = good.clone();
        long.push(0);
        CrewState::from_bytes(&long, shape()).unwrap_err();
        let other = Shape {
            vcpus: 1,
            ..shape()
        };
        let error = CrewState::from_bytes(&good, other).unwrap_err();
        assert!(error.to_string().contains("--vcpus"), "{error}");
        for (at, other) in [
            (0, BadCrewState::Foreign),
            (8, BadCrewState::Version { found: VERSION ^ 2 }),
        ] {
            let mut bad = good.clone();
            bad[at] ^= 2;
            assert_eq!(CrewState::from_bytes(&bad, shape()), Err(other));
        }
        let mut bad = good;
        bad[16] ^= 1;
        let refused = CrewState::from_bytes(&bad, shape()).unwrap_err();
        assert!(matches!(refused, BadCrewState::Shape { .. }), "{refused}");
    }
}
