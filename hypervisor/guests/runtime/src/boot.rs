//! What the guest is told at start: boot information and command line (`docs/guest-abi.md`, "Loading").

use core::fmt;

/// Where the boot information lies.
pub const ADDRESS: usize = 0x1000;

const MAGIC: u64 = u64::from_le_bytes(*b"DOPAB1\0\0");

/// The boot information as the loader lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootInformation {
    magic: u64,
    ram_bytes: u64,
    command_line: u64,
    command_line_bytes: u64,
    image_end: u64,
    wall_clock: u64,
}

const _: () = assert!(size_of::<BootInformation>() == 48);

/// What the guest was told at start.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// RAM, in bytes from address 0.
    pub ram_bytes: usize,
    /// First byte after the image, at a page's start: free memory begins here.
    pub image_end: usize,
    /// Unix time in nanoseconds at which the guest clock read 0.
    pub wall_clock: u64,
    /// The command line.
    pub command_line: CommandLine<'static>,
}

impl Boot {
    /// Reads the boot information, or `None` if it is not that of ABI version 1.
    ///
    /// # Safety
    /// `information` must be what the loader passed in RDI, and memory must be as the ABI describes.
    #[must_use]
    pub unsafe fn read(information: *const BootInformation) -> Option<Self> {
        // SAFETY: the caller vouches for the pointer; the page is RAM that nobody writes any more.
        let information = unsafe { information.read() };
        if information.magic != MAGIC {
            return None;
        }
        // SAFETY: the loader put so many bytes there, and nobody writes them any more.
        let text = unsafe {
            core::slice::from_raw_parts(
                information.command_line as *const u8,
                information.command_line_bytes as usize,
            )
        };
        Some(Self {
            ram_bytes: information.ram_bytes as usize,
            image_end: information.image_end as usize,
            wall_clock: information.wall_clock,
            command_line: CommandLine::new(core::str::from_utf8(text).ok()?),
        })
    }
}

/// The command line: words `name=value`, parted by white space. Of a name given twice the last counts.
#[derive(Clone, Copy, Debug)]
pub struct CommandLine<'a>(&'a str);

/// A word of the command line has a value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordError {
    name: &'static str,
    wanted: &'static str,
}

impl WordError {
    /// `name` was given, but its value is not `wanted`.
    #[must_use]
    pub const fn new(name: &'static str, wanted: &'static str) -> Self {
        Self { name, wanted }
    }
}

impl fmt::Display for WordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}= wants {}", self.name, self.wanted)
    }
}

impl core::error::Error for WordError {}

impl<'a> CommandLine<'a> {
    /// The command line with this text.
    #[must_use]
    pub const fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The value of the word `name`.
    #[must_use]
    pub fn word(&self, name: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .rfind(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// The word `name` as a number; `k`, `m` and `g` (of either case) multiply by 2^10, 2^20, 2^30.
    ///
    /// # Errors
    /// The value is no number, or too large.
    pub fn number(&self, name: &'static str) -> Result<Option<u64>, WordError> {
        let Some(value) = self.word(name) else {
            return Ok(None);
        };
        let (digits, shift) = match value.as_bytes().last().map(u8::to_ascii_lowercase) {
            Some(b'k') => (&value[..value.len() - 1], 10),
            Some(b'm') => (&value[..value.len() - 1], 20),
            Some(b'g') => (&value[..value.len() - 1], 30),
            _ => (value, 0),
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Some)
            .ok_or(WordError::new(name, "a number"))
    }

    /// The word `name` as a number, or `default` if it is not given.
    ///
    /// # Errors
    /// The value is no number, or too large.
    pub fn number_or(&self, name: &'static str, default: u64) -> Result<u64, WordError> {
        Ok(self.number(name)?.unwrap_or(default))
    }

    /// The word `name` as an IPv4 address with the length of its prefix, `A.B.C.D/N`.
    ///
    /// # Errors
    /// The value has another form.
    pub fn network(&self, name: &'static str) -> Result<Option<([u8; 4], u8)>, WordError> {
        let parse = |value: &str| {
            let (address, prefix) = value.split_once('/')?;
            let prefix: u8 = prefix.parse().ok()?;
            Some((address_v4(address)?, prefix)).filter(|_| prefix <= 32)
        };
        match self.word(name) {
            None => Ok(None),
            Some(value) => parse(value)
                .map(Some)
                .ok_or(WordError::new(name, "A.B.C.D/N")),
        }
    }

    /// The word `name` as an IPv4 address, `A.B.C.D`.
    ///
    /// # Errors
    /// The value has another form.
    pub fn address(&self, name: &'static str) -> Result<Option<[u8; 4]>, WordError> {
        match self.word(name) {
            None => Ok(None),
            Some(value) => address_v4(value)
                .map(Some)
                .ok_or(WordError::new(name, "A.B.C.D")),
        }
    }
}

fn address_v4(text: &str) -> Option<[u8; 4]> {
    text.parse::<core::net::Ipv4Addr>()
        .ok()
        .map(|address| address.octets())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_two_words_counts_and_names_match_whole() {
        let line = CommandLine::new("  hz=10 xhz=3 flag hz=20\thzx=4 ");
        assert_eq!(line.word("hz"), Some("20"));
        assert_eq!(line.word("flag"), None);
        assert_eq!(line.word("z"), None);
    }

    #[test]
    fn numbers_have_suffixes_and_limits() {
        let line = CommandLine::new("a=7 b=4k c=3M d=1g e=x f= g=k h=17179869184g i=-1");
        assert_eq!(line.number("a"), Ok(Some(7)));
        assert_eq!(line.number("b"), Ok(Some(4096)));
        assert_eq!(line.number("c"), Ok(Some(3 << 20)));
        assert_eq!(line.number("d"), Ok(Some(1 << 30)));
        assert_eq!(line.number("none"), Ok(None));
        assert_eq!(line.number_or("none", 5), Ok(5));
        for name in ["e", "f", "g", "h", "i"] {
            assert_eq!(line.number(name), Err(WordError::new(name, "a number")));
        }
    }

    #[test]
    fn addresses_are_checked() {
        let line = CommandLine::new("ip=10.0.0.2/24 gw=10.0.0.1 p=1.2.3.4/33 q=1.2.3/8 r=1.2.3.4");
        assert_eq!(line.network("ip"), Ok(Some(([10, 0, 0, 2], 24))));
        assert_eq!(line.address("gw"), Ok(Some([10, 0, 0, 1])));
        assert_eq!(line.network("none"), Ok(None));
        for name in ["p", "q", "r"] {
            assert_eq!(line.network(name), Err(WordError::new(name, "A.B.C.D/N")));
        }
        assert!(line.address("ip").is_err());
    }

    #[test]
    fn boot_information_of_another_version_is_refused() {
        let text = "ip=1.2.3.4/8";
        let mut information = BootInformation {
            magic: MAGIC,
            ram_bytes: 64 << 20,
            command_line: text.as_ptr() as u64,
            command_line_bytes: text.len() as u64,
            image_end: 0x20_0000,
            wall_clock: 12,
        };
        // SAFETY: the structure and the text are alive.
        let boot = unsafe { Boot::read(&raw const information) }.expect("version 1");
        assert_eq!(
            (boot.ram_bytes, boot.image_end, boot.wall_clock),
            (64 << 20, 0x20_0000, 12)
        );
        assert_eq!(boot.command_line.word("ip"), Some("1.2.3.4/8"));
        information.magic += 1;
        // SAFETY: as above.
        assert!(unsafe { Boot::read(&raw const information) }.is_none());
    }
}
