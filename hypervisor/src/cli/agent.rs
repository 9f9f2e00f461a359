//! `doppel agent`.

use std::path::PathBuf;

use clap::Args;
use hypervisor::agent::config::{AgentConfig, DEFAULT};
use hypervisor::backends::outflow;

use super::Failure;

/// Run this host's agent: the machines of a site look after themselves
#[derive(Debug, Args)]
#[command(
    after_help = "One to a host, as root or as a user who may use /dev/kvm and /dev/net/tun; docs/cluster.md says how to set up a site, and\n\
                  hypervisor/package/doppel-agent.service is its systemd unit. Its machines run on when it ends, and are found again.\n\n\
                  A configuration to begin with:\n  \
                  etcd = \"etcd://192.0.2.10:2379,192.0.2.11:2379,192.0.2.12:2379\"\n  \
                  secret = \"/etc/doppel/site.secret\"    # doppel secret FILE makes it; the same on every host\n  \
                  address = \"192.0.2.1\"                 # this host's, for the other hosts\n  \
                  memory_mib = 65536                    # for machines\n  \
                  bridge = \"br0\"                        # to which guests are cabled\n  \
                  disks = \"/var/lib/doppel/disks\"       # images of machines' disks\n\n\
                  Examples:\n  doppel agent\n  doppel agent --config /etc/doppel/agent.toml --check"
)]
pub struct AgentArgs {
    /// The agent's configuration
    #[arg(long, value_name = "FILE.toml", default_value = DEFAULT)]
    config: PathBuf,
    /// Only say whether the configuration is a good one
    #[arg(long)]
    check: bool,
}

pub fn agent(args: &AgentArgs) -> Result<(), Failure> {
    let usage = |error| Failure::new(Failure::USAGE, error);
    let config = AgentConfig::read(&args.config).map_err(usage)?;
    if args.check {
        println!(
            "{}: a good one, of host {}",
            args.config.display(),
            config.name
        );
        return Ok(());
    }
    // An agent that its own log keeps is one that is lost.
    outflow::begin(|| {}, |text| tracing::warn!("{text}"))
        .map_err(|error| Failure::new(Failure::ERROR, error))?;
    hypervisor::agent::run(&config).map_err(|error| Failure::new(Failure::ERROR, error))
}
