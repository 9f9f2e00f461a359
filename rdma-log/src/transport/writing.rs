//! What the writing ends of transports over a network have in common: how they believe what the reader says of its counters.
#![forbid(unsafe_code)]

use crate::entry::{LINE, Lane};
use crate::lane::{Counter, WriteError};
use crate::sync::{AtomicU64, Ordering};

/// What a reader says of a counter: which, what was known of it, the most that it can be, and what it is said to be.
pub(super) type Said<'a> = (Counter, &'a AtomicU64, u64, u64);

/// Takes a lane's counters over, if none goes back, none passes its most, and what was consumed is whole lines.
#[inline]
pub(super) fn take_over(lane: Lane, said: [Said<'_>; 3]) -> Result<(), WriteError> {
    for (counter, known, most, found) in said {
        let least = known.load(Ordering::Relaxed);
        let aligned = counter != Counter::Consumed || found.is_multiple_of(LINE as u64);
        if found < least || found > most || !aligned {
            return Err(WriteError::Counter {
                lane,
                counter,
                least,
                most,
                found,
            });
        }
    }
    for (_, known, _, found) in said {
        known.store(found, Ordering::Release);
    }
    Ok(())
}
