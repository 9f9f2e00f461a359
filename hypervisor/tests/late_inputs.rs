//! A log whose lanes are not in step, as over RDMA: an entry comes before the frame that it applies, or without it. On real KVM.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypervisor::backends::wait::Wake;
use hypervisor::devices::DiskConfig;
use hypervisor::digest::Digest;
use hypervisor::entry::{Body, Encoder, Entry, LoggedInput, OutputsDigest, Step};
use hypervisor::event::{GuestTime, Input, Need};
use hypervisor::kvm::KvmSource;
use hypervisor::machine::{Machine, MachineSpec, Phase, Stepped};
use hypervisor::orders::Orders;
use hypervisor::position::Position;
use hypervisor::replay::{ReplayEnd, ReplayError, Replayer};
use hypervisor::ring_log::{INPUT_FRAME, Proof, RingSource};
use rdma_log::transport::sim::{self, Card};
use rdma_log::{Fencer, Marks, Nonce, RingConfig, RingReader, RingWriter, Seq};

fn machine(disk: bool) -> Machine {
    let mut spec = MachineSpec::new("kv", 64, "ip=10.0.0.2/24", 7).unwrap();
    spec.disk = disk.then(|| DiskConfig::new(8, false, false));
    Machine::new(&KvmSource::default(), &spec).unwrap()
}

/// Who has 10.0.0.2? Tell 10.0.0.1.
fn question() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&[2, 0, 0, 0, 9, 1]);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&[2, 0, 0, 0, 9, 1, 10, 0, 0, 1]);
    frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    frame
}

/// The clock at a position: 50 µs an exit.
fn time(position: Position) -> GuestTime {
    GuestTime(position.0 * 50_000)
}

/// A machine that logs every exit.
struct Primary {
    machine: Machine,
    ring: RingWriter,
    card: Card,
    encoder: Encoder,
    released: Seq,
}

impl Primary {
    fn new(disk: bool) -> (Self, RingReader) {
        let config = RingConfig {
            events: 1 << 20,
            inputs: 1 << 16,
        };
        let (ring, reader, card) = sim::pair(&config, Nonce([5; 16]), 3).unwrap();
        let primary = Self {
            machine: machine(disk),
            ring,
            card,
            encoder: Encoder::default(),
            released: Seq::ZERO,
        };
        (primary, reader)
    }

    fn stands_at(&self) -> (Position, Digest) {
        (self.machine.position(), self.machine.digest())
    }

    fn can_receive(&mut self) -> bool {
        self.machine.injectable() && self.machine.can_receive()
    }

    /// To the next exit.
    fn run_on(&mut self) {
        while self.machine.step().unwrap() == Stepped::Kicked {}
    }

    /// Gives the guest what it waits for, and this frame, and logs that. The number of the entry, and whether it had outputs.
    fn give(&mut self, frame: Option<&[u8]>) -> (Seq, bool) {
        let mut outputs = OutputsDigest::default();
        self.machine
            .outputs()
            .for_each(|output| outputs.add(&output));
        let mut step = Step {
            digest: self.machine.digest(),
            outputs: (outputs.count > 0).then_some(outputs),
            ..Step::default()
        };
        let position = self.machine.position();
        let clock = time(position);
        if self.machine.phase() == Phase::Needs(Need::Clock) {
            self.supply(&mut step, Input::Clock(clock), LoggedInput::Clock(clock));
        }
        while let Some(Need::Random(count)) = self.waits_for() {
            let bytes = vec![7; count];
            self.supply(
                &mut step,
                Input::Random(bytes.clone()),
                LoggedInput::Random(bytes),
            );
        }
        if self.machine.injectable() {
            let due = self.machine.ticks_due(clock);
            if due > 0 {
                self.supply(&mut step, Input::Tick(due), LoggedInput::Tick(due));
            }
        }
        if let Some(frame) = frame {
            let logged = LoggedInput::Frames {
                count: 1,
                checksum: rdma_log::crc32c(frame),
            };
            self.supply(&mut step, Input::Frame(frame.to_vec()), logged);
        }
        if self.machine.phase() == Phase::Halted {
            self.supply(&mut step, Input::Clock(clock), LoggedInput::Clock(clock));
        }
        let had_outputs = step.outputs.is_some();
        let body = Body::Step(step);
        let bytes = self.encoder.encode(&Entry { position, body });
        let marks = Marks {
            committed: self.released,
            released: self.released,
            ..Marks::default()
        };
        let seq = self.ring.events.append(bytes, marks).unwrap();
        self.card.deliver_all();
        (seq, had_outputs)
    }

    fn waits_for(&self) -> Option<Need> {
        match self.machine.phase() {
            Phase::Needs(need) => Some(need),
            _ => self.machine.pending(),
        }
    }

    fn supply(&mut self, step: &mut Step, input: Input, logged: LoggedInput) {
        self.machine.supply(&input).unwrap();
        step.inputs.push(logged);
    }

    /// Runs until a frame can be given, logging; where it stood before that exit.
    fn until_it_can_receive(&mut self) -> (Position, Digest) {
        loop {
            self.run_on();
            if self.machine.position().0 > 200 && self.can_receive() {
                // As for a guest that does not wait: the entry before is where a log can end.
                self.give(None);
                let before = self.stands_at();
                self.run_on();
                if self.can_receive() {
                    return before;
                }
            }
            self.give(None);
        }
    }

    /// The frame comes across.
    fn send(&mut self, frame: &[u8]) {
        let payload = [&[INPUT_FRAME], frame].concat();
        self.ring.inputs.append(&payload, Marks::default()).unwrap();
        self.card.deliver_all();
    }
}

type Replaying = Replayer<RingSource>;

/// A thread that replays.
struct Backup {
    thread: JoinHandle<(Result<ReplayEnd, ReplayError>, Replaying)>,
    arrived: Arc<std::sync::atomic::AtomicU64>,
    fencer: Fencer,
    proof: Proof,
}

impl Backup {
    fn start(ring: RingReader, disk: bool) -> Self {
        let proof = Proof::default();
        let source = RingSource::new(ring.events, ring.inputs, proof.clone());
        let orders = Arc::new(Orders::new(Arc::new(Wake::new().unwrap())));
        let mut replayer =
            Replayer::new(machine(disk), source, orders, Duration::ZERO).sure_of_disks(disk);
        let arrived = replayer.source().arrivals();
        let thread = std::thread::spawn(move || (replayer.run(), replayer));
        Self {
            thread,
            arrived,
            fencer: ring.fencer,
            proof,
        }
    }

    /// Until the thread has this entry in hand.
    fn await_entry(&self, seq: Seq) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.arrived.load(Ordering::Relaxed) < seq.0 && !self.thread.is_finished() {
            assert!(Instant::now() < until, "entry {seq} has not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(mut self) -> (Result<ReplayEnd, ReplayError>, Replaying) {
        self.proof.leave(self.fencer.fence().unwrap());
        self.thread.join().unwrap()
    }
}

#[test]
fn an_entry_that_is_quicker_than_its_frame_is_waited_with() {
    let (mut primary, ring) = Primary::new(false);
    let backup = Backup::start(ring, false);
    primary.until_it_can_receive();
    let frame = question();
    let (seq, _) = primary.give(Some(&frame));
    backup.await_entry(seq);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!backup.thread.is_finished(), "it gave up");
    primary.send(&frame);
    for _ in 0..20 {
        primary.run_on();
        primary.give(None);
    }
    let (ended, mut replayer) = backup.end();
    assert_eq!(ended.unwrap(), ReplayEnd::LogOver);
    let found = replayer.machine_mut();
    assert_eq!(found.position(), primary.machine.position());
    assert_eq!(
        found.memory_hash_full().unwrap(),
        primary.machine.memory_hash_full().unwrap()
    );
    assert_eq!(
        found.final_state().unwrap(),
        primary.machine.final_state().unwrap()
    );
}

/// The primary died with a frame on its way. What it made of it has not left, so that the heir goes on from before it.
#[test]
fn a_log_ends_before_an_entry_whose_frame_was_lost() {
    let (mut primary, ring) = Primary::new(false);
    let backup = Backup::start(ring, false);
    let before = primary.until_it_can_receive();
    let frame = question();
    let (seq, _) = primary.give(Some(&frame));
    for _ in 0..5 {
        primary.run_on();
        primary.give(None);
    }
    backup.await_entry(seq);
    let (ended, mut replayer) = backup.end();
    assert_eq!(ended.unwrap(), ReplayEnd::LogOver);
    assert_eq!(replayer.machine().position(), before.0);
    assert_eq!(replayer.machine().digest(), before.1);
    assert_eq!(
        replayer.source().leftover_frames().unwrap(),
        [] as [Vec<u8>; 0]
    );
    let (mut remains, source) = replayer.into_remains();
    assert_eq!(remains.base.position(), before.0);
    assert!(source.into_proof().is_some());
    // It runs on by itself.
    assert_eq!(remains.machine.step().unwrap(), Stepped::SyncPoint);
    assert_eq!(remains.machine.position(), before.0.next());
}

/// A frame that is missing though something that came of it has left is no frame that was on its way.
#[test]
fn a_frame_whose_effects_were_seen_is_not_one_that_was_lost() {
    seen_and_lost(false);
}

/// Nor where the machine has a disk, of which things are asked that wait for nothing.
#[test]
fn nor_is_it_one_on_a_machine_with_a_disk() {
    seen_and_lost(true);
}

fn seen_and_lost(disk: bool) {
    let (mut primary, ring) = Primary::new(disk);
    let backup = Backup::start(ring, disk);
    primary.until_it_can_receive();
    let frame = question();
    let (seq, _) = primary.give(Some(&frame));
    // Its answer.
    for _ in 0..1000 {
        primary.run_on();
        let (answer, had_outputs) = primary.give(None);
        if had_outputs {
            primary.released = answer;
            break;
        }
    }
    assert!(primary.released > seq, "the guest does not answer");
    primary.run_on();
    primary.give(None);
    backup.await_entry(seq);
    let (ended, _) = backup.end();
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("has left the primary"), "{error}");
}
