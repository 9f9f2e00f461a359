//! Address decoding, HALT, time, interrupts, console, power.

use super::driver::{Guest, PLATFORM};
use crate::devices::{Bus, DeviceError};
use crate::event::{Effect, GuestTime, Input, Need, Output};

#[test]
fn what_is_not_there_reads_all_ones_and_takes_writes() {
    let mut guest = Guest::new();
    let before = guest.board.clone();
    for (bus, addr) in [
        (Bus::Port, 0x80),
        (Bus::Port, 0xcf8),
        (Bus::Port, 0x1_0020),
        (Bus::Mmio, 0xcfff_ffff),
        (Bus::Mmio, 0xd000_0018),
        (Bus::Mmio, 0xd000_3000),
        (Bus::Mmio, u64::MAX),
    ] {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0; len];
            let effect = guest.board.read(&guest.ram, bus, addr, &mut data);
            assert_eq!((effect, data), (Effect::Done, vec![0xff; len]));
            let effect = guest.board.write(&guest.ram, bus, addr, &vec![0x20; len]);
            assert_eq!(effect, Effect::Done);
        }
    }
    // Wide accesses to byte-wide ports, and none at all.
    for port in [0x20, 0x40, 0x61, 0x3f8] {
        for len in [0, 2, 4] {
            let mut data = vec![0; len];
            let effect = guest.board.read(&guest.ram, Bus::Port, port, &mut data);
            assert_eq!((effect, data), (Effect::Done, vec![0xff; len]));
        }
    }
    assert_eq!(guest.board, before);
}

#[test]
fn clock_and_random_come_from_inputs() {
    let mut guest = Guest::new();
    let mut data = [0; 8];
    let clock = PLATFORM + 8;
    let effect = guest.board.read(&guest.ram, Bus::Mmio, clock, &mut data);
    assert_eq!(effect, Effect::Needs(Need::Clock));
    let wrong = guest.board.answer(&Input::Random(vec![0; 8]), &mut data);
    assert!(matches!(wrong, Err(DeviceError::Unexpected { .. })));
    let now = Input::Clock(GuestTime(0x0102_0304_0506_0708));
    guest.board.answer(&now, &mut data).unwrap();
    assert_eq!(data, [8, 7, 6, 5, 4, 3, 2, 1]);
    assert!(guest.board.answer(&now, &mut data).is_err(), "only once");

    let random = PLATFORM + 16;
    let effect = guest.board.read(&guest.ram, Bus::Mmio, random, &mut data);
    assert_eq!(effect, Effect::Needs(Need::Random(8)));
    let short = guest.board.answer(&Input::Random(vec![1; 7]), &mut data);
    assert_eq!(
        short,
        Err(DeviceError::WrongLength {
            expected: 8,
            found: 7
        })
    );
    guest
        .board
        .answer(&Input::Random(vec![9; 8]), &mut data)
        .unwrap();
    assert_eq!(data, [9; 8]);
}

#[test]
fn a_refused_answer_leaves_the_access_waiting() {
    let mut guest = Guest::new();
    guest.halt();
    let before = guest.board.clone();
    for wrong in [
        Input::Tick(1),
        Input::Frame(vec![0; 60]),
        Input::Console(vec![1]),
        Input::Random(vec![0; 8]),
    ] {
        guest.board.answer(&wrong, &mut [0; 8]).unwrap_err();
        assert_eq!(guest.board, before);
    }
    assert_eq!(guest.resume(77), 77);
}

#[test]
fn halts_latch_is_set_by_what_reaches_the_guest() {
    let mut guest = Guest::new();
    guest.set_up_pic();
    assert!(!guest.board.something_happened());
    guest
        .board
        .apply(&guest.ram, &Input::Console(b"k".to_vec()))
        .unwrap();
    assert!(guest.board.something_happened());

    // It happened between the check and the halt: the halt may return at once, and then not again.
    guest.halt();
    assert!(guest.board.something_happened());
    guest.resume(5);
    assert!(!guest.board.something_happened());
    guest.halt();
    assert!(!guest.board.something_happened());
    guest
        .board
        .apply(&guest.ram, &Input::Console(b"l".to_vec()))
        .unwrap();
    assert!(guest.board.something_happened());
    guest.resume(6);

    // A tick counts when its interrupt is taken, not before.
    guest.outb(0x43, 0x34);
    guest.outb(0x40, 0);
    guest.outb(0x40, 4);
    guest.halt();
    guest.board.apply(&guest.ram, &Input::Tick(1)).unwrap();
    assert!(guest.board.interrupt_pending());
    assert!(!guest.board.something_happened());
    assert_eq!(guest.board.acknowledge_interrupt(), 0x20);
    assert!(guest.board.something_happened());
    guest.resume(7);
    assert!(!guest.board.something_happened());

    // A clock read does not clear it.
    guest
        .board
        .apply(&guest.ram, &Input::Console(b"m".to_vec()))
        .unwrap();
    let mut data = [0; 8];
    let _ = guest
        .board
        .read(&guest.ram, Bus::Mmio, PLATFORM + 8, &mut data);
    guest.resume(8);
    assert!(guest.board.something_happened());
}

#[test]
fn ticks_come_by_plan_only() {
    let mut guest = Guest::new();
    guest.set_up_pic();
    let refused = guest.board.apply(&guest.ram, &Input::Tick(1));
    assert!(matches!(refused, Err(DeviceError::Unexpected { .. })));
    assert_eq!(guest.board.next_tick(), None);

    guest.outb(0x43, 0x34);
    guest.outb(0x40, 0x9c);
    assert_eq!(guest.board.tick_plan(), None);
    let effect = guest.outb(0x40, 0x2e); // 11932: 100 Hz
    assert_eq!(effect, Effect::Needs(Need::Clock));
    let due = guest.board.next_tick().unwrap();
    assert_eq!(due, GuestTime(10_000_151));
    assert_eq!(guest.board.ticks_due(GuestTime(due.0 - 1)), 0);
    assert_eq!(guest.board.ticks_due(GuestTime(35_000_000)), 3);
    guest.board.apply(&guest.ram, &Input::Tick(3)).unwrap();
    assert_eq!(guest.board.ticks_due(GuestTime(35_000_000)), 0);
    assert_eq!(guest.board.acknowledge_interrupt(), 0x20);
    assert!(
        !guest.board.interrupt_pending(),
        "several ticks, one interrupt"
    );
    guest.board.apply(&guest.ram, &Input::Tick(1)).unwrap();
    assert!(guest.board.interrupt_pending(), "each tick is a new edge");
    guest.board.apply(&guest.ram, &Input::Tick(0)).unwrap_err();
}

#[test]
fn console_bytes_go_out_together_and_come_in_bounded() {
    let mut guest = Guest::new();
    guest.set_up_pic();
    guest.outb(0x3f8 + 1, 1); // interrupt on received data
    for byte in b"hi\n" {
        guest.outb(0x3f8, *byte);
    }
    assert!(guest.board.has_outputs());
    assert_eq!(guest.outputs(), [Output::Console(b"hi\n".to_vec())]);
    assert!(!guest.board.has_outputs());

    let room = guest.board.console_room();
    let too_much = Input::Console(vec![b'x'; room + 1]);
    let refused = guest.board.apply(&guest.ram, &too_much).unwrap_err();
    assert!(matches!(refused, DeviceError::NoRoom { room: r, .. } if r == room));
    assert_eq!(guest.board.console_room(), room);
    guest
        .board
        .apply(&guest.ram, &Input::Console(b"ab".to_vec()))
        .unwrap();
    assert_eq!(guest.board.acknowledge_interrupt(), 0x24);
    assert_eq!(guest.inb(0x3f8), b'a');
    assert_eq!(guest.inb(0x3f8), b'b');
    assert_eq!(guest.inb(0x3f8 + 5), 0x60);
    guest
        .board
        .apply(&guest.ram, &Input::Console(b"c".to_vec()))
        .unwrap();
    assert!(
        guest.board.interrupt_pending(),
        "the line fell and rose again"
    );
}

#[test]
fn power_off_is_an_effect_and_the_last_output() {
    let mut guest = Guest::new();
    guest.outb(0x3f8, b'.');
    let off = |status: u16| (0x2000 + status).to_le_bytes();
    for wrong in [&[0][..], &[3, 0x21], &[0; 4]] {
        let effect = guest.board.write(&guest.ram, Bus::Port, 0x604, wrong);
        assert_eq!(effect, Effect::Done);
    }
    let effect = guest.board.write(&guest.ram, Bus::Port, 0x604, &off(42));
    assert_eq!(effect, Effect::PowerOff(42));
    let expected = [Output::Console(b".".to_vec()), Output::PowerOff(42)];
    assert_eq!(guest.outputs(), expected);
}

#[test]
fn both_ways_to_reset_and_what_stays() {
    let mut guest = Guest::new();
    for wrong in [(0xcf9, 2), (0x64, 0xd1), (0x60, 0xfe)] {
        let effect = guest
            .board
            .write(&guest.ram, Bus::Port, wrong.0, &[wrong.1]);
        assert_eq!(effect, Effect::Done);
    }
    let fresh = guest.board.digest();
    for (port, value) in [(0xcf9, 6), (0x64, 0xfe)] {
        guest.outb(0x3f8, b'.');
        guest.outb(0x21, 0xfe);
        guest.outb(0x3ff, 1);
        guest.mmio_write(super::driver::NET + 0x70, 1);
        guest
            .board
            .apply(&guest.ram, &Input::Console(b"typed".to_vec()))
            .unwrap();
        let effect = guest.board.write(&guest.ram, Bus::Port, port, &[value]);
        assert_eq!(effect, Effect::Reset);
        let before = guest.board.digest();
        guest.board.reset(&super::driver::config(None));
        assert_ne!(guest.board.digest(), before);
        assert_eq!(guest.inb(0x21), 0, "the mask");
        assert_eq!(guest.mmio_read(super::driver::NET + 0x70), 0, "the driver");
        assert_eq!(guest.inb(0x3fd), 0x60, "nothing was typed");
    }
    assert_eq!(
        guest.board.printed(),
        2,
        "how much was printed is counted on"
    );
    let printed = [Output::Console(b"..".to_vec())];
    assert_eq!(guest.outputs(), printed, "what was printed leaves");
    assert_ne!(
        guest.board.digest(),
        fresh,
        "that count is a part of the state"
    );
}

#[test]
fn the_digest_sees_every_device() {
    let mut guest = Guest::new();
    let mut seen = vec![guest.board.digest()];
    let steps: [&dyn Fn(&mut Guest); 6] = [
        &|g| _ = g.outb(0x21, 0xfe),
        &|g| _ = g.outb(0x43, 0x34),
        &|g| _ = g.outb(0x3ff, 1),
        &|g| g.mmio_write(super::driver::NET + 0x70, 1),
        &|g| g.mmio_write(super::driver::RNG + 0x70, 1),
        &|g| g.halt(),
    ];
    for step in steps {
        step(&mut guest);
        let digest = guest.board.digest();
        assert!(!seen.contains(&digest));
        assert_eq!(digest, guest.board.clone().digest());
        seen.push(digest);
    }
}
