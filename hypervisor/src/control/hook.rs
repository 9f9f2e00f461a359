//! The operator's command at each change of role.
//!
//! ```text
//!  role, confined ── change, one line of JSON ──▶ helper (a process of its own) ── sh -c COMMAND, with its environment
//!                 ◀── how it went ───────────────    one at a time, each ended when its time is over
//! ```
//! A confined thread can start nothing, so the helper is started before: this program once more, which waits for lines. All that a
//! role can do through it is to have *that* command run with other values of its variables. It outlives a role that is killed
//! for as long as it takes to run what it was told, and ends with the connection.
//!
//! Unsafe: between fork and exec it is seen to that the helper inherits no descriptor (`close_range`), and a command that takes too
//! long is ended with all that it started (`kill`).

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backends::outflow::{self, Standard};

/// The hidden command of this program that is the helper.
pub const HELPER: &str = "hook-helper";

/// How long a command may take. It tells somebody, or moves an address: seconds. Longer shows as a hook that failed.
const WITHIN: Duration = Duration::from_secs(10);

/// The longest line that either side takes.
const LINE_MAX: u64 = 4096;

/// A change of role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What it is called.
    pub event: String,
    /// The machine.
    pub name: String,
    /// What this process is to it now.
    pub role: String,
    /// How it stands.
    pub standing: String,
    /// Whether the machine survives the loss of either side.
    pub protected: bool,
    /// The reign.
    pub epoch: u64,
    /// Where the guest was.
    pub position: u64,
    /// The other side's identity, or nothing.
    pub peer: String,
    /// Where the other side is, for a command that is to cut it off; nothing where both are on one host, and for hooks.
    #[serde(default)]
    pub peer_address: String,
    /// The role's process.
    pub pid: u32,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
}

impl Change {
    /// What the command finds in its environment.
    fn variables(&self) -> [(&'static str, String); 11] {
        let protected = if self.protected { "yes" } else { "no" };
        [
            ("DOPPEL_EVENT", self.event.clone()),
            ("DOPPEL_NAME", self.name.clone()),
            ("DOPPEL_ROLE", self.role.clone()),
            ("DOPPEL_STANDING", self.standing.clone()),
            ("DOPPEL_PROTECTED", protected.to_owned()),
            ("DOPPEL_EPOCH", self.epoch.to_string()),
            ("DOPPEL_POSITION", self.position.to_string()),
            ("DOPPEL_PEER", self.peer.clone()),
            ("DOPPEL_PEER_ADDRESS", self.peer_address.clone()),
            ("DOPPEL_PID", self.pid.to_string()),
            ("DOPPEL_UNIX_MS", self.unix_ms.to_string()),
        ]
    }
}

/// How a run went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ran {
    /// The change that it was run for.
    pub(crate) event: String,
    /// What went wrong, if something did.
    pub(crate) failure: Option<String>,
}

/// The role's end of its helper.
#[derive(Debug)]
pub(crate) struct Helper {
    stream: UnixStream,
    heard: Vec<u8>,
    /// The process. It is not waited for: it ends after this one, or is found by whoever adopts it.
    _process: Child,
}

impl Helper {
    /// Starts it. To be called before anything is open that a stranger must not have.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn start(command: &str) -> io::Result<Self> {
        Self::start_with(command, WITHIN, &[])
    }

    /// The same for a command that a machine waits for, which may take so long: what it prints keeps nobody, though it is lost for what it has left
    /// running when this process ends.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn start_within(command: &str, within: Duration) -> io::Result<Self> {
        Self::start_with(command, within, &["--relay"])
    }

    fn start_with(command: &str, within: Duration, more: &[&str]) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut helper = Command::new("/proc/self/exe");
        helper
            .args([HELPER, "--command", command, "--within-ms"])
            .arg(within.as_millis().to_string())
            .args(more)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // What a command prints is for people, and standard output may be a program's.
            .stdout(io::stderr().as_fd().try_clone_to_owned()?)
            // Ctrl-C is for the role, whose end is a change that is told, too.
            .process_group(0);
        // SAFETY: close_range passes no memory and may be called between fork and exec.
        unsafe {
            helper.pre_exec(|| {
                let kept_until = libc::syscall(
                    libc::SYS_close_range,
                    3,
                    libc::c_uint::MAX,
                    libc::CLOSE_RANGE_CLOEXEC,
                );
                match kept_until {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let process = helper.spawn()?;
        ours.set_nonblocking(true)?;
        Ok(Self {
            stream: ours,
            heard: Vec::new(),
            _process: process,
        })
    }

    /// Tells it a change, without waiting.
    ///
    /// # Errors
    /// If it is gone, or so far behind that it takes no more.
    pub(crate) fn tell(&mut self, change: &Change) -> io::Result<()> {
        let mut line = serde_json::to_vec(change).expect("plain fields always encode");
        line.push(b'\n');
        // Short against what the kernel holds: it takes the whole line, or nothing of it.
        match self.stream.write(&line)? {
            length if length == line.len() => Ok(()),
            _ => Err(ErrorKind::WouldBlock.into()),
        }
    }

    /// What it says of its runs, without waiting; false if it has ended.
    pub(crate) fn hear(&mut self, mut ran: impl FnMut(Ran)) -> bool {
        let mut bytes = [0; LINE_MAX as usize];
        let alive = match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(length) => {
                self.heard.extend_from_slice(&bytes[..length]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        while let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.heard.drain(..=end).collect();
            if let Ok(told) = serde_json::from_slice(&line) {
                ran(told);
            }
        }
        alive && self.heard.len() < LINE_MAX as usize
    }
}

impl AsFd for Helper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The helper itself: runs `command` for each change that its standard input tells, for so long at the most, until that ends. `relay`: what it
/// prints goes through this process, which does not wait for whoever reads it.
///
/// # Errors
/// If its standard input is no connection to a role.
pub fn help(command: &str, within: Duration, relay: bool) -> io::Result<()> {
    if relay {
        outflow::begin(|| {}, |text| tracing::warn!("{text}"))?;
    }
    // A signal to the role's whole group, as from a service manager, must not keep the role's end from being told.
    let ignored = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register(signal, std::sync::Arc::clone(&ignored))?;
    }
    let role = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut lines = BufReader::new(&role);
    loop {
        let mut line = Vec::new();
        lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let Ok(change) = serde_json::from_slice::<Change>(&line) else {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "a line that tells no change of role",
            ));
        };
        let failure = run(command, &change, within, relay).err();
        let ran = Ran {
            event: change.event,
            failure,
        };
        let mut line = serde_json::to_vec(&ran).expect("plain fields always encode");
        line.push(b'\n');
        if (&role).write_all(&line).is_err()
            && let Some(failure) = ran.failure
        {
            // The role is gone; it would have said so.
            tracing::warn!("the hook failed at the change `{}`: {failure}", ran.event);
        }
    }
}

/// Runs the command once.
fn run(command: &str, change: &Change, within: Duration, relay: bool) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .envs(change.variables())
        .stdin(Stdio::null())
        .process_group(0);
    let mut start = || {
        if relay {
            let (mut reading, writing) = io::pipe()?;
            shell.stdout(writing.try_clone()?).stderr(writing);
            // It ends when nobody has the other end any more.
            std::thread::Builder::new()
                .name("relay".into())
                .spawn(move || io::copy(&mut reading, &mut Standard::Error))?;
        }
        shell.spawn()
    };
    let child: io::Result<Child> = start();
    let mut child = child.map_err(|error| format!("it cannot be started: {error}"))?;
    let status = end_of(&mut child, within).map_err(|error| error.to_string())?;
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(status.to_string()),
        None => Err(format!(
            "it took longer than {} s and was ended",
            within.as_secs_f64()
        )),
    }
}

/// Between two looks whether a command has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How it ended; none if it had to be ended.
fn end_of(child: &mut Child, within: Duration) -> io::Result<Option<ExitStatus>> {
    let until = Instant::now() + within;
    while Instant::now() < until {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: kill passes no memory. The child leads a group of its own and is not reaped yet, so the id is still its own.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
    child.wait()?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change() -> Change {
        Change {
            event: "live".into(),
            name: "kv".into(),
            role: "primary".into(),
            standing: "unprotected".into(),
            protected: false,
            epoch: 2,
            position: 77,
            peer: String::new(),
            peer_address: String::new(),
            pid: 5,
            unix_ms: 9,
        }
    }

    #[test]
    fn a_command_finds_the_change_in_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("told");
        let command = format!(
            "echo $DOPPEL_EVENT $DOPPEL_NAME $DOPPEL_ROLE $DOPPEL_STANDING $DOPPEL_PROTECTED $DOPPEL_EPOCH $DOPPEL_POSITION > {}",
            to.display()
        );
        run(&command, &change(), WITHIN, false).unwrap();
        assert_eq!(
            std::fs::read_to_string(to).unwrap(),
            "live kv primary unprotected no 2 77\n"
        );
    }

    #[test]
    fn a_command_that_fails_or_hangs_is_only_told_of() {
        let why = run("echo no; exit 3", &change(), WITHIN, true).unwrap_err();
        assert!(why.contains('3'), "{why}");
        let started = Instant::now();
        let why = run(
            "sleep 60 & sleep 60",
            &change(),
            Duration::from_millis(100),
            false,
        )
        .unwrap_err();
        assert!(why.contains("0.1 s"), "{why}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
