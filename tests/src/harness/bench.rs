//! Having `bench` measure.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::program;

/// Has `bench NAME` measure in this form (`--short`, `--full`), and reads what it wrote.
///
/// # Errors
/// If it fails, or was not built.
pub fn measure(name: &str, form: &str, directory: &Path) -> Result<Value> {
    let output = Command::new(program::beside("bench")?)
        .args([name, form, "--out"])
        .arg(directory)
        .env("DOPPEL", program::doppel()?)
        .output()
        .context("start bench")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "bench {name}: {}: {said}",
        output.status
    );
    let path = directory.join(format!("{name}.json"));
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).context("read what bench wrote")
}

/// A number of what `bench` wrote.
///
/// # Errors
/// If there is none.
pub fn number(value: &Value, pointer: &str) -> Result<f64> {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .with_context(|| format!("bench wrote no number at {pointer}"))
}
