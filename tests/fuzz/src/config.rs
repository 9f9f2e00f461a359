//! A configuration: what anybody may have typed.
#![forbid(unsafe_code)]

use hypervisor::config::Config;

use super::Target;

pub(super) const TARGET: Target = Target {
    name: "config",
    line: "a TOML file: read and checked, or refused in words",
    run,
    seeds,
};

fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let said = match Config::parse(text) {
        Ok(config) => config.check().map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(words) = said {
        assert!(!words.trim().is_empty(), "an error without words");
    }
}

const EVERYTHING: &str = "name = \"machine\"\nguest = \"kv\"\nmemory_mib = 64\ncommand_line = \"ip=10.77.0.2/24\"\n\
    kvm = \"/dev/kvm\"\n[net]\nbackend = \"tap\"\ntap = \"t0\"\naddress = \"10.77.0.1/24\"\n[pair]\nsocket = \"s\"\n\
    transport = \"tcp\"\nlisten = \"127.0.0.1:0\"\nconnect = \"[::1]:7\"\nheartbeat = \"127.0.0.1:0\"\n[cpus]\nvcpu = [0]\n\
    [timing]\nheartbeat_ms = 5\nspin_us = 0\nlag_ms = 5\nmemory_check_ms = 0\n[preempt]\nstrategy = \"checkpoint\"\n\
    [sandbox]\nstrict = true\n[ring]\nevents_kib = 1024\ninputs_kib = 4096\n";

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![EVERYTHING.as_bytes().to_vec()];
    for piece in [
        "memory_mib = 18446744073709551615\n",
        "[timing]\nheartbeat_ms = -1\n",
        "[ring]\nevents_kib = 9223372036854775807\n",
        "name = \"\"\"\n\u{1f980}\"\"\"\n",
    ] {
        seeds.push(piece.into());
    }
    seeds
}
