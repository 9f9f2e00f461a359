//! A result as it is written: figures for programs (JSON), tables for people (Markdown), a picture (SVG).
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::draw::{self, Panel};
use crate::host::Origin;

/// What was aimed at, and what was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Aim {
    /// In words.
    pub what: String,
    /// The figure that was aimed at.
    pub aim: f64,
    /// The figure found.
    pub found: f64,
    /// Whether it is reached.
    pub reached: bool,
    /// What is known about why not.
    pub remark: String,
}

impl Aim {
    /// An aim that is reached at or below `aim`.
    pub fn at_most(what: &str, aim: f64, found: f64, remark: &str) -> Self {
        Self {
            what: what.to_owned(),
            aim,
            found: round(found),
            reached: found <= aim,
            remark: remark.to_owned(),
        }
    }

    /// An aim that is reached at or above `aim`.
    pub fn at_least(what: &str, aim: f64, found: f64, remark: &str) -> Self {
        Self {
            reached: found >= aim,
            ..Self::at_most(what, aim, found, remark)
        }
    }
}

/// A table.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// As many cells each as there are columns.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows yet.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            columns: columns.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn markdown(&self) -> String {
        format!("### {}\n\n{}", self.title, self.lines())
    }

    /// As Markdown, without its title.
    pub fn lines(&self) -> String {
        let mut text = format!("| {} |\n|", self.columns.join(" | "));
        text.push_str(&" --- |".repeat(self.columns.len()));
        text.push('\n');
        for row in &self.rows {
            // Writing to a string does not fail.
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text
    }
}

/// One measurement's result.
#[derive(Debug)]
pub struct Sheet {
    name: &'static str,
    title: &'static str,
    origin: Origin,
    /// Figures by name, for programs.
    pub figures: Map<String, Value>,
    /// The aims that these figures are held against.
    pub aims: Vec<Aim>,
    /// For people.
    pub tables: Vec<Table>,
    /// How it was measured and what to know about it.
    pub notes: Vec<String>,
    /// The picture, from top to bottom.
    pub panels: Vec<Panel>,
}

impl Sheet {
    /// An empty one; made before the measurement begins.
    pub fn new(name: &'static str, title: &'static str) -> Self {
        Self {
            name,
            title,
            origin: Origin::now(),
            figures: Map::new(),
            aims: Vec::new(),
            tables: Vec::new(),
            notes: Vec::new(),
            panels: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// Adds a note.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Writes `NAME.json`, `NAME.md` and `NAME.svg`.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let path = |ending: &str| directory.join(format!("{}.{ending}", self.name));
        let mut text = serde_json::to_string_pretty(&self.json()).context("encode the figures")?;
        text.push('\n');
        for (path, text) in [(path("json"), text), (path("md"), self.markdown())] {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        if self.panels.is_empty() {
            return Ok(());
        }
        draw::write(&path("svg"), &self.panels)
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "origin": self.origin,
            "figures": self.figures,
            "title": self.title,
            "aims": self.aims,
            "tables": self.tables,
            "panels": self.panels,
            "notes": self.notes,
        })
    }

    /// The table for people.
    pub fn markdown(&self) -> String {
        let Origin {
            command,
            date,
            commit,
            version,
            machine,
        } = &self.origin;
        let mut text = format!(
            "# {}\n\nMade by `{command}` at {date}, version {version}, commit {commit}, on {}: {} cores, Linux {}, \
             KVM {}, load {} before.\nNot edited by hand; the figures are in `{name}.json`{}.\n",
            self.title,
            machine.cpu,
            machine.cores,
            machine.kernel,
            machine.kvm,
            machine.load,
            if self.panels.is_empty() {
                String::new()
            } else {
                format!(", the picture in `{}.svg`", self.name)
            },
            name = self.name,
        );
        for table in &self.tables {
            text.push('\n');
            text.push_str(&table.markdown());
        }
        if !self.aims.is_empty() {
            text.push('\n');
            text.push_str(&aims(&self.aims).markdown());
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            // Writing to a string does not fail.
            let _ = writeln!(text, "- {note}");
        }
        text
    }
}

/// Aims as a table.
pub fn aims(all: &[Aim]) -> Table {
    let mut table = Table::new("Aims", &["aim", "figure", "found", "", "remark"]);
    for aim in all {
        let verdict = if aim.reached {
            "reached"
        } else {
            "**not reached**"
        };
        table.row([
            aim.what.clone(),
            aim.aim.to_string(),
            aim.found.to_string(),
            verdict.to_owned(),
            aim.remark.clone(),
        ]);
    }
    table
}

/// Three places after the point: more would be noise.
#[must_use]
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The middle one; the mean of the two in the middle of an even number. Nothing gives 0.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn an_aim_knows_its_direction() {
        assert!(Aim::at_most("x", 1.5, 1.5, "").reached);
        assert!(!Aim::at_most("x", 1.5, 1.6, "").reached);
        assert!(Aim::at_least("x", 0.98, 0.99, "").reached);
        assert!(!Aim::at_least("x", 0.98, 0.97, "").reached);
    }

    #[test]
    fn a_sheet_is_written_three_times() {
        let directory = tempfile::tempdir().unwrap();
        let mut sheet = Sheet::new("probe", "A probe");
        sheet.figure("answer", 42);
        sheet
            .aims
            .push(Aim::at_most("small", 1.0, 2.0, "it is large"));
        let mut table = Table::new("Numbers", &["name", "value"]);
        table.row(["answer".into(), "42".into()]);
        sheet.tables.push(table);
        sheet.panels.push(Panel::Bars {
            title: "Numbers".into(),
            unit: "".into(),
            bars: vec![("answer & more".into(), 42.0)],
        });
        sheet.write(directory.path()).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let json: Value = serde_json::from_str(&read("probe.json")).unwrap();
        assert_eq!(json["figures"]["answer"], 42);
        assert_eq!(json["aims"][0]["reached"], false);
        let text = read("probe.md");
        assert!(
            text.contains("| answer | 42 |") && text.contains("**not reached**"),
            "{text}"
        );
        assert!(read("probe.svg").contains("answer"));
    }
}
