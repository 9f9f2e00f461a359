//! A machine with a disk at a site, where hosts are lost one after the other until a single one is left that only ever had copies: all that the
//! guest flushed is there. The machine then starts there and nowhere else; what is deleted leaves no file.
#![forbid(unsafe_code)]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::console::Viewer;
use crate::harness::disk_guest::flushed_in;
use crate::harness::site::{ALL, NAMES, Site, SiteGround, with_site};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "agents-disks",
    line: "a site's machine keeps what it flushed: hosts lost one after the other, copies made by agents, started again only where the newest image is",
    short: Duration::from_secs(45),
    full: Duration::from_secs(400),
    show,
};

/// A machine that writes its disk.
const STORE: &str = "store";

/// One that knows what must be on a copy of that.
const CHECK: &str = "check";

/// Its guest uses so many blocks of 4 KiB, all that there are.
const WORDS: &str = "every=4 blocks=1024";

/// A bound for what takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

fn show(run: &Run) -> Result<Figures> {
    with_site(|site| prove(run, site))
}

fn prove(run: &Run, site: &mut Site) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut rounds = 0;
    for turn in 0..run.form.pick(1, 8) {
        let replicate = if turn % 2 == 0 {
            "replay"
        } else {
            "checkpoint"
        };
        let flushed = outlives(run, site, replicate).with_context(|| format!("by {replicate}"))?;
        run.say(format!("by {replicate}: all of {flushed} rounds was there"));
        rounds += flushed;
    }
    let shared = site.vm(
        0,
        &["create", "x", "--guest", "disk", "--disk", "1G,shared"],
    );
    let why = shared.err().context("a shared disk was taken")?;
    ensure!(why.to_string().contains("by hand"), "{why}");
    for at in ALL {
        site.stop_agent(at)?;
        let left = (site.processes(at)?, site.disks(at)?);
        ensure!(
            left.0.is_empty() && left.1.is_empty(),
            "host {} still has {left:?}",
            NAMES[at]
        );
    }
    figures.add("rounds_flushed_and_found", rounds);
    Ok(figures)
}

/// What a console shows of a guest that writes, beyond this round.
fn beyond(viewer: &Viewer, round: u64) -> Result<u64> {
    let until = Instant::now() + PATIENCE;
    loop {
        let shown = viewer.shown();
        ensure!(!shown.contains("WRONG"), "{shown}");
        let flushed = flushed_in(&shown);
        if flushed > round {
            return Ok(flushed);
        }
        ensure!(
            Instant::now() < until,
            "nothing was flushed after round {round}: {shown:?}, {:?}",
            viewer.said()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A machine's life, until one host is left of three; the last round of which its guest said that it was flushed.
fn outlives(run: &Run, site: &mut Site, replicate: &str) -> Result<u64> {
    let guest = ["--guest", "disk", "--memory", "16", "--no-network"];
    let create = ["create", STORE, "--replicate", replicate, "--disk", "4M"];
    let words = ["--command-line", WORDS];
    site.vm(0, &[&create[..], &guest, &words].concat())?;
    site.until_protected(STORE, &ALL)?;
    let mut viewer = Viewer::start_at_site(&site.config(0), STORE)?;
    let mut flushed = beyond(&viewer, 0)?;

    let first = site.serves(STORE)?;
    let rest: Vec<usize> = ALL.into_iter().filter(|at| *at != first).collect();
    site.lose(first)?;
    let lost = Instant::now();
    flushed = beyond(&viewer, flushed).context("after the first loss")?;
    site.until_protected(STORE, &rest)?;
    run.say(format!("protected again after {:.1?}", lost.elapsed()));
    flushed = beyond(&viewer, flushed)?;

    let second = site.serves(STORE)?;
    let last = rest[usize::from(rest[0] == second)];
    site.kill_agent(last)?;
    site.lose(second)?;
    site.start_agent(last)?;
    flushed = beyond(&viewer, flushed).context("on the last host")?;
    let said = site.vm(last, &["stop", STORE])?;
    ensure!(said == format!("{STORE}: off\n"), "{said:?}");
    viewer.end(PATIENCE)?;
    flushed = flushed.max(flushed_in(&viewer.shown()));
    // What the last survivor has, as another machine's disk.
    let base = site.directory().join("base.img");
    let kept = site.disks(last)?;
    let image = kept
        .iter()
        .find(|path| path.extension().is_some_and(|end| end == "img"));
    fs::copy(image.context("no image was kept")?, &base).context("copy an image")?;

    for at in [first, second] {
        site.mend(at)?;
        site.until_member(at)?;
    }
    started_where_the_newest_is(site, last)?;
    run.say("started where the newest image is, and not before that was there");
    found(site, &base, flushed)?;
    let said = site.vm(0, &["stop", STORE])?;
    ensure!(said == format!("{STORE}: off\n"), "{said:?}");
    let kept = site.show(STORE)?["images"].as_array().map(Vec::len);
    ensure!(kept == Some(ALL.len()), "{kept:?} images were kept");
    for name in [STORE, CHECK] {
        let said = site.vm(0, &["delete", name])?;
        ensure!(said == format!("{name}: deleted\n"), "{said:?}");
    }
    for at in ALL {
        let left = site.disks(at)?;
        ensure!(left.is_empty(), "host {} still has {left:?}", NAMES[at]);
    }
    Ok(flushed)
}

/// While the host with the newest image is away the machine does not start, and says why; once it is back it starts there.
fn started_where_the_newest_is(site: &mut Site, last: usize) -> Result<()> {
    site.stop_agent(last)?;
    let early = site.vm(0, &["start", STORE, "--within", "1"]);
    ensure!(early.is_err(), "it was started with an older disk");
    let wanted = [
        "stale",
        &format!("on {}, whose agent is away", NAMES[last]),
        "--disk-of",
    ];
    let until = Instant::now() + PATIENCE;
    loop {
        let shown = site.show(STORE)?;
        ensure!(shown["served_by"] == Value::Null, "{shown:#}");
        let note = shown["note"].as_str().unwrap_or_default();
        if wanted.iter().all(|word| note.contains(word)) {
            break;
        }
        ensure!(
            Instant::now() < until,
            "it does not say what it waits for: {shown:#}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    site.start_agent(last)?;
    let shown = site.until_protected(STORE, &ALL)?;
    ensure!(shown["served_by"] == NAMES[last], "{shown:#}");
    Ok(())
}

/// A machine whose disk is a copy of this file finds all that was flushed up to this round.
fn found(site: &Site, base: &std::path::Path, flushed: u64) -> Result<()> {
    let base = base.to_str().context("a path of this machine")?;
    let words = format!("{WORDS} acked={flushed}");
    let create = ["create", CHECK, "--guest", "disk", "--memory", "16"];
    let rest = ["--no-network", "--unprotected", "--disk", base];
    let words = ["--command-line", &words];
    site.vm(1, &[&create[..], &rest, &words].concat())?;
    let mut viewer = Viewer::start_at_site(&site.config(0), CHECK)?;
    viewer.until(&format!("disk: found {flushed}\n"), PATIENCE)?;
    let shown = viewer.shown();
    ensure!(!shown.contains("WRONG"), "{shown}");
    site.vm(1, &["stop", CHECK])?;
    viewer.end(PATIENCE).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
