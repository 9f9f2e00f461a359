//! `doppel slurm`, and the hidden command that keeps a node's part of it.

use std::path::PathBuf;

use clap::Args;
use hypervisor::arbiter::Place;
use hypervisor::config::Transport;
use hypervisor::slurm::{self, Machine, Node, SlurmError, Submission};

use super::Failure;

/// Run a protected machine as a Slurm job: this is what its batch script runs
#[derive(Debug, Args)]
#[command(
    after_help = "The first node of the allocation has the primary, the second its backup, the others are standbys. A node that is lost costs the job\n\
                  nothing if it was submitted with --no-kill. Whatever ends the job (scancel, its time limit) powers the guest off first, on both\n\
                  sides; and the guest's own power-off ends the job. docs/slurm.md has all of it.\n\n\
                  What follows -- is said to doppel primary and doppel backup on every node, which must find the same files and devices there.\n\n\
                  Ends 0 if the guest turned itself off or was powered off, 5 if it crashed or ended with another status, 1 if the machine could not\n\
                  run or is lost, 2 if it was said wrongly: Slurm then has the job as failed.\n\n\
                  Examples:\n  \
                  sbatch --nodes=3 --no-kill --no-requeue --wrap 'exec doppel slurm -- --guest kv --tap doppel0 --command-line ip=192.0.2.77/24'\n  \
                  sbatch scripts/slurm/doppel.sbatch\n  \
                  exec doppel slurm --arbiter etcd://192.0.2.10:2379 --transport rdma --address-of '{}-ib' -- --guest kv    (in a batch script)"
)]
pub struct SlurmArgs {
    /// The job's directory, made for it, on a file system that all nodes see: the secret, each node's log, the arbiter if it is a
    /// directory [default: doppel-JOB where the job was submitted]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The machine's name at the arbiter [default: job-JOB]
    #[arg(long)]
    name: Option<String>,
    /// What carries its log: tcp or rdma
    #[arg(long, value_name = "tcp|rdma", value_parser = super::vm::carrier, default_value = "tcp")]
    transport: Transport,
    /// Where the arbiter is [default: a directory in the job's]
    #[arg(long, value_name = "DIR|etcd://HOST:PORT,...")]
    arbiter: Option<Place>,
    /// The pair's secret [default: one is drawn for the job]
    #[arg(long, value_name = "FILE")]
    secret: Option<PathBuf>,
    /// The port at which its backups listen, the same on every node [default: 7800 and the last three digits of the job's number]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// The name that a node has on the network for the log, {} being Slurm's name for it, such as {}-ib [default: the node's NodeAddr]
    #[arg(long, value_name = "PATTERN")]
    address_of: Option<String>,
    /// Options of doppel primary and doppel backup: the guest, its network, RDMA, times
    #[arg(last = true, value_name = "OPTIONS")]
    words: Vec<String>,
}

/// Look after a node's part in a Slurm job: doppel slurm starts this
#[derive(Debug, Args)]
pub struct KeeperArgs {
    #[arg(long)]
    name: String,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long, value_parser = super::vm::carrier)]
    transport: Transport,
    #[arg(long)]
    arbiter: Place,
    #[arg(long)]
    secret: PathBuf,
    /// Which of the nodes this one is
    #[arg(long)]
    at: usize,
    #[arg(long = "node", required = true)]
    nodes: Vec<Node>,
    #[arg(last = true)]
    words: Vec<String>,
}

fn failure(error: SlurmError) -> Failure {
    let code = match error {
        SlurmError::NoJob(_) | SlurmError::OneNode | SlurmError::Node(_) => Failure::USAGE,
        _ => Failure::ERROR,
    };
    Failure::new(code, error)
}

fn told(code: u8) -> Result<(), Failure> {
    match code {
        0 => Ok(()),
        Failure::GUEST => Err(Failure::new(
            code,
            "the guest crashed, or turned itself off with a status",
        )),
        code => Err(Failure::new(
            code,
            "the machine did not run to its end: the nodes' logs say why",
        )),
    }
}

pub fn slurm(args: &SlurmArgs) -> Result<(), Failure> {
    let submission = Submission {
        directory: args.dir.clone(),
        name: args.name.clone(),
        transport: args.transport,
        arbiter: args.arbiter.clone(),
        secret: args.secret.clone(),
        port: args.port,
        address_of: args.address_of.clone(),
        words: args.words.clone(),
    };
    told(slurm::launch(&submission).map_err(failure)?)
}

pub fn keep(args: &KeeperArgs) -> Result<(), Failure> {
    let machine = Machine {
        name: args.name.clone(),
        directory: args.dir.clone(),
        transport: args.transport,
        arbiter: args.arbiter.clone(),
        secret: args.secret.clone(),
        nodes: args.nodes.clone(),
        words: args.words.clone(),
    };
    if args.at >= machine.nodes.len() {
        return Err(Failure::new(
            Failure::USAGE,
            format!("there is no node {}", args.at),
        ));
    }
    told(slurm::keep(&machine, args.at).map_err(failure)?)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn a_keeper_is_told_what_it_reads() {
        let machine = Machine {
            name: "job-1".into(),
            directory: "/shared/doppel-1".into(),
            transport: Transport::Rdma,
            arbiter: "etcd://10.0.0.9:2379".parse().unwrap(),
            secret: "/shared/doppel-1/secret".into(),
            nodes: vec![
                "a=10.0.0.1:7801".parse().unwrap(),
                "b=10.0.0.2:7801".parse().unwrap(),
            ],
            words: vec!["--guest".into(), "kv".into(), "--memory=64".into()],
        };
        let mut words = vec!["doppel".to_owned(), slurm::KEEPER.to_owned()];
        words.extend(machine.keeper(1));
        let Command::SlurmNode(read) = Cli::try_parse_from(words).unwrap().command else {
            panic!("another command");
        };
        assert_eq!((read.at, &read.name), (1, &machine.name));
        assert_eq!((&read.nodes, &read.words), (&machine.nodes, &machine.words));
        assert_eq!(
            (read.transport, &read.arbiter),
            (machine.transport, &machine.arbiter)
        );
    }

    #[test]
    fn what_a_role_is_told_is_what_roles_take() {
        let machine = Machine {
            name: "job-1".into(),
            directory: "/shared/doppel-1".into(),
            transport: Transport::Tcp,
            arbiter: "/shared/doppel-1/arbiter".parse().unwrap(),
            secret: "/shared/doppel-1/secret".into(),
            nodes: vec![
                "a=10.0.0.1:7801".parse().unwrap(),
                "b=10.0.0.2:7801".parse().unwrap(),
            ],
            words: vec!["--guest".into(), "kv".into(), "--tap".into(), "t0".into()],
        };
        for part in [slurm::Part::Primary, slurm::Part::Backup] {
            let mut words = vec!["doppel".to_owned()];
            words.extend(machine.role(0, part, std::path::Path::new("/tmp/x")));
            assert!(Cli::try_parse_from(&words).is_ok(), "{words:?}");
        }
    }
}
