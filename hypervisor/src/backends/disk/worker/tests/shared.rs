//! One image for both sides: the primary stops at any step, in the middle of a write too, and its heir, which holds some of the log, asks
//! again what its guest was not told of.

use rdma_log::Seq;

use super::*;
use crate::gate::{Committed, Gate, Sent};

/// What the log says of the disk.
#[derive(Clone, Debug)]
enum Entry {
    /// The guest asked.
    Made(Request),
    /// It was told what came of it.
    Told(RequestNumber),
}

/// A primary, its log, and the image.
struct Primary {
    engine: Engine<Platter>,
    gate: Gate<Request>,
    queue: VecDeque<Request>,
    /// What came of requests, and is not told yet.
    outcomes: VecDeque<Outcome>,
    log: Vec<Entry>,
    /// Entries that the backup has, in any case.
    committed: usize,
    under_way: Vec<Request>,
    number: u64,
    /// Whether writes wait for their entry: the rule that is tested.
    gated: bool,
}

/// Some numbers, one after the other.
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % sides
    }
}

impl Primary {
    fn new(gated: bool) -> Self {
        Self {
            engine: Engine::new(Platter::new(usize::MAX)),
            gate: Gate::new(),
            queue: VecDeque::new(),
            outcomes: VecDeque::new(),
            log: Vec::new(),
            committed: 0,
            under_way: Vec::new(),
            number: 0,
            gated,
        }
    }

    /// The guest's next request, unless it has to wait for one that it overlaps, as in its device's queue.
    fn ask(&mut self, dice: &mut Dice) {
        self.number += 1;
        let (number, byte) = (self.number, self.number as u8);
        let (sector, sectors) = (dice.below(6), 1 + dice.below(3));
        let operation = match dice.below(8) {
            0 => Operation::Flush,
            1 | 2 => Operation::Read {
                sector,
                length: sectors as u32 * 512,
            },
            _ => Operation::Write {
                sector,
                data: Data(vec![byte; sectors as usize * 512]),
                durable: dice.below(4) == 0,
            },
        };
        let request = request(number, operation);
        let conflicts = |other: &Request| match (other.extent(), request.extent()) {
            (Some(one), Some(other)) => one.conflicts(other),
            _ => false,
        };
        if self.under_way.iter().any(conflicts) {
            return;
        }
        self.log.push(Entry::Made(request.clone()));
        self.under_way.push(request.clone());
        let reads = matches!(request.operation, Operation::Read { .. });
        if reads || !self.gated {
            self.queue.push_back(request);
        } else {
            self.gate
                .hold(Seq(self.log.len() as u64), Seq::ZERO, request);
        }
    }

    fn step(&mut self, dice: &mut Dice) {
        match dice.below(6) {
            0 | 1 => self.ask(dice),
            2 => {
                let behind = (self.log.len() - self.committed) as u64;
                self.committed += dice.below(behind + 1) as usize;
                let committed = Committed {
                    events: Seq(self.committed as u64),
                    inputs: Seq::ZERO,
                };
                let queue = &mut self.queue;
                self.gate.release(committed, |request| {
                    queue.push_back(request.clone());
                    Sent::Done
                });
            }
            3 | 4 => {
                if let Some(request) = self.queue.pop_front() {
                    self.outcomes.push_back(self.engine.serve(&request));
                }
            }
            _ => {
                if let Some(outcome) = self.outcomes.pop_front() {
                    let number = outcome.done.number;
                    self.log.push(Entry::Told(number));
                    self.under_way.retain(|request| request.number != number);
                }
            }
        }
    }
}

/// What differs from what the heir's guest may believe, if the primary stops after so many steps, and so many more of its disk's.
fn stopped(seed: u64, gated: bool) -> Option<String> {
    let mut dice = Dice(seed);
    let mut primary = Primary::new(gated);
    for _ in 0..dice.below(120) {
        primary.step(&mut dice);
    }
    // It stops in the middle of what its disk's thread does.
    primary.engine.image.fuel = dice.below(4) as usize;
    while let Some(request) = primary.queue.pop_front() {
        if primary.engine.serve(&request).failure.is_some() {
            break;
        }
    }
    // The heir holds what has committed, and may hold more that the fence left in the lanes.
    let more = (primary.log.len() - primary.committed) as u64;
    let held = primary.committed + dice.below(more + 1) as usize;
    let mut believed: Content = [0; SECTORS];
    let mut under_way: Vec<Request> = Vec::new();
    for entry in &primary.log[..held] {
        match entry {
            Entry::Made(request) => under_way.push(request.clone()),
            Entry::Told(number) => under_way.retain(|request| request.number != *number),
        }
        if let Entry::Made(request) = entry
            && let Operation::Write { sector, data, .. } = &request.operation
        {
            for n in 0..data.0.len() / 512 {
                believed[*sector as usize + n] = data.0[0];
            }
        }
    }
    let mut heir = Engine::new(primary.engine.image);
    heir.image.fuel = usize::MAX;
    for request in &under_way {
        let outcome = heir.serve(request);
        if let Operation::Read { sector, length } = request.operation {
            let sectors = length as usize / 512;
            let expected: Vec<u8> = believed[sector as usize..][..sectors]
                .iter()
                .flat_map(|&byte| [byte; 512])
                .collect();
            if outcome.done.data.0 != expected {
                return Some(format!("seed {seed}: {request:?} reads something else"));
            }
        }
    }
    let found = heir.image.cache;
    (found != believed).then(|| format!("seed {seed}: {found:?} for {believed:?}"))
}

#[test]
fn whatever_step_is_the_primarys_last_its_heir_finds_what_its_guest_believes() {
    for seed in 0..20_000 {
        if let Some(wrong) = stopped(seed, true) {
            panic!("{wrong}");
        }
    }
}

/// The test sees what the rule is for.
#[test]
fn writes_that_do_not_wait_for_their_entry_are_noticed() {
    let noticed = (0..2_000).filter(|&seed| stopped(seed, false).is_some());
    assert!(noticed.count() > 100);
}
