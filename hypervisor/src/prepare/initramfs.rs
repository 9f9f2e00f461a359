//! An initramfs: archives, each plain or packed, one behind the other (init/initramfs.c, `unpack_to_rootfs`).

use super::cpio::{Reader, S_IFMT, S_IFREG, Writer, is_cpio};
use super::elf::{Elf, is_elf};
use super::error::PrepareError;
use super::module::{is_module, module};
use super::program::program;
use super::report::{FileReport, Kind, Report};
use super::unpack::{packing, unpack};
use super::{Limits, Prepared};

/// Prepares the programs and modules in an initramfs. The result is not packed: a guest unpacks it at the speed of its CPU, at every
/// boot.
///
/// # Errors
/// [`PrepareError::Archive`], [`PrepareError::Packed`].
pub fn initramfs(bytes: &[u8], limits: Limits) -> Result<Prepared, PrepareError> {
    let mut writer = Writer::default();
    let mut report = Report::default();
    let mut at = 0;
    let mut archives = 0;
    let mut room = limits;
    while let Some(from) = bytes[at..].iter().position(|&byte| byte != 0) {
        at += from;
        let rest = &bytes[at..];
        if is_cpio(rest) {
            archives += 1;
            at += one(rest, &mut writer, &mut report).map_err(|error| behind(error, at))?;
        } else if let Some(packing) = packing(rest, "the initramfs")? {
            let (archive, length) = unpack(rest, packing, "the initramfs", room)?;
            room.unpacked -= archive.len();
            // One stream may hold several archives, but no packed one in it.
            let mut inner = 0;
            while let Some(from) = archive[inner..].iter().position(|&byte| byte != 0) {
                inner += from;
                archives += 1;
                inner += one(&archive[inner..], &mut writer, &mut report)
                    .map_err(|error| behind(error, inner))?;
            }
            at += length;
        } else {
            return Err(PrepareError::archive(
                at,
                "neither an archive of cpio's newc format nor a packed one starts here",
            ));
        }
    }
    if archives == 0 {
        return Err(PrepareError::archive(0, "it is empty"));
    }
    Ok(Prepared {
        bytes: writer.finish(),
        report,
    })
}

fn behind(error: PrepareError, more: usize) -> PrepareError {
    match error {
        PrepareError::Archive { at, why } => PrepareError::Archive { at: at + more, why },
        other => other,
    }
}

/// Prepares the archive that starts here; its length.
fn one(bytes: &[u8], writer: &mut Writer, report: &mut Report) -> Result<usize, PrepareError> {
    let mut reader = Reader::new(bytes);
    while let Some(entry) = reader.next()? {
        let name = String::from_utf8_lossy(entry.name).into_owned();
        let prepared = if entry.mode & S_IFMT == S_IFREG {
            file(entry.bytes, &name)
        } else {
            None
        };
        match prepared {
            Some((bytes, found)) => {
                report.add(found);
                if let Some(why) = report.flood() {
                    return Err(PrepareError::archive(reader.at, why));
                }
                writer.copy(&entry, &bytes)?;
            }
            None => writer.copy(&entry, entry.bytes)?,
        }
    }
    writer.end();
    Ok(reader.at.min(bytes.len()))
}

/// Prepares a file if it is one that can have sites.
pub(super) fn file(bytes: &[u8], name: &str) -> Option<(Vec<u8>, FileReport)> {
    if !is_elf(bytes) {
        let stem = name.rsplit_once('.').map_or("", |(stem, _)| stem);
        let packed = stem.ends_with(".ko") && !name.ends_with(".ko");
        return packed.then(|| {
            let why =
                "it is packed: unpack it (unxz, unzstd, gunzip), run depmod, and prepare again";
            (bytes.to_vec(), FileReport::skipped(name, Kind::Module, why))
        });
    }
    let is_module = match Elf::parse(bytes) {
        Ok(elf) => is_module(&elf),
        Err(_) => name.ends_with(".ko"),
    };
    let bytes = bytes.to_vec();
    Some(if is_module {
        module(bytes, name)
    } else {
        program(bytes, name)
    })
}
