//! A reader and writer with a time limit for all that goes through it.
//!
//! A socket's own limit is for each piece that moves: a peer that sends, or takes, a byte now and then could hold a message
//! open for ever. With this one it is over after the limit and at most one piece's wait. What is sent in bulk may take as much
//! longer as it has bytes, at a pace that any network in use keeps.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

/// Bytes a second that a peer must take at the least, after the first [`PATIENCE`](super::PATIENCE): a sixth of what a network
/// of 100 Mb/s carries. A slower one shows as a copy that is given up; it would not keep up with the log either.
pub const PACE: u64 = 2 << 20;

/// Takes in what has come on a stream that does not block, until `into` is full; `got` counts. Whether it is.
///
/// # Errors
/// If the stream is at its end, or it is past `until` and something is still missing.
pub(crate) fn gather(
    mut from: impl Read,
    into: &mut [u8],
    got: &mut usize,
    until: Instant,
) -> io::Result<bool> {
    while *got < into.len() {
        match from.read(&mut into[*got..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(more) => *got += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    return Err(ErrorKind::TimedOut.into());
                }
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Reads, or writes, until a moment.
#[derive(Debug)]
pub struct Hurried<S> {
    stream: S,
    started: Instant,
    longest: Duration,
    /// Bytes a second that must move at the least.
    pace: Option<u64>,
    bytes: u64,
    /// Time that the other side took.
    waited: Duration,
}

impl<S> Hurried<S> {
    /// From now for this long at most.
    pub fn new(stream: S, longest: Duration) -> Self {
        Self {
            stream,
            started: Instant::now(),
            longest,
            pace: None,
            bytes: 0,
            waited: Duration::ZERO,
        }
    }

    /// As long as the other side keeps nobody waiting longer than this and what has moved takes at so many bytes a second. What is
    /// done between two calls is not its time.
    pub fn paced(stream: S, longest: Duration, pace: u64) -> Self {
        Self {
            pace: Some(pace),
            ..Self::new(stream, longest)
        }
    }

    /// What it reads from or writes to.
    pub fn into_inner(self) -> S {
        self.stream
    }

    fn check(&self) -> io::Result<()> {
        let Some(pace) = self.pace else {
            if self.started.elapsed() < self.longest {
                return Ok(());
            }
            return Err(ErrorKind::TimedOut.into());
        };
        let earned = Duration::from_micros(self.bytes.saturating_mul(1_000_000) / pace);
        if self.waited < self.longest + earned {
            return Ok(());
        }
        Err(io::Error::new(
            ErrorKind::TimedOut,
            format!(
                "the other side has taken {} KiB in {:.1} s: too slow, {} KiB a second are the least",
                self.bytes >> 10,
                self.waited.as_secs_f64(),
                pace >> 10
            ),
        ))
    }

    /// Counts what a call moved, and how long it took.
    fn moved(&mut self, since: Instant, outcome: io::Result<usize>) -> io::Result<usize> {
        self.waited += since.elapsed();
        let count = outcome?;
        self.bytes += count as u64;
        Ok(count)
    }
}

impl<S: Read> Read for Hurried<S> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        let since = Instant::now();
        let outcome = self.stream.read(to);
        self.moved(since, outcome)
    }
}

impl<S: Write> Write for Hurried<S> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.check()?;
        let since = Instant::now();
        let outcome = self.stream.write(from);
        self.moved(since, outcome)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.check()?;
        let since = Instant::now();
        let outcome = self.stream.flush();
        self.moved(since, outcome.map(|()| 0)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives, and takes, a byte whenever it is asked.
    struct Drip;

    impl Read for Drip {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            to[0] = 0;
            Ok(1)
        }
    }

    impl Write for Drip {
        fn write(&mut self, _from: &[u8]) -> io::Result<usize> {
            Ok(1)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
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

    #[test]
    fn a_peer_that_takes_too_little_is_given_up_and_one_that_keeps_the_pace_is_not() {
        /// Takes a byte a millisecond.
        struct Slow;

        impl Write for Slow {
            fn write(&mut self, _from: &[u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_millis(1));
                Ok(1)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let bytes = [0; 200];
        // A hundred times faster than it is: over after the grace and little more.
        let started = Instant::now();
        let error = Hurried::paced(Slow, Duration::from_millis(20), 100_000)
            .write_all(&bytes)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("too slow"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
        // A pace of one byte a second is kept by whatever machine this is.
        Hurried::paced(Slow, Duration::from_millis(20), 1)
            .write_all(&bytes)
            .unwrap();
    }
}
