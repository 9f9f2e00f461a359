//! The flight recorder, as configured.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// Where the last checkpoint and the log since are kept, how many bytes that may take, and how often a checkpoint is taken.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct FlightRecorder {
    /// The directory; it is made if it is not there.
    pub directory: PathBuf,
    /// The most bytes of all its files; none chooses by the machine's memory, see [`crate::flight::Budget`].
    pub size: Option<u64>,
    /// A checkpoint at least so often, as long as the guest does anything; none takes one only when the log has grown.
    pub every: Option<Duration>,
}

impl FromStr for FlightRecorder {
    type Err = String;

    /// `DIR[,size=BYTES][,every=TIME]`, such as `recording,size=2G,every=60s`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let directory = words.next().filter(|directory| !directory.is_empty());
        let directory =
            directory.ok_or("a flight recorder needs a directory: DIR[,size=2G][,every=60s]")?;
        let mut recorder = Self {
            directory: directory.into(),
            size: None,
            every: None,
        };
        for word in words {
            match word.split_once('=') {
                Some(("size", size)) => recorder.size = Some(bytes(size)?),
                Some(("every", time)) => recorder.every = Some(duration(time)?),
                _ => {
                    return Err(format!(
                        "{word:?} is no option of a flight recorder: write size=2G or every=60s"
                    ));
                }
            }
        }
        Ok(recorder)
    }
}

impl TryFrom<String> for FlightRecorder {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Reads `4096`, `512K`, `200M`, `2G`.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(format!("{text:?} is no size: write 200M or 2G")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is no size: write 200M or 2G"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

/// Reads `5s`, `500ms`, `2m`.
///
/// # Errors
/// What is wrong with it, for people.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is no time: write 5s, 500ms or 2m"))?;
    let millis = match &text[digits.len()..] {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("{text:?} has no unit: write 5s, 500ms or 2m")),
    };
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in [
            "",
            "5",
            "s",
            "5h",
            "-1s",
            "99999999999999999999s",
            "18446744073709551615m",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_recorder_has_a_directory_and_perhaps_bounds() {
        let recorder: FlightRecorder = "a/b,size=2G,every=60s".parse().unwrap();
        assert_eq!(recorder.directory, PathBuf::from("a/b"));
        assert_eq!(recorder.size, Some(2 << 30));
        assert_eq!(recorder.every, Some(Duration::from_secs(60)));
        let plain: FlightRecorder = "a".parse().unwrap();
        assert_eq!((plain.size, plain.every), (None, None));
        for bad in [
            "",
            ",size=2G",
            "a,size=",
            "a,size=2T",
            "a,size=99999999999G",
            "a,every=3",
            "a,b",
        ] {
            assert!(bad.parse::<FlightRecorder>().is_err(), "{bad}");
        }
    }
}
