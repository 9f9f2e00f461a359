//! A mutex that lends its holder the priority of whoever waits for it.
//!
//! A thread of real-time priority that shares a core with one of usual priority must not wait for a lock that the other
//! holds while a third keeps the core: it would wait as long as the usual one does. With priority inheritance the kernel runs
//! the holder at the waiter's priority until it lets go. The standard library has no such mutex; POSIX has.
//!
//! Where the kernel has no priority inheritance it is an ordinary mutex.
//!
//! Unsafe: the POSIX calls, on a mutex that is pinned on the heap and initialised before anyone can see it.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

/// A mutex with priority inheritance. It has no poison: a holder that panicked has let go.
pub struct LendingMutex<T> {
    raw: Box<UnsafeCell<libc::pthread_mutex_t>>,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by the holder of the lock, one thread at a time; the raw mutex is made for many.
unsafe impl<T: Send> Sync for LendingMutex<T> {}
// SAFETY: nothing of it belongs to the thread that made it; nobody holds a lock that is moved, since guards borrow it.
unsafe impl<T: Send> Send for LendingMutex<T> {}

impl<T> LendingMutex<T> {
    /// A mutex around `value`.
    #[must_use]
    pub fn new(value: T) -> Self {
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let raw = Box::new(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
        // SAFETY: the attributes are initialised by the first call, used by the next two and destroyed by the last; the
        // mutex is ours alone, at an address where it stays. If the kernel knows no inheritance, initialising fails and the
        // static initialiser above remains: an ordinary mutex.
        unsafe {
            if libc::pthread_mutexattr_init(attributes.as_mut_ptr()) == 0 {
                libc::pthread_mutexattr_setprotocol(
                    attributes.as_mut_ptr(),
                    libc::PTHREAD_PRIO_INHERIT,
                );
                libc::pthread_mutex_init(raw.get(), attributes.as_ptr());
                libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
            }
        }
        Self {
            raw,
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock. A thread that holds it must not ask again: that is a deadlock.
    pub fn lock(&self) -> Lent<'_, T> {
        // SAFETY: the mutex is initialised and lives as long as `self`.
        let failed = unsafe { libc::pthread_mutex_lock(self.raw.get()) };
        // It can fail only for a mutex that is none, or for a thread that holds it already.
        assert_eq!(failed, 0, "a lock was asked for by its holder");
        Lent { mutex: self }
    }
}

impl<T> Drop for LendingMutex<T> {
    fn drop(&mut self) {
        // SAFETY: nobody else can reach it any more, and nobody holds it.
        unsafe { libc::pthread_mutex_destroy(self.raw.get()) };
    }
}

impl<T: Default> Default for LendingMutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for LendingMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LendingMutex")
    }
}

/// The lock, held; it ends when this is dropped.
pub struct Lent<'a, T> {
    mutex: &'a LendingMutex<T>,
}

impl<T> Deref for Lent<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this thread holds the lock, so nobody writes.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for Lent<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this thread holds the lock, and this borrow is the only one.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for Lent<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread holds it.
        unsafe { libc::pthread_mutex_unlock(self.mutex.raw.get()) };
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[test]
    fn one_holds_it_at_a_time() {
        let mutex = Arc::new(LendingMutex::new(0u64));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let mutex = Arc::clone(&mutex);
                std::thread::spawn(move || {
                    for _ in 0..20_000 {
                        let mut value = mutex.lock();
                        *value += 1;
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(*mutex.lock(), 80_000);
    }

    #[test]
    fn a_holder_that_panicked_has_let_go() {
        let mutex = Arc::new(LendingMutex::new(1));
        let theirs = Arc::clone(&mutex);
        let panicked = std::thread::spawn(move || {
            let _held = theirs.lock();
            panic!("on purpose");
        });
        panicked.join().unwrap_err();
        assert_eq!(*mutex.lock(), 1);
    }

    /// The priority of the calling thread, or of one that it was lent, as the kernel shows it: field 18 of `stat`. -2 and
    /// below are real-time.
    fn priority(task: &str) -> i64 {
        let text = std::fs::read_to_string(format!("/proc/self/task/{task}/stat")).unwrap();
        let after_name = text.rsplit_once(") ").unwrap().1;
        after_name.split(' ').nth(15).unwrap().parse().unwrap()
    }

    #[test]
    fn the_holder_runs_at_the_priority_of_who_waits() {
        let mutex = Arc::new(LendingMutex::new(()));
        let held = mutex.lock();
        // SAFETY: gettid always succeeds.
        let me = unsafe { libc::gettid() }.to_string();
        let usual = priority(&me);
        let theirs = Arc::clone(&mutex);
        let (tell, told) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let parameters = libc::sched_param { sched_priority: 1 };
            // SAFETY: the kernel reads one parameter; 0 is the calling thread.
            let refused =
                unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters) };
            tell.send(refused == 0).unwrap();
            if refused == 0 {
                drop(theirs.lock());
            }
        });
        if told.recv().unwrap() {
            let until = Instant::now() + Duration::from_secs(10);
            while priority(&me) == usual {
                assert!(Instant::now() < until, "nothing was lent");
                std::thread::yield_now();
            }
            assert!(priority(&me) < -1, "{}", priority(&me));
        } else {
            eprintln!("this user may not have a real-time thread: nothing can be lent");
        }
        drop(held);
        waiter.join().unwrap();
        assert_eq!(priority(&me), usual);
    }
}
