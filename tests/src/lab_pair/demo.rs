//! The demo across two hosts of the lab: the primary's host is killed under its clients, and everything acknowledged is read back.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Result;
use hypervisor::backends::wait::Moment;
use hypervisor::config::Transport;
use hypervisor::demo::client::Series;
use hypervisor::demo::report::{Report, millis};
use hypervisor::intervals::Replication;
use hypervisor::session::report::Event;
use serde_json::{Value, json};

use super::{Choice, Guest, LabPair, PATIENCE, Site, await_answers};
use crate::harness::random::Random;

/// What to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest.
    pub guest: String,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// The log goes over TCP, not by RDMA.
    pub over_tcp: bool,
    /// TCP connections of the clients.
    pub connections: usize,
    /// Hosts to kill.
    pub kills: u32,
    /// How long the clients work before the first kill.
    pub before: Option<Duration>,
    /// Chooses moments and requests.
    pub seed: u64,
}

/// The load before a kill and after the last one, where nothing else is asked for: some hundred requests of an emulated guest.
const BEFORE: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(6)];
const AFTER: Duration = Duration::from_secs(5);

/// Shows it.
///
/// # Errors
/// If there is no lab, or a side does not do what it should; what was lost is no error but stands in the report.
pub fn run(options: &Options) -> Result<(Report, Series)> {
    let say = |text: &str| eprintln!("doppel: {text}");
    let mut random = Random::new(options.seed);
    say("booting two hosts in software emulation");
    let site = Site::set_up("demo", 1024)?;
    let transport = match options.over_tcp {
        true => Transport::Tcp,
        false => Transport::Rdma,
    };
    say("starting a primary in one and a backup in the other");
    let choice = Choice {
        transport,
        name: "demo",
        guest: Guest::Bare(&options.guest),
        memory_mib: options.memory_mib,
        replicate: Replication::Replay,
    };
    let mut pair = LabPair::start(&site, &choice)?;
    let client = site.clients(options.seed, options.connections)?;
    let mut rounds = Vec::new();
    for kill in 1..=options.kills {
        let by_chance = random.between(BEFORE[0], BEFORE[1]);
        let before = options.before.filter(|_| kill == 1).unwrap_or(by_chance);
        say(&format!(
            "clients write and read for {:.1} s",
            before.as_secs_f64()
        ));
        await_answers(&client, 1, PATIENCE)?;
        std::thread::sleep(before);
        pair.ensure_paired()?;
        say("the primary's host is killed");
        let killed = Moment::now();
        client.mark_kill(killed);
        pair.primary_host().kill()?;
        let (live_at, _) = pair.await_live()?;
        client.mark_live(live_at);
        say("the backup serves");
        await_answers(&client, 1, PATIENCE)?;
        if kill < options.kills {
            say("the host is booted again, and a new backup joins the machine");
            site.start(pair.primary.host())?;
            rounds.push(round(killed, live_at, &pair.rejoin()?));
        }
    }
    std::thread::sleep(AFTER);
    say("reading back everything that was acknowledged");
    let mut outcome = client.stop()?;
    let verified = outcome.verify_all(site.address(), PATIENCE);
    pair.listen();
    let mut report = Report {
        transport: transport.name().into(),
        network: "a bridge in each host".into(),
        guest: options.guest.clone(),
        ..Report::default()
    };
    report.take_client(options.connections, &outcome, &verified);
    if let Some(live) = pair.heard.live {
        pair.heard.describe(&live, &mut report);
        report
            .extra
            .insert("memory_checks".into(), live.memory_checks.into());
        report
            .extra
            .insert("outputs_sent_again".into(), live.resent.into());
    }
    report.set_emulated();
    report.extra.insert("seed".into(), options.seed.into());
    if !rounds.is_empty() {
        report.extra.insert("earlier".into(), rounds.into());
    }
    Ok((report, outcome.series))
}

/// What a kill before the last one took, as the demo on one machine tells it.
fn round(killed: Moment, live: Moment, joined: &Event) -> Value {
    let Event::Joined {
        stopped_us,
        took_us,
        bytes,
        rounds,
        ..
    } = joined
    else {
        return Value::Null;
    };
    json!({
        "failover_ms": millis(live.since(killed)),
        "stopped_ms": *stopped_us as f64 / 1e3,
        "joined_ms": *took_us as f64 / 1e3,
        "bytes": bytes,
        "rounds": rounds,
    })
}
