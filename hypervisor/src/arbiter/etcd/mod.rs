//! The arbiter of an etcd cluster, by its JSON gateway: no protoc, no async runtime, no crate that the rest does not use.
//!
//! Key `doppel/machines/NAME` holds the record's text. A swap is one transaction, so that etcd's own consensus decides it:
//!
//! ```text
//!   if value(key) == text of `from`            ──▶ put the text of `to`      ──▶ done
//!   (for no record: create_revision(key) == 0)
//!   otherwise                                  ──▶ get, in the same transaction: `to` itself ──▶ done (an earlier attempt landed)
//!                                                                                another     ──▶ lost to it
//! ```
//!
//! Comparing values is enough, because no record comes back; it also makes a repeated attempt harmless. Reads are
//! linearizable: etcd's default, never `serializable`.
//!
//! **Endpoints** are tried in turn, beginning with the one that answered last, each within [`ATTEMPT`]. A request that was sent
//! and not answered may have landed; it is asked again of the next member, and if nobody answers, the error says so.
//!
//! **One cluster.** The first answer's cluster id is remembered, and an answer of another cluster is refused: two arbiters could
//! make two winners.
//!
//! **Names** are resolved when the arbiter is opened, since its thread may open no files once it is confined.
#![forbid(unsafe_code)]

mod base64;
mod http;

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use self::http::{Connection, Deadline, HttpError};
use super::{Arbiter, ArbiterError, Endpoint, Swap, check_name, sealed, text};
use crate::protocol::record::Record;

/// What one member may take for one request. A healthy cluster answers in milliseconds and a new leader is elected in one to two
/// seconds; a member without a leader keeps requests for longer than anybody should wait here.
const ATTEMPT: Duration = Duration::from_secs(2);

const RANGE: &str = "/v3/kv/range";
const TXN: &str = "/v3/kv/txn";

/// An arbiter in an etcd cluster, for one machine.
#[derive(Debug)]
pub struct EtcdArbiter {
    machine: String,
    /// The key, in base64 as the gateway takes it.
    key: String,
    members: Vec<Member>,
    attempt: Duration,
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

/// What keeps etcd from answering.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// A name that stands for no address.
    #[error("etcd at {endpoint}: {why}; check pair.arbiter, and that this host resolves the name")]
    Name {
        /// The endpoint.
        endpoint: String,
        /// What the resolver said.
        why: String,
    },
    /// No member has answered.
    #[error("no etcd member answers: {}", .failures.join("; "))]
    Unreachable {
        /// Each with its failure.
        failures: Vec<String>,
        /// A request had been sent to one of them.
        sent: bool,
    },
    /// A record cannot be what this program wrote.
    #[error(
        "etcd's key {key} holds no record of ours ({problem}). Nobody changes role on it. When no process of this machine runs \
         any more, delete the key and start the machine cold"
    )]
    Corrupt {
        /// The key.
        key: String,
        /// What is wrong with the value.
        problem: String,
    },
}

impl EtcdError {
    /// Whether a swap that failed so may have taken effect all the same.
    #[must_use]
    pub fn may_have_landed(&self) -> bool {
        // A key that holds what is no record of ours compared equal to none, so the swap's put did not happen; but an earlier
        // attempt of the same call may have been the one that somebody overwrote.
        match self {
            Self::Name { .. } => false,
            Self::Unreachable { sent, .. } => *sent,
            Self::Corrupt { .. } => true,
        }
    }
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
struct Header {
    cluster_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct KeyValue {
    value: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RangeAnswer {
    header: Option<Header>,
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Debug, Deserialize)]
struct TxnAnswer {
    header: Option<Header>,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<TxnResponse>,
}

#[derive(Debug, Deserialize)]
struct TxnResponse {
    response_range: Option<RangeAnswer>,
}

#[derive(Debug, Deserialize)]
struct ErrorAnswer {
    error: Option<String>,
    message: Option<String>,
}

impl EtcdArbiter {
    /// The arbiter of `machine` in the cluster with these members. It resolves their names and asks nothing yet.
    ///
    /// # Errors
    /// If the machine's name is none, or not one member's name stands for an address.
    pub fn open(endpoints: &[Endpoint], machine: &str) -> Result<Self, ArbiterError> {
        check_name(machine)?;
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
            return Err(ArbiterError::Etcd(EtcdError::Name {
                endpoint: endpoint.to_string(),
                why: why.to_string(),
            }));
        }
        Ok(Self {
            machine: machine.to_owned(),
            key: base64::encode(key_of(machine).as_bytes()),
            members,
            attempt: ATTEMPT,
            first: Cell::new(0),
            connection: RefCell::new(None),
            cluster: Cell::new(None),
        })
    }

    /// With another time limit for each member.
    #[must_use]
    pub fn with_attempt(mut self, attempt: Duration) -> Self {
        self.attempt = attempt;
        self
    }

    /// Asks one member after the other until one answers with what `read` takes.
    fn ask<T>(
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
            match Connection::open(*address, member.endpoint.to_string(), deadline) {
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

    /// The record among these, of which there is at most one.
    fn record(&self, found: &RangeAnswer) -> Result<Option<Record>, EtcdError> {
        let corrupt = |problem: String| EtcdError::Corrupt {
            key: key_of(&self.machine),
            problem,
        };
        let Some(pair) = found.kvs.first() else {
            return Ok(None);
        };
        let value = pair.value.as_deref().unwrap_or_default();
        let bytes = base64::decode(value).ok_or_else(|| corrupt("no base64".into()))?;
        text::read(&self.machine, &bytes).map(Some).map_err(corrupt)
    }

    fn range(&self) -> Value {
        json!({ "key": self.key, "limit": "1", "serializable": false })
    }
}

/// The key of a machine.
fn key_of(machine: &str) -> String {
    format!("doppel/machines/{machine}")
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

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(bytes)
        .map_err(|error| format!("it does not answer as etcd does: {error}"))
}

impl sealed::Sealed for EtcdArbiter {}

impl Arbiter for EtcdArbiter {
    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        let found = self.ask(RANGE, &self.range(), |bytes| {
            let mut found: RangeAnswer = parse(bytes)?;
            Ok((found.header.take(), found))
        })?;
        Ok(self.record(&found)?)
    }

    fn swap(&self, from: Option<&Record>, to: &Record) -> Result<Swap, ArbiterError> {
        let value = |record: &Record| base64::encode(text::write(&self.machine, record).as_bytes());
        let compare = match from {
            Some(from) => json!({
                "key": self.key, "target": "VALUE", "result": "EQUAL", "value": value(from)
            }),
            None => json!({
                "key": self.key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"
            }),
        };
        let body = json!({
            "compare": [compare],
            "success": [{ "request_put": { "key": self.key, "value": value(to) } }],
            "failure": [{ "request_range": self.range() }],
        });
        let (succeeded, found) = self.ask(TXN, &body, |bytes| {
            let mut answer: TxnAnswer = parse(bytes)?;
            let found = answer.responses.pop().and_then(|one| one.response_range);
            if !answer.succeeded && found.is_none() {
                return Err("its answer to a transaction says nothing".into());
            }
            Ok((answer.header.take(), (answer.succeeded, found)))
        })?;
        if succeeded {
            return Ok(Swap::Done);
        }
        let found = match &found {
            Some(found) => self.record(found)?,
            None => None,
        };
        if found.as_ref() == Some(to) {
            // An earlier attempt of this process landed, and its answer got lost.
            return Ok(Swap::Done);
        }
        Ok(Swap::Lost(found))
    }

    fn needs_network(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
