//! Calls over Unix sockets, and whose process is at the other end: what the kernel says, which no peer can forge.
//!
//! Unsafe: `socket` and `connect` with an address of this function's own, `getsockopt` with SO_PEERCRED into such a struct, `geteuid`, which
//! takes nothing, and the two calls for a descriptor of a process, which pass no memory.

use std::ffi::c_char;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::backends::wait::Waiter;

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
    Ok(peer(stream)?.uid)
}

/// A process, held by a descriptor: no other one is ever taken for it.
#[derive(Debug)]
pub(crate) struct Process(OwnedFd);

impl Process {
    /// Whoever connected, or listened. If it answers after this, it is the one that is held, as its number was not free meanwhile.
    pub(crate) fn of_peer(stream: &UnixStream) -> io::Result<Self> {
        let pid = peer(stream)?.pid;
        if pid <= 0 {
            return Err(io::Error::other("it is in another PID namespace"));
        }
        // SAFETY: no memory is passed; the result is checked before use.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// SIGKILL; one that has ended needs none.
    pub(crate) fn kill(&self) -> io::Result<()> {
        // SAFETY: the signal's information is none, and no other memory is passed.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match sent {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Whether it has ended, with all its threads, after at most so long. Then all that it had open is closed.
    pub(crate) fn has_ended(&self, within: Duration) -> io::Result<bool> {
        let mut waiter = Waiter::new();
        let process = waiter.add(&self.0, true, false);
        waiter.wait(Some(within))?;
        Ok(waiter.ready(process).read)
    }
}

fn peer(stream: &UnixStream) -> io::Result<libc::ucred> {
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
    Ok(found)
}

/// Connects to whoever listens at this socket, and waits for nobody: a process that is frozen takes in no caller, and once as many wait as its
/// kernel lets wait the next one would stand until it is thawed, or dies.
///
/// # Errors
/// The kernel's; [`ErrorKind::WouldBlock`] where too many wait already.
pub(crate) fn call(socket: &Path) -> io::Result<UnixStream> {
    // SAFETY: a sockaddr_un is plain data for which all zeroes is a value.
    let mut to: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    to.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = socket.as_os_str().as_bytes();
    // The last one stays zero, and ends it.
    if path.is_empty() || path.contains(&0) || path.len() >= to.sun_path.len() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the path of a socket has 1 to {} bytes, none of them zero",
                to.sun_path.len() - 1
            ),
        ));
    }
    for (place, byte) in to.sun_path.iter_mut().zip(path) {
        *place = *byte as c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
    let ours = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the kernel reads one sockaddr_un, of the length stated.
    let done = unsafe {
        libc::connect(
            ours.as_raw_fd(),
            (&raw const to).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = UnixStream::from(ours);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Whether a socket's file is there and nobody listens at it: a dead process left it.
pub(crate) fn is_left_behind(socket: &Path) -> bool {
    call(socket).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
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
    fn nobody_waits_for_a_process_that_takes_no_caller_in() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("socket");
        let kind = |outcome: io::Result<UnixStream>| outcome.map(drop).map_err(|e| e.kind());
        assert_eq!(kind(call(&place)), Err(ErrorKind::NotFound));
        let socket = std::os::unix::net::UnixListener::bind(&place).unwrap();
        // SAFETY: listen passes no memory; a socket that listens already has room for this many from now on.
        assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), 1) }, 0);
        let mut waiting = Vec::new();
        let refused = loop {
            match call(&place) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::WouldBlock, "{refused}");
        assert!(!waiting.is_empty());
        assert!(!is_left_behind(&place), "it is frozen, and not dead");
        drop(socket);
        assert!(is_left_behind(&place));
        let long = directory.path().join("x".repeat(200));
        assert_eq!(kind(call(&long)), Err(ErrorKind::InvalidInput));
        // Who is taken in is spoken with as ever.
        let listener = std::os::unix::net::UnixListener::bind(directory.path().join("s")).unwrap();
        let mut near = call(&directory.path().join("s")).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut far, b"word").unwrap();
        let mut word = [0; 4];
        std::io::Read::read_exact(&mut near, &mut word).unwrap();
        assert_eq!(&word, b"word");
    }

    #[test]
    fn another_user_is_believed_only_if_it_is_root() {
        assert!(is_believed(1000, 1000) && is_believed(ROOT, 1000) && is_believed(ROOT, ROOT));
        assert!(!is_believed(1001, 1000) && !is_believed(1000, ROOT) && !is_believed(u32::MAX, 0));
    }
}
