use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use std::time::Duration;

use super::*;

const WHAT: &str = "DOPPEL_TEST_SANDBOX";

/// What a confined thread tries in a process of its own (a filter cannot be taken off again): the exit status says how it went.
/// Without its variable this is no test.
#[test]
fn confined() {
    let Ok(what) = std::env::var(WHAT) else {
        return;
    };
    let (thread, strict, action) = match what.split(' ').collect::<Vec<_>>()[..] {
        [thread, strict, action] => (thread, strict == "strict", action),
        _ => panic!("{what:?}"),
    };
    let thread = match thread {
        "vcpu" => Thread::Vcpu,
        "io" => Thread::Io,
        "landing" => Thread::Landing,
        "log-file" => Thread::LogFile,
        "replay" => Thread::Replay,
        "remote-arbiter" => Thread::RemoteArbiter,
        "recruiter" => Thread::Recruiter,
        "rdma-recruiter" => Thread::RdmaRecruiter,
        "operator" => Thread::Operator,
        "disk" => Thread::Disk,
        "bailiff" => Thread::Bailiff,
        "warden" => Thread::Warden,
        "outflow" => Thread::Outflow,
        _ => Thread::Arbiter,
    };
    let enabled = true;
    // As a process has done by then that has read a guest's image: what a heap gives back at once has grown by it.
    drop(std::hint::black_box(vec![1u8; 4 << 20]));
    let sandbox = Sandbox::prepare(&config::Sandbox { enabled, strict }).unwrap();
    // Bound before: a confined thread has no business to listen.
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener: SocketAddr = listening.local_addr().unwrap();
    // For one that takes it in.
    let _caller = TcpStream::connect(listener).unwrap();
    // The one that has started this one: a process of the same user.
    let other = std::os::unix::process::parent_id();
    sandbox.confine(thread).unwrap();
    let outcome = match action {
        "accept" => listening.accept().map(drop),
        "open" => File::open("/dev/null").map(drop),
        "create" => File::create(std::env::temp_dir().join("doppel-test-sandbox")).map(drop),
        "connect" => TcpStream::connect_timeout(&listener, Duration::from_secs(5)).map(drop),
        "unix" => UnixDatagram::unbound().map(drop),
        "socket" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "exec" => Command::new("/bin/true").status().map(drop),
        "thread" => std::thread::Builder::new().spawn(|| {}).map(drop),
        "execute" => executable_memory(),
        "signal-itself" => may_signal(std::process::id()),
        "signal-another" => may_signal(other),
        "events-for-another" => events_go_to(&listening, other),
        "descriptors" => listening.try_clone().map(drop),
        "reserve" => may_reserve(&listening),
        "memory" => {
            drop(vec![1u8; 64 << 20]);
            give_back();
            Ok(())
        }
        _ => panic!("{action:?}"),
    };
    std::process::exit(match outcome {
        Ok(()) => 10,
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => 11,
        Err(_) => 12,
    });
}

/// Whether a process's first thread could be sent a signal; none is.
fn may_signal(process: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::syscall(libc::SYS_tgkill, process, process, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A process is to get a signal for what happens at a descriptor.
fn events_go_to(descriptor: &TcpListener, process: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETOWN, process) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel is reached with the order to reserve what is no disk, which it refuses in its own way.
fn may_reserve(descriptor: &TcpListener) -> io::Result<()> {
    let reserve = 0x4010_70c9u32;
    let nothing = [0u64; 2];
    // SAFETY: a descriptor that is no disk takes nothing from memory, and the memory is there.
    match unsafe {
        libc::ioctl(
            descriptor.as_raw_fd(),
            libc::Ioctl::from(reserve),
            nothing.as_ptr(),
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn executable_memory() -> io::Result<()> {
    // SAFETY: a new anonymous mapping touches no memory in use.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn try_it(thread: &str, strict: &str, action: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::confined", "--nocapture"])
        .env(WHAT, format!("{thread} {strict} {action}"))
        .output()
        .unwrap()
        .status
}

#[test]
fn a_confined_thread_opens_and_starts_nothing() {
    for thread in [
        "vcpu", "io", "landing", "log-file", "replay", "operator", "disk", "bailiff", "warden",
    ] {
        for action in ["open", "create", "socket", "thread", "execute"] {
            let status = try_it(thread, "lenient", action);
            assert_eq!(status.code(), Some(11), "{thread} {action}: {status}");
        }
    }
    for action in ["socket", "thread", "execute"] {
        let status = try_it("arbiter", "lenient", action);
        assert_eq!(status.code(), Some(11), "arbiter {action}: {status}");
    }
    assert_eq!(try_it("arbiter", "lenient", "open").code(), Some(10));
    for action in ["open", "create", "unix", "thread", "execute"] {
        let status = try_it("remote-arbiter", "lenient", action);
        assert_eq!(status.code(), Some(11), "remote-arbiter {action}: {status}");
    }
    let status = try_it("remote-arbiter", "strict", "connect");
    assert_eq!(status.code(), Some(10), "remote-arbiter connect: {status}");
}

#[test]
fn what_a_thread_needs_stays() {
    for thread in [
        "vcpu",
        "io",
        "arbiter",
        "remote-arbiter",
        "landing",
        "log-file",
        "replay",
        "operator",
        "disk",
        "bailiff",
        "warden",
    ] {
        let status = try_it(thread, "strict", "memory");
        assert_eq!(status.code(), Some(10), "{thread}: {status}");
    }
}

/// Whoever broke into one machine's process has not the means to end another's, which has the same user.
#[test]
fn no_thread_signals_another_process() {
    for thread in [
        "vcpu",
        "io",
        "arbiter",
        "remote-arbiter",
        "recruiter",
        "rdma-recruiter",
        "landing",
        "log-file",
        "replay",
        "operator",
        "disk",
        "bailiff",
        "warden",
    ] {
        for action in ["signal-another", "events-for-another"] {
            let status = try_it(thread, "lenient", action);
            assert_eq!(status.code(), Some(11), "{thread} {action}: {status}");
        }
        for action in ["signal-itself", "descriptors"] {
            let status = try_it(thread, "strict", action);
            assert_eq!(status.code(), Some(10), "{thread} {action}: {status}");
        }
    }
}

/// One thread reserves disks; the others, those with an image among them, do not get as far as the kernel's answer.
#[test]
fn one_thread_reserves() {
    assert_eq!(try_it("warden", "strict", "reserve").code(), Some(12));
    for thread in ["disk", "bailiff", "io", "vcpu", "arbiter"] {
        let status = try_it(thread, "lenient", "reserve");
        assert_eq!(status.code(), Some(11), "{thread}: {status}");
    }
}

#[test]
fn strict_ends_the_process_at_the_first_call_that_is_not_listed() {
    for action in ["open", "socket"] {
        let status = try_it("io", "strict", action);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{action}: {status}");
    }
}

/// A child is started by clone or vfork, which is refused; a process that replaces itself makes the foreign call.
#[test]
fn a_program_cannot_be_started() {
    let status = try_it("io", "lenient", "exec");
    assert_eq!(status.code(), Some(11), "{status}");
}

#[test]
fn switched_off_it_does_nothing() {
    let off = config::Sandbox {
        enabled: false,
        strict: true,
    };
    Sandbox::prepare(&off).unwrap().confine(Thread::Io).unwrap();
    File::open("/dev/null").unwrap();
}

/// The capabilities that the calling thread has, as the kernel tells them: permitted and effective.
fn capabilities() -> [u64; 2] {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    ["CapPrm:", "CapEff:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    })
}

/// Dropping capabilities makes new credentials, and those of the thread that opened a device must stay.
#[test]
fn a_thread_that_uses_a_device_has_shed_what_it_drops_before() {
    let enabled = config::Sandbox {
        enabled: true,
        strict: false,
    };
    let before = capabilities();
    let after = std::thread::spawn(move || {
        shed(&enabled).unwrap();
        let first = capabilities();
        shed(&enabled).unwrap();
        assert_eq!(capabilities(), first);
        first
    });
    let kept = u64::from(WITH_DEVICE);
    assert_eq!(after.join().unwrap(), [before[0] & kept; 2]);
    assert_eq!(capabilities(), before, "another thread's are its own");
}

#[test]
fn only_the_operators_thread_takes_callers_in() {
    assert_eq!(try_it("operator", "strict", "accept").code(), Some(10));
    assert_eq!(try_it("io", "lenient", "accept").code(), Some(11));
    assert_eq!(try_it("operator", "lenient", "connect").code(), Some(11));
    assert_eq!(try_it("operator", "lenient", "exec").code(), Some(11));
}

#[test]
fn only_the_recruiter_of_a_log_over_rdma_opens_files() {
    assert_eq!(try_it("recruiter", "lenient", "open").code(), Some(11));
    assert_eq!(try_it("rdma-recruiter", "lenient", "open").code(), Some(10));
    assert_eq!(try_it("rdma-recruiter", "lenient", "exec").code(), Some(11));
    assert_eq!(
        try_it("rdma-recruiter", "lenient", "execute").code(),
        Some(11)
    );
}
