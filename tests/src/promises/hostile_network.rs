//! A network that means harm (issue 4, point 4): junk and forgeries at the heartbeat sockets, strangers and impostors at a TCP
//! pair, and a man in the middle of its log. Nobody dies of it who need not, nobody is declared dead who lives, and never are
//! there two live machines.
#![forbid(unsafe_code)]

mod datagrams;
mod streams;

use std::time::Duration;

use anyhow::{Context, Result};

use crate::harness::random::Random;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "hostile-network",
    line: "Junk, floods, forgeries, strangers and a man in the middle neither end a pair wrongly nor make two machines live",
    short: Duration::from_secs(45),
    full: Duration::from_secs(400),
    show,
};

/// A bound on anything that must end, or come, on a loaded host.
const LONGEST: Duration = Duration::from_secs(40);

fn show(run: &Run) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut random = Random::new(run.seed);
    datagrams::show(run, &mut random, &mut figures).context("junk at the heartbeat sockets")?;
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
