//! Redis' own programs and a client library of another language work unmodified against the guest, through a failover.
//!
//! ```text
//!            compare  work        work, and a kill in its midst        work  compare
//!  reference ───┤                                                              ├───
//!  guest     ───┤ primary ─────────────────────── ✂ ── survivor ───────────────┤
//!
//!  work: redis-benchmark, redis-cli and a Python program at once
//! ```
//! Nobody connects again (the guest counts connections), nobody gets an error, and all that they wrote is there: the guest's
//! counters and keys are compared with what each of them did.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::demo::pair::{Pair, Side};
use hypervisor::session::report::{Event, Timeline};

use crate::harness::random::Random;
use crate::harness::redis::{
    BENCHMARK_KEYS, Benchmark, Cli, Load, Measured, Python, PythonReport, Reference,
};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};
use crate::redis_compat;

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "redis-clients",
    line: "redis-cli, redis-benchmark and Python's redis work unmodified through a failover, and are answered as by Redis",
    short: Duration::from_secs(30),
    full: Duration::from_secs(240),
    show,
};

/// Guest memory: room for 200 clients and their values.
const MEMORY_MIB: u32 = 128;

/// How long a benchmark may take, a failover included.
const BENCHMARK_PATIENCE: Duration = Duration::from_secs(180);

/// How long the backup may take to serve.
const FAILOVER_PATIENCE: Duration = Duration::from_secs(20);

/// How many pairs a round may take until a kill finds a living primary.
const ATTEMPTS: usize = 3;

/// What `redis-benchmark -t` is asked for in the issue.
const ALL_TESTS: &str = "ping,set,get,incr,mset";

/// One pair's life.
#[derive(Clone, Copy, Debug)]
struct Round {
    load: Load,
    /// Whether answers are compared with those of a real server as well.
    compare: bool,
}

const fn round(
    tests: &'static str,
    requests: u64,
    clients: u64,
    pipeline: u64,
    compare: bool,
) -> Round {
    let load = Load {
        tests,
        requests,
        clients,
        pipeline,
    };
    Round { load, compare }
}

/// The default 50 clients doing everything.
const SHORT: &[Round] = &[round(ALL_TESTS, 20_000, 50, 1, true)];

/// The kill falls into each of the tests, into pipelines, and among many clients.
const FULL: &[Round] = &[
    round(ALL_TESTS, 50_000, 50, 1, true),
    round("ping", 50_000, 50, 1, false),
    round("set", 100_000, 50, 1, false),
    round("get", 100_000, 50, 1, false),
    round("incr", 100_000, 50, 1, false),
    round("mset", 50_000, 50, 1, false),
    round(ALL_TESTS, 400_000, 50, 16, false),
    round(ALL_TESTS, 30_000, 200, 1, true),
    round(ALL_TESTS, 10_000, 1, 1, false),
];

/// What all rounds showed.
#[derive(Debug, Default)]
struct Totals {
    answers: usize,
    requests: u64,
    python_before: u64,
    python_after: u64,
    cli: u64,
    failover_ms: Vec<f64>,
    pairs: u64,
    unasked: u64,
    tcp_timeouts: u64,
    stall_ms: [f64; 3],
    library: String,
}

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let mut totals = Totals::default();
    let mut figures = Figures::default();
    for (number, round) in run.form.pick(SHORT, FULL).iter().enumerate() {
        let Load {
            tests,
            requests,
            clients,
            pipeline,
        } = round.load;
        run.say(format_args!(
            "round {}: -t {tests} -n {requests} -c {clients} -P {pipeline}",
            number + 1
        ));
        let killed = totals.failover_ms.len();
        let mut speeds = Default::default();
        // On a host that is too busy, the backup may take over before the kill. Its clients must not notice that either, so all
        // that is judged is judged; but the kill is still to be shown, by another pair.
        for attempt in 1..=ATTEMPTS {
            speeds = alone(|| live_through(run, round, &mut random, &mut totals)).with_context(
                || {
                    format!(
                        "round {} (-t {tests} -c {clients} -P {pipeline}), pair {attempt}",
                        number + 1
                    )
                },
            )?;
            if totals.failover_ms.len() > killed {
                break;
            }
        }
        ensure!(
            totals.failover_ms.len() > killed,
            "none of {ATTEMPTS} primaries lived until it was to be killed: their backups took over on false suspicions"
        );
        if number == 0 {
            for (phase, measured) in ["before", "during", "after"].iter().zip(speeds) {
                for test in measured {
                    figures.add(&format!("rps_{phase}: {}", test.test), test.rps.round());
                }
            }
        }
    }
    let failover_ms = &mut totals.failover_ms;
    failover_ms.sort_by(f64::total_cmp);
    let tenths = |value: f64| (value * 10.0).round() / 10.0;
    figures.add("pairs", totals.pairs);
    figures.add("takeovers_before_the_kill", totals.unasked);
    figures.add(
        "failover_ms_median",
        tenths(failover_ms[failover_ms.len() / 2]),
    );
    figures.add(
        "failover_ms_max",
        tenths(failover_ms[failover_ms.len() - 1]),
    );
    let [benchmark, cli, python] = totals.stall_ms;
    figures.add("stall_ms_max_redis_benchmark", tenths(benchmark));
    figures.add("stall_ms_max_redis_cli", tenths(cli));
    figures.add("stall_ms_max_python", tenths(python));
    figures.add("tcp_timeouts", totals.tcp_timeouts);
    figures.add("answers_compared", totals.answers);
    figures.add("benchmark_requests", totals.requests);
    figures.add("python_operations_before_kill", totals.python_before);
    figures.add("python_operations_after_kill", totals.python_after);
    figures.add("redis_cli_increments", totals.cli);
    figures.add("python_redis", totals.library);
    Ok(figures)
}

/// One pair from its start to the end of its survivor; what the benchmark measured before, during and after.
fn live_through(
    run: &Run,
    round: &Round,
    random: &mut Random,
    totals: &mut Totals,
) -> Result<[Vec<Measured>; 3]> {
    let stage = Stage::enter()?;
    let mut spec = stage.spec("kv", "")?;
    spec.memory_mib = MEMORY_MIB;
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let outcome = judge(run, round, random, totals, &stage, &mut pair);
    outcome.with_context(|| {
        let words = [("primary", &pair.primary), ("backup", &pair.backup)]
            .map(|(role, side)| format!("{role}: {}", notices(side.events()).join("; ")));
        format!("the sides said last: {}", words.join(" | "))
    })
}

/// What a side said for people.
fn notices(events: Vec<Event>) -> Vec<String> {
    let text = |event| match event {
        Event::Notice { text, .. }
        | Event::Diverged { what: text }
        | Event::Ended { why: text } => Some(text),
        _ => None,
    };
    events.into_iter().filter_map(text).collect()
}

fn judge(
    run: &Run,
    round: &Round,
    random: &mut Random,
    totals: &mut Totals,
    stage: &Stage,
    pair: &mut Pair,
) -> Result<[Vec<Measured>; 3]> {
    let reference = Reference::start(stage.directory())?;
    let mut compare = |side: &str, seed: u64| -> Result<()> {
        if round.compare {
            let compared =
                redis_compat::run(reference.address().into(), SocketAddr::V4(GUEST), seed)
                    .with_context(|| format!("answers of the {side}"))?;
            run.say(format_args!(
                "{} answers of the {side} are as Redis'",
                compared.answers
            ));
            totals.answers += compared.answers;
        }
        Ok(())
    };
    compare("primary", random.next())?;
    let quiet = Load {
        requests: round.load.requests / 4,
        ..round.load
    };
    let before = work(stage.directory(), quiet, random.next(), None)?;
    let moment = Moment {
        pair,
        share: 0.1 + random.below(600) as f64 / 1000.0,
    };
    let during = work(stage.directory(), round.load, random.next(), Some(moment))?;
    let after = work(stage.directory(), quiet, random.next(), None)?;
    compare("survivor", random.next())?;

    let connections = [&before, &during, &after].map(|work| work.connections);
    ensure!(
        connections.iter().all(|count| *count == connections[0]),
        "redis-benchmark's clients connected again: {connections:?} connections before, during and after the failover"
    );
    let failover = during.failover.as_ref().context("no failover")?;
    let served = match failover.millis {
        Some(millis) => format!("served again after {millis:.1} ms"),
        None => format!(
            "which the backup had replaced before, unasked ({})",
            failover.said
        ),
    };
    run.say(format_args!(
        "primary killed at {:.0} % of the benchmark, {served}; longest waits: benchmark {:.1} ms, redis-cli {:.1} ms, \
         Python {:.1} ms",
        failover.share * 100.0,
        longest(&during.measured),
        during.cli_stall_ms,
        during.python.stall_ms
    ));
    let marked = during
        .python
        .at_mark
        .context("the Python program noted no kill")?;
    ensure!(
        marked > 0 && marked < during.python.operations,
        "the kill did not come in the middle of the Python program's work: {:?}",
        during.python
    );
    end(pair)?;

    totals.requests += during.commands;
    totals.python_before += marked;
    totals.python_after += during.python.operations - marked;
    totals.cli += during.increments;
    totals.pairs += 1;
    totals.unasked += u64::from(failover.millis.is_none());
    totals.failover_ms.extend(failover.millis);
    totals.tcp_timeouts += tcp_timeouts()?;
    let stalls = [
        longest(&during.measured),
        during.cli_stall_ms,
        during.python.stall_ms,
    ];
    for (most, stall) in totals.stall_ms.iter_mut().zip(stalls) {
        *most = most.max(stall);
    }
    totals.library = during.python.library;
    Ok([before.measured, during.measured, after.measured])
}

/// How often a client's TCP in this thread's namespace waited in vain for an acknowledgement, since the namespace was made.
fn tcp_timeouts() -> Result<u64> {
    let text =
        std::fs::read_to_string("/proc/thread-self/net/netstat").context("read TCP's counters")?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = lines.next().zip(lines.next()).context("no TCP counters")?;
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs
        .find(|(name, _)| *name == "TCPTimeouts")
        .context("no count of TCP's timeouts")?;
    Ok(value.parse()?)
}

fn longest(measured: &[Measured]) -> f64 {
    measured.iter().map(|test| test.max_ms).fold(0.0, f64::max)
}

/// The survivor ends well when asked to, and neither side saw a divergence.
fn end(pair: &mut Pair) -> Result<()> {
    let status = pair.backup.stop(Duration::from_secs(10));
    ensure!(
        status.success(),
        "the survivor ended with {status}: {}",
        pair.backup.messages()
    );
    for (role, side) in [("primary", &pair.primary), ("survivor", &pair.backup)] {
        let diverged = side.events().into_iter().find_map(|event| match event {
            Event::Diverged { what } => Some(what),
            _ => None,
        });
        if let Some(what) = diverged {
            bail!("the {role} diverged: {what}");
        }
    }
    Ok(())
}

/// When the primary is to die.
struct Moment<'a> {
    pair: &'a mut Pair,
    /// The share of the benchmark's commands that the guest has executed by then.
    share: f64,
}

/// What a failover looked like.
#[derive(Clone, Debug)]
struct Failover {
    /// From the kill to the open gate; none if the backup had taken over before, on a false suspicion.
    millis: Option<f64>,
    /// The share of the benchmark's commands that had been executed.
    share: f64,
    /// What the backup said of it.
    said: String,
}

/// What the three programs did.
#[derive(Debug)]
struct Work {
    measured: Vec<Measured>,
    python: PythonReport,
    /// Connections that the benchmark opened.
    connections: u64,
    /// Commands that the benchmark had executed.
    commands: u64,
    /// Increments by redis-cli, and the longest that it waited for one.
    increments: u64,
    cli_stall_ms: f64,
    failover: Option<Failover>,
}

/// How often redis-cli looks how far the benchmark has come: every so many increments.
const LOOK_EVERY: u64 = 20;

/// Runs all three programs until the benchmark ends, the kill at its moment, and checks what they left.
fn work(directory: &Path, load: Load, seed: u64, mut moment: Option<Moment<'_>>) -> Result<Work> {
    let mut cli = Cli::start(directory, GUEST)?;
    cli.expect("FLUSHALL", "OK")?;
    let client = cli.ask("CLIENT ID")?;
    let mut python = Python::start(directory, GUEST, seed)?;
    let connections = cli.info("total_connections_received")?;
    let errors = cli.info("total_error_replies")?;
    let commands = cli.info("total_commands_processed")?;
    let commands_wanted = load.requests * test_count(load);

    let mut benchmark = Benchmark::start(directory, GUEST, load)?;
    let (mut increments, mut stall, mut failover) = (0, Duration::ZERO, None);
    while benchmark.running()? {
        increments += 1;
        let share = match &moment {
            Some(_) if increments % LOOK_EVERY == 0 => {
                let done = cli.info("total_commands_processed")? - commands;
                Some(done as f64 / commands_wanted as f64)
            }
            _ => None,
        };
        let due = moment.take_if(|moment| share.is_some_and(|share| share >= moment.share));
        let asked = Instant::now();
        // The kill comes while the answer is on its way.
        cli.send("INCR cli")?;
        if let (Some(Moment { pair, .. }), Some(share)) = (due, share) {
            ensure!(
                benchmark.running()?,
                "the benchmark was over before the kill"
            );
            python.mark()?;
            let killed = Timeline::now();
            pair.primary.kill();
            expect(&mut cli, increments)?;
            stall = stall.max(asked.elapsed());
            let (open, said) = live(&pair.backup)?;
            let millis = open.checked_sub(killed).map(|nanos| nanos as f64 / 1e6);
            failover = Some(Failover {
                millis,
                share,
                said,
            });
        } else {
            expect(&mut cli, increments)?;
            stall = stall.max(asked.elapsed());
        }
    }
    ensure!(moment.is_none(), "the benchmark was over before the kill");
    let measured = benchmark.finish(BENCHMARK_PATIENCE)?;
    ensure!(
        measured.len() as u64 == test_count(load),
        "redis-benchmark reported {} tests instead of {}",
        measured.len(),
        test_count(load)
    );
    let python = python.finish()?;
    let now = cli.info("total_error_replies")?;
    ensure!(
        now == errors,
        "{} requests were answered by errors",
        now - errors
    );
    let connections = cli.info("total_connections_received")? - connections;
    check_left(&mut cli, load, increments, &python)?;
    let found = cli.ask("CLIENT ID")?;
    ensure!(
        found == client,
        "redis-cli connected again: client {client} became {found}"
    );
    cli.finish()?;
    Ok(Work {
        measured,
        python,
        connections,
        commands: commands_wanted,
        increments,
        cli_stall_ms: stall.as_secs_f64() * 1e3,
        failover,
    })
}

fn expect(cli: &mut Cli, increments: u64) -> Result<()> {
    let found = cli.line()?;
    ensure!(
        found == increments.to_string(),
        "redis-cli's INCR {increments} gave {found}"
    );
    Ok(())
}

/// Waits until the backup serves; the time at which its gate opened, and what it said before.
fn live(backup: &Side) -> Result<(u64, String)> {
    let mut said = Vec::new();
    let found = backup.wait_for(
        FAILOVER_PATIENCE,
        |event| matches!(event, Event::Live { .. }),
        |event| match event {
            Event::Notice { text, .. } | Event::Diverged { what: text } => said.push(text),
            _ => {}
        },
    );
    let said = said.join("; ");
    match found {
        Some(Event::Live { at, .. }) => Ok((at.open, said)),
        _ => bail!("the backup does not serve: {said} {}", backup.messages()),
    }
}

/// How many tests the benchmark makes of `-t`: PING comes in two forms.
fn test_count(load: Load) -> u64 {
    load.tests
        .split(',')
        .map(|test| if test == "ping" { 2 } else { 1 })
        .sum()
}

/// All that the programs wrote is in the guest, once, and nothing else.
fn check_left(cli: &mut Cli, load: Load, increments: u64, python: &PythonReport) -> Result<()> {
    let asked = |test| load.tests.split(',').any(|asked| asked == test);
    let counters = values(cli, "counter:*")?;
    let mut sum = 0;
    for counter in &counters {
        sum += counter
            .parse::<u64>()
            .with_context(|| format!("a counter is {counter:?}"))?;
    }
    let wanted = if asked("incr") { load.requests } else { 0 };
    ensure!(
        sum == wanted,
        "redis-benchmark incremented {wanted} times, and the counters' sum is {sum}"
    );

    let keys = values(cli, "key:*")?;
    let written = asked("set") || asked("mset");
    ensure!(
        keys.len() as u64 <= BENCHMARK_KEYS && keys.is_empty() != written,
        "{} keys after -t {} on {BENCHMARK_KEYS} keys",
        keys.len(),
        load.tests
    );
    // All of them hold the same three bytes, of the benchmark's choice.
    if let Some(odd) = keys
        .iter()
        .find(|value| value.len() != 3 || **value != keys[0])
    {
        bail!(
            "a key of redis-benchmark's is {odd:?}, and another one {:?}",
            keys[0]
        );
    }
    let expected =
        keys.len() as u64 + counters.len() as u64 + python.keys + u64::from(increments > 0);
    let found: u64 = cli.ask("DBSIZE")?.parse()?;
    ensure!(
        found == expected,
        "there are {found} keys instead of {expected}"
    );
    Ok(())
}

/// The values of the keys that match.
fn values(cli: &mut Cli, pattern: &str) -> Result<Vec<String>> {
    let keys = cli.ask_lines(&format!("KEYS {pattern}"))?;
    let keys: Vec<&str> = keys
        .iter()
        .map(String::as_str)
        .filter(|key| !key.is_empty())
        .collect();
    match keys.is_empty() {
        true => Ok(Vec::new()),
        false => cli.ask_lines(&format!("MGET {}", keys.join(" "))),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
