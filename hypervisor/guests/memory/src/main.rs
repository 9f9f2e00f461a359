//! A guest that rewrites all of its free memory, verifies it, and starts over.
//!
//! Words: `passes=` how many before it powers off (default 0, endless), `pages=` pages written or verified from one
//! exit to the next (default 64), `rate=` MiB written a second at most, after the first pass (default 0, as many as it can), `steps=1` to have the
//! longest time from one exit to the next said after each pass. Each pass takes its pattern from a random number. Status 0 if
//! every word was found as it was written.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use guest_runtime::boot::WordError;
use guest_runtime::platform::{GuestTime, clock, random};
use guest_runtime::{Boot, Outcome, console_line};

guest_runtime::entry!(main);

const PAGE_WORDS: usize = 4096 / size_of::<u64>();

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let passes = words.number_or("passes", 0)?;
    let pages = words.number_or("pages", 64)? as usize;
    if pages == 0 {
        return Err(WordError::new("pages", "at least 1").into());
    }
    let rate = words.number_or("rate", 0)?;
    let tells = words.number_or("steps", 0)? != 0;
    let mut memory = all_memory(boot.ram_bytes);
    console_line!("memory: {} KiB", memory.len() * size_of::<u64>() / 1024);
    let mut pass = 0;
    let mut steps = Steps::begin();
    while passes == 0 || pass < passes {
        pass += 1;
        let seed = random();
        let (begun, mut written) = (steps.now, 0);
        let rate = if pass == 1 { 0 } else { rate };
        for (chunk, block) in memory.chunks_mut(pages * PAGE_WORDS).enumerate() {
            for (word, at) in block.iter_mut().zip(chunk * pages * PAGE_WORDS..) {
                *word = pattern(seed, at);
            }
            steps.step();
            written += (block.len() * size_of::<u64>()) as u64;
            let due = begun.0
                + (written * 1_000_000_000)
                    .checked_div(rate << 20)
                    .unwrap_or(0);
            while steps.now.0 < due {
                steps.step();
            }
        }
        for (chunk, block) in memory.chunks(pages * PAGE_WORDS).enumerate() {
            for (word, at) in block.iter().zip(chunk * pages * PAGE_WORDS..) {
                if *word != pattern(seed, at) {
                    console_line!("memory: pass {pass}, wrong at {:p}", word);
                    return Ok(1);
                }
            }
            steps.step();
        }
        if tells {
            console_line!(
                "memory: pass {pass}, longest step {} us",
                steps.longest_us()
            );
        }
    }
    console_line!("memory: {passes} passes");
    Ok(0)
}

/// The time at exits, and the longest from one to the next.
struct Steps {
    now: GuestTime,
    longest: u64,
}

impl Steps {
    fn begin() -> Self {
        Self {
            now: clock(),
            longest: 0,
        }
    }

    fn step(&mut self) {
        let now = clock();
        self.longest = self.longest.max(now.0 - self.now.0);
        self.now = now;
    }

    /// The longest since this was last asked, in microseconds.
    fn longest_us(&mut self) -> u64 {
        core::mem::take(&mut self.longest) / 1000
    }
}

/// Every word differs from its neighbours and from the other passes.
fn pattern(seed: u64, at: usize) -> u64 {
    let value = (seed ^ at as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
    value ^ value >> 33
}

/// The largest block that the heap has.
fn all_memory(ram_bytes: usize) -> Vec<u64> {
    let fits = |words: usize| {
        let mut memory = Vec::<u64>::new();
        memory.try_reserve_exact(words).is_ok().then_some(memory)
    };
    let (mut fitting, mut too_many) = (0, ram_bytes / size_of::<u64>());
    while too_many - fitting > PAGE_WORDS {
        let middle = fitting.midpoint(too_many);
        if fits(middle).is_some() {
            fitting = middle;
        } else {
            too_many = middle;
        }
    }
    let mut memory = fits(fitting).unwrap_or_default();
    memory.resize(fitting, 0);
    memory
}
