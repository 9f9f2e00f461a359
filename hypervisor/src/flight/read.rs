//! A recording, for a replay: the newest checkpoint that is whole and the logs from there on, as one.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rdma_log::{Lane, LogFileError, LogFileReader, Seq};

use super::FlightError;
use super::directory::{Directory, Name};
use super::files::{HEAD, Head, Kind, LogHead};
use crate::checkpoint::clone;
use crate::disk::Done;
use crate::entry::Base;
use crate::kvm::KvmSource;
use crate::machine::{ENCODED_MAX, Machine, MachineSpec};
use crate::replay::{Arrived, LogError, LogSource};
use crate::ring_log::Staged;

/// What is recorded in a directory.
#[derive(Debug)]
pub struct Recording {
    /// The machine.
    pub spec: MachineSpec,
    checkpoint: Option<(PathBuf, BufReader<File>)>,
    logs: VecDeque<Segment>,
    bytes: u64,
    torn: Option<String>,
    /// Nobody begins a recording here meanwhile.
    directory: Directory,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    head: LogHead,
    reader: LogFileReader<BufReader<File>>,
}

fn bad(path: &Path, why: impl Into<String>) -> FlightError {
    FlightError::Bad {
        path: path.to_owned(),
        why: why.into(),
    }
}

impl Recording {
    /// Opens what is recorded there: every file that the replay needs, so that a confined thread can read it.
    ///
    /// # Errors
    /// See [`FlightError`].
    pub fn open(path: &Path) -> Result<Self, FlightError> {
        let directory = Directory::to_read(path)?;
        let nothing = |why| FlightError::Nothing {
            path: path.to_owned(),
            why,
        };
        let names: BTreeSet<Name> = directory
            .names()?
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        if !names.contains(&Name::Machine) {
            return Err(nothing(
                "it has no description of a machine (a recorder that was killed as it began leaves none)",
            ));
        }
        let (recording, spec) = machine(&directory)?;
        let mut torn = None;
        let mut logs = BTreeMap::new();
        let last = names.iter().rev().find_map(|name| match name {
            Name::Log(number) => Some(*number),
            _ => None,
        });
        for name in &names {
            let Name::Log(number) = *name else { continue };
            match segment(&directory.log(number), recording, number) {
                Ok(found) => drop(logs.insert(number, found)),
                // It was just being made.
                Err(FlightError::Log {
                    path,
                    source: LogFileError::Cut { end, .. },
                }) if Some(number) == last => {
                    torn = Some(format!(
                        "{} ends at byte {end}, in its head",
                        path.display()
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        let newest = names.iter().rev().find_map(|name| match name {
            Name::Checkpoint(number) => Some(*number),
            _ => None,
        });
        let at_power_on = || {
            let first = logs.iter().find(|(_, log)| log.head.at_power_on);
            first.map(|(number, _)| *number)
        };
        let Some(first) = newest.or_else(at_power_on) else {
            return Err(nothing("no checkpoint was whole when the recorder ended"));
        };
        let checkpoint = match newest {
            Some(number) => Some(checkpoint(
                &directory.checkpoint(number),
                recording,
                number,
            )?),
            None => None,
        };
        let mut chain = VecDeque::new();
        let mut bytes = 0;
        for (number, log) in logs.split_off(&first) {
            if number != first + chain.len() as u64 {
                let missing = directory.log(first + chain.len() as u64);
                return Err(bad(&missing, "it is missing, and a later log is there"));
            }
            let length = std::fs::metadata(&log.path);
            bytes += length.map_err(FlightError::io("look at", &log.path))?.len();
            chain.push_back(log);
        }
        Ok(Self {
            spec,
            checkpoint,
            logs: chain,
            bytes,
            torn,
            directory,
        })
    }

    /// Makes the machine as it was at the checkpoint, and what its log counts from; none if it is at power-on.
    ///
    /// # Errors
    /// [`FlightError::Machine`], [`FlightError::Checkpoint`].
    pub fn machine(&mut self, kvm: &KvmSource) -> Result<(Machine, Option<Base>), FlightError> {
        let mut machine = Machine::new(kvm, &self.spec)?;
        let Some((path, mut from)) = self.checkpoint.take() else {
            return Ok((machine, None));
        };
        let (restored, _) = clone::receive(&mut from, &mut machine, None).map_err(|source| {
            FlightError::Checkpoint {
                path: path.clone(),
                source,
            }
        })?;
        let mut more = [0];
        match from.read(&mut more) {
            Ok(0) => {}
            Ok(_) => return Err(bad(&path, "more bytes follow the checkpoint")),
            Err(error) => return Err(FlightError::io("read", path)(error)),
        }
        if let Some(log) = self.logs.front()
            && log.head.position != machine.position().0
        {
            return Err(bad(
                &log.path,
                format!(
                    "it begins at position {}, its checkpoint is of {}",
                    log.head.position,
                    machine.position()
                ),
            ));
        }
        Ok((machine, Some(restored.base)))
    }

    /// Its logs.
    #[must_use]
    pub fn source(self) -> FlightSource {
        FlightSource {
            logs: self.logs,
            staged: Staged::default(),
            payload: Vec::new(),
            over: false,
            torn: self.torn,
            bytes: self.bytes,
            passed: 0,
            read: Arc::default(),
            _directory: self.directory,
        }
    }
}

/// The description of the machine, and the recording's number.
fn machine(directory: &Directory) -> Result<(u64, MachineSpec), FlightError> {
    let path = directory.machine();
    let (head, mut from) = open(&path, Kind::Machine)?;
    if head.length > u64::from(ENCODED_MAX) {
        return Err(bad(&path, "it says that it is larger than any can be"));
    }
    let mut bytes = Vec::new();
    // And one more, which it must not have.
    from.by_ref()
        .take(head.length + 1)
        .read_to_end(&mut bytes)
        .map_err(FlightError::io("read", &path))?;
    if bytes.len() as u64 != head.length {
        let why = match bytes.len() as u64 {
            more if more > head.length => {
                format!("more bytes follow than the {} that it says", head.length)
            }
            fewer => format!("it has {fewer} bytes, where it says {}", head.length),
        };
        return Err(bad(&path, why));
    }
    let found = rdma_log::crc32c(&bytes);
    if found != head.checksum {
        let why = format!(
            "it is damaged: checksum {found:08x}, where it says {:08x}",
            head.checksum
        );
        return Err(bad(&path, why));
    }
    let spec = MachineSpec::decode(&bytes).map_err(|source| FlightError::Spec { path, source })?;
    Ok((head.recording, spec))
}

fn open(path: &Path, kind: Kind) -> Result<(Head, BufReader<File>), FlightError> {
    let file = File::open(path).map_err(FlightError::io("open", path))?;
    let mut from = BufReader::with_capacity(1 << 20, file);
    let mut head = Vec::with_capacity(HEAD);
    from.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(FlightError::io("read", path))?;
    let head = Head::decode(kind, &head).map_err(|why| bad(path, why))?;
    Ok((head, from))
}

fn belongs(
    path: &Path,
    (recording, segment): (u64, u64),
    expected: (u64, u64),
) -> Result<(), FlightError> {
    if recording != expected.0 {
        return Err(bad(path, "it belongs to another recording"));
    }
    if segment != expected.1 {
        return Err(bad(
            path,
            format!("it is of segment {segment}, not of the one that its name says"),
        ));
    }
    Ok(())
}

fn checkpoint(
    path: &Path,
    recording: u64,
    number: u64,
) -> Result<(PathBuf, BufReader<File>), FlightError> {
    let (head, from) = open(path, Kind::Checkpoint)?;
    belongs(path, (head.recording, head.segment), (recording, number))?;
    Ok((path.to_owned(), from))
}

fn segment(path: &Path, recording: u64, number: u64) -> Result<Segment, FlightError> {
    let reader = LogFileReader::open(path).map_err(FlightError::log(path))?;
    let head = LogHead::decode(reader.description()).map_err(|why| bad(path, why))?;
    belongs(path, (head.recording, head.segment), (recording, number))?;
    Ok(Segment {
        path: path.to_owned(),
        head,
        reader,
    })
}

/// The logs of a recording, one after the other.
pub struct FlightSource {
    logs: VecDeque<Segment>,
    staged: Staged,
    payload: Vec<u8>,
    over: bool,
    torn: Option<String>,
    bytes: u64,
    passed: u64,
    read: Arc<AtomicU64>,
    _directory: Directory,
}

impl FlightSource {
    /// What was cut off at its end, if anything was.
    #[must_use]
    pub fn torn(&self) -> Option<&str> {
        self.torn.as_deref()
    }

    /// Bytes of all its logs, and how many of them were read so far.
    #[must_use]
    pub fn progress(&self) -> (u64, Arc<AtomicU64>) {
        (self.bytes, Arc::clone(&self.read))
    }

    /// Goes on to the next log; false if there is none.
    fn next_log(&mut self) -> Result<bool, LogError> {
        let Some(ended) = self.logs.pop_front() else {
            return Ok(false);
        };
        self.passed += ended.reader.offset();
        let Some(next) = self.logs.front() else {
            return Ok(false);
        };
        let found = ended.reader.last(Lane::Events).0;
        if found != next.head.before {
            return Err(LogError(format!(
                "{} has {found} entries, {} says that it had {}",
                ended.path.display(),
                next.path.display(),
                next.head.before
            )));
        }
        Ok(true)
    }
}

impl LogSource for FlightSource {
    fn next(&mut self) -> Result<Option<Arrived<'_>>, LogError> {
        loop {
            let is_last = self.logs.len() == 1;
            let Some(log) = self.logs.front_mut() else {
                self.over = true;
                return Ok(None);
            };
            let found = match log.reader.next() {
                Ok(Some(found)) => found,
                Ok(None) => {
                    self.next_log()?;
                    continue;
                }
                Err(LogFileError::Cut { start, end }) if is_last => {
                    self.torn = Some(format!(
                        "{} ends at byte {end}, within the entry at byte {start}",
                        log.path.display()
                    ));
                    self.next_log()?;
                    continue;
                }
                Err(error) => return Err(LogError(format!("{}: {error}", log.path.display()))),
            };
            let entry = found.entry;
            self.read
                .store(self.passed + found.offset, Ordering::Relaxed);
            if entry.lane() == Lane::Inputs {
                self.staged.take_in(entry.payload())?;
                continue;
            }
            let (seq, marks) = (entry.seq(), entry.marks());
            self.payload.clear();
            self.payload.extend_from_slice(entry.payload());
            return Ok(Some(Arrived {
                seq,
                marks,
                payload: &self.payload,
            }));
        }
    }

    fn frame(&mut self) -> Result<Vec<u8>, LogError> {
        let frame = self.staged.frame();
        frame.ok_or_else(|| LogError("an entry applies a frame that is not before it".into()))
    }

    fn done(&mut self) -> Result<Done, LogError> {
        let done = self.staged.done();
        done.ok_or_else(|| {
            LogError("an entry applies an answer of the disk that is not before it".into())
        })
    }

    fn replayed(&mut self, _: Seq) {}

    fn is_over(&mut self) -> Result<bool, LogError> {
        Ok(self.over)
    }

    fn wait(&mut self, _: Duration) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However large the file is, no more of it is read than it says that it has, and that is bounded.
    #[test]
    fn a_description_is_as_long_as_its_head_says() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |length: u64, body: &[u8]| {
            let head = Head {
                recording: 1,
                segment: 0,
                length,
                checksum: rdma_log::crc32c(body),
            };
            let bytes = [&head.encode(Kind::Machine)[..], body].concat();
            let directory = Directory::to_read(directory.path()).unwrap();
            std::fs::write(directory.machine(), bytes).unwrap();
            machine(&directory).unwrap_err().to_string()
        };
        assert!(refused(4, &[7; 5]).contains("more bytes follow"));
        assert!(refused(6, &[7; 5]).contains("it has 5 bytes"));
        assert!(refused(u64::from(ENCODED_MAX) + 1, &[]).contains("larger than any"));
        assert!(refused(u64::MAX, &[]).contains("larger than any"));
    }
}
