//! The seal of what goes in bulk and not over the control connection: a copy's pieces, in the log's ring.
//!
//! Where the control connection is sealed, a key is drawn for one copy and said over it. Each piece is sealed with that key and
//! its number, which both sides count and nobody says: whoever is on the log's network learns nothing of the machine, and a
//! piece that was changed, left out, repeated or made by somebody else does not open. Where the control connection is not sealed
//! (one host, one user) the ring is memory of these two processes, and pieces go as they are.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};

use snow::params::CipherChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::Cipher;
use zeroize::Zeroizing;

use super::channel::forged;
use super::{Channel, HandshakeError, Hurried, PATIENCE};

/// Bytes by which a sealed piece is longer.
pub const PARCEL_TAG: usize = 16;

type Key = Zeroizing<[u8; 32]>;

/// One direction's key, and the number of the next piece.
pub struct Parcels {
    cipher: Box<dyn Cipher>,
    next: u64,
}

impl std::fmt::Debug for Parcels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parcels")
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl Parcels {
    fn new(key: &Key) -> Self {
        let mut cipher = DefaultResolver
            .resolve_cipher(&CipherChoice::ChaChaPoly)
            .expect("the proof uses this cipher, too");
        cipher.set(key);
        Self { cipher, next: 0 }
    }

    /// The sender's: draws a key and says it, if the connection is sealed.
    ///
    /// # Errors
    /// If the host has no random numbers, or the connection broke.
    pub fn give(mut control: &Channel, mut random: &File) -> Result<Option<Self>, HandshakeError> {
        if !control.is_sealed() {
            return Ok(None);
        }
        let mut key = Key::default();
        random.read_exact(&mut *key)?;
        control.write_all(&*key)?;
        Ok(Some(Self::new(&key)))
    }

    /// The receiver's: hears the key, if the connection is sealed.
    ///
    /// # Errors
    /// If the connection broke, or nothing came in time.
    pub fn take(control: &Channel) -> Result<Option<Self>, HandshakeError> {
        if !control.is_sealed() {
            return Ok(None);
        }
        let mut key = Key::default();
        Hurried::new(control, PATIENCE).read_exact(&mut *key)?;
        Ok(Some(Self::new(&key)))
    }

    /// Seals the next piece into `to`, which is longer by [`PARCEL_TAG`].
    pub fn seal(&mut self, piece: &[u8], to: &mut [u8]) {
        debug_assert_eq!(to.len(), piece.len() + PARCEL_TAG);
        self.cipher.encrypt(self.next, &[], piece, to);
        self.next += 1;
    }

    /// Opens the next piece into `to`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`](io::ErrorKind::InvalidData) for one that the peer did not seal, or not as the next; none opens after it.
    pub fn open(&mut self, sealed: &[u8], to: &mut Vec<u8>) -> io::Result<()> {
        let length = sealed.len().checked_sub(PARCEL_TAG).ok_or_else(forged)?;
        to.resize(length, 0);
        self.cipher
            .decrypt(self.next, &[], sealed, to)
            .map_err(|_| forged())?;
        self.next += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_open_in_order_and_as_they_were_sealed() {
        let key = Key::new([7; 32]);
        let (mut there, mut here) = (Parcels::new(&key), Parcels::new(&key));
        let mut sealed = |piece: &[u8]| {
            let mut to = vec![0; piece.len() + PARCEL_TAG];
            there.seal(piece, &mut to);
            to
        };
        let pieces = [&b"one"[..], b"", &[9; 5000]].map(|piece| (piece, sealed(piece)));
        let mut opened = Vec::new();
        for (piece, sealed) in &pieces {
            let (_, other) = pieces.iter().find(|(other, _)| other != piece).unwrap();
            let mut changed = sealed.clone();
            changed[0] ^= 1;
            // Another's turn, a changed one, too short a one: refused, and the right one still opens.
            for bad in [other, &changed, &sealed[..PARCEL_TAG - 1].to_vec()] {
                let error = here.open(bad, &mut opened).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            }
            here.open(sealed, &mut opened).unwrap();
            assert_eq!(opened, *piece);
        }
        here.open(&pieces[0].1, &mut opened).unwrap_err();
    }
}
