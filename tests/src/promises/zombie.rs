//! A frozen primary (issue 3, point 4): frozen, replaced and thawed, it commits nothing, sends nothing new, and ends by itself.
//!
//! Both sides write to one TAP, so a frame does not say who sent it. In some rounds the survivor is frozen while the zombie
//! lives: what leaves then is the zombie's, and must be a repeat, byte by byte, of a frame that left at another time (it had
//! committed before the freeze, so the survivor sent it, or the zombie itself had). In others the survivor serves on, and no
//! client may be kept waiting for what the zombie did; in the rest the thaw comes in the middle of the take-over.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Moment;
use hypervisor::demo::pair::{Pair, Side};
use hypervisor::session::report::Event;

use crate::harness::hostile_capture::Capture;
use crate::harness::hostile_clients::{Clients, Outcome};
use crate::harness::hostile_zombie::{LogMemory, Pulse, freeze, is_protected, thaw};
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
const LAST_HOUR: Duration = Duration::from_secs(2);

/// No request that is under way while the zombie lives, or sent later, may wait so long: below it are busy hosts, above it is
/// TCP's shortest timeout (200 ms), the sign of a lost frame.
const LOST_FRAME: Duration = Duration::from_millis(150);

/// From this wait for a CPU on, a host is too busy to tell a lost frame by the wait for its answer, in which several such waits
/// add up.
const BUSY: Duration = Duration::from_millis(30);

/// Longer than the silence after which any peer is given up.
const CEILING: Duration = Duration::from_millis(500);

/// The exit code of a process whose machine another one has taken over.
const REPLACED: i32 = 3;

/// What is done to the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Play {
    /// The zombie is thawed while the survivor stands still: whatever leaves is the zombie's.
    Alone,
    /// The zombie is thawed while the survivor serves.
    Serving,
    /// The primary is thawed at about the time at which it is given up: before, during or after.
    Early,
}

fn show(run: &Run) -> Result<Figures> {
    let rounds = run.form.pick(2, 15);
    let mut plays = Vec::new();
    for _ in 0..rounds {
        plays.extend([Play::Alone, Play::Serving]);
    }
    plays.extend(vec![Play::Early; run.form.pick(2, 30)]);
    let mut seen = Vec::new();
    let mut void = 0;
    alone(|| {
        let stage = Stage::enter()?;
        let mut random = Random::new(run.seed);
        let mut number = 0;
        for &play in &plays {
            let round = loop {
                number += 1;
                let round = one_round(&stage, number, play, &mut random)
                    .with_context(|| format!("round {number}, {play:?}"))?;
                if let Some(round) = round {
                    break round;
                }
                void += 1;
                ensure!(
                    void <= plays.len(),
                    "{void} of {number} pairs had parted before anything was done to them: is this host too busy?"
                );
            };
            run.say(format!("{play:?}: {round:?}"));
            seen.push(round);
        }
        Ok(())
    })?;
    let judged = seen.iter().filter(|round| round.judged).count();
    ensure!(
        judged > 0,
        "this host is too busy to tell a lost frame from a wait for a CPU"
    );
    let mut figures = figures(&seen, &plays);
    figures.add("pairs_parted_before_the_freeze", void);
    figures.add("stalls_judged", judged);
    Ok(figures)
}

fn figures(seen: &[Round], plays: &[Play]) -> Figures {
    let mut figures = Figures::default();
    figures.add("rounds", seen.len());
    let early = |round: &&(&Round, &Play)| *round.1 == Play::Early;
    let rounds: Vec<(&Round, &Play)> = seen.iter().zip(plays).collect();
    figures.add("thawed_early", rounds.iter().filter(early).count());
    let replaced = rounds
        .iter()
        .filter(early)
        .filter(|round| round.0.replaced.is_some());
    figures.add("thawed_early_and_replaced", replaced.count());
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
        seen.iter().map(|round| round.zombie_frames).sum::<usize>(),
    );
    let mut spread = |name: &str, mut spans: Vec<Duration>| {
        spans.sort_unstable();
        if let (Some(middle), Some(last)) = (spans.get(spans.len() / 2), spans.last()) {
            figures.add(&format!("{name}_ms_p50"), milliseconds(*middle));
            figures.add(&format!("{name}_ms_max"), milliseconds(*last));
        }
    };
    let replaced = || seen.iter().filter_map(|round| round.replaced);
    spread(
        "freeze_to_live",
        replaced().map(|replaced| replaced.freeze_to_live).collect(),
    );
    spread(
        "thaw_to_death",
        replaced().map(|replaced| replaced.thaw_to_death).collect(),
    );
    spread(
        "client_stall",
        seen.iter().map(|round| round.stall).collect(),
    );
    spread(
        "host_wait_for_cpu",
        seen.iter().map(|round| round.host).collect(),
    );
    spread(
        "stall_after_thaw",
        seen.iter().map(|round| round.stall_after_thaw).collect(),
    );
    figures
}

fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e4).round() / 10.0
}

#[derive(Debug)]
struct Round {
    requests: u64,
    writes: u64,
    zombie_frames: usize,
    stall: Duration,
    stall_after_thaw: Duration,
    /// The longest that a thread waited for a CPU meanwhile.
    host: Duration,
    /// Whether a lost frame would have been told by a wait.
    judged: bool,
    /// None if the primary was thawed before it was given up.
    replaced: Option<Replaced>,
}

#[derive(Clone, Copy, Debug)]
struct Replaced {
    freeze_to_live: Duration,
    thaw_to_death: Duration,
}

/// Every frame that has left since shortly before the freeze, apart from those of a zombie that was alone.
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

/// One pair, frozen and thawed under its clients. `None` if they had parted before.
fn one_round(
    stage: &Stage,
    number: usize,
    play: Play,
    random: &mut Random,
) -> Result<Option<Round>> {
    let directory = stage.directory().join(format!("round-{number}"));
    let mut pair = stage.pair_in(&directory, "kv", "")?;
    let mut clients = Clients::start(GUEST, 3, random.next())?;
    clients.await_answers(1)?;
    // Past the detector's learning, as a pair that has run for a while.
    std::thread::sleep(random.between(Duration::from_millis(400), Duration::from_millis(800)));
    // What a zombie may repeat is in its gate when it is frozen, so the survivor sends it after that.
    let mut frames = Frames {
        capture: Capture::start(INTERFACE)?,
        known: HashSet::new(),
    };
    let pulse = Pulse::start()?;
    let frozen_at = Moment::now();
    let frozen = freeze(&pair.primary);
    if !is_protected(&directory)? {
        // One of them has given the other up, on a busy host. That is no round, but nothing may be lost by it either.
        thaw(&pair.primary);
        clients.stop_and_verify()?;
        return Ok(None);
    }
    frozen?;
    let fate = match play {
        Play::Early => thaw_early(&mut pair, random, &mut frames)?,
        Play::Alone | Play::Serving => thaw_late(&mut pair, play, random, &mut frames)?,
    };
    clients.await_answers(200)?;
    frames.look()?;
    let host = pulse.worst();
    let outcome = clients.stop_and_verify()?;
    frames.look()?;
    for frame in &fate.frames {
        ensure!(
            frames.known.contains(frame),
            "the zombie sent a frame of {} bytes that neither it nor the survivor has sent at any other time",
            frame.len()
        );
    }
    let (stall_after_thaw, allowed) = fate.stall(&outcome);
    // A primary that nobody has replaced reads its own frames.
    let judged = fate.end.is_some() && host < BUSY;
    ensure!(
        !judged || stall_after_thaw < allowed,
        "a request waited for {} ms after the thaw: the zombie took a frame away",
        stall_after_thaw.as_millis()
    );
    let server = if fate.end.is_some() {
        &mut pair.backup
    } else {
        &mut pair.primary
    };
    ensure!(
        server.ended().is_none(),
        "the side that serves has ended; it said: {}",
        server.messages()
    );
    Ok(Some(Round {
        requests: outcome.requests,
        writes: outcome.writes,
        zombie_frames: fate.frames.len(),
        stall: outcome.longest_since(frozen_at),
        stall_after_thaw,
        host,
        judged,
        replaced: fate.end.map(|end| Replaced {
            freeze_to_live: end.live_at.since(frozen_at),
            thaw_to_death: end.dead_at.since(fate.thawed_at),
        }),
    }))
}

/// What became of a primary that was thawed.
struct Fate {
    thawed_at: Moment,
    /// What it sent while it was alone.
    frames: Vec<Vec<u8>>,
    /// None: it serves on.
    end: Option<End>,
}

#[derive(Clone, Copy)]
struct End {
    live_at: Moment,
    dead_at: Moment,
}

impl Fate {
    /// The longest wait that the zombie may have caused, being under way when it had been thawed and the take-over was done;
    /// and what is no lost frame.
    fn stall(&self, outcome: &Outcome) -> (Duration, Duration) {
        let settled = self
            .end
            .map_or(self.thawed_at, |end| end.live_at.max(self.thawed_at));
        let caused = outcome.waits.iter().filter(|wait| wait.answered > settled);
        let longest = caused
            .map(|wait| wait.answered.since(wait.sent.max(settled)))
            .max();
        // While the zombie was alone nobody served.
        let alone = self
            .end
            .map_or(Duration::ZERO, |end| end.dead_at.since(self.thawed_at));
        (longest.unwrap_or_default(), LOST_FRAME + alone)
    }
}

/// Waits until the survivor is live, then thaws the zombie and sees it die.
fn thaw_late(
    pair: &mut Pair,
    play: Play,
    random: &mut Random,
    frames: &mut Frames,
) -> Result<Fate> {
    let live_at = await_live(&mut pair.backup, frames)?;
    let log = LogMemory::of(pair.primary.pid())?;
    let ends = log.fenced_at()?;
    watch_for(
        random.between(Duration::ZERO, Duration::from_millis(40)),
        frames,
    )?;
    let (thawed_at, dead_at, sent) = if play == Play::Alone {
        thaw_alone(pair, frames)?
    } else {
        let (thawed_at, dead_at) = thaw_to_death(&mut pair.primary, frames)?;
        (thawed_at, dead_at, Vec::new())
    };
    let found = log.fenced_at()?;
    ensure!(
        found == ends,
        "the zombie committed: its log ended at {ends:?}, now at {found:?}"
    );
    Ok(Fate {
        thawed_at,
        frames: sent,
        end: Some(End { live_at, dead_at }),
    })
}

/// Thaws the primary at about the time at which it is given up. Whatever comes of it, one side serves in the end.
fn thaw_early(pair: &mut Pair, random: &mut Random, frames: &mut Frames) -> Result<Fate> {
    watch_for(
        random.between(Duration::from_millis(100), Duration::from_millis(200)),
        frames,
    )?;
    let thawed_at = Moment::now();
    thaw(&pair.primary);
    // A claim that was made is made within the silence that the detector allows, and what it allows has a ceiling.
    let claims = |event: &Event| matches!(event, Event::Live { .. }) || is_claim(event);
    let live_at = match pair.backup.wait_for(CEILING, claims, drop) {
        None => None,
        Some(Event::Live { at, .. }) => Some(Moment::from_nanos(at.open)),
        Some(_) => await_live_or_end(&mut pair.backup, frames)?,
    };
    let Some(live_at) = live_at else {
        return Ok(Fate {
            thawed_at,
            frames: Vec::new(),
            end: None,
        });
    };
    let dead_at = await_death(&mut pair.primary, thawed_at.max(live_at), frames)?;
    Ok(Fate {
        thawed_at,
        frames: Vec::new(),
        end: Some(End { live_at, dead_at }),
    })
}

fn is_claim(event: &Event) -> bool {
    matches!(event, Event::Notice { text, .. } if text.contains("claiming epoch"))
}

fn await_live(survivor: &mut Side, frames: &mut Frames) -> Result<Moment> {
    match await_live_or_end(survivor, frames)? {
        Some(at) => Ok(at),
        None => bail!("the backup ended; it said: {}", survivor.messages()),
    }
}

/// When the backup went live; `None` if it ended instead, because the arbiter had heard its primary first.
fn await_live_or_end(survivor: &mut Side, frames: &mut Frames) -> Result<Option<Moment>> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        frames.look()?;
        // Asked before its words are read: what it says comes before it ends.
        let ended = survivor.ended();
        for event in survivor.events() {
            match event {
                Event::Live { at, .. } => return Ok(Some(Moment::from_nanos(at.open))),
                Event::Diverged { what } => bail!("the backup diverged: {what}"),
                _ => {}
            }
        }
        if let Some(status) = ended {
            ensure!(
                status.code() == Some(REPLACED),
                "the backup ended with {status}; it said: {}",
                survivor.messages()
            );
            return Ok(None);
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

/// Thaws the zombie and waits for its end: when each was.
fn thaw_to_death(zombie: &mut Side, frames: &mut Frames) -> Result<(Moment, Moment)> {
    let thawed_at = Moment::now();
    thaw(zombie);
    Ok((thawed_at, await_death(zombie, thawed_at, frames)?))
}

/// The zombie's end, which must come soon after `since`, by itself, and with a word.
fn await_death(zombie: &mut Side, since: Moment, frames: &mut Frames) -> Result<Moment> {
    let status = loop {
        frames.look()?;
        if let Some(status) = zombie.ended() {
            break status;
        }
        ensure!(
            Moment::now().since(since) < LAST_HOUR,
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
    Ok(dead_at)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
