//! A host of the lab in which this very program shows a promise: where that needs what this machine does not have.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rdma_log::verbs::Verbs;
use serde_json::Value;

use super::{built, program};
use crate::lab::wire::Start;
use crate::lab::{Host, Lab, Spec, image};
use crate::promise::{Form, Run};

/// For copying programs into a host that is emulated on a busy machine.
const BRING_WITHIN: Duration = Duration::from_secs(120);

/// Of the host: room for a Linux guest and the log of it.
const MEMORY_MIB: u32 = 2048;

/// Where the verbs' library lies in a host: beside the programs.
const VERBS: &str = "/usr/bin/libdoppel_verbs.so";

/// Whether this machine can carry a ring by RDMA.
#[must_use]
pub fn has_rdma() -> bool {
    Verbs::load()
        .and_then(|verbs| verbs.devices())
        .is_ok_and(|devices| !devices.is_empty())
}

/// One host, with the programs that a promise needs.
#[derive(Debug)]
pub struct Inside {
    lab: Lab,
}

impl Inside {
    /// Boots it.
    ///
    /// # Errors
    /// If there is no lab, or something for it is not built.
    pub fn boot(name: &str) -> Result<Self> {
        let programs = [
            program::doppel()?,
            program::beside("prove")?,
            program::beside("victim")?,
            built::verbs()?,
        ];
        let lab = Lab::own(&Spec {
            name: name.into(),
            hosts: 1,
            memory_mib: MEMORY_MIB,
            ..Spec::default()
        })?;
        let inside = Self { lab };
        inside.bring(&programs)?;
        Ok(inside)
    }

    /// Brings programs into the host, below their own names.
    ///
    /// # Errors
    /// If they cannot be read, or the host has no room.
    pub fn bring(&self, programs: &[PathBuf]) -> Result<()> {
        for program in programs {
            self.lab.share_program(program)?;
        }
        let copy = "mv /shared/bin/* /usr/bin/";
        self.host().sh(copy, BRING_WITHIN).map(drop)
    }

    /// Brings programs of this machine's into the host with those of their libraries that it lacks.
    ///
    /// # Errors
    /// As [`Inside::bring`], and if a library is not to be found.
    pub fn bring_with_libraries(&self, programs: &[PathBuf]) -> Result<()> {
        let to = self.shared().join("lib");
        fs::create_dir_all(&to).context("make a directory")?;
        for library in image::needed(Path::new("/"), programs)? {
            let name = library.file_name().context("a library's name")?;
            fs::copy(&library, to.join(name))
                .with_context(|| format!("share {}", library.display()))?;
        }
        self.bring(programs)?;
        let copy = "for file in /shared/lib/*; do name=${file##*/}
[ -e /usr/lib/x86_64-linux-gnu/$name ] || cp $file /usr/lib/x86_64-linux-gnu/; done";
        self.host().sh(copy, BRING_WITHIN).map(drop)
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> Host<'_> {
        self.lab.host("h1")
    }

    /// The directory that the host sees as `/shared`.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.lab.shared()
    }

    /// Runs tests of libtest's in it, over the host's RDMA device: what they printed. The code must be 0.
    ///
    /// # Errors
    /// If they fail, or the time is up.
    pub fn tests(&self, words: &[&str], longest: Duration) -> Result<String> {
        let start = Start {
            environment: vec![("DOPPEL_VERBS".into(), VERBS.into())],
            ..Start::new(words)
        };
        let ended = self.host().session(&start)?.finish(longest)?;
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        ensure!(
            ended.code == 0,
            "{words:?} ended with code {}: {said}{}",
            ended.code,
            String::from_utf8_lossy(&ended.stderr)
        );
        Ok(said)
    }

    /// Shows a promise in it: its figures.
    ///
    /// # Errors
    /// What does not hold there.
    pub fn prove(&self, name: &str, run: &Run, form: Form, longest: Duration) -> Result<Value> {
        let (form, seed) = (format!("--{}", form.name()), run.seed.to_string());
        let words = ["prove", name, &form, "--seed", &seed, "--json"];
        let ended = self.host().run(&words, longest)?;
        let said = String::from_utf8_lossy(&ended.stdout);
        let errors = String::from_utf8_lossy(&ended.stderr);
        let told: Value = said
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok())
            .with_context(|| format!("{name}, code {}: {said}{errors}", ended.code))?;
        ensure!(
            ended.code == 0 && told["holds"] == true,
            "{name} does not hold in a host of the lab: {}",
            told["error"].as_str().unwrap_or("it does not say why")
        );
        Ok(told)
    }
}
