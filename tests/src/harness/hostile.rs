//! A hostile harness for the output rule: the real recorder over the real ring, with somebody inside who kills it.
//!
//! ```text
//!  parent                                     victim (bin/victim.rs), a process of its own
//!  ───────                                    ─────────────────────
//!  requests ───── cable ─────▶ feeder ──▶ inputs lane, stage ──▶ recorder, guest on KVM
//!     ▲                           ✂                                 │ Sink ✂ ──▶ events lane ──▶ parent's replayer
//!     └────────── world ◀──────────────────────────── World ✂ ◀── gate
//! ```
//! At every ✂ the victim may end itself by SIGKILL, at the n-th time that it comes by. Both cables are queues of the
//! kernel's: what was written to them has left, whatever becomes of the victim. The parent is the backup
//! ([`hostile_backup`](super::hostile_backup)): it drains the log and compares it with what has left.
//!
//! Unsafe code lives here for the one call that ends the victim.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use hypervisor::backends::wait::{Waiter, Wake};
use hypervisor::backends::{NetPort, longest_frame};
use hypervisor::clock::GuestClock;
use hypervisor::entry::Base;
use hypervisor::event::{GuestTime, Output};
use hypervisor::gate::{Committed, Gate, Sent};
use hypervisor::kvm::KvmSource;
use hypervisor::machine::{Machine, MachineSpec};
use hypervisor::orders::{Orders, Samples};
use hypervisor::record::{Outlet, Parts, RecordOptions, Recorder, random_source};
use hypervisor::ring_log::{FRAME_HEAD, INPUT_FRAME, RingSink};
use hypervisor::sink::{Sink, SinkError};
use hypervisor::stage::Stage;
use hypervisor::world::World;
use rdma_log::transport::shm;
use rdma_log::{Epoch, LaneWriter, Marks, RingConfig, Seq, WriteError};

/// The reign of every log here.
pub const EPOCH: Epoch = Epoch(1);

/// Lanes that wrap within a run.
pub const RING: RingConfig = RingConfig {
    events: 64 << 10,
    inputs: 256 << 10,
};

/// Bytes of a slot in the inputs lane: the kind, then the longest frame.
const SLOT: usize = 1 + longest_frame(1500);

/// The machine that both sides build. Nothing in it depends on when it is built.
///
/// # Errors
/// If the guest is not built in.
pub fn machine(guest: &str, words: &str) -> Result<MachineSpec> {
    let words = format!("ip=10.77.0.2/24 {words}");
    Ok(MachineSpec::new(
        guest,
        16,
        &words,
        1_700_000_000_000_000_000,
    )?)
}

/// A moment between record and release at which a victim can die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Step {
    /// A slot is reserved; the frame is still in the cable.
    BeforeRead,
    /// The frame is in the slot, which is not published.
    AfterRead,
    /// The frame is published, and its number not known to the gate.
    AfterPublish,
    /// The frame is staged; nothing has applied it.
    AfterStage,
    /// The entry is made, and not in the log.
    BeforePost,
    /// The entry is in the log; its outputs are not yet in the gate.
    AfterPost,
    /// The outputs are in the gate; nobody has asked what has committed.
    BeforeCommitted,
    /// The commit is known; nothing has left.
    AfterCommitted,
    /// An output is about to leave.
    BeforeSend,
    /// One output of an entry has left, and another one of the same entry is about to.
    BetweenSends,
    /// An output has left; nobody has been told.
    AfterSend,
    /// All have left; the released mark is about to be handed over.
    BeforeReleased,
    /// The sink has the released mark; the log does not.
    AfterReleased,
    /// The reader is about to be woken.
    BeforeNotify,
    /// The reader was woken.
    AfterNotify,
}

/// Ends the process at one step.
#[derive(Debug)]
pub struct Saboteur {
    plan: Option<(Step, u64)>,
    passed: AtomicU64,
    sent_of_entry: AtomicU64,
}

impl Saboteur {
    /// One that strikes when this step is taken for the n-th time, counted from 1; without a plan, never.
    #[must_use]
    pub fn new(plan: Option<(Step, u64)>) -> Self {
        Self {
            plan,
            passed: AtomicU64::new(0),
            sent_of_entry: AtomicU64::new(0),
        }
    }

    fn pass(&self, step: Step) {
        if let Some((fatal, at)) = self.plan
            && step == fatal
            && self.passed.fetch_add(1, Ordering::Relaxed) + 1 == at
        {
            die();
        }
    }
}

/// The end, as a machine's host may come to it: no handler runs, nothing is flushed, no thread goes on.
fn die() -> ! {
    // SAFETY: kill passes no memory. The signal cannot be caught, so nothing of ours is left to be sound.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

/// A sink with a saboteur around every call.
struct SabotagedSink {
    ring: RingSink,
    saboteur: Arc<Saboteur>,
}

impl Sink for SabotagedSink {
    fn post(&mut self, payload: &[u8]) -> Result<Seq, SinkError> {
        self.saboteur.pass(Step::BeforePost);
        let seq = self.ring.post(payload)?;
        self.saboteur.sent_of_entry.store(0, Ordering::Relaxed);
        self.saboteur.pass(Step::AfterPost);
        Ok(seq)
    }

    fn committed(&mut self) -> Committed {
        self.saboteur.pass(Step::BeforeCommitted);
        let committed = self.ring.committed();
        self.saboteur.pass(Step::AfterCommitted);
        committed
    }

    fn released(&mut self, released: Seq) {
        self.saboteur.pass(Step::BeforeReleased);
        self.ring.released(released);
        self.saboteur.pass(Step::AfterReleased);
    }

    fn notify(&mut self, urgent: bool) {
        self.saboteur.pass(Step::BeforeNotify);
        self.ring.notify(urgent);
        self.saboteur.pass(Step::AfterNotify);
    }

    fn is_behind(&mut self) -> bool {
        self.ring.is_behind()
    }

    fn wait_for_room(&mut self, longest: Duration) {
        self.ring.wait_for_room(longest);
    }

    fn detach(&mut self) {
        self.ring.detach();
    }
}

/// A world whose every output goes into a queue of the kernel's, where it outlives this process.
struct SabotagedWorld {
    out: NetPort,
    saboteur: Arc<Saboteur>,
}

impl World for SabotagedWorld {
    fn send(&mut self, output: &Output) -> Sent {
        self.saboteur.pass(Step::BeforeSend);
        if self.saboteur.sent_of_entry.fetch_add(1, Ordering::Relaxed) > 0 {
            self.saboteur.pass(Step::BetweenSends);
        }
        match self.out.write(&to_message(output)) {
            Ok(true) => {}
            // The same output comes again.
            Ok(false) => {
                self.saboteur.sent_of_entry.fetch_sub(1, Ordering::Relaxed);
                return Sent::Busy;
            }
            // The parent is gone; so are we in a moment.
            Err(_) => {}
        }
        self.saboteur.pass(Step::AfterSend);
        Sent::Done
    }
}

/// Bytes before an output's own in a message, so that no message is too short for a port.
const MESSAGE_HEAD: usize = 16;

fn to_message(output: &Output) -> Vec<u8> {
    let (kind, bytes): (u8, &[u8]) = match output {
        Output::Frame(bytes) => (1, bytes),
        Output::Console(bytes) => (2, bytes),
        Output::PowerOff(status) => (3, std::slice::from_ref(status)),
        // No victim has a disk, and none would send this way what it asks of it.
        Output::Disk(request) => (4, request.written()),
    };
    let mut message = vec![0; MESSAGE_HEAD];
    message[0] = kind;
    message.extend_from_slice(bytes);
    message
}

/// The output in a message of a victim's; `None` for bytes that no victim writes.
#[must_use]
pub fn of_message(message: &[u8]) -> Option<Output> {
    let (head, bytes) = message.split_at_checked(MESSAGE_HEAD)?;
    match (head[0], bytes) {
        (1, bytes) => Some(Output::Frame(bytes.to_vec())),
        (2, bytes) => Some(Output::Console(bytes.to_vec())),
        (3, &[status]) => Some(Output::PowerOff(status)),
        _ => None,
    }
}

/// Reads frames ahead as a primary's I/O thread does: from the cable straight into the lane, then to the stage.
#[derive(Debug)]
pub struct Feeder {
    cable: NetPort,
    lane: LaneWriter,
    committed: Arc<AtomicU64>,
    stage: Arc<Stage>,
    saboteur: Arc<Saboteur>,
}

impl Feeder {
    /// One that keeps `committed` current with the lane's last committed entry.
    #[must_use]
    pub fn new(
        cable: NetPort,
        lane: LaneWriter,
        committed: Arc<AtomicU64>,
        stage: Arc<Stage>,
        saboteur: Arc<Saboteur>,
    ) -> Self {
        Self {
            cable,
            lane,
            committed,
            stage,
            saboteur,
        }
    }

    /// Moves frames until `over` is set.
    ///
    /// # Errors
    /// If the cable or the lane is of no more use.
    pub fn run(&mut self, over: &AtomicBool) -> Result<()> {
        let mut waiter = Waiter::new();
        while !over.load(Ordering::Relaxed) {
            let room = self.stage.has_room(0);
            if room && self.read_one()? {
                continue;
            }
            waiter.clear();
            if room {
                waiter.add(&self.cable, true, false);
            }
            // Only a bound on how long a full lane or stage waits for its next look.
            waiter.wait(Some(Duration::from_millis(1)))?;
        }
        Ok(())
    }

    fn read_one(&mut self) -> Result<bool> {
        let mut slot = match self.lane.reserve_for_salvage(SLOT, FRAME_HEAD) {
            Ok(slot) => slot,
            Err(WriteError::Full { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let payload = slot.payload();
        payload[0] = INPUT_FRAME;
        self.saboteur.pass(Step::BeforeRead);
        let Some(length) = self.cable.read_into(&mut payload[1..])? else {
            return Ok(false);
        };
        self.saboteur.pass(Step::AfterRead);
        let frame = payload[1..=length].to_vec();
        let marks = Marks {
            epoch: EPOCH,
            ..Marks::default()
        };
        let seq = slot.publish(1 + length, marks)?;
        self.saboteur.pass(Step::AfterPublish);
        self.committed
            .store(self.lane.committed()?.0, Ordering::Release);
        // There was room, and this is the only thread that adds.
        let _ = self.stage.push(self.stage.frame(seq, &frame));
        self.saboteur.pass(Step::AfterStage);
        Ok(true)
    }
}

/// A recorder's surroundings.
#[derive(Clone)]
pub struct Surroundings {
    /// Inputs.
    pub stage: Arc<Stage>,
    /// Orders.
    pub orders: Arc<Orders>,
    /// The gate.
    pub outlet: Outlet,
}

impl Surroundings {
    /// New ones around this world.
    ///
    /// # Errors
    /// If the kernel gives no event descriptor.
    pub fn new(world: Box<dyn World>) -> Result<Self> {
        let wake = Arc::new(Wake::new().context("make an event descriptor")?);
        Ok(Self {
            stage: Arc::new(Stage::new(Arc::clone(&wake))),
            orders: Arc::new(Orders::new(wake)),
            outlet: Outlet::new(Gate::new(), world),
        })
    }

    /// The recorder of a new machine in them.
    ///
    /// # Errors
    /// If there is no machine or no random source.
    pub fn recorder<S: Sink>(&self, spec: &MachineSpec, sink: S) -> Result<Recorder<S>> {
        Ok(Recorder::new(Parts {
            machine: Machine::new(&KvmSource::default(), spec)?,
            sink,
            base: Base::default(),
            outlet: self.outlet.clone(),
            stage: Arc::clone(&self.stage),
            orders: Arc::clone(&self.orders),
            samples: Arc::new(Samples::default()),
            clock: GuestClock::starting(GuestTime(0), Instant::now()),
            options: RecordOptions::default(),
            random: random_source()?,
            desk: None,
            intervals: None,
        }))
    }
}

/// A primary that is going to die.
#[derive(Debug)]
pub struct Victim<'a> {
    /// Where the parent listens.
    pub socket: &'a Path,
    /// The cable by which frames come.
    pub cable: NetPort,
    /// The cable by which outputs leave.
    pub world: NetPort,
    /// When to die.
    pub plan: Option<(Step, u64)>,
    /// The guest.
    pub guest: &'a str,
    /// Its words.
    pub words: &'a str,
}

impl Victim<'_> {
    /// Records until it dies by its plan or by the parent's hand; otherwise until the guest turns itself off.
    ///
    /// # Errors
    /// What went wrong before or instead.
    pub fn run(self) -> Result<()> {
        let saboteur = Arc::new(Saboteur::new(self.plan));
        let surroundings = Surroundings::new(Box::new(SabotagedWorld {
            out: self.world,
            saboteur: Arc::clone(&saboteur),
        }))?;
        let stream = UnixStream::connect(self.socket).context("reach the parent")?;
        let ring = shm::connect(&stream)?;
        let committed = Arc::new(AtomicU64::new(0));
        let mut recorder = surroundings.recorder(
            &machine(self.guest, self.words)?,
            SabotagedSink {
                ring: RingSink::new(ring.events, EPOCH, Arc::clone(&committed)),
                saboteur: Arc::clone(&saboteur),
            },
        )?;
        let mut feeder = Feeder::new(
            self.cable,
            ring.inputs,
            committed,
            surroundings.stage,
            saboteur,
        );
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let feeding = scope.spawn(|| feeder.run(&over));
            let ended = recorder.run();
            over.store(true, Ordering::Relaxed);
            let fed = feeding.join().expect("the feeder does not panic");
            ended?;
            fed
        })
    }
}
