//! A site's own monitoring watches a pair (issue 8): a real Prometheus scrapes both sides with the rules and the configuration that
//! come with Doppel, knows every metric that rules, dashboard and documentation name, and tells when the backup is gone.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hypervisor::demo::client;
use hypervisor::demo::pair::Pair;
use serde_json::Value;

use crate::harness::prometheus::{Prometheus, promtool};
use crate::harness::stage::{GUEST, Stage, alone};
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "monitored",
    line: "a real Prometheus scrapes a pair by the rules that come with it, and an alert fires when the backup is lost; every metric is documented",
    short: Duration::from_secs(20),
    full: Duration::from_secs(120),
    show,
};

const RULES: &str = "doppel.rules.yml";
const TESTS: &str = "doppel.rules.test.yml";
/// The addresses that the example of a configuration has.
const EXAMPLES: [&str; 2] = ["192.0.2.1:9464", "192.0.2.2:9464"];
/// The machine's name where none is given.
const MACHINE: &str = "machine";

fn show(run: &Run) -> Result<Figures> {
    let files = project()?.join("scripts/monitoring");
    rules_hold(&files)?;
    let mut figures = Figures::default();
    alone(|| watched(run, &files, &mut figures))?;
    Ok(figures)
}

fn project() -> Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(own.parent().context("the project's directory")?.to_owned())
}

/// The rules are well made and do what their own test says; a test that expects another thing fails.
fn rules_hold(files: &Path) -> Result<()> {
    promtool(files, &["check", "rules", RULES])?;
    promtool(files, &["check", "config", "prometheus.yml"])?;
    promtool(files, &["test", "rules", TESTS])?;
    let copy = tempfile::tempdir().context("make a directory")?;
    fs::copy(files.join(RULES), copy.path().join(RULES)).context("copy the rules")?;
    let test = fs::read_to_string(files.join(TESTS)).context("read the rules' test")?;
    let wrong = test.replacen("eval_time: 2m30s", "eval_time: 1m", 1);
    ensure!(wrong != test, "the rules' test does not look at 2m30s");
    fs::write(copy.path().join(TESTS), wrong).context("write a wrong test")?;
    ensure!(
        promtool(copy.path(), &["test", "rules", TESTS]).is_err(),
        "the rules' test passes whatever the rules say"
    );
    Ok(())
}

/// The configuration and the rules as they are, but for addresses and patience: a test does not wait minutes.
fn configure(files: &Path, to: &Path, targets: &[String]) -> Result<PathBuf> {
    let mut config =
        fs::read_to_string(files.join("prometheus.yml")).context("read the configuration")?;
    for (example, target) in EXAMPLES.iter().zip(targets) {
        ensure!(
            config.contains(example),
            "the configuration has no {example}"
        );
        config = config.replace(example, target);
    }
    let quick = config.replace("_interval: 5s", "_interval: 1s");
    ensure!(quick != config, "the configuration has no interval of 5s");
    let rules = fs::read_to_string(files.join(RULES)).context("read the rules")?;
    let impatient: String = rules
        .lines()
        .map(|line| match line.split_once("for: ") {
            Some((indent, _)) if indent.trim().is_empty() => format!("{indent}for: 2s\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    fs::write(to.join(RULES), impatient).context("write the rules")?;
    let path = to.join("prometheus.yml");
    fs::write(&path, quick).context("write the configuration")?;
    Ok(path)
}

fn watched(run: &Run, files: &Path, figures: &mut Figures) -> Result<()> {
    let stage = Stage::enter()?;
    let mut spec = stage.spec("kv", "")?;
    spec.more = vec!["--metrics".into(), "0".into()];
    let mut pair = Pair::start(&spec, Some(stage.port()))?;
    let targets = hypervisor::control::find::roles(&spec.run_directory(), None)?
        .into_iter()
        .map(|found| found.outcome.ok()?.metrics)
        .collect::<Option<Vec<String>>>()
        .context("a side does not say where its metrics are")?;
    ensure!(targets.len() == 2, "these serve metrics: {targets:?}");
    let load = client::start(client::Config {
        rate: Some(200.0),
        ..client::Config::new(GUEST, run.seed)
    })?;
    let config = configure(files, stage.directory(), &targets)?;
    let prometheus = Prometheus::start(&config, stage.directory())?;
    prometheus.until("both sides are scraped and the guest serves", |it| {
        Ok(it.query("up == 1")?.len() == 2
            && !it
                .query("rate(doppel_commit_latency_seconds_count[10s]) > 0")?
                .is_empty())
    })?;
    let scraped = scraped(&prometheus)?;
    named(files, &scraped)?;
    let panels = panels(files, &prometheus)?;
    figures.add("metrics", scraped.len());
    figures.add("panels", panels);
    let fired = told(&prometheus)?;
    ensure!(fired.is_empty(), "a healthy pair fires {fired:?}");

    pair.backup.kill();
    let after = prometheus.until("an alert about the lost backup", |it| {
        Ok(it
            .firing(MACHINE)?
            .iter()
            .any(|name| name == "DoppelUnprotected"))
    })?;
    run.say(format!(
        "the alert fired {:.1} s after the backup was killed",
        after.as_secs_f64()
    ));
    figures.add("alert_after_s", (after.as_secs_f64() * 10.0).round() / 10.0);
    let fired = told(&prometheus)?;
    ensure!(
        fired == ["DoppelUnprotected"],
        "a machine that lost its backup fires {fired:?}"
    );
    let mut outcome = load.stop()?;
    let verdict = outcome.verify_all(GUEST, Duration::from_secs(20));
    ensure!(
        verdict.lost_acknowledged_writes == 0 && verdict.broken_connections == 0,
        "the watched guest lost something: {verdict:?}"
    );
    Ok(())
}

/// The alerts that fire, but for those that tell of a busy machine, which this one may be.
fn told(prometheus: &Prometheus) -> Result<Vec<String>> {
    let mut names = prometheus.firing(MACHINE)?;
    names.retain(|name| !["DoppelBackupLags", "DoppelCommitsSlow"].contains(&name.as_str()));
    Ok(names)
}

/// A metric's family: a histogram's series are one metric.
fn family(name: &str, histograms: &BTreeSet<String>) -> String {
    ["_bucket", "_sum", "_count"]
        .iter()
        .filter_map(|end| name.strip_suffix(end))
        .find(|base| histograms.contains(*base))
        .unwrap_or(name)
        .to_owned()
}

/// Metrics of ours that Prometheus knows, and the histograms among them.
fn scraped(prometheus: &Prometheus) -> Result<BTreeSet<String>> {
    let names = prometheus.api("label/__name__/values")?;
    let names: BTreeSet<String> = names
        .as_array()
        .context("prometheus knows no names")?
        .iter()
        .filter_map(Value::as_str)
        .filter(|name| name.starts_with("doppel_"))
        .map(str::to_owned)
        .collect();
    let histograms = names
        .iter()
        .filter_map(|name| name.strip_suffix("_bucket"))
        .map(str::to_owned)
        .collect();
    Ok(names.iter().map(|name| family(name, &histograms)).collect())
}

/// Words of ours in a text.
fn words(text: &str) -> BTreeSet<String> {
    let part_of =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
    text.split(|letter| !part_of(letter))
        .filter(|word| word.starts_with("doppel_"))
        .map(str::to_owned)
        .collect()
}

/// Everything that is named is scraped, and everything that is scraped is documented.
fn named(files: &Path, scraped: &BTreeSet<String>) -> Result<()> {
    let documented =
        fs::read_to_string(project()?.join("docs/metrics.md")).context("read docs/metrics.md")?;
    let documented = words(&documented);
    let all: BTreeSet<String> = scraped
        .iter()
        .filter(|name| !documented.contains(*name))
        .cloned()
        .collect();
    ensure!(all.is_empty(), "scraped and not documented: {all:?}");
    let sources = [RULES, "grafana-dashboard.json"]
        .iter()
        .map(|name| {
            Ok((
                *name,
                words(&fs::read_to_string(files.join(name)).context("read a file")?),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    for (name, words) in sources.into_iter().chain([("docs/metrics.md", documented)]) {
        ensure!(!words.is_empty(), "{name} names no metric");
        let unknown: Vec<String> = words
            .into_iter()
            .filter(|word| !scraped.contains(&family(word, scraped)))
            .collect();
        ensure!(
            unknown.is_empty(),
            "{name} names what nobody serves: {unknown:?}"
        );
    }
    Ok(())
}

/// Every expression of the dashboard is one, and shows something of a pair under load. How many panels.
fn panels(files: &Path, prometheus: &Prometheus) -> Result<usize> {
    let text =
        fs::read_to_string(files.join("grafana-dashboard.json")).context("read the dashboard")?;
    let dashboard: Value = serde_json::from_str(&text).context("the dashboard is no JSON")?;
    let panels = dashboard["panels"]
        .as_array()
        .context("the dashboard has no panels")?;
    for panel in panels {
        let title = panel["title"].as_str().context("a panel without a title")?;
        for target in panel["targets"]
            .as_array()
            .context("a panel without targets")?
        {
            let expression = target["expr"]
                .as_str()
                .context("a target without an expression")?;
            let plain = expression
                .replace("$name", ".*")
                .replace("$__rate_interval", "10s");
            let found = prometheus.query(&plain).with_context(|| title.to_owned())?;
            ensure!(
                !found.is_empty(),
                "{title} shows nothing of a pair under load: {plain}"
            );
        }
    }
    Ok(panels.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn names_are_found_in_expressions() {
        let found =
            words("rate(doppel_log_bytes_total{name=~\"$name\"}[5m]) / doppel_epoch + other_total");
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["doppel_epoch", "doppel_log_bytes_total"]
        );
        let histograms = BTreeSet::from(["doppel_x_seconds".to_owned()]);
        assert_eq!(
            family("doppel_x_seconds_bucket", &histograms),
            "doppel_x_seconds"
        );
        assert_eq!(family("doppel_y_count", &histograms), "doppel_y_count");
    }
}
