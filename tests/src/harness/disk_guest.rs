//! What the guest that writes a disk has said on its console.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::role::Role;

/// The last round of which a console said that it was flushed.
#[must_use]
pub fn flushed(console: &Path) -> u64 {
    flushed_in(&std::fs::read_to_string(console).unwrap_or_default())
}

/// The same of what a console has shown.
#[must_use]
pub fn flushed_in(text: &str) -> u64 {
    // A line that is being written says nothing yet.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let rounds = whole
        .lines()
        .filter_map(|line| line.strip_prefix("disk: flushed ")?.trim().parse().ok());
    rounds.max().unwrap_or(0)
}

/// Waits so long until this role's guest has said on this console that it flushed more than this round, and no block that was wrong.
///
/// # Errors
/// If it does not.
pub fn beyond(role: &mut Role, console: &Path, round: u64, longest: Duration) -> Result<()> {
    let until = Instant::now() + longest;
    while flushed(console) <= round {
        ensure!(
            role.runs()? && Instant::now() < until,
            "its guest flushed no more than {round}: {}",
            role.said()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let text = std::fs::read_to_string(console).unwrap_or_default();
    ensure!(!text.contains("WRONG"), "{text}");
    Ok(())
}

/// Whether one of these consoles said that all was as it was last written, up to this round, and none that a block was wrong.
///
/// # Errors
/// What they said instead.
pub fn verified(consoles: &[PathBuf], round: u64) -> Result<()> {
    let line = format!("disk: verified {round}\n");
    let texts: Vec<String> = consoles
        .iter()
        .map(|path| std::fs::read_to_string(path).unwrap_or_default())
        .collect();
    ensure!(!texts.concat().contains("WRONG"), "{texts:?}");
    ensure!(
        texts.iter().any(|text| text.contains(&line)),
        "no guest said that it verified round {round}: {texts:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_tells_the_last_whole_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        assert_eq!(flushed(&path), 0);
        std::fs::write(&path, "disk: flushed 4\ndisk: flushed 8\ndisk: flushed 1").unwrap();
        assert_eq!(flushed(&path), 8);
    }

    #[test]
    fn a_wrong_block_is_not_overlooked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        std::fs::write(&path, "disk: verified 7\n").unwrap();
        verified(std::slice::from_ref(&path), 7).unwrap();
        verified(std::slice::from_ref(&path), 8).unwrap_err();
        std::fs::write(&path, "disk: block 3 WRONG\ndisk: verified 7\n").unwrap();
        verified(&[path], 7).unwrap_err();
    }
}
