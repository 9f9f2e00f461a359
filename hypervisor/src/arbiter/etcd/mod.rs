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
//! **Endpoints** are tried in turn, beginning with the one that answered last, each within two seconds (`client.rs`). A request that was sent
//! and not answered may have landed; it is asked again of the next member, and if nobody answers, the error says so.
//!
//! **One cluster.** The first answer's cluster id is remembered, and an answer of another cluster is refused: two arbiters could
//! make two winners.
//!
//! **Names** are resolved when the arbiter is opened, and files of TLS read, since its thread may open none once it is confined.
#![forbid(unsafe_code)]

pub(crate) mod base64;
pub(crate) mod client;
mod http;
mod tls;

pub use tls::TlsError;

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use self::client::{Client, Header, parse};
use super::{Arbiter, ArbiterError, Cluster, Swap, check_name, sealed, text};
use crate::protocol::record::Record;

const RANGE: &str = "/v3/kv/range";
const TXN: &str = "/v3/kv/txn";

/// An arbiter in an etcd cluster, for one machine.
#[derive(Debug)]
pub struct EtcdArbiter {
    machine: String,
    /// The key, in base64 as the gateway takes it.
    key: String,
    client: Client,
}

/// An answer's body is never longer, in bytes; a record is under a kilobyte.
const ANSWER_MAX: usize = 64 << 10;

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
    /// What TLS needs.
    #[error(transparent)]
    Tls(#[from] TlsError),
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
            Self::Name { .. } | Self::Tls(_) => false,
            Self::Unreachable { sent, .. } => *sent,
            Self::Corrupt { .. } => true,
        }
    }
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

impl EtcdArbiter {
    /// The arbiter of `machine` in this cluster. It resolves its members' names, reads its files, and asks nothing yet.
    ///
    /// # Errors
    /// If the machine's name is none, not one member's name stands for an address, or a file is not as it should be.
    pub fn open(cluster: &Cluster, machine: &str) -> Result<Self, ArbiterError> {
        check_name(machine)?;
        Ok(Self {
            machine: machine.to_owned(),
            key: base64::encode(key_of(machine).as_bytes()),
            client: Client::open(cluster, ANSWER_MAX)?,
        })
    }

    /// With another time limit for each member.
    #[must_use]
    pub fn with_attempt(mut self, attempt: Duration) -> Self {
        self.client.set_attempt(attempt);
        self
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

impl sealed::Sealed for EtcdArbiter {}

impl Arbiter for EtcdArbiter {
    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        let found = self.client.ask(RANGE, &self.range(), |bytes| {
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
        let (succeeded, found) = self.client.ask(TXN, &body, |bytes| {
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
