//! The power-off port, and the keyboard controller's way to reset a machine (guest ABI, "Ports").
#![forbid(unsafe_code)]

/// The port.
pub const PORT: u16 = 0x604;

/// The keyboard controller's command port. There is no such controller but for this one command.
pub const KEYBOARD: u16 = 0x64;
/// Pulses the line that resets the processor.
pub const PULSE_RESET: u8 = 0xfe;

/// The status with which a write of `data` turns the guest off: 16 bits, 0x2000 + status.
#[must_use]
pub fn power_off(data: &[u8]) -> Option<u8> {
    match *data {
        [status, 0x20] => Some(status),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bits_with_0x20_above() {
        assert_eq!(power_off(&0x2000u16.to_le_bytes()), Some(0));
        assert_eq!(power_off(&0x20ffu16.to_le_bytes()), Some(255));
        for wrong in [&[0x20][..], &[0, 0x21], &[0, 0], &[0, 0x20, 0, 0]] {
            assert_eq!(power_off(wrong), None);
        }
    }
}
