//! One Linux guest and its work under whoever can run it: Doppel alone and protected both ways, QEMU over the same KVM, and QEMU's own
//! record and replay beside Doppel's. To be run in a host whose KVM runs Linux, as a host of the lab is.
//!
//! The guest says on its console where a part of its work begins and ends; times are this host's, from when the line was there. So a guest
//! whose clock is another's is measured like all others, and what a protected one says counts when it has left.
#![forbid(unsafe_code)]

mod hosts;
mod place;
mod telling;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::sheet::Sheet;
use crate::world::Network;
use hosts::Host;
use place::{Place, Started};

/// The guest's files, and QEMU's.
#[derive(Clone, Debug, clap::Args)]
pub struct Files {
    /// The kernel as its distribution has it (an ELF file)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,
    /// The kernel after `doppel prepare`
    #[arg(long, value_name = "FILE")]
    prepared: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE")]
    prepared_initrd: PathBuf,
    /// Where QEMU's firmware lies, if not where QEMU looks
    #[arg(long, value_name = "DIRECTORY")]
    firmware: Option<PathBuf>,
    /// Where QEMU's modules lie, if not where QEMU looks
    #[arg(long, value_name = "DIRECTORY")]
    modules: Option<PathBuf>,
    /// Longest life of a guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 100)]
    limit: u64,
    /// SETs of redis-benchmark, and as many GETs
    #[arg(long, value_name = "COUNT", default_value_t = 2000)]
    requests: u32,
    /// Only these: alone, checkpoint, page, timer, replay, record, again, qemu, qemu-record, qemu-again
    #[arg(long, value_name = "HOST", value_delimiter = ',', value_parser = host)]
    only: Vec<Host>,
    /// Keep what guests and processes said in this directory, and their disks, until the next guest of that host
    #[arg(long, value_name = "DIRECTORY")]
    keep: Option<PathBuf>,
}

fn host(text: &str) -> Result<Host> {
    match Host::ALL.into_iter().find(|host| host.key() == text) {
        Some(host) => Ok(host),
        None => bail!("choose of {:?}", Host::ALL.map(Host::key)),
    }
}

/// Parts of the work, as the guest names them, and what they are.
const PARTS: [(&str, &str); 6] = [
    ("redis", "redis-benchmark"),
    ("compile", "compile-like"),
    ("disk-write", "disk, write"),
    ("disk-read", "disk, read"),
    ("network-in", "network, in"),
    ("network-out", "network, out"),
];

/// Lives more for a host some of whose guests came to no good end: an emulated KVM ends one now and then (docs/linux.md). Each is counted.
const SPARE: usize = 2;

/// What the guest gets over the network, and sends.
const NETWORK_BYTES: usize = 4 << 20;
/// Looks at a console: a part takes a second and more.
const LOOK: Duration = Duration::from_millis(5);

/// What a life came to.
#[derive(Clone, Debug, Default)]
struct Life {
    /// From its start until its first process says so.
    boot: Option<f64>,
    /// Seconds of each part that came to its end.
    parts: [Option<f64>; PARTS.len()],
    /// From its start until its process ended, where it ended by itself and well.
    whole: Option<f64>,
    /// What its exits were for, as far as its process says so.
    exits: Option<Map<String, Value>>,
    /// Why it did not come to its end.
    failed: Option<String>,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If this host has no KVM, or a program is not there. A guest that comes to no good end is a figure.
pub fn measure(files: &Files, runs: usize) -> Result<Sheet> {
    ensure!(Path::new("/dev/kvm").exists(), "this host has no KVM");
    let network = Network::set_up()?;
    let mut sheet = Sheet::new(
        "linux",
        "One Linux guest, side by side, in an emulated host",
    );
    serve_network()?;
    let wanted = |host: &Host| files.only.is_empty() || files.only.contains(host);
    let mut found: Vec<(Host, Vec<Life>)> = Host::ALL
        .into_iter()
        .filter(wanted)
        .map(|host| (host, Vec::new()))
        .collect();
    let directory = tempfile::tempdir().context("make a directory")?;
    let directory = match &files.keep {
        Some(kept) => fs::create_dir_all(kept).map(|()| kept.as_path()),
        None => Ok(directory.path()),
    };
    let directory = directory.context("make a directory")?;
    for round in 0..runs + SPARE {
        for (host, lives) in &mut found {
            let whole = lives.iter().filter(|life| life.whole.is_some()).count();
            if round >= runs && (whole >= runs || !host.works()) {
                continue;
            }
            let life = life(*host, files, &network, directory);
            let life = life.with_context(|| host.name().to_owned())?;
            // It takes minutes: whoever waits is told.
            eprintln!("bench: {}: {life:?}", host.name());
            lives.push(life);
        }
    }
    telling::tell(&mut sheet, &found);
    sheet.note(format!(
        "{runs} run(s) of each in one boot of the host, medians, and up to {SPARE} more where one came to no good end. 256 MiB and one vCPU each, the same kernel and initial RAM disk (prepared where \
         it says so), all files in memory. A pair's boot counts from when both sides were paired, and both its sides are in the one host; checkpoints each 100 ms or with an output. The prepared kernel \
         reads its clock in a page and counts its reads, but where it says that the clock is at a port; it is not preempted."
    ));
    sheet.note(format!(
        "redis-benchmark: {0} SET and {0} GET of 10 connections within the guest. compile-like: 40 times a pipe of short processes, files and \
         hashes. disk: 8 MiB by 64 KiB, written and synced, read with cold caches. network: 4 MiB by TCP to and from this host. Everybody does \
         the same work, once a run.",
        files.requests
    ));
    sheet.note(
        "QEMU has its own devices (virtio over PCI), Doppel its own (virtio over MMIO). QEMU records only under its own emulation of the processor, \
         here an emulation within one: the ratio of its replay to its recording means something, its time beside KVM's little. \
         Figures are an emulator's: read ratios.",
    );
    Ok(sheet)
}

/// The other end of the guest's connections.
fn serve_network() -> Result<()> {
    let listen =
        |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listen for the guest");
    let (sends, takes) = (listen(7001)?, listen(7002)?);
    std::thread::spawn(move || {
        let content = vec![0; NETWORK_BYTES];
        for mut stream in sends.incoming().flatten() {
            // A guest that is gone is told by its console.
            let _ = stream.write_all(&content);
        }
    });
    std::thread::spawn(move || {
        for mut stream in takes.incoming().flatten() {
            let _ = stream.read_to_end(&mut Vec::with_capacity(NETWORK_BYTES));
        }
    });
    Ok(())
}

fn life(host: Host, files: &Files, network: &Network, directory: &Path) -> Result<Life> {
    if let Some(recording) = host.recording()
        && !directory.join(recording.log()).exists()
    {
        return Ok(Life {
            failed: Some("there is no recording".into()),
            ..Life::default()
        });
    }
    let own = directory.join(host.key());
    // Of an earlier guest; there is none before the first.
    let _ = fs::remove_dir_all(&own);
    fs::create_dir(&own).context("make a directory")?;
    let console = own.join("console");
    let net = network
        .port()
        .inheritable()
        .context("share the network port")?;
    let place = Place {
        host,
        files,
        directory: &own,
        log: &directory.join(host.log()),
        console: &console,
        net: &net,
    };
    let limit = Duration::from_secs(files.limit);
    let life = watch(&mut place.start()?, host, &console, limit)?;
    if files.keep.is_none() {
        fs::remove_dir_all(&own).context("remove a guest's files")?;
    }
    Ok(life)
}

/// Follows a guest's console until its process ends, or the time is up.
fn watch(started: &mut Started, host: Host, console: &Path, limit: Duration) -> Result<Life> {
    let mut life = Life::default();
    let mut lines = 0;
    let mut begins = [None; PARTS.len()];
    let mut done = false;
    let code = loop {
        let ended = started.processes[0].try_wait().context("look at a guest")?;
        let at = started.begun.elapsed();
        let text = fs::read(console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // The last line may be half there.
        let whole: Vec<&str> = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .collect();
        for line in &whole[lines.min(whole.len())..] {
            hear(line.trim(), at, &mut life, &mut begins);
            done |= line.starts_with("guest: done");
        }
        lines = whole.len();
        if let Some(code) = ended {
            break Some(code);
        }
        if at > limit {
            break None;
        }
        std::thread::sleep(LOOK);
    };
    // A replay has no console of its own: its end says that all of it was there.
    done |= host == Host::Again;
    let [said, errors] = started
        .said
        .each_ref()
        .map(|file| fs::read_to_string(file).unwrap_or_default());
    life.exits = exits(&said);
    match code {
        Some(code) if code.success() && done => {
            life.whole = Some(started.begun.elapsed().as_secs_f64());
        }
        ended => {
            let why = match ended {
                Some(code) => format!("ended with {code}"),
                None => format!("not at its end after {} s", limit.as_secs()),
            };
            let console = fs::read(console).unwrap_or_default();
            let console = last_words(&String::from_utf8_lossy(&console));
            let errors = last_words(&errors);
            life.failed = Some(format!("{why}; it said: {errors}; its guest: {console}"));
        }
    }
    Ok(life)
}

/// The last lines of a text, as one.
fn last_words(text: &str) -> String {
    const LINES: usize = 3;
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(LINES)..].join(" / ")
}

/// What a process of Doppel's says of its guest's exits when that has ended.
fn exits(said: &str) -> Option<Map<String, Value>> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|event| event["exits"].as_object().cloned())
}

/// Takes in a line that was there at this time since the guest's start.
fn hear(line: &str, at: Duration, life: &mut Life, begins: &mut [Option<Duration>; PARTS.len()]) {
    // QEMU's firmware leaves its last line open.
    if line.contains("guest: up") {
        life.boot.get_or_insert(at.as_secs_f64());
    }
    let part = |name: &str| PARTS.iter().position(|(part, _)| *part == name);
    if let Some(index) = line.strip_prefix("mark begin ").and_then(part) {
        begins[index] = Some(at);
    }
    if let Some(index) = line.strip_prefix("mark end ").and_then(part) {
        life.parts[index] = begins[index].map(|begun| (at - begun).as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_on_a_console_are_times() {
        let mut life = Life::default();
        let mut begins = [None; PARTS.len()];
        let at = Duration::from_secs;
        for (seconds, line) in [
            (
                7,
                "Booting from ROM..guest: up after 6.5 s, clock acpi_pm, 1 CPUs",
            ),
            (8, "mark begin redis"),
            (9, "guest: up after a reset"),
            (12, "mark end redis"),
            (13, "mark begin compile"),
            (14, "mark failed compile: no memory"),
            (15, "mark end disk-read"),
        ] {
            hear(line, at(seconds), &mut life, &mut begins);
        }
        assert_eq!(life.boot, Some(7.0));
        assert_eq!(life.parts, [Some(4.0), None, None, None, None, None]);
    }

    #[test]
    fn a_guests_exits_are_found_among_what_its_process_says() {
        let said =
            "{\"event\":\"ready\"}\nnot JSON\n{\"event\":\"exits\",\"exits\":{\"time\":7}}\n";
        assert_eq!(exits(said).unwrap()["time"], 7);
        assert_eq!(exits("{\"event\":\"ready\"}\n"), None);
    }

    #[test]
    fn the_last_words_are_the_last_lines() {
        assert_eq!(last_words("a\nb\n\nc\r\nd\n"), "b / c / d");
        assert_eq!(last_words(""), "");
    }
}
