//! Every file in `results/` is one that a command writes: what lies there besides was left by a program that is gone, or put there by
//! hand, and nobody could make it again.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::report::PAGE;

/// Not measured: written by hand, and by `prove`.
const BESIDES: [&str; 3] = ["README.md", PAGE, "prove"];

/// What lies in `results` and is no command's, or does not belong together; `names` are those of all results that there can be.
///
/// # Errors
/// If a file cannot be read.
pub fn strays(results: &Path, names: &[&str]) -> Result<Vec<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(results).with_context(|| format!("list {}", results.display()))? {
        found.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    let mut wrong = Vec::new();
    for file in found.iter().filter(|file| !BESIDES.contains(&&***file)) {
        let known = file.rsplit_once('.').is_some_and(|(name, ending)| {
            names.contains(&name) && ["json", "md", "svg"].contains(&ending)
        });
        if !known {
            wrong.push(format!("results/{file}: no command writes it; remove it"));
        }
    }
    for name in names {
        let json = format!("{name}.json");
        let has = |ending: &str| found.contains(&format!("{name}.{ending}"));
        if !has("json") {
            for ending in ["md", "svg"].into_iter().filter(|ending| has(ending)) {
                wrong.push(format!(
                    "results/{name}.{ending}: its {json} is missing; remove it"
                ));
            }
            continue;
        }
        let bytes = fs::read(results.join(&json)).with_context(|| format!("read {json}"))?;
        let sheet: Value =
            serde_json::from_slice(&bytes).with_context(|| format!("understand {json}"))?;
        let text = fs::read_to_string(results.join(format!("{name}.md"))).unwrap_or_default();
        // Results of older programs hold no panels, and their picture is of the same run as the text that names it.
        let panels = match sheet["panels"].as_array() {
            Some(panels) => !panels.is_empty(),
            None => text.contains(&format!("`{name}.svg`")),
        };
        if panels != has("svg") {
            let what = if panels { "lacks" } else { "does not have" };
            wrong.push(format!(
                "results/{json}: it {what} a picture; run `bench report`"
            ));
        }
        let date = sheet["origin"]["date"].as_str().unwrap_or_default();
        if date.is_empty() || !text.contains(date) {
            wrong.push(format!(
                "results/{name}.md: it is not of the run that {json} is of; run `bench {name} --full`"
            ));
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_command_writes_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let results = directory.path();
        let write = |name: &str, text: &str| fs::write(results.join(name), text).unwrap();
        let noticed = || strays(results, &["one", "two"]).unwrap();
        write("README.md", "");
        write(
            "one.json",
            r#"{"name": "one", "panels": [], "origin": {"date": "2026-01-02"}}"#,
        );
        write("one.md", "Made at 2026-01-02");
        assert!(noticed().is_empty(), "{:?}", noticed());
        for (name, text) in [
            ("three.json", "{}"),
            ("notes.txt", ""),
            ("one.svg", "<svg/>"),
            ("two.md", "Made at 2026-01-02"),
        ] {
            write(name, text);
            let wrong = noticed();
            assert_eq!(wrong.len(), 1, "{wrong:?}");
            fs::remove_file(results.join(name)).unwrap();
        }
        write("one.md", "Made at 2025-01-02");
        assert_eq!(noticed().len(), 1);
    }
}
