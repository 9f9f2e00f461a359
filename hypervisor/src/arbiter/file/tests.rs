use super::*;
use crate::arbiter::{ask, random_identity};
use crate::protocol::record::Identity;
use crate::protocol::{Answer, Request};
use std::os::unix::fs::PermissionsExt;
use std::sync::Barrier;
use tempfile::TempDir;

fn who(n: u8) -> Identity {
    Identity::from_bytes([n; 16])
}

fn shared() -> (TempDir, FileArbiter) {
    let directory = TempDir::new().unwrap();
    let arbiter = open(&directory);
    (directory, arbiter)
}

fn open(directory: &TempDir) -> FileArbiter {
    FileArbiter::open(directory.path(), "kv", Durability::PowerLoss).unwrap()
}

fn start(arbiter: &FileArbiter) -> Record {
    let live = Record::cold_start(None, who(1), Some(who(2)));
    assert_eq!(arbiter.swap(None, &live).unwrap(), Swap::Done);
    live
}

fn names(arbiter: &FileArbiter) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(&arbiter.home)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_machine_that_never_ran_has_no_record_and_leaves_no_trace() {
    let (directory, arbiter) = shared();
    assert_eq!(arbiter.read().unwrap(), None);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_swap_from_the_record_takes_effect_and_a_swap_from_another_is_lost() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let claimed = live.claimed_by(who(2)).unwrap();
    let detached = live.detached();
    assert_eq!(arbiter.swap(Some(&live), &detached).unwrap(), Swap::Done);
    assert_eq!(
        arbiter.swap(Some(&live), &claimed).unwrap(),
        Swap::Lost(Some(detached))
    );
    assert_eq!(
        arbiter.swap(None, &claimed).unwrap(),
        Swap::Lost(Some(detached))
    );
    assert_eq!(arbiter.read().unwrap(), Some(detached));
    assert_eq!(names(&arbiter).len(), 2, "{:?}", names(&arbiter));
}

#[test]
fn a_swap_that_is_repeated_after_a_lost_answer_counts_as_done_once() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let claimed = live.claimed_by(who(2)).unwrap();
    for _ in 0..3 {
        assert_eq!(arbiter.swap(Some(&live), &claimed).unwrap(), Swap::Done);
    }
    assert_eq!(names(&arbiter).len(), 2);
    let reclaimed = claimed.reclaimed_by(who(1));
    assert_eq!(
        arbiter.swap(Some(&claimed), &reclaimed).unwrap(),
        Swap::Done
    );
    assert_eq!(
        arbiter.swap(Some(&live), &claimed).unwrap(),
        Swap::Lost(Some(reclaimed))
    );
}

#[test]
fn machines_in_one_directory_do_not_meet() {
    let (directory, arbiter) = shared();
    let live = start(&arbiter);
    let other = FileArbiter::open(directory.path(), "db", Durability::PowerLoss).unwrap();
    assert_eq!(other.read().unwrap(), None);
    let claimed = live.claimed_by(who(2)).unwrap();
    assert_eq!(other.swap(Some(&live), &claimed).unwrap(), Swap::Lost(None));
    assert_eq!(arbiter.read().unwrap(), Some(live));
}

#[test]
fn only_a_won_claim_yields_a_claim() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let claimed = live.claimed_by(who(2)).unwrap();
    let request = Request::Swap {
        from: live,
        to: claimed,
    };

    let (answer, claim) = ask(&arbiter, &Request::Read);
    assert_eq!((answer, claim.is_none()), (Answer::Read(Some(live)), true));
    let (answer, claim) = ask(&arbiter, &request);
    assert_eq!(answer, Answer::Swapped);
    assert_eq!(*claim.unwrap().record(), claimed);
    // Its answer got lost: the repeated request yields it as well.
    assert_eq!(ask(&arbiter, &request).1.unwrap().epoch(), claimed.epoch);

    let to = claimed.gone_live();
    let (answer, claim) = ask(&arbiter, &Request::Swap { from: claimed, to });
    assert_eq!((answer, claim.is_none()), (Answer::Swapped, true));
    let (answer, claim) = ask(&arbiter, &request);
    assert_eq!((answer, claim.is_none()), (Answer::Lost(Some(to)), true));
}

#[test]
fn of_many_at_once_exactly_one_wins() {
    const RIVALS: u8 = 6;
    let (directory, arbiter) = shared();
    let mut record = start(&arbiter);
    for _round in 0..20 {
        let barrier = Barrier::new(usize::from(RIVALS));
        let winners: Vec<Record> = std::thread::scope(|scope| {
            let rival = |n: u8| {
                let (arbiter, barrier, from) = (open(&directory), &barrier, record);
                scope.spawn(move || {
                    let to = Record::cold_start(Some(&from), who(10 + n), None);
                    barrier.wait();
                    match arbiter.swap(Some(&from), &to) {
                        Ok(Swap::Done) => Some(to),
                        Ok(Swap::Lost(found)) => {
                            assert_ne!(found, Some(from));
                            assert_ne!(found, Some(to));
                            None
                        }
                        Err(error) => panic!("{error}"),
                    }
                })
            };
            let rivals: Vec<_> = (0..RIVALS).map(rival).collect();
            rivals
                .into_iter()
                .filter_map(|rival| rival.join().unwrap())
                .collect()
        });
        assert_eq!(winners.len(), 1);
        record = winners[0];
        assert_eq!(arbiter.read().unwrap(), Some(record));
    }
}

/// Leaves the directory as a process leaves it that dies after `steps` steps of a swap.
fn die_after(steps: usize, arbiter: &FileArbiter, number: u64, to: &Record) {
    let aside = arbiter.aside(to);
    let text = text::write("kv", to);
    let all: [&dyn Fn(); 5] = [
        &|| arbiter.make_home().unwrap(),
        &|| fs::write(&aside, "").unwrap(),
        &|| fs::write(&aside, &text[..text.len() / 2]).unwrap(),
        &|| fs::write(&aside, &text).unwrap(),
        &|| fs::hard_link(&aside, arbiter.path(number)).unwrap(),
    ];
    all.iter().take(steps).for_each(|step| step());
}

#[test]
fn a_death_at_any_step_leaves_the_old_record_or_the_new_one() {
    for steps in 0..=5 {
        for first in [true, false] {
            let (_directory, arbiter) = shared();
            let (from, number) = if first {
                (None, 1)
            } else {
                (Some(start(&arbiter)), 2)
            };
            let to = match &from {
                None => Record::cold_start(None, who(1), Some(who(2))),
                Some(live) => live.claimed_by(who(2)).unwrap(),
            };
            die_after(steps, &arbiter, number, &to);
            let landed = steps == 5;
            let now = if landed { Some(to) } else { from };
            assert_eq!(arbiter.read().unwrap(), now, "{steps} steps");

            // The same process (it only lost the answer) and another one can both go on from here.
            if landed {
                assert_eq!(arbiter.swap(from.as_ref(), &to).unwrap(), Swap::Done);
            }
            let next = Record::cold_start(now.as_ref(), who(3), None);
            assert_eq!(arbiter.swap(now.as_ref(), &next).unwrap(), Swap::Done);
            assert_eq!(arbiter.read().unwrap(), Some(next));
        }
    }
}

#[test]
fn a_file_aside_that_already_has_a_number_is_never_written_into() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    // The owner dies between its link and the removal of the name aside...
    let detached = Record {
        owner: who(1),
        ..live.detached()
    };
    die_after(5, &arbiter, 2, &detached);
    // ...no: it lives, takes the answer for lost, and swaps again under the same name aside.
    assert_eq!(
        arbiter.swap(Some(&detached), &detached.ended()).unwrap(),
        Swap::Done
    );
    assert_eq!(arbiter.load(2).unwrap(), Some(detached));
    assert_eq!(arbiter.load(3).unwrap(), Some(detached.ended()));
}

#[test]
fn old_numbers_are_pruned_and_a_process_that_slept_through_it_all_has_lost() {
    let (_directory, arbiter) = shared();
    let first = start(&arbiter);
    let mut record = first;
    for _ in 0..3 * KEPT {
        let next = record.detached();
        assert_eq!(arbiter.swap(Some(&record), &next).unwrap(), Swap::Done);
        record = next;
    }
    assert_eq!(arbiter.numbers().unwrap().len() as u64, KEPT);

    // It read the first record, was frozen, and links now: its number has long been used and pruned.
    let claimed = first.claimed_by(who(2)).unwrap();
    let aside = arbiter.aside(&claimed);
    arbiter.write_aside(&aside, &claimed).unwrap();
    let outcome = arbiter.place(&aside, 2, Some(&first), &claimed).unwrap();
    assert_eq!(outcome, Swap::Lost(Some(record)));
    assert_eq!(arbiter.read().unwrap(), Some(record));

    // The stray is gone after the next swap.
    assert_eq!(
        arbiter.swap(Some(&record), &record.detached()).unwrap(),
        Swap::Done
    );
    assert_eq!(arbiter.numbers().unwrap().len() as u64, KEPT);
}

#[test]
fn a_process_that_slept_through_the_first_start_has_lost_too() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let next = live.detached();
    assert_eq!(arbiter.swap(Some(&live), &next).unwrap(), Swap::Done);
    fs::remove_file(arbiter.path(1)).unwrap();
    let late = Record::cold_start(None, who(9), None);
    arbiter.write_aside(&arbiter.aside(&late), &late).unwrap();
    let outcome = arbiter
        .place(&arbiter.aside(&late), 1, None, &late)
        .unwrap();
    assert_eq!(outcome, Swap::Lost(Some(next)));
}

#[test]
fn a_link_that_landed_though_it_was_said_to_exist_counts_as_done() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let claimed = live.claimed_by(who(2)).unwrap();
    die_after(5, &arbiter, 2, &claimed);
    // A network file system repeats the link by itself and reports that the number exists.
    let outcome = arbiter
        .place(&arbiter.aside(&claimed), 2, Some(&live), &claimed)
        .unwrap();
    assert_eq!(outcome, Swap::Done);
}

#[test]
fn forgotten_files_aside_are_removed_and_fresh_ones_are_not() {
    let (_directory, arbiter) = shared();
    let mut record = start(&arbiter);
    let (old, fresh) = (
        arbiter.home.join(".aside-old"),
        arbiter.home.join(".aside-fresh"),
    );
    fs::write(&old, "").unwrap();
    fs::write(&fresh, "").unwrap();
    let long_ago = fs::metadata(&old).unwrap().modified().unwrap() - 2 * FORGOTTEN;
    File::options()
        .write(true)
        .open(&old)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    for _ in 0..=KEPT {
        arbiter.swap(Some(&record), &record.detached()).unwrap();
        record = record.detached();
    }
    assert!(!old.exists() && fresh.exists());
}

#[test]
fn a_damaged_record_is_named_and_nothing_older_is_believed() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    arbiter.swap(Some(&live), &live.detached()).unwrap();
    let path = arbiter.path(2);
    for bad in [
        &b""[..],
        b"doppel arbiter record 1\n",
        &[0xff; 40],
        &[b'x'; 5000],
    ] {
        fs::remove_file(&path).unwrap();
        fs::write(&path, bad).unwrap();
        for error in [
            arbiter.read().unwrap_err(),
            arbiter.swap(Some(&live), &live.ended()).unwrap_err(),
        ] {
            assert!(matches!(&error, ArbiterError::Corrupt { path: named, .. } if *named == path));
            assert!(
                error.to_string().contains(path.to_str().unwrap()),
                "{error}"
            );
            assert!(!error.may_have_landed());
        }
    }
}

#[test]
fn a_missing_directory_is_an_error_that_says_so_and_is_never_created() {
    let (directory, arbiter) = shared();
    let live = start(&arbiter);
    let path = directory.path().to_owned();
    directory.close().unwrap();
    let opened = FileArbiter::open(&path, "kv", Durability::PowerLoss).unwrap_err();
    let swapped = arbiter.swap(None, &live).unwrap_err();
    for error in [opened, arbiter.read().unwrap_err(), swapped] {
        assert!(
            matches!(&error, ArbiterError::Missing { path: named } if *named == path),
            "{error}"
        );
        assert!(!error.may_have_landed());
    }
    assert!(!path.exists());
}

#[test]
fn names_that_would_leave_the_directory_are_refused() {
    let directory = TempDir::new().unwrap();
    for name in [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "KV",
        "-x",
        "a b",
        &"x".repeat(64),
        "ä",
    ] {
        let result = FileArbiter::open(directory.path(), name, Durability::PowerLoss);
        assert!(matches!(result, Err(ArbiterError::Name { .. })), "{name:?}");
    }
    for name in ["a", "kv-2", &"x".repeat(63)] {
        FileArbiter::open(directory.path(), name, Durability::PowerLoss).unwrap();
    }
}

#[test]
fn a_directory_that_may_not_be_written_says_whose_fault_it_is() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    fs::set_permissions(&arbiter.home, fs::Permissions::from_mode(0o500)).unwrap();
    let outcome = arbiter.swap(Some(&live), &live.detached());
    fs::set_permissions(&arbiter.home, fs::Permissions::from_mode(0o700)).unwrap();
    match outcome {
        Err(error) => {
            assert!(matches!(error, ArbiterError::Permission { .. }), "{error}");
            assert!(!error.may_have_landed());
            assert_eq!(arbiter.read().unwrap(), Some(live));
        }
        // Root may write anywhere: then the swap must simply have worked.
        Ok(swap) => {
            assert_eq!(swap, Swap::Done);
            assert_eq!(arbiter.read().unwrap(), Some(live.detached()));
        }
    }
}

#[test]
fn other_files_in_the_directory_are_left_alone() {
    let (_directory, arbiter) = shared();
    let live = start(&arbiter);
    let others = [
        "README",
        "2.record",
        "0000000000000000000x.record",
        "00000000000000000009.record~",
    ];
    for other in others {
        fs::write(arbiter.home.join(other), "not ours").unwrap();
    }
    assert_eq!(arbiter.read().unwrap(), Some(live));
    assert_eq!(
        arbiter.swap(Some(&live), &live.detached()).unwrap(),
        Swap::Done
    );
    assert!(others.iter().all(|other| arbiter.home.join(other).exists()));
}

#[test]
fn identities_are_not_repeated() {
    let mut drawn: Vec<_> = (0..100).map(|_| random_identity().unwrap()).collect();
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 100);
}
