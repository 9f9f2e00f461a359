//! Peers that a role must survive although they have proved who they are: of another version or CPU, cut off, too long, silent,
//! babbling, with descriptors that nobody asked for. Who proves nothing is in `uninvited.rs`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::handshake::{self, Channel, Hello, Stream, Trust, VERSION};
use hypervisor::kvm::{CpuModel, KvmSource};
use hypervisor::machine::MachineSpec;
use rdma_log::RingConfig;
use rdma_log::fdpass::send_with_fds;
use rdma_log::transport::tcp;
use serde_json::{Value, json};

use super::random::Random;

/// Longer than a role waits for a peer's next message.
const PATIENCE: Duration = Duration::from_secs(25);

/// What a stranger does to a backup that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// Says nothing and closes.
    Closes,
    /// Random bytes.
    Garbage,
    /// A length far beyond the limit.
    TooLong,
    /// A message that is cut off.
    CutOff,
    /// JSON that is no hello.
    NoHello,
    /// Another version.
    Version,
    /// Another CPU.
    Cpu,
    /// Another machine.
    Name,
    /// Another way for the log.
    Transport,
    /// A description that is longer than any.
    HugeSpec,
    /// A description that is none.
    BadSpec,
    /// A description that ends too early.
    CutSpec,
    /// A good description of a machine whose image is no image.
    BadImage,
    /// Descriptors with its garbage.
    Descriptors,
    /// Says nothing and stays.
    Silent,
}

/// Strangers that are over at once.
pub const QUICK: [Stranger; 14] = [
    Stranger::Closes,
    Stranger::Garbage,
    Stranger::TooLong,
    Stranger::CutOff,
    Stranger::NoHello,
    Stranger::Version,
    Stranger::Cpu,
    Stranger::Name,
    Stranger::Transport,
    Stranger::HugeSpec,
    Stranger::BadSpec,
    Stranger::CutSpec,
    Stranger::BadImage,
    Stranger::Descriptors,
];

/// A hello that this host's backup of `name` would take.
fn good_hello(name: &str, transport: &str, spec_bytes: usize) -> Result<Hello> {
    Ok(Hello {
        version: VERSION,
        cpu: CpuModel::of_host(&KvmSource::default())?,
        told: Default::default(),
        name: name.to_owned(),
        instance: None,
        transport: transport.to_owned(),
        replication: "replay".into(),
        identity: "0123456789abcdef0123456789abcdef".into(),
        heartbeat: SocketAddr::from(([127, 0, 0, 1], 9)),
        key: [7; 16],
        disk: None,
        running: false,
        sure_of_disks: true,
        spec_bytes: u32::try_from(spec_bytes)?,
    })
}

fn framed(message: &Value) -> Vec<u8> {
    let text = message.to_string();
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn garbage(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length).map(|_| random.next() as u8).collect()
}

impl Stranger {
    /// Visits the backup that listens at `socket`. Returns what it answered: a refusal in words, or nothing.
    ///
    /// # Errors
    /// If the backup cannot be reached, welcomes the stranger, or does not get rid of it in time.
    pub fn visit(self, socket: &Path, name: &str, random: &mut Random) -> Result<Option<String>> {
        let stream = UnixStream::connect(socket).context("reach the backup")?;
        let channel = handshake::prove(Stream::Unix(stream), &Trust::same_user())?;
        self.speak(&channel, name, random)
    }

    /// Visits the backup that listens at this TCP address, likewise.
    ///
    /// # Errors
    /// As for [`visit`](Self::visit).
    pub fn visit_over_tcp(
        self,
        address: SocketAddr,
        name: &str,
        trust: &Trust,
        random: &mut Random,
    ) -> Result<Option<String>> {
        let stream = TcpStream::connect(address).context("reach the backup")?;
        let channel = handshake::prove(Stream::Tcp(stream), trust)?;
        self.speak(&channel, name, random)
    }

    fn speak(
        self,
        mut stream: &Channel,
        name: &str,
        random: &mut Random,
    ) -> Result<Option<String>> {
        stream.set_patience(Some(PATIENCE))?;
        let transport = if stream.unix().is_some() {
            "shm"
        } else {
            "tcp"
        };
        let bytes = self.words(name, transport, random)?;
        // A backup that has heard enough closes: what it does not read is not our matter.
        match stream.unix() {
            Some(socket) if self == Self::Descriptors => {
                let file = File::open("/dev/null")?;
                let _ = send_with_fds(socket, &bytes, &[file.as_fd(); 4]);
            }
            _ => drop(stream.write_all(&bytes)),
        }
        if self != Self::Silent {
            // It may have closed already.
            let _ = match (stream.unix(), stream.tcp()) {
                (Some(stream), _) => stream.shutdown(Shutdown::Write),
                (_, Some(stream)) => stream.shutdown(Shutdown::Write),
                _ => Ok(()),
            };
        }
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer)
            && error.kind() != std::io::ErrorKind::ConnectionReset
        {
            bail!("the backup did not get rid of {self:?}: {error}");
        }
        if answer.is_empty() {
            return Ok(None);
        }
        let text = answer.get(4..).unwrap_or_default();
        let answer: Value = serde_json::from_slice(text).context("the backup's answer")?;
        ensure!(
            answer.get("Welcome").is_none(),
            "{self:?} was welcome: {answer}"
        );
        let why = answer["Refusal"]["why"]
            .as_str()
            .context("a refusal has a reason")?;
        Ok(Some(why.to_owned()))
    }

    /// What a refusal must mention.
    #[must_use]
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Self::Version => Some("version"),
            Self::Cpu => Some("CPU"),
            Self::Name => Some("--name"),
            Self::Transport => Some("--transport"),
            Self::TooLong | Self::NoHello | Self::HugeSpec => Some("same version"),
            Self::BadSpec | Self::CutSpec => Some("description"),
            Self::BadImage => Some("image"),
            _ => None,
        }
    }

    fn words(self, name: &str, transport: &str, random: &mut Random) -> Result<Vec<u8>> {
        let spec = MachineSpec::new("irq", 8, "", 0)?.encode();
        let hello = |change: &dyn Fn(&mut Hello)| -> Result<Vec<u8>> {
            let mut hello = good_hello(name, transport, spec.len())?;
            change(&mut hello);
            Ok(framed(&serde_json::to_value(&hello)?))
        };
        let with_spec = |mut hello: Vec<u8>| {
            hello.extend_from_slice(&spec);
            hello
        };
        Ok(match self {
            Self::Closes | Self::Silent => Vec::new(),
            Self::Garbage | Self::Descriptors => {
                let length = 8 + random.below(4000) as usize;
                garbage(random, length)
            }
            Self::TooLong => vec![0xff; 64],
            Self::CutOff => {
                let hello = hello(&|_| {})?;
                let cut = 1 + random.below(hello.len() as u64 - 1) as usize;
                hello[..cut].to_vec()
            }
            Self::NoHello => framed(&json!({"version": "one", "cpu": []})),
            Self::Version => with_spec(hello(&|hello| hello.version += 1)?),
            Self::Cpu => with_spec(hello(&|hello| hello.cpu.signature ^= 0x10)?),
            Self::Name => with_spec(hello(&|hello| hello.name = "another".into())?),
            Self::Transport => with_spec(hello(&|hello| hello.transport = "pigeons".into())?),
            Self::HugeSpec => with_spec(hello(&|hello| hello.spec_bytes = u32::MAX)?),
            Self::BadSpec => {
                let mut bytes = hello(&|_| {})?;
                bytes.extend(garbage(random, spec.len()));
                bytes
            }
            Self::BadImage => {
                let mut bytes = hello(&|_| {})?;
                let text = 4 + u32::from_le_bytes([spec[0], spec[1], spec[2], spec[3]]) as usize;
                bytes.extend_from_slice(&spec[..text]);
                bytes.extend(garbage(random, spec.len() - text));
                bytes
            }
            Self::CutSpec => {
                let mut bytes = hello(&|_| {})?;
                bytes.extend_from_slice(&spec[..random.below(spec.len() as u64) as usize]);
                bytes
            }
        })
    }
}

/// What a primary says first, and its machine's description.
fn hear_hello(mut stream: &Channel) -> Result<Hello> {
    let text = hear(stream).context("the primary's hello")?;
    let hello: Hello = serde_json::from_slice(&text).context("the primary's hello")?;
    let mut spec = vec![0; hello.spec_bytes as usize];
    stream
        .read_exact(&mut spec)
        .context("the primary's machine")?;
    Ok(hello)
}

/// One message.
fn hear(mut stream: &Channel) -> Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut text = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut text)?;
    Ok(text)
}

fn welcome(identity: &str) -> Vec<u8> {
    framed(&json!({"Welcome": {"identity": identity, "heartbeat": "127.0.0.1:9"}}))
}

/// What a false backup does to a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Impostor {
    /// Closes at once.
    Closes,
    /// Random bytes instead of a welcome.
    Garbage,
    /// A length far beyond the limit.
    TooLong,
    /// A welcome by a name that is no identity.
    NoIdentity,
    /// A refusal.
    Refuses,
    /// A welcome, and then nothing of the ring.
    ClosesLater,
    /// A welcome, and then garbage instead of the ring.
    GarbageLater,
}

/// All of them.
pub const IMPOSTORS: [Impostor; 7] = [
    Impostor::Closes,
    Impostor::Garbage,
    Impostor::TooLong,
    Impostor::NoIdentity,
    Impostor::Refuses,
    Impostor::ClosesLater,
    Impostor::GarbageLater,
];

impl Impostor {
    /// Waits at `listener` for a primary and plays its part.
    ///
    /// # Errors
    /// If no primary says hello.
    pub fn receive(self, listener: &UnixListener, random: &mut Random) -> Result<()> {
        let (stream, _) = listener.accept().context("await the primary")?;
        let channel = handshake::admit(Stream::Unix(stream), &Trust::same_user())?;
        self.play(&channel, random)
    }

    /// The same over TCP.
    ///
    /// # Errors
    /// As for [`receive`](Self::receive).
    pub fn receive_over_tcp(
        self,
        listener: &TcpListener,
        trust: &Trust,
        random: &mut Random,
    ) -> Result<()> {
        let (stream, _) = listener.accept().context("await the primary")?;
        let channel = handshake::admit(Stream::Tcp(stream), trust)?;
        self.play(&channel, random)
    }

    fn play(self, mut stream: &Channel, random: &mut Random) -> Result<()> {
        stream.set_patience(Some(PATIENCE))?;
        hear_hello(stream)?;
        let good = "fedcba9876543210fedcba9876543210";
        let mut answer = match self {
            Self::Closes => return Ok(()),
            Self::Garbage => garbage(random, 400),
            Self::TooLong => vec![0xff; 64],
            Self::NoIdentity => welcome("nobody"),
            Self::Refuses => framed(&json!({"Refusal": {"why": "not today"}})),
            Self::ClosesLater | Self::GarbageLater => welcome(good),
        };
        if self == Self::GarbageLater {
            answer.extend(garbage(random, 4096));
        }
        // The primary may have heard enough.
        let _ = stream.write_all(&answer);
        if self == Self::ClosesLater {
            // It says what was agreed; then nothing more comes.
            let mut byte = [0];
            let _ = stream.read(&mut byte);
        }
        Ok(())
    }
}

/// What a false primary does to a backup that has welcomed it: its hello and its machine are as they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FalsePrimary {
    /// Closes.
    Closes,
    /// Random bytes instead of the record.
    Garbage,
    /// The beginning of a record, and then nothing more.
    Stalls,
    /// A record that entitles somebody else.
    NotEntitled,
    /// A record that the backup's arbiter does not have.
    NotInTheArbiter,
}

/// All of them.
pub const FALSE_PRIMARIES: [FalsePrimary; 5] = [
    FalsePrimary::Closes,
    FalsePrimary::Garbage,
    FalsePrimary::Stalls,
    FalsePrimary::NotEntitled,
    FalsePrimary::NotInTheArbiter,
];

impl FalsePrimary {
    /// Deceives the backup that listens at this address; returns when it has closed the connection.
    ///
    /// # Errors
    /// If it does not welcome us, or does not get rid of us in time.
    pub fn deceive(
        self,
        address: SocketAddr,
        name: &str,
        trust: &Trust,
        random: &mut Random,
    ) -> Result<()> {
        let stream = TcpStream::connect(address).context("reach the backup")?;
        let channel = handshake::prove(Stream::Tcp(stream), trust)?;
        channel.set_patience(Some(PATIENCE))?;
        let mut stream = &channel;
        let spec = MachineSpec::new("irq", 8, "", 0)?.encode();
        let hello = good_hello(name, "tcp", spec.len())?;
        stream.write_all(&framed(&serde_json::to_value(&hello)?))?;
        stream.write_all(&spec)?;
        let text = hear(stream).context("a welcome")?;
        let answer: Value = serde_json::from_slice(&text).context("a welcome")?;
        let backup = answer["Welcome"]["identity"]
            .as_str()
            .with_context(|| format!("no welcome: {answer}"))?;
        let record = |entitled: &str| {
            framed(&json!({
                "epoch": 1, "configuration": 1, "owner": hello.identity, "entitled": entitled, "has_port": false
            }))
        };
        let said = match self {
            Self::Closes => return Ok(()),
            Self::Garbage => garbage(random, 400),
            Self::Stalls => record(backup)[..20].to_vec(),
            Self::NotEntitled => record("fedcba9876543210fedcba9876543210"),
            Self::NotInTheArbiter => record(backup),
        };
        // It may have heard enough already.
        let _ = stream.write_all(&said);
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => bail!("the backup did not get rid of {self:?}: {error}"),
        }
    }
}

/// A false backup for a machine that runs, which takes the copy of it a few bytes at a time. Returns how long the primary bore it.
///
/// # Errors
/// If no primary comes, or it is never through with us.
pub fn take_slowly(listener: &TcpListener, trust: &Trust) -> Result<Duration> {
    let (stream, _) = listener.accept().context("await the primary")?;
    let channel = handshake::admit(Stream::Tcp(stream), trust)?;
    channel.set_patience(Some(PATIENCE))?;
    let hello = hear_hello(&channel)?;
    ensure!(hello.running, "the primary does not run yet");
    (&channel).write_all(&welcome("fedcba9876543210fedcba9876543210"))?;
    hear(&channel).context("word on its network port")?;
    let ticket = [3_u8; 16];
    (&channel).write_all(&framed(&json!({"ticket": ticket})))?;
    let (mut ring, _) = listener.accept().context("await the log")?;
    ring.set_read_timeout(Some(PATIENCE))?;
    let mut shown = [0; handshake::SHOWN];
    ring.read_exact(&mut shown).context("the ticket")?;
    ensure!(handshake::is_ring(&shown, &ticket), "a wrong ticket");
    let sizes = RingConfig {
        events: 1 << 16,
        inputs: 1 << 16,
    };
    let (mut ring, _link) = tcp::accept(ring, &sizes, Duration::ZERO)?;
    let started = Instant::now();
    // The copy's key; then nothing more is said over it.
    (&mut &channel).read_exact(&mut [0; 32]).context("a key")?;
    channel.set_nonblocking(true)?;
    // Until it closes. A piece is taken now and then: each single wait of the primary's is short.
    while matches!((&mut &channel).read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    {
        ensure!(
            started.elapsed() < 4 * PATIENCE,
            "the primary goes on copying to a backup that takes nothing"
        );
        if ring.inputs.next()?.is_some() {
            ring.inputs.notify()?;
        }
        std::thread::sleep(Duration::from_millis(8));
    }
    Ok(started.elapsed())
}
