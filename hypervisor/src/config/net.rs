//! The guest's network, as configured.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// The guest's network.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Net {
    /// What carries the frames.
    pub backend: NetBackend,
    /// Name of the TAP (backend `tap`).
    pub tap: Option<String>,
    /// The host's address on the TAP, with the network's length; none leaves the interface as it is found.
    pub address: Option<String>,
    /// Path of the Unix socket (backend `link`).
    pub link: Option<PathBuf>,
    /// The guest's address on its link; if not given, the one that every guest has that was given none.
    pub mac: Option<Mac>,
}

/// An address on a link, as in `02:d0:99:e1:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        let digits = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let read = bytes.iter_mut().all(|byte| {
            let part = parts.next().filter(|part| digits(part));
            part.and_then(|part| u8::from_str_radix(part, 16).ok())
                .is_some_and(|value| {
                    *byte = value;
                    true
                })
        });
        // The lowest bit of the first byte is for groups.
        if !read || parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!(
                "{text:?} is no address for one guest: write six bytes as 02:d0:99:e1:00:01, the first of them even"
            ));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// What carries the guest's frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetBackend {
    /// Nothing: the guest has no network.
    #[default]
    None,
    /// A TAP interface.
    Tap,
    /// A Unix socket, one message a frame; needs no privilege.
    Link,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_address_on_its_link_is_six_bytes_for_one() {
        let mac = |text: &str| {
            crate::config::Config::parse(&format!("[net]\nmac = \"{text}\"")).map(|c| c.net.mac)
        };
        assert_eq!(
            mac("02:d0:99:e2:1e:14").unwrap(),
            Some(Mac([2, 0xd0, 0x99, 0xe2, 0x1e, 0x14]))
        );
        for bad in [
            "",
            "02:d0:99:e2:1e",
            "02:d0:99:e2:1e:14:00",
            "03:00:00:00:00:01",
            "2:d0:99:e2:1e:14",
            "00:00:00:00:00:00",
            "+2:00:00:00:00:00",
        ] {
            let error = mac(bad).unwrap_err().to_string();
            assert!(error.contains("02:d0:99:e1:00:01"), "{bad}: {error}");
        }
    }
}
