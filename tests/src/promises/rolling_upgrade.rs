//! A pair is upgraded side by side while it serves (issue 8, release): a new backup joins an old primary, the machine is switched to it,
//! and the other side is upgraded; the way back is the same. What speaks another range of versions is `other_version`, the same library
//! that was told so: an old one writes and takes nothing that came later.
#![forbid(unsafe_code)]

mod formats;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::config::Transport;
use hypervisor::control::find;
use hypervisor::demo::pair::{Pair, PairSpec, Side};
use hypervisor::session::report::Event;
use hypervisor::version::{Version, Versions};

use crate::harness::linear;
use crate::harness::linear_clients::{LinearClients, longest_wait};
use crate::harness::program;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "rolling-upgrade",
    line: "a pair of the release before is upgraded under load, one side after the other, and back; a peer too old or too new is refused in words",
    short: Duration::from_secs(20),
    full: Duration::from_secs(120),
    show,
};

const CLIENTS: u32 = 4;

/// Answers between two events: the machine serves.
const ANSWERS: u64 = 100;

/// Past that something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

const NAME: &str = "machine";

const NEW: Versions = Versions::OURS;

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    figures.add("formats_listed", formats::listed()?);
    let mut random = Random::new(run.seed);
    let rounds = run.form.pick(1, 8);
    for transport in [Transport::Shm, Transport::Tcp] {
        let operations = alone(|| {
            let stage = Stage::enter()?;
            let mut releases = Releases::of(&stage, transport, "kv")?;
            under_load(&stage, &mut releases, rounds, &mut random, run)
        })
        .with_context(|| transport.name())?;
        figures.add(&format!("{}_operations", transport.name()), operations);
    }
    figures.add("violations", 0);
    alone(|| {
        let stage = Stage::enter()?;
        new_words_are_kept_from_an_old_backup(&Releases::of(&stage, Transport::Shm, "console")?)
    })
    .context("a reset, which only new logs tell the reason of")?;
    let refused = refused().context("peers that are refused")?;
    figures.add("peers_refused_in_words", refused);
    Ok(figures)
}

/// The program as a release that speaks these versions: a file that can be started as `doppel` is.
fn release(directory: &Path, name: &str, versions: Versions) -> Result<PathBuf> {
    let path = directory.join(name);
    let program = program::beside("other_version")?;
    let script = format!(
        "#!/bin/sh\nexec '{}' {} {} \"$@\"\n",
        program.display(),
        versions.oldest(),
        versions.newest()
    );
    fs::write(&path, script).context("write a script")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("make it a program")?;
    Ok(path)
}

fn range(oldest: u32, newest: u32) -> Result<Versions> {
    Versions::new(Version(oldest), Version(newest)).context("a range")
}

/// What speaks only what the release before spoke.
fn before() -> Result<Versions> {
    range(NEW.newest().0 - 1, NEW.newest().0 - 1)
}

/// The same machine, by the release before and by this one.
struct Releases {
    old: PairSpec,
    new: PairSpec,
}

impl Releases {
    fn of(stage: &Stage, transport: Transport, guest: &str) -> Result<Self> {
        let new = PairSpec {
            transport,
            ..stage.spec(guest, "")?
        };
        let doppel = release(stage.directory(), "doppel-before", before()?)?;
        let old = PairSpec {
            doppel,
            ..new.clone()
        };
        Ok(Self { old, new })
    }
}

fn under_load(
    stage: &Stage,
    releases: &mut Releases,
    rounds: u32,
    random: &mut Random,
    run: &Run,
) -> Result<usize> {
    let Releases { old, new } = releases;
    let port = Some(stage.port());
    let mut pair = Pair::start(old, port)?;
    let mut clients = LinearClients::start(GUEST, CLIENTS, random.next())?;
    clients.await_answers(ANSWERS)?;
    let name = new.transport.name();
    for _ in 0..rounds {
        // A new backup in the old one's place, the machine to it, and a new backup for it.
        let (mut gone, _) = pair.migrate_backup(new, port, |to| migrate(new, to.as_ref()), drop)?;
        ended_well(&mut gone, "the old backup")?;
        speaks(new, &pair.backup, Some(before()?.newest()))?;
        clients.await_answers(ANSWERS)?;
        switch(new, &mut pair).context("from the old release to this one")?;
        pair.replace_primary(new, port, drop)?;
        speaks(new, &pair.backup, None)?;
        clients.await_answers(ANSWERS)?;
        // The upgraded pair is one as any other.
        pair.primary.kill();
        live(&pair.backup)?;
        clients.await_answers(ANSWERS)?;

        // And back: an old backup follows a new primary, and takes over from it when it dies.
        pair.replace_primary(old, port, drop)?;
        speaks(new, &pair.backup, Some(before()?.newest()))?;
        clients.await_answers(ANSWERS)?;
        pair.primary.kill();
        live(&pair.backup)?;
        clients.await_answers(ANSWERS)?;
        pair.replace_primary(old, port, drop)?;
        clients.await_answers(ANSWERS)?;
    }
    let histories = clients.end()?;
    let checked = linear::check_all(histories.iter().map(Vec::as_slice))?;
    let longest = longest_wait(&histories);
    run.say(format!("{name}: {checked:?}, longest wait {longest:.1?}"));
    Ok(checked.operations)
}

/// The backup says of itself that its pair speaks an older version, if it does.
fn speaks(spec: &PairSpec, backup: &Side, older: Option<Version>) -> Result<()> {
    let status = find::ask_process(&spec.run_directory(), NAME, backup.pid());
    let status = status.context("a backup does not answer")?;
    let mut lines = status.events.iter().map(|event| event.text.as_str());
    let uneven = lines.find(|text| text.contains("the pair speaks version"));
    let wanted = older.map(|version| format!("the pair speaks version {version}:"));
    match (uneven, &wanted) {
        (None, None) => Ok(()),
        (Some(text), Some(wanted)) if text.starts_with(wanted) => Ok(()),
        _ => bail!("a backup said {uneven:?}, expected {wanted:?}"),
    }
}

fn order(spec: &PairSpec, words: &[&str]) -> Result<()> {
    let output = Command::new(&spec.doppel)
        .args([words[0], NAME])
        .args(&words[1..])
        .arg("--run-dir")
        .arg(spec.run_directory())
        .output()
        .context("start doppel")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{words:?}: {}: {said}",
        output.status
    );
    Ok(())
}

fn migrate(spec: &PairSpec, to: Option<&std::net::SocketAddr>) -> Result<()> {
    match to {
        Some(to) => order(spec, &["migrate-backup", "--to", &to.to_string()]),
        None => order(spec, &["migrate-backup"]),
    }
}

/// The machine goes to the backup. One that is too far behind just then, on a busy host, says so: an operator tries again.
fn switch(spec: &PairSpec, pair: &mut Pair) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = order(spec, &["switch"]) {
        ensure!(
            error.to_string().contains("ms behind") && Instant::now() < until,
            "{error}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let switched = |event: &Event| matches!(event, Event::SwitchedOver { .. });
    let said = pair.backup.wait_for(PATIENCE, switched, drop);
    ensure!(
        said.is_some(),
        "it was not taken: {}",
        pair.backup.messages()
    );
    ended_well(&mut pair.primary, "the primary that handed over")
}

fn ended_well(side: &mut Side, who: &str) -> Result<()> {
    let status = side.wait(PATIENCE);
    let live = side
        .events()
        .iter()
        .any(|event| matches!(event, Event::Live { .. }));
    ensure!(
        status.code() == Some(0) && !live,
        "{who} ended by {status}: {}",
        side.messages()
    );
    Ok(())
}

fn live(side: &Side) -> Result<()> {
    let live = |event: &Event| matches!(event, Event::Live { .. });
    let said = side.wait_for(PATIENCE, live, drop);
    ensure!(said.is_some(), "it did not go live: {}", side.messages());
    Ok(())
}

/// What this release's log says and the one before does not know: it is left out for an old backup, which then follows exactly, and is
/// told to a new one.
fn new_words_are_kept_from_an_old_backup(releases: &Releases) -> Result<()> {
    let Releases { old, new } = releases;
    let mut pair = Pair::start(old, None)?;
    // Each new pair's primary is of this release.
    let (mut gone, _) = pair.migrate_backup(new, None, |to| migrate(new, to.as_ref()), drop)?;
    ended_well(&mut gone, "the old backup")?;
    for (spec, words) in [
        (new, "the machine was reset by its operator and starts anew"),
        (old, "the machine was reset and starts anew"),
    ] {
        pair.primary.kill();
        live(&pair.backup)?;
        pair.replace_primary(spec, None, drop)?;
        order(new, &["reset"])?;
        let reset =
            |event: &Event| matches!(event, Event::Notice { text, .. } if text.starts_with(words));
        let said = pair.backup.wait_for(PATIENCE, reset, drop);
        ensure!(
            said.is_some(),
            "a backup did not say {words:?}: {}",
            pair.backup.messages()
        );
    }
    // It has followed, and takes over.
    pair.primary.kill();
    live(&pair.backup)?;
    Ok(())
}

/// Sides that have no version in common say so, both of them, with what is to be done. How many there were.
fn refused() -> Result<u32> {
    let work = tempfile::tempdir().context("make a directory")?;
    let newest = NEW.newest().0;
    let mut count = 0;
    for (name, versions, older) in [
        (
            "too-old",
            range(NEW.oldest().0 - 2, NEW.oldest().0 - 1)?,
            true,
        ),
        ("too-new", range(newest + 1, newest + 2)?, false),
    ] {
        let other = release(work.path(), name, versions)?;
        let ours = program::doppel()?;
        for (primary, backup, is_primary_older) in [(&ours, &other, !older), (&other, &ours, older)]
        {
            count += 1;
            let directory = work.path().join(count.to_string());
            fs::create_dir_all(directory.join("arbiter")).context("make a directory")?;
            let words = [
                "--arbiter",
                "arbiter",
                "--socket",
                "pair.sock",
                "--run-dir",
                "run",
            ];
            let mut listening = Role::start_program(
                backup,
                &directory,
                "backup",
                &[&["backup"], &words[..]].concat(),
            )?;
            listening.until("backup is ready", PATIENCE)?;
            let asking = [&["primary", "--guest", "irq"], &words[..]].concat();
            let mut calling = Role::start_program(primary, &directory, "primary", &asking)?;
            let said = calling.clear_error(PATIENCE, &[1])?;
            let sides = ["this side is too old", "the other side is too old"];
            let [at_primary, at_backup] = if is_primary_older {
                sides
            } else {
                [sides[1], sides[0]]
            };
            ensure!(
                said.contains(at_primary) && said.contains("one release at a time"),
                "{name}: a primary said {said}"
            );
            // The backup waits on, for one that it understands.
            listening.until(at_backup, PATIENCE)?;
            listening.stop(PATIENCE)?;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
