//! A guest that lives on interrupts: it counts them, and checks that each leaves no trace but its count.
//!
//! Words: `hz=` timer interrupts a second (default 1000), `exits=` sync points before it powers off (default 0,
//! endless). Before each sync point every register, the flags, MXCSR, the SSE registers and the red zone are filled
//! from a generator; after it they must be as before. How far the counter has come is mixed into memory at every exit, so
//! an interrupt delivered one exit early or late shows. Status 0 if all was found as it was left.
#![no_std]
#![no_main]

extern crate alloc;

mod probe;

use alloc::vec;
use guest_runtime::{Boot, Outcome, console_line, interrupts, timer};
use probe::{SyncPoint, check};

guest_runtime::entry!(main);

const TABLE_WORDS: usize = 8192;

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let hz = words.number_or("hz", 1000)? as u32;
    let exits = words.number_or("exits", 0)?;
    let mut table = vec![0_u64; TABLE_WORDS];
    console_line!("irq: {hz} Hz");
    interrupts::open(1 << timer::LINE);
    timer::start(hz);
    let mut generator = 1;
    let mut exit = 0;
    while exits == 0 || exit < exits {
        let at = SyncPoint::ALL[exit as usize % SyncPoint::ALL.len()];
        exit += 1;
        if let Err(trace) = check(at, || next(&mut generator)) {
            console_line!("irq: exit {exit}, {trace}");
            return Ok(1);
        }
        let ticks = interrupts::count(timer::LINE);
        let slot = (ticks.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 51) as usize % TABLE_WORDS;
        table[slot] = table[slot].rotate_left(9) ^ (ticks << 32 | exit);
    }
    let digest = table.iter().fold(0, |digest: u64, word| {
        (digest ^ word)
            .wrapping_mul(0xff51_afd7_ed55_8ccd)
            .rotate_left(31)
    });
    console_line!(
        "irq: {exit} exits, {} ticks, {digest:016x}",
        interrupts::count(timer::LINE)
    );
    Ok(0)
}

/// xorshift64*.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}
