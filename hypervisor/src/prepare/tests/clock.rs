//! The readers of KVM's clock page.

use super::*;
use crate::prepare::clock_reader::NAME;
use crate::prepare::clock_reader::tests::READER;

/// A kernel with these functions, 64 bytes each, behind `read_tsc`, and alternatives: how far into the text, how many bytes there, and how many of
/// a replacement.
fn kernel_with(functions: &[(&str, &[u8])], alternatives: &[(u64, u8, u8)]) -> Vec<u8> {
    let mut build = Build::executable();
    let mut text = READ_TSC.to_vec();
    text.resize(32, 0xcc);
    for (number, (_, function)) in functions.iter().enumerate() {
        text.extend(*function);
        text.resize(32 + 64 * (number + 1), 0xcc);
    }
    let number = build.section(".text", CODE, TEXT, &text);
    build.symbol("read_tsc", number, TEXT);
    for (at, (name, _)) in (0..).zip(functions) {
        build.symbol(name, number, TEXT + 32 + 64 * at);
    }
    if !alternatives.is_empty() {
        let mut entries = Vec::new();
        for (original, length, new) in alternatives {
            let at = TABLE + entries.len() as u64;
            entries.extend(((TEXT + original).wrapping_sub(at) as u32).to_le_bytes());
            entries.extend((REPLACEMENTS.wrapping_sub(at + 4) as u32).to_le_bytes());
            entries.extend([0x70, 0, *length, *new]);
        }
        build.section(".altinstructions", DATA, TABLE, &entries);
        build.section(".altinstr_replacement", CODE, REPLACEMENTS, &[0x90; 64]);
    }
    build.finish()
}

/// The symbols of readers that were made to count, and of those that were not.
fn readers(kernel: &[u8]) -> (Vec<String>, Vec<String>) {
    let report = prepared(kernel).report;
    let file = &report.files[0];
    let mut changed: Vec<_> = file.changes.iter().map(|c| c.place.clone()).collect();
    changed.retain(|place| place.ends_with("+0x4"));
    (changed, file.uncounted.clone())
}

#[test]
fn the_reader_of_the_clock_page_is_made_to_count() {
    let made = |name: &str| kernel_with(&[(name, READER)], &[]);
    let old = made(NAME);
    let once = prepared(&old);
    assert!(!counts_clock_reads(&old) && counts_clock_reads(&once.bytes));
    let changed = &once.report.files[0].changes;
    let places: Vec<&str> = changed.iter().map(|change| change.place.as_str()).collect();
    assert_eq!(
        places,
        [
            "pvclock_clocksource_read+0x4",
            "pvclock_clocksource_read+0xe"
        ]
    );
    for change in changed {
        let bytes = |file: &[u8]| {
            let range = change.offset..change.offset + change.new.len() / 2;
            file[range]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        assert_eq!(
            (bytes(&old), bytes(&once.bytes)),
            (change.old.clone(), change.new.clone())
        );
    }
    assert_eq!(
        once.report.files[0].sites[1].outcome,
        Outcome::Rewritten("89d0".into()),
        "nobody executes it, and nobody is to think that it exits"
    );
    assert_eq!(prepared(&once.bytes).bytes, once.bytes, "prepared twice");
    assert!(!counts_clock_reads(&prepared(&made("another")).bytes));
}

/// The kernel would write over the new body, at boot: what begins before it and reaches into it, and what puts nothing but padding there, too.
#[test]
fn a_reader_that_the_kernel_patches_is_left_alone() {
    // The room is the bytes 14 to 29 of the reader, which begins at 32.
    for (alternative, counts) in [
        ((32 + 9, 5, 5), true),
        ((32 + 9, 6, 5), false),
        ((32 + 13, 2, 0), false),
        ((32 + 20, 3, 3), false),
        ((32 + 20, 3, 0), false),
        ((32 + 29, 2, 2), true),
        ((32 + 2, 3, 3), false),
    ] {
        let (changed, left) = readers(&kernel_with(&[(NAME, READER)], &[alternative]));
        assert_eq!(
            (changed.len() == 1, left.is_empty()),
            (counts, counts),
            "{alternative:?}"
        );
    }
}

#[test]
fn the_report_says_which_readers_count() {
    let later = format!("{NAME}_nowd");
    let traced = [&[0xe8, 0, 0, 0, 0], &READER[4..]].concat();
    let both = kernel_with(&[(NAME, READER), (&later, READER)], &[]);
    let (changed, left) = readers(&both);
    assert_eq!((changed.len(), left.len()), (2, 0));
    let said = |kernel: &[u8]| prepared(kernel).report.summary();
    assert!(said(&both).contains("clock page are counted\n"));
    assert!(
        said(&prepared(&both).bytes).contains("clock page are counted\n"),
        "as before"
    );
    let one = said(&kernel_with(&[(NAME, &traced), (&later, READER)], &[]));
    assert!(
        one.contains(&format!("are counted, but not in {NAME}:")),
        "{one}"
    );
    for none in [
        kernel_with(&[(NAME, &traced)], &[]),
        kernel_with(&[("kvm_clock_read", READER)], &[]),
    ] {
        assert!(
            said(&none).contains("are not counted: it reads"),
            "{}",
            said(&none)
        );
    }
}
