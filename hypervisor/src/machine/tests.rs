//! The machine on real KVM, and what an exit hands to its devices.

mod clock_page;

use super::*;
use crate::checkpoint::Pages;
use crate::devices::DevicesConfig;
use crate::entry::Base;

fn machine(guest: &str, words: &str) -> Machine {
    let spec = MachineSpec::new(guest, 4, words, 0).unwrap();
    Machine::new(&KvmSource::Path("/dev/kvm".into()), &spec).unwrap()
}

/// A primary whose kernel offers less, and one whose kernel offers more than any.
#[test]
fn a_guest_is_told_of_its_cpu_what_it_was_told_before_where_that_can_be() {
    let spec = MachineSpec::new("compute", 4, "", 0).unwrap();
    let built = |told: &Told| Machine::as_told(&KvmSource::default(), &spec, told).unwrap();
    let own = built(&Told::default()).told().clone();
    let with = |change: fn(u64) -> u64| {
        let mut words = serde_json::to_value(&own).unwrap();
        let leaves = words.as_array_mut().unwrap();
        // EDX of the first leaf that has bits of features.
        let one = leaves.iter_mut().find(|leaf| leaf[0] == 1).unwrap();
        one[5] = change(one[5].as_u64().unwrap()).into();
        serde_json::from_value::<Told>(words).unwrap()
    };

    let less = with(|bits| bits & !(1 << bits.ilog2()));
    assert_ne!(less, own);
    assert_eq!(*built(&less).told(), less);
    let more = with(|_| u64::from(u32::MAX));
    assert_eq!(*built(&more).told(), own);
    assert_eq!(own.lacks(&more).unwrap().leaf, (1, 0));
}

/// An order is given and the thread kicked just as it has looked for orders and goes into the guest: the kick must not be lost,
/// for this guest might make no exit for long.
#[test]
fn a_kick_before_the_run_ends_the_run() {
    let mut machine = machine("compute", "rounds=1");
    let kick = machine.kick_handle();
    for _ in 0..3 {
        kick.kick();
        kick.kick();
        let position = machine.position();
        assert_eq!(machine.step().unwrap(), Stepped::Kicked);
        assert_eq!(machine.position(), position);
        assert_eq!(machine.step().unwrap(), Stepped::SyncPoint);
        machine.outputs().for_each(drop);
    }
}

/// A string read of a register that needs the clock: one element gets it, and the others hold nothing of what KVM's page held before, which
/// is another thing on a machine that was put together from a checkpoint.
#[test]
fn a_string_read_that_waits_for_the_clock_brings_nothing_of_the_exits_before() {
    const SECONDS: &[u8] = &[0];
    let ram = GuestRam::new(2).unwrap();
    let exit = |write, count| Exit::Port {
        port: if write { 0x70 } else { 0x71 },
        size: 1,
        count,
        write,
    };
    let read = |left_there: u8| {
        let mut devices = Devices::new(&DevicesConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            disk: None,
            wall_clock_ns: 0,
            firmware: false,
        });
        let mut data = SECONDS.to_vec();
        let chosen = touch(&mut devices, &ram, exit(true, 1), &mut data);
        assert_eq!(chosen, Effect::Done);
        let mut data = vec![left_there; 5];
        let effect = touch(&mut devices, &ram, exit(false, 5), &mut data);
        assert_eq!(effect, Effect::Needs(Need::Clock));
        let now = Input::Clock(GuestTime(7_000_000_000));
        devices.answer(&now, &mut data).unwrap();
        data
    };
    assert_eq!(read(0xaa), [7, 0, 0, 0, 0]);
    assert_eq!(read(0x55), read(0xaa));
}

/// A bare-metal guest of this code.
fn guest_of(code: &[u8]) -> Machine {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let mut put = |at: usize, value: u64, bytes: usize| {
        file[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    };
    let (base, length) = (crate::boot::IMAGE_BASE, code.len() as u64);
    for (at, value, bytes) in [
        // Executable, x86-64; the entry; one program header.
        (16, 2, 2),
        (18, 62, 2),
        (24, base, 8),
        (32, 64, 8),
        (54, 56, 2),
        (56, 1, 2),
        (64, 1, 4),
        (72, 0x1000, 8),
        (80, base, 8),
        (88, base, 8),
        (96, length, 8),
        (104, length, 8),
    ] {
        put(at, value, bytes);
    }
    file.extend_from_slice(code);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.elf");
    std::fs::write(&path, file).unwrap();
    machine(path.to_str().unwrap(), "")
}

/// Priorities are nothing here, but what a guest has written into CR8 it reads again, also from a checkpoint: KVM, which is told the value at each
/// run, makes an exit of its own where it gets lower.
#[test]
fn a_guest_may_lower_its_task_priority_and_a_checkpoint_has_it() {
    let code = [
        0xb8, 5, 0, 0, 0, // mov eax, 5
        0x44, 0x0f, 0x22, 0xc0, // mov cr8, rax
        0xb8, 2, 0, 0, 0, // mov eax, 2
        0x44, 0x0f, 0x22, 0xc0, // mov cr8, rax
        0x44, 0x0f, 0x20, 0xc0, // mov rax, cr8
        0xe6, 0x80, // out 0x80, al
        0xeb, 0xf8, // back to where it is read
    ];
    let step = |machine: &mut Machine| while machine.step().unwrap() == Stepped::Kicked {};
    let (mut one, mut other) = (guest_of(&code), guest_of(&code));
    step(&mut one);
    let saved = one.save(Pages::All, Base::default(), Vec::new()).unwrap();
    other.restore(&saved).unwrap();
    for _ in 0..2 {
        step(&mut one);
        step(&mut other);
        assert_eq!(one.digest(), other.digest());
        assert_eq!(one.cpus.one().regs().rax, 2, "CR8, as it was read");
    }
}

/// A read across the end of a device's window is two exits of one instruction. Between them no checkpoint can be taken, and that one was
/// asked for changes nothing: the second exit comes as it would have come.
#[test]
fn a_checkpoint_in_the_middle_of_an_instruction_is_put_off() {
    // mov ebx, 0xd0001ffe; mov eax, [rbx]; jmp back to the read
    let code = [0xbb, 0xfe, 0x1f, 0, 0xd0, 0x8b, 0x03, 0xeb, 0xfc];
    let (mut one, mut other) = (guest_of(&code), guest_of(&code));
    let (mut taken, mut put_off) = (0, 0);
    for _ in 0..40 {
        for machine in [&mut one, &mut other] {
            while machine.step().unwrap() == Stepped::Kicked {}
        }
        assert_eq!(one.digest(), other.digest(), "at {}", one.position());
        match one.save(Pages::All, Base::default(), Vec::new()) {
            Ok(_) => taken += 1,
            Err(error) => {
                assert!(error.is_mid_instruction(), "{error}");
                put_off += 1;
            }
        }
    }
    assert_eq!((taken, put_off), (20, 20));
    // Whoever is made anew asks nothing of what it was doing.
    let whole = other.save(Pages::All, Base::default(), Vec::new()).unwrap();
    while one.step().unwrap() == Stepped::Kicked {}
    one.restore(&whole).unwrap();
    assert_eq!(one.position(), other.position());
}
