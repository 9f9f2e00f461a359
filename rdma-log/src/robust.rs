//! A robust futex: the kernel says in shared memory that a thread has died, before it takes the rest of its process down.
//!
//! A socket tells of its process's death when the last thread is gone, the memory has been given back and the files are
//! closed: milliseconds for a process that holds a virtual machine. A thread's robust list is looked through first of
//! all. The writer's thread enters a word of the log's control page there; the reader sleeps on that word.
//!
//! The other threads of the process may run on for a moment, so this is no proof that nothing more is committed: that is
//! the fence's.
//!
//! Unsafe: the list that the kernel walks. Head and node are leaked, so that they outlive the thread; the word's memory is kept
//! mapped as long as the node is on the list. The peer can write the word, and no address in the list.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::time::Duration;

use crate::control::LogWords;
use crate::futex::FutexWord;
use crate::region::Words;

/// Of `linux/futex.h`: somebody waits, so the kernel wakes when the holder dies.
const FUTEX_WAITERS: u32 = 0x8000_0000;
/// The holder has died.
const FUTEX_OWNER_DIED: u32 = 0x4000_0000;

/// `struct robust_list`.
#[repr(C)]
struct Node {
    next: *mut Node,
}

/// `struct robust_list_head`.
#[repr(C)]
struct Head {
    list: Node,
    futex_offset: libc::c_long,
    list_op_pending: *mut Node,
}

/// The writer's part of a connection's word; for the thread whose death is to be told.
pub struct RobustKey {
    words: Words<LogWords>,
}

impl fmt::Debug for RobustKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RobustKey")
    }
}

impl RobustKey {
    pub(crate) fn new(words: Words<LogWords>) -> Self {
        Self { words }
    }
}

/// The calling thread, as the one whose death the kernel tells of. It stays with that thread.
///
/// It takes the place of the thread's list of robust POSIX mutexes: the thread must hold none.
pub struct RobustHolder {
    head: *mut Head,
    node: *mut Node,
    held: Option<RobustKey>,
}

impl fmt::Debug for RobustHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RobustHolder")
            .field("holds", &self.held.is_some())
            .finish_non_exhaustive()
    }
}

impl RobustHolder {
    /// Registers the calling thread's list, with nothing on it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of_this_thread() -> io::Result<Self> {
        let head = Box::leak(Box::new(Head {
            list: Node {
                next: ptr::null_mut(),
            },
            futex_offset: 0,
            list_op_pending: ptr::null_mut(),
        }));
        head.list.next = &raw mut head.list;
        let head = ptr::from_mut(head);
        let node = Box::leak(Box::new(Node {
            // SAFETY: the head was leaked just now: its address is good for ever.
            next: unsafe { &raw mut (*head).list },
        }));
        // SAFETY: the list is empty and stays where it is; the length is that of the kernel's structure.
        let refused = unsafe { libc::syscall(libc::SYS_set_robust_list, head, size_of::<Head>()) };
        if refused != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            head,
            node,
            held: None,
        })
    }

    /// From now on the reader of this connection is told when this thread dies; that of an earlier one no more.
    pub fn hold(&mut self, key: RobustKey) {
        self.let_go();
        let word = &key.words.robust().0;
        // SAFETY: it takes nothing and cannot fail.
        let thread = unsafe { libc::gettid() } as u32;
        word.store(thread | FUTEX_WAITERS);
        // A reader that came first sleeps on the value before.
        word.wake();
        let offset = word.address() as isize - self.node as isize;
        // SAFETY: the head is leaked; the kernel reads it only when this very thread dies.
        unsafe { ptr::write_volatile(&raw mut (*self.head).futex_offset, offset as libc::c_long) };
        // The node goes on the list when all else is in place.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { ptr::write_volatile(&raw mut (*self.head).list.next, self.node) };
        self.held = Some(key);
    }

    /// From now on nobody is told.
    pub fn let_go(&mut self) {
        // SAFETY: as in `hold`.
        unsafe { ptr::write_volatile(&raw mut (*self.head).list.next, &raw mut (*self.head).list) };
        compiler_fence(Ordering::SeqCst);
        self.held = None;
    }
}

impl Drop for RobustHolder {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// The reader's part of the word; for a thread that does nothing but wait.
pub struct DeathWatch {
    words: Words<LogWords>,
}

impl fmt::Debug for DeathWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeathWatch")
    }
}

impl DeathWatch {
    pub(crate) fn new(words: Words<LogWords>) -> Self {
        Self { words }
    }

    fn word(&self) -> &FutexWord {
        &self.words.robust().0
    }

    /// Whether the writer's thread is dead; waits for it, at most so long.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let seen = self.word().load();
        if seen & FUTEX_OWNER_DIED == 0 {
            self.word().sleep(seen, limit);
        }
        self.word().load() & FUTEX_OWNER_DIED != 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    fn word() -> (RobustKey, DeathWatch) {
        let words = Words::<LogWords>::heap();
        (RobustKey::new(words.clone()), DeathWatch::new(words))
    }

    #[test]
    fn a_thread_that_ends_while_it_holds_is_told_of() {
        let (key, watch) = word();
        let (tell, told) = channel();
        let (end, ends) = channel::<()>();
        let holder = std::thread::spawn(move || {
            let mut holder = RobustHolder::of_this_thread().unwrap();
            holder.hold(key);
            tell.send(()).unwrap();
            let _ = ends.recv();
            // As one that is killed: nothing is dropped.
            std::mem::forget(holder);
        });
        told.recv().unwrap();
        assert!(!watch.wait(SHORT), "it lives");
        let waiter = std::thread::spawn(move || {
            let since = Instant::now();
            while !watch.wait(LONG) {
                assert!(since.elapsed() < LONG);
            }
            since.elapsed()
        });
        drop(end);
        holder.join().unwrap();
        assert!(waiter.join().unwrap() < LONG);
    }

    #[test]
    fn one_that_let_go_is_not() {
        let (key, watch) = word();
        std::thread::spawn(move || {
            let mut holder = RobustHolder::of_this_thread().unwrap();
            holder.hold(key);
        })
        .join()
        .unwrap();
        assert!(!watch.wait(SHORT));
    }

    #[test]
    fn of_two_connections_the_later_one_is_told() {
        let ((first, first_watch), (second, second_watch)) = (word(), word());
        std::thread::spawn(move || {
            let mut holder = RobustHolder::of_this_thread().unwrap();
            holder.hold(first);
            holder.hold(second);
            std::mem::forget(holder);
        })
        .join()
        .unwrap();
        assert!(second_watch.wait(LONG));
        assert!(!first_watch.wait(SHORT));
    }
}
