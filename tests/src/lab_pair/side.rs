//! One side of a pair in a host of the lab: its process, what it says, how it ended.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypervisor::backends::wait::Moment;
use hypervisor::session::report::Event;
use rdma_log::locks::lock;

use crate::lab::Host;
use crate::lab::session::{Happening, Session};
use crate::lab::wire::Start;

/// How a side ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself or by a signal, with this code.
    Code(i32),
    /// With its host.
    Gone(String),
}

/// What comes from a side.
#[derive(Debug)]
enum Heard {
    /// Its process id in its host.
    Pid(u32),
    /// An event, and when it came here.
    Event(Moment, Box<Event>),
    End(End),
}

/// A process of `doppel` in a host.
#[derive(Debug)]
pub struct Side {
    host: String,
    pid: u32,
    heard: Receiver<Heard>,
    messages: Arc<Mutex<String>>,
    over: Arc<AtomicBool>,
    end: Option<End>,
}

/// Says its process id, and becomes the side: a primary does not say it by itself.
const SAY_PID: &str = r#"echo $$; exec "$@""#;

/// How often the thread that listens looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

impl Side {
    /// Starts it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(host: &Host<'_>, words: &[String], longest: Duration) -> Result<Self> {
        let mut command = vec!["sh", "-c", SAY_PID, "sh"];
        command.extend(words.iter().map(String::as_str));
        let session = host.session(&Start::new(&command))?;
        session.no_input();
        let (tell, heard) = channel();
        let messages = Arc::<Mutex<String>>::default();
        let over = Arc::<AtomicBool>::default();
        let (errors, unwanted) = (Arc::clone(&messages), Arc::clone(&over));
        std::thread::Builder::new()
            .name(format!("{}-events", host.name()))
            .spawn(move || listen(&session, &tell, &errors, &unwanted))
            .context("start a thread")?;
        let mut side = Self {
            host: host.name().to_owned(),
            pid: 0,
            heard,
            messages,
            over,
            end: None,
        };
        match side.next(Instant::now() + longest) {
            Some(Heard::Pid(pid)) => side.pid = pid,
            other => bail!("a side in {} began with {other:?}", side.host),
        }
        Ok(side)
    }

    /// The host that it is in.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its process id in that host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it has written to its standard error.
    #[must_use]
    pub fn messages(&self) -> String {
        let messages = self.messages.lock();
        messages.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How it ended, if it has, as far as its events were taken.
    #[must_use]
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Hands over the events that have come.
    pub fn events(&mut self, mut take: impl FnMut(Event)) {
        while let Ok(heard) = self.heard.try_recv() {
            match heard {
                Heard::Event(_, event) => take(*event),
                Heard::End(end) => self.end = Some(end),
                Heard::Pid(_) => {}
            }
        }
    }

    /// Waits for an event, and says when it came; the others are handed to `other`.
    ///
    /// # Errors
    /// If the side ends before, or the time is up: with what it has said.
    pub fn wait_for(
        &mut self,
        what: &str,
        longest: Duration,
        wanted: impl Fn(&Event) -> bool,
        mut other: impl FnMut(Event),
    ) -> Result<(Moment, Event)> {
        let until = Instant::now() + longest;
        loop {
            match self.next(until) {
                Some(Heard::Event(at, event)) if wanted(&event) => return Ok((at, *event)),
                Some(Heard::Event(_, event)) => other(*event),
                Some(Heard::Pid(_)) => {}
                Some(Heard::End(end)) => {
                    bail!(
                        "the side in {} ended ({end:?}) before it {what}; it said:\n{}",
                        self.host,
                        self.messages()
                    );
                }
                None => bail!(
                    "{longest:?} have passed and the side in {} has not come so far that it {what}; it said:\n{}",
                    self.host,
                    self.messages()
                ),
            }
        }
    }

    /// Waits for its end; its events are handed to `other`.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn await_end(&mut self, longest: Duration, mut other: impl FnMut(Event)) -> Result<End> {
        let until = Instant::now() + longest;
        loop {
            if let Some(end) = &self.end {
                return Ok(end.clone());
            }
            match self.next(until) {
                Some(Heard::Event(_, event)) => other(*event),
                Some(Heard::End(_) | Heard::Pid(_)) => {}
                None => bail!(
                    "the side in {} lives on after {longest:?}; it said:\n{}",
                    self.host,
                    self.messages()
                ),
            }
        }
    }

    fn next(&mut self, until: Instant) -> Option<Heard> {
        let left = until.saturating_duration_since(Instant::now());
        match self.heard.recv_timeout(left) {
            Ok(Heard::End(end)) => {
                self.end = Some(end.clone());
                Some(Heard::End(end))
            }
            Ok(heard) => Some(heard),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                let end = End::Gone("nobody listens to it any more".into());
                Some(Heard::End(self.end.clone().unwrap_or(end)))
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Takes in what a side says until it ends or is not wanted any more, which ends it.
fn listen(session: &Session, tell: &Sender<Heard>, errors: &Mutex<String>, unwanted: &AtomicBool) {
    let mut line = Vec::new();
    while !unwanted.load(Ordering::Relaxed) {
        let end = match session.next(Instant::now() + LOOK) {
            Ok(None) => continue,
            Ok(Some(Happening::Output(bytes))) => {
                let now = Moment::now();
                for byte in bytes {
                    if byte != b'\n' {
                        line.push(byte);
                        continue;
                    }
                    // A line that is neither is none of ours to judge.
                    let heard = match serde_json::from_slice(&line) {
                        Ok(event) => Some(Heard::Event(now, event)),
                        Err(_) => serde_json::from_slice(&line).ok().map(Heard::Pid),
                    };
                    if let Some(heard) = heard {
                        let _ = tell.send(heard);
                    }
                    line.clear();
                }
                continue;
            }
            Ok(Some(Happening::Error(bytes))) => {
                let mut errors = lock(errors);
                errors.push_str(&String::from_utf8_lossy(&bytes));
                continue;
            }
            Ok(Some(Happening::Ended(code))) => End::Code(code),
            Ok(Some(Happening::Failed(why))) => End::Gone(why),
            Err(error) => End::Gone(format!("{error:#}")),
        };
        let _ = tell.send(Heard::End(end));
        return;
    }
}
