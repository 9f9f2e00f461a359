//! A pair across two hosts whose log goes by RDMA (issue 5, points 1 and 5): the primary's host killed, its process killed, its host
//! frozen and thawed after its backup went live, under real clients.
//!
//! The hosts are the lab's. After each failover a new backup joins in the old primary's host, and what is done next is done to
//! the survivor. What leaves a frozen host after it was thawed is seen at its cable: each frame must be one, byte by byte,
//! that it had sent before or that the survivor sends (it had committed before the freeze).
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Moment;
use hypervisor::config::Transport;
use hypervisor::demo::client::Client;
use hypervisor::intervals::Replication;
use hypervisor::session::report::Event;

use crate::harness::random::Random;
use crate::lab_pair::side::End;
use crate::lab_pair::{Choice, Guest, LabPair, MEMORY_CHECK, PATIENCE, Site, await_answers};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "rdma-pair",
    line: "a pair across two hosts over RDMA loses nothing when the primary's host or process is killed; one that was frozen, replaced and thawed sends nothing new and ends by itself, over TCP too",
    short: Duration::from_secs(150),
    full: Duration::from_secs(2400),
    show,
};

/// Connections of the clients: enough that some wait at any moment, few enough for a guest that is emulated.
const CONNECTIONS: usize = 4;

/// A zombie must be gone so soon after it was thawed, in a host that is emulated: it has to find out and to ask the arbiter once.
const LAST_HOUR: Duration = Duration::from_secs(20);

/// The exit code of a process whose machine another one has taken over.
const REPLACED: i32 = 3;

/// What is done to the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    /// SIGKILL to its process.
    Process,
    /// Its host vanishes.
    Host,
    /// Its host stands still while the backup takes over, and notices that when it is thawed.
    Frozen,
    /// The same with the host's clock: it notices nothing.
    FrozenWithClock,
}

impl Blow {
    fn name(self) -> &'static str {
        match self {
            Self::Process => "process_killed",
            Self::Host => "host_killed",
            Self::Frozen => "host_frozen",
            Self::FrozenWithClock => "host_frozen_with_clock",
        }
    }
}

/// What a transport has to bear, in its order.
fn blows(run: &Run, transport: Transport) -> Vec<Blow> {
    let of = |blow: Blow, short: usize, full: usize| vec![blow; run.form.pick(short, full)];
    let mut all = Vec::new();
    if transport == Transport::Rdma {
        all.extend(of(Blow::Process, 1, 20));
        all.extend(of(Blow::Host, 1, 20));
    }
    // Last those that leave both hosts on, for the next transport.
    all.extend(of(Blow::Frozen, 0, 10));
    all.extend(of(Blow::FrozenWithClock, 1, 10));
    all
}

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let started = Instant::now();
    let site = Site::set_up("promise-rdma-pair", 1024)?;
    run.say(format!(
        "two hosts are up and equipped after {:.1?}",
        started.elapsed()
    ));
    for transport in [Transport::Rdma, Transport::Tcp] {
        over(run, &site, transport, &mut random, &mut figures)
            .with_context(|| format!("over {}", transport.name()))?;
    }
    let overflowed = site.lab().status()?.frames_overflowed;
    figures.add("frames_lost_at_full_queues", overflowed);
    Ok(figures)
}

/// One machine over one transport, and all that it has to bear.
fn over(
    run: &Run,
    site: &Site,
    transport: Transport,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<()> {
    let name = transport.name();
    let choice = Choice {
        transport,
        name: &format!("promise-{name}"),
        guest: Guest::Bare("kv"),
        memory_mib: 32,
        replicate: Replication::Replay,
    };
    let mut pair = LabPair::start(site, &choice)?;
    let client = site.clients(random.next(), CONNECTIONS)?;
    run.say(format!("{name}: paired, and clients at work"));
    let blows = blows(run, transport);
    let mut spans = BTreeMap::<&str, Vec<f64>>::new();
    let (mut zombies, mut compared, mut resent) = (0, 0, 0);
    for (number, &blow) in blows.iter().enumerate() {
        await_answers(&client, 20 + random.below(200), PATIENCE)?;
        if number == 0 {
            // Sides that have been a pair for so long have compared their memory.
            std::thread::sleep(2 * MEMORY_CHECK);
        }
        std::thread::sleep(random.between(Duration::ZERO, Duration::from_millis(20)));
        pair.ensure_paired()?;
        let outcome = strike(site, &mut pair, &client, blow)
            .with_context(|| format!("{} of {}: {}", number + 1, blows.len(), blow.name()))?;
        zombies += outcome.zombie_frames;
        compared += outcome.memory_checks;
        resent += outcome.resent;
        spans
            .entry(blow.name())
            .or_default()
            .push(outcome.served_ms);
        if number + 1 < blows.len() {
            if blow == Blow::Host {
                site.start(pair.primary.host())?;
            }
            let joined = pair.rejoin()?;
            run.say(format!(
                "{name}, {}: {outcome:?}; {}",
                blow.name(),
                told(&joined)
            ));
        } else {
            run.say(format!("{name}, {}: {outcome:?}", blow.name()));
        }
    }
    await_answers(&client, 20, PATIENCE)?;
    let (outcome, verified) = site.judge(client, name)?;
    pair.ensure_none_diverged()?;
    let live = pair.heard.live.context("nothing was taken over")?;
    ensure!(
        live.epoch == blows.len() as u64 + 1,
        "{} blows led to epoch {}",
        blows.len(),
        live.epoch
    );
    ensure!(
        compared > 0,
        "no backup ever compared its memory with its primary's"
    );
    // What the last blow left stands alone.
    pair.end_survivor()?;
    for (blow, spans) in &mut spans {
        spans.sort_by(f64::total_cmp);
        figures.add(&format!("{name}_{blow}"), spans.len());
        figures.add(
            &format!("{name}_{blow}_to_service_ms_p50"),
            spans[spans.len() / 2],
        );
        figures.add(
            &format!("{name}_{blow}_to_service_ms_max"),
            spans[spans.len() - 1],
        );
    }
    figures.add(&format!("{name}_frames_of_zombies"), zombies);
    figures.add(&format!("{name}_memories_compared"), compared);
    figures.add(&format!("{name}_outputs_sent_again"), resent);
    figures.add(
        &format!("{name}_acknowledged_writes"),
        outcome.acknowledged_writes,
    );
    figures.add(&format!("{name}_keys_read_back"), verified.keys);
    figures.add(
        &format!("{name}_longest_wait_ms"),
        millis(outcome.stall_max),
    );
    Ok(())
}

fn told(joined: &Event) -> String {
    match joined {
        Event::Joined {
            stopped_us,
            took_us,
            bytes,
            rounds,
            ..
        } => format!(
            "a new backup in {} ms, {} KiB in {rounds} rounds, the guest stood {:.1} ms",
            took_us / 1000,
            bytes >> 10,
            *stopped_us as f64 / 1e3
        ),
        other => format!("{other:?}"),
    }
}

fn millis(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e4).round() / 10.0
}

/// What came of a blow.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    /// From the blow to the first answer that a client had after the survivor's word that it serves.
    served_ms: f64,
    /// Outputs that the survivor sent again.
    resent: usize,
    /// Whole memories that it had compared.
    memory_checks: u64,
    /// Frames that a zombie sent after it was thawed, all of them repeats.
    zombie_frames: usize,
    /// From the thaw to the zombie's end; nought without one.
    thaw_to_death_ms: f64,
}

fn strike(site: &Site, pair: &mut LabPair<'_>, client: &Client, blow: Blow) -> Result<Outcome> {
    let host = pair.primary_host();
    let survivor = pair.backup.host().to_owned();
    let frames = [site.frames_of(host.name())?, site.frames_of(&survivor)?];
    let struck = Moment::now();
    client.mark_kill(struck);
    match blow {
        Blow::Process => pair.kill_process()?,
        Blow::Host => host.kill()?,
        Blow::Frozen => host.freeze()?,
        Blow::FrozenWithClock => host.freeze_with_clock()?,
    }
    let (live_at, live) = pair.await_live()?;
    client.mark_live(live_at);
    let served = await_answers(client, 20, PATIENCE).context("after the take-over")?;
    let mut outcome = Outcome {
        served_ms: millis(served.max(live_at).since(struck)),
        resent: live.resent,
        memory_checks: live.memory_checks,
        zombie_frames: 0,
        thaw_to_death_ms: 0.0,
    };
    match blow {
        Blow::Process | Blow::Host => {
            pair.primary.await_end(PATIENCE, drop)?;
        }
        Blow::Frozen | Blow::FrozenWithClock => {
            let mut known: HashSet<Vec<u8>> = HashSet::new();
            for kept in &frames {
                known.extend(kept.take()?);
            }
            let thawed = Instant::now();
            host.thaw()?;
            let end = pair.primary.await_end(LAST_HOUR, drop)?;
            outcome.thaw_to_death_ms = millis(thawed.elapsed());
            judge_end(&end, &pair.primary.messages())?;
            // The survivor serves on; what it sent may have crossed what the zombie did.
            await_answers(client, 20, PATIENCE).context("after the thaw")?;
            let sent = frames[0].take()?;
            known.extend(frames[1].take()?);
            for frame in &sent {
                ensure!(
                    known.contains(frame),
                    "the zombie sent a frame of {} bytes that neither it nor the survivor has sent at any other time",
                    frame.len()
                );
            }
            outcome.zombie_frames = sent.len();
        }
    }
    Ok(outcome)
}

/// A zombie ends by itself, and says why.
fn judge_end(end: &End, words: &str) -> Result<()> {
    match end {
        End::Code(REPLACED) => {}
        other => bail!("the zombie ended with {other:?}; it said:\n{words}"),
    }
    ensure!(
        words.contains("has taken the machine over"),
        "the zombie did not say why it ended, but:\n{words}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn a_zombie_that_ends_otherwise_or_says_nothing_is_none_that_ends_by_itself() {
        let words = "doppel: another process has taken the machine over";
        judge_end(&End::Code(REPLACED), words).unwrap();
        judge_end(&End::Code(REPLACED), "").unwrap_err();
        judge_end(&End::Code(1), words).unwrap_err();
        judge_end(&End::Gone("its host".into()), words).unwrap_err();
    }
}
