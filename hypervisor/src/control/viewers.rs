//! Those who look at the guest's console: each gets what was let out, from where it asked, and may type.
//!
//! All of them may type, as at a terminal that is shared. What is typed is taken from a viewer only as there is room for it with the guest, so
//! a paste is slowed down and not lost. None can hold anything up: the bytes stay in the [`Spool`] whether they are taken or not, and a viewer
//! that takes none is dropped.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::backends::wait::Waiter;
use crate::spool::Spool;
use crate::stage::Stage;

/// Viewers at once: some people and a program or two.
pub(super) const MOST: usize = 8;

/// A viewer that takes nothing of what there is for so long is dropped.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two deliveries: too short to be seen when a key is echoed, and a guest that prints byte by byte wakes this thread no oftener.
const PACE: Duration = Duration::from_millis(3);

/// Between two looks whether the guest has taken what was typed.
const ROOM: Duration = Duration::from_millis(5);

/// The most that one viewer is given at a time: some 5 MB/s.
const AT_ONCE: usize = 16 << 10;

#[derive(Debug)]
struct Viewer {
    stream: UnixStream,
    /// What is to be said before the console's bytes.
    hello: Vec<u8>,
    /// Came with the request.
    typed: Vec<u8>,
    /// The next byte of the console's.
    at: u64,
    /// Since when it takes nothing.
    stuck: Option<Instant>,
    wait: Option<usize>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Viewers {
    list: Vec<Viewer>,
    delivered: Option<Instant>,
    /// The spool's descriptor in the last wait.
    fed: Option<usize>,
}

impl Viewers {
    /// Whether no more are taken.
    pub(super) fn is_full(&self) -> bool {
        self.list.len() >= MOST
    }

    /// Takes one in, who is told `hello` and then what there is from this byte on; `typed` it has sent already.
    pub(super) fn admit(&mut self, stream: UnixStream, hello: Vec<u8>, at: u64, typed: Vec<u8>) {
        self.list.push(Viewer {
            stream,
            hello,
            typed,
            at,
            stuck: None,
            wait: None,
        });
    }

    /// Adds to a wait those who may type or are owed something; when to look again at the latest.
    pub(super) fn wait(
        &mut self,
        waiter: &mut Waiter,
        spool: &Spool,
        stage: Option<&Stage>,
        now: Instant,
    ) -> Option<Instant> {
        if self.list.is_empty() {
            self.fed = None;
            return None;
        }
        let mut again = now + PATIENCE;
        let room = stage.is_some_and(|stage| stage.typing_room() > 0);
        if !room {
            again = now + ROOM;
        }
        let due = self.delivered.map_or(now, |delivered| delivered + PACE);
        if due <= now {
            // Before the head is looked at: what comes after that look rings.
            spool.wake().clear();
            spool.want();
        }
        let head = spool.head();
        let mut owed = false;
        for viewer in &mut self.list {
            let owes = !viewer.hello.is_empty() || viewer.at < head;
            owed |= owes;
            let write = owes && due <= now;
            // One that cannot type just now is not waited for: its end is seen once it can.
            viewer.wait = (room || write).then(|| waiter.add(&viewer.stream, room, write));
        }
        if owed && due > now {
            again = again.min(due);
        }
        self.fed = (due <= now).then(|| waiter.add(spool.wake(), true, false));
        if self.fed.is_none() {
            again = again.min(due);
        }
        Some(again)
    }

    /// The role is over, and nothing more comes: sends what there is, as far as it is taken at once.
    pub(super) fn last_words(&mut self, spool: &Spool, now: Instant) {
        for viewer in &mut self.list {
            let mut before = None;
            while viewer.at < spool.head()
                && before.replace(viewer.at) != Some(viewer.at)
                && viewer.deliver(spool, now)
            {}
        }
    }

    /// Turns to each that is ready, after a wait; drops who has gone and who does not read.
    pub(super) fn turn(
        &mut self,
        waiter: &Waiter,
        spool: &Spool,
        stage: Option<&Stage>,
        now: Instant,
    ) {
        let mut delivered = false;
        self.list.retain_mut(|viewer| {
            if let Some(stage) = stage {
                let rest = type_some(stage, &viewer.typed);
                viewer.typed.drain(..rest);
            }
            let Some(index) = viewer.wait.take() else {
                return viewer.is_patient(now);
            };
            let ready = waiter.ready(index);
            let mut kept = true;
            if ready.write {
                delivered = true;
                kept = viewer.deliver(spool, now);
            }
            if kept && (ready.read || ready.hung_up || ready.failed) {
                kept = viewer.listen(stage);
            }
            kept && viewer.is_patient(now)
        });
        if delivered {
            self.delivered = Some(now);
        }
        for viewer in &mut self.list {
            let owes = !viewer.hello.is_empty() || viewer.at < spool.head();
            if !owes {
                viewer.stuck = None;
            } else if viewer.stuck.is_none() {
                viewer.stuck = Some(now);
            }
        }
    }
}

impl Viewer {
    fn is_patient(&self, now: Instant) -> bool {
        self.stuck
            .is_none_or(|since| now.saturating_duration_since(since) < PATIENCE)
    }

    /// Sends what there is. False: it is to be dropped.
    fn deliver(&mut self, spool: &Spool, now: Instant) -> bool {
        while !self.hello.is_empty() {
            match self.stream.write(&self.hello) {
                Ok(count) => {
                    self.hello.drain(..count);
                    self.stuck = None;
                }
                Err(error) => return is_transient(error.kind()),
            }
        }
        let mut bytes = [0; AT_ONCE];
        // One whose bytes were overwritten is too slow: it may come again, and is told then what it missed.
        let Ok(count) = spool.copy(self.at, &mut bytes) else {
            return false;
        };
        match self.stream.write(&bytes[..count]) {
            Ok(count) => {
                self.at += count as u64;
                self.stuck = Some(now).filter(|_| count == 0 && self.at < spool.head());
                true
            }
            Err(error) => is_transient(error.kind()),
        }
    }

    /// Takes what was typed. False: nobody is there any more.
    fn listen(&mut self, stage: Option<&Stage>) -> bool {
        let room = stage.map_or(0, Stage::typing_room);
        let mut bytes = [0; 256];
        if room == 0 || !self.typed.is_empty() {
            return true;
        }
        match self.stream.read(&mut bytes[..room.min(256)]) {
            Ok(0) => false,
            Ok(count) => {
                if let Some(stage) = stage {
                    let taken = type_some(stage, &bytes[..count]);
                    self.typed.extend_from_slice(&bytes[taken..count]);
                }
                true
            }
            Err(error) => is_transient(error.kind()),
        }
    }
}

/// Types as many of these bytes as there is room for; how many.
fn type_some(stage: &Stage, bytes: &[u8]) -> usize {
    let count = bytes.len().min(stage.typing_room());
    for &byte in &bytes[..count] {
        stage.type_byte(byte);
    }
    count
}

fn is_transient(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
