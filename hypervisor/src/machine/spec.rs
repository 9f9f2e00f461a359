//! What a machine is: all that both sides must agree on before the first instruction.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::boot::{Image, ImageError};
use crate::devices::DevicesConfig;

/// Bytes of an encoded description, image included.
const ENCODED_MAX: usize = 65 << 20;

/// A machine's description. It travels in the handshake and stands at the head of a log file, so a backup and a replay
/// need nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Name of the guest: built in, or the path it was read from.
    pub guest: String,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// The guest's command line.
    pub command_line: String,
    /// Wall clock (Unix time, nanoseconds) at which the guest's clock reads 0.
    pub wall_clock_ns: u64,
    /// MAC address of the network device.
    pub mac: [u8; 6],
    /// MTU of the network device.
    pub mtu: u16,
    /// The ELF file.
    #[serde(skip)]
    pub image: Vec<u8>,
}

/// Why a description is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not the bytes of a description.
    #[error("this is no machine description: {why}")]
    Malformed {
        /// What is wrong.
        why: String,
    },
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl MachineSpec {
    /// A description of `guest` (a built-in name or a path).
    ///
    /// # Errors
    /// [`SpecError::Image`].
    pub fn new(
        guest: &str,
        memory_mib: u32,
        command_line: &str,
        wall_clock_ns: u64,
    ) -> Result<Self, SpecError> {
        let image = Image::find(guest)?;
        Ok(Self {
            guest: guest.to_owned(),
            memory_mib,
            command_line: command_line.to_owned(),
            wall_clock_ns,
            mac: [0x02, 0xd0, 0x99, 0xe1, 0, 1],
            mtu: 1500,
            image: image.bytes().to_vec(),
        })
    }

    pub(super) fn devices(&self) -> DevicesConfig {
        DevicesConfig {
            mac: self.mac,
            mtu: self.mtu,
        }
    }

    /// Length of the text (u32, little-endian), the text (JSON), the image.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text = serde_json::to_vec(self).expect("plain fields always encode");
        let mut bytes = Vec::with_capacity(4 + text.len() + self.image.len());
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&text);
        bytes.extend_from_slice(&self.image);
        bytes
    }

    /// Reads what [`MachineSpec::encode`] wrote.
    ///
    /// # Errors
    /// [`SpecError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SpecError> {
        let malformed = |why: &str| SpecError::Malformed {
            why: why.to_owned(),
        };
        if bytes.len() > ENCODED_MAX {
            return Err(malformed("it is too large"));
        }
        let (length, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| malformed("it is cut short"))?;
        let length = u32::from_le_bytes(*length) as usize;
        let (text, image) = rest
            .split_at_checked(length)
            .ok_or_else(|| malformed("it is cut short"))?;
        let mut spec: Self =
            serde_json::from_slice(text).map_err(|error| SpecError::Malformed {
                why: error.to_string(),
            })?;
        spec.image = image.to_vec();
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_wire_and_refuses_cut_bytes() {
        let spec = MachineSpec::new("kv", 64, "ip=10.0.0.2/24", 5).unwrap();
        let bytes = spec.encode();
        assert_eq!(MachineSpec::decode(&bytes).unwrap(), spec);
        for cut in 0..60 {
            assert!(MachineSpec::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}
