//! A guest that answers at its console, for whoever types there: a terminal with a few words.
//!
//! It echoes what is typed and, at the end of a line, does what that says: `off`, `off N` (a status), `reset` (by the ACPI register), `kbc`
//! (by the keyboard controller), `say N` (so many numbered lines), `time`, `number N` (keeps a number, which `number` says again), `spin`
//! (computes for ever); anything else it says again.
//!
//! At its start it says `console: start`, and looks at its memory: an image that was loaded anew, and all else zero. Whatever it finds else
//! it names, and ends with status 1.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_runtime::{Boot, Outcome, console_line, platform, port};

guest_runtime::entry!(main);

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const RECEIVED: u8 = 1;
const RESET: u16 = 0xcf9;
const KEYBOARD: u16 = 0x64;

/// In the image: a start that finds another value has not loaded it.
static LOADED: AtomicU64 = AtomicU64::new(0x5eed);

/// The longest line that is kept.
const LINE: usize = 200;

/// Bytes from one look at memory to the next.
const STRIDE: usize = 64 << 10;

fn main(boot: &'static Boot) -> Outcome {
    let loaded = LOADED.swap(0xdead, Ordering::Relaxed);
    if loaded != 0x5eed {
        console_line!("console: the image holds {loaded:#x}");
        return Ok(1);
    }
    // The upper half of memory: the heap's, which has nothing there yet.
    let mut traces: Vec<*mut u64> = Vec::new();
    for at in (boot.ram_bytes / 2..boot.ram_bytes - STRIDE).step_by(STRIDE) {
        traces.push((at + 8 * (at / STRIDE % 500)) as *mut u64);
    }
    for &place in &traces {
        // SAFETY: it lies in RAM that is mapped; the heap fills from below and has not come so far.
        let found = unsafe { place.read_volatile() };
        if found != 0 {
            console_line!("console: memory holds {found:#x} at {place:?}");
            return Ok(1);
        }
        // SAFETY: as above; nothing else uses it.
        unsafe { place.write_volatile(0xfeed_f00d) };
    }
    console_line!("console: start");
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        while port::read_u8(LINE_STATUS) & RECEIVED != 0 {
            match port::read_u8(DATA) {
                b'\r' | b'\n' => {
                    console_line!("");
                    if let Some(status) = obey(&line, &mut number) {
                        return Ok(status);
                    }
                    line.clear();
                }
                byte => {
                    port::write_u8(DATA, byte);
                    if line.len() < LINE {
                        line.push(byte);
                    }
                }
            }
        }
        platform::halt();
    }
}

/// Does what a line says; the status if that is to turn off.
fn obey(line: &[u8], number: &mut u64) -> Option<u8> {
    let text = core::str::from_utf8(line).unwrap_or("?");
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let value = rest.parse::<u64>().ok();
    match (word, value) {
        ("off", value) => return Some(value.unwrap_or(0) as u8),
        ("reset", _) => port::write_u8(RESET, 6),
        ("kbc", _) => port::write_u8(KEYBOARD, 0xfe),
        ("say", Some(count)) => (1..=count).for_each(|number| console_line!("line {number}")),
        ("time", _) => console_line!("time {}", platform::clock().0),
        ("number", Some(value)) => *number = value,
        ("number", None) => console_line!("number {number}"),
        ("spin", _) => loop {
            core::hint::spin_loop();
        },
        ("", _) => {}
        _ => console_line!("heard: {text}"),
    }
    None
}
