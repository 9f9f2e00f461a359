//! The ring over RDMA (issue 5, point 1): its whole suite of tests on a real kernel's device, in both modes of commit.
//!
//! The same programs run on every machine over a card that exists in their process only; here a host of the lab has soft-RoCE.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::harness::built;
use crate::harness::inside::Inside;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "rdma-ring",
    line: "every test of the ring holds over RDMA on a stock kernel's device: committed, fenced, killed and frozen, in both modes",
    short: Duration::from_secs(120),
    full: Duration::from_secs(600),
    show,
};

/// What of the library's tests is about RDMA: the transport, with the suite of all transports, and the verbs below it.
const OVER_RDMA: [&str; 2] = ["rdma::", "verbs::"];

/// For all tests: many times what they take.
const LONGEST: Duration = Duration::from_secs(540);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let tests = built::ring_tests()?;
    let listed = listed(&tests[0])?;
    ensure!(listed > 0, "the library has no tests of RDMA");
    let inside = Inside::boot("promise-rdma-ring")?;
    inside.bring(&tests)?;
    let [library, processes] = tests.each_ref().map(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    });
    let rounds = run.form.pick(1, 5);
    for round in 1..=rounds {
        let started = Instant::now();
        let words = [library.as_str(), "--test-threads", "1"];
        let said = inside.tests(&[&words[..], &OVER_RDMA].concat(), LONGEST)?;
        let passed = passed(&said)?;
        ensure!(passed == listed, "{passed} of {listed} tests ran: {said}");
        let in_library = started.elapsed();
        let said = inside.tests(&[&processes, "rdma"], LONGEST)?;
        let of_processes = said.matches(" ... ok").count();
        ensure!(of_processes > 0, "no test of processes ran: {said}");
        figures.add("tests_of_the_library", passed);
        figures.add("tests_of_processes", of_processes);
        run.say(format!(
            "round {round} of {rounds}: {passed} tests in {in_library:.1?}, {of_processes} of processes, {:.1?} in all",
            started.elapsed()
        ));
    }
    figures.add("rounds", rounds);
    Ok(figures)
}

/// How many tests of RDMA the library has.
fn listed(library: &Path) -> Result<usize> {
    let output = Command::new(library)
        .arg("--list")
        .args(OVER_RDMA)
        .output()
        .context("list the tests")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|line| line.ends_with(": test")).count())
}

/// How many passed; an error if one was left out or failed.
fn passed(said: &str) -> Result<usize> {
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix("test result: ok. "))
        .with_context(|| format!("no result in: {said}"))?;
    let count = |what: &str| -> Result<usize> {
        line.split("; ")
            .find_map(|part| part.strip_suffix(what))
            .and_then(|count| count.trim().parse().ok())
            .with_context(|| format!("no count of {what} in: {line}"))
    };
    ensure!(
        count("failed")? == 0 && count("ignored")? == 0,
        "not all of them: {line}"
    );
    count("passed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn results_are_read_and_what_was_left_out_is_noticed() {
        let result = |rest: &str| {
            format!(
                "running 3 tests\n\ntest result: {rest}; 0 measured; 9 filtered out; finished in 0.1s\n"
            )
        };
        assert_eq!(
            passed(&result("ok. 3 passed; 0 failed; 0 ignored")).unwrap(),
            3
        );
        passed(&result("ok. 2 passed; 0 failed; 1 ignored")).unwrap_err();
        passed(&result("FAILED. 2 passed; 1 failed; 0 ignored")).unwrap_err();
        passed("").unwrap_err();
    }
}
