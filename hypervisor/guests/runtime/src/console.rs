//! The console: a 16550 that takes every byte at once. Each byte is an exit and an output: keep lines short.

use crate::port;
use core::fmt;

const DATA_PORT: u16 = 0x3f8;

/// Writes text to the console.
#[derive(Clone, Copy, Debug, Default)]
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port::write_u8(DATA_PORT, byte);
        }
        Ok(())
    }
}

/// Prints a line on the console, formatted as by `format!`.
#[macro_export]
macro_rules! console_line {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // The console takes everything; only a formatter of the caller's could fail.
        let _ = writeln!($crate::console::Console, $($argument)*);
    }};
}
