//! Figures as people read them.

use hypervisor::devices::Purpose;
use hypervisor::machine::Exits;
use serde_json::{Map, Value};

/// How many exits were for what, for programs.
pub fn exits(exits: &Exits) -> Map<String, Value> {
    let named = |(purpose, count): (Purpose, u64)| (purpose.name().to_owned(), count.into());
    exits.kinds().map(named).collect()
}

/// `1,234,567`.
pub fn count(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1.20 µs`, `3.4 ms`, `1.5 s`.
pub fn micros(micros: f64) -> String {
    match micros {
        value if value < 10.0 => format!("{value:.2} µs"),
        value if value < 1000.0 => format!("{value:.1} µs"),
        value if value < 1_000_000.0 => format!("{:.2} ms", value / 1e3),
        value => format!("{:.1} s", value / 1e6),
    }
}

/// `900 B`, `1.2 KiB`, `3.4 MiB`.
pub fn bytes(bytes: f64) -> String {
    match bytes {
        value if value < 1024.0 => format!("{value:.0} B"),
        value if value < 1024.0 * 1024.0 => format!("{:.1} KiB", value / 1024.0),
        value => format!("{:.1} MiB", value / (1024.0 * 1024.0)),
    }
}

/// `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`.
pub fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..10 => format!("{}.{} s", seconds, millis % 1000 / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// The time of day, UTC.
pub fn time_of_day(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds % 3600 / 60,
        seconds % 60,
        unix_ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(count(1_234_567.0), "1,234,567");
        assert_eq!(count(999.6), "1,000");
        assert_eq!(count(0.0), "0");
        assert_eq!(micros(1.2), "1.20 µs");
        assert_eq!(micros(3400.0), "3.40 ms");
        assert_eq!(bytes(1536.0), "1.5 KiB");
        assert_eq!(span(400), "0.4 s");
        assert_eq!(span(185_000), "3 min 5 s");
        assert_eq!(span(90_061_000), "1 d 1 h");
        assert_eq!(time_of_day(86_400_000 + 3_661_007), "01:01:01.007");
    }
}
