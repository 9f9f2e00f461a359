//! A backup that does not keep up at all: when that is so, and what becomes of it.
//!
//! The primary waits for a backup that is further behind than its window, so a slow one slows the guest down with it, for as long as it
//! is slow. How much of that is too much is a policy of whoever runs the machine.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{Lag, LagPolicy};

/// Looks in the time that is judged. A verdict is late by one of them at most.
const LOOKS: u32 = 16;

/// A guest that got less than a quarter of its time because of the backup, and stood for the rest, is at its floor.
const STOOD: (u32, u32) = (3, 4);

/// What is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The guest has stood for most of this time, and stays protected all the same.
    Slowed(Duration),
    /// The backup keeps up again.
    KeepsUp,
    /// The guest has stood for most of this time, and the backup is to be let go.
    Drop(Duration),
}

/// Watches for how long the guest stands.
#[derive(Debug)]
pub(super) struct Watch {
    lag: Lag,
    /// When it was looked, and for how long the guest had stood in all.
    looks: VecDeque<(Instant, Duration)>,
    slowed: bool,
}

impl Watch {
    pub(super) fn new(lag: Lag) -> Self {
        Self {
            lag,
            looks: VecDeque::with_capacity(LOOKS as usize + 2),
            slowed: false,
        }
    }

    /// There is no backup, or another one.
    pub(super) fn forget(&mut self) {
        self.looks.clear();
        self.slowed = false;
    }

    /// The guest has stood for so long in all.
    pub(super) fn look(&mut self, now: Instant, stood: Duration) -> Option<Found> {
        let after = self.lag.after();
        let due = |&(last, _): &(Instant, Duration)| now.duration_since(last) >= after / LOOKS;
        if !self.looks.back().is_none_or(due) {
            return None;
        }
        self.looks.push_back((now, stood));
        // The first look is the youngest that is old enough to judge by.
        while let Some(&(second, _)) = self.looks.get(1)
            && now.duration_since(second) >= after
        {
            self.looks.pop_front();
        }
        let &(since, before) = self.looks.front()?;
        let span = now.duration_since(since);
        if span < after {
            return None;
        }
        let at_floor = stood.saturating_sub(before) >= span * STOOD.0 / STOOD.1;
        if at_floor && self.lag.policy == LagPolicy::Drop {
            self.forget();
            return Some(Found::Drop(span));
        }
        if at_floor == self.slowed {
            return None;
        }
        self.slowed = at_floor;
        Some(if at_floor {
            Found::Slowed(span)
        } else {
            Found::KeepsUp
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found when the guest stands for `stands` of every 100 ms, for three seconds and a second without; and when.
    fn found(policy: LagPolicy, stands: u64) -> Vec<(u64, Found)> {
        let lag = Lag {
            policy,
            after_ms: 1000,
        };
        let (mut watch, start) = (Watch::new(lag), Instant::now());
        let mut stood = Duration::ZERO;
        (0..400)
            .filter_map(|round| {
                if round < 300 {
                    stood += Duration::from_millis(stands) / 10;
                }
                let now = start + Duration::from_millis(10 * round);
                watch.look(now, stood).map(|found| (10 * round, found))
            })
            .collect()
    }

    #[test]
    fn a_guest_that_stands_most_of_its_time_is_told_of_once_and_a_backup_that_keeps_up_again_too() {
        let told = found(LagPolicy::Throttle, 90);
        let [(slowed, Found::Slowed(span)), (back, Found::KeepsUp)] = told[..] else {
            panic!("{told:?}");
        };
        assert!((1000..1200).contains(&slowed), "{slowed}");
        assert!(span >= Duration::from_secs(1));
        assert!((3000..3500).contains(&back), "{back}");
        assert_eq!(found(LagPolicy::Throttle, 60), []);
        assert_eq!(found(LagPolicy::Drop, 60), []);
    }

    #[test]
    fn such_a_backup_is_let_go_where_that_is_the_policy() {
        let told = found(LagPolicy::Drop, 90);
        let Some(&(first, Found::Drop(_))) = told.first() else {
            panic!("{told:?}");
        };
        assert!((1000..1200).contains(&first), "{first}");
        // Whoever is let go is judged anew if it is still there.
        assert!(told.iter().skip(1).all(|&(at, _)| at >= first + 1000));
    }

    #[test]
    fn another_backup_begins_with_a_clean_sheet() {
        let lag = Lag {
            policy: LagPolicy::Drop,
            after_ms: 1000,
        };
        let (mut watch, start) = (Watch::new(lag), Instant::now());
        let mut look = |ms: u64, forget: bool| {
            if forget {
                watch.forget();
            }
            watch.look(start + Duration::from_millis(ms), Duration::from_millis(ms))
        };
        for ms in (0..1000).step_by(10) {
            assert_eq!(look(ms, false), None);
        }
        assert_eq!(look(1000, true), None);
        assert_eq!(look(1900, false), None);
        assert!(matches!(look(2000, false), Some(Found::Drop(_))));
    }
}
