//! A guest that does to its devices what no driver should, and checks that it lives.
//!
//! Words: `seed=` where its choices come from (default 1), `rounds=` attacks before it powers off (default 0, endless),
//! `only=` one kind of attack by its number, `end=` how it ends after them: `well` (default), `crash` (it has a device
//! write over its own code).
//!
//! What a device writes goes into an arena that nothing else lies in, so the guest itself stays whole: every harm that is
//! done is done outside of it.
#![no_std]
#![no_main]

extern crate alloc;

mod attack;
mod machine;

use attack::{Attacker, KINDS};
use guest_runtime::boot::WordError;
use guest_runtime::{Boot, Outcome, console_line, interrupts};

guest_runtime::entry!(main);

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let seed = words.number_or("seed", 1)?;
    let rounds = words.number_or("rounds", 0)?;
    let only = words.number("only")?;
    if only.is_some_and(|kind| kind >= KINDS) {
        return Err(WordError::new("only", "the number of a kind of attack").into());
    }
    // All lines but the cascade: a device that was made to interrupt interrupts.
    interrupts::open(0xffff);
    let mut attacker = Attacker::new(seed, boot.ram_bytes);
    console_line!("hostile: seed {seed}");
    let mut round = 0;
    while rounds == 0 || round < rounds {
        round += 1;
        attacker.attack(only);
        if round % 100 == 0 {
            attacker.settle();
            console_line!("hostile: {round}");
        }
    }
    attacker.settle();
    console_line!("hostile: done, {rounds} rounds");
    if words.word("end") == Some("crash") {
        attacker.overwrite_itself(main as *const () as usize);
    }
    Ok(0)
}
