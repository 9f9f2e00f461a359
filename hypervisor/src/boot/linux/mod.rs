//! Loading a Linux kernel: an ELF `vmlinux` or a bzImage, by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! ```text
//! 0x1000 GDT │ 0x7000 zero page │ 0x9000 page tables │ 0x2_0000 command line │ 0x3_0000 seed of the random pool
//! 0xe_0000 ACPI tables │ 0x100_0000 the kernel … │ … the initial RAM disk, at the end of RAM
//! ```
//! Pages are mapped one to one, until the kernel has made tables of its own.
#![forbid(unsafe_code)]

mod acpi;

use std::io::Cursor;

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{self, BzImage, Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, flat_segments, fpu_at_reset};
use crate::kvm::Vcpu;
use crate::memory::{GuestRam, MemoryError};

const GDT: u64 = 0x1000;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORIES: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x2_0000;
const SEED: u64 = 0x3_0000;
/// The end of what a PC's kernel may use below 640 KiB: the extended BIOS data area begins here.
const LOW_END: u64 = 0x9_fc00;
const TABLES: u64 = 0xe_0000;
const HIGH: u64 = 0x10_0000;
/// The least RAM that a distribution's kernel boots in.
const RAM_MIN: u64 = 128 << 20;
/// The kernel itself takes 2048 bytes, with the zero at the end (COMMAND_LINE_SIZE of x86).
const COMMAND_LINE_MAX: usize = 2047;

/// Bytes of the seed.
pub const SEED_BYTES: usize = 32;

/// What every kernel is told, before its own words. There is no local APIC and no PCI here; mitigations are the host's; an address
/// layout drawn at random costs exactness nothing, as the seed is logged, but a core dump is easier to read without; the delay loop is
/// not measured, as its length would decide over the boot's.
const WORDS: &str = "console=ttyS0 nolapic noapic pci=off lpj=1000000 nokaslr mitigations=off random.trust_cpu=off \
                     randomize_kstack_offset=off no_timer_check panic=-1";

/// The same where the guest has the host's CPU and KVM's interrupt controller: nothing of it need be the same twice. The timer's
/// wiring is not tried out, as hypervisors recommend.
const WORDS_OF_CREWS: &str = "console=ttyS0 pci=off mitigations=off no_timer_check panic=-1";

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// Neither an ELF file nor a bzImage, or a broken one.
    #[error(
        "{name:?} is no Linux kernel for x86-64 that can be loaded ({source}): give a vmlinux (ELF) or a bzImage"
    )]
    Kernel {
        /// The file.
        name: String,
        /// What the loader says.
        source: loader::Error,
    },
    /// Too little RAM for all of it.
    #[error(
        "the machine has {ram} MiB; this kernel and its initial RAM disk need at least {needed}: give it more with --memory"
    )]
    Ram {
        /// What there is.
        ram: u64,
        /// What it takes.
        needed: u64,
    },
    /// The kernel would cut it.
    #[error("the kernel's command line has {length} bytes; at most {COMMAND_LINE_MAX} fit")]
    CommandLine {
        /// Its length, ours included.
        length: usize,
    },
    /// Guest memory could not be written.
    #[error("could not write guest memory: {0}")]
    Memory(#[from] MemoryError),
}

/// A kernel and what it is given.
#[derive(Clone, Copy, Debug)]
pub struct Linux<'a> {
    /// The kernel's file name, for messages.
    pub name: &'a str,
    /// The kernel.
    pub kernel: &'a [u8],
    /// The initial RAM disk; empty if there is none.
    pub initrd: &'a [u8],
    /// Words after ours.
    pub command_line: &'a str,
    /// Seeds the kernel's random pool.
    pub seed: [u8; SEED_BYTES],
    /// Whether there is a disk, for the tables to tell.
    pub disk: bool,
    /// How many vCPUs with local APICs there are; none: one without, and the 8259s.
    pub vcpus: Option<u8>,
}

/// Loads all of it, and puts the vCPU at the entry.
///
/// # Errors
/// See [`LinuxError`] and [`BootError::Kvm`].
pub fn load(ram: &GuestRam, vcpu: &Vcpu, linux: &Linux<'_>) -> Result<(), BootError> {
    let entry = place(ram, linux)?;
    let regs = kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set(&regs, &system_registers(vcpu.sregs()?), &fpu_at_reset())?;
    Ok(())
}

/// Puts everything into memory; the entry point comes back.
fn place(ram: &GuestRam, linux: &Linux<'_>) -> Result<u64, LinuxError> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let little = |needed: u64| LinuxError::Ram {
        ram: mib(ram.size()),
        needed: mib(needed.max(RAM_MIN)),
    };
    if ram.size() < RAM_MIN {
        return Err(little(0));
    }
    // An ELF file takes no more than it has, and what it zeroes at its end; what is packed knows its own need.
    let (entry, header, end) = place_kernel(ram, linux).map_err(|source| match source {
        // The loaders do not say which of their reads failed: of a file that is whole it is the memory that ended.
        loader::Error::Elf(loader::elf::Error::ReadKernelImage)
            if linux.kernel.len() as u64 + HIGH > ram.size() =>
        {
            little(linux.kernel.len() as u64 * 2)
        }
        source => LinuxError::Kernel {
            name: linux.name.to_owned(),
            source,
        },
    })?;
    let disk = linux.initrd.len() as u64;
    let disk_at = ram
        .size()
        .checked_sub(disk)
        .map(|at| at & !0xfff)
        .filter(|&at| at >= end)
        .ok_or_else(|| little(end + disk))?;
    ram.write(disk_at, linux.initrd)?;

    let words = match linux.vcpus {
        None => WORDS,
        Some(_) => WORDS_OF_CREWS,
    };
    let line = format!("{words} {}", linux.command_line);
    let line = line.trim_end();
    if line.len() > COMMAND_LINE_MAX {
        return Err(LinuxError::CommandLine { length: line.len() });
    }
    ram.write(COMMAND_LINE, line.as_bytes())?;
    ram.write(COMMAND_LINE + line.len() as u64, &[0])?;
    write_seed(ram, &linux.seed)?;
    let tables = acpi::tables(TABLES, linux.disk, linux.vcpus);
    ram.write(TABLES, &tables)?;
    write_page_tables(ram)?;
    write_gdt(ram)?;

    let mut zero_page = boot_params {
        hdr: header,
        acpi_rsdp_addr: TABLES,
        ..Default::default()
    };
    zero_page.hdr.boot_flag = 0xaa55;
    zero_page.hdr.header = u32::from_le_bytes(*b"HdrS");
    zero_page.hdr.type_of_loader = 0xff;
    zero_page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    zero_page.hdr.cmdline_size = line.len() as u32 + 1;
    zero_page.hdr.setup_data = SEED;
    if disk > 0 {
        zero_page.hdr.ramdisk_image = disk_at as u32;
        zero_page.hdr.ramdisk_size = disk as u32;
    }
    const USABLE: u32 = 1;
    const RESERVED: u32 = 2;
    let map = [
        (0, LOW_END, USABLE),
        (TABLES, HIGH - TABLES, RESERVED),
        (HIGH, ram.size() - HIGH, USABLE),
    ];
    for (place, (addr, size, kind)) in zero_page.e820_table.iter_mut().zip(map) {
        *place = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
    zero_page.e820_entries = map.len() as u8;
    ram.write_obj(ZERO_PAGE, zero_page)?;
    Ok(entry)
}

/// Entry point, setup header, and the first address behind the kernel.
fn place_kernel(
    ram: &GuestRam,
    linux: &Linux<'_>,
) -> Result<(u64, setup_header, u64), loader::Error> {
    let memory = ram.guest_memory();
    let mut file = Cursor::new(linux.kernel);
    let high = Some(GuestAddress(HIGH));
    if linux.kernel.starts_with(b"\x7fELF") {
        let loaded = Elf::load(memory, None, &mut file, high)?;
        let header = setup_header {
            kernel_alignment: 0x100_0000,
            ..Default::default()
        };
        return Ok((loaded.kernel_load.0, header, loaded.kernel_end));
    }
    let loaded = BzImage::load(memory, None, &mut file, high)?;
    let header = loaded.setup_header.unwrap_or_default();
    // The 64-bit entry point lies 0x200 behind the 32-bit one; what it unpacks takes `init_size` from its preferred address on.
    let end = header
        .pref_address
        .saturating_add(u64::from(header.init_size))
        .max(loaded.kernel_end);
    Ok((loaded.kernel_load.0 + 0x200, header, end))
}

/// `struct setup_data` with a seed (SETUP_RNG_SEED): without one the kernel gathers randomness from time stamps, ten times the
/// exits of the whole boot.
fn write_seed(ram: &GuestRam, seed: &[u8]) -> Result<(), MemoryError> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut data = vec![0; 8];
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&(seed.len() as u32).to_le_bytes());
    data.extend_from_slice(seed);
    ram.write(SEED, &data)
}

/// The first 4 GiB, one to one, by pages of 2 MiB.
fn write_page_tables(ram: &GuestRam) -> Result<(), MemoryError> {
    const TABLE: u64 = 0x3;
    const LARGE: u64 = 0x83;
    let put = |address: u64, value: u64| ram.write(address, &value.to_le_bytes());
    put(PML4, PDPT | TABLE)?;
    for gib in 0..4 {
        put(PDPT + 8 * gib, (DIRECTORIES + 0x1000 * gib) | TABLE)?;
    }
    for large in 0..2048 {
        put(DIRECTORIES + 8 * large, large << 21 | LARGE)?;
    }
    Ok(())
}

/// The protocol wants code at selector 0x10 (`__BOOT_CS`) and data at 0x18.
fn write_gdt(ram: &GuestRam) -> Result<(), MemoryError> {
    let gdt: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (index, descriptor) in gdt.iter().enumerate() {
        ram.write(GDT + 8 * index as u64, &descriptor.to_le_bytes())?;
    }
    Ok(())
}

fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    flat_segments(&mut sregs, 0x10, 0x18);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr0 = 0x8000_0011; // PE ET PG
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LME LMA
    sregs
}

#[cfg(test)]
mod tests;
