//! Killed in the middle of a copy, over RDMA (issue 5, point 4): the sender or the receiver of a running machine's copy dies at a
//! random byte; the survivor goes on, says what happened, leaks nothing, and takes a new peer.
//!
//! On a machine without an RDMA device it is shown in a host of the lab, where both sides meet over its soft-RoCE.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::harness::inside::{Inside, has_rdma};
use crate::harness::random::Random;
use crate::harness::torn_copy::{Ground, torn};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "rdma-copy",
    line: "a death at any byte of a machine's copy costs the other side nothing over RDMA: it goes on, leaks nothing, takes a new peer",
    short: Duration::from_secs(90),
    full: Duration::from_secs(900),
    show,
};

/// For all deaths: many times what they take.
const LONGEST: Duration = Duration::from_secs(3000);

fn show(run: &Run) -> Result<Figures> {
    if has_rdma() {
        let mut figures = Figures::default();
        let mut random = Random::new(run.seed);
        let deaths = run.form.pick(4, 50);
        torn(
            run,
            &Ground::emulated_rdma(),
            deaths,
            &mut random,
            &mut figures,
        )?;
        return Ok(figures);
    }
    let started = Instant::now();
    let inside = Inside::boot("promise-rdma-copy")?;
    run.say(format!(
        "a host with RDMA is up after {:.1?}",
        started.elapsed()
    ));
    let told = inside.prove(PROMISE.name, run, run.form, LONGEST)?;
    Ok(Figures(
        told["figures"].as_object().cloned().unwrap_or_default(),
    ))
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
