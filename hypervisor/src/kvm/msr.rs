//! The MSR filter: time-like registers come to us instead of being answered by the host.
#![forbid(unsafe_code)]

use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};

/// First MSR and how many, of each range that is denied (and so exits to us).
///
/// 0x10 TSC, 0x3b TSC_ADJUST, 0xe7/0xe8 MPERF and APERF, 0x6e0 TSC_DEADLINE, 0x1b APIC base stays, 0x198 performance
/// status, 0xc1.. and 0x186.. counters, 0x4000_0000.. Hyper-V, 0x4b56_4d00.. KVM's own, 0xc001_0200.. AMD counters,
/// 0x11/0x12 the old kvmclock, 0xc000_0103 TSC_AUX, 0xc000_0104 TSC ratio, 0xda0 XSS.
const DENIED: &[(u32, u32)] = &[
    (0x10, 3),
    (0x3b, 1),
    (0xc1, 8),
    (0xe7, 2),
    (0x186, 8),
    (0x198, 1),
    (0x6e0, 1),
    (0xda0, 1),
    (0x4000_0000, 0x200),
    (0x4b56_4d00, 16),
    (0xc000_0103, 2),
    (0xc001_0000, 8),
    (0xc001_0200, 12),
];

/// Calls `set` with the filter; the bitmaps live as long as the call.
pub(super) fn with_filter<T>(
    set: impl FnOnce(MsrFilterDefaultAction, &[MsrFilterRange<'_>]) -> T,
) -> T {
    // A clear bit denies.
    let bitmap = [0u8; 0x200 / 8];
    let ranges: Vec<_> = DENIED
        .iter()
        .map(|&(base, msr_count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap: &bitmap[..msr_count.div_ceil(8) as usize],
        })
        .collect();
    set(MsrFilterDefaultAction::ALLOW, &ranges)
}
