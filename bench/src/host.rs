//! Where, when and of what a measurement was made: it stands in every result.
#![forbid(unsafe_code)]

use std::fs;
use std::process::Command;

use serde::Serialize;

/// The machine a measurement was made on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The CPU, as it names itself.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// The kernel's release.
    pub kernel: String,
    /// What stands behind `/dev/kvm`, as far as it can be told.
    pub kvm: String,
    /// The load average of the last minute before the measurement: others at work make every figure worse.
    pub load: String,
}

/// The variable that says of which commit this program is where no working tree is, as in a host of the lab.
const COMMIT: &str = "DOPPEL_COMMIT";

/// A measurement's origin.
#[derive(Clone, Debug, Serialize)]
pub struct Origin {
    /// The command line.
    pub command: String,
    /// UTC.
    pub date: String,
    /// The commit of the working tree, with `+` when something in it was changed; or what [`COMMIT`] says.
    pub commit: String,
    /// This program's version.
    pub version: &'static str,
    /// The machine.
    pub machine: Machine,
}

impl Origin {
    /// Of a measurement that begins now.
    #[must_use]
    pub fn now() -> Self {
        Self {
            command: command(std::env::args().skip(1)),
            date: said("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
            commit: std::env::var(COMMIT).unwrap_or_else(|_| commit()),
            version: env!("CARGO_PKG_VERSION"),
            machine: Machine::this(),
        }
    }
}

/// The command line, without where the result is written: that is no part of how it was measured.
fn command(words: impl Iterator<Item = String>) -> String {
    let mut line = "bench".to_owned();
    let mut is_place = false;
    for word in words {
        if !is_place && word != "--out" && !word.starts_with("--out=") {
            line.push(' ');
            line += &word;
        }
        is_place = word == "--out";
    }
    line
}

impl Machine {
    fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map_or("", |(_, value)| value.trim())
        };
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            cpu: field("model name").to_owned(),
            cores: core_affinity::get_core_ids().map_or(0, |ids| ids.len()),
            kernel: line_of("/proc/sys/kernel/osrelease"),
            kvm: kvm(field("flags")),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

/// The kernel's module behind `/dev/kvm` (`kvm_amd`, `kvm_intel`, or one that needs no help of the CPU) and what the CPU shows: a
/// guest's ring 0 is an order of magnitude slower where software does it.
fn kvm(flags: &str) -> String {
    if !std::path::Path::new("/dev/kvm").exists() {
        return "none".to_owned();
    }
    let has = |flag: &str| flags.split(' ').any(|found| found == flag);
    let cpu = match (has("vmx"), has("svm")) {
        (true, _) => "vmx",
        (_, true) => "svm",
        _ => "neither vmx nor svm",
    };
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let mut names: Vec<String> = modules
        .map(|module| module.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    names.sort();
    let inside = if has("hypervisor") {
        ", inside a virtual machine"
    } else {
        ""
    };
    format!("{} (CPU shows {cpu}{inside})", names.join(" "))
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn commit() -> String {
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"]);
    let changed = !said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty();
    format!("{commit}{}", if changed { "+" } else { "" })
}

/// What a program says in one line; nothing if it cannot be asked, because no figure depends on it.
fn said(program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_was_written_is_not_told() {
        let told = |words: &str| command(words.split(' ').map(str::to_owned));
        assert_eq!(told("ring --full"), "bench ring --full");
        assert_eq!(told("ring --out here --full"), "bench ring --full");
        assert_eq!(told("ring --out=here --seed 3"), "bench ring --seed 3");
        assert_eq!(told("ring --full --out here"), "bench ring --full");
    }
}
