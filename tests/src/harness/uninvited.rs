//! Who comes to a backup's door without the pair's secret: nobody of them hears more than a greeting and a refusal.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::handshake::proof::{CLAIM, GREETING, VERDICT};
use hypervisor::handshake::{self, HandshakeError, Secret, Stream, Trust, VERSION};

use super::random::Random;

/// Longer than a backup listens to whoever says nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one without the secret tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uninvited {
    /// Says nothing and closes.
    Closes,
    /// Random bytes.
    Garbage,
    /// What a primary of the version before said first.
    OldHello,
    /// The beginning of a claim.
    CutClaim,
    /// Says that there is no secret.
    NoSecret,
    /// Holds another pair's.
    WrongSecret,
    /// Another version.
    Version,
    /// All that a real primary of this pair has said before.
    Replayed,
}

/// All of them.
pub const UNINVITED: [Uninvited; 8] = [
    Uninvited::Closes,
    Uninvited::Garbage,
    Uninvited::OldHello,
    Uninvited::CutClaim,
    Uninvited::NoSecret,
    Uninvited::WrongSecret,
    Uninvited::Version,
    Uninvited::Replayed,
];

impl Uninvited {
    /// Visits the backup at this address. `recorded` is what a real primary said.
    ///
    /// # Errors
    /// If the backup says more than it may, or keeps the visitor.
    pub fn visit(self, address: SocketAddr, recorded: &[u8], random: &mut Random) -> Result<()> {
        let mut stream = TcpStream::connect(address).context("reach the backup")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        if let Self::WrongSecret = self {
            let trust = Trust::holders(Secret::random()?);
            return match handshake::prove(Stream::Tcp(stream), &trust) {
                Err(HandshakeError::Secret) => Ok(()),
                Err(other) => bail!("a wrong secret is called something else: {other}"),
                Ok(_) => bail!("a wrong secret is as good as the right one"),
            };
        }
        let claim = |version: u32, kind: u8| {
            let mut claim = b"doppel-p".to_vec();
            claim.extend(version.to_le_bytes());
            claim.extend([kind, 0, 0, 0]);
            claim.resize(CLAIM, 0);
            claim
        };
        let said = match self {
            Self::Closes | Self::WrongSecret => Vec::new(),
            Self::Garbage => (0..4096).map(|_| random.next() as u8).collect(),
            Self::OldHello => {
                let text = br#"{"version":2,"cpu":{"vendor":"x","signature":1},"name":"machine","identity":"0"}"#;
                [&(text.len() as u32).to_le_bytes()[..], text].concat()
            }
            Self::CutClaim => {
                claim(VERSION, 1)[..1 + random.below(CLAIM as u64 - 1) as usize].to_vec()
            }
            Self::NoSecret => claim(VERSION, 0),
            Self::Version => claim(VERSION + 1, 1),
            Self::Replayed => recorded.to_vec(),
        };
        // It may have heard enough before all is said.
        let _ = stream.write_all(&said);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            ensure!(
                error.kind() == ErrorKind::ConnectionReset,
                "the backup does not get rid of {self:?}: {error}"
            );
        }
        ensure!(
            answer.len() <= GREETING + VERDICT,
            "{self:?} was told {} bytes",
            answer.len()
        );
        let verdict = answer.get(GREETING..).unwrap_or_default();
        ensure!(
            verdict.first() != Some(&0),
            "{self:?} was taken for a primary"
        );
        Ok(())
    }
}
