//! A second opinion on what a changed log does: its inputs are handed to a machine step by step, and what that machine does is
//! compared with what the recording's exits say, word by word.
//!
//! It shares the machine with the replayer and nothing of how that compares: no digest, no history, no report.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::digest::ExitRecord;
use hypervisor::entry::{Body, Entry, LoggedInput, OutputsDigest};
use hypervisor::event::Input;
use hypervisor::kvm::KvmSource;
use hypervisor::machine::{Machine, MachineSpec, Phase, Stepped};
use hypervisor::ring_log::INPUT_FRAME;
use rdma_log::Lane;

use super::recording::{Item, Log};

/// Names of an exit record's words, in their order.
const WORDS: [&str; ExitRecord::SIZE / 8] = [
    "position",
    "exit kind",
    "address",
    "data",
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
    "rflags",
];

/// One exit in plain words.
pub type Words = [u64; WORDS.len()];

/// Where the changed log's execution first differs from the recording, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Truth {
    /// An exit differs in this word.
    Exit {
        /// The sync point.
        position: u64,
        /// The first word that differs.
        field: &'static str,
        /// What it was; none for the kind of an exit, which is told in words.
        expected: Option<u64>,
        /// What it is now.
        found: Option<u64>,
    },
    /// All exits are equal up to here; the outputs made here are not.
    Outputs {
        /// The sync point.
        position: u64,
    },
    /// All exits are equal up to here; an input does not fit any more.
    Refused {
        /// The sync point.
        position: u64,
    },
    /// All exits are equal; memory at the end is not.
    Memory {
        /// The last sync point.
        position: u64,
    },
    /// All exits and memory are equal; the CPU's or the devices' state at the end is not.
    State {
        /// The last sync point.
        position: u64,
    },
    /// There is no difference at all.
    None,
}

impl Truth {
    /// The sync point of the difference.
    #[must_use]
    pub fn position(&self) -> Option<u64> {
        match self {
            Self::Exit { position, .. }
            | Self::Outputs { position }
            | Self::Refused { position }
            | Self::Memory { position }
            | Self::State { position } => Some(*position),
            Self::None => None,
        }
    }
}

/// The exits of a recording that logged each of them, the first one at index 0.
///
/// # Errors
/// If the log lacks one.
pub fn exits(entries: &[(usize, Entry)]) -> Result<Vec<Words>> {
    let mut exits: Vec<Words> = Vec::new();
    for (_, entry) in entries {
        let Body::Step(step) = &entry.body else {
            continue;
        };
        let record = step
            .exit
            .with_context(|| format!("no exit at position {}", entry.position))?;
        let words = words(&record);
        match entry.position.0.checked_sub(exits.len() as u64) {
            // A second round of inputs at the same sync point.
            Some(0) => ensure!(
                exits.last() == Some(&words),
                "two exits at position {}",
                entry.position
            ),
            Some(1) => exits.push(words),
            _ => bail!(
                "no exit between positions {} and {}",
                exits.len(),
                entry.position
            ),
        }
    }
    Ok(exits)
}

fn words(record: &ExitRecord) -> Words {
    let bytes = record.to_bytes();
    std::array::from_fn(|word| {
        let bytes: [u8; 8] = std::array::from_fn(|byte| bytes[word * 8 + byte]);
        u64::from_le_bytes(bytes)
    })
}

/// Executes `log`, whose entries are at the same positions as the recording's, up to the first exit that is none of `exits`.
///
/// # Errors
/// If there is no machine to execute it in, or the log has no end.
pub fn judge(log: &Log, entries: &[(usize, Entry)], exits: &[Words]) -> Result<Truth> {
    let spec = MachineSpec::decode(&log.description)?;
    let mut machine = Machine::new(&KvmSource::Path("/dev/kvm".into()), &spec)?;
    let mut frames = frames(log)?;
    for (_, entry) in entries {
        let position = entry.position.0;
        while machine.position().0 < position {
            if machine.phase() != Phase::Ready {
                return Ok(Truth::Refused {
                    position: machine.position().0,
                });
            }
            // Nothing kicks this machine.
            while machine.step()? != Stepped::SyncPoint {}
            let at = machine.position();
            let found = words(
                machine
                    .history()
                    .at(at)
                    .context("the exit that has just been")?,
            );
            let expected = exits
                .get(at.0 as usize - 1)
                .context("more exits than were recorded")?;
            if let Some(word) = (0..WORDS.len()).find(|&word| expected[word] != found[word]) {
                let value = |words: &Words| (WORDS[word] != "exit kind").then_some(words[word]);
                return Ok(Truth::Exit {
                    position: at.0,
                    field: WORDS[word],
                    expected: value(expected),
                    found: value(&found),
                });
            }
        }
        match &entry.body {
            Body::Step(step) => {
                let mut outputs = OutputsDigest::default();
                machine.outputs().for_each(|output| outputs.add(&output));
                if outputs != step.outputs.unwrap_or_default() {
                    return Ok(Truth::Outputs { position });
                }
                for input in inputs(&step.inputs, &mut frames)? {
                    if machine.supply(&input).is_err() {
                        return Ok(Truth::Refused { position });
                    }
                }
            }
            Body::MemoryHash(_) | Body::Part(_) | Body::Control { .. } => {
                bail!(
                    "a recording for this is made without comparing memory, checkpoints or orders on the way"
                )
            }
            Body::End { memory, state, .. } => {
                return Ok(if machine.memory_hash_full()? != *memory {
                    Truth::Memory { position }
                } else if machine.final_state()? != *state {
                    Truth::State { position }
                } else {
                    Truth::None
                });
            }
        }
    }
    bail!("the log has no end")
}

/// The frame in an item of the inputs lane.
#[must_use]
pub fn frame(item: &Item) -> Option<&[u8]> {
    item.payload.strip_prefix(&[INPUT_FRAME])
}

fn frames(log: &Log) -> Result<VecDeque<Vec<u8>>> {
    let inputs = log.items.iter().filter(|item| item.lane == Lane::Inputs);
    inputs
        .map(|item| Ok(frame(item).context("an input that is no frame")?.to_vec()))
        .collect()
}

fn inputs(logged: &[LoggedInput], frames: &mut VecDeque<Vec<u8>>) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for input in logged {
        match input {
            LoggedInput::Clock(time) => inputs.push(Input::Clock(*time)),
            LoggedInput::Random(bytes) => inputs.push(Input::Random(bytes.clone())),
            LoggedInput::Tick(count) => inputs.push(Input::Tick(*count)),
            LoggedInput::Console(bytes) => inputs.push(Input::Console(bytes.clone())),
            LoggedInput::Disk { .. } => bail!("a disk, which no guest of these recordings has"),
            LoggedInput::Frames { count, .. } => {
                for _ in 0..*count {
                    inputs.push(Input::Frame(
                        frames
                            .pop_front()
                            .context("a frame that is not in the log")?,
                    ));
                }
            }
        }
    }
    Ok(inputs)
}
