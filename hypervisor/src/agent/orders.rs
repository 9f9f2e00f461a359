//! Orders: taken by the agent of the host that serves the machine, carried out once, answered.
//!
//! ```text
//!   order in etcd ──taken by a transaction that takes it away──▶ given to the role ──▶ what came of it ──▶ answer in etcd
//! ```
//! An order is carried out at most once: it is taken away before it is given, and an agent that dies in between leaves the answer "taken". Where the
//! transaction was not answered it may have landed: the next look at etcd tells, and the order is given then.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::time::Duration;

use super::hands::Hands;
use super::record::{Answer, Kept, Order, Site, Verb};
use super::store::{Change, Key, Lease, Store};
use crate::arbiter::EtcdError;
use crate::control::status::Status;
use crate::control::wire::Ask;

/// How long an order may take once it is given. A switch-over is called off after half a second; the heir's agent tells of it with its next look.
const WITHIN_MS: u64 = 10_000;

/// How long an answer is kept.
const ANSWER_KEPT: Duration = Duration::from_secs(120);

/// An order that was given to a role here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    id: String,
    pid: u32,
    /// The role's own number for it.
    number: u64,
    /// The reign in which it was given.
    epoch: u64,
    until_ms: u64,
}

/// Orders under way.
#[derive(Debug, Default)]
pub struct Desk {
    given: BTreeMap<String, Given>,
    /// Orders of which this process does not know whether it has taken them, and until when that matters to whoever gave them.
    unsure: Vec<(Order, u64)>,
}

/// How an agent's process says that it has an order. An earlier process of this host's, which may have given it, says another thing.
fn taken_by(me: &str) -> String {
    format!("{me} has it, agent {}", std::process::id())
}

/// Which of these orders were taken by whoever says so, as etcd knows it. One that is still there is taken anew.
fn landed(unsure: Vec<(Order, u64)>, site: &Site, by: &str) -> Vec<(Order, u64)> {
    let taken = |(order, _): &(Order, u64)| match site.answers.get(&order.id) {
        Some(Answer::Taken(who)) => who == by,
        _ => false,
    };
    unsure.into_iter().filter(taken).collect()
}

/// The orders that this host is to carry out: of machines that it serves, one at a time for each.
fn mine<'a>(
    site: &'a Site,
    me: &str,
    given: &BTreeMap<String, Given>,
) -> Vec<(&'a Kept<Order>, u32, u64)> {
    let of = site.orders.values().filter_map(|order| {
        let machine = &order.value.machine;
        let (host, role) = site.serving(machine)?;
        let takes = host.name == me && !given.contains_key(machine);
        takes.then(|| (order, role.pid, role.epoch()))
    });
    of.collect()
}

/// What has come of an order to switch over, if anything has.
fn outcome(
    given: &Given,
    machine: &str,
    site: &Site,
    status: &io::Result<Status>,
    now_ms: u64,
) -> Option<Answer> {
    if let Some((host, role)) = site.serving(machine)
        && role.epoch() > given.epoch
    {
        let (host, epoch) = (&host.name, role.epoch());
        return Some(Answer::Done(format!("{host} serves it in epoch {epoch}")));
    }
    if let Ok(status) = status
        && let Some(Err(why)) = status.outcome_of(given.number)
    {
        return Some(Answer::Failed(why.clone()));
    }
    if now_ms < given.until_ms {
        return None;
    }
    let gone = |error: &io::Error| {
        matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused
        )
    };
    Some(Answer::Failed(match status {
        Err(error) if gone(error) => {
            "its process has ended, and no host says that it serves the machine: see doppel vm show"
                .to_owned()
        }
        _ => format!(
            "it was not done within {} s: see doppel vm show",
            WITHIN_MS / 1000
        ),
    }))
}

impl Desk {
    /// Takes what is ordered, and answers what is done.
    ///
    /// # Errors
    /// If no member of etcd answers.
    pub fn turn(
        &mut self,
        store: &Store,
        site: &Site,
        hands: &Hands,
        me: &str,
        now_ms: u64,
    ) -> Result<(), EtcdError> {
        self.unsure = landed(std::mem::take(&mut self.unsure), site, &taken_by(me));
        while let Some((order, until_ms)) = self.unsure.last().cloned() {
            let lease = store.lease(ANSWER_KEPT)?;
            self.unsure.pop();
            match site.serving(&order.machine) {
                Some((host, role)) if host.name == me && now_ms < until_ms => {
                    let whom = (role.pid, role.epoch());
                    self.give(store, hands, &order, whom, now_ms, lease)?;
                }
                _ => {
                    let why =
                        format!("{me} took it, and could not give it in time: order it again");
                    store.answer(&order.id, &Answer::Failed(why), lease)?;
                }
            }
        }
        for (order, pid, epoch) in mine(site, me, &self.given) {
            self.take(store, hands, order, (pid, epoch), me, now_ms)?;
        }
        let mut done = Vec::new();
        for (machine, given) in &self.given {
            let status = hands.ask(machine, given.pid);
            if let Some(answer) = outcome(given, machine, site, &status, now_ms) {
                store.answer(&given.id, &answer, store.lease(ANSWER_KEPT)?)?;
                tracing::info!("order {} for machine {machine}: {answer:?}", given.id);
                done.push(machine.clone());
            }
        }
        for machine in done {
            self.given.remove(&machine);
        }
        Ok(())
    }

    fn take(
        &mut self,
        store: &Store,
        hands: &Hands,
        order: &Kept<Order>,
        (pid, epoch): (u32, u64),
        me: &str,
        now_ms: u64,
    ) -> Result<(), EtcdError> {
        let Order { id, machine, .. } = &order.value;
        let lease = store.lease(ANSWER_KEPT)?;
        let taken = Answer::Taken(taken_by(me));
        let change = Change::new()
            .only_if(&Key::Order(machine), order.revision)
            .delete(&Key::Order(machine))
            .put(store, &Key::Answer(id), &taken, Some(lease));
        let unsure = (order.value.clone(), now_ms + WITHIN_MS);
        match store.change(&change) {
            Ok(true) => self.give(store, hands, &order.value, (pid, epoch), now_ms, lease),
            // It is not there any more. That may be this process's own doing: what one member did not answer was put to the next one.
            Ok(false) => {
                self.unsure.push(unsure);
                Ok(())
            }
            Err(error) => {
                self.unsure.push(unsure);
                Err(error)
            }
        }
    }

    /// Gives a role here an order that was taken.
    fn give(
        &mut self,
        store: &Store,
        hands: &Hands,
        order: &Order,
        (pid, epoch): (u32, u64),
        now_ms: u64,
        lease: Lease,
    ) -> Result<(), EtcdError> {
        let Order { id, machine, verb } = order;
        let what = match verb {
            Verb::Switch => Ask::Switch,
        };
        match hands.order(machine, pid, what) {
            Ok(number) => {
                let given = Given {
                    id: id.clone(),
                    pid,
                    number,
                    epoch,
                    until_ms: now_ms + WITHIN_MS,
                };
                self.given.insert(machine.clone(), given);
                Ok(())
            }
            Err(why) => store.answer(id, &Answer::Failed(why.to_string()), lease),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::record::RoleReport;
    use crate::agent::tests::{order_a_switch, role_of, site};
    use crate::control::status::{Role, Standing};

    fn served_by(name: &str, epoch: u64) -> Site {
        let mut site = site(&["a", "b"]);
        let mut role: RoleReport = role_of("kv", Role::Primary, Standing::Protected);
        role.says.as_mut().unwrap().epoch = epoch;
        site.hosts.get_mut(name).unwrap().value.roles.push(role);
        order_a_switch(&mut site);
        site
    }

    fn given() -> Given {
        Given {
            id: "1".into(),
            pid: 100,
            number: 3,
            epoch: 4,
            until_ms: 1000,
        }
    }

    #[test]
    fn an_order_is_taken_by_the_host_that_serves_and_one_at_a_time() {
        let site = served_by("a", 4);
        assert_eq!(mine(&site, "a", &BTreeMap::new()).len(), 1);
        assert!(mine(&site, "b", &BTreeMap::new()).is_empty());
        let busy = BTreeMap::from([("kv".to_owned(), given())]);
        assert!(mine(&site, "a", &busy).is_empty());
    }

    /// The transaction that takes an order lands, and nobody hears of it.
    #[test]
    fn an_order_whose_taking_was_not_answered_is_given_if_it_was_taken() {
        let mut site = served_by("a", 4);
        let order = site.orders["kv"].value.clone();
        let unsure = || vec![(order.clone(), 1000)];
        let me = taken_by("a");
        assert_eq!(landed(unsure(), &site, &me), [], "it is still there");
        site.orders.clear();
        assert_eq!(landed(unsure(), &site, &me), [], "it was withdrawn");
        let mut answered = |answer| {
            site.answers.insert("1".into(), answer);
            landed(unsure(), &site, &me)
        };
        assert_eq!(answered(Answer::Taken(me.clone())), unsure());
        // By an agent of this host that may have given it, and is no more.
        assert_eq!(answered(Answer::Taken("a has it, agent 0".into())), []);
        assert_eq!(answered(Answer::Done("it was done".into())), []);
        assert_eq!(landed(Vec::new(), &site, &me), [], "nobody here tried");
    }

    #[test]
    fn a_switch_over_is_done_when_somebody_serves_in_a_later_reign() {
        let gone = || Err(io::Error::from(ErrorKind::NotFound));
        let answer = outcome(&given(), "kv", &served_by("b", 5), &gone(), 0);
        assert_eq!(answer, Some(Answer::Done("b serves it in epoch 5".into())));
        // Its process is gone and the heir has not spoken yet.
        assert_eq!(outcome(&given(), "kv", &site(&["b"]), &gone(), 999), None);
        let late = outcome(&given(), "kv", &site(&["b"]), &gone(), 1000);
        assert!(matches!(late, Some(Answer::Failed(why)) if why.contains("has ended")));
        let silent = || Err(io::Error::from(ErrorKind::WouldBlock));
        assert_eq!(
            outcome(&given(), "kv", &served_by("a", 4), &silent(), 0),
            None
        );
        let late = outcome(&given(), "kv", &served_by("a", 4), &silent(), 1000);
        assert!(matches!(late, Some(Answer::Failed(why)) if why.contains("10 s")));
    }
}
