//! One life of a victim: started, kept busy, dead, drained, judged.
#![forbid(unsafe_code)]

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use hypervisor::backends::wait::Waiter;
use hypervisor::backends::{NetPort, link};
use hypervisor::event::Output;
use tempfile::TempDir;

use super::hostile::{Step, machine, of_message};
use super::hostile_backup::{Follower, Verdict};
use super::program;
use super::random::Random;
use super::requests::Requests;

/// When a victim dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// By itself, when it takes this step for the n-th time.
    AtStep(Step, u64),
    /// By the parent's hand, so long after its first output.
    After(Duration),
}

/// Far longer than any life here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests that wait for their answers at most: several turns' worth, so that turns have several outputs.
const WINDOW: u64 = 24;

/// Requests sent in one go at most.
const BURST: u64 = 8;

/// Where victims are started from.
#[derive(Debug)]
pub struct Scaffold {
    program: PathBuf,
    directory: TempDir,
}

impl Scaffold {
    /// # Errors
    /// If the victim's program was not built.
    pub fn new() -> Result<Self> {
        Ok(Self {
            program: program::beside("victim")?,
            directory: tempfile::Builder::new()
                .prefix("doppel-victim-")
                .tempdir()
                .context("make a directory")?,
        })
    }

    /// Lets one victim live and die, and judges what it left.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(&self, death: Death, seed: u64) -> Result<Verdict> {
        let (guest, words) = ("kv", "");
        let socket = self.directory.path().join("socket");
        let listener = UnixListener::bind(&socket).context("listen for a victim")?;
        let (cable, far_cable) = link::pair()?;
        let (world, far_world) = link::pair()?;
        let mut command = Command::new(&self.program);
        let inherited = [far_cable.inheritable()?, far_world.inheritable()?];
        command
            .arg("--socket")
            .arg(&socket)
            .args(["--cable", &inherited[0].as_raw_fd().to_string()])
            .args(["--world", &inherited[1].as_raw_fd().to_string()])
            .args(["--guest", guest, "--words", words])
            .stdin(Stdio::null());
        if let Death::AtStep(step, at) = death {
            let value = step.to_possible_value().context("every step has a name")?;
            command.args(["--step", value.get_name(), "--at", &at.to_string()]);
        }
        let mut victim = Living(command.spawn().context("start a victim")?);
        drop(inherited);
        // Its end of the world must be the only one, so that we see it close. Its end of the cable we keep: what the victim
        // has not read is still in there.
        drop(far_world);
        let stream = accept(&listener)?;
        std::fs::remove_file(&socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let follower = Follower::start(&stream, &machine(guest, words)?)?;

        let mut client = Client::new(cable, world, seed);
        let kill_after = match death {
            Death::After(span) => Some(span),
            Death::AtStep(..) => None,
        };
        client.run(&mut victim.0, kill_after)?;
        let status = victim.0.wait().context("wait for a victim")?;
        ensure!(
            status.signal() == Some(libc::SIGKILL),
            "the victim ended otherwise than by SIGKILL: {status}"
        );
        let drained = follower.drain()?;
        drained.judge(&client.left, &client.sent_in, &rest_of(&far_cable)?)
    }
}

fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let mut waiter = Waiter::new();
    let index = waiter.add(listener, true, false);
    waiter.wait(Some(PATIENCE))?;
    ensure!(waiter.ready(index).read, "the victim does not come");
    Ok(listener.accept()?.0)
}

fn rest_of(cable: &NetPort) -> Result<Vec<Vec<u8>>> {
    let mut slot = [0; 2048];
    let mut frames = Vec::new();
    while let Some(length) = cable.read_into(&mut slot)? {
        frames.push(slot[..length].to_vec());
    }
    Ok(frames)
}

/// A child that does not outlive a failing test.
struct Living(Child);

impl Drop for Living {
    fn drop(&mut self) {
        // It fails only for one that is dead and buried.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Keeps the guest busy and notes all that leaves.
struct Client {
    cable: NetPort,
    world: NetPort,
    requests: Requests,
    random: Random,
    sent_in: Vec<Vec<u8>>,
    left: Vec<Output>,
    answers: u64,
}

impl Client {
    fn new(cable: NetPort, world: NetPort, seed: u64) -> Self {
        Self {
            cable,
            world,
            requests: Requests::new(seed),
            random: Random::new(!seed),
            sent_in: Vec::new(),
            left: Vec::new(),
            answers: 0,
        }
    }

    /// Until the victim's end of the world closes.
    fn run(&mut self, victim: &mut Child, kill_after: Option<Duration>) -> Result<()> {
        let started = Instant::now();
        let mut first_output = None;
        let mut waiter = Waiter::new();
        loop {
            let over = !self.listen()?;
            if over {
                return Ok(());
            }
            if first_output.is_none() && !self.left.is_empty() {
                first_output = Some(Instant::now());
            }
            let mut longest = Duration::from_millis(20);
            if let (Some(first), Some(after)) = (first_output, kill_after) {
                let remaining = after.saturating_sub(first.elapsed());
                if remaining.is_zero() {
                    victim.kill().context("kill a victim")?;
                }
                longest = longest.min(remaining);
            }
            if started.elapsed() > PATIENCE {
                bail!(
                    "the victim does not come to its step: {} outputs, {} answers to {} requests",
                    self.left.len(),
                    self.answers,
                    self.requests.made()
                );
            }
            self.ask();
            waiter.clear();
            waiter.add(&self.world, true, false);
            waiter.wait(Some(longest))?;
        }
    }

    fn ask(&mut self) {
        if self.requests.made() + BURST > self.answers + WINDOW {
            return;
        }
        let burst = 1 + self.random.below(BURST);
        for request in self.requests.by_ref().take(burst as usize) {
            // Two dozen frames are far less than the cable holds.
            if matches!(self.cable.write(&request), Ok(true)) {
                self.sent_in.push(request);
            }
        }
    }

    /// Takes in what has left; false when nothing more can.
    fn listen(&mut self) -> Result<bool> {
        let mut slot = [0; 2048];
        loop {
            match self.world.read_into(&mut slot) {
                Ok(Some(length)) => {
                    let output =
                        of_message(&slot[..length]).context("a message that no victim writes")?;
                    self.answers += u64::from(matches!(output, Output::Frame(_)));
                    self.left.push(output);
                }
                Ok(None) => return Ok(true),
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
