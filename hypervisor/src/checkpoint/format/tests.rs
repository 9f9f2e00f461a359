#![expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one run of pages is meant"
)]

use proptest::prelude::*;

use super::*;

const RAM: u64 = 512;

fn state() -> State {
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

fn written(state: &State, zeros: &[Range<u64>], pages: &[u64]) -> Vec<u8> {
    let numbers: Vec<_> = pages.iter().copied().map(PageNumber).collect();
    let contents: Vec<u8> = pages
        .iter()
        .flat_map(|&page| [page as u8; PAGE_SIZE])
        .collect();
    sealed(head(Scope::Delta, RAM, state, zeros, &numbers), &contents)
}

/// The same bytes after `change`, with a checksum that fits.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = written(&state(), &[1..2, 5..9], &[3, 4, 10, RAM - 1]);
    bytes.truncate(bytes.len() - CHECKSUM);
    change(&mut bytes);
    let checksum = crc32c::crc32c(&bytes);
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

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let bytes = written(&state(), &[1..2], &[3]);
    for cut in 0..bytes.len() {
        assert!(Image::parse(&bytes[..cut], RAM).is_err(), "cut at {cut}");
    }
    for bit in (0..bytes.len() * 8).step_by(7) {
        let mut bad = bytes.clone();
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
