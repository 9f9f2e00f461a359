//! A changed input is caught at the first exit that it changes, and named (issue 3, point 2).
//!
//! Each recording is made with every exit in its log. One bit of one input is flipped, in that log and in the same log folded,
//! and the real program replays both; what they must say is known from [`oracle`], which executes the changed
//! inputs by itself.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::harness::flips::{self, Decoded, Kind};
use crate::harness::kv_load;
use crate::harness::oracle::{self, Truth, Words};
use crate::harness::random::Random;
use crate::harness::recording::{Log, Recorded, Recording, Replayed, Take, replay};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "divergence-named",
    line: "One flipped bit of an input is caught at the first exit it changes: position, field, expected, found",
    short: Duration::from_secs(30),
    full: Duration::from_secs(150),
    show,
};

/// A bound on one recording or replay of some thousand exits.
const LONGEST: Duration = Duration::from_secs(60);

/// A flip that cannot be made (a clock value that is squeezed between its neighbours) is drawn again, so often at most.
const DRAWS: u32 = 50;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut counts = Counts::default();
    alone(|| {
        let stage = Stage::enter()?;
        for guest in ["clock", "irq", "memory", "kv", "compute"] {
            let mut random = Random::new(
                run.seed
                    ^ guest
                        .bytes()
                        .fold(0, |sum, byte| sum << 8 | u64::from(byte)),
            );
            let subject = Subject::record(&stage, guest, random.next())
                .with_context(|| format!("guest {guest}"))?;
            let flips = run.form.count(4, 40);
            let before = counts.flips;
            subject
                .flip_inputs(flips, &mut random, &mut counts)
                .with_context(|| format!("guest {guest}"))?;
            subject
                .flip_positions(flips, &mut random, &mut counts)
                .with_context(|| format!("guest {guest}"))?;
            subject
                .flip_anything(flips, &mut random, &mut counts)
                .with_context(|| format!("guest {guest}"))?;
            run.say(format!(
                "{guest}: {} exits, {} flips judged",
                subject.exits.len(),
                counts.flips - before
            ));
        }
        Ok(())
    })?;
    figures.add("flips", counts.flips);
    for (name, count) in &counts.by_kind {
        figures.add(&format!("flips_of_{name}"), *count);
    }
    for (name, count) in &counts.by_truth {
        figures.add(&format!("inputs_{name}"), *count);
    }
    for (name, count) in &counts.by_field {
        figures.add(&format!("named_{}", name.replace(' ', "_")), *count);
    }
    // Inputs that change nothing at an exit could not show that the first exit is named.
    let exits = counts
        .by_truth
        .get("caught_at_an_exit")
        .copied()
        .unwrap_or(0);
    // So few as a brief run has could by chance be of that kind.
    let enough = match run.form {
        Form::Brief => exits > 0,
        _ => exits * 5 > counts.inputs,
    };
    ensure!(
        enough,
        "only {exits} of {} flipped inputs changed an exit: too few to tell",
        counts.inputs
    );
    Ok(figures)
}

#[derive(Debug, Default)]
struct Counts {
    flips: u64,
    inputs: u64,
    by_kind: BTreeMap<String, u64>,
    by_truth: BTreeMap<&'static str, u64>,
    by_field: BTreeMap<String, u64>,
}

impl Counts {
    fn kind(&mut self, name: &str) {
        self.flips += 1;
        *self.by_kind.entry(name.to_owned()).or_default() += 1;
    }

    fn truth(&mut self, truth: &Truth) {
        self.inputs += 1;
        let name = match truth {
            Truth::Exit { .. } => "caught_at_an_exit",
            Truth::Outputs { .. } => "caught_at_outputs",
            Truth::Refused { .. } => "caught_as_unfit",
            Truth::Memory { .. } => "caught_by_memory_at_the_end",
            Truth::State { .. } => "caught_by_state_at_the_end",
            Truth::None => "without_any_effect",
        };
        *self.by_truth.entry(name).or_default() += 1;
    }
}

/// A recording to be changed.
struct Subject<'a> {
    directory: &'a Path,
    recorded: Recorded,
    every: Decoded,
    folded: Decoded,
    exits: Vec<Words>,
}

impl<'a> Subject<'a> {
    fn record(stage: &'a Stage, guest: &str, seed: u64) -> Result<Self> {
        let (words, memory_mib, requests) = match guest {
            "clock" => ("reads=400 entropy=16", 4, None),
            "irq" => ("exits=1200 hz=4000", 4, None),
            "memory" => ("passes=3 pages=16", 8, None),
            "compute" => ("rounds=1 reports=10", 4, None),
            _ => ("ip=10.77.0.2/24", 16, Some(120)),
        };
        let take = Take {
            every_exit: true,
            ..Take::new(guest, memory_mib, words, LONGEST)
        };
        let directory = stage.directory();
        let port = requests.map(|_| stage.port());
        let recording = Recording::start(directory, guest, &take, port, None)?;
        if let Some(requests) = requests {
            kv_load::run(GUEST, 3, requests, seed)?;
            recording.interrupt()?;
        }
        let recorded = recording.finish()?;
        let every = Decoded::new(Log::read(&recorded.log)?)?;
        let exits = oracle::exits(&every.entries)?;
        ensure!(
            exits.len() as u64 == recorded.sync_points,
            "{} exits are in the log",
            exits.len()
        );
        let subject = Self {
            directory,
            recorded,
            folded: every.folded(),
            every,
            exits,
        };
        subject.unchanged()?;
        Ok(subject)
    }

    /// Nothing flipped: all three say that there is no difference, or they could not be believed when there is one.
    fn unchanged(&self) -> Result<()> {
        for decoded in [&self.every, &self.folded] {
            let truth = oracle::judge(&decoded.file(), &decoded.entries, &self.exits)?;
            ensure!(truth == Truth::None, "without a change: {truth:?}");
            self.replay(&decoded.file())?
                .ensure_equal(&self.recorded)
                .context("without a change")?;
        }
        Ok(())
    }

    fn replay(&self, log: &Log) -> Result<Replayed> {
        let path = self.directory.join("flipped.log");
        log.write(&path)?;
        replay(&path, LONGEST, None)
    }

    fn flip_inputs(&self, flips: u64, random: &mut Random, counts: &mut Counts) -> Result<()> {
        for kind in Kind::ALL {
            for _ in 0..flips {
                let mut every = self.every.clone();
                let mut what = None;
                for _ in 0..DRAWS {
                    what = flips::flip(&mut every, kind, random)?;
                    if what.is_some() {
                        break;
                    }
                }
                let Some(what) = what else { break };
                self.judge(&every, counts).with_context(|| what)?;
                counts.kind(kind.name());
            }
        }
        Ok(())
    }

    fn judge(&self, every: &Decoded, counts: &mut Counts) -> Result<()> {
        let file = every.file();
        let truth = oracle::judge(&file, &every.entries, &self.exits)?;
        counts.truth(&truth);
        let replayed = self.replay(&file)?;
        self.judge_every(&truth, &replayed, counts)
            .with_context(|| format!("every exit in the log: {truth:?}, {replayed:?}"))?;
        let folded = every.folded();
        let replayed = self.replay(&folded.file())?;
        self.judge_folded(&truth, &folded, &replayed)
            .with_context(|| format!("folded log: {truth:?}, {replayed:?}"))
    }

    /// With every exit in the log, the report is the truth to the letter.
    fn judge_every(&self, truth: &Truth, replayed: &Replayed, counts: &mut Counts) -> Result<()> {
        let Some(report) = self.report(truth, replayed)? else {
            return Ok(());
        };
        *counts.by_field.entry(report.field.clone()).or_default() += 1;
        let Truth::Exit {
            position,
            field,
            expected,
            found,
        } = truth
        else {
            return report.is(truth);
        };
        ensure!(
            report.position == *position && report.field == *field,
            "another difference is named"
        );
        ensure!(
            report.equal_until + 1 == *position,
            "more was equal, or less"
        );
        let shown = |value: u64| match *field {
            "position" => value.to_string(),
            _ => format!("{value:#x}"),
        };
        let told = |value: &Option<u64>, text: &str| value.is_none_or(|value| shown(value) == text);
        ensure!(
            told(expected, &report.expected) && told(found, &report.found),
            "other values are named"
        );
        ensure!(
            report.expected != report.found,
            "the values named are equal"
        );
        Ok(())
    }

    /// In a folded log it is seen at the next entry at the latest, and what was equal is not called different.
    fn judge_folded(&self, truth: &Truth, folded: &Decoded, replayed: &Replayed) -> Result<()> {
        let Some(report) = self.report(truth, replayed)? else {
            return Ok(());
        };
        let Truth::Exit { position, .. } = truth else {
            return report.is(truth);
        };
        let positions = || folded.entries.iter().map(|(_, entry)| entry.position.0);
        let before = positions()
            .take_while(|at| at < position)
            .last()
            .unwrap_or(0);
        let next = positions()
            .find(|at| at >= position)
            .context("an entry behind every exit")?;
        ensure!(
            (*position..=next).contains(&report.position),
            "it is seen neither at the exit nor by the next entry, at {next}"
        );
        ensure!(
            report.equal_until == before,
            "the last entry before is at {before}"
        );
        Ok(())
    }

    /// The report on a difference; none if there is none.
    fn report(&self, truth: &Truth, replayed: &Replayed) -> Result<Option<Report>> {
        if *truth == Truth::None {
            replayed.ensure_equal(&self.recorded)?;
            return Ok(None);
        }
        ensure!(
            replayed.code == 4 && replayed.mismatches == 1,
            "it is not caught"
        );
        Report::read(replayed).map(Some)
    }

    /// An entry at another position is caught there or where its input is missed.
    fn flip_positions(&self, flips: u64, random: &mut Random, counts: &mut Counts) -> Result<()> {
        for _ in 0..flips {
            let mut folded = self.folded.clone();
            let Some((from, to)) =
                (0..DRAWS).find_map(|_| flips::flip_position(&mut folded, random))
            else {
                break;
            };
            let replayed = self.replay(&folded.file())?;
            let what = || format!("an entry at position {to} instead of {from}: {replayed:?}");
            ensure!(
                replayed.code == 4 && replayed.mismatches == 1,
                "not caught: {}",
                what()
            );
            let report = Report::read(&replayed).with_context(what)?;
            ensure!((from.min(to)..=to).contains(&report.position), "{}", what());
            counts.kind("position");
        }
        Ok(())
    }

    /// Any bit of any entry, whatever it means.
    fn flip_anything(&self, flips: u64, random: &mut Random, counts: &mut Counts) -> Result<()> {
        for _ in 0..flips {
            let mut log = self.folded.file();
            let entries = log.entries()?;
            let what = flips::flip_any(&mut log, random)?;
            let replayed = self.replay(&log)?;
            let what = || format!("{what}: {replayed:?}");
            match log.entries() {
                Ok(changed) if flips::only_inputs_differ(&entries, &changed) => {
                    let truth = oracle::judge(&log, &changed, &self.exits).with_context(what)?;
                    counts.truth(&truth);
                    let changed = Decoded {
                        log,
                        entries: changed,
                    };
                    self.judge_folded(&truth, &changed, &replayed)
                        .with_context(|| format!("{truth:?}"))
                        .with_context(what)?;
                }
                Ok(_) => ensure!(
                    replayed.code == 4 && replayed.error.is_some(),
                    "not caught: {}",
                    what()
                ),
                Err(_) => ensure!(
                    replayed.code == 4
                        && replayed
                            .error
                            .as_ref()
                            .is_some_and(|error| error.contains("unusable")),
                    "an entry without a meaning is replayed: {}",
                    what()
                ),
            }
            counts.kind("any_bit");
        }
        Ok(())
    }
}

/// What a replay says of a divergence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Report {
    position: u64,
    field: String,
    expected: String,
    found: String,
    equal_until: u64,
}

impl Report {
    fn read(replayed: &Replayed) -> Result<Self> {
        let text = replayed.error.as_deref().context("no error is told")?;
        Self::parse(text).with_context(|| format!("not the report of a divergence: {text:?}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("divergence at position ")?;
        let (position, rest) = rest.split_once(": ")?;
        let (field, rest) = rest.split_once(" was ")?;
        let (expected, rest) = rest.split_once(" in the log, is ")?;
        let (found, rest) = rest.rsplit_once(" here (equal until position ")?;
        Some(Self {
            position: position.parse().ok()?,
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
            equal_until: rest.strip_suffix(')')?.parse().ok()?,
        })
    }

    /// Whether this is what a difference without a differing exit must be called.
    fn is(&self, truth: &Truth) -> Result<()> {
        let field = match truth {
            Truth::Outputs { .. } => "outputs",
            Truth::Refused { .. } => "input",
            Truth::Memory { .. } => "memory hash",
            Truth::State { .. } => "state",
            Truth::Exit { .. } | Truth::None => bail!("not for this"),
        };
        ensure!(
            self.field == field
                && Some(self.position) == truth.position()
                && self.expected != self.found,
            "another difference is named"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_report_is_taken_apart() {
        let text = "divergence at position 17: exit kind was MMIO read of 8 in the log, is HLT here (equal until position 16)";
        let report = Report::parse(text).unwrap();
        assert_eq!(
            (report.position, &*report.field, report.equal_until),
            (17, "exit kind", 16)
        );
        assert_eq!(
            (&*report.expected, &*report.found),
            ("MMIO read of 8", "HLT")
        );
        assert_eq!(Report::parse("the log is unusable: cut"), None);
    }
}
