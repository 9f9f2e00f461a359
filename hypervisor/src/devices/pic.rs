//! The pair of 8259A interrupt controllers (Intel 8259A data sheet, 231468-003).
//!
//! ```text
//! lines 0-7 ──▶ master ──▶ CPU          ports 0x20, 0x21
//!                 ▲ IR2
//! lines 8-15 ─▶ slave                   ports 0xa0, 0xa1
//!
//! each chip:  power-on ─ICW1─▶ ICW2 ─▶ [ICW3] ─▶ [ICW4] ─▶ ready    (ICW1 starts again from anywhere)
//! ```
//! Requests are edge-triggered: a line's rising edge sets its request, which stays until it is acknowledged
//! or the line falls. The slave's output into IR2 is taken as a level, so that no request of the slave is
//! lost between two acknowledges. The interrupt acknowledge cycle is one step here, which leaves a spurious
//! interrupt (7 of a chip) one cause: a request that was gone when the CPU asked for its vector.
//! ICW1's level-triggered mode (LTIM) and 8080 vectors are not there; PCs never used them.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// The line of the master that the slave is wired to.
const CASCADE: u8 = 2;

const ICW1_INIT: u8 = 0x10;
const ICW1_SINGLE: u8 = 0x02;
const ICW1_ICW4: u8 = 0x01;
const ICW4_AUTO_EOI: u8 = 0x02;
const ICW4_FULLY_NESTED: u8 = 0x10;
const OCW3: u8 = 0x08;
const OCW3_POLL: u8 = 0x04;

/// Where a chip is in its initialisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Init {
    /// Since power-on: no ICW1 yet, no interrupts.
    #[default]
    PowerOn,
    Icw2,
    Icw3,
    Icw4,
    Ready,
}

/// One chip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Chip {
    init: Init,
    /// From ICW1: no ICW3 will come.
    single: bool,
    /// From ICW1: an ICW4 will come.
    wants_icw4: bool,
    /// The input lines' levels.
    lines: u8,
    /// The interrupt request register.
    irr: u8,
    /// The in-service register.
    isr: u8,
    /// The interrupt mask register (OCW1).
    imr: u8,
    /// The vector of line 0 (ICW2).
    base: u8,
    /// The line of highest priority.
    highest: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    /// OCW3 chose the ISR, not the IRR, for reads.
    read_isr: bool,
    /// OCW3 asked for a poll: the next read is an acknowledge.
    poll: bool,
    /// This chip's line from another chip (the master's IR2): taken as a level.
    cascade: Option<u8>,
}

impl Chip {
    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        if level {
            if self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            self.irr &= !bit;
        }
    }

    fn requests(&self) -> u8 {
        let cascade = self.cascade.map_or(0, |line| 1 << line);
        (self.irr & !cascade) | (self.lines & cascade)
    }

    /// The line of the highest priority in `set`, and its rank (0 is the highest).
    fn first(&self, set: u8) -> Option<(u8, u8)> {
        (0..8)
            .map(|rank| (rank, (self.highest + rank) & 7))
            .find(|(_, line)| set & (1 << line) != 0)
    }

    /// The line that deserves an interrupt now.
    fn winner(&self) -> Option<u8> {
        if self.init != Init::Ready {
            return None;
        }
        let (rank, line) = self.first(self.requests() & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if let (true, Some(cascade)) = (self.fully_nested, self.cascade) {
            serving &= !(1 << cascade);
        }
        match self.first(serving) {
            Some((busy, _)) if busy <= rank => None,
            _ => Some(line),
        }
    }

    /// Takes the winner into service.
    fn serve(&mut self, line: u8) {
        self.irr &= !(1 << line);
        if !self.auto_eoi {
            self.isr |= 1 << line;
        } else if self.rotate_on_auto_eoi {
            self.highest = (line + 1) & 7;
        }
    }

    fn vector(&self, line: u8) -> u8 {
        self.base | line
    }

    fn end_of_interrupt(&mut self, line: Option<u8>, rotate: bool) {
        // Unspecific: the highest in service; one that special mask mode hides is left alone.
        let hidden = if self.special_mask { self.imr } else { 0 };
        let line = line.or_else(|| self.first(self.isr & !hidden).map(|(_, line)| line));
        if let Some(line) = line {
            self.isr &= !(1 << line);
            if rotate {
                self.highest = (line + 1) & 7;
            }
        }
    }

    fn command(&mut self, value: u8) {
        if value & ICW1_INIT != 0 {
            *self = Self {
                init: Init::Icw2,
                single: value & ICW1_SINGLE != 0,
                wants_icw4: value & ICW1_ICW4 != 0,
                // The edge sense is reset: a line that is high must fall before it can ask again.
                lines: self.lines,
                cascade: self.cascade,
                ..Self::default()
            };
        } else if value & OCW3 != 0 {
            self.poll = value & OCW3_POLL != 0;
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            match value >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            let line = value & 7;
            match value >> 5 {
                0 => self.rotate_on_auto_eoi = false,
                1 => self.end_of_interrupt(None, false),
                3 => self.end_of_interrupt(Some(line), false),
                4 => self.rotate_on_auto_eoi = true,
                5 => self.end_of_interrupt(None, true),
                6 => self.highest = (line + 1) & 7,
                7 => self.end_of_interrupt(Some(line), true),
                _ => {}
            }
        }
    }

    fn data(&mut self, value: u8) {
        self.init = match self.init {
            Init::PowerOn | Init::Ready => {
                self.imr = value;
                return;
            }
            Init::Icw2 => {
                self.base = value & 0xf8;
                if !self.single {
                    Init::Icw3
                } else if self.wants_icw4 {
                    Init::Icw4
                } else {
                    Init::Ready
                }
            }
            // The wiring is what it is, whatever ICW3 says.
            Init::Icw3 if self.wants_icw4 => Init::Icw4,
            Init::Icw3 => Init::Ready,
            Init::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.fully_nested = value & ICW4_FULLY_NESTED != 0;
                Init::Ready
            }
        };
    }

    fn register(&self, data_port: bool) -> u8 {
        if data_port {
            self.imr
        } else if self.read_isr {
            self.isr
        } else {
            self.requests()
        }
    }
}

/// Both chips: sixteen lines in, one interrupt out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Default for Pic {
    fn default() -> Self {
        Self {
            master: Chip {
                cascade: Some(CASCADE),
                ..Chip::default()
            },
            slave: Chip::default(),
        }
    }
}

impl Pic {
    /// Whether two 8259s wired as ours can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let wired = (self.master.cascade, self.slave.cascade) == (Some(CASCADE), None);
        wired && self.master.highest < 8 && self.slave.highest < 8
    }

    /// Sets the level of line `irq` (0 to 15; 2 is the slave's and ignored, as are larger numbers).
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..=7 => self.master.set_line(irq, level),
            8..=15 => self.slave.set_line(irq - 8, level),
            _ => {}
        }
        self.join();
    }

    /// Makes a fresh rising edge on line `irq`, whatever its level was, and leaves it high.
    pub fn pulse(&mut self, irq: u8) {
        self.set_line(irq, false);
        self.set_line(irq, true);
    }

    /// Lines that have risen since this was last asked, a bit each, and are not asked for any more: for a machine whose interrupts
    /// another controller takes, and whose guest never sees this one.
    pub fn take_edges(&mut self) -> u16 {
        let master = std::mem::take(&mut self.master.irr) & !(1 << CASCADE);
        let slave = std::mem::take(&mut self.slave.irr);
        self.join();
        u16::from(master) | u16::from(slave) << 8
    }

    /// Whether the CPU's interrupt pin is up.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.master.winner().is_some()
    }

    /// Lines of the master that ask and are not masked, a bit each, whatever is in service; the slave's as its own line.
    #[must_use]
    pub fn asks(&self) -> u8 {
        self.master.requests() & !self.master.imr
    }

    /// The CPU's acknowledge cycle: the vector of the interrupt, which is in service from now on (or done,
    /// with automatic EOI). With nothing pending it is the spurious one, line 7 of the chip that was asked.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.winner() {
            None => self.master.vector(7),
            Some(CASCADE) => {
                self.master.serve(CASCADE);
                match self.slave.winner() {
                    None => self.slave.vector(7),
                    Some(line) => {
                        self.slave.serve(line);
                        self.slave.vector(line)
                    }
                }
            }
            Some(line) => {
                self.master.serve(line);
                self.master.vector(line)
            }
        };
        self.join();
        vector
    }

    /// A guest's read of `port` (0x20, 0x21, 0xa0 or 0xa1).
    pub fn read(&mut self, port: u16) -> u8 {
        let chip = self.chip(port);
        let value = if std::mem::take(&mut chip.poll) {
            match chip.winner() {
                None => 0,
                Some(line) => {
                    chip.serve(line);
                    0x80 | line
                }
            }
        } else {
            chip.register(port & 1 != 0)
        };
        self.join();
        value
    }

    /// A guest's write to `port` (0x20, 0x21, 0xa0 or 0xa1).
    pub fn write(&mut self, port: u16, value: u8) {
        let chip = self.chip(port);
        if port & 1 != 0 {
            chip.data(value);
        } else {
            chip.command(value);
        }
        self.join();
    }

    fn chip(&mut self, port: u16) -> &mut Chip {
        if port & 0x80 == 0 {
            &mut self.master
        } else {
            &mut self.slave
        }
    }

    /// Carries the slave's output to the master's input.
    fn join(&mut self) {
        let level = self.slave.winner().is_some();
        self.master.set_line(CASCADE, level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both chips as a PC sets them: vectors 0x20 and 0x28, all lines open.
    fn ready(icw4: u8) -> Pic {
        let mut pic = Pic::default();
        for (base, icw2, icw3) in [(0x20, 0x20, 0x04), (0xa0, 0x28, 0x02)] {
            pic.write(base, 0x11);
            pic.write(base + 1, icw2);
            pic.write(base + 1, icw3);
            pic.write(base + 1, icw4);
        }
        pic
    }

    #[test]
    fn where_another_controller_takes_them_only_edges_are_told() {
        let mut pic = Pic::default();
        pic.pulse(5);
        pic.set_line(12, true);
        assert_eq!(pic.take_edges(), 1 << 5 | 1 << 12);
        pic.set_line(5, true);
        assert_eq!(pic.take_edges(), 0, "it was high already");
        pic.pulse(5);
        pic.set_line(12, false);
        assert_eq!(pic.take_edges(), 1 << 5);
        assert!(pic.is_sound());
    }

    #[test]
    fn the_next_line_is_the_one_that_is_acknowledged() {
        let mut pic = ready(1);
        assert_eq!(pic.master.winner(), None);
        pic.pulse(12);
        assert_eq!(pic.master.winner(), Some(CASCADE));
        pic.pulse(0);
        assert_eq!(pic.master.winner(), Some(0));
        assert_eq!(pic.acknowledge(), 0x20);
        assert_eq!(pic.master.winner(), None, "the first line is in service");
        assert_eq!(pic.asks(), 1 << CASCADE, "and the other asks still");
        pic.write(0x20, 0x60);
        assert_eq!(pic.master.winner(), Some(CASCADE));
        pic.write(0x21, 1 << CASCADE);
        assert_eq!((pic.master.winner(), pic.asks()), (None, 0), "it is masked");
    }

    #[test]
    fn nothing_comes_before_initialisation_ends() {
        let mut pic = Pic::default();
        pic.set_line(4, true);
        assert!(!pic.pending());
        pic.set_line(4, false);
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4)] {
            pic.write(port, value);
            pic.pulse(4);
            assert!(!pic.pending());
        }
        pic.write(0x21, 1);
        assert!(pic.pending());
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn single_and_no_icw4_shorten_initialisation() {
        let mut pic = Pic::default();
        pic.write(0x20, 0x12); // SNGL, no ICW4
        pic.write(0x21, 0x47);
        pic.write(0x21, 0xf0); // already the mask
        assert_eq!(pic.read(0x21), 0xf0);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x43, "the low bits of ICW2 are the line");
    }

    #[test]
    fn icw1_clears_mask_and_requests_and_needs_a_new_edge() {
        let mut pic = ready(1);
        pic.write(0x21, 0xfe);
        pic.set_line(0, true);
        pic.write(0x20, 0x11);
        for value in [0x20, 4, 1] {
            pic.write(0x21, value);
        }
        assert_eq!(pic.read(0x21), 0);
        assert!(!pic.pending(), "the old edge is forgotten");
        pic.set_line(0, true);
        assert!(!pic.pending(), "still high: no edge");
        pic.pulse(0);
        assert!(pic.pending());
    }

    #[test]
    fn fixed_priority_and_nesting() {
        let mut pic = ready(1);
        pic.set_line(5, true);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x23);
        assert!(!pic.pending(), "5 waits for 3");
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x21, "1 interrupts 3");
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0b0000_1010);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0b0010_0000);
        pic.write(0x20, 0x20);
        assert!(!pic.pending());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn an_edge_counts_once_and_a_fall_withdraws_it() {
        let mut pic = ready(3);
        pic.set_line(5, true);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x25);
        assert!(!pic.pending(), "high, but no new edge");
        pic.pulse(5);
        assert!(pic.pending());
        pic.set_line(5, false);
        assert!(!pic.pending());
    }

    #[test]
    fn masks_hold_requests_back_without_losing_them() {
        let mut pic = ready(1);
        pic.write(0x21, 1 << 6);
        pic.set_line(6, true);
        assert!(!pic.pending());
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x26);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pic = ready(3);
        pic.pulse(0);
        assert_eq!(pic.acknowledge(), 0x20);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0);
        pic.pulse(7);
        assert_eq!(pic.acknowledge(), 0x27);
    }

    #[test]
    fn spurious_is_line_7_and_not_in_service() {
        let mut pic = ready(1);
        assert_eq!(pic.acknowledge(), 0x27);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0);
        // The slave's: the master saw it, the slave has nothing any more.
        pic.master.lines |= 1 << CASCADE;
        assert_eq!(pic.acknowledge(), 0x2f);
        assert_eq!(pic.slave.isr, 0);
        assert_eq!(pic.master.isr, 1 << CASCADE, "the master needs its EOI");
    }

    #[test]
    fn the_slave_comes_through_line_2() {
        let mut pic = ready(1);
        pic.set_line(12, true);
        pic.set_line(3, true);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0b1100);
        assert_eq!(pic.acknowledge(), 0x2c, "before line 3");
        pic.set_line(8, true);
        assert!(!pic.pending(), "line 2 is in service");
        pic.write(0xa0, 0x20);
        assert!(!pic.pending());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x28, "no request is lost");
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x23);
    }

    #[test]
    fn special_fully_nested_lets_the_slave_interrupt_itself() {
        let mut pic = ready(0x11);
        pic.set_line(12, true);
        assert_eq!(pic.acknowledge(), 0x2c);
        pic.set_line(9, true);
        assert_eq!(pic.acknowledge(), 0x29);
        pic.set_line(14, true);
        assert!(!pic.pending(), "of lower priority");
    }

    #[test]
    fn line_2_and_wild_lines_do_nothing() {
        let mut pic = ready(1);
        let before = pic.clone();
        for irq in [2, 16, 255] {
            pic.set_line(irq, true);
        }
        assert_eq!(pic, before);
    }

    #[test]
    fn rotations() {
        let mut pic = ready(1);
        pic.pulse(4);
        pic.acknowledge();
        pic.write(0x20, 0xa0); // rotate on unspecific EOI: 4 becomes the lowest
        pic.pulse(4);
        pic.pulse(5);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0xe5); // rotate on specific EOI of 5
        pic.pulse(6);
        assert_eq!(pic.acknowledge(), 0x26, "6 is the highest, 4 waits");
        pic.write(0x20, 0x66); // specific EOI
        pic.write(0x20, 0xc3); // set priority: 3 is the lowest
        pic.pulse(3);
        assert_eq!(pic.acknowledge(), 0x24);
        pic.write(0x20, 0x64);
        assert_eq!(pic.acknowledge(), 0x23);
    }

    #[test]
    fn rotation_in_auto_eoi() {
        let mut pic = ready(3);
        pic.write(0x20, 0x80);
        pic.pulse(1);
        assert_eq!(pic.acknowledge(), 0x21);
        pic.pulse(1);
        pic.pulse(6);
        assert_eq!(pic.acknowledge(), 0x26, "1 is the lowest now");
        assert_eq!(pic.acknowledge(), 0x21);
        pic.write(0x20, 0x00); // rotation off
        pic.pulse(2 + 1);
        assert_eq!(pic.acknowledge(), 0x23);
        assert_eq!(pic.master.highest, 2);
    }

    #[test]
    fn special_mask_opens_lower_lines() {
        let mut pic = ready(1);
        pic.pulse(1);
        pic.acknowledge();
        pic.pulse(6);
        assert!(!pic.pending());
        pic.write(0x21, 1 << 1);
        assert!(!pic.pending());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x26);
        pic.write(0x20, 0x20); // unspecific EOI passes over the masked 1
        assert_eq!(pic.master.isr, 1 << 1);
        pic.write(0x20, 0x48);
        pic.pulse(6);
        assert!(!pic.pending());
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = ready(1);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pic.set_line(5, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x85);
        assert!(!pic.pending());
        assert_eq!(pic.read(0x20), 0, "one poll, one answer: the IRR again");
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 1 << 5);
    }
}
