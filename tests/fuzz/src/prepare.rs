//! What `doppel prepare` reads: kernels, packed and not, their tables of symbols, modules, programs, archives.
#![forbid(unsafe_code)]

use hypervisor::prepare::{self, Limits, Outcome, Report};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "prepare",
    line: "a kernel, module, program or initramfs: prepared, and only sites changed, or refused in words",
    run,
    seeds,
};

/// As much as an input of some kilobytes may unpack to here.
const LIMITS: Limits = Limits { unpacked: 1 << 22 };

/// A byte says what the rest is; a kernel comes as it is, in a bzImage made around it, or with a map of its symbols before it.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    match source.u8() % 6 {
        0 => kernel(source.rest().to_vec(), None),
        1 => kernel(bzimage(source.rest()), None),
        2 => {
            let length = usize::from(source.u8());
            let map = String::from_utf8_lossy(source.bytes(length)).into_owned();
            kernel(source.rest().to_vec(), Some(&map));
        }
        3 => {
            let old = source.rest();
            let (new, report) = prepare::program(old.to_vec(), "program");
            let mut whole = Report::default();
            whole.add(report);
            same_but_for_sites(old, &new, &whole);
        }
        4 => {
            let old = source.rest();
            let (new, report) = prepare::module(old.to_vec(), "m.ko");
            assert!(new.len() <= old.len());
            assert!(
                report.rewritten() > 0 || new == old,
                "nothing to rewrite, and it changed"
            );
        }
        _ => match prepare::initramfs(source.rest(), LIMITS) {
            Ok(new) => {
                let again = prepare::initramfs(&new.bytes, LIMITS)
                    .expect("what was prepared is an initramfs");
                assert!(again.bytes == new.bytes, "preparing twice changed more");
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        },
    }
}

fn kernel(bytes: Vec<u8>, map: Option<&str>) {
    match prepare::kernel(bytes.clone(), map, LIMITS) {
        Ok(new) => {
            let old = prepare::vmlinux(bytes, LIMITS).expect("it was one");
            same_but_for_sites(&old, &new.bytes, &new.report);
            let again = prepare::kernel(new.bytes.clone(), map, LIMITS)
                .expect("what was prepared is a kernel");
            assert!(again.bytes == new.bytes, "preparing twice changed more");
            assert!(!new.report.text().is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn same_but_for_sites(old: &[u8], new: &[u8], report: &Report) {
    let mut expected = old.to_vec();
    for site in report.files.iter().flat_map(|file| &file.sites) {
        if let Outcome::Rewritten(_) = site.outcome {
            expected[site.offset..][..2].copy_from_slice(&new[site.offset..][..2]);
        }
    }
    assert!(expected == new, "something else changed");
}

/// An image whose header is right, around this payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(payload);
    image
}

/// Name, type, flags, address, bytes, link.
type Section<'a> = (u32, u32, u64, u64, &'a [u8], u32);

/// An ELF file of one function that reads the counter, with a symbol for it; its type says what it is.
fn elf(kind: u16, address: u64) -> Vec<u8> {
    let code = [0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0xc3];
    let mut symbols = vec![0; 24];
    symbols.extend([1, 0, 0, 0, 2, 0, 1, 0]);
    symbols.extend(address.to_le_bytes());
    symbols.extend(10u64.to_le_bytes());
    let sections: [Section<'_>; 5] = [
        (0, 0, 0, 0, b"", 0),
        (1, 1, 6, address, &code, 0),
        (7, 2, 0, 0, &symbols, 3),
        (15, 3, 0, 0, b"\0f\0", 0),
        (23, 1, 2, 0, b"\0.text\0.symtab\0.strtab\0.modinfo\0", 0),
    ];
    let mut file = vec![0; 64];
    let mut headers = Vec::new();
    for (name, kind, flags, address, bytes, link) in sections {
        headers.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
        for word in [flags, address, file.len() as u64, bytes.len() as u64] {
            headers.extend(word.to_le_bytes());
        }
        headers.extend(link.to_le_bytes());
        headers.extend([0; 20]);
        file.extend(bytes);
    }
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16] = kind as u8;
    file[18] = 62;
    let table = file.len() as u64;
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[58..64].copy_from_slice(&[64, 0, 5, 0, 4, 0]);
    file.extend(headers);
    file
}

fn archive(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, bytes) in [(name, bytes), ("TRAILER!!!", b"")] {
        let (mode, size, length) = (0o100_755, bytes.len(), name.len() + 1);
        archive.extend(
            format!(
                "070701{:08X}{mode:08X}{:032X}{size:08X}{:032X}{length:08X}{:08X}",
                0, 0, 0, 0
            )
            .bytes(),
        );
        for part in [&[name.as_bytes(), b"\0"].concat(), bytes] {
            archive.extend(part);
            let odd = archive.len().next_multiple_of(4);
            archive.resize(odd, 0);
        }
    }
    archive
}

fn seeds() -> Vec<Vec<u8>> {
    const KERNEL: u64 = 0xffff_ffff_8100_0000;
    let kernel = elf(2, KERNEL);
    let made = prepare::kernel(kernel.clone(), None, LIMITS).expect("the seed is a kernel");
    assert_eq!(made.report.files[0].rewritten(), 1, "the seed has a site");
    let program = elf(2, 0x40_1000);
    let of = |which: u8, bytes: &[u8]| [&[which], bytes].concat();
    let map = b"ffffffff81000000 T f\n";
    let mapped = [&[map.len() as u8], &map[..], &kernel].concat();
    // `xz --x86` and `zstd` of 29 bytes that are no kernel.
    let xz = b"\xfd\x37\x7a\x58\x5a\x00\x00\x01\x69\x22\xde\x36\x02\x01\x04\x00\x21\x01\x0c\x00\xd6\x7c\x18\xaf\xe0\x00\x1c\x00\x17\x5d\x00\x32\x1b\xca\x67\xcc\xec\xde\xed\xe6\xc5\xbb\xaa\x70\x80\x9f\x3c\xb1\x96\x16\x3f\x29\x00\x00\x00\x00\xb9\xc3\x7f\x06\x00\x01\x2f\x1d\x9f\xe1\x9c\x51\x90\x42\x99\x0d\x01\x00\x00\x00\x00\x01\x59\x5a";
    let zstd = b"\x28\xb5\x2f\xfd\x04\x58\xb5\x00\x00\x80\x64\x6f\x70\x70\x65\x6c\x20\x2c\x20\x70\x61\x63\x6b\x65\x64\x0a\x01\x00\x3a\x8a\x11\x94\x0d\x86\xa6";
    vec![
        of(0, &kernel),
        of(1, xz),
        of(1, zstd),
        of(2, &mapped),
        of(3, &program),
        of(4, &elf(1, 0)),
        of(5, &archive("bin/program", &program)),
        of(5, xz),
    ]
}
