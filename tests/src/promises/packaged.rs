//! Debian's package of Doppel has everything in it and works from where it is put (issue 8): made from the metadata, unpacked into a
//! directory of its own, and the demonstration is run from there.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::program;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "packaged",
    line: "the package of Debian's has program, manual pages, completions, configuration and monitoring, and the demo runs from it",
    short: Duration::from_secs(12),
    full: Duration::from_secs(12),
    show,
};

/// What is to be there, besides manual pages.
const FILES: [&str; 13] = [
    "usr/bin/doppel",
    "etc/doppel/doppel.toml",
    "usr/lib/systemd/system/doppel-agent.service",
    "usr/lib/systemd/system/doppel-drain.service",
    "usr/share/doc/doppel/docs/cluster.md",
    "usr/share/bash-completion/completions/doppel",
    "usr/share/zsh/vendor-completions/_doppel",
    "usr/share/fish/vendor_completions.d/doppel.fish",
    "usr/share/doppel/monitoring/doppel.rules.yml",
    "usr/share/doppel/monitoring/grafana-dashboard.json",
    "usr/share/doppel/slurm/doppel.sbatch",
    "usr/share/doc/doppel/README.md",
    "usr/share/doc/doppel/docs/operating.md",
];

fn show(run: &Run) -> Result<Figures> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let package = make(directory.path())?;
    let root = directory.path().join("installed");
    said(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
    for name in FILES {
        ensure!(root.join(name).is_file(), "{name} is not in the package");
    }
    let doppel = root.join("usr/bin/doppel");
    let mut figures = Figures::default();
    figures.add(
        "kib",
        fs::metadata(&package).context("look at the package")?.len() / 1024,
    );
    figures.add("manual_pages", manual(&root, &doppel)?);
    completions(&root)?;
    depends(&package, &doppel)?;
    let control = said(
        Command::new("dpkg-deb")
            .arg("-I")
            .arg(&package)
            .arg("conffiles"),
    )?;
    ensure!(
        control.trim() == "/etc/doppel/doppel.toml",
        "these are configuration: {control}"
    );

    let config = root.join("etc/doppel/doppel.toml");
    said(
        Command::new(&doppel)
            .args(["doctor", "--config"])
            .arg(&config)
            .current_dir(&root),
    )
    .context("doctor from the package")?;
    let demo = said(
        Command::new(&doppel)
            .args(["demo", "--json", "--seed", &run.seed.to_string()])
            .current_dir(&root)
            .env_remove("DOPPEL"),
    )
    .context("the demo from the package")?;
    let demo: Value = serde_json::from_str(&demo).context("what the demo printed")?;
    ensure!(
        demo["lost_acknowledged_writes"] == 0
            && demo["broken_connections"] == 0
            && demo["divergences"] == 0,
        "the demo from the package: {demo}"
    );
    figures.add("failover_ms", demo["failover_ms"].clone());
    Ok(figures)
}

/// The package, of the program that was built with these tests.
pub(super) fn make(to: &Path) -> Result<PathBuf> {
    let doppel = program::doppel()?;
    let binaries = doppel.parent().context("the program's directory")?;
    let project = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the project's directory")?;
    let path = said(
        Command::new(project.join("scripts/package"))
            .arg("--out")
            .arg(to)
            .arg("--binaries")
            .arg(binaries),
    )?;
    Ok(to.join(path.trim()))
}

/// What a command prints; it has to end well.
fn said(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).context("what a command printed")
}

/// Every command that the help lists has a page, and no page is of another. How many.
fn manual(root: &Path, doppel: &Path) -> Result<usize> {
    let help = said(Command::new(doppel).arg("--help"))?;
    let commands = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next());
    let mut wanted: BTreeSet<String> = commands
        .filter(|name| *name != "help")
        .map(|name| format!("doppel-{name}.1"))
        .collect();
    ensure!(wanted.len() > 10, "the help lists few commands: {wanted:?}");
    wanted.insert("doppel.1".into());
    let directory = root.join("usr/share/man/man1");
    let found: BTreeSet<String> = fs::read_dir(&directory)
        .context("list the manual")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    ensure!(
        wanted.is_subset(&found),
        "no page for {:?}",
        wanted.difference(&found)
    );
    let page = fs::read_to_string(directory.join("doppel-primary.1")).context("read a page")?;
    ensure!(
        page.contains(".TH ") && page.contains("arbiter"),
        "doppel-primary.1 is no page"
    );
    let hidden = found
        .iter()
        .find(|name| name.contains("hook-helper") || name.contains("package-files"));
    ensure!(hidden.is_none(), "{hidden:?} is nobody's to call");
    Ok(found.len())
}

/// The shells take the completions; bash, which is everywhere, is asked.
fn completions(root: &Path) -> Result<()> {
    let script = "source \"$1\" && complete -p doppel";
    let file = root.join("usr/share/bash-completion/completions/doppel");
    let found = said(Command::new("bash").args(["-c", script, "bash"]).arg(&file))?;
    ensure!(found.contains("doppel"), "bash completes nothing: {found}");
    let text = fs::read_to_string(&file).context("read the completions")?;
    ensure!(
        text.contains("--arbiter") && text.contains("power-off"),
        "bash's completions lack options"
    );
    Ok(())
}

/// The package asks for a C library as new as the program needs.
fn depends(package: &Path, doppel: &Path) -> Result<()> {
    let depends = said(
        Command::new("dpkg-deb")
            .arg("-f")
            .arg(package)
            .arg("Depends"),
    )?;
    let minor = |text: &str| -> Option<u32> {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    let asked = depends
        .split_once("libc6 (>= 2.")
        .and_then(|(_, rest)| minor(rest));
    let asked = asked.with_context(|| format!("the package asks for no libc6: {depends}"))?;
    let symbols = said(Command::new("objdump").arg("-T").arg(doppel))?;
    let needed = symbols.split("GLIBC_2.").skip(1).filter_map(minor).max();
    let needed = needed.context("the program needs no C library")?;
    ensure!(
        needed <= asked,
        "the program needs glibc 2.{needed}, the package asks for 2.{asked}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }
}
