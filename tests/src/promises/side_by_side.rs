//! A protected guest beside what people use instead (issue 8, 3): measured by `bench alternatives`, judged here.
//!
//! Judged is what must hold of ours, on a busy machine too: nothing that was acknowledged is lost, no connection breaks, and somebody
//! serves again. What the others do is reported, and how fast anybody was.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::bench;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "side-by-side",
    line: "beside redis-server, Sentinel and etcd, a protected guest loses no acknowledged write and no connection; who is faster at what is told",
    short: Duration::from_secs(60),
    full: Duration::from_secs(1500),
    show,
};

/// Ours, and the alternatives.
const OURS: [&str; 2] = ["pair_shm", "pair_tcp"];
const OTHERS: [&str; 5] = ["guest", "redis_wait", "sentinel", "sentinel_wait", "etcd"];

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let form = run.form.pick("--short", "--full");
    let found = bench::measure("alternatives", form, directory.path())?;
    let mut figures = Figures::default();
    judge(&found["figures"]["contenders"], &mut figures)?;
    Ok(figures)
}

fn judge(found: &Value, figures: &mut Figures) -> Result<()> {
    for key in OURS.into_iter().chain(OTHERS) {
        let row = &found[key];
        let number = |pointer: &str| bench::number(row, pointer).with_context(|| key.to_owned());
        ensure!(
            number("/keys_checked")? > 0.0 && number("/closed/writes_per_s")? > 0.0,
            "{key}: nothing was measured: {row}"
        );
        for (name, pointer) in [
            ("p50_us", "/fixed/p50_us"),
            ("writes_per_s", "/closed/writes_per_s"),
            ("lost", "/lost"),
            ("broken", "/broken_connections"),
        ] {
            figures.add(&format!("{key}_{name}"), number(pointer)?);
        }
        figures.add(
            &format!("{key}_without_service_ms"),
            row["without_service_ms"]["max"].clone(),
        );
    }
    for key in OURS {
        let row = &found[key];
        ensure!(row["ours"] == true, "{key} is not said to be ours");
        ensure!(
            row["served_again"] == true,
            "{key}: nobody served after the kill: {row}"
        );
        ensure!(
            row["lost"] == 0,
            "{key}: acknowledged writes were lost: {row}"
        );
        ensure!(
            row["broken_connections"] == 0,
            "{key}: connections broke: {row}"
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

    #[test]
    fn a_loss_of_ours_is_none_of_theirs() {
        let row = |ours: bool, lost: u64, broken: u64, again: bool| {
            json!({
                "ours": ours, "served_again": again, "lost": lost, "broken_connections": broken, "keys_checked": 9,
                "fixed": {"p50_us": 1.0}, "closed": {"writes_per_s": 1.0},
            })
        };
        let all = |lost, broken, again| {
            let mut found = json!({});
            for key in OTHERS {
                found[key] = row(false, 7, 7, false);
            }
            for key in OURS {
                found[key] = row(true, 0, 0, true);
            }
            found["pair_tcp"] = row(true, lost, broken, again);
            judge(&found, &mut Figures::default())
        };
        all(0, 0, true).unwrap();
        all(1, 0, true).unwrap_err();
        all(0, 1, true).unwrap_err();
        all(0, 0, false).unwrap_err();
        judge(&json!({}), &mut Figures::default()).unwrap_err();
    }
}
