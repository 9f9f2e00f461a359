//! One etcd cluster, asked by its JSON gateway: the members in turn, one connection that is kept, one cluster that is believed.
//!
//! The arbiter and the agent each have one. What is asked, and what an answer means, is theirs.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::EtcdError;
use super::http::{self, Connection, Deadline, HttpError};
use crate::arbiter::Endpoint;

/// What one member may take for one request. A healthy cluster answers in milliseconds and a new leader is elected in one to two
/// seconds; a member without a leader keeps requests for longer than anybody should wait here.
const ATTEMPT: Duration = Duration::from_secs(2);

/// A cluster.
#[derive(Debug)]
pub(crate) struct Client {
    members: Vec<Member>,
    attempt: Duration,
    /// The longest answer that is read, in bytes.
    longest: usize,
    /// The member that answered last.
    first: Cell<usize>,
    connection: RefCell<Option<(usize, Connection)>>,
    cluster: Cell<Option<u64>>,
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
    /// The cluster with these members. It resolves their names and asks nothing yet.
    ///
    /// # Errors
    /// [`EtcdError::Name`] if not one member's name stands for an address.
    pub(crate) fn open(endpoints: &[Endpoint], longest: usize) -> Result<Self, EtcdError> {
        let mut members = Vec::new();
        let mut unknown = None;
        for endpoint in endpoints {
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
            match self.ask_one(at, path, &body, &read) {
                Ok(answer) => {
                    self.first.set(at);
                    return Ok(answer);
                }
                Err(failure) => {
                    let why = match failure {
                        Failure::NotSent(why) | Failure::Refused(why) => why,
                        Failure::Sent(why) => {
                            may_have_landed = true;
                            why
                        }
                    };
                    failures.push(format!("{}: {why}", self.members[at].endpoint));
                }
            }
        }
        Err(EtcdError::Unreachable {
            failures,
            sent: may_have_landed,
        })
    }

    fn ask_one<T>(
        &self,
        at: usize,
        path: &str,
        body: &[u8],
        read: &impl Fn(&[u8]) -> Result<(Option<Header>, T), String>,
    ) -> Result<T, Failure> {
        let deadline = Deadline::after(self.attempt);
        // One kept from before may have been closed meanwhile: then a new one is made. What was asked over it may have landed,
        // and to ask it again does no harm.
        let kept = self.connection.take().filter(|(of, _)| *of == at);
        let mut sent_before = None;
        if let Some((_, mut connection)) = kept {
            match exchange(&mut connection, path, body, deadline) {
                Ok(answer) => return self.understand(at, connection, answer, read),
                Err(failure) => sent_before = Some(failure),
            }
        }
        let fresh = || -> Result<(Connection, http::Answer), Failure> {
            let mut connection = self.connect(at, deadline)?;
            let answer = exchange(&mut connection, path, body, deadline)?;
            Ok((connection, answer))
        };
        match (fresh(), sent_before) {
            (Ok((connection, answer)), _) => self.understand(at, connection, answer, read),
            (Err(Failure::NotSent(why)), Some(_)) => Err(Failure::Sent(why)),
            (Err(failure), _) => Err(failure),
        }
    }

    fn connect(&self, at: usize, deadline: Deadline) -> Result<Connection, Failure> {
        let member = &self.members[at];
        let mut why = "it has no address".to_owned();
        for address in &member.addresses {
            match Connection::open(
                *address,
                member.endpoint.to_string(),
                self.longest,
                deadline,
            ) {
                Ok(connection) => return Ok(connection),
                Err(error) => why = error.to_string(),
            }
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
    body: &[u8],
    deadline: Deadline,
) -> Result<http::Answer, Failure> {
    // A request of which only a part left is none to an HTTP server; but nobody can say how much did.
    let sent = |error: HttpError| Failure::Sent(error.to_string());
    connection.send(path, body, deadline).map_err(sent)?;
    connection.receive(deadline).map_err(sent)
}

/// What a member says instead of an answer, and whether it is sure.
fn refusal(answer: &http::Answer) -> Failure {
    let said = serde_json::from_slice::<ErrorAnswer>(&answer.body)
        .ok()
        .and_then(|error| error.message.or(error.error));
    let status = answer.status;
    match (status, said) {
        (401 | 403, said) => Failure::Refused(format!(
            "it wants a user and a password ({}), which this version cannot give: leave etcd's authentication off, on a network that \
             nobody else is on",
            said.unwrap_or_else(|| format!("status {status}"))
        )),
        (404, Some(said)) if said.contains("lease") => Failure::Refused(said),
        (404, _) => Failure::Refused(
            "it does not know etcd's v3 API: give the client address of etcd 3.4 or newer".into(),
        ),
        (400, Some(said)) if said.contains("authorization") || said.contains("user name") => {
            Failure::Refused(format!(
                "it wants a user and a password ({said}), which this version cannot give"
            ))
        }
        (_, Some(said)) => Failure::Sent(format!("it says {said:?} (status {status})")),
        (_, None) => Failure::Sent(format!("status {status} without a reason")),
    }
}

/// An answer of etcd's.
pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(bytes)
        .map_err(|error| format!("it does not answer as etcd does: {error}"))
}
