//! The client's one thread: every connection, multiplexed.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::model::{Keys, Operation, Script, Verdict};
use super::record::{Recorder, Sample};
use super::{ClientError, Config, Outcome, PROBLEMS_KEPT, Shared, resp};
use crate::backends::wait::{Moment, Waiter};

/// Bytes asked of a connection at a time.
const READ: usize = 64 << 10;

/// How long one attempt to connect may take, and how long to wait after one was refused: a server that is
/// starting is asked again this often.
const ATTEMPT: Duration = Duration::from_millis(500);
const AFTER_REFUSAL: Duration = Duration::from_millis(10);

/// One connection.
#[derive(Debug)]
pub(super) struct Line {
    /// `None` once it broke.
    pub(super) stream: Option<TcpStream>,
    /// Requests without a reply, oldest first, with the time they were sent or due.
    pub(super) waiting: VecDeque<(Operation, Moment)>,
    pub(super) keys: Keys,
    script: Script,
    out: Vec<u8>,
    written: usize,
    input: Vec<u8>,
    /// What of `input` has come and is not taken.
    filled: usize,
}

/// Makes every connection and has each answer a PING.
pub(super) fn connect_all(config: &Config) -> Result<Vec<Line>, ClientError> {
    let deadline = Moment::now().plus(config.connect_within);
    (0..config.connections)
        .map(|number| {
            let stream = connect(config, deadline).map_err(|source| ClientError::Connect {
                number: number + 1,
                address: config.address,
                within: config.connect_within,
                source,
            })?;
            Ok(Line {
                stream: Some(stream),
                waiting: VecDeque::new(),
                keys: Keys::new(config.seed, number),
                script: Script::new(config, number),
                out: Vec::new(),
                written: 0,
                input: vec![0; READ],
                filled: 0,
            })
        })
        .collect()
}

fn connect(config: &Config, deadline: Moment) -> io::Result<TcpStream> {
    loop {
        let attempt = try_connect(config, deadline);
        match attempt {
            Err(_) if Moment::now().plus(AFTER_REFUSAL) < deadline => {
                std::thread::sleep(AFTER_REFUSAL);
            }
            _ => return attempt,
        }
    }
}

/// One attempt. It is not yet a connection of the run, so trying anew hides nothing.
fn try_connect(config: &Config, deadline: Moment) -> io::Result<TcpStream> {
    let left = deadline.since(Moment::now()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&config.address.into(), left.min(ATTEMPT))?;
    stream.set_nodelay(true)?;
    // Behind a gateway the connection stands before the guest has answered anything.
    stream.set_read_timeout(Some(left))?;
    stream.write_all(b"*1\r\n$4\r\nPING\r\n")?;
    let mut pong = [0; 7];
    stream.read_exact(&mut pong)?;
    if &pong != b"+PONG\r\n" {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("PING was answered \"{}\"", pong.escape_ascii()),
        ));
    }
    stream.set_read_timeout(None)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// When requests are sent.
#[derive(Debug)]
enum Pace {
    /// As soon as the connection is free.
    Closed,
    /// One every so often, over all connections.
    Fixed { every: Duration, due: Moment },
}

/// The thread's state.
pub(super) struct Worker<'a> {
    shared: &'a Shared,
    pipeline: usize,
    drain_within: Duration,
    pace: Pace,
    /// Where to look first for a free connection.
    turn: usize,
    lines: Vec<Line>,
    recorder: Recorder,
    refused: u64,
    lost: u64,
    problems: Vec<String>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(config: &Config, shared: &'a Shared, lines: Vec<Line>) -> Self {
        let start = Moment::now();
        let pace = match config.rate {
            None => Pace::Closed,
            Some(rate) => Pace::Fixed {
                every: Duration::from_secs_f64(1.0 / rate),
                due: start,
            },
        };
        Self {
            shared,
            pipeline: config.pipeline,
            drain_within: config.drain_within,
            pace,
            turn: 0,
            lines,
            recorder: Recorder::new(start),
            refused: 0,
            lost: 0,
            problems: Vec::new(),
        }
    }

    /// Works until asked to stop and the outstanding replies have come, or until their time is up.
    pub(super) fn run(&mut self) {
        let mut waiter = Waiter::new();
        let mut deadline = None;
        loop {
            let now = Moment::now();
            if self.shared.stop.load(Ordering::Acquire) {
                let deadline = *deadline.get_or_insert(now.plus(self.drain_within));
                let idle = self.open_lines().all(|line| line.waiting.is_empty());
                if idle || now >= deadline {
                    return;
                }
            } else {
                self.send_what_is_due();
            }
            let timeout = match deadline {
                Some(deadline) => Some(deadline.since(now)),
                None => self.until_due(),
            };
            if let Err(error) = self.wait(&mut waiter, timeout) {
                self.note(format!(
                    "the client cannot wait for its connections: {error}"
                ));
                return;
            }
        }
    }

    fn open_lines(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(|line| line.stream.is_some())
    }

    fn has_room(&self, line: &Line) -> bool {
        line.stream.is_some() && line.waiting.len() < self.pipeline
    }

    /// Sends on every free connection what the pace allows.
    fn send_what_is_due(&mut self) {
        let count = self.lines.len();
        let first = self.turn;
        for step in 0..count {
            let index = (first + step) % count;
            while self.has_room(&self.lines[index]) {
                let now = Moment::now();
                let sent = match &mut self.pace {
                    Pace::Closed => now,
                    Pace::Fixed { due, .. } if *due > now => break,
                    Pace::Fixed { every, due } => {
                        let sent = *due;
                        *due = due.plus(*every);
                        // The next one is the next connection's, if that is free.
                        self.turn = (index + 1) % count;
                        sent
                    }
                };
                let line = &mut self.lines[index];
                let operation = line.script.next(&line.keys);
                line.keys.encode(operation, &mut line.out);
                line.waiting.push_back((operation, sent));
                if matches!(self.pace, Pace::Fixed { .. }) {
                    break;
                }
            }
            self.flush(index);
        }
    }

    /// How long until a request is due that could be sent.
    fn until_due(&self) -> Option<Duration> {
        let Pace::Fixed { due, .. } = self.pace else {
            return None;
        };
        let free = self.lines.iter().any(|line| self.has_room(line));
        free.then(|| due.since(Moment::now()))
    }

    fn wait(&mut self, waiter: &mut Waiter, timeout: Option<Duration>) -> io::Result<()> {
        waiter.clear();
        waiter.add(&self.shared.wake, true, false);
        let indices: Vec<_> = self
            .lines
            .iter()
            .map(|line| {
                let stream = line.stream.as_ref()?;
                Some(waiter.add(stream, true, line.written < line.out.len()))
            })
            .collect();
        waiter.wait(timeout)?;
        self.shared.wake.clear();
        for (line, index) in indices.into_iter().enumerate() {
            let ready = index.map(|index| waiter.ready(index)).unwrap_or_default();
            if ready.write {
                self.flush(line);
            }
            if ready.read || ready.failed || ready.hung_up {
                self.receive(line);
            }
        }
        Ok(())
    }

    fn flush(&mut self, index: usize) {
        let line = &mut self.lines[index];
        let Some(stream) = &mut line.stream else {
            return;
        };
        while line.written < line.out.len() {
            match stream.write(&line.out[line.written..]) {
                Ok(count) if count > 0 => line.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => return self.break_off(index, "it takes no more bytes"),
                Err(error) => return self.break_off(index, &error.to_string()),
            }
        }
        line.out.clear();
        line.written = 0;
    }

    /// Reads what has come and takes the replies in it.
    fn receive(&mut self, index: usize) {
        loop {
            let line = &mut self.lines[index];
            let Some(stream) = &mut line.stream else {
                return;
            };
            if line.input.len() - line.filled < READ {
                line.input.resize(line.filled + READ, 0);
            }
            match stream.read(&mut line.input[line.filled..]) {
                Ok(0) => return self.break_off(index, "the server closed it"),
                Ok(count) => {
                    line.filled += count;
                    let all = count < READ;
                    self.take_replies(index, Moment::now());
                    if all {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.break_off(index, &error.to_string()),
            }
        }
    }

    fn take_replies(&mut self, index: usize, done: Moment) {
        let mut taken = 0;
        loop {
            let line = &mut self.lines[index];
            let unread = &line.input[taken..line.filled];
            let verdict = match resp::parse(unread) {
                Ok(None) => break,
                Err(bad) => return self.break_off(index, &bad.to_string()),
                Ok(Some((reply, used))) => {
                    let Some((operation, sent)) = line.waiting.pop_front() else {
                        return self.break_off(index, "a reply to no request");
                    };
                    taken += used;
                    let kill = Shared::marked(&self.shared.kill_at);
                    self.recorder.record(Sample { sent, done }, kill);
                    line.keys.settle(operation, reply)
                }
            };
            add(&self.shared.completed, 1);
            self.shared
                .last_reply
                .store(done.as_nanos(), Ordering::Relaxed);
            match verdict {
                Verdict::Read => {}
                Verdict::Written => add(&self.shared.acknowledged_writes, 1),
                Verdict::Refused(words) => {
                    self.refused += 1;
                    self.note(format!("refused: {words}"));
                }
                Verdict::Wrong(wrong) => {
                    add(&self.shared.wrong_replies, 1);
                    self.lost += wrong.lost;
                    self.note(wrong.words);
                }
                Verdict::Nonsense(words) => {
                    add(&self.shared.wrong_replies, 1);
                    return self.break_off(index, &words);
                }
            }
        }
        let line = &mut self.lines[index];
        line.input.copy_within(taken..line.filled, 0);
        line.filled -= taken;
    }

    fn break_off(&mut self, index: usize, why: &str) {
        self.lines[index].stream = None;
        add(&self.shared.broken_connections, 1);
        self.note(format!("connection {} broke: {why}", index + 1));
    }

    fn note(&mut self, words: String) {
        if self.problems.len() < PROBLEMS_KEPT {
            self.problems.push(words);
        }
    }

    /// The end. A connection that still waits for a reply counts as broken: nothing can be read back over it.
    pub(super) fn outcome(mut self) -> Outcome {
        for index in 0..self.lines.len() {
            let line = &self.lines[index];
            if line.stream.is_some() && !line.waiting.is_empty() {
                let within = self.drain_within;
                self.break_off(index, &format!("no reply within {within:?}"));
            }
        }
        let unanswered = || self.lines.iter().flat_map(|line| &line.waiting);
        let findings = self.recorder.finish(
            Shared::marked(&self.shared.live_at),
            unanswered().map(|(_, sent)| *sent),
            Moment::now(),
        );
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Outcome {
            requests: findings.requests,
            acknowledged_writes: read(&self.shared.acknowledged_writes),
            refused: self.refused,
            unanswered: unanswered().count() as u64,
            wrong_replies: read(&self.shared.wrong_replies),
            lost_while_running: self.lost,
            broken_connections: read(&self.shared.broken_connections),
            failover: findings.failover,
            stall_max: findings.stall_max,
            latency: findings.latency,
            series: findings.series,
            problems: self.problems,
            lines: self.lines,
        }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
