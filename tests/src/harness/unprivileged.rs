//! Running the program as somebody who may do nothing.
//!
//! Unsafe code lives here for one `fcntl`: a descriptor that a child inherits cannot be had from the standard library.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::program;

/// `nobody`, on every Linux.
const NOBODY: u32 = 65_534;

/// Runs `doppel` with these arguments as `nobody`, with KVM opened beforehand and passed on.
///
/// # Errors
/// If it cannot be started. Needs root, to become somebody else.
pub fn doppel_as_nobody(arguments: &[&str]) -> Result<Output> {
    // A place that nobody can reach, whoever owns the build.
    let place = tempfile::tempdir().context("make a directory")?;
    let everybody = |mode| fs::Permissions::from_mode(mode);
    fs::set_permissions(place.path(), everybody(0o755))
        .context("open the directory to everybody")?;
    let program = place.path().join("doppel");
    fs::copy(program::doppel()?, &program).context("copy the program")?;
    fs::set_permissions(&program, everybody(0o755)).context("open the program to everybody")?;
    let home = place.path().join("home");
    fs::create_dir(&home).context("make a home")?;
    std::os::unix::fs::chown(&home, Some(NOBODY), Some(NOBODY))
        .context("give the home away; this test needs root")?;
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")?;
    let kvm = inheritable(&kvm)?;
    Command::new(&program)
        .args(arguments)
        .args(["--kvm-fd", &kvm.as_raw_fd().to_string()])
        .env("TMPDIR", &home)
        .current_dir(&home)
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .context("start doppel as nobody")
}

fn inheritable(file: &File) -> Result<OwnedFd> {
    // SAFETY: fcntl passes no memory; the descriptor is open.
    let copy = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 3) };
    ensure!(
        copy >= 0,
        "duplicate a descriptor: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the kernel has just given us this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
