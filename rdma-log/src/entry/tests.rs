use proptest::prelude::*;

use super::*;

fn nonce() -> impl Strategy<Value = Nonce> {
    any::<[u8; 16]>().prop_map(Nonce)
}

fn lane() -> impl Strategy<Value = Lane> {
    prop_oneof![Just(Lane::Events), Just(Lane::Inputs)]
}

fn sealed(bytes: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = bytes.split_at(HEADER_LEN);
    (Header::from_bytes(head.try_into().unwrap()), payload)
}

fn sample() -> Head {
    Head {
        lane: Lane::Events,
        lap: 3,
        seq: Seq(258),
        marks: Marks {
            epoch: Epoch(7),
            committed: Seq(256),
            released: Seq(250),
        },
    }
}

proptest! {
    #[test]
    fn a_stamp_tells_what_went_in(nonce in nonce(), lane in lane(), lap in 0..LAPS, pad: bool) {
        let keys = Keys::new(&nonce);
        let kind = if pad { Kind::Pad } else { Kind::Entry };
        let stamp = Stamp { lane, lap, kind };
        prop_assert_eq!(keys.unstamp(keys.stamp(stamp)), stamp);
    }

    #[test]
    fn any_word_is_the_stamp_of_what_it_says(nonce in nonce(), word: u32) {
        let keys = Keys::new(&nonce);
        prop_assert_eq!(keys.stamp(keys.unstamp(word)), word);
    }

    #[test]
    fn a_head_comes_back(
        nonce in nonce(), lane in lane(), lap in 0..LAPS, seq in 1..=u64::MAX, epoch: u32,
        back in any::<[u64; 2]>(), payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let committed = seq.saturating_sub(back[0].max(1));
        let released = committed.saturating_sub(back[1]);
        let marks = Marks { epoch: Epoch(epoch), committed: Seq(committed), released: Seq(released) };
        let given = Head { lane, lap, seq: Seq(seq), marks };
        let keys = Keys::new(&nonce);
        let bytes = encode(&keys, &given, &payload);
        let (header, body) = sealed(&bytes);
        prop_assert_eq!(keys.check(&header, body), Ok(()));
        let got = head(&header, keys.unstamp(header.stamp), Seq(seq)).unwrap();
        prop_assert_eq!((got.lane, got.lap, got.seq, got.marks.epoch), (lane, lap, Seq(seq), Epoch(epoch)));
        let told = |mark: u64, lag: u64| match lane {
            Lane::Inputs => Seq::ZERO,
            Lane::Events if lag < u64::from(u32::MAX) => Seq(mark),
            Lane::Events => Seq(seq.saturating_sub(u64::from(u32::MAX))),
        };
        prop_assert_eq!(got.marks.committed, told(committed, seq - committed));
        prop_assert_eq!(got.marks.released, told(released, seq - released));
    }

    #[test]
    fn marks_that_cannot_be_become_lower_bounds(seq in 1..1000u64, committed: u64, released: u64) {
        let marks = Marks { epoch: Epoch(0), committed: Seq(committed), released: Seq(released) };
        let given = Head { lane: Lane::Events, lap: 0, seq: Seq(seq), marks };
        let keys = Keys::new(&Nonce([5; 16]));
        let header = keys.seal(&given, &[]);
        let got = head(&header, keys.unstamp(header.stamp), Seq(seq)).unwrap().marks;
        prop_assert!(got.committed < Seq(seq) && got.committed <= Seq(committed));
        prop_assert!(got.released <= got.committed && got.released <= Seq(released));
    }

    #[test]
    fn another_connection_is_refused(a in nonce(), b in nonce(), payload in prop::collection::vec(any::<u8>(), 0..80)) {
        prop_assume!(Keys::new(&a) != Keys::new(&b));
        let bytes = encode(&Keys::new(&a), &sample(), &payload);
        let (header, body) = sealed(&bytes);
        let keys = Keys::new(&b);
        let stamp = keys.unstamp(header.stamp);
        let passes = stamp.lane == sample().lane && stamp.lap == sample().lap && keys.check(&header, body).is_ok();
        prop_assert!(!passes);
    }
}

#[test]
fn every_flipped_bit_is_seen() {
    let keys = Keys::new(&Nonce(*b"0123456789abcdef"));
    let good = encode(
        &keys,
        &sample(),
        b"forty bytes of a payload, more or less..",
    );
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let (header, payload) = sealed(&bad);
        assert!(keys.check(&header, payload).is_err(), "bit {bit}");
    }
}

#[test]
fn zeroed_memory_is_no_entry() {
    for i in 0..=u8::MAX {
        let keys = Keys::new(&Nonce([i; 16]));
        let zero = Header::from_bytes(&[0; HEADER_LEN]);
        let is_first = keys.unstamp(0)
            == keys.unstamp(keys.stamp(Stamp {
                lane: Lane::Events,
                lap: 0,
                kind: Kind::Entry,
            }));
        let whole = keys.check(&zero, &[]).is_ok();
        assert!(!(is_first && whole) && head(&zero, keys.unstamp(0), Seq(1)).is_err());
    }
}

#[test]
fn wrong_numbers_and_lags_are_named() {
    let keys = Keys::new(&Nonce([1; 16]));
    let header = keys.seal(&sample(), &[]);
    let stamp = keys.unstamp(header.stamp);
    let fault = |header: Header, stamp| head(&header, stamp, Seq(258)).unwrap_err();
    assert_eq!(
        head(&header, stamp, Seq(259)),
        Err(Fault::new(Field::Sequence, 259u64, 258u64))
    );
    let ahead = Header {
        committed_lag: 0,
        ..header
    };
    assert_eq!(
        fault(ahead, stamp),
        Fault::new(Field::CommittedLag, 1u32, 0u32)
    );
    let crossed = Header {
        released_lag: 1,
        ..header
    };
    assert_eq!(
        fault(crossed, stamp),
        Fault::new(Field::ReleasedLag, 2u32, 1u32)
    );
    let inputs = Stamp {
        lane: Lane::Inputs,
        ..stamp
    };
    assert_eq!(
        fault(header, inputs),
        Fault::new(Field::CommittedLag, u32::MAX, 2u32)
    );
}

#[test]
fn the_bytes_of_the_wire_stay_what_they_are() {
    let keys = Keys::new(&Nonce(*b"0123456789abcdef"));
    let bytes = encode(&keys, &sample(), b"wire");
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    // Computed apart from this code, from the text of the module.
    let expected = "04000000a1fab62a0201000000000000671f38c907000000020000000800000077697265";
    assert_eq!(hex, expected);
}
