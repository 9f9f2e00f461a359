//! Records that tests are about.

use super::record::{Host, Kept, Order, Phase, Ports, RoleReport, Says, Site, Verb, Vm};
use super::spec::Spec;
use crate::control::status::{Role, Standing};
use crate::kvm::CpuModel;

pub fn host(name: &str) -> Host {
    Host {
        name: name.to_owned(),
        instance: format!("{name}-1"),
        address: [10, 0, 0, name.as_bytes()[name.len() - 1]].into(),
        cpu: Some(CpuModel {
            vendor: "GenuineTest".into(),
            signature: 1,
        }),
        memory_mib: 1024,
        ports: Ports {
            first: 7700,
            last: 7799,
        },
        network: true,
        rdma: None,
        load: 0.0,
        version: "0.1.0".into(),
        written_ms: 0,
        console: Some(7699),
        boot: "first".into(),
        roles: Vec::new(),
        images: Some(Vec::new()),
    }
}

pub fn vm(name: &str) -> Vm {
    Vm {
        name: name.to_owned(),
        instance: "1".into(),
        spec: Spec {
            guest: Some("kv".into()),
            ..Spec::default()
        },
        port: 7700,
        protect: true,
        phase: Phase::Starting {
            on: None,
            cold: false,
        },
        backup: None,
        number: 0,
        failures: Vec::new(),
        note: None,
        cold_from: None,
        disk: None,
    }
}

pub fn role_of(machine: &str, role: Role, standing: Standing) -> RoleReport {
    RoleReport {
        machine: machine.to_owned(),
        pid: 100,
        instance: None,
        says: Some(Says {
            role,
            standing,
            epoch: 1,
            position: 7,
        }),
    }
}

/// Order 1, to switch `kv` over, as it stands in etcd.
pub fn order_a_switch(site: &mut Site) {
    let order = Order {
        id: "1".into(),
        machine: "kv".into(),
        verb: Verb::Switch,
    };
    site.orders.insert(
        "kv".into(),
        Kept {
            value: order,
            revision: 5,
        },
    );
}

pub fn site(hosts: &[&str]) -> Site {
    let mut site = Site::default();
    for name in hosts {
        let value = host(name);
        site.hosts
            .insert(value.name.clone(), Kept { value, revision: 1 });
    }
    site
}

pub fn put(site: &mut Site, vm: Vm) {
    site.vms.insert(
        vm.name.clone(),
        Kept {
            value: vm,
            revision: 1,
        },
    );
}
