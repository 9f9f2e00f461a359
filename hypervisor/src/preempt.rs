//! Preempting a guest that does not exit: when to kick it.
//!
//! An input can only be given at a sync point, and a guest that computes makes none. With strategy `checkpoint` the I/O
//! thread watches: if something has been due for longer than the deferral, it kicks the vCPU, and the recorder makes a place
//! for it between two sync points, by a checkpoint (see `docs/decisions/preemption.md`).
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::position::Position;

/// What happens when something is due for a guest that does not exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// It waits for the guest's next exit.
    #[default]
    Exit,
    /// After the deferral the guest is stopped where it is, and the log gets a checkpoint.
    Checkpoint,
}

/// The vCPU thread is inside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// The last sync point.
    pub position: Position,
    /// Since when (or from when on) a tick or an interrupt is due.
    pub due: Option<Instant>,
}

/// What to do after a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Kick the vCPU now.
    pub kick: bool,
    /// Look again then at the latest.
    pub again: Instant,
}

/// Decides when a guest that does not exit is kicked.
#[derive(Debug)]
pub struct Watch {
    deferral: Duration,
    /// Inputs were first seen waiting then, with the guest at this position.
    inputs: Option<(Position, Instant)>,
    kicked: Option<Instant>,
}

impl Watch {
    /// A watch that lets a guest compute for so long although something is due.
    #[must_use]
    pub fn new(deferral: Duration) -> Self {
        Self {
            deferral,
            inputs: None,
            kicked: None,
        }
    }

    /// Looks at the vCPU thread: what it runs, if it does, and whether inputs were staged that it has not taken.
    pub fn look(&mut self, now: Instant, running: Option<Running>, inputs_wait: bool) -> Verdict {
        // Never later than that: what becomes due while nobody looks is then late by less than twice the deferral.
        let again = now + self.deferral;
        let Some(running) = running else {
            self.inputs = None;
            return Verdict { kick: false, again };
        };
        self.inputs = match self.inputs {
            _ if !inputs_wait => None,
            // It made an exit and has not taken them: it has no room, or takes them one by one.
            Some((position, _)) if position != running.position => Some((running.position, now)),
            None => Some((running.position, now)),
            seen => seen,
        };
        let since = [running.due, self.inputs.map(|(_, since)| since)];
        let Some(first) = since.into_iter().flatten().min() else {
            return Verdict { kick: false, again };
        };
        // A guest that could not be interrupted where it was kicked (interrupts were off) is kicked again, a little later.
        let rest = self.kicked.map(|kicked| kicked + self.deferral / 4);
        let at = rest.map_or(first + self.deferral, |rest| {
            rest.max(first + self.deferral)
        });
        if now < at {
            return Verdict {
                kick: false,
                again: at.min(again),
            };
        }
        self.kicked = Some(now);
        Verdict {
            kick: true,
            again: now + self.deferral / 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFERRAL: Duration = Duration::from_millis(4);

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    fn running(position: u64, due: Option<Instant>) -> Option<Running> {
        Some(Running {
            position: Position(position),
            due,
        })
    }

    #[test]
    fn a_due_tick_is_deferred_and_then_forced() {
        let start = Instant::now();
        let mut watch = Watch::new(DEFERRAL);
        let tick = Some(at(start, 10));
        let early = watch.look(at(start, 9), running(1, tick), false);
        assert_eq!(
            early,
            Verdict {
                kick: false,
                again: at(start, 13)
            }
        );
        let due = watch.look(at(start, 13), running(1, tick), false);
        assert_eq!(
            due,
            Verdict {
                kick: false,
                again: at(start, 14)
            }
        );
        assert!(watch.look(at(start, 14), running(1, tick), false).kick);
        // Not twice for the same, but again if it did not help.
        assert!(!watch.look(at(start, 14), running(1, tick), false).kick);
        assert!(watch.look(at(start, 15), running(1, tick), false).kick);
        assert!(
            !watch
                .look(at(start, 30), running(1, Some(at(start, 28))), false)
                .kick
        );
    }

    #[test]
    fn a_guest_that_waits_or_has_nothing_due_is_left_alone() {
        let start = Instant::now();
        let mut watch = Watch::new(DEFERRAL);
        for millis in 0..100 {
            let now = at(start, millis);
            assert_eq!(
                watch.look(now, None, true),
                Verdict {
                    kick: false,
                    again: now + DEFERRAL
                }
            );
            assert_eq!(
                watch.look(now, running(1, None), false),
                Verdict {
                    kick: false,
                    again: now + DEFERRAL
                }
            );
        }
    }

    #[test]
    fn staged_inputs_are_forced_only_on_a_guest_that_makes_no_exit() {
        let start = Instant::now();
        let mut watch = Watch::new(DEFERRAL);
        for millis in 0..50 {
            assert!(
                !watch
                    .look(at(start, millis), running(millis / 3, None), true)
                    .kick,
                "{millis}"
            );
        }
        assert!(!watch.look(at(start, 60), running(99, None), true).kick);
        assert!(!watch.look(at(start, 63), running(99, None), true).kick);
        assert!(watch.look(at(start, 64), running(99, None), true).kick);
    }
}
