//! One page of all results: self-contained, light or dark as the reader's system is, from nothing but what lies in `results/`.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::draw::{self, Panel};
use crate::sheet::{Aim, Table, aims};

/// The page's name.
pub const PAGE: &str = "report.html";
/// What comes first, in this order; the rest follows by name.
const ORDER: [&str; 9] = [
    "demo",
    "alternatives",
    "failover",
    "paper",
    "request",
    "throughput",
    "checkpoint",
    "log",
    "ring",
];

/// A result as it lies there.
#[derive(Debug, Deserialize)]
struct Found {
    name: String,
    /// Its name stands for it in results of older programs.
    title: Option<String>,
    origin: Value,
    #[serde(default)]
    aims: Vec<Aim>,
    #[serde(default)]
    tables: Vec<Table>,
    #[serde(default)]
    panels: Vec<Panel>,
    #[serde(default)]
    notes: Vec<String>,
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #6a6a70; --ground: #fdfdfc; --line: #d9d9de; --bad: #b3261e; --good: #1b6e3c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --soft: #9c9ca6; --ground: #17181b; --line: #3a3b41; --bad: #ff8a80; --good: #7fd6a0; } }
body { color: var(--ink); background: var(--ground); font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.origin, footer { color: var(--soft); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: left; }
strong { color: var(--bad); }
.reached { color: var(--good); }
svg { max-width: 100%; height: auto; }
code, pre { font: 0.85rem ui-monospace, monospace; }
pre { overflow-x: auto; }
";

/// Reads the results in a directory and writes the page, and each result's picture anew.
///
/// # Errors
/// If a result cannot be read, or the page not be written.
pub fn write(directory: &Path) -> Result<PathBuf> {
    let found = read(directory)?;
    ensure!(
        !found.is_empty(),
        "no results in {}: `bench all` makes them",
        directory.display()
    );
    for one in found.iter().filter(|one| !one.panels.is_empty()) {
        draw::write(&directory.join(format!("{}.svg", one.name)), &one.panels)?;
    }
    let path = directory.join(PAGE);
    let page = page(&found, &shown(directory)?)?;
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn read(directory: &Path) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in files(directory, "json")? {
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let one: Found = serde_json::from_slice(&bytes)
            .with_context(|| format!("understand {}: is it bench's?", path.display()))?;
        found.push(one);
    }
    found.sort_by_key(|one| {
        let place = ORDER.iter().position(|name| *name == one.name);
        (place.unwrap_or(ORDER.len()), one.name.clone())
    });
    Ok(found)
}

/// What `scripts/prove NAME --full` said: name and text.
fn shown(directory: &Path) -> Result<Vec<(String, String)>> {
    let directory = directory.join("prove");
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    files(&directory, "txt")?
        .into_iter()
        .map(|path| {
            let text =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let name = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            Ok((name, text))
        })
        .collect()
}

fn files(directory: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == ending) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn page(found: &[Found], shown: &[(String, String)]) -> Result<String> {
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Doppel, measured</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>Doppel, measured</h1>\n\
         <p>Every figure here was written by <code>bench</code>; under each stand the machine, the commit and the command that made it. \
         Ratios are of one run; absolute figures are of that machine.</p>\n<ul>\n"
    );
    for one in found {
        let missed = one.aims.iter().filter(|aim| !aim.reached).count();
        let aims = match (one.aims.len(), missed) {
            (0, _) => String::new(),
            (all, 0) => format!(": <span class=\"reached\">{all} of {all} aims reached</span>"),
            (all, missed) => format!(": <strong>{} of {all} aims reached</strong>", all - missed),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "<li><a href=\"#{}\">{}</a>{aims}</li>",
            one.name,
            escape(title(one))
        );
    }
    text.push_str("</ul>\n");
    for one in found {
        section(&mut text, one)?;
    }
    if !shown.is_empty() {
        text.push_str("<h2 id=\"prove\">Promises, as they were shown in full</h2>\n");
        for (name, said) in shown {
            let _ = writeln!(
                text,
                "<details><summary>{}</summary><pre>{}</pre></details>",
                escape(name),
                escape(said)
            );
        }
    }
    text.push_str("<footer><p>Drawn by <code>bench report</code> from the files beside it.</p></footer>\n</body>\n</html>\n");
    Ok(text)
}

fn title(one: &Found) -> &str {
    one.title.as_deref().unwrap_or(&one.name)
}

fn section(text: &mut String, one: &Found) -> Result<()> {
    let origin = |pointer: &str| match one.origin.pointer(pointer) {
        Some(Value::String(word)) => escape(word),
        Some(other) => other.to_string(),
        None => "unknown".to_owned(),
    };
    let _ = write!(
        text,
        "<h2 id=\"{name}\">{}</h2>\n<p class=\"origin\"><code>{}</code>, {}, version {}, commit {}; {}, {} cores, Linux {}, KVM {}, \
         load {} before. Figures: <code>{name}.json</code>.</p>\n",
        escape(title(one)),
        origin("/command"),
        origin("/date"),
        origin("/version"),
        origin("/commit"),
        origin("/machine/cpu"),
        origin("/machine/cores"),
        origin("/machine/kernel"),
        origin("/machine/kvm"),
        origin("/machine/load"),
        name = one.name,
    );
    if one.tables.is_empty() {
        let _ = writeln!(
            text,
            "<p>Made by an older <code>bench</code>: its tables are in <code>{}.md</code>.</p>",
            one.name
        );
    }
    let aims = (!one.aims.is_empty()).then(|| aims(&one.aims));
    for each in one.tables.iter().chain(&aims) {
        table(text, each);
    }
    if !one.panels.is_empty() {
        text.push_str(&draw::inline(&one.panels)?);
    }
    text.push_str("<ul>\n");
    for note in &one.notes {
        let _ = writeln!(text, "<li>{}</li>", marked(note));
    }
    text.push_str("</ul>\n");
    Ok(())
}

fn table(text: &mut String, table: &Table) {
    let _ = write!(
        text,
        "<h3>{}</h3>\n<div class=\"scroll\"><table>\n<tr>",
        marked(&table.title)
    );
    for name in &table.columns {
        let _ = write!(text, "<th>{}</th>", marked(name));
    }
    text.push_str("</tr>\n");
    for row in &table.rows {
        text.push_str("<tr>");
        for cell in row {
            let _ = write!(text, "<td>{}</td>", marked(cell));
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table></div>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The Markdown that results use: code and bold.
fn marked(text: &str) -> String {
    let mut out = escape(text);
    for (mark, from, to) in [("`", "<code>", "</code>"), ("**", "<strong>", "</strong>")] {
        let pieces: Vec<&str> = out.split(mark).collect();
        // One without its other half stands for itself.
        if pieces.len().is_multiple_of(2) {
            continue;
        }
        let mut put = String::new();
        for (number, piece) in pieces.iter().enumerate() {
            put.push_str(match number {
                0 => "",
                odd if odd % 2 == 1 => from,
                _ => to,
            });
            put.push_str(piece);
        }
        out = put;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sheet::Sheet;

    #[test]
    fn the_page_has_everything_in_it_and_fetches_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut sheet = Sheet::new("probe", "A <probe>");
        sheet.figure("answer", 42);
        sheet
            .aims
            .push(Aim::at_most("small", 1.0, 2.0, "it is `large`"));
        let mut numbers = Table::new("Numbers", &["name", "value"]);
        numbers.row(["answer".into(), "42".into()]);
        sheet.tables.push(numbers);
        sheet.panels.push(Panel::Bars {
            title: "Bars".into(),
            unit: "ms".into(),
            bars: vec![("one".into(), 1.0)],
        });
        sheet.write(directory.path()).unwrap();
        fs::remove_file(directory.path().join("probe.svg")).unwrap();
        // A result of a program that did not write its tables.
        fs::write(
            directory.path().join("old.json"),
            r#"{"name":"old","origin":{"commit":"abc"},"figures":{},"aims":[],"notes":["so"]}"#,
        )
        .unwrap();
        fs::create_dir(directory.path().join("prove")).unwrap();
        fs::write(directory.path().join("prove/zombie.txt"), "it <holds>").unwrap();
        let page = fs::read_to_string(write(directory.path()).unwrap()).unwrap();
        for there in [
            "A &lt;probe&gt;",
            "<td>42</td>",
            "<strong>not reached</strong>",
            "<code>large</code>",
            "<svg",
            "commit abc",
            "old.md",
            "it &lt;holds&gt;",
            "prefers-color-scheme: dark",
        ] {
            assert!(page.contains(there), "{there}: {page}");
        }
        // The one address is the name of SVG's own words.
        let addresses = page.replace("http://www.w3.org/2000/svg", "");
        for outside in [
            "http:", "https:", "src=", "<link", "<script", "@import", "url(",
        ] {
            assert!(!addresses.contains(outside), "{outside}");
        }
        assert!(directory.path().join("probe.svg").is_file());
        write(&directory.path().join("prove")).unwrap_err();
    }
}
