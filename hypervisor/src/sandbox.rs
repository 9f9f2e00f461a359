//! What a role's threads may still do once everything is set up.
//!
//! ```text
//!  set up: KVM, TAP, sockets, ring, files ──▶ each thread confines itself ──▶ serve
//!                                               no core dumps, no new privileges,
//!                                               no capabilities, its list of system calls
//! ```
//! A guest that breaks out of its vCPU, or a peer that finds a hole in the code that reads its bytes, gets a thread that can
//! read and write what is open already, and no more: no file, socket, program or process can be opened or started.
//!
//! **Three answers, by two filters.** A call on a thread's list is let through. One that no part of doppel ever makes, and
//! that an intruder makes first (start a program, trace a process, load into the kernel, change namespaces) ends the process:
//! the other side takes over, which is what a pair is for. Any other call fails with EPERM: that a new C library asks for
//! something harmless must not end a machine. `strict` ends the process there too, which shows in tests that the lists are
//! whole.
//!
//! **Threads.** The vCPU thread has KVM's ioctls and the open sockets, the I/O thread the open sockets. The arbiter's thread opens, links
//! and syncs files, so it may do that and nothing else; what it may open is bounded by the user's own rights, as its
//! capabilities are gone. It alone keeps CAP_DAC_OVERRIDE if it has it: a role that runs as root may share an arbiter's
//! directory that belongs to another user. An arbiter over the network has no files but makes IP connections: its
//! names were resolved before. The recruiter's may make sockets, as it calls new backups. The thread that lands a log
//! from TCP has the open sockets, the one that writes a recording its open file, a flight recorder's files of its user's, that of the disk its image and the image's mark, the one that takes a shared disk over its image and a descriptor of the process that it ends, the one that reserves a shared disk the calls for that
//! and, if it has it, CAP_SYS_ADMIN, which kernels before 6.6 ask for, and a replay, which has one thread, KVM's ioctls. The
//! operator's takes in those who connect to the sockets that it listens at, and removes its own at the end: it could remove other
//! files of its user's, and open none.
//!
//! **Other processes** of the user, those of other machines among them, get no signal from any of these threads: neither by name nor by a descriptor
//! that tells of events. (The one that takes a shared disk over has a descriptor of the process that it ends, and of no other.)
//!
//! Memory that both sides or the guest can write is left out of core dumps where it is mapped; the limit here covers the
//! rest of the process, which holds copies of it.
//!
//! Unsafe: `capset`, `setrlimit` and `umask` have no wrapper among our crates.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::backends::block;
use crate::config;

/// CAP_DAC_OVERRIDE: files may be opened whoever they belong to.
const DAC_OVERRIDE: u32 = 1 << 1;
const IPC_LOCK: u32 = 1 << 14;
/// Kernels before 6.6 ask for it where a disk is reserved.
const SYS_ADMIN: u32 = 1 << 21;
const SYS_NICE: u32 = 1 << 23;
/// What is kept where a device is used: to lock its memory, for threads that are to be urgent, and for the arbiter's.
const WITH_DEVICE: u32 = DAC_OVERRIDE | IPC_LOCK | SYS_NICE;
/// `_LINUX_CAPABILITY_VERSION_3`: two words a set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// The type byte of KVM's ioctls, in its place.
const KVM_IOCTLS: u64 = 0xae00;
const IOCTL_TYPE: u64 = 0xff00;
/// That of RDMA's: a log over RDMA is posted, and fenced, by these threads.
const RDMA_IOCTLS: u64 = 0x1b00;

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs the guest, and writes or reads the events lane.
    Vcpu,
    /// Waits for descriptors, speaks with the peer and the world.
    Io,
    /// Asks the arbiter in a directory.
    Arbiter,
    /// Finds a new backup and copies the machine to it.
    Recruiter,
    /// Lands a log from TCP.
    Landing,
    /// Writes a recording.
    LogFile,
    /// Replays a log file.
    Replay,
    /// Writes a flight recorder's directory: it opens, names and removes the files there.
    Flight,
    /// The same where the log goes over RDMA: it opens the device for the new backup. What else it may open is bounded by
    /// the user's own rights, as for the arbiter's thread.
    RdmaRecruiter,
    /// Asks an arbiter over the network.
    RemoteArbiter,
    /// Tells whoever watches the role.
    Operator,
    /// Waits for the death of the primary's process.
    Mourner,
    /// Reads and writes the disk's image, which is open.
    Disk,
    /// Keeps an old primary off a shared disk: ends the process that it has a descriptor of, and takes the image.
    Bailiff,
    /// Reserves a shared disk, which is open.
    Warden,
    /// Writes what others leave to what is open: nobody waits for it.
    Outflow,
}

/// A thread that cannot be confined must not run: the panic ends it, and what needs it with it.
pub const NOT_CONFINED: &str = "the sandbox was prepared, so the kernel takes it";

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter could not be made.
    #[error(
        "the sandbox's filter could not be made: {0}; set sandbox.enabled = false and report this"
    )]
    Filter(seccompiler::BackendError),
    /// The kernel refused one.
    #[error(
        "the kernel refused the sandbox's filter: {0}; it needs CONFIG_SECCOMP_FILTER, or set sandbox.enabled = false"
    )]
    Refused(seccompiler::Error),
    /// The kernel refused to take rights away.
    #[error("the kernel refused to {what}: {source}; set sandbox.enabled = false if it must be so")]
    Rights {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The filters of all threads, made before the first is confined.
#[derive(Clone, Debug)]
pub struct Sandbox {
    filters: Option<Arc<Filters>>,
    /// Threads keep the capabilities that [`shed`] left.
    with_device: bool,
}

#[derive(Debug)]
struct Filters {
    foreign: BpfProgram,
    vcpu: BpfProgram,
    io: BpfProgram,
    arbiter: BpfProgram,
    recruiter: BpfProgram,
    landing: BpfProgram,
    log_file: BpfProgram,
    replay: BpfProgram,
    flight: BpfProgram,
    rdma_recruiter: BpfProgram,
    remote_arbiter: BpfProgram,
    operator: BpfProgram,
    mourner: BpfProgram,
    disk: BpfProgram,
    bailiff: BpfProgram,
    warden: BpfProgram,
    outflow: BpfProgram,
}

impl Sandbox {
    /// Makes the filters, if the configuration wants any.
    ///
    /// # Errors
    /// [`SandboxError::Filter`].
    pub fn prepare(config: &config::Sandbox) -> Result<Self, SandboxError> {
        if !config.enabled {
            return Ok(Self {
                filters: None,
                with_device: false,
            });
        }
        settle_allocator();
        let list = |thread| allow(thread, config.strict).map_err(SandboxError::Filter);
        Ok(Self {
            filters: Some(Arc::new(Filters {
                foreign: foreign().map_err(SandboxError::Filter)?,
                vcpu: list(Thread::Vcpu)?,
                io: list(Thread::Io)?,
                arbiter: list(Thread::Arbiter)?,
                recruiter: list(Thread::Recruiter)?,
                landing: list(Thread::Landing)?,
                log_file: list(Thread::LogFile)?,
                replay: list(Thread::Replay)?,
                flight: list(Thread::Flight)?,
                rdma_recruiter: list(Thread::RdmaRecruiter)?,
                remote_arbiter: list(Thread::RemoteArbiter)?,
                operator: list(Thread::Operator)?,
                mourner: list(Thread::Mourner)?,
                disk: list(Thread::Disk)?,
                bailiff: list(Thread::Bailiff)?,
                warden: list(Thread::Warden)?,
                outflow: list(Thread::Outflow)?,
            })),
            with_device: false,
        })
    }

    /// For threads that use an RDMA device which was opened after [`shed`]: they keep the credentials that opened it. What they
    /// keep besides, they have no call to use.
    #[must_use]
    pub fn with_device(mut self, with_device: bool) -> Self {
        self.with_device = with_device;
        self
    }

    /// Confines the calling thread, for good. Once: the list has no call to confine again.
    ///
    /// # Errors
    /// [`SandboxError::Rights`], [`SandboxError::Refused`].
    pub fn confine(&self, thread: Thread) -> Result<(), SandboxError> {
        let Some(filters) = &self.filters else {
            return Ok(());
        };
        no_core_dumps()?;
        let kept = match thread {
            Thread::RemoteArbiter => 0,
            Thread::Arbiter => DAC_OVERRIDE,
            Thread::Warden => SYS_ADMIN,
            _ if self.with_device => WITH_DEVICE,
            _ => 0,
        };
        keep_capabilities(kept)?;
        let list = match thread {
            Thread::Vcpu => &filters.vcpu,
            Thread::Io => &filters.io,
            Thread::Arbiter => &filters.arbiter,
            Thread::Recruiter => &filters.recruiter,
            Thread::Landing => &filters.landing,
            Thread::LogFile => &filters.log_file,
            Thread::Replay => &filters.replay,
            Thread::Flight => &filters.flight,
            Thread::RdmaRecruiter => &filters.rdma_recruiter,
            Thread::RemoteArbiter => &filters.remote_arbiter,
            Thread::Operator => &filters.operator,
            Thread::Mourner => &filters.mourner,
            Thread::Disk => &filters.disk,
            Thread::Bailiff => &filters.bailiff,
            Thread::Warden => &filters.warden,
            Thread::Outflow => &filters.outflow,
        };
        // Both set no_new_privs. The second needs a call that it does not allow itself, so it comes last.
        for filter in [&filters.foreign, list] {
            seccompiler::apply_filter(filter).map_err(SandboxError::Refused)?;
        }
        Ok(())
    }
}

/// Gives away early what a confined thread that uses an RDMA device has no need of.
///
/// The kernel takes commands for a device that are written to its file, as those of soft-RoCE are, only from threads with the
/// very credentials that opened it, and dropping capabilities makes new ones. So the thread that opens the device, and starts
/// those that use it, drops them first.
///
/// # Errors
/// [`SandboxError::Rights`].
pub fn shed(config: &config::Sandbox) -> Result<(), SandboxError> {
    if config.enabled {
        keep_capabilities(WITH_DEVICE)?;
    }
    Ok(())
}

/// From now on files that this process makes are its user's alone: a recording or a flight recorder's directory holds all that a guest knew.
pub fn keep_files_private() {
    // SAFETY: umask touches no memory and cannot fail.
    unsafe { libc::umask(0o077) };
}

/// When a thread first gives much memory back, the C library reads how the host counts memory (`overcommit_memory`), once for the process:
/// before it is confined. A thread that comes first to it later would open a file, which ends a process that is strictly confined.
fn settle_allocator() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // A thread, as the first one's memory is another matter. If there is none to be had, what follows says so.
        let thread = std::thread::Builder::new().spawn(give_back);
        let _ = thread.map(std::thread::JoinHandle::join);
    });
}

/// Takes memory in parts that are too small to be mappings of their own, and gives all of it back: nearly as much as one heap of a thread holds, as
/// what counts as much has grown with every larger mapping that was freed. It is reserved, not touched.
fn give_back() {
    const PART: usize = 100 << 10;
    let mut parts: Vec<Vec<u8>> = Vec::new();
    while parts.len() * PART < 60 << 20 {
        let mut part = Vec::new();
        // A host that has no more of it to give has none to be given back.
        if part.try_reserve_exact(PART).is_err() {
            break;
        }
        parts.push(part);
    }
    drop(std::hint::black_box(parts));
}

fn no_core_dumps() -> Result<(), SandboxError> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel reads one rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } != 0 {
        return Err(SandboxError::Rights {
            what: "forbid core dumps",
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// Takes from the calling thread every capability but those of `kept` that it has.
fn keep_capabilities(kept: u32) -> Result<(), SandboxError> {
    let header: [u32; 2] = [CAPABILITY_VERSION, 0];
    // Effective, permitted, inheritable; the low word of each, then the high one.
    let mut sets = [0u32; 6];
    // SAFETY: the header asks for the calling thread; version 3 writes two words a set, which is the array.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    let refused = |what| {
        move || SandboxError::Rights {
            what,
            source: io::Error::last_os_error(),
        }
    };
    if got != 0 {
        return Err(refused("say what this thread may do")());
    }
    // Setting them makes new credentials even if they are equal.
    if sets[0] == sets[1] && sets[1] & !kept == 0 && sets[2..] == [0; 4] {
        return Ok(());
    }
    let kept = sets[1] & kept;
    let sets = [kept, kept, 0, 0, 0, 0];
    // SAFETY: as above; the kernel only reads.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    if set != 0 {
        return Err(refused("drop capabilities")());
    }
    Ok(())
}

/// Calls that end the process: no part of doppel makes them after its set-up.
const FOREIGN: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_reboot,
];

/// What every thread needs: open descriptors, memory, waiting, time, its own end. SIGTERM may come to any thread, and its
/// handler tells the I/O thread by a socket.
const COMMON: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_sendto,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What is done to descriptors. Not who gets a signal for one: that could be a process of another machine's, which has the same user.
const DESCRIPTORS: &[libc::c_int] = &[
    libc::F_DUPFD,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// Sockets that are open.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

/// Sockets that are made: to a backup that listens.
const CALLS: &[libc::c_long] = &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind];

/// Finding and opening an RDMA device whose library is loaded: its files below /sys and /dev/infiniband.
const DEVICES: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_prlimit64,
];

/// Records that are read, written aside, linked into place, synced and removed.
const FILES: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_getdents64,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
];

/// Giving a file its name once it is whole.
const NAMING: &[libc::c_long] = &[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2];

/// Having an open file written out.
const SYNCING: &[libc::c_long] = &[libc::SYS_fsync, libc::SYS_fdatasync];

/// Ending a process of which there is a descriptor, hearing what a fence command came to, and taking an open image.
const TAKING: &[libc::c_long] = &[
    libc::SYS_pidfd_send_signal,
    libc::SYS_recvfrom,
    libc::SYS_flock,
    libc::SYS_fadvise64,
];

/// Taking in those who connect to what listens already, and taking the socket's file away at the end.
const LISTENING: &[libc::c_long] = &[libc::SYS_accept4, libc::SYS_unlink, libc::SYS_unlinkat];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?.try_into()
}

fn foreign() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = FOREIGN.iter().map(|call| (*call, Vec::new())).collect();
    compile(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

fn allow(thread: Thread, strict: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let more: &[&[libc::c_long]] = match thread {
        // A log over a stream is written by the vCPU thread.
        Thread::Vcpu | Thread::Io | Thread::Landing | Thread::RemoteArbiter => &[SOCKETS],
        Thread::Arbiter => &[FILES],
        Thread::Flight => &[FILES, NAMING],
        Thread::Recruiter => &[SOCKETS, CALLS],
        Thread::LogFile | Thread::Replay | Thread::Mourner | Thread::Outflow | Thread::Warden => {
            &[]
        }
        Thread::RdmaRecruiter => &[SOCKETS, CALLS, DEVICES],
        Thread::Operator => &[SOCKETS, LISTENING],
        Thread::Disk => &[SYNCING],
        Thread::Bailiff => &[SYNCING, TAKING],
    };
    let mut rules: Rules = COMMON
        .iter()
        .chain(more.iter().copied().flatten())
        .map(|call| (*call, Vec::new()))
        .collect();
    // A vCPU thread is kicked by a signal; no other process is anybody's to signal.
    let own = argument(0, u64::from(u32::MAX), std::process::id().into())?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    let done = |what: &libc::c_int| argument(1, u64::from(u32::MAX), *what as u64);
    let descriptors: Result<Vec<_>, seccompiler::BackendError> =
        DESCRIPTORS.iter().map(done).collect();
    rules.insert(libc::SYS_fcntl, descriptors?);
    // Memory, but none that can be executed.
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![argument(2, executable, 0)?]);
    }
    let ioctls = match thread {
        Thread::Vcpu => vec![
            argument(1, IOCTL_TYPE, KVM_IOCTLS)?,
            argument(1, IOCTL_TYPE, RDMA_IOCTLS)?,
        ],
        Thread::Replay => vec![argument(1, IOCTL_TYPE, KVM_IOCTLS)?],
        Thread::Warden => vec![argument(1, IOCTL_TYPE, block::IOCTLS)?],
        Thread::Io | Thread::Recruiter | Thread::RdmaRecruiter => vec![
            argument(1, u64::from(u32::MAX), libc::FIONBIO)?,
            argument(1, IOCTL_TYPE, RDMA_IOCTLS)?,
        ],
        Thread::RemoteArbiter | Thread::Operator => {
            vec![argument(1, u64::from(u32::MAX), libc::FIONBIO)?]
        }
        Thread::Arbiter
        | Thread::Flight
        | Thread::Landing
        | Thread::LogFile
        | Thread::Mourner
        | Thread::Outflow
        | Thread::Disk
        | Thread::Bailiff => Vec::new(),
    };
    if thread == Thread::RemoteArbiter {
        rules.insert(libc::SYS_connect, Vec::new());
        // New sockets for IP, and no others.
        let family = |family: libc::c_int| argument(0, u64::from(u32::MAX), family as u64);
        rules.insert(
            libc::SYS_socket,
            vec![family(libc::AF_INET)?, family(libc::AF_INET6)?],
        );
    }
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, ioctls);
    }
    let otherwise = if strict {
        SeccompAction::KillProcess
    } else {
        SeccompAction::Errno(libc::EPERM as u32)
    };
    compile(rules, otherwise, SeccompAction::Allow)
}

/// The call's argument number `index`, of which only the bits of `mask` count, is `value`.
fn argument(index: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        index,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask),
        value,
    )?])
}

#[cfg(test)]
mod tests;
