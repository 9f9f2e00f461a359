//! The desk between the thread that copies a running machine and the vCPU thread that runs it.
//!
//! ```text
//!  copier ── ask: watch ──▶ vCPU    from here on it is noted what the guest writes
//!         ── ask: changed ▶         what it has written since
//!         ── ask: cut ────▶         the guest stops: a checkpoint of what was written last, and the log goes on into the new ring
//!         ── ask: stand ──▶         the same, once all that the guest made has left; and it stands until it is known which log goes on
//! ```
//! The copier leaves one question, has the vCPU thread told ([`Order::Attend`](crate::orders::Order::Attend)), and waits for the
//! answer; meanwhile the guest runs. Questions have numbers, and answers carry them: one that was given up may still be answered.
#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rdma_log::Seq;
use rdma_log::locks::lock;

use crate::machine::Swept;

/// What is asked of the vCPU thread.
#[derive(Debug)]
pub enum Ask<S> {
    /// Note from now on what is written.
    Watch,
    /// Go on to say what was written since.
    Changed,
    /// Stop, take a checkpoint of what was written since, and log to this from there on.
    Cut(Box<S>),
    /// Let out all that was made, wait until the inputs lane has committed up to this, and take a checkpoint as for a cut. Then stand: an
    /// order says whether the log is this one from there on.
    Stand(Box<S>, Seq),
    /// There will be no copy after all.
    Forget,
}

/// What the vCPU thread answers.
#[derive(Debug)]
pub enum Answer {
    /// It notes.
    Watching,
    /// Written since it was last asked: a part of that.
    Changed(Swept),
    /// It has stopped, and runs again, or stands as it was asked to.
    Cut(Cut),
    /// It could not.
    Failed(String),
}

/// Where a copy and the log meet.
#[derive(Debug)]
pub struct Cut {
    /// The checkpoint: all that was written since the last answer.
    pub checkpoint: Vec<u8>,
    /// How long the guest stood.
    pub stopped: Duration,
}

/// One question at a time.
#[derive(Debug)]
pub struct Desk<S> {
    ask: Mutex<Option<(u64, Ask<S>)>>,
    answers: Sender<(u64, Answer)>,
}

impl<S> Desk<S> {
    /// An empty desk, and where its answers come out.
    #[must_use]
    pub fn new() -> (Self, Receiver<(u64, Answer)>) {
        let (answers, out) = channel();
        let ask = Mutex::new(None);
        (Self { ask, answers }, out)
    }

    /// Leaves a question; one that was not taken yet is forgotten.
    pub fn leave(&self, number: u64, ask: Ask<S>) {
        *lock(&self.ask) = Some((number, ask));
    }

    /// Takes the question, on the vCPU thread.
    pub fn take(&self) -> Option<(u64, Ask<S>)> {
        lock(&self.ask).take()
    }

    /// Answers the question of this number.
    pub fn answer(&self, number: u64, answer: Answer) {
        // Whoever asked is gone only with the process.
        let _ = self.answers.send((number, answer));
    }
}
