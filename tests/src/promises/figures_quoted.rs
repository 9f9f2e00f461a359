//! Every figure that the README quotes, and every marked one of the documentation, is what a result says (issue 8, 6), and the page of
//! all results is drawn from them. Shown on the project's own files, and on copies of them in which one digit is wrong.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::harness::program;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "figures-quoted",
    line: "every figure in the README stands in results/, and so does every marked one of docs/; a wrong digit is noticed",
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
    figures.add("errors_noticed", found);
    Ok(figures)
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
