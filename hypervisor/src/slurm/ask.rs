//! What Slurm's own commands say.
#![forbid(unsafe_code)]

use std::net::{IpAddr, ToSocketAddrs};
use std::process::{Command, Stdio};

use super::SlurmError;

/// What a command of Slurm's printed.
pub(super) fn ask(program: &str, words: &[&str]) -> Result<String, SlurmError> {
    let wrong = |why: String| SlurmError::Command {
        command: format!("{program} {}", words.join(" ")),
        why,
    };
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| wrong(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(wrong(format!("{}: {}", output.status, said.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The value of a field in a line of `scontrol --oneliner`.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// The names in a list of nodes such as `n[1-3]`, in Slurm's order.
pub(super) fn names(list: &str) -> Result<Vec<String>, SlurmError> {
    let text = ask("scontrol", &["show", "hostnames", list])?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Slurm's addresses of these nodes.
pub(super) fn addresses(list: &str, names: &[String]) -> Result<Vec<String>, SlurmError> {
    let text = ask("scontrol", &["--oneliner", "show", "node", list])?;
    addresses_in(&text, names)
}

fn addresses_in(text: &str, names: &[String]) -> Result<Vec<String>, SlurmError> {
    let of = |name: &String| {
        let line = text
            .lines()
            .find(|line| field(line, "NodeName") == Some(name.as_str()));
        line.and_then(|line| field(line, "NodeAddr"))
            .map(str::to_owned)
            .ok_or_else(|| SlurmError::Unknown(name.clone()))
    };
    names.iter().map(of).collect()
}

/// The first address that a name has here.
pub(super) fn look_up(node: &str, text: &str) -> Result<IpAddr, SlurmError> {
    let wrong = |why: String| SlurmError::Address {
        node: node.to_owned(),
        text: text.to_owned(),
        why,
    };
    let mut found = (text, 0)
        .to_socket_addrs()
        .map_err(|error| wrong(error.to_string()))?;
    let first = found.next();
    first
        .map(|address| address.ip())
        .ok_or_else(|| wrong("no address".into()))
}

/// A job, as Slurm has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    /// Whether it runs.
    pub(super) runs: bool,
    /// Where its batch step was started.
    pub(super) batch_host: Option<String>,
    /// Its nodes, as a list.
    pub(super) nodes: Option<String>,
}

impl Job {
    /// Asks for it.
    pub(super) fn of(id: &str) -> Result<Self, SlurmError> {
        Ok(Self::read(&ask(
            "scontrol",
            &["--oneliner", "show", "job", id],
        )?))
    }

    fn read(line: &str) -> Self {
        // NodeList, not ReqNodeList or ExcNodeList: a field's name is the whole word.
        let named = |name: &str| {
            field(line, name)
                .filter(|value| !value.is_empty() && *value != "(null)")
                .map(str::to_owned)
        };
        Self {
            runs: field(line, "JobState") == Some("RUNNING"),
            batch_host: named("BatchHost"),
            nodes: named("NodeList"),
        }
    }

    /// Whether its batch step was lost with its node.
    pub(super) fn lost_its_batch_step(&self) -> Result<bool, SlurmError> {
        let (Some(host), Some(nodes)) = (&self.batch_host, &self.nodes) else {
            return Ok(false);
        };
        Ok(self.runs && !names(nodes)?.contains(host))
    }
}

/// Whether any step but the batch step runs, on a node that the job still has: Slurm goes on listing those of lost nodes.
pub(super) fn has_living_steps(id: &str) -> Result<bool, SlurmError> {
    let nodes = match Job::of(id)?.nodes {
        Some(nodes) => names(&nodes)?,
        None => Vec::new(),
    };
    let text = ask(
        "squeue",
        &["--steps", "--noheader", "--jobs", id, "--format", "%i %N"],
    )?;
    Ok(lives_in(&text, &nodes))
}

fn lives_in(text: &str, nodes: &[String]) -> bool {
    text.lines().any(|line| {
        let (step, node) = line.trim().split_once(' ').unwrap_or_default();
        let of_machine = step
            .rsplit_once('.')
            .is_some_and(|(_, number)| number.parse::<u32>().is_ok());
        of_machine && nodes.iter().any(|name| *name == node.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: &str = "NodeName=a Arch=x86_64 CoresPerSocket=1  NodeAddr=10.78.0.1 NodeHostName=a Version=22.05.8\n\
                         NodeName=ab CoresPerSocket=1 NodeAddr=ab.example NodeHostName=ab\n";

    #[test]
    fn addresses_come_in_the_order_of_the_names() {
        let names = ["ab", "a"].map(str::to_owned);
        assert_eq!(
            addresses_in(NODES, &names).unwrap(),
            ["ab.example", "10.78.0.1"]
        );
        assert!(matches!(
            addresses_in(NODES, &["b".to_owned()]),
            Err(SlurmError::Unknown(name)) if name == "b"
        ));
    }

    #[test]
    fn a_job_is_read() {
        let line = "JobId=7 JobName=kv JobState=RUNNING Reason=None ReqNodeList=(null) ExcNodeList=(null) NodeList=b,c BatchHost=a NumNodes=2";
        let job = Job::read(line);
        assert_eq!(
            (job.runs, job.batch_host.as_deref(), job.nodes.as_deref()),
            (true, Some("a"), Some("b,c"))
        );
        let gone = Job::read("JobId=7 JobState=CANCELLED NodeList=(null)");
        assert_eq!((gone.runs, gone.nodes), (false, None));
    }

    #[test]
    fn a_batch_step_is_no_step_of_the_machine() {
        let nodes = ["b", "c"].map(str::to_owned);
        assert!(!lives_in("7.batch b\n7.extern b\n", &nodes));
        assert!(lives_in("7.batch a\n7.1 c\n", &nodes));
        // Node a was lost.
        assert!(!lives_in("7.batch a\n7.0 a\n", &nodes));
    }
}
