//! A network namespace for the demo: the guest's cable, its TAP and the client live in it, and all of it is gone
//! when the last process in it ends.
//!
//! ```text
//!  host's namespace                     the demo's namespace
//!  ───────────────                      ────────────────────
//!  listener on 127.0.0.1:PORT,   ──▶    gateway ─▶ kernel's TCP/IP ─▶ TAP ─▶ guest
//!  bound before the move                clients ─▶      "
//! ```
//! [`enter`] moves the *calling process* into the namespace, early, while it has one thread; the threads and
//! processes it starts later are born inside. A socket belongs to the namespace in which it was made, so a
//! listener bound before the move goes on serving the host's 127.0.0.1: no helper process and no way back is
//! needed. With CAP_SYS_ADMIN that is one `unshare`. Without it a user namespace comes first, which the kernel
//! gives only to a process with one thread and does not take back; so everything is tried in a forked child
//! beforehand, and where it is refused there the caller has lost nothing and falls back to the Unix-socket link.
//!
//! Unsafe code lives here for `unshare`, `setns`, `fork` and `geteuid`, which the standard library does not have.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::backends::tap::{self, Tap, TapConfig, TapError};

/// Why there is no namespace with a TAP. The caller is where it was; the Unix-socket link needs none of this.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The TAP itself is the obstacle.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel gives us no network namespace, or no user namespace to have one in.
    #[error(
        "no network namespace of our own: the kernel refuses {what} ({source}); run as root, or allow \
         unprivileged user namespaces (user.max_user_namespaces, kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns)"
    )]
    Kernel {
        /// The step that was refused.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process with several threads cannot enter a user namespace.
    #[error(
        "this process has {threads} threads, and the kernel lets only a process with one into a user namespace: \
         enter it before any thread is started"
    )]
    Threads {
        /// How many threads there are.
        threads: usize,
    },
    /// The trial in a child process failed; its words.
    #[error("{0}")]
    Trial(String),
}

/// A network namespace, kept by a descriptor.
#[derive(Debug)]
pub struct Namespace {
    net: File,
    user: bool,
}

/// What [`enter`] made.
#[derive(Debug)]
pub struct Entered {
    /// The namespace, in which the calling thread now is.
    pub namespace: Namespace,
    /// The TAP in it, up and with its address.
    pub tap: Tap,
}

/// Moves the calling process into a new network namespace with the loopback interface and a TAP in it.
///
/// Call it before any other thread is started: with privilege only the calling thread (and what it starts
/// later) moves, without it the kernel refuses. Bind listeners for the host's side before.
///
/// # Errors
/// [`Refused`] says in words what the obstacle is. The caller is then still where it was.
pub fn enter(config: &TapConfig) -> Result<Entered, Refused> {
    tap::device_permits()?;
    if can_unshare() {
        let outside = current()?;
        unshare(libc::CLONE_NEWNET, "a network namespace")?;
        return furnish(config, false).inspect_err(|_| {
            // We came from there a moment ago with the same privilege: it lets us back.
            let _ = set_namespace(&outside);
        });
    }
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Refused::Threads { threads });
    }
    try_in_child(|| enter_with_user(config).map(drop)).map_err(Refused::Trial)?;
    enter_with_user(config)
}

/// Moves the calling thread into a new network namespace with nothing but the loopback interface in it. Takes privilege.
///
/// # Errors
/// As [`enter`].
pub fn enter_bare() -> Result<Namespace, Refused> {
    unshare(libc::CLONE_NEWNET, "a network namespace")?;
    tap::loopback_up()?;
    Ok(Namespace {
        net: current()?,
        user: false,
    })
}

/// Tries [`enter`] in a child process, which takes everything with it. Whether a user namespace was needed for it.
///
/// # Errors
/// As [`enter`]; [`Refused::Threads`] if this process has several.
pub fn trial(config: &TapConfig) -> Result<bool, Refused> {
    tap::device_permits()?;
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Refused::Threads { threads });
    }
    let user = !can_unshare();
    try_in_child(|| {
        if user {
            return enter_with_user(config).map(drop);
        }
        unshare(libc::CLONE_NEWNET, "a network namespace")?;
        furnish(config, false).map(drop)
    })
    .map_err(Refused::Trial)?;
    Ok(user)
}

impl Namespace {
    /// Moves the calling thread into the namespace, if it is not in it already.
    ///
    /// # Errors
    /// The kernel's refusal: the thread needs CAP_SYS_ADMIN in its own user namespace and in this one's.
    pub fn join(&self) -> io::Result<()> {
        let wanted = self.net.metadata()?;
        let here = fs::metadata(OWN_NET)?;
        if (here.dev(), here.ino()) == (wanted.dev(), wanted.ino()) {
            return Ok(());
        }
        set_namespace(&self.net)
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it. For callers that are
    /// elsewhere; what [`enter`]'s caller starts is inside anyway.
    ///
    /// # Errors
    /// As [`Namespace::join`], in which case `work` was not run.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| self.join().map(|()| work()));
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A path by which this machine's tools (`ip link … netns PATH`) find the namespace, as long as it is kept.
    pub fn path(&self) -> PathBuf {
        let (pid, fd) = (std::process::id(), self.net.as_raw_fd());
        PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
    }

    /// Whether it lies in a user namespace of ours too, so that root was not needed.
    pub fn in_user_namespace(&self) -> bool {
        self.user
    }

    /// The command with which a user enters the namespace by way of process `pid`, to be followed by the
    /// command to run there.
    pub fn how_to_enter(&self, pid: u32) -> String {
        if self.user {
            format!("nsenter -t {pid} -U --preserve-credentials -n")
        } else {
            format!("nsenter -t {pid} -n")
        }
    }
}

const OWN_NET: &str = "/proc/thread-self/ns/net";

/// Sets up the namespace that the calling thread has just got.
fn furnish(config: &TapConfig, user: bool) -> Result<Entered, Refused> {
    let net = current()?;
    tap::loopback_up()?;
    let tap = Tap::open(config)?;
    Ok(Entered {
        namespace: Namespace { net, user },
        tap,
    })
}

fn current() -> Result<File, Refused> {
    File::open(OWN_NET).map_err(|source| Refused::Kernel {
        what: "a look at our network namespace",
        source,
    })
}

fn enter_with_user(config: &TapConfig) -> Result<Entered, Refused> {
    // SAFETY: the two calls take nothing and cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    unshare(
        libc::CLONE_NEWUSER | libc::CLONE_NEWNET,
        "a user namespace with a network namespace in it",
    )?;
    // The same numbers inside and outside: files, signals and /dev/kvm look as they did. What we start by exec
    // has no privilege inside, and needs none: the TAP is handed down open.
    map("setgroups", "deny")?;
    map("uid_map", &format!("{uid} {uid} 1"))?;
    map("gid_map", &format!("{gid} {gid} 1"))?;
    furnish(config, true)
}

fn map(file: &str, text: &str) -> Result<(), Refused> {
    fs::write(format!("/proc/self/{file}"), text).map_err(|source| Refused::Kernel {
        what: "the user namespace's id maps",
        source,
    })
}

fn unshare(flags: libc::c_int, what: &'static str) -> Result<(), Refused> {
    // SAFETY: unshare passes no memory, and namespaces change nothing that Rust relies on.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(Refused::Kernel {
            what,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

fn set_namespace(net: &File) -> io::Result<()> {
    // SAFETY: setns passes no memory; the descriptor is open.
    if unsafe { libc::setns(net.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the calling thread has CAP_NET_ADMIN (12) and CAP_SYS_ADMIN (21) in effect.
fn can_unshare() -> bool {
    const NEEDED: u64 = 1 << 12 | 1 << 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_some_and(|effective| effective & NEEDED == NEEDED)
}

/// Runs `trial` in a forked child, which takes all it did with it, and returns the child's error in words.
/// The process must have one thread: in the child of several, locks may be held for ever.
fn try_in_child(trial: impl FnOnce() -> Result<(), Refused>) -> Result<(), String> {
    let (mut report, verdict) = io::pipe().map_err(|error| format!("no pipe: {error}"))?;
    // SAFETY: the caller has made sure that there is one thread, so the child's copy of memory is consistent.
    // It leaves by _exit below and never returns into the caller's code.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(format!(
            "cannot try a namespace in a child process: {}",
            io::Error::last_os_error()
        ));
    }
    if child == 0 {
        let outcome = catch_unwind(AssertUnwindSafe(trial));
        let words = match outcome {
            Ok(Ok(())) => String::new(),
            Ok(Err(refused)) => refused.to_string(),
            Err(_) => "the trial of a namespace panicked".to_owned(),
        };
        let mut verdict = verdict;
        let told = verdict.write_all(words.as_bytes()).is_ok();
        let status = i32::from(!(words.is_empty() && told));
        // SAFETY: ends the child at once, running none of the parent's clean-up (its buffers, its files).
        unsafe { libc::_exit(status) };
    }
    drop(verdict);
    let mut words = String::new();
    let heard = report.read_to_string(&mut words);
    let status = wait_for(child).map_err(|error| format!("lost the trial's process: {error}"))?;
    match heard {
        Ok(_) if words.is_empty() && status == 0 => Ok(()),
        Ok(_) if !words.is_empty() => Err(words),
        _ => Err(format!(
            "the trial of a namespace ended with wait status {status}"
        )),
    }
}

fn wait_for(child: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one integer; the child is ours and has not been waited for.
        if unsafe { libc::waitpid(child, &mut status, 0) } >= 0 {
            return Ok(status);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;
    use crate::backends::longest_frame;
    use crate::backends::wait::Waiter;

    fn config(name: &str) -> TapConfig {
        TapConfig {
            name: name.to_owned(),
            address: Some("10.77.0.1/24".parse().unwrap()),
            mtu: 1500,
        }
    }

    /// Tests run on threads beside each other, so only the privileged way can be taken here; the other one is
    /// tested by the demo's own process with root dropped. Says so instead of passing for nothing.
    fn entered(name: &str) -> Option<Entered> {
        if !can_unshare() {
            eprintln!("skipped: needs CAP_SYS_ADMIN and CAP_NET_ADMIN");
            return None;
        }
        match enter(&config(name)) {
            Ok(entered) => Some(entered),
            Err(Refused::Tap(refused @ (TapError::NoDevice | TapError::DeviceDenied))) => {
                eprintln!("skipped: {refused}");
                None
            }
            Err(refused) => panic!("{refused}"),
        }
    }

    #[test]
    fn the_kernel_and_the_tap_exchange_frames() {
        std::thread::spawn(|| {
            let Some(Entered { tap, .. }) = entered("doppel0") else {
                return;
            };
            // The kernel asks who 10.77.0.2 is before it sends anything there.
            let socket = UdpSocket::bind((Ipv4Addr::new(10, 77, 0, 1), 0)).unwrap();
            socket.send_to(b"hello", "10.77.0.2:9").unwrap();
            let mut waiter = Waiter::new();
            waiter.add(tap.port(), true, false);
            assert_eq!(waiter.wait(Some(Duration::from_secs(5))).unwrap(), 1);
            let mut slot = vec![0; longest_frame(1500)];
            let length = tap.port().read_into(&mut slot).unwrap().expect("a frame");
            let request = &slot[..length];
            assert_eq!(request[12..14], [8, 6], "not ARP: {request:x?}");
            assert_eq!(request[28..32], [10, 77, 0, 1]);
            assert_eq!(request[38..42], [10, 77, 0, 2]);

            // Answer it; now the datagram itself comes.
            let mut answer = request.to_vec();
            let guest = [2, 0, 0, 0, 0, 2];
            answer[0..6].copy_from_slice(&request[6..12]);
            answer[6..12].copy_from_slice(&guest);
            answer[21] = 2;
            answer[22..28].copy_from_slice(&guest);
            answer[28..32].copy_from_slice(&[10, 77, 0, 2]);
            answer[32..38].copy_from_slice(&request[6..12]);
            answer[38..42].copy_from_slice(&[10, 77, 0, 1]);
            assert!(tap.port().write(&answer).unwrap());
            assert_eq!(waiter.wait(Some(Duration::from_secs(5))).unwrap(), 1);
            let length = tap.port().read_into(&mut slot).unwrap().expect("a frame");
            assert_eq!(slot[..6], guest);
            assert_eq!(&slot[length - 5..length], b"hello");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_port_survives_inheritance_and_takes_the_interface_with_it() {
        std::thread::spawn(|| {
            let Some(Entered { tap, .. }) = entered("doppel1") else {
                return;
            };
            let listed = || {
                fs::read_to_string("/proc/thread-self/net/dev")
                    .unwrap()
                    .contains("doppel1:")
            };
            assert!(listed());
            let details = std::process::Command::new("ip")
                .args(["link", "show", "doppel1"])
                .output();
            if let Ok(details) = details {
                let words = String::from_utf8(details.stdout).unwrap();
                assert!(
                    words.contains("mtu 1500") && words.contains("UP"),
                    "{words}"
                );
                assert!(
                    words.contains(&format!("qlen {}", tap::QUEUE_FRAMES)),
                    "{words}"
                );
            }
            let inheritable = tap.port().inheritable().unwrap();
            let heir = crate::backends::NetPort::inherited(inheritable.as_raw_fd()).unwrap();
            assert_eq!(heir.kind(), crate::backends::PortKind::Tap);
            drop(tap);
            assert!(listed(), "the heir keeps it");
            drop(heir);
            // The number that was inherited is a holder too, until its process ends.
            assert!(listed());
            drop(inheritable);
            assert!(!listed(), "nothing is left behind");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_listener_bound_outside_serves_the_outside() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (moved, is_moved) = std::sync::mpsc::channel();
        let inside = std::thread::spawn(move || {
            let entered = entered("doppel2");
            moved.send(entered.is_some()).unwrap();
            if entered.is_none() {
                return;
            }
            assert!(
                TcpStream::connect(address).is_err(),
                "inside, nobody listens there"
            );
            listener.accept().unwrap().0.write_all(b"x").unwrap();
        });
        if is_moved.recv().unwrap() {
            let mut byte = [0];
            TcpStream::connect(address)
                .unwrap()
                .read_exact(&mut byte)
                .unwrap();
            assert_eq!(&byte, b"x");
        }
        inside.join().unwrap();
    }

    #[test]
    fn a_thread_elsewhere_can_join() {
        std::thread::spawn(|| {
            let Some(Entered { namespace, tap }) = entered("doppel3") else {
                return;
            };
            let listener = TcpListener::bind((Ipv4Addr::new(10, 77, 0, 1), 0)).unwrap();
            let address: SocketAddr = listener.local_addr().unwrap();
            let (give, take) = std::sync::mpsc::channel();
            give.send(namespace).unwrap();
            // This thread's child is born inside; the namespace is joined again from a fresh one outside.
            let outside = std::thread::spawn(move || {
                unshare(libc::CLONE_NEWNET, "another one").unwrap();
                let namespace: Namespace = take.recv().unwrap();
                assert!(TcpStream::connect(address).is_err());
                assert!(!namespace.in_user_namespace());
                assert_eq!(namespace.how_to_enter(7), "nsenter -t 7 -n");
                namespace
                    .run(|| TcpStream::connect(address).is_ok())
                    .unwrap()
            });
            assert!(outside.join().unwrap());
            drop(tap);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_busy_name_is_told_and_the_caller_stays_outside() {
        std::thread::spawn(|| {
            let Some(Entered { tap, namespace }) = entered("doppel4") else {
                return;
            };
            assert!(matches!(
                Tap::open(&config("doppel4")),
                Err(TapError::Busy { .. })
            ));
            assert!(matches!(
                Tap::open(&config("lo")),
                Err(TapError::Busy { .. })
            ));
            let refused = enter(&config("no/name")).unwrap_err();
            assert!(refused.to_string().contains("no/name"), "{refused}");
            let here = fs::metadata(OWN_NET).unwrap().ino();
            assert_eq!(namespace.net.metadata().unwrap().ino(), here);
            drop(tap);
        })
        .join()
        .unwrap();
    }
}
