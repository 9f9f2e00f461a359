//! A command in a host, as a client sees it. Every wait has a limit: the emulator may hang, and the host vanish.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdma_log::locks::lock;

use super::Host;
use super::wire::{Credit, Frame, Kind, MAX_PAYLOAD, Start};

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its code; 128 + N if signal N ended it.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

/// What happens to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It wrote to standard output.
    Output(Vec<u8>),
    /// It wrote to standard error.
    Error(Vec<u8>),
    /// It ended with this code.
    Ended(i32),
    /// It could not be started, or its host is gone.
    Failed(String),
}

/// The time was up.
#[derive(Debug, thiserror::Error)]
#[error("{host}: the command did not end within {limit:?}, and was killed")]
pub struct TimeUp {
    /// Where it ran.
    pub host: String,
    /// How long it was given.
    pub limit: Duration,
}

/// A command that runs. Dropping it kills the command.
#[derive(Debug)]
pub struct Session {
    host: String,
    writer: Arc<Mutex<UnixStream>>,
    happenings: Receiver<Happening>,
    credit: Arc<Credit>,
}

impl Session {
    pub(super) fn begin(
        host: &str,
        mut reader: BufReader<UnixStream>,
        start: &Start,
    ) -> Result<Self> {
        let stream = reader.get_ref().try_clone().context("share the socket")?;
        stream.set_read_timeout(None).context("wait for long")?;
        let writer = Arc::new(Mutex::new(stream));
        let credit = Arc::new(Credit::default());
        let (sender, happenings) = channel();
        let (crediting, granted) = (Arc::clone(&writer), Arc::clone(&credit));
        let session = Self {
            host: host.to_owned(),
            writer,
            happenings,
            credit,
        };
        let what = serde_json::to_vec(start).context("write the command")?;
        ensure!(what.len() <= MAX_PAYLOAD, "the command is too long");
        session.tell(&Frame::new(0, Kind::Start, what))?;
        std::thread::spawn(move || {
            let failed = loop {
                let frame = match Frame::read(&mut reader) {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break "the lab has ended".to_owned(),
                    Err(error) => break format!("the lab's supervisor: {error}"),
                };
                let bytes = frame.payload.len() as i32;
                let happening = match frame.kind {
                    Kind::Output => Happening::Output(frame.payload),
                    Kind::Error => Happening::Error(frame.payload),
                    Kind::Ended => Happening::Ended(frame.as_number().unwrap_or(255)),
                    Kind::Failed => Happening::Failed(frame.text()),
                    Kind::Credit => {
                        granted.give(frame.as_number().unwrap_or(0).max(0) as usize);
                        continue;
                    }
                    _ => continue,
                };
                let over = matches!(happening, Happening::Ended(_) | Happening::Failed(_));
                if sender.send(happening).is_err() || over {
                    granted.lift();
                    return;
                }
                let mut writer = lock(&crediting);
                // If it cannot be told, the next read says why.
                let _ = Frame::number(0, Kind::Credit, bytes).write(&mut *writer);
            };
            granted.lift();
            let _ = sender.send(Happening::Failed(failed));
        });
        Ok(session)
    }

    fn tell(&self, frame: &Frame) -> Result<()> {
        let mut writer = lock(&self.writer);
        frame
            .write(&mut *writer)
            .context("reach the lab's supervisor")
    }

    /// Feeds this to its standard input, in a thread, and ends the input when it ends.
    pub fn feed(&self, mut input: impl Read + Send + 'static) {
        let (writer, credit) = (Arc::clone(&self.writer), Arc::clone(&self.credit));
        std::thread::spawn(move || {
            let mut buffer = vec![0; MAX_PAYLOAD];
            loop {
                let read = input.read(&mut buffer).unwrap_or(0);
                let mut rest = &buffer[..read];
                loop {
                    let now = match rest.len() {
                        0 => 0,
                        wanted => credit.take(wanted),
                    };
                    let (bytes, later) = rest.split_at(now);
                    let frame = Frame::new(0, Kind::Input, bytes);
                    let mut stream = lock(&writer);
                    // A command that is over needs no more input; who waits for it hears why.
                    if frame.write(&mut *stream).is_err() {
                        return;
                    }
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                if read == 0 {
                    return;
                }
            }
        });
    }

    /// Its standard input is empty.
    pub fn no_input(&self) {
        // Who cannot be told is over, and what happened says how.
        let _ = self.tell(&Frame::new(0, Kind::Input, Vec::new()));
    }

    /// Kills it. What it wrote before can still be read.
    pub fn kill(&self) {
        // As above.
        let _ = self.tell(&Frame::new(0, Kind::Kill, Vec::new()));
    }

    /// What happens next; `None` when nothing does until then.
    ///
    /// # Errors
    /// If its end was told before.
    pub fn next(&self, until: Instant) -> Result<Option<Happening>> {
        let left = until.saturating_duration_since(Instant::now());
        match self.happenings.recv_timeout(left) {
            Ok(happening) => Ok(Some(happening)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("{}: the command is over", self.host),
        }
    }

    /// Waits for its end, with each piece of output as it comes.
    ///
    /// # Errors
    /// [`TimeUp`], or if it could not be started or its host is gone.
    pub fn follow(
        &self,
        limit: Duration,
        mut output: impl FnMut(Happening) -> Result<()>,
    ) -> Result<i32> {
        let until = Instant::now() + limit;
        loop {
            match self.next(until)? {
                Some(Happening::Ended(code)) => return Ok(code),
                Some(Happening::Failed(why)) => bail!("{}: {why}", self.host),
                Some(happening) => output(happening)?,
                None => {
                    // The connection's end kills it too, if the agent still hears.
                    self.kill();
                    return Err(TimeUp {
                        host: self.host.clone(),
                        limit,
                    }
                    .into());
                }
            }
        }
    }

    /// Waits for its end, and gathers what it writes. Its input is empty.
    ///
    /// # Errors
    /// As [`Session::follow`].
    pub fn finish(self, limit: Duration) -> Result<Finished> {
        self.no_input();
        self.gather(limit)
    }

    fn gather(self, limit: Duration) -> Result<Finished> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = self.follow(limit, |happening| {
            match happening {
                Happening::Output(bytes) => stdout.extend(bytes),
                Happening::Error(bytes) => stderr.extend(bytes),
                Happening::Ended(_) | Happening::Failed(_) => {}
            }
            Ok(())
        })?;
        Ok(Finished {
            code,
            stdout,
            stderr,
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let writer = lock(&self.writer);
        let _ = writer.shutdown(Shutdown::Both);
    }
}

impl Start {
    /// A command of these words.
    #[must_use]
    pub fn new(words: &[&str]) -> Self {
        Self {
            command: words.iter().map(|&word| word.to_owned()).collect(),
            environment: Vec::new(),
            detached_to: None,
        }
    }
}

/// Whole or not at all: a program that runs from the old file does not see it change.
const PUT: &str = r#"set -e
to=$1
case "$to" in */) to=$to$3 ;; esac
if [ -d "$to" ]; then to=$to/$3; fi
mkdir -p "$(dirname "$to")"
cat >"$to.part"
chmod "$2" "$to.part"
mv -f "$to.part" "$to""#;

pub(super) fn put(host: &Host<'_>, from: &Path, to: &str, limit: Duration) -> Result<()> {
    let what = || format!("put {} to {}", from.display(), host.name());
    let file = File::open(from).with_context(what)?;
    let facts = file.metadata().with_context(what)?;
    ensure!(facts.is_file(), "{} is not a file", from.display());
    let mode = format!("{:o}", facts.permissions().mode() & 0o7777);
    let name = from.file_name().with_context(what)?.to_string_lossy();
    let session = host.session(&Start::new(&["sh", "-c", PUT, "put", to, &mode, &name]))?;
    session.feed(file);
    let finished = session.gather(limit).with_context(what)?;
    ensure!(
        finished.code == 0,
        "{}: {}",
        what(),
        String::from_utf8_lossy(&finished.stderr).trim()
    );
    Ok(())
}

pub(super) fn get(host: &Host<'_>, from: &str, to: &Path, limit: Duration) -> Result<()> {
    let what = || format!("get {from} from {}", host.name());
    let to = match (to.is_dir(), from.rsplit('/').next()) {
        (true, Some(name)) => to.join(name),
        _ => to.to_owned(),
    };
    let mode = host.run(&["stat", "-L", "-c", "%a", "--", from], limit)?;
    ensure!(
        mode.code == 0,
        "{}: {}",
        what(),
        String::from_utf8_lossy(&mode.stderr).trim()
    );
    let mode = String::from_utf8_lossy(&mode.stdout);
    let mode = u32::from_str_radix(mode.trim(), 8).with_context(what)?;
    let session = host.session(&Start::new(&["cat", "--", from]))?;
    session.no_input();
    let part = to.with_added_extension("part");
    let mut file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(mode)
        .open(&part)
        .with_context(|| format!("make {}", part.display()))?;
    let mut errors = Vec::new();
    let code = session.follow(limit, |happening| {
        match happening {
            Happening::Output(bytes) => file.write_all(&bytes).context("write the copy")?,
            Happening::Error(bytes) => errors.extend(bytes),
            Happening::Ended(_) | Happening::Failed(_) => {}
        }
        Ok(())
    })?;
    if code != 0 {
        let _ = fs::remove_file(&part);
        bail!("{}: {}", what(), String::from_utf8_lossy(&errors).trim());
    }
    fs::rename(&part, &to).with_context(|| format!("put {} in place", to.display()))
}
