//! A program at a terminal: a pseudo-terminal of its own, whose keys are pressed and whose screen is read here.
//!
//! Unsafe code lives here for `openpty(3)`, for the terminal's settings, and for making it the child's own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rdma_log::locks::lock;

use super::program;

/// `doppel` at a terminal.
#[derive(Debug)]
pub struct AtTerminal {
    keys: File,
    /// Held open, so that its settings can be read when nobody else has it.
    terminal: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
    child: Child,
}

/// What a terminal does with keys and with what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    local: libc::tcflag_t,
    input: libc::tcflag_t,
    output: libc::tcflag_t,
}

impl Settings {
    /// Whether keys go to the program as they are pressed, none of them echoed, and none a signal.
    #[must_use]
    pub fn are_raw(&self) -> bool {
        self.local & (libc::ICANON | libc::ECHO | libc::ISIG) == 0 && self.input & libc::ICRNL == 0
    }
}

fn failed(what: &str) -> anyhow::Error {
    anyhow::Error::new(std::io::Error::last_os_error()).context(what.to_owned())
}

impl AtTerminal {
    /// Starts `doppel` with these arguments in `directory`.
    ///
    /// # Errors
    /// If the kernel gives no terminal, or it cannot be started.
    pub fn start(directory: &Path, arguments: &[&str]) -> Result<Self> {
        let (mut ours, mut theirs) = (-1, -1);
        // SAFETY: the kernel writes two descriptors into the local variables; no name, settings or size are passed.
        let made = unsafe {
            libc::openpty(
                &raw mut ours,
                &raw mut theirs,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        ensure!(made == 0, failed("make a terminal"));
        // SAFETY: both were just given to us, and nobody else owns them.
        let (ours, terminal) =
            unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        let theirs = || terminal.try_clone().map(Stdio::from).context("share it");
        let mut command = Command::new(program::doppel()?);
        command
            .args(arguments)
            .current_dir(directory)
            .stdin(theirs()?)
            .stdout(theirs()?)
            .stderr(theirs()?);
        // SAFETY: neither call touches memory; both are safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().context("start doppel")?;
        let keys = File::from(ours);
        let mut screen_of = keys.try_clone().context("share it")?;
        let screen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = screen_of.read(&mut bytes) {
                if count == 0 {
                    return;
                }
                lock(&shown).extend_from_slice(&bytes[..count]);
            }
        });
        Ok(Self {
            keys,
            terminal,
            screen,
            child,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The terminal's settings now.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn settings(&self) -> Result<Settings> {
        // SAFETY: a termios is plain data for which all zeroes is a value.
        let mut now: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one termios into the local variable.
        let got = unsafe { libc::tcgetattr(self.terminal.as_raw_fd(), &raw mut now) };
        ensure!(got == 0, failed("read a terminal's settings"));
        Ok(Settings {
            local: now.c_lflag,
            input: now.c_iflag,
            output: now.c_oflag,
        })
    }

    /// Presses these keys.
    ///
    /// # Errors
    /// If nobody has the terminal.
    pub fn press(&mut self, keys: &[u8]) -> Result<()> {
        self.keys.write_all(keys).context("press keys")
    }

    /// All that was ever on the screen.
    #[must_use]
    pub fn screen(&self) -> String {
        let bytes = lock(&self.screen);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether this has been on the screen, also where a line of the program's log came in between.
    #[must_use]
    pub fn has_shown(&self, word: &str) -> bool {
        let screen = self.screen();
        screen.contains(word) || without_log(&screen).contains(word)
    }

    /// Waits until this has been on the screen.
    ///
    /// # Errors
    /// If it is not in time.
    pub fn until(&mut self, word: &str, longest: Duration) -> Result<()> {
        let until = Instant::now() + longest;
        while !self.has_shown(word) {
            ensure!(
                Instant::now() < until,
                "{word:?} was not on the screen within {longest:?}: {:?}",
                self.screen()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn end(&mut self, longest: Duration) -> Result<ExitStatus> {
        let ended = program::await_end(&mut self.child, longest)?;
        ended.with_context(|| format!("it has not ended within {longest:?}: {:?}", self.screen()))
    }
}

/// A screen without the lines of a program's log. They come whole, each with its time first, and a guest's line is there as the guest sends it: byte by byte.
fn without_log(screen: &str) -> String {
    const TIME: &str = "\x1b[2m20";
    let mut left = screen;
    let mut rest = String::new();
    while let Some(at) = left.find(TIME) {
        rest.push_str(&left[..at]);
        left = left[at..].split_once('\n').map_or("", |(_, after)| after);
    }
    rest + left
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        // It fails only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_the_log_came_into_is_read() {
        let log = "\x1b[2m2026-11-27T17:27:33Z\x1b[0m \x1b[33m WARN\x1b[0m machine solo\r\n";
        let screen = format!("{log}c{log}{log}onsole: start\r\nconsole: up\r\n");
        assert_eq!(without_log(&screen), "console: start\r\nconsole: up\r\n");
        assert_eq!(without_log("console: start"), "console: start");
        assert_eq!(without_log(&log[..30]), "", "one that is half there");
    }
}
