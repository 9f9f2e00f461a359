//! A host's membership: its record under a lease that its agent keeps running, and what is told of the host there.
//!
//! The lease says who is a member: whom a role can be given to. It never says who lives; a host whose lease has run out serves on.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::record::{Host, Site};
use super::store::{Change, Key, Lease, Store};
use crate::arbiter::EtcdError;

/// A record is rewritten so often for the sake of its load.
const REWRITE: Duration = Duration::from_secs(5);

/// What has become of a membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The host is a member.
    Member,
    /// Another agent has its name.
    Taken,
}

/// The agent's part in it.
#[derive(Debug)]
pub struct Membership {
    length: Duration,
    lease: Option<(Lease, Instant)>,
    written: Option<(Host, Instant)>,
}

/// Whether a record says something else than the one before it that others should know now.
fn is_news(now: &Host, before: &Host) -> bool {
    now.images != before.images
        || now.roles.len() != before.roles.len()
        || now
            .roles
            .iter()
            .zip(&before.roles)
            .any(|(now, before)| !now.stands_as(before))
}

impl Membership {
    /// With a lease of this length.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self {
            length,
            lease: None,
            written: None,
        }
    }

    /// Keeps the lease running and the record true.
    ///
    /// # Errors
    /// If no member of etcd answers.
    pub fn keep(
        &mut self,
        store: &Store,
        site: &Site,
        host: &Host,
        now: Instant,
    ) -> Result<Standing, EtcdError> {
        let found = site.hosts.get(&host.name);
        if found.is_some_and(|found| found.value.instance != host.instance) {
            return Ok(Standing::Taken);
        }
        let lease = match self.lease {
            Some((lease, renewed)) if now < renewed + self.length / 3 => lease,
            Some((lease, _)) if store.renew(lease)? => {
                self.lease = Some((lease, now));
                lease
            }
            _ => {
                let lease = store.lease(self.length)?;
                self.lease = Some((lease, now));
                self.written = None;
                lease
            }
        };
        let fresh = self.written.as_ref().is_some_and(|(before, at)| {
            found.is_some() && !is_news(host, before) && now < *at + REWRITE
        });
        if fresh {
            return Ok(Standing::Member);
        }
        let key = Key::Host(&host.name);
        let change = Change::new()
            .only_if(&key, found.map_or(0, |found| found.revision))
            .put(store, &key, host, Some(lease));
        match store.change(&change) {
            Ok(true) => self.written = Some((host.clone(), now)),
            // Somebody was first, or an attempt whose answer got lost: the next look tells.
            Ok(false) => self.written = None,
            Err(error) => {
                // The lease may be what is wrong: it has run out since.
                self.lease = None;
                return Err(error);
            }
        }
        Ok(Standing::Member)
    }
}

/// Processes that wanted a CPU in the last minute, for each CPU.
#[must_use]
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let average: f64 = text
        .split_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .unwrap_or(0.0);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // In hundredths: no record changes for less.
    (average / cpus as f64 * 100.0).round() / 100.0
}

/// Which of the host's boots this is.
#[must_use]
pub fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// The first RDMA device with a port that is active.
#[must_use]
pub fn rdma(devices: &Path) -> Option<String> {
    let mut names: Vec<String> = fs::read_dir(devices)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.into_iter().find(|name| {
        let ports = fs::read_dir(devices.join(name).join("ports"));
        ports.into_iter().flatten().flatten().any(|port| {
            let state = fs::read_to_string(port.path().join("state"));
            state.is_ok_and(|state| state.contains("ACTIVE"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{host, role_of};
    use crate::control::status::{Role, Standing as Stands};

    #[test]
    fn others_are_told_of_roles_at_once_and_of_positions_in_time() {
        let mut before = host("a");
        before
            .roles
            .push(role_of("kv", Role::Primary, Stands::Protected));
        let mut now = before.clone();
        now.roles[0].says.as_mut().unwrap().position = 99;
        now.load = 5.0;
        assert!(!is_news(&now, &before));
        now.roles[0].says.as_mut().unwrap().standing = Stands::Unprotected;
        assert!(is_news(&now, &before));
        now.roles.clear();
        assert!(is_news(&now, &before));
        // A machine is placed by what its hosts have of its disk.
        let mut now = before.clone();
        now.images = None;
        assert!(is_news(&now, &before));
    }

    #[test]
    fn an_rdma_device_needs_an_active_port() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(rdma(&directory.path().join("none")), None);
        for (device, state) in [("mlx5_0", "1: DOWN"), ("mlx5_1", "4: ACTIVE")] {
            let port = directory.path().join(device).join("ports/1");
            fs::create_dir_all(&port).unwrap();
            fs::write(port.join("state"), state).unwrap();
        }
        assert_eq!(rdma(directory.path()).unwrap(), "mlx5_1");
    }
}
