//! The recruiter's thread: finds a new backup for a machine that runs without one, or that is to have another, and gives it a copy while
//! the guest runs.
//!
//! ```text
//!  Idle ── look ──▶ Looking ── somebody listens ──▶ Copying ── few pages are left ──▶ Cutting ── ready ──▶ Idle
//!                      ▲                               │                                 │
//!                      └────────── it failed ──────────┴─────────────────────────────────┘
//! ```
//! It blocks on the network, so that nothing else does. What it needs of the vCPU thread it asks over the desk; what the I/O
//! thread must do it tells as news.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rdma_log::RingWriter;
use rdma_log::robust::RobustKey;
use rdma_log::transport::network::Watch;
use rdma_log::verbs::Verbs;

use super::SessionError;
use super::beats::Beats;
use super::freight::Consignor;
use super::io::{InputLane, Io};
use super::meet::{self, Introduction};
use crate::backends::disk::{CopyRead, Disk};
use crate::backends::wait::Wake;
use crate::checkpoint::clone::{CloneError, Sender as Copier};
use crate::config::{Config, Transport};
use crate::control::board::Board;
use crate::desk::{Answer, Ask, Cut, Desk};
use crate::handshake::parcel::Parcels;
use crate::handshake::{self, Channel, HandshakeError, Hurried, Stream};
use crate::machine::{Machine, Swept};
use crate::memory::GuestRam;
use crate::orders::{Order, Orders, Pace};
use crate::protocol::Identity;
use crate::ring_log::{RingSink, Window};
use crate::sandbox::{self, NOT_CONFINED, Sandbox, Thread};
use crate::stage::Stage;
use crate::version::Version;

/// Between two looks for a backup that listens. Short against what a person or an agent takes to start one; a look at a
/// socket that is not there takes microseconds.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// After a copy that failed: a backup that fails each time is not to keep the machine busy.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// How long the vCPU thread may take to say what the guest has written; a machine that is frozen does not say it at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Of a disk that holds little, so little gathers that the other side would take this one for dead: it hears something so often.
const PUSH: Duration = Duration::from_millis(500);

/// What is said of a thread that has panicked.
const GONE: &str = "the thread that gives copies of the machine has ended without a word, which is a bug, and from now on no backup joins; hand the \
    machine over (doppel switch) if it has a backup";

/// What is said of an answer that does not fit its question.
const AT_RANDOM: &str = "the vCPU thread answers at random";

/// So few pages are left that stopping for them costs less than a tenth of a millisecond: a microsecond a page.
const FEW_PAGES: usize = 64;

/// A guest that writes so much during a round however short is stopped for it: half a millisecond, and as much again to send it.
const ENOUGH_PAGES: usize = 512;

/// Rounds that leave no fewer pages than the least before, after which a guest at the least pace is stopped as it is: its stop is
/// then as long as its last round.
const ROUNDS_IN_VAIN: u32 = 4;

/// How long all rounds may take: the largest machine, at the least pace that a backup must keep, takes half of it for the first.
const ROUNDS_WITHIN: Duration = Duration::from_secs(3600);

/// What the thread tells the I/O thread.
pub(super) enum News {
    /// Pages are nearly all there: leave the port alone, and have the vCPU thread cut, by a question of this number.
    Cut(u64, Box<RingSink>),
    /// The guest logs to the new ring.
    Taken(Box<Taken>),
    /// All of the copy has gone into the inputs lane: frames follow there.
    Copied(Box<InputLane>),
    /// The copy is whole: the backup can be entitled.
    Ready(Box<Recruit>),
    /// It came to nothing, before the cut or after.
    Failed {
        /// Why.
        why: SessionError,
        /// Whether people should hear of it: a backup that fails each time fills no log.
        say: bool,
        /// Whether it looks for another one by itself.
        looks_on: bool,
    },
}

/// The I/O thread's part of a new ring.
pub(super) struct Taken {
    pub(super) watch: Option<Watch>,
    /// How far the backup has come.
    pub(super) replayed: Arc<AtomicU64>,
    /// Set once the backup replays: from then on the guest waits for one that is behind.
    pub(super) in_step: Arc<AtomicBool>,
    /// By which the backup learns of this process's death at once, where the log's transport has that.
    pub(super) robust: Option<RobustKey>,
}

/// A backup that follows.
pub(super) struct Recruit {
    pub(super) control: Channel,
    pub(super) identity: Identity,
    pub(super) beats: Beats,
    pub(super) figures: Figures,
}

/// What a copy took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    /// From the first page to ready.
    pub(super) took: Duration,
    /// How long the guest stood.
    pub(super) stopped: Duration,
    /// Bytes that went over.
    pub(super) bytes: u64,
    /// Rounds, the first one with everything.
    pub(super) rounds: u32,
}

/// What the thread is to do, for logs of this reign.
enum Job {
    /// Look until a backup is ready.
    Look(rdma_log::Epoch),
    /// Give a copy to one that is to take the backup's place, at this address or wherever one listens; try it once.
    Replace(rdma_log::Epoch, Option<SocketAddr>),
}

/// The thread's handle.
pub(super) struct Recruiter {
    jobs: Sender<Job>,
    news: Receiver<News>,
    /// Where the vCPU thread is asked.
    pub(super) desk: Arc<Desk<RingSink>>,
    disk: Arc<OnceLock<Copied>>,
    /// Told that its thread is gone.
    gone: Cell<bool>,
}

/// A disk that is written: a new backup's image is made a copy of its own.
struct Copied {
    disk: Arc<Disk>,
    sectors: u64,
}

/// What the thread works with.
struct Work {
    config: Config,
    introduction: Introduction,
    ram: Arc<GuestRam>,
    desk: Arc<Desk<RingSink>>,
    answers: Mutex<Receiver<(u64, Answer)>>,
    /// Questions so far.
    asked: AtomicU64,
    orders: Arc<Orders>,
    /// Where it is told of further places.
    board: Arc<Board>,
    stage: Arc<Stage>,
    news: Sender<News>,
    wake: Arc<Wake>,
    disk: Arc<OnceLock<Copied>>,
}

/// The two threads' parts of a new ring, and its inputs lane.
pub(super) fn log_to(
    config: &Config,
    epoch: rdma_log::Epoch,
    ring: RingWriter,
    watch: Option<Watch>,
    version: Version,
    in_step: bool,
) -> (RingSink, Taken, InputLane) {
    let committed = Arc::new(AtomicU64::new(0));
    let replayed = Arc::new(AtomicU64::new(0));
    let in_step = Arc::new(AtomicBool::new(in_step));
    let window = Window::new(
        config.timing.lag(),
        ring.progress,
        Arc::clone(&replayed),
        Arc::clone(&in_step),
    );
    let mut sink = RingSink::new(ring.events, epoch, Arc::clone(&committed))
        .to_backup()
        .speaking(version)
        .with_window(window);
    if let Some(watch) = &watch {
        sink = sink.with_watch(watch.clone());
    }
    // A log over a stream tells by itself what has committed.
    let told = watch.is_none().then_some(committed);
    let taken = Taken {
        watch,
        replayed,
        in_step,
        robust: ring.robust,
    };
    (sink, taken, (ring.inputs, epoch, told))
}

impl Recruiter {
    /// Starts the thread, which confines itself and waits; none if there is no place to look at.
    pub(super) fn start_if_useful(
        config: &Config,
        io: &Io,
        introduction: Introduction,
        machine: &Machine,
    ) -> Result<Option<Self>, SessionError> {
        if !meet::can_recruit(&config.pair) {
            return Ok(None);
        }
        let ram = machine.shared_ram();
        let (jobs, wanted) = channel();
        let (news, told) = channel();
        let (desk, answers) = Desk::new();
        let desk = Arc::new(desk);
        let work = Work {
            config: config.clone(),
            introduction,
            ram,
            desk: Arc::clone(&desk),
            answers: Mutex::new(answers),
            asked: AtomicU64::new(0),
            orders: Arc::clone(&io.orders),
            board: Arc::clone(io.reporter.board()),
            stage: Arc::clone(&io.stage),
            news,
            wake: Arc::clone(&io.wake),
            disk: Arc::default(),
        };
        let disk = Arc::clone(&work.disk);
        let sandbox: Sandbox = io.sandbox.clone();
        let confinement = match config.pair.transport {
            Transport::Shm | Transport::Tcp => Thread::Recruiter,
            Transport::Rdma => {
                sandbox::shed(&config.sandbox)?;
                // The libraries of the devices' makers are loaded now: a confined thread gets no memory that is executed.
                if let Err(error) = Verbs::load().and_then(|verbs| verbs.devices()) {
                    tracing::warn!("a new backup cannot be joined over RDMA: {error}");
                }
                Thread::RdmaRecruiter
            }
        };
        thread::Builder::new()
            .name("recruiter".into())
            .spawn(move || {
                sandbox.confine(confinement).expect(NOT_CONFINED);
                while let Ok(job) = wanted.recv() {
                    match job {
                        Job::Look(epoch) => work.look(epoch),
                        Job::Replace(epoch, to) => work.replace(epoch, to),
                    }
                }
            })
            .map_err(SessionError::host("start the recruiter's thread"))?;
        Ok(Some(Self {
            jobs,
            news: told,
            desk,
            disk,
            gone: Cell::new(false),
        }))
    }

    /// This disk, of so many sectors, is copied with the machine. Before it looks.
    pub(super) fn copies(&self, disk: &Arc<Disk>, sectors: u64) {
        let copied = Copied {
            disk: Arc::clone(disk),
            sectors,
        };
        // Once in a process's life.
        let _ = self.disk.set(copied);
    }

    /// Looks for a backup from now on, until one is ready.
    pub(super) fn look(&self, epoch: rdma_log::Epoch) {
        // A thread that is gone finds no backup; the machine serves on.
        let _ = self.jobs.send(Job::Look(epoch));
    }

    /// Gives a copy to a backup that is to take the place of the one that there is. It is tried once, and told as news.
    pub(super) fn replace(&self, epoch: rdma_log::Epoch, to: Option<SocketAddr>) {
        // As above: the machine stays protected as it is.
        let _ = self.jobs.send(Job::Replace(epoch, to));
    }

    /// Something that it tells; last of all, once, that it is gone: whoever waits for a copy waits no longer.
    pub(super) fn news(&self) -> Option<News> {
        match self.news.try_recv() {
            Ok(news) => Some(news),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => (!self.gone.replace(true)).then(|| News::Failed {
                why: SessionError::NoCopy(GONE.to_owned()),
                say: true,
                looks_on: false,
            }),
        }
    }
}

impl Work {
    /// Looks until a backup is ready.
    fn look(&self, epoch: rdma_log::Epoch) {
        let mut failures: usize = 0;
        loop {
            // Behind the place that failed: it may fail for ever.
            match meet::call_any(&self.config.pair, &self.board.places(), failures) {
                None => thread::sleep(LOOK_AGAIN),
                Some(stream) => match self.copy_to(stream, epoch) {
                    Ok(recruit) => {
                        self.tell(News::Ready(Box::new(recruit)));
                        return;
                    }
                    Err(error) => {
                        self.forget_copy();
                        failures += 1;
                        self.tell(News::Failed {
                            why: error,
                            say: failures.is_power_of_two(),
                            looks_on: true,
                        });
                        thread::sleep(TRY_AGAIN);
                    }
                },
            }
        }
    }

    /// One that is to take the backup's place.
    fn replace(&self, epoch: rdma_log::Epoch, to: Option<SocketAddr>) {
        let called = match to {
            Some(address) => meet::call_at(address).map_err(SessionError::host("call a backup")),
            None => meet::call_any(&self.config.pair, &self.board.places(), 0).ok_or_else(|| {
                SessionError::NoCopy("nobody listens where a new backup is looked for".into())
            }),
        };
        match called.and_then(|stream| self.copy_to(stream, epoch)) {
            Ok(recruit) => self.tell(News::Ready(Box::new(recruit))),
            Err(why) => {
                self.forget_copy();
                self.tell(News::Failed {
                    why,
                    say: true,
                    looks_on: false,
                });
            }
        }
    }

    fn forget_copy(&self) {
        self.orders.set_pace(Pace::FULL);
        if let Some(Copied { disk, .. }) = self.disk.get() {
            disk.end_copy();
        }
        self.desk.leave(self.next_number(), Ask::Forget);
        self.have_it_taken();
    }

    fn tell(&self, news: News) {
        // If nobody listens the process is ending.
        let _ = self.news.send(news);
        self.wake.ring();
    }

    fn have_it_taken(&self) {
        self.orders.give(Order::Attend);
        self.stage.bell().ring();
    }

    /// Asks the vCPU thread.
    fn ask(&self, ask: Ask<RingSink>) -> Result<Answer, SessionError> {
        let number = self.next_number();
        self.desk.leave(number, ask);
        self.have_it_taken();
        let until = Instant::now() + ANSWER_WITHIN;
        match self.answer_to(number, || until.checked_duration_since(Instant::now())) {
            Some(Answer::Failed(why)) => Err(SessionError::NoCopy(why)),
            Some(answer) => Ok(answer),
            None => Err(SessionError::NoCopy(
                "the guest did not say what it has written".into(),
            )),
        }
    }

    fn next_number(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The answer to this question; those to questions that were given up are dropped. None if there is no patience left.
    fn answer_to(&self, number: u64, patience: impl Fn() -> Option<Duration>) -> Option<Answer> {
        let answers = self.answers.lock().expect("one thread uses it");
        while let Some(longest) = patience() {
            match answers.recv_timeout(longest) {
                Ok((of, answer)) if of == number => return Some(answer),
                Ok(_) | Err(_) => {}
            }
        }
        None
    }

    /// Meets the backup and makes it one: everything but the arbiter's word.
    fn copy_to(&self, stream: Stream, epoch: rdma_log::Epoch) -> Result<Recruit, SessionError> {
        let met = meet::introduce(stream, &self.config, &self.introduction, true)?;
        let started = Instant::now();
        let seal = Parcels::give(&met.control, &self.introduction.random)?;
        let version = met.control.version();
        let (sink, taken, lane) = log_to(&self.config, epoch, met.ring, met.watch, version, false);
        let consignor = Consignor::new(lane, taken.watch.clone(), &met.control, seal);
        // A peer that takes it a byte at a time would keep others from being looked for, and the guest's pages in vain.
        let paced = Hurried::paced(consignor, handshake::PATIENCE, handshake::PACE);
        let mut copier = Copier::new(paced, Arc::clone(&self.ram));
        let rest = self.disk_rounds(&mut copier)?;
        let rounds = self.rounds(&mut copier)?;
        if let Some(Copied { disk, .. }) = self.disk.get() {
            // What was written while memory went over, so that little is left for the end.
            self.disk_round(disk, &mut copier)?;
        }
        let cut = self.cut(sink)?;
        // What it does until the backup follows, that has to catch up with, and the guest's clients wait meanwhile.
        self.orders.set_pace(Pace::FULL.halved());
        self.tell(News::Taken(Box::new(taken)));
        if let Some(rest) = rest {
            let read = rest.recv_timeout(ANSWER_WITHIN);
            let read = read.unwrap_or_else(|_| Err("it hangs".to_owned()));
            copier
                .blocks(&read.map_err(disk_fails)?)
                .map_err(connection)?;
        }
        copier.checkpoint(&cut.checkpoint).map_err(connection)?;
        let bytes = copier.bytes();
        let lane = copier.into_inner().into_inner().into_lane();
        self.tell(News::Copied(Box::new(lane)));
        handshake::await_ready(&met.control)?;
        self.orders.set_pace(Pace::FULL);
        Ok(Recruit {
            control: met.control,
            identity: met.identity,
            beats: met.beats,
            figures: Figures {
                took: started.elapsed(),
                stopped: cut.stopped,
                bytes,
                rounds,
            },
        })
    }

    /// The same of the disk, if it is copied: where its rest will be told.
    fn disk_rounds(
        &self,
        copier: &mut Copier<Hurried<Consignor<'_>>>,
    ) -> Result<Option<Receiver<CopyRead>>, SessionError> {
        let Some(Copied { disk, sectors }) = self.disk.get() else {
            return Ok(None);
        };
        let rest = disk.begin_copy(*sectors);
        let started = Instant::now();
        let mut convergence = Convergence::default();
        loop {
            let blocks = self.disk_round(disk, copier)?;
            if started.elapsed() > ROUNDS_WITHIN {
                return Err(SessionError::NoCopy(
                    "the disk does not get across faster than the guest writes it".into(),
                ));
            }
            match convergence.round(blocks) {
                Next::Stop => return Ok(Some(rest)),
                Next::Go(pace) => self.orders.set_pace(pace),
            }
        }
    }

    /// Sends what the copy of the disk lacks, once over it; how many blocks.
    fn disk_round(
        &self,
        disk: &Disk,
        copier: &mut Copier<Hurried<Consignor<'_>>>,
    ) -> Result<usize, SessionError> {
        let (mut from, mut sent, mut pushed) = (0, 0, Instant::now());
        loop {
            let blocks = disk.copy_some(from, ANSWER_WITHIN).map_err(disk_fails)?;
            sent += blocks.count();
            copier.blocks(&blocks).map_err(connection)?;
            if pushed.elapsed() >= PUSH {
                copier.push().map_err(connection)?;
                pushed = Instant::now();
            }
            match blocks.next {
                Some(next) => from = next,
                None => return Ok(sent),
            }
        }
    }

    /// Sends what there is and what is written meanwhile, until little is left.
    fn rounds(&self, copier: &mut Copier<Hurried<Consignor<'_>>>) -> Result<u32, SessionError> {
        let Answer::Watching = self.ask(Ask::Watch)? else {
            return Err(SessionError::NoCopy(AT_RANDOM.into()));
        };
        let started = Instant::now();
        let everything = self.ram.pages();
        self.round(|from, swept| {
            // What somebody else cleared behind the sweep is in it as well.
            let passed = swept.pages.iter().filter(|page| page.0 < from);
            copier.pages(&passed.collect())?;
            let upto = swept.next.map_or(everything, |next| next.0);
            copier.touched(from..upto)
        })?;
        let mut convergence = Convergence::default();
        loop {
            if started.elapsed() > ROUNDS_WITHIN {
                return Err(SessionError::NoCopy(
                    "it does not get across faster than the guest writes".into(),
                ));
            }
            let pages = self.round(|_, swept| copier.pages(&swept.pages))?;
            match convergence.round(pages) {
                // One for everything.
                Next::Stop => return Ok(convergence.rounds + 1),
                Next::Go(pace) => self.orders.set_pace(pace),
            }
        }
    }

    /// Sends what was written before now, part by part: each is handed over with the page at which it begins. How many pages were
    /// sent.
    fn round(
        &self,
        mut send: impl FnMut(u64, &Swept) -> Result<u64, CloneError>,
    ) -> Result<usize, SessionError> {
        let (mut from, mut sent) = (0, 0);
        loop {
            let Answer::Changed(swept) = self.ask(Ask::Changed)? else {
                return Err(SessionError::NoCopy(AT_RANDOM.into()));
            };
            sent += send(from, &swept).map_err(connection)? as usize;
            match swept.next {
                Some(next) => from = next.0,
                None => return Ok(sent),
            }
        }
    }

    /// Has the guest cut. Once that was asked there is no way back: the answer is awaited however long it takes.
    fn cut(&self, sink: RingSink) -> Result<Cut, SessionError> {
        let number = self.next_number();
        self.tell(News::Cut(number, Box::new(sink)));
        match self.answer_to(number, || Some(ANSWER_WITHIN)) {
            Some(Answer::Cut(cut)) => Ok(cut),
            Some(Answer::Failed(why)) => Err(SessionError::NoCopy(why)),
            _ => Err(SessionError::NoCopy(AT_RANDOM.into())),
        }
    }
}

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another one, with the guest at this pace.
    Go(Pace),
    /// The guest stops, and what it has written since goes into the checkpoint.
    Stop,
}

/// Whether rounds get shorter. A guest that writes too fast for that is slowed down, by half each time.
#[derive(Debug)]
struct Convergence {
    pace: Pace,
    least: usize,
    in_vain: u32,
    rounds: u32,
}

impl Default for Convergence {
    fn default() -> Self {
        Self {
            pace: Pace::FULL,
            least: usize::MAX,
            in_vain: 0,
            rounds: 0,
        }
    }
}

impl Convergence {
    /// So many pages were written during the round before, and have been sent.
    fn round(&mut self, pages: usize) -> Next {
        self.rounds += 1;
        if pages <= FEW_PAGES {
            return Next::Stop;
        }
        // A quarter less each time is a copy that ends; anything between may be chance.
        let shorter = pages < self.least / 4 * 3;
        self.least = self.least.min(pages);
        if shorter {
            self.in_vain = 0;
            return Next::Go(self.pace);
        }
        self.in_vain += 1;
        let slowest = self.pace == Pace::LEAST;
        if pages <= ENOUGH_PAGES || slowest && self.in_vain >= ROUNDS_IN_VAIN {
            return Next::Stop;
        }
        if !slowest {
            self.pace = self.pace.halved();
            self.in_vain = 0;
        }
        Next::Go(self.pace)
    }
}

fn disk_fails(why: String) -> SessionError {
    SessionError::NoCopy(format!("this side's disk image cannot be read: {why}"))
}

fn connection(error: CloneError) -> SessionError {
    SessionError::Handshake(HandshakeError::Copy(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that writes so many pages while one page is sent, at full pace. How many rounds, at which pace at last, how many
    /// pages were left.
    fn copied(pages: f64, written_per_sent: f64, least: f64) -> (u32, Pace, f64) {
        let mut convergence = Convergence::default();
        let (mut pace, mut left) = (Pace::FULL, pages);
        for _ in 0..1000 {
            let run = Duration::from_secs(1);
            let share = run.as_secs_f64() / (run + pace.rest(run)).as_secs_f64();
            // A round takes some time however little it sends, and memory is finite.
            left = (left * written_per_sent * share + least * share).min(pages);
            match convergence.round(left as usize) {
                Next::Stop => return (convergence.rounds, pace, left),
                Next::Go(next) => pace = next,
            }
        }
        panic!("it never ends: {pace:?}, {left} pages");
    }

    const PAGES: f64 = 262_144.0;

    #[test]
    fn a_guest_that_writes_half_as_fast_is_left_alone() {
        let (rounds, pace, left) = copied(PAGES, 0.5, 10.0);
        assert_eq!(pace, Pace::FULL);
        assert!(rounds <= 14 && left <= FEW_PAGES as f64, "{rounds} {left}");
    }

    #[test]
    fn one_that_writes_faster_is_slowed_until_it_ends() {
        for written in [0.9, 1.5, 4.0, 8.0] {
            let (rounds, pace, left) = copied(PAGES, written, 50.0);
            assert!(pace < Pace::FULL && rounds < 60, "{written}: {rounds}");
            assert!(left <= ENOUGH_PAGES as f64, "{written}: {left}");
        }
    }

    #[test]
    fn one_that_nothing_slows_ends_all_the_same() {
        let (rounds, pace, _) = copied(PAGES, 1000.0, 0.0);
        assert_eq!(pace, Pace::LEAST);
        assert!(rounds < 20, "{rounds}");
    }

    #[test]
    fn a_round_has_a_least_length() {
        // It dwells at pages that are not few, which is enough.
        let (_, _, left) = copied(PAGES, 0.3, 250.0);
        assert!(left <= ENOUGH_PAGES as f64);
    }
}
