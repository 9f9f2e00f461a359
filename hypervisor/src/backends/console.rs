//! The guest's console on the host's side: released bytes out, typed bytes in.
//!
//! Unsafe code lives here for the terminal's settings, which the standard library cannot change.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Stdin, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::outflow::{Outflow, Standard, Trouble, is_file};
use super::wait::Waiter;

/// Why the console cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file for the console's output cannot be opened.
    #[error("cannot open {} for the guest's console: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The terminal refuses its settings.
    #[error("cannot {what} the terminal's settings: {source}")]
    Terminal {
        /// `read` or `change`.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Where the guest's console bytes go.
#[derive(Debug)]
pub enum ConsoleOutput {
    /// Nowhere.
    Discard,
    /// To this process's standard output.
    Stdout,
    /// To a file.
    File(File),
    /// To a pipe, a terminal, or what else the file is.
    Flow(Outflow),
}

impl ConsoleOutput {
    /// Appends to the file, which is made if there is none. Two processes may share it: each write is one
    /// append. What is no regular file has a thread of its own, which begins with `confine`: nobody waits for whoever reads it.
    pub fn file(
        path: &Path,
        confine: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ConsoleError> {
        let open = || {
            // A named pipe that nobody has opened to read yet is opened all the same, if it is for both.
            let is_pipe = std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
            let file = OpenOptions::new()
                .read(is_pipe)
                .append(true)
                .create(true)
                .open(path)?;
            if is_file(&file)? {
                return Ok(Self::File(file));
            }
            Outflow::start(file, confine, |trouble| match trouble {
                Trouble::Lost(lost) => tracing::warn!(
                    "nobody has read the guest's console for a while: {} bytes of it are lost there; doppel console has the last",
                    lost.bytes
                ),
                Trouble::Failed(error) => {
                    tracing::warn!("the guest's console cannot be written: {error}");
                }
            })
            .map(Self::Flow)
        };
        open().map_err(|source| ConsoleError::Open {
            path: path.to_owned(),
            source,
        })
    }

    /// Writes all the bytes, or leaves them to be written where that could take long.
    ///
    /// # Errors
    /// What the kernel says of a file; some of the bytes may then have gone out.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Discard => Ok(()),
            Self::Stdout => Standard::Output.say(bytes),
            Self::File(file) => file.write_all(bytes),
            Self::Flow(flow) => {
                flow.leave(bytes);
                Ok(())
            }
        }
    }
}

/// Standard input, byte by byte as it is typed. A terminal is set to neither gather lines, nor echo, nor make signals of keys; its
/// settings come back when this is dropped, also by a panic. What is printed is treated as before: a guest that ends its lines by a line
/// feed alone is readable.
#[derive(Debug)]
pub struct RawInput {
    stdin: Stdin,
    saved: Option<libc::termios>,
}

impl RawInput {
    /// Takes standard input.
    pub fn open() -> Result<Self, ConsoleError> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { stdin, saved: None });
        }
        let failed = |what| ConsoleError::Terminal {
            what,
            source: io::Error::last_os_error(),
        };
        // SAFETY: a termios is plain data for which all zeroes is a value.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one termios into the local variable.
        if unsafe { libc::tcgetattr(stdin.as_raw_fd(), &mut saved) } < 0 {
            return Err(failed("read"));
        }
        let mut raw = saved;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN);
        raw.c_iflag &= !(libc::ICRNL | libc::INLCR | libc::IGNCR | libc::IXON | libc::ISTRIP);
        // SAFETY: the kernel reads one termios.
        if unsafe { libc::tcsetattr(stdin.as_raw_fd(), libc::TCSANOW, &raw) } < 0 {
            return Err(failed("change"));
        }
        Ok(Self {
            stdin,
            saved: Some(saved),
        })
    }

    /// Whether it is a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.saved.is_some()
    }

    /// Reads what has been typed: `None` if nothing yet, 0 at the end of input. Never blocks.
    ///
    /// Non-blocking mode would be shared with the shell that started us, hence the look beforehand.
    pub fn read_into(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut waiter = Waiter::new();
        waiter.add(&self.stdin, true, false);
        if waiter.wait(Some(Duration::ZERO))? == 0 {
            return Ok(None);
        }
        // A handle of our own, past the standard library's buffer: that would hide bytes from the look.
        let mut file = File::from(self.stdin.as_fd().try_clone_to_owned()?);
        match file.read(buffer) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for RawInput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stdin.as_fd()
    }
}

impl Drop for RawInput {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // SAFETY: the kernel reads one termios. A failure leaves nothing to be done.
            unsafe { libc::tcsetattr(self.stdin.as_raw_fd(), libc::TCSANOW, saved) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_writers_share_a_console_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut one = ConsoleOutput::file(&path, || {}).unwrap();
        let mut other = ConsoleOutput::file(&path, || {}).unwrap();
        one.write(b"primary\n").unwrap();
        other.write(b"backup\n").unwrap();
        one.write(b"primary again\n").unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "primary\nbackup\nprimary again\n"
        );
    }

    /// A reader that comes later, or never, keeps nobody.
    #[test]
    fn a_named_pipe_is_written_whether_anybody_reads_it_or_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let mut console = ConsoleOutput::file(&path, || {}).unwrap();
        let line = [b'x'; 1024];
        for _ in 0..4096 {
            console.write(&line).unwrap();
        }
        let mut reader = File::open(&path).unwrap();
        drop(console);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() >= crate::backends::outflow::MOST && bytes.len() < 4 << 20);
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named() {
        let error = ConsoleOutput::file(Path::new("/nonexistent/console.log"), || {}).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/console.log"));
    }
}
