//! The vCPUs of a machine that has KVM's own interrupt controller: one or several, a thread each, which run by themselves.
//!
//! ```text
//!  vCPU threads   run ─ exit ─▶ lock the devices ─ access ─▶ interrupts to KVM ─▶ run …        stand ─ kicked, complete, wait
//!                                        │                                                        ▲
//!  the machine's owner      inputs ──────┘          outputs, ◀── called ── company                │
//!                           (the same lock)         their end                                 stand(), go()
//! ```
//! Nothing of it can be replayed: which vCPU comes first is nobody's to say. The owner hands in inputs and takes outputs while they
//! run; for a checkpoint all stand, each between two instructions, with what it has asked of a device answered.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdma_log::locks::lock;

use super::{MachineError, Phase, Tally, touch};
use crate::devices::Devices;
use crate::event::{Effect, GuestTime, Input, Need};
use crate::kvm::{CrewState, Exit, Kick, KvmError, Shape, Vcpu, Vm};
use crate::memory::GuestRam;

/// vCPUs that a machine has at most.
pub const MOST: u8 = 8;

/// A vCPU that was kicked leaves the guest within microseconds to a millisecond, where its thread has a CPU. One that does not for so
/// long never will.
const STAND_MOST: Duration = Duration::from_secs(10);
/// A kick that came as the thread was between two runs is noted; this is for what nobody thought of.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// What the vCPU threads need of whoever owns the machine.
pub trait Company: Send + Sync {
    /// The guest's time.
    fn now(&self) -> GuestTime;
    /// Fills this with random bytes.
    fn random(&self, bytes: &mut [u8]);
    /// There are outputs, something is waited for, or the guest is gone.
    fn call(&self);
    /// Whether to be called, too, when the guest has made room for a frame.
    fn waits_for_room(&self) -> bool;
}

/// How the guest ended.
#[derive(Debug)]
enum End {
    Off(u8),
    Crashed,
    Failed(KvmError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Stand,
    Go,
    Quit,
}

#[derive(Debug)]
struct Turn {
    want: Want,
    standing: usize,
}

struct Seat {
    vcpu: Mutex<Vcpu>,
    kick: OnceLock<Kick>,
}

struct Shared {
    seats: Vec<Seat>,
    devices: Arc<Mutex<Devices>>,
    ram: Arc<GuestRam>,
    vm: Arc<Vm>,
    company: OnceLock<Arc<dyn Company>>,
    turn: Mutex<Turn>,
    turned: Condvar,
    /// Looked at between two runs: what `turn` wants is not to run.
    stop: AtomicBool,
    exits: AtomicU64,
    /// Under the devices' lock.
    tally: Arc<Tally>,
    ended: AtomicBool,
    end: Mutex<Option<End>>,
}

/// The vCPUs.
pub struct Crew {
    shared: Arc<Shared>,
    shape: Shape,
    threads: Vec<JoinHandle<()>>,
    stands: bool,
    /// How long it took them to stand, the last time.
    took: Duration,
}

impl Crew {
    pub(super) fn new(
        vcpus: Vec<Vcpu>,
        shape: Shape,
        devices: &Arc<Mutex<Devices>>,
        ram: &Arc<GuestRam>,
        vm: &Arc<Vm>,
        tally: &Arc<Tally>,
    ) -> Self {
        let seats = vcpus
            .into_iter()
            .map(|vcpu| Seat {
                vcpu: Mutex::new(vcpu),
                kick: OnceLock::new(),
            })
            .collect();
        Self {
            shared: Arc::new(Shared {
                seats,
                devices: Arc::clone(devices),
                ram: Arc::clone(ram),
                vm: Arc::clone(vm),
                company: OnceLock::new(),
                turn: Mutex::new(Turn {
                    want: Want::Stand,
                    standing: 0,
                }),
                turned: Condvar::new(),
                stop: AtomicBool::new(true),
                exits: AtomicU64::new(0),
                tally: Arc::clone(tally),
                ended: AtomicBool::new(false),
                end: Mutex::new(None),
            }),
            shape,
            threads: Vec::new(),
            stands: true,
            took: Duration::ZERO,
        }
    }

    /// What a state must be like to be this crew's.
    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// Starts the threads, which stand. Each begins with `first`.
    pub(super) fn man(&mut self, first: impl Fn() + Clone + Send + 'static) -> std::io::Result<()> {
        for number in 0..self.shared.seats.len() {
            let (shared, first) = (Arc::clone(&self.shared), first.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{number}"))
                .spawn(move || {
                    let _ = shared.seats[number].kick.set(Kick::this_thread());
                    first();
                    shared.serve(number);
                })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Whom the threads turn to.
    pub(super) fn accompany(&self, company: Arc<dyn Company>) {
        let _ = self.shared.company.set(company);
    }

    /// All run, unless the guest is gone.
    pub(super) fn go(&mut self) {
        if !self.stands || self.shared.ended.load(Ordering::Acquire) {
            return;
        }
        self.stands = false;
        let mut turn = lock(&self.shared.turn);
        turn.want = Want::Go;
        self.shared.stop.store(false, Ordering::SeqCst);
        self.shared.turned.notify_all();
    }

    /// All stand when this returns: each between two instructions, outside KVM.
    pub(super) fn stand(&mut self) -> Result<(), MachineError> {
        if self.stands {
            return Ok(());
        }
        let shared = &self.shared;
        shared.stop.store(true, Ordering::SeqCst);
        let mut turn = lock(&shared.turn);
        turn.want = Want::Stand;
        shared.kick_all();
        let began = Instant::now();
        while turn.standing < shared.seats.len() {
            let (back, waited) = shared
                .turned
                .wait_timeout(turn, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            turn = back;
            if waited.timed_out() {
                if began.elapsed() > STAND_MOST {
                    return Err(MachineError::Runaway {
                        standing: turn.standing,
                        all: shared.seats.len(),
                    });
                }
                shared.kick_all();
            }
        }
        drop(turn);
        self.stands = true;
        self.took = began.elapsed();
        Ok(())
    }

    /// From the kick to the last one's standing, the last time.
    pub(super) fn stand_took(&self) -> Duration {
        self.took
    }

    /// Whether all stand.
    pub(super) fn stands(&self) -> bool {
        self.stands
    }

    /// Exits so far.
    pub(super) fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    pub(super) fn set_exits(&self, exits: u64) {
        self.shared.exits.store(exits, Ordering::Relaxed);
    }

    /// Whether the guest is gone, or cannot go on.
    pub(super) fn is_over(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// How the guest went, if it did: off, or crashed.
    pub(super) fn gone(&self) -> Option<Phase> {
        if !self.shared.ended.load(Ordering::Acquire) {
            return None;
        }
        match *lock(&self.shared.end) {
            Some(End::Off(status)) => Some(Phase::Off(status)),
            Some(End::Crashed) => Some(Phase::Crashed),
            Some(End::Failed(_)) | None => None,
        }
    }

    /// It is off, whatever its vCPUs say; or it is not.
    pub(super) fn set_off(&self, off: Option<u8>) {
        *lock(&self.shared.end) = off.map(End::Off);
        self.shared.ended.store(off.is_some(), Ordering::Release);
    }

    /// Why it cannot go on, if it cannot; told once.
    pub(super) fn failure(&self) -> Option<KvmError> {
        if !self.shared.ended.load(Ordering::Acquire) {
            return None;
        }
        let mut end = lock(&self.shared.end);
        match end.take() {
            Some(End::Failed(error)) => Some(error),
            other => {
                *end = other;
                None
            }
        }
    }

    /// Raises what the devices ask for.
    pub(super) fn interrupt(&self, devices: &mut Devices) -> Result<(), KvmError> {
        self.shared.interrupt(devices)
    }

    /// The state of all; they stand.
    pub(super) fn state(&self) -> Result<CrewState, KvmError> {
        let seats: Vec<_> = self.shared.seats.iter().map(|s| lock(&s.vcpu)).collect();
        let vcpus: Vec<&Vcpu> = seats.iter().map(|seat| &**seat).collect();
        self.shared.vm.crew_state(&vcpus, self.shape)
    }

    /// Makes them go on from there; they stand.
    pub(super) fn restore(&self, state: &CrewState, passed: Duration) -> Result<(), KvmError> {
        let seats: Vec<_> = self.shared.seats.iter().map(|s| lock(&s.vcpu)).collect();
        let vcpus: Vec<&Vcpu> = seats.iter().map(|seat| &**seat).collect();
        self.shared.vm.set_crew_state(&vcpus, state, passed)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        lock(&self.shared.turn).want = Want::Quit;
        self.shared.turned.notify_all();
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                self.shared.kick_all();
                std::thread::park_timeout(Duration::from_micros(200));
            }
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn kick_all(&self) {
        for kick in self.seats.iter().filter_map(|seat| seat.kick.get()) {
            kick.kick();
        }
    }

    /// A vCPU's thread.
    fn serve(&self, number: usize) {
        let seat = &self.seats[number];
        while self.await_turn() {
            let mut vcpu = lock(&seat.vcpu);
            if let Err(error) = self.run(&mut vcpu) {
                self.end(End::Failed(error));
            }
        }
    }

    /// Stands until it may run; false if it never may again.
    fn await_turn(&self) -> bool {
        let mut turn = lock(&self.turn);
        turn.standing += 1;
        self.turned.notify_all();
        while turn.want == Want::Stand {
            turn = self
                .turned
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
        turn.standing -= 1;
        turn.want == Want::Go
    }

    /// Runs until all are to stand, and then to the end of the instruction.
    fn run(&self, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        while !self.stop.load(Ordering::Relaxed) {
            let exit = vcpu.run()?;
            self.answer(vcpu, exit)?;
        }
        while vcpu.is_unfinished() {
            let exit = vcpu.go_no_further()?;
            self.answer(vcpu, exit)?;
        }
        Ok(())
    }

    /// Hands an exit to the devices, and answers it.
    fn answer(&self, vcpu: &mut Vcpu, exit: Exit) -> Result<(), KvmError> {
        if exit == Exit::Interrupted {
            return Ok(());
        }
        self.exits.fetch_add(1, Ordering::Relaxed);
        let Some(company) = self.company.get() else {
            return Err(KvmError::Stopped {
                why: "a vCPU runs, and nobody takes what its guest sends; this is a bug".into(),
            });
        };
        let mut devices = lock(&self.devices);
        self.tally.count(exit);
        let effect = match exit {
            Exit::Port { .. } | Exit::Mmio { .. } => {
                touch(&mut devices, &self.ram, exit, vcpu.data())
            }
            // A triple fault is how some kernels reset, and none starts anew here.
            Exit::Shutdown => Effect::Crash,
            // KVM waits by itself, and answers registers by itself.
            other => {
                return Err(KvmError::Stopped {
                    why: format!("{other:?}, which KVM's own interrupt controller should handle"),
                });
            }
        };
        let input = match effect {
            Effect::Done => None,
            Effect::Halt | Effect::Needs(Need::Clock) => Some(Input::Clock(company.now())),
            Effect::Needs(Need::Random(count)) => {
                let mut bytes = vec![0; count];
                company.random(&mut bytes);
                Some(Input::Random(bytes))
            }
            Effect::PowerOff(status) => {
                self.end(End::Off(status));
                None
            }
            // It is not started anew: KVM's own controllers would have to be, too.
            Effect::Reset => {
                devices.turn_off(0);
                self.end(End::Off(0));
                None
            }
            Effect::Crash => {
                self.end(End::Crashed);
                None
            }
        };
        if let Some(input) = input {
            let answered = devices.answer(&input, vcpu.data());
            debug_assert!(answered.is_ok(), "it is what the access waits for");
        }
        self.interrupt(&mut devices)?;
        let calls = devices.has_outputs()
            || devices.pending().is_some()
            || company.waits_for_room() && devices.can_receive(&self.ram);
        drop(devices);
        if calls {
            company.call();
        }
        Ok(())
    }

    /// Raises what the devices ask for. Under their lock: in the order in which they did.
    fn interrupt(&self, devices: &mut Devices) -> Result<(), KvmError> {
        devices
            .take_edges()
            .try_for_each(|line| self.vm.pulse(line))
    }

    fn end(&self, end: End) {
        let mut first = lock(&self.end);
        if first.is_none() {
            *first = Some(end);
        }
        drop(first);
        self.ended.store(true, Ordering::Release);
        let mut turn = lock(&self.turn);
        if turn.want == Want::Go {
            turn.want = Want::Stand;
        }
        self.stop.store(true, Ordering::SeqCst);
        drop(turn);
        if let Some(company) = self.company.get() {
            company.call();
        }
    }
}
