//! `doppel record`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hypervisor::session::solo::{self, RecordFor};

use super::Failure;
use super::machine::{MachineArgs, spec};

/// Run a machine and record it into a log file, which `doppel replay` runs again
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  doppel record --guest irq --out irq.log --for 5s\n  doppel record --guest clock --out clock.log --for 500ms --every-exit"
)]
pub struct RecordArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// The log file
    #[arg(long, value_name = "LOG")]
    out: PathBuf,
    /// How long to record, such as 5s or 500ms; otherwise until the guest turns itself off or Ctrl-C
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    length: Option<Duration>,
    /// Log every exit with all its registers, so that a divergence is named exactly
    #[arg(long)]
    every_exit: bool,
}

/// Reads `5s`, `500ms`, `2m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is no time: write 5s, 500ms or 2m"))?;
    let millis = match &text[digits.len()..] {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("{text:?} has no unit: write 5s, 500ms or 2m")),
    };
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is too long"))
}

pub fn record(args: &RecordArgs) -> Result<(), Failure> {
    let config = args.machine.config(|_| ())?;
    let recorded = solo::record(
        &config,
        &args.machine.inherited(),
        &spec(&config)?,
        args.machine.json,
        RecordFor {
            out: &args.out,
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
            })
        );
    } else {
        match (sync_points, hash) {
            (Some(points), Some(hash)) => eprintln!(
                "recorded {points} sync points in {} bytes, memory hash {hash:016x}",
                recorded.bytes
            ),
            _ => eprintln!(
                "recorded {} bytes; the guest was stopped between two sync points, so the end cannot be compared",
                recorded.bytes
            ),
        }
    }
    super::guest_ended(recorded.ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in [
            "",
            "5",
            "s",
            "5h",
            "-1s",
            "99999999999999999999s",
            "18446744073709551615m",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
