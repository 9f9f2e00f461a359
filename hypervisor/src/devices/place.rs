//! Where everything is: addresses, ports, interrupt lines.
#![forbid(unsafe_code)]

use super::virtio::mmio;
use super::{Bus, acpi, cmos, pit, platform, power, tsc};

/// The windows of the virtio devices, by what they are and the interrupt they raise: what a firmware's table says of them.
pub const WINDOWS: [(&str, u64, u8); 2] =
    [("NET0", NET_BASE, IRQ_NET), ("RNG0", RNG_BASE, IRQ_RNG)];
/// That of the disk, if there is one.
pub const DISK_WINDOW: (&str, u64, u8) = ("BLK0", BLK_BASE, IRQ_BLK);
/// Bytes of each.
pub const WINDOW_LEN: u64 = mmio::LEN;

const NET_BASE: u64 = platform::BASE + platform::LEN;
const RNG_BASE: u64 = NET_BASE + mmio::LEN;
const BLK_BASE: u64 = RNG_BASE + mmio::LEN;

pub(super) const IRQ_TIMER: u8 = 0;
/// The console's interrupt.
pub const IRQ_CONSOLE: u8 = 4;
pub(super) const IRQ_NET: u8 = 5;
pub(super) const IRQ_RNG: u8 = 6;
/// Not 7, which is that of spurious interrupts.
pub(super) const IRQ_BLK: u8 = 10;

/// The first port of the console.
pub const CONSOLE: u16 = 0x3f8;

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Pic(u16),
    Pit(u16),
    Serial(u16),
    Cmos(u16),
    Events(u16),
    PmTimer,
    TimeStamp,
    Power,
    Reset,
    Keyboard,
    Platform(u64),
    Net(u64),
    Rng(u64),
    Blk(u64),
    Nothing,
}

/// What an access of `len` bytes at `addr` reaches. Each port has its width; an access of another, as one past a window's end,
/// reaches nothing.
pub(super) fn place(bus: Bus, addr: u64, len: usize) -> Place {
    match (bus, u16::try_from(addr)) {
        (Bus::Port, Ok(power::PORT)) => Place::Power,
        (Bus::Port, Ok(port)) if len == 1 => match port {
            0x20 | 0x21 | 0xa0 | 0xa1 => Place::Pic(port),
            0x40..=0x43 | pit::PORT_B => Place::Pit(port),
            CONSOLE..=0x3ff => Place::Serial(port - CONSOLE),
            cmos::INDEX | cmos::DATA => Place::Cmos(port),
            acpi::RESET => Place::Reset,
            power::KEYBOARD => Place::Keyboard,
            _ => Place::Nothing,
        },
        (Bus::Port, Ok(port)) => match (port, len) {
            (acpi::EVENTS | acpi::ENABLE, 2) => Place::Events(port),
            (acpi::TIMER, 4) => Place::PmTimer,
            (tsc::PORT, 4) => Place::TimeStamp,
            _ => Place::Nothing,
        },
        (Bus::Port, _) => Place::Nothing,
        (Bus::Mmio, _) => window(addr),
    }
}

fn window(addr: u64) -> Place {
    const NET_END: u64 = NET_BASE + mmio::LEN;
    const RNG_END: u64 = RNG_BASE + mmio::LEN;
    const BLK_END: u64 = BLK_BASE + mmio::LEN;
    match addr {
        platform::BASE..NET_BASE => Place::Platform(addr - platform::BASE),
        NET_BASE..NET_END => Place::Net(addr - NET_BASE),
        RNG_BASE..RNG_END => Place::Rng(addr - RNG_BASE),
        BLK_BASE..BLK_END => Place::Blk(addr - BLK_BASE),
        _ => Place::Nothing,
    }
}
