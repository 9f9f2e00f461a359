//! Replay is bit-exact (issue 3, point 2): a million sync points, on a busy host, with the vCPU kicked at random.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::backends::NetPort;
use hypervisor::entry::Body;

use crate::harness::kv_load;
use crate::harness::late_guest;
use crate::harness::load::HostLoad;
use crate::harness::random::Random;
use crate::harness::recording::{Log, Recorded, Recording, Take, replay};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "replay-exact",
    line: "Every digest and all memory are equal on replay, on a busy host, with the vCPU kicked at random",
    short: Duration::from_secs(30),
    full: Duration::from_secs(400),
    show,
};

/// Sync points of the full form, in all.
const SYNC_POINTS: u64 = 1_000_000;

/// A bound on one recording or replay: many times what a loaded host takes.
const LONGEST: Duration = Duration::from_secs(600);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let mut sum = Sum::default();
    // A namespace belongs to a thread; the load needs none.
    alone(|| {
        let stage = Stage::enter()?;
        cut_logs(stage.directory(), &mut random, &mut figures)
            .context("a log that is not whole")?;
        let load = HostLoad::start(LONGEST)?;
        figures.add("load_threads", load.threads());
        for guest in guests(run.form, stage.directory())? {
            let done = record_and_replay(&stage, &guest, &mut random)
                .with_context(|| format!("guest {}", guest.name))?;
            run.say(format!(
                "{}: {} sync points, {} entries; recorded in {:.1} s with {} kicks, replayed in {:.1} s with {}",
                guest.name,
                done.sync_points,
                done.entries,
                done.recording.as_secs_f64(),
                done.kicks_recording,
                done.replaying.as_secs_f64(),
                done.kicks_replaying
            ));
            figures.add(&format!("sync_points_{}", guest.name), done.sync_points);
            sum.add(&done);
        }
        ensure!(load.is_on(), "the host's load ended before the last replay");
        Ok(())
    })?;
    figures.add("sync_points", sum.sync_points);
    figures.add("entries_with_a_digest", sum.entries);
    figures.add("memory_hashes_compared", sum.memory_hashes);
    figures.add("checkpoints_loaded", sum.checkpoints);
    figures.add("kicks_while_recording", sum.kicks_recording);
    figures.add("kicks_while_replaying", sum.kicks_replaying);
    figures.add("seconds_recording", sum.recording.as_secs());
    figures.add("seconds_replaying", sum.replaying.as_secs());
    ensure!(
        run.form != Form::Full || sum.sync_points >= SYNC_POINTS,
        "only {} sync points",
        sum.sync_points
    );
    let enough = run.form.count(100, 2000);
    ensure!(
        sum.kicks_recording >= enough && sum.kicks_replaying >= enough,
        "too few kicks to tell: {} and {}",
        sum.kicks_recording,
        sum.kicks_replaying
    );
    Ok(figures)
}

/// A guest, and how much it does.
struct Guest {
    name: &'static str,
    take: Take,
    /// Requests of the network load; the recording is then ended from outside.
    requests: Option<u64>,
}

fn guests(form: Form, directory: &Path) -> Result<Vec<Guest>> {
    let late = directory.join("late.elf");
    std::fs::write(&late, late_guest::elf(form.count(500, 8000) as u32))
        .context("write a guest")?;
    let late = late.to_str().context("a directory with a plain name")?;
    let take = |guest: &str, memory_mib, words: &str| Take {
        memory_check_ms: 250,
        ..Take::new(guest, memory_mib, words, LONGEST)
    };
    let built_in = |name: &'static str, words: String| Guest {
        name,
        take: take(name, 8, &words),
        requests: None,
    };
    Ok(vec![
        built_in(
            "irq",
            format!("exits={} hz=2000", form.count(26_000, 440_000)),
        ),
        built_in("clock", format!("reads={}", form.count(6000, 150_000))),
        // A page from exit to exit: some 3,500 exits a pass.
        built_in("memory", format!("passes={} pages=1", form.count(2, 40))),
        built_in(
            "compute",
            format!("rounds=2 reports={}", form.count(40, 1500)),
        ),
        Guest {
            name: "late",
            take: take(late, 8, ""),
            requests: None,
        },
        // The same guest where a kick may let an interrupt in, by a checkpoint: it notices, and says so with its status.
        Guest {
            name: "late_preempted",
            take: Take {
                preempt: "checkpoint",
                code: 5,
                ..take(late, 8, "")
            },
            requests: None,
        },
        Guest {
            name: "kv",
            take: take("kv", 64, "ip=10.77.0.2/24"),
            requests: Some(form.count(2500, 400_000)),
        },
    ])
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    sync_points: u64,
    entries: u64,
    memory_hashes: u64,
    checkpoints: u64,
    kicks_recording: u64,
    kicks_replaying: u64,
    recording: Duration,
    replaying: Duration,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.sync_points += other.sync_points;
        self.entries += other.entries;
        self.memory_hashes += other.memory_hashes;
        self.checkpoints += other.checkpoints;
        self.kicks_recording += other.kicks_recording;
        self.kicks_replaying += other.kicks_replaying;
        self.recording += other.recording;
        self.replaying += other.replaying;
    }
}

fn record_and_replay(stage: &Stage, guest: &Guest, random: &mut Random) -> Result<Sum> {
    let started = Instant::now();
    let recorded =
        record(stage.directory(), guest, Some(stage.port()), random).context("while recording")?;
    let recording = started.elapsed();
    let replayed = replay(&recorded.log, LONGEST, Some(random.next()))?;
    replayed.ensure_equal(&recorded)?;
    let mut sum = Sum {
        sync_points: recorded.sync_points,
        kicks_recording: recorded.kicks,
        kicks_replaying: replayed.kicks,
        recording,
        replaying: started.elapsed() - recording,
        ..Sum::default()
    };
    for (_, entry) in Log::read(&recorded.log)?.entries()? {
        match entry.body {
            Body::Step(_) | Body::Control { .. } => sum.entries += 1,
            Body::MemoryHash(_) => sum.memory_hashes += 1,
            Body::Part(part) => sum.checkpoints += u64::from(part.last),
            Body::End { .. } => {
                sum.entries += 1;
                sum.memory_hashes += 1;
            }
        }
    }
    std::fs::remove_file(&recorded.log).context("remove a log that has served")?;
    Ok(sum)
}

fn record(
    directory: &Path,
    guest: &Guest,
    port: Option<&NetPort>,
    random: &mut Random,
) -> Result<Recorded> {
    let port = port.filter(|_| guest.requests.is_some());
    let recording = Recording::start(
        directory,
        guest.name,
        &guest.take,
        port,
        Some(random.next()),
    )?;
    if let Some(requests) = guest.requests {
        kv_load::run(GUEST, 3, requests, random.next()).context("the load")?;
        recording.interrupt()?;
    }
    recording.finish()
}

/// A log that was cut off or damaged: what is whole is replayed, the message says where that ends, the exit code tells.
fn cut_logs(directory: &Path, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let take = Take::new("clock", 4, "reads=300", LONGEST);
    let recorded = Recording::start(directory, "whole", &take, None, None)?.finish()?;
    let bytes = std::fs::read(&recorded.log).context("read a log")?;
    let log = Log::read(&recorded.log)?;
    let entries = log.entries()?;
    let cuts = 4;
    for cut in 0..cuts {
        // The last entry that stays whole, not the log's last one.
        let last = random.below(log.items.len() as u64 - 1) as usize;
        let (whole, next) = (log.items[last].end, log.items[last + 1].end);
        let between = cut == 0;
        let end = if between {
            whole
        } else {
            whole + 1 + random.below(next - whole - 1)
        };
        let path = directory.join("cut.log");
        std::fs::write(&path, &bytes[..end as usize]).context("write a cut log")?;
        let replayed = replay(&path, LONGEST, None)?;
        let what = format!("cut at byte {end} of {}: {replayed:?}", bytes.len());
        let position = entries
            .iter()
            .rfind(|(item, _)| *item <= last)
            .map_or(0, |(_, entry)| entry.position.0);
        ensure!(replayed.code == 4, "{what}");
        ensure!(
            replayed.mismatches == 0 && replayed.memory_hash_recorded.is_none(),
            "{what}"
        );
        ensure!(
            replayed.sync_points == position,
            "whole up to position {position}, {what}"
        );
        ensure!(
            replayed.messages.contains(&format!("ends at byte {end}")),
            "{what}"
        );
    }
    let mut damaged = bytes.clone();
    let victim = random.below(log.items.len() as u64 - 1) as usize;
    let (start, end) = (log.items[victim].end, log.items[victim + 1].end);
    damaged[(start + random.below(end - start)) as usize] ^= 1 << random.below(8);
    let path = directory.join("damaged.log");
    std::fs::write(&path, damaged).context("write a damaged log")?;
    let replayed = replay(&path, LONGEST, None)?;
    let what = format!("damaged behind byte {start}: {replayed:?}");
    ensure!(replayed.code == 4 && replayed.mismatches == 0, "{what}");
    let named = replayed.messages.contains(&format!("at byte {start}"))
        || replayed.messages.contains("ends at byte");
    ensure!(named, "{what}");
    figures.add("logs_cut_or_damaged", cuts + 1);
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
