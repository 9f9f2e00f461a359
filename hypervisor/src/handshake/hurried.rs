//! A reader with a time limit for all that is read through it.
//!
//! A socket's own limit is for each piece that arrives: a peer that sends a byte now and then could hold a message open for
//! ever. With this one it is over after the limit and at most one piece's wait.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

/// Reads until a moment.
pub(super) struct Hurried<R> {
    from: R,
    until: Instant,
}

impl<R: Read> Hurried<R> {
    /// Reads from now for this long at most.
    pub(super) fn new(from: R, longest: Duration) -> Self {
        Self {
            from,
            until: Instant::now() + longest,
        }
    }
}

impl<R: Read> Read for Hurried<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.until {
            return Err(ErrorKind::TimedOut.into());
        }
        self.from.read(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte whenever it is asked.
    struct Drip;

    impl Read for Drip {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            to[0] = 0;
            Ok(1)
        }
    }

    #[test]
    fn a_message_that_drips_is_over_in_time() {
        let started = Instant::now();
        let mut bytes = Vec::new();
        let error = Hurried::new(Drip, Duration::from_millis(20))
            .read_to_end(&mut bytes)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(!bytes.is_empty());
        assert!(started.elapsed() < Duration::from_secs(5));
        let mut four = [0; 4];
        Hurried::new(Drip, Duration::from_secs(60))
            .read_exact(&mut four)
            .unwrap();
    }
}
