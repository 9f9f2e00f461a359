//! The process behind a lab: it owns the hosts' emulators and the cables, and does what clients ask for.
//!
//! ```text
//!   Off ──start──▶ Booting ──agent is there──▶ Up ◀──thaw── Frozen
//!    ▲                │                        │ └─freeze──▶ │
//!    └── kill, or the emulator ended by itself ┴─────────────┘
//! ```
//! It works in the lab's directory. The emulators die with it, and it ends when it is asked to, by SIGTERM or SIGINT, or, when
//! it belongs to a test, when that closes its standard input.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rdma_log::locks::lock;

use super::cables::Cables;
use super::control::{CableState, HostState, Power, Reply, Request, Status};
use super::image::Image;
use super::process::{Signal, await_end, signal};
use super::qemu::{self, HostSpec};
use super::switch::{Card, Trouble};
use super::wire::{AGENT, Frame, Kind};
use super::{CONTROL, NETWORKS, PLAN};

mod plug;

/// How long an emulator may take to end after SIGKILL: it frees its memory, on a busy machine.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// A lab to supervise.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// Its hosts.
    pub hosts: Vec<HostSpec>,
    /// What they boot.
    pub kernel: PathBuf,
    /// What they boot.
    pub initramfs: PathBuf,
    /// How long a boot may take, in seconds.
    pub boot_within: u64,
}

/// Runs a lab in the current directory until it is asked to end.
///
/// # Errors
/// If it cannot be set up. A host that does not come up is no error of the supervisor's: who waits for it hears of it.
pub fn supervise(plan: &Plan, owned: bool) -> Result<()> {
    fs::create_dir_all("shared").context("make the shared directory")?;
    let control = UnixListener::bind(CONTROL).context("make the control socket")?;
    let mut cards = Vec::new();
    let mut hosts = BTreeMap::new();
    let mut agents = Vec::new();
    for spec in &plan.hosts {
        let directory = PathBuf::from(spec.name());
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        for network in 0..NETWORKS {
            let card = Card {
                host: spec.number,
                network,
            };
            let listener = UnixListener::bind(directory.join(format!("cable{network}.sock")))
                .context("make a cable's socket")?;
            cards.push((card, listener));
        }
        let agent =
            UnixListener::bind(directory.join("agent.sock")).context("make an agent's socket")?;
        let host = Arc::new(Host::new(spec.clone(), directory));
        agents.push((agent, Arc::clone(&host)));
        hosts.insert(spec.name(), host);
    }
    let cables = Cables::start(cards)?;
    for (listener, host) in agents {
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Err(error) = host.listen(stream) {
                    eprintln!("lab: {}'s agent: {error:#}", host.spec.name());
                }
            }
        });
    }

    let (orders, inbox) = channel();
    let lab = Arc::new(Lab {
        hosts,
        cables,
        orders: orders.clone(),
        plan: plan.clone(),
    });
    for host in lab.hosts.values() {
        lab.order_start(host);
    }
    let serving = Arc::clone(&lab);
    std::thread::spawn(move || {
        for stream in control.incoming().flatten() {
            let lab = Arc::clone(&serving);
            std::thread::spawn(move || lab.serve(stream));
        }
    });
    let mut signals =
        signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
            .context("listen for signals")?;
    let ending = orders.clone();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = ending.send(Order::End(None));
        }
    });
    if owned {
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = orders.send(Order::End(None));
        });
    }
    lab.follow(&inbox)
}

/// What only the process's first thread does: an emulator dies with the thread that started it.
enum Order {
    Start(Arc<Host>),
    /// End everything; then, and only then, the stream is closed.
    End(Option<UnixStream>),
}

struct Lab {
    hosts: BTreeMap<String, Arc<Host>>,
    cables: Cables,
    orders: Sender<Order>,
    plan: Plan,
}

impl Lab {
    fn follow(&self, inbox: &Receiver<Order>) -> Result<()> {
        loop {
            match inbox.recv().context("all who give orders have gone")? {
                Order::Start(host) => self.start(&host),
                Order::End(asker) => {
                    for host in self.hosts.values() {
                        host.kill();
                    }
                    for host in self.hosts.values() {
                        host.wait_until(ENDS_WITHIN, |state| {
                            matches!(state.power, Power::Off | Power::Lost(_))
                        })
                        .map(drop)?;
                    }
                    tidy(&self.plan, Path::new("."))?;
                    drop(asker);
                    return Ok(());
                }
            }
        }
    }

    fn order_start(&self, host: &Arc<Host>) {
        host.state().power = Power::Booting;
        // The receiver lives as long as the process.
        let _ = self.orders.send(Order::Start(Arc::clone(host)));
    }

    fn start(&self, host: &Arc<Host>) {
        let image = Image {
            kernel: self.plan.kernel.clone(),
            initramfs: self.plan.initramfs.clone(),
        };
        // The socket of an emulator that was killed is in the way of the next.
        let _ = fs::remove_file(host.directory.join("monitor.sock"));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(host.directory.join("emulator.log"));
        let mut command = qemu::command(&host.spec, &image, &host.directory);
        if let Ok(log) = log {
            command.stderr(log);
        }
        match command.spawn() {
            Ok(mut child) => {
                let process = child.id();
                host.state().process = Some(process);
                let host = Arc::clone(host);
                let cables = self.cables.clone();
                std::thread::spawn(move || {
                    await_end(process);
                    let mut state = host.state();
                    state.process = None;
                    let status = child.wait();
                    state.power = match (state.killed, status) {
                        (true, _) => Power::Off,
                        (false, Ok(status)) => Power::Lost(format!("its emulator ended: {status}")),
                        (false, Err(error)) => Power::Lost(error.to_string()),
                    };
                    let why = match &state.power {
                        Power::Lost(why) => why.clone(),
                        _ => "it was killed".to_owned(),
                    };
                    state.killed = false;
                    drop(state);
                    cables.with(|switch| switch.forget(host.spec.number));
                    host.lost(&why);
                    host.changed.notify_all();
                });
            }
            Err(error) => {
                host.state().power = Power::Lost(format!(
                    "its emulator cannot be started ({error}): scripts/install-test-tools installs it"
                ));
                host.changed.notify_all();
            }
        }
    }

    fn serve(&self, stream: UnixStream) {
        if let Err(error) = self.converse(stream) {
            eprintln!("lab: a client: {error:#}");
        }
    }

    fn converse(&self, stream: UnixStream) -> Result<()> {
        let mut writer = stream.try_clone().context("share the socket")?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        if reader.read_line(&mut line).context("read a request")? == 0 {
            return Ok(());
        }
        let request: Request = serde_json::from_str(&line).context("read a request")?;
        match request {
            Request::Run { host } => match self.host(&host).and_then(Host::channel) {
                Ok((host, channel, frames)) => {
                    reply(&mut writer, &Reply::Done)?;
                    host.relay(channel, frames, reader, writer)
                }
                Err(error) => reply(&mut writer, &Reply::Refused(format!("{error:#}"))),
            },
            Request::Plug { network, shown } => self.plug(network, shown.as_deref(), writer),
            Request::Down => {
                let _ = self.orders.send(Order::End(Some(writer)));
                Ok(())
            }
            request => {
                let answer = match self.act(request) {
                    Ok(answer) => answer,
                    Err(error) => Reply::Refused(format!("{error:#}")),
                };
                reply(&mut writer, &answer)
            }
        }
    }

    fn host(&self, name: &str) -> Result<&Arc<Host>> {
        self.hosts.get(name).with_context(|| {
            let names: Vec<&str> = self.hosts.keys().map(String::as_str).collect();
            format!("the lab has no host {name:?}; it has {}", names.join(" "))
        })
    }

    fn act(&self, request: Request) -> Result<Reply> {
        match request {
            Request::Status => return Ok(Reply::Status(self.status())),
            Request::AwaitUp { host } => {
                self.host(&host)?.await_up(self.boot_within())?;
            }
            Request::Kill { host } => self.host(&host)?.end()?,
            Request::Start { host } => {
                let host = self.host(&host)?;
                let power = host.state().power.clone();
                ensure!(
                    matches!(power, Power::Off | Power::Lost(_)),
                    "{} is {power}: only a host that is off can be started",
                    host.spec.name()
                );
                self.order_start(host);
                host.await_up(self.boot_within())?;
            }
            Request::Freeze { host, clock_too } => self.host(&host)?.freeze(clock_too)?,
            Request::Thaw { host } => self.host(&host)?.thaw()?,
            Request::Cable {
                network,
                from,
                to,
                trouble,
            } => self.cable(network, &from, &to, trouble)?,
            Request::Heal => self.cables.with(|switch| {
                let all: Vec<_> = switch.troubles().collect();
                for (network, from, to, _) in all {
                    switch.set(network, from, to, Trouble::default());
                }
            }),
            Request::Run { .. } | Request::Plug { .. } | Request::Down => {
                unreachable!("answered by the caller")
            }
        }
        Ok(Reply::Done)
    }

    fn boot_within(&self) -> Duration {
        Duration::from_secs(self.plan.boot_within)
    }

    fn cable(&self, network: Option<u8>, from: &str, to: &str, trouble: Trouble) -> Result<()> {
        let (from, to) = (self.host(from)?.spec.number, self.host(to)?.spec.number);
        ensure!(from != to, "there is no cable from a host to itself");
        if let Some(network) = network {
            ensure!(
                network < NETWORKS,
                "there is no network {network}: they are 0 to {}",
                NETWORKS - 1
            );
        }
        self.cables.with(|switch| {
            for each in 0..NETWORKS {
                if network.is_none_or(|network| network == each) {
                    switch.set(each, from, to, trouble);
                }
            }
        });
        Ok(())
    }

    fn status(&self) -> Status {
        let name = |number: u8| format!("h{number}");
        self.cables.with(|switch| Status {
            supervisor: std::process::id(),
            hosts: self
                .hosts
                .iter()
                .map(|(name, host)| {
                    let state = host.state();
                    HostState {
                        name: name.clone(),
                        power: state.power.clone(),
                        process: state.process,
                        boots: state.boots,
                    }
                })
                .collect(),
            cables: switch
                .troubles()
                .map(|(network, from, to, trouble)| CableState {
                    network,
                    from: name(from),
                    to: name(to),
                    trouble,
                })
                .collect(),
            frames_passed: switch.passed,
            frames_dropped: switch.dropped,
            frames_overflowed: switch.overflowed,
        })
    }
}

fn reply(writer: &mut UnixStream, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_string(reply).context("write an answer")?;
    line.push('\n');
    writer.write_all(line.as_bytes()).context("answer a client")
}

/// Removes from a lab's directory what it needs only while it runs. Logs stay.
///
/// # Errors
/// If something cannot be removed.
pub fn tidy(plan: &Plan, lab: &Path) -> Result<()> {
    let mut files: Vec<PathBuf> = vec![CONTROL.into(), PLAN.into()];
    for spec in &plan.hosts {
        let directory = PathBuf::from(spec.name());
        for network in 0..NETWORKS {
            files.push(directory.join(format!("cable{network}.sock")));
        }
        files.push(directory.join("agent.sock"));
        files.push(directory.join("monitor.sock"));
    }
    for file in files {
        let file = lab.join(file);
        gone(fs::remove_file(&file), &file)?;
    }
    let shared = lab.join("shared");
    gone(fs::remove_dir_all(&shared), &shared)
}

fn gone(removed: std::io::Result<()>, path: &Path) -> Result<()> {
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

struct State {
    power: Power,
    process: Option<u32>,
    /// Whether the emulator's end was asked for.
    killed: bool,
    boots: u32,
    agent: Option<Arc<Mutex<UnixStream>>>,
    clients: BTreeMap<u32, Sender<Frame>>,
    next_channel: u32,
}

struct Host {
    spec: HostSpec,
    directory: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

impl Host {
    fn new(spec: HostSpec, directory: PathBuf) -> Self {
        Self {
            spec,
            directory,
            state: Mutex::new(State {
                power: Power::Off,
                process: None,
                killed: false,
                boots: 0,
                agent: None,
                clients: BTreeMap::new(),
                next_channel: AGENT + 1,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits until the state is as wished; an error says how long it was not.
    fn wait_until(
        &self,
        limit: Duration,
        wished: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>> {
        let (state, waited) = self
            .changed
            .wait_timeout_while(self.state(), limit, |state| !wished(state))
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(
            !waited.timed_out(),
            "{} is still {} after {limit:?}",
            self.spec.name(),
            state.power
        );
        Ok(state)
    }

    fn await_up(&self, limit: Duration) -> Result<()> {
        let state = self.wait_until(limit, |state| state.power != Power::Booting);
        let trouble = match state {
            Ok(state) if state.power == Power::Up => return Ok(()),
            Ok(state) => format!("{} is {}", self.spec.name(), state.power),
            Err(error) => error.to_string(),
        };
        bail!("{trouble}{}", self.last_words())
    }

    /// The end of what the host and its emulator said.
    fn last_words(&self) -> String {
        let mut words = String::new();
        for log in ["console.log", "emulator.log"] {
            let text = fs::read(self.directory.join(log)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(8)..];
            if !last.is_empty() {
                words += &format!("\n{log} ends with:\n{}", last.join("\n"));
            }
        }
        words
    }

    /// Hears the agent of one boot until it is gone.
    fn listen(&self, mut stream: UnixStream) -> Result<()> {
        let writer = Arc::new(Mutex::new(stream.try_clone().context("share the socket")?));
        while let Some(frame) = Frame::read(&mut stream)? {
            if frame.channel == AGENT {
                let mut state = self.state();
                state.agent = Some(Arc::clone(&writer));
                if state.power == Power::Booting {
                    state.power = Power::Up;
                    state.boots += 1;
                }
                drop(state);
                self.changed.notify_all();
                continue;
            }
            let over = matches!(frame.kind, Kind::Ended | Kind::Failed);
            let mut state = self.state();
            let client = if over {
                state.clients.remove(&frame.channel)
            } else {
                state.clients.get(&frame.channel).cloned()
            };
            drop(state);
            if let Some(client) = client {
                // A client that has gone has no use for it.
                let _ = client.send(frame);
            }
        }
        Ok(())
    }

    /// The host has vanished: its clients hear why.
    fn lost(&self, why: &str) {
        let mut state = self.state();
        state.agent = None;
        let clients = std::mem::take(&mut state.clients);
        drop(state);
        for (channel, client) in clients {
            let words = format!("{} is gone: {why}", self.spec.name());
            let _ = client.send(Frame::new(channel, Kind::Failed, words));
        }
    }

    /// A new channel for a client's command.
    fn channel(self: &Arc<Self>) -> Result<(&Arc<Self>, u32, Receiver<Frame>)> {
        let mut state = self.state();
        ensure!(
            state.power == Power::Up && state.agent.is_some(),
            "{} is {}",
            self.spec.name(),
            state.power
        );
        let channel_number = state.next_channel;
        state.next_channel = state.next_channel.wrapping_add(1).max(AGENT + 1);
        let (to_client, frames) = channel();
        state.clients.insert(channel_number, to_client);
        Ok((self, channel_number, frames))
    }

    /// Carries frames between a client and the agent until either is done.
    fn relay(
        &self,
        channel: u32,
        frames: Receiver<Frame>,
        mut from_client: BufReader<UnixStream>,
        mut to_client: UnixStream,
    ) -> Result<()> {
        let answering = std::thread::spawn(move || {
            for frame in frames {
                if frame.write(&mut to_client).is_err() {
                    return;
                }
            }
            // The last frame was the command's end: what the client may still send has no reader.
            let _ = to_client.shutdown(std::net::Shutdown::Both);
        });
        let outcome = loop {
            match Frame::read(&mut from_client) {
                Ok(Some(mut frame)) => {
                    frame.channel = channel;
                    if let Err(error) = self.tell(&frame) {
                        break Err(error);
                    }
                }
                Ok(None) | Err(_) => break Ok(()),
            }
        };
        let unfinished = self.state().clients.remove(&channel).is_some();
        if unfinished {
            // The client went away: so does its command.
            let _ = self.tell(&Frame::new(channel, Kind::Kill, Vec::new()));
        }
        // It ends: its sender is gone, or its client is.
        let _ = answering.join();
        outcome
    }

    fn tell(&self, frame: &Frame) -> Result<()> {
        let agent = self.state().agent.clone();
        let agent = agent.with_context(|| format!("{} is gone", self.spec.name()))?;
        let mut agent = lock(&agent);
        frame
            .write(&mut *agent)
            .with_context(|| format!("reach {}'s agent", self.spec.name()))
    }

    /// Ends the emulator, if there is one.
    fn kill(&self) {
        let mut state = self.state();
        if let Some(process) = state.process {
            state.killed = true;
            if let Err(error) = signal(process, Signal::Kill) {
                eprintln!("lab: kill {}: {error}", self.spec.name());
            }
        } else if state.power == Power::Booting {
            state.power = Power::Off;
        }
    }

    /// The host vanishes at once.
    fn end(&self) -> Result<()> {
        let power = self.state().power.clone();
        ensure!(
            !matches!(power, Power::Off | Power::Lost(_)),
            "{} is {power}",
            self.spec.name()
        );
        self.kill();
        self.wait_until(ENDS_WITHIN, |state| state.power == Power::Off)
            .map(drop)
    }

    fn freeze(&self, clock_too: bool) -> Result<()> {
        let mut state = self.state();
        ensure!(
            state.power == Power::Up,
            "{} is {}: only a host that is up can be frozen",
            self.spec.name(),
            state.power
        );
        let process = state.process.context("a host without a process")?;
        if clock_too {
            qemu::monitor(&self.directory.join("monitor.sock"), "stop")?;
        } else {
            signal(process, Signal::Stop).context("stop the emulator")?;
        }
        state.power = Power::Frozen { clock_too };
        Ok(())
    }

    fn thaw(&self) -> Result<()> {
        let mut state = self.state();
        let Power::Frozen { clock_too } = state.power else {
            bail!("{} is {}, not frozen", self.spec.name(), state.power);
        };
        let process = state.process.context("a host without a process")?;
        if clock_too {
            qemu::monitor(&self.directory.join("monitor.sock"), "cont")?;
        } else {
            signal(process, Signal::Continue).context("wake the emulator")?;
        }
        state.power = Power::Up;
        Ok(())
    }
}
