//! From the entry point to ring 3, and back into it from exceptions.
//!
//! ```text
//! entry (ring 0) ── lidt, iretq ──▶ start_in_ring_3 ── gates, heap ──▶ guest_main ──▶ power-off
//! interrupt (ring 0, IST1) ── count ──▶ iretq
//! exception (ring 0, IST1) ── note what happened ── iretq ──▶ report_exception (ring 3) ──▶ power-off
//! ```
//! Some KVMs emulate ring 0 slowly and without SSE: the code there is assembly, short and integer only.

use crate::boot::{self, Boot};
use crate::interrupts::{self, COUNTS, Gate};
use crate::platform::power_off;
use crate::{STATUS_ERROR, STATUS_EXCEPTION, STATUS_NO_BOOT, STATUS_PANIC, console_line, heap};
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// The ring-3 stack lies in the free RAM below the image and grows down to 0xa0000: 384 KiB.
const STACK_TOP: usize = 0x10_0000;
const EXCEPTION_STACK_BYTES: usize = 16 << 10;
const VECTORS: usize = 48;

/// The interrupt descriptor table. LIDT names it in ring 0; it is filled in ring 3, where that costs nothing.
#[repr(C, align(16))]
pub(crate) struct Table(pub(crate) UnsafeCell<[Gate; VECTORS]>);
// SAFETY: written once, by the only thread, before interrupts are opened.
unsafe impl Sync for Table {}
pub(crate) static TABLE: Table = Table(UnsafeCell::new([Gate::NONE; VECTORS]));

/// What the exception stub notes for the report.
#[repr(C)]
struct Exception {
    vector: u64,
    error_code: u64,
    instruction: u64,
    address: u64,
}
struct ExceptionCell(UnsafeCell<Exception>);
// SAFETY: written by the exception stub, once, before the report that reads it starts.
unsafe impl Sync for ExceptionCell {}
static EXCEPTION: ExceptionCell = ExceptionCell(UnsafeCell::new(Exception {
    vector: 0,
    error_code: 0,
    instruction: 0,
    address: 0,
}));

#[repr(C, align(16))]
struct ExceptionStack(UnsafeCell<[u8; EXCEPTION_STACK_BYTES]>);
// SAFETY: used by the exception report alone.
unsafe impl Sync for ExceptionStack {}
static EXCEPTION_STACK: ExceptionStack =
    ExceptionStack(UnsafeCell::new([0; EXCEPTION_STACK_BYTES]));

global_asm!(
    ".section .text.start, \"ax\"",
    ".global guest_start",
    "guest_start:",
    "lidt [rip + guest_table_pointer]",
    "push 0x1b", // SS
    "push {stack}",
    "push 0x202", // RFLAGS: interrupts on
    "push 0x23",  // CS
    "lea rax, [rip + {start}]",
    "push rax",
    "iretq", // RDI is still the boot information
    //
    // Exception stubs, 16 bytes apart: make every frame the same (error code, vector), then go on together.
    ".balign 16",
    ".global guest_stubs",
    "guest_stubs:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    // The vectors for which the processor pushes an error code: 8, 10-14, 17, 21, 29, 30.
    ".if ((0x60227d00 >> vector) & 1) == 0",
    "push 0",
    ".endif",
    "push vector",
    "jmp guest_exception",
    ".set vector, vector + 1",
    ".endr",
    // Interrupt stubs, 16 bytes apart. IRETQ restores the flags that INC changes.
    ".set line, 0",
    ".rept 16",
    ".balign 16",
    "inc qword ptr [rip + {counts} + 8 * line]",
    "iretq",
    ".set line, line + 1",
    ".endr",
    //
    ".balign 16",
    "guest_exception:",
    "bts dword ptr [rip + guest_in_exception], 0",
    "jc 2f",
    "pop qword ptr [rip + {exception}]",
    "pop qword ptr [rip + {exception} + 8]",
    "pop qword ptr [rip + {exception} + 16]",
    "mov rax, cr2",
    "mov [rip + {exception} + 24], rax",
    "push 0x1b",
    "lea rax, [rip + {exception_stack} + {exception_stack_bytes} - 8]",
    "push rax",
    "push 2", // RFLAGS: interrupts off
    "push 0x23",
    "lea rax, [rip + {report}]",
    "push rax",
    "iretq",
    "2:", // an exception in the report: nothing is left but the status
    "mov dx, 0x604",
    "mov ax, 0x20ee",
    "out dx, ax",
    "jmp 2b",
    //
    ".section .data.start, \"aw\"",
    ".balign 16",
    "guest_table_pointer:",
    ".word {table_limit}",
    ".quad {table}",
    ".balign 4",
    "guest_in_exception:",
    ".long 0",
    ".text",
    stack = const STACK_TOP - 8, // as after a call: 16 n + 8
    start = sym start_in_ring_3,
    counts = sym COUNTS,
    exception = sym EXCEPTION,
    exception_stack = sym EXCEPTION_STACK,
    exception_stack_bytes = const EXCEPTION_STACK_BYTES,
    report = sym report_exception,
    table_limit = const size_of::<Table>() - 1,
    table = sym TABLE,
);

unsafe extern "C" {
    static guest_stubs: u8;
}

unsafe extern "Rust" {
    /// Supplied by the guest through `entry!`.
    fn guest_main(boot: &'static Boot) -> crate::Outcome;
}

/// Where a vector's stub lies.
pub(crate) fn stub(vector: usize) -> u64 {
    const STRIDE: u64 = 16;
    &raw const guest_stubs as u64 + STRIDE * vector as u64
}

/// The first code in ring 3.
extern "C" fn start_in_ring_3(information: *const boot::BootInformation) -> ! {
    interrupts::install();
    // SAFETY: the entry stub passes on what the loader gave.
    let Some(boot) = (unsafe { Boot::read(information) }) else {
        power_off(STATUS_NO_BOOT);
    };
    // SAFETY: RAM from the image's end on is free, and this is its only taker.
    unsafe { heap::claim(boot.image_end, boot.ram_bytes) };
    let boot = alloc::boxed::Box::leak(alloc::boxed::Box::new(boot));
    // SAFETY: `entry!` defines the function with this very signature.
    match unsafe { guest_main(boot) } {
        Ok(status) => power_off(status),
        Err(error) => {
            console_line!("error: {error}");
            power_off(STATUS_ERROR);
        }
    }
}

extern "C" fn report_exception() -> ! {
    // SAFETY: the stub has written it and comes here once only.
    let exception = unsafe { &*EXCEPTION.0.get() };
    console_line!(
        "exception {} error {:#x} rip {:#x} cr2 {:#x}",
        exception.vector,
        exception.error_code,
        exception.instruction,
        exception.address
    );
    power_off(STATUS_EXCEPTION);
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    if !PANICKED.swap(true, Ordering::Relaxed) {
        console_line!("{information}");
    }
    power_off(STATUS_PANIC);
}
