//! Every figure that the README quotes, and every marked one of the documentation, is what a result says (issue 8, 6), and the page of
//! all results is drawn from them: every picture and the page, to the last byte, and nothing lies there that no command writes. Shown on the
//! project's own files, and on copies of them in which one digit is wrong.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::program;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "figures-quoted",
    line: "every figure in the README and every marked one of docs/ stands in results/, and every file there is one that a command makes again; a wrong digit is noticed",
    short: Duration::from_secs(2),
    full: Duration::from_secs(2),
    show,
};

fn show(_run: &Run) -> Result<Figures> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the project's directory")?;
    let count = quoted(project)?;
    ensure!(count > 0, "no figure is marked");

    let copy = tempfile::tempdir().context("make a directory")?;
    for name in ["README.md", "docs", "results"] {
        copy_all(&project.join(name), &copy.path().join(name))?;
    }
    ensure!(quoted(copy.path())? == count, "a copy has other figures");
    let page = bench(copy.path(), &["report", "--out", "results"])?;
    ensure!(
        page.status.success(),
        "bench report: {}",
        text(&page.stderr)
    );
    let page =
        fs::read_to_string(copy.path().join("results/report.html")).context("read the page")?;
    for result in ["request", "failover"] {
        ensure!(
            page.contains(&format!("id=\"{result}\"")),
            "{result} is not on the page"
        );
    }

    let drawn = made_again(project, copy.path())?;
    let stray = copy.path().join("results/of-a-program-that-is-gone.svg");
    fs::write(&stray, "<svg/>").context("leave a file")?;
    ensure!(
        quoted(copy.path()).is_err(),
        "a result that no command writes was not noticed"
    );
    fs::remove_file(&stray).context("remove it")?;

    let readme = copy.path().join("README.md");
    let right = fs::read_to_string(&readme).context("read the README")?;
    let mut found = 0;
    for (name, wrong) in spoilt(&right)? {
        fs::write(&readme, wrong).context("spoil the README")?;
        ensure!(quoted(copy.path()).is_err(), "{name} was not noticed");
        found += 1;
    }
    // And what is wrong is put right, to the last byte.
    fs::write(
        &readme,
        one_digit(&right).context("no marked figure in the README")?,
    )
    .context("spoil the README")?;
    let output = bench(copy.path(), &["quote", "--write"])?;
    ensure!(
        output.status.success(),
        "bench quote --write: {}",
        text(&output.stderr)
    );
    ensure!(
        fs::read_to_string(&readme).context("read the README")? == right,
        "bench quote --write does not restore what was there"
    );
    let mut figures = Figures::default();
    figures.add("figures", count);
    figures.add("errors_noticed", found + 1);
    figures.add("drawings_made_again", drawn);
    Ok(figures)
}

/// What `bench report` draws from the results in the copy is what lies in the project. How many pictures and pages.
fn made_again(project: &Path, copy: &Path) -> Result<usize> {
    let results = project.join("results");
    let mut drawn = vec![PathBuf::from("report.html")];
    for entry in fs::read_dir(&results).context("list the results")? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "json") {
            let bytes = fs::read(&path).context("read a result")?;
            let result: Value = serde_json::from_slice(&bytes).context("understand a result")?;
            // Older programs kept no panels: their pictures come with their measurement alone.
            if result["panels"]
                .as_array()
                .is_some_and(|panels| !panels.is_empty())
            {
                let picture = path.with_extension("svg");
                drawn.extend(picture.file_name().map(PathBuf::from));
            }
        }
    }
    // Those that are not drawn would be missed.
    for name in &drawn {
        fs::remove_file(copy.join("results").join(name)).context("remove a drawing")?;
    }
    let report = bench(copy, &["report", "--out", "results"])?;
    ensure!(report.status.success(), "{}", text(&report.stderr));
    for name in &drawn {
        let read = |root: &Path| {
            let path = root.join("results").join(name);
            fs::read(&path).with_context(|| format!("{} is not drawn", path.display()))
        };
        ensure!(
            read(project)? == read(copy)?,
            "results/{} is not what bench report draws now: run target/release/bench report",
            name.display()
        );
    }
    let shown = project.join("results/prove");
    for entry in fs::read_dir(&shown).context("list what was shown")? {
        let name = PathBuf::from(entry?.file_name());
        let promise = name.file_stem().unwrap_or_default().to_string_lossy();
        ensure!(
            crate::promises::ALL.iter().any(|one| one.name == promise),
            "results/prove/{}: there is no such promise",
            name.display()
        );
    }
    Ok(drawn.len())
}

/// A README with one error each, and what it is.
fn spoilt(right: &str) -> Result<Vec<(&'static str, String)>> {
    let wrong_digit = one_digit(right).context("no marked figure in the README")?;
    let unknown = right.replacen(".json#/", ".json#/no/such/place/", 1);
    Ok(vec![
        ("a wrong digit", wrong_digit),
        ("a source that does not exist", unknown),
        (
            "a figure from nowhere",
            format!("{right}\nIt takes 7 ms.\n"),
        ),
    ])
}

/// The last digit before the first mark is another one.
fn one_digit(right: &str) -> Option<String> {
    let mark = right.find("<!-- = ")?;
    let digit = right[..mark].chars().next_back()?.to_digit(10)?;
    Some(format!(
        "{}{}{}",
        &right[..mark - 1],
        (digit + 1) % 10,
        &right[mark..]
    ))
}

/// How many figures there are, if all are right.
fn quoted(root: &Path) -> Result<usize> {
    let output = bench(root, &["quote"])?;
    if !output.status.success() {
        bail!("{}", text(&output.stderr));
    }
    let said = text(&output.stdout);
    let count = said.split(' ').next().and_then(|word| word.parse().ok());
    count.with_context(|| format!("bench quote said {said:?}"))
}

fn bench(root: &Path, words: &[&str]) -> Result<Output> {
    Command::new(program::beside("bench")?)
        .args(words)
        .current_dir(root)
        .output()
        .context("start bench")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
        return Ok(());
    }
    fs::create_dir(to).context("make a directory")?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        copy_all(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn one_digit_is_another() {
        assert_eq!(
            one_digit("it takes 1.9<!-- = x --> s").as_deref(),
            Some("it takes 1.0<!-- = x --> s")
        );
        assert_eq!(one_digit("nothing"), None);
    }
}
