//! A guest that rewrites all of its free memory, verifies it, and starts over.
//!
//! Words: `passes=` how many before it powers off (default 0, endless), `pages=` pages written or verified from one
//! exit to the next (default 64). Each pass takes its pattern from a random number. Status 0 if every word was
//! found as it was written.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use guest_runtime::boot::WordError;
use guest_runtime::platform::{clock, random};
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
    let mut memory = all_memory(boot.ram_bytes);
    console_line!("memory: {} KiB", memory.len() * size_of::<u64>() / 1024);
    let mut pass = 0;
    while passes == 0 || pass < passes {
        pass += 1;
        let seed = random();
        for (chunk, block) in memory.chunks_mut(pages * PAGE_WORDS).enumerate() {
            for (word, at) in block.iter_mut().zip(chunk * pages * PAGE_WORDS..) {
                *word = pattern(seed, at);
            }
            let _ = clock();
        }
        for (chunk, block) in memory.chunks(pages * PAGE_WORDS).enumerate() {
            for (word, at) in block.iter().zip(chunk * pages * PAGE_WORDS..) {
                if *word != pattern(seed, at) {
                    console_line!("memory: pass {pass}, wrong at {:p}", word);
                    return Ok(1);
                }
            }
            let _ = clock();
        }
    }
    console_line!("memory: {passes} passes");
    Ok(0)
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
