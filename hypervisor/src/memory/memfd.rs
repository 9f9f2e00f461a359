//! The system calls behind guest RAM that have no safe wrapper among our crates.
//!
//! `unsafe` is here only for the calls themselves: each gets a descriptor or a mapping that its caller owns
//! and borrows for the length of the call.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vm_memory::MmapRegion;
use vm_memory::bitmap::AtomicBitmap;

/// Makes an anonymous file of `bytes` zeros, which can neither grow nor shrink: whoever is handed its
/// descriptor cannot make this process fault by truncating it.
pub(super) fn create(bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal; the call touches no other memory of ours.
    let fd = unsafe {
        libc::memfd_create(
            c"doppel-guest-ram".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create just returned this descriptor and nothing else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and works on the descriptor that `file` owns.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Leaves a mapping out of core dumps: guest memory holds other people's secrets.
pub(super) fn keep_out_of_core_dumps(region: &MmapRegion<AtomicBitmap>) -> io::Result<()> {
    // SAFETY: the range is exactly a mapping that `region` owns; MADV_DONTDUMP changes no content.
    let rc = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The next stretch of `file` at or after `from` that was ever touched, or `None` when only holes follow.
/// Reading a hole through the mapping would allocate it, so whoever scans all of RAM asks here first.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(file, from, libc::SEEK_DATA)? else {
        return Ok(None);
    };
    let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(start);
    Ok((end > start).then_some(start..end))
}

fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: lseek works on the descriptor that `file` owns and touches no memory. Nobody uses this
    // descriptor's file position.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    if at >= 0 {
        return Ok(Some(at.cast_unsigned()));
    }
    match io::Error::last_os_error() {
        // Nothing but a hole up to the end.
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}
