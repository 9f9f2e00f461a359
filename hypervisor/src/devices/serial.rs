//! The console: a 16550A UART (National Semiconductor PC16550D data sheet).
//!
//! It is our own and not vm-superio's, whose state can neither be compared nor hashed, and whose interrupt is a
//! trigger where the 8259 wants a line. Time does not pass on the wire: a byte is sent at once, the transmitter
//! is always empty, and no receive timeout is needed. The receiver holds [`FIFO_BYTES`] bytes; the host does not
//! give more than [`Serial::room`], so only loopback can overrun it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Received bytes that wait for the guest: the depth of a 16750's FIFO.
pub const FIFO_BYTES: usize = 64;

const DATA: u16 = 0;
const IER: u16 = 1;
const IIR_FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

const IER_RECEIVED: u8 = 0x01;
const IER_EMPTY: u8 = 0x02;
const IER_LINE: u8 = 0x04;
const IER_BITS: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;

const LCR_DIVISOR: u8 = 0x80;

const MCR_LOOP: u8 = 0x10;
const MCR_BITS: u8 = 0x1f;

const LSR_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// Carrier, data set ready and clear to send: somebody listens.
const MSR_CONNECTED: u8 = 0xb0;

/// The UART.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Serial {
    received: VecDeque<u8>,
    overrun: bool,
    /// The transmitter became empty and the guest has not been told (by IIR) yet.
    empty_unseen: bool,
    fifo: bool,
    divisor: u16,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// Bytes that went out since the machine was made.
    sent: u64,
}

impl Serial {
    /// One at power-on, after so many bytes had gone out.
    #[must_use]
    pub fn after(sent: u64) -> Self {
        Self {
            sent,
            ..Self::default()
        }
    }

    /// Bytes that went out on the wire since the machine was made.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether a 16550 can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.received.len() <= FIFO_BYTES
    }

    /// A guest's read of `register` (0 to 7).
    pub fn read(&mut self, register: u16) -> u8 {
        match register {
            DATA if self.divisor_open() => self.divisor as u8,
            IER if self.divisor_open() => (self.divisor >> 8) as u8,
            DATA => self.received.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR_FCR => {
                let cause = self.cause();
                if cause == IIR_EMPTY {
                    self.empty_unseen = false;
                }
                cause | if self.fifo { IIR_FIFO } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => {
                let overrun = std::mem::take(&mut self.overrun);
                LSR_TRANSMITTER_EMPTY
                    | if self.received.is_empty() {
                        0
                    } else {
                        LSR_READY
                    }
                    | if overrun { LSR_OVERRUN } else { 0 }
            }
            MSR if self.looped() => {
                // DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
                (self.mcr & 0x01) << 5 | (self.mcr & 0x02) << 3 | (self.mcr & 0x0c) << 4
            }
            MSR => MSR_CONNECTED,
            SCR => self.scr,
            _ => 0xff,
        }
    }

    /// A guest's write to `register` (0 to 7). A byte that goes out on the wire is returned.
    #[must_use]
    pub fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        match register {
            DATA if self.divisor_open() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            IER if self.divisor_open() => {
                self.divisor = self.divisor & 0xff | u16::from(value) << 8;
            }
            DATA => {
                self.empty_unseen = true;
                if !self.looped() {
                    self.sent += 1;
                    return Some(value);
                }
                if self.room() == 0 {
                    self.overrun = true;
                } else {
                    self.received.push_back(value);
                }
            }
            IER => {
                let value = value & IER_BITS;
                // The transmitter is empty already: enabling its interrupt raises it.
                if value & !self.ier & IER_EMPTY != 0 {
                    self.empty_unseen = true;
                }
                self.ier = value;
            }
            IIR_FCR => {
                let fifo = value & FCR_ENABLE != 0;
                if fifo != self.fifo || value & FCR_CLEAR_RECEIVER != 0 {
                    self.received.clear();
                }
                self.fifo = fifo;
            }
            LCR => self.lcr = value,
            MCR => self.mcr = value & MCR_BITS,
            SCR => self.scr = value,
            _ => {}
        }
        None
    }

    /// The level of the interrupt line.
    #[must_use]
    pub fn line(&self) -> bool {
        self.cause() != IIR_NONE
    }

    /// How many more bytes the receiver takes.
    #[must_use]
    pub fn room(&self) -> usize {
        FIFO_BYTES.saturating_sub(self.received.len())
    }

    /// Bytes arrive; no more than there is [`room`](Self::room) for are taken.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.received.extend(bytes.iter().take(self.room()));
    }

    /// The cause of highest priority, as IIR shows it.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            IIR_RECEIVED
        } else if self.ier & IER_EMPTY != 0 && self.empty_unseen {
            IIR_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn divisor_open(&self) -> bool {
        self.lcr & LCR_DIVISOR != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_come_in() {
        let mut uart = Serial::default();
        assert_eq!(uart.read(LSR), 0x60);
        assert_eq!(uart.write(DATA, b'x'), Some(b'x'));
        uart.receive(b"ab");
        assert_eq!(uart.read(LSR), 0x61);
        assert_eq!(uart.read(DATA), b'a');
        assert_eq!(uart.read(DATA), b'b');
        assert_eq!(uart.read(LSR), 0x60);
        assert_eq!(uart.read(DATA), 0);
    }

    #[test]
    fn the_divisor_hides_behind_its_latch() {
        let mut uart = Serial::default();
        assert_eq!(uart.write(LCR, 0x83), None);
        assert_eq!(uart.write(DATA, 0x0c), None);
        assert_eq!(uart.write(IER, 0x01), None);
        assert_eq!((uart.read(DATA), uart.read(IER)), (0x0c, 0x01));
        assert_eq!(uart.write(LCR, 0x03), None);
        assert_eq!(uart.read(IER), 0);
        assert_eq!(uart.write(DATA, 7), Some(7));
    }

    #[test]
    fn causes_have_priorities_and_the_line_follows() {
        let mut uart = Serial::default();
        assert_eq!(uart.read(IIR_FCR), IIR_NONE);
        let _ = uart.write(IER, 0xff);
        assert_eq!(uart.read(IER), 0x0f);
        uart.receive(b"z");
        assert!(uart.line());
        assert_eq!(uart.read(IIR_FCR), IIR_RECEIVED);
        assert_eq!(uart.read(IIR_FCR), IIR_RECEIVED, "until the byte is read");
        uart.read(DATA);
        assert_eq!(uart.read(IIR_FCR), IIR_EMPTY);
        assert!(!uart.line(), "reading IIR takes it back");
        let _ = uart.write(DATA, b'!');
        assert!(uart.line());
        let _ = uart.write(IER, 0);
        assert!(!uart.line());
        let _ = uart.write(IER, IER_EMPTY);
        assert!(uart.line(), "enabling raises it again");
    }

    #[test]
    fn loopback_overruns_and_reports_it() {
        let mut uart = Serial::default();
        let _ = uart.write(MCR, MCR_LOOP | 0x0b);
        assert_eq!(uart.read(MSR), 0xb0, "DTR, RTS and OUT2 come back");
        for byte in 0..=FIFO_BYTES as u8 {
            assert_eq!(uart.write(DATA, byte), None, "nothing leaves");
        }
        let _ = uart.write(IER, IER_LINE);
        assert_eq!(uart.read(IIR_FCR), IIR_LINE);
        assert_eq!(uart.read(LSR), 0x63);
        assert_eq!(uart.read(LSR), 0x61, "reading clears the overrun");
        assert_eq!(uart.read(DATA), 0);
    }

    #[test]
    fn the_fifo_control_register() {
        let mut uart = Serial::default();
        uart.receive(&[1; 100]);
        assert_eq!((uart.room(), uart.received.len()), (0, FIFO_BYTES));
        let _ = uart.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(uart.room(), FIFO_BYTES);
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_NONE);
        let _ = uart.write(SCR, 0x5a);
        assert_eq!((uart.read(SCR), uart.read(9)), (0x5a, 0xff));
    }
}
