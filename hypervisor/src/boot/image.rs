//! Guest images: the ELF files we build in, and anyone's own.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::IMAGE_BASE;
use crate::memory::{GuestRam, MemoryError};

/// An image may be this large; the largest of ours has under 1 MiB.
const IMAGE_MAX: usize = 64 << 20;
const HEADER: usize = 64;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const PROGRAM_HEADER: usize = 56;
const PROGRAM_HEADERS_MAX: usize = 64;

const BUILT_IN: &[(&str, &[u8])] = &[
    ("kv", include_bytes!(env!("GUEST_KV"))),
    ("compute", include_bytes!(env!("GUEST_COMPUTE"))),
    ("irq", include_bytes!(env!("GUEST_IRQ"))),
    ("clock", include_bytes!(env!("GUEST_CLOCK"))),
    ("memory", include_bytes!(env!("GUEST_MEMORY"))),
    ("hostile", include_bytes!(env!("GUEST_HOSTILE"))),
    ("disk", include_bytes!(env!("GUEST_DISK"))),
    ("console", include_bytes!(env!("GUEST_CONSOLE"))),
];

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Neither a built-in name nor a readable file.
    #[error("guest {name:?}: not one of {built_in}, and not a file that can be read: {source}", built_in = built_in_names())]
    NotFound {
        /// What was asked for.
        name: String,
        /// Why the file could not be read.
        source: std::io::Error,
    },
    /// Not an ELF of the kind the ABI wants.
    #[error("guest image {name:?}: {why}; docs/guest-abi.md says what an image must be")]
    Malformed {
        /// The image's name.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Guest memory could not be written.
    #[error("guest image: {0}")]
    Memory(#[from] MemoryError),
}

/// Whether a guest of this name is part of this program.
#[must_use]
pub fn is_built_in(name: &str) -> bool {
    BUILT_IN.iter().any(|(built_in, _)| *built_in == name)
}

fn built_in_names() -> String {
    let names: Vec<_> = BUILT_IN.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

fn word16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from(word16(bytes, at)) | u32::from(word16(bytes, at + 2)) << 16
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from(word32(bytes, at)) | u64::from(word32(bytes, at + 4)) << 32
}

struct Segment {
    offset: usize,
    address: u64,
    in_file: usize,
    in_memory: u64,
}

/// A checked guest image.
pub struct Image {
    name: String,
    bytes: Vec<u8>,
    entry: u64,
    segments: Vec<Segment>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({:?}, {} bytes)", self.name, self.bytes.len())
    }
}

impl Image {
    /// Finds a built-in guest by name, or reads an ELF file.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Malformed`].
    pub fn find(name: &str) -> Result<Self, ImageError> {
        if let Some((_, bytes)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(name, bytes.to_vec());
        }
        let not_found = |source| ImageError::NotFound {
            name: name.to_owned(),
            source,
        };
        let path = PathBuf::from(name);
        let length = std::fs::metadata(&path).map_err(not_found)?.len();
        if length > IMAGE_MAX as u64 {
            return Err(ImageError::Malformed {
                name: name.to_owned(),
                why: format!("it has {length} bytes, more than {IMAGE_MAX}"),
            });
        }
        Self::parse(name, std::fs::read(&path).map_err(not_found)?)
    }

    /// Checks the bytes of an ELF file.
    ///
    /// # Errors
    /// [`ImageError::Malformed`] says what the file lacks.
    pub fn parse(name: &str, bytes: Vec<u8>) -> Result<Self, ImageError> {
        let malformed = |why: String| ImageError::Malformed {
            name: name.to_owned(),
            why,
        };
        if bytes.len() < HEADER || bytes.len() > IMAGE_MAX || bytes[..4] != *b"\x7fELF" {
            return Err(malformed("not an ELF file".into()));
        }
        if bytes[4] != 2 || bytes[5] != 1 {
            return Err(malformed("not a 64-bit little-endian ELF".into()));
        }
        if word16(&bytes, 16) != ET_EXEC || word16(&bytes, 18) != EM_X86_64 {
            return Err(malformed("not a static x86-64 executable (ET_EXEC)".into()));
        }
        let entry = word64(&bytes, 24);
        let table = word64(&bytes, 32);
        let (size, count) = (word16(&bytes, 54) as usize, word16(&bytes, 56) as usize);
        if size != PROGRAM_HEADER || count == 0 || count > PROGRAM_HEADERS_MAX {
            return Err(malformed(format!(
                "{count} program headers of {size} bytes"
            )));
        }
        let headers = usize::try_from(table)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(size * count)?))
            .ok_or_else(|| malformed("the program headers lie outside the file".into()))?;
        let mut segments = Vec::new();
        for header in headers.chunks_exact(size) {
            if word32(header, 0) != 1 {
                continue;
            }
            let (offset, address, physical) =
                (word64(header, 8), word64(header, 16), word64(header, 24));
            let (in_file, in_memory) = (word64(header, 32), word64(header, 40));
            let inside = offset
                .checked_add(in_file)
                .is_some_and(|end| end <= bytes.len() as u64);
            if !inside || in_file > in_memory {
                return Err(malformed(format!(
                    "the segment at {address:#x} lies outside the file"
                )));
            }
            if address != physical
                || address < IMAGE_BASE
                || address.checked_add(in_memory).is_none()
            {
                return Err(malformed(format!(
                    "the segment at {address:#x} must lie at its physical address and at or above {IMAGE_BASE:#x}"
                )));
            }
            segments.push(Segment {
                offset: offset as usize,
                address,
                in_file: in_file as usize,
                in_memory,
            });
        }
        if !segments
            .iter()
            .any(|s| (s.address..s.address + s.in_memory).contains(&entry))
        {
            return Err(malformed(format!(
                "the entry point {entry:#x} lies in no segment"
            )));
        }
        Ok(Self {
            name: name.to_owned(),
            bytes,
            entry,
            segments,
        })
    }

    /// Built-in name or path.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    /// Copies the segments into memory that is all zero; returns the first free address.
    pub(super) fn place(&self, ram: &GuestRam) -> Result<u64, ImageError> {
        let mut end = IMAGE_BASE;
        for segment in &self.segments {
            let segment_end = segment.address + segment.in_memory;
            if segment_end > ram.size() {
                return Err(ImageError::Malformed {
                    name: self.name.clone(),
                    why: format!(
                        "it needs memory up to {segment_end:#x}, the machine has {:#x}: give it more with --memory",
                        ram.size()
                    ),
                });
            }
            let bytes = &self.bytes[segment.offset..segment.offset + segment.in_file];
            ram.write(segment.address, bytes)?;
            end = end.max(segment_end);
        }
        Ok(end.next_multiple_of(4096))
    }
}
