//! The table of all formats in `docs/formats.md` says what the sources say, and leaves none out.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hypervisor::version::Version;

/// Constants that number a format.
const NAMES: [&str; 5] = ["VERSION", "MODEL", "ABI", "HEADER", "TAG"];

/// Numbers of other people's formats: virtio, KVM's clock, Linux's boot protocol.
const FOREIGN: [&str; 3] = [
    "hypervisor/src/devices/virtio/mmio.rs",
    "hypervisor/src/devices/pvclock.rs",
    "hypervisor/src/prepare/bzimage.rs",
];

/// How many formats there are, if the page is right about all of them.
pub(super) fn listed() -> Result<usize> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let project = project.context("the project's directory")?;
    let page = fs::read_to_string(project.join("docs/formats.md")).context("read the page")?;
    let table = table(&page);
    ensure!(table.len() > 10, "the page lists {} formats", table.len());
    for (file, said) in &table {
        let text =
            fs::read_to_string(project.join(file)).with_context(|| format!("read {file}"))?;
        let found = if file.ends_with("/version.rs") {
            format!("{} to {}", Version::OLDEST, Version::NEWEST)
        } else {
            let found = text.lines().find_map(|line| number(line, &NAMES));
            found.with_context(|| format!("{file} numbers no format"))?
        };
        ensure!(
            *said == found,
            "docs/formats.md says {said} of {file}, which says {found}"
        );
    }
    for file in sources(project)? {
        let text =
            fs::read_to_string(project.join(&file)).with_context(|| format!("read {file}"))?;
        let numbers = text
            .lines()
            .any(|line| number(line, &["VERSION"]).is_some());
        ensure!(
            !numbers || table.contains_key(&file) || FOREIGN.contains(&&*file),
            "{file} numbers a format that docs/formats.md does not list"
        );
    }
    Ok(table.len())
}

/// Files and what the page says of them: the rows of its table whose second column is a source.
fn table(page: &str) -> BTreeMap<String, String> {
    page.lines()
        .filter_map(|line| {
            let mut columns = line.strip_prefix('|')?.split('|').skip(1).map(str::trim);
            let file = columns.next()?.strip_prefix('`')?.strip_suffix('`')?;
            let number = columns.next()?;
            file.ends_with(".rs")
                .then(|| (file.to_owned(), number.to_owned()))
        })
        .collect()
}

/// The number at the end of a constant of one of these names.
fn number(line: &str, names: &[&str]) -> Option<String> {
    let (before, value) = line.trim().split_once(" = ")?;
    let (_, declared) = before.split_once("const ")?;
    let (name, kind) = declared.split_once(": ")?;
    // A text that begins a format, or its number; the length of a header is neither.
    if !names.contains(&name) || kind == "usize" {
        return None;
    }
    let value = value.trim_end_matches(['"', ';']);
    // Another constant's.
    if value.contains("::") {
        return None;
    }
    let digits = value.len() - value.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    (digits > 0).then(|| value[value.len() - digits..].to_owned())
}

fn sources(project: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut directories: Vec<PathBuf> = vec!["hypervisor/src".into(), "rdma-log/src".into()];
    while let Some(directory) = directories.pop() {
        let listed = fs::read_dir(project.join(&directory));
        for entry in listed.with_context(|| format!("list {}", directory.display()))? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            if entry.path().is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                files.push(path.display().to_string());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_s_number_is_found() {
        for (line, found) in [
            ("const VERSION: u32 = 3;", Some("3")),
            ("pub(super) const VERSION: u16 = 12;", Some("12")),
            ("const TAG: &str = \"doppel-site-1\";", Some("1")),
            ("const AT_VERSION: usize = 4;", None),
            ("const HEADER: usize = 24;", None),
            ("pub const VERSION: u32 = Version::NEWEST.0;", None),
        ] {
            assert_eq!(number(line, &NAMES).as_deref(), found, "{line}");
        }
    }
}
