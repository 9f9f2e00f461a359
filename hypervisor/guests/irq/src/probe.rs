//! One sync point with all of the processor's state known before it and compared after it.
//!
//! Unsafe, because only assembly can hold every register at once. The state is loaded from one static and stored
//! into another, as no register is left for a pointer.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::fmt;

/// General registers but RSP: RAX RCX RDX RBX RBP RSI RDI R8–R15, in this order.
const GENERAL: usize = 15;
const RAX: usize = 0;
const RDX: usize = 2;
const RED_ZONE: usize = 16;
/// CF, PF, AF, ZF, SF, OF.
const FLAGS: u64 = 0x8d5;
/// Rounding control, and the sticky flags; exceptions stay masked.
const MXCSR_MASKED: u32 = 0x1f80;
const MXCSR_FREE: u32 = 0x603f;

#[repr(C, align(16))]
struct State {
    general: [u64; GENERAL],
    flags: u64,
    sse: [[u64; 2]; 16],
    red_zone: [u64; RED_ZONE],
    mxcsr: u32,
}

#[repr(transparent)]
struct StateCell(UnsafeCell<State>);
// SAFETY: one thread; interrupt stubs do not touch it.
unsafe impl Sync for StateCell {}

const EMPTY: State = State {
    general: [0; GENERAL],
    flags: 0,
    sse: [[0; 2]; 16],
    red_zone: [0; RED_ZONE],
    mxcsr: 0,
};
static BEFORE: StateCell = StateCell(UnsafeCell::new(EMPTY));
static AFTER: StateCell = StateCell(UnsafeCell::new(EMPTY));

/// Cheap exits of every kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyncPoint {
    /// The mask of the 8259, by a port.
    Mask,
    /// The requests of the 8259, by a port.
    Requests,
    /// A port where nothing is.
    NoPort,
    /// A register of the platform page where nothing is.
    NoRegister,
}

impl SyncPoint {
    pub(crate) const ALL: [Self; 4] = [Self::Mask, Self::NoRegister, Self::Requests, Self::NoPort];

    fn port(self) -> Option<u16> {
        match self {
            Self::Mask => Some(0x21),
            Self::Requests => Some(0x20),
            Self::NoPort => Some(0x80),
            Self::NoRegister => None,
        }
    }
}

/// What an interrupt or an exit changed that it must not.
#[derive(Debug)]
pub(crate) struct Trace {
    what: &'static str,
    index: usize,
    expected: u64,
    found: u64,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            index,
            expected,
            found,
        } = self;
        write!(
            f,
            "{what} {index}: expected {expected:#x}, found {found:#x}"
        )
    }
}

/// Fills the state from `random`, passes the sync point, and compares.
pub(crate) fn check(at: SyncPoint, mut random: impl FnMut() -> u64) -> Result<(), Trace> {
    // SAFETY: one thread, and this is the only user of the two statics outside the assembly called below.
    let (before, after) = unsafe { (&mut *BEFORE.0.get(), &mut *AFTER.0.get()) };
    before.general.fill_with(&mut random);
    before.flags = random() & FLAGS;
    before.sse.fill_with(|| [random(), random()]);
    before.red_zone.fill_with(&mut random);
    before.mxcsr = MXCSR_MASKED | random() as u32 & MXCSR_FREE;
    if let Some(port) = at.port() {
        before.general[RDX] = before.general[RDX] & !0xffff | u64::from(port);
        // SAFETY: it restores what the calling convention wants restored; it works on the two statics.
        unsafe { probe_by_port() };
    } else {
        // SAFETY: as above.
        unsafe { probe_by_window() };
    }
    match at {
        SyncPoint::NoRegister => before.general[RAX] = !0,
        SyncPoint::NoPort => before.general[RAX] |= 0xff,
        // What these ports read is not known here.
        SyncPoint::Mask | SyncPoint::Requests => {
            before.general[RAX] = before.general[RAX] & !0xff | after.general[RAX] & 0xff;
        }
    }
    let all = [("flags", 0, before.flags, after.flags & FLAGS)]
        .into_iter()
        .chain([("mxcsr", 0, before.mxcsr.into(), after.mxcsr.into())])
        .chain(pairs("register", &before.general, &after.general))
        .chain(pairs(
            "sse",
            before.sse.as_flattened(),
            after.sse.as_flattened(),
        ))
        .chain(pairs("red zone", &before.red_zone, &after.red_zone));
    for (what, index, expected, found) in all {
        if expected != found {
            return Err(Trace {
                what,
                index,
                expected,
                found,
            });
        }
    }
    Ok(())
}

fn pairs<'a>(
    what: &'static str,
    expected: &'a [u64],
    found: &'a [u64],
) -> impl Iterator<Item = (&'static str, usize, u64, u64)> + 'a {
    expected
        .iter()
        .zip(found)
        .enumerate()
        .map(move |(index, (expected, found))| (what, index, *expected, *found))
}

unsafe extern "C" {
    fn probe_by_port();
    fn probe_by_window();
}

global_asm!(
    ".macro probe name, access:vararg",
    ".global \\name",
    "\\name:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "stmxcsr [rsp]",
    // Load: MXCSR, SSE, red zone, flags, and by MOV, which leaves the flags alone, the general registers.
    "ldmxcsr [rip + {before} + {mxcsr}]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "movups xmm\\n, [rip + {before} + {sse} + 16 * \\n]",
    ".endr",
    "push qword ptr [rip + {before} + {flags}]",
    "popfq",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov rax, [rip + {before} + {red_zone} + 8 * \\n]",
    "mov [rsp - 128 + 8 * \\n], rax",
    ".endr",
    "mov rax, [rip + {before}]",
    "mov rcx, [rip + {before} + 8]",
    "mov rdx, [rip + {before} + 16]",
    "mov rbx, [rip + {before} + 24]",
    "mov rbp, [rip + {before} + 32]",
    "mov rsi, [rip + {before} + 40]",
    "mov rdi, [rip + {before} + 48]",
    ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov r\\n, [rip + {before} + 56 + 8 * (\\n - 8)]",
    ".endr",
    "\\access",
    // Store, in the reverse manner.
    "mov [rip + {after}], rax",
    "mov [rip + {after} + 8], rcx",
    "mov [rip + {after} + 16], rdx",
    "mov [rip + {after} + 24], rbx",
    "mov [rip + {after} + 32], rbp",
    "mov [rip + {after} + 40], rsi",
    "mov [rip + {after} + 48], rdi",
    ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov [rip + {after} + 56 + 8 * (\\n - 8)], r\\n",
    ".endr",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov rax, [rsp - 128 + 8 * \\n]",
    "mov [rip + {after} + {red_zone} + 8 * \\n], rax",
    ".endr",
    "pushfq",
    "pop qword ptr [rip + {after} + {flags}]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "movups [rip + {after} + {sse} + 16 * \\n], xmm\\n",
    ".endr",
    "stmxcsr [rip + {after} + {mxcsr}]",
    "ldmxcsr [rsp]",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".endm",
    ".text",
    "probe probe_by_port, in al, dx",
    // An address where the platform page has no register; MOV takes it as an absolute one into RAX.
    "probe probe_by_window, movabs rax, [0xd0000100]",
    ".purgem probe",
    before = sym BEFORE,
    after = sym AFTER,
    flags = const core::mem::offset_of!(State, flags),
    sse = const core::mem::offset_of!(State, sse),
    red_zone = const core::mem::offset_of!(State, red_zone),
    mxcsr = const core::mem::offset_of!(State, mxcsr),
);
