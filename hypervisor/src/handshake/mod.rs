//! Who the peer is, what CPU and version it has; then the ring.
//!
//! ```text
//!  primary                                             backup (it listens)
//!     │◀═ each proves who it is (`proof.rs`); what follows is sealed ══════▶│
//!     │── hello: version, CPU, machine, identity, heartbeat address, key ──▶│ refuses, or builds the machine
//!     │◀── welcome: identity, heartbeat address ── or refusal ─────────────│
//!     │── the network port's descriptor ──────────────────────────────────▶│
//!     │◀═ ring: memory passed by descriptor, or keys of RDMA memory ══════▶│
//!     │══ a copy of the machine, if it runs already (`checkpoint::clone`) ═▶│ becomes it, and follows the log
//!     │◀── ready ──────────────────────────────────────────────────────────│
//!     │    (the primary swaps the pair's record into the arbiter)          │
//!     │── record ─────────────────────────────────────────────────────────▶│ checks that it is entitled, and may claim
//! ```
//! The record is only a hint: a backup that is ready and does not get it asks the arbiter itself, for its primary may have died
//! between the swap and the message.
//! Over TCP no descriptor is passed: each side has a network port of its own, and a log over TCP gets a stream of its own, a second
//! connection to where the backup listens. A ticket that the backup gave over the first one, sealed, says whose it is.
//! Afterwards one thing may still be said: a backup that diverged asks for the primary's recent exits (`?`), and a primary
//! that its fence has frozen sends them, so that the divergence is named exactly.
//!
//! Every message is a length (u32, little-endian) and that many bytes of JSON; the machine's image follows its description.
//! Each has a size limit, each wait a time limit.
#![forbid(unsafe_code)]

mod channel;
mod error;
mod hurried;
pub mod parcel;
pub mod proof;
pub mod secret;

pub use channel::{Channel, Stream};
pub use error::{DiskMisfit, HandshakeError};
pub(crate) use hurried::gather;
pub use hurried::{Hurried, PACE};
pub use proof::{Trust, TrustError, admit, prove};
pub use secret::{Secret, SecretError};

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rdma_log::fdpass;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Transport;
use crate::digest::ExitRecord;
use crate::intervals::Replication;
use crate::kvm::{CpuModel, Told};
use crate::machine::{ENCODED_MAX, MachineSpec};
use crate::protocol::heartbeat::PairKey;
use crate::protocol::{Configuration, Epoch, Identity, Record, State};
use crate::version::Version;
use proof::FIRST_WORDS;

/// The newest version that this program speaks with a peer ([`crate::version`]).
pub const VERSION: u32 = Version::NEWEST.0;

/// Longest JSON message in bytes; the largest real one, with what a guest is told of its CPU, has some 3000.
const MESSAGE_MAX: u32 = 64 << 10;

/// How long one side waits for the other's next message: it covers a backup that loads a large image on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(10);

fn unix<'a>(stream: &'a Channel, what: &'static str) -> Result<&'a UnixStream, HandshakeError> {
    stream.unix().ok_or(HandshakeError::NotHere { what })
}

/// What a primary says first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What the greeting and the claim have settled on.
    pub version: u32,
    /// The host's CPU.
    pub cpu: CpuModel,
    /// What the machine's guest is told of it; a release that did not compare it says nothing.
    #[serde(default)]
    pub told: Told,
    /// The machine's name.
    pub name: String,
    /// Which machine of that name, if its primary was told.
    #[serde(default)]
    pub instance: Option<String>,
    /// What carries its log.
    pub transport: String,
    /// How the machine is replicated.
    #[serde(default)]
    pub replication: String,
    /// The primary's process.
    pub identity: String,
    /// Where it expects heartbeats.
    pub heartbeat: SocketAddr,
    /// The pair's key for heartbeats.
    pub key: [u8; 16],
    /// The machine runs already: a copy of it follows.
    pub running: bool,
    /// What its log says has left had committed with all that led to it, also where it was asked of its own disk. Releases before did not see to that.
    #[serde(default)]
    pub sure_of_disks: bool,
    /// Hash of what is on its disk, if it has one; of a machine that runs, when it was started.
    pub disk: Option<u64>,
    /// Bytes of the machine's description, which follows.
    pub spec_bytes: u32,
}

/// What a backup has of its own, which a primary must have as well.
#[derive(Clone, Copy, Debug)]
pub struct Ours<'a> {
    /// The host's CPU.
    pub cpu: &'a CpuModel,
    /// The machine's name.
    pub name: &'a str,
    /// Which machine of that name, if this side was told.
    pub instance: Option<&'a str>,
    /// What carries its log.
    pub transport: Transport,
    /// How it is replicated.
    pub replication: Replication,
}

/// What a backup answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Answer {
    Welcome {
        identity: String,
        heartbeat: SocketAddr,
    },
    Refusal {
        why: String,
    },
}

/// The pair's record, as it stands in the arbiter.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Agreed {
    epoch: u64,
    configuration: u64,
    owner: String,
    entitled: String,
}

impl Agreed {
    fn record(&self) -> Result<Record, HandshakeError> {
        Ok(Record {
            epoch: Epoch(self.epoch),
            configuration: Configuration(self.configuration),
            state: State::Live,
            owner: identity(&self.owner, "record")?,
            entitled: Some(identity(&self.entitled, "record")?),
        })
    }
}

/// The network port that both sides share, whose descriptor follows.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Shared {
    has_port: bool,
}

fn identity(text: &str, expected: &'static str) -> Result<Identity, HandshakeError> {
    Identity::parse(text).ok_or_else(|| HandshakeError::Malformed {
        expected,
        why: format!("{text:?} is no identity"),
    })
}

fn send<T: Serialize>(mut stream: &Channel, message: &T) -> Result<(), HandshakeError> {
    let text = serde_json::to_vec(message).expect("plain fields always encode");
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&text);
    Ok(stream.write_all(&bytes)?)
}

fn receive<T: DeserializeOwned>(
    stream: &Channel,
    expected: &'static str,
) -> Result<T, HandshakeError> {
    receive_within(stream, expected, PATIENCE)
}

fn receive_within<T: DeserializeOwned>(
    stream: &Channel,
    expected: &'static str,
    longest: Duration,
) -> Result<T, HandshakeError> {
    let mut stream = Hurried::new(stream, longest);
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    let malformed = |why| HandshakeError::Malformed { expected, why };
    if length > MESSAGE_MAX {
        return Err(malformed(format!(
            "{length} bytes, more than {MESSAGE_MAX}"
        )));
    }
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text)?;
    serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
}

fn patience(stream: &Channel) -> Result<(), HandshakeError> {
    Ok(stream.set_patience(Some(PATIENCE))?)
}

/// What a primary learns of its backup.
#[derive(Clone, Copy, Debug)]
pub struct Welcomed {
    /// The backup's process.
    pub identity: Identity,
    /// Where it expects heartbeats.
    pub heartbeat: SocketAddr,
}

/// The primary's first half: says who it is and what it runs.
///
/// # Errors
/// See [`HandshakeError`].
pub fn introduce(stream: &Channel, hello: &Hello, spec: &[u8]) -> Result<Welcomed, HandshakeError> {
    patience(stream)?;
    send(stream, hello)?;
    Hurried::paced(stream, PATIENCE, PACE).write_all(spec)?;
    match receive(stream, "welcome")? {
        Answer::Welcome {
            identity: theirs,
            heartbeat,
        } => Ok(Welcomed {
            identity: identity(&theirs, "welcome")?,
            heartbeat,
        }),
        Answer::Refusal { why } => Err(HandshakeError::Refused(why)),
    }
}

/// The primary hands over the network port that both share, if they do.
///
/// # Errors
/// See [`HandshakeError`].
pub fn share(stream: &Channel, port: Option<BorrowedFd<'_>>) -> Result<(), HandshakeError> {
    let has_port = port.is_some();
    send(stream, &Shared { has_port })?;
    if let Some(port) = port {
        fdpass::send_with_fds(unix(stream, "a shared network port")?, b"p", &[port])?;
    }
    Ok(())
}

/// The primary tells what the arbiter holds now: the backup may claim.
///
/// # Errors
/// See [`HandshakeError`].
pub fn agree(stream: &Channel, record: &Record) -> Result<(), HandshakeError> {
    let entitled = record
        .entitled
        .ok_or_else(|| HandshakeError::NotEntitled(record.to_string()))?;
    send(
        stream,
        &Agreed {
            epoch: record.epoch.0,
            configuration: record.configuration.0,
            owner: record.owner.to_string(),
            entitled: entitled.to_string(),
        },
    )
}

/// The backup's first half: reads who the primary is and what it runs.
///
/// # Errors
/// See [`HandshakeError`]. The caller tells the primary by [`refuse`].
pub fn listen_to(
    stream: &Channel,
    ours: &Ours<'_>,
) -> Result<(Hello, MachineSpec), HandshakeError> {
    patience(stream)?;
    stream.set_patience(Some(FIRST_WORDS))?;
    let hello: Hello = receive_within(stream, "hello", FIRST_WORDS)?;
    let agreed = stream.version();
    if hello.version != agreed.0 {
        return Err(HandshakeError::Malformed {
            expected: "hello",
            why: format!(
                "it speaks version {}, and {agreed} was agreed on",
                hello.version
            ),
        });
    }
    if hello.spec_bytes > ENCODED_MAX {
        return Err(HandshakeError::Malformed {
            expected: "machine description",
            why: format!("{} bytes", hello.spec_bytes),
        });
    }
    let mut spec = Vec::new();
    Hurried::new(stream, PATIENCE)
        .take(u64::from(hello.spec_bytes))
        .read_to_end(&mut spec)?;
    patience(stream)?;
    if spec.len() < hello.spec_bytes as usize {
        return Err(HandshakeError::Malformed {
            expected: "machine description",
            why: format!("{} of {} bytes", spec.len(), hello.spec_bytes),
        });
    }
    if &hello.cpu != ours.cpu {
        return Err(HandshakeError::Cpu {
            theirs: hello.cpu,
            ours: ours.cpu.clone(),
        });
    }
    if hello.name != ours.name {
        return Err(HandshakeError::Name {
            theirs: hello.name,
            ours: ours.name.to_owned(),
        });
    }
    if let (Some(theirs), Some(ours)) = (&hello.instance, ours.instance)
        && theirs != ours
    {
        return Err(HandshakeError::Instance {
            name: hello.name,
            theirs: theirs.clone(),
            ours: ours.to_owned(),
        });
    }
    if hello.transport != ours.transport.name() {
        return Err(HandshakeError::Transport {
            theirs: hello.transport,
            ours: ours.transport,
        });
    }
    if hello.replication != ours.replication.name() {
        return Err(HandshakeError::Replication {
            theirs: hello.replication,
            ours: ours.replication.name(),
        });
    }
    Ok((hello, MachineSpec::decode(&spec)?))
}

/// Whether this side tells the guest the same of its CPU as the primary does.
///
/// # Errors
/// [`HandshakeError::Told`].
pub fn compare_cpus(hello: &Hello, ours: &Told) -> Result<(), HandshakeError> {
    match ours.difference(&hello.told) {
        None => Ok(()),
        // This host would tell another thing where it could; what is named is why it cannot.
        Some(difference) => {
            let lacks = ours.lacks(&hello.told);
            Err(HandshakeError::Told(lacks.unwrap_or(difference)))
        }
    }
}

/// Tells the primary why there will be no pair. That the primary may be gone changes nothing.
pub fn refuse(stream: &Channel, error: &HandshakeError) {
    let _ = send(
        stream,
        &Answer::Refusal {
            why: error.to_string(),
        },
    );
}

/// The backup's second half: welcomes the primary, and takes the network port that both share, if they do.
///
/// # Errors
/// See [`HandshakeError`].
pub fn welcome(
    stream: &Channel,
    me: Identity,
    heartbeat: SocketAddr,
) -> Result<Option<OwnedFd>, HandshakeError> {
    send(
        stream,
        &Answer::Welcome {
            identity: me.to_string(),
            heartbeat,
        },
    )?;
    let Shared { has_port } = receive(stream, "word on its network port")?;
    if !has_port {
        return Ok(None);
    }
    let stream = unix(stream, "a shared network port")?;
    Ok(fdpass::recv_with_fds(stream, &mut [0], 1)?.pop())
}

/// The backup hears what was agreed with the arbiter. It must entitle `me`.
///
/// # Errors
/// See [`HandshakeError`].
pub fn hear_record(stream: &Channel, me: Identity) -> Result<Record, HandshakeError> {
    let agreed: Agreed = receive(stream, "record")?;
    let record = agreed.record()?;
    if record.entitled != Some(me) {
        return Err(HandshakeError::NotEntitled(record.to_string()));
    }
    Ok(record)
}

/// The record that a primary has said, if these bytes, all that it has said so far, are one.
#[must_use]
pub fn record_in(said: &[u8]) -> Option<Record> {
    let (length, text) = said.split_at_checked(4)?;
    let length = u32::from_le_bytes(length.try_into().ok()?);
    let text = text.get(..usize::try_from(length).ok()?)?;
    let agreed: Agreed = serde_json::from_slice(text).ok()?;
    agreed.record().ok()
}

/// What a ring's connection starts with: which pair's it is.
pub type Ticket = [u8; 16];

/// Precedes the ticket, so that a stray connection is told from a wrong ticket.
const RING: [u8; 8] = *b"doppel-r";

#[derive(Clone, Debug, Serialize, Deserialize)]
struct RingTicket {
    ticket: Ticket,
}

/// The backup waits for the ring's connection with this ticket.
///
/// # Errors
/// See [`HandshakeError`].
pub fn give_ticket(stream: &Channel, ticket: Ticket) -> Result<(), HandshakeError> {
    send(stream, &RingTicket { ticket })
}

/// The primary opens the ring's connection, to where its control connection leads.
///
/// # Errors
/// See [`HandshakeError`].
pub fn open_ring(stream: &Channel) -> Result<TcpStream, HandshakeError> {
    let control = stream.tcp().ok_or(HandshakeError::NotHere {
        what: "a ring in shared memory",
    })?;
    let RingTicket { ticket } = receive(stream, "ticket")?;
    let mut ring = TcpStream::connect_timeout(&control.peer_addr()?, PATIENCE)?;
    ring.set_read_timeout(Some(PATIENCE))?;
    ring.write_all(&RING)?;
    ring.write_all(&ticket)?;
    Ok(ring)
}

/// Bytes of [`RING`] and a ticket.
pub const SHOWN: usize = RING.len() + size_of::<Ticket>();

/// Whether what a connection has shown first makes it the ring's.
#[must_use]
pub fn is_ring(shown: &[u8; SHOWN], ticket: &Ticket) -> bool {
    let (word, found) = shown.split_at(RING.len());
    // Every byte is looked at, so that the time it takes tells nothing of how many are right.
    let differs = found
        .iter()
        .zip(ticket)
        .fold(0, |differs, (a, b)| differs | (a ^ b));
    word == RING && differs == 0
}

/// The backup says that its copy is whole and follows the log.
///
/// # Errors
/// See [`HandshakeError`].
pub fn ready(mut stream: &Channel) -> Result<(), HandshakeError> {
    Ok(stream.write_all(b"r")?)
}

/// The primary waits for [`ready`].
///
/// # Errors
/// See [`HandshakeError`].
pub fn await_ready(mut stream: &Channel) -> Result<(), HandshakeError> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    if byte != *b"r" {
        return Err(HandshakeError::Malformed {
            expected: "ready",
            why: format!("byte {:#x}", byte[0]),
        });
    }
    Ok(())
}

/// What a backup asks with for the primary's recent exits.
pub const ASK_EXITS: u8 = b'?';

/// Exits in one answer; a primary keeps fewer.
const EXITS_MAX: usize = 4096;

/// How long the answer may take: a guest that idles meets the fence at its next tick.
const EXITS_WITHIN: Duration = Duration::from_millis(300);

/// A backup that diverged asks its frozen primary for its recent exits.
///
/// # Errors
/// See [`HandshakeError`]; the divergence is then told without them.
pub fn ask_exits(mut stream: &Channel) -> Result<Vec<ExitRecord>, HandshakeError> {
    stream.set_nonblocking(false)?;
    stream.set_patience(Some(EXITS_WITHIN))?;
    stream.write_all(&[ASK_EXITS])?;
    let mut stream = Hurried::new(stream, EXITS_WITHIN);
    let mut count = [0; 4];
    stream.read_exact(&mut count)?;
    let count = u32::from_le_bytes(count) as usize;
    if count > EXITS_MAX {
        return Err(HandshakeError::Malformed {
            expected: "recent exits",
            why: format!("{count} of them"),
        });
    }
    let mut bytes = vec![0; count * ExitRecord::SIZE];
    stream.read_exact(&mut bytes)?;
    Ok(bytes
        .chunks_exact(ExitRecord::SIZE)
        .filter_map(ExitRecord::from_bytes)
        .collect())
}

/// A primary answers [`ask_exits`].
///
/// # Errors
/// See [`HandshakeError`]; the backup is then as good as gone.
pub fn tell_exits(stream: &Channel, exits: &[ExitRecord]) -> Result<(), HandshakeError> {
    let exits = &exits[..exits.len().min(EXITS_MAX)];
    let mut bytes = (exits.len() as u32).to_le_bytes().to_vec();
    for exit in exits {
        bytes.extend_from_slice(&exit.to_bytes());
    }
    stream.set_nonblocking(false)?;
    stream.set_patience(Some(EXITS_WITHIN))?;
    // The I/O thread does this: it waits for nobody that takes them a byte at a time.
    Hurried::new(stream, EXITS_WITHIN).write_all(&bytes)?;
    Ok(stream.set_nonblocking(true)?)
}

/// The heartbeat key of a hello.
#[must_use]
pub fn key_of(hello: &Hello) -> PairKey {
    PairKey::from_bytes(hello.key)
}

/// The primary's identity in a hello.
///
/// # Errors
/// [`HandshakeError::Malformed`].
pub fn identity_of(hello: &Hello) -> Result<Identity, HandshakeError> {
    identity(&hello.identity, "hello")
}

/// A descriptor to hand over.
#[must_use]
pub fn port_fd<T: AsFd>(port: Option<&T>) -> Option<BorrowedFd<'_>> {
    port.map(AsFd::as_fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a backup for the machine of this instance makes of a primary of that one.
    fn meets(ours: Option<&str>, theirs: Option<&str>) -> Result<(), HandshakeError> {
        let cpu = CpuModel {
            vendor: "GenuineTest".into(),
            signature: 1,
        };
        let spec = MachineSpec::new("compute", 4, "", 0).unwrap().encode();
        let hello = Hello {
            version: VERSION,
            cpu: cpu.clone(),
            told: Told::default(),
            name: "kv".into(),
            instance: theirs.map(str::to_owned),
            transport: Transport::Shm.name().into(),
            replication: Replication::Replay.name().into(),
            identity: Identity::from_bytes([1; 16]).to_string(),
            heartbeat: ([127, 0, 0, 1], 9).into(),
            key: [7; 16],
            running: false,
            sure_of_disks: true,
            disk: None,
            spec_bytes: spec.len() as u32,
        };
        let (primary, backup) = UnixStream::pair().unwrap();
        let primary = std::thread::spawn(move || {
            let channel = prove(Stream::Unix(primary), &Trust::same_user()).unwrap();
            // It is refused, or the backup hangs up.
            introduce(&channel, &hello, &spec).unwrap_err();
        });
        let channel = admit(Stream::Unix(backup), &Trust::same_user()).unwrap();
        let ours = Ours {
            cpu: &cpu,
            name: "kv",
            instance: ours,
            transport: Transport::Shm,
            replication: Replication::Replay,
        };
        let outcome = listen_to(&channel, &ours).map(drop);
        drop(channel);
        primary.join().unwrap();
        outcome
    }

    /// A backup of a machine that was deleted listens where that of its namesake does.
    #[test]
    fn a_machine_is_not_its_namesake() {
        let other = meets(Some("1"), Some("2")).unwrap_err();
        assert!(matches!(other, HandshakeError::Instance { .. }), "{other}");
        for (ours, theirs) in [(Some("1"), Some("1")), (None, Some("1")), (Some("1"), None)] {
            meets(ours, theirs).unwrap();
        }
    }
}
