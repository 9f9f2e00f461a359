//! Waiting for descriptors, and the clock it is done by: `poll(2)`, an event descriptor that ends a wait, a TCP
//! connection that is waited for, and readings of `CLOCK_MONOTONIC` that processes of one host can compare.
//!
//! Unsafe code lives here because these are plain system calls; each wrapper passes memory it owns.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A reading of `CLOCK_MONOTONIC`, in nanoseconds. Every process of the host reads the same clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// Reads the clock.
    pub fn now() -> Self {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes one timespec into the local variable. The call cannot fail: the clock
        // exists on every Linux and the address is good.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        Self(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// A reading taken elsewhere, for example in another process of this host.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's own zero.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time from `earlier` to this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment, `after` later.
    pub const fn plus(self, after: Duration) -> Self {
        Self(self.0.saturating_add(after.as_nanos() as u64))
    }
}

/// A set of descriptors to wait for; filled anew before each wait.
#[derive(Debug, Default)]
pub struct Waiter {
    fds: Vec<libc::pollfd>,
}

/// What a wait found out about one descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There is something to read, or the peer has ended its side.
    pub read: bool,
    /// There is room to write.
    pub write: bool,
    /// Both directions have ended. Reported even when nothing was asked for.
    pub hung_up: bool,
    /// The descriptor failed, as by a reset. Reported even when nothing was asked for.
    pub failed: bool,
}

impl Ready {
    /// Whether there is anything to do about it.
    #[must_use]
    pub fn any(self) -> bool {
        self.read || self.write || self.hung_up || self.failed
    }
}

impl Waiter {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.fds.clear();
    }

    /// Adds a descriptor and returns its index for [`Waiter::ready`].
    pub fn add(&mut self, fd: &impl AsFd, read: bool, write: bool) -> usize {
        let mut events = 0;
        if read {
            events |= libc::POLLIN;
        }
        if write {
            events |= libc::POLLOUT;
        }
        self.fds.push(libc::pollfd {
            fd: fd.as_fd().as_raw_fd(),
            events,
            revents: 0,
        });
        self.fds.len() - 1
    }

    /// Waits until a descriptor is ready or `timeout` has passed (`None`: for as long as it takes). Returns
    /// how many are ready; an interrupting signal counts as none.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<usize> {
        let time = timeout.map(|timeout| libc::timespec {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: timeout.subsec_nanos() as libc::c_long,
        });
        let time_ptr = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the array is ours and as long as stated; the timespec, if any, outlives the call; a null
        // signal mask is allowed. A descriptor closed in the meantime is reported, not touched.
        let found = unsafe {
            libc::ppoll(
                self.fds.as_mut_ptr(),
                self.fds.len() as libc::nfds_t,
                time_ptr,
                std::ptr::null(),
            )
        };
        if found >= 0 {
            return Ok(found as usize);
        }
        for fd in &mut self.fds {
            fd.revents = 0;
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        }
    }

    /// The outcome of the last wait for the descriptor that [`Waiter::add`] gave this index.
    pub fn ready(&self, index: usize) -> Ready {
        let revents = self.fds.get(index).map_or(0, |fd| fd.revents);
        Ready {
            read: revents & libc::POLLIN != 0,
            write: revents & libc::POLLOUT != 0,
            hung_up: revents & libc::POLLHUP != 0,
            failed: revents & (libc::POLLERR | libc::POLLNVAL) != 0,
        }
    }
}

/// Ends another thread's wait: an event descriptor.
#[derive(Debug)]
pub struct Wake(File);

impl Wake {
    /// Makes one that has not been rung.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed; the result is checked before use.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// Makes it readable, which ends the wait of whoever waits for it.
    pub fn ring(&self) {
        // The only failure is a full counter, and then it is readable anyway.
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }

    /// Makes it unreadable again. Do this before looking at what the ringing was about.
    pub fn clear(&self) {
        let mut count = [0; 8];
        // The only failure is that it was not readable.
        let _ = (&self.0).read(&mut count);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Starts a TCP connection from the calling thread's network namespace. The stream, which is non-blocking, is
/// connected once it is writable and [`TcpStream::take_error`] has nothing to tell.
pub fn start_connect(address: SocketAddrV4) -> io::Result<TcpStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_INET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let to = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.ip().octets()),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: the kernel reads one sockaddr_in, of the length stated.
    let done = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const to).cast(),
            size_of::<libc::sockaddr_in>() as libc::socklen_t,
        )
    };
    if done < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_ringing_and_by_time() {
        let wake = Wake::new().unwrap();
        let mut waiter = Waiter::new();
        let index = waiter.add(&wake, true, false);
        let before = Moment::now();
        assert_eq!(waiter.wait(Some(Duration::from_millis(2))).unwrap(), 0);
        assert!(Moment::now().since(before) >= Duration::from_millis(2));
        assert!(!waiter.ready(index).read);

        std::thread::scope(|scope| {
            scope.spawn(|| wake.ring());
            assert_eq!(waiter.wait(None).unwrap(), 1);
        });
        assert!(waiter.ready(index).read);
        wake.clear();
        assert_eq!(waiter.wait(Some(Duration::ZERO)).unwrap(), 0);
    }

    #[test]
    fn a_started_connection_becomes_writable_or_says_why_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else {
            panic!("not IPv4")
        };
        let outcome = || {
            let stream = match start_connect(address) {
                Ok(stream) => stream,
                Err(error) => return Some(error),
            };
            let mut waiter = Waiter::new();
            let index = waiter.add(&stream, false, true);
            waiter.wait(Some(Duration::from_secs(5))).unwrap();
            assert!(waiter.ready(index).write);
            stream.take_error().unwrap()
        };
        assert!(outcome().is_none());
        drop(listener);
        let error = outcome().expect("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn moments_subtract_without_wrapping() {
        let early = Moment::from_nanos(5);
        let late = early.plus(Duration::from_nanos(7));
        assert_eq!(late.since(early), Duration::from_nanos(7));
        assert_eq!(early.since(late), Duration::ZERO);
    }
}
