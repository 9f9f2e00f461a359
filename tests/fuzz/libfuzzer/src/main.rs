//! One program for all targets: libFuzzer's own `main`, with the target chosen by the environment. `scripts/fuzz` runs it.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `DOPPEL_FUZZ_TARGET` | which target; without it the targets are listed |
//! | `DOPPEL_FUZZ_SEEDS` | a directory into which the target's seeds are written before libFuzzer reads it |
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use doppel_fuzz::{ALL, Target, find};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fuzz_target!(
    init: choose(),
    |bytes: &[u8]| (TARGET.get().expect("it was chosen").run)(bytes)
);

fn choose() {
    let Ok(name) = std::env::var("DOPPEL_FUZZ_TARGET") else {
        for target in ALL {
            println!("{:<12} {}", target.name, target.line);
        }
        std::process::exit(0);
    };
    let Some(target) = find(&name) else {
        eprintln!("no target is named {name:?}: scripts/fuzz without arguments lists them");
        std::process::exit(2);
    };
    if let Some(directory) = std::env::var_os("DOPPEL_FUZZ_SEEDS").map(PathBuf::from) {
        for (number, seed) in (target.seeds)().iter().enumerate() {
            let path = directory.join(format!("seed-{number}"));
            if let Err(error) = std::fs::write(&path, seed) {
                eprintln!("cannot write the seed {}: {error}", path.display());
                std::process::exit(1);
            }
        }
    }
    TARGET.get_or_init(|| target);
}
