//! One Linux guest and its work under whoever can run it: Doppel alone and protected both ways, QEMU over the same KVM, and QEMU's own
//! record and replay beside Doppel's. To be run in a host whose KVM runs Linux, as a host of the lab is.
//!
//! The guest says on its console where a part of its work begins and ends; times are this host's, from when the line was there. So a guest
//! whose clock is another's is measured like all others, and what a protected one says counts when it has left.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::draw::Panel;
use crate::sheet::{Sheet, Table, median, round};
use crate::world::{Network, doppel, end_with_us};

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
    /// Longest life of a guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 100)]
    limit: u64,
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

const MEMORY_MIB: &str = "256";
const DISK_BYTES: u64 = 16 << 20;
/// What the guest gets over the network, and sends.
const NETWORK_BYTES: usize = 4 << 20;
/// Looks at a console: a part takes a second and more.
const LOOK: Duration = Duration::from_millis(5);
/// For a step of a pair's start: it reads 90 MB.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Alone,
    AlonePrepared,
    Checkpoint,
    Replay,
    Qemu,
    /// These boot the guest only: nobody's recording is asked for more.
    Record,
    Again,
    QemuRecord,
    QemuAgain,
}

impl Host {
    const ALL: [Self; 9] = [
        Self::Alone,
        Self::Checkpoint,
        Self::AlonePrepared,
        Self::Replay,
        Self::Record,
        Self::Again,
        Self::Qemu,
        Self::QemuRecord,
        Self::QemuAgain,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Alone => "doppel run, the host's CPU",
            Self::AlonePrepared => "doppel run, prepared kernel",
            Self::Checkpoint => "protected by checkpoints",
            Self::Replay => "protected by replay, prepared kernel",
            Self::Qemu => "QEMU, -accel kvm,kernel-irqchip=off",
            Self::Record => "doppel record, prepared kernel",
            Self::Again => "doppel replay of that",
            Self::QemuRecord => "QEMU, -icount shift=7,rr=record",
            Self::QemuAgain => "QEMU, rr=replay of that",
        }
    }

    fn works(self) -> bool {
        matches!(
            self,
            Self::Alone | Self::AlonePrepared | Self::Checkpoint | Self::Replay | Self::Qemu
        )
    }

    fn is_prepared(self) -> bool {
        matches!(
            self,
            Self::AlonePrepared | Self::Replay | Self::Record | Self::Again
        )
    }

    /// A replay says what its recording says, in this file.
    fn recording(self) -> Option<Self> {
        match self {
            Self::Again => Some(Self::Record),
            Self::QemuAgain => Some(Self::QemuRecord),
            _ => None,
        }
    }
}

/// What a life came to.
#[derive(Clone, Debug, Default)]
struct Life {
    /// From its start until its first process says so.
    boot: Option<f64>,
    /// Seconds of each part that came to its end.
    parts: [Option<f64>; PARTS.len()],
    /// From its start until its process ended, where it ended by itself and well.
    whole: Option<f64>,
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
    let mut found: Vec<(Host, Vec<Life>)> = Host::ALL.map(|host| (host, Vec::new())).into();
    let directory = tempfile::tempdir().context("make a directory")?;
    for round in 0..runs + SPARE {
        for (host, lives) in &mut found {
            let whole = lives.iter().filter(|life| life.whole.is_some()).count();
            if round >= runs && (whole >= runs || !host.works()) {
                continue;
            }
            let life = life(*host, files, &network, directory.path());
            let life = life.with_context(|| host.name().to_owned())?;
            // It takes minutes: whoever waits is told.
            eprintln!("bench: {}: {life:?}", host.name());
            lives.push(life);
        }
    }
    tell(&mut sheet, &found);
    sheet.note(format!(
        "{runs} run(s) of each in one boot of the host, medians, and up to {SPARE} more where one came to no good end. 256 MiB and one vCPU each, the same kernel and initial RAM disk (prepared where \
         it says so), all files in memory. A pair's boot counts from when both sides were paired; intervals of 100 ms or until an output."
    ));
    sheet.note(
        "redis-benchmark: 2000 SET and 2000 GET of 10 connections within the guest. compile-like: 40 times a pipe of short processes, files and \
         hashes. disk: 8 MiB by 64 KiB, written and synced, read with cold caches. network: 4 MiB by TCP to and from this host.",
    );
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
        && !directory.join(log_of(recording)).exists()
    {
        return Ok(Life {
            failed: Some("there is no recording".into()),
            ..Life::default()
        });
    }
    let console = directory.join("console");
    // What an earlier guest said; there is none before the first.
    let _ = fs::remove_file(&console);
    let disk = |side: &str| -> Result<PathBuf> {
        let path = directory.join(format!("{side}.disk"));
        // What an earlier machine left, and the mark that says whose it is.
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(directory.join(format!("{side}.disk.doppel")));
        File::create(&path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .context("make a disk's image")?;
        Ok(path)
    };
    let [one, other] = [disk("one")?, disk("other")?];
    let inheritable = network
        .port()
        .inheritable()
        .context("share the network port")?;
    let place = Place {
        host,
        files,
        directory,
        console: &console,
        disks: [&one, &other],
        net: &inheritable,
    };
    let mut started = match host {
        Host::Checkpoint | Host::Replay => place.pair()?,
        Host::Qemu | Host::QemuRecord | Host::QemuAgain => place.qemu()?,
        _ => place.one()?,
    };
    watch(
        &mut started,
        host,
        &console,
        Duration::from_secs(files.limit),
    )
}

fn log_of(host: Host) -> &'static str {
    match host {
        Host::QemuRecord | Host::QemuAgain => "qemu.log",
        _ => "doppel.log",
    }
}

/// Where a guest lives.
struct Place<'a> {
    host: Host,
    files: &'a Files,
    directory: &'a Path,
    console: &'a Path,
    disks: [&'a Path; 2],
    net: &'a OwnedFd,
}

/// Processes of a machine, the one that serves first; ended when dropped.
struct Started {
    processes: Vec<Child>,
    begun: Instant,
    errors: PathBuf,
}

impl Drop for Started {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // Both fail only for a child that was reaped.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Place<'_> {
    /// The guest's files and its words.
    fn guest(&self) -> [String; 3] {
        let (kernel, initrd) = if self.host.is_prepared() {
            (&self.files.prepared, &self.files.prepared_initrd)
        } else {
            (&self.files.kernel, &self.files.initrd)
        };
        let words = if self.host.works() {
            "quiet guest.do=measure guest.ip=10.77.0.2/24"
        } else {
            "quiet guest.do=boot"
        };
        [
            kernel.display().to_string(),
            initrd.display().to_string(),
            words.into(),
        ]
    }

    fn spawn(&self, name: &str, mut command: Command) -> Result<Child> {
        let file = |ending: &str| {
            File::create(self.directory.join(format!("{name}.{ending}"))).context("make a file")
        };
        command
            .stdin(Stdio::null())
            .stdout(file("said")?)
            .stderr(file("errors")?);
        end_with_us(&mut command);
        command.spawn().with_context(|| format!("start {name}"))
    }

    fn doppel(&self, role: &str, disk: Option<&Path>) -> Result<Command> {
        let [kernel, initrd, words] = self.guest();
        let mut command = Command::new(doppel()?);
        command.args([role, "--json"]);
        if role == "replay" {
            command.arg(self.directory.join(log_of(self.host)));
            return Ok(command);
        }
        command
            .args([
                "--kernel", &kernel, "--initrd", &initrd, "--memory", MEMORY_MIB,
            ])
            .args(["--command-line", &words, "--on-reset", "end"]);
        command.args([
            "--cpu",
            if self.host.is_prepared() {
                "replayable"
            } else {
                "host"
            },
        ]);
        if let Some(disk) = disk {
            command.arg("--disk").arg(disk);
            command.args(["--net-fd", &self.net.as_raw_fd().to_string()]);
        }
        Ok(command)
    }

    /// One process of Doppel's.
    fn one(&self) -> Result<Started> {
        let role = match self.host {
            Host::Record => "record",
            Host::Again => "replay",
            _ => "run",
        };
        let disk = self.host.works().then_some(self.disks[0]);
        let mut command = self.doppel(role, disk)?;
        if role != "replay" {
            command.arg("--console").arg(self.console);
        }
        if role == "record" {
            command
                .arg("--out")
                .arg(self.directory.join(log_of(self.host)));
        }
        let begun = Instant::now();
        Ok(Started {
            processes: vec![self.spawn(role, command)?],
            begun,
            errors: self.directory.join(format!("{role}.errors")),
        })
    }

    fn pair(&self) -> Result<Started> {
        let replicate = match self.host {
            Host::Checkpoint => "checkpoint",
            _ => "replay",
        };
        let place = |name: &str| self.directory.join(format!("{replicate}.{name}"));
        let started = place("arbiter");
        // A pair's record outlives it: each run is another machine.
        let _ = fs::remove_dir_all(&started);
        fs::create_dir(&started).context("make a directory for the arbiter")?;
        let mut processes = Vec::new();
        for (role, disk, said) in [
            ("backup", self.disks[1], "\"ready\""),
            ("primary", self.disks[0], "\"paired\""),
        ] {
            let mut command = self.doppel(role, Some(disk))?;
            command
                .args(["--transport", "shm", "--replicate", replicate, "--socket"])
                .arg(place("sock"))
                .arg("--arbiter")
                .arg(&started)
                .arg("--run-dir")
                .arg(place("run"));
            if self.host == Host::Checkpoint {
                command.args(["--interval-ms", "100"]);
            }
            let console = match role {
                "primary" => self.console.to_owned(),
                _ => place("backup.console"),
            };
            command.arg("--console").arg(console);
            processes.push(self.spawn(role, command)?);
            let until = Instant::now() + PATIENCE;
            let heard = self.directory.join(format!("{role}.said"));
            while !fs::read_to_string(&heard).is_ok_and(|text| text.contains(said)) {
                ensure!(
                    Instant::now() < until,
                    "the {role} did not say {said}: {}",
                    fs::read_to_string(self.directory.join(format!("{role}.errors")))
                        .unwrap_or_default()
                );
                std::thread::sleep(LOOK);
            }
        }
        processes.reverse();
        Ok(Started {
            processes,
            begun: Instant::now(),
            errors: self.directory.join("primary.errors"),
        })
    }

    fn qemu(&self) -> Result<Started> {
        let [kernel, initrd, words] = self.guest();
        let mut command = Command::new("qemu-system-x86_64");
        if let Some(firmware) = &self.files.firmware {
            command.arg("-L").arg(firmware);
        }
        let words =
            format!("console=ttyS0 nolapic noapic mitigations=off no_timer_check panic=-1 {words}");
        command
            .args([
                "-machine",
                "pc,usb=off,graphics=off,hpet=off",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-no-reboot", "-display", "none", "-m", MEMORY_MIB])
            .args(["-kernel", &kernel, "-initrd", &initrd, "-append", &words]);
        let log = self.directory.join(log_of(self.host));
        let icount = |mode: &str| format!("shift=7,rr={mode},rrfile={}", log.display());
        match self.host {
            Host::QemuRecord => command.args(["-accel", "tcg", "-icount", &icount("record")]),
            Host::QemuAgain => command.args(["-accel", "tcg", "-icount", &icount("replay")]),
            _ => command
                .args(["-accel", "kvm,kernel-irqchip=off", "-cpu", "host"])
                .args([
                    "-netdev",
                    &format!("tap,id=net,fd={}", self.net.as_raw_fd()),
                ])
                .args([
                    "-device",
                    "virtio-net-pci,netdev=net,mac=02:d0:99:e1:00:01,romfile=",
                ])
                .args([
                    "-drive",
                    &format!(
                        "if=none,id=disk,format=raw,file={}",
                        self.disks[0].display()
                    ),
                ])
                .args(["-device", "virtio-blk-pci,drive=disk"]),
        };
        command
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()));
        let begun = Instant::now();
        Ok(Started {
            processes: vec![self.spawn("qemu", command)?],
            begun,
            errors: self.directory.join("qemu.errors"),
        })
    }
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
    match code {
        Some(code) if code.success() && done => {
            life.whole = Some(started.begun.elapsed().as_secs_f64());
        }
        ended => {
            let errors = fs::read_to_string(&started.errors).unwrap_or_default();
            let last = errors.lines().last().unwrap_or_default();
            let why = match ended {
                Some(code) => format!("ended with {code}"),
                None => format!("not at its end after {} s", limit.as_secs()),
            };
            life.failed = Some(format!("{why} {last}").trim().to_owned());
        }
    }
    Ok(life)
}

/// Takes in a line that was there at this time since the guest's start.
fn hear(line: &str, at: Duration, life: &mut Life, begins: &mut [Option<Duration>; PARTS.len()]) {
    if line.starts_with("guest: up") {
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

/// What is compared: boot, the parts, the whole life.
const COLUMNS: usize = PARTS.len() + 2;

/// Medians of those that came so far, in seconds.
fn medians(lives: &[Life]) -> [Option<f64>; COLUMNS] {
    std::array::from_fn(|column| {
        let of = |life: &Life| match column {
            0 => life.boot,
            column if column <= PARTS.len() => life.parts[column - 1],
            _ => life.whole,
        };
        let all: Vec<f64> = lives.iter().filter_map(of).collect();
        (!all.is_empty()).then(|| round(median(all)))
    })
}

fn tell(sheet: &mut Sheet, found: &[(Host, Vec<Life>)]) {
    let mut names = vec!["", "came to their end"];
    let parts = PARTS.map(|(_, name)| name);
    names.push("boot");
    names.extend(parts);
    names.push("boot to power-off");
    let mut seconds = Table::new("Seconds", &names);
    let mut ratios = Table::new(
        "Time, as a ratio to `doppel run` of the same kernel, a replay's to its recording (1 is equal, 2 takes twice as long)",
        &names,
    );
    let shown = |value: Option<f64>, places: usize| {
        value.map_or_else(|| "–".to_owned(), |value| format!("{value:.places$}"))
    };
    let base = |host: Host| {
        if host.is_prepared() {
            Host::AlonePrepared
        } else {
            Host::Alone
        }
    };
    let of = |host: Host| {
        let found = found.iter().find(|(other, _)| *other == host);
        found.map_or([None; COLUMNS], |(_, lives)| medians(lives))
    };
    let mut rows: Vec<Value> = Vec::new();
    let mut bars = Vec::new();
    for (host, lives) in found {
        let medians = medians(lives);
        let against = of(base(*host));
        let ratio: [Option<f64>; COLUMNS] = std::array::from_fn(|at| {
            if at == COLUMNS - 1 && !host.works() {
                // It only boots; a replay's is compared with its recording.
                return Some(round(medians[at]? / of(host.recording()?)[at]?));
            }
            Some(round(medians[at]? / against[at]?))
        });
        let whole = lives.iter().filter(|life| life.whole.is_some()).count();
        let count = format!("{whole} of {}", lives.len());
        let cells = |values: &[Option<f64>], places| {
            let mut cells = vec![host.name().to_owned(), count.clone()];
            cells.extend(values.iter().map(|&value| shown(value, places)));
            cells
        };
        seconds.rows.push(cells(&medians, 2));
        ratios.rows.push(cells(&ratio, 2));
        if let Some(boot) = medians[0] {
            bars.push((host.name().to_owned(), boot));
        }
        let keyed = |values: &[Option<f64>; COLUMNS]| -> Value {
            let keys = ["boot"]
                .into_iter()
                .chain(PARTS.map(|(key, _)| key))
                .chain(["whole"]);
            keys.zip(values)
                .map(|(key, value)| (key.to_owned(), json!(value)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let failed: Vec<&String> = lives
            .iter()
            .filter_map(|life| life.failed.as_ref())
            .collect();
        for why in &failed {
            sheet.note(format!("{}: {why}", host.name()));
        }
        rows.push(json!({
            "name": host.name(), "runs": lives.len(), "whole": whole, "seconds": keyed(&medians), "ratio": keyed(&ratio), "failed": failed,
        }));
    }
    sheet.figure("hosts", rows);
    sheet.tables = vec![ratios, seconds];
    sheet.panels.push(Panel::Bars {
        title: "Until the guest's first process has come up".into(),
        unit: "s".into(),
        bars,
    });
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
            (7, "guest: up after 6.5 s, clock acpi_pm, 1 CPUs"),
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
    fn lives_that_did_not_come_so_far_are_not_counted() {
        let boots = [Some(3.0), None, Some(5.0)];
        let lives = boots.map(|boot| Life {
            boot,
            ..Life::default()
        });
        assert_eq!(medians(&lives)[0], Some(4.0));
        assert_eq!(medians(&lives)[1..], [None; COLUMNS - 1]);
    }
}
