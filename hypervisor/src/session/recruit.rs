//! The recruiter's thread: finds a new backup for a machine that runs without one, and gives it a copy while the guest runs.
//!
//! ```text
//!  Idle ── look ──▶ Looking ── somebody listens ──▶ Copying ── few pages are left ──▶ Cutting ── ready ──▶ Idle
//!                      ▲                               │                                 │
//!                      └────────── it failed ──────────┴─────────────────────────────────┘
//! ```
//! It blocks on the network, so that nothing else does. What it needs of the vCPU thread it asks over the desk; what the I/O
//! thread must do it tells as news.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rdma_log::RingWriter;
use rdma_log::transport::network::Watch;
use rdma_log::verbs::Verbs;

use super::SessionError;
use super::beats::Beats;
use super::io::{InputLane, Io};
use super::meet::{self, Introduction};
use crate::backends::wait::Wake;
use crate::checkpoint::clone::{CloneError, Sender as Copier};
use crate::config::{Config, Transport};
use crate::desk::{Answer, Ask, Cut, Desk};
use crate::handshake::{self, Channel, HandshakeError};
use crate::machine::Machine;
use crate::memory::GuestRam;
use crate::orders::{Order, Orders};
use crate::protocol::Identity;
use crate::ring_log::{RingSink, Window};
use crate::sandbox::{self, NOT_CONFINED, Sandbox, Thread};
use crate::stage::Stage;

/// Between two looks for a backup that listens. Short against what a person or an agent takes to start one; a look at a
/// socket that is not there takes microseconds.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// After a copy that failed: a backup that fails each time is not to keep the machine busy.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// How long the vCPU thread may take to say what the guest has written; a machine that is frozen does not say it at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What is said of an answer that does not fit its question.
const AT_RANDOM: &str = "the vCPU thread answers at random";

/// So few pages are left that stopping for them costs less than a tenth of a millisecond: a microsecond a page.
const FEW_PAGES: usize = 64;

/// Rounds without fewer pages than the least before, after which a guest is taken to write faster than the copy gets across.
/// Its stop is then as long as its last round.
const ROUNDS_IN_VAIN: u32 = 4;

/// What the thread tells the I/O thread.
pub(super) enum News {
    /// Pages are nearly all there: leave the port alone, and have the vCPU thread cut, by a question of this number.
    Cut(u64, Box<RingSink>),
    /// The guest logs to the new ring: frames go there, too.
    Taken(Box<Taken>),
    /// The copy is whole: the backup can be entitled.
    Ready(Box<Recruit>),
    /// It came to nothing, before the cut or after; the thread goes on looking.
    Failed {
        /// Why.
        why: SessionError,
        /// Whether people should hear of it: a backup that fails each time fills no log.
        say: bool,
    },
}

/// The I/O thread's part of a new ring.
pub(super) struct Taken {
    pub(super) lane: InputLane,
    pub(super) watch: Option<Watch>,
    /// How far the backup has come.
    pub(super) replayed: Arc<AtomicU64>,
    /// Set once the backup replays: from then on the guest waits for one that is behind.
    pub(super) in_step: Arc<AtomicBool>,
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

/// The thread's handle.
pub(super) struct Recruiter {
    looks: Sender<rdma_log::Epoch>,
    news: Receiver<News>,
    /// Where the vCPU thread is asked.
    pub(super) desk: Arc<Desk<RingSink>>,
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
    stage: Arc<Stage>,
    news: Sender<News>,
    wake: Arc<Wake>,
}

/// The two threads' parts of a new ring.
pub(super) fn log_to(
    config: &Config,
    epoch: rdma_log::Epoch,
    ring: RingWriter,
    watch: Option<Watch>,
    in_step: bool,
) -> (RingSink, Taken) {
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
        .with_window(window);
    if let Some(watch) = &watch {
        sink = sink.with_watch(watch.clone());
    }
    // A log over a stream tells by itself what has committed.
    let told = watch.is_none().then_some(committed);
    let taken = Taken {
        lane: (ring.inputs, epoch, told),
        watch,
        replayed,
        in_step,
    };
    (sink, taken)
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
        let (looks, wanted) = channel();
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
            stage: Arc::clone(&io.stage),
            news,
            wake: Arc::clone(&io.wake),
        };
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
                while let Ok(epoch) = wanted.recv() {
                    work.look(epoch);
                }
            })
            .map_err(SessionError::host("start the recruiter's thread"))?;
        Ok(Some(Self {
            looks,
            news: told,
            desk,
        }))
    }

    /// Looks for a backup from now on, until one is ready.
    pub(super) fn look(&self, epoch: rdma_log::Epoch) {
        // A thread that is gone finds no backup; the machine serves on.
        let _ = self.looks.send(epoch);
    }

    /// Something that it tells.
    pub(super) fn news(&self) -> Option<News> {
        self.news.try_recv().ok()
    }
}

impl Work {
    /// Looks until a backup is ready.
    fn look(&self, epoch: rdma_log::Epoch) {
        let mut failures: usize = 0;
        loop {
            // Behind the place that failed: it may fail for ever.
            match meet::call_any(&self.config.pair, failures) {
                None => thread::sleep(LOOK_AGAIN),
                Some(stream) => match self.copy_to(stream, epoch) {
                    Ok(recruit) => {
                        self.tell(News::Ready(Box::new(recruit)));
                        return;
                    }
                    Err(error) => {
                        self.desk.leave(self.next_number(), Ask::Forget);
                        self.have_it_taken();
                        failures += 1;
                        self.tell(News::Failed {
                            why: error,
                            say: failures.is_power_of_two(),
                        });
                        thread::sleep(TRY_AGAIN);
                    }
                },
            }
        }
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
    fn copy_to(&self, stream: Channel, epoch: rdma_log::Epoch) -> Result<Recruit, SessionError> {
        let met = meet::introduce(stream, &self.config, &self.introduction, true)?;
        let started = Instant::now();
        let mut copier = Copier::new(&met.control, Arc::clone(&self.ram));
        let rounds = self.rounds(&mut copier)?;
        let (sink, taken) = log_to(&self.config, epoch, met.ring, met.watch, false);
        let cut = self.cut(sink)?;
        self.tell(News::Taken(Box::new(taken)));
        copier.checkpoint(&cut.checkpoint).map_err(connection)?;
        let bytes = copier.bytes();
        handshake::await_ready(&met.control)?;
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

    /// Sends what there is and what is written meanwhile, until little is left.
    fn rounds(&self, copier: &mut Copier<&Channel>) -> Result<u32, SessionError> {
        let Answer::Watching = self.ask(Ask::Watch)? else {
            return Err(SessionError::NoCopy(AT_RANDOM.into()));
        };
        copier.everything().map_err(connection)?;
        let (mut least, mut in_vain, mut rounds) = (usize::MAX, 0, 1);
        loop {
            let Answer::Changed(pages) = self.ask(Ask::Changed)? else {
                return Err(SessionError::NoCopy(AT_RANDOM.into()));
            };
            copier.pages(&pages).map_err(connection)?;
            rounds += 1;
            if pages.len() < least {
                (least, in_vain) = (pages.len(), 0);
            } else {
                in_vain += 1;
            }
            if pages.len() <= FEW_PAGES || in_vain == ROUNDS_IN_VAIN {
                return Ok(rounds);
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

fn connection(error: CloneError) -> SessionError {
    SessionError::Handshake(HandshakeError::Copy(error))
}
