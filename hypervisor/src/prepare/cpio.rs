//! Archives in cpio's "newc" format, read and written (Documentation/driver-api/early-userspace/buffer-format.rst).

use super::error::PrepareError;

const HEADER: usize = 110;
const TRAILER: &[u8] = b"TRAILER!!!";
/// Where fields of eight hexadecimal digits start in a header.
const MODE: usize = 14;
const SIZE: usize = 54;
const NAME_SIZE: usize = 94;
const CHECK: usize = 102;

/// Plain, and with a sum over the bytes of each file.
const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];

/// The kinds of files in a mode (stat(2)).
pub(super) const S_IFMT: u32 = 0o170_000;
pub(super) const S_IFREG: u32 = 0o100_000;

/// Whether an archive starts here.
pub(super) fn is_cpio(bytes: &[u8]) -> bool {
    MAGICS.iter().any(|magic| bytes.starts_with(magic))
}

/// One file of an archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    header: &'a [u8],
    pub(super) name: &'a [u8],
    pub(super) mode: u32,
    pub(super) bytes: &'a [u8],
}

/// An archive from its first entry to its trailer.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    /// Where the next entry is.
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next file; `None` behind the trailer.
    pub(super) fn next(&mut self) -> Result<Option<Entry<'a>>, PrepareError> {
        let at = self.at;
        let bad = |why: &str| PrepareError::archive(at, why);
        let rest = self.bytes.get(at..).unwrap_or_default();
        if !is_cpio(rest) {
            return Err(bad(if rest.is_empty() {
                "it ends without its trailer"
            } else {
                "no entry starts here"
            }));
        }
        let header = rest
            .get(..HEADER)
            .ok_or_else(|| bad("it is cut off in an entry's header"))?;
        let number = |from: usize| {
            std::str::from_utf8(&header[from..from + 8])
                .ok()
                .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .and_then(|digits| u32::from_str_radix(digits, 16).ok())
                .ok_or_else(|| bad("an entry's header has a field that is no number"))
        };
        let (mode, size, name_size) = (
            number(MODE)?,
            number(SIZE)? as usize,
            number(NAME_SIZE)? as usize,
        );
        let name = rest
            .get(HEADER..HEADER + name_size)
            .ok_or_else(|| bad("it is cut off in an entry's name"))?;
        let Some((0, name)) = name.split_last() else {
            return Err(bad("an entry's name has no end"));
        };
        let from = (HEADER + name_size).next_multiple_of(4);
        let bytes = rest
            .get(from..from + size)
            .ok_or_else(|| bad("it is cut off in a file"))?;
        self.at = at + (from + size).next_multiple_of(4);
        Ok((name != TRAILER).then_some(Entry {
            header,
            name,
            mode,
            bytes,
        }))
    }
}

/// An archive being written.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

/// What a new entry says of a file besides its name and contents.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    pub(super) mode: u32,
    pub(super) owner: u32,
    pub(super) group: u32,
    /// Major and minor number of a device node.
    pub(super) device: (u32, u32),
}

impl Writer {
    /// An entry as it was read, with these bytes for its own.
    pub(super) fn copy(&mut self, entry: &Entry<'_>, bytes: &[u8]) -> Result<(), PrepareError> {
        let size = u32::try_from(bytes.len())
            .map_err(|_| PrepareError::archive(self.bytes.len(), "a file of 4 GiB"))?;
        let mut header = entry.header.to_vec();
        if bytes != entry.bytes {
            header[SIZE..SIZE + 8].copy_from_slice(format!("{size:08X}").as_bytes());
            if header.starts_with(MAGICS[1]) {
                let sum = bytes
                    .iter()
                    .fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
                header[CHECK..CHECK + 8].copy_from_slice(format!("{sum:08X}").as_bytes());
            }
        }
        self.put(&header, entry.name, bytes);
        Ok(())
    }

    /// A new entry. Its time is none, so that equal files make equal archives.
    pub(super) fn add(&mut self, name: &[u8], facts: Facts, bytes: &[u8]) {
        let size = bytes.len() as u32;
        let links = 1;
        let inode = 0;
        let fields = [
            inode,
            facts.mode,
            facts.owner,
            facts.group,
            links,
            0,
            size,
            0,
            0,
            facts.device.0,
            facts.device.1,
            name.len() as u32 + 1,
            0,
        ];
        let header = fields.iter().fold(String::from("070701"), |header, field| {
            header + &format!("{field:08X}")
        });
        self.put(header.as_bytes(), name, bytes);
    }

    /// The trailer, after which another archive may start.
    pub(super) fn end(&mut self) {
        self.add(TRAILER, Facts::default(), b"");
    }

    /// Bytes so far.
    pub(super) fn length(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn put(&mut self, header: &[u8], name: &[u8], bytes: &[u8]) {
        // Every part before this one has a length that is a multiple of 4.
        for part in [&[header, name, b"\0"].concat(), bytes] {
            self.bytes.extend(part);
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
    }
}
