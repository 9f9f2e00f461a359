//! A primary that ends itself at a given step: the other process of the output rule's hostile harness.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;
use doppel_tests::harness::hostile::{Step, Victim};
use hypervisor::backends::NetPort;

/// Record a guest until the given step, then die by SIGKILL (started by the tests)
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the parent listens
    #[arg(long)]
    socket: PathBuf,
    /// Descriptor of the cable by which frames come
    #[arg(long)]
    cable: RawFd,
    /// Descriptor of the cable by which outputs leave
    #[arg(long)]
    world: RawFd,
    /// The step at which to die
    #[arg(long, requires = "at")]
    step: Option<Step>,
    /// The how-manieth time
    #[arg(long)]
    at: Option<u64>,
    /// The guest
    #[arg(long)]
    guest: String,
    /// Its words
    #[arg(long)]
    words: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    Victim {
        socket: &arguments.socket,
        cable: NetPort::inherited(arguments.cable)?,
        world: NetPort::inherited(arguments.world)?,
        plan: arguments.step.zip(arguments.at),
        guest: &arguments.guest,
        words: &arguments.words,
    }
    .run()
}
