//! Finding and loading `libdoppel_verbs.so`.
//!
//! Unsafe: running the library's code, which is this project's own, beside the program or named by whoever started it;
//! its table is looked at only when its version and size are right. It is never unloaded.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::Mutex;

use super::abi::{ABI, ENTRY, Entry, Table};
use super::error::RdmaError;

const FILE: &str = "libdoppel_verbs.so";
/// Names the library, and then no other is tried.
const VARIABLE: &str = "DOPPEL_VERBS";

/// Where to look, in this order. The last, without a folder, is looked for by the system.
fn places() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let mut places = Vec::new();
    if let Ok(program) = std::env::current_exe()
        && let Some(folder) = program.parent()
    {
        places.push(folder.join(FILE));
        // Tests lie one folder below what cargo builds.
        if folder.ends_with("deps")
            && let Some(above) = folder.parent()
        {
            places.push(above.join(FILE));
        }
    }
    places.push(FILE.into());
    places
}

/// The table of the library, loaded at the first call that finds it.
///
/// # Errors
/// [`RdmaError::Library`] or [`RdmaError::Version`].
pub(super) fn table() -> Result<&'static Table, RdmaError> {
    static LOADED: Mutex<Option<&'static Table>> = Mutex::new(None);
    let mut loaded = LOADED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(table) = *loaded {
        return Ok(table);
    }
    let mut tried = Vec::new();
    for path in places() {
        let alone = path.components().count() == 1;
        if !alone && !path.exists() {
            tried.push(format!("{} does not exist", path.display()));
            continue;
        }
        // SAFETY: the library's initialisers are those of libibverbs and of this project.
        let library = match unsafe { libloading::Library::new(&path) } {
            Ok(library) => Box::leak(Box::new(library)),
            Err(error) => {
                tried.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        // SAFETY: the symbol's type is part of the ABI; what it returns is checked before more is believed.
        let found = unsafe { library.get::<Entry>(ENTRY.to_bytes_with_nul()) };
        let entry = match found {
            Ok(entry) => *entry,
            Err(error) => {
                tried.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        // SAFETY: the function takes nothing and returns its table, or any that it has.
        let table = unsafe { entry() };
        *loaded = Some(check(table, &path.display().to_string())?);
        return Ok(loaded.expect("set above"));
    }
    let reason = tried.join("; ");
    Err(RdmaError::Library { reason })
}

fn check(table: *const Table, path: &str) -> Result<&'static Table, RdmaError> {
    // SAFETY: a table of any version starts with these two numbers, and lives as long as the process.
    let (abi, size) = unsafe {
        let numbers = table.cast::<u32>();
        if table.is_null() {
            (0, 0)
        } else {
            (numbers.read(), numbers.add(1).read())
        }
    };
    if abi != ABI || size as usize != size_of::<Table>() {
        return Err(RdmaError::Version {
            path: path.to_owned(),
            expected: ABI,
            found: abi,
        });
    }
    // SAFETY: of this version and size, so it is the table that this file knows.
    Ok(unsafe { &*table })
}
