//! The heartbeat on the wire: one UDP datagram of 96 bytes, little-endian.
//!
//! ```text
//!  0 magic "DPHB"   4 version   6 flags        8 machine        16 epoch     24 configuration
//! 32 sender (16 bytes)         48 sequence    56 sender's clock 64 position  72 vCPU turns
//! 80 time stood in line (ns)    88 tag
//! ```
//!
//! The tag is SipHash-2-4, a keyed hash made for short messages, under a key that the primary draws for each pairing and says over the
//! sealed control connection. It keeps strays, other pairs, a former life's packets and forgers out: without the key one guess
//! in 2^64 fits. What was sent before fits again, and is known by its sequence. Even a forged heartbeat could only delay a
//! take-over, never make two machines live (the arbiter and the fence decide that).

use std::hash::Hasher;
use std::time::Duration;

use super::record::{Configuration, Epoch, Identity};
use super::time::Moment;
use crate::position::Position;
use siphasher::sip::SipHasher24;
use xxhash_rust::xxh3::xxh3_64;

/// The length of every heartbeat, in bytes.
pub const SIZE: usize = 96;

const MAGIC: [u8; 4] = *b"DPHB";
const VERSION: u16 = 3;
const FLAG_OWES: u16 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = AT_MAGIC + 4;
const AT_FLAGS: usize = AT_VERSION + 2;
const AT_MACHINE: usize = AT_FLAGS + 2;
const AT_EPOCH: usize = AT_MACHINE + 8;
const AT_CONFIGURATION: usize = AT_EPOCH + 8;
const AT_SENDER: usize = AT_CONFIGURATION + 8;
const AT_SEQUENCE: usize = AT_SENDER + 16;
const AT_CLOCK: usize = AT_SEQUENCE + 8;
const AT_POSITION: usize = AT_CLOCK + 8;
const AT_TURNS: usize = AT_POSITION + 8;
const AT_STOOD: usize = AT_TURNS + 8;
const AT_TAG: usize = AT_STOOD + 8;

const _: () = {
    assert!(AT_MACHINE == 8 && AT_SENDER == 32 && AT_SEQUENCE == 48 && AT_TAG == 88);
    assert!(AT_TAG + 8 == SIZE);
};

/// A machine, as heartbeats name it: the hash of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MachineId(pub u64);

impl MachineId {
    /// The id of the machine with this name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        Self(xxh3_64(name.as_bytes()))
    }
}

/// The secret of one pair, drawn anew for each pairing and exchanged in its handshake.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PairKey([u8; 16]);

impl PairKey {
    /// The key with these bits, which should be random.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bits, for the handshake.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    fn tag(self, body: &[u8]) -> u64 {
        let mut hash = SipHasher24::new_with_key(&self.0);
        hash.write(body);
        hash.finish()
    }
}

impl std::fmt::Debug for PairKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairKey(secret)")
    }
}

/// How far the sender's vCPU thread has come, sampled by the session just before each tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Progress {
    /// The sync point reached: executed by a primary, replayed by a backup.
    pub position: Position,
    /// Counts turns of the vCPU thread: it moves whenever that thread finishes a piece of work.
    pub turns: u64,
    /// The vCPU thread has work in hand outside the guest (an exit to serve, an entry to apply). While this is
    /// set, `turns` must move, or the thread is wedged. Clear while the guest computes, halts, or waits for the log.
    pub owes: bool,
    /// How long of the piece of work in hand that thread has certainly been runnable without a CPU: such a one is not wedged.
    pub stood: Duration,
}

/// One heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heartbeat {
    /// The machine it is about.
    pub machine: MachineId,
    /// The sender's reign.
    pub epoch: Epoch,
    /// The sender's configuration.
    pub configuration: Configuration,
    /// The sending process.
    pub sender: Identity,
    /// Counts the sender's heartbeats, from 1.
    pub sequence: u64,
    /// The sender's own monotonic clock.
    pub clock: Moment,
    /// How far its vCPU thread has come.
    pub progress: Progress,
}

/// Why a datagram is not a heartbeat of this pair. Such datagrams are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stray {
    /// Another length than [`SIZE`].
    #[error("a datagram of {0} bytes is no heartbeat ({SIZE} bytes)")]
    Length(usize),
    /// It does not begin as a heartbeat does.
    #[error("not a heartbeat")]
    Magic,
    /// Another version of the format.
    #[error("heartbeat version {0}, expected {VERSION}: run the same doppel on both hosts")]
    Version(u16),
    /// Damaged, forged, or of another pair.
    #[error("the heartbeat's tag is wrong: damaged, forged, or from another pair")]
    Tag,
    /// Flags that this version does not know.
    #[error("heartbeat with unknown flags {0:#06x}")]
    Flags(u16),
}

impl Heartbeat {
    /// The datagram to send.
    #[must_use]
    pub fn encode(&self, key: PairKey) -> [u8; SIZE] {
        let mut out = [0; SIZE];
        let flags = if self.progress.owes { FLAG_OWES } else { 0 };
        put(&mut out, AT_MAGIC, MAGIC);
        put(&mut out, AT_VERSION, VERSION.to_le_bytes());
        put(&mut out, AT_FLAGS, flags.to_le_bytes());
        put(&mut out, AT_MACHINE, self.machine.0.to_le_bytes());
        put(&mut out, AT_EPOCH, self.epoch.0.to_le_bytes());
        put(
            &mut out,
            AT_CONFIGURATION,
            self.configuration.0.to_le_bytes(),
        );
        put(&mut out, AT_SENDER, self.sender.to_bytes());
        put(&mut out, AT_SEQUENCE, self.sequence.to_le_bytes());
        put(&mut out, AT_CLOCK, self.clock.0.to_le_bytes());
        put(
            &mut out,
            AT_POSITION,
            self.progress.position.0.to_le_bytes(),
        );
        put(&mut out, AT_TURNS, self.progress.turns.to_le_bytes());
        let stood = u64::try_from(self.progress.stood.as_nanos()).unwrap_or(u64::MAX);
        put(&mut out, AT_STOOD, stood.to_le_bytes());
        let tag = key.tag(&out[..AT_TAG]);
        put(&mut out, AT_TAG, tag.to_le_bytes());
        out
    }

    /// Reads a datagram of this pair.
    ///
    /// # Errors
    /// [`Stray`] for anything that this pair did not send.
    pub fn decode(datagram: &[u8], key: PairKey) -> Result<Self, Stray> {
        let bytes: &[u8; SIZE] = datagram
            .try_into()
            .map_err(|_| Stray::Length(datagram.len()))?;
        if bytes[AT_MAGIC..AT_VERSION] != MAGIC {
            return Err(Stray::Magic);
        }
        let version = u16_at(bytes, AT_VERSION);
        if version != VERSION {
            return Err(Stray::Version(version));
        }
        if u64_at(bytes, AT_TAG) != key.tag(&bytes[..AT_TAG]) {
            return Err(Stray::Tag);
        }
        let flags = u16_at(bytes, AT_FLAGS);
        if flags & !FLAG_OWES != 0 {
            return Err(Stray::Flags(flags));
        }
        let mut sender = [0; 16];
        sender.copy_from_slice(&bytes[AT_SENDER..AT_SEQUENCE]);
        Ok(Self {
            machine: MachineId(u64_at(bytes, AT_MACHINE)),
            epoch: Epoch(u64_at(bytes, AT_EPOCH)),
            configuration: Configuration(u64_at(bytes, AT_CONFIGURATION)),
            sender: Identity::from_bytes(sender),
            sequence: u64_at(bytes, AT_SEQUENCE),
            clock: Moment(u64_at(bytes, AT_CLOCK)),
            progress: Progress {
                position: Position(u64_at(bytes, AT_POSITION)),
                turns: u64_at(bytes, AT_TURNS),
                owes: flags & FLAG_OWES != 0,
                stood: Duration::from_nanos(u64_at(bytes, AT_STOOD)),
            },
        })
    }
}

fn put<const N: usize>(out: &mut [u8; SIZE], at: usize, bytes: [u8; N]) {
    out[at..at + N].copy_from_slice(&bytes);
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: PairKey = PairKey([7; 16]);

    fn sample() -> Heartbeat {
        Heartbeat {
            machine: MachineId::of("kv"),
            epoch: Epoch(3),
            configuration: Configuration(4),
            sender: Identity::from_bytes([9; 16]),
            sequence: 1 << 40,
            clock: Moment(123_456_789),
            progress: Progress {
                position: Position(77),
                turns: 5,
                owes: true,
                stood: Duration::from_nanos(987_654),
            },
        }
    }

    #[test]
    fn what_is_sent_is_what_is_read() {
        let idle = Heartbeat {
            progress: Progress::default(),
            ..sample()
        };
        for beat in [sample(), idle] {
            assert_eq!(Heartbeat::decode(&beat.encode(KEY), KEY), Ok(beat));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_refused() {
        let good = sample().encode(KEY);
        for bit in 0..SIZE * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Heartbeat::decode(&bad, KEY).is_err(), "bit {bit}");
        }
        let mut long = good.to_vec();
        long.push(0);
        assert_eq!(Heartbeat::decode(&long, KEY), Err(Stray::Length(SIZE + 1)));
        for length in 0..SIZE {
            assert_eq!(
                Heartbeat::decode(&good[..length], KEY),
                Err(Stray::Length(length))
            );
        }
    }

    #[test]
    fn another_pairs_heartbeat_is_refused_whichever_half_of_the_key_differs() {
        for byte in 0..16 {
            let mut other = KEY.0;
            other[byte] ^= 1;
            assert_eq!(
                Heartbeat::decode(&sample().encode(PairKey(other)), KEY),
                Err(Stray::Tag)
            );
        }
    }

    #[test]
    fn the_bytes_on_the_wire_do_not_change_unnoticed() {
        let wire = sample().encode(KEY);
        assert_eq!(&wire[..8], b"DPHB\x03\0\x01\0");
        assert_eq!(wire[AT_EPOCH], 3);
        assert_eq!(wire[AT_CONFIGURATION], 4);
        assert_eq!(&wire[32..48], &[9; 16]);
        assert_eq!(wire[64], 77);
    }
}
