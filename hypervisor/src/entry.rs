//! What an entry of the events lane means: which inputs a sync point had, and what must be true there.
//!
//! ```text
//! kind (1) | position, as the distance from the entry before (varint) | body
//!   step          digest (8) | items…      several steps at one position are several rounds of inputs there
//!   memory hash   hash (8)
//!   end           digest (8) | memory hash (8) | state digest (8)
//!   control       digest (8) | what (1) | value (varint)      done on purpose, after the steps before: see [`Control`]; a reset's
//!                                                            value is 0 in version 7
//!   part          number (varint) | 1 if it is the last (1) | bytes      of a checkpoint, which holds after the step before
//! item: tag (1) | clock: distance from the clock before (varint)     | random: length (varint), bytes
//!               | tick: count (varint)                              | frames: count (varint), CRC-32C of their bytes (4)
//!               | console: length (varint), bytes                   | outputs: count (varint), CRC-32C of their bytes (4)
//!               | disk: count (varint), CRC-32C of what came of so many requests (4)
//!               | exit: the whole record, when every exit is logged
//! ```
//! Distances keep the common entry (a halt that ends with the clock and a frame) within the 32 bytes that the ring leaves in
//! one cache line.
#![forbid(unsafe_code)]

mod control;

pub use control::{Control, Wish};

use crate::digest::{Digest, ExitRecord};
use crate::event::{GuestTime, Output};
use crate::position::Position;
use crate::version::Version;

/// One entry, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The sync point it belongs to.
    pub position: Position,
    /// What it says of that point.
    pub body: Body,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Inputs applied and outputs made at the sync point.
    Step(Step),
    /// Hash of the whole memory at the sync point, before its inputs.
    MemoryHash(u64),
    /// A part of a checkpoint, taken after the sync point and its inputs. The last one puts it in place.
    Part(Part),
    /// Something was done to the machine on purpose, at the sync point and after its inputs.
    Control {
        /// Digest over all exits up to this one.
        digest: Digest,
        /// What.
        what: Control,
    },
    /// The recorder ended here, on purpose.
    End {
        /// Digest over all exits.
        digest: Digest,
        /// Hash of the whole memory.
        memory: u64,
        /// Digest of the CPU's and the devices' state.
        state: u64,
    },
}

/// A part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its number, from 0.
    pub number: u32,
    /// No more follow.
    pub last: bool,
    /// What it holds.
    pub bytes: Vec<u8>,
}

impl Part {
    /// A checkpoint's bytes, of which there are some, in parts of at most so many.
    pub fn all_of(bytes: &[u8], most: usize) -> impl Iterator<Item = Self> + '_ {
        let parts = bytes.chunks(most);
        let last = parts.len() - 1;
        parts.enumerate().map(move |(number, part)| Self {
            number: number as u32,
            last: number == last,
            bytes: part.to_vec(),
        })
    }
}

/// Inputs and outputs of a sync point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Digest over all exits up to this one.
    pub digest: Digest,
    /// The exit itself, when every exit is logged.
    pub exit: Option<ExitRecord>,
    /// Outputs made since the entry before.
    pub outputs: Option<OutputsDigest>,
    /// In the order in which they are applied.
    pub inputs: Vec<LoggedInput>,
}

/// An input as the log carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoggedInput {
    /// See [`crate::event::Input::Clock`].
    Clock(GuestTime),
    /// See [`crate::event::Input::Random`].
    Random(Vec<u8>),
    /// See [`crate::event::Input::Tick`].
    Tick(u32),
    /// The next `count` staged frames, in order.
    Frames {
        /// How many.
        count: u32,
        /// CRC-32C of their bytes, one after the other.
        checksum: u32,
    },
    /// See [`crate::event::Input::Console`].
    Console(Vec<u8>),
    /// What came of the next `count` requests to the disk, staged in this order.
    Disk {
        /// How many.
        count: u32,
        /// CRC-32C of their bytes, one after the other.
        checksum: u32,
    },
}

/// What outputs looked like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputsDigest {
    /// How many.
    pub count: u32,
    /// CRC-32C over each output's kind, length and bytes.
    pub checksum: u32,
}

impl OutputsDigest {
    /// Adds one output.
    pub fn add(&mut self, output: &Output) {
        let (kind, bytes): (u8, &[u8]) = match output {
            Output::Frame(bytes) => (1, bytes),
            Output::Console(bytes) => (2, bytes),
            Output::PowerOff(status) => (3, std::slice::from_ref(status)),
            Output::Disk(request) => {
                self.checksum = rdma_log::crc32c_append(self.checksum, &request.head());
                (4, request.written())
            }
        };
        let mut head = [kind, 0, 0, 0, 0];
        head[1..].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.checksum = rdma_log::crc32c_append(self.checksum, &head);
        self.checksum = rdma_log::crc32c_append(self.checksum, bytes);
        self.count += 1;
    }
}

/// Why bytes are no entry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EntryError {
    /// It ends too early.
    #[error("the entry ends inside its {field}")]
    Short {
        /// The field.
        field: &'static str,
    },
    /// A value that no recorder writes.
    #[error("the entry's {field} is {value}, which no recorder writes")]
    Value {
        /// The field.
        field: &'static str,
        /// The value found.
        value: u64,
    },
}

const KIND_STEP: u8 = 1;
const KIND_MEMORY_HASH: u8 = 2;
const KIND_END: u8 = 3;
const KIND_PART: u8 = 4;
const KIND_CONTROL: u8 = 5;

const TAG_CLOCK: u8 = 1;
const TAG_RANDOM: u8 = 2;
const TAG_TICK: u8 = 3;
const TAG_FRAMES: u8 = 4;
const TAG_CONSOLE: u8 = 5;
const TAG_OUTPUTS: u8 = 6;
const TAG_EXIT: u8 = 7;
const TAG_DISK: u8 = 8;

/// Random bytes or console bytes of one input: the entropy device gives at most 4096.
const BYTES_MAX: u64 = 4096;

/// What distances are counted from; the same on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    position: Position,
    clock: GuestTime,
}

impl Base {
    /// A base at this position and clock value.
    #[must_use]
    pub fn new(position: Position, clock: GuestTime) -> Self {
        Self { position, clock }
    }

    /// The position of the last entry.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// The last clock value that the log carried.
    #[must_use]
    pub fn clock(&self) -> GuestTime {
        self.clock
    }
}

/// Encodes entries into one reused buffer.
#[derive(Debug, Default)]
pub struct Encoder {
    base: Base,
    bytes: Vec<u8>,
    version: Version,
}

impl Encoder {
    /// An encoder that goes on where a decoder stopped.
    #[must_use]
    pub fn from_base(base: Base) -> Self {
        Self {
            base,
            bytes: Vec::with_capacity(256),
            version: Version::default(),
        }
    }

    /// The same, in this version, which whoever reads knows.
    #[must_use]
    pub fn speaking(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// From here on in this version.
    pub fn speak(&mut self, version: Version) {
        self.version = version;
    }

    /// Goes on from there.
    pub fn rebase(&mut self, base: Base) {
        self.base = base;
    }

    /// The clock that the next clock item is counted from; no earlier value can be logged.
    #[must_use]
    pub fn base(&self) -> Base {
        self.base
    }

    /// Counts clock values from this one, if it is later. Whoever decodes must be told by another way.
    pub fn advance_clock(&mut self, now: GuestTime) {
        self.base.clock = self.base.clock.max(now);
    }

    /// The entry that was encoded last.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Encodes one entry; the bytes are valid until the next call.
    pub fn encode(&mut self, entry: &Entry) -> &[u8] {
        let kind = match entry.body {
            Body::Step(_) => KIND_STEP,
            Body::MemoryHash(_) => KIND_MEMORY_HASH,
            Body::End { .. } => KIND_END,
            Body::Part(_) => KIND_PART,
            Body::Control { .. } => KIND_CONTROL,
        };
        self.begin(kind, entry.position);
        match &entry.body {
            Body::Step(step) => self.step(step),
            Body::MemoryHash(hash) => self.bytes.extend_from_slice(&hash.to_le_bytes()),
            Body::Part(part) => {
                self.part_head(part.number, part.last);
                self.bytes.extend_from_slice(&part.bytes);
            }
            Body::Control { digest, what } => {
                self.bytes.extend_from_slice(&digest.0.to_le_bytes());
                let (code, value) = what.code(self.version);
                self.bytes.push(code);
                self.varint(value);
            }
            Body::End {
                digest,
                memory,
                state,
            } => {
                for word in [digest.0, *memory, *state] {
                    self.bytes.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
        &self.bytes
    }

    /// Encodes what stands before the bytes of a part of a checkpoint, or of an interval: with those behind it, it is a [`Body::Part`].
    pub fn encode_part_head(&mut self, position: Position, number: u32, last: bool) {
        self.begin(KIND_PART, position);
        self.part_head(number, last);
    }

    fn begin(&mut self, kind: u8, position: Position) {
        self.bytes.clear();
        self.bytes.push(kind);
        let distance = position.0 - self.base.position.0;
        self.base.position = position;
        self.varint(distance);
    }

    fn part_head(&mut self, number: u32, last: bool) {
        self.varint(number.into());
        self.bytes.push(last.into());
    }

    fn step(&mut self, step: &Step) {
        self.bytes.extend_from_slice(&step.digest.0.to_le_bytes());
        if let Some(exit) = &step.exit {
            self.bytes.push(TAG_EXIT);
            self.bytes.extend_from_slice(&exit.to_bytes());
        }
        if let Some(outputs) = step.outputs {
            self.bytes.push(TAG_OUTPUTS);
            self.varint(u64::from(outputs.count));
            self.bytes
                .extend_from_slice(&outputs.checksum.to_le_bytes());
        }
        for input in &step.inputs {
            match input {
                LoggedInput::Clock(time) => {
                    self.bytes.push(TAG_CLOCK);
                    let distance = time.0 - self.base.clock.0;
                    self.base.clock = *time;
                    self.varint(distance);
                }
                LoggedInput::Random(bytes) => self.string(TAG_RANDOM, bytes),
                LoggedInput::Tick(count) => {
                    self.bytes.push(TAG_TICK);
                    self.varint(u64::from(*count));
                }
                LoggedInput::Frames { count, checksum } => {
                    self.bytes.push(TAG_FRAMES);
                    self.varint(u64::from(*count));
                    self.bytes.extend_from_slice(&checksum.to_le_bytes());
                }
                LoggedInput::Console(bytes) => self.string(TAG_CONSOLE, bytes),
                LoggedInput::Disk { count, checksum } => {
                    self.bytes.push(TAG_DISK);
                    self.varint(u64::from(*count));
                    self.bytes.extend_from_slice(&checksum.to_le_bytes());
                }
            }
        }
    }

    fn string(&mut self, tag: u8, bytes: &[u8]) {
        self.bytes.push(tag);
        self.varint(bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }
}

/// Which part of a checkpoint an encoded entry is, if it is one.
#[must_use]
pub fn part_number(payload: &[u8]) -> Option<u32> {
    let mut rest = Bytes(payload);
    if rest.byte("kind").ok()? != KIND_PART {
        return None;
    }
    rest.varint("position").ok()?;
    rest.count("part number").ok()
}

/// Decodes entries in the order in which they were written.
#[derive(Debug, Default)]
pub struct Decoder {
    base: Base,
    version: Version,
}

impl Decoder {
    /// A decoder that goes on where a machine was copied.
    #[must_use]
    pub fn from_base(base: Base) -> Self {
        Self {
            base,
            version: Version::default(),
        }
    }

    /// The same, of a log in this version. The newest reads what the older ones wrote.
    #[must_use]
    pub fn speaking(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// The log's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Goes on from there.
    pub fn rebase(&mut self, base: Base) {
        self.base = base;
    }

    /// What the next entry's distances are counted from.
    #[must_use]
    pub fn base(&self) -> Base {
        self.base
    }

    /// Decodes one entry.
    ///
    /// # Errors
    /// [`EntryError`]; the decoder is then of no further use.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Entry, EntryError> {
        let mut rest = Bytes(bytes);
        let kind = rest.byte("kind")?;
        let distance = rest.varint("position")?;
        let position = self
            .base
            .position
            .0
            .checked_add(distance)
            .ok_or(EntryError::Value {
                field: "position",
                value: distance,
            })?;
        self.base.position = Position(position);
        let body = match kind {
            KIND_STEP => Body::Step(self.step(&mut rest)?),
            KIND_MEMORY_HASH => Body::MemoryHash(rest.word("memory hash")?),
            KIND_PART => Body::Part(Part {
                number: rest.count("part number")?,
                last: rest.flag("mark of the last part")?,
                bytes: std::mem::take(&mut rest.0).to_vec(),
            }),
            KIND_CONTROL => Body::Control {
                digest: Digest(rest.word("digest")?),
                what: Control::decode(&mut rest, self.version)?,
            },
            KIND_END => Body::End {
                digest: Digest(rest.word("digest")?),
                memory: rest.word("memory hash")?,
                state: rest.word("state")?,
            },
            other => {
                return Err(EntryError::Value {
                    field: "kind",
                    value: u64::from(other),
                });
            }
        };
        if !rest.0.is_empty() {
            return Err(EntryError::Value {
                field: "length",
                value: bytes.len() as u64,
            });
        }
        Ok(Entry {
            position: self.base.position,
            body,
        })
    }

    fn step(&mut self, rest: &mut Bytes<'_>) -> Result<Step, EntryError> {
        let mut step = Step {
            digest: Digest(rest.word("digest")?),
            ..Step::default()
        };
        while !rest.0.is_empty() {
            match rest.byte("tag")? {
                TAG_EXIT => {
                    step.exit = ExitRecord::from_bytes(rest.take(ExitRecord::SIZE, "exit")?);
                }
                TAG_OUTPUTS => {
                    step.outputs = Some(OutputsDigest {
                        count: rest.count("output count")?,
                        checksum: rest.word32("output checksum")?,
                    });
                }
                TAG_CLOCK => {
                    let distance = rest.varint("clock")?;
                    let time =
                        self.base
                            .clock
                            .0
                            .checked_add(distance)
                            .ok_or(EntryError::Value {
                                field: "clock",
                                value: distance,
                            })?;
                    self.base.clock = GuestTime(time);
                    step.inputs.push(LoggedInput::Clock(self.base.clock));
                }
                TAG_RANDOM => step
                    .inputs
                    .push(LoggedInput::Random(rest.string("random bytes")?)),
                TAG_CONSOLE => step
                    .inputs
                    .push(LoggedInput::Console(rest.string("console bytes")?)),
                TAG_TICK => step
                    .inputs
                    .push(LoggedInput::Tick(rest.count("tick count")?)),
                TAG_FRAMES => step.inputs.push(LoggedInput::Frames {
                    count: rest.count("frame count")?,
                    checksum: rest.word32("frame checksum")?,
                }),
                TAG_DISK => step.inputs.push(LoggedInput::Disk {
                    count: rest.count("disk request count")?,
                    checksum: rest.word32("disk checksum")?,
                }),
                other => {
                    return Err(EntryError::Value {
                        field: "tag",
                        value: u64::from(other),
                    });
                }
            }
        }
        Ok(step)
    }
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], EntryError> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(EntryError::Short { field })?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, EntryError> {
        Ok(self.take(1, field)?[0])
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, EntryError> {
        match self.byte(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(EntryError::Value {
                field,
                value: u64::from(other),
            }),
        }
    }

    fn word(&mut self, field: &'static str) -> Result<u64, EntryError> {
        let bytes = self.take(8, field)?;
        Ok(u64::from_le_bytes(
            bytes.try_into().expect("eight bytes were taken"),
        ))
    }

    fn word32(&mut self, field: &'static str) -> Result<u32, EntryError> {
        let bytes = self.take(4, field)?;
        Ok(u32::from_le_bytes(
            bytes.try_into().expect("four bytes were taken"),
        ))
    }

    fn varint(&mut self, field: &'static str) -> Result<u64, EntryError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(field)?;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(EntryError::Value {
            field,
            value: u64::MAX,
        })
    }

    fn count(&mut self, field: &'static str) -> Result<u32, EntryError> {
        let value = self.varint(field)?;
        u32::try_from(value).map_err(|_| EntryError::Value { field, value })
    }

    fn string(&mut self, field: &'static str) -> Result<Vec<u8>, EntryError> {
        let length = self.varint(field)?;
        if length > BYTES_MAX {
            return Err(EntryError::Value {
                field,
                value: length,
            });
        }
        Ok(self.take(length as usize, field)?.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn input() -> impl Strategy<Value = LoggedInput> {
        prop_oneof![
            any::<u32>().prop_map(LoggedInput::Tick),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(LoggedInput::Random),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(LoggedInput::Console),
            (any::<u32>(), any::<u32>())
                .prop_map(|(count, checksum)| LoggedInput::Frames { count, checksum }),
            any::<(u32, u32)>().prop_map(|(count, checksum)| LoggedInput::Disk { count, checksum }),
        ]
    }

    fn control_of_any_kind() -> impl Strategy<Value = Control> {
        prop_oneof![
            any::<u64>().prop_map(|stood| Control::HandOver { stood }),
            any::<u8>().prop_map(Control::PowerOff),
            (0..=Control::WHOLE).prop_map(Control::Share),
            (0..Wish::ALL.len()).prop_map(|wish| Control::Reset(Wish::ALL[wish])),
        ]
    }

    fn body() -> impl Strategy<Value = Body> {
        prop_oneof![
            (
                any::<u64>(),
                proptest::collection::vec(input(), 0..4),
                any::<Option<(u32, u32)>>()
            )
                .prop_map(|(digest, inputs, outputs)| Body::Step(Step {
                    digest: Digest(digest),
                    exit: None,
                    outputs: outputs.map(|(count, checksum)| OutputsDigest { count, checksum }),
                    inputs,
                })),
            any::<u64>().prop_map(Body::MemoryHash),
            (
                any::<u32>(),
                any::<bool>(),
                proptest::collection::vec(any::<u8>(), 0..300)
            )
                .prop_map(|(number, last, bytes)| Body::Part(Part {
                    number,
                    last,
                    bytes
                })),
            (any::<u64>(), control_of_any_kind()).prop_map(|(digest, what)| Body::Control {
                digest: Digest(digest),
                what,
            }),
            any::<(u64, u64, u64)>().prop_map(|(digest, memory, state)| Body::End {
                digest: Digest(digest),
                memory,
                state
            }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(bodies in proptest::collection::vec((0u64..1 << 40, 0u64..1 << 40, body()), 0..20)) {
            let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
            let (mut position, mut clock) = (0, 0);
            for (further, later, mut body) in bodies {
                position += further;
                clock += later;
                if let Body::Step(step) = &mut body {
                    step.inputs.push(LoggedInput::Clock(GuestTime(clock)));
                }
                let entry = Entry { position: Position(position), body };
                prop_assert_eq!(decoder.decode(encoder.encode(&entry)).unwrap(), entry);
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Decoder::default().decode(&bytes);
        }
    }

    #[test]
    fn a_reset_says_whose_wish_it_was_to_those_who_know_the_word() {
        let old = Version(7);
        for wish in Wish::ALL {
            let entry = |wish| Entry {
                position: Position(9),
                body: Body::Control {
                    digest: Digest(5),
                    what: Control::Reset(wish),
                },
            };
            let mut encoder = Encoder::default().speaking(old);
            let bytes = encoder.encode(&entry(wish)).to_vec();
            for version in [old, Version::NEWEST] {
                let decoded = Decoder::default().speaking(version).decode(&bytes);
                assert_eq!(decoded.unwrap(), entry(Wish::Unsaid));
            }
            let bytes = Encoder::default().encode(&entry(wish)).to_vec();
            assert_eq!(Decoder::default().decode(&bytes).unwrap(), entry(wish));
            // A program of that version refuses what it does not know, rather than guess.
            let decoded = Decoder::default().speaking(old).decode(&bytes);
            assert_eq!(decoded.is_ok(), wish == Wish::Unsaid);
        }
    }

    #[test]
    fn a_parts_head_and_its_bytes_are_the_part() {
        let (position, number, bytes) = (Position(300), 200, vec![7; 1000]);
        let mut encoder = Encoder::default();
        encoder.encode_part_head(position, number, true);
        let pieces = [encoder.bytes(), &bytes].concat();
        let body = Body::Part(Part {
            number,
            last: true,
            bytes,
        });
        assert_eq!(Encoder::default().encode(&Entry { position, body }), pieces);
    }

    #[test]
    fn a_request_fits_one_cache_line() {
        let mut encoder = Encoder::default();
        let step = |position, clock| Entry {
            position: Position(position),
            body: Body::Step(Step {
                digest: Digest(u64::MAX),
                exit: None,
                outputs: None,
                inputs: vec![
                    LoggedInput::Frames {
                        count: 1,
                        checksum: u32::MAX,
                    },
                    LoggedInput::Clock(GuestTime(clock)),
                ],
            }),
        };
        encoder.encode(&step(1_000_000, 1 << 50));
        // 100 ms later.
        assert!(
            encoder
                .encode(&step(1_000_001, (1 << 50) + 100_000_000))
                .len()
                <= 32
        );
    }
}
