//! One etcd cluster, asked by its JSON gateway: the members in turn, one connection that is kept, one cluster that is believed.
//!
//! Where etcd has users, the first answer that asks for one is answered by a name and a password, over TLS alone, for a token that goes
//! with every request until etcd does not know it any more. (A certificate's name is no user to the gateway.)
//!
//! The arbiter and the agent each have one. What is asked, and what an answer means, is theirs.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::EtcdError;
use super::http::{self, Callee, Connection, Deadline, HttpError};
use super::tls::{self, Credentials};
use crate::arbiter::{Cluster, Endpoint};

const AUTHENTICATE: &str = "/v3/auth/authenticate";

/// What one member may take for one request. A healthy cluster answers in milliseconds and a new leader is elected in one to two
/// seconds; a member without a leader keeps requests for longer than anybody should wait here.
const ATTEMPT: Duration = Duration::from_secs(2);

/// A cluster.
#[derive(Debug)]
pub(crate) struct Client {
    members: Vec<Member>,
    credentials: Option<Credentials>,
    user: Option<User>,
    attempt: Duration,
    /// The longest answer that is read, in bytes.
    longest: usize,
    /// The member that answered last.
    first: Cell<usize>,
    connection: RefCell<Option<(usize, Connection)>>,
    cluster: Cell<Option<u64>>,
}

/// A user of etcd's.
struct User {
    name: String,
    password: Zeroizing<String>,
    token: RefCell<Option<Zeroizing<String>>>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "User({:?}, its password not shown)", self.name)
    }
}

#[derive(Debug)]
struct Member {
    endpoint: Endpoint,
    addresses: Vec<SocketAddr>,
}

/// Why one member's answer is of no use.
enum Failure {
    /// Nothing of the request has left.
    NotSent(String),
    /// It, or a part of it, has.
    Sent(String),
    /// The member is sure that it did not take effect.
    Refused(String),
    /// As well: it wants a user whom it knows. But an earlier attempt may have taken effect.
    NoUser { why: String, sent: bool },
}

impl Failure {
    /// The same, where an attempt before it may have taken effect.
    fn after(self, sent: bool) -> Self {
        match self {
            Self::NotSent(why) | Self::Refused(why) if sent => Self::Sent(why),
            Self::NoUser { why, .. } => Self::NoUser { why, sent },
            other => other,
        }
    }

    fn why(self) -> String {
        match self {
            Self::NotSent(why)
            | Self::Sent(why)
            | Self::Refused(why)
            | Self::NoUser { why, .. } => why,
        }
    }
}

#[derive(Debug, Deserialize)]
struct TokenAnswer {
    header: Option<Header>,
    token: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Header {
    cluster_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ErrorAnswer {
    error: Option<String>,
    message: Option<String>,
}

impl Client {
    /// This cluster. It resolves its members' names, reads its files, and asks nothing yet.
    ///
    /// # Errors
    /// [`EtcdError::Name`] if not one member's name stands for an address, [`EtcdError::Tls`].
    pub(crate) fn open(cluster: &Cluster, longest: usize) -> Result<Self, EtcdError> {
        let files = cluster.tls.as_ref();
        let credentials = files.map(Credentials::read).transpose()?;
        let user = match files.and_then(|files| files.user.as_ref()) {
            None => None,
            Some((name, password)) => Some(User {
                name: name.clone(),
                password: tls::password(password)?,
                token: RefCell::new(None),
            }),
        };
        let mut members = Vec::new();
        let mut unknown = None;
        for endpoint in &cluster.endpoints {
            // A member that cannot be resolved now is as good as one that does not answer.
            match (endpoint.host.as_str(), endpoint.port).to_socket_addrs() {
                Ok(addresses) => members.push(Member {
                    endpoint: endpoint.clone(),
                    addresses: addresses.collect(),
                }),
                Err(error) => {
                    tracing::warn!("etcd at {endpoint} is left out: {error}");
                    unknown = Some((endpoint, error));
                }
            }
        }
        if let (true, Some((endpoint, why))) = (members.is_empty(), unknown) {
            return Err(EtcdError::Name {
                endpoint: endpoint.to_string(),
                why: why.to_string(),
            });
        }
        Ok(Self {
            members,
            credentials,
            user,
            attempt: ATTEMPT,
            longest,
            first: Cell::new(0),
            connection: RefCell::new(None),
            cluster: Cell::new(None),
        })
    }

    /// Another time limit for each member.
    pub(crate) fn set_attempt(&mut self, attempt: Duration) {
        self.attempt = attempt;
    }

    /// Asks one member after the other until one answers with what `read` takes.
    pub(crate) fn ask<T>(
        &self,
        path: &str,
        body: &Value,
        read: impl Fn(&[u8]) -> Result<(Option<Header>, T), String>,
    ) -> Result<T, EtcdError> {
        let body = body.to_string().into_bytes();
        let (mut failures, mut may_have_landed) = (Vec::new(), false);
        for turn in 0..self.members.len() {
            let at = (self.first.get() + turn) % self.members.len();
            match self.ask_as_user(at, path, &body, &read) {
                Ok(answer) => {
                    self.first.set(at);
                    return Ok(answer);
                }
                Err(failure) => {
                    may_have_landed |= matches!(
                        &failure,
                        Failure::Sent(_) | Failure::NoUser { sent: true, .. }
                    );
                    let why = failure.why();
                    failures.push(format!("{}: {why}", self.members[at].endpoint));
                }
            }
        }
        Err(EtcdError::Unreachable {
            failures,
            sent: may_have_landed,
        })
    }

    /// The same of one member, with a new token if it does not know the one there is.
    fn ask_as_user<T>(
        &self,
        at: usize,
        path: &str,
        body: &[u8],
        read: &impl Fn(&[u8]) -> Result<(Option<Header>, T), String>,
    ) -> Result<T, Failure> {
        let deadline = Deadline::after(self.attempt);
        let first = self.ask_one(at, path, body, read, deadline);
        let (user, why, sent) = match (first, &self.user) {
            (Err(Failure::NoUser { why, sent }), Some(user)) => (user, why, sent),
            (other, _) => return other,
        };
        user.token.replace(None);
        let login = json!({ "name": user.name, "password": *user.password });
        let login = Zeroizing::new(login.to_string().into_bytes());
        let token = self.ask_one(
            at,
            AUTHENTICATE,
            &login,
            &|bytes| {
                let answer: TokenAnswer = parse(bytes)?;
                let token = answer.token.ok_or("its answer has no token")?;
                // It goes into the head of a request as it is.
                let plain = token.bytes().all(|byte| byte.is_ascii_graphic());
                let token = plain.then_some(token).ok_or("its token is none")?;
                Ok((answer.header, token))
            },
            deadline,
        );
        // Nothing of the request itself has taken effect this time: the member refused it.
        let token = token.map_err(|failure| {
            let why = format!("{why}; as user {:?}: {}", user.name, failure.why());
            Failure::Refused(why).after(sent)
        })?;
        user.token.replace(Some(Zeroizing::new(token)));
        let again = self.ask_one(at, path, body, read, deadline);
        again.map_err(|failure| failure.after(sent))
    }

    fn ask_one<T>(
        &self,
        at: usize,
        path: &str,
        body: &[u8],
        read: &impl Fn(&[u8]) -> Result<(Option<Header>, T), String>,
        deadline: Deadline,
    ) -> Result<T, Failure> {
        let token = self
            .user
            .as_ref()
            .and_then(|user| user.token.borrow().clone());
        let token = token.as_ref().map(|token| token.as_str());
        // One kept from before may have been closed meanwhile: then a new one is made. What was asked over it may have landed,
        // and to ask it again does no harm.
        let kept = self.connection.take().filter(|(of, _)| *of == at);
        let mut sent_before = false;
        if let Some((_, mut connection)) = kept {
            match exchange(&mut connection, path, token, body, deadline) {
                Ok(answer) => return self.understand(at, connection, answer, read),
                Err(Failure::Refused(_)) => {}
                Err(_) => sent_before = true,
            }
        }
        let fresh = || -> Result<(Connection, http::Answer), Failure> {
            let mut connection = self.connect(at, deadline)?;
            let answer = exchange(&mut connection, path, token, body, deadline)?;
            Ok((connection, answer))
        };
        let outcome =
            fresh().and_then(|(connection, answer)| self.understand(at, connection, answer, read));
        outcome.map_err(|failure| failure.after(sent_before))
    }

    fn connect(&self, at: usize, deadline: Deadline) -> Result<Connection, Failure> {
        let member = &self.members[at];
        let mut why = String::new();
        for address in &member.addresses {
            let to = Callee {
                address: *address,
                host: &member.endpoint.host,
                endpoint: &member.endpoint.to_string(),
                credentials: self.credentials.as_ref(),
            };
            match Connection::open(to, self.longest, deadline) {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    let then = if why.is_empty() { "" } else { "; " };
                    why.push_str(&format!("{then}{error}"));
                }
            }
        }
        if why.is_empty() {
            why.push_str("it has no address");
        }
        Err(Failure::NotSent(why))
    }

    fn understand<T>(
        &self,
        at: usize,
        connection: Connection,
        answer: http::Answer,
        read: &impl Fn(&[u8]) -> Result<(Option<Header>, T), String>,
    ) -> Result<T, Failure> {
        if answer.keep {
            self.connection.replace(Some((at, connection)));
        }
        if answer.status != 200 {
            return Err(refusal(&answer));
        }
        let (header, value) = read(&answer.body).map_err(Failure::Sent)?;
        let cluster = header
            .and_then(|header| header.cluster_id?.parse::<u64>().ok())
            .ok_or_else(|| {
                Failure::Sent("its answer does not say of which cluster it is".into())
            })?;
        match self.cluster.get() {
            Some(known) if known != cluster => Err(Failure::Sent(format!(
                "it is of cluster {cluster:x}, and others of pair.arbiter are of cluster {known:x}: name the members of one"
            ))),
            _ => {
                self.cluster.set(Some(cluster));
                Ok(value)
            }
        }
    }
}

/// Sends a request and reads its answer.
fn exchange(
    connection: &mut Connection,
    path: &str,
    token: Option<&str>,
    body: &[u8],
    deadline: Deadline,
) -> Result<http::Answer, Failure> {
    // A request of which only a part left is none to an HTTP server; but nobody can say how much did.
    let sent = |error: HttpError| match error {
        HttpError::Refused(why) => Failure::Refused(why),
        other => Failure::Sent(other.to_string()),
    };
    let gone = connection.send(path, token, body, deadline);
    gone.map_err(sent)?;
    connection.receive(deadline).map_err(sent)
}

/// Bytes that are shown of an answer that is not etcd's.
const SAID_MAX: usize = 200;

/// What a member says instead of an answer, and whether it is sure.
fn refusal(answer: &http::Answer) -> Failure {
    let said = serde_json::from_slice::<ErrorAnswer>(&answer.body)
        .ok()
        .and_then(|error| error.message.or(error.error));
    let status = answer.status;
    let no_user = |why| Failure::NoUser { why, sent: false };
    match (status, said) {
        (403, Some(said)) => Failure::Refused(format!(
            "this user may not do that ({said}): etcdctl role grant-permission ROLE readwrite doppel/ --prefix"
        )),
        (401 | 403, said) => no_user(format!(
            "it wants a user and a password ({}): give etcds://… with user=NAME and password=FILE",
            said.unwrap_or_else(|| format!("status {status}"))
        )),
        (404, Some(said)) if said.contains("lease") => Failure::Refused(said),
        (404, _) => Failure::Refused(
            "it does not know etcd's v3 API: give the client address of etcd 3.4 or newer".into(),
        ),
        (400, Some(said)) if said.contains("authentication failed") => Failure::Refused(format!(
            "it does not know the user, or not by this password ({said})"
        )),
        (400, Some(said)) if said.contains("authorization") || said.contains("user name") => {
            no_user(format!(
                "it wants a user and a password ({said}): give etcds://… with user=NAME and password=FILE"
            ))
        }
        (400, None) if String::from_utf8_lossy(&answer.body).contains("CommonName") => {
            Failure::Refused(
                "it has users and checks certificates, and then its gateway takes none with a common name: give this client one without (openssl req -subj /O=NAME)"
                    .into(),
            )
        }
        (_, Some(said)) => Failure::Sent(format!("it says {said:?} (status {status})")),
        // Of something between, or of etcd's own HTTP server.
        (_, None) => Failure::Sent(format!(
            "status {status}, and {:?}",
            String::from_utf8_lossy(&answer.body[..answer.body.len().min(SAID_MAX)])
        )),
    }
}

/// An answer of etcd's.
pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(bytes)
        .map_err(|error| format!("it does not answer as etcd does: {error}"))
}
