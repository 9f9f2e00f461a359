//! How the two sides of a pair find each other, and how their ring comes to be: over a Unix socket, or over TCP.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rdma_log::transport::network::{Link, Watch};
use rdma_log::transport::{rdma, shm, tcp};
use rdma_log::verbs::Verbs;
use rdma_log::{RingConfig, RingReader, RingWriter};

use super::SessionError;
use super::beats::Beats;
use super::host;
use super::io::Common;
use super::porch::{Bearer, Porch};
use super::report::Event as Said;
use crate::arbiter::random_bytes;
use crate::backends::NetPort;
use crate::backends::wait::Waiter;
use crate::config::{Config, LANE_KIB_MIN, Pair, Transport};
use crate::credentials::{self, is_left_behind};
use crate::handshake::proof::Caller;
use crate::handshake::{self, Channel, HandshakeError, Hello, Stream, Trust};
use crate::kvm::{self, CpuModel};
use crate::machine::{Machine, MachineSpec};
use crate::protocol::Identity;
use crate::record::random_source;
use crate::sandbox::{self, NOT_CONFINED, Sandbox, Thread};

/// How long a primary looks for its backup.
const FIND_BACKUP: Duration = Duration::from_secs(30);

/// How long a backup, or a standby, may take to answer one call: on a network of one site it does in a millisecond or not at all. A primary that looks for
/// its backup calls again, and hears between two calls that it is to end.
const CALL_WITHIN: Duration = Duration::from_secs(1);

/// How long a backup that has met its primary waits for the ring's connection.
const RING_WITHIN: Duration = Duration::from_secs(10);

/// So many strangers are told of at once, and one more each second: a flood of them fills no log.
const TELL_AT_ONCE: u64 = 20;

/// The longest entry of the smallest lane that may be configured, in bytes: a quarter of it, less a header.
const LEAST_ENTRY: usize = (LANE_KIB_MIN << 10) / 4 - 64;

fn setting(field: &'static str, needed: &'static str) -> SessionError {
    SessionError::Setting { field, needed }
}

/// Where a backup listens for its primary.
pub(super) enum Listener {
    /// A path that goes away with its listener.
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens where the configuration says.
    pub(super) fn bind(pair: &Pair) -> Result<Self, SessionError> {
        match pair.transport {
            Transport::Shm => Self::at_path(&pair.socket)
                .map_err(SessionError::host("listen for a primary (pair.socket)")),
            Transport::Tcp | Transport::Rdma => {
                let address = pair.listen.ok_or_else(|| {
                    let needed =
                        "with transports tcp and rdma a backup needs the address to listen at";
                    setting("pair.listen", needed)
                })?;
                let bind = || {
                    let listener = TcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    Ok(Self::Tcp(listener))
                };
                bind().map_err(SessionError::host("listen for a primary (pair.listen)"))
            }
        }
    }

    fn at_path(path: &Path) -> io::Result<Self> {
        if is_left_behind(path) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(listener, path.to_owned()))
    }

    /// The TCP address, with the port that was chosen.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix(..) => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// The next primary: whoever connects and proves that it is to be trusted. Everybody else is turned away.
    pub(super) fn accept(
        &self,
        common: &Common,
        trust: &Trust,
        random: &File,
    ) -> Result<Channel, SessionError> {
        let mut porch = Porch::new();
        let mut told = Told::new();
        loop {
            let (arrived, _) = self.wait(common, &porch, None, None)?;
            if let Some(stream) = arrived {
                match Caller::greet(stream, trust, random) {
                    Ok(caller) => porch.take_in(caller),
                    Err(error) => told.turned_away(common, &error),
                }
            }
            while let Some(outcome) = porch.turn() {
                let judged = outcome
                    .map_err(HandshakeError::from)
                    .and_then(|caller| caller.admit(trust));
                match judged {
                    Ok(channel) => return Ok(channel),
                    Err(error) => told.turned_away(common, &error),
                }
            }
        }
    }

    /// Waits for a new connection, for something to happen on the porch, or at a primary that was met, until a moment. The
    /// connection, if there is one, and whether the primary can be read from.
    fn wait<W: super::porch::Waiting>(
        &self,
        common: &Common,
        porch: &Porch<W>,
        primary: Option<&Channel>,
        until: Option<Instant>,
    ) -> Result<(Option<Stream>, bool), SessionError> {
        let mut waiter = Waiter::new();
        let signals = waiter.add(&common.signals, true, false);
        let board = common.reporter.board();
        let dismissal = waiter.add(board.dismissal(), true, false);
        let door = waiter.add(self, true, false);
        let primary = primary.map(|primary| waiter.add(primary, true, false));
        porch.watch(&mut waiter);
        let until = until.into_iter().chain(porch.until()).min();
        waiter
            .wait(until.map(|until| until.saturating_duration_since(Instant::now())))
            .map_err(SessionError::host("wait for events"))?;
        if waiter.ready(signals).read {
            return Err(SessionError::Interrupted);
        }
        if waiter.ready(dismissal).read {
            return Err(SessionError::Dismissed);
        }
        let spoke = primary.is_some_and(|primary| waiter.ready(primary).read);
        if !waiter.ready(door).read {
            return Ok((None, spoke));
        }
        // Whoever connected may be gone already; then the next one is waited for.
        let arrived = match self {
            Self::Unix(listener, _) => listener.accept().map(|(s, _)| Stream::Unix(s)),
            Self::Tcp(listener) => listener.accept().map(|(s, _)| Stream::Tcp(s)),
        };
        Ok((arrived.ok(), spoke))
    }

    /// The log's connection, with this ticket, from the primary at the other end of `control`.
    fn accept_bearer(
        &self,
        common: &Common,
        control: &Channel,
        ticket: &handshake::Ticket,
    ) -> Result<TcpStream, SessionError> {
        let until = Instant::now() + RING_WITHIN;
        let mut porch = Porch::new();
        while Instant::now() < until {
            let (arrived, spoke) = self.wait(common, &porch, Some(control), Some(until))?;
            if let Some(Stream::Tcp(stream)) = arrived
                && let Ok(bearer) = Bearer::new(stream)
            {
                porch.take_in(bearer);
            }
            while let Some(outcome) = porch.turn() {
                // A stranger, or a primary that comes too late: it finds the connection closed.
                if let Ok(Some(stream)) = outcome.and_then(|bearer| bearer.admit(ticket)) {
                    return Ok(stream);
                }
            }
            if spoke {
                // It has nothing to say before it has a log: it is gone, and the next primary is not to wait for that.
                let source = io::Error::from(ErrorKind::UnexpectedEof);
                return Err(HandshakeError::from(source).into());
            }
        }
        Err(HandshakeError::from(io::Error::from(ErrorKind::TimedOut)).into())
    }

    /// The backup's end of the ring with the primary at the other end of `control`.
    pub(super) fn accept_ring(
        &self,
        common: &Common,
        control: &Channel,
        config: &Config,
    ) -> Result<(RingReader, Option<Link>), SessionError> {
        let sizes = RingConfig {
            events: config.ring.events_kib << 10,
            inputs: config.ring.inputs_kib << 10,
        };
        if let Some(stream) = control.unix() {
            let ring = shm::accept(stream, &sizes).map_err(HandshakeError::from)?;
            return Ok((ring, None));
        }
        // The thread that lands the log shares the I/O thread's CPU: both wait most of the time.
        let spin = config.timing.spin();
        if config.pair.transport == Transport::Rdma {
            host::pin(&config.cpus.io, "landing");
            sandbox::shed(&config.sandbox)?;
            let ring = accept_rdma(control, &sizes, config).map_err(HandshakeError::from)?;
            return Ok(ring);
        }
        let ticket = random_bytes().map_err(SessionError::host("draw a ticket"))?;
        handshake::give_ticket(control, ticket)?;
        let stream = self.accept_bearer(common, control, &ticket)?;
        host::pin(&config.cpus.io, "landing");
        let sandbox = Sandbox::prepare(&config.sandbox)?;
        let confine = move || sandbox.confine(Thread::Landing).expect(NOT_CONFINED);
        let (ring, link) =
            tcp::accept_with(stream, &sizes, spin, confine).map_err(HandshakeError::from)?;
        Ok((ring, Some(Link::Tcp(link))))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It is gone already if somebody cleaned up; either way nothing is left behind.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What was said of strangers.
struct Told {
    since: Instant,
    said: u64,
    unsaid: u64,
}

impl Told {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            said: 0,
            unsaid: 0,
        }
    }

    fn turned_away(&mut self, common: &Common, error: &HandshakeError) {
        if self.said >= TELL_AT_ONCE + self.since.elapsed().as_secs() {
            self.unsaid += 1;
            return;
        }
        self.said += 1;
        let others = match std::mem::take(&mut self.unsaid) {
            0 => String::new(),
            count => format!(" (and {count} before)"),
        };
        common.reporter.say(&Said::Notice {
            text: format!("whoever called was turned away: {error}{others}"),
            loud: true,
        });
    }
}

/// The set-up goes over the control connection: the keys of this side's memory are for the peer's eyes alone.
fn accept_rdma(
    mut control: &Channel,
    sizes: &RingConfig,
    config: &Config,
) -> Result<(RingReader, Option<Link>), rdma::ConnectError> {
    let verbs = Verbs::load()?;
    let spin = config.timing.spin();
    let (ring, link) = rdma::accept(&verbs, &mut control, sizes, &config.rdma_ring(), spin)?;
    Ok((ring, Some(Link::Rdma(link))))
}

/// The primary's end of the ring with the backup at the other end of `control`.
fn connect_ring(
    control: &Channel,
    config: &Config,
) -> Result<(RingWriter, Option<Watch>), HandshakeError> {
    let (ring, watch) = any_ring(control, config)?;
    // The backup chooses the sizes, and may be anybody.
    for (lane, has) in [
        ("events", ring.events.max_payload()),
        ("inputs", ring.inputs.max_payload()),
    ] {
        if has < LEAST_ENTRY {
            return Err(HandshakeError::TinyLane { lane, has });
        }
    }
    Ok((ring, watch))
}

fn any_ring(
    mut control: &Channel,
    config: &Config,
) -> Result<(RingWriter, Option<Watch>), HandshakeError> {
    if let Some(stream) = control.unix() {
        return Ok((shm::connect(stream)?, None));
    }
    if config.pair.transport == Transport::Rdma {
        let verbs = Verbs::load().map_err(rdma::ConnectError::from)?;
        let (ring, watch) = rdma::connect_watched(&verbs, &mut control, &config.rdma_ring())?;
        return Ok((ring, Some(Watch::Rdma(watch))));
    }
    let (ring, watch) = tcp::connect_watched(handshake::open_ring(control)?)?;
    Ok((ring, Some(Watch::Tcp(watch))))
}

/// What a primary tells every backup that it meets.
pub(super) struct Introduction {
    pub(super) name: String,
    pub(super) instance: Option<String>,
    pub(super) me: Identity,
    pub(super) cpu: CpuModel,
    /// What its guest is told of it.
    pub(super) told: kvm::Told,
    /// The machine's description.
    pub(super) spec: Vec<u8>,
    /// The network port, which both sides share where both are on one host.
    pub(super) port: Option<NetPort>,
    /// Hash of the disk's content.
    pub(super) disk: Option<u64>,
    /// The host's random source, open.
    pub(super) random: File,
    /// Whom to believe. Read before the threads are confined, which cannot open a file.
    pub(super) trust: Trust,
}

impl Introduction {
    pub(super) fn new(
        config: &Config,
        me: Identity,
        machine: &Machine,
        (spec, disk): (&MachineSpec, Option<u64>),
        port: Option<&NetPort>,
        trust: Trust,
    ) -> Result<Self, SessionError> {
        let port = port.map(NetPort::try_clone).transpose();
        Ok(Self {
            name: config.name.clone(),
            instance: config.instance.clone(),
            me,
            cpu: machine.cpu_model().clone(),
            told: machine.told().clone(),
            spec: spec.encode(),
            disk,
            port: port.map_err(SessionError::host("share the network port"))?,
            random: random_source()?,
            trust,
        })
    }
}

/// A backup that was met. It is not entitled yet.
pub(super) struct Met {
    pub(super) control: Channel,
    pub(super) identity: Identity,
    pub(super) beats: Beats,
    pub(super) ring: RingWriter,
    pub(super) watch: Option<Watch>,
}

/// Meets the backup at the other end: proofs, hello, welcome, port, ring. If the machine is `running`, a copy of it is due next.
pub(super) fn introduce(
    stream: Stream,
    config: &Config,
    who: &Introduction,
    running: bool,
) -> Result<Met, SessionError> {
    let control = handshake::prove(stream, &who.trust)?;
    let socket = Beats::bind(config.pair.heartbeat, &control)?;
    let mut key = [0; 16];
    let mut random = &who.random;
    random
        .read_exact(&mut key)
        .map_err(SessionError::host("draw a key"))?;
    let hello = Hello {
        version: control.version().0,
        cpu: who.cpu.clone(),
        told: who.told.clone(),
        name: who.name.clone(),
        instance: who.instance.clone(),
        transport: config.pair.transport.name().to_owned(),
        replication: config.replicate.mode.name().to_owned(),
        identity: who.me.to_string(),
        heartbeat: socket
            .local_addr()
            .map_err(SessionError::host("read the heartbeat socket's address"))?,
        key,
        running,
        sure_of_disks: true,
        disk: who.disk,
        spec_bytes: who.spec.len() as u32,
    };
    let welcomed = handshake::introduce(&control, &hello, &who.spec)?;
    // On one host both sides share the port, so that the frames in its queue outlive either.
    let shared = match control.unix() {
        Some(_) => handshake::port_fd(who.port.as_ref()),
        None => None,
    };
    handshake::share(&control, shared)?;
    let (ring, watch) = connect_ring(&control, config)?;
    let beats = Beats::connect(socket, welcomed.heartbeat, handshake::key_of(&hello))?;
    Ok(Met {
        control,
        identity: welcomed.identity,
        beats,
        ring,
        watch,
    })
}

fn dial(address: SocketAddr, longest: Duration) -> io::Result<Stream> {
    let stream = TcpStream::connect_timeout(&address, longest)?;
    stream.set_nodelay(true)?;
    Ok(Stream::Tcp(stream))
}

/// Where a primary finds its backup, for people.
fn place(pair: &Pair) -> Result<String, SessionError> {
    Ok(match pair.transport {
        Transport::Shm => pair.socket.display().to_string(),
        Transport::Tcp | Transport::Rdma => connect_address(pair)?.to_string(),
    })
}

fn connect_address(pair: &Pair) -> Result<SocketAddr, SessionError> {
    pair.connect.ok_or_else(|| {
        let needed = "with transports tcp and rdma a primary needs its backup's address";
        setting("pair.connect", needed)
    })
}

fn call(pair: &Pair) -> Result<io::Result<Stream>, SessionError> {
    Ok(match pair.transport {
        Transport::Shm => credentials::call(&pair.socket).map(Stream::Unix),
        Transport::Tcp | Transport::Rdma => dial(connect_address(pair)?, CALL_WITHIN),
    })
}

/// Whether there is a place at which a new backup can be looked for.
pub(super) fn can_recruit(pair: &Pair) -> bool {
    pair.transport == Transport::Shm || pair.connect.is_some() || !pair.standbys.is_empty()
}

/// Calls every place at which a new backup may listen, those that were told later, too, beginning with the one of this number; the first
/// that answers.
pub(super) fn call_any(pair: &Pair, told: &[SocketAddr], first: usize) -> Option<Stream> {
    match pair.transport {
        Transport::Shm => credentials::call(&pair.socket).map(Stream::Unix).ok(),
        Transport::Tcp | Transport::Rdma => {
            let mut places: Vec<_> = pair.connect.iter().chain(&pair.standbys).collect();
            // One that was both configured and told would be called twice a round.
            places.extend(told.iter().filter(|place| !pair.standbys.contains(place)));
            let first = first % places.len().max(1);
            let mut turn = places[first..].iter().chain(&places[..first]);
            turn.find_map(|&&address| dial(address, CALL_WITHIN).ok())
        }
    }
}

/// Calls a backup at this address.
pub(super) fn call_at(address: SocketAddr) -> io::Result<Stream> {
    dial(address, CALL_WITHIN)
}

/// Connects to the backup that this primary starts with, and waits for one to listen.
pub(super) fn find_backup(pair: &Pair, common: &Common) -> Result<Stream, SessionError> {
    let until = Instant::now() + FIND_BACKUP;
    let mut said = false;
    let mut waiter = Waiter::new();
    let place = place(pair)?;
    loop {
        match call(pair)? {
            Ok(stream) => return Ok(stream),
            Err(error)
                if matches!(
                    error.kind(),
                    // The last two: it is frozen, and takes no more callers in; or nobody there answers at all.
                    ErrorKind::NotFound
                        | ErrorKind::ConnectionRefused
                        | ErrorKind::WouldBlock
                        | ErrorKind::TimedOut
                ) =>
            {
                if Instant::now() >= until {
                    return Err(SessionError::NoBackup {
                        place,
                        seconds: FIND_BACKUP.as_secs(),
                    });
                }
            }
            Err(error) => {
                return Err(SessionError::host(
                    "connect to the backup (pair.socket, pair.connect)",
                )(error));
            }
        }
        if !said {
            said = true;
            common.reporter.say(&Said::Notice {
                text: format!("waiting for a backup to listen at {place}"),
                loud: false,
            });
        }
        waiter.clear();
        let signals = waiter.add(&common.signals, true, false);
        waiter
            .wait(Some(Duration::from_millis(20)))
            .map_err(SessionError::host("wait for events"))?;
        if waiter.ready(signals).read {
            return Err(SessionError::Interrupted);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::backends::wait::Wake;
    use crate::control::board::Board;
    use crate::control::status::Role;
    use crate::handshake::proof;
    use crate::session::report::Reporter;

    /// What a primary makes of a ring of these sizes.
    fn offered(events: usize, inputs: usize) -> Result<(), HandshakeError> {
        let (primary, backup) = UnixStream::pair().unwrap();
        let backup = std::thread::spawn(move || {
            let channel = proof::admit(Stream::Unix(backup), &Trust::same_user()).unwrap();
            let ring = shm::accept(channel.unix().unwrap(), &RingConfig { events, inputs });
            drop(ring.unwrap());
        });
        let channel = proof::prove(Stream::Unix(primary), &Trust::same_user()).unwrap();
        let outcome = connect_ring(&channel, &Config::default());
        backup.join().unwrap();
        outcome.map(drop)
    }

    /// Whoever drops what comes to an address answers a call by nothing at all, which a kernel takes for minutes.
    #[test]
    fn a_primary_that_nobody_answers_hears_that_it_is_to_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Nobody takes them in, and once no more may wait the kernel is silent.
        while TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok() {}
        let (signals, mut signal) = UnixStream::pair().unwrap();
        let board = Arc::new(Board::new("kv", Role::Primary).unwrap());
        let common = Common {
            wake: Arc::new(Wake::new().unwrap()),
            signals,
            reporter: Reporter::new(false, board),
        };
        let pair = Pair {
            transport: Transport::Tcp,
            connect: Some(address),
            ..Pair::default()
        };
        let began = Instant::now();
        let sent = std::thread::spawn(move || {
            std::thread::sleep(CALL_WITHIN / 2);
            signal.write_all(b"t").unwrap();
            signal
        });
        let outcome = find_backup(&pair, &common);
        let took = began.elapsed();
        assert!(matches!(outcome, Err(SessionError::Interrupted)));
        assert!(took < FIND_BACKUP / 2, "{took:?}");
        drop(sent.join().unwrap());
    }

    #[test]
    fn a_ring_whose_entries_are_too_short_for_the_machine_is_refused() {
        let least = LANE_KIB_MIN << 10;
        offered(least, least).unwrap();
        for (events, inputs, tiny) in [
            (least / 2, least, "events"),
            (least, rdma_log::MIN_LANE, "inputs"),
        ] {
            let error = offered(events, inputs).unwrap_err();
            assert!(
                matches!(error, HandshakeError::TinyLane { lane, .. } if lane == tiny),
                "{error}"
            );
        }
    }
}
