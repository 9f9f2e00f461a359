//! Record and replay on the other kind of KVM (issue 5, point 3): what is promised of them on this machine holds in a host of the
//! lab, on a stock kernel with `kvm_amd`.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::harness::inside::Inside;
use crate::promise::{Figures, Form, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "replay-in-lab",
    line: "replay-exact, divergence-named and output-rule hold on a stock kernel's kvm_amd, too, in a host of the lab",
    short: Duration::from_secs(120),
    full: Duration::from_secs(1800),
    show,
};

/// What is shown there.
const SHOWN: [&str; 3] = ["replay-exact", "divergence-named", "output-rule"];

/// For one of them: many times what it takes.
const LONGEST: Duration = Duration::from_secs(1500);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let inside = Inside::boot("promise-replay-in-lab")?;
    let kvm = inside.host().sh(
        "for module in kvm_amd kvm_intel; do [ ! -d /sys/module/$module ] || echo $module; done",
        LONGEST,
    )?;
    ensure!(!kvm.is_empty(), "the host has no stock KVM");
    figures.add("kvm", kvm.trim());
    // Emulation makes each step some ten times as long as on this machine.
    let form = run.form.pick(Form::Brief, Form::Short);
    for name in SHOWN {
        let started = Instant::now();
        let told = inside
            .prove(name, run, form, LONGEST)
            .with_context(|| format!("with {kvm}"))?;
        run.say(format!(
            "{name} in {:.1?}: {}",
            started.elapsed(),
            told["figures"]
        ));
        figures.add(&name.replace('-', "_"), told["figures"].clone());
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
