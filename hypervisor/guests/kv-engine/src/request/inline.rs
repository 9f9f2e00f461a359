//! Inline commands: a line of words, for people who type.
use alloc::vec::Vec;

/// Why a line cannot be split.
pub(super) enum Unbalanced {
    /// A quote is not closed, or something follows right after it.
    Quotes,
    /// There is no memory for a word.
    Memory,
}

/// The words of an inline command, quoted as in a shell of sorts.
pub(super) struct Words<'a> {
    line: &'a [u8],
    at: usize,
}

impl<'a> Words<'a> {
    pub(super) fn new(line: &'a [u8]) -> Self {
        Self { line, at: 0 }
    }

    /// Appends the next word to `word`; whether there was one.
    pub(super) fn next(&mut self, word: &mut Vec<u8>) -> Result<bool, Unbalanced> {
        let is_space = |byte: u8| matches!(byte, b' ' | b'\t'..=b'\r');
        while self.line.get(self.at).is_some_and(|&byte| is_space(byte)) {
            self.at += 1;
        }
        if self.at == self.line.len() {
            return Ok(false);
        }
        let mut quote = None;
        while let Some(&byte) = self.line.get(self.at) {
            self.at += 1;
            let rest = &self.line[self.at..];
            let (value, skip) = match (quote, byte) {
                (Some(b'"'), b'\\') => match rest {
                    [b'x', high, low, ..] => match (hex(*high), hex(*low)) {
                        (Some(high), Some(low)) => (high << 4 | low, 3),
                        _ => (b'x', 1),
                    },
                    [escaped, ..] => (unescape(*escaped), 1),
                    [] => (byte, 0),
                },
                (Some(b'\''), b'\\') if rest.first() == Some(&b'\'') => (b'\'', 1),
                (Some(open), _) if byte == open => {
                    // A closing quote ends the word, and must be followed by a space or nothing.
                    return if rest.first().is_none_or(|&byte| is_space(byte)) {
                        Ok(true)
                    } else {
                        Err(Unbalanced::Quotes)
                    };
                }
                (None, b' ' | b'\n' | b'\r' | b'\t') => return Ok(true),
                (None, b'"' | b'\'') => {
                    quote = Some(byte);
                    continue;
                }
                _ => (byte, 0),
            };
            word.try_reserve(1).map_err(|_| Unbalanced::Memory)?;
            word.push(value);
            self.at += skip;
        }
        if quote.is_some() {
            Err(Unbalanced::Quotes)
        } else {
            Ok(true)
        }
    }
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}
