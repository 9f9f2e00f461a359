//! The virtio devices, by the specification.

use super::driver::{Guest, INDIRECT, MAC, MTU, NET, NEXT, PLATFORM, RNG, Rings, WRITE};
use crate::devices::sending::FRAMES_MOST;
use crate::devices::{Bus, DeviceError, MAX_FRAME, QueueFault};
use crate::event::{Effect, Input, Need, Output};

const BUFFER: u64 = 0x20_0000;

fn rings() -> (Rings, Rings) {
    (Rings::standard(0, 16), Rings::standard(1, 16))
}

/// A guest with its network up.
fn network() -> (Guest, Rings, Rings) {
    let mut guest = Guest::new();
    guest.set_up_pic();
    let (rx, tx) = rings();
    guest.start(NET, &[rx, tx]);
    (guest, rx, tx)
}

/// A guest with its entropy device up.
fn entropy() -> (Guest, Rings) {
    let mut guest = Guest::new();
    guest.set_up_pic();
    let queue = Rings::standard(2, 8);
    guest.start(RNG, &[queue]);
    (guest, queue)
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    (0..len).map(|n| fill.wrapping_add(n as u8)).collect()
}

/// Writes a frame with its virtio header to guest memory.
fn place_frame(guest: &Guest, at: u64, frame: &[u8]) {
    guest.ram.write(at, &[0; 12]).unwrap();
    guest.ram.write(at + 12, frame).unwrap();
}

fn config_read(guest: &mut Guest, addr: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    let effect = guest.board.read(&guest.ram, Bus::Mmio, addr, &mut data);
    assert_eq!(effect, Effect::Done);
    data
}

#[test]
fn registers_identify_the_devices() {
    let mut guest = Guest::new();
    for (base, id) in [(NET, 1), (RNG, 4)] {
        assert_eq!(guest.mmio_read(base), 0x7472_6976);
        assert_eq!(guest.mmio_read(base + 4), 2);
        assert_eq!(guest.mmio_read(base + 8), id);
        assert_eq!(guest.mmio_read(base + 0xb0), u32::MAX);
        assert_eq!(guest.mmio_read(base + 0xfc), 0);
        guest.mmio_write(base + 0x30, 0);
        assert_eq!(guest.mmio_read(base + 0x34), 256);
        guest.mmio_write(base + 0x30, 2);
        assert_eq!(guest.mmio_read(base + 0x34), 0, "no such queue");
    }
    guest.mmio_write(NET + 0x14, 0);
    assert_eq!(guest.mmio_read(NET + 0x10), 1 << 5 | 1 << 3);
    guest.mmio_write(NET + 0x14, 1);
    assert_eq!(guest.mmio_read(NET + 0x10), 1);
    guest.mmio_write(NET + 0x14, 2);
    assert_eq!(guest.mmio_read(NET + 0x10), 0);
    assert_eq!(config_read(&mut guest, NET, 8), [0xff; 8]);
    assert_eq!(config_read(&mut guest, NET + 2, 4), [0xff; 4]);
}

#[test]
fn configuration_space_by_any_width() {
    let mut guest = Guest::new();
    assert_eq!(config_read(&mut guest, NET + 0x100, 4), MAC[..4]);
    assert_eq!(config_read(&mut guest, NET + 0x104, 2), MAC[4..]);
    assert_eq!(config_read(&mut guest, NET + 0x105, 1), MAC[5..]);
    assert_eq!(config_read(&mut guest, NET + 0x10a, 2), MTU.to_le_bytes());
    assert_eq!(config_read(&mut guest, NET + 0x100, 8)[..6], MAC);
    assert_eq!(config_read(&mut guest, NET + 0x10c, 4), [0xff; 4]);
    assert_eq!(config_read(&mut guest, NET + 0xffc, 8), [0xff; 8]);
    assert_eq!(config_read(&mut guest, RNG + 0x100, 1), [0xff]);
}

#[test]
fn status_goes_in_order_and_features_must_fit() {
    let mut guest = Guest::new();
    let status = |guest: &mut Guest| guest.mmio_read(NET + 0x70);
    guest.mmio_write(NET + 0x70, 2);
    assert_eq!(status(&mut guest), 0, "DRIVER before ACKNOWLEDGE");
    guest.mmio_write(NET + 0x70, 0xf);
    assert_eq!(status(&mut guest), 3, "no feature was accepted yet");
    guest.negotiate(NET, 0);
    assert_eq!(status(&mut guest), 3, "VERSION_1 is a must");
    guest.negotiate(NET, 1 << 32 | 1);
    assert_eq!(status(&mut guest), 3, "a feature that was not offered");
    guest.negotiate(NET, 1 << 32 | 1 << 5 | 1 << 3);
    assert_eq!(status(&mut guest), 0xb);
    guest.mmio_write(NET + 0x70, 1);
    assert_eq!(status(&mut guest), 0xb, "bits are not taken back");
    assert!(!guest.board.network_is_up());
    guest.mmio_write(NET + 0x70, 0xf);
    assert!(guest.board.network_is_up());
    guest.mmio_write(NET + 0x70, 0x8f);
    assert!(!guest.board.network_is_up(), "the driver gave up");
    guest.mmio_write(NET + 0x70, 0);
    assert_eq!(status(&mut guest), 0);
}

#[test]
fn a_queue_becomes_ready_only_inside_ram() {
    let good = Rings::standard(0, 256);
    let end = 4 << 20;
    let bad = [
        Rings { size: 0, ..good },
        Rings { size: 3, ..good },
        Rings { size: 512, ..good },
        Rings {
            descriptors: good.descriptors + 8,
            ..good
        },
        Rings {
            available: good.available + 1,
            ..good
        },
        Rings {
            available: 0,
            ..good
        },
        Rings {
            used: good.used + 2,
            ..good
        },
        Rings {
            descriptors: end - 16 * 255,
            ..good
        },
        Rings {
            available: end - 2 * 256,
            ..good
        },
        Rings {
            used: end - 8 * 256,
            ..good
        },
        Rings {
            used: u64::MAX - 3,
            ..good
        },
    ];
    for rings in bad {
        let mut guest = Guest::new();
        guest.negotiate(NET, 1 << 32);
        assert!(!guest.set_up_queue(NET, 0, rings), "{rings:?}");
        assert!(guest.set_up_queue(NET, 0, good));
        assert!(guest.set_up_queue(NET, 1, Rings::standard(1, 1)));
        assert!(!guest.set_up_queue(NET, 2, good), "no such queue");
    }
    let mut guest = Guest::new();
    assert!(!guest.set_up_queue(NET, 0, good), "before FEATURES_OK");
    guest.start(NET, &[good]);
    guest.mmio_write(NET + 0x44, 0);
    assert!(!guest.set_up_queue(NET, 0, good), "after DRIVER_OK");
}

#[test]
fn a_notified_frame_is_an_output_without_its_header() {
    let (mut guest, _, tx) = network();
    let sent = frame(60, 3);
    place_frame(&guest, BUFFER, &sent);
    guest.offer_buffer(tx, 5, BUFFER, 72, 0);
    let _ = guest.ram.take_dirty();
    guest.notify(NET, 1);
    assert_eq!(guest.outputs(), [Output::Frame(sent)]);
    assert_eq!((guest.used_index(tx), guest.used(tx, 0)), (1, (5, 0)));
    let dirty: Vec<u64> = guest.ram.take_dirty().iter().map(|p| p.0).collect();
    assert_eq!(dirty, [tx.used / 4096], "what we wrote is tracked");

    assert_eq!(guest.mmio_read(NET + 0x60), 1);
    assert_eq!(guest.board.acknowledge_interrupt(), 0x25);
    assert!(!guest.board.interrupt_pending());
    guest.mmio_write(NET + 0x64, 1);
    assert_eq!(guest.mmio_read(NET + 0x60), 0);
    guest.notify(NET, 1);
    assert!(!guest.board.interrupt_pending(), "nothing new");
    assert!(!guest.board.has_outputs());
}

#[test]
fn acknowledging_lowers_the_line_before_the_cpu_sees_it() {
    let (mut guest, _, tx) = network();
    place_frame(&guest, BUFFER, &frame(60, 0));
    guest.offer_buffer(tx, 0, BUFFER, 72, 0);
    guest.notify(NET, 1);
    assert!(guest.board.interrupt_pending());
    guest.mmio_write(NET + 0x64, 1);
    assert!(!guest.board.interrupt_pending());
}

#[test]
fn halt_notifies_every_queue() {
    let (mut guest, rx, tx) = network();
    let queue = Rings::standard(2, 8);
    guest.start(RNG, &[queue]);
    guest.offer_buffer(rx, 0, BUFFER, 2048, WRITE);
    guest.offer_buffer(queue, 0, BUFFER + 0x1000, 16, WRITE);
    let frames: Vec<Vec<u8>> = (0..3).map(|n| frame(100 + n, n as u8)).collect();
    for (n, sent) in frames.iter().enumerate() {
        let at = BUFFER + 0x2000 + 0x800 * n as u64;
        place_frame(&guest, at, sent);
        guest.offer_buffer(tx, n as u16, at, sent.len() as u32 + 12, 0);
    }
    guest.halt();
    let outputs: Vec<Output> = frames.into_iter().map(Output::Frame).collect();
    assert_eq!(guest.outputs(), outputs);
    assert_eq!(guest.board.pending(), Some(Need::Random(16)));
    assert!(guest.board.can_receive(&guest.ram));
    guest.resume(1);
}

#[test]
fn a_chain_is_gathered_wherever_the_header_ends() {
    let sent = frame(200, 9);
    for cut in [1u64, 11, 12, 13, 100] {
        let (mut guest, _, tx) = network();
        place_frame(&guest, BUFFER, &sent);
        guest.descriptor(tx, 4, (BUFFER, cut as u32, NEXT, 9));
        guest.descriptor(tx, 9, (BUFFER, 0, NEXT, 2));
        guest.descriptor(tx, 2, (BUFFER + cut, 212 - cut as u32, 0, 0));
        guest.offer(tx, 4);
        guest.notify(NET, 1);
        assert_eq!(guest.outputs(), [Output::Frame(sent.clone())], "{cut}");
    }
}

#[test]
fn what_is_no_frame_is_dropped_and_given_back() {
    let (mut guest, _, tx) = network();
    let longest = MAX_FRAME as u32 + 12;
    for (n, len) in [0, 11, 25, longest + 1, 26, longest]
        .into_iter()
        .enumerate()
    {
        guest.offer_buffer(tx, n as u16, BUFFER, len, 0);
    }
    guest.notify(NET, 1);
    let lengths: Vec<usize> = guest
        .outputs()
        .iter()
        .map(|output| match output {
            Output::Frame(frame) => frame.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lengths, [14, MAX_FRAME]);
    assert_eq!(guest.used_index(tx), 6);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let (mut guest, rx, tx) = network();
    guest.ram.write_obj(tx.available, 1u16).unwrap();
    guest.ram.write_obj(rx.available, 1u16).unwrap();
    place_frame(&guest, BUFFER, &frame(60, 0));
    guest.offer_buffer(tx, 0, BUFFER, 72, 0);
    guest.offer_buffer(rx, 0, BUFFER + 4096, 2048, WRITE);
    guest.notify(NET, 1);
    guest
        .board
        .apply(&guest.ram, &Input::Frame(frame(60, 1)))
        .unwrap();
    assert_eq!((guest.used_index(tx), guest.used_index(rx)), (1, 1));
    assert_eq!(guest.mmio_read(NET + 0x60), 0);
    assert!(!guest.board.interrupt_pending());
    assert!(guest.board.something_happened(), "HALT still returns");
}

#[test]
fn a_received_frame_lands_in_the_next_buffer() {
    let (mut guest, rx, _) = network();
    let ram = &guest.ram;
    assert_eq!(guest.board.frame_room(ram), 0);
    assert!(!guest.board.can_receive(ram));
    let refused = guest.board.apply(ram, &Input::Frame(frame(60, 1)));
    assert!(matches!(refused, Err(DeviceError::NoRoom { room: 0, .. })));
    assert!(!guest.board.something_happened());

    guest.descriptor(rx, 7, (BUFFER, 100, WRITE | NEXT, 8));
    guest.descriptor(rx, 8, (BUFFER + 4096, 1426, WRITE, 0));
    guest.offer(rx, 7);
    guest.offer_buffer(rx, 1, BUFFER + 8192, 2048, WRITE);
    assert_eq!(guest.board.frame_room(&guest.ram), 1514);
    assert!(guest.board.can_receive(&guest.ram));
    let received = frame(1514, 5);
    let too_long = Input::Frame(frame(1515, 5));
    guest.board.apply(&guest.ram, &too_long).unwrap_err();
    assert_eq!(guest.used_index(rx), 0);
    guest
        .board
        .apply(&guest.ram, &Input::Frame(received.clone()))
        .unwrap();
    assert_eq!((guest.used_index(rx), guest.used(rx, 0)), (1, (7, 1526)));
    let mut landed = guest.bytes(BUFFER, 100);
    landed.extend(guest.bytes(BUFFER + 4096, 1426));
    assert_eq!(landed[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(landed[12..], received);
    assert_eq!(guest.board.acknowledge_interrupt(), 0x25);
    assert_eq!(guest.mmio_read(NET + 0x60), 1);

    // A second one, while the first is unacknowledged: a new edge all the same.
    guest
        .board
        .apply(&guest.ram, &Input::Frame(frame(64, 6)))
        .unwrap();
    assert_eq!(guest.used(rx, 1), (1, 76));
    assert!(guest.board.interrupt_pending());
    assert_eq!(guest.board.frame_room(&guest.ram), 0);
}

#[test]
fn rings_wrap_around() {
    let (mut guest, rx, _) = network();
    for n in 0..70_000u32 {
        let head = (n % 16) as u16;
        guest.offer_buffer(rx, head, BUFFER, 1600, WRITE);
        guest
            .board
            .apply(&guest.ram, &Input::Frame(n.to_le_bytes().repeat(15)))
            .unwrap();
        assert_eq!(guest.used(rx, n as u16), (u32::from(head), 72));
    }
    assert_eq!(guest.used_index(rx), 70_000u32 as u16);
    assert_eq!(guest.bytes(BUFFER + 12, 4), 69_999u32.to_le_bytes());
}

#[test]
fn entropy_requests_are_answered_one_by_one() {
    let (mut guest, queue) = entropy();
    assert_eq!(guest.board.pending(), None);
    let unasked = guest.board.apply(&guest.ram, &Input::Random(vec![1]));
    assert!(matches!(unasked, Err(DeviceError::Unexpected { .. })));
    guest.offer_buffer(queue, 0, BUFFER, 0, WRITE);
    guest.offer_buffer(queue, 1, BUFFER, 32, WRITE);
    guest.offer_buffer(queue, 2, BUFFER + 64, 9000, WRITE);
    guest.notify(RNG, 0);
    assert_eq!(
        guest.used_index(queue),
        1,
        "nothing was wanted of the first"
    );
    assert_eq!(guest.board.pending(), Some(Need::Random(32)));
    let before = guest.board.clone();
    let short = guest.board.apply(&guest.ram, &Input::Random(vec![1; 31]));
    assert!(matches!(short, Err(DeviceError::WrongLength { .. })));
    guest.notify(RNG, 0);
    assert_eq!(guest.board, before, "asking twice changes nothing");
    guest.descriptor(queue, 1, (BUFFER, 33, WRITE, 0));
    guest.notify(RNG, 0);
    assert_eq!(
        guest.board.pending(),
        Some(Need::Random(33)),
        "looked again"
    );
    guest.descriptor(queue, 1, (BUFFER, 32, WRITE, 0));
    guest.notify(RNG, 0);

    guest
        .board
        .apply(&guest.ram, &Input::Random(frame(32, 1)))
        .unwrap();
    assert_eq!(guest.used(queue, 1), (1, 32));
    assert_eq!(guest.bytes(BUFFER, 32), frame(32, 1));
    assert!(guest.board.something_happened());
    assert_eq!(guest.board.acknowledge_interrupt(), 0x26);
    assert_eq!(guest.board.pending(), Some(Need::Random(4096)), "at most");
    guest
        .board
        .apply(&guest.ram, &Input::Random(vec![7; 4096]))
        .unwrap();
    assert_eq!(guest.used(queue, 2), (2, 4096));
    assert_eq!(guest.bytes(BUFFER + 64 + 4095, 2), [7, 0]);
    assert_eq!(guest.board.pending(), None);
}

#[test]
fn a_request_that_changed_since_is_looked_at_again() {
    let (mut guest, queue) = entropy();
    guest.offer_buffer(queue, 0, BUFFER, 64, WRITE);
    guest.notify(RNG, 0);
    guest.descriptor(queue, 0, (BUFFER, 8, WRITE, 0));
    guest
        .board
        .apply(&guest.ram, &Input::Random(vec![3; 64]))
        .unwrap();
    assert_eq!(guest.used(queue, 0), (0, 8));
    assert_eq!(guest.bytes(BUFFER + 7, 2), [3, 0]);

    guest.offer_buffer(queue, 1, BUFFER, 64, WRITE);
    guest.notify(RNG, 0);
    guest.descriptor(queue, 1, (u64::MAX, 64, WRITE, 0));
    guest
        .board
        .apply(&guest.ram, &Input::Random(vec![3; 64]))
        .unwrap();
    let faults: Vec<_> = guest.board.faults().collect();
    assert_eq!(faults[0].1.fault, QueueFault::Buffer);
    assert_eq!(guest.board.pending(), None);
}

#[test]
fn a_reset_forgets_requests() {
    let (mut guest, queue) = entropy();
    guest.offer_buffer(queue, 0, BUFFER, 64, WRITE);
    guest.notify(RNG, 0);
    assert!(guest.board.pending().is_some());
    guest.mmio_write(RNG + 0x70, 0);
    assert_eq!(guest.board.pending(), None);
    assert!(
        guest
            .board
            .apply(&guest.ram, &Input::Random(vec![0; 64]))
            .is_err()
    );
}

#[test]
fn broken_queues_stop_their_device_until_reset() {
    type Break = fn(&Guest, Rings);
    let cases: [(QueueFault, Break); 9] = [
        (QueueFault::Buffer, |guest, tx| {
            guest.offer_buffer(tx, 0, (4 << 20) - 71, 72, 0);
        }),
        (QueueFault::Buffer, |guest, tx| {
            guest.offer_buffer(tx, 0, u64::MAX - 20, 72, 0);
        }),
        (QueueFault::Direction, |guest, tx| {
            guest.offer_buffer(tx, 0, BUFFER, 72, WRITE);
        }),
        (QueueFault::Chain, |guest, tx| {
            guest.descriptor(tx, 0, (BUFFER, 10, NEXT, 1));
            guest.descriptor(tx, 1, (BUFFER, 10, NEXT, 0));
            guest.offer(tx, 0);
        }),
        (QueueFault::Chain, |guest, tx| {
            guest.descriptor(tx, 0, (BUFFER, 100, NEXT, 16));
            guest.offer(tx, 0);
        }),
        (QueueFault::Chain, |guest, tx| guest.offer(tx, 16)),
        (QueueFault::Chain, |guest, tx| {
            // An indirect table of 20 for a queue of 16.
            for n in 0..20 {
                let flags = if n == 19 { 0 } else { NEXT };
                let table = Rings {
                    descriptors: BUFFER,
                    ..tx
                };
                guest.descriptor(table, n, (BUFFER + 8192, 10, flags, n + 1));
            }
            guest.offer_buffer(tx, 0, BUFFER, 20 * 16, INDIRECT);
        }),
        (QueueFault::AvailableIndex, |guest, tx| {
            guest.ram.write_obj(tx.available + 2, 17u16).unwrap();
        }),
        (QueueFault::AvailableIndex, |guest, tx| {
            guest.ram.write_obj(tx.available + 2, u16::MAX).unwrap();
        }),
    ];
    for (number, (fault, break_it)) in cases.into_iter().enumerate() {
        let (mut guest, rx, tx) = network();
        guest.offer_buffer(rx, 0, BUFFER, 2048, WRITE);
        break_it(&guest, tx);
        guest.notify(NET, 1);
        let faults: Vec<_> = guest.board.faults().collect();
        assert_eq!(faults.len(), 1, "case {number}");
        let (name, found) = faults[0];
        assert_eq!((name, found.queue, found.fault), ("network", 1, fault));
        assert_eq!(guest.mmio_read(NET + 0x70), 0x4f, "NEEDS_RESET");
        assert_eq!(guest.mmio_read(NET + 0x60), 2, "a configuration change");
        assert_eq!(guest.board.acknowledge_interrupt(), 0x25);
        assert!(!guest.board.can_receive(&guest.ram));

        guest.ram.write_obj(tx.available, 0u32).unwrap();
        guest.ram.write_obj(rx.available, 0u32).unwrap();
        guest.start(NET, &[rx, tx]);
        place_frame(&guest, BUFFER, &frame(60, 1));
        guest.offer_buffer(tx, 0, BUFFER, 72, 0);
        guest.notify(NET, 1);
        assert_eq!(guest.outputs(), [Output::Frame(frame(60, 1))]);
        assert_eq!(guest.board.faults().count(), 0);
    }
}

#[test]
fn a_broken_receive_queue_is_found_at_its_notification() {
    for (address, flags, fault) in [
        (BUFFER, 0, QueueFault::Direction),
        ((4 << 20) - 2047, WRITE, QueueFault::Buffer),
    ] {
        let (mut guest, rx, _) = network();
        guest.offer_buffer(rx, 0, address, 2048, flags);
        let before = guest.board.clone();
        assert_eq!(guest.board.frame_room(&guest.ram), 0);
        guest
            .board
            .apply(&guest.ram, &Input::Frame(frame(60, 0)))
            .unwrap_err();
        assert_eq!(guest.board, before, "a refusal is not logged: no change");
        guest.notify(NET, 0);
        assert_eq!(guest.mmio_read(NET + 0x70) & 64, 64);
        assert_eq!(guest.board.faults().next().unwrap().1.fault, fault);
    }
}

#[test]
fn a_huge_receive_buffer_takes_the_longest_frame() {
    let (mut guest, rx, _) = network();
    guest.offer_buffer(rx, 0, BUFFER, 1 << 20, WRITE);
    assert_eq!(guest.board.frame_room(&guest.ram), MAX_FRAME);
    guest
        .board
        .apply(&guest.ram, &Input::Frame(frame(MAX_FRAME, 8)))
        .unwrap();
    assert_eq!(guest.used(rx, 0), (0, MAX_FRAME as u32 + 12));
    assert_eq!(guest.bytes(BUFFER + 12, MAX_FRAME), frame(MAX_FRAME, 8));
}

#[test]
fn rings_laid_over_each_other_stay_bounded() {
    // The used ring lies over the available ring, so that an answer rewrites what is asked for: 256 requests, but
    // the first answer says that there was 1.
    let mut guest = Guest::new();
    let base = 0x10_0000;
    let tx = Rings {
        size: 256,
        descriptors: base + 0x2000,
        available: base,
        used: base,
    };
    guest.start(NET, &[Rings::standard(0, 16), tx]);
    guest.descriptor(tx, 0, (BUFFER, 72, 0, 0));
    guest.ram.write_obj(tx.available + 2, 256u16).unwrap();
    guest.notify(NET, 1);
    assert_eq!(guest.outputs(), [Output::Frame(vec![0; 60])]);
    assert_eq!(guest.used_index(tx), 1);
    assert_eq!(guest.board.faults().count(), 0);
}

#[test]
fn notifications_out_of_turn_do_nothing() {
    let mut guest = Guest::new();
    let (rx, tx) = rings();
    guest.negotiate(NET, 1 << 32);
    assert!(guest.set_up_queue(NET, 0, rx));
    assert!(guest.set_up_queue(NET, 1, tx));
    guest.offer_buffer(tx, 0, BUFFER, 72, 0);
    let before = guest.board.clone();
    guest.notify(NET, 1);
    guest.notify(NET, 2);
    guest.notify(NET, u32::MAX);
    assert_eq!(guest.board, before, "before DRIVER_OK");
    assert_eq!(guest.used_index(tx), 0);
    assert_eq!(config_read(&mut guest, PLATFORM + 4, 4), [0xff; 4]);
}

/// A guest with vCPUs of its own sends on and on, and nobody finds the time to take it: what waits is bounded, and all else is kept.
#[test]
fn frames_that_nobody_takes_are_lost() {
    let mut guest = Guest::new();
    let rings = [Rings::standard(0, 256), Rings::standard(1, 256)];
    guest.start(NET, &rings);
    let frame = 60 << 10;
    for _ in 0..3 {
        for _ in 0..256 {
            guest.offer_buffer(rings[1], 0, 0x20_0000, frame, 0);
        }
        guest.notify(NET, 1);
        guest.outb(0x3f8, b'x');
    }
    assert_eq!(guest.used_index(rings[1]), 3 * 256, "the driver goes on");
    let outputs = guest.outputs();
    let console = Output::Console(b"x".to_vec());
    assert_eq!(
        outputs.iter().filter(|output| **output == console).count(),
        3
    );
    let sent = |outputs: &[Output]| -> usize {
        let bytes = |output: &Output| match output {
            Output::Frame(bytes) => bytes.len(),
            _ => 0,
        };
        outputs.iter().map(bytes).sum()
    };
    let waited = sent(&outputs);
    assert!((30 << 20..=FRAMES_MOST).contains(&waited), "{waited}");
    guest.offer_buffer(rings[1], 0, 0x20_0000, frame, 0);
    guest.notify(NET, 1);
    assert_eq!(sent(&guest.outputs()), frame as usize - 12);
}
