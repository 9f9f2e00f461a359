//! `bench`: measures, and writes what it found as figures, a table and a picture. It judges nothing: promises do.

mod account;
mod alternatives;
mod checkpoint;
mod demo;
mod draw;
mod failover;
mod host;
mod link;
mod linux;
mod log;
mod paper;
mod quote;
mod rdma;
mod report;
mod request;
mod ring;
mod sheet;
mod throughput;
#[cfg(feature = "two-sided")]
mod two_sided;
mod world;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use sheet::Sheet;

/// Measure Doppel on this machine
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  bench ring --short\n  bench all --full --out results\n\nFigures mean something on a quiet machine only."
)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    /// The ring between two cores: latency against a bare cache line, throughput against crossbeam and memcpy
    Ring(Form),
    /// The ring over RDMA, against bare writes and perftest: on a machine with a device, as a host of the lab is
    Rdma(Form),
    /// What protection adds to a request
    Request(Form),
    /// What protection leaves of a guest's pace
    Throughput(Form),
    /// Bytes of log for a request and for an idle second
    Log(Form),
    /// Failover and longest wait of a client, over many kills
    Failover(Form),
    /// Protected guests beside redis-server, Sentinel and etcd: latency, throughput, a kill, and what was lost
    Alternatives(Form),
    /// The paper's tables: the guest's work and its network, protected and not; the log's bandwidth
    Paper(PaperForm),
    /// Replicated by checkpoints: a request by what it has the guest write, against the bare link; how long the guest stands
    Checkpoint(Form),
    /// One Linux guest alone, protected both ways, and under QEMU: on a host whose KVM runs Linux, as a host of the lab is
    Linux {
        #[command(flatten)]
        form: Form,
        #[command(flatten)]
        files: linux::Files,
    },
    /// One run of `doppel demo`, as it prints it
    Demo(Form),
    /// All of them but `rdma` and `linux`, one after the other, and the report; with --full also what the documents quote
    All(Form),
    /// One self-contained page, and the pictures anew, from the results that are there
    Report {
        /// Where they are
        #[arg(long, value_name = "DIRECTORY", default_value = "results")]
        out: PathBuf,
    },
    /// The other side of the bare link of `checkpoint`
    #[command(hide = true)]
    Peer(link::Peer),
    /// Whether every figure that README.md and docs/ quote is what results/ says
    Quote {
        /// Take them from there
        #[arg(long)]
        write: bool,
        /// The project's directory
        #[arg(long, value_name = "DIRECTORY", default_value = ".")]
        root: PathBuf,
    },
}

#[derive(Clone, Debug, Args)]
struct Form {
    /// A few seconds, to see that it works and to notice what broke (the default)
    #[arg(long, conflicts_with = "full")]
    short: bool,
    /// As long as the figures need
    #[arg(long)]
    full: bool,
    /// Where to write NAME.json, NAME.md and NAME.svg
    #[arg(long, value_name = "DIRECTORY", default_value = "results")]
    out: PathBuf,
    /// Kills of `failover`: 5 in the short form, 200 in the full one
    #[arg(long, value_name = "N")]
    kills: Option<u64>,
    /// Seed of the first of them
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Debug, Args)]
struct PaperForm {
    #[command(flatten)]
    form: Form,
    /// Only this work, and no idle guest; may be given several times
    #[arg(long, value_name = "WORK")]
    job: Vec<paper::Job>,
    /// Rounds: 1 in the short form, 5 in the full one
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// The pair's log over TCP, not in shared memory
    #[arg(long)]
    tcp: bool,
}

/// Where results lie, in the project's directory.
const RESULTS: &str = "results";

/// All results that there can be.
fn names() -> Vec<&'static str> {
    ALL.into_iter().chain(["rdma", "linux"]).collect()
}

/// What `all` runs.
const ALL: [&str; 9] = [
    "ring",
    "request",
    "throughput",
    "log",
    "failover",
    "alternatives",
    "paper",
    "checkpoint",
    "demo",
];

impl PaperForm {
    fn measure(&self) -> Result<Sheet> {
        let extent = paper::Extent {
            time: Duration::from_millis(self.form.pick(1000, 10_000)),
            rounds: self.rounds.unwrap_or(self.form.pick(1, 5)),
            only: self.job.clone(),
            pair: if self.tcp {
                world::Mode::PairTcp
            } else {
                world::Mode::Pair
            },
        };
        paper::measure(&extent)
    }
}

impl Form {
    fn pick<T>(&self, short: T, full: T) -> T {
        if self.full { full } else { short }
    }

    fn ring(&self) -> Result<Sheet> {
        ring::measure(ring::Extent {
            blocks: self.pick(10, 200),
            bytes: self.pick(4 << 20, 512 << 20),
            entries: self.pick(20_000, 2_000_000),
            rounds: self.pick(1, 9),
        })
    }

    fn rdma(&self) -> Result<Sheet> {
        rdma::measure(rdma::Extent {
            blocks: self.pick(3, 15),
            block: self.pick(100, 400),
            bytes: self.pick(16 << 20, 128 << 20),
        })
    }

    fn request(&self) -> Result<Sheet> {
        request::measure(request::Extent {
            time: Duration::from_millis(self.pick(1000, 10_000)),
            rounds: self.pick(1, 7),
        })
    }

    fn throughput(&self) -> Result<Sheet> {
        throughput::measure(throughput::Extent {
            time: Duration::from_millis(self.pick(1000, 10_000)),
            rounds: self.pick(1, 7),
        })
    }

    fn log(&self) -> Result<Sheet> {
        log::measure(log::Extent {
            idle: Duration::from_millis(self.pick(2000, 60_000)),
            load: Duration::from_millis(self.pick(500, 10_000)),
        })
    }

    fn failover(&self) -> Result<Sheet> {
        failover::measure(self.kills.unwrap_or(self.pick(5, 200)), self.seed)
    }

    fn alternatives(&self) -> Result<Sheet> {
        alternatives::measure(alternatives::Extent {
            time: Duration::from_millis(self.pick(700, 10_000)),
            patience: Duration::from_secs(self.pick(8, 20)),
            keys: self.pick(256, 4096),
            rounds: self.pick(1, 5),
        })
    }

    fn checkpoint(&self) -> Result<Sheet> {
        checkpoint::measure(checkpoint::Extent {
            requests: self.pick(8, 400),
            fixed: self.pick(8, 120),
            blocks: self.pick(40, 400),
        })
    }

    /// Each in a process of its own: a network namespace cannot be left again.
    fn all(&self) -> Result<()> {
        let own = std::env::current_exe().context("find this program's own file")?;
        for name in ALL {
            let mut command = Command::new(&own);
            command
                .args([
                    name,
                    self.pick("--short", "--full"),
                    "--seed",
                    &self.seed.to_string(),
                    "--out",
                ])
                .arg(&self.out);
            if let Some(kills) = self.kills {
                command.args(["--kills", &kills.to_string()]);
            }
            let status = command
                .status()
                .with_context(|| format!("start bench {name}"))?;
            ensure!(status.success(), "bench {name}: {status}");
        }
        report::write(&self.out)?;
        // What the documents quote is of this run, then; elsewhere nobody quotes it.
        if self.full && self.out == Path::new(RESULTS) {
            quote::check(Path::new("."), true, &names())?;
        }
        Ok(())
    }
}

fn finish(sheet: &Sheet, out: &Path) -> Result<()> {
    sheet.write(out)?;
    println!("{}", sheet.markdown());
    Ok(())
}

fn run(what: &What) -> Result<()> {
    match what {
        What::Ring(form) => finish(&form.ring()?, &form.out),
        What::Rdma(form) => finish(&form.rdma()?, &form.out),
        What::Request(form) => finish(&form.request()?, &form.out),
        What::Throughput(form) => finish(&form.throughput()?, &form.out),
        What::Log(form) => finish(&form.log()?, &form.out),
        What::Failover(form) => finish(&form.failover()?, &form.out),
        What::Alternatives(form) => finish(&form.alternatives()?, &form.out),
        What::Paper(paper) => finish(&paper.measure()?, &paper.form.out),
        What::Checkpoint(form) => finish(&form.checkpoint()?, &form.out),
        What::Linux { form, files } => finish(&linux::measure(files, form.pick(1, 5))?, &form.out),
        What::Peer(peer) => link::serve(peer),
        What::Demo(form) => finish(&demo::measure(form.seed)?, &form.out),
        What::All(form) => form.all(),
        What::Report { out } => {
            println!("{}", report::write(out)?.display());
            Ok(())
        }
        What::Quote { write, root } => {
            println!(
                "{} figures are what results/ says",
                quote::check(root, *write, &names())?
            );
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse().what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
