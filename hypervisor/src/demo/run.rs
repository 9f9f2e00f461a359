//! The demo itself: stage, pair, client, kill, report.
#![forbid(unsafe_code)]

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{self, Client, ClientError, Series};
use super::gateway::{self, Gateway, GatewayError, LinkHost};
use super::heard::Heard;
use super::namespace::{self, Namespace};
use super::pair::{Join, Pair, PairError, PairSpec, this_program};
use super::report::Report;
use crate::arbiter::Place;
use crate::backends::NetPort;
use crate::backends::link::{self, LinkError};
use crate::backends::tap::{Ipv4Network, TapConfig};
use crate::backends::wait::{Moment, Waiter};
use crate::config::Transport;
use crate::intervals::Replication;
use crate::session::SessionError;
use crate::session::host::{MTU, stop_signals};
use crate::session::report::Event;

const HOST: Ipv4Network = Ipv4Network {
    address: Ipv4Addr::new(10, 77, 0, 1),
    prefix: 24,
};
const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 2), 6379);

/// The load runs between one and three seconds before the kill, and two after it.
const BEFORE_MS: std::ops::Range<u64> = 1000..3000;
const AFTER: Duration = Duration::from_secs(2);

/// Whole memories are compared this often: the last time lies at most so long before the kill.
const MEMORY_CHECK_MS: u64 = 100;

/// Longest wait for the backup to go live. A hundred times what it should take: past that something is broken.
const LIVE_WITHIN: Duration = Duration::from_secs(5);

/// How the sides are stopped at the end.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What carries the guest's frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// A TAP where the host allows one, otherwise the Unix-socket link.
    #[default]
    Auto,
    /// A TAP in a network namespace of its own.
    Tap,
    /// A Unix-socket link, with a TCP/IP of the demo's own at the other end.
    Link,
}

/// Choices of a demo.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest.
    pub guest: String,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// More words for its command line.
    pub command_line: String,
    /// What carries its frames.
    pub network: Network,
    /// What carries the log.
    pub transport: Transport,
    /// How the machine is replicated.
    pub replication: Replication,
    /// More options for both sides.
    pub more: Vec<String>,
    /// Where the arbiter is; none is a directory of the demo's own.
    pub arbiter: Option<Place>,
    /// TCP connections of the client.
    pub connections: usize,
    /// Kills: after each but the last a new backup joins, and whoever serves then is killed next.
    pub kills: u32,
    /// How long the load runs before the first kill; one to three seconds, by the seed, if not given.
    pub before: Option<Duration>,
    /// Chooses the moment of the kill and the client's requests.
    pub seed: u64,
    /// A descriptor of `/dev/kvm` from the parent process.
    pub kvm: Option<i32>,
    /// Where `/dev/kvm` is.
    pub kvm_path: PathBuf,
    /// Show how it goes, on standard error.
    pub progress: bool,
}

/// Why there was no demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A TAP was asked for and cannot be had.
    #[error("no TAP for the demo: {0}; --net link needs none")]
    NoTap(#[from] namespace::Refused),
    /// A TAP was asked for, and an arbiter that cannot be reached from there.
    #[error(
        "the demo's TAP is in a network namespace of its own, from which no etcd can be reached; leave --net out"
    )]
    NoWay,
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// The pair.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// The client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    /// Signals.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The backup did not take over.
    #[error("the backup did not go live within {} s of the kill; what the sides said:\n{messages}", LIVE_WITHIN.as_secs())]
    NotLive {
        /// Its messages.
        messages: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// Something of the host's.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A finished demo.
#[derive(Debug)]
pub struct Finished {
    /// What came of it.
    pub report: Report,
    /// The client's latency over time, if there was a client.
    pub series: Option<Series>,
}

/// The guests of ours that speak no TCP.
const WITHOUT_NETWORK: [&str; 4] = ["compute", "irq", "clock", "memory"];

/// Where the pair runs: its directory and its network, and the signals that end it all.
struct Stage {
    directory: TempDir,
    port: NetPort,
    namespace: Option<Namespace>,
    gateway: Option<Gateway>,
    network: &'static str,
    /// Where the client connects.
    address: SocketAddrV4,
    signals: UnixStream,
    bar: ProgressBar,
}

impl Stage {
    /// Must be called while the process has one thread: see [`namespace::enter`].
    fn set_up(options: &Options, serve: Option<u16>) -> Result<Self, DemoError> {
        // Before anything else: without KVM there is nothing to show.
        let source = match options.kvm {
            Some(fd) => crate::kvm::KvmSource::Inherited(fd),
            None => crate::kvm::KvmSource::Path(options.kvm_path.clone()),
        };
        source.open()?;
        let directory = tempfile::Builder::new()
            .prefix("doppel-demo-")
            .tempdir()
            .map_err(|source| DemoError::Host {
                what: "make a directory for the demo",
                source,
            })?;
        // Bound before the namespace is entered: it goes on serving the host's own 127.0.0.1.
        let listener = serve.map(gateway::bind).transpose()?;
        let tap = TapConfig {
            name: "doppel0".into(),
            address: Some(HOST),
            mtu: MTU,
        };
        // From a network namespace of the demo's own no etcd can be reached.
        let remote = matches!(options.arbiter, Some(Place::Etcd(_)));
        let entered = match options.network {
            Network::Tap if remote => return Err(DemoError::NoWay),
            Network::Auto if remote => None,
            Network::Link => None,
            Network::Tap => Some(namespace::enter(&tap)?),
            Network::Auto => namespace::enter(&tap)
                .inspect_err(|refused| {
                    if options.progress {
                        eprintln!("doppel: no TAP here ({refused}); using the Unix-socket link");
                    }
                })
                .ok(),
        };
        let signals = stop_signals()?;
        let (port, namespace, gateway, network, address) = match entered {
            Some(entered) => {
                let gateway = listener
                    .map(|listener| Gateway::spliced(listener, GUEST))
                    .transpose()?;
                (
                    entered.tap.into_port(),
                    Some(entered.namespace),
                    gateway,
                    "tap",
                    GUEST,
                )
            }
            None => {
                let listener = match listener {
                    Some(listener) => listener,
                    None => gateway::bind(0)?,
                };
                let (port, gateway, address) = over_link(listener)?;
                (port, None, Some(gateway), "link", address)
            }
        };
        let bar = if options.progress {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Ok(Self {
            directory,
            port,
            namespace,
            gateway,
            network,
            address,
            signals,
            bar,
        })
    }

    fn say(&self, text: impl Into<String>) {
        self.bar.set_message(text.into());
    }

    fn start_pair(&self, options: &Options) -> Result<(Pair, PairSpec), DemoError> {
        self.say("starting a primary and a backup");
        let spec = PairSpec {
            doppel: this_program()?,
            directory: self.directory.path().to_owned(),
            guest: options.guest.clone(),
            memory_mib: options.memory_mib,
            command_line: format!(
                "ip={}/{} gw={} {}",
                GUEST.ip(),
                HOST.prefix,
                HOST.address,
                options.command_line
            ),
            memory_check_ms: MEMORY_CHECK_MS,
            kvm: options.kvm,
            transport: options.transport,
            arbiter: options.arbiter.as_ref().map(Place::to_string),
            more: {
                let mut more = options.more.clone();
                if options.arbiter.is_some() {
                    // Others' records are there, too, and those of earlier demos.
                    more.extend(["--name".into(), format!("demo-{:016x}", options.seed)]);
                }
                more
            },
        };
        Ok((Pair::start(&spec, Some(&self.port))?, spec))
    }

    /// Waits, unless somebody ends the demo.
    fn wait(&self, span: Duration) -> Result<(), DemoError> {
        let until = Instant::now() + span;
        let mut waiter = Waiter::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            waiter.clear();
            let signals = waiter.add(&self.signals, true, false);
            waiter.wait(Some(left)).map_err(|source| DemoError::Host {
                what: "wait",
                source,
            })?;
            if waiter.ready(signals).read {
                let mut bytes = [0; 16];
                let _ = (&self.signals).read(&mut bytes);
                return Err(DemoError::Interrupted);
            }
        }
    }
}

/// The guest's port, and a TCP/IP at the other end that serves the listener.
fn over_link(listener: TcpListener) -> Result<(NetPort, Gateway, SocketAddrV4), DemoError> {
    let (ours, guests) = link::pair()?;
    let host = LinkHost {
        address: HOST,
        mac: [0x02, 0xd0, 0x99, 0xe1, 0, 2],
        mtu: MTU,
    };
    let gateway = Gateway::over_link(listener, ours, host, GUEST)?;
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, gateway.address().port());
    Ok((guests, gateway, address))
}

/// Runs the demo: load, kill, failover, and everything read back.
///
/// # Errors
/// See [`DemoError`]; what was lost is not an error but stands in the report.
pub fn run(options: &Options) -> Result<Finished, DemoError> {
    let stage = Stage::set_up(options, None)?;
    let (mut pair, spec) = stage.start_pair(options)?;
    let with_client = !WITHOUT_NETWORK.contains(&options.guest.as_str());
    let client = if with_client {
        stage.say("waiting for the guest to serve");
        let config = client::Config {
            connections: options.connections,
            ..client::Config::new(stage.address, options.seed)
        };
        Some(client::start(config)?)
    } else {
        None
    };
    let mut heard = Heard::default();
    let mut rounds = Vec::new();
    for kill in 1..options.kills.max(1) {
        stage.say("clients write and read; the primary will be killed at a random moment");
        stage.wait(load_before(options, kill - 1))?;
        rounds.push(lose_and_replace(&stage, &spec, &mut pair, &mut heard)?);
    }
    stage.say("clients write and read; the primary will be killed at a random moment");
    stage.wait(load_before(options, options.kills.max(1) - 1))?;

    stage.say("the primary is killed");
    let killed = Moment::now();
    if let Some(client) = &client {
        client.mark_kill(killed);
    }
    pair.primary.kill();
    for event in pair.primary.events() {
        heard.hear(event);
    }
    await_live(&pair, &mut heard)?;
    let live = heard.live.expect("it was awaited");
    if let Some(client) = &client {
        client.mark_live(Moment::from_nanos(live.at.open));
    }
    stage.say("the backup serves; the clients go on");
    stage.wait(AFTER)?;

    let mut report = Report {
        transport: options.transport.name().into(),
        replication: options.replication.name().into(),
        network: stage.network.into(),
        guest: options.guest.clone(),
        ..Report::default()
    };
    let since_kill = |at: u64| Moment::from_nanos(at).since(killed).as_secs_f64() * 1e3;
    report.failover_ms = Some(since_kill(live.at.open));
    let series = match client {
        Some(client) => Some(read_back(&stage, options, client, &mut report)?),
        None => None,
    };
    for event in pair.backup.events() {
        heard.hear(event);
    }
    heard.describe(&live, &mut report);
    let extra = [
        ("memory_checks", json!(live.memory_checks)),
        ("memory_checked_at", json!(live.checked_at)),
        ("outputs_sent_again", json!(live.resent)),
        ("frames_taken_over", json!(live.inherited_frames)),
        ("torn", json!(live.torn)),
        ("suspected_ms", json!(since_kill(live.at.suspected))),
        ("fenced_ms", json!(since_kill(live.at.fenced))),
        ("claimed_ms", json!(since_kill(live.at.claimed))),
        ("drained_ms", json!(since_kill(live.at.drained))),
        ("live_ms", json!(since_kill(live.at.open))),
        ("seed", json!(options.seed)),
    ];
    if !rounds.is_empty() {
        report.extra.insert("earlier".into(), Value::from(rounds));
    }
    report
        .extra
        .extend(extra.map(|(name, value): (&str, Value)| (name.to_owned(), value)));
    stage.say("cleaning up");
    pair.backup.stop(STOP_WITHIN);
    stage.bar.finish_and_clear();
    Ok(Finished { report, series })
}

/// How long the load runs before this kill.
fn load_before(options: &Options, kill: u32) -> Duration {
    if let (Some(before), 0) = (options.before, kill) {
        return before;
    }
    let random = (options.seed ^ u64::from(kill) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Duration::from_millis(BEFORE_MS.start + random % (BEFORE_MS.end - BEFORE_MS.start))
}

/// Kills the primary, and gives its heir a new backup. What it took, for the report.
fn lose_and_replace(
    stage: &Stage,
    spec: &PairSpec,
    pair: &mut Pair,
    heard: &mut Heard,
) -> Result<Value, DemoError> {
    stage.say("the primary is killed; the backup takes over, and a new backup joins it");
    let killed = Moment::now();
    pair.primary.kill();
    await_live(pair, heard)?;
    let live = heard.live.take().expect("it was awaited");
    let Join {
        stopped_us,
        took_us,
        bytes,
        rounds,
    } = pair.replace_primary(spec, Some(&stage.port), |event| heard.hear(event))?;
    let failover = Moment::from_nanos(live.at.open).since(killed);
    Ok(json!({
        "failover_ms": failover.as_secs_f64() * 1e3,
        "stopped_ms": stopped_us as f64 / 1e3,
        "joined_ms": took_us as f64 / 1e3,
        "bytes": bytes,
        "rounds": rounds,
    }))
}

fn await_live(pair: &Pair, heard: &mut Heard) -> Result<(), DemoError> {
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let event = pair
        .backup
        .wait_for(LIVE_WITHIN, live, |event| heard.hear(event));
    match event {
        Some(event) => {
            heard.hear(event);
            Ok(())
        }
        None => Err(DemoError::NotLive {
            messages: format!("{}\n{}", heard.notices.join("\n"), pair.backup.messages()),
        }),
    }
}

fn read_back(
    stage: &Stage,
    options: &Options,
    client: Client,
    report: &mut Report,
) -> Result<Series, DemoError> {
    stage.say("reading back everything that was acknowledged");
    let mut outcome = client.stop()?;
    let verification = outcome.verify_all(stage.address, Duration::from_secs(10));
    report.take_client(options.connections, &outcome, &verification);
    Ok(outcome.series)
}

/// What `--serve` tells before it serves.
#[derive(Clone, Debug)]
pub struct Serving {
    /// The guest's own address, inside the namespace.
    pub guest: SocketAddrV4,
    /// Where the host reaches it.
    pub address: SocketAddrV4,
    /// The primary's process.
    pub primary: u32,
    /// The backup's process.
    pub backup: u32,
    /// The command that enters the namespace, if there is one.
    pub enter: Option<String>,
    /// Where `doppel status` and `doppel top` find the sides.
    pub run_directory: PathBuf,
}

/// Serves the guest at 127.0.0.1:`port` until both sides have ended or somebody ends it.
///
/// # Errors
/// See [`DemoError`].
pub fn serve(
    options: &Options,
    port: u16,
    tell: impl FnOnce(&Serving),
    mut happened: impl FnMut(&'static str, &Event),
) -> Result<(), DemoError> {
    let stage = Stage::set_up(options, Some(port))?;
    let (mut pair, spec) = stage.start_pair(options)?;
    stage.bar.finish_and_clear();
    let gateway = stage.gateway.as_ref().expect("serving has a gateway");
    let own = std::process::id();
    tell(&Serving {
        guest: GUEST,
        address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, gateway.address().port()),
        primary: pair.primary.pid(),
        backup: pair.backup.pid(),
        enter: stage
            .namespace
            .as_ref()
            .map(|namespace| namespace.how_to_enter(own)),
        run_directory: spec.run_directory(),
    });
    loop {
        match stage.wait(Duration::from_millis(50)) {
            Err(DemoError::Interrupted) => break,
            other => other?,
        }
        for event in pair.primary.events() {
            happened("primary", &event);
        }
        for event in pair.backup.events() {
            happened("backup", &event);
        }
        if pair.primary.ended().is_some() && pair.backup.ended().is_some() {
            break;
        }
    }
    if pair.primary.ended().is_none() {
        pair.primary.stop(STOP_WITHIN);
    }
    if pair.backup.ended().is_none() {
        pair.backup.stop(STOP_WITHIN);
    }
    Ok(())
}
