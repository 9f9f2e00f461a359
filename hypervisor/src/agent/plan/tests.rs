//! Single situations, and a site that is played through with hosts that come and go.

use proptest::prelude::*;

use super::*;
use crate::agent::disks::{DiskLife, DiskSpec, ImageReport};
use crate::agent::record::{Assigned, Drain, Says};
use crate::agent::tests::{host, put, role_of, site, vm};
use crate::protocol::record::{Identity, Record};

fn local(me: &str) -> Local {
    Local {
        me: me.to_owned(),
        now_ms: 100_000,
        settled: true,
        ..Local::default()
    }
}

fn on(host: &str, number: u64) -> Assigned {
    Assigned {
        host: host.to_owned(),
        number,
        since_ms: 100_000,
    }
}

fn written(acts: &[Act]) -> Option<&Vm> {
    acts.iter().find_map(|act| match act {
        Act::Write { vm, .. } => Some(&**vm),
        _ => None,
    })
}

fn starts(acts: &[Act]) -> Vec<Start> {
    let of = acts.iter().filter_map(|act| match act {
        Act::Start { what, .. } => Some(*what),
        _ => None,
    });
    of.collect()
}

fn running(backup: Option<Assigned>) -> Vm {
    Vm {
        phase: Phase::Running,
        number: backup.as_ref().map_or(1, |on| on.number),
        backup,
        ..vm("kv")
    }
}

fn add(site: &mut Site, host: &str, role: Role, standing: Standing) {
    let host = site.hosts.get_mut(host).unwrap();
    host.value.roles.push(role_of("kv", role, standing));
}

#[test]
fn a_start_is_placed_by_whoever_sees_it_and_carried_out_by_one() {
    let mut site = site(&["a", "b"]);
    put(&mut site, vm("kv"));
    for me in ["a", "b"] {
        let acts = plan(&site, &local(me));
        let placed = written(&acts).unwrap();
        assert!(matches!(&placed.phase, Phase::Starting { on: Some(on), .. } if on.host == "a"));
        assert!(matches!(acts[..], [Act::Write { places: true, .. }]));
    }
    let mut placed = vm("kv");
    placed.phase = Phase::Starting {
        on: Some(on("a", 1)),
        cold: false,
    };
    put(&mut site, placed);
    assert_eq!(
        starts(&plan(&site, &local("a"))),
        [Start::Primary { cold: Cold::No }]
    );
    assert_eq!(plan(&site, &local("b")), []);
    // A process that says nothing yet is one all the same.
    let mut busy = local("a");
    busy.held.insert("kv".into(), 1);
    assert_eq!(plan(&site, &busy), []);
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    assert_eq!(
        written(&plan(&site, &local("a"))).unwrap().phase,
        Phase::Running
    );
}

#[test]
fn a_start_that_fails_is_tried_elsewhere_but_a_cold_one_is_not() {
    let mut site = site(&["a", "b"]);
    let mut placed = vm("kv");
    placed.phase = Phase::Starting {
        on: Some(on("a", 1)),
        cold: false,
    };
    put(&mut site, placed.clone());
    let mut ended = local("a");
    ended.ended.insert(
        "kv".into(),
        Ended {
            number: 1,
            why: "no KVM".into(),
        },
    );
    let after = written(&plan(&site, &ended)).unwrap().clone();
    assert_eq!(
        after.phase,
        Phase::Starting {
            on: None,
            cold: false
        }
    );
    assert!(after.avoids("a", 100_000) && after.note.as_ref().unwrap().contains("no KVM"));
    put(&mut site, after);
    let next = written(&plan(&site, &local("b"))).unwrap().clone();
    assert!(matches!(next.phase, Phase::Starting { on: Some(on), .. } if on.host == "b"));

    placed.phase = Phase::Starting {
        on: Some(on("a", 1)),
        cold: true,
    };
    put(&mut site, placed);
    let after = written(&plan(&site, &ended)).unwrap().clone();
    assert!(matches!(after.phase, Phase::Failed { why } if why == "no KVM"));
    // Its host is away: somebody else's start may be the second one.
    site.hosts.remove("a");
    assert_eq!(plan(&site, &local("b")), []);
}

/// Two operators, or one that tries again: the first one's process is seen only now.
#[test]
fn a_cold_start_is_not_carried_out_while_another_host_has_a_process() {
    let mut site = site(&["a", "b"]);
    let mut placed = vm("kv");
    placed.phase = Phase::Starting {
        on: Some(on("b", 2)),
        cold: true,
    };
    put(&mut site, placed.clone());
    let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
    site.records.insert("kv".into(), live);
    let from = Cold::From(live.reign());
    assert_eq!(
        starts(&plan(&site, &local("b"))),
        [Start::Primary { cold: from }]
    );
    add(&mut site, "a", Role::Primary, Standing::Starting);
    let acts = plan(&site, &local("b"));
    assert_eq!(starts(&acts), []);
    let after = written(&acts).unwrap().clone();
    assert!(after.note.as_ref().unwrap().contains("a process of it"));
    // Where the arbiter decides it may come to nothing by itself.
    placed.phase = Phase::Starting {
        on: Some(on("b", 2)),
        cold: false,
    };
    put(&mut site, placed);
    assert_eq!(
        starts(&plan(&site, &local("b"))),
        [Start::Primary { cold: Cold::No }]
    );
}

/// The agent stalls for as long as it likes between its last look and the start: the start is from the record that the operator knew of.
#[test]
fn a_cold_start_is_from_the_record_that_its_operator_knew_of() {
    let mut site = site(&["a"]);
    let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
    let later = Record::cold_start(Some(&live), Identity::from_bytes([2; 16]), None);
    let mut placed = vm("kv");
    placed.phase = Phase::Starting {
        on: Some(on("a", 2)),
        cold: true,
    };
    placed.cold_from = Some(live.reign());
    put(&mut site, placed.clone());
    site.records.insert("kv".into(), later);
    let starts_of = |site: &Site| match starts(&plan(site, &local("a")))[..] {
        [Start::Primary { cold }] => cold,
        ref other => panic!("{other:?}"),
    };
    let cold = starts_of(&site);
    assert_eq!(cold, Cold::From(live.reign()));
    assert!(!Record::lets_start(Some(&later), cold));
    // Ordered by a program that names none.
    placed.cold_from = None;
    put(&mut site, placed);
    assert_eq!(starts_of(&site), Cold::From(later.reign()));
    // Where the record lets anybody start it, nothing has to be said.
    site.records.insert("kv".into(), later.ended());
    assert_eq!(starts_of(&site), Cold::No);
    site.records.clear();
    assert_eq!(starts_of(&site), Cold::No);
    site.unreadable.insert("kv".into());
    assert_eq!(starts_of(&site), Cold::Whatever);
}

/// A machine was noted to be lost and deleted, and its name given again; then the host comes back on which it ran all the time.
#[test]
fn what_is_left_of_a_deleted_machine_is_not_taken_for_the_one_that_has_its_name() {
    let mut site = site(&["a", "b"]);
    put(&mut site, running(Some(on("b", 2))));
    let left = |role, standing| RoleReport {
        instance: Some("0".into()),
        ..role_of("kv", role, standing)
    };
    let put_left = |site: &mut Site, host: &str, role| {
        site.hosts.get_mut(host).unwrap().value.roles = vec![role];
    };
    put_left(&mut site, "a", left(Role::Primary, Standing::Protected));
    put_left(&mut site, "b", left(Role::Backup, Standing::Following));
    assert!(site.serving("kv").is_none() && site.following("kv").is_none());
    assert!(site.is_anywhere("kv"), "nobody starts it beside");
    for me in ["a", "b"] {
        assert_eq!(plan(&site, &local(me)), [], "what may serve is left alone");
    }
    // One that only waits would take the new machine's copy, onto the old one's disk.
    put_left(&mut site, "b", left(Role::Backup, Standing::Waiting));
    let ended = Act::EndBackup {
        machine: "kv".into(),
        pid: 100,
    };
    assert_eq!(plan(&site, &local("b")), [ended]);
    let own = |role| RoleReport {
        instance: Some(vm("kv").instance),
        ..role
    };
    put_left(&mut site, "b", own(left(Role::Backup, Standing::Waiting)));
    assert_eq!(plan(&site, &local("b")), []);
    put_left(
        &mut site,
        "a",
        own(left(Role::Primary, Standing::Unprotected)),
    );
    assert_eq!(site.serving("kv").unwrap().0.name, "a");
    // Turning the new one off says what is in the way.
    put_left(&mut site, "a", left(Role::Primary, Standing::Unprotected));
    site.hosts.get_mut("b").unwrap().value.roles.clear();
    let stopping = Vm {
        phase: Phase::Stopping,
        ..vm("kv")
    };
    put(&mut site, stopping);
    let acts = plan(&site, &local("a"));
    let said = written(&acts).unwrap().note.clone().unwrap();
    assert!(said.contains("host a has a process"), "{said}");
    assert!(!acts.iter().any(|act| matches!(act, Act::PowerOff { .. })));
}

/// The record of a machine that runs out of every agent's sight was lost, or was written by a newer version: nobody has turned it off.
#[test]
fn a_machine_whose_record_is_gone_is_not_taken_for_one_that_is_off() {
    let mut site = site(&["a"]);
    put(&mut site, running(None));
    assert_eq!(plan(&site, &local("a")), []);
    site.unreadable.insert("kv".into());
    assert_eq!(plan(&site, &local("a")), []);
    let stopping = Vm {
        phase: Phase::Stopping,
        ..vm("kv")
    };
    put(&mut site, stopping);
    assert_eq!(plan(&site, &local("a")), []);
    site.unreadable.clear();
    let after = plan(&site, &local("a"));
    assert_eq!(written(&after).unwrap().phase, Phase::Stopped);
}

#[test]
fn a_survivor_gets_a_backup_on_another_host() {
    let mut site = site(&["a", "b", "c"]);
    site.hosts.remove("a");
    add(&mut site, "b", Role::Primary, Standing::Unprotected);
    put(&mut site, running(Some(on("b", 2))));
    let acts = plan(&site, &local("b"));
    let after = written(&acts).unwrap().clone();
    assert_eq!(after.backup.as_ref().unwrap().host, "c");
    assert_eq!(plan(&site, &local("c")), [], "it is no business of c's yet");
    put(&mut site, after);
    assert_eq!(starts(&plan(&site, &local("c"))), [Start::Backup]);
    add(&mut site, "c", Role::Backup, Standing::Waiting);
    assert_eq!(plan(&site, &local("c")), []);
    // Nothing is placed by an agent that has just come, for want of those that have not yet.
    put(&mut site, running(None));
    let young = Local {
        settled: false,
        ..local("b")
    };
    assert!(written(&plan(&site, &young)).is_none());
}

#[test]
fn a_machine_that_is_protected_is_left_alone_whoever_is_away() {
    let mut site = site(&["a", "b", "c"]);
    add(&mut site, "a", Role::Primary, Standing::Protected);
    put(&mut site, running(Some(on("b", 2))));
    site.hosts.remove("b");
    assert!(written(&plan(&site, &local("a"))).is_none());
    // The backup that follows is another's: the record is what is put right.
    add(&mut site, "c", Role::Backup, Standing::Following);
    let after = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(after.backup.unwrap().host, "c");
    assert!(
        !plan(&site, &local("c"))
            .iter()
            .any(|act| matches!(act, Act::EndBackup { .. }))
    );
}

#[test]
fn a_backup_that_ended_is_replaced_and_its_host_left_out_for_a_while() {
    let mut site = site(&["a", "b", "c"]);
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    put(&mut site, running(Some(on("b", 2))));
    let mut ended = local("b");
    ended.ended.insert(
        "kv".into(),
        Ended {
            number: 2,
            why: "diverged".into(),
        },
    );
    let after = written(&plan(&site, &ended)).unwrap().clone();
    assert!(after.backup.is_none());
    put(&mut site, after);
    let after = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(after.backup.unwrap().host, "c");
}

#[test]
fn a_backup_whose_host_is_away_is_replaced_once_that_is_sure() {
    let mut site = site(&["a", "c"]);
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    put(&mut site, running(Some(on("b", 2))));
    let after = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(after.backup.unwrap().host, "c");
    let young = Local {
        settled: false,
        ..local("a")
    };
    assert!(written(&plan(&site, &young)).is_none());
}

#[test]
fn a_backup_that_never_joins_makes_room_for_another() {
    let mut site = site(&["a", "b", "c"]);
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    add(&mut site, "b", Role::Backup, Standing::Waiting);
    let mut machine = running(Some(on("b", 2)));
    machine.backup.as_mut().unwrap().since_ms = 39_000;
    put(&mut site, machine);
    let after = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(after.backup.as_ref().unwrap().host, "c");
    put(&mut site, after);
    assert!(matches!(
        plan(&site, &local("b"))[..],
        [Act::EndBackup { pid: 100, .. }]
    ));
}

#[test]
fn protection_is_taken_away_and_given_back() {
    let mut site = site(&["a", "b"]);
    add(&mut site, "a", Role::Primary, Standing::Protected);
    add(&mut site, "b", Role::Backup, Standing::Following);
    put(
        &mut site,
        Vm {
            protect: false,
            ..running(Some(on("b", 2)))
        },
    );
    assert!(matches!(
        plan(&site, &local("b"))[..],
        [Act::EndBackup { .. }]
    ));
    assert!(written(&plan(&site, &local("a"))).unwrap().backup.is_none());
}

#[test]
fn stopping_ends_with_the_record_and_never_before() {
    let mut site = site(&["a", "b"]);
    let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
    site.records.insert("kv".into(), live);
    put(
        &mut site,
        Vm {
            phase: Phase::Stopping,
            ..running(None)
        },
    );
    // Out of sight, and alive for all that anybody knows.
    assert_eq!(plan(&site, &local("b")), []);
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    assert!(matches!(
        plan(&site, &local("a"))[..],
        [Act::PowerOff { .. }]
    ));
    assert_eq!(plan(&site, &local("b")), []);
    site.hosts.get_mut("a").unwrap().value.roles.clear();
    assert_eq!(plan(&site, &local("b")), []);
    site.records.insert("kv".into(), live.ended());
    assert_eq!(
        written(&plan(&site, &local("b"))).unwrap().phase,
        Phase::Stopped
    );
}

#[test]
fn a_guest_that_turned_itself_off_stays_off_and_a_lost_one_is_not_started_anew() {
    let mut site = site(&["a", "b"]);
    let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
    site.records.insert("kv".into(), live);
    put(&mut site, running(Some(on("b", 2))));
    assert!(written(&plan(&site, &local("a"))).is_none());
    site.records.insert("kv".into(), live.ended());
    assert_eq!(
        written(&plan(&site, &local("a"))).unwrap().phase,
        Phase::Stopped
    );
}

#[test]
fn whoever_serves_is_told_of_every_other_host() {
    let mut site = site(&["a", "b"]);
    add(&mut site, "a", Role::Primary, Standing::Protected);
    add(&mut site, "b", Role::Backup, Standing::Following);
    put(&mut site, running(Some(on("b", 2))));
    let place = host("b").place(7700);
    let acts = plan(&site, &local("a"));
    assert!(matches!(&acts[..], [Act::Tell { place: to, .. }] if *to == place));
    let mut told = local("a");
    told.told.insert((100, place));
    assert_eq!(plan(&site, &told), []);
}

#[test]
fn a_machine_whose_newest_image_is_away_waits_and_says_for_what() {
    let mut site = site(&["a", "b"]);
    let live = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
    site.records.insert("kv".into(), live.ended());
    let mut db = vm("kv");
    db.spec.disk = Some(DiskSpec::Empty { bytes: 512 });
    db.disk = Some(DiskLife {
        hosts: ["c".to_owned()].into(),
        ..DiskLife::default()
    });
    put(&mut site, db);
    let mut waits = written(&plan(&site, &local("a"))).unwrap().clone();
    let note = waits.note.clone().unwrap();
    assert!(note.contains("c, whose agent is away"), "{note}");
    put(&mut site, waits.clone());
    assert_eq!(plan(&site, &local("b")), [], "it is said once");

    // An operator's word: with what b has.
    let image = ImageReport {
        machine: "kv".into(),
        instance: waits.instance.clone(),
        bytes: 512,
        mark: None,
    };
    site.hosts.get_mut("b").unwrap().value.images = Some(vec![image]);
    waits.disk.as_mut().unwrap().of = Some("b".into());
    put(&mut site, waits);
    let placed = written(&plan(&site, &local("a"))).unwrap().clone();
    assert!(matches!(&placed.phase, Phase::Starting { on: Some(on), .. } if on.host == "b"));
    let life = placed.disk.as_ref().unwrap();
    assert!(
        life.hosts.iter().eq(["b", "c"]),
        "who may have an image is known before it is made"
    );
    put(&mut site, placed);
    assert_eq!(starts(&plan(&site, &local("b"))).len(), 1);
    // Once it runs, the next start is by marks again.
    add(&mut site, "b", Role::Primary, Standing::Unprotected);
    let runs = written(&plan(&site, &local("b"))).unwrap().clone();
    assert_eq!((runs.phase, runs.disk.unwrap().of), (Phase::Running, None));
}

fn drain(site: &mut Site, host: &str) {
    let value = Drain {
        host: host.to_owned(),
        since_ms: 0,
        boot: None,
    };
    site.drains
        .insert(host.to_owned(), Kept { value, revision: 1 });
}

#[test]
fn a_drained_host_is_given_nothing_and_what_it_serves_leaves_it() {
    let mut site = site(&["a", "b", "c"]);
    drain(&mut site, "a");
    put(&mut site, vm("kv"));
    let placed = written(&plan(&site, &local("c"))).unwrap().clone();
    assert!(matches!(placed.phase, Phase::Starting { on: Some(on), .. } if on.host == "b"));

    add(&mut site, "a", Role::Primary, Standing::Protected);
    add(&mut site, "b", Role::Backup, Standing::Following);
    put(&mut site, running(Some(on("b", 2))));
    let acts = plan(&site, &local("a"));
    assert!(
        acts.iter()
            .any(|act| matches!(act, Act::Switch { pid: 100, .. })),
        "{acts:?}"
    );
    let mut by_checkpoint = running(Some(on("b", 2)));
    by_checkpoint.spec.replicate = Replication::Checkpoint;
    put(&mut site, by_checkpoint);
    let acts = plan(&site, &local("a"));
    assert!(
        acts.iter()
            .any(|act| matches!(act, Act::Fail { pid: 100, .. })),
        "{acts:?}"
    );
    // Not to somebody who has to leave as well, and has not been replaced yet.
    drain(&mut site, "b");
    put(&mut site, running(Some(on("b", 2))));
    let acts = plan(&site, &local("a"));
    assert!(
        !acts.iter().any(|act| matches!(act, Act::Switch { .. })),
        "{acts:?}"
    );
    assert_eq!(written(&acts).unwrap().backup.as_ref().unwrap().host, "c");
}

#[test]
fn what_was_drained_for_a_shutdown_ends_with_it() {
    let mut drain = Drain {
        host: "a".into(),
        since_ms: 0,
        boot: Some("first".into()),
    };
    assert!(!drain.is_over("first") && drain.is_over("second"));
    drain.boot = None;
    assert!(!drain.is_over("second"));
}

#[test]
fn a_machine_without_a_backup_gets_one_to_leave_a_drained_host() {
    let mut site = site(&["a", "b"]);
    drain(&mut site, "a");
    add(&mut site, "a", Role::Primary, Standing::Unprotected);
    let alone = Vm {
        protect: false,
        ..running(None)
    };
    put(&mut site, alone);
    let placed = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(placed.backup.as_ref().unwrap().host, "b");
    put(&mut site, placed);
    assert_eq!(starts(&plan(&site, &local("b"))), [Start::Backup]);
    add(&mut site, "b", Role::Backup, Standing::Following);
    assert!(
        !plan(&site, &local("b"))
            .iter()
            .any(|act| matches!(act, Act::EndBackup { .. }))
    );
}

#[test]
fn a_backup_leaves_a_drained_host_by_being_replaced_and_stays_if_nobody_can() {
    let mut site = site(&["a", "b", "c"]);
    drain(&mut site, "b");
    add(&mut site, "a", Role::Primary, Standing::Protected);
    add(&mut site, "b", Role::Backup, Standing::Following);
    put(&mut site, running(Some(on("b", 2))));
    let placed = written(&plan(&site, &local("a"))).unwrap().clone();
    assert_eq!(placed.backup.as_ref().unwrap().host, "c");
    put(&mut site, placed);
    assert_eq!(starts(&plan(&site, &local("c"))), [Start::Backup]);
    add(&mut site, "c", Role::Backup, Standing::Waiting);
    let place = host("c").place(7700);
    let acts = plan(&site, &local("a"));
    assert!(
        acts.iter()
            .any(|act| matches!(act, Act::Migrate { place: to, .. } if *to == place))
    );

    site.hosts.remove("c");
    put(&mut site, running(Some(on("b", 2))));
    let acts = plan(&site, &local("a"));
    let after = written(&acts).unwrap().clone();
    assert_eq!(after.backup.as_ref().unwrap().host, "b");
    assert!(after.note.as_ref().unwrap().contains("stays on b"));
    put(&mut site, after);
    assert!(
        written(&plan(&site, &local("a"))).is_none(),
        "it is said once"
    );
    // One that is replicated by checkpoints ends as soon as there is another host for it, and not before.
    let mut by_checkpoint = running(Some(on("b", 2)));
    by_checkpoint.spec.replicate = Replication::Checkpoint;
    put(&mut site, by_checkpoint);
    let ends = |site: &Site| {
        let acts = plan(site, &local("b"));
        acts.iter().any(|act| matches!(act, Act::EndBackup { .. }))
    };
    assert!(!ends(&site));
    let kept = Kept {
        value: host("c"),
        revision: 1,
    };
    site.hosts.insert("c".into(), kept);
    assert!(ends(&site));
}

/// A host of the play.
#[derive(Clone, Debug, Default)]
struct Actor {
    up: bool,
    /// Its agent, and so its lease.
    agent: bool,
    roles: Vec<(Role, Standing, u64)>,
    ended: BTreeMap<String, Ended>,
}

/// What happens to the site between two rounds.
#[derive(Clone, Copy, Debug)]
enum Chance {
    HostDies(usize),
    HostComes(usize),
    AgentDies(usize),
    AgentComes(usize),
    BackupDies(usize),
    Drain(usize),
    Undrain(usize),
}

fn chances() -> impl Strategy<Value = Vec<Chance>> {
    let one = prop_oneof![
        (0..3usize).prop_map(Chance::HostDies),
        (0..3usize).prop_map(Chance::HostComes),
        (0..3usize).prop_map(Chance::AgentDies),
        (0..3usize).prop_map(Chance::AgentComes),
        (0..3usize).prop_map(Chance::BackupDies),
        (0..3usize).prop_map(Chance::Drain),
        (0..3usize).prop_map(Chance::Undrain),
    ];
    prop::collection::vec(one, 0..12)
}

/// Three hosts, one machine; roles do what roles do.
#[derive(Debug)]
struct Play {
    actors: Vec<Actor>,
    vm: Kept<Vm>,
    record: Option<Record>,
    drained: BTreeSet<usize>,
    placements: i64,
    now: u64,
}

const NAMES: [&str; 3] = ["h0", "h1", "h2"];

impl Play {
    fn new() -> Self {
        let up = Actor {
            up: true,
            agent: true,
            ..Actor::default()
        };
        Self {
            actors: vec![up.clone(), up.clone(), up],
            vm: Kept {
                value: vm("kv"),
                revision: 1,
            },
            record: None,
            drained: BTreeSet::new(),
            placements: 0,
            now: 1_000_000,
        }
    }

    fn site(&self) -> Site {
        let mut site = Site {
            placements: self.placements,
            ..Site::default()
        };
        for (name, actor) in NAMES.iter().zip(&self.actors) {
            if actor.up && actor.agent {
                let mut value = host(name);
                value.roles = actor
                    .roles
                    .iter()
                    .map(|(role, standing, epoch)| RoleReport {
                        machine: "kv".into(),
                        pid: 100,
                        instance: None,
                        says: Some(Says {
                            role: *role,
                            standing: *standing,
                            epoch: *epoch,
                            position: 0,
                        }),
                    })
                    .collect();
                site.hosts
                    .insert((*name).to_owned(), Kept { value, revision: 1 });
            }
        }
        for at in &self.drained {
            drain(&mut site, NAMES[*at]);
        }
        site.vms.insert("kv".into(), self.vm.clone());
        site.records
            .extend(self.record.map(|record| ("kv".to_owned(), record)));
        site
    }

    /// Who serves, and who follows.
    fn holders(&self) -> (Vec<usize>, Vec<usize>) {
        let of = |wanted: Role| {
            let all = self.actors.iter().enumerate();
            let have = all.filter(|(_, actor)| {
                actor
                    .roles
                    .iter()
                    .any(|(role, standing, _)| *role == wanted && *standing != Standing::Waiting)
            });
            have.map(|(at, _)| at).collect()
        };
        (of(Role::Primary), of(Role::Backup))
    }

    fn chance(&mut self, chance: Chance) {
        // Two losses at once are more than a pair survives; the next one comes when it is protected again.
        let (primaries, backups) = self.holders();
        let spared = |at: usize| primaries == [at] && backups.is_empty() && self.record.is_some();
        match chance {
            Chance::HostDies(at) if !spared(at) => {
                self.actors[at] = Actor::default();
                self.lose();
            }
            Chance::HostComes(at) if !self.actors[at].up => {
                self.actors[at] = Actor {
                    up: true,
                    agent: true,
                    ..Actor::default()
                };
            }
            Chance::AgentDies(at) => {
                self.actors[at].agent = false;
                self.actors[at].ended.clear();
            }
            Chance::AgentComes(at) => self.actors[at].agent = true,
            Chance::BackupDies(at) => {
                let actor = &mut self.actors[at];
                let before = actor.roles.len();
                actor.roles.retain(|(role, ..)| *role != Role::Backup);
                if actor.roles.len() < before && actor.agent {
                    let number = self.vm.value.backup.as_ref().map_or(0, |on| on.number);
                    actor.ended.insert(
                        "kv".into(),
                        Ended {
                            number,
                            why: "it died".into(),
                        },
                    );
                }
                self.lose();
            }
            Chance::Drain(at) => {
                self.drained.insert(at);
            }
            Chance::Undrain(at) => {
                self.drained.remove(&at);
            }
            _ => {}
        }
    }

    /// What the pair makes of a loss.
    fn lose(&mut self) {
        let (primaries, backups) = self.holders();
        if primaries.is_empty()
            && let [heir] = backups[..]
        {
            let epoch = self.record.map_or(1, |record| record.epoch.0) + 1;
            self.actors[heir].roles = vec![(Role::Primary, Standing::Unprotected, epoch)];
            self.record.as_mut().unwrap().epoch.0 = epoch;
        } else if let [serves] = primaries[..]
            && backups.is_empty()
        {
            self.actors[serves].roles[0].1 = Standing::Unprotected;
        }
    }

    fn act(&mut self, at: usize, act: Act) -> Result<(), TestCaseError> {
        match act {
            Act::Write {
                vm,
                revision,
                places,
            } => {
                if revision == self.vm.revision {
                    self.placements += i64::from(places);
                    self.vm = Kept {
                        value: *vm,
                        revision: revision + 1,
                    };
                }
            }
            Act::Start {
                what: Start::Primary { cold },
                ..
            } => {
                prop_assert!(!cold.is_cold());
                prop_assert!(self.actors[at].roles.is_empty());
                if self.record.is_none() {
                    self.record = Some(Record::cold_start(
                        None,
                        Identity::from_bytes([1; 16]),
                        None,
                    ));
                    self.actors[at]
                        .roles
                        .push((Role::Primary, Standing::Unprotected, 1));
                }
            }
            Act::Start {
                what: Start::Backup,
                ..
            } => {
                prop_assert!(
                    self.actors[at].roles.is_empty(),
                    "two of its roles on one host"
                );
                self.actors[at]
                    .roles
                    .push((Role::Backup, Standing::Waiting, 0));
            }
            Act::EndBackup { .. } => {
                let follows = self.actors[at]
                    .roles
                    .iter()
                    .any(|(_, standing, _)| *standing == Standing::Following);
                prop_assert!(!follows, "protection was taken away");
                self.actors[at]
                    .roles
                    .retain(|(role, ..)| *role != Role::Backup);
            }
            Act::Switch { .. } => {
                let (primaries, backups) = self.holders();
                prop_assert_eq!((&primaries[..], backups.len()), (&[at][..], 1));
                prop_assert!(self.drained.contains(&at));
                self.actors[at].roles.clear();
                self.lose();
            }
            Act::Migrate { place, .. } => {
                let (primaries, backups) = self.holders();
                prop_assert_eq!((&primaries[..], backups.len()), (&[at][..], 1));
                let to = NAMES
                    .iter()
                    .position(|name| host(name).place(7700) == place);
                let to = &mut self.actors[to.unwrap()].roles;
                prop_assert_eq!(to.len(), 1);
                to[0].1 = Standing::Following;
                self.actors[backups[0]].roles.clear();
            }
            Act::PowerOff { .. } | Act::Fail { .. } => prop_assert!(false, "nobody wanted that"),
            Act::Tell { .. } => {}
        }
        Ok(())
    }

    /// Every agent looks and acts; then the recruiter of whoever serves.
    fn round(&mut self) -> Result<(), TestCaseError> {
        self.now += 1000;
        for (at, me) in NAMES.iter().enumerate() {
            let actor = &self.actors[at];
            if !(actor.up && actor.agent) {
                continue;
            }
            let mut sees = Local {
                now_ms: self.now,
                ended: actor.ended.clone(),
                ..local(me)
            };
            sees.held.insert("kv".into(), actor.roles.len());
            for act in plan(&self.site(), &sees) {
                self.act(at, act)?;
            }
        }
        let waiting = self.actors.iter().position(|actor| {
            actor
                .roles
                .iter()
                .any(|(_, standing, _)| *standing == Standing::Waiting)
        });
        let (primaries, backups) = self.holders();
        if let (Some(waiting), [serves], []) = (waiting, &primaries[..], &backups[..]) {
            self.actors[waiting].roles[0].1 = Standing::Following;
            self.actors[*serves].roles[0].1 = Standing::Protected;
        }
        Ok(())
    }
}

impl Play {
    /// All is quiet for as long as the longest back-off: then both sides are there.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..80 {
            self.round()?;
        }
        let (primaries, backups) = self.holders();
        prop_assert_eq!((primaries.len(), backups.len()), (1, 1), "{:?}", self);
        prop_assert_eq!(&self.vm.value.phase, &Phase::Running);
        let follows = NAMES[backups[0]];
        prop_assert_eq!(&self.vm.value.backup.as_ref().unwrap().host, follows);
        Ok(())
    }
}

proptest! {
    /// Whatever happens to hosts, agents and backups, and whatever is drained, as long as no machine loses both sides at once: nothing is started twice, nobody who
    /// follows is ended, and when all is quiet the machine has its two sides on two hosts again, and none on one that is drained.
    #[test]
    fn a_machine_is_protected_again_whatever_happens(story in chances(), lost in 0..NAMES.len()) {
        let mut play = Play::new();
        for chance in story {
            play.chance(chance);
            for _ in 0..3 {
                play.round()?;
            }
        }
        for at in 0..NAMES.len() {
            play.chance(Chance::HostComes(at));
            play.chance(Chance::AgentComes(at));
            play.chance(Chance::Undrain(at));
        }
        play.settle()?;
        play.chance(Chance::Drain(lost));
        play.settle()?;
        prop_assert!(play.actors[lost].roles.is_empty(), "{:?}", play);
        // And on the two others, if one is lost for good.
        play.chance(Chance::HostDies(lost));
        play.settle()?;
        prop_assert!(!play.actors[lost].up);
    }
}
