//! What `doppel demo` prints on this machine, for those who read about it first.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::sheet::{Sheet, Table};
use crate::world;

/// Runs one demo with this seed.
///
/// # Errors
/// If it loses anything.
pub fn measure(seed: u64) -> Result<Sheet> {
    let mut sheet = Sheet::new("demo", "The demonstration");
    let output = Command::new(world::doppel()?)
        .args(["demo", "--seed", &seed.to_string()])
        .output()
        .context("start doppel demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let text = String::from_utf8(output.stdout).context("what the demo printed")?;
    let mut table = Table::new("One run, as it prints it", &["", ""]);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let (name, value) = line.trim().split_once("  ").unwrap_or((line.trim(), ""));
        table.row([name.to_owned(), value.trim().to_owned()]);
    }
    sheet.tables.push(table);
    let lines: Vec<&str> = text.lines().collect();
    sheet.figure("lines", lines);
    sheet.figure("seed", seed);
    sheet.note("One kill at a random moment; `failover` has the distribution.");
    Ok(sheet)
}
