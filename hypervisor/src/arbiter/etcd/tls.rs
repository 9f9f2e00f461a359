//! TLS to etcd, mutual where etcd wants it: rustls with ring, TLS 1.3 alone, on the same blocking socket and under the same deadlines.
//!
//! All files are read when the arbiter is opened: its thread may open none later, and a certificate that is renewed is taken up by the next
//! process. The key and the password must be their owner's alone, and nobody else may write the others.
//!
//! **What may have landed.** The handshake is over before the first byte of a request leaves, so a failure of it is none of the request's. With
//! TLS 1.3 a server that does not take the client's certificate says so only after that; it has then read nothing else, and its alert counts
//! as a refusal.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error, RootCertStore,
};

use super::http::{Deadline, HttpError};
use crate::arbiter::TlsFiles;
use crate::guarded::{self, BELIEVED, SECRET, Unguarded};

/// The longest file that is read, in bytes: a chain of certificates has some thousands.
const FILE_MAX: u64 = 1 << 20;

/// Why a file of TLS is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("cannot read {}, etcd's {word}=: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Its word in the place.
        word: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Others can get at it.
    #[error("{}, etcd's {word}=, {why}", path.display())]
    Unguarded {
        /// The file.
        path: PathBuf,
        /// Its word in the place.
        word: &'static str,
        /// What is wrong, and what to do.
        why: String,
    },
    /// What is in it.
    #[error("{}, etcd's {word}=, is not what it should be: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its word in the place.
        word: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// What is needed to call any member.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    config: Arc<ClientConfig>,
    ca: PathBuf,
    has_certificate: bool,
}

fn read(path: &Path, word: &'static str, denied: u32) -> Result<Vec<u8>, TlsError> {
    let path = path.to_owned();
    guarded::read(&path, denied, FILE_MAX).map_err(|error| {
        let why = match error {
            Unguarded::Unreadable(source) => return TlsError::Unreadable { path, word, source },
            Unguarded::NoFile => "is no regular file".to_owned(),
            Unguarded::Long => format!("has more than {FILE_MAX} bytes"),
            Unguarded::Owner { owner, user } => format!(
                "belongs to user {owner}, this is user {user}: `chown {user}` it, or run as its owner"
            ),
            Unguarded::Open(mode) if denied == SECRET => format!(
                "has mode {mode:04o}, so others can get at it: `chmod 600` it, and have a new one made if that may have happened"
            ),
            Unguarded::Open(mode) => {
                format!("has mode {mode:04o}, so others can change whom is believed: `chmod go-w` it")
            }
        };
        TlsError::Unguarded { path, word, why }
    })
}

/// A password: the file's first line.
pub(super) fn password(path: &Path) -> Result<zeroize::Zeroizing<String>, TlsError> {
    let bytes = zeroize::Zeroizing::new(read(path, "password", SECRET)?);
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(TlsError::Malformed {
            path: path.to_owned(),
            word: "password",
            why: "its first line is to be the password".to_owned(),
        });
    }
    Ok(zeroize::Zeroizing::new(line.to_owned()))
}

fn certificates(path: &Path, word: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path, word, BELIEVED)?;
    let malformed = |why: String| TlsError::Malformed {
        path: path.to_owned(),
        word,
        why,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(malformed("no certificate in PEM is in it".into())),
        Ok(found) => Ok(found),
        Err(error) => Err(malformed(error.to_string())),
    }
}

impl Credentials {
    /// Reads the files.
    pub(super) fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let malformed = |path: &Path, word| {
            let path = path.to_owned();
            move |error: Error| TlsError::Malformed {
                path,
                word,
                why: error.to_string(),
            }
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca, "ca")? {
            roots.add(certificate).map_err(malformed(&files.ca, "ca"))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has what TLS 1.3 needs")
            .with_root_certificates(roots);
        let mut config = match &files.client {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates(cert, "cert")?;
                let text = zeroize::Zeroizing::new(read(key, "key", SECRET)?);
                let own =
                    PrivateKeyDer::from_pem_slice(&text).map_err(|error| TlsError::Malformed {
                        path: key.clone(),
                        word: "key",
                        why: format!("no private key in PEM is in it ({error})"),
                    })?;
                builder
                    .with_client_auth_cert(chain, own)
                    .map_err(malformed(key, "key"))?
            }
        };
        // A connection is kept for as long as it is good; who comes anew proves himself anew.
        config.resumption = Resumption::disabled();
        Ok(Self {
            config: Arc::new(config),
            ca: files.ca.clone(),
            has_certificate: files.client.is_some(),
        })
    }

    /// What an error of TLS means here, and what to do.
    fn explain(&self, host: &str, error: &Error) -> String {
        match error {
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => format!(
                "its certificate was not issued by an authority in {}: give the one of this etcd as ca=FILE",
                self.ca.display()
            ),
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => format!(
                "its certificate is not made out to {host}: call it by a name or an address that is in it (subjectAltName)"
            ),
            Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => "its certificate has expired or is not valid yet: renew it, or set this host's clock"
                .to_owned(),
            Error::InvalidCertificate(why) => format!("its certificate is not taken: {why}"),
            Error::AlertReceived(alert) if is_refusal(*alert) && !self.has_certificate => format!(
                "it wants this client's certificate (its alert: {alert:?}): add cert=FILE and key=FILE to the place"
            ),
            Error::AlertReceived(alert) if is_refusal(*alert) => format!(
                "it does not take this client's certificate (its alert: {alert:?}): have one issued for client authentication by the authority \
                 that etcd's --trusted-ca-file names"
            ),
            Error::AlertReceived(AlertDescription::ProtocolVersion) => {
                "it does not speak TLS 1.3: use an etcd that does (3.4 or newer, of this decade)".to_owned()
            }
            Error::InvalidMessage(_) => {
                "it does not speak TLS: write etcd:// if it serves in clear".to_owned()
            }
            other => format!("TLS: {other}"),
        }
    }
}

/// Whether a server says by it that it does not take whoever calls.
fn is_refusal(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::HandshakeFailure
    )
}

/// A connection over which all is sealed.
#[derive(Debug)]
pub(super) struct Sealed {
    session: Box<ClientConnection>,
    stream: TcpStream,
    credentials: Credentials,
    host: String,
}

impl Sealed {
    /// Shakes hands with the member of this name or address.
    pub(super) fn open(
        stream: TcpStream,
        credentials: &Credentials,
        host: &str,
        deadline: Deadline,
    ) -> Result<Self, HttpError> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| HttpError::Tls(format!("{host:?} is no name that a certificate has")))?;
        let session = ClientConnection::new(Arc::clone(&credentials.config), name)
            .map_err(|error| HttpError::Tls(credentials.explain(host, &error)))?;
        let mut sealed = Self {
            session: Box::new(session),
            stream,
            credentials: credentials.clone(),
            host: host.to_owned(),
        };
        while sealed.session.is_handshaking() {
            let step = match sealed.session.wants_write() {
                true => sealed.send(deadline),
                false => sealed.receive(deadline),
            };
            step.map_err(|error| match error {
                HttpError::Ended | HttpError::Io(_) => HttpError::Tls(format!(
                    "it ended the connection before TLS had begun ({error}): if it does not speak TLS, write etcd://"
                )),
                other => other,
            })?;
        }
        sealed.flush(deadline)?;
        Ok(sealed)
    }

    /// Takes in what comes next, once.
    fn receive(&mut self, deadline: Deadline) -> Result<(), HttpError> {
        self.stream.set_read_timeout(Some(deadline.left()?))?;
        match self.session.read_tls(&mut self.stream) {
            Ok(0) => return Err(HttpError::Ended),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(deadline.named(error)),
        }
        if let Err(error) = self.session.process_new_packets() {
            // What we have to say about it; that it may be gone changes nothing.
            let _ = self.session.write_tls(&mut self.stream);
            let why = self.credentials.explain(&self.host, &error);
            return Err(match error {
                Error::AlertReceived(alert) if is_refusal(alert) => HttpError::Refused(why),
                _ => HttpError::Tls(why),
            });
        }
        Ok(())
    }

    fn send(&mut self, deadline: Deadline) -> Result<(), HttpError> {
        self.stream.set_write_timeout(Some(deadline.left()?))?;
        match self.session.write_tls(&mut self.stream) {
            Ok(0) => Err(HttpError::Ended),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            // It may have said why before it closed.
            Err(error) => match self.receive(deadline) {
                Err(refused @ HttpError::Refused(_)) => Err(refused),
                _ => Err(deadline.named(error)),
            },
        }
    }

    /// Sends all that waits.
    pub(super) fn flush(&mut self, deadline: Deadline) -> Result<(), HttpError> {
        while self.session.wants_write() {
            self.send(deadline)?;
        }
        Ok(())
    }

    /// Sends some of these bytes: how many.
    pub(super) fn write(&mut self, bytes: &[u8], deadline: Deadline) -> Result<usize, HttpError> {
        let count = self.session.writer().write(bytes)?;
        self.flush(deadline)?;
        Ok(count)
    }

    /// Reads some bytes: how many, and none at the end.
    pub(super) fn read(&mut self, to: &mut [u8], deadline: Deadline) -> Result<usize, HttpError> {
        loop {
            match self.session.reader().read(to) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive(deadline)?,
                // Cut off, without the goodbye that TLS has.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                other => return Ok(other?),
            }
        }
    }
}
