//! Whose process is at the other end of a Unix socket: what the kernel says, which no peer can forge.
//!
//! Unsafe: `getsockopt` with SO_PEERCRED into a struct of this function's own, and `geteuid`, which takes nothing.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The user who may do everything.
pub(crate) const ROOT: u32 = 0;

/// Whether a process of theirs is believed by one of ours: root can do whatever it likes with ours in any case.
pub(crate) fn is_believed(theirs: u32, ours: u32) -> bool {
    theirs == ours || theirs == ROOT
}

/// This process's effective user.
pub(crate) fn own_user() -> u32 {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// The effective user of whoever connected, or listened, when it did.
pub(crate) fn peer_user(stream: &UnixStream) -> io::Result<u32> {
    let mut found = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = size_of_val(&found) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the struct, and the length; both live through the call.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(found.uid)
}

/// Whether a socket's file is there and nobody listens at it: a dead process left it.
pub(crate) fn is_left_behind(socket: &Path) -> bool {
    UnixStream::connect(socket).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_of_this_process_has_its_user_at_both_ends() {
        let (a, b) = UnixStream::pair().unwrap();
        assert_eq!(peer_user(&a).unwrap(), own_user());
        assert_eq!(peer_user(&b).unwrap(), own_user());
    }

    #[test]
    fn another_user_is_believed_only_if_it_is_root() {
        assert!(is_believed(1000, 1000) && is_believed(ROOT, 1000) && is_believed(ROOT, ROOT));
        assert!(!is_believed(1001, 1000) && !is_believed(1000, ROOT) && !is_believed(u32::MAX, 0));
    }
}
