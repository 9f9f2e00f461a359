//! The run directory and the control sockets in it.
//!
//! ```text
//!   RUN-DIRECTORY/NAME.PID.sock     one for each role; both roles of a machine on one host are found by its name
//! ```
//! The directory is made for its owner alone, the socket can be opened by its owner alone, and who connects is asked of the kernel
//! besides: another user is refused wherever the socket lies. It gets its name by a rename, when it listens already: so a socket under
//! such a name that refuses is one that a dead process left, and can be taken away.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::{ControlError, is_name};
use crate::credentials::{call, is_believed, is_left_behind, own_user, peer_user};

/// How a control socket's name ends.
const SUFFIX: &str = ".sock";

/// Where roles are found if nothing else is said: `$XDG_RUNTIME_DIR/doppel`, or `/run/doppel`.
#[must_use]
pub fn default_run_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if Path::new(&directory).is_absolute() => {
            Path::new(&directory).join("doppel")
        }
        _ => PathBuf::from("/run/doppel"),
    }
}

/// The name of the machine and the process whose control socket this is; none if it is none.
pub(super) fn whose(path: &Path) -> Option<(&str, u32)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
    let (name, process) = stem.rsplit_once('.')?;
    is_name(name).then_some(())?;
    Some((name, process.parse().ok()?))
}

/// Where the control socket of this machine's role that is this process lies.
pub(super) fn path(directory: &Path, name: &str, process: u32) -> PathBuf {
    directory.join(format!("{name}.{process}{SUFFIX}"))
}

/// A control socket that listens, under its name.
#[derive(Debug)]
pub(super) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Asked for before the thread that listens is confined.
    owner: u32,
}

impl ControlSocket {
    /// Listens for the role of this machine that this process is, and takes away what dead processes of it left.
    pub(super) fn bind(directory: &Path, name: &str, process: u32) -> Result<Self, ControlError> {
        if !is_name(name) {
            return Err(ControlError::Name {
                name: name.to_owned(),
            });
        }
        make(directory)?;
        clear(directory, name);
        let path = path(directory, name, process);
        let failed = |source| ControlError::Socket {
            path: path.clone(),
            source,
        };
        // A process of this id that is not this one: of another namespace that shares the directory.
        match call(&path) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {}
            _ => return Err(ControlError::Busy { path }),
        }
        let aside = directory.join(format!(".{name}.{process}.new"));
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listen = || {
            let listener = UnixListener::bind(&aside)?;
            let listening = fs::set_permissions(&aside, Permissions::from_mode(0o600))
                .and_then(|()| listener.set_nonblocking(true))
                .and_then(|()| fs::rename(&aside, &path));
            if listening.is_err() {
                // The first error is the one to tell.
                let _ = fs::remove_file(&aside);
            }
            listening.map(|()| listener)
        };
        let listener = listen().map_err(failed)?;
        Ok(Self {
            listener,
            path,
            owner: own_user(),
        })
    }

    /// Who wants something, if somebody does; never waits. Another user is hung up on.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        is_of(&stream, self.owner).then_some(stream)
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // It is gone already if somebody cleaned up; either way nothing is left behind.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether the process at the other end is this user's, or root's.
fn is_of(stream: &UnixStream, owner: u32) -> bool {
    peer_user(stream).is_ok_and(|theirs| is_believed(theirs, owner))
}

/// Makes the directory, or sees that the one that is there can be trusted.
fn make(directory: &Path) -> Result<(), ControlError> {
    let failed = |source| ControlError::Directory {
        directory: directory.to_owned(),
        source,
    };
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.map_err(failed)?;
    let found = fs::metadata(directory).map_err(failed)?;
    let not_ours = |what| {
        Err(ControlError::NotOurs {
            directory: directory.to_owned(),
            what,
        })
    };
    if !is_believed(found.uid(), own_user()) {
        return not_ours("belongs to another user");
    }
    const STICKY: u32 = 0o1000;
    if found.mode() & 0o022 != 0 && found.mode() & STICKY == 0 {
        return not_ours("can be written by other users");
    }
    Ok(())
}

/// Takes away what dead processes of this machine left.
fn clear(directory: &Path, name: &str) {
    for path in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = path.path();
        if whose(&path).is_some_and(|(of, _)| of == name) && is_left_behind(&path) {
            // Another process may have been quicker.
            let _ = fs::remove_file(&path);
        }
    }
}

/// The control sockets in a directory, those of `name` alone if it is given, in order.
pub(super) fn sockets(directory: &Path, name: Option<&str>) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if whose(&path).is_some_and(|(of, _)| name.is_none_or(|name| name == of)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_its_owners_alone_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("run/doppel");
        let socket = ControlSocket::bind(&place, "kv", 77).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&place), 0o700);
        assert_eq!(mode(&place.join("kv.77.sock")), 0o600);
        assert_eq!(
            sockets(&place, Some("kv")).unwrap(),
            [place.join("kv.77.sock")]
        );
        drop(socket);
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_process_leaves_a_socket_that_is_replaced_and_a_live_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        for stale in ["kv.1.sock", "kv.2.sock", "other.3.sock"] {
            drop(UnixListener::bind(place.join(stale)).unwrap());
        }
        fs::write(place.join("notes.txt"), "not ours").unwrap();
        let live = ControlSocket::bind(place, "kv", 2).unwrap();
        assert_eq!(
            sockets(place, None).unwrap(),
            [place.join("kv.2.sock"), place.join("other.3.sock")]
        );
        let refused = ControlSocket::bind(place, "kv", 2).unwrap_err();
        assert!(
            matches!(&refused, ControlError::Busy { path } if path.ends_with("kv.2.sock")),
            "{refused}"
        );
        // Both roles of a machine.
        let both = ControlSocket::bind(place, "kv", 3).unwrap();
        assert_eq!(sockets(place, Some("kv")).unwrap().len(), 2);
        drop((live, both));
        assert!(place.join("notes.txt").exists());
    }

    #[test]
    fn a_name_that_could_leave_the_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["", "..", "../kv", "a/b", "a.b", "-a", "Ä", "a\0b"] {
            let refused = ControlSocket::bind(directory.path(), name, 1).unwrap_err();
            assert!(matches!(refused, ControlError::Name { .. }), "{refused}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        for path in [
            "kv.sock",
            "kv.x.sock",
            "../kv.1.sock2",
            ".kv.1.new",
            "a.b.1.sock",
        ] {
            assert_eq!(whose(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let refused = ControlSocket::bind(directory.path(), "kv", 1).unwrap_err();
        assert!(matches!(refused, ControlError::NotOurs { .. }), "{refused}");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).unwrap();
        ControlSocket::bind(directory.path(), "kv", 1).unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = ControlSocket::bind(&file, "kv", 1).unwrap_err();
        assert!(
            matches!(refused, ControlError::Directory { .. }),
            "{refused}"
        );
    }
}
