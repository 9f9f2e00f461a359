//! `doppel record`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use hypervisor::config::{FlightRecorder, duration};
use hypervisor::session::solo::{self, RecordFor};

use super::machine::{MachineArgs, spec};
use super::{Failure, figures};

/// Run a machine and record it into a log file, which `doppel replay` runs again
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  doppel record --guest irq --out irq.log --for 5s\n  doppel record --guest clock --out clock.log --for 500ms --every-exit\n  doppel record --guest kv --recorder recording,size=2G,every=60s"
)]
pub struct RecordArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// The log file, with all of it
    #[arg(long, value_name = "LOG", conflicts_with = "recorder")]
    out: Option<PathBuf>,
    /// Keep the last checkpoint and the log since in this directory, of bounded size (docs/flight-recorder.md)
    #[arg(long, value_name = "DIR[,size=BYTES][,every=TIME]", value_parser = FlightRecorder::from_str)]
    recorder: Option<FlightRecorder>,
    /// How long to record, such as 5s or 500ms; otherwise until the guest turns itself off or Ctrl-C
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    length: Option<Duration>,
    /// Log every exit with all its registers, so that a divergence is named exactly
    #[arg(long)]
    every_exit: bool,
}

pub fn record(args: &RecordArgs) -> Result<(), Failure> {
    let config = args.machine.config(|config| {
        if args.recorder.is_some() {
            config.recorder.clone_from(&args.recorder);
        } else if args.out.is_some() {
            config.recorder = None;
        }
    })?;
    if args.out.is_none() && config.recorder.is_none() {
        return Err(Failure::new(
            Failure::USAGE,
            "where to? give it a log file (--out LOG) or a flight recorder's directory (--recorder DIR)",
        ));
    }
    let recorded = solo::record(
        &config,
        &args.machine.inherited(),
        &spec(&config)?,
        args.machine.json,
        RecordFor {
            out: args.out.as_deref(),
            length: args.length,
            every_exit: args.every_exit,
        },
    )?;
    let (sync_points, hash) = recorded.finished.map_or((None, None), |finished| {
        (Some(finished.sync_points), Some(finished.memory_hash))
    });
    if args.machine.json {
        println!(
            "{}",
            serde_json::json!({
                "event": "recorded",
                "sync_points": sync_points,
                "memory_hash": hash.map(|hash| format!("{hash:016x}")),
                "bytes": recorded.bytes,
                "exits": figures::exits(&recorded.exits),
            })
        );
    } else {
        match (sync_points, hash) {
            (Some(points), Some(hash)) => {
                let bytes = recorded
                    .bytes
                    .map_or(String::new(), |bytes| format!(" in {bytes} bytes"));
                eprintln!("recorded {points} sync points{bytes}, memory hash {hash:016x}");
            }
            _ => eprintln!(
                "recorded; the guest was stopped between two sync points, so the end cannot be compared"
            ),
        }
    }
    super::guest_ended(recorded.ended)
}
