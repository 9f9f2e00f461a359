//! Waiting for a socket: `poll(2)`.
//!
//! Unsafe: the one system call, on an array of this function's own.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// What a wait found of one descriptor: it is not as it was waited for, and reading or writing will tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// Waits until one of these can be read, or written where that is asked for; `None` waits for as long as it takes. A
/// signal ends it early.
///
/// # Errors
/// What the kernel says.
pub(crate) fn wait<const N: usize>(
    fds: [(BorrowedFd<'_>, bool); N],
    limit: Option<Duration>,
) -> io::Result<[Ready; N]> {
    let mut polled = fds.map(|(fd, write)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN | if write { libc::POLLOUT } else { 0 },
        revents: 0,
    });
    let timeout = limit.map(|limit| libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the array is as long as said and, like the timespec, lives through the call; no signal mask is given.
    let rc = unsafe {
        libc::ppoll(
            polled.as_mut_ptr(),
            N as libc::nfds_t,
            timeout,
            std::ptr::null(),
        )
    };
    if rc < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(polled.map(|fd| Ready {
        read: rc > 0 && fd.revents & !libc::POLLOUT != 0,
        write: rc > 0 && fd.revents & libc::POLLOUT != 0,
    }))
}
