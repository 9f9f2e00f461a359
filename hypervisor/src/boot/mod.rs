//! Loading a guest: a bare-metal one, with what `docs/guest-abi.md` promises at the entry point, or Linux.
#![forbid(unsafe_code)]

mod image;
pub mod linux;
mod tables;

pub use image::{Image, ImageError, is_built_in};

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::kvm::{KvmError, Vcpu};
use crate::memory::GuestRam;

/// First byte that an image may use.
pub const IMAGE_BASE: u64 = 0x10_0000;
const BOOT_INFO: u64 = 0x1000;
const GDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const TSS_SIZE: u32 = 104;
/// The I/O permission bitmap: one bit a port and a closing byte of ones.
const IO_BITMAP_SIZE: u32 = 8192;
const COMMAND_LINE: u64 = 0x6000;
const COMMAND_LINE_MAX: usize = 4095;
const BOOT_STACK_TOP: u64 = 0x9_0000;
const INTERRUPT_STACK_TOP: u64 = 0xa_0000;
/// `D O P A B 1 0 0`.
const MAGIC: u64 = u64::from_le_bytes(*b"DOPAB1\0\0");

/// What can go wrong while a guest is loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is not one we can load.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel is not one we can load, or does not fit.
    #[error(transparent)]
    Linux(#[from] linux::LinuxError),
    /// The command line is too long.
    #[error("the command line has {length} bytes; at most {COMMAND_LINE_MAX} fit")]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// Guest memory could not be written.
    #[error("could not write guest memory: {0}")]
    Memory(#[from] crate::memory::MemoryError),
    /// KVM refused the initial state.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Puts the image, the tables, the boot information and the command line into memory, and the vCPU at the entry.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    ram: &GuestRam,
    vcpu: &Vcpu,
    image: &Image,
    command_line: &str,
    wall_clock_ns: u64,
) -> Result<(), BootError> {
    if command_line.len() > COMMAND_LINE_MAX {
        return Err(BootError::CommandLine {
            length: command_line.len(),
        });
    }
    let image_end = image.place(ram)?;
    let page_table = tables::write(ram)?;
    write_gdt_and_tss(ram)?;
    ram.write(COMMAND_LINE, command_line.as_bytes())?;
    let info = [
        MAGIC,
        ram.size(),
        COMMAND_LINE,
        command_line.len() as u64,
        image_end,
        wall_clock_ns,
    ];
    for (index, word) in info.iter().enumerate() {
        ram.write(BOOT_INFO + 8 * index as u64, &word.to_le_bytes())?;
    }
    let regs = kvm_regs {
        rip: image.entry(),
        rsp: BOOT_STACK_TOP,
        rdi: BOOT_INFO,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set(
        &regs,
        &system_registers(vcpu.sregs()?, page_table),
        &fpu_at_reset(),
    )?;
    Ok(())
}

fn write_gdt_and_tss(ram: &GuestRam) -> Result<(), BootError> {
    let tss_limit = u64::from(TSS_SIZE + IO_BITMAP_SIZE);
    let tss_low = (tss_limit & 0xffff)
        | (TSS & 0xff_ffff) << 16
        | 0x8b << 40
        | ((tss_limit >> 16) & 0xf) << 48
        | ((TSS >> 24) & 0xff) << 56;
    let gdt: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff, // 0x08 code, ring 0, 64-bit
        0x00cf_9300_0000_ffff, // 0x10 data, ring 0
        0x00cf_f300_0000_ffff, // 0x18 data, ring 3
        0x00af_fb00_0000_ffff, // 0x20 code, ring 3, 64-bit
        tss_low,               // 0x28 TSS, busy
        TSS >> 32,
    ];
    for (index, descriptor) in gdt.iter().enumerate() {
        ram.write(GDT + 8 * index as u64, &descriptor.to_le_bytes())?;
    }
    ram.write(TSS + 4, &BOOT_STACK_TOP.to_le_bytes())?;
    ram.write(TSS + 36, &INTERRUPT_STACK_TOP.to_le_bytes())?;
    ram.write(TSS + 102, &(TSS_SIZE as u16).to_le_bytes())?;
    ram.write(TSS + u64::from(TSS_SIZE + IO_BITMAP_SIZE), &[0xff])?;
    Ok(())
}

/// x87 and SSE as after a reset.
fn fpu_at_reset() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Flat 64-bit code and data of ring 0 by these selectors, and no interrupt table.
fn flat_segments(sregs: &mut kvm_sregs, code: u16, data: u16) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: code,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: data,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

fn system_registers(mut sregs: kvm_sregs, page_table: u64) -> kvm_sregs {
    flat_segments(&mut sregs, 0x08, 0x10);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: TSS_SIZE + IO_BITMAP_SIZE,
        selector: 0x28,
        type_: 0xb,
        present: 1,
        s: 0,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        type_: 2,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 7 * 8 - 1;
    sregs.cr0 = 0x8001_0033; // PE MP ET NE WP PG
    sregs.cr3 = page_table;
    sregs.cr4 = 0x620; // PAE OSFXSR OSXMMEXCPT
    sregs.efer = 0x500; // LME LMA
    sregs
}
