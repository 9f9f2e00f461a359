//! Files that are believed, or kept secret, for who can get at them: a regular one, of this user's or of root's, that gives nobody else the
//! rights in question.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::credentials::{ROOT, own_user};

/// Others may neither read nor write it: what is secret.
pub(crate) const SECRET: u32 = 0o077;

/// Others may not write it: what is believed.
pub(crate) const BELIEVED: u32 = 0o022;

/// Why a file is not read.
#[derive(Debug)]
pub(crate) enum Unguarded {
    /// The kernel.
    Unreadable(io::Error),
    /// A directory, a device, a pipe.
    NoFile,
    /// Another user's.
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// Others have rights that they must not have: its mode.
    Open(u32),
    /// Longer than it may be.
    Long,
}

/// Reads a file of at most `longest` bytes if nobody but its owner, who is this user or root, has a right of `denied`.
pub(crate) fn read(path: &Path, denied: u32, longest: u64) -> Result<Vec<u8>, Unguarded> {
    // Of a pipe it would wait for a writer. What was opened is what is judged, whatever the name means by then.
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Unguarded::Unreadable)?;
    let found = file.metadata().map_err(Unguarded::Unreadable)?;
    if !found.is_file() {
        return Err(Unguarded::NoFile);
    }
    let user = own_user();
    if found.uid() != user && found.uid() != ROOT {
        return Err(Unguarded::Owner {
            owner: found.uid(),
            user,
        });
    }
    let mode = found.mode() & 0o7777;
    if mode & denied != 0 {
        return Err(Unguarded::Open(mode));
    }
    // Once: what is secret is not left behind by a buffer that grows.
    let mut text = Vec::with_capacity(found.len().min(longest) as usize + 1);
    file.take(longest + 1)
        .read_to_end(&mut text)
        .map_err(Unguarded::Unreadable)?;
    if text.len() as u64 > longest {
        return Err(Unguarded::Long);
    }
    Ok(text)
}
