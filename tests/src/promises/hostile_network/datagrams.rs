//! UDP junk: from strangers, and in the peer's own name.
#![forbid(unsafe_code)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::demo::pair::Pair;
use hypervisor::protocol::Moment;
use hypervisor::protocol::heartbeat::{Heartbeat, MachineId, PairKey, Progress, SIZE};
use hypervisor::protocol::record::{Configuration, Epoch, Identity};
use hypervisor::session::report::Event;

use super::LONGEST;
use crate::harness::forged::Forger;
use crate::harness::hostile_capture::Capture;
use crate::harness::kv_load;
use crate::harness::random::Random;
use crate::harness::signal::{Signal, send};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Run};

/// Longer than a healthy side is silent on two cores that clients, junk and other work share. What is judged here is what
/// junk does, not what load does.
const SILENCE: &str = "[timing]\nsilence_ms = 2000\n";

/// Datagrams in a millisecond of a flood: some 16,000 a second to each side, for which the kernel takes about a fifth of a
/// core, so that a machine of two cores goes on.
const FLOOD: usize = 16;

/// What comes to a heartbeat socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Junk {
    /// Random bytes of any length, from nothing to the longest datagram.
    Random,
    /// A heartbeat of this pair that is cut off, or longer than it should be.
    Length,
    /// A heartbeat of this pair with a few bits flipped.
    Flipped,
    /// What this pair sent before, as it was.
    Replayed,
    /// Another pair's heartbeat: the right form, a wrong key.
    OtherPair,
    /// A newer reign, a wrong key.
    Newer,
}

const KINDS: [Junk; 6] = [
    Junk::Random,
    Junk::Length,
    Junk::Flipped,
    Junk::Replayed,
    Junk::OtherPair,
    Junk::Newer,
];

/// The pair's heartbeats as they pass.
struct Overheard {
    capture: Capture,
    /// The two sides' sockets.
    ends: Option<[SocketAddrV4; 2]>,
    /// (sent by the first end, bytes), the latest.
    beats: Vec<(bool, Vec<u8>)>,
}

/// Beats that are kept for replay.
const KEPT: usize = 200;

impl Overheard {
    fn start() -> Result<Self> {
        Ok(Self {
            capture: Capture::start("lo").context("listen to the loopback")?,
            ends: None,
            beats: Vec::new(),
        })
    }

    /// Takes in what has passed since.
    fn listen(&mut self) -> Result<()> {
        let (ends, beats) = (&mut self.ends, &mut self.beats);
        self.capture.look(|frame| {
            let Some((from, to, payload)) = datagram(frame) else {
                return;
            };
            if payload.len() != SIZE || !payload.starts_with(b"DPHB") {
                return;
            }
            let ends = ends.get_or_insert([from, to]);
            if beats.len() < KEPT && ends.contains(&from) {
                beats.push((from == ends[0], payload.to_vec()));
            }
        })
    }

    fn until_both_were_heard(&mut self) -> Result<[SocketAddrV4; 2]> {
        let until = Instant::now() + LONGEST;
        loop {
            self.listen()?;
            let heard = |first| self.beats.iter().any(|(by_first, _)| *by_first == first);
            if let Some(ends) = self.ends
                && heard(true)
                && heard(false)
            {
                return Ok(ends);
            }
            ensure!(Instant::now() < until, "no heartbeats pass");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Sender, receiver and payload of a UDP datagram in an Ethernet frame.
fn datagram(frame: &[u8]) -> Option<(SocketAddrV4, SocketAddrV4, &[u8])> {
    let packet = frame.get(14..)?;
    let (header, _) = packet.split_at_checked(20)?;
    if header[0] != 0x45 || header[9] != 17 {
        return None;
    }
    let udp = packet.get(20..)?;
    let end = |at: usize, port: usize| {
        let address: [u8; 4] = header.get(at..at + 4)?.try_into().ok()?;
        let port = u16::from_be_bytes(udp.get(port..port + 2)?.try_into().ok()?);
        Some(SocketAddrV4::new(Ipv4Addr::from(address), port))
    };
    Some((end(12, 0)?, end(16, 2)?, udp.get(8..)?))
}

impl Junk {
    fn make(self, overheard: &Overheard, random: &mut Random) -> Vec<u8> {
        let mut beat = {
            let (_, beat) = &overheard.beats[random.below(overheard.beats.len() as u64) as usize];
            beat.clone()
        };
        match self {
            Self::Random => {
                let most = if random.below(50) == 0 { 65_000 } else { 200 };
                let length = random.below(most) as usize;
                beat.resize_with(length, || 0);
                beat.fill_with(|| random.next() as u8);
            }
            Self::Length => beat.resize(random.below(2 * SIZE as u64) as usize, 0),
            Self::Flipped => {
                for _ in 0..=random.below(4) {
                    beat[random.below(SIZE as u64) as usize] ^= 1 << random.below(8);
                }
            }
            Self::Replayed => {}
            Self::OtherPair | Self::Newer => {
                let newer = u64::from(self == Self::Newer);
                let mut sender = [0; 16];
                sender.copy_from_slice(&beat[32..48]);
                beat = Heartbeat {
                    machine: MachineId::of("machine"),
                    epoch: Epoch(1 + newer * 5),
                    configuration: Configuration(1 + newer * 5),
                    sender: Identity::from_bytes(sender),
                    sequence: u64::MAX / 2 + random.below(1000),
                    clock: Moment(random.next()),
                    progress: Progress::default(),
                }
                .encode(PairKey::from_bytes([random.next() as u8; 16]))
                .to_vec();
            }
        }
        beat
    }
}

pub(super) fn show(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let mut sent = 0;
    for _ in 0..run.form.pick(1, 5) {
        sent += alone(|| one(run, random))?;
    }
    figures.add("datagrams", sent);
    Ok(())
}

fn one(run: &Run, random: &mut Random) -> Result<u64> {
    let stage = Stage::enter()?;
    let config = stage.directory().join("patient.toml");
    fs::write(&config, SILENCE).context("write a configuration")?;
    let mut spec = stage.spec("kv", "")?;
    spec.more = vec!["--config".into(), config.display().to_string()];
    let mut overheard = Overheard::start()?;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let ends = overheard.until_both_were_heard()?;
    let forger = Forger::new()?;
    let stranger = UdpSocket::bind("127.0.0.1:0").context("bind a socket")?;
    let mut sent = 0;
    let length = run
        .form
        .pick(Duration::from_millis(400), Duration::from_secs(3));
    let requests = run.form.pick(2_000, 40_000);
    let seed = random.next();
    // Clients write and read all the while: what they are answered is judged, too.
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(move || kv_load::run(GUEST, 2, requests, seed));
        for junk in KINDS {
            for forged in [false, true] {
                let by = |to: usize, bytes: &[u8]| match forged {
                    true => forger.send(ends[1 - to], ends[to], bytes),
                    // The kernel may say that nobody listens: the sockets hear their peers alone.
                    false => {
                        let _ = stranger.send_to(bytes, ends[to]);
                        Ok(())
                    }
                };
                sent += shower(&mut overheard, junk, 2, length, random, by)?;
                healthy(&mut pair).with_context(|| format!("{junk:?}, forged {forged}"))?;
            }
        }
        for junk in [Junk::Random, Junk::Replayed] {
            let by = |to: usize, bytes: &[u8]| forger.send(ends[1 - to], ends[to], bytes);
            sent += shower(&mut overheard, junk, FLOOD, 2 * length, random, by)?;
            healthy(&mut pair).with_context(|| format!("a flood of {junk:?}"))?;
        }
        load.join()
            .expect("clients do not panic")
            .context("clients")?;
        Ok(())
    })?;
    run.say(format!("{sent} datagrams of junk, and nothing changed"));
    sent += no_life_by_replays(&mut pair, &overheard, &forger, ends, random)?;
    run.say("a frozen primary was not kept alive by replays of its heartbeats");
    Ok(sent)
}

/// So many datagrams a millisecond to each side, for a while. How many there were.
fn shower(
    overheard: &mut Overheard,
    junk: Junk,
    at_once: usize,
    length: Duration,
    random: &mut Random,
    by: impl Fn(usize, &[u8]) -> Result<()>,
) -> Result<u64> {
    let until = Instant::now() + length;
    let mut sent = 0;
    while Instant::now() < until {
        for _ in 0..at_once {
            for to in 0..2 {
                by(to, &junk.make(overheard, random))?;
                sent += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// Both sides run, neither suspects the other or does anything about it.
fn healthy(pair: &mut Pair) -> Result<()> {
    for side in [&mut pair.primary, &mut pair.backup] {
        if let Some(status) = side.ended() {
            anyhow::bail!("a side ended by {status}: {}", side.messages());
        }
        for event in side.events() {
            let harmless = !matches!(
                event,
                Event::Live { .. } | Event::Diverged { .. } | Event::Notice { .. }
            );
            ensure!(harmless, "a side says {event:?}");
        }
    }
    Ok(())
}

/// The primary stands still, and its heartbeats come again and again from its own address: they are no sign of life.
fn no_life_by_replays(
    pair: &mut Pair,
    overheard: &Overheard,
    forger: &Forger,
    ends: [SocketAddrV4; 2],
    random: &mut Random,
) -> Result<u64> {
    send(pair.primary.pid(), Signal::Stop)?;
    let until = Instant::now() + LONGEST;
    let mut sent = 0;
    loop {
        for _ in 0..4 {
            let at = random.below(overheard.beats.len() as u64) as usize;
            let (by_first, beat) = &overheard.beats[at];
            let from = usize::from(!by_first);
            forger.send(ends[from], ends[1 - from], beat)?;
            sent += 1;
        }
        let live = |event: &Event| matches!(event, Event::Live { .. });
        if pair
            .backup
            .wait_for(Duration::from_millis(1), live, drop)
            .is_some()
        {
            break;
        }
        ensure!(
            Instant::now() < until,
            "replayed heartbeats keep a frozen primary alive: {}",
            pair.backup.messages()
        );
    }
    pair.primary.kill();
    let status = pair.backup.stop(LONGEST);
    ensure!(status.success(), "the heir ended by {status}");
    Ok(sent)
}
