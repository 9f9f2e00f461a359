//! What a request waits for where a machine is replicated by checkpoints (issue 7, point 5): measured by `bench checkpoint`, judged here.
//!
//! The aim (twice what the same bytes take over the bare link, besides the stop) is in what `bench` writes, with what was found. The
//! bounds here are those below which the promise is broken on any machine, a busy one with two cores too.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::bench::{measure, number};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "checkpoint-latency",
    line: "a reply that ends its interval waits for the stop and its own bytes' way, not for a beat of 25 ms; the stop is proportional to the pages written",
    short: Duration::from_secs(30),
    full: Duration::from_secs(600),
    show,
};

/// Most that a commit may take besides its stop, as a ratio to the same bytes over the bare link. The aim is 2. A copy more or a
/// checksum more over all bytes is about 1 each; a wait for a beat, or sending page by page, is tens.
const OVER_LINK: f64 = 6.0;
/// What it may take besides, whatever the size: the courier and, over a network, the backup wait for a processor, of which a busy machine
/// gives each a slice of some milliseconds at a time.
const SLICE_US: f64 = 10_000.0;
/// Up to so many pages a request is short against the beat of fixed intervals, on a busy machine too: there it must show.
const SHORT_PAGES: f64 = 256.0;
/// How much steeper the stop may be from one half of the sizes to the other: a line is 1. Were it quadratic, or constant with one
/// large step, it would be 16 and more for these sizes. It is judged by the shortest stop of each size: what others did to the rest says nothing
/// of pages.
const BENT: f64 = 8.0;

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let form = run.form.pick("--short", "--full");
    let result = measure("checkpoint", form, directory.path())?;
    for aim in result["aims"].as_array().into_iter().flatten() {
        if aim["reached"] == false {
            run.say(format!(
                "{}: {} where {} was aimed at; {}",
                aim["what"].as_str().unwrap_or_default(),
                aim["found"],
                aim["aim"],
                aim["remark"].as_str().unwrap_or_default()
            ));
        }
    }
    let mut figures = Figures::default();
    for transport in ["shm", "tcp"] {
        let found = &result["figures"][transport];
        judge(transport, found, &mut figures)
            .with_context(|| format!("log over {transport}: {found}"))?;
    }
    Ok(figures)
}

fn judge(transport: &str, found: &Value, figures: &mut Figures) -> Result<()> {
    let sizes = found["sizes"].as_array().context("bench wrote no sizes")?;
    let [first, .., last] = &sizes[..] else {
        anyhow::bail!("too few sizes");
    };
    for size in sizes {
        let of = |pointer: &str| number(size, pointer);
        let (pages, stop) = (of("/pages")?, of("/stop_us/p50")?);
        ensure!(
            of("/requests")? > 0.0 && of("/stop_us/count")? > 0.0,
            "nothing was measured with {pages} pages"
        );
        let (output, fixed) = (of("/output_us/p50")?, of("/fixed_us/p50")?);
        let (commit, link) = (of("/commit_us/p50")?, of("/link_us")?);
        let most = stop + OVER_LINK * link + SLICE_US;
        ensure!(
            commit <= most,
            "a commit of {pages} pages takes {commit} µs, the stop {stop} and the bare link {link}: {most:.0} were allowed"
        );
        ensure!(
            of("/asked")? > SHORT_PAGES || output < fixed,
            "with {pages} pages a reply that ends its interval comes after {output} µs, in fixed intervals after {fixed}"
        );
        let mut add =
            |name: &str, value: f64| figures.add(&format!("{transport}_{pages}_{name}"), value);
        add("request_us", output);
        add("request_fixed_us", fixed);
        add("commit_us", commit);
        add("stop_us", stop);
        add("link_us", link);
        add("added_over_link", of("/added_over_link")?);
    }
    let slope = number(found, "/stop_us_a_page")?;
    figures.add(&format!("{transport}_stop_us_a_page"), slope);
    figures.add(
        &format!("{transport}_link_mb_s"),
        number(found, "/link_mb_s")?,
    );
    ensure!(slope > 0.0, "more pages do not stop the guest for longer");
    let point = |size: &Value| -> Result<(f64, f64)> {
        Ok((number(size, "/pages")?, number(size, "/stop_us/least")?))
    };
    let middle = point(&sizes[sizes.len() / 2])?;
    let steep = |from: (f64, f64), to: (f64, f64)| (to.1 - from.1) / (to.0 - from.0);
    let (lower, upper) = (steep(point(first)?, middle), steep(middle, point(last)?));
    ensure!(
        upper > 0.0 && upper <= BENT * lower.max(slope / BENT),
        "the stop is not proportional to the pages: {lower:.2} µs a page up to {} pages, {upper:.2} beyond",
        middle.0
    );
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
    fn bad_figures_are_judged_bad() {
        let all = |change: &dyn Fn(&mut Value)| {
            let size = |pages: f64| {
                let (stop, link) = (50.0 + pages, pages / 2.0);
                json!({
                    "asked": pages - 30.0, "pages": pages, "requests": 9, "link_us": link,
                    "stop_us": {"count": 9, "least": stop, "p50": stop},
                    "commit_us": {"p50": stop + 3.0 * link}, "added_over_link": 3.0,
                    "output_us": {"p50": stop + 5.0 * link}, "fixed_us": {"p50": 20_000.0},
                })
            };
            let sizes: Vec<Value> = [50.0, 90.0, 290.0, 1060.0, 2090.0].map(size).into();
            let mut found = json!({"sizes": sizes, "stop_us_a_page": 1.0, "link_mb_s": 8000.0});
            change(&mut found);
            judge("shm", &found, &mut Figures::default())
        };
        all(&|_| {}).unwrap();
        all(&|found| found["sizes"][0]["commit_us"]["p50"] = json!(11_000.0)).unwrap_err();
        all(&|found| found["sizes"][4]["commit_us"]["p50"] = json!(19_000.0)).unwrap_err();
        all(&|found| found["sizes"][1]["output_us"]["p50"] = json!(20_001.0)).unwrap_err();
        all(&|found| found["sizes"][4]["output_us"]["p50"] = json!(20_001.0)).unwrap();
        all(&|found| found["sizes"][4]["stop_us"]["least"] = json!(20_000.0)).unwrap_err();
        all(&|found| found["sizes"][4]["stop_us"]["least"] = json!(300.0)).unwrap_err();
        all(&|found| found["stop_us_a_page"] = json!(0.0)).unwrap_err();
        all(&|found| found["sizes"][2]["requests"] = json!(0)).unwrap_err();
        all(&|found| *found = json!({"sizes": []})).unwrap_err();
    }
}
