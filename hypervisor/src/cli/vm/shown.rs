//! Tables for people, JSON for programs.

use std::io::IsTerminal;

use hypervisor::agent::disks::{self, Bytes, ImageReport};
use hypervisor::agent::record::{Host, Phase, Site, Vm};
use hypervisor::control::status::Standing;
use serde_json::{Value, json};

use super::super::figures::count;
use super::super::status::Paint;

/// Colours where somebody looks.
pub fn paint() -> Paint {
    Paint(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
}

/// A table: a line of names, and lines, each of which is painted as a whole.
fn table<const N: usize>(head: [&str; N], rows: &[([String; N], bool)], paint: Paint) -> String {
    let widths: Vec<usize> = (0..N)
        .map(|at| {
            let cells = rows.iter().map(|(row, _)| row[at].chars().count());
            cells.max().unwrap_or(0).max(head[at].len())
        })
        .collect();
    let put = |cells: &[String; N]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut text = paint.faint(&put(&head.map(str::to_owned)));
    text.push('\n');
    for (row, alarm) in rows {
        let line = put(row);
        text.push_str(&match alarm {
            true => paint.alarm(&line),
            false => line,
        });
        text.push('\n');
    }
    text
}

/// How a machine is, in a word, and whether somebody should look at it.
fn state(site: &Site, vm: &Vm) -> (String, bool) {
    let says = site.serving(&vm.name).and_then(|(_, role)| role.says);
    match (&vm.phase, says) {
        (Phase::Running, Some(says)) => {
            let word = says.standing.word().replace('_', " ");
            match says.standing {
                Standing::Unprotected | Standing::Joining if vm.protect => {
                    (word.to_uppercase(), true)
                }
                _ => (word, false),
            }
        }
        // Lost with both its hosts, or served out of every agent's sight.
        (Phase::Running, None) => ("NOT SEEN".to_owned(), true),
        // It was out of sight, and somebody noted that it is off.
        (phase, Some(_)) if phase.is_off() => {
            (format!("{}, YET SERVED", phase.word().to_uppercase()), true)
        }
        (phase @ Phase::Failed { .. }, _) => (phase.word().to_uppercase(), true),
        (phase, _) => (phase.word().to_owned(), false),
    }
}

fn places(site: &Site, vm: &Vm) -> (Option<String>, Option<String>) {
    let serves = site.serving(&vm.name).map(|(host, _)| host.name.clone());
    let follows = site.following(&vm.name).map(|host| host.name.clone());
    (serves, follows)
}

/// All machines.
pub fn machines(site: &Site, paint: Paint) -> String {
    let rows: Vec<_> = site
        .vms
        .values()
        .map(|vm| {
            let vm = &vm.value;
            let (state, alarm) = state(site, vm);
            let (serves, follows) = places(site, vm);
            let epoch = site.records.get(&vm.name).map(|record| record.epoch.0);
            let none = || "-".to_owned();
            let row = [
                vm.name.clone(),
                state,
                serves.unwrap_or_else(none),
                follows.unwrap_or_else(none),
                epoch.map_or_else(none, |epoch| epoch.to_string()),
                format!("{} MiB", vm.spec.memory_mib),
                vm.port.to_string(),
            ];
            (row, alarm)
        })
        .collect();
    let head = [
        "MACHINE",
        "STATE",
        "SERVED BY",
        "BACKUP",
        "EPOCH",
        "MEMORY",
        "PORT",
    ];
    let mut text = table(head, &rows, paint);
    text.push_str(&format!(
        "\n{}\n",
        paint.faint("doppel vm show NAME says more of one")
    ));
    text
}

/// All hosts.
pub fn hosts(site: &Site, paint: Paint) -> String {
    let rows: Vec<_> = site
        .hosts
        .values()
        .map(|host| {
            let host = &host.value;
            let (cpu, alarm) = match &host.cpu {
                Some(cpu) => (format!("{} {:#x}", cpu.vendor, cpu.signature), false),
                None => ("NO KVM".to_owned(), true),
            };
            let free = host.memory_mib.saturating_sub(site.committed_mib(host));
            let drained = match site.is_drained(&host.name) {
                true => "drained",
                false => "-",
            };
            let row = [
                host.name.clone(),
                drained.to_owned(),
                host.address.to_string(),
                cpu,
                format!("{free} of {} MiB", host.memory_mib),
                format!("{:.2}", host.load),
                host.rdma.clone().unwrap_or_else(|| "-".to_owned()),
                host.roles.len().to_string(),
                host.version.clone(),
            ];
            (row, alarm)
        })
        .collect();
    let head = [
        "HOST",
        "STATE",
        "ADDRESS",
        "CPU",
        "MEMORY FREE",
        "LOAD",
        "RDMA",
        "ROLES",
        "VERSION",
    ];
    table(head, &rows, paint)
}

/// One machine.
pub fn machine(site: &Site, vm: &Vm, paint: Paint) -> String {
    let (state, alarm) = state(site, vm);
    let state = match alarm {
        true => paint.alarm(&format!(" {state} ")),
        false => paint.good(&state),
    };
    let mut text = format!("{}  {state}\n", paint.bold(&vm.name));
    let mut row = |name: &str, value: String| {
        text.push_str(&format!(
            "  {} {value}\n",
            paint.faint(&format!("{name:10}"))
        ));
    };
    let spec = &vm.spec;
    let guest = match (&spec.guest, &spec.kernel) {
        (Some(guest), _) => guest.clone(),
        (_, Some(kernel)) => kernel.display().to_string(),
        _ => "none".to_owned(),
    };
    let (transport, replicate) = (spec.transport.name(), spec.replicate.name());
    row(
        "guest",
        format!(
            "{guest}, {} MiB, {replicate} over {transport}",
            spec.memory_mib
        ),
    );
    row(
        "wanted",
        format!(
            "{}, {}",
            vm.phase.word(),
            match vm.protect {
                true => "protected",
                false => "without a backup",
            }
        ),
    );
    if let Some(disk) = &spec.disk {
        row("disk", disk.to_string());
    }
    for (host, image) in disks::images(site, vm) {
        let of = format!(
            "image of {}, {}",
            Bytes(image.bytes),
            image_state(site, vm, (host, image))
        );
        row(&host.name, of);
    }
    for (host, role) in roles(site, vm) {
        let what = role.says.map_or_else(
            || "says nothing: it is frozen, or being set up".to_owned(),
            |says| {
                let standing = says.standing.word().replace('_', " ");
                format!(
                    "{} {standing}, epoch {}, position {}",
                    says.role.word(),
                    says.epoch,
                    count(says.position as f64)
                )
            },
        );
        let strange = match site.is_of(role) {
            true => "",
            false => ", of a machine of this name that was deleted",
        };
        row(&host.name, format!("{what}, process {}{strange}", role.pid));
    }
    if let Some(on) = &vm.backup {
        row("backup on", on.host.clone());
    }
    row("port", vm.port.to_string());
    if let Some(record) = site.records.get(&vm.name) {
        row("arbiter", record.to_string());
    }
    if let Phase::Failed { why } = &vm.phase {
        row("failed", why.clone());
    }
    for failure in &vm.failures {
        row("failure", format!("on {}: {}", failure.host, failure.why));
    }
    if let Some(note) = &vm.note {
        row("note", note.clone());
    }
    text
}

/// How an image of a machine's disk stands to it.
fn image_state(site: &Site, vm: &Vm, (host, image): (&Host, &ImageReport)) -> String {
    let following = site.following(&vm.name);
    if following.is_some_and(|following| following.name == host.name) {
        return "follows".to_owned();
    }
    let fault = image.fault(site.records.get(&vm.name));
    match (&vm.disk, fault) {
        (Some(life), _) if disks::is_new(site, vm, life) => "new".to_owned(),
        (_, None) => "the newest".to_owned(),
        (_, Some(why)) => why,
    }
}

fn roles<'a>(
    site: &'a Site,
    vm: &'a Vm,
) -> impl Iterator<Item = (&'a Host, &'a hypervisor::agent::record::RoleReport)> {
    site.hosts.values().flat_map(|host| {
        let of = host.value.roles_of(&vm.name);
        of.map(move |role| (&host.value, role))
    })
}

/// One machine, for programs.
pub fn machine_json(site: &Site, vm: &Vm) -> Value {
    let (state, alarm) = state(site, vm);
    let (serves, follows) = places(site, vm);
    let mut value = serde_json::to_value(vm).expect("plain fields always encode");
    value["state"] = json!(state.to_lowercase());
    value["alarm"] = json!(alarm);
    value["served_by"] = json!(serves);
    value["followed_by"] = json!(follows);
    value["protected"] =
        json!(site.serving(&vm.name).is_some_and(|(_, role)| {
            role.says.is_some_and(|says| says.standing.is_protected())
        }));
    value["epoch"] = json!(site.records.get(&vm.name).map(|record| record.epoch.0));
    let roles: Vec<Value> = roles(site, vm)
        .map(|(host, role)| {
            let mut value = serde_json::to_value(role).expect("plain fields always encode");
            value["host"] = json!(host.name);
            value
        })
        .collect();
    value["roles"] = Value::Array(roles);
    let images = disks::images(site, vm).map(|(host, image)| {
        json!({ "host": host.name, "bytes": image.bytes, "state": image_state(site, vm, (host, image)) })
    });
    value["images"] = images.collect();
    value
}

/// All machines, for programs.
pub fn machines_json(site: &Site) -> Value {
    site.vms
        .values()
        .map(|vm| machine_json(site, &vm.value))
        .collect()
}

/// A host, for programs.
pub fn host_json(site: &Site, host: &Host) -> Value {
    let mut value = serde_json::to_value(host).expect("plain fields always encode");
    value["committed_mib"] = json!(site.committed_mib(host));
    value["drained"] = json!(site.is_drained(&host.name));
    value
}
