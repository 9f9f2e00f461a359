use super::*;
use crate::memory::GuestRam;

const SEED_ZERO: [u8; SEED_BYTES] = [7; SEED_BYTES];

/// An ELF file of one segment at 16 MiB that holds `code` and `zeroes` more.
fn elf(code: &[u8], zeroes: u64) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes());
    put(80, &0xffff_ffff_8100_0000u64.to_le_bytes());
    put(88, &0x100_0000u64.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64 + zeroes).to_le_bytes());
    file.extend_from_slice(code);
    file
}

fn linux<'a>(kernel: &'a [u8], initrd: &'a [u8], command_line: &'a str) -> Linux<'a> {
    Linux {
        name: "vmlinux",
        kernel,
        initrd,
        command_line,
        seed: SEED_ZERO,
        disk: false,
        vcpus: None,
    }
}

fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read(at, &mut bytes).unwrap();
    bytes
}

#[test]
fn everything_lies_where_the_zero_page_says() {
    let ram = GuestRam::new(128).unwrap();
    let kernel = elf(b"code", 100);
    let disk = vec![0x5a; 5000];
    let entry = place(&ram, &linux(&kernel, &disk, "quiet root=/dev/vda")).unwrap();
    assert_eq!(entry, 0x100_0000);
    assert_eq!(bytes(&ram, entry, 4), b"code");
    let page: boot_params = ram.read_obj(ZERO_PAGE).unwrap();
    let at = u64::from(page.hdr.ramdisk_image);
    assert_eq!(at % 4096, 0);
    assert_eq!({ page.hdr.ramdisk_size }, 5000);
    assert_eq!(bytes(&ram, at, 5000), disk);
    let line = bytes(
        &ram,
        u64::from(page.hdr.cmd_line_ptr),
        page.hdr.cmdline_size as usize,
    );
    let line = String::from_utf8(line).unwrap();
    assert!(line.starts_with("console=ttyS0 "), "{line}");
    assert!(line.ends_with(" quiet root=/dev/vda\0"), "{line}");
    let seed = bytes(&ram, page.hdr.setup_data, 16 + SEED_BYTES);
    assert_eq!(seed[..8], [0; 8], "no more data");
    assert_eq!(seed[8..16], [9, 0, 0, 0, 32, 0, 0, 0]);
    assert_eq!(seed[16..], SEED_ZERO);
    assert_eq!(bytes(&ram, page.acpi_rsdp_addr, 8), b"RSD PTR ");
    let usable: u64 = page.e820_table[..usize::from(page.e820_entries)]
        .iter()
        .filter(|entry| { entry.r#type } == 1)
        .map(|entry| entry.size)
        .sum();
    assert_eq!(usable, (128 << 20) - HIGH + LOW_END);
}

#[test]
fn what_cannot_be_loaded_is_refused_with_what_to_do() {
    let ram = GuestRam::new(128).unwrap();
    let refused = |linux: &Linux<'_>| place(&ram, linux).unwrap_err();
    let kernel = elf(b"code", 0);
    for no_kernel in [&b""[..], b"#!/bin/sh\n", &kernel[..70], &[0; 0x3000]] {
        let error = refused(&linux(no_kernel, &[], ""));
        assert!(matches!(error, LinuxError::Kernel { .. }), "{error}");
    }
    // A file that is cut short, and a header that is not this machine's.
    let cut = &kernel[..kernel.len() - 1];
    assert!(matches!(
        refused(&linux(cut, &[], "")),
        LinuxError::Kernel { .. }
    ));
    let large = vec![0; 120 << 20];
    let error = refused(&linux(&kernel, &large, ""));
    assert!(matches!(error, LinuxError::Ram { .. }), "{error}");
    let long = "x".repeat(COMMAND_LINE_MAX);
    let error = refused(&linux(&kernel, &[], &long));
    assert!(matches!(error, LinuxError::CommandLine { .. }), "{error}");
    let small = GuestRam::new(64).unwrap();
    let error = place(&small, &linux(&kernel, &[], "")).unwrap_err();
    assert!(error.to_string().contains("--memory"), "{error}");
}
