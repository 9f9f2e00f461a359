//! Whole files, made by hand around code of Debian's kernel.

mod bounds;
mod build;
mod clock;
mod hostile;
mod places;

use std::io::Write;

use self::build::{Build, CODE, DATA};
use super::kallsyms::tests::table;
use super::*;

/// Debian 12's `read_tsc`: RDTSC with room for LFENCE before it.
const READ_TSC: &[u8] = &[
    0x0f, 0x31, 0x90, 0x90, 0x90, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0xe9, 0x1f, 0x49, 0xdc,
    0x00,
];
/// JE over XOR, in another function of it: the bytes of RDTSC across two instructions.
const LOOKS_LIKE_IT: &[u8] = &[
    0x48, 0x85, 0xc0, 0x74, 0x0f, 0x31, 0xd2, 0x5b, 0x89, 0xd0, 0x5d, 0xc3,
];
const TEXT: u64 = 0xffff_ffff_8100_0000;
const REPLACEMENTS: u64 = TEXT + 0x3000;
const TABLE: u64 = TEXT + 0x4000;
/// LFENCE; RDTSC, then RDTSCP: what `rdtsc_ordered` is made with.
const ORDERED: &[u8] = &[0x0f, 0xae, 0xe8, 0x0f, 0x31, 0x0f, 0x01, 0xf9];

fn text() -> Vec<u8> {
    let mut text = READ_TSC.to_vec();
    text.resize(32, 0xcc);
    text.extend(LOOKS_LIKE_IT);
    text.resize(64, 0xcc);
    // A table between functions, with the same bytes.
    text.extend([0x06, 0x0f, 0x31, 0x06]);
    text.resize(80, 0xcc);
    text.extend(READ_TSC);
    text
}

const SYMBOLS: [(&str, u64); 4] = [
    ("read_tsc", 0),
    ("has_none", 32),
    ("a_table", 64),
    ("sched_clock", 80),
];

/// A kernel. Its symbols are in a table of the file, or in `kallsyms`.
fn vmlinux_with(kallsyms: Option<&[u8]>) -> Vec<u8> {
    let mut build = Build::executable();
    let number = build.section(".text", CODE, TEXT, &text());
    if let Some(kallsyms) = kallsyms {
        build.section(".rodata", DATA, TEXT + 0x10_0000, kallsyms);
    } else {
        for (name, value) in SYMBOLS {
            build.symbol(name, number, TEXT + value);
        }
    }
    let mut entries = Vec::new();
    for (original, replacement, length) in [(0, 0, 5), (0, 5, 3), (80, 0, 5)] {
        let at = TABLE + entries.len() as u64;
        entries.extend((TEXT.wrapping_add(original).wrapping_sub(at) as u32).to_le_bytes());
        entries.extend(
            (REPLACEMENTS + replacement)
                .wrapping_sub(at + 4)
                .to_le_bytes()[..4]
                .iter(),
        );
        entries.extend([0x70, 0, 5, length]);
    }
    build.section(".altinstructions", DATA, TABLE, &entries);
    build.section(".altinstr_replacement", CODE, REPLACEMENTS, ORDERED);
    build.finish()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).expect("memory takes everything");
    writer.finish().expect("memory takes everything")
}

fn prepared(bytes: &[u8]) -> Prepared {
    kernel(bytes.to_vec(), None, Limits::default()).expect("a kernel")
}

/// Where two files differ, with the new bytes.
fn changes(old: &[u8], new: &[u8]) -> Vec<(usize, u8)> {
    assert_eq!(old.len(), new.len());
    let pairs = old.iter().zip(new).enumerate();
    pairs
        .filter(|(_, (old, new))| old != new)
        .map(|(at, (_, &new))| (at, new))
        .collect()
}

fn sites(report: &Report) -> Vec<(String, String, Option<String>)> {
    let sites = report.files.iter().flat_map(|file| &file.sites);
    sites
        .map(|site| {
            let new = match &site.outcome {
                Outcome::Rewritten(new) => Some(new.clone()),
                Outcome::Left(_) => None,
            };
            (
                format!("{} {}", site.section, site.place),
                site.old.clone(),
                new,
            )
        })
        .collect()
}

fn site(place: &str, old: &str, new: Option<&str>) -> (String, String, Option<String>) {
    (place.to_owned(), old.to_owned(), new.map(str::to_owned))
}

/// The sites of [`vmlinux_with`].
fn expected() -> Vec<(String, String, Option<String>)> {
    let new = format!("e5{TSC_PORT:02x}");
    vec![
        site(".text read_tsc", "0f31", Some(&new)),
        site(".text sched_clock", "0f31", Some(&new)),
        site(".altinstr_replacement for read_tsc", "0f31", Some(&new)),
        site(".altinstr_replacement for read_tsc", "0f01f9", None),
    ]
}

#[test]
fn a_kernels_sites_and_only_they_become_port_reads() {
    let old = vmlinux_with(None);
    let new = prepared(&old);
    assert_eq!(sites(&new.report), expected());
    let changed = changes(&old, &new.bytes);
    assert_eq!(changed.len(), 6, "three sites of two bytes: {changed:x?}");
    for site in &new.report.files[0].sites {
        if let Outcome::Rewritten(_) = site.outcome {
            assert_eq!(old[site.offset..site.offset + 2], code::RDTSC);
            assert_eq!(new.bytes[site.offset..site.offset + 2], [0xe5, TSC_PORT]);
        }
    }
    let [gap] = &new.report.files[0].suspicious[..] else {
        panic!("{:?}", new.report.files[0].suspicious)
    };
    assert_eq!((gap.place.as_str(), gap.length), ("a_table", 16));
    let text = new.report.text();
    assert!(
        text.contains("read_tsc rdtsc 0f31 -> e5e4") && text.contains("left: only a CPU"),
        "{text}"
    );
}

#[test]
fn preparing_twice_changes_nothing_more() {
    let once = prepared(&vmlinux_with(None));
    let twice = prepared(&once.bytes);
    assert!(twice.bytes == once.bytes);
    assert_eq!(twice.report.files[0].rewritten(), 0);
    assert_eq!(
        (
            once.report.files[0].prepared,
            twice.report.files[0].prepared
        ),
        (0, 3)
    );
}

#[test]
fn a_stripped_kernel_in_a_bzimage_is_read_by_its_own_table() {
    let symbols: Vec<(u64, &str)> = SYMBOLS
        .iter()
        .map(|&(name, value)| (TEXT + value, name))
        .collect();
    let padding: Vec<String> = (0..40).map(|number| format!("data_{number}")).collect();
    let mut all = symbols.clone();
    all.extend(
        padding
            .iter()
            .enumerate()
            .map(|(at, name)| (TEXT + 0x20_0000 + at as u64, name.as_str())),
    );
    let vmlinux = vmlinux_with(Some(&table(&all, false, 64)));
    // gzip ends with the size, as a bzImage's payload does.
    let image = bzimage::tests::image(&gzip(&vmlinux));
    let new = prepared(&image);
    assert_eq!(sites(&new.report), expected());
    assert_eq!(changes(&vmlinux, &new.bytes).len(), 6);
    let bomb = kernel(image, None, Limits { unpacked: 1000 }).expect_err("too large");
    assert!(bomb.to_string().contains("more than 1000 bytes"), "{bomb}");
}

#[test]
fn a_system_map_serves_as_well_and_a_foreign_one_is_refused() {
    let junk = [0; 64];
    let stripped = vmlinux_with(Some(&junk));
    let none = kernel(stripped.clone(), None, Limits::default()).expect_err("no symbols");
    assert!(none.to_string().contains("--symbols"), "{none}");
    let map = || -> String {
        SYMBOLS
            .iter()
            .map(|(name, value)| format!("{:016x} T {name}\n", TEXT + value))
            .collect()
    };
    let new = kernel(stripped, Some(&map()), Limits::default()).expect("a kernel");
    assert_eq!(sites(&new.report), expected());
    // A hundred functions, and a map of another build that has them one byte further.
    let mut text = Vec::new();
    let mut maps = [String::new(), String::new()];
    for number in 0..100u64 {
        for (shift, map) in (0..).zip(&mut maps) {
            *map += &format!("{:x} T f{number}\n", TEXT + text.len() as u64 + shift);
        }
        text.extend(READ_TSC);
    }
    let mut build = Build::executable();
    build.section(".text", CODE, TEXT, &text);
    let many = build.finish();
    let [own, foreign] = maps;
    let new = kernel(many.clone(), Some(&own), Limits::default()).expect("its own map");
    assert_eq!(new.report.files[0].rewritten(), 100);
    let said = kernel(many, Some(&foreign), Limits::default())
        .expect_err("a foreign map")
        .to_string();
    assert!(said.contains("not of this kernel"), "{said}");
}

#[test]
fn a_vdso_inside_the_kernel_is_code_of_programs() {
    let mut vdso = Build::library();
    let number = vdso.section(".text", CODE, 0x1000, READ_TSC);
    vdso.symbol("__vdso_gettimeofday", number, 0x1000);
    let mut rodata = vec![0; 4096];
    rodata.extend(vdso.finish());
    let mut build = Build::executable();
    let number = build.section(".text", CODE, TEXT, READ_TSC);
    build.symbol("read_tsc", number, TEXT);
    build.section(".rodata", DATA, TEXT + 0x10_0000, &rodata);
    let old = build.finish();
    let new = prepared(&old);
    let [kernel, vdso] = &new.report.files[..] else {
        panic!("{:?}", new.report)
    };
    assert_eq!(
        (kernel.kind, vdso.kind, vdso.path.as_str()),
        (Kind::Kernel, Kind::Vdso, "vdso64")
    );
    assert_eq!(vdso.sites[0].outcome, Outcome::Rewritten("89d0".into()));
    assert_eq!(new.bytes[vdso.sites[0].offset..][..2], [0x89, 0xd0]);
    assert_eq!(changes(&old, &new.bytes).len(), 4);
}

/// A signed module whose table of alternatives is in its relocations.
fn module_file(code: &[u8]) -> Vec<u8> {
    let mut build = Build::object();
    build.section(".modinfo", DATA, 0, b"license=GPL\0");
    let text = build.section(".text", CODE, 0, code);
    let replacements = build.section(".altinstr_replacement", CODE, 0, ORDERED);
    let table = build.section(
        ".altinstructions",
        DATA,
        0,
        &[0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0, 5, 5],
    );
    build.symbol("", text, 0);
    build.symbol("", replacements, 0);
    build.symbol("jent_entropy", text, 0);
    build.relocations(table, &[(0, 1, 0), (4, 2, 0)]);
    let mut file = build.finish();
    file.extend([7; 20]);
    file.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 20]);
    file.extend(b"~Module signature appended~\n");
    file
}

#[test]
fn a_module_loses_a_signature_that_is_no_longer_right() {
    let old = module_file(READ_TSC);
    let (new, report) = module(old.clone(), "jent.ko");
    assert_eq!(report.skipped, None);
    let found: Vec<_> = report
        .sites
        .iter()
        .map(|site| (site.section.as_str(), site.place.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            (".text", "jent_entropy"),
            (".altinstr_replacement", "for jent_entropy")
        ]
    );
    assert!(report.signature_stripped);
    assert_eq!(new.len() + 60, old.len());
    assert_eq!(changes(&old[..new.len()], &new).len(), 4);
    assert!(module(new.clone(), "jent.ko").0 == new);
}

/// A length of a signature that covers the module's code: it is damaged, and what would be rewritten is not there.
#[test]
fn a_signature_that_begins_within_the_module_is_none() {
    let mut old = module_file(READ_TSC);
    let at = old.len() - b"~Module signature appended~\n".len() - 4;
    for length in [21u32, 100, 4000] {
        old[at..at + 4].copy_from_slice(&length.to_be_bytes());
        let (new, report) = module(old.clone(), "jent.ko");
        let why = report.skipped.expect("damaged");
        assert!(why.contains("begins within the module"), "{why}");
        assert!(new == old, "left as it is");
    }
}

#[test]
fn a_module_without_sites_keeps_its_signature() {
    let mut build = Build::object();
    build.section(".modinfo", DATA, 0, b"license=GPL\0");
    let text = build.section(".text", CODE, 0, LOOKS_LIKE_IT);
    build.symbol("f", text, 0);
    let mut old = build.finish();
    old.extend([7; 20]);
    old.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 20]);
    old.extend(b"~Module signature appended~\n");
    let (new, report) = module(old.clone(), "f.ko");
    assert!(new == old && !report.signature_stripped && report.sites.is_empty());
}

/// A program without symbols, whose second function only its table for unwinding tells of.
fn stripped_program() -> Vec<u8> {
    stripped_program_with(b"zR")
}

/// By so many letters its table for unwinding says how it is written.
fn stripped_program_with(letters: &[u8]) -> Vec<u8> {
    let mut code = vec![0x00, 0x00, 0xb8];
    code.extend(READ_TSC);
    let mut frames = Vec::new();
    // CIE: "zR", addresses from here on in four signed bytes.
    let mut cie = [&[1], letters, &[0, 1, 0x78, 16, 1, 0x1b]].concat();
    cie.resize(cie.len().next_multiple_of(4), 0);
    frames.extend((cie.len() as u32 + 4).to_le_bytes());
    frames.extend([0; 4]);
    frames.extend(cie);
    frames.extend(20u32.to_le_bytes());
    frames.extend((frames.len() as u32).to_le_bytes());
    let start = 0x40_1003i32 - (0x40_2000 + frames.len() as i32);
    frames.extend(start.to_le_bytes());
    frames.extend((READ_TSC.len() as u32).to_le_bytes());
    frames.extend([0; 8 + 4]);
    let mut build = Build::executable();
    build.section(".text", CODE, 0x40_1000, &code);
    build.section(".eh_frame", DATA, 0x40_2000, &frames);
    build.finish()
}

#[test]
fn a_stripped_program_is_read_by_its_tables_for_unwinding() {
    let old = stripped_program();
    let (new, report) = program(old.clone(), "bin/clock");
    assert_eq!(report.skipped, None);
    assert_eq!(report.sites.len(), 1, "{report:?}");
    assert_eq!(report.sites[0].address, 0x40_1003);
    let at = report.sites[0].offset;
    assert_eq!(changes(&old, &new), [(at, 0x89), (at + 1, 0xd0)]);
}

fn archive(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut writer = cpio::Writer::default();
    for (name, mode, bytes) in entries {
        writer.add(
            name.as_bytes(),
            cpio::Facts {
                mode: *mode,
                ..cpio::Facts::default()
            },
            bytes,
        );
    }
    writer.end();
    writer.finish()
}

/// An initramfs as distributions make them: a small archive, padding, and a packed one.
fn initramfs_file() -> Vec<u8> {
    let mut file = archive(&[("kernel/x86/microcode", 0o100_644, b"microcode")]);
    file.resize(file.len().next_multiple_of(512), 0);
    file.extend(gzip(&archive(&[
        ("bin", 0o040_755, b""),
        ("bin/clock", 0o100_755, &stripped_program()),
        ("bin/sh", 0o120_777, b"clock"),
        ("lib/jent.ko", 0o100_644, &module_file(READ_TSC)),
        ("lib/packed.ko.xz", 0o100_644, b"\xfd7zXZ\0"),
        ("readme", 0o100_644, b"\x0f\x31 is what RDTSC looks like"),
    ])));
    file.extend([0; 24]);
    file
}

#[test]
fn programs_and_modules_of_an_initramfs_are_prepared() {
    let old = initramfs_file();
    let new = initramfs(&old, Limits::default()).expect("an initramfs");
    let paths: Vec<_> = new
        .report
        .files
        .iter()
        .map(|file| (file.path.as_str(), file.rewritten()))
        .collect();
    assert_eq!(
        paths,
        [
            ("bin/clock", 1),
            ("lib/jent.ko", 2),
            ("lib/packed.ko.xz", 0)
        ]
    );
    assert!(
        new.report.files[2]
            .skipped
            .as_deref()
            .is_some_and(|why| why.contains("unpack it"))
    );
    let mut names = Vec::new();
    let mut at = 0;
    while at < new.bytes.len() {
        let mut reader = cpio::Reader::new(&new.bytes[at..]);
        while let Some(entry) = reader.next().expect("an archive") {
            names.push(String::from_utf8_lossy(entry.name).into_owned());
            if entry.name == b"bin/clock" {
                assert!(entry.bytes == program(stripped_program(), "").0);
            }
            if entry.name == b"readme" {
                assert!(
                    entry.bytes.starts_with(&code::RDTSC),
                    "what is no program stays as it is"
                );
            }
        }
        at += reader.at;
    }
    let expected = [
        "kernel/x86/microcode",
        "bin",
        "bin/clock",
        "bin/sh",
        "lib/jent.ko",
        "lib/packed.ko.xz",
        "readme",
    ];
    assert_eq!(names, expected);
    let twice = initramfs(&new.bytes, Limits::default()).expect("an initramfs");
    assert!(
        twice.bytes == new.bytes,
        "preparing twice changes nothing more"
    );
}

#[test]
fn a_sum_over_a_changed_file_is_made_anew() {
    let program = stripped_program();
    let mut file = archive(&[("clock", 0o100_755, &program)]);
    file[5] = b'2';
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    file[102..110].copy_from_slice(format!("{:08X}", sum(&program)).as_bytes());
    let new = initramfs(&file, Limits::default())
        .expect("an initramfs")
        .bytes;
    let expected = sum(&super::program(program.clone(), "").0);
    assert_ne!(expected, sum(&program));
    assert_eq!(new[102..110], *format!("{expected:08X}").as_bytes());
}

#[test]
fn a_damaged_initramfs_is_refused_with_the_byte() {
    let good = archive(&[("readme", 0o100_644, b"text")]);
    let of = |bytes: &[u8]| {
        initramfs(bytes, Limits::default())
            .expect_err("no initramfs")
            .to_string()
    };
    assert!(of(b"").contains("it is empty"));
    assert!(of(&[0; 99]).contains("it is empty"));
    assert!(of(&gzip(b"")).contains("it is empty"));
    assert!(of(b"#!/bin/sh").contains("at byte 0: neither an archive"));
    assert!(of(&good[..50]).contains("header"));
    assert!(of(&good[..good.len() - 124]).contains("without its trailer"));
    let mut bad = good.clone();
    bad[54] = b'x';
    assert!(of(&bad).contains("no number"));
    let mut behind = good.clone();
    behind.extend(b"junk");
    assert!(of(&behind).contains(&format!("at byte {}", good.len())));
    assert!(of(&gzip(&good)[..30]).contains("cut off or damaged"));
}

#[test]
fn a_directory_becomes_the_same_archive_each_time() {
    let work = tempfile::tempdir().expect("a directory");
    let root = work.path().join("root");
    std::fs::create_dir_all(root.join("bin")).expect("make");
    std::fs::write(root.join("bin/clock"), stripped_program()).expect("write");
    std::fs::write(root.join("init"), b"#!/bin/sh\n").expect("write");
    std::os::unix::fs::symlink("bin/clock", root.join("link")).expect("link");
    let once = super::root(&root, Limits::default()).expect("a root directory");
    assert!(super::root(&root, Limits::default()).expect("a root directory") == once);
    assert_eq!(once.report.files.len(), 1);
    let mut reader = cpio::Reader::new(&once.bytes);
    let mut names = Vec::new();
    while let Some(entry) = reader.next().expect("an archive") {
        names.push((
            String::from_utf8_lossy(entry.name).into_owned(),
            entry.bytes.len(),
        ));
    }
    assert_eq!(
        names,
        [
            ("bin".into(), 0),
            ("bin/clock".into(), stripped_program().len()),
            ("init".into(), 10),
            ("link".into(), 9)
        ]
    );
    let out = work.path().join("out");
    let report = modules(&root, &out, Limits::default()).expect("copied");
    assert_eq!(report.programs, 1);
    assert!(
        std::fs::read(out.join("bin/clock")).expect("read")
            == super::program(stripped_program(), "").0
    );
    assert_eq!(
        std::fs::read_link(out.join("link"))
            .expect("a link")
            .to_str(),
        Some("bin/clock")
    );
    let missing = modules(&work.path().join("none"), &out, Limits::default())
        .expect_err("no directory")
        .to_string();
    assert!(missing.contains("none: cannot look into it"), "{missing}");
}

#[test]
fn every_packing_is_read_up_to_its_end() {
    let plain = b"doppel doppel doppel, packed\n";
    // Made by `xz --check=crc32 --x86`, as kernels are, `zstd` and `lz4 -l`.
    let xz = b"\xfd\x37\x7a\x58\x5a\x00\x00\x01\x69\x22\xde\x36\x02\x01\x04\x00\x21\x01\x0c\x00\xd6\x7c\x18\xaf\xe0\x00\x1c\x00\x17\x5d\x00\x32\x1b\xca\x67\xcc\xec\xde\xed\xe6\xc5\xbb\xaa\x70\x80\x9f\x3c\xb1\x96\x16\x3f\x29\x00\x00\x00\x00\xb9\xc3\x7f\x06\x00\x01\x2f\x1d\x9f\xe1\x9c\x51\x90\x42\x99\x0d\x01\x00\x00\x00\x00\x01\x59\x5a";
    let zstd = b"\x28\xb5\x2f\xfd\x04\x58\xb5\x00\x00\x80\x64\x6f\x70\x70\x65\x6c\x20\x2c\x20\x70\x61\x63\x6b\x65\x64\x0a\x01\x00\x3a\x8a\x11\x94\x0d\x86\xa6";
    let lz4 = b"\x02\x21\x4c\x18\x14\x00\x00\x00\x79\x64\x6f\x70\x70\x65\x6c\x20\x07\x00\x90\x2c\x20\x70\x61\x63\x6b\x65\x64\x0a";
    for packed in [&xz[..], zstd, lz4, &gzip(plain)] {
        let kind = unpack::packing(packed, "it")
            .expect("known")
            .expect("packed");
        let mut more = packed.to_vec();
        more.extend((plain.len() as u32).to_le_bytes());
        let (unpacked, length) =
            unpack::unpack(&more, kind, "it", Limits::default()).expect("whole");
        assert_eq!(
            (&unpacked[..], length),
            (&plain[..], packed.len()),
            "{kind:?}"
        );
        for cut in 6..packed.len() {
            let said = unpack::unpack(&packed[..cut], kind, "it", Limits::default());
            assert!(
                said.map_or(true, |(unpacked, _)| unpacked.len() <= plain.len()),
                "{kind:?}"
            );
        }
        assert!(
            unpack::unpack(packed, kind, "it", Limits { unpacked: 20 }).is_err(),
            "{kind:?}"
        );
    }
}
