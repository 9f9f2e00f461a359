//! `doppel switch`, `migrate-backup`, `power-off`, `pause`, `resume` and `share`: orders to the role that serves a machine.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use hypervisor::arbiter::{self, BadPlace, Place};
use hypervisor::control::default_run_dir;
use hypervisor::control::find;
use hypervisor::control::status::{Role, Status};
use hypervisor::control::wire::Ask;
use hypervisor::entry::Control;
use hypervisor::protocol::State;

use super::Failure;

/// How long an order may take to be done. A switch-over is called off after half a second; a busy host takes some of these.
const WITHIN: Duration = Duration::from_secs(10);

/// How long a copy may take: the recruiter gives it up then.
const COPY_WITHIN: Duration = Duration::from_secs(3600);

/// How long a reign may take to end whose process is gone. A backup that has the power-off in its log goes live first, and then ends it.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Between two looks at what has come of it.
const LOOK: Duration = Duration::from_millis(10);

/// Which machine.
#[derive(Debug, Args)]
struct Of {
    /// The machine
    name: String,
    /// Directory of the roles' control sockets [default: $XDG_RUNTIME_DIR/doppel, or /run/doppel]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// Move a machine to its backup, without a failure: nothing is lost or sent twice, and the old primary ends
#[derive(Debug, Args)]
#[command(
    after_help = "Said on the host of the primary. Ends 0 once the backup has the machine. If the backup cannot take it, the machine runs on \
                  where it was, and this ends 1.\nExample, before a host is serviced:\n  doppel switch kv"
)]
pub struct SwitchArgs {
    #[command(flatten)]
    of: Of,
}

/// Move a machine's backup: another one gets a copy while the old one goes on protecting it, takes its place, and the old one ends
#[derive(Debug, Args)]
#[command(
    after_help = "Said on the host of the primary, with the new backup started and listening (doppel backup). Ends 0 once the new one \
                  protects the machine. Until then the old one does, and if the new one fails it goes on doing so, and this ends 1.\n\
                  Example, before the backup's host is serviced:\n  doppel migrate-backup kv --to 192.0.2.7:7700"
)]
pub struct MigrateBackupArgs {
    #[command(flatten)]
    of: Of,
    /// Where the new backup listens [default: the first of pair.connect and pair.standbys that answers]
    #[arg(long, value_name = "ADDRESS")]
    to: Option<SocketAddr>,
}

/// Turn a machine off, on both sides: nobody takes it over
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  doppel power-off kv")]
pub struct PowerOffArgs {
    #[command(flatten)]
    of: Of,
}

/// Reset a machine, as by its reset button: it starts anew, on both sides
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  doppel reset kv")]
pub struct ResetArgs {
    #[command(flatten)]
    of: Of,
}

/// Let a machine's guest stand until `doppel resume`; whoever takes it over lets it stand, too
#[derive(Debug, Args)]
#[command(
    after_help = "Its clock goes on, as on a computer that was suspended. Example:\n  doppel pause kv && doppel resume kv"
)]
pub struct PauseArgs {
    #[command(flatten)]
    of: Of,
}

/// Give a machine's guest all of its time again
#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    of: Of,
}

/// Leave a machine's guest so much of a CPU's time; whoever takes it over leaves it as much
#[derive(Debug, Args)]
#[command(after_help = "Example, a quarter:\n  doppel share kv 25")]
pub struct ShareArgs {
    #[command(flatten)]
    of: Of,
    /// Per cent
    #[arg(value_parser = clap::value_parser!(u16).range(7..=100))]
    percent: u16,
}

pub fn switch(args: &SwitchArgs) -> Result<(), Failure> {
    give(&args.of, Ask::Switch)
}

pub fn migrate_backup(args: &MigrateBackupArgs) -> Result<(), Failure> {
    give(&args.of, Ask::MigrateBackup(args.to))
}

pub fn power_off(args: &PowerOffArgs) -> Result<(), Failure> {
    give(&args.of, Ask::PowerOff)
}

pub fn reset(args: &ResetArgs) -> Result<(), Failure> {
    give(&args.of, Ask::Reset)
}

pub fn pause(args: &PauseArgs) -> Result<(), Failure> {
    give(&args.of, Ask::Share(0))
}

pub fn resume(args: &ResumeArgs) -> Result<(), Failure> {
    give(&args.of, Ask::Share(Control::WHOLE))
}

pub fn share(args: &ShareArgs) -> Result<(), Failure> {
    let share = u32::from(Control::WHOLE) * u32::from(args.percent) / 100;
    give(&args.of, Ask::Share(share as u16))
}

/// Gives an order, and waits for what comes of it.
fn give(of: &Of, what: Ask) -> Result<(), Failure> {
    let directory = of.run_dir.clone().unwrap_or_else(default_run_dir);
    let pid = whom(&directory, &of.name)?;
    let failed = |why: &dyn std::fmt::Display| Failure::new(Failure::ERROR, why);
    // What it said last.
    let mut last = find::ask_process(&directory, &of.name, pid).ok();
    let number = find::order(&directory, &of.name, pid, what).map_err(|error| failed(&error))?;
    let within = match what {
        Ask::MigrateBackup(_) => COPY_WITHIN,
        _ => WITHIN,
    };
    let until = Instant::now() + within;
    loop {
        match find::ask_process(&directory, &of.name, pid) {
            Ok(status) => {
                if let Some(outcome) = status.outcome_of(number) {
                    let said = outcome.as_ref().map_err(|why| failed(why))?;
                    // These end the process, which then says it best.
                    if !matches!(what, Ask::PowerOff | Ask::Switch) {
                        println!("{}: {said}", of.name);
                        return Ok(());
                    }
                }
                last = Some(status);
            }
            Err(error) if is_gone(error.kind()) => return ended(&directory, of, what, last),
            // It may be ending.
            Err(_) => {}
        }
        if Instant::now() >= until {
            return Err(failed(&format!(
                "machine {} has not done it within {} s: see doppel status {}",
                of.name,
                within.as_secs(),
                of.name
            )));
        }
        std::thread::sleep(LOOK);
    }
}

fn is_gone(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::UnexpectedEof
    )
}

/// The process of the role that serves the machine; if none is here, of one that says why it takes no orders.
fn whom(directory: &Path, name: &str) -> Result<u32, Failure> {
    let found =
        find::roles(directory, Some(name)).map_err(|error| Failure::new(Failure::ERROR, error))?;
    // Those that serve come first.
    let first = found.iter().find(|found| found.outcome.is_ok());
    match first.or(found.first()) {
        Some(found) => Ok(found.pid),
        None => Err(Failure::new(
            Failure::ERROR,
            format!(
                "no process of machine {name:?} runs on this host, or none that leaves its socket in {} (--run-dir names another place)",
                directory.display()
            ),
        )),
    }
}

/// The process that had the order is no more.
fn ended(directory: &Path, of: &Of, what: Ask, last: Option<Status>) -> Result<(), Failure> {
    let roles = find::roles(directory, Some(&of.name)).unwrap_or_default();
    let heir = roles
        .iter()
        .filter_map(|found| found.outcome.as_ref().ok())
        .find(|status| status.role == Role::Primary);
    if what != Ask::Switch {
        if let Some(heir) = heir {
            let why = format!(
                "the process that had the order is gone, and process {} serves machine {} now: order it again",
                heir.pid, of.name
            );
            return Err(Failure::new(Failure::ERROR, why));
        }
        if what != Ask::PowerOff {
            let why = format!(
                "the process that served machine {} has ended: doppel status {} tells, on this host or another, who serves it",
                of.name, of.name
            );
            return Err(Failure::new(Failure::ERROR, why));
        }
        let failed = |why| Failure::new(Failure::ERROR, why);
        let last = last.ok_or_else(|| failed(unknown(of, "it never said where that is")))?;
        // A machine alone has no record, and is over with its process.
        if let Some(place) = &last.arbiter.place {
            is_off(of, place, ENDS_WITHIN).map_err(failed)?;
        }
        println!("{}: off", of.name);
        return Ok(());
    }
    match heir {
        Some(heir) => {
            let stood = heir
                .events
                .iter()
                .rev()
                .find(|happened| happened.text.starts_with("switched over"));
            let text = stood.map_or_else(
                || format!("process {} serves it in epoch {}", heir.pid, heir.epoch),
                |happened| happened.text.clone(),
            );
            println!("{}: {text}", of.name);
        }
        None => println!(
            "{}: its process here has ended; the other host has the machine (doppel status there tells how long its guest stood)",
            of.name
        ),
    }
    Ok(())
}

fn unknown(of: &Of, why: &str) -> String {
    format!(
        "the process that had the order is gone, and the arbiter does not say whether machine {} is off ({why}): see doppel status {} on the other host",
        of.name, of.name
    )
}

/// Whether a machine whose process is gone is off by its record at the arbiter, within this time. The process may have been killed before the order came
/// to anything; its backup, which may be on another host, then has the machine, or is about to.
fn is_off(of: &Of, place: &str, within: Duration) -> Result<(), String> {
    let until = Instant::now() + within;
    let read = || {
        let place: Place = place.parse().map_err(|error: BadPlace| error.to_string())?;
        let arbiter = arbiter::open(&place, &of.name).map_err(|error| error.to_string())?;
        arbiter.read().map_err(|error| error.to_string())
    };
    loop {
        let found = read();
        if matches!(&found, Ok(Some(record)) if record.state == State::Ended) {
            return Ok(());
        }
        if Instant::now() < until {
            std::thread::sleep(LOOK);
            continue;
        }
        let record = match found {
            Ok(Some(record)) => record.to_string(),
            Ok(None) => "there is none".to_owned(),
            Err(why) => return Err(unknown(of, &why)),
        };
        return Err(format!(
            "the process that had the order is gone, and machine {name} is not off by the arbiter's record ({record}): if its backup has it now, order it \
             again on that host, which doppel status {name} tells there",
            name = of.name
        ));
    }
}

#[cfg(test)]
mod tests {
    use hypervisor::protocol::{Identity, Record};

    use super::*;

    /// Its primary was killed, and its backup is on another host: nothing of it runs here, and it is not off.
    #[test]
    fn a_machine_is_off_when_its_record_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().to_str().unwrap();
        let of = Of {
            name: "kv".into(),
            run_dir: None,
        };
        let off = || is_off(&of, place, Duration::from_millis(50));
        let arbiter = arbiter::open(&place.parse().unwrap(), "kv").unwrap();
        assert!(off().unwrap_err().contains("there is none"));
        let (one, other) = (Identity::from_bytes([1; 16]), Identity::from_bytes([2; 16]));
        let live = Record::cold_start(None, one, Some(other));
        arbiter.swap(None, &live).unwrap();
        assert!(off().unwrap_err().contains("is not off"));
        let heir = live.claimed_by(other).unwrap();
        arbiter.swap(Some(&live), &heir).unwrap();
        arbiter.swap(Some(&heir), &heir.gone_live()).unwrap();
        assert!(off().unwrap_err().contains("epoch 2"));
        arbiter
            .swap(Some(&heir.gone_live()), &heir.gone_live().ended())
            .unwrap();
        off().unwrap();
        let nowhere = is_off(&of, "/nowhere/at/all", Duration::ZERO).unwrap_err();
        assert!(nowhere.contains("does not say"), "{nowhere}");
    }
}
