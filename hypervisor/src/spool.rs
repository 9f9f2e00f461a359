//! What the guest's console has let out of late, for those who look at it (`doppel console`).
//!
//! ```text
//!   … │ overwritten │ kept: the last 64 KiB │ being written │ …      positions: bytes since the guest's first
//!     └─────────────┴───────────────────────┴───────────────┘
//!                   ▲ claimed - SIZE        ▲ head          ▲ claimed
//! ```
//! One thread at a time feeds it: on a primary whoever lets outputs out, on a backup the one that learns that they have left. Any number
//! of readers copy from it. Nobody ever waits for anybody: a reader that is too slow finds its bytes overwritten, and is told so.
//!
//! Positions are those of the guest's own count (`devices/serial.rs`), so both sides give the same byte the same one, and whoever looks on
//! at a survivor goes on with the very byte at which the other side died.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use crate::backends::wait::Wake;

/// Bytes that are kept: some 800 lines, which a person scrolls through, and what a reader may be behind.
pub const SIZE: usize = 64 << 10;

/// The ring.
#[derive(Debug)]
pub struct Spool {
    bytes: Box<[AtomicU8]>,
    /// The first byte that was ever here.
    begun: AtomicU64,
    /// Up to here bytes are, or are being, overwritten.
    claimed: AtomicU64,
    /// Up to here they can be read.
    head: AtomicU64,
    /// A reader waits for more.
    wanted: AtomicBool,
    wake: Wake,
}

/// A reader's bytes are no more: this is the oldest that can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overwritten(pub u64);

impl Spool {
    /// An empty one, of a guest that has printed nothing.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            bytes: (0..SIZE).map(|_| AtomicU8::new(0)).collect(),
            begun: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            head: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
            wake: Wake::new()?,
        })
    }

    /// The guest has printed so much before it came here. By the thread that feeds, before it does.
    pub fn begin_at(&self, position: u64) {
        for mark in [&self.claimed, &self.begun, &self.head] {
            mark.store(position, Ordering::Release);
        }
    }

    /// Adds what has left. By one thread at a time.
    pub fn feed(&self, bytes: &[u8]) {
        let from = self.head.load(Ordering::Relaxed);
        let to = from + bytes.len() as u64;
        // Said before any byte changes, so that a reader that copied one of them finds out.
        self.claimed.store(to, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let kept = bytes.len().saturating_sub(SIZE);
        for (at, byte) in (from..).zip(bytes).skip(kept) {
            self.place(at).store(*byte, Ordering::Relaxed);
        }
        self.head.store(to, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.wanted.load(Ordering::Relaxed) && self.wanted.swap(false, Ordering::Relaxed) {
            self.wake.ring();
        }
    }

    fn place(&self, position: u64) -> &AtomicU8 {
        &self.bytes[(position % SIZE as u64) as usize]
    }

    /// Up to where there is something to read.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    /// The oldest byte that can be had.
    #[must_use]
    pub fn oldest(&self) -> u64 {
        let begun = self.begun.load(Ordering::Acquire);
        let claimed = self.claimed.load(Ordering::Relaxed);
        begun.max(claimed.saturating_sub(SIZE as u64))
    }

    /// Copies what there is from this position on, as much as fits; how much.
    ///
    /// # Errors
    /// [`Overwritten`], also if that happened meanwhile.
    pub fn copy(&self, from: u64, to: &mut [u8]) -> Result<usize, Overwritten> {
        let head = self.head();
        let count = head.saturating_sub(from).min(to.len() as u64) as usize;
        for (at, byte) in (from..).zip(&mut to[..count]) {
            *byte = self.place(at).load(Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        let oldest = self.oldest();
        if from < oldest {
            return Err(Overwritten(oldest));
        }
        Ok(count)
    }

    /// From now on the next byte rings [`Spool::wake`], once.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// What is rung.
    #[must_use]
    pub fn wake(&self) -> &Wake {
        &self.wake
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_fed_is_read_and_what_is_too_old_is_missed_by_number() {
        let spool = Spool::new().unwrap();
        spool.begin_at(1000);
        spool.feed(b"hello");
        let mut bytes = [0; 16];
        assert_eq!(spool.copy(1000, &mut bytes), Ok(5));
        assert_eq!(&bytes[..5], b"hello");
        assert_eq!(spool.copy(1003, &mut bytes[..1]), Ok(1));
        assert_eq!(bytes[0], b'l');
        assert_eq!(spool.copy(999, &mut bytes), Err(Overwritten(1000)));
        // A reader that is ahead (it looked at the side that died) waits until that has come.
        assert_eq!(spool.copy(1009, &mut bytes), Ok(0));
        spool.feed(&vec![b'x'; SIZE + 3]);
        assert_eq!(spool.copy(1000, &mut bytes), Err(Overwritten(1008)));
        assert_eq!(spool.copy(1008, &mut bytes), Ok(16));
        assert_eq!((spool.oldest(), spool.head()), (1008, 1008 + SIZE as u64));
    }

    #[test]
    fn a_reader_never_takes_a_byte_for_another() {
        let spool = Spool::new().unwrap();
        const TOTAL: u64 = 3_000_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut at = 0;
                while at < TOTAL {
                    let piece: Vec<u8> = (at..at + 701).map(|at| (at % 251) as u8).collect();
                    spool.feed(&piece);
                    at += 701;
                }
            });
            let (mut at, mut bytes, mut read) = (0, [0; 5000], 0);
            while at < TOTAL {
                match spool.copy(at, &mut bytes) {
                    Ok(0) => std::thread::yield_now(),
                    Ok(count) => {
                        let good = (at..)
                            .zip(&bytes[..count])
                            .all(|(at, &byte)| byte == (at % 251) as u8);
                        assert!(good, "a byte of another lap near {at}");
                        (at, read) = (at + count as u64, read + count);
                    }
                    Err(Overwritten(oldest)) => at = oldest,
                }
            }
            assert!(read > 0);
        });
    }

    #[test]
    fn whoever_wants_more_is_rung_once() {
        let spool = Spool::new().unwrap();
        let rung = || {
            let mut waiter = crate::backends::wait::Waiter::new();
            waiter.add(spool.wake(), true, false);
            waiter.wait(Some(std::time::Duration::ZERO)).unwrap() == 1
        };
        spool.feed(b"a");
        assert!(!rung());
        spool.want();
        spool.feed(b"b");
        assert!(rung());
        spool.wake().clear();
        spool.feed(b"c");
        assert!(!rung());
    }
}
