//! What a Linux guest has to work with, besides busybox.
//!
//! Redis is this machine's. fio and the compiler are Debian's packages, unpacked and not installed; an archive with them takes longer to
//! boot, so only the guests that use them have them.
#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::read;
use crate::lab::{self, cpio::Cpio, image, packages};

/// Programs that go into a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Kit {
    /// redis-server, redis-cli and redis-benchmark.
    #[default]
    Redis,
    /// fio. Debian's is linked against the clients of every storage there is, with 84 MB of libraries.
    Fio,
    /// tcc, with the headers of the C library, and sources to compile.
    Compiler,
}

/// Programs of this machine's, with the libraries that they need.
const REDIS: [&str; 3] = ["redis-server", "redis-cli", "redis-benchmark"];

/// What a compiler of C looks for, as far as programs of the C library alone need it.
const COMPILER: [&str; 15] = [
    "usr/bin/tcc",
    "usr/include/*.h",
    "usr/include/asm-generic",
    "usr/include/linux/*.h",
    "usr/include/x86_64-linux-gnu/asm",
    "usr/include/x86_64-linux-gnu/bits",
    "usr/include/x86_64-linux-gnu/gnu",
    "usr/include/x86_64-linux-gnu/sys",
    "usr/lib/x86_64-linux-gnu/crt1.o",
    "usr/lib/x86_64-linux-gnu/crti.o",
    "usr/lib/x86_64-linux-gnu/crtn.o",
    "usr/lib/x86_64-linux-gnu/libc.so",
    "usr/lib/x86_64-linux-gnu/libc_nonshared.a",
    "usr/lib/x86_64-linux-gnu/tcc/libtcc1.a",
    "usr/lib/x86_64-linux-gnu/tcc/include",
];

/// What is compiled.
const SOURCES: [(&str, &str); 8] = [
    ("checksum.c", include_str!("compile/checksum.c")),
    ("main.c", include_str!("compile/main.c")),
    ("parts.h", include_str!("compile/parts.h")),
    ("primes.c", include_str!("compile/primes.c")),
    ("queens.c", include_str!("compile/queens.c")),
    ("real.c", include_str!("compile/real.c")),
    ("sorted.c", include_str!("compile/sorted.c")),
    ("words.c", include_str!("compile/words.c")),
];

impl Kit {
    /// Puts it into a guest's archive.
    ///
    /// # Errors
    /// If a package cannot be had, or the archive not be written.
    pub(super) fn put<W: Write>(self, archive: &mut Cpio<W>) -> Result<()> {
        match self {
            Self::Redis => {
                let found = REDIS.map(|name| {
                    fs::canonicalize(Path::new("/usr/bin").join(name)).with_context(|| {
                        format!("{name} is not there: run scripts/install-test-tools")
                    })
                });
                let programs: Vec<PathBuf> = found.into_iter().collect::<Result<_>>()?;
                for (name, program) in REDIS.iter().zip(&programs) {
                    archive.file(&format!("usr/bin/{name}"), 0o755, &read(program)?)?;
                }
                libraries(archive, Path::new("/"), &programs)
            }
            Self::Fio => {
                let root = fio()?;
                let program = root.join("usr/bin/fio");
                archive.file("usr/bin/fio", 0o755, &read(&program)?)?;
                libraries(archive, &root, &[program])
            }
            Self::Compiler => {
                let cache = lab::cache("guest-cache+tcc")?;
                let _alone = packages::lock(&cache)?;
                let names = ["tcc", "libc6-dev", "linux-libc-dev"].map(str::to_owned);
                let root = packages::unpack(&names, &cache)?;
                for name in COMPILER {
                    match name.strip_suffix("/*.h") {
                        Some(directory) => headers(archive, &root, directory)?,
                        None => whole(archive, &root, name)?,
                    }
                }
                for (name, text) in SOURCES {
                    archive.file(&format!("compile/{name}"), 0o644, text.as_bytes())?;
                }
                // The C library names its loader as one of those that it needs, and the compiler looks for it among them.
                archive.link(
                    "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
                    "/lib64/ld-linux-x86-64.so.2",
                )?;
                libraries(archive, &root, &[])
            }
        }
    }
}

/// fio's package, unpacked, with the libraries of those that it depends on.
fn fio() -> Result<PathBuf> {
    let cache = lab::cache("guest-cache+fio")?;
    let _alone = packages::lock(&cache)?;
    let had = fs::read_to_string(cache.join("complete")).unwrap_or_default();
    let mut names: Vec<String> = had.lines().map(str::to_owned).collect();
    // apt is asked what depends on what only when nothing is there: what is there does for offline use too.
    if names.is_empty() {
        names = packages::chosen(&["fio".to_owned()], &cache)?;
        // None of the interpreters of its scripts. The C library is this machine's, as its loader is.
        names.retain(|name| name == "fio" || name.contains("lib") && !name.starts_with("libc6"));
    }
    packages::unpack(&names, &cache)
}

/// What these programs need, and what any program does.
fn libraries<W: Write>(archive: &mut Cpio<W>, root: &Path, programs: &[PathBuf]) -> Result<()> {
    let needed = match programs {
        [] => Default::default(),
        _ => image::needed(root, programs)?,
    };
    for library in image::LIBRARIES.iter().map(PathBuf::from).chain(needed) {
        let name = library
            .strip_prefix(root)
            .unwrap_or(&library)
            .display()
            .to_string();
        let name = name.trim_start_matches('/');
        if !archive.has(name) {
            archive.file(name, 0o755, &read(&library)?)?;
        }
    }
    Ok(())
}

/// The headers that lie in this directory itself.
fn headers<W: Write>(archive: &mut Cpio<W>, root: &Path, directory: &str) -> Result<()> {
    for path in packages::listing(&root.join(directory))? {
        if path.extension().is_some_and(|kind| kind == "h") {
            archive.file(&below(root, &path)?, 0o644, &read(&path)?)?;
        }
    }
    Ok(())
}

/// A file, or all that a directory holds.
fn whole<W: Write>(archive: &mut Cpio<W>, root: &Path, name: &str) -> Result<()> {
    let path = root.join(name);
    if !path.is_dir() {
        return Ok(archive.file(name, 0o755, &read(&path)?)?);
    }
    for path in packages::listing(&path)? {
        whole(archive, root, &below(root, &path)?)?;
    }
    Ok(())
}

fn below(root: &Path, path: &Path) -> Result<String> {
    let below = path.strip_prefix(root).context("a path of the packages")?;
    Ok(below.display().to_string())
}
