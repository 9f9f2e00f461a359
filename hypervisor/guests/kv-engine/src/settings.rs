//! What CONFIG GET shows and CONFIG SET changes.
use alloc::vec::Vec;

use crate::number::{parse_i64, parse_memory};

/// Database count, as in Redis' default configuration.
pub(crate) const DATABASES: usize = 16;

/// The settings that the engine heeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Bytes of memory beyond which commands that need more are refused; 0 is no bound.
    pub(crate) maxmemory: u64,
    /// The longest bulk string and value, in bytes.
    pub(crate) proto_max_bulk_len: u64,
    /// How many clients there can be: the server's to keep, not the engine's.
    pub(crate) maxclients: u16,
}

/// How a setting may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Maxclients,
    Maxmemory,
    ProtoMaxBulkLen,
    /// Fixed when the server starts.
    Immutable(&'static str),
    /// Redis can change it, this engine has only one way: only the value it has is accepted.
    Only(&'static str),
}

/// A setting known by name.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) name: &'static str,
    kind: Kind,
}

const fn only(name: &'static str, value: &'static str) -> Setting {
    Setting {
        name,
        kind: Kind::Only(value),
    }
}

const fn immutable(name: &'static str, value: &'static str) -> Setting {
    Setting {
        name,
        kind: Kind::Immutable(value),
    }
}

/// All settings, by name.
pub(crate) const SETTINGS: &[Setting] = &[
    only("active-expire-effort", "1"),
    only("activerehashing", "no"),
    only("appendfsync", "everysec"),
    only("appendonly", "no"),
    immutable("cluster-enabled", "no"),
    immutable("databases", "16"),
    only("dir", "/"),
    only("hz", "10"),
    immutable("io-threads", "1"),
    only("latency-tracking", "no"),
    only("lazyfree-lazy-expire", "no"),
    only("lazyfree-lazy-user-del", "no"),
    only("lazyfree-lazy-user-flush", "no"),
    only("loglevel", "notice"),
    Setting {
        name: "maxclients",
        kind: Kind::Maxclients,
    },
    Setting {
        name: "maxmemory",
        kind: Kind::Maxmemory,
    },
    only("maxmemory-policy", "noeviction"),
    only("notify-keyspace-events", ""),
    only("port", "6379"),
    only("protected-mode", "no"),
    Setting {
        name: "proto-max-bulk-len",
        kind: Kind::ProtoMaxBulkLen,
    },
    only("requirepass", ""),
    only("save", ""),
    only("slowlog-log-slower-than", "-1"),
    only("slowlog-max-len", "0"),
    only("stop-writes-on-bgsave-error", "yes"),
    only("tcp-keepalive", "0"),
    only("timeout", "0"),
];

/// The setting of this name, in whatever case.
pub(crate) fn find(name: &[u8]) -> Option<&'static Setting> {
    SETTINGS
        .iter()
        .find(|setting| setting.name.as_bytes().eq_ignore_ascii_case(name))
}

impl Settings {
    /// The value of a setting as text.
    pub(crate) fn show<'a>(&self, setting: &Setting, digits: &'a mut itoa::Buffer) -> &'a str {
        match setting.kind {
            Kind::Maxclients => digits.format(self.maxclients),
            Kind::Maxmemory => digits.format(self.maxmemory),
            Kind::ProtoMaxBulkLen => digits.format(self.proto_max_bulk_len),
            Kind::Immutable(value) | Kind::Only(value) => value,
        }
    }

    /// Sets all the values, or none; for an error the name of the culprit and the reason.
    pub(crate) fn change(
        &mut self,
        changes: &Vec<(&'static Setting, &[u8])>,
    ) -> Result<(), (&'static str, &'static str)> {
        let mut new = *self;
        for (setting, value) in changes {
            new.change_one(setting, value)
                .map_err(|reason| (setting.name, reason))?;
        }
        *self = new;
        Ok(())
    }

    fn change_one(&mut self, setting: &Setting, value: &[u8]) -> Result<(), &'static str> {
        const MEMORY: &str = "argument must be a memory value";
        const ONLY: &str = "this server knows no other value";
        match setting.kind {
            Kind::Maxclients => match parse_i64(value) {
                Some(value) if value == i64::from(self.maxclients) => {}
                Some(_) => return Err(ONLY),
                None => return Err("argument couldn't be parsed into an integer"),
            },
            Kind::Maxmemory => self.maxmemory = parse_memory(value).ok_or(MEMORY)?,
            Kind::ProtoMaxBulkLen => {
                let value = parse_memory(value).ok_or(MEMORY)?;
                if !(1 << 20..=i64::MAX as u64).contains(&value) {
                    return Err(
                        "argument must be between 1048576 and 9223372036854775807 inclusive",
                    );
                }
                self.proto_max_bulk_len = value;
            }
            Kind::Immutable(_) => return Err("can't set immutable config"),
            Kind::Only(current) if current.as_bytes().eq_ignore_ascii_case(value) => {}
            Kind::Only("yes" | "no") if !matches!(value, b"yes" | b"no") => {
                return Err("argument must be 'yes' or 'no'");
            }
            Kind::Only(current)
                if parse_i64(current.as_bytes()).is_some() && parse_i64(value).is_none() =>
            {
                return Err("argument couldn't be parsed into an integer");
            }
            Kind::Only(_) => return Err(ONLY),
        }
        Ok(())
    }

    /// Whether the setting is fixed when the server starts.
    pub(crate) fn is_immutable(setting: &Setting) -> bool {
        matches!(setting.kind, Kind::Immutable(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Settings = Settings {
        maxmemory: 5,
        proto_max_bulk_len: 512 << 20,
        maxclients: 7,
    };

    #[test]
    fn sorted_by_name() {
        assert!(SETTINGS.is_sorted_by(|a, b| a.name < b.name));
    }

    #[test]
    fn all_changes_or_none() {
        let mut settings = START;
        let memory = find(b"MaxMemory").unwrap();
        let save = find(b"save").unwrap();
        let changes: Vec<(_, &[u8])> = Vec::from([(memory, &b"1gb"[..]), (save, b"60 1")]);
        assert_eq!(
            settings.change(&changes),
            Err(("save", "this server knows no other value"))
        );
        assert_eq!(settings, START);
        let changes: Vec<(_, &[u8])> = Vec::from([(memory, &b"1gb"[..]), (save, b"")]);
        settings.change(&changes).unwrap();
        assert_eq!(settings.maxmemory, 1 << 30);
    }

    #[test]
    fn the_number_of_clients_is_shown_and_stays() {
        let mut settings = START;
        let clients = find(b"maxclients").unwrap();
        assert_eq!(settings.show(clients, &mut itoa::Buffer::new()), "7");
        settings.change(&Vec::from([(clients, &b"7"[..])])).unwrap();
        for other in [&b"8"[..], b"many"] {
            settings.change(&Vec::from([(clients, other)])).unwrap_err();
        }
    }
}
