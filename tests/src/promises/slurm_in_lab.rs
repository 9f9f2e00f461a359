//! A machine as a Slurm job on hosts that are emulated (issue 8, 2): Debian's Slurm under systemd with cgroups and its accounting in a database. The
//! primary's node is killed as a host, which is also the batch script's; clients lose nothing, the job runs on, scancel turns the guest off on both
//! sides, and sacct has it.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::slurm_job::prove;
use crate::harness::slurm::SlurmGround;
use crate::harness::stage::alone;
use crate::lab_slurm::{self, LabCluster};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "slurm-in-lab",
    line: "a Slurm job outlives the host of its primary and of the batch script, killed, is protected again, is turned off by scancel; sacct tells it",
    short: Duration::from_secs(200),
    full: Duration::from_secs(1200),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let booted = Instant::now();
    let lab = lab_slurm::boot("promise-slurm-in-lab")?;
    run.say(format!("four hosts are up after {:.1?}", booted.elapsed()));
    alone(|| {
        let mut cluster = LabCluster::enter(&lab)?;
        let shown = prove(run, &mut cluster);
        shown.with_context(|| format!("what was said:\n{}", cluster.said()))
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
