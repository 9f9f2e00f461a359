//! A frozen primary (issue 3, point 4): frozen, replaced and thawed, it commits nothing, sends nothing new, and ends by itself.
//!
//! Both sides write to one TAP, so a frame does not say who sent it. In every other round the survivor is frozen while the
//! zombie lives: what leaves then is the zombie's, and must be a repeat, byte by byte, of a frame that left at another time
//! (it had committed before the freeze, so the survivor sent it, or the zombie itself had). In the rounds between, the
//! survivor serves on, and no client may be kept waiting for what the zombie did.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Moment;
use hypervisor::demo::pair::{Pair, Side};
use hypervisor::session::report::Event;

use crate::harness::hostile_capture::Capture;
use crate::harness::hostile_clients::{Clients, Outcome};
use crate::harness::hostile_zombie::{LogMemory, freeze, thaw};
use crate::harness::random::Random;
use crate::harness::stage::{GUEST, INTERFACE, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "zombie",
    line: "A primary that was frozen, replaced and thawed commits nothing, sends nothing new and ends by itself",
    short: Duration::from_secs(15),
    full: Duration::from_secs(120),
    show,
};

/// A bound for things that take milliseconds, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(20);

/// A zombie must be gone so soon after it was thawed. It has to find out (its next entry is refused, or its connection is
/// closed, or its peer is silent for the detector's ceiling of 300 ms) and to ask the arbiter once.
const LAST_HOUR: Duration = Duration::from_secs(1);

/// No request that is under way while the zombie lives, or sent later, may wait so long: below it are busy hosts, above it is
/// TCP's shortest timeout (200 ms), the sign of a lost frame.
const LOST_FRAME: Duration = Duration::from_millis(150);

/// The exit code of a process whose machine another one has taken over.
const REPLACED: i32 = 3;

fn show(run: &Run) -> Result<Figures> {
    let rounds = run.form.pick(4, 30);
    let mut seen = Vec::new();
    alone(|| {
        let stage = Stage::enter()?;
        let mut random = Random::new(run.seed);
        for number in 0..rounds {
            let alone = number % 2 == 0;
            let round = one_round(&stage, number, alone, &mut random).with_context(|| {
                format!(
                    "round {number}, survivor {}",
                    if alone { "frozen" } else { "serving" }
                )
            })?;
            run.say(format!("round {number}: {round:?}"));
            seen.push(round);
        }
        Ok(())
    })?;
    let mut figures = Figures::default();
    figures.add("rounds", rounds);
    figures.add(
        "requests",
        seen.iter().map(|round| round.requests).sum::<u64>(),
    );
    figures.add(
        "acknowledged_writes",
        seen.iter().map(|round| round.writes).sum::<u64>(),
    );
    figures.add(
        "frames_of_zombies",
        seen.iter().map(|round| round.zombie_frames).sum::<u64>(),
    );
    let mut spread = |name: &str, of: fn(&Round) -> Duration| {
        let mut spans: Vec<Duration> = seen.iter().map(of).collect();
        spans.sort_unstable();
        figures.add(
            &format!("{name}_ms_p50"),
            milliseconds(spans[spans.len() / 2]),
        );
        figures.add(
            &format!("{name}_ms_max"),
            milliseconds(spans[spans.len() - 1]),
        );
    };
    spread("freeze_to_live", |round| round.freeze_to_live);
    spread("client_stall", |round| round.stall);
    spread("stall_after_thaw", |round| round.stall_after_thaw);
    spread("thaw_to_death", |round| round.thaw_to_death);
    Ok(figures)
}

fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e4).round() / 10.0
}

#[derive(Debug, Default)]
struct Round {
    requests: u64,
    writes: u64,
    zombie_frames: u64,
    freeze_to_live: Duration,
    stall: Duration,
    stall_after_thaw: Duration,
    thaw_to_death: Duration,
}

/// Every frame that has left, apart from those of a zombie that was alone.
struct Frames {
    capture: Capture,
    known: HashSet<Vec<u8>>,
}

impl Frames {
    fn look(&mut self) -> Result<()> {
        let known = &mut self.known;
        self.capture.look(|frame| {
            known.insert(frame.to_vec());
        })
    }
}

fn one_round(stage: &Stage, number: u64, alone: bool, random: &mut Random) -> Result<Round> {
    let mut frames = Frames {
        capture: Capture::start(INTERFACE)?,
        known: HashSet::new(),
    };
    let mut pair = stage.pair_in(&format!("round-{number}"), "kv", "")?;
    let mut clients = Clients::start(GUEST, 3, random.next())?;
    // Past the detector's learning, as a pair that has run for a while.
    let until =
        Instant::now() + random.between(Duration::from_millis(500), Duration::from_millis(900));
    clients.await_answers(1)?;
    while Instant::now() < until {
        frames.look()?;
        std::thread::sleep(Duration::from_millis(1));
    }

    ensure!(
        !pair
            .backup
            .events()
            .iter()
            .any(|event| matches!(event, Event::Live { .. })),
        "the backup went live before anything was done to its primary"
    );
    let frozen_at = Moment::now();
    freeze(&pair.primary)?;
    let live_at = await_live(&pair.backup, &mut frames)?;
    let log = LogMemory::of(pair.primary.pid())?;
    let ends = log.fenced_at()?;

    let stand_by = random.between(Duration::ZERO, Duration::from_millis(40));
    watch_for(stand_by, &mut frames)?;
    let (thawed_at, dead_at, of_zombie) = if alone {
        thaw_alone(&mut pair, &mut frames)?
    } else {
        let (thawed_at, dead_at) = thaw_to_death(&mut pair.primary, &mut frames)?;
        (thawed_at, dead_at, Vec::new())
    };
    ensure!(
        log.fenced_at()? == ends,
        "the zombie committed: its log ended at {ends:?}, now at {:?}",
        log.fenced_at()?
    );

    clients.await_answers(200)?;
    frames.look()?;
    let outcome = clients.stop_and_verify()?;
    frames.look()?;
    for frame in &of_zombie {
        ensure!(
            frames.known.contains(frame),
            "the zombie sent a frame of {} bytes that neither it nor the survivor has sent at any other time",
            frame.len()
        );
    }
    ensure!(
        pair.backup.ended().is_none(),
        "the survivor ended: {}",
        pair.backup.messages()
    );
    let after_thaw = stall_after(&outcome, thawed_at, dead_at)?;
    Ok(Round {
        requests: outcome.requests,
        writes: outcome.writes,
        zombie_frames: of_zombie.len() as u64,
        freeze_to_live: live_at.since(frozen_at),
        stall: outcome.longest_since(frozen_at),
        stall_after_thaw: after_thaw,
        thaw_to_death: dead_at.since(thawed_at),
    })
}

fn await_live(survivor: &Side, frames: &mut Frames) -> Result<Moment> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        frames.look()?;
        let mut live = None;
        for event in survivor.events() {
            match event {
                Event::Live { at, .. } => live = Some(Moment::from_nanos(at.open)),
                Event::Diverged { what } => bail!("the backup diverged: {what}"),
                _ => {}
            }
        }
        if let Some(at) = live {
            return Ok(at);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!(
        "the backup did not go live; it said: {}",
        survivor.messages()
    )
}

fn watch_for(span: Duration, frames: &mut Frames) -> Result<()> {
    let until = Instant::now() + span;
    while Instant::now() < until {
        frames.look()?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Thaws the zombie while the survivor stands still: when each was, and the zombie's frames.
fn thaw_alone(pair: &mut Pair, frames: &mut Frames) -> Result<(Moment, Moment, Vec<Vec<u8>>)> {
    freeze(&pair.backup)?;
    frames.look()?;
    let mut aside = HashSet::new();
    std::mem::swap(&mut frames.known, &mut aside);
    let ended = thaw_to_death(&mut pair.primary, frames);
    frames.look()?;
    std::mem::swap(&mut frames.known, &mut aside);
    thaw(&pair.backup);
    let (thawed_at, dead_at) = ended?;
    Ok((thawed_at, dead_at, aside.into_iter().collect()))
}

/// Thaws the zombie and waits for its end, which must come soon, by itself, and with a word.
fn thaw_to_death(zombie: &mut Side, frames: &mut Frames) -> Result<(Moment, Moment)> {
    let thawed_at = Moment::now();
    thaw(zombie);
    let status = loop {
        frames.look()?;
        if let Some(status) = zombie.ended() {
            break status;
        }
        ensure!(
            Moment::now().since(thawed_at) < LAST_HOUR,
            "the zombie lives on after {} ms; it said: {}",
            LAST_HOUR.as_millis(),
            zombie.messages()
        );
        std::thread::sleep(Duration::from_micros(200));
    };
    let dead_at = Moment::now();
    let words = zombie.messages();
    ensure!(
        status.code() == Some(REPLACED),
        "the zombie ended with {status}; it said: {words}"
    );
    ensure!(
        words.contains("has taken the machine over"),
        "the zombie did not say why it ended, but: {words}"
    );
    Ok((thawed_at, dead_at))
}

/// The longest wait that the zombie may have caused: under way while it lived, and not for the take-over itself or, with a
/// survivor that stood still, for that.
fn stall_after(outcome: &Outcome, thawed_at: Moment, dead_at: Moment) -> Result<Duration> {
    let caused = outcome
        .waits
        .iter()
        .filter(|wait| wait.answered > thawed_at);
    let longest = caused
        .map(|wait| wait.answered.since(wait.sent.max(thawed_at)))
        .max()
        .unwrap_or_default();
    let allowed = LOST_FRAME + dead_at.since(thawed_at);
    ensure!(
        longest < allowed,
        "a request waited for {} ms after the thaw: the zombie took a frame away",
        longest.as_millis()
    );
    Ok(longest)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
