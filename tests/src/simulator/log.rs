//! Logs from a primary to a backup's memory: commits, fences, and what gets lost.
#![forbid(unsafe_code)]

use hypervisor::protocol::primary::Phase;

use super::faults::Point;
use super::history::Node;
use super::process::{Input, Process, Role};
use super::world::{What, World};
use super::{MS, Micros, Plant};

/// What carries a simulation's logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// Memory of one host: an entry has committed when it was written.
    Shm,
    /// One-sided writes: the backup's process has no part in a commit.
    Nic,
    /// A stream: the backup's process takes an entry, and says so.
    Ack,
}

/// One log.
pub(super) struct Log {
    pub(super) writer: usize,
    pub(super) reader: usize,
    /// The newest entry in the reader's memory.
    pub(super) stored: (u64, Node),
    /// Entries given out.
    last: u64,
    /// The newest of which its writer knows that it has committed.
    committed: u64,
    pub(super) fenced: bool,
    /// The entry that hands the machine over, if it is on its way.
    hands_over: Option<u64>,
    /// Nothing overtakes what was sent before: when the newest arrives, there and back.
    there: Micros,
    back: Micros,
}

impl World {
    /// A log whose copy stands at `base`.
    pub(super) fn new_log(&mut self, writer: usize, reader: usize, base: Node) -> usize {
        self.logs.push(Log {
            writer,
            reader,
            stored: (0, base),
            last: 0,
            committed: 0,
            fenced: false,
            hands_over: None,
            there: 0,
            back: 0,
        });
        self.logs.len() - 1
    }

    /// The guest of a process makes a step, if it runs.
    pub(super) fn guest_step(&mut self, who: usize) -> Result<(), String> {
        let pace = 2 * MS + self.random.below(4 * MS);
        self.after(pace, What::Guest(who));
        self.cut_if_wanted(who);
        self.hand_over_if_wanted(who);
        self.stand_if_wanted(who);
        let process = &self.processes[who];
        if !process.runs || process.handing || process.stand_wanted {
            return Ok(());
        }
        let node = self.history.grow(self.processes[who].guest);
        let process = &mut self.processes[who];
        process.guest = node;
        let Some(log) = process.log else {
            if process.shut {
                process.held.push_back((0, node));
                return Ok(());
            }
            return self.release(who, node);
        };
        if self.carrier == Carrier::Shm && self.logs[log].fenced {
            // The vCPU thread meets the fence, and waits with its output in hand.
            self.refused(who, log);
            self.processes[who].held.push_back((u64::MAX, node));
            return Ok(());
        }
        self.logs[log].last += 1;
        let seq = self.logs[log].last;
        self.processes[who].held.push_back((seq, node));
        self.post(log, seq, node);
        if self.plant == Some(Plant::JoinerNotWaitedFor)
            && matches!(
                self.processes[who].phase(),
                Some(Phase::Joining | Phase::Entitling)
            )
        {
            return self.let_out(who, seq);
        }
        Ok(())
    }

    /// The guest of a process that is to hand the machine over stands, once all that it made has left; the log's last entry says so.
    fn hand_over_if_wanted(&mut self, who: usize) {
        let process = &mut self.processes[who];
        let Some(log) = process.log else { return };
        if !process.handing || !process.runs {
            return;
        }
        if !process.held.is_empty() {
            // It makes nothing more meanwhile.
            return;
        }
        process.handing = false;
        (process.runs, process.shut) = (false, true);
        let node = process.guest;
        if self.plant == Some(Plant::HandsOverAndRunsOn) {
            let process = &mut self.processes[who];
            (process.runs, process.shut, process.log) = (true, false, None);
        }
        if self.carrier == Carrier::Shm && self.logs[log].fenced {
            return self.refused(who, log);
        }
        self.logs[log].last += 1;
        let seq = self.logs[log].last;
        self.logs[log].hands_over = Some(seq);
        self.count("handed over");
        self.point(Point::HandedOver);
        self.post(log, seq, node);
    }

    fn post(&mut self, log: usize, seq: u64, node: Node) {
        let Log { writer, reader, .. } = self.logs[log];
        if self.carrier == Carrier::Shm {
            self.store(log, seq, node);
            let delay = self.random.below(200);
            self.after(delay, What::Committed(log, seq));
            return;
        }
        let when = self.stream(self.host(writer), self.host(reader), self.logs[log].there);
        self.logs[log].there = when;
        self.at(when, What::Arrives(log, seq, node));
    }

    /// An entry reaches the reader's host.
    pub(super) fn arrives(&mut self, log: usize, seq: u64, node: Node) {
        let Log { writer, reader, .. } = self.logs[log];
        if !self.processes[reader].alive {
            return;
        }
        if self.carrier == Carrier::Ack && self.now < self.processes[reader].frozen_until {
            // It lies in the socket's buffer.
            let thaw = self.processes[reader].frozen_until;
            return self.at(thaw, What::Arrives(log, seq, node));
        }
        let back = self.stream(self.host(reader), self.host(writer), self.logs[log].back);
        self.logs[log].back = back;
        if self.logs[log].fenced {
            return self.at(back, What::Refused(log));
        }
        if self.plant == Some(Plant::AckBeforeStore) {
            let late = self.random.below(20 * MS);
            self.after(late, What::Stored(log, seq, node));
        } else {
            self.store(log, seq, node);
        }
        self.at(back, What::Committed(log, seq));
    }

    /// An entry is in the reader's memory.
    pub(super) fn store(&mut self, log: usize, seq: u64, node: Node) {
        let entry = &mut self.logs[log];
        if entry.fenced || seq <= entry.stored.0 {
            return;
        }
        entry.stored = (seq, node);
        let reader = entry.reader;
        let handed = entry.hands_over == Some(seq);
        if handed && self.processes[reader].source == Some(log) {
            // When the vCPU thread has come so far.
            let late = self.random.below(5 * MS);
            self.after(late, What::Told(reader, Input::HandedOver(log)));
        }
        if self.processes[reader].source == Some(log) {
            self.deliver(reader, Input::LogTraffic(log));
        }
    }

    /// The writer learns that an entry has committed, and lets out what waited for it.
    pub(super) fn committed(&mut self, log: usize, seq: u64) -> Result<(), String> {
        let writer = self.logs[log].writer;
        let process = &self.processes[writer];
        if !process.alive || process.log != Some(log) {
            return Ok(());
        }
        if self.now < process.frozen_until {
            // It was about to let it out: it will, when it thaws, before it learns of anything else.
            let thaw = process.frozen_until;
            self.at(thaw, What::Committed(log, seq));
            return Ok(());
        }
        self.deliver(writer, Input::LogTraffic(log));
        self.logs[log].committed = self.logs[log].committed.max(seq);
        if self.processes[writer].shut {
            return Ok(());
        }
        self.let_out(writer, seq)
    }

    /// Lets out what has committed while the gate was shut.
    pub(super) fn let_out_committed(&mut self, who: usize, log: usize) -> Result<(), String> {
        self.let_out(who, self.logs[log].committed)
    }

    fn let_out(&mut self, who: usize, seq: u64) -> Result<(), String> {
        while let Some(&(needs, node)) = self.processes[who].held.front()
            && needs <= seq
        {
            self.processes[who].held.pop_front();
            self.release(who, node)?;
        }
        Ok(())
    }

    /// The writer's entry was refused: its vCPU thread stands still until the protocol decides.
    pub(super) fn refused(&mut self, who: usize, log: usize) {
        let process = &mut self.processes[who];
        if process.alive && process.log == Some(log) {
            process.runs = false;
            self.deliver(who, Input::LogFenced(log));
        }
    }

    /// The reader fences its log.
    pub(super) fn begin_fence(&mut self, who: usize) {
        let Some(log) = self.processes[who].source else {
            return;
        };
        let slow = !self.is_single() && self.random.below(100) < 25;
        let takes = self.random.below(if slow { 40 * MS } else { 3 * MS });
        let returns = match self.plant {
            Some(Plant::DrainBeforeFence) => 0,
            _ => takes + self.random.below(MS),
        };
        // The thread that fences freezes with its process.
        self.after(takes, What::FenceTakes(who, log));
        self.after(returns, What::Told(who, Input::Fenced));
    }

    pub(super) fn fence_takes(&mut self, who: usize, log: usize) {
        self.note(|world| format!("{}'s fence takes effect", world.processes[who].name));
        self.logs[log].fenced = self.plant != Some(Plant::NoFence);
        self.point(Point::Fenced);
    }

    /// The reader replays to the end.
    pub(super) fn begin_drain(&mut self, who: usize) {
        let slow = !self.is_single() && self.random.below(100) < 20;
        let span = self.random.below(if slow { 100 * MS } else { 2 * MS });
        self.after(span, What::Drains(who));
    }

    pub(super) fn drains(&mut self, who: usize) {
        let Some(log) = self.processes[who].source else {
            return;
        };
        let stored = self.logs[log].stored.1;
        let Process { role, guest, .. } = &mut self.processes[who];
        let Role::Backup { drained, .. } = role else {
            return;
        };
        // Not where a single fault must be survived: this would be a second one.
        if !self.plan.is_single() && self.random.below(100) < 4 {
            let unfit = hypervisor::protocol::Unfit::Corrupt("simulated".to_owned());
            return self.deliver(who, Input::Unfit(unfit));
        }
        (*guest, *drained) = (stored, true);
        self.deliver(who, Input::Drained);
    }
}
