//! Replies on their way to a client: the buffer that the caller sends from, and the writer that commands fill it with.
use alloc::vec::Vec;

use crate::OutOfMemory;

/// A buffer that is empty and holds more than this gives its memory back.
const KEEP: usize = 64 << 10;
/// Room kept free before each command runs, so that it can always be answered with an error.
const ERROR_ROOM: usize = 128;

/// Bytes to be sent to one client: [`Session::run`](crate::Session::run) appends, the caller sends and consumes.
///
/// Its memory is not part of [`Store::used_memory`](crate::Store::used_memory).
#[derive(Debug)]
pub struct Output {
    bytes: Vec<u8>,
    sent: usize,
    bound: usize,
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

impl Output {
    /// An empty buffer; allocates nothing.
    pub const fn new() -> Self {
        Self::bounded(usize::MAX)
    }

    /// An empty buffer that never holds more than `bound` bytes to be sent. A reply that would be longer is replaced by
    /// an error: one command can ask for any number of values (MGET) or for all keys.
    ///
    /// `bound` should exceed [`Limits::output`](crate::Limits::output) by the largest value to be served.
    pub const fn bounded(bound: usize) -> Self {
        Self {
            bytes: Vec::new(),
            sent: 0,
            bound,
        }
    }

    /// What has not been sent yet.
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// How many bytes have not been sent yet.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Whether everything has been sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the first `count` pending bytes off: they have been sent.
    ///
    /// # Panics
    /// When `count` is more than is pending.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.len(), "more consumed than was pending");
        self.sent += count;
        if self.is_empty() {
            self.sent = 0;
            self.bytes.clear();
            if self.bytes.capacity() > KEEP {
                self.bytes = Vec::new();
            }
        }
    }

    /// Keeps only the first `length` pending bytes.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.bytes.truncate(self.sent + length);
    }

    /// Makes room for `additional` more bytes.
    fn reserve(&mut self, additional: usize) -> Result<(), OutOfMemory> {
        if self.len().saturating_add(additional) > self.bound {
            return Err(OutOfMemory);
        }
        if self.bytes.capacity() - self.bytes.len() >= additional {
            return Ok(());
        }
        // Moving what is left to the front is paid for by the bytes that went before it.
        if self.sent >= self.len() {
            self.bytes.copy_within(self.sent.., 0);
            self.bytes.truncate(self.bytes.len() - self.sent);
            self.sent = 0;
        }
        Ok(self.bytes.try_reserve(additional)?)
    }

    /// Appends protocol bytes. They fit: `reserve` was called.
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
}

/// Writes the reply to one command.
///
/// When memory runs out the whole reply is replaced by an error: see [`Reply::finish`].
pub(crate) struct Reply<'a> {
    out: &'a mut Output,
    start: usize,
    resp3: bool,
    lost: bool,
    errors: u64,
}

/// A place in a reply before which the length of an aggregate will be written.
#[derive(Clone, Copy)]
pub(crate) struct Mark(usize);

impl<'a> Reply<'a> {
    /// A writer at the end of `out`.
    ///
    /// # Errors
    /// When there is not even room for an error reply.
    pub(crate) fn new(out: &'a mut Output, resp3: bool) -> Result<Self, OutOfMemory> {
        out.reserve(ERROR_ROOM)?;
        Ok(Self {
            start: out.len(),
            out,
            resp3,
            lost: false,
            errors: 0,
        })
    }

    /// Ends the reply; the number of errors in it.
    pub(crate) fn finish(mut self) -> u64 {
        if self.lost {
            self.out.bytes.truncate(self.out.sent + self.start);
            self.lost = false;
            self.error(OUT_OF_MEMORY);
        }
        self.errors
    }

    /// Whether all that was written since the last [`Reply::rewind`] found room.
    pub(crate) fn check(&self) -> Result<(), OutOfMemory> {
        if self.lost { Err(OutOfMemory) } else { Ok(()) }
    }

    /// Takes back what was written since `mark`.
    pub(crate) fn rewind(&mut self, mark: Mark) {
        self.out.bytes.truncate(self.out.sent + mark.0);
        self.lost = false;
    }

    /// Chooses the protocol of what is written from here on.
    pub(crate) fn set_resp3(&mut self, resp3: bool) {
        self.resp3 = resp3;
    }

    fn write(&mut self, parts: [&[u8]; 3]) {
        if self.lost {
            return;
        }
        let length = parts
            .iter()
            .fold(0usize, |sum, part| sum.saturating_add(part.len()));
        if self.out.reserve(length).is_err() {
            self.lost = true;
            return;
        }
        for part in parts {
            self.out.push(part);
        }
    }

    fn prefixed(&mut self, prefix: u8, number: i64) {
        let mut digits = itoa::Buffer::new();
        self.write([&[prefix], digits.format(number).as_bytes(), b"\r\n"]);
    }

    /// `+text`
    pub(crate) fn simple(&mut self, text: &str) {
        self.write([b"+", text.as_bytes(), b"\r\n"]);
    }

    /// `+text`, of parts.
    pub(crate) fn simple_parts(&mut self, parts: &[&[u8]; 2]) {
        self.write([b"+", parts[0], parts[1]]);
        self.write([b"\r\n", b"", b""]);
    }

    /// `+OK`
    pub(crate) fn ok(&mut self) {
        self.write([b"+OK\r\n", b"", b""]);
    }

    /// `-text`: the text begins with its code.
    pub(crate) fn error(&mut self, text: &str) {
        self.errors += 1;
        self.write([b"-", text.as_bytes(), b"\r\n"]);
    }

    /// An error whose text is made of parts, some of which came from the client: line breaks in it become spaces, at its
    /// end they go.
    pub(crate) fn error_parts(&mut self, parts: &[&[u8]]) {
        self.errors += 1;
        self.write([b"-", b"", b""]);
        let begin = self.out.bytes.len();
        for part in parts {
            self.write([part, b"", b""]);
        }
        if !self.lost {
            while let Some(b'\r' | b'\n') = self.out.bytes.last() {
                self.out.bytes.pop();
            }
            for byte in &mut self.out.bytes[begin..] {
                if matches!(*byte, b'\r' | b'\n') {
                    *byte = b' ';
                }
            }
        }
        self.write([b"\r\n", b"", b""]);
    }

    /// `:number`
    pub(crate) fn integer(&mut self, number: i64) {
        match number {
            0 => self.write([b":0\r\n", b"", b""]),
            1 => self.write([b":1\r\n", b"", b""]),
            _ => self.prefixed(b':', number),
        }
    }

    /// A count, as an integer.
    pub(crate) fn count(&mut self, number: usize) {
        self.integer(number as i64);
    }

    /// A bulk string.
    pub(crate) fn bulk(&mut self, bytes: &[u8]) {
        self.prefixed(b'$', bytes.len() as i64);
        self.write([bytes, b"\r\n", b""]);
    }

    /// A bulk string of digits.
    pub(crate) fn bulk_number(&mut self, number: u64) {
        let mut digits = itoa::Buffer::new();
        self.bulk(digits.format(number).as_bytes());
    }

    /// Text that RESP3 marks as meant for people.
    pub(crate) fn verbatim(&mut self, text: &[u8]) {
        if self.resp3 {
            self.prefixed(b'=', text.len() as i64 + 4);
            self.write([b"txt:", text, b"\r\n"]);
        } else {
            self.bulk(text);
        }
    }

    /// Nothing.
    pub(crate) fn null(&mut self) {
        self.write([if self.resp3 { b"_\r\n" } else { b"$-1\r\n" }, b"", b""]);
    }

    /// Nothing, where an array was expected.
    pub(crate) fn null_array(&mut self) {
        self.write([if self.resp3 { b"_\r\n" } else { b"*-1\r\n" }, b"", b""]);
    }

    /// The head of an array.
    pub(crate) fn array(&mut self, length: usize) {
        self.prefixed(b'*', length as i64);
    }

    /// The head of a map of so many pairs, which RESP2 sends as a flat array.
    pub(crate) fn map(&mut self, pairs: usize) {
        if self.resp3 {
            self.prefixed(b'%', pairs as i64);
        } else {
            self.array(pairs * 2);
        }
    }

    /// The head of a set, which RESP2 sends as an array.
    pub(crate) fn set(&mut self, length: usize) {
        self.prefixed(if self.resp3 { b'~' } else { b'*' }, length as i64);
    }

    /// Remembers this place, to put the head of an array or map here when the number of elements is known.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.out.len())
    }

    /// Puts the head of an array in front of what was written since `mark`.
    pub(crate) fn array_at(&mut self, mark: Mark, length: usize) {
        self.head_at(mark, |reply| reply.array(length));
    }

    /// Puts the head of a map in front of what was written since `mark`.
    pub(crate) fn map_at(&mut self, mark: Mark, pairs: usize) {
        self.head_at(mark, |reply| reply.map(pairs));
    }

    fn head_at(&mut self, mark: Mark, head: impl FnOnce(&mut Self)) {
        let before = self.out.len();
        head(self);
        if !self.lost {
            let length = self.out.len() - before;
            let from = self.out.sent + mark.0;
            self.out.bytes[from..].rotate_right(length);
        }
    }
}

/// The answer when `maxmemory`, or the memory there is, does not allow a command.
pub(crate) const OUT_OF_MEMORY: &str = "OOM command not allowed when used memory > 'maxmemory'.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumed_bytes_make_room() {
        let mut out = Output::new();
        let mut expected = alloc::vec::Vec::new();
        let mut sent = alloc::vec::Vec::new();
        for round in 0..1000i64 {
            let mut reply = Reply::new(&mut out, false).unwrap();
            reply.integer(round);
            reply.finish();
            expected.extend_from_slice(alloc::format!(":{round}\r\n").as_bytes());
            let part = out.len() * 2 / 3;
            sent.extend_from_slice(&out.pending()[..part]);
            out.consume(part);
        }
        sent.extend_from_slice(out.pending());
        assert_eq!(sent, expected);
        assert!(out.bytes.capacity() < 4096);
    }

    #[test]
    fn heads_go_before_what_was_counted() {
        for (resp3, expected) in [
            (false, "*2\r\n*4\r\n:10\r\n:20\r\n"),
            (true, "*2\r\n%2\r\n:10\r\n:20\r\n"),
        ] {
            let mut out = Output::new();
            let mut reply = Reply::new(&mut out, resp3).unwrap();
            reply.array(2);
            let mark = reply.mark();
            reply.integer(10);
            reply.integer(20);
            reply.map_at(mark, 2);
            reply.finish();
            assert_eq!(out.pending(), expected.as_bytes());
        }
    }

    #[test]
    fn a_reply_too_large_becomes_an_error() {
        let mut out = Output::bounded(1000);
        let mut reply = Reply::new(&mut out, false).unwrap();
        reply.simple("before");
        reply.finish();
        let mut reply = Reply::new(&mut out, false).unwrap();
        reply.array(2);
        reply.bulk(&[b'x'; 500]);
        assert!(reply.check().is_ok());
        reply.bulk(&[b'x'; 500]);
        assert!(reply.check().is_err());
        reply.bulk(b"x");
        assert_eq!(reply.finish(), 1);
        assert_eq!(
            out.pending(),
            b"+before\r\n-OOM command not allowed when used memory > 'maxmemory'.\r\n"
        );
    }

    #[test]
    fn errors_stay_on_one_line() {
        let mut out = Output::new();
        let mut reply = Reply::new(&mut out, false).unwrap();
        reply.error_parts(&[b"ERR unknown '", b"a\r\nb", b"'\n\r"]);
        reply.finish();
        assert_eq!(out.pending(), b"-ERR unknown 'a  b'\r\n");
    }
}
