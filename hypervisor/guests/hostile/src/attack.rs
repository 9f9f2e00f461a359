//! The attacks.

use guest_runtime::{interrupts, platform};

use crate::machine::{Arena, WINDOWS, WINDOWS_BYTES, port_in, port_out, port_string, read, write};

const NET: usize = WINDOWS + 0x1000;
const RNG: usize = WINDOWS + 0x2000;

const STATUS: usize = 0x70;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const RING_REGISTERS: [usize; 3] = [0x80, 0x90, 0xa0];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const POWER: u16 = 0x604;
/// A byte of 6 there resets the machine, which ends it.
const RESET: u16 = 0xcf9;
const MOST_PLACES: u16 = 256;

/// How many kinds of attack there are.
pub(crate) const KINDS: u64 = 9;

/// A queue as the device is told of it: places, and its three parts.
#[derive(Clone, Copy)]
struct Rings {
    size: u16,
    parts: [u64; 3],
}

pub(crate) struct Attacker {
    random: u64,
    arena: Arena,
    ram: u64,
}

impl Attacker {
    pub(crate) fn new(seed: u64, ram: usize) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            arena: Arena::new(),
            ram: ram as u64,
        }
    }

    /// xorshift64*.
    fn next(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 32) % bound
    }

    /// One in so many.
    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    pub(crate) fn attack(&mut self, only: Option<u64>) {
        let kind = only.unwrap_or_else(|| match self.below(64) {
            // The heavy ones seldom.
            0 => 3,
            1 => 4,
            other => [0, 1, 2, 5, 6, 7, 8][other as usize % 7],
        });
        match kind {
            0 => self.wild_queues(),
            1 => self.looping_chains(),
            2 => self.reset_in_flight(),
            3 => self.flood_the_network(),
            4 => self.drain_entropy(),
            5 => self.huge_lengths(),
            6 => self.wild_window(),
            7 => self.wild_ports(),
            _ => self.wild_timer_and_lines(),
        }
    }

    /// Every device as after power-on, the lines closed: what follows is an orderly guest.
    pub(crate) fn settle(&mut self) {
        for base in [NET, RNG] {
            write(base + STATUS, 4, 0);
        }
        interrupts::open(0);
        port_out(0x43, 1, 0x30);
        port_out(0x3f9, 1, 0);
        port_out(0x3fb, 1, 3);
        port_out(0x3fc, 1, 0);
        interrupts::open(0xffff);
    }

    /// An address in the arena, or, one time in eight, one that is not RAM at all or just ceases to be.
    fn address(&mut self, align: u64) -> u64 {
        let inside = self.arena.start() as u64 + self.below(Arena::BYTES as u64 - 0x2000);
        let wild = match self.below(8) {
            0 => [
                self.ram,
                self.ram - 1,
                self.ram - 8,
                u64::MAX,
                u64::MAX - 4096,
                1 << 40,
                WINDOWS as u64,
                0xffff_ffff,
            ][self.below(8) as usize],
            _ => inside,
        };
        wild / align * align
    }

    /// Up to FEATURES_OK.
    fn begin(&mut self, base: usize) {
        for (register, value) in [(STATUS, 0), (STATUS, 3), (0x24, 1), (0x20, 1), (STATUS, 11)] {
            write(base + register, 4, value);
        }
    }

    fn set_queue(&mut self, base: usize, queue: u64, rings: Rings) {
        write(base + QUEUE_SELECT, 4, queue);
        write(base + QUEUE_SIZE, 4, rings.size.into());
        for (register, address) in RING_REGISTERS.into_iter().zip(rings.parts) {
            write(base + register, 4, address & 0xffff_ffff);
            write(base + register + 4, 4, address >> 32);
        }
        write(base + QUEUE_READY, 4, 1);
    }

    /// A queue in good order at this place of the arena.
    fn good_rings(&self, place: usize, size: u16) -> Rings {
        let start = (self.arena.start() + place) as u64;
        Rings {
            size,
            parts: [start, start + 0x1000, start + 0x1400],
        }
    }

    fn offset(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address)
            .ok()?
            .checked_sub(self.arena.start())?;
        (offset < Arena::BYTES).then_some(offset)
    }

    fn descriptor(
        &self,
        rings: Rings,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let Some(table) = self.offset(rings.parts[0]) else {
            return;
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.arena.store(table + 16 * usize::from(index), &bytes);
    }

    /// The available ring: these heads, and an index that says how many there are, or lies.
    fn offer(&self, rings: Rings, heads: impl Iterator<Item = u16>, index: u16) {
        let Some(ring) = self.offset(rings.parts[1]) else {
            return;
        };
        self.arena.store(ring, &[0, 0]);
        for (n, head) in heads.enumerate() {
            self.arena.store(ring + 4 + 2 * n, &head.to_le_bytes());
        }
        self.arena.store(ring + 2, &index.to_le_bytes());
    }

    fn device(&mut self) -> (usize, u64) {
        if self.one_in(2) { (NET, 2) } else { (RNG, 1) }
    }

    /// The doorbell of a queue that may not be there, or a halt, which rings them all.
    fn ring(&mut self, base: usize) {
        if self.one_in(4) {
            // The clock ends the wait: something must be sure to happen.
            self.tick_soon();
            platform::halt();
        } else {
            let queue = if self.one_in(8) {
                self.next() & 0xffff_ffff
            } else {
                self.below(2)
            };
            write(base + QUEUE_NOTIFY, 4, queue);
        }
    }

    /// One shot of the timer within a millisecond.
    fn tick_soon(&mut self) {
        interrupts::open(0xffff);
        port_out(0x43, 1, 0x30);
        port_out(0x40, 1, 0xff);
        port_out(0x40, 1, 0x01);
    }

    /// Sizes, places and descriptors of any kind.
    fn wild_queues(&mut self) {
        let (base, queues) = self.device();
        self.begin(base);
        for queue in 0..=queues {
            let size = match self.below(8) {
                0 => self.next() as u16,
                bits => 1 << bits,
            };
            let parts = [16, 2, 4].map(|align| self.address(align));
            let rings = Rings { size, parts };
            for index in 0..size.min(16) {
                let descriptor = self.wild_descriptor();
                self.descriptor(rings, index, descriptor);
            }
            let heads: [u16; 8] = core::array::from_fn(|_| self.below(20) as u16);
            let index = if self.one_in(4) {
                self.next() as u16
            } else {
                self.below(9) as u16
            };
            self.set_queue(base, queue, rings);
            self.offer(rings, heads.into_iter(), index);
        }
        write(base + STATUS, 4, 15);
        for _ in 0..3 {
            self.ring(base);
        }
    }

    fn wild_descriptor(&mut self) -> (u64, u32, u16, u16) {
        let address = self.address(1);
        let length = match self.below(6) {
            0 => self.next() as u32,
            1 => 0,
            _ => self.below(0x1800) as u32,
        };
        let flags = match self.below(8) {
            0 => self.next() as u16,
            1 => INDIRECT | self.below(4) as u16,
            _ => self.below(4) as u16,
        };
        (address, length, flags, self.below(20) as u16)
    }

    /// Chains that lead into themselves, out of their table, or through tables of tables.
    fn looping_chains(&mut self) {
        let (base, _) = self.device();
        let rings = self.good_rings(0, MOST_PLACES);
        let (way, queue) = match base {
            NET => (0, 1),
            _ => (WRITE, 0),
        };
        let buffer = self.arena.start() as u64 + 0x8000;
        let indirect = self.one_in(3);
        for index in 0..MOST_PLACES {
            let next = match self.below(4) {
                0 => index,
                1 => self.next() as u16,
                _ => (index + 1) % MOST_PLACES,
            };
            let descriptor = if indirect && self.one_in(4) {
                // The table is the queue's own, a piece of it, or of an odd length.
                let length = [0, 7, 16, 4096, u32::MAX][self.below(5) as usize];
                (rings.parts[0] + 16 * self.below(8), length, INDIRECT, next)
            } else {
                (buffer, 64, way | NEXT, next)
            };
            self.descriptor(rings, index, descriptor);
        }
        self.begin(base);
        self.set_queue(base, queue, rings);
        self.offer(rings, 0..8, 8);
        write(base + STATUS, 4, 15);
        self.ring(base);
    }

    /// Requests under way when the device is reset, or a queue taken back under it and laid elsewhere.
    fn reset_in_flight(&mut self) {
        let (base, queues) = self.device();
        self.begin(base);
        for place in 0..2 {
            for queue in 0..queues {
                let rings = self.good_rings(0x2000 * (place + 2 * queue as usize), 8);
                for index in 0..8 {
                    let at = self.arena.start() as u64 + 0x8000 + 0x1000 * u64::from(index);
                    let way = if queue == 1 { 0 } else { WRITE };
                    self.descriptor(rings, index, (at, 0x800, way, 0));
                }
                self.set_queue(base, queue, rings);
                self.offer(rings, 0..8, 8);
            }
            write(base + STATUS, 4, 15);
            self.ring(base);
            match self.below(3) {
                0 => write(base + STATUS, 4, 0),
                1 => {
                    let queue = self.below(3);
                    write(base + QUEUE_SELECT, 4, queue);
                    write(base + QUEUE_READY, 4, 0);
                }
                _ => {
                    let status = self.next() & 0xff;
                    write(base + STATUS, 4, status);
                }
            }
            self.ring(base);
        }
    }

    /// As many of the longest frames as one exit can carry, and all of it again.
    fn flood_the_network(&mut self) {
        const LONGEST: u32 = 12 + 14 + 65_535;
        let rings = self.good_rings(0, MOST_PLACES);
        for index in 0..MOST_PLACES {
            self.descriptor(
                rings,
                index,
                (self.arena.start() as u64 + 0x4000, LONGEST, 0, 0),
            );
        }
        self.begin(NET);
        self.set_queue(NET, 1, rings);
        write(NET + STATUS, 4, 15);
        for round in 1..=4_u16 {
            self.offer(rings, 0..MOST_PLACES, MOST_PLACES.wrapping_mul(round));
            write(NET + QUEUE_NOTIFY, 4, 1);
        }
    }

    /// As many random bytes at one exit as there can be.
    fn drain_entropy(&mut self) {
        let rings = self.good_rings(0, MOST_PLACES);
        for index in 0..MOST_PLACES {
            self.descriptor(
                rings,
                index,
                (self.arena.start() as u64 + 0x8000, 4096, WRITE, 0),
            );
        }
        self.begin(RNG);
        self.set_queue(RNG, 0, rings);
        write(RNG + STATUS, 4, 15);
        for round in 1..=2_u16 {
            self.offer(rings, 0..MOST_PLACES, MOST_PLACES.wrapping_mul(round));
            write(RNG + QUEUE_NOTIFY, 4, 0);
        }
    }

    /// Chains of buffers that are all of memory, each; together more than any number of 32 bits.
    fn huge_lengths(&mut self) {
        let rings = self.good_rings(0, MOST_PLACES);
        let whole = u32::try_from(self.ram).unwrap_or(u32::MAX);
        for index in 0..MOST_PLACES {
            let next = if index + 1 < MOST_PLACES { NEXT } else { 0 };
            self.descriptor(rings, index, (0, whole, next, index + 1));
        }
        self.begin(NET);
        self.set_queue(NET, 1, rings);
        let index = if self.one_in(2) { 1 } else { MOST_PLACES };
        self.offer(rings, 0..MOST_PLACES, index);
        write(NET + STATUS, 4, 15);
        self.ring(NET);
    }

    /// Any width at any offset, over the windows' edges as well. HALT is read by [`Attacker::ring`] alone, which sees to it that
    /// the wait ends.
    fn wild_window(&mut self) {
        for _ in 0..16 {
            let at = self.below(WINDOWS_BYTES as u64) as usize;
            let at = if self.one_in(2) { at & !3 } else { at };
            let width = 1 << self.below(4);
            if at < 8 {
                continue;
            }
            if self.one_in(2) {
                read(WINDOWS + at, width);
            } else {
                let value = self.next() >> self.below(64);
                // A queue that is ready by chance lies where it may: keep what a device writes in the arena.
                let device = (WINDOWS + at) & !0xfff;
                if device != WINDOWS {
                    write(device + STATUS, 4, 0);
                }
                write(WINDOWS + at, width, value);
            }
        }
    }

    fn wild_ports(&mut self) {
        for _ in 0..12 {
            let port = match self.below(6) {
                0 => self.next() as u16,
                1 => 0x3f8 + self.below(8) as u16,
                2 => 0x40 + self.below(4) as u16,
                3 => 0x70 + self.below(2) as u16,
                4 => [0xe4, 0x600, 0x602, 0x608, RESET][self.below(5) as usize],
                _ => POWER - 2 + self.below(4) as u16,
            };
            // The 8259s have an attack of their own, that leaves the vectors where the guest has gates.
            if matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1) {
                continue;
            }
            let width = 1 << self.below(3);
            // Beyond the last port there is no permission, and the guest would end by its own exception.
            if usize::from(port) + width > 0x1_0000 {
                continue;
            }
            let value = self.next() as u32;
            let off = match port {
                POWER => (0x2000..0x2100).contains(&(value & 0xffff)),
                RESET => value & 0xff == 6,
                _ => false,
            };
            match self.below(4) {
                0 => drop(port_in(port, width)),
                1 => {
                    let at = self.arena.start() + 0x4000;
                    let count = self.below(300) as usize;
                    // Two bytes in a string may happen to say that the machine is to be off.
                    let quiet = matches!(port, POWER | RESET | 0x3f8..0x400);
                    let write = self.one_in(2) && !quiet;
                    port_string(port, count, write, at);
                }
                _ if off => {}
                _ => port_out(port, width, value),
            }
        }
    }

    /// The timer in every mode and at every speed, the 8259s set up in odd ways over the vectors that the guest has.
    fn wild_timer_and_lines(&mut self) {
        for _ in 0..4 {
            let mode = self.next() as u32 & 0xff;
            port_out(0x43, 1, mode);
            for _ in 0..self.below(3) {
                let (port, count) = (0x40 + self.below(3) as u16, self.next() as u32 & 0xff);
                port_out(port, 1, count);
            }
            port_in(0x40 + self.below(4) as u16, 1);
            port_out(0x61, 1, self.random as u32 & 0xff);
        }
        for (port, vector) in [(0x20, 0x20), (0xa0, 0x28)] {
            let first = 0x10 | self.next() as u32 & 0x0b;
            port_out(port, 1, first);
            port_out(port + 1, 1, vector);
            if first & 2 == 0 {
                let third = self.next() as u32 & 0xff;
                port_out(port + 1, 1, third);
            }
            if first & 1 != 0 {
                let fourth = self.next() as u32 & 0x13 | 1;
                port_out(port + 1, 1, fourth);
            }
            for _ in 0..3 {
                let (at, command) = (port + self.below(2) as u16, self.next() as u32);
                // No ICW1 by chance: it would be followed by a vector that has no gate.
                port_out(at, 1, command & 0xef);
                port_in(at, 1);
            }
        }
        let _ = platform::clock();
        interrupts::open(0xffff);
    }

    /// Has the entropy device write over the code that runs: the end of this guest, and of nothing else.
    pub(crate) fn overwrite_itself(&mut self, code: usize) {
        let rings = self.good_rings(0, MOST_PLACES);
        for index in 0..MOST_PLACES {
            let at = (code & !0xfff) as u64 + 4096 * (u64::from(index) % 8);
            self.descriptor(rings, index, (at, 4096, WRITE, 0));
        }
        self.begin(RNG);
        self.set_queue(RNG, 0, rings);
        write(RNG + STATUS, 4, 15);
        self.offer(rings, 0..MOST_PLACES, MOST_PLACES);
        write(RNG + QUEUE_NOTIFY, 4, 0);
    }
}
