//! What the kernel is asked of an image besides reading and writing: to forget what it has cached of it, and persistent reservations, by which
//! a disk itself keeps a host out (NVMe's, or SCSI's; `linux/pr.h`).
//!
//! Unsafe: `posix_fadvise` passes no memory, and the ioctls structures of this module's own, as long as their numbers say.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Only the holder writes (`PR_WRITE_EXCLUSIVE`).
const WRITE_EXCLUSIVE: u32 = 1;
/// Whatever key this way to the disk had (`PR_FL_IGNORE_KEY`).
const IGNORE_KEY: u32 = 1;

/// The type byte of the kernel's reservation ioctls, in its place: what a thread that makes them must be allowed.
pub const IOCTLS: u64 = 0x7000;

/// SCSI's status of a reservation conflict, without the byte in which the kernel's middle layer notes the same (0x118 from Linux 6.0 on); and NVMe's, without
/// the bits that say no more of it (do not retry, more to know).
const SCSI_CONFLICT: i32 = 0x18;
const SCSI_STATUS: i32 = !0xff00;
const NVME_CONFLICT: i32 = 0x83;
const NVME_STATUS: i32 = 0x7ff;

/// SCSI's word that there is something else to tell first, or that a request is none. It tells of what has happened to a host meanwhile (that its
/// registration was removed, that the disk was reset) once, in place of doing what it was asked.
const CHECK_CONDITION: i32 = 0x02;

/// How often a disk is asked that has something else to tell: one that was just reset and preempted has two things.
const ASKED: u32 = 3;

/// Why a disk is not reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReservationError {
    /// It knows nothing of them.
    #[error(
        "it has no persistent reservations, which some NVMe and SCSI disks have, whole and not as partitions (files, loop devices and virtio-blk have \
         none): leave out `reservations` and give a --fence-command ({source})"
    )]
    None {
        /// What the kernel said.
        source: io::Error,
    },
    /// Another host has it.
    #[error(
        "another host has it reserved by a key that is none of this machine's last processes': if nothing uses it any more, clear that by sg_persist \
         --out --clear or nvme resv-release --rrela=1, by a key that is registered before"
    )]
    Conflict,
    /// Anything else.
    #[error("its reservations fail: {source}")]
    Failed {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A disk's registrations and its reservation, by one way to it.
pub trait Registry {
    /// Whether it knows of them; nothing changes.
    ///
    /// # Errors
    /// [`ReservationError::None`] if not.
    fn usable(&mut self) -> Result<(), ReservationError>;
    /// Registers this way to it by a key, in place of any that it had; whatever it holds it goes on holding. 0 takes the registration away.
    ///
    /// # Errors
    /// [`ReservationError`].
    fn register(&mut self, key: u64) -> Result<(), ReservationError>;
    /// Reserves it for this way, which has this key. It may have it already.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if another has it, or this way has another key or none.
    fn reserve(&mut self, key: u64) -> Result<(), ReservationError>;
    /// By its own key, removes the registration by the victim's, aborts what that has under way, and reserves for this way if that had it, at once.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if there is none by the victim's, or this way has another key.
    fn preempt(&mut self, own: u64, victim: u64) -> Result<(), ReservationError>;
    /// Gives it free, if this way has it.
    ///
    /// # Errors
    /// [`ReservationError::Conflict`] if this way has another key or none.
    fn release(&mut self, key: u64) -> Result<(), ReservationError>;
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
        judged(self.answer(number, argument)?)
    }

    /// What it answers, when it has told what else there was to tell.
    fn answer<T>(&self, number: u32, argument: &T) -> Result<i32, ReservationError> {
        for _ in 1..ASKED {
            match self.ask(number, argument)? {
                CHECK_CONDITION => {}
                answer => return Ok(answer),
            }
        }
        self.ask(number, argument)
    }

    /// Asks once: what the disk answers, 0 if it is done.
    fn ask<T>(&self, number: u32, argument: &T) -> Result<i32, ReservationError> {
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
            answer if answer >= 0 => Ok(answer),
            _ => Err(refused(io::Error::last_os_error())),
        }
    }
}

/// A disk's answer: the kernel hands on SCSI's status or NVMe's.
fn judged(answer: i32) -> Result<(), ReservationError> {
    match answer {
        0 => Ok(()),
        status if status & SCSI_STATUS == SCSI_CONFLICT => Err(ReservationError::Conflict),
        status if status & NVME_STATUS == NVME_CONFLICT => Err(ReservationError::Conflict),
        status => Err(ReservationError::Failed {
            source: io::Error::other(format!("the disk answered with status {status:#x}")),
        }),
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

/// `struct pr_preempt`. The kernel hands the first key on as that of who preempts and the second as that of who is preempted, both to SCSI and to NVMe,
/// whatever its documentation calls them: its own NFS server calls it so.
#[repr(C)]
struct Preemption {
    own_key: u64,
    victims_key: u64,
    kind: u32,
    flags: u32,
}

const _: () = assert!(size_of::<Registration>() == 24);
const _: () = assert!(size_of::<Reservation>() == 16);
const _: () = assert!(size_of::<Preemption>() == 24);

const REGISTER: u32 = 200;
const RESERVE: u32 = 201;
const RELEASE: u32 = 202;
const PREEMPT_ABORT: u32 = 204;

/// No way to a disk is registered by it but by chance.
const NOBODYS: u64 = 0x6e6f_626f_6479_2773;

impl Registry for Disk {
    fn usable(&mut self) -> Result<(), ReservationError> {
        // In place of a key that this way has not: a disk that knows what that means refuses it.
        let answer = self.answer(
            REGISTER,
            &Registration {
                old_key: NOBODYS,
                new_key: NOBODYS,
                flags: 0,
                pad: 0,
            },
        )?;
        match judged(answer) {
            Err(ReservationError::Failed { source }) if answer == CHECK_CONDITION => {
                Err(ReservationError::None { source })
            }
            Err(ReservationError::Conflict) => Ok(()),
            outcome => outcome,
        }
    }

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
        self.call(RESERVE, &Reservation::of(key))
    }

    fn preempt(&mut self, own: u64, victim: u64) -> Result<(), ReservationError> {
        self.call(
            PREEMPT_ABORT,
            &Preemption {
                own_key: own,
                victims_key: victim,
                kind: WRITE_EXCLUSIVE,
                flags: 0,
            },
        )
    }

    fn release(&mut self, key: u64) -> Result<(), ReservationError> {
        self.call(RELEASE, &Reservation::of(key))
    }
}

impl Reservation {
    fn of(key: u64) -> Self {
        Self {
            key,
            kind: WRITE_EXCLUSIVE,
            flags: 0,
        }
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
    use super::*;

    #[test]
    fn a_file_has_no_reservations_and_says_so() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut disk = Disk::of(&file);
        for answer in [disk.usable(), disk.register(1), disk.preempt(1, 2)] {
            let error = answer.unwrap_err();
            assert!(matches!(error, ReservationError::None { .. }), "{error}");
            assert!(error.to_string().contains("--fence-command"), "{error}");
        }
        forget_cached(&file).unwrap();
    }

    #[test]
    fn a_conflict_is_one_whatever_else_a_disk_says_of_it() {
        judged(0).unwrap();
        // SCSI's; NVMe's, its word not to retry with it, and all bits that say no more.
        for status in [0x18, 0x118, 0x83, 0x4083, 0x7883] {
            let conflict = judged(status).unwrap_err();
            assert!(
                matches!(conflict, ReservationError::Conflict),
                "{status:#x}"
            );
        }
        for status in [0x02, 0x08, 0x85, 0x1_0000, 0x1_0018] {
            let error = judged(status).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(&format!("{status:#x}")), "{text}");
        }
    }
}
