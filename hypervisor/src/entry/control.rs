//! What was done to a machine on purpose, as an entry says it: a code and a value.
#![forbid(unsafe_code)]

use super::{Bytes, EntryError};
use crate::version::Version;

const CONTROL_HAND_OVER: u8 = 1;
const CONTROL_POWER_OFF: u8 = 2;
const CONTROL_SHARE: u8 = 3;
const CONTROL_RESET: u8 = 4;

/// What an operator does to a machine: it is in the log, so that it happens to both sides, and a take-over keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The primary stands here, and all its outputs have left: the backup is to claim the machine.
    HandOver {
        /// For how long the guest had stood when this was posted, in nanoseconds.
        stood: u64,
    },
    /// The machine is turned off, with this status.
    PowerOff(u8),
    /// The machine starts anew.
    Reset(Wish),
    /// From here on the guest may run for so many 1024ths of its time; at 0 it stands.
    Share(u16),
}

/// Whose wish a reset was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// Logs of version 7 do not say it.
    #[default]
    Unsaid,
    /// The guest's.
    Guest,
    /// The operator's.
    Operator,
}

impl Wish {
    pub(super) const ALL: [Self; 3] = [Self::Unsaid, Self::Guest, Self::Operator];
}

impl Control {
    /// The share of a guest that is not held back.
    pub const WHOLE: u16 = 1024;

    /// Its code and its value in a log in this version.
    pub(super) fn code(self, version: Version) -> (u8, u64) {
        match self {
            Control::HandOver { stood } => (CONTROL_HAND_OVER, stood),
            Control::PowerOff(status) => (CONTROL_POWER_OFF, status.into()),
            Control::Share(share) => (CONTROL_SHARE, share.into()),
            Control::Reset(wish) if version.resets_say_whose() => (CONTROL_RESET, wish as u64),
            Control::Reset(_) => (CONTROL_RESET, 0),
        }
    }

    /// Reads one of a log in this version.
    pub(super) fn decode(rest: &mut Bytes<'_>, version: Version) -> Result<Self, EntryError> {
        let code = rest.byte("control")?;
        let value = rest.varint("control's value")?;
        let refused = EntryError::Value {
            field: "control's value",
            value,
        };
        Ok(match code {
            CONTROL_HAND_OVER => Control::HandOver { stood: value },
            CONTROL_POWER_OFF => Control::PowerOff(u8::try_from(value).map_err(|_| refused)?),
            CONTROL_SHARE if value <= u64::from(Control::WHOLE) => Control::Share(value as u16),
            CONTROL_RESET if value == 0 || version.resets_say_whose() => {
                let wish = usize::try_from(value).ok();
                let wish = wish.and_then(|wish| Wish::ALL.get(wish));
                Control::Reset(*wish.ok_or(refused)?)
            }
            CONTROL_SHARE | CONTROL_RESET => return Err(refused),
            other => {
                return Err(EntryError::Value {
                    field: "control",
                    value: other.into(),
                });
            }
        })
    }
}
