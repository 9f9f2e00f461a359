//! A backup whose memory is spoilt is found out, fenced and ended, and the primary serves on.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::demo::client::{self, Config};
use hypervisor::demo::pair::Side;
use hypervisor::session::report::Event;

use crate::harness::random::Random;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "divergence-caught",
    line: "a running backup whose memory is spoilt is found out, fenced and ended, with the difference named; the primary loses nothing",
    short: Duration::from_secs(15),
    full: Duration::from_secs(120),
    show,
};

/// Memory is compared every 100 ms; a bit that no register meets is found then.
const FOUND_WITHIN: Duration = Duration::from_millis(1500);

/// What follows from it: the backup ends, the primary says so.
const DONE_WITHIN: Duration = Duration::from_secs(3);

/// Bits that the guest may mend by itself before one is taken that it does not: return addresses and the like are written again and
/// again with the same value.
const MENDED_AT_MOST: u32 = 20;

/// Where the guest's own program has its stack. Memory is compared by what was written since the last time, so a bit is found
/// once its page is written or its value used; the stack is always in use.
const STACK: std::ops::Range<u64> = 0xf_0000..0x10_0000;

const PAGE: usize = 4096;

/// What is spoilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoil {
    /// One bit of one word: as a rule dead by now, and found by the comparison of memories.
    OneBit,
    /// One bit of every word: return addresses and live values among them, so that it shows in an exit.
    EveryWord,
}

fn show(run: &Run) -> Result<Figures> {
    let rounds = run.form.pick(4, 40);
    let mut random = Random::new(run.seed);
    let mut fields = std::collections::BTreeMap::<String, u64>::new();
    for round in 0..rounds {
        let seed = random.next();
        let what = alone(|| {
            one(
                seed,
                if round % 2 == 0 {
                    Spoil::OneBit
                } else {
                    Spoil::EveryWord
                },
            )
        })
        .with_context(|| format!("round {round}, seed {seed}"))?;
        run.say(&what);
        let field = what
            .split_once(": ")
            .and_then(|(_, rest)| rest.split_once(" was "))
            .map_or("?", |(field, _)| field);
        *fields.entry(field.to_owned()).or_default() += 1;
    }
    ensure!(
        !fields.contains_key("?"),
        "a divergence was told without its field: {fields:?}"
    );
    let by_registers: u64 = fields
        .iter()
        .filter(|(field, _)| !["memory hash", "digest"].contains(&field.as_str()))
        .map(|(_, count)| count)
        .sum();
    ensure!(
        by_registers > 0,
        "no divergence was named by an exit's own field: {fields:?}"
    );
    let mut figures = Figures::default();
    figures.add("backups_spoilt", rounds);
    figures.add("found", fields.values().sum::<u64>());
    figures.add("named_by_an_exit", by_registers);
    figures.add("fields", serde_json::to_value(&fields)?);
    Ok(figures)
}

fn one(seed: u64, spoil: Spoil) -> Result<String> {
    let mut random = Random::new(seed);
    let stage = Stage::enter()?;
    let mut pair = stage.pair("kv", "")?;
    let client = client::start(Config::new(GUEST, seed)).context("start the client")?;
    std::thread::park_timeout(
        random.between(Duration::from_millis(100), Duration::from_millis(400)),
    );

    let memory = guest_memory(&pair.backup)?;
    let mut said = Vec::new();
    let mut mended = 0;
    let diverged = loop {
        let spoilt = flip(&memory, spoil, &mut random)?;
        let is_divergence = |event: &Event| matches!(event, Event::Diverged { .. });
        let found = pair
            .backup
            .wait_for(FOUND_WITHIN, is_divergence, |event| said.push(event));
        match found {
            Some(diverged) => break diverged,
            // The guest has written over it before it was used or compared: both sides are equal again.
            None if is_mended(&memory, &spoilt)? && mended < MENDED_AT_MOST => mended += 1,
            None => bail!(
                "the spoilt memory was not found ({mended} before were mended); the backup said {said:?}"
            ),
        }
    };
    let Event::Diverged { what } = diverged else {
        unreachable!("that is what was waited for");
    };
    let status = pair.backup.wait(DONE_WITHIN);
    ensure!(
        status.code() == Some(3),
        "the backup ended with {status}: {}",
        pair.backup.messages()
    );
    ensure!(
        pair.backup.messages().contains("divergence at position"),
        "its last words do not say why: {}",
        pair.backup.messages()
    );
    let unprotected = |event: &Event| matches!(event, Event::Notice { text, loud: true } if text.contains("UNPROTECTED"));
    ensure!(
        pair.primary
            .wait_for(DONE_WITHIN, unprotected, drop)
            .is_some(),
        "the primary does not say that it runs unprotected"
    );

    let before = client.progress().completed;
    std::thread::park_timeout(Duration::from_millis(300));
    ensure!(
        client.progress().completed > before,
        "the primary does not serve any more"
    );
    let mut outcome = client.stop().context("stop the client")?;
    let verified = outcome.verify_all(GUEST, Duration::from_secs(10));
    ensure!(
        verified.lost_acknowledged_writes == 0
            && verified.broken_connections == 0
            && outcome.wrong_replies == 0,
        "the client noticed: {:?}",
        verified.problems
    );
    pair.primary.stop(Duration::from_secs(10));
    Ok(what)
}

/// The backup's guest memory, by the descriptor that it holds.
fn guest_memory(side: &Side) -> Result<File> {
    let directory = format!("/proc/{}/fd", side.pid());
    for entry in fs::read_dir(&directory).context("look at the backup's descriptors")? {
        let path = entry?.path();
        let is_memory =
            fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains("memfd:"));
        if is_memory && fs::metadata(&path).is_ok_and(|found| found.len() == 64 << 20) {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .context("open the backup's guest memory");
        }
    }
    anyhow::bail!("the backup's guest memory was not found in {directory}")
}

/// Flips bits of words that are in use: not zero. A single one is taken from a page that is being written, so that memory is
/// compared there again, and from a word that is not, so that the guest does not mend it.
///
/// What was written, and where.
fn flip(memory: &File, spoil: Spoil, random: &mut Random) -> Result<Vec<(u64, u8)>> {
    let before = stack(memory)?;
    std::thread::park_timeout(Duration::from_millis(100));
    let now = stack(memory)?;
    let is_live = |word: usize| {
        let page = word / PAGE * PAGE;
        before[page..page + PAGE] != now[page..page + PAGE]
            && before[word..word + 8] == now[word..word + 8]
    };
    let chosen: Vec<usize> = (0..now.len())
        .step_by(8)
        .filter(|&word| now[word..word + 8] != [0; 8])
        .filter(|&word| spoil == Spoil::EveryWord || is_live(word))
        .collect();
    ensure!(!chosen.is_empty(), "nothing of the guest's stack is in use");
    let chosen = match spoil {
        Spoil::OneBit => vec![chosen[random.below(chosen.len() as u64) as usize]],
        Spoil::EveryWord => chosen,
    };
    let mut spoilt = Vec::with_capacity(chosen.len());
    for word in chosen {
        let (at, byte) = (STACK.start + word as u64, now[word] ^ 1 << random.below(8));
        memory
            .write_all_at(&[byte], at)
            .context("write the backup's guest memory")?;
        spoilt.push((at, byte));
    }
    Ok(spoilt)
}

/// Whether nothing of what was spoilt is there any more.
fn is_mended(memory: &File, spoilt: &[(u64, u8)]) -> Result<bool> {
    let mut byte = [0];
    for (at, bad) in spoilt {
        memory
            .read_exact_at(&mut byte, *at)
            .context("read the backup's guest memory")?;
        if byte[0] == *bad {
            return Ok(false);
        }
    }
    Ok(true)
}

fn stack(memory: &File) -> Result<Vec<u8>> {
    let mut stack = vec![0; (STACK.end - STACK.start) as usize];
    memory
        .read_exact_at(&mut stack, STACK.start)
        .context("read the backup's guest memory")?;
    Ok(stack)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
