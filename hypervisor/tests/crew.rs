//! Several vCPUs on real KVM: they start each other, run by themselves, stand together, and go on in another machine, where time has
//! not gone back.
#![forbid(unsafe_code)]

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hypervisor::boot::linux::SEED_BYTES;
use hypervisor::checkpoint::Pages;
use hypervisor::entry::Base;
use hypervisor::event::{GuestTime, Output};
use hypervisor::kvm::{Capabilities, KvmSource};
use hypervisor::machine::{ClockSource, Company, Machine, MachineSpec, Phase};
use hypervisor::orders::Order;
use hypervisor::record::{Ended, Recorder};

/// A kernel of sorts: the first vCPU starts the others, reads its time stamp again and again, and prints x; the second counts, and prints
/// y. Its source, for `as`:
///
/// ```text
///         lea rsi, [rip+other]           loop:   rdtsc                               .code16
///         mov edi, 0x8000                        shl rdx, 32                 other:  xor ax, ax
///         mov ecx, offset end-other              or rax, rdx                         mov ds, ax
///         rep movsb                              cmp rax, [0x6018]           again:  lock inc dword ptr [0x6000]
///         mov ebx, 0xfee00000                    jae on                              test word ptr [0x6000], 0xff
///         mov dword ptr [rbx+0xf0], 0x1ff        inc qword ptr [0x6010]              jnz again
///         mov dword ptr [rbx+0x300], 0xc4500  on: mov [0x6018], rax                  mov dx, 0x3f8
///         mov dword ptr [rbx+0x300], 0xc4608     inc qword ptr [0x6008]              mov al, 'y'
///                                                test word ptr [0x6008], 0xff        out dx, al
///                                                jnz loop                            jmp again
///                                                mov edx, 0x3f8              end:
///                                                mov al, 'x'
///                                                out dx, al
///                                                jmp loop
/// ```
const CODE: &[u8] = &[
    0x48, 0x8d, 0x35, 0x70, 0x00, 0x00, 0x00, 0xbf, 0x00, 0x80, 0x00, 0x00, 0xb9, 0x1a, 0x00, 0x00,
    0x00, 0xf3, 0xa4, 0xbb, 0x00, 0x00, 0xe0, 0xfe, 0xc7, 0x83, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01,
    0x00, 0x00, 0xc7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x00, 0x45, 0x0c, 0x00, 0xc7, 0x83, 0x00, 0x03,
    0x00, 0x00, 0x08, 0x46, 0x0c, 0x00, 0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0x48,
    0x3b, 0x04, 0x25, 0x18, 0x60, 0x00, 0x00, 0x73, 0x08, 0x48, 0xff, 0x04, 0x25, 0x10, 0x60, 0x00,
    0x00, 0x48, 0x89, 0x04, 0x25, 0x18, 0x60, 0x00, 0x00, 0x48, 0xff, 0x04, 0x25, 0x08, 0x60, 0x00,
    0x00, 0x66, 0xf7, 0x04, 0x25, 0x08, 0x60, 0x00, 0x00, 0xff, 0x00, 0x75, 0xc9, 0xba, 0xf8, 0x03,
    0x00, 0x00, 0xb0, 0x78, 0xee, 0xeb, 0xbf, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xf0, 0xff, 0x06, 0x00,
    0x60, 0xf7, 0x06, 0x00, 0x60, 0xff, 0x00, 0x75, 0xf2, 0xba, 0xf8, 0x03, 0xb0, 0x79, 0xee, 0xeb,
    0xea,
];
const COUNT_OF_OTHER: u64 = 0x6000;
const COUNT_OF_FIRST: u64 = 0x6008;
const TIMES_BACK: u64 = 0x6010;
const TIME_STAMP: u64 = 0x6018;

/// A driver that means harm: it sets up the receive queue of the network device and the entropy device's, each of one buffer, and then
/// changes both available rings for ever, without an exit. A frame has room now and then, and random bytes are always asked for. Its
/// source, for `as`:
///
/// ```text
///         mov ebx, 0xd0001000                    mov dword ptr [rbx+0xa0], eax              mov dword ptr [rcx], 0
///         mov esi, 0x40000                       mov dword ptr [rbx+0x44], 1        loop:   mov eax, [0x42002]
/// device: mov dword ptr [rbx+0x70], 0            mov dword ptr [rbx+0x70], 0xf              mov [0x41002], ax
///         mov dword ptr [rbx+0x70], 1            mov dword ptr [rsi], 0x50000               inc eax
///         mov dword ptr [rbx+0x70], 3            mov dword ptr [rsi+8], 2048                mov [0x41002], ax
///         mov dword ptr [rbx+0x24], 1            mov dword ptr [rsi+12], 2                  mov eax, [0x46002]
///         mov dword ptr [rbx+0x20], 1            add ebx, 0x1000                            add eax, 64
///         mov dword ptr [rbx+0x70], 0xb          add esi, 0x4000                            mov [0x45002], ax
///         mov dword ptr [rbx+0x30], 0            cmp ebx, 0xd0003000                        jmp loop
///         mov dword ptr [rbx+0x38], 256          jne device
///         mov dword ptr [rbx+0x80], esi          mov ecx, 0xd0002050
///         lea eax, [rsi+0x1000]                  mov word ptr [0x45002], 64
///         mov dword ptr [rbx+0x90], eax
///         lea eax, [rsi+0x2000]
/// ```
const RINGS: &[u8] = &[
    0xbb, 0x00, 0x10, 0x00, 0xd0, 0xbe, 0x00, 0x00, 0x04, 0x00, 0xc7, 0x43, 0x70, 0x00, 0x00, 0x00,
    0x00, 0xc7, 0x43, 0x70, 0x01, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x70, 0x03, 0x00, 0x00, 0x00, 0xc7,
    0x43, 0x24, 0x01, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x20, 0x01, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x70,
    0x0b, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x30, 0x00, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x38, 0x00, 0x01,
    0x00, 0x00, 0x89, 0xb3, 0x80, 0x00, 0x00, 0x00, 0x8d, 0x86, 0x00, 0x10, 0x00, 0x00, 0x89, 0x83,
    0x90, 0x00, 0x00, 0x00, 0x8d, 0x86, 0x00, 0x20, 0x00, 0x00, 0x89, 0x83, 0xa0, 0x00, 0x00, 0x00,
    0xc7, 0x43, 0x44, 0x01, 0x00, 0x00, 0x00, 0xc7, 0x43, 0x70, 0x0f, 0x00, 0x00, 0x00, 0xc7, 0x06,
    0x00, 0x00, 0x05, 0x00, 0xc7, 0x46, 0x08, 0x00, 0x08, 0x00, 0x00, 0xc7, 0x46, 0x0c, 0x02, 0x00,
    0x00, 0x00, 0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, 0x81, 0xc6, 0x00, 0x40, 0x00, 0x00, 0x81, 0xfb,
    0x00, 0x30, 0x00, 0xd0, 0x0f, 0x85, 0x70, 0xff, 0xff, 0xff, 0xb9, 0x50, 0x20, 0x00, 0xd0, 0x66,
    0xc7, 0x04, 0x25, 0x02, 0x50, 0x04, 0x00, 0x40, 0x00, 0xc7, 0x01, 0x00, 0x00, 0x00, 0x00, 0x8b,
    0x04, 0x25, 0x02, 0x20, 0x04, 0x00, 0x66, 0x89, 0x04, 0x25, 0x02, 0x10, 0x04, 0x00, 0xff, 0xc0,
    0x66, 0x89, 0x04, 0x25, 0x02, 0x10, 0x04, 0x00, 0x8b, 0x04, 0x25, 0x02, 0x60, 0x04, 0x00, 0x83,
    0xc0, 0x40, 0x66, 0x89, 0x04, 0x25, 0x02, 0x50, 0x04, 0x00, 0xeb, 0xd3,
];

/// An ELF file of one segment at 16 MiB.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let length = (code.len() as u64).to_le_bytes();
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes());
    put(80, &0x100_0000u64.to_le_bytes());
    put(88, &0x100_0000u64.to_le_bytes());
    put(96, &length);
    put(104, &length);
    file.extend_from_slice(code);
    file
}

fn machine(vcpus: u8, code: &[u8]) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmlinux");
    std::fs::write(&path, kernel(code)).unwrap();
    let (clock, seed) = (ClockSource::Page, [0; SEED_BYTES]);
    let spec = MachineSpec::linux(&path, None, 128, "", 0, (clock, seed)).unwrap();
    let spec = spec.with_vcpus(Some(vcpus));
    let mut machine = Machine::new(&KvmSource::default(), &spec).unwrap();
    machine.track_changes().unwrap();
    machine.man(|| ()).unwrap();
    machine
}

/// Whom the vCPUs turn to: it is told when there is something to take.
#[derive(Default)]
struct Listener {
    called: Mutex<bool>,
    changed: Condvar,
}

impl Company for Listener {
    fn now(&self) -> GuestTime {
        GuestTime(0)
    }

    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn call(&self) {
        *self.called.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn waits_for_room(&self) -> bool {
        false
    }
}

struct Running {
    machine: Machine,
    listener: Arc<Listener>,
}

/// Long enough for a host with much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

impl Running {
    fn new(vcpus: u8) -> Self {
        let machine = machine(vcpus, CODE);
        let listener = Arc::new(Listener::default());
        machine.accompany(Arc::clone(&listener) as Arc<dyn Company>);
        Self { machine, listener }
    }

    /// Runs until all of these were printed, and stands.
    fn until_printed(&mut self, wanted: &[u8]) {
        let end = Instant::now() + PATIENCE;
        let mut printed = Vec::new();
        self.machine.go();
        while !wanted.iter().all(|byte| printed.contains(byte)) {
            let mut called = self.listener.called.lock().unwrap();
            while !*called {
                assert!(Instant::now() < end, "only {printed:?} came");
                let waited = self.listener.changed.wait_timeout(called, PATIENCE / 10);
                called = waited.unwrap().0;
                self.machine.check_crew().unwrap();
            }
            *called = false;
            drop(called);
            for output in self.machine.outputs() {
                let Output::Console(bytes) = output else {
                    panic!("{output:?}");
                };
                printed.extend(bytes);
            }
        }
        self.machine.stand().unwrap();
        self.machine.outputs().for_each(drop);
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.machine.shared_ram().read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn counts(&self) -> [u64; 2] {
        [self.word(COUNT_OF_FIRST), self.word(COUNT_OF_OTHER)]
    }

    fn capture(&mut self, pages: Pages) -> Vec<u8> {
        let base = Base::new(self.machine.position(), GuestTime(0));
        let spare = Vec::new();
        let capture = self.machine.capture(pages, base, Vec::new(), spare);
        capture.unwrap().sealed()
    }
}

#[test]
fn several_vcpus_stand_together_and_go_on_in_another_machine() {
    let mut first = Running::new(2);
    first.until_printed(b"xy");
    let counts = first.counts();
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    // They stand: nothing changes, and nothing is written.
    let _ = first.machine.take_changed().unwrap();
    assert_eq!(first.counts(), counts);
    assert!(first.machine.take_changed().unwrap().is_empty());
    let whole = first.capture(Pages::All);

    let mut second = Running::new(2);
    second.machine.restore(&whole).unwrap();
    assert_eq!(second.counts(), counts);
    assert_eq!(second.machine.position(), first.machine.position());
    second.until_printed(b"xy");
    let later = second.counts();
    assert!(later[0] > counts[0] && later[1] > counts[1], "{later:?}");
    assert!(second.word(TIME_STAMP) > first.word(TIME_STAMP));
    assert_eq!(second.word(TIMES_BACK), 0, "time went back");

    // And as a backup does it: page by page, and the vCPUs once, a while later.
    let mut third = Running::new(2);
    third.machine.restore(&whole).unwrap();
    let mut adopted = None;
    for _ in 0..5 {
        second.until_printed(b"xyx");
        let interval = second.capture(Pages::Changed);
        adopted = Some(third.machine.adopt(&interval).unwrap());
    }
    assert_eq!(third.counts(), second.counts());
    let rate = rate(&mut second);
    let before = third.word(TIME_STAMP);
    let passed = Duration::from_secs(1000);
    let cpus = adopted.unwrap().cpus;
    third.machine.settle(&cpus, passed).unwrap();
    third.until_printed(b"xy");
    let ahead = (third.word(TIME_STAMP) - before) as f64 / rate;
    // A software KVM shows the host's own, whatever it is told.
    let capabilities = Capabilities::of(&KvmSource::default().open().unwrap());
    assert_eq!(ahead > 500.0, capabilities.moves_time_stamps, "{ahead} s");
    assert_eq!(third.word(TIMES_BACK), 0, "time went back");
}

/// Time stamps a second, roughly: what a host that has much else to do makes of it.
fn rate(running: &mut Running) -> f64 {
    let before = running.word(TIME_STAMP);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(200) {
        running.until_printed(b"x");
    }
    (running.word(TIME_STAMP) - before) as f64 / began.elapsed().as_secs_f64()
}

#[test]
fn a_state_of_another_machine_is_refused_and_changes_nothing() {
    let mut one = Running::new(1);
    one.until_printed(b"x");
    let of_one = one.capture(Pages::All);
    let mut two = Running::new(2);
    let error = two.machine.restore(&of_one).unwrap_err().to_string();
    assert!(error.contains("--vcpus"), "{error}");
    assert_eq!(two.counts(), [0, 0]);
    two.until_printed(b"xy");
}

/// Whoever stops them again and again finds them where they are, and time never goes back.
#[test]
fn they_can_be_stopped_at_any_time() {
    let mut running = Running::new(2);
    running.until_printed(b"xy");
    let mut stops = Vec::new();
    let before = running.counts();
    for _ in 0..200 {
        running.machine.go();
        std::thread::yield_now();
        let began = Instant::now();
        running.machine.stand().unwrap();
        stops.push(began.elapsed());
        running.machine.outputs().for_each(drop);
        assert_eq!(running.machine.phase(), Phase::Ready);
        assert!(!running.capture(Pages::Changed).is_empty());
    }
    running.until_printed(b"xy");
    let after = running.counts();
    assert!(after[0] > before[0] && after[1] > before[1]);
    stops.sort();
    println!("stops took {:?} (p50), {:?}", stops[100], &stops[185..]);
    assert_eq!(running.word(TIMES_BACK), 0);
}

/// KVM has the timer that the guest knows: what firmware leaves running of ours brings it no interrupt.
#[test]
fn the_timer_is_kvms() {
    let machine = machine(1, CODE);
    let later = GuestTime(3_600_000_000_000);
    assert_eq!((machine.next_tick(), machine.ticks_due(later)), (None, 0));
}

/// What was found in a ring may be another thing when it is worked: vCPUs run on meanwhile. That loses their frames and ends nothing, and
/// whoever gives a guest what it asks for looks up now and then.
#[test]
fn a_guest_that_changes_its_rings_meanwhile_harms_itself_alone() {
    const FRAMES: usize = 1_000;
    let parts = common::parts(machine(1, RINGS));
    let (stage, orders) = (Arc::clone(&parts.stage), Arc::clone(&parts.orders));
    let recorder = std::thread::spawn(move || Recorder::new(parts).run());
    let end = Instant::now() + PATIENCE;
    let mut given = 0;
    while given < FRAMES && !recorder.is_finished() {
        assert!(Instant::now() < end, "only {given} frames were taken");
        match stage.push(stage.frame(rdma_log::Seq::ZERO, &[7; 60])) {
            Ok(()) => given += 1,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    orders.give(Order::Stop);
    stage.bell().ring();
    while !recorder.is_finished() {
        assert!(Instant::now() < end, "it does not look at its orders");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(recorder.join().unwrap().unwrap(), Ended::Stopped);
}
