//! A machine's specification: what its roles are started with, wherever that is.
#![forbid(unsafe_code)]

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disks::DiskSpec;
use crate::boot::is_built_in;
use crate::config::{Config, ConfigError, GuestCpu, Transport};
use crate::control::is_name;
use crate::intervals::Replication;
use crate::machine::ClockSource;
use crate::preempt::Strategy;

/// The longest command line, in bytes.
const COMMAND_LINE_MAX: usize = 2048;

/// What a machine is. Files are named by absolute paths, which mean the same on every host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// A guest that is built in, or an ELF file; none with a kernel.
    pub guest: Option<String>,
    /// A Linux kernel.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How many vCPUs it has.
    pub vcpus: u8,
    /// The CPU of a Linux guest.
    pub cpu: Option<GuestCpu>,
    /// The guest's own words.
    pub command_line: String,
    /// Whether it has a network.
    pub network: bool,
    /// What carries its log: `tcp` or `rdma`.
    pub transport: Transport,
    /// How it is replicated.
    pub replicate: Replication,
    /// What happens to it when it does not exit.
    pub preempt: Strategy,
    /// Where a Linux guest reads the time.
    pub clock: Option<ClockSource>,
    /// Its backup may be on the host of its primary.
    pub same_host: bool,
    /// Its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskSpec>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            guest: None,
            kernel: None,
            initrd: None,
            memory_mib: 64,
            vcpus: 1,
            cpu: None,
            command_line: String::new(),
            network: true,
            transport: Transport::Tcp,
            replicate: Replication::default(),
            preempt: Strategy::default(),
            clock: None,
            same_host: false,
            disk: None,
        }
    }
}

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The name.
    #[error("{0:?} cannot name a machine: use 1 to 63 of a-z, 0-9 and -, not beginning with -")]
    Name(String),
    /// Not one guest.
    #[error(
        "a machine has one guest: give --guest or --kernel (with --initrd, if it needs one), not both and not neither"
    )]
    Guest,
    /// A path that means something else elsewhere.
    #[error("{} is no absolute path without \"..\": hosts find a file by it, each its own copy below the agent's `images`", .0.display())]
    Path(PathBuf),
    /// The log.
    #[error("the log of a machine whose sides are on two hosts goes over tcp or rdma, not {0}")]
    Transport(&'static str),
    /// Words that are too many, or no words.
    #[error(
        "the command line has {bytes} bytes, or bytes that are no text: at most {COMMAND_LINE_MAX}, without control characters"
    )]
    CommandLine {
        /// How many.
        bytes: usize,
    },
    /// The disk.
    #[error("{0}")]
    Disk(String),
    /// Two images of one disk in one place.
    #[error(
        "each host has one image of a machine's disk, so its sides are on two hosts: leave out --same-host"
    )]
    SameHost,
    /// As for a machine of one host.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Spec {
    /// Checks all that can be checked away from the hosts.
    ///
    /// # Errors
    /// See [`SpecError`].
    pub fn check(&self, name: &str) -> Result<(), SpecError> {
        if !is_name(name) {
            return Err(SpecError::Name(name.to_owned()));
        }
        if self.guest.is_some() == self.kernel.is_some()
            || self.initrd.is_some() && self.kernel.is_none()
        {
            return Err(SpecError::Guest);
        }
        if let Some(disk) = &self.disk {
            disk.check().map_err(SpecError::Disk)?;
            if disk.has_images() && self.same_host {
                return Err(SpecError::SameHost);
            }
        }
        let of_disk = self.disk.iter().filter_map(DiskSpec::file);
        for path in self.files().into_iter().chain(of_disk.map(Path::to_owned)) {
            let plain = path
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !path.is_absolute() || !plain {
                return Err(SpecError::Path(path));
            }
        }
        if self.transport == Transport::Shm {
            return Err(SpecError::Transport(self.transport.name()));
        }
        let words = &self.command_line;
        if words.len() > COMMAND_LINE_MAX || words.chars().any(char::is_control) {
            return Err(SpecError::CommandLine { bytes: words.len() });
        }
        Ok(self.config(name).check()?)
    }

    /// The files that a host must have to start it, whatever its disk is.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let guest = self.guest.as_deref().filter(|guest| !is_built_in(guest));
        let all = [
            guest.map(PathBuf::from),
            self.kernel.clone(),
            self.initrd.clone(),
        ];
        all.into_iter().flatten().collect()
    }

    /// As a role is configured; what is the host's is missing.
    fn config(&self, name: &str) -> Config {
        let mut config = Config {
            name: name.to_owned(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            clock: self.clock,
            cpu: self.cpu,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            command_line: self.command_line.clone(),
            ..Config::default()
        };
        if let Some(guest) = &self.guest {
            config.guest.clone_from(guest);
        }
        config.pair.transport = self.transport;
        config.preempt.strategy = self.preempt;
        config.replicate.mode = self.replicate;
        if let Some(disk) = &self.disk {
            // Wherever its image is.
            config.disk.image = Some("image".into());
            config.disk.read_only = !disk.has_images();
        }
        config
    }

    /// The options of a role that both sides have.
    #[must_use]
    pub fn words_of_both(&self) -> Vec<String> {
        let preempt = match self.preempt {
            Strategy::Exit => "exit",
            Strategy::Checkpoint => "checkpoint",
        };
        [
            ("--transport", self.transport.name()),
            ("--replicate", self.replicate.name()),
            ("--preempt", preempt),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value.to_owned()])
        .collect()
    }

    /// The options of a primary: the machine itself, which a backup gets from it.
    #[must_use]
    pub fn words_of_primary(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut say = |option: &str, value: String| words.extend([option.to_owned(), value]);
        let text = |path: &Path| path.display().to_string();
        if let Some(guest) = &self.guest {
            say("--guest", guest.clone());
        }
        if let Some(kernel) = &self.kernel {
            say("--kernel", text(kernel));
        }
        if let Some(initrd) = &self.initrd {
            say("--initrd", text(initrd));
        }
        if let Some(clock) = self.clock {
            let word = match clock {
                ClockSource::Timer => "timer",
                ClockSource::Page => "page",
            };
            say("--clock", word.to_owned());
        }
        if let Some(cpu) = self.cpu {
            let word = match cpu {
                GuestCpu::Replayable => "replayable",
                GuestCpu::Host => "host",
            };
            say("--cpu", word.to_owned());
        }
        say("--vcpus", self.vcpus.to_string());
        say("--memory", self.memory_mib.to_string());
        // Joined, so that words which begin with a dash are no option.
        words.push(format!("--command-line={}", self.command_line));
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv() -> Spec {
        Spec {
            guest: Some("kv".into()),
            ..Spec::default()
        }
    }

    #[test]
    fn what_no_host_could_start_is_refused_before_it_is_written() {
        kv().check("kv").unwrap();
        let refused = |name: &str, change: fn(&mut Spec)| {
            let mut spec = kv();
            change(&mut spec);
            spec.check(name).unwrap_err().to_string()
        };
        for (name, change, word) in [
            ("../kv", (|_| ()) as fn(&mut Spec), "name"),
            ("kv", |spec| spec.guest = None, "--guest or --kernel"),
            ("kv", |spec| spec.kernel = Some("/k".into()), "not both"),
            ("kv", |spec| spec.initrd = Some("/i".into()), "not both"),
            (
                "kv",
                |spec| spec.guest = Some("guest.elf".into()),
                "absolute",
            ),
            ("kv", |spec| spec.guest = Some("/a/../b".into()), "absolute"),
            ("kv", |spec| spec.transport = Transport::Shm, "tcp or rdma"),
            ("kv", |spec| spec.memory_mib = 1, "memory_mib"),
            ("kv", |spec| spec.vcpus = 2, "vcpus"),
            ("kv", |spec| spec.command_line = "a\nb".into(), "control"),
            ("kv", |spec| spec.command_line = "x".repeat(2049), "2049"),
            ("kv", |spec| spec.clock = Some(ClockSource::Page), "clock"),
            (
                "kv",
                |spec| spec.disk = Some(DiskSpec::Empty { bytes: 1 }),
                "whole sectors",
            ),
            (
                "kv",
                |spec| {
                    spec.disk = Some(DiskSpec::Empty { bytes: 512 });
                    spec.same_host = true;
                },
                "leave out --same-host",
            ),
            (
                "kv",
                |spec| {
                    let file = "/images/../etc/shadow".into();
                    spec.disk = Some(DiskSpec::CopyOf { file });
                },
                "absolute",
            ),
        ] {
            let why = refused(name, change);
            assert!(why.contains(word), "{word}: {why}");
        }
    }

    #[test]
    fn words_that_look_like_options_stay_the_guests() {
        let spec = Spec {
            command_line: "--cold-start".into(),
            ..kv()
        };
        let words = spec.words_of_primary();
        assert!(words.contains(&"--command-line=--cold-start".to_owned()));
        assert_eq!(words[..2], ["--guest", "kv"]);
        assert!(spec.files().is_empty());
    }

    #[test]
    fn survives_being_written() {
        let text = serde_json::to_string(&kv()).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), kv());
        assert!(!text.contains("disk"), "{text}");
        let db = Spec {
            disk: Some(DiskSpec::Empty { bytes: 512 }),
            ..kv()
        };
        db.check("db").unwrap();
        let text = serde_json::to_string(&db).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), db);
    }
}
