//! Who starts processes: an agent on each host that keeps a backup listening, and an operator who starts the machine anew when
//! nobody has a copy any more.
#![forbid(unsafe_code)]

use hypervisor::protocol::{Identity, State};

use super::MS;
use super::faults::HOSTS;
use super::process::{Clock, Process, Role, Starting};
use super::world::{What, World};

/// How long nobody must have had a copy before the operator believes it.
const SURE: u64 = 200 * MS;

impl World {
    fn new_process(&mut self, host: usize, role: Role) -> usize {
        let who = self.processes.len();
        let guest = self.history.begin();
        let drift = self.random.below(20_001) as i64 - 10_000;
        self.processes.push(Process {
            name: format!("{}{host}", (b'a' + (who % 26) as u8) as char),
            host,
            identity: Identity::from_bytes((who as u128 + 1).to_be_bytes()),
            again: 0,
            clock: Clock {
                offset: self.random.below(1 << 40),
                drift,
            },
            role,
            alive: true,
            frozen_until: 0,
            inbox: Default::default(),
            round_at: None,
            guest,
            runs: false,
            shut: false,
            held: Default::default(),
            handing: false,
            handed: false,
            log: None,
            source: None,
            connection: None,
            peer: None,
            asked: false,
            looking: false,
            newcomer: None,
            stand_wanted: false,
        });
        let first = self.random.below(4 * MS);
        self.after(first, What::Guest(who));
        who
    }

    /// The process on this host, if one lives.
    fn on(&self, host: usize) -> Option<usize> {
        (0..self.processes.len()).find(|&who| {
            let process = &self.processes[who];
            process.alive && process.host == host
        })
    }

    pub(super) fn start_backup(&mut self, host: usize) {
        if self.on(host).is_none() {
            let who = self.new_process(host, Role::Listening);
            self.note(|world| format!("{} listens", world.processes[who].name));
        }
    }

    pub(super) fn start_primary(&mut self, host: usize, cold: bool, alone: bool) {
        let starting = Starting {
            cold,
            alone,
            found: None,
            backup: None,
            begins: None,
        };
        let who = self.new_process(host, Role::Starting(starting));
        self.note(|world| {
            format!(
                "{} starts the machine{}{}",
                world.processes[who].name,
                if cold { ", cold" } else { "" },
                if alone { ", alone" } else { "" }
            )
        });
        self.ask_what_is(who)
            .expect("a new process has asked nothing before");
    }

    /// Its copy is of no use, and it waits for another primary.
    pub(super) fn listens_again(&mut self, who: usize) {
        let process = &mut self.processes[who];
        (process.role, process.source) = (Role::Listening, None);
        process.again += 1;
        process.asked = false;
        if let Some(connection) = process.connection.take() {
            self.hang_up(connection, who);
        }
    }

    /// The process is no more; the kernels of those that it was connected to hear of it.
    pub(super) fn end_process(&mut self, who: usize) {
        if !std::mem::replace(&mut self.processes[who].alive, false) {
            return;
        }
        self.note(|world| format!("{} is dead", world.processes[who].name));
        for connection in 0..self.connections.len() {
            if self.connections[connection].ends.contains(&who) {
                self.hang_up(connection, who);
            }
        }
        let delay = 20 * MS + self.random.below(300 * MS);
        let host = self.host(who);
        self.after(delay, What::Restarts(host));
    }

    /// Its host is no more, and comes back some time later.
    pub(super) fn vanish(&mut self, who: usize) {
        self.processes[who].alive = false;
        self.note(|world| format!("{} vanishes", world.processes[who].name));
        for connection in &mut self.connections {
            if connection.ends.contains(&who) {
                connection.open = false;
            }
        }
        let delay = 100 * MS + self.random.below(500 * MS);
        let host = self.host(who);
        self.after(delay, What::Restarts(host));
    }

    /// The operator looks whether anybody has a copy. A process that is frozen counts: nobody can tell it from one that works.
    pub(super) fn operate(&mut self) {
        self.after(50 * MS, What::Operator);
        if self.processes.iter().any(Process::has_a_stake) {
            self.abandoned_since = None;
            return;
        }
        let since = *self.abandoned_since.get_or_insert(self.now);
        if self.now - since < SURE {
            return;
        }
        self.abandoned_since = None;
        let host = self.random.below(HOSTS as u64) as usize;
        if let Some(listener) = self.on(host) {
            self.processes[listener].alive = false;
        }
        let ended = self
            .ballot
            .record
            .is_none_or(|record| record.state == State::Ended);
        let alone = self.random.below(2) == 0;
        self.count("started anew");
        self.start_primary(host, !ended, alone);
    }
}
