//! As much of RESP 2, the Redis protocol, as a client of scalar replies needs.

/// One reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply<'a> {
    /// `+OK`
    Status(&'a [u8]),
    /// `-ERR …`
    Error(&'a [u8]),
    /// `:1`
    Integer(i64),
    /// `$3 abc`
    Bulk(&'a [u8]),
    /// `$-1`
    Null,
}

/// Bytes that are no reply we could have asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadReply {
    /// Another first byte than the five above.
    #[error("a reply of unknown type {0:#04x}")]
    Type(u8),
    /// A line without an end, or a number that is none.
    #[error("a malformed reply")]
    Malformed,
    /// A length beyond what Redis allows.
    #[error("a reply of {0} bytes")]
    TooLong(i64),
}

/// The longest line: a status or an error message.
const LONGEST_LINE: usize = 64 << 10;
/// The longest value, as in Redis.
const LONGEST_BULK: i64 = 512 << 20;

/// Takes the first reply and says how many bytes it had; `None` if it has not all come.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Reply<'_>, usize)>, BadReply> {
    let Some(&kind) = bytes.first() else {
        return Ok(None);
    };
    if !b"+-:$".contains(&kind) {
        return Err(BadReply::Type(kind));
    }
    let window = &bytes[1..bytes.len().min(LONGEST_LINE)];
    let Some(length) = window.windows(2).position(|pair| pair == b"\r\n") else {
        let too_long = bytes.len() >= LONGEST_LINE;
        return if too_long {
            Err(BadReply::Malformed)
        } else {
            Ok(None)
        };
    };
    let line = &window[..length];
    let used = 1 + length + 2;
    let reply = match kind {
        b'+' => Reply::Status(line),
        b'-' => Reply::Error(line),
        b':' => Reply::Integer(number(line)?),
        _ => match number(line)? {
            -1 => Reply::Null,
            length @ 0..=LONGEST_BULK => return bulk(bytes, used, length as usize),
            length => return Err(BadReply::TooLong(length)),
        },
    };
    Ok(Some((reply, used)))
}

fn bulk(bytes: &[u8], start: usize, length: usize) -> Result<Option<(Reply<'_>, usize)>, BadReply> {
    let end = start + length;
    match bytes.get(end..end + 2) {
        None => Ok(None),
        Some(b"\r\n") => Ok(Some((Reply::Bulk(&bytes[start..end]), end + 2))),
        Some(_) => Err(BadReply::Malformed),
    }
}

fn number(line: &[u8]) -> Result<i64, BadReply> {
    std::str::from_utf8(line)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(BadReply::Malformed)
}

/// Appends a command.
pub(super) fn command(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_taken_whole_or_not_at_all() {
        let stream = b"+OK\r\n-ERR no\r\n:-7\r\n$5\r\na\r\nbc\r\n$-1\r\n$0\r\n\r\n";
        let expected = [
            Reply::Status(b"OK"),
            Reply::Error(b"ERR no"),
            Reply::Integer(-7),
            Reply::Bulk(b"a\r\nbc"),
            Reply::Null,
            Reply::Bulk(b""),
        ];
        let mut rest = &stream[..];
        for reply in expected {
            let (found, used) = parse(rest).unwrap().expect("a whole reply");
            assert_eq!(found, reply);
            for part in 0..used {
                assert_eq!(parse(&rest[..part]), Ok(None), "{part} bytes of {reply:?}");
            }
            rest = &rest[used..];
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(parse(b"*1\r\n"), Err(BadReply::Type(b'*')));
        assert_eq!(parse(b":one\r\n"), Err(BadReply::Malformed));
        assert_eq!(parse(b"$3\r\nabcde"), Err(BadReply::Malformed));
        assert_eq!(parse(b"$-2\r\n"), Err(BadReply::TooLong(-2)));
        assert_eq!(
            parse(&[b'+'; LONGEST_LINE]),
            Err(BadReply::Malformed),
            "a line without an end"
        );
    }

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut out = Vec::new();
        command(&mut out, &[b"GET", b"k"]);
        assert_eq!(out, b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n");
    }
}
