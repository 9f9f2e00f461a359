//! Recording and replaying with the real program, under load and kicks; and log files taken apart and put together again.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufWriter, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::NetPort;
use hypervisor::entry::{Decoder, Encoder, Entry};
use rdma_log::{Lane, LogFileReader, LogFileWriter, Marks, Nonce};
use serde::Deserialize;

use super::load::{Kicker, Target};
use super::program;
use super::signal::{self, Signal};

/// What is recorded.
#[derive(Clone, Debug)]
pub struct Take {
    /// `--guest`.
    pub guest: String,
    /// `--memory`.
    pub memory_mib: u32,
    /// `--command-line`.
    pub words: String,
    /// Whether every exit is logged.
    pub every_exit: bool,
    /// How often the whole memory's hash goes into the log; 0 is never.
    pub memory_check_ms: u64,
    /// The longest that it may take.
    pub longest: Duration,
}

/// A recording that ended well.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The log.
    pub log: PathBuf,
    /// Sync points.
    pub sync_points: u64,
    /// Hash of the whole memory at the end.
    pub memory_hash: String,
    /// How often the vCPU was kicked.
    pub kicks: u64,
}

/// A recording under way.
#[derive(Debug)]
pub struct Recording {
    running: Running,
    log: PathBuf,
    longest: Duration,
}

impl Recording {
    /// Starts `doppel record` into `directory`; its vCPU is kicked from then on if there is a seed for that.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        directory: &Path,
        name: &str,
        take: &Take,
        port: Option<&NetPort>,
        kicks: Option<u64>,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let config = directory.join(format!("{name}.toml"));
        std::fs::write(
            &config,
            format!("[timing]\nmemory_check_ms = {}\n", take.memory_check_ms),
        )
        .context("write a configuration")?;
        let mut arguments: Vec<String> = [
            "record",
            "--json",
            "--guest",
            &take.guest,
            "--command-line",
            &take.words,
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(["--memory".into(), take.memory_mib.to_string()]);
        arguments.extend(["--config".into(), config.display().to_string()]);
        arguments.extend(["--out".into(), log.display().to_string()]);
        if take.every_exit {
            arguments.push("--every-exit".into());
        }
        // Kept until the child has its own.
        let inheritable = port
            .map(NetPort::inheritable)
            .transpose()
            .context("share the network port")?;
        if let Some(fd) = &inheritable {
            arguments.extend(["--net-fd".into(), fd.as_raw_fd().to_string()]);
        }
        let kicks = kicks.map(|seed| (Target::Named("vcpu"), seed));
        let running = Running::start(directory, &format!("{name}-record"), &arguments, kicks)?;
        Ok(Self {
            running,
            log,
            longest: take.longest,
        })
    }

    /// Asks it to end at the guest's next sync point, as Ctrl-C does.
    ///
    /// # Errors
    /// If it has been reaped.
    pub fn interrupt(&self) -> Result<()> {
        signal::send(self.running.child.id(), Signal::Interrupt)
    }

    /// Waits until its guest has turned itself off, or it was interrupted, and the log is whole.
    ///
    /// # Errors
    /// If it ends badly or not in time, or its end cannot be compared.
    pub fn finish(self) -> Result<Recorded> {
        let ended = self.running.finish(self.longest)?;
        ended.ensure_code(0).context("doppel record")?;
        let said: Said = ended.last_line().context("doppel record")?;
        Ok(Recorded {
            log: self.log,
            sync_points: said.sync_points.context("the recording has no end")?,
            memory_hash: said.memory_hash.context("the recording has no end")?,
            kicks: ended.kicks,
        })
    }
}

#[derive(Debug, Deserialize)]
struct Said {
    sync_points: Option<u64>,
    memory_hash: Option<String>,
}

/// What `doppel replay --json` said.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Replayed {
    /// Sync points that were run.
    pub sync_points: u64,
    /// Divergences: 0 or 1.
    pub mismatches: u64,
    /// The memory's hash in the log's last entry.
    pub memory_hash_recorded: Option<String>,
    /// The memory's hash after the replay.
    pub memory_hash_replayed: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
    /// The exit code.
    #[serde(skip)]
    pub code: i32,
    /// What it said to people.
    #[serde(skip)]
    pub messages: String,
    /// How often the vCPU was kicked.
    #[serde(skip)]
    pub kicks: u64,
}

/// Runs `doppel replay` on a log; its vCPU is kicked if there is a seed for that.
///
/// # Errors
/// If it does not end in time, or says something else than one JSON object.
pub fn replay(log: &Path, longest: Duration, kicks: Option<u64>) -> Result<Replayed> {
    let directory = log.parent().context("a log in a directory")?;
    let name = log
        .file_stem()
        .and_then(|stem| stem.to_str())
        .context("a log with a name")?;
    let arguments = [
        "replay".to_owned(),
        "--json".to_owned(),
        log.display().to_string(),
    ];
    // A replay has no I/O thread: its first thread runs the vCPU.
    let kicks = kicks.map(|seed| (Target::First, seed));
    let ended =
        Running::start(directory, &format!("{name}-replay"), &arguments, kicks)?.finish(longest)?;
    ensure!(
        ended.output.lines().count() == 1,
        "standard output is not one JSON object: {:?}, {}",
        ended.output,
        ended.messages
    );
    let mut replayed: Replayed = ended.last_line()?;
    replayed.code = ended
        .status
        .code()
        .with_context(|| format!("doppel replay ended by {}", ended.status))?;
    replayed.messages = ended.messages;
    replayed.kicks = ended.kicks;
    Ok(replayed)
}

impl Replayed {
    /// Says what differs unless this replay is the recording, exactly.
    ///
    /// # Errors
    /// What differs.
    pub fn ensure_equal(&self, recorded: &Recorded) -> Result<()> {
        let what = format!("{self:?}");
        ensure!(
            self.code == 0 && self.error.is_none() && self.mismatches == 0,
            "the replay differs: {what}"
        );
        ensure!(
            self.sync_points == recorded.sync_points,
            "{} sync points were recorded: {what}",
            recorded.sync_points
        );
        let hash = Some(&recorded.memory_hash);
        ensure!(
            self.memory_hash_recorded.as_ref() == hash
                && self.memory_hash_replayed.as_ref() == hash,
            "the memory's hash was {} at the recording's end: {what}",
            recorded.memory_hash
        );
        Ok(())
    }
}

/// A running `doppel`, ended when it is dropped and with the thread that started it (`setpriv --pdeathsig`).
#[derive(Debug)]
struct Running {
    // Stopped before the child is reaped.
    kicker: Option<Kicker>,
    child: Child,
    output: Receiver<String>,
    errors: PathBuf,
}

struct Ended {
    status: ExitStatus,
    output: String,
    messages: String,
    kicks: u64,
}

impl Ended {
    fn ensure_code(&self, code: i32) -> Result<()> {
        ensure!(
            self.status.code() == Some(code),
            "ended by {}: {}",
            self.status,
            self.messages
        );
        Ok(())
    }

    fn last_line<T: for<'a> Deserialize<'a>>(&self) -> Result<T> {
        let line = self
            .output
            .lines()
            .last()
            .with_context(|| format!("it said nothing; {}", self.messages))?;
        serde_json::from_str(line).with_context(|| format!("it said {line:?}"))
    }
}

impl Running {
    fn start(
        directory: &Path,
        name: &str,
        arguments: &[String],
        kicks: Option<(Target, u64)>,
    ) -> Result<Self> {
        let errors = directory.join(format!("{name}.stderr"));
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program::doppel()?)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).context("create a file for messages")?)
            .spawn()
            .context("start doppel by setpriv: run scripts/install-test-tools")?;
        let mut stdout = child.stdout.take().expect("it was asked for");
        let (tell, output) = channel();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut text = String::new();
                // What is no text is no JSON either, and is judged as such.
                let _ = stdout.read_to_string(&mut text);
                let _ = tell.send(text);
            })
            .context("start a thread")?;
        let mut running = Self {
            kicker: None,
            child,
            output,
            errors,
        };
        if let Some((target, seed)) = kicks {
            running.kicker = Some(Kicker::start(running.child.id(), target, seed)?);
        }
        Ok(running)
    }

    fn messages(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits for its end. The end of its output comes first: up to there it is kicked, and not reaped.
    fn finish(mut self, longest: Duration) -> Result<Ended> {
        let output = match self.output.recv_timeout(longest) {
            Ok(output) => output,
            Err(RecvTimeoutError::Timeout) => bail!(
                "not over after {} s: {}",
                longest.as_secs(),
                self.messages()
            ),
            Err(RecvTimeoutError::Disconnected) => bail!("its output is lost: {}", self.messages()),
        };
        let kicks = self.kicker.take().map_or(Ok(0), Kicker::stop)?;
        let status = self.child.wait().context("wait for doppel")?;
        Ok(Ended {
            status,
            output,
            messages: self.messages(),
            kicks,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kicker = None;
        // It fails only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One entry of a log file, and where it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which lane it is in.
    pub lane: Lane,
    /// Epoch and watermarks.
    pub marks: Marks,
    /// What it carries.
    pub payload: Vec<u8>,
    /// The first byte of the file after it.
    pub end: u64,
}

/// A log file in memory.
#[derive(Clone, Debug)]
pub struct Log {
    /// The machine's description, as it stands in the file.
    pub description: Vec<u8>,
    /// Where the first entry starts.
    pub start: u64,
    /// Both lanes, in the file's order.
    pub items: Vec<Item>,
    nonce: Nonce,
}

impl Log {
    /// Reads a whole file.
    ///
    /// # Errors
    /// If it is not whole.
    pub fn read(path: &Path) -> Result<Self> {
        let mut reader = LogFileReader::open(path)?;
        let start = reader.offset();
        let mut items = Vec::new();
        while let Some(found) = reader.next()? {
            items.push(Item {
                lane: found.entry.lane(),
                marks: found.entry.marks(),
                payload: found.entry.payload().to_vec(),
                end: found.offset + found.entry.raw().len() as u64,
            });
        }
        Ok(Self {
            description: reader.description().to_vec(),
            start,
            items,
            nonce: reader.nonce(),
        })
    }

    /// Writes it to a file: every entry with its number and its checksum made anew.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = BufWriter::new(File::create(path).context("create a log file")?);
        let mut writer = LogFileWriter::create(file, self.nonce, &self.description)?;
        for item in &self.items {
            writer.append(item.lane, &item.payload, item.marks)?;
        }
        writer.finish()?;
        Ok(())
    }

    /// What the entries of the events lane mean, each with the index of its item.
    ///
    /// # Errors
    /// If one means nothing.
    pub fn entries(&self) -> Result<Vec<(usize, Entry)>> {
        let mut decoder = Decoder::default();
        let events = self
            .items
            .iter()
            .enumerate()
            .filter(|(_, item)| item.lane == Lane::Events);
        events
            .map(|(index, item)| Ok((index, decoder.decode(&item.payload)?)))
            .collect()
    }

    /// The same log with these entries in its events lane, an item without an entry left out. Frames stay as they are.
    #[must_use]
    pub fn with_entries(&self, entries: &[(usize, Entry)]) -> Self {
        let mut encoder = Encoder::default();
        let mut entries = entries.iter().peekable();
        let mut items = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            let mut item = item.clone();
            if item.lane == Lane::Events {
                let Some((_, entry)) = entries.next_if(|(of, _)| *of == index) else {
                    continue;
                };
                item.payload = encoder.encode(entry).to_vec();
            }
            items.push(item);
        }
        Self {
            items,
            ..self.clone()
        }
    }
}
