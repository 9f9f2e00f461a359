//! Guests that mean harm, and two boards that must stay equal whatever happens.

use proptest::prelude::*;

use super::driver::{Guest, INDIRECT, NET, NEXT, PLATFORM, RNG, Rings, WRITE};
use crate::devices::{Bus, Devices};
use crate::event::{Effect, GuestTime, Input, Need, Output};
use crate::memory::{GuestRam, MemoryHash};

/// The memory that hostile tests play in: small, so that wild addresses meet.
const ARENA: u64 = 0x10_0000;
const ARENA_BYTES: u64 = 0x4000;

/// Something that a guest or a recorder does.
#[derive(Clone, Debug)]
enum Step {
    Read(Bus, u64, usize),
    Write(Bus, u64, Vec<u8>),
    /// The guest writes its memory.
    Poke(u64, Vec<u8>),
    /// The guest puts a descriptor into a queue's table and makes it available.
    Offer(usize, u16, (u64, u32, u16, u16)),
    Apply(Input),
    Acknowledge,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => ARENA..ARENA + ARENA_BYTES,
        1 => (4u64 << 20) - 64..(4u64 << 20) + 64,
        1 => any::<u64>(),
    ]
}

/// Descriptor `(address, len, flags, next)`, mostly sensible for queue `queue`, so that chains get long before they
/// go wrong.
fn descriptor(queue: usize) -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let right_way = if queue == 1 { 0 } else { WRITE };
    let len = prop_oneof![1 => Just(0u32), 12 => 0u32..3000, 1 => any::<u32>()];
    let flags = prop_oneof![
        16 => Just(right_way),
        6 => Just(right_way | NEXT),
        1 => Just(right_way | INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![12 => 0u16..16, 1 => any::<u16>()];
    (address(), len, flags, next)
}

/// A queue and what its driver put there.
#[derive(Clone, Debug)]
struct Attack {
    rings: Rings,
    table: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    index: u16,
}

impl Attack {
    fn launch(&self, guest: &Guest) {
        for (n, &desc) in self.table.iter().enumerate() {
            guest.descriptor(self.rings, n as u16, desc);
        }
        for &head in &self.heads {
            guest.offer(self.rings, head);
        }
        let index: u16 = guest.ram.read_obj(self.rings.available + 2).unwrap();
        let index = index.wrapping_add(self.index);
        guest
            .ram
            .write_obj(self.rings.available + 2, index)
            .unwrap();
    }
}

/// Queue `queue`: its rings apart from all others, or anywhere in the arena, over each other and its buffers.
fn attack(queue: usize) -> impl Strategy<Value = Attack> {
    let place = |align: u64| (1..ARENA_BYTES / 2 / align).prop_map(move |n| ARENA + n * align);
    let anywhere = (place(16), place(2), place(4));
    let apart = {
        let rings = Rings::standard(queue as u64 + 4, 0);
        Just((rings.descriptors, rings.available, rings.used))
    };
    let rings = (
        0u32..=8,
        prop_oneof![3 => apart.boxed(), 2 => anywhere.boxed()],
    )
        .prop_map(|(bits, (descriptors, available, used))| Rings {
            size: 1 << bits,
            descriptors,
            available,
            used,
        });
    let index = prop_oneof![12 => Just(0u16), 1 => 0u16..300, 1 => any::<u16>()];
    rings.prop_flat_map(move |rings| {
        let head = prop_oneof![16 => 0..rings.size.min(16), 1 => any::<u16>()];
        (
            Just(rings),
            prop::collection::vec(descriptor(queue), 16),
            prop::collection::vec(head, 0..=usize::from(rings.size).min(12)),
            index.clone(),
        )
            .prop_map(|(rings, table, heads, index)| Attack {
                rings,
                table,
                heads,
                index,
            })
    })
}

fn attacks() -> impl Strategy<Value = [Attack; 3]> {
    (attack(0), attack(1), attack(2)).prop_map(|(rx, tx, rng)| [rx, tx, rng])
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (0u32..3).prop_map(Input::Tick),
        prop::collection::vec(any::<u8>(), 0..2000).prop_map(Input::Frame),
        prop::collection::vec(any::<u8>(), 0..80).prop_map(Input::Console),
        prop::collection::vec(any::<u8>(), 0..64).prop_map(Input::Random),
        any::<u64>().prop_map(|now| Input::Clock(GuestTime(now))),
    ]
}

fn place() -> impl Strategy<Value = (Bus, u64)> {
    let port = prop_oneof![
        Just(0x20u64),
        Just(0x21),
        Just(0xa0),
        Just(0xa1),
        0x40u64..0x44,
        Just(0x61),
        0x3f8u64..0x400,
        Just(0x604),
        any::<u64>(),
    ];
    let register = prop_oneof![0u64..0x28, (0u64..0x48).prop_map(|n| 4 * n)];
    let base = prop_oneof![Just(PLATFORM), Just(NET), Just(RNG)];
    prop_oneof![
        port.prop_map(|port| (Bus::Port, port)),
        (base, register).prop_map(|(base, offset)| (Bus::Mmio, base + offset)),
    ]
}

fn width() -> impl Strategy<Value = usize> {
    prop_oneof![3 => Just(1usize), 1 => Just(2), 4 => Just(4), 2 => Just(8), 1 => 0usize..16]
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![0u64..4, any::<u64>()];
    prop_oneof![
        3 => (place(), width()).prop_map(|((bus, addr), len)| Step::Read(bus, addr, len)),
        3 => (place(), width(), value).prop_map(|((bus, addr), len, value)| {
            Step::Write(bus, addr, value.to_le_bytes().into_iter().cycle().take(len).collect())
        }),
        // Notifications, and the platform page.
        3 => (prop_oneof![Just(NET), Just(RNG)], 0u32..3).prop_map(|(base, queue)| {
            Step::Write(Bus::Mmio, base + 0x50, queue.to_le_bytes().to_vec())
        }),
        2 => (0u64..3).prop_map(|n| Step::Read(Bus::Mmio, PLATFORM + 8 * n, 8)),
        8 => (0usize..3).prop_flat_map(|queue| {
            (0u16..16, descriptor(queue))
                .prop_map(move |(head, descriptor)| Step::Offer(queue, head, descriptor))
        }),
        2 => (ARENA..ARENA + ARENA_BYTES, 0u16..300)
            .prop_map(|(at, word)| Step::Poke(at & !1, word.to_le_bytes().to_vec())),
        4 => input().prop_map(Step::Apply),
        2 => Just(Step::Acknowledge),
    ]
}

/// Everything that a step lets the outside see.
#[derive(Debug, PartialEq)]
struct Seen {
    effect: Option<Effect>,
    data: Vec<u8>,
    outputs: Vec<Output>,
    vector: Option<u8>,
    digest: u64,
}

/// Does a step, answering what it asks for; checks what holds for every step.
fn perform(guest: &mut Guest, attacks: &[Attack; 3], step: &Step, turn: u64) -> Seen {
    let (mut effect, mut data, mut vector) = (None, Vec::new(), None);
    let Guest { board, ram } = guest;
    match step {
        Step::Read(bus, addr, len) => {
            data = vec![0; *len];
            effect = Some(board.read(ram, *bus, *addr, &mut data));
        }
        Step::Write(bus, addr, bytes) => effect = Some(board.write(ram, *bus, *addr, bytes)),
        // A guest cannot write outside RAM either.
        Step::Poke(at, bytes) => drop(ram.write(*at, bytes)),
        Step::Offer(queue, head, descriptor) => {
            let rings = attacks[*queue].rings;
            guest.descriptor(rings, *head, *descriptor);
            guest.offer(rings, *head);
        }
        Step::Apply(input) => apply(board, ram, input),
        Step::Acknowledge => vector = Some(board.acknowledge_interrupt()),
    }
    let Guest { board, ram } = guest;
    let now = Input::Clock(GuestTime(turn * 1_000_000));
    match effect {
        Some(Effect::Needs(Need::Clock) | Effect::Halt) => {
            board.answer(&now, &mut data).unwrap();
        }
        Some(Effect::Needs(Need::Random(len))) => {
            let random = Input::Random(vec![turn as u8; len]);
            board.answer(&random, &mut data).unwrap();
        }
        Some(Effect::Reset) => board.reset(&super::driver::config(None)),
        Some(Effect::Done | Effect::PowerOff(_) | Effect::Crash) | None => {}
    }
    // Our bytes may make new requests in overlaid rings, so the recorder, too, gives a bounded number at a time.
    for _ in 0..256 {
        let Some(Need::Random(len)) = board.pending() else {
            break;
        };
        assert!((1..=4096).contains(&len));
        board
            .apply(ram, &Input::Random(vec![turn as u8; len]))
            .unwrap();
    }
    let outputs: Vec<Output> = board.outputs().collect();
    assert!(
        outputs.len() <= 256,
        "{} outputs at one exit",
        outputs.len()
    );
    Seen {
        effect,
        data,
        outputs,
        vector,
        digest: board.digest(),
    }
}

/// Applies an input; a refused one must change nothing, and the board's own words must agree with what it does.
fn apply(board: &mut Devices, ram: &GuestRam, input: &Input) {
    let before = board.clone();
    let memory = MemoryHash::full(ram).unwrap().value();
    let room = board.frame_room(ram);
    match (input, board.apply(ram, input)) {
        (Input::Frame(frame), Ok(())) => assert!(frame.len() <= room),
        (Input::Frame(frame), Err(_)) => assert!(room == 0 || frame.len() > room),
        (Input::Clock(_), result) => assert!(result.is_err()),
        (Input::Console(bytes), result) => {
            assert_eq!(result.is_ok(), bytes.len() <= before.console_room());
        }
        _ => {}
    }
    let memory_now = MemoryHash::full(ram).unwrap().value();
    if board.board == before.board {
        assert_eq!(memory, memory_now);
    } else {
        assert_ne!(before.digest(), board.digest());
    }
}

/// A guest whose drivers are set up over hostile queues.
fn set_up(attacks: &[Attack; 3]) -> Guest {
    let mut guest = Guest::new();
    guest.set_up_pic();
    for (base, queues) in [(NET, &attacks[..2]), (RNG, &attacks[2..])] {
        guest.negotiate(base, 1 << 32);
        for (index, attack) in queues.iter().enumerate() {
            assert!(guest.set_up_queue(base, index as u32, attack.rings));
        }
        guest.mmio_write(base + 0x70, 0xf);
    }
    for attack in attacks {
        attack.launch(&guest);
    }
    guest
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random rings and descriptor tables, then notifications: no panic, bounded work, and the device either works
    /// or says that it needs a reset.
    #[test]
    fn hostile_queues_do_no_harm(
        attacks in attacks(),
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4),
    ) {
        let mut guest = set_up(&attacks);
        for (turn, (base, queue)) in [(NET, 1u32), (RNG, 0), (NET, 1)].into_iter().enumerate() {
            let notify = Step::Write(Bus::Mmio, base + 0x50, queue.to_le_bytes().to_vec());
            perform(&mut guest, &attacks, &notify, turn as u64);
        }
        for frame in frames {
            apply(&mut guest.board, &guest.ram, &Input::Frame(frame));
        }
        perform(&mut guest, &attacks, &Step::Read(Bus::Mmio, PLATFORM, 8), 9);
        for (base, name) in [(NET, "network"), (RNG, "entropy")] {
            let broken = guest.board.faults().any(|(device, _)| device == name);
            prop_assert_eq!(guest.mmio_read(base + 0x70) & 64 != 0, broken);
        }
    }

    /// The same accesses and inputs make the same outputs, the same answers, the same state and the same memory; and
    /// a copy taken half-way goes on as the original does.
    #[test]
    fn two_boards_stay_equal(
        attacks in attacks(),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let (mut one, mut two) = (set_up(&attacks), set_up(&attacks));
        for (turn, step) in steps.iter().enumerate() {
            if turn == steps.len() / 2 {
                two.board = two.board.clone();
            }
            let seen = perform(&mut one, &attacks, step, turn as u64);
            prop_assert_eq!(&seen, &perform(&mut two, &attacks, step, turn as u64));
        }
        prop_assert_eq!(&one.board, &two.board);
        let (one, two) = (MemoryHash::full(&one.ram).unwrap(), MemoryHash::full(&two.ram).unwrap());
        prop_assert_eq!(one.first_difference(&two), None);
    }
}
