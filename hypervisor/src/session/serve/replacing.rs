//! Another backup takes the old one's place while the machine is protected. Until the arbiter has swapped everything can be called off,
//! and the old one is what it was.
//!
//! ```text
//!  Copying ── few pages are left ──▶ Asked ── the arbiter answers ──▶ Standing ── whole, and swapped ──▶ (none)
//!     │ the old one is lost            │                                │ called off
//!     ▼                                └──────────▶ Over ◀──────────────┘
//!  (it joins as any other)                            │ the recruiter has heard so
//!                                                     ▼
//!                                                   (none)
//! ```
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Event, Serving, mark};
use crate::config::Transport;
use crate::control::board::Command;
use crate::desk::{Answer, Ask};
use crate::handshake;
use crate::intervals::Replication;
use crate::orders::Order;
use crate::protocol::primary::{Action, Phase};
use crate::protocol::{Moment, Pair, Record};
use crate::ring_log::RingSink;
use crate::session::io::InputLane;
use crate::session::recruit::{News, Recruit, Taken};
use crate::session::report::Event as Said;
use crate::session::ring_epoch;

/// A backup that is to take the old one's place.
pub(super) struct Replacement {
    /// The operator's order, until it is known what became of it.
    order: Option<u64>,
    /// Where the operator wants it.
    to: Option<SocketAddr>,
    /// The recruiter is at work for it.
    recruiting: bool,
    step: Step,
}

/// How far it has come.
enum Step {
    /// It gets a copy.
    Copying,
    /// Few pages are left, and the arbiter is sounded: the recruiter's question to the guest's thread, by number, and the new log.
    Asked(u64, Box<RingSink>),
    /// The guest stands, or is about to, by the question of this number; since when.
    Standing(u64, Instant, Box<Parts>),
    /// Nothing comes of it.
    Over,
}

/// What leads to it.
#[derive(Default)]
struct Parts {
    taken: Option<Taken>,
    lane: Option<InputLane>,
    recruit: Option<Recruit>,
}

impl Serving {
    /// A backup is just taking the old one's place.
    pub(super) fn is_replacing(&self) -> bool {
        matches!(
            self.protocol.phase(),
            Phase::Sounding | Phase::Standing | Phase::Replacing
        )
    }

    /// The operator wants another backup, at this address or wherever one listens.
    pub(super) fn begin_replacement(
        &mut self,
        number: u64,
        to: Option<SocketAddr>,
    ) -> Result<(), String> {
        let refuse = |why: &str| Err(why.to_owned());
        if self.staff.replication == Replication::Checkpoint {
            return refuse(
                "this machine is replicated by checkpoints: its backup is replaced by ending it, and another one that listens joins",
            );
        }
        if self.protocol.is_about_to_switch() {
            return refuse("the machine is just being switched over");
        }
        if self.replacement.is_some() || self.is_replacing() {
            return refuse("a new backup is being given a copy already");
        }
        if self.protocol.phase() != Phase::Protected {
            return refuse("there is no backup now whose place another one could take");
        }
        if to.is_some() && self.staff.transport == Transport::Shm {
            return refuse(
                "over shared memory a backup listens at one place (pair.socket): leave --to out",
            );
        }
        let Some(recruiter) = &self.staff.recruiter else {
            return refuse(
                "this process was not told where backups may listen: start it with --standby",
            );
        };
        recruiter.replace(ring_epoch(self.protocol.record().epoch), to);
        self.replacement = Some(Replacement {
            order: Some(number),
            to,
            recruiting: true,
            step: Step::Copying,
        });
        Ok(())
    }

    /// Tells the operator what became of the order.
    fn replacement_came_to(&mut self, outcome: Result<String, String>) {
        let Some(it) = &mut self.replacement else {
            return;
        };
        let (order, command) = (it.order.take(), Command::MigrateBackup(it.to));
        if let Some(number) = order {
            self.tell_ordered(number, command, Some(outcome));
        }
    }

    /// Hears what is about a backup that is to take the old one's place; other news it gives back.
    pub(super) fn hear_of_newcomer(
        &mut self,
        news: News,
        now: Moment,
        actions: &mut Vec<Action>,
    ) -> Option<News> {
        let Some(it) = &mut self.replacement else {
            return Some(news);
        };
        match (news, &mut it.step) {
            (News::Cut(number, sink), Step::Copying) => match self.protocol.phase() {
                Phase::Protected => {
                    it.step = Step::Asked(number, sink);
                    self.protocol.handle(now, Event::Replace, actions);
                }
                // The old one was lost meanwhile.
                Phase::Unprotected => {
                    self.replacement = None;
                    return Some(News::Cut(number, sink));
                }
                _ => {
                    it.step = Step::Over;
                    self.refuse(number);
                }
            },
            (News::Cut(number, _), _) => self.refuse(number),
            (News::Taken(taken), Step::Standing(_, _, parts)) => parts.taken = Some(*taken),
            (News::Copied(lane), Step::Standing(_, _, parts)) => parts.lane = Some(*lane),
            (News::Taken(_) | News::Copied(_), _) => {}
            (News::Ready(recruit), Step::Standing(_, _, parts)) => {
                let pair = Pair {
                    machine: self.staff.machine,
                    me: self.staff.me,
                    peer: recruit.identity,
                };
                parts.recruit = Some(*recruit);
                it.recruiting = false;
                self.protocol.handle(now, Event::Joined(pair), actions);
            }
            // Its connection closes with this, and it listens again.
            (News::Ready(_), _) => self.replacement = None,
            (News::Failed { why, .. }, _) => {
                it.recruiting = false;
                let text = format!("the new backup does not take the old one's place: {why}");
                self.replacement_came_to(Err(text.clone()));
                self.io.reporter.say(&Said::Notice { text, loud: true });
                self.newcomer_failed(now, actions);
            }
        }
        None
    }

    fn newcomer_failed(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if let Some(Step::Standing(..)) = self.replacement.as_ref().map(|it| &it.step) {
            // The guest is to run on; with that it is called off.
            self.protocol.handle(now, Event::NewcomerLost, actions);
            return;
        }
        let joins = matches!(
            self.replacement.take().map(|it| it.step),
            Some(Step::Copying)
        );
        if joins && self.protocol.phase() == Phase::Unprotected {
            self.looking = false;
            self.look_again();
        }
    }

    /// The recruiter's question will not be answered by the guest's thread.
    fn refuse(&self, number: u64) {
        if let Some(recruiter) = &self.staff.recruiter {
            let why = "the old backup stays what it is, or is lost".to_owned();
            recruiter.desk.answer(number, Answer::Failed(why));
        }
    }

    /// The guest is to stand for the newcomer.
    pub(super) fn stand(&mut self) {
        let Some(it) = &mut self.replacement else {
            return;
        };
        match std::mem::replace(&mut it.step, Step::Over) {
            Step::Asked(number, sink) => {
                it.step = Step::Standing(number, Instant::now(), Box::default());
                self.io.stager.pause();
                if let Some(recruiter) = &self.staff.recruiter {
                    let ask = Ask::Stand(sink, self.io.stager.published());
                    recruiter.desk.leave(number, ask);
                }
                self.io.order(Order::Attend);
            }
            other => it.step = other,
        }
    }

    /// The protocol has the guest stand, and the newcomer was lost before that.
    pub(super) fn stands_for_nobody(&self) -> bool {
        let step = self.replacement.as_ref().map(|it| &it.step);
        self.protocol.phase() == Phase::Standing && !matches!(step, Some(Step::Standing(..)))
    }

    /// Nothing comes of a newcomer that had most of its copy.
    pub(super) fn call_off(&mut self, why: &str) {
        let number = match self.replacement.as_ref().map(|it| &it.step) {
            Some(&Step::Asked(number, _) | &Step::Standing(number, ..)) => number,
            _ => return,
        };
        if let Some(recruiter) = &self.staff.recruiter {
            // If it lies there still. Once the guest's thread has it, the next order ends it.
            drop(recruiter.desk.take());
        }
        self.refuse(number);
        self.replacement_came_to(Err(format!(
            "the new backup has not taken the old one's place in time: {why}"
        )));
        match &mut self.replacement {
            Some(it) if it.recruiting => it.step = Step::Over,
            it => *it = None,
        }
    }

    /// The old backup is lost. Whether the new one, of which most is still to be copied, joins in its stead.
    pub(super) fn newcomer_joins(&mut self) -> bool {
        self.call_off("the old one is lost, and the machine runs on UNPROTECTED");
        let copying = matches!(&self.replacement, Some(it) if matches!(it.step, Step::Copying));
        if copying {
            self.replacement_came_to(Err(
                "the old backup was lost meanwhile: the new one joins, and the machine is UNPROTECTED until it has"
                    .to_owned(),
            ));
        }
        copying
    }

    /// The newcomer is entitled, and the old backup is not: the guest runs on with its log.
    pub(super) fn replace(&mut self, record: &Record) {
        let ready = self.replacement.as_mut().and_then(|it| match &mut it.step {
            Step::Standing(_, since, parts) => Some((
                *since,
                parts.taken.take()?,
                parts.lane.take()?,
                parts.recruit.take()?,
            )),
            _ => None,
        });
        let (since, taken, lane, recruit) =
            ready.expect("the protocol replaces a backup by one that has joined");
        let io = &mut self.io;
        if let Some(old) = io.control.take() {
            // One that does not hear it loses its claim, and learns it so.
            let _ = handshake::agree(&old, record);
        }
        io.leave_log();
        io.orders.begin_log();
        self.fence_told = false;
        taken.in_step.store(true, Ordering::Relaxed);
        self.in_step = Some(Arc::clone(&taken.in_step));
        io.join_log(taken);
        io.stager.attach(lane);
        io.listen_to(Some(recruit.beats));
        io.tell_versions(&recruit.control);
        let _ = recruit.control.set_nonblocking(true);
        io.order(Order::BeginLog);
        let stood = since.elapsed();
        // As with one that joins: if it does not hear it, it asks the arbiter.
        let _ = handshake::agree(&recruit.control, record);
        io.control = Some(recruit.control);
        mark(io, record);
        let figures = recruit.figures;
        io.reporter.say(&Said::Joined {
            peer: recruit.identity.to_string(),
            stopped_us: stood.as_micros() as u64,
            took_us: figures.took.as_micros() as u64,
            bytes: figures.bytes,
            rounds: figures.rounds,
        });
        io.reporter.say(&Said::Paired {
            epoch: record.epoch.0,
            peer: recruit.identity.to_string(),
        });
        self.replacement_came_to(Ok(format!(
            "process {} protects it now; the guest stood {:.2} ms",
            recruit.identity,
            stood.as_secs_f64() * 1e3
        )));
        self.replacement = None;
    }
}
