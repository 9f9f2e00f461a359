//! Debian's gdb on a replay.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Runs gdb's commands on the replay behind a Unix socket, with this file's symbols if there is one: what gdb said. It is ended
/// after so long.
///
/// # Errors
/// If gdb cannot be started, fails or does not end in time.
pub fn gdb(
    socket: &Path,
    symbols: Option<&Path>,
    commands: &[&str],
    longest: Duration,
) -> Result<String> {
    let output = tempfile::tempfile().context("make a file for gdb's output")?;
    let shared = |file: &std::fs::File| file.try_clone().context("share a file");
    let mut command = Command::new("gdb");
    command.args(["--nx", "--quiet", "--batch"]);
    let target = format!("target remote {}", socket.display());
    for word in [
        "set confirm off",
        "set pagination off",
        "set tcp auto-retry off",
        // Otherwise that of whatever the guest is doing: in the middle of Rust's own library gdb takes no C.
        "set language c",
        &target,
    ]
    .iter()
    .chain(commands)
    {
        command.args(["-ex", word]);
    }
    if let Some(symbols) = symbols {
        command.arg(symbols);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(shared(&output)?)
        .stderr(shared(&output)?)
        .spawn()
        .context("start gdb: run scripts/install-test-tools")?;
    let until = Instant::now() + longest;
    let status = loop {
        if let Some(status) = child.try_wait().context("look after gdb")? {
            break status;
        }
        if Instant::now() >= until {
            // It fails only for a child that has ended.
            let _ = child.kill();
            let _ = child.wait();
            bail!("gdb has not ended within {longest:?}: {}", read(&output)?);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = read(&output)?;
    ensure!(status.success(), "gdb ended by {status}: {said}");
    Ok(said)
}

fn read(file: &std::fs::File) -> Result<String> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata().context("look at gdb's output")?.len();
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)
        .context("read gdb's output")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
