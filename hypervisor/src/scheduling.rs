//! What the host's scheduler does to our threads: how urgent one is, and how long one has stood in line for a CPU.
//!
//! Heartbeats must not stand in line behind whatever else keeps a core busy: with busy processes beside a pair on two cores the
//! I/O thread stood there for up to 136 ms at a time, a thread of real-time priority for under 3 (`docs/decisions/detector.md`).
//! Only a thread that sleeps nearly always may have such a priority, and only if it never waits for another one without
//! lending it. What it starts does not inherit it.
//!
//! Unsafe: `sched_setscheduler`, `setpriority` and `gettid` have no wrapper among our crates.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde::Serialize;

/// How urgent a thread is to the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Urgency {
    /// Before every thread of usual priority (SCHED_RR).
    RealTime,
    /// A larger share of the CPU than others have (a negative nice value).
    Nice,
    /// Like every other: the host allows no more.
    Usual,
}

/// The lowest real-time priority: before every usual thread, behind whatever else the host has made real-time.
const LOWEST_REAL_TIME: i32 = 1;

/// Sixteen times the weight of a usual thread and more; the last five steps are left to the host's own.
const NICE: i32 = -15;

/// A tenth of the weight of a usual thread: what it does takes microseconds a second.
const PATIENT: i32 = 10;

/// Makes the calling thread as urgent as the host permits: with CAP_SYS_NICE, RLIMIT_RTPRIO or RLIMIT_NICE. Only for a thread that
/// sleeps nearly always.
pub fn make_this_thread_urgent() -> Urgency {
    let parameters = libc::sched_param {
        sched_priority: LOWEST_REAL_TIME,
    };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel reads one parameter; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } == 0 {
        return Urgency::RealTime;
    }
    // SAFETY: no memory is passed; on Linux 0 is the calling thread, not its process.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == 0 {
        return Urgency::Nice;
    }
    Urgency::Usual
}

/// Gives way to the other threads of the host: a smaller share of the CPU where there is not enough for all. For a thread that nobody
/// waits for.
pub fn make_this_thread_patient() {
    // SAFETY: no memory is passed; on Linux 0 is the calling thread, not its process.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, PATIENT) };
}

/// What the host would permit, tried on a thread of its own.
#[must_use]
pub fn permitted_urgency() -> Urgency {
    std::thread::spawn(make_this_thread_urgent)
        .join()
        .unwrap_or(Urgency::Usual)
}

/// One look at a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    at: Instant,
    /// Nanoseconds on a CPU.
    ran: u64,
    /// Nanoseconds in line for one. The kernel adds a wait when it is over.
    stood: u64,
    /// It has a CPU or stands in line for one.
    runnable: bool,
}

/// Tells how long a thread that makes no progress has stood in line for a CPU meanwhile.
#[derive(Debug)]
pub struct StandingInLine {
    /// `schedstat` and `stat` of the thread, opened before it was confined.
    figures: Option<(File, File)>,
    account: Account,
}

/// A thread that finishes its turns within this time is not looked at: looking costs some microseconds. It is short against
/// the time after which a thread counts as wedged.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// How a turn has gone so far. Pure.
#[derive(Debug, Default)]
struct Account {
    turns: u64,
    since: Option<Instant>,
    first: Option<Look>,
    last: Option<Look>,
    /// Since when the thread has been runnable and nothing else has changed.
    waiting_since: Option<Instant>,
    known: Duration,
}

impl Account {
    /// Whether this turn is worth a look.
    fn wants_look(&mut self, turns: u64, now: Instant) -> bool {
        match self.since {
            Some(since) if self.turns == turns => now.duration_since(since) >= LOOK_AFTER,
            _ => {
                *self = Self {
                    turns,
                    since: Some(now),
                    ..Self::default()
                };
                false
            }
        }
    }

    /// Takes a look; how long the thread has stood in line since the first look at this turn.
    fn take(&mut self, look: Look) -> Duration {
        let first = *self.first.get_or_insert(look);
        let unchanged = self
            .last
            .is_some_and(|last| (last.ran, last.stood) == (look.ran, look.stood));
        if !unchanged {
            self.waiting_since = None;
        }
        if look.runnable && unchanged {
            let before = self.last.map_or(look.at, |last| last.at);
            self.waiting_since.get_or_insert(before);
        }
        self.last = Some(look);
        let over = Duration::from_nanos(look.stood.saturating_sub(first.stood));
        let under_way = match self.waiting_since {
            Some(since) if look.runnable => look.at.saturating_duration_since(since),
            _ => Duration::ZERO,
        };
        // A wait that began before the first look is not of this account.
        let most = look.at.saturating_duration_since(first.at);
        self.known = self.known.max((over + under_way).min(most));
        self.known
    }
}

impl StandingInLine {
    /// Knows no thread: nothing is ever told.
    #[must_use]
    pub fn of_nobody() -> Self {
        Self {
            figures: None,
            account: Account::default(),
        }
    }

    /// Of the calling thread, which must not be confined yet. A kernel without these figures tells nothing.
    #[must_use]
    pub fn of_this_thread() -> Self {
        let open = || -> io::Result<(File, File)> {
            // Opened through the link they stay this thread's own.
            Ok((
                File::open("/proc/thread-self/schedstat")?,
                File::open("/proc/thread-self/stat")?,
            ))
        };
        Self {
            figures: open().ok(),
            account: Account::default(),
        }
    }

    /// The thread is in the turn of this number and has not finished it. How long it has certainly stood in line since.
    pub fn told(&mut self, turns: u64, now: Instant) -> Duration {
        if !self.account.wants_look(turns, now) {
            return Duration::ZERO;
        }
        match self.look(now) {
            Some(look) => self.account.take(look),
            None => self.account.known,
        }
    }

    fn look(&self, at: Instant) -> Option<Look> {
        let (schedstat, stat) = self.figures.as_ref()?;
        let mut bytes = [0; 512];
        let length = schedstat.read_at(&mut bytes, 0).ok()?;
        let mut words = std::str::from_utf8(&bytes[..length])
            .ok()?
            .split_ascii_whitespace();
        let ran = words.next()?.parse().ok()?;
        let stood = words.next()?.parse().ok()?;
        let length = stat.read_at(&mut bytes, 0).ok()?;
        // The name before it may hold anything, a parenthesis too.
        let name_ends = bytes[..length].iter().rposition(|&byte| byte == b')')?;
        let runnable = bytes.get(name_ends + 2) == Some(&b'R');
        Some(Look {
            at,
            ran,
            stood,
            runnable,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_urgent_thread_is_urgent_and_what_it_starts_is_not() {
        let policy = |what: &str| {
            // SAFETY: no memory is passed; 0 is the calling thread.
            let (policy, nice) = unsafe {
                (
                    libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK,
                    libc::getpriority(libc::PRIO_PROCESS, 0),
                )
            };
            eprintln!("{what}: policy {policy}, nice {nice}");
            (policy, nice)
        };
        let usual = policy("a usual thread");
        let (urgency, own, started) = std::thread::spawn(move || {
            let urgency = make_this_thread_urgent();
            let own = policy("an urgent one");
            let started = std::thread::spawn(move || policy("one that it started"));
            (urgency, own, started.join().unwrap())
        })
        .join()
        .unwrap();
        match urgency {
            Urgency::RealTime => {
                assert_eq!(own.0, libc::SCHED_RR);
                assert_eq!(started, (libc::SCHED_OTHER, 0));
            }
            Urgency::Nice => assert_eq!(own.1, NICE),
            Urgency::Usual => assert_eq!(own, usual),
        }
        assert_eq!(
            permitted_urgency(),
            urgency,
            "the same is permitted each time"
        );
    }

    #[test]
    fn a_thread_that_sleeps_has_not_stood_in_line() {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            tell.send(StandingInLine::of_this_thread()).unwrap();
            while !ended.load(Ordering::SeqCst) {
                std::thread::park();
            }
        });
        let mut standing = told.recv().unwrap();
        assert!(standing.figures.is_some(), "this kernel has no schedstat");
        let start = Instant::now();
        let mut stood = Duration::ZERO;
        while start.elapsed() < 200 * MS {
            stood = standing.told(7, Instant::now());
            std::thread::sleep(5 * MS);
        }
        over.store(true, Ordering::SeqCst);
        sleeper.thread().unpark();
        sleeper.join().unwrap();
        assert_eq!(stood, Duration::ZERO);
    }

    #[test]
    fn a_thread_that_shares_its_core_with_busy_ones_has_stood_in_line() {
        // Three threads on one core: each stands in line two thirds of the time.
        let core = core_affinity::get_core_ids().unwrap()[0];
        let over = Arc::new(AtomicBool::new(false));
        let (tell, told) = std::sync::mpsc::channel();
        let busy: Vec<_> = (0..3)
            .map(|_| {
                let (over, tell) = (Arc::clone(&over), tell.clone());
                std::thread::spawn(move || {
                    assert!(core_affinity::set_for_current(core));
                    tell.send(StandingInLine::of_this_thread()).unwrap();
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        let mut standing = told.recv().unwrap();
        let start = Instant::now();
        let mut stood = Duration::ZERO;
        // As long as it takes: a time limit would judge the host's scheduler.
        while stood < 50 * MS {
            assert!(start.elapsed() < Duration::from_secs(30), "{stood:?}");
            stood = standing.told(7, Instant::now());
            std::thread::sleep(5 * MS);
        }
        let since = start.elapsed();
        over.store(true, Ordering::Relaxed);
        for thread in busy {
            thread.join().unwrap();
        }
        assert!(stood < since, "{stood:?} of {since:?}");
        // The next turn begins with nothing.
        assert_eq!(standing.told(8, Instant::now()), Duration::ZERO);
    }

    proptest! {
        /// Whatever a thread does, what is told is never more than what it really stood in line, nor shrinks within a turn.
        #[test]
        fn never_more_is_told_than_was_stood(steps in prop::collection::vec((0..3u8, 1..40u64), 1..200)) {
            let start = Instant::now();
            let mut account = Account::default();
            account.wants_look(1, start);
            // The kernel's own books: a wait is added when it is over.
            let (mut now, mut ran, mut booked, mut waiting) = (start, 0, 0, 0);
            let (mut truly, mut last) = (Duration::ZERO, Duration::ZERO);
            for (what, ms) in steps {
                for _ in 0..ms {
                    now += MS;
                    let nanos = MS.as_nanos() as u64;
                    match what {
                        0 => {
                            booked += std::mem::take(&mut waiting);
                            ran += nanos;
                        }
                        1 => {
                            waiting += nanos;
                            truly += MS;
                        }
                        _ => booked += std::mem::take(&mut waiting),
                    }
                    if account.wants_look(1, now) {
                        let look = Look { at: now, ran, stood: booked, runnable: what < 2 };
                        let told = account.take(look);
                        prop_assert!(told <= truly, "{told:?} of {truly:?}");
                        prop_assert!(told >= last);
                        last = told;
                    }
                }
            }
        }
    }
}
