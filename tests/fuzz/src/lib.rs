//! Fuzz targets: whatever bytes come from a peer, a file or a guest, a target hands them to the code that reads them.
//!
//! A target is a function from bytes to nothing that panics where a promise does not hold. `libfuzzer/` beside this crate runs
//! them under libFuzzer, which is led by coverage (`scripts/fuzz`); the tests here run them over their seeds and over every input
//! that once broke something, with no fuzzer, in every test run.
//!
//! An input is a small program for the target rather than raw bytes wherever a checksum, a nonce or a key would stop raw
//! bytes at the door: the target seals what the input says, so that the damage gets as far as it can.
#![forbid(unsafe_code)]

mod arbiter;
mod checkpoint;
mod config;
mod devices;
mod entry;
mod handshake;
mod heartbeat;
mod log_file;
mod prepare;
mod proof;
mod ring;
mod source;
mod stream;

/// One thing that reads what others wrote.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, as `scripts/fuzz` takes it.
    pub name: &'static str,
    /// What is fed and what must hold, in one line.
    pub line: &'static str,
    /// Feeds one input.
    pub run: fn(&[u8]),
    /// Inputs to start from: they reach what a random byte would take long to find.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const ALL: &[Target] = &[
    ring::TARGET,
    stream::TARGET,
    proof::TARGET,
    handshake::TARGET,
    heartbeat::TARGET,
    entry::TARGET,
    checkpoint::TARGET,
    devices::TARGET,
    log_file::TARGET,
    prepare::TARGET,
    config::TARGET,
    arbiter::TARGET,
];

/// The target of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Target> {
    ALL.iter().find(|target| target.name == name)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{ALL, find};

    /// Inputs that broke something once, by target.
    const REGRESSIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions");

    #[test]
    fn every_target_takes_its_seeds_and_every_cut_of_them() {
        for target in ALL {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{} has no seeds", target.name);
            for seed in seeds {
                (target.run)(&seed);
                let step = (seed.len() / 32).max(1);
                for cut in (0..seed.len()).step_by(step) {
                    (target.run)(&seed[..cut]);
                }
            }
        }
    }

    #[test]
    fn what_broke_something_once_does_so_no_more() {
        for directory in read(Path::new(REGRESSIONS)) {
            let name = directory.file_name().unwrap().to_str().unwrap();
            let target = find(name).unwrap_or_else(|| panic!("no target is named {name}"));
            for input in read(&directory) {
                eprintln!("{}", input.display());
                (target.run)(&std::fs::read(&input).unwrap());
            }
        }
    }

    fn read(directory: &Path) -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}
