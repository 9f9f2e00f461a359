//! The agent's configuration: a TOML file, which `doppel vm` reads as well.
#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::record::Ports;
use crate::arbiter::{Cluster, Place};
use crate::control::is_name;

/// Where it is found if nothing else is said.
pub const DEFAULT: &str = "/etc/doppel/agent.toml";

/// The agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The host's name at the site; its own host name if not given.
    #[serde(default)]
    pub name: String,
    /// The site's etcd, as `etcd://HOST:PORT,…`, or over TLS `etcds://HOST:PORT,…?ca=FILE&cert=FILE&key=FILE`: its records, and the arbiter
    /// of its machines.
    pub etcd: Place,
    /// File of the site's secret, the same on every host: pairs prove it to each other, and records are sealed by it.
    pub secret: PathBuf,
    /// The address at which backups listen and heartbeats go; the other hosts reach it.
    pub address: IpAddr,
    /// For machines, in MiB, each with what its roles take besides.
    pub memory_mib: u64,
    /// Ports for backups, `FIRST-LAST`. A machine has the same one on every host.
    #[serde(default = "ports")]
    pub ports: String,
    /// Port at which the consoles of machines here are shown, to holders of the site's secret; 0: they are not.
    #[serde(default = "console_port")]
    pub console_port: u16,
    /// Directory of the roles' control sockets and locks. On a file system that is empty after a boot.
    #[serde(default = "run_dir")]
    pub run_dir: PathBuf,
    /// Directory for the messages of roles, a file for each machine; if not given they go where the agent's go.
    #[serde(default)]
    pub log_dir: Option<PathBuf>,
    /// Directory below which kernels and other files of guests lie; none elsewhere is opened.
    #[serde(default = "images")]
    pub images: PathBuf,
    /// Directory of the images of machines' disks, which are made and removed there; made when the first one is.
    #[serde(default = "disks")]
    pub disks: PathBuf,
    /// The bridge to which guests are cabled; none: guests with a network are not placed here.
    #[serde(default)]
    pub bridge: Option<String>,
    /// A configuration (docs/configuration.md) for every role here: devices, CPUs, timing.
    #[serde(default)]
    pub roles: Option<PathBuf>,
    /// How long the others take this host for a member after its agent's last word, in seconds.
    #[serde(default = "lease_s")]
    pub lease_s: u64,
    /// Between two looks at the records, in milliseconds.
    #[serde(default = "poll_ms")]
    pub poll_ms: u64,
}

fn ports() -> String {
    "7700-7799".into()
}

fn console_port() -> u16 {
    7699
}

fn run_dir() -> PathBuf {
    "/run/doppel".into()
}

fn images() -> PathBuf {
    "/var/lib/doppel".into()
}

fn disks() -> PathBuf {
    "/var/lib/doppel/disks".into()
}

fn lease_s() -> u64 {
    10
}

fn poll_ms() -> u64 {
    500
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum AgentConfigError {
    /// The file.
    #[error("cannot read the agent's configuration {}: {source}; docs/cluster.md has one to begin with", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not what is expected there.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, column, what was found and what was expected.
        what: String,
    },
    /// A value.
    #[error("{field} is {found}: {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl AgentConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// See [`AgentConfigError`].
    pub fn read(path: &Path) -> Result<Self, AgentConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| AgentConfigError::Unreadable {
                path: path.to_owned(),
                source,
            })?;
        let mut config: Self =
            toml::from_str(&text).map_err(|error| AgentConfigError::Malformed {
                path: path.to_owned(),
                what: error.to_string(),
            })?;
        if config.name.is_empty() {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let first = name.trim().split('.').next().unwrap_or_default();
            config.name = first.to_ascii_lowercase();
        }
        config.check()?;
        Ok(config)
    }

    /// Where etcd is.
    ///
    /// # Errors
    /// [`AgentConfigError::Value`] if that is another arbiter.
    pub fn cluster(&self) -> Result<&Cluster, AgentConfigError> {
        match &self.etcd {
            Place::Etcd(cluster) => Ok(cluster),
            Place::Directory(path) => Err(AgentConfigError::Value {
                field: "etcd",
                found: format!("{:?}", path.display().to_string()),
                expected: "a site's records are in etcd: write etcd://HOST:PORT,HOST:PORT, or etcds://… for TLS",
            }),
        }
    }

    /// The ports.
    ///
    /// # Errors
    /// [`AgentConfigError::Value`].
    pub fn ports(&self) -> Result<Ports, AgentConfigError> {
        let parsed = self.ports.split_once('-').and_then(|(first, last)| {
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (0 < first && first <= last).then_some(Ports { first, last })
        });
        parsed.ok_or_else(|| AgentConfigError::Value {
            field: "ports",
            found: format!("{:?}", self.ports),
            expected: "write FIRST-LAST, such as 7700-7799: a port for each machine of the site",
        })
    }

    fn check(&self) -> Result<(), AgentConfigError> {
        self.cluster()?;
        let ports = self.ports()?;
        let bad = |field, found: String, expected| {
            Err(AgentConfigError::Value {
                field,
                found,
                expected,
            })
        };
        if !is_name(&self.name) {
            let expected = "use 1 to 63 of a-z, 0-9 and -, not beginning with -";
            return bad("name", format!("{:?}", self.name), expected);
        }
        if self.console_port != 0 && ports.has(self.console_port) {
            let expected =
                "backups listen at `ports`: choose one that is none of them, or 0 for no consoles";
            return bad("console_port", self.console_port.to_string(), expected);
        }
        if self.address.is_unspecified() {
            let expected = "the other hosts find this one by it: give the address that it has on their network";
            return bad("address", self.address.to_string(), expected);
        }
        if !(2..=3600).contains(&self.lease_s) {
            return bad("lease_s", self.lease_s.to_string(), "choose 2 to 3600");
        }
        let longest = self.lease_s * 1000 / 4;
        if !(50..=longest).contains(&self.poll_ms) {
            let expected = "choose 50 or more, up to a quarter of lease_s";
            return bad("poll_ms", self.poll_ms.to_string(), expected);
        }
        if self.etcd != self.etcd.absolute() {
            let expected = "name its files by absolute paths: roles are started with it elsewhere";
            return bad("etcd", format!("{:?}", self.etcd.to_string()), expected);
        }
        for (field, path) in [
            ("secret", Some(&self.secret)),
            ("run_dir", Some(&self.run_dir)),
            ("images", Some(&self.images)),
            ("disks", Some(&self.disks)),
            ("log_dir", self.log_dir.as_ref()),
            ("roles", self.roles.as_ref()),
        ] {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let found = format!("{:?}", path.display().to_string());
                return bad(field, found, "give an absolute path");
            }
        }
        if self.disks.to_string_lossy().contains(',') {
            let found = format!("{:?}", self.disks.display().to_string());
            return bad("disks", found, "choose a path without a comma");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<AgentConfig, AgentConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        AgentConfig::read(&path)
    }

    const LEAST: &str = "etcd = \"etcd://10.0.0.9\"\nsecret = \"/etc/doppel/site.secret\"\naddress = \"10.0.0.1\"\nmemory_mib = 1024\n";

    #[test]
    fn the_least_is_enough() {
        let config = read(&format!("name = \"a\"\n{LEAST}")).unwrap();
        assert_eq!(
            config.ports().unwrap(),
            Ports {
                first: 7700,
                last: 7799
            }
        );
        assert_eq!(config.cluster().unwrap().endpoints[0].port, 2379);
        assert_eq!(config.run_dir, Path::new("/run/doppel"));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_to_write() {
        for (line, word) in [
            ("name = \"A b\"", "name"),
            ("ports = \"9-8\"", "FIRST-LAST"),
            ("ports = \"0-8\"", "FIRST-LAST"),
            ("lease_s = 1", "lease_s"),
            ("console_port = 7700", "console_port"),
            ("poll_ms = 3000", "poll_ms"),
            ("run_dir = \"here\"", "absolute"),
            ("disks = \"disks\"", "absolute"),
            ("disks = \"/a,b\"", "comma"),
            ("colour = 1", "unknown field"),
        ] {
            let name = if line.starts_with("name") {
                ""
            } else {
                "name = \"a\""
            };
            let error = read(&format!("{name}\n{line}\n{LEAST}")).unwrap_err();
            assert!(error.to_string().contains(word), "{line}: {error}");
        }
        let directory = LEAST.replace("etcd://10.0.0.9", "/srv/arbiter");
        let error = read(&format!("name = \"a\"\n{directory}")).unwrap_err();
        assert!(error.to_string().contains("etcd://HOST"), "{error}");
        let relative = LEAST.replace("etcd://10.0.0.9", "etcds://10.0.0.9?ca=ca.pem");
        let error = read(&format!("name = \"a\"\n{relative}")).unwrap_err();
        assert!(error.to_string().contains("absolute"), "{error}");
        let anywhere = LEAST.replace("10.0.0.1", "0.0.0.0");
        let error = read(&format!("name = \"a\"\n{anywhere}")).unwrap_err();
        assert!(error.to_string().contains("address"), "{error}");
    }
}
