//! A Linux guest that computes without end (issue 7, point 4): it goes on answering while it is protected, its clock keeps pace with the
//! host's and never runs backwards, not even when its host is lost.
//!
//! Its clock is asked over the network (`TIME` of redis), each answer between two looks at this machine's. What is compared is the same
//! guest with a backup and, after its primary's host was killed, without one.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::intervals::Replication;
use serde_json::{Value, json};

use crate::lab_pair::{Choice, Guest, LabPair, PATIENCE, Site};
use crate::linux_guest::LinuxGuest;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "linux-busy",
    line: "a protected Linux guest that computes without end answers within 50 ms of what it does unprotected (medians); its clock keeps pace and never runs backwards, over the loss of its host too",
    short: Duration::from_secs(180),
    full: Duration::from_secs(4200),
    show,
};

const HOST_MIB: u32 = 1536;

/// How much longer an answer may take for the guest's being protected.
const LONGER: Duration = Duration::from_millis(50);

/// How far the guest's clock may be from the host's, as a share of the time that has passed.
const DRIFT: f64 = 0.001;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(20);

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let prepared = LinuxGuest::make(directory.path())?.prepare(directory.path())?;
    let site = Site::set_up("promise-linux-busy", HOST_MIB)?;
    for (name, file) in [("kernel", &prepared.kernel), ("initrd", &prepared.initrd)] {
        fs::copy(file, site.lab().shared().join(name))
            .with_context(|| format!("share {}", file.display()))?;
    }
    let choice = Choice {
        transport: Transport::Tcp,
        name: "promise-busy",
        guest: Guest::Linux {
            kernel: "kernel",
            initrd: "initrd",
            task: "busy",
            options: &["--preempt", "checkpoint"],
        },
        memory_mib: 256,
        replicate: Replication::Replay,
    };
    let mut pair = LabPair::start(&site, &choice)?;
    let mut asked = Asked::connect(site.address().into())?;
    run.say("paired, and the guest answers");
    // An hour, less what comes after the loss.
    let [with, without] = run
        .form
        .pick([30, 15], [3300, 300])
        .map(Duration::from_secs);
    let protected = asked.for_a_while(with)?;
    run.say(format!("protected: {}", protected.figures()));
    pair.ensure_paired()?;
    pair.primary_host().kill()?;
    pair.await_live()?;
    let alone = asked.for_a_while(without)?;
    run.say(format!("unprotected: {}", alone.figures()));
    pair.ensure_none_diverged()?;
    let mut figures = Figures::default();
    figures.add("protected", protected.figures());
    figures.add("unprotected", alone.figures());
    let (guest, host) = (asked.guest_passed(), asked.host_passed());
    let drift = (guest.as_secs_f64() / host.as_secs_f64() - 1.0).abs();
    figures.add("host_s", host.as_secs_f64());
    figures.add("drift_percent", (drift * 1e5).round() / 1e3);
    // What a question takes is not known better than by its answer's time.
    let unsure = asked.longest_unsure().as_secs_f64() / host.as_secs_f64();
    ensure!(
        drift <= DRIFT + unsure,
        "the guest's clock went {guest:?} while the host's went {host:?}"
    );
    ensure!(
        protected.median() <= alone.median() + LONGER,
        "an answer took {:?} with a backup and {:?} without",
        protected.median(),
        alone.median()
    );
    Ok(figures)
}

/// The guest's clock, as it is asked over one connection.
struct Asked {
    stream: BufReader<TcpStream>,
    first: Option<Answer>,
    last: Option<Answer>,
}

#[derive(Clone, Copy)]
struct Answer {
    sent: Instant,
    took: Duration,
    /// The guest's time of day.
    guest: Duration,
}

/// What came of a while's questions.
struct While(Vec<Duration>);

impl While {
    fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    fn figures(&self) -> Value {
        let ms = |span: Duration| (span.as_secs_f64() * 1e4).round() / 10.0;
        json!({
            "answers": self.0.len(),
            "p50_ms": ms(self.median()),
            "p99_ms": ms(self.0[self.0.len() * 99 / 100]),
            "max_ms": ms(self.0[self.0.len() - 1]),
        })
    }
}

impl Asked {
    fn connect(address: SocketAddr) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        loop {
            let stream = TcpStream::connect(address).context("connect to the guest")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut asked = Self {
                stream: BufReader::new(stream),
                first: None,
                last: None,
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
        self.stream.get_mut().write_all(b"TIME\r\n")?;
        let mut lines = [0; 5].map(|_| String::new());
        for line in &mut lines {
            ensure!(
                self.stream.read_line(line)? > 0,
                "the guest ended the connection"
            );
        }
        let took = sent.elapsed();
        let (Ok(seconds), Ok(micros)) = (lines[2].trim().parse(), lines[4].trim().parse()) else {
            bail!("this is no time: {lines:?}");
        };
        let answer = Answer {
            sent,
            took,
            guest: Duration::from_secs(seconds) + Duration::from_micros(micros),
        };
        if let Some(last) = self.last {
            ensure!(
                answer.guest >= last.guest,
                "the guest's clock ran backwards, from {:?} to {:?}",
                last.guest,
                answer.guest
            );
        }
        self.first.get_or_insert(answer);
        self.last = Some(answer);
        Ok(answer)
    }

    fn for_a_while(&mut self, length: Duration) -> Result<While> {
        let started = Instant::now();
        let mut spans = Vec::new();
        while started.elapsed() < length {
            spans.push(self.ask()?.took);
            std::thread::sleep(PAUSE);
        }
        spans.sort();
        ensure!(!spans.is_empty(), "nothing was asked");
        Ok(While(spans))
    }

    fn ends(&self) -> [Answer; 2] {
        [self.first, self.last].map(|answer| answer.expect("something was asked"))
    }

    fn guest_passed(&self) -> Duration {
        let [first, last] = self.ends();
        last.guest - first.guest
    }

    fn host_passed(&self) -> Duration {
        let [first, last] = self.ends();
        last.sent - first.sent
    }

    fn longest_unsure(&self) -> Duration {
        let [first, last] = self.ends();
        first.took.max(last.took)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
