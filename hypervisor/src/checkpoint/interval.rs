//! An interval as the log carries it: what the guest has sent to the world in it, and the checkpoint that ends it. All numbers are
//! little-endian.
//!
//! ```text
//!   0 magic "DOPLINTV"     16 bytes in all     24 outputs (u32)             32 CRC-32C of what is before the
//!   8 version (u32)                            28 bytes of outputs (u32)       checkpoint, but for these four bytes
//!  12 staged frames that it covers (u32)
//!  36 outputs: kind (u8) 1 frame, 2 console, 3 power-off, 4 what was asked of the disk; length (u32); bytes  │  the checkpoint
//! ```
//! The outputs wait in the primary's gate until all this has committed. They are here so that a backup that goes live can send
//! those again that may not have left. What was asked of the disk (writes and flushes, in their order, behind all others) is done to the
//! backup's image once the interval is whole, so that a torn one leaves no trace there either. Staged frames are counted in the order of the inputs lane: those that it covers are in the
//! guest's memory as the checkpoint has it, or were dropped by it; all others are to be given to whoever goes on from here.
#![forbid(unsafe_code)]

use super::format;
use crate::devices::MAX_FRAME;
use crate::disk::{DATA_MAX, REQUEST_HEAD, Request};
use crate::event::Output;
use crate::outlet::FRAMES_WAITING;

const MAGIC: [u8; 8] = *b"DOPLINTV";
/// Grows with every change of the layout.
const VERSION: u32 = 2;
const HEADER: usize = 36;
const CHECKSUM_AT: usize = 32;

/// Bytes of outputs that an interval can have, with what is around each: no more frames can wait in a gate, and other outputs are
/// short.
const OUTPUTS_MAX: u64 = 2 * FRAMES_WAITING as u64;

/// The longest console text of one output.
const CONSOLE_MAX: u64 = 64 << 10;

const FRAME: u8 = 1;
const CONSOLE: u8 = 2;
const POWER_OFF: u8 = 3;
const ASKED: u8 = 4;

/// Why bytes are no interval of this machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IntervalError {
    /// Not the beginning of an interval.
    #[error("this is no interval: it does not begin as one")]
    Foreign,
    /// Another version.
    #[error(
        "an interval of version {found}, this program reads {VERSION}: run the same version on both hosts"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Fewer or more bytes than it says.
    #[error("the interval has {found} bytes of {field}, where it says {expected}")]
    Length {
        /// What of it.
        field: &'static str,
        /// Bytes it says.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A number that cannot be.
    #[error("the interval's {field} is {found}, at most {limit} can be")]
    Limit {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The largest it can be.
        limit: u64,
    },
    /// The bytes are not what was written.
    #[error("the interval is corrupt: its checksum is {found:08x}, where it says {expected:08x}")]
    Checksum {
        /// What it says.
        expected: u32,
        /// What its bytes have.
        found: u32,
    },
}

/// An interval that came whole. Its checkpoint is still to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval<'a> {
    /// Staged frames that it covers.
    pub frames: u32,
    /// What the guest has sent in it, in order.
    pub outputs: Vec<Output>,
    /// What was asked of the disk in it, in order.
    pub asked: Vec<Request>,
    /// The checkpoint that ends it.
    pub checkpoint: &'a [u8],
}

/// What stands before the checkpoint, which has so many bytes.
#[must_use]
pub fn head(frames: u32, outputs: &[Output], asked: &[Request], checkpoint: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    let mut count = 0_u32;
    let mut add = |kind, content: &[u8]| {
        bytes.push(kind);
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes.extend_from_slice(content);
        count += 1;
    };
    for output in outputs {
        match output {
            Output::Frame(content) => add(FRAME, content),
            // As much as a guest could print before it was taken, which is more where this side had no time to.
            Output::Console(content) => {
                let parts = content.chunks(CONSOLE_MAX as usize);
                parts.for_each(|part| add(CONSOLE, part));
            }
            Output::PowerOff(status) => add(POWER_OFF, std::slice::from_ref(status)),
            // Those come below.
            Output::Disk(_) => {}
        }
    }
    for content in asked.iter().filter_map(Request::encode) {
        add(ASKED, &content);
    }
    let in_all = (bytes.len() + checkpoint) as u64;
    let of_outputs = (bytes.len() - HEADER) as u32;
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&frames.to_le_bytes());
    bytes[16..24].copy_from_slice(&in_all.to_le_bytes());
    bytes[24..28].copy_from_slice(&count.to_le_bytes());
    bytes[28..32].copy_from_slice(&of_outputs.to_le_bytes());
    let checksum = checksum(&bytes);
    bytes[CHECKSUM_AT..HEADER].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Of what stands before the checkpoint.
fn checksum(head: &[u8]) -> u32 {
    rdma_log::crc32c_append(rdma_log::crc32c(&head[..CHECKSUM_AT]), &head[HEADER..])
}

/// How many bytes the interval that begins like this will have.
pub(super) fn announced(bytes: &[u8], ram_pages: u64) -> Result<u64, IntervalError> {
    let header = bytes.get(..HEADER).ok_or(IntervalError::Length {
        field: "header",
        expected: HEADER as u64,
        found: bytes.len() as u64,
    })?;
    if header[..8] != MAGIC {
        return Err(IntervalError::Foreign);
    }
    let version = word32(header, 8);
    if version != VERSION {
        return Err(IntervalError::Version { found: version });
    }
    let limit = HEADER as u64 + OUTPUTS_MAX + format::limit(ram_pages);
    bounded("length", word64(header, 16), limit)
}

impl<'a> Interval<'a> {
    /// Checks an interval, but for its checkpoint, of a machine with so much RAM.
    ///
    /// # Errors
    /// See [`IntervalError`].
    pub fn parse(bytes: &'a [u8], ram_pages: u64) -> Result<Self, IntervalError> {
        let expected = announced(bytes, ram_pages)?;
        let length = |field, expected, found| {
            if expected == found {
                return Ok(());
            }
            Err(IntervalError::Length {
                field,
                expected,
                found,
            })
        };
        length("all", expected, bytes.len() as u64)?;
        let of_outputs = bounded("bytes of outputs", word32(bytes, 28).into(), OUTPUTS_MAX)?;
        let left = (bytes.len() - HEADER) as u64;
        bounded("bytes of outputs", of_outputs, left)?;
        let (head, checkpoint) = bytes.split_at(HEADER + of_outputs as usize);
        let (expected, found) = (word32(head, CHECKSUM_AT), checksum(head));
        if expected != found {
            return Err(IntervalError::Checksum { expected, found });
        }
        let mut rest = &head[HEADER..];
        let (mut outputs, mut asked) = (Vec::new(), Vec::new());
        while let Some((&kind, after)) = rest.split_first() {
            let (size, after) = after
                .split_first_chunk::<4>()
                .ok_or(IntervalError::Length {
                    field: "an output's length",
                    expected: 4,
                    found: after.len() as u64,
                })?;
            let most = match kind {
                FRAME => MAX_FRAME as u64,
                CONSOLE => CONSOLE_MAX,
                POWER_OFF => 1,
                ASKED => (REQUEST_HEAD + DATA_MAX) as u64,
                other => return Err(limit("kind of output", other.into(), ASKED.into())),
            };
            let size = bounded(
                "length of an output",
                u32::from_le_bytes(*size).into(),
                most,
            )?;
            let (content, after) =
                after
                    .split_at_checked(size as usize)
                    .ok_or(IntervalError::Length {
                        field: "an output",
                        expected: size,
                        found: after.len() as u64,
                    })?;
            rest = after;
            if kind == ASKED {
                let request = Request::decode(content);
                asked.push(request.ok_or_else(|| limit("request to the disk", size, 0))?);
                continue;
            }
            outputs.push(match (kind, content) {
                (FRAME, frame) => Output::Frame(frame.to_vec()),
                (POWER_OFF, &[status]) => Output::PowerOff(status),
                (POWER_OFF, _) => return Err(limit("length of a power-off", size, 1)),
                (_, text) => Output::Console(text.to_vec()),
            });
        }
        length(
            "outputs (their number)",
            word32(head, 24).into(),
            (outputs.len() + asked.len()) as u64,
        )?;
        Ok(Self {
            frames: word32(head, 12),
            outputs,
            asked,
            checkpoint,
        })
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn limit(field: &'static str, found: u64, limit: u64) -> IntervalError {
    IntervalError::Limit {
        field,
        found,
        limit,
    }
}

fn bounded(field: &'static str, found: u64, most: u64) -> Result<u64, IntervalError> {
    if found <= most {
        Ok(found)
    } else {
        Err(limit(field, found, most))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::{PART_BYTES, Shadow, ShadowError};
    use crate::disk::{Data, Operation, RequestNumber};

    const RAM: u64 = 512;

    fn output() -> impl Strategy<Value = Output> {
        let bytes = |least| proptest::collection::vec(any::<u8>(), least..2000);
        prop_oneof![
            bytes(0).prop_map(Output::Frame),
            bytes(1).prop_map(Output::Console),
            any::<u8>().prop_map(Output::PowerOff),
        ]
    }

    fn request() -> impl Strategy<Value = Request> {
        let write = (
            any::<u64>(),
            any::<u64>(),
            1usize..9,
            any::<u8>(),
            any::<bool>(),
        );
        write.prop_map(|(number, sector, sectors, byte, durable)| Request {
            number: RequestNumber(number),
            operation: if byte == 0 {
                Operation::Flush
            } else {
                Operation::Write {
                    sector,
                    data: Data(vec![byte; sectors * 512]),
                    durable,
                }
            },
        })
    }

    fn interval() -> impl Strategy<Value = (u32, Vec<Output>, Vec<Request>, Vec<u8>)> {
        let outputs = proptest::collection::vec(output(), 0..8);
        let checkpoint = proptest::collection::vec(any::<u8>(), 0..20_000);
        let asked = proptest::collection::vec(request(), 0..4);
        (any::<u32>(), outputs, asked, checkpoint)
    }

    fn written(frames: u32, outputs: &[Output], asked: &[Request], checkpoint: &[u8]) -> Vec<u8> {
        let mut bytes = head(frames, outputs, asked, checkpoint.len());
        bytes.extend_from_slice(checkpoint);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read((frames, outputs, asked, checkpoint) in interval()) {
            let bytes = written(frames, &outputs, &asked, &checkpoint);
            let read = Interval::parse(&bytes, RAM).unwrap();
            prop_assert_eq!(read, Interval { frames, outputs, asked, checkpoint: &checkpoint });
        }

        /// However it is cut into parts, and wherever its sender dies: it is there whole, or it is not there.
        #[test]
        fn a_torn_one_is_never_taken_for_a_whole_one(
            (frames, outputs, asked, checkpoint) in interval(),
            size in 40..PART_BYTES,
            torn in any::<prop::sample::Index>(),
        ) {
            let bytes = written(frames, &outputs, &asked, &checkpoint);
            let parts: Vec<&[u8]> = bytes.chunks(size).collect();
            let mut shadow = Shadow::of_intervals(RAM);
            for (number, part) in parts.iter().enumerate() {
                shadow.add(number as u32, part).unwrap();
            }
            let whole = shadow.take();
            prop_assert_eq!(&whole, &bytes);
            let missing = torn.index(parts.len());
            for (number, part) in parts.iter().enumerate().filter(|(number, _)| *number != missing) {
                match shadow.add(number as u32, part) {
                    Ok(()) => prop_assert!(number < missing),
                    Err(ShadowError::Order { .. }) => prop_assert!(number > missing),
                    Err(other) => prop_assert!(false, "{}", other),
                }
            }
            prop_assert!(Interval::parse(&bytes[..torn.index(bytes.len())], RAM).is_err());
        }

        #[test]
        fn any_bytes_are_an_interval_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), like in any::<bool>()) {
            if like && bytes.len() >= HEADER {
                let length = bytes.len() as u64;
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                bytes[16..24].copy_from_slice(&length.to_le_bytes());
                bytes[28..32].copy_from_slice(&(length as u32 - HEADER as u32).to_le_bytes());
                let checksum = checksum(&bytes);
                bytes[CHECKSUM_AT..HEADER].copy_from_slice(&checksum.to_le_bytes());
            }
            let _ = Interval::parse(&bytes, RAM);
        }
    }

    #[test]
    fn every_flipped_bit_before_the_checkpoint_is_noticed() {
        let outputs = [Output::Frame(vec![7; 60]), Output::Console(b"x".to_vec())];
        let asked = [Request {
            number: RequestNumber(1),
            operation: Operation::Flush,
        }];
        let bytes = written(3, &outputs, &asked, &[9; 100]);
        for bit in 0..(bytes.len() - 100) * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Interval::parse(&bad, RAM).is_err(), "bit {bit}");
        }
    }

    /// A guest prints as fast as it can, and nobody takes it for a while.
    #[test]
    fn a_long_text_crosses_in_parts() {
        let text: Vec<u8> = (0..3 * CONSOLE_MAX + 5).map(|n| n as u8).collect();
        let outputs = [Output::Console(text.clone()), Output::PowerOff(0)];
        let bytes = written(0, &outputs, &[], &[]);
        let read = Interval::parse(&bytes, RAM).unwrap();
        let printed = read.outputs.iter().flat_map(|output| match output {
            Output::Console(part) => part.as_slice(),
            _ => &[],
        });
        assert!(printed.eq(&text));
        assert_eq!(read.outputs.last(), Some(&Output::PowerOff(0)));
    }

    #[test]
    fn more_than_it_announced_is_not_taken_in() {
        let bytes = written(0, &[], &[], &[1; 500]);
        let mut shadow = Shadow::of_intervals(RAM);
        shadow.add(0, &bytes).unwrap();
        let announced = bytes.len() as u64;
        assert_eq!(shadow.add(1, &[0]), Err(ShadowError::TooLong { announced }));
        let mut huge = head(0, &[], &[], 0);
        huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            Shadow::of_intervals(RAM).add(0, &huge),
            Err(ShadowError::Interval(IntervalError::Limit {
                field: "length",
                ..
            }))
        ));
    }
}
