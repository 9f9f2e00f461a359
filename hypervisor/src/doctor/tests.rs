use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::arbiter::Place;
use crate::kvm::{Capabilities, CpuModel, KvmSource};
use crate::scheduling::Urgency;

/// A root with these files.
fn root(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

fn gather(root: &Path) -> Facts {
    Facts::gather(&Host {
        root: root.to_owned(),
        kvm: KvmSource::Path(root.join("dev/kvm")),
        try_things: false,
    })
}

fn probe() -> Probe {
    let rings = |ring0, ring3| Rings {
        ring0: Ok(ring0),
        ring3: Ok(ring3),
    };
    let yes = || Rings {
        ring0: Ok(true),
        ring3: Ok(true),
    };
    Probe {
        port_exit_ns: rings(2000, 2500),
        mmio_exit_ns: rings(3000, 3500),
        instruction_ns: Rings {
            ring0: Ok(0.5),
            ring3: Ok(0.5),
        },
        kick: Ok(KickTime {
            p50_ns: 20_000,
            max_ns: 90_000,
        }),
        sse_in_ring0: Ok(true),
        single_step: yes(),
        msr_exits: Ok(true),
        template_holds: yes(),
        rdtsc_runs: Ok(false),
        dirty_log: Ok(true),
        took_ms: 300,
    }
}

/// A host that lacks nothing.
fn best() -> Facts {
    Facts {
        kvm: KvmFacts::Open {
            capabilities: Capabilities {
                dirty_ring: 65_536,
                guest_debug: true,
                tsc_scaling: true,
                vcpus: 8,
                missing: Vec::new(),
                no_crew: Vec::new(),
                moves_time_stamps: true,
            },
            cpu: Some(CpuModel {
                vendor: "AuthenticAMD".into(),
                signature: 0xa1_0f11,
            }),
            probe: Some(Box::new(probe())),
        },
        cpu_name: Some("AMD EPYC".into()),
        virtual_machine: false,
        cpus: (0..8).collect(),
        cores: 8,
        isolated: vec![4, 5, 6, 7],
        autogroups: Some(false),
        lock_limit: None,
        memory_available: Some(8 << 30),
        huge_pages_free: 0,
        shared_huge_pages: Some("advise".into()),
        stage: StageFacts::Works {
            user_namespace: false,
        },
        rdma: vec![RdmaDevice {
            name: "mlx5_0".into(),
            state: "4: ACTIVE".into(),
            link: "Ethernet".into(),
        }],
        verbs: VerbsFacts::Works {
            devices: vec!["mlx5_0".into()],
        },
        pmu: PmuFacts::Works,
        clock_source: Some("tsc".into()),
        clock_read_ns: 25,
        urgency: Some(Urgency::RealTime),
    }
}

fn with_probe(change: impl FnOnce(&mut Probe)) -> Facts {
    let mut facts = best();
    let KvmFacts::Open {
        probe: Some(probe), ..
    } = &mut facts.kvm
    else {
        unreachable!()
    };
    change(probe);
    facts
}

#[test]
fn the_best_host_lacks_nothing() {
    let (ways, findings) = judge(&best());
    assert_eq!(ways, ["shm+tap", "shm+link"]);
    for finding in findings {
        assert_eq!(finding.level, Level::Good, "{finding:?}");
    }
}

/// Every lack is found, said, and comes with something to do about it.
#[test]
fn each_lack_is_named_with_its_remedy() {
    let set = |change: fn(&mut Facts)| {
        let mut facts = best();
        change(&mut facts);
        facts
    };
    fn no<T>(why: &str) -> Measured<T> {
        Err(why.to_owned())
    }
    let cases: Vec<(Facts, Level, &str)> = vec![
        (
            with_probe(|p| p.instruction_ns.ring0 = Ok(700.0)),
            Level::Limited,
            "emulated",
        ),
        (
            with_probe(|p| p.sse_in_ring0 = Ok(false)),
            Level::Limited,
            "SSE",
        ),
        (
            with_probe(|p| p.single_step.ring3 = Ok(false)),
            Level::Limited,
            "ring 0 only",
        ),
        (
            with_probe(|p| p.single_step.ring0 = no("x")),
            Level::Limited,
            "does not work",
        ),
        (
            with_probe(|p| p.msr_exits = Ok(false)),
            Level::Missing,
            "MSRs",
        ),
        (
            with_probe(|p| p.template_holds.ring3 = Ok(false)),
            Level::Limited,
            "CPUID in ring 3",
        ),
        (
            with_probe(|p| p.rdtsc_runs = Ok(true)),
            Level::Limited,
            "RDTSC",
        ),
        (
            with_probe(|p| p.dirty_log = no("gone")),
            Level::Missing,
            "(gone)",
        ),
        (
            with_probe(|p| p.port_exit_ns.ring3 = Ok(130_000)),
            Level::Limited,
            "130.0 µs",
        ),
        (
            with_probe(|p| p.kick = no("no thread")),
            Level::Limited,
            "no thread",
        ),
        (
            with_probe(|p| {
                p.kick = Ok(KickTime {
                    p50_ns: 900_000,
                    max_ns: 900_000,
                });
            }),
            Level::Limited,
            "900.0 µs",
        ),
        (set(|f| f.cores = 1), Level::Limited, "share it"),
        (set(|f| f.cores = 2), Level::Limited, "gets one"),
        (set(|f| f.isolated.clear()), Level::Limited, "no core"),
        (
            set(|f| f.autogroups = Some(true)),
            Level::Limited,
            "by session",
        ),
        (
            set(|f| f.lock_limit = Some(64 << 10)),
            Level::Limited,
            "may be locked",
        ),
        (
            set(|f| f.memory_available = Some(100 << 20)),
            Level::Limited,
            "100 MiB",
        ),
        (
            set(|f| f.shared_huge_pages = Some("never".into())),
            Level::Limited,
            "never",
        ),
        (
            set(|f| {
                f.stage = StageFacts::Refused {
                    why: "not root".into(),
                }
            }),
            Level::Limited,
            "not root",
        ),
        (
            set(|f| f.stage = StageFacts::NotTried),
            Level::Limited,
            "not tried",
        ),
        (set(|f| f.rdma.clear()), Level::Limited, "no RDMA"),
        (
            set(|f| f.rdma[0].state = "1: DOWN".into()),
            Level::Limited,
            "DOWN",
        ),
        (
            set(|f| {
                f.verbs = VerbsFacts::Missing {
                    why: "libdoppel_verbs.so does not exist".into(),
                }
            }),
            Level::Limited,
            "libdoppel_verbs.so does not exist",
        ),
        (
            set(|f| {
                f.verbs = VerbsFacts::Works {
                    devices: Vec::new(),
                }
            }),
            Level::Limited,
            "does not see mlx5_0",
        ),
        (
            set(|f| f.pmu = PmuFacts::Absent),
            Level::Limited,
            "no performance",
        ),
        (set(|f| f.pmu = PmuFacts::Denied), Level::Limited, "forbids"),
        (
            set(|f| f.clock_source = Some("acpi_pm".into())),
            Level::Good,
            "acpi_pm",
        ),
        (set(|f| f.clock_read_ns = 4000), Level::Limited, "4000 ns"),
        (
            set(|f| f.urgency = Some(Urgency::Nice)),
            Level::Limited,
            "no real-time priority",
        ),
        (
            set(|f| f.urgency = Some(Urgency::Usual)),
            Level::Limited,
            "no priority over other work",
        ),
    ];
    for (facts, level, words) in cases {
        let (ways, findings) = judge(&facts);
        assert!(!ways.is_empty(), "{words}: a pair still runs");
        let found: Vec<_> = findings
            .iter()
            .filter(|f| f.found.contains(words))
            .collect();
        assert!(
            found
                .iter()
                .any(|f| f.level == level && (level == Level::Good || f.advice.is_some())),
            "{words}: {findings:#?}"
        );
    }
}

#[test]
fn without_a_usable_kvm_no_pair_runs() {
    let mut facts = best();
    let unusable = |why: &str, cpu_could| KvmFacts::Unusable {
        why: why.into(),
        cpu_could,
    };
    for (kvm, virtual_machine, remedy) in [
        (unusable("/dev/kvm does not exist", true), false, "modprobe"),
        (unusable("/dev/kvm does not exist", false), true, "nested"),
        (
            unusable("/dev/kvm does not exist", false),
            false,
            "firmware",
        ),
    ] {
        (facts.kvm, facts.virtual_machine) = (kvm, virtual_machine);
        let (ways, findings) = judge(&facts);
        assert!(ways.is_empty());
        assert_eq!(findings[0].level, Level::Missing);
        assert!(
            findings[0].advice.as_ref().unwrap().contains(remedy),
            "{findings:?}"
        );
    }
    facts.kvm = KvmFacts::Open {
        capabilities: Capabilities {
            missing: vec!["KVM_CAP_X86_MSR_FILTER"],
            ..Capabilities::default()
        },
        cpu: None,
        probe: None,
    };
    let (ways, findings) = judge(&facts);
    assert!(ways.is_empty());
    assert!(findings[0].found.contains("KVM_CAP_X86_MSR_FILTER"));
    let broken = with_probe(|probe| probe.mmio_exit_ns.ring0 = Err("stuck".into()));
    assert!(judge(&broken).0.is_empty());
}

#[test]
fn the_library_that_is_missing_is_named_with_its_package() {
    for (why, advice) in [
        (
            "libdoppel_verbs.so: libibverbs.so.1: cannot open shared object file",
            "libibverbs1",
        ),
        (
            "libdoppel_verbs.so: librdmacm.so.1: cannot open shared object file",
            "librdmacm1",
        ),
        (
            "libdoppel_verbs.so has version 7 of the table",
            "same sources",
        ),
        ("beside/libdoppel_verbs.so does not exist", "DOPPEL_VERBS"),
    ] {
        let mut facts = best();
        facts.verbs = VerbsFacts::Missing { why: why.into() };
        let (_, findings) = judge(&facts);
        let found = findings.iter().find(|f| f.found.contains(why)).unwrap();
        assert!(found.advice.as_ref().unwrap().contains(advice), "{found:?}");
    }
}

#[test]
fn a_configuration_is_looked_at_for_its_secret_and_its_library() {
    let mut facts = best();
    let mut config = Config::default();
    assert!(
        look_at(&config, &facts)
            .iter()
            .all(|f| f.level == Level::Good)
    );
    config.pair.transport = Transport::Rdma;
    let findings = look_at(&config, &facts);
    assert_eq!(findings[0].level, Level::Missing);
    assert!(findings[0].found.contains("doppel secret"), "{findings:?}");
    let place = TempDir::new().unwrap();
    let path = place.path().join("secret");
    crate::handshake::Secret::create(&path).unwrap();
    config.pair.secret = Some(path.clone());
    assert!(
        look_at(&config, &facts)
            .iter()
            .all(|f| f.level == Level::Good)
    );
    facts.verbs = VerbsFacts::Missing {
        why: "not here".into(),
    };
    let findings = look_at(&config, &facts);
    assert!(
        findings
            .iter()
            .any(|f| f.level == Level::Missing && f.found == "not here")
    );
    fs::write(&path, "no secret").unwrap();
    assert_eq!(look_at(&config, &facts)[0].level, Level::Missing);
}

#[test]
fn an_arbiter_that_answers_is_good_and_one_that_does_not_says_why() {
    let directory = TempDir::new().unwrap();
    let there: Place = directory.path().to_str().unwrap().parse().unwrap();
    assert_eq!(ask_arbiter(&there).level, Level::Good);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("etcd://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let finding = ask_arbiter(&place.parse().unwrap());
    assert_eq!(finding.level, Level::Missing);
    assert!(finding.found.contains("refused"), "{}", finding.found);
}

#[test]
fn no_tap_leaves_the_link() {
    let mut facts = best();
    facts.stage = StageFacts::NotTried;
    assert_eq!(judge(&facts).0, ["shm+link"]);
}

#[test]
fn a_host_is_read_from_its_files() {
    let root = root(&[
        (
            "proc/cpuinfo",
            "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu svm hypervisor\n",
        ),
        (
            "proc/self/status",
            "Name:\tx\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-3\n",
        ),
        (
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units\n\
             Max locked memory         8388608              8388608              bytes\n",
        ),
        (
            "proc/meminfo",
            "MemAvailable:    1024 kB\nHugePages_Free:    7\n",
        ),
        ("sys/devices/system/cpu/isolated", "2-3\n"),
        (
            "sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
            "0-1\n",
        ),
        (
            "sys/devices/system/cpu/cpu1/topology/thread_siblings_list",
            "0-1\n",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always [never] force\n",
        ),
        (
            "sys/devices/system/clocksource/clocksource0/current_clocksource",
            "kvm-clock\n",
        ),
        ("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE\n"),
        ("sys/class/infiniband/rxe0/ports/1/link_layer", "Ethernet\n"),
    ]);
    let facts = gather(root.path());
    assert!(facts.virtual_machine);
    assert_eq!(facts.cpu_name.as_deref(), Some("Some CPU"));
    assert_eq!(facts.cpus, [0, 1, 2, 3]);
    assert_eq!(facts.cores, 3);
    assert_eq!(facts.isolated, [2, 3]);
    assert_eq!(facts.lock_limit, Some(8 << 20));
    assert_eq!(facts.memory_available, Some(1 << 20));
    assert_eq!(facts.huge_pages_free, 7);
    assert_eq!(facts.shared_huge_pages.as_deref(), Some("never"));
    assert_eq!(facts.clock_source.as_deref(), Some("kvm-clock"));
    assert_eq!(facts.rdma.len(), 1);
    assert_eq!(facts.rdma[0].state, "4: ACTIVE");
    match facts.kvm {
        KvmFacts::Unusable { why, cpu_could } => {
            assert!(cpu_could && why.contains("does not exist"), "{why}");
        }
        KvmFacts::Open { .. } => panic!("there is no KVM in this root"),
    }
}

#[test]
fn an_empty_host_is_a_fact_and_no_panic() {
    let root = root(&[]);
    let facts = gather(root.path());
    assert!(facts.cpus.is_empty());
    let (ways, findings) = judge(&facts);
    assert!(ways.is_empty() && !findings.is_empty());
}

/// A device node that is no KVM, as a file left there by mistake.
#[test]
fn a_file_instead_of_kvm_is_refused() {
    let root = root(&[("dev/kvm", "")]);
    let facts = gather(root.path());
    assert!(
        matches!(facts.kvm, KvmFacts::Unusable { .. }),
        "{:?}",
        facts.kvm
    );
    assert!(judge(&facts).0.is_empty());
}

/// CAP_IPC_LOCK lifts the limit.
#[test]
fn a_privileged_process_locks_without_limit() {
    let root = root(&[("proc/self/status", "CapEff:\t0000000000004000\n")]);
    assert_eq!(gather(root.path()).lock_limit, None);
}
