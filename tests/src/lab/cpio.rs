//! An archive in cpio's "newc" format, which the kernel unpacks into its first root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Everything in it belongs to root, whoever writes it, and a device node is only a line: no root is needed.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{self, Write};

/// An archive being written.
#[derive(Debug)]
pub struct Cpio<W: Write> {
    out: W,
    written: usize,
    inode: u32,
    names: BTreeSet<String>,
}

impl<W: Write> Cpio<W> {
    /// An empty one.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
            names: BTreeSet::new(),
        }
    }

    /// Whether this path is in it.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A directory, after those above it; nothing if it is there.
    ///
    /// # Errors
    /// What the writer says.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        if name.is_empty() || self.has(name) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, 0o040_755, (0, 0), b"")
    }

    /// A file with these permissions.
    ///
    /// # Errors
    /// What the writer says.
    pub fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, 0o100_000 | (mode & 0o7777), (0, 0), bytes)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// What the writer says.
    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, 0o120_777, (0, 0), target.as_bytes())
    }

    /// A character device.
    ///
    /// # Errors
    /// What the writer says.
    pub fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, 0o020_000 | mode, (major, minor), b"")
    }

    /// Ends it.
    ///
    /// # Errors
    /// What the writer says.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), b"")?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        match name.rsplit_once('/') {
            Some((above, _)) => self.directory(above),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        let size = u32::try_from(bytes.len())
            .map_err(|_| io::Error::other(format!("{name} is too large for an archive")))?;
        self.inode += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // time: none, so that equal inputs make equal archives
            size,
            0,
            0, // the device it lies on
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // no checksum
        ];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08X}");
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(bytes)?;
        self.pad()?;
        self.names.insert(name.to_owned());
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let odd = self.written % 4;
        if odd != 0 {
            self.put(&[0; 3][..4 - odd])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_first() {
        let mut archive = Cpio::new(Vec::new());
        archive.file("a/b/c", 0o755, b"12345").expect("write");
        archive.file("a/b/d", 0o644, b"").expect("write");
        assert!(archive.has("a/b"));
        let bytes = archive.finish().expect("finish");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |what: &str| text.find(what).expect("in the archive");
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0"));
        assert_eq!(text.matches("070701").count(), 5);
        assert!(text.contains("TRAILER!!!"));
    }
}
