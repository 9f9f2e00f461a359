//! Peers without the pair's secret, and a man in the middle of the control connection: none of them gets a key or a byte of the
//! guest, and the backup goes on listening for its real primary.
#![forbid(unsafe_code)]

use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hypervisor::session::report::Event;

use super::LONGEST;
use super::streams::{directory, start_alone, start_backup, start_primary, wait};
use crate::harness::eavesdropper::{Eavesdropper, Harm, Meddling, Way};
use crate::harness::random::Random;
use crate::harness::uninvited::UNINVITED;
use crate::promise::{Figures, Run};

pub(super) fn show(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    uninvited(run, random, figures).context("peers without the secret")?;
    meddled(run, random, figures).context("a man in the middle of the set-up")?;
    meddled_join(run, random, figures).context("a man in the middle of a copy")?;
    Ok(())
}

/// What of a pair's set-up must not be read on its way: the hello, the welcome, the machine's image.
const IN_CLEAR: [&[u8]; 4] = [b"vendor", b"heartbeat", b"identity", b"\x7fELF"];

fn is_sealed(heard: &[u8]) -> Result<()> {
    for word in IN_CLEAR {
        ensure!(
            !heard.windows(word.len()).any(|window| window == word),
            "{} went over the network in clear",
            String::from_utf8_lossy(word)
        );
    }
    Ok(())
}

/// They come one by one, and then all at once with others who say nothing, and the real primary gets through.
fn uninvited(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    // What a real primary says, for whoever was listening.
    let (mut backup, address) = start_backup(work.path())?;
    let between = Eavesdropper::before(address, None)?;
    let mut primary = start_primary(work.path(), between.address(), "exits=3000")?;
    for role in [&mut primary, &mut backup] {
        let status = role.end(LONGEST)?;
        ensure!(status.success(), "ended by {status}: {}", role.said());
    }
    let recorded = between.heard(Way::ToBackup);
    ensure!(recorded.len() > 1000, "{} bytes were heard", recorded.len());
    for way in [Way::ToBackup, Way::ToPrimary] {
        is_sealed(&between.heard(way))?;
    }

    let work = directory_with_the_same_secret(work.path())?;
    let (mut backup, address) = start_backup(work.path())?;
    let mut visits = 0;
    for _ in 0..run.form.pick(1, 10) {
        for visitor in UNINVITED {
            visitor
                .visit(address, &recorded, random)
                .with_context(|| format!("{visitor:?}"))?;
            ensure!(
                backup.runs()?,
                "{visitor:?} ended the backup: {}",
                backup.said()
            );
            visits += 1;
        }
    }
    // Each of these has a place at the door, and none of them a turn.
    let silent: Vec<TcpStream> = (0..40)
        .map(|_| TcpStream::connect(address))
        .collect::<Result<_, _>>()
        .context("reach the backup")?;
    let started = Instant::now();
    let mut primary = start_primary(work.path(), address, "exits=3000")?;
    primary.until("\"paired\"", LONGEST)?;
    let took = started.elapsed();
    drop(silent);
    for role in [&mut primary, &mut backup] {
        let status = role.end(LONGEST)?;
        let said = role.said();
        ensure!(
            status.success() && !said.contains("panicked"),
            "ended by {status}: {said}"
        );
    }
    let said = backup.said();
    for words in ["was turned away", "secret"] {
        ensure!(
            said.contains(words),
            "the backup does not say {words:?}: {said}"
        );
    }
    run.say(format!(
        "{visits} visits without the secret; beside 40 that say nothing the real primary paired in {took:?}"
    ));
    figures.add("visits_without_secret", visits);
    figures.add("paired_beside_silent_ms", took.as_millis() as u64);
    Ok(())
}

/// Another machine's place, so that its record is its own, with the secret of this one.
fn directory_with_the_same_secret(from: &std::path::Path) -> Result<tempfile::TempDir> {
    let made = directory()?;
    let name = "pair.secret";
    std::fs::copy(from.join(name), made.path().join(name)).context("copy the secret")?;
    Ok(made)
}

const fn harm(way: Way, number: usize, harm: Harm) -> Meddling {
    Meddling { way, number, harm }
}

/// Harm to each message of the set-up, in each way that there is. A message that is left out at the end of what one side says is
/// waited for, which takes its time; one such is enough.
const HARMS: [Meddling; 15] = [
    harm(Way::ToPrimary, 0, Harm::Flip),
    harm(Way::ToBackup, 0, Harm::Flip),
    harm(Way::ToPrimary, 1, Harm::Flip),
    harm(Way::ToPrimary, 0, Harm::Cut),
    harm(Way::ToBackup, 0, Harm::Cut),
    harm(Way::ToPrimary, 1, Harm::Cut),
    harm(Way::ToBackup, 1, Harm::Flip),
    harm(Way::ToBackup, 1, Harm::LeaveOut),
    harm(Way::ToBackup, 1, Harm::Repeat),
    harm(Way::ToBackup, 1, Harm::Swap),
    harm(Way::ToBackup, 2, Harm::Cut),
    harm(Way::ToBackup, 2, Harm::Flip),
    harm(Way::ToPrimary, 2, Harm::Flip),
    harm(Way::ToPrimary, 3, Harm::Flip),
    harm(Way::ToBackup, 1, Harm::Stall),
];

/// Each ends the attempt on both sides in words, and soon; the same backup then takes its real primary.
fn meddled(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let (mut backup, address) = start_backup(work.path())?;
    let mut cases = HARMS.to_vec();
    for _ in 0..run.form.pick(0, 60) {
        let ways = [(Way::ToBackup, 4), (Way::ToPrimary, 4)];
        let (way, messages) = ways[random.below(2) as usize];
        let harms = [Harm::Flip, Harm::Cut, Harm::Stall];
        let chosen = harms[random.below(harms.len() as u64) as usize];
        cases.push(harm(way, random.below(messages) as usize, chosen));
    }
    let mut slowest = None;
    for case in &cases {
        let started = Instant::now();
        let between = Eavesdropper::before(address, Some(*case))?;
        let mut primary = start_primary(work.path(), between.address(), "")?;
        primary
            .clear_error(LONGEST, &[1])
            .with_context(|| format!("{case:?}"))?;
        ensure!(between.is_done(), "{case:?}: no harm was done");
        ensure!(
            backup.runs()?,
            "{case:?} ended the backup: {}",
            backup.said()
        );
        slowest = slowest.max(Some((started.elapsed(), format!("{case:?}"))));
    }
    let mut primary = start_primary(work.path(), address, "exits=3000")?;
    for role in [&mut primary, &mut backup] {
        role.until("\"paired\"", LONGEST)?;
        let status = role.end(LONGEST)?;
        let said = role.said();
        ensure!(
            status.success() && !said.contains("panicked") && !said.contains("\"live\""),
            "after all harms ended by {status}: {said}"
        );
    }
    run.say(format!(
        "{} set-ups were meddled with, the slowest over after {:?}",
        cases.len(),
        slowest.unwrap_or_default()
    ));
    figures.add("meddled_set_ups", cases.len());
    Ok(())
}

/// Bytes that a copy of this guest has at the least.
const COPY: usize = 128 << 10;

/// A machine that runs and gives a backup its copy through the man in the middle: it serves on, and its next try succeeds.
fn meddled_join(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let mut harms = vec![
        // Before the copy, and in it.
        harm(Way::ToBackup, 3, Harm::Flip),
        harm(Way::Log, 0, Harm::Flip),
        harm(Way::Log, COPY / 2, Harm::Swap),
        harm(Way::Log, COPY - 1, Harm::LeaveOut),
    ];
    for _ in 0..run.form.pick(0, 20) {
        let chosen = [
            Harm::Flip,
            Harm::Cut,
            Harm::Repeat,
            Harm::LeaveOut,
            Harm::Swap,
        ];
        harms.push(harm(
            Way::Log,
            random.below(COPY as u64) as usize,
            chosen[random.below(chosen.len() as u64) as usize],
        ));
    }
    for case in &harms {
        let work = directory()?;
        let (mut backup, address) = start_backup(work.path())?;
        let between = Eavesdropper::before(address, Some(*case))?;
        let guest = ["irq", "16", "hz=2000"];
        let mut primary = start_alone(work.path(), between.address(), guest)?;
        let until = Instant::now() + LONGEST;
        wait(until, "no harm was done", || between.is_done())?;
        for role in [&mut primary, &mut backup] {
            role.until("\"paired\"", LONGEST)
                .with_context(|| format!("{case:?}"))?;
        }
        let said = primary.said();
        let copied = said
            .lines()
            .find_map(|line| match serde_json::from_str(line) {
                Ok(Event::Joined { bytes, .. }) => Some(bytes),
                _ => None,
            });
        ensure!(
            said.contains("is not taken") && copied >= Some(COPY as u64),
            "{case:?}: {said}"
        );
        for way in [Way::ToBackup, Way::ToPrimary] {
            is_sealed(&between.heard(way))?;
        }
        primary.stop(LONGEST)?;
        backup.end(LONGEST)?;
        for role in [&primary, &backup] {
            let said = role.said();
            ensure!(
                !said.contains("panicked") && !said.contains("\"live\""),
                "{case:?}: {said}"
            );
        }
    }
    run.say(format!(
        "{} copies were meddled with; the guest ran on, and the next backup joined",
        harms.len()
    ));
    figures.add("meddled_copies", harms.len());
    Ok(())
}
