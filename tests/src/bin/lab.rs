//! `scripts/lab`: brings up hosts, runs commands in them, cuts their cables, kills and freezes them.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use doppel_tests::lab::control::{Power, Status};
use doppel_tests::lab::session::{Happening, TimeUp};
use doppel_tests::lab::supervisor::{self, Plan};
use doppel_tests::lab::switch::Trouble;
use doppel_tests::lab::wire::Start;
use doppel_tests::lab::{Lab, PLAN, Spec, agent, directory, made_image, remove_remains};
use doppel_tests::lab_pair::demo;
use doppel_tests::linux_guest::{Kit, LinuxGuest};
use doppel_tests::promise::today;
use hypervisor::demo::plot;

/// The code when the time was up, as timeout(1) has it.
const TIME_UP: u8 = 124;
/// The code when the lab itself failed, as env(1) and docker(1) have it.
const LAB_FAILED: u8 = 125;

/// Real Linux hosts for tests, as virtual machines in software emulation
#[derive(Debug, Parser)]
#[command(
    name = "scripts/lab",
    after_help = "Examples:\n  scripts/lab up --hosts 2\n  scripts/lab run h1 ping -c 3 h2\n  scripts/lab run h1 'dmesg | tail'\n  \
                  scripts/lab put h1 target/release/doppel /usr/bin/\n  scripts/lab partition h1 h2 --one-way\n  \
                  scripts/lab down\n\nExit codes: 0; the command's own (run); 2 for a wrong call; 124 when the time was up; 125 \
                  when the lab failed.\ndocs/lab.md says what a host has and what the lab cannot do."
)]
struct Arguments {
    /// Which lab: those of different names do not meet
    #[arg(long, global = true, default_value = "lab", env = "DOPPEL_LAB")]
    name: String,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a lab's hosts and return when they are up
    Up(Up),
    /// Get what hosts are made of, so that `up` needs no network
    Fetch {
        /// As up has it
        #[arg(long, value_delimiter = ',')]
        packages: Vec<String>,
    },
    /// Make the files of a Linux guest, kernel and initial RAM disk, in a directory
    Guest {
        /// What it has to work with
        #[arg(long, value_enum, default_value_t)]
        kit: Kit,
        /// Where to
        directory: PathBuf,
    },
    /// Run a command in a host; one word with spaces is a line of shell
    Run(Run),
    /// Copy a file into a host
    Put {
        /// The host
        host: String,
        /// The file
        file: PathBuf,
        /// Where to; a directory if it ends in /
        target: String,
        #[command(flatten)]
        limit: Limit,
    },
    /// Copy a file out of a host
    Get {
        /// The host
        host: String,
        /// The file
        file: String,
        /// Where to
        target: PathBuf,
        #[command(flatten)]
        limit: Limit,
    },
    /// Cut the cables between two hosts, or between one and all others
    Partition {
        #[command(flatten)]
        between: Between,
    },
    /// Make everything between two hosts late, and lose some if asked to
    Delay {
        /// By how many milliseconds, in each direction
        milliseconds: f64,
        #[command(flatten)]
        between: Between,
        /// How much is lost, in percent of the frames
        #[arg(long, default_value_t = 0.0)]
        loss: f64,
    },
    /// Make all cables sound
    Heal,
    /// A host vanishes at once
    Kill {
        /// The host
        host: String,
    },
    /// Boot a host that is off, and return when it is up
    Start {
        /// The host
        host: String,
    },
    /// A host stands still; its clock goes on, so that it notices when thawed
    Freeze {
        /// The host
        host: String,
        /// Its clock stands still too: when thawed it does not notice
        #[arg(long)]
        clock: bool,
    },
    /// A host that stands still goes on
    Thaw {
        /// The host
        host: String,
    },
    /// Print a host's console, or what the supervisor said
    Logs {
        /// The host
        host: Option<String>,
    },
    /// Say how the hosts and cables are
    Status {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// End the lab: nothing of it stays but its logs
    Down,
    /// Show a pair across two hosts surviving the loss of one: doppel demo --lab
    Demo(DemoArgs),
    /// The lab's own process
    #[command(hide = true)]
    Supervise {
        /// End when standard input does
        #[arg(long)]
        owned: bool,
    },
    /// The process in every host that starts commands
    #[command(hide = true)]
    Agent,
}

#[derive(Debug, Args)]
struct Up {
    /// How many hosts: h1 and so on
    #[arg(long, default_value_t = Spec::default().hosts)]
    hosts: u8,
    /// Memory of each, in MiB
    #[arg(long, default_value_t = Spec::default().memory_mib, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// Virtual CPUs of each; with more than one, the emulator now and then does what no processor does
    #[arg(long, default_value_t = Spec::default().cpus, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// The largest packet on the cables, in bytes
    #[arg(long, default_value_t = Spec::default().mtu, value_parser = clap::value_parser!(u16).range(1280..=9000))]
    mtu: u16,
    /// Debian packages, with commas between: each host is then a whole Debian with them, under systemd
    #[arg(long, value_delimiter = ',')]
    packages: Vec<String>,
    /// How long a boot may take, in seconds
    #[arg(long, default_value_t = Spec::default().boot_within.as_secs())]
    limit: u64,
}

#[derive(Debug, Args)]
struct Limit {
    /// How long it may take, in seconds
    #[arg(long, default_value_t = 120.0)]
    limit: f64,
}

impl Limit {
    fn span(&self) -> Result<Duration> {
        Duration::try_from_secs_f64(self.limit).context("read --limit")
    }
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    limit: Limit,
    /// Hand over standard input
    #[arg(long, short)]
    input: bool,
    /// Leave it running, its output going to this file in the host; print its process id
    #[arg(long, value_name = "FILE", conflicts_with = "input")]
    detach: Option<String>,
    /// A variable for it
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The host
    host: String,
    /// The command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct Between {
    /// A host
    one: String,
    /// Another; all others if not given
    other: Option<String>,
    /// Only what goes from the first to the other
    #[arg(long)]
    one_way: bool,
    /// Only on this network (0: eth0, 1: eth1)
    #[arg(long)]
    network: Option<u8>,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// The guest: kv, or an ELF file that speaks the Redis protocol
    #[arg(long, default_value = "kv")]
    guest: String,
    /// Its memory, in MiB
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// What carries the log: rdma or tcp
    #[arg(long, value_parser = ["rdma", "tcp"], default_value = "rdma")]
    transport: String,
    /// TCP connections of the clients
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Hosts of primaries to kill, one after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// Seconds that the clients work before the first kill; a few if not given
    #[arg(long)]
    load: Option<u64>,
    /// Chooses the moment of the kill and the requests
    #[arg(long)]
    seed: Option<u64>,
    /// Draw the clients' latency around the failover
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON object, alone on standard output
    #[arg(long)]
    json: bool,
}

fn demonstrate(arguments: &DemoArgs) -> Result<ExitCode> {
    let options = demo::Options {
        guest: arguments.guest.clone(),
        memory_mib: arguments.memory,
        over_tcp: arguments.transport == "tcp",
        connections: arguments.connections,
        kills: arguments.kills,
        before: arguments.load.map(Duration::from_secs),
        seed: arguments.seed.unwrap_or_else(today),
    };
    let (report, series) = demo::run(&options)?;
    if arguments.json {
        println!("{}", report.to_json().context("write the report")?);
    } else {
        print!("{}", report.table(std::io::stdout().is_terminal()));
    }
    if let Some(path) = &arguments.plot {
        plot::draw(&series, path).context("draw the picture")?;
        eprintln!("drew {}", path.display());
    }
    Ok(match report.failures().is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match act(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(if error.is::<TimeUp>() {
                TIME_UP
            } else {
                LAB_FAILED
            })
        }
    }
}

fn act(arguments: &Arguments) -> Result<ExitCode> {
    let name = &arguments.name;
    let lab = || Lab::find(name);
    match &arguments.command {
        Verb::Up(up) => bring_up(name, up)?,
        Verb::Guest { kit, directory } => {
            let guest = LinuxGuest::with(*kit, directory)?;
            println!("{} and {}", guest.kernel.display(), guest.initrd.display());
        }
        Verb::Fetch { packages } => {
            let image = made_image(packages)?;
            println!(
                "{} and {}",
                image.kernel.display(),
                image.initramfs.display()
            );
        }
        Verb::Run(run) => return execute(&lab()?, run),
        Verb::Put {
            host,
            file,
            target,
            limit,
        } => lab()?.host(host).put(file, target, limit.span()?)?,
        Verb::Get {
            host,
            file,
            target,
            limit,
        } => lab()?.host(host).get(file, target, limit.span()?)?,
        Verb::Partition { between } => {
            let cut = Trouble {
                cut: true,
                ..Trouble::default()
            };
            trouble(&lab()?, between, cut)?;
        }
        Verb::Delay {
            milliseconds,
            between,
            loss,
        } => {
            anyhow::ensure!(
                (0.0..=100.0).contains(loss),
                "--loss is a percentage: 0 to 100"
            );
            let late = Trouble {
                cut: false,
                delay: Duration::try_from_secs_f64(milliseconds / 1000.0)
                    .context("read the delay")?,
                lost_per_million: (loss * 10_000.0) as u32,
            };
            trouble(&lab()?, between, late)?;
        }
        Verb::Heal => lab()?.heal()?,
        Verb::Kill { host } => lab()?.host(host).kill()?,
        Verb::Start { host } => lab()?.host(host).start()?,
        Verb::Freeze { host, clock: false } => lab()?.host(host).freeze()?,
        Verb::Freeze { host, clock: true } => lab()?.host(host).freeze_with_clock()?,
        Verb::Thaw { host } => lab()?.host(host).thaw()?,
        Verb::Logs { host } => logs(&directory(name)?, host.as_deref())?,
        Verb::Status { json } => status(&lab()?, *json)?,
        Verb::Down => match lab() {
            Ok(lab) => lab.down()?,
            Err(_) => remove_remains(&directory(name)?)?,
        },
        Verb::Demo(arguments) => return demonstrate(arguments),
        Verb::Supervise { owned } => {
            let plan = fs::read_to_string(PLAN).context("read the plan")?;
            let plan: Plan = serde_json::from_str(&plan).context("read the plan")?;
            supervisor::supervise(&plan, *owned)?;
        }
        Verb::Agent => agent::serve()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn bring_up(name: &str, up: &Up) -> Result<()> {
    let spec = Spec {
        name: name.to_owned(),
        hosts: up.hosts,
        memory_mib: up.memory,
        cpus: up.cpus,
        mtu: up.mtu,
        boot_within: Duration::from_secs(up.limit),
        packages: up.packages.clone(),
    };
    let started = Instant::now();
    let lab = Lab::up(&spec)?;
    println!(
        "{} up after {:.1} s; logs in {}",
        match spec.hosts {
            1 => "h1 is".to_owned(),
            hosts => format!("h1 to h{hosts} are"),
        },
        started.elapsed().as_secs_f64(),
        lab.directory().display()
    );
    Ok(())
}

fn execute(lab: &Lab, run: &Run) -> Result<ExitCode> {
    let command = match run.command.as_slice() {
        [line] if line.contains(char::is_whitespace) => {
            vec!["sh".to_owned(), "-c".to_owned(), line.clone()]
        }
        words => words.to_vec(),
    };
    let environment = run
        .env
        .iter()
        .map(|pair| {
            let (name, value) = pair
                .split_once('=')
                .with_context(|| format!("--env {pair:?} is not NAME=VALUE"))?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect::<Result<_>>()?;
    let start = Start {
        command,
        environment,
        detached_to: run.detach.clone(),
    };
    let session = lab.host(&run.host).session(&start)?;
    if run.input {
        session.feed(std::io::stdin());
    } else if run.detach.is_none() {
        session.no_input();
    }
    let code = session.follow(run.limit.span()?, |happening| match happening {
        Happening::Output(bytes) => {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&bytes).context("write standard output")?;
            stdout.flush().context("write standard output")
        }
        Happening::Error(bytes) => std::io::stderr()
            .lock()
            .write_all(&bytes)
            .context("write standard error"),
        Happening::Ended(_) | Happening::Failed(_) => Ok(()),
    })?;
    // A code is a byte for a parent to see.
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

fn trouble(lab: &Lab, between: &Between, trouble: Trouble) -> Result<()> {
    let others: Vec<String> = match &between.other {
        Some(other) => vec![other.clone()],
        None => lab
            .status()?
            .hosts
            .into_iter()
            .map(|host| host.name)
            .filter(|name| *name != between.one)
            .collect(),
    };
    for other in &others {
        lab.cable(between.network, &between.one, other, trouble)?;
        if !between.one_way {
            lab.cable(between.network, other, &between.one, trouble)?;
        }
    }
    Ok(())
}

fn logs(directory: &Path, host: Option<&str>) -> Result<()> {
    let log = match host {
        Some(host) => directory.join(host).join("console.log"),
        None => directory.join("supervisor.log"),
    };
    let Ok(mut file) = File::open(&log) else {
        bail!("there is no {}", log.display());
    };
    // Bytes as they are: a console may say anything.
    file.seek(SeekFrom::Start(0)).context("read the log")?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).context("read the log")?;
    std::io::stdout()
        .write_all(&bytes)
        .context("write standard output")
}

fn status(lab: &Lab, json: bool) -> Result<()> {
    let status: Status = lab.status()?;
    if json {
        println!(
            "{}",
            serde_json::to_string(&status).context("write the status")?
        );
        return Ok(());
    }
    for host in &status.hosts {
        let more = match (&host.power, host.process) {
            (Power::Off, _) | (_, None) => String::new(),
            (_, Some(process)) => format!(" (process {process}, boot {})", host.boots),
        };
        println!("{}  {}{more}", host.name, host.power);
    }
    for cable in &status.cables {
        let trouble = cable.trouble;
        let what = match (trouble.cut, trouble.lost_per_million) {
            (true, _) => "cut".to_owned(),
            (false, 0) => format!("late by {:?}", trouble.delay),
            (false, lost) => format!(
                "late by {:?}, losing {} %",
                trouble.delay,
                f64::from(lost) / 10_000.0
            ),
        };
        println!(
            "{} to {} on network {}: {what}",
            cable.from, cable.to, cable.network
        );
    }
    println!(
        "{} frames delivered, {} cut or lost as ordered, {} lost because their receiver was slow",
        status.frames_passed, status.frames_dropped, status.frames_overflowed
    );
    Ok(())
}
