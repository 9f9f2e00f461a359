//! Figures that the documentation quotes: each is what a result says, and `--write` makes it so.
//!
//! ```text
//! a commit takes 0.9<!-- = request.json#/figures/commit_us/p50 --> µs        a number, as exact as it is written there
//! <!-- table alternatives.json#/tables/0 --> … <!-- end -->                   a whole table
//! <!-- lines demo.json#/figures/lines --> … <!-- end -->                      lines that begin with the same words there
//! ```
//! A table or lines of a result that does not exist are the sentence [`UNMEASURED`] and nothing else. The README has no figure with a
//! unit outside of these.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::account;
use crate::sheet::Table;

/// What stands for what was not measured yet.
const UNMEASURED: &str = "Not measured yet: `bench all --full` does it.";
/// What a figure is told by. Longer ones first.
const UNITS: [&str; 13] = [
    "requests/s",
    "writes/s",
    "GB/s",
    "MB/s",
    "MiB/s",
    "KiB/s",
    "Mb/s",
    "ns",
    "µs",
    "us",
    "ms",
    "s",
    "%",
];
/// A text's figures and whether they are right.
#[derive(Debug, Default)]
struct Checked {
    /// The text with every figure as it should be.
    text: String,
    /// Figures, tables and sets of lines.
    count: usize,
    wrong: Vec<String>,
}

/// Checks the README and the documentation below `root`; with `write` it puts right what can be. Every file of the results has to be of one
/// of these names. How many figures there are.
///
/// # Errors
/// Every figure that is not what the results say, and every result that nobody writes.
pub fn check(root: &Path, write: bool, names: &[&str]) -> Result<usize> {
    let mut count = 0;
    let mut wrong = Vec::new();
    let results = root.join("results");
    for path in pages(root)? {
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let name = path.strip_prefix(root).unwrap_or(&path).display();
        let mut checked = process(&text, &|source| look_up(&results, source))
            .with_context(|| name.to_string())?;
        count += checked.count;
        if write && checked.text != text {
            fs::write(&path, &checked.text).with_context(|| format!("write {name}"))?;
            checked.wrong.clear();
        }
        if path.ends_with("README.md") && path.parent() == Some(root) {
            checked.wrong.extend(unmarked(&text));
        }
        wrong.extend(
            checked
                .wrong
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    }
    wrong.extend(account::strays(&results, names)?);
    if !wrong.is_empty() {
        bail!(
            "figures that are not what results/ says (`bench quote --write` takes them from there):\n  {}",
            wrong.join("\n  ")
        );
    }
    Ok(count)
}

/// README.md and everything below docs.
fn pages(root: &Path) -> Result<Vec<PathBuf>> {
    let mut pages = vec![root.join("README.md")];
    let mut directories = vec![root.join("docs")];
    while let Some(directory) = directories.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    Ok(pages)
}

/// What a source says; nothing if its file does not exist.
fn look_up(results: &Path, source: &str) -> Result<Option<Value>> {
    let (file, pointer) = source
        .split_once('#')
        .context("it names no place: FILE.json#/…")?;
    let bytes = match fs::read(results.join(file)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("read {file}"))?,
    };
    let all: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("understand {file}"))?;
    let found = all
        .pointer(pointer)
        .with_context(|| format!("{file} has nothing at {pointer}"))?;
    Ok(Some(found.clone()))
}

const OPEN: &str = "<!-- ";
const CLOSE: &str = " -->";
const END: &str = "<!-- end -->";

fn process(text: &str, source: &dyn Fn(&str) -> Result<Option<Value>>) -> Result<Checked> {
    let mut out = Checked::default();
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        let (before, from) = rest.split_at(at);
        let inner = &from[OPEN.len()..];
        let length = inner.find(CLOSE).context("a comment without an end")?;
        let (comment, after) = (&inner[..length], &inner[length + CLOSE.len()..]);
        let place = |name: &str| -> Result<Option<Value>> {
            source(name).with_context(|| format!("the source {name}"))
        };
        out.text.push_str(before);
        rest = after;
        if let Some(name) = comment.strip_prefix("= ") {
            out.count += 1;
            let found = place(name)?.with_context(|| format!("no file for {name}"))?;
            let digits = before.len() - number_at_end(before).len();
            let quoted = &before[digits..];
            let right = like(quoted, &found).with_context(|| format!("{quoted:?}, of {name}"))?;
            if quoted != right {
                out.wrong.push(format!("{quoted} is {right} in {name}"));
            }
            out.text.truncate(out.text.len() - quoted.len());
            out.text.push_str(&right);
        }
        out.text
            .push_str(&from[..OPEN.len() + length + CLOSE.len()]);
        let Some((kind, name)) = comment.split_once(' ') else {
            continue;
        };
        if !["table", "lines"].contains(&kind) || !name.contains(".json#") {
            continue;
        }
        out.count += 1;
        let end = rest
            .find(END)
            .with_context(|| format!("{comment} has no {END}"))?;
        let body = &rest[..end];
        let right = match (place(name)?, kind) {
            (None, _) => format!("\n{UNMEASURED}\n"),
            (Some(found), "table") => {
                let table: Table = serde_json::from_value(found).context("this is no table")?;
                format!("\n{}", table.lines())
            }
            (Some(found), _) => same_lines(body, &found)?,
        };
        if body != right {
            out.wrong
                .push(format!("what stands at {comment} is not what is there"));
        }
        out.text.push_str(&right);
        rest = &rest[end..];
    }
    out.text.push_str(rest);
    Ok(out)
}

/// The number that a text ends with.
fn number_at_end(text: &str) -> &str {
    let part_of = |letter: char| letter.is_ascii_digit() || letter == '.' || letter == ',';
    let start = text.trim_end_matches(part_of).len();
    match text[..start].strip_suffix('-') {
        Some(before) => &text[before.len()..],
        None => &text[start..],
    }
}

/// A value as exact as what was written, with a comma at each thousand.
fn like(written: &str, value: &Value) -> Result<String> {
    if !written.ends_with(|letter: char| letter.is_ascii_digit()) {
        bail!("there is no number before it");
    }
    let value = value
        .as_f64()
        .ok_or_else(|| anyhow!("{value} is no number"))?;
    let places = written
        .split_once('.')
        .map_or(0, |(_, places)| places.len());
    let text = format!("{value:.places$}");
    let (whole, part) = match text.split_once('.') {
        Some((whole, part)) => (whole.to_owned(), format!(".{part}")),
        None => (text, String::new()),
    };
    let (sign, digits) = match whole.strip_prefix('-') {
        Some(digits) => ("-", digits.to_owned()),
        None => ("", whole),
    };
    let mut grouped = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    Ok(format!("{sign}{grouped}{part}"))
}

/// What stands in a line before its figure.
fn label(line: &str) -> &str {
    let line = line.trim_end();
    let indent = line.len() - line.trim_start().len();
    match line[indent..].find("  ") {
        Some(at) => &line[..indent + at],
        None => line,
    }
}

/// The lines of a block of code, each as the one of the same label is in the result. Where none is, they stay, and so are wrong.
fn same_lines(body: &str, found: &Value) -> Result<String> {
    let all: Vec<&str> = found
        .as_array()
        .and_then(|all| all.iter().map(Value::as_str).collect())
        .context("these are no lines")?;
    let mut out = String::new();
    for line in body.split_inclusive('\n') {
        let bare = line.trim_end_matches('\n');
        if bare.trim().is_empty() || bare.starts_with("```") {
            out.push_str(line);
            continue;
        }
        let same = all.iter().find(|other| label(other) == label(bare));
        let same = same.with_context(|| format!("no line there begins with {:?}", label(bare)))?;
        out.push_str(same.trim_end());
        out.push('\n');
    }
    Ok(out)
}

/// Figures with units that are not marked, in what is not a block of code.
fn unmarked(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let (mut code, mut region) = (false, false);
    for line in text.lines() {
        if line.starts_with("```") {
            code = !code;
        }
        region |= line.starts_with("<!-- table ") || line.starts_with("<!-- lines ");
        if line.starts_with(END) {
            region = false;
        }
        if code || region {
            continue;
        }
        let mut rest = line;
        while let Some(at) = rest.find(|letter: char| letter.is_ascii_digit()) {
            let number = rest[at..].len()
                - rest[at..]
                    .trim_start_matches(|letter: char| {
                        letter.is_ascii_digit() || ".,–".contains(letter)
                    })
                    .len();
            let after = &rest[at + number..];
            let unit = after.strip_prefix(' ').unwrap_or(after);
            let named = UNITS.iter().find(|name| {
                unit.strip_prefix(**name)
                    .is_some_and(|next| !next.starts_with(|letter: char| letter.is_alphanumeric()))
            });
            if let Some(name) = named {
                let figure = &rest[at..at + number];
                wrong.push(format!("{figure} {name} is quoted from nowhere: {line:?}"));
            }
            rest = after;
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn results(source: &str) -> Result<Option<Value>> {
        Ok(match source {
            "a.json#/small" => Some(json!(0.9434)),
            "a.json#/large" => Some(json!(-65312.3)),
            "a.json#/table" => {
                Some(json!({"title": "t", "columns": ["x", "y"], "rows": [["1", "2"]]}))
            }
            "a.json#/lines" => Some(json!([
                "Head",
                "  kill to first  1.5 ms",
                "  longest  4.6 ms"
            ])),
            "none.json#/x" => None,
            _ => bail!("nothing there"),
        })
    }

    fn processed(text: &str) -> Checked {
        process(text, &results).unwrap()
    }

    #[test]
    fn numbers_are_held_against_their_source() {
        let good = "it takes 0.94<!-- = a.json#/small --> µs, or -65,312<!-- = a.json#/large -->, <!-- aside -->";
        let found = processed(good);
        assert_eq!((found.count, found.text.as_str()), (2, good));
        assert!(found.wrong.is_empty(), "{:?}", found.wrong);
        let found = processed("0.95<!-- = a.json#/small --> 65312<!-- = a.json#/large -->");
        assert_eq!(found.wrong.len(), 2, "{:?}", found.wrong);
        assert_eq!(
            found.text,
            "0.94<!-- = a.json#/small --> -65,312<!-- = a.json#/large -->"
        );
        for bad in [
            "x<!-- = a.json#/small -->",
            "1<!-- = b.json#/x -->",
            "1<!-- = none.json#/x -->",
            "1<!-- = ",
        ] {
            process(bad, &results).unwrap_err();
        }
    }

    #[test]
    fn tables_and_lines_are_held_against_theirs() {
        let good =
            "<!-- table a.json#/table -->\n| x | y |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\n";
        let found = processed(good);
        assert!(found.wrong.is_empty() && found.text == good, "{found:?}");
        let found = processed(&good.replace("| 1 |", "| 3 |"));
        assert!(found.wrong.len() == 1 && found.text == good, "{found:?}");

        let good = "<!-- lines a.json#/lines -->\n```\nHead\n  longest  4.6 ms\n```\n<!-- end -->";
        let found = processed(good);
        assert!(found.wrong.is_empty() && found.text == good, "{found:?}");
        let found = processed(&good.replace("4.6", "1.6"));
        assert!(found.wrong.len() == 1 && found.text == good, "{found:?}");
        process(&good.replace("longest", "shortest"), &results).unwrap_err();
        process(good.strip_suffix(END).unwrap(), &results).unwrap_err();
    }

    #[test]
    fn what_was_not_measured_has_no_figures() {
        let good = format!("<!-- table none.json#/x -->\n{UNMEASURED}\n{END}");
        assert!(processed(&good).wrong.is_empty());
        let bad = format!("<!-- table none.json#/x -->\n| 1 ms |\n{END}");
        assert_eq!(processed(&bad).wrong.len(), 1);
        assert_eq!(processed(&bad).text, good);
    }

    #[test]
    fn a_figure_with_a_unit_has_to_be_marked() {
        let good = "in 5 steps, 64 connections, 6.0<!-- = a.json#/small --> ms\n```\n9 ms\n```\n<!-- table x -->\n9 ms\n<!-- end -->\n5 sides";
        assert!(unmarked(good).is_empty(), "{:?}", unmarked(good));
        for bad in [
            "it takes 9 ms.",
            "| 9.1 µs |",
            "0.1 Mb/s",
            "5–6 s",
            "half: 50%",
        ] {
            assert_eq!(unmarked(bad).len(), 1, "{bad}");
        }
    }
}
