//! What the facts mean for a pair.
#![forbid(unsafe_code)]

use super::facts::{Facts, KvmFacts, PmuFacts, StageFacts, VerbsFacts};
use super::probe::{Measured, Probe};
use super::{Finding, Level};
use crate::scheduling::Urgency;

/// An instruction in ring 0 that takes this much longer than in ring 3 is emulated. Emulation costs about a microsecond, a
/// thousand times as much, and a real CPU runs both alike; so any factor in between tells them apart.
const EMULATED: f64 = 20.0;
/// A port exit takes 1 to 2 µs on bare metal and 12 µs on a nested KVM; from here on requests feel it.
const SLOW_EXIT_NS: u64 = 50_000;
/// A kick that takes longer than this makes interrupts late; 75 µs is usual on a nested KVM.
const SLOW_KICK_NS: u64 = 500_000;
/// A reading of the clock takes 20 to 60 ns when the CPU's own counter is used.
const SLOW_CLOCK_NS: u64 = 500;
/// What a pair with the default machine (64 MiB) uses, both sides and rings together.
const PAIR_MEMORY: u64 = 256 << 20;

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, area: &'static str, level: Level, found: impl Into<String>) -> &mut Finding {
        self.0.push(Finding {
            area,
            level,
            found: found.into(),
            advice: None,
        });
        self.0.last_mut().expect("one was just added")
    }
}

impl Finding {
    fn advise(&mut self, advice: impl Into<String>) {
        self.advice = Some(advice.into());
    }
}

/// The ways in which a pair can run here, and what was found.
#[must_use]
pub fn judge(facts: &Facts) -> (Vec<&'static str>, Vec<Finding>) {
    let mut findings = Findings(Vec::new());
    let kvm = kvm(facts, &mut findings);
    cpu(facts, &mut findings);
    memory(facts, &mut findings);
    let tap = network(facts, &mut findings);
    rdma(facts, &mut findings);
    pmu(facts, &mut findings);
    clock(facts, &mut findings);
    urgency(facts, &mut findings);
    let ways = match (kvm, tap) {
        (false, _) => vec![],
        (true, true) => vec!["shm+tap", "shm+link"],
        (true, false) => vec!["shm+link"],
    };
    (ways, findings.0)
}

fn kvm(facts: &Facts, findings: &mut Findings) -> bool {
    const AREA: &str = "KVM";
    let (capabilities, cpu, probe) = match &facts.kvm {
        KvmFacts::Unusable { why, cpu_could } => {
            let finding = findings.add(AREA, Level::Missing, why.clone());
            if why.contains("does not exist") {
                finding.advise(match (cpu_could, facts.virtual_machine) {
                    (true, _) => {
                        "the CPU has virtualization: run `modprobe kvm_amd` or `modprobe kvm_intel`"
                    }
                    (false, true) => {
                        "this is a virtual machine: enable nested virtualization on its host and pass the host's CPU model"
                    }
                    (false, false) => {
                        "enable virtualization (SVM, VT-x) in the firmware's set-up, then load kvm_amd or kvm_intel"
                    }
                });
            }
            return false;
        }
        KvmFacts::Open {
            capabilities,
            cpu,
            probe,
        } => (capabilities, cpu, probe),
    };
    if !capabilities.missing.is_empty() {
        findings
            .add(
                AREA,
                Level::Missing,
                format!("this KVM lacks {}", capabilities.missing.join(", ")),
            )
            .advise("use Linux 5.10 or newer");
        return false;
    }
    findings.add(
        AREA,
        Level::Good,
        "it opens, speaks API 12 and has all that a pair needs",
    );
    if let Some(cpu) = cpu {
        findings.add(
            AREA,
            Level::Good,
            format!(
                "CPU for the handshake: {} {:#x}; the other host must have the same",
                cpu.vendor, cpu.signature
            ),
        );
    }
    let Some(probe) = probe else {
        return false;
    };
    let runs = costs(probe, findings);
    quirks(probe, findings);
    if capabilities.no_crew.is_empty() && !capabilities.moves_time_stamps {
        findings.add(
            AREA,
            Level::Limited,
            "it has interrupt controllers of its own (--cpu host, --vcpus), and does not move a guest's time stamp: after a failover from another host it may go back",
        )
        .advise("protect guests that read it between two processes of this host, or use --cpu replayable");
    } else if capabilities.no_crew.is_empty() {
        findings.add(
            AREA,
            Level::Good,
            "it has interrupt controllers of its own: Linux guests can have the host's CPU and several vCPUs (--cpu host, --vcpus)",
        );
    } else {
        findings
            .add(
                AREA,
                Level::Limited,
                format!(
                    "it lacks {}: Linux guests have one vCPU, which can be replayed (--cpu replayable)",
                    capabilities.no_crew.join(", ")
                ),
            )
            .advise("use a newer kernel for guests with several vCPUs");
    }
    let ring = capabilities.dirty_ring;
    match (&probe.dirty_log, ring) {
        (Ok(true), 0) => findings.add(
            AREA,
            Level::Good,
            "checkpoints find written pages by the dirty log (no dirty ring)",
        ),
        (Ok(true), ring) => findings.add(
            AREA,
            Level::Good,
            format!("checkpoints find written pages by the dirty log; a dirty ring of {ring} bytes is there too"),
        ),
        (outcome, _) => {
            let why = why(outcome);
            let finding = findings.add(
                AREA,
                Level::Missing,
                format!("the dirty log does not show what a guest wrote{why}: no checkpoints"),
            );
            finding.advise("use another kernel; replay works, re-protection does not");
            finding
        }
    };
    runs
}

fn why<T>(outcome: &Measured<T>) -> String {
    outcome
        .as_ref()
        .err()
        .map_or_else(String::new, |why| format!(" ({why})"))
}

fn micros(nanos: u64) -> String {
    format!("{:.1} µs", nanos as f64 / 1e3)
}

fn cost(measured: &Measured<u64>) -> String {
    measured.as_ref().map_or_else(
        |why| format!("not measured ({why})"),
        |nanos| micros(*nanos),
    )
}

/// Says what exits cost; whether a guest of ours can run at all.
fn costs(probe: &Probe, findings: &mut Findings) -> bool {
    const AREA: &str = "KVM";
    let text = format!(
        "an exit and back: port {} (ring 3 {}), MMIO {} (ring 3 {})",
        cost(&probe.port_exit_ns.ring0),
        cost(&probe.port_exit_ns.ring3),
        cost(&probe.mmio_exit_ns.ring0),
        cost(&probe.mmio_exit_ns.ring3)
    );
    let all = [
        &probe.port_exit_ns.ring0,
        &probe.port_exit_ns.ring3,
        &probe.mmio_exit_ns.ring0,
        &probe.mmio_exit_ns.ring3,
    ];
    if all.iter().any(|cost| cost.is_err()) {
        findings
            .add(AREA, Level::Missing, text)
            .advise("this KVM cannot run the smallest guest; use another kernel or host");
        return false;
    }
    let slowest = all.iter().filter_map(|cost| cost.as_ref().ok()).max();
    if slowest.is_some_and(|nanos| *nanos > SLOW_EXIT_NS) {
        findings.add(AREA, Level::Limited, text).advise(
            "exits are slow, as under emulation or deep nesting: good for trying out, not for figures",
        );
    } else {
        findings.add(AREA, Level::Good, text);
    }
    match &probe.kick {
        Ok(kick) => {
            let text = format!(
                "a kick stops the guest within {} (median), {} (worst)",
                micros(kick.p50_ns),
                micros(kick.max_ns)
            );
            let slow = kick.p50_ns > SLOW_KICK_NS;
            let finding = findings.add(AREA, if slow { Level::Limited } else { Level::Good }, text);
            if slow {
                finding.advise(
                    "give the vCPU threads cores of their own (cpus.vcpu) and stop other load",
                );
            }
        }
        Err(error) => {
            findings
                .add(
                    AREA,
                    Level::Limited,
                    format!("kicks could not be measured: {error}"),
                )
                .advise("run it again on a quiet machine");
        }
    }
    true
}

fn quirks(probe: &Probe, findings: &mut Findings) {
    const AREA: &str = "KVM";
    if let (Ok(ring0), Ok(ring3)) = (&probe.instruction_ns.ring0, &probe.instruction_ns.ring3) {
        if *ring0 > EMULATED * ring3.max(0.1) {
            findings
                .add(
                    AREA,
                    Level::Limited,
                    format!(
                        "ring-0 code is emulated: {ring0:.0} ns an instruction, {ring3:.1} ns in ring 3"
                    ),
                )
                .advise("a guest must work in ring 3, as ours do; a Linux guest will be slow here");
        } else {
            findings.add(
                AREA,
                Level::Good,
                format!("ring-0 code runs natively: {ring0:.1} ns an instruction"),
            );
        }
    }
    if probe.sse_in_ring0 == Ok(false) {
        findings
            .add(AREA, Level::Limited, "SSE does not work in ring 0")
            .advise(
                "build ring-0 code of a guest of your own for integers only (docs/guest-abi.md)",
            );
    }
    let steps = (&probe.single_step.ring0, &probe.single_step.ring3);
    match steps {
        (Ok(true), Ok(true)) => {
            findings.add(AREA, Level::Good, "single-stepping works in both rings");
        }
        (Ok(true), _) => {
            findings
                .add(AREA, Level::Limited, "single-stepping works in ring 0 only")
                .advise("debugging by steps and preemption by counting need another KVM");
        }
        _ => {
            findings
                .add(AREA, Level::Limited, "single-stepping does not work")
                .advise("debugging by steps and preemption by counting need another KVM");
        }
    }
    match &probe.msr_exits {
        Ok(true) => {
            findings.add(AREA, Level::Good, "time-like MSRs come to us");
        }
        outcome => {
            let why = why(outcome);
            findings
                .add(
                    AREA,
                    Level::Missing,
                    format!("filtered MSRs do not come to us{why}: a guest that reads one is not deterministic"),
                )
                .advise("guests of ours read none; for others use Linux 5.10 or newer");
        }
    }
    template(probe, findings);
}

fn template(probe: &Probe, findings: &mut Findings) {
    const AREA: &str = "KVM";
    const ADVICE: &str = "replay is exact for guests that do not choose instructions by CPUID and do not read the \
                          counter, as ours; protect others by checkpoints";
    let shown = [
        ("ring 0", &probe.template_holds.ring0),
        ("ring 3", &probe.template_holds.ring3),
    ];
    let leaks: Vec<&str> = shown
        .iter()
        .filter(|(_, holds)| **holds != Ok(true))
        .map(|(ring, _)| *ring)
        .collect();
    if leaks.is_empty() {
        findings.add(
            AREA,
            Level::Good,
            "CPUID in the guest shows neither a time-stamp counter nor hardware random numbers",
        );
    } else {
        findings
            .add(
                AREA,
                Level::Limited,
                format!(
                    "this KVM does not hide what it was told to hide: CPUID in {} shows the time-stamp counter or hardware \
                     random numbers",
                    leaks.join(" and in ")
                ),
            )
            .advise(ADVICE);
    }
    if probe.rdtsc_runs == Ok(true) {
        findings
            .add(
                AREA,
                Level::Limited,
                "RDTSC runs in the guest although it is hidden, as on every stock KVM",
            )
            .advise(ADVICE);
    } else {
        findings.add(AREA, Level::Good, "RDTSC faults in the guest");
    }
}

fn cpu(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "CPUs";
    let name = facts.cpu_name.as_deref().unwrap_or("unknown");
    let place = if facts.virtual_machine {
        "a virtual machine"
    } else {
        "bare metal"
    };
    findings.add(AREA, Level::Good, format!("{name}, {place}"));
    let count = facts.cpus.len();
    let threads = if facts.cores < count {
        format!(" on {} cores", facts.cores)
    } else {
        String::new()
    };
    match facts.cores {
        0 | 1 => findings
            .add(
                AREA,
                Level::Limited,
                format!("{count} CPU{threads}: both sides of a local pair share it"),
            )
            .advise("it works, with long tails; two cores give each side one, four each thread"),
        2 | 3 => findings
            .add(
                AREA,
                Level::Limited,
                format!("{count} CPUs{threads}: each side of a local pair gets one, its vCPU and I/O threads share it"),
            )
            .advise("four cores or more give each thread its own; leave timing.spin_us at 0"),
        _ => findings.add(
            AREA,
            Level::Good,
            format!("{count} CPUs{threads}: each of a local pair's four threads gets its own"),
        ).advise("set cpus.vcpu and cpus.io, and timing.spin_us to about 50, where the cores are free"),
    }
    if facts.isolated.is_empty() {
        findings
            .add(AREA, Level::Limited, "no core is kept free of other work")
            .advise("for the shortest tails boot with isolcpus=LIST nohz_full=LIST and give them as cpus.vcpu and cpus.io");
    } else {
        findings.add(
            AREA,
            Level::Good,
            format!(
                "isolated: {:?}; use them as cpus.vcpu and cpus.io",
                facts.isolated
            ),
        );
    }
    if facts.autogroups == Some(true) {
        findings
            .add(
                AREA,
                Level::Limited,
                "the kernel shares CPUs out by session (autogroups)",
            )
            .advise(
                "under load a kernel 6.18 kept workers of its own, for which KVM waits, off a CPU for 13 s: sysctl kernel.sched_autogroup_enabled=0",
            );
    }
}

fn memory(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "memory";
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    match facts.memory_available {
        Some(free) if free < PAIR_MEMORY => findings
            .add(AREA, Level::Limited, format!("{} are available", mib(free)))
            .advise(
                "a local pair of 64 MiB machines takes up to 256 MiB: choose --memory accordingly",
            ),
        Some(free) => {
            findings.add(AREA, Level::Good, format!("{} are available", mib(free)));
        }
        None => {
            findings.add(AREA, Level::Limited, "how much is available is not known");
        }
    }
    let ring = (rdma_log::EVENTS_LANE + rdma_log::INPUTS_LANE) as u64 + (64 << 10);
    match facts.lock_limit {
        Some(limit) if limit < ring => findings
            .add(
                AREA,
                Level::Limited,
                format!("only {} may be locked, the log's ring has {}", mib(limit), mib(ring)),
            )
            .advise("raise it (ulimit -l, LimitMEMLOCK=), or a page fault can delay a commit; RDMA needs it"),
        Some(limit) => {
            findings.add(AREA, Level::Good, format!("{} may be locked, enough for the log's ring", mib(limit)));
        }
        None => {
            findings.add(AREA, Level::Good, "memory may be locked without limit");
        }
    }
    let shared = facts.shared_huge_pages.as_deref().unwrap_or("unknown");
    if ["always", "within_size", "advise", "force"].contains(&shared) {
        findings.add(
            AREA,
            Level::Good,
            format!("huge pages for shared memory: {shared}"),
        );
    } else {
        findings
            .add(
                AREA,
                Level::Limited,
                format!("guest memory gets no huge pages (shmem_enabled is {shared})"),
            )
            .advise(
                "for large guests: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
            );
    }
}

fn network(facts: &Facts, findings: &mut Findings) -> bool {
    const AREA: &str = "network";
    let works = match &facts.stage {
        StageFacts::Works { user_namespace } => {
            findings.add(
                AREA,
                Level::Good,
                if *user_namespace {
                    "a TAP in a network namespace works, without root (in a user namespace)"
                } else {
                    "a TAP in a network namespace works"
                },
            );
            true
        }
        StageFacts::Refused { why } => {
            findings
                .add(AREA, Level::Limited, format!("no TAP: {why}"))
                .advise("the demo uses the Unix-socket link instead, which needs no privilege");
            false
        }
        StageFacts::NotTried => {
            findings
                .add(AREA, Level::Limited, "a TAP was not tried")
                .advise(
                    "run `doppel doctor` by itself: a process with several threads cannot try it",
                );
            false
        }
    };
    findings.add(
        AREA,
        Level::Good,
        "the Unix-socket link works for every user",
    );
    works
}

fn rdma(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "RDMA";
    if facts.rdma.is_empty() {
        findings
            .add(AREA, Level::Limited, "no RDMA device")
            .advise("on one host none is needed; between hosts use an RDMA card, or soft-RoCE (`rdma link add rxe0 type rxe netdev DEVICE`) to try it");
    }
    match &facts.verbs {
        VerbsFacts::Works { devices } => {
            // A device that the kernel has and the library does not see lacks its maker's part.
            let unseen: Vec<&str> = facts
                .rdma
                .iter()
                .map(|device| device.name.as_str())
                .filter(|name| !devices.iter().any(|seen| seen == name))
                .collect();
            if unseen.is_empty() {
                findings.add(
                    AREA,
                    Level::Good,
                    "libdoppel_verbs.so and libibverbs are there",
                );
            } else {
                findings
                    .add(AREA, Level::Limited, format!("libibverbs does not see {}", unseen.join(", ")))
                    .advise("install ibverbs-providers, which has the makers' libraries, and look whether this user may open /dev/infiniband");
            }
        }
        VerbsFacts::Missing { why } => findings
            .add(
                AREA,
                Level::Limited,
                format!("transport rdma cannot be used: {why}"),
            )
            .advise(verbs_advice(why)),
        VerbsFacts::NotTried => {}
    }
    for device in &facts.rdma {
        let text = format!("{}: {}, {}", device.name, device.link, device.state);
        if device.state.contains("ACTIVE") {
            findings.add(AREA, Level::Good, text);
        } else {
            findings
                .add(AREA, Level::Limited, text)
                .advise("bring its network interface up; `rdma link` shows the state");
        }
    }
}

/// Which of the libraries it is.
fn verbs_advice(why: &str) -> &'static str {
    if why.contains("libibverbs.so") {
        "rdma-core is missing: install libibverbs1 and ibverbs-providers"
    } else if why.contains("librdmacm.so") {
        "a part of rdma-core is missing: install librdmacm1"
    } else if why.contains("has version") {
        "build the program and the library from the same sources"
    } else {
        "for shm and tcp it is not needed; for rdma build it by `cargo build --release -p doppel-verbs` and put \
         libdoppel_verbs.so beside the program, or name it in DOPPEL_VERBS"
    }
}

fn pmu(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "counters";
    match facts.pmu {
        PmuFacts::Works => {
            findings.add(AREA, Level::Good, "a counter of retired branches can be had");
        }
        PmuFacts::Absent => findings
            .add(AREA, Level::Limited, "no performance counters")
            .advise("guests that compute for long are interrupted by checkpoints instead of by counting; nothing to do"),
        PmuFacts::Denied => findings
            .add(AREA, Level::Limited, "the kernel forbids performance counters")
            .advise("sysctl kernel.perf_event_paranoid=2, or give CAP_PERFMON"),
        PmuFacts::NotTried => {
            findings.add(AREA, Level::Limited, "performance counters were not tried");
        }
    }
}

fn urgency(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "scheduling";
    const ALLOW: &str = "give the user RLIMIT_RTPRIO of 1 or more (`LimitRTPRIO=1` in a unit, `rtprio 1` in limits.conf), \
                         or CAP_SYS_NICE";
    match facts.urgency {
        Some(Urgency::RealTime) => {
            findings.add(
                AREA,
                Level::Good,
                "heartbeats may have real-time priority: a busy host does not make them late",
            );
        }
        Some(Urgency::Nice) => findings
            .add(
                AREA,
                Level::Limited,
                "heartbeats may have a nice value but no real-time priority: a very busy host makes them late",
            )
            .advise(ALLOW),
        Some(Urgency::Usual) => findings
            .add(
                AREA,
                Level::Limited,
                "heartbeats have no priority over other work: on a busy host they are late, and a healthy side may be given up",
            )
            .advise(ALLOW),
        None => {}
    }
}

fn clock(facts: &Facts, findings: &mut Findings) {
    const AREA: &str = "clock";
    let source = facts.clock_source.as_deref().unwrap_or("unknown");
    let text = format!(
        "clock source {source}, {} ns a reading",
        facts.clock_read_ns
    );
    if facts.clock_read_ns > SLOW_CLOCK_NS {
        findings
            .add(AREA, Level::Limited, text)
            .advise("every exit reads the clock: prefer tsc or kvm-clock (clocksource= on the kernel's command line)");
    } else {
        findings.add(AREA, Level::Good, text);
    }
}
