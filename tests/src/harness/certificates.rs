//! An authority of a test's own, and what it issues: by `openssl`, into a directory.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key, its owner's alone.
    pub key: PathBuf,
}

/// An authority.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
    own: Issued,
}

/// The sections that a certificate's extensions are in. A server of etcd is a client, too: its gateway calls it.
const SECTIONS: &str = "[req]\ndistinguished_name = dn\n[dn]\n\
[ca]\nbasicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign\n\
[server]\nbasicConstraints = critical,CA:FALSE\nextendedKeyUsage = serverAuth,clientAuth\nsubjectAltName = IP:127.0.0.1,IP:10.78.0.254\n\
[client]\nbasicConstraints = critical,CA:FALSE\nextendedKeyUsage = clientAuth\n";

impl Authority {
    /// A new one, whose files begin with `name`.
    ///
    /// # Errors
    /// If `openssl` is not there, or refuses.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(directory).context("make a directory for certificates")?;
        fs::write(directory.join("openssl.cnf"), SECTIONS).context("configure openssl")?;
        let own = issue(directory, name, ("ca", "O"), None)?;
        Ok(Self {
            directory: directory.to_owned(),
            own,
        })
    }

    /// Its own certificate.
    #[must_use]
    pub fn certificate(&self) -> &Path {
        &self.own.cert
    }

    /// A certificate for a server on loopback and in a site's world.
    ///
    /// # Errors
    /// If `openssl` refuses.
    pub fn server(&self, name: &str) -> Result<Issued> {
        issue(&self.directory, name, ("server", "O"), Some(&self.own))
    }

    /// One for a client, without a common name.
    ///
    /// # Errors
    /// If `openssl` refuses.
    pub fn client(&self, name: &str) -> Result<Issued> {
        issue(&self.directory, name, ("client", "O"), Some(&self.own))
    }

    /// One for a client whose common name this is.
    ///
    /// # Errors
    /// If `openssl` refuses.
    pub fn client_by_name(&self, name: &str) -> Result<Issued> {
        issue(&self.directory, name, ("client", "CN"), Some(&self.own))
    }
}

fn issue(
    directory: &Path,
    name: &str,
    (section, kind): (&str, &str),
    by: Option<&Issued>,
) -> Result<Issued> {
    let issued = Issued {
        cert: directory.join(format!("{name}.pem")),
        key: directory.join(format!("{name}.key")),
    };
    let mut openssl = Command::new("openssl");
    openssl
        .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-subj", &format!("/{kind}={name}"), "-extensions", section])
        .arg("-config")
        .arg(directory.join("openssl.cnf"))
        .arg("-keyout")
        .arg(&issued.key)
        .arg("-out")
        .arg(&issued.cert);
    if let Some(by) = by {
        openssl.arg("-CA").arg(&by.cert).arg("-CAkey").arg(&by.key);
    }
    let output = openssl
        .output()
        .context("start openssl: run scripts/install-test-tools first")?;
    ensure!(
        output.status.success(),
        "openssl: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(issued)
}
