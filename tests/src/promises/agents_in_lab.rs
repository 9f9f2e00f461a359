//! A site that looks after itself, across three hosts of the lab (issue 8, 1): hosts are killed at random and boot again, agents are killed and
//! replaced, etcd stands still; two guests serve their clients all along.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::agents_keep::{Course, keep};
use crate::harness::site::SiteGround;
use crate::harness::stage::alone;
use crate::lab_site::{self, LabSite};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "agents-in-lab",
    line: "three hosts with agents, over etcd: a host killed every minute and back later, agents killed and replaced, etcd still: two guests serve on, protected again",
    short: Duration::from_secs(300),
    full: Duration::from_secs(2000),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let booted = Instant::now();
    let lab = lab_site::boot("promise-agents-in-lab")?;
    run.say(format!("three hosts are up after {:.1?}", booted.elapsed()));
    let course = Course {
        losses: run.form.pick(3, 20),
        outage: Duration::from_secs(run.form.pick(4, 60)),
        every: Duration::from_secs(run.form.pick(0, 60)),
    };
    alone(|| {
        let mut site = LabSite::enter(&lab)?;
        let shown = keep(run, &mut site, &course);
        shown.with_context(|| format!("what was said:\n{}", site.said()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
