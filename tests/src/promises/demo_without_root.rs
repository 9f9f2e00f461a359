//! The demo for a user without any privilege: KVM is accessible, a TAP is not.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::demo::report::Report;

use crate::harness::random::Random;
use crate::harness::unprivileged::doppel_as_nobody;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "demo-without-root",
    line: "where /dev/kvm is accessible the demo needs no root: without a TAP it takes the Unix-socket link, and loses nothing",
    short: Duration::from_secs(8),
    full: Duration::from_secs(60),
    show,
};

fn show(run: &Run) -> Result<Figures> {
    let times = run.form.pick(1, 10);
    let mut random = Random::new(run.seed);
    let mut failovers = Vec::new();
    for _ in 0..times {
        let output = doppel_as_nobody(&["demo", "--json", "--seed", &random.next().to_string()])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        let report: Report =
            serde_json::from_slice(&output.stdout).context("read the demo's JSON")?;
        // Some hosts let everybody make a TAP in a namespace of their own; then that is what the demo takes.
        let expected = if tap_is_for_root()? { "link" } else { "tap" };
        ensure!(
            report.network == expected,
            "the network was {}, where a user can have a {expected}",
            report.network
        );
        let failures = report.failures();
        ensure!(failures.is_empty(), "{}", failures.join("; "));
        ensure!(
            report.requests.before > 0 && report.requests.after > 0,
            "the client did not work"
        );
        let failover = report.failover_ms.context("no failover was measured")?;
        run.say(format!(
            "failover {failover:.1} ms, longest wait {:.1} ms",
            report.client_stall_ms_max
        ));
        failovers.push(failover);
    }
    failovers.sort_by(f64::total_cmp);
    let mut figures = Figures::default();
    figures.add("runs", times);
    figures.add("failover_ms_worst", failovers.last().copied());
    Ok(figures)
}

/// Whether `/dev/net/tun` cannot be opened by everybody, or is not there.
fn tap_is_for_root() -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata("/dev/net/tun") {
        Ok(found) => Ok(found.mode() & 0o006 != 0o006),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).context("look at /dev/net/tun"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
