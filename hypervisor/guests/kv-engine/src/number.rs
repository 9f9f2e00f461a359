//! Numbers as Redis reads and writes them.

/// Reads a signed decimal number: no sign but a leading `-`, no leading zeros, no spaces, nothing after it.
pub(crate) fn parse_i64(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    let mut value = 0u64;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        // Nineteen digits always fit into 64 bits.
        value = value * 10 + u64::from(digit - b'0');
    }
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
}

/// Reads an amount of memory: digits and an optional unit, in which `k` is 1000 and `kb` 1024.
pub(crate) fn parse_memory(text: &[u8]) -> Option<u64> {
    let end = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit: u64 = match unit {
        b"" => 1,
        _ if unit.eq_ignore_ascii_case(b"b") => 1,
        _ if unit.eq_ignore_ascii_case(b"k") => 1000,
        _ if unit.eq_ignore_ascii_case(b"kb") => 1 << 10,
        _ if unit.eq_ignore_ascii_case(b"m") => 1_000_000,
        _ if unit.eq_ignore_ascii_case(b"mb") => 1 << 20,
        _ if unit.eq_ignore_ascii_case(b"g") => 1_000_000_000,
        _ if unit.eq_ignore_ascii_case(b"gb") => 1 << 30,
        _ => return None,
    };
    let value = core::str::from_utf8(digits).ok()?.parse::<u64>().ok()?;
    value.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_only() {
        for (text, value) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("-7", Some(-7)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("-9223372036854775809", None),
            ("99999999999999999999", None),
            ("", None),
            ("-", None),
            ("-0", None),
            ("+1", None),
            ("01", None),
            (" 1", None),
            ("1 ", None),
            ("1.0", None),
            ("0x10", None),
        ] {
            assert_eq!(parse_i64(text.as_bytes()), value, "{text:?}");
        }
    }

    #[test]
    fn memory_units() {
        for (text, value) in [
            ("0", Some(0)),
            ("12b", Some(12)),
            ("1k", Some(1000)),
            ("1KB", Some(1024)),
            ("3mb", Some(3 << 20)),
            ("2G", Some(2_000_000_000)),
            ("2gb", Some(2 << 30)),
            ("", None),
            ("kb", None),
            ("-1", None),
            ("1.5k", None),
            ("99999999999gb", None),
        ] {
            assert_eq!(parse_memory(text.as_bytes()), value, "{text:?}");
        }
    }
}
