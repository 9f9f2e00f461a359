//! `doppel doctor`.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use hypervisor::arbiter::Place;
use hypervisor::config::Config;
use hypervisor::doctor::{self, Finding, Host, Level, Report};
use hypervisor::kvm::KvmSource;

use super::Failure;

/// Say what this host can do for a pair, and what to do about each lack
#[derive(Debug, Args)]
#[command(
    after_help = "Ends 0 if a pair can run here and 1 if not. It needs no root and changes nothing; a tiny guest measures KVM for \
                  about a second.\nExample: doppel doctor --json"
)]
pub struct DoctorArgs {
    /// Where KVM is
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
    /// Ask this arbiter, too
    #[arg(long, value_name = "DIR|etcd://HOST:PORT,...")]
    arbiter: Option<Place>,
    /// Look at what this configuration of a pair needs, too: its secret, its transport's library
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let mut report = doctor::examine(&Host::real(KvmSource::Path(args.kvm.clone())));
    if let Some(place) = &args.arbiter {
        let finding = doctor::ask_arbiter(place);
        report.can_run_a_pair &= finding.level == Level::Good;
        report.findings.push(finding);
    }
    if let Some(path) = &args.config {
        let config = Config::read(path).map_err(|error| Failure::new(Failure::USAGE, error))?;
        for finding in doctor::look_at(&config, &report.facts) {
            report.can_run_a_pair &= finding.level == Level::Good;
            report.findings.push(finding);
        }
    }
    if args.json {
        let text = serde_json::to_string(&report).expect("plain fields always encode");
        println!("{text}");
    } else {
        print!("{}", text(&report, std::io::stdout().is_terminal()));
    }
    if report.can_run_a_pair {
        return Ok(());
    }
    let lacks: Vec<&str> = report
        .findings
        .iter()
        .filter(|finding| finding.level == Level::Missing)
        .map(|finding| finding.found.as_str())
        .collect();
    Err(Failure::new(
        Failure::ERROR,
        format!("no pair can run here: {}", lacks.join("; ")),
    ))
}

fn text(report: &Report, colour: bool) -> String {
    let mut text = String::new();
    let mut area = "";
    for finding in &report.findings {
        if finding.area != area {
            area = finding.area;
            text.push_str(&format!("{area}\n"));
        }
        text.push_str(&lines(finding, colour));
    }
    let verdict = if report.can_run_a_pair {
        format!(
            "A pair can run here: {}. Try `doppel demo`.",
            report.ways.join(" or ")
        )
    } else {
        "No pair can run here.".to_owned()
    };
    text.push_str(&format!("\n{verdict}\n"));
    text
}

fn lines(finding: &Finding, colour: bool) -> String {
    let (word, code) = match finding.level {
        Level::Good => ("good", "32"),
        Level::Limited => ("limited", "33"),
        Level::Missing => ("missing", "31"),
    };
    let word = format!("{word:8}");
    let word = if colour {
        format!("\x1b[{code}m{word}\x1b[0m")
    } else {
        word
    };
    let mut lines = format!("  {word} {}\n", finding.found);
    if let Some(advice) = &finding.advice {
        lines.push_str(&format!("           -> {advice}\n"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_only_where_it_is_wanted() {
        let finding = Finding {
            area: "KVM",
            level: Level::Missing,
            found: "nothing".into(),
            advice: Some("something".into()),
        };
        assert_eq!(
            lines(&finding, false),
            "  missing  nothing\n           -> something\n"
        );
        assert!(lines(&finding, true).contains("\x1b[31mmissing"));
    }
}
