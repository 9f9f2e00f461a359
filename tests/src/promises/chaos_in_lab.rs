//! Anything may happen to a pair across two hosts of the lab, too (issue 6, the proof's part c): hosts that are killed, that stand still, that
//! do not hear each other; its log over RDMA and over TCP.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hypervisor::config::Transport;

use super::chaos::{deck, endure};
use crate::harness::chaos::Chaos;
use crate::harness::linear_clients::LinearClients;
use crate::harness::random::Random;
use crate::lab_pair::ground::{HAPPENINGS, LabGround};
use crate::lab_pair::{PATIENCE, Site};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "chaos-in-lab",
    line: "across two hosts, over RDMA and TCP: hosts and processes killed, frozen, cut off and moved at random, under load: never two live machines, no lost write, protected again",
    short: Duration::from_secs(240),
    full: Duration::from_secs(3600),
    show,
};

/// Enough that some wait at any moment, few enough for a guest that is emulated.
const CLIENTS: u32 = 4;

fn show(run: &Run) -> Result<Figures> {
    let mut random = Random::new(run.seed);
    let mut figures = Figures::default();
    let started = Instant::now();
    let site = Site::set_up("promise-chaos-in-lab", 1024)?;
    run.say(format!("two hosts are up after {:.1?}", started.elapsed()));
    let happenings = run.form.pick(5, 4 * HAPPENINGS.len());
    for transport in [Transport::Rdma, Transport::Tcp] {
        let name = transport.name();
        let ground = LabGround {
            site: &site,
            transport,
            name: format!("chaos-{name}"),
        };
        let deck = deck(&HAPPENINGS, happenings, &mut random);
        let chaos = Chaos::start(ground).with_context(|| format!("over {name}"))?;
        let seed = random.next();
        let clients = LinearClients::start_patient(site.address(), CLIENTS, seed, PATIENCE)?;
        let endured = endure(run, chaos, clients, &deck, &mut random);
        let endured = endured.with_context(|| format!("over {name}"))?;
        endured.add_to(&format!("{name}_"), &mut figures);
        site.lab().heal()?;
    }
    let overflowed = site.lab().status()?.frames_overflowed;
    figures.add("frames_lost_at_full_queues", overflowed);
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
