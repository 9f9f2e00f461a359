//! What kernels and initramfs are packed with. Each unpacker stops at the end of its stream, and says how much it took.

use std::io::Read;

use super::Limits;
use super::elf::word;
use super::error::PrepareError;

/// How a piece is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Xz,
    Zstd,
    /// The format of before frames, which the kernel's build still makes.
    Lz4,
}

/// Starts of what the kernel can unpack and this cannot.
const UNKNOWN: [(&[u8], &str, &str); 3] = [
    (b"BZh", "bzip2", "bunzip2"),
    (b"\x5d\x00\x00", "lzma", "unlzma"),
    (b"\x89LZO\x00\x0d\x0a\x1a\x0a", "LZO", "lzop -d"),
];

/// Bytes of a block of LZ4's legacy format when unpacked (lz4's doc/lz4_Frame_format.md, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: &[u8] = b"\x02\x21\x4c\x18";

/// How what starts here is packed.
///
/// # Errors
/// [`PrepareError::Packed`] for a packing that is known by name only.
pub(super) fn packing(bytes: &[u8], what: &str) -> Result<Option<Packing>, PrepareError> {
    let known = [
        (&b"\x1f\x8b"[..], Packing::Gzip),
        (b"\xfd7zXZ\0", Packing::Xz),
        (b"\x28\xb5\x2f\xfd", Packing::Zstd),
        (LZ4_MAGIC, Packing::Lz4),
    ];
    for (magic, packing) in known {
        if bytes.starts_with(magic) {
            return Ok(Some(packing));
        }
    }
    for (magic, name, command) in UNKNOWN {
        if bytes.starts_with(magic) {
            return Err(PrepareError::Packed {
                what: what.to_owned(),
                why: format!("{name} is not read here; unpack it with `{command}` first"),
            });
        }
    }
    Ok(None)
}

/// Unpacks the stream that starts here: its contents, and how many bytes it had.
///
/// # Errors
/// [`PrepareError::Packed`] if it is damaged, cut off, or larger than it may be.
pub(super) fn unpack(
    bytes: &[u8],
    packing: Packing,
    what: &str,
    limits: Limits,
) -> Result<(Vec<u8>, usize), PrepareError> {
    let failed = |why: String| PrepareError::Packed {
        what: what.to_owned(),
        why,
    };
    let damaged =
        |error: &dyn std::fmt::Display| failed(format!("{error}; it is cut off or damaged"));
    let mut rest = bytes;
    let unpacked = match packing {
        Packing::Gzip => {
            let mut reader = flate2::bufread::GzDecoder::new(rest);
            let unpacked = bounded(&mut reader, limits);
            rest = reader.into_inner();
            unpacked
        }
        Packing::Xz => {
            let memory = u32::try_from(limits.unpacked >> 10).unwrap_or(u32::MAX);
            let mut reader = lzma_rust2::XzReader::new_mem_limit(rest, false, memory);
            let unpacked = bounded(&mut reader, limits);
            rest = reader.into_inner();
            unpacked
        }
        Packing::Zstd => {
            let window = limits.unpacked as u64;
            let mut reader =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(rest, window)
                    .map_err(|error| damaged(&error))?;
            let unpacked = bounded(&mut reader, limits);
            rest = reader.into_inner();
            unpacked
        }
        Packing::Lz4 => lz4(&mut rest, limits)
            .map_err(std::io::Error::other)
            .map(Some),
    };
    match unpacked.map_err(|error| damaged(&error))? {
        Some(unpacked) => Ok((unpacked, bytes.len() - rest.len())),
        None => Err(failed(format!(
            "it unpacks to more than {} bytes",
            limits.unpacked
        ))),
    }
}

/// All that the reader has; `None` if that is too much.
fn bounded(reader: &mut impl Read, limits: Limits) -> std::io::Result<Option<Vec<u8>>> {
    let mut unpacked = Vec::new();
    reader
        .take(limits.unpacked as u64 + 1)
        .read_to_end(&mut unpacked)?;
    Ok((unpacked.len() <= limits.unpacked).then_some(unpacked))
}

/// Blocks, each behind its length. In a kernel the stream's end is the end of the bytes, or the size that follows it there, which
/// no block of that length can.
fn lz4(rest: &mut &[u8], limits: Limits) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    *rest = &rest[LZ4_MAGIC.len()..];
    while let Some(length) = word(rest, 0, 4) {
        let Some(block) = rest.get(4..).and_then(|rest| rest.get(..length as usize)) else {
            break;
        };
        if block.is_empty() {
            break;
        }
        let room = LZ4_BLOCK.min(limits.unpacked.saturating_sub(unpacked.len()));
        let from = unpacked.len();
        unpacked.resize(from + room, 0);
        let size = lz4_flex::block::decompress_into(block, &mut unpacked[from..])
            .map_err(|error| error.to_string())?;
        unpacked.truncate(from + size);
        *rest = &rest[4 + block.len()..];
    }
    if unpacked.is_empty() {
        return Err("it has no block".into());
    }
    Ok(unpacked)
}
