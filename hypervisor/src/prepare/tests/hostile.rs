//! Damaged files: an answer, whatever they hold.

use proptest::prelude::*;

use super::*;

/// Everything that reads, given the same bytes.
fn all(bytes: &[u8]) {
    let limits = Limits { unpacked: 1 << 20 };
    for symbols in [None, Some("ffffffff81000000 T read_tsc\n")] {
        match kernel(bytes.to_vec(), symbols, limits) {
            Ok(new) => same_but_for_sites(
                &vmlinux(bytes.to_vec(), limits).expect("it was one"),
                &new.bytes,
                &new.report,
            ),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let (new, report) = program(bytes.to_vec(), "p");
    let mut whole = Report::default();
    whole.add(report);
    same_but_for_sites(bytes, &new, &whole);
    let (new, _) = module(bytes.to_vec(), "m.ko");
    assert!(new.len() <= bytes.len());
    if let Ok(new) = initramfs(bytes, limits) {
        assert!(initramfs(&new.bytes, limits).is_ok_and(|again| again.bytes == new.bytes));
    }
}

/// What changed is what the report says, and was RDTSC.
fn same_but_for_sites(old: &[u8], new: &[u8], report: &Report) {
    let mut expected = old.to_vec();
    for site in report.files.iter().flat_map(|file| &file.sites) {
        if let Outcome::Rewritten(_) = site.outcome {
            assert_eq!(old[site.offset..][..2], code::RDTSC);
            expected[site.offset..][..2].copy_from_slice(&new[site.offset..][..2]);
        }
    }
    assert!(expected == new, "something else changed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damage_is_answered(
        which in 0..5usize,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let names: Vec<(u64, String)> = (0..60).map(|at| (TEXT + at, format!("f{at}"))).collect();
        let names: Vec<(u64, &str)> = names.iter().map(|(at, name)| (*at, name.as_str())).collect();
        let mut bytes = match which {
            0 => vmlinux_with(None),
            1 => vmlinux_with(Some(&table(&names, false, 0))),
            2 => module_file(READ_TSC),
            3 => stripped_program(),
            _ => initramfs_file(),
        };
        // Headers lie at both ends; what is between is mostly padding.
        for (at, value) in damage {
            let index = at.index(bytes.len());
            bytes[index] = value;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        all(&bytes);
    }
}
