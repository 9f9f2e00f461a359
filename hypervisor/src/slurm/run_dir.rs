//! A node's run directory. It lies where every user of the node may make one, and its name can be guessed: whoever makes it first must not get the
//! role's control socket, nor have it that the job fails with a riddle.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use super::{SlurmError, failed};
use crate::credentials::own_user;

/// Makes it for this user alone. One that is there is taken if it is just that: the job was on this node before, and its keeper was killed.
///
/// # Errors
/// [`SlurmError::Taken`]; [`SlurmError::Io`].
pub(super) fn make(path: &Path) -> Result<(), SlurmError> {
    let error = match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    if error.kind() != ErrorKind::AlreadyExists {
        return Err(failed(format!("make {}", path.display()))(error));
    }
    // What has the name, not what a link leads to. Whoever owns it keeps the name: others' files are nobody's to rename where all may write.
    let found = fs::symlink_metadata(path);
    let found = found.map_err(failed(format!("look at {}", path.display())))?;
    let why = if !found.is_dir() {
        "is no directory"
    } else if found.uid() != own_user() {
        "belongs to another user"
    } else if found.mode() & 0o077 != 0 {
        "is open to other users"
    } else {
        return Ok(());
    };
    Err(SlurmError::Taken {
        path: path.to_owned(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn what_another_could_have_made_first_is_refused_and_ones_own_is_taken() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("doppel-1-a");
        let why = || match make(&path) {
            Err(SlurmError::Taken { why, .. }) => why,
            other => panic!("{other:?}"),
        };
        make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        // The job was here before.
        make(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        assert!(why().contains("open to other users"));
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        if own_user() == 0 {
            chown(&path, Some(12345), None).unwrap();
            assert!(why().contains("another user"));
        }
        fs::remove_dir(&path).unwrap();
        symlink(place.path(), &path).unwrap();
        assert!(why().contains("no directory"), "a link to one of ours");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        let said = make(&path).unwrap_err().to_string();
        assert!(said.contains("TMPDIR"), "{said}");
    }
}
