//! Whether a guest did its work: by what it said on its console, and what the host saw of it.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Requests of each kind that redis-benchmark is asked for.
pub const REQUESTS: u64 = 500;

/// Their kinds, in redis-benchmark's order.
pub const KINDS: [&str; 4] = ["set", "get", "incr", "lpush"];

/// What compiled programs of C print: known numbers, and a chain of remainders through 600 functions of 24 units.
const COMPILED: [&str; 2] = [
    "program: 9592 primes, cbf43926, 92 queens, 5000 sorted, 51 words, 1.414213562, 3.141592654",
    "units: 6431",
];

/// The block that the guest changes below fio, and how fio says that it is not what it wrote.
const CHANGED: &str = "fio: changed: verify: bad magic header";

/// redis-benchmark's table (`--csv`), then the server's own count of what it was asked: both know of every request.
pub fn requests(_console: &str, told: &str) -> Result<Value> {
    let mut each = serde_json::Map::new();
    for kind in KINDS {
        let row = format!("\"{}\",\"", kind.to_uppercase());
        let rate = told
            .lines()
            .find_map(|line| line.strip_prefix(&row))
            .and_then(|rest| rest.split('"').next())
            .and_then(|rate| rate.parse::<f64>().ok())
            .with_context(|| format!("redis-benchmark has no rate of {kind}"))?;
        let counted = format!("cmdstat_{kind}:calls=");
        let line = told
            .lines()
            .find_map(|line| line.strip_prefix(&counted))
            .with_context(|| format!("the server was never asked for {kind}"))?;
        let calls: u64 = line
            .split(',')
            .next()
            .and_then(|calls| calls.parse().ok())
            .context("the server's count is no number")?;
        ensure!(
            calls >= REQUESTS && line.contains("rejected_calls=0,failed_calls=0"),
            "{kind}: of {REQUESTS} requests the server counts {line}"
        );
        each.insert(format!("{kind}_a_second"), json!(rate.round()));
    }
    Ok(Value::Object(each))
}

/// Every job of fio ended without an error and read each of its blocks, when it had written them and when the disk was mounted anew; and
/// the block that was changed in between was found.
pub fn fio(console: &str, _told: &str) -> Result<Value> {
    for what in ["written", "mounted anew"] {
        for (job, blocks) in [("sequential", 64), ("random", 512)] {
            let (begin, all) = (
                format!("fio: {what}: {job}: "),
                format!("fio: {what}: issued rwts: total={blocks},{blocks},"),
            );
            let line = console
                .lines()
                .find_map(|line| line.strip_prefix(&begin))
                .with_context(|| format!("fio says nothing of {job}, {what}"))?;
            ensure!(
                line.contains(" err= 0: "),
                "fio's {job}, {what}, has errors: {line}"
            );
            ensure!(
                console.lines().any(|line| line.starts_with(&all)),
                "fio's {job}, {what}, did not write and verify {blocks} blocks"
            );
        }
        let ended = format!("fio: {what} ended with 0");
        ensure!(
            console.lines().any(|line| line.trim() == ended),
            "fio did not end well, {what}"
        );
    }
    ensure!(
        console.contains(CHANGED) && console.contains("fio: changed ended with 1"),
        "fio did not find the block that was changed: its verifying shows nothing"
    );
    ensure!(
        console.contains("fio: unmounted"),
        "the disk was not unmounted"
    );
    Ok(json!({"blocks_verified": 2 * (64 + 512), "changed_blocks_found": 1}))
}

/// Both programs were linked, and print what is known of them.
pub fn compile(console: &str, _told: &str) -> Result<Value> {
    for line in COMPILED {
        ensure!(
            console.lines().any(|said| said.trim() == line),
            "the compiled programs do not print {line:?}"
        );
    }
    Ok(json!({"programs_right": COMPILED.len()}))
}

/// The kernel says that it had no memory left and killed the program, the shell that it died of SIGKILL; and what came after is right.
pub fn exhaust(console: &str, _told: &str) -> Result<Value> {
    let killed = console
        .lines()
        .filter(|line| line.contains("Out of memory: Killed process"))
        .collect::<Vec<_>>();
    ensure!(
        killed.len() == 1 && killed[0].contains("(tail)"),
        "not the program that takes all memory was killed: {killed:?}"
    );
    for line in [
        "exhaust: the program ended with 137",
        "exhaust: counted 39999",
    ] {
        ensure!(
            console.lines().any(|said| said.trim() == line),
            "the guest does not say {line:?}"
        );
    }
    let anonymous = killed[0]
        .split("anon-rss:")
        .nth(1)
        .and_then(|rest| rest.split("kB").next())
        .and_then(|number| number.parse::<u64>().ok())
        .context("the kernel does not say how much it had")?;
    Ok(json!({"killed_with_mib": anonymous / 1024}))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIO: &str = "fio: written ended with 0
fio: written: sequential: (groupid=0, jobs=1): err= 0: pid=60: Fri Nov 27 05:25:18 2026
fio: written: issued rwts: total=64,64,0,0 short=0,0,0,0 dropped=0,0,0,0
fio: written: random: (groupid=1, jobs=1): err= 0: pid=61: Fri Nov 27 05:25:18 2026
fio: written: issued rwts: total=512,512,0,15 short=0,0,0,0 dropped=0,0,0,0
fio: mounted anew ended with 0
fio: mounted anew: sequential: (groupid=0, jobs=1): err= 0: pid=70: Fri Nov 27 05:25:19 2026
fio: mounted anew: issued rwts: total=64,64,0,0 short=0,0,0,0 dropped=0,0,0,0
fio: mounted anew: random: (groupid=1, jobs=1): err= 0: pid=71: Fri Nov 27 05:25:19 2026
fio: mounted anew: issued rwts: total=512,512,0,0 short=0,0,0,0 dropped=0,0,0,0
fio: changed ended with 1
fio: changed: verify: bad magic header c5b, wanted acca at file /mnt/random.0.0 offset 409600, length 4096
fio: unmounted\n";

    const TOLD: &str = "\"test\",\"rps\",\"avg_latency_ms\"
\"SET\",\"94.32\",\"1.0\"
\"GET\",\"93.10\",\"1.0\"
\"INCR\",\"81.44\",\"1.0\"
\"LPUSH\",\"101.20\",\"1.0\"
cmdstat_set:calls=500,usec=1,usec_per_call=1.00,rejected_calls=0,failed_calls=0
cmdstat_get:calls=500,usec=1,usec_per_call=1.00,rejected_calls=0,failed_calls=0
cmdstat_incr:calls=500,usec=1,usec_per_call=1.00,rejected_calls=0,failed_calls=0
cmdstat_lpush:calls=500,usec=1,usec_per_call=1.00,rejected_calls=0,failed_calls=0\n";

    const EXHAUST: &str = "[   12.1] Out of memory: Killed process 61 (tail) total-vm:194020kB, anon-rss:190464kB, file-rss:4kB, shmem-rss:0kB
Killed
exhaust: the program ended with 137
exhaust: counted 39999\n";

    /// The text without any one of its lines, and with a word of it changed.
    fn none_holds(
        proof: impl Fn(&str) -> Result<Value>,
        text: &str,
        needless: &[&str],
        changes: &[(&str, &str)],
    ) {
        proof(text).unwrap();
        for left_out in 0..text.lines().count() {
            let lines = text.lines().enumerate();
            let rest: Vec<_> = lines
                .filter(|(at, _)| *at != left_out)
                .map(|(_, line)| line)
                .collect();
            let line = text.lines().nth(left_out).unwrap();
            let held = proof(&rest.join("\n")).is_ok();
            assert_eq!(
                held,
                needless.iter().any(|word| line.starts_with(word)),
                "{line}"
            );
        }
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            assert!(proof(&text.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn requests_are_proved_by_both_sides() {
        none_holds(
            |told| requests("", told),
            TOLD,
            &["\"test\""],
            &[
                ("cmdstat_get:calls=500", "cmdstat_get:calls=499"),
                (
                    "rejected_calls=0,failed_calls=0",
                    "rejected_calls=0,failed_calls=1",
                ),
            ],
        );
    }

    #[test]
    fn fio_is_proved_by_each_of_its_jobs() {
        none_holds(
            |console| fio(console, ""),
            FIO,
            &[],
            &[
                ("err= 0: pid=71", "err=84: pid=71"),
                (
                    "mounted anew: issued rwts: total=512,512",
                    "mounted anew: issued rwts: total=511,512",
                ),
                ("fio: changed ended with 1", "fio: changed ended with 0"),
            ],
        );
    }

    #[test]
    fn programs_are_proved_by_what_they_print() {
        let text = COMPILED.join("\n");
        none_holds(
            |console| compile(console, ""),
            &text,
            &[],
            &[("6431", "6430")],
        );
    }

    #[test]
    fn exhaustion_is_proved_by_who_was_killed() {
        let twice = EXHAUST.replace("Killed\n", EXHAUST.lines().next().unwrap());
        assert!(exhaust(&twice, "").is_err());
        none_holds(
            |console| exhaust(console, ""),
            EXHAUST,
            &["Killed"],
            &[("(tail)", "(init)"), ("with 137", "with 1")],
        );
    }
}
