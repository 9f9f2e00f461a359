//! Somebody between a primary and its backup: passes everything on, descriptors too, and keeps the ring's memory for itself.
//!
//! ```text
//! primary ──▶ front ──▶ meddler ──▶ back ──▶ backup
//!                          └── a copy of the log's descriptor: any byte of the ring can be changed while the pair runs
//! ```
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use hypervisor::handshake::proof::CLAIM;
use rdma_log::fdpass::{recv_with_fds, send_with_fds};

/// Where the events lane begins: behind the page of shared words.
const EVENTS: u64 = 4096;

/// The ring's memory, as the meddler has it.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    /// Bytes of the events lane.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn events(&self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0
            .read_exact_at(&mut bytes, EVENTS)
            .context("read the ring")?;
        Ok(bytes)
    }

    /// Overwrites the events lane from its start.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn overwrite(&self, bytes: &[u8]) -> Result<()> {
        self.0.write_all_at(bytes, EVENTS).context("write the ring")
    }

    /// Bytes committed to the events lane so far; the word that says so is the first of the page.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn committed(&self) -> Result<u64> {
        let mut word = [0; 8];
        self.0
            .read_exact_at(&mut word, 0)
            .context("read the ring")?;
        Ok(u64::from_le_bytes(word))
    }
}

/// Listens at `front` for one primary, connects it to the backup at `back`, and hands out the ring's memory when it passes.
///
/// # Errors
/// If it cannot listen or connect.
pub fn between(front: &Path, back: &Path) -> Result<Receiver<Memory>> {
    let listener = UnixListener::bind(front).context("listen for the primary")?;
    let backup = UnixStream::connect(back).context("connect to the backup")?;
    let (give, memory) = channel();
    std::thread::Builder::new()
        .name("meddler".into())
        .spawn(move || {
            // When either side is gone there is nothing left to meddle with.
            let _ = relay(&listener, &backup, &give);
        })
        .context("start a thread")?;
    Ok(memory)
}

fn relay(listener: &UnixListener, backup: &UnixStream, give: &Sender<Memory>) -> Result<()> {
    let (primary, _) = listener.accept().context("await the primary")?;
    let (to_primary, from_backup) = (primary.try_clone()?, backup.try_clone()?);
    let give = give.clone();
    let answers = std::thread::spawn(move || pass_on(&from_backup, &to_primary, Some(&give)));
    hello(&primary, backup)?;
    pass_on(&primary, backup, None);
    // A thread of plain loops ends.
    let _ = answers.join();
    Ok(())
}

/// The primary's proof, its first message and the machine's description, which have no descriptors and may be long.
fn hello(mut from: &UnixStream, mut to: &UnixStream) -> Result<()> {
    from.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut claim = [0; CLAIM];
    from.read_exact(&mut claim)?;
    to.write_all(&claim)?;
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut text = vec![0; u32::from_le_bytes(length) as usize];
    from.read_exact(&mut text)?;
    let hello: serde_json::Value = serde_json::from_slice(&text)?;
    let mut rest = vec![0; hello["spec_bytes"].as_u64().context("spec_bytes")? as usize];
    from.read_exact(&mut rest)?;
    from.set_read_timeout(None)?;
    to.write_all(&length)?;
    to.write_all(&text)?;
    Ok(to.write_all(&rest)?)
}

/// Byte by byte, so that each descriptor stays with its byte. Until either end closes.
fn pass_on(from: &UnixStream, to: &UnixStream, give: Option<&Sender<Memory>>) {
    let mut byte = [0];
    while let Ok(fds) = recv_with_fds(from, &mut byte, 1) {
        if let (Some(give), Some(fd)) = (give, fds.first())
            && let Ok(copy) = fd.try_clone()
        {
            // Nobody wants it any more: then nobody meddles.
            let _ = give.send(Memory(File::from(copy)));
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if send_with_fds(to, &byte, &fds).is_err() {
            break;
        }
    }
    // A connection that is gone needs no end.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
