//! A guest's side of the board: register accesses, and a small virtio driver over hand-made queues.

use crate::devices::{Bus, Devices, DevicesConfig, DiskConfig};
use crate::event::{Effect, GuestTime, Input, Output};
use crate::memory::GuestRam;

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub const MTU: u16 = 1500;

pub const PLATFORM: u64 = 0xd000_0000;
pub const NET: u64 = 0xd000_1000;
pub const RNG: u64 = 0xd000_2000;
pub const BLK: u64 = 0xd000_3000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where a test queue's three parts lie in RAM.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Rings {
    /// The rings of queue `n`, apart from all others.
    pub fn standard(n: u64, size: u16) -> Self {
        let base = 0x10_0000 + n * 0x4000;
        Self {
            size,
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
        }
    }
}

/// A machine without a CPU: the test is the CPU.
#[derive(Debug)]
pub struct Guest {
    pub board: Devices,
    pub ram: GuestRam,
}

/// The board's, with this disk.
pub fn config(disk: Option<DiskConfig>) -> DevicesConfig {
    DevicesConfig {
        mac: MAC,
        mtu: MTU,
        disk,
        wall_clock_ns: 0,
        firmware: false,
    }
}

impl Guest {
    pub fn new() -> Self {
        Self::with(None)
    }

    /// One with this disk.
    pub fn with(disk: Option<DiskConfig>) -> Self {
        Self {
            board: Devices::new(&config(disk)),
            ram: GuestRam::new(4).unwrap(),
        }
    }

    pub fn outb(&mut self, port: u16, value: u8) -> Effect {
        let effect = self
            .board
            .write(&self.ram, Bus::Port, u64::from(port), &[value]);
        if let Effect::Needs(_) = effect {
            let now = Input::Clock(GuestTime(0));
            self.board.answer(&now, &mut []).unwrap();
        }
        effect
    }

    pub fn inb(&mut self, port: u16) -> u8 {
        let mut data = [0];
        let effect = self
            .board
            .read(&self.ram, Bus::Port, u64::from(port), &mut data);
        if let Effect::Needs(_) = effect {
            let now = Input::Clock(GuestTime(0));
            self.board.answer(&now, &mut data).unwrap();
        }
        data[0]
    }

    pub fn mmio_write(&mut self, addr: u64, value: u32) {
        let data = value.to_le_bytes();
        let effect = self.board.write(&self.ram, Bus::Mmio, addr, &data);
        assert_eq!(effect, Effect::Done);
    }

    pub fn mmio_read(&mut self, addr: u64) -> u32 {
        let mut data = [0; 4];
        let effect = self.board.read(&self.ram, Bus::Mmio, addr, &mut data);
        assert_eq!(effect, Effect::Done);
        u32::from_le_bytes(data)
    }

    /// Begins a read of HALT; the board waits for the clock.
    pub fn halt(&mut self) {
        let mut data = [0; 8];
        let effect = self.board.read(&self.ram, Bus::Mmio, PLATFORM, &mut data);
        assert_eq!(effect, Effect::Halt);
    }

    /// Ends the read of HALT.
    pub fn resume(&mut self, now: u64) -> u64 {
        let mut data = [0; 8];
        let clock = Input::Clock(GuestTime(now));
        self.board.answer(&clock, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    pub fn outputs(&mut self) -> Vec<Output> {
        self.board.outputs().collect()
    }

    /// Sets the 8259 pair up: vectors 0x20 and 0x28, automatic EOI, all lines open.
    pub fn set_up_pic(&mut self) {
        for (port, icw2, icw3) in [(0x20, 0x20, 0x04), (0xa0, 0x28, 0x02)] {
            self.outb(port, 0x11);
            for value in [icw2, icw3, 0x03] {
                self.outb(port + 1, value);
            }
        }
    }

    /// Brings a device to FEATURES_OK, accepting `features`.
    pub fn negotiate(&mut self, base: u64, features: u64) {
        self.mmio_write(base + 0x70, 0);
        self.mmio_write(base + 0x70, 1);
        self.mmio_write(base + 0x70, 3);
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.mmio_write(base + 0x24, half);
            self.mmio_write(base + 0x20, value);
        }
        self.mmio_write(base + 0x70, 0xb);
    }

    /// Sets queue `index` up; says whether it became ready.
    pub fn set_up_queue(&mut self, base: u64, index: u32, rings: Rings) -> bool {
        self.mmio_write(base + 0x30, index);
        self.mmio_write(base + 0x38, u32::from(rings.size));
        for (register, address) in [
            (0x80, rings.descriptors),
            (0x90, rings.available),
            (0xa0, rings.used),
        ] {
            self.mmio_write(base + register, address as u32);
            self.mmio_write(base + register + 4, (address >> 32) as u32);
        }
        self.mmio_write(base + 0x44, 1);
        self.mmio_read(base + 0x44) == 1
    }

    /// Brings a device to DRIVER_OK with these queues.
    pub fn start(&mut self, base: u64, queues: &[Rings]) {
        self.negotiate(base, 1 << 32);
        for (index, &rings) in queues.iter().enumerate() {
            assert!(self.set_up_queue(base, index as u32, rings));
        }
        self.mmio_write(base + 0x70, 0xf);
        assert_eq!(self.mmio_read(base + 0x70), 0xf);
    }

    pub fn notify(&mut self, base: u64, queue: u32) {
        self.mmio_write(base + 0x50, queue);
    }

    pub fn descriptor(&self, rings: Rings, index: u16, desc: (u64, u32, u16, u16)) {
        let at = rings.descriptors + 16 * u64::from(index);
        let (address, len, flags, next) = desc;
        self.ram.write_obj(at, address).unwrap();
        self.ram.write_obj(at + 8, len).unwrap();
        self.ram.write_obj(at + 12, flags).unwrap();
        self.ram.write_obj(at + 14, next).unwrap();
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&self, rings: Rings, head: u16) {
        let index: u16 = self.ram.read_obj(rings.available + 2).unwrap();
        let place = u64::from(index % rings.size);
        self.ram
            .write_obj(rings.available + 4 + 2 * place, head)
            .unwrap();
        self.ram
            .write_obj(rings.available + 2, index.wrapping_add(1))
            .unwrap();
    }

    /// Offers a chain of one buffer, described by descriptor `head`.
    pub fn offer_buffer(&self, rings: Rings, head: u16, address: u64, len: u32, flags: u16) {
        self.descriptor(rings, head, (address, len, flags, 0));
        self.offer(rings, head);
    }

    pub fn used_index(&self, rings: Rings) -> u16 {
        self.ram.read_obj(rings.used + 2).unwrap()
    }

    /// Entry `n` of the used ring: head and length.
    pub fn used(&self, rings: Rings, n: u16) -> (u32, u32) {
        let at = rings.used + 4 + 8 * u64::from(n % rings.size);
        (
            self.ram.read_obj(at).unwrap(),
            self.ram.read_obj(at + 4).unwrap(),
        )
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read(address, &mut data).unwrap();
        data
    }
}
