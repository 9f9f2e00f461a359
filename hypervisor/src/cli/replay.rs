//! `doppel replay`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use clap::Args;
use hypervisor::config;
use hypervisor::debug::Place;
use hypervisor::kvm::KvmSource;
use hypervisor::replay::ReplayError;
use hypervisor::session::replaying::{self, Reached, Replay, Replayed, Watch};
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;

/// Run a recording again and compare every exit: a log file, or a flight recorder's directory
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  doppel replay irq.log\n  doppel replay recording --to 120000\n  doppel replay recording --gdb 1234\n\n\
                  A directory needs no end that was recorded on purpose: it ends where its recorder ended, and that is well."
)]
pub struct ReplayArgs {
    /// The log file of `doppel record --out`, or the directory of a flight recorder (--recorder)
    #[arg(value_name = "FILE|DIR")]
    log: PathBuf,
    /// End at this sync point, after its inputs
    #[arg(long, value_name = "POSITION")]
    to: Option<u64>,
    /// Wait for gdb there first: a port of this host's own, or the path of a Unix socket (docs/flight-recorder.md)
    #[arg(long, value_name = "[127.0.0.1:]PORT|SOCKET", value_parser = Place::from_str)]
    gdb: Option<Place>,
    /// Where KVM is
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
    /// Do not confine the process before it reads the log's entries: for a kernel without seccomp
    #[arg(long)]
    no_sandbox: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Replays that take no longer show no progress.
const SHORT: Duration = Duration::from_secs(1);

/// Between two looks at one that does.
const LOOK: Duration = Duration::from_millis(200);

/// Shows how far a replay is, for as long as the process lives.
fn show(watch: Watch) {
    let draw = move || {
        // One that cannot be confined draws nothing.
        if watch.confine().is_err() {
            return;
        }
        thread::sleep(SHORT);
        let bar = ProgressBar::new(1000);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} % of the log  {msg}")
        {
            bar.set_style(style);
        }
        loop {
            bar.set_position((watch.part() * 1000.0) as u64);
            bar.set_message(format!("sync point {}", watch.position()));
            thread::sleep(LOOK);
        }
    };
    // A replay without a picture is one, too.
    let _ = thread::Builder::new().name("progress".into()).spawn(draw);
}

pub fn replay(args: &ReplayArgs) -> Result<(), Failure> {
    let sandbox = config::Sandbox {
        enabled: !args.no_sandbox,
        ..config::Sandbox::default()
    };
    let shown = !args.json && args.gdb.is_none() && std::io::stderr().is_terminal();
    let replayed = replaying::replay(&Replay {
        from: &args.log,
        to: args.to,
        gdb: args.gdb.as_ref(),
        waits: &|target| eprintln!("gdb is waited for: (gdb) target remote {target}"),
        kvm: &KvmSource::Path(args.kvm.clone()),
        sandbox: &sandbox,
        begun: &|watch| {
            if shown {
                show(watch);
            }
        },
    })?;
    if args.json {
        println!("{}", json(&replayed));
    } else if let Ok(reached) = &replayed.outcome {
        tell(&replayed, *reached);
    }
    let is_file = !args.log.is_dir();
    let short_of = args.to.filter(|to| replayed.sync_points < *to);
    match (replayed.outcome, short_of) {
        (Err(error), _) => Err(Failure::new(Failure::DIVERGED, error)),
        (Ok(Reached::Stopped), _) => Ok(()),
        (Ok(_), Some(to)) => Err(Failure::new(
            Failure::ERROR,
            format!(
                "position {to} was not reached: what is recorded ends at {}",
                replayed.sync_points
            ),
        )),
        (Ok(Reached::LogOver), None) if is_file && args.to.is_none() => Err(Failure::new(
            Failure::DIVERGED,
            format!(
                "the log ends at byte {} without its end entry: the recorder was cut off, or its guest was stopped between two sync points",
                replayed.log_bytes
            ),
        )),
        (Ok(_), None) => Ok(()),
    }
}

fn hex(hash: Option<u64>) -> Option<String> {
    hash.map(|hash| format!("{hash:016x}"))
}

fn json(replayed: &Replayed) -> serde_json::Value {
    // A log that is cut off or damaged is no mismatch: what it has was equal.
    let mismatches = u32::from(matches!(replayed.outcome, Err(ReplayError::Diverged(_))));
    let reached = match &replayed.outcome {
        Ok(Reached::End) => Some("end"),
        Ok(Reached::LogOver) => Some("log_over"),
        Ok(Reached::Position) => Some("position"),
        Ok(Reached::Stopped) => Some("stopped"),
        Err(_) => None,
    };
    serde_json::json!({
        "began": replayed.began,
        "sync_points": replayed.sync_points,
        "reached": reached,
        "digest": replayed.digest.to_string(),
        "state": hex(replayed.state),
        "mismatches": mismatches,
        "memory_checks": replayed.memory_checks,
        "memory_hash_recorded": hex(replayed.recorded),
        "memory_hash_replayed": hex(replayed.replayed),
        "torn": replayed.torn,
        "error": replayed.outcome.as_ref().err().map(ToString::to_string),
    })
}

fn tell(replayed: &Replayed, reached: Reached) {
    let from = match replayed.began {
        0 => String::new(),
        began => format!(" from the checkpoint at {began}"),
    };
    eprintln!(
        "replayed{from} to sync point {}, every one equal; digest {}, state {}",
        replayed.sync_points,
        replayed.digest,
        hex(replayed.state).unwrap_or_default()
    );
    let memory = hex(replayed.replayed).unwrap_or_default();
    match reached {
        Reached::End => eprintln!("memory hash {memory}, as recorded"),
        _ if replayed.memory_checks > 0 => eprintln!(
            "memory hash {memory}; {} whole memories on the way were as recorded",
            replayed.memory_checks
        ),
        _ => eprintln!("memory hash {memory}; what was recorded has none to compare it with"),
    }
    if let Some(torn) = &replayed.torn {
        eprintln!("cut off there: {torn}");
    }
}
