//! A pair on this machine: two processes of this program, their events, and what can be done to them.
//!
//! Unsafe code lives here for one call in the child before it becomes `doppel`: the kernel is asked to end it with its parent,
//! so that a demo that is killed leaves nothing running.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::backends::NetPort;
use crate::config::Transport;
use crate::handshake::{Secret, SecretError};
use crate::session::report::Event;

/// What a pair is to run.
#[derive(Clone, Debug)]
pub struct PairSpec {
    /// This program, or another build of it.
    pub doppel: PathBuf,
    /// A directory for the pair's socket, arbiter and consoles.
    pub directory: PathBuf,
    /// `--guest`.
    pub guest: String,
    /// `--memory`.
    pub memory_mib: u32,
    /// `--command-line`.
    pub command_line: String,
    /// `--memory-check-ms`.
    pub memory_check_ms: u64,
    /// A descriptor of `/dev/kvm` to pass on; the sides open it themselves if there is none.
    pub kvm: Option<i32>,
    /// What carries the log.
    pub transport: Transport,
    /// `--arbiter`; a directory of the pair's own if there is none.
    pub arbiter: Option<String>,
    /// More options for both sides; `{side}` in one stands for the side's name, where each has a file of its own.
    pub more: Vec<String>,
}

impl PairSpec {
    /// Where the sides' control sockets are: `doppel status --run-dir` finds them there, and nobody else's.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        self.directory.join("run")
    }
}

/// Why a pair did not come up.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// Something of the host's.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The pair's secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A side ended or said nothing.
    #[error("the {role} did not become {what} within {} s{}", WAIT.as_secs(), said(last_words))]
    NotReady {
        /// Which side.
        role: &'static str,
        /// What it should have become.
        what: &'static str,
        /// What it wrote to its standard error.
        last_words: String,
    },
}

fn said(last_words: &str) -> String {
    match last_words.trim() {
        "" => String::new(),
        text => format!("; it said:\n{text}"),
    }
}

/// How long a side may take for each step of its start.
const WAIT: Duration = Duration::from_secs(15);

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> PairError {
    move |source| PairError::Host { what, source }
}

/// The pair's secret, in its directory: drawn for it, and gone with it.
const SECRET: &str = "pair.secret";

/// Which CPUs the sides' threads run on: with four or more each has its own, with fewer each side takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// vCPU and I/O thread of the primary.
    pub primary: [usize; 2],
    /// vCPU and I/O thread of the backup.
    pub backup: [usize; 2],
    /// Whether the threads have their cores for themselves.
    pub own_cores: bool,
}

impl Placement {
    /// For this machine.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let ids: Vec<usize> = core_affinity::get_core_ids()
            .unwrap_or_default()
            .into_iter()
            .map(|core| core.id)
            .collect();
        match ids[..] {
            [a, b, c, d, ..] => Self {
                primary: [a, b],
                backup: [c, d],
                own_cores: ids.len() > 4,
            },
            [a, b, ..] => Self {
                primary: [a, a],
                backup: [b, b],
                own_cores: false,
            },
            _ => Self {
                primary: [0, 0],
                backup: [0, 0],
                own_cores: false,
            },
        }
    }
}

/// One side.
#[derive(Debug)]
pub struct Side {
    role: &'static str,
    child: Child,
    events: Receiver<Event>,
    errors: PathBuf,
}

impl Side {
    fn spawn(
        spec: &PairSpec,
        role: &'static str,
        name: &str,
        cpus: [usize; 2],
        arguments: &[String],
    ) -> Result<Self, PairError> {
        let errors = spec.directory.join(format!("{name}.stderr"));
        let stderr =
            std::fs::File::create(&errors).map_err(host("create a file for a side's messages"))?;
        let mut command = Command::new(&spec.doppel);
        command
            .arg(role)
            .arg("--json")
            .args(["--transport", spec.transport.name()])
            .args(["--socket"])
            .arg(spec.directory.join("pair.sock"))
            .arg("--arbiter")
            .arg(match &spec.arbiter {
                Some(place) => place.into(),
                None => spec.directory.join("arbiter"),
            })
            .arg("--secret")
            .arg(spec.directory.join(SECRET))
            .arg("--console")
            .arg(spec.directory.join(format!("{name}.console")))
            .arg("--run-dir")
            .arg(spec.run_directory())
            .args(["--memory-check-ms", &spec.memory_check_ms.to_string()])
            .args([
                "--vcpu-cpus",
                &cpus[0].to_string(),
                "--io-cpus",
                &cpus[1].to_string(),
            ])
            .args(arguments)
            .args(spec.more.iter().map(|more| more.replace("{side}", name)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr);
        if let Some(kvm) = spec.kvm {
            command.args(["--kvm-fd", &kvm.to_string()]);
        }
        // SAFETY: prctl with PR_SET_PDEATHSIG touches no memory and is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(host("start a side of the pair"))?;
        let stdout = child.stdout.take().expect("it was asked for");
        let (tell, events) = channel();
        std::thread::Builder::new()
            .name(format!("{role}-events"))
            .spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // A line that is no event belongs to a newer program; it is not ours to judge.
                    if let Ok(event) = serde_json::from_str(&line)
                        && tell.send(event).is_err()
                    {
                        return;
                    }
                }
            })
            .map_err(host("start a thread"))?;
        Ok(Self {
            role,
            child,
            events,
            errors,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What has happened since the last call.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.events.try_iter().collect()
    }

    /// Waits for an event that `wanted` accepts; the others are handed to `other`.
    #[must_use]
    pub fn wait_for(
        &self,
        longest: Duration,
        wanted: impl Fn(&Event) -> bool,
        mut other: impl FnMut(Event),
    ) -> Option<Event> {
        let until = Instant::now() + longest;
        loop {
            match self
                .events
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(event) if wanted(&event) => return Some(event),
                Ok(event) => other(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn await_event(
        &self,
        what: &'static str,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, PairError> {
        self.wait_for(WAIT, wanted, drop)
            .ok_or_else(|| PairError::NotReady {
                role: self.role,
                what,
                last_words: self.messages(),
            })
    }

    /// What it wrote to its standard error.
    #[must_use]
    pub fn messages(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        // SAFETY: kill touches no memory. The child is ours and not yet reaped, so the id is still its own.
        unsafe { libc::kill(pid, signal) };
    }

    /// SIGKILL, and reaped: the process is gone when this returns.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        // It cannot fail for a child that was not reaped; one that was is gone.
        let _ = self.child.wait();
    }

    /// Whether the process has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// SIGTERM; then SIGKILL if the process has not ended in time. How it ended.
    pub fn stop(&mut self, patience: Duration) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait(patience)
    }

    /// Waits for the process to end by itself; SIGKILL if it does not in time. How it ended.
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if let Some(status) = self.ended() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
        self.child
            .wait()
            .unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
        }
    }
}

/// Both sides, paired: the guest runs.
#[derive(Debug)]
pub struct Pair {
    /// The side that serves.
    pub primary: Side,
    /// The side that follows.
    pub backup: Side,
    /// Where backups listen in turn, over TCP.
    listen: Vec<SocketAddr>,
    /// Backups that joined.
    joined: usize,
}

/// What a backup that joined cost, as the side says that it joined.
#[derive(Clone, Copy, Debug)]
pub struct Join {
    /// How long the guest stood, in microseconds.
    pub stopped_us: u64,
    /// From the first page to a whole copy, in microseconds.
    pub took_us: u64,
    /// Bytes that went over.
    pub bytes: u64,
    /// Rounds, the first one with everything.
    pub rounds: u32,
}

impl Pair {
    /// Starts both sides and waits until they are paired. The port is the guest's network; both sides share it, and the
    /// caller keeps it open as well, so the frames in its queue outlive either.
    ///
    /// # Errors
    /// See [`PairError`].
    pub fn start(spec: &PairSpec, port: Option<&NetPort>) -> Result<Self, PairError> {
        let place = Placement::of_this_machine();
        std::fs::create_dir_all(spec.directory.join("arbiter"))
            .map_err(host("create the arbiter's directory"))?;
        match Secret::create(&spec.directory.join(SECRET)) {
            // An earlier pair's, in the same directory.
            Ok(()) | Err(SecretError::Exists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let inheritable = inheritable(port)?;
        let net = net_option(inheritable.as_ref());
        let listen = match spec.transport {
            Transport::Shm => Vec::new(),
            Transport::Tcp | Transport::Rdma => {
                free_addresses().map_err(host("find free ports"))?
            }
        };
        let first = backup_options(&listen, 0, &net);
        let backup = Side::spawn(spec, "backup", "backup", place.backup, &first)?;
        backup.await_event("ready", |event| matches!(event, Event::Ready { .. }))?;
        let mut arguments = vec![
            "--guest".into(),
            spec.guest.clone(),
            "--memory".into(),
            spec.memory_mib.to_string(),
            "--command-line".into(),
            spec.command_line.clone(),
        ];
        arguments.extend(net);
        if let [first, next] = listen[..] {
            arguments.extend(["--connect".to_owned(), first.to_string()]);
            arguments.extend(["--standby".to_owned(), next.to_string()]);
        }
        let primary = Side::spawn(spec, "primary", "primary", place.primary, &arguments)?;
        drop(inheritable);
        primary.await_event("paired", |event| matches!(event, Event::Paired { .. }))?;
        backup.await_event("paired", |event| matches!(event, Event::Paired { .. }))?;
        Ok(Self {
            primary,
            backup,
            listen,
            joined: 0,
        })
    }

    /// The backup has taken over from a primary that is gone: it is the primary from now on, and a new backup joins it. What
    /// the old sides still said, and what the new primary says meanwhile, goes to `other`.
    ///
    /// # Errors
    /// See [`PairError`].
    pub fn replace_primary(
        &mut self,
        spec: &PairSpec,
        port: Option<&NetPort>,
        mut other: impl FnMut(Event),
    ) -> Result<Join, PairError> {
        self.joined += 1;
        let place = Placement::of_this_machine();
        let cpus = [place.primary, place.backup][(self.joined + 1) % 2];
        let inheritable = inheritable(port)?;
        let options = backup_options(&self.listen, self.joined, &net_option(inheritable.as_ref()));
        let name = format!("backup-{}", self.joined + 1);
        let next = Side::spawn(spec, "backup", &name, cpus, &options)?;
        drop(inheritable);
        let before = std::mem::replace(&mut self.backup, next);
        let gone = std::mem::replace(&mut self.primary, before);
        gone.events().into_iter().for_each(&mut other);
        drop(gone);
        self.await_join(other)
    }
}

impl Pair {
    /// A new backup takes the place of the one that there is, by `order`, which is told where it listens over TCP. The old one, which is to
    /// end by itself.
    ///
    /// # Errors
    /// What `order` says; or see [`PairError`].
    pub fn migrate_backup<E: From<PairError>>(
        &mut self,
        spec: &PairSpec,
        port: Option<&NetPort>,
        order: impl FnOnce(Option<SocketAddr>) -> Result<(), E>,
        other: impl FnMut(Event),
    ) -> Result<(Side, Join), E> {
        self.joined += 1;
        let place = Placement::of_this_machine();
        let inheritable = inheritable(port)?;
        let options = backup_options(&self.listen, self.joined, &net_option(inheritable.as_ref()));
        let name = format!("backup-{}", self.joined + 1);
        let next = Side::spawn(spec, "backup", &name, place.backup, &options)?;
        drop(inheritable);
        let ready = |event: &Event| matches!(event, Event::Ready { .. });
        let Event::Ready { address, .. } = next.await_event("ready", ready)? else {
            unreachable!("it was waited for");
        };
        order(address)?;
        let old = std::mem::replace(&mut self.backup, next);
        let join = self.await_join(other)?;
        Ok((old, join))
    }

    fn await_join(&self, other: impl FnMut(Event)) -> Result<Join, PairError> {
        let joined = |event: &Event| matches!(event, Event::Joined { .. });
        let said = self.primary.wait_for(WAIT, joined, other);
        let Some(Event::Joined {
            stopped_us,
            took_us,
            bytes,
            rounds,
            ..
        }) = said
        else {
            return Err(PairError::NotReady {
                role: "new backup",
                what: "joined",
                last_words: format!("{}{}", self.primary.messages(), self.backup.messages()),
            });
        };
        self.backup
            .await_event("paired", |event| matches!(event, Event::Paired { .. }))?;
        Ok(Join {
            stopped_us,
            took_us,
            bytes,
            rounds,
        })
    }
}

/// A descriptor of the port that a side inherits, for as long as it takes to start it.
fn inheritable(port: Option<&NetPort>) -> Result<Option<OwnedFd>, PairError> {
    let inheritable = port.map(NetPort::inheritable).transpose();
    inheritable.map_err(host("share the network port"))
}

fn net_option<T: AsRawFd>(port: Option<&T>) -> Vec<String> {
    port.iter()
        .flat_map(|fd| ["--net-fd".into(), fd.as_raw_fd().to_string()])
        .collect()
}

/// What the `number`th backup is told besides its role. Over TCP the primary cannot hand its port on, so each side gets it here.
fn backup_options(listen: &[SocketAddr], number: usize, net: &[String]) -> Vec<String> {
    let [first, second] = listen else {
        return Vec::new();
    };
    let (own, other) = if number.is_multiple_of(2) {
        (first, second)
    } else {
        (second, first)
    };
    let mut options = vec!["--listen".to_owned(), own.to_string()];
    options.extend(["--standby".to_owned(), other.to_string()]);
    options.extend(net.iter().cloned());
    options
}

/// Two addresses of this machine that nobody listens at. Both are held until both are known, so they differ.
fn free_addresses() -> std::io::Result<Vec<SocketAddr>> {
    let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let addresses = listeners.map(|listener| listener.and_then(|listener| listener.local_addr()));
    addresses.into_iter().collect()
}

/// This program's own file.
///
/// # Errors
/// If the kernel does not say.
pub fn this_program() -> Result<PathBuf, PairError> {
    std::env::current_exe().map_err(host("find this program's own file"))
}

/// The console of a side, as far as it was written.
#[must_use]
pub fn console(directory: &Path, role: &str) -> String {
    let bytes = std::fs::read(directory.join(format!("{role}.console"))).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
