//! Redis' own programs, unmodified: `redis-cli`, `redis-benchmark`, `redis-server`, and a Python program with a client library.
//!
//! They are started by the calling thread, so they are where it is: in a stage's namespace. Each ends with that thread,
//! however it ends (`setpriv --pdeathsig`), so a test that is killed leaves nothing running.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;

/// How long a program may take to come up, or to end when nothing keeps it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a program that has to do with nobody is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// A running program, ended when it is dropped. What it says on standard error goes to a file.
#[derive(Debug)]
struct Program {
    name: &'static str,
    child: Child,
    errors: PathBuf,
}

impl Program {
    fn start(
        name: &'static str,
        directory: &Path,
        input: Stdio,
        output: Stdio,
        change: impl FnOnce(&mut Command),
        program: &Path,
    ) -> Result<Self> {
        let errors = directory.join(format!("{name}.stderr"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        change(&mut command);
        let child = command
            .stdin(input)
            .stdout(output)
            .stderr(File::create(&errors).context("create a file for a program's messages")?)
            .spawn()
            .with_context(|| format!("start {name} by setpriv: run scripts/install-test-tools"))?;
        Ok(Self {
            name,
            child,
            errors,
        })
    }

    fn messages(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    fn running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for its end, up to a limit.
    fn wait(&mut self, longest: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + longest;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK);
        }
        bail!(
            "{} has not ended after {} s: {}",
            self.name,
            longest.as_secs(),
            self.messages()
        );
    }

    fn end_well(&mut self, longest: Duration) -> Result<()> {
        let status = self.wait(longest)?;
        let messages = self.messages();
        ensure!(
            status.success(),
            "{} ended with {status}: {messages}",
            self.name
        );
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It fails only for a program that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program's standard output, line by line. A thread reads it, so that a program that says nothing more is noticed.
#[derive(Debug)]
struct Lines(Receiver<String>);

impl Lines {
    fn of(program: &mut Program) -> Result<Self> {
        let output = program
            .child
            .stdout
            .take()
            .context("a program's output goes elsewhere")?;
        let (tell, lines) = channel();
        std::thread::Builder::new()
            .name(format!("{}-output", program.name))
            .spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if tell.send(line).is_err() {
                        return;
                    }
                }
            })
            .context("start a thread")?;
        Ok(Self(lines))
    }

    /// The next line.
    fn next(&self, program: &Program) -> Result<String> {
        let name = program.name;
        self.0.recv_timeout(PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                anyhow!("{name} has said nothing for {} s", PATIENCE.as_secs())
            }
            RecvTimeoutError::Disconnected => anyhow!("{name} has ended: {}", program.messages()),
        })
    }
}

/// What one `redis-benchmark` is to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// `-t`.
    pub tests: &'static str,
    /// `-n`: requests of each test.
    pub requests: u64,
    /// `-c`.
    pub clients: u64,
    /// `-P`.
    pub pipeline: u64,
}

/// One line of `redis-benchmark`'s report.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The test's name.
    pub test: String,
    /// Requests a second.
    pub rps: f64,
    /// Median latency in milliseconds.
    pub p50_ms: f64,
    /// The longest latency in milliseconds.
    pub max_ms: f64,
}

/// Keys that `redis-benchmark` picks from: `-r`.
pub const BENCHMARK_KEYS: u64 = 1000;

/// A running `redis-benchmark`.
#[derive(Debug)]
pub struct Benchmark {
    program: Program,
    output: PathBuf,
}

impl Benchmark {
    /// Starts it against `server`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(directory: &Path, server: SocketAddrV4, load: Load) -> Result<Self> {
        let output = directory.join("redis-benchmark.csv");
        let stdout = File::create(&output).context("create a file for redis-benchmark's report")?;
        let program = Program::start(
            "redis-benchmark",
            directory,
            Stdio::null(),
            stdout.into(),
            |command| {
                command
                    .args([
                        "-h",
                        &server.ip().to_string(),
                        "-p",
                        &server.port().to_string(),
                        "--csv",
                    ])
                    .args(["-t", load.tests, "-n", &load.requests.to_string()])
                    .args([
                        "-c",
                        &load.clients.to_string(),
                        "-P",
                        &load.pipeline.to_string(),
                    ])
                    .args(["-r", &BENCHMARK_KEYS.to_string()]);
            },
            Path::new("redis-benchmark"),
        )?;
        Ok(Self { program, output })
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If the host does not say.
    pub fn running(&mut self) -> Result<bool> {
        self.program.running()
    }

    /// Waits for its end: exit 0, nothing on standard error, and a line for every test.
    ///
    /// # Errors
    /// If it is otherwise, or has not ended in time.
    pub fn finish(&mut self, longest: Duration) -> Result<Vec<Measured>> {
        self.program.end_well(longest)?;
        let messages = self.program.messages();
        ensure!(
            messages.trim().is_empty(),
            "redis-benchmark complains: {messages}"
        );
        parse_report(&std::fs::read_to_string(&self.output)?)
    }
}

/// Reads `redis-benchmark --csv`'s report.
fn parse_report(text: &str) -> Result<Vec<Measured>> {
    let mut lines = text.lines().map(|line| {
        let fields = line.split("\",\"").map(|field| field.trim_matches('"'));
        fields.collect::<Vec<_>>()
    });
    let names = lines.next().context("redis-benchmark reported nothing")?;
    let column = |name| {
        let found = names.iter().position(|column| *column == name);
        found.with_context(|| format!("redis-benchmark's report has no column {name}: {names:?}"))
    };
    let [rps, p50, max] = [
        column("rps")?,
        column("p50_latency_ms")?,
        column("max_latency_ms")?,
    ];
    lines
        .map(|fields| {
            let number = |column: usize| -> Result<f64> {
                let field = fields
                    .get(column)
                    .context("a short line in redis-benchmark's report")?;
                Ok(field.parse()?)
            };
            Ok(Measured {
                test: fields[0].to_owned(),
                rps: number(rps)?,
                p50_ms: number(p50)?,
                max_ms: number(max)?,
            })
        })
        .collect()
}

/// A `redis-cli` that is given commands line by line over one connection, as by a person at a terminal.
#[derive(Debug)]
pub struct Cli {
    program: Program,
    input: ChildStdin,
    output: Lines,
    marks: u64,
}

impl Cli {
    /// Starts it against `server`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(directory: &Path, server: SocketAddrV4) -> Result<Self> {
        let mut program = Program::start(
            "redis-cli",
            directory,
            Stdio::piped(),
            Stdio::piped(),
            |command| {
                command.args([
                    "-h",
                    &server.ip().to_string(),
                    "-p",
                    &server.port().to_string(),
                ]);
            },
            Path::new("redis-cli"),
        )?;
        let input = program.child.stdin.take().expect("it was asked for");
        let output = Lines::of(&mut program)?;
        Ok(Self {
            program,
            input,
            output,
            marks: 0,
        })
    }

    /// Hands it one command.
    ///
    /// # Errors
    /// If it no longer reads.
    pub fn send(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}")
            .with_context(|| format!("redis-cli has ended: {}", self.program.messages()))
    }

    /// The next line that it prints.
    ///
    /// # Errors
    /// If it has ended, or waits for an answer that does not come.
    pub fn line(&mut self) -> Result<String> {
        self.output.next(&self.program)
    }

    /// One command and its answer of one line.
    ///
    /// # Errors
    /// If it no longer answers.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.line()
    }

    /// One command, which must be answered by this line.
    ///
    /// # Errors
    /// If it is not.
    pub fn expect(&mut self, command: &str, answer: &str) -> Result<()> {
        let found = self.ask(command)?;
        ensure!(
            found == answer,
            "redis-cli> {command}: expected {answer:?}, found {found:?}"
        );
        Ok(())
    }

    /// One command and its answer of any number of lines, which must not hold what no other answer holds: a mark is echoed
    /// behind it.
    ///
    /// # Errors
    /// If it no longer answers.
    pub fn ask_lines(&mut self, command: &str) -> Result<Vec<String>> {
        self.marks += 1;
        let mark = format!("end-of-answer-{}", self.marks);
        self.send(command)?;
        self.send(&format!("ECHO {mark}"))?;
        let mut lines = Vec::new();
        loop {
            let line = self.line()?;
            if line == mark {
                return Ok(lines);
            }
            lines.push(line);
        }
    }

    /// A number from INFO.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn info(&mut self, name: &str) -> Result<u64> {
        let lines = self.ask_lines("INFO")?;
        let value = lines
            .iter()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(value
            .with_context(|| format!("INFO has no {name}"))?
            .parse()?)
    }

    /// Ends its input; it must end well.
    ///
    /// # Errors
    /// If it does not.
    pub fn finish(self) -> Result<()> {
        let Self {
            mut program, input, ..
        } = self;
        drop(input);
        program.end_well(PATIENCE)?;
        let messages = program.messages();
        ensure!(
            messages.trim().is_empty(),
            "redis-cli complains: {messages}"
        );
        Ok(())
    }
}

/// The Python program (`redis_client.py`): compares every answer with a model, and never retries.
#[derive(Debug)]
pub struct Python {
    program: Program,
    input: ChildStdin,
    output: Lines,
}

/// What the Python program says at its end.
#[derive(Clone, Debug, Deserialize)]
pub struct PythonReport {
    /// Version of the client library.
    pub library: String,
    /// Operations, every answer right.
    pub operations: u64,
    /// Operations done when [`Python::mark`] was called last.
    pub at_mark: Option<u64>,
    /// Keys that were there at the end, with the right values; no other was.
    pub keys: u64,
    /// The longest that an operation took.
    pub stall_ms: f64,
}

impl Python {
    /// Starts it against `server`; it has connected when this returns.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(directory: &Path, server: SocketAddrV4, seed: u64) -> Result<Self> {
        let interpreter = interpreter()?;
        let script = directory.join("redis_client.py");
        std::fs::write(&script, include_str!("redis_client.py"))
            .context("write the Python program")?;
        let mut program = Program::start(
            "python",
            directory,
            Stdio::piped(),
            Stdio::piped(),
            |command| {
                command.arg(script).args([
                    server.ip().to_string(),
                    server.port().to_string(),
                    seed.to_string(),
                ]);
            },
            &interpreter,
        )?;
        let input = program.child.stdin.take().expect("it was asked for");
        let output = Lines::of(&mut program)?;
        let ready = output.next(&program)?;
        ensure!(ready == "ready", "the Python program said {ready:?}");
        Ok(Self {
            program,
            input,
            output,
        })
    }

    /// Has it note how much it has done.
    ///
    /// # Errors
    /// If it has ended.
    pub fn mark(&mut self) -> Result<()> {
        let told = writeln!(self.input, "mark");
        told.with_context(|| format!("the Python program has ended: {}", self.program.messages()))
    }

    /// Has it finish: it reads everything back and reports.
    ///
    /// # Errors
    /// If an answer was wrong or an exception came: its last words.
    pub fn finish(self) -> Result<PythonReport> {
        let Self {
            mut program,
            input,
            output,
        } = self;
        drop(input);
        let report = output.next(&program)?;
        program.end_well(PATIENCE)?;
        serde_json::from_str(&report)
            .with_context(|| format!("the Python program reported {report:?}"))
    }
}

/// The Python that has the library: the one on the path, or the system's own where another one comes first on the path.
fn interpreter() -> Result<PathBuf> {
    let has_library = |python: &str| {
        let found = Command::new(python)
            .args(["-c", "import redis"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
        found.is_ok_and(|status| status.success())
    };
    ["python3", "/usr/bin/python3"]
        .iter()
        .find(|python| has_library(python))
        .map(PathBuf::from)
        .context("no python3 has the library `redis`: run scripts/install-test-tools")
}

/// A real `redis-server` on the loopback interface, which keeps nothing on disk.
#[derive(Debug)]
pub struct Reference {
    _program: Program,
    address: SocketAddrV4,
}

impl Reference {
    /// Starts it; it answers when this returns. The namespace is the caller's own, so its port is free.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(directory: &Path) -> Result<Self> {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 6379);
        let mut program = Program::start(
            "redis-server",
            directory,
            Stdio::null(),
            File::create(directory.join("redis-server.stdout"))?.into(),
            |command| {
                command
                    .args([
                        "--bind",
                        &address.ip().to_string(),
                        "--port",
                        &address.port().to_string(),
                    ])
                    .args(["--save", "", "--appendonly", "no", "--dir"])
                    .arg(directory);
            },
            Path::new("redis-server"),
        )?;
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            ensure!(
                program.running()?,
                "redis-server ended: {}",
                program.messages()
            );
            ensure!(
                Instant::now() < until,
                "redis-server does not listen at {address}"
            );
            std::thread::sleep(LOOK);
        }
        Ok(Self {
            _program: program,
            address,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_benchmark_report_is_read_by_its_columns() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\
                    \"MSET (10 keys)\",\"14492.75\",\"0.058\",\"0.008\",\"0.047\",\"0.119\",\"0.199\",\"0.903\"\n";
        let expected = Measured {
            test: "MSET (10 keys)".into(),
            rps: 14492.75,
            p50_ms: 0.047,
            max_ms: 0.903,
        };
        assert_eq!(parse_report(text).unwrap(), [expected]);
        assert!(parse_report("").is_err());
        assert!(parse_report("\"test\"\n").is_err());
    }
}
