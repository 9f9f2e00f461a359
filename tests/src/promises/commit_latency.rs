//! The ring's latency, what protection adds to a request, and the log of an idle guest: measured by `bench`, judged here.
//!
//! The aims of the measurements are in what `bench` writes, with what keeps a figure from reaching its aim. The bounds here
//! are those below which the promise is broken on any machine, a busy one with two cores too; each says where it comes from.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::bench::{measure, number};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "commit-latency",
    line: "an output commits within microseconds, a request pays for it less than a tenth of what checkpointing takes, an idle guest logs under 0.1 Mb/s",
    short: Duration::from_secs(30),
    full: Duration::from_secs(600),
    show,
};

/// Most that an entry may take, as a ratio to a bare cache line between the same two cores, half of the time. The aim is 1.5.
/// An entry moves two lines, its own and the tail which commits it, where the bare ping moves one: that is 2. Two checksums
/// and the copies come to as much again where a line crosses quickly (60 ns here on a quiet machine). A system call, a lock or a
/// wait on the way is ten and more.
const RING_RATIO: f64 = 4.0;
/// Most that an output may wait for its commit, half of the time: the design's "microseconds". Measured within the vCPU thread, so
/// that other processes hardly show in it.
const COMMIT_US: f64 = 10.0;
/// Most that protection may add to a request, half of the time: a tenth of the 25 ms that checkpointing (Remus, COLO) takes. Some
/// tens of microseconds are usual; the bound leaves a busy machine's scheduler a time slice.
const ADDED_US: f64 = 2500.0;
/// Most log of an idle guest, in Mb/s: the aim itself, since no other process makes a guest log more.
const IDLE_MEGABITS: f64 = 0.1;

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let form = run.form.pick("--short", "--full");
    let mut figures = Figures::default();
    let judges: [(&str, Judge); 3] = [
        ("ring", judge_ring),
        ("request", judge_request),
        ("log", judge_log),
    ];
    for (name, judge) in judges {
        let result = measure(name, form, directory.path())?;
        for aim in result["aims"].as_array().into_iter().flatten() {
            if aim["reached"] == false {
                run.say(format!(
                    "{}: {} where {} was aimed at; {}",
                    text(&aim["what"]),
                    aim["found"],
                    aim["aim"],
                    text(&aim["remark"])
                ));
            }
        }
        judge(&result["figures"], &mut figures)
            .with_context(|| format!("bench {name}: {}", result["figures"]))?;
    }
    Ok(figures)
}

type Judge = fn(&Value, &mut Figures) -> Result<()>;

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn judge_ring(found: &Value, figures: &mut Figures) -> Result<()> {
    for (name, bare) in [("visible", "bare_one_way"), ("received", "bare_round_trip")] {
        ensure!(
            number(found, &format!("/{name}/count"))? > 0.0,
            "nothing was measured"
        );
        let ratio = number(found, &format!("/{name}/ratio_p50"))?;
        figures.add(
            &format!("{name}_ns_p50"),
            number(found, &format!("/{name}/p50_ns"))?,
        );
        figures.add(
            &format!("{bare}_ns_p50"),
            number(found, &format!("/{bare}/p50_ns"))?,
        );
        figures.add(&format!("{name}_ratio"), ratio);
        ensure!(
            ratio <= RING_RATIO,
            "{name} takes {ratio} times what a bare cache line takes; {RING_RATIO} were allowed"
        );
    }
    Ok(())
}

fn judge_request(found: &Value, figures: &mut Figures) -> Result<()> {
    let rows = found["requests"]
        .as_array()
        .context("bench wrote no requests")?;
    ensure!(
        rows.len() == 2,
        "one and sixteen connections were to be measured: {rows:?}"
    );
    for row in rows {
        ensure!(number(row, "/requests")? > 0.0, "nothing was measured");
        let added = number(row, "/p50_us/added")?;
        let connections = &row["connections"];
        figures.add(&format!("added_us_p50_{connections}_connections"), added);
        figures.add(
            &format!("added_us_p99_{connections}_connections"),
            number(row, "/p99_us/added")?,
        );
        ensure!(
            added <= ADDED_US,
            "with {connections} connections protection adds {added} µs; {ADDED_US} were allowed"
        );
    }
    ensure!(
        number(found, "/commit_us/count")? > 0.0,
        "no commit was measured"
    );
    let commit = number(found, "/commit_us/p50")?;
    figures.add("commit_us_p50", commit);
    figures.add("commit_us_p99", number(found, "/commit_us/p99")?);
    ensure!(
        commit <= COMMIT_US,
        "a commit takes {commit} µs; {COMMIT_US} were allowed"
    );
    Ok(())
}

fn judge_log(found: &Value, figures: &mut Figures) -> Result<()> {
    let idle = number(found, "/idle/ring_megabits_per_s")?;
    figures.add("idle_megabits_per_s", idle);
    ensure!(
        number(found, "/idle/entries_per_s")? > 0.0,
        "an idle guest logs its clock; nothing was measured"
    );
    ensure!(
        idle <= IDLE_MEGABITS,
        "an idle guest logs {idle} Mb/s; {IDLE_MEGABITS} were allowed"
    );
    for row in found["requests"]
        .as_array()
        .context("bench wrote no requests")?
    {
        let bytes = number(row, "/ring_bytes_per_request")?;
        ensure!(bytes > 0.0, "a request without log: {row}");
        let offered = match row["rate"].as_f64() {
            Some(rate) => format!("{rate}_a_second"),
            None => "as_served".to_owned(),
        };
        figures.add(
            &format!(
                "bytes_per_request_{}_connections_{offered}",
                row["connections"]
            ),
            bytes,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    fn judged(judge: Judge, found: &Value) -> Result<()> {
        judge(found, &mut Figures::default())
    }

    #[test]
    fn bad_figures_are_judged_bad() {
        let ring = |visible: f64, received: f64| {
            json!({
                "bare_one_way": {"p50_ns": 60.0}, "bare_round_trip": {"p50_ns": 120.0},
                "visible": {"p50_ns": 100.0, "ratio_p50": visible, "count": 1},
                "received": {"p50_ns": 200.0, "ratio_p50": received, "count": 1},
            })
        };
        judged(judge_ring, &ring(1.6, 2.0)).unwrap();
        judged(judge_ring, &ring(4.1, 2.0)).unwrap_err();
        judged(judge_ring, &ring(1.6, 4.1)).unwrap_err();
        judged(judge_ring, &json!({})).unwrap_err();

        let request = |added: f64, commit: f64| {
            let row = json!({"connections": 1, "requests": 9, "p50_us": {"added": added}, "p99_us": {"added": 9.0}});
            json!({"requests": [row.clone(), row], "commit_us": {"count": 9, "p50": commit, "p99": 3.0}})
        };
        judged(judge_request, &request(20.0, 1.0)).unwrap();
        judged(judge_request, &request(2501.0, 1.0)).unwrap_err();
        judged(judge_request, &request(20.0, 11.0)).unwrap_err();
        judged(judge_request, &json!({"requests": []})).unwrap_err();

        let log = |idle: f64, bytes: f64| {
            json!({
                "idle": {"ring_megabits_per_s": idle, "entries_per_s": 90.0},
                "requests": [{"connections": 1, "rate": null, "ring_bytes_per_request": bytes}],
            })
        };
        judged(judge_log, &log(0.05, 300.0)).unwrap();
        judged(judge_log, &log(0.11, 300.0)).unwrap_err();
        judged(judge_log, &log(0.05, 0.0)).unwrap_err();
    }
}
