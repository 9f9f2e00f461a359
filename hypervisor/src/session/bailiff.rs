//! Keeps an old primary off the disk that both sides share, before this side writes it.
//!
//! ```text
//!  claim won, log drained ──▶ its process, on this host: SIGKILL, and its end is awaited
//!                         ──▶ the fence command, if there is one: runs, and must return 0 in time
//!                         ──▶ the disk's reservation, if there is one: taken from the primary's key
//!                         ──▶ the image's lock, its mark ──▶ the reservation is by this side's own key
//!                         ──▶ done: this side may go live
//!                  anything fails ──▶ this side is unfit, gives the claim back, and ends
//! ```
//! It is a thread of its own, because all of that takes its time. The process is held by a descriptor (pidfd): its number may be another
//! process's by then.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::SessionError;
use super::io::Io;
use super::warden::Warden;
use crate::backends::disk::{DiskError, OpenImage};
use crate::backends::wait::{Waiter, Wake};
use crate::config::Config;
use crate::control::hook::{Change, Helper};
use crate::credentials::Process;
use crate::protocol::{Identity, Record};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::make_this_thread_urgent;

/// How long a process may take to end once it was killed. One that is stuck in its disk ends when that answers; until then it may write.
const DEATH_WITHIN: Duration = Duration::from_secs(10);

/// How long the image may stay locked by then: a program that the old primary started may have its descriptors for a moment, between
/// its fork and its exec.
const LOCK_WITHIN: Duration = Duration::from_secs(2);

/// What it has to do it with.
pub(super) struct Means {
    pub(super) image: OpenImage,
    /// The machine's name.
    pub(super) machine: String,
    /// The old primary.
    pub(super) primary: Identity,
    /// Where its control connection came from, if it is not on this host.
    pub(super) address: Option<SocketAddr>,
    /// Its process, if it is on this host.
    pub(super) process: Option<Process>,
    /// Runs the fence command.
    pub(super) command: Option<Helper>,
    /// How long that may take.
    pub(super) within: Duration,
    /// Who takes the disk's reservation.
    pub(super) warden: Option<Warden>,
}

/// The thread's handle.
pub(super) struct Bailiff {
    claims: Sender<Record>,
    told: Receiver<Result<(), String>>,
    begun: bool,
    over: bool,
}

/// The process that runs the fence command, if there is one. A confined thread can start none.
pub(super) fn helper(config: &Config) -> Result<Option<Helper>, SessionError> {
    let disk = &config.disk;
    let command = disk.fence_command.as_deref().filter(|_| disk.is_shared());
    command
        .map(|command| Helper::start_within(command, disk.fence_timeout()))
        .transpose()
        .map_err(SessionError::host(
            "start the process that runs the fence command",
        ))
}

impl Bailiff {
    /// Starts the thread, which confines itself and waits. `urgent`: while it works, nobody serves.
    pub(super) fn start(means: Means, io: &Io, urgent: bool) -> Result<Self, SessionError> {
        let (claims, claimed) = channel();
        let (tell, told) = channel();
        let (wake, sandbox): (Arc<Wake>, Sandbox) = (Arc::clone(&io.wake), io.sandbox.clone());
        thread::Builder::new()
            .name("bailiff".into())
            .spawn(move || {
                if urgent {
                    make_this_thread_urgent();
                }
                sandbox.confine(Thread::Bailiff).expect(NOT_CONFINED);
                let mut means = means;
                if let Ok(claim) = claimed.recv() {
                    // If nobody listens the process is ending.
                    let _ = tell.send(means.fence(&claim));
                    wake.ring();
                }
            })
            .map_err(SessionError::host("start the thread that fences the disk"))?;
        Ok(Self {
            claims,
            told,
            begun: false,
            over: false,
        })
    }

    /// Has it begin, once, in the name of this claim.
    pub(super) fn begin(&mut self, claim: &Record) {
        if !std::mem::replace(&mut self.begun, true) {
            // That of a thread that is gone shows as its outcome.
            let _ = self.claims.send(*claim);
        }
    }

    /// What came of it, told once.
    pub(super) fn outcome(&mut self) -> Option<Result<(), String>> {
        if !self.begun || self.over {
            return None;
        }
        let outcome = match self.told.try_recv() {
            Ok(outcome) => outcome,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                Err("the thread for it is gone; this is a bug".into())
            }
        };
        self.over = true;
        Some(outcome)
    }
}

impl Means {
    fn fence(&mut self, claim: &Record) -> Result<(), String> {
        if let Some(process) = &self.process {
            end(process)?;
        }
        self.command(claim)?;
        self.take_disk(claim).map_err(|error| error.to_string())
    }

    /// Takes the disk, and the image on it.
    fn take_disk(&self, claim: &Record) -> Result<(), DiskError> {
        if let Some(warden) = &self.warden {
            warden.take(self.primary)?;
        }
        let (machine, from) = (&self.machine, self.primary);
        self.image.take_from(machine, from, claim, LOCK_WITHIN)?;
        self.warden.as_ref().map_or(Ok(()), Warden::settle)
    }

    /// Runs the fence command, and waits for what it comes to.
    fn command(&mut self, claim: &Record) -> Result<(), String> {
        let Some(helper) = &mut self.command else {
            return Ok(());
        };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let order = Change {
            event: "fence".into(),
            name: self.machine.clone(),
            role: "backup".into(),
            standing: "claimed".into(),
            protected: false,
            epoch: claim.epoch.0,
            position: 0,
            peer: self.primary.to_string(),
            peer_address: self
                .address
                .map(|address| address.ip().to_string())
                .unwrap_or_default(),
            pid: std::process::id(),
            unix_ms: since_1970.map_or(0, |since| since.as_millis() as u64),
        };
        let failed = |why: String| Err(format!("the fence command failed: {why}"));
        if let Err(error) = helper.tell(&order) {
            return failed(error.to_string());
        }
        // The helper ends a command that takes too long, and says so; a second more for it to do that.
        let until = Instant::now() + self.within + Duration::from_secs(1);
        loop {
            let mut ran = None;
            let alive = helper.hear(|told| ran = Some(told.failure));
            match ran {
                Some(None) => return Ok(()),
                Some(Some(why)) => return failed(why),
                None if !alive => return failed("the process that runs it is gone".into()),
                None => {}
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return failed("the process that runs it says nothing".into());
            };
            let mut waiter = Waiter::new();
            waiter.add(helper, true, false);
            if let Err(error) = waiter.wait(Some(left)) {
                return failed(error.to_string());
            }
        }
    }
}

/// Ends the process, and returns when it has: none of its threads writes any more, and its descriptors are closed.
fn end(process: &Process) -> Result<(), String> {
    let failed = |error| format!("its process could not be ended: {error}");
    process.kill().map_err(failed)?;
    let until = Instant::now() + DEATH_WITHIN;
    while !process
        .has_ended(until.saturating_duration_since(Instant::now()))
        .map_err(failed)?
    {
        if Instant::now() >= until {
            return Err(format!(
                "its process was killed and has not ended within {} s: it waits for its disk",
                DEATH_WITHIN.as_secs()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::backends::disk::Opening;
    use crate::protocol::{Configuration, Epoch, State};

    fn record(epoch: u64, owner: u8, state: State) -> Record {
        Record {
            epoch: Epoch(epoch),
            configuration: Configuration(epoch),
            state,
            owner: Identity::from_bytes([owner; 16]),
            entitled: None,
        }
    }

    #[test]
    fn a_thread_that_is_gone_has_fenced_nothing() {
        let ((claims, claimed), (tell, told)) = (channel(), channel());
        let mut bailiff = Bailiff {
            claims,
            told,
            begun: false,
            over: false,
        };
        drop((claimed, tell));
        assert_eq!(bailiff.outcome(), None, "nobody asked for it");
        bailiff.begin(&record(2, 2, State::Claimed));
        assert!(bailiff.outcome().is_some_and(|outcome| outcome.is_err()));
        assert_eq!(bailiff.outcome(), None);
    }

    /// A process that has connected, and stands still: killed, it is gone when that is said.
    #[test]
    fn a_frozen_process_is_ended_before_its_image_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let (path, socket) = (directory.path().join("disk"), directory.path().join("s"));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let shared = |leads| {
            let through = false;
            OpenImage::open(&path, Opening::Shared { leads, through }).unwrap()
        };
        let first = record(1, 1, State::Live);
        let leader = shared(true);
        leader.will_lead("m", &first, None).unwrap();
        drop(leader);
        let listener = UnixListener::bind(&socket).unwrap();
        // It holds the lock, and connects; then it stops.
        let script = "import fcntl, os, signal, socket, sys\n\
                      f = open(sys.argv[1], 'r+b'); fcntl.flock(f, fcntl.LOCK_EX)\n\
                      s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[2])\n\
                      os.kill(os.getpid(), signal.SIGSTOP)";
        let mut zombie = Command::new("python3")
            .args(["-c", script])
            .args([&path, &socket])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let process = Process::of_peer(&stream).unwrap();
        let mut means = Means {
            image: shared(false),
            machine: "m".into(),
            primary: first.owner,
            address: None,
            process: None,
            command: None,
            within: Duration::from_secs(1),
            warden: None,
        };
        let claim = record(2, 2, State::Claimed);
        // Without its end its lock stands.
        let why = means.fence(&claim).unwrap_err();
        assert!(why.contains("locked"), "{why}");
        means.process = Some(process);
        means.fence(&claim).unwrap();
        assert!(!zombie.wait().unwrap().success());
        // One that has ended already is no obstacle.
        end(means.process.as_ref().unwrap()).unwrap();
    }
}
