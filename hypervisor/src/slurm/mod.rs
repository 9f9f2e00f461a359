//! A protected machine as a Slurm job: the first node of the allocation has its primary, the second its backup, the others standbys.
//!
//! ```text
//!   sbatch ──▶ batch step, on the first node: doppel slurm ──srun──▶ a step on every node: its keeper ──starts──▶ primary | backup
//!              shows the nodes' logs, tells the job's end            SIGTERM: orders the guest off               SIGTERM is kept from it
//! ```
//! **Nothing hangs on the batch step**, which dies with its node while the job runs on (`--no-kill`). Each node has a step of its own, so that a lost
//! one is no other's business. An `srun` answers SIGTERM, which a cancelled job's processes all get, by killing its tasks; so it is
//! ended as soon as its task has started (`child.rs`), and steps run on without it as they would without the batch step's node. A node's keeper looks after
//! its role: it starts one that ended again, as a standby, and ends the job itself where the batch step is gone.
//!
//! Who lives is decided by the pair and its arbiter, as ever; Slurm only says which nodes there are.
#![deny(unsafe_code)]

mod ask;
#[allow(unsafe_code)]
mod child;
mod follow;
mod keeper;
mod launch;
mod run_dir;

pub use keeper::keep;
pub use launch::{Submission, launch};

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::arbiter::{ArbiterError, Place};
use crate::config::Transport;
use crate::handshake::SecretError;
use crate::session::SessionError;

/// The hidden command by which a node's keeper is started.
pub const KEEPER: &str = "slurm-node";

/// Why a job's machine cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SlurmError {
    /// Not in a batch step.
    #[error(
        "{0} is not set: doppel slurm is what a batch script runs (sbatch scripts/slurm/doppel.sbatch)"
    )]
    NoJob(&'static str),
    /// An allocation that cannot hold a pair.
    #[error(
        "the job has one node, and a protected machine needs two: submit it with --nodes=2 or more"
    )]
    OneNode,
    /// What is there already.
    #[error("{} is there already: it is made anew for each job, so give another --dir", .0.display())]
    Exists(PathBuf),
    /// Somebody's, where a node's run directory is to be.
    #[error(
        "{} is there already and {why}: anybody may take that name. Have it removed, or submit the job with a directory of your own for \
         temporary files (export TMPDIR=DIRECTORY, one that is there on every node)",
        path.display()
    )]
    Taken {
        /// The name.
        path: PathBuf,
        /// What is wrong with what has it.
        why: &'static str,
    },
    /// A node that Slurm does not describe.
    #[error("Slurm names no address of node {0}: see scontrol show node {0}")]
    Unknown(String),
    /// A node's address.
    #[error(
        "node {node}: its address {text:?} leads nowhere ({why}); --address-of names another one"
    )]
    Address {
        /// The node.
        node: String,
        /// What was looked up.
        text: String,
        /// What came of it.
        why: String,
    },
    /// A node that was told wrongly.
    #[error("{0:?} is no node: NAME=ADDRESS:PORT")]
    Node(String),
    /// One of Slurm's commands.
    #[error("{command}: {why}")]
    Command {
        /// The command.
        command: String,
        /// What it said.
        why: String,
    },
    /// A step that did not start.
    #[error("the step on node {node} did not start: {why}")]
    NotStarted {
        /// Where.
        node: String,
        /// What came of it.
        why: String,
    },
    /// The secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The arbiter.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// Signals.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Files and processes.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> SlurmError {
    let what = what.into();
    move |source| SlurmError::Io { what, source }
}

/// A node of the allocation, and where its backup listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Slurm's name for it.
    pub name: String,
    /// Its address for the other nodes, with the machine's port.
    pub place: SocketAddr,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.place)
    }
}

impl FromStr for Node {
    type Err = SlurmError;

    fn from_str(text: &str) -> Result<Self, SlurmError> {
        let parsed = text.split_once('=').and_then(|(name, place)| {
            let place = place.parse().ok()?;
            (!name.is_empty()).then(|| Self {
                name: name.to_owned(),
                place,
            })
        });
        parsed.ok_or_else(|| SlurmError::Node(text.to_owned()))
    }
}

/// What every node knows of the job's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name at the arbiter.
    pub name: String,
    /// The job's directory, on a file system that all nodes see.
    pub directory: PathBuf,
    /// What carries its log: `tcp` or `rdma`.
    pub transport: Transport,
    /// Who decides who lives.
    pub arbiter: Place,
    /// The pair's secret.
    pub secret: PathBuf,
    /// The allocation's nodes, the first one's is the first primary.
    pub nodes: Vec<Node>,
    /// What else `doppel primary` and `doppel backup` are told: the guest, its network.
    pub words: Vec<String>,
}

/// What a role is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The machine's first primary.
    Primary,
    /// The backup, or a standby: the serving side calls whom it wants.
    Backup,
}

impl Machine {
    /// The part that the node of this number has when the job starts.
    #[must_use]
    pub fn part(at: usize) -> Part {
        if at == 0 { Part::Primary } else { Part::Backup }
    }

    /// The word for it in steps and logs.
    #[must_use]
    pub fn title(at: usize) -> &'static str {
        match at {
            0 => "primary",
            1 => "backup",
            _ => "standby",
        }
    }

    /// Where a node says what happens to it.
    #[must_use]
    pub fn log_of(&self, node: &Node) -> PathBuf {
        self.directory.join(format!("{}.log", node.name))
    }

    /// Where a node leaves how it came out.
    fn end_of(&self, node: &Node) -> PathBuf {
        self.directory.join(format!("{}.end", node.name))
    }

    /// The words by which a role on the node of this number is started, with its control socket in `run_dir`.
    #[must_use]
    pub fn role(&self, at: usize, part: Part, run_dir: &Path) -> Vec<String> {
        let me = &self.nodes[at];
        let mut words = Vec::new();
        let mut say = |word: &str, value: String| words.extend([word.to_owned(), value]);
        say("--name", self.name.clone());
        say("--transport", self.transport.name().to_owned());
        say("--arbiter", self.arbiter.to_string());
        say("--secret", self.secret.display().to_string());
        say("--run-dir", run_dir.display().to_string());
        say("--heartbeat", SocketAddr::new(me.place.ip(), 0).to_string());
        for (number, node) in self.nodes.iter().enumerate() {
            if number != at {
                say("--standby", node.place.to_string());
            }
        }
        let part = match part {
            Part::Primary => {
                // The second node's is the backup, whoever listens first.
                say("--connect", self.nodes[1].place.to_string());
                "primary"
            }
            Part::Backup => {
                say("--listen", me.place.to_string());
                "backup"
            }
        };
        words.insert(0, part.to_owned());
        words.extend(self.words.iter().cloned());
        words
    }

    /// The words by which the keeper of the node of this number is started, after [`KEEPER`].
    #[must_use]
    pub fn keeper(&self, at: usize) -> Vec<String> {
        let mut words = Vec::new();
        let mut say = |word: &str, value: String| words.extend([word.to_owned(), value]);
        say("--name", self.name.clone());
        say("--dir", self.directory.display().to_string());
        say("--transport", self.transport.name().to_owned());
        say("--arbiter", self.arbiter.to_string());
        say("--secret", self.secret.display().to_string());
        say("--at", at.to_string());
        for node in &self.nodes {
            say("--node", node.to_string());
        }
        words.push("--".to_owned());
        words.extend(self.words.iter().cloned());
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let nodes = ["a=10.0.0.1:7801", "b=10.0.0.2:7801", "c=[fd00::3]:7801"];
        Machine {
            name: "job-1".into(),
            directory: "/shared/doppel-1".into(),
            transport: Transport::Tcp,
            arbiter: Place::Directory("/shared/doppel-1/arbiter".into()),
            secret: "/shared/doppel-1/secret".into(),
            nodes: nodes.map(|node| node.parse().unwrap()).to_vec(),
            words: vec!["--guest".into(), "kv".into()],
        }
    }

    fn has(words: &[String], pair: [&str; 2]) -> bool {
        words.windows(2).any(|two| two == pair)
    }

    #[test]
    fn a_node_reads_as_it_is_written() {
        for node in &machine().nodes {
            assert_eq!(node.to_string().parse::<Node>().unwrap(), *node);
        }
        for bad in ["a", "=10.0.0.1:1", "a=10.0.0.1", "a=b:7801"] {
            assert!(bad.parse::<Node>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_node_calls_the_second_and_knows_of_the_others() {
        let machine = machine();
        let first = machine.role(0, Machine::part(0), Path::new("/run/x"));
        assert_eq!(first[0], "primary");
        assert!(has(&first, ["--connect", "10.0.0.2:7801"]), "{first:?}");
        assert!(has(&first, ["--standby", "[fd00::3]:7801"]), "{first:?}");
        assert!(!has(&first, ["--standby", "10.0.0.1:7801"]), "{first:?}");
        assert_eq!(first[first.len() - 2..], ["--guest", "kv"]);
    }

    #[test]
    fn every_other_node_listens_and_so_does_the_first_one_later() {
        let machine = machine();
        for at in 0..3 {
            let words = machine.role(at, Part::Backup, Path::new("/run/x"));
            let own = machine.nodes[at].place.to_string();
            assert_eq!(words[0], "backup");
            assert!(has(&words, ["--listen", &own]), "{words:?}");
            assert!(!words.contains(&"--connect".to_owned()), "{words:?}");
            let standbys = words.iter().filter(|word| *word == "--standby").count();
            assert_eq!(standbys, 2);
        }
        assert_eq!(
            machine.role(2, Part::Backup, Path::new("/r"))[12],
            "[fd00::3]:0"
        );
    }
}
