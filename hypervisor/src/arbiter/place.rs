//! Where an arbiter is, as configurations and command lines say it: a directory, `etcd://HOST:PORT,…`, or over TLS
//! `etcds://HOST:PORT,…?ca=FILE&cert=FILE&key=FILE`.
//!
//! | word | what |
//! | --- | --- |
//! | `ca` | the authorities that etcd's certificates are issued by; must be there |
//! | `cert`, `key` | what this client shows, if etcd runs with `--client-cert-auth`: both or neither |
//! | `user`, `password` | etcd's own user, and the file with its password: both or neither |
//!
//! So one text says all of it wherever a place goes: an option, a file, a role that an agent starts, a status.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// How etcd's place begins.
const ETCD: &str = "etcd://";

/// How it begins over TLS.
const ETCD_TLS: &str = "etcds://";

/// The port that etcd listens at for clients.
const ETCD_PORT: u16 = 2379;

/// Where the arbiter is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Place {
    /// A directory that both sides see.
    Directory(PathBuf),
    /// One etcd cluster.
    Etcd(Cluster),
}

/// An etcd cluster, and how it is spoken with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Its members; never empty.
    pub endpoints: Vec<Endpoint>,
    /// Over TLS, with these files; none: in clear.
    pub tls: Option<TlsFiles>,
}

/// What TLS to etcd needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that are believed, in PEM.
    pub ca: PathBuf,
    /// This client's own certificate, with those above it, and its key, in PEM.
    pub client: Option<(PathBuf, PathBuf)>,
    /// A user of etcd's, and the file with its password.
    pub user: Option<(String, PathBuf)>,
}

impl Cluster {
    /// These members, in clear.
    #[must_use]
    pub fn in_clear(endpoints: Vec<Endpoint>) -> Self {
        Self {
            endpoints,
            tls: None,
        }
    }
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
        "\"{0}\" is no arbiter of ours: write a directory's path, etcd://HOST:PORT,HOST:PORT, or over TLS \
         etcds://HOST:PORT,HOST:PORT?ca=FILE&cert=FILE&key=FILE"
    )]
    Scheme(String),
    /// TLS.
    #[error(
        "\"{place}\": {expected}. Over TLS a place is etcds://HOST:PORT,HOST:PORT?ca=FILE, with &cert=FILE&key=FILE for an etcd that wants \
         a certificate, and &user=NAME&password=FILE for one that has users"
    )]
    Tls {
        /// The whole text.
        place: String,
        /// What is wrong with it.
        expected: &'static str,
    },
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
            Self::Etcd(cluster) => {
                let mut cluster = cluster.clone();
                if let Some(tls) = &mut cluster.tls {
                    let client = tls.client.iter_mut().flat_map(|(cert, key)| [cert, key]);
                    let password = tls.user.iter_mut().map(|(_, password)| password);
                    for path in client.chain(password).chain([&mut tls.ca]) {
                        *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
                    }
                }
                Self::Etcd(cluster)
            }
        }
    }
}

impl FromStr for Place {
    type Err = BadPlace;

    fn from_str(text: &str) -> Result<Self, BadPlace> {
        let (list, tls) = match (text.strip_prefix(ETCD), text.strip_prefix(ETCD_TLS)) {
            (Some(list), _) => (list, None),
            (None, Some(rest)) => {
                let (list, words) = rest.split_once('?').unwrap_or((rest, ""));
                let wrong = |expected| BadPlace::Tls {
                    place: text.to_owned(),
                    expected,
                };
                (list, Some(tls_files(words).map_err(wrong)?))
            }
            (None, None) => {
                return match text.split_once("://") {
                    Some(("https" | "etcd+https", _)) => Err(BadPlace::Tls {
                        place: text.to_owned(),
                        expected: "it begins with etcds://",
                    }),
                    Some(_) => Err(BadPlace::Scheme(text.to_owned())),
                    None => Ok(Self::Directory(PathBuf::from(text))),
                };
            }
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
        let endpoints = endpoints?;
        Ok(Self::Etcd(Cluster { endpoints, tls }))
    }
}

/// The words behind the question mark.
fn tls_files(words: &str) -> Result<TlsFiles, &'static str> {
    let (mut ca, mut cert, mut key, mut user, mut password) = (None, None, None, None, None);
    for word in words.split('&').filter(|word| !word.is_empty()) {
        let (name, value) = word
            .split_once('=')
            .filter(|(_, value)| !value.is_empty())
            .ok_or("each of its words is NAME=FILE")?;
        let place = match name {
            "ca" => &mut ca,
            "cert" => &mut cert,
            "key" => &mut key,
            "user" => &mut user,
            "password" => &mut password,
            _ => return Err("its words are ca, cert, key, user and password"),
        };
        if place.replace(value.to_owned()).is_some() {
            return Err("one of its words is there twice");
        }
    }
    let ca = ca.ok_or("ca=FILE is missing: the authority that etcd's certificate is issued by")?;
    let client = match (cert, key) {
        (Some(cert), Some(key)) => Some((cert.into(), key.into())),
        (None, None) => None,
        _ => return Err("cert=FILE and key=FILE go together"),
    };
    let user = match (user, password) {
        (Some(user), Some(password)) => Some((user, password.into())),
        (None, None) => None,
        _ => return Err("user=NAME and password=FILE go together"),
    };
    Ok(TlsFiles {
        ca: ca.into(),
        client,
        user,
    })
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
            Self::Etcd(cluster) => {
                f.write_str(if cluster.tls.is_some() {
                    ETCD_TLS
                } else {
                    ETCD
                })?;
                for (number, endpoint) in cluster.endpoints.iter().enumerate() {
                    let comma = if number == 0 { "" } else { "," };
                    write!(f, "{comma}{endpoint}")?;
                }
                let Some(tls) = &cluster.tls else {
                    return Ok(());
                };
                write!(f, "?ca={}", tls.ca.display())?;
                if let Some((cert, key)) = &tls.client {
                    write!(f, "&cert={}&key={}", cert.display(), key.display())?;
                }
                if let Some((user, password)) = &tls.user {
                    write!(f, "&user={user}&password={}", password.display())?;
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
            (
                "etcds://a,b:1?ca=/x/ca.pem",
                "etcds://a:2379,b:1?ca=/x/ca.pem",
            ),
            (
                "etcds://a?key=k&ca=c&cert=/a b/c",
                "etcds://a:2379?ca=c&cert=/a b/c&key=k",
            ),
            (
                "etcds://a?ca=c&password=p&user=doppel",
                "etcds://a:2379?ca=c&user=doppel&password=p",
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
            ("https://a:2379", "etcds://"),
            ("etcds://a:2379", "ca=FILE is missing"),
            ("etcds://a:2379?ca=", "NAME=FILE"),
            ("etcds://a:2379?ca=x&ca=y", "twice"),
            ("etcds://a:2379?ca=x&cert=y", "go together"),
            ("etcds://a:2379?ca=x&user=y", "go together"),
            ("etcds://a:2379?ca=x&tls=1", "its words are"),
            ("etcds://?ca=x", "HOST:PORT"),
            ("etcd://a:2379?ca=x", "65535"),
            ("zk://a:2181", "etcd://HOST:PORT"),
        ] {
            let error = text.parse::<Place>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn an_absolute_place_has_absolute_files() {
        let place: Place = "etcds://a?ca=c&cert=x&key=/k&user=u&password=p"
            .parse()
            .unwrap();
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        assert_eq!(
            place.absolute().to_string(),
            format!("etcds://a:2379?ca={here}/c&cert={here}/x&key=/k&user=u&password={here}/p")
        );
    }
}
