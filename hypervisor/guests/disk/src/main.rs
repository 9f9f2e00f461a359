//! A guest that writes a disk, flushes it, reads it back, and knows what must be there.
//!
//! Words: `rounds=` how many before it powers off (default 0, endless), `blocks=` blocks of 4 KiB that it uses (default 256, at most
//! what the disk has), `batch=` requests under way at a time (default 16, at most 64), `acked=` the round up to which an earlier run said
//! that all was flushed (default 0): that is verified first, and the rounds go on behind it; `every=` rounds between two reports
//! (default 8).
//!
//! A round writes a batch of blocks, each with its number, the round and a checksum, waits for them, flushes, and says
//! `flushed N`. Now and then it reads back one of each. In the end it reads all, says `verified N`, and powers off. Status 0 if every
//! block was found as it was last written. Which blocks a round writes is a function of the round alone, so that a later run
//! knows it.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use guest_runtime::boot::WordError;
use guest_runtime::platform::halt;
use guest_runtime::virtio::{BLOCK, Block};
use guest_runtime::{Boot, Outcome, console_line};

guest_runtime::entry!(main);

const WORDS: usize = BLOCK / size_of::<u64>();
/// Between two rounds that read back what they wrote.
const READ_BACK: u64 = 4;

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let rounds = words.number_or("rounds", 0)?;
    let batch = words.number_or("batch", 16)? as u16;
    let acked = words.number_or("acked", 0)?;
    let every = words.number_or("every", 8)?.max(1);
    if !(1..=64).contains(&batch) {
        return Err(WordError::new("batch", "1 to 64").into());
    }
    let device = Block::open(batch)?;
    let blocks = words.number_or("blocks", 256)?.min(device.blocks());
    if blocks < u64::from(batch) {
        return Err(
            WordError::new("blocks", "at least a batch, and not more than the disk has").into(),
        );
    }
    console_line!("disk: {} blocks, {blocks} used", device.blocks());
    let mut disk = Disk {
        device,
        batch,
        blocks,
        written: vec![0; blocks as usize],
    };
    if acked > 0 {
        for round in 1..=acked {
            disk.plan(round);
        }
        if !disk.verify(Found::OrLater)? {
            return Ok(1);
        }
        console_line!("disk: found {acked}");
    }
    let mut round = acked;
    while rounds == 0 || round < acked + rounds {
        round += 1;
        let planned = disk.plan(round);
        disk.write(&planned, round)?;
        if round.is_multiple_of(READ_BACK) && !disk.read_back(&planned, Found::Exactly)? {
            return Ok(1);
        }
        disk.flush()?;
        if round.is_multiple_of(every) {
            console_line!("disk: flushed {round}");
        }
    }
    if !disk.verify(Found::Exactly)? {
        return Ok(1);
    }
    console_line!("disk: verified {round}");
    Ok(0)
}

/// What a block may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// What was written last.
    Exactly,
    /// That, or what a later round wrote of which nobody heard.
    OrLater,
}

struct Disk {
    device: Block,
    batch: u16,
    blocks: u64,
    /// The last round that wrote each block; 0 for none.
    written: Vec<u64>,
}

impl Disk {
    /// The blocks that a round writes, each once, and notes that it does.
    fn plan(&mut self, round: u64) -> Vec<u64> {
        let start = mix(round, 0) % self.blocks;
        // Blocks that lie beside each other, and the same ones again a few rounds later.
        let planned: Vec<u64> = (0..u64::from(self.batch))
            .map(|n| (start + n) % self.blocks)
            .collect();
        for &block in &planned {
            self.written[block as usize] = round;
        }
        planned
    }

    fn write(&mut self, planned: &[u64], round: u64) -> Result<(), Failed> {
        for (request, &block) in (0..).zip(planned) {
            fill(self.device.data_mut(request), block, round);
            self.device.write(request, block);
        }
        self.wait(planned.len())
    }

    fn flush(&mut self) -> Result<(), Failed> {
        self.device.flush(0);
        self.wait(1)
    }

    /// Reads blocks and compares them with what was written last; whether all are as they should be.
    fn read_back(&mut self, blocks: &[u64], allowed: Found) -> Result<bool, Failed> {
        let mut good = true;
        for part in blocks.chunks(self.batch.into()) {
            for (request, &block) in (0..).zip(part) {
                self.device.data_mut(request).fill(0xee);
                self.device.read(request, block);
            }
            self.wait(part.len())?;
            for (request, &block) in (0..).zip(part) {
                let expected = self.written[block as usize];
                let found = round_of(self.device.data(request), block);
                let is_good = match (found, allowed) {
                    (Some(found), Found::Exactly) => found == expected,
                    (Some(found), Found::OrLater) => found >= expected,
                    (None, _) => false,
                };
                if !is_good {
                    console_line!("disk: block {block} WRONG, of round {found:?} for {expected}");
                    good = false;
                }
            }
        }
        Ok(good)
    }

    fn verify(&mut self, allowed: Found) -> Result<bool, Failed> {
        let all: Vec<u64> = (0..self.blocks)
            .filter(|&block| self.written[block as usize] > 0)
            .collect();
        self.read_back(&all, allowed)
    }

    /// Waits until so many requests are done.
    fn wait(&mut self, count: usize) -> Result<(), Failed> {
        let mut done = 0;
        while done < count {
            match self.device.poll() {
                Some(finished) if finished.status != 0 => return Err(Failed(finished.status)),
                Some(_) => done += 1,
                // It tells the device of the requests, too.
                None => drop(halt()),
            }
        }
        Ok(())
    }
}

/// The disk said that it failed.
#[derive(Debug)]
struct Failed(u8);

impl core::fmt::Display for Failed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "the disk failed with status {}", self.0)
    }
}

impl core::error::Error for Failed {}

fn mix(round: u64, at: u64) -> u64 {
    let value = (round ^ at << 32).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (value ^ value >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53) >> 8
}

/// A block's number, its round, a pattern of both, and at the end a checksum.
fn fill(data: &mut [u8], block: u64, round: u64) {
    let mut sum = 0u64;
    for (at, bytes) in data.chunks_exact_mut(size_of::<u64>()).enumerate() {
        let word = match at {
            0 => block,
            1 => round,
            last if last == WORDS - 1 => sum,
            _ => mix(round, block << 16 | at as u64),
        };
        sum = sum.rotate_left(5) ^ word;
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// The round that wrote this block; none if it is not whole, or another one.
fn round_of(data: &[u8], block: u64) -> Option<u64> {
    let word = |at: usize| {
        let bytes = data[at * 8..at * 8 + 8].try_into().unwrap_or_default();
        u64::from_le_bytes(bytes)
    };
    let round = word(1);
    let mut whole = vec![0; BLOCK];
    fill(&mut whole, block, round);
    (whole == data).then_some(round)
}
