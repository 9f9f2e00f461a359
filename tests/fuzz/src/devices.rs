//! What a guest can do to its devices: any access to any port and window, over memory that it filled as it likes.
#![forbid(unsafe_code)]

use hypervisor::devices::{Bus, DISK_DEPTH, Devices, DevicesConfig, DiskConfig, MAX_REQUEST};
use hypervisor::disk::{Data, Done, Operation, Status};
use hypervisor::event::{Effect, GuestTime, Input, Need, Output};
use hypervisor::memory::GuestRam;

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "devices",
    line: "accesses to ports and windows over virtqueues anywhere in RAM: bounded work, and two boards stay equal",
    run,
    seeds,
};

/// Where queues and buffers lie; small, so that wild addresses meet.
const ARENA: u64 = 0x10_0000;
const ARENA_BYTES: u64 = 0x4000;
const WINDOWS: [u64; 4] = [0xd000_0000, 0xd000_1000, 0xd000_2000, 0xd000_3000];
/// More than a queue has places for, and the disk's requests: no exit makes more.
const MOST_OUTPUTS: usize = 257 + DISK_DEPTH;
const DISK: Option<DiskConfig> = Some(DiskConfig {
    sectors: 64,
    read_only: false,
    id: [b'd'; 20],
});

/// Memory is mapped once for each board; a run clears the arena, and nothing else is ever written.
struct Machine {
    board: Devices,
    ram: GuestRam,
}

thread_local! {
    static MACHINES: std::cell::RefCell<[Machine; 2]> =
        std::cell::RefCell::new([Machine::new(), Machine::new()]);
}

fn run(bytes: &[u8]) {
    MACHINES.with_borrow_mut(|machines| {
        for machine in machines.iter_mut() {
            machine.clear();
        }
        let mut source = Source::new(bytes);
        while !source.is_over() {
            let mut again = source;
            let [one, two] = machines.each_mut().map(|machine| {
                again = source;
                machine.step(&mut again)
            });
            source = again;
            assert_eq!(one, two, "the same accesses had two outcomes");
        }
        let [one, two] = machines.each_ref().map(|machine| {
            let mut arena = vec![0; ARENA_BYTES as usize];
            machine.ram.read(ARENA, &mut arena).expect("RAM");
            (machine.board.digest(), arena)
        });
        assert!(one == two, "two boards differ after the same accesses");
    });
}

impl Machine {
    fn new() -> Self {
        Self {
            board: board(),
            ram: GuestRam::new(2).expect("memory"),
        }
    }

    fn clear(&mut self) {
        self.board = board();
        self.ram
            .write(ARENA, &[0; ARENA_BYTES as usize])
            .expect("RAM");
    }

    fn step(&mut self, source: &mut Source<'_>) -> (Vec<u8>, Vec<Output>, u64) {
        let choice = source.u8();
        let mut data = Vec::new();
        match choice & 7 {
            0 => {
                let (bus, at) = place(choice, source);
                data = vec![0; length(choice)];
                let effect = self.board.read(&self.ram, bus, at, &mut data);
                self.answer(effect, &mut data);
            }
            1 | 2 => {
                let (bus, at) = place(choice, source);
                let value = source.u32().to_le_bytes();
                let written: Vec<u8> = value.into_iter().cycle().take(length(choice)).collect();
                let effect = self.board.write(&self.ram, bus, at, &written);
                self.answer(effect, &mut []);
            }
            3 => self.set_up(choice, source),
            4 => self.describe(choice, source),
            5 => {
                let at = ARENA + u64::from(source.u16()) % ARENA_BYTES;
                let length = usize::from(source.u8());
                let bytes = source.bytes(length);
                let most = bytes.len().min((ARENA + ARENA_BYTES - at) as usize);
                self.ram.write(at, &bytes[..most]).expect("RAM");
            }
            6 => {
                // The doorbell of a queue.
                let base = WINDOWS[1 + usize::from(choice >> 3 & 3) % 3];
                let queue = u32::from(choice >> 5 & 3).to_le_bytes();
                self.board.write(&self.ram, Bus::Mmio, base + 0x50, &queue);
            }
            _ => self.input(choice, source),
        }
        self.give_random();
        let outputs: Vec<_> = self.board.outputs().collect();
        assert!(outputs.len() <= MOST_OUTPUTS, "{} outputs", outputs.len());
        (data, outputs, self.board.digest())
    }

    fn answer(&mut self, effect: Effect, data: &mut [u8]) {
        let input = match effect {
            Effect::Done | Effect::PowerOff(_) | Effect::Crash => return,
            Effect::Reset => return self.board.reset(&CONFIG),
            Effect::Halt | Effect::Needs(Need::Clock) => Input::Clock(GuestTime(1 << 30)),
            Effect::Needs(Need::Random(count)) => Input::Random(vec![5; count]),
        };
        self.board.answer(&input, data).expect("what it asked for");
    }

    /// The bytes that the entropy device asks for; answers may make new requests in rings that overlay each other.
    fn give_random(&mut self) {
        for _ in 0..256 {
            let Some(Need::Random(count)) = self.board.pending() else {
                return;
            };
            assert!((1..=MAX_REQUEST).contains(&count));
            self.board
                .apply(&self.ram, &Input::Random(vec![1; count]))
                .expect("what it asked for");
        }
    }

    /// A device from reset to running with queues where the input wants them.
    fn set_up(&mut self, choice: u8, source: &mut Source<'_>) {
        let base = WINDOWS[1 + usize::from(choice >> 3 & 3) % 3];
        let mut write = |register: u64, value: u32| {
            let _ = self
                .board
                .write(&self.ram, Bus::Mmio, base + register, &value.to_le_bytes());
        };
        for (register, value) in [(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
            write(register, value);
        }
        for queue in 0..2 {
            write(0x30, queue);
            write(0x38, 1 << (source.u8() % 9));
            for (register, align) in [(0x80, 16), (0x90, 2), (0xa0, 4)] {
                let at = ARENA + u64::from(source.u16()) % ARENA_BYTES / align * align;
                write(register, at as u32);
            }
            write(0x44, 1);
        }
        if choice & 0x80 == 0 {
            write(0x70, 15);
        }
    }

    /// A descriptor, mostly sensible.
    fn describe(&mut self, choice: u8, source: &mut Source<'_>) {
        let at = ARENA + u64::from(source.u16()) % (ARENA_BYTES - 16);
        let address = if choice & 0x80 == 0 {
            ARENA + u64::from(source.u16()) % ARENA_BYTES
        } else {
            source.u64()
        };
        let length = if choice & 0x40 == 0 {
            u32::from(source.u16()) % 4000
        } else {
            source.u32()
        };
        let flags = u16::from(choice >> 3 & 7);
        let next = source.u8();
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(u16::from(next).to_le_bytes());
        self.ram.write(at, &bytes).expect("RAM");
    }

    /// What the recorder hands in. Refused, it changes nothing.
    fn input(&mut self, choice: u8, source: &mut Source<'_>) {
        let before = self.board.digest();
        let input = match choice >> 3 & 7 {
            0 | 1 => {
                let room = self.board.frame_room(&self.ram);
                let length = usize::from(source.u16());
                let frame = vec![choice; length];
                let fits = room > 0 && length <= room;
                let applied = self.board.apply(&self.ram, &Input::Frame(frame));
                assert_eq!(
                    applied.is_ok(),
                    fits,
                    "room for {room}, a frame of {length}"
                );
                return;
            }
            2 => Input::Tick(u32::from(source.u8())),
            3 => Input::Console(vec![choice; usize::from(source.u8())]),
            4 => Input::Random(vec![choice; usize::from(source.u16())]),
            5 => {
                if self.board.interrupt_pending() {
                    self.board.acknowledge_interrupt();
                }
                return;
            }
            6 => {
                // A copy, as a checkpoint makes one, goes on as the original does.
                let saved = self.board.save();
                let restored = self.board.restored(&saved).expect("a state of ours");
                assert_eq!(restored.digest(), before);
                self.board = restored;
                return;
            }
            _ if choice & 0x40 == 0 => Input::Clock(GuestTime(source.u64())),
            _ => self.answer_of_the_disk(source),
        };
        if self.board.apply(&self.ram, &input).is_err() {
            assert_eq!(
                before,
                self.board.digest(),
                "a refused {input:?} left a trace"
            );
        }
    }
}

impl Machine {
    /// What came of one of the requests that are under way, mostly one that fits.
    fn answer_of_the_disk(&self, source: &mut Source<'_>) -> Input {
        let (which, how) = (source.u8(), source.u8());
        let mut requests = self.board.disk_requests();
        let request = requests.nth(usize::from(which) % DISK_DEPTH);
        let number = request.map_or_else(Default::default, |request| request.number);
        let good = how & 1 == 0;
        let length = match request.map(|request| &request.operation) {
            Some(Operation::Read { length, .. }) if good => *length as usize,
            _ => usize::from(how >> 6) * 100,
        };
        Input::Disk(Done {
            number,
            status: if good { Status::Good } else { Status::Error },
            data: Data(vec![how; length]),
        })
    }
}

const CONFIG: DevicesConfig = DevicesConfig {
    mac: [2; 6],
    mtu: 1500,
    disk: DISK,
    wall_clock_ns: 0,
    firmware: false,
};

fn board() -> Devices {
    Devices::new(&CONFIG)
}

fn length(choice: u8) -> usize {
    [4, 1, 2, 8, 4, 4, 1, 0][usize::from(choice >> 5)]
}

fn place(choice: u8, source: &mut Source<'_>) -> (Bus, u64) {
    let at = u64::from(source.u16());
    match choice >> 3 & 3 {
        0 => {
            let known = [
                0x20, 0x21, 0xa0, 0xa1, 0x40, 0x43, 0x61, 0x3f8, 0x3f9, 0x3fb, 0x604,
            ];
            (Bus::Port, known[at as usize % known.len()])
        }
        1 => (Bus::Port, at),
        2 => (Bus::Mmio, WINDOWS[at as usize % 4] + (at >> 2) % 0x120),
        _ => (Bus::Mmio, at << 16),
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let word = |value: u64| (value as u16).to_le_bytes();
    let mut seeds = Vec::new();
    // One driver each for network, entropy and disk, with a frame to send, a buffer to receive, and requests.
    for (device, flags) in [(0u8, 0u8), (8, 2), (16, 2)] {
        let mut seed = vec![3 | device];
        for queue in 0..2u64 {
            seed.push(3);
            for part in [0, 0x800, 0x1000] {
                seed.extend(word(queue * 0x1800 + part));
            }
        }
        for (queue, writes) in [(0u64, 2u8), (1, flags)] {
            for n in 0..4u64 {
                seed.push(4 | writes << 3);
                seed.extend(word(queue * 0x1800 + 16 * n));
                seed.extend(word(0x3000 + 0x400 * n));
                seed.extend(word(0x300));
                seed.push(0);
            }
            let mut available = vec![0, 0, 4, 0];
            for n in 0..4u16 {
                available.extend(n.to_le_bytes());
            }
            seed.push(5);
            seed.extend(word(queue * 0x1800 + 0x800));
            seed.push(available.len() as u8);
            seed.extend(available);
        }
        seed.extend([6 | device | 1 << 5, 6 | device]);
        seed.extend([7, 60, 0, 7, 0, 2, 7 | 6 << 3, 7 | 5 << 3]);
        seed.extend([16, 0, 0, 7 | 7 << 3, 1, 0, 0, 0, 0, 0, 0, 0]);
        seeds.push(seed);
    }
    // The 8259 pair and the 8254 set up, ticks, an interrupt; a line on the console; the power switch.
    let mut ports = Vec::new();
    for (port, value) in [
        (0u16, 0x11),
        (1, 0x20),
        (1, 4),
        (1, 3),
        (1, 0),
        (2, 0x11),
        (3, 0x28),
        (3, 2),
        (3, 3),
        (5, 0x34),
        (4, 0x10),
        (4, 0x20),
        (8, 0xf),
        (7, b'x'),
        (9, 0x83),
    ] {
        ports.push(1 | 1 << 5);
        ports.extend(port.to_le_bytes());
        ports.extend([value, 0, 0, 0]);
    }
    ports.extend([7 | 2 << 3, 1, 7 | 5 << 3, 7 | 3 << 3, 9, 1 << 5, 7, 0]);
    ports.extend([1 | 2 << 5, 10, 0, 0, 0x20, 0, 0]);
    seeds.push(ports);
    seeds
}
