//! A newcomer's path goes on to the death of a whole host (issue 8, 5): what the README says to type for that is typed. Two hosts are booted in
//! emulation, clients write and read, the host that serves is killed, and everything that was acknowledged is read back.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::harness::{docs, program};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "newcomer-in-lab",
    line: "what the README types to see a host die: two emulated hosts, the one that serves is killed, nothing acknowledged is lost, no connection breaks",
    short: Duration::from_secs(120),
    full: Duration::from_secs(120),
    show,
};

/// How the README starts the program in the source tree.
const STARTED: &str = "cargo run --release -- ";

/// How long it may take on a busy machine: two hosts boot, and its own steps have limits.
const LONGEST: &str = "500";

fn show(run: &Run) -> Result<Figures> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let project = project.context("the project's directory")?;
    let typed = typed(project)?;
    run.say(&typed);
    // Cargo has built it for this promise already, and would start that.
    let words = typed.strip_prefix(STARTED).context("cargo starts it")?;
    let output = Command::new("timeout")
        .args(["--kill-after", "20", LONGEST])
        .arg(program::doppel()?)
        .args(words.split_whitespace())
        .current_dir(project)
        .output()
        .context("start the demonstration")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{typed} ended by {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let mut figures = Figures::default();
    for (name, line) in [
        ("lost", "of these lost"),
        ("connections_broken", "TCP connections broken"),
    ] {
        let counted = said.lines().find_map(|each| each.trim().strip_prefix(line));
        let counted = counted.with_context(|| format!("{line:?} is not said: {said}"))?;
        let count = counted.split_whitespace().next().unwrap_or_default();
        ensure!(count == "0", "{line}: {counted}: {said}");
        figures.add(name, 0);
    }
    Ok(figures)
}

/// The README's line for it.
fn typed(project: &Path) -> Result<String> {
    let text = fs::read_to_string(project.join("README.md")).context("read the README")?;
    let (blocks, _) = docs::read("README.md", &text)?;
    let mut lines = blocks.iter().flat_map(|block| block.text.lines());
    let line = lines.find(|line| line.starts_with(STARTED) && line.contains("--lab"));
    let line = line.context("the README types no demonstration in the lab")?;
    let words = line.split('#').next().unwrap_or_default();
    Ok(words.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn the_readme_types_it() {
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert_eq!(typed(project).unwrap(), format!("{STARTED}demo --lab"));
    }
}
