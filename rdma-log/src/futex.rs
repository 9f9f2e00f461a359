//! Sleeping on a word of shared memory, and the bell built on it.
//!
//! A [`Bell`] has two sides in two processes. The sleeper raises its flag, looks again whether there is something to
//! do, and sleeps until the word changes; the ringer, having made something to do, looks at the flag, and only if it is
//! up changes the word and wakes. Each side writes one thing and then reads the other's, so each puts a sequentially
//! consistent fence between the two: at least one of them sees what the other wrote (Dekker), and no wake-up is lost.
//! `tests/loom.rs` tries every interleaving of this.
//!
//! Unsafe: the futex system call, on a reference that lives through the call. Under loom the futex is a mutex and a
//! condition variable that behave like it, without time limits.
#![allow(unsafe_code)]

use std::time::Duration;

use crate::sync::{AtomicU32, Ordering, fence};

/// The word that a sleeper waits on.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct FutexWord {
    word: AtomicU32,
    #[cfg(loom)]
    queue: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl FutexWord {
    pub(crate) fn load(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Where it is.
    #[cfg(not(loom))]
    pub(crate) fn address(&self) -> *mut u32 {
        self.word.as_ptr()
    }

    #[cfg(not(loom))]
    pub(crate) fn store(&self, value: u32) {
        self.word.store(value, Ordering::Release);
    }

    /// Changes the word and wakes everyone who sleeps on it.
    pub(crate) fn bump(&self) {
        self.word.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Wakes everyone who sleeps on it.
    #[cfg(not(loom))]
    pub(crate) fn wake(&self) {
        // SAFETY: the address is that of a live, aligned 32-bit word; FUTEX_WAKE reads no other argument.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAKE,
                i32::MAX,
            );
        }
    }

    /// Sleeps while the word is `expected`. False if the time ran out; true for a wake-up, a changed word, a signal.
    #[cfg(not(loom))]
    pub(crate) fn sleep(&self, expected: u32, limit: Duration) -> bool {
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        // SAFETY: the word and the timespec are live and aligned for the length of the call; the word is only read,
        // so it may lie in a read-only mapping. Without the private flag the kernel finds the sleeper by the page
        // behind the address, so that both processes' mappings are the same futex.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                &raw const timeout,
            )
        };
        rc == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
    }

    #[cfg(loom)]
    fn wake(&self) {
        let _guard = self.queue.0.lock().expect("no panic holds the lock");
        self.queue.1.notify_all();
    }

    #[cfg(loom)]
    fn sleep(&self, expected: u32, _: Duration) -> bool {
        let guard = self.queue.0.lock().expect("no panic holds the lock");
        if self.word.load(Ordering::Relaxed) == expected {
            drop(self.queue.1.wait(guard));
        }
        true
    }
}

/// Both sides' views of a sleeper's flag and its word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bell<'a> {
    /// Written by the sleeper: not 0 while it sleeps or is about to.
    pub(crate) waiting: &'a AtomicU32,
    /// Written by the ringer.
    pub(crate) word: &'a FutexWord,
}

impl Bell<'_> {
    /// Sleeper: announces itself. After this it must look once more whether there is something to do, and then
    /// either [`sleep`](Bell::sleep) with the value returned here or [`disarm`](Bell::disarm).
    pub(crate) fn arm(self) -> u32 {
        let seen = self.word.load();
        self.waiting.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        seen
    }

    /// Sleeper: sleeps until rung since [`arm`](Bell::arm), for `limit` at most. False if the time ran out.
    pub(crate) fn sleep(self, armed: u32, limit: Duration) -> bool {
        let woken = self.word.sleep(armed, limit);
        self.disarm();
        woken
    }

    /// Sleeper: takes the announcement back.
    pub(crate) fn disarm(self) {
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Ringer: wakes the sleeper if there is one. To be called after what it waits for was written.
    pub(crate) fn ring(self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) != 0 {
            self.word.bump();
        }
    }
}
