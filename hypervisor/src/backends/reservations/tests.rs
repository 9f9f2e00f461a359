use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::*;

/// A disk as the standards have it (SPC-4, 5.13; NVM Express 1.4, 8.8): a registration for each way to it, and one holder.
#[derive(Debug, Default)]
struct Drive {
    keys: BTreeMap<&'static str, u64>,
    holder: Option<&'static str>,
}

#[derive(Clone, Debug)]
struct Way(&'static str, Rc<RefCell<Drive>>);

impl Way {
    fn writes(&self) -> bool {
        let drive = self.1.borrow();
        drive.holder.is_none_or(|holder| holder == self.0)
    }

    fn has(&self, key: u64) -> Result<(), ReservationError> {
        match self.1.borrow().keys.get(self.0) {
            Some(own) if *own == key => Ok(()),
            _ => Err(ReservationError::Conflict),
        }
    }
}

impl Registry for Way {
    fn usable(&mut self) -> Result<(), ReservationError> {
        Ok(())
    }

    fn register(&mut self, key: u64) -> Result<(), ReservationError> {
        let mut drive = self.1.borrow_mut();
        if key != 0 {
            drive.keys.insert(self.0, key);
        } else {
            drive.keys.remove(self.0);
            drive.holder = drive.holder.filter(|holder| *holder != self.0);
        }
        Ok(())
    }

    fn reserve(&mut self, key: u64) -> Result<(), ReservationError> {
        self.has(key)?;
        let mut drive = self.1.borrow_mut();
        match drive.holder {
            Some(holder) if holder != self.0 => Err(ReservationError::Conflict),
            _ => {
                drive.holder = Some(self.0);
                Ok(())
            }
        }
    }

    fn preempt(&mut self, own: u64, victim: u64) -> Result<(), ReservationError> {
        self.has(own)?;
        let mut drive = self.1.borrow_mut();
        let others = |way: &'static str, key: u64| way != self.0 && key == victim;
        let victims: Vec<_> = drive.keys.iter().map(|(way, key)| (*way, *key)).collect();
        let victims: Vec<_> = victims
            .into_iter()
            .filter(|(way, key)| others(way, *key))
            .map(|(way, _)| way)
            .collect();
        if victims.is_empty() {
            return Err(ReservationError::Conflict);
        }
        for victim in victims {
            drive.keys.remove(victim);
            if drive.holder == Some(victim) {
                drive.holder = Some(self.0);
            }
        }
        Ok(())
    }

    fn release(&mut self, key: u64) -> Result<(), ReservationError> {
        self.has(key)?;
        let mut drive = self.1.borrow_mut();
        drive.holder = drive.holder.filter(|holder| *holder != self.0);
        Ok(())
    }
}

type Shared = Rc<RefCell<Drive>>;

fn identity(of: u8) -> Identity {
    Identity::from_bytes([of; 16])
}

fn process(way: &'static str, drive: &Shared, of: u8) -> Reservations<Way> {
    Reservations::new(Way(way, Rc::clone(drive)), identity(of))
}

/// A machine that runs, by this way.
fn started(way: &'static str, drive: &Shared, of: u8, before: &[u8]) -> Reservations<Way> {
    let mut primary = process(way, drive, of);
    let before: Vec<_> = before.iter().map(|of| identity(*of)).collect();
    primary.hold(&before).unwrap();
    primary.settle().unwrap();
    primary
}

fn refused(outcome: Result<(), ReservationError>) {
    assert!(
        matches!(outcome, Err(ReservationError::Conflict)),
        "{outcome:?}"
    );
}

#[test]
fn an_heir_takes_it_and_the_old_primary_writes_no_more() {
    let drive = Shared::default();
    let mut primary = started("a", &drive, 1, &[]);
    let mut backup = process("b", &drive, 2);
    backup.follow(identity(1)).unwrap();
    assert!(primary.registry.writes() && !backup.registry.writes());
    backup.take(identity(1)).unwrap();
    assert!(!primary.registry.writes() && backup.registry.writes());
    // The zombie finds out, and has no way back: its registration is gone.
    assert!(!primary.holds().unwrap());
    refused(primary.take(identity(2)));
    // Nor has the heir a second one to take it from.
    refused(backup.take(identity(1)));
    backup.settle().unwrap();
    assert!(backup.holds().unwrap());
    // Its own next backup, on the first host.
    let mut next = process("a", &drive, 3);
    next.follow(identity(2)).unwrap();
    assert!(backup.holds().unwrap());
    next.take(identity(2)).unwrap();
    assert!(next.registry.writes() && !backup.registry.writes());
}

/// It won a claim, stood still, and the machine went on without it: what it does then harms nobody.
#[test]
fn an_heir_that_comes_too_late_takes_it_from_nobody_else() {
    let drive = Shared::default();
    let mut primary = started("a", &drive, 1, &[]);
    let mut late = process("b", &drive, 2);
    late.follow(identity(1)).unwrap();
    let mut heir = process("c", &drive, 3);
    heir.follow(identity(1)).unwrap();
    heir.take(identity(1)).unwrap();
    // Also before it has its own key.
    refused(late.take(identity(1)));
    heir.settle().unwrap();
    refused(late.take(identity(1)));
    assert!(heir.registry.writes() && !primary.holds().unwrap());
}

#[test]
fn one_that_was_only_registered_has_nothing_to_be_taken() {
    let drive = Shared::default();
    let mut stranger = process("s", &drive, 9);
    stranger.hold(&[]).unwrap();
    let mut registered = process("a", &drive, 1);
    registered.settle().unwrap();
    let mut backup = process("b", &drive, 2);
    backup.follow(identity(1)).unwrap();
    refused(backup.take(identity(1)));
    assert!(stranger.registry.writes() && !backup.registry.writes());
}

#[test]
fn a_machine_that_starts_takes_it_from_whoever_is_known_to_be_gone_and_from_nobody_else() {
    let drive = Shared::default();
    let dead = started("a", &drive, 1, &[]);
    for before in [vec![], vec![identity(9)]] {
        refused(process("b", &drive, 2).hold(&before));
        assert!(dead.registry.writes());
    }
    let again = started("b", &drive, 2, &[1]);
    assert!(again.registry.writes() && !dead.registry.writes());
    // On the same host the next process has the way already.
    let next = started("b", &drive, 3, &[2]);
    assert!(next.registry.writes());
}

/// Everybody dies at each point of a take-over and of a start, and the machine starts again, on either host: from what the mark says there, and
/// from nothing else.
#[test]
fn after_every_death_the_next_start_finds_it() {
    for host in ["a", "b", "c"] {
        // An heir: before it takes, before the mark names it, before it has its own key, and after.
        for steps in 0..4 {
            let drive = Shared::default();
            let _primary = started("a", &drive, 1, &[]);
            let mut heir = process("b", &drive, 2);
            heir.follow(identity(1)).unwrap();
            if steps > 0 {
                heir.take(identity(1)).unwrap();
            }
            if steps > 2 {
                heir.settle().unwrap();
            }
            // As long as the image is as it was left, the mark names who left it, too.
            let named: &[u8] = if steps < 2 { &[1] } else { &[2, 1] };
            let again = started(host, &drive, 3, named);
            assert!(again.registry.writes(), "{host}, step {steps}");
            assert!(host == "b" || !heir.registry.writes());
        }
        // Two starts, one after the other: each of an image without a mark and of one with it, before the mark names them, and after.
        for (settles, before) in [(false, &[][..]), (false, &[1]), (true, &[]), (true, &[1])] {
            let drive = Shared::default();
            let _primary = (!before.is_empty()).then(|| started("c", &drive, 1, &[]));
            let identities: Vec<_> = before.iter().map(|of| identity(*of)).collect();
            for (way, of) in [("a", 2), ("b", 3)] {
                let mut starts = process(way, &drive, of);
                starts.hold(&identities).unwrap();
            }
            let named: Vec<u8> = if settles {
                let mut third = process("a", &drive, 4);
                third.hold(&identities).unwrap();
                third.settle().unwrap();
                [&[4], before].concat()
            } else {
                before.to_vec()
            };
            let again = started(host, &drive, 5, &named);
            assert!(again.registry.writes(), "{host}, {settles}, {before:?}");
        }
    }
}

#[test]
fn what_is_given_free_is_anybodys() {
    let drive = Shared::default();
    let mut primary = started("a", &drive, 1, &[]);
    let mut backup = process("b", &drive, 2);
    backup.follow(identity(1)).unwrap();
    // A backup has nothing to give free but its registration.
    backup.release().unwrap();
    assert!(primary.registry.writes() && !backup.registry.writes());
    primary.release().unwrap();
    assert!(drive.borrow().holder.is_none() && drive.borrow().keys.is_empty());
    started("c", &drive, 9, &[]);
    // What is somebody else's by now stays that.
    primary.release().unwrap();
    assert_eq!(drive.borrow().holder, Some("c"));
}

#[test]
fn keys_are_never_none_and_tell_processes_apart() {
    let mut keys: Vec<u64> = (0..=255)
        .flat_map(|of| [0, 1, 2].map(|which| key(identity(of), which)))
        .collect();
    assert!(!keys.contains(&0));
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 3 * 256);
}
