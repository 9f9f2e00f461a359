//! The arbiter: one record, compared and swapped whole; reached late, twice, or not at all, and answers that get lost.
#![forbid(unsafe_code)]

use hypervisor::protocol::{Answer, Record, Request, State};

use super::faults::{ARBITER, Point};
use super::process::{Input, Role};
use super::world::{What, World};
use super::{MS, Micros, Plant};

/// What is asked: by a machine of the protocol, or by a process that begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asked {
    Protocol(Request),
    /// The first swap of a reign, from what was found.
    Begin(Option<Record>, Record),
}

/// Who asked: a process, as what it was then. One that has given its copy up since hears no answer to what it asked before: the
/// program waits for an answer before it gives a copy up, and so is later than its simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asker {
    pub(super) who: usize,
    again: u64,
}

/// The arbiter's state.
#[derive(Default)]
pub(super) struct Ballot {
    pub(super) record: Option<Record>,
    pub(super) slow_until: Micros,
}

impl World {
    /// A process asks.
    pub(super) fn ask(&mut self, who: usize, asked: Asked) -> Result<(), String> {
        self.note(|world| format!("{} asks: {}", world.processes[who].name, describe(asked)));
        if std::mem::replace(&mut self.processes[who].asked, true) {
            return Err(format!(
                "{} asks a second question before the first is answered",
                self.processes[who].name
            ));
        }
        self.moment_of(asked);
        let asker = self.asker(who);
        let host = self.host(who);
        let there = self.way();
        let down = self.is_cut(host, ARBITER);
        let flaky = !self.is_calm() && !self.is_single() && self.random.below(100) < 5;
        if !down && !flaky {
            self.after(there, What::Decides(asker, asked, true));
            return Ok(());
        }
        self.count("questions that failed");
        // It fails: never sent, or carried out and the answer lost, or carried out only later.
        let chance = match (down, self.is_single()) {
            // A swap that lands where its answer cannot come back leaves a machine that waits for it, and nobody else may
            // serve: that takes a cut to which only one direction is deaf, a second fault.
            (true, true) => 0,
            (true, false) => 20,
            (false, _) => 70,
        };
        let sent = self.random.below(100) < chance;
        if sent {
            let late = if self.random.below(2) == 0 {
                60 * MS
            } else {
                0
            };
            self.after(there + late, What::Decides(asker, asked, false));
        }
        let may_have_landed = sent || self.random.below(2) == 0;
        self.no_answer(asker, there, may_have_landed);
        Ok(())
    }

    fn moment_of(&mut self, asked: Asked) {
        let Asked::Protocol(Request::Swap { from, to }) = asked else {
            return;
        };
        match to.state {
            State::Claimed => self.point(Point::Claiming),
            State::Live if from.state == State::Live && to.entitled.is_some() => {
                self.point(Point::Entitling);
            }
            State::Live if from.state == State::Live => self.point(Point::Detaching),
            _ => {}
        }
    }

    fn way(&mut self) -> Micros {
        let span = 100 + self.random.below(8 * MS);
        if self.now < self.ballot.slow_until {
            span * 20
        } else {
            span
        }
    }

    fn no_answer(&mut self, asker: Asker, there: Micros, may_have_landed: bool) {
        let wait = there + self.random.below(20 * MS);
        let answer = Answer::Failed {
            may_have_landed,
            why: "simulated".to_owned(),
        };
        self.after(wait, What::Told(asker.who, Input::Answer(asker, answer)));
    }

    /// Who asks now.
    pub(super) fn asker(&self, who: usize) -> Asker {
        let again = self.processes[who].again;
        Asker { who, again }
    }

    /// The arbiter carries a question out.
    pub(super) fn decide(
        &mut self,
        asker: Asker,
        asked: Asked,
        answered: bool,
    ) -> Result<(), String> {
        let who = asker.who;
        let answer = match asked {
            Asked::Protocol(Request::Read) => Answer::Read(self.ballot.record),
            Asked::Protocol(Request::Swap { from, to }) => self.swap(who, Some(from), to)?,
            Asked::Begin(from, to) => self.swap(who, from, to)?,
        };
        if !answered {
            return Ok(());
        }
        let back = self.way();
        if self.is_cut(ARBITER, self.host(who)) {
            self.no_answer(asker, back, true);
        } else {
            self.after(back, What::Told(who, Input::Answer(asker, answer)));
        }
        Ok(())
    }

    fn swap(&mut self, who: usize, from: Option<Record>, to: Record) -> Result<Answer, String> {
        let found = self.ballot.record;
        if found == Some(to) {
            return Ok(Answer::Swapped);
        }
        let equal = match self.plant {
            Some(Plant::NoArbiter) => true,
            Some(Plant::ClaimFromRecordJustRead) => {
                found == from || matches!(self.processes[who].role, Role::Backup { .. })
            }
            Some(Plant::StaleBackup) => {
                let key = |r: Record| (r.epoch, r.state, r.owner);
                found.map(key) == from.map(key)
            }
            _ => found == from,
        };
        if !equal {
            return Ok(Answer::Lost(found));
        }
        let falls = found.is_some_and(|found| to.rank() <= found.rank());
        let compares = !matches!(
            self.plant,
            Some(Plant::NoArbiter | Plant::ClaimFromRecordJustRead | Plant::StaleBackup)
        );
        if falls && compares {
            return Err(format!("the record fell to {to}"));
        }
        self.note(|_| format!("the record is {to}"));
        self.ballot.record = Some(to);
        let point = match (to.state, from.map(|record| record.state)) {
            (State::Claimed, _) => Some(Point::Claimed),
            (State::Live, Some(State::Claimed)) => Some(Point::Live),
            (State::Live, _) if to.entitled.is_some() => Some(Point::Entitled),
            (State::Live, _) => Some(Point::Detached),
            _ => None,
        };
        self.count(match (point, to.state) {
            (Some(Point::Claimed), _) => "claimed",
            (Some(Point::Live), _) if to.epoch != from.map_or(to.epoch, |r| r.epoch) => "reclaimed",
            (Some(Point::Live), _) => "taken over",
            (Some(Point::Entitled), _) => "entitled",
            (Some(Point::Detached), _) if from.is_some_and(|r| r.state == State::Abandoned) => {
                "reclaimed"
            }
            (Some(Point::Detached), _) => "detached or alone",
            (_, State::Abandoned) => "abandoned",
            _ => "ended",
        });
        if let Some(point) = point {
            self.point(point);
        }
        Ok(Answer::Swapped)
    }
}

fn describe(asked: Asked) -> String {
    match asked {
        Asked::Protocol(Request::Read) => "what is the record?".to_owned(),
        Asked::Protocol(Request::Swap { to, .. }) => format!("let it be {to}"),
        Asked::Begin(_, to) => format!("let it begin as {to}"),
    }
}
