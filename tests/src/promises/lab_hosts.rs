//! The lab does what tests of two hosts need: real hosts with KVM and RDMA, that can be cut off, slowed, frozen and killed.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::program::doppel;
use crate::harness::random::Random;
use crate::lab::control::Power;
use crate::lab::session::{Happening, TimeUp};
use crate::lab::switch::Trouble;
use crate::lab::wire::Start;
use crate::lab::{Host, Lab, Spec, process};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "lab",
    line: "two real Linux hosts with KVM and RDMA boot in software emulation, and can be cut off, slowed, frozen and killed",
    short: Duration::from_secs(90),
    full: Duration::from_secs(300),
    show,
};

/// For commands that take a moment: enough for an emulated host on a busy machine.
const SOON: Duration = Duration::from_secs(60);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    let started = Instant::now();
    let lab = Lab::own(&Spec {
        name: "promise-lab".into(),
        memory_mib: 1024,
        ..Spec::default()
    })?;
    figures.add("two_hosts_up_s", tenths(started.elapsed()));
    run.say(format!("two hosts are up after {:?}", started.elapsed()));
    let (one, two) = (lab.host("h1"), lab.host("h2"));

    commands(&one)?;
    files(&one, &mut random)?;
    run.say("commands and files");
    shared_directory(&one, &two, run.form.pick(5, 50))?;
    run.say("the shared directory");
    figures.add("ping_ms", ping(&one, "h2")?);
    ping(&two, "h1-1").context("on the second network")?;
    kvm(&one)?;
    run.say("KVM");
    rdma(&one, &two, &mut figures)?;
    soft_roce(&one)?;
    run.say("RDMA");
    cables(&lab, &mut random)?;
    run.say("cables");
    frozen(&lab)?;
    run.say("frozen and thawed");
    for _ in 0..run.form.pick(1, 5) {
        let took = killed(&lab)?;
        figures.add("host_up_again_s", tenths(took));
        run.say(format!("killed, and up again after {took:?}"));
    }

    let (processes, directory) = (processes(&lab)?, lab.directory().to_owned());
    lab.down()?;
    ensure_gone(&processes, &directory)?;
    let orphans = supervisor_killed(run)?;
    figures.add("emulators_that_outlived_their_supervisor", orphans);
    ensure!(
        orphans == 0,
        "emulators outlive a supervisor that was killed"
    );
    Ok(figures)
}

fn tenths(span: Duration) -> f64 {
    (span.as_secs_f64() * 10.0).round() / 10.0
}

/// Codes, output, signals, the limit on time, and that nobody waits for who does not read.
fn commands(host: &Host<'_>) -> Result<()> {
    let ended = host.run(&["sh", "-c", "echo out; echo error >&2; exit 7"], SOON)?;
    ensure!(
        (ended.code, &*ended.stdout, &*ended.stderr) == (7, b"out\n", b"error\n"),
        "a command came back as {ended:?}"
    );
    let signalled = host.run(&["sh", "-c", "kill -TERM $$"], SOON)?;
    ensure!(
        signalled.code == 128 + 15,
        "a command that a signal ended has code {}",
        signalled.code
    );
    let Err(nothing) = host.run(&["no-such-program"], SOON) else {
        bail!("a program that is not there was started");
    };
    ensure!(
        nothing.to_string().contains("no-such-program"),
        "what is not there is not named: {nothing}"
    );

    // Nobody reads what it says: it must wait, and others must not.
    let chatter = host.session(&Start::new(&["sh", "-c", "exec yes lab-chatter"]))?;
    let first = chatter.next(Instant::now() + SOON)?;
    ensure!(
        matches!(first, Some(Happening::Output(_))),
        "it says {first:?}"
    );
    ensure!(
        host.sh("echo here", SOON)? == "here\n",
        "a second command says something else"
    );
    drop(chatter);
    none_left(host, "lab-chatter")?;

    let limit = Duration::from_secs(1);
    let Err(late) = host.run(&["sh", "-c", "sleep 54321; true"], limit) else {
        bail!("a command outlived its limit");
    };
    ensure!(late.is::<TimeUp>(), "a late command failed with {late:#}");
    none_left(host, "54321")
}

/// Waits until no process of the host has this in its command line: it is being killed.
fn none_left(host: &Host<'_>, word: &str) -> Result<()> {
    // The brackets keep grep from finding itself and the shell.
    let (first, rest) = word.split_at(1);
    host.sh(
        &format!("while grep -aqs '[{first}]{rest}' /proc/[0-9]*/cmdline; do sleep 0.1; done"),
        SOON,
    )
    .with_context(|| format!("what was to end with {word:?} in it goes on"))
    .map(drop)
}

/// A file goes there and back with its bytes and permissions, and an old one is replaced whole.
fn files(host: &Host<'_>, random: &mut Random) -> Result<()> {
    let work = tempfile::tempdir().context("make a directory")?;
    let (there, back) = (work.path().join("there"), work.path().join("back"));
    for size in [0, 1, 3_000_000] {
        let bytes: Vec<u8> = (0..size).map(|_| random.next() as u8).collect();
        fs::write(&there, &bytes).context("write a file")?;
        fs::set_permissions(&there, fs::Permissions::from_mode(0o750))
            .context("set permissions")?;
        host.put(&there, "/tmp/new/file", SOON)?;
        host.get("/tmp/new/file", &back, SOON)?;
        ensure!(
            fs::read(&back).context("read the copy")? == bytes,
            "{size} bytes came back as others"
        );
        let mode = fs::metadata(&back)
            .context("look at the copy")?
            .permissions()
            .mode()
            & 0o777;
        ensure!(mode == 0o750, "permissions came back as {mode:o}");
    }
    let Err(nothing) = host.get("/tmp/nothing", &back, SOON) else {
        bail!("a file that is not there was got");
    };
    ensure!(
        nothing.to_string().contains("/tmp/nothing"),
        "what is not there is not named: {nothing}"
    );
    Ok(())
}

/// Of two hosts that link the same name exactly one succeeds: the file arbiter stands on that.
fn shared_directory(one: &Host<'_>, two: &Host<'_>, names: u32) -> Result<()> {
    let line = |own: &str, other: &str| {
        format!(
            "cd /shared && echo {own} >{own} && sync {own} && while [ ! -e {other} ]; do :; done
             for name in $(seq {names}); do ln {own} record-$name 2>/dev/null && echo $name; done; true"
        )
    };
    let (a, b) = std::thread::scope(|scope| {
        let other = scope.spawn(|| two.sh(&line("two", "one"), SOON));
        (one.sh(&line("one", "two"), SOON), other.join())
    });
    let (a, b) = (a?, b.ok().context("a thread panicked")??);
    let all: Vec<&str> = a.lines().chain(b.lines()).collect();
    let different: BTreeSet<&str> = all.iter().copied().collect();
    ensure!(
        all.len() == names as usize && different.len() == all.len(),
        "{names} names were taken by the first host as {a:?} and by the second as {b:?}"
    );
    let seen = two.sh("cat /shared/record-1", SOON)?;
    ensure!(
        seen == one.sh("cat /shared/record-1", SOON)?,
        "the hosts see different records"
    );
    Ok(())
}

/// The time that an echo takes, at best, in milliseconds.
fn ping(from: &Host<'_>, to: &str) -> Result<f64> {
    let said = from.sh(&format!("ping -q -c 10 -i 0.1 -W 5 {to}"), SOON)?;
    said.lines()
        .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))
        .and_then(|figures| figures.split('/').next())
        .and_then(|least| least.parse().ok())
        .with_context(|| format!("ping says {said:?}"))
}

/// Our own virtual machine runs on the host's stock KVM, and its log replays.
fn kvm(host: &Host<'_>) -> Result<()> {
    host.put(&doppel()?, "/usr/bin/", SOON)?;
    host.sh(
        "cd /tmp && doppel record --guest compute --command-line reports=3 --out lab.log && doppel replay lab.log",
        SOON,
    )
    .context("a virtual machine on the host's KVM")?;
    Ok(())
}

/// A write reaches memory of another process, in the same host and in the other.
fn rdma(one: &Host<'_>, two: &Host<'_>, figures: &mut Figures) -> Result<()> {
    figures.add("rdma_write_in_one_host_us", write_latency(one, one, "h1")?);
    figures.add(
        "rdma_write_between_hosts_us",
        write_latency(one, two, "h1")?,
    );
    // The other way of setting up: by the connection manager.
    let server = one.session(&Start::new(&["rping", "-s", "-a", "10.88.0.1", "-C", "10"]))?;
    listening(one, "7174")?;
    let said = two.sh("rping -c -a 10.88.0.1 -C 10 -v", SOON)?;
    ensure!(
        said.matches("ping data").count() == 10,
        "rping says {said:?}"
    );
    let code = server.finish(SOON)?.code;
    ensure!(code == 0, "rping's server ended with code {code}");
    Ok(())
}

/// `scripts/soft-roce` on a host that has the module: idempotent, over a given interface and over its own.
fn soft_roce(host: &Host<'_>) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/soft-roce");
    host.put(&script, "/usr/bin/", SOON)?;
    let call = |words: &[&str], code: i32, says: &str| -> Result<()> {
        let ended = host.run(&[&["soft-roce"], words].concat(), SOON)?;
        let said = [ended.stdout, ended.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        ensure!(
            ended.code == code && said.contains(says),
            "soft-roce {words:?} ended with code {} and said {said:?}",
            ended.code
        );
        Ok(())
    };
    call(&["status"], 0, "rxe0")?;
    call(&["up"], 1, "rxe0 already, over eth0")?;
    call(&["up", "--interface", "eth9"], 1, "no interface eth9")?;
    for _ in 0..2 {
        call(&["up", "--device", "rxe1"], 0, "rxe1 is there")?;
    }
    call(&["status", "--device", "rxe1"], 0, "ACTIVE")?;
    call(&["down", "--device", "rxe1"], 0, "rxe1 is gone")?;
    for _ in 0..2 {
        call(&["down"], 0, "")?;
        call(&["status"], 3, "no device rxe0")?;
    }
    let left = host.sh("ip -brief link | grep -c doppel || true", SOON)?;
    ensure!(left == "0\n", "interfaces of soft-roce are left");
    for _ in 0..2 {
        call(
            &["up", "--interface", "eth0"],
            0,
            "rxe0 is there, over eth0",
        )?;
    }
    Ok(())
}

/// What perftest calls typical, in microseconds: half a round trip.
fn write_latency(server: &Host<'_>, client: &Host<'_>, address: &str) -> Result<f64> {
    let common = [
        "ib_write_lat",
        "-d",
        "rxe0",
        "-x",
        "1",
        "-F",
        "-s",
        "64",
        "-n",
        "500",
    ];
    let serving = server.session(&Start::new(&common))?;
    listening(server, "18515")?;
    let ended = client.run(&[&common[..], &[address]].concat(), SOON)?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(
        ended.code == 0,
        "ib_write_lat ended with code {}: {said}{}",
        ended.code,
        String::from_utf8_lossy(&ended.stderr)
    );
    let served = serving.finish(SOON)?;
    ensure!(
        served.code == 0,
        "its server ended with code {}: {}",
        served.code,
        String::from_utf8_lossy(&served.stderr)
    );
    said.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.first() == Some(&"64"))
        .and_then(|words| words.get(4)?.parse().ok())
        .with_context(|| format!("ib_write_lat says {said}"))
}

/// Waits until somebody listens on this TCP port, or rping on its RDMA one.
fn listening(host: &Host<'_>, port: &str) -> Result<()> {
    host.sh(
        &format!("until ss -Hltn | grep -q ':{port} ' || rdma resource show cm_id | grep -q ':{port} '; do sleep 0.1; done"),
        SOON,
    )
    .with_context(|| format!("nobody listens on port {port}"))
    .map(drop)
}

/// How many echo requests a host has received.
fn echoes(host: &Host<'_>) -> Result<u64> {
    let said = host.sh("nstat -asz IcmpInEchos", SOON)?;
    said.lines()
        .find_map(|line| line.strip_prefix("IcmpInEchos"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("nstat says {said:?}"))
}

/// Sends echo requests, and says whether all were answered.
fn answered(from: &Host<'_>, to: &str) -> Result<bool> {
    let ended = from.run(&["ping", "-q", "-c", "3", "-i", "0.2", "-W", "1", to], SOON)?;
    Ok(ended.code == 0)
}

fn cables(lab: &Lab, random: &mut Random) -> Result<()> {
    let (one, two) = (lab.host("h1"), lab.host("h2"));
    let cut = Trouble {
        cut: true,
        ..Trouble::default()
    };
    // Which direction is cut is for chance to say: both must work.
    let (from, to) = if random.next().is_multiple_of(2) {
        (&one, &two)
    } else {
        (&two, &one)
    };
    lab.cable(Some(0), from.name(), to.name(), cut)?;
    let before = (echoes(from)?, echoes(to)?);
    ensure!(!answered(from, to.name())?, "echoes pass a cut");
    ensure!(!answered(to, from.name())?, "answers pass a cut");
    let after = (echoes(from)?, echoes(to)?);
    ensure!(
        after.1 == before.1,
        "{} requests passed the cut",
        after.1 - before.1
    );
    ensure!(
        after.0 == before.0 + 3,
        "{} of 3 requests passed in the direction that is not cut",
        after.0 - before.0
    );
    ensure!(
        answered(from, &format!("{}-1", to.name()))?,
        "the cut is on the other network too"
    );
    lab.partition("h1", "h2")?;
    ensure!(
        !answered(&one, "h2-1")?,
        "the second network has escaped the partition"
    );
    lab.heal()?;
    ensure!(answered(&one, "h2")?, "the healed network does not work");
    ensure!(answered(&two, "h1-1")?, "the healed network does not work");

    let slow = Trouble {
        delay: Duration::from_millis(40),
        ..Trouble::default()
    };
    lab.cable(None, "h1", "h2", slow)?;
    let least = ping(&two, "h1")?;
    ensure!(
        least >= 40.0,
        "an echo over a cable that is late by 40 ms takes {least} ms"
    );
    lab.heal()
}

/// Seconds since the host's boot, by its own clock.
fn uptime(host: &Host<'_>) -> Result<f64> {
    let said = host.sh("cat /proc/uptime", SOON)?;
    said.split(' ')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .with_context(|| format!("/proc/uptime says {said:?}"))
}

fn frozen(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host("h1"), lab.host("h2"));
    let still = Duration::from_secs(2);
    for clock_too in [false, true] {
        let counted = two.session(&Start::new(&[
            "sh",
            "-c",
            "while echo; do sleep 0.05; done",
        ]))?;
        let began = Instant::now();
        let before = uptime(&two)?;
        if clock_too {
            two.freeze_with_clock()?;
        } else {
            two.freeze()?;
        }
        let froze = Instant::now();
        ensure!(!answered(&one, "h2")?, "a frozen host answers");
        let Err(refused) = two.run(&["true"], SOON) else {
            bail!("a frozen host runs a command");
        };
        ensure!(
            refused.to_string().contains("frozen"),
            "a frozen host refuses with {refused}"
        );
        // What it said before it froze may still come; then nothing.
        while counted.next(Instant::now() + still / 2)?.is_some() {
            ensure!(froze.elapsed() < SOON, "a frozen host goes on");
        }
        let stood = froze.elapsed();
        two.thaw()?;
        let after = uptime(&two)?;
        let whole = began.elapsed().as_secs_f64();
        let passed = after - before;
        ensure!(answered(&one, "h2")?, "a thawed host does not answer");
        ensure!(
            matches!(
                counted.next(Instant::now() + SOON)?,
                Some(Happening::Output(_))
            ),
            "what ran in the host does not go on"
        );
        // Its clock has hundredths of a second.
        if clock_too {
            ensure!(
                passed <= whole - stood.as_secs_f64() + 0.02,
                "its clock went on while it stood still: {passed} s of {whole}, of which it stood still {stood:?}"
            );
        } else {
            ensure!(
                passed >= stood.as_secs_f64() - 0.02,
                "its clock stood still for {stood:?} and says that {passed} s have passed"
            );
        }
    }
    Ok(())
}

/// Kills the second host while a command runs in it, and boots it again; how long that took.
fn killed(lab: &Lab) -> Result<Duration> {
    let (one, two) = (lab.host("h1"), lab.host("h2"));
    let boots = |lab: &Lab| -> Result<u32> {
        let status = lab.status()?;
        let host = status.hosts.iter().find(|host| host.name == "h2");
        Ok(host.context("the status has no h2")?.boots)
    };
    let before = boots(lab)?;
    two.sh("touch /tmp/of-this-life", SOON)?;
    let waiting = two.session(&Start::new(&["sleep", "1000"]))?;
    two.kill()?;
    let heard = Instant::now();
    let Err(gone) = waiting.finish(SOON) else {
        bail!("a command has ended on a host that was killed");
    };
    ensure!(
        gone.to_string().contains("gone"),
        "who waits on a killed host hears {gone:#}"
    );
    ensure!(
        heard.elapsed() < SOON / 2,
        "who waits on a killed host hears of it after {:?}",
        heard.elapsed()
    );
    ensure!(!answered(&one, "h2")?, "a killed host answers");
    ensure!(two.kill().is_err(), "a host was killed twice");
    let started = Instant::now();
    two.start()?;
    let took = started.elapsed();
    ensure!(
        answered(&one, "h2")?,
        "a host that is up again does not answer"
    );
    ensure!(boots(lab)? == before + 1, "a boot was not counted");
    let old = two.run(&["test", "-e", "/tmp/of-this-life"], SOON)?;
    ensure!(old.code == 1, "a host has kept what it had in memory");
    Ok(took)
}

/// The processes behind a lab.
fn processes(lab: &Lab) -> Result<Vec<u32>> {
    let status = lab.status()?;
    for host in &status.hosts {
        ensure!(host.power == Power::Up, "{} is {}", host.name, host.power);
    }
    let mut processes: Vec<u32> = status
        .hosts
        .iter()
        .filter_map(|host| host.process)
        .collect();
    ensure!(
        processes.len() == status.hosts.len(),
        "a host that is up has no process"
    );
    processes.push(status.supervisor);
    Ok(processes)
}

/// Whether a process runs. One that has ended and that nobody has waited for yet does not.
fn is_there(process: u32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('Z'))
    })
}

fn ensure_gone(processes: &[u32], directory: &Path) -> Result<()> {
    let left: Vec<_> = processes.iter().filter(|&&each| is_there(each)).collect();
    ensure!(left.is_empty(), "processes {left:?} of the lab are left");
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).context("look into the lab's directory")? {
            let path: PathBuf = entry.context("look into the lab's directory")?.path();
            if path.is_dir() {
                directories.push(path);
            } else {
                ensure!(
                    path.extension().is_some_and(|kind| kind == "log"),
                    "{} is left",
                    path.display()
                );
            }
        }
    }
    Ok(())
}

/// A second lab beside another's remains, whose supervisor is killed: how many of its emulators go on.
fn supervisor_killed(run: &Run) -> Result<usize> {
    let spec = Spec {
        name: "promise-lab-orphans".into(),
        hosts: 1,
        memory_mib: 512,
        ..Spec::default()
    };
    let lab = Lab::own(&spec)?;
    // Labs of one name do not meet.
    let Err(twice) = Lab::up(&spec) else {
        bail!("a lab came up twice");
    };
    ensure!(
        twice.to_string().contains("is up already"),
        "a lab that is up is made again with {twice:#}"
    );
    let mut processes = processes(&lab)?;
    let supervisor = processes.pop().context("a supervisor")?;
    process::signal(supervisor, process::Signal::Kill).context("kill the supervisor")?;
    let directory = lab.directory().to_owned();
    drop(lab);
    ensure_gone(&[supervisor], &directory)?;
    let since = Instant::now();
    while processes.iter().any(|&each| is_there(each)) && since.elapsed() < SOON {
        std::thread::park_timeout(Duration::from_millis(10));
    }
    run.say(format!(
        "emulators ended {:?} after their supervisor was killed",
        since.elapsed()
    ));
    Ok(processes.iter().filter(|&&each| is_there(each)).count())
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
