//! Where a guest lives: its processes, and what they are told.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Files;
use super::hosts::Host;
use crate::world::{doppel, end_with_us};

const MEMORY_MIB: &str = "256";
const DISK_BYTES: u64 = 16 << 20;
/// For a step of a pair's start: it reads 90 MB.
const PATIENCE: Duration = Duration::from_secs(60);
/// Looks at what a side has said.
const LOOK: Duration = Duration::from_millis(5);

/// A pair within an emulated host has the patience of one across two (docs/lab.md): its sides share two processors that stand still whenever
/// the machine below has something else to do.
const TIMES: &str = "[timing]\nheartbeat_ms = 50\nsilence_ms = 2000\n";

/// QEMU's processor over KVM: as Doppel's is, the host's. Of `host` as it is QEMU sets a register of KVM's own, MSR_KVM_ASYNC_PF_INT, which KVM
/// refuses where the local APIC is not its own (`kernel-irqchip=off`), and QEMU then ends itself.
const QEMU_CPU: &str = "host,-kvm-asyncpf-int";

/// One guest's place.
pub struct Place<'a> {
    /// Who runs it.
    pub host: Host,
    /// What is run.
    pub files: &'a Files,
    /// For files of this host's.
    pub directory: &'a Path,
    /// Its recording, or the one that it replays.
    pub log: &'a Path,
    /// What the guest says.
    pub console: &'a Path,
    /// Its network.
    pub net: &'a OwnedFd,
}

/// Processes of a machine, the one that serves first; ended when dropped.
pub struct Started {
    /// They.
    pub processes: Vec<Child>,
    /// From when on the guest's time is counted.
    pub begun: Instant,
    /// The first one's standard output, and its errors.
    pub said: [PathBuf; 2],
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
    /// Starts the guest there.
    ///
    /// # Errors
    /// If a process cannot be started, or a pair does not come to be.
    pub fn start(&self) -> Result<Started> {
        match self.host {
            Host::Checkpoint | Host::Replay => self.pair(),
            host if host.is_qemu() => self.qemu(),
            _ => self.one(),
        }
    }

    /// The guest's files and its words.
    fn guest(&self) -> [String; 3] {
        let (kernel, initrd) = if self.host.is_prepared() {
            (&self.files.prepared, &self.files.prepared_initrd)
        } else {
            (&self.files.kernel, &self.files.initrd)
        };
        let words = if self.host.works() {
            let requests = self.files.requests;
            format!("quiet guest.do=measure guest.ip=10.77.0.2/24 guest.requests={requests}")
        } else {
            "quiet guest.do=boot".to_owned()
        };
        [
            kernel.display().to_string(),
            initrd.display().to_string(),
            words,
        ]
    }

    /// An empty disk for a side.
    fn disk(&self, side: &str) -> Result<PathBuf> {
        let path = self.directory.join(format!("{side}.disk"));
        File::create(&path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .context("make a disk's image")?;
        Ok(path)
    }

    fn said(&self, name: &str) -> [PathBuf; 2] {
        ["said", "errors"].map(|ending| self.directory.join(format!("{name}.{ending}")))
    }

    fn spawn(&self, name: &str, mut command: Command) -> Result<Child> {
        let [said, errors] = self.said(name);
        command
            .stdin(Stdio::null())
            .stdout(File::create(said).context("make a file")?)
            .stderr(File::create(errors).context("make a file")?);
        end_with_us(&mut command);
        command.spawn().with_context(|| format!("start {name}"))
    }

    fn doppel(&self, role: &str) -> Result<Command> {
        let [kernel, initrd, words] = self.guest();
        let mut command = Command::new(doppel()?);
        command.args([role, "--json"]);
        if role == "replay" {
            command.arg(self.log);
            return Ok(command);
        }
        command
            .args([
                "--kernel", &kernel, "--initrd", &initrd, "--memory", MEMORY_MIB,
            ])
            .args(["--command-line", &words, "--on-reset", "end"]);
        match self.host {
            Host::Alone | Host::Checkpoint => command.args(["--cpu", "host"]),
            Host::Timer => command.args(["--cpu", "replayable", "--clock", "timer"]),
            _ => command.args(["--cpu", "replayable", "--clock", "page"]),
        };
        if self.host.works() {
            command.arg("--disk").arg(self.disk(role)?);
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
        let mut command = self.doppel(role)?;
        if role != "replay" {
            command.arg("--console").arg(self.console);
        }
        if role == "record" {
            command.arg("--out").arg(self.log);
        }
        let begun = Instant::now();
        Ok(Started {
            processes: vec![self.spawn(role, command)?],
            begun,
            said: self.said(role),
        })
    }

    fn pair(&self) -> Result<Started> {
        let replicate = match self.host {
            Host::Checkpoint => "checkpoint",
            _ => "replay",
        };
        let place = |name: &str| self.directory.join(format!("{replicate}.{name}"));
        let arbiter = place("arbiter");
        fs::create_dir(&arbiter).context("make a directory for the arbiter")?;
        let times = self.directory.join("times.toml");
        fs::write(&times, TIMES).context("write a configuration")?;
        let mut processes = Vec::new();
        for (role, said) in [("backup", "\"ready\""), ("primary", "\"paired\"")] {
            let mut command = self.doppel(role)?;
            command
                .arg("--config")
                .arg(&times)
                .args(["--transport", "shm", "--replicate", replicate, "--socket"])
                .arg(place("sock"))
                .arg("--arbiter")
                .arg(&arbiter)
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
            let [heard, errors] = self.said(role);
            while !fs::read_to_string(&heard).is_ok_and(|text| text.contains(said)) {
                ensure!(
                    Instant::now() < until,
                    "the {role} did not say {said}: {}",
                    fs::read_to_string(errors).unwrap_or_default()
                );
                std::thread::sleep(LOOK);
            }
        }
        processes.reverse();
        Ok(Started {
            processes,
            begun: Instant::now(),
            said: self.said("primary"),
        })
    }

    fn qemu(&self) -> Result<Started> {
        let [kernel, initrd, words] = self.guest();
        let mut command = Command::new("qemu-system-x86_64");
        if let Some(firmware) = &self.files.firmware {
            command.arg("-L").arg(firmware);
        }
        if let Some(modules) = &self.files.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        let words =
            format!("console=ttyS0 nolapic noapic mitigations=off no_timer_check panic=-1 {words}");
        command
            .args(["-machine", "pc,usb=off,graphics=off,hpet=off"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-m", MEMORY_MIB])
            .args(["-kernel", &kernel, "-initrd", &initrd, "-append", &words]);
        let icount = |mode: &str| format!("shift=5,rr={mode},rrfile={}", self.log.display());
        match self.host {
            Host::QemuRecord => command.args(["-accel", "tcg", "-icount", &icount("record")]),
            Host::QemuAgain => command.args(["-accel", "tcg", "-icount", &icount("replay")]),
            _ => {
                let net = format!("tap,id=net,fd={}", self.net.as_raw_fd());
                let disk = self.disk("qemu")?;
                let drive = format!("if=none,id=disk,format=raw,file={}", disk.display());
                let card = "virtio-net-pci,netdev=net,mac=02:d0:99:e1:00:01,romfile=";
                command
                    .args(["-accel", "kvm,kernel-irqchip=off", "-cpu", QEMU_CPU])
                    .args(["-netdev", &net, "-device", card])
                    .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"])
            }
        };
        command
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()));
        let begun = Instant::now();
        Ok(Started {
            processes: vec![self.spawn("qemu", command)?],
            begun,
            said: self.said("qemu"),
        })
    }
}
