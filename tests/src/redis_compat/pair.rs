//! Two servers that are sent the same and must answer the same.
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::reply::{Reply, show};
use super::{CompatError, Difference};

/// How long a server may take for one answer: a slow guest in a slow emulator gets this.
const PATIENCE: Duration = Duration::from_secs(30);

/// How two answers are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Equal.
    Exact,
    /// Numbers that differ by no more than this; anything else equal.
    Within(i64),
    /// Equal but for the order of elements.
    Unordered,
    /// Of one kind.
    Shape,
    /// Maps with the same names; or texts with the same names before a colon or an equals sign.
    Names,
}

/// A connection to one of the servers.
struct Link {
    server: &'static str,
    stream: BufReader<TcpStream>,
}

impl Link {
    fn open(server: &'static str, address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            server,
            stream: BufReader::with_capacity(1 << 16, stream),
        })
    }

    /// Sends `chunks` and meanwhile reads with `read`, so that neither side waits for the other for ever.
    fn exchange<T>(
        &mut self,
        chunks: &[&[u8]],
        end: bool,
        read: impl FnOnce(&mut BufReader<TcpStream>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut writer = self.stream.get_ref().try_clone()?;
        let mut send = move || {
            chunks
                .iter()
                .try_for_each(|chunk| writer.write_all(chunk))?;
            if end {
                writer.shutdown(Shutdown::Write)
            } else {
                Ok(())
            }
        };
        if chunks.iter().map(|chunk| chunk.len()).sum::<usize>() < 4096 {
            send()?;
            return read(&mut self.stream);
        }
        thread::scope(|scope| {
            let sender = scope.spawn(send);
            let result = read(&mut self.stream);
            let sent = sender
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the sender panicked")));
            // A server that closes the connection early makes sending fail; what it answered counts.
            if end {
                result
            } else {
                result.and_then(|result| sent.map(|()| result))
            }
        })
    }
}

/// The reference and the subject, in the middle of a script.
pub(super) struct Pair {
    servers: [(&'static str, SocketAddr); 2],
    links: Vec<[Link; 2]>,
    active: usize,
    script: String,
    answers: usize,
    differences: Vec<Difference>,
}

/// A command as a RESP array.
pub(super) fn encode<T: AsRef<[u8]>>(words: &[T]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        let word = word.as_ref();
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

fn show_words<T: AsRef<[u8]>>(words: &[T]) -> String {
    let words: Vec<_> = words.iter().map(|word| show(word.as_ref())).collect();
    words.join(" ")
}

impl Pair {
    /// Connects to both and empties them.
    pub(super) fn new(
        reference: SocketAddr,
        subject: SocketAddr,
        script: &str,
    ) -> Result<Self, CompatError> {
        let mut pair = Self {
            servers: [("reference", reference), ("subject", subject)],
            links: Vec::new(),
            active: 0,
            script: script.to_owned(),
            answers: 0,
            differences: Vec::new(),
        };
        pair.connect()?;
        pair.command(&["FLUSHALL"])?;
        Ok(pair)
    }

    /// The number of answers, and the differences among them.
    pub(super) fn finish(mut self) -> Result<(usize, Vec<Difference>), CompatError> {
        self.command(&["FLUSHALL"])?;
        Ok((self.answers, self.differences))
    }

    /// Whether any answer was different.
    pub(super) fn differs(&self) -> bool {
        !self.differences.is_empty()
    }

    /// Opens one more connection to each and uses it from here on; its number.
    pub(super) fn connect(&mut self) -> Result<usize, CompatError> {
        let open = |(server, address)| {
            Link::open(server, address).map_err(|source| CompatError::Io {
                server,
                script: self.script.clone(),
                request: format!("connecting to {address}"),
                source,
            })
        };
        let [reference, subject] = self.servers;
        let links = [open(reference)?, open(subject)?];
        self.links.push(links);
        self.active = self.links.len() - 1;
        Ok(self.active)
    }

    /// Uses the connections of this number from here on.
    pub(super) fn switch(&mut self, connection: usize) {
        self.active = connection;
    }

    /// Does the same with both connections, the reference's first.
    fn both<T>(
        &mut self,
        request: &str,
        mut act: impl FnMut(&mut Link) -> io::Result<T>,
    ) -> Result<[T; 2], CompatError> {
        let script = &self.script;
        let mut act = |link: &mut Link| {
            act(link).map_err(|source| CompatError::Io {
                server: link.server,
                script: script.clone(),
                request: request.to_owned(),
                source,
            })
        };
        let [reference, subject] = &mut self.links[self.active];
        Ok([act(reference)?, act(subject)?])
    }

    fn judge(&mut self, how: How, request: &str, [expected, found]: [&Reply; 2]) {
        self.answers += 1;
        if !agree(how, expected, found) {
            self.differences.push(Difference {
                script: self.script.clone(),
                request: request.to_owned(),
                expected: expected.to_string(),
                found: found.to_string(),
            });
        }
    }

    /// Sends one command and compares the answers; gives them.
    pub(super) fn compare<T: AsRef<[u8]>>(
        &mut self,
        how: How,
        words: &[T],
    ) -> Result<[Reply; 2], CompatError> {
        let (request, shown) = (encode(words), show_words(words));
        let replies = self.both(&shown, |link| {
            link.exchange(&[&request], false, Reply::read)
        })?;
        self.judge(how, &shown, [&replies[0], &replies[1]]);
        Ok(replies)
    }

    /// Sends one command and expects equal answers.
    pub(super) fn command<T: AsRef<[u8]>>(&mut self, words: &[T]) -> Result<(), CompatError> {
        self.compare(How::Exact, words).map(drop)
    }

    /// Sends commands all at once, the bytes cut into `chunks`, and expects equal answers.
    pub(super) fn pipeline(
        &mut self,
        commands: &[Vec<Vec<u8>>],
        chunks: impl Fn(&[u8]) -> Vec<usize>,
    ) -> Result<(), CompatError> {
        let bytes: Vec<u8> = commands.iter().flat_map(|words| encode(words)).collect();
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        for length in chunks(&bytes) {
            let (piece, after) = rest.split_at(length.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        let shown = format!("a pipeline of {} commands", commands.len());
        let [expected, found] = self.both(&shown, |link| {
            link.exchange(&pieces, false, |stream| {
                commands
                    .iter()
                    .map(|_| Reply::read(stream))
                    .collect::<io::Result<Vec<_>>>()
            })
        })?;
        for (words, replies) in commands.iter().zip(expected.iter().zip(&found)) {
            self.judge(How::Exact, &show_words(words), [replies.0, replies.1]);
        }
        Ok(())
    }

    /// Sends raw bytes over new connections, ends them, and compares all that comes back.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> Result<(), CompatError> {
        let before = self.active;
        let connection = self.connect()?;
        let replies = self.both(&show(bytes), |link| {
            link.exchange(&[bytes], true, |stream| {
                let mut all = Vec::new();
                match stream.read_to_end(&mut all) {
                    // Closing with unread input resets the connection; what was answered before counts.
                    Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
                    _ => Ok(Reply::Bulk(all)),
                }
            })
        })?;
        self.judge(How::Exact, &show(bytes), [&replies[0], &replies[1]]);
        self.links.truncate(connection);
        self.switch(before);
        Ok(())
    }

    /// Sends each server a command of its own and expects equal answers.
    pub(super) fn each(&mut self, commands: &[Vec<Vec<u8>>; 2]) -> Result<(), CompatError> {
        let mut commands = commands.iter();
        let shown = "a command for each";
        let replies = self.both(shown, |link| {
            let words = commands.next().ok_or(io::ErrorKind::InvalidInput)?;
            link.exchange(&[&encode(words)], false, Reply::read)
        })?;
        self.judge(How::Exact, shown, [&replies[0], &replies[1]]);
        Ok(())
    }

    /// Sends a command that is answered by a text of names and values; the subject may leave some out.
    pub(super) fn subset(&mut self, words: &[&str]) -> Result<(), CompatError> {
        let (request, shown) = (encode(words), words.join(" "));
        let [expected, found] = self.both(&shown, |link| {
            link.exchange(&[&request], false, Reply::read)
        })?;
        let known = text_names(expected.bytes());
        let unknown: Vec<_> = text_names(found.bytes())
            .into_iter()
            .filter(|name| !known.contains(name))
            .map(|name| show(&name))
            .collect();
        self.answers += 1;
        if found.bytes().is_empty() || !unknown.is_empty() {
            self.differences.push(Difference {
                script: self.script.clone(),
                request: shown,
                expected: "names that Redis knows".to_owned(),
                found: unknown.join(" "),
            });
        }
        Ok(())
    }

    /// Waits until neither server has the key any more.
    pub(super) fn wait_until_gone(&mut self, key: &str) -> Result<(), CompatError> {
        let request = encode(&["EXISTS", key]);
        self.both(&format!("waiting until {key} is gone"), |link| {
            let start = Instant::now();
            while link.exchange(&[&request], false, Reply::read)? != Reply::Integer(0) {
                if start.elapsed() > PATIENCE {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Sends the commands of a script, one a line. Words may be quoted, with the escapes of Rust strings. A first word tells
    /// how answers are compared, if not exactly: `~N` within N, `%` unordered, `?` shape, `#` names.
    pub(super) fn script(&mut self, script: &str) -> Result<(), CompatError> {
        for line in script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let mut words = split(line);
            let how = match words.first().map(Vec::as_slice) {
                Some(b"%") => How::Unordered,
                Some(b"?") => How::Shape,
                Some(b"#") => How::Names,
                Some([b'~', digits @ ..]) => {
                    let digits = std::str::from_utf8(digits).unwrap_or_default();
                    How::Within(digits.parse().unwrap_or(0))
                }
                _ => How::Exact,
            };
            if how != How::Exact {
                words.remove(0);
            }
            self.compare(how, &words)?;
        }
        Ok(())
    }
}

/// Splits a line of a script into words.
fn split(line: &str) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut bytes = line.bytes().peekable();
    while bytes.peek().is_some() {
        if bytes.next_if_eq(&b' ').is_some() {
            continue;
        }
        let mut word = Vec::new();
        let quoted = bytes.next_if_eq(&b'"').is_some();
        while let Some(byte) = bytes.next_if(|&byte| byte != if quoted { b'"' } else { b' ' }) {
            word.push(match byte {
                b'\\' if quoted => match bytes.next() {
                    Some(b'n') => b'\n',
                    Some(b'r') => b'\r',
                    Some(b'x') => {
                        let mut digit = || {
                            let digit = bytes.next().map(char::from);
                            digit.and_then(|digit| digit.to_digit(16)).unwrap_or(0) as u8
                        };
                        digit() << 4 | digit()
                    }
                    other => other.unwrap_or(b'\\'),
                },
                other => other,
            });
        }
        if quoted {
            bytes.next();
        }
        words.push(word);
    }
    words
}

/// The names in a text of lines or words with values.
fn text_names(text: &[u8]) -> Vec<Vec<u8>> {
    let ends = |byte: &u8| byte.is_ascii_whitespace();
    let is_value = |byte: &u8| matches!(byte, b':' | b'=');
    let words = text.split(ends).filter(|word| word.iter().any(is_value));
    let mut names: Vec<_> = words
        .filter_map(|word| word.split(is_value).next())
        .map(<[u8]>::to_vec)
        .collect();
    names.sort();
    names
}

fn agree(how: How, expected: &Reply, found: &Reply) -> bool {
    match (how, expected, found) {
        (How::Within(most), Reply::Integer(expected), Reply::Integer(found)) => {
            expected.abs_diff(*found) <= most.unsigned_abs()
        }
        (How::Exact | How::Within(_), ..) => expected == found,
        (How::Unordered, ..) => {
            let (mut expected, mut found) = (expected.clone(), found.clone());
            expected.sort();
            found.sort();
            expected == found
        }
        (How::Shape, ..) => expected.same_shape(found),
        (How::Names, Reply::Bulk(expected), Reply::Bulk(found))
        | (How::Names, Reply::Verbatim(expected), Reply::Verbatim(found)) => {
            text_names(expected) == text_names(found)
        }
        (How::Names, ..) => expected.same_shape(found) && expected.names() == found.names(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_escapes() {
        assert_eq!(
            split(r#"SET "" "a b\r\n\x00\"" c"#),
            [&b"SET"[..], b"", b"a b\r\n\0\"", b"c"]
        );
    }

    #[test]
    fn agreement_is_as_strict_as_asked() {
        let (a, b) = (Reply::Integer(10), Reply::Integer(12));
        assert!(!agree(How::Exact, &a, &b));
        assert!(agree(How::Within(2), &a, &b));
        assert!(!agree(How::Within(1), &a, &b));
        assert!(agree(How::Shape, &a, &b));
        assert!(!agree(How::Shape, &a, &Reply::Null(b'$')));
        assert!(!agree(How::Shape, &Reply::Null(b'*'), &Reply::Null(b'$')));
        let array = |items: &[Reply]| Reply::Aggregate(b'*', items.to_vec());
        let ab = array(&[a.clone(), b.clone()]);
        let ba = array(&[b.clone(), a.clone()]);
        assert!(agree(How::Unordered, &ab, &ba));
        assert!(!agree(How::Exact, &ab, &ba));
        assert!(!agree(How::Names, &ab, &ba));
        assert!(agree(How::Names, &ab, &array(&[a.clone(), a])));
        assert!(agree(
            How::Names,
            &Reply::Bulk(b"x:1\r\ny:2".to_vec()),
            &Reply::Bulk(b"y:3 x:4".to_vec())
        ));
    }
}
