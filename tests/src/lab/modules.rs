//! Kernel modules: which of them a host needs, in which order, and what `modprobe` must know of them.
//!
//! Everything is read from the modules themselves: their `.modinfo` section is a row of `name=value` strings that end in NUL.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::packages::listing;

/// What a host loads when it boots.
pub const LOADED: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "kvm_amd",
    "tun",
    "ib_uverbs",
    "rdma_ucm",
    // rdma_rxe asks for this checksum by name when a device is added, which no dependency says.
    "crc32_generic",
    "rdma_rxe",
];

/// What a host has besides, for whoever asks by `modprobe` or by using it.
pub const AT_HAND: &[&str] = &[
    "autofs4",
    "br_netfilter",
    "crc32c_generic",
    "bridge",
    "dummy",
    "ib_umad",
    "macvlan",
    "nft_chain_nat",
    "nft_compat",
    "overlay",
    "sch_ingress",
    "sch_netem",
    "act_mirred",
    "cls_u32",
    "veth",
    "virtio_blk",
    "vhost_net",
    "loop",
    "ext4",
    "dm_mod",
    // A disk for other hosts, and theirs.
    "target_core_file",
    "iscsi_target_mod",
    "iscsi_tcp",
    "sd_mod",
];

/// The modules of a kernel.
#[derive(Debug)]
pub struct Modules {
    tree: PathBuf,
    files: BTreeMap<String, PathBuf>,
}

/// One module as an archive takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Where it lies below the kernel's directory of modules.
    pub path: String,
    /// The names of those that it needs.
    pub needs: Vec<String>,
    /// The names by which the kernel asks for it.
    pub aliases: Vec<String>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Modules {
    /// The modules below `tree`, which is `lib/modules/VERSION`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn below(tree: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut directories = vec![tree.join("kernel")];
        while let Some(directory) = directories.pop() {
            for path in listing(&directory)? {
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
                    && let Some(name) = name.strip_suffix(".ko")
                {
                    files.insert(name.replace('-', "_"), path);
                }
            }
        }
        Ok(Self {
            tree: tree.to_owned(),
            files,
        })
    }

    /// The named modules and all that they need, each after what it needs.
    ///
    /// # Errors
    /// If one is not there.
    pub fn in_order(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut ordered = Vec::new();
        for name in names {
            self.add(name, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn add(&self, name: &str, ordered: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        if ordered.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let path = self
            .files
            .get(&name)
            .with_context(|| format!("the kernel has no module {name}"))?;
        let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let needs: Vec<String> = info(&bytes, "depends")
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|need| !need.is_empty())
            .map(|need| need.replace('-', "_"))
            .collect();
        // What a module asks for at run time it names as soft dependency; the built-in ones have no file.
        let wished: Vec<String> = info(&bytes, "softdep")
            .iter()
            .flat_map(|list| list.split_whitespace())
            .map(|wish| wish.replace('-', "_"))
            .filter(|wish| self.files.contains_key(wish))
            .collect();
        for need in needs.iter().chain(&wished) {
            self.add(need, ordered)?;
        }
        let below = path
            .strip_prefix(&self.tree)
            .context("a module outside its tree")?;
        ordered.push(Module {
            path: below.display().to_string(),
            needs,
            aliases: info(&bytes, "alias"),
            bytes,
            name,
        });
        Ok(())
    }
}

/// The values of this name in a module's `.modinfo`.
fn info(module: &[u8], name: &str) -> Vec<String> {
    let key = format!("\0{name}=");
    let key = key.as_bytes();
    let mut values = Vec::new();
    let mut from = 0;
    while let Some(at) = find(&module[from..], key) {
        let value = &module[from + at + key.len()..];
        let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
        if let Ok(value) = std::str::from_utf8(&value[..end]) {
            values.push(value.to_owned());
        }
        // The NUL that ends this value may begin the next key.
        from += at + key.len() + end;
    }
    values
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

/// `modules.dep`: every module with all that must be loaded before it, the nearest first.
#[must_use]
pub fn dependencies(modules: &[Module]) -> String {
    let by_name: BTreeMap<&str, &Module> = modules
        .iter()
        .map(|module| (module.name.as_str(), module))
        .collect();
    let mut text = String::new();
    for module in modules {
        let mut all: Vec<&str> = Vec::new();
        let mut open: Vec<&str> = module.needs.iter().map(String::as_str).collect();
        while let Some(name) = open.pop() {
            let Some(needed) = by_name.get(name) else {
                continue;
            };
            // A module that was met before must be loaded before this one too: it moves back.
            all.retain(|path| *path != needed.path);
            all.push(&needed.path);
            open.extend(needed.needs.iter().map(String::as_str));
        }
        text += &format!("{}: {}\n", module.path, all.join(" "));
    }
    text
}

/// `modules.alias`.
#[must_use]
pub fn aliases(modules: &[Module]) -> String {
    modules
        .iter()
        .flat_map(|module| {
            module
                .aliases
                .iter()
                .map(move |alias| format!("alias {alias} {}\n", module.name))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, needs: &[&str]) -> Module {
        Module {
            name: name.into(),
            path: format!("kernel/{name}.ko"),
            needs: needs.iter().map(|need| (*need).to_owned()).collect(),
            aliases: vec![format!("net-{name}")],
            bytes: Vec::new(),
        }
    }

    #[test]
    fn what_a_module_says_of_itself_is_read() {
        let bytes = b"rubbish\0depends=a,b-c\0alias=x\0alias=y:*\0intree=Y\0";
        assert_eq!(info(bytes, "depends"), ["a,b-c"]);
        assert_eq!(info(bytes, "alias"), ["x", "y:*"]);
        assert_eq!(info(bytes, "softdep"), [""; 0]);
    }

    #[test]
    fn modprobe_hears_of_what_is_needed_and_by_which_names() {
        let modules = [
            module("core", &[]),
            module("middle", &["core"]),
            module("top", &["core", "middle"]),
        ];
        assert_eq!(
            dependencies(&modules),
            "kernel/core.ko: \nkernel/middle.ko: kernel/core.ko\nkernel/top.ko: kernel/middle.ko kernel/core.ko\n"
        );
        assert!(aliases(&modules).contains("alias net-top top\n"));
    }
}
