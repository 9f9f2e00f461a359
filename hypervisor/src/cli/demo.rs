//! `doppel demo`.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hypervisor::arbiter::Place;
use hypervisor::demo::plot;
use hypervisor::demo::run::{self, DemoError, Network, Options, Serving};
use hypervisor::session::report::Event;

use super::Failure;
use super::pair::{Carrier, ReplicateArgs};

mod in_lab;

/// What carries the guest's frames.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Net {
    /// A TAP where the host allows one, otherwise the link
    Auto,
    /// A TAP in a network namespace of its own
    Tap,
    /// A Unix-socket link, which needs no privilege
    Link,
}

/// Show a machine surviving the loss of its host process, with clients that notice nothing
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  doppel demo\n  doppel demo --plot failover.svg\n  doppel demo --transport tcp\n  doppel demo --replicate checkpoint\n  doppel demo --lab\n  doppel demo --arbiter etcd://127.0.0.1:2379\n  doppel demo --kills 3\n  doppel demo --json | jq .failover_ms\n  \
                  doppel demo --serve 6379      then, elsewhere: redis-cli -p 6379, and kill either side"
)]
pub struct DemoArgs {
    /// kv, compute, irq, clock, memory, or an ELF file; the client talks to all but the four test guests
    #[arg(long, value_name = "GUEST", default_value = "kv")]
    guest: String,
    /// Guest memory in MiB, 2 to 3072
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u32,
    /// More words for the guest's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    command_line: String,
    /// What carries the log from the primary to the backup: shm, in the lab rdma, if not given
    #[arg(long, value_enum)]
    transport: Option<Carrier>,
    /// Across two hosts of the lab, emulated Linux machines with RDMA, of which the primary's is killed (docs/lab.md)
    #[arg(long, conflicts_with_all = ["serve", "net", "arbiter", "kvm", "kvm_fd", "command_line", "replicate"])]
    lab: bool,
    #[command(flatten)]
    replicate: ReplicateArgs,
    /// The guest's network
    #[arg(long, value_enum, default_value = "auto")]
    net: Net,
    /// Where the arbiter is, instead of a directory of the demo's own; with etcd the guest's network is the link
    #[arg(long, value_name = "DIR|etcd://HOST:PORT,...")]
    arbiter: Option<Place>,
    /// TCP connections of the client
    #[arg(long, value_name = "N", default_value_t = 8)]
    connections: usize,
    /// Kill so many times; after each but the last a new backup joins the running machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// Let the clients work so long before the first kill; one to three seconds if not given
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=3600))]
    load: Option<u64>,
    /// Chooses the moment of the kill and the requests; random if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Draw the client's latency around the failover
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Stay up, and forward 127.0.0.1:PORT to the guest (without a value: any free port)
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "0")]
    serve: Option<u16>,
    /// Print one JSON object, alone on standard output
    #[arg(long)]
    json: bool,
    /// Where KVM is
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
    /// An open descriptor of /dev/kvm, left by the parent process
    #[arg(long, hide = true, value_name = "FD")]
    kvm_fd: Option<i32>,
}

impl DemoArgs {
    fn options(&self) -> Options {
        let random = || {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64)
        };
        Options {
            guest: self.guest.clone(),
            memory_mib: self.memory,
            command_line: self.command_line.clone(),
            network: match self.net {
                Net::Auto => Network::Auto,
                Net::Tap => Network::Tap,
                Net::Link => Network::Link,
            },
            transport: self.transport.unwrap_or(Carrier::Shm).into(),
            replication: self.replicate.replicate.map(Into::into).unwrap_or_default(),
            more: self.replicate.words(),
            arbiter: self.arbiter.clone(),
            connections: self.connections,
            kills: self.kills,
            before: self.load.map(std::time::Duration::from_secs),
            seed: self.seed.unwrap_or_else(random),
            kvm: self.kvm_fd,
            kvm_path: self.kvm.clone(),
            progress: std::io::stderr().is_terminal() || !self.json,
        }
    }
}

impl From<DemoError> for Failure {
    fn from(error: DemoError) -> Self {
        match error {
            DemoError::Interrupted => Self::new(0, error),
            _ => Self::new(Self::ERROR, error),
        }
    }
}

pub fn demo(args: &DemoArgs) -> Result<(), Failure> {
    if args.lab {
        return in_lab::demo(args);
    }
    if let Some(port) = args.serve {
        return serve(args, port);
    }
    let finished = match run::run(&args.options()) {
        Err(DemoError::Kvm(refused)) if args.kvm_fd.is_none() => {
            return in_lab::demo_instead(args, &refused);
        }
        finished => finished?,
    };
    if args.json {
        let line = finished
            .report
            .to_json()
            .map_err(|error| Failure::new(Failure::ERROR, error))?;
        println!("{line}");
    } else {
        print!("{}", finished.report.table(std::io::stdout().is_terminal()));
    }
    if let Some(path) = &args.plot {
        match &finished.series {
            Some(series) => {
                plot::draw(series, path).map_err(|error| Failure::new(Failure::ERROR, error))?
            }
            None => {
                return Err(Failure::new(
                    Failure::USAGE,
                    "--plot: this guest has no client, so there is nothing to draw",
                ));
            }
        }
        eprintln!("drew {}", path.display());
    }
    let failures = finished.report.failures();
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(Failure::ERROR, failures.join("; ")))
    }
}

fn serve(args: &DemoArgs, port: u16) -> Result<(), Failure> {
    let json = args.json;
    let tell = |serving: &Serving| {
        if json {
            println!(
                "{}",
                serde_json::json!({
                    "address": serving.address.ip().to_string(),
                    "port": serving.address.port(),
                    "guest": serving.guest.to_string(),
                    "primary_pid": serving.primary,
                    "backup_pid": serving.backup,
                    "enter": serving.enter,
                    "run_dir": serving.run_directory,
                })
            );
            return;
        }
        println!("the guest serves at {}", serving.address);
        println!("  redis-cli -p {}", serving.address.port());
        println!(
            "  redis-benchmark -p {} -t set,get -n 100000 -q",
            serving.address.port()
        );
        if let Some(enter) = &serving.enter {
            println!(
                "with nothing in between: {enter} redis-cli -h {}",
                serving.guest.ip()
            );
        }
        println!(
            "primary: process {}    backup: process {}",
            serving.primary, serving.backup
        );
        println!(
            "  kill -9 {0}              the backup takes over",
            serving.primary
        );
        println!(
            "  kill -STOP {0}           so it does; then kill -CONT {0}: the old primary ends by itself",
            serving.primary
        );
        println!(
            "  kill -9 {}              the primary goes on unprotected",
            serving.backup
        );
        println!(
            "to watch: doppel top --run-dir {}",
            serving.run_directory.display()
        );
        println!("Ctrl-C ends it all");
    };
    let happened = |role: &'static str, event: &Event| match event {
        Event::Notice { text, loud: true } if !json => eprintln!("{role}: {text}"),
        Event::Diverged { what } if !json => eprintln!("{role}: {what}"),
        Event::Live { .. } | Event::Paired { .. } | Event::Diverged { .. } if json => {
            println!("{}", serde_json::json!({"role": role, "what": event}));
        }
        _ => {}
    };
    Ok(run::serve(&args.options(), port, tell, happened)?)
}
