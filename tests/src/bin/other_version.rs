//! `doppel` as a release of other versions would be: all that it says to a peer and all that it writes for one is in these. Started by
//! the tests as `other_version OLDEST NEWEST COMMAND …`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result};
use hypervisor::version::{Version, Versions};

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let mut number = || -> Result<Version> {
        let word = arguments.next().and_then(|word| word.into_string().ok());
        let word = word.context("usage: other_version OLDEST NEWEST COMMAND …")?;
        Ok(Version(word.parse().context("a version is a number")?))
    };
    let versions = Versions::new(number()?, number()?).context("these are no range")?;
    let words = std::iter::once(OsString::from("doppel")).chain(arguments);
    Ok(hypervisor::cli::run(words, versions))
}
