//! The 8254 timer (Intel 8254 data sheet, 231164-005) and port 0x61, which gates and shows its channel 2.
//!
//! A model has no clock. Whatever depends on the time (loading a count, reading or latching one) asks for it:
//! the access returns [`Access::Clock`] and [`Pit::answer`] completes it with a logged value. Channel 0's
//! expiries come from outside too, as [`Input::Tick`](crate::event::Input::Tick): the recorder asks
//! [`Pit::next_tick`] when the next one is due.
//!
//! ```text
//! channel:  Idle ──count written──▶ Running{since} ◀──gate──▶ Held{clocks}
//!             ▲                          │
//!             └──────control word────────┘
//! ```
//! Simplified against the chip: counting begins at the write and not at the next clock pulse (838 ns); a count
//! written while a channel runs starts it anew at once, also in modes 2 and 3.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::GuestTime;

/// The input frequency in Hz.
const HZ: u128 = 1_193_182;
const NS: u128 = 1_000_000_000;

/// The refresh toggle that port 0x61 shows changes after so many nanoseconds (channel 1 at its usual 18 clocks).
const REFRESH_NS: u64 = 15_085;

const PORT_CONTROL: u16 = 0x43;
/// "System control port B".
pub const PORT_B: u16 = 0x61;

/// Whether an access is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Access {
    /// Complete; for a read, with this byte.
    Done(u8),
    /// It needs the clock: [`Pit::answer`].
    Clock(Waiting),
}

/// What an access that waits for the clock will do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Waiting {
    /// Read the next byte of a channel's count.
    Read(u8),
    /// Start a channel with the count just written.
    Load(u8),
    /// Latch the count, the status, or both, of the channels whose bits are set.
    Latch {
        /// Channels to latch the count of.
        counts: u8,
        /// Channels to latch the status of.
        statuses: u8,
    },
    /// Change the gate of channel 2.
    Gate(bool),
    /// Read port 0x61.
    PortB,
}

/// When channel 0 expires. A recorder needs only [`Devices::next_tick`](super::Devices::next_tick) and
/// [`Devices::ticks_due`](super::Devices::ticks_due), which do the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TickPlan {
    /// Grows by one each time the guest programs the channel; a new one means: forget the old plan.
    pub generation: u64,
    /// When the count was loaded.
    pub loaded: GuestTime,
    /// From then to the first expiry, in nanoseconds (rounded up).
    pub first_ns: u64,
    /// Between expiries, in nanoseconds, rounded up (so adding it up drifts); `None`: it expires once.
    pub period_ns: Option<u64>,
}

/// How a channel's count is read and written (the control word's RW bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Bytes {
    #[default]
    Low,
    High,
    Both,
}

/// What a channel's counter is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Counting {
    /// It waits for a count, or, in modes 1 and 5, for its gate to rise.
    #[default]
    Idle,
    Running {
        since: GuestTime,
    },
    /// Its gate is low, so many clocks after the start.
    Held {
        clocks: u64,
    },
}

/// One channel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Channel {
    mode: u8,
    bcd: bool,
    bytes: Bytes,
    /// The count as it was written; 0 stands for the largest.
    reload: u16,
    /// The low byte of a two-byte write whose high byte has not come.
    half: Option<u8>,
    /// The next read of a two-byte count is its high byte.
    high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// A count was written since the control word.
    loaded: bool,
    gate: bool,
    counting: Counting,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            gate,
            ..Self::default()
        }
    }

    /// The count in clocks.
    fn period(&self) -> u64 {
        match (self.reload, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (count, false) => u64::from(count),
            (count, true) => (0..4).rev().fold(0, |sum, digit| {
                sum * 10 + u64::from(count >> (4 * digit) & 15)
            }),
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Whether only a rising gate starts it.
    fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn control(&mut self, value: u8) {
        *self = Self {
            mode: match value >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            bcd: value & 1 != 0,
            bytes: match value >> 4 & 3 {
                1 => Bytes::Low,
                2 => Bytes::High,
                _ => Bytes::Both,
            },
            gate: self.gate,
            ..Self::default()
        };
    }

    /// Takes a byte of a count; true when the count is whole.
    fn write(&mut self, value: u8) -> bool {
        let value16 = u16::from(value);
        self.reload = match (self.bytes, self.half.take()) {
            (Bytes::Low, _) => value16,
            (Bytes::High, _) => value16 << 8,
            (Bytes::Both, Some(low)) => value16 << 8 | u16::from(low),
            (Bytes::Both, None) => {
                self.half = Some(value);
                if self.mode == 0 {
                    // "Writing the first byte disables counting. OUT is set low immediately."
                    self.counting = Counting::Idle;
                    self.loaded = false;
                }
                return false;
            }
        };
        true
    }

    fn load(&mut self, now: GuestTime) {
        self.loaded = true;
        if self.triggered() {
            return;
        }
        self.counting = if self.gate {
            Counting::Running { since: now }
        } else {
            Counting::Held { clocks: 0 }
        };
    }

    fn set_gate(&mut self, gate: bool, now: GuestTime) {
        let rising = gate && !self.gate;
        self.gate = gate;
        if !self.loaded {
            return;
        }
        if self.triggered() {
            if rising {
                self.counting = Counting::Running { since: now };
            }
            return;
        }
        self.counting = match self.counting {
            Counting::Running { .. } if !gate => Counting::Held {
                clocks: self.elapsed(now).unwrap_or(0),
            },
            // A rising gate starts modes 2 and 3 anew; modes 0 and 4 go on where they were.
            Counting::Held { .. } if gate && self.periodic() => Counting::Running { since: now },
            Counting::Held { clocks } if gate => Counting::Running {
                since: GuestTime(now.0.saturating_sub(nanoseconds(clocks))),
            },
            other => other,
        };
    }

    /// Clocks since the count was loaded; `None` while there is none.
    fn elapsed(&self, now: GuestTime) -> Option<u64> {
        match self.counting {
            Counting::Idle => None,
            Counting::Running { since } => Some(clocks(now.0.saturating_sub(since.0))),
            Counting::Held { clocks } => Some(clocks),
        }
    }

    /// The counting element as a read shows it.
    fn count(&self, now: GuestTime) -> u16 {
        let period = self.period();
        let largest = if self.bcd { 10_000 } else { 0x1_0000 };
        let elapsed = self.elapsed(now).unwrap_or(0);
        let count = match self.mode {
            2 => period - elapsed % period,
            // Counts by twos, twice a period.
            3 => period - (2 * (elapsed % period)) % period,
            _ => (period + largest - elapsed % largest) % largest,
        } % largest;
        if self.bcd {
            [1000, 100, 10, 1]
                .iter()
                .fold(0, |sum, place| sum << 4 | (count / place % 10) as u16)
        } else {
            count as u16
        }
    }

    /// The output pin.
    fn out(&self, now: GuestTime) -> bool {
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != 0;
        };
        let period = self.period();
        match self.mode {
            0 | 1 => elapsed >= period,
            // A low gate sets it high.
            2 => !self.gate || elapsed % period != period - 1,
            3 => !self.gate || elapsed % period < period.div_ceil(2),
            _ => elapsed != period,
        }
    }

    fn status(&self, now: GuestTime) -> u8 {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        u8::from(self.out(now)) << 7
            | u8::from(!self.loaded) << 6
            | bytes << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    /// The next byte of `count`, by the bytes the control word chose.
    fn byte_of(&mut self, count: u16) -> (u8, bool) {
        let [low, high] = count.to_le_bytes();
        match self.bytes {
            Bytes::Low => (low, true),
            Bytes::High => (high, true),
            Bytes::Both => {
                self.high_next = !self.high_next;
                if self.high_next {
                    (low, false)
                } else {
                    (high, true)
                }
            }
        }
    }

    /// A byte that was latched, status first.
    fn read_latched(&mut self) -> Option<u8> {
        if let Some(status) = self.latched_status.take() {
            return Some(status);
        }
        let count = self.latched_count?;
        let (byte, last) = self.byte_of(count);
        if last {
            self.latched_count = None;
        }
        Some(byte)
    }
}

/// The three channels, and port 0x61.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    /// Port 0x61, bit 1: the speaker would hear channel 2.
    speaker: bool,
    /// How often channel 0 was programmed.
    generation: u64,
    /// Expiries of channel 0 applied since it was loaded.
    ticks: u64,
}

impl Default for Pit {
    fn default() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            speaker: false,
            generation: 0,
            ticks: 0,
        }
    }
}

impl Pit {
    /// As a PC's firmware leaves it: channel 0 counts the largest count over and over, 18.2 times a second. Linux reads it before it
    /// sets it, and would wait for ever for a count that was never loaded.
    #[must_use]
    pub fn as_firmware_leaves_it() -> Self {
        let mut pit = Self::default();
        pit.channels[0].control(0x36);
        pit.channels[0].load(GuestTime(0));
        pit
    }

    /// Whether an 8254 can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.channels.iter().all(|channel| channel.mode <= 5)
    }

    /// A guest's read of `port` (0x40 to 0x43, or 0x61).
    pub fn read(&mut self, port: u16) -> Access {
        match port {
            PORT_B => Access::Clock(Waiting::PortB),
            PORT_CONTROL => Access::Done(0xff),
            _ => {
                let channel = (port & 3) as u8;
                match self.channels[usize::from(channel)].read_latched() {
                    Some(byte) => Access::Done(byte),
                    None => Access::Clock(Waiting::Read(channel)),
                }
            }
        }
    }

    /// A guest's write to `port` (0x40 to 0x43, or 0x61).
    pub fn write(&mut self, port: u16, value: u8) -> Access {
        match port {
            PORT_B => {
                self.speaker = value & 2 != 0;
                let gate = value & 1 != 0;
                if gate == self.channels[2].gate {
                    Access::Done(0)
                } else {
                    Access::Clock(Waiting::Gate(gate))
                }
            }
            PORT_CONTROL => self.control(value),
            _ => {
                let channel = (port & 3) as u8;
                if self.channels[usize::from(channel)].write(value) {
                    Access::Clock(Waiting::Load(channel))
                } else {
                    Access::Done(0)
                }
            }
        }
    }

    /// Completes an access that needed the clock; for a read, with the byte that it yields.
    pub fn answer(&mut self, waiting: Waiting, now: GuestTime) -> u8 {
        match waiting {
            Waiting::Read(channel) => {
                let channel = &mut self.channels[usize::from(channel)];
                let count = channel.count(now);
                channel.byte_of(count).0
            }
            Waiting::Load(channel) => {
                self.channels[usize::from(channel)].load(now);
                if channel == 0 {
                    self.replan();
                }
                0
            }
            Waiting::Latch { counts, statuses } => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if counts & 1 << index != 0 && channel.latched_count.is_none() {
                        channel.latched_count = Some(channel.count(now));
                    }
                    if statuses & 1 << index != 0 && channel.latched_status.is_none() {
                        channel.latched_status = Some(channel.status(now));
                    }
                }
                0
            }
            Waiting::Gate(gate) => {
                self.channels[2].set_gate(gate, now);
                0
            }
            Waiting::PortB => {
                let channel = &self.channels[2];
                let refresh = !(now.0 / REFRESH_NS).is_multiple_of(2);
                u8::from(channel.gate)
                    | u8::from(self.speaker) << 1
                    | u8::from(refresh) << 4
                    | u8::from(channel.out(now)) << 5
            }
        }
    }

    /// Channel 0's plan; `None` while it will not expire (again).
    #[must_use]
    pub fn tick_plan(&self) -> Option<TickPlan> {
        let (channel, loaded) = self.ticking()?;
        let period = nanoseconds(channel.period());
        Some(TickPlan {
            generation: self.generation,
            loaded,
            first_ns: period,
            period_ns: channel.periodic().then_some(period),
        })
    }

    /// When the next tick is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<GuestTime> {
        let (channel, loaded) = self.ticking()?;
        let clocks = channel.period().saturating_mul(self.ticks + 1);
        Some(GuestTime(loaded.0.saturating_add(nanoseconds(clocks))))
    }

    /// How many ticks are due at `now` and were not applied yet.
    #[must_use]
    pub fn ticks_due(&self, now: GuestTime) -> u32 {
        let Some((channel, loaded)) = self.ticking() else {
            return 0;
        };
        let expiries = clocks(now.0.saturating_sub(loaded.0)) / channel.period();
        let expiries = if channel.periodic() {
            expiries
        } else {
            expiries.min(1)
        };
        u32::try_from(expiries.saturating_sub(self.ticks)).unwrap_or(u32::MAX)
    }

    /// Takes note of `count` expiries of channel 0; false, and nothing changed, when it cannot have expired so often.
    #[must_use]
    pub fn tick(&mut self, count: u32) -> bool {
        let Some((channel, _)) = self.ticking() else {
            return false;
        };
        if count == 0 || (!channel.periodic() && count != 1) {
            return false;
        }
        self.ticks += u64::from(count);
        true
    }

    /// Channel 0 and when it was loaded, while it has an expiry to come.
    fn ticking(&self) -> Option<(&Channel, GuestTime)> {
        let channel = &self.channels[0];
        match channel.counting {
            Counting::Running { since } if channel.periodic() || self.ticks == 0 => {
                Some((channel, since))
            }
            _ => None,
        }
    }

    fn control(&mut self, value: u8) -> Access {
        let channel = value >> 6;
        if channel == 3 {
            // Read-back: the bits are low-active.
            let channels = value >> 1 & 7;
            let counts = if value & 0x20 == 0 { channels } else { 0 };
            let statuses = if value & 0x10 == 0 { channels } else { 0 };
            return Access::Clock(Waiting::Latch { counts, statuses });
        }
        if value & 0x30 == 0 {
            return Access::Clock(Waiting::Latch {
                counts: 1 << channel,
                statuses: 0,
            });
        }
        self.channels[usize::from(channel)].control(value);
        if channel == 0 {
            self.replan();
        }
        Access::Done(0)
    }

    fn replan(&mut self) {
        self.generation += 1;
        self.ticks = 0;
    }
}

/// Whole clocks in `ns`.
fn clocks(ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * HZ / NS).unwrap_or(u64::MAX)
}

/// The nanoseconds after which `clocks` have passed.
fn nanoseconds(clocks: u64) -> u64 {
    u64::try_from((u128::from(clocks) * NS).div_ceil(HZ)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
