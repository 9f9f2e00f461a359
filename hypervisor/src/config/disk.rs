//! The guest's disk, as configured.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::Transport;

/// The guest's disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    /// Its image, a file or a block device; none for a machine without a disk.
    pub image: Option<PathBuf>,
    /// How the two sides of a pair have it.
    pub arrangement: Arrangement,
    /// The guest cannot write it.
    pub read_only: bool,
    /// A shared one, across hosts: run by `sh -c` before a backup that takes over writes it. It returns 0 only when the old primary can
    /// write it no more.
    pub fence_command: Option<String>,
    /// How long that may take, in milliseconds. Longer is a take-over that is given up.
    pub fence_timeout_ms: u64,
    /// A shared one that is a block device: the device itself keeps the old primary's host out, by persistent reservations.
    pub reservations: bool,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            image: None,
            arrangement: Arrangement::default(),
            read_only: false,
            fence_command: None,
            // A host that is powered off by its controller is so within seconds.
            fence_timeout_ms: 10_000,
            reservations: false,
        }
    }
}

impl Disk {
    /// Whether both sides have one image.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.image.is_some() && self.arrangement == Arrangement::Shared
    }

    /// As a duration.
    #[must_use]
    pub fn fence_timeout(&self) -> Duration {
        Duration::from_millis(self.fence_timeout_ms)
    }

    /// With the image of another, and how that is had; and with this one's fence command, which is given apart.
    #[must_use]
    pub fn with_image_of(self, other: &Self) -> Self {
        Self {
            fence_command: self.fence_command,
            fence_timeout_ms: self.fence_timeout_ms,
            ..other.clone()
        }
    }

    /// Whether it can be so, with a log that is carried by this: the field that is wrong, what it says, and what is expected.
    pub(super) fn check(
        &self,
        transport: Transport,
    ) -> Result<(), (&'static str, String, &'static str)> {
        let shared = self.arrangement == Arrangement::Shared;
        if !(100..=600_000).contains(&self.fence_timeout_ms) {
            let found = self.fence_timeout_ms.to_string();
            return Err(("disk.fence_timeout_ms", found, "choose 100 to 600000"));
        }
        if shared && self.read_only {
            return Err((
                "disk.read_only",
                "true".into(),
                "leave out shared: a disk that nobody writes needs no fence, and both sides can have the same file",
            ));
        }
        if !shared && (self.fence_command.is_some() || self.reservations) {
            return Err((
                "disk.arrangement",
                "replicated".into(),
                "say shared, or leave out what fences (disk.fence_command, disk.reservations): an image of one's own needs none",
            ));
        }
        if self.reservations && transport == Transport::Shm {
            return Err((
                "disk.reservations",
                "true".into(),
                "leave them out: they tell hosts apart and not processes, and on one host the old primary's process is killed",
            ));
        }
        let fenced = self.fence_command.is_some() || self.reservations;
        if self.is_shared() && transport != Transport::Shm && !fenced {
            return Err((
                "disk.arrangement",
                "shared".into(),
                "name what keeps a host that is given up from writing it: a command that cuts it off (--fence-command, as for its power switch), or \
                 the device's persistent reservations (FILE,shared,reservations). Without one two hosts could write it at once; then give each \
                 side an image of its own (replicated)",
            ));
        }
        Ok(())
    }
}

/// How the two sides of a pair have a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Arrangement {
    /// Each side has an image of its own.
    #[default]
    Replicated,
    /// Both have the same image.
    Shared,
}

impl FromStr for Arrangement {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "replicated" => Ok(Self::Replicated),
            "shared" => Ok(Self::Shared),
            other => Err(format!(
                "{other:?} is no arrangement of a disk: write replicated or shared"
            )),
        }
    }
}

impl TryFrom<String> for Arrangement {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        word.parse()
    }
}

impl FromStr for Disk {
    type Err = String;

    /// `FILE[,replicated|,shared][,reservations][,read-only]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let image = words.next().filter(|image| !image.is_empty());
        let image =
            image.ok_or("a disk needs the path of its image: FILE[,replicated|,shared][,reservations][,read-only]")?;
        let mut disk = Self {
            image: Some(image.into()),
            ..Self::default()
        };
        for word in words {
            match word {
                "read-only" => disk.read_only = true,
                "reservations" => disk.reservations = true,
                other => disk.arrangement = other.parse()?,
            }
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_disk_is_an_image_and_words() {
        let disk = |text: &str| text.parse::<Disk>();
        let plain = disk("a/b.img").unwrap();
        assert_eq!(plain.image, Some("a/b.img".into()));
        assert!(!plain.read_only);
        assert_eq!(disk("x,replicated").unwrap(), disk("x").unwrap());
        assert!(disk("x,replicated,read-only").unwrap().read_only);
        for (text, word) in [
            ("", "path"),
            (",read-only", "path"),
            ("x,fast", "fast"),
            ("x,", "arrangement"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_says_the_same() {
        let config = Config::parse("[disk]\nimage = \"x\"\nread_only = true\n").unwrap();
        assert_eq!(config.disk, "x,read-only".parse().unwrap());
        let error = Config::parse("[disk]\nimage = \"x\"\narrangement = \"split\"\n").unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("line 3") && error.contains("split"),
            "{error}"
        );
    }

    #[test]
    fn a_shared_disk_needs_something_that_fences() {
        let check = |text: &str, transport| {
            let disk: Disk = text.parse().unwrap();
            disk.check(transport)
                .map_err(|(field, _, why)| (field, why))
        };
        check("x,shared", Transport::Shm).unwrap();
        check("x,shared,reservations", Transport::Rdma).unwrap();
        for (text, transport, word) in [
            ("x,shared", Transport::Tcp, "--fence-command"),
            ("x,shared", Transport::Rdma, "--fence-command"),
            ("x,shared,read-only", Transport::Shm, "nobody writes"),
            ("x,reservations", Transport::Shm, "say shared"),
            ("x,shared,reservations", Transport::Shm, "not processes"),
        ] {
            let (field, why) = check(text, transport).unwrap_err();
            assert!(why.contains(word), "{text}: {field}: {why}");
        }
        let commanded = Disk {
            fence_command: Some("true".into()),
            ..Disk::default()
        };
        let named = commanded
            .clone()
            .with_image_of(&"x,shared".parse().unwrap());
        named.check(Transport::Tcp).unwrap();
        assert!(named.is_shared());
        let own = commanded.with_image_of(&"x".parse().unwrap());
        assert!(
            own.check(Transport::Tcp).is_err(),
            "nothing is to be fenced"
        );
        // A machine without a disk has nothing to share.
        Disk::default().check(Transport::Tcp).unwrap();
    }
}
