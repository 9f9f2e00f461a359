//! `doppel replay`.

use std::path::PathBuf;

use clap::Args;
use hypervisor::config;
use hypervisor::kvm::KvmSource;
use hypervisor::replay::ReplayError;
use hypervisor::session::solo::{self, Replayed};

use super::Failure;

/// Run a recorded log again and compare every exit
#[derive(Debug, Args)]
#[command(after_help = "Example: doppel replay irq.log")]
pub struct ReplayArgs {
    /// The log file
    log: PathBuf,
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

pub fn replay(args: &ReplayArgs) -> Result<(), Failure> {
    let sandbox = config::Sandbox {
        enabled: !args.no_sandbox,
        ..config::Sandbox::default()
    };
    let Replayed {
        sync_points,
        recorded,
        replayed,
        log_bytes,
        outcome,
    } = solo::replay(&args.log, &KvmSource::Path(args.kvm.clone()), &sandbox)?;
    // A log that is cut off or damaged is no mismatch: what it has was equal.
    let mismatches = u32::from(matches!(outcome, Err(ReplayError::Diverged(_))));
    let hex = |hash: Option<u64>| hash.map(|hash| format!("{hash:016x}"));
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "sync_points": sync_points,
                "mismatches": mismatches,
                "memory_hash_recorded": hex(recorded),
                "memory_hash_replayed": hex(replayed),
                "error": outcome.as_ref().err().map(ToString::to_string),
            })
        );
    } else if outcome.is_ok() {
        eprintln!("replayed {sync_points} sync points, every one equal");
        if let Some(hash) = hex(replayed) {
            eprintln!("memory hash {hash}, as recorded");
        } else {
            eprintln!(
                "the log has no end: what is there was equal, the final state cannot be compared"
            );
        }
    }
    match outcome {
        Ok(()) if recorded.is_some() => Ok(()),
        Ok(()) => Err(Failure::new(
            Failure::DIVERGED,
            format!(
                "the log ends at byte {log_bytes} without its end entry: the recorder was cut off, or its guest was stopped between two sync points"
            ),
        )),
        Err(error) => Err(Failure::new(Failure::DIVERGED, error)),
    }
}
