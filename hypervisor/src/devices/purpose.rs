//! What a guest turns to the board for, as people count it.
#![forbid(unsafe_code)]

use super::Bus;
use super::place::{Place, place};

/// What an exit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Purpose {
    /// The time: the power-management timer and the real-time clock.
    Time,
    /// A prepared kernel's time stamp.
    TimeStamp,
    /// The 8254.
    Timer,
    /// The 8259s.
    Interrupts,
    /// The 16550.
    Console,
    /// The network device.
    Network,
    /// The entropy device.
    Entropy,
    /// The disk.
    Disk,
    /// A wait for whatever comes: HLT.
    Halt,
    /// A model-specific register.
    Register,
    /// The platform's registers and ACPI's, keyboard, power.
    Board,
    /// Nothing is there: a probe.
    Nothing,
}

impl Purpose {
    /// All of them, by number.
    pub const ALL: [Self; 12] = [
        Self::Time,
        Self::TimeStamp,
        Self::Timer,
        Self::Interrupts,
        Self::Console,
        Self::Network,
        Self::Entropy,
        Self::Disk,
        Self::Halt,
        Self::Register,
        Self::Board,
        Self::Nothing,
    ];

    /// What it is called where it is told.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::TimeStamp => "time_stamp",
            Self::Timer => "timer",
            Self::Interrupts => "interrupts",
            Self::Console => "console",
            Self::Network => "network",
            Self::Entropy => "entropy",
            Self::Disk => "disk",
            Self::Halt => "halt",
            Self::Register => "register",
            Self::Board => "board",
            Self::Nothing => "nothing",
        }
    }

    /// That of an access of `len` bytes.
    #[must_use]
    pub fn of(bus: Bus, address: u64, len: usize) -> Self {
        match place(bus, address, len) {
            Place::PmTimer | Place::Cmos(_) => Self::Time,
            Place::TimeStamp => Self::TimeStamp,
            Place::Pit(_) => Self::Timer,
            Place::Pic(_) => Self::Interrupts,
            Place::Serial(_) => Self::Console,
            Place::Net(_) => Self::Network,
            Place::Rng(_) => Self::Entropy,
            Place::Blk(_) => Self::Disk,
            Place::Events(_)
            | Place::Power
            | Place::Reset
            | Place::Keyboard
            | Place::Platform(_) => Self::Board,
            Place::Nothing => Self::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stands_at_its_number() {
        for (number, purpose) in Purpose::ALL.into_iter().enumerate() {
            assert_eq!(purpose as usize, number);
        }
    }

    #[test]
    fn the_clock_of_a_linux_guest_is_told_from_its_timer() {
        let port = |port, len| Purpose::of(Bus::Port, port, len);
        assert_eq!(port(u64::from(super::super::acpi::TIMER), 4), Purpose::Time);
        assert_eq!(port(0x40, 1), Purpose::Timer);
        assert_eq!(
            port(u64::from(super::super::tsc::PORT), 4),
            Purpose::TimeStamp
        );
        assert_eq!(port(0xcf8, 4), Purpose::Nothing);
    }
}
