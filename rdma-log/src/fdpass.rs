//! Passing file descriptors over a connected Unix stream socket (SCM_RIGHTS).
//!
//! Descriptors travel with the first byte of a message. A receiver names how many it takes: the kernel installs no
//! more than its buffer has room for, and any surplus is an error and closed.
//!
//! Unsafe: building and walking control messages for sendmsg and recvmsg, in a buffer of fixed size that is aligned
//! for them; received descriptors are owned as soon as they are seen.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;

/// The most descriptors that one message carries either way.
pub const MAX_FDS: usize = 16;

/// Why a message with descriptors was not sent or received.
#[derive(Debug, Error)]
pub enum FdPassError {
    /// More than [`MAX_FDS`], or descriptors without a byte to carry them.
    #[error(
        "cannot send {fds} descriptors with {bytes} bytes: at most {MAX_FDS}, and with at least one byte"
    )]
    BadRequest {
        /// Descriptors given.
        fds: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// The peer sent more descriptors than were asked for. They are closed.
    #[error("the peer sent more than the {max} descriptors expected")]
    TooMany {
        /// How many were expected.
        max: usize,
    },
    /// The peer closed the connection before the message was whole.
    #[error("the peer closed the connection after {got} of {wanted} bytes")]
    Closed {
        /// Bytes received.
        got: usize,
        /// Bytes expected.
        wanted: usize,
    },
    /// The socket failed; a time limit set on it comes as `WouldBlock`.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
}

const RIGHTS: usize = MAX_FDS * size_of::<RawFd>();
// SAFETY: CMSG_SPACE is arithmetic.
const SPACE: usize = unsafe { libc::CMSG_SPACE(RIGHTS as u32) } as usize;

/// Room for one control message with [`MAX_FDS`] descriptors.
#[repr(C, align(8))]
struct Control([u8; SPACE]);

const _: () = assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());

/// Sends all of `bytes`, the descriptors with the first of them. Each stays open here as well.
///
/// # Errors
/// [`FdPassError::BadRequest`] before anything was sent, else [`FdPassError::Io`].
pub fn send_with_fds(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), FdPassError> {
    if fds.len() > MAX_FDS || bytes.is_empty() {
        let (fds, bytes) = (fds.len(), bytes.len());
        return Err(FdPassError::BadRequest { fds, bytes });
    }
    let mut sent = 0;
    while sent < bytes.len() {
        let with: &[BorrowedFd<'_>] = if sent == 0 { fds } else { &[] };
        match send_once(stream, &bytes[sent..], with) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn send_once(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control = Control([0; SPACE]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let len = size_of_val(fds);
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE is arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(len as u32) } as usize;
        // SAFETY: the control buffer is aligned and has room for one message with this many descriptors (the caller
        // checked their number), so the first header and its data lie inside it.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len as u32) as usize;
            let data = libc::CMSG_DATA(header);
            for (i, fd) in fds.iter().enumerate() {
                let raw = fd.as_raw_fd().to_ne_bytes();
                std::ptr::copy_nonoverlapping(raw.as_ptr(), data.add(i * raw.len()), raw.len());
            }
        }
    }
    // SAFETY: the message points at buffers that live through the call; the bytes are only read.
    let n = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Receives exactly `bytes.len()` bytes, and the descriptors that come with them, closed on exec.
///
/// A time limit is that of the stream ([`UnixStream::set_read_timeout`]), for each piece that arrives.
///
/// # Errors
/// [`FdPassError::TooMany`] for more than `max` descriptors, [`FdPassError::Closed`], [`FdPassError::Io`];
/// [`FdPassError::BadRequest`] if `bytes` is empty or `max` above [`MAX_FDS`].
pub fn recv_with_fds(
    stream: &UnixStream,
    bytes: &mut [u8],
    max: usize,
) -> Result<Vec<OwnedFd>, FdPassError> {
    if max > MAX_FDS || bytes.is_empty() {
        let bytes = bytes.len();
        return Err(FdPassError::BadRequest { fds: max, bytes });
    }
    let mut fds = Vec::new();
    let mut got = 0;
    while got < bytes.len() {
        match recv_once(stream, &mut bytes[got..], &mut fds, max) {
            Ok((0, _)) => {
                let wanted = bytes.len();
                return Err(FdPassError::Closed { got, wanted });
            }
            Ok((n, whole)) => {
                got += n;
                if !whole || fds.len() > max {
                    return Err(FdPassError::TooMany { max });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(fds)
}

/// One recvmsg: how many bytes came, and whether all descriptors did.
fn recv_once(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max: usize,
) -> io::Result<(usize, bool)> {
    let mut control = Control([0; SPACE]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    let room = max.saturating_sub(fds.len()) * size_of::<RawFd>();
    if room > 0 {
        message.msg_control = control.0.as_mut_ptr().cast();
        // At most the whole buffer, as `max` is at most MAX_FDS. Rounded up to the alignment, it may take one too many.
        // SAFETY: CMSG_SPACE is arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(room as u32) } as usize;
    }
    // SAFETY: the message points at buffers that live through the call, with their true lengths.
    let n = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled the control buffer and set its length; FIRSTHDR and NXTHDR stay inside it, and each
    // header's length says how much data follows. Every descriptor found is new and owned by nobody yet.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header);
                let len = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..len / size_of::<RawFd>() {
                    let mut raw = [0; size_of::<RawFd>()];
                    let from = data.add(i * raw.len());
                    std::ptr::copy_nonoverlapping(from, raw.as_mut_ptr(), raw.len());
                    fds.push(OwnedFd::from_raw_fd(RawFd::from_ne_bytes(raw)));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((n, message.msg_flags & libc::MSG_CTRUNC == 0))
}

#[cfg(all(test, not(loom)))]
mod tests;
