//! Where `doppel prepare` reads and writes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

fn tree(directory: &Path, files: &[&str]) {
    for file in files {
        let path = directory.join(file);
        fs::create_dir_all(path.parent().expect("a directory")).expect("make");
        fs::write(path, stripped_program()).expect("write");
    }
}

/// It would be copied into itself until no path is long enough.
#[test]
fn what_is_made_of_a_directory_does_not_go_into_it() {
    let work = tempfile::tempdir().expect("a directory");
    let from = work.path().join("from");
    tree(&from, &["kernel/a"]);
    for inside in ["out", "kernel", "out/below/all"] {
        let said = modules(&from, &from.join(inside), Limits::default())
            .expect_err("inside")
            .to_string();
        assert!(said.contains("choose a directory elsewhere"), "{said}");
    }
    assert_eq!(
        fs::read_dir(&from).expect("look").count(),
        1,
        "nothing was made"
    );
    let linked = work.path().join("linked");
    symlink(&from, &linked).expect("link");
    assert!(
        apart(&linked.join("out"), &from).is_err(),
        "by another name"
    );
    assert!(apart(&work.path().join("from-out"), &from).is_ok());
    let in_place = modules(&from, &from, Limits::default()).expect("in place");
    assert_eq!(in_place.programs, 1);
    assert_eq!(fs::read_dir(from.join("kernel")).expect("look").count(), 1);
}

/// An earlier copy had links where this one has a directory and a file.
#[test]
fn what_an_earlier_copy_left_is_replaced_and_not_followed() {
    let work = tempfile::tempdir().expect("a directory");
    let [from, out, elsewhere] = ["from", "out", "elsewhere"].map(|name| work.path().join(name));
    tree(&from, &["build/file", "other"]);
    tree(&elsewhere, &["file", "other"]);
    let before = fs::read(elsewhere.join("other")).expect("read");
    fs::create_dir(&out).expect("make");
    symlink(&elsewhere, out.join("build")).expect("link");
    symlink(elsewhere.join("other"), out.join("other")).expect("link");
    modules(&from, &out, Limits::default()).expect("copied");
    for file in ["file", "other"] {
        assert!(
            fs::read(elsewhere.join(file)).expect("read") == before,
            "{file}"
        );
    }
    for file in ["build/file", "other"] {
        let made = out.join(file);
        assert!(
            fs::symlink_metadata(&made).expect("made").is_file(),
            "{file}"
        );
        assert!(fs::read(made).expect("read") == super::super::program(before.clone(), "").0);
    }
    assert_eq!(
        fs::read_dir(&out).expect("look").count(),
        2,
        "nothing is left over"
    );
}

#[test]
fn a_name_that_is_no_text_stays_as_it_is() {
    let work = tempfile::tempdir().expect("a directory");
    let name = OsStr::from_bytes(b"clock-\xff");
    fs::write(work.path().join(name), stripped_program()).expect("write");
    let made = super::super::root(work.path(), Limits::default()).expect("a root directory");
    let mut reader = cpio::Reader::new(&made.bytes);
    let entry = reader.next().expect("an archive").expect("a file");
    assert_eq!(entry.name, name.as_bytes());
    assert_eq!(made.report.files[0].rewritten(), 1);
}

/// It is refused before it is read: a file with holes may have more bytes than memory.
#[test]
fn a_file_that_is_too_large_is_refused_unread() {
    let work = tempfile::tempdir().expect("a directory");
    let from = work.path().join("from");
    tree(&from, &["small"]);
    let large = fs::File::create(from.join("large")).expect("make");
    large.set_len(1 << 42).expect("a file with a hole");
    let of = |error: PrepareError| {
        let said = error.to_string();
        assert!(
            said.contains("large: ") && said.contains("more than"),
            "{said}"
        );
    };
    of(super::super::root(&from, Limits::default()).expect_err("too large"));
    of(modules(&from, &work.path().join("out"), Limits::default()).expect_err("too large"));
}
