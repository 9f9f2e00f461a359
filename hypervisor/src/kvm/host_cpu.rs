//! The CPU of a guest that is not replayed: the host's, as KVM offers it, less what a checkpoint does not carry or another host may
//! not have.
//!
//! | hidden | why |
//! | --- | --- |
//! | VMX, SVM, SGX, AMX, CET, user interrupts, last branch records, performance counters, processor trace | state that no checkpoint carries |
//! | MONITOR and MWAIT, UMWAIT, RDPRU, RTM | exits, or state of the host's |
//! | the invariant TSC | so that a guest reads KVM's clock, which goes on rightly where the other host's time stamp has another rate |
//! | the caches' and the cores' topology | each vCPU is a package of its own, whatever the host's cores share |
//! | KVM's leaves, but for its clock | state in guest memory that KVM writes by itself |
#![forbid(unsafe_code)]

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use xxhash_rust::xxh3::xxh3_64;

use super::cpuid::{Hide, Register};
use super::{CpuModel, KvmError};

const HIDDEN: &[Hide] = &[
    // monitor(3) vmx(5) pdcm(15)
    Hide {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[3, 5, 15],
    },
    // htt(28): one logical processor a package
    Hide {
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        bits: &[28],
    },
    // sgx(2) hle(4) rtm(11) mpx(14) pt(25)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        bits: &[2, 4, 11, 14, 25],
    },
    // waitpkg(5) shstk(7) bus-lock(24) sgx-lc(30)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[5, 7, 24, 30],
    },
    // uintr(5) pconfig(18) arch-lbr(19) ibt(20) amx (22, 24, 25)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Edx,
        bits: &[5, 18, 19, 20, 22, 24, 25],
    },
    // fred(17) amx-fp16(21)
    Hide {
        leaf: 7,
        subleaf: 1,
        register: Register::Eax,
        bits: &[17, 21],
    },
    // xsaves(3): what it saves besides is CET's and the counters'
    Hide {
        leaf: 0xd,
        subleaf: 1,
        register: Register::Eax,
        bits: &[3],
    },
    // cmp-legacy(1) svm(2) ibs(10) lwp(15) topoext(22) counters (23, 24, 28) monitorx(29)
    Hide {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[1, 2, 10, 15, 22, 23, 24, 28, 29],
    },
    // invariant tsc(8)
    Hide {
        leaf: 0x8000_0007,
        subleaf: 0,
        register: Register::Edx,
        bits: &[8],
    },
    // rdpru(4)
    Hide {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: Register::Ebx,
        bits: &[4],
    },
];

/// Leaves that are emptied whole: MONITOR, PMU, topology, SGX, processor trace, LBR, AMX, SVM, IBS, AMD's topology, SEV, PMU v2.
const EMPTIED: &[u32] = &[
    0x5,
    0xa,
    0xb,
    0x12,
    0x14,
    0x1c,
    0x1d,
    0x1e,
    0x1f,
    0x8000_000a,
    0x8000_001b,
    0x8000_001e,
    0x8000_001f,
    0x8000_0022,
];

/// Extended states that lie within the 4 KiB of KVM_GET_XSAVE: x87, SSE, AVX, AVX-512 (three), protection keys.
const STATES: u32 = 0x2e7;
const HYPERVISOR: u32 = 1 << 31;
const DEADLINE: u32 = 1 << 24;
const KVM: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM's clock, that it is stable across vCPUs, and that port 0x80 need not be waited for.
const KVM_OFFERED: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;

/// What needs XSAVE, and it: QEMU's software emulation does not hand XSETBV to the hypervisor in it, so that KVM there does not know what
/// a guest has enabled, and takes it away at the next entry.
const WITH_XSAVE: &[Hide] = &[
    // fma(12) xsave(26) osxsave(27) avx(28) f16c(29)
    Hide {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[12, 26, 27, 28, 29],
    },
    // avx2(5) mpx(14) and AVX-512 (16, 17, 21, 26, 27, 28, 30, 31)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        bits: &[5, 14, 16, 17, 21, 26, 27, 28, 30, 31],
    },
    // avx512vbmi(1) pku(3) ospke(4) vbmi2(6) vaes(9) vpclmul(10) vnni(11) bitalg(12) vpopcnt(14)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[1, 3, 4, 6, 9, 10, 11, 12, 14],
    },
];

/// Makes of what KVM supports on this host what all vCPUs are told; `deadline` says that KVM's timer takes deadlines, `xsave` that
/// extended states work.
///
/// # Errors
/// [`KvmError::Missing`] if KVM reports no basic leaves.
pub(super) fn ordinary(
    supported: &CpuId,
    deadline: bool,
    xsave: bool,
) -> Result<(Vec<kvm_cpuid_entry2>, CpuModel), KvmError> {
    let model = CpuModel::of(supported.as_slice()).ok_or(KvmError::Missing {
        what: "the basic CPUID leaves",
    })?;
    let kvms = |leaf: u32| (KVM..0x5000_0000).contains(&leaf);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|entry| !kvms(entry.function) || [KVM, KVM_FEATURES].contains(&entry.function))
        .collect();
    for entry in &mut entries {
        if EMPTIED.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        let hidden = HIDDEN.iter().chain(WITH_XSAVE.iter().filter(|_| !xsave));
        hidden.for_each(|hide| hide.in_entry(entry));
        match (entry.function, entry.index) {
            (1, _) => {
                // One logical processor; its number comes later.
                entry.ebx = entry.ebx & 0xffff | 1 << 16;
                entry.ecx |= HYPERVISOR | if deadline { DEADLINE } else { 0 };
            }
            // Nobody shares a cache, and a package has one core.
            (4, _) => entry.eax &= 0x3fff,
            (0x8000_001d, _) => entry.eax &= 0x3fff,
            (7, 1) => entry.edx = 0,
            (0xd, _) if !xsave => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (0xd, 0) => (entry.eax, entry.edx) = (entry.eax & STATES, 0),
            (0xd, 1) => (entry.ecx, entry.edx) = (0, 0),
            (0xd, 2..) if entry.index > 31 || STATES & 1 << entry.index == 0 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (KVM, _) => entry.eax = KVM_FEATURES,
            (KVM_FEATURES, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & KVM_OFFERED, 0, 0, 0);
            }
            (0x8000_0008, _) => entry.ecx = 0,
            _ => {}
        }
    }
    Ok((entries, model))
}

/// What the vCPU of this number is told.
///
/// # Errors
/// [`KvmError::Missing`] if there are more leaves than KVM takes.
pub(super) fn of_vcpu(entries: &[kvm_cpuid_entry2], number: u8) -> Result<CpuId, KvmError> {
    let mut entries = entries.to_vec();
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ebx |= u32::from(number) << 24;
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::Missing {
        what: "room for its own CPUID leaves",
    })
}

/// A hash of what all vCPUs are told: two hosts with the same one give a guest the same CPU.
pub(super) fn hash(entries: &[kvm_cpuid_entry2]) -> u64 {
    let mut bytes = Vec::with_capacity(entries.len() * 24);
    for entry in entries {
        for word in [
            entry.function,
            entry.index,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::super::told::tests::entry;
    use super::*;

    #[test]
    fn the_time_stamp_stays_and_what_no_checkpoint_carries_goes() {
        let all: Vec<_> = [
            (0, 0),
            (1, 0),
            (4, 0),
            (7, 0),
            (0xa, 0),
            (0xb, 0),
            (0xd, 0),
            (0xd, 18),
            (KVM, 0),
            (KVM_FEATURES, 0),
            (0x4000_0100, 0),
            (0x8000_0001, 0),
            (0x8000_0007, 0),
        ]
        .iter()
        .map(|&(function, index)| entry(function, index))
        .collect();
        let (entries, _) = ordinary(&CpuId::from_entries(&all).unwrap(), true, true).unwrap();
        let find = |function, index| {
            *entries
                .iter()
                .find(|e| e.function == function && e.index == index)
                .unwrap()
        };
        assert_ne!(find(1, 0).edx & 1 << 4, 0, "tsc");
        assert_ne!(find(1, 0).edx & 1 << 9, 0, "apic");
        assert_ne!(find(1, 0).ecx & 1 << 26, 0, "xsave");
        assert_eq!(find(1, 0).ecx & 1 << 5, 0, "vmx");
        assert_eq!(find(1, 0).ebx >> 16, 1, "one logical processor, number 0");
        assert_eq!(find(4, 0).eax >> 14, 0, "nothing is shared");
        assert_eq!(find(0xd, 0).eax, STATES);
        assert_eq!(find(0xd, 18).eax, 0, "no amx");
        assert_eq!(find(0xa, 0).eax, 0, "no counters");
        assert_eq!(find(KVM_FEATURES, 0).eax, KVM_OFFERED);
        assert_eq!(find(0x8000_0007, 0).edx & 1 << 8, 0, "invariant tsc");
        assert!(entries.iter().all(|e| e.function != 0x4000_0100));
        let second = of_vcpu(&entries, 1).unwrap();
        assert_ne!(second.as_slice()[1].ebx, find(1, 0).ebx);
        let (fewer, _) = ordinary(&CpuId::from_entries(&all).unwrap(), true, false).unwrap();
        assert_ne!(hash(&fewer), hash(&entries));
        let one = fewer.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.ecx & 1 << 26, 0, "xsave");
    }
}
