//! The guest's disk, as configured.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// The guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    /// Its image, a file or a block device; none for a machine without a disk.
    pub image: Option<PathBuf>,
    /// How the two sides of a pair have it.
    pub arrangement: Arrangement,
    /// The guest cannot write it.
    pub read_only: bool,
}

/// How the two sides of a pair have a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Arrangement {
    /// Each side has an image of its own.
    #[default]
    Replicated,
}

impl FromStr for Arrangement {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "replicated" => Ok(Self::Replicated),
            "shared" => Err(
                "a disk that both sides share needs a fence that the disk itself enforces, which is not there yet: \
                 give each side an image of its own (replicated), with the same content"
                    .into(),
            ),
            other => Err(format!("{other:?} is no arrangement of a disk: write replicated")),
        }
    }
}

impl TryFrom<String> for Arrangement {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        word.parse()
    }
}

impl FromStr for Disk {
    type Err = String;

    /// `FILE[,replicated][,read-only]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let image = words.next().filter(|image| !image.is_empty());
        let image =
            image.ok_or("a disk needs the path of its image: FILE[,replicated][,read-only]")?;
        let mut disk = Self {
            image: Some(image.into()),
            ..Self::default()
        };
        for word in words {
            match word {
                "read-only" => disk.read_only = true,
                other => disk.arrangement = other.parse()?,
            }
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_disk_is_an_image_and_words() {
        let disk = |text: &str| text.parse::<Disk>();
        let plain = disk("a/b.img").unwrap();
        assert_eq!(plain.image, Some("a/b.img".into()));
        assert!(!plain.read_only);
        assert_eq!(disk("x,replicated").unwrap(), disk("x").unwrap());
        assert!(disk("x,replicated,read-only").unwrap().read_only);
        for (text, word) in [
            ("", "path"),
            (",read-only", "path"),
            ("x,shared", "fence"),
            ("x,fast", "fast"),
            ("x,", "arrangement"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_says_the_same() {
        let config = Config::parse("[disk]\nimage = \"x\"\nread_only = true\n").unwrap();
        assert_eq!(config.disk, "x,read-only".parse().unwrap());
        let error = Config::parse("[disk]\nimage = \"x\"\narrangement = \"shared\"\n").unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("line 3") && error.contains("fence"),
            "{error}"
        );
    }
}
