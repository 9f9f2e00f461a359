//! `doppel console`: a person, or a program, at the console of a machine, wherever on this host it is served; and by another [`Way`] wherever at a
//! site.
//!
//! ```text
//!            ┌── looks whose turn it is, now and then and when a connection ends ── Lookout, a thread of its own
//!            ▼
//!  away ──▶ there ── its process is gone, or another one serves in a later epoch ──▶ away ── nobody is left ──▶ over
//!            │ bytes of the console ▶ output        typed bytes ◀ input ── the escape key, a signal, the output's end ──▶ left
//! ```
//! The bytes are counted from the guest's first, on both sides of a pair alike; so after a failover it goes on with the next byte, and shows
//! none twice. Typed bytes that the old primary had taken and not logged are lost with it, as on a cable that is pulled.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::find::{self, Found};
use super::status::{Role, Standing};
use super::{ControlError, is_name};
use crate::backends::console::RawInput;
use crate::backends::wait::{Waiter, Wake};

/// Typed bytes that wait for somebody who takes them; no more are read meanwhile.
const TYPED: usize = 4096;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Visit {
    /// The machine.
    pub name: String,
    /// The key that ends it, at a terminal.
    pub escape: Option<u8>,
    /// All that is kept of what came before, and not only the last screen.
    pub all: bool,
    /// Nothing is typed.
    pub only_look: bool,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The escape key.
    Escaped,
    /// A signal.
    Signalled,
    /// Nobody takes what it would show.
    OutputClosed,
    /// The machine is not served any more, as far as can be seen.
    Over,
}

/// Why it cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// Where to look.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// There is no such machine.
    #[error("{0}")]
    Nobody(String),
    /// The role says no.
    #[error("{0}")]
    Refused(io::Error),
    /// The terminal, or this process's own descriptors.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Who serves the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The process.
    pub pid: u32,
    /// Its reign.
    pub epoch: u64,
    /// Its host, and where that shows consoles; none: this one.
    pub on: Option<(String, SocketAddr)>,
}

impl Server {
    fn is_other_than(&self, other: &Self) -> bool {
        (self.pid, &self.on) != (other.pid, &other.on)
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {}", self.pid)?;
        match &self.on {
            Some((host, _)) => write!(f, " on {host}"),
            None => Ok(()),
        }
    }
}

/// What a look found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Who serves the machine.
    pub server: Option<Server>,
    /// Processes of the machine, whatever they are.
    pub processes: usize,
}

/// How often is looked, and what is concluded.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two looks while all is well: a primary that is frozen and not dead is noticed by them.
    pub look: Duration,
    /// Between two looks while nobody serves.
    pub hurry: Duration,
    /// A machine of which no process has been seen for so long is not served any more.
    pub nobody: Duration,
}

/// How whoever serves a machine is found, and reached.
pub trait Way: Send + Sync {
    /// How often is looked.
    fn pace(&self) -> Pace;

    /// Who serves it now.
    ///
    /// # Errors
    /// If that will never be known.
    fn look(&self, name: &str) -> Result<Seen, VisitError>;

    /// Its console: the number of the first byte to come, and the connection that carries them, from which some may have been read already.
    ///
    /// # Errors
    /// Why not; of the kind `NotFound`, `ConnectionRefused` or `UnexpectedEof` if it may have gone since the look.
    fn enter(
        &self,
        name: &str,
        server: &Server,
        from: Option<u64>,
    ) -> io::Result<(u64, BufReader<UnixStream>)>;

    /// Why nobody is found, for people.
    fn nobody(&self, name: &str) -> String;
}

/// On this host, by the roles' sockets.
#[derive(Clone, Debug)]
pub struct Here {
    /// Where they are.
    pub directory: PathBuf,
}

impl Way for Here {
    fn pace(&self) -> Pace {
        Pace {
            look: Duration::from_millis(500),
            hurry: Duration::from_millis(10),
            nobody: Duration::from_secs(1),
        }
    }

    fn look(&self, name: &str) -> Result<Seen, VisitError> {
        let found = find::roles(&self.directory, Some(name))?;
        Ok(Seen::of(&found))
    }

    fn enter(
        &self,
        name: &str,
        server: &Server,
        from: Option<u64>,
    ) -> io::Result<(u64, BufReader<UnixStream>)> {
        find::console(&self.directory, name, server.pid, from)
    }

    fn nobody(&self, name: &str) -> String {
        format!(
            "no process of machine {name:?} runs on this host, or none that leaves its socket in {} (--run-dir names another place)",
            self.directory.display()
        )
    }
}

impl Seen {
    fn of(found: &[Found]) -> Self {
        let servers = found.iter().filter_map(|found| {
            let status = found.outcome.as_ref().ok()?;
            let serves = status.role != Role::Backup
                && !matches!(status.standing, Standing::Frozen | Standing::Ended);
            serves.then_some(Server {
                pid: status.pid,
                epoch: status.epoch,
                on: None,
            })
        });
        Self {
            server: servers.max_by_key(|server| server.epoch),
            processes: found.len(),
        }
    }
}

/// Looks for whoever serves the machine, on a thread of its own: a process that is frozen answers late.
struct Lookout {
    seen: Receiver<Result<Seen, VisitError>>,
    wake: Arc<Wake>,
    hurry: Arc<AtomicBool>,
    thread: Thread,
}

impl Lookout {
    fn start(visit: &Visit, way: &Arc<dyn Way>) -> Result<Self, VisitError> {
        let host = |what| move |source| VisitError::Host { what, source };
        let wake = Arc::new(Wake::new().map_err(host("make an event descriptor"))?);
        let hurry = Arc::new(AtomicBool::new(true));
        let (tell, seen) = channel();
        let (rung, quick, name) = (Arc::clone(&wake), Arc::clone(&hurry), visit.name.clone());
        let way = Arc::clone(way);
        let thread = std::thread::Builder::new()
            .name("lookout".into())
            .spawn(move || watch(&*way, &name, &tell, &rung, &quick))
            .map_err(host("start a thread"))?;
        Ok(Self {
            seen,
            wake,
            hurry,
            thread: thread.thread().clone(),
        })
    }

    /// Looks more often, at once; or as usual.
    fn hurry(&self, more: bool) {
        self.hurry.store(more, Ordering::Relaxed);
        if more {
            self.thread.unpark();
        }
    }

    /// What was seen last, if something is new.
    fn news(&self) -> Result<Option<Seen>, VisitError> {
        self.wake.clear();
        let mut last = None;
        while let Ok(seen) = self.seen.try_recv() {
            last = Some(seen?);
        }
        Ok(last)
    }
}

fn watch(
    way: &dyn Way,
    name: &str,
    tell: &Sender<Result<Seen, VisitError>>,
    rung: &Wake,
    hurry: &AtomicBool,
) {
    let pace = way.pace();
    loop {
        if tell.send(way.look(name)).is_err() {
            return;
        }
        rung.ring();
        let pause = if hurry.load(Ordering::Relaxed) {
            pace.hurry
        } else {
            pace.look
        };
        std::thread::park_timeout(pause);
    }
}

impl Visit {
    /// Shows the console, and types, until something ends it. `say` is told what befalls the machine.
    ///
    /// # Errors
    /// See [`VisitError`].
    pub fn run(
        self,
        way: Arc<dyn Way>,
        input: RawInput,
        output: impl Write,
        signals: UnixStream,
        say: impl FnMut(&str),
    ) -> Result<Left, VisitError> {
        if !is_name(&self.name) {
            return Err(ControlError::Name { name: self.name }.into());
        }
        let lookout = Lookout::start(&self, &way)?;
        let mut visitor = Visitor {
            escape: self.escape.filter(|_| input.is_terminal()),
            input: Some(input),
            next: self.all.then_some(0),
            visit: self,
            way,
            output,
            signals,
            say,
            lookout,
            typed: Vec::new(),
            at: None,
        };
        loop {
            let stream = match visitor.look_for_server()? {
                Ok(stream) => stream,
                Err(left) => return Ok(left),
            };
            if let Some(left) = visitor.show(stream)? {
                return Ok(left);
            }
        }
    }
}

struct Visitor<O, S> {
    visit: Visit,
    way: Arc<dyn Way>,
    /// None once it has ended.
    input: Option<RawInput>,
    escape: Option<u8>,
    output: O,
    signals: UnixStream,
    say: S,
    lookout: Lookout,
    typed: Vec<u8>,
    /// Whom it was with last.
    at: Option<Server>,
    /// The next byte of the console's.
    next: Option<u64>,
}

/// What a wait found.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    readable: bool,
    writable: bool,
    looked: bool,
    left: Option<Left>,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> VisitError {
    move |source| VisitError::Host { what, source }
}

impl<O: Write, S: FnMut(&str)> Visitor<O, S> {
    /// Waits for something to happen, and takes in what is typed.
    fn round(
        &mut self,
        stream: Option<&UnixStream>,
        longest: Option<Duration>,
    ) -> Result<Round, VisitError> {
        let mut waiter = Waiter::new();
        let signals = waiter.add(&self.signals, true, false);
        let looked = waiter.add(&*self.lookout.wake, true, false);
        let input = self.input.as_ref().filter(|_| self.typed.len() < TYPED);
        let input = input.map(|input| waiter.add(input, true, false));
        let stream = stream.map(|stream| waiter.add(stream, true, !self.typed.is_empty()));
        waiter.wait(longest).map_err(host("wait for events"))?;
        let ready = stream.map(|index| waiter.ready(index)).unwrap_or_default();
        let mut round = Round {
            readable: ready.read || ready.hung_up || ready.failed,
            writable: ready.write,
            looked: waiter.ready(looked).read,
            left: waiter.ready(signals).read.then_some(Left::Signalled),
        };
        let typed = input.map(|index| waiter.ready(index)).unwrap_or_default();
        if (typed.read || typed.hung_up || typed.failed) && self.read_typed() {
            round.left = Some(Left::Escaped);
        }
        Ok(round)
    }

    /// Takes in what is typed; true if that is the escape key.
    fn read_typed(&mut self) -> bool {
        let mut bytes = [0; 256];
        match self.input.as_mut().map(|input| input.read_into(&mut bytes)) {
            Some(Ok(Some(0)) | Err(_)) => {
                let was_terminal = self.input.as_ref().is_some_and(RawInput::is_terminal);
                self.input = None;
                // A terminal that is gone takes whoever sat at it with it; a pipe that ends has said what it had to say.
                was_terminal
            }
            Some(Ok(Some(count))) => {
                let typed = &bytes[..count];
                let until = self
                    .escape
                    .and_then(|key| typed.iter().position(|&byte| byte == key));
                if !self.visit.only_look {
                    self.typed
                        .extend_from_slice(&typed[..until.unwrap_or(count)]);
                }
                until.is_some()
            }
            Some(Ok(None)) | None => false,
        }
    }

    /// Waits for somebody who serves the machine.
    fn look_for_server(&mut self) -> Result<Result<UnixStream, Left>, VisitError> {
        let mut nobody_since: Option<Instant> = None;
        let mut told = false;
        self.lookout.hurry(true);
        loop {
            let round = self.round(None, None)?;
            if let Some(left) = round.left {
                return Ok(Err(left));
            }
            let Some(seen) = self.lookout.news()? else {
                continue;
            };
            if seen.processes == 0 {
                let since = *nobody_since.get_or_insert_with(Instant::now);
                if self.at.is_none() {
                    return Err(VisitError::Nobody(self.way.nobody(&self.visit.name)));
                }
                if since.elapsed() >= self.way.pace().nobody {
                    return Ok(Err(Left::Over));
                }
                continue;
            }
            nobody_since = None;
            let Some(server) = seen.server else {
                if !std::mem::replace(&mut told, true) {
                    (self.say)("nobody serves the machine yet: waiting");
                }
                continue;
            };
            match self.way.enter(&self.visit.name, &server, self.next) {
                Ok((first, reader)) => return self.arrive(server, first, reader).map(Ok),
                // It has just died, or become something else; the next look tells.
                Err(error) if self.at.is_some() || is_gone(&error) => {}
                Err(error) => return Err(VisitError::Refused(error)),
            }
        }
    }

    fn arrive(
        &mut self,
        server: Server,
        first: u64,
        reader: BufReader<UnixStream>,
    ) -> Result<UnixStream, VisitError> {
        self.lookout.hurry(false);
        let before = self.at.replace(server.clone());
        match &before {
            Some(before) if before.is_other_than(&server) => (self.say)(&format!(
                "{server} serves the machine now, in epoch {}",
                server.epoch
            )),
            Some(_) => (self.say)("back again"),
            None => {}
        }
        if let Some(missed) = self.next.and_then(|next| first.checked_sub(next))
            && missed > 0
            && (before.is_some() || self.visit.all)
        {
            (self.say)(&format!("{missed} bytes before this are not kept any more"));
        }
        self.next = Some(first);
        let came = reader.buffer().to_vec();
        let stream = reader.into_inner();
        stream
            .set_nonblocking(true)
            .map_err(host("set up the connection"))?;
        // What is said to a terminal that is gone is found out with the next byte.
        let _ = self.print(&came);
        Ok(stream)
    }

    /// False: nobody takes it any more.
    fn print(&mut self, bytes: &[u8]) -> bool {
        self.next = self.next.map(|next| next + bytes.len() as u64);
        let printed = self.output.write_all(bytes);
        printed.and_then(|()| self.output.flush()).is_ok()
    }

    /// Until that process is gone, or somebody else serves: none.
    fn show(&mut self, mut stream: UnixStream) -> Result<Option<Left>, VisitError> {
        let mut bytes = vec![0; 16 << 10];
        loop {
            let round = self.round(Some(&stream), None)?;
            if round.writable {
                self.send_typed(&mut stream);
            }
            if let Some(left) = round.left {
                self.send_typed(&mut stream);
                return Ok(Some(left));
            }
            if round.readable {
                match stream.read(&mut bytes) {
                    Ok(0) => return Ok(self.parted("it has ended")),
                    Ok(count) => {
                        if !self.print(&bytes[..count]) {
                            return Ok(Some(Left::OutputClosed));
                        }
                    }
                    Err(error) if is_transient(error.kind()) => {}
                    Err(error) => return Ok(self.parted(&error.to_string())),
                }
            }
            if round.looked
                && let Some(seen) = self.lookout.news()?
                && let (Some(server), Some(at)) = (&seen.server, &self.at)
                && server.is_other_than(at)
                && server.epoch > at.epoch
            {
                return Ok(self.parted("another process serves the machine"));
            }
        }
    }

    fn parted(&mut self, why: &str) -> Option<Left> {
        let at = self.at.as_ref().map_or_else(String::new, Server::to_string);
        (self.say)(&format!("{at} is left: {why}"));
        None
    }

    fn send_typed(&mut self, stream: &mut UnixStream) {
        // Its end is seen by reading.
        if let Ok(count) = stream.write(&self.typed) {
            self.typed.drain(..count);
        }
    }
}

fn is_transient(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::UnexpectedEof
    )
}
