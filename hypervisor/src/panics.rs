//! Panics of a role's threads: said, and noticed, all in one place.
//!
//! ```text
//!  any thread panics ──▶ the hook: a line of the log; its name is left here ──▶ the I/O thread's next round takes it ──▶ what follows
//! ```
//! A panic is a bug, and a machine is to outlive one if anybody can have it afterwards:
//!
//! | the thread was for | a primary with a backup that is well | a primary that serves alone | a backup |
//! | --- | --- | --- | --- |
//! | the guest | ends, and its backup takes over | ends: there is no machine any more | is unfit, gives a claim back, and ends |
//! | the pair | ends, and its backup takes over | serves on, and cannot be protected any more | ends, and its primary goes on |
//! | one log | gives its backup up; another may join | goes on without it | ends, and its primary goes on |
//! | none of it | goes on without it | goes on without it | goes on without it |
//!
//! A thread that nobody here knows was for the guest. The hook knows every thread, those of the log's transports as well; a thread that somebody adds is
//! noticed without a word about it here.
#![forbid(unsafe_code)]

use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rdma_log::locks::lock;

/// What a role cannot do without a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Run the guest, and do what it asks.
    Guest,
    /// Be one side of a pair.
    Pair,
    /// Have this log.
    Log,
    /// Nothing, or only what others tell as well.
    Nothing,
}

impl Need {
    /// What the thread of this name is for.
    #[must_use]
    pub fn of(thread: &str) -> Self {
        match thread {
            "arbiter" => Self::Pair,
            "tcp-log" | "tcp-landing" | "rdma-log" | "rdma-reader" => Self::Log,
            // They are asked for what they do, and their end is the answer.
            "vcpu" | "recruiter" | "bailiff" | "warden" | "log-file" => Self::Nothing,
            // A beat that is late, a death that the connection tells, too; those who watch, and their words.
            "heartbeat" | "mourner" | "operator" | "flight" | "outflow" | "gdb" | "relay" => {
                Self::Nothing
            }
            _ => Self::Guest,
        }
    }
}

/// Threads that panicked, and that nobody has taken.
static FALLEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// There are some: looked at in each round.
static ANY: AtomicBool = AtomicBool::new(false);

/// From now on every panic of this process is a line of the log, and is [noticed](take).
pub fn watch() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("without a name");
        say(thread, info);
        note(thread);
    }));
}

fn say(thread: &str, info: &PanicHookInfo<'_>) {
    let backtrace = std::backtrace::Backtrace::capture();
    let trace = match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    tracing::error!("thread {thread} {info}; this is a bug{trace}");
}

fn note(thread: &str) {
    let mut fallen = lock(&FALLEN);
    fallen.push(thread.to_owned());
    ANY.store(true, Ordering::Release);
}

/// The name of a thread that has panicked, once for each. By the I/O thread, in each of its rounds.
#[must_use]
pub fn take() -> Option<String> {
    if !ANY.load(Ordering::Acquire) {
        return None;
    }
    let mut fallen = lock(&FALLEN);
    let thread = fallen.pop();
    ANY.store(!fallen.is_empty(), Ordering::Release);
    thread
}

/// What is said of a thread without which this process goes on.
#[must_use]
pub fn goes_on_without(thread: &str) -> String {
    format!(
        "the thread {thread} is gone by a bug, which the log names; the machine goes on without it"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_that_fell_is_told_once() {
        assert_eq!(take(), None);
        note("courier");
        note("arbiter");
        let mut told = [take().unwrap(), take().unwrap()];
        told.sort_unstable();
        assert_eq!(told, ["arbiter", "courier"]);
        assert_eq!(take(), None);
    }

    #[test]
    fn a_thread_that_nobody_knows_is_one_of_the_guest_s() {
        for thread in [
            "courier",
            "disk",
            "vcpu0",
            "main",
            "without a name",
            "new one",
        ] {
            assert_eq!(Need::of(thread), Need::Guest, "{thread}");
        }
        assert_eq!(Need::of("arbiter"), Need::Pair);
        assert_eq!(Need::of("tcp-log"), Need::Log);
        assert_eq!(Need::of("operator"), Need::Nothing);
    }

    /// Every thread of a role has a name, by which it is known here.
    #[test]
    fn no_thread_of_a_role_is_without_a_name() {
        let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut looked = 0;
        for directory in ["session", "backends/disk", "machine", "control", "flight"] {
            let mut directories = vec![source.join(directory)];
            while let Some(directory) = directories.pop() {
                for entry in std::fs::read_dir(directory).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        directories.push(path);
                        continue;
                    }
                    let text = std::fs::read_to_string(&path).unwrap();
                    let code = text.split("#[cfg(test)]").next().unwrap();
                    if path.ends_with("tests.rs") {
                        continue;
                    }
                    looked += 1;
                    assert!(
                        !code.contains("thread::spawn("),
                        "{} starts a thread without a name",
                        path.display()
                    );
                }
            }
        }
        assert!(looked > 20, "{looked} files");
    }
}
