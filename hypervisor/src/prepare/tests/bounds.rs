//! Files that are made to cost much: time and memory are bounded, whatever they say.

use std::time::{Duration, Instant};

use super::*;
use crate::prepare::elf::Elf;
use crate::prepare::rewrite::Functions;

/// Far more than it takes, and far less than it took.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_name_of_a_symbol_is_copied_to_a_length() {
    let mut build = Build::library();
    let number = build.section(".text", CODE, 0x1000, READ_TSC);
    build.symbol(&"x".repeat(600_000), number, 0x1000);
    for _ in 0..100 {
        build.symbol("f", number, 0x1000);
    }
    let mut file = build.finish();
    // All of them begin where the first does.
    let elf = Elf::parse(&file).expect("a library");
    let (_, table) = elf.named(".symtab").expect("a table");
    for entry in table.range().step_by(24).skip(1) {
        file[entry..entry + 4].copy_from_slice(&1u32.to_le_bytes());
    }
    let elf = Elf::parse(&file).expect("a library");
    let symbols = elf.symbols();
    assert_eq!(symbols.len(), 101);
    assert!(symbols.iter().all(|symbol| symbol.name.len() == 512));
    let (_, report) = program(file, "x");
    assert_eq!(report.rewritten(), 1);
}

#[test]
fn a_flood_of_sites_is_no_code() {
    let mut build = Build::library();
    build.section(".text", CODE, 0x1000, &[0x0f, 0x31].repeat(70_000));
    let old = build.finish();
    let (new, report) = program(old.clone(), "flood");
    assert!(new == old && report.sites.is_empty());
    let why = report.skipped.expect("not looked into");
    assert!(why.contains("65536"), "{why}");
    // And many files of fewer.
    let mut build = Build::library();
    build.section(".text", CODE, 0x1000, &[0x0f, 0x31].repeat(60_000));
    let file = build.finish();
    let entries: Vec<_> = (0..5).map(|_| ("flood", 0o100_755, &file[..])).collect();
    let said = initramfs(&archive(&entries), Limits::default())
        .expect_err("too many")
        .to_string();
    assert!(said.contains("262144"), "{said}");
}

#[test]
fn tables_for_unwinding_have_few_letters() {
    let sites = |letters: &[u8]| program(stripped_program_with(letters), "p").1.sites.len();
    assert_eq!((sites(b"zR"), sites(b"zSSSSSSSSSSSSR")), (1, 1));
    let many = [&b"z"[..], &[b'S'; 100], b"R"].concat();
    assert_eq!(sites(&many), 0, "they would be read anew for each function");
}

#[test]
fn a_place_is_found_among_many_starts_without_a_name() {
    let mut functions = Functions::default();
    functions.add(0, "first");
    (1..300_000).for_each(|start| functions.add(start, ""));
    let since = Instant::now();
    for at in 280_000..300_000 {
        assert_eq!(functions.place(at), format!("first+{at:#x}"));
        assert!(since.elapsed() < SOON, "at {at}");
    }
}

#[test]
fn a_section_is_found_among_many() {
    let mut build = Build::library();
    for number in 0..40_000 {
        build.section("", DATA, 0x1000 + 0x10 * number, &[1; 8]);
    }
    let file = build.finish();
    let elf = Elf::parse(&file).expect("a library");
    let since = Instant::now();
    for round in 0..100_000 {
        let number = round % 40_000;
        let found = elf.section_at(0x1000 + 0x10 * number + 7);
        assert_eq!(found.map(|(number, _)| number as u64), Some(number + 1));
        assert!(elf.section_at(0x1000 + 0x10 * number + 8).is_none());
        assert!(since.elapsed() < SOON, "round {round}");
    }
}

/// Tables of tokens by the dozen, and before them a megabyte that promises names and has none.
#[test]
fn a_table_of_symbols_is_not_looked_for_for_ever() {
    let mut data = 32u32.to_le_bytes().repeat(1 << 18);
    for _ in 0..100 {
        let mut index = Vec::new();
        let start = data.len();
        for token in 0..=255u8 {
            index.extend(((data.len() - start) as u16).to_le_bytes());
            let letters = if matches!(token, 0 | 32) { 15 } else { 1 };
            data.extend([b'T'].repeat(letters));
            data.push(0);
        }
        data.resize(data.len().next_multiple_of(8), 0);
        data.extend(index);
    }
    let since = Instant::now();
    assert!(kallsyms::read(&data, |_| true).is_none());
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
}
