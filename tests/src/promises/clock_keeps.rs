//! The clock of a guest that computes without end and reads the time from a page of its memory (issue 7, point 4): it goes on, keeps pace with the
//! host's and never runs backwards, not over the loss of its primary, nor a copy of the running machine, a switch-over, a pause or a reset. What Linux guests under replay have; `linux-busy` has Linux itself.
//!
//! The guest prints what its clock says, and this process looks when a line has come. What a line was late is known from its neighbours: of
//! many the quickest counts, as a clock that is asked over a network is set.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::config::Transport;
use hypervisor::demo::pair::{Pair, PairSpec};
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use crate::harness::clock_guest::{self, APART};
use crate::harness::operator::Operator;
use crate::harness::program::doppel;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "clock-keeps",
    line: "the clock page of a guest that computes without end, counted or preempted, never runs backwards over a failover, a live join, a switch-over, a pause and a reset, and keeps pace with the host's within 0.1 %, but for what one failover takes (full: for an hour)",
    short: Duration::from_secs(30),
    full: Duration::from_secs(4500),
    show,
};

/// How far the guest's clock may be from the host's, as a share of the time that has passed.
const DRIFT: f64 = 0.001;

/// Lines at an end of a run of which the quickest counts.
const QUICKEST_OF: usize = 20;

/// Lines that show that the clock goes on.
const A_FEW: usize = 6;

/// A machine's name, if it is given none.
const NAME: &str = "machine";

/// How long it is paused: many ticks.
const PAUSE: Duration = Duration::from_millis(300);

/// What even the quickest may have been late.
const UNSURE: Duration = Duration::from_millis(3);

/// What a failover may take of the guest's time, once: the heir counts from when the last value came to it, and who gets no processor is late.
const FAILOVER: Duration = Duration::from_millis(100);

/// Longest without a line, for a side that serves: far beyond what a busy machine does to it.
const PATIENCE: Duration = Duration::from_secs(30);

fn show(run: &Run) -> Result<Figures> {
    let work = tempfile::Builder::new()
        .prefix("doppel-clock-")
        .tempdir()
        .context("make a directory")?;
    let mut figures = Figures::default();
    // How long with a backup, and, after the primary is gone, without. The hour is for the one that needs all of it: preemption, checkpoints, replay.
    let ways: [(&str, bool, &[&str], [u64; 2]); 2] = [
        (
            "preempted",
            false,
            &["--preempt", "checkpoint"],
            run.form.pick([6, 3], [3300, 300]),
        ),
        ("counted", true, &[], run.form.pick([4, 3], [540, 60])),
    ];
    for (name, counts, options, lengths) in ways {
        let guest = work.path().join(format!("{name}.elf"));
        fs::write(&guest, clock_guest::elf(counts)).context("write the guest")?;
        let lengths = lengths.map(Duration::from_secs);
        let kept = keeps(run, &work.path().join(name), &guest, options, lengths).context(name)?;
        figures.add(name, kept);
        let costs = costs(
            &work.path().join("log"),
            &guest,
            options,
            run.form.pick(1, 10),
        )
        .with_context(|| format!("{name}, recorded"))?;
        figures.add(&format!("{name}_log"), costs);
    }
    Ok(figures)
}

/// A line of the guest's that was seen.
#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    guest: Duration,
}

/// Follows the lines in a console's file.
struct Follower {
    console: PathBuf,
    /// Bytes of it that were taken.
    taken: u64,
    /// Lines that may be cut: a side that died may have let out a part of one, and a reset may come within one.
    cut: u32,
    seen: Vec<Seen>,
}

impl Follower {
    fn of(console: PathBuf) -> Self {
        Self {
            console,
            taken: 0,
            cut: 0,
            seen: Vec::new(),
        }
    }

    /// The machine's console goes on in this file.
    fn go_on_in(&mut self, console: PathBuf) {
        (self.console, self.taken) = (console, 0);
        self.cut += 1;
    }

    /// Takes what is new; an error says that time ran backwards.
    fn look(&mut self) -> Result<()> {
        let mut text = String::new();
        let Ok(mut file) = File::open(&self.console) else {
            return Ok(());
        };
        file.seek(SeekFrom::Start(self.taken))?;
        file.read_to_string(&mut text).context("read the console")?;
        let at = Instant::now();
        for line in text.split_inclusive('\n') {
            let Some(whole) = line.strip_suffix('\n') else {
                break;
            };
            self.taken += line.len() as u64;
            let Some((guest, in_order)) = clock_guest::line(whole) else {
                self.cut = self
                    .cut
                    .checked_sub(1)
                    .with_context(|| format!("the guest printed {whole:?}"))?;
                continue;
            };
            ensure!(
                in_order,
                "within the guest a reading was before the one before it, by {guest:?}"
            );
            // After a failover what the world may have seen already is printed again.
            match self.seen.last() {
                Some(last) if guest == last.guest => {}
                Some(last) if guest < last.guest => {
                    ensure!(
                        self.seen.iter().rev().any(|seen| seen.guest == guest),
                        "its clock said {guest:?} after {:?}",
                        last.guest
                    );
                }
                _ => self.seen.push(Seen { at, guest }),
            }
        }
        Ok(())
    }

    /// For so long, and until there are so many more lines.
    fn follow(&mut self, length: Duration, more: usize) -> Result<()> {
        let began = Instant::now();
        let (until, enough) = (began + length, self.seen.len() + more);
        while Instant::now() < until || self.seen.len() < enough {
            self.look()?;
            let last = self.seen.last();
            let stands = last.map_or(began, |last| last.at.max(began)).elapsed();
            ensure!(
                stands < PATIENCE,
                "its clock has stood for {PATIENCE:?}, after {} lines",
                self.seen.len()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

fn keeps(
    run: &Run,
    directory: &Path,
    guest: &Path,
    options: &[&str],
    [with, without]: [Duration; 2],
) -> Result<Value> {
    fs::create_dir(directory).context("make a directory")?;
    // What is shown here is the clock. Whether a side that gets no processor for a while is given up is shown elsewhere.
    let config = directory.join("patient.toml");
    fs::write(&config, "[timing]\nsilence_ms = 2000\n").context("write a configuration")?;
    let mut more: Vec<String> = options.iter().map(|&option| option.into()).collect();
    more.extend(["--config".into(), config.display().to_string()]);
    let spec = PairSpec {
        doppel: doppel()?,
        directory: directory.to_owned(),
        transport: Transport::Shm,
        arbiter: None,
        guest: guest.display().to_string(),
        memory_mib: 16,
        command_line: String::new(),
        memory_check_ms: 1000,
        kvm: None,
        more,
    };
    let mut pair = Pair::start(&spec, None)?;
    let console = |side: &str| directory.join(format!("{side}.console"));
    let mut lines = Follower::of(console("primary"));
    lines.follow(with, QUICKEST_OF)?;
    ensure!(
        pair.primary.ended().is_none() && pair.backup.ended().is_none(),
        "a side ended: {} {}",
        pair.primary.messages(),
        pair.backup.messages()
    );
    pair.primary.kill();
    lines.look()?;
    let protected = lines.seen.len();
    let live = pair.backup.wait_for(
        PATIENCE,
        |event| matches!(event, Event::Live { .. } | Event::Diverged { .. }),
        drop,
    );
    let Some(Event::Live { memory_checks, .. }) = live else {
        anyhow::bail!("no failover: {live:?} {}", pair.backup.messages());
    };
    lines.go_on_in(console("backup"));
    lines.follow(without, QUICKEST_OF)?;
    let kept = judge(&lines.seen, protected)?;
    run.say(format!("{guest:?}: {kept}"));
    moved(&mut pair, &spec, &mut lines)?;
    let _ = pair.backup.stop(PATIENCE);
    Ok(json!({"clock": kept, "memories_compared": memory_checks, "lines_protected": protected}))
}

/// What else moves or stops a machine: a copy of it as it runs, a switch-over to that, a pause, and a reset. Its clock goes on over all of them.
fn moved(pair: &mut Pair, spec: &PairSpec, lines: &mut Follower) -> Result<()> {
    let operator = Operator::of(spec.run_directory(), NAME);
    pair.replace_primary(spec, None, drop)?;
    lines.follow(Duration::ZERO, A_FEW).context("copied")?;
    operator.ordered(&["switch"])?;
    lines.look()?;
    lines.go_on_in(spec.directory.join("backup-2.console"));
    lines
        .follow(Duration::ZERO, A_FEW)
        .context("switched over")?;
    operator.ordered(&["pause"])?;
    std::thread::sleep(PAUSE);
    operator.ordered(&["resume"])?;
    lines
        .follow(Duration::ZERO, A_FEW)
        .context("paused and resumed")?;
    lines.cut += 1;
    operator.ordered(&["reset"])?;
    lines.follow(Duration::ZERO, A_FEW).context("reset")
}

/// Whether the guest's clock kept pace; so many of the lines came before the failover.
fn judge(seen: &[Seen], protected: usize) -> Result<Value> {
    let parts = [
        ("with a backup", &seen[..protected], Duration::ZERO),
        ("alone", &seen[protected..], Duration::ZERO),
        ("in all", seen, FAILOVER),
    ];
    let mut figures = json!({"lines": seen.len(), "line_every_ms": APART.as_millis() as u64});
    for (name, part, lost) in parts {
        let (behind, host) = behind(part);
        ensure!(
            behind.abs() <= DRIFT * host + (UNSURE + lost).as_secs_f64(),
            "{name} the guest's clock fell {:.1} ms behind the host's in {host:.1} s",
            behind * 1e3
        );
        let name = name.replace(' ', "_");
        figures[format!("{name}_s")] = json!((host * 10.0).round() / 10.0);
        figures[format!("{name}_behind_ms")] = json!((behind * 1e5).round() / 100.0);
    }
    let between = seen.windows(2).map(|pair| pair[1].at - pair[0].at);
    let longest = between.max().unwrap_or_default();
    figures["longest_without_a_line_ms"] = json!(longest.as_millis() as u64);
    Ok(figures)
}

/// By how many seconds the guest's clock fell behind the host's, and in how many.
fn behind(seen: &[Seen]) -> (f64, f64) {
    let start = seen[0].at;
    // How far the host's clock is ahead: as little as it was for any of these.
    let ahead = |part: &[Seen]| {
        let of = |seen: &Seen| (seen.at - start).as_secs_f64() - seen.guest.as_secs_f64();
        let all = part.iter().map(|seen| (of(seen), seen.at));
        all.min_by(|one, other| one.0.total_cmp(&other.0))
            .expect("lines were waited for")
    };
    let (first, began) = ahead(&seen[..QUICKEST_OF]);
    let (last, ended) = ahead(&seen[seen.len() - QUICKEST_OF..]);
    (last - first, (ended - began).as_secs_f64())
}

/// What a second of such a guest leaves in a log, which is what it can make it grow by.
fn costs(log: &Path, guest: &Path, options: &[&str], seconds: u64) -> Result<Value> {
    let output = Command::new(doppel()?)
        .args(["record", "--json", "--memory", "16", "--guest"])
        .arg(guest)
        .args(options)
        .args(["--for", &format!("{seconds}s"), "--console"])
        .arg(log.with_extension("console"))
        .arg("--out")
        .arg(log)
        .output()
        .context("start doppel")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let bytes = fs::metadata(log).context("look at the log")?.len();
    let replay = Command::new(doppel()?)
        .args(["replay", "--json"])
        .arg(log)
        .output()
        .context("start doppel")?;
    let said: Value = serde_json::from_slice(&replay.stdout)
        .with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&replay.stderr)))?;
    ensure!(replay.status.success() && said["mismatches"] == 0, "{said}");
    fs::remove_file(log).context("remove the log")?;
    let exits = said["sync_points"].as_u64().context("a number of exits")?;
    Ok(json!({"bytes_a_second": bytes / seconds, "exits_a_second": exits / seconds}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    /// Ten seconds of a clock of this rate, of which `lost` passes it by in the middle; each line is seen `late`.
    fn seen(rate: f64, lost: u64, late: impl Fn(u32) -> u64) -> Vec<Seen> {
        let start = Instant::now();
        let ms = Duration::from_millis;
        (0..100)
            .map(|line| Seen {
                at: start + APART * line + ms(late(line)),
                guest: (APART * line).mul_f64(rate) + ms(200 - if line < 50 { 0 } else { lost }),
            })
            .collect()
    }

    #[test]
    fn a_clock_that_goes_wrong_is_told_from_lines_that_come_late() {
        let holds = |rate, lost, late: fn(u32) -> u64| judge(&seen(rate, lost, late), 50).is_ok();
        assert!(holds(1.0, 0, |_| 0));
        assert!(holds(1.0, 0, |line| u64::from(line % 7) * 40));
        assert!(holds(1.0, 90, |_| 0), "at a failover");
        assert!(!holds(1.0, 150, |_| 0));
        assert!(!holds(0.99, 0, |_| 0));
        assert!(!holds(1.01, 0, |line| u64::from(line % 3) * 30));
        assert!(
            !holds(1.0, 0, |line| if line < 25 { 0 } else { 15 }),
            "with a backup"
        );
        assert!(
            !holds(1.0, 0, |line| if line < 75 { 0 } else { 15 }),
            "alone"
        );
    }
}
