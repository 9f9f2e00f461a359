//! Finding and loading `libdoppel_verbs.so`.
//!
//! Unsafe: running the library's code, which is this project's own, beside the program or named by whoever started it;
//! its table is looked at only when its version and size are right. It is never unloaded.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::Mutex;

use crate::locks::lock;

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
    let mut loaded = lock(&LOADED);
    if let Some(table) = *loaded {
        return Ok(table);
    }
    let table = find(places())?;
    *loaded = Some(table);
    Ok(table)
}

fn find(places: Vec<PathBuf>) -> Result<&'static Table, RdmaError> {
    let mut tried = Vec::new();
    for path in places {
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
        return check(table, &path.display().to_string());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_or_something_else_is_named_with_what_to_do() {
        let error = find(vec![
            "/nowhere/libdoppel_verbs.so".into(),
            "libc.so.6".into(),
        ]);
        let text = error.unwrap_err().to_string();
        for part in [
            "/nowhere/libdoppel_verbs.so does not exist",
            "libc.so.6: ",
            "libibverbs1",
            "DOPPEL_VERBS",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_table_of_another_version_is_refused_before_it_is_used() {
        for (numbers, ours) in [
            ([ABI + 1, size_of::<Table>() as u32], false),
            ([ABI, size_of::<Table>() as u32 + 8], false),
            ([0, 0], false),
        ] {
            let numbers: &'static [u32; 2] = Box::leak(Box::new(numbers));
            let found = check(numbers.as_ptr().cast(), "a library");
            assert_eq!(found.is_ok(), ours);
        }
        let refused = check(std::ptr::null(), "a library");
        assert!(matches!(refused, Err(RdmaError::Version { found: 0, .. })));
    }
}
