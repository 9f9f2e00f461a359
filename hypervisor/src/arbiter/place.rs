//! Where an arbiter is, as configurations and command lines say it: a directory, or `etcd://HOST:PORT,…`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// How etcd's place begins.
const ETCD: &str = "etcd://";

/// The port that etcd listens at for clients.
const ETCD_PORT: u16 = 2379;

/// Where the arbiter is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Place {
    /// A directory that both sides see.
    Directory(PathBuf),
    /// The endpoints of one etcd cluster; never empty.
    Etcd(Vec<Endpoint>),
}

/// One member of an etcd cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its name or address.
    pub host: String,
    /// Its port for clients.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Why a text names no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPlace {
    /// Another scheme.
    #[error(
        "\"{0}\" is no arbiter of ours: write a directory's path, or etcd://HOST:PORT,HOST:PORT"
    )]
    Scheme(String),
    /// TLS.
    #[error(
        "\"{0}\": TLS to etcd is not there yet. Give the plain address as etcd://HOST:PORT, on a network that nobody else is on, or \
         that of a proxy on this host that speaks TLS to it"
    )]
    Tls(String),
    /// An endpoint that is none.
    #[error("\"{endpoint}\" in \"{place}\" is no endpoint: {expected}")]
    Endpoint {
        /// The whole text.
        place: String,
        /// The part.
        endpoint: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl Place {
    /// The same place, wherever the process that reads its name stands.
    #[must_use]
    pub fn absolute(&self) -> Self {
        match self {
            Self::Directory(path) => {
                Self::Directory(std::path::absolute(path).unwrap_or_else(|_| path.clone()))
            }
            Self::Etcd(_) => self.clone(),
        }
    }
}

impl FromStr for Place {
    type Err = BadPlace;

    fn from_str(text: &str) -> Result<Self, BadPlace> {
        let Some(list) = text.strip_prefix(ETCD) else {
            return match text.split_once("://") {
                Some(("etcds" | "https" | "etcd+https", _)) => Err(BadPlace::Tls(text.to_owned())),
                Some(_) => Err(BadPlace::Scheme(text.to_owned())),
                None => Ok(Self::Directory(PathBuf::from(text))),
            };
        };
        let endpoints: Result<Vec<Endpoint>, BadPlace> = list
            .split(',')
            .map(|part| {
                endpoint(part).map_err(|expected| BadPlace::Endpoint {
                    place: text.to_owned(),
                    endpoint: part.to_owned(),
                    expected,
                })
            })
            .collect();
        Ok(Self::Etcd(endpoints?))
    }
}

impl TryFrom<String> for Place {
    type Error = BadPlace;

    fn try_from(text: String) -> Result<Self, BadPlace> {
        text.parse()
    }
}

fn endpoint(text: &str) -> Result<Endpoint, &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest
                .split_once(']')
                .ok_or("an IPv6 address stands in brackets, as [::1]:2379")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err("an IPv6 address stands in brackets, as [::1]:2379");
            }
            match after {
                "" => (host, None),
                after => (
                    host,
                    Some(
                        after
                            .strip_prefix(':')
                            .ok_or("a port follows the bracket, as [::1]:2379")?,
                    ),
                ),
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || host.len() > 253 || !host.bytes().all(letter) {
        return Err("write HOST:PORT, separated by commas, without a path");
    }
    let port = match port {
        None => ETCD_PORT,
        Some(port) => match port.parse() {
            Ok(0) | Err(_) => return Err("a port is a number from 1 to 65535"),
            Ok(port) => port,
        },
    };
    Ok(Endpoint {
        host: host.to_owned(),
        port,
    })
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Etcd(endpoints) => {
                f.write_str(ETCD)?;
                for (number, endpoint) in endpoints.iter().enumerate() {
                    let comma = if number == 0 { "" } else { "," };
                    write!(f, "{comma}{endpoint}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_parse_and_print() {
        for (text, printed) in [
            ("doppel.arbiter", "doppel.arbiter"),
            ("/srv/a b/arbiter", "/srv/a b/arbiter"),
            ("etcd://one", "etcd://one:2379"),
            (
                "etcd://127.0.0.1:1,two.example:65535",
                "etcd://127.0.0.1:1,two.example:65535",
            ),
            (
                "etcd://[::1]:2380,[fe80::1]",
                "etcd://[::1]:2380,[fe80::1]:2379",
            ),
        ] {
            let place: Place = text.parse().unwrap();
            assert_eq!(place.to_string(), printed);
            assert_eq!(printed.parse::<Place>().unwrap(), place);
        }
    }

    #[test]
    fn what_is_no_place_is_refused_with_what_to_write() {
        for (text, words) in [
            ("etcd://", "HOST:PORT"),
            ("etcd://a,,b", "HOST:PORT"),
            ("etcd://a:0", "65535"),
            ("etcd://a:70000", "65535"),
            ("etcd://a:1/x", "65535"),
            ("etcd://a/x", "without a path"),
            ("etcd://[::1", "brackets"),
            ("etcd://[x]:1", "brackets"),
            ("etcd://[::1]2379", "bracket"),
            ("https://a:2379", "TLS"),
            ("etcds://a:2379", "TLS"),
            ("zk://a:2181", "etcd://HOST:PORT"),
        ] {
            let error = text.parse::<Place>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
