//! Glob patterns with the meaning Redis gives them, its corner cases included.
//!
//! `*` any bytes, `?` one byte, `[a-z]` a class (`^` negates, ranges may be written backwards), `\` takes the next
//! byte literally. A class without an end is closed by the end of the pattern. Bytes in a range compare signed, as
//! C's `char` does on x86.

/// Whether the whole of `text` matches `pattern`. Takes time in proportion to the product of the lengths, and no stack.
pub(crate) fn matches(pattern: &[u8], text: &[u8], ignore_case: bool) -> bool {
    // Redis never lets a pattern, not even `*`, match an empty text, except the empty one.
    if text.is_empty() {
        return pattern.is_empty();
    }
    let (mut at, mut read) = (0, 0);
    // Where the last star stands and from where its rest was tried: only the last one need ever be reconsidered.
    let mut star: Option<(usize, usize)> = None;
    while read < text.len() {
        if pattern.get(at) == Some(&b'*') {
            while pattern.get(at) == Some(&b'*') {
                at += 1;
            }
            if at == pattern.len() {
                return true;
            }
            star = Some((at, read));
            continue;
        }
        match pattern
            .get(at)
            .and_then(|_| one(pattern, at, text[read], ignore_case))
        {
            Some(next) => {
                at = next;
                read += 1;
            }
            None => match &mut star {
                Some((rest, from)) => {
                    *from += 1;
                    (at, read) = (*rest, *from);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

/// Matches one byte against the element of the pattern at `at`, not a star; the place after it when it fits.
fn one(pattern: &[u8], at: usize, byte: u8, ignore_case: bool) -> Option<usize> {
    let fold = |byte: u8| {
        if ignore_case {
            byte.to_ascii_lowercase()
        } else {
            byte
        }
    };
    match pattern[at] {
        b'?' => Some(at + 1),
        b'[' => {
            let (inside, next) = class(pattern, at + 1, byte, ignore_case);
            inside.then_some(next)
        }
        b'\\' if at + 1 < pattern.len() => (fold(pattern[at + 1]) == fold(byte)).then_some(at + 2),
        literal => (fold(literal) == fold(byte)).then_some(at + 1),
    }
}

/// Whether the class whose inside begins at `at` holds `byte`, and the place after the class.
fn class(pattern: &[u8], mut at: usize, byte: u8, ignore_case: bool) -> (bool, usize) {
    let negated = pattern.get(at) == Some(&b'^');
    if negated {
        at += 1;
    }
    let fold = |byte: u8| {
        if ignore_case {
            byte.to_ascii_lowercase()
        } else {
            byte
        }
    };
    let mut inside = false;
    loop {
        match pattern[at.min(pattern.len())..] {
            [] => return (inside != negated, at),
            [b'\\', literal, ..] => {
                inside |= literal == byte;
                at += 2;
            }
            [b']', ..] => return (inside != negated, at + 1),
            [low, b'-', high, ..] => {
                let (low, high) = if (low as i8) <= (high as i8) {
                    (low, high)
                } else {
                    (high, low)
                };
                let range = fold(low) as i8..=fold(high) as i8;
                inside |= range.contains(&(fold(byte) as i8));
                at += 3;
            }
            [literal, ..] => {
                inside |= fold(literal) == fold(byte);
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_redis() {
        for (pattern, text, expected) in [
            ("*", "anything", true),
            ("", "", true),
            ("*", "", false),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h*llo", "hllo", true),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-c]llo", "hbllo", true),
            ("h[c-a]llo", "hbllo", true),
            ("h[a-c]llo", "hdllo", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("[\\]]", "]", true),
            ("[]", "a", false),
            ("[^]", "a", true),
            ("[abc", "c", true),
            ("[a-", "-", true),
            ("[a-]", "]", true),
            ("[a-]", "z", false),
            ("[", "[", false),
            ("[^", "x", true),
            ("x\\", "x\\", true),
            ("a*b*c", "aXXbYYc", true),
            ("a*b*c", "aXXbYYcd", false),
            ("a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaa", false),
            ("**a", "ba", true),
            ("a**", "a", true),
            ("*?", "a", true),
            ("*?*", "a", true),
            ("*??", "a", false),
            ("*a", "b", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes(), false),
                expected,
                "{pattern:?} on {text:?}"
            );
        }
        assert!(matches(b"MAX[A-M]*", b"maxmemory", true));
        assert!(!matches(b"MAX*", b"maxmemory", false));
    }
}
