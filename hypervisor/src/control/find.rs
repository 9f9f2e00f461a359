//! Finding roles by their control sockets, and asking them.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::place::{self, whose};
use super::status::{Role, Status};
use super::wire::{ANSWER_MAX, Answer, Ask, Outcome, Request, VERSION};
use super::{ControlError, is_name};
use crate::credentials::call;

/// How long a role may take to answer. One that is frozen does not; a busy host takes a tenth of this.
const PATIENCE: Duration = Duration::from_secs(2);

/// A role that was found.
#[derive(Debug)]
pub struct Found {
    /// The machine.
    pub name: String,
    /// The process.
    pub pid: u32,
    /// What it says, or why it does not.
    pub outcome: Result<Status, String>,
}

/// Asks every role in the directory, or those of `name` alone. Sockets that dead processes left are taken away.
///
/// # Errors
/// If the directory cannot be read; one that is not there holds no role.
pub fn roles(directory: &Path, name: Option<&str>) -> Result<Vec<Found>, ControlError> {
    if let Some(name) = name.filter(|name| !is_name(name)) {
        return Err(ControlError::Name {
            name: name.to_owned(),
        });
    }
    let sockets = match place::sockets(directory, name) {
        Ok(sockets) => sockets,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(ControlError::Directory {
                directory: directory.to_owned(),
                source,
            });
        }
    };
    // At once: several that are frozen are waited for together.
    let mut all: Vec<Found> = std::thread::scope(|scope| {
        let asked: Vec<_> = sockets
            .iter()
            .map(|path| scope.spawn(|| found(path)))
            .collect();
        asked
            .into_iter()
            .filter_map(|asked| asked.join().unwrap_or(None))
            .collect()
    });
    // Of each machine whoever serves it comes first, and last who says nothing.
    let rank = |found: &Found| match found.outcome.as_ref().map(|status| status.role) {
        Ok(Role::Primary | Role::Solo) => 0,
        Ok(Role::Backup) => 1,
        Err(_) => 2,
    };
    all.sort_by(|one, other| {
        (&one.name, rank(one), one.pid).cmp(&(&other.name, rank(other), other.pid))
    });
    Ok(all)
}

fn found(path: &Path) -> Option<Found> {
    let (name, pid) = whose(path)?;
    let outcome = match ask(path) {
        Ok(status) => Ok(status),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            // Left by a process that is dead; whoever owns it can take it away.
            let _ = fs::remove_file(path);
            return None;
        }
        // It ended meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Err(format!(
                "it has not answered for {} s: it is frozen, or its host is too busy",
                PATIENCE.as_secs()
            ))
        }
        Err(error) => Err(error.to_string()),
    };
    Some(Found {
        name: name.to_owned(),
        pid,
        outcome,
    })
}

/// Asks one role how it is.
///
/// # Errors
/// What the kernel says, or what the role says instead.
pub fn ask(path: &Path) -> io::Result<Status> {
    match exchange(path, Ask::Status)? {
        Outcome::Status(status) => Ok(*status),
        Outcome::Error(why) => Err(io::Error::other(why)),
        Outcome::Ordered(_) | Outcome::Console(_) => Err(another()),
    }
}

/// Orders something of the role whose process this is; its number among that role's orders.
///
/// # Errors
/// What the kernel says, or why the role does not do it.
pub fn order(directory: &Path, name: &str, pid: u32, what: Ask) -> io::Result<u64> {
    match exchange(&place::path(directory, name, pid), what)? {
        Outcome::Ordered(number) => Ok(number),
        Outcome::Error(why) => Err(io::Error::other(why)),
        Outcome::Status(_) | Outcome::Console(_) => Err(another()),
    }
}

/// Asks the role whose process this is how it is.
///
/// # Errors
/// As [`ask`]; of the kind `NotFound` or `ConnectionRefused` if the process is no more.
pub fn ask_process(directory: &Path, name: &str, pid: u32) -> io::Result<Status> {
    ask(&place::path(directory, name, pid))
}

/// The console of the machine that this process serves: the number of the first byte to come, and the connection that carries them,
/// from which a byte or more may have been read already.
///
/// # Errors
/// What the kernel says, or why the role shows none.
pub fn console(
    directory: &Path,
    name: &str,
    pid: u32,
    from: Option<u64>,
) -> io::Result<(u64, BufReader<UnixStream>)> {
    let mut reader = BufReader::new(request(
        &place::path(directory, name, pid),
        Ask::Console { from },
    )?);
    match answer(&mut reader)? {
        Outcome::Console(at) => Ok((at, reader)),
        Outcome::Error(why) => Err(io::Error::other(why)),
        Outcome::Status(_) | Outcome::Ordered(_) => Err(another()),
    }
}

fn another() -> io::Error {
    io::Error::other("it answers another question")
}

fn exchange(path: &Path, ask: Ask) -> io::Result<Outcome> {
    answer(&mut BufReader::new(request(path, ask)?))
}

fn request(path: &Path, ask: Ask) -> io::Result<UnixStream> {
    let mut stream = call(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = Request {
        doppel: VERSION,
        ask,
    };
    stream.write_all(&request.encode())?;
    Ok(stream)
}

/// A line, whole within this time: whoever lets it drip in holds nobody up for longer. What comes behind its end stays in the reader.
fn line(from: &mut BufReader<UnixStream>, within: Duration) -> io::Result<Vec<u8>> {
    let until = Instant::now() + within;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < ANSWER_MAX {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        from.get_ref().set_read_timeout(Some(left))?;
        let came = match from.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            came => came?,
        };
        if came.is_empty() {
            break;
        }
        let end = came.iter().position(|&byte| byte == b'\n');
        let count = end.map_or(came.len(), |at| at + 1);
        line.extend_from_slice(&came[..count]);
        from.consume(count);
    }
    Ok(line)
}

fn answer(from: &mut BufReader<UnixStream>) -> io::Result<Outcome> {
    let line = line(from, PATIENCE)?;
    if line.is_empty() {
        return Err(io::Error::new(
            ErrorKind::UnexpectedEof,
            "it hung up: it belongs to another user, is ending, or has too many clients",
        ));
    }
    let answer: Answer = serde_json::from_slice(&line).map_err(|error| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("its answer is none that this program knows ({error}); use the role's own version of doppel"),
        )
    })?;
    Ok(answer.outcome)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A process that is frozen, and was asked more often than its kernel lets callers wait: an agent, which looks twice a second, gets there.
    #[test]
    fn one_that_is_frozen_for_long_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let place = place::path(directory.path(), "kv", 7);
        let frozen = UnixListener::bind(&place).unwrap();
        while call(&place).is_ok() {}
        let found = roles(directory.path(), None).unwrap();
        assert_eq!((found.len(), found[0].pid), (1, 7));
        let why = found[0].outcome.as_ref().unwrap_err();
        assert!(why.contains("frozen"), "{why}");
        assert!(place.exists(), "it is not dead");
        drop(frozen);
        assert!(roles(directory.path(), None).unwrap().is_empty());
        assert!(!place.exists());
    }
    /// A role that a guest has broken into can say what it likes, as slowly as it likes: the agent of its host looks after others, too.
    #[test]
    fn an_answer_that_drips_in_holds_nobody_up() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let dripping = thread::spawn(move || {
            while far.write_all(b"{").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let (within, began) = (Duration::from_millis(200), Instant::now());
        let mut near = BufReader::new(near);
        let error = line(&mut near, within).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
            "{error}"
        );
        assert!(began.elapsed() >= within);
        drop(near);
        dripping.join().unwrap();

        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"one\ntwo").unwrap();
        let mut near = BufReader::new(near);
        assert_eq!(line(&mut near, within).unwrap(), b"one\n");
        assert_eq!(near.buffer(), b"two", "it is the console's");
        drop(far);
        assert_eq!(line(&mut near, within).unwrap(), b"two");
        assert!(line(&mut near, within).unwrap().is_empty());
    }
}
