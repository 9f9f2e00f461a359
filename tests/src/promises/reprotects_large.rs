//! A large machine that writes its memory all the time gets a new backup (issue 6, point 4): it stands for milliseconds only, and
//! one that writes faster than its pages get across is slowed down until it does not.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::session::report::Event;
use serde_json::json;

use crate::harness::role::Role;
use crate::harness::signal::{Signal, send};
use crate::harness::torn_copy::{Ground, Place};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "reprotects-large",
    line: "a guest of 1 GiB that writes at half the link's pace, or as fast as it can, gets a new backup and stands under 10 ms for it",
    short: Duration::from_secs(40),
    full: Duration::from_secs(400),
    show,
};

/// What the guest may stand, median, in milliseconds.
const STOP_LIMIT_MS: f64 = 10.0;

/// A copy may take so many times what that of a guest takes which hardly writes: rounds of one that writes half as fast as they are
/// sent add up to twice, one that has to be slowed takes its time, and a host of two cores runs guest, sender and receiver.
const TIMES_LIMIT: f64 = 30.0;

/// For a copy of a guest that has to be slowed down, on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let memory = run.form.pick(256, 1024);
    let joins = run.form.pick(3, 9);
    let once = raw(memory)?;
    figures.add("memory_mib", memory);
    figures.add("memory_sent_once_over_a_bare_socket_ms", ms(once));
    run.say(format!(
        "{memory} MiB over a bare socket: {:.0} ms",
        ms(once)
    ));
    // What the link carries for a copy: that of a guest that hardly writes.
    let idle = joined(run, memory, Some(1), joins.min(3))?;
    idle.add_to(run, "idle", once, &mut figures);
    let took = median(idle.joins.iter().map(|join| join.took_ms).collect())?;
    let half = f64::from(memory) / (took / 1e3) / 2.0;
    figures.add("half_the_link_mib_per_second", half.round());
    for (name, rate) in [("half", Some(half as u32)), ("as_fast_as_it_can", None)] {
        let seen = joined(run, memory, rate, joins)?;
        seen.add_to(run, name, once, &mut figures);
        seen.judge(name, took)?;
    }
    Ok(figures)
}

fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().context("no values")
}

/// How long so many MiB take from one thread to another over a socket on this host, with nothing else done to them.
fn raw(mib: u32) -> Result<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
    let address = listener.local_addr()?;
    let piece = vec![0x5a_u8; 256 << 10];
    let count = mib * 4;
    let receiver = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut memory = vec![0; 256 << 10];
        for _ in 0..count {
            stream.read_exact(&mut memory)?;
        }
        stream.write_all(&[1])?;
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    let since = Instant::now();
    for _ in 0..count {
        stream.write_all(&piece)?;
    }
    stream.read_exact(&mut [0])?;
    let took = since.elapsed();
    receiver.join().expect("a receiver does not panic")?;
    Ok(took)
}

/// What one backup cost.
#[derive(Clone, Copy, Debug)]
struct Joined {
    stopped_ms: f64,
    took_ms: f64,
    bytes: u64,
    rounds: u32,
}

/// What some backups cost, one after the other.
#[derive(Debug)]
struct Seen {
    joins: Vec<Joined>,
    /// The longest time from one exit of the guest's to the next in each pass over its memory, in milliseconds: before a backup
    /// joined, and while they did.
    steps_before: Vec<f64>,
    steps: Vec<f64>,
}

impl Seen {
    fn of(&self, value: impl Fn(&Joined) -> f64) -> (f64, f64) {
        let values: Vec<f64> = self.joins.iter().map(value).collect();
        let worst = values.iter().copied().fold(0.0, f64::max);
        (median(values).unwrap_or(worst), worst)
    }

    fn add_to(&self, run: &Run, name: &str, once: Duration, figures: &mut Figures) {
        let (stop, worst_stop) = self.of(|join| join.stopped_ms);
        let (took, worst_took) = self.of(|join| join.took_ms);
        let (bytes, _) = self.of(|join| join.bytes as f64 / f64::from(1 << 20));
        let (rounds, _) = self.of(|join| f64::from(join.rounds));
        let longest = |steps: &[f64]| steps.iter().copied().fold(0.0, f64::max);
        let value = json!({
            "backups": self.joins.len(),
            "stop_ms_median": stop,
            "stop_ms_worst": worst_stop,
            "took_ms_median": took,
            "took_ms_worst": worst_took,
            "took_times_a_bare_transfer": (took / ms(once) * 100.0).round() / 100.0,
            "mib_sent_median": bytes.round(),
            "rounds_median": rounds,
            "longest_step_before_ms": longest(&self.steps_before),
            "longest_step_ms": longest(&self.steps),
        });
        run.say(format!("{name}: {value}"));
        figures.0.insert(name.to_owned(), value);
    }

    fn judge(&self, name: &str, idle_ms: f64) -> Result<()> {
        let (stop, _) = self.of(|join| join.stopped_ms);
        ensure!(
            stop < STOP_LIMIT_MS,
            "{name}: the guest stood {stop:.1} ms (median) for a backup"
        );
        let (took, _) = self.of(|join| join.took_ms);
        ensure!(
            took < TIMES_LIMIT * idle_ms,
            "{name}: a copy took {took:.0} ms (median), that of an idle guest {idle_ms:.0}"
        );
        Ok(())
    }
}

/// Backups that join a guest of this size, one after the other; it writes so many MiB a second.
fn joined(run: &Run, memory: u32, rate: Option<u32>, joins: usize) -> Result<Seen> {
    let place = Place::new(&Ground::tcp())?;
    let address = free_address()?;
    let words = format!("steps=1 rate={}", rate.unwrap_or(0));
    let mut primary = place.start_alone(
        "primary",
        address,
        &[
            "--guest",
            "memory",
            "--memory",
            &memory.to_string(),
            "--command-line",
            &words,
            "--console",
            "console",
        ],
    )?;
    primary.until("\"ready\"", PATIENCE)?;
    // A pass is over: all of its memory has been written.
    let begun = "longest step";
    let console = || {
        let bytes = std::fs::read(place.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let until = Instant::now() + PATIENCE;
    while !console().contains(begun) {
        ensure!(primary.runs()?, "it ended: {}", primary.said());
        ensure!(Instant::now() < until, "it never begins: {}", console());
        std::thread::sleep(Duration::from_millis(20));
    }
    let steps_before = steps(&console());
    let mut seen = Vec::new();
    for number in 0..joins {
        let (mut backup, _) = place.backup(&format!("backup-{number}"), &address.to_string())?;
        backup.until("\"paired\"", PATIENCE)?;
        let join = last_join(&primary)?;
        run.say(format!("rate {rate:?}, backup {}: {join:?}", number + 1));
        seen.push(join);
        // It leaves, and the primary looks for another.
        send(backup.pid(), Signal::Terminate)?;
        backup.end(PATIENCE)?;
    }
    let steps = steps(&console()).split_off(steps_before.len());
    primary.stop(PATIENCE)?;
    Ok(Seen {
        joins: seen,
        steps_before,
        steps,
    })
}

/// The longest step of each pass, in milliseconds.
fn steps(console: &str) -> Vec<f64> {
    let longest = |line: &str| {
        let (_, step) = line.split_once("longest step ")?;
        let micros: f64 = step.split(' ').next()?.parse().ok()?;
        Some(micros / 1e3)
    };
    console.lines().filter_map(longest).collect()
}

fn last_join(primary: &Role) -> Result<Joined> {
    let said = primary.said();
    said.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter_map(|event| match event {
            Event::Joined {
                stopped_us,
                took_us,
                bytes,
                rounds,
                ..
            } => Some(Joined {
                stopped_ms: stopped_us as f64 / 1e3,
                took_ms: took_us as f64 / 1e3,
                bytes,
                rounds,
            }),
            _ => None,
        })
        .next_back()
        .with_context(|| format!("no backup joined: {said}"))
}

/// An address at which nobody listens yet.
fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a port")?;
    listener.local_addr().context("find a port")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn steps_are_found_in_what_the_guest_says() {
        let console = "memory: 1000 KiB\nmemory: pass 1, longest step 1500 us\nmemory: pass 2, longest step 90 us\n";
        assert_eq!(steps(console), [1.5, 0.09]);
    }
}
