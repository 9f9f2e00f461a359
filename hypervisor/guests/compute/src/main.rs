//! A guest that computes for long stretches without an exit: integers, floats, memory.
//!
//! Words: `rounds=` rounds between two reports (default 200, a good part of a second on a CPU of today), `reports=` how
//! many before it powers off (default 0, endless), `seed=` (default 1). Each report prints a checksum, which depends
//! on these words alone. With `hz=` the timer interrupts so many times a second, and each report says how many interrupts
//! have come. Status 0 if every identity held that it checks itself by.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use guest_runtime::{Boot, Outcome, console_line, interrupts, timer};

guest_runtime::entry!(main);

const CHAIN_LINKS: u32 = 200_000;
const SIEVE: usize = 1 << 18;
/// Primes below 2^18.
const PRIMES: usize = 23_000;
/// The prime 2^61 - 1, by which Fermat's little theorem is checked.
const MERSENNE_61: u64 = (1 << 61) - 1;
const TURNS: u32 = 36_000;

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let rounds = words.number_or("rounds", 200)?;
    let reports = words.number_or("reports", 0)?;
    let mut checksum = words.number_or("seed", 1)?;
    let hz = words.number_or("hz", 0)? as u32;
    let mut sieve = vec![false; SIEVE];
    let mut well = true;
    console_line!("compute: {rounds} rounds a report");
    if hz > 0 {
        interrupts::open(1 << timer::LINE);
        timer::start(hz);
    }
    let mut report = 0;
    while reports == 0 || report < reports {
        report += 1;
        for _ in 0..rounds {
            checksum = chain(checksum);
            well &= fermat(checksum);
            let (primes, mixed) = primes(&mut sieve, checksum);
            well &= primes == PRIMES;
            let (closed, bits) = turn_around();
            well &= closed;
            checksum ^= mixed.wrapping_add(bits);
        }
        let verdict = if well { "" } else { " WRONG" };
        if hz > 0 {
            let ticks = interrupts::count(timer::LINE);
            console_line!("compute {report} {checksum:016x}{verdict}, {ticks} ticks");
        } else {
            console_line!("compute {report} {checksum:016x}{verdict}");
        }
    }
    Ok(u8::from(!well))
}

/// A hash chain: nothing in it can be skipped or reordered.
fn chain(mut value: u64) -> u64 {
    for _ in 0..CHAIN_LINKS {
        value = (value ^ value >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        value = (value ^ value >> 29).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    value
}

/// a^(p-1) = 1 (mod p) for the prime p and every a that p does not divide.
fn fermat(value: u64) -> bool {
    let times = |a: u64, b: u64| (u128::from(a) * u128::from(b) % u128::from(MERSENNE_61)) as u64;
    let mut base = value % (MERSENNE_61 - 1) + 1;
    let mut exponent = MERSENNE_61 - 1;
    let mut power = 1;
    while exponent > 0 {
        if exponent & 1 == 1 {
            power = times(power, base);
        }
        base = times(base, base);
        exponent >>= 1;
    }
    power == 1
}

/// Eratosthenes' sieve: how many primes there are, and a mix of them with `key`.
fn primes(composite: &mut [bool], key: u64) -> (usize, u64) {
    composite.fill(false);
    let (mut count, mut mixed) = (0, key);
    for candidate in 2..composite.len() {
        if !composite[candidate] {
            count += 1;
            mixed = (mixed.rotate_left(7) ^ candidate as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
            let mut multiple = candidate * candidate;
            while multiple < composite.len() {
                composite[multiple] = true;
                multiple += candidate;
            }
        }
    }
    (count, mixed)
}

/// Turns a vector by one degree until it has gone round a hundred times: it must be where it was. Also gives the
/// bits of where it ended, rounding errors and all.
fn turn_around() -> (bool, u64) {
    // cos 1° and sin 1°.
    let (cosine, sine) = (0.999_847_695_156_391_2_f64, 0.017_452_406_437_283_51_f64);
    let (mut x, mut y) = (3.0_f64, 4.0_f64);
    for _ in 0..TURNS {
        (x, y) = (x * cosine - y * sine, x * sine + y * cosine);
    }
    let closed = (x - 3.0).abs() < 1e-9 && (y - 4.0).abs() < 1e-9;
    (closed, x.to_bits() ^ y.to_bits().rotate_left(32))
}
