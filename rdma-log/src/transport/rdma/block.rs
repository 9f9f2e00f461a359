//! The few words that each side keeps in the other's memory: pure.
//!
//! | word | from the reader | from the writer |
//! | --- | --- | --- |
//! | 0, 3 | consumed bytes of events, inputs | 0 |
//! | 1, 4 | last entry received | 0 |
//! | 2, 5 | last entry replayed | 0 |
//! | 6 | alarm in the upper 62 bits; bit 0: fenced | alarm in the upper 62 bits |
//! | 7 | CRC-32C over the nonce, the direction and the words; its complement in the upper half |
//!
//! A block is written whole by one request, over the one before. Nothing is asked about the order in which its bytes
//! arrive: one that is torn has no good checksum, and who looks keeps what it knew and looks again.
//!
//! The *alarm* is how a side that is about to sleep asks to be woken: it counts it up, and the other side rings once for
//! every new number ([`Alarm`]).
#![forbid(unsafe_code)]

use crate::crc32c_append;
use crate::entry::Nonce;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;
const WORDS: usize = BLOCK / 8 - 1;
const FENCED: u64 = 1;
const ALARM_SHIFT: u32 = 2;

/// Who wrote a block. It goes into the checksum, so that one reflected is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Reader = 1,
    Writer = 2,
}

/// What the reader returns of one lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LaneWords {
    pub(super) consumed: u64,
    pub(super) received: u64,
    pub(super) replayed: u64,
}

/// What a block says. The writer's has no lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) lanes: [LaneWords; 2],
    pub(super) alarm: u64,
    pub(super) fenced: bool,
}

fn checksum(nonce: &Nonce, from: From, words: &[u8]) -> u64 {
    let pieces = [&nonce.0[..], &[from as u8], words];
    let crc = pieces
        .iter()
        .fold(0, |crc, piece| crc32c_append(crc, piece));
    u64::from(!crc) << 32 | u64::from(crc)
}

impl Block {
    pub(super) fn to_bytes(self, nonce: &Nonce, from: From) -> [u8; BLOCK] {
        let [events, inputs] = self.lanes;
        let words: [u64; WORDS] = [
            events.consumed,
            events.received,
            events.replayed,
            inputs.consumed,
            inputs.received,
            inputs.replayed,
            self.alarm << ALARM_SHIFT | if self.fenced { FENCED } else { 0 },
        ];
        let mut b = [0; BLOCK];
        for (to, word) in b.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let check = checksum(nonce, from, &b[..WORDS * 8]);
        b[WORDS * 8..].copy_from_slice(&check.to_le_bytes());
        b
    }

    /// `None` for a block that is not whole: not written yet, or being written.
    pub(super) fn from_bytes(b: &[u8; BLOCK], nonce: &Nonce, from: From) -> Option<Block> {
        let word = |i: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&b[i * 8..i * 8 + 8]);
            u64::from_le_bytes(le)
        };
        if word(WORDS) != checksum(nonce, from, &b[..WORDS * 8]) {
            return None;
        }
        let lane = |at| LaneWords {
            consumed: word(at),
            received: word(at + 1),
            replayed: word(at + 2),
        };
        Some(Block {
            lanes: [lane(0), lane(3)],
            alarm: word(6) >> ALARM_SHIFT,
            fenced: word(6) & FENCED != 0,
        })
    }
}

/// The sleeper's part of an alarm: no new one is set before the last has rung, so there is never more than one ring on
/// its way and a few posted receives are enough, whoever sleeps for however long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Alarm {
    set: u64,
    rung: u64,
}

impl Alarm {
    /// The number that the other side is to know.
    pub(super) fn number(self) -> u64 {
        self.set
    }

    pub(super) fn is_set(self) -> bool {
        self.set > self.rung
    }

    /// Sets it, unless it is; whether the other side has to be told.
    pub(super) fn set(&mut self) -> bool {
        let new = !self.is_set();
        self.set += u64::from(new);
        new
    }

    pub(super) fn rang(&mut self) {
        self.rung = self.set;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONCE: Nonce = Nonce(*b"a nonce of tests");

    fn block() -> impl Strategy<Value = Block> {
        let lane = || any::<[u64; 3]>();
        (lane(), lane(), 0..1u64 << 62, any::<bool>()).prop_map(|(a, b, alarm, fenced)| Block {
            lanes: [a, b].map(|[consumed, received, replayed]| LaneWords {
                consumed,
                received,
                replayed,
            }),
            alarm,
            fenced,
        })
    }

    proptest! {
        #[test]
        fn a_block_comes_back_and_nothing_else_does(block in block(), at in 0..BLOCK, flip in 1..=255u8) {
            let mut bytes = block.to_bytes(&NONCE, From::Reader);
            prop_assert_eq!(Block::from_bytes(&bytes, &NONCE, From::Reader), Some(block));
            prop_assert_eq!(Block::from_bytes(&bytes, &NONCE, From::Writer), None);
            prop_assert_eq!(Block::from_bytes(&bytes, &Nonce([0; 16]), From::Reader), None);
            bytes[at] ^= flip;
            prop_assert_eq!(Block::from_bytes(&bytes, &NONCE, From::Reader), None);
        }

        /// Any mixture of two blocks, word by word as a device writes them, is one of them or none.
        #[test]
        fn a_torn_block_is_none(old in block(), new in block(), arrived: u8) {
            let (before, after) = (old.to_bytes(&NONCE, From::Reader), new.to_bytes(&NONCE, From::Reader));
            let mut bytes = before;
            for word in (0..8).filter(|word| arrived & 1 << word != 0) {
                bytes[word * 8..word * 8 + 8].copy_from_slice(&after[word * 8..word * 8 + 8]);
            }
            let found = Block::from_bytes(&bytes, &NONCE, From::Reader);
            prop_assert!([None, Some(old), Some(new)].contains(&found));
        }
    }

    #[test]
    fn memory_that_nobody_wrote_is_no_block() {
        assert_eq!(Block::from_bytes(&[0; BLOCK], &NONCE, From::Reader), None);
        assert_eq!(
            Block::from_bytes(&[0xff; BLOCK], &NONCE, From::Writer),
            None
        );
    }

    #[test]
    fn an_alarm_is_set_once_until_it_rings() {
        let mut alarm = Alarm::default();
        assert!(!alarm.is_set() && alarm.set() && !alarm.set());
        assert!(alarm.is_set() && alarm.number() == 1);
        alarm.rang();
        assert!(!alarm.is_set() && alarm.set() && alarm.number() == 2);
    }
}
