//! Hostile peers over TCP who hold the pair's secret: strangers before a pair, impostors of either side, a backup that takes a copy too
//! slowly; and a man in the middle of a pair's log.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::handshake::{Secret, Trust};
use hypervisor::session::report::Event;
use tempfile::TempDir;

use super::LONGEST;
use crate::harness::random::Random;
use crate::harness::role::Role;
use crate::harness::strangers::{self, FALSE_PRIMARIES, IMPOSTORS, Impostor, QUICK};
use crate::harness::tcp_meddler::{HARMS, Harm, TcpMeddler};
use crate::promise::{Figures, Run};

pub(super) fn show(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    strangers(run, random, figures).context("strangers before a pair")?;
    impostors(run, random, figures).context("impostor backups")?;
    false_primaries(run, random, figures).context("impostor primaries")?;
    slow_backup(run, figures).context("a backup that takes its copy too slowly")?;
    let mut meddled = 0;
    for _ in 0..run.form.pick(1, 6) {
        for harm in HARMS {
            meddle(run, harm).with_context(|| format!("{harm:?}"))?;
            meddled += 1;
        }
    }
    figures.add("meddled_pairs", meddled);
    Ok(())
}

/// The pair's secret, in its directory.
const SECRET: &str = "pair.secret";

pub(super) fn trust(work: &Path) -> Result<Trust> {
    Ok(Trust::read(&work.join(SECRET))?)
}

pub(super) fn directory() -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("doppel-test-").tempdir();
    let made = made.context("make a directory")?;
    fs::create_dir(made.path().join("arbiter")).context("make a directory")?;
    Secret::create(&made.path().join(SECRET))?;
    fs::write(
        made.path().join("patient.toml"),
        "[timing]\nsilence_ms = 2000\n",
    )
    .context("write a configuration")?;
    Ok(made)
}

const COMMON: [&str; 9] = [
    "--secret",
    SECRET,
    "--config",
    "patient.toml",
    "--transport",
    "tcp",
    "--arbiter",
    "arbiter",
    "--json",
];

pub(super) fn start_backup(work: &Path) -> Result<(Role, SocketAddr)> {
    let arguments = [&["backup", "--listen", "127.0.0.1:0"], &COMMON[..]].concat();
    let mut backup = Role::start(work, "backup", &arguments)?;
    backup.until("\"ready\"", LONGEST)?;
    let said = backup.said();
    let address = said
        .lines()
        .find_map(|line| match serde_json::from_str(line) {
            Ok(Event::Ready { address, .. }) => address,
            _ => None,
        });
    Ok((backup, address.context("a backup says its address")?))
}

pub(super) fn start_primary(work: &Path, at: SocketAddr, words: &str) -> Result<Role> {
    let at = at.to_string();
    let guest = ["--guest", "irq", "--memory", "8", "--command-line", words];
    let arguments = [&["primary", "--connect", &at], &guest[..], &COMMON[..]].concat();
    Role::start(work, "primary", &arguments)
}

/// One that runs already when it finds its backup.
pub(super) fn start_alone(work: &Path, at: SocketAddr, guest: [&str; 3]) -> Result<Role> {
    let at = at.to_string();
    let [guest, memory, words] = guest;
    let guest = [
        "--guest",
        guest,
        "--memory",
        memory,
        "--command-line",
        words,
    ];
    let start = [
        "primary",
        "--alone",
        "--connect",
        &at,
        "--console",
        "console",
    ];
    let arguments = [&start[..], &guest[..], &COMMON[..]].concat();
    let mut primary = Role::start(work, "primary", &arguments)?;
    primary.until("\"ready\"", LONGEST)?;
    Ok(primary)
}

/// Each stranger is refused or dropped; and then a pair forms although others go on ringing at the door.
fn strangers(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let (mut backup, address) = start_backup(work.path())?;
    let trust = trust(work.path())?;
    let mut visits = 0;
    for _ in 0..run.form.pick(1, 10) {
        for stranger in QUICK {
            let answer = stranger.visit_over_tcp(address, "machine", &trust, random)?;
            if let (Some(reason), Some(answer)) = (stranger.reason(), answer) {
                ensure!(answer.contains(reason), "{stranger:?} was told {answer:?}");
            }
            ensure!(
                backup.runs()?,
                "{stranger:?} ended the backup: {}",
                backup.said()
            );
            visits += 1;
        }
    }
    let over = AtomicBool::new(false);
    let mut primary = std::thread::scope(|scope| -> Result<Role> {
        // One says nothing, one drips, others come and go with tickets that they guess.
        let _silent = TcpStream::connect(address).context("reach the backup")?;
        scope.spawn(|| drip(address, &over));
        scope.spawn(|| guess_tickets(address, &over));
        let paired = start_primary(work.path(), address, "exits=3000").and_then(|mut primary| {
            primary.until("\"paired\"", LONGEST)?;
            Ok(primary)
        });
        over.store(true, Ordering::Relaxed);
        paired
    })?;
    for role in [&mut primary, &mut backup] {
        let status = role.end(LONGEST)?;
        ensure!(
            status.code() == Some(0) && !role.said().contains("panicked"),
            "ended by {status}: {}",
            role.said()
        );
    }
    run.say(format!(
        "{visits} strangers over TCP, and a pair in spite of them"
    ));
    figures.add("strangers_over_tcp", visits);
    Ok(())
}

/// The beginning of a message, byte by byte, for as long as the backup listens.
fn drip(address: SocketAddr, over: &AtomicBool) {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return;
    };
    for byte in [200u8, 0, 0, 0].into_iter().chain([b'{'; 196]) {
        if over.load(Ordering::Relaxed) || stream.write_all(&[byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// The ring's connection as a stranger would open it: the right word, any ticket, some of them slowly.
fn guess_tickets(address: SocketAddr, over: &AtomicBool) {
    let mut number = 0_u8;
    while !over.load(Ordering::Relaxed) {
        let Ok(mut stream) = TcpStream::connect(address) else {
            return;
        };
        number = number.wrapping_add(1);
        let message = [&b"doppel-r"[..], &[number; 16]].concat();
        if number.is_multiple_of(4) {
            for byte in message {
                let _ = stream.write_all(&[byte]);
                std::thread::sleep(Duration::from_millis(20));
            }
        } else {
            let _ = stream.write_all(&message);
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = [0; 64];
        let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
        let _ = stream.read(&mut answer);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A primary that meets a false backup ends with a clear error, soon.
fn impostors(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    for impostor in IMPOSTORS {
        let work = directory()?;
        let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
        let mut primary = start_primary(work.path(), listener.local_addr()?, "")?;
        impostor.receive_over_tcp(&listener, &trust(work.path())?, random)?;
        let said = primary
            .clear_error(LONGEST, &[1])
            .with_context(|| format!("{impostor:?}"))?;
        // What is left of a pair that did not come about: no second process takes the machine for running.
        if impostor == Impostor::Refuses {
            run.say(said.lines().last().unwrap_or_default());
        }
    }
    figures.add("impostors_over_tcp", IMPOSTORS.len());
    Ok(())
}

/// A backup that has welcomed a false primary ends with a clear error, soon: its machine was that one's.
fn false_primaries(run: &Run, random: &mut Random, figures: &mut Figures) -> Result<()> {
    for primary in FALSE_PRIMARIES {
        let work = directory()?;
        let (mut backup, address) = start_backup(work.path())?;
        primary
            .deceive(address, "machine", &trust(work.path())?, random)
            .with_context(|| format!("{primary:?}"))?;
        backup
            .until("a primary was refused", LONGEST)
            .with_context(|| format!("{primary:?}"))?;
        let said = backup.said();
        run.say(format!(
            "{primary:?}: {}",
            said.lines().last().unwrap_or_default()
        ));
        // It is as good a backup as before.
        let mut real = start_primary(work.path(), address, "exits=3000")?;
        for role in [&mut real, &mut backup] {
            role.until("\"paired\"", LONGEST)
                .with_context(|| format!("after {primary:?}"))?;
            let status = role.end(LONGEST)?;
            let said = role.said();
            ensure!(
                status.code() == Some(0)
                    && !said.contains("panicked")
                    && !said.contains("\"live\""),
                "after {primary:?} ended by {status}: {said}"
            );
        }
    }
    figures.add("false_primaries", FALSE_PRIMARIES.len());
    Ok(())
}

/// A machine that runs gives a backup up that takes its copy a few bytes at a time, serves on, and finds the next one.
fn slow_backup(run: &Run, figures: &mut Figures) -> Result<()> {
    let work = directory()?;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr().context("an address")?;
    drop(listener);
    let guest = ["memory", "96", "pages=64 steps=1"];
    let mut primary = start_alone(work.path(), address, guest)?;
    // More than sockets' buffers hold, so that the copy stands still: once the guest has written it all.
    let until = Instant::now() + LONGEST;
    wait(until, "the guest does not get through its memory", || {
        let console = std::fs::read(work.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&console).contains("pass 1")
    })?;
    let listener = TcpListener::bind(address).context("listen again")?;
    let bore = strangers::take_slowly(&listener, &trust(work.path())?)?;
    drop(listener);
    primary.until("is not taken", LONGEST)?;
    let arguments = ["backup", "--listen", &address.to_string()];
    let mut backup = Role::start(
        work.path(),
        "backup",
        &[&arguments[..], &COMMON[..]].concat(),
    )?;
    backup.until("\"paired\"", LONGEST)?;
    ensure!(primary.said().contains("too slow"), "{}", primary.said());
    primary.stop(LONGEST)?;
    backup.end(LONGEST)?;
    run.say(format!("a copy at a trickle was given up after {bore:?}"));
    figures.add("slow_backup_borne_ms", bore.as_millis() as u64);
    Ok(())
}

/// Frames that pass before harm is done: the pair is well under way.
const UNDER_WAY: usize = 40;

/// A pair whose log's stream is harmed while it runs: exactly one machine is left, or both sides where nothing was changed.
fn meddle(run: &Run, harm: Harm) -> Result<()> {
    let work = directory()?;
    let (mut backup, address) = start_backup(work.path())?;
    let meddler = TcpMeddler::before(address)?;
    let mut primary = start_primary(work.path(), meddler.address(), "hz=2000")?;
    for role in [&mut primary, &mut backup] {
        role.until("\"paired\"", LONGEST)?;
    }
    let until = Instant::now() + LONGEST;
    wait(until, "the pair logs nothing", || {
        meddler.frames() > UNDER_WAY
    })?;
    meddler.harm(harm);
    wait(until, "no harm was done", || meddler.is_done())?;
    let started = Instant::now();
    if harm.is_harmless() {
        let frames = meddler.frames();
        wait(until, "the log stands still", || {
            meddler.frames() > frames + UNDER_WAY
        })?;
        ensure!(primary.runs()? && backup.runs()?, "a side is gone");
    } else {
        one_is_left(&mut primary, &mut backup, until)?;
    }
    run.say(format!("{harm:?}: over after {:?}", started.elapsed()));
    for role in [&mut primary, &mut backup] {
        if role.runs()? {
            role.stop(LONGEST)?;
        }
        ensure!(!role.said().contains("panicked"), "{}", role.said());
    }
    Ok(())
}

pub(super) fn wait(
    until: Instant,
    what: &'static str,
    mut done: impl FnMut() -> bool,
) -> Result<()> {
    while !done() {
        ensure!(Instant::now() < until, what);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until one side serves alone and says so, and the other has ended in words. Both is one too many.
fn one_is_left(primary: &mut Role, backup: &mut Role, until: Instant) -> Result<()> {
    loop {
        let alone = primary.said().contains("UNPROTECTED");
        let heir = backup.said().contains("\"live\"");
        ensure!(
            !(alone && heir),
            "both serve: {}\n{}",
            primary.said(),
            backup.said()
        );
        let (runs, follows) = (primary.runs()?, backup.runs()?);
        if alone && runs && !follows || heir && follows && !runs {
            return Ok(());
        }
        ensure!(
            runs || follows,
            "neither is left: {}\n{}",
            primary.said(),
            backup.said()
        );
        ensure!(
            Instant::now() < until,
            "no end: the primary runs: {runs}, serves alone: {alone}; the backup runs: {follows}, serves: {heir}\n{}\n{}",
            primary.said(),
            backup.said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
