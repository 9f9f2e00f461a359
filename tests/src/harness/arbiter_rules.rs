//! What every arbiter must do, whatever it keeps its records in: one set of checks for all of them.
#![forbid(unsafe_code)]

use std::sync::Barrier;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::arbiter::{Arbiter, Claim, Swap, ask};
use hypervisor::protocol::{Answer, Identity, Record, Request};

/// Makes a client of the arbiter for the machine of this name, as each process has its own.
pub trait Open: Fn(&str) -> Result<Box<dyn Arbiter>> + Sync {}

impl<T: Fn(&str) -> Result<Box<dyn Arbiter>> + Sync> Open for T {}

fn who(n: u8) -> Identity {
    Identity::from_bytes([n; 16])
}

/// Each question is asked again until there is an answer, as the protocol does, since an arbiter may be behind a bad network. So
/// many failures are no answer.
const TRIES: u32 = 1000;

fn answered<T, E>(mut ask: impl FnMut() -> std::result::Result<T, E>) -> std::result::Result<T, E> {
    let mut answer = ask();
    for _ in 1..TRIES {
        if answer.is_ok() {
            break;
        }
        answer = ask();
    }
    answer
}

fn swap(arbiter: &dyn Arbiter, from: Option<&Record>, to: &Record) -> Result<Swap> {
    Ok(answered(|| arbiter.swap(from, to))?)
}

fn read(arbiter: &dyn Arbiter) -> Result<Option<Record>> {
    Ok(answered(|| arbiter.read())?)
}

fn asked(arbiter: &dyn Arbiter, request: &Request) -> Result<(Answer, Option<Claim>)> {
    answered(|| match ask(arbiter, request) {
        (Answer::Failed { why, .. }, _) => Err(anyhow::anyhow!(why)),
        answer => Ok(answer),
    })
}

fn begin(arbiter: &dyn Arbiter) -> Result<Record> {
    let live = Record::cold_start(None, who(1), Some(who(2)));
    ensure!(
        swap(arbiter, None, &live)? == Swap::Done,
        "the first record was refused"
    );
    Ok(live)
}

fn is(found: Swap, expected: Swap) -> Result<()> {
    ensure!(found == expected, "{found:?}, expected {expected:?}");
    Ok(())
}

/// Checks them all. The arbiter must not have any of the machines `rule-…` yet.
///
/// # Errors
/// The rule that is broken.
pub fn check(open: &dyn Open, rivals: u8, rounds: u64) -> Result<u64> {
    a_machine_that_never_ran_has_no_record(open).context("a machine that never ran")?;
    a_swap_takes_effect_only_from_the_record(open).context("a swap from another record")?;
    a_repeated_swap_counts_as_done(open).context("a swap that is repeated")?;
    machines_do_not_meet(open).context("two machines")?;
    only_a_won_claim_is_one(open).context("a claim")?;
    of_many_exactly_one_wins(open, rivals, rounds).context("many at once")
}

fn a_machine_that_never_ran_has_no_record(open: &dyn Open) -> Result<()> {
    let arbiter = open("rule-never")?;
    ensure!(read(&*arbiter)?.is_none(), "it has one");
    let other = Record::cold_start(None, who(9), None);
    is(
        swap(&*arbiter, Some(&other), &other.detached())?,
        Swap::Lost(None),
    )?;
    ensure!(
        read(&*arbiter)?.is_none(),
        "a swap that was lost left a record"
    );
    Ok(())
}

fn a_swap_takes_effect_only_from_the_record(open: &dyn Open) -> Result<()> {
    let arbiter = open("rule-from")?;
    let live = begin(&*arbiter)?;
    let claimed = live.claimed_by(who(2)).context("entitled")?;
    let detached = live.detached();
    is(swap(&*arbiter, Some(&live), &detached)?, Swap::Done)?;
    let lost = Swap::Lost(Some(detached));
    is(swap(&*arbiter, Some(&live), &claimed)?, lost)?;
    is(swap(&*arbiter, None, &claimed)?, lost)?;
    ensure!(
        read(&*open("rule-from")?)? == Some(detached),
        "another record"
    );
    Ok(())
}

fn a_repeated_swap_counts_as_done(open: &dyn Open) -> Result<()> {
    let arbiter = open("rule-repeated")?;
    let live = begin(&*arbiter)?;
    is(swap(&*arbiter, None, &live)?, Swap::Done)?;
    let claimed = live.claimed_by(who(2)).context("entitled")?;
    for _ in 0..3 {
        is(swap(&*arbiter, Some(&live), &claimed)?, Swap::Done)?;
    }
    let reclaimed = claimed.reclaimed_by(who(1));
    is(swap(&*arbiter, Some(&claimed), &reclaimed)?, Swap::Done)?;
    is(
        swap(&*arbiter, Some(&live), &claimed)?,
        Swap::Lost(Some(reclaimed)),
    )
}

fn machines_do_not_meet(open: &dyn Open) -> Result<()> {
    let (one, other) = (open("rule-one")?, open("rule-other")?);
    let live = begin(&*one)?;
    ensure!(read(&*other)?.is_none(), "one's record is the other's");
    let claimed = live.claimed_by(who(2)).context("entitled")?;
    is(swap(&*other, Some(&live), &claimed)?, Swap::Lost(None))?;
    ensure!(read(&*one)? == Some(live), "its record has changed");
    Ok(())
}

fn only_a_won_claim_is_one(open: &dyn Open) -> Result<()> {
    let arbiter = open("rule-claim")?;
    let live = begin(&*arbiter)?;
    let claimed = live.claimed_by(who(2)).context("entitled")?;
    let request = Request::Swap {
        from: live,
        to: claimed,
    };
    // The second time is that of a repeated request, whose answer got lost.
    for _ in 0..2 {
        let (answer, claim) = asked(&*arbiter, &request)?;
        ensure!(answer == Answer::Swapped, "{answer:?}");
        let claim = claim.context("a claim that was won is none")?;
        ensure!(*claim.record() == claimed, "another claim");
    }
    let live_again = claimed.gone_live();
    let request_live = Request::Swap {
        from: claimed,
        to: live_again,
    };
    let (answer, claim) = asked(&*arbiter, &request_live)?;
    ensure!(answer == Answer::Swapped && claim.is_none(), "{answer:?}");
    let (answer, claim) = asked(&*arbiter, &request)?;
    ensure!(
        answer == Answer::Lost(Some(live_again)) && claim.is_none(),
        "{answer:?}"
    );
    Ok(())
}

/// Exactly one of many that swap from the same record at the same moment wins, in each of so many epochs. How many swaps.
fn of_many_exactly_one_wins(open: &dyn Open, rivals: u8, rounds: u64) -> Result<u64> {
    let machine = "rule-race";
    let mut record = begin(&*open(machine)?)?;
    let arbiters: Vec<Box<dyn Arbiter>> =
        (0..rivals).map(|_| open(machine)).collect::<Result<_>>()?;
    // An arbiter belongs to one thread, so the threads live through all rounds.
    let (barrier, starts) = (
        Barrier::new(usize::from(rivals) + 1),
        std::sync::Mutex::new(record),
    );
    std::thread::scope(|scope| -> Result<()> {
        let (tell, told) = std::sync::mpsc::channel();
        for (n, arbiter) in arbiters.into_iter().enumerate() {
            let (tell, barrier, starts) = (tell.clone(), &barrier, &starts);
            scope.spawn(move || {
                for _ in 0..rounds {
                    barrier.wait();
                    let from = *starts.lock().expect("nobody panics with it");
                    let to = Record::cold_start(Some(&from), who(10 + n as u8), None);
                    let outcome = swap(&*arbiter, Some(&from), &to);
                    let _ = tell.send((from, to, outcome));
                    barrier.wait();
                }
            });
        }
        drop(tell);
        let mut trouble = None;
        for round in 0..rounds {
            *starts.lock().expect("nobody panics with it") = record;
            barrier.wait();
            barrier.wait();
            let mut winners = Vec::new();
            for _ in 0..rivals {
                match told.recv().context("a rival is gone")? {
                    (_, to, Ok(Swap::Done)) => winners.push(to),
                    (from, to, Ok(Swap::Lost(found))) => {
                        if found == Some(from) || found == Some(to) {
                            trouble.get_or_insert(format!("round {round}: lost to {found:?}"));
                        }
                    }
                    (_, _, Err(error)) => {
                        trouble.get_or_insert(format!("round {round}: {error}"));
                    }
                }
            }
            if winners.len() != 1 {
                trouble.get_or_insert(format!("round {round} had {} winners", winners.len()));
            }
            record = winners.first().copied().unwrap_or(record);
        }
        match trouble {
            Some(trouble) => bail!(trouble),
            None => Ok(()),
        }
    })?;
    ensure!(
        read(&*open(machine)?)? == Some(record),
        "the last winner's record is not there"
    );
    Ok(u64::from(rivals) * rounds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::arbiter::{Durability, FileArbiter};

    #[test]
    fn the_file_arbiter_keeps_them() {
        let directory = tempfile::TempDir::new().unwrap();
        let open = |machine: &str| -> Result<Box<dyn Arbiter>> {
            let durability = Durability::ProcessDeath;
            Ok(Box::new(FileArbiter::open(
                directory.path(),
                machine,
                durability,
            )?))
        };
        assert_eq!(check(&open, 6, 30).unwrap(), 180);
    }
}
