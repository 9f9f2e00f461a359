//! A Linux guest that computes without end (issue 7, point 4): it goes on answering pings while it is protected, its clock keeps pace with the
//! host's and never runs backwards, not even when its host is lost. As it comes, by checkpoints; prepared, by replay, it is `linux-busy-replay`'s.
//!
//! Its clock is asked over the network (`TIME` of redis, several readings in a row each time), each answer between two looks at this
//! machine's. What is compared is the same guest with a backup and, after its primary's host was killed, without one. A ping takes the guest's kernel alone; what a program
//! takes that has to come to its turn beside the one that computes is told as well, and judged by nobody: it hangs on how the guest shares its time.
//!
//! A guest that is recorded with preemption was seen to end in a triple fault in the lab that its replay does not have (docs/linux.md). Such a life
//! shows nothing of what is promised here, for or against it: it is counted, said, and another one is begun, a few times.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::control::status::Status;
use hypervisor::intervals::Replication;
use serde_json::{Value, json};

use crate::lab::Spec;
use crate::lab::ping::Pinger;
use crate::lab_pair::{Choice, Guest, LabPair, PATIENCE, Site};
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-busy",
    line: "a Linux guest that computes without end, protected by checkpoints, answers pings within 50 ms of what it does unprotected (medians); its clock keeps pace and never runs backwards, over the loss of its host too (full: for an hour)",
    short: Duration::from_secs(180),
    full: Duration::from_secs(4500),
    show: |run| by(&AS_IT_COMES, run),
};

/// How such a guest is protected.
pub(super) struct Way {
    /// In figures and names.
    pub name: &'static str,
    pub replicate: Replication,
    /// It is prepared for replay.
    pub prepared: bool,
    /// Options of the primary.
    pub options: &'static [&'static str],
    /// Of both sides.
    pub of_sides: &'static [&'static str],
}

const AS_IT_COMES: Way = Way {
    name: "checkpoint",
    replicate: Replication::Checkpoint,
    prepared: false,
    options: &[],
    of_sides: &["--interval-ms", "100"],
};

const HOST_MIB: u32 = 1536;

/// Large packets, as between hosts that copy memory to each other: a commit of 1 MB took 53 ms with them, and 60 with packets of 1,500 bytes.
const MTU: u16 = 9000;

/// How much longer a ping may take for the guest's being protected.
const LONGER: Duration = Duration::from_millis(50);

/// How far the guest's clock may be from the host's, as a share of the time that has passed.
const DRIFT: f64 = 0.001;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(20);

/// Readings of the clock in one question: the guest takes them one right after the other.
const READINGS: usize = 16;

/// Answers at an end of a run of which the quickest counts.
const QUICKEST_OF: usize = 20;

/// Lives of a guest at the most, of which one must come to its end. Two of five crashed where it was counted: three in a row do in
/// one of sixteen, and a fault of ours that ends every guest does always.
const LIVES: u32 = 3;

/// What a side says of a guest that crashed.
const CRASHED: &str = "the guest crashed";

/// Shows it for one of the ways.
pub(super) fn by(way: &Way, run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let guest = LinuxGuest::make(directory.path())?;
    let [kernel, initrd] = if way.prepared {
        let prepared = guest.prepare(directory.path())?;
        [prepared.kernel, prepared.initrd]
    } else {
        [guest.kernel, guest.initrd]
    };
    let site = Site::of(&Spec {
        name: format!("promise-busy-{}", way.name),
        memory_mib: HOST_MIB,
        mtu: MTU,
        ..Spec::default()
    })?;
    for (name, file) in [("kernel", &kernel), ("kernel.cpio", &initrd)] {
        fs::copy(file, site.lab().shared().join(name))
            .with_context(|| format!("share {}", file.display()))?;
    }
    // An hour, less what comes after the loss.
    let lengths = run
        .form
        .pick([45, 20], [3300, 300])
        .map(Duration::from_secs);
    let mut crashes = Vec::new();
    let held = loop {
        let choice = Choice {
            transport: Transport::Tcp,
            name: &format!("promise-busy-{}-{}", way.name, crashes.len()),
            guest: Guest::Linux {
                kernel: "kernel",
                initrd: "kernel.cpio",
                task: "busy",
                options: way.options,
                of_sides: way.of_sides,
            },
            memory_mib: 256,
            replicate: way.replicate,
        };
        match live(run, &site, &choice, lengths)? {
            Life::Whole(value) => break value,
            Life::Crashed(when) => {
                run.say(&when);
                crashes.push(when);
            }
        }
        ensure!(
            crashes.len() < LIVES as usize,
            "{LIVES} guests of {LIVES} crashed: {crashes:?}"
        );
    };
    let mut figures = Figures::default();
    figures.add(way.name, held);
    figures.add(
        "lives",
        json!({"crashed": crashes.len(), "of": crashes.len() + 1, "when": crashes}),
    );
    Ok(figures)
}

/// What a guest's life came to.
enum Life {
    Whole(Value),
    /// It crashed, after this.
    Crashed(String),
}

fn live(run: &Run, site: &Site, choice: &Choice<'_>, lengths: [Duration; 2]) -> Result<Life> {
    let mut pair = LabPair::start(site, choice)?;
    let started = Instant::now();
    let mut killed = false;
    let watched = watch(run, site, &mut pair, lengths, &mut killed);
    let life = match watched {
        Ok(value) => Life::Whole(value),
        Err(error) => {
            let serving = if killed {
                &mut pair.backup
            } else {
                &mut pair.primary
            };
            // It ends by itself, where the guest did.
            if serving.await_end(CRASH_TOLD, drop).is_err() || !serving.messages().contains(CRASHED)
            {
                return Err(error);
            }
            let after = started.elapsed().as_secs();
            Life::Crashed(format!("the guest crashed after {after} s: {error:#}"))
        }
    };
    pair.ensure_none_diverged()?;
    // The next pair finds both hosts up, and none of this one in them.
    if killed {
        if matches!(life, Life::Whole(_)) {
            pair.end_survivor()?;
        }
        site.start(pair.primary.host())?;
    } else {
        // Its guest is gone for both of them.
        pair.backup.await_end(PATIENCE, drop)?;
    }
    Ok(life)
}

/// Until a side whose guest crashed has said so, and ended.
const CRASH_TOLD: Duration = Duration::from_secs(10);

fn watch(
    run: &Run,
    site: &Site,
    pair: &mut LabPair<'_>,
    [with, without]: [Duration; 2],
    killed: &mut bool,
) -> Result<Value> {
    let mut asked = Asked::connect(site)?;
    run.say("paired, and the guest answers");
    let protected = asked.for_a_while(with)?;
    run.say(format!("protected: {}", protected.figures()));
    pair.ensure_paired()?;
    let made_of = made_of(&pair.primary_status()?);
    run.say(format!("which is made of: {made_of}"));
    pair.primary_host().kill()?;
    *killed = true;
    pair.await_live()?;
    let alone = asked.for_a_while(without)?;
    run.say(format!("unprotected: {}", alone.figures()));
    let (guest, host) = (asked.guest_passed(), asked.host_passed());
    let drift = (guest.as_secs_f64() / host.as_secs_f64() - 1.0).abs();
    // What a question takes is not known better than by its answer's time.
    let unsure = asked.unsure().as_secs_f64() / host.as_secs_f64();
    ensure!(
        drift <= DRIFT + unsure,
        "the guest's clock went {guest:?} while the host's went {host:?}"
    );
    ensure!(
        protected.pings.median() <= alone.pings.median() + LONGER,
        "a ping took {:?} with a backup and {:?} without",
        protected.pings.median(),
        alone.pings.median()
    );
    Ok(json!({
        "protected": protected.figures(),
        "made_of": made_of,
        "unprotected": alone.figures(),
        "host_s": host.as_secs_f64().round(),
        "drift_percent": (drift * 1e5).round() / 1e3,
        "unsure_percent": (unsure * 1e5).round() / 1e3,
        "readings_in_order": asked.readings,
    }))
}

/// What protection adds to an answer, as the primary has it.
fn made_of(status: &Status) -> Value {
    let Status {
        commit,
        stop,
        stopped_for: [pages, bytes],
        ..
    } = status;
    json!({
        "commits": commit.count,
        "commit_p50_us": commit.p50_us,
        "commit_p99_us": commit.p99_us,
        "stops": stop.count,
        "stop_p50_us": stop.p50_us,
        "stop_p99_us": stop.p99_us,
        "pages_a_stop": pages / stop.count.max(1),
        "bytes_a_stop": bytes / stop.count.max(1),
    })
}

/// The guest, as it is pinged and asked for its clock over one connection.
struct Asked {
    pinger: Pinger,
    stream: BufReader<TcpStream>,
    answers: Vec<Answer>,
    /// Readings of the clock so far, none before the one before it.
    readings: u64,
}

#[derive(Clone, Copy)]
struct Answer {
    sent: Instant,
    took: Duration,
    /// The guest's time of day.
    guest: Duration,
}

/// What came of a while's questions.
struct While {
    pings: Spans,
    /// Each of [`READINGS`].
    answers: Spans,
}

impl While {
    fn figures(&self) -> Value {
        json!({"pings": self.pings.figures(), "clock": self.answers.figures()})
    }
}

/// At least one, in order.
struct Spans(Vec<Duration>);

impl Spans {
    fn of(mut spans: Vec<Duration>) -> Result<Self> {
        ensure!(!spans.is_empty(), "nothing was asked");
        spans.sort();
        Ok(Self(spans))
    }

    fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    fn figures(&self) -> Value {
        let ms = |span: Duration| (span.as_secs_f64() * 1e4).round() / 10.0;
        json!({
            "count": self.0.len(),
            "p50_ms": ms(self.median()),
            "p99_ms": ms(self.0[self.0.len() * 99 / 100]),
            "max_ms": ms(self.0[self.0.len() - 1]),
        })
    }
}

impl Asked {
    fn connect(site: &Site) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        loop {
            let stream = TcpStream::connect(site.address()).context("connect to the guest")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut asked = Self {
                pinger: site.pinger()?,
                stream: BufReader::new(stream),
                answers: Vec::new(),
                readings: 0,
            };
            // The way to the guest takes connections before the guest does.
            match asked.ask() {
                Ok(_) => return Ok(asked),
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    fn ask(&mut self) -> Result<Answer> {
        let sent = Instant::now();
        let words = b"TIME\r\n".repeat(READINGS);
        self.stream.get_mut().write_all(&words)?;
        let mut before = self
            .answers
            .last()
            .map_or(Duration::ZERO, |last| last.guest);
        for _ in 0..READINGS {
            let guest = self.reading()?;
            ensure!(
                guest >= before,
                "the guest's clock ran backwards, from {before:?} to {guest:?}"
            );
            before = guest;
        }
        self.readings += READINGS as u64;
        let answer = Answer {
            sent,
            took: sent.elapsed(),
            guest: before,
        };
        self.answers.push(answer);
        Ok(answer)
    }

    /// The next answer's time.
    fn reading(&mut self) -> Result<Duration> {
        let mut lines = [0; 5].map(|_| String::new());
        for line in &mut lines {
            ensure!(
                self.stream.read_line(line)? > 0,
                "the guest ended the connection"
            );
        }
        let (Ok(seconds), Ok(micros)) = (lines[2].trim().parse(), lines[4].trim().parse()) else {
            bail!("this is no time: {lines:?}");
        };
        Ok(Duration::from_secs(seconds) + Duration::from_micros(micros))
    }

    fn for_a_while(&mut self, length: Duration) -> Result<While> {
        let started = Instant::now();
        let (mut pings, mut answers) = (Vec::new(), Vec::new());
        while started.elapsed() < length {
            pings.push(self.pinger.ping(PATIENCE)?);
            std::thread::sleep(PAUSE);
            answers.push(self.ask()?.took);
            std::thread::sleep(PAUSE);
        }
        Ok(While {
            pings: Spans::of(pings)?,
            answers: Spans::of(answers)?,
        })
    }

    /// The quickest of the first and of the last answers: the first of all was asked for before the guest served, and one after the loss waits for the heir.
    fn ends(&self) -> [Answer; 2] {
        let count = self.answers.len().min(QUICKEST_OF);
        let quickest = |answers: &[Answer]| {
            let quickest = answers.iter().min_by_key(|answer| answer.took);
            *quickest.expect("something was asked")
        };
        let (first, last) = (
            &self.answers[..count],
            &self.answers[self.answers.len() - count..],
        );
        [quickest(first), quickest(last)]
    }

    fn guest_passed(&self) -> Duration {
        let [first, last] = self.ends();
        last.guest - first.guest
    }

    /// Between the middles of both: the guest's time is of some moment in between.
    fn host_passed(&self) -> Duration {
        let [first, last] = self.ends().map(|answer| answer.sent + answer.took / 2);
        last - first
    }

    /// How far the moments of both may be from the middles, together.
    fn unsure(&self) -> Duration {
        let [first, last] = self.ends().map(|answer| answer.took / 2);
        first + last
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
