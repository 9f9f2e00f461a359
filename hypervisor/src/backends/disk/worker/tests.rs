//! The thread, and what two images hold after a loss at any step.

mod shared;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::config;
use crate::disk::RequestNumber;
use crate::protocol::{Identity, Record};

const SECTORS: usize = 8;

type Content = [u8; SECTORS];

/// An image of one byte a sector, and what of it survives the loss of its host.
#[derive(Clone, Debug, Default)]
struct Platter {
    /// What reads find.
    cache: Content,
    /// What is durable, and what else may or may not be: later writes behind earlier ones.
    durable: Content,
    unsynced: Vec<(usize, u8)>,
    mark: Option<Mark>,
    /// The steps that are left until the host is lost.
    fuel: usize,
    /// Writes fail from now on.
    full: bool,
}

impl Platter {
    fn new(fuel: usize) -> Self {
        Self {
            fuel,
            ..Self::default()
        }
    }

    /// One step; the host is lost instead if it has none left.
    fn step(&mut self) -> io::Result<()> {
        self.fuel = self
            .fuel
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("the host is lost"))?;
        Ok(())
    }

    /// What may be on it when the host comes back: any of what was not durable, each byte as one of its writes left it.
    fn after_the_loss(&self) -> [Content; 2] {
        let mut all = self.durable;
        for &(sector, byte) in &self.unsynced {
            all[sector] = byte;
        }
        [self.durable, all]
    }
}

impl Image for Platter {
    fn read(&mut self, data: &mut [u8], at: u64) -> io::Result<()> {
        for (n, sector) in data.chunks_mut(SECTOR as usize).enumerate() {
            sector.fill(self.cache[(at / SECTOR) as usize + n]);
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8], at: u64) -> io::Result<()> {
        for (n, bytes) in data.chunks(SECTOR as usize).enumerate() {
            self.step()?;
            if self.full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let sector = (at / SECTOR) as usize + n;
            self.cache[sector] = bytes[0];
            self.unsynced.push((sector, bytes[0]));
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.step()?;
        self.durable = self.cache;
        self.unsynced.clear();
        Ok(())
    }

    fn mark(&mut self, mark: &Mark) -> io::Result<()> {
        self.step()?;
        self.mark = Some(mark.clone());
        Ok(())
    }
}

fn request(number: u64, operation: Operation) -> Request {
    Request {
        number: RequestNumber(number),
        operation,
    }
}

fn write(number: u64, sector: u64, byte: u8) -> Request {
    let data = Data(vec![byte; 512]);
    let durable = false;
    request(
        number,
        Operation::Write {
            sector,
            data,
            durable,
        },
    )
}

fn flush(number: u64) -> Request {
    request(number, Operation::Flush)
}

fn read(number: u64, sector: u64) -> Request {
    request(
        number,
        Operation::Read {
            sector,
            length: 512,
        },
    )
}

const PRIMARY: Identity = Identity::from_bytes([1; 16]);
const BACKUP: Identity = Identity::from_bytes([2; 16]);

fn first() -> Record {
    Record::cold_start(None, PRIMARY, Some(BACKUP))
}

fn led(record: &Record, sure: bool) -> Mark {
    Mark {
        machine: "m".into(),
        stamp: Stamp::of(record),
        in_use: Use::Leads,
        sure,
        before: None,
    }
}

fn followed() -> Mark {
    Mark {
        stamp: Stamp::in_reign(&first(), BACKUP),
        in_use: Use::Follows,
        ..led(&first(), true)
    }
}

/// A pair's disks, its log and the arbiter's record, moved a step at a time: each request of the guest is logged, is done to the
/// primary's image, is told to the guest by the log, and is done to the backup's image some time.
struct World {
    primary: Engine<Platter>,
    backup: Engine<Platter>,
    record: Record,
    /// What a flush that the world has heard of covers.
    acknowledged: Content,
    /// The disk as its guest believes it to be.
    believed: Content,
    log: VecDeque<Request>,
    in_flight: VecDeque<Request>,
}

impl World {
    /// Every step of either host but so many succeeds.
    fn new(primary: usize, backup: usize) -> Self {
        Self {
            primary: Engine::new(Platter::new(primary)),
            backup: Engine::new(Platter::new(backup)),
            record: first(),
            acknowledged: [0; SECTORS],
            believed: [0; SECTORS],
            log: VecDeque::new(),
            in_flight: VecDeque::new(),
        }
    }

    /// What a guest does in one go: some writes, a flush.
    fn guest(round: u64) -> Vec<Request> {
        let first = 10 * round;
        let byte = round as u8;
        vec![
            write(first, round % 8, byte),
            write(first + 1, (round + 3) % 8, 100 + byte),
            read(first + 2, round % 8),
            flush(first + 3),
        ]
    }

    fn believe(&mut self, done: &Request) {
        match &done.operation {
            Operation::Write { sector, data, .. } => {
                self.believed[*sector as usize] = data.0[0];
            }
            Operation::Flush => self.acknowledged = self.believed,
            Operation::Read { .. } => {}
        }
    }

    /// The primary serves a round; the backup is `lag` requests behind with its image. False when the primary's host is lost.
    fn serve(&mut self, round: u64, lag: usize) -> bool {
        for request in Self::guest(round) {
            self.log.push_back(request.clone());
            let outcome = self.primary.serve(&request);
            if outcome.failure.is_some() {
                self.in_flight.push_back(request);
                return false;
            }
            // The guest is told by the log, which has committed before the world hears of what it led to.
            self.believe(&request);
            while self.log.len() > lag {
                let next = self.log.pop_front().unwrap();
                self.backup.follow(&next);
            }
        }
        true
    }

    /// The backup takes over: the claim, what the log still has, the mark, live; then what was under way. False when its host is lost
    /// in between.
    fn take_over(&mut self) -> bool {
        let claim = self.record.claimed_by(BACKUP).unwrap();
        self.record = claim;
        while let Some(next) = self.log.pop_front() {
            self.backup.follow(&next);
        }
        self.backup.mark(&led(&claim, false));
        if self.backup.failed.is_some() {
            return false;
        }
        self.record = claim.gone_live();
        for request in std::mem::take(&mut self.in_flight) {
            if self.backup.serve(&request).failure.is_some() {
                return false;
            }
            self.believe(&request);
        }
        self.backup.mark(&led(&self.record, true));
        self.backup.failed.is_none()
    }

    /// Both hosts are down, and come back. Each image on which the machine may be started has all that was acknowledged; at
    /// least one is there.
    fn cold_start(&self, what: &str) {
        let mut usable = 0;
        for (side, engine) in [("primary", &self.primary), ("backup", &self.backup)] {
            let platter = &engine.image;
            let Some(mark) = &platter.mark else { continue };
            if mark.judge("m", Some(&self.record)).is_err() {
                continue;
            }
            usable += 1;
            for content in platter.after_the_loss() {
                for (sector, &byte) in content.iter().enumerate() {
                    // What was acknowledged, or something that was written later.
                    let acknowledged = self.acknowledged[sector];
                    let round = |byte: u8| byte % 100;
                    assert!(
                        byte == acknowledged || round(byte) > round(acknowledged),
                        "{what}: the {side}'s sector {sector} holds {byte}, {acknowledged} was acknowledged"
                    );
                }
            }
        }
        assert!(usable >= 1, "{what}: the machine can be started nowhere");
    }
}

/// The primary's host is lost at any step of its disk, the backup's at any of its own, with its image any number of requests behind.
#[test]
fn nothing_acknowledged_is_lost_whichever_step_is_the_last() {
    const ROUNDS: u64 = 3;
    // The first two are those of its mark, before anything is asked.
    const STEPS: std::ops::Range<usize> = 2..41;
    let (mut losses, mut doubles) = (0, 0);
    for lag in [0, 1, 3, 100] {
        for primary in STEPS {
            for backup in STEPS {
                let what = format!("primary {primary}, backup {backup}, lag {lag}");
                let mut world = World::new(primary, backup);
                world.primary.mark(&led(&first(), true));
                world.backup.mark(&followed());
                let survived = (1..=ROUNDS).all(|round| world.serve(round, lag));
                if survived && world.backup.failed.is_some() {
                    // The backup was lost; its primary goes on alone, and then is lost as well.
                    world.record = world.record.detached();
                    world.cold_start(&what);
                    continue;
                }
                if survived {
                    continue;
                }
                losses += 1;
                if world.backup.failed.is_some() || !world.take_over() {
                    doubles += 1;
                    world.cold_start(&what);
                    continue;
                }
                // The heir goes on; the guest finds what it believes, read by read.
                for sector in 0..SECTORS as u64 {
                    let outcome = world.backup.serve(&read(900, sector));
                    assert_eq!(
                        outcome.done.data.0[0], world.believed[sector as usize],
                        "{what}"
                    );
                }
                world.cold_start(&what);
                // The one that was lost comes back: it is stale.
                let mark = world.primary.image.mark.as_ref().unwrap();
                assert!(mark.judge("m", Some(&world.record)).is_err(), "{what}");
            }
        }
    }
    assert!(losses > 100 && doubles > 50, "{losses} {doubles}");
}

#[test]
fn a_side_whose_write_failed_stays_of_no_use() {
    let mut engine = Engine::new(Platter::new(1000));
    engine.mark(&followed());
    engine.follow(&write(1, 0, 1));
    engine.image.full = true;
    engine.follow(&write(2, 1, 2));
    engine.image.full = false;
    engine.follow(&write(3, 2, 3));
    engine.mark(&led(&first(), true));
    assert!(engine.failed.is_some());
    assert_eq!(engine.image.cache[..3], [1, 0, 0], "it is left as it was");
    assert_eq!(engine.image.mark, Some(followed()));
}

#[test]
fn a_guest_is_told_what_its_disk_says_and_may_go_on() {
    let mut engine = Engine::new(Platter::new(1000));
    engine.image.full = true;
    let outcome = engine.serve(&write(1, 0, 1));
    assert_eq!(outcome.done.status, Status::Error);
    assert!(outcome.failure.is_some());
    engine.image.full = false;
    assert_eq!(engine.serve(&write(2, 0, 2)).done.status, Status::Good);
    let outcome = engine.serve(&read(3, 0));
    assert_eq!(outcome.done.data, Data(vec![2; 512]));
}

/// The kernel tells of a failed sync once. What was not written is lost all the same.
#[test]
fn after_a_sync_that_failed_none_is_believed() {
    let mut engine = Engine::new(Platter::new(1));
    assert_eq!(engine.serve(&write(1, 0, 1)).done.status, Status::Good);
    assert_eq!(engine.serve(&flush(2)).done.status, Status::Error);
    engine.image.fuel = 1000;
    assert_eq!(engine.serve(&flush(3)).done.status, Status::Error);
}

/// Whoever had the image before may have ended with writes in the host's cache alone. A guest that read them flushes to keep them.
#[test]
fn a_flush_covers_what_was_found_there() {
    let mut engine = Engine::new(Platter::new(1000));
    engine.image.cache[3] = 5;
    engine.image.unsynced.push((3, 5));
    assert_eq!(engine.serve(&read(1, 3)).done.data, Data(vec![5; 512]));
    assert_eq!(engine.serve(&flush(2)).done.status, Status::Good);
    assert_eq!(engine.image.durable[3], 5);
    engine.image.fuel = 0;
    let again = engine.serve(&flush(3));
    assert_eq!(again.done.status, Status::Good, "there is nothing to do");
}

#[test]
fn a_durable_write_is_durable_when_it_is_done() {
    let mut engine = Engine::new(Platter::new(1000));
    let mut durable = write(1, 4, 7);
    if let Operation::Write { durable, .. } = &mut durable.operation {
        *durable = true;
    }
    engine.serve(&durable);
    assert_eq!(engine.image.durable[4], 7);
}

fn started(image: impl Image + 'static) -> Disk {
    let off = config::Sandbox {
        enabled: false,
        strict: false,
    };
    let sandbox = Sandbox::prepare(&off).unwrap();
    Disk::start(image, "m", Arc::new(Wake::new().unwrap()), sandbox).unwrap()
}

fn outcome(disk: &Disk) -> Outcome {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(outcome) = disk.outcome() {
            return outcome;
        }
        assert!(Instant::now() < until, "nothing came of it");
        std::thread::yield_now();
    }
}

#[test]
fn requests_are_done_in_their_order() {
    let disk = started(Platter::new(1000));
    for n in 0..50 {
        disk.serve(write(2 * n, 3, n as u8));
        disk.serve(read(2 * n + 1, 3));
    }
    for n in 0..50 {
        assert_eq!(outcome(&disk).done.number, RequestNumber(2 * n));
        let outcome = outcome(&disk);
        assert_eq!(outcome.done.number, RequestNumber(2 * n + 1));
        assert_eq!(outcome.done.data, Data(vec![n as u8; 512]));
    }
}

/// An image whose writes wait to be let.
struct Slow(mpsc::Receiver<()>, mpsc::Sender<()>);

impl Image for Slow {
    fn read(&mut self, _: &mut [u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &[u8], _: u64) -> io::Result<()> {
        let _ = self.1.send(());
        self.0.recv().map_err(io::Error::other)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn mark(&mut self, _: &Mark) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn one_that_follows_waits_for_its_disk_once_too_much_is_behind() {
    let (lets, allowed) = mpsc::channel();
    let (tells, began) = mpsc::channel();
    let disk = Arc::new(started(Slow(allowed, tells)));
    let large = |number| {
        request(
            number,
            Operation::Write {
                sector: 0,
                data: Data(vec![0; 512 << 10]),
                durable: false,
            },
        )
    };
    let most = FOLLOW_BYTES / ((512 << 10) + AROUND);
    for n in 0..most {
        disk.follow(large(n as u64)).unwrap();
    }
    began.recv().unwrap();
    let (says, said) = mpsc::channel();
    let follower = Arc::clone(&disk);
    let waiting = std::thread::spawn(move || {
        let outcome = follower.follow(large(99));
        says.send(()).unwrap();
        outcome
    });
    assert!(said.recv_timeout(Duration::from_millis(50)).is_err());
    lets.send(()).unwrap();
    said.recv_timeout(Duration::from_secs(20)).unwrap();
    waiting.join().unwrap().unwrap();
    // Its disk is gone: everything ends, and says so.
    drop(lets);
    assert!(disk.settle().is_err());
    assert!(disk.follow(large(100)).is_err() && disk.failure().is_some());
}

#[test]
fn a_mark_stands_behind_what_was_given_before_it() {
    let disk = started(Platter::new(1000));
    disk.follow(write(1, 0, 1)).unwrap();
    disk.follow(flush(2)).unwrap();
    disk.follow(flush(3)).unwrap();
    disk.may_lead(Some(Stamp::of(&first())));
    disk.take_over().unwrap();
    disk.end(Stamp::of(&first())).unwrap();
    let failing = started(Platter::new(2));
    failing.follow(write(1, 0, 1)).unwrap();
    failing.may_lead(Some(Stamp::of(&first())));
    assert!(failing.take_over().is_err(), "the mark did not get there");
}

/// Whoever waits for a disk whose thread a bug has ended waits no longer, and has no copy.
#[test]
fn nobody_waits_for_a_thread_that_a_bug_has_ended() {
    struct Buggy;

    impl Image for Buggy {
        fn read(&mut self, _: &mut [u8], _: u64) -> io::Result<()> {
            panic!("a bug")
        }

        fn write(&mut self, _: &[u8], _: u64) -> io::Result<()> {
            panic!("a bug")
        }

        fn sync(&mut self) -> io::Result<()> {
            panic!("a bug")
        }

        fn mark(&mut self, _: &Mark) -> io::Result<()> {
            panic!("a bug")
        }
    }

    let disk = started(Buggy);
    let (tell, told) = mpsc::channel();
    let waiting = std::thread::spawn(move || {
        // What was given before it is known, and after.
        for _ in 0..2 {
            disk.may_lead(Some(Stamp {
                epoch: 1,
                configuration: 1,
                owner: Identity::from_bytes([1; 16]),
            }));
            tell.send(disk.take_over().is_err()).unwrap();
        }
    });
    for _ in 0..2 {
        assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(true));
    }
    waiting.join().unwrap();
}
