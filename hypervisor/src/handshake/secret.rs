//! A pair's shared secret: 32 random bytes in a file that its owner alone can read.
//!
//! ```text
//! # doppel: the secret of one pair. …
//! doppel-secret-1:<64 hex digits>:<8 hex digits: CRC-32C of the 32 bytes>
//! ```
//! The checksum tells a file that was copied badly from one that is another pair's.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::guarded::{self, SECRET, Unguarded};

const TAG: &str = "doppel-secret-1";
const BYTES: usize = 32;
/// Longest file; the comment and the line have some 200 bytes.
const FILE_MAX: u64 = 4096;

const COMMENT: &str = "# doppel: the secret of one pair. Both hosts need the same; whoever else reads it can be either side.\n\
                       # Copy it over a safe way (scp -p), keep its mode 0600, and name it by pair.secret or --secret.\n";

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It would replace another one.
    #[error(
        "{path} exists already, and a secret in use is not to be lost: remove it first, or choose another name"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("cannot write the secret {path}: {source}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be read.
    #[error(
        "cannot read the secret {path}: {source}; `doppel secret {path}` makes one, and the other side needs a copy of it"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No file: a directory, a device, a pipe.
    #[error("{path} is no regular file, so no secret is read from it")]
    NoFile {
        /// What was named.
        path: PathBuf,
    },
    /// Somebody else's.
    #[error(
        "the secret {path} belongs to user {owner}, this is user {user}: `chown {user} {path}`, or run as its owner"
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// Others can read or write it.
    #[error(
        "the secret {path} has mode {mode:04o}, so others can get at it: make a new one (`doppel secret`) if that may have \
         happened, and `chmod 600 {path}`"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// What is in it.
    #[error(
        "{path} is no doppel secret: {what}; copy it anew from the other side, or make one for both by `doppel secret FILE`"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// The secret. Its copy here is overwritten when it is dropped.
#[derive(Clone)]
pub struct Secret([u8; BYTES]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

impl Secret {
    /// These bytes, which should be random.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }

    /// Draws one.
    ///
    /// # Errors
    /// If `/dev/urandom` cannot be read.
    pub fn random() -> io::Result<Self> {
        let mut secret = Self([0; BYTES]);
        File::open("/dev/urandom")?.read_exact(&mut secret.0)?;
        Ok(secret)
    }

    /// Draws one and writes it to a new file that its owner alone can read.
    ///
    /// # Errors
    /// [`SecretError::Exists`], [`SecretError::Unwritable`]; then no file is left.
    pub fn create(path: &Path) -> Result<(), SecretError> {
        let unwritable = |source| SecretError::Unwritable {
            path: path.to_owned(),
            source,
        };
        let secret = Self::random().map_err(unwritable)?;
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let mut file = made.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => SecretError::Exists {
                path: path.to_owned(),
            },
            _ => unwritable(source),
        })?;
        let mut text = secret.armour();
        let written = file
            .write_all(COMMENT.as_bytes())
            .and_then(|()| file.write_all(text.as_bytes()))
            .and_then(|()| file.sync_all());
        zeroize::Zeroize::zeroize(&mut text);
        written.map_err(|source| {
            // Half a secret is of no use to anybody.
            let _ = std::fs::remove_file(path);
            unwritable(source)
        })
    }

    /// Reads one from a file that nobody else can read.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let mut text = guarded::read(path, SECRET, FILE_MAX).map_err(|error| {
            let path = path.to_owned();
            match error {
                Unguarded::Unreadable(source) => SecretError::Unreadable { path, source },
                Unguarded::NoFile => SecretError::NoFile { path },
                Unguarded::Owner { owner, user } => SecretError::Owner { path, owner, user },
                Unguarded::Open(mode) => SecretError::Open { path, mode },
                Unguarded::Long => SecretError::Malformed {
                    path,
                    what: "it is far too long",
                },
            }
        })?;
        let secret = Self::parse(&text);
        zeroize::Zeroize::zeroize(&mut text);
        secret.map_err(|what| SecretError::Malformed {
            path: path.to_owned(),
            what,
        })
    }

    /// The line of the file.
    fn armour(&self) -> String {
        let mut line = String::with_capacity(2 * BYTES + 32);
        line.push_str(TAG);
        line.push(':');
        for byte in self.0 {
            line.push(digit(byte >> 4));
            line.push(digit(byte & 15));
        }
        line.push_str(&format!(":{:08x}\n", rdma_log::crc32c(&self.0)));
        line
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, &'static str> {
        if text.len() as u64 > FILE_MAX {
            return Err("it is far too long");
        }
        let text = std::str::from_utf8(text).map_err(|_| "it is no text")?;
        let mut lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let line = lines.next().ok_or("there is nothing in it")?;
        if lines.next().is_some() {
            return Err("there is more than one line in it");
        }
        let mut parts = line.split(':');
        let (Some(TAG), Some(hex), Some(sum), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("its line does not begin with doppel-secret-1, or has not three parts");
        };
        let mut secret = Self([0; BYTES]);
        if hex.len() != 2 * BYTES {
            return Err("it has not 64 hexadecimal digits");
        }
        for (byte, pair) in secret.0.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let (Some(high), Some(low)) = (value(pair[0]), value(pair[1])) else {
                return Err("it has other characters than hexadecimal digits");
            };
            *byte = high << 4 | low;
        }
        if sum != format!("{:08x}", rdma_log::crc32c(&secret.0)) {
            return Err("its checksum is wrong: it was damaged or cut when it was copied");
        }
        Ok(secret)
    }
}

fn digit(value: u8) -> char {
    char::from(b"0123456789abcdef"[usize::from(value)])
}

fn value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn what_is_made_is_read_again_and_is_its_owners_alone() {
        let place = directory();
        let paths = ["one", "two"].map(|name| place.path().join(name));
        for path in &paths {
            Secret::create(path).unwrap();
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let [one, two] = paths.map(|path| Secret::read(&path).unwrap());
        assert_ne!(one.0, two.0);
        assert_ne!(one.0, [0; BYTES]);
        assert_eq!(format!("{one:?}"), "Secret(not shown)");
    }

    #[test]
    fn a_secret_in_use_is_not_lost() {
        let place = directory();
        let path = place.path().join("pair");
        Secret::create(&path).unwrap();
        let before = fs::read(&path).unwrap();
        let error = Secret::create(&path).unwrap_err();
        assert!(matches!(error, SecretError::Exists { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before);
        let error = Secret::create(&place.path().join("no/such/place")).unwrap_err();
        assert!(matches!(error, SecretError::Unwritable { .. }), "{error}");
    }

    #[test]
    fn a_file_that_others_can_get_at_is_refused_with_what_to_do() {
        let place = directory();
        let path = place.path().join("pair");
        Secret::create(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let text = Secret::read(&path).unwrap_err().to_string();
            assert!(text.contains(&format!("{mode:04o}")), "{text}");
            assert!(text.contains("chmod 600"), "{text}");
        }
        for mode in [0o600, 0o400] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            Secret::read(&path).unwrap();
        }
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let place = directory();
        let error = Secret::read(place.path()).unwrap_err();
        assert!(matches!(error, SecretError::NoFile { .. }), "{error}");
        let error = Secret::read(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(error, SecretError::NoFile { .. }), "{error}");
        let error = Secret::read(&place.path().join("nothing")).unwrap_err();
        assert!(error.to_string().contains("doppel secret"), "{error}");
    }

    #[test]
    fn only_a_whole_secret_is_one() {
        let good = Secret::from_bytes(std::array::from_fn(|i| i as u8)).armour();
        let with_comment = format!("{COMMENT}\n  {good}\n\n");
        for text in [&good, &with_comment] {
            assert_eq!(Secret::parse(text.as_bytes()).unwrap().0[31], 31);
        }
        let line = good.trim_end();
        for (text, what) in [
            (String::new(), "nothing"),
            (COMMENT.into(), "nothing"),
            (format!("{good}{good}"), "more than one"),
            (line.replace("secret-1", "secret-2"), "begin"),
            (line[..line.len() - 9].into(), "three parts"),
            (format!("{line}:"), "three parts"),
            (line.replacen("00", "", 1), "64"),
            (line.replacen("00", "0g", 1), "other characters"),
            (line.replacen("00", "0A", 1), "other characters"),
            (line.replacen("00", "01", 1), "checksum"),
            ("x".repeat(5000), "too long"),
        ] {
            let found = Secret::parse(text.as_bytes()).unwrap_err();
            assert!(found.contains(what), "{text:?}: {found}");
        }
        assert!(Secret::parse(&[0xff, 0xfe]).is_err());
    }
}
