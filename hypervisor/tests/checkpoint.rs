//! Checkpoints on real KVM: a machine that was put together from a checkpoint goes on exactly as the one it was taken of.
//!
//! What happens to a guest here is a function of where it stands, so that two machines can be given the same without
//! a log between them.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hypervisor::checkpoint::{
    CheckpointError, FormatError, Image, PART_BYTES, Pages, Remembered, Shadow,
};
use hypervisor::entry::Base;
use hypervisor::event::{GuestTime, Input, Need, Output};
use hypervisor::kvm::{CpuState, Kick, KvmSource};
use hypervisor::machine::{Machine, MachineSpec, Phase, Stepped};

/// A fixed sequence of numbers that look random (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

/// Kicks this thread's vCPU at random moments until it is dropped.
struct Kicker {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Kicker {
    fn start(kick: Kick, seed: u64) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut numbers = Numbers(seed);
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_micros(100 + numbers.next() % 3000));
                kick.kick();
            }
        });
        Self {
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn machine(guest: &str, words: &str) -> Machine {
    let memory = if guest == "kv" { 64 } else { 16 };
    let spec = MachineSpec::new(guest, memory, words, 7).unwrap();
    Machine::new(&KvmSource::default(), &spec).unwrap()
}

/// The clock at a position: 50 µs an exit.
fn time(position: u64) -> GuestTime {
    GuestTime(position * 50_000)
}

/// Who has 10.0.0.2? Tell 10.0.0.1.
fn question(number: u64) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&[2, 0, 0, 0, 9, number as u8]);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&[2, 0, 0, 0, 9, number as u8, 10, 0, 0, 1]);
    frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    frame
}

/// Gives the guest what comes at its sync point. Outputs come back; `None` once the guest is gone.
fn serve(machine: &mut Machine) -> Option<Vec<Output>> {
    serve_as(machine, machine.position().0)
}

/// The same, as if it stood at this position.
fn serve_as(machine: &mut Machine, position: u64) -> Option<Vec<Output>> {
    let outputs = machine.outputs().collect();
    let random = |count: usize| {
        let mut numbers = Numbers(position);
        Input::Random(
            std::iter::repeat_with(|| numbers.next() as u8)
                .take(count)
                .collect(),
        )
    };
    match machine.phase() {
        Phase::Needs(Need::Clock) => machine.supply(&Input::Clock(time(position))).unwrap(),
        Phase::Needs(Need::Random(count)) => machine.supply(&random(count)).unwrap(),
        _ => {}
    }
    while let Some(Need::Random(count)) = machine.pending() {
        machine.supply(&random(count)).unwrap();
    }
    if machine.injectable() {
        let due = machine.ticks_due(time(position));
        if due > 0 {
            machine.supply(&Input::Tick(due)).unwrap();
        }
        if machine.can_receive() && (position.is_multiple_of(3) || machine.phase() == Phase::Halted)
        {
            machine.supply(&Input::Frame(question(position))).unwrap();
        }
    }
    match machine.phase() {
        Phase::Halted => machine.supply(&Input::Clock(time(position))).unwrap(),
        // Until the next tick wakes it, whenever that is.
        Phase::HltInstruction => machine.supply(&Input::Tick(1)).unwrap(),
        Phase::Off(_) | Phase::Crashed => return None,
        _ => {}
    }
    Some(outputs)
}

/// Runs on until it was kicked (true) or served at its next sync point (false).
fn advance(machine: &mut Machine) -> bool {
    match machine.step().unwrap() {
        Stepped::Kicked => true,
        Stepped::SyncPoint => {
            assert!(
                serve(machine).is_some(),
                "the guest ended at {}",
                machine.position()
            );
            false
        }
        Stepped::Debugged => unreachable!("nobody debugs it"),
    }
}

/// The CPU's state in a checkpoint.
fn cpu(machine: &mut Machine) -> CpuState {
    let ram_pages = 1 << 14;
    let bytes = machine
        .save(Pages::All, Base::default(), Vec::new())
        .unwrap();
    let pages = [ram_pages, ram_pages / 4].into_iter();
    let image = pages
        .map(|pages| Image::parse(&bytes, pages))
        .find_map(Result::ok)
        .unwrap();
    CpuState::from_bytes(&image.state.cpu).unwrap()
}

/// Both machines do the same for so many exits, however often they are kicked.
fn same(first: &mut Machine, second: &mut Machine, exits: u64) {
    let end = first.position().0 + exits;
    while first.position().0 < end {
        for machine in [&mut *first, &mut *second] {
            while machine.step().unwrap() == Stepped::Kicked {}
        }
        if first.digest() != second.digest() {
            let position = first.position();
            let found = second.history().at(position).unwrap();
            panic!(
                "{position}: {:?}\n{}\n{found}",
                first
                    .history()
                    .at(position)
                    .unwrap()
                    .first_difference(found),
                first.history().at(position).unwrap()
            );
        }
        assert_eq!(serve(first), serve(second), "at {}", first.position());
    }
    assert_eq!(
        first.memory_hash_full().unwrap(),
        second.memory_hash_full().unwrap()
    );
    // The same as the final states, but it says what differs.
    assert_eq!(cpu(first), cpu(second));
    assert_eq!(first.final_state().unwrap(), second.final_state().unwrap());
}

/// Whole checkpoints at random moments, each put into a machine that has just been made.
fn whole(guest: &str, words: &str, between: u64, after: u64) {
    let mut first = machine(guest, words);
    // Made before anything kicks: a signal may interrupt the making of a virtual machine.
    let mut others: Vec<_> = std::iter::repeat_with(|| machine(guest, words))
        .take(6)
        .collect();
    let _kicker = Kicker::start(first.kick_handle(), 11);
    let mut numbers = Numbers(guest.len() as u64);
    let (mut kicked, mut at_exits) = (0, 0);
    let mut round = 0;
    while let Some(mut second) = others.pop() {
        round += 1;
        let stop = first.position().0 + 1 + numbers.next() % between;
        // Every other round stops in the middle of a run, the others at a sync point.
        let in_the_middle = round % 2 == 0;
        while !(first.position().0 >= stop && advance(&mut first) == in_the_middle) {
            if first.position().0 < stop {
                advance(&mut first);
            }
        }
        if in_the_middle {
            kicked += 1
        } else {
            at_exits += 1
        }
        let base = Base::new(first.position(), time(first.position().0));
        let staged = vec![question(1), question(2)];
        let bytes = first.save(Pages::All, base, staged.clone()).unwrap();
        let restored = second.restore(&bytes).unwrap();
        assert_eq!((restored.base, restored.staged), (base, staged));
        assert_eq!(first.position(), second.position());
        assert_eq!(
            first.memory_hash_full().unwrap(),
            second.memory_hash_full().unwrap()
        );
        assert_eq!(cpu(&mut first), cpu(&mut second));
        same(&mut first, &mut second, after);
    }
    assert_eq!((kicked, at_exits), (3, 3));
}

#[test]
fn a_computing_guest_goes_on_from_a_checkpoint() {
    whole("compute", "rounds=1", 20, 30);
}

#[test]
fn a_guest_of_interrupts_goes_on_from_a_checkpoint() {
    whole("irq", "hz=2000", 3000, 2000);
}

#[test]
fn a_guest_of_clocks_goes_on_from_a_checkpoint() {
    whole("clock", "", 3000, 1000);
}

#[test]
fn a_guest_that_rewrites_its_memory_goes_on_from_a_checkpoint() {
    whole("memory", "", 30, 30);
}

#[test]
fn a_server_goes_on_from_a_checkpoint() {
    whole("kv", "ip=10.0.0.2/24", 300, 500);
}

/// One machine follows another by deltas alone: it never runs, and memory checks between share the dirty log.
#[test]
fn deltas_add_up_to_the_machine() {
    for (guest, words) in [
        ("memory", ""),
        ("kv", "ip=10.0.0.2/24"),
        ("compute", "rounds=1"),
    ] {
        let mut first = machine(guest, words);
        let mut second = machine(guest, words);
        first.track_changes().unwrap();
        let _kicker = Kicker::start(first.kick_handle(), 5);
        let mut numbers = Numbers(3);
        for round in 0..12 {
            for _ in 0..1 + numbers.next() % 40 {
                advance(&mut first);
            }
            if round % 3 == 1 {
                // The other consumer of the dirty log.
                assert_eq!(
                    first.memory_hash().unwrap(),
                    first.memory_hash_full().unwrap()
                );
                assert_eq!(
                    second.memory_hash().unwrap(),
                    second.memory_hash_full().unwrap()
                );
            }
            let bytes = first
                .save(Pages::Changed, Base::default(), Vec::new())
                .unwrap();
            let mut shadow = Shadow::new(u64::from(if guest == "kv" { 64_u32 } else { 16 }) << 8);
            for (part, bytes) in bytes.chunks(PART_BYTES).enumerate() {
                shadow.add(part as u32, bytes).unwrap();
            }
            second.restore(&shadow.take()).unwrap();
            assert_eq!(
                first.memory_hash_full().unwrap(),
                second.memory_hash_full().unwrap(),
                "{guest} {round}"
            );
        }
        same(&mut first, &mut second, 20);
    }
}

/// A string read from a port is written to memory when KVM completes the exit's instruction: at the checkpoint, not before.
#[test]
fn what_an_exit_reads_into_memory_is_in_its_delta() {
    let words = "only=7";
    let (mut first, mut second) = (machine("hostile", words), machine("hostile", words));
    first.track_changes().unwrap();
    for round in 0..200 {
        while advance(&mut first) {}
        let bytes = first
            .save(Pages::Changed, Base::default(), Vec::new())
            .unwrap();
        second.restore(&bytes).unwrap();
        assert_eq!(
            first.memory_hash_full().unwrap(),
            second.memory_hash_full().unwrap(),
            "{round}"
        );
    }
    same(&mut first, &mut second, 50);
}

/// Pages told by what has changed in them since the interval before, on a machine that has had them all; one that has not says so, and stays as it is. Those that
/// are written all the time are left open to the guest.
#[test]
fn intervals_of_patches_make_the_same_machine() {
    let words = "ip=10.0.0.2/24";
    let (mut first, mut second) = (machine("kv", words), machine("kv", words));
    first.track_changes().unwrap();
    let mut other = Remembered::new(first.pages());
    let mut spare = Vec::new();
    let (mut plain, mut told, mut patches, mut for_nothing) = (0, 0, 0, 0);
    let (mut late, mut unwritten) = (None, None::<Vec<_>>);
    for round in 0..60 {
        for _ in 0..20 {
            while advance(&mut first) {}
        }
        if !matches!(first.phase(), Phase::Ready | Phase::HltInstruction) {
            continue;
        }
        first.outputs().for_each(drop);
        if let Some(unwritten) = unwritten.take() {
            for_nothing += unwritten.len();
            first.leave_open(unwritten);
        }
        let mut capture = first
            .capture(Pages::Changed, Base::default(), Vec::new(), Vec::new())
            .unwrap();
        plain += capture.bytes();
        unwritten = Some(capture.patch(&mut other, &mut spare, false));
        let bytes = capture.sealed();
        told += bytes.len();
        let of_it = Image::parse(&bytes, first.pages()).unwrap().patches().len();
        patches += of_it;
        second.adopt(&bytes).unwrap();
        assert_eq!(
            first.memory_hash_full().unwrap(),
            second.memory_hash_full().unwrap(),
            "{round}"
        );
        if of_it > 0 {
            late = Some(bytes);
        }
    }
    assert!(
        patches > 60 && told < plain / 2 && for_nothing > 0,
        "{patches} patches, {told} bytes for {plain}, {for_nothing} pages were open for nothing"
    );
    // It has had none of those before.
    let mut third = machine("kv", words);
    let before = third.memory_hash_full().unwrap();
    let error = third.adopt(&late.unwrap()).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Format(FormatError::Patched { .. })),
        "{error}"
    );
    assert_eq!(third.memory_hash_full().unwrap(), before);
}

/// A guest that waits in HALT is taken as it was before the instruction: the machine that is made of it makes that exit again,
/// and then both go on alike. Its vCPU takes a state only once, before it runs.
#[test]
fn a_guest_that_waits_makes_its_exit_again() {
    let words = "ip=10.0.0.2/24";
    let (mut first, mut second) = (machine("kv", words), machine("kv", words));
    first.track_changes().unwrap();
    let mut waited = 0;
    let mut adopted = None;
    while waited < 20 {
        if first.step().unwrap() == Stepped::Kicked {
            continue;
        }
        if first.phase() != Phase::Halted {
            serve(&mut first);
            continue;
        }
        waited += 1;
        first.outputs().for_each(drop);
        let base = Base::new(first.position(), time(waited));
        let capture = first
            .capture(Pages::Changed, base, Vec::new(), Vec::new())
            .unwrap();
        assert!(capture.pages() > 0);
        let taken = second.adopt(&capture.sealed()).unwrap();
        assert_eq!((taken.base, second.position()), (base, first.position()));
        adopted = Some(taken.cpus);
        if waited < 20 {
            serve(&mut first);
        }
    }
    second.settle(&adopted.unwrap(), Duration::ZERO).unwrap();
    assert_eq!(second.phase(), Phase::Ready);
    assert_eq!(second.step().unwrap(), Stepped::SyncPoint);
    assert_eq!(second.phase(), Phase::Halted);
    assert_eq!(second.position(), first.position().next());
    for _ in 0..300 {
        let position = first.position().0;
        assert_eq!(
            serve_as(&mut first, position),
            serve_as(&mut second, position),
            "at {position}"
        );
        for machine in [&mut first, &mut second] {
            while machine.step().unwrap() == Stepped::Kicked {}
        }
    }
    let position = first.position().0;
    serve_as(&mut first, position);
    serve_as(&mut second, position);
    assert_eq!(
        first.memory_hash_full().unwrap(),
        second.memory_hash_full().unwrap()
    );
    assert_eq!(cpu(&mut first), cpu(&mut second));
    assert_eq!(first.final_state().unwrap(), second.final_state().unwrap());
}

#[test]
fn a_guest_that_turned_itself_off_stays_off() {
    let words = "rounds=1 reports=1";
    let (mut first, mut second) = (machine("compute", words), machine("compute", words));
    first.track_changes().unwrap();
    while !matches!(first.phase(), Phase::Off(_)) {
        if first.step().unwrap() == Stepped::SyncPoint {
            serve(&mut first);
        }
    }
    let capture = first.capture(Pages::Changed, Base::default(), Vec::new(), Vec::new());
    second.adopt(&capture.unwrap().sealed()).unwrap();
    assert_eq!(second.phase(), first.phase());
    assert_eq!(
        first.memory_hash_full().unwrap(),
        second.memory_hash_full().unwrap()
    );
}

/// A delta put into a machine that stands at an exit whose instruction KVM has not completed.
#[test]
fn an_unfinished_exit_is_forgotten() {
    let (mut first, mut second) = (machine("memory", ""), machine("memory", ""));
    first.track_changes().unwrap();
    for _ in 0..50 {
        while advance(&mut first) {}
    }
    for _ in 0..40 {
        while advance(&mut second) {}
    }
    let bytes = first
        .save(Pages::Changed, Base::default(), Vec::new())
        .unwrap();
    second.restore(&bytes).unwrap();
    same(&mut first, &mut second, 50);
    // Back is no way to go: the pages since are not in it.
    assert!(matches!(
        second.restore(&bytes),
        Err(CheckpointError::Format(_))
    ));
}

#[test]
fn a_guest_that_waits_and_a_corrupt_checkpoint_are_refused_and_nothing_changes() {
    let (mut first, mut second) = (machine("clock", ""), machine("clock", ""));
    loop {
        assert_eq!(first.step().unwrap(), Stepped::SyncPoint);
        if matches!(first.phase(), Phase::Needs(_)) {
            break;
        }
        serve(&mut first);
    }
    let refused = first.save(Pages::All, Base::default(), Vec::new());
    assert!(
        matches!(
            refused,
            Err(CheckpointError::NotReady { .. } | CheckpointError::Outputs)
        ),
        "{refused:?}"
    );
    serve(&mut first);
    let good = first.save(Pages::All, Base::default(), Vec::new()).unwrap();
    let before = second.memory_hash_full().unwrap();
    for at in (0..good.len()).step_by(good.len() / 50) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        second.restore(&bad).unwrap_err();
        second.restore(&good[..at]).unwrap_err();
    }
    let mut larger = Machine::new(
        &KvmSource::default(),
        &MachineSpec::new("clock", 32, "", 7).unwrap(),
    )
    .unwrap();
    assert!(matches!(
        larger.restore(&good),
        Err(CheckpointError::Format(_))
    ));
    assert_eq!(
        (second.position().0, second.memory_hash_full().unwrap()),
        (0, before)
    );
    second.restore(&good).unwrap();
    same(&mut first, &mut second, 100);
}
