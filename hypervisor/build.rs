//! Builds the bare-metal guests (`guests/`, a workspace of its own) and names each one's ELF file in an environment
//! variable of the compilation: `include_bytes!(env!("GUEST_KV"))`.
//!
//! A nested cargo, because guests are for another machine: no position-independent code, no CPU features beyond
//! x86-64's first, no C library, always optimised, whatever the hypervisor itself is built with.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The binaries of the workspace.
const GUESTS: [&str; 8] = [
    "kv", "compute", "irq", "clock", "memory", "hostile", "disk", "console",
];
/// The libraries they are made of.
const LIBRARIES: [&str; 2] = ["runtime", "kv-engine"];
/// Flags for every crate of a guest, parted by cargo's separator. They outrank those of any configuration file.
const FLAGS: &str = "-Crelocation-model=static\x1f-Ctarget-cpu=x86-64";
/// What the outer build sets for itself and a guest must not inherit.
const NOT_INHERITED: [&str; 6] = [
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
];

fn main() {
    let guests = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("guests");
    let output = PathBuf::from(variable("OUT_DIR")).join("guests");
    watch(&guests);
    let manifest = guests.join("Cargo.toml");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--release", "--locked", "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&output)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS);
    for guest in GUESTS {
        cargo.args(["--package", guest]);
    }
    for name in NOT_INHERITED {
        cargo.env_remove(name);
    }
    let status = cargo
        .status()
        .unwrap_or_else(|error| panic!("cannot run {cargo:?}: {error}"));
    assert!(
        status.success(),
        "building the guests of {} failed ({status}): the reason is above",
        manifest.display()
    );
    for guest in GUESTS {
        let file = output.join("release").join(guest);
        println!(
            "cargo:rustc-env=GUEST_{}={}",
            guest.to_uppercase(),
            file.display()
        );
    }
}

/// Has cargo run this script again when a source of a guest changes.
fn watch(guests: &Path) {
    println!("cargo:rerun-if-changed=build.rs");
    for part in ["Cargo.toml", "Cargo.lock"]
        .iter()
        .chain(&GUESTS)
        .chain(&LIBRARIES)
    {
        println!("cargo:rerun-if-changed={}", guests.join(part).display());
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo did not set {name}"))
}
