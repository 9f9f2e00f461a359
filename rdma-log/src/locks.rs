//! Locks whose holder may have panicked.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks it, and takes what it guards as it was left if its holder panicked.
///
/// A panic ends the process, or is told where the thread is joined; whoever comes to the lock before that has its own
/// work to bring to an end, and nothing that is guarded here is left half done between two calls of anybody's.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_left_is_there() {
        let mutex = Mutex::new(1);
        let falls = std::panic::AssertUnwindSafe(|| {
            let mut guard = lock(&mutex);
            *guard = 2;
            panic!("its holder falls");
        });
        assert!(std::panic::catch_unwind(falls).is_err());
        assert!(mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 2);
    }
}
