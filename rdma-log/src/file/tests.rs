use proptest::prelude::*;

use super::*;
use crate::entry::Epoch;
use crate::lane::MIN_LANE;
use crate::ring::RingConfig;
use crate::transport::shm;

const NONCE: Nonce = Nonce(*b"nonce of a file.");
const ABOUT: &[u8] = b"what this log belongs to";

fn marks(committed: u64) -> Marks {
    Marks {
        epoch: Epoch(2),
        committed: Seq(committed),
        released: Seq(committed / 2),
    }
}

/// A small log, and where each entry of it ends.
fn sample() -> (Vec<u8>, Vec<u64>) {
    let mut writer = LogFileWriter::create(Vec::new(), NONCE, ABOUT).unwrap();
    let mut ends = vec![writer.bytes()];
    for i in 0..6u64 {
        let lane = Lane::ALL[usize::from(i % 3 == 1)];
        let payload = vec![i as u8; (i * 7) as usize];
        let committed = writer.last(lane).0;
        writer.append(lane, &payload, marks(committed)).unwrap();
        ends.push(writer.bytes());
    }
    (writer.finish().unwrap(), ends)
}

/// An entry: where it starts, lane, number, payload.
type Got = (u64, Lane, Seq, Vec<u8>);

/// All that can be read, and how it ended.
fn read(bytes: &[u8]) -> (Vec<Got>, Result<(), LogFileError>) {
    let mut got = Vec::new();
    let mut reader = match LogFileReader::new(bytes) {
        Ok(reader) => reader,
        Err(error) => return (got, Err(error)),
    };
    loop {
        match reader.next() {
            Ok(Some(FileEntry { offset, entry })) => {
                got.push((offset, entry.lane(), entry.seq(), entry.payload().to_vec()));
            }
            Ok(None) => return (got, Ok(())),
            Err(error) => {
                let good = got
                    .last()
                    .map_or(0, |(at, .., payload)| at + 32 + payload.len() as u64);
                assert!(good == 0 || reader.offset() == good);
                return (got, Err(error));
            }
        }
    }
}

#[test]
fn a_ring_goes_into_a_file_and_back() {
    let config = RingConfig {
        events: MIN_LANE,
        inputs: MIN_LANE,
    };
    let (mut writer, mut reader) = shm::pair(&config).unwrap();
    let mut file = LogFileWriter::create(Vec::new(), reader.nonce, ABOUT).unwrap();
    let mut raw = Vec::new();
    // Several laps of each lane, so that the stamps change.
    for i in 0..400u64 {
        let payload = vec![i as u8; (i * 13 % 300) as usize];
        writer.events.append(&payload, marks(i / 2)).unwrap();
        writer.inputs.append(&payload, Marks::default()).unwrap();
        for half in [&mut reader.inputs, &mut reader.events] {
            let entry = half.next().unwrap().unwrap();
            file.write(&entry).unwrap();
            raw.push((entry.head(), entry.raw().to_vec()));
        }
    }
    let bytes = file.finish().unwrap();
    let mut back = LogFileReader::new(&bytes[..]).unwrap();
    assert_eq!((back.description(), back.nonce()), (ABOUT, reader.nonce));
    for (head, raw) in raw {
        let FileEntry { offset, entry } = back.next().unwrap().unwrap();
        assert_eq!((entry.head(), entry.raw()), (head, &raw[..]));
        assert_eq!(&bytes[offset as usize..][..raw.len()], &raw[..]);
    }
    assert!(back.next().unwrap().is_none());
}

#[test]
fn a_file_cut_at_any_byte_gives_what_is_whole_and_says_where_it_ends() {
    let (bytes, ends) = sample();
    let (whole, end) = read(&bytes);
    assert!(end.is_ok() && whole.len() == ends.len() - 1);
    for cut in 0..bytes.len() {
        let (got, end) = read(&bytes[..cut]);
        let before = ends.iter().take_while(|end| **end <= cut as u64).count();
        assert_eq!(got, whole[..before.saturating_sub(1)]);
        if ends.contains(&(cut as u64)) {
            assert!(end.is_ok(), "{cut}: a shorter log that is whole");
            continue;
        }
        let begun = if before == 0 { 0 } else { ends[before - 1] };
        assert!(
            matches!(end, Err(LogFileError::Cut { start, end }) if (start, end) == (begun, cut as u64)),
            "{cut}: {end:?}"
        );
    }
}

#[test]
fn every_damaged_byte_is_an_error_and_what_came_before_is_good() {
    let (bytes, _) = sample();
    let (whole, _) = read(&bytes);
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            let (got, end) = read(&bad);
            assert_eq!(got, whole[..got.len()], "byte {at}");
            match (at, end) {
                (0..8, Err(LogFileError::Magic)) => {}
                (8..12, Err(LogFileError::Version { .. })) => {}
                (12..40, Err(LogFileError::Header { what: "header", .. })) => {}
                (
                    40..64,
                    Err(LogFileError::Header {
                        what: "description",
                        ..
                    }),
                ) => {}
                (64.., Err(LogFileError::Corrupt { offset, .. })) => assert!(offset <= at as u64),
                // A length that grew runs into the end of the file.
                (64.., Err(LogFileError::Cut { start, .. })) => assert!(start <= at as u64),
                (at, end) => panic!("byte {at}: {end:?}"),
            }
        }
    }
}

#[test]
fn a_missing_or_repeated_entry_is_named() {
    let (bytes, ends) = sample();
    let cut = |from: u64, to: u64| [&bytes[..from as usize], &bytes[to as usize..]].concat();
    // The fourth entry is the third of the events lane (0, 2, 3 | 1).
    let (got, end) = read(&cut(ends[2], ends[3]));
    assert_eq!(got.len(), 2);
    let Err(LogFileError::Corrupt { offset, fault }) = end else {
        panic!("{end:?}");
    };
    assert_eq!(
        (offset, fault),
        (ends[2], Fault::new(Field::Sequence, 2u64, 3u64))
    );
}

#[test]
fn an_entry_with_another_payload_can_be_made() {
    let (bytes, ends) = sample();
    let mut reader = LogFileReader::new(&bytes[..]).unwrap();
    let head = reader.next().unwrap().unwrap().entry.head();
    let changed = encode(&Keys::new(&reader.nonce()), &head, b"another");
    let bytes = [
        &bytes[..ends[0] as usize],
        &changed,
        &bytes[ends[1] as usize..],
    ]
    .concat();
    let (got, end) = read(&bytes);
    assert!(end.is_ok());
    assert_eq!((got.len(), &got[0].3[..]), (6, &b"another"[..]));
}

#[test]
fn entries_out_of_order_or_of_another_nonce_are_not_written() {
    let config = RingConfig::default();
    let (mut writer, mut reader) = shm::pair(&config).unwrap();
    writer.events.append(b"1", Marks::default()).unwrap();
    writer.events.append(b"2", Marks::default()).unwrap();
    let mut own = LogFileWriter::create(Vec::new(), reader.nonce, b"").unwrap();
    let mut foreign = LogFileWriter::create(Vec::new(), NONCE, b"").unwrap();
    let first = reader.events.next().unwrap().unwrap();
    assert!(matches!(
        foreign.write(&first),
        Err(LogFileError::Corrupt { .. })
    ));
    own.write(&first).unwrap();
    let again = own.write(&first);
    assert!(
        matches!(
            again,
            Err(LogFileError::OutOfOrder {
                next: Seq(2),
                found: Seq(1),
                ..
            })
        ),
        "{again:?}"
    );
    let second = reader.events.next().unwrap().unwrap();
    own.write(&second).unwrap();
}

#[test]
fn limits_hold() {
    let long = vec![0; MAX_PAYLOAD + 1];
    let mut writer = LogFileWriter::create(Vec::new(), NONCE, b"").unwrap();
    let result = writer.append(Lane::Events, &long, Marks::default());
    assert!(matches!(
        result,
        Err(LogFileError::TooLarge {
            what: "payload",
            ..
        })
    ));
    writer
        .append(Lane::Events, &long[1..], Marks::default())
        .unwrap();
    assert_eq!(read(&writer.finish().unwrap()).0.len(), 1);

    // An entry that claims to be too long, and one that claims more than the file holds.
    for (len, cut) in [(MAX_PAYLOAD + 1, false), (MAX_PAYLOAD, true)] {
        let keys = Keys::new(&NONCE);
        let (mut bytes, ends) = sample();
        bytes.truncate(ends[1] as usize);
        let mut header = split(&bytes[ends[0] as usize..]).0;
        header.seq = 2;
        header.len = len as u32;
        header.crc = keys.check(&header, &[]).unwrap_err().expected as u32;
        bytes.extend(header.to_bytes());
        match read(&bytes).1 {
            Err(LogFileError::Cut { .. }) => assert!(cut),
            Err(LogFileError::Corrupt { fault, .. }) => {
                assert!(!cut);
                assert_eq!(
                    fault,
                    Fault::new(Field::Length, MAX_PAYLOAD as u64, len as u64)
                );
            }
            other => panic!("{other:?}"),
        }
    }

    // A header that claims a description of 4 GiB, its checksum right.
    let (mut bytes, _) = sample();
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..36]);
    bytes[36..40].copy_from_slice(&crc.to_le_bytes());
    let end = read(&bytes).1;
    assert!(matches!(
        end,
        Err(LogFileError::TooLarge {
            what: "description",
            ..
        })
    ));
}

#[test]
fn a_lap_may_be_followed_by_the_next_and_no_other() {
    let keys = Keys::new(&NONCE);
    for (lap, good) in [(0, true), (1, true), (2, false), (LAPS - 1, false)] {
        let (mut bytes, _) = sample();
        let head = Head {
            lane: Lane::Events,
            lap,
            seq: Seq(5),
            marks: Marks::default(),
        };
        bytes.extend(encode(&keys, &head, b"x"));
        let (got, end) = read(&bytes);
        assert_eq!(
            (got.len(), end.is_ok()),
            if good { (7, true) } else { (6, false) }
        );
    }
}

#[test]
fn a_pad_is_no_entry_of_a_file() {
    let (mut bytes, _) = sample();
    let keys = Keys::new(&NONCE);
    bytes.extend(keys.pad(Lane::Events, 0, Seq(5), 64).to_bytes());
    bytes.extend([0; 64]);
    let end = read(&bytes).1;
    assert!(matches!(
        end,
        Err(LogFileError::Corrupt {
            fault: Fault {
                field: Field::Stamp,
                ..
            },
            ..
        })
    ));
}

#[test]
fn files_are_opened_by_path() {
    let (bytes, _) = sample();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(LogFileReader::open(&path).unwrap().description(), ABOUT);
    let missing = LogFileReader::open(&dir.path().join("none"));
    assert!(matches!(
        missing,
        Err(LogFileError::Io { what: "open", .. })
    ));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), behind: bool) {
        let all = if behind { [&sample().0[..], &bytes].concat() } else { bytes };
        let (got, _) = read(&all);
        prop_assert!(got.len() <= 6);
    }
}
