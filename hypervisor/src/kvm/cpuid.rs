//! The deterministic CPU template: what the guest is told of its CPU.
//!
//! Hidden is everything whose result is not a function of guest state (time-stamp counter, hardware random numbers, the
//! in-use bits of XSAVE, performance counters) and everything that would bring a second source of interrupts or time (local
//! APIC, KVM's paravirtual leaves).
#![forbid(unsafe_code)]

use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use super::{KvmError, KvmSource};

/// Bits hidden in one register of one leaf.
pub(super) struct Hide {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    pub(super) bits: &'static [u8],
}

impl Hide {
    /// Hides them in an entry, if they are in it.
    pub(super) fn in_entry(&self, entry: &mut kvm_cpuid_entry2) {
        if entry.function != self.leaf || entry.index != self.subleaf {
            return;
        }
        let mask = self.bits.iter().fold(0u32, |mask, bit| mask | 1 << bit);
        match self.register {
            Register::Eax => entry.eax &= !mask,
            Register::Ebx => entry.ebx &= !mask,
            Register::Ecx => entry.ecx &= !mask,
            Register::Edx => entry.edx &= !mask,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const HIDDEN: &[Hide] = &[
    // monitor(3) vmx(5) fma(12) pcid(17) x2apic(21) tsc-deadline(24) xsave(26) osxsave(27) avx(28) f16c(29) rdrand(30)
    // hypervisor(31)
    Hide {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[3, 5, 12, 17, 21, 24, 26, 27, 28, 29, 30, 31],
    },
    // tsc(4) apic(9)
    Hide {
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        bits: &[4, 9],
    },
    // tsc-adjust(1) hle(4) avx2(5) invpcid(10) rtm(11) and AVX-512 (16,17,21,26,27,28,30,31), rdseed(18)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        bits: &[1, 4, 5, 10, 11, 16, 17, 18, 21, 26, 27, 28, 30, 31],
    },
    // avx512vbmi(1) pku(3) ospke(4) waitpkg(5) vbmi2(6) shstk(7) vaes(9) vpclmul(10) vnni(11) bitalg(12) vpopcnt(14)
    // la57(16) rdpid(22)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 16, 22],
    },
    // avx512 (2,3,8,23), rtm-always-abort(11) tsx-force-abort(13) serialize stays, amx (22,24,25), arch-capabilities(29)
    Hide {
        leaf: 7,
        subleaf: 0,
        register: Register::Edx,
        bits: &[2, 3, 8, 11, 13, 22, 23, 24, 25, 29],
    },
    // svm(2) monitorx(29)
    Hide {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Ecx,
        bits: &[2, 29],
    },
    // rdtscp(27)
    Hide {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Edx,
        bits: &[27],
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

/// Leaves that are emptied whole: MONITOR, PMU, topology by APIC id, XSAVE, PMU v2, TSC ratio, SVM. Older kernels give in 0x8000001e the
/// APIC id, core and node of whatever processor the caller happened to run on when it asked.
const EMPTIED: &[u32] = &[
    0x5,
    0xa,
    0xb,
    0xd,
    0x14,
    0x15,
    0x16,
    0x1f,
    0x8000_000a,
    0x8000_001e,
    0x8000_0022,
];

/// The host CPU's model. Both sides of a pair must have the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    /// Vendor string of leaf 0.
    pub vendor: String,
    /// Family, model and stepping as leaf 1 gives them (EAX).
    pub signature: u32,
}

impl fmt::Display for CpuModel {
    /// Vendor, family, model, stepping, as `/proc/cpuinfo` counts them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.signature;
        let (family, model) = (word >> 8 & 0xf, word >> 4 & 0xf);
        let extended = if family == 0xf { word >> 20 & 0xff } else { 0 };
        let high = if matches!(family, 6 | 0xf) {
            word >> 16 & 0xf
        } else {
            0
        };
        write!(
            f,
            "{} family {} model {} stepping {}",
            self.vendor,
            family + extended,
            high << 4 | model,
            word & 0xf
        )
    }
}

impl CpuModel {
    /// The model of this host's CPU.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn of_host(source: &KvmSource) -> Result<Self, KvmError> {
        let supported = source
            .open()?
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(deterministic(&supported, 0)?.1)
    }

    pub(super) fn of(entries: &[kvm_cpuid_entry2]) -> Option<Self> {
        let zero = entries.iter().find(|e| e.function == 0)?;
        let one = entries.iter().find(|e| e.function == 1)?;
        let mut vendor = Vec::new();
        for part in [zero.ebx, zero.edx, zero.ecx] {
            vendor.extend_from_slice(&part.to_le_bytes());
        }
        Some(Self {
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            signature: one.eax,
        })
    }
}

/// Of KVM's features ([`deterministic`]): its paravirtual clock, by the registers of today.
pub const CLOCK_SOURCE_2: u32 = 1 << 3;

/// That the clock goes for all CPUs alike, so that the guest need not correct it by what it knows from its ticks.
pub const CLOCK_SOURCE_STABLE: u32 = 1 << 24;

/// Turns what KVM supports on this host into the deterministic template. The guest is told of these features of KVM's: those of its paravirtual clock, whose
/// other side is ours (`devices/pvclock.rs`), or none.
///
/// # Errors
/// [`KvmError::Missing`] if KVM reports no basic leaves.
pub fn deterministic(supported: &CpuId, features: u32) -> Result<(CpuId, CpuModel), KvmError> {
    let model = CpuModel::of(supported.as_slice()).ok_or(KvmError::Missing {
        what: "the basic CPUID leaves",
    })?;
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|e| !(0x4000_0000..0x5000_0000).contains(&e.function))
        .collect();
    for entry in &mut entries {
        if EMPTIED.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        // Which physical CPU we happen to run on (initial APIC id) must not show.
        if entry.function == 1 {
            entry.ebx &= 0x0000_ffff;
        }
        for hide in HIDDEN {
            hide.in_entry(entry);
        }
    }
    // Leaf 7 subleaf 1 and above: only AVX-VNNI, AMX and their kin; a bare guest needs none.
    for entry in &mut entries {
        if entry.function == 7 && entry.index > 0 {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
    if features != 0 {
        offer(features, &mut entries);
    }
    let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::Missing {
        what: "room for its own CPUID leaves",
    })?;
    Ok((cpuid, model))
}

/// KVM's leaves (Documentation/virt/kvm/x86/cpuid.rst) with these features, and the bit that tells a guest to look for them.
fn offer(features: u32, entries: &mut Vec<kvm_cpuid_entry2>) {
    const SIGNATURE: [u32; 3] = [
        u32::from_le_bytes(*b"KVMK"),
        u32::from_le_bytes(*b"VMKV"),
        u32::from_le_bytes(*b"M\0\0\0"),
    ];
    const FEATURES: u32 = 0x4000_0001;
    const HYPERVISOR: u32 = 1 << 31;
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= HYPERVISOR;
    }
    let [ebx, ecx, edx] = SIGNATURE;
    entries.push(kvm_cpuid_entry2 {
        function: 0x4000_0000,
        eax: FEATURES,
        ebx,
        ecx,
        edx,
        ..Default::default()
    });
    entries.push(kvm_cpuid_entry2 {
        function: FEATURES,
        eax: features,
        ..Default::default()
    });
}

#[cfg(test)]
mod tests {
    use super::super::Told;
    use super::super::told::tests::entry;
    use super::*;

    #[test]
    fn hides_time_random_numbers_and_extended_state() {
        let all: Vec<_> = [
            (0, 0),
            (1, 0),
            (7, 0),
            (7, 1),
            (0xd, 0),
            (0x4000_0000, 0),
            (0x8000_0001, 0),
            (0x8000_001e, 0),
        ]
        .iter()
        .map(|&(f, i)| entry(f, i))
        .collect();
        let (cpuid, _) = deterministic(&CpuId::from_entries(&all).unwrap(), 0).unwrap();
        let find = |f, i| {
            *cpuid
                .as_slice()
                .iter()
                .find(|e| e.function == f && e.index == i)
                .unwrap()
        };
        assert_eq!(find(1, 0).edx & (1 << 4), 0, "tsc");
        assert_eq!(find(1, 0).ecx & (1 << 30), 0, "rdrand");
        assert_eq!(find(1, 0).ecx & (1 << 26), 0, "xsave");
        assert_eq!(find(7, 0).ebx & (1 << 18), 0, "rdseed");
        assert_eq!(find(7, 0).ecx & (1 << 22), 0, "rdpid");
        assert_eq!(find(0x8000_0001, 0).edx & (1 << 27), 0, "rdtscp");
        assert_eq!(find(0xd, 0).eax, 0, "xsave leaf");
        let topology = find(0x8000_001e, 0);
        assert_eq!(
            (topology.eax, topology.ebx, topology.ecx),
            (0, 0, 0),
            "the processor that was asked"
        );
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x4000_0000));
        assert_ne!(find(1, 0).edx & 1, 0, "the fpu stays");
    }

    /// Whatever processor of it asks, a host tells a guest the same.
    #[test]
    fn every_processor_of_this_host_tells_the_same() {
        let Ok(kvm) = KvmSource::default().open() else {
            eprintln!("skipped: no KVM");
            return;
        };
        let told = || {
            let supported = kvm
                .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
                .unwrap();
            Told::of(
                deterministic(&supported, CLOCK_SOURCE_2)
                    .unwrap()
                    .0
                    .as_slice(),
            )
        };
        let first = told();
        for core in core_affinity::get_core_ids().unwrap() {
            assert!(core_affinity::set_for_current(core));
            assert_eq!(told().difference(&first), None, "{core:?}");
        }
    }

    #[test]
    fn offers_the_clock_page_and_nothing_else_of_kvms() {
        let all = [entry(0, 0), entry(1, 0), entry(0x4000_0001, 0)];
        let all = CpuId::from_entries(&all).unwrap();
        let (cpuid, _) = deterministic(&all, CLOCK_SOURCE_2 | CLOCK_SOURCE_STABLE).unwrap();
        let find = |function| {
            let mut of = cpuid.as_slice().iter().filter(|e| e.function == function);
            let found = *of.next().unwrap();
            assert!(of.next().is_none());
            found
        };
        assert_ne!(find(1).ecx & 1 << 31, 0);
        assert_eq!(find(0x4000_0000).ebx.to_le_bytes(), *b"KVMK");
        assert_eq!(find(0x4000_0001).eax, 0x100_0008);
    }
}
