//! What the I/O thread tells the vCPU thread, and the other way round.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use rdma_log::locks::lock;
use rdma_log::{LendingMutex, Seq};

use crate::backends::wait::Wake;
use crate::digest::ExitRecord;
use crate::entry::{Control, Wish};
use crate::kvm::Kick;
use crate::meter::Meter;
use crate::position::Position;
use crate::preempt::Running;
use crate::protocol::heartbeat::Progress;
use crate::scheduling::StandingInLine;

/// An order to the vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// End at once.
    Stop,
    /// End at the next sync point, where a replay can compare; a guest that does not exit goes on.
    StopAtSyncPoint,
    /// There is no backup any more: go on without a log.
    RunUnprotected,
    /// Stand still and let nothing out, until another order comes.
    Freeze,
    /// Something lies on the desk.
    Attend,
    /// Stop at a sync point, let everything out, and hand the machine over to the backup, once the inputs lane has committed up to
    /// this entry.
    HandOver(Seq),
    /// It was not taken: go on as before.
    Resume,
    /// The new backup has taken the old one's place: run on, with the log that the guest stands for.
    BeginLog,
    /// Turn the machine off at a sync point, with this status.
    PowerOff(u8),
    /// Start the machine anew, at a sync point.
    Reset,
    /// From the next sync point on the guest may have so much of its time; none: it stands.
    Share(Pace),
}

impl Order {
    /// Whether it is done at a sync point at which nothing is under way.
    #[must_use]
    pub fn is_deed(self) -> bool {
        matches!(
            self,
            Self::HandOver(_) | Self::PowerOff(_) | Self::Reset | Self::Share(_)
        )
    }
}

/// The queue of orders and what the vCPU thread reports back.
#[derive(Debug)]
pub struct Orders {
    queue: Mutex<VecDeque<Order>>,
    changed: Condvar,
    waiting: AtomicBool,
    fenced: AtomicBool,
    /// Why the log to the backup is of no use, until the I/O thread has heard of it.
    unusable: Mutex<Option<String>>,
    kick: OnceLock<Kick>,
    reports: Arc<Wake>,
    pulse: Pulse,
    /// Of the vCPU thread. Those who ask for progress share it, and one of them may be more urgent than the other.
    standing: LendingMutex<StandingInLine>,
    /// The exits before a freeze, for a backup that wants to name a divergence.
    exits: Mutex<Vec<ExitRecord>>,
    /// What instants are counted from.
    epoch: Instant,
    /// [`OUTSIDE`], [`NOTHING_DUE`], or when something is due, in nanoseconds since `epoch`.
    inside: AtomicU64,
    inside_at: AtomicU64,
    /// [`NOTHING_DUE`], or when the guest's interval ends, in nanoseconds since `epoch`.
    interval: AtomicU64,
    /// A [`Pace`].
    pace: AtomicU32,
    /// The same: what the operator leaves the guest.
    share: AtomicU32,
    /// The primary hands its machine over to this replica: for how long the guest had stood when it said so, and when that came.
    handed: Mutex<Option<(Duration, Instant)>>,
    /// For how long in all the guest has stood because the backup had not kept up, in nanoseconds.
    stood: AtomicU64,
    /// How often the machine has started anew, and at whose wish the last time.
    resets: Mutex<(u64, Wish)>,
}

/// How much of its time a guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pace(u32);

impl Pace {
    /// All of it.
    pub const FULL: Self = Self(Control::WHOLE as u32);
    /// None of it: the guest stands.
    pub const NONE: Self = Self(0);
    /// The least that is asked of a guest.
    pub const LEAST: Self = Self(1024 / 16);
    /// A guest that is slowed down runs for so long at once. It then stands for fifteen times that at most: less than what a
    /// client takes for an interruption.
    pub const SLICE: Duration = Duration::from_micros(500);

    /// So many 1024ths of it.
    #[must_use]
    pub fn of(share: u16) -> Self {
        Self(share.into()).min(Self::FULL)
    }

    /// In 1024ths.
    #[must_use]
    pub fn share(self) -> u16 {
        self.0 as u16
    }

    /// In per cent, rounded.
    #[must_use]
    pub fn percent(self) -> u32 {
        (self.0 * 100 + Self::FULL.0 / 2) / Self::FULL.0
    }

    /// Whether a guest at this pace runs and stands by turns.
    #[must_use]
    pub fn is_slowed(self) -> bool {
        Self::NONE < self && self < Self::FULL
    }

    /// Half of that, if so little is ever asked.
    #[must_use]
    pub fn halved(self) -> Self {
        Self(self.0 / 2).max(Self::LEAST)
    }

    /// How long a guest stands that has run for so long.
    #[must_use]
    pub fn rest(self, ran: Duration) -> Duration {
        ran * (Self::FULL.0 - self.0) / self.0
    }
}

/// The vCPU thread is not inside the guest.
const OUTSIDE: u64 = u64::MAX;
/// It is, and nothing is due.
const NOTHING_DUE: u64 = u64::MAX - 1;

/// How the vCPU thread is doing, for heartbeats.
#[derive(Debug, Default)]
struct Pulse {
    position: AtomicU64,
    turns: AtomicU64,
    owes: AtomicBool,
}

impl Orders {
    /// No orders yet; `reports` wakes the thread that gives them.
    #[must_use]
    pub fn new(reports: Arc<Wake>) -> Self {
        Self {
            queue: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            unusable: Mutex::default(),
            kick: OnceLock::new(),
            reports,
            pulse: Pulse::default(),
            standing: LendingMutex::new(StandingInLine::of_nobody()),
            exits: Mutex::default(),
            epoch: Instant::now(),
            inside: AtomicU64::new(OUTSIDE),
            inside_at: AtomicU64::new(0),
            interval: AtomicU64::new(NOTHING_DUE),
            pace: AtomicU32::new(Pace::FULL.0),
            share: AtomicU32::new(Pace::FULL.0),
            handed: Mutex::default(),
            stood: AtomicU64::new(0),
            resets: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Order>> {
        lock(&self.queue)
    }

    /// Names the vCPU thread that obeys.
    pub fn attach(&self, kick: Kick) {
        let _ = self.kick.set(kick);
    }

    /// Names the calling thread as the one whose waits for a CPU are told with its progress. Before it is confined.
    pub fn watch_this_thread(&self) {
        let standing = StandingInLine::of_this_thread();
        *self.standing.lock() = standing;
    }

    /// Gives an order. The caller also rings the thread's bell, in case the guest halts.
    pub fn give(&self, order: Order) {
        self.lock().push_back(order);
        self.waiting.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    /// Whether an order waits; cheap enough for every exit.
    #[must_use]
    pub fn waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Takes the oldest order.
    pub fn take(&self) -> Option<Order> {
        self.take_if(|_| true)
    }

    /// Takes the oldest order that `wanted` accepts.
    pub fn take_if(&self, wanted: impl Fn(Order) -> bool) -> Option<Order> {
        let mut queue = self.lock();
        let at = queue.iter().position(|&order| wanted(order))?;
        let order = queue.remove(at);
        self.waiting.store(!queue.is_empty(), Ordering::SeqCst);
        order
    }

    /// Stands still until an order ends the freeze: that order. A [`Order::Freeze`] that comes meanwhile is obeyed already.
    pub fn wait_out_freeze(&self) -> Order {
        loop {
            match self.take() {
                // A machine that is frozen is not copied: who asked gives up.
                Some(Order::Freeze | Order::Attend) => {}
                Some(order) => return order,
                None => {
                    let queue = self.lock();
                    if queue.is_empty() {
                        drop(
                            self.changed
                                .wait(queue)
                                .unwrap_or_else(PoisonError::into_inner),
                        );
                    }
                }
            }
        }
    }

    /// The vCPU thread says that the log is fenced.
    pub fn report_fenced(&self) {
        self.fenced.store(true, Ordering::SeqCst);
        self.reports.ring();
    }

    /// Either thread says that the backup's end of the log breaks the rules.
    pub fn report_unusable(&self, why: String) {
        *lock(&self.unusable) = Some(why);
        self.reports.ring();
    }

    /// Why the log is of no use; told once.
    #[must_use]
    pub fn take_unusable(&self) -> Option<String> {
        lock(&self.unusable).take()
    }

    /// A new log begins, which nobody has fenced or broken.
    pub fn begin_log(&self) {
        self.fenced.store(false, Ordering::SeqCst);
        drop(self.take_unusable());
    }

    /// The vCPU thread leaves its recent exits, as it freezes.
    pub fn leave_exits<'a>(&self, exits: impl Iterator<Item = &'a ExitRecord>) {
        let mut left = lock(&self.exits);
        left.clear();
        left.extend(exits);
    }

    /// The exits that the vCPU thread left; none if it did not freeze.
    #[must_use]
    pub fn take_exits(&self) -> Vec<ExitRecord> {
        std::mem::take(&mut *lock(&self.exits))
    }

    /// The vCPU thread has work in hand at this position.
    pub fn working(&self, position: Position) {
        self.pulse.position.store(position.0, Ordering::Relaxed);
        self.pulse.owes.store(true, Ordering::Relaxed);
    }

    /// The vCPU thread has done its work: the guest computes, or waits.
    pub fn resting(&self) {
        let turns = self.pulse.turns.load(Ordering::Relaxed);
        self.pulse.turns.store(turns + 1, Ordering::Relaxed);
        self.pulse.owes.store(false, Ordering::Relaxed);
    }

    /// The vCPU thread goes into the guest, which stands at this position; a tick or an interrupt is or will be due then.
    pub fn entering(&self, position: Position, due: Option<Instant>) {
        let due = self.told(due);
        self.inside_at.store(position.0, Ordering::Relaxed);
        self.inside.store(due, Ordering::Release);
    }

    fn told(&self, due: Option<Instant>) -> u64 {
        due.map_or(NOTHING_DUE, |due| {
            due.saturating_duration_since(self.epoch).as_nanos() as u64
        })
    }

    /// The vCPU thread goes into the guest, whose interval ends then at the latest.
    pub fn interval_ends(&self, at: Option<Instant>) {
        self.interval.store(self.told(at), Ordering::Relaxed);
    }

    /// When the interval of the guest ends that runs.
    #[must_use]
    pub fn interval_end(&self) -> Option<Instant> {
        match self.interval.load(Ordering::Relaxed) {
            NOTHING_DUE => None,
            nanos => Some(self.epoch + Duration::from_nanos(nanos)),
        }
    }

    /// The vCPU thread has come out.
    pub fn left(&self) {
        self.inside.store(OUTSIDE, Ordering::Relaxed);
    }

    /// What the vCPU thread is doing inside the guest, if it is. The two values may be of two runs that follow each other,
    /// which costs a kick that finds nothing to do.
    #[must_use]
    pub fn running(&self) -> Option<Running> {
        let due = match self.inside.load(Ordering::Acquire) {
            OUTSIDE => return None,
            NOTHING_DUE => None,
            nanos => Some(self.epoch + Duration::from_nanos(nanos)),
        };
        let position = Position(self.inside_at.load(Ordering::Relaxed));
        Some(Running { position, due })
    }

    /// From now on the guest runs at this pace.
    pub fn set_pace(&self, pace: Pace) {
        self.pace.store(pace.0, Ordering::Relaxed);
    }

    /// What the operator leaves the guest of its time.
    pub fn set_share(&self, share: Pace) {
        self.share.store(share.0, Ordering::Relaxed);
    }

    /// The same.
    #[must_use]
    pub fn share(&self) -> Pace {
        Pace(self.share.load(Ordering::Relaxed))
    }

    /// The pace at which the guest is to run; cheap enough for every exit.
    #[must_use]
    pub fn pace(&self) -> Pace {
        Pace(self.pace.load(Ordering::Relaxed)).min(self.share())
    }

    /// A replica's vCPU thread has come to where its primary hands the machine over; the guest had stood for so long by then.
    pub fn report_handed_over(&self, stood: Duration) {
        *lock(&self.handed) = Some((stood, Instant::now()));
        self.reports.ring();
    }

    /// Since when the guest stands, if the machine was handed over; told once.
    #[must_use]
    pub fn take_handed_over(&self) -> Option<(Duration, Instant)> {
        lock(&self.handed).take()
    }

    /// The guest has stood for so long because the backup had not kept up. By the vCPU thread.
    pub(crate) fn add_stood(&self, span: Duration) {
        self.stood
            .fetch_add(span.as_nanos() as u64, Ordering::Relaxed);
    }

    /// For how long in all it has.
    #[must_use]
    pub fn stood(&self) -> Duration {
        Duration::from_nanos(self.stood.load(Ordering::Relaxed))
    }

    /// The machine has started anew. By the vCPU thread.
    pub(crate) fn report_reset(&self, wish: Wish) {
        let mut resets = lock(&self.resets);
        *resets = (resets.0 + 1, wish);
        drop(resets);
        self.reports.ring();
    }

    /// How often it has, and at whose wish the last time.
    #[must_use]
    pub fn resets(&self) -> (u64, Wish) {
        *lock(&self.resets)
    }

    /// Something has come for the thread that gives the orders.
    pub fn ring_reports(&self) {
        self.reports.ring();
    }

    /// Makes the vCPU thread leave the guest.
    pub fn kick(&self) {
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    /// Where the vCPU thread was when it last took up work.
    #[must_use]
    pub fn position(&self) -> Position {
        Position(self.pulse.position.load(Ordering::Relaxed))
    }

    /// What heartbeats say of the vCPU thread.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let turns = self.pulse.turns.load(Ordering::Relaxed);
        let owes = self.pulse.owes.load(Ordering::Relaxed);
        let stood = if owes {
            self.standing.lock().told(turns, Instant::now())
        } else {
            Duration::ZERO
        };
        Progress {
            position: self.position(),
            turns,
            owes,
            stood,
        }
    }

    /// Whether the vCPU thread met a fence.
    #[must_use]
    pub fn fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }
}

/// A guest's stop at the end of an interval, or at a place where it was preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// How long it stood.
    pub took: Duration,
    /// Pages that were written since the last.
    pub pages: usize,
    /// Bytes of its checkpoint.
    pub bytes: usize,
}

/// Commit latencies on their way from the vCPU thread to whoever shows them: no lock, no allocation.
#[derive(Debug)]
pub struct Samples {
    commits: ArrayQueue<u64>,
    late_ticks: ArrayQueue<u64>,
    checkpoints: ArrayQueue<Stop>,
    intervals: ArrayQueue<Stop>,
    meter: Meter,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            // 100 ms of outputs at 600,000 a second; more than that and samples are dropped, not delayed.
            commits: ArrayQueue::new(1 << 16),
            // A second of the fastest ticks that guests ask for, and of the most checkpoints.
            late_ticks: ArrayQueue::new(1 << 12),
            checkpoints: ArrayQueue::new(1 << 10),
            // 100 ms of intervals that a reply ends, at 40,000 a second.
            intervals: ArrayQueue::new(1 << 12),
            meter: Meter::default(),
        }
    }
}

impl Samples {
    /// The figures that stay.
    #[must_use]
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Adds the time from an output's making to its commit.
    pub fn commit(&self, took: Duration) {
        self.meter.commit(took);
        let _ = self.commits.push(took.as_nanos() as u64);
    }

    /// Adds the time by which a tick came too late.
    pub fn late_tick(&self, by: Duration) {
        let _ = self.late_ticks.push(by.as_nanos() as u64);
    }

    /// Takes one lateness, in nanoseconds.
    pub fn take_late_tick(&self) -> Option<u64> {
        self.late_ticks.pop()
    }

    /// Adds a place that was made for a guest that did not exit.
    pub fn checkpoint(&self, stop: Stop) {
        self.meter.stood(stop.took, stop.pages, stop.bytes);
        let _ = self.checkpoints.push(stop);
    }

    /// Takes one such place.
    pub fn take_checkpoint(&self) -> Option<Stop> {
        self.checkpoints.pop()
    }

    /// Adds the end of an interval.
    pub fn interval(&self, stop: Stop) {
        self.meter.stood(stop.took, stop.pages, stop.bytes);
        let _ = self.intervals.push(stop);
    }

    /// Takes one end of an interval.
    pub fn take_interval(&self) -> Option<Stop> {
        self.intervals.pop()
    }

    /// Takes one sample, in nanoseconds.
    pub fn take(&self) -> Option<u64> {
        self.commits.pop()
    }
}
