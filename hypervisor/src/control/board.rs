//! Where a role's threads leave what there is to say, for the operator's thread to pick up.
//!
//! Leaving something takes no lock that the operator's thread holds: a queue of bounded length carries it, and what finds that full is
//! counted and lost, because a machine must not wait for those who watch it.
#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use crossbeam::queue::ArrayQueue;
use rdma_log::locks::lock;

use super::status::{Happened, Ordered, Role, Standing};
use crate::backends::wait::Wake;
use crate::orders::{Orders, Pace, Samples};
use crate::protocol::{Answer, Record};
use crate::spool::Spool;
use crate::stage::Stage;

/// What may wait to be picked up: changes of role come a few at a time, and the thread is woken for each.
const WAITING: usize = 256;

/// The longest text of an event.
const TEXT_MAX: usize = 400;

/// How a role stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// What the process is.
    pub role: Role,
    /// How it stands.
    pub standing: Standing,
    /// The record that its state belongs to, once there is one.
    pub record: Option<Record>,
}

/// Something that was left.
#[derive(Debug)]
pub(super) enum Update {
    /// The machine's figures are there from now on.
    Attach(Arc<Samples>, Arc<Orders>),
    /// There is no machine any more, or not yet.
    Detach,
    /// The role stands so.
    Stands(State),
    /// Where the peer's heartbeats come from, if there is a peer.
    Peer(Option<SocketAddr>),
    /// The arbiter was asked; what it said if it gave no answer.
    Arbiter(Option<String>),
    /// Something happened.
    Said(Happened),
    /// Something was ordered, or has come of it.
    Ordered(Ordered),
}

/// What an operator orders of the role that serves a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The backup is to have the machine.
    Switch,
    /// Another backup is to take the place of the one that there is: the one that listens there, or any.
    MigrateBackup(Option<SocketAddr>),
    /// The machine is to be turned off.
    PowerOff,
    /// The machine is to start anew.
    Reset,
    /// The guest may have so much of its time.
    Share(Pace),
    /// The backup is to leave.
    Leave,
    /// The primary is to end as one that failed.
    Fail,
}

impl Command {
    /// In a few words.
    #[must_use]
    pub fn words(self) -> String {
        match self {
            Self::Switch => "switch-over".to_owned(),
            Self::MigrateBackup(None) => "another backup".to_owned(),
            Self::MigrateBackup(Some(address)) => format!("another backup, at {address}"),
            Self::PowerOff => "power-off".to_owned(),
            Self::Reset => "reset".to_owned(),
            Self::Share(Pace::NONE) => "pause".to_owned(),
            Self::Share(Pace::FULL) => "resume".to_owned(),
            Self::Share(pace) => format!("a share of {} %", pace.percent()),
            Self::Leave => "leave".to_owned(),
            Self::Fail => "a failover".to_owned(),
        }
    }
}

/// Orders that may wait for the I/O thread. It takes them within a round, so more than one is somebody's impatience.
const ORDERS: usize = 8;

/// Places for backups that a role can be told of: the hosts of a site.
const PLACES: usize = 64;

/// What a line of the log says of its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// The machine.
    pub name: String,
    /// What this process is to it.
    pub role: Role,
    /// The reign.
    pub epoch: u64,
    /// Where the guest is.
    pub position: u64,
}

/// What every line of the log needs.
#[derive(Debug)]
struct Now {
    state: State,
    orders: Option<Arc<Orders>>,
    stage: Option<Arc<Stage>>,
}

/// The place.
#[derive(Debug)]
pub struct Board {
    name: String,
    updates: ArrayQueue<Update>,
    /// The other way: for the I/O thread, by number.
    commands: ArrayQueue<(u64, Command)>,
    /// The number of the order that the backup is to leave by, until it is taken; 0: there is none.
    leave: AtomicU64,
    /// Rung for it: before there is a machine, a backup waits for this beside its callers.
    dismissal: Wake,
    /// Where backups may listen, beside the places that the role was started with. For the recruiter, which serves nobody.
    places: Mutex<Vec<SocketAddr>>,
    /// Orders that were left there.
    given: AtomicU64,
    lost: AtomicU64,
    over: AtomicBool,
    wake: Wake,
    spool: Arc<Spool>,
    /// Not for the operator's thread, but for lines of the log.
    now: Mutex<Now>,
}

impl Board {
    /// An empty one, of a role that is being set up.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new(name: &str, role: Role) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            updates: ArrayQueue::new(WAITING),
            commands: ArrayQueue::new(ORDERS),
            leave: AtomicU64::new(0),
            dismissal: Wake::new()?,
            places: Mutex::default(),
            given: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            over: AtomicBool::new(false),
            wake: Wake::new()?,
            spool: Arc::new(Spool::new()?),
            now: Mutex::new(Now {
                state: State {
                    role,
                    standing: Standing::Starting,
                    record: None,
                },
                orders: None,
                stage: None,
            }),
        })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        lock(&self.now)
    }

    fn leave(&self, update: Update) {
        if self.updates.push(update).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.wake.ring();
    }

    /// The machine's figures are these from now on, and what is typed at its console goes there.
    pub fn attach(&self, samples: &Arc<Samples>, orders: &Arc<Orders>, stage: &Arc<Stage>) {
        {
            let mut now = self.now();
            now.orders = Some(Arc::clone(orders));
            now.stage = Some(Arc::clone(stage));
        }
        self.leave(Update::Attach(Arc::clone(samples), Arc::clone(orders)));
    }

    /// The machine came to nothing: nothing of it is held here any longer.
    pub fn detach(&self) {
        {
            let mut now = self.now();
            now.orders = None;
            now.stage = None;
        }
        self.leave(Update::Detach);
    }

    /// What the guest's console has let out of late.
    #[must_use]
    pub fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// Where what is typed at the console goes.
    pub(super) fn stage(&self) -> Option<Arc<Stage>> {
        self.now().stage.clone()
    }

    /// The role stands so. Cheap if it did before.
    pub fn stands(&self, state: State) {
        let mut now = self.now();
        if now.state != state {
            now.state = state;
            drop(now);
            self.leave(Update::Stands(state));
        }
    }

    /// The same role stands otherwise.
    pub fn stands_as(&self, standing: Standing) {
        let state = self.now().state;
        self.stands(State { standing, ..state });
    }

    /// Where the peer's heartbeats come from, if there is a peer.
    pub fn peer(&self, address: Option<SocketAddr>) {
        self.leave(Update::Peer(address));
    }

    /// The arbiter was asked, and this came of it.
    pub fn asked(&self, answer: &Answer) {
        self.leave(Update::Arbiter(match answer {
            Answer::Failed { why, .. } => Some(why.clone()),
            Answer::Swapped | Answer::Lost(_) | Answer::Read(_) => None,
        }));
    }

    /// Something happened.
    pub fn said(&self, text: &str, loud: bool) {
        let context = self.context();
        let end = text.floor_char_boundary(TEXT_MAX);
        self.leave(Update::Said(Happened {
            unix_ms: unix_ms(),
            epoch: context.epoch,
            position: context.position,
            loud,
            text: text[..end].to_owned(),
        }));
    }

    /// Leaves an order for the I/O thread: its number, or none if too many wait.
    pub(super) fn order(&self, command: Command) -> Option<u64> {
        let number = self.given.fetch_add(1, Ordering::Relaxed) + 1;
        if command == Command::Leave {
            self.leave.store(number, Ordering::SeqCst);
            self.dismissal.ring();
        } else {
            self.commands.push((number, command)).ok()?;
        }
        let orders = self.now().orders.clone();
        if let Some(orders) = orders {
            orders.ring_reports();
        }
        Some(number)
    }

    /// Where a backup may listen, from now on. False: too many places are known.
    pub fn add_place(&self, place: SocketAddr) -> bool {
        let mut places = lock(&self.places);
        if places.contains(&place) {
            return true;
        }
        let room = places.len() < PLACES;
        if room {
            places.push(place);
        }
        room
    }

    /// Where backups may listen, beside the places that the role was started with.
    #[must_use]
    pub fn places(&self) -> Vec<SocketAddr> {
        let places = lock(&self.places);
        places.clone()
    }

    /// The next order. By the I/O thread, in each of its rounds.
    #[must_use]
    pub fn take_command(&self) -> Option<(u64, Command)> {
        let leave = || match self.leave.swap(0, Ordering::SeqCst) {
            0 => None,
            number => Some((number, Command::Leave)),
        };
        self.commands.pop().or_else(leave)
    }

    /// Whether this backup is told to leave. By a thread that ends the process then; anybody else takes the order.
    #[must_use]
    pub fn is_dismissed(&self) -> bool {
        self.leave.load(Ordering::SeqCst) != 0
    }

    /// Readable once it is.
    pub(crate) fn dismissal(&self) -> &Wake {
        &self.dismissal
    }

    /// An order is under way, or something has come of it: what, or why not.
    pub fn ordered(&self, number: u64, command: Command, outcome: Option<Result<String, String>>) {
        self.leave(Update::Ordered(Ordered {
            number,
            what: command.words(),
            outcome,
        }));
    }

    /// What a line of the log says of the role.
    #[must_use]
    pub fn context(&self) -> Context {
        // Under the lock as little as can be: the I/O thread takes it, too.
        let (state, position) = {
            let now = self.now();
            let orders = now.orders.as_ref();
            (now.state, orders.map_or(0, |orders| orders.position().0))
        };
        Context {
            name: self.name.clone(),
            role: state.role,
            epoch: state.record.map_or(0, |record| record.epoch.0),
            position,
        }
    }

    /// The role is over: the operator's thread ends once it has picked everything up.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.wake.ring();
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(super) fn wake(&self) -> &Wake {
        &self.wake
    }

    pub(super) fn next(&self) -> Option<Update> {
        self.updates.pop()
    }

    /// Updates that found no room since the last call.
    pub(super) fn take_lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

/// Milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_that_does_not_come() {
        let board = Board::new("kv", Role::Primary).unwrap();
        for number in 0..2 * WAITING {
            board.said(&format!("event {number}"), false);
        }
        assert_eq!(board.take_lost(), WAITING as u64);
        assert_eq!(std::iter::from_fn(|| board.next()).count(), WAITING);
    }

    #[test]
    fn a_state_is_left_once_and_a_long_text_is_cut_between_characters() {
        let board = Board::new("kv", Role::Backup).unwrap();
        board.stands_as(Standing::Waiting);
        board.stands_as(Standing::Waiting);
        board.said(&"ä".repeat(TEXT_MAX), true);
        assert!(
            matches!(board.next(), Some(Update::Stands(state)) if state.standing == Standing::Waiting)
        );
        let Some(Update::Said(happened)) = board.next() else {
            panic!("the state was left twice");
        };
        assert_eq!(happened.text, "ä".repeat(TEXT_MAX / 2));
        assert!(board.next().is_none());
    }
}
