//! What the two sides say to each other before the first write: pure.
//!
//! Both send one [`Hello`] of [`HELLO`] bytes over a stream that somebody else has made, and secured; the reader first. All
//! numbers are little-endian.
//!
//! | offset | type | field |
//! | --- | --- | --- |
//! | 0 | 8 bytes | magic: `rdmalogR` from the reader, `rdmalogr` from the writer |
//! | 8 | u32 | version |
//! | 12 | u8 | mode: 1 nic, 2 ack |
//! | 13 | u8 | link layer: 1 Ethernet, 0 InfiniBand |
//! | 14 | u8 | active MTU: 1 to 5 for 256 to 4096 bytes |
//! | 15 | u8 | zero |
//! | 16 | 16 bytes | nonce of the connection |
//! | 32 | 2 × u64 | sizes of the lanes |
//! | 48 | 16 bytes | GID |
//! | 64 | 2 × u32 | numbers of the queue pairs, events then inputs |
//! | 72 | 2 × u32 | their first packet numbers |
//! | 80 | u64, u64, u32 | memory that the other side writes: address, length, key |
//! | 100 | u16 | LID |
//! | 102 | 10 bytes | zero |
#![forbid(unsafe_code)]

use super::error::ConnectError;
use crate::entry::Nonce;
use crate::verbs::Remote;

/// Version of the message, the blocks, and what else goes over the queue pairs.
pub(super) const VERSION: u32 = 1;
/// Bytes of the message.
pub(super) const HELLO: usize = 112;

/// When an entry counts as committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// When its write was completed: the bytes are in the reader's memory, and no processor of the reader's had to do
    /// anything. The faster one.
    #[default]
    Nic,
    /// When the reader has said that it received it, checked.
    Ack,
}

impl Mode {
    /// The word for it in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Nic => "nic",
            Mode::Ack => "ack",
        }
    }
}

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Reader,
    Writer,
}

impl Side {
    fn magic(self) -> [u8; 8] {
        match self {
            Side::Reader => *b"rdmalogR",
            Side::Writer => *b"rdmalogr",
        }
    }
}

/// A side's address, and what it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) mode: Mode,
    pub(super) ethernet: bool,
    pub(super) mtu: u8,
    pub(super) nonce: Nonce,
    pub(super) sizes: [u64; 2],
    pub(super) gid: [u8; 16],
    pub(super) queues: [u32; 2],
    pub(super) psns: [u32; 2],
    pub(super) memory: Remote,
    pub(super) lid: u16,
}

/// Queue pair and packet numbers have 24 bits.
pub(super) const BITS24: u32 = (1 << 24) - 1;

fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut to = [0; N];
    to.copy_from_slice(&b[at..at + N]);
    to
}

impl Hello {
    pub(super) fn to_bytes(self, side: Side) -> [u8; HELLO] {
        let mut b = [0; HELLO];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &side.magic());
        put(8, &VERSION.to_le_bytes());
        let mode = match self.mode {
            Mode::Nic => 1,
            Mode::Ack => 2,
        };
        put(12, &[mode, u8::from(self.ethernet), self.mtu]);
        put(16, &self.nonce.0);
        for i in 0..2 {
            put(32 + 8 * i, &self.sizes[i].to_le_bytes());
            put(64 + 4 * i, &self.queues[i].to_le_bytes());
            put(72 + 4 * i, &self.psns[i].to_le_bytes());
        }
        put(48, &self.gid);
        put(80, &self.memory.address.to_le_bytes());
        put(88, &self.memory.len.to_le_bytes());
        put(96, &self.memory.key.to_le_bytes());
        put(100, &self.lid.to_le_bytes());
        b
    }

    /// Reads what the other side says. Sizes, mode and length of the memory are left to who knows what they should be.
    pub(super) fn from_bytes(b: &[u8; HELLO], side: Side) -> Result<Hello, ConnectError> {
        let other = |what| ConnectError::Protocol { what };
        if b[..8] != side.magic() {
            return Err(other("the magic number"));
        }
        if b[8..12] != VERSION.to_le_bytes() {
            return Err(other("the version number"));
        }
        if b[15] != 0 || b[102..] != [0; HELLO - 102] {
            return Err(other("reserved bytes"));
        }
        let mode = match b[12] {
            1 => Mode::Nic,
            2 => Mode::Ack,
            _ => return Err(other("the mode")),
        };
        let ethernet = match b[13] {
            0 => false,
            1 => true,
            _ => return Err(other("the link layer")),
        };
        if !(1..=5).contains(&b[14]) {
            return Err(other("the MTU"));
        }
        let pair64 = |at| [at, at + 8].map(|at| u64::from_le_bytes(array(b, at)));
        let pair32 = |at| [at, at + 4].map(|at| u32::from_le_bytes(array(b, at)));
        let [address, len] = pair64(80);
        let [key, _] = pair32(96);
        let hello = Hello {
            mode,
            ethernet,
            mtu: b[14],
            nonce: Nonce(array(b, 16)),
            sizes: pair64(32),
            gid: array(b, 48),
            queues: pair32(64),
            psns: pair32(72),
            memory: Remote { address, key, len },
            lid: u16::from_le_bytes(array(b, 100)),
        };
        if hello.queues.iter().any(|n| *n == 0 || *n > BITS24) {
            return Err(other("the number of a queue pair"));
        }
        if hello.psns.iter().any(|n| *n > BITS24) {
            return Err(other("a packet number"));
        }
        if address == 0 || address.checked_add(len).is_none() {
            return Err(other("the address of its memory"));
        }
        if ethernet && hello.gid == [0; 16] {
            return Err(other("the GID"));
        }
        if !ethernet && hello.lid == 0 {
            return Err(other("the LID"));
        }
        Ok(hello)
    }
}

const _: () = {
    // Every field ends where the next one starts.
    assert!(16 + size_of::<Nonce>() == 32 && 32 + 2 * size_of::<u64>() == 48);
    assert!(48 + size_of::<[u8; 16]>() == 64 && 64 + 2 * size_of::<[u32; 2]>() == 80);
    assert!(80 + 2 * size_of::<u64>() + size_of::<u32>() == 100);
    assert!(100 + size_of::<u16>() + 10 == HELLO);
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> impl Strategy<Value = Hello> {
        let words = (
            any::<[u64; 2]>(),
            1..u64::MAX / 2,
            0..u64::MAX / 2,
            any::<u32>(),
        );
        let numbers = ([1..=BITS24, 1..=BITS24], [0..=BITS24, 0..=BITS24]);
        (
            any::<[u8; 16]>(),
            words,
            numbers,
            any::<bool>(),
            any::<bool>(),
            1..=5u8,
            1..=u16::MAX,
        )
            .prop_map(|(bytes, words, numbers, ack, ethernet, mtu, lid)| Hello {
                mode: if ack { Mode::Ack } else { Mode::Nic },
                ethernet,
                mtu,
                nonce: Nonce(bytes),
                sizes: words.0,
                gid: bytes.map(|byte| byte | 1),
                queues: numbers.0,
                psns: numbers.1,
                memory: Remote {
                    address: words.1,
                    key: words.3,
                    len: words.2,
                },
                lid,
            })
    }

    proptest! {
        #[test]
        fn it_comes_back(hello in hello()) {
            for side in [Side::Reader, Side::Writer] {
                let found = Hello::from_bytes(&hello.to_bytes(side), side).unwrap();
                prop_assert_eq!(found, hello);
            }
            let reflected = Hello::from_bytes(&hello.to_bytes(Side::Reader), Side::Writer);
            prop_assert!(reflected.is_err());
        }

        #[test]
        fn noise_never_panics(noise in any::<[[u8; 16]; HELLO / 16]>(), fix: bool) {
            let mut bytes = [0; HELLO];
            bytes.copy_from_slice(noise.as_flattened());
            if fix {
                bytes[..8].copy_from_slice(b"rdmalogR");
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            }
            let _ = Hello::from_bytes(&bytes, Side::Reader);
        }
    }

    #[test]
    fn every_field_that_cannot_be_is_named() {
        let good = Hello {
            mode: Mode::Nic,
            ethernet: true,
            mtu: 3,
            nonce: Nonce([7; 16]),
            sizes: [4096; 2],
            gid: [1; 16],
            queues: [17, 18],
            psns: [1, 2],
            memory: Remote {
                address: 4096,
                key: 5,
                len: 64,
            },
            lid: 9,
        };
        type Spoil = fn(&mut [u8; HELLO]);
        let cases: [(Spoil, &str); 14] = [
            (|b| b[0] = 0, "the magic number"),
            (|b| b[8] = 2, "the version number"),
            (|b| b[12] = 0, "the mode"),
            (|b| b[12] = 3, "the mode"),
            (|b| b[13] = 2, "the link layer"),
            (|b| b[14] = 0, "the MTU"),
            (|b| b[14] = 6, "the MTU"),
            (|b| b[15] = 1, "reserved bytes"),
            (|b| b[111] = 1, "reserved bytes"),
            (|b| b[48..64].fill(0), "the GID"),
            (|b| b[64..68].fill(0), "the number of a queue pair"),
            (|b| b[71] = 1, "the number of a queue pair"),
            (|b| b[79] = 1, "a packet number"),
            (|b| b[80..96].fill(0xff), "the address of its memory"),
        ];
        for (spoil, wrong) in cases {
            let mut bytes = good.to_bytes(Side::Reader);
            spoil(&mut bytes);
            match Hello::from_bytes(&bytes, Side::Reader) {
                Err(ConnectError::Protocol { what }) => assert_eq!(what, wrong),
                other => panic!("{wrong}: {other:?}"),
            }
        }
        let no_lid = Hello {
            ethernet: false,
            lid: 0,
            ..good
        };
        assert!(Hello::from_bytes(&no_lid.to_bytes(Side::Writer), Side::Writer).is_err());
    }
}
