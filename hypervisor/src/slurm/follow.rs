//! The nodes' logs, shown as they grow: each line with its node's name.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use super::Machine;

/// How much of a log is read at once.
const AT_ONCE: u64 = 64 << 10;

/// The longest beginning of a line that is kept for its end.
const LINE_MAX: usize = 4 << 10;

/// One log.
#[derive(Debug)]
struct Followed {
    name: String,
    path: PathBuf,
    at: u64,
    /// The beginning of a line.
    begun: Vec<u8>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Logs(Vec<Followed>);

impl Logs {
    pub(super) fn of(machine: &Machine) -> Self {
        let followed = machine.nodes.iter().map(|node| Followed {
            name: node.name.clone(),
            path: machine.log_of(node),
            at: 0,
            begun: Vec::new(),
        });
        Self(followed.collect())
    }

    /// Shows what is new. A log that cannot be read now is read later: nothing hangs on it.
    pub(super) fn show(&mut self, to: &mut impl Write) -> io::Result<()> {
        for log in &mut self.0 {
            while let Some(bytes) = log.more() {
                log.begun.extend(bytes);
                log.lines(to)?;
            }
        }
        to.flush()
    }
}

impl Followed {
    fn more(&mut self) -> Option<Vec<u8>> {
        let mut file = File::open(&self.path).ok()?;
        file.seek(SeekFrom::Start(self.at)).ok()?;
        let mut bytes = Vec::new();
        file.take(AT_ONCE).read_to_end(&mut bytes).ok()?;
        self.at += bytes.len() as u64;
        (!bytes.is_empty()).then_some(bytes)
    }

    fn lines(&mut self, to: &mut impl Write) -> io::Result<()> {
        loop {
            let end = match self.begun.iter().position(|byte| *byte == b'\n') {
                Some(end) => end + 1,
                None if self.begun.len() > LINE_MAX => self.begun.len(),
                None => return Ok(()),
            };
            let line: Vec<u8> = self.begun.drain(..end).collect();
            write!(to, "{}: ", self.name)?;
            to.write_all(line.strip_suffix(b"\n").unwrap_or(&line))?;
            to.write_all(b"\n")?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(log: &mut Logs) -> String {
        let mut out = Vec::new();
        log.show(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn whole_lines_are_shown_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        let mut logs = Logs(vec![Followed {
            name: "a".into(),
            path: path.clone(),
            at: 0,
            begun: Vec::new(),
        }]);
        assert_eq!(shown(&mut logs), "");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(shown(&mut logs), "a: one\n");
        file.write_all(b"o\n\n").unwrap();
        assert_eq!(shown(&mut logs), "a: two\na: \n");
        assert_eq!(shown(&mut logs), "");
        file.write_all(&vec![b'x'; LINE_MAX + 1]).unwrap();
        assert_eq!(shown(&mut logs).len(), LINE_MAX + 1 + "a: \n".len());
    }
}
