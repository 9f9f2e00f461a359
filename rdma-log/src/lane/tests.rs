//! Lanes over `shm` in one process, and over the card without manners.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::entry::{Epoch, Field, Head, Keys, LINE, Lane, Marks, Nonce, Seq, encode};
use crate::fence::Fenced;
use crate::region::{ReadView, Region};
use crate::ring::{RingConfig, RingReader, RingWriter};
use crate::transport::{Limit, ReadPort, WriteView, shm, sim};

const SMALL: RingConfig = RingConfig {
    events: MIN_LANE,
    inputs: 2 * MIN_LANE,
};

fn small() -> (RingWriter, RingReader) {
    shm::pair(&SMALL).unwrap()
}

/// A payload that tells its number and its length apart from all others.
fn payload(seq: u64, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (seq as u8).wrapping_mul(31).wrapping_add(i as u8) ^ (i >> 8) as u8)
        .collect()
}

fn marks(committed: Seq) -> Marks {
    Marks {
        epoch: Epoch(4),
        committed,
        released: Seq(committed.0 / 2),
    }
}

#[test]
fn every_length_at_every_place_of_the_lap() {
    let (mut writer, mut reader) = small();
    let lines = MIN_LANE / LINE;
    for len in 0..=writer.events.max_payload() {
        // One more line than a lap per length, so that each length meets other places; then the same via a slot.
        for place in [0, 1, lines / 2, lines - 1] {
            for _ in 0..place % 5 {
                writer.events.append(b"shift", Marks::default()).unwrap();
                reader.events.next().unwrap().unwrap();
            }
            let committed = writer.events.last();
            let seq = writer.events.last().next();
            let bytes = payload(seq.0, len);
            if place % 2 == 0 {
                let (a, b) = bytes.split_at(len / 3);
                let got = writer.events.append_gather(&[a, b], marks(committed));
                assert_eq!(got, Ok(seq));
            } else {
                let mut slot = writer
                    .events
                    .reserve(len + (MIN_LANE / 4 - 32 - len) / 2)
                    .unwrap();
                slot.payload()[..len].copy_from_slice(&bytes);
                assert_eq!(slot.publish(len, marks(committed)), Ok(seq));
            }
            let entry = reader.events.next().unwrap().unwrap();
            assert_eq!((entry.seq(), entry.marks()), (seq, marks(committed)));
            assert_eq!(entry.payload(), bytes);
            assert_eq!(reader.events.next(), Ok(None));
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Append {
        lane: Lane,
        len: usize,
    },
    Slot {
        lane: Lane,
        reserved: usize,
        len: usize,
        salvage: bool,
    },
    Drop {
        lane: Lane,
        reserved: usize,
    },
    Read {
        lane: Lane,
        most: usize,
    },
    Deliver {
        atoms: usize,
    },
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let lane = prop_oneof![Just(Lane::Events), Just(Lane::Inputs)];
    let len = || prop_oneof![0..40usize, 0..MIN_LANE / 4 - 31];
    (lane, 0..9, len(), len(), 0..12usize, any::<bool>()).prop_map(
        |(lane, what, a, b, most, salvage)| match what {
            0..=2 => Op::Append { lane, len: a },
            3 | 4 => Op::Slot {
                lane,
                reserved: a.max(b),
                len: a.min(b),
                salvage,
            },
            5 => Op::Drop { lane, reserved: a },
            6 | 7 => Op::Read { lane, most },
            _ => Op::Deliver { atoms: a },
        },
    )
}

/// What was posted and not read, per lane.
pub(crate) type Model = [VecDeque<(Seq, Vec<u8>)>; 2];

fn write(writer: &mut LaneWriter, model: &mut Model, op: &Op) -> Result<(), WriteError> {
    let seq = writer.last().next();
    let marks = Marks::default();
    let (got, bytes) = match *op {
        Op::Append { len, .. } => {
            let bytes = payload(seq.0, len);
            (writer.append(&bytes, marks)?, bytes)
        }
        Op::Slot {
            reserved,
            len,
            salvage,
            ..
        } => {
            let bytes = payload(seq.0, len);
            let mut slot = match salvage {
                true => writer.reserve_for_salvage(reserved, reserved)?,
                false => writer.reserve(reserved)?,
            };
            assert_eq!(slot.payload().len(), reserved);
            slot.payload()[..len].copy_from_slice(&bytes);
            (slot.publish(len, marks)?, bytes)
        }
        Op::Drop { reserved, .. } => {
            writer.reserve(reserved)?.payload().fill(0xee);
            return Ok(());
        }
        Op::Read { .. } | Op::Deliver { .. } => unreachable!("not for a writer"),
    };
    assert_eq!(got, seq);
    model[writer.lane().index()].push_back((seq, bytes));
    Ok(())
}

/// Reads up to `most` entries and compares; how many there were.
pub(crate) fn read(reader: &mut LaneReader, model: &mut Model, most: usize) -> usize {
    let lane = reader.lane();
    for n in 0..most {
        let Some(entry) = reader.next().unwrap() else {
            return n;
        };
        let (seq, bytes) = model[lane.index()]
            .pop_front()
            .expect("only what was posted");
        assert_eq!(
            (entry.lane(), entry.seq(), entry.payload()),
            (lane, seq, &bytes[..])
        );
    }
    most
}

/// Runs the operations; an entry that finds the lane full is not written.
pub(crate) fn run(
    writer: &mut RingWriter,
    reader: &mut RingReader,
    card: Option<&sim::Card>,
    ops: &[Op],
) -> Model {
    let mut model = Model::default();
    for op in ops {
        match *op {
            Op::Read { lane, most } => {
                let half = match lane {
                    Lane::Events => &mut reader.events,
                    Lane::Inputs => &mut reader.inputs,
                };
                read(half, &mut model, most);
            }
            Op::Deliver { atoms } => {
                card.map(|card| card.deliver(atoms));
            }
            Op::Append { lane, .. } | Op::Slot { lane, .. } | Op::Drop { lane, .. } => {
                let half = match lane {
                    Lane::Events => &mut writer.events,
                    Lane::Inputs => &mut writer.inputs,
                };
                match write(half, &mut model, op) {
                    Ok(()) => {}
                    Err(WriteError::Full { needed, room, .. }) => assert!(room < needed),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
    model
}

proptest! {
    #[test]
    fn what_is_written_is_read(ops in prop::collection::vec(op(), 0..200)) {
        let (mut writer, mut reader) = small();
        let mut model = run(&mut writer, &mut reader, None, &ops);
        for half in [&mut reader.events, &mut reader.inputs] {
            read(half, &mut model, usize::MAX);
        }
        prop_assert!(model.iter().all(VecDeque::is_empty));
        prop_assert_eq!(writer.events.last(), reader.events.last());
        prop_assert_eq!(writer.events.committed(), Ok(reader.events.last()));
    }

    /// The writer's host dies at any moment: what had committed is read, what had not is whole or not there.
    #[test]
    fn a_card_that_dies_leaves_whole_entries(
        ops in prop::collection::vec(op(), 0..120), seed: u64, last in 0..300usize,
    ) {
        let (mut writer, mut reader, card) = sim::pair(&SMALL, Nonce(seed.to_le_bytes().repeat(2).try_into().unwrap()), seed).unwrap();
        let mut model = run(&mut writer, &mut reader, Some(&card), &ops);
        card.deliver(last);
        let progress = writer.progress.poll().unwrap();
        card.cut();
        let proof = reader.fencer.fence().unwrap();
        for half in [&mut reader.events, &mut reader.inputs] {
            read(half, &mut model, usize::MAX);
            prop_assert!(half.at_end(&proof).unwrap());
            prop_assert!(half.last() >= progress[half.lane().index()].committed);
            prop_assert_eq!(half.salvage(&proof), Ok(None));
        }
    }
}

#[test]
fn cut_at_every_byte_that_can_arrive_alone() {
    for arrived in 0.. {
        let (mut writer, mut reader, card) = sim::pair(&SMALL, Nonce([9; 16]), 42).unwrap();
        let lens = [0, 32, 33, 200, 7];
        for (i, len) in lens.into_iter().enumerate() {
            let bytes = payload(i as u64 + 1, len);
            writer.events.append(&bytes, Marks::default()).unwrap();
        }
        let all = card.deliver(arrived) < arrived;
        let committed = writer.events.committed().unwrap();
        let proof = reader.fencer.fence().unwrap();
        while let Some(entry) = reader.events.next().unwrap() {
            let i = entry.seq().0 as usize - 1;
            assert_eq!(entry.payload(), payload(entry.seq().0, lens[i]));
        }
        assert!(reader.events.last() >= committed);
        assert_eq!(reader.events.at_end(&proof), Ok(true));
        if all {
            assert_eq!(reader.events.last(), Seq(5));
            break;
        }
    }
}

#[test]
fn without_a_tail_a_gap_below_the_committed_mark_is_corruption() {
    for (committed, corrupt) in [(Seq(1), false), (Seq(2), true)] {
        let (mut writer, mut reader, card) = sim::pair(&SMALL, Nonce([3; 16]), 1).unwrap();
        for mark in [Seq(0), Seq(0), committed] {
            writer.events.append(&[1; 50], marks(mark)).unwrap();
        }
        card.deliver_all();
        card.damage(Lane::Events, 128 + 40);
        let proof = reader.fencer.fence().unwrap();
        assert_eq!(reader.events.next().unwrap().unwrap().seq(), Seq(1));
        assert_eq!(reader.events.next(), Ok(None));
        let expected = match corrupt {
            false => Ok(true),
            true => Err(ReadError::Corrupt {
                lane: Lane::Events,
                seq: Seq(2),
                offset: 128,
                field: Field::Committed,
                expected: 2,
                found: 3,
            }),
        };
        assert_eq!(reader.events.at_end(&proof), expected);
    }
}

/// The filler behind an entry may arrive after the reader has taken the entry; until then its place is not free.
#[test]
fn a_place_is_not_reused_before_its_last_byte_has_arrived() {
    let mut early = 0;
    for seed in 0..64 {
        let (mut writer, mut reader, card) = sim::pair(&SMALL, Nonce([6; 16]), seed).unwrap();
        writer.events.append(&[], Marks::default()).unwrap();
        while reader.events.next().unwrap().is_none() {
            assert_eq!(card.deliver(1), 1);
        }
        let complete = writer.events.committed() == Ok(Seq(1));
        for _ in 1..MIN_LANE / LINE {
            writer.events.append(&[], Marks::default()).unwrap();
        }
        assert_eq!(
            writer.events.append(&[], Marks::default()).is_ok(),
            complete
        );
        early += u32::from(!complete);
    }
    assert!(early > 0, "the filler was never late");
}

/// A reader's port without a tail, over memory that a test fills.
#[derive(Debug)]
struct Blind {
    view: ReadView,
    released: Arc<Mutex<u64>>,
}

impl ReadPort for Blind {
    fn limit(&mut self) -> Result<Limit, ReadError> {
        Ok(Limit::Unknown { fenced: true })
    }
    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }
    fn release(&mut self, consumed: u64) {
        *self.released.lock().unwrap() = consumed;
    }
    fn push(&mut self) -> Result<(), ReadError> {
        Ok(())
    }
    fn arm(&mut self) -> u32 {
        0
    }
    fn sleep(&mut self, _: u32, _: Duration) -> bool {
        false
    }
    fn disarm(&mut self) {}
}

/// A reader without a tail, the memory it reads, what it released, and a proof that it is fenced.
struct Unbounded {
    reader: LaneReader,
    memory: WriteView,
    released: Arc<Mutex<u64>>,
    proof: Fenced,
}

const NONCE: Nonce = Nonce([0x3c; 16]);

fn unbounded() -> Unbounded {
    let region = Region::heap(MIN_LANE);
    let released = Arc::new(Mutex::new(0));
    let [view, _] = region.read_views(0, [MIN_LANE, 0]);
    let [memory, _] = region.write_views(0, [MIN_LANE, 0]);
    let (_, mut other, _) = sim::pair(&SMALL, NONCE, 0).unwrap();
    let reader = LaneReader::new(ReaderParts {
        lane: Lane::Events,
        nonce: NONCE,
        geometry: Geometry::new(MIN_LANE).unwrap(),
        port: Box::new(Blind {
            view,
            released: released.clone(),
        }),
        acks: other.acks,
    });
    Unbounded {
        reader,
        memory,
        released,
        proof: other.fencer.fence().unwrap(),
    }
}

fn head(lap: u32, seq: u64) -> Head {
    Head {
        lane: Lane::Events,
        lap,
        seq: Seq(seq),
        marks: Marks::default(),
    }
}

#[test]
fn one_call_goes_past_one_pad() {
    let Unbounded {
        mut reader,
        mut memory,
        released,
        ..
    } = unbounded();
    let keys = Keys::new(&NONCE);
    let put = |memory: &mut WriteView, at, bytes: &[u8]| {
        memory.bytes_mut(at, bytes.len()).copy_from_slice(bytes)
    };
    put(&mut memory, 0, &encode(&keys, &head(0, 1), b"first"));
    // To where the longest entry does not fit any more: before, no writer pads.
    let longest = vec![0; MIN_LANE / 4 - HEADER_LEN];
    let mut at = LINE;
    for seq in 2..5 {
        put(&mut memory, at, &encode(&keys, &head(0, seq), &longest));
        at += MIN_LANE / 4;
    }
    for _ in 1..5 {
        assert!(reader.next().unwrap().is_some());
    }
    let rest = MIN_LANE - at - HEADER_LEN;
    put(
        &mut memory,
        at,
        &keys.pad(Lane::Events, 0, Seq(5), rest as u32).to_bytes(),
    );
    let lap = MIN_LANE - HEADER_LEN;
    put(
        &mut memory,
        0,
        &keys.pad(Lane::Events, 1, Seq(5), lap as u32).to_bytes(),
    );
    assert_eq!(reader.next(), Ok(None));
    assert_eq!(*released.lock().unwrap(), MIN_LANE as u64);
}

#[test]
fn a_pad_where_any_entry_would_fit_is_none() {
    let Unbounded {
        mut reader,
        mut memory,
        released,
        ..
    } = unbounded();
    let lap = (MIN_LANE - HEADER_LEN) as u32;
    let pad = Keys::new(&NONCE).pad(Lane::Events, 0, Seq(1), lap);
    memory
        .bytes_mut(0, HEADER_LEN)
        .copy_from_slice(&pad.to_bytes());
    assert_eq!(reader.next(), Ok(None));
    assert_eq!(*released.lock().unwrap(), 0);
}

#[test]
fn an_entry_that_is_whole_and_out_of_turn_is_corrupt_without_a_tail_too() {
    let Unbounded {
        mut reader,
        mut memory,
        ..
    } = unbounded();
    let bytes = encode(&Keys::new(&NONCE), &head(0, 2), b"second");
    memory.bytes_mut(0, bytes.len()).copy_from_slice(&bytes);
    let error = reader.next().unwrap_err();
    assert!(matches!(
        error,
        ReadError::Corrupt {
            field: Field::Sequence,
            expected: 1,
            found: 2,
            ..
        }
    ));
}

proptest! {
    /// Headers with a good stamp and any length, all over the lane, none of them whole.
    #[test]
    fn without_a_tail_forged_headers_are_the_end_of_the_log(
        headers in prop::collection::vec((0..MIN_LANE / LINE, 0..2u32, any::<bool>(), prop_oneof![0..MIN_LANE as u32 + 64, any::<u32>()]), 1..40),
    ) {
        let Unbounded { mut reader, mut memory, proof, .. } = unbounded();
        let keys = Keys::new(&NONCE);
        for (line, lap, pad, len) in headers {
            let mut header = match pad {
                true => keys.pad(Lane::Events, lap, Seq(1), len),
                false => keys.seal(&head(lap, 9), &[]),
            };
            header.len = len;
            header.crc ^= 1;
            memory.bytes_mut(line * LINE, HEADER_LEN).copy_from_slice(&header.to_bytes());
        }
        prop_assert_eq!(reader.next(), Ok(None));
        prop_assert_eq!(reader.at_end(&proof), Ok(true));
    }
}

#[test]
fn a_fenced_card_takes_nothing() {
    let (mut writer, mut reader, card) = sim::pair(&SMALL, Nonce([3; 16]), 1).unwrap();
    writer.events.append(b"lost", Marks::default()).unwrap();
    let proof = reader.fencer.fence().unwrap();
    card.deliver_all();
    assert_eq!(
        writer.events.append(b"late", Marks::default()),
        Err(WriteError::Fenced)
    );
    assert_eq!(writer.events.reserve(1).map(drop), Err(WriteError::Fenced));
    assert_eq!(reader.events.next(), Ok(None));
    assert_eq!(reader.events.at_end(&proof), Ok(true));
    let [events, _] = writer.progress.poll().unwrap();
    assert!(events.fenced && events.committed == Seq::ZERO);
}

#[test]
fn a_lane_fills_to_the_last_line_and_goes_on_after_reading() {
    let (mut writer, mut reader) = small();
    let lines = MIN_LANE / LINE;
    for _ in 0..lines {
        writer.events.append(&[7; 32], Marks::default()).unwrap();
    }
    let full = |needed, room| {
        Err(WriteError::Full {
            lane: Lane::Events,
            needed,
            room,
        })
    };
    assert_eq!(writer.events.append(&[], Marks::default()), full(64, 0));
    assert_eq!(
        writer.inputs.append(&[], Marks::default()),
        Ok(Seq(1)),
        "the lanes' credits are apart"
    );
    reader.events.next().unwrap().unwrap();
    assert_eq!(
        writer.events.append(&[0; 33], Marks::default()),
        full(128, 64)
    );
    assert_eq!(
        writer.events.append(&[8; 32], Marks::default()),
        Ok(Seq(lines as u64 + 1))
    );
    for seq in 2..=lines as u64 + 1 {
        assert_eq!(reader.events.next().unwrap().unwrap().seq(), Seq(seq));
    }
    assert_eq!(reader.events.next(), Ok(None));
}

#[test]
fn the_largest_entry_fits_into_an_empty_lane_wherever_it_starts() {
    for lines in 0..MIN_LANE / LINE {
        let (mut writer, mut reader) = small();
        for _ in 0..lines {
            writer.events.append(&[], Marks::default()).unwrap();
            reader.events.next().unwrap().unwrap();
        }
        let most = vec![1; writer.events.max_payload()];
        writer.events.append(&most, Marks::default()).unwrap();
        assert_eq!(reader.events.next().unwrap().unwrap().payload(), most);
    }
}

#[test]
fn bad_requests_are_refused_and_the_lane_goes_on() {
    let (mut writer, mut reader) = small();
    let max = writer.events.max_payload();
    let too_large = |len, max| {
        Err(WriteError::TooLarge {
            lane: Lane::Events,
            len,
            max,
        })
    };
    assert_eq!(
        writer.events.append(&vec![0; max + 1], Marks::default()),
        too_large(max + 1, max)
    );
    assert_eq!(
        writer.events.reserve(max + 1).map(drop),
        too_large(max + 1, max).map(|_: Seq| ())
    );
    let slot = writer.events.reserve(10).unwrap();
    assert_eq!(slot.publish(11, Marks::default()), too_large(11, 10));
    let ahead = marks(Seq(1));
    let refused = Err(WriteError::Marks {
        seq: Seq(1),
        committed: Seq(1),
    });
    assert_eq!(writer.events.append(b"x", ahead), refused);
    assert_eq!(writer.events.reserve(1).unwrap().publish(1, ahead), refused);
    assert_eq!(
        writer.inputs.append(b"x", ahead),
        Ok(Seq(1)),
        "marks belong to the events lane"
    );
    assert_eq!(writer.events.append(b"good", Marks::default()), Ok(Seq(1)));
    assert_eq!(reader.events.next().unwrap().unwrap().payload(), b"good");
    assert_eq!(
        reader.events.set_received(Seq(2)),
        Err(ReadError::AckAhead {
            lane: Lane::Events,
            seq: Seq(2),
            last: Seq(1)
        })
    );
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for size in [
        0,
        1,
        MIN_LANE / 2,
        MIN_LANE + 64,
        3 * MIN_LANE,
        2 * MAX_LANE,
        usize::MAX,
    ] {
        let config = RingConfig {
            inputs: size,
            ..SMALL
        };
        assert!(
            matches!(shm::pair(&config), Err(shm::ConnectError::Size(bad)) if bad.size == size)
        );
    }
}
