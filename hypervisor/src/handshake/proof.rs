//! Who the peer is: what is said before anything else, and before anything of worth.
//!
//! ```text
//!  primary (initiator)                                  backup (responder)
//!     │◀── greeting: versions, how to prove, challenge ──────│
//!     │─── claim: versions, how to prove, psk, e ───────────▶│ opens only for who holds the secret, and for this challenge
//!     │◀── verdict, e, ee ───────────────────────────────────│ opens only if the backup holds it, too
//!     │══ sealed from here on (`channel.rs`): hello, … ═════▶│
//! ```
//! With a secret the claim and the verdict carry the two messages of `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`, whose prologue is
//! the greeting and the head of the claim; so a message of another connection, version, role or mode does not open, and nobody in between makes a pair speak an older
//! version than it can. Without
//! one both sides are processes of one host, and the kernel says whose the other one is; over a Unix socket that is asked in any case, as
//! descriptors are passed there. `docs/decisions/authentication.md` has the reasons.
//!
//! All three messages have a fixed length. Numbers are little-endian.
//!
//! | greeting | claim | verdict |
//! | --- | --- | --- |
//! | 8 bytes `doppel-b` | 8 bytes `doppel-p` | u8 verdict |
//! | u32 newest version | u32 newest version | 3 bytes zero |
//! | u8: 0 the kernel's word, 1 a secret | the same | 48 bytes Noise, or zero |
//! | u8: so many older versions, too | the same | |
//! | 2 bytes zero | 2 bytes zero | |
//! | 32 bytes challenge | 48 bytes Noise, or zero | |
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use snow::{Builder, HandshakeState};

use super::channel::{Channel, Stream};

use super::hurried::{Hurried, gather};
use super::secret::{Secret, SecretError};
use super::{HandshakeError, PATIENCE};
use crate::config::{Pair, Transport};
use crate::credentials::{is_believed, own_user, peer_user};
use crate::version::{Spoken, Version, Versions};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const BACKUP: [u8; 8] = *b"doppel-b";
const PRIMARY: [u8; 8] = *b"doppel-p";
const HEAD: usize = 16;
const CHALLENGE: usize = 32;
/// An ephemeral key and a tag.
const NOISE: usize = 48;

/// Bytes of a backup's greeting.
pub const GREETING: usize = HEAD + CHALLENGE;
/// Bytes of a primary's claim.
pub const CLAIM: usize = HEAD + NOISE;
/// Bytes of a backup's verdict.
pub const VERDICT: usize = 4 + NOISE;

/// How long a claim may take to come: a primary makes it at once, and a stranger that says nothing must not keep a place.
pub const FIRST_WORDS: Duration = Duration::from_secs(3);

const TAKEN: u8 = 0;
const OTHER_VERSION: u8 = 1;
const OTHER_PROOF: u8 = 2;
const OTHER_SECRET: u8 = 3;
const OTHER_USER: u8 = 4;

/// Whom to believe: who holds the secret, if there is one; and of processes of this host those of this user, or of root.
#[derive(Clone, Debug)]
pub struct Trust {
    secret: Option<Secret>,
    /// Asked for once: a confined thread cannot.
    user: u32,
    /// What this side speaks.
    versions: Versions,
}

/// Why it is not known whom to believe.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Anybody can speak over a network.
    #[error(
        "transport {} goes over a network, where anybody can speak: make a secret once by `doppel secret FILE`, copy the file \
         to the other host, and name it on both sides by --secret FILE (pair.secret)",
        transport.name()
    )]
    Missing {
        /// What is to carry the log.
        transport: Transport,
    },
    /// The file.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl Trust {
    /// Whom this configuration says to believe.
    ///
    /// # Errors
    /// See [`TrustError`].
    pub fn of(pair: &Pair) -> Result<Self, TrustError> {
        let trust = match (&pair.secret, pair.transport) {
            (Some(path), _) => Self::read(path)?,
            (None, Transport::Shm) => Self::same_user(),
            (None, transport) => return Err(TrustError::Missing { transport }),
        };
        Ok(trust.speaking(pair.versions))
    }

    /// The same, where this side speaks these versions.
    #[must_use]
    pub fn speaking(self, versions: Versions) -> Self {
        Self { versions, ..self }
    }

    /// Who holds the secret in this file.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        Ok(Self::holders(Secret::read(path)?))
    }

    /// Who holds this secret.
    #[must_use]
    pub fn holders(secret: Secret) -> Self {
        Self {
            secret: Some(secret),
            ..Self::same_user()
        }
    }

    /// Processes of this host and this user, or of root.
    #[must_use]
    pub fn same_user() -> Self {
        Self {
            secret: None,
            user: own_user(),
            versions: Versions::OURS,
        }
    }

    /// Whether a secret has to be proved.
    #[must_use]
    pub fn has_secret(&self) -> bool {
        self.secret.is_some()
    }

    fn kind(&self) -> u8 {
        u8::from(self.has_secret())
    }

    /// Descriptors are passed over a Unix socket, beside what is sealed; so whose process it is matters there in any case.
    fn check_user(&self, stream: &Stream) -> Result<(), HandshakeError> {
        let Stream::Unix(stream) = stream else {
            return Ok(());
        };
        let (theirs, ours) = (peer_user(stream)?, self.user);
        if is_believed(theirs, ours) {
            return Ok(());
        }
        Err(HandshakeError::User { theirs, ours })
    }
}

fn head(magic: [u8; 8], trust: &Trust) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&magic);
    head[8..12].copy_from_slice(&trust.versions.newest().0.to_le_bytes());
    head[12] = trust.kind();
    head[13] = trust.versions.older();
    head
}

/// What the other side's head says: whether it is one of ours, and fits. What the two then speak.
fn check_head(head: &[u8], magic: [u8; 8], trust: &Trust) -> Result<Spoken, HandshakeError> {
    let (name, rest) = head.split_at(8);
    if name != magic {
        return Err(HandshakeError::NotDoppel);
    }
    let newest = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
    // Before 7 there was no range, and a zero in its place.
    let oldest = newest.checked_sub(rest[5].into());
    let theirs = oldest
        .and_then(|oldest| Versions::new(Version(oldest), Version(newest)))
        .ok_or(HandshakeError::NotDoppel)?;
    let ours = trust.versions;
    let spoken = Spoken::between(ours, theirs).ok_or(HandshakeError::Version { theirs, ours })?;
    let kind = trust.kind();
    match rest[4..8] {
        [theirs @ 0..=1, _, 0, 0] if theirs == kind => Ok(spoken),
        [0..=1, _, 0, 0] => Err(HandshakeError::Proof { ours: kind == 1 }),
        _ => Err(HandshakeError::NotDoppel),
    }
}

fn noise<'a>(secret: &'a Secret, prologue: &'a [u8]) -> Builder<'a> {
    let pattern = PATTERN.parse().expect("a pattern that is built in");
    Builder::new(pattern)
        .psk(0, secret.bytes())
        .and_then(|builder| builder.prologue(prologue))
        .expect("each is given once")
}

fn sealed(
    stream: Stream,
    noise: HandshakeState,
    spoken: Spoken,
) -> Result<Channel, HandshakeError> {
    let keys = noise.into_transport_mode().map_err(io::Error::other)?;
    Ok(Channel::sealed(stream, keys, spoken))
}

/// The primary's side: proves itself to whoever listens at the other end, and has it prove itself.
///
/// # Errors
/// See [`HandshakeError`].
pub fn prove(stream: Stream, trust: &Trust) -> Result<Channel, HandshakeError> {
    trust.check_user(&stream)?;
    stream.set_patience(Some(PATIENCE))?;
    let mut greeting = [0; GREETING];
    Hurried::new(&stream, PATIENCE).read_exact(&mut greeting)?;
    let own = head(PRIMARY, trust);
    let mut claim = [0; CLAIM];
    claim[..HEAD].copy_from_slice(&own);
    let spoken = match check_head(&greeting[..HEAD], BACKUP, trust) {
        Ok(spoken) => spoken,
        Err(error) => {
            // It shall know as well; that it may be gone changes nothing.
            let _ = (&stream).write_all(&claim);
            return Err(error);
        }
    };
    let prologue = [&greeting[..], &own].concat();
    let mut keys = match &trust.secret {
        None => None,
        Some(secret) => {
            let mut keys = noise(secret, &prologue)
                .build_initiator()
                .map_err(io::Error::other)?;
            let length = keys
                .write_message(&[], &mut claim[HEAD..])
                .map_err(io::Error::other)?;
            debug_assert_eq!(length, NOISE);
            Some(keys)
        }
    };
    (&stream).write_all(&claim)?;
    let mut verdict = [0; VERDICT];
    Hurried::new(&stream, PATIENCE).read_exact(&mut verdict)?;
    if verdict[1..4] != [0; 3] {
        return Err(HandshakeError::NotDoppel);
    }
    match verdict[0] {
        TAKEN => {}
        OTHER_SECRET => return Err(HandshakeError::Secret),
        OTHER_VERSION => {
            let why = "it speaks other versions: upgrade the older side, one release at a time (docs/formats.md)";
            return Err(HandshakeError::Refused(why.to_owned()));
        }
        OTHER_PROOF => {
            let ours = trust.kind() == 1;
            return Err(HandshakeError::Proof { ours });
        }
        OTHER_USER => {
            let why = "this process's user is another than its own: run both as the same user";
            return Err(HandshakeError::Refused(why.to_owned()));
        }
        _ => return Err(HandshakeError::NotDoppel),
    }
    match keys.take() {
        None => Ok(Channel::open(stream, spoken)),
        Some(mut keys) => {
            keys.read_message(&verdict[4..], &mut [0; NOISE])
                .map_err(|_| HandshakeError::Secret)?;
            sealed(stream, keys, spoken)
        }
    }
}

/// Somebody at a backup's door, who was greeted and has made no whole claim yet.
#[derive(Debug)]
pub struct Caller {
    stream: Stream,
    greeting: [u8; GREETING],
    claim: [u8; CLAIM],
    got: usize,
    since: Instant,
}

impl Caller {
    /// Greets whoever has connected. `random` gives the challenge.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn greet(
        stream: Stream,
        trust: &Trust,
        mut random: impl Read,
    ) -> Result<Self, HandshakeError> {
        let mut greeting = [0; GREETING];
        greeting[..HEAD].copy_from_slice(&head(BACKUP, trust));
        random.read_exact(&mut greeting[HEAD..])?;
        stream.set_nonblocking(true)?;
        // It fits the empty buffer of a new connection.
        (&stream).write_all(&greeting)?;
        Ok(Self {
            stream,
            greeting,
            claim: [0; CLAIM],
            got: 0,
            since: Instant::now(),
        })
    }

    /// Takes in what has come, without waiting. Whether the claim is whole.
    ///
    /// # Errors
    /// If it is gone, or too late.
    pub fn listen(&mut self) -> io::Result<bool> {
        let until = self.until();
        gather(&self.stream, &mut self.claim, &mut self.got, until)
    }

    /// When it is too late.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.since + FIRST_WORDS
    }

    /// What it is waited for at.
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Judges a whole claim, and tells the caller.
    ///
    /// # Errors
    /// Why it is turned away.
    pub fn admit(self, trust: &Trust) -> Result<Channel, HandshakeError> {
        let Self {
            stream,
            greeting,
            claim,
            ..
        } = self;
        stream.set_nonblocking(false)?;
        stream.set_patience(Some(FIRST_WORDS))?;
        let mut verdict = [0; VERDICT];
        let judged = trust
            .check_user(&stream)
            .and_then(|()| check_head(&claim[..HEAD], PRIMARY, trust))
            .and_then(|spoken| match &trust.secret {
                None => Ok((None, spoken)),
                Some(secret) => {
                    let prologue = [&greeting[..], &claim[..HEAD]].concat();
                    let mut keys = noise(secret, &prologue)
                        .build_responder()
                        .map_err(io::Error::other)?;
                    keys.read_message(&claim[HEAD..], &mut [0; NOISE])
                        .map_err(|_| HandshakeError::Secret)?;
                    let length = keys
                        .write_message(&[], &mut verdict[4..])
                        .map_err(io::Error::other)?;
                    debug_assert_eq!(length, NOISE);
                    Ok((Some(keys), spoken))
                }
            });
        verdict[0] = match &judged {
            Ok(_) => TAKEN,
            Err(HandshakeError::Version { .. }) => OTHER_VERSION,
            Err(HandshakeError::Proof { .. }) => OTHER_PROOF,
            Err(HandshakeError::Secret) => OTHER_SECRET,
            Err(HandshakeError::User { .. }) => OTHER_USER,
            // Whatever it is, it would not understand.
            Err(_) => return Err(judged.expect_err("it is one")),
        };
        let told = (&stream).write_all(&verdict);
        let (keys, spoken) = judged?;
        told?;
        match keys {
            None => Ok(Channel::open(stream, spoken)),
            Some(keys) => sealed(stream, keys, spoken),
        }
    }
}

/// The backup's side for one connection: greets, waits for the claim and judges it.
///
/// # Errors
/// See [`HandshakeError`].
pub fn admit(stream: Stream, trust: &Trust) -> Result<Channel, HandshakeError> {
    let random = File::open("/dev/urandom")?;
    let mut caller = Caller::greet(stream, trust, random)?;
    caller.stream.set_nonblocking(false)?;
    caller.stream.set_patience(Some(FIRST_WORDS))?;
    let mut from = Hurried::new(&caller.stream, FIRST_WORDS);
    from.read_exact(&mut caller.claim)?;
    caller.admit(trust)
}

#[cfg(test)]
mod tests;
