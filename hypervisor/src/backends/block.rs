//! What the kernel is asked of an image besides reading and writing: to forget what it has cached of it, and persistent reservations, by which
//! a disk itself keeps a host out (NVMe's, or SCSI's; `linux/pr.h`).
//!
//! ```text
//!  primary:  Out ── register ──▶ Registered ── hold ──▶ Holds ── preempted by the heir ──▶ its writes fail
//!                                    │ (refused: the key of whoever the mark names is preempted first)
//!  backup:   Out ── register ──▶ Registered ── take(the primary's key) ──▶ Holds
//! ```
//! The key is of the process, the registration of its host's way to the disk. Reads are left to everybody; what the old holder has
//! under way is aborted.
//!
//! Unsafe: `posix_fadvise` passes no memory, and the ioctls structures of this module's own, as long as their numbers say.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::protocol::Identity;

/// Only the holder writes (`PR_WRITE_EXCLUSIVE`).
const WRITE_EXCLUSIVE: u32 = 1;
/// Whatever key this way to the disk had (`PR_FL_IGNORE_KEY`).
const IGNORE_KEY: u32 = 1;

/// The type byte of the kernel's reservation ioctls, in its place: what a thread that makes them must be allowed.
pub const IOCTLS: u64 = 0x7000;

/// What a disk answers that another one holds: SCSI's status, and NVMe's.
const CONFLICTS: [i32; 2] = [0x18, 0x83];

/// Why a disk is not reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReservationError {
    /// It knows nothing of them.
    #[error(
        "it has no persistent reservations, which some NVMe and SCSI disks have, whole and not as partitions: leave out `reservations` and give a \
         --fence-command ({source})"
    )]
    None {
        /// What the kernel said.
        source: io::Error,
    },
    /// Another host has it.
    #[error(
        "another host has it reserved by a key that nobody of this machine had: if no process uses it any more, clear that by nvme resv-release or \
         sg_persist --clear"
    )]
    Conflict,
    /// Anything else.
    #[error("its reservations fail: {source}")]
    Failed {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A disk's registrations and its reservation.
pub trait Registry {
    /// Registers this way to it by a key, in place of any that it had.
    ///
    /// # Errors
    /// [`ReservationError`].
    fn register(&mut self, key: u64) -> Result<(), ReservationError>;
    /// Reserves it for the way that has this key.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if another has it.
    fn reserve(&mut self, key: u64) -> Result<(), ReservationError>;
    /// Removes the registration by the old key, aborts what it has under way, and reserves for the new one, at once.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if there is none by the old one.
    fn preempt(&mut self, old: u64, new: u64) -> Result<(), ReservationError>;
}

/// A process's part in a disk's reservations; the drawing above.
#[derive(Debug)]
pub struct Reservations<R> {
    registry: R,
    key: u64,
}

/// A process's key, which is never none.
fn key_of(identity: Identity) -> u64 {
    let bytes = identity.to_bytes();
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(first) | 1
}

impl<R: Registry> Reservations<R> {
    /// Of this process; nothing is done yet.
    #[must_use]
    pub fn new(registry: R, me: Identity) -> Self {
        Self {
            registry,
            key: key_of(me),
        }
    }

    /// From now on this process can take it.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn register(&mut self) -> Result<(), ReservationError> {
        self.registry.register(self.key)
    }

    /// Nobody else writes from now on. Whoever had it `before` is known to be gone.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub fn hold(&mut self, before: Option<Identity>) -> Result<(), ReservationError> {
        match (self.registry.reserve(self.key), before) {
            (Err(ReservationError::Conflict), Some(before)) => self.take(before),
            (outcome, _) => outcome,
        }
    }

    /// The old primary writes no more, and this process may.
    ///
    /// # Errors
    /// [`ReservationError`]: nothing is known of the old one then.
    pub fn take(&mut self, from: Identity) -> Result<(), ReservationError> {
        self.registry.preempt(key_of(from), self.key)
    }
}

/// A block device.
#[derive(Debug)]
pub struct Disk(Arc<File>);

impl Disk {
    /// Of this file.
    #[must_use]
    pub fn of(file: &Arc<File>) -> Self {
        Self(Arc::clone(file))
    }

    fn call<T>(&self, number: u32, argument: &T) -> Result<(), ReservationError> {
        // _IOW('p', number, T).
        let request = 1 << 30 | (size_of::<T>() as u32) << 16 | u32::from(b'p') << 8 | number;
        // SAFETY: the kernel reads one T, as long as the request says, which lives through the call.
        let answer = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::Ioctl::from(request),
                std::ptr::from_ref(argument),
            )
        };
        match answer {
            0 => Ok(()),
            status if CONFLICTS.contains(&status) => Err(ReservationError::Conflict),
            status if status > 0 => Err(ReservationError::Failed {
                source: io::Error::other(format!("the disk answered with status {status:#x}")),
            }),
            _ => Err(refused(io::Error::last_os_error())),
        }
    }
}

fn refused(source: io::Error) -> ReservationError {
    match source.raw_os_error() {
        Some(libc::EBADE | libc::EBUSY) => ReservationError::Conflict,
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => ReservationError::None { source },
        _ => ReservationError::Failed { source },
    }
}

/// `struct pr_registration`.
#[repr(C)]
struct Registration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

/// `struct pr_reservation`.
#[repr(C)]
struct Reservation {
    key: u64,
    kind: u32,
    flags: u32,
}

/// `struct pr_preempt`.
#[repr(C)]
struct Preemption {
    old_key: u64,
    new_key: u64,
    kind: u32,
    flags: u32,
}

const _: () = assert!(size_of::<Registration>() == 24);
const _: () = assert!(size_of::<Reservation>() == 16);
const _: () = assert!(size_of::<Preemption>() == 24);

const REGISTER: u32 = 200;
const RESERVE: u32 = 201;
const PREEMPT_ABORT: u32 = 204;

impl Registry for Disk {
    fn register(&mut self, key: u64) -> Result<(), ReservationError> {
        self.call(
            REGISTER,
            &Registration {
                old_key: 0,
                new_key: key,
                flags: IGNORE_KEY,
                pad: 0,
            },
        )
    }

    fn reserve(&mut self, key: u64) -> Result<(), ReservationError> {
        self.call(
            RESERVE,
            &Reservation {
                key,
                kind: WRITE_EXCLUSIVE,
                flags: 0,
            },
        )
    }

    fn preempt(&mut self, old: u64, new: u64) -> Result<(), ReservationError> {
        self.call(
            PREEMPT_ABORT,
            &Preemption {
                old_key: old,
                new_key: new,
                kind: WRITE_EXCLUSIVE,
                flags: 0,
            },
        )
    }
}

/// Has the kernel forget what it has cached of a file that another host may have written since. Nothing of it was written here.
///
/// # Errors
/// What the kernel says.
pub(crate) fn forget_cached(file: &File) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use super::*;

    /// A disk as the standards have it: a registration for each way to it, and one holder.
    #[derive(Debug, Default)]
    struct Drive {
        keys: BTreeMap<&'static str, u64>,
        holder: Option<&'static str>,
    }

    struct Way(&'static str, Rc<RefCell<Drive>>);

    impl Way {
        fn writes(&self) -> bool {
            let drive = self.1.borrow();
            drive.holder.is_none_or(|holder| holder == self.0)
        }
    }

    impl Registry for Way {
        fn register(&mut self, key: u64) -> Result<(), ReservationError> {
            self.1.borrow_mut().keys.insert(self.0, key);
            Ok(())
        }

        fn reserve(&mut self, key: u64) -> Result<(), ReservationError> {
            let mut drive = self.1.borrow_mut();
            let known = drive.keys.get(self.0) == Some(&key);
            if !known || drive.holder.is_some_and(|holder| holder != self.0) {
                return Err(ReservationError::Conflict);
            }
            drive.holder = Some(self.0);
            Ok(())
        }

        fn preempt(&mut self, old: u64, new: u64) -> Result<(), ReservationError> {
            let mut drive = self.1.borrow_mut();
            let victim = drive.keys.iter().find(|(_, key)| **key == old);
            let victim = victim.map(|(way, _)| *way);
            let known = drive.keys.get(self.0) == Some(&new);
            let (Some(victim), true) = (victim, known) else {
                return Err(ReservationError::Conflict);
            };
            drive.keys.remove(victim);
            if drive.holder == Some(victim) {
                drive.holder = Some(self.0);
            }
            Ok(())
        }
    }

    fn identity(of: u8) -> Identity {
        Identity::from_bytes([of; 16])
    }

    fn process(way: &'static str, drive: &Rc<RefCell<Drive>>, of: u8) -> Reservations<Way> {
        Reservations::new(Way(way, Rc::clone(drive)), identity(of))
    }

    #[test]
    fn an_heir_takes_it_and_the_old_primary_writes_no_more() {
        let drive = Rc::default();
        let mut primary = process("a", &drive, 1);
        primary.register().unwrap();
        primary.hold(None).unwrap();
        let mut backup = process("b", &drive, 2);
        backup.register().unwrap();
        assert!(primary.registry.writes() && !backup.registry.writes());
        // A backup does not get it as a machine that is started would.
        let conflict = backup.hold(None).unwrap_err();
        assert!(matches!(conflict, ReservationError::Conflict));
        backup.take(identity(1)).unwrap();
        assert!(!primary.registry.writes() && backup.registry.writes());
        // The zombie has no way back: its registration is gone.
        primary.hold(None).unwrap_err();
        primary.take(identity(2)).unwrap_err();
        // Nor has the heir a second one to take it from.
        backup.take(identity(1)).unwrap_err();
        // Its own next backup, on the first host.
        let mut next = process("a", &drive, 3);
        next.register().unwrap();
        next.take(identity(2)).unwrap();
        assert!(next.registry.writes() && !backup.registry.writes());
    }

    #[test]
    fn a_machine_that_starts_takes_it_from_whoever_its_mark_names_and_from_nobody_else() {
        let drive = Rc::default();
        let mut dead = process("a", &drive, 1);
        dead.register().unwrap();
        dead.hold(None).unwrap();
        let mut started = process("b", &drive, 2);
        started.register().unwrap();
        for before in [None, Some(identity(9))] {
            let refused = started.hold(before).unwrap_err();
            assert!(matches!(refused, ReservationError::Conflict));
        }
        started.hold(Some(identity(1))).unwrap();
        assert!(started.registry.writes() && !dead.registry.writes());
        // On the same host the next process has the way already.
        let mut next = process("b", &drive, 3);
        next.register().unwrap();
        next.hold(Some(identity(2))).unwrap();
        assert!(next.registry.writes());
    }

    #[test]
    fn a_key_is_never_none() {
        assert_eq!(key_of(identity(0)), 1);
        assert_ne!(key_of(identity(2)), key_of(identity(4)));
    }

    #[test]
    fn a_file_has_no_reservations_and_says_so() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut reservations = Reservations::new(Disk::of(&file), identity(1));
        let error = reservations.register().unwrap_err();
        assert!(matches!(error, ReservationError::None { .. }), "{error}");
        assert!(error.to_string().contains("--fence-command"), "{error}");
        forget_cached(&file).unwrap();
    }
}
