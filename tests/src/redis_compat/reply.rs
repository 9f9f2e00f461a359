//! Replies of a RESP2 or RESP3 server, read from a stream.
use std::fmt;
use std::io::{self, BufRead, Read};

/// How much of a text is shown in a report, in bytes.
const SHOWN: usize = 300;
/// How many elements of an aggregate are shown.
const ITEMS: usize = 12;
/// Aggregates within aggregates; deeper ones are not replies.
const DEPTH: usize = 16;

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reply {
    Simple(Vec<u8>),
    Error(Vec<u8>),
    Integer(i64),
    Bulk(Vec<u8>),
    Verbatim(Vec<u8>),
    /// Nothing; with the type byte, for there are three ways to say so.
    Null(u8),
    /// An array, map or set by its type byte, a map with keys and values in turn.
    Aggregate(u8, Vec<Reply>),
}

fn bad(what: &str, line: &[u8]) -> io::Error {
    let line = String::from_utf8_lossy(line).into_owned();
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {line:?}"))
}

/// Reads a line and takes its end off.
fn line(stream: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if !line.ends_with(b"\r\n") {
        return Err(bad("a line without its end", &line));
    }
    line.truncate(line.len() - 2);
    Ok(line)
}

fn number(line: &[u8]) -> io::Result<i64> {
    let digits = std::str::from_utf8(&line[1..]).ok();
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| bad("not a number", line))
}

impl Reply {
    /// Reads the next reply.
    pub(super) fn read(stream: &mut impl BufRead) -> io::Result<Self> {
        Self::read_nested(stream, 0)
    }

    fn read_nested(stream: &mut impl BufRead, depth: usize) -> io::Result<Self> {
        let line = line(stream)?;
        let kind = *line.first().ok_or_else(|| bad("an empty line", b""))?;
        Ok(match kind {
            b'+' => Self::Simple(line[1..].to_vec()),
            b'-' => Self::Error(line[1..].to_vec()),
            b':' => Self::Integer(number(&line)?),
            b'_' => Self::Null(kind),
            b'$' | b'=' => match number(&line)? {
                -1 => Self::Null(kind),
                length => {
                    let length = usize::try_from(length).map_err(|_| bad("a length", &line))?;
                    let mut bytes = Vec::new();
                    stream.take(length as u64 + 2).read_to_end(&mut bytes)?;
                    if bytes.len() != length + 2 || !bytes.ends_with(b"\r\n") {
                        return Err(bad("a string without its end", &line));
                    }
                    bytes.truncate(length);
                    if kind == b'=' {
                        Self::Verbatim(bytes)
                    } else {
                        Self::Bulk(bytes)
                    }
                }
            },
            b'*' | b'~' | b'%' if depth < DEPTH => match number(&line)? {
                -1 => Self::Null(kind),
                length => {
                    let length = usize::try_from(length).map_err(|_| bad("a length", &line))?;
                    let count = if kind == b'%' { length * 2 } else { length };
                    let items = (0..count).map(|_| Self::read_nested(stream, depth + 1));
                    Self::Aggregate(kind, items.collect::<io::Result<_>>()?)
                }
            },
            _ => return Err(bad("not a reply", &line)),
        })
    }

    /// The elements of an aggregate; of anything else none.
    pub(super) fn items(&self) -> &[Self] {
        match self {
            Self::Aggregate(_, items) => items,
            _ => &[],
        }
    }

    /// The bytes of a string.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Simple(bytes)
            | Self::Error(bytes)
            | Self::Bulk(bytes)
            | Self::Verbatim(bytes) => bytes,
            Self::Integer(_) | Self::Null(_) | Self::Aggregate(..) => &[],
        }
    }

    /// Puts the elements of all aggregates in order.
    pub(super) fn sort(&mut self) {
        if let Self::Aggregate(_, items) = self {
            items.iter_mut().for_each(Self::sort);
            items.sort();
        }
    }

    /// Whether two replies are of one kind, and their first elements too where both have some.
    pub(super) fn same_shape(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Aggregate(kind, items), Self::Aggregate(other_kind, others)) => {
                kind == other_kind
                    && items
                        .iter()
                        .zip(others)
                        .take(1)
                        .all(|(item, other)| item.same_shape(other))
            }
            (Self::Null(kind), Self::Null(other)) => kind == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// The first of every two elements, in order: the names in a map.
    pub(super) fn names(&self) -> Vec<&Self> {
        let mut names: Vec<_> = self.items().iter().step_by(2).collect();
        names.sort();
        names
    }
}

/// Bytes as text with escapes, cut where they are many.
pub(super) fn show(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(SHOWN)];
    let more = if cut.len() < bytes.len() {
        format!("… ({} bytes)", bytes.len())
    } else {
        String::new()
    };
    format!("\"{}\"{more}", cut.escape_ascii())
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Simple(text) => write!(f, "+{}", show(text)),
            Self::Error(text) => write!(f, "-{}", show(text)),
            Self::Integer(number) => write!(f, ":{number}"),
            Self::Bulk(bytes) => write!(f, "{}", show(bytes)),
            Self::Verbatim(bytes) => write!(f, "={}", show(bytes)),
            Self::Null(kind) => write!(f, "{}nothing", char::from(*kind)),
            Self::Aggregate(kind, items) => {
                write!(f, "{}{}[", char::from(*kind), items.len())?;
                for item in items.iter().take(ITEMS) {
                    write!(f, " {item}")?;
                }
                write!(f, "{} ]", if items.len() > ITEMS { " …" } else { "" })
            }
        }
    }
}
