//! The agent inside a host: it starts commands for those outside, and tells them what comes out.
//!
//! It speaks [`wire`](super::wire) over the host's virtio-serial port named [`PORT`].
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use hypervisor::kvm::KvmSource;
use rdma_log::locks::lock;

use super::process::{Signal, await_end, signal_group};
use super::wire::{AGENT, Credit, Frame, Kind, MAX_PAYLOAD, Start};

/// The name of the port on both sides.
pub const PORT: &str = "doppel.lab";

/// How long the port may take to appear after the driver was loaded.
const PORT_WITHIN: Duration = Duration::from_secs(30);

/// Serves until the stream ends.
///
/// # Errors
/// If there is no port, or what is read from it is out of step.
pub fn serve() -> Result<()> {
    let _held = hold_a_machine();
    let port = find_port()?;
    let mut reader = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&port)
        .with_context(|| format!("open {}", port.display()))?;
    let writer: Writer = Arc::new(Mutex::new(reader.try_clone().context("share the port")?));
    say(&writer, &Frame::new(AGENT, Kind::Ready, Vec::new()))?;
    let mut commands = BTreeMap::<u32, Arc<Running>>::new();
    while let Some(frame) = Frame::read(&mut reader).context("read the port")? {
        commands.retain(|_, running| !running.is_over());
        match frame.kind {
            Kind::Start => match start(&frame, &writer) {
                Ok(running) => {
                    commands.insert(frame.channel, running);
                }
                Err(error) => say(
                    &writer,
                    &Frame::new(frame.channel, Kind::Failed, format!("{error:#}")),
                )?,
            },
            // What comes for a command that has just ended has no meaning any more.
            kind => {
                if let Some(running) = commands.get(&frame.channel) {
                    match kind {
                        Kind::Input => running.input(frame.payload),
                        Kind::Credit => running.credit.give(frame.as_number()?.max(0) as usize),
                        Kind::Kill => running.kill(),
                        other => eprintln!("lab agent: {other:?} is nothing for an agent"),
                    }
                }
            }
        }
    }
    Ok(())
}

/// A virtual machine that does nothing, for as long as the host runs; none where there is no KVM.
///
/// When the first one of a host is made, or the last one ends, the kernel patches its own scheduler (the static key of preemption
/// notifiers; with a vCPU that has no local APIC, parts of KVM, too), while a host's CPUs, where it has several, run through it. The emulator, which
/// translates for each CPU in a thread of its own, was seen to go on for ever with the breakpoint that stands there for the time of
/// the patch: one CPU in `asm_exc_int3` at `__schedule`, over and over, with the lock of its run queue, the other waiting for
/// that. So the first comes while the host still has nothing to do, and the last is this one.
fn hold_a_machine() -> Option<impl Sized> {
    let vm = KvmSource::default().open().ok()?.create_vm().ok()?;
    let vcpu = vm.create_vcpu(0).ok()?;
    Some((vm, vcpu))
}

type Writer = Arc<Mutex<File>>;

fn say(writer: &Writer, frame: &Frame) -> Result<()> {
    let mut port = lock(writer);
    frame.write(&mut *port).context("write to the port")
}

fn find_port() -> Result<PathBuf> {
    let deadline = std::time::Instant::now() + PORT_WITHIN;
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = PathBuf::from("/dev").join(entry.file_name());
            if name.trim() == PORT && device.exists() {
                return Ok(device);
            }
        }
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "no virtio-serial port is named {PORT}: is virtio_console loaded?"
        );
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A command that was started.
#[derive(Debug)]
struct Running {
    /// Its process id, which is that of its group too, until it has been waited for.
    process: Mutex<Option<u32>>,
    input: Mutex<Option<Sender<Vec<u8>>>>,
    credit: Credit,
}

impl Running {
    fn is_over(&self) -> bool {
        lock(&self.process).is_none()
    }

    fn input(&self, bytes: Vec<u8>) {
        let mut input = lock(&self.input);
        if bytes.is_empty() {
            *input = None;
        } else if let Some(to) = &*input {
            // The command may have closed its input, which is its right.
            let _ = to.send(bytes);
        }
    }

    fn kill(&self) {
        let process = lock(&self.process);
        if let Some(process) = *process {
            // A group that is gone needs no signal.
            let _ = signal_group(process, Signal::Kill);
        }
        drop(process);
        // Threads that wait for credit end too.
        self.credit.lift();
    }
}

fn start(frame: &Frame, writer: &Writer) -> Result<Arc<Running>> {
    let start: Start = serde_json::from_slice(&frame.payload).context("read what to start")?;
    let (program, words) = start.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command
        .args(words)
        .envs(start.environment.iter().cloned())
        .current_dir("/root")
        .process_group(0);
    if let Some(path) = &start.detached_to {
        let output = File::create(path).with_context(|| format!("make {path}"))?;
        let errors = output.try_clone().context("share the output's file")?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
    } else {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let (to_input, input) = channel();
    let running = Arc::new(Running {
        process: Mutex::new(Some(child.id())),
        input: Mutex::new(Some(to_input)),
        credit: Credit::default(),
    });
    let channel = frame.channel;
    if start.detached_to.is_some() {
        say(
            writer,
            &Frame::new(channel, Kind::Output, format!("{}\n", child.id())),
        )?;
        say(writer, &Frame::number(channel, Kind::Ended, 0))?;
        std::thread::spawn(move || {
            // Nobody asks for its code; it must only not stay a zombie.
            let _ = child.wait();
        });
        *lock(&running.process) = None;
        return Ok(running);
    }
    feed(&mut child, input, channel, writer);
    let mut readers = Vec::new();
    if let Some(output) = child.stdout.take() {
        readers.push(drain(output, Kind::Output, channel, &running, writer));
    }
    if let Some(errors) = child.stderr.take() {
        readers.push(drain(errors, Kind::Error, channel, &running, writer));
    }
    let (watched, writer) = (Arc::clone(&running), Arc::clone(writer));
    std::thread::spawn(move || wait(child, readers, channel, &watched, &writer));
    Ok(running)
}

/// Hands the client's bytes to the command, and gives credit for what it has taken.
fn feed(child: &mut Child, input: Receiver<Vec<u8>>, channel: u32, writer: &Writer) {
    let Some(mut stdin) = child.stdin.take() else {
        return;
    };
    let writer = Arc::clone(writer);
    std::thread::spawn(move || {
        let mut open = true;
        for bytes in input {
            // A command that reads no more must not make the client wait for credit.
            open = open && stdin.write_all(&bytes).is_ok();
            let taken = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            if say(&writer, &Frame::number(channel, Kind::Credit, taken)).is_err() {
                return;
            }
        }
    });
}

fn drain(
    mut from: impl Read + Send + 'static,
    kind: Kind,
    channel: u32,
    running: &Arc<Running>,
    writer: &Writer,
) -> std::thread::JoinHandle<()> {
    let (running, writer) = (Arc::clone(running), Arc::clone(writer));
    std::thread::spawn(move || {
        let mut buffer = vec![0; MAX_PAYLOAD];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(running.credit.take(rest.len()));
                if say(&writer, &Frame::new(channel, kind, now)).is_err() {
                    return;
                }
                rest = later;
            }
        }
    })
}

/// Like ssh: the command is over when it has ended and nobody holds its output any more.
fn wait(
    mut child: Child,
    readers: Vec<std::thread::JoinHandle<()>>,
    channel: u32,
    running: &Running,
    writer: &Writer,
) {
    // Who outlives the command and holds its output can be ended by its group, so that stays valid until here:
    // the leader is waited for last.
    for reader in readers {
        let _ = reader.join();
    }
    await_end(child.id());
    let mut process = lock(&running.process);
    let status = child.wait();
    *process = None;
    drop(process);
    let code = match status {
        Ok(status) => status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(_) => 255,
    };
    if let Err(error) = say(writer, &Frame::number(channel, Kind::Ended, code)) {
        eprintln!("lab agent: {error:#}");
    }
}
