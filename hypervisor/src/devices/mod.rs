//! The guest's board: every device it sees (docs: the guest ABI).
//!
//! ```text
//!              guest access                    logged input
//!          read / write                      answer / apply
//!                └──────────────┬──────────────────┘
//!                               ▼
//!   platform page   8259 ◀─lines─ 8254, 16550, virtio-net, -rng, -blk   RTC, ACPI registers, time stamp
//!                    │                          │
//!                    ▼                          ▼
//!        interrupt_pending / acknowledge     outputs
//! ```
//! The models are pure: what they do is a function of guest accesses and [`Input`]s alone, in their order. None
//! reads a clock, a socket or a random source; a device that needs one says so ([`Effect::Needs`],
//! [`Effect::Halt`], [`Devices::pending`]) and is given a logged value. So two boards that saw the same
//! accesses and inputs are equal, have made the same outputs, and have equal [digests](Devices::digest).
//!
//! An input that is refused changes nothing, so the recorder may try and need not log. Whatever a driver puts
//! into its queues stays its own trouble: accesses are bounds-checked, work is bounded, and a broken queue only
//! stops its device ([`Devices::faults`]).
#![forbid(unsafe_code)]

pub mod acpi;
pub mod cmos;
mod disk;
mod pic;
mod pit;
mod place;
mod platform;
pub mod power;
mod purpose;
pub mod pvclock;
mod receiving;
mod reset;
mod saved;
mod sending;
mod serial;
pub mod tsc;
mod virtio;

use serde::{Deserialize, Serialize};

use crate::event::{Effect, GuestTime, Input, Need, Output};
use crate::memory::GuestRam;

use cmos::Cmos;
use pic::Pic;
use pit::{Access, Pit, Waiting};
use place::{IRQ_BLK, IRQ_NET, IRQ_RNG, IRQ_TIMER, Place, place};
use platform::{REGISTER_BYTES, Register};
use pvclock::{Keeping, PvClock};
use serial::Serial;
use virtio::Line;
use virtio::blk::Blk;
use virtio::mmio::Mmio;
use virtio::net::Net;
use virtio::rng::{self, Rng};

pub use pit::TickPlan;
pub use place::{CONSOLE, DISK_WINDOW, IRQ_CONSOLE, WINDOW_LEN, WINDOWS};
pub use purpose::Purpose;
pub use saved::BadDevices;
pub use virtio::blk::{BYTES_MAX as DISK_BYTES_MAX, DEPTH as DISK_DEPTH, DiskConfig, ID_BYTES};
pub use virtio::mmio::DeviceFault;
pub use virtio::net::MAX_FRAME;
pub use virtio::queue::QueueFault;
pub use virtio::rng::MAX_REQUEST;

/// What differs between boards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DevicesConfig {
    /// The network device's Ethernet address.
    pub mac: [u8; 6],
    /// The network device's MTU: the largest IP packet in bytes. A frame has 14 more.
    pub mtu: u16,
    /// The disk, if there is one.
    pub disk: Option<DiskConfig>,
    /// Wall clock (Unix time, nanoseconds) at which the guest's clock reads 0.
    pub wall_clock_ns: u64,
    /// The board is as a PC's firmware would leave it, and not as it is at power-on.
    pub firmware: bool,
}

/// The address space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bus {
    /// An I/O port.
    Port,
    /// A guest-physical address outside RAM.
    Mmio,
}

/// Why an input was refused. The devices are as they were before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The guest has no room for it now.
    #[error("the guest has room for {room} bytes of {what}, not for {len}: hold them back")]
    NoRoom {
        /// The kind of input.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// How many bytes would fit.
        room: usize,
    },
    /// No device waits for it.
    #[error(
        "no device waits for {what}: the log does not belong to this execution, or it diverged"
    )]
    Unexpected {
        /// The kind of input.
        what: &'static str,
    },
    /// Random bytes in another number than asked for.
    #[error("{expected} random bytes were asked for, {found} came")]
    WrongLength {
        /// Asked for.
        expected: usize,
        /// Came.
        found: usize,
    },
    /// Data from the disk in another number than asked for.
    #[error("{expected} bytes of the disk were asked for, {found} came")]
    WrongData {
        /// Asked for.
        expected: usize,
        /// Came.
        found: usize,
    },
}

/// The access that waits for its [`Devices::answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Awaiting {
    Register(Register),
    Timer(Waiting),
    /// The selected register of the real-time clock.
    RealTime,
    /// The power-management timer.
    PmTimer,
    TimeStamp,
    /// The clock page was placed, and is to show the time.
    ClockPage,
}

/// The state of all devices: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Board {
    pic: Pic,
    pit: Pit,
    serial: Serial,
    cmos: Cmos,
    events: acpi::Events,
    clock_page: PvClock,
    net: Mmio<Net, 2>,
    rng: Mmio<Rng, 1>,
    blk: Option<Mmio<Blk, 1>>,
    awaiting: Option<Awaiting>,
    /// HALT's latch.
    happened: bool,
}

/// The whole board, and the outputs that nobody took yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    board: Board,
    outputs: Vec<Output>,
    /// Bytes of the frames among them.
    frame_bytes: usize,
}

impl Devices {
    /// A board at power-on.
    #[must_use]
    pub fn new(config: &DevicesConfig) -> Self {
        Self {
            board: Board {
                pic: Pic::default(),
                pit: if config.firmware {
                    Pit::as_firmware_leaves_it()
                } else {
                    Pit::default()
                },
                serial: Serial::default(),
                cmos: Cmos::new(config.wall_clock_ns),
                events: acpi::Events::default(),
                clock_page: PvClock::default(),
                net: Mmio::new(Net::new(config.mac, config.mtu)),
                rng: Mmio::new(Rng::default()),
                blk: config.disk.map(|disk| Mmio::new(Blk::new(disk))),
                awaiting: None,
                happened: false,
            },
            outputs: Vec::new(),
            frame_bytes: 0,
        }
    }

    /// A guest's read of `data.len()` bytes. With [`Effect::Done`], `data` is filled. With [`Effect::Needs`] or
    /// [`Effect::Halt`], it will be by [`answer`](Self::answer), before any other access.
    ///
    /// One call is one element of a string instruction.
    pub fn read(&mut self, ram: &GuestRam, bus: Bus, addr: u64, data: &mut [u8]) -> Effect {
        debug_assert_eq!(
            self.board.awaiting, None,
            "the last access was not answered"
        );
        data.fill(0xff);
        self.go_on(ram);
        let board = &mut self.board;
        match place(bus, addr, data.len()) {
            Place::Pic(port) => data[0] = board.pic.read(port),
            Place::Pit(port) => match board.pit.read(port) {
                Access::Done(byte) => data[0] = byte,
                Access::Clock(waiting) => return self.wait(Awaiting::Timer(waiting)),
            },
            Place::Serial(register) => {
                data[0] = board.serial.read(register);
                self.update_console_line();
            }
            Place::Platform(offset) => {
                if let Some(register) = platform::register(offset, data.len()) {
                    if register == Register::Halt {
                        self.notify_all(ram);
                    }
                    return self.wait(Awaiting::Register(register));
                }
            }
            Place::Net(offset) => board.net.read(offset, data),
            Place::Rng(offset) => board.rng.read(offset, data),
            Place::Blk(offset) => {
                if let Some(blk) = &board.blk {
                    blk.read(offset, data);
                }
            }
            Place::Cmos(port) => match board.cmos.read(port) {
                Some(byte) => data[0] = byte,
                None => return self.wait(Awaiting::RealTime),
            },
            Place::Events(port) => fill(data, &board.events.read(port).to_le_bytes()),
            Place::PmTimer => return self.wait(Awaiting::PmTimer),
            Place::TimeStamp => return self.wait(Awaiting::TimeStamp),
            // PM1 control: no sleep type, nothing enabled.
            Place::Power => data.fill(0),
            Place::Reset | Place::Keyboard | Place::Nothing => {}
        }
        Effect::Done
    }

    /// A guest's write. A write that starts the 8254 needs the clock, too ([`Effect::Needs`]): it is completed by
    /// [`answer`](Self::answer) with no data, before any other access.
    ///
    /// One call is one element of a string instruction.
    pub fn write(&mut self, ram: &GuestRam, bus: Bus, addr: u64, data: &[u8]) -> Effect {
        debug_assert_eq!(
            self.board.awaiting, None,
            "the last access was not answered"
        );
        self.go_on(ram);
        let board = &mut self.board;
        match place(bus, addr, data.len()) {
            Place::Pic(port) => board.pic.write(port, data[0]),
            Place::Pit(port) => {
                if let Access::Clock(waiting) = board.pit.write(port, data[0]) {
                    return self.wait(Awaiting::Timer(waiting));
                }
            }
            Place::Serial(register) => {
                if let Some(byte) = board.serial.write(register, data[0]) {
                    self.print(byte);
                }
                self.update_console_line();
            }
            Place::Power => {
                if let Some(status) = power::power_off(data) {
                    return self.turn_off(status);
                }
            }
            Place::Reset if data[0] == acpi::RESET_VALUE => return Effect::Reset,
            Place::Keyboard if data[0] == power::PULSE_RESET => return Effect::Reset,
            Place::Cmos(port) => board.cmos.write(port, data[0]),
            Place::Events(port) => {
                if let Some(value) = data.first_chunk() {
                    board.events.write(port, u16::from_le_bytes(*value));
                }
            }
            Place::Net(offset) => {
                let made = self.outputs.len();
                let line = board.net.write(ram, offset, data, &mut self.outputs);
                board.drive(IRQ_NET, line);
                self.bound_frames(made);
            }
            Place::Rng(offset) => {
                let line = board.rng.write(ram, offset, data, &mut self.outputs);
                board.drive(IRQ_RNG, line);
            }
            Place::Blk(offset) => {
                if let Some(blk) = &mut board.blk {
                    let line = blk.write(ram, offset, data, &mut self.outputs);
                    board.drive(IRQ_BLK, line);
                }
            }
            Place::Platform(_)
            | Place::PmTimer
            | Place::TimeStamp
            | Place::Reset
            | Place::Keyboard
            | Place::Nothing => {}
        }
        Effect::Done
    }

    /// A guest's write to a model-specific register that is filtered. Those that nothing here knows are ignored.
    pub fn write_msr(&mut self, ram: &GuestRam, index: u32, value: u64) -> Effect {
        match index {
            pvclock::WALL_CLOCK => {
                pvclock::write_wall_clock(ram, value, self.board.cmos.wall_clock_ns());
            }
            pvclock::SYSTEM_TIME => {
                self.board.clock_page.place(ram, value);
                if self.shows_time() {
                    return self.wait(Awaiting::ClockPage);
                }
            }
            _ => {}
        }
        Effect::Done
    }

    /// Whether the guest reads the time from a page, which is to be [kept up to date](Self::show_time).
    #[must_use]
    pub fn shows_time(&self) -> bool {
        self.board.clock_page.is_on()
    }

    /// What time the page shows.
    #[must_use]
    pub fn shown_time(&self) -> GuestTime {
        self.board.clock_page.shown()
    }

    /// Shows the time in the guest's clock page, if it has one: at each clock value that the guest is given.
    pub fn show_time(&mut self, ram: &GuestRam, now: GuestTime, keeping: Keeping) {
        self.board.clock_page.show(ram, now, keeping);
    }

    /// The guest is off: by its power-off port, by its reset register, because it can never run again, or because its
    /// operator wants it so.
    pub fn turn_off(&mut self, status: u8) -> Effect {
        self.outputs.push(Output::PowerOff(status));
        Effect::PowerOff(status)
    }

    /// Completes the access that returned [`Effect::Needs`], with what it needs, or [`Effect::Halt`], with
    /// [`Input::Clock`]. `data` is the read's; for a write it is empty. What comes back is for RDX: a time stamp's upper half.
    ///
    /// # Errors
    /// [`DeviceError::Unexpected`] and [`DeviceError::WrongLength`]: the access still waits.
    pub fn answer(&mut self, input: &Input, data: &mut [u8]) -> Result<Option<u64>, DeviceError> {
        let board = &mut self.board;
        let mut rdx = None;
        match (board.awaiting, input) {
            (Some(Awaiting::Register(Register::Random)), Input::Random(bytes)) => {
                if bytes.len() != REGISTER_BYTES {
                    return Err(DeviceError::WrongLength {
                        expected: REGISTER_BYTES,
                        found: bytes.len(),
                    });
                }
                fill(data, bytes);
            }
            (
                Some(Awaiting::Register(register @ (Register::Halt | Register::Clock))),
                Input::Clock(now),
            ) => {
                fill(data, &now.0.to_le_bytes());
                if register == Register::Halt {
                    board.happened = false;
                }
            }
            (Some(Awaiting::Timer(waiting)), Input::Clock(now)) => {
                let byte = board.pit.answer(waiting, *now);
                fill(data, &[byte]);
            }
            (Some(Awaiting::RealTime), Input::Clock(now)) => {
                fill(data, &[board.cmos.answer(*now)]);
            }
            (Some(Awaiting::PmTimer), Input::Clock(now)) => {
                fill(data, &acpi::timer(*now).to_le_bytes());
            }
            (Some(Awaiting::TimeStamp), Input::Clock(now)) => {
                let (low, high) = tsc::halves(*now);
                fill(data, &low.to_le_bytes());
                rdx = Some(high);
            }
            (Some(Awaiting::ClockPage), Input::Clock(_)) => {}
            _ => return Err(unexpected(input)),
        }
        board.awaiting = None;
        Ok(rdx)
    }

    /// What the entropy device waits for: 1 to [`MAX_REQUEST`] random bytes, given by
    /// [`apply`](Self::apply). Then ask again: a queue of requests is answered one by one.
    #[must_use]
    pub fn pending(&self) -> Option<Need> {
        let rng = &self.board.rng;
        rng.queue(rng::REQUESTS)?;
        rng.device().waiting().map(Need::Random)
    }

    /// Applies an input that no access waits for: a tick, a frame, console bytes, or what is
    /// [`pending`](Self::pending).
    ///
    /// # Errors
    /// The input is refused and nothing has changed.
    pub fn apply(&mut self, ram: &GuestRam, input: &Input) -> Result<(), DeviceError> {
        match input {
            Input::Tick(count) => self.tick(*count),
            Input::Frame(frame) => self.receive_frame(ram, frame),
            Input::Console(bytes) => self.receive_console(bytes),
            Input::Random(bytes) => self.supply_random(ram, bytes),
            Input::Disk(done) => self.disk_done(ram, done),
            Input::Clock(_) => Err(unexpected(input)),
        }
    }

    /// Whether the guest drives its network device: frames that come before it does can be dropped.
    #[must_use]
    pub fn network_is_up(&self) -> bool {
        self.board.net.running()
    }

    /// How many console bytes can be applied now.
    #[must_use]
    pub fn console_room(&self) -> usize {
        self.board.serial.room()
    }

    /// How many bytes the guest has printed on its console, those that wait as [`outputs`](Self::outputs) included.
    #[must_use]
    pub fn printed(&self) -> u64 {
        self.board.serial.sent()
    }

    /// Whether [`outputs`](Self::outputs) would yield any.
    #[must_use]
    pub fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// Takes all outputs, in the order in which the guest made them. An exit makes at most as many frames as the
    /// transmit queue has places.
    pub fn outputs(&mut self) -> impl Iterator<Item = Output> + '_ {
        self.frame_bytes = 0;
        self.outputs.drain(..)
    }

    /// Whether the 8259 asks for an interrupt.
    #[must_use]
    pub fn interrupt_pending(&self) -> bool {
        self.board.pic.pending()
    }

    /// The CPU takes the interrupt: its vector. With none pending it is the spurious one.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        self.board.happened = true;
        self.board.pic.acknowledge()
    }

    /// Whether a line that the guest has not masked asks for an interrupt, besides the timer.
    #[must_use]
    pub fn asks_besides_timer(&self) -> bool {
        self.board.pic.asks() & !(1 << IRQ_TIMER) != 0
    }

    /// Interrupts that the devices have asked for since this was last called, a bit for each line; where KVM has the controllers.
    pub fn take_edges(&mut self) -> impl Iterator<Item = u8> + use<> {
        let edges = self.board.pic.take_edges();
        (0..16).filter(move |line| edges & 1 << line != 0)
    }

    /// HALT's latch: whether a frame, console bytes, random bytes or an interrupt reached the guest since HALT was
    /// last answered. A tick counts when its interrupt is taken.
    #[must_use]
    pub fn something_happened(&self) -> bool {
        self.board.happened
    }

    /// What channel 0 of the 8254 was programmed to do; `None` while it will not expire.
    #[must_use]
    pub fn tick_plan(&self) -> Option<TickPlan> {
        self.board.pit.tick_plan()
    }

    /// When the next [`Input::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<GuestTime> {
        self.board.pit.next_tick()
    }

    /// How many expiries are due at `now` and not applied yet: unless 0, the count of an [`Input::Tick`].
    #[must_use]
    pub fn ticks_due(&self, now: GuestTime) -> u32 {
        self.board.pit.ticks_due(now)
    }

    /// What drivers broke, by device: such a device does nothing until its driver resets it.
    pub fn faults(&self) -> impl Iterator<Item = (&'static str, DeviceFault)> {
        let net = self.board.net.fault().map(|fault| ("network", fault));
        let rng = self.board.rng.fault().map(|fault| ("entropy", fault));
        let blk = self.board.blk.as_ref().and_then(Mmio::fault);
        let blk = blk.map(|fault| ("block", fault));
        net.into_iter().chain(rng).chain(blk)
    }

    fn wait(&mut self, awaiting: Awaiting) -> Effect {
        self.board.awaiting = Some(awaiting);
        match awaiting {
            Awaiting::Register(Register::Halt) => Effect::Halt,
            Awaiting::Register(Register::Random) => Effect::Needs(Need::Random(REGISTER_BYTES)),
            Awaiting::Register(Register::Clock)
            | Awaiting::Timer(_)
            | Awaiting::RealTime
            | Awaiting::PmTimer
            | Awaiting::TimeStamp
            | Awaiting::ClockPage => Effect::Needs(Need::Clock),
        }
    }

    fn notify_all(&mut self, ram: &GuestRam) {
        let made = self.outputs.len();
        let line = self.board.net.notify_all(ram, &mut self.outputs);
        self.board.drive(IRQ_NET, line);
        self.bound_frames(made);
        let board = &mut self.board;
        let line = board.rng.notify_all(ram, &mut self.outputs);
        board.drive(IRQ_RNG, line);
        if let Some(blk) = &mut board.blk {
            let line = blk.notify_all(ram, &mut self.outputs);
            board.drive(IRQ_BLK, line);
        }
    }

    fn print(&mut self, byte: u8) {
        if let Some(Output::Console(bytes)) = self.outputs.last_mut() {
            bytes.push(byte);
        } else {
            self.outputs.push(Output::Console(vec![byte]));
        }
    }

    fn update_console_line(&mut self) {
        let level = self.board.serial.line();
        self.board.pic.set_line(IRQ_CONSOLE, level);
    }

    fn tick(&mut self, count: u32) -> Result<(), DeviceError> {
        if !self.board.pit.tick(count) {
            return Err(DeviceError::Unexpected {
                what: "a timer tick",
            });
        }
        self.board.pic.pulse(IRQ_TIMER);
        Ok(())
    }

    fn receive_console(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let room = self.console_room();
        if bytes.len() > room {
            return Err(DeviceError::NoRoom {
                what: "console input",
                len: bytes.len(),
                room,
            });
        }
        if !bytes.is_empty() {
            self.board.serial.receive(bytes);
            self.board.happened = true;
            self.update_console_line();
        }
        Ok(())
    }

    fn supply_random(&mut self, ram: &GuestRam, bytes: &[u8]) -> Result<(), DeviceError> {
        let Some(Need::Random(expected)) = self.pending() else {
            return Err(DeviceError::Unexpected {
                what: "random bytes",
            });
        };
        if bytes.len() != expected {
            return Err(DeviceError::WrongLength {
                expected,
                found: bytes.len(),
            });
        }
        let board = &mut self.board;
        let line = board.rng.work(rng::REQUESTS, |device, queue| {
            device.supply(queue, ram, bytes)
        });
        board.drive(IRQ_RNG, line);
        board.happened = true;
        Ok(())
    }
}

impl Board {
    fn drive(&mut self, irq: u8, line: Line) {
        match line {
            Line::Same => {}
            Line::Raise => self.pic.pulse(irq),
            Line::Lower => self.pic.set_line(irq, false),
        }
    }
}

fn unexpected(input: &Input) -> DeviceError {
    let what = match input {
        Input::Clock(_) => "the clock",
        Input::Random(_) => "random bytes",
        Input::Tick(_) => "a timer tick",
        Input::Frame(_) => "a frame",
        Input::Console(_) => "console input",
        Input::Disk(_) => "what came of a disk request",
    };
    DeviceError::Unexpected { what }
}

/// Copies as far as both reach.
fn fill(data: &mut [u8], value: &[u8]) {
    data.iter_mut()
        .zip(value)
        .for_each(|(byte, value)| *byte = *value);
}

#[cfg(test)]
mod tests;
