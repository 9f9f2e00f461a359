//! The site's records in etcd: read all at once, written by transactions that compare what was seen.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disks::Deleted;
use super::record::{Answer, Drain, Host, Kept, Order, Site, Vm};
use super::seal::{self, Form};
use crate::arbiter::{Client, Cluster, EtcdError, Header, base64, parse, record_of};
use crate::control::is_name;
use crate::handshake::Secret;

const RANGE: &str = "/v3/kv/range";
const TXN: &str = "/v3/kv/txn";
const GRANT: &str = "/v3/lease/grant";
const KEEP_ALIVE: &str = "/v3/lease/keepalive";

/// The longest answer that is read: some thousands of machines.
const ANSWER_MAX: usize = 16 << 20;

/// All of Doppel's keys begin so.
const ALL: &str = "doppel/";
const HOSTS: &str = "doppel/site/hosts/";
const VMS: &str = "doppel/site/vms/";
const PORTS: &str = "doppel/site/ports/";
const DRAINS: &str = "doppel/site/drains/";
const ORDERS: &str = "doppel/site/orders/";
const ANSWERS: &str = "doppel/site/answers/";
const DELETED: &str = "doppel/site/deleted/";
const PLACEMENTS: &str = "doppel/site/placements";
const RECORDS: &str = "doppel/machines/";

/// A lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease(i64);

/// A record's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key<'a> {
    /// A host's.
    Host(&'a str),
    /// A machine's.
    Vm(&'a str),
    /// A port's.
    Port(u16),
    /// A host's that is to be empty.
    Drain(&'a str),
    /// A machine's order.
    Order(&'a str),
    /// An order's answer.
    Answer(&'a str),
    /// That of a machine that is deleted, by its instance.
    Deleted(&'a str),
    /// The last placement.
    Placements,
}

impl Key<'_> {
    fn text(&self) -> String {
        match self {
            Self::Host(name) => format!("{HOSTS}{name}"),
            Self::Vm(name) => format!("{VMS}{name}"),
            Self::Port(port) => format!("{PORTS}{port}"),
            Self::Drain(host) => format!("{DRAINS}{host}"),
            Self::Order(machine) => format!("{ORDERS}{machine}"),
            Self::Answer(id) => format!("{ANSWERS}{id}"),
            Self::Deleted(instance) => format!("{DELETED}{instance}"),
            Self::Placements => PLACEMENTS.to_owned(),
        }
    }
}

/// A transaction: all of it happens, or nothing.
#[derive(Debug, Default)]
pub struct Change {
    compares: Vec<Value>,
    writes: Vec<Value>,
}

impl Change {
    /// One that does nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only if this key was last written at this revision; 0: if it is not there.
    #[must_use]
    pub fn only_if(mut self, key: &Key<'_>, revision: i64) -> Self {
        self.compares.push(json!({
            "key": base64::encode(key.text().as_bytes()), "target": "MOD", "result": "EQUAL",
            "mod_revision": revision.to_string(),
        }));
        self
    }

    /// This key gets this value.
    #[must_use]
    pub fn put(
        self,
        store: &Store,
        key: &Key<'_>,
        value: &impl Serialize,
        lease: Option<Lease>,
    ) -> Self {
        self.put_for(Form::Any, store, key, value, lease)
    }

    /// This machine's record. An agent that knows no disks would write one without its disk.
    #[must_use]
    pub fn put_vm(self, store: &Store, vm: &Vm) -> Self {
        let form = match vm.spec.disk {
            Some(_) => Form::WithDisks,
            None => Form::Any,
        };
        self.put_for(form, store, &Key::Vm(&vm.name), vm, None)
    }

    fn put_for(
        mut self,
        form: Form,
        store: &Store,
        key: &Key<'_>,
        value: &impl Serialize,
        lease: Option<Lease>,
    ) -> Self {
        let (key, text) = (key.text(), serde_json::to_string(value));
        let text = text.expect("plain fields always encode");
        let value = seal::seal(&store.secret, form, &key, &text);
        let mut put = json!({
            "key": base64::encode(key.as_bytes()), "value": base64::encode(value.as_bytes()),
        });
        if let Some(Lease(lease)) = lease {
            put["lease"] = Value::String(lease.to_string());
        }
        self.writes.push(json!({ "request_put": put }));
        self
    }

    /// This key goes.
    #[must_use]
    pub fn delete(mut self, key: &Key<'_>) -> Self {
        let key = base64::encode(key.text().as_bytes());
        self.writes
            .push(json!({ "request_delete_range": { "key": key } }));
        self
    }
}

/// The records.
#[derive(Debug)]
pub struct Store {
    client: Client,
    secret: Secret,
}

#[derive(Debug, Deserialize)]
struct KeyValue {
    key: Option<String>,
    value: Option<String>,
    mod_revision: Option<String>,
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
}

#[derive(Debug, Deserialize)]
struct LeaseAnswer {
    header: Option<Header>,
    #[serde(rename = "ID")]
    id: Option<String>,
    #[serde(rename = "TTL")]
    ttl: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Streamed {
    result: LeaseAnswer,
}

impl Store {
    /// The records in this cluster. It resolves its members' names, reads its files, and asks nothing yet.
    ///
    /// # Errors
    /// [`EtcdError::Name`], [`EtcdError::Tls`].
    pub fn open(cluster: &Cluster, secret: Secret) -> Result<Self, EtcdError> {
        Ok(Self {
            client: Client::open(cluster, ANSWER_MAX)?,
            secret,
        })
    }

    /// Everything, at one moment.
    ///
    /// # Errors
    /// If no member answers.
    pub fn read(&self) -> Result<Site, EtcdError> {
        let body = json!({
            "key": base64::encode(ALL.as_bytes()),
            // The first key that does not begin so.
            "range_end": base64::encode(b"doppel0"),
            "serializable": false,
        });
        let found = self.client.ask(RANGE, &body, |bytes| {
            let mut found: RangeAnswer = parse(bytes)?;
            Ok((found.header.take(), found))
        })?;
        let mut site = Site::default();
        for pair in found.kvs {
            self.take_in(&mut site, &pair);
        }
        Ok(site)
    }

    fn take_in(&self, site: &mut Site, pair: &KeyValue) {
        let text = |field: &Option<String>| base64::decode(field.as_deref().unwrap_or_default());
        let (Some(key), Some(value)) = (text(&pair.key), text(&pair.value)) else {
            return;
        };
        let key = String::from_utf8_lossy(&key).into_owned();
        let revision = pair.mod_revision.as_deref().unwrap_or_default();
        let revision: i64 = revision.parse().unwrap_or(0);
        if let Some(machine) = key.strip_prefix(RECORDS) {
            match record_of(machine, &value) {
                Ok(record) => drop(site.records.insert(machine.to_owned(), record)),
                // The pair says what is wrong with it.
                Err(_) => drop(site.unreadable.insert(machine.to_owned())),
            }
            return;
        }
        let taken = seal::open(&self.secret, &key, &value).and_then(|text| {
            if let Some(name) = key.strip_prefix(HOSTS) {
                let host = json_of::<Host>(text).filter(|host| host.name == name)?;
                site.hosts.insert(name.to_owned(), kept(host, revision));
            } else if let Some(name) = key.strip_prefix(VMS) {
                let vm = json_of::<Vm>(text).filter(|vm| vm.name == name && is_name(name))?;
                site.vms.insert(name.to_owned(), kept(vm, revision));
            } else if let Some(port) = key.strip_prefix(PORTS) {
                site.ports.insert(port.parse().ok()?, json_of(text)?);
            } else if let Some(name) = key.strip_prefix(DRAINS) {
                let drain = json_of::<Drain>(text).filter(|drain| drain.host == name)?;
                site.drains.insert(name.to_owned(), kept(drain, revision));
            } else if let Some(machine) = key.strip_prefix(ORDERS) {
                let order = json_of::<Order>(text).filter(|order| order.machine == machine)?;
                site.orders
                    .insert(machine.to_owned(), kept(order, revision));
            } else if let Some(id) = key.strip_prefix(ANSWERS) {
                site.answers.insert(id.to_owned(), json_of(text)?);
            } else if let Some(instance) = key.strip_prefix(DELETED) {
                let of_it = |deleted: &Deleted| deleted.instance == instance;
                let deleted = json_of::<Deleted>(text).filter(of_it)?;
                site.deleted
                    .insert(instance.to_owned(), kept(deleted, revision));
            } else if key == PLACEMENTS {
                site.placements = revision;
            }
            Some(())
        });
        if taken.is_none() {
            site.foreign.push(key);
        }
    }

    /// Does all of this, or nothing. False: something was not as it was seen. (Or this very change had been made by an attempt whose answer
    /// got lost: whoever reads next sees it.)
    ///
    /// # Errors
    /// If no member answers; it may have been done all the same.
    pub fn change(&self, change: &Change) -> Result<bool, EtcdError> {
        let body = json!({ "compare": change.compares, "success": change.writes });
        self.client.ask(TXN, &body, |bytes| {
            let answer: TxnAnswer = parse(bytes)?;
            Ok((answer.header, answer.succeeded))
        })
    }

    /// A new lease of this length.
    ///
    /// # Errors
    /// If no member answers.
    pub fn lease(&self, length: Duration) -> Result<Lease, EtcdError> {
        let body = json!({ "TTL": length.as_secs().max(1).to_string() });
        self.client.ask(GRANT, &body, |bytes| {
            let answer: LeaseAnswer = parse(bytes)?;
            let id = answer.id.and_then(|id| id.parse().ok());
            let id = id.ok_or("its answer has no lease")?;
            Ok((answer.header, Lease(id)))
        })
    }

    /// Makes the lease run on. False: it has run out.
    ///
    /// # Errors
    /// If no member answers.
    pub fn renew(&self, Lease(lease): Lease) -> Result<bool, EtcdError> {
        let body = json!({ "ID": lease.to_string() });
        self.client.ask(KEEP_ALIVE, &body, |bytes| {
            let Streamed { result } = parse(bytes)?;
            // One that has run out has no time left, and no field for it.
            let left: i64 = result.ttl.and_then(|ttl| ttl.parse().ok()).unwrap_or(0);
            Ok((result.header, left > 0))
        })
    }

    /// Writes an order's answer, if nobody else has.
    ///
    /// # Errors
    /// If no member answers.
    pub fn answer(&self, id: &str, answer: &Answer, lease: Lease) -> Result<(), EtcdError> {
        let change = Change::new().put(self, &Key::Answer(id), answer, Some(lease));
        self.change(&change).map(|_| ())
    }
}

fn json_of<T: DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

fn kept<T>(value: T, revision: i64) -> Kept<T> {
    Kept { value, revision }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::agent::disks::{DiskLife, DiskSpec};
    use crate::agent::tests::{host, vm};
    use crate::arbiter::Endpoint;

    fn store() -> Store {
        let nobody = Endpoint {
            host: "127.0.0.1".into(),
            port: 1,
        };
        let cluster = Cluster::in_clear(vec![nobody]);
        Store::open(&cluster, Secret::from_bytes([1; 32])).unwrap()
    }

    /// What etcd would give back for what a change puts.
    fn returned(change: &Change) -> Vec<KeyValue> {
        let puts = change.writes.iter().map(|write| &write["request_put"]);
        puts.map(|put| KeyValue {
            key: put["key"].as_str().map(str::to_owned),
            value: put["value"].as_str().map(str::to_owned),
            mod_revision: Some("7".into()),
        })
        .collect()
    }

    #[test]
    fn what_is_put_is_what_is_read_in_its_place_and_nowhere_else() {
        let store = store();
        let change = Change::new()
            .put(&store, &Key::Host("a"), &host("a"), Some(Lease(5)))
            .put_vm(&store, &vm("kv"))
            .put(&store, &Key::Port(7700), &"kv", None)
            .put(&store, &Key::Answer("1"), &Answer::Done("so".into()), None)
            .put(&store, &Key::Placements, &"a", None);
        assert_eq!(change.writes[0]["request_put"]["lease"], "5");
        let mut site = Site::default();
        for pair in returned(&change) {
            store.take_in(&mut site, &pair);
        }
        assert_eq!(site.hosts["a"], kept(host("a"), 7));
        assert_eq!(site.vms["kv"], kept(vm("kv"), 7));
        assert_eq!((site.ports[&7700].as_str(), site.placements), ("kv", 7));
        assert_eq!(site.answers["1"], Answer::Done("so".into()));
        assert!(site.foreign.is_empty());

        // No file's name is made of a name that is none.
        let astray = Change::new().put(&store, &Key::Vm("../kv"), &vm("../kv"), None);
        let mut nobody = Site::default();
        store.take_in(&mut nobody, &returned(&astray)[0]);
        assert!(nobody.vms.is_empty() && nobody.foreign == ["doppel/site/vms/../kv"]);

        // One that was moved, or that others wrote, is shown to nobody.
        let mut moved = returned(&change);
        moved[0].key = Some(base64::encode(b"doppel/site/hosts/b"));
        moved[1].value = Some(base64::encode(b"{}"));
        let mut site = Site::default();
        for pair in &moved[..2] {
            store.take_in(&mut site, pair);
        }
        assert!(site.hosts.is_empty() && site.vms.is_empty());
        assert_eq!(site.foreign.len(), 2);
    }

    #[test]
    fn a_machine_with_a_disk_is_for_agents_that_know_disks() {
        let store = store();
        let of = |change: &Change| {
            let value = returned(change)[0].value.clone().unwrap();
            String::from_utf8(base64::decode(&value).unwrap()).unwrap()
        };
        let mut db = vm("db");
        let without = of(&Change::new().put_vm(&store, &db));
        assert!(without.starts_with("doppel-site-1 ") && !without.contains("disk"));
        db.spec.disk = Some(DiskSpec::Empty { bytes: 512 });
        db.disk = Some(DiskLife::default());
        let deleted = Deleted {
            machine: "db".into(),
            instance: "1".into(),
            hosts: BTreeSet::from(["a".into()]),
        };
        let change =
            Change::new()
                .put_vm(&store, &db)
                .put(&store, &Key::Deleted("1"), &deleted, None);
        assert!(of(&change).starts_with("doppel-site-2 "));
        let mut site = Site::default();
        for pair in returned(&change) {
            store.take_in(&mut site, &pair);
        }
        assert_eq!(site.vms["db"].value, db);
        assert_eq!(site.deleted["1"].value, deleted);
    }

    #[test]
    fn a_record_of_the_arbiters_that_cannot_be_read_is_no_missing_one() {
        let store = store();
        let pair = KeyValue {
            key: Some(base64::encode(b"doppel/machines/kv")),
            value: Some(base64::encode(b"doppel-machine-99 of a later version")),
            mod_revision: Some("7".into()),
        };
        let mut site = Site::default();
        store.take_in(&mut site, &pair);
        assert!(site.records.is_empty() && !site.is_ended("kv") && site.is_ended("db"));
        assert!(!site.was_turned_off("kv") && !site.was_turned_off("db"));
    }

    #[test]
    fn a_change_compares_what_was_seen() {
        let change = Change::new()
            .only_if(&Key::Order("kv"), 0)
            .delete(&Key::Vm("kv"));
        assert_eq!(change.compares[0]["mod_revision"], "0");
        let key = base64::encode(b"doppel/site/vms/kv");
        assert_eq!(change.writes[0]["request_delete_range"]["key"], key);
    }
}
