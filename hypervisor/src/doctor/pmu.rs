//! Whether the CPU's performance counters can be had.
//!
//! Unsafe: `perf_event_open` has no wrapper among our crates, and `libc` has no structure for it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// `PERF_ATTR_SIZE_VER0`: all that a plain counter needs, and known to every kernel.
const ATTR_SIZE: usize = 64;
/// `PERF_TYPE_HARDWARE`.
const HARDWARE: u32 = 0;
/// `PERF_COUNT_HW_BRANCH_INSTRUCTIONS`: what counting to an exact instruction would use.
const BRANCHES: u64 = 4;
/// Bits of the flags: disabled, exclude_kernel, exclude_hv.
const FLAGS: u64 = 1 | 1 << 5 | 1 << 6;

/// Opens a counter of retired branches for this thread, and closes it.
///
/// # Errors
/// What the kernel says: no such counter (ENOENT, EOPNOTSUPP), or no permission.
pub(super) fn try_counter() -> io::Result<()> {
    let mut attr = [0u8; ATTR_SIZE];
    attr[0..4].copy_from_slice(&HARDWARE.to_le_bytes());
    attr[4..8].copy_from_slice(&(ATTR_SIZE as u32).to_le_bytes());
    attr[8..16].copy_from_slice(&BRANCHES.to_le_bytes());
    attr[40..48].copy_from_slice(&FLAGS.to_le_bytes());
    // SAFETY: the kernel reads as many bytes of the attribute as its size field says, which is its length.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}
