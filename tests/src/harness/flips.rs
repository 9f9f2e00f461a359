//! One bit of a log changed, and every checksum made to agree with it.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use hypervisor::entry::{Body, Entry, LoggedInput, Step};
use hypervisor::event::GuestTime;
use rdma_log::Lane;

use super::oracle::frame;
use super::random::Random;
use super::recording::Log;

/// An input that can be changed in many ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A clock value; all other values stay as they are, and time still never goes back.
    Clock,
    /// Random bytes.
    Random,
    /// How many ticks came.
    Tick,
    /// The bytes of a staged frame.
    Frame,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Clock, Self::Random, Self::Tick, Self::Frame];

    /// For figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Clock => "clock",
            Self::Random => "random",
            Self::Tick => "tick",
            Self::Frame => "frame",
        }
    }

    fn is(self, input: &LoggedInput) -> bool {
        matches!(
            (self, input),
            (Self::Clock, LoggedInput::Clock(_))
                | (Self::Random, LoggedInput::Random(_))
                | (Self::Tick, LoggedInput::Tick(_))
                | (Self::Frame, LoggedInput::Frames { .. })
        )
    }
}

/// A log and what its entries mean.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The file.
    pub log: Log,
    /// Each with the index of its item.
    pub entries: Vec<(usize, Entry)>,
}

impl Decoded {
    /// Decodes a log.
    ///
    /// # Errors
    /// If an entry means nothing.
    pub fn new(log: Log) -> Result<Self> {
        Ok(Self {
            entries: log.entries()?,
            log,
        })
    }

    /// The same recording as it is usually made: entries only for inputs and outputs, and no exits in them.
    #[must_use]
    pub fn folded(&self) -> Self {
        let kept = self.entries.iter().filter_map(|(item, entry)| {
            let mut entry = entry.clone();
            if let Body::Step(step) = &mut entry.body {
                if step.inputs.is_empty() && step.outputs.is_none() {
                    return None;
                }
                step.exit = None;
            }
            Some((*item, entry))
        });
        Self {
            log: self.log.clone(),
            entries: kept.collect(),
        }
    }

    /// The file that says what the entries say.
    #[must_use]
    pub fn file(&self) -> Log {
        self.log.with_entries(&self.entries)
    }

    /// Where inputs of a kind stand: entry and input.
    #[must_use]
    pub fn inputs(&self, kind: Kind) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        for (at, (_, entry)) in self.entries.iter().enumerate() {
            if let Body::Step(step) = &entry.body {
                let inputs = step.inputs.iter().enumerate();
                found.extend(
                    inputs
                        .filter(|(_, input)| kind.is(input))
                        .map(|(input, _)| (at, input)),
                );
            }
        }
        found
    }

    fn step(&mut self, entry: usize) -> Option<&mut Step> {
        match &mut self.entries.get_mut(entry)?.1.body {
            Body::Step(step) => Some(step),
            Body::MemoryHash(_) | Body::End { .. } | Body::Part(_) | Body::Control { .. } => None,
        }
    }

    /// The clock values around one, or the ends of time.
    fn clocks_around(&self, (entry, input): (usize, usize)) -> (u64, u64) {
        let (mut before, mut after, mut seen) = (0, u64::MAX, false);
        for at in self.inputs(Kind::Clock) {
            let Body::Step(step) = &self.entries[at.0].1.body else {
                continue;
            };
            let LoggedInput::Clock(GuestTime(time)) = step.inputs[at.1] else {
                continue;
            };
            if at == (entry, input) {
                seen = true;
            } else if seen {
                after = time;
                break;
            } else {
                before = time;
            }
        }
        (before, after)
    }
}

/// Chooses an input of a kind, and flips one of its bits in the recording; the change, in words. None if there is no such
/// input, or the one that was chosen has no bit that can be flipped alone.
///
/// # Errors
/// If the log is none that a recorder writes.
pub fn flip(recording: &mut Decoded, kind: Kind, random: &mut Random) -> Result<Option<String>> {
    let found = recording.inputs(kind);
    if found.is_empty() {
        return Ok(None);
    }
    let at = found[random.below(found.len() as u64) as usize];
    let position = recording.entries[at.0].1.position;
    let bounds = recording.clocks_around(at);
    if kind == Kind::Frame {
        return flip_frame(recording, at, random)
            .map(|what| Some(format!("{what} at position {position}")));
    }
    let step = recording.step(at.0).context("a step")?;
    let what = match &mut step.inputs[at.1] {
        LoggedInput::Clock(GuestTime(time)) => {
            let fits = |bit: &u32| (bounds.0..=bounds.1).contains(&(*time ^ 1 << bit));
            let bits: BTreeSet<u32> = (0..64).filter(fits).collect();
            if bits.is_empty() {
                return Ok(None);
            }
            let bit = bits
                .iter()
                .nth(random.below(bits.len() as u64) as usize)
                .context("a bit")?;
            *time ^= 1 << bit;
            format!("bit {bit} of the clock")
        }
        LoggedInput::Random(bytes) => {
            let (byte, bit) = (random.below(bytes.len() as u64) as usize, random.below(8));
            bytes[byte] ^= 1 << bit;
            format!("bit {bit} of random byte {byte} of {}", bytes.len())
        }
        LoggedInput::Tick(count) => {
            // A low one half the time: only those make another count of a kind that happens.
            let width = [2, 32][random.below(2) as usize];
            let bit = random.below(width);
            *count ^= 1 << bit;
            format!("bit {bit} of the tick count")
        }
        LoggedInput::Frames { .. } | LoggedInput::Console(_) | LoggedInput::Disk { .. } => {
            return Ok(None);
        }
    };
    Ok(Some(format!("{what} at position {position}")))
}

/// Flips a bit in one of the frames that an entry applies, and gives the entry the checksum that they have now.
fn flip_frame(
    recording: &mut Decoded,
    (entry, input): (usize, usize),
    random: &mut Random,
) -> Result<String> {
    let count = |step: &Step, before: usize| -> usize {
        let frames = step.inputs[..before].iter().map(|input| match input {
            LoggedInput::Frames { count, .. } => *count as usize,
            _ => 0,
        });
        frames.sum()
    };
    let mut applied = 0;
    for (_, before) in &recording.entries[..entry] {
        if let Body::Step(step) = &before.body {
            applied += count(step, step.inputs.len());
        }
    }
    let step = recording.step(entry).context("a step")?;
    applied += count(step, input);
    let LoggedInput::Frames { count, .. } = step.inputs[input] else {
        anyhow::bail!("no frames there");
    };
    let lane = recording
        .log
        .items
        .iter_mut()
        .filter(|item| item.lane == Lane::Inputs);
    let mut items: Vec<_> = lane.skip(applied).take(count as usize).collect();
    let chosen = items
        .get_mut(random.below(u64::from(count)) as usize)
        .context("a frame that is in the log")?;
    let length = frame(chosen).context("a frame")?.len();
    let (byte, bit) = (random.below(length as u64) as usize, random.below(8));
    let head = chosen.payload.len() - length;
    chosen.payload[head + byte] ^= 1 << bit;
    let mut sum = 0;
    for item in items {
        sum = crc32c_append(sum, frame(item).context("a frame")?);
    }
    let step = recording.step(entry).context("a step")?;
    step.inputs[input] = LoggedInput::Frames {
        count,
        checksum: sum,
    };
    Ok(format!("bit {bit} of byte {byte} of a frame of {length}"))
}

/// Moves one entry's position, by one bit of its distance from the entry before, to where no other entry is: from and to.
#[must_use]
pub fn flip_position(recording: &mut Decoded, random: &mut Random) -> Option<(u64, u64)> {
    let at = random.below(recording.entries.len() as u64) as usize;
    let position = |at: usize| recording.entries.get(at).map(|(_, entry)| entry.position.0);
    let from = position(at)?;
    let before = at.checked_sub(1).map_or(Some(0), position)?;
    let after = position(at + 1)?;
    let moved = |bit: &u32| before + ((from - before) ^ 1 << bit);
    let fits = |to: &u64| *to != from && *to > before && *to < after;
    let places: Vec<u64> = (0..32).map(|bit| moved(&bit)).filter(fits).collect();
    if places.is_empty() {
        return None;
    }
    let to = places[random.below(places.len() as u64) as usize];
    recording.entries[at].1.position.0 = to;
    Some((from, to))
}

/// Flips any one bit of any entry's payload in the events lane: in words.
///
/// # Errors
/// If there is no entry.
pub fn flip_any(log: &mut Log, random: &mut Random) -> Result<String> {
    let events: Vec<usize> = (0..log.items.len())
        .filter(|&item| log.items[item].lane == Lane::Events)
        .collect();
    let item = events[random.below(events.len() as u64) as usize];
    let payload = &mut log.items[item].payload;
    let (byte, bit) = (random.below(payload.len() as u64) as usize, random.below(8));
    *payload.get_mut(byte).context("a byte")? ^= 1 << bit;
    Ok(format!(
        "bit {bit} of byte {byte} of {} of item {item}",
        payload.len()
    ))
}

/// Whether two logs differ in nothing but the values of inputs.
#[must_use]
pub fn only_inputs_differ(one: &[(usize, Entry)], other: &[(usize, Entry)]) -> bool {
    let same_but_inputs = |one: &Entry, other: &Entry| match (&one.body, &other.body) {
        (Body::Step(a), Body::Step(b)) => {
            let bare = |step: &Step| Step {
                inputs: Vec::new(),
                ..step.clone()
            };
            // The checksum of frames is no input, nor is their number.
            let kept = |step: &Step| -> Vec<LoggedInput> {
                let frames = step.inputs.iter().filter(|input| Kind::Frame.is(input));
                frames.cloned().collect()
            };
            bare(a) == bare(b) && kept(a) == kept(b)
        }
        (a, b) => a == b,
    };
    one.len() == other.len()
        && one.iter().zip(other).all(|((_, one), (_, other))| {
            one.position == other.position && same_but_inputs(one, other)
        })
}

/// CRC-32C (Castagnoli), bit by bit: what the format says, not the crate that the program uses.
fn crc32c_append(before: u32, bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    let sum = bytes.iter().fold(!before, |mut sum, byte| {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 == 1 { REVERSED_POLYNOMIAL } else { 0 };
        }
        sum
    });
    !sum
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRCs.
        assert_eq!(super::crc32c_append(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(
            super::crc32c_append(super::crc32c_append(0, b"1234"), b"56789"),
            0xe306_9283
        );
    }
}
