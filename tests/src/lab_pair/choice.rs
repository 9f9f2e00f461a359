//! What a pair in the lab runs, and what its sides are told of it.
#![forbid(unsafe_code)]

use anyhow::Result;
use hypervisor::config::Transport;
use hypervisor::intervals::Replication;

use super::side::Side;
use super::{GATEWAY, GUEST, PATIENCE};
use crate::lab::Host;

/// What to run.
#[derive(Clone, Debug)]
pub struct Choice<'a> {
    /// What carries the log.
    pub transport: Transport,
    /// The machine's name, by which the arbiter knows it.
    pub name: &'a str,
    /// What it runs.
    pub guest: Guest<'a>,
    /// `--memory`.
    pub memory_mib: u32,
    /// How it is replicated.
    pub replicate: Replication,
}

/// What a machine runs.
#[derive(Clone, Copy, Debug)]
pub enum Guest<'a> {
    /// `--guest`: a bare-metal one.
    Bare(&'a str),
    /// A Linux guest ([`linux_guest`](crate::linux_guest)) that serves redis, from files in the hosts' shared directory.
    Linux {
        /// The kernel's name there.
        kernel: &'a str,
        /// The initial RAM disk's.
        initrd: &'a str,
        /// What it does.
        task: &'a str,
        /// Options of the primary besides.
        options: &'a [&'a str],
        /// Options of both sides: the one that takes over is to go on as the other did.
        of_sides: &'a [&'a str],
    },
    /// `--guest disk`, which writes a disk and has no network.
    Writer {
        /// Its command line.
        line: &'a str,
        /// Options of both sides: the disk, and where the console goes.
        of_sides: &'a [&'a str],
    },
}

impl Guest<'_> {
    fn of_sides(&self) -> &[&str] {
        match self {
            Self::Bare(_) => &[],
            Self::Linux { of_sides, .. } | Self::Writer { of_sides, .. } => of_sides,
        }
    }

    /// The primary's options for it.
    pub(super) fn options(&self) -> Vec<String> {
        let network = GATEWAY.address;
        let address = format!("{}/{}", GUEST.ip(), network.prefix);
        let mut words: Vec<String> = Vec::new();
        match self {
            Self::Bare(name) => {
                let line = format!("ip={address} gw={}", network.address);
                words.extend(["--guest", name, "--command-line", &line].map(str::to_owned));
            }
            Self::Linux {
                kernel,
                initrd,
                task,
                options,
                ..
            } => {
                let line = format!("quiet guest.do={task} guest.ip={address}");
                let [kernel, initrd] = [kernel, initrd].map(|name| format!("/shared/{name}"));
                words.extend(
                    [
                        // A guest that crashes is to be seen, not started again.
                        "--on-reset",
                        "end",
                        "--kernel",
                        &kernel,
                        "--initrd",
                        &initrd,
                        "--command-line",
                        &line,
                    ]
                    .map(str::to_owned),
                );
                words.extend(options.iter().map(|&word| word.to_owned()));
            }
            Self::Writer { line, .. } => {
                words.extend(["--guest", "disk", "--command-line", line].map(str::to_owned));
            }
        }
        words
    }
}

/// What every side of a machine in the lab is told, whatever it runs: its machine's name, what carries the log, and its port of the guest's network.
pub(super) fn words_of_sides(transport: Transport, name: &str, tap: &str) -> Vec<String> {
    let words = [
        "--json",
        "--config",
        "/shared/times.toml",
        "--transport",
        transport.name(),
        "--name",
        name,
        "--secret",
        "/etc/pair.secret",
        "--arbiter",
        "/shared/arbiter",
        "--tap",
        tap,
    ];
    words.map(str::to_owned).to_vec()
}

impl Choice<'_> {
    /// What every side of the machine is told.
    pub(super) fn of_sides(&self) -> Vec<String> {
        let mut words = words_of_sides(self.transport, self.name, "doppel0");
        words.extend(["--replicate".into(), self.replicate.name().into()]);
        words.extend(self.guest.of_sides().iter().map(|&word| word.to_owned()));
        words
    }

    /// Starts a primary of it in this host.
    pub(super) fn start_primary(&self, host: &Host<'_>, more: &[&str]) -> Result<Side> {
        let mut words = vec!["doppel".to_owned(), "primary".to_owned()];
        words.extend(self.of_sides());
        words.extend(self.guest.options());
        words.extend(["--memory".into(), self.memory_mib.to_string()]);
        words.extend(more.iter().map(|&word| word.to_owned()));
        Side::start(host, &words, PATIENCE)
    }

    /// The machine is started again in this host, both of its sides being gone: alone, by what is on its disk.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_again(&self, host: &Host<'_>) -> Result<Side> {
        self.start_primary(host, &["--alone", "--cold-start"])
    }
}
