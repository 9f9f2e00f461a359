//! Where the program under test is.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// The `doppel` that was built with these tests: beside them, or where `DOPPEL` says.
///
/// # Errors
/// If it is not there.
pub fn doppel() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("DOPPEL") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("find this program's own file")?;
    let found = own
        .ancestors()
        .skip(1)
        .map(|directory| directory.join("doppel"))
        .find(|path| path.is_file());
    let path = found.context("no doppel beside the tests: run `cargo build --release` first")?;
    ensure!(path.is_file());
    Ok(path)
}
