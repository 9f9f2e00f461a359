//! The devices' state in a checkpoint, and its hash.
//!
//! JSON of the plain data that the board is, with a version of its own: the models change more often than the
//! checkpoint around them, and a state is small (about 3 KiB, and what the disk is about to write) beside the pages it travels with. It is checked when it is
//! read: whatever the bytes say, the board is then one that a guest could have made.
#![forbid(unsafe_code)]

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{Board, Devices};

/// Grows with every change to a model's fields.
const VERSION: u32 = 4;

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    board: &'a Board,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Read {
    board: Board,
}

/// Why bytes are no state of these devices.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadDevices {
    /// Another version of the models.
    #[error(
        "device state of version {found}, this program writes {VERSION}: run the same version on both hosts"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// No such bytes were ever written.
    #[error("no device state: {why}")]
    Malformed {
        /// Where it is wrong.
        why: String,
    },
    /// A state that no guest can bring this device into.
    #[error("the state of the {device} is impossible")]
    Impossible {
        /// The device.
        device: &'static str,
    },
    /// Another machine's network device or disk.
    #[error("device state of another machine: its network address, MTU or disk is not this one's")]
    Foreign,
}

/// Gathers the many small fields of the state, to hash them in one go: a third of the time of hashing each.
struct StateBytes(Vec<u8>);

impl Hasher for StateBytes {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        xxh3_64(&self.0)
    }
}

impl Devices {
    /// A hash of the state of all devices, to compare two boards of the same build. Outputs are not in it.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut state = StateBytes(Vec::with_capacity(1024));
        self.board.hash(&mut state);
        state.finish()
    }

    /// The state of all devices. Outputs are not in it: they are taken before.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        debug_assert!(self.board.awaiting.is_none(), "an access is not answered");
        let written = Written {
            version: VERSION,
            board: &self.board,
        };
        serde_json::to_vec(&written).expect("plain data always encodes")
    }

    /// The devices if the access that waits for its answer has not been made: a read of HALT, CLOCK or RANDOM changes nothing
    /// that a second one would not.
    #[must_use]
    pub fn before_access(&self) -> Self {
        let mut before = self.clone();
        before.board.awaiting = None;
        before
    }

    /// The devices in a state that was saved by devices of the same configuration. Nothing changes here.
    ///
    /// # Errors
    /// See [`BadDevices`].
    pub fn restored(&self, bytes: &[u8]) -> Result<Self, BadDevices> {
        let malformed = |error: serde_json::Error| BadDevices::Malformed {
            why: error.to_string(),
        };
        let Version { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version != VERSION {
            return Err(BadDevices::Version { found: version });
        }
        let Read { board } = serde_json::from_slice(bytes).map_err(malformed)?;
        for (device, sound) in [
            ("interrupt controller", board.pic.is_sound()),
            ("timer", board.pit.is_sound()),
            ("console", board.serial.is_sound()),
            ("real-time clock", board.cmos.is_sound()),
            ("entropy device", board.rng.device().is_sound()),
            ("platform page", board.awaiting.is_none()),
            (
                "disk",
                board.blk.as_ref().is_none_or(|blk| blk.device().is_sound()),
            ),
        ] {
            if !sound {
                return Err(BadDevices::Impossible { device });
            }
        }
        let disks_are_alike = match (&board.blk, &self.board.blk) {
            (Some(one), Some(other)) => one.device().is_alike(other.device()),
            (one, other) => one.is_none() && other.is_none(),
        };
        if board.net.device() != self.board.net.device() || !disks_are_alike {
            return Err(BadDevices::Foreign);
        }
        Ok(Self {
            board,
            outputs: Vec::new(),
            frame_bytes: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::devices::{BadDevices, Bus, Devices, DevicesConfig};
    use crate::event::{GuestTime, Input, Output};
    use crate::memory::GuestRam;

    use super::VERSION;

    fn devices() -> Devices {
        Devices::new(&DevicesConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            disk: None,
            wall_clock_ns: 0,
            firmware: false,
        })
    }

    #[test]
    fn a_state_survives_and_goes_on_the_same() {
        let ram = GuestRam::new(2).unwrap();
        let mut first = devices();
        let program: [(u64, u8); 9] = [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 3),
            (0x21, 0xfa),
            (0x43, 0x34),
            (0x40, 0x10),
            (0x40, 0x20),
            (0x3f9, 1),
        ];
        for (port, value) in program {
            if first.write(&ram, Bus::Port, port, &[value]) != crate::event::Effect::Done {
                first
                    .answer(&Input::Clock(GuestTime(5_000)), &mut [])
                    .unwrap();
            }
        }
        first.apply(&ram, &Input::Console(b"xy".to_vec())).unwrap();
        first.apply(&ram, &Input::Tick(1)).unwrap();
        let _: Vec<Output> = first.outputs().collect();
        let mut second = devices().restored(&first.save()).unwrap();
        assert_eq!(first, second);
        assert_eq!(first.next_tick(), second.next_tick());
        assert_eq!(
            first.acknowledge_interrupt(),
            second.acknowledge_interrupt()
        );
        assert_eq!(first.digest(), second.digest());
    }

    #[test]
    fn what_no_guest_can_make_is_refused() {
        let text = String::from_utf8(devices().save()).unwrap();
        let refused = |from: &str, to: &str| {
            assert!(text.contains(from), "{from} not in {text}");
            devices()
                .restored(text.replacen(from, to, 1).as_bytes())
                .unwrap_err()
        };
        let next = format!("\"version\":{}", VERSION + 1);
        assert!(matches!(
            refused(&format!("\"version\":{VERSION}"), &next),
            BadDevices::Version { .. }
        ));
        for (from, to) in [
            ("\"highest\":0", "\"highest\":9"),
            ("\"cascade\":2", "\"cascade\":12"),
            ("\"mode\":0", "\"mode\":6"),
            ("\"waiting\":null", "\"waiting\":4097"),
            (
                "\"received\":[]",
                &format!("\"received\":[{}1]", "1,".repeat(64)),
            ),
            ("\"awaiting\":null", "\"awaiting\":{\"Timer\":{\"Read\":7}}"),
        ] {
            assert!(
                matches!(refused(from, to), BadDevices::Impossible { .. }),
                "{to}"
            );
        }
        assert_eq!(refused("\"mtu\":1500", "\"mtu\":1501"), BadDevices::Foreign);
        assert!(matches!(refused("{", "["), BadDevices::Malformed { .. }));
        for cut in 0..text.len() {
            devices().restored(&text.as_bytes()[..cut]).unwrap_err();
        }
    }
}
