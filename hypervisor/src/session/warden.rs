//! The thread that has the say in who writes a disk that both sides have, where the disk itself keeps that (`backends/reservations.rs`).
//!
//! ```text
//!  main thread ── usable, hold, settle ──┐
//!  bailiff ────── take, settle ──────────┼──▶ warden ── the ioctls ──▶ disk
//!  I/O thread ─── holds?, release ───────┘
//! ```
//! It alone keeps the right and the calls that it takes (kernels before 6.6 ask for CAP_SYS_ADMIN); where threads of a log over RDMA must have the
//! credentials that opened the device, it has begun before those were shed.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use super::SessionError;
use super::serve::Served;
use crate::backends::block::{Registry, ReservationError};
use crate::backends::disk::{DiskError, OpenImage};
use crate::backends::reservations::Reservations;
use crate::backends::wait::Wake;
use crate::config::Config;
use crate::protocol::{Identity, Reason};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::make_this_thread_urgent;

/// How long the end of a machine waits until its disk is given free. A disk that hangs keeps what it was told last.
const FREE_WITHIN: Duration = Duration::from_secs(5);

/// What is to be done.
#[derive(Debug)]
enum Task {
    Usable,
    Hold(Vec<Identity>),
    Follow(Identity),
    Take(Identity),
    Settle,
    Holds,
    Release,
}

/// What came of it: whether this host has the disk.
type Answer = Result<bool, ReservationError>;

struct Order {
    task: Task,
    answer: Sender<Answer>,
    wake: Option<Arc<Wake>>,
}

/// The thread's handle. It ends when nobody has one.
#[derive(Clone)]
pub(super) struct Warden {
    orders: Sender<Order>,
    image: OpenImage,
}

/// Starts the thread, if this machine's disk is kept so, and has it look whether the disk can.
pub(super) fn start(
    image: Option<&OpenImage>,
    config: &Config,
    me: Identity,
) -> Result<Option<Warden>, SessionError> {
    let Some(image) = image.filter(|_| config.disk.reservations) else {
        return Ok(None);
    };
    let sandbox = Sandbox::prepare(&config.sandbox)?;
    let orders = begin(image.reservations(me), sandbox, config.cpus.urgent)?;
    let warden = Warden {
        orders,
        image: image.clone(),
    };
    warden.ask(Task::Usable)?;
    Ok(Some(warden))
}

fn begin<R: Registry + Send + 'static>(
    mut reservations: Reservations<R>,
    sandbox: Sandbox,
    urgent: bool,
) -> Result<Sender<Order>, SessionError> {
    let (orders, taken) = channel::<Order>();
    thread::Builder::new()
        .name("warden".into())
        .spawn(move || {
            if urgent {
                // A take-over waits for it.
                make_this_thread_urgent();
            }
            sandbox.confine(Thread::Warden).expect(NOT_CONFINED);
            while let Ok(order) = taken.recv() {
                // Whoever asked may not wait for it any more.
                let _ = order.answer.send(perform(&mut reservations, order.task));
                if let Some(wake) = order.wake {
                    wake.ring();
                }
            }
        })
        .map_err(SessionError::host(
            "start the thread that reserves the disk",
        ))?;
    Ok(orders)
}

fn perform<R: Registry>(reservations: &mut Reservations<R>, task: Task) -> Answer {
    match task {
        Task::Usable => reservations.usable(),
        Task::Hold(before) => reservations.hold(&before),
        Task::Follow(primary) => reservations.follow(primary),
        Task::Take(from) => reservations.take(from),
        Task::Settle => reservations.settle(),
        Task::Holds => return reservations.holds(),
        Task::Release => reservations.release(),
    }
    .map(|()| true)
}

fn gone() -> ReservationError {
    ReservationError::Failed {
        source: io::Error::other("the thread for it is gone; this is a bug"),
    }
}

impl Warden {
    fn order(&self, task: Task, wake: Option<Arc<Wake>>) -> Receiver<Answer> {
        let (answer, answered) = channel();
        // That of a thread that is gone shows as no answer.
        let _ = self.orders.send(Order { task, answer, wake });
        answered
    }

    fn ask(&self, task: Task) -> Result<(), DiskError> {
        let answer = self.order(task, None).recv();
        let answer = answer.unwrap_or_else(|_| Err(gone()));
        answer
            .map(drop)
            .map_err(|source| self.image.not_reserved(source))
    }

    /// The machine is started, the arbiter's record naming `owner`: nobody else writes from now on.
    pub(super) fn hold(&self, owner: Option<Identity>) -> Result<(), DiskError> {
        let mut before = self.image.names()?;
        before.extend(owner);
        self.ask(Task::Hold(before))
    }

    /// This side can take the disk from this primary from now on.
    pub(super) fn follow(&self, primary: Identity) -> Result<(), DiskError> {
        self.ask(Task::Follow(primary))
    }

    /// That one writes no more, and this side may.
    pub(super) fn take(&self, from: Identity) -> Result<(), DiskError> {
        self.ask(Task::Take(from))
    }

    /// The image's mark names this process now.
    pub(super) fn settle(&self) -> Result<(), DiskError> {
        self.ask(Task::Settle)
    }

    /// Nobody is to have it from now on.
    pub(super) fn release(&self) -> Result<(), DiskError> {
        self.ask(Task::Release)
    }

    /// Asks whether this side has the disk; the wake is rung when that is known.
    pub(super) fn look(&self, wake: &Arc<Wake>) -> Look {
        Look(self.order(Task::Holds, Some(Arc::clone(wake))))
    }

    /// At the end of this process. A machine that is to end gives its disk free, and a backup its registration. Whoever is replaced leaves it to who replaces it,
    /// and one that fails to the next start.
    pub(super) fn end(&self, outcome: &Result<Served, SessionError>) {
        if let Ok(Served {
            reason: Reason::PoweredOff,
            ..
        }) = outcome
        {
            let freed = self.order(Task::Release, None).recv_timeout(FREE_WITHIN);
            match freed {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::warn!("the disk is not given free: {error}"),
                Err(_) => tracing::warn!("the disk is not given free: it does not answer"),
            }
        }
    }
}

/// A question that is not answered yet.
pub(super) struct Look(Receiver<Answer>);

impl Look {
    /// Whether this side has the disk, once that is known. One that does not say is not taken for another's: the arbiter has the last word on that.
    pub(super) fn has_it(&self) -> Option<bool> {
        match self.0.try_recv() {
            Ok(Ok(holds)) => Some(holds),
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => Some(true),
            Err(TryRecvError::Empty) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::disk::Opening;
    use crate::backends::wait::Waiter;
    use crate::config::Sandbox as Confinement;

    /// A disk that is this host's, another's, or does not say.
    struct Kept(fn() -> Result<(), ReservationError>);

    impl Registry for Kept {
        fn usable(&mut self) -> Result<(), ReservationError> {
            Ok(())
        }

        fn register(&mut self, _: u64) -> Result<(), ReservationError> {
            Ok(())
        }

        fn reserve(&mut self, _: u64) -> Result<(), ReservationError> {
            self.0()
        }

        fn preempt(&mut self, _: u64, _: u64) -> Result<(), ReservationError> {
            self.0()
        }

        fn release(&mut self, _: u64) -> Result<(), ReservationError> {
            self.0()
        }
    }

    fn warden(kept: fn() -> Result<(), ReservationError>) -> Warden {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let (leads, through) = (true, true);
        let image = OpenImage::open(&path, Opening::Shared { leads, through }).unwrap();
        let (enabled, strict) = (false, false);
        let sandbox = Sandbox::prepare(&Confinement { enabled, strict }).unwrap();
        let me = Identity::from_bytes([1; 16]);
        let orders = begin(Reservations::new(Kept(kept), me), sandbox, false).unwrap();
        Warden { orders, image }
    }

    #[test]
    fn whose_the_disk_is_wakes_who_asked() {
        for (kept, has_it) in [
            ((|| Ok(())) as fn() -> _, true),
            (|| Err(ReservationError::Conflict), false),
            // Nobody is taken for a thief because a cable is out.
            (|| Err(gone()), true),
        ] {
            let warden = warden(kept);
            let wake = Arc::new(Wake::new().unwrap());
            let look = warden.look(&wake);
            let mut waiter = Waiter::new();
            waiter.add(&*wake, true, false);
            waiter.wait(Some(Duration::from_secs(60))).unwrap();
            assert_eq!(look.has_it(), Some(has_it));
        }
    }

    #[test]
    fn a_disk_that_is_anothers_is_not_taken_and_names_its_path() {
        let warden = warden(|| Err(ReservationError::Conflict));
        let error = warden.take(Identity::from_bytes([2; 16])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/disk: another host has it"), "{text}");
        warden.hold(None).unwrap_err();
        // It is no error to have nothing left to give free.
        warden.release().unwrap();
    }

    #[test]
    fn a_thread_that_is_gone_has_reserved_nothing() {
        let mut warden = warden(|| Ok(()));
        warden.take(Identity::from_bytes([2; 16])).unwrap();
        warden.orders = channel().0;
        warden.take(Identity::from_bytes([2; 16])).unwrap_err();
        warden.settle().unwrap_err();
    }
}
