//! A network that means harm (issue 4, point 4; issue 5): junk and forgeries at the heartbeat sockets, peers without the pair's secret
//! and a man in the middle of its set-up, peers that have the secret and mean harm, and a man in the middle of the log. Nobody dies
//! of it who need not, nobody is declared dead who lives, nobody learns a key or a byte of the guest from the control connection,
//! and never are there two live machines.
#![forbid(unsafe_code)]

mod datagrams;
mod proofs;
mod streams;

use std::time::Duration;

use anyhow::{Context, Result};

use crate::harness::random::Random;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "hostile-network",
    line: "Junk, floods, forgeries, peers without the secret and a man in the middle get no key, end no pair wrongly and make no two machines live",
    short: Duration::from_secs(75),
    full: Duration::from_secs(400),
    show,
};

/// A bound on anything that must end, or come, on a loaded host.
const LONGEST: Duration = Duration::from_secs(40);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    datagrams::show(run, &mut random, &mut figures).context("junk at the heartbeat sockets")?;
    proofs::show(run, &mut random, &mut figures).context("peers without the secret")?;
    streams::show(run, &mut random, &mut figures).context("hostile peers over TCP")?;
    Ok(figures)
}

#[cfg(test)]
mod tests {
    #[test]
    fn short() {
        super::PROMISE.test();
    }
}
