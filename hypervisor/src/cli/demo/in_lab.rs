//! `doppel demo --lab`: hands the demo over to the lab's own program, which boots the hosts, and has the clients on this machine.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;

use super::{DemoArgs, Failure};
use crate::cli::pair::Carrier;

/// The emulator of the lab's hosts.
const EMULATOR: &str = "qemu-system-x86_64";

/// What installs it.
const INSTALL: &str = "scripts/install-test-tools";

/// The lab's script, in the source tree that this program was built in.
fn script() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    own.ancestors()
        .map(|directory| directory.join("scripts/lab"))
        .find(|path| path.is_file())
}

fn has_emulator() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(EMULATOR).is_file())
}

/// The way from here to a lab, or what is missing.
fn way() -> Result<PathBuf, String> {
    let script = script().ok_or(
        "the lab belongs to the source tree, and this program does not lie in one: build it there (cargo run --release -- demo)",
    )?;
    if has_emulator() {
        Ok(script)
    } else {
        Err(format!(
            "the lab needs {EMULATOR}, which {INSTALL} installs with all that the lab needs"
        ))
    }
}

/// The demo where there is no KVM: in the lab, if that is possible.
pub(super) fn demo_instead(args: &DemoArgs, refused: &dyn Display) -> Result<(), Failure> {
    let failed = |why: String| Err(Failure::new(Failure::ERROR, format!("{refused}; {why}")));
    if matches!(args.transport, Some(Carrier::Shm)) {
        return failed("without --transport shm the demo could run in the lab".into());
    }
    if args.replicate.replicate.is_some() {
        return failed("without --replicate the demo could run in the lab".into());
    }
    match way() {
        Ok(_) => {
            eprintln!("doppel: {refused}");
            eprintln!("doppel: so the demo runs across two emulated hosts, as with --lab");
            demo(args)
        }
        Err(why) => failed(format!(
            "without it the demo runs in the lab only, and {why}"
        )),
    }
}

/// The demo in the lab.
pub(super) fn demo(args: &DemoArgs) -> Result<(), Failure> {
    let script = way().map_err(|why| Failure::new(Failure::ERROR, why))?;
    let transport = args.transport.unwrap_or(Carrier::Rdma);
    if matches!(transport, Carrier::Shm) {
        return Err(Failure::new(
            Failure::USAGE,
            "--lab has two hosts, which share no memory: choose --transport rdma or tcp",
        ));
    }
    let mut command = Command::new(script);
    command.arg("demo").args(["--guest", &args.guest]);
    command.args(["--memory", &args.memory.to_string()]);
    if let Some(name) = transport.to_possible_value() {
        command.args(["--transport", name.get_name()]);
    }
    command.args(["--connections", &args.connections.to_string()]);
    command.args(["--kills", &args.kills.to_string()]);
    if let Some(load) = args.load {
        command.args(["--load", &load.to_string()]);
    }
    if let Some(seed) = args.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(plot) = &args.plot {
        let plot = std::path::absolute(plot)
            .map_err(|error| Failure::new(Failure::USAGE, format!("--plot: {error}")))?;
        command.arg("--plot").arg(plot);
    }
    if args.json {
        command.arg("--json");
    }
    if let Ok(own) = std::env::current_exe() {
        // The hosts run this very program.
        command.env("DOPPEL", own);
    }
    let status = command.status().map_err(|error| {
        Failure::new(Failure::ERROR, format!("cannot start scripts/lab: {error}"))
    })?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(
        Failure::ERROR,
        format!("the demo in the lab failed ({status}); what it said is above"),
    ))
}
