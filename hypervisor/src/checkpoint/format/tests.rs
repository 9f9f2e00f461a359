#![expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one run of pages is meant"
)]

use proptest::prelude::*;

use super::*;

const RAM: u64 = 512;

pub(in crate::checkpoint) fn state() -> State {
    State {
        position: Position(77),
        digest: Digest(0xabcd),
        injectable: true,
        halted: false,
        off: None,
        base: Base::new(Position(76), GuestTime(1 << 40)),
        cpu: vec![1; 100],
        devices: b"{}".to_vec(),
        staged: vec![vec![9; 60], Vec::new(), vec![8; 1514]],
    }
}

fn whole(pages: Vec<PageNumber>) -> Told {
    Told {
        whole: pages,
        ..Told::default()
    }
}

fn written(state: &State, zeros: &[Range<u64>], pages: &[u64]) -> Vec<u8> {
    let numbers: Vec<_> = pages.iter().copied().map(PageNumber).collect();
    let contents: Vec<u8> = pages
        .iter()
        .flat_map(|&page| [page as u8; PAGE_SIZE])
        .collect();
    sealed(
        head(Scope::Delta, RAM, state, zeros, &whole(numbers)),
        &contents,
    )
}

/// The same bytes after `change`, with a checksum that fits.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = written(&state(), &[1..2, 5..9], &[3, 4, 10, RAM - 1]);
    bytes.truncate(bytes.len() - CHECKSUM);
    change(&mut bytes);
    let checksum = rdma_log::crc32c(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn what_is_written_is_read() {
    let bytes = written(&state(), &[1..2, 5..9], &[3, 4, 10, RAM - 1]);
    let image = Image::parse(&bytes, RAM).unwrap();
    assert_eq!(image.state, state());
    assert_eq!(image.scope, Scope::Delta);
    assert_eq!(image.zeros(), [1..2, 5..9]);
    let pages: Vec<_> = image
        .pages()
        .map(|(page, content)| (page.0, content[4095]))
        .collect();
    assert_eq!(
        pages,
        [(3, 3), (4, 4), (10, 10), (RAM - 1, (RAM - 1) as u8)]
    );
    assert_eq!(
        announced(&bytes[..HEADER], RAM).unwrap(),
        bytes.len() as u64
    );
    assert!(bytes.len() as u64 <= limit(RAM));
}

/// A checkpoint with a whole page 3 and patches of these, each of one word: the page is zero but for that.
fn with_patches(scope: Scope, zeros: &[Range<u64>], pages: &[u64]) -> Vec<u8> {
    let mut told = whole(vec![PageNumber(3)]);
    let mut contents = vec![3; PAGE_SIZE];
    for &page in pages {
        let mut now = [0; PAGE_SIZE];
        now[64..72].fill(page as u8);
        told.patched
            .push((PageNumber(page), rdma_log::crc32c(&now)));
        contents.extend_from_slice(&2u64.to_le_bytes());
        contents.push(1);
        contents.extend_from_slice(&now[64..72]);
    }
    told.patch_bytes = contents.len() - PAGE_SIZE;
    sealed(head(scope, RAM, &state(), zeros, &told), &contents)
}

#[test]
fn patches_are_read_and_make_what_was_meant() {
    let bytes = with_patches(Scope::Delta, &[7..9], &[2, 5, RAM - 1]);
    assert!(bytes.len() as u64 <= limit(RAM));
    let image = Image::parse(&bytes, RAM).unwrap();
    assert_eq!((&image.state, image.pages().count()), (&state(), 1));
    let pages: Vec<_> = image.patches.iter().map(|patch| patch.page().0).collect();
    assert_eq!(pages, [2, 5, RAM - 1]);
    for patch in &image.patches {
        let mut page = [0; PAGE_SIZE];
        assert!(patch.apply(&mut page));
        assert_eq!(page[71], patch.page().0 as u8);
        page[0] = 1;
        assert!(!patch.apply(&mut page), "it is another page");
    }
    // Without patches nothing tells it from one of a program that knows none.
    assert_eq!(written(&state(), &[], &[3])[8..12], WHOLE.to_le_bytes());
}

#[test]
fn patches_that_cannot_be_are_refused() {
    let error = |bytes: &[u8]| Image::parse(bytes, RAM).unwrap_err();
    assert!(matches!(
        error(&with_patches(Scope::Full, &[], &[2])),
        FormatError::Version { found: VERSION }
    ));
    for (zeros, pages) in [
        (vec![], vec![3]),
        (vec![], vec![2, 2]),
        (vec![], vec![5, 4]),
        (vec![], vec![RAM]),
        (vec![4..6], vec![5]),
    ] {
        let bytes = with_patches(Scope::Delta, &zeros, &pages);
        let is_named = matches!(
            error(&bytes),
            FormatError::Pages {
                field: "patched pages",
                ..
            }
        );
        assert!(is_named, "{zeros:?} {pages:?}");
    }
    let good = with_patches(Scope::Delta, &[], &[2]);
    let put = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        let end = bytes.len() - CHECKSUM;
        let checksum = rdma_log::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    };
    Image::parse(&put(0, b"D"), RAM).unwrap();
    let first = good.len() - CHECKSUM - 17;
    for (what, bytes) in [
        ("a line without a word", put(first + 8, &[0])),
        ("more words than bytes", put(first + 8, &[3])),
        ("more lines than bytes", put(first, &[0xff])),
    ] {
        assert_eq!(error(&bytes), FormatError::Patch { page: 2 }, "{what}");
    }
    assert!(matches!(
        error(&put(first, &[0])),
        FormatError::Limit {
            field: "bytes of patches",
            ..
        }
    ));
    for (at, field) in [(96, "number of patched pages"), (104, "bytes of patches")] {
        let huge = put(at, &u64::MAX.to_le_bytes());
        assert!(matches!(error(&huge), FormatError::Limit { field: found, .. } if found == field));
    }
    assert!(matches!(
        error(&put(96, &[9])),
        FormatError::Length { .. } | FormatError::Patch { .. }
    ));
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    for bytes in [
        written(&state(), &[1..2], &[3]),
        with_patches(Scope::Delta, &[1..2], &[2, 9]),
    ] {
        cuts_and_flips_are_refused(&bytes);
    }
}

fn cuts_and_flips_are_refused(bytes: &[u8]) {
    for cut in 0..bytes.len() {
        assert!(Image::parse(&bytes[..cut], RAM).is_err(), "cut at {cut}");
    }
    for bit in (0..bytes.len() * 8).step_by(7) {
        let mut bad = bytes.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Image::parse(&bad, RAM).is_err(), "bit {bit}");
    }
}

#[test]
fn bad_values_under_a_good_checksum_are_named() {
    let put = |at: usize, value: u64| {
        changed(|bytes| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes()))
    };
    let error = |bytes: &[u8]| Image::parse(bytes, RAM).unwrap_err();
    assert_eq!(error(&put(0, 1)), FormatError::Foreign);
    assert_eq!(
        error(&changed(|bytes| bytes[8] = 1)),
        FormatError::Version { found: 1 }
    );
    assert!(matches!(error(&put(16, 12)), FormatError::Length { .. }));
    assert!(matches!(
        error(&put(16, u64::MAX)),
        FormatError::Limit {
            field: "length",
            ..
        }
    ));
    assert!(matches!(error(&put(24, RAM + 1)), FormatError::Ram { .. }));
    assert!(matches!(
        error(&put(80, u64::MAX)),
        FormatError::Limit { .. }
    ));
    assert!(matches!(
        error(&put(88, RAM + 1)),
        FormatError::Limit { .. }
    ));
    assert!(matches!(error(&put(88, RAM)), FormatError::Length { .. }));
    assert!(matches!(error(&put(88, 3)), FormatError::Length { .. }));
    let good = changed(|_| {});
    Image::parse(&good, RAM).unwrap();
    for (zeros, pages) in [
        (vec![0..0], vec![]),
        (vec![1..3, 2..4], vec![]),
        (vec![RAM - 1..RAM + 1], vec![]),
        (vec![], vec![4, 4]),
        (vec![], vec![5, 4]),
        (vec![], vec![RAM]),
        (vec![3..5], vec![4]),
    ] {
        let bytes = written(&state(), &zeros, &pages);
        assert!(
            matches!(error(&bytes), FormatError::Pages { .. }),
            "{zeros:?} {pages:?}"
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Image::parse(&bytes, RAM).is_err());
    }

    #[test]
    fn any_bytes_under_a_good_header_are_read_or_refused(
        at in 32..HEADER,
        bytes in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let bytes = changed(|good| {
            let end = (at + bytes.len()).min(good.len());
            good[at..end].copy_from_slice(&bytes[..end - at]);
        });
        if let Ok(image) = Image::parse(&bytes, RAM) {
            prop_assert!(image.pages().all(|(page, _)| page.0 < RAM));
        }
    }
}
