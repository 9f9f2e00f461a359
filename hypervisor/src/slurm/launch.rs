//! The batch step: it starts a keeper on every node, shows what the nodes say, and ends the job when its machine is over.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::ask;
use super::child::Srun;
use super::follow::Logs;
use super::keeper::End;
use super::{KEEPER, Machine, Node, SlurmError, failed};
use crate::arbiter::{self, Arbiter, Place};
use crate::backends::wait::Waiter;
use crate::config::Transport;
use crate::handshake::Secret;
use crate::protocol::record::State;
use crate::session::host::stop_signals;

/// Between two looks at the nodes' logs and ends.
const LOOK: Duration = Duration::from_millis(300);

/// How long a step may take to start: a site's prolog may have something to do.
const STARTS_WITHIN: Duration = Duration::from_secs(120);

/// How long the nodes may take to say how they came out, once the machine is off. A shared file system shows a new file late.
const SAYS_WITHIN: Duration = Duration::from_secs(20);

/// How long the others may take, once the first has.
const OTHERS_WITHIN: Duration = Duration::from_secs(3);

/// Between two questions to Slurm whether anything of the machine runs.
const LOOK_AT_STEPS: Duration = Duration::from_secs(30);

/// The first of the ports that jobs listen at; a job takes one of so many, by its number.
const PORT: u16 = 7800;
const PORTS: u32 = 1000;

/// What was submitted.
#[derive(Clone, Debug)]
pub struct Submission {
    /// The job's directory; `doppel-JOB` where it was submitted, if none.
    pub directory: Option<PathBuf>,
    /// The machine's name; `job-JOB` if none.
    pub name: Option<String>,
    /// What carries its log.
    pub transport: Transport,
    /// The arbiter; a directory in the job's, if none.
    pub arbiter: Option<Place>,
    /// The pair's secret; one is made in the job's directory, if none.
    pub secret: Option<PathBuf>,
    /// The port at which its backups listen.
    pub port: Option<u16>,
    /// A node's address for the others, `{}` being its name; Slurm's own for it, if none.
    pub address_of: Option<String>,
    /// What else roles are told.
    pub words: Vec<String>,
}

fn variable(name: &'static str) -> Result<String, SlurmError> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .ok_or(SlurmError::NoJob(name))
}

/// The job that this process is of.
pub(super) fn job_id() -> Result<String, SlurmError> {
    variable("SLURM_JOB_ID")
}

fn port_of(job: &str) -> u16 {
    let number: u32 = job.parse().unwrap_or(0);
    PORT + (number % PORTS) as u16
}

/// Runs the job's machine until it is over; the exit code.
///
/// # Errors
/// See [`SlurmError`].
pub fn launch(submission: &Submission) -> Result<u8, SlurmError> {
    let signals = stop_signals()?;
    let job = job_id()?;
    let machine = prepare(submission, &job)?;
    let arbiter = arbiter::open(&machine.arbiter, &machine.name)?;
    let mut launcher = Launcher {
        logs: Logs::of(&machine),
        machine,
        job,
        arbiter,
        signals,
        ended: None,
        cancelled: false,
    };
    launcher.start()?;
    let code = launcher.watch()?;
    launcher.show()?;
    Ok(code)
}

/// Everything that the nodes need to find.
fn prepare(submission: &Submission, job: &str) -> Result<Machine, SlurmError> {
    let nodes = nodes(submission, job)?;
    let directory = match &submission.directory {
        Some(directory) => directory.clone(),
        None => Path::new(&variable("SLURM_SUBMIT_DIR")?).join(format!("doppel-{job}")),
    };
    let absolute =
        |path: &Path| std::path::absolute(path).map_err(failed(format!("find {}", path.display())));
    let directory = absolute(&directory)?;
    match DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(SlurmError::Exists(directory));
        }
        Err(error) => return Err(failed(format!("make {}", directory.display()))(error)),
    }
    let secret = match &submission.secret {
        Some(secret) => absolute(secret)?,
        None => {
            let secret = directory.join("secret");
            Secret::create(&secret)?;
            secret
        }
    };
    let arbiter = match &submission.arbiter {
        Some(place) => place.absolute(),
        None => {
            let arbiter = directory.join("arbiter");
            fs::create_dir(&arbiter).map_err(failed(format!("make {}", arbiter.display())))?;
            Place::Directory(arbiter)
        }
    };
    Ok(Machine {
        name: submission.name.clone().unwrap_or(format!("job-{job}")),
        directory,
        transport: submission.transport,
        arbiter,
        secret,
        nodes,
        words: submission.words.clone(),
    })
}

fn nodes(submission: &Submission, job: &str) -> Result<Vec<Node>, SlurmError> {
    let list = variable("SLURM_JOB_NODELIST")?;
    let mut names = ask::names(&list)?;
    // The batch step's own node is the allocation's first one, by whatever order the list has.
    if let Ok(own) = variable("SLURMD_NODENAME")
        && let Some(at) = names.iter().position(|name| *name == own)
    {
        names[..=at].rotate_right(1);
    }
    if names.len() < 2 {
        return Err(SlurmError::OneNode);
    }
    let texts = match &submission.address_of {
        Some(pattern) => names
            .iter()
            .map(|name| pattern.replace("{}", name))
            .collect(),
        None => ask::addresses(&list, &names)?,
    };
    let port = submission.port.unwrap_or_else(|| port_of(job));
    let node = |(name, text): (String, String)| {
        let address = ask::look_up(&name, &text)?;
        Ok(Node {
            name,
            place: SocketAddr::new(address, port),
        })
    };
    names.into_iter().zip(texts).map(node).collect()
}

struct Launcher {
    machine: Machine,
    job: String,
    logs: Logs,
    arbiter: Box<dyn Arbiter>,
    signals: UnixStream,
    /// When the arbiter was first found to say that the machine is off.
    ended: Option<Instant>,
    /// Whether SIGTERM came.
    cancelled: bool,
}

impl Launcher {
    /// Starts a step on every node. A step's `srun` is ended once its keeper speaks: see the parent module.
    fn start(&mut self) -> Result<(), SlurmError> {
        let machine = &self.machine;
        let nodes: Vec<String> = machine.nodes.iter().map(ToString::to_string).collect();
        tracing::info!(
            "machine {} in job {}: {}; logs in {}",
            machine.name,
            self.job,
            nodes.join(", "),
            machine.directory.display()
        );
        let mut starting = Vec::new();
        for at in 0..machine.nodes.len() {
            starting.push(Some(self.step(at)?));
        }
        let until = Instant::now() + STARTS_WITHIN;
        let started = loop {
            match self.await_starts(&mut starting) {
                Ok(true) => break Ok(()),
                Ok(false) if Instant::now() >= until => {
                    let at = starting.iter().position(Option::is_some).unwrap_or(0);
                    break Err(self.not_started(at, "it has not said anything in time"));
                }
                Ok(false) => {}
                Err(error) => break Err(error),
            }
            self.show()?;
            if self.signalled()? {
                self.cancel();
            }
        };
        if started.is_err() {
            // What has started goes with the job, which ends with this process.
            for mut srun in starting.into_iter().flatten() {
                let _ = srun.dismiss();
            }
        }
        started
    }

    fn step(&self, at: usize) -> Result<Srun, SlurmError> {
        let program = std::env::current_exe().map_err(failed("find this program's own file"))?;
        let node = &self.machine.nodes[at];
        let mut srun = Command::new("srun");
        srun.args(["--nodes=1", "--ntasks=1", "--overlap", "--no-kill"])
            .args(["--mem=0", "--input=none", "--output=none", "--error=none"])
            .arg(format!("--nodelist={}", node.name))
            .arg(format!("--job-name={}", Machine::title(at)));
        // The task writes its log itself: it goes on when its srun is gone.
        srun.args(["sh", "-c", "exec >>\"$0\" 2>&1; exec \"$@\""])
            .arg(self.machine.log_of(node))
            .arg(program)
            .arg(KEEPER)
            .args(self.machine.keeper(at));
        Srun::start(srun.stdin(Stdio::null())).map_err(failed("start srun"))
    }

    /// Whether every keeper has spoken.
    fn await_starts(&self, starting: &mut [Option<Srun>]) -> Result<bool, SlurmError> {
        for (at, srun) in starting.iter_mut().enumerate() {
            let Some(running) = srun else { continue };
            let log = self.machine.log_of(&self.machine.nodes[at]);
            if fs::metadata(log).is_ok_and(|found| found.len() > 0) {
                running.dismiss().map_err(failed("end an srun"))?;
                *srun = None;
                continue;
            }
            if let Some(status) = running.ended().map_err(failed("look after srun"))? {
                *srun = None;
                return Err(self.not_started(at, &format!("srun ended by {status}")));
            }
        }
        Ok(starting.iter().all(Option::is_none))
    }

    fn not_started(&self, at: usize, why: &str) -> SlurmError {
        SlurmError::NotStarted {
            node: self.machine.nodes[at].name.clone(),
            why: why.to_owned(),
        }
    }

    /// Until the machine is over.
    fn watch(&mut self) -> Result<u8, SlurmError> {
        let mut steps_seen = Instant::now();
        loop {
            if self.signalled()? {
                self.cancel();
            }
            self.show()?;
            if let Some(code) = self.outcome() {
                return Ok(code);
            }
            if steps_seen.elapsed() >= LOOK_AT_STEPS {
                steps_seen = Instant::now();
                match ask::has_living_steps(&self.job) {
                    Ok(false) if self.ended.is_none() => {
                        tracing::error!("the machine is lost: nothing of it runs on any node");
                        return Ok(1);
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
            }
        }
    }

    /// The job's exit code, if its machine is over.
    fn outcome(&mut self) -> Option<u8> {
        let ends: Vec<Option<End>> = self
            .machine
            .nodes
            .iter()
            .map(|node| End::read(&self.machine.end_of(node)))
            .collect();
        if self.ended.is_none() {
            let over = ends.iter().any(|end| matches!(end, Some(End::Over(_))));
            let off = || {
                let found = self.arbiter.read().ok().flatten();
                found.is_some_and(|record| record.state == State::Ended)
            };
            if over || off() {
                tracing::info!("machine {} is off", self.machine.name);
                self.ended = Some(Instant::now());
            }
        }
        judge(&ends, self.ended.map(|since| since.elapsed()))
    }

    /// SIGTERM: the nodes have it too if Slurm ends the job. If it was sent to the batch step alone, they get it now.
    fn cancel(&mut self) {
        if std::mem::replace(&mut self.cancelled, true) {
            return;
        }
        tracing::info!("SIGTERM: the job is being ended, the machine is to be powered off");
        if let Err(error) = ask::ask("scancel", &["--signal=TERM", &self.job]) {
            tracing::debug!("{error}");
        }
    }

    fn show(&mut self) -> Result<(), SlurmError> {
        let shown = self.logs.show(&mut io::stdout().lock());
        shown.map_err(failed("write to the job's log"))
    }

    /// Waits a little for a signal; whether one came.
    fn signalled(&self) -> Result<bool, SlurmError> {
        let mut waiter = Waiter::new();
        let signals = waiter.add(&self.signals, true, false);
        waiter
            .wait(Some(LOOK))
            .map_err(failed("wait for signals"))?;
        if !waiter.ready(signals).read {
            return Ok(false);
        }
        let mut bytes = [0; 16];
        // What was read is of no interest; that it was, is.
        let _ = (&self.signals).read(&mut bytes);
        Ok(true)
    }
}

/// The exit code, once enough nodes have said how they came out. `off`: since when the machine is known to be.
fn judge(ends: &[Option<End>], off: Option<Duration>) -> Option<u8> {
    let over = ends.iter().flatten().filter_map(|end| match end {
        End::Over(code) => Some(*code),
        End::Left(_) => None,
    });
    let all = ends.iter().all(Option::is_some);
    match (over.max(), off) {
        (Some(code), Some(since)) if all || since >= OTHERS_WITHIN => Some(code),
        (None, Some(since)) if since >= SAYS_WITHIN => Some(0),
        (Some(_), _) | (_, Some(_)) => None,
        // It never ran, or everybody has left it.
        (None, None) => {
            let codes = ends.iter().flatten().map(|end| end.code());
            let first = matches!(ends.first(), Some(Some(End::Left(code))) if *code != 0);
            (all || first).then(|| codes.max().unwrap_or(1).max(1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(100);

    #[test]
    fn a_machine_s_end_is_the_job_s() {
        let over = |code| Some(End::Over(code));
        assert_eq!(judge(&[over(0), over(0), over(0)], Some(SOON)), Some(0));
        // A lost node says nothing; the others are waited for a little.
        assert_eq!(judge(&[None, over(5), None], Some(SOON)), None);
        assert_eq!(
            judge(&[None, over(5), over(0)], Some(OTHERS_WITHIN)),
            Some(5)
        );
        assert_eq!(judge(&[None, None], Some(OTHERS_WITHIN)), None);
        assert_eq!(judge(&[None, None], Some(SAYS_WITHIN)), Some(0));
    }

    #[test]
    fn a_machine_that_never_ran_fails_the_job() {
        let left = |code| Some(End::Left(code));
        assert_eq!(judge(&[None, None], None), None);
        assert_eq!(judge(&[left(2), None], None), Some(2));
        assert_eq!(judge(&[None, left(1)], None), None);
        assert_eq!(judge(&[left(0), left(0)], None), Some(1));
    }

    #[test]
    fn jobs_of_one_node_listen_at_ports_of_their_own() {
        assert_eq!(port_of("1"), 7801);
        assert_eq!(port_of("1001"), 7801);
        assert_eq!(port_of("999999999"), 8799);
    }
}
