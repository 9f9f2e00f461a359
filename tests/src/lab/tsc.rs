//! The frequency of this machine's time-stamp counter, which is that of the hosts' too.
//!
//! A kernel that boots measures it for a few milliseconds against an emulated timer. Where the machine is busy meanwhile the
//! measurement is wrong, once by a factor of ten, and then so is every time in that host; so it is told instead.
//!
//! Unsafe code lives here for the one instruction that reads the counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long is measured: both readings are good to a microsecond, so this is good to some ten in a million.
const SPAN: Duration = Duration::from_millis(100);

/// Readings of which the best is taken: one during which the thread lost its CPU is far off.
const READINGS: u32 = 50;

/// In kHz; measured once.
#[must_use]
pub fn frequency() -> u64 {
    static MEASURED: OnceLock<u64> = OnceLock::new();
    *MEASURED.get_or_init(measure)
}

fn measure() -> u64 {
    let (began, first) = reading();
    std::thread::sleep(SPAN);
    let (ended, last) = reading();
    let micros = (ended - began).as_micros().max(1);
    (u128::from(last.wrapping_sub(first)) * 1000 / micros) as u64
}

/// The counter, and the time at which it stood so.
fn reading() -> (Instant, u64) {
    let one = || {
        let before = Instant::now();
        let counter = counter();
        let took = before.elapsed();
        (took, before + took / 2, counter)
    };
    let best = (0..READINGS).map(|_| one()).min_by_key(|reading| reading.0);
    let (_, at, counter) = best.unwrap_or_else(one);
    (at, counter)
}

fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets every program use it; it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_measures_the_same_twice() {
        let (one, other) = (measure(), measure());
        assert!(one.abs_diff(other) * 1000 < one, "{one} and {other} kHz");
        assert!((100_000..20_000_000).contains(&one), "{one} kHz");
    }
}
