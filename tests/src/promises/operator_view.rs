//! What an operator is shown is what is (issue 6): `doppel status`, `doppel top` and the metrics agree with what the clients and the
//! arbiter saw and with each other, through a failover and a new backup; the hook runs once for each change of role; the guest's
//! link is told where the guest is; and being watched costs the guest nothing.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::control::status::{Role, Standing, Status};
use hypervisor::demo::pair::{Pair, PairSpec, Side};
use hypervisor::session::report::Event;
use serde_json::Value;

use crate::harness::hostile_capture::Capture;
use crate::harness::program::doppel;
use crate::harness::stage::{GUEST, INTERFACE, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "operator-view",
    line: "status, top, metrics and hook tell what is, through a failover and a new backup, and being watched costs a request nothing",
    short: Duration::from_secs(30),
    full: Duration::from_secs(180),
    show,
};

/// A bound on what must happen on a loaded host.
const PATIENCE: Duration = Duration::from_secs(20);

/// Most that a commit may take longer, half of the time, while metrics are scraped and status is asked ten times as often as anybody does.
/// The thread that answers shares no lock and no cache line with the commit path beyond the counters that it reads; what is left is
/// the noise of a busy machine of two cores, on which two runs of the same thing differ by a third.
const RATIO: f64 = 1.5;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    alone(|| view(run, &mut figures)).context("what is shown")?;
    alone(|| cost(run, &mut figures)).context("what being watched costs")?;
    Ok(figures)
}

/// One pair, as an operator sees it.
struct Watched<'a> {
    stage: &'a Stage,
    spec: PairSpec,
    pair: Pair,
    /// Commit latencies that the sides have told as events: bucket and count.
    told: BTreeMap<u64, u64>,
}

/// A quantile of buckets.
fn quantile(buckets: &BTreeMap<u64, u64>, share: f64) -> Option<u64> {
    let count: u64 = buckets.values().sum();
    let rank = ((count as f64 * share).ceil() as u64).max(1);
    let mut below = 0;
    buckets.iter().find_map(|(bucket, here)| {
        below += here;
        (below >= rank).then_some(*bucket)
    })
}

fn add(told: &mut BTreeMap<u64, u64>, side: &Side) {
    for event in side.events() {
        if let Event::Commits { buckets } = event {
            for (bucket, count) in buckets {
                *told.entry(bucket).or_default() += count;
            }
        }
    }
}

impl<'a> Watched<'a> {
    fn start(stage: &'a Stage, hook: &str) -> Result<Self> {
        let mut spec = stage.spec("kv", "")?;
        spec.more = vec!["--metrics".into(), "0".into(), "--hook".into(), hook.into()];
        let pair = Pair::start(&spec, Some(stage.port()))?;
        Ok(Self {
            stage,
            spec,
            pair,
            told: BTreeMap::new(),
        })
    }

    fn doppel(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(doppel()?)
            .args(arguments)
            .arg("--run-dir")
            .arg(self.spec.run_directory())
            .current_dir(self.stage.directory())
            .output()
            .context("start doppel")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{arguments:?}: {}: {said}",
            output.status
        );
        String::from_utf8(output.stdout).context("what doppel printed")
    }

    /// Each role as `doppel status --json` tells it, and what the arbiter says to that command.
    fn status(&self) -> Result<Vec<(Status, Value)>> {
        let text = self.doppel(&["status", "machine", "--json"])?;
        let all: Vec<Value> = serde_json::from_str(&text).context("read status --json")?;
        all.into_iter()
            .map(|one| {
                let arbiter = one["arbiter"]["now"].clone();
                let status =
                    serde_json::from_value(one.clone()).with_context(|| one.to_string())?;
                Ok((status, arbiter))
            })
            .collect()
    }

    /// The status of one side.
    fn of(&self, side: &Side) -> Result<Status> {
        let all = self.status()?;
        let found = all.into_iter().find(|(status, _)| status.pid == side.pid());
        Ok(found.context("status does not know a side")?.0)
    }

    /// Waits until a side stands so.
    fn until(&self, side: &Side, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let until = Instant::now() + PATIENCE;
        loop {
            let status = self.of(side)?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "it stands so: {status:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What people are shown.
    fn pages(&self) -> Result<[String; 2]> {
        Ok([
            self.doppel(&["status", "machine"])?,
            self.doppel(&["top", "machine", "--once"])?,
        ])
    }
}

/// A scrape: every series and its value.
fn scrape(address: &str) -> Result<BTreeMap<String, f64>> {
    let address: SocketAddr = address.parse().context("the metrics' address")?;
    let mut stream = TcpStream::connect(address).context("connect to the metrics")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("read the metrics")?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((
                series.to_owned(),
                value.parse().with_context(|| line.to_owned())?,
            ))
        })
        .collect()
}

fn metric(metrics: &BTreeMap<String, f64>, name: &str) -> Result<f64> {
    let series = format!("doppel_{name}{{name=\"machine\"}}");
    metrics.get(&series).copied().context(series)
}

/// So many requests one after the other, over one connection; how long each took.
fn requests(count: usize) -> Result<Vec<Duration>> {
    requests_while(|number| number < count)
}

/// The same, for as long as it is said.
fn requests_while(goes_on: impl Fn(usize) -> bool) -> Result<Vec<Duration>> {
    let until = Instant::now() + PATIENCE;
    let stream = loop {
        match TcpStream::connect_timeout(&GUEST.into(), Duration::from_secs(1)) {
            Ok(stream) => break stream,
            // It boots.
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(error).context("connect to the guest"),
        }
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    (0..)
        .take_while(|&number| goes_on(number))
        .map(|number| {
            let started = Instant::now();
            let value = format!("{number:08}");
            (&stream)
                .write_all(format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$8\r\n{value}\r\n").as_bytes())?;
            let mut line = String::new();
            answers.read_line(&mut line)?;
            ensure!(line == "+OK\r\n", "request {number}: {line:?}");
            Ok(started.elapsed())
        })
        .collect()
}

fn median(mut spans: Vec<Duration>) -> Duration {
    spans.sort_unstable();
    spans[spans.len() / 2]
}

fn micros(span: Duration) -> f64 {
    span.as_nanos() as f64 / 1000.0
}

fn view(run: &Run, figures: &mut Figures) -> Result<()> {
    let stage = Stage::enter()?;
    let told = stage.directory().join("told");
    let hook = format!(
        "echo $DOPPEL_PID $DOPPEL_EVENT $DOPPEL_ROLE $DOPPEL_EPOCH $DOPPEL_PROTECTED >> {}",
        told.display()
    );
    let mut watched = Watched::start(&stage, &hook)?;
    let (first, second) = (watched.pair.primary.pid(), watched.pair.backup.pid());
    let count = run.form.pick(500, 10_000);
    let took = requests(count)?;
    agree(&mut watched, count, median(took)).context("a protected pair")?;
    nuisances(&watched).context("clients that mean harm")?;

    let mut capture = Capture::start(INTERFACE)?;
    watched.pair.primary.kill();
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let killed = Instant::now();
    watched
        .pair
        .backup
        .wait_for(PATIENCE, live, drop)
        .with_context(|| format!("no go-live: {}", watched.pair.backup.messages()))?;
    let seen = unprotected(&watched).context("after the kill")?;
    run.say(format!(
        "UNPROTECTED is shown {seen:?} after the go-live was told"
    ));
    requests(count.min(500)).context("requests after the kill")?;
    let announced = announcements(&mut capture, killed)?;
    figures.add("shown_unprotected_ms", seen.as_millis() as u64);
    figures.add("announcements", announced as u64);

    let spec = watched.spec.clone();
    watched
        .pair
        .replace_primary(&spec, Some(stage.port()), drop)?;
    let third = watched.pair.backup.pid();
    let again = watched.until(&watched.pair.primary, |status| status.protected)?;
    ensure!(
        (again.epoch, again.role, again.standing) == (2, Role::Primary, Standing::Protected),
        "{again:?}"
    );
    let follows = watched.until(&watched.pair.backup, |status| status.protected)?;
    ensure!(
        (follows.epoch, follows.standing) == (2, Standing::Following),
        "{follows:?}"
    );
    let peer = again.peer.context("a protected machine has a peer")?;
    ensure!(peer.address.is_some(), "{peer:?}");
    for page in watched.pages()? {
        ensure!(
            page.contains(" PROTECTED") && !page.contains("UNPROTECTED "),
            "protected again, and shown otherwise:\n{page}"
        );
    }
    hooks(&told, [first, second, third])?;
    figures.add("requests", count as u64);
    for side in [&mut watched.pair.primary, &mut watched.pair.backup] {
        let status = side.stop(PATIENCE);
        ensure!(
            status.code() == Some(0),
            "ended by {status}: {}",
            side.messages()
        );
    }
    let left = fs::read_dir(spec.run_directory())?.count();
    // The killed one's is taken away by whoever looks next; those that ended took theirs along.
    ensure!(left == 0, "{left} control sockets were left behind");
    Ok(())
}

/// Everything that is shown of a protected pair is what it is.
fn agree(watched: &mut Watched<'_>, count: usize, took: Duration) -> Result<()> {
    let all = watched.status()?;
    ensure!(all.len() == 2, "{} roles", all.len());
    for (status, arbiter) in &all {
        let expected = if status.pid == watched.pair.primary.pid() {
            (Role::Primary, Standing::Protected)
        } else {
            (Role::Backup, Standing::Following)
        };
        ensure!((status.role, status.standing) == expected, "{status:?}");
        ensure!(status.protected && status.epoch == 1, "{status:?}");
        ensure!(status.transport.as_deref() == Some("shm"), "{status:?}");
        let record = arbiter["record"].as_str().context("the arbiter's record")?;
        ensure!(
            arbiter["answers"] == true && record.contains("epoch 1"),
            "{arbiter}"
        );
    }
    // The guest is quiet now: what is counted in three places comes to the same.
    let until = Instant::now() + PATIENCE;
    let (status, metrics) = loop {
        let status = watched.of(&watched.pair.primary)?;
        let metrics = scrape(status.metrics.as_deref().context("no metrics")?)?;
        add(&mut watched.told, &watched.pair.primary);
        let events: u64 = watched.told.values().sum();
        let served = metric(&metrics, "commit_latency_seconds_count")?;
        if status.commit.count == events && served == events as f64 {
            break (status, metrics);
        }
        if Instant::now() >= until {
            bail!(
                "commits: status says {}, metrics {served}, events {events}",
                status.commit.count
            );
        }
        std::thread::sleep(Duration::from_millis(30));
    };
    for (share, shown) in [(0.5, status.commit.p50_us), (0.99, status.commit.p99_us)] {
        let told = quantile(&watched.told, share).context("no commits")? as f64 / 1000.0;
        // A thirty-second part is what status knows, 16 ns are what events know.
        ensure!(
            (shown - told).abs() <= told / 16.0 + 0.032,
            "the {share} quantile: status says {shown} µs, events {told} µs"
        );
    }
    ensure!(
        micros(took) > status.commit.p50_us,
        "a request took {took:?}, its commit {} µs",
        status.commit.p50_us
    );
    ensure!(
        status.totals.outputs >= count as f64 && status.totals.frames >= count as f64,
        "{count} requests one after the other, and {:?}",
        status.totals
    );
    ensure!(
        metric(&metrics, "outputs_total")? >= count as f64
            && metric(&metrics, "log_entries_total")? >= count as f64
            && metric(&metrics, "protected")? == 1.0
            && metric(&metrics, "epoch")? == 1.0,
        "{metrics:?}"
    );
    let lag = status.lag_us.context("a protected primary knows its lag")?;
    ensure!(lag < 100_000.0, "the backup is {lag} µs behind");
    for page in watched.pages()? {
        ensure!(
            page.contains("PROTECTED") && !page.contains("UNPROTECTED"),
            "{page}"
        );
        for word in ["primary", "backup", "following", "epoch 1"] {
            ensure!(page.contains(word), "{word} is not in\n{page}");
        }
    }
    Ok(())
}

/// Clients that are silent, deaf, talk without end or talk rubbish cost nobody an answer.
fn nuisances(watched: &Watched<'_>) -> Result<()> {
    let status = watched.of(&watched.pair.primary)?;
    let path = watched
        .spec
        .run_directory()
        .join(format!("machine.{}.sock", status.pid));
    let metrics: SocketAddr = status.metrics.context("no metrics")?.parse()?;
    let mut held = Vec::new();
    for number in 0..40 {
        let mut stream = UnixStream::connect(&path).context("connect to the control socket")?;
        let _ = match number % 4 {
            0 => Ok(()),
            1 => stream.write_all(b"{\"doppel\":1,"),
            2 => stream.write_all(&vec![b'x'; 100_000]),
            _ => stream.write_all(b"\0\xff\n\n\n{\"doppel\":9}\n"),
        };
        held.push(stream);
    }
    let mut scrapers = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(metrics).context("connect to the metrics")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n")?;
        scrapers.push(stream);
    }
    let asked = Instant::now();
    let again = watched.of(&watched.pair.primary)?;
    ensure!(again.protected, "{again:?}");
    scrape(&metrics.to_string())?;
    ensure!(
        asked.elapsed() < PATIENCE,
        "an answer took {:?}",
        asked.elapsed()
    );
    requests(100).context("requests beside them")?;
    Ok(())
}

/// Waits until status shows the survivor, and sees that top and the metrics show the same; how long after the call that was.
fn unprotected(watched: &Watched<'_>) -> Result<Duration> {
    let since = Instant::now();
    let survivor = &watched.pair.backup;
    let status = watched.until(survivor, |status| status.role == Role::Primary)?;
    let shown = since.elapsed();
    ensure!(
        status.epoch == 2 && !status.protected && status.standing.is_unprotected(),
        "{status:?}"
    );
    ensure!(
        status.changes.get("live") == Some(&1),
        "{:?}",
        status.changes
    );
    ensure!(
        status
            .events
            .iter()
            .any(|event| event.loud && event.text.contains("UNPROTECTED") && event.epoch >= 1),
        "{:?}",
        status.events
    );
    ensure!(
        watched.status()?.len() == 1,
        "the dead primary is still shown"
    );
    let metrics = scrape(status.metrics.as_deref().context("no metrics")?)?;
    ensure!(
        metric(&metrics, "protected")? == 0.0 && metric(&metrics, "epoch")? == 2.0,
        "{metrics:?}"
    );
    for page in watched.pages()? {
        ensure!(
            page.contains("UNPROTECTED") && page.contains("epoch 2"),
            "{page}"
        );
    }
    Ok(shown)
}

/// Reverse ARP requests of the guest that came out of the survivor.
fn announcements(capture: &mut Capture, killed: Instant) -> Result<usize> {
    const GUEST_MAC: [u8; 6] = [0x02, 0xd0, 0x99, 0xe1, 0, 1];
    let mut seen = 0;
    while seen < 5 {
        capture.look(|frame| {
            let is = frame.len() >= 42
                && frame[..6] == [0xff; 6]
                && frame[6..12] == GUEST_MAC
                && frame[12..14] == [0x80, 0x35]
                && frame[22..28] == GUEST_MAC;
            seen += usize::from(is);
        })?;
        ensure!(
            killed.elapsed() < PATIENCE,
            "the link was told {seen} times where the guest is"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(seen)
}

/// The hook ran once for each change of each role, and for no other.
fn hooks(told: &std::path::Path, [first, second, third]: [u32; 3]) -> Result<()> {
    let mut expected = vec![
        format!("{first} protected primary 1 yes"),
        format!("{second} waiting backup 0 no"),
        format!("{second} following backup 1 yes"),
        format!("{second} live primary 2 no"),
        format!("{second} protected primary 2 yes"),
        format!("{third} waiting backup 0 no"),
        format!("{third} following backup 2 yes"),
    ];
    expected.sort();
    let until = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(told).unwrap_or_default();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        if lines == expected {
            return Ok(());
        }
        ensure!(
            Instant::now() < until && lines.len() <= expected.len(),
            "the hook was run for {lines:#?} instead of {expected:#?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same load with and without somebody who watches all the time, in turn.
fn cost(run: &Run, figures: &mut Figures) -> Result<()> {
    let stage = Stage::enter()?;
    let (rounds, seconds) = run.form.pick((3, 2), (7, 8));
    let (mut commits, mut replies) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Who is first takes turns, too: a machine warms up.
        let mut found = [(0.0, 0.0); 2];
        for step in 0..2 {
            let watch = (step + round) % 2 == 1;
            let directory = stage.directory().join(format!("{round}-{watch}"));
            fs::create_dir(&directory).context("make a directory")?;
            found[usize::from(watch)] = measured(&stage, &directory, watch, seconds)?;
        }
        let [(bare, bare_reply), (seen, seen_reply)] = found;
        run.say(format!(
            "commit p50 {bare:.2} µs, watched {seen:.2} µs; reply p50 {bare_reply:.0} µs, watched {seen_reply:.0} µs"
        ));
        commits.push(seen / bare);
        replies.push(seen_reply / bare_reply);
    }
    let middle = |mut ratios: Vec<f64>| {
        ratios.sort_by(f64::total_cmp);
        (ratios[ratios.len() / 2] * 1000.0).round() / 1000.0
    };
    let (commit, reply) = (middle(commits), middle(replies));
    figures.add("commit_p50_watched_ratio", commit);
    figures.add("reply_p50_watched_ratio", reply);
    ensure!(
        commit <= RATIO,
        "a commit takes {commit} times as long while somebody watches"
    );
    Ok(())
}

/// Commit and reply, half of the time, in microseconds.
fn measured(
    stage: &Stage,
    directory: &std::path::Path,
    watch: bool,
    seconds: u64,
) -> Result<(f64, f64)> {
    let mut spec = stage.spec("kv", "")?;
    spec.directory = directory.to_owned();
    // Comparing memories is no part of protecting.
    spec.memory_check_ms = 0;
    if watch {
        spec.more = vec!["--metrics".into(), "0".into()];
    }
    let pair = Pair::start(&spec, Some(stage.port()))?;
    requests(200).context("warm up")?;
    drop(pair.primary.events());
    let over = AtomicBool::new(false);
    let took = std::thread::scope(|scope| {
        let watcher = watch.then(|| scope.spawn(|| keep_watching(&spec, &over)));
        let until = Instant::now() + Duration::from_secs(seconds);
        let took = requests_while(|_| Instant::now() < until);
        over.store(true, Ordering::Relaxed);
        let looks = watcher.map(|watcher| watcher.join().expect("a watcher does not panic"));
        if let Some(looks) = looks.transpose()? {
            ensure!(looks > 3, "it was watched {looks} times only");
        }
        took
    })?;
    // The last of them are on their way for as long as the I/O thread gathers them.
    std::thread::sleep(Duration::from_millis(150));
    let mut told = BTreeMap::new();
    add(&mut told, &pair.primary);
    let commit = quantile(&told, 0.5).context("no commits were told")? as f64 / 1000.0;
    Ok((commit, micros(median(took))))
}

/// Scrapes and asks both sides ten times a second; how often.
fn keep_watching(spec: &PairSpec, over: &AtomicBool) -> Result<usize> {
    let mut looks = 0;
    while !over.load(Ordering::Relaxed) {
        for found in hypervisor::control::find::roles(&spec.run_directory(), None)? {
            let status = match found.outcome {
                Ok(status) => status,
                Err(why) => bail!("a role does not answer: {why}"),
            };
            scrape(status.metrics.as_deref().context("no metrics")?)?;
        }
        looks += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(looks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn quantiles_of_what_was_told() {
        let told = BTreeMap::from([(1000, 98), (5000, 1), (9000, 1)]);
        assert_eq!(quantile(&told, 0.5), Some(1000));
        assert_eq!(quantile(&told, 0.99), Some(5000));
        assert_eq!(quantile(&told, 1.0), Some(9000));
        assert_eq!(quantile(&BTreeMap::new(), 0.5), None);
    }
}
