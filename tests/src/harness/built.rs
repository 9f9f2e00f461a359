//! What is built for a host of the lab besides the programs that lie beside this one: it is asked of cargo, which builds what is
//! not there.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The library that RDMA goes through.
///
/// # Errors
/// If it cannot be built; `scripts/install-test-tools` installs what that needs.
pub fn verbs() -> Result<PathBuf> {
    let built = cargo(&["build", "--package", "doppel-verbs"])
        .context("build libdoppel_verbs.so (scripts/install-test-tools installs what it needs)")?;
    let library = built.iter().flat_map(files).find(|path| {
        path.file_name()
            .is_some_and(|name| name == "libdoppel_verbs.so")
    });
    library.context("cargo names no libdoppel_verbs.so")
}

/// The ring's tests: those in the library, and those of processes.
///
/// # Errors
/// If they cannot be built.
pub fn ring_tests() -> Result<[PathBuf; 2]> {
    let built = cargo(&["test", "--no-run", "--package", "rdma-log"]).context("build the tests")?;
    let program = |name: &str| {
        built
            .iter()
            .filter(|message| message["target"]["name"] == name)
            .find_map(|message| message["executable"].as_str())
            .map(PathBuf::from)
            .with_context(|| format!("cargo names no tests of {name}"))
    };
    Ok([program("rdma_log")?, program("processes")?])
}

fn files(message: &Value) -> impl Iterator<Item = PathBuf> {
    message["filenames"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|name| name.as_str().map(PathBuf::from))
}

/// Runs cargo in this workspace, and returns what it says of each product.
fn cargo(words: &[&str]) -> Result<Vec<Value>> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(words)
        .args(["--release", "--message-format", "json-render-diagnostics"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .context("run cargo")?;
    ensure!(
        output.status.success(),
        "cargo {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).context("read what cargo says"))
        .collect()
}
