//! The 8254 against its data sheet.

use proptest::prelude::*;

use super::*;

/// A guest time after so many clocks, just past the edge.
fn at(start: u64, clocks: u64) -> GuestTime {
    GuestTime(start + nanoseconds(clocks))
}

fn write(pit: &mut Pit, port: u16, value: u8, now: GuestTime) {
    if let Access::Clock(waiting) = pit.write(port, value) {
        pit.answer(waiting, now);
    }
}

fn read(pit: &mut Pit, port: u16, now: GuestTime) -> u8 {
    match pit.read(port) {
        Access::Done(byte) => byte,
        Access::Clock(waiting) => pit.answer(waiting, now),
    }
}

/// Programs a channel: mode, both bytes.
fn program(pit: &mut Pit, channel: u16, mode: u8, count: u16, now: GuestTime) {
    let control = (channel as u8) << 6 | 0x30 | mode << 1;
    write(pit, PORT_CONTROL, control, now);
    let [low, high] = count.to_le_bytes();
    write(pit, 0x40 + channel, low, now);
    write(pit, 0x40 + channel, high, now);
}

fn latch(pit: &mut Pit, channel: u16, now: GuestTime) -> u16 {
    write(pit, PORT_CONTROL, (channel as u8) << 6, now);
    let later = GuestTime(now.0 + 1_000_000);
    let low = read(pit, 0x40 + channel, later);
    let high = read(pit, 0x40 + channel, later);
    u16::from_le_bytes([low, high])
}

#[test]
fn a_rate_generator_ticks_without_drift() {
    let mut pit = Pit::default();
    assert_eq!(pit.tick_plan(), None);
    let start = 5_000;
    program(&mut pit, 0, 2, 11932, GuestTime(start)); // 100 Hz
    let plan = pit.tick_plan().unwrap();
    assert_eq!(plan.loaded, GuestTime(start));
    assert_eq!(plan.first_ns, 10_000_151); // 11932 / 1.193182 MHz = 10.000150856... ms
    assert_eq!(plan.period_ns, Some(plan.first_ns));
    for tick in 1..=1_000u64 {
        let due = pit.next_tick().unwrap();
        assert_eq!(due, at(start, 11932 * tick));
        assert_eq!(pit.ticks_due(GuestTime(due.0 - 1)), 0);
        assert_eq!(pit.ticks_due(due), 1);
        assert!(pit.tick(1));
    }
    assert_eq!(pit.ticks_due(at(start, 11932 * 1_007)), 7);
    assert!(pit.tick(7));
    assert_eq!(pit.ticks_due(at(start, 11932 * 1_007)), 0);
    assert_eq!(pit.tick_plan(), Some(plan), "ticking changes no plan");
}

#[test]
fn one_shots_tick_once() {
    for mode in [0, 4] {
        let mut pit = Pit::default();
        program(&mut pit, 0, mode, 1000, GuestTime(0));
        assert_eq!(pit.tick_plan().unwrap().period_ns, None);
        assert_eq!(pit.ticks_due(at(0, 999)), 0);
        assert_eq!(pit.ticks_due(at(0, 50_000)), 1);
        assert!(!pit.tick(2), "it cannot expire twice");
        assert!(pit.tick(1));
        assert!(!pit.tick(1));
        assert_eq!(pit.next_tick(), None);
        assert_eq!(pit.ticks_due(at(0, 100_000)), 0);
        // A new count alone arms it again.
        write(&mut pit, 0x40, 0, GuestTime(9));
        write(&mut pit, 0x40, 1, GuestTime(9));
        assert_eq!(pit.next_tick(), Some(at(9, 256)));
    }
}

#[test]
fn modes_that_need_a_gate_edge_never_tick_on_channel_0() {
    for mode in [1, 5] {
        let mut pit = Pit::default();
        program(&mut pit, 0, mode, 1000, GuestTime(0));
        assert_eq!(pit.next_tick(), None);
        assert!(!pit.tick(1));
    }
}

#[test]
fn programming_makes_a_new_generation() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 3, 100, GuestTime(0));
    let first = pit.tick_plan().unwrap();
    assert!(pit.tick(3));
    program(&mut pit, 0, 3, 100, GuestTime(77));
    let second = pit.tick_plan().unwrap();
    assert!(second.generation > first.generation);
    assert_eq!(pit.next_tick(), Some(at(77, 100)), "from the first again");
    write(&mut pit, PORT_CONTROL, 0x30, GuestTime(99));
    assert_eq!(pit.tick_plan(), None, "a control word stops the channel");
}

#[test]
fn half_a_count_stops_mode_0_and_leaves_mode_2_running() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 0, 1000, GuestTime(0));
    write(&mut pit, 0x40, 1, GuestTime(5));
    assert_eq!(pit.next_tick(), None);
    write(&mut pit, 0x40, 1, GuestTime(6));
    assert_eq!(pit.next_tick(), Some(at(6, 257)));

    program(&mut pit, 0, 2, 1000, GuestTime(0));
    assert!(pit.tick(4));
    write(&mut pit, 0x40, 1, GuestTime(5));
    assert_eq!(pit.next_tick(), Some(at(0, 5000)));
}

#[test]
fn zero_is_the_largest_count() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 2, 0, GuestTime(0));
    assert_eq!(pit.tick_plan().unwrap().first_ns, nanoseconds(65_536));
    write(&mut pit, PORT_CONTROL, 0x35, GuestTime(0)); // BCD
    write(&mut pit, 0x40, 0, GuestTime(0));
    write(&mut pit, 0x40, 0, GuestTime(0));
    assert_eq!(pit.tick_plan().unwrap().first_ns, nanoseconds(10_000));
    assert_eq!(latch(&mut pit, 0, at(0, 1)), 0x9999);
}

#[test]
fn single_byte_counts() {
    let mut pit = Pit::default();
    write(&mut pit, PORT_CONTROL, 0x14, GuestTime(0)); // low byte, mode 2
    write(&mut pit, 0x40, 200, GuestTime(0));
    assert_eq!(pit.tick_plan().unwrap().first_ns, nanoseconds(200));
    assert_eq!(read(&mut pit, 0x40, at(0, 10)), 190);
    write(&mut pit, PORT_CONTROL, 0x24, GuestTime(0)); // high byte
    write(&mut pit, 0x40, 2, GuestTime(0));
    assert_eq!(pit.tick_plan().unwrap().first_ns, nanoseconds(512));
    assert_eq!(read(&mut pit, 0x40, at(0, 1)), 1);
}

#[test]
fn counts_go_down() {
    let mut pit = Pit::default();
    program(&mut pit, 0, 2, 1000, GuestTime(0));
    assert_eq!(latch(&mut pit, 0, at(0, 0)), 1000);
    assert_eq!(latch(&mut pit, 0, at(0, 999)), 1);
    assert_eq!(latch(&mut pit, 0, at(0, 1000)), 1000);
    program(&mut pit, 0, 3, 1000, GuestTime(0));
    assert_eq!(latch(&mut pit, 0, at(0, 100)), 800, "mode 3 goes by twos");
    assert_eq!(latch(&mut pit, 0, at(0, 600)), 800);
    program(&mut pit, 0, 0, 1000, GuestTime(0));
    assert_eq!(latch(&mut pit, 0, at(0, 1000)), 0);
    assert_eq!(latch(&mut pit, 0, at(0, 1001)), 0xffff, "mode 0 goes on");
}

#[test]
fn a_latch_holds_until_it_is_read() {
    let mut pit = Pit::default();
    program(&mut pit, 1, 2, 0x1234, GuestTime(0));
    write(&mut pit, PORT_CONTROL, 0x40, at(0, 4));
    write(&mut pit, PORT_CONTROL, 0x40, at(0, 90)); // ignored: the first is unread
    assert_eq!(pit.read(0x41), Access::Done(0x30));
    assert_eq!(pit.read(0x41), Access::Done(0x12));
    assert_eq!(pit.read(0x41), Access::Clock(Waiting::Read(1)));
}

#[test]
fn read_back_shows_status_then_count() {
    let mut pit = Pit::default();
    write(&mut pit, PORT_CONTROL, 0x34, GuestTime(0));
    write(&mut pit, PORT_CONTROL, 0xe2, GuestTime(0)); // status of channel 0
    assert_eq!(
        read(&mut pit, 0x40, GuestTime(0)),
        0b1111_0100,
        "null count"
    );
    program(&mut pit, 0, 0, 500, GuestTime(0));
    write(&mut pit, PORT_CONTROL, 0xc2, at(0, 100)); // both
    assert_eq!(pit.read(0x40), Access::Done(0b0011_0000), "OUT is low");
    assert_eq!(pit.read(0x40), Access::Done((400u16 & 0xff) as u8));
    assert_eq!(pit.read(0x40), Access::Done((400u16 >> 8) as u8));
    write(&mut pit, PORT_CONTROL, 0xe2, at(0, 500));
    assert_eq!(pit.read(0x40), Access::Done(0b1011_0000), "OUT is high");
    assert_eq!(pit.read(PORT_CONTROL), Access::Done(0xff));
}

#[test]
fn port_61_gates_and_shows_channel_2() {
    let mut pit = Pit::default();
    assert_eq!(read(&mut pit, PORT_B, GuestTime(0)) & 0xf, 0);
    // As Linux calibrates: gate on, speaker off, mode 0, then wait for OUT.
    write(&mut pit, PORT_B, 1, GuestTime(0));
    program(&mut pit, 2, 0, 1000, GuestTime(0));
    assert_eq!(read(&mut pit, PORT_B, at(0, 999)) & 0x23, 0x01);
    assert_eq!(read(&mut pit, PORT_B, at(0, 1000)) & 0x23, 0x21);
    assert_eq!(pit.next_tick(), None, "channel 2 makes no ticks");
    // The refresh bit toggles.
    let toggles: Vec<u8> = (0..4)
        .map(|n| read(&mut pit, PORT_B, GuestTime(REFRESH_NS * n)) & 0x10)
        .collect();
    assert_eq!(toggles, [0, 0x10, 0, 0x10]);
}

#[test]
fn a_low_gate_holds_mode_0_and_restarts_mode_2() {
    let mut pit = Pit::default();
    write(&mut pit, PORT_B, 3, GuestTime(0));
    program(&mut pit, 2, 0, 1000, GuestTime(0));
    write(&mut pit, PORT_B, 2, at(0, 300));
    assert_eq!(latch(&mut pit, 2, at(0, 900)), 700);
    write(&mut pit, PORT_B, 3, at(0, 900));
    let count = latch(&mut pit, 2, at(0, 1000));
    assert!((599..=600).contains(&count), "{count}");

    program(&mut pit, 2, 2, 1000, at(0, 2000));
    write(&mut pit, PORT_B, 0, at(0, 2300));
    assert_eq!(
        read(&mut pit, PORT_B, at(0, 2999)) & 0x20,
        0x20,
        "held high"
    );
    write(&mut pit, PORT_B, 1, at(0, 5000));
    assert_eq!(latch(&mut pit, 2, at(0, 5000)), 1000, "anew");
}

#[test]
fn a_rising_gate_triggers_mode_1() {
    let mut pit = Pit::default();
    program(&mut pit, 2, 1, 100, GuestTime(0));
    assert_eq!(read(&mut pit, PORT_B, GuestTime(50)) & 0x20, 0x20);
    write(&mut pit, PORT_B, 1, at(0, 1000));
    assert_eq!(read(&mut pit, PORT_B, at(0, 1099)) & 0x20, 0);
    assert_eq!(read(&mut pit, PORT_B, at(0, 1101)) & 0x20, 0x20);
}

#[test]
fn a_square_wave_is_high_first() {
    let mut pit = Pit::default();
    write(&mut pit, PORT_B, 1, GuestTime(0));
    program(&mut pit, 2, 3, 5, GuestTime(0)); // odd: 3 high, 2 low
    let wave: Vec<bool> = (0..10)
        .map(|n| read(&mut pit, PORT_B, at(0, n)) & 0x20 != 0)
        .collect();
    let one = [true, true, true, false, false];
    assert_eq!(wave, [one, one].concat());
}

proptest! {
    /// Whatever a guest writes and whenever it looks, nothing overflows and a due tick can be applied.
    #[test]
    fn any_programming_is_survived(
        steps in prop::collection::vec((0u16..5, any::<u8>(), any::<bool>(), any::<u64>()), 1..80)
    ) {
        let mut pit = Pit::default();
        for (port, value, is_read, now) in steps {
            let port = if port == 4 { PORT_B } else { 0x40 + port };
            let now = GuestTime(now);
            if is_read {
                read(&mut pit, port, now);
            } else {
                write(&mut pit, port, value, now);
            }
            let due = pit.ticks_due(now);
            prop_assert_eq!(pit.tick_plan().is_some(), pit.next_tick().is_some());
            if due > 0 {
                prop_assert!(pit.tick(due));
                if due < u32::MAX {
                    prop_assert_eq!(pit.ticks_due(now), 0);
                }
            }
            if let Some(next) = pit.next_tick().filter(|next| next.0 < u64::MAX) {
                prop_assert!(pit.ticks_due(next) >= 1);
            }
        }
    }
}
