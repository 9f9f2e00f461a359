//! One host as a QEMU process: its command line, and what its monitor is asked for.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::NETWORKS;
use super::agent::PORT;
use super::image::Image;
use super::process::die_with_parent;
use super::tsc;

/// The emulator.
const QEMU: &str = "qemu-system-x86_64";

/// All that the emulator can do, but the promise that a string instruction is the quickest copy: it does those byte by byte, and kernel
/// and C library believe it. Without, 64 KiB are copied in a seventh of the time, and a host boots in two thirds.
const CPU: &str = "max,-erms";

/// How long the monitor may take to answer. It is a thread of the emulator's that does nothing else for long.
const MONITOR_WITHIN: Duration = Duration::from_secs(10);

/// What the kernel is told.
///
/// - `tsc=reliable`: the emulated time-stamp counter is one for all CPUs, but does not say so; without this every reading of
///   the clock goes to the emulated HPET, some 20 µs instead of 0.1.
/// - `tsc_early_khz`, added where it is used: its frequency, which a kernel that boots on a busy machine measures wrongly.
/// - `mitigations=off`: against attacks on real processors, which cost an emulated one about a tenth.
/// - `no_timer_check`: on a busy machine the check whether timer interrupts come fails for no reason.
/// - `net.ifnames=0`: cards keep their names under udev too.
/// - `rootfstype=ramfs`: a tmpfs would be half of memory and no more.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 rootfstype=ramfs tsc=reliable mitigations=off no_timer_check nokaslr net.ifnames=0";

/// What a host is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostSpec {
    /// From 1.
    pub number: u8,
    /// MiB of memory.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u8,
    /// The largest packet of its network cards, in bytes.
    pub mtu: u16,
}

impl HostSpec {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        format!("h{}", self.number)
    }
}

/// The command that boots it. All its files lie in `directory`, which the process works in: paths of sockets are short.
#[must_use]
pub fn command(spec: &HostSpec, image: &Image, directory: &Path) -> Command {
    let name = spec.name();
    let mut command = Command::new(QEMU);
    command
        .current_dir(directory)
        .args(["-name", &format!("doppel-lab-{name}")])
        // Several threads: one for each virtual CPU.
        .args(["-accel", "tcg,thread=multi", "-cpu", CPU])
        .args(["-machine", "pc,usb=off,graphics=off"])
        .args(["-smp", &spec.cpus.to_string()])
        .args(["-m", &spec.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs)
        .args([
            "-append",
            &format!(
                "{KERNEL_WORDS} tsc_early_khz={} lab.number={} lab.name={name} lab.mtu={}",
                tsc::frequency(),
                spec.number,
                spec.mtu
            ),
        ])
        .args(["-chardev", "file,id=console,path=console.log,append=on"])
        .args(["-serial", "chardev:console"])
        .args(["-qmp", "unix:monitor.sock,server=on,wait=off"])
        .args(["-device", "virtio-serial-pci"])
        .args(["-chardev", "socket,id=agent,path=agent.sock"])
        .args([
            "-device",
            &format!("virtserialport,chardev=agent,name={PORT}"),
        ])
        .args(["-device", "virtio-rng-pci"])
        .args([
            "-fsdev",
            "local,id=shared,path=../shared,security_model=none,multidevs=remap",
        ])
        .args(["-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared"]);
    for network in 0..NETWORKS {
        command
            .args([
                "-netdev",
                &format!("stream,id=net{network},addr.type=unix,addr.path=cable{network}.sock"),
            ])
            .args([
                "-device",
                &format!(
                    "virtio-net-pci,netdev=net{network},mac=52:54:00:88:{network:02x}:{:02x},host_mtu={},romfile=",
                    spec.number, spec.mtu
                ),
            ]);
    }
    command.stdin(Stdio::null());
    die_with_parent(&mut command);
    command
}

/// Asks the monitor of a host to do something.
///
/// # Errors
/// If it does not answer in time, or refuses.
pub fn monitor(socket: &Path, what: &str) -> Result<()> {
    let stream = UnixStream::connect(socket).context("reach the emulator's monitor")?;
    stream
        .set_read_timeout(Some(MONITOR_WITHIN))
        .context("limit the wait")?;
    let mut writer = stream.try_clone().context("share the socket")?;
    let mut reader = BufReader::new(stream);
    let mut answer = || -> Result<Value> {
        let mut line = String::new();
        let read = reader.read_line(&mut line).with_context(|| {
            format!("the emulator does not answer within {MONITOR_WITHIN:?}: kill the host")
        })?;
        anyhow::ensure!(read > 0, "the emulator has hung up");
        serde_json::from_str(&line).context("read the emulator's answer")
    };
    answer()?;
    for execute in ["qmp_capabilities", what] {
        writeln!(writer, "{}", json!({ "execute": execute })).context("ask the emulator")?;
        loop {
            let said = answer()?;
            if said.get("return").is_some() {
                break;
            }
            if let Some(error) = said.get("error") {
                bail!("the emulator refuses to {execute}: {error}");
            }
        }
    }
    Ok(())
}
